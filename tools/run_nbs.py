"Run notebooks in a Jupyter kernel and store their outputs, clean and small: `python tools/run_nbs.py [NOTEBOOK ...]`"
import os,sys
from base64 import b64decode,b64encode
from io import BytesIO
from pathlib import Path

import nbformat
from PIL import Image, ImageChops
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nb_test_cells

def as_png(im):
    "`im` as a PNG, with a palette of 256 colours if no pixel looks different in it"
    few = im.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    off = max(most for _,most in ImageChops.difference(im, few.convert('RGB')).getextrema()) # of 255
    res = BytesIO()
    (few if off<=8 else im).save(res, 'png', optimize=True)
    return res.getvalue()

def as_jpeg(im):
    "`im` as a JPEG with all of its colours, since coloured text is dull else"
    res = BytesIO()
    im.save(res, 'jpeg', quality=70, subsampling=0, optimize=True, progressive=True)
    return res.getvalue()

def shrink(png):
    "MIME type and base64 of `png`, on white: a JPEG where that is smaller by a third or more, as with photos; else a PNG"
    im = Image.open(BytesIO(b64decode(png))).convert('RGBA')
    im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    p,j = as_png(im),as_jpeg(im)
    mime,f = ('image/jpeg', j) if 3*len(j) < 2*len(p) else ('image/png', p)
    return mime, b64encode(f).decode()

def run(fn, cfg):
    "Run the cells of `fn` that `nbdev-test` runs; the others keep their outputs"
    nb,todo = nbformat.read(fn, 4),{o.id for o in nb_test_cells(fn, cfg.tst_flags)}
    for c in nb.cells:
        if c.id not in todo: c.metadata['tags'] = ['skip-execution']
    NotebookClient(nb, timeout=cfg.cell_timeout, resources=dict(metadata=dict(path=str(fn.parent)))).execute()
    nb.metadata.pop('widgets', None)  # what widgets hold, pictures too, though no output shows one
    for c in nb.cells:
        if c.cell_type!='code': continue
        c.outputs = [o for o in c.outputs if o.get('name')!='stderr']  # warnings name local paths
        for o in c.outputs:
            if 'image/png' in o.get('data', {}): o.data.update([shrink(o.data.pop('image/png'))])
    nbformat.write(nb, fn)
    nbdev_clean(str(fn))

if __name__=='__main__':
    os.environ.pop('MPLBACKEND', None) # with another than the notebooks' own there are no pictures
    os.environ['MATPLOTLIBRC'] = str(Path(__file__).parent)
    cfg = get_config(Path(__file__).parent)
    for fn in [Path(o).absolute() for o in sys.argv[1:]] or sorted(nbglob(cfg.nbs_path, as_path=True)):
        print(fn.name)
        run(fn, cfg)

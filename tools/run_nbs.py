"Run notebooks in a Jupyter kernel and store their outputs, clean: `python tools/run_nbs.py [NOTEBOOK ...]`"
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nb_test_cells

def run(fn, cfg):
    "Run the cells of `fn` that `nbdev-test` runs; the others keep their outputs"
    nb,todo = nbformat.read(fn, 4),{o.id for o in nb_test_cells(fn, cfg.tst_flags)}
    for c in nb.cells:
        if c.id not in todo: c.metadata['tags'] = ['skip-execution']
    NotebookClient(nb, timeout=cfg.cell_timeout, resources=dict(metadata=dict(path=str(fn.parent)))).execute()
    for c in nb.cells:
        # warnings name local paths
        if c.cell_type=='code': c.outputs = [o for o in c.outputs if o.get('name')!='stderr']
    nbformat.write(nb, fn)
    nbdev_clean(str(fn))

if __name__=='__main__':
    cfg = get_config(Path(__file__).parent)
    for fn in [Path(o).absolute() for o in sys.argv[1:]] or sorted(nbglob(cfg.nbs_path, as_path=True)):
        print(fn.name)
        run(fn, cfg)

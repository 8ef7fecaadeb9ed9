"Build the docs site, or README.md, from nbs/: cells as nbdev prepares them for its docs, outputs as stored in the notebooks."
import os,re,shutil,sys,yaml
from base64 import b64decode
from functools import partial
from importlib import import_module
from io import BytesIO,StringIO
from pathlib import Path

from fastcore.nbio import dict2nb,mk_cell,nb2str
from fastcore.script import call_parse
import fastcore.xtras  # gives paths `mk_write`
from nbconvert import MarkdownExporter
from nbconvert.writers import FilesWriter
from nbdev.config import get_config,nbpath2html
from nbdev.process import NBProcessor
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults
from nbdev.showdoc import show_doc
from PIL import Image
from sphinx.cmd.build import main as sphinx_build

root = Path(__file__).absolute().parents[1]
sys.path.insert(0, str(root/'tools'))
from oldest import settings
from reference import PUBLIC,receivers,reference,tidy

nbs = get_config(root).nbs_path
url = settings()['git_url']
left_out = 'FrontmatterProc','clean_show_doc','add_fold','exec_show_docs' # the first three are for Quarto; the last would run lessons again

def page(fn):
    "Name of the page of the notebook `fn`, a path below nbs/"
    return nbpath2html(Path(fn)).with_suffix('').as_posix()

def sidebar():
    "Caption -> pages and their notebooks, as nbs/_quarto.yml has them"
    def files(o): return sorted(nbs.glob(o['auto'])) if isinstance(o, dict) else [nbs/o]
    groups = yaml.safe_load((nbs/'_quarto.yml').read_text('utf-8'))['website']['sidebar']['contents']
    return {o['section']: {page(f.relative_to(nbs)): f for c in o['contents'] for f in files(c)}
            for o in groups if 'section' in o}

groups = sidebar()
pages = {'index': nbs/'index.ipynb', **{p:fn for g in groups.values() for p,fn in g.items()}}

def slug(s):
    "Anchor of heading `s`: nbdev links to `Learner.fit` as learner.fit"
    return re.sub(r'[^\w.-]', '', s.lower().replace(' ', '-'))

def outputs(c):
    "Outputs of `c`, without tables' own styles, bars that have gone, and what a plotting call returns beside its picture"
    ds = [o.get('data', {}) for o in c.outputs]
    pics = any({'image/png', 'image/jpeg'} & set(d) for d in ds)
    for d in ds:
        if 'text/html' not in d: continue
        s = re.sub('<style.*?</style>', '', ''.join(d['text/html']), flags=re.S)  # GitHub shows a style as text
        d['text/html'] = re.sub('<table[^>]*', '<table class="docutils"', s)
    for d in ds:
        if 'text/markdown' not in d: continue
        md = re.sub(r'\]\(/(?=\w)', '](', ''.join(d['text/markdown']))  # nbdev's links begin at the root of a site
        d['text/markdown'] = papers(md)
    def nothing(d): return not d.get('text/html', 'other').strip() or pics and list(d)==['text/plain']
    return [o for o,d in zip(c.outputs, ds) if not nothing(d)]

def documented(md):
    "What show_doc says, without a rule, a source link (there's no git_url for nbdev), and the type that it takes None for"
    md = md.replace(':NoneType=None', '=None')
    # the name as code, or the underscores of `__call__` make it bold
    md = tidy(re.sub(r'\A---\n+(?:\[source\].*\n+)?(#+) (.+)', r'\1 `\2`', md.partition('\n\nParameters:\n')[0]))
    params = re.findall(r'\**(\w+)(?=[:=,\s])', md.partition('\n):')[0].partition('```python')[2])
    # what is called like a parameter is the parameter, and nothing else of that name
    return re.sub(r'\[`(\w+)`\]\([^)]*\)', lambda m: f'`{m[1]}`' if m[1] in params else m[0], md)

def papers(s):
    "`s` with links to papers"
    s = re.sub(r'(?<![\[\w])arXiv (\d{4}\.\d{4,5})', r'[arXiv \1](https://arxiv.org/abs/\1)', s)
    return re.sub(r'(?<![\[\w])doi (10\.[\w./-]*\w)', r'[doi \1](https://doi.org/\1)', s)

def clean(c, link, known):
    "`c` as text or plain code; `link` changes the address of each Markdown link, and `known` are the names of the notebook's module"
    if c.cell_type=='code':
        if not c.source.startswith('show_doc('): return mk_cell(c.source, outputs=outputs(c))
        md = eval(c.source, dict(known, show_doc=show_doc))._repr_markdown_()
        c = mk_cell(documented(NbdevLookup().linkify(md)), 'markdown')
    md = re.sub(r'\[\[(`[^`]+`)\]\([^)]*\)\](?=\()', r'[\1]', c.source) # nbdev links a name that is in a link already
    return mk_cell(papers(re.sub(r'(?<=\]\()[^)\s]+', lambda m: link(m[0]), md)), c.cell_type)

def badge(md, url):
    "`md` with a badge below its title that tells whether the tests pass at `url`"
    tests = f'{url}/actions/workflows/test.yml'
    return md.replace('\n\n', f'\n\n[![Tests]({tests}/badge.svg)]({tests})\n\n', 1) if url else md

def colab(md, fn, url):
    "`md`, the first cell of the notebook `fn`, with a link below its title and summary that opens it in Colab, from the repository at `url`"
    if 'github.com/' not in url or fn.stem=='teachers': return md # no code there
    there = url.replace('github.com', 'colab.research.google.com/github') + '/blob/main/' + fn.relative_to(root).as_posix()
    head,_,rest = md.partition('\n\n> ')
    said,_,rest = rest.partition('\n\n')
    how = f'[Open in Colab]({there}), and begin there with `%pip install "fastai_heatmaps[demo] @ git+{url}"`.'
    return '\n\n'.join(filter(None, [f'{head}\n\n> {said}', how, rest]))

def prep(fn, link):
    "Notebook `fn` after nbdev's docs processing and `clean`"
    proc = NBProcessor(fn, [o for o in FilterDefaults().procs() if o.__name__ not in left_out])
    proc.process()
    known = vars(import_module(f"fastai_heatmaps.{fn.stem.partition('_')[2]}")) if proc.nb.has_docs_ else {}
    return book([clean(c, link, known) for c in proc.nb.cells])

def book(cells):
    "A notebook of `cells`"
    meta = dict(language_info=dict(name='python', pygments_lexer='ipython3'))
    return dict2nb(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)

def readme(dest):
    "Write README.md and README_files/ into `dest`"
    def link(u):
        u = re.sub(r'^/([\w./]+)\.html#.*', lambda m: pages[m[1]].relative_to(nbs).as_posix(), u)
        if u.startswith('reference/'): return 'fastai_heatmaps/all.py' # these pages are made for the site only
        return u if re.match(r'\w+:|#', u) else f'{nbs.name}/{u}'
    shutil.rmtree(dest/'README_files', ignore_errors=True)
    nb = StringIO(nb2str(prep(pages['index'], link)))
    md,res = MarkdownExporter().from_file(nb, dict(unique_key='README', output_files_dir='README_files'))
    md = re.sub(r'\n( *\n){2,}', '\n\n', re.sub(r'!\[(png|jpeg)\]', '![Output]', md)).strip() + '\n'
    FilesWriter(build_directory=str(dest)).write(badge(md, url), res, notebook_name='README')

def link(u, guide):
    "Address `u` as Sphinx knows it; in a guide, names lead to the reference, and elsewhere to the notebook that defines them"
    path,_,name = u.partition('#')
    if ':' in path or not path.endswith(('.ipynb', '.html')): return u
    found = [o for o,names in PUBLIC.items() if name in map(str.lower, names)] if guide and u[0]=='/' else []
    return (f'/reference/{found[0]}' if found else page(path)) + '.ipynb' + ('#'+name if name else '')

def named(md):
    "`md` with links from names as people write them, `show_gradcam` or `hm.plot()`, to the reference"
    def to(m):
        cls = next((k for k,v in receivers.items() if v==m[1]), 'Learner')
        found = [(p,n) for p,names in PUBLIC.items() for n in (f'{cls}.{m[2]}', m[2]) if n in names and not (m[1] and n==m[2])]
        return '[{}](/reference/{}.ipynb#{})'.format(m[0], found[0][0], found[0][1].lower()) if found else m[0]
    parts = re.split(r'(^```.*?^```|^#[^\n]*)', md, flags=re.S|re.M) # code and headings stay as they are
    name = r'(?<!\[)`(?:(learn|interp|hm)\.)?(\w+)(?:\([^`]*\))?`(?!\])'
    return ''.join(o if i%2 else re.sub(name, to, o) for i,o in enumerate(parts))

def width(out):
    "Of the picture in the output `out`, in pixels; 0 if there is none"
    data = [v for k,v in out.get('data', {}).items() if k in ('image/png', 'image/jpeg')]
    return Image.open(BytesIO(b64decode(''.join(data[0])))).width if data else 0

def aligned(c):
    "Does the cell `c` print columns?"
    text = ''.join(s for o in c.get('outputs', []) for s in o.get('text', ''))
    return len(re.findall(r'^\S.*?\S {3,}\S', text, re.M))>2

def toctree(caption, names):
    "A group of the sidebar"
    return mk_cell('\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *names, '```']), 'markdown')

def site(dest):
    "Write the site into `dest`/html; any warning fails"
    shutil.rmtree(dest, ignore_errors=True)
    src = Path(shutil.copytree(nbs, dest/'src', ignore=shutil.ignore_patterns('*.ipynb', '*.yml', '[._]*')))
    books = {p: prep(fn, partial(link, guide=p not in groups['Internals'])) for p,fn in pages.items()}
    for p in groups['Tutorials']:
        c = books[p].cells[0]
        c.source = colab(c.source, pages[p], url)
    for p,cells in reference(books).items(): books[f'reference/{p}'] = book([clean(c, partial(link, guide=False), {}) for c in cells])
    for p in {*books}-{*groups['Internals']}:
        for c in books[p].cells:
            if c.cell_type=='markdown': c.source = named(c.source)
    for p in {*books}-{'index'}:
        for c in books[p].cells:
            if max(map(width, c.get('outputs', [])), default=0)>460: c.metadata.update(mystnb=dict(image=dict(classes='wide')))
            if aligned(c): c.metadata.update(tags=['aligned'])
    toc = {k: list(g) for k,g in groups.items()}
    internals = toc.pop('Internals')
    toc.update(Reference=[o for o in books if o.startswith('reference/')], Internals=internals, Changes=['changes'])
    books['index'].cells += [toctree(k, names) for k,names in toc.items() if names]
    for p,b in books.items(): (src/f'{p}.ipynb').mk_write(nb2str(b), encoding='utf-8')
    (src/'changes.md').write_text(papers((root/'CHANGELOG.md').read_text('utf-8')), 'utf-8')
    if sphinx_build(['-qW', '-c', str(root/'docs'), '-d', str(dest/'doctrees'), str(src), str(dest/'html')]): sys.exit(1)
    print(f'{len(books)+1} pages in {dest}/html')

@call_parse(pos=['what'])
def main(what:str='site', # site or readme
    dest:str='.' # Folder for README.md and README_files, from the project's root
):
    os.chdir(root)
    if what=='readme': readme(Path(dest))
    else: site(Path('docs/_build'))

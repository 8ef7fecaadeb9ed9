"Build the docs site, or README.md, from nbs/: cells as nbdev prepares them for its docs, outputs as stored in the notebooks."
import os,re,shutil,sys
from io import StringIO
from pathlib import Path

from fastcore.nbio import mk_cell,nb2str
from fastcore.script import call_parse
from nbconvert import MarkdownExporter
from nbconvert.writers import FilesWriter
from nbdev.config import get_config,nbpath2html
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults
from sphinx.cmd.build import main as sphinx_build

root = Path(__file__).absolute().parents[1]
nbs = get_config(root).nbs_path
pages = {nbpath2html(o).stem:o for o in sorted(nbs.glob('[!_.]*.ipynb'), key=lambda o: (o.stem!='index', o.name))}
quarto_only = 'FrontmatterProc','clean_show_doc','add_fold'

def slug(s):
    "Anchor of heading `s`: nbdev links to `Learner.fit` as learner.fit"
    return re.sub(r'[^\w.-]', '', s.lower().replace(' ', '-'))

def outputs(c):
    "Outputs of `c`, without tables' own styles and what a plotting call returns beside its picture"
    ds = [o.get('data', {}) for o in c.outputs]
    pics = any({'image/png', 'image/jpeg'} & set(d) for d in ds)
    for d in ds:
        if 'text/html' not in d: continue
        s = re.sub('<style.*?</style>', '', ''.join(d['text/html']), flags=re.S)  # GitHub shows a style as text
        d['text/html'] = re.sub('<table[^>]*', '<table class="docutils"', s)
    for d in ds:
        if 'text/markdown' in d: d['text/markdown'] = re.sub(r'\]\(/(?=\w)', '](', ''.join(d['text/markdown']))  # nbdev's links begin at the root of a site
    return [o for o,d in zip(c.outputs, ds) if not (pics and list(d)==['text/plain'])]

def clean(c, link):
    "`c` as text or plain code; `link` changes the address of each Markdown link"
    if c.cell_type=='code':
        if not c.source.startswith('show_doc('): return mk_cell(c.source, outputs=outputs(c))
        md = ''.join(''.join(o['data']['text/markdown']) for o in c.outputs).replace('__main__.', '')
        # no rule, no source link (there's no git_url), and the name as code, or the underscores of `__call__` make it bold
        c = mk_cell(re.sub(r'\A---\n+(?:\[source\].*\n+)?(#+) (.+)', r'\1 `\2`', md), 'markdown')
    return mk_cell(re.sub(r'(?<=\]\()[^)\s]+', lambda m: link(m[0]), c.source), c.cell_type)

def prep(fn, link, *extra):
    "Text of notebook `fn` after nbdev's docs processing and `clean`, with the cells `extra` at its end"
    proc = NBProcessor(fn, [o for o in FilterDefaults().procs() if o.__name__ not in quarto_only])
    proc.process()
    proc.nb.cells = [clean(c, link) for c in proc.nb.cells] + list(extra)
    proc.nb.metadata = dict(language_info=dict(name='python', pygments_lexer='ipython3'))
    return nb2str(proc.nb)

def readme(dest):
    "Write README.md and README_files/ into `dest`"
    def link(u):
        u = re.sub(r'^/([\w.]+)\.html#.*', lambda m: pages[m[1]].name, u)
        return u if re.match(r'\w+:|#', u) else f'{nbs.name}/{u}'
    shutil.rmtree(dest/'README_files', ignore_errors=True)
    nb = StringIO(prep(pages['index'], link))
    md,res = MarkdownExporter().from_file(nb, dict(unique_key='README', output_files_dir='README_files'))
    md = re.sub(r'\n( *\n){2,}', '\n\n', re.sub(r'!\[(png|jpeg)\]', '![Output]', md)).strip() + '\n'
    FilesWriter(build_directory=str(dest)).write(md, res, notebook_name='README')

def site(dest):
    "Write the site into `dest`/html; any warning fails"
    def link(u): return re.sub(r'^/?([\w.]+)\.(?:html|ipynb)(?=#|$)', lambda m: nbpath2html(m[1]+'.ipynb').stem+'.ipynb', u)
    shutil.rmtree(dest, ignore_errors=True)
    src = Path(shutil.copytree(nbs, dest/'src', ignore=shutil.ignore_patterns('*.ipynb', '*.yml', '[._]*')))
    toc = mk_cell('\n'.join(['```{toctree}', ':hidden:', *list(pages)[1:], '```']), 'markdown')
    for p,fn in pages.items(): (src/f'{p}.ipynb').write_text(prep(fn, link, *[toc][:p=='index']), encoding='utf-8')
    if sphinx_build(['-qW', '-c', str(root/'docs'), '-d', str(dest/'doctrees'), str(src), str(dest/'html')]): sys.exit(1)
    print(f'{len(pages)} pages in {dest}/html')

@call_parse(pos=['what'])
def main(what:str='site', # site or readme
    dest:str='.' # Folder for README.md and README_files, from the project's root
):
    os.chdir(root)
    if what=='readme': readme(Path(dest))
    else: site(Path('docs/_build'))

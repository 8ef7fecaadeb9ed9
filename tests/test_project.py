"What is written twice agrees, the package is what the notebooks export, and the notebooks run."
import json, os, re, shutil, subprocess, sys, yaml
from configparser import ConfigParser
from html import unescape
from urllib.parse import unquote
from importlib.util import module_from_spec, spec_from_file_location
from importlib.metadata import distribution
from pathlib import Path

import fastai.vision.all as fv, pytest
from readme_renderer.markdown import render
import fastai_heatmaps.all as fh
from nbdev.config import get_config, nbpath2html

root = Path(__file__).parents[1]
nbs = sorted(f for f in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
guides = [f for f in nbs if f.parent.name in ('tutorials', 'howto') or f.stem=='start'] # for users; the others are the package's own
quick_nbs = {f.name for f in nbs if '_core.' in f.name and not f.name.startswith(('00', '02'))} # these two take models apart
ini = ConfigParser(delimiters='=')
ini.read(root/'settings.ini', 'utf-8')
cfg = ini['DEFAULT']


def tool(name): return Path(sys.executable).with_name(name)
def rows(key): return cfg[key].split('\n')[1:]


@pytest.fixture
def copy(tmp_path):
    "A copy of what nbdev works on"
    for o in ('pyproject.toml', 'settings.ini'): shutil.copy(root/o, tmp_path)
    for o in ('nbs', 'fastai_heatmaps'): shutil.copytree(root/o, tmp_path/o, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    return tmp_path


def contents(path, pattern):
    "Texts of the files below `path`, by their names from there"
    return {p.relative_to(path).as_posix(): p.read_text('utf-8') for p in path.rglob(pattern) if '.ipynb_checkpoints' not in p.parts}


def test_metadata():
    assert get_config(root).lib_name==cfg['lib_name']==get_config(root).lib_path.name
    d = distribution(cfg['lib_name'])
    assert d.version==cfg['version'], 'install again: pip install -e .'
    assert [f'{o.name} = {o.value}' for o in d.entry_points if o.group=='console_scripts']==rows('console_scripts')
    assert set(rows('requirements')) <= set(d.requires)
    for extra in ('app', 'demo', 'distrib', 'explore', 'dev'): assert len([o for o in d.requires if re.search(f'extra == .{extra}', o)])==len(rows(f'{extra}_requirements'))
    assert f"## {cfg['version']}" in (root/'CHANGELOG.md').read_text('utf-8')


def test_bounds():
    "Each requirement, of the extras too, names its oldest version; and tools/oldest.py tries just these"
    spec = spec_from_file_location('oldest', root/'tools'/'oldest.py')
    oldest = module_from_spec(spec)
    spec.loader.exec_module(oldest)
    keys = [k for k in cfg if k.endswith('requirements')]
    assert {*oldest.users, 'dev_requirements'}=={*keys} and len(keys)==6
    for k in keys:
        wanted = [o for o in rows(k) if not o.startswith('fastai_heatmaps')]
        got = oldest.bounds(oldest.settings(), k)
        assert len(wanted)==len(got) and all(re.match(rf'{name}(\[\w+\])?>={version}(;|$)', o) for o,(name,version) in zip(wanted, got.items())), got
    assert oldest.bounds({**cfg, 'requirements': 'a\nb>=2.1,<3\nfastai_heatmaps[demo]'}, 'requirements')=={'a': None, 'b': '2.1'}
    for o in oldest.user_tests+oldest.dev_tests: assert (root/'tests'/f'test_{o}.py').exists()


def test_package_is_what_the_notebooks_export(copy):
    for f in (copy/'fastai_heatmaps').rglob('*.py'):
        if f.name not in ('__init__.py', '__main__.py', 'all.py'): f.unlink()
    subprocess.run([tool('nbdev-export')], cwd=copy, check=True)
    assert contents(copy/'fastai_heatmaps', '*.py')==contents(root/'fastai_heatmaps', '*.py'), 'run nbdev-export'


def test_notebooks_are_clean(copy):
    subprocess.run([tool('nbdev-clean')], cwd=copy, check=True)
    assert contents(copy/'nbs', '*.ipynb')==contents(root/'nbs', '*.ipynb'), 'run nbdev-clean'


def test_pictures_are_small():
    "What everyone clones: 6.5 MB at most, and 2.5 MB of guides"
    for files,most in (({*nbs}-{*guides} | {*(root/'README_files').iterdir()}, 6.5e6), (guides, 2.5e6)):
        size = sum(f.stat().st_size for f in files)
        assert size<most, f'{size/1e6:.1f} MB: run the notebooks by tools/run_nbs.py, or draw less'


@pytest.mark.slow
def test_readme_is_what_the_notebook_writes(forked, tmp_path):
    rc,printed = forked(f"import sys\nsys.path.insert(0, {str(root/'tools')!r})\nfrom docs import main\nmain('readme', {str(tmp_path)!r})")
    assert rc==0, printed
    assert (tmp_path/'README.md').read_text('utf-8')==(root/'README.md').read_text('utf-8'), 'run python tools/docs.py readme'
    assert {f.name: f.read_bytes() for f in (tmp_path/'README_files').iterdir()}=={f.name: f.read_bytes() for f in (root/'README_files').iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info<(3,11), reason='the docs need myst-parser 5, which needs Python 3.11')
def test_docs_build_strictly(forked):
    rc,printed = forked(f"import sys\nsys.path.insert(0, {str(root/'tools')!r})\nfrom docs import main\nmain()")
    assert rc==0, printed
    assert 'output' not in printed.lower()
    html = root/'docs'/'_build'/'html'
    pages = {p.relative_to(html).as_posix(): p.read_text('utf-8') for p in html.rglob('*.html')}
    assert {*pages} >= {nbpath2html(f.relative_to(root/'nbs')).as_posix() for f in nbs}
    assert 'Learner.show_gradcam' in pages['learner.show.html']
    assert not [*dead_links(html, pages)] # also those in raw HTML, which Sphinx does not look at
    assert not [u for s in pages.values() for u in re.findall(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(https?:[^"]*)', s)] # no network
    check_reference(pages)
    found = json.loads(re.search(r'Search.setIndex\((.*)\)', (html/'searchindex.js').read_text('utf-8'))[1])
    def pages_with(stem):
        hits = [o for k in ('terms', 'titleterms') if (o := found[k].get(stem)) is not None]
        return {found['docnames'][i] for o in hits for i in (o if isinstance(o, list) else [o])}
    assert 'howto/colours' in pages_with('transpar') & pages_with('threshold') and 'howto/several_gpus' in pages_with('gpu') & pages_with('gpus')
    assert ['class="wide"' in pages[f'{o}.html'] for o in ('index', 'tour')]==[False, True] # figures that keep their size on a small screen
    assert '<math' in pages['trust.focus.html'] and 'https://arxiv.org/abs/1610.02391' in pages['reference/learner.html']


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info<(3,11), reason='the docs need myst-parser 5, which needs Python 3.11')
def test_words_of_the_docs(monkeypatch):
    "Types as people write them, papers as links, and names that lead to the reference; not those in code or headings, nor a parameter's to fastai"
    monkeypatch.syspath_prepend(root/'tools')
    from docs import documented, link, named, papers, tidy
    assert tidy("(m: torch.nn.modules.module.Module, f: <built-in function callable>, p: <class 'fastai.vision.core.PILImage'>, d=torch.float32) -> pathlib.Path")==\
        '(m: nn.Module, f: callable, p: PILImage, d=torch.float32) -> Path'
    assert papers('(arXiv 1610.02391, doi 10.1109/TIP.2021.3089943) [arXiv 1.2]')==\
        '([arXiv 1610.02391](https://arxiv.org/abs/1610.02391), [doi 10.1109/TIP.2021.3089943](https://doi.org/10.1109/TIP.2021.3089943)) [arXiv 1.2]'
    assert named('`hm.plot()`, `show_gradcam`, `cls`, `hm.show_gradcam`')=='[`hm.plot()`](/reference/heatmaps.ipynb#heatmaps.plot), [`show_gradcam`](/reference/learner.ipynb#learner.show_gradcam), `cls`, `hm.show_gradcam`'
    for o in ('# `show_gradcam`', '```\n`show_gradcam`\n```', '[`show_gradcam`](x)'): assert named(o)==o
    assert documented('---\n\n### f\n\n```python\ndef f(\n    module:NoneType=None, # A\n):\n```\n\n*Do [`module`](https://docs.fast.ai/layers.html#module) as [`Hook`](https://docs.fast.ai/x#hook)*')==\
        '### `f`\n\n```python\ndef f(\n    module=None, # A\n):\n```\n\n*Do `module` as [`Hook`](https://docs.fast.ai/x#hook)*'
    from docs import badge, colab, pages
    lesson,url = pages['tutorials/digits'],'https://github.com/a/b'
    assert badge('# T\n\n> s\n\nx', '')==colab('# T\n\n> s\n\nx', lesson, '')=='# T\n\n> s\n\nx'
    assert badge('# T\n\n> s\n', url)==f'# T\n\n[![Tests]({url}/actions/workflows/test.yml/badge.svg)]({url}/actions/workflows/test.yml)\n\n> s\n'
    opened = colab('# T\n\n> s\n\nx\n\ny', lesson, url)
    assert opened.startswith('# T\n\n> s\n\n[Open in Colab](https://colab.research.google.com/github/a/b/blob/main/nbs/tutorials/04_digits.ipynb),') and opened.endswith('`.\n\nx\n\ny')
    u = '/learner.show.html#learner.show_gradcam'
    assert [link(u, o) for o in (True, False)]==['/reference/learner.ipynb#learner.show_gradcam', '/learner.show.ipynb#learner.show_gradcam']
    assert [link(o, True) for o in ('../80_which_method.ipynb', 'https://x.org/a.html', '#here')]==['../which_method.ipynb', 'https://x.org/a.html', '#here']


def dead_links(html, pages):
    "Page and address of each link within the site that leads nowhere"
    names = {p: {*re.findall(r'\bid="([^"]+)"', s)} for p,s in pages.items()}
    for page,s in pages.items():
        for u in {*re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"', s)}:
            path,_,name = unquote(unescape(u)).partition('#')
            if re.match(r'\w+:', path): continue
            to = os.path.relpath((html/page).parent/path.partition('?')[0], html) if path else page
            if not (html/to).exists() or name not in {'', *names.get(to, [])}: yield page,u


def check_reference(pages):
    "Each public name has an entry: with its parameters, types as people write them, and its source"
    for n in 'get_heatmaps show_gradcam check_heatmaps heatmap_report'.split(): assert f'id="learner.{n}"' in pages['reference/learner.html']
    assert 'id="heatmaps.plot"' in pages['reference/heatmaps.html'] and 'id="interpretation.plot_top_losses"' in pages['reference/interpretation.html']
    functions = pages['reference/functions.html']
    for n in vars(fh):
        if n[0]!='_' and n!='Heatmaps' and vars(fh)[n] is not getattr(fv, n, None): assert f'id="{n.lower()}"' in functions, n
    assert 'nn.Module' in functions and 'torch.nn.modules' not in ''.join(pages.values()) and '&lt;class' not in functions
    page = pages['reference/learner.html']
    assert page.count('<details>')==page.count('<h2>') and 'Opacity of the map at the ends of the scale' in page and 'src="../_images/' in page


def addresses(md):
    "Addresses of the pictures and of the links of `md`, as PyPI shows it"
    html = render(md)
    return [[u for u in re.findall(rf'<{o}=\"([^\"]*)', html) if u[0]!='#'] for o in (r'img\b[^>]*\bsrc', r'a\b[^>]*\bhref')]


def test_description():
    "On PyPI pictures and links are absolute once there is an address, and lead to files that are there; until then there are only links to elsewhere"
    spec = spec_from_file_location('setup', root/'setup.py')
    described = (setup := module_from_spec(spec), spec.loader.exec_module(setup))[0].described
    md,url = re.sub(r'\[!\[.*', '', (root/'README.md').read_text('utf-8')),'https://github.com/a/b' # without the badge, whose address is absolute
    pictures,links = addresses(described(md, url))
    assert pictures and all(o.startswith(f'{url}/raw/main/') for o in pictures) and all(o.startswith(f'{url}/blob/main/') for o in links)
    assert all((root/re.sub(f'{url}/(raw|blob)/main/', '', o)).is_file() for o in pictures+links)
    assert addresses(described(md, ''))==[[], []] and 'Which method?' in described(md, '')
    assert described('`a[0](x)` [b](#c) ![d](e.png) [f](g) [h](http://i)', '')=='`a[0](x)` [b](#c)  f [h](http://i)'


@pytest.mark.slow
def test_wheel(tmp_path):
    "The wheel, built from the source distribution, holds all modules and runs from a folder of its own"
    subprocess.run([sys.executable, '-m', 'build', '--outdir', tmp_path, root], check=True, capture_output=True)
    wheel, = tmp_path.glob('*.whl')
    script, = rows('console_scripts')
    module = script.split(' = ')[1].split(':')[0]
    site = tmp_path/'site'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', site, wheel], check=True)
    assert contents(site/'fastai_heatmaps', '*.py')==contents(root/'fastai_heatmaps', '*.py')
    assert (site/'fastai_heatmaps'/'py.typed').exists()
    info, = site.glob('*.dist-info')
    assert script==f'fastai-heatmaps = {module}:main' and script in (info/'entry_points.txt').read_text()
    assert (info/'licenses'/'LICENSE').exists() and f"Version: {cfg['version']}" in (info/'METADATA').read_text('utf-8')
    said = (info/'METADATA').read_text('utf-8').partition('\n\n')[2]
    assert said.startswith('# fastai_heatmaps') and all(o.startswith('https://') for group in addresses(said) for o in group)
    code = f'import {module} as c; print(c.__file__); c.main(["--version"])'
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={'PYTHONPATH': str(site)}, capture_output=True, text=True)
    assert res.stdout.splitlines()==[str(site/module.replace('.', '/'))+'.py', f"fastai-heatmaps {cfg['version']}"], res.stderr


def test_public_names():
    "Star-importing gives what users call and nothing else, and every Learner has its methods"
    names = {n for n in vars(fh) if n[0]!='_' and vars(fh)[n] is not getattr(fv, n, None)}
    assert names=={'Heatmaps', 'ImageError', 'LogHeatmaps', 'compare_learners', 'demo_image', 'demo_labels', 'demo_learner', 'distrib_state', 'heatmap_difference', 'heatmap_method', 'heatmap_methods',
                   'in_mask', 'join_heatmaps', 'layer_shapes', 'leaf_output', 'load_heatmaps', 'model_heatmaps', 'open_image', 'relu_rule', 'show_overlay'}
    for n in '''get_heatmaps show_heatmap show_gradcam show_activations show_saliency show_occlusion plot_heatmap_grid compare_heatmaps distrib_heatmaps explore_heatmaps
        get_feature_maps get_class_image show_filters show_feature_maps show_class_image show_architecture
        check_heatmaps sanity_check heatmap_focus heatmap_stability heatmap_report heatmap_app'''.split(): assert hasattr(fh.Learner, n)
    for n in 'top_losses_heatmaps confusion_heatmaps report'.split(): assert hasattr(fv.ClassificationInterpretation, n)
    for n in 'show plot save report boxes mean faithfulness inside'.split(): assert hasattr(fh.Heatmaps, n)


def test_furniture():
    "What the repository's host reads: the oldest Python, the licence and the commands are those of settings.ini and the README"
    github = root/'.github'
    files = {f.stem: yaml.safe_load(f.read_text('utf-8')) for f in github.rglob('*.yml')}
    assert files['test']['jobs']['test']['strategy']['matrix']==dict(os=['ubuntu-latest', 'macos-latest'], python=[cfg['min_python'], '3.x'])
    commands = [o['run'] for name in ('test', 'docs') for o in [*files[name]['jobs'].values()][0]['steps'] if 'run' in o]
    assert {'python -m pip install -e ".[dev]"', 'python -m pytest', 'python tools/docs.py'} <= {*commands}
    assert files['release']['jobs']['publish']['permissions']=={'id-token': 'write'} # trusted publishing
    cite = yaml.safe_load((root/'CITATION.cff').read_text('utf-8'))
    assert (cite['authors'][0]['name'], cite['license'])==(cfg['author'], cfg['license'])


@pytest.mark.parametrize('fn', [pytest.param(o, id=o.relative_to(root/'nbs').as_posix(), marks=[] if o.name in quick_nbs else pytest.mark.slow) for o in nbs])
def test_notebook(fn, forked, pytestconfig):
    "Runs the notebook; and what it shows was stored: each cell that draws has its picture, and no error or warning is stored"
    rc,text = forked(fn, pytestconfig.getoption('--nb-flags'))
    if rc: pytest.fail(text, pytrace=False)
    outs = [o for c in json.loads(fn.read_text('utf-8'))['cells'] if c['cell_type']=='code' for o in c['outputs']]
    assert not [o for o in outs if o['output_type']=='error' or o.get('name')=='stderr']

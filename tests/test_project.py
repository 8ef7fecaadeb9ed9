"What is written twice agrees, the package is what the notebooks export, and the notebooks run."
import json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.util import module_from_spec, spec_from_file_location
from importlib.metadata import distribution
from pathlib import Path

import fastai.vision.all as fv, pytest
import fastai_heatmaps.all as fh
from nbdev.config import get_config, nbpath2html

root = Path(__file__).parents[1]
nbs = sorted((root/'nbs').glob('*.ipynb'))
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
        assert len(wanted)==len(got) and all(re.match(rf'{name}>={version}(;|$)', o) for o,(name,version) in zip(wanted, got.items())), got
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
    "What everyone clones: 6 MB at most"
    size = sum(f.stat().st_size for f in [*nbs, *(root/'README_files').iterdir()])
    assert size<6e6, f'{size/1e6:.1f} MB: run the notebooks by tools/run_nbs.py, or draw less'


@pytest.mark.slow
def test_readme_is_what_the_notebook_writes(tmp_path):
    subprocess.run([sys.executable, root/'tools'/'docs.py', 'readme', '--dest', tmp_path], check=True)
    assert (tmp_path/'README.md').read_text('utf-8')==(root/'README.md').read_text('utf-8'), 'run python tools/docs.py readme'
    assert {f.name: f.read_bytes() for f in (tmp_path/'README_files').iterdir()}=={f.name: f.read_bytes() for f in (root/'README_files').iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info<(3,11), reason='the docs need myst-parser 5, which needs Python 3.11')
def test_docs_build_strictly(forked):
    rc,printed = forked(f"import sys\nsys.path.insert(0, {str(root/'tools')!r})\nfrom docs import main\nmain()")
    assert rc==0, printed
    html = root/'docs'/'_build'/'html'
    assert {p.name for p in html.glob('*.html')} >= {'index.html', *[nbpath2html(f).name for f in nbs]}
    assert 'Learner.show_gradcam' in (html/'learner.show.html').read_text('utf-8') and 'output' not in printed.lower()


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
    info, = site.glob('*.dist-info')
    assert script==f'fastai-heatmaps = {module}:main' and script in (info/'entry_points.txt').read_text()
    assert (info/'licenses'/'LICENSE').exists() and f"Version: {cfg['version']}" in (info/'METADATA').read_text('utf-8')
    code = f'import {module} as c; print(c.__file__); c.main(["--version"])'
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={'PYTHONPATH': str(site)}, capture_output=True, text=True)
    assert res.stdout.splitlines()==[str(site/module.replace('.', '/'))+'.py', f"fastai-heatmaps {cfg['version']}"], res.stderr


def test_public_names():
    "Star-importing gives what users call and nothing else, and every Learner has its methods"
    names = {n for n in vars(fh) if n[0]!='_' and vars(fh)[n] is not getattr(fv, n, None)}
    assert names=={'Heatmaps', 'ImageError', 'compare_learners', 'demo_image', 'demo_labels', 'demo_learner', 'distrib_state', 'heatmap_difference', 'heatmap_method', 'heatmap_methods',
                   'in_mask', 'join_heatmaps', 'layer_shapes', 'leaf_output', 'load_heatmaps', 'model_heatmaps', 'open_image', 'relu_rule', 'show_overlay'}
    for n in '''get_heatmaps show_heatmap show_gradcam show_activations show_saliency show_occlusion plot_heatmap_grid compare_heatmaps distrib_heatmaps explore_heatmaps
        get_feature_maps get_class_image show_filters show_feature_maps show_class_image show_architecture
        check_heatmaps sanity_check heatmap_focus heatmap_stability heatmap_report heatmap_app'''.split(): assert hasattr(fh.Learner, n)
    for n in 'top_losses_heatmaps confusion_heatmaps report'.split(): assert hasattr(fv.ClassificationInterpretation, n)
    for n in 'show plot save report faithfulness inside'.split(): assert hasattr(fh.Heatmaps, n)


@pytest.mark.parametrize('fn', [pytest.param(o, id=o.name, marks=[] if o.name in quick_nbs else pytest.mark.slow) for o in nbs])
def test_notebook(fn, forked, pytestconfig):
    "Runs the notebook; and what it shows was stored: each cell that draws has its picture, and no error or warning is stored"
    rc,text = forked(fn, pytestconfig.getoption('--nb-flags'))
    if rc: pytest.fail(text, pytrace=False)
    outs = [o for c in json.loads(fn.read_text('utf-8'))['cells'] if c['cell_type']=='code' for o in c['outputs']]
    assert not [o for o in outs if o['output_type']=='error' or o.get('name')=='stderr']

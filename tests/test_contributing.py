"The worked examples of CONTRIBUTING.md work as they are."
import re, sys
import test_formulas
from shared import *
from fastai_heatmaps import views
from fastai_heatmaps.methods import cam

guide = (Path(__file__).parents[1]/'CONTRIBUTING.md').read_text('utf-8')
method,method_test,view,line,view_test = re.findall(r'^```python\n(.*?)^```', guide, re.S|re.M)


def run(source, **scope):
    "What `source` defines, where the names of `scope` are known"
    exec(compile(source, 'CONTRIBUTING.md', 'exec'), scope)
    return scope


@pytest.fixture
def forget():
    "Forgets the example's method, and that it was proved"
    yield
    heatmap_methods.pop('peakcam', None)
    test_formulas.proved.discard('peakcam')


def test_adding_a_method(forget, learn, pics):
    run(method, **vars(cam))
    check = run(method_test, **vars(test_formulas))['test_peakcam']
    check('peakcam')
    assert 'peakcam' in test_formulas.proved and 'the channel that counts most' in repr(heatmap_methods)
    assert learn.get_heatmaps(get_image_files(pics)[:2], method='peakcam').maps.shape[:2]==(2,1)


@pytest.mark.parametrize('wrong', ['(grads * acts).amin(1)', '(grads * acts).mean(1)', 'F.relu(grads * acts).amax(1)', 'acts.amax(1)'])
def test_a_wrong_formula_is_found(forget, wrong):
    source = method.replace('(grads * acts).amax(1)', wrong)
    assert source!=method
    run(source, **vars(cam))
    with pytest.raises(AssertionError): run(method_test, **vars(test_formulas))['test_peakcam']('peakcam')


def test_adding_a_view(learn, tmp_path, monkeypatch):
    (tmp_path/'unsure.py').write_text(view, 'utf-8')
    monkeypatch.setattr(views, '__path__', [*views.__path__, str(tmp_path)]) # as if it were in this folder
    try:
        run(line, __package__='fastai_heatmaps', __name__='fastai_heatmaps.all')
        run(view_test)['test_show_unsure'](learn)
        assert 'show_unsure' in vars(Learner)
    finally:
        sys.modules.pop('fastai_heatmaps.views.unsure', None)
        if hasattr(views, 'unsure'): del views.unsure
        if hasattr(Learner, 'show_unsure'): del Learner.show_unsure


def test_what_it_names_is_there():
    "Files and folders in backticks exist, but for those of the examples"
    root = Path(__file__).parents[1]
    named = set(re.findall(r'`([\w.]+/[\w./]*|nbs/[\w.]+)`', guide))
    assert len(named)>10
    new = {'nbs/46_views.unsure.ipynb', 'tests/test_unsure.py', 'docs/_build/html'}
    missing = [o for o in named-new if not (root/o).exists() and not (root/'fastai_heatmaps'/o).exists()]
    assert not missing

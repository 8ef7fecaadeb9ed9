"What the widget shows is what `get_heatmaps` gives, and costs the passes that are needed."
import io, sys
from shared import *
from test_no_trace import state, same
from test_tasks import task_learner, task_dls, three_numbers, tags, mask
from fastai_heatmaps.core import hooks
from fastai_heatmaps.data.images import to_images
from fastai_heatmaps.learner.kept import Passes
from fastai_heatmaps.learner.run import output_names

pytest.importorskip('ipywidgets')


class Counts:
    "Counts forward passes of body and head, backward passes, and pictures decoded"
    def __init__(self, learn, monkeypatch):
        self.n = dict(body=0, head=0, backward=0)
        for i,k in enumerate(('body', 'head')): learn.model[i].register_forward_hook(partial(self.add, k))
        gradients = hooks.gradients
        monkeypatch.setattr(hooks, 'gradients', lambda *args, **kwargs: self.add('backward') or gradients(*args, **kwargs))
    def add(self, k, *args): self.n[k] += 1
    def __call__(self, f):
        "What `f()` costs: passes of the body, of the head, backward passes"
        self.n = dict.fromkeys(self.n, 0)
        f()
        return tuple(self.n.values())


def parts(ui): return ui.children[2],*ui.children[0].children,ui.children[1]
def passes_of(learn, item): return Passes(learn, to_images(learn.dls, [item], vocab=output_names(learn)))
def pixels(pic): return np.array(Image.open(io.BytesIO(pic.value)).convert('RGB')).astype(float)
def setter(o, value): return lambda: setattr(o, 'value', value)


@pytest.fixture
def file(pics): return get_image_files(pics).sorted()[0]


@pytest.mark.slow
def test_costs(learn, file, monkeypatch):
    cost,ui = Counts(learn, monkeypatch),[]
    assert cost(lambda: ui.append(learn.explore_heatmaps(file, cls=0)))==(1,1,1)
    pic,classes,methods,layers,opacity,note = parts(ui[0])
    steps = [(classes, 1, (0,0,1)), (classes, 0, (0,0,0)), (opacity, .3, (0,0,0)), (methods, 'layercam', (0,0,0)), (methods, 'activations', (0,0,0)), (classes, 1, (0,0,0)), (methods, 'gradcam++', (0,0,0)),
             (methods, 'finercam', (0,0,1)), (methods, 'cam', None), (methods, 'hirescam', (0,0,0)), (layers, '0.6', (1,1,1)), (classes, 0, (0,0,1)), (methods, 'xgradcam', (0,0,0)), (layers, '0', (1,1,1)),
             (methods, 'saliency', (1,1,1)), (methods, 'gradient_x_input', (0,0,0)), (classes, 1, (0,0,1)), (methods, 'gradcam', (0,0,1)), (methods, 'saliency', (0,0,0)), (methods, 'guided_backprop', (1,1,1)),
             (methods, 'gradcam', (0,0,0)), (methods, 'guided_gradcam', (1,1,1))] # which takes its guided gradients in a pass of its own
    for i,(what,value,want) in enumerate(steps):
        got = cost(setter(what, value))
        if want is not None: assert got==want, (i, value, got)
        assert not any(m._forward_hooks for m in learn.model.modules() if m not in list(learn.model)) and all(len(m._forward_hooks)==1 for m in learn.model)
    assert cost(setter(methods, 'ablationcam'))[0]==0 # the head alone


@pytest.mark.slow
@pytest.mark.parametrize('method', [o for o in heatmap_methods if o not in ('rise', 'occlusion', 'scorecam')])
def test_equal_to_get_heatmaps(method, pics, file):
    learn = learner_for(method, pics)
    passes = passes_of(learn, (file, 'Red'))
    body_only,tops = heatmap_methods[method].needs in ('input', 'model') or method=='cam',[]
    inner = [('Red', None)] if body_only else [('Red', '0.6'), (0, '0.6'), (1, '0.6')]
    for cls,layer in [(None, None), (1, None), (0, None), *inner, ('targ', None)]:
        hm,want = passes.heatmaps(cls, method, layer),learn.get_heatmaps((file, 'Red'), cls, method, layer)
        torch.testing.assert_close(hm.maps, want.maps, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(hm.preds, want.preds)
        assert torch.equal(hm.cls, want.cls) and torch.equal(hm.targs, want.targs) and hm.title(0)==want.title(0) and hm.items==want.items
        tops.append(float(want.maps.abs().max()))
    assert max(tops)>0


@pytest.mark.slow
@pytest.mark.parametrize('block,get_y', [(RegressionBlock(n_out=3), three_numbers), (MultiCategoryBlock, tags), (MaskBlock(codes=['none', 'blue', 'red']), mask)])
def test_other_tasks(block, get_y, pics, file):
    if get_y is mask: learn = unet_learner(task_dls(pics, block, get_y=get_y), narrow18, pretrained=False, normalize=False)
    else: learn = task_learner(pics, block, get_y)
    before = state(learn.model, learn)
    pic,classes,methods,layers,opacity,note = parts(learn.explore_heatmaps(file, cls=1))
    passes = passes_of(learn, file)
    for c in (1, 0, 2):
        for method in ('gradcam', 'saliency'):
            hm,want = passes.heatmaps(c, method),learn.get_heatmaps(file, c, method)
            torch.testing.assert_close(hm.maps, want.maps, rtol=1e-4, atol=1e-6)
            assert hm.title(0)==want.title(0) and torch.equal(hm.preds, want.preds) and hm.task==want.task
        classes.value = c
        assert not note.value.count('firebrick')
    assert {v for _,v in classes.options}=={*range(hm.preds.shape[1])} and any(o.startswith(f'{hm.name(2)}  {hm.preds[0,2]:.2f}') for o,_ in classes.options)
    same(before, state(learn.model, learn))


@pytest.mark.slow
def test_what_is_shown(learn, file):
    ui = learn.explore_heatmaps(file, alpha=0)
    pic,classes,methods,layers,opacity,note = parts(ui)
    probs = learn.get_heatmaps(file).preds[0]
    assert [o for o in classes.options]==[(f'{learn.dls.vocab[c]}  {probs[c]:.2f}', c) for c in probs.argsort(descending=True).tolist()]
    assert [v for _,v in methods.options]==list(heatmap_methods) and layers.value=='0' and [v for _,v in layers.options][:2]==['0', '0.7']
    plain = pixels(pic)
    opacity.value = 1
    full = pixels(pic)
    opacity.value = .5
    inside = np.s_[60:-20, 20:-20] # within the picture, below its title
    assert np.abs(full-plain)[inside].max()>50
    np.testing.assert_allclose(pixels(pic)[inside], (plain+full)[inside]/2, atol=3)
    seen = []
    for what,value in [(classes, 1-classes.value), (methods, 'eigencam'), (layers, '0.5'), (methods, 'saliency')]:
        what.value = value
        assert not any(np.array_equal(pixels(pic), o) for o in seen)
        seen.append(pixels(pic))
    assert layers.disabled
    methods.value = 'gradcam'
    assert not layers.disabled


@pytest.mark.slow
def test_errors_in_one_line(learn, file):
    pic,classes,methods,layers,opacity,note = parts(learn.explore_heatmaps(file))
    @heatmap_method('fails')
    def fails(acts, grads): raise ZeroDivisionError('<b>\nbang')
    try:
        before = state(learn.model, learn)
        for m,text in [('legrad', 'has no attention'), ('cam', 'only defined for a head'), ('fails', 'ZeroDivisionError: &lt;b&gt; bang')]:
            methods.options = [m, 'gradcam']
            methods.value = m
            assert text in note.value and '\n' not in note.value and pic.layout.visibility=='hidden'
            same(before, state(learn.model, learn))
            methods.value = 'gradcam'
            assert 'firebrick' not in note.value and pic.layout.visibility=='visible'
        same(before, state(learn.model, learn))
    finally: heatmap_methods.pop('fails')
    for kwargs in (dict(cls='Rde'), dict(cls=['Red', 'Blue_ish']), dict(cls='targ'), dict(method='nope'), dict(layer='nope'), dict(layer=['0.5', '0.6']), dict(layer='1.8')):
        with pytest.raises(ValueError): learn.explore_heatmaps(file, **kwargs)
        same(before, state(learn.model, learn))


def test_warnings_are_shown(pics, file):
    learn = pic_learner(pics, size=32)
    pic,classes,methods,layers,opacity,note = parts(learn.explore_heatmaps(file, layer='0.6'))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        layers.options = [*layers.options, ('0', '0')]
        layers.value = '0'
    assert '1×1' in note.value and pic.layout.visibility=='visible'


@pytest.mark.parametrize('change', ['data', 'buffer', 'model'])
def test_a_changed_model_is_run_again(change, learn, file):
    passes = passes_of(learn, file)
    passes.heatmaps(0)
    if change=='data': learn.model[1][-1].weight.data.mul_(-2) # as fastai's optimisers do it
    if change=='buffer': learn.model[0][1].running_mean += 1
    if change=='model': learn.model = create_vision_model(narrow18, 2, pretrained=False)
    torch.testing.assert_close(passes.heatmaps(0).maps, learn.get_heatmaps(file, 0).maps)
    torch.testing.assert_close(passes.heatmaps(1, 'layercam', '0.5').maps, learn.get_heatmaps(file, 1, 'layercam', '0.5').maps)


@pytest.mark.slow
def test_no_trace(learn, file):
    learn.model.train()
    before,random = state(learn.model, learn),get_random_states()
    pic,classes,methods,layers,opacity,note = parts(learn.explore_heatmaps(file))
    for what,value in [(classes, 1-classes.value), (methods, 'saliency'), (methods, 'integrated_gradients'), (methods, 'gradcam'), (layers, '0.4')]:
        what.value = value
        same(before, state(learn.model, learn))
    assert torch.equal(random['torch_state'], get_random_states()['torch_state']) and not plt.get_fignums()


def test_pixels_first(learn, file):
    "A beginning without a layer"
    pic,classes,methods,layers,opacity,note = parts(learn.explore_heatmaps(file, method='saliency'))
    assert layers.disabled and layers.value=='0'
    methods.value = 'gradcam'
    assert not layers.disabled and not note.value.count('firebrick')


def test_without_ipywidgets(learn, file, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(ImportError, match=r'^explore_heatmaps needs ipywidgets: pip install "fastai_heatmaps\[explore\]"$'): learn.explore_heatmaps(file)

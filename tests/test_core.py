"Hooks are fastai's own and their twin, a pass answers as often as it is asked, and heatmaps are built, changed and joined by name."
import gc, threading, weakref
from types import SimpleNamespace
from shared import *
from fastai.callback.hook import Hook
from fastai_heatmaps.core import hooks as core_hooks
from fastai_heatmaps.core.hooks import LeafHook, copied_outputs, gradients, leaf_hooks, leaf_output
from fastai_heatmaps.core.method import get_method
from fastai_heatmaps.core.no_trace import quiet
from fastai_heatmaps.core.passes import Pass


def v1_model(c=3):
    "As fastai v1's `create_cnn` built it: a body and a head"
    body = create_body(resnet18(weights=None), pretrained=False)
    return nn.Sequential(body, create_head(num_features_model(body), c))


nets = dict(create_cnn=v1_model, create_vision_model=lambda: create_vision_model(narrow18, 3, pretrained=False), vgg11=lambda: create_vision_model(models.vgg11, 3, pretrained=False))


@pytest.mark.parametrize('name', nets)
def test_leaf_output_is_the_twin_of_hook_output(name):
    "The recipe of two hooks and a backward pass through all of the model gives what the leaf gives by the head alone"
    model,x = nets[name]().eval(),torch.randn(2, 3, 64, 64)
    with hook_output(model[0]) as acts, hook_output(model[0], grad=True) as grads: model(x)[:,1].sum().backward()
    frozen = nets[name]().eval()
    frozen.load_state_dict(model.state_dict())
    for p in frozen.parameters(): p.requires_grad_(False)
    with torch.no_grad(), leaf_output(frozen[0]) as leaf: y = frozen(x)
    g, = gradients(y, F.one_hot(tensor([1,1]), 3).float(), [leaf.stored])
    torch.testing.assert_close(leaf.stored.detach(), acts.stored)
    torch.testing.assert_close(g, grads.stored[0])
    assert g.abs().max()>0 and all(p.grad is None for p in frozen.parameters()) and leaf.removed and not frozen[0]._forward_hooks
    assert default_layer(frozen) is frozen[0]
    maps,_ = model_heatmaps(frozen, x, cls=1, relu=False)
    torch.testing.assert_close(maps[:,0], (grads.stored[0].mean((2,3), keepdim=True)*acts.stored).sum(1))


def test_what_a_leaf_stores_is_stored_by_fastai(monkeypatch):
    stored,hook_fn,model = [],Hook.hook_fn,v1_model().eval()
    def counted(self, module, input, output):
        hook_fn(self, module, input, output)
        stored.append(self.stored)
    monkeypatch.setattr(Hook, 'hook_fn', counted)
    with torch.no_grad(), leaf_hooks([model[0], model[0][5]]) as hooks: model(torch.randn(1, 3, 64, 64))
    assert all(isinstance(h, Hook) for h in hooks) and {id(o) for o in stored}=={id(h.stored) for h in hooks}


@pytest.mark.parametrize('method,calls', [('activations', 1), ('eigencam', 1), ('gradcam', 0), ('saliency', 0)])
def test_methods_without_gradients_run_on_hook_output(method, calls, monkeypatch):
    made = []
    monkeypatch.setattr(core_hooks, 'hook_output', lambda *args, **kwargs: made.append(hook_output(*args, **kwargs)) or made[-1])
    model = v1_model()
    maps,_ = model_heatmaps(model, torch.randn(1, 3, 64, 64), method=method)
    assert len(made)==calls and all(type(h) is Hook and h.removed and h.m is model[0] for h in made) and maps.abs().max()>0


def test_a_copy_outlives_an_in_place_layer_and_ignores_other_threads():
    model,x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)),torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        want = model[0](x)
        with copied_outputs([model[0]]) as (hook,):
            model(x)
            other = threading.Thread(target=lambda: model(x+5))
            other.start()
            other.join()
    assert want.min()<0 and torch.equal(hook.stored, want)


@pytest.mark.parametrize('at', [0, 1, 2])
def test_an_interrupted_registration_leaves_no_hook(at, monkeypatch):
    "Also where it strikes before we have heard of the hook"
    def struck(m, **kwargs):
        hook = hook_output(m, **kwargs)
        if m is model[at]: raise KeyboardInterrupt
        return hook
    monkeypatch.setattr(core_hooks, 'hook_output', struck)
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(3)])
    own = model[1].register_forward_hook(lambda m, i, o: None)
    with pytest.raises(KeyboardInterrupt), copied_outputs(list(model)): pass
    assert [len(m._forward_hooks) for m in model]==[0, 1, 0] and own.id in model[1]._forward_hooks


@pytest.mark.parametrize('method', ['gradcam', 'activations', 'saliency'])
def test_what_was_stored_is_freed_at_once(method):
    "No circle of references keeps activations and graphs until the garbage is collected"
    model,x,f = v1_model().eval(),torch.randn(1, 3, 64, 64),get_method(method)
    gc.collect()
    gc.disable()
    try:
        with quiet(model):
            with f.watch(model, x) as hooks: pred = model(x)
            ran = Pass(model, (x,), pred, hooks)
            ran.explain(f, ran.pick())
        kept = weakref.ref(hooks[0].stored)
        del ran, hooks, pred
        assert kept() is None
    finally: gc.enable()


@pytest.fixture
def asked():
    "A pass that is kept, with the model and the batch"
    model,x,f = v1_model().eval(),torch.randn(2, 3, 64, 64),get_method('gradcam')
    with quiet(model):
        with f.watch(model, x) as hooks: pred = model(x)
        return Pass(model, (x,), pred, hooks, keep=True),model,x


def test_a_kept_pass_answers_again_and_again(asked, monkeypatch):
    from fastai_heatmaps.core import hooks
    ran,model,x = asked
    runs,backward = [],[]
    model[0].register_forward_hook(lambda *args: runs.append(1))
    of = hooks.gradients
    monkeypatch.setattr(hooks, 'gradients', lambda *args, **kwargs: backward.append(1) or of(*args, **kwargs))
    model.train()
    questions = [('gradcam', 1), ('layercam', 1), ('gradcam', [1,2]), ('hirescam', 2), ('eigencam', 0), ('gradcam', 1), ('finercam', 0)]
    got = [ran.explain(get_method(m), ran.pick(c)) for m,c in questions]
    assert not runs and len(backward)==3 and all(m.training for m in model.modules()) # of classes 1 and 2, and of the difference that Finer-CAM explains
    for (m,c),(maps,_) in zip(questions, got):
        want = model_heatmaps(model, x, c, m)[0]
        torch.testing.assert_close(maps, want, rtol=1e-4, atol=1e-6*float(want.abs().max()))
    assert ran.explain(get_method('occlusion', window=32, stride=32), ran.pick(1))[0].shape==(2,1,64,64)


def test_own_labels_need_labels(asked):
    ran,model,x = asked
    with pytest.raises(ValueError, match="cls='targ' needs one true class for each image"): ran.pick('targ')
    ran.targs = tensor([2,0])
    assert ran.pick('targ').tolist()==[[2],[0]]


def some(n=3, **kwargs):
    return Heatmaps(torch.rand(n, 1, 2, 2), torch.zeros(n, 1, dtype=torch.long), torch.rand(n, 2), images=Images(SimpleNamespace(dataset=[*'abc']), range(n)), method='gradcam', layer='0', **kwargs)


def test_heatmaps_are_built_by_name():
    with pytest.raises(TypeError): Heatmaps(torch.rand(1,1,2,2), tensor([[0]]), torch.rand(1,2), tensor([0]))
    hm = some()
    assert (len(hm), hm.items, hm[1:].items, hm[1:].method)==(3, ['a','b','c'], ['b','c'], 'gradcam')
    assert Heatmaps(hm.maps, hm.cls, hm.preds).items==['image0', 'image1', 'image2']


def test_replace_changes_a_copy():
    hm = some()
    new = hm.replace(maps=2*hm.maps, method='mine')
    assert (new.method, new.layer, hm.method)==('mine', '0', 'gradcam') and torch.equal(new.maps, 2*hm.maps) and new.cls is hm.cls
    with pytest.raises(TypeError, match="no 'map'"): hm.replace(map=0)


def test_join_puts_together_what_was_taken_apart():
    hm = some(info={'told': torch.arange(3.)[:,None]}, targs=tensor([0,1,0]))
    back = Heatmaps.join([hm[:1], hm[1:]])
    for k in ('maps', 'cls', 'preds', 'targs'): assert torch.equal(getattr(back, k), getattr(hm, k))
    assert back.items==hm.items and torch.equal(back.info['told'], hm.info['told']) and (back.method, back.layer)==('gradcam', '0')
    ragged = Heatmaps.join([hm[:1], hm[1:].replace(maps=torch.rand(2, 1, 3, 3))])
    assert [tuple(m.shape) for m in ragged.maps]==[(1,2,2), (1,3,3), (1,3,3)]
    assert Heatmaps.join([hm[:1], hm[1:].replace(targs=None)]).targs is None


def test_a_wrong_batch_size_is_refused_before_the_model_runs(pics):
    model,runs = v1_model(),[]
    model.register_forward_pre_hook(lambda *args: runs.append(1))
    learn = pic_learner(pics)
    learn.model.register_forward_pre_hook(lambda *args: runs.append(1))
    photo = get_image_files(pics)[0]
    for f in (partial(model_heatmaps, model, torch.randn(1, 3, 64, 64)), learn.get_heatmaps, partial(learn.compare_heatmaps, photo)):
        with pytest.raises(ValueError, match='^bs is 0; expected a whole number, at least 1$'): f(bs=0)
    assert not runs

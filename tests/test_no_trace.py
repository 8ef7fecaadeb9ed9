"Whatever is called, and however it ends, the model and the Learner are what they were."
import threading, pytest
from conftest import *


def state(model, learn=None):
    "All that a call could leave behind, in a form that can be compared"
    res = dict(training=[m.training for m in model.modules()], requires_grad=[p.requires_grad for p in model.parameters()],
               params=[p.detach().clone() for p in model.parameters()], buffers=[b.clone() for b in model.buffers()],
               grads=[None if p.grad is None else p.grad.clone() for p in model.parameters()], graphs=[p.grad_fn for p in model.parameters()],
               hooks=[(dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)) for m in model.modules()],
               modules=[(id(m), type(m), getattr(m, 'inplace', None)) for m in model.modules()],
               modes=(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu')), figures=None)
    if learn is not None:
        res['learner'] = {k:v for k,v in vars(learn).items()}
        res['cbs'] = [(id(cb), dict(vars(cb))) for cb in learn.cbs]
        res['dls'] = [(id(dl), {k:v for k,v in vars(dl).items() if k!='rng'}) for dl in learn.dls.loaders]
        res['metrics'] = [dict(vars(m)) for m in learn.metrics]
        res['loss'] = dict(vars(learn.loss_func))
    return res


def same(a, b):
    for k in a:
        if k in ('params', 'buffers', 'grads'): assert all((x is y is None) or torch.equal(x, y) for x,y in zip(a[k], b[k])), k
        else: assert a[k]==b[k], k


def prepare(model, how):
    if how=='train': model.train()
    if how=='mixed':
        model.train()
        for m in list(model.modules())[::3]: m.training = False
    if how=='frozen': model.requires_grad_(False)
    if how=='grads':
        for p in model.parameters(): p.grad = torch.ones_like(p)
    return model


ways = ['train', 'mixed', 'frozen', 'grads']
class Boom(Exception): pass


class Bomb(nn.Module):
    "Raises `what` when it is run"
    def __init__(self, what): super().__init__(); self.what = what
    def forward(self, x): raise self.what


@pytest.mark.parametrize('method', list(cam_methods))
@pytest.mark.parametrize('how', ways)
def test_model_after_success(how, method):
    model = prepare(create_vision_model(resnet18, 3, pretrained=False), how)
    before = state(model)
    for layer in (None, '0.5', ['0.6', '0.7']): model_heatmaps(model, torch.randn(2, 3, 64, 64), cls=[0,2], method=method, layer=layer)
    same(before, state(model))


@pytest.mark.parametrize('what', [Boom('bang'), KeyboardInterrupt()])
@pytest.mark.parametrize('where', ['body', 'head'])
@pytest.mark.parametrize('how', ways)
def test_model_after_an_error_inside(how, where, what):
    model = create_vision_model(resnet18, 3, pretrained=False)
    if where=='head': model[1].add_module('bomb', Bomb(what))
    else: model[0].insert(5, Bomb(what))
    prepare(model, how)
    before = state(model)
    for layer in (None, '0.2'):
        with pytest.raises(type(what)): model_heatmaps(model, torch.randn(2, 3, 64, 64), layer=layer)
    same(before, state(model))


@pytest.mark.parametrize('kwargs', [dict(cls=9), dict(cls=[1,1]), dict(cls=tensor([0])), dict(method='nope'), dict(layer='nope'), dict(layer='1.8'),
                                    dict(method=lambda acts, grads: acts), dict(method=lambda acts, grads: 1/0)])
def test_model_after_bad_arguments(kwargs):
    model = prepare(create_vision_model(resnet18, 3, pretrained=False), 'mixed')
    before = state(model)
    with pytest.raises((ValueError, ZeroDivisionError)): model_heatmaps(model, torch.randn(2, 3, 64, 64), **kwargs)
    same(before, state(model))


@pytest.mark.parametrize('how', ways)
def test_learner_after_success(learn, pics, how):
    prepare(learn.model, how)
    with learn.no_bar(), learn.no_logging(): pass
    files = get_image_files(pics)
    before = state(learn.model, learn)
    learn.get_heatmaps()
    learn.get_heatmaps(ds_idx=0, cls='targ')
    learn.show_gradcam(files[0], cls='red')
    learn.show_activations(files[0])
    learn.show_heatmap(files[0], method='layercam', layer='0.6')
    learn.plot_heatmap_grid(n=3, seed=1)
    same(before, state(learn.model, learn))


def test_learner_after_training(learn):
    "The recorder keeps what training wrote into it, which fastai's own get_preds does not"
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    before = state(learn.model, learn)
    values = [list(o) for o in learn.recorder.values]
    learn.get_heatmaps()
    same(before, state(learn.model, learn))
    assert values==[list(o) for o in learn.recorder.values] and values


@pytest.mark.parametrize('what', [Boom('bang'), KeyboardInterrupt()])
def test_learner_after_an_error_inside(learn, what):
    learn.model[1].add_module('bomb', Bomb(what))
    learn.model.train()
    before = state(learn.model, learn)
    with pytest.raises(type(what)): learn.get_heatmaps()
    same(before, state(learn.model, learn))


@pytest.mark.parametrize('kwargs', [dict(cls='Rad'), dict(cls=2), dict(layer='0.99'), dict(method='grad'), dict(layer='1.1')])
def test_learner_after_bad_arguments(learn, pics, kwargs):
    learn.model.train()
    before = state(learn.model, learn)
    with pytest.raises(ValueError): learn.show_heatmap(get_image_files(pics)[0], **kwargs)
    same(before, state(learn.model, learn))


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_mode(learn, pics, mode):
    learn.model.eval()
    xb,f = torch.randn(2, 3, 64, 64),get_image_files(pics)[0]
    want,hm = model_heatmaps(learn.model, xb),learn.get_heatmaps(f)
    with mode():
        before = state(learn.model, learn)
        got = model_heatmaps(learn.model, torch.zeros_like(xb)+xb)
        torch.testing.assert_close(learn.get_heatmaps(f).maps, hm.maps)
        same(before, state(learn.model, learn))
    for a,b in zip(want, got): torch.testing.assert_close(a, b)


def test_threads():
    "Two threads explain through one model, which is in train mode, while it answers a third that only predicts"
    set_seed(5)
    model = create_vision_model(resnet18, 3, pretrained=False).eval()
    xbs = [torch.randn(1, 3, 64, 64) for _ in range(4)]
    want = [[model_heatmaps(model, x, cls=[0,2], layer=l)[0] for x in xbs] for l in (None, '0.6')]
    with torch.no_grad(): plain = [model(x) for x in xbs]
    before,wrong,done = state(model),[],threading.Event()

    def explain(i, layer):
        for n in range(100):
            got,_ = model_heatmaps(model, xbs[n%4], cls=[0,2], layer=layer)
            if not torch.allclose(got, want[i][n%4], rtol=1e-3, atol=1e-7): wrong.append((i, n))

    def predict():
        n = 0
        while not done.is_set():
            with torch.no_grad(): y = model(xbs[n%4])
            if y.requires_grad or not torch.allclose(y, plain[n%4], rtol=1e-4, atol=1e-5): wrong.append(('predict', n))
            n += 1

    threads = [threading.Thread(target=explain, args=o) for o in ((0, None), (1, '0.6'))]
    third = threading.Thread(target=predict)
    for t in (third, *threads): t.start()
    for t in threads: t.join()
    done.set()
    third.join()
    assert not wrong
    same(before, state(model))


def test_threads_in_train_mode():
    "The last of several runs puts the flags back, and no run sees another's train mode"
    model = prepare(create_vision_model(resnet18, 3, pretrained=False), 'mixed')
    x = torch.randn(1, 3, 64, 64)
    want,before,wrong = model_heatmaps(model, x, cls=1)[0],state(model),[]
    def explain():
        for _ in range(100):
            if not torch.allclose(model_heatmaps(model, x, cls=1)[0], want, rtol=1e-3, atol=1e-7): wrong.append(1)
    threads = [threading.Thread(target=explain) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong
    same(before, state(model))


def test_threads_on_one_learner(learn, pics):
    files = get_image_files(pics)[:3]
    want,before,wrong = [learn.get_heatmaps(f, cls='Red').maps for f in files],state(learn.model, learn),[]
    def explain():
        for n in range(15):
            if not torch.allclose(learn.get_heatmaps(files[n%3], cls='Red').maps, want[n%3], rtol=1e-3, atol=1e-7): wrong.append(n)
    threads = [threading.Thread(target=explain) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong
    same(before, state(learn.model, learn))


def test_the_users_picture_is_untouched(learn):
    im = Image.new('RGB', (80, 70))
    kind,pixels = type(im),im.tobytes()
    learn.show_gradcam(im)
    assert type(im) is kind and im.tobytes()==pixels


def test_parameters_have_no_graph_and_nothing_is_kept(learn):
    hm = learn.get_heatmaps()
    assert not hm.maps.requires_grad and not hm.preds.requires_grad and hm.maps.dtype==torch.float32

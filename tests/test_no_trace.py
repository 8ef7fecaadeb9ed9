"Whatever is called, and however it ends, the model and the Learner are what they were."
import signal, threading, weakref, pytest
from fastcore.test import test_eq as equal
from shared import *
from fastai_heatmaps.core.no_trace import eval_mode


def state(model, learn=None):
    "All that a call could leave behind, in a form that can be compared"
    res = dict(training=[m.training for m in model.modules()], requires_grad=[p.requires_grad for p in model.parameters()],
               params=[p.detach().clone() for p in model.parameters()], buffers=[b.clone() for b in model.buffers()],
               grads=[None if p.grad is None else p.grad.clone() for p in model.parameters()], graphs=[p.grad_fn for p in model.parameters()],
               hooks=[(dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)) for m in model.modules()],
               modules=[(id(m), type(m), getattr(m, 'inplace', None)) for m in model.modules()],
               modes=(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu')))
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
    "Raises a `what` when it is run"
    def __init__(self, what): super().__init__(); self.what = what
    def forward(self, x): raise self.what('bang')


def run(method, model, **kwargs): return model_heatmaps(model, torch.randn(2, 3, 64, 64), cls=[0,2], method=method, **quick.get(method, {}), **kwargs)
def takes_layer(method): return heatmap_methods[method].needs not in ('input', 'model')


@pytest.mark.slow
@pytest.mark.parametrize('method', list(heatmap_methods))
@pytest.mark.parametrize('how,autocast', [*[(o, False) for o in ways], ('mixed', True)])
def test_model_after_success(how, method, autocast):
    model = prepare(net_for(method), how)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        before = state(model)
        run(method, model)
        if takes_layer(method) and method!='cam':
            for layer in ('0.4', ['0.4', '0.5']): run(method, model, layer=layer)
        same(before, state(model))


class Fuse(nn.Module):
    "Raises a `what` at its `at`-th call"
    def __init__(self, what, at): super().__init__(); self.what,self.at,self.calls = what,at,0
    def forward(self, x):
        self.calls += 1
        if self.calls==self.at: raise self.what('bang')
        return x


@pytest.mark.slow
@pytest.mark.parametrize('what', [Boom, KeyboardInterrupt])
@pytest.mark.parametrize('method', list(heatmap_methods))
def test_model_after_an_error_in_any_pass(method, what):
    "In the first pass, the second, the last one"
    def net(at):
        model = net_for(method)
        fuse = Fuse(what, at)
        if method=='legrad': model.head_drop = fuse
        else: model[1].insert(len(model[1])-1, fuse) if isinstance(model[1], nn.Sequential) else None
        return prepare(model, 'mixed'),fuse
    model,fuse = net(0)
    run(method, model)
    for at in {1, min(2, fuse.calls), fuse.calls}:
        model,_ = net(at)
        before = state(model)
        with pytest.raises(what): run(method, model)
        same(before, state(model))


@pytest.mark.slow
@pytest.mark.parametrize('what', [Boom, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['body', 'head'])
@pytest.mark.parametrize('how', ways)
def test_model_after_an_error_inside(how, where, what):
    model = create_vision_model(narrow18, 3, pretrained=False)
    if where=='head': model[1].add_module('bomb', Bomb(what))
    else: model[0].insert(5, Bomb(what))
    prepare(model, how)
    before = state(model)
    for layer in (None, '0.2'):
        with pytest.raises(what): model_heatmaps(model, torch.randn(2, 3, 64, 64), layer=layer)
    same(before, state(model))


@pytest.mark.parametrize('kwargs', [dict(cls=9), dict(cls=[1,1]), dict(cls=tensor([0])), dict(method='nope'), dict(layer='nope'), dict(layer='1.8'),
                                    dict(method=lambda acts, grads: acts), dict(method=lambda acts, grads: 1/0)])
def test_model_after_bad_arguments(kwargs):
    model = prepare(create_vision_model(narrow18, 3, pretrained=False), 'mixed')
    before = state(model)
    with pytest.raises((ValueError, ZeroDivisionError)): model_heatmaps(model, torch.randn(2, 3, 64, 64), **kwargs)
    same(before, state(model))


@pytest.mark.slow
@pytest.mark.parametrize('method', list(heatmap_methods))
def test_learner_after_any_method(pics, method):
    "Success, an error inside, and bad arguments; the random numbers and the caller's mode too"
    learn,f = learner_for(method, pics),get_image_files(pics)[0]
    prepare(learn.model, 'mixed')
    before = state(learn.model, learn)
    with draws_nothing():
        learn.show_heatmap(f, method=method, **quick.get(method, {}))
        hm = learn.get_heatmaps(cls=[0,1], method=method, relu=False, **quick.get(method, {}))
    assert not hm.maps.requires_grad and hm.maps.isfinite().all()
    same(before, state(learn.model, learn))
    for kwargs in (dict(cls='Rad'), dict(cls=2), dict(nonsense=1), dict(layer='0.99')):
        with pytest.raises(ValueError) as e: learn.show_heatmap(f, method=method, **kwargs)
        assert '\n' not in str(e.value)
    same(before, state(learn.model, learn))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            now = state(learn.model, learn)
            torch.testing.assert_close(learn.get_heatmaps(cls=[0,1], method=method, relu=False, **quick.get(method, {})).maps, hm.maps, rtol=1e-3, atol=1e-5*float(hm.maps.abs().max()))
            same(now, state(learn.model, learn))
    last = [m for m in learn.model.modules() if isinstance(m, nn.Linear)][-1]
    h = last.register_forward_pre_hook(lambda *_: 1/0)
    before = state(learn.model, learn)
    with pytest.raises(ZeroDivisionError): learn.get_heatmaps(method=method, **quick.get(method, {}))
    same(before, state(learn.model, learn))
    h.remove()


@pytest.mark.parametrize('how', ways)
def test_learner_after_success(learn, pics, how):
    prepare(learn.model, how)
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


@pytest.mark.parametrize('what', [Boom, KeyboardInterrupt])
def test_learner_after_an_error_inside(learn, what):
    learn.model[1].add_module('bomb', Bomb(what))
    learn.model.train()
    before = state(learn.model, learn)
    with pytest.raises(what): learn.get_heatmaps()
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


@pytest.mark.slow
def test_threads():
    "Two threads explain through one model, which is in train mode, while it answers a third that only predicts"
    set_seed(5)
    model = create_vision_model(narrow18, 3, pretrained=False).eval()
    xbs = [torch.randn(1, 3, 64, 64) for _ in range(4)]
    want = [[model_heatmaps(model, x, cls=[0,2], layer=l)[0] for x in xbs] for l in (None, '0.6')]
    with torch.no_grad(): plain = [model(x) for x in xbs]
    before,wrong,done = state(model),[],threading.Event()

    def explain(i, layer):
        for n in range(40):
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


@pytest.mark.slow
def test_threads_in_train_mode():
    "The last of several runs puts the flags back, and no run sees another's train mode"
    model = prepare(create_vision_model(narrow18, 3, pretrained=False), 'mixed')
    x = torch.randn(1, 3, 64, 64)
    want,before,wrong = model_heatmaps(model, x, cls=1)[0],state(model),[]
    def explain():
        for _ in range(40):
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


class ShowEach(Callback):
    "What people write to watch a model learn"
    def __init__(self, img, events): self.img,self.events,self.shown = img,events,0
    def look(self, event):
        if event in self.events:
            self.learn.show_gradcam(self.img)
            plt.close('all')
            self.shown += 1
    def before_fit(self):     self.look('before_fit')
    def after_epoch(self):    self.look('after_epoch')
    def after_validate(self): self.look('after_validate')
    def after_batch(self):    self.look('after_batch')


@pytest.mark.slow
@pytest.mark.parametrize('events,shown', [(['after_epoch'], 2), (['before_fit', 'after_validate'], 3), (['after_batch'], 6)])
def test_training_goes_on_as_it_would(pics, events, shown):
    "A heatmap in the middle of a training, from a callback of it, changes neither its random numbers nor anything else"
    def train(*cbs):
        learn = pic_learner(pics, batch_tfms=aug_transforms())
        set_seed(3)
        with learn.no_logging(): learn.fit(2, 1e-3, cbs=[*cbs, MixUp()])
        return learn
    look = ShowEach(get_image_files(pics)[0], events)
    a,b = train(),train(look)
    assert look.shown==shown
    assert [list(o) for o in a.recorder.values]==[list(o) for o in b.recorder.values]
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)


def test_probabilities_while_mixup_trains(learn, pics):
    seen = []
    class Look(Callback):
        def after_batch(self): seen.append(self.learn.get_heatmaps(get_image_files(pics)[0]).preds.sum().item())
    with learn.no_logging(): learn.fit(1, cbs=[MixUp(), Look()])
    assert seen and seen==pytest.approx([1.]*len(seen))


def test_random_numbers(learn, pics):
    f = get_image_files(pics)[0]
    set_seed(1)
    want = random.random(),np.random.rand(),torch.rand(2)
    for call in (lambda: learn.get_heatmaps(), lambda: learn.show_gradcam(f), lambda: learn.plot_heatmap_grid(n=3),
                 lambda: model_heatmaps(learn.model, torch.zeros(1, 3, 64, 64))):
        set_seed(1)
        call()
        equal((random.random(),np.random.rand(),torch.rand(2)), want)


def test_callbacks_state(learn, pics):
    "A callback that collects things collects nothing of ours"
    class Feats(Callback):
        def __init__(self): self.feats,self.events = [],{}
        def after_pred(self): self.feats.append(1)
        def before_batch(self): self.events['bb'] = 1
    learn.add_cbs([Feats(), MixedPrecision(amp_mode='bf16')])
    learn.get_heatmaps()
    assert learn.feats.feats==[] and learn.feats.events=={} and learn.mixed_precision.kwargs=={}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, 'SIGALRM'), reason='needs a timer signal, which Windows has not')
def test_interrupts():
    "Ctrl-C at any moment leaves no module in another mode, and the next call works"
    model = prepare(create_vision_model(narrow18, 3, pretrained=False), 'mixed')
    x,hits = torch.randn(1, 3, 64, 64),0
    model_heatmaps(model, x)
    before,rng = state(model),np.random.default_rng(0)
    def stop(*_): raise KeyboardInterrupt
    old = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(.0005, .03))
                for _ in range(3): model_heatmaps(model, x, cls=[0,1])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt: hits += 1
            same(before, state(model))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert hits>10


def test_the_users_picture_is_untouched(learn):
    im = Image.new('RGB', (80, 70))
    kind,pixels = type(im),im.tobytes()
    learn.show_gradcam(im)
    assert type(im) is kind and im.tobytes()==pixels


def test_results_have_no_graph(learn):
    hm = learn.get_heatmaps()
    assert not hm.maps.requires_grad and not hm.preds.requires_grad and hm.maps.dtype==torch.float32


def test_two_models_that_share_modules():
    "Runs on a model and on another one around it may overlap"
    net = create_vision_model(narrow18, 2, pretrained=False).train()
    outer = nn.Sequential(net)
    with eval_mode(outer):
        with eval_mode(net): pass
        assert not net.training
    a,b = eval_mode(net),eval_mode(outer)
    a.__enter__(); b.__enter__(); a.__exit__(None, None, None)
    assert not any(m.training for m in net.modules())
    b.__exit__(None, None, None)
    assert all(m.training for m in outer.modules())


def test_one_pass_without_autograd_in_the_body(learn):
    "However many classes, the model runs once a batch, and the body never records"
    grad,heads = [],[]
    a = learn.model[0].register_forward_pre_hook(lambda m, i: grad.append(torch.is_grad_enabled()))
    b = learn.model[1].register_forward_pre_hook(lambda m, i: heads.append(torch.is_grad_enabled()))
    hm = learn.get_heatmaps(cls=[0,1])
    assert grad==[False]*2 and heads==[True]*2 and hm.maps.shape[:2]==(6,2)
    grad.clear()
    model_heatmaps(learn.model, torch.rand(3, 3, 64, 64), cls=[0,1])
    assert grad==[False]
    a.remove(); b.remove()


def test_activations_are_not_kept_from_batch_to_batch(learn):
    refs,alive = [],[]
    class Look(Callback):
        def before_batch(self): alive.append(sum(r() is not None for r in refs))
    h = learn.model[0].register_forward_hook(lambda m, i, o: refs.append(weakref.ref(o)))
    learn.dls.valid = learn.dls.valid.new(bs=1)
    learn.add_cb(Look())
    learn.get_heatmaps()
    h.remove()
    assert len(refs)==6 and alive==[0]*6


def test_callbacks_that_change_the_prediction_come_first(learn):
    "What is explained is what get_preds would give"
    class Swap(Callback):
        order = 99
        def after_pred(self): self.learn.pred = self.pred.flip(1)
    want = learn.get_heatmaps(cls=0, relu=False)
    learn.add_cb(Swap())
    got = learn.get_heatmaps(cls=1, relu=False)
    torch.testing.assert_close(got.maps, want.maps)
    torch.testing.assert_close(got.preds, want.preds.flip(1))

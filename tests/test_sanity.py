"Do maps depend on what was learned? Stages by hand, methods that do and that do not by construction, weights that stay the same bits, a known entropy."
import pickle, weakref
import scipy.stats
from shared import *
from test_interrupts import try_lines
from fastai_heatmaps.core.method import get_method
from fastai_heatmaps.data.images import to_images
from fastai_heatmaps.learner.run import shadow
from fastai_heatmaps.trust.sanity import complexity, measure_norms, measure_sanity, model_stages, redraw


class Tiny(nn.Module):
    "Its layers are not defined in the order in which they run, one never runs, and it has a weight of its own"
    def __init__(self, c=2):
        super().__init__()
        self.fc,self.unused = nn.Linear(4, c),nn.Linear(3, 3)
        self.last = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.mid,self.start = nn.Conv2d(5, 6, 3, padding=1),nn.Conv2d(3, 5, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x): return self.fc(self.last(self.mid(self.start(x*self.scale).relu()).relu()).mean((2,3)))


@pytest.fixture
def tiny(pics):
    learn = pic_learner(pics)
    set_seed(3)
    learn.model,learn.splitter = Tiny(),trainable_params
    return learn


def bits(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same_bits(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())


def by_model(f):
    "Make `f(model, x) -> (n, h, w)` a method"
    def method(probe): return f(probe.model, probe.x)[:,None].expand(-1, probe.idxs.shape[1], -1, -1)
    method.needs,method.__name__ = 'model',f.__name__
    return method


@by_model
def edges(model, x): return x.diff(dim=2)[...,1:].abs().sum(1) + x.diff(dim=3)[:,:,1:].abs().sum(1) # knows no weights


def own_weights(name):
    "A method whose map is the weight of a layer, whatever the photo"
    def weights(model, x): return model.get_submodule(name).weight.detach().flatten(1).expand(len(x), -1, -1)
    return by_model(weights)


def test_stages_of_a_tiny_net(tiny):
    run = shadow(tiny)
    plan = model_stages(run, to_images(run.dls), 4)
    assert [*plan]==['head', 'from last', 'from mid', 'all']
    assert plan['head']==['fc'] and plan['from last']==['last.0', 'last.1'] and plan['from mid']==['mid']
    assert {*plan['all']} >= {'', 'start', 'unused'} # the model itself holds `scale`
    everything = [n for ns in plan.values() for n in ns]
    assert sorted(everything)==sorted(n for n,_ in tiny.model.named_modules()) # each once
    assert [*model_stages(run, to_images(run.dls), 2)]==['head', 'all'] and [*model_stages(run, to_images(run.dls), 1)]==['all']


def test_stages_of_vision_learner(learn):
    run = shadow(learn)
    plan = model_stages(run, to_images(run.dls))
    assert [*plan]==['head', 'from 0.7', 'from 0.6', 'from 0.5', 'all']
    assert plan['head']==['1.2', '1.4', '1.6', '1.8'] and all(n.startswith('0.6.') for n in plan['from 0.6'])
    done = {n for ns in plan.values() for n in ns}
    assert {n.rpartition('.')[0] for n,_ in learn.model.named_parameters()} <= done


def test_methods_with_a_known_answer(tiny):
    run = shadow(tiny)
    images = to_images(run.dls)
    fs = [edges, own_weights('fc'), own_weights('last.0'), own_weights('start')]
    blind,fc,late,early = measure_sanity(run, images, [get_method(f) for f in fs], stages=4)
    stages = 'head', 'from last', 'from mid', 'all'
    assert [*blind]==['another photo', *stages] and blind['head'].shape==(6,1)
    for s in stages: torch.testing.assert_close(blind[s], torch.ones(6, 1))
    assert blind['another photo'].max()<.9
    for ranks,first in ((fc, 0), (late, 1), (early, 3)): # the stage in which these weights change
        assert all((ranks[s]>.9999).all() for s in stages[:first]) and all((ranks[s]<.95).all() for s in stages[first:])
        torch.testing.assert_close(ranks['another photo'], torch.ones(6, 1)) # the same for all photos


def test_verdicts(tiny):
    res = tiny.sanity_check(method=[edges, own_weights('fc')], stages=2)
    assert 'by edges (1.00 ± .00 in the head) do not show what was learned' in res.words and '6 photos, all that there are' in res.words
    t = res.table
    assert t.loc[('edges', 'all'), 'rank']>.9999 and t.loc[('edges', 'all'), 'ssim']>.9999 and t.loc[('edges', 'head'), 'rank_error']<1e-6
    assert [*t.loc['weights'].index]==['head', 'all', 'another photo'] and t.loc[('weights', 'head'), 'rank']<.9
    assert res.each['edges all'].shape==(6,1)


def test_nothing_is_left(tiny):
    own,before,seen = tiny.model,bits(tiny.model),[]
    flags = {n: (p.requires_grad, p.grad) for n,p in own.named_parameters()}
    def watched(fail=None):
        def f(model, x):
            seen.append(weakref.ref(model))
            if fail and model is not own: raise fail
            return x[:,0]
        return by_model(f)
    def check():
        assert tiny.model is own and same_bits(before, bits(own)) and all(m.training for m in own.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())
        assert {n: (p.requires_grad, p.grad) for n,p in own.named_parameters()}==flags
        gc.collect()
        copies = [r for r in seen if r() is not own]
        assert copies and not any(r() for r in copies)
        seen.clear()
    tiny.sanity_check(method=watched())
    check()
    for e in (KeyboardInterrupt(), RuntimeError('no')):
        with pytest.raises(type(e)): tiny.sanity_check(method=watched(e))
        e.__traceback__ = None # which would keep the copy alive
        check()


@pytest.mark.slow
@pytest.mark.parametrize('labels', [False, True])
def test_interrupts(tiny, labels):
    "Ctrl-C at any line, also while the copy is trained"
    left,total = try_lines(lambda: tiny.sanity_check(n=2, stages=2, labels=labels, epochs=1), tiny.model, tiny, n=20, seed=labels)
    assert not left and total>1000


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_without_grad(tiny, mode):
    kwargs = dict(method=['gradcam', 'saliency'], stages=2, labels=True, epochs=1, relu=False)
    want = tiny.sanity_check(**kwargs)
    with mode(): assert tiny.sanity_check(**kwargs).table.equals(want.table)


def test_seed(tiny):
    before = torch.get_rng_state(),np.random.get_state()[1].copy(),random.getstate()
    a,b,c = [tiny.sanity_check(method='gradcam', n=4, stages=2, seed=s, relu=False) for s in (1, 1, 2)]
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1]==np.random.get_state()[1]).all() and before[2]==random.getstate()
    assert a.table.equals(b.table) and a.words==b.words and not a.table.equals(c.table)
    assert len(a.each['gradcam all'])==4 and ' 4 photos.' in a.words


def test_class_and_layer_stay(tiny):
    "What is explained is what the model as it is predicts, also when a random one would say something else"
    asked = []
    def method(probe):
        asked.append((probe.idxs.tolist(), tuple(probe.acts.shape[1:])))
        return probe.acts[:,:1].expand(-1, probe.idxs.shape[1], -1, -1)
    method.needs = 'layer'
    tiny.sanity_check(method=method, layer='mid', stages=4, bs=6)
    assert len(asked)==5 and all(o==asked[0] for o in asked) and asked[0][1]==(6,64,64)
    want = tiny.get_preds()[0].argmax(1)
    assert asked[0][0]==want[:,None].tolist()


def test_redraw():
    gen = torch.Generator().manual_seed(0)
    conv,norm = nn.Conv2d(64, 128, 3),nn.BatchNorm2d(8)
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean): t.fill_(3)
    redraw(conv, gen)
    redraw(norm, gen)
    assert abs(conv.weight.std().item()*(64*9/2)**.5-1)<.02 and abs(conv.weight.mean())<1e-3 and not conv.bias.any()
    assert (norm.weight==1).all() and not norm.bias.any() and not norm.running_mean.any()
    own = nn.Module() # which does not know how to start anew
    own.positions = nn.Parameter(2+.1*torch.randn(1, 50, 64))
    own.scale = nn.Parameter(tensor([5.]))
    was = own.positions.detach().clone()
    redraw(own, gen)
    assert abs(own.positions.mean()-2)<.01 and abs(own.positions.std()-.1)<.005 and abs(np.corrcoef(was.flatten(), own.positions.detach().flatten())[0,1])<.06
    assert own.scale.item()==5 # a single number has no deviation


def test_norms_are_measured_on_all_images(tiny):
    "Also over several batches, with one image each"
    run = shadow(tiny)
    norm = tiny.model.last[1]
    for bs in (6, 4, 1):
        norm.running_mean.fill_(9), norm.running_var.fill_(9)
        images = to_images(run.dls, bs=bs)
        measure_norms(run, images, [norm])
        got = []
        h = norm.register_forward_pre_hook(lambda m, i: got.append(i[0]))
        with torch.no_grad(): tiny.model.eval()(torch.cat([b[0] for b in images.dl]).as_subclass(Tensor))
        h.remove()
        x = got[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(norm.running_mean, x.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, x.var(1, correction=0), rtol=1e-4, atol=1e-6)
    assert not norm._forward_pre_hooks


def test_random_models_stay_alive(pics):
    "Without BatchNorm, too: 20 layers on, the answers to different photos differ"
    net = nn.Sequential(*[nn.Sequential(nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.ReLU()) for i in range(20)])
    learn = pic_learner(pics)
    learn.model = nn.Sequential(net, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)))
    preds = {}
    @by_model
    def method(model, x):
        with torch.no_grad(): preds.setdefault(id(model), []).append(model(x))
        return x[:,0]
    learn.sanity_check(method=method, stages=1)
    new,rand = [(y.std(0)/y.abs().max()).min() for y in map(torch.cat, preds.values())]
    assert new<.01<rand # as PyTorch makes them, the layers answer all photos alike


def test_complexity():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2,1,230,240)).astype('float32')**3
    want = [scipy.stats.entropy(np.histogram(m, 100)[0]) for m in a[:,0]] # nothing is enlarged here
    np.testing.assert_allclose(complexity(torch.tensor(a))[:,0], want, rtol=1e-3)
    torch.testing.assert_close(complexity(torch.tensor(5*a+3)), complexity(torch.tensor(a)), rtol=1e-3, atol=0) # of any scale


def test_efficient(tiny):
    @by_model
    def step(model, x): # two values, half and half; with other weights four, a quarter each
        k = 2 if torch.equal(model.fc.weight, tiny.model.fc.weight) else 4
        return (torch.arange(224)*k//224).float().expand(len(x), 224, -1)
    res = tiny.sanity_check(method=[step, edges], efficient=True)
    t = res.table
    np.testing.assert_allclose(t.loc['step', ['before', 'after', 'rise']].astype(float), [np.log(2), np.log(4), 1], rtol=1e-5)
    assert t.loc['edges', 'rise']==0 and 'maps by edges (+0% ± 0%) are about as complex' in res.words
    assert 'With a random model, maps by step (+100% ± 0%) are more complex' in res.words


def test_flat_maps_are_counted(tiny):
    @by_model
    def faint(model, x): return x[:,0] if model is tiny.model else torch.zeros_like(x[:,0])
    res = tiny.sanity_check(method=faint, stages=2)
    assert (res['unranked'][:2]==6).all() and 'Maps by faint are flat or not finite, and nothing can be said of them' in res.words and 'up to 6 of 6' in res.words


def test_one_photo(tiny):
    res = tiny.sanity_check(method='gradcam', n=1, relu=False)
    assert ' 1 photo.' in res.words and 'more photos' in res.words and 'different photos' not in res.words
    assert [t.get_text() for t in res.plot()[-1].get_legend().get_texts()]==['gradcam'] # no baseline


@pytest.mark.slow
def test_shuffled_labels(pics, tiny):
    items = [*tiny.dls.train_ds.items]
    labels = [int(y) for _,y in tiny.dls.train_ds]
    before,opt = bits(tiny.model),getattr(tiny, 'opt', None)
    res = tiny.sanity_check(method=['gradcam', edges], labels=True, epochs=2, stages=2, relu=False)
    assert [*tiny.dls.train_ds.items]==items and [int(y) for _,y in tiny.dls.train_ds]==labels
    assert same_bits(before, bits(tiny.model)) and getattr(tiny, 'opt', None) is opt
    t = res.table
    assert t.loc[('edges', 'shuffled labels'), 'rank']>.9999 and t.loc[('gradcam', 'shuffled labels'), 'rank']<.9999
    assert 'in 2 epochs' in res.words
    again = tiny.sanity_check(method=['gradcam', edges], labels=True, epochs=2, stages=2, relu=False)
    assert again.table.equals(res.table)


def test_labels_are_shuffled_and_images_are_not(tiny):
    from fastai_heatmaps.trust import sanity
    ds,own = sanity._shuffled_dl(tiny.dls, 1).dataset,tiny.dls.train_ds
    pairs = [(pathless(a), int(y)) for a,y in ds]
    assert [p for p,_ in pairs]==[pathless(a) for a,_ in own]
    assert sorted(y for _,y in pairs)==sorted(int(y) for _,y in own) and [y for _,y in pairs]!=[int(y) for _,y in own]


def pathless(im): return np.array(im).tobytes()


def test_errors(tiny, tmp_path):
    for kwargs,says in ((dict(n=0), 'at least 1'), (dict(stages=0), 'at least 1'), (dict(efficient=True, labels=True), 'choose one'),
                        (dict(method='gradcan'), "did you mean 'gradcam'"), (dict(method=[]), 'empty')):
        with pytest.raises(ValueError, match=says): tiny.sanity_check(**kwargs)
    tiny.export(tmp_path/'m.pkl')
    loaded = load_learner(tmp_path/'m.pkl')
    with pytest.raises(ValueError, match='leave labels out'): loaded.sanity_check([np.zeros((64,64,3), np.uint8)], labels=True)
    with pytest.raises(ValueError, match='there are no images'): loaded.sanity_check()
    photos = np.random.default_rng(0).integers(0, 255, (2,64,64,3), dtype=np.uint8)
    assert ' 2 photos' in loaded.sanity_check([*photos]).words


@pytest.mark.parametrize('block,y,c,loss', [
    (MultiCategoryBlock(vocab=['Red', 'Blue_ish', 'Green']), lambda o: [label(o)], 3, BCEWithLogitsLossFlat()),
    (CategoryBlock, label, 1, lambda p,y: F.binary_cross_entropy_with_logits(p.squeeze(1), y.float())),
    (RegressionBlock, lambda o: float(len(o.name)), 1, MSELossFlat())])
def test_other_tasks(pics, block, y, c, loss):
    "Several classes at once, one logit, a number"
    dblock = DataBlock((ImageBlock, block), get_items=get_image_files, get_y=y, splitter=IndexSplitter(range(6)), item_tfms=Resize(64))
    learn = Learner(dblock.dataloaders(pics, bs=4, num_workers=0, device='cpu'), Tiny(c), loss_func=loss)
    res = learn.sanity_check(stages=2, cls=0)
    assert [*res.loc['gradcam'].index]==['head', 'all', 'another photo'] and res.each['gradcam head'].shape==(6,1)


def test_score(tiny):
    "A model whose output is no tensor of scores"
    class Odd(Tiny):
        def forward(self, x): return dict(logits=super().forward(x))
    odd = Learner(tiny.dls, Odd())
    odd.model.load_state_dict(tiny.model.state_dict())
    odd.loss_func = lambda p,y: F.cross_entropy(p['logits'], y)
    res = odd.sanity_check(stages=2, score=itemgetter('logits'))
    assert res.table.equals(tiny.sanity_check(stages=2).table)


def test_segmentation(pics):
    mask = lambda o: PILMask.create(np.array(PILImage.create(o))[...,0]//200)
    dblock = DataBlock((ImageBlock, MaskBlock(codes=['no', 'yes'])), get_items=get_image_files, get_y=mask, splitter=IndexSplitter(range(6)), item_tfms=Resize(64))
    set_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    learn = Learner(dblock.dataloaders(pics, bs=4, num_workers=0, device='cpu'), model, loss_func=CrossEntropyLossFlat(axis=1))
    res = learn.sanity_check(method=['gradcam', edges], stages=3, layer='3')
    assert [*res.loc['edges'].index]==['head', 'from 1', 'all', 'another photo'] and (res.each['edges all']>.9999).all()


def test_pictures(tiny):
    res = tiny.sanity_check(method=['gradcam', 'saliency'], stages=3)
    axs = res.plot()
    assert len(axs)==2*4+1 and [ax.get_title() for ax in axs[:4]]==['as it is', 'head', 'from last', 'all']
    assert [t.get_text() for t in axs[-1].get_xticklabels()]==['head', 'from last', 'all']
    copy = pickle.loads(pickle.dumps(res))
    assert copy.table.equals(res.table) and len(copy.plot())==9


@pytest.mark.slow
def test_guided_backprop_fails_and_gradcam_passes(demo):
    items = [demo_image(o) for o in ('cat', 'coffee', 'rocket', 'coffee_cat', 'rocket_cat', 'coffee_rocket')]
    res = demo.sanity_check(items, method=['gradcam', 'guided_backprop', 'activations'], stages=2)
    passes,_,fails,*_ = res.words.split('. ')
    assert passes.startswith('Maps by gradcam (') and 'depend on what was learned' in passes
    assert fails.startswith('Maps by guided_backprop (') and ' and activations (' in fails and 'do not show what was learned' in fails

"How far maps move under noise and a flip, and how concentrated they are."
import pickle, pytest
from scipy.stats import spearmanr
from shared import *
from test_no_trace import state, same
from test_interrupts import try_lines, n_lines
from fastai_heatmaps.core.method import get_method
from fastai_heatmaps.data.images import to_images
from fastai_heatmaps.learner.run import shadow
from fastai_heatmaps.trust.findings import mean_error, some_rows
from fastai_heatmaps.trust.stability import gini, same_answer, measure_stability


@pytest.mark.parametrize('d', [3, 8])
def test_gini_by_formula(d):
    "One cell of d² has `1 - 1/d²`, equal cells 0; a random map has half its mean absolute difference, divided by its mean"
    point,flat = torch.zeros(d, d),torch.full((d,d), -3.)
    point[1,2] = .1
    maps = torch.stack([point, flat, torch.rand(d, d, generator=torch.Generator().manual_seed(0))-.5, torch.zeros(d, d)])[:,None]
    got = gini(maps)[:,0]
    v = maps[2].abs().flatten().double()
    torch.testing.assert_close(got[:3], tensor([1-1/d**2, 0, (v[:,None]-v).abs().mean()/(2*v.mean())]).float(), rtol=1e-5, atol=1e-6)
    assert got[3].isnan()
    for same in (gini(list(maps)), gini(maps*7)): torch.testing.assert_close(same, gini(maps), equal_nan=True) # at any scale


def first_channel(acts): return acts[:,0]

def linear_net(c=2, h=64):
    "The pictures as they are, and a linear head that looks at the mean colours"
    net = nn.Sequential(nn.Identity(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, c)))
    w = torch.zeros(c, 3)
    w[0,0] = w[1,2] = 20.
    net[1][2].weight.data,net[1][2].bias.data = w,torch.zeros(c)
    return net


@pytest.fixture
def linear(pics):
    learn = pic_learner(pics)
    learn.model = linear_net()
    return learn


def test_the_map_moves_as_the_noise_does(linear):
    "A map that is the first channel: as scipy correlates it with the same and our noise, drawn here once more"
    x = torch.cat([x for x,_ in linear.dls.valid]).as_subclass(Tensor)
    f = linear.heatmap_stability(method=first_channel, noise=.3, copies=2, seed=5)
    want = torch.zeros(2, len(x))
    for c in range(2):
        gen = torch.Generator().manual_seed(5+c)
        drawn = torch.randn(1, *x.shape[1:], generator=gen)[0]
        for i,o in enumerate(x): want[c,i] = float(spearmanr(o[0].flatten(), (o+.3*(o.max()-o.min())*drawn)[0].flatten())[0])
    assert not f.each['first_channel moved'].any()
    torch.testing.assert_close(f.each['first_channel noise'][:,0], want.mean(0), rtol=0, atol=1e-4)
    assert want.max()<.95
    mean,error = mean_error(want.mean(0))
    assert f.loc['first_channel','noise']==pytest.approx(mean, abs=1e-4) and f.loc['first_channel','noise_error']==pytest.approx(error, abs=1e-4)


def test_a_map_that_flips_with_the_picture(linear):
    f = linear.heatmap_stability(method=['gradcam', first_channel])
    for name in ('gradcam', 'first_channel'): torch.testing.assert_close(f.each[f'{name} flip'], torch.ones(6, 1))
    def left(acts): return torch.linspace(1, 0, acts.shape[3]).expand(acts[:,0].shape) # whatever the picture
    f = linear.heatmap_stability(method=left)
    torch.testing.assert_close(f.each['left flip'], -torch.ones(6, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(f.each['left noise'], torch.ones(6, 1))
    torch.testing.assert_close(f.each['left others'], torch.ones(6, 1))
    assert 'that is hardly less' in f.words


def test_copies_whose_answer_changed_are_left_out(linear):
    "One photo is on the edge: its answer changes with any noise, and nothing is said of its map"
    class Edge(nn.Module):
        "Class 1 if the picture is not quite the first one"
        def __init__(self, x): super().__init__(); self.x = nn.Parameter(x)
        def forward(self, x):
            y = -((x-self.x).abs().mean((1,2,3))>1e-3).float()+.5
            return torch.stack([y, -y], 1)*9
    linear.model = nn.Sequential(nn.Identity(), Edge(linear.dls.valid.one_batch()[0][:1].as_subclass(Tensor)))
    f = linear.heatmap_stability(method=first_channel)
    moved = f.each['first_channel moved']
    assert moved.shape==(6,2,1) and moved[0].all() and not moved[1:].any()
    assert f.each['first_channel noise'][0].isnan() and f.each['first_channel noise'][1:].isfinite().all()
    assert 'It changed the answer in 2 of 12 cases, which are left out' in f.words
    assert f.loc['first_channel','noise']==pytest.approx(float(f.each['first_channel noise'][1:].mean()))
    assert f.plot()[0,2].get_title().startswith('with noise') and '?' not in f.plot()[0,2].get_title() # of a photo whose answer stays


def test_a_photo_is_drawn_whose_answer_stays(linear):
    "The first copy of the first photo gets another answer, and the second does not: other photos can be compared in what is drawn"
    x = linear.dls.valid.one_batch()[0][0].as_subclass(Tensor)
    copy = x + .02*(x.max()-x.min())*torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    class Once(nn.Module):
        "Class 1 if the picture is this copy"
        def __init__(self): super().__init__(); self.x = nn.Parameter(copy)
        def forward(self, x):
            y = .5-((x-self.x).abs().mean((1,2,3))<1e-3).float()
            return torch.stack([y, -y], 1)
    linear.model = nn.Sequential(nn.Identity(), Once())
    f = linear.heatmap_stability(method=first_channel)
    assert f.each['first_channel moved'].flatten(1).tolist()==[[True, False]]+5*[[False, False]]
    assert '?' not in f.plot()[0,2].get_title()


def test_what_is_the_same_answer(linear):
    hm = linear.get_heatmaps(cls=[0,1])
    other = hm.replace(preds=hm.preds.flip(1))
    assert same_answer(hm, hm).all() and not same_answer(hm, other).any() and same_answer(hm, other).shape==(6,2)
    p,q = tensor([[.6, .1]]),tensor([[.4, .2]])
    hm = Heatmaps(torch.rand(1, 2, 3, 3), tensor([[0,1]]), p, task='classes', thresh=.5)
    assert same_answer(hm, hm.replace(preds=q)).tolist()==[[False,True]]
    hm = hm.replace(task='numbers')
    assert same_answer(hm, hm.replace(preds=q)).all()


@pytest.mark.slow
def test_methods_share_passes_and_noise(learn):
    "Several at once: the same as each alone, in 4 passes for all of the CAM family; the same however they are batched"
    ran = 0
    def count(m, i): nonlocal ran; ran += len(i[0])
    h = learn.model.register_forward_pre_hook(count)
    f = learn.heatmap_stability(method=['gradcam', 'layercam', 'activations'], layer='0.5', seed=3)
    h.remove()
    assert ran==6*4
    alone = learn.heatmap_stability(method='layercam', layer='0.5', seed=3)
    whole = [k for k in alone.each if 'layercam' in k]
    for k in whole: torch.testing.assert_close(alone.each[k], f.each[k], equal_nan=True)
    learn.dls.valid.bs = 1
    again = learn.heatmap_stability(method='layercam', layer='0.5', seed=3)
    for k in whole: torch.testing.assert_close(alone.each[k], again.each[k], rtol=1e-3, atol=1e-3, equal_nan=True)
    other = learn.heatmap_stability(method='layercam', layer='0.5', seed=4)
    assert not torch.equal(alone.each['layercam noise'], other.each['layercam noise']) and torch.equal(again.each['layercam gini'], other.each['layercam gini'])


def test_the_choice_of_images(linear, pics):
    f = linear.heatmap_stability(n=3, seed=1)
    assert len(f.each['gradcam gini'])==3 and 'Measured on 3 photos' in f.words
    images = to_images(linear.dls)
    assert some_rows(images, 3, 1)==some_rows(images, 3, 1)!=some_rows(images, 3, 2) and some_rows(images, 6)==some_rows(images, 60)==list(range(6))
    f = linear.heatmap_stability(get_image_files(pics)[0], cls=[0,1])
    assert f.each['gradcam noise'].shape==(1,2) and 'nan' not in f.words and 'Measured on 1 photo' in f.words
    cls = tensor([0,1,1,0,0,1])
    hms = measure_stability(shadow(linear), images.part(some_rows(images, 3, 1)), [get_method('gradcam')], cls=cls[some_rows(images, 3, 1)])[0]['hms']
    assert torch.equal(hms[0].cls, hms[1].cls) and torch.equal(hms[0].cls[:,0], cls[some_rows(images, 3, 1)])
    assert linear.heatmap_stability(n=3, seed=1, cls=cls).each['gradcam gini'].shape==(3,1)
    for kwargs in (dict(n=0), dict(noise=0), dict(copies=0), dict(method='nope'), dict(cls='Rad')):
        with pytest.raises(ValueError): linear.heatmap_stability(**kwargs)


def test_it_draws_and_pickles(linear):
    f = linear.heatmap_stability(method=['gradcam', 'saliency'])
    axs = f.plot()
    assert axs.shape==(2,4) and axs[1,0].get_title()=='saliency' and all(ax.images for ax in axs.flat)
    g = pickle.loads(pickle.dumps(f))
    assert g.words==f.words and g.plot().shape==(2,4)
    assert all(o.endswith('.') for o in (f.words,)) and 'By the Gini index' in f.words


def test_other_tasks(pics):
    "Several classes at once, numbers, and a class for each pixel"
    files = get_image_files(pics)
    def dls(block, y, **kwargs): return DataBlock((ImageBlock, block), get_y=y, splitter=IndexSplitter(range(6)), item_tfms=Resize(64), **kwargs).dataloaders(files, bs=4, num_workers=0, device='cpu')
    multi = Learner(dls(MultiCategoryBlock(vocab=['a','b','c']), lambda o: ['a','b'][:1+len(o.name)%2]), create_vision_model(narrow18, 3, pretrained=False), loss_func=BCEWithLogitsLossFlat())
    number = Learner(dls(RegressionBlock, lambda o: 1.), create_vision_model(narrow18, 1, pretrained=False), loss_func=MSELossFlat())
    pixels = Learner(dls(MaskBlock(['x','y']), lambda o: PILMask.create(np.zeros((64,64), dtype=np.uint8))), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)), loss_func=CrossEntropyLossFlat(axis=1))
    one = Learner(dls(CategoryBlock, label), create_vision_model(narrow18, 1, pretrained=False), loss_func=BCEWithLogitsLossFlat())
    for learn in (multi, number, pixels, one):
        f = learn.heatmap_stability(layer='0' if learn is pixels else None)
        assert f.each['gradcam flip'].shape==(6,1) and f.loc['gradcam','gini']>0, learn.loss_func


def test_no_trace(learn):
    learn.model.train()
    before = state(learn.model, learn)
    with draws_nothing(): learn.heatmap_stability(n=2)
    same(before, state(learn.model, learn))


@pytest.mark.slow
def test_no_trace_after_an_interrupt(linear, n_lines):
    left,total = try_lines(lambda: linear.heatmap_stability(n=2), linear.model, linear, n=n_lines(20))
    assert not left and total>1000

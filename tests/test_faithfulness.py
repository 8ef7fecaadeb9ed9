"""Deletion, insertion, drop, increase, gain and ROAD: by hand on a net of known pixels, by their definitions, and beside other libraries.

What we found in them, as the tests below show: torchcam 0.5 is right where no pixels have the same value and values are large, grad-cam 1.5 too,
but its drop is not divided by the probability, and its ROAD hides everything where a map is mostly zero.
Quantus 0.6 is no requirement of these tests. Tried once by hand, its PixelFlipping gave our curve of deletion, without the first point, for pictures of
one channel; in colour pictures it hides single channels of pixels one after another. Its ROAD counts right answers, as the paper does, where we average
the probability, and for colour pictures with one map each it raised an IndexError.
"""
import pickle
from contextlib import nullcontext

from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADLeastRelevantFirst, ROADMostRelevantFirst
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

from shared import *
from fastai_heatmaps.core.method import get_method
from fastai_heatmaps.data.images import to_images
from fastai_heatmaps.learner.core import explain_by
from fastai_heatmaps.learner.run import shadow
from fastai_heatmaps.trust.faithfulness import *
from fastai_heatmaps.trust.findings import random_maps, centre_maps, mean_error, short

side = 16
seen = torch.zeros(side, side) # the pixels that the net below looks at: a quarter of them
seen[2:10,4:12] = 1


class SeenPixels(nn.Module):
    "The probability of 'yes' is the mean of known pixels"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(seen/seen.sum())
    def forward(self, x):
        p = (x.mean(1)*self.w).sum((1,2))
        return torch.stack([1-p, p], 1)


@pytest.fixture
def grey():
    "Its maps know exactly what the net looks at; each picture is of a single grey, .8, so that 'yes' has a probability of .8"
    block = DataBlock((ImageBlock, CategoryBlock(vocab=['no', 'yes'])), get_x=lambda o: PILImage.create(np.full((side,side,3), 204, np.uint8)),
                      get_y=lambda o: 'yes', splitter=lambda o: (range_of(o), range_of(o)))
    learn = Learner(block.dataloaders(list(range(5)), bs=2, num_workers=0, device='cpu'), SeenPixels(), loss_func=nn.NLLLoss())
    return learn.get_heatmaps(cls='yes', method='saliency')


def mapped(hm, m): return hm.replace(maps=m.expand(len(hm), 1, -1, -1))
def values(found, who=''): return {m:found.each[m+who] for m in found.table.index}


@pytest.mark.parametrize('name,m,want', [
    ('perfect', seen, dict(deletion=.1, insertion=.7, drop=0., increase=0., gain=0.)), # the first quarter of the steps takes all: .8, 0, 0, 0, 0
    ('inverted', 1-seen, dict(deletion=.7, insertion=.1, drop=1., increase=0., gain=0.)),
    ('signed', seen-.5, dict(deletion=.1, insertion=.7, drop=0., increase=0., gain=0.)), # what is against the class comes last
    ('graded', seen+(1-seen)*.5, dict(deletion=.1, insertion=.7, drop=0., increase=0., gain=0.))])
def test_by_hand(grey, name, m, want):
    found = mapped(grey, m).faithfulness(steps=4, fill=0)
    for k,v in want.items(): torch.testing.assert_close(found.each[k], torch.full((5,1), v), atol=1e-5, rtol=0)
    torch.testing.assert_close(found['value'].to_dict(), want, atol=1e-5, rtol=0)
    assert (found['value_error'].abs()<1e-5).all() and list(found['better'])==['lower', 'higher', 'lower', 'higher', 'higher']


def test_half_shown_by_hand(grey):
    "Half of the evidence is marked as 1, the rest as .25: with white as the fill it rises to 1, .8 + .2*.75/2 by hand"
    half = seen.clone()
    half[2:6] *= .25
    found = mapped(grey, half).faithfulness(fill=1., metrics=['drop', 'increase', 'gain'])
    p = .5*.8 + .5*(.25*.8 + .75)
    assert found['value'].to_dict()==pytest.approx(dict(drop=0, increase=1, gain=(p-.8)/.2), abs=1e-5)
    found = mapped(grey, half).faithfulness(fill=0., metrics=['drop', 'increase', 'gain'])
    assert found['value'].to_dict()==pytest.approx(dict(drop=1-.5*1.25, increase=0, gain=0), abs=1e-5)


def test_a_flat_map_scores_as_the_random_one(grey):
    "Ties are ordered by the random map, not by their place: a corner is not better than another"
    found = mapped(grey, torch.ones(side, side)).faithfulness(steps=8)
    for m in ('deletion', 'insertion'): torch.testing.assert_close(found.each[m], found.each[f'{m} random'])
    assert (found.each['drop']==1).all() # it marks nothing, so nothing is kept
    assert abs(found.loc['deletion','random']-.4)<.04 # of random pixels, half are gone when half are hidden


def test_random_and_centre_are_maps_like_any_other(grey):
    maps = grey.maps
    found = grey.faithfulness(steps=4)
    for who,m in ('random',random_maps(maps, 0)),('centre',centre_maps(maps)):
        alone = grey.replace(maps=m).faithfulness(steps=4)
        for k,v in values(alone).items(): torch.testing.assert_close(v, found.each[f'{k} {who}'])


def test_known_words(grey):
    good,bad = [mapped(grey, m).faithfulness(metrics=['deletion', 'insertion'], fill=0.).words for m in (seen, 1-seen)]
    assert 'Compared with random maps on 5 images, saliency is better by deletion and insertion.' in good
    assert 'saliency is worse by deletion and insertion.' in bad
    one = grey[:1].faithfulness(metrics='deletion').words
    assert 'not clearly better or worse by deletion' in one and 'One image says nothing about others' in one


def small_net(c=2): # whose answers differ from picture to picture
    set_seed(3)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
    net = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, c)))
    with torch.no_grad(): net[1][2].weight.mul_(40)
    return net


def small_learner(dls, **kwargs): return Learner(dls, small_net(kwargs.pop('c', 2)), metrics=accuracy, **kwargs)


@pytest.fixture
def learn(pics): return small_learner(pic_block(get_items=get_image_files, size=32).dataloaders(pics, bs=4, num_workers=0, device='cpu'))


@pytest.fixture
def fine(learn):
    "Maps as large as the pictures, whose values are all different"
    hm = learn.get_heatmaps(cls=[0,1], method='saliency')
    return hm.replace(maps=hm.maps + 1e-3*hm.maps.max()*torch.rand(hm.maps.shape, generator=torch.Generator().manual_seed(0)))


def batch_of(hm): return torch.cat([hm.images.batch(i)[0] for i in range(len(hm))]).as_subclass(Tensor)


def test_deletion_and_insertion_as_rise_defines_them(fine):
    "One picture, class and step at a time, in numpy: pixels in falling order, and the trapezoidal rule over equal steps"
    steps,x = 8,batch_of(fine)
    found = fine.faithfulness(metrics=['deletion', 'insertion'], steps=steps, fill='mean')
    model = fine.learn.model.eval()
    for i in range(len(fine)):
        for j in range(2):
            order = np.argsort(-fine.maps[i,j].flatten().numpy(), kind='stable')
            start,end = x[i].flatten(1).numpy(),np.repeat(x[i].flatten(1).mean(1, keepdim=True).numpy(), len(order), 1)
            for metric,(a,b) in dict(deletion=(start, end), insertion=(end, start)).items():
                probs = []
                for s in range(steps+1):
                    some = order[:s*len(order)//steps]
                    pic = a.copy()
                    pic[:,some] = b[:,some]
                    with torch.no_grad(): y = model(torch.from_numpy(pic).view(1, *x.shape[1:]))
                    probs.append(y.softmax(1)[0,fine.cls[i,j]].item())
                area = (sum(probs) - probs[0]/2 - probs[-1]/2)/steps
                assert abs(found.each[metric][i,j]-area)<1e-4
                np.testing.assert_allclose(found.each[f'{metric} curve'][i,j], probs, atol=1e-4)
    assert found.each['deletion'].std()>.01 # so that this says something


class Given:
    "An extractor for torchcam that gives maps which are there already, scaled as torchcam scales them"
    def __init__(self, model, maps): self.model,self.maps = model.eval(),maps
    def __call__(self, class_idx=None, scores=None, **kwargs):
        m = self.maps - self.maps.amin((1,2), keepdim=True)
        return [m/(m.amax((1,2), keepdim=True)+1e-8)]
    def fuse_cams(self, cams): return cams[0]
    def _hooks_off(self): return nullcontext()


def torchcam_says(cls, hm, maps=None, **kwargs):
    metric = cls(Given(hm.learn.model, hm.maps[:,0] if maps is None else maps), partial(torch.softmax, dim=-1), **kwargs)
    metric.update(batch_of(hm), hm.cls[:,0].tolist())
    return metric.summary()


@pytest.fixture(params=['saliency', 'gradcam'])
def maps_of(request, learn):
    "Of one class: pixels, or a 7×7 map"
    return learn.get_heatmaps(cls=0, method=request.param, relu=False)


def test_torchcams_drop_and_increase(maps_of):
    "They are right, for maps whose values are much larger than 1e-8"
    found = maps_of.faithfulness(metrics=['drop', 'increase'])
    want = torchcam_says(ClassificationMetric, maps_of)
    assert found['value'].to_dict()==pytest.approx(dict(drop=want['avg_drop'], increase=want['conf_increase']), abs=1e-5)
    faint = maps_of.replace(maps=maps_of.maps/maps_of.maps.amax()*1e-9)
    assert faint.faithfulness(metrics='drop').each['drop'].allclose(found.each['drop'], atol=1e-4) # the scale of a map means nothing
    assert abs(torchcam_says(ClassificationMetric, faint, faint.maps[:,0])['avg_drop']-want['avg_drop'])>.1*want['avg_drop'] # but to torchcam it does


def test_torchcams_deletion_and_insertion(fine):
    "They are right where no two pixels have the same value"
    found = fine.faithfulness(metrics=['deletion', 'insertion'], steps=8, fill=0)
    want = torchcam_says(DeletionInsertionMetric, fine, steps=8)
    for m in ('deletion', 'insertion'): assert abs(found.each[m][:,0].mean().item()-want[f'{m}_auc'])<1e-4


def test_torchcam_orders_ties_from_the_top(grey):
    "So a flat map is worth much where the evidence is at the top, and little where it is at the bottom; to us it is random"
    top = torch.zeros(side, side)
    top[:4] = 1
    says = {}
    for name,w in dict(top=top, bottom=top.flip(0)).items():
        grey.learn.model.w.data = w/w.sum()
        flat = torch.zeros(len(grey), side, side)
        metric = DeletionInsertionMetric(Given(grey.learn.model, flat), steps=4)
        metric.update(batch_of(grey), [1]*len(grey))
        says[name] = metric.summary()['deletion_auc'],mapped(grey, torch.zeros(side, side)).faithfulness(metrics='deletion', steps=4)['value'].item()
    assert says['top'][0]==pytest.approx(.1) and says['bottom'][0]==pytest.approx(.7)
    assert says['top'][1]==pytest.approx(.4, abs=.06) and says['bottom'][1]==pytest.approx(.4, abs=.06)


def test_grad_cams_drop_and_increase(maps_of):
    "The increase is right; what it calls drop in confidence is not divided by the probability, as the paper does"
    x,n = batch_of(maps_of),len(maps_of)
    big = F.interpolate(maps_of.maps, x.shape[2:], mode='bilinear')[:,0]
    m = F.interpolate(torch.stack([(o-o.min())/(o.max()-o.min()) for o in maps_of.maps]), x.shape[2:], mode='bilinear')[:,0]
    ask = dict(input_tensor=x, cams=m.numpy(), targets=[ClassifierOutputSoftmaxTarget(0)]*n, model=maps_of.learn.model.eval())
    found = maps_of.faithfulness(metrics=['drop', 'increase'])
    np.testing.assert_allclose(found.each['increase'][:,0], IncreaseInConfidence()(**ask))
    np.testing.assert_allclose(found.each['drop'][:,0]*maps_of.preds[:,0], DropInConfidence()(**ask), atol=1e-5)


@pytest.mark.parametrize('share', [.1, .5, .9])
def test_interpolated_as_grad_cam_does(share):
    "The same equations, set up and solved in another way"
    gen = torch.Generator().manual_seed(0)
    x,m = torch.randn(2, 3, 24, 20, generator=gen),torch.rand(2, 24, 20, generator=gen)
    m[1] = F.interpolate(m[1:,:3,:3][None], (24,20), mode='bilinear')[0,0] # one with a hole of one piece
    hidden = torch.stack([o<o.quantile(share) for o in m])
    want = torch.stack([NoisyLinearImputer(noise=0)(o, (~h).float()) for o,h in zip(x, hidden)])
    torch.testing.assert_close(interpolated(x, hidden), want, atol=1e-5, rtol=1e-5)


def test_interpolated_by_hand():
    "In the middle of a row: the mean of its neighbours, three of which are missing at the border"
    x = tensor([[1.,2.,3.],[4.,5.,6.]])[None,None]
    hidden = torch.zeros(1, 2, 3).bool()
    assert interpolated(x, hidden).equal(x)
    hidden[0,0,1] = True
    want = (1/6*(1+3+5) + 1/12*(4+6)) / (3/6+2/12)
    torch.testing.assert_close(interpolated(x, hidden)[0,0,0,1], tensor(want))
    line = torch.arange(5.).expand(1, 1, 4, 5).clone()
    inside = torch.zeros(1, 4, 5).bool()
    inside[:,1:3,1:4] = True
    torch.testing.assert_close(interpolated(line+100*inside[:,None], inside), line, atol=1e-5, rtol=0) # a slope goes on


def test_road_as_grad_cam_measures_it(fine):
    "It is right where no two values are equal: its percentile says how much is left, and its noise is not seeded"
    x,n,steps = batch_of(fine),len(fine),5
    found = fine.faithfulness(metrics=['road_most', 'road_least'], steps=steps)
    m = torch.stack([(o-o.min())/(o.max()-o.min()) for o in fine.maps[:,0]]).numpy()
    ask = dict(input_tensor=x, cams=m, targets=[ClassifierOutputSoftmaxTarget(0)]*n, model=fine.learn.model.eval(), return_diff=False)
    set_seed(0)
    for metric,cls in dict(road_most=ROADMostRelevantFirst, road_least=ROADLeastRelevantFirst).items():
        want = np.mean([cls(percentile=100*(1-i/steps))(**ask) for i in range(1, steps)], 0)
        np.testing.assert_allclose(found.each[metric][:,0], want, atol=.03)
        got = found.each[f'{metric} curve'][:,0]
        assert got.shape==(n,steps) and torch.allclose(got[:,0], fine.preds[:,0])
    assert found.each['road_most'].std()>.05 # so that .03 is close


def test_grad_cam_hides_all_of_a_map_that_is_mostly_zero():
    "Where more than the wanted part of a map is zero, its threshold is 0 and nothing is below it: all is hidden, and nothing known"
    m = torch.zeros(20, 20)
    m[:5] = torch.linspace(.1, 1, 100).view(5, 20)
    hidden = []
    ROADMostRelevantFirst(50).perturbation.__class__(50, lambda x, mask: hidden.append(mask) or x)(torch.zeros(3, 20, 20), m)
    assert not hidden[0].any()
    assert (pixel_ranks([m], [torch.rand(20, 20)], (20,20))<200).sum()==200


def test_most_and_least_relevant_first(grey):
    "A bright square on a dark ground: hidden, it is gone; and if all else is hidden, it stays"
    img = np.full((side,side,3), 51, np.uint8)
    img[2:10,4:12] = 204
    block = DataBlock((ImageBlock, CategoryBlock(vocab=['no', 'yes'])), get_x=lambda o: PILImage.create(img), get_y=lambda o: 'yes', splitter=lambda o: (range_of(o), range_of(o)))
    learn = Learner(block.dataloaders([0,1], bs=2, num_workers=0, device='cpu'), SeenPixels(), loss_func=nn.NLLLoss())
    hm = learn.get_heatmaps(cls='yes', method='saliency')
    found = hm.faithfulness(metrics=['road_most', 'road_least'], steps=4)
    most,least = [found.each[f'road_{o} curve'][0,0] for o in ('most', 'least')]
    assert most[0]==pytest.approx(.8) and most[1]==pytest.approx(.2, abs=.01) # by pixels that are all .2
    assert least==pytest.approx(.8, abs=.01)
    assert found.each['road_least'][0,0]==pytest.approx(least[1:].mean())


def same(a, b, **kwargs):
    assert a.each.keys()==b.each.keys()
    for k in a.each: torch.testing.assert_close(a.each[k], b.each[k], equal_nan=True, **kwargs)


every = list(faithfulness_metrics)


@pytest.mark.slow
def test_batches_do_not_matter(learn):
    hm = learn.get_heatmaps(cls=['Red', 'Blue_ish'])
    found = hm.faithfulness(metrics=every, steps=3, bs=1)
    same(found, hm.faithfulness(metrics=every, steps=3, bs=3), atol=1e-4, rtol=1e-4)
    same(found, hm.faithfulness(metrics=every, steps=3), atol=1e-4, rtol=1e-4)
    assert found.each['deletion'].shape==(len(hm),2) and found.each['insertion curve'].shape==(len(hm),2,4)


def test_seed(learn):
    hm = learn.get_heatmaps(cls='Red')
    a,b,c = [hm.faithfulness(metrics=['deletion', 'road_most'], steps=3, seed=s) for s in (0, 0, 1)]
    same(a, b, atol=0, rtol=0)
    assert not a.each['deletion random'].allclose(c.each['deletion random'], atol=1e-7, rtol=0)
    assert not a.each['road_most'].equal(c.each['road_most'])


def test_a_part_of_the_images(learn):
    hm = learn.get_heatmaps(cls='Red')
    found = hm.faithfulness(metrics=['deletion', 'drop'], steps=3)
    some = hm[[4,1]].faithfulness(metrics=['deletion', 'drop'], steps=3)
    torch.testing.assert_close(some.each['drop'], found.each['drop'][[4,1]], atol=1e-5, rtol=1e-4)
    half = hm.replace(maps=hm.maps.half()).faithfulness(metrics='drop')
    torch.testing.assert_close(half.each['drop'], found.each['drop'], atol=1e-3, rtol=1e-2)


def test_no_trace(learn):
    hm = learn.get_heatmaps()
    learn.model.train()
    state,cbs,rng = deepcopy(learn.model.state_dict()),list(learn.cbs),torch.get_rng_state()
    hm.faithfulness(metrics=every, steps=2).plot()
    with pytest.raises(ValueError): hm.faithfulness(fill='nothing')
    assert learn.model.training and list(learn.cbs)==cbs and torch.get_rng_state().equal(rng)
    assert all(a.equal(b) for a,b in zip(state.values(), learn.model.state_dict().values()))
    assert all(p.grad is None for p in learn.model.parameters()) and not any(m._forward_hooks for m in learn.model.modules())


def counted(learn, f):
    "How many images the model sees while `f` runs"
    seen = []
    handle = learn.model.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    res = f()
    handle.remove()
    return res,seen


def test_as_few_passes_as_can_be(learn):
    "For each image: itself, all hidden, all blurred; and for each map and class 9 steps twice and one for the rest"
    hm = learn.get_heatmaps(cls=['Red', 'Blue_ish'])
    _,seen = counted(learn, hm.faithfulness)
    assert sum(seen)==len(hm)*(1+2+3*2*19) and max(seen)<=learn.dls.bs
    _,seen = counted(learn, partial(hm.faithfulness, fill=0.))
    assert sum(seen)==len(hm)*(1+1+3*2*19)
    _,seen = counted(learn, partial(hm.faithfulness, metrics=['increase', 'gain'], bs=5))
    assert sum(seen)==len(hm)*(1+3*2) and max(seen)==5


def test_several_methods_share_random_and_centre(learn):
    run = shadow(learn)
    hms = explain_by(run, to_images(run.dls), [get_method(m) for m in ('gradcam', 'activations', 'saliency')], cls='Red')
    res,seen = counted(learn, partial(measure_faithfulness, run, hms, ['deletion'], 4))
    assert sum(seen)==len(hms[0])*(1+1+3*(3+2+2)) # two sizes of maps, each with its own
    for hm,(values,probs) in zip(hms, res):
        found = hm.faithfulness(learn, metrics='deletion', steps=4)
        for who,k in dict(map='deletion', random='deletion random', centre='deletion centre').items():
            torch.testing.assert_close(values['deletion'][who], found.each[k])
        torch.testing.assert_close(probs['deletion']['map'], found.each['deletion curve'])
    assert res[0][0]['deletion']['random'] is res[1][0]['deletion']['random']


def test_maps_that_are_not_finite_are_left_out(grey):
    maps = seen.expand(5, 1, -1, -1).clone()
    maps[1,0,3,3] = np.nan
    maps[2,0,0,0] = np.inf
    found = grey.replace(maps=maps).faithfulness(steps=4, fill=0)
    assert found.each['deletion'].isnan().flatten().tolist()==[False, True, True, False, False]==found.each['increase'].isnan().flatten().tolist()
    assert found['value'].to_dict()==pytest.approx(dict(deletion=.1, insertion=.7, drop=0, increase=0, gain=0), abs=1e-5)
    assert not found.each['deletion random'].isnan().any()


def test_nothing_to_drop_or_gain():
    p = tensor([[[0.]],[[.5]]])
    assert metric_values('drop', p, tensor([[0.],[1.]])).flatten().tolist()==pytest.approx([np.nan, .5], nan_ok=True)
    assert metric_values('gain', p, tensor([[0.],[1.]])).flatten().tolist()==pytest.approx([0, np.nan], nan_ok=True)


def test_multi_label(pics):
    block = DataBlock((ImageBlock, MultiCategoryBlock(vocab=['Red', 'Blue_ish', 'x'])), get_items=get_image_files, get_y=lambda o: [label(o)], item_tfms=Resize(32),
                      splitter=IndexSplitter(range(6)))
    dls = block.dataloaders(pics, bs=4, num_workers=0, device='cpu')
    learn = small_learner(dls, c=3, loss_func=BCEWithLogitsLossFlat())
    hm = learn.get_heatmaps(cls=['Red', 'x'])
    found = hm.faithfulness(steps=3)
    x = torch.zeros_like(batch_of(hm)) # all is hidden
    with torch.no_grad(): p = learn.model.eval()(x).sigmoid()[:,[dls.vocab.o2i[o] for o in ('Red', 'x')]] # each class by itself
    torch.testing.assert_close(found.each['deletion curve'][...,-1], p, atol=1e-4, rtol=1e-4)


def test_one_logit(learn):
    learn.model,learn.loss_func = small_net(1),BCEWithLogitsLossFlat()
    hm = learn.get_heatmaps(cls=[0,1])
    found = hm.faithfulness(steps=3, metrics='deletion')
    curves = found.each['deletion curve']
    torch.testing.assert_close(curves[...,-1].sum(1), torch.ones(len(hm)))
    x = torch.zeros_like(batch_of(hm)) # all is hidden
    with torch.no_grad(): torch.testing.assert_close(curves[:,1,-1], learn.model.eval()(x).sigmoid()[:,0], atol=1e-4, rtol=1e-4)


def test_segmentation_measures_the_share_of_the_pixels():
    class PerPixel(SeenPixels):
        def forward(self, x): return torch.stack([.5-x[:,0], x[:,0]-.5], 1) # bright pixels are of the second class
    img = np.zeros((side,side,3), np.uint8)
    img[2:10,4:12] = 255
    mask = (img[...,0]>0).astype(np.uint8)
    block = DataBlock((ImageBlock, MaskBlock(['dark', 'bright'])), get_x=lambda o: PILImage.create(img), get_y=lambda o: PILMask.create(mask),
                      splitter=lambda o: (range_of(o), range_of(o)))
    learn = Learner(block.dataloaders([0,1], bs=2, num_workers=0, device='cpu'), PerPixel(), loss_func=CrossEntropyLossFlat(axis=1))
    found = learn.get_heatmaps(cls='bright', method='saliency').faithfulness(metrics='deletion', steps=4)
    torch.testing.assert_close(found.each['deletion curve'][0,0], tensor([.25, 0, 0, 0, 0])) # the map marks the pixels of the class itself


def test_numbers_have_no_probabilities(pics):
    block = DataBlock((ImageBlock, RegressionBlock), get_items=get_image_files, get_y=lambda o: float(len(o.name)), item_tfms=Resize(32), splitter=IndexSplitter(range(6)))
    learn = small_learner(block.dataloaders(pics, bs=4, num_workers=0, device='cpu'), c=1, loss_func=MSELossFlat())
    with pytest.raises(ValueError, match='needs classes') as e: learn.get_heatmaps().faithfulness()
    assert '\n' not in str(e.value)


def test_raw_outputs_are_no_probabilities(learn):
    learn.loss_func = lambda pred, targ: F.cross_entropy(pred, targ)
    with pytest.raises(ValueError, match='turns outputs into probabilities'): learn.get_heatmaps().faithfulness()


def test_several_inputs(pics):
    "The one that is explained is changed, and the others stay"
    block = DataBlock((ImageBlock, ImageBlock, CategoryBlock), getters=[noop, noop, label], n_inp=2, splitter=IndexSplitter(range(6)), item_tfms=Resize(32))
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()
        def forward(self, a, b): return self.net(a) + 3*self.net(b)
    learn = Learner(block.dataloaders(get_image_files(pics), bs=4, num_workers=0, device='cpu'), Both(), loss_func=CrossEntropyLossFlat())
    hm = learn.get_heatmaps(cls=0, input=1, method='saliency')
    found = hm.faithfulness(steps=2, metrics='deletion')
    x = torch.cat([hm.images.batch(i)[0] for i in range(len(hm))]).as_subclass(Tensor)
    with torch.no_grad(): y = learn.model.eval()(x, 0*x).softmax(1)[:,0]
    torch.testing.assert_close(found.each['deletion curve'][:,0,-1], y, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('kwargs,says', [
    (dict(metrics='road'), "metrics are ['road']; expected some of deletion, insertion"), (dict(metrics=[]), 'expected some of deletion'),
    (dict(steps=1), 'steps is 1; expected a whole number, at least 2'), (dict(steps=2.5), 'steps is 2.5'),
    (dict(bs=0), 'bs is 0'), (dict(fill='grey'), "fill is 'grey'; expected a number, 'mean', 'blur'")])
def test_errors(learn, kwargs, says):
    with pytest.raises(ValueError) as e: learn.get_heatmaps().faithfulness(**kwargs)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_the_learner_must_be_known_and_the_same(learn, tmp_path):
    hm = learn.get_heatmaps(out=tmp_path/'maps')
    want = hm.faithfulness(metrics='drop')
    loaded = load_heatmaps(tmp_path/'maps', learn.dls.valid)
    with pytest.raises(ValueError, match=r'is not known or gone: pass it, hm.faithfulness\(learn\)'): loaded.faithfulness()
    same(loaded.faithfulness(learn, metrics='drop'), want, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='loaded without their images'): load_heatmaps(tmp_path/'maps').faithfulness(learn)
    with pytest.raises(ValueError, match='no heatmaps to measure'): hm[:0].faithfulness()
    with torch.no_grad(): learn.model[1][2].weight.mul_(-3)
    with pytest.raises(ValueError, match='no longer says what it said when these heatmaps were made') as e: hm.faithfulness(metrics='drop')
    assert '\n' not in str(e.value) and 'made with tta=True' in str(e.value)


def test_fill_is_in_the_table(learn):
    hm = learn.get_heatmaps()
    assert list(hm.faithfulness(metrics=every, steps=2)['fill'])==['0', 'blur', '0', '0', '0', 'neighbours', 'neighbours']
    for fill,name in ('mean','mean'),(.5,'0.5'),(torch.ones(3, 1, 1),'a tensor'):
        assert list(hm.faithfulness(metrics=['deletion', 'road_most'], steps=2, fill=fill)['fill'])==[name, 'neighbours']


@pytest.mark.slow
def test_what_is_drawn(fine):
    found = fine.faithfulness(metrics=every, steps=4)
    axs = found.plot(i=1, j=1)
    titles = [ax.get_title() for ax in axs]
    assert len(axs)==4+4*5
    assert titles[:4]==['deletion', 'insertion', 'road_most', 'road_least']
    line,rand,centre = axs[0].lines
    np.testing.assert_allclose(line.get_ydata(), found.each['deletion curve'].mean((0,1)), rtol=1e-5)
    np.testing.assert_allclose(line.get_xdata(), np.arange(5)/4)
    assert list(axs[2].lines[0].get_xdata())==[0, .25, .5, .75]
    p = found.each['deletion curve'][1,1]
    assert titles[4:9]==[f'{i*25}%: {short(o.item())}' for i,o in enumerate(p)]
    shown = axs[5].images[0].get_array() # a quarter of the pixels is black
    first = (pixel_ranks([fine.maps[1,1]], [fine.maps[1,1]], shown.shape[:2])[0]<shown.shape[0]*shown.shape[1]/4).numpy()
    assert (shown[first]==0).all()
    np.testing.assert_allclose(shown[~first], fine.image(1).permute(1, 2, 0).numpy()[~first], atol=1e-2)
    only = fine.faithfulness(metrics='gain').plot()
    assert [t.split(':')[0] for t in [ax.get_title() for ax in only] if t]==['map', 'random', 'centre']


def test_findings_can_be_pickled_and_drawn(learn):
    found = learn.get_heatmaps().faithfulness(metrics=['deletion', 'drop'], steps=2)
    again = pickle.loads(pickle.dumps(found))
    same(found, again)
    assert len(again.plot())==len(found.plot()) and again.words==found.words


def test_a_plain_dataloader(learn):
    "Which cannot make other batches"
    items = [(learn.dls.valid.dataset[i][0].resize((32,32)), 0) for i in range(3)]
    dl = torch.utils.data.DataLoader([(image2tensor(im).float()/255, y) for im,y in items], batch_size=2)
    found,seen = counted(learn, partial(learn.get_heatmaps(dl=dl).faithfulness, metrics='deletion', steps=2))
    assert len(found.plot())==4 and max(seen)==2

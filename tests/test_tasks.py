"Every task a fastai user has, from DataBlock to title: the maps are those of a plain backward pass, the numbers those of `get_preds`."
import pytest
from copy import copy, deepcopy
from types import SimpleNamespace
from shared import *


def nr(o): return int(Path(o).stem.rsplit('_', 1)[1])
def tags(o): return [label(o)] + ['big']*(nr(o)%3==0) + ['odd']*(nr(o)%2)*(nr(o)>3)
def no_tags(o): return tags(o) if nr(o) else []
def one_number(o): return nr(o)/2
def three_numbers(o): return [nr(o)/2, 1., -nr(o)]
def two_points(o): return [[nr(o)+10., 20.], [30., nr(o)+2.]]
def mask(o):
    w,h = Image.open(o).size
    res = np.zeros((h,w), dtype=np.uint8)
    res[10:40,15:45] = 1+nr(o)%2
    return res
def on_off(o): return (mask(o)>0).astype(np.uint8)
def sorted_files(path): return get_image_files(path).sorted(nr)
def meta(o): return [nr(o)/6-1, 1.]
def other_image(o): return Path(o).parent/f'Red_{nr(o)//2*2}.png'


def task_dls(pics, *blocks, bs=4, **kwargs):
    set_seed(7)
    block = DataBlock((ImageBlock, *blocks), get_items=sorted_files, splitter=IndexSplitter(range(6)), item_tfms=Resize(64), **kwargs)
    return block.dataloaders(pics, bs=bs, num_workers=0, device='cpu')


def task_learner(pics, block, get_y, **kwargs):
    return vision_learner(task_dls(pics, block, get_y=get_y), narrow18, pretrained=False, normalize=False, **kwargs)


def valid(learn, k=0): return torch.cat([b[k] for b in learn.dls.valid]).as_subclass(Tensor)


def by_hand(model, layer, y, *xb):
    "Grad-CAM of the numbers `y(output)`, one an image, by a plain backward pass through the whole model"
    kept = []
    def keep(m, i, o):
        kept.append(o)
        return o.clone() # what follows may work in place
    h = layer.register_forward_hook(keep)
    with torch.enable_grad(): out = y(model.eval()(*xb))
    h.remove()
    g, = torch.autograd.grad(out.sum(), kept[-1])
    return (g.mean((2,3), keepdim=True)*kept[-1]).sum(1).detach().as_subclass(Tensor)


def same(a, b, rtol=1e-3): torch.testing.assert_close(a, b.as_subclass(Tensor), rtol=rtol, atol=.01*rtol*float(b.abs().max()))


def explained(learn, hm, j, y, layer=None):
    "Map `j` of each image is the Grad-CAM of `y(output)`, and nothing keeps a graph alive"
    want = by_hand(learn.model, layer or learn.model[0], y, valid(learn))
    assert want.abs().max()>0
    same(hm.maps[:,j], want)
    assert not hm.maps.requires_grad and not hm.preds.requires_grad


def predicted(learn, **kwargs):
    with learn.no_bar(): return [o.as_subclass(Tensor) for o in learn.get_preds(**kwargs)]


def text(ax): return ' '.join(ax.get_title().split())


def drawn(hm, i=0):
    "The titles of the picture of image `i`, but for how much stronger a map is shown; it and the grid are really drawn"
    axs = np.atleast_1d(hm.show(i))
    axs[0].figure.canvas.draw()
    for ax in axs: assert len(ax.images)==2 and np.isfinite(ax.images[1].get_array()).all()
    hm[:2].plot().flat[0].figure.canvas.draw()
    return [re.sub(r' \(shown [\d.]+× stronger\)', '', text(ax)) for ax in axs]


def one_line(f, *words):
    with pytest.raises(ValueError) as e: f()
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value


def test_single_label(pics):
    learn = pic_learner(pics)
    hm,(preds,targs) = learn.get_heatmaps(cls=['Red','Blue_ish'], relu=False),predicted(learn)
    same(hm.preds, preds)
    assert hm.task=='class' and hm.targs.tolist()==targs.tolist()
    explained(learn, hm, 0, lambda o: o[:,1])
    explained(learn, hm, 1, lambda o: o[:,0])
    for i,(p,t) in enumerate(zip(preds, targs)):
        right = (p.argmax()==t).item()
        line = f"{learn.dls.vocab[p.argmax()]} {p.max():.2f} {'✓' if right else '✗'} truth: {learn.dls.vocab[t]}"
        assert line in drawn(hm, i) if i<1 else ' '.join(' '.join(hm.title(i, 1-int(p.argmax()))[0]).split())==line
        assert hm.title(i, 1-int(p.argmax()))[1]==('green' if right else 'red')


@pytest.mark.slow
@pytest.mark.parametrize('get_y', [tags, no_tags])
def test_multi_label(pics, get_y):
    learn = task_learner(pics, MultiCategoryBlock, get_y)
    vocab = list(learn.dls.vocab)
    hm,(preds,targs) = learn.get_heatmaps(cls=vocab, relu=False),predicted(learn)
    same(hm.preds, preds)
    assert hm.task=='classes' and hm.targs.shape==(6,4) and torch.equal(hm.targs, targs) and len(targs.unique(dim=0))>2
    for j in range(4): explained(learn, hm, j, lambda o: o[:,j])
    same(learn.get_heatmaps(cls='ODD', relu=False).maps, hm.maps[:,[vocab.index('odd')]])
    for i,f in enumerate(hm.items):
        truth = ', '.join(o for o in vocab if o in get_y(f)) or 'none'
        for j,c in enumerate(vocab):
            right = (preds[i,j]>.5).item() == (c in get_y(f))
            lines,color = hm.title(i, j)
            assert lines[:2]==[f"{c} {preds[i,j]:.2f}\xa0{'✓' if right else '✗'}", f'truth: {truth}'] and color==('green' if right else 'red')
        if i<1: assert drawn(hm, i)==[' '.join(' '.join(hm.title(i, j)[0]).split()) for j in range(4)]
        assert text(hm[i].plot().flat[0])==truth
    top = learn.get_heatmaps(topk=2)
    assert top.cls.tolist()==preds.topk(2).indices.tolist()
    one_line(lambda: learn.get_heatmaps(cls='targ'), 'one true class')
    one_line(lambda: learn.show_gradcam(learn.dls.valid_ds[0], cls='targ'), 'true class')
    assert text(learn.show_gradcam(hm.items[0], 'big'))==f"big {preds[0,vocab.index('big')]:.2f}"


def test_multi_label_with_a_threshold_of_the_loss(pics):
    "Whether a class is predicted is what `learn.predict` says, not always .5"
    learn = task_learner(pics, MultiCategoryBlock, tags, loss_func=BCEWithLogitsLossFlat(thresh=.4))
    hm,f = learn.get_heatmaps(cls=list(learn.dls.vocab)),sorted_files(pics)[0]
    with learn.no_bar(): said,on,probs = learn.predict(f)
    assert ((probs>.4)!=(probs>.5)).any(), 'the threshold makes no difference here'
    for j in range(4): assert ('✓' in hm.title(0, j)[0][0]) == (bool(on[j])==bool(hm.targs[0,j]))


def test_two_labels_of_which_both_may_be_true(pics):
    learn = task_learner(pics, MultiCategoryBlock, label_or_both)
    hm = learn.get_heatmaps(cls=[0,1], relu=False)
    assert hm.task=='classes' and hm.truth(0)=='Blue_ish, Red' and hm.truth(1)=='Blue_ish'
    for j in range(2): explained(learn, hm, j, lambda o: o[:,j])
    same(hm.preds, predicted(learn)[0])


def label_or_both(o): return [label(o)] if nr(o) else ['Red', 'Blue_ish']


def test_one_logit_for_two_classes(pics):
    "It speaks for the second class of the vocab"
    learn = task_learner(pics, CategoryBlock, label, n_out=1, loss_func=BCEWithLogitsLossFlat())
    hm,(preds,targs) = learn.get_heatmaps(cls=['Red','Blue_ish'], relu=False),predicted(learn)
    explained(learn, hm, 0, lambda o: o[:,0])
    explained(learn, hm, 1, lambda o: -o[:,0])
    same(hm.preds, torch.stack([1-preds.flatten(), preds.flatten()], 1))
    assert hm.task=='class' and hm.targs.tolist()==targs.tolist()
    p = int(preds[0]>.5)
    assert f"{['Blue_ish','Red'][p]} {hm.preds[0,p]:.2f} {'✓' if p==targs[0] else '✗'} truth: {['Blue_ish','Red'][targs[0]]}"==drawn(hm)[1-p]
    assert learn.get_heatmaps().cls.flatten().tolist()==(preds>.5).long().flatten().tolist()


def nll(p, t): return F.nll_loss(p.log(), t)


@pytest.mark.parametrize('act,block,get_y,loss', [(nn.Softmax(1), CategoryBlock, label, nll), (nn.Sigmoid(), MultiCategoryBlock, tags, nn.BCELoss())])
def test_a_model_that_already_ends_in_an_activation(pics, act, block, get_y, loss):
    "Explained as it is, without a second activation; it warns when the answer is all but certain, as then there are no gradients"
    learn = task_learner(pics, block, get_y, loss_func=loss)
    learn.model[1].append(act)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        hm = learn.get_heatmaps(cls=[0,1], relu=False)
    same(hm.preds, learn.model.eval()(valid(learn)).detach())
    for j in range(2): explained(learn, hm, j, lambda o: o[:,j])
    assert drawn(hm)[0].startswith(f'{learn.dls.vocab[0]} {hm.preds[0,0]:.2f}')
    with torch.no_grad(): learn.model[1][-2].weight *= 1000
    with pytest.warns(UserWarning, match='saturated'): assert learn.get_heatmaps(relu=False).maps.isfinite().all()
    with pytest.warns(UserWarning, match='saturated'): learn.get_heatmaps(method='saliency')
    with warnings.catch_warnings(): # these ask for no gradient
        warnings.simplefilter('error')
        for method,options in (('occlusion', dict(window=32, stride=32)), ('eigencam', {})): learn.get_heatmaps(method=method, **options)


def test_a_small_number_is_no_probability(pics):
    "A regression may say .0004: nothing is saturated there"
    learn = task_learner(pics, RegressionBlock(n_out=1), lambda o: 1., loss_func=MSELossFlat())
    with torch.no_grad():
        learn.model[1][-1].weight *= 0
        learn.model[1][-1].bias = nn.Parameter(tensor([.0004]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert learn.get_heatmaps().preds.max()<.001


def test_the_logit_behind_a_sigmoid():
    "`score=torch.logit` gives the maps of the model without its sigmoid; those of the probability are p(1-p) times as strong"
    torch.manual_seed(0)
    raw,x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 6)),torch.randn(2, 3, 8, 8)
    raw[-1].bias.data.fill_(8.) # nearly certain
    model = nn.Sequential(*raw, nn.Sigmoid())
    maps,z = model_heatmaps(raw, x, layer='1', relu=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        logits,_ = model_heatmaps(model, x, layer='1', relu=False, score=torch.logit)
    with pytest.warns(UserWarning, match='saturated'): probs,p = model_heatmaps(model, x, layer='1', relu=False)
    assert p.min()>.999
    same(logits, maps)
    same(probs, maps*(z.sigmoid()*(1-z.sigmoid()))[...,None,None])


@pytest.mark.filterwarnings('ignore:Using a target size') # the losses that are no fastai losses, of (n, 1) and (n,)
@pytest.mark.parametrize('kwargs', [{}, dict(y_range=(0,6)), dict(loss_func=L1LossFlat()), dict(loss_func=F.smooth_l1_loss), dict(loss_func=nn.HuberLoss())],
                         ids=['mse', 'y_range', 'l1', 'function', 'huber'])
def test_regression(pics, kwargs):
    learn = task_learner(pics, RegressionBlock(n_out=1), one_number, n_out=1, **kwargs)
    hm = learn.get_heatmaps(relu=False)
    explained(learn, hm, 0, lambda o: o[:,0])
    same(hm.preds, learn.model.eval()(valid(learn)).detach())
    assert hm.task=='numbers' and hm.targs.tolist()==[one_number(f) for f in hm.items]
    for i in range(6): assert hm.title(i)==([f'0: {float(hm.preds[i]):.3g}', f'truth: {one_number(hm.items[i]):.3g}'], 'black')
    assert drawn(hm, 3)==[f'0: {float(hm.preds[3]):.3g} truth: {one_number(hm.items[3]):.3g}']
    assert text(hm[2].plot().flat[0])==f'{one_number(hm.items[2]):.3g}'
    one_line(lambda: learn.get_heatmaps(cls=1), 'no class 1')
    one_line(lambda: learn.get_heatmaps(cls='targ'), 'one true class') # a number is none
    assert text(learn.show_gradcam(learn.dls.valid_ds[0])).startswith(f'0: {float(hm.preds[0]):.3g}')


def test_regression_of_several_numbers(pics):
    "`cls` is the index of an output, and each output has its own map and its own truth"
    learn = task_learner(pics, RegressionBlock(n_out=3), three_numbers)
    hm,(preds,targs) = learn.get_heatmaps(cls=[2,0], relu=False),predicted(learn)
    explained(learn, hm, 0, lambda o: o[:,2])
    explained(learn, hm, 1, lambda o: o[:,0])
    same(hm.preds, preds)
    same(hm.targs, targs)
    for i,f in enumerate(hm.items):
        for j,c in enumerate([2,0]): assert hm.title(i, j)[0]==[f'{c}: {preds[i,c]:.3g}', f'truth: {three_numbers(f)[c]:.3g}']
    assert drawn(hm, 1)==[' '.join(hm.title(1, j)[0]) for j in range(2)]
    assert text(hm[1].plot().flat[0])==', '.join(f'{o:.3g}' for o in three_numbers(hm.items[1]))


@pytest.mark.filterwarnings('ignore:load_learner')
def test_points(pics, tmp_path):
    learn = task_learner(pics, PointBlock, two_points)
    hm,(preds,targs) = learn.get_heatmaps(cls=['x of point 0', 'y of point 1'], relu=False),predicted(learn)
    assert hm.cls[0].tolist()==[0,3]
    for j,c in enumerate([0,3]): explained(learn, hm, j, lambda o: o[:,c])
    same(hm.preds, preds)
    same(hm.targs, targs.flatten(1))
    for i in range(6):
        for j,(c,name) in enumerate([(0,'x of point 0'), (3,'y of point 1')]):
            assert hm.title(i, j)[0]==[f'{name}: {preds[i,c]:.3g}', f'truth: {targs[i].flatten()[c]:.3g}']
    assert drawn(hm, 1)==[' '.join(hm.title(1, j)[0]) for j in range(2)]
    one_line(lambda: learn.get_heatmaps(cls='z of point 0'), "no class 'z of point 0'", "'x of point 0'")
    learn.path = tmp_path
    learn.export()
    same(load_learner(tmp_path/'export.pkl').get_heatmaps(hm.items[0], cls='y of point 1', relu=False).maps[0,0], hm.maps[0,1])


codes = ['sky', 'red thing', 'blue thing']


@pytest.fixture(scope='module')
def seg(pics):
    "A U-Net that finds red and blue things everywhere, and never the sky"
    learn = unet_learner(task_dls(pics, MaskBlock(codes), get_y=mask), narrow18, pretrained=False, normalize=False)
    with torch.no_grad():
        out = learn.model.eval()(valid(learn)).as_subclass(Tensor)
        learn.model.layers[-2][0].bias += tensor([-100., (out[:,2]-out[:,1]).median(), 0.])
    return learn


def over_predicted(c, signed=False):
    "Of each image, the mean logit of class `c` over the pixels that are predicted as it, pixel by pixel; nothing if there are none"
    def f(out):
        out = torch.cat([-out, out], 1) if signed else out
        return torch.stack([o[c][o.max(0).indices==c].mean() if (o.max(0).indices==c).any() else 0*o.sum() for o in out.as_subclass(Tensor)])
    return f


def last_features(model, x):
    "The last to run of the layers whose output has other channels than the answer"
    outs = []
    hooks = [m.register_forward_hook(lambda m, i, o: outs.append((m, o.shape[1]))) for m in model.modules()]
    with torch.no_grad(): c = model.eval()(x).shape[1]
    for h in hooks: h.remove()
    return [m for m,n in outs if n!=c][-1]


@pytest.mark.slow
def test_segmentation(seg):
    x = valid(seg)
    hm,pixels = seg.get_heatmaps(cls=codes, relu=False),predicted(seg)[0].argmax(1)
    layer = last_features(seg.model, x)
    assert default_layer(seg.model, x) is layer and hm.task=='pixels'
    same(hm.preds, torch.stack([(pixels==c).float().mean((1,2)) for c in range(3)], 1))
    assert (hm.preds[:,1:]>0).all() and (hm.preds[:,0]==0).all()
    for j in (1,2): explained(seg, hm, j, over_predicted(j), layer)
    assert not hm.maps[:,0].any()
    titles = drawn(hm)
    assert titles[1].startswith(f'red thing {hm.preds[0,1]:.0%} of the pixels') and 'flat' in titles[0] and 'flat' not in titles[1]+titles[2]
    one = seg.get_heatmaps(cls='Blue thing', relu=False)
    same(one.maps[:,0], hm.maps[:,2])
    assert seg.get_heatmaps().cls.flatten().tolist()==hm.preds.argmax(1).tolist()
    single = seg.get_heatmaps(hm.items[2], cls='red thing', relu=False)
    same(single.maps[0], hm.maps[2,[1]], rtol=.05) # a pixel on the edge may fall to the other side in a batch of one
    one_line(lambda: seg.get_heatmaps(cls='green thing'), "no class 'green thing'", "'red thing'")
    one_line(lambda: seg.get_heatmaps(cls='targ'), 'one true class')


@pytest.mark.filterwarnings('ignore:load_learner')
def test_segmentation_with_an_exported_learner(seg, tmp_path):
    new,f = copy(seg),seg.dls.valid_ds.items[1]
    new.path = tmp_path
    new.export()
    hm = load_learner(tmp_path/'export.pkl').get_heatmaps(f, cls='red thing', relu=False)
    same(hm.maps[0], seg.get_heatmaps(f, cls=1, relu=False).maps[0])
    assert hm.title(0)[0][0].startswith('red thing ')


@pytest.mark.slow
@pytest.mark.parametrize('layer', ['layers.0.5', 'layers.0.5.0.conv1', 'layers.3', 'layers.6', 'layers.11'])
def test_segmentation_of_an_inner_layer(seg, layer):
    "The first one is what a skip connection carries, too: its gradient comes over both ways"
    x = valid(seg)[:2]
    maps,scores = model_heatmaps(seg.model, x, cls=[1,2], layer=layer, relu=False)
    for j,c in enumerate((1,2)): same(maps[:,j], by_hand(seg.model, seg.model.get_submodule(layer), over_predicted(c), x))
    with torch.no_grad(): same(scores, torch.stack([over_predicted(c)(seg.model.eval()(x)) for c in range(3)], 1))


@pytest.mark.slow
def test_ablation_in_a_segmentation(seg):
    "Without a channel, in all the places where the model uses it, what is left of the logit of the same pixels?"
    x,layer = valid(seg)[:1,:,::2,::2].contiguous(),seg.model.layers[0][2]
    with torch.no_grad():
        out,acts,drops = seg.model.eval()(x).as_subclass(Tensor)[0],None,[]
        on = out.argmax(0)==1
        assert on.any() and not on.all()
        def without(m, i, o):
            nonlocal acts
            acts,o = o,o.clone()
            o[:,k] = 0
            return o
        h = layer.register_forward_hook(without, prepend=True)
        for k in range(64): drops.append((out[1][on].mean()-seg.model(x).as_subclass(Tensor)[0,1][on].mean())/out[1][on].mean().abs())
        h.remove()
    got = model_heatmaps(seg.model, x, cls=1, layer='layers.0.2', method='ablationcam', relu=False, bs=8)[0]
    same(got[0,0], (torch.stack(drops)[:,None,None]*acts[0]).sum(0))


def test_a_unet_keeps_no_graph(seg):
    "What its skip connections keep from a run is without a graph afterwards, so that the model can be copied"
    with torch.no_grad(): seg.model.eval()(valid(seg)[:1])
    deepcopy(seg.model)
    for kwargs in (dict(), dict(layer='layers.0.4'), dict(method='saliency'), dict(method='occlusion', window=32, stride=32)):
        seg.get_heatmaps(seg.dls.valid_ds.items[0], **kwargs)
        deepcopy(seg.model)


@pytest.mark.slow
def test_occlusion_asks_about_the_same_pixels(seg):
    "Those that were predicted as the class before anything was hidden"
    x = valid(seg)
    hm = seg.get_heatmaps(cls='red thing', method='occlusion', window=32, stride=32, relu=False)
    with torch.no_grad():
        out = seg.model.eval()(x).as_subclass(Tensor)
        on,moved = out.argmax(1)==1,False
        for i in range(len(x)):
            for top in (0,32):
                for left in (0,32):
                    x2 = x[i:i+1].clone()
                    x2[...,top:top+32,left:left+32] = 0
                    out2 = seg.model(x2)[0].as_subclass(Tensor)
                    drop = out[i,1][on[i]].mean() - out2[1][on[i]].mean()
                    got = hm.maps[i,0,top:top+32,left:left+32]
                    torch.testing.assert_close(got, drop.expand_as(got), rtol=1e-3, atol=1e-5)
                    moved |= abs(out[i,1][on[i]].mean()-out2[1][out2.argmax(0)==1].mean()-drop)>1e-3
    assert moved, 'the predicted pixels never change, so nothing is proved'


@pytest.mark.slow
def test_segmentation_in_a_mask(seg):
    "The class's logits, averaged over pixels of one's own choice, whatever is predicted there"
    m = np.zeros((64,64), dtype=bool)
    m[8:20,30:60] = True
    layer = last_features(seg.model, valid(seg))
    hm = seg.get_heatmaps(cls=['sky','blue thing'], score=in_mask(m), relu=False)
    for j,c in enumerate((0,2)): explained(seg, hm, j, lambda o: o[:,c][:,torch.tensor(m)].mean(1), layer)
    for o in (torch.tensor(m), m.astype(int), m.tolist()): same(seg.get_heatmaps(hm.items[0], cls=2, score=in_mask(o), relu=False).maps[0,0], hm.maps[0,1])
    with torch.no_grad(): same(hm.preds, seg.model.eval()(valid(seg)).as_subclass(Tensor)[:,:,torch.tensor(m)].mean(2))
    assert text(hm.show()[0]).startswith('sky')
    got = seg.get_heatmaps(cls='blue thing', score=in_mask(m), method='occlusion', window=64, relu=False).maps
    with torch.no_grad(): black = seg.model(torch.zeros(1,3,64,64)).as_subclass(Tensor)[0,2][torch.tensor(m)].mean()
    same(got[:,0,0,0], hm.preds[:,2]-black)
    one_line(lambda: seg.get_heatmaps(score=in_mask(m[:32])), '(32, 64)', 'same height and width')
    one_line(lambda: in_mask(np.zeros((64,64))), 'at least one')


@pytest.mark.slow
def test_segmentation_with_one_channel(pics):
    "Its logit speaks for the second code, and with a minus for the first"
    dls = task_dls(pics, MaskBlock(['nothing','thing']), get_y=on_off)
    learn = unet_learner(dls, resnet18, pretrained=False, normalize=False, n_out=1, loss_func=BCEWithLogitsLossFlat(axis=1))
    hm,p = learn.get_heatmaps(cls=['nothing','thing'], relu=False),predicted(learn)[0]
    share = (p>.5).float().mean((1,2,3))
    assert (share>0).all() and (share<1).all()
    same(hm.preds, torch.stack([1-share, share], 1))
    for j in range(2): explained(learn, hm, j, over_predicted(j, signed=True), last_features(learn.model, valid(learn)))
    assert [o.split(' (')[0] for o in drawn(hm)]==[f'nothing {1-share[0]:.0%} of the pixels', f'thing {share[0]:.0%} of the pixels']


class Says(nn.Module):
    "A network whose answer comes wrapped in something"
    def __init__(self, net, wrap): super().__init__(); self.net,self.wrap = net,wrap
    def forward(self, x): return self.wrap(self.net(x))


wraps = dict(dict=(lambda y: dict(logits=y, aux=y*2), lambda o: o['logits']),
             tuple=(lambda y: (y, y*2), lambda o: o[0]),
             nested=(lambda y: ([y*2], dict(a=y)), lambda o: o[1]['a']),
             loss_first=(lambda y: dict(loss=y.sum(), logits=y), lambda o: o['logits']),
             none_first=(lambda y: (None, y), lambda o: o[1]),
             object=(lambda y: SimpleNamespace(logits=y), lambda o: o.logits),
             dense=(lambda y: dict(out=y[...,None,None]*torch.ones(3,4)), lambda o: o['out'].mean((2,3))))
quick = dict(smoothgrad=dict(n=2), integrated_gradients=dict(steps=4), occlusion=dict(window=32), rise=dict(n=6), scorecam=dict(channels=3))
quick['smooth_gradcam++'] = dict(n=2)


@pytest.mark.parametrize('wrap', wraps)
def test_answers_in_tuples_and_dicts(wrap):
    "`score` finds the numbers; every method gives what it gives for the network itself"
    set_seed(7)
    body = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU())
    net,x = nn.Sequential(body, nn.Sequential(nn.Flatten(), nn.Linear(6*49, 3))).eval(),torch.rand(2, 3, 64, 64)
    w,score = wraps[wrap]
    model = Says(net, w).eval()
    maps,scores = model_heatmaps(model, x, cls=[2,0], score=score, relu=False, layer='net.0')
    same(scores, net(x).detach())
    for j,c in enumerate((2,0)): same(maps[:,j], by_hand(model, net[0], lambda o: score(o)[:,c], x))
    same(model_heatmaps(model, x, cls=[2,0], score=score, relu=False)[0], maps)
    for method in [o for o in heatmap_methods if o not in ('cam','legrad')]:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            opts = dict(cls=[2,0], method=method, relu=False, **quick.get(method, {}))
            a,b = model_heatmaps(model, x, score=score, **opts)[0],model_heatmaps(net, x, **opts)[0]
        assert b.abs().max()>0
        same(a, b)
    one_line(lambda: model_heatmaps(model, x), '(n, c)', 'score=')


def first_ce(p, t): return F.cross_entropy(p['logits'], t)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['gradcam', 'saliency', 'occlusion'])
def test_a_learner_with_a_dict(pics, method):
    learn = pic_learner(pics)
    options = dict(method=method, relu=False, **quick.get(method, {}))
    want,net = learn.get_heatmaps(cls=[0,1], **options),learn.model
    learn.model,learn.loss_func = Says(net, wraps['dict'][0]),first_ce
    hm = learn.get_heatmaps(cls=['Blue_ish','Red'], score=lambda o: o['logits'], **options)
    same(hm.maps, want.maps)
    if method=='gradcam':
        for j in range(2): explained(learn, hm, j, lambda o: o['logits'][:,j], net[0])
    with torch.no_grad(): same(hm.preds, net.eval()(valid(learn)))
    assert hm.targs.tolist()==want.targs.tolist() and drawn(hm)[0].startswith('Blue_ish')
    one_line(lambda: learn.get_heatmaps(), 'dict', 'score=')


class Joint(nn.Module):
    "Looks at a picture, and weighs what it sees by numbers that come with it"
    def __init__(self, k=2):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 5, 4), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2), nn.ReLU(inplace=True))
        self.gate,self.head = nn.Linear(k, 8),nn.Linear(8, 2)
    def forward(self, x, m): return self.head(self.body(x).mean((2,3))*self.gate(m))


class Fixed(nn.Module):
    "`model` with its second input given"
    def __init__(self, model, m): super().__init__(); self.model,self.m = model,m
    def forward(self, x): return self.model(x, self.m.expand(len(x), -1))


@pytest.mark.slow
@pytest.mark.parametrize('method', [o for o in heatmap_methods if o!='legrad'])
def test_several_inputs(method):
    "The first one is explained; each image keeps its own second input, also when it is changed many times"
    set_seed(7)
    model,x,m = Joint().eval(),torch.rand(3, 3, 64, 64),tensor([[1.,0.],[-2.,1.],[.3,3.]])
    def f(model, *xb): return model_heatmaps(model, tuple(xb), cls=[1,0], method=method, relu=False, bs=2, **quick.get(method, {}))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        maps,scores = f(model, x, m)
        same(scores, model(x, m).detach())
        each = torch.cat([f(Fixed(model, m[i]), x[i:i+1])[0] for i in range(3)])
    assert each.abs().max()>0
    same(maps, each)
    if method=='gradcam':
        for j,c in enumerate((1,0)): same(maps[:,j], by_hand(model, model.body, lambda o: o[:,c], x, m))
        assert not torch.allclose(maps, f(model, x, m.flip(0))[0], rtol=.1)


@pytest.mark.slow
def test_a_learner_with_two_inputs(pics):
    dls = task_dls(pics, RegressionBlock(n_out=2), CategoryBlock, getters=[noop, meta, label], n_inp=2)
    set_seed(7)
    learn = Learner(dls, Joint(), loss_func=CrossEntropyLossFlat())
    x,m = valid(learn),valid(learn, 1)
    assert len(m.unique(dim=0))>3
    hm,(preds,targs) = learn.get_heatmaps(cls=['Red','Blue_ish'], relu=False),predicted(learn)
    same(hm.preds, preds)
    assert hm.targs.tolist()==targs.tolist()
    for j,c in enumerate((1,0)): same(hm.maps[:,j], by_hand(learn.model, learn.model.body, lambda o: o[:,c], x, m))
    for i in range(2):
        same(hm.image(i), x[i])
        assert f'truth: {dls.vocab[targs[i]]}' in drawn(hm, i)[0]
    hm = learn.get_heatmaps(cls='targ', method='occlusion', window=32, stride=32, relu=False)
    with torch.no_grad():
        for i in range(6):
            x2 = x[i:i+1].clone()
            x2[...,:32,32:] = 0
            drop = learn.model(x[i:i+1], m[i:i+1])[0,targs[i]] - learn.model(x2, m[i:i+1])[0,targs[i]]
            torch.testing.assert_close(hm.maps[i,0,5,40], drop, rtol=1e-3, atol=1e-6)
    learn.plot_heatmap_grid(n=2, seed=0)


def test_new_items_for_a_learner_with_two_inputs(pics):
    "An item is what the DataLoaders make all inputs from, here a file; one of three parts is not silently cut"
    learn = Learner(task_dls(pics, RegressionBlock(n_out=2), CategoryBlock, getters=[noop, meta, label], n_inp=2), Joint(), loss_func=CrossEntropyLossFlat())
    f = sorted_files(pics)[3]
    one_line(lambda: learn.show_gradcam(learn.dls.valid_ds[0]))
    for items in (dict(dl=learn.dls.test_dl([f])), dict(items=f)): same(learn.get_heatmaps(**items, cls=0).maps, learn.get_heatmaps(cls=0)[3].maps)


class Siamese(nn.Module):
    def __init__(self): super().__init__(); self.body,self.head = Joint().body,nn.Linear(16, 2)
    def forward(self, a, b): return self.head(torch.cat([self.body(a).mean((2,3)), self.body(b).mean((2,3)).exp()], 1))


def test_two_pictures(pics):
    "The pixels of the first are explained; if both go through one body, the run on the input asked for"
    set_seed(7)
    learn = Learner(task_dls(pics, ImageBlock, CategoryBlock, getters=[noop, other_image, label], n_inp=2), Siamese(), loss_func=CrossEntropyLossFlat())
    a,b = valid(learn),valid(learn, 1)
    hm = learn.get_heatmaps(cls='Red', method='saliency')
    a.requires_grad_()
    g, = torch.autograd.grad(learn.model.eval()(a, b)[:,1].sum(), a)
    same(hm.maps[:,0], g.abs().amax(1))
    same(hm.image(0), a[0].detach())
    hm = learn.get_heatmaps(cls='Red', relu=False, input=1) # the last call, which is the one that `by_hand` keeps
    same(hm.maps[:,0], by_hand(learn.model, learn.model.body, lambda o: o[:,1], a.detach(), b))
    same(hm.image(0), b[0])
    assert drawn(hm)[0].startswith('Red')


def test_the_picture_must_come_first():
    class Swapped(Joint):
        def forward(self, m, x): return super().forward(x, m)
    for method in ('gradcam', 'saliency', 'occlusion'): one_line(lambda: model_heatmaps(Swapped(), (torch.rand(2, 2), torch.rand(2, 3, 64, 64)), method=method))


def test_numbers_under_a_loss_of_ones_own(pics):
    "Float targets without a vocab are numbers, whatever the loss is"
    dls = DataBlock((ImageBlock, RegressionBlock), get_items=get_image_files, get_y=lambda f: 1.5, splitter=IndexSplitter(range(6)), item_tfms=Resize(64)).dataloaders(pics, bs=4, num_workers=0, device='cpu')
    hm = vision_learner(dls, narrow18, pretrained=False, normalize=False, n_out=1, loss_func=lambda p,t: ((p.squeeze()-t)**2).mean()).get_heatmaps()
    assert hm.task=='numbers' and hm.title(0)[0][:2]==[f'0: {float(hm.preds[0,0]):.3g}', 'truth: 1.5']


def test_a_model_that_gives_nan_is_not_right(learn):
    with torch.no_grad(): learn.model[1][-1].weight.fill_(torch.nan)
    hm = learn.get_heatmaps(cls='Red')
    assert all(hm.title(i)[1]=='black' and '✓' not in ' '.join(hm.title(i)[0]) for i in range(len(hm)))


@pytest.mark.slow
def test_pictures_of_themselves_only_where_there_are_some(learn, tmp_path):
    hm = learn.get_heatmaps(out=tmp_path/'a')
    assert hm._repr_png_()[1:4]==b'PNG' and hm[:0]._repr_png_() is None and load_heatmaps(tmp_path/'a')._repr_png_() is None

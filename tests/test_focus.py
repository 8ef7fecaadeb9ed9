"Focus: mosaics are what they are said to be, the share is the authors', the errors are honest, and what cannot be measured is said in one line"
import pickle, pytest
from shared import *
from test_no_trace import state, same
from fastai_heatmaps.core.method import get_method
from fastai_heatmaps.data.images import to_images
from fastai_heatmaps.learner.run import shadow
from fastai_heatmaps.samples import WholeImage
from fastai_heatmaps.trust.focus import plan_mosaics, lay_mosaics, focus_of, mosaic_mean, measure_focus, MosaicDL

colors = dict(blue=(0,0,255), green=(0,255,0), red=(255,0,0))


def plain(color, size=(32,32)): return PILImage.create(Image.new('RGB', size, colors[color]))
def name(o): return o.split('_')[0]
def color_photo(o): return plain(name(o))


class ColorNet(nn.Module):
    "Its map of a class is known exactly: the share of that colour in each pixel; `sign` turns it round"
    def __init__(self, sign=1, bias=()):
        super().__init__()
        self.body,self.pool,self.sign = nn.Conv2d(3, 3, 1, bias=False),nn.AdaptiveAvgPool2d(1),sign
        self.body.weight.data = torch.eye(3).flip(0)[...,None,None] # blue, green, red, in the order of the vocab
        self.bias = nn.Parameter(tensor(bias) if len(bias) else torch.zeros(3))
    def forward(self, x): return self.sign*self.pool(self.body(x)).flatten(1) + self.bias


def color_learner(names='red_1 red_2 red_3 blue_1 blue_2 blue_3 green_1 green_2', model=None, bs=4, get_x=color_photo, loss=None, **kwargs):
    items = names.split()
    block = DataBlock((ImageBlock, CategoryBlock(vocab=list(colors))), get_x=get_x, get_y=name, splitter=lambda o: (range_of(o), range_of(o)), **kwargs)
    dls = block.dataloaders(items, bs=bs, num_workers=0, device='cpu')
    return Learner(dls, model or ColorNet(), loss_func=loss or CrossEntropyLossFlat(), cbs=[])


def focus(learn, items=None, methods='gradcam', **kwargs):
    run = shadow(learn)
    methods = [get_method(m) for m in listify(methods)]
    return measure_focus(run, to_images(run.dls, items, vocab=learn.dls.vocab), methods, **kwargs)


def authors_focus(hmap, target, order):
    "The authors' formula, written anew: quadrants are cut at half of the pixels, only what is positive counts"
    h,w = hmap.shape
    parts = [hmap[:h//2,:w//2], hmap[:h//2,w//2:], hmap[h//2:,:w//2], hmap[h//2:,w//2:]]
    return sum(p[p>0].sum() for p,c in zip(parts, order) if c==target)/hmap[hmap>0].sum()


# mosaics

def test_the_places_of_four_photos():
    "Photo k is a plane of the number k"
    x = torch.arange(8.)[:,None,None,None].expand(8, 2, 3, 5)
    a,b = lay_mosaics(x)
    assert a.shape==(2,6,10) and (a[:,:3,:5]==0).all() and (a[:,:3,5:]==1).all() and (a[:,3:,:5]==2).all() and (a[:,3:,5:]==3).all()
    assert (b==a+4).all()
    rows = torch.arange(6.).reshape(1,1,2,3).expand(4,1,2,3) # the pixels of a photo stay in order
    assert (lay_mosaics(rows)[0,0]==tensor([[0,1,2,0,1,2],[3,4,5,3,4,5]]*2)).all()


@pytest.mark.parametrize('counts,n', [([5,5,5], 40), ([2,9], 20), ([30]*4, 28), ([2,2,2,2,2], 12)])
def test_two_photos_of_the_class_and_two_of_another(counts, n):
    y = torch.repeat_interleave(tensor(counts))
    at = F.one_hot(y).bool()
    m = plan_mosaics(at, ~at, n)
    assert len(m)==n
    for photos,own,a,b in zip(m.photos, m.own, m.cls, m.other):
        assert sorted(y[photos[own]].tolist())==[a,a] and sorted(y[photos[~own]].tolist())==[b,b] and a!=b and len(photos.unique())==4
    uses = m.photos.flatten().bincount(minlength=len(y))
    for c in range(len(counts)): assert uses[y==c].max()-uses[y==c].min()<=2 # photos of a class take turns
    assert len({(frozenset(p[o].tolist()), frozenset(p[~o].tolist())) for p,o in zip(m.photos, m.own)})==n # no two of the same pairs
    asked = m.cls.bincount(minlength=len(counts))
    assert asked.max()-asked.min()<=2 # and so do classes
    if sum(counts)>4*n: assert uses.max()==1 # where there are enough, each is used once
    assert len(set(map(tuple, m.own.tolist())))>3 # the places are shuffled


def test_the_seed_decides():
    at = F.one_hot(torch.arange(20)//5).bool()
    a,b,c = [plan_mosaics(at, ~at, 12, seed) for seed in (1,1,2)]
    assert all((getattr(a, k)==getattr(b, k)).all() for k in ('photos', 'own', 'cls', 'other')) and not (a.photos==c.photos).all()


@pytest.mark.parametrize('counts,most', [([2,2], 2), ([3,3], 18), ([2,3], 6), ([4,1,1], 0), ([2,2,2], 6), ([2,3,1], 6)])
def test_no_more_mosaics_than_there_are(counts, most):
    "C(a,2)·C(b,2) for each ordered pair of classes"
    at = F.one_hot(torch.repeat_interleave(tensor(counts))).bool()
    assert len(plan_mosaics(at, ~at, 1000))==most


def test_photos_of_several_classes():
    "The photos of the class explained do not show the other class, and the other way round"
    at = tensor([[1,0,0], [1,0,0], [1,1,0], [0,1,0], [0,1,0], [1,1,1], [0,1,1], [0,0,1]]).bool()
    m = plan_mosaics(at, ~at, 50)
    assert len(m)==2*(3*1)+2*(1*3) # (0,2) and back, (0,1) and back
    for photos,own,a,b in zip(m.photos, m.own, m.cls, m.other):
        assert at[photos[own],a].all() and at[photos[~own],b].all() and not at[photos[own],b].any() and not at[photos[~own],a].any()
    assert {(int(a),int(b)) for a,b in zip(m.cls, m.other)}=={(0,1),(1,0),(0,2),(2,0)} # only one photo shows 2 and not 1


def test_the_model_sees_them_so():
    "Each square of what goes into the model has the colour of the photo that is said to lie there"
    learn = color_learner(bs=5) # 5 is no multiple of 4
    mosaics,_ = focus(learn, n=9)
    seen = torch.cat([x for x, in mosaics.laid().dl])
    assert seen.shape==(9,3,64,64)
    names = [learn.dls.valid_ds.items[mosaics.images.idxs[i]] for i in mosaics.photos.flatten()]
    for x,own,four,a in zip(seen, mosaics.own, [names[i:i+4] for i in range(0, 36, 4)], mosaics.cls):
        squares = [x[:,:32,:32], x[:,:32,32:], x[:,32:,:32], x[:,32:,32:]]
        for square,o,is_own in zip(squares, four, own):
            assert (square==tensor(colors[name(o)])[:,None,None]/255).all() and (name(o)==learn.dls.vocab[a])==is_own


@pytest.mark.parametrize('bs,n', [(1,3), (2,3), (3,5), (4,3), (6,7), (64,3)])
def test_batches_of_mosaics(bs, n):
    dl = MosaicDL([(torch.rand(min(bs, 4*n-i), 3, 8, 8), 0) for i in range(0, 4*n, bs)], n)
    got = [len(x) for x, in dl]
    assert sum(got)==n and len(dl)==len(got) and max(got)*4<=bs+3


# the share

@pytest.mark.parametrize('h,w', [(8,8), (14,6), (224,224)])
def test_the_formula_of_the_authors(h, w):
    gen = torch.Generator().manual_seed(0)
    maps,own = torch.randn(5, h, w, generator=gen),torch.stack([torch.randperm(4, generator=gen)<2 for _ in range(5)])
    want = [authors_focus(m.double().numpy(), 1, o.int().tolist()) for m,o in zip(maps, own)]
    torch.testing.assert_close(focus_of(maps, own), tensor(want).float())


@pytest.mark.parametrize('h,w', [(7,7), (5,8), (1,1), (3,1)])
def test_cells_on_the_border(h, w):
    "Each cell, laid out as 2×2 pixels, can be cut exactly"
    gen = torch.Generator().manual_seed(1)
    maps,own = torch.randn(6, h, w, generator=gen).abs(),torch.stack([torch.randperm(4, generator=gen)<2 for _ in range(6)])
    want = [authors_focus(m.double().numpy().repeat(2, 0).repeat(2, 1), 1, o.int().tolist()) for m,o in zip(maps, own)]
    torch.testing.assert_close(focus_of(maps, own), tensor(want).float())


def test_flat_and_broken_maps_have_no_share():
    maps = torch.stack([torch.zeros(7,7), -torch.ones(7,7), torch.full((7,7), np.nan), torch.full((7,7), np.inf), torch.ones(7,7)])
    got = focus_of(maps, tensor([[True,True,False,False]]*5))
    assert got[:4].isnan().all() and got[4]==.5


# nets whose map is known

def test_a_net_that_sees_colours_gets_all():
    mosaics,(cam,acts,mine) = focus(color_learner(), methods=['gradcam', 'activations', lambda a,g: -(a*g).sum(1)], n=12)
    assert (cam==1).all() and mosaics.known.all()
    assert (acts-.5).abs().max()<1e-6 # each colour is as bright, and half of the mosaic is right
    assert mine.isnan().all() # all of it is against the class


def test_an_inverted_map_gets_nothing():
    def inverted(acts, grads): return acts.sum(1)-(acts*grads).sum(1)/grads.sum((1,2,3))[:,None,None]*acts[0,0].numel()
    _,(share,) = focus(color_learner(), methods=inverted, n=12)
    assert (share==0).all()


def test_a_net_that_is_right_for_a_reason_elsewhere():
    "Each class is known by the absence of the two others: positive evidence lies nowhere, and that against it is not counted"
    f = color_learner(model=ColorNet(sign=-1)).heatmap_focus('red_1 red_2 blue_1 blue_2'.split() and [plain(c) for c in ('red','red','blue','blue','green','green')], n=6)
    assert f.each['gradcam focus'].isnan().all() and np.isnan(f.loc['gradcam','focus']) and f.loc['gradcam','mosaics']==0
    assert '6 of the 6 maps by gradcam hold no evidence for the class, and do not count' in f.words


def test_only_photos_that_the_model_gets_right():
    "A green photo that is labelled red is left out, as is a red one that is labelled green"
    learn = color_learner()
    items = [(plain(a), b) for a,b in [('red','red'), ('red','red'), ('blue','blue'), ('blue','blue'), ('green','red'), ('red','green'), ('green','green'), ('blue','green')]]
    mosaics,(share,) = focus(learn, items, n=100)
    assert sorted(mosaics.photos.unique().tolist())==[0,1,2,3] and len(mosaics)==2 and (share==1).all()
    mosaics,_ = focus(learn, [o for o,_ in items], n=500) # without labels, the model is believed
    assert len(mosaics.photos.unique())==8


# what it costs

class Sizes(ColorNet):
    def __init__(self):
        super().__init__()
        self.seen = []
    def forward(self, x):
        self.seen.append((len(x), x.shape[-1]))
        return super().forward(x)


@pytest.mark.parametrize('bs', [1, 6, 8])
def test_passes_and_memory(bs):
    "One pass of the photos, one image of twice the size to try, one pass of the mosaics, for all methods of a layer together; a batch has no more pixels than one of photos"
    learn = color_learner(model=Sizes(), bs=bs)
    learn.heatmap_focus(method=['gradcam', 'layercam', 'hirescam'], n=10, layer='body')
    seen = learn.model.seen
    assert sum(n for n,s in seen if s==32)==8 and sum(n for n,s in seen if s==64)==1+10
    assert max(n*s*s for n,s in seen)<=max(bs+3, 4)*32*32


def test_a_large_set_is_not_run_as_a_whole():
    names = ' '.join(f'{c}_{i}' for c in colors for i in range(30))
    learn = color_learner(names, Sizes())
    mosaics,_ = focus(learn, n=18)
    assert sum(n for n,s in learn.model.seen if s==32)==72 and len(mosaics.images)==72
    assert len(mosaics.photos.unique())>=64 # and each is used about once
    learn.model.seen.clear()
    mosaics,_ = focus(learn, n=1)
    assert sum(n for n,s in learn.model.seen if s==32)==64 # so that there are pairs


def test_methods_of_the_pixels_take_a_pass_each():
    learn = color_learner(model=Sizes())
    learn.heatmap_focus(method=['saliency', 'gradient_x_input'], n=4, layer='body')
    assert sum(n for n,s in learn.model.seen if s==64)==1+4+4+4 # those two, and the activations


# Learners of all kinds

def test_photos_of_several_sizes():
    "A DataLoader that opens them one at a time, whole: the middle squares are laid together"
    def photo(o): return plain(name(o), (40,64) if o.endswith('1') else (96,64))
    learn = color_learner(get_x=photo, bs=1, item_tfms=WholeImage(64))
    mosaics,(share,) = focus(learn, n=6)
    assert {x.shape for x, in mosaics.laid().dl}=={(1,3,128,128)} and (share==1).all()
    assert learn.heatmap_focus(n=4).plot().size==1+2*3


def test_a_model_that_takes_no_larger_images():
    "Mosaics are halved, and it is said"
    learn = color_learner(model=nn.Sequential(ColorNet().body, nn.Flatten(), nn.Linear(3*32*32, 3, bias=False)))
    learn.model[2].weight.data = torch.eye(3).repeat_interleave(32*32, 1)
    f = learn.heatmap_focus(n=6, layer='0')
    assert f.loc['gradcam','focus']==1 and 'halved' in f.words
    mosaics,_ = focus(learn, layer='0', n=6)
    assert {x.shape[1:] for x, in mosaics.laid().dl}=={(3,32,32)}
    assert 'halved' not in color_learner().heatmap_focus(n=6).words


def test_a_vit():
    "Of a fixed size, its mosaics are halved; what each photo is taken for does not matter here"
    learn = color_learner(model=net_for('legrad'), item_tfms=Resize(64))
    items = learn.dls.valid_ds.items
    p = learn.get_preds()[0].log()
    learn.model.head.bias.data -= p.mean(0) + tensor([0.,0.,99.]) # so that it sees two classes
    f = learn.heatmap_focus([plain(name(o)) for o in items], method=['legrad', 'gradcam'], n=4)
    assert 'halved' in f.words and 0<f.loc['legrad','focus']<1


def test_the_learners_transforms_act_once():
    "Normalize acts on photos, a callback on what goes in: a net that only knows turned colours, turned back by both, is right"
    class Turn(Callback):
        def before_batch(self): self.learn.xb = tuple(-x for x in self.xb)
    learn = color_learner(batch_tfms=Normalize.from_stats([.5]*3, [-.5]*3)) # 1 - 2x
    learn.add_cb(Turn())
    mosaics,(share,) = focus(learn, n=8)
    seen = torch.cat([x for x, in mosaics.laid().dl])
    assert seen.min()==-1 and seen.max()==1 and mosaics.known.all() and (share==1).all()


def test_one_logit():
    "Evidence for the first class is evidence against the second"
    learn = color_learner('red_1 red_2 blue_1 blue_2 red_3 blue_3', loss=BCEWithLogitsLossFlat())
    learn.dls.vocab
    learn.model = nn.Sequential(ColorNet().body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1, bias=False)))
    learn.model[1][2].weight.data = tensor([[-1.,0.,1.]])
    for dl in learn.dls.loaders: dl.dataset.tls[1].tfms[-1].vocab = CategoryMap(['blue','red'], sort=False)
    items = [(plain(c), c) for c in ('red','red','blue','blue')]
    assert learn.dls.vocab==['blue','red']
    mosaics,(share,) = focus(learn, items, n=5)
    assert len(mosaics)==2 and (share==1).all()


def test_several_labels():
    "Each photo has its colour, and some two of them in halves"
    def photo(o):
        cs = o.split('_')[:-1]
        return PILImage.create(np.concatenate([np.array(plain(c, (32//len(cs),32))) for c in cs], 1))
    def tags(o): return o.split('_')[:-1]
    block = DataBlock((ImageBlock, MultiCategoryBlock(vocab=list(colors))), get_x=photo, get_y=tags, splitter=lambda o: (range_of(o), range_of(o)))
    dls = block.dataloaders('red_1 red_2 blue_1 blue_2 red_blue_1 red_green_1 green_1 blue_green_2'.split(), bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, ColorNet(bias=[-.4]*3), loss_func=BCEWithLogitsLossFlat())
    mosaics,(share,) = focus(learn, n=200)
    assert (share==1).all()
    y = tensor([[c in tags(o) for c in colors] for o in dls.valid_ds.items])
    assert (y[mosaics.photos].gather(2, mosaics.cls[:,None,None].expand(-1,4,1))[...,0]==mosaics.own).all()


def one_line(f, *words):
    with pytest.raises(ValueError) as e: f()
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_what_cannot_be_measured():
    red = [(plain('red'), 'red')]*5
    blue = (plain('blue'), 'blue')
    learn = color_learner()
    one_line(lambda: learn.heatmap_focus(red), 'two classes', "of 5 photos only 'red' has them")
    one_line(lambda: learn.heatmap_focus([*red, blue]), "only 'red' has them")
    one_line(lambda: learn.heatmap_focus([red[0], blue]), 'no class has them')
    one_line(lambda: learn.heatmap_focus([(plain('red'), 'blue')]*4), 'none of 4 photos right')
    one_line(lambda: color_learner(' '.join(f'red_{i}' for i in range(70))).heatmap_focus(n=2), "of 64 photos only 'red'", 'a larger n')
    one_line(lambda: learn.heatmap_focus(n=0), 'n is 0')
    one_line(lambda: learn.heatmap_focus(method=[]), 'list of methods is empty')
    one_line(lambda: learn.heatmap_focus(bs=0), 'bs is 0')
    one_line(lambda: learn.heatmap_focus([]), 'no images')
    one_line(lambda: learn.heatmap_focus(layer='bodi'), "'body'")
    with pytest.raises(ValueError, match="did you mean 'gradcam'"): learn.heatmap_focus(method='gradcm')


def test_outputs_that_are_no_classes(pics):
    from test_tasks import task_learner, task_dls, one_number, mask
    one_line(lambda: task_learner(pics, RegressionBlock(n_out=1), one_number, n_out=1).heatmap_focus(), 'into classes')
    dls = task_dls(pics, MaskBlock(codes=['a','b']), get_y=mask)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    one_line(lambda: Learner(dls, net, loss_func=CrossEntropyLossFlat(axis=1)).heatmap_focus(), 'into classes')


def test_several_inputs(pics):
    class Two(ColorNet):
        def forward(self, a, b): return super().forward(a)+super().forward(b)
    block = DataBlock((ImageBlock, ImageBlock, CategoryBlock(vocab=list(colors))), getters=[color_photo, color_photo, name], n_inp=2, splitter=lambda o: (range_of(o), range_of(o)))
    dls = block.dataloaders('red_1 red_2 blue_1 blue_2'.split(), bs=2, num_workers=0, device='cpu')
    one_line(lambda: Learner(dls, Two(), loss_func=CrossEntropyLossFlat()).heatmap_focus(), 'several inputs')


def test_exported(tmp_path):
    learn = color_learner()
    learn.export(tmp_path/'m.pkl')
    back = load_learner(tmp_path/'m.pkl')
    one_line(lambda: back.heatmap_focus(), 'exported', 'items')
    items = [(plain(c), c) for c in colors for _ in range(2)]
    assert back.heatmap_focus(items, n=6).loc['gradcam','focus']==1


# what is said

def test_the_answer():
    f = color_learner().heatmap_focus(method=['gradcam', 'activations'], n=12)
    assert list(f.index)==['gradcam', 'activations', 'uniform'] and f.loc['gradcam','focus']==1 and f.loc['uniform','focus']==.5
    assert abs(f.loc['gradcam','above_activations']-.5)<1e-6 and f.loc['activations','above_activations']==0
    f = color_learner().heatmap_focus(n=12)
    assert f.words.startswith('The share of the evidence for a class that falls on its own photos is 1.00 ± .00 '
                              '(uniform: .50; activations, which know no class: .50 ± .00).')
    assert 'cannot be told' not in f.words and 'Measured on 12 mosaics of 8 photos' in f.words and 'In 100% of the mosaics' in f.words
    assert f.each['gradcam focus'].shape==(12,) and f.each['photos'].shape==(12,4)
    g = pickle.loads(pickle.dumps(f))
    assert g.words==f.words and len(g.plot())==1+2*3


def test_fewer_than_asked_for_is_said():
    f = color_learner('red_1 red_2 blue_1 blue_2').heatmap_focus(n=50)
    assert 'Measured on 2 mosaics of 4 photos' in f.words and '50 were asked for' in f.words


def noisy_class(p, seed):
    "A method whose share is `p` of the evidence on its own squares, and some noise"
    gen = torch.Generator().manual_seed(seed)
    def f(acts, grads):
        own = (acts*grads).sum(1)>0
        k = (p+.03*torch.randn(len(acts), 1, 1, generator=gen)).clamp(0, 1)
        return own*k + ~own*(1-k)
    return f


def test_what_cannot_be_told_apart_is_not_ranked():
    names = ' '.join(f'{c}_{i}' for c in colors for i in range(10))
    a,b,c,d,e = [noisy_class(p, i) for i,p in enumerate([.9, .9, .7, .5, .2])]
    for f,n in zip((a,b,c,d,e), 'abcde'): f.__name__ = n
    f = color_learner(names).heatmap_focus(method=[a,b,c,d,e], n=30)
    for k,p in zip('abcde', [.9,.9,.7,.5,.2]): assert abs(f.loc[k,'focus']-p)<4*f.loc[k,'focus_error']<.1
    assert 'By e it falls on the photos of the other class more than on its own' in f.words
    assert 'The share by d cannot be told from that of maps which know no class' in f.words
    top = max('ab', key=lambda k: f.loc[k,'focus'])
    assert f"highest for {top}, but {'ab'.replace(top, '')} cannot be told from it" in f.words
    f = color_learner(names).heatmap_focus(method=[a,c], n=30)
    assert 'highest for a, by more than two standard errors' in f.words


def test_two_of_one_name():
    f = color_learner().heatmap_focus(method=[get_method('smoothgrad', n=2), get_method('smoothgrad', n=3)], n=2)
    assert list(f.index)==['smoothgrad', 'smoothgrad 2', 'activations', 'uniform']


@pytest.mark.slow
@pytest.mark.parametrize('N,m', [(12,60), (40,60), (240,60)])
def test_errors_are_honest(N, m):
    "The error says how much the mean varies from one set of photos to the next, or a little more; the usual one says too little where few photos are used again and again"
    y,gen = F.one_hot(torch.arange(N)//(N//4)).bool(),torch.Generator().manual_seed(0)
    errors,usual,true = [],[],[]
    for seed in range(40):
        plan = plan_mosaics(y, ~y, m, seed)
        v = (torch.randn(N, generator=gen)[plan.photos]*plan.own).sum(1) + .7*torch.randn(m, generator=gen)
        errors.append(mosaic_mean(v, plan.photos)[1])
        usual.append(v.std().item()/m**.5)
        uses = plan.photos[plan.own].bincount().double()
        true.append(((uses**2).sum().item()+.7**2*m)**.5/m) # the mean is a sum of independent normal numbers
    said,true = np.sqrt(np.mean(np.square(errors))),np.mean(true)
    assert .9<said/true<1.35
    if N==12: assert np.mean(usual)/true<.5
    if N==240: assert np.allclose(errors, usual, rtol=.1)


def test_means_of_few():
    photos = tensor([[0,1,2,3],[4,5,6,7]])
    assert np.isnan(mosaic_mean(tensor([np.nan,np.nan]), photos)[0])
    mean,error = mosaic_mean(tensor([.5,np.nan]), photos)
    assert mean==.5 and np.isnan(error)
    m = tensor([1.,2.,4.])
    mean,error = mosaic_mean(m, torch.arange(12).reshape(3,4))
    without = tensor([3.,2.5,1.5]) # the means without each mosaic, and so without each of its photos
    r = m-7/3
    np.testing.assert_allclose((mean, error**2), (7/3, 4*((without-7/3)**2).sum() - 3*(r**2).sum()/9), rtol=1e-5)
    assert np.isnan(mosaic_mean(m, tensor([[0,1,2,3],[0,4,5,6],[0,1,5,7]]))[1]) # nothing tells how it would be without photo 0


def test_leaves_no_trace():
    learn = color_learner()
    before,rng = state(learn.model, learn),(torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    a,b = [learn.heatmap_focus(n=6, seed=3) for _ in range(2)]
    same(before, state(learn.model, learn))
    assert (torch.get_rng_state()==rng[0]).all() and np.random.get_state()[1].tolist()==rng[1] and random.getstate()==rng[2]
    assert (a.each['photos']==b.each['photos']).all() and a.words==b.words and not (a.each['photos']==learn.heatmap_focus(n=6).each['photos']).all()

"In a model with several inputs, each picture is explained by what the model makes of it, and shown under its own map."
import pytest
from copy import deepcopy
from test_no_trace import state, same
from shared import *
from fastai_heatmaps.core.inputs import of_input, parts_of


class Scores(nn.Module):
    "Two pictures by one encoder that passes them on; what counts is their mean, with known weights: (classes, pictures)"
    weights = tensor([[2.,5.],[3.,1.]])
    def __init__(self, nested=False):
        super().__init__()
        self.enc,self.head,self.nested = nn.Conv2d(1, 1, 1, bias=False),nn.Linear(2, 2, bias=False),nested
        nn.init.ones_(self.enc.weight)
        self.head.weight.data = self.weights.clone()

    def forward(self, *xs): return self.head(torch.cat([o.mean((2,3)) for o in self.features(*(xs[0] if self.nested else xs))], 1))
    def features(self, a, b): return self.enc(a),self.enc(b)

class Backwards(Scores):
    def features(self, a, b): return [self.enc(b),self.enc(a)][::-1]

class OneBatch(Scores):
    def features(self, a, b): return self.enc(torch.cat([a,b])).chunk(2)

class SideBySide(Scores):
    def features(self, a, b): return self.enc(torch.stack([a,b], 1).flatten(0,1)).unflatten(0, (-1,2)).unbind(1)

class TwoEncoders(Scores):
    def __init__(self, nested=False):
        super().__init__(nested)
        self.enc2 = deepcopy(self.enc)
    def features(self, a, b): return self.enc(a),self.enc2(b)

class Again(Scores):
    "Runs its encoder on the first picture three times, the last of which counts"
    def features(self, a, b):
        self.enc(a*9)
        b = self.enc(b)
        self.enc(a/2)
        return self.enc(a),b


nets = [Scores, Backwards, OneBatch, SideBySide, TwoEncoders, Again]
marks = (2,3),(6,1) # in the first picture and in the second
def pair():
    "Three pairs of black pictures, each with one bright pixel, of a brightness of its own"
    xs = torch.zeros(2, 3, 1, 8, 8)
    for x,(r,c),v in zip(xs, marks, (4.,8.)): x[...,r,c] = v*tensor([[1.],[3.],[2.]])
    return tuple(xs)


def by_hand(method, xs, i, c):
    "The map of class `c` for picture `i` of `xs`, from the method's formula"
    x,w,other = xs[i][:,0],float(Scores.weights[c,i]),float(Scores.weights[1-c,i])
    g,total = w/64,x.sum((1,2), keepdim=True)
    y = sum(float(Scores.weights[c,j])*xs[j].mean((1,2,3)) for j in range(2))[:,None,None]
    plain = g*x
    return {'activations': x, 'eigencam': x, 'scorecam': x, 'finercam': F.relu(plain-.6*other/64*x), 'cam': w*x, 'guided_gradcam': plain*g,
            'gradcam++': 64*g/(2+g*total)*x, 'smooth_gradcam++': 64*g**3/(2*g**2+g**3*total)*x, 'ablationcam': g*total/y*x,
            **dict.fromkeys(['saliency', 'guided_backprop', 'deconvnet', 'smoothgrad'], torch.full_like(x, g))}.get(method, plain)


options = {**quick, 'occlusion': dict(window=1, stride=1), 'rise': dict(n=300, cells=8), 'scorecam': {}}
def explain(model, xs, i, method='gradcam', **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return model_heatmaps(model, (xs,) if model.nested else xs, cls=[0,1], method=method, input=i, **options.get(method, {}), **kwargs)[0]

def check(model, method, **kwargs):
    xs = pair()
    for i,(r,c) in enumerate(marks):
        maps = explain(model, xs, i, method, **kwargs)
        if method=='rise': assert (maps.flatten(2).argmax(2)==8*r+c).all() # chance has a part in its values
        else:
            for k in range(2): torch.testing.assert_close(maps[:,k], by_hand(method, xs, i, k), rtol=1e-4, atol=1e-6)

methods = [o for o in heatmap_methods if o!='legrad']

@pytest.mark.parametrize('method', methods)
def test_each_picture_by_hand(method): check(Scores(), method)


@pytest.mark.parametrize('net', nets)
@pytest.mark.parametrize('method', ['activations', 'gradcam', 'cam', 'smooth_gradcam++', 'ablationcam', 'gradient_x_input', 'occlusion'])
def test_whatever_runs_on_it(net, method):
    "In another order, on one batch, several times; with a tuple as the only input"
    check(net(nested=True), method, bs=2)


def test_the_default_belongs_to_the_picture():
    maps = [explain(TwoEncoders(), pair(), i) for i in range(2)]
    for i,name in enumerate(('enc', 'enc2')): torch.testing.assert_close(maps[i], explain(TwoEncoders(), pair(), i, layer=name))


def fails(f, *words):
    with pytest.raises(ValueError) as e: f()
    text = str(e.value)
    assert '\n' not in text and all(w in text for w in words), text


class Mixed(Scores):
    "One layer sees both pictures, twice"
    def features(self, a, b): return self.enc(a+b),self.enc(a-b)

class Joined(Scores):
    "One layer sees both pictures, once"
    def __init__(self, nested=False):
        super().__init__(nested)
        self.join = nn.Conv2d(2, 2, 1, bias=False)
        self.join.weight.data = torch.eye(2)[...,None,None]
    def features(self, a, b): return self.join(torch.cat([self.enc(a),self.enc(b)], 1)).chunk(2, 1)

def test_what_cannot_be_told_is_refused():
    xs = pair()
    fails(lambda: explain(Mixed(), xs, 0), "layer 'enc' runs 2 times, on input 0 and others together", 'choose a layer before it')
    fails(lambda: explain(TwoEncoders(), xs, 0, layer='enc2'), "layer 'enc2' does not depend on input 0")
    fails(lambda: explain(Scores(), xs, 2), 'input is 2', '2 inputs, 0 to 1')
    fails(lambda: model_heatmaps(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()), xs[0], input=1), 'input is 1', '1 input, 0')
    for method in methods: fails(lambda: explain(Scores(), (torch.rand(3, 5), *xs), 0, method), 'input 0', '(3, 5)', 'pass input=1 or 2')


def test_a_layer_that_sees_both():
    "It has one map, for either picture; by default each has its own"
    xs = pair()
    both = [explain(Joined(), xs, i, layer='join') for i in range(2)]
    torch.testing.assert_close(both[0], both[1])
    torch.testing.assert_close(both[0][:,0], sum(by_hand('gradcam', xs, i, 0) for i in range(2)))
    check(Joined(), 'gradcam')


class Table(Scores):
    "Numbers, and a picture"
    def forward(self, t, x): return self.head(torch.cat([self.enc(x).mean((2,3)), t.sum(1, keepdim=True)], 1))

def test_a_table_and_a_picture():
    xs,t = pair(),torch.rand(3, 4)
    for method in ('gradcam', 'saliency', 'occlusion', 'ablationcam'):
        maps = explain(Table(), (t, xs[0]), 1, method)
        if method!='ablationcam': torch.testing.assert_close(maps[:,0], by_hand(method, xs, 0, 0))
        assert maps.shape==(3,2,8,8) and maps.any()


def test_cost():
    "A model with one input runs as often as before, one with two pictures three times more, whatever the number of images"
    ran = []
    class Counted(nn.Sequential):
        def forward(self, x):
            ran.append(len(x))
            return super().forward(x)
    one = Counted(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)))
    model_heatmaps(one, pair()[0])
    assert ran==[3]
    two = Scores()
    two.register_forward_pre_hook(lambda m, xb: ran.append(len(xb[0])))
    ran.clear()
    explain(two, pair(), 0, layer='enc')
    assert ran==[2,2,2,3]
    ran.clear()
    explain(two, pair(), 0, 'saliency')
    assert ran==[3]


@pytest.mark.parametrize('method', methods)
def test_no_trace(method):
    for model in (Scores().train(), OneBatch(nested=True).train()):
        before = state(model)
        explain(model, pair(), 1, method)
        same(before, state(model))


# Learners, as in fastai's tutorial 'Siamese'

class ImageTuple(fastuple):
    @classmethod
    def create(cls, files): return cls(tuple(PILImage.create(f) for f in files))

def ImageTupleBlock(): return TransformBlock(type_tfms=ImageTuple.create, batch_tfms=IntToFloatTensor)

class SiameseModel(Module):
    def __init__(self):
        set_seed(7)
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 5, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2), nn.ReLU(inplace=True))
        self.head = create_head(16, 2, ps=0.)
    def forward(self, *xs):
        a,b = xs if len(xs)==2 else xs[0]
        return self.head(torch.cat([self.encoder(a),self.encoder(b)], 1))


def first_two(o): return o[:2]
def first(o): return o[0]
def second(o): return o[1]
def third(o): return o[2]

def siamese(pics, kind):
    "A Learner of pairs: `ImageTuple` items, or two inputs"
    files = get_image_files(pics).sorted()
    pairs = [[f, files[(3*i+5)%12], ['no','yes'][i%2]] for i,f in enumerate(files)]
    rest = dict(splitter=IndexSplitter(range(6)), item_tfms=Resize(64))
    if kind=='ImageTuple': block = DataBlock((ImageTupleBlock, CategoryBlock), get_x=first_two, get_y=third, **rest)
    else: block = DataBlock((ImageBlock, ImageBlock, CategoryBlock), getters=[first, second, third], n_inp=2, **rest)
    dls = block.dataloaders(pairs, bs=4, num_workers=0, device='cpu')
    return Learner(dls, SiameseModel(), loss_func=CrossEntropyLossFlat()),pairs


@pytest.fixture(params=['ImageTuple', 'two inputs'])
def two(pics, request): return siamese(pics, request.param)


def pictures(dl, i): # picture `i` of each item, as the model gets it
    return torch.cat([(b[0] if isinstance(b[0], tuple) else b)[i].as_subclass(Tensor) for b in dl])

def gradcam_of(model, xs, i, c):
    "Grad-CAM the long way round"
    model.eval()
    feats = [model.encoder(o).detach().requires_grad_() for o in xs]
    g, = torch.autograd.grad(model.head(torch.cat(feats, 1))[:,c].sum(), feats[i])
    return F.relu((g.mean((2,3), keepdim=True)*feats[i]).sum(1)).detach()


def test_a_siamese_learner(two, tmp_path):
    learn,pairs = two
    xs = [pictures(learn.dls.valid, i) for i in range(2)]
    for i in range(2):
        hm = learn.get_heatmaps(cls='yes', input=i)
        assert hm.layer=='encoder' and hm.vocab==['no','yes']
        torch.testing.assert_close(hm.preds, learn.get_preds()[0])
        torch.testing.assert_close(hm.maps[:,0], gradcam_of(learn.model, xs, i, 1), rtol=1e-4, atol=1e-6)
        for part in (hm, hm[2:], hm[[5]]): torch.testing.assert_close(part.image(0), xs[i][int(part.idxs[0])])
        occluded = learn.get_heatmaps(cls='yes', input=i, method='occlusion', window=32, stride=32, relu=False).maps[:,0,8,40]
        changed = [o.clone() for o in xs]
        changed[i][...,:32,32:] = 0
        with torch.no_grad(): drop = [learn.model(*o)[:,1] for o in (xs, changed)]
        torch.testing.assert_close(occluded, drop[0]-drop[1], rtol=1e-3, atol=1e-6)
        stored = learn.get_heatmaps(cls='yes', input=i, out=tmp_path/str(i))
        for o in (stored, load_heatmaps(tmp_path/str(i), learn.dls.valid)): torch.testing.assert_close(o.image(3), xs[i][3])


def test_items_of_a_siamese_learner(two):
    learn,pairs = two
    before = state(learn.model, learn)
    for i in range(2):
        valid = learn.get_heatmaps(cls=0, input=i)
        for hm in (learn.get_heatmaps(dl=learn.dls.test_dl(pairs[:3]), cls=0, input=i), learn.get_heatmaps(pairs[:3], cls=0, input=i)):
            torch.testing.assert_close(hm.maps, valid.maps[:3])
        ax = learn.show_gradcam(tuple(pairs[4]), cls=0, input=i)
        shown = torch.as_tensor(ax.images[0].get_array()).permute(2,0,1)
        torch.testing.assert_close(shown.float(), valid.image(4), rtol=0, atol=1e-3)
        learn.show_saliency(tuple(pairs[4]), input=i)
        assert learn.plot_heatmap_grid(n=2, seed=0, input=i).size==4
    same(before, state(learn.model, learn))


def test_feature_maps_are_of_the_input_that_is_asked_about(two):
    "Also where one encoder runs on both pictures"
    learn,pairs = two
    for i in range(2):
        x = pictures(learn.dls.valid, i)[4:5]
        with torch.no_grad(): want = learn.model.eval().encoder(x)[0]
        maps = learn.get_feature_maps(tuple(pairs[4]), ['encoder.0', 'encoder'], input=i)
        assert [*maps]==['encoder.0', 'encoder']
        torch.testing.assert_close(maps['encoder'], want)
        torch.testing.assert_close(learn.get_feature_maps(tuple(pairs[4]), input=i)['encoder'], want)
        shown = learn.show_feature_maps(tuple(pairs[4]), channels=3, input=i)[0,0].images[0].get_array()
        torch.testing.assert_close(tensor(np.asarray(shown)), want[3])
    fails(lambda: learn.get_feature_maps(tuple(pairs[4]), input=2), 'input is 2')


def test_views_of_one_picture_refuse_several(two):
    learn,_ = two
    for f in (learn.show_architecture, partial(learn.show_class_image, 'yes', steps=1)): fails(f, 'takes several inputs', 'input=1')


def test_siamese_items_that_are_none(two):
    learn,pairs = two
    item = tuple(pairs[0])
    fails(lambda: learn.show_gradcam(pairs[0][0]), 'an item cannot be read', 'learn.dls.valid_ds.items')
    fails(lambda: learn.show_gradcam(item, input=2), 'input is 2')
    fails(lambda: learn.show_gradcam(item, input=1, on='original'), "on='original'", "pass on='input'")


class Pairs(Transform):
    "Makes a pair and its label from a file, as the tutorial's `SiameseTransform` does"
    def __init__(self, files): self.files = files
    def encodes(self, f): return ImageTuple((PILImage.create(f), PILImage.create(self.files[0]), TensorCategory(int(f==self.files[0]))))

def test_pairs_that_a_transform_makes(pics):
    files = get_image_files(pics).sorted()
    tls = TfmdLists(files, Pairs(files), splits=[range(6), range(6,12)])
    dls = tls.dataloaders(bs=4, num_workers=0, after_item=[Resize(64), ToTensor], after_batch=IntToFloatTensor, device='cpu')
    learn = Learner(dls, SiameseModel(), loss_func=CrossEntropyLossFlat())
    xs = [torch.cat([b[i].as_subclass(Tensor) for b in dls.valid]) for i in range(2)]
    for i in range(2):
        hm = learn.get_heatmaps(cls=1, input=i)
        torch.testing.assert_close(hm.maps[:,0], gradcam_of(learn.model, xs, i, 1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(hm.image(5), xs[i][5])
        torch.testing.assert_close(learn.get_heatmaps(files[6:8], cls=1, input=i).maps, hm.maps[:2])

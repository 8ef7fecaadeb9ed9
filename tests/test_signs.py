"The sign of evidence, and where there is none, by hand; and inputs that are no pictures, made under `inference_mode`, or explained into a log file."
import contextlib, io, pytest, sys, warnings
from shared import *
from fastai_heatmaps.core import passes
from fastai_heatmaps.core.tasks import tasks


def correlation(a, b):
    "Of maps (m, h, w)"
    a,b = [o.flatten(1)-o.flatten(1).mean(1, keepdim=True) for o in (a,b)]
    return (a*b).sum(1)/(a.norm(dim=1)*b.norm(dim=1))


def summing(bias, channels=1, size=3):
    "A body that passes its input on, and a head that adds it up, less 5 or so"
    m = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.Sequential(nn.Flatten(), nn.Linear(channels*size*size, 1)))
    m[0].weight.data = torch.eye(channels)[...,None,None]
    m[1][1].weight.data.fill_(1.)
    m[1][1].bias.data.fill_(bias)
    return m


# ---- Ablation-CAM

@pytest.mark.parametrize('bias,share', [(-5., 1/4), (5., 1/6)])
def test_ablationcam_by_hand_on_both_sides_of_zero(bias, share):
    "The bright pixel speaks for its class, whatever the bias is: without it the score 1+bias falls by 1"
    x = torch.zeros(1, 1, 3, 3)
    x[...,1,2] = 1
    maps,y = model_heatmaps(summing(bias), x, cls=0, method='ablationcam', relu=False)
    assert y.item()==1+bias
    torch.testing.assert_close(maps[0,0], share*x[0,0])


def test_ablationcam_of_the_two_classes_of_one_logit(pics):
    "What speaks for one of them speaks against the other"
    learn = pic_learner(pics, loss_func=BCEWithLogitsLossFlat())
    learn.model = create_vision_model(narrow18, 1, pretrained=False)
    maps = learn.get_heatmaps(cls=['Blue_ish', 'Red'], method='ablationcam', relu=False).maps
    assert maps.abs().amax((2,3)).min()>0
    torch.testing.assert_close(maps[:,0], -maps[:,1])


@pytest.mark.slow
def test_ablationcam_of_the_demo_goes_along_with_gradcam(demo):
    x,cls = demo.dls.test_dl([demo_image('cat')]).one_batch()[0].as_subclass(Tensor),list(range(0, 1000, 25))
    (cams,y),(maps,_) = [model_heatmaps(demo.model, x, cls=cls, method=o, relu=False) for o in ('gradcam', 'ablationcam')]
    r,y = correlation(maps[0], cams[0]),y[0,cls]
    assert (y<0).sum()>10 and (y>0).sum()>10
    assert r[y<0].min()>.3 and r[y>0].min()>.3


# ---- EigenCAM and EigenGrad-CAM

def test_eigengradcam_of_a_class_whose_strongest_pattern_is_against_it():
    "Two patterns: -3 in one cell, and 2 in two others, which is weaker (√8) but more in sum. The negative of the first would show what is against the class"
    acts = tensor([[[[3.,0.],[0.,0.]], [[0.,2.],[2.,0.]]]])
    sign = tensor([-1.,1.])[None,:,None,None].expand_as(acts)
    f = heatmap_methods['eigengradcam']
    torch.testing.assert_close(f(acts, sign), tensor([[[0.,2.],[2.,0.]]]))
    torch.testing.assert_close(f(acts, -sign), tensor([[[3.,0.],[0.,0.]]]))
    sign = tensor([-1.,.5])[None,:,None,None].expand_as(acts) # now more is against it than for it
    torch.testing.assert_close(f(acts, sign), tensor([[[-3.,0.],[0.,0.]]]))


def test_eigengradcam_is_not_flat_where_the_evidence_is_for_the_class():
    "In 2000 random maps; only where a class's evidence is negative on the whole may its map be so everywhere"
    gen = torch.Generator().manual_seed(0)
    acts = torch.rand(2000, 1, 3, 3, generator=gen) + .5*torch.rand(2000, 6, 3, 3, generator=gen)
    grads = torch.randn(2000, 6, 1, 1, generator=gen).expand_as(acts)
    maps,total = heatmap_methods['eigengradcam'](acts, grads),(grads*acts).sum((1,2,3))
    flat = ~(maps>0).flatten(1).any(1)
    assert (total>0).sum()>900 and flat.sum()>100 and not flat[total>0].any()
    assert ((maps*(grads*acts).sum(1)).sum((1,2))>=0).all() # each goes along with Σ_k g_k A_k


@pytest.mark.parametrize('method', ['eigencam', 'eigengradcam'])
def test_eigen_methods_of_values_that_are_not_finite(pics, method):
    "One image of a batch has no finite map; its title says so, and the other has its map"
    learn = pic_learner(pics)
    x = first(learn.dls.valid)[0].as_subclass(Tensor)[:2]
    want = model_heatmaps(learn.model, x, cls=0, method=method, relu=False)[0]
    x[0,0,5,5] = torch.nan
    maps,_ = model_heatmaps(learn.model, x, cls=0, method=method, relu=False)
    assert maps[0].isnan().all()
    torch.testing.assert_close(maps[1], want[1])
    with torch.no_grad(): learn.model[0][0].weight[0,0,0,0] = torch.inf
    assert '(no map: its values are not finite)' in learn.get_heatmaps(method=method).title(0)[0]


# ---- numbers, whose evidence has both signs

def number_learner(pics, bias=0.):
    dls = DataBlock((ImageBlock, RegressionBlock), get_items=get_image_files, get_y=lambda f: -1.5, splitter=IndexSplitter(range(6)), item_tfms=Resize(64)).dataloaders(pics, bs=4, num_workers=0, device='cpu')
    set_seed(7)
    body = nn.Sequential(nn.Conv2d(3, 1, 8, 8, bias=False), nn.ReLU())
    body[0].weight.data.fill_(1/192)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1))
    head[2].weight.data.fill_(-1.)
    return Learner(dls, nn.Sequential(body, head), loss_func=MSELossFlat())


def test_a_negative_number_shows_its_evidence(pics):
    "The brighter, the lower: all the evidence is negative, and shown in blue"
    learn = number_learner(pics)
    hm = learn.get_heatmaps()
    assert hm.task=='numbers' and (hm.preds<0).all() and (hm.maps<0).flatten(1).any(1).all()
    assert not any('no evidence' in l for l in hm.title(0)[0])
    ax = learn.show_gradcam(hm.items[0])
    assert ax.images[1].get_cmap().name=='coolwarm' and ax.images[1].get_clim()[0]<0
    torch.testing.assert_close(hm.maps, learn.get_heatmaps(relu=False).maps)
    cut = learn.get_heatmaps(relu=True)
    assert not cut.maps.any() and cut.notes(0)==['(no positive evidence here: try relu=False, or an earlier layer)']


def test_which_tasks_are_signed(learn):
    assert {n: t.signed for n,t in tasks.items()}==dict(numbers=True, pixels=False, classes=False) | {'class': False}
    assert (learn.get_heatmaps(cls=[0,1]).maps>=0).all() and (learn.get_heatmaps(cls=[0,1], relu=False).maps<0).any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_a_map_that_is_cut_off_says_so(pics, tmp_path, dtype):
    "Even after joining, choosing and storing; a map that was empty from the start says so"
    learn = pic_learner(pics)
    learn.model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)))
    with torch.no_grad():
        learn.model[0][0].weight.fill_(1/192)
        learn.model[1][2].weight.copy_(tensor([[1.,1.],[-1.,-1.]]))
    hm = learn.get_heatmaps(cls=[0,1], dtype=dtype, out=tmp_path/'a')[[1,4]]
    assert [hm.notes(1, j) for j in (0,1)]==[[], ['(no positive evidence here: try relu=False, or an earlier layer)']]
    with torch.no_grad(): learn.model[1][2].weight.zero_()
    for relu in (True, False): assert learn.get_heatmaps(relu=relu).notes(0)==['(no evidence here: the map is flat; try an earlier layer)']


# ---- inputs that are no pictures

def table_learner():
    from fastai.tabular.all import TabularDataLoaders, Categorify, Normalize, CategoryBlock, tabular_learner
    df = pd.DataFrame(dict(a=np.arange(20.), c=['x','y']*10, y=['p','q']*10))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['c'], cont_names=['a'], y_names='y', y_block=CategoryBlock, bs=4, valid_idx=range(10,20), device='cpu')
    return tabular_learner(dls, layers=[4], n_out=2),df


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed,self.head = nn.Embedding(50, 4),nn.Linear(4, 2)
    def forward(self, x): return self.head(self.embed(x).mean(1))


def word_learner():
    df = pd.DataFrame(dict(text=['good film', 'bad film']*6))
    block = DataBlock((TransformBlock(type_tfms=lambda o: tensor([len(w) for w in o.split()])), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('text'))
    return Learner(block.dataloaders(df, bs=4, num_workers=0, device='cpu'), Words(), loss_func=CrossEntropyLossFlat()),df


def error(f):
    with pytest.raises(ValueError) as e: f()
    assert '\n' not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize('method', list(heatmap_methods))
def test_vectors(method):
    "An error of one line from every method: for vectors and words"
    flat = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    for model,x in ((flat, torch.rand(2, 12)), (Words().eval(), torch.randint(50, (2, 7)))):
        said = error(lambda: model_heatmaps(model, x, method=method))
        where = ('no default layer',) if heatmap_methods[method].needs in ('activations', 'gradients', 'layer') else ('vision transformers',) if method=='legrad' else ('pictures', str(tuple(x.shape)), 'captum')
        assert all(o in said for o in where)


@pytest.mark.parametrize('make', [table_learner, word_learner])
def test_learners_of_tables_and_texts(make):
    learn,df = make()
    for method in ('saliency', 'smoothgrad', 'integrated_gradients', 'occlusion', 'rise'):
        assert 'pictures' in error(lambda: learn.get_heatmaps(method=method, **quick.get(method, {})))
    for f in (learn.show_gradcam, learn.show_occlusion): assert 'take no images' in error(lambda: f(df.iloc[0]))
    error(learn.plot_heatmap_grid)


def test_a_method_of_ones_own_may_take_vectors():
    def as_picture(x, grads): return (x*grads).view(-1, 3, 4)
    as_picture.needs = 'input'
    net,x = nn.Linear(12, 3),torch.rand(2, 12)
    maps,_ = model_heatmaps(net, x, cls=1, method=as_picture, relu=False)
    torch.testing.assert_close(maps[:,0], (x*net.weight[1]).view(2, 3, 4).detach())


# ---- made under `inference_mode`

def small_net(method):
    if method=='legrad': return net_for(method),64
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))),16


@pytest.mark.parametrize('method', list(heatmap_methods))
def test_inputs_made_under_inference_mode(method):
    "The same maps as for a copy; the inputs stay as they are"
    (net,size),options = small_net(method),{**quick, 'occlusion':{}}.get(method, {})
    with torch.inference_mode(): x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    got,want = [model_heatmaps(net, o, cls=[2,0], method=method, relu=False, **options)[0] for o in (x, x.clone())]
    assert want.any() and x.is_inference()
    torch.testing.assert_close(got, want)
    with torch.inference_mode(): torch.testing.assert_close(model_heatmaps(net, x, cls=[2,0], method=method, relu=False, **options)[0], want)


class Cached(Callback):
    "Gives the model what it kept under `inference_mode`, as a cache of features would"
    def before_batch(self):
        with torch.inference_mode(): self.learn.xb,self.learn.yb = [tuple(o.clone() for o in b) for b in (self.xb, self.yb)]


@pytest.mark.parametrize('method', ['gradcam', 'saliency', 'guided_gradcam', 'smoothgrad', 'integrated_gradients', 'ablationcam', 'smooth_gradcam++'])
def test_a_learner_whose_batches_were_made_under_inference_mode(pics, method):
    learn = pic_learner(pics, size=32)
    learn.model = nn.Sequential(small_net(method)[0][0], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    ask = dict(cls='targ', method=method, relu=False, **quick.get(method, {}))
    want = learn.get_heatmaps(**ask).maps
    learn.add_cb(Cached())
    assert want.any()
    torch.testing.assert_close(learn.get_heatmaps(**ask).maps, want)
    with torch.inference_mode(): torch.testing.assert_close(learn.get_heatmaps(**ask).maps, want)


def test_scores_and_fillings_made_under_inference_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x,m,colour = torch.rand(1, 3, 16, 16),torch.ones(16, 16),torch.rand(3, 1, 1)
    def maps(score, colour): return [model_heatmaps(net, x, cls=1, method=o, score=score, relu=False, **opts)[0] for o,opts in
                                     (('gradcam', {}), ('saliency', {}), ('integrated_gradients', dict(steps=3, baseline=colour)), ('occlusion', dict(fill=colour)))]
    with torch.inference_mode(): score,same = in_mask(m),colour.clone()
    for a,b in zip(maps(score, same), maps(in_mask(m), colour)): torch.testing.assert_close(a, b)


# ---- progress bars

class Terminal(io.StringIO):
    def isatty(self): return True


def printed(f, to):
    with contextlib.redirect_stdout(to): f()
    return to.getvalue()


def test_bars_only_where_a_person_looks(monkeypatch):
    monkeypatch.delenv('PYCHARM_HOSTED', raising=False)
    net,x = small_net('rise')[0],torch.rand(3, 3, 16, 16)
    def run(**kwargs): return lambda: model_heatmaps(net, x, method='rise', n=40, **kwargs)
    assert printed(run(), io.StringIO())=='' and printed(run(), Terminal())!=''
    assert printed(run(bar=False), Terminal())=='' and printed(run(bar=True), io.StringIO())!=''
    monkeypatch.setattr(passes, 'IN_NOTEBOOK', True)
    assert printed(run(), io.StringIO())!=''
    monkeypatch.undo()
    closed = io.StringIO()
    closed.close()
    for out in (None, object(), closed):
        monkeypatch.setattr(sys, 'stdout', out)
        assert not passes.person_looks()


def test_bars_of_a_learner(pics):
    learn = pic_learner(pics, size=32, bs=8)
    learn.model = nn.Sequential(small_net('rise')[0][0], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    def run(): learn.get_heatmaps(method='rise', n=40)
    assert printed(run, io.StringIO())=='' and printed(run, Terminal())!=''
    with learn.no_bar(): assert printed(run, Terminal())==''


@pytest.mark.parametrize('n', [1, 2])
def test_one_bar_for_integrated_gradients(n):
    "For the images, or for the points of the only one"
    net,x = summing(0.),torch.rand(n, 1, 3, 3)
    assert printed(lambda: model_heatmaps(net, x, method='integrated_gradients'), Terminal()).count('100.00%')==1


# ---- integrated gradients across kinks

class Kink(nn.Module):
    "The sum of the pixels, only as far as it is above `at`; and the sum of their squares"
    def __init__(self, at): super().__init__(); self.at,self.seen = at,0
    def forward(self, x):
        if torch.is_grad_enabled(): self.seen += len(x)
        return torch.stack([F.relu(x.sum((1,2,3))-self.at), x.pow(2).sum((1,2,3))], 1)


@pytest.mark.parametrize('at', [.33, .57, .93])
def test_integrated_gradients_across_a_kink_by_hand(at):
    "A pixel's part is its value times the part of the way that lies above the kink. 50 points are 1 to 20 % off"
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    x /= x.sum((1,2,3), keepdim=True)
    net = Kink(at)
    got = model_heatmaps(net, x, cls=[0,1], method='integrated_gradients', relu=False)[0]
    torch.testing.assert_close(got[:,0], ((1-at)*x[:,0]).float(), rtol=.011, atol=0)
    torch.testing.assert_close(got[:,1], (x[:,0]**2).float(), rtol=1e-3, atol=1e-6)
    assert (150 if at==.93 else 100)<=net.seen<=2*400
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net.seen = 0
        fixed = model_heatmaps(net, x, cls=[0,1], method='integrated_gradients', relu=False, steps=50)[0]
    assert net.seen==2*50 and (fixed[:,0].sum((1,2))/(1-at)-1).abs().max()>.01


def test_points_of_integrated_gradients(learn):
    "A smooth way takes 50 points; if one is too rough for 400, a warning says so"
    net,x = Kink(-1.),torch.rand(1, 1, 4, 4)
    model_heatmaps(net, x, cls=0, method='integrated_gradients')
    assert net.seen==50
    class Rough(nn.Module):
        seen = 0
        def forward(self, x):
            if torch.is_grad_enabled(): self.seen += len(x)
            return torch.sin(3000*x).sum((1,2,3))[:,None]
    net = Rough()
    with pytest.warns(UserWarning, match='take more than 3[0-9]0|take more than 400'): model_heatmaps(net, torch.full((1, 1, 2, 2), .9), cls=0, method='integrated_gradients')
    assert 300<net.seen<=400


def test_refined_integrated_gradients_in_chunks_of_any_size():
    net,x = Kink(.7),torch.rand(2, 1, 4, 4)/8
    want = model_heatmaps(net, x, cls=[0,1], method='integrated_gradients', relu=False)[0]
    for bs in (1, 12, 1000): torch.testing.assert_close(model_heatmaps(net, x, cls=[0,1], method='integrated_gradients', relu=False, bs=bs)[0], want)

"Filters are the weights, feature maps what the layers put out, class images what the model takes for the class, and the parts are all of the model."
import pytest
from shared import *
from test_no_trace import state, same, prepare, ways, Bomb, Boom
from fastai_heatmaps.data.images import image_dl
from fastai_heatmaps.learner.run import example_input
from fastai_heatmaps.views.features import get_conv, filter_grid
from fastai_heatmaps.views.class_image import Waves, moved, excite
from fastai_heatmaps.views.architecture import model_parts


def cells(pic, h, w, n, cols):
    "The n pieces of a grid, one number a pixel, whatever the size at which it draws a pixel"
    rows = -(-n//cols)
    k = ((pic.shape[0]-2)//rows-2)//h
    return np.stack([pic[y:y+h*k:k,x:x+w*k:k] for i in range(n) for y,x in [(i//cols*(h*k+2)+2, i%cols*(w*k+2)+2)]])


def drawn(ax): return np.ma.filled(ax.images[0].get_array(), np.nan)


def test_filters_in_rgb_are_the_weights(learn):
    w = learn.model[0][0].weight.detach().numpy() # (64, 3, 7, 7)
    got = cells(drawn(learn.show_filters(same_scale=True)), 7, 7, 64, 8)
    np.testing.assert_allclose((got-.5)*2*np.abs(w).max(), w.transpose(0,2,3,1), atol=1e-6)
    got = cells(drawn(learn.show_filters()), 7, 7, 64, 8)
    for o,f in zip(got, w): np.testing.assert_allclose((o-.5)*2*np.abs(f).max(), f.transpose(1,2,0), atol=1e-6)
    assert np.isclose(np.abs(got-.5).max((1,2,3)), .5).all()


def test_filters_in_grey_are_the_weights(learn):
    ax = learn.show_filters('0.4.0.conv1', n=30) # 5 outputs × 5 inputs would not fill 30, 6 × 5 do
    w = learn.model[0][4][0].conv1.weight.detach().numpy()[:6,:5]
    got = cells(drawn(ax), 3, 3, 30, 5).reshape(6, 5, 3, 3)
    np.testing.assert_allclose(got*np.abs(w).max((2,3), keepdims=True), w, atol=1e-6)
    assert 'rows: output channels 0 to 5, columns: input channels 0 to 4 of 64' in ax.get_title().replace('\n', ' ')
    assert ax.images[0].get_clim()==(-1,1) # 0 is mid-grey


def test_filters_of_other_convolutions():
    depthwise,up = nn.Conv2d(6, 6, 3, groups=6),nn.ConvTranspose2d(4, 2, (2,3))
    pic,shown = filter_grid(depthwise.weight)
    assert shown==(6,1)
    w = depthwise.weight.detach().numpy()[:,0]
    np.testing.assert_allclose(cells(pic, 3, 3, 6, 3)*np.abs(w).max((1,2), keepdims=True), w, atol=1e-6)
    pic,shown = filter_grid(up.weight, same_scale=True)
    w = up.weight.detach().numpy()
    assert shown==(4,2)
    np.testing.assert_allclose(cells(pic, 2, 3, 8, 2).reshape(4, 2, 2, 3)*np.abs(w).max(), w, atol=1e-6)
    one = nn.Conv2d(4, 4, 1).weight
    np.testing.assert_allclose(cells(filter_grid(one)[0], 1, 1, 16, 4).reshape(4,4)*one.abs().max().item(), one.detach()[...,0,0], atol=1e-6)
    assert not np.nan_to_num(filter_grid(torch.zeros(4, 1, 3, 3))[0]).any()


def test_fresh_filters(learn):
    "Beside the weights, others of the same shape, which training has not touched"
    conv = learn.model[0][0]
    with torch.no_grad(): conv.weight.copy_(torch.linspace(-1, 1, conv.weight.numel()).view_as(conv.weight))
    set_seed(3)
    a,b = learn.show_filters(fresh=True, same_scale=True)
    set_seed(3)
    want = nn.Conv2d(3, 64, 7, bias=False).weight.detach().numpy()
    np.testing.assert_allclose((cells(drawn(a), 7, 7, 64, 8)-.5)*2, conv.weight.detach().numpy().transpose(0,2,3,1), atol=1e-5)
    np.testing.assert_allclose((cells(drawn(b), 7, 7, 64, 8)-.5)*2*np.abs(want).max(), want.transpose(0,2,3,1), atol=1e-6)
    assert b.get_title().startswith('freshly initialised')


def test_filters_bad_input(learn):
    for kwargs,msg in [(dict(layer='0.1'), "0.1 is a BatchNorm2d, not a 2d convolution: choose one, such as '0.0', '0.4.0.conv1'"), (dict(layer='0.4.1'), "such as '0.4.1.conv1', '0.4.1.conv2'$"),
                       (dict(layer='0.4.0.conv3'), "the closest names are '0.4.0.conv"), (dict(n=0), 'n is 0'), (dict(layer=nn.Conv2d(3, 4, 3)), 'is not a layer of the model'), (dict(fresh=True, ctx=plt.subplots()[1]), 'expected 2 Axes')]:
        with pytest.raises(ValueError, match=msg): learn.show_filters(**kwargs)
    with pytest.raises(ValueError, match='has no 2d convolution'): get_conv(nn.Linear(2, 2))
    assert get_conv(learn.model, learn.model[0][4][0].conv2)[0]=='0.4.0.conv2'


def outputs(learn, img, *layers):
    "By plain hooks, that copy before an in-place ReLU may change what was put out"
    kept,x = {},image_dl(learn.dls, [img]).one_batch()[0]
    hooks = [learn.model.get_submodule(l).register_forward_hook(lambda m, i, o, l=l: kept.__setitem__(l, o.clone()[0])) for l in layers]
    learn.model.eval()
    with torch.no_grad(): learn.model(x)
    for h in hooks: h.remove()
    return kept


def test_feature_maps_are_the_outputs(learn, pics):
    f,names = get_image_files(pics)[1],['0.6', '0.1', '0.4.0.conv1']
    want,got = outputs(learn, f, *names),learn.get_feature_maps(f, names)
    assert list(got)==['0.1', '0.4.0.conv1', '0.6'] # as they run
    for n in names: torch.testing.assert_close(got[n], want[n].as_subclass(Tensor), rtol=0, atol=0)
    axs = learn.show_feature_maps(f, names, n=5)
    assert axs.shape==(3,5)
    for n,row in zip(got, axs):
        m = want[n].as_subclass(Tensor)
        strongest = m.mean((1,2)).argsort(descending=True)[:5].tolist()
        assert [int(ax.get_title()) for ax in row]==strongest
        for ax,c in zip(row, strongest):
            assert np.array_equal(drawn(ax), m[c]) and ax.images[0].get_clim()==(m[c].min(), m[c].max())


def test_feature_maps_of_chosen_channels(learn, pics):
    f = get_image_files(pics)[1]
    want = outputs(learn, f, '0.0')['0.0'].as_subclass(Tensor)
    axs = learn.show_feature_maps((f, 'Red'), learn.model[0][0], channels=[7,3], same_scale=True)
    for ax,c in zip(axs[0], [7,3]):
        assert np.array_equal(drawn(ax), want[c]) and ax.get_title()==str(c)
        np.testing.assert_allclose(ax.images[0].get_clim(), (want[[3,7]].min(), want[[3,7]].max()))
    assert learn.show_feature_maps(f, '0.0', channels=3).shape==(1,1)
    body = outputs(learn, f, '0')['0']
    assert list(learn.get_feature_maps(f))==['0'] and torch.equal(learn.get_feature_maps(f)['0'], body.as_subclass(Tensor))
    with torch.no_grad(): learn.model[0][0].weight[2] = 0
    assert learn.show_feature_maps(f, '0.0', channels=[2,3])[0,0].get_title()=='2 (flat)'


def test_feature_maps_of_different_numbers(learn, pics):
    f = get_image_files(pics)[0]
    learn.model[0][0] = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 64, 7, stride=2))
    axs = learn.show_feature_maps(f, ['0.0.0', '0.4'], n=6)
    assert [sum(ax is not None for ax in row) for row in axs]==[2,6]


def test_feature_maps_with_the_callbacks_of_inference(learn, pics):
    "What a callback of the user's changes in the input is seen by the layers"
    class Dark(Callback):
        def before_batch(self): self.learn.xb = (self.xb[0]*0,)
    learn.add_cb(Dark())
    assert not learn.get_feature_maps(get_image_files(pics)[0], '0.0')['0.0'].any()


def test_feature_maps_of_tokens(pics):
    from timm.models.vision_transformer import VisionTransformer
    learn = pic_learner(pics)
    learn.model = VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=2)
    f = get_image_files(pics)[0]
    want = outputs(learn, f, 'blocks.1')['blocks.1'].as_subclass(Tensor)
    got = learn.get_feature_maps(f, 'blocks.1')['blocks.1']
    assert torch.equal(got, want[1:].T.reshape(32, 4, 4))


def test_feature_maps_bad_input(learn, pics):
    f = get_image_files(pics)[0]
    for args,kwargs,msg in [((f, '0.77'), {}, 'closest names'), ((f, '1.8'), {}, "1.8 puts out no map: choose a layer"), ((f, '0.0'), dict(channels=64), 'no channel 64 in 0.0: it has 64, 0 to 63'),
                            ((f, '0.0'), dict(channels=[-1]), 'no channel -1'), ((f, '0.0'), dict(channels=[]), 'list of channels is empty'), ((f, '0.0'), dict(n=0), 'n is 0'),
                            (([f, f],), {}, 'expected one image'), (('no.jpg',), {}, "'no.jpg' cannot be read"), ((f, []), {}, 'list of layers is empty')]:
        with pytest.raises(ValueError, match=msg) as e: learn.show_feature_maps(*args, **kwargs)
        assert '\n' not in str(e.value)
    assert not plt.get_fignums()


def test_waves_are_a_picture_of_their_frequencies():
    "One wave alone is a cosine of its frequency; in noise, power sinks with frequency as 1/f^(2 decay)"
    pic = Waves((1, 32, 48), torch.Generator(), decay=1)
    with torch.no_grad():
        pic.waves.zero_()
        pic.waves[0,3,5,0] = .1
        got = pic()[0,0].logit()
    y,x = torch.meshgrid(torch.arange(32.), torch.arange(48.), indexing='ij')
    want = torch.cos(2*math.pi*(3*y/32 + 5*x/48))
    close(got, want)
    for decay in (1, 1.5):
        z = Waves((1, 128, 128), torch.Generator().manual_seed(0), decay=decay)()[0,0].logit().detach()
        power = torch.fft.rfft2(z).abs()**2
        f = (torch.fft.fftfreq(128)[:,None]**2 + torch.fft.rfftfreq(128)**2).sqrt()
        lo,hi = [power[(f>a) & (f<a*1.2)].mean() for a in (.05, .4)]
        assert abs(math.log(lo/hi)/math.log(8) - 2*decay)<.3


def test_colours_are_those_of_photos():
    z = Waves((3, 64, 64), torch.Generator().manual_seed(0))()[0].logit().detach().flatten(1)
    r,g,b = z-z.mean(1, keepdim=True)
    bright,red_blue,green = [o.std().item() for o in ((r+g+b)/3**.5, (r-b)/2**.5, (r-2*g+b)/6**.5)]
    assert bright > red_blue > green
    assert abs(((r+g+b)*(r-b)).mean()/((r+g+b).std()*(r-b).std()))<.3 # decorrelated


def test_moved():
    "A point goes where the formula says; without movement nothing changes"
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(moved(x, torch.Generator(), 0, 0, (1,1)), x)
    x = torch.zeros(1, 1, 101, 101)
    x[0,0,48:53,48:53] = 1 # in the middle
    t,z,dx,dy = (torch.rand(4, generator=torch.Generator().manual_seed(5))*2-1).tolist()
    got = moved(x, torch.Generator().manual_seed(5), shift=.2, turn=0, part=(.7,1.3))[0,0]
    ys,xs = torch.meshgrid(*[torch.arange(101.)]*2, indexing='ij')
    z = 1+z*.3
    want = 50-101*.2*tensor([dy,dx])/z # output position p sees z*p + shift
    torch.testing.assert_close(torch.stack([(got*o).sum()/got.sum() for o in (ys, xs)]), want, atol=.2, rtol=0)
    assert abs(got.sum()-25/z**2)<2


def test_excite_finds_what_is_asked_for():
    "To excite the brightness of one corner's red, the picture turns red there"
    pic = excite(lambda p: p[:,0,:8,:8].mean()-p[:,0,8:,8:].mean()-p[:,1].mean(), (3,16,16), 200)
    assert pic[0,:6,:6].mean()-pic[0,10:,10:].mean()>.4 and pic[0,:6,:6].mean()>pic[1,:6,:6].mean()+.2
    assert pic.min()>=0 and pic.max()<=1 and not pic.requires_grad
    with pytest.raises(ValueError, match='no way'): excite(lambda p: p.detach().mean(), (3,8,8), 2)


@pytest.mark.slow
def test_class_image_raises_the_class(learn):
    "A tiny net that calls red what is more red than blue: its class image is red, through the Normalize of its DataLoaders"
    learn.dls.add_tfms([Normalize.from_stats([.2,.3,.4], [.5,.6,.7], cuda=False)], 'after_batch')
    class Colour(nn.Module):
        def forward(self, x): return torch.stack([x[:,2].mean((1,2)), x[:,0].mean((1,2))], 1)*5
    learn.model = Colour()
    assert list(learn.dls.vocab)==['Blue_ish', 'Red']
    blue,red = learn.get_class_image(['Blue_ish', 'Red'], steps=200)
    assert red[0].mean()>blue[0].mean()+.1 and blue[2].mean()>red[2].mean()+.1
    axs = learn.show_class_image(['Blue_ish', 'Red'], steps=200)
    for ax,pic,c in zip(axs, (blue, red), (0,1)):
        np.testing.assert_allclose(drawn(ax), pic.permute(1,2,0), atol=1e-6)
        mean,std = tensor([.2,.3,.4])[:,None,None],tensor([.5,.6,.7])[:,None,None]
        p = learn.model(((pic-mean)/std)[None]).softmax(1)[0,c]
        assert ax.get_title()==f"{['Blue_ish','Red'][c]} {p:.2f}"


@pytest.mark.slow
def test_class_image_is_reproducible(learn):
    a,b = learn.get_class_image('Red', steps=4, seed=1),learn.get_class_image(['Blue_ish', 'red'], steps=4, seed=1)
    assert a.shape==(1,3,64,64) and torch.equal(a[0], b[1]) and not torch.equal(b[0], b[1])
    assert not torch.equal(a, learn.get_class_image('Red', steps=4, seed=2))
    assert learn.get_class_image(0, steps=1, size=32).shape==(1,3,32,32) and learn.get_class_image(0, steps=1, size=(32,48)).shape==(1,3,32,48)


@pytest.mark.slow
def test_image_of_a_channel(learn):
    "The channel it was made for fires more than for the noise it was made from, and than for the image of another channel"
    def fires(pic, c):
        kept = []
        h = learn.model[0][4].register_forward_hook(lambda m, i, o: kept.append(o))
        learn.model.eval()
        with torch.no_grad(): learn.model(example_input(learn)[1](pic[None]))
        h.remove()
        return kept[0][0,c].mean()
    pics = learn.get_class_image(layer='0.4', channel=[3,6], steps=40)
    start = Waves((3,64,64), torch.Generator().manual_seed(0))().detach()[0]
    for c,mine,other in [(3,*pics), (6,*pics.flip(0))]: assert fires(mine, c)>max(fires(other, c), fires(start, c))
    all_ = learn.get_class_image(layer=learn.model[0][4], steps=10)
    assert all_.shape==(1,3,64,64)
    axs = learn.show_class_image(layer='0.4', channel=[3,6], steps=2)
    assert [ax.get_title() for ax in axs]==['0.4, channel 3', '0.4, channel 6']
    assert learn.show_class_image(layer='0.4', steps=2).get_title()=='0.4'
    assert learn.get_class_image(layer='1.4', channel=511, steps=2).shape==(1,3,64,64) # of a linear layer


def test_class_image_of_other_tasks(pics):
    "One output for two classes; grey images"
    learn = pic_learner(pics, loss_func=BCEWithLogitsLossFlat(), img=ImageBlock(PILImageBW))
    class Bright(nn.Module):
        def forward(self, x): return (x.mean((1,2,3))-.5)[:,None]*9
    learn.model = Bright()
    dark,bright = learn.get_class_image([0,1], steps=100)
    assert dark.shape==(1,64,64) and bright.mean()>.6>.4>dark.mean()
    assert float(learn.show_class_image(0, steps=100).get_title().split()[-1])>.7


def test_class_image_bad_input(learn):
    for kwargs,msg in [({}, 'expected a class, or a layer'), (dict(cls='Red', layer='0.4'), 'expected a class, or a layer'), (dict(cls='Redd'), "closest names are 'Red'"), (dict(cls=2), '0 to 1'), (dict(cls=[]), 'list of classes is empty'),
                       (dict(layer='0.44'), 'closest names'), (dict(layer='0.4', channel=8), 'no channel 8 in 0.4: it has 8, 0 to 7'), (dict(layer='0.4', channel=[]), 'list of channels is empty'), (dict(cls='Red', channel=1), 'of which layer'), (dict(cls='Red', steps=0), 'steps is 0'),
                       (dict(cls=['Red', 'Red']), 'twice'), (dict(cls='Red', ctx=plt.subplots(1, 2)[1]), 'need 1 Axes')]:
        figs = plt.get_fignums()
        with pytest.raises(ValueError, match=msg) as e: learn.show_class_image(**kwargs)
        assert '\n' not in str(e.value)
    assert figs==plt.get_fignums()[:len(figs)]


def test_callers_modes(learn, pics):
    "Under autocast and in inference mode too"
    want = learn.get_class_image('Red', steps=3)
    with torch.inference_mode():
        torch.testing.assert_close(learn.get_class_image('Red', steps=3), want)
        learn.show_feature_maps(get_image_files(pics)[0], n=2)
    with torch.autocast('cpu', torch.bfloat16): torch.testing.assert_close(learn.get_class_image('Red', steps=3), want, atol=.1, rtol=0)


@pytest.mark.slow
def test_class_image_of_the_demo(demo):
    "After a few steps the model is surer of the class than for a photo of it, and for the noise to start from it was not"
    i,prepare = list(demo.dls.vocab).index('espresso'),example_input(demo)[1]
    def p(pic):
        with torch.no_grad(): return demo.model(prepare(pic)).softmax(1)[0,i].item()
    photo = demo.get_heatmaps(demo_image('coffee'), cls='espresso').preds[0,i].item()
    with demo.no_bar(): pic = demo.get_class_image('espresso', steps=48)
    assert p(Waves((3,224,224), torch.Generator().manual_seed(0))())<.01
    assert p(pic)>max(.9, photo)


def test_parts_are_the_whole_model(learn, demo):
    for model,size in [(learn.model, 64), (demo.model, 224)]:
        for depth in (1, 2, 3, None):
            parts = model_parts(model, torch.zeros(1, 3, size, size), depth=depth)
            assert sum(p.numel() for _,m,_,_ in parts for p in m.parameters())==sum(p.numel() for p in model.parameters())
            mods = [o for _,m,_,_ in parts for o in m.modules()]
            assert len(mods)==len(set(mods)) # none inside another
    names = [n for n,*_ in model_parts(learn.model, torch.zeros(1, 3, 64, 64), depth=2)]
    assert names==[f'0.{i}' for i in range(8)]+[f'1.{i}' for i in range(9)]
    assert [(s,hw) for n,_,s,hw in model_parts(learn.model, torch.zeros(1, 3, 64, 64), depth=1)]==[((64,2,2),(2,2)), ((2,),None)]


def test_architecture_says_what_is_so(learn):
    learn.freeze()
    trainable = sum(p.numel() for p in learn.model.parameters() if p.requires_grad)
    ax = learn.show_architecture(depth=2)
    total = sum(p.numel() for p in learn.model.parameters())
    assert ax.get_title()==f'Sequential: {total:,} parameters, {trainable:,} of them trainable' and trainable<total
    texts = [t.get_text() for t in ax.texts]
    rows = [texts[i:i+4] for i in range(0, len(texts), 4)]
    assert rows[:3]==[['name','kind','output','parameters'], ['','image','3×64×64',''], ['0.0','Conv2d','64×32×32','9,408']]
    assert rows[-1]==['1.8','Linear','2','1,024']
    colours = {round(b.get_y()+.85/2): matplotlib.colors.to_hex(b.get_facecolor()) for b in ax.patches if np.isclose(b.get_height(), .85)}
    blue,orange = [[rows[y+1][0] for y,c in colours.items() if c==o] for o in ('#4c78a8', '#e8710a')]
    assert orange==['0.7'] and blue==[f'0.{i}' for i in range(7)] # the end of the body is the default layer
    with pytest.raises(ValueError, match='depth is 0'): learn.show_architecture(depth=0)


calls = dict(filters=lambda l,f: l.show_filters(fresh=True), maps=lambda l,f: l.show_feature_maps(f, ['0.4', '0.0'], n=2), image=lambda l,f: l.show_class_image(['Red', 0], steps=2),
             channel=lambda l,f: l.show_class_image(layer='0.4', channel=[1,2], steps=2), architecture=lambda l,f: l.show_architecture())


@pytest.mark.slow
@pytest.mark.parametrize('call', calls)
@pytest.mark.parametrize('how', ways)
def test_no_trace(learn, pics, how, call):
    prepare(learn.model, how)
    f = get_image_files(pics)[0]
    before = state(learn.model, learn)
    set_seed(1)
    want = random.random(),np.random.rand(),torch.rand(1)
    set_seed(1)
    calls[call](learn, f)
    assert want==(random.random(),np.random.rand(),torch.rand(1))
    same(before, state(learn.model, learn))
    assert not any(v.grad_fn is not None for v in learn.model.buffers())


@pytest.mark.parametrize('what', [Boom, KeyboardInterrupt])
@pytest.mark.parametrize('call', [o for o in calls if o!='filters'])
def test_no_trace_after_an_error(learn, pics, call, what):
    learn.model[1].insert(3, Bomb(what))
    prepare(learn.model, 'mixed')
    before = state(learn.model, learn)
    with pytest.raises(what): calls[call](learn, get_image_files(pics)[0])
    same(before, state(learn.model, learn))
    assert not plt.get_fignums()


def test_images_opened_by_a_function_of_ones_own(pics):
    "It knows its own items, and no others: so the first of the validation set shows how large images are"
    class Read(Transform):
        def encodes(self, fn:Path): return TensorImage(image2tensor(Image.open(fn).convert('RGB').resize((64,48))))
    learn = pic_learner(pics)
    learn.dls = DataBlock((TransformBlock(type_tfms=Read(), batch_tfms=IntToFloatTensor()), CategoryBlock), get_items=get_image_files, get_y=label, splitter=IndexSplitter(range(6))).dataloaders(pics, bs=2, num_workers=0, device='cpu')
    assert '3×48×64' in [t.get_text() for t in learn.show_architecture().texts]
    assert learn.get_class_image('Red', steps=2).shape==(1,3,48,64)


def test_a_model_for_one_size_without_resizing(tmp_path):
    "Only a photo has the right size; where there is none, or none is asked, one line says so"
    for i in range(4): Image.new('RGB', (18,16), (60*i,)*3).save(tmp_path/f'{"ab"[i%2]}_{i}.png')
    dls = DataBlock((ImageBlock, CategoryBlock(vocab=['a','b'])), get_items=get_image_files, get_y=label, splitter=IndexSplitter([0,1])).dataloaders(tmp_path, bs=2, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)), loss_func=CrossEntropyLossFlat())
    assert '3×16×18' in [t.get_text() for t in learn.show_architecture().texts]
    assert learn.get_class_image('a', steps=2, size=(16,18)).shape==(1,3,16,18)
    learn.export(tmp_path/'learn.pkl')
    exported = load_learner(tmp_path/'learn.pkl')
    for f in (exported.show_architecture, partial(learn.get_class_image, 'a', steps=2), partial(learn.get_heatmaps, np.zeros((32,32,3), np.uint8)), partial(model_heatmaps, learn.model, torch.rand(1, 3, 32, 32))):
        with pytest.raises(ValueError, match='a linear layer of the model gets [0-9]+ numbers and takes 288: ') as e: f()
        assert '\n' not in str(e.value)

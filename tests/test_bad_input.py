"Whatever is wrong is told in one line that says what to do, as the kind of error that was promised."
import pickle, pytest
from fastai.tabular.all import TabularDataLoaders, tabular_learner, Categorify
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_text_classifier
from shared import *


def fails(f, *words, kind=ValueError):
    "`f` raises `kind` with one line that has all of `words`"
    with pytest.raises(kind) as e: f()
    msg = str(e.value)
    assert '\n' not in msg and len(msg)<600, msg
    for w in words: assert w in msg, msg


@pytest.fixture
def photo(pics): return get_image_files(pics)[0]


def test_class(learn, photo):
    fails(lambda: learn.show_gradcam(photo, cls='blue'), "no class 'blue'", "'Blue_ish'")
    fails(lambda: learn.show_gradcam(photo, cls=2), 'no class 2', '0 to 1')
    fails(lambda: learn.show_gradcam(photo, cls=-1), 'no class -1', '0 to 1')
    fails(lambda: learn.show_gradcam(photo, cls=1.5), 'a name or an index')
    fails(lambda: learn.show_gradcam(photo, cls=True), 'a name or an index')
    fails(lambda: learn.show_gradcam(photo, cls=['red', 'Red']), 'twice')
    fails(lambda: learn.show_gradcam(photo, cls=['Red', 1]), 'twice')
    fails(lambda: learn.show_gradcam(photo, cls=[]), 'empty')
    fails(lambda: learn.show_gradcam(photo, cls='targ'), 'needs the true classes')
    fails(lambda: learn.show_gradcam(photo, topk=3), 'topk is 3', '1 to 2')
    fails(lambda: learn.get_heatmaps([photo]*3, cls=tensor([0,1])), '2 indices for 3')
    fails(lambda: learn.get_heatmaps(photo, cls=tensor([0,1])), '2 indices for 1')
    assert learn.get_heatmaps(photo, cls=range(2)).cls.tolist()==[[0,1]]
    fails(lambda: learn.show_gradcam((photo, 'Green')), "no class 'Green'")


def test_method(learn, photo):
    for name in ('??', 3):
        with pytest.raises(ValueError) as e: learn.show_heatmap(photo, method=name)
        first,*table = str(e.value).splitlines()
        assert f'no method {name!r}' in first and table==repr(heatmap_methods).splitlines() and len(table)==len(heatmap_methods)+1
    fails(lambda: learn.show_heatmap(photo, method='GradCam++'), "did you mean 'gradcam++' or ")
    fails(lambda: learn.show_heatmap(photo, method=lambda a, g: a.mean()), 'expected a map (n, h, w)')
    fails(lambda: learn.show_heatmap(photo, method=lambda a, g: None), 'expected a map')
    fails(lambda: heatmap_method('x', needs='everything'), "needs is 'everything'")


bad_options = [('finercam', dict(n=0), 'n is 0'), ('finercam', dict(others=['Red','Blue_ish']), 'among them the class'), ('finercam', dict(others='Green'), "no class 'Green'"),
               ('smooth_gradcam++', dict(n=0), 'n is 0'), ('smoothgrad', dict(n=0), 'n is 0'), ('integrated_gradients', dict(steps=0), 'steps is 0'), ('integrated_gradients', dict(baseline='black'), "fill is 'black'"),
               ('occlusion', dict(window=0), 'window is 0'), ('occlusion', dict(window='big'), "window is 'big'"), ('occlusion', dict(window=8, stride=9), 'never be covered'), ('occlusion', dict(stride=-1), 'stride is -1'),
               ('occlusion', dict(fill=[1,2]), 'fill is [1, 2]'), ('rise', dict(n=1), 'n is 1'), ('rise', dict(p=1.), 'p 1.0'), ('rise', dict(cells=0), 'cells 0'), ('scorecam', dict(channels=0), 'channels is 0')]

@pytest.mark.parametrize('method,options,words', bad_options)
def test_options(learn, photo, method, options, words):
    fails(lambda: learn.show_heatmap(photo, cls='Red', method=method, **options), words)


@pytest.mark.slow
@pytest.mark.parametrize('method', list(heatmap_methods))
def test_every_method(pics, photo, method):
    "What any method says to bad input"
    learn = learner_for(method, pics)
    opts = quick.get(method, {})
    def show(img=photo, **kwargs): return learn.show_heatmap(img, method=method, **{**opts, **kwargs})
    fails(lambda: show(cls='blue'), "no class 'blue'")
    fails(lambda: show(cls=[0,0]), 'twice')
    fails(lambda: show('no_such.jpg'), 'No such file')
    fails(lambda: show(depth=3), f"the method '{method}' has no option 'depth'")
    fails(lambda: learn.get_heatmaps([photo]*3, cls=tensor([0,1]), method=method, **opts), '2 indices for 3')
    fails(lambda: model_heatmaps(learn.model, torch.rand(1, 1, 64, 64), method=method, **opts), *(['1 channels'] if method!='legrad' else ['1 channels']))
    fails(lambda: model_heatmaps(learn.model, torch.zeros(0, 3, 64, 64), method=method, **opts), 'the batch is empty')
    fails(lambda: model_heatmaps(learn.model, torch.rand(1, 3, 64, 64), method=method, bs=0, **opts), 'bs is 0')
    if heatmap_methods[method].needs in ('input', 'model'): fails(lambda: show(layer='0.5'), 'looks at no layer')
    else: fails(lambda: show(layer='0.77'), "no layer '0.77'")


def test_whole_numbers_have_no_gradients():
    class Scale(nn.Module):
        def forward(self, x): return x/255
    net = nn.Sequential(Scale(), create_vision_model(narrow18, 2, pretrained=False))
    fails(lambda: model_heatmaps(net, torch.zeros(1, 3, 64, 64, dtype=torch.uint8), method='saliency'), 'torch.uint8', 'no gradients')


def test_methods_for_other_models(learn, photo):
    fails(lambda: learn.show_heatmap(photo, method='cam'), 'one linear layer', "use 'gradcam'")
    fails(lambda: learn.show_heatmap(photo, method='legrad'), 'no attention', "such as 'gradcam'")
    learn.loss_func = MSELossFlat()
    fails(lambda: model_heatmaps(create_vision_model(narrow18, 1, pretrained=False), torch.rand(1, 3, 64, 64), method='finercam'), 'one output')
    with pytest.warns(UserWarning, match='calls no ReLU'): model_heatmaps(net_for('legrad'), torch.rand(1, 3, 64, 64), method='guided_backprop')


def test_layer(learn, photo):
    fails(lambda: learn.show_gradcam(photo, layer='0.77'), "no layer '0.77'", 'closest')
    fails(lambda: learn.show_gradcam(photo, layer=nn.Linear(1,1)), 'is not a layer of the model')
    fails(lambda: learn.show_gradcam(photo, layer=[]), 'empty')
    fails(lambda: learn.show_gradcam(photo, layer='1.4'), "layer '1.4' puts out (1, 512)", "'0.7'")
    learn.model.add_module('unused', nn.Conv2d(3, 3, 1))
    learn.model.forward = lambda x: learn.model[1](learn.model[0](x))
    fails(lambda: learn.show_gradcam(photo, layer='unused'), "layer 'unused' did not run")


def test_a_layer_that_the_output_does_not_depend_on():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.fc = nn.Conv2d(3, 4, 3),nn.Conv2d(3, 4, 3),nn.Linear(4, 2)
        def forward(self, x): self.b(x); return self.fc(self.a(x).mean((2,3)))
    fails(lambda: model_heatmaps(Net(), torch.rand(1, 3, 9, 9), layer='b'), 'no way from there')
    assert model_heatmaps(Net(), torch.rand(1, 3, 9, 9), layer='a')[0].shape==(1,1,7,7)


def test_a_map_of_one_cell_warns(learn):
    with pytest.warns(UserWarning, match='1×1'): model_heatmaps(learn.model, torch.rand(1, 3, 32, 32))


def test_files(learn, photo, tmp_path):
    text,cut = tmp_path/'notes.jpg',tmp_path/'cut.png'
    text.write_text('no picture')
    cut.write_bytes(photo.read_bytes()[:1000])
    fails(lambda: learn.show_gradcam(text), 'notes.jpg', 'cannot be read as an image')
    fails(lambda: learn.show_gradcam(cut), 'cut.png', 'cannot be read as an image')
    fails(lambda: learn.show_gradcam('no_such.jpg'), 'no_such.jpg', 'No such file')
    fails(lambda: learn.show_gradcam(tmp_path), str(tmp_path), 'it is a folder', 'get_image_files')
    fails(lambda: learn.show_gradcam(b'abc'), 'bytes input cannot be read')
    fails(lambda: learn.show_gradcam(3), 'int input cannot be read', 'learn.dls.valid_ds[3]')
    fails(lambda: learn.plot_heatmap_grid(4), 'items is 4', 'pass n=4')
    fails(lambda: learn.show_gradcam(torch.rand(3, 9, 9)), 'expected uint8')
    fails(lambda: learn.show_gradcam(np.zeros((2,3,9,9), dtype=np.uint8)), 'cannot be read')


@pytest.mark.slow
def test_a_bad_file_in_a_worker_process(pics, photo, tmp_path):
    "More images than a batch are opened by worker processes; their errors come back as one line too"
    learn = pic_learner(pics)
    learn.dls.valid.fake_l.num_workers = 2
    bad = tmp_path/'bad.jpg'
    bad.write_text('no picture')
    assert len(learn.get_heatmaps([photo]*9))==9
    fails(lambda: learn.get_heatmaps([photo]*8+[bad]), "bad.jpg' cannot be read as an image: cannot identify")


def test_items(learn, photo):
    fails(lambda: learn.get_heatmaps([]), 'pass at least one')
    fails(lambda: learn.show_gradcam([photo, photo]), 'expected one image', 'plot_heatmap_grid')
    fails(lambda: learn.plot_heatmap_grid([]), 'pass at least one')
    fails(lambda: model_heatmaps(learn.model, torch.zeros(0, 3, 64, 64)), 'the batch is empty')
    hm = learn.get_heatmaps([photo, photo], cls=['Red', 'Blue_ish'])
    fails(lambda: hm.show(0, ctx=plt.gca()), '2 classes need 2 Axes')
    fails(lambda: learn.get_heatmaps(dl=learn.dls.test_dl([photo]), cls='targ'), "cls='targ' needs one true class")
    fails(lambda: learn.get_heatmaps((photo, photo)), 'a tuple is one item', 'as a list')
    fails(lambda: learn.get_heatmaps((photo, 1, 2)), 'a tuple is one item')
    fails(lambda: learn.get_heatmaps(photo, bs=0), 'bs is 0')
    fails(lambda: learn.get_heatmaps(ds_idx=2), 'no set 2')
    fails(lambda: learn.get_heatmaps(dl=learn.dls), 'expected a DataLoader')
    fails(lambda: learn.get_heatmaps(dl=[1]), 'expected a DataLoader')
    fails(lambda: learn.plot_heatmap_grid(n=0), 'n is 0')
    fails(lambda: model_heatmaps(learn.model, torch.rand(3, 64, 64)), 'expected a batch', '(3, 64, 64)')
    fails(lambda: model_heatmaps(learn.model, np.zeros((1,3,64,64))), 'expected a batch', 'ndarray')
    fails(lambda: learn.show_gradcam(Image.new('RGB', (0,4))), 'no pixels')


def test_plain_dataloaders_out_of_order():
    ds = [(torch.rand(3, 64, 64), i%2) for i in range(6)]
    def dl(**kwargs): return torch.utils.data.DataLoader(ds, 4, **kwargs)
    learn = Learner(DataLoaders(dl(), dl()), create_vision_model(narrow18, 2, pretrained=False), loss_func=nn.CrossEntropyLoss())
    fails(lambda: learn.get_heatmaps(dl=dl(shuffle=True)), 'shuffle=False')
    fails(lambda: learn.get_heatmaps(dl=dl(sampler=torch.utils.data.SubsetRandomSampler([1,3]))), 'shuffle=False')
    fails(lambda: learn.get_heatmaps(dl=torch.utils.data.DataLoader(ds, 4, drop_last=True)), '4 images for 6')
    fails(lambda: learn.plot_heatmap_grid(), 'get_heatmaps')


def test_outputs_that_do_not_fit(learn, photo):
    class Squeeze(nn.Module):
        def forward(self, x): return x.squeeze()
    model = learn.model
    fails(lambda: model_heatmaps(nn.Sequential(model[0], nn.Sequential(model[1], Squeeze())), torch.rand(1, 3, 64, 64)), "output is (2,)", 'n is 1')
    learn.model = create_vision_model(narrow18, 3, pretrained=False)
    fails(lambda: learn.show_gradcam(photo), '3 outputs', '2 names')


def test_a_figure_that_fails_is_closed(learn, photo):
    for kwargs in (dict(cmap='nope'), dict(interpolation='nope'), dict(alpha=3)):
        with pytest.raises(ValueError): learn.show_gradcam(photo, **kwargs)
        with pytest.raises(ValueError): learn.plot_heatmap_grid(n=2, **kwargs)
    assert not plt.get_fignums()


def test_channels(learn):
    fails(lambda: model_heatmaps(learn.model, torch.rand(1, 1, 64, 64)), '1 channels', 'takes 3', 'n_in=1')
    fails(lambda: model_heatmaps(learn.model, torch.rand(1, 3, 64, 64).double()), 'are torch.float64', 'x.to(torch.float32)')
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    fails(lambda: model_heatmaps(flat, torch.rand(1, 3, 2, 2), method='saliency'), 'are torch.float32', 'x.to(torch.float64)')


def test_channels_of_a_learner(pics, photo):
    learn = pic_learner(pics)
    learn.model = create_vision_model(narrow18, 2, pretrained=False, n_in=4)
    fails(lambda: learn.show_gradcam(photo), '3 channels', 'takes 4')


def test_outputs():
    conv = nn.Conv2d(3, 5, 3)
    fails(lambda: model_heatmaps(nn.Sequential(conv, nn.Flatten(0)), torch.rand(2, 3, 9, 9)), '(490,)', '(n, c)')
    class Pair(nn.Module):
        def __init__(self): super().__init__(); self.conv = conv
        def forward(self, x): return self.conv(x).mean((2,3)),0
    fails(lambda: model_heatmaps(Pair(), torch.rand(2, 3, 9, 9)), 'tuple', '(n, c)')


def test_models_without_a_map():
    import pandas as pd
    df = pd.DataFrame(dict(a=['x','y']*8, y=['p','q']*8))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['a'], y_names='y', bs=4, valid_idx=range(4), device='cpu')
    learn = tabular_learner(dls)
    fails(lambda: learn.get_heatmaps(), 'no layer of this TabularModel', 'convolutional body')
    fails(lambda: learn.show_gradcam('x.jpg'), 'Learner')
    text = get_text_classifier(AWD_LSTM, 20, 2, config=dict(emb_sz=8, n_hid=8, n_layers=1, pad_token=1, bidir=False, output_p=.1, hidden_p=.1, input_p=.1, embed_p=.1, weight_p=.1))
    fails(lambda: model_heatmaps(text, torch.randint(0, 20, (2, 12))), 'convolutional body')
    flat = nn.Sequential(nn.Flatten(), nn.Linear(27, 2))
    fails(lambda: model_heatmaps(flat, torch.rand(1, 3, 3, 3)), 'convolutional body')


def test_an_exported_learner_has_no_set(learn, photo, tmp_path):
    learn.path = tmp_path
    learn.export()
    new = load_learner(tmp_path/'export.pkl')
    fails(lambda: new.get_heatmaps(), 'exported', 'pass some as `items`')
    fails(lambda: new.plot_heatmap_grid(), 'no images')


def test_nothing_is_silently_zero(learn, photo):
    "A flat map is drawn as zeros and says so; a repeated or missing class never gives one"
    def silent(acts, grads): return acts.sum(1)*0
    hm = learn.get_heatmaps(photo, method=silent)
    ax = hm.show()
    assert 'no evidence' in ax.get_title() and np.isfinite(ax.images[1].get_array()).all()
    fig = ax.figure
    fig.canvas.draw()

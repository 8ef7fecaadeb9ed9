"All the kinds of images, DataLoaders and Learners that people have."
import pickle, pandas as pd, pytest
from shared import *


class PILRGBA(PILImage): _open_args = {'mode': 'RGBA'}


def maps_by_hand(learn, x, c):
    "Grad-CAM of one decoded batch, the long way round"
    learn.model.eval()
    acts = learn.model[0](x).detach().as_subclass(Tensor).requires_grad_()
    learn.model[1](acts)[0,c].backward()
    learn.model.zero_grad()
    return F.relu((acts.grad.mean((2,3), keepdim=True)*acts).sum(1)).detach()


def check(learn, img, c=1):
    "`img` gives the map that the Learner's own transforms and model give, and can be drawn"
    x, = learn.dls.test_dl([open_image(img, learn.dls.valid_ds.tls[0].types[-1])], num_workers=0).one_batch()
    hm = learn.get_heatmaps(img, cls=c)
    torch.testing.assert_close(hm.maps[0], maps_by_hand(learn, x, c), rtol=1e-3, atol=1e-6)
    with learn.no_bar(): want = learn.predict(open_image(img, learn.dls.valid_ds.tls[0].types[-1]))[2]
    torch.testing.assert_close(hm.preds[0], want.as_subclass(Tensor), rtol=1e-3, atol=1e-5)
    ax = hm.show()
    ax.figure.canvas.draw()
    shown = ax.images[0].get_array()
    assert shown.shape[:2]==x.shape[2:]
    return hm,x


def test_what_stands_for_an_image(learn, pics):
    f = get_image_files(pics).sorted()[0]
    im = PILImage.create(f)
    arr = np.array(im)
    want,_ = check(learn, f)
    chw = TensorImage(torch.tensor(arr).permute(2,0,1))
    for o in (str(f), f.read_bytes(), im, Image.open(f), arr, torch.tensor(arr), chw, (f, 'Red'), (im, TensorCategory(1))):
        torch.testing.assert_close(learn.get_heatmaps(o, cls=1).maps, want.maps)
        torch.testing.assert_close(learn.get_heatmaps([o, o], cls=1).maps[1:], want.maps, rtol=1e-4, atol=1e-6)


def test_items_of_a_dataset_bring_their_label(learn, pics):
    item = learn.dls.valid_ds[2]
    hm = learn.get_heatmaps([item, (item[0], 'Blue_ish')], cls='targ')
    assert hm.targs.tolist()==[int(item[1]), 0] and hm.cls[:,0].tolist()==hm.targs.tolist()
    assert f'truth: {learn.dls.vocab[item[1]]}' in learn.show_gradcam(item).get_title()


class PILFromNumpy(PILImage):
    "An image class that opens its own kind of file, as those for DICOM do"
    @classmethod
    def create(cls, fn, **kwargs): return cls(Image.fromarray(np.load(fn)))


def open_npy(fn): return TensorImage(np.load(fn)).permute(2,0,1).float()/255


def test_own_image_classes_and_functions(pics, tmp_path):
    for f in get_image_files(pics): np.save(tmp_path/f'{f.stem}.npy', np.array(PILImage.create(f).resize((64,64))))
    files = get_files(tmp_path, extensions='.npy').sorted()
    for block in (ImageBlock(PILFromNumpy), TransformBlock(type_tfms=open_npy)):
        set_seed(7)
        dls = DataBlock((block, CategoryBlock), get_y=label, splitter=IndexSplitter(range(0, 12, 2))).dataloaders(files, bs=4, num_workers=0, device='cpu')
        learn = Learner(dls, create_vision_model(narrow18, 2, pretrained=False), loss_func=CrossEntropyLossFlat())
        hm = learn.get_heatmaps(files[0], cls=0)
        torch.testing.assert_close(hm.maps[0], learn.get_heatmaps(cls=0).maps[0], rtol=1e-4, atol=1e-6)
        learn.show_gradcam(files[0])


def test_heatmaps_and_their_dataloader_can_be_pickled(learn, pics):
    "Worker processes that are spawned, as on Windows and macOS, get the DataLoader as a pickle"
    hm = learn.get_heatmaps(list(get_image_files(pics)))
    new = pickle.loads(pickle.dumps(hm))
    torch.testing.assert_close(new.maps, hm.maps)
    torch.testing.assert_close(new.image(3), hm.image(3))


def test_an_unknown_loss_gives_no_probabilities(pics):
    learn = pic_learner(pics, loss_func=lambda p, t: F.cross_entropy(p, t))
    hm = learn.get_heatmaps(cls='Red')
    learn.model.eval()
    torch.testing.assert_close(hm.preds[:4], learn.model(first(learn.dls.valid)[0]).detach().as_subclass(Tensor), rtol=1e-3, atol=1e-5)
    hm.preds[0] = tensor([-1.,2.])
    assert hm.title(0)[0][0].split()[0]=='Red' and '2.00' not in hm.title(0)[0][0]


def test_validation_set(learn):
    hm = learn.get_heatmaps(cls='targ')
    with learn.no_bar(): preds,targs = learn.get_preds()
    torch.testing.assert_close(hm.preds, preds.as_subclass(Tensor))
    assert hm.targs.tolist()==targs.tolist()==hm.cls[:,0].tolist() and hm.items==learn.dls.valid_ds.items
    for i,f in enumerate(hm.items): torch.testing.assert_close(hm.maps[i], learn.get_heatmaps(f, cls=int(targs[i])).maps[0], rtol=1e-4, atol=1e-6)


def test_training_set_with_validation_transforms(pics):
    learn = pic_learner(pics, batch_tfms=aug_transforms())
    a,b = learn.get_heatmaps(ds_idx=0),learn.get_heatmaps(ds_idx=0)
    assert len(a)==6 and a.items==learn.dls.train_ds.items
    torch.testing.assert_close(a.maps, b.maps)


def test_own_dataloader_and_batch_size(learn, pics):
    files = get_image_files(pics).sorted()
    dl = learn.dls.test_dl(files, bs=5, num_workers=0)
    hm = learn.get_heatmaps(dl=dl, cls=0)
    torch.testing.assert_close(hm.maps, learn.get_heatmaps(list(files), cls=0, bs=3).maps, rtol=1e-4, atol=1e-6)
    assert hm.items==files and hm.targs is None


def test_a_shuffled_dataloader_comes_in_the_order_of_its_set(learn):
    hm = learn.get_heatmaps(dl=learn.dls.valid.new(shuffle=True))
    torch.testing.assert_close(hm.maps, learn.get_heatmaps().maps)
    assert hm.targs.tolist()==learn.get_heatmaps().targs.tolist()


@pytest.mark.parametrize('cls,n_in,mode', [(PILImageBW, 1, 'L'), (PILImage, 3, 'RGB'), (PILRGBA, 4, 'RGBA')])
def test_channels(pics, cls, n_in, mode):
    set_seed(7)
    dls = pic_block(img=ImageBlock(cls), get_items=get_image_files).dataloaders(pics, bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, create_vision_model(narrow18, 2, pretrained=False, n_in=n_in), loss_func=CrossEntropyLossFlat())
    f = get_image_files(pics).sorted()[0]
    hm,x = check(learn, f)
    assert x.shape[1]==n_in
    for o in ('L', 'RGB', 'RGBA', 'CMYK'): assert learn.get_heatmaps(Image.open(f).convert(o)).maps.shape==hm.maps.shape
    learn.plot_heatmap_grid()


@pytest.mark.slow
def test_dataframe_folder_function_and_without_resize(pics, tmp_path):
    files = get_image_files(pics).sorted()
    df = pd.DataFrame(dict(name=[f.name for f in files], label=[label(f) for f in files], valid=[i%2==0 for i in range(12)]))
    for f in files:
        to = tmp_path/['train','valid'][int(f.stem[-1])//2%2]/label(f)/f.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(f.read_bytes())
    kw = dict(bs=4, num_workers=0, device='cpu', item_tfms=Resize(64))
    for dls in (ImageDataLoaders.from_df(df, pics, valid_col='valid', label_col='label', **kw),
                ImageDataLoaders.from_folder(tmp_path, valid='valid', **kw),
                ImageDataLoaders.from_name_func(pics, files, lambda o: label(o), valid_pct=.5, seed=1, **kw),
                ImageDataLoaders.from_path_func(pics, files, label, valid_pct=.5, seed=1, **kw)):
        set_seed(7)
        learn = vision_learner(dls, narrow18, pretrained=False, normalize=False)
        check(learn, files[0])
        hm = learn.get_heatmaps()
        assert len(hm)==len(dls.valid_ds) and len(hm.items)==len(hm)
        learn.plot_heatmap_grid(n=2, seed=0)


def test_normalize_is_undone_in_the_picture(pics):
    f = get_image_files(pics).sorted()[1]
    for tfms in ((), [Normalize.from_stats(*imagenet_stats)]):
        hm,_ = check(pic_learner(pics, batch_tfms=tfms, size=(48,80)), f)
        want = torch.tensor(np.array(Resize((48,80))(PILImage.create(f), split_idx=1))).permute(2,0,1)/255
        torch.testing.assert_close(hm.image(0), want, rtol=0, atol=1.01/255) # fastai's decoding rounds down to whole values


def test_items_of_different_sizes(pics):
    "Without a transform that makes them equal, one at a time"
    set_seed(7)
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=label, splitter=IndexSplitter(range(6)))
    dls = block.dataloaders(pics, bs=1, num_workers=0, device='cpu')
    learn = vision_learner(dls, narrow18, pretrained=False, normalize=False)
    big,small = Image.new('RGB', (200,100)),Image.new('RGB', (70,60))
    hm = learn.get_heatmaps([big, small], cls=[0,1])
    assert [tuple(m.shape) for m in hm.maps]==[(2,4,7), (2,2,3)] and hm[1:].maps[0].shape==(2,2,3)
    hm.plot()
    assert isinstance(learn.get_heatmaps([small, small]).maps, Tensor)


class Bf16(Callback):
    "Mixed precision as fastai's own callback does it, which only knows CUDA"
    order = 10
    def before_batch(self):
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.autocast.__enter__()
    def after_pred(self): self.learn.pred = to_float(self.pred)
    def after_loss(self): self.autocast.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize('cbs', [MixedPrecision(amp_mode='bf16'), ChannelsLast(), Bf16()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('method', list(heatmap_methods))
def test_callbacks_of_the_learner_apply(pics, cbs, method):
    plain,learn = pic_learner(pics),pic_learner(pics, cbs=cbs)
    if method in ('cam', 'legrad'): plain.model = learn.model = net_for(method, 2)
    a,b = [o.get_heatmaps(cls=1, method=method, relu=False, **quick.get(method, {})) for o in (plain, learn)]
    assert b.maps.dtype==b.preds.dtype==torch.float32
    if isinstance(cbs, Bf16): # two or three digits
        assert not torch.equal(a.preds, b.preds)
        sim = F.cosine_similarity(a.maps.flatten(1), b.maps.flatten(1))
        assert (sim>(.9 if method=='ablationcam' else .95)).all() # whose weights are small differences of scores
    else: torch.testing.assert_close(a.maps, b.maps, rtol=1e-3, atol=1e-4*float(a.maps.abs().max()))


def test_under_the_callers_autocast():
    set_seed(7)
    model,xb = create_vision_model(narrow18, 3, pretrained=False),torch.randn(2, 3, 64, 64)
    want,_ = model_heatmaps(model, xb, cls=1, relu=False)
    with torch.autocast('cpu', torch.bfloat16): got,preds = model_heatmaps(model, xb, cls=1, relu=False)
    assert got.dtype==torch.float32 and preds.dtype==torch.bfloat16
    assert (F.cosine_similarity(want.flatten(1), got.flatten(1))>.95).all()


def test_an_exported_learner(learn, pics, tmp_path):
    f = get_image_files(pics)[0]
    want = learn.get_heatmaps(f, cls='Red')
    learn.path = tmp_path
    learn.export()
    new = load_learner(tmp_path/'export.pkl')
    torch.testing.assert_close(new.get_heatmaps(f, cls='red').maps, want.maps)
    assert new.show_gradcam(f).get_title()
    new.plot_heatmap_grid([f, (f, 'Red')])


@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy(), FocalLossFlat()])
def test_probabilities_whatever_the_loss(pics, loss):
    learn = pic_learner(pics, loss_func=loss)
    hm = learn.get_heatmaps()
    assert torch.allclose(hm.preds.sum(1), torch.ones(6))
    with learn.no_bar(): want = learn.model.eval()(first(learn.dls.valid)[0]).softmax(1)
    torch.testing.assert_close(hm.preds[:4], want.detach().as_subclass(Tensor), rtol=1e-3, atol=1e-5)


class XRay(nn.Module):
    "A hand-written ResNet for X-rays: blocks, then a convolution as large as the map, then a sigmoid"
    def __init__(self, sigmoid=True):
        super().__init__()
        def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
        self.resnet_blocks = nn.Sequential(block(3, 8), block(8, 12), block(12, 16))
        self.classifier = nn.Sequential(nn.Conv2d(16, 1, 8, bias=False), nn.Dropout(.2), *[nn.Sigmoid()][:sigmoid])
    def forward(self, x): return self.classifier(self.resnet_blocks(x))


def test_one_output_for_two_classes(pics):
    "It speaks for the second class, and with a minus for the first; the body is found without being named"
    set_seed(7)
    dls = pic_block(get_items=get_image_files).dataloaders(pics, bs=4, num_workers=0, device='cpu')
    model,f = XRay(),get_image_files(pics)[0]
    p = model.eval()(first(dls.test_dl([f]))[0]).flatten()[0].item()
    for loss in (nn.BCELoss(), BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss()):
        learn = Learner(dls, model, loss_func=loss)
        both = learn.get_heatmaps(f, cls=['Blue_ish', 'Red'], relu=False)
        torch.testing.assert_close(both.maps[0,0], -both.maps[0,1])
        want = p if isinstance(loss, nn.BCELoss) else torch.tensor(p).sigmoid().item()
        assert both.preds[0].tolist()==pytest.approx([1-want, want], abs=1e-4)
        assert int(learn.get_heatmaps(f).cls)==int(want>.5)
    maps,preds = model_heatmaps(model, torch.rand(2, 3, 64, 64))
    assert maps.shape==(2,1,8,8) and preds.shape==(2,1)
    acts = model.resnet_blocks(torch.ones(1, 3, 64, 64)).detach().requires_grad_()
    model.classifier(acts).sum().backward()
    want = (acts.grad.mean((2,3), keepdim=True)*acts).sum(1).detach()
    torch.testing.assert_close(model_heatmaps(model, torch.ones(1, 3, 64, 64), relu=False)[0][0], want)
    for layer in ('resnet_blocks.1', model.resnet_blocks[0]): assert model_heatmaps(model, torch.rand(1, 3, 64, 64), layer=layer)[0].shape[2]>8


def test_a_dataloader_with_an_order_of_its_own(learn):
    class Shuffled(TfmdDL):
        def get_idxs(self):
            idxs = super().get_idxs()
            random.shuffle(idxs)
            return idxs
    hm,want = learn.get_heatmaps(dl=learn.dls.valid.new(cls=Shuffled), cls=0),learn.get_heatmaps(cls=0)
    assert sorted(hm.idxs)==want.idxs
    for i,j in enumerate(hm.idxs):
        torch.testing.assert_close(hm.maps[i], want.maps[j], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(hm.image(i), want.image(j))
        assert hm.items[i]==want.items[j] and hm.targs[i]==want.targs[j]


@pytest.mark.slow
def test_worker_processes_that_are_spawned(pics):
    "As on Windows and macOS: what they need travels as a pickle"
    learn = pic_learner(pics)
    learn.dls.valid = learn.dls.valid.new(num_workers=1)
    files,old = list(get_image_files(pics))[:6],torch.multiprocessing.get_start_method()
    want = learn.get_heatmaps(files[:4], cls=0)
    torch.multiprocessing.set_start_method('spawn', force=True)
    try: torch.testing.assert_close(learn.get_heatmaps(files, cls=0).maps[:4], want.maps, rtol=1e-4, atol=1e-6)
    finally: torch.multiprocessing.set_start_method(old, force=True)


def test_a_part_before_the_network(pics):
    "A grey-to-RGB convolution or a normalisation in front of a network is not its body"
    net = create_vision_model(narrow18, 3, pretrained=False).eval()
    x = torch.rand(1, 1, 96, 96)
    grey = nn.Sequential(nn.Conv2d(1, 3, 1), net).eval()
    torch.testing.assert_close(model_heatmaps(grey, x, cls=1)[0], model_heatmaps(net, grey[0](x).detach(), cls=1)[0])
    assert model_heatmaps(nn.Sequential(net, nn.Softmax(1)), torch.rand(1, 3, 96, 96))[0].shape==(1,1,3,3)
    assert model_heatmaps(nn.Sequential(models.resnet18(weights=None), nn.Linear(1000, 5)), torch.rand(1, 3, 96, 96))[0].shape==(1,1,3,3)


def test_a_vocab_of_numbers(pics):
    "A number is an entry of the vocab if the vocab holds it, and an index otherwise"
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda o: 3 if 'Red' in o.name else 7,
                    splitter=IndexSplitter(range(6)), item_tfms=Resize(64)).dataloaders(pics, bs=4, num_workers=0, device='cpu')
    learn = vision_learner(dls, narrow18, pretrained=False, normalize=False)
    f = get_image_files(pics)[0]
    assert [int(learn.get_heatmaps(f, cls=o).cls) for o in (3, 7, 0, 1)]==[0, 1, 0, 1]
    x,y = dls.valid_ds[0] # a tensor is an index all the same
    assert int(learn.get_heatmaps(x, cls=y).cls)==int(learn.get_heatmaps(x, cls=y[None]).cls)==int(learn.get_heatmaps((x,y), cls='targ').cls)==int(y)


def test_ways_to_name_classes(learn, pics):
    f = get_image_files(pics)[0]
    for cls in (['Blue_ish','Red'], learn.dls.vocab, np.array(['blue_ish','RED']), pd.Series([0,1]), (o for o in (0,1)), range(2), L(0,1), {0:1, 1:1}):
        assert learn.get_heatmaps(f, cls=cls).cls.tolist()==[[0,1]]
    assert learn.get_heatmaps([f,f], cls=np.array([1,0])).cls.tolist()==[[1],[0]]
    for cls in (np.int64(1), np.str_('red'), torch.tensor(1), 1): assert learn.get_heatmaps(f, cls=cls).cls.tolist()==[[1]]


@pytest.mark.slow
@pytest.mark.parametrize('arch,layer', [(partial(models.vgg11, init_weights=False), None), (models.alexnet, None), (models.squeezenet1_1, None), (models.densenet121, 'features.denseblock3'),
                                        (models.mobilenet_v2, 'features.12'), (models.resnet18, 'layer2.0.bn1')])
def test_plain_models_and_inner_layers(arch, layer):
    "Activations and gradients are those of an ordinary backward pass, in models that are no Sequential(body, head)"
    set_seed(7)
    model,x = arch(weights=None, num_classes=4).eval(),torch.randn(2, 3, 96, 112)
    maps,preds = model_heatmaps(model, x, cls=2, layer=layer, relu=False)
    m,kept = find_layers(model, layer, x)[0],{}
    assert not isinstance(m, nn.AdaptiveAvgPool2d)
    def keep(m, i, o):
        kept['acts'] = o.clone()
        o.retain_grad()
        kept['out'] = o
        return o.clone()
    h = m.register_forward_hook(keep)
    model(x.requires_grad_())[:,2].sum().backward()
    h.remove()
    torch.testing.assert_close(maps[:,0], (kept['out'].grad.mean((2,3), keepdim=True)*kept['acts']).sum(1).detach(), rtol=1e-3, atol=1e-6)


def test_a_plain_pytorch_dataloader():
    set_seed(7)
    ds = [(torch.rand(3, 64, 64), i%2) for i in range(6)]
    dls = DataLoaders(torch.utils.data.DataLoader(ds, 4), torch.utils.data.DataLoader(ds, 4))
    learn = Learner(dls, create_vision_model(narrow18, 2, pretrained=False), loss_func=nn.CrossEntropyLoss())
    hm = learn.get_heatmaps(cls='targ')
    assert hm.maps.shape==(6,1,2,2) and hm.targs.tolist()==[0,1]*3
    hm.plot()
    with pytest.raises(ValueError, match='use model_heatmaps'): learn.show_gradcam(Image.new('RGB', (64,64)))

"Photos that were stored turned: one warning says so, and they are turned on request."
import warnings
from shared import *
import fastai_heatmaps.cli.main as cli
from fastai_heatmaps.data.images import image_dl, is_turned, OpenImage


@pytest.fixture(scope='module')
def scene():
    "(48, 80, 3): four quarters in different greys, so that every turn and mirroring shows"
    a = np.zeros((48,80,3), dtype=np.uint8)
    for i,(y,x) in enumerate([(0,0), (0,40), (24,0), (24,40)]): a[y:y+24,x:x+40] = 60*i+20
    return a


def stored(scene, o):
    "What a camera held as in orientation `o` stores: the definition of the tag, by where row 0 and column 0 are"
    row,col = {1: 'tl', 2: 'tr', 3: 'br', 4: 'bl', 5: 'lt', 6: 'rt', 7: 'rb', 8: 'lb'}[o]
    a = scene
    if row in 'lr': a = a.swapaxes(0, 1) # the 0th row is a side of the scene
    if row in 'br': a = a[::-1]
    if col in 'rb': a = a[:,::-1]
    return a


@pytest.fixture(scope='module')
def photos(scene, tmp_path_factory):
    "Orientation -> a JPEG of the scene, stored so"
    path,res = tmp_path_factory.mktemp('phone'),{}
    for o in range(1, 9):
        exif = Image.Exif()
        exif[0x0112],exif[0x010f] = o,'maker'
        res[o] = path/f'{o}.jpg'
        Image.fromarray(stored(scene, o)).save(res[o], quality=95, exif=exif)
    return res


@pytest.fixture(scope='module')
def small(pics):
    "A Learner that sees whole pictures, as they are"
    return pic_learner(pics, squeezenet1_1, size=(48,80))


class Both(Module):
    "Two pictures by one model"
    def __init__(self, model): self.model = model
    def forward(self, a, b): return self.model(a)+self.model(b)


def near(a, scene): return a.shape==scene.shape and abs(np.asarray(a, dtype=float)-scene).max()<12 # but for JPEG


def told(f, n=1):
    "`f()` warns `n` times that photos lie on their side"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        res = f()
    got = [str(o.message) for o in w if 'lie on their side' in str(o.message)]
    assert len(got)==n and all('upright=True' in o and '\n' not in o for o in got), [str(o.message) for o in w]
    return res


@pytest.mark.parametrize('o', range(1, 9))
def test_open_image(photos, scene, o):
    "As it was stored, as fastai does; or upright, from bytes or an image too, in any class; and turned once, not twice"
    f = photos[o]
    im = open_image(f)
    assert near(np.array(im), stored(scene, o)) and is_turned(im)==(o!=1)
    assert (np.array(im)==np.array(PILImage.create(f))).all()
    for src in (f, str(f), f.read_bytes(), Image.open(f)):
        up = open_image(src, upright=True)
        assert type(up) is PILImage and near(np.array(up), scene) and not is_turned(up)
        assert near(np.array(open_image(up, upright=True)), scene)
    bw = open_image(f, PILImageBW, upright=True)
    assert type(bw) is PILImageBW and bw.mode=='L' and near(np.array(bw), scene[...,0])


def test_other_files(scene, tmp_path):
    "PNG and WebP keep the orientation likewise; Pillow turns a TIFF itself; damaged EXIF data and meaningless values do no harm"
    exif = Image.Exif()
    exif[0x0112] = 6
    im = Image.fromarray(stored(scene, 6))
    for kind in ('png', 'webp'):
        im.save(tmp_path/f'a.{kind}', exif=exif, lossless=True)
        assert near(np.array(open_image(tmp_path/f'a.{kind}')), stored(scene, 6))
        assert near(np.array(open_image(tmp_path/f'a.{kind}', upright=True)), scene)
    im.save(tmp_path/'a.tif', tiffinfo={0x0112: 6})
    for up in (False, True): assert near(np.array(open_image(tmp_path/'a.tif', upright=up)), scene)
    exif[0x0112] = 9
    for data in (b'Exif\x00\x00nonsense', b'Exif\x00\x00II*\x00\xff\xff\xff\x7f', exif):
        im.save(tmp_path/'b.jpg', quality=95, exif=data)
        for up in (False, True): assert near(np.array(open_image(tmp_path/'b.jpg', upright=up)), stored(scene, 6))


def test_told_once(photos, small):
    "One warning a run, however many photos were stored turned; and none if none were, or if the user opened them"
    files = list(photos.values())
    hm = told(lambda: small.get_heatmaps(files))
    told(lambda: [hm.images.image(i) for i in range(8)], 0) # seen again
    told(lambda: small.show_gradcam(files[5]))
    told(lambda: small.get_heatmaps([files[0]]*3 + [files[3].read_bytes()]))
    told(lambda: small.get_heatmaps([files[0]]*3), 0)
    told(lambda: small.get_heatmaps([open_image(o, upright=True) for o in files]), 0)
    told(lambda: small.get_heatmaps([Image.open(o) for o in files]), 0)


class Turn(Transform):
    "A user's own, of any place among the transforms"
    def encodes(self, o:Image.Image): return open_image(o, upright=True)

@pytest.mark.parametrize('block', ['one', 'two'])
def test_told_of_sets(photos, block):
    "The sets of a Learner, whose photos it opens itself: one warning a run; none where none were stored turned, or the user's transforms turn them"
    get_x = dict(one=[noop], two=[noop, noop])[block]
    def learner(files, **kwargs):
        blocks = (ImageBlock,)*len(get_x) + (CategoryBlock,)
        block = DataBlock(blocks, getters=[*get_x, lambda o: 'a'], n_inp=len(get_x), splitter=IndexSplitter(range(4)), **kwargs)
        model = create_vision_model(squeezenet1_1, 1, pretrained=False)
        model = model if len(get_x)==1 else Both(model)
        return Learner(block.dataloaders(files, bs=2, num_workers=0, device='cpu'), model, loss_func=MSELossFlat())
    turned = [photos[o] for o in (1,1,8,3,1,1)]
    learn = learner(turned, item_tfms=Resize(48))
    before = str(learn.dls.valid.after_item)
    hm = told(learn.get_heatmaps)
    told(learn.get_heatmaps)
    told(lambda: learn.get_heatmaps(dl=hm.dl))
    told(lambda: learn.get_heatmaps(ds_idx=0), 0)
    told(lambda: learn.get_heatmaps(dl=learn.dls.test_dl(turned)))
    assert str(learn.dls.valid.after_item)==before
    told(learner([photos[1]]*6, item_tfms=Resize(48)).get_heatmaps, 0)
    told(learner(turned, item_tfms=[Turn, Resize(48)]).get_heatmaps, 0)


def opener(dl):
    opens, = [o for o in dl.dataset.tls[0].tfms.fs if isinstance(o, OpenImage)]
    return opens


@pytest.mark.slow
def test_told_by_workers(photos, pics):
    "One photo of 40, opened by a worker: this process warns once, and the file that they share is closed again"
    learn = pic_learner(pics, squeezenet1_1)
    dl = image_dl(learn.dls, [photos[1]]*37 + [photos[6]] + [photos[1]]*2).new(num_workers=2)
    note = opener(dl).note
    note.met.share_memory_() # as `image_dl` does where there are workers
    told(lambda: learn.get_heatmaps(dl=dl))
    assert not note.met.is_shared()
    block = DataBlock((ImageBlock, CategoryBlock), get_y=lambda o: o.stem=='1', splitter=RandomSplitter(seed=1), item_tfms=Resize(64))
    learn.dls = block.dataloaders([*photos.values()]*5, bs=2, num_workers=2, device='cpu')
    told(learn.get_heatmaps)


def test_shared_where_there_are_workers(photos, small):
    for n in (0, 2):
        dls = DataLoaders(*[o.new(num_workers=n) for o in small.dls.loaders])
        assert opener(image_dl(dls, [photos[1]]*9)).note.met.is_shared()==(n>0)


@pytest.fixture
def call(photos, small, tmp_path, monkeypatch, capsys):
    "Call the command on the eight photos with `small`; return its exit code and what it prints on stderr"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, '_open_learner', lambda a: small)
    def _call(command, *args):
        with small.no_bar(): rc = cli.main([command, 'a.pkl', *[str(photos[o]) for o in photos], '--quiet', '--bs', '4', *args])
        return rc,capsys.readouterr()[1]
    return _call


@pytest.mark.slow
def test_command_line(call, photos, small, scene, tmp_path):
    "One line says so and what to do; with --upright all eight are the same photo: as input, as original, as numbers and in a grid"
    def overlays(out): return [np.array(Image.open(o)) for o in sorted(Path(out).glob('*-overlay.png'))]
    rc,err = call('gradcam', '--cls', 'Red', '--out', 'a')
    assert rc==0 and err.count('\n')==1 and 'warning: ' in err and 'lie on their side' in err and 'add --upright' in err, err
    assert np.abs(np.subtract(*[o.astype(float) for o in overlays('a')[:2]])).max()>15 # mirrored
    for args in ((), ('--on', 'original')):
        assert call('gradcam', '--cls', 'Red', '--out', f'b{len(args)}', '--upright', *args)==(0, '')
        first,*others = [o.astype(float) for o in overlays(f'b{len(args)}')]
        assert len(others)==7 and first.shape==(48,80,3) and all(np.abs(o-first).max()<10 for o in others)
    assert call('gradcam', '--cls', 'Red', '--out', 'c', '--format', 'npz', '--upright')==(0, '')
    hm = load_heatmaps('c', image_dl(small.dls, list(photos.values()), 4, upright=True))
    want = small.get_heatmaps([open_image(o, upright=True) for o in photos.values()], cls='Red')
    torch.testing.assert_close(hm.maps, want.maps)
    for i in range(8): assert near(255*hm.images.image(i).permute(1, 2, 0).numpy(), scene)
    rc,err = call('gradcam', '--cls', 'Red', '--out', 'c', '--format', 'npz')
    assert rc==1 and 'another run: upright was True and is False' in err
    assert call('grid', '--cls', 'Red', '--out', 'd.png', '--upright')==(0, '')
    rc,err = call('grid', '--cls', 'Red', '--out', 'e.png')
    assert rc==0 and 'add --upright' in err and not np.array_equal(*[np.array(Image.open(o).resize((200,200))) for o in ('d.png', 'e.png')])


def test_a_learner_that_opens_images_itself(photos, small):
    "Its own function would have to turn them, and the error says so"
    class Mine(TensorImage): pass
    dls = DataBlock((TransformBlock(type_tfms=lambda o: Mine(image2tensor(PILImage.create(o)))), CategoryBlock), get_items=lambda _: list(photos.values()), get_y=lambda o: 'ab'[int(o.stem)%2],
                    splitter=IndexSplitter([0,1])).dataloaders('', bs=2, num_workers=0)
    with pytest.raises(ValueError, match='leave upright out'): image_dl(dls, [photos[6]], upright=True)

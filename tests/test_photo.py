"Maps on the original photo: transforms that move pictures but no points are found out; large photos take little memory; pictures follow a plain formula."
import io
import PIL.ImageChops, PIL.ImageFilter, PIL.ImageOps
import pytest
from shared import *
from fastai_heatmaps.data.images import to_images
from fastai_heatmaps.data.photo import original


def some_photos():
    "20 photos of several sizes: noise, soft shapes, flat ones, ones that are the same mirrored or turned, stripes, nearly black"
    rng,res = np.random.default_rng(0),[]
    def soft(h, w): return np.array(Image.fromarray(rng.integers(0, 255, (5,6,3), dtype=np.uint8)).resize((w,h), Image.BICUBIC))
    for i in range(4):
        h,w = 240+20*i,320-30*i
        y,x = np.ogrid[-1:1:h*1j,-1:1:w*1j]
        rings = np.repeat(np.uint8(127+120*np.sin(9*np.hypot(y, x)))[...,None], 3, 2)
        half = soft(h, w)
        res += [rng.integers(0, 255, (h,w,3), dtype=np.uint8), soft(h, w), np.full((h,w,3), 60*i, np.uint8), np.maximum(half, half[:,::-1]), rings]
    return [PILImage.create(o) for o in res]


class Pic(Transform):
    "Change pictures, and no points"
    order = 0
    def __init__(self, f): self.f = f
    def encodes(self, x:PILImage): return PILImage(self.f(x))


def photo_dl(ims, item_tfms=(), batch_tfms=(), train=False, img=ImageBlock):
    dls = DataBlock(img, get_x=noop, splitter=IndexSplitter(range_of(ims)), item_tfms=item_tfms, batch_tfms=batch_tfms).dataloaders(ims*2, bs=1, num_workers=0, device='cpu')
    return dls.train if train else dls.valid


def heatmaps(dl, n=1):
    return Heatmaps(torch.rand(n, 1, 7, 7), tensor([[0]]*n), tensor([[1.,0.]]*n), images=Images(dl, range(n)))


def accepted(dl, n):
    "For each photo, is a map laid on it?"
    hm = heatmaps(dl, n)
    def ok(i):
        try: return hm.view(i, 'original', limit=64) is not None
        except ValueError as e:
            assert 'moves pictures but no points' in str(e) or 'cannot find the photo' in str(e)
            return False
    return [ok(i) for i in range(n)]


def scaled(k, x=0, y=0): return lambda im: im.transform(im.size, Image.AFFINE, (k, 0, im.width*(1-k)/2+x, 0, k, im.height*(1-k)/2+y), Image.BILINEAR)
def cropped(k): return lambda im: im.crop((im.width*(1-k)//2, im.height*(1-k)//2, im.width*(1+k)//2, im.height*(1+k)//2))

moves = {
    'mirrored': PIL.ImageOps.mirror, 'upside down': PIL.ImageOps.flip, **{f'{d} px': scaled(1, d) for d in (5, 10, 25, 60)}, '8 px down': scaled(1, 0, 8), 'rolled': lambda im: PIL.ImageChops.offset(im, 30, 0),
    **{f'{k:.0%} of it': cropped(k) for k in (.95, .9, .8)}, 'turned': lambda im: im.transpose(Image.Transpose.ROTATE_90), 'turned round': lambda im: im.transpose(Image.Transpose.ROTATE_180),
    'larger': scaled(1/1.1), 'smaller': scaled(1.1), 'turned a little': lambda im: im.rotate(5),
}

@pytest.mark.parametrize('name', moves)
def test_transforms_that_move_pictures_only_are_refused(name):
    "On all photos, even those that look the same afterwards"
    ims = some_photos()
    assert not any(accepted(photo_dl(ims, [Pic(moves[name]), Resize(224)]), len(ims)))


def by_value(f): return lambda im: Image.fromarray(np.uint8(np.clip(f(np.float32(im)), 0, 255)))

colours = {
    'inverted': PIL.ImageOps.invert, 'grey': lambda im: im.convert('L').convert('RGB'), 'solarised': PIL.ImageOps.solarize, 'equalised': PIL.ImageOps.equalize, 'stretched': PIL.ImageOps.autocontrast,
    'two levels': lambda im: PIL.ImageOps.posterize(im, 1), 'black or white': by_value(lambda a: 255*(a>200)), 'brighter': by_value(lambda a: a+120), 'darker': by_value(lambda a: a/4), 'contrast': by_value(lambda a: 4*a-380),
    'gamma': by_value(lambda a: 255*(a/255)**3), 'swapped': by_value(lambda a: a[...,::-1]), 'red only': by_value(lambda a: a*[1,0,0]), 'noisy': by_value(lambda a: a+np.random.default_rng(0).normal(0, 30, a.shape)),
    'sharper': lambda im: im.filter(PIL.ImageFilter.UnsharpMask()), 'softer': lambda im: im.filter(PIL.ImageFilter.GaussianBlur(1)),
}

@pytest.mark.parametrize('name', colours)
def test_transforms_of_colours_are_accepted(name):
    "On all photos, and the points stay where they are"
    ims = some_photos()
    dl = photo_dl(ims, [Pic(colours[name]), Resize(224)])
    assert all(accepted(dl, len(ims)))
    assert torch.equal(original(dl, 0)[1], original(photo_dl(ims, Resize(224)), 0)[1])


geometries = {
    **{str(o): Resize((96,128), *o) for o in [('crop',), ('squish',), ('pad','zeros'), ('pad','reflection'), ('pad','border')]}, 'ratio': RatioResize(128), 'presized': RandomResizedCrop(96), 'random crop': RandomCrop(100),
    'cropped': CropPad(104), 'padded': CropPad(400), 'dihedral item': [DihedralItem(1.), Resize(96)], 'tiny': Resize(16), 'as it is': (),
}
batches = {
    'flip': Flip(1.), 'dihedral': Dihedral(1.), 'rotate': Rotate(20, p=1.), 'zoom': Zoom(max_zoom=1.5, p=1.), 'warp': Warp(.3, p=1.), 'erase': RandomErasing(p=1., sl=.2, sh=.3), 'crop GPU': RandomResizedCropGPU(80), 'lighting': [Brightness(.5, p=1.), Contrast(.5, p=1.)],
    'hue': [Hue(p=1.), Saturation(p=1.)], 'all': [*aug_transforms(size=96), Normalize.from_stats(*imagenet_stats)],
}

@pytest.mark.slow
@pytest.mark.parametrize('train', [False, True])
def test_fastai_transforms_are_accepted(train):
    "For validation, and for training if it is one draw that is asked about"
    set_seed(0)
    ims = some_photos()[1:5]
    for name,o in [*geometries.items(), *((n, [Resize(128), b]) for n,b in batches.items())]:
        item,batch = (o[:1],o[1:]) if name in batches else (o,())
        dl = photo_dl(ims, item, sum(map(listify, batch), []), train)
        for i in range(len(ims)): assert original(dl, i), name


def test_other_kinds_of_photos():
    "Grey ones, tiny ones, very wide ones"
    rng = np.random.default_rng(0)
    for size in [(28,28), (8,8), (40,2000), (3000,30)]:
        im = rng.integers(0, 255, size, dtype=np.uint8)
        for block,im in (ImageBlock, PILImage.create(im)), (ImageBlock(PILImageBW), PILImageBW.create(im)):
            for method in ('crop', 'pad', 'squish'): assert original(photo_dl([im], Resize(64, method), img=block), 0)[0].size==size[::-1]


class Trim(Transform):
    "Cuts off the dark edges of a photo, and moves points too"
    order = 0
    def __call__(self, b, **kwargs):
        self.box = b[0].point(lambda o: 255*(o>100)).getbbox() if isinstance(b, tuple) else self.box
        return super().__call__(b, **kwargs)
    def encodes(self, x:PILImage): return PILImage(x.crop(self.box))
    def encodes(self, x:TensorPoint): return x.crop_pad((self.box[2]-self.box[0], self.box[3]-self.box[1]), self.box[:2], orig_sz=x.sz)


def test_points_that_move_by_what_the_photo_shows():
    "The marked picture judges the transforms, and the points are those of the photo"
    im = np.zeros((100,200,3), np.uint8)
    im[20:80,50:110] = 255
    grid = original(photo_dl([PILImage.create(im)], [Trim(), Resize(60)]), 0)[1]
    at = F.grid_sample(grid, tensor([[[[-.5,-.6],[.1,.6]]]]), align_corners=True) # the corners of what is bright
    torch.testing.assert_close(at[0,:,0], tensor([[-1.,1.],[-1.,1.]]), atol=1e-4, rtol=0)


def test_photos_that_lie_on_their_side(tmp_path):
    "A transform that turns pictures as their EXIF says turns the marked picture, too"
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (60,40), 'red').save(tmp_path/'a.jpg', exif=exif)
    dl = photo_dl([tmp_path/'a.jpg'], [Pic(PIL.ImageOps.exif_transpose), Resize(32)])
    with pytest.raises(ValueError, match='moves pictures but no points'): original(dl, 0)


def test_transforms_of_a_training():
    "If they move photos at random, nobody knows any longer where they took one; otherwise they are accepted"
    ims = some_photos()[:2]
    for tfms in [(RandomResizedCrop(64, min_scale=.5),()), (Resize(64, 'squish'),Flip(p=.5)), (Resize(64, 'squish'),Rotate(10, p=.5))]:
        for i in range(2):
            with pytest.raises(ValueError, match='in the same way each time'): heatmaps(photo_dl(ims, *tfms, train=True), 2).view(i, 'original')
    for tfms in [(Resize(64, 'squish'),()), (Resize(64, 'squish'),[Brightness(p=.5), Flip(p=1.)])]:
        assert heatmaps(photo_dl(ims, *tfms, train=True)).view(0, 'original')


def test_without_photos():
    hm = heatmaps(None).replace(images=Images(idxs=[0], names=['a']))
    with pytest.raises(ValueError, match='load_heatmaps'): hm.view(0, 'original')


def plain_pictures(img, m, style, vmin, vmax):
    "The three pictures by a plain formula, 0 to 255: `img` (H, W, 3) and `m` (H, W) in full"
    seen = np.isfinite(m)
    grey = np.clip((np.where(seen, m, 0)-vmin)/(vmax-vmin), 0, 1)
    cmap = dict(fade=('plasma', 'coolwarm'), even=('magma', 'RdBu_r'))[style][vmin<0]
    alpha = .6 if style=='even' else .7*np.clip(abs(np.where(seen, m, 0))/vmax, 0, 1)[...,None]
    colours,seen = plt.get_cmap(cmap)(grey)[...,:3],seen[...,None]
    return dict(map=255*grey, heatmap=255*colours*seen, overlay=255*np.where(seen, alpha*colours+(1-alpha)*img, img))


@pytest.mark.parametrize('on', ['input', 'original'])
@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('fmt,style', [('png','fade'), ('png','even'), ('jpg','fade'), ('webp','fade')])
def test_saved_pictures(tmp_path, on, signed, fmt, style):
    "Two maps an image, on a photo of several strips: the same pixels as by the plain formula"
    im = PILImage.create(np.random.default_rng(0).integers(0, 255, (6,9,3), dtype=np.uint8)).resize((900,600), Image.BICUBIC)
    set_seed(1)
    maps = torch.rand(1, 2, 5, 5) - .5*signed
    hm = Heatmaps(maps, tensor([[0,1]]), tensor([[.6,.4]]), images=Images(photo_dl([PILImage(im)], Resize(112)), [0]))
    hm.save(tmp_path, fmt, on, interpolation='bilinear', style=style)
    img,laid = hm.view(0, on, 'bilinear')
    if on=='input': laid = F.interpolate(laid[None], img.shape[1:], mode='bilinear')[0]
    for j,scale in enumerate(hm.scales()(0)):
        want = plain_pictures(img.permute(1, 2, 0).numpy(), laid[j].numpy(), style, **scale)
        for k,a in want.items():
            got = np.float32(Image.open(tmp_path/f'image0-{j}-{k}.{fmt}').convert('L' if k=='map' else 'RGB'))
            diff = np.abs(got-a)
            if k=='overlay' and style=='fade': # has a line
                away = ~near_line(laid[j], scale['vmax'], 5)
                assert away.mean()>.3
                diff *= away[...,None]
            assert got.shape==a.shape and (diff.max()<2.5 if fmt=='png' else diff.mean()<3), (k, diff.max(), diff.mean())
    if fmt=='png': assert {Image.open(o).mode for o in tmp_path.glob('*.png')}=={'L','RGB'}


@pytest.mark.parametrize('on', ['original', 'input'])
@pytest.mark.parametrize('kw', [dict(), dict(interpolation='nearest'), dict(style='even')])
def test_saved_as_it_is_shown(tmp_path, on, kw):
    "A figure of 400 pixels a 4 inches has the same pixels as the file, with the line, dashed where it is against"
    im = PILImage.create(np.full((400,600,3), 120, np.uint8))
    maps = 2*torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(1))-1
    hm = Heatmaps(maps, tensor([[0]]), tensor([[.6,.4]]), images=Images(photo_dl([im], Resize((400,600))), [0]))
    hm.save(tmp_path, on=on, **kw)
    fig = plt.figure(figsize=(6,4), dpi=100)
    ax = hm.show(ctx=fig.add_axes([0, 0, 1, 1]), on=on, **kw)
    ax.set_title('')
    fig.canvas.draw()
    shown,saved = np.asarray(fig.canvas.buffer_rgba())[...,:3].astype(float),np.float32(Image.open(tmp_path/'image0-0-overlay.png'))
    diff = np.abs(shown-saved).max(2)
    assert diff.mean()<2 and (diff>40).mean()<.015 # cells may end a pixel apart
    bright = (saved.min(2)>230).mean()
    assert (bright>.001)==(kw.get('style')!='even')
    assert abs((shown.min(2)>230).mean()-bright)<.001


def test_saving_leaves_the_photo_as_it_is(tmp_path):
    im = PILImage.create(np.full((50,70,3), 90, np.uint8))
    heatmaps(photo_dl([im], Resize(32))).save(tmp_path, on='original')
    assert (np.array(im)==90).all()


def test_plot_looks_at_the_scale_once(pics, learn, monkeypatch):
    hm,calls,scales = learn.get_heatmaps(method='activations'),[],Heatmaps.scales
    monkeypatch.setattr(Heatmaps, 'scales', lambda self, *args: calls.append(args) or scales(self, *args))
    axs = hm.plot(cmap='viridis', same_scale=True)
    assert len(hm)>3 and calls==[(True,)]
    drawn = [ax.images[1] for ax in axs.flat if len(ax.images)>1]
    assert len(drawn)==len(hm) and len({o.get_clim() for o in drawn})==1 and {o.get_cmap().name for o in drawn}=={'viridis'}


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the kernel does not tell the memory')
def test_memory_of_a_large_photo(forked, tmp_path):
    "At most three times the pixels of the photo, besides the photo itself"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (30,45,3), dtype=np.uint8)).resize((4500,3000)).save(tmp_path/'photo.jpg')
    script = Path(__file__).parent.parent/'benchmarks'/'original.py'
    rc,printed = forked(script, 'png', tmp_path/'photo.jpg', tmp_path, '1')
    assert rc==0, printed[-2000:]
    mb = float(printed.split()[-3])
    assert mb < 4*4500*3000*3/1e6

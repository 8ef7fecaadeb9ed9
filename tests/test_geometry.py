"Maps on the original photo: a bright mark at a known place, seen by a model that sees brightness, is where it was on the photo, whatever the transforms do to the photo."
import pytest
from shared import *
from fastai_heatmaps.data.photo import original, on_photo


class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 4, stride=4, bias=False)
        nn.init.constant_(self.conv.weight, 1/48)
    def forward(self, x): return self.conv(x)


def bright_learner(folder, item_tfms, batch_tfms=(), size=(120,200), mark=(slice(48,60), slice(80,96)), img=ImageBlock):
    "A Learner whose activations are the brightness of cells of 4×4 pixels, on photos with a mark"
    for i in range(4):
        im = np.zeros((*size, 3), dtype=np.uint8)
        im[mark] = 255
        Image.fromarray(im).save(folder/f'{"ab"[i%2]}_{i}.png')
    dls = DataBlock((img, CategoryBlock(vocab=['a','b'])), get_items=get_image_files, get_y=label, splitter=IndexSplitter([0,1]), item_tfms=item_tfms, batch_tfms=batch_tfms).dataloaders(folder, bs=2, num_workers=0, device='cpu')
    return Learner(dls, nn.Sequential(Brightness(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))), loss_func=CrossEntropyLossFlat())


def middle(m):
    "The middle of what a map (H, W) says, in pixels: y and x"
    m = m.nan_to_num(0).double()
    m = m*(m>m.max()/3) # not the dark rest
    return [float((m.sum(d)*(torch.arange(m.shape[1-d])+.5)).sum()/m.sum()) for d in (1,0)]


geometries = {
    'crop':     (Resize(96), ()), 'pad': (Resize(96, ResizeMethod.Pad, PadMode.Zeros), ()), 'reflect': (Resize(96, ResizeMethod.Pad), ()), 'squish': (Resize(96, ResizeMethod.Squish), ()),
    'wide':     (Resize((80,160)), ()), 'high': (Resize((160,80)), ()), 'croppad': (CropPad(104), ()), 'padded': (CropPad((160,240)), ()),
    'presized': (RandomResizedCrop(128, min_scale=.5), aug_transforms(size=96)), 'presized on a GPU': (Resize((120,200)), aug_transforms(size=(90,100), min_scale=.75)), 'normalized': (Resize(96), Normalize.from_stats(*imagenet_stats)), 'as it is': ((), ()),
}

@pytest.mark.parametrize('name', geometries)
@pytest.mark.parametrize('mark', [(48,80), (20,60), (90,120)])
def test_a_mark_is_where_it_was(tmp_path, name, mark):
    (y,x),(item,batch) = mark,geometries[name]
    learn = bright_learner(tmp_path, item, batch, mark=(slice(y,y+12), slice(x,x+16)))
    hm = learn.get_heatmaps(method='activations')
    for i in range(2):
        img,maps = hm.view(i, 'original')
        assert img.shape==(3,120,200) and maps.shape==(1,120,200)
        assert torch.equal(img.mean(0)>.5, image2tensor(PILImage.create(hm.items[i]))[0]>127)
        want = middle(img.mean(0)*maps[0].isfinite()) # of what was not cropped
        assert max(abs(a-b) for a,b in zip(middle(maps[0]), want))<(3 if 'GPU' in name else 2) and abs(want[0]-(y+6))<1 and abs(want[1]-(x+8))<(1 if name!='high' else 7)


def test_what_was_cropped_has_no_map(tmp_path):
    hm = bright_learner(tmp_path, Resize(96)).get_heatmaps(method='activations')
    _,(m,) = hm.view(0, 'original') # 40 columns at each side are cropped
    assert m[:,:40].isnan().all() and m[:,-40:].isnan().all() and m[:,40:-40].isfinite().all()
    ax = hm.show(0, on='original')
    drawn = ax.images[1].get_array()
    assert ax.images[0].get_array().shape[:2]==drawn.shape==(120,200) and tuple(ax.images[1].get_extent())==(-.5, 199.5, 119.5, -.5)
    assert np.isnan(drawn.filled(np.nan))[:,:40].all()


def test_cells(tmp_path):
    "With 'nearest', each pixel of the photo has the value of the cell that it fell into"
    learn = bright_learner(tmp_path, Resize((60,100), ResizeMethod.Squish))
    hm = learn.get_heatmaps(method='activations')
    _,(m,) = hm.view(0, 'original', 'nearest')
    assert torch.equal(m, hm.maps[0,0].repeat_interleave(8, 0).repeat_interleave(8, 1))


def test_the_grid_of_images_on_originals(tmp_path):
    axs = bright_learner(tmp_path, Resize(96)).get_heatmaps(method='activations').plot(on='original')
    assert {im.get_array().shape[:2] for ax in axs.flat for im in ax.images}=={(120,200)}


@pytest.mark.slow
def test_a_large_photo_is_shown_smaller(tmp_path):
    learn = bright_learner(tmp_path, Resize(96), size=(1500,2000), mark=(slice(700,800), slice(900,1000)))
    hm = learn.get_heatmaps(method='activations')
    assert hm.show(0, on='original').images[1].get_array().shape==(768,1024)
    cy,cx = middle(hm.view(0, 'original')[1][0])
    assert abs(cy-750)<10 and abs(cx-950)<10
    hm[:1].save(tmp_path/'out', on='original')
    assert {Image.open(f).size for f in (tmp_path/'out').glob('*.png')}=={(2000,1500)}


def test_photos_in_memory_stay_as_they_are(tmp_path):
    ims = [PILImage.create(np.random.default_rng(i).integers(0, 255, (1200,1500,3), dtype=np.uint8)) for i in range(4)]
    learn = bright_learner(tmp_path, Resize(96))
    learn.dls = DataBlock((ImageBlock, CategoryBlock(vocab=['a','b'])), get_items=noop, get_y=lambda o: 'a', splitter=IndexSplitter([0,1]), item_tfms=Resize(96, ResizeMethod.Squish)).dataloaders(ims, bs=2, num_workers=0, device='cpu')
    learn.get_heatmaps(method='activations').show(0, on='original')
    assert [im.size for im in ims]==[(1500,1200)]*4


def test_grey_images(tmp_path):
    learn = bright_learner(tmp_path, Resize(96), img=ImageBlock(PILImageBW))
    learn.model[0].conv = nn.Conv2d(1, 2, 4, stride=4)
    img,_ = learn.get_heatmaps(method='activations').view(0, 'original')
    assert img.shape==(1,120,200)


def test_points(tmp_path):
    "The Learner's own points are left aside, and its scaler of points does not touch ours"
    bright_learner(tmp_path, ())
    dls = DataBlock((ImageBlock, PointBlock), get_items=get_image_files, get_y=lambda o: [[10.,20.],[30.,40.]], splitter=IndexSplitter([0,1]), item_tfms=Resize(96)).dataloaders(tmp_path, bs=2, num_workers=0, device='cpu')
    assert original(dls.valid, 0)[1][0,:,[0,-1],[0,-1]].T.flatten().tolist()==pytest.approx([-200/120,-1,200/120,1], abs=1e-5)


class Mirror(Transform):
    "Moves pictures, and points only if asked to"
    order = 0
    def __init__(self, points): self.points = points
    def encodes(self, x:PILImage): return PILImage(x.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    def encodes(self, x:TensorPoint): return TensorPoint(x*tensor([-1.,1.]), sz=x.sz) if self.points else x


def test_transforms_of_ones_own(tmp_path):
    "One that moves points is followed; one that does not is found out"
    hm = bright_learner(tmp_path, [Mirror(True), Resize(96)], mark=(slice(48,60), slice(60,76))).get_heatmaps(method='activations')
    cy,cx = middle(hm.view(0, 'original')[1][0])
    assert abs(cy-54)<2 and abs(cx-68)<2
    hm = bright_learner(tmp_path, [Mirror(False), Resize(96)], mark=(slice(48,60), slice(60,76))).get_heatmaps(method='activations')
    with pytest.raises(ValueError, match='moves pictures but no points'): hm.show(0, on='original')


def test_what_cannot_be_followed(learn, pics):
    hm = learn.get_heatmaps(get_image_files(pics)[:2])
    with pytest.raises(ValueError, match="expected 'input'"): hm.show(0, on='photo')
    dl = torch.utils.data.DataLoader([(torch.rand(3, 64, 64), 0)]*2, batch_size=2)
    with pytest.raises(ValueError, match="pass on='input'"): learn.get_heatmaps(dl=dl).show(0, on='original')


def test_no_trace(learn, pics):
    "The same random numbers come after it, and the transforms keep their state"
    learn.dls.valid.after_item.add(Transform(lambda o: (torch.rand(1), random.random(), np.random.rand(), o)[-1]))
    hm = learn.get_heatmaps(get_image_files(pics)[:1])
    torch.manual_seed(1); random.seed(1); np.random.seed(1)
    want = torch.rand(1),random.random(),np.random.rand()
    torch.manual_seed(1); random.seed(1); np.random.seed(1)
    original(hm.dl, 0)
    assert want==(torch.rand(1),random.random(),np.random.rand())

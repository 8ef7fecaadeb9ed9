"What the tests share: a small Learner on pictures made on the spot, and the pretrained demo Learner."
import matplotlib
matplotlib.use('Agg')
import gc, sys, numpy as np, pytest, torch
from collections import Counter
from fastai.vision.all import *
from fastai_heatmaps.all import *
from torchvision.models.resnet import BasicBlock, ResNet
from fastai_heatmaps.data.images import Images
from fastai_heatmaps.core.layers import default_layer, find_layers

for o in [o for o in globals() if o.startswith('test')]: del globals()[o] # fastcore's own `test_eq` and others are no tests of ours
torch.set_num_threads(1)


@contextmanager
def draws_nothing():
    "What comes out of the user's random number generators afterwards is what would have come out without"
    def numbers(): return torch.rand(2).tolist(),random.random(),np.random.rand()
    set_seed(1)
    want = numbers()
    set_seed(1)
    yield
    assert numbers()==want


@pytest.fixture(scope='session')
def pics(tmp_path_factory):
    "A folder of 12 pictures of several sizes, 6 of each class, 'Red' and 'Blue_ish'"
    path,rng = tmp_path_factory.mktemp('pics'),np.random.default_rng(0)
    for i in range(12):
        h,w = 60+5*(i%4),70+4*(i%3)
        im = rng.integers(0, 90, (h,w,3), dtype=np.uint8)
        im[10:40,15:45,[0,2][i%2]] = 250
        Image.fromarray(im).save(path/f"{['Red','Blue_ish'][i%2]}_{i}.png")
    return path


class Narrow(ResNet):
    "A ResNet with an eighth of the channels: the same layers under the same names, and a tenth of the time"
    def _make_layer(self, block, planes, *args, **kwargs): return super()._make_layer(block, planes//8, *args, **kwargs)


def narrow18(pretrained=False): return Narrow(BasicBlock, [2]*4)


def label(o): return Path(o).name.rsplit('_', 1)[0]


def pic_block(img=ImageBlock, batch_tfms=(), size=64, **kwargs):
    return DataBlock((img, CategoryBlock), get_y=label, splitter=IndexSplitter(range(6)), item_tfms=Resize(size), batch_tfms=list(batch_tfms), **kwargs)


def pic_learner(pics, arch=narrow18, bs=4, loss_func=None, cbs=None, **kwargs):
    set_seed(7)
    dls = pic_block(get_items=get_image_files, **kwargs).dataloaders(pics, bs=bs, num_workers=0, device='cpu')
    return vision_learner(dls, arch, pretrained=False, normalize=False, loss_func=loss_func, metrics=accuracy, cbs=cbs)


@pytest.fixture
def learn(pics): return pic_learner(pics)


@pytest.fixture(scope='session')
def demo(): return demo_learner()


def photo_heatmaps(size, maps, *tfms):
    "Heatmaps `maps` (1, h, w) of one photo of `size`, which went through `tfms`"
    im = PILImage.create(np.random.default_rng(0).integers(0, 255, (*size,3), dtype=np.uint8))
    block = DataBlock((ImageBlock, CategoryBlock(vocab=['a','b'])), get_x=lambda o: im, get_y=lambda o: 'a', splitter=lambda o: ([0],[1]), item_tfms=list(tfms))
    learn = Learner(block.dataloaders([0, 1], bs=1, num_workers=0, device='cpu'), create_vision_model(narrow18, 2, pretrained=False), loss_func=CrossEntropyLossFlat())
    return learn.get_heatmaps(method='activations').replace(maps=tensor(maps)[None].float())


def near_line(m, top, px):
    "Mark the pixels that are up to `px` from where the map `m` crosses half of `top`, or of minus `top`"
    from scipy import ndimage
    strong,around = np.abs(np.nan_to_num(m))>=top/2,np.ones((2*px+1,)*2)
    return ndimage.binary_dilation(strong, around) & ndimage.binary_dilation(~strong, around)


quick = {'smooth_gradcam++': dict(n=2), 'smoothgrad': dict(n=2), 'integrated_gradients': dict(steps=3), 'occlusion': dict(window=32, stride=32), 'rise': dict(n=8), 'scorecam': dict(channels=4)}


def net_for(method, c=3):
    "A small model, of the kind that `method` is for, for images of 64×64"
    if method=='legrad':
        from timm.models.vision_transformer import VisionTransformer
        return VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=c)
    if method=='cam': return nn.Sequential(create_body(models.resnet18(weights=None)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, c)))
    return create_vision_model(narrow18, c, pretrained=False)


def learner_for(method, pics, **kwargs):
    "`pic_learner` with a model of the kind that `method` is for"
    learn = pic_learner(pics, **kwargs)
    if method in ('legrad', 'cam'): learn.model = net_for(method, 2)
    return learn


def close(a, b, rtol=1e-3):
    "Equal after scaling each to a maximum of 1"
    a,b = [torch.as_tensor(o).detach().as_subclass(Tensor).float() for o in (a,b)]
    assert a.shape==b.shape and a.abs().max()>0 and b.abs().max()>0
    torch.testing.assert_close(a/a.abs().max(), b/b.abs().max(), rtol=rtol, atol=rtol/10)

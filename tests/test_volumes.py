"""Volumes (n, C, D, H, W): each method by its formula along three axes, the layers of 3-D nets, a Learner of volumes, and how they are drawn.
By hand where that is short; elsewhere a method must not care which axis comes first, and a volume of one slice must have the map of a picture."""
import pytest, warnings
from shared import *
from fastai_heatmaps.core.layers import as_map
from fastai_heatmaps.data.volumes import find_slices, lay, strongest_point
from fastai_heatmaps.views.explore import _png

size = 4,6,8 # of the small volumes, each side another one
options = {'smooth_gradcam++': dict(n=2, noise=0), 'smoothgrad': dict(n=2, noise=0), 'integrated_gradients': dict(steps=3), 'occlusion': dict(window=2, stride=1), 'scorecam': dict(channels=3)}
steady = [o for o in heatmap_methods if o not in ('legrad', 'rise')] # legrad is for transformers, and the masks of RISE are random
kinks = pytest.mark.filterwarnings('ignore:the attributions sum to') # of nets with ReLUs, with few steps


class Bottleneck(nn.Module):
    "As in a 3-D ResNet"
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1,self.bn1,self.conv2,self.bn2 = nn.Conv3d(i, o, 3, stride, 1, bias=False),nn.BatchNorm3d(o),nn.Conv3d(o, o, 3, 1, 1, bias=False),nn.BatchNorm3d(o)
        self.short = nn.Sequential(nn.Conv3d(i, o, 1, stride, bias=False), nn.BatchNorm3d(o))
    def forward(self, x): return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))+self.short(x), inplace=True)


class ResNet3d(nn.Module):
    "As MONAI names its parts"
    def __init__(self, c=3, chans=(4,6,8), stride=2):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv3d(1, chans[0], 3, 1, 1, bias=False),nn.BatchNorm3d(chans[0])
        self.layer1,self.layer2 = [nn.Sequential(Bottleneck(i, o, stride), Bottleneck(o, o, 1)) for i,o in zip(chans, chans[1:])]
        self.avgpool,self.fc = nn.AdaptiveAvgPool3d(1),nn.Linear(chans[-1], c)
    def forward(self, x): return self.fc(self.avgpool(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))).flatten(1))


class DenseNet3d(nn.Module):
    def __init__(self, c=3, grow=4):
        super().__init__()
        self.features = nn.Sequential(OrderedDict(conv0=nn.Conv3d(1, 8, 3, 2, 1), denseblock1=self.Block(8, grow), transition=nn.Sequential(nn.Conv3d(16, 8, 1), nn.AvgPool3d(2)), denseblock2=self.Block(8, grow), norm5=nn.BatchNorm3d(16)))
        self.class_layers = nn.Sequential(OrderedDict(relu=nn.ReLU(inplace=True), pool=nn.AdaptiveAvgPool3d(1), flatten=nn.Flatten(1), out=nn.Linear(16, c)))
    def forward(self, x): return self.class_layers(self.features(x))

    class Block(nn.Module):
        def __init__(self, i, grow):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm3d(i+j*grow), nn.ReLU(), nn.Conv3d(i+j*grow, grow, 3, padding=1)) for j in range(2))
        def forward(self, x):
            for l in self.layers: x = torch.cat([x, l(x)], 1)
            return x


def small_net(c=3, flat=False):
    "A body and a head; with `flat`, for volumes of `size`, cells of the map count differently"
    set_seed(5)
    body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 5, 3, 2, 1), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(5*2*3*4, c)) if flat else nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(5, c))
    return nn.Sequential(body, head).double().eval()


def volumes(n=2, size=size):
    set_seed(1)
    return torch.randn(n, 1, *size).double()


def signed(model, x, method, cls=[0,2], **kwargs): return model_heatmaps(model, x, cls=cls, method=method, relu=False, **kwargs)[0].double()


# ---- formulas

def by_numpy(method, A, g):
    "The map of activations `A` and gradients `g`, (C, d, h, w), one channel after another"
    C = range(len(A))
    if method=='activations': return A.mean(0)
    if method=='gradcam': return sum(g[k].mean()*A[k] for k in C)
    if method=='hirescam': return sum(g[k]*A[k] for k in C)
    if method=='layercam': return sum(g[k].clip(min=0)*A[k] for k in C)
    if method=='xgradcam': return sum((g[k]*A[k]).sum()/A[k].sum()*A[k] for k in C)
    if method=='gradcam++': return sum((g[k].clip(min=0)/(2+g[k]*A[k].sum())).sum()*A[k] for k in C)
    cells = A.reshape(len(A), -1).T if method=='eigencam' else (g*A).reshape(len(A), -1).T # one row a cell
    v = np.linalg.svd(cells)[2][0]
    return (cells@v*np.sign(v.sum())).reshape(A.shape[1:])


@pytest.mark.parametrize('method', ['activations', 'gradcam', 'hirescam', 'layercam', 'xgradcam', 'gradcam++', 'eigencam', 'eigengradcam'])
def test_formula(method):
    "On a net whose activations are the volume, and whose gradients are its weights, here more for the class than against it"
    rng = np.random.default_rng(3)
    A,g = rng.random((2, *size)),rng.normal(.3, 1, (2, *size))
    net = nn.Sequential(nn.Identity(), nn.Sequential(nn.Flatten(), nn.Linear(A.size, 1, bias=False))).double()
    net[1][1].weight.data = torch.from_numpy(g).flatten()[None]
    got = signed(net, torch.from_numpy(A)[None], method, cls=0, layer='0')
    torch.testing.assert_close(got[0,0], torch.from_numpy(by_numpy(method, A, g)), rtol=1e-4, atol=1e-5)


def test_cam():
    "With a mean and one linear layer, each cell adds its part to the score"
    net,x = small_net(),volumes()
    w = net[1][2].weight[[0,2]]
    torch.testing.assert_close(signed(net, x, 'cam'), torch.einsum('jk,nkdhw->njdhw', w, net[0](x)).detach(), rtol=1e-4, atol=1e-6)


def test_scorecam_and_ablationcam():
    net,x = small_net(flat=True),volumes(1)
    acts = net[0](x).detach()
    def score(x): return net(x)[0,2].item()
    masks = F.interpolate(acts.float(), size, mode='trilinear')[0]
    masks = [(m-m.min())/(m.max()-m.min()).clamp(min=1e-8) for m in masks]
    w = tensor([score(x*m) for m in masks]).softmax(0)
    torch.testing.assert_close(signed(net, x, 'scorecam', [2])[0,0], (w[:,None,None,None]*acts[0]).sum(0), rtol=1e-3, atol=1e-5)
    y,drops = score(x),[]
    for k in range(5):
        without = acts.clone()
        without[0,k] = 0
        drops.append(y-net[1](without)[0,2].item())
    torch.testing.assert_close(signed(net, x, 'ablationcam', [2])[0,0], (tensor(drops)[:,None,None,None]/abs(y)*acts[0]).sum(0).double(), rtol=1e-3, atol=1e-5)


def test_occlusion_with_a_cube():
    "Each voxel gets the mean of the drops of the cubes that covered it: here what was hidden is worth its value times its weight"
    net,x = nn.Sequential(nn.Flatten(), nn.Linear(4*6*8, 3)).double(),volumes(1)
    worth = (x.flatten()*net[1].weight[1].detach()).view(size)
    drops,count = torch.zeros(2, *size).double()
    for d in (0,2):
        for h in (0,2):
            for w in (0,2,4,6): # the last one is cut off at the edge
                box = slice(d,d+2),slice(h,h+4),slice(w,w+3)
                drops[box] += worth[box].sum()
                count[box] += 1
    got = signed(net, x, 'occlusion', [1], window=(2,4,3), stride=(2,2,2))[0,0]
    torch.testing.assert_close(got, drops/count, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_rise():
    "Of a score that reads one voxel, the map is highest there"
    net = nn.Sequential(nn.Flatten(), nn.Linear(8*8*8, 1, bias=False))
    net[1].weight.data.zero_()[0,(2*8+5)*8+6] = 1
    m = model_heatmaps(net, torch.ones(1, 1, 8, 8, 8), method='rise', n=600, cells=4)[0][0,0]
    assert np.unravel_index(m.argmax(), m.shape)==(2,5,6)


@kinks
@pytest.mark.parametrize('method', steady)
def test_no_axis_is_special(method):
    "A net whose axes are turned has the turned maps of turned volumes"
    net,x = small_net(),volumes()
    turned = small_net()
    for c in (turned[0][0], turned[0][2]): c.weight.data = c.weight.data.permute(0,1,4,2,3).contiguous()
    maps = signed(net, x, method, **options.get(method, {}))
    there = signed(turned, x.permute(0,1,4,2,3), method, **options.get(method, {}))
    assert maps.ndim==5 and maps.abs().max()>0
    torch.testing.assert_close(there, maps.permute(0,1,4,2,3), rtol=1e-3, atol=1e-5*float(maps.abs().max()))


@kinks
@pytest.mark.parametrize('method', steady)
def test_one_slice_is_a_picture(method):
    "The map of a volume of one slice is that of the picture, by the same net in 2-D"
    net,x = small_net(),volumes(size=(1,12,16))
    flat = small_net()
    for i in (0,2):
        c,f = net[0][i],nn.Conv2d(net[0][i].in_channels, net[0][i].out_channels, 3, net[0][i].stride[0], 1).double()
        f.weight.data,f.bias.data = c.weight.data[:,:,1],c.bias.data # the other rows of the kernel see nothing but padding
        flat[0][i] = f
    flat[1][0] = nn.AdaptiveAvgPool2d(1)
    kw = options.get(method, {})
    maps,want = signed(net, x, method, **kw),signed(flat, x[:,:,0], method, **kw)
    torch.testing.assert_close(maps[:,:,0], want, rtol=1e-4, atol=1e-6*float(want.abs().max()))


@pytest.mark.parametrize('fill', ['mean', 'blur', .5])
def test_fill(fill):
    m = signed(small_net(flat=True), volumes(), 'occlusion', window=2, fill=fill)
    assert m.shape==(2,2,*size) and m.abs().max()>0


def test_blur_along_each_axis():
    from fastai_heatmaps.methods.changed import blurred
    x = torch.zeros(1, 1, 9, 32, 32)
    x[...,4,16,16] = 1
    y = blurred(x)[0,0]
    assert y.sum().item()==pytest.approx(1, abs=1e-3) and (y[3]>0).sum()>100 and y[1,16,16]==0 and y.max()<.05


# ---- captum

@pytest.mark.parametrize('make,layer', [(ResNet3d,'layer2'), (DenseNet3d,'class_layers.relu')])
def test_captum_at_the_default_layer(make, layer):
    captum = pytest.importorskip('captum.attr')
    set_seed(3)
    model,x = make().eval(),torch.randn(2, 1, 8, 12, 16)
    assert default_layer(model, x) is model.get_submodule(layer)
    theirs = captum.LayerGradCam(model, model.get_submodule(layer)).attribute(x, target=[2,0])
    close(model_heatmaps(model, x, cls=tensor([2,0]), relu=False)[0], theirs)


@pytest.mark.slow
@pytest.mark.parametrize('name,layer,size', [('r3d_18','layer4',(8,48,64)), ('mc3_18','layer4',(4,64,48)), ('swin3d_t','norm',(4,64,64))])
def test_video_models(name, layer, size):
    "torchvision's 3-D ResNets, and a video transformer that keeps its tokens in a grid"
    captum = pytest.importorskip('captum.attr')
    import torchvision.models.video as video
    set_seed(3)
    model,x = getattr(video, name)(num_classes=5).eval(),torch.randn(1, 3, *size)
    assert default_layer(model, x) is model.get_submodule(layer)
    maps,_ = model_heatmaps(model, x, cls=2, relu=False)
    if name!='swin3d_t': close(maps, captum.LayerGradCam(model, model.get_submodule(layer)).attribute(x, target=2))
    assert maps.shape[2:]==((2,2,2) if name=='swin3d_t' else (1,3,4) if name=='r3d_18' else (4,4,3)) and maps.abs().max()>0


# ---- layers

def test_thick_slices():
    "A net that leaves the few slices as they are, along whichever axis they lie"
    for axis in range(3):
        stride = [2]*3
        stride[axis] = 1
        x = torch.randn(1, 1, *[3 if i==axis else 32 for i in range(3)])
        model = ResNet3d(stride=tuple(stride)).eval()
        assert default_layer(model, x) is model.layer2
        assert model_heatmaps(model, x)[0].shape[2:]==torch.Size([3 if i==axis else 8 for i in range(3)])


def test_as_map():
    x = torch.zeros(1, 3, 16, 112, 112)
    for shape in [(1,512,2,7,7), (1,2,7,7,512), (1,64,16,14,14)]: assert sorted(as_map(torch.zeros(shape), x).shape[2:])==sorted(shape[1:4] if shape[-1]==512 else shape[2:])
    for shape in [(1,512,1,1,1), (1,64,32,7,7), (1,64,7,7), (1,196,64), (1,64)]: assert as_map(torch.zeros(shape), x) is None
    assert as_map(torch.zeros(1,64,2,7,7), torch.zeros(1,3,112,112)) is None


def test_layers_are_fused():
    model,x = ResNet3d().eval(),torch.randn(1, 1, 8, 8, 16)
    a,b = [model_heatmaps(model, x, cls=1, layer=o, relu=False)[0] for o in ('layer1','layer2')]
    want = (a/a.abs().max()+F.interpolate(b/b.abs().max(), a.shape[2:], mode='trilinear'))/2
    torch.testing.assert_close(model_heatmaps(model, x, cls=1, layer=['layer1','layer2'], relu=False)[0], want)


def test_errors():
    model,x = ResNet3d().eval(),torch.randn(1, 1, 8, 8, 16)
    def says(match, **kwargs):
        with pytest.raises(ValueError, match=match) as e: model_heatmaps(model, x, **kwargs)
        assert '\n' not in str(e.value)
    says('has no attention', method='legrad')
    says(r"layer 'fc' puts out \(1, 3\).*'layer2' \(2×2×4\)", layer='fc')
    says(r'\(depth, height, width\)', method='occlusion', window=(2,2))
    says(r'gave \(1, 8\); expected a map \(n, d, h, w\)', method=lambda acts, grads: acts.mean((2,3,4)))
    with pytest.warns(UserWarning, match="'avgpool' is 1×1×1"): model_heatmaps(model, x, layer='avgpool')
    flat = nn.Sequential(nn.Flatten(), nn.Linear(8*8*16, 2))
    with pytest.raises(ValueError, match='no layer of this Sequential puts out a map'): model_heatmaps(flat, x)


# ---- tasks and views of the same volume

def test_a_class_for_each_voxel():
    "The score is the mean logit of the voxels predicted as the class"
    set_seed(2)
    model,x = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 1)),torch.randn(1, 1, 4, 8, 8)
    maps,scores = model_heatmaps(model, x, cls=1, method='hirescam', layer='0', relu=False)
    acts = model[0](x).detach().requires_grad_()
    out = model[2](F.relu(acts))
    mask = out.argmax(1)[0]==1
    y = out[0,1][mask].mean()
    y.backward()
    torch.testing.assert_close(maps[0,0], (acts.grad*acts)[0].sum(0).detach())
    assert scores[0,1].item()==pytest.approx(y.item(), rel=1e-4)
    part = torch.zeros(4, 8, 8)
    part[1,2:5,3] = 1
    assert model_heatmaps(model, x, cls=1, score=in_mask(part))[1][0,1].item()==pytest.approx(out[0,1,1,2:5,3].mean().item(), rel=1e-4)


def test_tta_of_a_volume():
    "What is mirrored along the last axis has the mirrored map"
    model,x = ResNet3d().eval(),torch.randn(1, 1, 8, 16, 32)
    a,b = [model_heatmaps(model, o, cls=1, tta=True)[0] for o in (x, x.flip(-1))]
    torch.testing.assert_close(b.flip(-1), a, rtol=1e-3, atol=1e-5)


def test_two_volumes():
    "Of two inputs, one may be a picture"
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.out = nn.Conv3d(1, 4, 3, 2, 1),nn.Conv2d(1, 4, 3, 2, 1),nn.Linear(8, 2)
        def forward(self, v, p): return self.out(torch.cat([self.a(v).relu().mean((2,3,4)), self.b(p).relu().mean((2,3))], 1))
    v,p = torch.randn(2, 1, 8, 8, 8),torch.randn(2, 1, 16, 16)
    model = Two().eval()
    assert model_heatmaps(model, (v,p))[0].shape==(2,1,4,4,4) and model_heatmaps(model, (v,p), input=1)[0].shape==(2,1,8,8)


def test_a_video_transformer_without_a_map_is_doubted():
    "In an MViT tokens attend to all places after the last map; a 3-D ResNet raises no doubt"
    from torchvision.models.video.mvit import MViT, MSBlockConfig
    block = dict(num_heads=1, kernel_q=[3]*3, kernel_kv=[3]*3, stride_kv=[1,2,2])
    blocks = [MSBlockConfig(input_channels=16, output_channels=16 if s==1 else 32, stride_q=[1,s,s], **block) for s in (1,2)]
    blocks.append(MSBlockConfig(input_channels=32, output_channels=32, stride_q=[1]*3, **block))
    model = MViT(spatial_size=(32,32), temporal_size=4, block_setting=blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True, num_classes=3)
    with pytest.warns(UserWarning, match='attend to all places of the volume'): default_layer(model, torch.randn(1, 3, 4, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert default_layer(ResNet3d().eval(), torch.randn(1, 1, 8, 8, 8)) is not None


# ---- the evidence lies where it is known to be

class Place(nn.Module):
    "Adds where each voxel lies, along depth and width"
    def forward(self, x):
        d,_,w = x.shape[2:]
        return torch.cat([x, torch.linspace(-1, 1, d)[:,None,None].expand_as(x), torch.linspace(-1, 1, w).expand_as(x)], 1)


def cubes(n, seed):
    "Noise with a bright cube, the quarter that it lies in (front or back, left or right), and its place"
    rng = np.random.default_rng(seed)
    x,y,at = rng.normal(0, .2, (n,1,8,16,16)).astype('float32'),rng.integers(0, 4, n),[]
    for v,c in zip(x, y):
        start = c//2*4+rng.integers(0, 2),rng.integers(0, 12),c%2*8+rng.integers(0, 4)
        at.append(tuple(slice(a, a+s) for a,s in zip(start, (3,5,5))))
        v[0][at[-1]] += 2
    return tensor(x),tensor(y),at


@pytest.fixture(scope='module')
def cube_net():
    "Trained in two seconds; activations are kept few, so that it has no reason to look at the noise"
    set_seed(0)
    body = nn.Sequential(Place(), nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3, 2, 1), nn.ReLU())
    model = nn.Sequential(body, nn.Sequential(nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(16, 4)))
    (x,y,_),opt = cubes(256, seed=0),torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(12):
        for b,t in zip(x.split(32), y.split(32)):
            acts = model[0](b)
            (F.cross_entropy(model[1](acts), t)+2*acts.mean()).backward()
            opt.step()
            opt.zero_grad()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize('method,reach', [('gradcam',2), ('hirescam',2), ('layercam',2), ('gradient_x_input',0), ('occlusion',2)])
def test_the_evidence_lies_in_the_cube(cube_net, method, reach):
    "At least .9 of it, in what nobody trained on; cells of the layer are two voxels wide, and a window hides its surroundings"
    x,y,at = cubes(16, seed=1)
    maps,scores = model_heatmaps(cube_net, x, method=method, **(dict(window=(2,4,4), stride=(2,4,4)) if method=='occlusion' else {}))
    assert (scores.argmax(1)==y).all()
    shares = []
    for m,box in zip(F.interpolate(maps, x.shape[2:], mode='trilinear')[:,0], at):
        box = tuple(slice(max(o.start-reach, 0), o.stop+reach) for o in box)
        shares.append(float(m[box].sum()/m.sum()))
    assert min(shares)>.9, shares


# ---- a Learner of volumes

class Scan(TensorBase):
    "As users' own classes are: a tensor, made of a file or of another tensor"
    @classmethod
    def create(cls, o): return cls(o if isinstance(o, Tensor) else torch.from_numpy(np.load(o)))


def load_scan(file): return torch.from_numpy(np.load(file))


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "Twelve files of cubes, named after their quarter"
    path = tmp_path_factory.mktemp('scans')
    for i,(x,y) in enumerate(zip(*cubes(12, seed=2)[:2])): np.save(path/f'{"abcd"[i%4]}_{i}.npy', x.numpy())
    return get_files(path, '.npy').sorted()


def scan_learner(block, items, get_y, **kwargs):
    set_seed(0)
    block = DataBlock((block, CategoryBlock(vocab='abcd')), get_y=get_y, splitter=IndexSplitter(range(5)), **kwargs)
    model = nn.Sequential(nn.Sequential(nn.Conv3d(1, 4, 3, (1,2,2), 1), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 4)))
    return Learner(block.dataloaders(items, bs=4, num_workers=0, device='cpu'), model, loss_func=CrossEntropyLossFlat())


@pytest.fixture(scope='module')
def scan_learn(scans): return scan_learner(ImageBlock(cls=Scan), scans, label)


def test_a_learner_of_volumes(scan_learn, scans):
    "Files, tensors, and items of a dataset have the maps of the validation set, which are those of the model"
    hm = scan_learn.get_heatmaps(cls='targ')
    x = torch.stack([load_scan(o) for o in scans[:5]])
    want,_ = model_heatmaps(scan_learn.model, x, cls=hm.targs)
    torch.testing.assert_close(hm.maps, want)
    assert hm.maps.shape==(5,1,8,8,8) and [Path(o).stem for o in hm.images.names]==[o.stem for o in scans[:5]]
    for items in (list(scans[:2]), [str(o) for o in scans[:2]], list(x[:2]), [scan_learn.dls.valid_ds[i] for i in range(2)]):
        torch.testing.assert_close(scan_learn.get_heatmaps(items, cls=hm.targs[:2]).maps, want[:2])
    torch.testing.assert_close(scan_learn.get_heatmaps(method='saliency').maps.shape, torch.Size([5,1,8,16,16]))


@pytest.mark.parametrize('kind', ['a function', 'pairs', 'arrays', 'arrays to the end'])
def test_items_of_any_kind(kind, scans):
    "Opened by a function, or in memory beside their labels; as the dataset has them, or as they come out of it"
    x = [load_scan(o) for o in scans]
    labels = [label(o) for o in scans]
    if kind=='a function': learn,items = scan_learner(TransformBlock(type_tfms=load_scan), scans, label),scans
    else:
        items = list(zip([o.numpy() for o in x] if 'arrays' in kind else x, labels))
        learn = scan_learner(TransformBlock(type_tfms=tensor if kind=='arrays' else None), items, ItemGetter(1), get_x=ItemGetter(0))
    want,_ = model_heatmaps(learn.model, x[0][None], cls=1)
    ways = [items[0], x[0], (x[0], 'b'), learn.dls.valid_ds[0], (x[0].numpy(), 'b')]
    if kind!='arrays to the end': ways.append(x[0].numpy().astype('float64')) # which fastai makes float32 where it makes a tensor
    for item in ways: torch.testing.assert_close(learn.get_heatmaps([item], cls=1).maps, want)


def test_volumes_with_other_axes(scan_learn, scans):
    "Without channels or a batch, or a batch in place of one: one line that says what the model takes"
    x = torch.stack([load_scan(o) for o in scans[:2]])
    for wrong in (x[0,0], x[0,0].numpy(), x):
        with pytest.raises(ValueError, match=r'takes volumes \(n, C, D, H, W\), and this batch is \(1, ') as e: scan_learn.show_gradcam(wrong)
        assert '\n' not in str(e.value)
    for wrong in (x[0], x[:,0], x[None]):
        with pytest.raises(ValueError, match='takes volumes|expected a batch'): model_heatmaps(ResNet3d().eval(), wrong)
    with pytest.raises(ValueError, match=r'takes pictures \(n, C, H, W\)'): model_heatmaps(narrow18(), torch.randn(1, 3, 4, 32, 32))
    learn = scan_learner(TransformBlock(), list(zip(x.repeat(6,1,1,1,1), 'abcd'*3)), ItemGetter(1), get_x=ItemGetter(0))
    with pytest.raises(ValueError, match='give the model a tuple, and no tensor'): learn.show_gradcam('scan.npy')


def test_plain_loaders(scans):
    "PyTorch's datasets, without fastai's transforms"
    x = [load_scan(o) for o in scans]
    dls = DataLoaders.from_dsets([(o,0) for o in x[5:]], [(o,1) for o in x[:5]], bs=2, num_workers=0, device='cpu')
    learn = Learner(dls, small_net().float(), loss_func=nn.CrossEntropyLoss())
    hm = learn.get_heatmaps(cls=1)
    assert hm.maps.shape==(5,1,4,8,8) and hm.image(0).shape[0]==3
    hm.show()


# ---- how volumes are drawn

def one_scan(x, maps, **kwargs):
    "Heatmaps `maps` (k, d, h, w) of the volume `x`"
    hm = Learner(DataLoaders.from_dsets([(x,0)], [(x,0)], bs=1, num_workers=0, device='cpu'), ResNet3d(), loss_func=nn.CrossEntropyLoss()).get_heatmaps(method='activations')
    return hm.replace(maps=maps[None].float(), cls=torch.arange(len(maps))[None], **kwargs)


def test_slices_through_the_strongest_point():
    "Each slice shows the voxels of its plane, in grey between the percentiles, and the map in them"
    x,m = torch.zeros(1, 4, 8, 16),torch.zeros(1, 4, 8, 16)
    x[0,2],x[0,:,5],x[0,:,:,3] = .5,.75,1.
    m[0,2,5,3] = 1
    hm = one_scan(x, m)
    pic,maps = hm.view(0, interpolation='nearest')
    assert pic.slices.voxel==(2,5,3) and 'slices at 2, 5, 3' in hm.show().get_title()
    scale = 480/(16+8+.03*16) # below the first slice lies a smaller one, and the sheet is wider than high
    def at(top, left, y, x): return int((top+y+.5)*scale),int((left+x+.5)*scale)
    beside,below = 16+.03*16,8+.03*16
    for top,left,plane in ((0,0,(2,None,None)), (below,0,(None,5,None)), (below,beside,(None,None,3))):
        rows,cols = [n for n,o in zip((4,8,16), plane) if o is None]
        for i,j in ((0,0), (rows-1,cols-1), (1,2)):
            free = iter((i, j))
            voxel = [next(free) if o is None else o for o in plane]
            assert pic[(..., *at(top, left, i, j))].tolist()==pytest.approx([float(x[(0,*voxel)])]*3, abs=.05), (plane, i, j)
        hot = [o for o,p in zip((2,5,3), plane) if p is None]
        assert maps[0][at(top, left, *hot)]==1 and maps[0][at(top, left, 0, 0)]==0
    assert maps[0][5,-5].isnan() and (pic[:,5,-5]==1).all() # no slice there
    lines = (pic[0]-pic[2]).abs()>.5 # the cross has a colour
    y,x = at(0, 0, 5, 3)
    assert lines[y,5] and lines[5,x] and not lines[y,x] and not lines[:40,200:].any()


def test_proportions_of_thick_slices():
    hm = one_scan(torch.rand(1, 4, 8, 16), torch.rand(1, 4, 8, 16))
    h,w = hm.image(0, spacing=(3,1,1)).shape[1:]
    assert h/w==pytest.approx((8+12+.48)/(16+8+.48), rel=.02)
    with pytest.raises(ValueError, match=r'spacing is \(1, 2\)'): hm.show(spacing=(1,2))


def test_names_of_slices():
    x,m = torch.rand(1, 20, 8, 8),torch.zeros(1, 20, 8, 8)
    m[0,3,1,2],m[0,15,6,2] = 1,-3
    hm = one_scan(x, m)
    pic,(front,) = hm.view(0, slices='max', interpolation='nearest')
    assert front.nan_to_num(0).max()==1 and front.nan_to_num(0).min()==-3 # the one furthest from 0 counts
    pic,_ = hm.view(0, slices='montage')
    assert pic.shape[2]==480 and pic.shape[1]==pytest.approx(480*(3*8+2*.24)/(4*8+3*.24), abs=2) # twelve, four a row
    assert hm.image(0, slices=(19,0,7)).slices.voxel==(19,0,7)
    for o in ('all', (20,0,0), (1,2), 5):
        with pytest.raises(ValueError, match='slices is'): hm.show(slices=o)
    assert one_scan(x, torch.zeros(1, 2, 2, 2)).image(0).slices.voxel==(10,4,4) # of a flat map the middle


def test_grey_values():
    "One bright voxel does not make the others black; of three channels each is a colour, of two the first is shown"
    from fastai_heatmaps.data.volumes import windowed
    x = torch.linspace(-1000, 1000, 8000).view(1, 20, 20, 20)
    x[0,0,0,0] = 1e6
    y = windowed(x)
    assert y.min()==0 and y.max()==1 and y[0,10].mean().item()==pytest.approx(.525, abs=.03)
    assert windowed(x.expand(3,-1,-1,-1)).shape[0]==3 and windowed(x.expand(2,-1,-1,-1)).shape[0]==1
    assert windowed(torch.ones(1, 2, 2, 2)).isfinite().all()


def test_pictures_of_slices_are_saved(tmp_path):
    "As `show` draws them, with slices of these proportions"
    hm = one_scan(torch.rand(1, 4, 8, 16), torch.rand(1, 4, 8, 16))
    hm.save(tmp_path, slices=(0,2,3), spacing=(3,1,1))
    h,w = hm.image(0, (0,2,3), (3,1,1)).shape[1:]
    assert {Image.open(o).size for o in tmp_path.glob('*.png')}=={(w,h)}
    over = np.array(Image.open(first(tmp_path.glob('*-overlay.png'))))
    pic,maps = hm.view(0, slices=(0,2,3), spacing=(3,1,1))
    free = maps[0].nan_to_num(1).abs().numpy()<.02 # there the volume shows as it is
    assert free.sum()>50 and np.abs(over/255-pic.permute(1, 2, 0).numpy())[free].max()<.05


def test_a_map_goes_with_its_image():
    vol,pic,m = torch.rand(1, 4, 8, 8),torch.rand(3, 8, 8),torch.rand(2, 4, 4)
    for img,o in ((vol, m[0]), (pic, m)):
        with pytest.raises(ValueError, match=r'expected a map \(h, w\) of a picture') as e: show_overlay(img, o)
        assert '\n' not in str(e.value)
    show_overlay(vol, m)
    show_overlay(pic, m[0])


def test_slices_are_of_volumes(learn, pics, tmp_path):
    hm = learn.get_heatmaps(get_image_files(pics)[:1])
    for kw in (dict(slices='montage'), dict(spacing=(1,2,3)), dict(slices=np.array([1,2,3])), dict(slices='max', on='original')):
        for f in (hm.show, hm.plot, partial(hm.save, tmp_path/'none')):
            with pytest.raises(ValueError, match='slices and spacing are for volumes'): f(**kw)
    assert not (tmp_path/'none').exists()


@pytest.mark.slow
def test_all_figures(scan_learn, tmp_path):
    hm = scan_learn.get_heatmaps(cls=['a','c'])
    assert len(hm.show(slices='montage'))==2 and hm[:2].plot(spacing=(2,1,1)).shape==(2,3)
    assert hm._repr_png_()[:4]==b'\x89PNG'
    assert len(pd.read_csv(hm[:1].save(tmp_path/'pics')))==2
    assert scan_learn.compare_heatmaps(scan_learn.dls.valid_ds[0], method=['gradcam','hirescam']).size
    assert scan_learn.show_feature_maps(scan_learn.dls.valid_ds[0]).shape==(1,4)
    assert scan_learn.plot_heatmap_grid(n=2).size
    out = scan_learn.get_heatmaps(out=tmp_path/'out')
    torch.testing.assert_close(load_heatmaps(tmp_path/'out', scan_learn.dls.valid).maps, out.maps)
    assert 'cells' in scan_learn.heatmap_report(tmp_path/'r.html').read_text('utf-8')


def test_what_is_for_pictures_says_so(scan_learn):
    hm = scan_learn.get_heatmaps()
    for f,match in ((hm.boxes, 'boxes and masks are for pictures'), (lambda: hm.inside([torch.ones(8, 8)]*5), 'for pictures'), (lambda: hm.show(on='original'), "pass on='input'"),
                    (lambda: scan_learn.show_class_image('a'), 'none of volumes'), (scan_learn.show_filters, 'no 2d convolution'),
                    (scan_learn.heatmap_focus, 'pictures')):
        with pytest.raises(ValueError, match=match) as e: f()
        assert '\n' not in str(e.value)


@pytest.mark.slow
def test_explore_slices(scan_learn, scans):
    "A slider moves the slice across the depth, from the strongest point on, and stays where it is; the two others go through the strongest point of the class"
    pytest.importorskip('ipywidgets')
    ui = scan_learn.explore_heatmaps(scans[0], 'a', spacing=(2,1,1))
    classes,*_,depth = ui.children[0].children
    pic,hms = ui.children[2],scan_learn.get_heatmaps(scans[0], cls=['a','b'])
    def drawn(j, d):
        hm = hms.replace(maps=hms.maps[:,j:j+1], cls=hms.cls[:,j:j+1])
        _,*rest = strongest_point(hm.maps[0][0], (8,16,16))
        return _png(hm, hm.image(0, (d,*rest), (2,1,1)), .7)
    at,*_ = strongest_point(hms.maps[0][0], (8,16,16))
    assert (depth.value,depth.min,depth.max)==(at,0,7) and pic.value==drawn(0, at)
    depth.value = (at+3)%8
    assert pic.value==drawn(0, (at+3)%8)!=drawn(0, at)
    classes.value = 1
    assert depth.value==(at+3)%8 and pic.value==drawn(1, (at+3)%8)


@pytest.mark.slow
def test_an_app_opens_photos(scan_learn):
    with pytest.raises(ValueError, match='asks for photos'): scan_learn.heatmap_app()


# ---- trust

def test_maps_of_volumes_are_compared():
    "A map is like itself and unlike others, in any size; a spot in the middle is strongest there, on each axis alike"
    from fastai_heatmaps.trust.findings import rank_correlation, ssim, centre_maps
    set_seed(0)
    m = F.interpolate(torch.rand(2, 1, 3, 3, 3), (8,12,16), mode='trilinear')
    large = F.interpolate(m, (16,24,32), mode='trilinear')
    for f in (rank_correlation, ssim):
        torch.testing.assert_close(f(m, m), torch.ones(2, 1))
        assert (f(m, m.flip(0))<.7).all() and (f(large, m)>.95).all()
    c = centre_maps(torch.zeros(1, 1, 5, 7, 9))[0,0]
    assert np.unravel_index(c.argmax(), c.shape)==(2,3,4)
    torch.testing.assert_close(c, centre_maps(torch.zeros(1, 1, 9, 5, 7))[0,0].permute(1,2,0))


def test_a_faithful_map_of_volumes():
    "The score is the sum of one slice: to hide that first leaves nothing, to hide it last leaves all until then"
    class Slice(nn.Module):
        def forward(self, x): return torch.stack([x[:,0,1].sum((1,2)), 0*x.sum((1,2,3,4))], 1)
    x = torch.ones(1, 4, 4, 4)
    dls = DataLoaders.from_dsets([(x,0)], [(x,0)], bs=1, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Identity(), Slice(), nn.BatchNorm1d(2).requires_grad_(False)), loss_func=CrossEntropyLossFlat())
    hm = learn.get_heatmaps(cls=0, method='gradient_x_input')
    good,bad = [hm.replace(maps=o).faithfulness(metrics='deletion', steps=4, fill=0.).table.value.iloc[0] for o in (hm.maps, hm.maps.amax()-hm.maps)]
    assert good==pytest.approx((1/2+3*.5+.5/2)/4, abs=.01) and bad==pytest.approx((1/2+3*1+.5/2)/4, abs=.01)
    with pytest.raises(ValueError, match='ROAD is for pictures'): hm.faithfulness(metrics='road_most')


def test_spacing_and_slices_as_people_have_them():
    "Arrays are taken, such as the diagonal of an affine, and what is no spacing gives one line"
    m,size = torch.rand(4, 4, 4),(12,32,40)
    s = find_slices(np.array([5,20,12]), m, size, np.array([3,1,1]))
    assert (s.voxel,s.spacing)==((5,20,12), (3.,1.,1.)) and find_slices(tensor([5,20,12]), m, size, tensor([3,1,1])).voxel==(5,20,12)
    for wrong in (3, 'abc', ('a',1,1), (math.nan,1,1), (math.inf,1,1), [], (0,1,1)):
        with pytest.raises(ValueError, match='three positive numbers'): find_slices('cross', m, size, wrong)


@pytest.mark.parametrize('size', [(1,256,256), (2,512,512), (32,700,1)])
def test_flat_volumes(size):
    "Each slice has a pixel at least, inside the sheet"
    for how in ('cross', 'max', 'montage'):
        for spacing in (None, (.001,1,1)): assert lay(torch.rand(1, *size), find_slices(how, torch.rand(1, 4, 4), size, spacing)).isfinite().any()

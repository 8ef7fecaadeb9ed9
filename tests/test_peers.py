"""The same maps as pytorch-grad-cam, torch-cam and captum, where those are right, on real architectures.
Where a peer is wrong or means something else by a name, the test says so, and finds the same map once that is undone."""
import captum.attr as captum
import pytest, pytorch_grad_cam as pgc, timm
from pytorch_grad_cam.ablation_layer import AblationLayer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, FinerWeightedTarget
from torchvision.models import VisionTransformer
from shared import *
from fastai_heatmaps.methods.changed import noisy

tc = pytest.importorskip('torchcam.methods', reason='torchcam needs Python 3.11')

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:captum')


@pytest.fixture(scope='module')
def lite0():
    "The pretrained net, and a function that gives photos as it takes them"
    learn = demo_learner()
    return learn.model, lambda *names: torch.cat([learn.dls.test_dl([demo_image(o)]).one_batch()[0][...,:320] for o in names]).as_subclass(Tensor)


@pytest.fixture(scope='module', params=['efficientnet_lite0', 'resnet18', 'densenet121'])
def case(request, lite0):
    "A model, its target layer, a batch, and a class for each image"
    set_seed(3)
    if request.param=='efficientnet_lite0': return lite0[0], lite0[0][0], lite0[1]('cat', 'coffee', 'rocket'), [281, 967, 540]
    model = create_vision_model(dict(resnet18=resnet18, densenet121=models.densenet121)[request.param], 37, pretrained=False).eval()
    return model, model[0], torch.randn(3, 3, 96, 128), [5, 0, 36]


two = pytest.mark.parametrize('case', ['efficientnet_lite0', 'resnet18'], indirect=True)
@pytest.fixture(scope='module', params=['efficientnet_lite0', 'resnet18'])
def small(request, lite0):
    "For methods that run the model many times: a model, the name of an inner layer without negative values, a batch of small pictures, and a class for each"
    set_seed(3)
    if request.param=='efficientnet_lite0': return lite0[0], '0.2.1.0.bn1', F.interpolate(lite0[1]('cat', 'rocket'), (64,96), mode='bilinear'), [281, 540]
    return create_vision_model(resnet18, 37, pretrained=False).eval(), '0.4', torch.randn(2, 3, 64, 96), [5, 36]


def ours(model, xb, targs, method='gradcam', **kwargs):
    "Signed maps (n, h, w), each of its own class"
    return model_heatmaps(model, xb, cls=tensor(targs), method=method, relu=False, **kwargs)[0][:,0]


def all_close(a, b):
    assert len(a)==len(b)
    for m,p in zip(a, b): close(m, p)


def differ(a, b, by=.01):
    "No map is the same, not even roughly"
    for m,p in zip(a, b): assert (m/m.abs().max()-p/p.abs().max()).abs().max()>by


# ---- pytorch-grad-cam

def parts(cls, model, layer, xb, targets, then=None, **kwargs):
    "What `then` makes of an extractor of pytorch-grad-cam, its activations and gradients; by default the raw map: before its ReLU, and before it is scaled and enlarged"
    targets = [o if callable(o) else ClassifierOutputTarget(o) for o in targets]
    with cls(model=model, target_layers=[layer], **kwargs) as cam:
        out = cam.activations_and_grads(xb)
        if cam.uses_gradients: sum(t(o) for t,o in zip(targets, out)).backward()
        acts,grads = [o[0].cpu().data.numpy() if o else None for o in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)]
        return torch.as_tensor(then(cam, acts, grads, targets) if then else cam.get_cam_image(xb, layer, targets, acts, grads, False))


@pytest.mark.parametrize('method,peer', [('gradcam', 'GradCAM'), ('hirescam', 'HiResCAM'), ('layercam', 'LayerCAM'), ('xgradcam', 'XGradCAM')])
def test_pytorch_grad_cam(case, method, peer):
    model,layer,xb,targs = case
    all_close(ours(model, xb, targs, method), parts(getattr(pgc, peer), model, layer, xb, targs))


@two
def test_pytorch_grad_cam_gradcampp_without_its_epsilon(case):
    "It adds 1e-6 to squared gradients that may be smaller. Of A/s and s·g the map is that of A and g, and with a large s the epsilon is nothing"
    model,layer,xb,targs = case
    def scaled(cam, acts, grads, targets): return cam.get_cam_image(xb, layer, targets, acts/np.float64(1e6), grads*np.float64(1e6), False)
    maps = ours(model, xb, targs, 'gradcam++')
    all_close(maps, parts(pgc.GradCAMPlusPlus, model, layer, xb, targs, scaled))
    differ(maps, parts(pgc.GradCAMPlusPlus, model, layer, xb, targs), by=.001)


@pytest.mark.parametrize('method,peer', [('eigencam', 'EigenCAM'), ('eigengradcam', 'EigenGradCAM')])
def test_pytorch_grad_cam_eigen_methods_without_their_centring(small, method, peer):
    "It subtracts each channel's mean, which the paper does not. Beside its negative a map has mean 0 and the same singular vectors; their sign is free"
    model,_,xb,targs = small
    maps,layer = ours(model, xb, targs, method),model[0]
    def doubled(cam, acts, grads, targets): # of A and -A beside each other; g is the same for both
        return cam.get_cam_image(xb, layer, targets, np.concatenate([acts,-acts], 3), None if grads is None else np.concatenate([grads,grads], 3), False)
    peers = parts(getattr(pgc, peer), model, layer, xb, targs, doubled)[...,:maps.shape[2]]
    all_close(maps, [p*(p*m).sum().sign() for p,m in zip(peers, maps)])
    centred = parts(getattr(pgc, peer), model, layer, xb, targs)
    differ(maps, [p*(p*m).sum().sign() for p,m in zip(centred, maps)])


def test_pytorch_grad_cam_finercam_with_one_reference(small):
    "It weighs the references by their softmax probabilities and differentiates these weights; with one reference its weight cancels out"
    model,_,xb,targs = small
    scores = model(xb).detach()
    nearest = [int((s-s[c]).abs().index_fill(0, tensor(c), math.inf).argmin()) for s,c in zip(scores, targs)]
    all_close(ours(model, xb, targs, 'finercam', n=1, gamma=.8), parts(pgc.GradCAM, model, model[0], xb, [FinerWeightedTarget(c, [d], .8) for c,d in zip(targs, nearest)]))


def test_pytorch_grad_cam_finercam_with_equal_weights(small):
    "With several references it is the same map if they count the same, as in the paper, and another one as it is"
    model,_,xb,targs = small
    refs = [3,7,11]
    class Equal(FinerWeightedTarget):
        def __call__(self, y): return sum(y[self.main_category]-self.alpha*y[d] for d in self.comparison_categories)/len(self.comparison_categories)
    maps = ours(model, xb, targs, 'finercam', others=refs)
    all_close(maps, parts(pgc.GradCAM, model, model[0], xb, [Equal(c, refs, .6) for c in targs]))
    differ(maps, parts(pgc.GradCAM, model, model[0], xb, [FinerWeightedTarget(c, refs, .6) for c in targs]))


@pytest.mark.slow
def test_pytorch_grad_cam_scorecam_without_aligned_corners(small, monkeypatch):
    "It enlarges the masks with align_corners=True, by which their cells do not lie where the layer sees them"
    model,layer,xb,targs = small
    maps,module = ours(model, xb, targs, 'scorecam', layer=layer),model.get_submodule(layer)
    as_it_is = parts(pgc.ScoreCAM, model, module, xb, targs)
    monkeypatch.setattr(torch.nn, 'UpsamplingBilinear2d', partial(nn.Upsample, mode='bilinear'))
    all_close(maps, parts(pgc.ScoreCAM, model, module, xb, targs))
    differ(maps, as_it_is, by=.001)


def best(model, xb):
    "The most likely class of each image, whose score is above zero: pytorch-grad-cam divides by the score, which turns its map upside down below"
    y,targs = model(xb).max(1)
    assert (y>0).all()
    return targs.tolist()


@pytest.mark.slow
def test_pytorch_grad_cam_ablationcam(small):
    "If the layer has no negative values, and the score is above zero"
    model,layer,xb,_ = small
    targs = best(model, xb)
    all_close(ours(model, xb, targs, 'ablationcam', layer=layer), parts(pgc.AblationCAM, model, model.get_submodule(layer), xb, targs))


def test_pytorch_grad_cam_ablationcam_at_the_end_of_the_body():
    "For a class whose score is below zero, its map is the negative of ours"
    set_seed(3)
    model,xb = create_vision_model(narrow18, 37, pretrained=False).eval(),torch.randn(1, 3, 64, 96)
    for c,sign in ((best(model, xb)[0], 1), (int(model(xb).argmin()), -1)):
        all_close(ours(model, xb, [c], 'ablationcam'), sign*parts(pgc.AblationCAM, model, model[0], xb, [c]))


class Zero(AblationLayer):
    "Ablates with 0, as the paper does"
    def __call__(self, x):
        for i,k in enumerate(self.indices[:len(self.activations)]): self.activations[i,k] = 0
        return self.activations


def test_pytorch_grad_cam_ablationcam_where_values_are_negative(lite0):
    "It puts the smallest value less 10 million in the place of a channel, and says so; with 0 there it is the same map"
    model,xb = lite0[0],F.interpolate(lite0[1]('cat'), (64,96), mode='bilinear')
    targs = best(model, xb)
    maps,module = ours(model, xb, targs, 'ablationcam', layer='0.2.2'),model.get_submodule('0.2.2')
    all_close(maps, parts(pgc.AblationCAM, model, module, xb, targs, ablation_layer=Zero()))
    differ(maps, parts(pgc.AblationCAM, model, module, xb, targs))


# ---- torch-cam

def torch_cam(cls, model, layer, xb, targs, call={}, **kwargs):
    "The raw map of torch-cam: before its ReLU, and before it is scaled"
    with cls(model, layer, **kwargs) as cam:
        getattr(cam, 'base_cam', cam)._relu = False
        return cam(targs, model(xb), normalized=False, **call)[0].detach()


@two
@pytest.mark.parametrize('method,peer', [('gradcam', tc.GradCAM), ('layercam', tc.LayerCAM), ('xgradcam', tc.XGradCAM), ('finercam', tc.FinerCAM)])
def test_torch_cam(case, method, peer):
    model,layer,xb,targs = case
    all_close(ours(model, xb, targs, method), torch_cam(peer, model, layer, xb, targs))


@two
def test_torch_cam_finercam_options(case):
    model,layer,xb,targs = case
    all_close(ours(model, xb, targs, 'finercam', n=5, gamma=.9), torch_cam(tc.FinerCAM, model, layer, xb, targs, num_references=5, gamma=.9))
    all_close(ours(model, xb, targs, 'finercam', others=[2,9]), torch_cam(tc.FinerCAM, model, layer, xb, targs, call=dict(comparison_idx=[2,9])))


def test_torch_cam_cam(lite0):
    "On nets with a mean and one linear layer"
    set_seed(3)
    for model,layer,fc,x,targs in ((lite0[0], '0', '1.1', lite0[1]('cat', 'rocket'), [281,540]),
                                   (models.resnet18(num_classes=9).eval(), 'layer4', 'fc', torch.randn(2, 3, 96, 128), [2,8])):
        all_close(ours(model, x, targs, 'cam', layer=layer), torch_cam(tc.CAM, model, layer, x, targs, fc_layer=fc))


@pytest.mark.slow
def test_torch_cam_scorecam_scaled_after_enlarging(small):
    "It scales the masks to 0 to 1 before they are enlarged, which dims their peaks; its own documentation, as the paper, has it the other way round"
    model,layer,xb,targs = small
    class After(tc.ScoreCAM):
        def _upsample(self, o): return self._normalize(super()._upsample(o), 2)
    maps = ours(model, xb, targs, 'scorecam', layer=layer)
    all_close(maps, torch_cam(After, model, layer, xb, targs))
    differ(maps, torch_cam(tc.ScoreCAM, model, layer, xb, targs), by=.001)


@two
def test_torch_cam_gradcampp_never_divides_by_its_denominator(case):
    "Its weights are Σ g² ReLU(g); where g is the same in all cells, as before a mean and a linear layer, they can be divided afterwards, and are ours"
    model,layer,xb,targs = case
    with tc.GradCAMpp(model, layer) as cam:
        weights, = cam._get_weights(targs, model(xb))
        acts,grads = cam.hook_a[0],cam.hook_g[0]
    torch.testing.assert_close(weights, (grads**2*F.relu(grads)).sum((2,3)))
    maps = ours(model, xb, targs, 'gradcam++')
    differ(maps, torch.einsum('nk,nkhw->nhw', weights, acts))
    if len(model[1])==2: # a mean and a linear layer
        g = grads[...,0,0]
        all_close(maps, torch.einsum('nk,nkhw->nhw', weights/(2*g**2+g**3*acts.sum((2,3))), acts))


def test_torch_cam_smooth_gradcampp_put_right(small):
    """It takes the gradient of the last copy, not the mean; the map of the last copy, not the image's; and Σ_ab A_ab g³_ab, not g³_ij Σ_ab A_ab.
    With its own gradients, of the same noisy images, the formula of the paper gives our map"""
    model,_,xb,targs = small
    copies,grads = list(noisy(xb, 4, .15, 0)),[]
    class Recorded(tc.SmoothGradCAMpp):
        def _backprop(self, *args, **kwargs):
            super()._backprop(*args, **kwargs)
            grads.append(self.hook_g[0])
    with Recorded(model, '0', num_samples=4) as cam:
        cam._distrib.sample = lambda size, it=iter(copies): next(it)-xb
        out = model(xb)
        acts = cam.hook_a[0]
        peer,last = cam(targs, out, normalized=False)[0],cam.hook_a[0]
    def formula(d1, sum_a_d3, a):
        alpha = torch.nan_to_num(d2/(2*d2+sum_a_d3), 0, 0, 0)
        return ((alpha*F.relu(d1)).sum((2,3), keepdim=True)*a).sum(1)
    d1,d2,d3 = [sum(g**p for g in grads)/4 for p in (1,2,3)]
    maps = ours(model, xb, targs, 'smooth_gradcam++', n=4)
    all_close(maps, formula(d1, d3*acts.sum((2,3), keepdim=True), acts))
    all_close(peer, F.relu(formula(grads[-1], (d3*acts).sum((2,3), keepdim=True)+1e-8, last)))
    differ(maps, peer)


@pytest.mark.parametrize('size,layers,heads', [(64, 2, 2), (96, 4, 3)])
def test_torch_cam_legrad(size, layers, heads):
    set_seed(3)
    model = VisionTransformer(size, 16, layers, heads, 16*heads, 64, num_classes=7).eval()
    nn.init.normal_(model.heads.head.weight) # 0 in a new one
    xb,targs = torch.randn(3, 3, size, size),[0,6,3]
    all_close(ours(model, xb, targs, 'legrad'), torch_cam(tc.LeGrad, model, list(model.encoder.layers), xb, targs))


# ---- transformers

def as_grid(h, w, prefix=1): return lambda o: o[:,prefix:].unflatten(1, (h,w)).permute(0,3,1,2)
def channels_first(o): return o.permute(0,3,1,2)


@pytest.mark.parametrize('method,peer,other', [('gradcam', pgc.GradCAM, tc.GradCAM), ('layercam', pgc.LayerCAM, tc.LayerCAM),
                                               ('hirescam', pgc.HiResCAM, None), ('xgradcam', pgc.XGradCAM, tc.XGradCAM)])
def test_tokens(method, peer, other):
    "Both peers are told how tokens lie; we find out. Not before a LayerNorm alone, which makes HiResCAM 0: there a longer token is the same token"
    set_seed(3)
    vit = timm.create_model('vit_tiny_patch16_224', img_size=(64,96), num_classes=7).eval()
    deit = timm.create_model('deit_tiny_distilled_patch16_224', img_size=(64,96), num_classes=7).eval()
    swin = timm.models.swin_transformer.SwinTransformer((64,96), embed_dim=24, depths=(1,2), num_heads=(2,4), window_size=4, num_classes=7).eval()
    xb,targs = torch.randn(2, 3, 64, 96),[0,6]
    for model,layer,reshape in ((vit, 'blocks.9', as_grid(4,6)), (vit, 'blocks.11.norm1', as_grid(4,6)), (deit, 'blocks.11.norm1', as_grid(4,6,2)),
                                (swin, 'layers.1.blocks.0', channels_first)):
        maps,module = ours(model, xb, targs, method, layer=layer),model.get_submodule(layer)
        all_close(maps, parts(peer, model, module, xb, targs, reshape_transform=reshape))
        if other: all_close(maps, torch_cam(other, model, layer, xb, targs, reshape_transform=reshape))


# ---- captum

def test_captum_gradcam(case):
    model,layer,xb,targs = case
    maps,_ = model_heatmaps(model, xb, cls=tensor(targs), relu=False)
    all_close(maps, captum.LayerGradCam(model, layer).attribute(xb, target=targs))
    torch.testing.assert_close(model_heatmaps(model, xb, cls=tensor(targs))[0], F.relu(maps))


def test_captum_hirescam(case):
    model,layer,xb,targs = case
    all_close(ours(model, xb, targs, 'hirescam'), captum.LayerGradientXActivation(model, layer).attribute(xb, target=targs).sum(1))


def test_inner_layer_before_an_inplace_relu():
    "captum is right here; pytorch-grad-cam 1.5.7 mixes the activations after the ReLU with the gradients before it, and is not asked"
    set_seed(3)
    model = create_vision_model(narrow18, 5, pretrained=False).eval()
    xb,layer = torch.randn(2, 3, 96, 96),model[0][6][0].bn1
    all_close(ours(model, xb, [1,4], layer='0.6.0.bn1'), captum.LayerGradCam(model, layer).attribute(xb, target=[1,4])[:,0])


@pytest.mark.slow
@pytest.mark.parametrize('negative', [False, True])
def test_captum_ablationcam(small, negative):
    "Its layer ablation gives the drop for each channel, also where values are negative"
    model,name,xb,targs = small
    if negative: name = {'0.4':'0.1', '0.2.1.0.bn1':'0.2.2'}[name] # a BatchNorm, and the end of a block without activation
    module,maps = model.get_submodule(name),ours(model, xb, targs, 'ablationcam', layer=name)
    for x,c,got in zip(xb[:,None], targs, maps):
        acts,y = captum.LayerActivation(model, module).attribute(x),model(x)[0,c].detach()
        assert (acts.min()<0)==negative
        each = torch.arange(acts.shape[1])[None,:,None,None].expand_as(acts)
        drops = captum.LayerFeatureAblation(model, module).attribute(x, target=c, layer_mask=each, perturbations_per_eval=64)
        close(got, (drops*acts).sum(1)[0]/y.abs())


@pytest.mark.slow
def test_captum_ablationcam_of_a_linear_head(lite0):
    "There the drop without a channel is the sum of its gradients times its activations"
    model,xb,targs = lite0[0],lite0[1]('cat', 'rocket'),[281,540]
    acts,drops = [o.detach() for o in (model[0](xb), captum.LayerGradientXActivation(model, model[0]).attribute(xb, target=targs).sum((2,3), keepdim=True))]
    all_close(ours(model, xb, targs, 'ablationcam'), (drops*acts).sum(1)/model(xb)[range(2),targs].detach().abs()[:,None,None])


def with_relus(model):
    "A copy in which ReLU6 is a kind of `nn.ReLU`, which is all that captum knows"
    class Relu6(nn.ReLU):
        def forward(self, x): return F.relu6(x)
    model = deepcopy(model)
    for m in list(model.modules()):
        for n,o in m.named_children():
            if isinstance(o, nn.ReLU6): setattr(m, n, Relu6())
    return model


@two
@pytest.mark.parametrize('method,peer', [('saliency', captum.Saliency), ('gradient_x_input', captum.InputXGradient)])
def test_captum_gradients(case, method, peer):
    model,_,xb,targs = case
    want = peer(model).attribute(xb, target=targs)
    all_close(ours(model, xb, targs, method), want.amax(1) if method=='saliency' else want.sum(1))


@pytest.mark.slow
@two
@pytest.mark.parametrize('method,peer', [('guided_backprop', captum.GuidedBackprop), ('deconvnet', captum.Deconvolution)])
def test_captum_guided_gradients(case, method, peer):
    "captum overlooks ReLU6, of which EfficientNet-Lite0 consists; where it is told, it is the same map"
    model,_,xb,targs = case
    maps = ours(model, xb, targs, method)
    all_close(maps, peer(with_relus(model)).attribute(xb, target=targs).abs().amax(1))
    if any(isinstance(m, nn.ReLU6) for m in model.modules()): differ(maps, peer(model).attribute(xb, target=targs).abs().amax(1))


@pytest.mark.slow
@two
def test_captum_guided_gradcam(case):
    model,_,xb,targs = case
    model = with_relus(model)
    want = captum.GuidedGradCam(model, model[0]).attribute(xb, target=targs, interpolate_mode='bilinear').abs().amax(1)
    maps = ours(model, xb, targs, 'guided_gradcam')
    some = want.flatten(1).any(1) # Grad-CAM may be negative everywhere
    assert some.any() and not maps[~some].any()
    all_close(maps[some], want[some])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:the attributions sum to')
@pytest.mark.parametrize('baseline', [0., 'mean', 'colour'])
def test_captum_integrated_gradients(small, baseline):
    "With channels that lie side by side, as ours: where rounding takes a ReLU to its other side, the gradient jumps"
    model,_,xb,targs = small
    def same(o): return model(o.contiguous(memory_format=torch.channels_last))
    colour = tensor([.3,-.2,.5])[:,None,None]
    for x,c,got in zip(xb[:,None], targs, ours(model, xb, targs, 'integrated_gradients', steps=9, baseline=colour if baseline=='colour' else baseline)):
        base = {0.:0., 'mean':x.mean((2,3), keepdim=True).expand_as(x), 'colour':colour.expand_as(x)}[baseline]
        close(got, captum.IntegratedGradients(same).attribute(x, base, target=c, n_steps=9, method='gausslegendre')[0].sum(0))


@pytest.mark.slow
@pytest.mark.parametrize('window,stride,fill', [((30,40), (25,30), 0.), ((24,24), (24,24), .5), ((50,64), (46,20), 'mean')])
def test_captum_occlusion(small, window, stride, fill):
    model,_,xb,targs = small
    base = xb.mean((2,3), keepdim=True).expand_as(xb) if fill=='mean' else fill
    want = captum.Occlusion(model).attribute(xb, (3,*window), (3,*stride), base, target=targs, perturbations_per_eval=8)
    all_close(ours(model, xb, targs, 'occlusion', window=window, stride=stride, fill=fill), want[:,0])
    assert (want[:,0]-want[:,2]).abs().max()==0


def test_captum_smoothgrad(small):
    "Its noise is drawn from the global generator, in the order of ours where the copies are made one by one; `bs=4` makes our batches of one, too"
    model,_,xb,targs = small
    peer = captum.NoiseTunnel(captum.Saliency(model))
    for x,c,got in zip(xb[:,None], targs, ours(model, xb, targs, 'smoothgrad', n=6, noise=.1, seed=5, bs=4)):
        torch.manual_seed(5)
        want = peer.attribute(x, nt_type='smoothgrad', nt_samples=6, nt_samples_batch_size=1, stdevs=float(.1*(x.max()-x.min())), target=c, abs=False)
        close(got, want[0].abs().amax(0))

"The same maps as pytorch-grad-cam and captum, where those are right, on real architectures."
import captum.attr as captum
import pytest, pytorch_grad_cam as pgc
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from conftest import *


@pytest.fixture(scope='module', params=['efficientnet_lite0', 'resnet18', 'densenet121'])
def case(request):
    "A model, its target layer, a batch, and a class for each image"
    set_seed(3)
    if request.param=='efficientnet_lite0':
        learn = demo_learner()
        xb = torch.cat([learn.dls.test_dl([demo_image(o)]).one_batch()[0][...,:320] for o in ('cat', 'coffee', 'rocket')]).as_subclass(Tensor)
        return learn.model, learn.model[0], xb, [281, 967, 540]
    model = create_vision_model(dict(resnet18=resnet18, densenet121=models.densenet121)[request.param], 37, pretrained=False).eval()
    return model, model[0], torch.randn(3, 3, 96, 128), [5, 0, 36]


def peer_map(cls, model, layer, xb, targs):
    "The raw map of pytorch-grad-cam: before its ReLU, and before it is scaled and enlarged"
    with cls(model=model, target_layers=[layer]) as cam:
        cam(input_tensor=xb, targets=[ClassifierOutputTarget(o) for o in targs])
        acts,grads = [o[0].cpu().data.numpy() for o in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)]
        return torch.as_tensor(cam.get_cam_image(xb, layer, targs, acts, grads, False))


@pytest.mark.parametrize('method,peer', [('gradcam', 'GradCAM'), ('hirescam', 'HiResCAM'), ('layercam', 'LayerCAM'), ('xgradcam', 'XGradCAM')])
def test_pytorch_grad_cam(case, method, peer):
    model,layer,xb,targs = case
    maps,_ = model_heatmaps(model, xb, cls=tensor(targs), method=method, relu=False)
    for m,p in zip(maps[:,0], peer_map(getattr(pgc, peer), model, layer, xb, targs)): close(m, p)


def test_captum_gradcam(case):
    model,layer,xb,targs = case
    maps,_ = model_heatmaps(model, xb, cls=tensor(targs), relu=False)
    want = captum.LayerGradCam(model, layer).attribute(xb, target=targs)
    for m,p in zip(maps, want): close(m, p)
    torch.testing.assert_close(model_heatmaps(model, xb, cls=tensor(targs))[0], F.relu(maps))


def test_captum_hirescam(case):
    model,layer,xb,targs = case
    maps,_ = model_heatmaps(model, xb, cls=tensor(targs), method='hirescam', relu=False)
    want = captum.LayerGradientXActivation(model, layer).attribute(xb, target=targs).sum(1, keepdim=True)
    for m,p in zip(maps, want): close(m, p)


def test_inner_layer_before_an_inplace_relu():
    "captum is right here; pytorch-grad-cam 1.5.7 mixes the activations after the ReLU with the gradients before it, and is not asked"
    set_seed(3)
    model = create_vision_model(resnet18, 5, pretrained=False).eval()
    xb,layer = torch.randn(2, 3, 96, 96),model[0][6][0].bn1
    want = captum.LayerGradCam(model, layer).attribute(xb, target=[1,4])
    for m,p in zip(model_heatmaps(model, xb, cls=tensor([1,4]), layer='0.6.0.bn1', relu=False)[0], want): close(m, p)

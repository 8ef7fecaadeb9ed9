"The same maps as pytorch-grad-cam and captum, where those are right, on real architectures."
import pytest
from conftest import *

pgc = pytest.importorskip('pytorch_grad_cam')
captum = pytest.importorskip('captum.attr')
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget


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
    "captum is right here, and pytorch-grad-cam is not: it mixes the activations after the ReLU with the gradients before it"
    set_seed(3)
    model = create_vision_model(resnet18, 5, pretrained=False).eval()
    xb,layer = torch.randn(2, 3, 96, 96),model[0][6][0].bn1
    want = captum.LayerGradCam(model, layer).attribute(xb, target=[1,4])
    for m,p in zip(model_heatmaps(model, xb, cls=tensor([1,4]), layer='0.6.0.bn1', relu=False)[0], want): close(m, p)
    wrong = peer_map(pgc.GradCAM, model, layer, xb, [1,4])
    assert not torch.allclose(wrong/wrong.abs().max(), want[:,0]/want.abs().max(), atol=.01)


def test_eigencam_differs_from_the_peer_that_centres(case):
    "pytorch-grad-cam subtracts the mean before the SVD, which the paper (arXiv 2008.00299) does not; without that it agrees"
    model,layer,xb,targs = case
    acts = layer(xb).detach()
    maps,_ = model_heatmaps(model, xb, method='eigencam')
    for a,m in zip(acts, maps[:,0]):
        O = a.flatten(1).T.numpy()
        want = torch.as_tensor(O@np.linalg.svd(O, full_matrices=True)[2][0]).view_as(m)
        close(m, want*(want*m).sum().sign())

"Each CAM method on a net so small that its map can be worked out by hand, and against its formula written another way."
import pytest
from conftest import *

A = tensor([[[[1.,2.],[3.,4.]], [[0.,1.],[1.,0.]]]])                      # activations, two channels of 2×2
W = tensor([[[[1.,0.],[0.,1.]], [[-1.,-2.],[0.,1.]]],                     # the gradients of class 0 ...
            [[[-1.,-1.],[-1.,-1.]], [[4.,0.],[0.,0.]]]])                  # ... and of class 1

by_hand = {
    # the mean of (1, 0), (2, 1), (3, 1), (4, 0)
    'activations': [[[.5,1.5],[2.,2.]]]*2,
    # class 0: weights 2/4 and -2/4; class 1: -4/4 and 4/4
    'gradcam': [[[.5,.5],[1.,2.]], [[-1.,-1.],[-2.,-4.]]],
    # class 0: ΣA is 10 and 2; two gradients of 1 give 2/(2+10), one gives 1/(2+2). class 1: only the 4 is positive: 4/(2+8)
    'gradcam++': [[[1/6,1/3+1/4],[1/2+1/4,2/3]], [[0.,.4],[.4,0.]]],
    'hirescam': [[[1.,-2.],[0.,4.]], [[-1.,-2.],[-3.,-4.]]],
    'layercam': [[[1.,0.],[0.,4.]], [[0.,0.],[0.,0.]]],
    # class 0: weights 5/10 and -2/2; class 1: -10/10 and 0/2
    'xgradcam': [[[.5,0.],[.5,2.]], [[-1.,-2.],[-3.,-4.]]],
}


def tiny():
    "A body that passes its input on, and a head whose gradients are `W`"
    m = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False)))
    m[0].weight.data = torch.eye(2)[...,None,None]
    m[1][1].weight.data = W.flatten(1)
    return m


@pytest.mark.parametrize('relu', [True, False])
@pytest.mark.parametrize('method', by_hand)
def test_by_hand(method, relu):
    maps,preds = model_heatmaps(tiny(), A, cls=[0,1], method=method, relu=relu)
    want = tensor(by_hand[method])
    torch.testing.assert_close(maps[0], F.relu(want) if relu else want)
    torch.testing.assert_close(preds, (A*W).sum((1,2,3))[None])


def test_eigencam_against_power_iteration():
    acts = torch.rand(3, 5, 4, 6)
    for a,got in zip(acts, heatmap_methods['eigencam'](acts)):
        O = a.flatten(1).T.double()
        v = torch.ones(5).double()
        for _ in range(500): v = F.normalize(O.T@(O@v), dim=0)
        torch.testing.assert_close(got.flatten().double(), O@v, rtol=1e-4, atol=1e-4)
        assert (got>=0).all() # of activations that are not negative, the shared pattern is not either


def deep(seed=0):
    "A conv net with a two-layer head, in double precision"
    torch.manual_seed(seed)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(inplace=True)),
                         nn.Sequential(nn.Flatten(), nn.Linear(6*25, 12), nn.ReLU(inplace=True), nn.Linear(12, 4))).double()


def test_gradcampp_against_third_derivatives():
    "The weights of the paper, with the derivatives of exp(score) taken by autograd rather than worked out"
    m,xb = deep(),torch.rand(2, 3, 11, 11).double()
    for x in xb:
        acts = m[0](x[None]).detach().requires_grad_()
        def Y(a): return m[1](a)[0,2].exp()
        d1, = torch.autograd.grad(Y(acts), acts, create_graph=True)
        d1f = d1.flatten()

        d2,d3 = torch.zeros_like(d1f),torch.zeros_like(d1f)
        for i in range(len(d1f)):
            g2, = torch.autograd.grad(d1f[i], acts, create_graph=True)
            d2[i] = g2.flatten()[i]
            g3, = torch.autograd.grad(g2.flatten()[i], acts, retain_graph=True)
            d3[i] = g3.flatten()[i]
        d2,d3 = d2.view_as(acts),d3.view_as(acts)
        den = 2*d2 + acts.sum((2,3), keepdim=True)*d3
        alpha = torch.where(d2!=0, d2/den, 0)
        want = ((alpha*F.relu(d1)).sum((2,3), keepdim=True)*acts).sum(1)
        got = model_heatmaps(m, x[None], cls=2, method='gradcam++', relu=False)[0]
        close(got[0,0], want[0])


def test_gradcam_is_the_formula():
    "ReLU(Σ_k mean_ij(∂y/∂A_k) A_k), with the gradient measured by finite differences"
    m,x,eps = deep(1),torch.rand(1, 3, 11, 11).double(),1e-6
    acts = m[0](x).detach()
    grads = torch.zeros_like(acts)
    for i in range(acts.numel()):
        step = torch.zeros(acts.numel()).double()
        step[i] = eps
        step = step.view_as(acts)
        grads.view(-1)[i] = (m[1](acts+step)-m[1](acts-step))[0,1].detach()/(2*eps)
    want = F.relu((grads.mean((2,3), keepdim=True)*acts).sum(1))
    close(model_heatmaps(m, x, cls=1)[0][0], want)


def test_every_method_is_proved():
    assert set(heatmap_methods) == set(by_hand) | {'eigencam'}


def test_a_batch_is_its_images():
    m,xb = deep(),torch.rand(5, 3, 11, 11).double()
    idxs = tensor([3,0,1,1,2])
    for method in heatmap_methods:
        maps,preds = model_heatmaps(m, xb, cls=idxs, method=method)
        for i in range(5):
            one,pred = model_heatmaps(m, xb[i:i+1], cls=int(idxs[i]), method=method)
            torch.testing.assert_close(maps[i:i+1], one, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(preds[i:i+1], pred)


def test_several_layers_are_fused():
    "The mean of the maps, each scaled to its maximum and brought to the size of the largest"
    m = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True)),
                      nn.Sequential(nn.Flatten(), nn.Linear(6*9, 2)))
    x = torch.rand(2, 3, 12, 12)
    one,two = [model_heatmaps(m, x, cls=1, layer=l, relu=False)[0] for l in ('0.1', '0.4')]
    both,_ = model_heatmaps(m, x, cls=1, layer=['0.1', '0.4'], relu=False)
    def scaled(o): return o/o.abs().amax((2,3), keepdim=True)
    torch.testing.assert_close(both, (scaled(one)+F.interpolate(scaled(two), one.shape[2:], mode='bilinear'))/2, rtol=1e-4, atol=1e-5)

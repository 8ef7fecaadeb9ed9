"Each method on a net so small that its map can be worked out by hand, and against its formula written another way: never by calling the same code."
import pytest, warnings
from shared import *
from fastai_heatmaps.methods.changed import noisy
from fastai_heatmaps.methods.perturb import rise_masks
from fastai_heatmaps.methods.changed import filled

proved = set()
def proves(*methods):
    "Runs a test with each of `methods`, and notes that it proves them"
    proved.update(methods)
    return pytest.mark.parametrize('method', methods)


kinks = pytest.mark.filterwarnings('ignore:the attributions sum to') # nets with ReLUs, and few steps


def signed(model, x, cls, method, **kwargs):
    "The maps with evidence against the class, one class for each image or the same for all"
    maps = model_heatmaps(model, x, cls=cls, method=method, relu=False, **kwargs)[0].double()
    return maps if isinstance(cls, list) else maps[:,0]


def equal(got, want, rtol=1e-4):
    "Equal, with a tolerance in proportion to the largest value, which is not 0"
    top = float(want.abs().max())
    assert top>0
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol*top/10)


def score(m, x, c):
    "The score of class `c` for one image, as a number"
    with torch.no_grad(): return float(m(x[None])[0,c])


def numeric(f, x, eps=1e-6):
    "The gradient of the number `f(x)`, measured by central differences in double precision"
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros(x.numel()).double()
        step[i] = eps
        grad.view(-1)[i] = (f(x+step.view_as(x))-f(x-step.view_as(x))).detach()/(2*eps)
    return grad


# ---- by hand

A = tensor([[[[1.,2.],[3.,4.]], [[0.,1.],[1.,0.]]]])                      # activations, two channels of 2×2
W = tensor([[[[1.,0.],[0.,1.]], [[-1.,-2.],[0.,1.]]],                     # the gradients of class 0 ...
            [[[-1.,-1.],[-1.,-1.]], [[4.,0.],[0.,0.]]]])                  # ... and of class 1
r = 221**.5-14                                                            # OᵀO is ((30, 5), (5, 2)): its first eigenvector is (5, r), with the value 16 + √221
s0,s1 = 1/(1+math.exp(-16/3)),1/(1+math.exp(5/3))

by_hand = {
    # the mean of (1, 0), (2, 1), (3, 1), (4, 0)
    'activations': [[[.5,1.5],[2.,2.]]]*2,
    # class 0: weights 2/4 and -2/4; class 1: -4/4 and 4/4
    'gradcam': [[[.5,.5],[1.,2.]], [[-1.,-1.],[-2.,-4.]]],
    # class 0: ΣA is 10 and 2; two gradients of 1 give 2/(2+10), one gives 1/(2+2). class 1: only the 4 is positive: 4/(2+8)
    'gradcam++': [[[1/6,1/3+1/4],[1/2+1/4,2/3]], [[0.,.4],[.4,0.]]],
    'smooth_gradcam++': [[[1/6,1/3+1/4],[1/2+1/4,2/3]], [[0.,.4],[.4,0.]]], # of a linear head: noise changes no gradient
    'hirescam': [[[1.,-2.],[0.,4.]], [[-1.,-2.],[-3.,-4.]]],
    'layercam': [[[1.,0.],[0.,4.]], [[0.,0.],[0.,0.]]],
    # class 0: weights 5/10 and -2/2; class 1: -10/10 and 0/2
    'xgradcam': [[[.5,0.],[.5,2.]], [[-1.,-2.],[-3.,-4.]]],
    'eigencam': [[[5/(25+r*r)**.5,(10+r)/(25+r*r)**.5],[(15+r)/(25+r*r)**.5,20/(25+r*r)**.5]]]*2,
    # class 0: of g A, (1, 0, 0, 4) and (0, -2, 0, 0) are orthogonal, and the first is longer; class 1: the second channel is 0, and the first has the sign of the sum
    'eigengradcam': [[[1.,0.],[0.,4.]], [[-1.,-2.],[-3.,-4.]]],
    # class 0 - 0.6 class 1: weights 0.5+0.6 and -0.5-0.6; class 1 - 0.6 class 0: -1-0.3 and 1+0.3
    'finercam': [[[1.1,1.1],[2.2,4.4]], [[-1.3,-1.3],[-2.6,-5.2]]],
    # the masks are (0, 1/3, 2/3, 1) and (0, 1, 1, 0); class 0 scores them -2/3+4 and -2, class 1 -2/3-2-4 and -5
    'scorecam': [[[s,2*s+1-s],[3*s+1-s,4*s]] for s in (s0,s1)],
    # class 0: 3 falls by 5 without the first channel, and rises by 2 without the second; class 1: -10 rises by 10 to 0, and stays
    'ablationcam': [[[5/3,10/3-2/3],[5-2/3,20/3]], [[-1.,-2.],[-3.,-4.]]],
    # from here on the picture is what `activations` is above: the body passes it on
    'saliency': [[[1.,2.],[0.,1.]], [[4.,1.],[1.,1.]]],
    'smoothgrad': [[[1.,2.],[0.,1.]], [[4.,1.],[1.,1.]]],
    'gradient_x_input': [[[1.,-2.],[0.,4.]], [[-1.,-2.],[-3.,-4.]]],
    'integrated_gradients': [[[1.,-2.],[0.,4.]], [[-1.,-2.],[-3.,-4.]]], # from 0
    'occlusion': [[[1.,-2.],[0.,4.]], [[-1.,-2.],[-3.,-4.]]],            # a window of one pixel
}


def tiny():
    "A body that passes its input on, and a head whose gradients are `W`"
    m = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False)))
    m[0].weight.data = torch.eye(2)[...,None,None]
    m[1][1].weight.data = W.flatten(1)
    return m


@pytest.mark.parametrize('relu', [True, False])
@proves(*by_hand)
def test_by_hand(method, relu):
    maps,preds = model_heatmaps(tiny(), A, cls=[0,1], method=method, relu=relu)
    want = tensor(by_hand[method])
    torch.testing.assert_close(maps[0], F.relu(want) if relu else want)
    torch.testing.assert_close(preds, (A*W).sum((1,2,3))[None])


# ---- from activations and gradients

def strong(m):
    "In double precision, with weights so large that each ReLU is on here and off there"
    for p in m.parameters(): p.data *= 3
    return m.double().eval()


def body(): return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(inplace=True))
def deep(seed=0):
    "A conv net with a two-layer head"
    torch.manual_seed(seed)
    return strong(nn.Sequential(body(), nn.Sequential(nn.Flatten(), nn.Linear(6*25, 12), nn.ReLU(inplace=True), nn.Linear(12, 4))))


def gap(seed=0, pool=nn.AdaptiveAvgPool2d, head=None):
    "A conv net with a head of one mean and one linear layer, or others in their place"
    torch.manual_seed(seed)
    return strong(nn.Sequential(body(), nn.Sequential(pool(1), nn.Flatten(), head or nn.Linear(6, 4))))


def picture(n=1, seed=0, size=(11,11)): return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed)).double()


def cells(a): return [(i,j) for i in range(a.shape[-2]) for j in range(a.shape[-1])]
def by_loops(a, weight): # Σ_k w_kij A_kij
    res = torch.zeros(a.shape[1:]).double()
    for i,j in cells(a):
        for k in range(len(a)): res[i,j] += weight(k, i, j)*a[k,i,j]
    return res

loops = { # of one image: activations and gradients (C, h, w)
    'activations': lambda a, g: by_loops(a, lambda k, i, j: 1/len(a)),
    'gradcam':     lambda a, g: by_loops(a, lambda k, i, j: sum(g[k,u,v] for u,v in cells(g))/len(cells(g))),
    'hirescam':    lambda a, g: by_loops(a, lambda k, i, j: g[k,i,j]),
    'layercam':    lambda a, g: by_loops(a, lambda k, i, j: max(g[k,i,j], 0)),
    'xgradcam':    lambda a, g: by_loops(a, lambda k, i, j: sum(g[k,u,v]*a[k,u,v] for u,v in cells(g))/(sum(a[k,u,v] for u,v in cells(a)) or 1)),
}


@proves(*loops)
def test_weights_as_loops(method):
    "With gradients measured by finite differences"
    m,x = deep(1),picture()
    acts = m[0](x).detach()
    want = loops[method](acts[0], numeric(lambda a: m[1](a)[0,1], acts)[0])
    equal(signed(m, x, 1, method)[0], want, 1e-5)


@proves('gradcam++')
def test_gradcampp_against_third_derivatives(method):
    "The weights of the paper, with the derivatives of exp(score) taken by autograd rather than worked out"
    m,xb = deep(),picture(2)
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
        close(signed(m, x[None], 2, method)[0], want[0])


@proves('smooth_gradcam++')
def test_smooth_gradcampp_as_loops(method):
    "α = D2 / (2 D2 + ΣA D3), w = Σ α ReLU(D1), with D1, D2, D3 the means over noisy images of the gradient, its square and its cube; A those of the clean image"
    m,x,c,n = deep(),picture(),2,5
    D = torch.zeros(3, 6, 5, 5).double()
    for o in noisy(x, n, .3, seed=4):
        acts = m[0](o).detach().requires_grad_()
        g = torch.autograd.grad(m[1](acts)[0,c], acts)[0][0]
        for p in range(3): D[p] += g**(p+1)/n
    a = m[0](x).detach()[0]
    def weight(k):
        res,total = 0.,float(a[k].sum())
        for i,j in cells(a):
            d1,d2,d3 = map(float, D[:,k,i,j])
            if d1>0: res += d2/(2*d2+total*d3)*d1
        return res
    w = [weight(k) for k in range(6)]
    got = signed(m, x, c, method, n=n, noise=.3, seed=4)[0]
    equal(got, by_loops(a, lambda k, i, j: w[k]))
    assert (got-signed(m, x, c, method, n=n, noise=.3, seed=5)[0]).abs().max()>1e-3*got.abs().max() # other noise, another map


def test_smooth_gradcampp_without_noise_is_gradcampp():
    m,x = deep(),picture(2)
    for c in range(4): equal(signed(m, x, c, 'smooth_gradcam++', noise=0, n=3), signed(m, x, c, 'gradcam++'))


def test_noise_is_what_it_says():
    "Normal, centred on the image, its standard deviation a part of each image's own range; the same for the same seed"
    x = torch.stack([torch.linspace(-1, 3, 3*40*40).view(3,40,40), torch.linspace(0, .5, 3*40*40).view(3,40,40)])
    noise = torch.stack([o-x for o in noisy(x, 30, .2, 0)])
    for i,std in enumerate((.8, .1)):
        z,count = noise[:,i]/std,noise[:,i].numel()
        assert abs(float(z.mean()))<5/count**.5 and abs(float(z.std())-1)<5/(2*count)**.5
        assert abs(float((z.abs()<1).double().mean())-.6827)<5*(.6827*.3173/count)**.5
        assert abs(float((z[0]*z[1]).mean()))<5/z[0].numel()**.5 # the copies are independent
    again,other = [torch.stack(list(noisy(x, 30, .2, s)))-x for s in (0, 1)]
    assert torch.equal(again, noise) and not torch.equal(other, noise)


@proves('eigencam')
def test_eigencam_against_power_iteration(method):
    acts = torch.rand(3, 5, 4, 6)
    for a,got in zip(acts, heatmap_methods[method](acts)):
        O = a.flatten(1).T.double()
        v = torch.ones(5).double()
        for _ in range(500): v = F.normalize(O.T@(O@v), dim=0)
        equal(got.flatten().double(), O@v)
        assert (got>=0).all() # of activations that are not negative, the shared pattern is not either


@proves('eigengradcam')
def test_eigengradcam_against_power_iteration(method):
    "Of g ⊙ A; where values have both signs, the map's sign is the one in which it goes along with the sum of the channels"
    m,x = deep(2),picture(3)
    acts = m[0](x).detach().requires_grad_()
    grads, = torch.autograd.grad(m[1](acts)[:,1].sum(), acts)
    for o,got in zip((grads*acts).detach(), signed(m, x, 1, method)):
        O = o.flatten(1).T
        v = torch.randn(6, generator=torch.Generator().manual_seed(0)).double()
        for _ in range(5000): v = F.normalize(O.T@(O@v), dim=0)
        want = O@v
        if want@O.sum(1)<0: want = -want
        equal(got.flatten(), want)


def difference(m, x, c, others, gamma):
    "Grad-CAM of `y_c - gamma · mean y_d`, written as that difference, of one image"
    acts = m[0](x).detach().requires_grad_()
    y = m[1](acts)[0]
    g, = torch.autograd.grad(y[c]-gamma*sum(y[d] for d in others)/len(others), acts)
    return loops['gradcam'](acts[0].detach(), g[0])


@proves('finercam')
@pytest.mark.parametrize('kwargs,gamma', [(dict(), .6), (dict(n=1), .6), (dict(n=2, gamma=1.), 1.), (dict(n=9, gamma=.3), .3)])
def test_finercam_is_gradcam_of_the_difference(method, kwargs, gamma):
    "The others are those whose scores are nearest, above or below, of each image and class by itself"
    m,xb = deep(),picture(3)
    y = m(xb).detach()
    for c in range(4):
        got = signed(m, xb, c, method, **kwargs)
        for i in range(3):
            others = sorted((d for d in range(4) if d!=c), key=lambda d: abs(float(y[i,d]-y[i,c])))[:kwargs.get('n', 3)]
            equal(got[i], difference(m, xb[i:i+1], c, others, gamma))


def test_finercam_with_others_chosen_by_hand():
    m,x = deep(),picture()
    for others,want in ((3, [3]), ([0,3], [0,3])):
        equal(signed(m, x, 1, 'finercam', others=others)[0], difference(m, x, 1, want, .6))
    torch.testing.assert_close(signed(m, x, 1, 'finercam', gamma=0), signed(m, x, 1, 'gradcam'))
    with pytest.raises(ValueError, match='among them the class that is explained'): signed(m, x, 1, 'finercam', others=[0,1])


@proves('cam')
def test_cam_is_the_linear_layer_on_each_cell(method):
    "Its weights times the activations; with the bias, the mean of the map is the score"
    m,xb = gap(),picture(3)
    maps,scores = model_heatmaps(m, xb, cls=[2,0], method=method, relu=False)
    for i,a in enumerate(m[0](xb).detach()):
        for j,c in enumerate([2,0]):
            want = by_loops(a, lambda k, u, v: m[1][2].weight[c,k].detach())
            equal(maps[i,j].double(), want, 1e-5)
            equal(maps[i,j].double().mean()+m[1][2].bias[c].detach(), scores[i,c], 1e-5)


@pytest.mark.parametrize('head', [
    lambda: gap(pool=nn.AdaptiveMaxPool2d), lambda: gap(pool=AdaptiveConcatPool2d, head=nn.Linear(12, 4)), deep,
    lambda: gap(head=nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 4))), lambda: gap(head=nn.Sequential(nn.Linear(6, 4), nn.Sigmoid())),
    lambda: strong(nn.Sequential(body(), nn.Sequential(nn.Flatten(), nn.Linear(6*25, 4))))], ids=['max', 'concat', 'flat, two layers', 'two layers', 'sigmoid', 'flat'])
def test_cam_is_refused_for_other_heads(head):
    m,xb = head(),picture(2)
    with pytest.raises(ValueError, match="CAM is only defined for .* use 'gradcam'"): model_heatmaps(m, xb, method='cam')


# ---- at the input

def backward_by_hand(m, x, c, rule):
    "The gradient of score `c` of `deep()` at its input, taken back layer by layer, with `rule(gradient, what went into the ReLU)`"
    (conv,_),(_,one,_,two) = m
    z1 = F.conv2d(x, conv.weight, conv.bias, stride=2)
    z2 = z1.clamp(min=0).flatten(1)@one.weight.T + one.bias
    g = rule(two.weight[c].expand_as(z2), z2)@one.weight
    return F.conv_transpose2d(rule(g.view_as(z1), z1), conv.weight, stride=2).detach()

rules = {
    'saliency':        lambda g, z: g*(z>0),
    'guided_backprop': lambda g, z: g*(z>0)*(g>0),
    'deconvnet':       lambda g, z: g*(g>0),
}


@proves(*rules)
def test_back_through_the_relus_by_hand(method):
    m,xb = deep(),picture(3)
    for c in range(4): equal(signed(m, xb, c, method), backward_by_hand(m, xb, c, rules[method]).abs().amax(1))


@proves('saliency', 'gradient_x_input')
def test_gradients_by_finite_differences(method):
    m,x = deep(),picture()
    g = numeric(lambda o: m(o)[0,3], x)
    equal(signed(m, x, 3, method), g.abs().amax(1) if method=='saliency' else (g*x).sum(1), 1e-5)


class Call(nn.Module):
    "A function as a module"
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

def dropped(x):
    "In place, and nobody looks at what it returns"
    x.relu_()
    return x

relus = dict(module=nn.ReLU(), inplace=nn.ReLU(True), f=F.relu, f_inplace=partial(F.relu, inplace=True), f_=F.relu_, torch=torch.relu, torch_=torch.relu_,
             method=Tensor.relu, method_=Tensor.relu_, dropped=dropped)
relu6s = dict(module6=nn.ReLU6(), inplace6=nn.ReLU6(True), f6=F.relu6, f6_inplace=partial(F.relu6, inplace=True), hardtanh=nn.Hardtanh(0, 6),
              f_hardtanh=lambda x: F.hardtanh(x, 0., 6.), f_hardtanh_=lambda x: F.hardtanh_(x, 0., 6.))

def one_relu(relu):
    "Two channels, 3 x and -x, a ReLU, and a linear layer"
    m = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), relu if isinstance(relu, nn.Module) else Call(relu), nn.Flatten(), nn.Linear(8, 2, bias=False))
    m[0].weight.data = tensor([3.,-1.])[:,None,None,None]
    m[3].weight.data = tensor([[1.,1.,2.,1., 1.,-1.,1.,1.], [-1.,2.,-2.,1., 2.,1.,-3.,-1.]])
    return m

# of x = (1, -2, 3, -1): 3 x is (3, -6, 9, -3), and ReLU6 stops the 9; -x is (-1, 2, -3, 1)
one_relu_by_hand = {
    # the gradients of 3 x reach places 0 and 2, those of -x places 1 and 3 ...
    'saliency':        ([[3.,1.,6.,1.], [3.,1.,6.,1.]], [[3.,1.,0.,1.], [3.,1.,0.,1.]]),
    # ... those of them that are positive before the 3 or the -1 ...
    'guided_backprop': ([[3.,0.,6.,1.], [0.,1.,0.,0.]], [[3.,0.,0.,1.], [0.,1.,0.,0.]]),
    # ... or all that are positive, wherever they are: (3, 3, 6, 3) - (1, 0, 1, 1), and (0, 6, 0, 3) - (2, 1, 0, 0)
    'deconvnet':       ([[2.,3.,5.,2.], [2.,5.,0.,3.]],)*2,
}


@pytest.mark.parametrize('relu', [*relus, *relu6s])
@proves('guided_backprop', 'deconvnet')
def test_one_relu_by_hand(method, relu):
    "Whether it is a module, works in place, or is a function"
    m,x = one_relu({**relus, **relu6s}[relu]),tensor([1.,-2.,3.,-1.]).view(1,1,2,2)
    before = [(id(o), type(o), getattr(o, 'inplace', None)) for o in m.modules()]
    for k in (method, 'saliency'): # afterwards a plain gradient is plain, and the modules are the same
        torch.testing.assert_close(model_heatmaps(m, x, cls=[0,1], method=k)[0][0].flatten(1), tensor(one_relu_by_hand[k][relu in relu6s]))
    assert [(id(o), type(o), getattr(o, 'inplace', None)) for o in m.modules()]==before
    x.requires_grad_()
    m(x)[0,0].backward()
    torch.testing.assert_close(x.grad.flatten(), tensor([[3.,1.,6.,-1.], [3.,1.,0.,-1.]][relu in relu6s]))


def test_a_net_without_relus_has_no_guided_gradients():
    for method in ('guided_backprop', 'deconvnet'):
        with pytest.warns(UserWarning, match='calls no ReLU'): maps = model_heatmaps(tiny(), A, cls=[0,1], method=method)[0]
        torch.testing.assert_close(maps[0], tensor(by_hand['saliency']))


@proves('guided_gradcam')
def test_guided_gradcam_is_a_product(method):
    "Of guided gradients and what is positive of Grad-CAM, enlarged: a cell of the map is worth its tent of the picture"
    m,xb,c = deep(),picture(2),1
    guided = backward_by_hand(m, xb, c, rules['guided_backprop']).abs().amax(1)
    acts = m[0](xb).detach()
    cams = torch.stack([loops['gradcam'](a, numeric(lambda o: m[1](o[None])[0,c], a)) for a in acts]).clamp(min=0)
    tents = torch.zeros(11, 5).double() # of a pixel, the cell's share
    for p in range(11):
        at = min(max((p+.5)*5/11-.5, 0), 4)
        for q in range(5): tents[p,q] = max(0, 1-abs(at-q))
    equal(signed(m, xb, c, method), guided*(tents@cams@tents.T))


@proves('smoothgrad')
def test_smoothgrad_is_a_mean_of_gradients(method):
    "The mean first, then its size: of the largest of the colours"
    m,xb,c,n = deep(),picture(2),1,7
    for i in range(2):
        copies = torch.cat(list(noisy(xb[i:i+1].float(), n, .2, 3))).double()
        want = sum(backward_by_hand(m, o[None], c, rules['saliency']) for o in copies)/n
        for bs in (None, 1, 12): equal(signed(m, xb, c, method, n=n, noise=.2, seed=3, bs=bs)[i], want[0].abs().amax(0))
    torch.testing.assert_close(signed(m, xb, c, method, noise=0, n=2), signed(m, xb, c, 'saliency'))


class Quadratic(nn.Module):
    "Two scores xᵀ Q x of all pixels with all others"
    def __init__(self, size=2*4*4):
        super().__init__()
        self.Q = nn.Parameter(torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).double())
    def forward(self, x): return torch.einsum('ni,cij,nj->nc', x.flatten(1), self.Q, x.flatten(1))


def blurred(x, size, std):
    "Gaussian blur as a sum over the window, with the picture mirrored at its edges"
    r = size//2
    k = torch.tensor([[math.exp(-(i*i+j*j)/(2*std*std)) for j in range(-r, r+1)] for i in range(-r, r+1)]).double()
    wide,res = np.pad(x.numpy(), ((0,0),(0,0),(r,r),(r,r)), mode='reflect'),torch.zeros_like(x)
    for i in range(size):
        for j in range(size): res += k[i,j]/k.sum()*torch.tensor(wide[...,i:i+x.shape[2],j:j+x.shape[3]])
    return res

other = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(9)).double()
fills = [(.3, lambda x: torch.full_like(x, .3)), ('mean', lambda x: x.sum((2,3), keepdim=True)/x[0,0].numel()*torch.ones_like(x)),
         ('blur', lambda x: blurred(x, 3, .5)), (other, lambda x: other.expand_as(x)), (other[:,:1,:1], lambda x: other[:,:1,:1].expand_as(x))]


@pytest.mark.parametrize('fill,want', fills, ids=['number', 'mean', 'blur', 'picture', 'colour'])
def test_what_stands_for_nothing(fill, want):
    x = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(filled(x, fill), want(x))


def test_blur_of_a_larger_picture():
    "The window is about half as large as the shorter side, its standard deviation a sixth of that"
    x = torch.rand(2, 3, 12, 17, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(filled(x, 'blur'), blurred(x, 5, 5/6))


@pytest.mark.parametrize('fill,base', fills, ids=['number', 'mean', 'blur', 'picture', 'colour'])
@proves('integrated_gradients')
def test_integrated_gradients_of_a_quadratic_net(method, fill, base):
    "On the way from b to x the gradient (Q + Qᵀ) z is that of the middle, on average"
    m,x = Quadratic(),torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    b = base(x)
    got = signed(m, x, [1,0], method, baseline=fill, steps=3)
    for j,c in enumerate([1,0]):
        Q = (m.Q[c]+m.Q[c].T).detach()
        want = ((x-b).flatten(1) * ((x+b).flatten(1)/2@Q)).view_as(x).sum(1)
        equal(got[:,j], want)
        equal(got[:,j].sum((1,2)), (m(x)-m(b))[:,c].detach()) # completeness


class Powers(nn.Module):
    "The sums of x³ and x⁵"
    def forward(self, x): return torch.stack([(x**3).sum((1,2,3)), (x**5).sum((1,2,3))], 1)


def test_integrated_gradients_are_exact_with_few_steps_and_warn_with_fewer():
    "n steps integrate a polynomial of degree 2n-1; each pixel gets x³ - b³ or x⁵ - b⁵"
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()+1
    want = torch.stack([(x**p-.5**p).sum(1) for p in (3,5)], 1)
    def of(cls, steps): return signed(Powers(), x, cls, 'integrated_gradients', baseline=.5, steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        equal(of([0,1], 3), want, 1e-5)
        equal(of([0], 2), want[:,:1], 1e-5)
    with pytest.warns(UserWarning, match='take more than 1 steps'): got = of([0], 1)
    middle = ((x-.5)*3*((x+.5)/2)**2).sum(1) # one step takes the gradient of the middle
    equal(got[:,0], middle, 1e-5)
    share = float((middle.sum((1,2))/want[:,0].sum((1,2))).min())
    with pytest.warns(UserWarning, match=f'sum to {share:.0%} of'): of([0], 1)


def test_integrated_gradients_warn_of_one_image_beside_one_that_changes_nothing():
    x = torch.ones(2, 3, 4, 4).double()
    x[1] = .5 # as the baseline: 0 of 0
    share = .5*5*.75**4/(1-.5**5)
    with pytest.warns(UserWarning, match=f'sum to {share:.0%} of'): signed(Powers(), x, 1, 'integrated_gradients', baseline=.5, steps=1)


@kinks
def test_integrated_gradients_in_chunks_of_any_size():
    m,xb = deep(),picture(2)
    want = signed(m, xb, [0,2], 'integrated_gradients', steps=10)
    for bs in (1, 12, 1000): equal(signed(m, xb, [0,2], 'integrated_gradients', steps=10, bs=bs), want)
    b,w = [torch.tensor(o) for o in np.polynomial.legendre.leggauss(10)]
    for j,c in enumerate([0,2]):
        g = sum(wi/2*backward_by_hand(m, xb*(bi+1)/2, c, rules['saliency']) for bi,wi in zip(b, w))
        equal(want[:,j], (g*xb).sum(1))


# ---- by changing the image

class Sum(nn.Module):
    "The sum of the pixels, and minus it"
    def forward(self, x): return torch.stack([x.sum((1,2,3)), -x.sum((1,2,3))], 1)

nine = tensor([[1.,2.,3.],[4.,5.,6.],[7.,8.,9.]])[None,None]
@pytest.mark.parametrize('kwargs,want', [
    # the windows hide 12, 16, 24 and 28; where they overlap, the mean
    (dict(window=2, stride=1), [[12.,14.,16.],[18.,20.,22.],[24.,26.,28.]]),
    # the windows end at the edge: 1+2+4+5, 3+6, 7+8, 9
    (dict(window=2, stride=2), [[12.,12.,9.],[12.,12.,9.],[15.,15.,9.]]),
    (dict(window=(1,2), stride=(1,1)), [[3.,4.,5.],[9.,10.,11.],[15.,16.,17.]]),
    (dict(window=(3,1), stride=1), [[12.,15.,18.]]*3),
    (dict(window=9), [[45.]*3]*3),
    (dict(), [[1.,2.,3.],[4.,5.,6.],[7.,8.,9.]]),
    # less what is put there: 1 a pixel, the mean 5, or a picture
    (dict(window=2, stride=2, fill=1), [[8.,8.,7.],[8.,8.,7.],[13.,13.,8.]]),
    (dict(window=2, stride=2, fill='mean'), [[-8.,-8.,-1.],[-8.,-8.,-1.],[5.,5.,4.]]),
    (dict(window=2, stride=2, fill=nine[0].flip(2)), [[-4.,-4.,4.],[-4.,-4.,4.],[-2.,-2.,2.]]),
], ids=['overlap', 'edges', 'flat', 'high', 'all', 'default', 'number', 'mean', 'picture'])
@proves('occlusion')
def test_occlusion_by_hand(method, kwargs, want):
    got = signed(Sum(), nine, [0,1], method, **kwargs)[0].float()
    torch.testing.assert_close(got[0], tensor(want))
    torch.testing.assert_close(got[1], -tensor(want))


@pytest.mark.parametrize('window,stride,fill', [((5,4), (3,2), 0.), (3, 2, 'mean'), ((2,11), (1,7), .7), (4, 4, 'blur')])
@proves('occlusion')
def test_occlusion_as_loops(method, window, stride, fill):
    m,xb,c = deep(),picture(2),2
    nothing = filled(xb, fill)
    for i in range(2):
        total,count = torch.zeros(11, 11).double(),torch.zeros(11, 11).double()
        (h,w),(sh,sw) = [(o,o) if isinstance(o, int) else o for o in (window, stride)]
        top = 0
        while True:
            left = 0
            while True:
                x = xb[i].clone()
                inside = torch.zeros(11, 11, dtype=torch.bool)
                inside[top:top+h,left:left+w] = True
                x[:,inside] = nothing[i][:,inside]
                total[inside] += score(m, xb[i], c)-score(m, x, c)
                count[inside] += 1
                if left+w>=11: break
                left += sw
            if top+h>=11: break
            top += sh
        for bs in (None, 3): equal(signed(m, xb, c, method, window=window, stride=stride, fill=fill, bs=bs)[i], total/count)


@proves('rise')
def test_rise_is_the_formula(method):
    "Σ_m y(x ⊙ m) m / Σ_m m, less the mean of the scores"
    m,xb,c,n = deep(),picture(2),2,30
    masks = [o.double() for o in rise_masks(n, (11,11), 4, .4, 5)]
    for i in range(2):
        y = [score(m, xb[i]*o, c) for o in masks]
        want = sum(s*o for s,o in zip(y, masks))/sum(masks) - sum(y)/n
        for bs in (None, 7): equal(signed(m, xb, c, method, n=n, cells=4, p=.4, seed=5, bs=bs)[i], want)


def tent_products(size, cells):
    "The mean over all shifts of Σ_c tent_c(p) tent_c(q), for pixels p and q along one side"
    px = math.ceil(size/cells)
    res = torch.zeros(size, size).double()
    for shift in range(px):
        at = [min(max((p+shift+.5)/px-.5, 0), cells) for p in range(size)]
        tents = torch.tensor([[max(0, 1-abs(a-c)) for c in range(cells+1)] for a in at]).double()
        res += tents@tents.T/px
    return res


@pytest.mark.slow
@pytest.mark.parametrize('p', [.3, .5])
@proves('rise')
def test_rise_of_a_linear_net_against_its_expectation(method, p):
    "E[y | M_p = 1] - E[y] is (1-p) Σ_q K_pq w_q x_q, with p (1-p) K the covariance of the masks; within four standard errors"
    m,x,n = nn.Sequential(nn.Flatten(), nn.Linear(3*9*12, 2)).double(),picture(1, 3, (9,12)),10000
    w = torch.zeros(3, 9, 12).double()
    w[:,1:4,2:5],w[:,6:8,8:11] = 1.,-2.
    m[1].weight.data[1] = w.flatten()
    Ky,Kx,wx = tent_products(9, 3),tent_products(12, 3),(w*x[0]).sum(0)
    want = (1-p)*(Ky@wx@Kx.T)
    vary,square = p*(1-p)*(wx*(Ky@wx@Kx.T)).sum(),p*(1-p)*torch.outer(Ky.diag(), Kx.diag())+p*p # the variance of y, the mean of M²
    error = (vary*square).sqrt()/(p*n**.5)
    got = signed(m, x, 1, method, n=n, cells=3, p=p, bs=1000)[0]
    assert ((got-want).abs()<4*error).all() and want.abs().max()>40*error.max()


def test_rise_masks():
    "From 0 to 1, on average `p` everywhere, as smooth as their cells are wide; the same for the same seed"
    n,size,p = 1000,(20,33),.3
    masks = torch.stack(list(rise_masks(n, size, 5, p)))
    assert masks.shape==(n,*size) and masks.min()==0 and masks.max()==1
    means = masks.mean((1,2))
    assert abs(float(means.mean())-p)<4*float(means.std())/n**.5
    assert (masks.mean(0)-p).abs().max()<5*(p*(1-p)/n)**.5
    for d,px in ((1,4),(2,7)): assert abs(float(masks.diff(dim=d).abs().max())-1/px)<1e-5 # a cell is 20/5 or 33/5 pixels, rounded up
    again,other = [torch.stack(list(rise_masks(n, size, 5, p, s))) for s in (0, 1)]
    assert torch.equal(again, masks) and not torch.equal(other, masks)


def scorecam_as_loops(model, x, acts, c, keep):
    "One masked image after the other, of one image `x`; `acts` (C, h, w) in the scale of the layer, `keep` the channels that count"
    y = []
    for k in keep:
        mask = F.interpolate(acts[k][None,None], x.shape[1:], mode='bilinear', align_corners=False)[0,0]
        mask = (mask-mask.min())/(mask.max()-mask.min()) if mask.max()>mask.min() else mask*0
        y.append(score(model, x*mask, c))
    e = [math.exp(o) for o in y]
    return sum(o/sum(e)*acts[k] for o,k in zip(e, keep))


@pytest.mark.parametrize('channels', [None, 2, 6, 99])
@proves('scorecam')
def test_scorecam_as_loops(method, channels):
    m,xb = deep(),picture(3)
    acts = m[0](xb).detach()
    for c in (0, 2):
        got = signed(m, xb, c, method, channels=channels)
        for i in range(3):
            keep = sorted(range(6), key=lambda k: -float(acts[i,k].var()))[:channels or 6]
            want = scorecam_as_loops(m, xb[i], acts[i], c, keep)
            equal(got[i], want)
            equal(signed(m, xb[i:i+1], c, method, channels=channels, bs=4)[0], want)
        assert (want-acts[i].mean(0)).abs().max()>.1*want.max() # the channels do not count the same


class Without:
    "A hook that sets a channel of the layer's output to 0, in the tokens after the first `prefix` where it is one of tokens"
    def __init__(self, k, prefix=None): self.k,self.prefix = k,prefix
    def __call__(self, m, i, o):
        o = o.clone()
        if self.prefix is None: o[:,self.k] = 0
        else: o[:,self.prefix:,self.k] = 0
        return o


def ablation_as_loops(model, layer, x, a, c, prefix=None):
    "The whole model once for each channel of `layer`, of one image; `a` (C, h, w) its activations"
    y,w = score(model, x, c),[]
    for k in range(len(a)):
        hook = layer.register_forward_hook(Without(k, prefix))
        w.append((y-score(model, x, c))/abs(y))
        hook.remove()
    return sum(o*b for o,b in zip(w, a))


@pytest.mark.parametrize('layer', [None, '0', '0.2', '0.0'])
@pytest.mark.parametrize('bs', [None, 4])
@proves('ablationcam')
def test_ablationcam_as_loops(method, layer, bs):
    "The head alone runs again at the end of the body, all of the model elsewhere: to the same end"
    m,xb,c = deep(),picture(2),3
    m[0].append(nn.Conv2d(6, 8, 1).double())
    m[0].append(nn.ReLU())
    m[1][1] = nn.Linear(8*25, 12).double()
    hooked = m.get_submodule(layer or '0')
    with Hook(hooked, lambda mod, i, o: o.detach().clone()) as h: m(xb) # a copy: '0.0' is followed by a ReLU in place
    got = signed(m, xb, c, method, layer=layer, bs=bs)
    for i in range(2): equal(got[i], ablation_as_loops(m, hooked, xb[i], h.stored[i], c))


# ---- tokens, and channels that come last

class TinyAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads,self.qkv,self.out = heads,nn.Linear(d, 3*d),nn.Linear(d, d)
    def forward(self, x):
        q,k,v = self.qkv(x).unflatten(2, (3,self.heads,-1)).permute(2,0,3,1,4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1,2).flatten(2))

class TinyBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.norm1,self.attn,self.norm2,self.mlp = nn.LayerNorm(d),TinyAttention(d, heads),nn.LayerNorm(d),nn.Sequential(nn.Linear(d, 2*d), nn.GELU(), nn.Linear(2*d, d))
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class TinyViT(nn.Module):
    "Patches of 4×4 pixels and a class token, which alone is asked"
    def __init__(self, size=(8,12), d=6, heads=2, depth=3):
        super().__init__()
        self.patch,self.cls = nn.Conv2d(3, d, 4, stride=4),nn.Parameter(torch.randn(1, 1, d))
        self.pos = nn.Parameter(torch.randn(1, 1+size[0]*size[1]//16, d))
        self.blocks,self.norm,self.head = nn.Sequential(*[TinyBlock(d, heads) for _ in range(depth)]),nn.LayerNorm(d),nn.Linear(d, 4)
    def tokens(self, x): return torch.cat([self.cls.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1,2)], 1)+self.pos
    def answer(self, z): return self.head(self.norm(z)[:,0])
    def forward(self, x): return self.answer(self.blocks(self.tokens(x)))

def vit():
    torch.manual_seed(3)
    m = TinyViT().double().eval()
    for p in m.parameters(): p.data *= 1.5 # so that attention is not everywhere alike
    return m


def explicit_block(block, z, weights=None):
    "What a block does to tokens (1, T, d), its attention weights (heads, T, T) worked out from the softmax, or given"
    T,d = z.shape[1:]
    heads = block.attn.heads
    q,k,v = block.attn.qkv(block.norm1(z))[0].split(d, 1)
    out = []
    for h in range(heads):
        part = slice(h*d//heads, (h+1)*d//heads)
        if weights is None:
            logits = (q[:,part]@k[:,part].T/math.sqrt(d//heads)).exp()
            w = logits/logits.sum(1, keepdim=True)
        else: w = weights[h]
        out.append(w@v[:,part])
    z = z + block.attn.out(torch.cat(out, 1))[None]
    return z + block.mlp(block.norm2(z))

def softmaxes(block, z):
    "The attention weights (heads, T, T) of a block"
    (T,d),heads = z.shape[1:],block.attn.heads
    q,k,_ = block.attn.qkv(block.norm1(z))[0].split(d, 1)
    logits = torch.stack([q[:,h*d//heads:(h+1)*d//heads]@k[:,h*d//heads:(h+1)*d//heads].T for h in range(heads)])/math.sqrt(d//heads)
    return logits.exp()/logits.exp().sum(2, keepdim=True)


@proves('legrad')
def test_legrad_by_finite_differences(method):
    "Each block's score is what the head says to the mean of its tokens; its attention weights are changed one by one, and only in it"
    m,xb = vit(),picture(2, 0, (8,12))
    got = signed(m, xb, [0,3], method)
    for i in range(2):
        for j,c in enumerate([0,3]):
            z,total = m.tokens(xb[i:i+1]).detach(),torch.zeros(7).double()
            for block in m.blocks:
                grads = numeric(lambda w: m.head(m.norm(explicit_block(block, z, w).mean(1)))[0,c], softmaxes(block, z).detach())
                for h,q,k in itertools.product(range(2), range(7), range(7)): total[k] += max(float(grads[h,q,k]), 0)/(2*7)/len(m.blocks)
                z = explicit_block(block, z).detach()
            torch.testing.assert_close(m.answer(z), m(xb[i:i+1]), rtol=1e-6, atol=1e-8) # the net in the open is the net
            equal(got[i,j], total[1:].view(2,3))


def of_tokens(m, layer, x, c):
    "Tokens that `layer` puts out for one image, and the gradient of score `c` with respect to them: those of the patches, in their places (C, 2, 3)"
    z = m.blocks[:layer+1](m.tokens(x[None])).detach()
    g = numeric(lambda o: m.answer(m.blocks[layer+1:](o))[0,c], z)
    return [torch.stack([o[0,1+3*i+j] for i in range(2) for j in range(3)], 1).view(-1,2,3) for o in (z, g)]


@pytest.mark.parametrize('method', loops)
def test_tokens_are_cells(method):
    "The class token is no cell, and counts in no mean"
    m,xb = vit(),picture(2, 0, (8,12))
    got = signed(m, xb, 1, method, layer='blocks.0')
    for i in range(2): equal(got[i], loops[method](*of_tokens(m, 0, xb[i], 1)), 1e-5)


def test_tokens_of_the_default_layer():
    "After the last attention patches say nothing to the class token any more: the default is a layer whose every token counts"
    m,xb = vit(),picture(2, 0, (8,12))
    got = signed(m, xb, 1, 'gradcam')
    def block_2_after_norm1(z): # the last layer before attention mixes the tokens
        z0 = m.blocks[1](m.blocks[0](m.tokens(z))).detach()
        def rest(n):
            b,zz = m.blocks[2],z0+m.blocks[2].attn(n)
            return m.answer(zz+b.mlp(b.norm2(zz)))
        n = m.blocks[2].norm1(z0).detach()
        return n,numeric(lambda o: rest(o)[0,1], n)
    for i in range(2):
        n,g = [o[0,1:].T.reshape(-1,2,3) for o in block_2_after_norm1(xb[i:i+1])]
        equal(got[i], loops['gradcam'](n, g), 1e-5)


def test_tokens_that_are_scored_and_ablated():
    "The class token stays when a channel of the patches is taken away"
    m,xb,c = vit(),picture(2, 0, (8,12)),2
    score,ablation = [signed(m, xb, c, o, layer='blocks.0', bs=4) for o in ('scorecam', 'ablationcam')]
    for i in range(2):
        a,_ = of_tokens(m, 0, xb[i], c)
        equal(score[i], scorecam_as_loops(m, xb[i], a, c, range(6)))
        equal(ablation[i], ablation_as_loops(m, m.blocks[0], xb[i], a, c, prefix=1))


class ChannelsLast(nn.Module):
    "A net that keeps channels last from its stem on"
    def __init__(self):
        super().__init__()
        self.stem,self.mix,self.act,self.head = nn.Conv2d(3, 5, 4, stride=4),nn.Linear(5, 7),nn.GELU(),nn.Linear(2*3*7, 4)
        self.body = nn.Sequential(self.mix, self.act)
    def forward(self, x): return self.head(self.body(self.stem(x).permute(0,2,3,1)).flatten(1))


@pytest.mark.parametrize('layer', [None, 'body', 'mix'])
@pytest.mark.parametrize('method', loops)
def test_channels_that_come_last(method, layer):
    torch.manual_seed(5)
    m,xb,c = ChannelsLast().double(),picture(2, 0, (8,12)),1
    got = signed(m, xb, c, method, layer=layer)
    for i in range(2):
        a = m.mix(m.stem(xb[i:i+1]).permute(0,2,3,1)).detach()
        rest = (lambda o: m.head(m.act(o).flatten(1))) if layer=='mix' else lambda o: m.head(o.flatten(1))
        if layer!='mix': a = m.act(a)
        a,g = [o[0].permute(2,0,1) for o in (a, numeric(lambda o: rest(o)[0,c], a))]
        equal(got[i], loops[method](a, g), 1e-5)


# ---- what is common to all

def test_every_method_is_proved():
    assert proved==set(heatmap_methods)


def net_and_pictures(method, n):
    "A net of the kind that the method is for, pictures for it, and options that make it fast"
    m,x = (vit(),picture(n, 0, (8,12))) if method=='legrad' else (gap() if method=='cam' else deep(),picture(n))
    return m,x,dict(n=50) if method=='rise' else {}


@kinks
@pytest.mark.parametrize('method', heatmap_methods)
def test_a_batch_is_its_images(method):
    (m,xb,options),idxs = net_and_pictures(method, 5),tensor([3,0,1,1,2])
    maps,preds = model_heatmaps(m, xb, cls=idxs, method=method, relu=False, **options)
    for i in range(5):
        one,pred = model_heatmaps(m, xb[i:i+1], cls=int(idxs[i]), method=method, relu=False, **options)
        equal(maps[i:i+1], one)
        torch.testing.assert_close(preds[i:i+1], pred)


@kinks
@pytest.mark.parametrize('method', heatmap_methods)
def test_several_classes_are_each_by_itself(method):
    m,xb,options = net_and_pictures(method, 2)
    both = signed(m, xb, [3,1], method, **options)
    for j,c in enumerate([3,1]): equal(both[:,j], signed(m, xb, c, method, **options))
    assert method in ('activations', 'eigencam') or (both[:,0]-both[:,1]).abs().max()>.01*both.abs().max()


@pytest.mark.parametrize('method', [n for n,f in heatmap_methods.items() if f.needs in ('activations', 'gradients', 'layer')])
def test_several_layers_are_fused(method):
    "The mean of the maps, each scaled to its maximum and brought to the size of the largest"
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)) if method=='cam' else nn.Sequential(nn.Flatten(), nn.Linear(6*16, 2))
    m = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True)), head)
    layers = ['0.3', '0.1']
    if method=='cam': # which is defined where a mean and a linear layer follow
        m[0].append(nn.AvgPool2d(2))
        layers = ['0.5', '0.4']
    x = torch.rand(2, 3, 14, 14)
    small,large = [signed(m, x, [1], method, layer=l) for l in layers]
    both = signed(m, x, [1], method, layer=layers)
    def scaled(o): return o/o.abs().amax((2,3), keepdim=True)
    want = (scaled(large)+F.interpolate(scaled(small), large.shape[2:], mode='bilinear'))/2
    equal(both, want)
    assert small.abs().max()>0 and large.abs().max()>0 and (both-scaled(large)).abs().max()>.01

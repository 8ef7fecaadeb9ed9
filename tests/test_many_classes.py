"Many classes at once: the same maps as one class at a time, for any head, in the memory of a few."
import pytest, torch.utils.checkpoint
from shared import *
from fastai_heatmaps.core import hooks, passes
from fastai_heatmaps.core.no_trace import quiet, thread_modes

c = 40


class Looks(torch.autograd.Function):
    "The same numbers; on the way back it looks at them, so that several gradients cannot go together"
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g if g.sum()!=0 else -g


class Counts(torch.autograd.Function):
    "Changes a tensor of its own in place on the way back, which cannot be batched either"
    @staticmethod
    def forward(ctx, x):
        ctx.sum = torch.zeros(x.shape[1:])
        return 2*x
    @staticmethod
    def backward(ctx, g):
        ctx.sum.zero_().add_(g.sum(0))
        return 2*g + 0*ctx.sum


class Cube(torch.autograd.Function):
    "Forgets on the way back how its gradient came about, so that its derivative would be wrong"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3
    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        return 3*x**2*g + (g*x**2).detach()


class Do(nn.Module):
    "A function as a module"
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

def branch(x): return x.relu() if x.sum()>0 else x*2
def in_place(x): return x.mul(2).add_(1).relu_()
def again(x): return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)

def pooled(*more, c=c, pool=None): return nn.Sequential(pool or nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10), *more, nn.Linear(10, c))

heads = {
    'linear':   lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, c)),
    'no such':  lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, c)), # its weights are not the gradients
    'scaled':   lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, c), Do(lambda o: o*1.01)), # nor are these, but nearly
    'fastai':   lambda: create_head(6, c), # max and mean, BatchNorm, dropout
    'looks':    lambda: pooled(Do(Looks.apply)),
    'counts':   lambda: pooled(Do(Counts.apply)),
    'forgets':  lambda: pooled(Do(Cube.apply)),
    'branch':   lambda: pooled(Do(branch)),
    'in place': lambda: pooled(Do(in_place)),
    'again':    lambda: pooled(Do(again)),
    'script':   lambda: torch.jit.script(pooled(nn.GELU())),
    'flat':     lambda: nn.Sequential(nn.Flatten(), nn.Linear(6*25, c)),
}


def net(head):
    set_seed(1)
    m = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU()), heads[head]())
    for o in m.modules():
        if isinstance(o, nn.BatchNorm1d): nn.init.normal_(o.weight); nn.init.uniform_(o.running_var, .5, 2)
    return m


def same(model, x, method='gradcam', k=c, **kwargs):
    "The maps of `k` classes are those of each by itself"
    maps,scores = model_heatmaps(model, x, cls=list(range(k)), method=method, relu=False, **kwargs)
    for j in range(k):
        alone = model_heatmaps(model, x, cls=j, method=method, relu=False, **kwargs)[0][:,0]
        assert (maps[:,j]-alone).abs().max() <= 1e-5*alone.abs().max()
    assert maps.abs().max()>0 and scores.shape[1]>=k


by_layer = [n for n,f in heatmap_methods.items() if f.needs in ('gradients', 'layer') and n not in ('cam', 'smooth_gradcam++')]

@pytest.mark.parametrize('head', list(heads))
@pytest.mark.parametrize('method,size', [('gradcam', 10), ('gradcam', 7), ('layercam', 7)]) # 25 cells, and 16: fewer than half the classes
def test_any_head(head, method, size):
    if head=='flat': size = 10
    same(net(head), torch.rand(2, 3, size, size), method)


@pytest.mark.parametrize('method', [*by_layer, 'saliency', 'gradient_x_input', 'guided_backprop', 'smooth_gradcam++'])
@pytest.mark.parametrize('head', ['linear', 'fastai', 'looks'])
def test_any_method(method, head): same(net(head), torch.rand(2, 3, 7, 7), method, **quick.get(method, {}))


def test_cam(): same(net('linear'), torch.rand(2, 3, 7, 7), 'cam')


@pytest.mark.parametrize('method', ['gradcam', 'hirescam', 'legrad'])
def test_transformer(method): same(net_for('legrad', 40), torch.rand(1, 3, 64, 64), method, k=5 if method=='legrad' else 40)


def test_pixels_of_several_classes():
    "Each class of a segmentation is a mean over the pixels that are predicted as it"
    set_seed(0)
    same(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 6, 1), nn.Upsample(scale_factor=2))), torch.rand(2, 3, 16, 16), k=6)


# ---- which way

@contextmanager
def watched():
    "Count the backward passes, and note for each how many classes it took, and how many bytes its gradients have"
    seen,real = [],torch.autograd.grad
    def grad(outputs, inputs, grad_outputs, **kwargs):
        many = kwargs.get('is_grads_batched', False)
        res = real(outputs, inputs, grad_outputs, **kwargs)
        seen.append((len(grad_outputs) if many else 1, sum(o.numel()*o.element_size() for o in res)))
        return res
    torch.autograd.grad = grad
    try: yield seen
    finally: torch.autograd.grad = real


@pytest.mark.parametrize('head,method,k,passes', [
    ('linear', 'gradcam', 1, [1]),             # the plain way
    ('linear', 'gradcam', 20, [1]),            # the weights, which one pass has proved
    ('linear', 'layercam', 40, [1]),
    ('fastai', 'gradcam', 20, [20]),           # all at once
    ('fastai', 'layercam', 40, [1, 16, 1, 40]),# cell by cell; another mixture tells that it is not linear
    ('fastai', 'gradcam', 40, [1, 16, 1]),     # that it is
    ('looks', 'gradcam', 4, [1, 1, 1, 1])])
def test_each_way_is_taken_where_it_pays(head, method, k, passes):
    m,x = net(head),torch.rand(1, 3, 7, 7)
    if (head,method)==('linear','layercam'): passes = [1, 16, 1, *passes] # not linear, but these are the weights
    with watched() as seen: model_heatmaps(m, x, cls=list(range(k)), method=method)
    assert [n for n,_ in seen]==passes


def test_a_linear_head_is_proved_once():
    "and again where it is another, or no longer gives the scores"
    m,x = net('linear'),torch.rand(2, 3, 7, 7)
    def passes():
        with watched() as seen: maps,_ = model_heatmaps(m, x, cls=list(range(20)), relu=False)
        return len(seen),maps
    (first,maps),(again,same_maps) = passes(),passes()
    assert (first,again)==(1,0) and torch.equal(maps, same_maps)
    old = m[1][2]
    m[1][2] = nn.Linear(6, c+1) # with more classes
    same(m, x, k=20)
    assert passes()[0]==0
    m[1][2] = nn.Sequential(old, Do(lambda o: o*1.002)) # the scores are nearly those of `old`
    assert passes()[0]==2
    same(m, x, k=20)
    m[1][2] = old
    old.weight.data.mul_(3)
    torch.testing.assert_close(passes()[1], 3*maps)


def test_a_head_is_proved_for_each_picture():
    "The same body sees both, and the answer rests on the first alone, also where the second is the same picture"
    class First(nn.Module):
        def __init__(self): super().__init__(); self.net = net('linear')
        def forward(self, a, b):
            y = self.net(a)
            self.net[0](b)
            return y
    m,x = First(),torch.rand(2, 3, 7, 7)
    def ask(input): return model_heatmaps(m, (x,x.clone()), cls=list(range(20)), layer='net.0', input=input)[0]
    torch.testing.assert_close(ask(0), model_heatmaps(m.net, x, cls=list(range(20)))[0])
    with pytest.raises(ValueError, match='autograd sees no way'): ask(1)


@pytest.mark.parametrize('method', ['gradcam', 'layercam'])
def test_in_the_memory_of_a_few(method, monkeypatch):
    "What a backward pass computes stays within the limit, unless one class alone is above it"
    monkeypatch.setattr(hooks, 'at_once', 10_000)
    m,x = net('fastai'),torch.rand(2, 3, 7, 7) # activations of 768 bytes
    with watched() as seen: maps,_ = model_heatmaps(m, x, cls=list(range(c)), method=method)
    assert max(n for n,_ in seen)==10_000//768 and max(b for _,b in seen)<=10_000
    monkeypatch.setattr(hooks, 'at_once', 500)
    with watched() as seen: torch.testing.assert_close(model_heatmaps(m, x, cls=list(range(c)), method=method)[0], maps)
    assert {n for n,_ in seen}=={1}


def test_own_methods():
    "Linear or not, or one that wants numbers of its own: the same as class by class"
    m,x = net('fastai'),torch.rand(1, 3, 7, 7)
    def linear(a, g): return (g*a.sqrt()).sum(1)
    def numbers(a, g): return torch.as_tensor((g.detach().numpy()*a.numpy()).sum(1))
    def at_random(a, g): return (g*a).sum(1)*(1+torch.rand(()))
    for f in (linear, numbers): same(m, x, f)
    with draws_nothing(): model_heatmaps(m, x, cls=list(range(c)), method=at_random)


def test_kept_passes_remember_each_class(learn, pics):
    "A second question about a class costs no backward pass"
    from fastai_heatmaps.learner.kept import Passes
    passes = Passes(learn, Images(learn.dls.test_dl(get_image_files(pics)[:1]), [0]))
    passes.heatmaps(0)
    with watched() as seen:
        passes.heatmaps(1)
        passes.heatmaps(0, 'layercam')
    assert len(seen)==1

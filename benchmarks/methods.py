"""What each method costs next to the fastest peer that has it: `python benchmarks/methods.py [--reps 15] [--threads 2] [--only gradcam,occlusion]`

One image of 224×224, resnet18 with random weights (a small ViT for LeGrad), the same class and settings on both sides. Maps are compared before anything is timed.
Each ratio is the median over rounds in which all sides take turns, so that a busy machine slows all; below 1 we are faster. What a user of a peer makes once for a model, such as an extractor,
is made before; we have nothing of the kind. Each peer has its own copy of the model, since some leave hooks on it. Needs pytorch-grad-cam, torch-cam and captum."""
import copy, io, os, warnings
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
import numpy as np
from fastcore.script import call_parse
from cost import timed, warm

os.environ['TQDM_DISABLE'] = '1' # read when the peers import it
cases = {}


def case(name, goal=1., slow=False, **differ):
    "Decorator of a function `e -> (ours, peers)`, calls that give maps, `peers` as a dict; for methods that draw random numbers also `(ours, peers)` without, to compare. `differ` says of a peer why its map is another one"
    def _inner(f):
        cases[name] = SimpleNamespace(make=f, goal=goal, slow=slow, differ=differ)
        return f
    return _inner


def setup(threads=None):
    "The models, the image and the class"
    from fastai_heatmaps.all import set_seed, torch, nn, create_vision_model, resnet18, default_device
    from torchvision.models import VisionTransformer
    if threads: torch.set_num_threads(threads)
    set_seed(42)
    dev,model = default_device(),create_vision_model(resnet18, 37, pretrained=False)
    linear = nn.Sequential(copy.deepcopy(model[0]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 37)))
    vit = VisionTransformer(image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=37)
    with torch.no_grad():
        for m in (model, linear): m[1][-1].weight *= 10 # scores as far apart as after training: else Score-CAM's softmax is flat, and a peer's 1e-6 counts in Grad-CAM++
        vit.heads[0].weight.normal_() # torchvision sets it to 0
    return SimpleNamespace(model=model.eval().to(dev), linear=linear.eval().to(dev), vit=vit.eval().to(dev), x=torch.randn(1, 3, 224, 224, device=dev), c=5)


def ours(e, method, model=None, **kwargs):
    from fastai_heatmaps.all import model_heatmaps
    return lambda: model_heatmaps(model or e.model, e.x, cls=e.c, method=method, **kwargs)[0][:,0]


def grad_cam(e, name, layer='0', bs=None, call=None, **kwargs):
    "pytorch-grad-cam"
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    m = copy.deepcopy(e.model)
    cam = getattr(pytorch_grad_cam, name)(model=m, target_layers=[m.get_submodule(layer)], **kwargs)
    if bs: cam.batch_size = bs
    return lambda: cam(input_tensor=e.x, **(call or dict(targets=[ClassifierOutputTarget(e.c)])))


def torch_cam(e, name, layer='0', model=None, **kwargs):
    "torch-cam"
    import torchcam.methods
    m = copy.deepcopy(model or e.model)
    cam = getattr(torchcam.methods, name)(m, m.get_submodule(layer), **kwargs)
    return lambda: cam(e.c, m(e.x))[0]


def cell_sum(o): return o.sum(1).relu()
def top(o): return o.abs().amax(1)


def captum(e, name, layer=None, then=cell_sum, tunnel=False, **kwargs):
    "captum; `then` makes a map of its attributions"
    import captum.attr
    m = copy.deepcopy(e.model)
    a = getattr(captum.attr, name)(m, *([m.get_submodule(layer)] if layer else []))
    if tunnel: a = captum.attr.NoiseTunnel(a)
    if name!='LayerActivation': kwargs['target'] = e.c
    return lambda: then(a.attribute(e.x, **kwargs))


@case('activations')
def _(e): return ours(e, 'activations'),{'captum': captum(e, 'LayerActivation', '0', lambda o: o.mean(1))}

@case('cam')
def _(e): return ours(e, 'cam', e.linear, relu=False),{'torch-cam': torch_cam(e, 'CAM', model=e.linear, fc_layer='1.2')}

@case('gradcam')
def _(e): return ours(e, 'gradcam'),{'pytorch-grad-cam': grad_cam(e, 'GradCAM'), 'torch-cam': torch_cam(e, 'GradCAM'), 'captum': captum(e, 'LayerGradCam', '0', relu_attributions=True)}

@case('gradcam of 37 classes', .5, slow=True)
def _(e):
    "torch-cam's extractor can be asked again after one forward pass; the others need the image in a batch"
    from fastai_heatmaps.all import model_heatmaps, torch
    import pytorch_grad_cam, torchcam.methods, captum.attr
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    k,(l,m,n) = list(range(37)),[copy.deepcopy(e.model) for _ in range(3)]
    cam,pgc,layer,xs = torchcam.methods.GradCAM(l, l[0]),pytorch_grad_cam.GradCAM(model=m, target_layers=[m[0]]),captum.attr.LayerGradCam(n, n[0]),e.x.expand(37, -1, -1, -1)
    def again():
        scores = l(e.x)
        return torch.cat([cam(c, scores, retain_graph=c<36)[0] for c in k])
    return lambda: model_heatmaps(e.model, e.x, cls=k)[0][0],{
        'torch-cam': again, 'torch-cam, a forward pass each': lambda: torch.cat([cam(c, l(e.x))[0] for c in k]),
        'captum': lambda: layer.attribute(xs, target=k, relu_attributions=True)[:,0],
        'pytorch-grad-cam': lambda: pgc(input_tensor=xs, targets=[ClassifierOutputTarget(c) for c in k])}

@case('gradcam++', torch_cam='0.5.0 leaves out the division')
def _(e): return ours(e, 'gradcam++'),{'pytorch-grad-cam': grad_cam(e, 'GradCAMPlusPlus'), 'torch-cam': torch_cam(e, 'GradCAMpp')}

@case('smooth_gradcam++, 8 copies')
def _(e):
    std = .15*float(e.x.max()-e.x.min())
    return (ours(e, 'smooth_gradcam++', n=8), {'torch-cam': torch_cam(e, 'SmoothGradCAMpp', num_samples=8, std=std)},
            ours(e, 'smooth_gradcam++', e.linear, n=8, noise=0.), {'torch-cam': torch_cam(e, 'SmoothGradCAMpp', model=e.linear, num_samples=8, std=1e-9)})

@case('hirescam')
def _(e): return ours(e, 'hirescam'),{'pytorch-grad-cam': grad_cam(e, 'HiResCAM'), 'captum': captum(e, 'LayerGradientXActivation', '0')}

@case('layercam')
def _(e): return ours(e, 'layercam'),{'pytorch-grad-cam': grad_cam(e, 'LayerCAM'), 'torch-cam': torch_cam(e, 'LayerCAM')}

@case('xgradcam')
def _(e): return ours(e, 'xgradcam'),{'pytorch-grad-cam': grad_cam(e, 'XGradCAM'), 'torch-cam': torch_cam(e, 'XGradCAM')}

@case('eigencam', pytorch_grad_cam='centres the matrix, and leaves the sign to chance')
def _(e): return ours(e, 'eigencam'),{'pytorch-grad-cam': grad_cam(e, 'EigenCAM')}

@case('eigengradcam', pytorch_grad_cam='centres the matrix, and leaves the sign to chance')
def _(e): return ours(e, 'eigengradcam'),{'pytorch-grad-cam': grad_cam(e, 'EigenGradCAM')}

@case('finercam', pytorch_grad_cam='weights the other classes by their probabilities')
def _(e): return ours(e, 'finercam'),{'torch-cam': torch_cam(e, 'FinerCAM'), 'pytorch-grad-cam': grad_cam(e, 'FinerCAM', call=dict(target_idx=e.c, alpha=.6))}

@case('saliency')
def _(e): return ours(e, 'saliency'),{'captum': captum(e, 'Saliency', then=top)}

@case('gradient_x_input')
def _(e): return ours(e, 'gradient_x_input'),{'captum': captum(e, 'InputXGradient')}

@case('guided_backprop')
def _(e):
    from pytorch_grad_cam import GuidedBackpropReLUModel
    m = GuidedBackpropReLUModel(model=copy.deepcopy(e.model), device=e.x.device)
    return ours(e, 'guided_backprop'),{'captum': captum(e, 'GuidedBackprop', then=top), 'pytorch-grad-cam': lambda: np.abs(m(e.x.clone(), e.c)).max(2)[None]}

@case('deconvnet')
def _(e): return ours(e, 'deconvnet'),{'captum': captum(e, 'Deconvolution', then=top)}

@case('guided_gradcam')
def _(e): return ours(e, 'guided_gradcam'),{'captum': captum(e, 'GuidedGradCam', '0', top, interpolate_mode='bilinear')}

def smooth(e, bs=None):
    std = .15*float(e.x.max()-e.x.min())
    def peer(std): return captum(e, 'Saliency', then=top, tunnel=True, nt_samples=16, stdevs=std, abs=False)
    return ours(e, 'smoothgrad', n=16, bs=bs),{'captum': peer(std)},ours(e, 'smoothgrad', n=16, noise=0., bs=bs),{'captum': peer(1e-9)}

@case('smoothgrad, 16 copies at once', slow=True)
def _(e): return smooth(e, 64)

@case('smoothgrad, 16 copies, defaults', slow=True)
def _(e): return smooth(e)

@case('integrated_gradients, 20 steps at once', slow=True)
def _(e): return ours(e, 'integrated_gradients', steps=20, bs=80),{'captum': captum(e, 'IntegratedGradients', n_steps=20)}

@case('integrated_gradients, 20 steps, defaults', slow=True)
def _(e): return ours(e, 'integrated_gradients', steps=20),{'captum': captum(e, 'IntegratedGradients', n_steps=20)}

def occlude(e, bs=None, **kwargs): return ours(e, 'occlusion', window=32, stride=32, bs=bs),{'captum': captum(e, 'Occlusion', sliding_window_shapes=(3,32,32), strides=(3,32,32), **kwargs)}

@case('occlusion, 49 windows, 16 at once', slow=True)
def _(e): return occlude(e, 16, perturbations_per_eval=16)

@case('occlusion, 49 windows, defaults', .5, slow=True)
def _(e): return occlude(e)

score_why = dict(pytorch_grad_cam='enlarges with align_corners', torch_cam='scales before it enlarges')

@case('scorecam, 128 channels, 32 at once', slow=True, **score_why)
def _(e): return ours(e, 'scorecam', layer='0.5', bs=32),{'pytorch-grad-cam': grad_cam(e, 'ScoreCAM', '0.5', bs=32), 'torch-cam': torch_cam(e, 'ScoreCAM', '0.5', batch_size=32)}

@case('scorecam, 128 channels, defaults', .5, slow=True, **score_why)
def _(e): return ours(e, 'scorecam', layer='0.5'),{'pytorch-grad-cam': grad_cam(e, 'ScoreCAM', '0.5'), 'torch-cam': torch_cam(e, 'ScoreCAM', '0.5')}

@case('ablationcam', .5, slow=True)
def _(e):
    "captum's LayerFeatureAblation runs the whole model for each of the 512 channels, and is left out"
    return ours(e, 'ablationcam'),{'pytorch-grad-cam': grad_cam(e, 'AblationCAM')}

@case('legrad')
def _(e):
    import torchcam.methods
    m = copy.deepcopy(e.vit)
    cam = torchcam.methods.LeGrad(m, list(m.encoder.layers))
    return ours(e, 'legrad', e.vit),{'torch-cam': lambda: cam(e.c, m(e.x))[0]}

@case('rise, 64 masks', slow=True)
def _(e):
    "No peer: compared with as many forward passes of one image"
    from fastai_heatmaps.all import torch
    def passes():
        with torch.no_grad():
            for _ in range(64): e.model(e.x)
    return ours(e, 'rise', n=64),{'64 forward passes': passes}


def scaled(o, size):
    "A map (n, h, w) enlarged to `size`, each image from 0 to 1"
    from fastai_heatmaps.all import torch, F
    o = F.interpolate(torch.as_tensor(o).detach().cpu().float()[:,None], size, mode='bilinear')[:,0]
    lo,hi = o.amin((1,2), keepdim=True),o.amax((1,2), keepdim=True)
    return (o-lo)/(hi-lo).clamp(min=1e-20)


def compare(name, f, peers, differ):
    "Notes on maps that differ for a known reason. Raises AssertionError where a peer's map is another one than ours for none"
    res = []
    for k,g in peers.items():
        a,b = f(),g()
        diff,why = float((scaled(a, b.shape[1:])-scaled(b, b.shape[1:])).abs().max()),differ.get(k.replace('-', '_'))
        assert why or diff<.01, f'{name}: the map of {k} is {diff:.3f} off ours, of a range of 1'
        if why: res.append(f'{k} {why}: its map is {diff:.3f} off ours, of a range of 1')
    return res


def race(fs, reps):
    "Seconds (reps, len(fs)) of each of `fs`; they take turns, and another one begins each round"
    n,res = len(fs),np.zeros((reps, len(fs)))
    for i in range(reps):
        for j in range(n):
            k = (i+j)%n if i//n%2==0 else (i-j)%n
            res[i,k] = timed(fs[k])
    return res


@call_parse
def main(
    reps:int=15, # Rounds for each method; the slow ones get a fifth
    threads:int=None, # Of torch; None = its own choice
    only:str='' # Methods, with commas between: those whose names begin so
):
    e = setup(threads)
    from fastai_heatmaps.all import torch
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU with {torch.get_num_threads()} threads'}")
    print(f"{'method':40} ratio   goal          to each peer, and what it took")
    for name,c in cases.items():
        if only and not name.startswith(tuple(only.split(','))): continue
        f,peers,*check = c.make(e)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()): # progress bars
                notes = [] if name.startswith('rise') else compare(name, *(check or (f, peers)), c.differ)
                if not c.slow: race([f, *peers.values()], warm)
                t = race([f, *peers.values()], max(3, reps//5) if c.slow else reps)
        ratios,ms = np.median(t[:,:1]/t[:,1:], 0),1000*np.median(t[:,1:], 0)
        order = np.argsort(-ratios)
        goal = '' if name.startswith('rise') else f"{c.goal:.1f}  {'ok' if ratios.max()<=c.goal else 'MISSED'}"
        print(f"{name:40} {ratios.max():5.2f}   {goal:13} {', '.join(f'{list(peers)[i]} {ratios[i]:.2f} ({ms[i]:.0f} ms)' for i in order)}", flush=True)
        for n in notes: print(f'    {n}')

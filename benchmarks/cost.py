"""What heatmaps cost, as ratios within one run: `python benchmarks/cost.py [--reps 15] [--threads 2]`

resnet34 with random weights at 224×224, with fastai's head, and for many classes the pretrained EfficientNet-Lite0, whose head is linear; on the CPU or, where there is one, the GPU. Each ratio is the median over `reps` rounds in which both sides take turns,
so that a busy machine slows both. Peak memory is measured in a fresh process each."""
import json, os, re, subprocess, sys, tempfile, time
import numpy as np
from fastcore.script import call_parse

warm = 2


def setup(n, threads=None):
    "resnet34 as `vision_learner` makes it, and a batch"
    from fastai_heatmaps.all import set_seed, torch, create_vision_model, resnet34, default_device
    if threads: torch.set_num_threads(threads)
    set_seed(42)
    dev = default_device()
    return create_vision_model(resnet34, 37, pretrained=False).eval().to(dev), torch.randn(n, 3, 224, 224, device=dev)


def lite(n):
    "The pretrained EfficientNet-Lite0, and a batch"
    from fastai_heatmaps.all import torch, demo_learner, default_device
    return demo_learner().model.eval().to(default_device()), torch.randn(n, 3, 224, 224, device=default_device())


def plain(model, xb):
    import torch
    with torch.no_grad(): model(xb)


def recipe(model, xb):
    "Grad-CAM as it is usually written: two hooks on the body and a backward pass through everything"
    from fastai_heatmaps.all import hook_output, F
    with hook_output(model[0]) as a, hook_output(model[0], grad=True) as g: model(xb)[:,5].sum().backward()
    model.zero_grad()
    return F.relu((a.stored*g.stored[0].mean((2,3), keepdim=True)).sum(1))


def sync():
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()


def timed(f):
    sync()
    t = time.perf_counter()
    f()
    sync()
    return time.perf_counter()-t


def ratio(f, base, reps):
    "Median over `reps` rounds of the time of `f` to that of `base`; which goes first changes from round to round"
    for _ in range(warm): f(); base()
    res = []
    for i in range(reps):
        if i%2: b,a = timed(base),timed(f)
        else:   a,b = timed(f),timed(base)
        res.append((a/b, b))
    return float(np.median([o[0] for o in res])), float(np.median([o[1] for o in res]))


def report(name, got, goal, base=None):
    print(f"{name:58} {got:6.2f}   goal {goal:.2f}   {'ok' if got<=goal else 'MISSED'}{'' if base is None else f'   (1.0 = {1000*base:.0f} ms)'}", flush=True)


def peak(what, n):
    "Peak memory in MB of a fresh process that does `what` with a batch of `n`"
    res = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--only', what, '--n', str(n)], capture_output=True, text=True, check=True)
    return json.loads(res.stdout.splitlines()[-1])


def measure_peak(what, n):
    "In the fresh process: the peak above what the model and the batch take"
    import torch
    from fastai_heatmaps.all import model_heatmaps
    model,xb = setup(n)
    f = dict(plain=lambda: plain(model, xb), gradcam=lambda: model_heatmaps(model, xb), many=lambda: model_heatmaps(model, xb, cls=list(range(37))))[what]
    if torch.cuda.is_available():
        f() # the first run of cuDNN tries algorithms
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated()/2**20
    f()
    return high_water()


def high_water():
    "Peak memory of this process in MB. Not `ru_maxrss`, which begins with that of the parent process"
    return int(re.search(r'VmHWM:\s*(\d+)', open('/proc/self/status').read())[1])/2**10 # Linux


def folder_learner(path, n, bs, arch=None):
    "A Learner on `n` photos in a folder, made on the spot"
    from fastai_heatmaps.all import np, Image, ImageDataLoaders, Resize, vision_learner, resnet34, set_seed
    set_seed(42)
    rng = np.random.default_rng(0)
    for i in range(n):
        to = path/['valid','train'][i<2]/'ab'[i%2]
        to.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30,40,3), dtype=np.uint8)).resize((400,300)).save(to/f'{i}.jpg')
    dls = ImageDataLoaders.from_folder(path, valid='valid', item_tfms=Resize(224), bs=bs)
    return vision_learner(dls, arch or resnet34, pretrained=False, normalize=False)


def checks(path, reps, n=64, bs=16):
    "Focus and faithfulness against the forward passes that they need, which are counted by hand"
    from fastai_heatmaps.all import torch, nn, noop, resnet18
    learn = folder_learner(path, n+2, bs, resnet18)
    x,mosaic = torch.randn(bs, 3, 224, 224, device=learn.dls.device),torch.randn(bs//4, 3, 448, 448, device=learn.dls.device)
    def passes(*batches):
        with torch.no_grad():
            for b,times in batches:
                for _ in range(times): learn.model.eval()(b)
    with learn.no_bar(), learn.no_logging():
        last = learn.model[1][-1]
        last.bias = nn.Parameter(-learn.get_preds(act=noop)[0].mean(0).to(x)) # so that it names either class now and then
        photos = list(learn.dls.valid.items) # without labels, what it says is right
        m = n//4
        each = (x, n//bs),(mosaic, 4*m//bs)
        yield f'Focus of {m} mosaics, and a look at {n} photos',*ratio(lambda: learn.heatmap_focus(photos, n=m), lambda: passes(*each), reps)
        hm = learn.get_heatmaps(photos[:bs])
        each = (x, 1),(x.contiguous(memory_format=torch.channels_last), 2 + 3*(9+9+1))
        yield f'faithfulness of {bs} photos: deletion, insertion, drop',*ratio(hm.faithfulness, lambda: passes(*each), reps)


def import_seconds():
    "What importing this package takes in a fresh process that has imported fastai: (this, fastai)"
    code = """import time
t = time.perf_counter()
from fastai.vision.all import *
u = time.perf_counter()
from fastai_heatmaps.all import *
print(time.perf_counter()-u, u-t)"""
    env = {k:v for k,v in os.environ.items() if k!='PYTHONDONTWRITEBYTECODE'} # as for a user, nothing is compiled anew
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True, env=env)
    return [float(o) for o in res.stdout.split()]


@call_parse
def main(
    reps:int=15, # Rounds for each ratio
    threads:int=None, # Of torch; None = its own choice
    only:str='', # Internal: measure the peak memory of 'plain', 'gradcam' or 'many' in this process
    n:int=64 # Internal: with this batch size
):
    if only: return print(json.dumps(measure_peak(only, n)))
    from fastai_heatmaps.all import torch, model_heatmaps, Path
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU with {threads or torch.get_num_threads()} threads'}")
    for bs in (1, 16):
        model,xb = setup(bs, threads)
        got,base = ratio(lambda: model_heatmaps(model, xb), lambda: plain(model, xb), reps)
        report(f'model_heatmaps, Grad-CAM, batch {bs}', got, 1.10, base)
        got,base = ratio(lambda: recipe(model, xb), lambda: plain(model, xb), reps)
        print(f"{f'  for comparison: the usual recipe, batch {bs}':58} {got:6.2f}")
    for name,bs,k,goal in (('resnet34', 1, 37, 1.15), ('resnet34', 16, 37, 1.06), ('Lite0', 1, 37, 1.25), ('Lite0', 16, 37, 1.06), ('Lite0', 1, 1000, 2.)):
        model,xb = setup(bs, threads) if name=='resnet34' else lite(bs)
        got,base = ratio(lambda: model_heatmaps(model, xb, cls=list(range(k))), lambda: plain(model, xb), reps)
        report(f'Grad-CAM of {k} classes, {name}, batch {bs}', got, goal, base)
    with tempfile.TemporaryDirectory() as d:
        learn = folder_learner(Path(d), 160, 16)
        with learn.no_bar():
            got,base = ratio(lambda: learn.get_heatmaps(), lambda: learn.get_preds(), max(3, reps//3))
        report('get_heatmaps to get_preds, a folder of 158 photos', got, 1.08, base)
        for name,got,base in checks(Path(d)/'checks', max(3, reps//3)): report(name, got, 1.15, base)
    *ours,b = [np.median([peak(o, 64) for _ in range(3)]) for o in ('gradcam', 'many', 'plain')]
    for a,k in zip(ours, ('one class', '37 classes')): report(f'peak memory, batch 64, {k} ({a:.0f} to {b:.0f} MB, the whole process)', a/b, 1.15)
    ours,fastai = np.median([import_seconds() for _ in range(6)][1:], axis=0) # the first may compile
    report(f'seconds that the import adds to the {fastai:.1f} of fastai', ours, .10)

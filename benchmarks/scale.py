"""A whole set next to its predictions: `python benchmarks/scale.py [--n 2000] [--reps 3]`

Photos made on the spot, resnet18 with random weights at 224×224. Time is the median ratio of rounds in which both sides take turns; peak memory is that of the whole process,
a fresh one for each figure. `get_heatmaps(out=...)` writes into a folder as it goes; then another run finds all of it there."""
import json, subprocess, sys, tempfile
import numpy as np
from fastcore.script import call_parse
from cost import folder_learner, high_water, report, timed
from methods import race


def learner(path, n, bs):
    "A Learner with `n` photos in its validation set"
    from fastai_heatmaps.all import resnet18
    return folder_learner(path, n+2, bs, resnet18)


def peak(what, n, bs):
    "Peak memory in MB of a fresh process that goes through `n` photos"
    res = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--only', what, '--n', str(n), '--bs', str(bs)], capture_output=True, text=True, check=True)
    return json.loads(res.stdout.splitlines()[-1])


def run(learn, what, out):
    if what=='preds':    return learn.get_preds()
    if what=='heatmaps': return learn.get_heatmaps()
    return learn.get_heatmaps(out=out)


@call_parse
def main(
    n:int=2000, # Photos
    bs:int=32, # Batch size
    reps:int=3, # Rounds
    only:str='' # Internal: measure the peak memory of 'preds', 'heatmaps' or 'written' in this process
):
    with tempfile.TemporaryDirectory() as d:
        from fastai_heatmaps.all import Path, load_heatmaps
        learn = learner(Path(d)/'photos', n, bs)
        with learn.no_bar():
            if only:
                run(learn, only, Path(d)/'out')
                return print(json.dumps(high_water()))
            folders = iter(range(99))
            t = race([lambda: run(learn, 'preds', None), lambda: run(learn, 'heatmaps', None), lambda: run(learn, 'written', Path(d)/f'out{next(folders)}')], reps+1)[1:] # the first round is slower
            for i,o in enumerate(['get_heatmaps to get_preds', 'get_heatmaps(out=) to get_preds'], 1): report(f'{o}, {n} photos', np.median(t[:,i]/t[:,0]), 1.08, np.median(t[:,0]))
            print(f"a run that finds all of it there: {timed(lambda: run(learn, 'written', Path(d)/'out0')):.2f} s")
    mb = {(o,m):peak(o, m, bs) for o in ('preds', 'heatmaps', 'written') for m in (n//4, n)}
    for o in ('heatmaps', 'written'): report(f'peak memory of {o} above get_preds, {n} photos, MB', mb[o,n]-mb['preds',n], 100)
    for o in ('preds', 'heatmaps', 'written'): print(f'peak memory of {o}: {mb[o,n//4]:.0f} MB with {n//4} photos, {mb[o,n]:.0f} with {n}; the maps take {n*49*4/2**20:.1f}')

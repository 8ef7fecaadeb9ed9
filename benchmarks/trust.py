"""Which method finds the truth, and which can be trusted on photos?

`python benchmarks/trust.py [--n 32] [--only gradcam,layercam] [--photos FOLDER]`

First, pictures and models of which it is known what the answer rests on (trust/truth): the energy in the patch that the model
uses, and in the one that it does not, each ± a standard error; whether the brightest cell is in the used patch; and the time of
a picture, by `get_heatmaps`. Needs no weights and no photos.

With `--photos` also the demo Learner on photos, FOLDER/CLASS/*.jpg: Focus, sanity, deletion and insertion. If all folders have
names of ImageNet classes, these are the labels; else what the model says counts as right. The slow methods are asked with fewer
masks and copies than usual, as the first column says."""
import time, warnings
from fastcore.script import call_parse

fewer = dict(rise=dict(n=200), smoothgrad=dict(n=8), integrated_gradients=dict(steps=20), scorecam=dict(channels=96)) # on photos


def chosen(only, fewer):
    "A label and a `Method` for each that is asked"
    from fastai_heatmaps.all import heatmap_methods
    from fastai_heatmaps.core.method import get_method
    names = [m for m in heatmap_methods if not only or m in only.split(',')]
    if not names: raise SystemExit(f"only is {only!r}; expected some of {', '.join(heatmap_methods)}")
    options = {m:fewer.get(m, {}) for m in names}
    return {' '.join([m, *[f'{k}={v}' for k,v in options[m].items()]]): get_method(m, **options[m]) for m in names}


def said(mean, error): return f'{mean:5.2f} ± {error:.2f}'


def on_truth(kind, methods, n, seed):
    "Print the table of the methods on a model whose truth is known"
    from fastai_heatmaps.trust.truth import truth_learner, swap_effect, score_methods
    learn = truth_learner(kind, n, seed)
    print(f"\nThe model '{kind}'. Answers that change with the colour of a patch:")
    for which in ('used','unused'): print('{} {:.0%} (probability by at most {:.3f})'.format(which, *swap_effect(learn, which)))
    print()
    print(f"{'method':34} {'used':>12} {'unused':>13} pointing {'ms':>7}  marks")
    refused = []
    for name,f in methods.items():
        try: row, = score_methods(learn, [f]).table.to_dict('records')
        except ValueError as e:
            refused.append(f'{name} cannot be asked: {str(e).splitlines()[0]}')
            continue
        start = time.perf_counter()
        learn.get_heatmaps(method=f)
        ms = 1000*(time.perf_counter()-start)/n
        energy = ' '.join(said(row[k], row[f'{k}_error']) for k in ('used','unused'))
        print(f"{name:34} {energy} {row['pointing']:8.2f} {ms:7.1f}  {row['marks']}", flush=True)
    print(f"{'a uniform map':34} {1/16:5.2f} {1/16:13.2f} {1/16:15.2f}", *refused, sep='\n')


def labelled(folder, vocab):
    "The photos of a folder, as items; with a label where their folder's name is a class"
    from fastai_heatmaps.all import get_image_files
    by_name = {str(v).lower():v for v in vocab}
    items = [(f, by_name.get(f.parent.name.replace('_', ' ').lower())) for f in sorted(get_image_files(folder))]
    return items if all(c for _,c in items) else [f for f,_ in items] # all or none


def on_photos(folder, methods, n, seed):
    "Print the table of the methods on the demo Learner"
    from fastai_heatmaps.all import ProgressCallback, demo_learner, np, default_device
    from fastai_heatmaps.data.images import to_images
    from fastai_heatmaps.learner.run import shadow
    from fastai_heatmaps.learner.core import explain_by
    from fastai_heatmaps.trust.findings import mean_error
    from fastai_heatmaps.trust.focus import measure_focus, mosaic_mean
    from fastai_heatmaps.trust.sanity import measure_sanity
    from fastai_heatmaps.trust.faithfulness import measure_faithfulness
    learn,dev = demo_learner(),default_device()
    learn.remove_cb(ProgressCallback)
    learn.model.to(dev)
    learn.dls.to(dev)
    run = shadow(learn)
    def images(items): return to_images(run.dls, items, vocab=learn.dls.vocab)
    items = labelled(folder, learn.dls.vocab)
    some = [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:n])]
    refused = {}
    for name,f in methods.items():
        try: learn.get_heatmaps(some[:1], method=f)
        except ValueError as e: refused[name] = str(e).splitlines()[0]
    asked = {k:f for k,f in methods.items() if k not in refused}
    fs,start = list(asked.values()),time.perf_counter()
    def done(what): print(f'{what}: {time.perf_counter()-start:.0f} s', flush=True)
    mosaics,focus = measure_focus(run, images(items), fs, n=n, seed=seed)
    done('Focus')
    sanity = measure_sanity(run, images(some), fs, stages=2, seed=seed)
    done('sanity')
    hms = explain_by(run, images(some), fs)
    faithful = [values for values,_ in measure_faithfulness(run, hms, ['deletion','insertion'], seed=seed)]
    done('faithfulness')
    print(f"\nThe demo Learner on {len(some)} of {len(items)} photos, and {len(mosaics)} mosaics. Focus: higher is better.\n"
          "Sanity: rank correlation with the maps of a model whose head, or all of it, is random; lower is better.\n"
          "Deletion: lower is better; insertion: higher\n")
    print(f"{'method':34} {'Focus':>12} {'head random':>13} {'all random':>13} {'deletion':>13} {'insertion':>13}")
    def row(name, *values): print(f"{name:34} {' '.join(said(*o) for o in values)}")
    for name,shares,stages,values in zip(asked, focus, sanity, faithful):
        measured = [stages[s] for s in ('head','all')] + [values[m]['map'] for m in ('deletion','insertion')]
        row(name, mosaic_mean(shares, mosaics.photos), *map(mean_error, measured))
    for who in ('random','centre'):
        print(f"{f'a {who} map':34} {'':41} {' '.join(said(*mean_error(faithful[0][m][who])) for m in ('deletion','insertion'))}")
    print(*[f'{name} cannot be asked: {why}' for name,why in refused.items()], sep='\n')


@call_parse
def main(
    n:int=32, # How many pictures of each kind, photos, and mosaics
    seed:int=0, # Of all that is random
    only:str='', # Methods, with commas between; all if there are none
    photos:str=None # Photos, FOLDER/CLASS/*.jpg
):
    warnings.simplefilter('ignore') # of integrated gradients with few steps
    for kind in ('ignored','cancelled','trained'): on_truth(kind, chosen(only, {}), n, seed)
    if photos: on_photos(photos, chosen(only, fewer), n, seed)

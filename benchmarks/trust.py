"""Which method finds the truth, and which can be trusted on photos?

`python benchmarks/trust.py [--n 32] [--only gradcam,layercam] [--vit] [--photos FOLDER]`

First, pictures and models of which it is known what the answer rests on (trust/truth): the energy in the patch that the model
uses, and in the one that it does not, each ± a standard error; whether the brightest cell is in the used patch; and the time of
a picture, by `get_heatmaps`. Needs no weights and no photos.

With `--vit` also a small vision transformer, which is asked for either of two patches: for `legrad`, which needs one.

With `--photos` also the demo Learner on photos, FOLDER/CLASS/*.jpg: Focus, sanity, deletion and insertion. If all folders have
names of ImageNet classes, these are the labels; else what the model says counts as right. The slow methods are asked with fewer
masks and copies than usual, as the first column says."""
import time, warnings
from fastcore.script import call_parse

fewer = dict(rise=dict(n=100), smoothgrad=dict(n=8), integrated_gradients=dict(steps=20), scorecam=dict(channels=96),
             occlusion=dict(window=56, stride=56)) # on photos


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


def vit_learner(n, seed):
    "A small ViT that names the colours of both patches, trained on the spot; nobody ships a pretrained one inside a package"
    from fastai_heatmaps.all import np, torch, set_seed, F, DataBlock, ImageBlock, MultiCategoryBlock, IndexSplitter, Normalize
    from fastai_heatmaps.all import Learner, Tensor, BCEWithLogitsLossFlat, ProgressCallback
    from fastai_heatmaps.trust.truth import colors, truth_items, truth_picture, picture_side
    from timm.models import VisionTransformer
    items,rng = truth_items(1024+n, seed=seed),np.random.default_rng(seed)
    for o in items: o['used'],o['unused'] = rng.permutation([*colors])[:2].tolist()
    block = DataBlock((ImageBlock, MultiCategoryBlock(vocab=[*colors])), get_x=truth_picture, get_y=lambda o: [o['used'], o['unused']],
                      splitter=IndexSplitter(range(1024, 1024+n)), batch_tfms=Normalize.from_stats([.5]*3, [.5]*3))
    set_seed(seed)
    dls = block.dataloaders(items, bs=32, num_workers=0, device='cpu')
    model = VisionTransformer(img_size=picture_side, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=4)
    x,y = [torch.cat(o).as_subclass(Tensor) for o in zip(*dls.train.new(shuffle=False, drop_last=False))]
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(5):
        for b in torch.randperm(len(x)).split(32):
            opt.zero_grad()
            F.binary_cross_entropy_with_logits(model(x[b]), y[b]).backward()
            opt.step()
    learn = Learner(dls, model.eval(), loss_func=BCEWithLogitsLossFlat())
    learn.remove_cb(ProgressCallback)
    return learn


def on_vit(methods, n, seed):
    "Print how much of the evidence in the two patches lies in the one whose colour is asked for"
    from fastai_heatmaps.all import torch, tensor
    from fastai_heatmaps.trust.findings import mean_error, rank_correlation
    from fastai_heatmaps.trust.truth import patch_energy
    learn = vit_learner(n, seed)
    items,vocab = learn.dls.valid.items,list(learn.dls.vocab)
    preds,y = learn.get_preds()
    print(f"\nA small ViT that names the colours of both patches ({((preds>.5)==(y>0)).float().mean():.1%} right). Of the evidence in the\n"
          "patches, the share in the one that is asked for; the rank correlation of the maps of both\n")
    asked = {which:tensor([vocab.index(o[which]) for o in items])[:,None] for which in ('used', 'unused')}
    for name,f in methods.items():
        try: hms = {which:learn.get_heatmaps(cls=cls, method=f) for which,cls in asked.items()}
        except ValueError as e:
            print(f'{name} cannot be asked: {str(e).splitlines()[0]}')
            continue
        inside = {(a,b):patch_energy(hm, b)[0] for a,hm in hms.items() for b in asked}
        share = torch.stack([inside[a,a]/(inside[a,a]+inside[a,b]) for a,b in (('used','unused'), ('unused','used'))], 1)
        alike = rank_correlation(*[hm.maps for hm in hms.values()])
        print(f"{name:34} {said(*mean_error(share))} {said(*mean_error(alike)):>13}", flush=True)


def labelled(folder, vocab):
    "The photos of a folder, as items; with a label where their folder's name is a class"
    from fastai_heatmaps.all import get_image_files
    by_name = {str(v).lower():v for v in vocab}
    items = [(f, by_name.get(f.parent.name.replace('_', ' ').lower())) for f in sorted(get_image_files(folder))]
    return items if all(c for _,c in items) else [f for f,_ in items] # all or none


def measured(run, of, some, fs, n, seed):
    "What the checks say of methods, in as few passes as possible: a row of (mean, error) for each, those of maps that know nothing"
    from fastai_heatmaps.trust.findings import mean_error, rank_correlation
    from fastai_heatmaps.trust.focus import measure_focus, mosaic_mean
    from fastai_heatmaps.trust.sanity import each_stage
    from fastai_heatmaps.trust.faithfulness import measure_faithfulness
    ranks = [{} for _ in fs]
    def use(stage, hms, before):
        for r,hm,b in zip(ranks, hms, before): r[stage] = rank_correlation(b.maps, hm.maps)
    hms = each_stage(run, some, fs, use, stages=2, seed=seed) # and the maps that are hidden
    mosaics,focus = measure_focus(run, of, fs, n=n, seed=seed)
    faithful = [{m:{k:mean_error(v) for k,v in o.items()} for m,o in values.items()}
                for values,_ in measure_faithfulness(run, hms, ['deletion','insertion'], seed=seed)]
    rows = [[mosaic_mean(shares, mosaics.photos), *[mean_error(r[s]) for s in ('head','all')], *[o[m]['map'] for m in o]]
            for shares,r,o in zip(focus, ranks, faithful)]
    return rows,{who:[o[who] for o in faithful[0].values()] for who in ('random', 'centre')},len(mosaics)


def on_photos(folder, methods, n, seed):
    "Print the table of the methods on the demo Learner; the rows of each as soon as they are known"
    from fastai_heatmaps.all import ProgressCallback, demo_learner, np, default_device
    from fastai_heatmaps.data.images import to_images
    from fastai_heatmaps.learner.run import shadow
    from fastai_heatmaps.trust.check import counted
    learn,dev = demo_learner(),default_device()
    learn.remove_cb(ProgressCallback)
    learn.model.to(dev)
    learn.dls.to(dev)
    run = shadow(learn)
    def images(items): return to_images(run.dls, items, vocab=learn.dls.vocab)
    items = labelled(folder, learn.dls.vocab)
    some = [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:n])]
    print(f"\nThe demo Learner on {len(some)} of {len(items)} photos, and {n} mosaics of them all. Focus: higher is better.\n"
          "Sanity: rank correlation with the maps of a model whose head, or all of it, is random; lower is better.\n"
          "Deletion: lower is better; insertion: higher. Passes: of a photo; methods that share them are asked together\n")
    print(f"{'method':34} {'Focus':>12} {'head random':>13} {'all random':>13} {'deletion':>13} {'insertion':>13}", flush=True)
    shared = [k for k,f in methods.items() if f.shares_pass]
    for names in filter(None, [shared, *[[k] for k in methods if k not in shared]]):
        start = time.perf_counter()
        try:
            with counted(run.model) as passes:
                rows,others,m = measured(run, images(items), images(some), [methods[k] for k in names], n, seed)
        except ValueError as e:
            print(f"{', '.join(names)} cannot be asked: {str(e).splitlines()[0]}", flush=True)
            continue
        for name,row in zip(names, rows): print(f"{name:34} {' '.join(said(*o) for o in row)}")
        for who,row in others.items(): print(f"{f'  a {who} map beside it':34} {'':41} {' '.join(said(*o) for o in row)}")
        print(f'  {m} mosaics, {passes[0]:.0f} passes, {time.perf_counter()-start:.0f} s', flush=True)


@call_parse
def main(
    n:int=32, # How many pictures of each kind, photos, and mosaics
    seed:int=0, # Of all that is random
    only:str='', # Methods, with commas between; all if there are none
    photos:str=None, # Photos, FOLDER/CLASS/*.jpg
    vit:bool=False # Train a small ViT, too? That takes a minute
):
    warnings.simplefilter('ignore') # of integrated gradients with few steps
    for kind in ('ignored','cancelled','trained'): on_truth(kind, chosen(only, {}), n, seed)
    if vit: on_vit(chosen(only, {}), n, seed)
    if photos: on_photos(photos, chosen(only, fewer), n, seed)

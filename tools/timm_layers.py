"""Which layer is the default in timm's families of models, and does its map follow an object: `python tools/timm_layers.py [NAMES] [--out FILE]`

One small model of each family, with random weights, whose batch norms have seen the pictures, as in any trained model: without that, what a place
holds fades with depth in tiny_vit and some others. A bright square is put at nine places of a grey picture; where the layer's output differs most from
that of the other places, there the map shows it. So this judges whether each cell is where it is drawn, and not what a trained model would find.
In nets of convolutions alone, whose cells are in their places by the way they are made, random weights may blur the last map: of lcnet and spnasnet 6
squares were right, and 8 after 40 steps of training."""
import re, sys, time, warnings
import timm, torch
from fastcore.script import call_parse
from fastai.torch_basics import F, nn, set_seed
from fastai_heatmaps.core.hooks import copied_outputs
from fastai_heatmaps.core.layers import as_map, find_layers, layer_names
from fastai_heatmaps.core.no_trace import quiet
from fastai_heatmaps.core.passes import model_heatmaps
from fastai_heatmaps.methods.cam import gradcam

sizes = 'atto femto pico nano zepto xxs xxt xxsmall tiny xs t0 s0 m0 b0 xsmall t1 t s small mini - base large huge giant'.split()
# too large, no picture classifiers, or made for timm's own tests
left_out = 'aimv2 beit3 csatv2 deepseek gemma4 mobilenetv5 nasnetalarge pnasnet qwen3 sam sam2 samvit test'.split()
places = [(y,x) for y in (.2,.5,.8) for x in (.2,.5,.8)]


def families():
    "The first letters of a name -> the model of these that looks smallest by its name"
    res = {}
    def looks(n):
        words,numbers = n.split('_')[1:],[int(o) for o in re.findall(r'\d+', n)]
        pixels = max([int(o) for o in words if o.isdigit() and int(o)>=100], default=224)
        return pixels, min([sizes.index(w) for w in words if w in sizes], default=sizes.index('-')), numbers, n
    for n in sorted(timm.list_models(), key=looks): res.setdefault(re.match(r'[a-z]+(?:v?\d(?=_|[a-z]))?', n)[0], n)
    return {k:res[k] for k in sorted(res) if k not in left_out}


def ready(name):
    "The model in eval mode, without the zeros with which some layers begin, and its batch norms' statistics"
    set_seed(1)
    model = timm.create_model(name, pretrained=False).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in model.modules():
        if isinstance(m, nn.Linear) and not m.weight.any(): nn.init.normal_(m.weight, std=.02)
    for m in norms: m.train().momentum = None # the mean of all that was seen
    if norms:
        with torch.no_grad(): model(pictures_for(model))
    return model.eval()


def pictures_for(model):
    "Grey noise of the size that `model` expects, with a bright square at each of the `places`"
    c,h,w = model.default_cfg.get('input_size', (3,224,224))
    xb = (.1*torch.randn(1, c, h, w, generator=torch.Generator().manual_seed(0))).repeat(len(places), 1, 1, 1)
    for x,(t,l) in zip(xb, places): x[:,int((t-.1)*h):int((t+.1)*h),int((l-.1)*w):int((l+.1)*w)] += 2
    return xb


def found(acts):
    "How many of the nine squares lie where `acts` (9, C, h, w) differ most from those of the other pictures, give or take a cell"
    diff = (acts-acts.mean(0)).abs().sum(1,keepdim=True)
    h,w = diff.shape[2:]
    if min(h, w)>8: diff = F.avg_pool2d(diff, 3, 1, 1)
    top = diff.flatten(1).argmax(1)
    ys,xs = (top//w+.5)/h,(top%w+.5)/w
    return sum(abs(y-t)<=.1+1/h and abs(x-l)<=.1+1/w for y,x,(t,l) in zip(ys.tolist(), xs.tolist(), places))


@torch.no_grad()
def judged(model, xb, layers):
    "In how many of the nine pictures `xb` do all of the `layers` show the square in its place; the grids"
    with quiet(model), copied_outputs(layers) as hooks: model(xb)
    maps = [as_map(h.stored, xb) for h in hooks]
    hits = min(found(m.float()) if m is not None and len(m)==len(xb) else 0 for m in maps)
    return hits,' '.join(f'{m.shape[2]}×{m.shape[3]}' for m in maps if m is not None)


def row(name):
    "Name, default layer, its grid, right squares of nine, verdict"
    model = ready(name)
    xb = pictures_for(model)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always', UserWarning)
            layers = find_layers(model, None, xb[4:5])
            maps,_ = model_heatmaps(model, xb[4:5], cls=5, method=gradcam, layer=layers, relu=False)
    except Exception as e: return name,'-','-','-','refused' if isinstance(e, ValueError) else 'fails',f'{type(e).__name__}: {str(e)[:80]}'
    n,grid = judged(model, xb, layers)
    said = ' '.join(str(o.message) for o in told if 'fastai_heatmaps' in o.filename)
    verdict = 'flat' if not maps.any() else 'right' if n>=8 else 'doubtful, and says so' if said else 'doubtful' if n>4 else 'wrong'
    return name,' '.join(layer_names(model, layers)),grid,f'{n}/9',verdict,said[:100]


@call_parse
def main(
    names:str='', # Models, with commas between them; empty = one of each family
    out:str='' # A file for the table in Markdown
):
    "Print the default layer of timm's models, and whether its map follows a bright square"
    torch.set_num_threads(1)
    rows = []
    for name in names.split(',') if names else families().values():
        start = time.perf_counter()
        try: r = row(name)
        except Exception as e: r = name,'-','-','-','not made',f'{type(e).__name__}: {str(e)[:80]}'
        rows.append(r)
        print(*r, f'{time.perf_counter()-start:.0f} s', sep='  ', flush=True)
    counts = {v:[r[4] for r in rows].count(v) for v in dict.fromkeys(r[4] for r in rows)}
    print(counts)
    if out:
        lines = ['| model | default layer | grid | squares | verdict | note |', '|---|---|---|---|---|---|'] + [f"| {' | '.join(r)} |" for r in rows]
        with open(out, 'w') as f: f.write('\n'.join([*lines, '', ', '.join(f'{k} {n}' for k,n in counts.items()), '']))

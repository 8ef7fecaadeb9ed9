"What fresh eyes found in what had been mended: new features together, and what two runs do to one another."
from shared import *
from fastai_heatmaps.cli import demo as cli_demo
from fastai_heatmaps.cli.main import main
from fastai_heatmaps.core.passes import recordable
from fastai_heatmaps.data import store
from fastai_heatmaps.data.drawn import is_drawn
from fastai_heatmaps.data.images import to_images
from fastai_heatmaps.views import compare
from fastai_heatmaps.learner.kept import Passes


threads = """
import faulthandler,gc,threading,time
faulthandler.dump_traceback_later(15, exit=True)
from fastai_heatmaps.core.no_trace import random_numbers
class Cycle:
    def __init__(self): self.me = self
    def __del__(self): time.sleep(0) # lets other threads run
gc.set_threshold(5)
def ask():
    for _ in range(20):
        for _ in range(3): Cycle()
        random_numbers()
for _ in range(6):
    ts = [threading.Thread(target=ask) for _ in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
assert gc.isenabled()
gc.disable()
random_numbers()
assert not gc.isenabled()
"""

@pytest.mark.slow
def test_threads_do_not_wait_for_one_another_for_ever(forked):
    "Some Pythons, such as 3.11.7, stand still if garbage is collected while they list the frames of all threads, and a thread begins or ends"
    rc,printed = forked(threads)
    assert rc==0, printed[-2000:]


def test_run_that_another_one_overtakes(learn, tmp_path, monkeypatch):
    "Between two looks at a new folder another run may write its manifest there"
    hm = learn.get_heatmaps(out=tmp_path/'a')
    manifest,text = tmp_path/'b'/'manifest.json',(tmp_path/'a'/'manifest.json').read_text()
    exists = Path.exists
    def late(p): # the manifest comes after the first look at it
        res = exists(p)
        if p==manifest: p.parent.mkdir(exist_ok=True); p.write_text(text)
        return res
    monkeypatch.setattr(Path, 'exists', late)
    assert torch.equal(learn.get_heatmaps(out=tmp_path/'b').maps, hm.maps)


def test_manifest_with_an_input_that_is_none(learn, tmp_path):
    learn.get_heatmaps(out=tmp_path/'a')
    manifest = tmp_path/'a'/'manifest.json'
    manifest.write_text(manifest.read_text().replace('"input": 0', '"input": "x"'))
    with pytest.raises(FileExistsError, match='cannot be read as one of ours'): load_heatmaps(tmp_path/'a', learn.dls.valid)


@pytest.mark.parametrize('number', [1, 7, -1])
def test_manifest_with_an_input_that_is_not_there(learn, tmp_path, number):
    "It is told when the folder is loaded, not when the first map is shown; without pictures the maps can be used"
    hm = learn.get_heatmaps(out=tmp_path/'a')
    manifest = tmp_path/'a'/'manifest.json'
    manifest.write_text(manifest.read_text().replace('"input": 0', f'"input": {number}'))
    with pytest.raises(ValueError, match='manifest.json') as e: load_heatmaps(tmp_path/'a', learn.dls.valid)
    assert '\n' not in str(e.value)
    if number>0: assert torch.equal(load_heatmaps(tmp_path/'a').maps, hm.maps)


def _export(pics, tmp_path):
    pic_learner(pics).export(tmp_path/'e.pkl')
    return str(tmp_path/'e.pkl'),str(pics)

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['png', 'jpg', 'webp', 'pdf', 'svg'])
def test_grid_writes_over_grids_only(pics, tmp_path, capsys, kind):
    args,out = ['grid', *_export(pics, tmp_path), '--trust', '--cpu', '--n', '2', '--quiet', '--overwrite', '--out'],tmp_path/f'o.{kind}'
    assert main([*args, str(out)])==0 and is_drawn(out)
    assert main([*args, str(out)])==0
    mine = tmp_path/f'mine.{kind}'
    mine.write_bytes(b'no grid')
    assert main([*args, str(mine)])==1 and mine.read_bytes()==b'no grid'
    assert 'was not made by this package' in capsys.readouterr().err


@pytest.mark.slow
def test_demo_leaves_other_pages_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_demo, 'demo_pictures', lambda learn: [('one', 'a line', lambda: plt.plot([1,2]))])
    page = cli_demo.demo(tmp_path/'d')
    assert all(is_drawn(page.with_name(o)) for o in ('index.html', 'report.html', 'one.png'))
    cli_demo.demo(tmp_path/'d')
    for name in ('index.html', 'report.html', 'one.png'):
        (tmp_path/name).write_text('mine')
        with pytest.raises(FileExistsError, match='left as it is'): cli_demo.demo(tmp_path)
        assert [o.name for o in tmp_path.iterdir() if o.is_file()]==[name] and (tmp_path/name).read_text()=='mine'
        (tmp_path/name).unlink()


class Pair(nn.Module):
    "Sums one encoder's features of two pictures, the second one's against the first one's"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()),nn.Linear(4, 2)
    def forward(self, both): return self.head((self.body(both[0])-self.body(both[1])).mean((2,3)))

def pair_learner(inference=False):
    "A Learner whose items are tuples of two pictures, also ones made under `torch.inference_mode`"
    x = torch.rand(4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    def collate(rows):
        with torch.inference_mode(inference): return (x[rows,0]+0, x[rows,1]+0),torch.tensor(rows)%2
    dl = torch.utils.data.DataLoader(range(4), 2, collate_fn=collate)
    torch.manual_seed(0)
    return Learner(DataLoaders(dl, dl), Pair(), loss_func=CrossEntropyLossFlat(), cbs=[])

@pytest.mark.parametrize('method', ['gradcam', 'saliency', 'integrated_gradients', 'guided_gradcam'])
def test_pairs_made_in_inference_mode(method):
    for i in (0,1):
        want,got = [pair_learner(o).get_heatmaps(method=method, input=i, relu=False, **quick.get(method, {})).maps for o in (False, True)]
        assert want.any() and torch.equal(want, got)

def test_recordable_looks_inside():
    with torch.inference_mode(): x = torch.ones(2)
    y = torch.zeros(2)
    res, = recordable(((x, dict(a=[y])),))
    assert not res[0].is_inference() and torch.equal(res[0], x) and torch.equal(res[1]['a'][0], y)
    assert recordable((y, None))[0] is y


@pytest.fixture
def pairs(pics):
    files = get_image_files(pics).sorted()
    items = [(f, files[i-1], label(f)) for i,f in enumerate(files)]
    dls = DataBlock((ImageBlock, ImageBlock, CategoryBlock), n_inp=2, getters=[ItemGetter(i) for i in range(3)], splitter=IndexSplitter(range(3)),
                    item_tfms=Resize(32)).dataloaders(items, bs=4, num_workers=0, device='cpu')
    class Two(Pair):
        def forward(self, a, b): return super().forward((a, b))
    torch.manual_seed(0)
    return Learner(dls, Two(), loss_func=CrossEntropyLossFlat(), cbs=[]),items

def test_compare_and_explore_each_input(pairs, monkeypatch):
    learn,items = pairs
    drawn = []
    monkeypatch.setattr(compare, '_draw_compared', lambda hms, *args, **kwargs: drawn.extend(hms))
    for i in (0,1):
        drawn.clear()
        want = learn.get_heatmaps([items[0]], input=i)
        learn.compare_heatmaps(items[0], method=['gradcam', 'saliency'], input=i)
        learn.compare_heatmaps(items[0], layer=['body.0', 'body.1'], input=i)
        found = [drawn[0], drawn[3], Passes(learn, to_images(learn.dls, [items[0]], input=i)).heatmaps()]
        assert len(drawn)==4 and all(hm.images.input==i and torch.equal(hm.image(0), want.image(0)) for hm in drawn)
        for hm in found: torch.testing.assert_close(hm.maps, want.maps)

@pytest.mark.parametrize('ask', [dict(layer='head'), dict(method='legrad')])
def test_errors_name_the_users_model(pairs, ask):
    with pytest.raises(ValueError) as e: pairs[0].get_heatmaps(**ask)
    assert 'OneInput' not in str(e.value)

def test_no_map_of_two_inputs_names_the_model():
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(6, 2)
        def forward(self, a, b): return self.l(torch.cat([a.mean((2,3)), b.mean((2,3))], 1))
    with pytest.raises(ValueError, match='this Flat puts out a map'): model_heatmaps(Flat(), torch.rand(2, 1, 3, 8, 8).unbind())


@pytest.mark.parametrize('looks', [False, True])
def test_bar_of_compared_learners(learn, pics, monkeypatch, looks):
    bars = []
    monkeypatch.setattr(compare, 'person_looks', lambda: looks)
    monkeypatch.setattr(compare, 'progress_bar', lambda o, **kwargs: bars.append(1) or o)
    compare_learners({k:lambda: learn for k in 'ab'}, get_image_files(pics)[:1])
    assert len(bars)==looks


def test_legrad_says_what_it_needs():
    "A hand-written attention: its softmax is in the model's own code"
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.q = nn.Linear(8, 8)
        def forward(self, x): return (self.q(x)@x.transpose(1,2)).softmax(-1)@x
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.p,self.b,self.h = nn.Conv2d(3, 8, 8, 8),nn.ModuleDict({'a':Own()}),nn.Linear(8, 2)
        def forward(self, x): return self.h(self.b['a'](self.p(x).flatten(2).transpose(1,2)).mean(1))
    with pytest.raises(ValueError, match='works out its attention itself'): model_heatmaps(Net(), torch.rand(1, 3, 32, 32), method='legrad')

"Folders of heatmaps: what is not ours stays, another run is not taken for this one, two writers do not meet, and no manifest is trusted."
import csv, functools, json, multiprocessing, os, re, stat, sys, time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
import pytest
from shared import *
import fastai_heatmaps.cli.main as cli
from fastai_heatmaps.core.method import heatmap_methods, heatmap_method
from fastai_heatmaps.data.files import add_rows, locked, temp_files, whole_file
from fastai_heatmaps.data.store import open_store, read_part
from fastai_heatmaps.learner.core import is_own

lock = '.fastai_heatmaps.lock'


class Net(nn.Module):
    "A body and a head of a few weights, with things that a state_dict does not hold"
    def __init__(self, act=nn.ReLU, pool=nn.AdaptiveAvgPool2d, shift=0.):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), act(), nn.Conv2d(8, 8, 3, 2, 1), act())
        self.head = nn.Sequential(pool(1), nn.Flatten(), nn.Linear(8, 2))
        self.register_buffer('shift', tensor(shift), persistent=False)
        self.gain = 1.
    def forward(self, x): return self.head(self.gain*self.body(x)+self.shift)


class Scaled(ItemTransform):
    "A transform whose text does not show its parameter"
    def __init__(self, k): self.k = k
    def encodes(self, x): return (PILImage.create((np.array(x[0])*self.k).astype(np.uint8)), *x[1:])

class ScaledBatch(Transform):
    def __init__(self, k): self.k = k
    def encodes(self, x:TensorImage): return x*self.k


def small(files, loss=None, cbs=None, batch_tfms=(), extra=(), net=Net, get_y=label, get_x=noop, items=None):
    "A Learner that runs in milliseconds"
    set_seed(3)
    block = DataBlock((ImageBlock, CategoryBlock(vocab=['Red', 'Blue_ish'])), get_items=lambda o: list(items or files), get_x=get_x, get_y=get_y,
                      splitter=lambda o: (range_of(o), range_of(o)), item_tfms=[Resize(16), *extra], batch_tfms=list(batch_tfms))
    dls = block.dataloaders(None, bs=4, num_workers=0, device='cpu')
    torch.manual_seed(0)
    return Learner(dls, net(), loss_func=loss or CrossEntropyLossFlat(), cbs=cbs)


@pytest.fixture
def files(pics, tmp_path):
    (tmp_path/'pics').mkdir()
    for f in get_image_files(pics): shutil.copy2(f, tmp_path/'pics')
    return list(get_image_files(tmp_path/'pics').sorted())


def contents(path): return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob('*') if p.is_file() and p.name!=lock}
def table(path): return list(csv.DictReader(open(path, newline='', encoding='utf-8')))


# Another run

class Weigh:
    def __init__(self, k): self.k = k
    def __call__(self, acts, grads): return acts[:,self.k]

class Pick:
    def __init__(self, k): self.k = k
    def __call__(self, out): return out*self.k

class Xb(Callback):
    def __init__(self, k): self.k = k
    def before_batch(self): self.learn.xb = (self.x*self.k,)

class Pred(Callback):
    def __init__(self, k): self.k = k
    def after_pred(self): self.learn.pred = self.pred*self.k

amount = 1
def by_global(acts, grads): return acts.mean(1)*amount
def helper(a): return a.mean(1)
def by_helper(acts, grads): return helper(acts)

def registered(k):
    @heatmap_method('of_the_test')
    def f(acts, grads): return acts.mean(1)*k
    return 'of_the_test'

def closure(v):
    "A method that closes over `v`, which may be a number, a list, a dict or a function"
    def f(acts, grads): return acts.mean(1)*(v if isinstance(v, int) else v(1) if callable(v) else v[0])
    return f

def wrapped(k):
    f = heatmap_methods['gradcam']
    @functools.wraps(f)
    def g(acts, grads): return k*f(acts, grads)
    return g

def default(k): return lambda acts, grads, k=k: acts.mean(1)*k


def replaced(f, keep_time):
    "Replace a picture by one of the same name and, if possible, size of file; and with the same time, if asked"
    was = f.stat()
    Image.new('RGB', (70,60), 'green').save(f)
    data = f.read_bytes()
    f.write_bytes(data+bytes(was.st_size-len(data)))
    assert f.stat().st_size==was.st_size
    if keep_time: os.utime(f, ns=(was.st_atime_ns, was.st_mtime_ns))


def trials(files, monkeypatch):
    "Name -> a function of 0 (before the change) or 1 (after it) that gives a Learner and arguments"
    me = sys.modules[__name__]
    def own(make): return lambda c: (small(files), dict(method=make(c+1), run='1'))
    def on_net(change):
        def f(c):
            learn = small(files)
            if c: change(learn.model)
            return learn,{}
        return f
    def on_file(change):
        def f(c):
            if c: change()
            return small(files),{}
        return f
    def in_memory(c):
        pics = [np.array(Image.open(f).resize((20,20))) for f in files]
        if c: pics[5][3,3,0] ^= 1
        return small(files),dict(items=pics)
    def sets(name, value):
        def f(c):
            if c: monkeypatch.setattr(me, name, value)
            return small(files),dict(method=by_global if name=='amount' else by_helper, run='1')
        return f
    def hooked(net): net.head.register_forward_hook(lambda m, i, o: o*2)
    def tanh(net): net.body[1],net.body[3] = nn.Tanh(),nn.Tanh()
    def pool(net): net.head[0] = nn.AdaptiveMaxPool2d(1)
    def more_training(net):
        with torch.no_grad(): net.body[2].weight *= 1.01
    def loss(c):
        res = CrossEntropyLossFlat()
        if c: res.activation = torch.sigmoid
        return small(files, loss=res),dict(cls=0)
    def score(make): return lambda c: (small(files), dict(cls=0, score=make(c+1), run='1'))
    return dict(
        registered=own(registered), object=own(Weigh), number=own(closure), list=own(lambda k: closure([k])), dict=own(lambda k: closure({0:k})),
        function=own(lambda k: closure(lambda o: o*k)), globals=sets('amount', 2), helper=sets('helper', lambda a: a.amax(1)),
        partial=own(lambda k: partial(lambda acts, grads, k: acts.mean(1)*k, k=k)), partial_of_ours=own(lambda k: partial(wrapped(k))),
        wraps=own(wrapped), default=own(default), score_object=score(Pick), score_closure=score(lambda k: lambda o: o-k*o.flip(1)),
        activation=on_net(tanh), pooling=on_net(pool), buffer=on_net(lambda net: net.shift.add_(.1)), attribute=on_net(lambda net: setattr(net, 'gain', 1.1)),
        hook=on_net(hooked), weights=on_net(more_training),
        loss=loss, callback_xb=lambda c: (small(files, cbs=Xb(1+.1*c)), {}), callback_pred=lambda c: (small(files, cbs=Pred(1+c)), {}),
        new_callback=lambda c: (small(files, cbs=[Xb(.5)]*c), {}),
        item_transform=lambda c: (small(files, extra=[Scaled(1-.1*c)]), {}), batch_transform=lambda c: (small(files, batch_tfms=[ScaledBatch(1+.1*c)]), {}),
        labels=lambda c: (small(files, get_y=lambda f: label(f) if not c or f!=files[0] else 'Red'), dict(cls='targ')),
        picture=on_file(lambda: replaced(files[5], keep_time=False)), picture_in_sample=on_file(lambda: replaced(files[0], keep_time=True)),
        in_memory=in_memory, names=lambda c: (small(files), dict(method=by_helper, run=str(c))))


kinds = [*trials([], None)]

@pytest.mark.parametrize('kind', kinds)
def test_another_run_is_not_taken_for_this_one(kind, files, tmp_path, monkeypatch):
    "What is there is returned after the same call, and refused after a change; nothing in the folder changes"
    monkeypatch.delitem(heatmap_methods, 'of_the_test', raising=False)
    f,out = trials(files, monkeypatch)[kind],tmp_path/'out'
    def call(c):
        learn,kw = f(c)
        return learn.get_heatmaps(out=out, **kw)
    first = call(0)
    before = contents(out)
    again = call(0)
    assert torch.equal(first.maps, again.maps) and contents(out)==before
    with pytest.raises(FileExistsError, match='another run') as e: call(1)
    assert isinstance(e.value, ValueError) and '\n' not in str(e.value) and contents(out)==before
    monkeypatch.undo()
    heatmap_methods.pop('of_the_test', None)


def test_another_version(files, tmp_path, monkeypatch):
    small(files).get_heatmaps(out=tmp_path/'out')
    monkeypatch.setattr(torch, '__version__', '2.0.0')
    with pytest.raises(ValueError, match='another run: versions was'): small(files).get_heatmaps(out=tmp_path/'out')


def test_a_function_of_the_users_own_needs_a_name(files, tmp_path, monkeypatch):
    "One that is not a function in a module of this package: also a partial of ours, one that bears our name, an object, a function of torch"
    learn,out = small(files),tmp_path/'out'
    for kw in (dict(method=registered(1)), dict(method=Weigh(1)), dict(method=closure(1)), dict(method=wrapped(1)), dict(method=partial(heatmap_methods['gradcam'])),
               dict(score=Pick(1)), dict(score=lambda o: o), dict(score=torch.sigmoid)):
        with pytest.raises(ValueError, match='is a function of your own.*run=') as e: learn.get_heatmaps(out=out, **kw)
        assert '\n' not in str(e.value) and not out.exists()
    def own_option(acts, grads, f=None): return acts.mean(1)
    monkeypatch.setitem(heatmap_methods, 'of_the_test', own_option)
    with pytest.raises(ValueError, match='function of your own'): learn.get_heatmaps(out=out, method='of_the_test', f=len)
    assert len(learn.get_heatmaps(out=out, method='of_the_test', f=len, run='a'))==12
    monkeypatch.undo()
    heatmap_methods.pop('of_the_test', None)
    assert heatmap_methods and all(map(is_own, heatmap_methods.values())) and learn.get_heatmaps(method=lambda a: a.mean(1)).method=='<lambda>'


def test_what_it_costs(files, tmp_path):
    "If all is there, four images run again; if not, four of those that are there, and the rest"
    learn,n = small(files),[]
    learn.get_heatmaps(out=tmp_path/'out', layer='body')
    learn.model.register_forward_hook(lambda m, i, o: n.append(len(o)))
    learn.get_heatmaps(out=tmp_path/'out', layer='body')
    assert n==[1]*4


class BatchStats(Net):
    "A model in which the other images of a batch matter"
    def forward(self, x): return self.head((self.body(x)-self.body(x).mean((0,2,3), keepdim=True))*9)

@pytest.mark.parametrize('kw', [dict(dtype=torch.float16), dict(method='saliency', dtype=torch.float16), dict(method='rise', n=4), dict(method='smoothgrad', n=2), dict(method='integrated_gradients', steps=2), dict(relu=False, topk=2)])
@pytest.mark.filterwarnings('ignore:the attributions sum')
def test_the_same_run_goes_on(kw, files, tmp_path):
    "Whatever the precision and the method; even if the others in a batch matter, or a random number was drawn in between"
    for net in (Net, BatchStats):
        out = tmp_path/net.__name__
        first = small(files, net=net).get_heatmaps(out=out, **kw)
        torch.rand(3)
        assert torch.equal(small(files, net=net).get_heatmaps(out=out, **kw).maps, first.maps)


def test_maps_of_several_sizes_go_on(demo, tmp_path):
    first = demo.get_heatmaps(out=tmp_path/'out')
    assert len({m.shape for m in first.maps})>1
    assert all(map(torch.equal, demo.get_heatmaps(out=tmp_path/'out').maps, first.maps))


# What is not ours

def test_what_is_not_ours_stays(files, tmp_path):
    "A new run touches no files, folders or temporary files of the user's own"
    learn = small(files)
    mine = dict(manifest={'manifest.json':'{"name": "my app", "run": {"n": 3, "part": 1}}', 'part-00000000.npz':'mine'}, tmp={'.x.tmp':'mine'},
                part={'part-00000000.npz':'mine'}, table={'manifest.csv':'a,b\n'}, run={'manifest.json':'{"run": {"n": 12, "part": 256}}', 'part-00000000.npz':'mine', '.a.tmp':'b'})
    for name,there in mine.items():
        (tmp_path/name).mkdir()
        for f,text in there.items(): (tmp_path/name/f).write_text(text)
        for overwrite in (False, True):
            with pytest.raises(FileExistsError) as e:
                with open_store(tmp_path/name, dict(n=12, part=256), None, overwrite): pass
            assert '\n' not in str(e.value) and str(tmp_path/name) in str(e.value)
        with pytest.raises(FileExistsError): learn.get_heatmaps(out=tmp_path/name)
        assert {p.name:p.read_text() for p in (tmp_path/name).iterdir()}==there
    out = tmp_path/'out'
    learn.get_heatmaps(out=out)
    own = {'part-notes.npz':'mine', 'part-00000512.npz':'mine', '.x.tmp':'mine', 'manifest.csv':'mine', '.fastai_heatmaps-notes.tmp':'mine'}
    for f,text in own.items(): (out/f).write_text(text)
    learn.get_heatmaps(out=out)
    assert own.items()<={p.name:p.read_text(errors='replace') for p in out.iterdir()}.items()


def test_pictures_of_the_users_own_stay(learn, pics, tmp_path):
    "`save(overwrite=True)` writes over what a table names, and over what an interrupted call has drawn, but over nothing else"
    hm = learn.get_heatmaps(get_image_files(pics)[:2])
    row,*_ = table(hm.save(tmp_path))
    hm.save(tmp_path, overwrite=True)
    (tmp_path/'manifest.csv').unlink() # as if it was interrupted
    hm.save(tmp_path, overwrite=True)
    for mine in (b'mine', get_image_files(pics)[0].read_bytes()):
        (tmp_path/'manifest.csv').unlink()
        (tmp_path/row['heatmap']).write_bytes(mine)
        before = contents(tmp_path)
        with pytest.raises(FileExistsError, match='no picture that this package drew') as e: hm.save(tmp_path, overwrite=True)
        assert contents(tmp_path)==before and '\n' not in str(e.value)
        (tmp_path/row['heatmap']).unlink()
        hm.save(tmp_path, overwrite=True)


@pytest.fixture(scope='session')
def model(pics, tmp_path_factory):
    "An exported Learner"
    path = tmp_path_factory.mktemp('model')/'export.pkl'
    learn = pic_learner(pics, squeezenet1_1, size=64)
    learn.export(path)
    return path


def test_overwrite_on_the_command_line(files, model, tmp_path, monkeypatch, capsys):
    "`--format npz --overwrite` removes what a run of ours has written, and nothing else"
    monkeypatch.chdir(tmp_path)
    def call(out, *more):
        capsys.readouterr()
        return cli.main(['gradcam', str(model), *map(str, files[:2]), '--trust', '--cpu', '--quiet', '--format', 'npz', '--out', out, *more]),capsys.readouterr()[1]
    theirs = {'manifest.json':'{"name": "my app"}', 'part-00000000.npz':'mine', 'manifest.csv':'a,b\n', '.x.tmp':'mine'}
    Path('d').mkdir()
    for f,text in theirs.items(): Path('d', f).write_text(text)
    for more in ((), ('--overwrite',)):
        rc,err = call('d', *more)
        assert rc==1 and err.count('\n')==1 and 'd holds no heatmaps' in err and '--overwrite' not in err, err
        assert {p.name:p.read_text() for p in Path('d').iterdir()}==theirs
    assert call('out')==(0, '')
    Path('out/thesis.txt').write_text('mine')
    Path('out/part-9.npz').write_text('mine')
    rc,err = call('out', '--top', '2')
    assert rc==1 and 'topk was 1 and is 2; choose another folder, or add --overwrite' in err
    assert call('out', '--top', '2', '--overwrite')==(0, '') and load_heatmaps('out').cls.shape==(2,2)
    assert Path('out/thesis.txt').read_text()==Path('out/part-9.npz').read_text()=='mine'


def test_home(files, tmp_path, monkeypatch):
    "`~` is the home folder"
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    hm = small(files).get_heatmaps(files[:2], out='~/maps')
    assert hm.save('~/pictures')==tmp_path/'home'/'pictures'/'manifest.csv' and len(load_heatmaps('~/maps'))==2
    assert not (tmp_path/'~').exists() and (tmp_path/'home'/'maps'/'manifest.json').exists()


# Manifests

def bad_manifests(good):
    "Valid JSON that is no manifest, and no JSON"
    run = good['run']
    def but(**kw): return dict(good, run={**run, **kw})
    values = [[], 3, None, 'x', True, {}, dict(run=None), dict(run=[]), dict(run=3), dict(run='n'), dict(run={})]
    values += [but(n=o) for o in ('12', 10**15, -1, 0, 12.0, None, [12], True, {})] + [but(part=o) for o in ('4', 0, -4, 4.5, None, [])]
    values += [but(places=o) for o in (None, 3, 'abcdefghijkl', ['a']*12, [0]*11, [None]*12, [[0]]*12, [-1]*12, {})]
    values += [but(names=o) for o in (None, 'abcdefghijkl', [1]*12, ['a'], {str(i):1 for i in range(12)})]
    values += [but(vocab=3), but(vocab='abc'), but(vocab={}), but(thresh='x'), but(thresh=None), but(thresh=[]), but(items=3), but(samples='x')]
    return [*map(json.dumps, values), '[', '', '{"run"', '['*10**5, '\x00', '1'*5000]


def test_manifests_of_other_kinds(files, tmp_path):
    "One ValueError of one line, whatever is in the manifest, and nothing is touched"
    learn,out = small(files),tmp_path/'out'
    learn.get_heatmaps(out=out)
    good = json.loads((out/'manifest.json').read_text())
    for text in bad_manifests(good):
        (out/'manifest.json').write_text(text)
        before = contents(out)
        for f in (lambda: load_heatmaps(out), lambda: load_heatmaps(out, learn.dls.valid), lambda: learn.get_heatmaps(out=out)):
            with pytest.raises(ValueError, match='cannot be read as one of ours') as e:
                f()
                pytest.fail(text[:300])
            assert '\n' not in str(e.value)
        assert contents(out)==before


def test_parts_of_other_kinds(files, tmp_path):
    "Arrays of the wrong type or shape count as damage: one line says so, and they are made anew"
    learn,out = small(files),tmp_path/'out'
    learn.get_heatmaps(out=out)
    part = out/'part-00000000.npz'
    data,good = part.read_bytes(),dict(np.load(part))
    bad = [{**good, k:v} for k,vs in dict(maps=['x', np.zeros(12), np.zeros((12,1,4,4), int), np.zeros((12,2,4,4), np.float32), np.zeros((11,1,4,4), np.float32)],
                                          cls=[np.zeros(12, int), np.full((12,1), 2), np.full((12,1), -1), np.zeros((12,1)), np.array(['a']*12), np.zeros((12,0), int)],
                                          preds=[np.zeros(12), np.array(0.), np.array('x')], targs=[np.zeros(3), np.array(1)], info_x=[np.zeros(3)], sizes=[np.zeros((3,2), int), np.full((12,2), 10**9)], other=[np.zeros(3)]).items() for v in vs]
    for d in [*bad, {}, {k:v for k,v in good.items() if k!='maps'}]:
        np.savez(part, **d)
        with pytest.raises(ValueError, match='is damaged') as e: load_heatmaps(out)
        assert '\n' not in str(e.value)
    with pytest.warns(UserWarning, match='made anew'): learn.get_heatmaps(out=out)
    assert part.read_bytes()==data


# Two at a time

def test_filelock_comes_with_torch(): assert any(re.match(r'filelock\b', o) and 'extra' not in o for o in requires('torch'))


def test_threads_write_whole_files(tmp_path):
    "Each has a temporary name of its own; files have the permissions that any new file has"
    old = os.umask(0o027)
    try:
        def write(i):
            with whole_file(tmp_path/'a.txt') as tmp:
                tmp.write_text(str(i)*1000)
                time.sleep(.001)
        with ThreadPoolExecutor(8) as pool: list(pool.map(write, range(100)))
    finally: os.umask(old)
    assert os.listdir(tmp_path)==['a.txt'] and len(set((tmp_path/'a.txt').read_text()))<=2 and stat.S_IMODE((tmp_path/'a.txt').stat().st_mode)==0o640


def _add_rows(path, i):
    "20 rows, by two threads"
    with ThreadPoolExecutor(2) as pool: list(pool.map(lambda j: add_rows(path/'manifest.csv', [dict(overlay=f'{i}-{j}.png', n=j)]), range(20)))

def test_no_row_is_lost(tmp_path):
    "Three processes of two threads add 60 rows to one table"
    runs = [multiprocessing.get_context('fork').Process(target=_add_rows, args=(tmp_path, i)) for i in range(3)]
    for o in runs: o.start()
    for o in runs: o.join(60)
    assert [o.exitcode for o in runs]==[0,0,0]
    assert {r['overlay'] for r in table(tmp_path/'manifest.csv')}=={f'{i}-{j}.png' for i in range(3) for j in range(20)}
    assert {p.name for p in tmp_path.iterdir()}<={'manifest.csv', lock}


def test_a_store_that_is_being_written(files, tmp_path, monkeypatch):
    "Another run is refused in one line and leaves what the living one writes; what a dead one left is removed"
    import fastai_heatmaps.data.store as store
    learn,out,seen = small(files),tmp_path/'out',[]
    monkeypatch.setattr(store, 'locked', lambda folder, wait: locked(folder, .1))
    dead = f".fastai_heatmaps-{'0'*32}.npz.tmp"
    out.mkdir()
    (out/dead).write_text('of a run that was killed')
    save = np.savez
    def during(f, **kw):
        f.write(b'half')
        with ThreadPoolExecutor(1) as pool: # in another thread
            with pytest.raises(FileExistsError, match='is being written by another run') as e: pool.submit(small(files).get_heatmaps, out=out).result()
        seen.append((str(e.value), len(temp_files(out))))
        f.seek(0)
        save(f, **kw)
    monkeypatch.setattr(np, 'savez', during)
    learn.get_heatmaps(out=out)
    (text, n), = seen
    assert '\n' not in text and n==1 and {p.name for p in out.iterdir()}<={'manifest.json', 'part-00000000.npz', lock}
    monkeypatch.undo()
    assert len(learn.get_heatmaps(out=out))==12 # the lock is free again


def test_formulas(learn, pics, tmp_path):
    "No cell is a formula; numbers stay numbers; a row that is written again replaces the old one"
    hm = learn.get_heatmaps(get_image_files(pics)[:4])
    hm.preds[:] = -1.5
    hm.vocab = ['=1+1', '@SUM(A1)']
    hm.images = Images(hm.dl, hm.idxs, names=['=cmd|calc', '-rf', '+49 30', '\tx'])
    for _ in range(2): path = hm.save(tmp_path, overwrite=True)
    rows = table(path)
    assert len(rows)==4 and not any(re.match(r'[=+\-@\t\r\n]', v) and k!='probability' for r in rows for k,v in r.items())
    assert {float(r['probability']) for r in rows}=={-1.5} and {r['cls'] for r in rows}<={"'=1+1", "'@SUM(A1)"}
    assert all((tmp_path/r[k]).exists() for r in rows for k in ('map', 'heatmap', 'overlay'))
    add_rows(tmp_path/'b.csv', [dict(overlay='=a', n=1)])
    add_rows(tmp_path/'b.csv', [dict(overlay='=a', n=2)])
    assert table(tmp_path/'b.csv')==[dict(overlay="'=a", n='2')]

"Heatmaps in files: pictures and their table; and parts in a folder, whatever happens to the run that writes them or to the folder."
import csv, hashlib, json, os, random as rnd, subprocess, sys, textwrap
import pytest
from shared import *
from fastai_heatmaps.data.files import file_names, whole_file
from fastai_heatmaps.data.store import digest


def names_in(path): return sorted(p.name for p in path.iterdir() if p.name!='.fastai_heatmaps.lock') # which may stay or not, by the version of filelock
def files(path): return {n: hashlib.sha256((path/n).read_bytes()).hexdigest() for n in names_in(path)}
def table(path): return list(csv.DictReader(open(path, newline='', encoding='utf-8')))


# Pictures

def test_pictures(learn, pics, tmp_path):
    "What a file shows is what was computed: grey is the map from 0 to its maximum, colours are plasma's, and the overlay is as opaque as the map is strong"
    fs = get_image_files(pics)[:2]
    hm = learn.get_heatmaps(fs, cls=['Red', 'Blue_ish'])
    hm.maps[0,0] = torch.linspace(0, 8, 4).view(2, 2)
    rows = table(hm.save(tmp_path/'new'/'out'))
    assert len(rows)==4 and {r['item'] for r in rows}=={str(f) for f in fs}
    r = rows[0]
    assert r['cls']=='Red' and float(r['probability'])==pytest.approx(float(hm.preds[0,learn.dls.vocab.o2i['Red']]), rel=1e-5) and r['method']=='gradcam' and r['layer']=='0' and r['truth']==''
    want = F.interpolate(hm.maps[:1,:1], (64,64), mode='bicubic', antialias=True)[0,0].clip(0, 8)/8
    grey,colours,overlay = [np.array(Image.open(tmp_path/'new'/'out'/r[k]))/255 for k in ('map', 'heatmap', 'overlay')]
    plasma = plt.get_cmap('plasma')(want.numpy())[...,:3]
    assert np.abs(grey-want.numpy()).max()<.003 and np.abs(colours-plasma).max()<.02
    photo = hm.image(0).permute(1,2,0).numpy()
    alpha = .7*want.numpy()[...,None]
    away = ~near_line(want.numpy(), 1, 3)
    assert away.mean()>.5 and np.abs(overlay-(alpha*plasma+(1-alpha)*photo))[away].max()<.02
    assert {Image.open(tmp_path/'new'/'out'/r[k]).size for r in rows for k in ('map', 'heatmap', 'overlay')}=={(64,64)}


def test_signed_pictures(learn, pics, tmp_path):
    "Where values may be negative, 0 is the middle of the grey and of the colours, and does not hide the photo"
    hm = learn.get_heatmaps(get_image_files(pics)[:1], relu=False)
    hm.maps[0,0] = tensor([[-4.,0.],[0.,2.]])
    r, = table(hm.save(tmp_path, interpolation='nearest'))
    grey,colours,overlay = [np.array(Image.open(tmp_path/r[k])) for k in ('map', 'heatmap', 'overlay')]
    assert [int(grey[y,x]) for y,x in ((5,5), (5,60), (60,60))]==[0, 128, 191] and np.ptp(colours[5,60].astype(int))<5
    assert np.abs(overlay[:30,34:]/255-hm.image(0).permute(1,2,0).numpy()[:30,34:]).max()<.01 # without the line at its edge
    assert colours[5,5].argmax()==2 and colours[60,60].argmax()==0 # blue against, red for


def test_formats_and_what_is_there(learn, pics, tmp_path):
    hm = learn.get_heatmaps(get_image_files(pics)[:2])
    for fmt,kind in (('png', 'PNG'), ('jpg', 'JPEG'), ('webp', 'WEBP')):
        hm.save(tmp_path/fmt, fmt)
        assert [Image.open(f).format for f in (tmp_path/fmt).glob(f'*.{fmt}')]==[kind]*6
    before = files(tmp_path/'png')
    with pytest.raises(FileExistsError, match='overwrite=True'): hm.save(tmp_path/'png')
    assert files(tmp_path/'png')==before
    hm.save(tmp_path/'png', overwrite=True)
    assert files(tmp_path/'png')==before # nothing twice in the table
    learn.get_heatmaps(get_image_files(pics)[2:3]).save(tmp_path/'png') # a second call adds
    assert len(table(tmp_path/'png'/'manifest.csv'))==3
    for bad in (dict(fmt='bmp'), dict(interpolation='lanczos'), dict(names=['a'])):
        with pytest.raises(ValueError, match='expected|names'): hm.save(tmp_path/'none', **bad)
    with pytest.raises(ValueError, match='no heatmaps'): hm[:0].save(tmp_path/'none')
    assert not (tmp_path/'none').exists()


def test_names(learn, pics, tmp_path):
    "Whatever items are called, their files stay in the folder and are all there"
    names = ['../../up', 'a b\nc', 'A B C', 'x'*300, 'x'*301, 'ünï', '', '.', 'CON', '/etc/passwd', 'a-b', '-rf']
    hm = learn.get_heatmaps(get_image_files(pics), cls=['Red', 'Blue_ish'])
    hm.vocab = ['a/b', 'a:b']
    out = tmp_path/'deep'/'out'
    rows = table(hm.save(out, names=names))
    assert names_in(out)==sorted(['manifest.csv', *[r[k] for r in rows for k in ('map', 'heatmap', 'overlay')]]) and len(rows)==24
    assert len({r['overlay'].lower() for r in rows})==24 and max(len(r['overlay'].encode()) for r in rows)<200
    assert [p.name for p in (tmp_path/'deep').iterdir()]==['out']
    same = file_names(['a', 'a', 'A', 'a-2', 'b'])
    assert len({o.lower() for o in same})==5


def test_a_picture_is_whole_or_not_there(learn, pics, tmp_path, monkeypatch):
    hm,calls = learn.get_heatmaps(get_image_files(pics)[:2]),[]
    save = Image.Image.save
    def full(self, fp, *args, **kwargs):
        calls.append(fp)
        if len(calls)<3: return save(self, fp, *args, **kwargs)
        Path(fp).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(OSError, match='No space left'): hm.save(tmp_path)
    assert len(list(tmp_path.iterdir()))==2 and all(Image.open(f).size==(64,64) for f in tmp_path.iterdir())


# Parts

@pytest.fixture
def many(pics):
    "A Learner with batches of 2"
    return pic_learner(pics, bs=2)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    "Parts of two batches"
    import fastai_heatmaps.learner.core as l
    info = l.run_info
    def small(*args):
        res = info(*args)
        return {**res, 'part': 2*args[0].bs}
    monkeypatch.setattr(l, 'run_info', small)


def dl_of(learn, pics): return learn.dls.test_dl(get_image_files(pics).sorted()[:11])
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a.maps, b.maps)) and torch.equal(a.cls, b.cls) and torch.equal(a.preds, b.preds) and len(a)==len(b)


@pytest.mark.parametrize('kw', [{}, dict(cls=['Red', 'Blue_ish'], method='layercam', layer='0.6'), dict(cls=tensor([0,1]*5+[0])), dict(method='integrated_gradients', steps=3), dict(dtype=torch.float16)])
@pytest.mark.filterwarnings('ignore:the attributions sum')
def test_written_and_read(many, pics, tmp_path, kw):
    dl = dl_of(many, pics)
    want,got = many.get_heatmaps(dl=dl, **kw),many.get_heatmaps(dl=dl, out=tmp_path/'a', **kw)
    again = load_heatmaps(tmp_path/'a')
    assert len([f for f in os.listdir(tmp_path/'a') if f.startswith('part')])==3
    for o in (got, again):
        assert same(want, o) and o.vocab==list(want.vocab) and (o.method,o.layer,o.task,o.thresh)==(want.method,want.layer,want.task,want.thresh) and o.maps.dtype==kw.get('dtype', torch.float32)
        assert {k:v.tolist() for k,v in o.info.items()}=={k:v.tolist() for k,v in want.info.items()}
        assert [Path(i).name for i in o.items]==[i.name for i in want.items]
    assert got.title(3)==want.title(3) and torch.equal(load_heatmaps(tmp_path/'a', dl).image(3), want.image(3))
    with pytest.raises(ValueError, match='pass load_heatmaps the DataLoader'): again.show(0)
    if 'dtype' in kw: assert got.show(0) and got.save(tmp_path/'half')


def test_targets_and_sizes(demo, tmp_path):
    "The true classes are kept, and maps of several sizes"
    want,got = demo.get_heatmaps(cls='targ'),demo.get_heatmaps(cls='targ', out=tmp_path/'a')
    assert same(want, got) and torch.equal(want.targs, got.targs) and [m.shape for m in want.maps]==[m.shape for m in got.maps] and len({m.shape for m in got.maps})>1


@pytest.fixture
def stopping():
    "A method, the batches that it has seen, and at which of them it is interrupted"
    calls,stop = [],[99]
    def method(acts, grads):
        calls.append(1)
        if len(calls)>stop[0]: raise KeyboardInterrupt
        return (acts*grads).sum(1)
    return method,calls,stop


def test_goes_on(many, pics, tmp_path, stopping):
    "After an interrupt only the rest is computed, and the folder is that of an unbroken run"
    dl,(method,calls,stop) = dl_of(many, pics),stopping # 6 batches: parts of 2, 2 and 2
    many.get_heatmaps(dl=dl, method=method, run='1', out=tmp_path/'whole')
    stop[0] = len(calls)+3
    with pytest.raises(KeyboardInterrupt): many.get_heatmaps(dl=dl, method=method, run='1', out=tmp_path/'a')
    assert names_in(tmp_path/'a')==['manifest.json', 'part-00000000.npz']
    with pytest.raises(ValueError, match='holds 4 of 11 images'): load_heatmaps(tmp_path/'a')
    stop[0] = 99
    calls.clear()
    got = many.get_heatmaps(dl=dl, method=method, run='1', out=tmp_path/'a')
    assert got.method=='method' # its name, as without a folder
    assert len(calls)==4+4 and files(tmp_path/'a')==files(tmp_path/'whole') and same(got, load_heatmaps(tmp_path/'whole'))
    many.get_heatmaps(dl=dl, method=method, run='1', out=tmp_path/'a')
    assert len(calls)==4+4+4 # all was there; four images of it were explained again


@pytest.mark.parametrize('cls', [None, tensor([0,1,1,0,0,1,0,1,1,0,1])])
def test_a_part_that_is_lost_or_damaged_is_made_anew(many, pics, tmp_path, cls):
    "Wherever a bit flips or a file is cut, that is noticed, told, and mended"
    dl,a = dl_of(many, pics),tmp_path/'a'
    want = many.get_heatmaps(dl=dl, out=a, cls=cls)
    whole = files(a)
    (a/'part-00000004.npz').unlink()
    assert same(many.get_heatmaps(dl=dl, out=a, cls=cls), want) and files(a)==whole
    part = a/'part-00000000.npz'
    data,rng = part.read_bytes(),rnd.Random(0)
    seen = 0
    for bad in [data[:100], data[:-30], b'', b'x'*1000, *[data[:i]+bytes([data[i]^4])+data[i+1:] for i in rng.sample(range(len(data)), 60)]]:
        part.write_bytes(bad)
        try: got = load_heatmaps(a)
        except ValueError as e:
            seen += 1
            assert 'is damaged' in str(e) and 'part-00000000.npz' in str(e) and '\n' not in str(e)
        else: assert same(got, want) # in what no reader looks at, such as a time
    assert seen>40
    part.write_bytes(data[:-30])
    with pytest.warns(UserWarning, match='made anew'): many.get_heatmaps(dl=dl, out=a, cls=cls)
    assert files(a)==whole


def test_another_run(many, pics, tmp_path):
    "What is no continuation is refused, and nothing is changed"
    dl,a = dl_of(many, pics),tmp_path/'a'
    many.get_heatmaps(dl=dl, out=a)
    before = files(a)
    other = pic_learner(pics, bs=2)
    with torch.no_grad(): other.model[1][-1].weight += .01
    for f,word in [(lambda: many.get_heatmaps(dl=dl, out=a, method='layercam'), 'method was gradcam and is layercam'), (lambda: many.get_heatmaps(dl=dl, out=a, relu=False), 'relu'), (lambda: many.get_heatmaps(dl=dl, out=a, cls='Red'), 'cls'),
                   (lambda: other.get_heatmaps(dl=dl, out=a), 'model'), (lambda: many.get_heatmaps(get_image_files(pics)[:11].sorted(reverse=True), out=a), 'items'),
                   (lambda: many.get_heatmaps(dl=dl.new(bs=4), out=a), 'part'), (lambda: many.get_heatmaps(dl=dl, out=a, layer='0.6'), 'layer'), (lambda: many.get_heatmaps(dl=dl, out=a, method='layercam', layer='0.6'), 'method')]:
        with pytest.raises(ValueError, match='another run') as e: f()
        assert word in str(e.value) and '\n' not in str(e.value)
    assert files(a)==before
    for dl in (many.dls.valid, pic_learner(pics, size=48, bs=2).dls.test_dl(get_image_files(pics).sorted()[:11])): # other images; other transforms
        with pytest.raises(ValueError, match='other images'): load_heatmaps(a, dl)
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'thesis.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='holds other things'): many.get_heatmaps(dl=dl, out=tmp_path/'b')
    with pytest.raises(ValueError, match='no heatmaps'): load_heatmaps(tmp_path/'b')
    assert os.listdir(tmp_path/'b')==['thesis.txt']
    (a/'manifest.json').write_text('{"run"')
    with pytest.raises(ValueError, match='cannot be read'): many.get_heatmaps(dl=dl, out=a)
    with pytest.raises(ValueError, match='needs a fastai DataLoader'): many.get_heatmaps(dl=torch.utils.data.DataLoader([(torch.rand(3,64,64), 0)]*4, batch_size=2), out=tmp_path/'c')


class Invert(ItemTransform):
    "A transform whose text does not show its parameter"
    def __init__(self, k): self.k = k
    def encodes(self, x): return (PILImage.create(255-np.array(x[0])) if self.k else x[0], *x[1:])


@pytest.mark.slow
def test_another_run_that_looks_alike(pics, tmp_path):
    "Layers without weights, edited functions, other pictures of the same names, other labels, other parameters of a transform: none is taken for the other"
    learn = pic_learner(pics, bs=2)
    files,turned = list(get_image_files(pics).sorted()),tmp_path/'turned'
    turned.mkdir()
    for f in files: Image.open(f).rotate(180).save(turned/f.name)
    def with_dls(get_x=noop, get_y=label, **kwargs):
        res = pic_learner(pics, bs=2)
        res.dls = DataBlock((ImageBlock, CategoryBlock(vocab=['Red', 'Blue_ish'])), get_items=lambda o: files, get_x=get_x, get_y=get_y, splitter=IndexSplitter(range(6)), **{'item_tfms': Resize(64), **kwargs}).dataloaders(pics, bs=2, num_workers=0, device='cpu')
        return res
    def scaled(k): return lambda acts, grads: k*acts.mean(1)
    labels = [(f, label(f)) for f in files]
    pairs = dict(layer=(lambda o: learn.get_heatmaps(files, layer='0.2', out=o), lambda o: learn.get_heatmaps(files, layer='0.6.0.relu', out=o)),
                 method=(lambda o: learn.get_heatmaps(files, method=lambda a, g: a.mean(1), run='1', out=o), lambda o: learn.get_heatmaps(files, method=lambda a, g: g.mean(1), run='1', out=o)),
                 closure=(lambda o: learn.get_heatmaps(files, method=scaled(1), run='1', out=o), lambda o: learn.get_heatmaps(files, method=scaled(2), run='1', out=o)),
                 score=(lambda o: learn.get_heatmaps(files, cls=0, score=lambda p: p, run='1', out=o), lambda o: learn.get_heatmaps(files, cls=0, score=lambda p: -p, run='1', out=o)),
                 targs=(lambda o: learn.get_heatmaps(labels, out=o), lambda o: learn.get_heatmaps(files, out=o)),
                 pictures=(lambda o: with_dls().get_heatmaps(out=o), lambda o: with_dls(get_x=lambda f: turned/f.name).get_heatmaps(out=o)),
                 truths=(lambda o: with_dls().get_heatmaps(cls='targ', out=o), lambda o: with_dls(get_y=lambda f: {'Red':'Blue_ish'}.get(label(f), 'Red')).get_heatmaps(cls='targ', out=o)),
                 transform=(lambda o: with_dls(item_tfms=[Resize(64), Invert(0)]).get_heatmaps(out=o), lambda o: with_dls(item_tfms=[Resize(64), Invert(1)]).get_heatmaps(out=o)))
    for name,(f,g) in pairs.items():
        f(tmp_path/name)
        f(tmp_path/name) # the same goes on
        with pytest.raises(ValueError, match='another run'): g(tmp_path/name)


def test_tables(pics, tmp_path):
    "Rows of a table are known by the files that they name"
    df = pd.DataFrame(dict(name=[f.name for f in get_image_files(pics).sorted()], label=[label(f) for f in get_image_files(pics).sorted()], valid=[i%2==0 for i in range(12)]))
    learn = pic_learner(pics)
    learn.dls = ImageDataLoaders.from_df(df, pics, valid_col='valid', item_tfms=Resize(64), bs=4, num_workers=0, device='cpu')
    hm,want = learn.get_heatmaps(out=tmp_path/'a'),[str(pics/o) for o in df.name[df.valid]]
    assert list(load_heatmaps(tmp_path/'a').items)==want
    rows = table(hm.save(tmp_path/'b'))
    assert [r['item'] for r in rows]==want and rows[0]['map'].startswith(Path(want[0]).stem)


def test_a_table_of_other_things_stays(learn, pics, tmp_path):
    (tmp_path/'manifest.csv').write_text('name,price\na,1\n')
    with pytest.raises(FileExistsError, match='table of other things'): learn.get_heatmaps(get_image_files(pics)[:1]).save(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()]==[('manifest.csv', 'name,price\na,1\n')]


def test_a_full_disk(many, pics, tmp_path, monkeypatch):
    "The error is told, what is there is whole, and with more room the run goes on"
    savez,calls = np.savez,[]
    def full(f, **kw):
        calls.append(1)
        if len(calls)==2:
            f.write(b'half')
            raise OSError(28, 'No space left on device')
        savez(f, **kw)
    monkeypatch.setattr(np, 'savez', full)
    dl = dl_of(many, pics)
    with pytest.raises(OSError, match='No space left'): many.get_heatmaps(dl=dl, out=tmp_path/'a')
    assert names_in(tmp_path/'a')==['manifest.json', 'part-00000000.npz']
    assert same(many.get_heatmaps(dl=dl, out=tmp_path/'a'), many.get_heatmaps(dl=dl))


@pytest.mark.slow
def test_killed_at_random(tmp_path, forked):
    "SIGKILL at random moments of a writing run, 10 times: resumed to the end, the folder is byte for byte that of an unbroken run"
    code = """
        import os, random, signal, sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from shared import *
        import fastai_heatmaps.learner.core as l
        info = l.run_info
        l.run_info = lambda *args: {**info(*args), 'part': 2*args[0].bs}
        out,rng = Path(sys.argv[1]),np.random.default_rng(0)
        (out/'pics').mkdir()
        for i in range(60): Image.fromarray(rng.integers(0, 255, (40,40,3), dtype=np.uint8)).save(out/'pics'/f'{"ab"[i%2]}_{i:02}.png')
        learn = pic_learner(out/'pics', squeezenet1_1, size=40, bs=2)
        dl = learn.dls.test_dl(get_image_files(out/'pics').sorted())
        def run(folder): # in a process of its own, forked before autograd has run
            pid = os.fork()
            if pid: return pid
            learn.get_heatmaps(dl=dl, out=out/folder)
            os._exit(0)
        t = time.time()
        assert os.waitpid(run('whole'), 0)[1]==0
        t = time.time()-t
        kills,parts = 0,[]
        while kills<10:
            pid = run('a')
            time.sleep(random.uniform(.1, .3)*t)
            os.kill(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)[1]==0
            parts.append(len(list((out/'a').glob('part*'))) if (out/'a').exists() else 0)
            kills += 1
            if done:
                import shutil
                shutil.rmtree(out/'a') # from the beginning: there was nothing left to kill
        assert os.waitpid(run('a'), 0)[1]==0
        print('PARTS', *parts)
    """
    rc,printed = forked(textwrap.dedent(code), tmp_path, Path(__file__).parent)
    assert rc==0, printed[-2000:]
    parts = [int(o) for o in printed.split('PARTS')[1].split()]
    assert len(parts)==10 and any(0<o<15 for o in parts), parts # it was killed in the middle
    assert files(tmp_path/'a')==files(tmp_path/'whole') and len(files(tmp_path/'a'))==16


def test_digests():
    assert digest([1,2])!=digest([2,1]) and digest(tensor([1,2]))!=digest(tensor([[1,2]])) and digest(torch.zeros(2))!=digest(torch.zeros(2).half()) and digest(Path('a'))==digest('a')
    assert digest(torch.ones(3, dtype=torch.bfloat16))==digest(torch.ones(3, dtype=torch.bfloat16)) and digest(tensor(3))==digest(tensor(3))
    assert digest(PILImage.create(np.zeros((2,2,3), np.uint8)))!=digest(PILImage.create(np.ones((2,2,3), np.uint8)))

"The command line: called in this process, and where a process of its own matters, from an installed wheel in a folder outside the source."
import csv, io, os, pathlib, pickle, resource, shutil, subprocess, sys, pytest
from filelock import FileLock
from shared import *
import fastai_heatmaps.cli.main as cli
from fastai_heatmaps.cli.models import open_learner, pickle_without

root = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "A folder that the package is installed into, from a wheel; built once for all test processes"
    base = tmp_path_factory.getbasetemp()
    base = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
    with FileLock(base/'wheel.lock'):
        if not (base/'site').exists():
            src = base/'src'
            src.mkdir()
            for o in ('pyproject.toml', 'settings.ini', 'setup.py', 'README.md', 'LICENSE'): shutil.copy(root/o, src)
            shutil.copytree(root/'fastai_heatmaps', src/'fastai_heatmaps', ignore=shutil.ignore_patterns('__pycache__'))
            subprocess.run([sys.executable, '-m', 'build', '--wheel', '--outdir', base, src], check=True, capture_output=True)
            wheel, = base.glob('*.whl')
            subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', base/'site', wheel], check=True)
    return base/'site'


@pytest.fixture
def run(site, tmp_path):
    "Calls the command as a shell does"
    def _run(*args, **kwargs):
        env = {**os.environ, 'PYTHONPATH': str(site), 'OMP_NUM_THREADS': '1'}
        return subprocess.run([site/'bin'/'fastai-heatmaps', *map(str, args)], cwd=tmp_path, env=env, capture_output=True, text=True, **kwargs)
    return _run


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    "Calls the command in this process, with the same result as from `run`"
    monkeypatch.chdir(tmp_path)
    def _call(*args):
        capsys.readouterr()
        return subprocess.CompletedProcess(args, cli.main([*map(str, args)]), *capsys.readouterr())
    return _call


@pytest.fixture(scope='session')
def pets(pics, tmp_path_factory):
    "A small Learner, trained for a moment, and the folder that it is saved in, in every way"
    path = tmp_path_factory.mktemp('models')
    learn = pic_learner(pics, squeezenet1_1, batch_tfms=[Normalize.from_stats(*imagenet_stats, cuda=False)])
    learn.path,learn.model_dir = path,path
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    learn.export('export.pkl')
    learn.save('pets')
    from safetensors.torch import save_file
    save_file(learn.model.state_dict(), path/'pets.safetensors')
    return learn,path


class Evil:
    "Makes a file when it is unpickled"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def rows(out):
    with open(out/'manifest.csv', newline='', encoding='utf-8', errors='surrogateescape') as f: return list(csv.DictReader(f))


def one(res, rc, *words):
    "`res` has that exit code and one line on stderr with all of `words`"
    assert res.returncode==rc and res.stderr.startswith('fastai-heatmaps: ') and res.stderr.count('\n')==1, (res.returncode, res.stderr)
    for w in words: assert w in res.stderr, res.stderr


@pytest.mark.slow
def test_answers_without_fastai(site, tmp_path):
    "Help, and what can be said without a model, do not wait for fastai"
    (tmp_path/'x.pkl').touch(); (tmp_path/'x.jpg').touch()
    code = """import sys
from fastai_heatmaps.cli.main import main
for args in sys.argv[1:]:
    try: print('code', main(args.split()))
    except SystemExit as e: print('code', e.code)
print(__file__ if '__file__' in globals() else '', *[o for o in ('fastai', 'torch', 'numpy', 'matplotlib', 'PIL', 'pandas') if o in sys.modules])"""
    args = ['--version', '--help', 'gradcam --help', 'grid --help', 'methods --help', 'demo --help', 'app --help', 'space --help',
            '', 'nope', 'gradcam', 'gradcam x.pkl', 'gradcam x.pkl x.jpg', 'gradcam x.pkl x.jpg --top 0', 'gradcam x.pkl x.jpg --top 2 --cls a', 'gradcam x.pkl x.jpg --nope', 'methods x',
            'gradcam x.pkl x.jpg --format gif', 'gradcam x.pkl x.jpg --vocab a,b', 'gradcam x.pkl x.jpg --arch resnet18', 'gradcam x.pkl x.jpg --arch resnet18 --vocab a', 'gradcam x.pkl x.jpg --arch resnet18 --vocab a,b,a',
            'grid x.pkl x.jpg --out grid.gif', 'gradcam no.pkl x.jpg', 'gradcam x.pkl *.png', 'gradcam x.pkl .hidden', 'grid x.pkl x.jpg --trust --out x.jpg']
    res = subprocess.run([sys.executable, '-c', code, *args], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(site)}, capture_output=True, text=True)
    assert [l for l in res.stdout.splitlines() if l.startswith('code')]==['code 0']*8+['code 2']*14+['code 2']+['code 1']*4, res.stdout+res.stderr
    assert res.stdout.splitlines()[-1].strip()=='' and 'Traceback' not in res.stderr, res.stdout+res.stderr
    assert res.stdout.count('examples:')==3 and res.stdout.count('exit codes: 0')==7
    for o in ("'x.pkl' was not opened", 'add --trust', '--vocab goes with --arch', "gives 1 class;", "the class 'a' twice", "no file 'no.pkl'", "no images found in '*.png'", "there is no file '.hidden'", '--overwrite'): assert o in res.stderr, o


def test_stopped():
    "Ctrl-C, and a reader that goes away, as `| head` does, end the command without a traceback"
    code = """import sys, fastai_heatmaps.cli.main as cli
def work(a):
    print('x'*10**6)
    raise KeyboardInterrupt
cli.print_methods = work
sys.exit(cli.main(['methods']))"""
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    one(res, 130, 'interrupted')
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        p.stdout.close()
        assert p.stderr.read()=='' and p.wait()==1


@pytest.mark.slow
def test_photos_of_all_kinds(run, pets, pics, tmp_path):
    "What can be read is done, and what cannot is told, one line each; the numbers are those of the Learner"
    learn,path = pets
    d,rng = tmp_path/'photos',np.random.default_rng(0)
    (d/'sub').mkdir(parents=True)
    im = Image.fromarray(rng.integers(0, 255, (80,100,3), dtype=np.uint8))
    im.save(d/'good.jpg')
    (d/'cut.jpg').write_bytes((d/'good.jpg').read_bytes()[:3000])
    (d/'text.jpg').write_text('no image')
    Image.new('1', (20000,20000)).save(d/'huge.png')
    Image.new('RGB', (1,1), 'red').save(d/'dot.png')
    im.convert('CMYK').save(d/'cmyk.jpg')
    im.convert('RGBA').save(d/'rgba.png')
    Image.fromarray(rng.integers(0, 255, (80,100), dtype=np.uint16)).save(d/'grey16.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(d/'rotated.jpg', exif=exif)
    if sys.platform=='linux': os.symlink('good.jpg', os.fsencode(d)+b'/lat\xffin.jpg')
    for o in ('with space.jpg', 'new\nline.jpg', 'x'*240+'.jpg', 'ünï.jpg', 'sub/good.jpg'): im.save(d/o)
    Image.new('RGB', (9,9)).save(d/'.hidden.png')
    res = run('gradcam', path/'export.pkl', '--trust', 'photos', 'gone.jpg', '--top', 2, 'photos/sub/../good.jpg', '--bs', 5)
    assert res.returncode==1
    told = res.stderr.splitlines()
    assert len(told)==5 and sum(l.startswith('fastai-heatmaps: skipped: ') for l in told)==4, res.stderr
    assert sum('lie on their side' in l and 'add --upright' in l for l in told)==1 # rotated.jpg
    for o,words in {'gone.jpg': 'no file', 'cut.jpg': 'truncated', 'text.jpg': 'cannot identify', 'huge.png': '400000000 pixels'}.items(): assert any(o in l and words in l for l in told), o
    good = [f for f in sorted(get_image_files(d)) if f.name not in ('cut.jpg', 'text.jpg', 'huge.png', '.hidden.png')] + [d/'good.jpg']
    n = len(good)
    assert n>=12 and len(res.stdout.splitlines())==n+1 and res.stdout.splitlines()[-1]==f'heatmaps: heatmaps of {n} images, 4 skipped'
    assert r"'photos/new\nline.jpg': " in res.stdout
    got = rows(tmp_path/'heatmaps')
    assert len(got)==2*n
    with learn.no_bar(): want = learn.get_preds(dl=learn.dls.test_dl([tmp_path/o['item'] for o in got[::2]], num_workers=0))[0]
    assert [float(o['probability']) for o in got]==pytest.approx(want.sort(1, descending=True).values.flatten().tolist(), rel=1e-4)
    assert [o['cls'] for o in got]==[learn.dls.vocab[i] for i in want.sort(1, descending=True).indices.flatten()]
    files = {f.name for f in (tmp_path/'heatmaps').iterdir()}-{'.fastai_heatmaps.lock'}
    assert files=={'manifest.csv', *[o[k] for o in got for k in ('map', 'heatmap', 'overlay')]} and len(files)==1+2*n*3
    assert all(re.fullmatch(r'[\w-]{1,150}\.png', f) for f in files-{'manifest.csv'})
    assert {f.name for f in tmp_path.iterdir()}=={'photos', 'heatmaps'}


def test_a_pickle_runs_only_with_trust(call, tmp_path):
    evil = tmp_path/'evil'
    for o in ('a.pkl', 'a.pth', 'a.safetensors'): torch.save(Evil(evil), tmp_path/o)
    torch.save({'model': {'w': Evil(evil)}, 'opt': {}}, tmp_path/'b.pth')
    (tmp_path/'c.pth').write_bytes(pickle.dumps(Evil(evil)))
    Image.new('RGB', (9,9)).save(tmp_path/'x.png')
    for o in ('a.pkl', 'a.pth', 'c.pth'): one(call('gradcam', o, 'x.png'), 2, 'not opened', '--trust')
    one(call('gradcam', 'a.safetensors', 'x.png'), 2, '--arch')
    one(call('gradcam', 'b.pth', 'x.png', '--arch', 'resnet18', '--vocab', 'a,b'), 1, "'b.pth' cannot be read as weights: it holds", 'mkdir', 'none of its code was run')
    for o in ('a.pkl', 'a.pth', 'c.pth', 'a.safetensors'):
        for trust in ((), ('--trust',)):
            with pytest.raises(RuntimeError, match='cannot be read as weights'): open_learner(tmp_path/o, bool(trust), 'resnet18', 'a,b')
    assert not evil.exists()
    one(call('grid', 'a.pkl', 'x.png', '--trust'), 1, "'a.pkl' cannot be loaded as an exported Learner")
    assert evil.exists() # or nothing was shown by this test


@pytest.mark.parametrize('what', [{'a': 1}, [1,2], 'text', 3])
def test_no_learner(tmp_path, what):
    torch.save(what, tmp_path/'a.pkl')
    (tmp_path/'b.pkl').write_bytes(pickle.dumps(what))
    for o in ('a.pkl', 'b.pkl'):
        for kwargs,kind in ((dict(trust=True), 'an exported Learner'), (dict(arch='resnet18', vocab='a,b'), 'weights')):
            with pytest.raises(RuntimeError) as e: open_learner(tmp_path/o, **kwargs)
            assert kind in str(e.value) or 'something else' in str(e.value)
            assert '\n' not in str(e.value) and 'weights_only' not in str(e.value), e.value


@pytest.mark.slow
def test_weights(call, pets, pics, tmp_path):
    "Weights give what the Learner gave that they were saved from, normalisation included; also those with the state of the optimizer. Images of a CSV, drawn on the originals"
    learn,path = pets
    shutil.copytree(pics, tmp_path/'set'/'pics')
    (tmp_path/'classes.txt').write_text('\n'.join(learn.dls.vocab)+'\n')
    files = get_image_files(pics).sorted()
    with learn.no_bar(): hm = learn.get_heatmaps(files, cls='red')
    with open(tmp_path/'set'/'a.csv', 'w', newline='') as f: csv.writer(f).writerows([['label', 'image'], *[[label(o), f'pics/{o.name}'] for o in files]])
    res = call('gradcam', path/'pets.pth', 'set/a.csv', '--column', 'image', '--arch', 'squeezenet1_1', '--vocab', 'classes.txt', '--size', 64, '--cls', 'red', '--out', 'a', '--quiet', '--on', 'original', '--format', 'webp')
    assert res.returncode==0 and res.stdout==res.stderr=='', res.stderr
    got = rows(tmp_path/'a')
    assert [o['cls'] for o in got]==['Red']*12 and [float(o['probability']) for o in got]==pytest.approx(hm.preds[:,1].tolist(), rel=1e-4)
    for o,r in zip(files, got): assert Path(r['item']).name==o.name and Image.open(tmp_path/'a'/r['overlay']).size==Image.open(o).size and r['map'].endswith('.webp')
    for o in ('pets.pth', 'pets.safetensors'):
        new = open_learner(path/o, arch='squeezenet1_1', vocab='Blue_ish,Red', size=64)
        torch.testing.assert_close(new.get_heatmaps(files, cls='red').maps, hm.maps)
    def fails(*words, kind=ValueError, **kwargs):
        with pytest.raises(kind) as e: open_learner(path/'pets.pth', **kwargs)
        assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value
    fails("no architecture 'squeezenet'", "'squeezenet1_1'", arch='squeezenet', vocab='a,b')
    fails('not those of squeezenet1_1', '3 classes', 'size mismatch', arch='squeezenet1_1', vocab='a,b,c', kind=RuntimeError)
    fails('not those of resnet18', arch='resnet18', vocab='a,b', kind=RuntimeError)


def test_weights_of_timm(pics, tmp_path):
    learn = vision_learner(pic_block(get_items=get_image_files).dataloaders(pics, bs=4, num_workers=0, device='cpu'), 'resnet18', pretrained=False)
    learn.path = learn.model_dir = tmp_path
    learn.dls.add_tfms([Normalize.from_stats(*[learn.model[0].model.default_cfg[o] for o in ('mean', 'std')], cuda=False)], 'after_batch')
    learn.save('timm', with_opt=False)
    new,files = open_learner(tmp_path/'timm.pth', arch='resnet18', vocab='Blue_ish,Red', size=64),get_image_files(pics)
    torch.testing.assert_close(new.get_heatmaps(files).maps, learn.get_heatmaps(files).maps)


def test_exported_on_a_gpu(pets, pics, tmp_path, monkeypatch):
    "A Learner whose tensors and DataLoaders say that they were on a GPU is loaded onto the CPU"
    learn = load_learner(pets[1]/'export.pkl')
    for o in (learn.dls, *learn.dls.loaders): o._device = torch.device('cuda', 0)
    with monkeypatch.context() as m:
        m.setattr(torch.serialization, 'location_tag', lambda o: 'cuda:0')
        torch.save(learn, tmp_path/'gpu.pkl', pickle_protocol=2) # as `export` does
    if not torch.cuda.is_available(): pytest.raises(RuntimeError, torch.load, tmp_path/'gpu.pkl', weights_only=False)
    new,files = open_learner(tmp_path/'gpu.pkl', trust=True, cpu=True),get_image_files(pics)
    with pets[0].no_bar(): torch.testing.assert_close(new.get_heatmaps(files).maps, pets[0].get_heatmaps(files).maps)


def test_functions_from_elsewhere(pics, tmp_path, monkeypatch):
    "A Learner is loaded without the function that labels; and what it cannot do without is named"
    main = sys.modules['__main__']
    def is_cat(o): return o.name[0]=='R'
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = create_vision_model(squeezenet1_1, 2, pretrained=False)
        def forward(self, x): return self.net(x)
    for o in (is_cat, Net):
        o.__module__,o.__qualname__ = '__main__',o.__name__
        monkeypatch.setattr(main, o.__name__, o, raising=False)
    dls = ImageDataLoaders.from_path_func(pics, get_image_files(pics), is_cat, item_tfms=Resize(64), bs=4, num_workers=0, device='cpu')
    learn = vision_learner(dls, squeezenet1_1, pretrained=False)
    learn.path = tmp_path
    learn.export('a.pkl', pickle_module=pickle) # as it was the default before fastai 2.8
    old,learn.model,learn.splitter,learn.opt = learn.model,Net(),trainable_params,None
    learn.export('b.pkl', pickle_module=pickle)
    learn.model = old
    monkeypatch.undo()
    pytest.raises(AttributeError, load_learner, tmp_path/'a.pkl')
    with pytest.raises(RuntimeError, match=r"needs __main__\.is_cat, __main__\.Net, which cannot be imported here") as e: open_learner(tmp_path/'b.pkl', trust=True)
    assert '\n' not in str(e.value)
    new,files = open_learner(tmp_path/'a.pkl', trust=True),get_image_files(pics)
    pytest.raises(AttributeError, load_learner, tmp_path/'b.pkl')
    with learn.no_bar(): torch.testing.assert_close(new.get_heatmaps(files).preds, learn.get_heatmaps(files).preds)
    with pytest.raises(ValueError, match='uses __main__.is_cat, which was defined'): new.dls.test_dl(files, with_labels=True).dataset[0]


class OtherPath:
    def __init__(self, kind): self.kind = kind
    def __reduce__(self): return self.kind, ('a',)

def test_paths_of_another_system():
    for kind in (pathlib.WindowsPath, pathlib.PosixPath): assert pickle_without([], set()).Unpickler(io.BytesIO(pickle.dumps(OtherPath(kind)))).load()==Path('a')


def test_wrong_names(pets, pics, tmp_path, monkeypatch, capsys):
    "One line that says what there is, and exit code 2"
    monkeypatch.chdir(tmp_path)
    def fails(args, rc, *words):
        assert cli.main(['gradcam', str(pets[1]/'export.pkl'), str(pics), '--trust', *args.split()])==rc
        out,err = capsys.readouterr()
        assert err.startswith('fastai-heatmaps: ') and err.count('\n')==1 and out=='', err+out
        for w in words: assert w in err, err
    fails('--cls blue', 2, "no class 'blue'", "'Blue_ish'")
    fails('--cls 7', 2, 'no class 7', '0 to 1')
    fails('--cls 0 --cls blue_ish', 2, 'twice')
    fails('--top 3', 2, 'topk is 3')
    fails('--layer 0.99', 2, "no layer '0.99'", '0.')
    fails('--method gradcma', 2, "no method 'gradcma'", "'gradcam'")
    fails('--method saliency --layer 0.1', 2, 'looks at no layer')
    fails('--method cam', 2, 'CAM')
    (tmp_path/'file').touch()
    fails('--out file', 1, "--out is the file 'file'")
    assert [f.name for f in tmp_path.iterdir()]==['file']


@pytest.mark.slow
def test_what_is_there_is_kept(call, pets, pics, tmp_path):
    "Nothing is written over without --overwrite; a disk that is full, as a limit on the size of files, is told in one line, and nothing half-written is left"
    photo,args = next(iter(get_image_files(pics))),('gradcam', pets[1]/'export.pkl', '--trust', '--out', 'out')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limit[1]))
    try: res = call(*args, photo)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    one(res, 1, 'File too large')
    assert not list(tmp_path.rglob('*.tmp')) and all(Image.open(f).size==(64,64) for f in tmp_path.rglob('*.png'))
    assert call(*args, photo, '--overwrite').returncode==0
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path/'out').glob('[!.]*')}
    assert len(before)==4
    one(call(*args, photo), 1, 'is there already', '--overwrite')
    assert before=={f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path/'out').glob('[!.]*')}


@pytest.mark.slow
def test_many_images(pets, pics, tmp_path, monkeypatch, capsys):
    "More images than are taken at a time, of the same names in several folders: each once, in order, each with its own numbers"
    monkeypatch.chdir(tmp_path)
    for i in range(12): shutil.copytree(pics, tmp_path/'all'/f'{i:02}')
    files,n = sorted(Path('all').rglob('*.png')),[]
    files[100].write_text('no image')
    old = Learner.get_heatmaps
    def spy(self, dl, **kwargs):
        n.append(dl.n)
        return old(self, dl=dl, **kwargs)
    monkeypatch.setattr(Learner, 'get_heatmaps', spy)
    monkeypatch.setattr(cli, '_parts', lambda n, bs: [slice(i, i+64) for i in range(0, n, 64)])
    assert cli.main(['gradcam', str(pets[1]/'export.pkl'), 'all', '--trust', '--cls', 'Red', '--format', 'jpg', '--out', 'all/out', '--bs', '12'])==1
    assert n==[64, 64, 63, 16]
    files.pop(100)
    got = rows(tmp_path/'all'/'out')
    assert [o['item'] for o in got]==[str(f) for f in files] and len({o['overlay'].lower() for o in got})==143
    with pets[0].no_bar(): assert [float(o['probability']) for o in got]==pytest.approx(old(pets[0], files, cls='Red').preds[:,1].tolist(), rel=1e-4)
    out,err = capsys.readouterr()
    assert len(out.splitlines())==144 and err.count('\n')==1 and "'all/08/" in err
    assert cli.main(['gradcam', str(pets[1]/'export.pkl'), 'all', '--trust', '--out', 'all/out', '--overwrite'])==1 # and its own pictures are not taken for photos
    assert 'heatmaps of 143 images, 1 skipped' in capsys.readouterr()[0]


@pytest.mark.slow
def test_grid(call, pets, pics, tmp_path, capsys):
    res = call('grid', pets[1]/'export.pkl', pics, '--trust', '--n', 3, '--seed', 1, '--cls', 'Red', '--out', 'new/a.png')
    assert res.returncode==0 and res.stdout=='new/a.png: 3 images\n' and res.stderr=='', res.stderr
    for seed,n,same in ((1, 3, True), (2, 3, False)):
        assert cli.main(['grid', str(pets[1]/'export.pkl'), str(pics), '--trust', '--n', str(n), '--seed', str(seed), '--cls', 'Red', '--out', 'b.png', '--overwrite'])==0
        a,b = [np.array(Image.open(tmp_path/o).convert('RGB')) for o in ('new/a.png', 'b.png')]
        assert (a.shape==b.shape and (a==b).all())==same
    capsys.readouterr()
    assert cli.main(['grid', str(pets[1]/'export.pkl'), str(pics), '--trust', '--out', 'b.png'])==1 and '--overwrite' in capsys.readouterr()[1]
    Path('bad.jpg').write_text('no image')
    assert cli.main(['grid', str(pets[1]/'export.pkl'), 'bad.jpg', '--trust', '--out', 'c.png'])==1 and 'none of the images' in capsys.readouterr()[1]
    assert not Path('c.png').exists()


def test_methods(call):
    res = call('methods')
    assert res.returncode==0 and res.stdout==f'{heatmap_methods}\n' and res.stderr==''


def test_numbers(pets, pics, tmp_path, monkeypatch, capsys):
    "The numbers are those of the Learner; the same command goes on with a run, and another one does not mix with it"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pics, 'pics')
    files = get_image_files(Path('pics')).sorted()
    files[3].write_text('no image')
    good = [f for f in files if f!=files[3]]
    args = ['gradcam', str(pets[1]/'export.pkl'), 'pics', '--trust', '--format', 'npz', '--out', 'out', '--top', '2']
    assert cli.main(args)==1
    out,err = capsys.readouterr()
    assert len(out.splitlines())==12 and err.count('\n')==1 and files[3].name in err
    with pets[0].no_bar(): want = pets[0].get_heatmaps(good, topk=2)
    got = load_heatmaps('out', pets[0].dls.test_dl(good))
    torch.testing.assert_close(got.maps, want.maps)
    torch.testing.assert_close(got.preds, want.preds)
    assert got.cls.tolist()==want.cls.tolist() and got.vocab==list(pets[0].dls.vocab)
    part = Path('out/part-00000000.npz')
    data = part.read_bytes()
    explain,n = Heatmaps.of,[]
    monkeypatch.setattr(Heatmaps, 'of', lambda ran, *args: n.append(len(ran.x)) or explain(ran, *args))
    assert cli.main(args)==1 and capsys.readouterr()[0]=='out: heatmaps of 11 images, 1 skipped\n' and n==[1]*4 # nothing but a few images is computed again
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    part.unlink()
    assert cli.main(args)==1 and part.read_bytes()==data
    capsys.readouterr()
    assert cli.main([*args[:-1], '1'])==1 and 'another run: topk was 2 and is 1; choose another folder, or add --overwrite' in capsys.readouterr()[1]
    assert part.read_bytes()==data
    assert cli.main([*args[:-1], '1', '--overwrite'])==1 and load_heatmaps('out').cls.shape==(11,1)


# Own pictures and the photos

def photos_below(*folders): return sorted(f for d in folders for f in get_image_files(d))


@pytest.fixture
def mixed(pics, tmp_path):
    "A folder of photos, one of which is named like our pictures, in a folder of its own"
    d = tmp_path/'photos'
    (d/'sub').mkdir(parents=True)
    names = 'a.png', 'b-Red-overlay.png', 'sub/c.png', 'sub/z-Red-map.png'
    for f,o in zip(get_image_files(pics), names): shutil.copy(f, d/o)
    return d,[d/o for o in names]


@pytest.mark.parametrize('where,fmt', [('photos', 'png'), ('photos', 'jpg'), ('photos', 'webp'), ('photos/sub', 'png'), ('.', 'png'), ('link', 'png'), ('photos/new', 'png')])
def test_own_pictures_are_no_photos(call, pets, mixed, tmp_path, where, fmt):
    "Into the photos' own folder, one in it, one around it or a link to it; by folder, pattern or CSV: each photo once, whatever its name, and no picture of ours"
    photos,mine = mixed
    (tmp_path/'link').symlink_to(photos)
    kept = [f.read_bytes() for f in mine]
    args = 'gradcam', pets[1]/'export.pkl', '--trust', '--cls', 'Red', '--format', fmt, '--out', where, '--overwrite'
    def done(*images):
        res = call(*args, *images)
        assert res.returncode==0 and res.stderr=='', res.stderr
        return sorted((tmp_path/l.split(': ')[0]).resolve() for l in res.stdout.splitlines()[:-1])
    for images in ('photos', '.', 'photos'): assert done(images)==sorted(mine)
    there = photos_below(photos, *{(tmp_path/where).resolve()}-{photos, tmp_path})
    (tmp_path/'all.csv').write_text('image\n'+'\n'.join(map(str, there)))
    for images in (there, ['photos/**/*.*g', 'photos/**/*.webp'], ['all.csv']): assert done(*images)==sorted(mine)
    assert [f.read_bytes() for f in mine]==kept
    ours = {o.resolve() for o in photos_below(tmp_path)}-{*mine}
    assert len(ours)==12 and {o.parent for o in ours}=={(tmp_path/where).resolve()}


def test_no_photos_but_our_own(call, pets, mixed):
    args = pets[1]/'export.pkl', '--trust', '--cls', 'Red'
    assert call('gradcam', *args, 'photos/a.png', '--out', 'out').returncode==0
    for o in ('out', 'out/a-Red-overlay.png', 'out/*.png'): one(call('gradcam', *args, o, '--out', 'out2'), 1, 'no images found', 'this command drew')
    assert not Path('out2').exists()


def test_a_photo_that_may_not_be_opened(call, pets, mixed, monkeypatch):
    "It is skipped, like any that cannot be read"
    from fastai_heatmaps.cli import files
    def denied(f, *args): raise PermissionError(13, 'Permission denied', f)
    with monkeypatch.context() as m:
        m.setattr(files, 'open', denied, raising=False)
        assert len(files.find_images(['photos'])[0])==4


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['jpg', 'svg'])
def test_an_own_grid_is_no_photo(call, pets, mixed, kind):
    for i in range(2):
        res = call('grid', pets[1]/'export.pkl', '--trust', 'photos', '--out', f'photos/{i}.{kind}')
        assert (res.stdout, res.stderr)==(f'photos/{i}.{kind}: 4 images\n', '')


def test_pictures_of_a_run_that_was_killed(call, pets, mixed, tmp_path, monkeypatch):
    "They are recognised without a table of them"
    from fastai_heatmaps.data import files
    monkeypatch.setattr(files, 'add_rows', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): call('gradcam', pets[1]/'export.pkl', '--trust', 'photos', '--out', 'photos')
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert len(photos_below('photos'))==16 and not Path('photos/manifest.csv').exists()
    assert 'heatmaps of 4 images' in call('gradcam', pets[1]/'export.pkl', '--trust', 'photos', '--out', 'photos', '--overwrite').stdout


# What the command says, and to whom

@pytest.mark.slow
def test_closed(site, pets, pics, tmp_path):
    "With stdin, stdout and stderr closed the work is done all the same, and no other file takes their place"
    env = {**os.environ, 'PYTHONPATH': str(site), 'OMP_NUM_THREADS': '1'}
    line = f"'{sys.executable}' -m fastai_heatmaps.cli gradcam '{pets[1]}/export.pkl' '{next(iter(get_image_files(pics)))}' gone.jpg --trust --out out"
    res = subprocess.run(f'{line} >&- 2>&- <&-', shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert res.returncode==1 and res.stdout==res.stderr==''
    assert len(rows(tmp_path/'out'))==1 and len(list((tmp_path/'out').glob('[!.]*')))==4
    for f in (tmp_path/'out').glob('*.png'): Image.open(f).load()


def test_stderr_that_takes_nothing(monkeypatch):
    "A line that cannot be printed does not stop the work"
    with open('/dev/full', 'w', buffering=1) as full:
        monkeypatch.setattr(sys, 'stderr', full)
        for o in range(2): cli.tell('a line')
        assert os.path.samestat(os.fstat(full.fileno()), os.stat(os.devnull))


def test_what_is_closed_is_filled(monkeypatch, tmp_path):
    for name in ('stdin', 'stdout', 'stderr'): monkeypatch.setattr(sys, name, None)
    assert cli.main(['gradcam', str(tmp_path/'no.pkl'), 'no.jpg'])==1
    for o in (sys.stdin, sys.stdout, sys.stderr): o.close()


@pytest.mark.parametrize('module', ['fastai_heatmaps', 'fastai_heatmaps.cli'])
def test_python_m(site, tmp_path, module):
    def run(*args): return subprocess.run([sys.executable, '-m', module, *args], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(site)}, capture_output=True, text=True)
    assert run('--version').stdout.startswith('fastai-heatmaps ') and run('--help').stdout.startswith('usage: fastai-heatmaps ')
    one(run('gradcam', 'a.pkl', 'no*.jpg'), 1, 'no images found')


def test_options_that_would_do_nothing(call, pets, pics, tmp_path):
    "They are reported, with exit code 2, before anything is done"
    args = pets[1]/'export.pkl', '--trust', pics
    for command in ('gradcam', 'grid'):
        one(call(command, *args, '--size', 64), 2, '--size goes with --arch')
        one(call(command, *args, '--column', 'image'), 2, "--column 'image' is a column of a CSV", 'leave --column out')
    assert not list(tmp_path.iterdir())
    (tmp_path/'folder.csv').mkdir()
    one(call('gradcam', *args[:2], 'folder.csv', '--column', 'image'), 2, 'a column of a CSV')
    res = call('gradcam', *args[:2], 'gone.csv', '--column', 'image')
    assert res.returncode==1 and "no file 'gone.csv'" in res.stderr


@pytest.mark.parametrize('data', [b'\x80\x02pug\nboxer', b'pug\0\nboxer', 'pug\nboxer'.encode('utf-16')])
def test_a_vocab_that_is_no_text(call, pics, tmp_path, data):
    (tmp_path/'classes.bin').write_bytes(data)
    (tmp_path/'a.pth').touch()
    one(call('gradcam', 'a.pth', pics, '--arch', 'resnet18', '--vocab', 'classes.bin'), 2, "--vocab 'classes.bin' is no text in UTF-8", 'a class on each line')


@pytest.fixture(scope='module')
def no_weights(tmp_path_factory):
    "Files that torch.load can read and that hold no weights"
    import tarfile, warnings
    d = tmp_path_factory.mktemp('other')
    torch.save({'a': torch.zeros(1)}, d/'w')
    with tarfile.open(d/'a.tar', 'w') as t, tarfile.open(d/'a.tgz', 'w:gz') as gz: t.add(d/'w'); gz.add(d/'w')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), d/'a.pt')
    return d


@pytest.mark.parametrize('name,words', [('a.tar', ('a tar archive', 'unpack it')), ('a.tgz', ('a tar archive', 'unpack it')), ('a.pt', ('a TorchScript model', 'none of its code was run'))])
def test_archives(no_weights, name, words):
    "The error says what the file is and what to do, without PyTorch's advice to run the code in it"
    for kwargs,do in ((dict(arch='resnet18', vocab='a,b'), 'torch.jit.load(file).state_dict()'), (dict(trust=True), 'learn.export()')):
        with pytest.raises(RuntimeError) as e: open_learner(no_weights/name, **kwargs)
        assert '\n' not in str(e.value) and 'weights_only' not in str(e.value) and all(w in str(e.value) for w in words), e.value
        if name=='a.pt': assert do in str(e.value), e.value

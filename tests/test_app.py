"The app: each request gets its own right answer, at the cost of the passes that it needs; the page stays at home; and a Space that is written runs."
import html, io, json, os, random, signal, socket, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen
from shared import *
from test_no_trace import state, same
from test_report import browser, contrast
from test_tasks import task_learner, task_dls, three_numbers, tags, mask
import fastai_heatmaps.cli.main as cli
from fastai_heatmaps.cli import space
from fastai_heatmaps.data.drawn import drawn_by

gr = pytest.importorskip('gradio')
from gradio_client import Client, handle_file

says = 'what the model says'


class Served:
    "The app of a Learner, served on the loopback address, and one who asks it"
    def __init__(self, learn, **kwargs):
        self.app = learn.heatmap_app(**kwargs)
        self.app.launch(server_name='127.0.0.1', prevent_thread_lock=True, quiet=True)
        self.url = self.app.local_url
        self.client = Client(self.url, verbose=False)
    def __call__(self, file, cls=says, method='gradcam', opacity=.7, client=None):
        "Probabilities or text, the picture or None, and the words below it"
        answer,pic,words = (client or self.client).predict(handle_file(str(file)), cls, method, opacity, api_name='/explain')
        answer = {o['label']:o['confidence'] for o in answer['confidences']} if answer.get('confidences') else answer.get('label')
        return answer,pic and np.array(Image.open(pic).convert('RGB')).astype(float),html.unescape(words)
    def close(self): self.app.close(verbose=False)


@pytest.fixture(scope='module')
def small(pics): return pic_learner(pics)


@pytest.fixture(scope='module')
def served(small):
    res = Served(small)
    yield res
    res.close()


@pytest.fixture(scope='module')
def files(pics): return get_image_files(pics).sorted()


def shrunk(pic, size=64): return np.array(Image.fromarray(pic.astype(np.uint8)).resize((size,size), Image.Resampling.BOX)).astype(float)


def overlays(hm, folder):
    "What `save` draws, an array for each image"
    hm.save(folder)
    return [np.array(Image.open(o).convert('RGB')).astype(float) for o in sorted(folder.glob('*-overlay.png'))]


# Answers

@pytest.mark.slow
def test_many_at_once(served, small, files, tmp_path):
    "24 requests by 6 people: each gets the probabilities and words of its own photo, and the picture that `save` draws of it, rather than that of any other question"
    hms = {(m,c): small.get_heatmaps(files, cls=c, method=m) for m in ('gradcam', 'layercam') for c in ('Red', 'Blue_ish')}
    pics = {(m,c,i): pic for (m,c),hm in hms.items() for i,pic in enumerate(overlays(hm, tmp_path/f'{m}{c}'))}
    rng = random.Random(0)
    asked = rng.choices(list(pics), k=24)
    clients = [Client(served.url, verbose=False) for _ in range(6)]
    def ask(k):
        m,c,i = asked[k]
        return served(files[i], c, m, client=clients[k%6])
    with ThreadPoolExecutor(6) as pool: got = list(pool.map(ask, range(24)))
    for (m,c,i),(answer,pic,words) in zip(asked, got):
        p = hms[m,c].preds[i]
        assert answer==pytest.approx(dict(zip(small.dls.vocab, p.tolist())), abs=1e-5)
        assert words.startswith(f'<strong>{c} {p[small.dls.vocab.o2i[c]]:.2f}</strong>')
        small_pic = shrunk(pic)
        far = {k: np.abs(small_pic-o).mean() for k,o in pics.items()}
        alike = [k for k,o in far.items() if o<far[m,c,i]+.1]
        assert all(np.abs(pics[k]-pics[m,c,i]).mean()<.5 for k in alike) and far[m,c,i]<12, (m, c, i, far)


@pytest.mark.slow
def test_costs(served, small, files, monkeypatch):
    "Another class of a photo costs a gradient, another opacity or a class again nothing, also where the map took many passes"
    from fastai_heatmaps.core import hooks
    n = Counter()
    hook = small.model[0].register_forward_hook(lambda *args: n.update(body=1))
    gradients = hooks.gradients
    monkeypatch.setattr(hooks, 'gradients', lambda *args, **kwargs: n.update(backward=1) or gradients(*args, **kwargs))
    def cost(*args):
        n.clear()
        served(new, *args)
        return n['body'],n['backward']
    new = files[0].with_name('new.png')
    Image.open(files[0]).resize((90,90)).save(new)
    try:
        for args,want in [(('Red',), (1,1)), (('Blue_ish',), (0,1)), (('Blue_ish','gradcam',.2), (0,0)), (('Red',), (0,0)), (('Red','layercam'), (0,0)), ((says,), (0,0)),
                          (('Red','saliency'), (1,1)), (('Red','saliency',.1), (0,0)), (('Red',), (0,0))]: assert cost(*args)==want, args
        assert cost('Red', 'occlusion')[0]>1 and cost('Red', 'occlusion', .1)==(0,0)
    finally:
        hook.remove()
        new.unlink()


@pytest.mark.slow
def test_opacity(served, files):
    "The picture with half the opacity lies half-way between the photo and the map"
    plain,half,full = [served(files[0], opacity=o)[1] for o in (0, .5, 1)]
    inside = np.abs(full-plain).max(2)>30
    assert plain.shape==(640,640,3) and inside.sum()>1000
    assert np.abs(half-(plain+full)/2)[inside].mean()<4 # WebP is not exact


@pytest.mark.slow
def test_photos_of_all_kinds(served, small, tmp_path):
    "Each is answered as by the package, upright; the file's own name, whatever it is, does no harm"
    rng = np.random.default_rng(0)
    im = Image.fromarray(rng.integers(0, 255, (80,100,3), dtype=np.uint8))
    clear,exif = im.convert('RGBA'),Image.Exif()
    clear.putalpha(Image.fromarray(rng.integers(0, 255, (80,100), dtype=np.uint8)))
    exif[0x0112] = 6
    kinds = {'clear.png': clear, 'grey.png': im.convert('L'), 'la.png': clear.convert('LA'), 'palette.png': im.convert('P'), 'one.png': im.convert('1'),
             'grey16.png': Image.fromarray(rng.integers(0, 65535, (80,100), dtype=np.uint16)), 'cmyk.jpg': im.convert('CMYK'), 'dot.png': im.resize((1,1)),
             'turned.jpg': im, 'huge.jpg': im.resize((2500,2000)), 'a.gif': im.convert('P'), 'a.webp': im, 'a.bmp': im, 'a.tiff': im,
             "<b>it's & ünï $x_1$.png": im}
    for name,pic in kinds.items():
        file = tmp_path/name
        pic.save(file, **(dict(exif=exif) if name=='turned.jpg' else {}))
        answer,pic,_ = served(file, opacity=0)
        want = small.get_heatmaps(open_image(file, upright=True))
        assert answer==pytest.approx(dict(zip(small.dls.vocab, want.preds[0].tolist())), abs=1e-5), name
        seen = 255*want.image(0).permute(1, 2, 0).numpy()
        assert np.abs(shrunk(pic)-seen).mean()<4, name # what the model saw
    lying = small.get_heatmaps(open_image(tmp_path/'turned.jpg')).preds[0,0]
    assert float(lying)!=pytest.approx(served(tmp_path/'turned.jpg')[0][small.dls.vocab[0]], abs=1e-5) # or it was not shown that it is turned


@pytest.mark.slow
def test_no_photo(served, small, pics, tmp_path):
    "One line, which names the file and no folder of the server; the next photo is answered"
    jpg = io.BytesIO()
    Image.new('RGB', (99,99)).save(jpg, 'jpeg')
    bad = {'text.png': b'no image', 'empty.png': b'', 'cut.jpg': jpg.getvalue()[:300], '<i>page.svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'zip.png': b'PK\x03\x04'}
    before = state(small.model, small)
    for name,data in bad.items():
        (tmp_path/name).write_bytes(data)
        answer,pic,words = served(tmp_path/name)
        assert pic is None and 'cannot be read as an image' in words and '\n' not in words and '/gradio/' not in words and '<i>' not in words.replace('<i>page', ''), words
    same(before, state(small.model, small))
    assert served(next(pics.iterdir()))[1] is not None


def test_wrong_questions(served, small, files):
    "One line each"
    for args,text in [(('Rad',), "'Red'"), ((says, 'legrad'), 'no attention'), ((says, 'cam'), 'only defined for a head')]:
        answer,pic,words = served(files[0], *args)
        assert pic is None and text in words and '\n' not in words
    for args in [(says, 'nope'), (says, 'gradcam', 7)]: # of which Gradio itself says so
        with pytest.raises(Exception): served(files[0], *args)


def test_reads_no_other_file(served, files):
    "Only what was put in is read, not any file of the server's"
    import httpx
    api = f'{served.url}gradio_api'
    def ask(path):
        photo = dict(path=path, meta={'_type': 'gradio.FileData'})
        event = httpx.post(f'{api}/call/explain', json=dict(data=[photo, says, 'gradcam', .7])).json()['event_id']
        return httpx.get(f'{api}/call/explain/{event}').text
    mine, = httpx.post(f'{api}/upload', files=dict(files=files[0].read_bytes())).json()
    assert 'event: complete' in ask(mine) and 'Bright' in ask(mine)
    said = ask(str(files[0]))
    assert 'event: error' in said and 'Bright' not in said


@pytest.mark.slow
def test_no_trace(served, small, files):
    small.model.train()
    try:
        before = state(small.model, small)
        for cls,method in [(says, 'gradcam'), ('Red', 'saliency'), ('Red', 'guided_backprop'), ('Blue_ish', 'eigencam'), ('Red', 'legrad')]:
            served(files[3], cls, method)
            same(before, state(small.model, small))
    finally: small.model.eval()


@pytest.mark.slow
def test_memory_is_bounded(small, files):
    "The passes of 8 photos and the gradients of 32 classes are kept; a photo that was forgotten is answered again"
    from fastai_heatmaps.views.app import _keeper
    from fastai_heatmaps.core.passes import Pass
    keep = _keeper(small, None)
    def alive():
        gc.collect()
        return sum(isinstance(o, Pass) for o in gc.get_objects())
    gc.unfreeze()
    before = alive()
    for f in files:
        for method in ('gradcam', 'saliency'): keep(str(f))[0].heatmaps(0, method)
    assert alive()-before==2*8
    want = small.get_heatmaps(files[0], cls=0)
    assert torch.equal(keep(str(files[0]))[0].heatmaps(0).maps, want.maps) and alive()-before<=2*8
    block = DataBlock((ImageBlock, CategoryBlock(vocab=[f'c{i}' for i in range(40)])), get_items=get_image_files, get_y=lambda o: 'c1', item_tfms=Resize(64))
    many = vision_learner(block.dataloaders(files[0].parent, bs=4, num_workers=0, device='cpu'), narrow18, pretrained=False, normalize=False)
    passes = _keeper(many, None)(str(files[0]))[0]
    for c in range(40): passes.heatmaps(c)
    assert len(passes.kept['layer'][1].grads)==32


# Tasks

@pytest.mark.slow
@pytest.mark.parametrize('block,get_y', [(MultiCategoryBlock, tags), (RegressionBlock(n_out=3), three_numbers), (MaskBlock(codes=['none', 'blue', 'red']), mask)])
def test_other_tasks(block, get_y, pics, files):
    if get_y is mask: learn = unet_learner(task_dls(pics, block, get_y=get_y), narrow18, pretrained=False, normalize=False)
    else: learn = task_learner(pics, block, get_y)
    hm = learn.get_heatmaps(files[1])
    name = hm.name(int(hm.cls[0,0]))
    s = Served(learn)
    try:
        answer,pic,words = s(files[1])
        last = len(hm.preds[0])-1
        by_name = s(files[1], hm.name(last))[2]
    finally: s.close()
    assert by_name.startswith(f'<strong>{learn.get_heatmaps(files[1], cls=last).title(0)[0][0]}<')
    assert pic is not None and words.startswith(f'<strong>{html.unescape(hm.title(0)[0][0])}</strong>')
    if get_y is three_numbers:
        assert answer==', '.join(f'{i}: {v:.3g}' for i,v in enumerate(hm.preds[0].tolist())) and 'evidence for a larger number' in words
        assert ('Red is where' in words)==bool((hm.maps<0).any())
    else:
        assert answer==pytest.approx({hm.name(c): float(p) for c,p in enumerate(hm.preds[0])}, abs=1e-5) and f'evidence for {name};' in words
    if get_y is tags:
        found = [hm.name(c) for c in range(len(hm.vocab)) if hm.preds[0,c]>.5]
        assert f"found, above 0.5: {', '.join(found) or 'none'}<br>" in words
    else: assert 'found' not in words


@pytest.mark.slow
def test_one_output_for_two_classes(pics, files):
    learn = pic_learner(pics, loss_func=BCEWithLogitsLossFlat())
    learn.model = create_vision_model(narrow18, 1, pretrained=False)
    s = Served(learn)
    try: answer,pic,words = s(files[0], 'Blue_ish')
    finally: s.close()
    hm = learn.get_heatmaps(files[0], cls='Blue_ish')
    assert answer==pytest.approx(dict(zip(learn.dls.vocab, hm.preds[0].tolist())), abs=1e-5) and words.startswith(f'<strong>{hm.title(0)[0][0]}<')


# What the page is

def parts(app, kind): return [o for o in app.blocks.values() if type(o) is kind]


def test_what_is_on_the_page(small, served, files):
    app = served.app
    assert app.title=='Heatmaps: narrow18' and not app.analytics_enabled and not app.share
    assert any('<h1>Heatmaps: narrow18</h1>' in (o.value or '') for o in parts(app, gr.HTML))
    cls,method = parts(app, gr.Dropdown)
    assert [v for _,v in cls.choices]==[says, *small.dls.vocab] and [v for _,v in method.choices]==list(heatmap_methods)
    examples, = parts(app, gr.Dataset)
    shown = [Image.open(o['path'] if isinstance(o, dict) else o) for o, in examples.samples]
    valid = [np.array(Image.open(f)) for f in small.dls.valid_ds.items]
    assert len(shown)==6 and all(any(np.array_equal(np.array(o), v) for v in valid) for o in shown)


@pytest.mark.slow
def test_choices_of_the_page(small, pics, files, tmp_path):
    app = small.heatmap_app(title='<b>Is it red?', examples=[files[0], Image.new('L', (3000,30))], method='layercam', alpha=.4)
    assert any('<h1>&lt;b&gt;Is it red?</h1>' in (o.value or '') for o in parts(app, gr.HTML))
    assert parts(app, gr.Dropdown)[1].value=='layercam' and parts(app, gr.Slider)[0].value==.4
    assert [Image.open(o['path']).size for o, in parts(app, gr.Dataset)[0].samples]==[Image.open(files[0]).size, (1024,10)]
    alone, = parts(small.heatmap_app(examples=files[0]), gr.Dataset)[0].samples # not letter by letter
    assert Image.open(alone[0]['path']).size==Image.open(files[0]).size
    small.export(tmp_path/'e.pkl')
    exported = load_learner(tmp_path/'e.pkl')
    assert not parts(exported.heatmap_app(), gr.Dataset)


def test_what_cannot_be_served(small, pics, monkeypatch):
    for kwargs,says in [(dict(method='nope'), 'no method'), (dict(layer='nope'), 'nope'), (dict(layer=['0','1']), 'expected one layer, not 2'),
                        (dict(alpha=2), 'alpha is 2; expected 0 to 1'), (dict(alpha='x'), "alpha is 'x'"), (dict(examples=3), 'int input cannot be read'),
                        (dict(method=lambda acts: acts.mean(1)), 'by name: enter yours with heatmap_method')]:
        with pytest.raises(ValueError, match=says): small.heatmap_app(**kwargs)
    df = pd.DataFrame(dict(a=[1.,2.,3.,4.], y=[0.,1.,0.,1.]))
    from fastai.tabular.all import TabularDataLoaders, tabular_learner
    table = tabular_learner(TabularDataLoaders.from_df(df, cont_names=['a'], y_names='y', bs=2, device='cpu'))
    with pytest.raises(ValueError, match='image models'): table.heatmap_app()
    pair = DataBlock((ImageBlock, ImageBlock, CategoryBlock), n_inp=2, get_items=get_image_files, getters=[noop, noop, label], item_tfms=Resize(64))
    two = Learner(pair.dataloaders(pics, bs=2, num_workers=0, device='cpu'), nn.Identity(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='one photo'): two.heatmap_app()
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ImportError, match=r'^heatmap_app needs gradio: pip install "fastai_heatmaps\[app\]"$'): small.heatmap_app()


# In a browser

def said(text): return f"document.body.innerText.includes({json.dumps(text)})"
heat = "document.querySelector('.heat img')"

def choose(browser, name, text):
    "Open a menu and take the first choice with this text"
    browser.click(f'input[aria-label="{name}"]')
    option = f"[...document.querySelectorAll('[role=option]')].find(o => o.innerText.includes({json.dumps(text)}))"
    browser.wait(option)
    browser.js(f"{option}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")


def errors(browser): return [o for o in browser.errors if '"type": "warning"' not in o] # Gradio warns itself of its translations
def elsewhere(browser, url): return [o for o in browser.requests if not o.startswith((url, 'blob:'))]


@pytest.mark.slow
@pytest.mark.parametrize('width,dark', [(1280,False), (400,True)])
def test_in_browser(browser, served, small, files, tmp_path, width, dark):
    "A photo, another class, another method, another opacity, no photo: what is said, and what the picture is; no error, no request elsewhere, nothing sticks out"
    hm = small.get_heatmaps(files[2], cls=[0,1])
    best,other = hm.preds[0].argsort(descending=True).tolist()
    def title(c): return hm.title(0, c)[0][0]
    browser.open(served.url, width=width, dark=dark)
    browser.wait("document.querySelector('input[type=file]')")
    browser.put('input[type=file]', files[2])
    browser.wait(said(title(best)))
    browser.wait(f"{heat}?.naturalWidth==640")
    seen = [browser.js(f'{heat}.src')]
    def changed():
        browser.wait(f"{heat} && {heat}.complete && !{json.dumps(seen)}.includes({heat}.src)")
        seen.append(browser.js(f'{heat}.src'))
    choose(browser, 'class', hm.name(other))
    browser.wait(said(title(other)))
    changed()
    choose(browser, 'method, and what it costs', 'layercam')
    changed()
    browser.js("document.querySelector('input[type=range]').focus()")
    browser.key('ArrowLeft')
    changed()
    (tmp_path/'no.png').write_text('no image')
    assert browser.js('document.documentElement.scrollWidth')==width
    ours = [(r,t) for r,t in browser.js(contrast) if t.startswith(('Bright', 'What does', 'Heatmaps', title(other)))]
    assert len(ours)==4 and min(ours)[0]>=4.5, ours
    assert (sum(map(int, re.findall(r'\d+', browser.js("getComputedStyle(document.body).backgroundColor"))[:3]))<150)==dark
    names = [o['name']['value'] for o in browser('Accessibility.getFullAXTree')['nodes'] if not o.get('ignored') and o['role']['value']=='image']
    assert {'The photo', 'The heatmap'} <= {*names}
    browser.click('button[aria-label="Remove Image"]')
    browser.wait(f"!{heat} && !{said('Bright')}")
    browser.put('input[type=file]', tmp_path/'no.png')
    browser.wait(said("'no.png' cannot be read as an image"))
    assert errors(browser)==[] and elsewhere(browser, served.url)==[] and len(browser.requests)>20


@pytest.mark.slow
def test_examples_in_browser(browser, served, small):
    "A click on a photo of the validation set explains it"
    browser.open(served.url)
    browser.wait("document.querySelector('.gallery-item')")
    browser.click('.gallery-item')
    browser.wait(f"{heat}?.naturalWidth==640")
    titles = {small.get_heatmaps().title(i)[0][0].split('\xa0')[0] for i in range(6)}
    assert any(browser.js(said(o)) for o in titles)


# The command line

watching = """import sys, runpy, ipaddress
def hook(event, args):
    if event=='socket.connect': to = args[1][0] if isinstance(args[1], tuple) else ''
    elif event=='socket.getaddrinfo': to = args[0] or ''
    else: return
    to = to.decode() if isinstance(to, bytes) else to
    if to not in ('', 'localhost', '127.0.0.1', '0.0.0.0', '::1'): print('asked', to, file=sys.stderr, flush=True)
sys.addaudithook(hook)
sys.argv = sys.argv[1:]
"""

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def process(code, *args, cwd, port):
    "A process of its own that serves an app at `port`; it ends by Ctrl-C, and has asked nobody on the net"
    env = {**os.environ, 'GRADIO_SERVER_PORT': str(port), 'GRADIO_SHARE': 'true', 'GRADIO_ANALYTICS_ENABLED': 'True', 'PYTHONPATH': str(Path(__file__).parents[1])}
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', watching+code, *map(str, args)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            if p.poll() is not None: break
            try: urlopen(f'http://127.0.0.1:{port}/config', timeout=1); break
            except OSError: time.sleep(.1)
        yield p
        p.send_signal(signal.SIGINT)
        out,err = p.communicate(timeout=20)
        p.said = out,err
        assert 'asked' not in err, err
    finally:
        if p.poll() is None: p.kill()


@pytest.mark.slow
def test_command_app(small, files, tmp_path):
    small.export(tmp_path/'pets.pkl')
    port = free_port()
    with process('from fastai_heatmaps.cli.main import main\nsys.exit(main(sys.argv))', 'app', 'pets.pkl', '--trust', '--cpu', '--port', port, cwd=tmp_path, port=port) as p:
        answer,pic,words = Client(f'http://127.0.0.1:{port}/', verbose=False).predict(handle_file(str(files[0])), 'Red', 'gradcam', .7, api_name='/explain')
        with socket.socket() as s: assert s.connect_ex(('127.0.0.2', port)) # which an app that serves all addresses would answer
    assert (p.returncode, *p.said)==(0, f'http://127.0.0.1:{port}/ explains photos by pets.pkl; Ctrl-C ends it\n', '')
    assert words.startswith(f"<strong>{small.get_heatmaps(files[0], cls='Red').title(0)[0][0]}<")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    def _call(*args):
        capsys.readouterr()
        return cli.main([*map(str, args)]),*capsys.readouterr()
    return _call


def test_no_such_port(capsys):
    "Said before the model is opened"
    for port,says in (99999, 'expected a number up to 65535, not 99999'), (0, 'at least 1'), ('x', "at least 1, not 'x'"):
        with pytest.raises(SystemExit) as e: cli.main(['app', 'nope.pkl', '--port', str(port)])
        assert e.value.code==2 and says in capsys.readouterr().err


@pytest.mark.slow
def test_command_space(small, files, call, tmp_path):
    "What is written is small and whole, and app.py answers as the Learner does, wherever it is started"
    small.export(tmp_path/'pets.pkl')
    rc,out,err = call('space', 'pets.pkl', '--trust', '--out', 'my-space')
    folder = tmp_path/'my-space'
    assert rc==0 and out=='my-space: push this folder to a Space\n' and {f.name for f in folder.iterdir()}=={'app.py', 'requirements.txt', 'README.md', '.gitattributes', 'export.pkl'}
    assert (folder/'export.pkl').read_bytes()==(tmp_path/'pets.pkl').read_bytes() and 'export.pkl filter=lfs' in (folder/'.gitattributes').read_text()
    assert len((folder/'app.py').read_text().splitlines())<=14
    first,head,body = (folder/'README.md').read_text().split('---\n', 2)
    import yaml
    assert first=='' and yaml.safe_load(head)==dict(title='my-space', sdk='gradio', sdk_version=gr.__version__, app_file='app.py', python_version='.'.join(map(str, sys.version_info[:2])))
    named = dict(o.split('==') for o in (folder/'requirements.txt').read_text().splitlines()[1:])
    import fastai
    assert named['fastai']==fastai.__version__ and named['torch']==torch.__version__.split('+')[0] and 'fastai_heatmaps[app]' in named and {'torchvision', 'fastcore'} <= {*named}
    port = free_port()
    with process("runpy.run_path(sys.argv[0], run_name='__main__')", folder/'app.py', cwd=tmp_path.parent, port=port) as p:
        client = Client(f'http://127.0.0.1:{port}/', verbose=False)
        for i in (0,5):
            answer,pic,words = client.predict(handle_file(str(files[i])), says, 'gradcam', .7, api_name='/explain')
            hm = small.get_heatmaps(files[i])
            assert {o['label']:o['confidence'] for o in answer['confidences']}==pytest.approx(dict(zip(small.dls.vocab, hm.preds[0].tolist())), abs=1e-5)
            assert words.startswith(f'<strong>{hm.title(0)[0][0]}<') and Image.open(pic).size==(640,640)


@pytest.mark.slow
def test_a_space_is_overwritten_only_if_it_is_ours(small, call, tmp_path):
    small.export(tmp_path/'a.pkl')
    def texts(): return {f.name: f.read_bytes() for f in (tmp_path/'s').iterdir()}
    assert call('space', 'a.pkl', '--trust', '--out', 's', '--quiet')[:2]==(0,'')
    before = texts()
    rc,_,err = call('space', 'a.pkl', '--trust', '--out', 's')
    assert rc==1 and 'add --overwrite' in err and texts()==before
    (tmp_path/'a.pkl').write_bytes((tmp_path/'a.pkl').read_bytes()+b'\0') # exported anew
    assert call('space', 'a.pkl', '--trust', '--out', 's', '--overwrite')[0]==0 and texts()['export.pkl']==(tmp_path/'a.pkl').read_bytes()!=before['export.pkl']
    before = texts()
    (tmp_path/'s'/'requirements.txt').write_text('torch\n')
    rc,_,err = call('space', 'a.pkl', '--trust', '--out', 's', '--overwrite')
    assert rc==1 and 'requirements.txt' in err and 'left as it is' in err and texts()=={**before, 'requirements.txt': b'torch\n'}
    for o in ('app.py', 'requirements.txt'): (tmp_path/'s'/o).unlink()
    rc,_,err = call('space', 'a.pkl', '--trust', '--out', 's', '--overwrite')
    assert rc==1 and 'export.pkl' in err and 'left as it is' in err # since nothing says that this model is a copy
    (tmp_path/'export.pkl').write_bytes(before['export.pkl'])
    assert call('space', 'export.pkl', '--trust', '--out', '.')[0]==0 and (tmp_path/'export.pkl').read_bytes()==before['export.pkl'] # which lies there already


def test_space_in_one_line(call, tmp_path):
    (tmp_path/'a.pkl').write_text('no pickle')
    (tmp_path/'file').touch()
    for args,rc,text in [(('a.pkl',), 2, 'add --trust'), (('no.pkl', '--trust'), 1, "no file 'no.pkl'"), (('a.pkl', '--trust'), 1, 'cannot be loaded'), (('a.pkl', '--trust', '--out', 'file'), 1, 'expected a folder')]:
        got,out,err = call('space', *args)
        assert got==rc and text in err and err.count('\n')==1 and out=='', err
    assert {f.name for f in tmp_path.iterdir()}=={'a.pkl', 'file'}


def test_where_the_package_came_from(monkeypatch):
    "From an index, from git, from a folder, or never installed"
    class Dist:
        version = '9.8'
        def __init__(self, **kwargs): self.url = kwargs
        def read_text(self, name): return json.dumps(self.url) if name=='direct_url.json' and self.url else None
    def own(dist):
        monkeypatch.setattr(space, 'distribution', lambda name: dist)
        return space.own_requirement()
    assert own(Dist())==('fastai_heatmaps[app]==9.8', None)
    assert own(Dist(url='https://x.org/y', vcs_info=dict(vcs='git', commit_id='abc')))==('fastai_heatmaps[app] @ git+https://x.org/y@abc', None)
    assert own(Dist(url='file:///here', dir_info={'editable': True}))==('fastai_heatmaps[app]==9.8', 'file:///here')
    def never(name): raise space.PackageNotFoundError
    monkeypatch.setattr(space, 'distribution', never)
    assert space.own_requirement()[1]

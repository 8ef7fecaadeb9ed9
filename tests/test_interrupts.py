"""Ctrl-C at any line of Python that a call runs leaves no trace.

`interrupted` raises KeyboardInterrupt at one line. By default a sample of the lines is tried, chosen by a seed; all of them by `python -m pytest tests/test_interrupts.py --all-lines`."""
import contextlib, functools, sys, threading, pytest
from shared import *
from test_no_trace import state, same, net_for, learner_for, prepare
from fastai_heatmaps.core import no_trace as nt
from torch.nn.modules import module as torch_module

site = Path(torch.__file__).parent.parent
tried = [str(Path(nt.__file__).parent.parent), contextlib.__file__, *(str(site/o) for o in (
    'torch/autograd/grad_mode.py', 'torch/overrides.py', 'torch/utils/_contextlib.py', 'torch/utils/hooks.py', 'torch/_dynamo/eval_frame.py',
    'torch/amp/autocast_mode.py', 'torch/_vmap_internals.py', 'torch/autograd/__init__.py', 'torch/autograd/graph.py', 'fastai/callback/hook.py', 'fastai/torch_core.py', 'fastai/vision/core.py', 'matplotlib/pyplot.py', 'matplotlib/_pylab_helpers.py'))]
is_tried = functools.lru_cache(None)(lambda file: file.startswith(tuple(tried)))


def interrupted(f, at):
    "Call `f` and interrupt it at the line event `at`; return how many there were until then"
    n,me = 0,threading.get_ident()
    def line(frame, event, arg):
        nonlocal n
        if event=='line':
            n += 1
            if n==at: raise KeyboardInterrupt
        return line
    def call(frame, event, arg): return line if is_tried(frame.f_code.co_filename) else None
    old = sys.gettrace()
    sys.settrace(call)
    try: f()
    except KeyboardInterrupt: pass
    finally: sys.settrace(old)
    return n


def whole_state(model, learn=None):
    "The state of the model, the Learner, the thread and the process"
    depth = [(up(), down())[1] for up,down in nt._nestings]
    dynamo = sys.modules.get('torch._dynamo.eval_frame')
    return dict(state(model, learn), figures=plt.get_fignums(), depth=depth, modes_on=torch.overrides._get_current_function_mode_stack(), hooks_on_all=dict(torch_module._global_forward_hooks),
                stance=dynamo and dynamo._stance, ours=(dict(nt._in_eval), list(nt._eager), getattr(nt._local, 'undo', None)),
                python=random.getstate(), numpy=[o.tolist() if isinstance(o, np.ndarray) else o for o in np.random.get_state()], torch=torch.get_rng_state().tolist())


def try_lines(call, model, learn=None, n=None, seed=0):
    "Interrupt `call` at `n` of its lines, or at all if None; return the lines after which something was left"
    for _ in range(2): call() # the first calls fill caches, and run more lines
    total,before,left = interrupted(call, 0),whole_state(model, learn),[]
    if plt.get_fignums():
        plt.close('all')
        before = whole_state(model, learn)
    at = range(1, total+1) if n is None else sorted(random.Random(seed).sample(range(1, total+1), min(n, total)))
    for i in at:
        interrupted(call, i)
        try: same(before, whole_state(model, learn))
        except AssertionError as e:
            left.append((i, str(e).split('\n')[0]))
            before = whole_state(model, learn)
    return left,total


@pytest.fixture
def n_lines(request): return lambda n: None if request.config.getoption('--all-lines') else n


@pytest.mark.slow
@pytest.mark.parametrize('mode', [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize('method', list(heatmap_methods))
def test_model_heatmaps(method, mode, n_lines):
    model,x = prepare(net_for(method), 'mixed'),torch.rand(1, 3, 64, 64)
    def call():
        with mode(): model_heatmaps(model, x, cls=[0,2], method=method, **quick.get(method, {}))
    left,total = try_lines(call, model, n=n_lines(6), seed=method)
    assert not left and total>150


@pytest.mark.slow
@pytest.mark.parametrize('k', [2, 20])
def test_gradients_of_many_classes(k, n_lines):
    "Several at once, and cell by cell"
    set_seed(0)
    model,x = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)), create_head(4, 20)),torch.rand(1, 3, 7, 7)
    left,total = try_lines(lambda: model_heatmaps(prepare(model, 'mixed'), x, cls=list(range(k))), model, n=n_lines(60))
    assert not left and total>200


@pytest.mark.slow
def test_while_compiled_parts_run_as_written(n_lines):
    import torch._dynamo.eval_frame
    model,x = prepare(net_for('gradcam'), 'mixed'),torch.rand(1, 3, 64, 64)
    left,_ = try_lines(lambda: model_heatmaps(model, x, cls=[0,2]), model, n=n_lines(30))
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize('method,layer', [('gradcam', None), ('activations', None), ('saliency', None), ('layercam', ['0.5', '0.7'])])
def test_get_heatmaps(pics, method, layer, n_lines):
    learn = pic_learner(pics, cbs=MixedPrecision(amp_mode='bf16'))
    prepare(learn.model, 'mixed')
    files = get_image_files(pics)[:2]
    left,total = try_lines(lambda: learn.get_heatmaps(files, cls=[0,1], method=method, layer=layer), learn.model, learn, n=n_lines(25))
    assert not left and total>1000


@pytest.mark.slow
def test_show_gradcam(learn, pics, n_lines):
    f = get_image_files(pics)[0]
    left,total = try_lines(lambda: learn.show_gradcam(f, cls=[0,1]), learn.model, learn, n=n_lines(25))
    assert not left and total>1000

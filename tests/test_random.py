"The process's random numbers: nothing of ours draws them, and nothing rewinds what another thread draws."
import threading, time, pytest
from shared import *


class Beside(Callback):
    "Start a thread, and wait after each epoch until it has made another of its `calls`"
    def __init__(self, thread, calls): self.thread,self.calls = thread,calls
    def before_fit(self): self.thread.start()
    def after_epoch(self):
        n = len(self.calls)
        while len(self.calls)==n and self.thread.is_alive(): time.sleep(.01)


def train(pics, *cbs):
    learn = pic_learner(pics, batch_tfms=aug_transforms())
    set_seed(3)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-3, cbs=[MixUp(), *cbs])
    return [p.detach().clone() for p in learn.model.parameters()]


@pytest.mark.slow
def test_a_training_beside_a_thread_that_explains(pics):
    "It takes the same course as alone"
    other,files = pic_learner(pics),get_image_files(pics)
    want,calls,done = train(pics),[],threading.Event()
    def explain():
        while not done.is_set():
            other.get_heatmaps(files[:3], cls=[0,1])
            other.get_heatmaps().image(0)
            model_heatmaps(other.model, torch.zeros(1, 3, 64, 64))
            calls.append(1)
    thread = threading.Thread(target=explain)
    try: got = train(pics, Beside(thread, calls))
    finally:
        done.set()
        thread.join()
    assert len(calls)>=3
    for a,b in zip(want, got): assert torch.equal(a, b)


class Draws(nn.Module):
    "Draws, also in eval mode"
    def forward(self, x): return F.dropout(x, .5, training=True)*random.random()*np.random.rand()

class DrawingTransform(RandTransform):
    order = 100
    def encodes(self, x:TensorImage): return x*(random.random()+np.random.rand()+float(torch.rand(1)))


@pytest.mark.parametrize('how', ['model', 'transform'])
def test_what_the_model_and_the_transforms_draw(pics, how):
    learn = pic_learner(pics)
    if how=='model': learn.model = nn.Sequential(learn.model[0], nn.Sequential(Draws(), *learn.model[1]))
    else: learn.dls.valid.after_batch.add(DrawingTransform(split_idx=1))
    f = get_image_files(pics)[0]
    def numbers(): return random.random(),np.random.rand(),torch.rand(2).tolist()
    set_seed(1)
    want = numbers()
    for call in (lambda: learn.get_heatmaps(), lambda: learn.show_gradcam(f), lambda: model_heatmaps(learn.model, torch.zeros(1, 3, 64, 64)),
                 lambda: layer_shapes(learn.model, torch.zeros(1, 3, 64, 64)), lambda: learn.get_heatmaps(f).image(0)):
        set_seed(1)
        call()
        assert numbers()==want


def test_nothing_of_ours_draws(learn, pics, monkeypatch):
    "So that there is nothing to put back"
    from fastai_heatmaps.core import no_trace
    monkeypatch.setattr(no_trace, 'random_numbers', lambda: noop)
    f = get_image_files(pics)[0]
    set_seed(1)
    want = random.random(),np.random.rand(),torch.rand(2).tolist()
    for call in (lambda: learn.get_heatmaps(), lambda: learn.get_heatmaps([f]*9, method='occlusion', **quick['occlusion']), lambda: learn.show_gradcam(f),
                 lambda: learn.plot_heatmap_grid(n=3), lambda: learn.get_heatmaps(ds_idx=0)[[1,3]].show(on='original'), lambda: learn.show_feature_maps(f)):
        set_seed(1)
        call()
        assert (random.random(),np.random.rand(),torch.rand(2).tolist())==want


@pytest.mark.parametrize('module,back', [('wandb.sdk.lib.asyncio_manager', True), ('huggingface_hub.utils._telemetry', True), ('a_training_of_mine', False)])
def test_threads_that_only_log_do_not_count(pics, module, back):
    "Beside them what a model draws is put back; beside a thread that may draw itself it is not"
    learn,done = pic_learner(pics),threading.Event()
    learn.model = nn.Sequential(learn.model[0], nn.Sequential(Draws(), *learn.model[1]))
    def wait(): done.wait()
    wait.__module__ = module
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        set_seed(1)
        want = torch.rand(2).tolist()
        set_seed(1)
        learn.show_gradcam(get_image_files(pics)[0])
        assert (torch.rand(2).tolist()==want)==back
    finally:
        done.set()
        thread.join()

"Callbacks, and what the model keeps: a heatmap changes none of it, whatever they do and wherever it is asked for."
import pickle, threading
from collections import deque, defaultdict
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace
from fastai.callback.channelslast import ChannelsLast
from fastai_heatmaps.core.no_trace import map_graphs
from shared import *


class Box:
    "An object of the user's own, with all that it may hold"
    def __init__(self):
        self.t,self.nested,self.queue = torch.zeros(3),{'a': [[1], {'b': np.zeros(2)}], 't': (torch.ones(2),)},deque([[0]])
        self.counts,self.rng,self.me = defaultdict(list),np.random.default_rng(0),self
    def use(self):
        self.t.add_(1)
        self.nested['a'][0].append(2)
        self.nested['a'][1]['b'] += 1
        self.nested['t'][0].mul_(2)
        self.queue[0].append(1)
        self.counts['x'].append(self.rng.random())

class Slots:
    __slots__ = ('n',)
    def __init__(self): self.n = [0]

class Wrap:
    "Passes on what it is asked for: endlessly, if it is asked before it is ready"
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, k): return getattr(self.inner, k)

class Nasty(Callback):
    "Changes everything that it holds, at any depth"
    of_class = [[0]]
    def __init__(self, path):
        self.box,self.slots,self.wrap,self.tensor,self.array = Box(),Slots(),Wrap(Box()),torch.zeros(4),np.zeros(3)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.file,self.lock,self.steps,self.frame = open(path),threading.Lock(),iter([1,2,3,4,5,6,7,8,9]),pd.DataFrame({'a': [0.]})
        self.graph = [torch.ones(2, requires_grad=True)*2]
        self.func,self.dict = self.box.use,{'file': self.file, 'log': [[]]}
    def before_batch(self):
        self.box.use(); self.func(); self.wrap.inner.use()
        self.slots.n.append(1)
        self.tensor += self.xb[0].mean()
        self.array[0] += 1
        self.of_class[0].append(1)
        self.dict['log'][0].append(self.file.name)
        self.box.last = self.xb
    def after_pred(self):
        next(self.steps)
        self.net.train()(torch.rand(2, 3))
        for p in self.net.parameters(): p.data.add_(1)
        self.frame.loc[0,'a'] += 1
        self.learn.other.feats['a'].append(self.pred)
    def after_loss(self): self.graph.append(self.learn.pred)

class Other(Callback):
    def __init__(self): self.feats = {'a': []}

def deep(o, seen=None):
    "Give what `o` holds, at any depth, in a form that can be compared"
    seen = {} if seen is None else seen
    if isinstance(o, Tensor): return ('tensor', o.detach().clone().tolist(), o.stride(), o.data_ptr(), o.requires_grad, type(o).__name__)
    if isinstance(o, np.ndarray): return ('array', o.tolist(), id(o))
    if isinstance(o, (bool, int, float, str, bytes, type(None))): return o
    if isinstance(o, (Learner, DataLoaders, threading.Thread)): return id(o)
    if id(o) in seen: return ('seen', seen[id(o)])
    seen[id(o)] = len(seen)
    if isinstance(o, dict): return {repr(k):deep(v, seen) for k,v in o.items()}
    if isinstance(o, (list, tuple, deque)): return [type(o).__name__]+[deep(v, seen) for v in o]
    if isinstance(o, np.random.Generator): return repr(o.bit_generator.state)
    if isinstance(o, pd.DataFrame): return o.to_dict()
    if type(o).__name__=='list_iterator': return o.__length_hint__()
    slots = [getattr(o, k) for k in getattr(type(o), '__slots__', ()) if k=='n']
    return [id(o), deep(slots, seen), deep(getattr(o, '__dict__', None), seen)] if not isinstance(o, type) else id(o)

def deep_state(learn): return [deep((cb, vars(cb), {k:v for k,v in vars(type(cb)).items() if k=='of_class'})) for cb in learn.cbs]

class Stop(Callback):
    order = 5
    def __init__(self, what): self.what = what
    def after_pred(self):
        if self.what: raise self.what('bang')

@pytest.mark.parametrize('what', [None, ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.inference_mode])
def test_callbacks_keep_their_state(learn, tmp_path, what, mode):
    (tmp_path/'log').write_text('x')
    learn.add_cbs([Nasty(tmp_path/'log'), Other(), Stop(what)])
    before,frozen = deep_state(learn),pickle.dumps(learn.nasty.net)
    with mode(), nullcontext() if what is None else pytest.raises(what): learn.get_heatmaps()
    assert deep_state(learn)==before and pickle.dumps(learn.nasty.net)==frozen
    assert learn.nasty.learn is learn and learn.nasty.func.__self__ is learn.nasty.box
    learn.nasty.file.close()

def test_callbacks_share_what_they_share(learn):
    "Two that know one another, or share a store, do so as copies too"
    store,seen = {'n': [0]},[]
    class Writes(Callback):
        def before_batch(self): store_of(self)['n'].append(1)
    class Reads(Callback):
        def after_pred(self): seen.append((len(self.mine.s['n']), self.writer is self.learn.writes, self.writer.s is self.mine.s, self.net is self.learn.model[0]))
    def store_of(cb): return cb.mine.s
    writes,reads = Writes(),Reads()
    mine = SimpleNamespace(s=store)
    writes.mine = reads.mine = mine
    writes.s,reads.writer,reads.net = store,writes,learn.model[0]
    learn.add_cbs([writes, reads])
    learn.get_heatmaps()
    assert seen==[(2, True, True, True), (3, True, True, True)] and store=={'n': [0]}

def test_large_state_costs_nothing_where_it_is_not_asked(learn):
    "The average of all weights, held by a callback that acts only in training"
    asked = []
    class Average(Callback):
        def __init__(self, model): self.net,self.weights = deepcopy(model),[p.detach().clone() for p in model.parameters()]
        def after_step(self): pass
    class Look(Callback):
        def before_batch(self): asked.append((self.learn.average.net is net, self.learn.average.weights[0] is weights[0]))
    learn.add_cbs([Average(learn.model), Look()])
    net,weights = learn.average.net,learn.average.weights
    learn.get_heatmaps()
    assert asked==[(True, True)]*2

def test_bound_functions_belong_to_the_copy(learn):
    "`Callback(before_batch=f)` binds f to the callback"
    def count(self): self.n[0].append(1)
    cb = Callback(before_batch=count)
    cb.n = [[]]
    learn.add_cb(cb)
    learn.get_heatmaps()
    assert cb.n==[[]]


def layout(model): return [(t.stride(), t.data_ptr(), t.device) for t in (*model.parameters(), *model.buffers())]

@pytest.mark.parametrize('fitted', [False, True])
def test_channels_last(learn, fitted):
    "A fit changes the layout of weights, a heatmap does not; preds are those of get_preds"
    learn.add_cb(ChannelsLast())
    if fitted:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    before = layout(learn.model)
    hm = learn.get_heatmaps()
    learn.show_gradcam(learn.dls.valid_ds.items[0])
    assert layout(learn.model)==before
    assert learn.model[0][0].weight.stride()==((147,1,21,3) if fitted else (147,49,7,1))
    with learn.no_bar(): preds = learn.get_preds()[0].as_subclass(Tensor) # which does lay them out
    torch.testing.assert_close(hm.preds, preds, rtol=0 if fitted else 1e-5, atol=0 if fitted else 1e-6)


events = [e for e in vars(event) if e.startswith(('before_', 'after_')) and e!='after_create']

class ShowsAlways(Callback):
    "Asks for heatmaps in each event that it hears of"
    def __init__(self, img, only=None): self.img,self.only,self.seen = img,only,defaultdict(list)
for e in events:
    def act(self, e=e):
        if self.only and e not in self.only: return
        if not self.seen[e]: self.seen[e].append(self.learn.get_heatmaps(self.img).maps)
    setattr(ShowsAlways, e, act)

class ShowsToo(ShowsAlways): order = 101

def trained(pics, cbs=(), act=None, **kwargs):
    learn = pic_learner(pics, batch_tfms=aug_transforms(), **kwargs)
    set_seed(3)
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cbs): (act or (lambda l: l.fit(1, 1e-3)))(learn)
    return learn,[p.detach().clone() for p in (*learn.model.parameters(), *learn.model.buffers())],(torch.rand(2),np.random.rand(),random.random())

def same_course(a, b):
    assert all(map(torch.equal, a[1], b[1])) and torch.equal(a[2][0], b[2][0]) and a[2][1:]==b[2][1:]
    assert [list(o) for o in a[0].recorder.values]==[list(o) for o in b[0].recorder.values]

@pytest.mark.slow
def test_heatmaps_from_every_event_of_a_training(pics):
    img = get_image_files(pics)[0]
    plain,looks = trained(pics),[ShowsAlways(img)]
    looked = trained(pics, looks)
    missing = {'after_cancel_'+o for o in ('backward', 'step', 'batch', 'train', 'validate', 'epoch', 'fit')}
    assert set(events)-set(looks[0].seen)==missing
    same_course(plain, looked)
    torch.testing.assert_close(looks[0].seen['after_fit'][0], looked[0].get_heatmaps(img).maps) # nothing has changed since

@pytest.mark.parametrize('act', ['validate', pytest.param('get_preds', marks=pytest.mark.slow)])
def test_heatmaps_from_every_event_without_training(learn, pics, act):
    img = get_image_files(pics)[0]
    want,out = learn.get_heatmaps(img).maps,getattr(learn, act)()
    looks = [ShowsAlways(img), ShowsToo(img, ['after_pred', 'after_batch', 'before_validate'])]
    with learn.added_cbs(looks): got = getattr(learn, act)()
    assert str(out)==str(got)
    for o in looks:
        assert set(o.seen)>=set(o.only or ['before_batch', 'after_pred', 'after_loss', 'after_batch', 'before_validate'])
        for maps in sum(o.seen.values(), []): assert torch.equal(maps, want)

def test_two_callbacks_that_show_heatmaps(learn, pics):
    "Even if they know the Learner from elsewhere, and the heatmap is asked for from outside"
    img,calls = get_image_files(pics)[0],[]
    want = learn.get_heatmaps(img).maps
    class A(Callback):
        def after_pred(self): calls.append(learn.get_heatmaps(img).maps)
    class B(Callback):
        def before_batch(self): calls.append(self.learn.get_heatmaps(img).maps)
    learn.add_cbs([A(), B()])
    assert torch.equal(learn.get_heatmaps(img).maps, want) and len(calls)==4 # A, B, A in B and B in A
    for maps in calls: assert torch.equal(maps, want)

def test_callbacks_of_other_threads_are_not_left_out(pics):
    "While one thread's callback waits, another thread's run has it take part"
    learns,img = [pic_learner(pics),pic_learner(pics)],get_image_files(pics)[0]
    class Flip(Callback):
        def after_pred(self): self.learn.pred = self.pred.flip(1)
    class Wait(Callback):
        def before_batch(self):
            if threading.current_thread() is not other: return
            inside.set(); go.wait(20)
    inside,go,other = threading.Event(),threading.Event(),None
    plain = learns[0].get_heatmaps(img).preds
    for o in learns: o.add_cb(Flip())
    learns[1].add_cb(Wait())
    other = threading.Thread(target=learns[1].get_heatmaps, args=(img,))
    other.start()
    assert inside.wait(20)
    try:
        for o in learns: torch.testing.assert_close(o.get_heatmaps(img).preds, plain.flip(1))
    finally: go.set(); other.join()


def test_terminate_on_nan(learn):
    "It ends trainings, and there is none here; the loss may well be NaN"
    want = learn.get_heatmaps(relu=False)
    learn.add_cb(TerminateOnNaNCallback())
    learn.loss_func = lambda pred, *y: pred.sum()*float('nan')
    assert torch.equal(learn.get_heatmaps(relu=False).maps, want.maps)

@pytest.mark.parametrize('event_name', ['before_batch', 'after_pred', 'after_loss'])
@pytest.mark.parametrize('ex', [CancelBatchException, CancelValidException, CancelFitException, CancelEpochException, CancelTrainException, CancelStepException, CancelBackwardException])
def test_callbacks_that_cancel(learn, event_name, ex):
    def give_up(self): raise ex
    class GivesUp(Callback): pass
    setattr(GivesUp, event_name, give_up)
    learn.add_cb(GivesUp())
    if (event_name,ex)==('after_loss',CancelBatchException):
        assert len(learn.get_heatmaps())==6
        return
    with pytest.raises(ValueError, match=f'GivesUp raised {ex.__name__} in {event_name}') as e: learn.get_heatmaps()
    assert '\n' not in str(e.value) and not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    learn.remove_cb(GivesUp)
    assert len(learn.get_heatmaps())==6


class Keeps(nn.Module):
    "Keeps what goes through it, in every way"
    def __init__(self):
        super().__init__()
        self.lin,self.register = nn.Linear(64, 64),noop
        self.register_buffer('buf', torch.zeros(1))
        self.lists,self.dict,self.l = [[]],{'a': {}},L([0])
    def forward(self, x):
        x = self.lin(x)
        self.last,self.buf,self.pair,self.dict['a']['x'],self.lists[0],self.l[0] = x,x.mean(),(1, (x, x.view(-1))),x,[x],x
        return x

def keeper():
    return nn.Sequential(nn.Sequential(*create_body(narrow18()).children()), nn.Sequential(AdaptiveConcatPool2d(1), Flatten(), nn.Linear(128, 64), Keeps(), nn.Linear(64, 2)))

def graphs(model):
    found = []
    map_graphs(lambda t: found.append(t) or t, model)
    return found

feats = {}
def keep_globally(m, i, o): feats['x'] = o

@pytest.mark.parametrize('method', ['gradcam', 'saliency', 'activations'])
def test_what_the_model_keeps_has_no_graph(learn, method, tmp_path):
    learn.model = keeper()
    kept,last = [],None
    def keep(m, i, o):
        nonlocal last
        kept.append(o); last = o
    class Owner:
        def __call__(self, m, i, o): self.o = [o]
        def hook(self, m, i, o): self.o = {'o': o}
    owner,head = Owner(),learn.model[1][3]
    handles = [head.register_forward_hook(o) for o in (keep, owner.hook, keep_globally)]
    hook = hook_output(head.lin, detach=False)
    learn.get_heatmaps(method=method)
    assert not graphs(learn.model) and not any(t.requires_grad for t in (*kept, last, owner.o['o'], feats['x'], hook.stored))
    for h in (*handles, hook): h.remove()
    got = {k:v.clone() for k,v in dict(last=head.last, x=head.dict['a']['x'], l=head.lists[0][0], p=head.pair[1][0], v=head.pair[1][1]).items()}
    b = list(learn.dls.valid)[-1]
    learn.model.eval()
    with torch.no_grad(): learn.model(b[0])
    for k,v in dict(last=head.last, x=head.last, l=head.last, p=head.last, v=head.last.view(-1)).items(): torch.testing.assert_close(got[k], v.as_subclass(type(got[k])))
    model_heatmaps(learn.model, b[0], method=method)
    assert head.last is head.lists[0][0] is head.pair[1][0] and not head.buf.requires_grad
    deepcopy(learn.model)
    pickle.dumps(learn.model)
    learn.path = tmp_path
    learn.export()
    assert len(load_learner(tmp_path/'export.pkl').model[1][3].last)==len(b[0])

def test_a_training_keeps_its_graph():
    "What the model kept in a training step, and our run does not compute anew, can still be used for `backward`"
    class Aux(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            if self.training: self.loss = x.square().mean()
            return x
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Aux(4, 2))).train()
    model(torch.rand(2, 3, 8, 8))
    model_heatmaps(model, torch.rand(2, 3, 8, 8))
    model[1][2].loss.backward()
    assert model[0].weight.grad.abs().sum()>0

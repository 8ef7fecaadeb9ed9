"LogHeatmaps: the heatmaps of the same photos after each epoch, where they should be, and a training that takes its own course."
import io, shutil
from copy import deepcopy
from shared import *
from test_no_trace import state, same
from fastai.callback.fp16 import MixedPrecision

class Stop(Callback):
    "Raise `what` in the `n`-th training epoch"
    def __init__(self, n, what=KeyboardInterrupt): self.n,self.what,self.seen = n,what,0
    def before_train(self): self.seen += 1
    def after_batch(self):
        if self.seen==self.n and self.training: raise self.what('bang')


def tiny(pics, cbs=None, batch_tfms=(), bs=4):
    "A Learner that trains an epoch in a moment, with random transforms and dropout"
    set_seed(7)
    dls = pic_block(get_items=get_image_files, size=32, batch_tfms=batch_tfms).dataloaders(pics, bs=bs, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 8, stride=2)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(8, 2)))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, splitter=lambda m: [params(o) for o in m])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.fixture
def photos(pics): return [(f, label(f)) for f in get_image_files(pics).sorted()[:2]]


def trained(pics, act, *cbs):
    "What a training leaves behind: weights, the recorder's values, and what comes next out of the generators of random numbers"
    learn = tiny(pics, list(cbs), aug_transforms())
    set_seed(3)
    with learn.no_logging(): act(learn)
    return [p.detach().clone() for p in (*learn.model.parameters(), *learn.model.buffers())],[list(o) for o in learn.recorder.values],(torch.rand(2).tolist(), np.random.rand(), random.random()),learn.opt.state_dict()['state']

@pytest.mark.parametrize('act', ['fit_one_cycle', 'fine_tune', 'folder'])
def test_training_is_bit_for_bit_the_same(pics, photos, tmp_path, act):
    log = LogHeatmaps(photos, to=tmp_path/'logs' if act=='folder' else None)
    def go(learn): learn.fine_tune(2) if act=='fine_tune' else learn.fit_one_cycle(2, 1e-2)
    a,b = trained(pics, go),trained(pics, go, log)
    assert all(map(torch.equal, a[0], b[0])) and a[1:3]==b[1:3]
    assert all(torch.equal(x[k], y[k]) if isinstance(x[k], Tensor) else x[k]==y[k] for x,y in zip(a[3], b[3]) for k in x)
    assert list(log.heatmaps)==([0,1,2,3] if act=='fine_tune' else [0,1,2]) # fine_tune trains an epoch more, frozen

def test_model_and_learner_are_what_they_were(pics, photos):
    learn = tiny(pics)
    before = state(learn.model, learn)
    log = LogHeatmaps(photos)
    learn.fit(1, 0., cbs=log) # a learning rate of 0: only BatchNorm's statistics move
    after = state(learn.model, learn)
    for k in ('hooks', 'modules', 'modes', 'params', 'requires_grad'): same({k:before[k]}, {k:after[k]})
    assert [o[0] for o in before['cbs']]==[o[0] for o in after['cbs']]


def test_each_epoch_shows_the_model_as_it_was(pics, photos):
    "Before the first step, and after each epoch: as a Learner with the weights of then"
    learn,weights = tiny(pics),[]
    class Keep(Callback):
        order = -1
        def before_train(self): weights.append(deepcopy(self.learn.model.state_dict()))
    log = LogHeatmaps(photos, cls=['Red', 'Blue_ish'], relu=False)
    learn.fit(2, 1e-2, cbs=[log, Keep()])
    weights.append(learn.model.state_dict())
    other = tiny(pics)
    for epoch,w in enumerate(weights):
        other.model.load_state_dict(w)
        want = other.get_heatmaps(photos, ['Red', 'Blue_ish'], relu=False)
        assert torch.equal(log.heatmaps[epoch].maps, want.maps) and torch.equal(log.heatmaps[epoch].preds, want.preds)
    assert not torch.equal(log.heatmaps[0].maps, log.heatmaps[2].maps)

@pytest.mark.slow
def test_epochs_go_on_counting(pics, photos):
    "In fine_tune, which fits twice, and in further fits; the last epoch of each is there, too"
    learn,log = tiny(pics),LogHeatmaps(photos, every=2)
    learn.fine_tune(3, freeze_epochs=1, cbs=log)
    assert list(log.heatmaps)==[0,1,2,4]
    learn.fit(1, cbs=log)
    learn.fit_one_cycle(3, cbs=log)
    assert list(log.heatmaps)==[0,1,2,4,5,6,8] and len(log.panels[0])==8
    learn.add_cb(log)
    learn.validate()
    learn.get_preds()
    learn.lr_find(num_it=20, show_plot=False)
    learn.get_heatmaps()
    assert list(log.heatmaps)==[0,1,2,4,5,6,8] # these are no training

def test_early_stopping_and_skipped_epochs(pics, photos):
    log = LogHeatmaps(photos)
    learn = tiny(pics)
    learn.fit(5, 0., cbs=[log, EarlyStoppingCallback(min_delta=100., patience=1)])
    n = len(learn.recorder.values)
    assert n<5 and list(log.heatmaps)==list(range(n+1))
    log = LogHeatmaps(photos)
    learn.fit(3, 0., cbs=log, start_epoch=2)
    assert list(log.heatmaps)==[0,1]


def test_what_was_logged_before_an_interrupt_stays(pics, photos, tmp_path):
    learn,log = tiny(pics),LogHeatmaps(photos, to=tmp_path/'logs')
    with pytest.raises(KeyboardInterrupt): learn.fit(5, cbs=[log, Stop(3)])
    assert list(log.heatmaps)==[0,1,2] and [o.name for o in sorted((tmp_path/'logs').ls())][:3]==[f'{Path(photos[0][0]).stem}-epoch-00{i}.png' for i in range(3)]
    log.save(tmp_path/'strips')
    assert len((tmp_path/'strips').ls())==4
    learn.add_cb(log)
    learn.validate()
    assert list(log.heatmaps)==[0,1,2] # what came after the interrupt is no epoch
    learn.fit(1)
    assert list(log.heatmaps)==[0,1,2,3] # and the next fit goes on


def pixels(im): return np.asarray((im if isinstance(im, Image.Image) else Image.open(im)).convert('RGB')).astype(int)

def test_panels_show_the_map_over_the_photo(pics, photos):
    "Pixel by pixel, as matplotlib's own layers have it; and one below the other for several classes"
    learn,log = tiny(pics),LogHeatmaps(photos[:1], cls=['Red','Blue_ish'], relu=False, layer='0.1')
    learn.fit(1, cbs=log)
    hm,panel = log.heatmaps[1],pixels(log.panels[0][2])
    img,fig = hm.image(0),plt.figure(figsize=(2,4), dpi=100)
    axs = [fig.add_axes((0, .5-j/2, 1, .5)) for j in range(2)]
    hm.draw(0, img, axs)
    for ax in axs: ax.set_title('')
    fig.canvas.draw()
    want = np.asarray(fig.canvas.buffer_rgba())[...,:3].astype(int)
    for j in range(2):
        half = panel[j*len(panel)//2:(j+1)*len(panel)//2]
        assert np.abs(half[-205:-5,5:205]-want[200*j:200*j+200]).mean()<1 # 2 inches of 100 pixels, at the lower end
        assert (half[-4:]==255).all() and (half[:,:4]==255).all()

def test_looks(pics, photos):
    "A panel has the boxes, opacity and style that it is asked for, as `show` has them"
    learn,plain,boxed,clear = tiny(pics),*[LogHeatmaps(photos[:1], layer='0.1', **o) for o in ({}, dict(boxes=True), dict(alpha=0, style='even'))]
    learn.fit(1, cbs=[plain, boxed, clear])
    arrays = [np.array(o.panels[0][1]).astype(int) for o in (plain, boxed, clear)]
    assert np.array_equal(plain.heatmaps[0].maps, boxed.heatmaps[0].maps) and len(plain.heatmaps[0].boxes()[0].bbox)>0
    changed = np.abs(arrays[0]-arrays[1]).max(-1)>0
    assert 20<changed.sum()<.3*changed.size # lines, and no other map
    photo = np.array(boxed.panels[0][0]).astype(int)
    assert np.abs(photo-arrays[2])[-150:].max()<=1 # below the titles


def test_strip(pics, photos):
    "The photo, then the epochs in order, each as wide and the same distance apart; what is white on top is cut off"
    learn,log = tiny(pics),LogHeatmaps(photos, cls='targ')
    learn.fit(2, cbs=log)
    assert len(log.panels)==2
    for i in range(2):
        strip = log.strip(i)
        n,wide = len(log.panels[i]),(strip.width+8)//len(log.panels[i])-8
        assert n==4 and wide==200 and strip.height<log.panels[i][0].height
        top = log.panels[i][0].height-5-strip.height
        for j,panel in enumerate(log.panels[i]):
            got = pixels(strip)[:,j*208:j*208+200]
            assert np.array_equal(got, pixels(panel)[top:top+strip.height,5:205])
        assert (pixels(strip)[:2]==255).all() and (pixels(strip)[2]<255).any()

def titles(log, monkeypatch): # what is written over each panel
    import fastai_heatmaps.views.log as m
    said,write = [],m.wrap_title
    monkeypatch.setattr(m, 'wrap_title', lambda ax, lines, color='black', size=10: said.append((list(lines), color)) or write(ax, lines, color, size))
    return said

def test_titles_tell_the_epoch_and_the_probability(pics, photos, monkeypatch):
    learn,log = tiny(pics),LogHeatmaps(photos[:1], cls='targ', method='activations')
    said = titles(log, monkeypatch)
    learn.fit(1, cbs=log)
    assert said[0][0]==[f'truth: {photos[0][1]}'] and said[1][0][0]=='epoch 0' and said[2][0][0]=='epoch 1'
    said.clear()
    log = LogHeatmaps(photos[:1], cls='targ')
    learn.fit(1, cbs=log)
    for e,(lines,color) in enumerate(said[1:]):
        hm = log.heatmaps[e]
        p,right = hm.preds[0,hm.cls[0,0]],hm.preds[0].argmax()==hm.cls[0,0]
        assert lines[:2][1].startswith(f'{photos[0][1]} {p:.2f}') and color==('green' if right else 'red')
        assert ('(no evidence)' in lines)==(not hm.maps.any())

def test_long_names_are_not_cut_off(pics, photos):
    "Also three lines for each class: nothing is drawn at the upper edge of a panel"
    learn = tiny(pics)
    learn.dls.vocab.items = ['american_staffordshire_terrier_of_the_north', 'german_shorthaired_pointer_of_the_south']
    log = LogHeatmaps([f for f,_ in photos], cls=[0,1])
    learn.fit(1, cbs=log)
    for panels in log.panels:
        for o in panels: assert (pixels(o)[:2]==255).all()


@pytest.mark.slow
def test_folder(pics, photos, tmp_path):
    "A picture for each photo and epoch, strips, animations; written by whoever wrote them before, and no one else"
    learn,log = tiny(pics),LogHeatmaps(photos, to=str(tmp_path/'new'/'logs'))
    learn.fit(2, cbs=log)
    folder,stems = tmp_path/'new'/'logs',[Path(f).stem for f,_ in photos]
    assert {o.name for o in folder.ls()}=={f'{s}{end}' for s in stems for end in ('.png', '.webp', '-epoch-000.png', '-epoch-001.png', '-epoch-002.png')}
    for i,s in enumerate(stems):
        for e in range(3): assert np.array_equal(pixels(folder/f'{s}-epoch-{e:03}.png'), pixels(log.panels[i][e+1]))
        assert np.array_equal(pixels(folder/f'{s}.png'), pixels(log.strip(i)))
        im = Image.open(folder/f'{s}.webp')
        assert im.n_frames==3 and im.info['loop']==0
        for e in range(3): # WebP is lossy
            im.seek(e)
            strip = pixels(log.strip(i))[:,(e+1)*208:(e+1)*208+200]
            assert np.abs(pixels(im)-strip).mean()<6
    learn.fit(1, cbs=LogHeatmaps(photos, to=folder)) # over its own
    (folder/f'{stems[0]}-epoch-000.png').write_bytes(Path(photos[0][0]).read_bytes())
    with pytest.raises(FileExistsError, match='was not made by this package'): learn.fit(1, cbs=LogHeatmaps(photos, to=folder))
    assert (folder/f'{stems[0]}-epoch-000.png').read_bytes()==Path(photos[0][0]).read_bytes()

def test_same_names_of_two_folders(pics, tmp_path):
    files = []
    for o in 'ab':
        (tmp_path/o).mkdir()
        files.append(tmp_path/o/'1.png')
        Image.new('RGB', (40,40), 'red').save(files[-1])
    tiny(pics).fit(1, cbs=LogHeatmaps(files, to=tmp_path/'logs'))
    assert {o.name for o in (tmp_path/'logs').ls()} >= {'1.png', '1-2.png', '1-epoch-000.png', '1-2-epoch-000.png'}


def test_errors_before_the_first_step_are_raised(pics, photos, tmp_path):
    "And nothing has been trained"
    learn = tiny(pics)
    before = [p.detach().clone() for p in learn.model.parameters()]
    for kwargs,said in [(dict(cls='Rde'), 'Red'), (dict(method='nope'), 'no method'), (dict(to='wandb'), "to='wandb' needs fastai's WandbCallback"), (dict(to='tensorboard'), "needs fastai's TensorBoardCallback")]:
        with pytest.raises(ValueError, match=said): learn.fit(1, cbs=LogHeatmaps(photos, **kwargs))
    for every in (0, 1.5, '2', None):
        with pytest.raises(ValueError, match=f'every is {every!r}; expected a whole number, at least 1'): LogHeatmaps(photos, every=every)
    with pytest.raises(ValueError, match='there are no photos to log'): LogHeatmaps([])
    with pytest.raises(ValueError, match='out= is for one run, and each epoch is another'): LogHeatmaps(photos, out=tmp_path/'maps')
    with pytest.raises(ValueError, match='nothing has been logged yet'): LogHeatmaps(photos).strip()
    with pytest.raises(ValueError): learn.fit(1, cbs=LogHeatmaps([tmp_path/'none.png']))
    assert all(map(torch.equal, before, learn.model.parameters()))

def test_errors_in_training_are_warnings(pics, photos, tmp_path):
    "A file in the place of the folder, after epoch 0: the training is what it would be"
    learn,log = tiny(pics),LogHeatmaps(photos, to=tmp_path/'logs')
    class Spoil(Callback):
        def before_validate(self):
            if (tmp_path/'logs').is_dir():
                shutil.rmtree(tmp_path/'logs')
                (tmp_path/'logs').write_text('mine')
    with pytest.warns(UserWarning, match='heatmaps of epoch 1 were not all logged, and the training goes on'): learn.fit(2, cbs=[log, Spoil()])
    assert len(learn.recorder.values)==2 and (tmp_path/'logs').read_text()=='mine' and log.strip(0)


def test_export_takes_no_photos_along(pics, photos, tmp_path):
    learn = tiny(pics, LogHeatmaps([PILImage.create(f) for f,_ in photos]))
    plain = tiny(pics)
    for o in (learn, plain): o.fit(1)
    learn.log_heatmaps.panels[0].append(Image.effect_noise((500,500), 100)) # does not compress
    sizes = []
    for o in (plain, learn):
        o.export(tmp_path/'export.pkl')
        sizes.append((tmp_path/'export.pkl').stat().st_size)
    assert sizes[1]-sizes[0]<5000
    again = load_learner(tmp_path/'export.pkl')
    assert again.log_heatmaps.photos==[] and again.log_heatmaps.heatmaps=={} and again.log_heatmaps.panels==[]
    assert torch.equal(again.get_heatmaps(photos).maps, learn.get_heatmaps(photos).maps)
    assert list(learn.log_heatmaps.heatmaps)==[0,1] # the one that was exported has lost nothing
    again.dls = learn.dls
    with again.no_bar(): again.fit(1) # it has nothing to log
    assert again.log_heatmaps.heatmaps=={}

def test_only_the_first_process_logs(pics, photos, monkeypatch, tmp_path):
    monkeypatch.setenv('RANK', '1')
    log = LogHeatmaps(photos, to=tmp_path/'logs')
    tiny(pics).fit(1, cbs=log)
    assert not log.heatmaps and not (tmp_path/'logs').exists()

def test_mixed_precision(pics, photos):
    "As get_heatmaps in mixed precision gives them"
    learn,log = tiny(pics, MixedPrecision(amp_mode='bf16')),LogHeatmaps(photos)
    learn.fit(1, 1e-2, cbs=log)
    assert torch.equal(log.heatmaps[1].maps, learn.get_heatmaps(photos).maps) and log.heatmaps[1].maps.isfinite().all()

def test_other_callbacks(pics, photos):
    "MixUp trains with another loss, which comes back"
    def course(*cbs):
        learn = tiny(pics, [MixUp(), *cbs])
        set_seed(3)
        learn.fit(2, 1e-2)
        return [p.detach().clone() for p in learn.model.parameters()]
    assert all(map(torch.equal, course(), course(LogHeatmaps(photos, cls='targ'))))


@pytest.mark.slow
@pytest.mark.parametrize('to', [None, 'tensorboard'])
def test_tensorboard(pics, photos, tmp_path, to):
    "The event file, read by TensorBoard's own reader: the pictures, pixel by pixel, at the steps of their epochs"
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn,log = tiny(pics),LogHeatmaps(photos, to=to)
    learn.fine_tune(1, cbs=[TensorBoardCallback(tmp_path/'logged', trace_model=False, log_preds=False), log])
    events = EventAccumulator(str(tmp_path/'logged'), size_guidance=dict(images=0)).Reload()
    for i,(f,_) in enumerate(photos):
        name = Path(f).stem
        ims = events.Images(f'heatmaps/{name}')
        assert [o.step for o in ims]==[0,1,2]
        for o,panel in zip(ims, log.panels[i][1:]): assert np.array_equal(pixels(Image.open(io.BytesIO(o.encoded_image_string))), pixels(panel))
        strip = events.Images(f'heatmaps/{name}-strip')[-1]
        assert strip.step==2 and np.array_equal(pixels(Image.open(io.BytesIO(strip.encoded_image_string))), pixels(log.strip(i)))
    plain = tiny(pics)
    plain.fine_tune(1, cbs=TensorBoardCallback(tmp_path/'plain', trace_model=False, log_preds=False))
    without = EventAccumulator(str(tmp_path/'plain')).Reload()
    for k in without.Tags()['scalars']: assert len(events.Scalars(k))==len(without.Scalars(k))>1 # heatmaps add no points to the curves

@pytest.mark.slow
def test_wandb(pics, photos, tmp_path, monkeypatch):
    "Offline, without network: the pictures in the run's folder, pixel by pixel, and the steps that belong to them"
    import wandb
    from fastai.callback.wandb import WandbCallback
    for k,v in dict(WANDB_MODE='offline', WANDB_DIR=str(tmp_path), WANDB_SILENT='true', WANDB_CONSOLE='off').items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(Learner, 'gather_args', lambda self: {}) # of fastai 2.8.12 it fails with fastcore 2.2, on any Learner
    run = wandb.init(project='test', dir=tmp_path)
    learn,log = tiny(pics, bs=2),LogHeatmaps(photos)
    logged,write = [],wandb.log
    monkeypatch.setattr(wandb, 'log', lambda data, step=None: logged.append((data, step)) or write(data, step=step))
    learn.fit(2, cbs=[WandbCallback(log_preds=False), log])
    folder,summary = Path(run.dir),dict(run.summary)
    wandb.finish()
    mine = [(data, step) for data,step in logged if any('heatmaps/' in k for k in data)]
    n = len(learn.dls.train)
    assert [step for _,step in mine][:3]==[0, n-1, 2*n-1] # those of the loss: before the first, and at the end of each epoch
    names = [Path(f).stem for f,_ in photos]
    for i,name in enumerate(names):
        files = sorted((folder/'media'/'images'/'heatmaps').glob(f'{name}_[0-9]*.png'), key=lambda o: int(o.stem.split('_')[len(name.split('_'))]))
        assert len(files)==3
        for f,panel in zip(files, log.panels[i][1:]): assert np.array_equal(pixels(f), pixels(panel))
        strip, = (folder/'media'/'images'/'heatmaps').glob(f'{name}-strip_*.png')
        assert np.array_equal(pixels(strip), pixels(log.strip(i)))
    assert {f'heatmaps/{n}' for n in names} <= set(summary) and 'train_loss' in summary

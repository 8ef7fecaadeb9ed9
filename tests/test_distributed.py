"Two real processes over gloo: what they give together is what one gives alone."
import os, subprocess, sys
import fastai.callback.progress as progress
from shared import *
from test_no_trace import state, same
from fastai_heatmaps.learner.distributed import gathered


def cases(learn, pics):
    "Name -> arguments, the same in each process"
    files = get_image_files(pics).sorted()
    items = list(files[:7])
    return dict(valid=dict(), training=dict(ds_idx=0), paths=dict(items=items, topk=2, method='layercam'), L=dict(items=files[:5], cls=['Red', 'Blue_ish'], relu=False),
                one=dict(items=items[0]), two=dict(items=items[:2], layer='0.5'), bs=dict(items=items, bs=2, cls='red'),
                tensor=dict(items=items, cls=tensor([0,1,1,0,0,1,0])), array=dict(cls=np.array([0,1,1,0,0,1])), targ=dict(cls='targ'),
                labels=dict(items=[(f, label(f)) for f in items], cls='targ'), some_labels=dict(items=[(f, label(f)) for f in items[:5]]+items[5:]),
                rise=dict(items=items, method='rise', n=8), integrated=dict(items=items, method='integrated_gradients', steps=3),
                written=dict(items=items, bs=2, out=pics/'maps'), own_dl=dict(dl=learn.dls.test_dl(files[::-1], bs=5)), some_of_a_dl=dict(dl=learn.dls.valid.new(get_idxs=lambda: [4,1,3], n=3)),
                pytorch=dict(dl=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.linspace(0, 1, 5*3*64*64).sin().view(5, 3, 64, 64), tensor([0,1,1,0,1])), 2)))


def outcome(hm): return dict(vars(hm), images=None, asked=None, idxs=hm.idxs, items=[str(o) for o in hm.items], image=hm.image(len(hm)-1))


def together(pics, *names):
    "The `cases` of these names, or all: what came of each, how many images this process ran, and how many progress bars it drew"
    os.environ['PYCHARM_HOSTED'] = '1' # a console where a person looks, so that bars are shown
    learn,res,bars = pic_learner(pics),{},[]
    show = progress.progress_bar
    progress.progress_bar = lambda *args, **kwargs: bars.append(1) or show(*args, **kwargs)
    for name,kwargs in cases(learn, pics).items():
        if names and name not in names: continue
        n = []
        hook = learn.model.register_forward_hook(lambda m, i, o: n.append(len(o)))
        hm = learn.distrib_heatmaps(**kwargs)
        hook.remove()
        res[name] = dict(outcome(hm), n=sum(n), bars=len(bars))
        bars.clear()
    return res


def some_together(pics): return together(pics, 'valid', 'paths', 'bs', 'labels', 'rise', 'own_dl')


def error(f):
    try: return f()
    except Exception as e: return f'{type(e).__name__}: {e}'


def failing(pics, bad):
    "What is raised where something is wrong in all processes, or in one; in between, all goes well"
    learn,files,rank = pic_learner(pics, bs=2),list(get_image_files(pics).sorted()),rank_distrib()
    def late(acts, grads):
        if rank==1: raise ZeroDivisionError('bang')
        return acts.sum(1)
    other = pic_learner(pics)
    if rank==1: nn.init.normal_(other.model[1][-1].weight)
    before = state(learn.model, learn)
    res = dict(name=error(lambda: learn.distrib_heatmaps(cls='Rde')), length=error(lambda: learn.distrib_heatmaps(cls=tensor([0,1]))),
               empty=error(lambda: learn.distrib_heatmaps([])), one_empty=error(lambda: learn.distrib_heatmaps(files[:3*rank])),
               last_file=error(lambda: learn.distrib_heatmaps([*files[:3], bad])), first_file=error(lambda: learn.distrib_heatmaps([bad, *files[:3]])),
               method=error(lambda: learn.distrib_heatmaps(method=late)), option=error(lambda: learn.distrib_heatmaps(method='rise', m=3)),
               order=error(lambda: learn.distrib_heatmaps(files[::-1] if rank else files)), split=error(lambda: learn.distrib_heatmaps(dl=learn.dls.valid.new(get_idxs=lambda: [rank, 2], n=2))),
               weights=error(lambda: other.distrib_heatmaps()), well=outcome(learn.distrib_heatmaps()))
    same(before, state(learn.model, learn))
    return res


def training(pics):
    "As inside fastai's `distrib_ctx`, which itself needs GPUs: its callback, its DataLoaders, its model"
    from fastai.distributed import DistributedTrainer, DistributedDL
    learn = pic_learner(pics)
    assert distrib_state().num_processes==2
    learn.add_cb(DistributedTrainer(sync_bn=False, cpu=True))
    learn.dls.loaders = [DistributedDL(o, device='cpu') for o in learn.dls]
    learn.model = nn.parallel.DistributedDataParallel(learn.model)
    files = get_image_files(pics).sorted()
    before = state(learn.model, learn)
    res = dict(alone=None, whole=outcome(learn.distrib_heatmaps()), items=outcome(learn.distrib_heatmaps(files[:3])))
    if not rank_distrib(): # the other one is not asked
        res['alone'] = outcome(learn.get_heatmaps())
        learn.show_gradcam(files[0])
        learn.plot_heatmap_grid(n=2)
    same(before, state(learn.model, learn))
    return res


def spawned(pics, rank, file):
    "A group that was formed without the launcher's environment variables"
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    res = dict(whole=outcome(pic_learner(pics).distrib_heatmaps()), env=[k for k in ('RANK', 'WORLD_SIZE') if k in os.environ])
    torch.distributed.destroy_process_group()
    return res


def env(): return {**{k:v for k,v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
def launch(*command, timeout=240): # a hang is an error
    res = subprocess.run([sys.executable, '-m', *map(str, command)], env=env(), capture_output=True, text=True, timeout=timeout)
    assert res.returncode==0, res.stdout+res.stderr
torchrun = ['torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__]
accelerate = ['accelerate.commands.launch', '--multi_gpu', '--num_processes=2', '--num_machines=1', '--mixed_precision=no', '--dynamo_backend=no', '--main_process_port=0', __file__]


def check(got, hm):
    "What a process got is `hm`"
    want = outcome(hm)
    assert (torch.equal(got['cls'], want['cls']) and [got[k] for k in ('items', 'idxs', 'vocab', 'task', 'thresh')]==[want[k] for k in ('items', 'idxs', 'vocab', 'task', 'thresh')])
    assert (got['targs'] is None)==(want['targs'] is None) and (got['targs'] is None or torch.equal(got['targs'], want['targs']))
    assert got['maps'].abs().max()>0 and len(got['maps'])==len(hm) and set(got['info'])==set(want['info'])
    for a,b in [(got['maps'], want['maps']), (got['preds'], want['preds']), (got['image'], want['image']), *[(got['info'][k], want['info'][k]) for k in want['info']]]:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def results(path): return [torch.load(path/f'{i}.pth', weights_only=False) for i in range(2)]


def check_together(pics, first, second):
    "Each process has what one process alone gets"
    learn = pic_learner(pics)
    assert first.keys()==second.keys() and len(first)>5
    for name,kwargs in cases(learn, pics).items():
        if name not in first: continue
        out = kwargs.pop('out', None)
        hm = learn.get_heatmaps(**kwargs)
        check(first[name], hm)
        check(second[name], hm)
        if out: # each has written its own
            assert [len(load_heatmaps(out/f'process-{i}')) for i in (0,1)]==[4,3] and torch.equal(join_heatmaps([load_heatmaps(out/f'process-{i}') for i in (0,1)], learn.dls.valid).maps, first[name]['maps'])
            shutil.rmtree(out)
        n = len(hm)
        if name not in ('rise', 'integrated'): assert (first[name]['n'], second[name]['n'])==(n-n//2, n//2), name # each image runs once
    assert first['bs']['bars'] and not any(o['bars'] for o in second.values()) # of two batches in each


def check_failing(pics, first, second):
    "Errors are raised in all"
    for k,text in dict(name="no class 'Rde'", length='2 indices for 6 images', empty='no images', option="has no option 'm'", order='the same images', split='the same images', weights='the same weights').items():
        assert first[k]==second[k] and text in first[k] and first[k].startswith('ValueError: ') and 'in process' not in first[k], (first[k], second[k])
    for k,here,there in [('last_file', second, first), ('first_file', first, second)]:
        assert here[k].startswith('ImageError: ') and 'bad.png' in here[k]
        assert there[k]==f"ValueError: in process {int(here is second)}: {here[k].split(': ', 1)[1]}"
    assert first['one_empty'].startswith('ValueError: there are no images') and second['one_empty']=='ValueError: in process 0: '+first['one_empty'].split(': ', 1)[1]
    assert second['method']=='ZeroDivisionError: bang' and first['method']=='RuntimeError: in process 1: ZeroDivisionError: bang'
    for o in (first, second):
        check(o['well'], pic_learner(pics, bs=2).get_heatmaps())
        assert '\n' not in ''.join(v for v in o.values() if isinstance(v, str))


def check_training(pics, first, second):
    "It works inside a training, for one process too"
    learn = pic_learner(pics)
    for o in (first, second):
        check(o['whole'], learn.get_heatmaps())
        check(o['items'], learn.get_heatmaps(get_image_files(pics).sorted()[:3]))
    check(first['alone'], learn.get_heatmaps())


@pytest.mark.slow
def test_under_torchrun(pics, tmp_path):
    "One start for all that is to be seen: what comes together, errors, a training"
    (tmp_path/'bad.png').write_text('no picture')
    launch(*torchrun, 'together,failing,training', pics, tmp_path, tmp_path/'bad.png')
    first,second = results(tmp_path)
    check_together(pics, first['together'], second['together'])
    check_failing(pics, first['failing'], second['failing'])
    check_training(pics, first['training'], second['training'])


@pytest.mark.slow
def test_under_accelerate(pics, tmp_path):
    launch(*accelerate, 'some_together', pics, tmp_path)
    check_together(pics, *[o['some_together'] for o in results(tmp_path)])


@pytest.mark.slow
def test_a_group_that_is_there_is_used(pics, tmp_path, forked):
    rc,printed = forked(f"""import os, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_distributed import spawned, Path
others = [os.fork() for rank in range(1)]
rank = int(0 in others)
torch.save(dict(spawned=spawned(Path({str(pics)!r}), rank, {str(tmp_path/'group')!r})), f'{tmp_path}/{{rank}}.pth')
if not rank: sys.exit(os.waitpid(others[0], 0)[1])
""")
    assert rc==0, printed
    for o in results(tmp_path):
        check(o['spawned']['whole'], pic_learner(pics).get_heatmaps())
        assert o['spawned']['env']==[]


def test_alone(learn, pics, monkeypatch):
    "Without other processes it is `get_heatmaps`, and accelerate is not even asked"
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    check(outcome(learn.distrib_heatmaps()), learn.get_heatmaps())
    assert distrib_state() is None
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ImportError, match=r'pip install "fastai_heatmaps\[distrib\]"'): learn.distrib_heatmaps()


@pytest.mark.slow
def test_join(learn, pics):
    files = get_image_files(pics).sorted()
    hm = learn.get_heatmaps(files, method='integrated_gradients', steps=2, topk=2)
    for parts in ([hm], [hm[:5], hm[5:6], hm[6:]], [hm[i] for i in range(len(hm))]): check(outcome(join_heatmaps(parts)), hm)
    swapped = join_heatmaps([hm[6:], hm[:6]])
    assert list(swapped.items)==[*files[6:], *files[:6]] and torch.equal(swapped.maps, hm.maps.roll(-6, 0))
    ragged = Heatmaps([torch.ones(2, 3, 3), torch.ones(2, 4, 3)], hm.cls[:2], hm.preds[:2], images=hm.images[:2], info={k:v[:2] for k,v in hm.info.items()})
    assert isinstance(join_heatmaps([ragged[0], ragged[0]]).maps, Tensor) and [m.shape[1] for m in join_heatmaps([ragged, ragged[0]]).maps]==[3,4,3]
    for parts in ([], [hm, learn.get_heatmaps(files)], [hm, learn.get_heatmaps(files, topk=2)], [hm, learn.get_heatmaps(files, method='integrated_gradients', steps=2, topk=2)]):
        with pytest.raises(ValueError): join_heatmaps(parts)


if __name__=='__main__': # one of the processes
    names,pics,out,*args = sys.argv[1:]
    res = {name: globals()[name](Path(pics), *(args if name=='failing' else [])) for name in names.split(',')}
    torch.save(res, Path(out)/f"{os.environ['RANK']}.pth")

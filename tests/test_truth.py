"Pictures and models of which it is known what the answer rests on, and what each method marks on them."
import pickle
from shared import *
from fastai_heatmaps.core.method import get_method
from fastai_heatmaps.trust.truth import truth_items, truth_picture, truth_learner, patch_box, patch_energy, swapped, swap_effect, score_methods, set_model, colors, picture_side, patch_side, cell_side

fewer = dict(rise=dict(n=150), smoothgrad=dict(n=4), integrated_gradients=dict(steps=20))


@pytest.fixture(scope='module')
def learns(): return {kind:truth_learner(kind, n=8) for kind in ('ignored','cancelled')}


def asked(names=None): return [get_method(m, **fewer.get(m, {})) for m in names or heatmap_methods]


def batch(items):
    "As the models take them"
    return torch.stack([image2tensor(truth_picture(o)).float()/255*2-1 for o in items])


# ---- the pictures

def test_items_are_fair():
    items = truth_items(2000, seed=3)
    assert [o['used'] for o in items[:4]]==['red','blue']*2
    along = [(o['used'],o['unused']) in (('red','green'),('blue','yellow')) for o in items]
    assert abs(np.mean(along)-.9)<.03
    (x,y),(u,v) = [np.array([o[k] for o in items]).T for k in ('used_at','unused_at')]
    assert (np.maximum(abs(x-u), abs(y-v))>=patch_side+cell_side).all() # a whole cell between them, so that they share none
    for o in (x, y, u, v): assert o.min()==0 and o.max()==picture_side-patch_side and abs(o.mean()-(picture_side-patch_side)/2)<2 # anywhere; no place is preferred
    assert abs(x.std()-u.std())<1 and abs(y.std()-v.std())<1 # the two patches alike
    tells_nothing = truth_items(2000, .5, ('red','blue','none'), seed=3)
    for c in 'red','blue','none': assert abs(np.mean([o['unused']=='green' for o in tells_nothing if o['used']==c])-.5)<.06
    assert truth_items(5)==truth_items(5) and truth_items(5)!=truth_items(5, seed=1)


def test_pictures_show_their_patches():
    for o in truth_items(6, classes=('red','none')):
        im = np.array(truth_picture(o)).astype(int)
        is_grey = (im==im[...,:1]).all(2)
        want = np.ones((picture_side,picture_side), bool)
        for which in 'used','unused':
            box = patch_box(which, o)
            if not box: continue
            x1,y1,x2,y2 = box
            assert (im[y1:y2,x1:x2]==colors[o[which]]).all()
            want[y1:y2,x1:x2] = False
        assert (is_grey==want).all() and (patch_box('used', o)==[])==(o['used']=='none')


# ---- the models

def test_scores_by_hand():
    "Each of two channels has (224-32-32)/255 in a 16th of the picture, and weighs 100"
    items = truth_items(6, classes=('red','blue','none'))
    strong = 200*(224-32-32)/255/16
    want = dict(red=[strong,0,4], blue=[0,strong,4], none=[0,0,4])
    for cancelled in False,True:
        with torch.no_grad(): got = set_model(cancelled)(batch(items))
        torch.testing.assert_close(got, tensor([want[o['used']] for o in items]).float(), rtol=1e-5, atol=1e-4)


def test_the_body_sees_all_colours_alike():
    body = set_model()[0]
    for c,channel in zip(colors, range(0, 8, 2)):
        with torch.no_grad(): acts = body(tensor(colors[c]).float().view(1, 3, 1, 1).expand(1, 3, 8, 8)/255*2-1)[0,:,0,0]
        want = torch.zeros(8)
        want[channel:channel+2] = (224-64)/255
        torch.testing.assert_close(acts, want, rtol=1e-3, atol=1e-4)


def test_the_unused_patch_changes_nothing():
    "Not a bit, whatever its colour or place, and if there is none; while the body sees it"
    items = truth_items(4)
    others = [swapped(o, 'unused') for o in items], [{**o, 'unused':'none'} for o in items], [{**o, 'unused_at':p['unused_at']} for o,p in zip(items, [dict(unused_at=[0,0])]*4)]
    ignored,cancelled = set_model(),set_model(True)
    with torch.no_grad():
        want = ignored(batch(items))
        for o in others[:2]:
            assert torch.equal(ignored(batch(o)), want) and not torch.equal(ignored[0](batch(o)), ignored[0](batch(items)))
            torch.testing.assert_close(cancelled(batch(o)), want, rtol=0, atol=1e-4)
        apart = [i for i,o in enumerate(items) if max(o['used_at'])>=patch_side]
        assert apart and torch.equal(ignored(batch([others[2][i] for i in apart])), want[apart])
        used = ignored(batch([swapped(o, 'used') for o in items]))
        assert torch.equal(used[:,[1,0,2]], want)


@pytest.mark.parametrize('kind', ['ignored', 'cancelled', pytest.param('trained', marks=pytest.mark.slow)])
def test_swap_effect(kind):
    learn = truth_learner(kind, n=16)
    assert learn.validate()[1]==1
    answers,prob = swap_effect(learn, 'used')
    assert answers==1 and prob>.9
    answers,prob = swap_effect(learn, 'unused')
    assert answers==0 and prob<=dict(ignored=0, cancelled=1e-5, trained=.05)[kind]
    if kind!='trained': return
    maps = learn.get_heatmaps(cls='targ', method='activations')
    assert patch_energy(maps, 'unused')[0].mean()>2*1/16 # the body has learned to see the second patch


def test_leaves_the_random_state_alone():
    with draws_nothing():
        truth_learner(n=4)
        score_methods(truth_learner(n=4), asked(['gradcam','rise']))


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind is 'x'; expected 'ignored', 'cancelled' or 'trained'"): truth_learner('x')


# ---- the methods

blind = {'activations','eigencam'}
refused = {'legrad'} # there is no attention
cancels_late = {'gradcam++','layercam','smooth_gradcam++','guided_backprop'} # what speaks for a class is kept before evidence is summed
not_seen = {'deconvnet'} # its rule lets gradients through silent ReLUs, so that after a mean over the map all places are alike


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['ignored','cancelled'])
def test_every_method_is_scored(learns, kind):
    "A new method joins by itself, and must mark the used patch alone unless it is named above"
    found = score_methods(learns[kind], asked())
    assert set(found.index)==set(heatmap_methods)-refused and all(f"{m!r} is for vision transformers" in found.words for m in refused)
    for m,row in found.iterrows():
        if m in not_seen: assert row['marks'].startswith('neither') and abs(row['used']-1/16)<1e-4 and abs(row['unused']-1/16)<1e-4
        elif m in blind: assert row['unused']>dict(activations=.3, eigencam=.1)[m] and row['marks'].endswith(', whatever the class') # Eigen-CAM marks the larger of two that are equal but for chance
        elif m in cancels_late and kind=='cancelled': assert row['marks']=='used and unused' and row['unused']>.25
        elif m=='eigengradcam' and kind=='cancelled': assert row['used']+row['unused']>.6 # its two first patterns are equally strong, so chance chooses the patch
        else: assert row['marks']=='used' and row['used']>6/16 and row['unused']<.05, m
    assert all(found.each[f'{m} used'].shape==(8,) for m in found.index)


def test_a_new_method_joins(learns):
    "All that are registered are asked, and no list of names has to be kept"
    known = dict(heatmap_methods)
    for m in set(known)-{'gradcam','legrad'}: del heatmap_methods[m]
    @heatmap_method('tops')
    def tops(acts): return acts[:,4:].sum(1) # green and yellow
    try: found = score_methods(learns['ignored'])
    finally:
        heatmap_methods.clear()
        heatmap_methods.update(known)
    assert list(found['marks'].items())==[('gradcam','used'), ('tops','unused, whatever the class')]
    assert 'These mark the unused patch alone, with the same map for each class: tops. This one cannot be asked: \'legrad\' is for' in found.words


def test_energy_by_hand(learns):
    "Grad-CAM has as much in each cell as that has of the patch"
    learn = learns['ignored']
    found = score_methods(learn, ['gradcam'])
    def share(at): return np.clip(np.minimum(at+patch_side, np.arange(8, 97, 8))-np.maximum(at, np.arange(0, 96, 8)), 0, 8)/8
    covered = [share(o['used_at'][1])[:,None]*share(o['used_at'][0]) for o in learn.dls.valid.items]
    want = [(c**2).sum()/c.sum() for c in covered]
    assert np.allclose(found.each['gradcam used'], want, atol=1e-5) and np.allclose(found.loc['gradcam','used'], np.mean(want), atol=1e-5)
    assert np.allclose(found.each['area'], 1/16)


def test_what_cannot_be_scored(learns):
    with pytest.raises(ValueError, match="'legrad' is for vision transformers"): score_methods(learns['ignored'], ['legrad'])
    with pytest.raises(ValueError, match="no method 'grad'"): score_methods(learns['ignored'], ['grad'])


def test_a_method_of_ones_own(learns):
    def flat(acts): return torch.ones_like(acts[:,0])
    def corner(acts): return torch.eye(12)[None].expand(len(acts), -1, -1)*(torch.arange(12)==0)
    found = score_methods(learns['ignored'], [flat, corner])
    assert found.loc['flat','marks']=='neither, whatever the class' and np.allclose(found.loc['flat',['used','unused','pointing']].astype(float), 1/16)
    assert found.loc['corner','marks'].startswith('neither')


def test_findings_draw_and_pickle(learns):
    found = score_methods(learns['cancelled'], ['gradcam','layercam'])
    for o in found,pickle.loads(pickle.dumps(found)):
        ax = o.plot()
        assert [t.get_text() for t in ax.get_yticklabels()]==['gradcam','layercam'] and len(ax.patches)==4
        assert np.allclose([p.get_width() for p in ax.patches], [*found['used'], *found['unused']])

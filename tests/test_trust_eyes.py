"What a user of the checks found who did not write them."
import pytest
from conftest import *
from test_check import patch_learner, patch_net, patch_picture, fresh_net, sure, m
from fastai_heatmaps.trust.check import says_trust, draw_trust


@pytest.mark.parametrize('gone', [{'model'}, {'model', 'focus'}, {'model', 'stability'}])
def test_nobody_knows_whether_the_model_knows_anything(gone):
    "Photos without labels: a fresh model passes all else now and then, since its maps do say what it guesses by"
    verdict,words = says_trust('x', {k:v for k,v in sure.items() if k not in gone}, 20)
    assert verdict is None and words=='Whether x can be trusted cannot be told: nothing speaks against it, but nobody knows whether the model is right.'


def test_photos_without_labels():
    f = patch_learner().check_heatmaps([patch_picture(i) for i in range(20)])
    assert f.loc['gradcam','verdict']=='cannot be told' and 'nobody knows whether the model is right.' in f.words.split('\n\n')[0]


def test_every_dot_is_in_its_panel():
    "Rank correlations go down to -1"
    found = {**sure, 'sanity': dict(head=m(-.6), all=m(.1)), 'stability': dict(noise=m(.9), others=m(-.5), more=m(.7))}
    axs = draw_trust(['x'], [([(['x'], torch.zeros(3, 8, 8), None, 'black'), None, None, None], None, None, 'fade')], [found])
    for ax in axs[-1]:
        lo,hi = ax.get_xlim()
        assert all(lo<=x<=hi for l in ax.lines for x in l.get_xdata())


def test_a_stage_whose_maps_are_all_flat_has_its_place():
    from fastai_heatmaps.trust.sanity import draw_sanity
    curves = {'x': {'head': (np.nan, np.nan), 'all': (.2, .1)}}
    *_,ax = draw_sanity(torch.zeros(3, 8, 8), {'x': dict.fromkeys(['as it is', 'head', 'all'], torch.rand(4, 4))}, {'x': 'fade'}, curves, 'rank correlation')
    assert ax.get_xlim()[0]<0 and [o.get_text() for o in ax.get_xticklabels()]==['head', 'all']


def nan_map(acts, grads): return acts.mean(1)*np.nan

def test_maps_that_are_not_finite():
    "Of a model or a method that gives NaN: said in whole sentences, and drawn"
    learn = patch_learner(8)
    sanity,stability,focus = learn.sanity_check(method=nan_map, efficient=True),learn.heatmap_stability(method=nan_map),learn.heatmap_focus(method=nan_map, n=4)
    hm = learn.get_heatmaps(method=nan_map)
    inside = hm.inside(lambda i: np.pad(np.ones((8,8), np.uint8), 28))
    assert 'nothing can be said of them' in sanity.words and stability.words.startswith('Nothing can be said of nan_map: the maps are empty.')
    assert inside.words=='No map has any evidence.' and not focus.words.startswith('nothing')
    for f in (sanity, stability, focus, inside):
        assert 'nan%' not in f.words and ' of ,' not in f.words
        f.plot()


def test_one_line_errors():
    learn = patch_learner(8)
    for f in (learn.sanity_check, learn.heatmap_stability):
        with pytest.raises(ValueError, match='the list of methods is empty'): f(method=[])
    with pytest.raises(ValueError, match='epochs is 0; expected at least 1'): learn.sanity_check(labels=True, epochs=0)


def test_what_shuffled_labels_do_to_the_maps_is_said():
    f = patch_learner(8, bs=2).sanity_check(labels=True, epochs=1, stages=1)
    r = f.each['gradcam shuffled labels'].nanmean().item()
    assert f"the rank correlation with the maps of that model is {f'{r:.2f}'.replace('0.', '.', 1)} ± " in f.words


def test_long_names_and_wide_photos():
    "The titles take room of their own: the pictures stay as large"
    def wide(i): return PILImage.create(np.array(patch_picture(i))[:32])
    name = 'a class with an extremely long name that goes on and on'
    dls = DataBlock((ImageBlock, CategoryBlock), get_x=wide, get_y=lambda i: name+str(i%2), splitter=IndexSplitter(range(8))).dataloaders(list(range(12)), bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, patch_net(), loss_func=CrossEntropyLossFlat())
    for f,axes in ((learn.heatmap_stability(), lambda axs: axs[0]), (learn.check_heatmaps(), lambda axs: axs[0,:2])):
        axs = f.plot()
        fig = axs[0,0].figure
        fig.canvas.draw()
        for ax in axes(axs): assert ax.get_window_extent().width/fig.dpi>1.2


def test_stability_runs_as_many_photos_at_once_as_asked():
    learn,sizes = patch_learner(8),[]
    hook = learn.model[0][0].register_forward_pre_hook(lambda m, i: sizes.append(len(i[0])))
    learn.heatmap_stability(bs=2)
    hook.remove()
    assert max(sizes)==2

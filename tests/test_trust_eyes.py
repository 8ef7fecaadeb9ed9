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
    axs = draw_trust(['x'], [([(['x'], torch.zeros(3, 8, 8), None, 'black'), None, None, None], None, None)], [found])
    for ax in axs[-1]:
        lo,hi = ax.get_xlim()
        assert all(lo<=x<=hi for l in ax.lines for x in l.get_xdata())


def test_a_stage_whose_maps_are_all_flat_has_its_place():
    from fastai_heatmaps.trust.sanity import draw_sanity
    curves = {'x': {'head': (np.nan, np.nan), 'all': (.2, .1)}}
    *_,ax = draw_sanity(torch.zeros(3, 8, 8), {'x': dict.fromkeys(['as it is', 'head', 'all'], torch.rand(4, 4))}, curves, 'rank correlation')
    assert ax.get_xlim()[0]<0 and [o.get_text() for o in ax.get_xticklabels()]==['head', 'all']

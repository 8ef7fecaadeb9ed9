"What the checks of trust/ share: several methods on one pass, changed batches, similarity of maps, means with their errors."
import pickle

from scipy.stats import spearmanr

from shared import *
from fastai_heatmaps.core.method import get_method
from fastai_heatmaps.data.images import to_images
from fastai_heatmaps.learner.core import explain_by
from fastai_heatmaps.learner.run import shadow
from fastai_heatmaps.trust.findings import *


def by(learn, methods, **kwargs):
    run = shadow(learn)
    return explain_by(run, to_images(run.dls), [get_method(m) for m in methods], **kwargs)


def test_several_methods_give_what_each_gives_alone(learn):
    names = 'saliency gradcam activations guided_gradcam layercam'.split()
    hms = by(learn, names, cls='Red')
    assert [hm.method for hm in hms]==names
    for name,hm in zip(names, hms): torch.testing.assert_close(hm.maps, learn.get_heatmaps(cls='Red', method=name).maps)


def test_methods_at_a_layer_share_a_pass(learn):
    runs = []
    handle = learn.model[0][0].register_forward_hook(lambda m, i, o: runs.append(len(o)))
    by(learn, ['gradcam', 'layercam', 'activations'], layer=learn.model[0])
    one = len(runs)
    by(learn, ['gradcam'], layer=learn.model[0])
    handle.remove()
    assert one==len(runs)-one and sum(runs)==2*len(learn.dls.valid_ds)


def test_the_model_sees_the_changed_batch(learn):
    hm, = by(learn, ['gradcam'], cls='Red', change=partial(torch.flip, dims=(3,)))
    for i in range(len(hm)):
        maps,preds = model_heatmaps(learn.model, hm.images.batch(i)[0].flip(3), cls=learn.dls.vocab.o2i['Red'])
        torch.testing.assert_close(hm.maps[i], maps[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(hm.preds[i], preds[0].softmax(0))


def test_heatmaps_know_their_learner_but_do_not_pickle_it(learn, tmp_path):
    hm = learn.get_heatmaps()
    assert hm.learn is learn and hm[:2].learn is learn
    assert pickle.loads(pickle.dumps(hm)).learn is None
    hm = learn.get_heatmaps(out=tmp_path/'maps')
    assert hm.learn is learn and load_heatmaps(tmp_path/'maps').learn is None


@pytest.mark.parametrize('relu', [False, True]) # with ties and without
def test_rank_correlation_is_spearmans(relu):
    a,b = torch.randn(2, 3, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    if relu: a,b = a.relu(),b.relu()
    want = [[spearmanr(x.flatten(), y.flatten()).statistic for x,y in zip(*o)] for o in zip(a, b)]
    torch.testing.assert_close(rank_correlation(a, b), tensor(want).float())


def test_rank_correlation_of_maps_of_other_sizes():
    big = torch.arange(16.).view(1, 1, 4, 4)
    small = F.avg_pool2d(big, 2)
    assert rank_correlation(big, small)>.9 and rank_correlation([big[0]], [-small[0]])<-.9
    assert rank_correlation(big, torch.zeros(1, 1, 2, 2)).isnan()


def test_ssim():
    "Of the maps as they are drawn, so that their scale plays no part; two flat maps look the same"
    a,b = torch.rand(2, 2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(a, 5*a), torch.ones(2, 3))
    assert (ssim(a, b)<.5).all() and ssim(a, b).equal(ssim(b, a))
    assert ssim(0*a, 0*a).equal(torch.ones(2, 3)) and (ssim(a, 0*a)<.1).all()


def test_mean_and_its_error():
    v = tensor([[1.,3.],[2.,np.nan],[6.,6.],[np.nan,np.nan]]) # images are 2, 2, 6 and nothing
    mean,error = mean_error(v)
    assert abs(mean-10/3)<1e-6 and abs(error-np.std([2, 2, 6], ddof=1)/3**.5)<1e-6
    assert np.isnan(mean_error(tensor([np.nan]))[0]) and np.isnan(mean_error([1.])[1])


def test_differences_are_judged_image_by_image():
    "Both vary much from image to image, but one is always a little larger"
    a = torch.arange(10.)
    wobble = tensor([.1, .2]*5)
    assert differs(a+wobble, a) and not differs(a, a.flip(0)) and not differs(a[:1]+1, a[:1])


def test_maps_that_know_nothing():
    maps = torch.zeros(2, 3, 7, 5)
    assert random_maps(maps).equal(random_maps(maps)) and not random_maps(maps).equal(random_maps(maps, seed=1))
    c = centre_maps(maps)
    assert c.shape==maps.shape and c.flatten(2).argmax(2).eq(3*5+2).all() and c.allclose(c.flip(2)) and c.allclose(c.flip(3))
    assert [m.shape for m in centre_maps(list(maps))]==[(3,7,5)]*2 and [m.shape for m in random_maps(list(maps))]==[(3,7,5)]*2


def test_heatmaps_keep_no_learner_alive(pics):
    learn = pic_learner(pics)
    hm = learn.get_heatmaps()
    del learn
    gc.collect()
    assert hm.learn is None
    with pytest.raises(ValueError, match='not known or gone: pass it'): hm.faithfulness()


def test_numbers_as_text():
    says = {.934:'.93', -.071:'-.07', 1.:'1.00', .999:'1.00', 0.:'.00', -.004:'.00', np.nan:'?', -1.:'-1.00', 20.5:'20.50'}
    assert [short(x) for x in says]==list(says.values())
    assert with_error(.934, .021)=='.93 ± .02' and with_error(.934, np.nan)=='.93'


def test_lists_in_words():
    assert [listed(list(o)) for o in ('a', 'ab', 'abc')]==['a', 'a and b', 'a, b and c'] and listed('abc', ', and ')=='a, b, and c'
    assert by_method(dict(gradcam='.9', cam='.8'))=='.9 by gradcam and .8 by cam' and by_method(dict(cam='.8'))=='.8'
    assert [n_photos(1), n_photos(2, 2), n_photos(2, 3)]==['1 photo', '2 photos', '2 photos, all that there are']


def test_methods_by_name():
    "The second of the same name gets a number, and an option goes to all"
    names = named_methods(['gradcam', 'cam', 'gradcam'])
    assert [*names]==['gradcam', 'cam', 'gradcam 2'] and names['gradcam 2'].name=='gradcam'
    with pytest.raises(ValueError, match='empty'): named_methods([])


def test_maps_of_others():
    "Each once, and none its own; of one image there is no other"
    maps = torch.arange(5.).view(5, 1, 1, 1)
    got = torch.cat(of_others(maps)).flatten().tolist()
    assert sorted(got)==[0, 1, 2, 3, 4] and all(a!=b for a,b in enumerate(got))
    assert not of_others(maps[4:])[0].any()


def test_what_stands_after_plus_minus_is_said_once():
    f = Findings(pd.DataFrame(), '.93 ± .02 by cam.', {}, noop)
    assert f.words=='.93 ± .02 by cam. ± gives the standard error.' and Findings(pd.DataFrame(), '.93.', {}, noop).words=='.93.'

"What a user of the checks found who did not write them."
import pytest
from shared import *
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

@pytest.mark.slow
def test_maps_that_are_not_finite():
    "Of a model or a method that gives NaN: said in whole sentences, and drawn"
    learn = patch_learner(8)
    sanity,stability,focus = learn.sanity_check(method=nan_map, efficient=True),learn.heatmap_stability(method=nan_map),learn.heatmap_focus(method=nan_map, n=4)
    hm = learn.get_heatmaps(method=nan_map)
    inside = hm.inside(lambda i: np.pad(np.ones((8,8), np.uint8), 28))
    assert 'flat or not finite, and nothing can be said of them' in sanity.words
    assert stability.words.startswith('Nothing can be said of nan_map: the maps are flat or not finite.')
    assert inside.words=='No map has any evidence.' and not focus.words.startswith('nothing')
    check = learn.check_heatmaps(method=nan_map)
    assert '0 photos with a map decide nothing' in check.words and '8 of the maps of nan_map are not finite' in check.words and 'More photos' not in check.words
    for f in (sanity, stability, focus, inside, check):
        assert 'are flat,' not in f.words and 'Flat' not in f.words
        assert 'nan%' not in f.words and ' of ,' not in f.words
        f.plot()


def fails(f, says, **kwargs):
    with pytest.raises(ValueError) as e: f(**kwargs)
    assert says in str(e.value) and '\n' not in str(e.value), str(e.value)


def test_one_line_errors():
    learn = patch_learner(8)
    checks = learn.check_heatmaps, learn.sanity_check, learn.heatmap_focus, learn.heatmap_stability
    for f in checks:
        for n in ('8', None, 4.5, 0): fails(f, f'n is {n!r}; expected a whole number, at least 1', n=n)
        for seed in (None, 'a', 1.5, -1): fails(f, f'seed is {seed!r}; expected a whole number, at least 0', seed=seed)
        fails(f, "bs is 'a'; expected a whole number, at least 1", bs='a')
        fails(f, "no method 'gradcamm', did you mean 'gradcam' or ", method='gradcamm')
        fails(f, 'the list of methods is empty', method=[])
    fails(learn.sanity_check, 'epochs is 0; expected a whole number, at least 1', labels=True, epochs=0)
    for n in ('a', 2.5, None): fails(learn.sanity_check, f'stages is {n!r}; expected a whole number', stages=n)
    for n in ('a', 2.5, None): fails(learn.heatmap_stability, f'copies is {n!r}; expected a whole number', copies=n)
    for v in ('a', 0, None, math.nan, math.inf): fails(learn.heatmap_stability, f'noise is {v!r}; expected a positive number', noise=v)
    with pytest.raises(ValueError, match='of a class') as e: learn.check_heatmaps(method='?')
    assert len(str(e.value).splitlines())==len(heatmap_methods)+2, 'the table is there for who asks for it'


def test_one_line_errors_of_heatmaps(tmp_path):
    learn = patch_learner(8)
    hm = learn.get_heatmaps() # which know it while it lives
    gone,text = tmp_path/'no.png',tmp_path/'text.png'
    text.write_text('none')
    for masks in (None, 5, str(gone), gone, {}): fails(hm.inside, f'masks is {masks!r}; expected a list of masks or boxes, or a function', masks=masks)
    fails(hm.inside, f"the mask of image0: {str(gone)!r} cannot be opened: No such file", masks=[gone]*8)
    fails(hm.inside, f"the mask of image0: {str(text)!r} cannot be opened: it is no picture", masks=lambda i: text)
    fails(hm.inside, 'the mask of image0: it is None; expected a mask (H, W), or boxes', masks=[None]*8)
    fails(hm.inside, 'the mask of image0: it has the shape (3, 4, 5); expected a mask', masks=[np.zeros((3,4,5))]*8)
    fails(hm.inside, 'the mask of image0: its size is 10×64, and that of the picture that it lies on is 64×64', masks=[np.ones((10,64))]*8)
    for v in ('a', None, 0): fails(hm.inside, f'thresh is {v!r}; expected a part', masks=[np.ones((64,64))]*8, thresh=v)
    for o in (3, 'deletion'): fails(hm.faithfulness, f'learn is {o!r}; expected a Learner', learn=o)
    for seed in (None, 'a'): fails(hm.faithfulness, f'seed is {seed!r}; expected a whole number', seed=seed)
    for steps in (None, 2.5, 1): fails(hm.faithfulness, f'steps is {steps!r}; expected a whole number, at least 2', steps=steps)


def test_masks_in_anything_that_can_be_gone_through():
    hm = patch_learner(8).get_heatmaps()
    mask = np.pad(np.ones((8,8), np.uint8), 28)
    for masks in ([mask]*8, pd.Series([mask]*8, index=range(3, 11)), np.stack([mask]*8), (mask for _ in range(8))):
        assert hm.inside(masks).each['area'].tolist()==[[1/64]]*8


def test_shuffled_labels_of_a_set_smaller_than_a_batch():
    learn = patch_learner(8, bs=64)
    assert len(learn.dls.train)==0 and 'On shuffled labels, the loss went from' in learn.sanity_check(labels=True, epochs=1, stages=1).words


def test_a_class_with_an_odd_name():
    from fastai_heatmaps.trust.focus import _none_found
    assert "of 3 photos only 'only' has them" in str(_none_found(tensor([[1], [1], [0]]).bool(), 8, ['only']))


@pytest.mark.parametrize('size', [(32,96), (96,32), (64,64)])
def test_the_pictures_of_focus_fill_their_places(size):
    "Also those of wide and of tall photos: no gap is wider than a line of text"
    from fastai_heatmaps.trust.focus import _draw
    table = pd.DataFrame(dict(focus=[.9,.5,.5], focus_error=.1), index=['gradcam', 'uniform', 'activations'])
    pictures = [torch.zeros(3, *size).byte()]*3
    axs = _draw(table, pictures, torch.ones(3, 4).bool(), list('abc'), [[torch.rand(4, 4)]*3], {0:'fade'}, [torch.ones(3)])
    fig = axs[0].figure
    fig.canvas.draw()
    boxes = [ax.get_window_extent() for ax in axs[1:]] # two rows of three
    across = [b.x0-a.x1 for a,b in zip(boxes[:2], boxes[1:3])]
    down = [a.y0-b.y1 for a,b in zip(boxes[:3], boxes[3:])]
    assert max(across)<.4*fig.dpi and max(down)<.5*fig.dpi
    plt.close(fig)


def test_what_shuffled_labels_do_to_the_maps_is_said():
    f = patch_learner(8, bs=2).sanity_check(labels=True, epochs=1, stages=1)
    r = f.each['gradcam shuffled labels'].nanmean().item()
    assert f"the rank correlation with the maps of that model is {f'{r:.2f}'.replace('0.', '.', 1)} ± " in f.words


@pytest.mark.slow
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


# Two inputs: what is explained is what is changed

class TwoPatches(nn.Module):
    "The second picture's patch decides; the first picture has an encoder of its own, and a hundredth of the say"
    def __init__(self):
        super().__init__()
        self.first,_ = patch_net()
        self.second,self.head = patch_net()
        self.calls = []
    def forward(self, a, b):
        self.calls.append((a.detach().as_subclass(Tensor), b.detach().as_subclass(Tensor)))
        return self.head(.01*self.first(a)+self.second(b))

def two_patches(n=24):
    "Pairs whose first picture tells nothing of the class"
    block = DataBlock((ImageBlock, ImageBlock, CategoryBlock), n_inp=2, splitter=IndexSplitter(range(n)),
                      getters=[lambda i: patch_picture(1000+i//2), patch_picture, lambda i: ('red','blue')[i%2]])
    dls = block.dataloaders(list(range(n+4)), bs=8, num_workers=0, device='cpu')
    return Learner(dls, TwoPatches(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


@pytest.mark.slow
def test_check_of_several_inputs():
    learn = two_patches()
    found = {i:learn.check_heatmaps(input=i) for i in range(2)}
    assert all('Focus could not be measured: this model takes several inputs' in f.words for f in found.values())
    assert found[1].loc['gradcam','verdict']=='can be trusted' and found[0].loc['gradcam','verdict']!='can be trusted'
    assert [found[i].loc['gradcam','layer'] for i in range(2)]==['first', 'second']
    deletion = [found[i].loc['gradcam',['deletion','deletion_random']].tolist() for i in range(2)]
    assert deletion[1][0]<deletion[1][1]-.1, 'hiding the patch that decides lowers the score'
    assert abs(deletion[0][0]-deletion[0][1])<.05, 'hiding what decides nothing does not'
    alone = patch_learner().check_heatmaps()
    for k in ('sanity', 'noise'): assert found[1].loc['gradcam',k]==pytest.approx(alone.loc['gradcam',k], abs=.25)
    assert found[1].plot().size and not learn.model._forward_pre_hooks


@pytest.mark.parametrize('input', range(2))
def test_noise_and_mirror_go_to_the_input_that_is_explained(input):
    learn = two_patches(6)
    own = [pictures.as_subclass(Tensor) for pictures in learn.dls.valid.one_batch()[:2]]
    learn.model.calls.clear()
    hm = learn.heatmap_stability(input=input, copies=1, method='saliency')
    seen = [o for o in learn.model.calls if len(o[0])==6]
    for a,b in seen: torch.testing.assert_close((a,b)[1-input], own[1-input])
    mine = [o[input] for o in seen]
    assert torch.equal(mine[0], own[input]) and sum(torch.equal(o, own[input].flip(-1)) for o in mine)==1
    assert sum(0<(o-own[input]).abs().mean()<.05 for o in mine)==1
    assert hm.each['saliency noise'].shape==(6,1)


@pytest.mark.parametrize('input', range(2))
def test_pixels_of_the_input_that_is_explained_are_hidden(input):
    learn = two_patches(6)
    own = [pictures.as_subclass(Tensor) for pictures in learn.dls.valid.one_batch()[:2]]
    hm = learn.get_heatmaps(input=input)
    learn.model.calls.clear()
    found = hm.faithfulness(metrics=['deletion'], steps=2)
    for a,b in learn.model.calls[1:]: torch.testing.assert_close((a,b)[1-input], own[1-input])
    assert sum(o[input].eq(0).all().item() for o in learn.model.calls)==1, 'in the end all of it is hidden'
    hidden = own[:]
    hidden[input] = torch.zeros_like(own[0])
    with torch.no_grad(): last = learn.model(*hidden).softmax(1).gather(1, hm.cls)
    torch.testing.assert_close(found.each['deletion curve'][:,0,-1], last[:,0])


def test_sanity_of_the_input_that_is_explained():
    found = two_patches(8).sanity_check(input=1, stages=2)
    alone = patch_learner(8).sanity_check(stages=2)
    assert found['rank']['gradcam','head']==pytest.approx(alone['rank']['gradcam','head'], abs=.3)


def test_what_knows_no_several_inputs_says_so():
    learn = two_patches(8)
    fails(learn.heatmap_focus, 'this model takes several inputs: Focus is for models that take one photo')
    for f in (learn.check_heatmaps, learn.heatmap_stability, learn.sanity_check): fails(f, 'input is 2, and the model takes 2 inputs, 0 to 1', input=2)

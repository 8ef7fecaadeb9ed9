"May a heatmap be believed? Verdicts on Learners for which the answer is known."
import pickle, pytest
from shared import *
from test_no_trace import state, same
from test_interrupts import try_lines, n_lines
from fastai_heatmaps.core.method import get_method
from fastai_heatmaps.trust import check
from fastai_heatmaps.trust.check import Measured, Hiding, counted, measured, rules, says_best, says_trust, trust
from fastai_heatmaps.trust.findings import short


def patch_picture(i):
    "A red patch, or a blue one, somewhere on a ground of many colours"
    rng = np.random.default_rng(i)
    ground = rng.integers(60, 160, (16,16,3)).repeat(4, 0).repeat(4, 1)
    y,x = rng.integers(0, 48, 2)
    ground[y:y+16,x:x+16] = ([250,0,0],[0,0,250])[i%2]
    return PILImage.create(ground.astype(np.uint8))

def pooled(*layers): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)

def patch_net():
    "Its first two channels see red and blue, and count; six others see the ground, and do not"
    conv = nn.Conv2d(3, 8, 1)
    w = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    w[0],w[1] = tensor([1.,-1.,-1.]),tensor([-1.,-1.,1.])
    conv.weight.data,conv.bias.data = w[:,:,None,None],tensor([-.5]*2+[.1]*6)
    head = nn.Linear(8, 2)
    head.weight.data,head.bias.data = torch.zeros(2, 8),torch.zeros(2)
    head.weight.data[:,:2] = 120*tensor([[-1.,1.],[1.,-1.]]) # blue comes first in the vocab
    return nn.Sequential(nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(8)), pooled(head))

def patch_learner(n=24, model=None, block=CategoryBlock, y=lambda i: ('red','blue')[i%2], loss_func=None, bs=8):
    data = DataBlock((ImageBlock, block), get_x=patch_picture, get_y=y, splitter=IndexSplitter(range(n)))
    dls = data.dataloaders(list(range(n+4)), bs=bs, num_workers=0, device='cpu')
    return Learner(dls, model or patch_net(), loss_func=loss_func or CrossEntropyLossFlat(), metrics=accuracy)

@pytest.fixture(scope='module')
def found(): return patch_learner().check_heatmaps(method=['gradcam', 'hirescam', 'activations'])


@pytest.mark.slow
def test_a_map_that_is_right(found):
    "Of a net whose weights are known, and so is where it looks"
    words = found.words.split('\n\n')
    assert found.loc['gradcam','verdict']=='can be trusted'
    assert words[0].startswith('gradcam at layer 0 can be trusted here: it changes when the weights do')
    row = found.loc['gradcam']
    assert row.focus>.95 and row.sanity<.4 and row.deletion<row.deletion_random-.1 and row.noise>.9
    assert abs(row.focus_activations-.5)<.15
    for k in ('sanity', 'focus', 'deletion', 'deletion_random', 'noise'): assert short(row[k]) in words[0], k
    assert 'gets 1.00 ± .00 of them right (always the commonest class: .50)' in words[-1]
    assert 'could not be measured' not in found.words
    assert 'Measured on 24 photos, all that there are' in words[-1]


def test_equal_methods_have_no_winner(found):
    "With one linear layer after a mean, HiResCAM is Grad-CAM; and what cannot be trusted takes no part"
    line, = [o for o in found.words.split('\n\n') if o.startswith('By focus')]
    assert line.startswith('By focus there is no winner') and 'By deletion there is no winner' in line
    assert 'activations' not in line
    assert found.loc['hirescam','verdict']=='can be trusted'


def test_a_map_that_knows_no_class(found):
    line = found.words.split('\n\n')[2]
    assert found.loc['activations','verdict']=='cannot be trusted'
    assert line.startswith('activations at layer 0 cannot be trusted here: its map is the same for every class')


def test_sentences(found):
    assert all(o[0].isupper() or o.startswith(('gradcam', 'hirescam', 'activations')) for o in found.words.split('\n\n'))
    assert all(o.endswith('.') for o in found.words.split('\n\n')) and 'nan' not in found.words and '  ' not in found.words


def test_table_values_and_picture(found):
    assert list(found.table.index)==['gradcam', 'hirescam', 'activations']
    assert found.loc['gradcam','cost']==heatmap_methods['gradcam'].cost
    for k in ('sanity', 'focus', 'deletion', 'insertion', 'noise', 'flip', 'gini'):
        assert found.loc['gradcam',k]==pytest.approx(float(found.each[f'gradcam {k}'].nanmean()), abs=1e-5), k
    assert found.loc['gradcam','deletion_random']==pytest.approx(float(found.each['gradcam deletion random'].mean()), abs=1e-5)
    axs = found.plot()
    assert axs.shape==(4,5)
    assert [ax.get_title().split(':')[0] for ax in axs[-1]]==['sanity', 'focus', 'deletion', 'insertion', 'stability']
    assert axs[0,0].get_title()=='gradcam' and axs[2,0].get_title()=='activations'
    again = pickle.loads(pickle.dumps(found))
    assert again.words==found.words and again.plot().shape==(4,5)


def test_nothing_overlaps(found):
    "No text of the figure lies on another"
    fig = found.plot()[0,0].figure
    fig.canvas.draw()
    texts = fig.legends[0].get_texts()
    for ax in fig.axes: texts += [ax.title, *([ax.xaxis.label, *ax.get_yticklabels()] if ax.axison else [])]
    boxes = [t.get_window_extent() for t in texts if t.get_text()]
    assert len(boxes)>20
    for i,a in enumerate(boxes):
        for b in boxes[:i]: assert not a.overlaps(b)
    w,h = fig.canvas.get_width_height()
    assert all(b.x0>=0 and b.y0>=0 and b.x1<=w and b.y1<=h for b in boxes)


@pytest.mark.slow
def test_seed_and_batches(found):
    again = patch_learner(bs=5).check_heatmaps(method='gradcam')
    for k,v in again.each.items(): torch.testing.assert_close(v, found.each[k], rtol=1e-3, atol=1e-3, equal_nan=True)
    other = patch_learner().check_heatmaps(seed=1, n=20)
    ranks = other.each['gradcam sanity']
    assert len(ranks)==16 and 'Measured on 20 photos, in' in other.words and not torch.equal(ranks, again.each['gradcam sanity'])


@pytest.mark.slow
def test_too_few_photos():
    f = patch_learner().check_heatmaps(n=6)
    assert f.loc['gradcam','verdict']=='cannot be told'
    says = 'Whether gradcam at layer 0 can be trusted cannot be told: 6 photos with a map decide nothing, it takes at least 8.'
    assert f.words.startswith(says)
    some = patch_learner().check_heatmaps(n=9)
    assert some.loc['gradcam','verdict']!='cannot be trusted'
    one = patch_learner().check_heatmaps(patch_picture(3))
    assert one.loc['gradcam','verdict']=='cannot be told' and 'nan' not in one.words and 'Measured on 1 photo,' in one.words
    one.plot()


def fresh_net(seed=0):
    torch.manual_seed(seed)
    body = [o for c in (3, 16, 16) for o in (nn.Conv2d(c, 16, 3, 2, 1), nn.ReLU())]
    return nn.Sequential(nn.Sequential(*body), pooled(nn.Linear(16, 2)))


@pytest.mark.parametrize('seed', range(3))
def test_a_net_that_has_learned_nothing(seed):
    f = patch_learner(40, fresh_net(seed)).check_heatmaps(n=40)
    assert f.loc['gradcam','verdict']=='cannot be trusted'
    assert 'the model does hardly better than guessing' in f.words.split('\n\n')[0]


@pytest.mark.slow
def test_a_fresh_vision_learner(pics):
    learn = patch_learner(40)
    fresh = vision_learner(learn.dls, narrow18, pretrained=False, normalize=False)
    f = fresh.check_heatmaps()
    assert f.loc['gradcam','verdict']=='cannot be trusted' and '(a heatmap of guesses explains guesses)' in f.words


def others():
    one = nn.Sequential(patch_net()[0], pooled(nn.Linear(8, 1)))
    pixels = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    several,bce = MultiCategoryBlock(vocab=['blue','red']),BCEWithLogitsLossFlat()
    def mask(i): return PILMask.create((np.array(patch_picture(i))[...,0]>200).astype(np.uint8))
    return dict(
        multi = lambda: patch_learner(block=several, y=lambda i: [('red','blue')[i%2]], loss_func=bce),
        one_logit = lambda: patch_learner(loss_func=bce, model=one),
        numbers = lambda: patch_learner(block=RegressionBlock, y=lambda i: float(i%2), loss_func=MSELossFlat(), model=one),
        pixels = lambda: patch_learner(block=MaskBlock(['a','b']), y=mask, loss_func=CrossEntropyLossFlat(axis=1), model=pixels),
        one_class = lambda: patch_learner(block=CategoryBlock(vocab=['red']), y=lambda i: 'red', model=one),
        one_label = lambda: patch_learner(block=CategoryBlock(vocab=['blue','red']), y=lambda i: 'red'))

@pytest.mark.parametrize('kind,gone', [
    ('multi', []), ('one_logit', None), ('numbers', ['accuracy', 'Focus', 'Faithfulness']), ('pixels', ['accuracy', 'Focus']),
    ('one_class', ['accuracy', 'Focus']), ('one_label', ['accuracy', 'Focus'])])
@pytest.mark.slow
def test_other_learners(kind, gone):
    "What makes sense is measured, and what does not is named; nothing fails"
    learn = others()[kind]()
    f = learn.check_heatmaps(layer='0' if kind=='pixels' else None)
    missing = [o for o in ('accuracy', 'Focus', 'Faithfulness', 'Sanity', 'Stability') if f'{o} could not be measured' in f.words]
    if gone is not None: assert missing==gone, f.words
    assert 'nan' not in f.words and all(o.endswith('.') for o in f.words.split('\n\n'))
    if kind=='numbers': assert f.loc['gradcam','verdict']!='can be trusted'
    f.plot()


class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.body,self.head = patch_net()[0],nn.Linear(16, 2)
    def forward(self, x, y): return self.head(torch.cat([self.body(o).mean((2,3)) for o in (x,y)], 1))

def test_several_inputs():
    getters = [patch_picture, lambda i: patch_picture(i+2), lambda i: 'ab'[i%2]]
    data = DataBlock((ImageBlock, ImageBlock, CategoryBlock), n_inp=2, getters=getters, splitter=IndexSplitter(range(12)))
    dls = data.dataloaders(list(range(16)), bs=4, num_workers=0, device='cpu')
    torch.manual_seed(1)
    f = Learner(dls, TwoInputs(), loss_func=CrossEntropyLossFlat()).check_heatmaps(layer='body')
    assert 'Focus could not be measured' in f.words
    assert f.loc['gradcam','verdict']!='can be trusted' and np.isfinite(f.loc['gradcam','sanity'])


def test_errors(tmp_path):
    learn = patch_learner()
    wrong = [(dict(method='nope'), 'no method'), (dict(method=[]), 'empty'), (dict(layer='nope'), 'no layer'),
             (dict(n=0), 'n is 0'), (dict(bs=0), 'bs is 0'), (dict(nonsense=1), 'no option')]
    for kwargs,says in wrong:
        with pytest.raises(ValueError, match=says): learn.check_heatmaps(**kwargs)


@pytest.mark.slow
def test_items_without_labels():
    f = patch_learner().check_heatmaps([patch_picture(i) for i in range(20)])
    assert 'The accuracy could not be measured: the true classes of these photos are not known.' in f.words
    g = patch_learner().check_heatmaps([(patch_picture(i), ('red','blue')[i%2]) for i in range(20)])
    assert 'The model gets 1.00' in g.words and g.loc['gradcam','verdict']=='can be trusted'


# the rules

def m(mean, error=.02, n=20): return Measured(mean, error, n)
def hid(by=.2, by_centre=.1): return Hiding(m(.3), m(.5), m(.4), m(by), m(by_centre))
sure = {'model': dict(right=m(.9), guess=m(.5)),
        'class': dict(needs='gradients'),
        'sanity': dict(head=m(.1), all=m(.1)),
        'focus': dict(share=m(.9), blind=m(.5), more=m(.4), known=1.),
        'faithfulness': dict(deletion=hid(), insertion=hid()),
        'stability': dict(noise=m(.9), others=m(.2), more=m(.7))}

@pytest.mark.parametrize('rule,change,answer', [
    ('model', dict(), True), ('model', dict(right=m(.4)), False), ('model', dict(right=m(.52)), False),
    ('model', dict(right=m(.6, .07)), None), ('model', dict(right=m(.9, .02, 5)), None),
    ('class', dict(needs='activations'), False), ('class', dict(needs='model'), True),
    ('sanity', dict(), True), ('sanity', dict(head=m(.9)), False), ('sanity', dict(all=m(.9)), False),
    ('sanity', dict(head=m(.48)), None), ('sanity', dict(head=m(np.nan, np.nan, 0)), None),
    ('focus', dict(), True), ('focus', dict(share=m(.52), more=m(.02)), False), ('focus', dict(more=m(0.)), None),
    ('focus', dict(share=m(.62)), None), ('focus', dict(share=m(.5), known=.3), None),
    ('faithfulness', dict(), True), ('faithfulness', dict(deletion=hid(-.2)), False),
    ('faithfulness', dict(insertion=hid(.0)), True), ('faithfulness', dict(insertion=hid(by_centre=-.2)), None),
    ('faithfulness', dict(deletion=hid(.01), insertion=hid(.03)), None),
    ('stability', dict(), True), ('stability', dict(noise=m(.3)), False), ('stability', dict(noise=m(.52)), None),
    ('stability', dict(more=m(0.)), None)])
def test_rules(rule, change, answer):
    "Each by numbers on each side of its lines; and one no, or one that is open, decides the verdict"
    got,text = rules[rule](**{**sure[rule], **change})
    assert got is answer and text and not text.endswith('.')
    verdict,words = says_trust('x', {**sure, rule:{**sure[rule], **change}}, 20)
    assert verdict is answer
    begins = {True:'x can be trusted here: it changes when',
              False:f'x cannot be trusted here: {text}.',
              None:f'Whether x can be trusted cannot be told: {text}. More photos would help.'}
    assert words.startswith(begins[answer])


def test_what_must_have_been_asked():
    for gone,answer in (({'focus'}, True), ({'faithfulness'}, True), ({'focus', 'faithfulness'}, None), ({'sanity'}, None),
                        ({'model'}, None), ({'stability'}, True)):
        got,words = says_trust('x', {k:v for k,v in sure.items() if k not in gone}, 20)
        assert got is answer and words.endswith('.')
    assert 'too little could be measured' in says_trust('x', {'class': dict(needs='gradients')}, 20)[1]


@pytest.mark.parametrize('mean,error,n,line,want', [
    (.5, .1, 20, 0., True), (.5, .1, 20, .8, False), (.5, .1, 20, .65, None), (.5, .1, 7, 0., None),
    (.5, np.nan, 20, 0., None), (.5, 0., 20, .5, None)])
def test_above(mean, error, n, line, want): assert Measured(mean, error, n).above(line) is want


def test_a_winner_is_clearly_better():
    v = torch.linspace(.5, .9, 12)
    assert says_best('focus', dict(a=v-.2, b=v, c=v-.1), measured)=='By focus, b is ahead (.70; then c with .60).'
    assert says_best('deletion', dict(a=v-.2, b=v), measured, lower=True).startswith('By deletion, a is ahead (.50')
    noise = .1*tensor([1.,-1.]*6)
    assert 'no winner' in says_best('focus', dict(a=v+noise+.01, b=v), measured)
    assert 'no winner' in says_best('focus', dict(a=v[:3]+1, b=v[:3]), measured)


def test_passes_are_counted():
    model = nn.Conv2d(3, 4, 1)
    with counted(model) as n:
        model(torch.zeros(3, 3, 8, 8))
        deepcopy(model)(torch.zeros(2, 3, 16, 16)) # four times as large
    assert n==[11] and not model._forward_pre_hooks


def test_no_trace():
    learn = patch_learner()
    learn.model.train()
    before = state(learn.model, learn)
    with draws_nothing(): learn.check_heatmaps(n=8)
    same(before, state(learn.model, learn))


def test_one_bar_for_all(monkeypatch):
    "Where a person looks, over the five measures, and no other"
    bars,learn = [],patch_learner(10)
    monkeypatch.setattr(check, 'shows_bars', lambda run: True)
    monkeypatch.setattr(check, 'progress_bar', lambda o, leave: bars.append(list(o)) or o)
    learn.check_heatmaps(n=8)
    assert [[k for k,_ in o] for o in bars]==[['model', 'sanity', 'focus', 'faithfulness', 'stability']]
    assert hasattr(learn, 'progress')


def test_methods_of_the_same_name():
    f = patch_learner(10).check_heatmaps(method=['gradcam', 'gradcam'], n=10)
    assert list(f.table.index)==['gradcam', 'gradcam 2'] and 'gradcam 2 focus' in f.each


@pytest.mark.slow
def test_no_trace_after_an_interrupt(n_lines):
    learn = patch_learner()
    left,total = try_lines(lambda: learn.check_heatmaps(n=8), learn.model, learn, n=n_lines(12))
    assert not left and total>5000

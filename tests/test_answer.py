"A map of the answer: each place goes to the class with the most evidence there."
import pytest
from shared import *
from fastai_heatmaps.views.answer import evidence_above, winners, painted
from fastai_heatmaps.data.draw import add_legend, wrap_title
from matplotlib.colors import to_rgb
from test_no_trace import state, same as unchanged


class Colors(nn.Module):
    "Puts out one channel for each of three colours: how much of it is in a cell, and a linear head makes classes of them"
    def forward(self, x): return F.avg_pool2d(x, 8)

def color_learner(loss=None, block=CategoryBlock, label=None):
    "The score of a class is the mean of its colour, and of brightness, which speaks for all"
    names = ['blue','green','red'] # as fastai sorts them
    if label is None: label = 'red' if block is CategoryBlock else ['red']
    block = DataBlock((ImageBlock, block(vocab=names)), get_x=lambda o: squares(), get_y=lambda o: label, splitter=lambda o: ([0],[0]))
    dls = block.dataloaders([0], bs=1, num_workers=0, device='cpu')
    head = nn.Linear(3, 3, bias=False)
    with torch.no_grad(): head.weight.copy_(torch.eye(3).flip(0)+2)
    return Learner(dls, nn.Sequential(Colors(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)), loss_func=loss or CrossEntropyLossFlat())

def squares():
    "Red, green, blue and black"
    im = np.zeros((32,32,3), np.uint8)
    im[:16,:16,0] = im[:16,16:,1] = im[16:,:16,2] = 255
    return PILImage.create(im)


def layers(ax): return [o.get_array() for o in ax.images]
def legend(ax): return [o.get_text() for o in ax.get_legend().get_texts()]


def test_each_quarter_gets_its_color():
    "Evidence common to all, here brightness, colours nothing: black stays clear, and the shares are a third each"
    ax = color_learner().show_answer_map(squares(), alpha=.5)
    gray,rgba = layers(ax)
    assert gray.ndim==2 and rgba.shape==(32,32,4)
    at = [rgba[8,8],rgba[8,24],rgba[24,8]]
    assert len({tuple(o[:3]) for o in at})==3 and all(abs(o[3]-.5)<.1 for o in at) and rgba[28,28,3]<.03
    order = {to_rgb(p.get_facecolor()): t for p,t in zip(ax.get_legend().get_patches(), legend(ax))}
    for o,name in zip(at, ('red','green','blue')): assert next(t for c,t in order.items() if np.allclose(c, o[:3], atol=.01))==f'{name} 33%'


def test_named_classes_compete_with_each_other():
    ax = color_learner().show_answer_map(squares(), cls=['blue','red'])
    assert {o.split()[0] for o in legend(ax)}=={'blue','red'} and layers(ax)[1][8,24,3]<.03 # green is above neither


def test_labels_count_by_themselves():
    "Where classes do not exclude each other, nothing is taken off: all quarters with a colour are for all classes"
    learn = color_learner(BCEWithLogitsLossFlat(), block=MultiCategoryBlock)
    hm = learn.get_heatmaps([squares()], cls=[0,1,2], relu=False)
    assert torch.equal(evidence_above(hm), hm.maps[0]) and evidence_above(hm).min()>=0
    one = color_learner().get_heatmaps([squares()], cls=[0,1,2], relu=False)
    torch.testing.assert_close(evidence_above(one), one.maps[0]-one.maps[0].mean(0))
    learn.show_answer_map(squares())


def test_the_rest_is_gray():
    "What is won by classes without a colour of their own; and six have one"
    e = torch.zeros(9, 2, 3)
    e[3,:,0],e[7,:,1] = 2,1
    rgba = painted(e, [3], (2,3), .8)
    np.testing.assert_allclose(rgba[0,0], [*to_rgb('#4477AA'), .8], atol=1e-6)
    np.testing.assert_allclose(rgba[0,1], [*to_rgb('#888888'), .4], atol=1e-6)
    assert not rgba[:,2,3].any()
    assert len(winners(torch.eye(30).reshape(30, 5, 6), 0))==6


def test_axes_and_no_trace():
    learn,(fig,ax) = color_learner(),plt.subplots()
    learn.model.train()
    before = state(learn.model, learn)
    with draws_nothing(): assert learn.show_answer_map((squares(), 'red'), ctx=ax, layer='0') is ax
    unchanged(before, state(learn.model, learn))
    assert 'truth: red' in ax.get_title()


@pytest.mark.parametrize('layout', [None, 'compressed'])
@pytest.mark.parametrize('size,names', [((9,3), ['daisy 52%','missile 48%']), ((7,2.2), ['Staffordshire bullterrier 61%','german_shorthaired_pointer_dog 20%']+[f'class {i} 3%' for i in range(5)])])
def test_the_legend_lies_inside_the_axes(layout, size, names):
    "Beside the picture, in a figure of any kind: nothing is cut off, or lies on a neighbour"
    fig,axs = plt.subplots(1, 3, figsize=size, layout=layout)
    for ax in axs:
        show_image(torch.rand(3, 40, 60), ctx=ax)
        add_legend(ax, [f'C{i}' for i in range(len(names))], names)
        wrap_title(ax, ['Egyptian cat 0.12'])
    fig.draw_without_rendering()
    for ax in axs:
        place = ax.get_position(original=True).transformed(fig.transFigure)
        legend,title = ax.get_legend().get_window_extent(),ax.title.get_window_extent()
        picture_ends,_ = ax.transData.transform((59.5, 0))
        assert picture_ends<legend.x0 and legend.x1<=place.x1+1 and place.y0-1<=legend.y0 and legend.y1<=place.y1+1
        assert abs((title.x0+title.x1)/2-(ax.bbox.x0+picture_ends)/2)<1
        assert [o.get_text().replace('\n', ' ') for o in ax.get_legend().get_texts()][-1]==names[-1]


def test_without_names_of_classes():
    "All that the model puts out may win; numbers are no classes, however many are named"
    def unnamed(loss): return color_learner(loss, lambda vocab: TransformBlock(), 2)
    np.testing.assert_allclose(layers(unnamed(nn.CrossEntropyLoss()).show_answer_map(squares()))[1], layers(color_learner().show_answer_map(squares()))[1])
    assert {o.split()[0] for o in legend(unnamed(nn.CrossEntropyLoss()).show_answer_map(squares(), cls=[0,2]))}=={'0','2'}
    for cls in (None, [0], [0,1], [0,7]):
        with pytest.raises(ValueError, match='gives numbers, and none of them is an answer: use show_gradcam'): unnamed(nn.MSELoss()).show_answer_map(squares(), cls=cls)
    one = unnamed(nn.CrossEntropyLoss())
    one.model[1].append(nn.Linear(3, 1))
    with pytest.raises(ValueError, match='this model has one output'): one.show_answer_map(squares())


def test_what_makes_no_sense_is_refused(learn, pics):
    f = get_image_files(pics)[0]
    for kwargs,text in [(dict(method='activations'), 'asks for a class'), (dict(method='saliency'), 'looks at a layer'),
                        (dict(cls='Red'), 'at least two'), (dict(cls=['Red','Rod']), "no class 'Rod'")]:
        with pytest.raises(ValueError, match=text): learn.show_answer_map(f, **kwargs)
    with pytest.raises(ValueError, match='one image'): learn.show_answer_map([f])
    numbers = color_learner(MSELossFlat())
    with pytest.raises(ValueError, match='none of them is an answer'): numbers.show_answer_map(squares())


@pytest.mark.slow
def test_a_mosaic_of_photos(demo):
    "Of four named classes, each wins most in its own quarter of a mosaic"
    from sklearn.datasets import load_sample_image
    photos = [*map(demo_image, demo_labels), PILImage.create(load_sample_image('flower.jpg'))]
    a,b,c,d = [np.array(o.crop_pad(min(o.size)).resize((112,112))) for o in photos]
    mosaic = PILImage.create(np.block([[[a],[b]],[[c],[d]]]))
    names = ['Egyptian cat','espresso','missile','daisy']
    hm = demo.get_heatmaps([mosaic], cls=list(range(1000)), relu=False)
    e = evidence_above(hm)[[hm.vocab.index(n) for n in names]]
    top,won = F.interpolate(e[None], (8,8), mode='bilinear')[0].clamp(min=0).max(0)
    for i,(rows,cols) in enumerate([(slice(0,4),slice(0,4)),(slice(0,4),slice(4,8)),(slice(4,8),slice(0,4)),(slice(4,8),slice(4,8))]):
        sums = torch.zeros(4).index_add(0, won[rows,cols].flatten(), top[rows,cols].flatten())
        assert sums.argmax()==i and sums[i]>.6*sums.sum(), (names[i], sums)


@pytest.mark.slow
def test_named_classes_that_are_not_there_are_faint(demo):
    "Their evidence is measured on the scale of all classes"
    def strength(cls): return np.asarray(demo.show_answer_map(demo_image('rocket'), cls=cls).images[1].get_array())[...,3]
    there,not_there = strength(None),strength(['goldfish', 'great white shark'])
    assert there.max()>.7 and not_there.max()<there.max()/2


def test_wrong_arguments(demo):
    img = demo_image('cat')
    for kwargs in (dict(alpha=2), dict(alpha=None), dict(alpha='x')):
        with pytest.raises(ValueError, match='expected a number, 0 to 1'): demo.show_answer_map(img, **kwargs)
    for k in ('relu', 'topk', 'items'):
        with pytest.raises(TypeError, match=f"takes no '{k}'"): demo.show_answer_map(img, **{k: 1})
    assert demo.show_answer_map(img, method='?') is heatmap_methods

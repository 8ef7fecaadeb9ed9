"Boxes of regions by hand, to the pixel: on what the model saw, and on photos that were cropped, squished and padded."
import pickle
from shared import *
from fastai_heatmaps.data.draw import regions


def spots(*places, size=8):
    "A map (1, size, size) that is 1 in some cells, rows and columns, or another value"
    m = torch.zeros(1, size, size)
    for y,x,*v in places: m[0,y,x] = v[0] if v else 1.
    return m


def seen(*maps, size=64):
    "Heatmaps of a picture of 64×64 that the model saw as it is, `maps` (1, h, w) one for each class"
    hm = photo_heatmaps((size,size), torch.cat(maps), Resize(size))
    return hm.replace(cls=torch.arange(len(maps))[None], method='')


def drawn(ax):
    "The rectangles on `ax`: x1, y1, x2, y2 in pixels from the upper left corner of the picture"
    left,_,_,top = ax.images[0].get_extent()
    return [(o.get_x()-left, o.get_y()-top, o.get_x()-left+o.get_width(), o.get_y()-top+o.get_height()) for o in ax.patches]


two = spots((1,1), (1,2), (5,6,.6)) # two cells side by side, and a weaker one by itself


def test_two_blobs_two_boxes():
    "Along the cells: the one with more evidence first, with its share"
    found, = seen(two).boxes(on='input', interpolation='nearest', masks=True)
    assert isinstance(found, LabeledBBox) and isinstance(found.bbox, TensorBBox) and found.bbox.img_size==(64,64)
    assert found.bbox.tolist()==[[8,8,24,16], [48,40,56,48]] and found.lbl==['a', 'a']
    torch.testing.assert_close(found.scores, tensor([2/2.6, .6/2.6]))
    want = torch.zeros(2, 64, 64, dtype=torch.bool)
    want[0,8:16,8:24] = want[1,40:48,48:56] = True
    assert torch.equal(found.masks, want)
    assert seen(two).boxes(thresh=.61, on='input', interpolation='nearest')[0].bbox.tolist()==[[8,8,24,16]]
    assert seen(two).boxes(n=1, on='input', interpolation='nearest')[0].bbox.tolist()==[[8,8,24,16]]
    again = pickle.loads(pickle.dumps(found))
    assert again.bbox.tolist()==found.bbox.tolist() and torch.equal(again.masks, found.masks)


def test_corners_do_not_connect():
    "Regions hang together sideways, or up and down"
    found, = seen(spots((1,1), (2,2))).boxes(on='input', interpolation='nearest')
    assert found.bbox.tolist()==[[8,8,16,16], [16,16,24,24]]


@pytest.mark.parametrize('thresh', [.3, .5, .8])
def test_the_enlarged_map_by_formula(thresh):
    "A cell alone is a spot, after Catmull and Rom, and the box goes round the pixels above the part of its maximum"
    def weight(t): return np.where(t<1, 1.5*t**3-2.5*t**2+1, -.5*t**3+2.5*t**2-4*t+2)*(t<2)
    t = abs((np.arange(64)+.5)/8 - 3.5) # from the middle of cell 3, in cells
    strong = np.outer(weight(t), weight(t))>=thresh
    ys,xs = np.nonzero(strong)
    found, = seen(spots((3,3))).boxes(thresh, 'input', masks=True)
    assert found.bbox.tolist()==[[xs.min(), ys.min(), xs.max()+1, ys.max()+1]] and (found.masks[0].numpy()==strong).all()
    assert (xs.max()+1-xs.min()>8)==(thresh<.5)


def test_on_the_photo_by_hand():
    "A crop, a squish, and bars that are no part of the photo"
    left = [[[1.,0],[1,0]]]
    def box(hm, **kwargs): return hm.boxes(interpolation='nearest', **kwargs)[0]
    crop = photo_heatmaps((100,200), left, Resize(50)) # the model saw x from 50 to 150
    assert box(crop).bbox.tolist()==[[50,0,100,100]] and box(crop).bbox.img_size==(200,100)
    assert box(crop, on='input').bbox.tolist()==[[0,0,25,50]]
    right = photo_heatmaps((100,200), [[[0.,1],[0,1]]], Resize(50))
    assert box(right).bbox.tolist()==[[100,0,150,100]]
    assert box(photo_heatmaps((100,200), left, Resize(50, 'squish'))).bbox.tolist()==[[0,0,100,100]]
    bars = torch.zeros(1, 4, 4)
    bars[0,0],bars[0,1,0],bars[0,2,3] = 5,3,3
    pad = photo_heatmaps((50,100), bars, Resize(100, 'pad', pad_mode='zeros'))
    found = box(pad, masks=True)
    assert found.bbox.tolist()==[[0,0,25,25], [75,25,100,50]] and found.scores.tolist()==[.5,.5]
    assert found.masks.shape==(2,50,100) and found.masks.sum((1,2)).tolist()==[625,625]


def test_the_photo_as_it_is_drawn():
    "On a photo too, the boxes are those of the map that `show` draws there"
    hm = photo_heatmaps((120,200), torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(1)), Resize(50))
    m = hm.view(0, 'original')[1][0]
    ys,xs = np.nonzero(m.numpy()>=.5*float(hm.maps.max()))
    b = torch.cat([o.bbox.as_subclass(Tensor) for o in hm.boxes()])
    assert b[:,:2].amin(0).tolist()==[xs.min(), ys.min()] and b[:,2:].amax(0).tolist()==[xs.max()+1, ys.max()+1]


def test_signs_and_flat_maps():
    "Evidence against the class is in no box; a map without evidence for it has none, and a warning counts these"
    hm = seen(spots((1,1), (5,5,-3.)), spots((2,2,-1.)), spots(), spots((1,1,float('nan')), (4,4)))
    hm = hm.replace(vocab=list('abcd'), preds=torch.ones(1, 4)/4)
    with pytest.warns(UserWarning, match='3 of 4 maps have no evidence for their class, and no box'):
        found, = hm.boxes(on='input', interpolation='nearest', masks=True)
    assert found.bbox.tolist()==[[8,8,16,16]] and found.lbl==['a'] and found.scores.tolist()==[1.]
    with pytest.warns(UserWarning, match='1 of 1'): none, = seen(spots()).boxes(masks=True)
    assert none.bbox.shape==(0,4) and none.lbl==[] and none.scores.shape==(0,) and none.masks.shape==(0,64,64)
    assert [len(drawn(ax)) for ax in hm.show(boxes=True, interpolation='nearest')]==[1,0,0,0]


def test_classes_side_by_side():
    found, = seen(spots((1,1)), spots((5,5), (7,0,.9))).boxes(on='input', interpolation='nearest')
    assert found.lbl==['a', 'b', 'b'] and found.bbox[:,:2].tolist()==[[8,8], [40,40], [0,56]]
    assert found.scores[0]==1 and found.scores[1:].sum()==1


def test_drawn_where_they_are():
    "By show and plot, on the input and on the photo; a number is another part; boxes of one map do not depend on another's scale"
    hm = photo_heatmaps((64,128), torch.cat([two, spots((3,3,9.))]), Resize(64))
    hm = hm.replace(cls=tensor([[0,1]]), method='')
    for kw in (dict(), dict(on='original'), dict(same_scale=True), dict(interpolation='nearest')):
        on = kw.get('on', 'input')
        found, = hm.boxes(on=on, interpolation=kw.get('interpolation'))
        want = [tuple(o) for o in found.bbox.tolist()]
        for axs in (hm.show(boxes=True, **kw), hm.plot(boxes=True, **kw)[0,1:]):
            assert [pytest.approx(o) for o in want]==drawn(axs[0])+drawn(axs[1])
    assert len(drawn(hm.show(boxes=.7)[0]))==1 and not hm.show()[0].patches
    with pytest.raises(ValueError, match='thresh is 2; expected a part of the maximum, between 0 and 1'): hm.show(boxes=2)


def test_drawn_by_a_learner(learn, pics):
    img = sorted(pics.iterdir())[0]
    ax = learn.show_gradcam(img, boxes=True, relu=False)
    found, = learn.get_heatmaps([img], relu=False).boxes(on='input')
    assert [tuple(o) for o in found.bbox.tolist()]==[pytest.approx(o) for o in drawn(ax)]
    assert drawn(learn.compare_heatmaps(img, method='gradcam', relu=False, boxes=True)[1,0])==drawn(ax)
    axs = learn.plot_heatmap_grid(n=2, boxes=.9, seed=0)
    assert sum(len(ax.patches) for ax in axs.flat)>=2


def test_masks_and_boxes_go_back_into_inside(learn):
    "The evidence in the masks is the sum of the scores"
    hm = learn.get_heatmaps(method='activations')
    found = hm.boxes(masks=True, interpolation='nearest')
    energy = hm.inside([o.masks.any(0) for o in found], on='original').each['energy'][:,0]
    torch.testing.assert_close(energy, torch.stack([o.scores.sum() for o in found]), rtol=.03, atol=.01) # cells are cut at pixels
    assert (hm.inside([o.bbox for o in found], on='original').each['energy'][:,0]>=energy-1e-4).all()


def test_weak_labels(learn, pics):
    "fastai's blocks for detection take boxes and names as they are, and a result shows itself"
    files = sorted(pics.iterdir())
    hm = learn.get_heatmaps(files, method='activations')
    found = dict(zip(files, hm.boxes(n=2)))
    block = DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock), n_inp=1, splitter=IndexSplitter([0,1]), item_tfms=Resize(64, 'squish'),
                      get_y=[lambda o: found[o].bbox, lambda o: found[o].lbl])
    dls = block.dataloaders(files, bs=4, num_workers=0)
    assert set(dls.vocab)=={'#na#', *(name for o in found.values() for name in o.lbl)}
    _,bbox,lbl = dls.valid.one_batch()
    w,h = Image.open(files[0]).size
    boxes = found[files[0]].bbox.as_subclass(Tensor)
    torch.testing.assert_close(bbox[0,:len(boxes)].as_subclass(Tensor).cpu(), boxes*2/tensor([w,h,w,h])-1)
    dls.show_batch()
    ax = found[files[0]].show(ctx=show_image(Image.open(files[0])))
    assert len(ax.patches)==len(boxes) and ax.texts[0].get_text()==found[files[0]].lbl[0]


def test_sizes_differ_and_loaded(demo):
    "Photos of several sizes; without them there is nothing to measure on"
    hm = demo.get_heatmaps()
    for item,o in zip(hm.items, hm.boxes()): assert o.bbox.img_size==demo_image(item).size
    loaded = hm.replace(images=Images(idxs=[0,1,2], names=list('abc')))
    with pytest.raises(ValueError, match="on='original' needs the photos"): loaded.boxes()
    with pytest.raises(ValueError, match='loaded without their images'): loaded.boxes(on='input')


def test_bad_input():
    for kw,says in [(dict(thresh=0), 'thresh is 0; expected a part'), (dict(thresh=1), 'between 0 and 1'),
                    (dict(thresh='x'), "thresh is 'x'; expected a part"), (dict(thresh=None), 'thresh is None'),
                    (dict(n=0), 'n is 0; expected a whole number, at least 1'), (dict(n='3'), "n is '3'"), (dict(n=1.5), 'n is 1.5'),
                    (dict(interpolation='nearst'), "interpolation is 'nearst'; expected 'bicubic', 'nearest' or another"), (dict(on='photo'), "on is 'photo'; expected 'input'")]:
        with pytest.raises(ValueError, match=says) as e: seen(two).boxes(**kw)
        assert '\n' not in str(e.value)


def test_regions_of_nothing():
    for m in (torch.zeros(4, 4), -torch.ones(4, 4), torch.full((4,4), torch.nan)):
        boxes,shares,masks = regions(m, 0.)
        assert boxes.shape==(0,4) and shares.shape==(0,) and masks==[]


# Means of classes

def by_hand(hm, rows, js):
    "The mean of the maps `js` of the images `rows`, each divided by its largest value; the mean of what the model saw of them"
    maps = [hm.maps[i][j]/max(hm.maps[i][j].abs().max(), 1e-30) for i,j in zip(rows, js)]
    return torch.stack(maps).mean(0),torch.stack([hm.image(i) for i in rows]).mean(0)


def check_means(hm, means, want):
    "`want`: class -> its images, and which of their maps"
    assert means.cls.flatten().tolist()==sorted(want) and type(means).__mro__[1]==Heatmaps
    for m,(c,(rows,js)) in enumerate(sorted(want.items())):
        mean,photo = by_hand(hm, rows, js)
        torch.testing.assert_close(means.maps[m][0], mean)
        assert (means.image(m)-photo).abs().max()<=.5/255+1e-5
        torch.testing.assert_close(means.preds[m], hm.preds[rows].mean(0))
        assert means.info['photos'][m,0]==len(rows)
        assert means.title(m)[0][:2]==[f'{hm.name(c)},', f"mean of {len(rows)} photo{'s'*(len(rows)>1)}"]


@pytest.fixture
def six(learn):
    "Six images in batches of four, both classes explained, in different orders; the third and the last are taken for the other class"
    hm = learn.get_heatmaps(cls=[0,1], method='gradcam', relu=True)
    cls = tensor([[0,1],[1,0],[0,1],[1,0],[1,0],[0,1]])
    maps = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))*tensor([1e-6,1,10,100,1,1]).view(-1, 1, 1, 1)
    preds = tensor([[.9,.1],[.2,.8],[.3,.7],[.4,.6],[.8,.2],[.1,.9]])
    return hm.replace(maps=maps, cls=cls, preds=preds, targs=tensor([0,1,0,1,0,0]))


def test_means_by_formula(six):
    "No photo dominates, whatever the size of its scores: by the class explained, the true and the predicted one"
    check_means(six, six.mean(), {0:(range(6), [0,1,0,1,1,0]), 1:(range(6), [1,0,1,0,0,1])})
    check_means(six, six.mean('targ'), {0:([0,2,4,5], [0,0,1,0]), 1:([1,3], [0,0])})
    check_means(six, six.mean('pred'), {0:([0,4], [0,1]), 1:([1,2,3,5], [0,1,0,1])})
    assert six.mean('pred').asked is None and six.mean().targs is None


def test_means_of_one_class(six):
    "If only one class was explained, the photos of the others are left out, and a warning counts them"
    one = six.replace(cls=torch.zeros(6, 1).long(), maps=six.maps[:,:1])
    with pytest.warns(UserWarning, match='2 of 6 photos have no map of their true class, and are left out'): means = one.mean('targ')
    check_means(one, means, {0:([0,2,4,5], [0]*4)})
    check_means(one, one.mean(), {0:(range(6), [0]*6)})
    with pytest.raises(ValueError, match=r"no photo has a map of its true class: .*get_heatmaps\(cls='targ'\)"): one[[1,3]].mean('targ')
    free = one.replace(method='activations') # of no class: the one map stands for any
    check_means(free, free.mean('targ'), {0:([0,2,4,5], [0]*4), 1:([1,3], [0]*2)})


def test_flat_maps_are_counted(six):
    "They count as zeros, as do maps that are not finite; maps with both signs keep them"
    maps = six.maps.clone()
    maps[0],maps[2,0,0,0],maps[4] = 0,float('nan'),-1-maps[4]
    hm = six.replace(maps=maps)
    means = hm.mean('targ')
    rest = maps[5,0]/maps[5,0].max() + maps[4,1]/maps[4,1].abs().max()
    torch.testing.assert_close(means.maps[0,0], rest/4)
    assert means.title(0)[0]==['Blue_ish,', 'mean of 4 photos', '(2 of them without evidence)'] and len(means.title(1)[0])==2
    assert means.maps.min()>=-1 and means.maps.min()<0
    flat = hm[[0]].mean('targ')
    assert not flat.maps.any() and flat.title(0)[0][1:]==['mean of 1 photo', '(1 of them without evidence)']


def test_means_of_several_labels(six):
    "A photo counts in each of its classes"
    hm = six.replace(task='classes', targs=tensor([[1,1],[0,1],[0,0],[1,0],[0,1],[1,1]]), thresh=.35)
    check_means(hm, hm.mean('targ'), {0:([0,3,5], [0,1,0]), 1:([0,1,4,5], [1,0,0,1])})
    check_means(hm, hm.mean('pred'), {0:([0,3,4], [0,1,1]), 1:([1,2,3,5], [0,1,0,1])})


def test_means_of_numbers(six):
    hm = six.replace(task='numbers', targs=torch.rand(6, 2))
    check_means(hm, hm.mean(), {0:(range(6), [0,1,0,1,1,0]), 1:(range(6), [1,0,1,0,0,1])})
    for by in ('targ', 'pred'):
        with pytest.raises(ValueError, match="this model does not sort photos into classes: use by='cls'"): hm.mean(by)


def test_means_of_pixels(learn):
    "A map of single pixels ends where its scale ends: a few pixels that outshine all others do not dim the rest"
    hm = learn.get_heatmaps(method='saliency', cls='targ')
    tops = [float(np.quantile(m[0].abs().numpy(), .995)) for m in hm.maps]
    want = torch.stack([(m[0]/top).clamp(max=1) for m,top in zip(hm.maps, tops)])[hm.targs==0].mean(0)
    torch.testing.assert_close(hm.mean('targ').maps[0,0], want)


def test_means_of_several_sizes(demo):
    "What is of another size is stretched to the size of the first"
    hm = demo.get_heatmaps(cls='tabby').replace(maps=[torch.full((1,2,3), 2.), torch.eye(4)[None,:2], torch.ones(1, 2, 3)])
    means = hm.mean()
    assert means.maps.shape==(1,1,2,3) and means.image(0).shape==hm.image(0).shape and means.maps.max()<=1


def test_means_are_heatmaps(six, tmp_path):
    "Shown, plotted, saved, cut, pickled, and boxed as others are"
    means = six.mean('targ')
    ax = means.show(1, boxes=True, colorbar=True)
    assert ax.get_title()=='Red,\nmean of 2 photos' and ax.patches
    titles = [ax.get_title() for ax in means.plot()[0]]
    assert titles==['', 'Blue_ish,\nmean of 4 photos', '', 'Red,\nmean of 2 photos']
    assert means._repr_png_().startswith(b'\x89PNG')
    rows = pd.read_csv(means.save(tmp_path))
    assert rows.cls.tolist()==['Blue_ish', 'Red'] and rows.item.tolist()==['mean of 4 photos', 'mean of 2 photos']
    assert len(list(tmp_path.glob('*.png')))==6
    assert means[1].title(0)==means.title(1)==pickle.loads(pickle.dumps(means)).title(1)
    with pytest.raises(ValueError, match="pass on='input'"): means.boxes()


def test_means_without_photos(six):
    "A warning says so, and the maps are shown alone"
    hm = six.replace(images=Images(idxs=range(6), names=list('abcdef')))
    with pytest.warns(UserWarning, match='the photos are not at hand, so the mean maps are shown alone'): means = hm.mean()
    assert torch.equal(means.maps, six.mean().maps)
    img = means.image(0)
    assert img.shape==(3,222,222) and img.min()==img.max()>.9
    means.show()


def test_means_leave_no_trace(six):
    state = copy(six.learn.model.state_dict())
    with draws_nothing(): six.mean('targ')
    assert all(torch.equal(v, state[k]) for k,v in six.learn.model.state_dict().items())


def test_means_read_in_batches(six, monkeypatch):
    "Each photo is read once, class by class, in batches of the DataLoader's size"
    sizes,part = [],Images.part
    def watched(self, rows):
        res = part(self, rows)
        sizes.append((res.idxs, res.dl.bs))
        return res
    monkeypatch.setattr(Images, 'part', watched)
    six.mean('targ')
    assert sizes==[([0,2,4,5,1,3], 4)]


def test_bad_means(six):
    with pytest.raises(ValueError, match="by is 'class'; expected 'cls'"): six.mean('class')
    with pytest.raises(ValueError, match="by='targ' needs the true classes"): six.replace(targs=None).mean('targ')
    with pytest.raises(ValueError, match='there are no heatmaps'): six[[]].mean()


def test_numbers_without_names(six):
    "They are called by their place"
    hm = six.replace(task='numbers', vocab=None, targs=None)
    assert hm.mean().title(0)[0][0]=='0,' and set(sum((o.lbl for o in hm.boxes(on='input')), []))<={'0','1'}

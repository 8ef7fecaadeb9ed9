"""The share of the evidence in masks and boxes, on maps whose score is known by hand.

Quantus 0.6.0 gives the same on the maps of `test_random_maps_by_formula`: its RelevanceMassAccuracy is our energy, and its PointingGame our pointing, with abs=False and normalise=False. It is asked
for the positive part, since it divides signed maps by their sum, which may be near 0: its shares then reach 15. It refuses flat maps, and has no IoU. It is not a dependency of the tests."""
import pickle
from shared import *
from fastai_heatmaps.trust.findings import short
from fastai_heatmaps.trust.inside import box_mask, mask_in, cells_of

metrics = ['energy', 'pointing', 'best IoU', 'IoU']


@pytest.fixture(scope='module')
def seen(pics):
    "Heatmaps of six pictures, which the model saw as 64×64, cropped from larger photos"
    return pic_learner(pics).get_heatmaps(method='activations')


def given(hm, maps): return hm.replace(maps=maps.float(), cls=hm.cls[:,:1].expand(-1, maps.shape[1]))
def boxes(n=6, b=(8,16,40,48)): return [list(b)]*n
def mask(b=(8,16,40,48), size=(64,64)):
    x1,y1,x2,y2 = b
    res = torch.zeros(size, dtype=torch.bool)
    res[y1:y2,x1:x2] = True
    return res


def check(found, **want):
    "The column 'value', by hand"
    torch.testing.assert_close(tensor(found.loc[list(want)]['value'].tolist()), tensor([float(o) for o in want.values()]), rtol=1e-4, atol=1e-5)


# ---- maps whose score is known

@pytest.mark.parametrize('box', [(8,16,40,48), (0,0,64,32), (63,63,64,64)])
def test_perfect_inverted_and_flat(seen, box):
    m,area = mask(box).float(),mask(box).float().mean()
    def score(o): return given(seen, o.expand(6, 1, 64, 64)).inside(boxes(b=box), on='input')
    check(score(m), energy=1, pointing=1, **{'best IoU':1, 'IoU':1})
    check(score(1-m), energy=0, pointing=0, **{'best IoU':0, 'IoU':0})
    flat = score(torch.full((64,64), 7.))
    check(flat, energy=area, pointing=area, **{'best IoU':area, 'IoU':area})
    assert np.allclose(flat['uniform'], area)


def test_random_maps_by_formula(seen):
    "Each metric as its paper has it, in numpy; signed maps count with their positive part"
    rng = np.random.default_rng(0)
    maps,masks = rng.normal(size=(6,1,64,64)),rng.random((6,64,64))>.7
    found = given(seen, tensor(maps)).inside(list(masks), thresh=.37, on='input')
    pos = np.maximum(maps[:,0], 0)
    def iou(part):
        cut = pos>=part*pos.max((1,2), keepdims=True)
        return np.array([(c&m).sum()/(c|m).sum() for c,m in zip(cut, masks)])
    energy = (pos*masks).sum((1,2))/pos.sum((1,2))
    hit = np.array([m.flat[p.argmax()] for p,m in zip(pos, masks)])
    check(found, energy=energy.mean(), pointing=hit.mean(), **{'best IoU':max(iou(t/100).mean() for t in range(1, 101)), 'IoU':iou(.37).mean()})
    assert np.allclose(found.each['energy'][:,0], energy, atol=1e-5) and np.allclose(found.loc['energy','value_error'], energy.std(ddof=1)/6**.5, atol=1e-6)
    assert np.allclose(found['uniform'], masks.mean(), atol=1e-6)


def test_coarse_maps_lie_evenly_on_their_cells(seen):
    "A cell of 32×32 that a mask covers by a quarter has a quarter of its evidence there"
    maps = tensor([[[2.,0],[1,1]]]).expand(6, 1, 2, 2)
    found = given(seen, maps).inside(boxes(b=(0,0,16,16)), on='input')
    check(found, energy=2*.25/4, pointing=1, IoU=16*16/(3*32*32)) # above half of the maximum are three cells
    check(given(seen, maps).inside(boxes(b=(0,0,15,16)), on='input'), pointing=0) # the middle of the first cell is just outside


def test_several_brightest_cells_count_by_their_share(seen):
    maps = tensor([[[1.,1],[0,1]]]).expand(6, 1, 2, 2)
    check(given(seen, maps).inside(boxes(b=(0,0,64,32)), on='input'), pointing=2/3)


def test_a_map_without_evidence_is_left_out(seen):
    maps = mask().float().expand(6, 1, 64, 64).clone()
    maps[0],maps[1],maps[2,0,0,0] = 0,-maps[1],torch.nan
    found = given(seen, maps).inside(boxes(), on='input')
    check(found, energy=1, pointing=1, IoU=1)
    assert found.each['energy'][:,0].isnan().tolist()==[True]*3+[False]*3 and 'On 3 images' in found.words and '3 more have no evidence' in found.words
    nothing = given(seen, maps*0).inside(boxes(), on='input')
    assert nothing['value'].isna().all() and 'o map has any evidence' in nothing.words


# ---- baselines

def test_the_spot_in_the_middle(seen):
    maps = torch.rand(6, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    def score(b): return given(seen, maps).inside(boxes(b=b), on='input')['centre']
    y = (np.arange(64)+.5)/64-.5
    spot = np.exp(-(y[:,None]**2+y**2)/(2*.25**2))
    for b in (16,16,48,48),(0,0,20,20):
        m = mask(b).numpy()
        cut = spot>=.5*spot.max()
        assert np.allclose(score(b)[['energy','pointing','IoU']], [(spot*m).sum()/spot.sum(), m[32,32], (cut&m).sum()/(cut|m).sum()], atol=1e-5)


# ---- masks and boxes

def test_boxes_are_the_masks_of_their_pixels(seen):
    maps = torch.rand(6, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    hm,two = given(seen, maps),[[8,16,40,48], [30,30,64,50], [0,0,0,0]]
    want = hm.inside([mask((8,16,40,48))|mask((30,30,64,50))]*6).table
    for o in two,tensor(two),np.array(two),TensorBBox(tensor(two).float()),[tensor(b) for b in two]:
        pd.testing.assert_frame_equal(hm.inside([o]*6, on='input').table, want)
    pd.testing.assert_frame_equal(hm.inside(boxes(), on='input').table, hm.inside([mask()]*6).table)
    pd.testing.assert_frame_equal(hm.inside(tensor(boxes()), on='input').table, hm.inside([mask()]*6).table) # a tensor (n, 4)


def test_what_a_mask_may_be(seen, tmp_path):
    m,hm = mask(),given(seen, torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    grey = Image.fromarray((m.numpy()*255).astype(np.uint8))
    grey.save(tmp_path/'m.png')
    grey.convert('RGB').save(tmp_path/'rgb.png')
    grey.convert('1').save(tmp_path/'one.png')
    palette = Image.fromarray(m.numpy().astype(np.uint8)*3, 'P') # as in Pascal VOC: the third class of a palette
    palette.putpalette([0,0,0, 10,20,30, 30,20,10, 90,0,0])
    palette.save(tmp_path/'p.png')
    want = hm.inside([m]*6).table
    kinds = [m.numpy(), m.float(), m[None], m[...,None].numpy(), TensorMask(m.long()), grey, PILMask(grey), *[tmp_path/f'{o}.png' for o in ('m','rgb','one','p')], str(tmp_path/'m.png')]
    for o in kinds: pd.testing.assert_frame_equal(hm.inside([o]*6).table, want)
    pd.testing.assert_frame_equal(hm.inside(torch.stack([m]*6)).table, want)
    asked = []
    pd.testing.assert_frame_equal(hm.inside(lambda item: asked.append(item) or m).table, want)
    assert set(asked)==set(hm.items)
    pd.testing.assert_frame_equal(hm[0].inside(m).table, hm[0].inside([m]).table) # one image, one mask


@pytest.mark.parametrize('masks,on,error', [
    (lambda hm: [mask()]*5, None, 'there are 5 masks for 6 images'),
    (lambda hm: [mask()]*5+[mask(size=(64,63))], None, r'the mask of .*png: its size is 64×63, and that of the picture that it lies on is 64×64'),
    (lambda hm: [mask(size=(64,63))]*6, None, r"the mask of .*png: its size is 64×63, and may it lie on what the model saw, 64×64 \(height × width\), or on the photo, \d+×\d+\? Pass on='input' or on='original'$"),
    (lambda hm: boxes(), None, "boxes have no size, and may it lie"),
    (lambda hm: [mask()]*5+[mask().long()+1], None, r'it has the values 1, 2, and which of them is the object\?'),
    (lambda hm: [np.zeros((2,64,64))]*6, 'input', r"it has the shape \(2, 64, 64\); expected a mask \(H, W\), or boxes \(m, 4\)"),
    (lambda hm: boxes(b=(40,16,8,48)), 'input', 'its box 40, 16, 8, 48 ends before it begins; expected x1, y1, x2, y2'),
    (lambda hm: boxes(b=(-.5,-.5,.2,.9)), 'input', 'is not in pixels'),
    (lambda hm: boxes(b=(70,0,90,9)), 'input', 'lies outside of the picture, which is 64×64'),
    (lambda hm: [[]]*6, 'input', 'no mask has a pixel that the model saw'),
    (lambda hm: boxes(), 'photo', "on is 'photo'; expected 'input', what the model saw, or 'original'")])
def test_errors_are_one_line(seen, masks, on, error):
    with pytest.raises(ValueError, match=error) as e: seen.inside(masks(seen), on=on)
    assert '\n' not in str(e.value)


def test_thresh_is_a_part(seen):
    for t in 0,1.1,-1:
        with pytest.raises(ValueError, match='thresh is'): seen.inside([mask()]*6, thresh=t)


# ---- the photo

left = [[[1.,0],[1,0]]]


def test_a_crop_by_hand():
    "A photo of 100×200 becomes 50×50: its middle half, made smaller. What was cut away is neither object nor background"
    hm = photo_heatmaps((100,200), left, Resize(50)) # the model saw x from 50 to 150
    check(hm.inside([mask((0,0,100,100), (100,200))]), energy=1, pointing=1, IoU=1) # half of it is out of sight
    check(hm.inside([mask((100,0,200,100), (100,200))]), energy=0, pointing=0, IoU=0)
    found = hm.inside([[75,0,125,50]], on='original')
    check(found, energy=.25*.5*2, pointing=0, IoU=25*50/(50*100+25*50))
    assert np.allclose(found['uniform'], .25)
    pd.testing.assert_frame_equal(hm.inside([mask((12,0,37,25), (50,50))]).table, hm.inside([[12,0,37,25]], on='input').table) # by its size, on what the model saw
    with pytest.raises(ValueError, match='no mask has a pixel that the model saw'): hm.inside([[0,0,50,100]], on='original')


def test_a_squish_by_hand():
    hm = photo_heatmaps((100,200), left, Resize(50, 'squish'))
    check(hm.inside([[50,0,150,100]], on='original'), energy=.5, pointing=0, IoU=1/3) # the middle of the left cells is at x = 50, and 49 is not in the box
    check(hm.inside([[49,0,150,100]], on='original'), pointing=1)


def test_padding_is_no_part_of_the_photo():
    "A photo of 50×100 stands in 100×100 with bars above and below: the evidence there does not count"
    bars = torch.zeros(1, 4, 4)
    bars[0,0],bars[0,1,0] = 5,1
    hm = photo_heatmaps((50,100), bars, Resize(100, 'pad', pad_mode='zeros'))
    check(hm.inside([[0,0,25,25]], on='original'), energy=1, pointing=1, IoU=1)


def test_no_cell_is_skipped():
    "A photo of 20×20 became 60×60, so that nine cells of a map share a pixel"
    one = torch.zeros(1, 60, 60)
    for y,x in (31,32),(30,30),(32,31):
        one.zero_()[0,y,x] = 1
        hm = photo_heatmaps((20,20), one, Resize(60))
        check(hm.inside([mask((10,10,11,11), (20,20))]), energy=1, pointing=1, IoU=1/9)
        check(hm.inside([mask((11,10,12,11), (20,20))]), energy=0, pointing=0)


def test_a_photo_that_is_what_the_model_saw():
    "Boxes need no `on` then; where the photo only has the same size, they do"
    hm = photo_heatmaps((50,50), left, Resize(50))
    check(hm.inside([[0,0,25,50]]), energy=1)
    zoomed = photo_heatmaps((50,50), left, CropPad(25), Resize(50))
    with pytest.raises(ValueError, match='boxes have no size'): zoomed.inside([[0,0,25,50]])
    with pytest.raises(ValueError, match='it has the size of both'): zoomed.inside([mask((0,0,25,50), (50,50))])
    check(zoomed.inside([mask((0,0,25,50), (50,50))], on='original'), energy=1)


# ---- what comes back

def test_a_row_for_each_class(seen):
    gen = torch.Generator().manual_seed(0)
    maps = torch.rand(6, 2, 8, 8, generator=gen)
    hm = given(seen, maps).replace(cls=tensor([[0,1]]).expand(6, 2))
    found = hm.inside([mask()]*6)
    assert found.index.names==['class','metric'] and len(found)==8
    for j,name in enumerate(hm.vocab):
        alone = given(seen, maps[:,[j]]).inside([mask()]*6)
        pd.testing.assert_frame_equal(found.table.xs(name), alone.table)
        assert f'{name}: On 6 images, {short(alone.loc["energy","value"])} of the evidence lies inside' in found.words
    assert set(hm.replace(cls=tensor([[0,1]]*5+[[1,0]])).inside([mask()]*6).index.get_level_values(0))=={'class 1','class 2'}


def test_maps_of_several_sizes(seen):
    maps = [torch.rand(1, s, s+1, generator=torch.Generator().manual_seed(s)) for s in (3,4,5,6,7,64)]
    found = seen.replace(maps=maps).inside([mask()]*6)
    for i,m in enumerate(maps): assert np.allclose(found.each['energy'][i], seen[i].replace(maps=m[None]).inside([mask()]).each['energy'])


def test_findings_say_draw_and_pickle(seen):
    maps = mask().float().expand(6, 1, 64, 64)
    found = given(seen, maps).inside(boxes(), on='input')
    assert found.words.startswith('On 6 images, 1.00 of the evidence lies inside, against .25 for a uniform map (clearly more)')
    assert list(found.index)==metrics and list(found.columns)==['value','value_error','uniform','centre']
    again = pickle.loads(pickle.dumps(found))
    for o in found,again:
        axs = o.plot(n=3)
        assert len(axs.flat)==3 and all('inside 1.00, uniform .25' in ax.get_title() for ax in axs.flat)
    ax = axs.flat[0]
    lines = np.concatenate([p.vertices for p in ax.collections[-1].get_paths()])
    assert np.allclose([*lines.min(0), *lines.max(0)], [7.5, 15.5, 39.5, 47.5], atol=.51) # the outline lies on the box's edges
    assert 'Pointing is' in given(seen, maps)[0].inside(mask()).words


def test_the_outline_on_a_photo():
    hm = photo_heatmaps((100,200), left, Resize(50))
    ax = hm.inside([[75,0,125,50]], on='original').plot().flat[0]
    lines = np.concatenate([p.vertices for p in ax.collections[-1].get_paths()])
    assert np.allclose([*lines.min(0), *lines.max(0)], [74.5, -.5, 124.5, 49.5], atol=.51)


def test_heatmaps_without_their_images(seen):
    with pytest.raises(ValueError, match='loaded without their images'): Heatmaps(seen.maps, seen.cls, seen.preds).inside([mask()]*6)


def test_no_heatmaps(seen):
    with pytest.raises(ValueError, match='there are no heatmaps to measure'): seen[[]].inside([])

"tta=True: maps and predictions are averages over six views, each brought back to where the picture was."
from shared import *
from test_no_trace import state, same
from fastai_heatmaps.core.moves import Move, moves, moved, moved_back, mean_of_views
from fastai_heatmaps.cli.main import main


def head(c, out=2): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, out))


class Left(nn.Module):
    "Multiplies the left half of what it gets by 1 and the right half by 3: a model that knows left from right"
    def forward(self, x):
        by = torch.ones(x.shape[-1])
        by[x.shape[-1]//2:] = 3
        return x*by


def test_moves_go_together_with_their_mirror_images():
    every = [Move(False, 0), *moves]
    assert len(every)==len(set(every))==6
    for o in every: assert o._replace(mirror=not o.mirror) in every and o._replace(by=-o.by) in every


@pytest.mark.parametrize('size', [(56,56), (84,56), (30,41), (5,9), (1,1)])
def test_moved_by_hand(size):
    "Each pixel is where it should be, and those from outside are a reflection"
    x = torch.randn(2, 3, *size)
    h,w = size
    for move in moves:
        down,right = round(move.by*h),round(move.by*w)
        at = x.numpy()[...,::-1] if move.mirror else x.numpy()
        padded = np.pad(at, ((0,0), (0,0), (abs(down),)*2, (abs(right),)*2), mode='reflect')
        want = padded[..., abs(down)-down:abs(down)-down+h, abs(right)-right:abs(right)-right+w]
        assert np.array_equal(moved(x, move), want)


def test_whole_cells_and_a_mirror_come_back_exactly():
    m = torch.randn(2, 3, 28, 56)
    for cell in (1, 8): # pixels
        x = m.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        for move in moves:
            small = moved(x, move)[...,::cell,::cell] # cells of the moved picture
            back,seen = moved_back(small, move, x.shape[-2:])
            assert torch.equal(back[...,seen], m[...,seen])
            assert seen.sum()==(28-bool(move.by))*(56-2*bool(move.by))


def test_parts_of_cells_come_back_interpolated():
    "A straight slope stays one; by hand: a quarter of a cell to the right is .25 of the neighbour"
    m = torch.arange(7.).expand(1, 1, 7, 7)
    back,seen = moved_back(m, Move(False, 1/28), (224,224))
    torch.testing.assert_close(back[0,0,0], tensor([.25, 1.25, 2.25, 3.25, 4.25, 5.25, 6.])) # the last one has no neighbour
    assert seen.all() # all centres are still inside
    spike = torch.zeros(1, 1, 7, 7)
    spike[...,3,3] = 1
    back,_ = moved_back(spike, Move(False, -1/28), (224,224))
    torch.testing.assert_close(back[0,0,3:5,3:5], tensor([[.75*.75, .75*.25], [.75*.25, .25*.25]]))


def test_cells_that_left_the_picture_do_not_count():
    m,rest = torch.full((1,1,56,56), 2.),[torch.full((1,1,56,56), float(10+i)) for i in range(5)]
    mean = mean_of_views(m, rest, (56,56))[0,0]
    values = [2, 10, 11, 12, 13, 14]
    assert mean[30,30]==pytest.approx(np.mean(values))
    assert [(o.mirror, o.by>0) for o in moves]==[(False, True), (False, False), (True, False), (True, True), (True, False)]
    assert mean[20,0]==np.mean([2, 10, 12, 14]) # 11 went to the left; 13 in the mirror, where the left edge is the right one, to the right
    assert mean[0,0]==np.mean([2, 10, 12]) # and 14 up


@pytest.mark.parametrize('method', ['gradcam', 'hirescam', 'layercam', 'activations', 'gradient_x_input', 'saliency'])
def test_equivariant_net_has_its_plain_map(method):
    "A net of single pixels and a mean moves its map along with the picture"
    set_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh()), head(4))
    x = torch.randn(2, 3, 56, 28)
    ask = dict(cls=[0,1], method=method, relu=False)
    (plain,_),(steady,_) = [model_heatmaps(net, x, tta=tta, **ask) for tta in (False,True)]
    torch.testing.assert_close(steady, plain, rtol=1e-5, atol=1e-7)


def test_left_and_right_by_hand():
    "The average of a net that counts the right half three times, worked out view by view; scores too, and what is predicted"
    net = nn.Sequential(Left(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2, bias=False)))
    net[1][2].weight.data = tensor([[1.], [-1.]])
    x = torch.rand(1, 1, 4, 28)
    by = torch.ones(28)
    by[14:] = 3
    total,count,scores = np.zeros((4,28)),np.zeros((4,28)),[]
    for mirror in (False,True):
        for d in (0, 1, -1): # pixels to the right; 4 rows are too few to go down
            row = x[0,0].numpy()[:,::-1] if mirror else x[0,0].numpy()
            row = np.pad(row, ((0,0), (1,1)), mode='reflect')[:,1-d:29-d]*by.numpy() # = the activations
            scores.append(row.mean())
            for j in range(28): # column j of the picture is column k of the view
                k = (27-j if mirror else j)+d
                if 0<=k<28:
                    total[:,j] += row[:,k] # Grad-CAM: the gradient of a mean is the same everywhere, 1/112
                    count[:,j] += 1
    maps,got = model_heatmaps(net, x, cls=0, layer='0', tta=True)
    np.testing.assert_allclose(maps[0,0].numpy(), total/count/112, rtol=1e-5)
    np.testing.assert_allclose(got[0].numpy(), [np.mean(scores), -np.mean(scores)], rtol=1e-5)
    against,_ = model_heatmaps(net, x, cls=1, layer='0', tta=True)
    assert not against.any() and against.signbit().all() # evidence against the class is left out after averaging, and known to have been there


def test_evidence_is_averaged_before_what_speaks_against_is_left_out(demo):
    x = demo.dls.test_dl([demo_image('cat')]).one_batch()[0].as_subclass(Tensor)
    signed,kept = [model_heatmaps(demo.model, x, 0, relu=relu, tta=True)[0] for relu in (False, True)]
    assert signed.min()<0
    torch.testing.assert_close(kept, signed.clamp(min=0))


@pytest.mark.parametrize('method', ['gradcam', 'activations', 'gradcam++', 'layercam', 'saliency', 'xgradcam', 'eigencam', 'finercam', 'occlusion', 'cam', 'legrad', 'guided_backprop', 'scorecam'])
def test_mirrored_photo_has_the_mirrored_map(method):
    "But for random noise or masks, which are not mirrored"
    set_seed(3)
    net = net_for(method)
    x = torch.randn(1, 3, 64, 64)
    ask = dict(method=method, relu=False, **quick.get(method, {}))
    (a,p),(b,q) = [model_heatmaps(net, o, tta=True, **ask) for o in (x, x.flip(-1))]
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    top = a.abs().max()
    assert (b.flip(-1)-a).abs().max()<=1e-3*top
    if method in ('gradcam', 'saliency', 'activations'): # which the plain map does not promise
        a,b = [model_heatmaps(net, o, **ask)[0] for o in (x, x.flip(-1))]
        assert (b.flip(-1)-a).abs().max()>.01*a.abs().max()


def test_exactly_on_a_real_model(demo):
    "Up to 1e-5 of the map's maximum, with the class that the averaged predictions name"
    x = demo.dls.test_dl([demo_image('cat')]).one_batch()[0].as_subclass(Tensor)
    a,b = [model_heatmaps(demo.model, o, tta=True)[0] for o in (x, x.flip(-1))]
    assert (b.flip(-1)-a).abs().max()<=1e-5*a.max()


def test_predictions_are_averages_of_probabilities(learn, pics):
    "As get_preds gives them for each view; and the predicted class is theirs"
    learn.model.eval()
    xb,_ = learn.dls.valid.one_batch()
    with torch.no_grad():
        want = torch.stack([learn.model(o).softmax(1) for o in (xb, *[moved(xb, m) for m in moves])]).mean(0)
    hm = learn.get_heatmaps(tta=True)
    torch.testing.assert_close(hm.preds[:len(xb)], want.as_subclass(Tensor), rtol=1e-4, atol=1e-6)
    assert torch.equal(hm.cls[:,0], hm.preds.argmax(1)) and (hm.preds-learn.get_heatmaps().preds).abs().max()>1e-4


def test_six_passes_and_no_more(learn):
    ran = []
    hook = learn.model.register_forward_hook(lambda m, i, o: ran.append(len(o)))
    learn.get_heatmaps(cls=[0,1], tta=True)
    hook.remove()
    assert ran==[4]*6+[2]*6


def test_of_each_batch_and_image_alone(learn):
    whole = learn.get_heatmaps(tta=True)
    parts = [learn.get_heatmaps(dl=learn.dls.test_dl([o]), tta=True).maps for o in learn.dls.valid_ds.items]
    close(whole.maps, torch.cat(parts))


def test_the_same_everywhere(learn, pics):
    "show_*, grids and comparisons pass it on, and leave no trace"
    f = get_image_files(pics).sorted()[0]
    before = state(learn.model, learn)
    want = learn.get_heatmaps(f, tta=True).maps[0,0]
    assert (want-learn.get_heatmaps(f).maps[0,0]).abs().max()>.01*want.max()
    def shown(ax): return torch.as_tensor(np.asarray(ax.images[-1].get_array()))
    axs = [learn.show_gradcam(f, tta=True), learn.plot_heatmap_grid([f], tta=True).flat[1]]
    axs += list(learn.compare_heatmaps(f, method=['gradcam', 'gradcam'], tta=True).flat[1:3])
    by_layer = learn.compare_heatmaps(f, layer=['0.6', '0.7'], tta=True)
    for ax in axs: torch.testing.assert_close(shown(ax), want, rtol=1e-4, atol=1e-6)
    for ax,l in zip(by_layer.flat[1:], ['0.6', '0.7']): torch.testing.assert_close(shown(ax), learn.get_heatmaps(f, layer=l, tta=True).maps[0,0], rtol=1e-4, atol=1e-6)
    same(before, state(learn.model, learn))


def test_layers_are_fused_view_by_view(learn):
    hm = learn.get_heatmaps(layer=['0.6', '0.7'], tta=True)
    assert hm.maps.shape[-2:]==(4,4) and hm.layer=='0.6, 0.7'


def test_another_run(learn, tmp_path):
    "A folder knows whether its maps are averages"
    learn.get_heatmaps(out=tmp_path/'maps', tta=True)
    assert json.loads((tmp_path/'maps'/'manifest.json').read_text())['run']['tta'] is True
    torch.testing.assert_close(learn.get_heatmaps(out=tmp_path/'maps', tta=True).maps, learn.get_heatmaps(tta=True).maps)
    with pytest.raises(ValueError, match='another run: tta was True and is False'): learn.get_heatmaps(out=tmp_path/'maps')


class Redness(nn.Module):
    "A class for each pixel: how red it is"
    def __init__(self): super().__init__(); self.body,self.last = nn.Conv2d(3, 4, 3, padding=1),nn.Conv2d(4, 2, 1)
    def forward(self, x): return self.last(self.body(x))


def test_a_class_for_each_pixel_is_brought_back_before_it_is_scored():
    "A mask lies where the photo is: the map of a corner stays in that corner, in the mirror too"
    set_seed(0)
    net,x = Redness(),torch.randn(1, 3, 56, 56)
    w = net.body.weight.data
    w.copy_((w+w.flip(-1))/2) # so that the net itself does not know left from right
    mask = torch.zeros(56, 56)
    mask[:20,:20] = 1
    maps,_ = model_heatmaps(net, x, cls=0, layer='body', score=in_mask(mask), method='hirescam', relu=False, tta=True)
    assert maps[0,0,:20,:20].abs().min()>0
    far = maps[0,0].clone()
    far[:20,:20] = 0
    assert not far.any()
    plain,_ = model_heatmaps(net, x, cls=0, layer='body', score=in_mask(mask), method='hirescam', relu=False)
    torch.testing.assert_close(maps[0,0,4:16,4:16], plain[0,0,4:16,4:16], rtol=1e-4, atol=1e-8) # a conv moves its output along

def test_several_pictures_move_together():
    "Of two inputs, the one explained and the other make the same move"
    seen = []
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.body,self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),nn.Linear(4, 2)
        def forward(self, a, b):
            seen.append((a, b))
            return self.head(self.body(a).mean((2,3))-self.body(b).mean((2,3)))
    a,b = torch.randn(2, 1, 3, 56, 56)
    set_seed(0)
    net = Two()
    for input in (0,1):
        seen.clear()
        model_heatmaps(net, (a, b), cls=0, input=input, tta=True)
        runs = [o for o in seen if len(o[0])==1][-5:]
        for (x,y),m in zip(runs, moves): assert torch.equal(x.detach(), moved(a, m)) and torch.equal(y.detach(), moved(b, m))


def test_numbers_keep_their_sign(pics):
    block = DataBlock((ImageBlock, RegressionBlock), get_items=get_image_files, get_y=lambda o: float(label(o)=='Red'), splitter=IndexSplitter(range(6)), item_tfms=Resize(64))
    learn = vision_learner(block.dataloaders(pics, bs=4, num_workers=0, device='cpu'), narrow18, pretrained=False, normalize=False, n_out=1)
    learn.model[1][-1].weight.data = -learn.model[1][-1].weight.data.abs()
    hm = learn.get_heatmaps(tta=True)
    assert hm.task=='numbers' and hm.maps.max()<0 # what makes a number smaller is evidence, too


def test_points_are_refused(pics):
    block = DataBlock((ImageBlock, PointBlock), get_items=get_image_files, get_y=lambda o: tensor([[10.,20.]]), splitter=IndexSplitter(range(6)), item_tfms=Resize(64))
    learn = vision_learner(block.dataloaders(pics, bs=4, num_workers=0, device='cpu'), narrow18, pretrained=False, normalize=False)
    learn.get_heatmaps()
    with pytest.raises(ValueError, match='^tta=True averages over mirrored images.*leave it out$'): learn.get_heatmaps(tta=True)


def test_no_pictures():
    with pytest.raises(ValueError, match='this method explains pictures'):
        model_heatmaps(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(2, 4), cls=0, method='gradient_x_input', tta=True)


def test_numbers_that_a_method_reports_are_averaged(learn, pics):
    f = get_image_files(pics).sorted()[0]
    hm = learn.get_heatmaps(f, 'Red', 'integrated_gradients', steps=3, tta=True)
    x = learn.dls.test_dl([f]).one_batch()[0].as_subclass(Tensor)
    def reported(o):
        other = learn.get_heatmaps(dl=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(o, tensor([1])), 1), cls='Red', method='integrated_gradients', steps=3)
        return first(other.info.values())[0,0]
    want = torch.stack([reported(o) for o in (x, *[moved(x, m) for m in moves])]).mean()
    assert first(hm.info.values())[0,0]==pytest.approx(float(want), rel=1e-4)


@pytest.mark.slow
def test_command(learn, pics, tmp_path, capsys):
    "--tta of gradcam, as numbers, and of grid"
    learn.export(tmp_path/'export.pkl')
    f = str(get_image_files(pics).sorted()[0])
    assert main(['gradcam', str(tmp_path/'export.pkl'), f, '--trust', '--tta', '--format', 'npz', '--out', str(tmp_path/'maps')])==0
    torch.testing.assert_close(load_heatmaps(tmp_path/'maps').maps, learn.get_heatmaps(f, tta=True).maps, rtol=1e-4, atol=1e-6)
    assert main(['grid', str(tmp_path/'export.pkl'), f, '--trust', '--tta', '--out', str(tmp_path/'grid.png')])==0
    capsys.readouterr()

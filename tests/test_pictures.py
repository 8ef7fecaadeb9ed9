"What is drawn is where it belongs, in the right colours, and nothing is cut off."
import pytest
from conftest import *


def render(ax):
    "The pixels of the picture in `ax`: (H, W, 3), one for each of the image's"
    fig = ax.figure
    fig.canvas.draw()
    buf = np.asarray(fig.canvas.buffer_rgba())[...,:3]
    x0,y0,x1,y1 = ax.get_window_extent().extents.round().astype(int)
    return buf[buf.shape[0]-y1:buf.shape[0]-y0, x0:x1].astype(float)


def exact_axes(w, h):
    "Axes of w×h pixels, so that a pixel of the image is a pixel of the figure"
    fig = plt.figure(figsize=(w/100, h/100), dpi=100)
    return fig.add_axes([0,0,1,1])


@pytest.mark.parametrize('h,w,gh,gw', [(352,352,11,11), (96,192,3,6), (200,150,7,5), (64,64,1,1)])
def test_cells_lie_on_the_image(h, w, gh, gw):
    "Each cell, drawn with nearest, covers its own share of the image to the pixel"
    for i,j in {(0,0), (gh-1,gw-1), (gh//2,gw//3)}:
        hmap = torch.zeros(gh, gw)
        hmap[i,j] = 1
        ax = show_overlay(torch.zeros(3, h, w), hmap, exact_axes(w, h), alpha=1, cmap='gray', interpolation='nearest')
        lit = render(ax)[...,0]>128
        ys,xs = np.where(lit)
        assert abs(ys.min()-i*h/gh)<=1 and abs(ys.max()+1-(i+1)*h/gh)<=1
        assert abs(xs.min()-j*w/gw)<=1 and abs(xs.max()+1-(j+1)*w/gw)<=1


@pytest.mark.parametrize('h,w,gh,gw', [(352,352,11,11), (96,192,3,6)])
def test_bilinear_has_no_half_cell_shift(h, w, gh, gw):
    "The centre of mass of one lit cell, interpolated, is the middle of the cell, and the map is that of torch's `align_corners=False`"
    hmap = torch.zeros(gh, gw)
    i,j = gh//2,gw//2
    hmap[i,j] = 1
    got = render(show_overlay(torch.zeros(3, h, w), hmap, exact_axes(w, h), alpha=1, cmap='gray'))[...,0]/255
    ys,xs = np.mgrid[:h,:w]
    assert abs((got*ys).sum()/got.sum()-((i+.5)*h/gh-.5))<1 and abs((got*xs).sum()/got.sum()-((j+.5)*w/gw-.5))<1
    want = F.interpolate(hmap[None,None], (h,w), mode='bilinear', align_corners=False)[0,0].numpy()
    assert np.abs(got-want).max()<.1 and np.abs(got-want).mean()<.01


def test_the_photo_shines_through():
    img = torch.rand(3, 60, 80)
    px = render(show_overlay(img, torch.zeros(2,2), exact_axes(80, 60), alpha=0))/255
    assert np.abs(px-img.permute(1,2,0).numpy()).max()<.02


def test_a_bright_mark_is_under_its_evidence():
    "A model that sees only bright pixels: its heatmap, as drawn over a rectangular photo, is on the mark"
    conv = nn.Conv2d(3, 1, 16, 16, bias=False)
    conv.weight.data.fill_(1/768)
    model = nn.Sequential(nn.Sequential(conv), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2, bias=False)))
    model[1][2].weight.data = tensor([[1.],[-1.]])
    x = torch.zeros(1, 3, 96, 160)
    x[...,32:48,112:128] = 1
    maps,_ = model_heatmaps(model, x, cls=0)
    px = render(show_overlay(x[0], maps[0,0], exact_axes(160, 96), alpha=1, cmap='gray', interpolation='nearest'))[...,0]
    assert px[32:48,112:128].min()>200 and (px>50).sum()<=18*18


def test_colours():
    "Red for and blue against, white at zero; the same for every panel, also one with evidence of one kind only"
    hm = Heatmaps(tensor([[[[-1.,0.],[0.,2.]], [[0.,1.],[1.,1.]]]]), tensor([[0,1]]), tensor([[.9,.1]]), images=Images([0], [0]))
    hm.image = lambda i: torch.zeros(3, 8, 8)
    axs = hm.show()
    assert [ax.images[1].get_cmap().name for ax in axs]==['RdBu_r']*2
    assert [ax.images[1].get_clim() for ax in axs]==[(-2,2), (-1,1)]
    assert [ax.images[1].get_clim() for ax in hm.show(same_scale=True)]==[(-2,2)]*2
    assert [ax.images[1].get_cmap().name for ax in hm.show(cmap='jet')]==['jet']*2


def test_one_scale_across_a_grid(learn):
    own,one = [learn.plot_heatmap_grid(n=4, seed=0, cls='Red', same_scale=o) for o in (False, True)]
    tops = [[ax.images[1].get_clim()[1] for ax in axs.flat if len(ax.images)>1] for axs in (own, one)]
    assert len(set(tops[0]))==4 and len(set(tops[1]))==1 and max(tops[0])==tops[1][0]


def test_titles(learn):
    hm = learn.get_heatmaps(cls='Red')
    hm.preds,hm.targs = tensor([[.2,.8],[.2,.8],[.9,.1]]),tensor([1,0,1])
    assert hm.title(0)==(['Red 0.80\xa0✓', 'truth: Red'], 'green')
    assert hm.title(1)==(['Red 0.80\xa0✗', 'truth: Blue_ish'], 'red')
    assert hm.title(2)==(['Red 0.10', 'predicted: Blue_ish 0.90\xa0✗', 'truth: Red'], 'red')
    assert hm.title(2, truth=False)==(['Red 0.10', 'predicted: Blue_ish 0.90\xa0✗'], 'red')
    assert hm.show(0).get_title().splitlines()==hm.title(0)[0]
    assert Heatmaps(hm.maps, hm.cls, hm.preds).title(0)==(['1 0.80'], 'black')
    hm.maps = hm.maps*0
    assert 'no evidence' in hm.title(0)[0][-1]
    hm.maps[0] = float('nan')
    assert 'not finite' in hm.title(0)[0][-1]
    hm.show(0).figure.canvas.draw()


@pytest.mark.parametrize('n,k', [(1,1), (3,1), (5,2), (8,1)])
def test_no_title_is_cut(pics, n, k):
    "Every title, however long, lies inside the figure and does not reach its neighbour"
    learn = pic_learner(pics, bs=8)
    hm = learn.get_heatmaps(list(get_image_files(pics))[:n], cls=['Red','Blue_ish'][:k])
    hm.vocab = ['a very long name of a breed, such as the American $taffordshire $terrier \\frac', 'Red']
    hm.targs = tensor([i%2 for i in range(n)])
    for axs in (hm.plot(), np.atleast_1d(hm.show(0))):
        fig = axs.flat[0].figure
        for dpi in (72, 100):
            fig.set_dpi(dpi)
            fig.canvas.draw()
            whole = fig.bbox
            boxes = [ax.title.get_window_extent() for ax in axs.flat if ax.get_title()]
            assert len(boxes)>=k
            for b in boxes: assert b.x0>=whole.x0-1 and b.x1<=whole.x1+1 and b.y0>=whole.y0-1 and b.y1<=whole.y1+1
            for a in range(len(boxes)):
                for b in range(a): assert not boxes[a].overlaps(boxes[b])


def test_what_is_drawn_on_is_returned(learn, pics):
    f = get_image_files(pics)[0]
    fig,axs = plt.subplots(1, 2)
    assert learn.show_gradcam(f, ctx=axs[0]) is axs[0]
    assert list(learn.show_gradcam(f, cls=[0,1], ctx=axs))==list(axs)
    assert len(plt.get_fignums())==1
    assert learn.show_gradcam(f).figure is not fig
    assert len(learn.show_gradcam(f, topk=2))==2


def test_each_image_is_read_once(learn):
    hm,read = learn.get_heatmaps(cls=[0,1])[:2],[]
    image = hm.image
    hm.image = lambda i: read.append(i) or image(i)
    hm.show(1)
    assert read==[1]
    hm.plot()
    assert read==[1, 0, 1]


def test_grid_layout(learn):
    assert learn.plot_heatmap_grid(n=4, seed=25).shape==(2,4) # four photos, each beside its heatmap
    assert learn.plot_heatmap_grid(n=2, topk=2).shape==(2,3)
    assert learn.plot_heatmap_grid(n=3, ncols=1).shape==(3,2)
    assert learn.plot_heatmap_grid(n=99).shape==(3,4)
    assert learn.plot_heatmap_grid(learn.dls.valid_ds.items[0]).shape==(1,2)
    hm = learn.get_heatmaps()[0]
    hm.maps,hm.cls = hm.maps.expand(-1, 10, -1, -1),hm.cls.expand(-1, 10)
    axs = hm.show()
    assert len(axs)==10 and axs[0].figure.get_figwidth()<=12.1 # rows of four


def test_a_seed_chooses_the_same_photos(learn):
    def titles(seed): return [ax.get_title() for ax in learn.plot_heatmap_grid(n=4, seed=seed).flat]
    assert titles(3)==titles(3) and any(titles(3)!=titles(s) for s in range(4, 9))


def test_a_picture_of_itself(learn):
    hm = learn.get_heatmaps()
    png = hm._repr_png_()
    assert Image.open(io.BytesIO(png)).size[0]>500
    assert 'Heatmaps (6, 1, 2, 2)' in repr(hm)


def test_indexing(learn):
    hm = learn.get_heatmaps()
    assert len(hm[1:4])==3 and len(hm[-1])==1 and len(hm[[0,5]])==2 and len(hm[hm.targs==0])==int((hm.targs==0).sum())
    torch.testing.assert_close(hm[[4,2]].maps, hm.maps[[4,2]])
    assert hm[[4,2]].items==[hm.items[4], hm.items[2]]
    torch.testing.assert_close(hm[4].image(0), hm.image(4))
    with pytest.raises(IndexError): hm[6]
    assert len(list(hm))==6

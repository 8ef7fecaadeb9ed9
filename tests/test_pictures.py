"What is drawn is where it belongs, in the right colours, and nothing is cut off."
import pytest
from shared import *
from fastai_heatmaps.data.draw import wrap_title


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
        ax = show_overlay(torch.zeros(3, h, w), hmap, exact_axes(w, h), alpha=1, cmap='gray', interpolation='nearest', style='even')
        lit = render(ax)[...,0]>128
        ys,xs = np.where(lit)
        assert abs(ys.min()-i*h/gh)<=1 and abs(ys.max()+1-(i+1)*h/gh)<=1
        assert abs(xs.min()-j*w/gw)<=1 and abs(xs.max()+1-(j+1)*w/gw)<=1


@pytest.mark.parametrize('h,w,gh,gw', [(352,352,11,11), (96,192,3,6)])
@pytest.mark.parametrize('how', ['bilinear', 'bicubic'])
def test_an_enlarged_cell_has_not_moved(h, w, gh, gw, how):
    "The centre of mass of one lit cell, interpolated, is the middle of the cell, and the map is that of torch's `align_corners=False`"
    hmap = torch.zeros(gh, gw)
    i,j = gh//2,gw//2
    hmap[i,j] = 1
    got = render(show_overlay(torch.zeros(3, h, w), hmap, exact_axes(w, h), alpha=1, cmap='gray', interpolation=how, style='even'))[...,0]/255
    ys,xs = np.mgrid[:h,:w]
    assert abs((got*ys).sum()/got.sum()-((i+.5)*h/gh-.5))<1 and abs((got*xs).sum()/got.sum()-((j+.5)*w/gw-.5))<1
    want = F.interpolate(hmap[None,None], (h,w), mode=how, align_corners=False, antialias=True)[0,0].clip(0, 1).numpy() # matplotlib's 'catrom'
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
    px = render(show_overlay(x[0], maps[0,0], exact_axes(160, 96), alpha=1, cmap='gray', interpolation='nearest', style='even'))[...,0]
    assert px[32:48,112:128].min()>200 and (px>50).sum()<=18*18


def test_colours():
    "Red for and blue against, nothing at zero; the same for every panel, also one with evidence of one kind only"
    hm = Heatmaps(tensor([[[[-1.,0.],[0.,2.]], [[0.,1.],[1.,1.]]]]), tensor([[0,1]]), tensor([[.9,.1]]), images=Images([0], [0]))
    hm.image = lambda i, *args: torch.zeros(3, 8, 8)
    axs = hm.show()
    assert [ax.images[1].get_cmap().name for ax in axs]==['coolwarm']*2
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
    hm.image = lambda i, *args: read.append(i) or image(i, *args)
    hm.show(1)
    assert read==[1]
    hm.plot()
    assert read==[1, 0, 1]


@pytest.mark.slow
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


@pytest.mark.slow
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


# Styles

def lines(ax): return [o for o in ax.collections if type(o).__name__.endswith('ContourSet')]


def test_the_map_is_as_opaque_as_it_is_strong():
    "Nothing of the photo changes where there is no evidence; at the end of the scale the opacity is alpha, half-way it is half of that"
    img = torch.rand(3, 60, 90, generator=torch.Generator().manual_seed(0))
    photo,plasma = img.permute(1,2,0).numpy(),plt.get_cmap('plasma')
    for alpha in (None, .4):
        px = render(show_overlay(img, tensor([[0.,1.,2.]]), exact_axes(90, 60), alpha=alpha, interpolation='nearest'))/255
        for j,v in enumerate((0., .5, 1.)):
            a,part = (alpha or .7)*v,np.s_[5:-5,30*j+5:30*j+25] # without the line at the half
            assert np.abs(px[part]-(a*np.array(plasma(v)[:3])+(1-a)*photo[part])).max()<.02
    even = render(show_overlay(img, torch.zeros(1, 3), exact_axes(90, 60), style='even'))/255
    assert np.abs(even-(.6*np.array(plt.get_cmap('magma')(0)[:3])+.4*photo)).max()<.02 # darker everywhere


def test_no_crosses():
    "A lone cell becomes a round spot that is as strong as the cell: half a cell from its middle, the same along a row as along a diagonal"
    hmap = torch.zeros(7, 7)
    hmap[3,3] = 1
    def spread(how):
        px = render(show_overlay(torch.zeros(3, 350, 350), hmap, exact_axes(350, 350), alpha=1, cmap='gray', style='even', interpolation=how))[...,0]/255
        assert px[174:176,174:176].min()>.97
        return abs(px[175,175+25]-px[175+18,175+18])
    assert spread('bilinear')>.07 and spread('bicubic')<.02


def test_the_line_runs_round_the_strong_half():
    "Where the enlarged map crosses half of the scale, white on black; dashed round what is against; nothing moves on the Axes"
    ramp = torch.linspace(0, 1, 8).expand(8, 8)
    ax = show_overlay(torch.full((3, 64, 64), .5), ramp, exact_axes(64, 64))
    line, = lines(ax)
    path, = line.get_paths()
    assert np.abs(path.vertices[:,0]-31.5).max()<.5 and path.vertices[:,1].min()<1 and path.vertices[:,1].max()>62
    assert ax.get_xlim()==(-.5, 63.5) and ax.get_ylim()==(63.5, -.5)
    px = render(ax).mean(2)[10:-10,28:36]
    assert px.max()-px.min()>120 # in grey as well
    assert not lines(show_overlay(torch.zeros(3, 64, 64), ramp, vmin=0, vmax=3)) # weaker than half of the scale
    assert not lines(show_overlay(torch.zeros(3, 64, 64), ramp*0+1)) and not lines(show_overlay(torch.zeros(3, 64, 64), tensor([[1.]])))
    for style in ('even', 'pixels'): assert not lines(show_overlay(torch.zeros(3, 64, 64), ramp, style=style))
    signed, = lines(show_overlay(torch.zeros(3, 64, 64), torch.linspace(-1, 1, 8).expand(8, 8)))
    assert signed.levels.tolist()==pytest.approx([-.5, .5])
    assert [dashes is not None for _,dashes in signed.get_linestyles()]==[True, False]
    nearest, = lines(show_overlay(torch.zeros(3, 64, 64), torch.tensor([[0.,1.]]), interpolation='nearest'))
    assert np.abs(nearest.get_paths()[0].vertices[:,0]-31.5).max()<.5 # along the edge of the cell
    seen = torch.ones(40, 40)
    seen[:,:10] = float('nan')
    seen[:,25:] = 0
    part, = lines(show_overlay(torch.zeros(3, 40, 40), seen))
    assert 23<part.get_paths()[0].vertices[:,0].min()<26 # not where the model saw nothing


def test_styles_are_words(learn, pics):
    f = get_image_files(pics)[0]
    with pytest.raises(ValueError, match="style is 'seed'; expected one of fade, even, pixels"): learn.show_gradcam(f, style='seed')
    for name,o in dict(fade='plasma', even='magma', pixels='magma').items(): assert learn.show_gradcam(f, style=name).images[1].get_cmap().name==o
    for name,alpha in dict(fade=.7, even=.6, pixels=1).items(): assert learn.show_gradcam(f, style=name).images[1].get_alpha()==alpha
    assert learn.show_gradcam(f, style='even').images[1].get_interpolation()=='bilinear' # as it always was


def test_pixels_are_drawn_as_pixels(learn, pics):
    f = get_image_files(pics)[0]
    for ax in (learn.show_saliency(f), learn.get_heatmaps(f, method='saliency').show(), learn.plot_heatmap_grid([f], method='saliency')[0,1]):
        im = ax.images[1]
        assert im.get_alpha()==1 and im.get_interpolation()=='antialiased' and not lines(ax)
    assert learn.show_saliency(f, alpha=.5).images[1].get_alpha()==.5 and learn.show_saliency(f, style='fade').images[1].get_alpha()==.7


@pytest.mark.slow
@pytest.mark.parametrize('method', heatmap_methods)
def test_which_methods_make_pixels(method):
    "Those whose maps have the size of the picture because they are of its pixels; those of RISE and occlusion are of larger patches"
    maps,_ = model_heatmaps(net_for(method), torch.rand(1, 3, 64, 64), cls=0, method=method, **quick.get(method, {}))
    assert heatmap_methods[method].pixels==(maps.shape[-2:]==(64,64) and method not in ('rise', 'occlusion'))


# Scales

def boxes(axs): return [ax.get_window_extent() for ax in axs]


@pytest.mark.slow
def test_bars(learn):
    "A bar is as high as its picture and beside it, and its ends are those of the scale; one for all where the scale is one"
    hm = learn.get_heatmaps(cls=[0,1])[:3]
    for axs in (hm.plot(colorbar=True), hm.show(0, colorbar=True), learn.plot_heatmap_grid(n=2, colorbar=True), learn.show_gradcam(hm.items[0], colorbar=True)):
        axs = np.atleast_1d(axs).ravel()
        axs[0].figure.canvas.draw()
        maps = [ax for ax in axs if len(ax.images)>1]
        for ax in maps:
            bar, = ax.child_axes
            a,b = boxes([ax, bar])
            assert b.x0>a.x1 and b.x0-a.x1<.06*a.width and abs(a.y0-b.y0)<1 and abs(a.y1-b.y1)<1
            low,high = ax.images[1].get_clim()
            assert bar.get_ylim()==(low, high) and [t.get_text() for t in bar.get_yticklabels()]==[f'{o:.2g}' for o in (low, (low+high)/2, high)]
            for other in axs:
                if other is not ax: assert not bar.get_tightbbox().overlaps(other.get_window_extent())
    axs = hm.plot(colorbar=True, same_scale=True)
    fig = axs.flat[0].figure
    fig.canvas.draw()
    bar, = [ax for ax in fig.axes if ax not in list(axs.flat)]
    assert not any(ax.child_axes for ax in axs.flat) and all(bar.get_window_extent().x0>b.x1 for b in boxes(axs.flat))
    assert bar.get_ylim()==(0, pytest.approx(float(hm.maps.max())))


def by_hand(tops, **kwargs):
    "Heatmaps of one image, with these maxima"
    hm = Heatmaps(tensor([[[[0.,t],[t/2,0.]] for t in tops]]), tensor([list(range(len(tops)))]), torch.full((1,len(tops)), .1), **kwargs)
    hm.images.image = lambda i, *args: torch.zeros(3, 64, 64)
    return hm


def test_a_weak_map_says_that_it_is_shown_stronger():
    def titles(axs): return [' '.join(ax.get_title().split()) for ax in axs]
    hm = by_hand([2., .5, 1.8, 0.])
    assert titles(hm.show())==['0 0.10', '1 0.10 (shown 4× stronger)', '2 0.10', '3 0.10 (no evidence here: the map is flat)']
    assert titles(hm.plot().flat)[1:]==titles(hm.show())
    assert titles(by_hand([48000., 1.]).show())[1]=='1 0.10 (shown 48,000× stronger)'
    assert not any('stronger' in t for t in titles(hm.show(same_scale=True)))
    assert not any('stronger' in t for t in titles(hm.replace(maps=hm.maps*0).show()))
    axs = hm.plot()
    assert axs[0,2].title.get_color()==axs[0,1].title.get_color()


def test_weaker_than_another_image(learn):
    "In a grid, all maps are compared"
    axs = learn.plot_heatmap_grid(n=6, seed=0)
    drawn = [ax for ax in axs.flat if len(ax.images)>1]
    tops = [ax.images[1].get_clim()[1] for ax in drawn]
    for ax,t in zip(drawn, tops): assert ('stronger' in ax.get_title())==(max(tops)/t>=1.5)
    if min(tops)*1.5<max(tops): assert any('stronger' in ax.get_title() for ax in drawn)


# Titles

def test_activations_are_of_no_class(learn, pics):
    f = get_image_files(pics)[0]
    assert ' '.join(learn.show_activations(f).get_title().split())=='activations, whatever the class'
    hm = learn.get_heatmaps(method='eigencam')
    assert hm.title(0)==(['eigencam, whatever the class', f'truth: {hm.truth(0)}'], 'black') # neither right nor wrong
    assert learn.get_heatmaps(method='gradcam').title(0)[0][0].split()[0] in learn.dls.vocab


@pytest.mark.parametrize('name', ['american_bulldog', 'Staffordshire bullterrier', 'Donaudampfschifffahrtsgesellschaftskapitän', 'a_b/c', 'x'*60])
def test_titles_are_broken_between_words(name):
    "At spaces, _ and / only; a word that is too wide makes the letters smaller, and only one that is too wide at 6 points is broken; spaces that must not break do not"
    fig,axs = plt.subplots(1, 3, figsize=(5, 2))
    for ax in axs:
        show_image(torch.zeros(3, 20, 30), ctx=ax)
        wrap_title(ax, [f'{name} / {name} / 5.21 / 0.32', 'dog 0.80\xa0✓'])
    got = axs[0].get_title().split('\n')
    assert ''.join(''.join(got).split(' '))==''.join(f'{name} / {name} / 5.21 / 0.32dog 0.80\xa0✓'.split(' '))
    if len(name)<40: assert all(re.search(r'[/_]$', a) or a.split(' ')[-1] in f'{name} / 5.21 0.32 dog'.split(' ') for a in got[:-1])
    assert '0.80\xa0✓' in got[-1] and ' '.join(got).count('0.80\xa0✓')==1
    fig.canvas.draw()
    wide = [ax.title.get_window_extent() for ax in axs]
    assert all(t.width<=max(b.width, 60/72*fig.dpi)+2 for t,b in zip(wide, boxes(axs))) and not wide[0].overlaps(wide[1])
    assert axs[0].title.get_fontsize()>=6

"Top losses, confusions, and comparisons: what is laid over fastai's pictures, and whose answers stand above them."
import gc, weakref, pytest
from types import SimpleNamespace
from shared import *
from test_no_trace import state, same, prepare
from test_tasks import task_learner, tags, mask, one_number, one_line


@pytest.fixture
def interp(learn):
    with learn.no_bar(): return ClassificationInterpretation.from_learner(learn)


@pytest.fixture
def torn(pics):
    "An interpretation of a Learner that is right about some pictures and wrong about others"
    learn = pic_learner(pics, resnet18) # no map of it is flat
    with learn.no_bar():
        preds,targs = learn.get_preds()
        last = [m for m in learn.model.modules() if isinstance(m, nn.Linear)][-1]
        logits = preds.log()
        gap = (logits[:,1]-logits[:,0]).sort().values
        with torch.no_grad(): # one picture falls on the other side
            b = torch.zeros(2)
            b[0] = gap[:2].mean()
            last.bias = nn.Parameter(b if last.bias is None else last.bias+b)
        return ClassificationInterpretation.from_learner(learn)


def image_axes(): return [ax for ax in plt.gcf().axes if ax.images]
def title(ax): return ax.get_title()
def unwrapped(ax): return ''.join(ax.get_title().split())
def pixels(fig=None):
    fig = fig or plt.gcf()
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba()).copy()


def drawn(f):
    "The figure that `f` makes, and what it returns; quietly"
    before = plt.get_fignums()
    res = f()
    new = [n for n in plt.get_fignums() if n not in before]
    assert len(new)==1
    return plt.figure(new[0]),res


# fastai's own, as it was

@pytest.mark.slow
@pytest.mark.parametrize('args,kwargs', [((4,), {}), ((3,), dict(largest=False)), ((3, False), {}), ((range(1,4),), {}), (([0,2],), dict(nrows=1)), ((4,), dict(ncols=4, figsize=(9,3))), ((2,), dict(alpha=.5)), ((2,), dict(cmap='gray'))])
def test_without_heatmap_it_is_fastais(interp, args, kwargs):
    with interp.learn.no_bar():
        a,ra = drawn(lambda: Interpretation._orig_plot_top_losses(interp, *args, **kwargs))
        b,rb = drawn(lambda: interp.plot_top_losses(*args, **kwargs))
        c,rc = drawn(lambda: interp.plot_top_losses(*args, **{**kwargs, 'heatmap':False}))
    assert ra is rb is rc is None
    assert (pixels(a)==pixels(b)).all() and (pixels(a)==pixels(c)).all() and pixels(a).std()>0


def test_without_heatmap_errors_are_fastais(interp):
    for kwargs in (dict(method='layercam'), dict(cls='both')):
        with interp.learn.no_bar(), pytest.raises(Exception) as a: Interpretation._orig_plot_top_losses(interp, 2, **kwargs)
        with interp.learn.no_bar(), pytest.raises(Exception) as b: interp.plot_top_losses(2, **kwargs)
        assert type(a.value)==type(b.value) and str(a.value)==str(b.value)


@pytest.mark.parametrize('block,get_y', [(MultiCategoryBlock, tags), (MaskBlock(['none', 'red', 'blue']), mask)])
def test_without_heatmap_other_tasks_are_fastais(pics, block, get_y):
    learn = task_learner(pics, block, get_y) if get_y is tags else segmenter(pics)
    with learn.no_bar():
        interp = Interpretation.from_learner(learn)
        a,_ = drawn(lambda: Interpretation._orig_plot_top_losses(interp, 2))
        b,_ = drawn(lambda: interp.plot_top_losses(2))
    assert (pixels(a)==pixels(b)).all()


def test_text_and_tables_are_fastais():
    "No image, no heatmap; the same call without goes to fastai"
    df = pd.DataFrame(dict(a=range(20), b=[i*i%7 for i in range(20)], y=[i%2 for i in range(20)]))
    set_seed(0)
    from fastai.tabular.all import TabularDataLoaders, tabular_learner
    dls = TabularDataLoaders.from_df(df, y_names='y', cont_names=['a','b'], procs=[Normalize], y_block=CategoryBlock(), valid_idx=list(range(10)), bs=4, num_workers=0)
    learn = tabular_learner(dls)
    with learn.no_bar():
        interp = ClassificationInterpretation.from_learner(learn)
        def run(f):
            try: return f(3),None
            except Exception as e: return type(e),str(e)
        assert run(partial(Interpretation._orig_plot_top_losses, interp))==run(interp.plot_top_losses)
        with pytest.raises(ValueError) as e: interp.plot_top_losses(3, heatmap=True)
        assert '\n' not in str(e.value)


# what is laid over it

def check_overlay(learn, interp, k, largest=True, cls='pred', **options):
    "Each map over each photo is `get_heatmaps` of that very item, and lies on it edge on edge; titles, photos and places are fastai's"
    looks = {o:options.pop(o) for o in ('nrows', 'ncols', 'figsize') if o in options}
    with learn.no_bar():
        own,_ = drawn(lambda: Interpretation._orig_plot_top_losses(interp, k, largest, **looks))
        fig,res = drawn(lambda: interp.plot_top_losses(k, largest, heatmap=True, cls=cls, **looks, **options))
        _,idxs = interp.top_losses(None, largest)
        idxs = (idxs[k] if is_listy(k) or isinstance(k, range) else idxs[:k]).tolist()
        items = [learn.dls.valid_ds.items[i] for i in idxs]
        preds,targs = learn.get_preds()
    assert res is None and fig._suptitle.get_text()==own._suptitle.get_text()=='Prediction/Actual/Loss/Probability'
    a,b = [[ax for ax in f.axes if ax.images] for f in (own, fig)]
    n,per = len(items),2 if cls=='both' else 1
    assert len(a)==n and len(b)==n*per and all(unwrapped(y).startswith(unwrapped(x)) for x,y in zip(a, b)) # which are wrapped, and say more
    want = {'pred':[preds.argmax(1)], 'targ':[targs], 'both':[preds.argmax(1), targs]}[cls]
    rest = b[n:]
    for i,item in enumerate(items):
        panels = [b[i], *rest[i*(per-1):(i+1)*(per-1)]]
        for ax,cs in zip(panels, want):
            photo,over = ax.images
            c = int(cs[idxs[i]])
            hm = learn.get_heatmaps(item, cls=c, **options)
            torch.testing.assert_close(torch.tensor(np.asarray(over.get_array())), hm.maps[0,0], rtol=1e-3, atol=1e-4*float(hm.maps.abs().max()))
            assert (photo.get_array()==a[i].images[0].get_array()).all()
            torch.testing.assert_close(torch.tensor(np.asarray(photo.get_array())).movedim(-1, 0).float()/255, hm.image(0).float(), rtol=0, atol=1/254)
            assert over.get_extent()==photo.get_extent()==list((-.5, 63.5, 63.5, -.5))
            assert ax.get_xlim()==a[i].get_xlim() and ax.get_ylim()==a[i].get_ylim()
            assert over.get_alpha()==.7 and over.get_clim()[1]==pytest.approx(float(hm.maps.abs().max()) or 1, rel=1e-3)
        if per==2: assert title(panels[1]).startswith(f'{learn.dls.vocab[int(targs[idxs[i]])]} {float(preds[idxs[i], targs[idxs[i]]]):.2f}')
    return fig,own


@pytest.mark.slow
@pytest.mark.parametrize('cls', ['pred', 'targ', 'both'])
def test_top_losses(torn, cls):
    fig,own = check_overlay(torn.learn, torn, 5, cls=cls)
    assert fig.get_figwidth()==own.get_figwidth()*(1+(cls=='both')) and fig.get_figheight()>=own.get_figheight()


@pytest.mark.slow
@pytest.mark.parametrize('k,largest,kwargs', [(1, True, {}), (range(1,4), True, dict(nrows=1)), ([4,0], False, {}), (3, False, dict(ncols=1, figsize=(4,9))), (6, True, dict(method='layercam', layer='0.6', relu=False)), (2, True, dict(method='gradcam', layer=['0.6','0.7']))])
def test_top_losses_with_options(torn, k, largest, kwargs):
    for cls in ('pred', 'both'):
        fig,own = check_overlay(torn.learn, torn, k, largest, cls, **kwargs)
        if 'figsize' in kwargs: assert tuple(fig.get_size_inches())==(4,9)


@pytest.mark.slow
def test_panels_of_a_photo_are_beside_each_other(torn):
    "In the place of the one Axes that fastai made, in its row"
    own,_ = drawn(lambda: Interpretation._orig_plot_top_losses(torn, 4))
    fig,_ = drawn(lambda: torn.plot_top_losses(4, heatmap=True, cls='both'))
    a,b = [[ax for ax in f.axes if ax.images] for f in (own, fig)]
    fig.canvas.draw()
    for i in range(4):
        left,right,whole = [o.get_subplotspec() for o in (b[i], b[4+i], a[i])]
        assert [o.rowspan.start for o in (left, right)]==[whole.rowspan.start]*2
        assert [left.colspan.start, right.colspan.start]==[2*whole.colspan.start, 2*whole.colspan.start+1]
        l,r = [o.get_window_extent() for o in (b[i], b[4+i])]
        assert l.x1<r.x0 and abs(l.y0-r.y0)<1 and abs(l.y1-r.y1)<1


@pytest.mark.parametrize('cls,options', [('pred', {}), ('both', {}), ('both', dict(colorbar=True)), ('pred', dict(same_scale=True, colorbar=True)), (['Red', 'Blue_ish'], dict(nrows=3)), ('both', dict(figsize=(9,7))), ('pred', dict(nrows=1, figsize=(11,2.4)))])
def test_titles_of_top_losses(torn, cls, options):
    "However long the names, no title lies on a picture or on another title, none is broken inside a word, and the pictures of a row are level"
    names = ['german_shorthaired_pointer', 'Staffordshire bullterrier']
    torn.learn.dls.vocab.items[:] = names
    if not isinstance(cls, str): cls = names
    fig,_ = drawn(lambda: torn.plot_top_losses(5, heatmap=True, cls=cls, **options))
    axs = [ax for ax in fig.axes if ax.images]
    for how in (dict(dpi=100), dict(dpi=70, bbox_inches='tight')): # as by hand, and as in a notebook
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning) # of a layout that does not fit
            fig.savefig(io.BytesIO(), format='png', **how)
    pics = [ax.get_window_extent() for ax in axs]
    titles = [ax.title.get_window_extent() for ax in axs] + [fig._suptitle.get_window_extent()]
    for i,t in enumerate(titles):
        assert not any(t.overlaps(p) for p in pics) and not any(t.overlaps(o) for o in titles[:i])
    rows = groupby(axs, lambda ax: ax.get_subplotspec().rowspan.start)
    for row in rows.values():
        ys = [ax.get_window_extent().y0 for ax in row]
        assert max(ys)-min(ys)<1 and len({round(ax.get_window_extent().height) for ax in row})==1
    words = set(re.split(r'[ /_]', ' '.join(names)))
    parts = {w for ax in axs for w in re.split(r'[\s/_]', title(ax)) if w.isalpha()}
    assert parts<=words|{'shown', 'stronger'} and len(parts&words)>=4


@pytest.mark.slow
def test_looks(torn):
    def first(**kwargs): return drawn(lambda: torn.plot_top_losses(3, heatmap=True, **kwargs))[0].axes[0].images[1]
    im = first(alpha=.3, cmap='viridis', interpolation='nearest')
    assert im.get_alpha()==.3 and im.get_cmap().name=='viridis' and im.get_interpolation()=='nearest'
    assert first(style='even').get_cmap().name=='magma' and first().get_cmap().name=='plasma' and first().get_clim()[0]==0
    signed = first(relu=False, method=lambda acts, grads: acts.sum(1)-acts.sum(1).mean())
    assert signed.get_cmap().name=='coolwarm' and signed.get_clim()[0]==-signed.get_clim()[1]
    fig,_ = drawn(lambda: torn.plot_top_losses(3, heatmap=True, same_scale=True, cls='both'))
    assert len({ax.images[1].get_clim() for ax in fig.axes if ax.images})==1
    assert fig.axes[0].images[1].get_clim()[1]==pytest.approx(float(torn.top_losses_heatmaps(3, cls='both').maps.max()))


def test_a_named_class_is_named(torn):
    fig,_ = drawn(lambda: torn.plot_top_losses(2, heatmap=True, cls='red'))
    hm = torn.top_losses_heatmaps(2, cls='Red')
    own,_ = drawn(lambda: Interpretation._orig_plot_top_losses(torn, 2))
    for i in range(2):
        assert title(fig.axes[i]).split('\n')[:2]==[title(own.axes[i]), hm.title(i, truth=False)[0][0]]
        assert (fig.axes[i].images[1].get_array()==hm.maps[i,0].numpy()).all()
    fig,_ = drawn(lambda: torn.plot_top_losses(2, heatmap=True, cls=['Red', 'Blue_ish']))
    assert len(image_axes())==4


def test_flat_maps_say_so(torn):
    fig,_ = drawn(lambda: torn.plot_top_losses(2, heatmap=True, method=lambda acts, grads: acts.sum(1)*0))
    assert all(' '.join(title(ax).split()).count('(no evidence here: the map is flat; try an earlier layer)')==1 for ax in fig.axes)


def test_top_losses_as_data(torn):
    learn = torn.learn
    hm = torn.top_losses_heatmaps(4, cls='both')
    losses,idxs = torn.top_losses(4)
    with learn.no_bar(): preds,targs = learn.get_preds()
    assert list(hm.items)==[learn.dls.valid_ds.items[i] for i in idxs]
    torch.testing.assert_close(hm.preds, preds[idxs].as_subclass(Tensor))
    assert torch.equal(hm.targs, targs[idxs].as_subclass(Tensor)) and torch.equal(hm.cls, torch.stack([preds.argmax(1), targs], 1)[idxs].as_subclass(Tensor))
    torch.testing.assert_close(-hm.preds.gather(1, hm.targs[:,None])[:,0].log(), losses.as_subclass(Tensor)) # cross entropy
    assert len(torn.top_losses_heatmaps(range(2), largest=False))==2
    assert len(hm.plot().ravel())==12


def test_several_classes_for_each_image(learn, pics):
    "A tensor (n, k) names k classes for each of n images"
    files = get_image_files(pics)[:3]
    both,rows = learn.get_heatmaps(files, cls=[0,1]),tensor([[1,0],[0,1],[1,1]])
    got = learn.get_heatmaps(files, cls=rows)
    assert torch.equal(got.cls, rows)
    for i in range(3):
        for j in range(2): torch.testing.assert_close(got.maps[i,j], both.maps[i,rows[i,j]])
    one_line(lambda: learn.get_heatmaps(files, cls=rows[:2]), '2 indices for 3 images')
    one_line(lambda: learn.get_heatmaps(files, cls=rows+1), 'no class 2')


def test_training_set_and_data_frame(pics):
    files = get_image_files(pics).sorted()
    df = pd.DataFrame(dict(file=[str(o) for o in files], y=[Path(o).name.rsplit('_', 1)[0] for o in files]))
    set_seed(3)
    dls = ImageDataLoaders.from_df(df, path='/', valid_pct=.5, seed=1, item_tfms=Resize(64), batch_tfms=aug_transforms(), bs=4, num_workers=0, device='cpu')
    learn = vision_learner(dls, narrow18, pretrained=False, normalize=False)
    for ds_idx in (0,1):
        with learn.no_bar():
            interp = ClassificationInterpretation.from_learner(learn, ds_idx=ds_idx)
            hm = interp.top_losses_heatmaps(3, cls='both')
            fig,_ = drawn(lambda: interp.plot_top_losses(3, heatmap=True, cls='both'))
        idxs = interp.top_losses(3)[1]
        assert [r.file for r in hm.items]==dls.loaders[ds_idx].items.file.iloc[idxs.tolist()].tolist()
        direct = learn.get_heatmaps(['/'+r.file.lstrip('/') for r in hm.items], cls=hm.cls)
        torch.testing.assert_close(direct.maps, hm.maps)
        for i in range(3): assert (fig.axes[i].images[1].get_array()==hm.maps[i,0].numpy()).all()


# other tasks

def segmenter(pics):
    from test_tasks import task_dls
    dls = task_dls(pics, MaskBlock(['none', 'red', 'blue']), get_y=mask)
    return unet_learner(dls, narrow18, n_out=3, pretrained=False, normalize=False)


def test_multi_label(pics):
    learn = task_learner(pics, MultiCategoryBlock, tags)
    with learn.no_bar():
        interp = Interpretation.from_learner(learn)
        fig,_ = drawn(lambda: interp.plot_top_losses(3, heatmap=True))
        hm = interp.top_losses_heatmaps(3)
    assert hm.task=='classes' and torch.equal(hm.cls[:,0], hm.preds.argmax(1))
    for i,ax in enumerate([o for o in fig.axes if o.images]):
        assert title(ax).split('\n')[:2]==[f'Image {i}', hm.title(i, truth=False)[0][0]]
        assert (ax.images[1].get_array()==hm.maps[i,0].numpy()).all()
    fig,_ = drawn(lambda: interp.plot_top_losses(2, heatmap=True, cls=['Red', 'big']))
    assert [[l.split()[0] for l in title(o).split('\n') if l.split()[0] in ('Red', 'big')] for o in fig.axes if o.images]==[['Red'], ['Red'], ['big'], ['big']]
    for cls in ('targ', 'both'): one_line(lambda: interp.plot_top_losses(2, heatmap=True, cls=cls), 'one', 'true class', 'name the classes')


def test_masks(pics):
    learn = segmenter(pics)
    with learn.no_bar():
        interp = SegmentationInterpretation.from_learner(learn)
        fig,_ = drawn(lambda: interp.plot_top_losses(2, heatmap=True, cls='red'))
        hm = interp.top_losses_heatmaps(2, cls='red')
    axs = [o for o in fig.axes if o.images]
    assert len(axs)==6 and [len(o.images) for o in axs]==[2,1,1]*2
    for i in range(2):
        assert (axs[3*i].images[1].get_array()==hm.maps[i,0].numpy()).all()
        assert title(axs[3*i]).split('\n')[:2]==['input', hm.title(i, truth=False)[0][0]] and 'red' in title(axs[3*i])
    for cls in ('targ', 'both'): one_line(lambda: interp.plot_top_losses(2, heatmap=True, cls=cls), 'one', 'true class', 'name the classes')


def test_numbers(pics):
    "fastai draws no top losses of a regression; as data they can be had"
    learn = task_learner(pics, RegressionBlock, one_number, loss_func=MSELossFlat())
    with learn.no_bar():
        interp = Interpretation.from_learner(learn)
        with pytest.raises(Exception, match='not implemented'): interp.plot_top_losses(2) # as it was
        one_line(lambda: interp.plot_top_losses(2, heatmap=True), 'fastai draws no top losses', 'use top_losses_heatmaps(k).plot()')
        assert not plt.get_fignums()
        assert interp.top_losses_heatmaps(2).task=='numbers'
        one_line(lambda: interp.top_losses_heatmaps(2, cls='both'), 'one true class')


# bad input

@pytest.mark.parametrize('kwargs,words', [(dict(k=7), ['6', 'losses']), (dict(k=0), ['k is 0']), (dict(k=-1), ['k is -1']), (dict(k=[9]), ['0 to 5']), (dict(k='3'), ['k is']), (dict(k=2, cls='Rad'), ["'Red'"]),
                                          (dict(k=2, method='layercm', layer='0.1'), []), (dict(k=2, layer='0.99'), ['closest']), (dict(k=2, nonsense=1), ['no option']), (dict(k=2, cls=tensor([0])), ['1 indices for 2'])])
def test_bad_input(interp, kwargs, words):
    k = kwargs.pop('k')
    figs = plt.get_fignums()
    before = state(interp.learn.model, interp.learn)
    for f in (partial(interp.plot_top_losses, heatmap=True), interp.top_losses_heatmaps):
        with pytest.raises(ValueError) as e: f(k, **kwargs)
        assert kwargs.get('method')=='layercm' or '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value
    same(before, state(interp.learn.model, interp.learn))
    assert plt.get_fignums()==figs


def test_losses_of_a_part_are_refused(learn):
    "fastai would show other images than those of the losses"
    with learn.no_bar(): interp = ClassificationInterpretation.from_learner(learn, dl=learn.dls.valid.new(n=2, get_idxs=lambda: [3,5]))
    one_line(lambda: interp.top_losses_heatmaps(1), 'whole set')


def test_a_half_drawn_figure_is_closed(torn):
    figs = plt.get_fignums()
    with pytest.raises(ValueError): torn.plot_top_losses(2, heatmap=True, cmap='no such map')
    assert plt.get_fignums()==figs


# confusions

def by_cell(learn):
    with learn.no_bar(): preds,targs = learn.get_preds()
    cells = defaultdict(list)
    for i,(p,t) in enumerate(zip(preds.argmax(1).tolist(), targs.tolist())): cells[t,p].append(i)
    return cells,preds.as_subclass(Tensor)


@pytest.mark.slow
def test_confusions(torn):
    "Of each cell: as many as fastai counts, those very items, the largest loss first, the predicted class and the true one"
    learn,cm = torn.learn,torn.confusion_matrix()
    cells,preds = by_cell(learn)
    vocab = learn.dls.vocab
    assert len(cells)>=3 and any(a!=b for a,b in cells)
    for (t,p),idxs in cells.items():
        hm = torn.confusion_heatmaps(vocab[t], vocab[p])
        assert len(hm)==cm[t,p]==len(idxs)
        want = sorted(idxs, key=lambda i: -float(torn.losses[i]))
        assert list(hm.items)==[learn.dls.valid_ds.items[i] for i in want] and (hm.targs==t).all() and (hm.preds.argmax(1)==p).all()
        assert hm.cls.tolist()==[[p,t] if p!=t else [t]]*len(idxs)
        torch.testing.assert_close(hm.preds, preds[want])
        torch.testing.assert_close(hm.maps, learn.get_heatmaps([learn.dls.valid_ds.items[i] for i in want], cls=[p,t] if p!=t else t).maps)
        assert len(torn.confusion_heatmaps(t, p, n=1))==1
        assert hm.plot().shape[1]%(1+hm.cls.shape[1])==0


def test_confusions_options(torn):
    (t,p),_ = next((c,i) for c,i in by_cell(torn.learn)[0].items() if c[0]!=c[1])
    hm = torn.confusion_heatmaps(t, p, method='layercam', layer='0.6', relu=False)
    torch.testing.assert_close(hm.maps, torn.learn.get_heatmaps(list(hm.items), [p,t], 'layercam', '0.6', False).maps)


def test_empty_cells_and_unknown_names(learn):
    with learn.no_bar():
        last = [m for m in learn.model.modules() if isinstance(m, nn.Linear)][-1]
        last.bias = nn.Parameter(tensor([9.,-9.])) # all are Blue_ish
        interp = ClassificationInterpretation.from_learner(learn)
    one_line(lambda: interp.confusion_heatmaps('Blue_ish', 'Red'), "no 'Blue_ish' is taken for 'Red'", "'Red' as 'Blue_ish' (3)")
    one_line(lambda: interp.confusion_heatmaps('Red', 'Blu'), "'Blue_ish'")
    one_line(lambda: interp.confusion_heatmaps(2, 'Red'), 'no class 2')
    one_line(lambda: interp.confusion_heatmaps('Red', 'Blue_ish', n=0), 'n is 0')
    assert len(interp.confusion_heatmaps('red', 'blue_ish'))==3
    learn.dls.valid_ds.items[:] = [o for o in learn.dls.valid_ds.items if 'Blue' in o.name]*2
    with learn.no_bar(): interp = ClassificationInterpretation.from_learner(learn)
    one_line(lambda: interp.confusion_heatmaps('Red', 'Red'), 'no image is taken for what it is not')


def test_number_vocab(pics):
    "Classes that are numbers themselves are looked up by name, and explained by index"
    set_seed(7)
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda o: 1+int(o.stem.split('_')[-1])%2, splitter=IndexSplitter(range(6)), item_tfms=Resize(64)).dataloaders(pics, bs=4, num_workers=0, device='cpu')
    learn = vision_learner(dls, narrow18, pretrained=False, normalize=False)
    with learn.no_bar(): interp = ClassificationInterpretation.from_learner(learn)
    (t,p),idxs = next(iter(by_cell(learn)[0].items()))
    hm = interp.confusion_heatmaps(t+1, p+1)
    assert len(hm)==len(idxs) and hm.name(hm.cls[0,0])==str(p+1)


# no trace

@pytest.mark.slow
def test_leaves_no_trace(torn):
    "What is ours leaves nothing; with a heatmap, fastai's picture leaves what it leaves without"
    learn = torn.learn
    prepare(learn.model, 'mixed')
    (t,p),_ = next((c,i) for c,i in by_cell(learn)[0].items() if c[0]!=c[1])
    f = learn.dls.valid_ds.items[0]
    calls = [lambda: torn.top_losses_heatmaps(3, cls='both'), lambda: torn.confusion_heatmaps(t, p), lambda: learn.compare_heatmaps(f, cls=[0,1], method=['gradcam', 'finercam', 'saliency']),
             lambda: learn.compare_heatmaps(f, layer=['0.6','0.7']), lambda: compare_learners(dict(a=learn, b=learn), [f, f], cls=0, difference=True)]
    prepare(learn.model, 'mixed')
    before,interp_before = state(learn.model, learn),dict(vars(torn))
    for call in calls:
        with draws_nothing(): call()
        same(before, state(learn.model, learn))
        assert dict(vars(torn))==interp_before
    last = [m for m in learn.model.modules() if isinstance(m, nn.Linear)][-1]
    h = last.register_forward_pre_hook(lambda *_: 1/0)
    before,figs = state(learn.model, learn),plt.get_fignums()
    for call in calls:
        with pytest.raises(ZeroDivisionError): call()
        same(before, state(learn.model, learn))
    assert plt.get_fignums()==figs
    h.remove()

    def trace(**kwargs):
        prepare(learn.model, 'mixed')
        with learn.no_bar(): torn.plot_top_losses(2, **kwargs)
        res = state(learn.model, learn)
        res['cbs'] = [set(v) for _,v in res['cbs']] # the recorder notes times, and `no_bar` puts in another bar
        return {k:v for k,v in res.items() if k!='learner'},set(res['learner'])
    (a,ka),(b,kb) = trace(),trace(heatmap=True, cls='both')
    same(a, b)
    assert ka==kb


# methods and layers side by side

def counted(learn):
    "Counts forward passes of the body"
    n = [0]
    h = learn.model[0].register_forward_hook(lambda *_: n.__setitem__(0, n[0]+1))
    return n,h


@pytest.mark.slow
def test_compare_methods(learn, pics):
    "Each panel is `get_heatmaps` of its method; those of a layer share one pass"
    f,methods = get_image_files(pics)[0],['gradcam', 'gradcam++', 'activations', 'finercam', 'eigencam', 'layercam']
    for relu in (True, False):
        n,h = counted(learn)
        axs = learn.compare_heatmaps(f, cls=['Red', 'Blue_ish'], method=methods, relu=relu)
        assert n[0]==1
        h.remove()
        assert axs.shape==(7,2) and len(axs[0,0].images)==1 and not axs[0,1].images # the photo
        for row,m in zip(axs[1:], methods):
            hm = learn.get_heatmaps(f, ['Red', 'Blue_ish'], m, relu=relu)
            for j,ax in enumerate(row):
                torch.testing.assert_close(torch.tensor(np.asarray(ax.images[1].get_array())), hm.maps[0,j], rtol=1e-4, atol=1e-5*float(hm.maps.abs().max()))
                assert ax.images[1].get_extent()==ax.images[0].get_extent()==[-.5, 63.5, 63.5, -.5]
            assert [t.get_text() for t in row[0].texts]==[m]
    preds = learn.get_heatmaps(f).preds[0]
    said = [[l for l in title(o).split('\n') if 'stronger' not in l] for o in axs[1:].flat]
    assert said[:2]==[[f'Red {preds[1]:.2f}'], [f'Blue_ish {preds[0]:.2f}']]
    for r,m in enumerate(methods[1:], 1): assert [[o for o in t if o] for t in said[2*r:2*r+2]]==[['whatever the class']*(m in ('activations', 'eigencam'))]*2


def test_compare_methods_of_all_kinds(learn, pics):
    f = get_image_files(pics)[0]
    def mine(acts, grads): return (grads**2*acts).sum(1)
    methods = ['saliency', 'layercam', partial(heatmap_methods['integrated_gradients'], steps=3), mine, 'guided_backprop', 'gradcam']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        axs = learn.compare_heatmaps((f, 'Red'), cls='targ', method=methods, layer='0.6')
        for row,m in zip(axs[1:,0], methods):
            pix = m in ('saliency', 'guided_backprop') or isinstance(m, partial)
            hm = learn.get_heatmaps(f, 'Red', m, layer=None if pix else '0.6')
            torch.testing.assert_close(torch.tensor(np.asarray(row.images[1].get_array())), hm.maps[0,0], rtol=1e-3, atol=1e-4*float(hm.maps.abs().max()))
    assert [o.texts[0].get_text() for o in axs[1:,0]]==['saliency', 'layercam', 'integrated_gradients', 'mine', 'guided_backprop', 'gradcam']
    assert 'completeness' in title(axs[3,0]) and not title(axs[4,0]) and not title(axs[2,0]) and title(axs[0,0])=='truth: Red'
    assert [o.images[1].get_interpolation() for o in axs[1:,0]]==['antialiased', 'catrom', 'antialiased', 'catrom', 'antialiased', 'catrom'] # pixels as pixels
    assert [o.images[1].get_alpha() for o in axs[1:,0]]==[1, .7, 1, .7, 1, .7]
    assert learn.compare_heatmaps(f).shape==(5,1) and learn.compare_heatmaps(f, topk=2, method='saliency').shape==(2,2)


def test_each_report_stays_with_its_method(learn, pics):
    def told(probe):
        probe.info['told'] = torch.full(probe.idxs.shape, .25)
        return probe.acts.mean(1, keepdim=True)
    told.needs = 'layer'
    axs = learn.compare_heatmaps(get_image_files(pics)[0], method=['gradcam', told, 'hirescam'])
    assert [('told' in title(o)) for o in axs[1:,0]]==[False, True, False] and title(axs[2,0])=='told 0.25'


def test_compare_layers(learn, pics):
    "One pass for all; each row is the map of its layer alone, at its own size"
    f,layers = get_image_files(pics)[1],['0.4', learn.model[0][6], '0.7']
    n,h = counted(learn)
    axs = learn.compare_heatmaps(f, cls=[0,1], layer=layers, method='layercam')
    assert n[0]==1
    h.remove()
    for row,l in zip(axs[1:], layers):
        hm = learn.get_heatmaps(f, [0,1], 'layercam', l)
        for j,ax in enumerate(row): torch.testing.assert_close(torch.tensor(np.asarray(ax.images[1].get_array())), hm.maps[0,j], rtol=1e-4, atol=1e-5*float(hm.maps.max()))
    assert [o.texts[0].get_text() for o in axs[1:,0]]==['0.4\n16×16', '0.6\n4×4', '0.7\n2×2']


def test_compare_scales(learn, pics):
    f = get_image_files(pics)[0]
    axs = learn.compare_heatmaps(f, cls=[0,1], method=['gradcam', 'hirescam'], same_scale=True, cmap='viridis', alpha=.2, figsize=(3,4))
    for r,row in enumerate(axs[1:]):
        assert len({ax.images[1].get_clim() for ax in row})==1
        assert all(ax.images[1].get_alpha()==.2 and ax.images[1].get_cmap().name=='viridis' for ax in row)
    assert tuple(axs[0,0].figure.get_size_inches())==(3,4)


def test_compare_transposed(learn, pics):
    "A column for each method, named above it; a row for each class, named beside it; the photo comes first"
    f = get_image_files(pics)[0]
    hm = learn.get_heatmaps(f, ['Red', 'Blue_ish'])
    axs = learn.compare_heatmaps(f, cls=['Red', 'Blue_ish'], method=['gradcam', 'activations'], transpose=True)
    assert axs.shape==(2,3) and len(axs[0,0].images)==1 and not axs[1,0].images and not title(axs[0,0])
    assert [title(o).split('\n')[0] for o in axs[0,1:]]==['gradcam', 'activations'] and title(axs[1,2])=='whatever the class'
    assert [o.texts[0].get_text() for o in axs[:,0]]==[hm.title(0, j)[0][0] for j in (0,1)]
    for j in (0,1): assert (axs[j,1].images[1].get_array()==hm.maps[0,j].numpy()).all()
    axs = learn.compare_heatmaps((f, 'Red'), method=['gradcam', 'layercam'], transpose=True)
    hm = learn.get_heatmaps([(f, 'Red')])
    assert axs.shape==(1,3) and title(axs[0,0]).split('\n')==hm.title(0)[0] and axs[0,0].title.get_color()==hm.title(0)[1]
    assert [title(o) for o in axs[0,1:]]==['gradcam', 'layercam'] and title(learn.compare_heatmaps((f, 'Red'))[0,0])=='truth: Red'


@pytest.mark.parametrize('size', [(13.3,7.5), (4,9), (6,6)])
def test_a_figure_is_filled(learn, pics, size):
    "Panels of one class are as large as any whole number of rows allows, and nothing is outside"
    methods = ['gradcam', 'layercam', 'hirescam', 'saliency']
    axs = learn.compare_heatmaps(get_image_files(pics)[0], method=methods, figsize=size)
    fig = axs[0,0].figure
    fig.canvas.draw()
    assert tuple(fig.get_size_inches())==size and [title(o).split('\n')[0] for o in list(axs.flat)[1:5]]==methods
    boxes = [ax.get_window_extent() for ax in axs.flat if ax.images]
    assert len(boxes)==5 and all(b.x0>=0 and b.y0>=0 and b.x1<=fig.bbox.x1 and b.y1<=fig.bbox.y1 for b in boxes)
    best = max(min(size[0]/c, size[1]/math.ceil(5/c)-.25) for c in range(1, 6)) # inches; the photo is square, a title a quarter of an inch
    assert boxes[0].width/fig.dpi>.9*best
    assert not any(ax.axison for ax in axs.flat)


def test_compare_bad_input(learn, pics):
    f,figs = get_image_files(pics)[0],plt.get_fignums()
    one_line(lambda: learn.compare_heatmaps([f, f]), 'one image')
    one_line(lambda: learn.compare_heatmaps(f, method=['gradcam'], layer=['0.6']), 'both lists')
    one_line(lambda: learn.compare_heatmaps(f, method=[]), 'empty')
    one_line(lambda: learn.compare_heatmaps(f, layer=[]), 'empty')
    one_line(lambda: learn.compare_heatmaps(f, cls=['Red', 'Rad']), 'closest names')
    one_line(lambda: learn.compare_heatmaps(f, layer=['0.6', '0.99']), 'closest names')
    one_line(lambda: learn.compare_heatmaps(f, method='saliency', layer=['0.6', '0.7']), 'looks at no layer')
    one_line(lambda: learn.compare_heatmaps(f, method=['gradcam', 'rise'], n=3), "'gradcam' has no option 'n'")
    one_line(lambda: learn.compare_heatmaps('no_such.png'), 'no_such.png')
    with pytest.raises(ValueError, match='did you mean'): learn.compare_heatmaps(f, method=['gradcam', 'gradcm'])
    assert plt.get_fignums()==figs


# models side by side

@pytest.fixture
def three(pics):
    from shared import pic_learner
    return {n:pic_learner(pics, arch, size=s) for n,arch,s in (('eighteen', resnet18, 64), ('large', resnet18, 96), ('squeeze', squeezenet1_1, 64))}


@pytest.mark.slow
def test_compare_learners(three, pics):
    "Each title is that model's own prediction, each map that model's own"
    files = get_image_files(pics)[:3]
    axs = compare_learners(three, files)
    assert axs.shape==(3,3) and [o.texts[0].get_text() for o in axs[:,0]]==list(three)
    for row,l in zip(axs, three.values()):
        with l.no_bar(): preds,_ = l.get_preds(dl=l.dls.test_dl(files))
        hm = l.get_heatmaps(files)
        for i,ax in enumerate(row):
            c = int(preds[i].argmax())
            assert title(ax).split('\n')[0]==f'{l.dls.vocab[c]} {preds[i,c]:.2f}'
            assert (ax.images[1].get_array()==hm.maps[i,0].numpy()).all()
            assert ax.images[0].get_array().shape[0]==(96 if l is three['large'] else 64)
            assert ax.images[1].get_extent()==ax.images[0].get_extent()


@pytest.mark.slow
def test_compare_learners_for_a_class(three, pics):
    "The model's own prediction is told also where another class is explained; the truth in the first row"
    files = get_image_files(pics)[:2]
    for items in (files, [(f, 'Red') for f in files]):
        axs = compare_learners(three, items, cls='Red')
        for r,(row,l) in enumerate(zip(axs, three.values())):
            with l.no_bar(): preds,_ = l.get_preds(dl=l.dls.test_dl(files))
            for i,ax in enumerate(row):
                words,wrong = ' '.join(title(ax).split()),preds[i].argmax()==0
                assert words.startswith(f'Red {preds[i,1]:.2f}') and (f'predicted: Blue_ish {preds[i,0]:.2f}' in words)==wrong
                assert ('truth: Red' in title(ax))==(r==0 and items is not files)
                if items is not files: assert ax.title.get_color()==('red' if wrong else 'green')
    axs = compare_learners(three, files, cls=['Red', 'Blue_ish'])
    assert axs.shape==(3,4) and [title(o).split()[0] for o in axs[1]]==['Red', 'Blue_ish']*2
    assert compare_learners(three, files[0]).shape==(3,1)
    assert compare_learners(three, [(f, 'Red') for f in files], cls='targ').shape==(3,2)


def test_models_are_loaded_one_by_one(pics):
    "When a function is called, the model of the one before is gone, without the collector's own help; none is left in the end. A Learner can be called, but is not: it stays"
    refs,calls,alive = [],[],[]
    def load(i):
        alive.append([r() is not None for r in refs])
        res = pic_learner(pics)
        refs.append(weakref.ref(res.model))
        return res
    kept = pic_learner(pics)
    assert callable(kept)
    gc.disable()
    try: axs = compare_learners({'a':partial(load, 0), 'kept':kept, 'b':partial(load, 1), 'c':lambda: load(2)}, get_image_files(pics)[:2], cls='Red')
    finally: gc.enable()
    assert axs.shape==(4,2) and alive==[[], [False], [False, False]] and [r() for r in refs]==[None]*3
    assert compare_learners({'kept':kept}, get_image_files(pics)[0])[0,0].images


def test_models_go_also_with_a_difference(pics):
    refs = []
    def load():
        res = pic_learner(pics)
        refs.append(weakref.ref(res.model))
        return res
    compare_learners(dict(a=load, b=load), get_image_files(pics)[:2], cls='Red', difference=True)
    assert [r() for r in refs]==[None]*2


def test_a_saved_learner(learn, pics, tmp_path):
    learn.export(tmp_path/'l.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        axs = compare_learners(dict(now=learn, saved=partial(load_learner, tmp_path/'l.pkl')), get_image_files(pics)[:2])
    assert [title(o) for o in axs[0]]==[title(o) for o in axs[1]]


def test_compare_learners_bad_input(learn, pics):
    f,figs = get_image_files(pics)[0],plt.get_fignums()
    one_line(lambda: compare_learners([learn], f), 'expected a dict')
    one_line(lambda: compare_learners({}, f), 'expected a dict')
    one_line(lambda: compare_learners(dict(a=resnet18), f), "'a'", 'returned a ResNet')
    one_line(lambda: compare_learners(dict(a='model.pkl'), f), "'a' is a str")
    one_line(lambda: compare_learners(dict(a=learn.model), f), "'a' is a Sequential; expected a Learner")
    one_line(lambda: compare_learners(dict(a=learn), []), 'no images')
    one_line(lambda: compare_learners(dict(ok=learn), f, cls='Rad'), "'ok'", "'Red'")
    one_line(lambda: compare_learners(dict(ok=learn), f, difference=True), 'two')
    assert plt.get_fignums()==figs


# before and after

def hms(maps, cls=((0,),), preds=((.9,.1),), **kwargs): return Heatmaps(torch.as_tensor(maps), tensor([list(o) for o in cls]), tensor([list(o) for o in preds]), **{'vocab':['a','b'], 'images':Images([0], [0]), **kwargs})


def test_difference_by_hand():
    "Each map is divided by its own maximum, and the smaller brought to the larger as torch does it"
    a,b = tensor([[[[0.,4.],[2.,0.]]]]),tensor([[[[10.,0.],[5.,10.]]]])
    d = heatmap_difference(hms(a), hms(b, preds=((.3,.7),)))
    assert torch.equal(d.maps, tensor([[[[1.,-1.],[0.,1.]]]]))
    assert torch.equal(d.preds, tensor([[.3,.7]])) and d.title(0)[0]==['a 0.30', 'before 0.90']
    four = F.interpolate(b, (4,4), mode='nearest')
    for x,y in ((a, four), (four, a)):
        d = heatmap_difference(hms(x), hms(y))
        assert d.maps.shape==(1,1,4,4)
        up = [F.interpolate(o/o.max(), (4,4), mode='bilinear') for o in (x,y)]
        torch.testing.assert_close(d.maps, up[1]-up[0])
    assert not heatmap_difference(hms(a), hms(a*7)).maps.any()
    assert torch.equal(heatmap_difference(hms(a*0), hms(b)).maps, b/10) # nothing before
    neg = tensor([[[[-8.,4.],[2.,0.]]]])
    assert torch.equal(heatmap_difference(hms(a), hms(neg)).maps, tensor([[[[-1.,-.5],[-.25,0.]]]]))


def test_difference_of_other_images_or_classes():
    one_line(lambda: heatmap_difference(hms([[[[1.]]]]), hms([[[[1.]]], [[[1.]]]], cls=((0,),(0,)), preds=((.9,.1),)*2)), '1 images before and 2 after')
    one_line(lambda: heatmap_difference(hms([[[[1.]]]]), hms([[[[1.]]]], cls=((1,),))), "'a' before and 'b' after", 'cls=')
    turned = heatmap_difference(hms([[[[1.]]]]), hms([[[[1.]]]], cls=((1,),), preds=((.2,.8),), vocab=['b','a'])) # the same class by name
    assert turned.title(0)[0][:2]==['a 0.80', '(no evidence here: the map is flat)'] and turned.info['before'].item()==pytest.approx(.9)


def test_difference_row(three, pics):
    two = {k:three[k] for k in ('eighteen', 'large')}
    files = get_image_files(pics)[:3]
    axs = compare_learners(two, files, cls='Red', difference=True)
    a,b = [l.get_heatmaps(files, 'Red') for l in two.values()]
    want = heatmap_difference(a, b)
    assert axs.shape==(3,3) and axs[2,0].texts[0].get_text()=='large − eighteen' and want.maps.shape[2:]==(3,3)
    for i,ax in enumerate(axs[2]):
        photo,over = ax.images
        assert (over.get_array()==want.maps[i,0].numpy()).all() and over.get_cmap().name=='coolwarm' and over.get_extent()==photo.get_extent()
        lo,hi = over.get_clim()
        assert -lo==hi==pytest.approx(float(want.maps.abs().max()))
        assert ' '.join(title(ax).split())==f'Red {a.preds[i,1]:.2f} → {b.preds[i,1]:.2f}'
    one_line(lambda: compare_learners(three, files, difference=True), 'two')
    wide = pic_learner(pics, size=(64,128))
    one_line(lambda: compare_learners(dict(a=wide, b=three['large']), files, cls='Red', difference=True), '128×64 pixels', '96×96')


def test_the_difference_follows_the_second_model(pics):
    "Without cls, each image is compared for what the second model predicts, found by its name; the figure says so"
    a,b = pic_learner(pics),pic_learner(pics)
    for l,bias in ((a, [9.,0.]), (b, [0.,9.])): [m for m in l.model.modules() if isinstance(m, nn.Linear)][-1].bias = nn.Parameter(tensor(bias))
    figs = plt.get_fignums()
    one_line(lambda: heatmap_difference(*[l.get_heatmaps(get_image_files(pics)[0]) for l in (a, b)]), "'Blue_ish' before and 'Red' after", 'cls=')
    assert plt.get_fignums()==figs
    b.dls.vocab.items[:] = ['Red', 'Blue_ish'] # the other way round
    files,loaded = get_image_files(pics)[:2],[]
    def load(l):
        loaded.append(l)
        return l
    axs = compare_learners(dict(a=partial(load, a), b=partial(load, b)), files, difference=True)
    one,two = a.get_heatmaps(files, 'Blue_ish'),b.get_heatmaps(files)
    assert loaded==[b, a] and two.name(two.cls[0,0])=='Blue_ish'
    for i in range(2):
        assert (axs[0,i].images[1].get_array()==one.maps[i,0].numpy()).all() and (axs[1,i].images[1].get_array()==two.maps[i,0].numpy()).all()
        assert (axs[2,i].images[1].get_array()==heatmap_difference(one, two).maps[i,0].numpy()).all() and title(axs[2,i]).startswith('Blue_ish')
    assert ' '.join(axs[2,0].texts[0].get_text().split())=='b − a, for what b predicts' and [axs[r,0].texts[0].get_text() for r in (0,1)]==['a', 'b']
    b.dls.vocab.items[:] = ['Red', 'Green']
    one_line(lambda: compare_learners(dict(a=a, b=b), files, difference=True), "'a'", "'Green'")


# what a person sees

@pytest.mark.slow
def test_nothing_is_cut_off(three, pics):
    "Every title and every name of a row is inside the figure, and none covers another"
    long = {f'a model with a long name, number {i}':l for i,l in enumerate(three.values())}
    files = get_image_files(pics)[:4]
    for axs in (compare_learners(long, [(f, 'Red') for f in files], cls='Blue_ish'), compare_learners(three, files[0]), three['large'].compare_heatmaps(files[0], topk=2)):
        fig = axs.flat[0].figure
        fig.canvas.draw()
        boxes = [o.get_window_extent() for ax in axs.flat for o in (ax.title, *ax.texts) if o.get_text()]
        w,h = fig.canvas.get_width_height()
        assert boxes and all(b.x0>=0 and b.y0>=0 and b.x1<=w and b.y1<=h for b in boxes)
        assert not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])

"The report: what is in it, that it says what fastai says, and how it behaves in a browser."
import base64, io, subprocess, tracemalloc
from html.parser import HTMLParser
import chromium
from shared import *
from fastai_heatmaps.data.drawn import is_drawn, drawn_by
from fastai_heatmaps.trust.findings import Findings
from fastai_heatmaps.views import report as views_report
import fastai_heatmaps.cli.main as cli

names = ['<script>hacked=1</script>', '''b"'&amp;</b> </script>''', 'ünï\u2028\u202e<img src=x onerror=hacked=1>']


class Page(HTMLParser):
    "What a report holds: the tags, each with its attributes, and the text in each"
    def __init__(self, path):
        super().__init__()
        self.tags,self.stack = [],[]
        self.feed(Path(path).read_text('utf-8'))
    def handle_starttag(self, tag, attrs):
        self.tags.append(dict(attrs, tag=tag, text=''))
        if tag not in ('meta', 'link', 'img', 'input', 'br'): self.stack.append(self.tags[-1])
    def handle_endtag(self, tag): assert self.stack.pop()['tag']==tag
    def handle_data(self, text):
        for o in self.stack: o['text'] += text
    def all(self, tag, **attrs):
        want = {k.replace('_', '-').strip('-'):v for k,v in attrs.items()}
        return [o for o in self.tags if o['tag']==tag and all(o.get(k)==v for k,v in want.items())]
    @property
    def facts(self): # of the whole: term -> text
        return {k['text']: v['text'] for k,v in zip(self.all('dt'), self.all('dd'))}
    @property
    def cards(self): return self.all('article')
    @property
    def photos(self): return [o['text'].split('\u2002')[1] for o in self.all('h3')]
    def said(self, i, term):
        card = self.cards[i]['text']
        return re.search(rf'{term}(.*?)(truth|loss|Map of|predicted)', card)[1]
    @property
    def maps(self): # of each photo, (k, h, w)
        res = [[]]*0
        for o in self.tags:
            if o['tag']=='article': res.append([]); size = int(o['data-rows']),int(o['data-cols'])
            if o.get('class')=='map': res[-1].append(np.frombuffer(base64.b64decode(o['data-map']), np.uint8).reshape(size))
        return res


@pytest.fixture(scope='module')
def hm(pics):
    "Six photos of 64×64, three classes with odd names, maps of 8×8 cells; the second and the last are taken for another class"
    learn = pic_learner(pics)
    preds = tensor([[.7,.2,.1],[.1,.6,.3],[.1,.3,.6],[.8,.1,.1],[.2,.7,.1],[.5,.3,.2]])
    gen = torch.Generator().manual_seed(0)
    cls,targs,maps = preds.argsort(1, descending=True),tensor([0,2,2,0,1,1]),torch.rand(6,3,8,8, generator=gen)
    return learn.get_heatmaps().replace(preds=preds, cls=cls, targs=targs, vocab=names, maps=maps, asked=None)


@pytest.fixture(scope='module')
def page(hm, tmp_path_factory): return hm.report(tmp_path_factory.mktemp('report')/'r.html')


# What is in it

def test_says_what_fastai_says(learn, tmp_path):
    "Losses, their order, metrics and confusions are those of fastai"
    learn.metrics = [accuracy, F1Score(average='macro')]
    page = Page(learn.heatmap_report(tmp_path/'r.html'))
    loss,acc,f1 = learn.validate()
    facts = page.facts
    assert facts['mean loss']==f'{loss:.4g}' and facts['accuracy']==f'{acc:.4g}' and facts['f1_score']==f'{f1:.4g}'
    interp = ClassificationInterpretation.from_learner(learn)
    losses,idxs = interp.top_losses()
    assert page.photos==[learn.dls.valid_ds.items[i].name for i in idxs]
    assert [page.said(i, 'loss') for i in range(6)]==[f'{o:.3g}' for o in losses.tolist()]
    matrix = interp.confusion_matrix()
    assert facts['right']==f'{matrix.trace()} of 6 ({matrix.trace()/6:.1%})'
    cells = {(int(o['data-truth']), int(o['data-predicted'])): int(o['text']) for o in page.all('a', class_='cell')}
    assert cells=={(t,p): matrix[t,p] for t in range(2) for p in range(2) if matrix[t,p]}
    preds = learn.get_preds()[0][idxs].as_subclass(Tensor)
    for i,(p,place) in enumerate(zip(preds, idxs)):
        pred = int(p.argmax())
        assert page.said(i, 'predicted').startswith(f'{learn.dls.vocab[pred]} {p[pred]:.2f}')
        assert page.said(i, 'truth')==label(page.photos[i])


def test_says_what_the_model_is(learn, tmp_path):
    facts = Page(learn.heatmap_report(tmp_path/'r.html', layer='0.6', method='layercam', seed=3)).facts
    assert facts['model']==f'narrow18, {sum(p.numel() for p in learn.model.parameters()):,} parameters'
    assert facts['classes']=='2Blue_ish, Red' and facts['photos']=='6, the largest losses first'
    assert facts['input']=='3×64×64' and facts['seed']=='3'
    assert facts['heatmaps']=='layercam at layer 0.6, 4×4 cells'
    for name in ('fastai_heatmaps', 'fastai', 'torch'): assert f'{name} {__import__(name).__version__}' in facts['versions']
    assert time.strftime('%Y-%m-%d') in facts['made']


def test_maps_are_those_of_get_heatmaps(pics, tmp_path):
    "All classes of a photo in the order of their probability; a byte is 255 times the value over that of the largest"
    learn = pic_learner(pics, resnet18) # no map of it is flat
    page = Page(learn.heatmap_report(tmp_path/'r.html'))
    hm = learn.get_heatmaps(cls=[0,1])
    place = {f.name: i for i,f in enumerate(learn.dls.valid_ds.items)}
    for name,maps in zip(page.photos, page.maps):
        i = place[name]
        for c,m in zip(hm.preds[i].argsort(descending=True), maps):
            want = hm.maps[i,c]
            assert m.shape==want.shape and np.abs(m-255*(want/want.max()).numpy()).max()<=.51
    shares = [float(o['data-share']) for o in page.all('input', class_='map')]
    i = place[page.photos[0]]
    tops = hm.maps[i].amax((1,2))[hm.preds[i].argsort(descending=True)]
    assert np.allclose(shares[:2], tops/tops.max(), atol=1e-3)


@pytest.mark.slow
def test_top_classes_and_the_true_one(tmp_path):
    "Of many classes the likeliest, and the true one in any case, marked to be shown beside the predicted one"
    learn = demo_learner()
    learn.remove_cb(ProgressCallback)
    page = Page(learn.heatmap_report(tmp_path/'r.html', topk=3))
    hm = learn.get_heatmaps(topk=3)
    assert all(len(o)==3 for o in page.maps)
    rocket = page.photos.index('rocket')
    labels = [o['text'] for o in page.all('label')[-9:]][3*rocket:][:3]
    assert labels[0].startswith('drilling platform 0.23') and any(o.startswith('missile') and 'truth' in o for o in labels)
    beside = [o for o in page.all('input', class_='map') if 'data-beside' in o]
    assert len(beside)==2 # the rocket and the cat are mistakes
    cat = page.photos.index('cat')
    assert [o['text'].split(' 0.')[0] for o in page.all('label')[-9:]][3*cat:][:2]==[hm.name(c) for c in hm.cls[0,:2]]


def test_begins_with_the_likeliest_class(hm, tmp_path):
    "Of those explained, in whatever order, with one class a photo or several; numbers begin with the first"
    hm = hm.replace(cls=tensor([[2,0,1]]*6))
    for task,targs in ('class', hm.targs), ('classes', torch.eye(3)[hm.targs].long()), ('numbers', torch.rand(6, 3)):
        page = Page(hm.replace(task=task, targs=targs).report(tmp_path/f'{task}.html'))
        chosen = [i%3 for i,o in enumerate(page.all('input', class_='map')) if 'checked' in o]
        assert chosen==([0]*6 if task=='numbers' else [[1,2,0][c] for c in hm.preds.argmax(1)])


def test_says_what_evidence_is_for(hm, tmp_path):
    "Of a class; of a larger number in a regression; and activations are of neither"
    for kw,said in (dict(), 'evidence for a class'), (dict(task='numbers', targs=None), 'evidence for a larger number'), (dict(method='activations'), 'where the model is most active'):
        page = Page(hm.replace(**kw).report(tmp_path/'r.html', overwrite=True))
        assert said in page.all('section', id='begin')[0]['text']


def test_only_mistakes_have_two_maps(hm, tmp_path):
    "Whatever the order of the classes"
    page = Page(hm.replace(cls=torch.arange(3).expand(6, 3)).report(tmp_path/'r.html'))
    assert [o['name'] for o in page.all('input', class_='map') if 'data-beside' in o]==['map-2', 'map-6']


@pytest.mark.slow
def test_size(tmp_path):
    "200 photos with five maps each stay under 15 MB, also maps of pixels"
    learn = demo_learner()
    learn.remove_cb(ProgressCallback)
    for method in ('gradcam', 'saliency'):
        one,three = [learn.heatmap_report(tmp_path/f'{method}{n}.html', n=n, method=method).stat().st_size for n in (1, 3)]
        assert 5000 < (three-one)/2 < 15e6/200, method
        maps, = Page(tmp_path/f'{method}1.html').maps
        assert len(maps)==5 and max(maps[0].shape)<=56


def test_names(hm, page, tmp_path):
    "Names are text: no tag and no attribute comes from them"
    p = Page(page)
    assert p.facts['classes'].endswith(', '.join(names))
    assert {o['data-name'] for o in p.all('bdi') if 'data-name' in o}=={*names}
    assert len(p.all('script'))==1 and len(p.all("img"))==9 and not p.all('b')
    assert not any(k.startswith('on') for o in p.tags for k in o)


def test_file_names(pics, tmp_path):
    "Files of any name, also one that is no UTF-8; of folders only what tells files apart"
    im = Image.open(next(pics.iterdir()))
    files = [tmp_path/'a'/'<img src=x onerror=hacked=1>.png', tmp_path/'a'/'''"'&lt;.png''', tmp_path/'b'/'ünï\u2028.png']
    for f in files: f.parent.mkdir(exist_ok=True); im.save(f)
    if sys.platform=='linux':
        os.symlink(files[1], os.fsencode(tmp_path/'b')+b'/lat\xffin.png')
        files.append(next(f for f in (tmp_path/'b').iterdir() if 'lat' in f.name))
    learn = pic_learner(pics)
    out = learn.heatmap_report(tmp_path/'r.html', items=files)
    want = ['a/<img src=x onerror=hacked=1>.png', '''a/"'&lt;.png''', 'b/ünï\u2028.png', 'b/lat\\udcffin.png']
    assert Page(out).photos==want[:len(files)]
    assert str(tmp_path) not in out.read_text('utf-8')


def test_n_and_seed(learn, pics, tmp_path):
    "The photos with the largest losses, or by chance and in their order where nothing is known; all are counted"
    many = Page(learn.heatmap_report(tmp_path/'a.html')).photos
    few = Page(learn.heatmap_report(tmp_path/'b.html', n=2))
    assert few.photos==many[:2] and few.facts['photos']=='6, of which the 2 with the largest losses are shown'
    assert sum(int(o['text'] or 0) for o in few.all('td'))==6
    assert 'All 6 photos are counted, and 2 of them are below' in few.all('section')[1]['text']
    files = sorted(pics.iterdir())
    some = [Page(learn.heatmap_report(tmp_path/f'{i}.html', files, n=4, seed=s)).photos for i,s in enumerate((0,0,1))]
    assert some[0]==some[1]!=some[2] and all(len(o)==4 and o==sorted(o) for o in some)
    whole = Page(learn.heatmap_report(tmp_path/'c.html', files, n=None))
    assert whole.photos==[f.name for f in files] and 'right' not in whole.facts and not whole.all('table')
    assert 'loss' not in whole.cards[0]['text']


def test_labels_given_with_items(learn, pics, tmp_path):
    items = [(f, label(f)) for f in sorted(pics.iterdir())]
    page = Page(learn.heatmap_report(tmp_path/'r.html', items))
    dl = learn.dls.test_dl([f for f,_ in items], with_labels=True)
    losses,idxs = Interpretation.from_learner(learn, dl=dl).top_losses()
    assert page.photos==[items[i][0].name for i in idxs]
    assert [page.said(i, 'loss') for i in range(12)]==[f'{o:.3g}' for o in losses.tolist()]


def test_interpretation(learn, tmp_path):
    "Of the training set too, with the validation transforms"
    for ds_idx in (0,1):
        page = Page(Interpretation.from_learner(learn, ds_idx).report(tmp_path/f'{ds_idx}.html', n=3, topk=1))
        want = Page(learn.heatmap_report(tmp_path/f'w{ds_idx}.html', n=3, topk=1, ds_idx=ds_idx))
        assert page.cards==want.cards and len(page.cards)==3


def test_check(learn, hm, tmp_path):
    "What a check has found comes before the photos; True asks for it"
    def draw(): return plt.subplots()[1].bar(['a'], [1])[0].axes
    table = pd.DataFrame(dict(score=[.1234567]), index=pd.Index(['<b>gradcam'], name='method'))
    found = Findings(table, 'It <i>passes</i>.', {}, draw)
    for out in (hm.report(tmp_path/'a.html', check=found), learn.heatmap_report(tmp_path/'b.html', check=found)):
        page = Page(out)
        section, = page.all('section', class_='verdict')
        assert 'It <i>passes</i>.' in section['text'] and '<b>gradcam0.123' in section['text'] and 'score' in section['text']
        assert any(o['src'].startswith('data:image/png') for o in page.all('img'))
    asked = []
    class Checked(Learner):
        def check_heatmaps(self, items=None, method='gradcam', layer=None, n=64, input=0, seed=0, bs=None):
            asked.append((items, method.name, method.func.keywords, layer, input, seed, bs))
            return found
    learn.__class__ = Checked
    assert Page(learn.heatmap_report(tmp_path/'c.html', method='occlusion', window=32, check=True, seed=5)).all('section', class_='verdict')
    assert asked==[(None, 'occlusion', dict(window=32), None, 0, 5, None)] # the method that made the maps, with its options
    assert not plt.get_fignums()


# Means of classes

def figures(page): return [o for o in page.tags if o.get('class')=='panel mean']


def test_means(hm, page):
    "Of each class with two photos, by truth: the map of that class, wherever it stands among those of a photo; on one scale"
    p = Page(page)
    shown = figures(p)
    assert [o['text'] for o in shown]==[f'{name}, mean of 2 photos' for name in names]
    want = []
    for c,rows in enumerate([(0,3), (4,5), (1,2)]):
        own = [hm.maps[i][hm.cls[i].tolist().index(c)] for i in rows]
        want.append(torch.stack([o/o.max() for o in own]).mean(0))
    top = max(float(m.max()) for m in want)
    for o,m in zip(shown, want):
        got = np.frombuffer(base64.b64decode(o['data-map']), np.uint8).reshape(int(o['data-rows']), int(o['data-cols']))
        assert np.abs(got-255*(m/m.max()).numpy()).max()<=.51 and float(o['data-share'])==pytest.approx(float(m.max())/top, abs=1e-3)
    photos = [o for o in p.all('img') if 'mean of' in o['alt']]
    assert [o['alt'] for o in photos]==[f'{name}, mean of 2 photos' for name in names]
    got = np.float32(Image.open(io.BytesIO(base64.b64decode(photos[0]['src'].split(',')[1]))))
    diff = got - 255*(hm.image(0)+hm.image(3)).permute(1, 2, 0).numpy()/2
    assert np.abs(diff.reshape(8, 8, 8, 8, 3).mean((1,3,4))).max()<4 # a JPEG, whose blocks are of 8×8
    assert 'on the mean of the photos whose true class it is' in p.all('section', id='means')[0]['text']


def test_means_by_prediction(hm, tmp_path):
    "Where no truth is known; a class with one photo has no mean, nor have numbers"
    p = Page(hm.replace(targs=None).report(tmp_path/'a.html')) # predicted are 0, 1, 2, 0, 1, 0
    assert [o['text'] for o in figures(p)]==[f'{names[0]}, mean of 3 photos', f'{names[1]}, mean of 2 photos']
    assert 'the photos that are predicted as it' in p.all('section', id='means')[0]['text']
    assert not figures(Page(hm[:3].replace(targs=None).report(tmp_path/'b.html')))
    numbers = Page(hm.replace(task='numbers', targs=torch.rand(6, 3)).report(tmp_path/'c.html'))
    assert not figures(numbers) and not numbers.all('section', id='means')


def test_means_of_several_labels(hm, tmp_path):
    "A photo counts in each of its classes; flat maps are counted, and both signs are kept"
    targs = tensor([[1,1,0],[0,1,0],[0,0,0],[1,0,1],[0,1,0],[0,0,0]])
    maps = hm.maps.clone()
    maps[0] = 0
    maps[3] *= -1
    p = Page(hm.replace(task='classes', targs=targs, maps=maps).report(tmp_path/'a.html'))
    said = [o['text'] for o in figures(p)]
    assert said==[f'{names[0]}, mean of 2 photos (1 of them without evidence)', f'{names[1]}, mean of 3 photos (1 of them without evidence)']
    m = maps[3][hm.cls[3].tolist().index(0)]
    got = np.frombuffer(base64.b64decode(figures(p)[0]['data-map']), np.uint8).reshape(8, 8)
    assert np.abs(got-255*(m/m.abs().max()+1).numpy()/2).max()<=.51


def test_means_of_the_worst(pics, tmp_path):
    "They are of the photos that are shown, and say so where these are the worst"
    learn = pic_learner(pics, resnet18)
    p = Page(learn.heatmap_report(tmp_path/'a.html', n=4))
    shown = Counter(label(o) for o in p.photos)
    assert {o['text'] for o in figures(p)}=={f'{k}, mean of {n} photos' for k,n in shown.items() if n>1}
    assert 'of those below, which have the largest losses' in p.all('section', id='means')[0]['text']
    whole = Page(learn.heatmap_report(tmp_path/'b.html'))
    assert len(figures(whole))==2 and 'losses' not in whole.all('section', id='means')[0]['text']


def test_means_of_many_classes(hm, tmp_path):
    "The 48 with the most photos, each in a few kB"
    n = 150
    targs = torch.arange(60).repeat(4)[:n] # 30 classes have three photos, 30 have two
    many = hm[[0]*n].replace(preds=F.one_hot(targs, 60).float(), cls=targs[:,None], maps=torch.rand(n, 1, 7, 7), targs=targs, vocab=None)
    out = many.report(tmp_path/'r.html')
    shown = [o['text'] for o in figures(Page(out))]
    assert len(shown)==48 and all(f'{c}, mean of 3 photos' in shown for c in range(30))
    text = out.read_text('utf-8')
    assert len(text[text.index('id="means"'):])<48*6000


# Other tasks

def test_multi_label(pics, tmp_path):
    block = DataBlock((ImageBlock, MultiCategoryBlock(vocab=['a','b','c'])), get_items=get_image_files,
                      get_y=lambda o: ['a','c'] if 'Red' in o.name else [],
                      splitter=IndexSplitter(range(6)), item_tfms=Resize(64))
    dls = block.dataloaders(pics, bs=4, num_workers=0, device='cpu')
    metric = partial(accuracy_multi, thresh=.4)
    learn = vision_learner(dls, narrow18, pretrained=False, normalize=False, n_out=3, metrics=metric)
    page = Page(learn.heatmap_report(tmp_path/'r.html', topk=2))
    p,t = learn.get_preds()
    place = {f.name: i for i,f in enumerate(learn.dls.valid_ds.items)}
    for i,name in enumerate(page.photos):
        j = place[name]
        guess = [o for o,x in zip('abc', p[j]) if x>.5]
        assert page.said(i, 'truth')==('a, c' if 'Red' in name else 'none')
        assert page.said(i, 'predicted').startswith(', '.join(f'{o} {x:.2f}' for o,x in zip('abc', p[j]) if x>.5) or 'none')
        assert ('✓' in page.said(i, 'predicted'))==(guess==[o for o,x in zip('abc', t[j]) if x])
    assert not page.all('table') and page.facts['accuracy_multi']==f'{learn.validate()[1]:.4g}'
    assert all(len(o)==2 for o in page.maps)


def test_numbers(pics, tmp_path):
    "A regression: no classes to choose photos by, both colours, and for each number a scale of its own"
    block = DataBlock((ImageBlock, RegressionBlock(n_out=2)), get_items=get_image_files, get_y=lambda o: [1.5, -2],
                      splitter=IndexSplitter(range(6)), item_tfms=Resize(64))
    dls = block.dataloaders(pics, bs=4, num_workers=0, device='cpu')
    learn = vision_learner(dls, narrow18, pretrained=False, normalize=False, metrics=mae)
    page = Page(learn.heatmap_report(tmp_path/'r.html'))
    assert page.facts['outputs']=='2' and page.facts['mae']==f'{learn.validate()[1]:.4g}' and not page.all('table')
    assert page.said(0, 'truth')=='1.5, -2' and page.said(0, 'loss') and 'predicted' not in page.cards[0]['text']
    assert {o['data-share'] for o in page.all('input', class_='map')}=={'1.000'} and page.all('body')[0]['data-zero']=='128'
    hm = learn.get_heatmaps(cls=[0,1])
    i = [f.name for f in learn.dls.valid_ds.items].index(page.photos[0])
    for m,want in zip(page.maps[0], hm.maps[i]): assert np.abs(m-255*(want/want.abs().max()+1).numpy()/2).max()<=.51


def test_segmentation(tmp_path, pics):
    block = DataBlock((ImageBlock, MaskBlock(codes=['sky','sea'])), get_items=get_image_files,
                      get_y=lambda o: PILMask.create(np.ones((64,64), np.uint8)),
                      splitter=IndexSplitter(range(2)), item_tfms=Resize(64))
    dls = block.dataloaders(pics, bs=2, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 2, 1))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(axis=1), metrics=foreground_acc)
    page = Page(learn.heatmap_report(tmp_path/'r.html'))
    assert len(page.cards)==2 and 'of the pixels' in page.cards[0]['text']
    assert page.facts['foreground_acc']==f'{learn.validate()[1]:.4g}'
    losses = Interpretation.from_learner(learn).losses.view(2, -1).mean(1).sort(descending=True).values
    assert [page.said(i, 'loss') for i in range(2)]==[f'{o:.3g}' for o in losses.tolist()]


def test_one_output_for_two_classes(pics, tmp_path):
    learn = pic_learner(pics, loss_func=BCEWithLogitsLossFlat())
    learn.model = create_vision_model(narrow18, 1, pretrained=False)
    learn.metrics = []
    page = Page(learn.heatmap_report(tmp_path/'r.html'))
    assert all(len(o)==2 for o in page.maps) and 'of 6' in page.facts['right']


def test_relu_off_has_two_colours(learn, tmp_path):
    page = Page(learn.heatmap_report(tmp_path/'r.html', relu=False, n=1))
    assert page.all('body')[0]['data-zero']=='128' and 'blue' in page.all('section')[2]['text']


def test_exported_learner_and_cls(learn, pics, tmp_path):
    learn.export(tmp_path/'e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    page = Page(loaded.heatmap_report(tmp_path/'r.html', sorted(pics.iterdir()), cls='Red', n=2))
    assert all(len(o)==1 for o in page.maps) and all('Red' in o['text'] for o in page.all('label')[-2:])
    with pytest.raises(ValueError, match='^there are no images'): loaded.heatmap_report(tmp_path/'s.html')


def test_many_classes_are_listed(hm, tmp_path):
    "More than 50 classes have no matrix"
    n = 120
    preds = torch.eye(n)
    cls,targs = torch.arange(n)[:,None],torch.arange(n).roll(1)
    many = hm[[0]*n].replace(preds=preds, cls=cls, maps=torch.rand(n,1,2,2), targs=targs, vocab=None)
    page = Page(many.report(tmp_path/'r.html'))
    assert len(page.all('tr'))==21 and len(page.all('a', class_='cell'))==20


# Files, errors, traces

def test_bad_input(learn, hm, tmp_path):
    for kw,says in [(dict(out=tmp_path/'r.pdf'), 'ends in .html'), (dict(n=0), 'n is 0; expected a whole number, at least 1'),
                    (dict(topk=0), 'topk is 0'), (dict(n='3'), "n is '3'"), (dict(n=1.5), 'n is 1.5'), (dict(topk='a'), "topk is 'a'"),
                    (dict(seed='x'), "seed is 'x'"), (dict(check='yes'), "check is 'yes'; expected what check_heatmaps has found"), (dict(layer='0.99'), '0.99'), (dict(cls='Rad'), "'Red'"),
                    (dict(items=[]), 'no images'), (dict(ds_idx=7), 'no set 7')]:
        with pytest.raises(ValueError, match=says) as e: learn.heatmap_report(**{'out': tmp_path/'r.html', **kw})
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='no heatmaps'): hm[[]].report(tmp_path/'r.html')
    loaded = hm.replace(images=Images(idxs=range(6), names=list('abcdef')))
    with pytest.raises(ValueError, match='loaded without their images'): loaded.report(tmp_path/'r.html')
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(hm, tmp_path):
    out,other = tmp_path/'r.html',tmp_path/'other.html'
    hm.report(out)
    assert is_drawn(out) and Page(out).all('meta', name='generator')[0]['content']==drawn_by
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match='pass overwrite=True'): hm.report(out)
    assert out.read_bytes()==before
    hm[:1].report(out, overwrite=True)
    assert len(Page(out).cards)==1
    other.write_text('<html>mine</html>')
    for kw in ({}, dict(overwrite=True)):
        with pytest.raises(FileExistsError): hm.report(other, **kw)
    assert other.read_text()=='<html>mine</html>' and {f.name for f in tmp_path.iterdir()}=={'r.html', 'other.html'}


def test_whole_or_not_at_all(learn, tmp_path, monkeypatch):
    "Photos are written as they are made; after an error nothing is left, nor is the old report gone"
    out = learn.heatmap_report(tmp_path/'sub'/'r.html')
    before = out.read_bytes()
    card,sizes = views_report._card,[]
    def watched(*args, **kwargs):
        sizes.append(sum(f.stat().st_size for f in out.parent.glob('.*.tmp')))
        if len(sizes)==5: raise KeyboardInterrupt
        return card(*args, **kwargs)
    monkeypatch.setattr(views_report, '_card', watched)
    with pytest.raises(KeyboardInterrupt): learn.heatmap_report(out, overwrite=True)
    assert sizes[-1]>sizes[0] and out.read_bytes()==before and [o.name for o in out.parent.iterdir()]==['r.html']


def test_no_trace(learn, tmp_path):
    state = copy(learn.model.state_dict())
    learn.model.train()
    cbs,metrics,rng = list(learn.cbs),[vars(m).copy() for m in learn.metrics],torch.random.get_rng_state()
    learn.heatmap_report(tmp_path/'r.html')
    assert learn.model.training and list(learn.cbs)==cbs and [vars(m) for m in learn.metrics]==metrics
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items())
    assert not any(m._forward_hooks for m in learn.model.modules())
    assert learn.loss_func.reduction=='mean'


@pytest.mark.slow
def test_memory_does_not_grow_with_photos(learn, pics, tmp_path):
    files = sorted(pics.iterdir())*25
    def peak(n):
        tracemalloc.start()
        size = learn.heatmap_report(tmp_path/f'{n}.html', files[:n], n=None).stat().st_size
        try: return tracemalloc.get_traced_memory()[1],size
        finally: tracemalloc.stop()
    peak(12)
    (few,small),(many,large) = peak(60),peak(300)
    assert large-small>5e5 and many-few<.5*(large-small), (few, many, small, large)


def test_command_line(learn, pics, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn.export(tmp_path/'e.pkl')
    for f in sorted(pics.iterdir())[::3]:
        (tmp_path/label(f)).mkdir(exist_ok=True)
        shutil.copy(f, tmp_path/label(f))
    (tmp_path/'Red'/'no.png').write_text('no image')
    def call(*args): return cli.main(['report', 'e.pkl', 'Red', 'Blue_ish', '--trust', '--cpu', *args]),capsys.readouterr()
    rc,said = call('--labels')
    assert rc==1 and said.out=='report.html: report of 4 images, 1 skipped\n' and 'no.png' in said.err
    page = Page('report.html')
    assert len(page.cards)==4 and 'of 4' in page.facts['right']
    assert all(page.said(i, 'truth')==label(o) for i,o in enumerate(page.photos))
    rc,said = call()
    assert rc==1 and 'add --overwrite' in said.err
    rc,said = call('--overwrite', '--quiet', '--n', '2', '--top', '1', '--method', 'layercam')
    page = Page('report.html')
    assert said.out=='' and len(page.cards)==2 and 'right' not in page.facts and 'layercam' in page.facts['heatmaps']
    wrong = {'ends in .html': ['--out', 'r.pdf'],
             'does not go with': ['--check', '--upright', '--overwrite'],
             'closest names': ['--cls', 'Rad', '--overwrite']}
    for says,args in wrong.items():
        rc,said = call(*args)
        assert rc==2 and says in said.err.splitlines()[-1]


@pytest.mark.slow
def test_command_line_checks(learn, pics, tmp_path, capsys, monkeypatch):
    "The verdict stands in the report; an exported Learner has no photos of its own"
    monkeypatch.chdir(tmp_path)
    learn.export(tmp_path/'e.pkl')
    assert cli.main(['report', 'e.pkl', str(pics), '--trust', '--cpu', '--check'])==0
    text = (tmp_path/'report.html').read_text('utf-8')
    assert 'be told' in text or 'be trusted' in text
    assert len(Page('report.html').cards)==12


# In a browser

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not chromium.binary: pytest.skip('Chromium is not installed')
    b = chromium.Chromium(tmp_path_factory.mktemp('browser'))
    yield b
    b.close()


cards = "[...document.querySelectorAll('.card')]"
shown = f"{cards}.filter(o => o.offsetHeight).map(o => o.id)"
focus = 'document.activeElement.id'
def canvas(card, panel=1): return f"document.querySelector('#photo-{card} .panel:nth-child({panel}) canvas')"
def pixels(card, panel=1): return f"[...{canvas(card, panel)}.getContext('2d').getImageData(0, 0, 64, 64).data]"


@pytest.mark.slow
def test_loads_alone(browser, page):
    "No error, no message and no request, also after everything was used; the names are what they are"
    browser.open(page).settle()
    assert browser.js(f'{cards}.length')==6 and browser.js('document.body.className')=='alive'
    browser.click('#photo-2 label:nth-of-type(2)')
    browser.js("addEventListener('error', () => hacked = 2)")
    assert browser.js("typeof hacked")=='undefined'
    assert browser.js("[...document.querySelector('#predicted').options].map(o => o.text).sort()")==sorted(['any', *names])
    assert browser.errors==[] and browser.requests==[]


def test_maps_as_pixels(browser, hm, page):
    "Between the cells by Catmull and Rom, as torch does it away from the edges; opaque as it is strong, in the colours of plasma"
    browser.open(page).settle()
    got = np.array(browser.js(pixels(1))).reshape(64, 64, 4)
    cells = hm.maps[0,0]/hm.maps[0].amax() # the maps of a photo share their scale
    want = F.interpolate(cells[None,None], (64,64), mode='bicubic', antialias=True)[0,0].clamp(0, 1).numpy()
    inner = np.zeros((64,64), bool)
    inner[12:-12,12:-12] = True
    line = np.zeros((64,64), bool)
    strong = want>=.5
    for axis in (0,1):
        at = np.diff(strong, axis=axis)
        for cut in (slice(None, -1), slice(1, None)): line[(slice(None),)*axis+(cut,)] |= at
    away = inner&~np.isin(got[...,3], (179, 178, 255))&~line
    assert away.sum()>500 and np.abs(got[...,3]/255-want)[away].max()<.02
    colours = plt.get_cmap('plasma')(want)[...,:3]
    clear = away&(want>.6)
    assert clear.sum()>100 and np.abs(got[...,:3]/255-colours)[clear].max()<.04
    on_line = inner&line
    assert (got[on_line][:,3]>170).mean()>.9 # the line goes where the map crosses half of its scale


def test_a_mistake_has_the_true_class_beside_it(browser, hm, page):
    browser.open(page).settle()
    assert browser.js(f"{cards}.map(o => o.querySelectorAll('.panel').length)")==[1,2,1,1,1,2]
    said = browser.js("[...document.querySelectorAll('#photo-2 figcaption')].map(o => o.textContent)")
    assert said==[f'{names[1]} 0.60', f'{names[2]} 0.30 · truth']
    assert browser.js(f"{canvas(2,2)}.getAttribute('aria-label')")==f'Map of {names[2]} 0.30 · truth'
    first,second = [np.array(browser.js(pixels(2, i))) for i in (1,2)]
    assert (first!=second).any()
    browser.js("document.querySelectorAll('#photo-2 .map')[1].click()") # the true class in the first panel as well
    assert (np.array(browser.js(pixels(2)))==second).all() and (np.array(browser.js(pixels(2, 2)))==second).all()


def test_choice_of_class(browser, page):
    "By mouse, by a key where a photo has the focus, and by the arrows within the choice"
    browser.open(page).settle()
    before = browser.js(pixels(1))
    browser.click('#photo-1 label:nth-of-type(3)')
    assert browser.js("document.querySelector('#photo-1 figcaption').textContent")==f'{names[2]} 0.10'
    assert browser.js(pixels(1))!=before
    browser.js("document.querySelector('#photo-1').focus()")
    browser.key('1')
    assert browser.js(pixels(1))==before
    browser.js("document.querySelectorAll('#photo-1 .map')[0].focus()")
    browser.key('ArrowRight')
    assert browser.js("document.querySelectorAll('#photo-1 .map')[1].checked")
    browser.js("document.querySelector('#photo-1').focus()")
    browser.key('9')
    assert browser.js("document.querySelectorAll('#photo-1 .map')[1].checked")


def test_opacity_and_scale(browser, hm, page):
    browser.open(page).settle()
    def opacity(): return float(browser.js(f"getComputedStyle({canvas(1)}).opacity"))
    assert opacity()==pytest.approx(.7)
    browser.js("document.querySelector('#opacity').focus()")
    for _ in range(10): browser.key('ArrowRight')
    assert opacity()==pytest.approx(.8)
    weak = int(hm.maps[0].amax((1,2)).argmin())
    browser.js(f"document.querySelectorAll('#photo-1 .map')[{weak}].click()")
    def strongest(): return max(browser.js(pixels(1))[3::4])
    before = browser.js(pixels(1))
    browser.click('#same')
    assert browser.js(pixels(1))!=before


@pytest.mark.slow
def test_slices_of_a_volume(browser, tmp_path):
    "A slider moves slice and map together, from the strongest point on, without a request; a report shows 24 of 48"
    from test_volumes import one_scan
    vol,m = torch.linspace(0, 1, 48)[:,None,None].expand(1, 48, 16, 32).clone(),torch.zeros(2, 48, 4, 8)
    m[0,30],m[1,10,:2] = 1,2
    one_scan(vol, m, preds=tensor([[.6,.3,.1]]), targs=tensor([0]), vocab=names, asked=None).report(tmp_path/'r.html')
    browser.open(tmp_path/'r.html').settle()
    film = "getComputedStyle(document.querySelector('.film img')).top"
    def state(): return browser.js(f"[document.querySelector('.slices output').textContent, parseFloat({film})/document.querySelector('.film').offsetHeight]")
    def strength(): return max(browser.js(pixels(1))[3::4])
    assert state()==['30',pytest.approx(-15, abs=.01)] and strength()>100
    browser.js("document.querySelector('.slice').focus()")
    for _ in range(10): browser.key('ArrowLeft')
    assert state()==['10',pytest.approx(-5, abs=.01)] and strength()==0
    browser.click('#photo-1 label:nth-of-type(2)')
    assert strength()>200 and state()[0]=='10' and browser.requests==[] and all('getImageData' in o for o in browser.errors)
    jpeg = browser.js("(() => { const o = document.querySelector('.film img'); return [o.naturalWidth, o.naturalHeight] })()")
    assert jpeg==[192,24*96]


@pytest.mark.slow
def test_means_of_volumes(browser, tmp_path):
    "Each class has a film of its own, which begins at the strongest place of the mean map; volumes and maps of other sizes are stretched"
    def scan(size, at, cells):
        m = torch.zeros(1, *cells)
        m[0,at] = 3
        return torch.linspace(0, 1, size[0])[:,None,None].expand(1, *size).clone(),m
    scans = [scan((16,8,8), 1, (4,4,4)), scan((8,8,8), 1, (4,4,4)), scan((16,8,8), 2, (4,4,4)), scan((16,8,8), 5, (8,2,2))]
    vols,maps = zip(*scans)
    dl = torch.utils.data.DataLoader([(v,) for v in vols], batch_size=1)
    hm = Heatmaps(list(maps), tensor([0,0,1,1])[:,None], tensor([[.9,.1],[.9,.1],[.1,.9],[.1,.9]]), images=Images(dl, range(4)), targs=tensor([0,0,1,1]), vocab=['up','down'])
    up,down = hm.mean(by='targ').maps
    torch.testing.assert_close(up, maps[0]/3)
    assert down.shape==(1,4,4,4) and (down[0,2]==.75).all() and not down[0,:2].any() # (1+.5)/2
    hm.report(tmp_path/'r.html')
    browser.open(tmp_path/'r.html').settle()
    def at(): return browser.js("[...document.querySelectorAll('.mean output')].map(o => +o.textContent)")
    def strength(i): return max(browser.js(f"[...(o => o.getContext('2d').getImageData(0, 0, o.width, o.height).data)(document.querySelectorAll('.mean canvas')[{i}])].filter((_, i) => i%4==3)"))
    browser.js("document.querySelector('#means').scrollIntoView()")
    browser.settle()
    assert at()==[6,10] and strength(0)==255 and browser.js("document.querySelector('.mean canvas').getAttribute('aria-label')")=='Map of up, mean of 2 photos'
    browser.js("document.querySelector('.mean .slice').focus()")
    for _ in range(6): browser.key('ArrowRight')
    assert at()==[12,10] and strength(0)==0 and strength(1)==191 # on the scale of both
    assert browser.requests==[] and all('getImageData' in o for o in browser.errors)


def test_filter(browser, page):
    "By the predicted and the true class, and by a cell of the matrix; the status says how many"
    browser.open(page).settle()
    count = "document.querySelector('#count').textContent"
    def choose(id, value):
        set_it = f"o.value = '{value}'; o.dispatchEvent(new Event('change', {{bubbles: true}}))"
        browser.js(f"(o => {{ {set_it} }})(document.querySelector('#{id}'))")
    assert browser.js(count)=='6 of 6 photos' and not browser.js("document.querySelector('#none').offsetHeight")
    choose('predicted', 1)
    assert browser.js(shown)==['photo-2', 'photo-5'] and browser.js(count)=='2 of 6 photos'
    choose('truth', 2)
    assert browser.js(shown)==['photo-2']
    browser.click('#none')
    assert len(browser.js(shown))==6
    browser.click('a.cell[data-truth="1"][data-predicted="0"]')
    assert browser.js(shown)==['photo-6'] and browser.js(focus)=='photo-6'
    assert browser.js("document.querySelector('#truth').value")=='1'
    browser.settle()
    assert any(browser.js(f"[...{canvas(6, 2)}.getContext('2d').getImageData(0, 0, 64, 64).data]")) # drawn when it is shown
    browser.click('#none')
    browser.click('a.cell[data-truth="0"][data-predicted="0"]')
    assert browser.js(shown)==['photo-1', 'photo-4']


def test_means_in_browser(browser, hm, page):
    "Drawn, before the photos, on one scale unless asked otherwise, and as opaque as the photos' maps; without a script they are not there"
    browser.open(page).settle()
    browser.js("document.querySelector('#means').scrollIntoView()")
    browser.settle()
    order = "[...document.querySelectorAll('main > section')].map(o => o.id)"
    assert browser.js(order)==['', '', 'means', 'begin', 'tools', 'photos']
    canvases = "[...document.querySelectorAll('.mean canvas')]"
    strength = f"{canvases}.map(o => Math.max(...o.getContext('2d').getImageData(0, 0, o.width, o.height).data.filter((_, i) => i%4==3)))"
    colours = f"{canvases}.map(o => o.getContext('2d').getImageData(32, 32, 1, 1).data.join())"
    assert browser.js(f'{canvases}.length')==3 and min(browser.js(strength))>127
    before = browser.js(colours)
    browser.js("document.querySelector('#same').click()")
    assert set(browser.js(strength))=={255} and browser.js(colours)!=before
    browser.js("document.querySelector('#opacity').value = 30; document.querySelector('#opacity').dispatchEvent(new Event('input'))")
    assert browser.js(f"{canvases}.map(o => getComputedStyle(o).opacity)")==['0.3']*3
    assert browser.js(f"{canvases}[0].getAttribute('aria-label')")==f'Map of {names[0]}, mean of 2 photos'
    browser.open(page, script=False)
    assert not browser('Runtime.evaluate', expression="document.querySelector('#means').offsetHeight")['result']['value']


def test_keys(browser, page):
    "From photo to photo, past those that are hidden, not beyond the ends; controls keep their own keys"
    browser.open(page).settle()
    browser.js("document.querySelector('#photos').scrollIntoView()")
    browser.key('ArrowRight')
    first = browser.js(focus)
    assert first.startswith('photo-')
    browser.js("document.querySelector('#photo-1').focus()")
    browser.key('ArrowRight')
    assert browser.js(focus)=='photo-2'
    browser.click('a.cell[data-truth="0"][data-predicted="0"]')
    browser.key('ArrowRight')
    assert browser.js(focus)=='photo-4'
    browser.key('ArrowRight')
    assert browser.js(focus)=='photo-4'
    browser.key('ArrowLeft'); browser.key('ArrowLeft')
    assert browser.js(focus)=='photo-1'
    browser.js("document.querySelector('#truth').focus()")
    browser.key('ArrowRight')
    assert browser.js(focus)=='truth'


@pytest.mark.parametrize('width', [400, 1280, 2000])
def test_width(browser, page, width):
    "Nothing sticks out, panels do not overlap, and maps lie on their photos"
    browser.open(page, width).settle()
    assert browser.js('document.documentElement.scrollWidth')==width
    boxes = "o => (b => [b.left, b.top, b.right, b.bottom])(o.getBoundingClientRect())"
    for card in browser.js(f"{cards}.map({boxes})"): assert 0<=card[0]<card[2]<=width
    pairs = browser.js(f"[...document.querySelectorAll('.panel div')].map(o => [...o.children].map({boxes}))")
    for a,b in pairs: assert np.allclose(a, b, atol=.6)
    for panels in browser.js(f"{cards}.map(o => [...o.querySelectorAll('.panel')].map({boxes}))"):
        for a,b in zip(panels, panels[1:]): assert a[2]<=b[0]
    tall = browser.js("document.querySelector('#tools').offsetHeight")
    assert 20<tall<(220 if width==400 else 90)


contrast = """(() => {
  const number = s => s.match(/[\\d.]+/g).map(Number)
  const light = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4)
    return .2126*r+.7152*g+.0722*b
  }
  const colour = s => {
    const c = number(s), scale = s.startsWith('color(srgb') ? 255 : 1
    return [...c.slice(0, 3).map(v => v*scale), c[3] ?? 1]
  }
  const behind = o => {
    for (; o; o = o.parentElement) {
      const c = colour(getComputedStyle(o).backgroundColor)
      if (c[3] > 0) return c
    }
    return [255, 255, 255]
  }
  const res = []
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const o = walk.currentNode.parentElement
    if (!walk.currentNode.textContent.trim() || !o.offsetHeight || o.closest('option, script, style')) continue
    const [a, b] = [colour(getComputedStyle(o).color), behind(o)].map(c => light(c.slice(0, 3))).sort((x, y) => y-x)
    res.push([(a+.05)/(b+.05), walk.currentNode.textContent])
  }
  return res })()"""

@pytest.mark.parametrize('dark', [False, True])
def test_contrast(browser, page, dark):
    "Each text stands out from what is behind it as WCAG asks, 4.5 to 1, in light and dark"
    browser.open(page, dark=dark).settle()
    ratios = browser.js(contrast)
    assert len(ratios)>60 and min(ratios)[0]>=4.5, min(ratios)
    page_is_dark = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r'\d+', page_is_dark)[:3]))<150)==dark


def test_accessible(browser, page):
    "Pictures, controls and choices have names"
    browser.open(page).settle()
    nodes = browser('Accessibility.getFullAXTree')['nodes']
    for role in ('image', 'slider', 'radio', 'comboBoxSelect', 'combobox', 'button', 'checkbox', 'region', 'link', 'heading',
                 'radiogroup', 'group'):
        for o in nodes:
            if o.get('ignored') or o['role']['value']!=role: continue
            assert o.get('name', {}).get('value') or role in ('group', 'radiogroup'), o
    assert {'slider', 'radio', 'combobox'} <= {o['role']['value'] for o in nodes if not o.get('ignored')}
    assert browser.js("document.documentElement.lang")=='en'


def test_print(browser, page, tmp_path):
    "On paper all photos have their maps, and there are no controls"
    browser.open(page, 1280, 300).settle()
    drawn = f"{cards}.filter(o => o.querySelector('figcaption').textContent).length"
    browser.pdf(tmp_path/'r.pdf')
    assert browser.js(drawn)==6 and (tmp_path/'r.pdf').stat().st_size>10000
    browser('Emulation.setEmulatedMedia', media='print')
    try:
        assert browser.js("getComputedStyle(document.querySelector('#tools')).display")=='none'
        assert browser.js("getComputedStyle(document.body).backgroundColor")=='rgb(255, 255, 255)'
    finally: browser('Emulation.setEmulatedMedia', media='')


def test_without_script(browser, page):
    "Photos and answers are there, and what does nothing is not; numbers of the matrix lead to a photo"
    browser.open(page, script=False)
    browser('DOM.getDocument', depth=-1)
    text = browser('Runtime.evaluate', expression='document.body.innerText', returnByValue=True)['result']['value']
    assert 'drawn by a script' in text and names[0] in text and 'opacity' not in text
    assert Page(page).all('a', class_='cell', data_truth='2', data_predicted='1')[0]['href']=='#photo-2'


def test_signed_in_browser(browser, hm, tmp_path):
    "Against is blue, for is red, and nothing is clear"
    m = torch.zeros(6, 3, 8, 8)
    m[:,:,2:6,:3],m[:,:,2:6,5:] = -1,1
    browser.open(hm.replace(maps=m).report(tmp_path/'r.html')).settle()
    got = np.array(browser.js(pixels(1))).reshape(64, 64, 4)
    against,none,plus = got[32,12],got[4,32],got[32,52]
    assert against[2]>against[0]+50 and plus[0]>plus[2]+50 and against[3]>240<plus[3] and none[3]<8

"Grad-CAM on the default layer and on inner ones, in every kind of model, against a plain backward pass through all of it."
import pytest, threading, timm, torchvision
from timm.models import deit, swin_transformer, vision_transformer
from shared import *
from test_no_trace import state, same as unchanged

tv = torchvision.models


def by_hand(model, layer, xb, c, view=noop):
    "Grad-CAM of class `c`, by a backward pass through the whole model; `view` makes maps (n, C, h, w) of what the layer puts out"
    kept = []
    def keep(m, i, o):
        kept.append(o)
        return o.clone() # an in-place ReLU may follow
    h = layer.register_forward_hook(keep)
    with torch.enable_grad(): y = model.eval()(xb)[:,c].sum()
    h.remove()
    g, = torch.autograd.grad(y, kept[-1])
    acts,g = view(kept[-1]),view(g)
    return (g.mean((2,3), keepdim=True)*acts).sum(1).detach()


def close_maps(maps, want):
    assert want.abs().max()>0
    torch.testing.assert_close(maps, want, rtol=1e-3, atol=1e-5*float(want.abs().max()))


def one_line(f, *words, kind=ValueError):
    with pytest.raises(kind) as e: f()
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value


def pic_dls(pics): return pic_block(get_items=get_image_files).dataloaders(pics, bs=4, num_workers=0, device='cpu')
def names_of(model, layer): return [n for n,m in model.named_modules() if m is layer]


def ready(model):
    "In eval mode, and with a head that is not all zeros, as some are made"
    for m in model.modules():
        if isinstance(m, nn.Linear) and not m.weight.any(): nn.init.normal_(m.weight, std=.1)
    return model.eval()


def check(model, xb, views):
    "The first of the layers `views` is the default one, and each gives the maps of a plain backward pass; its view says how its output is a map"
    for k,(name,view) in enumerate(views.items()):
        layer = model.get_submodule(name)
        if k==0: assert name in names_of(model, default_layer(model, xb))
        want = torch.stack([by_hand(model, layer, xb, c, view) for c in (2,0)], 1)
        for o in [None]*(k==0)+[name, layer]: close_maps(model_heatmaps(model, xb, cls=[2,0], layer=o, relu=False)[0], want)


families = dict(resnet18=(resnet18, '0.6'), xresnet18=(xresnet18, '0.6.0.act'), squeezenet1_1=(models.squeezenet1_1, '0.0.7'),
                densenet121=(models.densenet121, '0.0.denseblock3.denselayer2.conv1'), vgg11_bn=(models.vgg11_bn, '0.0.16'), alexnet=(models.alexnet, '0.0.6'))


@pytest.mark.slow
@pytest.mark.parametrize('arch', families)
def test_families_of_fastai(arch):
    "Also where an in-place ReLU follows the layer, and where all of the model is frozen"
    f,inner = families[arch]
    set_seed(1)
    model,x = create_vision_model(f, 3, pretrained=False).eval(),torch.randn(2, 3, 96, 128)
    assert default_layer(model) is model[0]
    check(model, x, {'0':noop, inner:noop})
    want = model_heatmaps(model, x, cls=1)[0]
    torch.testing.assert_close(model_heatmaps(model.requires_grad_(False), x, cls=1)[0], want)


def test_all_families_of_fastai_are_here():
    def stem(name): return re.match('[a-z]+', name)[0]
    assert {stem(f.__name__) for f in model_meta}=={stem(n) for n in families}


plain = dict(mobilenet_v3_small=(tv.mobilenet_v3_small, 'features', 'features.8.block.0'),
             efficientnet_b0=(tv.efficientnet_b0, 'features', 'features.6.0.block.1.0'),
             convnext_tiny=(tv.convnext_tiny, 'features', 'features.5'), regnet_y_400mf=(tv.regnet_y_400mf, 'trunk_output', 'trunk_output.block3'))


@pytest.mark.parametrize('arch', plain)
def test_torchvision(arch):
    f,default,inner = plain[arch]
    set_seed(1)
    check(f(num_classes=3).eval(), torch.randn(2, 3, 64, 96), {default:noop, inner:noop})


def tokens(h, w, prefix): return lambda o: o[:,prefix:].transpose(1,2).reshape(len(o), -1, h, w)
def last(o): return o.permute(0,3,1,2)


def vit(name, **kwargs): return partial(timm.create_model, name, num_classes=3, **kwargs)
def of_tokens(h, w, prefix, *names): return {n:tokens(h, w, prefix) for n in names}
vits = dict(vit=(vit('vit_tiny_patch16_224', img_size=64), 64, of_tokens(4, 4, 1, 'blocks.11.norm1', 'blocks.4')),
            vit_not_square=(vit('vit_tiny_patch16_224', img_size=(160,224), depth=3), (160,224), of_tokens(10, 14, 1, 'blocks.2.norm1', 'blocks.0.norm2')),
            vit_mean=(vit('vit_tiny_patch16_224', img_size=64, global_pool='avg'), 64, of_tokens(4, 4, 1, 'norm', 'blocks.10')),
            vit_attention_pool=(vit('vit_tiny_patch16_224', img_size=64, global_pool='map', depth=3), 64, of_tokens(4, 4, 1, 'norm', 'blocks.1')),
            vit_registers=(vit('vit_small_patch14_reg4_dinov2', img_size=56, depth=3), 56, of_tokens(4, 4, 5, 'blocks.2.norm1', 'blocks.1.ls2')),
            deit=(vit('deit_tiny_patch16_224', img_size=64), 64, of_tokens(4, 4, 1, 'blocks.11.norm1', 'blocks.6.mlp')),
            deit_distilled=(vit('deit_tiny_distilled_patch16_224', img_size=64), 64, of_tokens(4, 4, 2, 'blocks.11.norm1', 'blocks.10')),
            hybrid=(vit('vit_tiny_r_s16_p8_224', img_size=128, depth=3), 128,
                    of_tokens(4, 4, 1, 'blocks.2.norm1', 'blocks.1') | {'patch_embed.backbone':noop}),
            mixer=(vit('mixer_s16_224', img_size=64), 64, of_tokens(4, 4, 0, 'norm', 'blocks.5')),
            swin=(vit('swin_tiny_patch4_window7_224', img_size=64), 64,
                  {'norm':last, 'layers.2':last, 'layers.2.blocks.1':last, 'layers.2.blocks.1.mlp':tokens(4,4,0)}),
            swin_not_square=(vit('swin_tiny_patch4_window7_224', img_size=(64,96), depths=(2,2,1,1)), (64,96), {'norm':last, 'layers.1':last}),
            torchvision_vit=(partial(tv.VisionTransformer, 64, 16, 3, 2, 32, 64, num_classes=3), 64,
                             of_tokens(4, 4, 1, 'encoder.layers.encoder_layer_2.ln_1', 'encoder.layers.encoder_layer_1')),
            torchvision_swin=(partial(tv.swin_t, num_classes=3), 64, {'permute':noop, 'norm':last, 'features.5':last}))


@pytest.mark.slow
@pytest.mark.parametrize('name', vits)
def test_transformers(name):
    f,size,views = vits[name]
    set_seed(1)
    check(ready(f()), torch.randn(2, 3, *(size if isinstance(size, tuple) else (size,size))), views)


convs = dict(convnext_atto=(128, 'norm_pre', 'stages.2.blocks.1.conv_dw'),
             efficientvit_b0=(64, 'head.in_conv', 'stages.2'), mobilevit_xxs=(64, 'final_conv', 'stages.3.0'))


@pytest.mark.parametrize('name', convs)
def test_other_networks_of_timm(name):
    size,default,inner = convs[name]
    set_seed(1)
    check(timm.create_model(name, num_classes=3).eval(), torch.randn(2, 3, size, size), {default:noop, inner:noop})


def test_the_class_token_and_the_registers_are_no_patches():
    "A patch whose content alone differs changes its own cell of the first map only"
    for prefix,f in ((1, vit('vit_tiny_patch16_224', img_size=(32,64), depth=1)), (5, vit('vit_small_patch14_reg4_dinov2', img_size=(28,56), depth=1))):
        model = ready(f())
        p = model.patch_embed.patch_size[0]
        x = torch.randn(1, 3, 2*p, 4*p)
        x2 = x.clone()
        x2[...,p:,2*p:3*p] += 1
        a,b = [model_heatmaps(model, o, cls=0, method='activations', layer='norm_pre')[0][0,0] for o in (x,x2)]
        assert a.shape==(2,4) and ((a-b).abs()>1e-5).nonzero().tolist()==[[1,2]]


@pytest.fixture(scope='module')
def timm_learner(pics):
    set_seed(7)
    dls = pic_dls(pics)
    return vision_learner(dls, 'vit_tiny_patch16_224', pretrained=False, normalize=False, img_size=64, depth=4)


def test_a_vit_in_a_vision_learner(timm_learner):
    "fastai's body is the whole ViT with its pooling, so the layer is found inside it"
    learn = timm_learner
    x,name = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(Tensor),'0.model.blocks.3.norm1'
    hm = learn.get_heatmaps(cls=['Red','Blue_ish'], relu=False)
    assert names_of(learn.model, default_layer(learn.model, x))==[name]
    for j,c in enumerate((1,0)): close_maps(hm.maps[:,j], by_hand(learn.model, learn.model.get_submodule(name), x, c, tokens(4,4,1)))
    with learn.no_bar(): torch.testing.assert_close(hm.preds, learn.get_preds()[0].as_subclass(Tensor), rtol=1e-3, atol=1e-5)
    for method in ('legrad', 'ablationcam'):
        maps = learn.get_heatmaps(hm.items[0], cls='Red', method=method, relu=False).maps[0,0]
        assert maps.shape==(4,4) and maps.isfinite().all() and maps.amax()>maps.amin()
    ax = learn.show_gradcam(hm.items[0], 'Red', layer='0.model.blocks.1', relu=False)
    ax.figure.canvas.draw()
    close_maps(torch.tensor(np.array(ax.images[1].get_array())).float(), by_hand(learn.model, learn.model[0].model.blocks[1], x[:1], 1, tokens(4,4,1))[0])


@pytest.mark.parametrize('layer', ['0.model.blocks.3', '0.model.norm'])
def test_patches_without_influence(timm_learner, layer):
    "After the last attention a ViT reads its class token only: a map of the patches is flat, and its title says so"
    hm = timm_learner.get_heatmaps(layer=layer, relu=False)
    assert not hm.maps.any()
    assert 'flat' in hm.show().get_title() and 'flat' not in timm_learner.get_heatmaps(relu=False).show().get_title()


def test_a_swin_in_a_vision_learner(pics):
    "fastai's own head cannot read a Swin's channels, which come last: torch says so; without that head it works"
    set_seed(7)
    dls = pic_dls(pics)
    learn = vision_learner(dls, 'swin_tiny_patch4_window7_224', pretrained=False, normalize=False, img_size=64, depths=(1,1,1,1))
    before = state(learn.model)
    one_line(lambda: learn.get_heatmaps(), 'running_mean', kind=RuntimeError)
    unchanged(before, state(learn.model))
    learn = Learner(dls, ready(vit('swin_tiny_patch4_window7_224', img_size=64, depths=(1,1,1,1))()), loss_func=CrossEntropyLossFlat())
    learn.model.head.fc = nn.Linear(768, 2)
    hm,x = learn.get_heatmaps(cls='Red', relu=False),torch.cat([b[0] for b in learn.dls.valid]).as_subclass(Tensor)
    close_maps(hm.maps[:,0], by_hand(learn.model, learn.model.norm, x, 1, last))


@pytest.mark.filterwarnings('ignore:The parameter', 'ignore:Arguments other')
@pytest.mark.parametrize('arch', ['resnet10t', 'convnext_atto', tv.convnext_tiny], ids=['resnet10t', 'convnext_atto', 'convnext_tiny'])
def test_networks_of_timm_in_a_vision_learner(pics, arch):
    "The body's output, also where the body holds linear layers"
    set_seed(7)
    dls = pic_dls(pics)
    learn = vision_learner(dls, arch, pretrained=False, normalize=False)
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(Tensor)
    close_maps(learn.get_heatmaps(cls='Red', relu=False).maps[:,0], by_hand(learn.model, learn.model[0], x, 1))


class Custom(nn.Module):
    "Parts that are defined in another order than they run in, a functional ReLU and a pooling that spreads the map again"
    def __init__(self):
        super().__init__()
        self.fc,self.pool = nn.Linear(8, 3),nn.AdaptiveAvgPool2d(2)
        self.late,self.early = nn.Conv2d(6, 8, 3, 2, 1),nn.Conv2d(3, 6, 3, 2, 1)
        self.parts = nn.ModuleDict(dict(a=nn.Conv2d(6, 6, 1)))
    def forward(self, x):
        x = F.relu(self.parts['a'](F.relu_(self.early(x))), inplace=True)
        return self.fc(self.pool(self.late(x)).amax((2,3)))


def test_custom_networks():
    set_seed(1)
    model,x = Custom(),torch.randn(2, 3, 24, 40)
    check(model, x, {'late':noop, 'parts.a':noop})
    check(nn.Sequential(nn.BatchNorm2d(3), model, nn.Dropout()), x, {'1.late':noop, '1.early':noop})


class Transformer(nn.Module):
    "A ViT as people write it themselves, from PyTorch's parts"
    def __init__(self, norm_first):
        super().__init__()
        self.embed,self.cls = nn.Conv2d(3, 16, 8, 8),nn.Parameter(torch.randn(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
        self.encoder,self.head = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False),nn.Linear(16, 3)
    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1,2)
        return self.head(self.encoder(torch.cat([self.cls.expand(len(x), -1, -1), x], 1))[:,0])


@pytest.mark.parametrize('norm_first', [True, False])
def test_a_vit_from_pytorchs_own_layers(norm_first):
    "Whose fast path for inference calls none of its parts"
    set_seed(1)
    model,x = Transformer(norm_first).eval(),torch.randn(2, 3, 32, 48)
    layer = default_layer(model, x)
    assert names_of(model, layer)[0] in ('encoder.layers.1', 'encoder.layers.2.norm1')
    for o in (None, 'encoder.layers.1', 'encoder.layers.1.norm2', 'encoder.layers.0'):
        close_maps(model_heatmaps(model, x, cls=1, layer=o, relu=False)[0][:,0], by_hand(model, find_layers(model, o, x)[0], x, 1, tokens(4,6,1)))
    assert not model_heatmaps(model, x, layer='encoder.layers.2', relu=False)[0].any()


class Twice(nn.Module):
    "One block for two stages"
    def __init__(self):
        super().__init__()
        self.stem,self.block,self.fc = nn.Conv2d(3, 6, 3),nn.Sequential(nn.Conv2d(6, 6, 3, 2), nn.ReLU(inplace=True)),nn.Linear(6, 3)
    def forward(self, x): return self.fc(self.block(self.block(self.stem(x))).mean((2,3)))


@pytest.mark.parametrize('name', ['block', 'block.0'])
def test_a_module_that_is_used_twice(name):
    "The last call counts: its activations, and the gradient that reaches them"
    set_seed(1)
    model,x = Twice().eval(),torch.randn(2, 3, 41, 41)
    assert default_layer(model, x) is model.block
    with torch.no_grad():
        first = model.block(model.stem(x))
        acts = model.block(first) if name=='block' else model.block[0](first)
    acts.requires_grad_()
    y = model.fc((acts if name=='block' else F.relu(acts)).mean((2,3)))[:,2]
    g, = torch.autograd.grad(y.sum(), acts)
    close_maps(model_heatmaps(model, x, cls=2, layer=name, relu=False)[0][:,0], (g.mean((2,3), keepdim=True)*acts).sum(1).detach())


class Net(nn.Sequential):
    "A small body and head, with modules that have a mode and a state"
    def __init__(self):
        body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        super().__init__(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3)))


@pytest.fixture
def net():
    set_seed(1)
    res = Net()
    for _ in range(3): res.train()(torch.randn(4, 3, 33, 33)) # some state
    yield res.eval()
    torch.compiler.reset()


def counting(calls, compiled):
    "A backend for torch.compile that tells when it compiles and when its code runs"
    def backend(gm, inputs):
        compiled.append(1)
        def run(*args):
            calls.append(1)
            return gm.forward(*args)
        return run
    return backend


@pytest.mark.slow
@pytest.mark.parametrize('how', ['eager', 'aot_eager', 'in place', 'part', 'part in place', 'part by hand'])
def test_compiled_models(net, how):
    "The maps are those of the model itself, layers are found by every name they have, and the model is as compiled afterwards as before"
    x,calls,compiled = torch.randn(2, 3, 33, 33),[],[]
    want = {o: model_heatmaps(net, x, cls=[2,0], layer=o, relu=False)[0] for o in (None, '0', '0.3', '0.1')}
    plain,bn = net(x).detach(),net[0][1]
    backend = how if 'eager' in how else counting(calls, compiled)
    model = net
    if   how in ('eager','aot_eager'): model = torch.compile(net, backend=backend)
    elif how=='in place':              net.compile(backend=backend)
    elif how=='part':                  net[0] = torch.compile(net[0], backend=backend)
    elif how=='part in place':         net[0].compile(backend=backend)
    elif how=='part by hand':          net[0].forward = torch.compile(net[0].forward, backend=backend)
    with torch.no_grad(): torch.testing.assert_close(model(x), plain)
    if 'in place' in how and not calls: pytest.skip('this torch, as 2.6 does, compiles no Sequential in place')
    model.train()
    bn.eval()
    before,n,c = state(model),len(calls),len(compiled)
    names = dict(model.named_modules())
    for o,w in want.items():
        close_maps(model_heatmaps(model, x, cls=[2,0], layer=o, relu=False)[0], w)
        if o is None: continue
        own = [k for k in names if k.replace('_orig_mod.', '').replace('._orig_mod', '')==o]
        assert own
        for k in own:
            for l in (k, names[k]): close_maps(model_heatmaps(model, x, cls=[2,0], layer=l, relu=False)[0], w)
    for method in ('saliency', 'occlusion', 'ablationcam'): assert model_heatmaps(model, x, cls=1, method=method, relu=False)[0].any()
    unchanged(before, state(model))
    assert (len(calls),len(compiled))==(n,c), 'the compiled code has run, which passes hooks by'
    model.eval()
    with torch.no_grad(): torch.testing.assert_close(model(x), plain)
    if 'eager' not in how: assert len(calls)>n and len(compiled)==c, 'the model is compiled no more, or once again'


@pytest.mark.slow
def test_compiled_models_in_two_threads(net):
    "Runs that overlap, of which the first to begin is the first to end, leave torch compiling as it did before"
    x,calls,compiled,steps = torch.randn(2, 3, 33, 33),[],[],[threading.Event() for _ in range(3)]
    net.compile(backend=counting(calls, compiled))
    with torch.no_grad(): net(x)
    if not calls: pytest.skip('this torch, as 2.6 does, compiles no Sequential in place')
    calls.clear()
    def first(acts, grads): steps[0].set(); steps[1].wait(20); return acts.mean(1)
    def second(acts, grads): steps[1].set(); steps[2].wait(20); return acts.mean(1)
    a,b = [threading.Thread(target=lambda f=f: model_heatmaps(net, x, method=f)) for f in (first, second)]
    a.start(); steps[0].wait(20); b.start(); a.join(); steps[2].set(); b.join()
    with torch.no_grad(): net(x)
    torch.compiler.set_stance('default')
    assert calls, 'the model is compiled no more'


@pytest.mark.parametrize('wrap', ['compile', 'compile in place', 'DataParallel', 'compiled DataParallel'])
def test_a_learner_with_a_wrapped_model(pics, wrap):
    set_seed(1)
    learn = Learner(pic_dls(pics), Net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.model[1][-1] = nn.Linear(8, 2)
    want,inner = learn.get_heatmaps(cls='Red', relu=False),learn.get_heatmaps(cls='Red', layer='0.3', relu=False)
    x,net = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(Tensor),learn.model
    close_maps(inner.maps[:,0], by_hand(net, net[0][3], x, 1))
    net.train()
    if 'DataParallel' in wrap: learn.model = nn.DataParallel(learn.model)
    if wrap=='compile in place': learn.model.compile(backend='eager')
    elif 'compile' in wrap: learn.model = torch.compile(learn.model, backend='eager')
    model,before = learn.model,state(learn.model, learn)
    own = next(k for k,m in model.named_modules() if m is net[0][3])
    torch.testing.assert_close(learn.get_heatmaps(cls='Red', relu=False).maps, want.maps, rtol=1e-4, atol=1e-6)
    for o in ('0.3', net[0][3], own): torch.testing.assert_close(learn.get_heatmaps(cls='Red', layer=o, relu=False).maps, inner.maps, rtol=1e-4, atol=1e-6)
    learn.show_gradcam(want.items[0])
    learn.plot_heatmap_grid(n=2)
    assert learn.model is model
    unchanged(before, state(learn.model, learn))
    torch.compiler.reset()


def test_data_parallel(net):
    "Also with the names that the wrapper's own modules have"
    x,wrapped = torch.randn(2, 3, 33, 33),nn.DataParallel(net)
    before = state(wrapped.train())
    for o in (None, '0.3', net[0][3], 'module.0.3'):
        want = by_hand(net, net[0] if o is None else net[0][3], x, 2)
        wrapped.train()
        close_maps(model_heatmaps(wrapped, x, cls=2, layer=o, relu=False)[0][:,0], want)
    unchanged(before, state(wrapped))


def small(kind):
    set_seed(1)
    return ready(dict(cnn=Net, vit=lambda: vision_transformer.VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=2, num_classes=3),
                      deit=lambda: deit.VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=3),
                      swin=lambda: swin_transformer.SwinTransformer(32, 2, embed_dim=12, depths=(1,2), num_heads=(2,2), window_size=4, num_classes=3))[kind]())


options = dict(occlusion=dict(window=16), scorecam=dict(channels=4), rise=dict(n=20), smoothgrad=dict(n=3), integrated_gradients=dict(steps=20))
views = dict(cnn=noop, vit=tokens(4,4,1), deit=tokens(4,4,2), swin=last)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:this model calls no ReLU', 'ignore:the attributions')
@pytest.mark.parametrize('kind', views)
@pytest.mark.parametrize('method', [o for o in heatmap_methods if o not in ('cam','legrad')])
def test_every_method_in_every_kind_of_model(kind, method):
    model,x = small(kind),torch.randn(2, 3, 32, 32)
    maps,_ = model_heatmaps(model, x, cls=[1,2], method=method, relu=False, **options.get(method, {}))
    assert maps.isfinite().all() and (maps.amax((2,3))>maps.amin((2,3))).all()


legrads = {n:vits[n][0] for n in ('vit_registers', 'vit_mean', 'hybrid', 'torchvision_vit')}
legrads.update(vit=partial(small, 'vit'), own=partial(Transformer, True), own_norm_last=partial(Transformer, False))


@pytest.mark.parametrize('name', legrads)
def test_legrad_of_vits(name):
    set_seed(1)
    model,size,grid = ready(legrads[name]()),dict(vit=32, hybrid=128, vit_registers=56).get(name, 64),(4,4)
    if isinstance(model, Transformer): size,grid = (32,48),(4,6)
    maps,_ = model_heatmaps(model, torch.randn(2, 3, *(size if isinstance(size, tuple) else (size,size))), cls=[1,2], method='legrad', relu=False)
    assert maps.shape[2:]==grid and maps.isfinite().all() and (maps>=0).all() and (maps.amax((2,3))>maps.amin((2,3))).all()


@pytest.mark.parametrize('kind', ['cnn', 'swin', 'deit'])
def test_legrad_is_for_no_other_model(kind):
    "A Swin attends in windows, and a distilled DeiT has two heads, which are no chain of layers"
    one_line(lambda: model_heatmaps(small(kind), torch.randn(2, 3, 32, 32), method='legrad'), "'legrad' is for vision transformers", 'gradcam')


def acts_of(model, layer, x):
    kept = []
    h = layer.register_forward_hook(lambda m, i, o: kept.append(o.detach().clone()))
    with torch.no_grad(): y = model(x)
    h.remove()
    return kept[-1],y


@pytest.mark.parametrize('kind', views)
def test_ablation(kind):
    "A channel is silenced in the patches, while class and distillation tokens stay"
    model,x,view = small(kind),torch.randn(2, 3, 32, 32),views[kind]
    layer = default_layer(model, x)
    acts,y = acts_of(model, layer, x)
    a,want = view(acts),0
    for k in range(a.shape[1]):
        def silence(m, i, o):
            if kind=='cnn':  o[:,k] = 0
            elif kind=='swin': o[...,k] = 0
            else: o[:,dict(vit=1, deit=2)[kind]:,k] = 0
            return o
        h = layer.register_forward_hook(silence)
        with torch.no_grad(): want = want + ((y-model(x))/y.abs())[:,1,None,None]*a[:,k]
        h.remove()
    close_maps(model_heatmaps(model, x, cls=1, method='ablationcam', relu=False, bs=7)[0][:,0], want)


@pytest.mark.parametrize('kind', views)
def test_scores(kind):
    "Score-CAM, of all channels: the picture seen through each of them"
    model,x = small(kind),torch.randn(2, 3, 32, 32)
    acts = views[kind](acts_of(model, default_layer(model, x), x)[0])
    for xi,a,got in zip(x, acts, model_heatmaps(model, x, cls=1, method='scorecam', relu=False, bs=5)[0]):
        masks = F.interpolate(a[None], (32,32), mode='bilinear')[0]
        masks = torch.stack([(m-m.min())/(m.max()-m.min()) if m.max()>m.min() else 0*m for m in masks])
        with torch.no_grad(): w = torch.stack([model(xi[None]*m)[0,1] for m in masks]).softmax(0)
        close_maps(got[0], (w[:,None,None]*a).sum(0))


@pytest.mark.parametrize('kind', views)
def test_occlusion_and_saliency(kind):
    model,x = small(kind),torch.randn(2, 3, 32, 32)
    maps = model_heatmaps(model, x, cls=1, method='occlusion', window=16, stride=16, fill=.5, relu=False)[0]
    with torch.no_grad():
        for t in (0,16):
            for l in (0,16):
                hidden = x.clone()
                hidden[...,t:t+16,l:l+16] = .5
                close_maps(maps[:,0,t:t+16,l:l+16], (model(x)-model(hidden))[:,1,None,None].expand(-1,16,16))
    x2 = x.clone().requires_grad_()
    model(x2)[:,1].sum().backward()
    close_maps(model_heatmaps(model, x, cls=1, method='saliency')[0][:,0], x2.grad.abs().amax(1))


@pytest.mark.parametrize('method', ['occlusion', 'smoothgrad', 'integrated_gradients', 'rise'])
def test_a_model_that_calls_view(method):
    "Changed images go in with channels that lie side by side, which `view` cannot take: then they go in as they came, and the map is that of the same model with `flatten`"
    class Net(nn.Module):
        def __init__(self, viewed):
            super().__init__()
            self.conv,self.lin,self.viewed,self.sides = nn.Conv2d(3, 4, 3, stride=4),nn.Linear(4*8*8, 3),viewed,[]
        def forward(self, x):
            self.sides.append(x.is_contiguous())
            x = F.relu(self.conv(x))
            return self.lin(x.view(len(x), -1) if self.viewed else x.flatten(1))
    set_seed(0)
    viewed,flat = Net(True).eval(),Net(False).eval()
    flat.load_state_dict(viewed.state_dict())
    x = torch.randn(2, 3, 32, 32)
    a,b = [model_heatmaps(m, x, cls=1, method=method, relu=False, **quick.get(method, {}))[0] for m in (viewed, flat)]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert a.any() and 0<viewed.sides.count(False)<flat.sides.count(False)

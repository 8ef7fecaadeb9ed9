"Which layer is the default, in models whose classes and layers have any name; and whether a map's cells are where they are drawn."
import sys, timm, warnings
from shared import *
from test_models import one_line, ready, names_of, by_hand, tokens, close_maps
from fastai_heatmaps.core.layers import attentions, layer_names
sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
import timm_layers


class MSA(nn.Module):
    "Self-attention as people write it, under a name that does not give it away"
    def __init__(self, d, heads):
        super().__init__()
        self.heads,self.qkv,self.soft,self.drop,self.out = heads,nn.Linear(d, 3*d),nn.Softmax(-1),nn.Dropout(.1),nn.Linear(d, d)
    def forward(self, x):
        n,t,d = x.shape
        q,k,v = self.qkv(x).view(n, t, 3, self.heads, d//self.heads).permute(2,0,3,1,4)
        a = self.drop(self.soft(q @ k.transpose(-2,-1) / (d//self.heads)**.5))
        return self.out((a @ v).transpose(1,2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.n1,self.mix,self.n2,self.mlp = nn.LayerNorm(d),MSA(d, heads),nn.LayerNorm(d),nn.Sequential(nn.Linear(d, 2*d), nn.GELU(), nn.Linear(2*d, d))
    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.mlp(self.n2(x))


class Windows(nn.Module):
    "Puts the tokens of a picture into windows of 2×2, one window after another"
    def forward(self, x):
        n,t,d = x.shape
        s = math.isqrt(t)//2
        return x.view(n, s, 2, s, 2, d).transpose(2,3).reshape(n, t, d)


class Vit(nn.Module):
    "A ViT written by hand, with a class token; in `windows`, its tokens are in another order"
    def __init__(self, depth=3, d=24, windows=False, side=64):
        super().__init__()
        self.embed,self.token,self.place = nn.Conv2d(3, d, 8, 8),nn.Parameter(torch.randn(1, 1, d)),nn.Parameter(torch.randn(1, (side//8)**2, d)*.1)
        self.order,self.blocks = Windows() if windows else nn.Identity(),nn.Sequential(*[Block(d, 3) for _ in range(depth)])
        self.norm,self.head = nn.LayerNorm(d),nn.Linear(d, 4)
    def forward(self, x):
        x = self.order(self.embed(x).flatten(2).transpose(1,2) + self.place)
        return self.head(self.norm(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1)))[:,0])


def vit(**kwargs):
    set_seed(3)
    return Vit(**kwargs).eval()


def told(f):
    "Give what `f()` returns, and what it warns of"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        res = f()
    return res,[str(o.message) for o in caught if 'fastai_heatmaps' in o.filename]


def test_an_attention_is_told_by_what_it_does():
    "Not by its class's name: neither its softmax, tokens × tokens, nor a dropout of that is the default"
    model,x = vit(),torch.randn(2, 3, 64, 64)
    assert attentions(model, x)==[f'blocks.{i}.mix' for i in range(3)]
    layer,said = told(lambda: default_layer(model, x))
    assert layer is model.blocks[2].n1 and not said
    close_maps(model_heatmaps(model, x, cls=1, relu=False)[0][:,0], by_hand(model, layer, x, 1, tokens(8,8,1)))


class TwoHeads(nn.Module):
    "A second head reads the largest token, as in a VOLO"
    def __init__(self):
        super().__init__()
        self.vit,self.aux = vit(),nn.Linear(24, 4)
    def forward(self, x):
        m = self.vit
        z = m.norm(m.blocks(torch.cat([m.token.expand(len(x), -1, -1), m.embed(x).flatten(2).transpose(1,2)+m.place], 1)))
        return m.head(z[:,0]) + .5*self.aux(z[:,1:]).amax(1)


def test_a_head_that_reads_one_token_is_no_default():
    model,x = TwoHeads().eval(),torch.randn(1, 3, 64, 64)
    assert default_layer(model, x) is model.vit.blocks[2].n1


class Flip(nn.Module):
    "Turns pictures upside down"
    def forward(self, x): return x.flip(2)


def test_what_cannot_be_decided_is_told():
    "In one line, with the names of other layers: no layer here has its cells in the picture's order"
    model,x = nn.Sequential(Flip(), vit()),torch.randn(1, 3, 64, 64)
    layer,said = told(lambda: default_layer(model, x))
    assert layer is model[1].blocks[2].n1 and len(said)==1 and '\n' not in said[0]
    assert "The default is '1.blocks.2.n1'" in said[0] and "'1.blocks.1'" in said[0]


def test_a_layer_before_the_order_is_lost():
    model,x = vit(),torch.randn(1, 3, 64, 64)
    model.embed = nn.Sequential(model.embed, Flip())
    layer,said = told(lambda: default_layer(model, x))
    assert layer is model.embed[0] and not said


@pytest.mark.parametrize('windows', [False, True])
def test_a_named_layer_whose_cells_are_not_in_order(windows):
    "There is one warning a call, however many batches there are"
    model,x = vit(windows=windows),torch.randn(2, 3, 64, 64)
    for layer in ('blocks.1', model.blocks[1].n2):
        _,said = told(lambda: model_heatmaps(model, x, layer=layer))
        assert len(said)==windows and all("of layer 'blocks.1" in o and '\n' not in o and 'another order' in o for o in said)
    assert not told(lambda: model_heatmaps(model, x, layer='embed'))[1]


def counted(model, x, **kwargs):
    "How many times, and on how many pictures in all, the model runs"
    ran = []
    h = model.register_forward_pre_hook(lambda m, i: ran.append(len(i[0])))
    try: model_heatmaps(model, x, **kwargs)
    finally: h.remove()
    return len(ran),sum(ran)


def test_the_search_stays_cheap(pics):
    "Passes of the model, and pictures in them, for a batch of 8"
    x = torch.randn(8, 3, 64, 64)
    body_and_head,cnn,v = net_for('gradcam').eval(),models.resnet18(weights=None).eval(),vit()
    for layer in (None, '0', '0.7', '0.7.1.bn2', '0.7.1.relu'): assert counted(body_and_head, x, layer=layer)==(1, 8)
    assert counted(cnn, x)==(2, 9)
    for layer in ('layer4', 'layer3.0.conv1'): assert counted(cnn, x, layer=layer)==(1, 8)
    assert counted(cnn, x, layer='layer4.1.relu')==(2, 9)
    assert counted(v, x)==(7, 14)
    assert counted(v, x, layer='blocks.1')==(6, 13)


def test_a_large_set_pays_once(pics):
    "The places of a named layer are tried with the first batch"
    learn = pic_learner(pics, bs=2)
    set_seed(3)
    learn.model = nn.Sequential(Vit(), nn.Linear(4, 2))
    ran = []
    h = learn.model.register_forward_pre_hook(lambda m, i: ran.append(len(i[0])))
    learn.get_heatmaps(layer='0.blocks.1')
    h.remove()
    assert ran==[1]*5+[2]*3, ran


class NoGrad(nn.Module):
    "A model whose forward runs without autograd: all of it, or its end"
    def __init__(self, net, cut=None):
        super().__init__()
        self.net,self.cut = net,cut
    def forward(self, x):
        if self.cut is None:
            with torch.no_grad(): return self.net(x)
        for i,m in enumerate(self.net):
            with torch.set_grad_enabled(i<self.cut and torch.is_grad_enabled()): x = m(x)
        return x


def test_a_forward_without_autograd():
    "The hooks turn it on; if a later part turns it off, one line says so, while methods without gradients work"
    x,model = torch.randn(2, 3, 64, 64),vit()
    torch.testing.assert_close(model_heatmaps(NoGrad(model), x, cls=1)[0], model_heatmaps(model, x, cls=1)[0])
    chain = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), Turn(), nn.LayerNorm(8), nn.Flatten(), nn.Linear(8*64, 3)).eval()
    cut = NoGrad(chain, cut=5)
    one_line(lambda: model_heatmaps(cut, x, cls=1), 'no_grad')
    torch.testing.assert_close(model_heatmaps(cut, x, method='activations')[0], model_heatmaps(chain, x, method='activations')[0])


class Turn(nn.Module):
    def forward(self, x): return x.transpose(1,2)


def suggested(e): return re.findall(r"'([^']+)'(?: \(|,|$)", re.split('names are|such as', str(e))[-1])


@pytest.mark.parametrize('name', ['resnet', 'mobilenet', 'vit', 'swin', 'own'])
def test_suggestions_are_layers_that_work(name):
    "Those for a wrong name, and those for a layer without a map"
    set_seed(1)
    make = dict(resnet=lambda: create_vision_model(resnet18, 3, pretrained=False), mobilenet=lambda: models.mobilenet_v3_small(weights=None, num_classes=3),
                vit=lambda: timm.models.vision_transformer.VisionTransformer(64, 16, embed_dim=24, depth=3, num_heads=2, num_classes=3), own=vit,
                swin=lambda: timm.models.swin_transformer.SwinTransformer(64, 4, embed_dim=12, depths=(1,2), num_heads=(2,2), window_size=4, num_classes=3))
    model,x = ready(make[name]()),torch.randn(1, 3, 64, 64)
    names = []
    for wrong in ('layer4', 'blocks.99'):
        with pytest.raises(ValueError, match='closest names') as e: find_layers(model, wrong)
        names += suggested(e.value)
    last = list(model.named_modules())[-1][0]
    with pytest.raises(ValueError, match='choose a layer') as e: model_heatmaps(model, x, layer=last)
    names += suggested(e.value)
    assert len(names)>4
    for n in dict.fromkeys(names):
        (maps,_),said = told(lambda: model_heatmaps(model, x, cls=1, layer=n, relu=False))
        assert maps.shape[2]>1 and not said, (n, said)
    for n in suggested(e.value): assert model_heatmaps(model, x, cls=1, layer=n, relu=False)[0].any(), n


chosen = dict(convit_tiny='blocks.11.norm1', coat_lite_tiny='serial_blocks4.1.norm1', volo_d1_224='post_network.1.norm1', vit_tiny_patch16_224='blocks.11.norm1',
              swin_tiny_patch4_window7_224='norm', hiera_tiny_224='blocks.11', nest_tiny='norm', tiny_vit_5m_224='stages', resnet18='layer4')


@pytest.mark.slow
@pytest.mark.parametrize('name', chosen)
def test_families_of_timm(name):
    "The default's map follows a bright square, as in `tools/timm_layers.py`, which tries all families in minutes"
    _,layer,_,_,verdict,said = timm_layers.row(name)
    assert (layer,verdict,said)==(chosen[name], 'right', '')


@pytest.mark.slow
@pytest.mark.parametrize('name,layer', [('hiera_tiny_224', 'blocks.1'), ('hiera_tiny_224', 'blocks.5'), ('nest_tiny', 'levels.1.transformer_encoder')])
def test_named_layers_of_timm_in_another_order(name, layer):
    model,x = timm_layers.ready(name),torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    _,said = told(lambda: find_layers(model, layer, x))
    assert len(said)==1 and f"layer '{layer}'" in said[0]


def squares(n, seed, side=64):
    "Noise with a large bright square, of class 1, and a small one, of class 2"
    rng = np.random.default_rng(seed)
    x,y = rng.normal(0, .3, (n,3,side,side)).astype('float32'),np.zeros((n,side,side), dtype='int64')
    for xi,yi in zip(x, y):
        while True:
            (a,b),(c,d) = rng.integers(0, side-24, 2),rng.integers(0, side-8, 2)
            if c+8<a or c>a+24 or d+8<b or d>b+24: break
        for k,(t,l,s) in enumerate([(a,b,24), (c,d,8)], 1):
            xi[:,t:t+s,l:l+s] += 1.5
            yi[t:t+s,l:l+s] = k
    return tensor(x),tensor(y)


def conv(i, o, stride=1): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class SmallUnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.d1,self.d2,self.d3,self.d4 = conv(3, 8),conv(8, 16, 2),conv(16, 32, 2),conv(32, 48, 2)
        self.u3,self.u2,self.u1,self.out = conv(80, 32),conv(48, 16),conv(24, 16),nn.Conv2d(16, 3, 1)
    def forward(self, x):
        a = self.d1(x)
        b = self.d2(a)
        c = self.d3(b)
        z = self.d4(c)
        for up,skip in zip((self.u3, self.u2, self.u1), (c, b, a)): z = up(torch.cat([F.interpolate(z, scale_factor=2), skip], 1))
        return self.out(z)


def fastai_unet():
    body = nn.Sequential(conv(3, 16, 2), conv(16, 24, 2), conv(24, 32, 2), conv(32, 48, 2))
    return DynamicUnet(body, 3, (64,64))


def trained(make, epochs):
    set_seed(0)
    model,(x,y) = make().train(),squares(256, 1)
    opt = torch.optim.Adam(model.parameters())
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, epochs*16)
    for _ in range(epochs):
        for i in torch.randperm(256).split(16):
            opt.zero_grad()
            F.cross_entropy(model(x[i]), y[i], weight=tensor([.3,1,3])).backward()
            opt.step()
            sched.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize('make,layer,epochs', [(SmallUnet, 'u1', 4), (fastai_unet, 'layers.10', 4)])
def test_the_default_of_a_unet_shows_large_and_small(make, layer, epochs):
    "In nets trained to find squares of two sizes, the evidence lies inside both"
    model,(x,y) = trained(make, epochs),squares(16, 99)
    with torch.no_grad(): assert (model(x).argmax(1)==y).float().mean()>.98
    assert layer_names(model, [default_layer(model, x)])==[layer]
    maps = F.interpolate(model_heatmaps(model, x, cls=[1,2])[0], y.shape[1:], mode='bilinear')
    for k in (1,2):
        m,inside = maps[:,k-1],y==k
        assert (m.amax((1,2))>0).all(), 'flat'
        share = (m*inside).sum((1,2))/m.sum((1,2))
        hits = [bool(i.flatten()[o.argmax()]) for o,i in zip(m, inside)]
        assert share.mean()>.5 and sum(hits)>=14, (k, share.mean(), hits)

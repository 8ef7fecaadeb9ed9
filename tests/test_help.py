"What `help` says, and what a misspelt argument is answered"
import inspect
from shared import *
import fastai_heatmaps.all
from fastai_heatmaps.core.help import read_comments, explain_params

ours = {f'{getattr(o, "__name__", o)}.{n}': f for o in (fastai_heatmaps.all, Learner, Heatmaps, Interpretation) for n,f in vars(o).items()
        if (inspect.isfunction(f) or inspect.isclass(f) and '__init__' in vars(f)) and f.__module__.startswith('fastai_heatmaps.') and not n.startswith('_')}


def test_every_parameter_is_explained():
    "Each parameter of each public function stands in its docstring, with what it means; those of a method's options are its own"
    quiet = {}
    for name,f in ours.items():
        said = {l.split()[0] for l in f.__doc__.partition('\nParameters:\n')[2].splitlines()}
        quiet[name] = [p for p in inspect.signature(f).parameters if p not in {*said, 'self', 'cls', 'kwargs', 'i', 'j', 'c', 'nrows'}] # `nrows` is fastai's
    assert len(ours)>50 and not {n:p for n,p in quiet.items() if p}


def test_docstrings_begin_as_written():
    doc = Learner.show_gradcam.__doc__
    assert doc.startswith('Show where the evidence for `cls` lies in `img`: Grad-CAM') and doc.count('Parameters:')==1
    assert '\n  img            One image, as for `open_image`' in doc and '\n  alpha          Opacity' in doc # its own, and one that it passes on


def test_classes_say_it_of_what_makes_them():
    assert '\n  every   After how many epochs' in LogHeatmaps.__doc__ and '\n  maps    (n, k, h, w)' in Heatmaps.__doc__


def test_what_is_passed_on_is_said():
    "That of `tta` and the options of a method, in what shows them"
    for f in (Learner.show_heatmap, Learner.show_gradcam, Learner.show_occlusion, Learner.plot_heatmap_grid):
        assert '`tta=True`' in f.__doc__.split('\n  kwargs ')[1]
    assert 'tta' not in Heatmaps.replace.__doc__ and 'tta' not in Learner.show_class_image.__doc__


def test_comments_end_with_the_signature():
    def f(
        a, # First: a "#" in it
        *args, # Not told
        b:int=3, # Second
        c='#', 
        **kwargs # The rest
    ): # What comes back
        "Do it"
        d = 1 # Not a parameter
    class C:
        def __init__(self,
            d, # Fourth
            e=4, # Fifth
        ): g = 1 # Not a parameter
    assert read_comments(f)==dict(a='First: a "#" in it', args='Not told', b='Second', kwargs='The rest')
    assert read_comments(C)==dict(d='Fourth', e='Fifth') and read_comments(len)=={} and read_comments(partial(f, 1))=={}
    assert read_comments(model_heatmaps)['xb'].startswith('The images as the model takes them') and 'f' not in read_comments(model_heatmaps)


@pytest.mark.parametrize('call', [lambda o,i: o.show_gradcam(i, aplha=.3), lambda o,i: o.show_heatmap(i, aplha=.3), lambda o,i: o.plot_heatmap_grid([i], aplha=.3),
                                  lambda o,i: o.show_saliency(i, aplha=.3), lambda o,i: o.get_heatmaps(i).show(aplha=.3), lambda o,i: o.get_heatmaps(i).plot(aplha=.3)])
def test_a_typo_is_answered_with_what_was_meant(learn, pics, call):
    with pytest.raises((ValueError, TypeError), match="'aplha'; did you mean 'alpha'\\?$") as e: call(learn, get_image_files(pics)[0])
    assert '\n' not in str(e.value)


def test_a_typo_in_an_option_of_a_method(learn, pics):
    img = get_image_files(pics)[0]
    with pytest.raises(ValueError, match="'occlusion' has no option 'windo'; did you mean 'window'\\?$"): learn.show_occlusion(img, windo=3)
    with pytest.raises(ValueError, match="'rise' has no option 'xyz'; its options are n, cells"): learn.show_heatmap(img, method='rise', xyz=3)
    with pytest.raises(ValueError, match="'gradcam' has no option 'xyz'$"): learn.show_gradcam(img, xyz=3)


def test_others_errors_are_left_alone(learn, pics):
    "An error of the model's own about a name that is no argument of the call"
    def own(acts, grads): raise TypeError("forward() got an unexpected keyword argument 'alpa'")
    with pytest.raises(TypeError, match="'alpa'$"): learn.show_heatmap(get_image_files(pics)[0], method=own)


def test_asked_for_the_methods(learn, pics):
    img = get_image_files(pics)[0]
    for o in (learn.show_heatmap(img, method='?'), learn.show_saliency(img, method='?'), learn.get_heatmaps(method='?'), learn.plot_heatmap_grid(method='?'),
              model_heatmaps(learn.model, torch.zeros(1,3,64,64), method='?')): assert o is heatmap_methods


def test_a_batch_is_no_photo(learn):
    x,_ = learn.dls.one_batch()
    for o in (x[0], x): 
        with pytest.raises(ValueError, match='expected uint8.*model_heatmaps') as e: learn.show_gradcam(o)
        assert '\n' not in str(e.value)

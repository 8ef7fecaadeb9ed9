"What users call: the rest of each module is there by its own name. Importing it gives every Learner its methods."
from fastai.vision.all import *
from .core.hooks import leaf_output
from .core.layers import layer_shapes
from .core.tasks import in_mask
from .core.method import heatmap_methods, heatmap_method
from .core.passes import model_heatmaps
from .methods.pixels import relu_rule
from .data.images import ImageError, open_image
from .data.draw import show_overlay
from .data.heatmaps import Heatmaps
from .data import files as _files, boxes as _boxes, means as _means # give them `save`, `boxes` and `mean`
from .data.store import load_heatmaps
from .learner import core as _core, show as _show # give the Learner its methods
from .learner.distributed import distrib_state, join_heatmaps
from .views import interpret as _interpret, features as _features, class_image as _class_image # and so on
from .views import architecture as _architecture, explore as _explore, report as _report, app as _app, answer as _answer
from .views.compare import heatmap_difference, compare_learners
from .views.log import LogHeatmaps
from .trust import sanity as _sanity, focus as _focus, faithfulness as _faithfulness, inside as _inside # and their checks
from .trust import stability as _stability, check as _check
from .samples import demo_labels, demo_image, demo_learner

# What their parameters mean is in comments; `help` and `?` show docstrings
import inspect as _inspect, sys as _sys
from .core.help import explain_params as _explain_params
from .data.draw import lay_map as _lay_map
_ours = [f for o in (_sys.modules[__name__], Learner, Heatmaps, Interpretation) for f in vars(o).values()
         if (_inspect.isfunction(f) or _inspect.isclass(f) and '__init__' in vars(f))
         and f.__module__.startswith('fastai_heatmaps.')]
_explain_params(Learner.show_class_image, shared=[Learner.get_class_image]) # whose `seed` is another one than the report's
_explain_params(*_ours, shared=[_lay_map, Heatmaps.show, Heatmaps.plot, Learner.get_heatmaps, Learner.show_heatmap,
                              Learner.heatmap_report])

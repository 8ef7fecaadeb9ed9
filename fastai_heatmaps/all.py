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
from .data import files as _files # gives them `save`
from .data.store import load_heatmaps
from .learner import core as _core, show as _show # give the Learner its methods
from .learner.distributed import distrib_state, join_heatmaps
from .views import interpret as _interpret, features as _features, class_image as _class_image # and so on
from .views import architecture as _architecture, explore as _explore, report as _report, app as _app
from .views.compare import heatmap_difference, compare_learners
from .trust import sanity as _sanity, focus as _focus, faithfulness as _faithfulness, inside as _inside # and their checks
from .trust import stability as _stability, check as _check
from .samples import demo_labels, demo_image, demo_learner

"What users call: the rest of each module is there by its own name. Importing it gives every Learner its methods."
from fastai.vision.all import *
from .layers import layer_shapes
from .targets import in_mask
from .cam import heatmap_methods, heatmap_method, model_heatmaps
from .pixels import relu_rule
from .heatmaps import Heatmaps, show_overlay
from .store import load_heatmaps
from .learner import ImageError, open_image
from .distributed import distrib_state, join_heatmaps
from .interpret import heatmap_difference, compare_learners
from . import features as _features, explore as _explore # which give the Learner their methods
from .samples import demo_labels, demo_image, demo_learner

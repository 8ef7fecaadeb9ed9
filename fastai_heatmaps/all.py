from fastai.vision.all import *
from .hooks import *
from .layers import *
from .targets import *
from .cam import *
from .heatmaps import *
from .learner import *
from .samples import *

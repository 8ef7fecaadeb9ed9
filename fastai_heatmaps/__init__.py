"Heatmaps that show why a fastai image model answers as it does."
from importlib.metadata import PackageNotFoundError, version

try: __version__ = version('fastai_heatmaps')
except PackageNotFoundError: __version__ = '0+unknown'  # a source tree that was never installed

"`python -m fastai_heatmaps` is the command `fastai-heatmaps`."
import sys
from fastai_heatmaps.cli.main import main

if __name__=='__main__': sys.exit(main())

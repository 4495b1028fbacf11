"""The field's PyTorch tools, driven side by side with this package on the same models, data and machine."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read once, when tqdm is imported, which torch does

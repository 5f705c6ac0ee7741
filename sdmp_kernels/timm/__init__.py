"""Drop-ins with timm's names, arguments and results; timm itself is needed by `create_loader` alone.

`python -m sdmp_kernels.timm SCRIPT ARGS...` runs an unchanged training script with them in timm's place.
"""

from sdmp_kernels.timm.erasing import RandomErasing
from sdmp_kernels.timm.loader import Collated, FastCollateMixup, PrefetchLoader, create_loader
from sdmp_kernels.timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from sdmp_kernels.timm.mixup import Mixup

__all__ = [
    "BinaryCrossEntropy",
    "Collated",
    "FastCollateMixup",
    "Mixup",
    "PrefetchLoader",
    "RandomErasing",
    "SoftTargetCrossEntropy",
    "create_loader",
]

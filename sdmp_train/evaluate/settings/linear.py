"""The settings of `eval linear`, and what its recipes prescribe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from ...flags import arg
from ...settings import between, require
from .fit import FitConfig

if TYPE_CHECKING:
    from sdmp_kernels.views import Interpolation

FeatureName = Literal["output", "last4", "mean", "output+mean"]
"""What the classifier reads; `..features` says what each is."""


class Recipe(NamedTuple):
    """What a protocol prescribes; every field is a flag of its own."""

    features: FeatureName
    lr: tuple[float, ...]
    epochs: int
    interpolation: Interpolation
    batch_size: int = 1024


RECIPES: dict[str, Recipe] = {
    # Readmes: lr 3 for a ViT, 0.1 for a ResNet-50; a sweep around both.
    "mocov3": Recipe("output", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), 90, "bilinear"),
    # eval_linear.py: lr 0.001, "tweak per checkpoint".
    "dino": Recipe("last4", (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), 100, "bicubic"),
}


@dataclass(frozen=True)
class LinearConfig(FitConfig):
    """A linear classifier on frozen features, for several learning rates at once; trained on --data."""

    recipe: Literal["mocov3", "dino"] = "mocov3"
    """Whose protocol; it sets features, lr, epochs, batch size and the interpolation of test images."""
    features: FeatureName | None = None
    """What the classifier reads; default: the recipe's, with DINO's for wide ViTs (768 and more) output+mean."""
    lr: tuple[float, ...] | None = None
    """Base learning rates at batch 256, each for a classifier of its own; the effective ones are lr * batch / 256."""
    epochs: int | None = None
    """Passes over the data; default: the recipe's (90 or 100)."""
    batch_size: Annotated[int | None, arg(aliases=("-b",))] = None
    """GLOBAL batch; default 1024, or all images where there are fewer."""
    crop_min: float = 0.08
    """Smallest area of a random crop, as a fraction of the image."""
    batch_norm: bool = False
    """Normalise the features by a batch norm without parameters first, which makes the learning rate matter less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is not None:
            require(len(self.lr) > 0 and len(set(self.lr)) == len(self.lr), "lr", self.lr, "some rates, each once")
            for rate in self.lr:
                between("lr", rate, 0, 1e6, above=True)
        require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "at least 1")
        require(self.batch_size is None or self.batch_size >= 2, "batch_size", self.batch_size, "at least 2")
        between("crop_min", self.crop_min, 0, 1, above=True)

    @property
    def rates(self) -> tuple[float, ...]:
        """Base learning rates."""
        return self.lr or RECIPES[self.recipe].lr

    @staticmethod
    def function() -> Callable[[LinearConfig], Any]:
        """What measures by them; imported here, since it needs torch."""
        from ..linear import evaluate_linear

        return evaluate_linear

"""The settings of `eval finetune`, and what its recipes prescribe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from ...flags import arg
from ...settings import between, require
from .fit import FitConfig

RANDAUGMENT = "rand-m9-mstd0.5-inc1"


class Recipe(NamedTuple):
    """What a row of the paper's tables prescribes beside DeiT's recipe."""

    epochs: int
    fraction: float
    paper: str
    """Its top-1 accuracies, to print beside the result."""


RECIPES: dict[str, Recipe] = {
    "table2": Recipe(100, 1.0, "Table 2, ImageNet, ViT-S: MoCo v3 78.7 %, + SDMP 79.1 %; DINO 79.7 %, + SDMP 80.0 %"),
    # The paper names the protocol of SimCLR v2 and no settings for a ViT; the epochs are SimCLR's.
    "table3-10": Recipe(
        30, 0.1, "Table 3, 10 % of ImageNet, ViT-S: MoCo v3 66.7 %, + SDMP 67.4 %; DINO 67.2 %, + SDMP 68.0 %"
    ),
    "table3-1": Recipe(
        60, 0.01, "Table 3, 1 % of ImageNet, ViT-S: MoCo v3 54.4 %, + SDMP 55.5 %; DINO 55.6 %, + SDMP 56.3 %"
    ),
}


@dataclass(frozen=True)
class FinetuneConfig(FitConfig):
    """Train the whole network on labels by DeiT's recipe, and measure it."""

    recipe: Literal["table2", "table3-10", "table3-1"] = "table2"
    """Row of the paper; it sets epochs and fraction (the paper gives no ViT settings for Table 3)."""
    epochs: int | None = None
    """Passes over the data; default: the recipe's (100, 30, 60)."""
    fraction: float | None = None
    """Share of the images of every class to train on; default: the recipe's (1, 0.1, 0.01)."""
    train_list: str | None = None
    """File that names the images to train on, a line each, such as SimCLR's 1percent.txt; in place of --fraction."""
    batch_size: Annotated[int | None, arg(aliases=("-b",))] = None
    """GLOBAL batch; default 1024, or all images where there are fewer."""
    lr: float = 2.5e-4
    """Base learning rate at batch 256 (DeiT's 5e-4 at 512); the effective one is lr * batch / 256."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises from 0; default: 5, or a fifth of --epochs where that is less."""
    weight_decay: Annotated[float, arg(aliases=("--wd",))] = 0.05
    """Of matrices; norms, biases, positions and class token do not decay."""
    drop_path: float = 0.1
    """Chance that the last residual branch is left out for a sample, falling to 0 towards the first."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    mixup_alpha: float = 0.8
    """Mixup's lam is drawn from Beta(alpha, alpha); 0 leaves Mixup out."""
    cutmix_alpha: float = 1.0
    """CutMix's likewise. With both, every batch is mixed by one or the other, evenly."""
    mix_per: Literal["batch", "sample"] = "batch"
    """One rule and lam for a batch, as DeiT, or one for every sample."""
    randaugment: str | None = RANDAUGMENT
    """timm's spelling of its RandAugment; None leaves it out."""
    erase_prob: float = 0.25
    """Chance that a rectangle of a view is erased by noise."""
    repeats: int = 3
    """How often an image comes in a row, in views of its own (repeated augmentation)."""
    crop_min: float = 0.08
    """Smallest area of a random crop, as a fraction of the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "at least 1")
        if self.fraction is not None:
            between("fraction", self.fraction, 0, 1, above=True)
            require(self.train_list is None, "train_list", self.train_list, "either this or --fraction")
        require(self.batch_size is None or self.batch_size >= 2, "batch_size", self.batch_size, "at least 2")
        between("lr", self.lr, 0, 1e6, above=True)
        if self.warmup_epochs is not None:
            between("warmup_epochs", self.warmup_epochs, 0, 1e9)
        between("weight_decay", self.weight_decay, 0, 1e6)
        for name in ("drop_path", "label_smoothing"):
            between(name, getattr(self, name), 0, 1 - 1e-9)
        for name in ("mixup_alpha", "cutmix_alpha"):
            between(name, getattr(self, name), 0, 1e6)
        augment = self.randaugment
        require(augment is None or augment.startswith("rand"), "randaugment", augment, f"timm's, such as {RANDAUGMENT}")
        between("erase_prob", self.erase_prob, 0, 1)
        require(self.repeats >= 1, "repeats", self.repeats, "at least 1")
        between("crop_min", self.crop_min, 0, 1, above=True)

    @property
    def rules(self) -> dict[str, float]:
        """Mixing rules with the alphas of their lam."""
        alphas = {"mixup": self.mixup_alpha, "cutmix": self.cutmix_alpha}
        return {rule: alpha for rule, alpha in alphas.items() if alpha}

    @staticmethod
    def function() -> Callable[[FinetuneConfig], Any]:
        """What measures by them; imported here, since it needs torch."""
        from ..finetune import evaluate_finetune

        return evaluate_finetune

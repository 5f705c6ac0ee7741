"""The settings of DINO, plain and with SDMP, and which of its crops are mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from ...flags import arg
from ...settings import DataConfig, between, require
from .method import Pass
from .mixing import RULES, Flip, check_rules

if TYPE_CHECKING:
    from ..method import Method


@dataclass(frozen=True)
class DINOConfig:
    """DINO's settings, under the names of its own code, and what is mixed with what (Tables 6 to 10 of the paper)."""

    out_dim: int = 65536
    """Prototypes: columns of the head. Less serves small data."""
    head_dim: int = 2048
    """Hidden width of the head."""
    bottleneck_dim: int = 256
    """Width of the unit vectors that the prototypes are compared with."""
    norm_last_layer: bool = True
    """Prototypes of length 1; without, their lengths are trained (better for ViT-S and long runs)."""
    use_bn_in_head: bool = False
    """Batch norm between the layers of the head."""
    student_temp: float = 0.1
    """The student's softmax temperature."""
    warmup_teacher_temp: float = 0.04
    """The teacher's at the start."""
    teacher_temp: float = 0.04
    """The teacher's after its warm-up (0.07 for ViT-S and long runs)."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs of that warm-up, linear and set per epoch (30 with 0.07)."""
    momentum_teacher: float = 0.996
    """Momentum of the teacher at the start; it rises to 1 along half a cosine."""
    center_momentum: float = 0.9
    """Momentum of the centre that is subtracted from the teacher's logits."""
    freeze_last_layer: float = 1
    """Epochs in which the prototypes are not trained."""
    drop_path_rate: Annotated[float, arg(name="drop-path-rate")] = 0.1
    """ViT: chance that the student's last residual branch is left out for a sample, falling to 0 towards the first."""
    vit_start: Annotated[Literal["timm", "mocov3"], arg(name="vit-start")] = "timm"
    """How a ViT starts: as timm's does (DINO's own), or with MoCo v3's Xavier weights, fixed sin-cos positions and
    frozen patch projection, which suits narrow nets and short runs."""
    local_crops_number: int = 8
    """Local crops of an image; 0 leaves the two global ones."""
    local_px: int = 96
    """Side of the local crops in pixels, at most that of the views (96 beside 224)."""
    global_crops_scale: tuple[float, float] | None = None
    """Areas of the global crops, as shares of the image; None is 0.4 to 1, and 0.14 to 1 without local crops."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Areas of the local crops, as shares of the image."""
    mixing: Literal["none", "sdmp"] = "sdmp"
    """`none` is the plain method; with `sdmp` the second half of the local crops is mixed (without any, one global)."""
    rules: tuple[str, ...] = RULES
    """Mixing rules drawn from, uniformly: mixup, cutmix, resizemix (Table 8)."""
    per: Annotated[Literal["batch", "sample"], arg(name="mix-per")] = "batch"
    """One rule per batch (the paper) or per sample."""
    alpha: Annotated[float, arg(name="mix-alpha")] = 1.0
    """lam is drawn from Beta(alpha, alpha)."""
    shared_lam: bool = False
    """One lam for the whole batch (Table 7)."""
    flip: Flip = "local"
    """Partners within a GPU, or over all of them: images and the teacher's logits are then exchanged."""
    source_weight: Annotated[Literal["random", "static"], arg(name="source-weight")] = "random"
    """`static` puts 1/2 in place of lam in the source loss (Table 6)."""
    pair_weight: Annotated[Literal["random", "static"], arg(name="pair-weight")] = "random"
    """`static` puts 1 in place of the overlap c in the mixed loss (Table 6)."""
    mix_weight: float = 1.0
    """Weight of the source and of the mixed loss beside DINO's own (Eq. 9: 1)."""

    def __post_init__(self) -> None:
        for name in ("out_dim", "head_dim", "bottleneck_dim", "local_px"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive whole number")
        for name in ("student_temp", "warmup_teacher_temp", "teacher_temp"):
            between(name, getattr(self, name), 0, 100, above=True)
        for name in ("momentum_teacher", "center_momentum"):
            between(name, getattr(self, name), 0, 1)
        require(
            self.warmup_teacher_temp_epochs >= 0,
            "warmup_teacher_temp_epochs",
            self.warmup_teacher_temp_epochs,
            "0 or more",
        )
        between("freeze_last_layer", self.freeze_last_layer, 0, 1e9)
        between("drop_path_rate", self.drop_path_rate, 0, 1 - 1e-9)
        require(self.local_crops_number >= 0, "local_crops_number", self.local_crops_number, "0 or more")
        for name, scale in (
            ("global_crops_scale", self.global_crops_scale),
            ("local_crops_scale", self.local_crops_scale),
        ):
            low, high = scale or (1.0, 1.0)
            require(0 < low <= high <= 1, name, scale, "the smallest and the largest share, within 0 to 1")
        check_rules(self.rules, self.alpha)
        between("mix_weight", self.mix_weight, 0, 1e6)
        require(
            self.mixing == "none" or self.local_crops_number != 1,
            "local_crops_number",
            self.local_crops_number,
            "0, or 2 and more, of which half are mixed (--mixing none takes 1)",
        )

    def passes(self, data: DataConfig) -> list[Pass]:
        """The student sees every crop, the teacher the global views, clean and where something is mixed also mixed."""
        crops = crops_of(self)
        student = [Pass(data.image_px if crop < 2 else self.local_px, trained=True) for crop in range(crops.total)]
        return student + [Pass(data.image_px, trained=False)] * (4 if crops.mixed else 2)

    @staticmethod
    def method_class() -> type[Method]:
        """DINO."""
        from ..dino import DINO

        return DINO


class Crops(NamedTuple):
    """Which student crops are mixed, and which teacher view is compared with which: what the loss is made of."""

    total: int
    """V: two global views, then the local crops."""
    mixed: tuple[int, ...]
    """The student crops that are mixed."""
    clean_pairs: tuple[tuple[int, int], ...]
    """(crop, teacher view): DINO's own loss, never a view with itself."""
    mixed_pairs: tuple[tuple[int, int], ...]
    """The same for the mixed crops, once with the clean and once with the mixed teacher views."""


def crops_of(config: DINOConfig) -> Crops:
    """The table of crops. Half of the local crops are mixed; without local crops, the second global view is."""
    local = config.local_crops_number
    total = 2 + local
    halved = tuple(range(total - local // 2, total)) if local else (1,)
    mixed = halved if config.mixing == "sdmp" else ()
    pairs = [(crop, view) for crop in range(total) for view in range(2) if crop != view]
    return Crops(
        total,
        mixed,
        tuple(pair for pair in pairs if pair[0] not in mixed),
        tuple(pair for pair in pairs if pair[0] in mixed),
    )

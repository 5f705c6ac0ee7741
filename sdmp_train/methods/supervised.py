"""Training on labels, with mixed images and mixed labels: cross-entropy with Mixup, CutMix and ResizeMix.

Zhang et al., mixup (2018); Yun et al., CutMix (2019); Qin et al., ResizeMix (2020): the target of a mixed image is its
two labels, weighted by their shares of the pixels.

Letters: N rows per rank, K classes, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sdmp_kernels import MixPlan, mix, soft_cross_entropy

from ..data import Batch, ViewRecipe, crop_flip_view
from ..distributed import distribute
from ..models import feature_width
from ..settings import ConfigError
from .health import collapse_of, spread_of
from .method import At, Group, Loss, Setup
from .mixing import draw_batch_plan, examples_of_rules, keep_lost, valid_of, with_colours
from .settings.supervised import SupervisedConfig

HEAD_STD = 0.01


class Classifier(nn.Module):
    """Backbone and one linear layer: (N, 3, H, W) -> (N, K)."""

    def __init__(self, backbone: nn.Module, classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.head = nn.Linear(feature_width(backbone), classes)
            nn.init.normal_(self.head.weight, std=HEAD_STD)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Supervised:
    """A classifier, and the four stages of its step."""

    Config: ClassVar[type] = SupervisedConfig

    def __init__(self, config: SupervisedConfig, build_backbone: Callable[..., nn.Module], setup: Setup) -> None:
        if setup.classes < 2:
            raise ConfigError(
                f"training on labels takes at least two class folders, and there are {setup.classes}; "
                "give --data a folder with one folder per class"
            )
        self.config = config
        self.setup = setup
        backbone = build_backbone(**self.backbone_options(config), drop_path=config.drop_path)
        self.classifier = Classifier(backbone, setup.classes, setup.seed).to(setup.world.device)
        self.logits = distribute(self.classifier, setup.world)
        self.state = nn.ModuleDict({"classifier": self.classifier})

    @staticmethod
    def backbone_options(config: Any) -> dict[str, Any]:
        """ViT-S has six heads, as in DeiT and timm."""
        return {"heads": None}

    @property
    def trained(self) -> nn.Module:
        """The classifier."""
        return self.classifier

    @property
    def backbone(self) -> nn.Module:
        """Without the last layer."""
        return self.classifier.backbone

    @property
    def backbones(self) -> list[nn.Module]:
        """The classifier's."""
        return [self.classifier.backbone]

    @property
    def partners_follow_ranks(self) -> bool:
        """Where images are mixed at all."""
        return self.config.prob > 0

    def views(self, at: At) -> list[ViewRecipe]:
        """One random crop, flipped or not; grey as often as the data settings say."""
        data = self.setup.data
        return [with_colours(crop_flip_view(data.image_px, data.crop_min_frac), data)]

    def plan(self, at: At) -> MixPlan:
        """What is mixed with what."""
        config = self.config
        return draw_batch_plan(
            self.setup, at, 0, rules=config.rules, alpha=config.alpha, per=config.per, prob=config.prob
        )

    def without_lost(self, plan: MixPlan, batch: Batch) -> MixPlan:
        """The same without them."""
        return keep_lost(plan, batch, self.setup.world)

    def mix(self, batch: Batch, plan: MixPlan) -> Tensor:
        """(N, 3, H, W) uint8 view -> the mixed, normalised images."""
        data = self.setup.data
        return cast(Tensor, mix(batch.views[0], plan, mean=data.mean, std=data.std, dtype=self.setup.dtype))

    def encode(self, images: Tensor) -> Tensor:
        """(N, K) logits."""
        bf16 = self.setup.dtype == torch.bfloat16
        with torch.autocast(self.setup.world.device.type, torch.bfloat16, enabled=bf16):
            return self.logits(images)

    def loss(self, features: Tensor, plan: MixPlan, batch: Batch, at: At) -> Loss:
        """Soft cross-entropy on the labels mixed as the pixels were; `top1`: the weight of the label guessed."""
        target = plan.label_target(batch.labels.to(features.device, non_blocking=True))
        smoothing, valid = self.config.label_smoothing, valid_of(batch, self.setup.world)
        guess = features.detach().argmax(dim=1)
        right = target.weight * (guess == target.first) + (1 - target.weight) * (guess == target.second)
        if valid is None:
            loss = soft_cross_entropy(features.float(), target, label_smoothing=smoothing)
            return Loss(loss, {}, {"top1": right.mean()})
        losses = soft_cross_entropy(features.float(), target, label_smoothing=smoothing, reduction="none")
        return Loss(valid.mean(losses), {}, {"top1": valid.mean(right)})

    def groups(self) -> list[Group]:
        """Norms and biases do not decay (DeiT)."""
        matrices = [p for p in self.classifier.parameters() if p.ndim > 1]
        return [Group(matrices), Group([p for p in self.classifier.parameters() if p.ndim <= 1], decays=False)]

    def after_update(self, at: At, good: Tensor) -> None:
        """Nothing follows the optimiser."""

    def facts(self, plan: MixPlan) -> dict[str, Tensor]:
        """The mean of lam."""
        return {"lam_mean": plan.lam.mean()}

    def health(self, features: Tensor) -> dict[str, Tensor]:
        """The spread of this rank's logits."""
        return spread_of(features.float())

    def collapse(self, numbers: Mapping[str, float]) -> str | None:
        """Where that spread is nearly gone."""
        return collapse_of(numbers)

    def describe(self) -> str:
        """The loss, what is mixed, and the chance level."""
        classes, rules = self.setup.classes, " ".join(self.config.rules)
        mixed = f"{self.config.prob:.0%} mixed by {rules}" if self.config.prob else "clean"
        return f"cross-entropy on {classes} classes, {mixed}; chance level {math.log(classes):.3f}"

    def example(self, batch: Batch) -> list[tuple[str, Tensor, MixPlan]]:
        """The view, mixed by each rule in turn."""
        if not self.config.prob:
            return []
        config = self.config
        return examples_of_rules(batch.views[0], rules=config.rules, alpha=config.alpha, seed=self.setup.seed)

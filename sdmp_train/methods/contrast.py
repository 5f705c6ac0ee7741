"""What contrastive methods with a momentum encoder share: heads, encoders, keys of all ranks, and the sum of terms.

Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers (2021): heads, symmetric terms,
the factor 2T. A method on top says which views meet which keys, how they are mixed, and with which targets.

Letters: N rows per rank, M keys (N * ranks), D features, H W pixels. Views are named a, b, c, d; a~ is a mixed.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sdmp_kernels import MixPlan, TwoHot, draw_plan, info_nce, mix

from ..data import Batch, ViewRecipe, byol_views
from ..distributed import World, distribute, gather_rows, mirror_images
from ..models import feature_width
from ..optim import key_momentum
from .health import collapse_of, spread_of
from .method import At, Group, Loss, Setup
from .mixing import Valid, keep_lost, valid_of, with_colours
from .momentum import Lowered, follow
from .settings.contrast import ContrastConfig, Term, views_of
from .start import start_vit

VIT_TEMPERATURE, RESNET_TEMPERATURE = 0.2, 1.0


@dataclass(frozen=True)
class Plan:
    """What one step mixes: whether views a and b swap, and a `MixPlan` for each view that is mixed."""

    swap: bool
    mixes: dict[str, MixPlan]


class Features(NamedTuple):
    """Unit vectors by the name of the view: queries (N, D) with gradient, keys (M, D) of all ranks without."""

    queries: dict[str, Tensor]
    keys: dict[str, Tensor]


def mlp_head(sizes: list[int], last_norm: bool) -> nn.Sequential:
    """Linear layers without bias, BN and ReLU between them; with `last_norm` a last BN without weights."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=False))
    if last_norm:
        layers.append(nn.BatchNorm1d(sizes[-1], affine=False))
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Backbone and projector: what the momentum encoder is a copy of."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.seen: Tensor | None = None
        """(N, D) without gradient: what the backbone made of the images that came last."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        self.seen = features.detach()
        return self.projector(features)


class Student(nn.Module):
    """Encoder and predictor. Each view goes through by itself, with its own batch statistics."""

    def __init__(self, encoder: Encoder, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.predictor(self.encoder(view)) for view in views]


def has_patches(backbone: nn.Module) -> bool:
    """Whether MoCo v3's heads and temperature for a ViT are meant, or those for a ResNet."""
    return hasattr(backbone, "patch_embed")


def build_student(backbone: nn.Module, config: ContrastConfig, seed: int) -> Student:
    """MoCo v3's heads on a backbone: three layers for a ViT, two for a ResNet."""
    is_vit = has_patches(backbone)
    width = feature_width(backbone)
    hidden = [config.mlp_dim] * (2 if is_vit else 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        projector = mlp_head([width, *hidden, config.dim], last_norm=True)
        predictor = mlp_head([config.dim, config.mlp_dim, config.dim], last_norm=is_vit)
    return Student(Encoder(backbone, projector), predictor)


class Contrast(ABC):
    """The student, its momentum encoder and the stages of a step. A method adds its terms, plan and targets."""

    form: Literal["ce", "log_mixture"] = "ce"
    """How two shares become one loss, see `info_nce`; a method with soft targets makes it a setting."""

    def __init__(
        self,
        config: ContrastConfig,
        build_backbone: Callable[..., nn.Module],
        setup: Setup,
        *,
        global_flip: bool = False,
    ) -> None:
        """`global_flip`: partners are those of the rank that mirrors this one (`flip="global"` of `draw_plan`)."""
        self.global_flip = global_flip
        self.heads = config
        self.setup = setup
        self.world: World = setup.world
        self.terms = config.terms()
        self.query_views, self.key_views = views_of(self.terms)
        self.view_names = tuple(sorted({name[0] for name in self.query_views + self.key_views}))
        self.mixed_views = tuple(sorted({name[0] for name in self.query_views + self.key_views if name[-1] == "~"}))
        backbone = build_backbone(
            **self.backbone_options(config), start=lambda vit: start_vit(vit, config.stop_grad_conv1)
        )
        by_rule = VIT_TEMPERATURE if has_patches(backbone) else RESNET_TEMPERATURE
        self.temperature = by_rule if config.temperature is None else config.temperature
        self.student = build_student(backbone, config, setup.seed).to(self.world.device)
        self.momentum_encoder = copy.deepcopy(self.student.encoder).requires_grad_(False)
        self.queries = distribute(self.student, self.world)
        distribute(self.momentum_encoder, self.world, trained=False)
        self.keys = Lowered(self.momentum_encoder, setup.dtype)
        self.state = nn.ModuleDict({"student": self.student, "momentum_encoder": self.momentum_encoder})
        self.keep = draw_plan(setup.rows, setup.data.size_px, prob=0.0, step=0, device=self.world.device)

    @staticmethod
    def backbone_options(config: Any) -> dict[str, Any]:
        """MoCo v3's ViT-S and ViT-B have twelve heads both (timm's ViT-S has six)."""
        return {"heads": 12}

    @property
    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    @property
    def backbone(self) -> nn.Module:
        """The student's."""
        return self.student.encoder.backbone

    @property
    def backbones(self) -> list[nn.Module]:
        """The student's and the one that makes the keys."""
        return [self.student.encoder.backbone, cast(Encoder, self.keys.twin).backbone]

    @property
    def partners_follow_ranks(self) -> bool:
        """Not where nothing is mixed, nor where partners are over all ranks."""
        return bool(self.mixed_views) and not self.global_flip

    @abstractmethod
    def plan(self, at: At) -> Plan:
        """What is mixed with what, from the seed and `at` alone."""

    @abstractmethod
    def target(self, term: Term, plan: Plan) -> TwoHot:
        """Where the query's probability should lie, from the plan that mixed the pixels."""

    @property
    def offset(self) -> int:
        """The column of this rank's first row among the keys of all ranks."""
        return self.world.rank * self.setup.rows

    def views(self, at: At) -> list[ViewRecipe]:
        """BYOL's two recipes, again for a further pair of views."""
        data = self.setup.data
        pair = [with_colours(recipe, data) for recipe in byol_views(data.image_px, data.crop_min_frac, data.blur)]
        return pair * (len(self.view_names) // 2)

    def chance(self) -> dict[str, float]:
        """What every term, and the whole loss, is worth while the softmax is uniform: 2 T ln M per unit of weight."""
        uniform = 2 * self.temperature * math.log(self.setup.rows * self.world.size)
        return {term.name: uniform for term in self.terms} | {"loss": uniform * sum(term.weight for term in self.terms)}

    def describe(self) -> str:
        """The terms with their weights, query and key views, and the chance level of the whole loss."""
        terms = " + ".join(f"{term.weight:g} {term.name}({term.query} -> {term.key})" for term in self.terms)
        return f"{terms}; chance level {self.chance()['loss']:.3f}"

    def without_lost(self, plan: Plan, batch: Batch) -> Plan:
        """Every mix without them."""
        kept = {
            view: keep_lost(mixed, batch, self.world, global_flip=self.global_flip)
            for view, mixed in plan.mixes.items()
        }
        return replace(plan, mixes=kept)

    def mix(self, batch: Batch, plan: Plan) -> dict[str, Tensor]:
        """(N, 3, H, W) uint8 views -> the normalised images that an encoder sees, by name; a~ and a from one read."""
        views = batch.views
        ordered = (views[1], views[0], *views[2:]) if plan.swap else views
        data = self.setup.data
        pixels: dict[str, Any] = {"mean": data.mean, "std": data.std, "dtype": self.setup.dtype}
        needed = {*self.query_views, *self.key_views}
        images: dict[str, Tensor] = {}
        for view, raw in zip(self.view_names, ordered, strict=True):
            if view not in plan.mixes:
                images[view] = cast(Tensor, mix(raw, self.keep, **pixels))
                continue
            partners = mirror_images(raw, self.world) if self.global_flip else None
            if view in needed:
                images[view], images[view + "~"] = mix(raw, plan.mixes[view], partners=partners, clean=True, **pixels)
            else:
                images[view + "~"] = cast(Tensor, mix(raw, plan.mixes[view], partners=partners, **pixels))
        return images

    def encode(self, images: dict[str, Tensor]) -> Features:
        """Queries by the student with gradient, keys of all ranks by the momentum encoder without.

        Unit vectors are made in float32. Under bf16 precision they are compared in bf16, products added up in float32,
        as autocast has it in MoCo v3's own code; and so gathered. Each logit <q, k> / T is then off by 2^-8 / T at most
        and a term 2 T CE, whose gradient to the logits adds up to 2 in size, by 2^-6.
        """
        bf16 = self.setup.dtype == torch.bfloat16
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            # Keys first: what they needed is free again when the queries keep their activations for the gradient.
            with torch.no_grad():
                momentum_encoder = self.keys.refresh()
                keys = [momentum_encoder(images[name]) for name in self.key_views]
            queries = self.queries(*(images[name] for name in self.query_views))
        unit_queries = [normalize(query.float(), dim=1).to(self.setup.dtype) for query in queries]
        unit_keys = [gather_rows(normalize(key.float(), dim=1).to(self.setup.dtype), self.world) for key in keys]
        return Features(
            dict(zip(self.query_views, unit_queries, strict=True)),
            dict(zip(self.key_views, unit_keys, strict=True)),
        )

    def loss(self, features: Features, plan: Plan, batch: Batch, at: At) -> Loss:
        """The weighted sum of the terms, each with MoCo v3's factor 2T; and the mean of each kind of term."""
        temperature = self.temperature
        total = torch.zeros((), device=self.world.device)
        kinds: dict[str, list[Tensor]] = {}
        valid = valid_of(batch, self.world)
        for name, query in features.queries.items():
            terms = [term for term in self.terms if term.query == name]
            keys, targets = [features.keys[term.key] for term in terms], [self.target(term, plan) for term in terms]
            weights = [2 * temperature * term.weight for term in terms]
            loss, values = self.compare(query, keys, targets, weights, at, valid)
            total = total + loss
            for term, value in zip(terms, values, strict=True):
                kinds.setdefault(term.name, []).append(2 * temperature * value)
        return Loss(total, {name: torch.stack(values).mean() for name, values in kinds.items()})

    def compare(
        self,
        query: Tensor,
        keys: list[Tensor],
        targets: list[TwoHot],
        weights: list[float],
        at: At,
        valid: Valid | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Queries (N, D) against sets of keys (M, D): the weighted sum of their mean cross-entropies, and each of them.

        The sum carries the gradient; the others are detached. 0-dim tensors all. With `valid`, keys that are no images
        are nobody's, and means are over the valid rows of all ranks.
        """
        # The weights are in the gradient by then: the upstream factor is 1.
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "form": self.form,
            "term_weight": weights,
            "with_terms": True,
        }
        if valid is None:
            loss, values = info_nce(query, keys, targets, **options)
            return loss, list(values)
        options |= {"exclude": [~valid.all_rows] * len(keys), "reduction": "none"}
        loss, values = info_nce(query, keys, targets, **options)
        return valid.mean(loss), list(valid.mean(values))

    def groups(self) -> list[Group]:
        """All of the student alike: MoCo v3 decays norms and biases too."""
        return [Group(list(self.student.parameters()))]

    def after_update(self, at: At, good: Tensor) -> None:
        """The momentum encoder follows.

        MoCo v3 averages just before it makes a step's keys, with that step's momentum: the same as doing it here with
        the next step's.
        """
        momentum = key_momentum(
            at.step + 1, start=self.heads.momentum, steps=at.steps, cosine=self.heads.momentum_cosine
        )
        self.follow_student((1 - momentum) * good)

    def follow_student(self, share: Tensor) -> None:
        """Move the momentum encoder's parameters (not its batch statistics) by `share` of the way to the student's."""
        follow(self.student.encoder.parameters(), self.momentum_encoder.parameters(), share)

    def facts(self, plan: Plan) -> dict[str, Tensor]:
        """The mean of lam."""
        if not plan.mixes:
            return {}
        return {"lam_mean": torch.stack([mixed.lam.mean() for mixed in plan.mixes.values()]).mean()}

    def health(self, features: Features) -> dict[str, Tensor]:
        """The spread of what the momentum encoder's backbone made of this rank's last keys.

        Not that of the keys: the batch norm at the end of a projector spreads what has collapsed before it.
        """
        seen = cast(Encoder, self.keys.twin).seen
        return {} if seen is None else spread_of(seen)

    def collapse(self, numbers: Mapping[str, float]) -> str | None:
        """Where that spread is nearly gone."""
        return collapse_of(numbers)

"""MoCo v3 with SDMP: which views meet which keys, with which targets and weights.

Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers (2021), for MoCo v3; Ren et al.,
A Simple Data Mixing Prior for Improving Self-Supervised Learning (2022), sections 3.2 and 4.1.1, for SDMP.

Letters: N rows per rank, M keys (N * ranks), D features, H W pixels. Views are named a, b, c, d; a~ is a mixed.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sdmp_kernels import MixPlan, TwoHot, draw_plan, info_nce, mix

from ..config import Config, MixingConfig
from ..data import ViewRecipe, byol_views
from ..distributed import World, distribute, gather_rows
from ..models import build_student

# The stream of Philox(seed, step) that decides the swap; draw_plan uses the first counter words.
SWAP_STREAM = 2**62


@dataclass(frozen=True)
class Term:
    """One summand of the loss: `weight` times the cross-entropy of a query view against the keys of a key view."""

    name: Literal["clean", "source", "pair"]
    query: str
    key: str
    weight: float


def terms_of(config: MixingConfig) -> tuple[Term, ...]:
    """The loss as a table. In `replace` and `algorithm1`, a and b swap roles at random from step to step."""
    extra = config.extra_weight
    if config.mixing == "none":
        return Term("clean", "a", "b", 1.0), Term("clean", "b", "a", 1.0)
    return {
        "replace": (Term("clean", "a", "b", 1.0), Term("source", "b~", "a", 0.5), Term("pair", "b~", "a~", 0.5)),
        "algorithm1": (Term("source", "b~", "a", 1.0), Term("pair", "b~", "a~", 1.0)),
        "extra": (
            Term("clean", "a", "b", 1.0),
            Term("clean", "b", "a", 1.0),
            Term("source", "c~", "d", extra),
            Term("pair", "c~", "d~", extra),
        ),
    }[config.variant]


@dataclass(frozen=True)
class Plan:
    """What one step mixes: whether views a and b swap, and a `MixPlan` for each view that is mixed."""

    swap: bool
    mixes: dict[str, MixPlan]


class MoCoV3:
    """The student (encoder and predictor), its momentum encoder, and the four stages of a step."""

    def __init__(self, config: Config, backbone: nn.Module, world: World, dtype: torch.dtype) -> None:
        self.config = config
        self.world = world
        self.dtype = dtype
        self.terms = terms_of(config.mixing)
        self.query_views = tuple(dict.fromkeys(term.query for term in self.terms))
        self.key_views = tuple(dict.fromkeys(term.key for term in self.terms))
        self.views = tuple(sorted({name[0] for name in self.query_views + self.key_views}))
        self.student = build_student(backbone, config.method, config.run.seed).to(world.device)
        self.momentum_encoder = copy.deepcopy(self.student.encoder).requires_grad_(False)
        self.queries = distribute(self.student, world)
        distribute(self.momentum_encoder, world, trained=False)
        rows = config.optim.batch_size // world.size
        self.size = (config.data.image_px, config.data.image_px)
        self.keep = draw_plan(rows, self.size, prob=0.0, step=0, device=world.device)

    @property
    def backbone(self) -> nn.Module:
        """The trained backbone, the one that is evaluated and exported."""
        return self.student.encoder.backbone

    def recipes(self) -> list[ViewRecipe]:
        """How the views are augmented: BYOL's two recipes, again for the pair of views that `extra` adds."""
        data = self.config.data
        pair = [
            replace(recipe, gray_prob=data.gray_prob)
            for recipe in byol_views(data.image_px, data.crop_min_frac, data.blur)
        ]
        return pair * (len(self.views) // 2)

    def chance(self) -> dict[str, float]:
        """What every term, and the whole loss, is worth while the softmax is uniform: 2 T ln M per unit of weight."""
        uniform = 2 * self.config.method.temperature * math.log(self.config.optim.batch_size)
        return {term.name: uniform for term in self.terms} | {"loss": uniform * sum(term.weight for term in self.terms)}

    def plan(self, step: int) -> Plan:
        """Decide, from (seed, step) alone, what is mixed with what. Views share rule and lam, not boxes."""
        mixing, seed = self.config.mixing, self.config.run.seed
        mixed = sorted({name[0] for name in self.query_views + self.key_views if name.endswith("~")})
        plans = {
            view: draw_plan(
                len(self.keep),
                self.size,
                rules=mixing.rules,
                alpha=mixing.alpha,
                per=mixing.per,
                shared_lam=mixing.shared_lam,
                seed=seed,
                step=step,
                view="abcd".index(view),
                rank=self.world.rank,
                world_size=self.world.size,
                device=self.world.device,
            )
            for view in mixed
        }
        stream = np.random.Philox(
            key=np.array([seed, step], np.uint64), counter=np.array([0, 0, 0, SWAP_STREAM], np.uint64)
        )
        swap = np.random.Generator(stream).random() > 0.5
        return Plan(bool(swap and plans and mixing.variant != "extra"), plans)

    def mix(self, views: tuple[Tensor, ...], plan: Plan) -> dict[str, Tensor]:
        """(N, 3, H, W) uint8 views -> the normalised images that an encoder sees, by name; a~ and a from one read."""
        ordered = (views[1], views[0], *views[2:]) if plan.swap else views
        pixels: dict[str, Any] = {"mean": self.config.data.mean, "std": self.config.data.std, "dtype": self.dtype}
        needed = {*self.query_views, *self.key_views}
        images: dict[str, Tensor] = {}
        for view, raw in zip(self.views, ordered, strict=True):
            if view not in plan.mixes:
                images[view] = cast(Tensor, mix(raw, self.keep, **pixels))
            elif view in needed:
                images[view], images[view + "~"] = mix(raw, plan.mixes[view], clean=True, **pixels)
            else:
                images[view + "~"] = cast(Tensor, mix(raw, plan.mixes[view], **pixels))
        return images

    def encode(self, images: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Queries (N, D) by the student with gradient, keys (M, D) of all ranks by the momentum encoder without."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            queries = self.queries(*(images[name] for name in self.query_views))
            with torch.no_grad():
                keys = [self.momentum_encoder(images[name]) for name in self.key_views]
        unit_queries = [normalize(query.float(), dim=1) for query in queries]
        unit_keys = [gather_rows(normalize(key.float(), dim=1), self.world) for key in keys]
        return (
            dict(zip(self.query_views, unit_queries, strict=True)),
            dict(zip(self.key_views, unit_keys, strict=True)),
        )

    def target(self, term: Term, plan: Plan) -> TwoHot:
        """Where the query's probability should lie, from the plan that mixed the pixels (Eq. 3, Eq. 4)."""
        offset = self.world.rank * len(self.keep)
        if term.name == "clean":
            return self.keep.source_target(offset)
        mixed = plan.mixes[term.query[0]]
        if term.name == "source":
            target, static = mixed.source_target(offset), self.config.mixing.source_weight == "static"
        else:
            target = mixed.pair_target(offset, other=plan.mixes[term.key[0]])
            static = self.config.mixing.pair_weight == "static"
        return target._replace(weight=torch.full_like(target.weight, 0.5)) if static else target

    def loss(self, queries: dict[str, Tensor], keys: dict[str, Tensor], plan: Plan) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms, each with MoCo v3's factor 2T; and the mean of each kind of term."""
        temperature = self.config.method.temperature
        total = torch.zeros((), device=self.world.device)
        kinds: dict[str, list[Tensor]] = {}
        for name, query in queries.items():
            terms = [term for term in self.terms if term.query == name]
            targets = [self.target(term, plan) for term in terms]
            losses = info_nce(query, [keys[term.key] for term in terms], targets, temperature=temperature)
            for term, value in zip(terms, losses, strict=True):
                total = total + term.weight * 2 * temperature * value
                kinds.setdefault(term.name, []).append(2 * temperature * value.detach())
        return total, {f"loss_{name}": torch.stack(values).mean() for name, values in kinds.items()}

    def facts(self, plan: Plan) -> dict[str, Tensor]:
        """Numbers of a step's plan that are worth a line in metrics.jsonl."""
        if not plan.mixes:
            return {}
        return {"lam_mean": torch.stack([mixed.lam.mean() for mixed in plan.mixes.values()]).mean()}

    @torch.no_grad()
    def follow_student(self, share: Tensor) -> None:
        """Move the momentum encoder's parameters (not its batch statistics) by `share` of the way to the student's."""
        leaders: list[Tensor] = list(self.student.encoder.parameters())
        followers: list[Tensor] = list(self.momentum_encoder.parameters())
        ways = list(torch._foreach_sub(leaders, followers))
        torch._foreach_mul_(ways, share)
        torch._foreach_add_(followers, ways)

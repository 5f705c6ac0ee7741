"""MoCHi inside MoCo v3: the hardest negatives of every query, mixed with each other and with the query.

Kalantidis et al., Hard Negative Mixing for Contrastive Learning (2020). Table 1 of the SDMP paper compares with it
inside MoCo v3, without saying how: this is our re-implementation. The images are MoCo v3's; features are mixed.

    H_i: the `hard` keys of other images that are most similar to query q_i, out of all ranks' keys
    type 1, `mixed` of them:  h = (a n + (1 - a) n') / |.|,  n, n' from H_i, a ~ U(0, 1)
    type 2, `query_mixed`:    h = (b q_i + (1 - b) n) / |.|,  n from H_i, b ~ U(0, 1/2)
    ctr(q, k) = 2T mean_i -log( exp(q_i k_i / T) / (sum_j exp(q_i k_j / T) + sum_h exp(q_i h / T)) )

Synthetic negatives carry no gradient of their own; the positive is clean; the first `warmup` epochs are MoCo v3's.
MoCHi takes its negatives out of a queue of 65,536 keys, with (hard, mixed, query_mixed) = (1024, 1024, 128); MoCo v3
has no queue but the M keys of the batch, of which 1024 may be all, so that the defaults here are an eighth of that.

Cost: no synthetic negative is ever built. With s = <q, n>, s' = <q, n'> and g = <n, n'> its similarity to the query is

    <q, h> = (a s + (1 - a) s') / sqrt(a^2 + (1 - a)^2 + 2 a (1 - a) g),   likewise for type 2 with <q, q> = 1

so that beside MoCo v3's own the method needs similarities of (N, M) with gradient and of keys with keys (M, M), and a
selection of the largest: 4 M (N + M) bytes a term and (N + M) M D multiplications, but not the N (mixed + query_mixed)
D numbers of the features themselves (at N = M = 4096, D = 256 and the defaults 0.13 GB instead of 0.6).

Letters: N rows per rank, M keys (N * ranks), D features, S, S' synthetic negatives of either type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sdmp_kernels import MixPlan, TwoHot, soft_cross_entropy

from ..data import Batch
from .contrast import Contrast, Plan
from .method import At, Setup
from .mixing import Valid, generator, place_of
from .settings.contrast import Term
from .settings.mochi import MoCHiConfig

PAIR_STREAM = 2**59
SMALL = 1e-6
"""Least length of a mixture before it is scaled to 1: two opposite features cancel."""


NOWHERE = -1e6
"""A similarity that counts for nothing at any temperature: exp of it is 0."""


class Draws(NamedTuple):
    """What is mixed with what, places within a query's list of hard negatives."""

    first: Tensor
    """(N, S) int64."""
    second: Tensor
    """(N, S) int64."""
    share: Tensor
    """(N, S) float32 in [0, 1), of the first."""
    third: Tensor
    """(N, S') int64."""
    query_share: Tensor
    """(N, S') float32 in [0, 1/2), of the query."""


class MoCHi(Contrast):
    """MoCHi inside MoCo v3."""

    Config: ClassVar[type] = MoCHiConfig

    def __init__(self, config: MoCHiConfig, build_backbone: Callable[..., nn.Module], setup: Setup) -> None:
        super().__init__(config, build_backbone, setup)
        self.config = config

    @property
    def partners_follow_ranks(self) -> bool:
        """The draws of which negatives are mixed do."""
        return self.config.mixed + self.config.query_mixed > 0

    def plan(self, at: At) -> Plan:
        """No image is mixed."""
        return Plan(False, {})

    def target(self, term: Term, plan: Plan) -> TwoHot:
        """The row's own key."""
        return self.keep.source_target(self.offset)

    def compare(
        self,
        query: Tensor,
        keys: list[Tensor],
        targets: list[TwoHot],
        weights: list[float],
        at: At,
        valid: Valid | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """MoCo v3's during the first epochs; then with synthetic negatives behind the keys, in float32 at least."""
        if at.epoch < self.config.warmup:
            return super().compare(query, keys, targets, weights, at, valid)
        wide = torch.promote_types(query.dtype, torch.float32)
        losses = []
        for key, target in zip(keys, targets, strict=True):
            found = self.similarities(query.to(wide), key.to(wide), target.first, at, valid)
            logits = torch.cat(found, dim=1) / self.temperature
            if valid is None:
                losses.append(soft_cross_entropy(logits, target))
            else:
                losses.append(valid.mean(soft_cross_entropy(logits, target, reduction="none")))
        return weighted_sum(losses, weights)

    def similarities(
        self, query: Tensor, key: Tensor, own: Tensor, at: At, valid: Valid | None = None
    ) -> tuple[Tensor, ...]:
        """(N, M) of queries and keys; (N, S) and (N, S') of queries and their synthetic negatives.

        Keys that are no images are nobody's: as similar as nothing is, and never hard.
        """
        known = query @ key.T
        others = known.detach().scatter(1, own[:, None], -torch.inf)
        keys, near = len(key), known
        if valid is not None:
            keys = round(self.world.size / valid.share) if valid.share == valid.share else 0
            others = others.masked_fill(~valid.all_rows, -torch.inf)
            near = known.masked_fill(~valid.all_rows, NOWHERE)
        count = min(self.config.hard, keys - 1)
        if count < 1:
            return (near,)  # no other image, so no negative
        hard = others.topk(count, dim=1).indices
        return near, *synthetic(query, known, key, hard, self.draws(at, count))

    def draws(self, at: At, count: int) -> Draws:
        """Out of `count` hard negatives each, from (seed, step, rank) alone, on the device."""
        config, rows, device = self.config, self.setup.rows, self.world.device
        seed = int(generator(self.setup, at, PAIR_STREAM, place_of(self.setup, at)).integers(2**62))
        numbers = torch.Generator(device).manual_seed(seed)

        def uniform(columns: int) -> Tensor:
            return torch.rand(rows, columns, generator=numbers, device=device)

        def places(columns: int) -> Tensor:
            return torch.randint(count, (rows, columns), generator=numbers, device=device)

        first, second, share = places(config.mixed), places(config.mixed), uniform(config.mixed)
        return Draws(first, second, share, places(config.query_mixed), uniform(config.query_mixed) / 2)

    def describe(self) -> str:
        """And what comes when."""
        config = self.config
        return (
            f"{super().describe()}; from epoch {config.warmup:g} on {config.mixed} + {config.query_mixed} synthetic "
            f"negatives of the {config.hard} hardest"
        )

    def example(self, batch: Batch) -> list[tuple[str, Tensor, MixPlan]]:
        """No image is mixed."""
        return []


def synthetic(query: Tensor, known: Tensor, key: Tensor, hard: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """(N, S) and (N, S') similarities of queries and synthetic negatives, with the gradient to the query alone.

    query (N, D) and key (M, D) unit vectors, known (N, M) their similarities, hard (N, ...) columns of the hard
    negatives.
    """
    first, second, third = (hard.gather(1, places) for places in (draws.first, draws.second, draws.third))
    a, b = draws.share, draws.query_share
    between_keys = (key @ key.T)[first, second]
    length = (a * a + (1 - a) ** 2 + 2 * a * (1 - a) * between_keys).clamp_min(SMALL**2).sqrt()
    mixed = (a * known.gather(1, first) + (1 - a) * known.gather(1, second)) / length
    to_third = known.gather(1, third)
    to_itself = (query * query.detach()).sum(dim=1, keepdim=True)
    length = (b * b + (1 - b) ** 2 + 2 * b * (1 - b) * to_third.detach()).clamp_min(SMALL**2).sqrt()
    return mixed, (b * to_itself + (1 - b) * to_third) / length


def weighted_sum(losses: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """The sum of losses, each times its weight, and the losses themselves without gradient."""
    total = torch.stack([weight * loss for loss, weight in zip(losses, weights, strict=True)]).sum()
    return total, [loss.detach() for loss in losses]

"""The settings of the mixing rules, and the plans drawn by them: what every method that mixes has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdmp_kernels import MixPlan, Rule, draw_plan
from sdmp_kernels.views import Size, view_size

from ..data import Batch, ViewRecipe
from ..distributed import World, mirror_rank
from ..settings import DataConfig
from .method import At, Setup
from .settings.mixing import Flip


def generator(setup: Setup, at: At, purpose: int, place: int = 0) -> np.random.Generator:
    """Numbers that (seed, step) alone fixes, of a stream of their own for each purpose (and place, such as a rank).

    `draw_plan` uses the streams whose purpose is a small number: 0 for rules and lam, 1 + view for boxes.
    """
    key, counter = np.array([setup.seed, at.step], np.uint64), np.array([0, 0, place, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def place_of(setup: Setup, at: At) -> int:
    """Which of the step's batches this is, over the ranks and over the batches whose gradients accumulate."""
    return at.part * setup.world.size + setup.world.rank


def draw_rows(setup: Setup, at: At, purpose: int, draw: Callable[[np.random.Generator, int], np.ndarray]) -> np.ndarray:
    """This batch's rows of what `draw(numbers, rows)` gives for all rows of the step, whatever the number of ranks."""
    place, rows = place_of(setup, at), setup.rows
    drawn = draw(generator(setup, at, purpose), rows * setup.world.size * at.parts)
    return drawn[place * rows : (place + 1) * rows]


def draw_partners(setup: Setup, at: At, purpose: int) -> Tensor:
    """(N,) int64: a permutation of this batch's rows, of which each fixed point is mixed with itself."""
    return torch.from_numpy(generator(setup, at, purpose, place_of(setup, at)).permutation(setup.rows))


def draw_batch_plan(
    setup: Setup,
    at: At,
    view: int,
    *,
    rules: tuple[str, ...],
    alpha: float,
    per: Literal["batch", "sample"],
    prob: float = 1.0,
    shared_lam: bool = False,
    flip: Flip = "local",
    px: Size | None = None,
) -> MixPlan:
    """This rank's rows of the plan that (seed, step) fixes for the whole step; `view` moves the boxes alone.

    Where gradients accumulate, the batches of a step share its rule and have their own rows of its plan; a global flip
    is that of the batch over all ranks, since its keys and images are those of that batch.

    `px`: side of the view, or height and width, which decides how fine a box can be; default the run's `image_px`.
    """
    world, size = setup.world, view_size(px or setup.data.image_px)

    def draw(rank: int, flip: Flip) -> MixPlan:
        return draw_plan(
            setup.rows,
            size,
            rules=rules,
            alpha=alpha,
            per=per,
            prob=prob,
            shared_lam=shared_lam,
            flip=flip,
            seed=setup.seed,
            step=at.step,
            view=view,
            rank=at.part * world.size + rank,
            world_size=at.parts * world.size,
            device=world.device,
        )

    if flip == "local" or at.parts == 1:
        return draw(world.rank, flip)
    # draw_plan flips all rows of the step, which would pair the first batch with the last.
    partners = draw(mirror_rank(world), "local")
    return replace(draw(world.rank, "local"), partner_lam=partners.lam.flip(0))


def with_colours(recipe: ViewRecipe, data: DataConfig) -> ViewRecipe:
    """The recipe with the chance of grey that the settings ask for; what means nothing without colours is left out.

    Brightness and contrast stay, for any number of channels; so do flip, blur and solarise.
    """
    if data.channels in (1, 3):
        return replace(recipe, gray_prob=data.gray_prob)
    return replace(recipe, gray_prob=0.0, jitter=(*recipe.jitter[:2], 0.0, 0.0))


class Valid(NamedTuple):
    """Which rows are images, and what one of them counts in a mean over those of all ranks."""

    rows: Tensor
    """(N,) bool on the device: this rank's."""
    all_rows: Tensor
    """(M,) bool on the device: those of all ranks, in rank order."""
    share: float
    """Ranks / valid rows of all ranks, since the ranks' gradients are averaged; NaN, a step that changes nothing, where
    no row is valid."""

    def mean(self, values: Tensor) -> Tensor:
        """(..., N) -> (...): this rank's share of the mean over the valid rows of all ranks."""
        return torch.where(self.rows, values, 0.0).sum(dim=-1) * self.share


def valid_of(batch: Batch, world: World) -> Valid | None:
    """None where all rows are images."""
    if batch.all_valid is None:
        return None
    count = int(batch.all_valid.sum())
    share = world.size / count if count else float("nan")
    rows, all_rows = (flags.to(world.device, non_blocking=True) for flags in (batch.valid, batch.all_valid))
    return Valid(rows, all_rows, share)


def keep_lost(plan: MixPlan, batch: Batch, world: World, *, global_flip: bool = False) -> MixPlan:
    """The plan with the rows that are no images, and those that have one of them as partner, kept as they are."""
    if batch.all_valid is None:
        return plan
    lost = (~batch.all_valid).to(plan.device, non_blocking=True).view(world.size, -1)
    return plan.keeping(lost[world.rank], lost[mirror_rank(world)] if global_flip else None)


def half_unless_kept(weight: Tensor, plan: MixPlan) -> Tensor:
    """The static weight of Table 6, 1/2, but all of it for a row that is not mixed."""
    return torch.where(plan.rule == int(Rule.KEEP), 1.0, torch.full_like(weight, 0.5))


def examples_of_rules(
    views: Tensor, *, rules: tuple[str, ...], alpha: float, seed: int
) -> list[tuple[str, Tensor, MixPlan]]:
    """For mix.png: the views with a plan for each rule, that of step 0 of a run with this rule alone."""
    images = views.cpu()
    count, _, height, width = images.shape
    plans = (draw_plan(count, (height, width), rules=(rule,), alpha=alpha, seed=seed, step=0) for rule in rules)
    return [(rule, images, plan) for rule, plan in zip(rules, plans, strict=True)]

"""The settings of the mixing rules, and the plans drawn by them: what every method that mixes has."""

from __future__ import annotations

from typing import Literal

from sdmp_kernels import MixPlan, draw_plan

from ..settings import between, near, require
from .method import At, Setup

Flip = Literal["local", "global"]
RULES = ("mixup", "cutmix", "resizemix")


def check_rules(rules: tuple[str, ...], alpha: float) -> None:
    """Raise `ConfigError` unless `rules` are some of `RULES`, each once, and `alpha` is one of a Beta law."""
    for rule in rules:
        require(rule in RULES, "rules", rule, f"some of {', '.join(RULES)}.{near(rule, RULES)}")
    require(len(rules) > 0, "rules", rules, "at least one rule")
    require(len(set(rules)) == len(rules), "rules", rules, "each rule once")
    between("mix_alpha", alpha, 0, 1e6, above=True)


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
    px: int | None = None,
) -> MixPlan:
    """This rank's rows of the plan that (seed, step) fixes for the whole step; `view` moves the boxes alone.

    `px`: side of the view, which decides how fine a box can be; default the run's `image_px`.

    Where gradients accumulate, the batches of a step share its rule and have their own rows of its plan.

    Raises:
        ConfigError: for a global flip of accumulated batches, whose partners would come in another batch.
    """
    require(flip == "local" or at.parts == 1, "flip", flip, "'local' where gradients accumulate over batches")
    world, px = setup.world, px or setup.data.image_px
    return draw_plan(
        setup.rows,
        (px, px),
        rules=rules,
        alpha=alpha,
        per=per,
        prob=prob,
        shared_lam=shared_lam,
        flip=flip,
        seed=setup.seed,
        step=at.step,
        view=view,
        rank=at.part * world.size + world.rank,
        world_size=at.parts * world.size,
        device=world.device,
    )


def example_plans(
    images_shape: tuple[int, ...], *, rules: tuple[str, ...], alpha: float, seed: int
) -> list[tuple[str, MixPlan]]:
    """For mix.png: a plan for each rule, that of step 0 of a run with this rule alone."""
    count, _, height, width = images_shape
    return [(rule, draw_plan(count, (height, width), rules=(rule,), alpha=alpha, seed=seed, step=0)) for rule in rules]

"""Whether features still tell images apart: two numbers that every method logs, and when they mean collapse.

feature_std: the standard deviation of unit vectors over a batch, averaged over their components and multiplied by the
square root of D, as in Chen and He, Exploring Simple Siamese Representation Learning (2021): 0 where all are one
vector, about 1 where they point everywhere.
effective_rank: exp of the entropy of the normalised singular values (Roy and Vetterli 2007; RankMe, Garrido et al.
2023): 1 where all lie on one line, at most the smaller of N and D.

Letters: N vectors, D components.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

LEAST_STD = 0.05
"""Below it the features are taken to have collapsed: 20 times closer together than directions at random are."""
LEAST_RANK = 1.5
"""Below it likewise: nearly all of them lie on one line."""


@torch.no_grad()
def spread_of(vectors: Tensor) -> dict[str, Tensor]:
    """`feature_std` and `effective_rank` of (N, D) vectors of any length, 0-dim float32 on their device.

    Vectors that are not finite give NaN. On a GPU the host waits for the eigenvalues.
    """
    unit = normalize(vectors.detach().double(), dim=1)
    deviation = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    gram = unit @ unit.T if len(unit) < unit.shape[1] else unit.T @ unit
    finite = gram.isfinite().all()
    # The eigenvalues of a matrix with NaN are an error. In float64 the square root keeps eight digits of small ones.
    values = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0)).clamp_min(0).sqrt()
    share = values / values.sum()
    rank = torch.special.entr(share).sum().exp()
    numbers = {"feature_std": deviation, "effective_rank": torch.where(finite, rank, torch.nan)}
    return {name: value.float() for name, value in numbers.items()}


def collapse_of(numbers: Mapping[str, float]) -> str | None:
    """Why the numbers of a line say that the features have likely collapsed; None where they do not."""
    if numbers.get("feature_std", 1.0) < LEAST_STD:
        return f"the features of all images are nearly the same (standard deviation {numbers['feature_std']:.3f})"
    if numbers.get("effective_rank", LEAST_RANK) < LEAST_RANK:
        return f"the features of all images lie nearly on one line (effective rank {numbers['effective_rank']:.2f})"
    return None

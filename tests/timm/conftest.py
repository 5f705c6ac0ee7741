"""What is drawn and mixed while a script runs, written down beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from torch import Tensor

import sdmp_kernels.timm as ours
from sdmp_kernels import Erasure, MixPlan


class Drawn(NamedTuple):
    """A batch as it was before anything was mixed, its class numbers, and its plan (None: nothing is mixed)."""

    images: Tensor
    labels: Tensor
    plan: MixPlan | None


@pytest.fixture
def erasures(monkeypatch: pytest.MonkeyPatch) -> list[Erasure]:
    """What is erased of every batch in this process, in order."""
    found: list[Erasure] = []
    draw = ours.RandomErasing.erasure

    def record(self: Any, *args: Any) -> Erasure:
        found.append(draw(self, *args))
        return found[-1]

    monkeypatch.setattr(ours.RandomErasing, "erasure", record)
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    """Every batch that is mixed in this process, in order."""
    batches: list[Drawn] = []
    finish, call = ours.FastCollateMixup.finish, ours.Mixup.__call__

    def record(self: Any, batch: Any) -> Any:
        plan, target = finish(self, batch)
        batches.append(Drawn(batch.images.clone(), batch.target.clone(), plan))
        return plan, target

    def record_call(self: Any, x: Tensor, target: Tensor, plan: Any = None) -> Any:
        before = x.clone()
        result = call(self, x, target, plan)
        batches.append(Drawn(before, target.clone(), self.last_plan if self.mixup_enabled else None))
        return result

    monkeypatch.setattr(ours.FastCollateMixup, "finish", record)
    monkeypatch.setattr(ours.Mixup, "__call__", record_call)
    return batches

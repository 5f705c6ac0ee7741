"""A context that fails where the code in it reads from or writes to any global random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def untouched() -> Iterator[None]:
    """Python's, numpy's and torch's global random states are the same after as before: nothing drew or seeded."""
    before = _states()
    yield
    for name, state in _states().items():
        assert state == before[name], f"the global random state of {name} was touched"


def _states() -> dict[str, object]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "random": random.getstate(),
        "numpy": (kind, keys.tobytes(), *rest),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }

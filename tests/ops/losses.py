"""What the tests of the losses share: the backends that run on this machine's CPU, targets by
hand, a quiet interpreter, and who allocates what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ops import matrix
from torch.utils._python_dispatch import TorchDispatchMode

from sdmp_kernels import TwoHot, _backends

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=str(why)))
    for name in ("reference", "torch", "cpp", "triton")
    for why in [_backends.unavailable(name, "cpu")]
]
FORMS = ("ce", "log_mixture")
LIMITS = {dtype: float(torch.finfo(dtype).max) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize("form", FORMS)
needs_interpreter = pytest.mark.skipif(bool(_backends.unavailable("triton", "cpu")), reason="no interpreter here")


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """Triton's interpreter computes with numpy, which warns of infinities that the masks then hide."""
    with np.errstate(all="ignore"):
        yield


def two_hot(first: Any, second: Any, weight: Any) -> TwoHot:
    """A target from lists."""
    return TwoHot(torch.tensor(first), torch.tensor(second), torch.tensor(weight, dtype=torch.float32))


class Storages(TorchDispatchMode):
    """The bytes of every storage that the operators within the context return and that was not among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in matrix.flat((args, kwargs)):
            self.known.add(tensor.untyped_storage().data_ptr())
        for tensor in matrix.flat(result):
            if tensor.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result

"""Small tensors that travel in one copy."""

from __future__ import annotations

import pytest
import torch

from sdmp_kernels._memory import is_on, moved

CPU = torch.device("cpu")


def test_moved_tensors_are_equal_whatever_their_strides_and_lie_in_one_aligned_buffer() -> None:
    tensors = [
        torch.arange(7),
        torch.arange(12, dtype=torch.int32).view(4, 3).t(),
        torch.tensor([True, False, True]),
        torch.ones(1).expand(5),
        torch.zeros(0, 4, dtype=torch.int32),
        torch.rand(3, 2),
    ]
    again = moved(tensors, CPU)
    for one, other in zip(tensors, again, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert other.is_contiguous()
        assert other.data_ptr() % 16 == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in again}) == 1
    assert not {tensor.data_ptr() for tensor in again if len(tensor)} & {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize(
    ("device", "target", "there"),
    [("cpu", "cpu", True), ("cuda:1", "cuda", True), ("cuda:1", "cuda:1", True), ("cuda:1", "cuda:0", False)],
)
def test_where_something_is(device: str, target: str, there: bool) -> None:
    assert is_on(torch.device(device), torch.device(target)) is there


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_to_a_gpu_and_back() -> None:
    tensors = [torch.arange(7), torch.rand(3, 2)]
    back = moved(moved(tensors, torch.device("cuda")), CPU)
    assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True))

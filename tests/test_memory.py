"""Small tensors that travel in one copy, and large results."""

from __future__ import annotations

import mmap

import pytest
import torch

from sdmp_kernels._memory import _BLOCKS, empty_like, is_on, moved, release_kept

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


def large(dtype: torch.dtype, *, channels_last: bool = False) -> torch.Tensor:
    """(24, 3, 512, 512): more than 32 MiB of float32 (72 MiB), of bfloat16 36."""
    made = torch.empty(24, 3, 512, 512, dtype=dtype)
    return made.contiguous(memory_format=torch.channels_last) if channels_last else made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_result_is_a_tensor_like_any_other(dtype: torch.dtype, channels_last: bool) -> None:
    like = large(dtype, channels_last=channels_last)
    made = empty_like(like)
    assert (made.shape, made.dtype, made.stride()) == (like.shape, like.dtype, like.stride())
    assert not made._is_view()
    assert made.is_leaf
    assert made.data_ptr() % 64 == 0
    assert torch.equal(made.fill_(2), torch.full_like(like, 2))


def test_a_freed_block_serves_the_next_result_and_one_in_use_never() -> None:
    like = large(torch.float32)
    first = empty_like(like).fill_(1)
    other = empty_like(like).fill_(2)
    place = other.data_ptr()
    assert place != first.data_ptr()
    part = other[3:5]
    del other
    third = empty_like(like).fill_(3)
    assert third.data_ptr() not in (place, first.data_ptr()), "a view still uses it"
    del part
    again = empty_like(like)
    assert again.data_ptr() == place
    assert first.eq(1).all()
    assert third.eq(3).all()


def test_no_more_is_kept_than_stated() -> None:
    many = [empty_like(large(torch.float32)) for _ in range(6)]
    del many
    assert 0 < _BLOCKS.kept <= 256 * 2**20
    release_kept()
    assert _BLOCKS.kept == 0


def test_a_refusal_by_the_system_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(_BLOCKS, "_free", [])
    assert empty_like(large(torch.float32)).shape == (24, 3, 512, 512)

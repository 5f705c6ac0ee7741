"""What the losses share: precision switches that are left alone, or put back; targets that are safe to read."""

from __future__ import annotations

import threading

import pytest
import torch

from sdmp_kernels import TwoHot, distillation, info_nce, soft_cross_entropy, use_backend
from sdmp_kernels.ops import losses
from sdmp_kernels.ops.losses import at_columns, full_precision, safe_target, take

SWITCHES = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}


class Watched:
    """In the place of a switch of torch: every value that is written to it."""

    def __init__(self, value: str) -> None:
        self.__dict__.update(value=value, written=[])

    @property
    def fp32_precision(self) -> str:
        return self.value

    def __setattr__(self, name: str, value: str) -> None:
        assert name == "fp32_precision"
        self.written.append(value)
        self.__dict__["value"] = value


@pytest.fixture
def switch(monkeypatch):
    """Replaces the switches of both devices by watched ones that say `value`."""

    def put(value: str) -> Watched:
        watched = Watched(value)
        monkeypatch.setattr(losses, "_SWITCHES", {device: losses._Switch(watched) for device in SWITCHES})
        return watched

    return put


def run_all() -> list[torch.Tensor]:
    """Forward and backward of every loss, with gradients for keys too."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(9, 16, generator=generator).requires_grad_() for _ in range(2))
    target = TwoHot(torch.arange(9), torch.arange(9).flip(0), torch.rand(9, generator=generator))
    crops = torch.randn(3, 9, 16, generator=generator).requires_grad_()
    weight = torch.rand(3, 2, generator=generator)
    found = []
    for loss, leaves in (
        (info_nce(q, k, target, temperature=0.2), [q, k]),
        (soft_cross_entropy(q, target), [q]),
        (distillation(crops, crops[:2].detach(), own=weight, other=weight), [crops]),
    ):
        found += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return found


@pytest.mark.parametrize("value", ["none", "ieee"])
def test_exact_products_need_no_switch(switch, value):
    """The default: nothing is written, so that nobody who reads meanwhile sees anything."""
    watched = switch(value)
    run_all()
    assert watched.written == []


@pytest.mark.parametrize("value", ["tf32", "bf16"])
def test_only_the_composition_turns_a_switch_and_puts_it_back(switch, value):
    watched = switch(value)
    with use_backend("reference"):
        run_all()
    assert watched.written == []
    with use_backend("torch"):
        run_all()
    assert set(watched.written) == {"ieee", value}
    assert watched.value == value


def test_half_inputs_on_a_gpu_turn_no_switch(switch):
    """tf32 holds them exactly."""
    watched = switch("tf32")
    like = torch.empty(2, dtype=torch.float16, device="meta")
    monkeyed = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": like.dtype})
    with full_precision(monkeyed):
        pass
    assert watched.written == []
    monkeyed.dtype = torch.float32
    with full_precision(monkeyed):
        assert watched.value == "ieee"
    assert watched.value == "tf32"


def test_blocks_that_overlap_put_the_switch_back_once(switch):
    """The first to come leaves first: the switch stays turned until the other has gone."""
    watched, like = switch("bf16"), torch.empty(2)
    first, second = full_precision(like), full_precision(like)
    with second:
        with first:
            pass
        assert watched.value == "ieee"
    assert watched.value == "bf16"
    assert watched.written == ["ieee", "bf16"]


def test_a_switch_turned_by_someone_else_meanwhile_is_theirs(switch):
    watched = switch("bf16")
    with full_precision(torch.empty(2)):
        watched.fp32_precision = "tf32"
    assert watched.value == "tf32"


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_another_thread_can_read_every_switch_while_the_ops_run(allowed):
    """By the old names and the new ones; PyTorch raises where the two contradict each other."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    outside = {device: switch.fp32_precision for device, switch in SWITCHES.items()}
    errors, reads, done = [], [], threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                assert torch.get_float32_matmul_precision() == allowed
                assert torch.backends.cuda.matmul.allow_tf32 == (allowed != "highest")
                assert SWITCHES["cuda"].fp32_precision == outside["cuda"]
                assert SWITCHES["cpu"].fp32_precision in (outside["cpu"], "ieee")
            except Exception as error:
                errors.append(error)
                return
            reads.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while len(reads) < 200 and not errors:
            run_all()
    finally:
        done.set()
        reader.join()
        after = {device: switch.fp32_precision for device, switch in SWITCHES.items()}
        torch.set_float32_matmul_precision(before)
    assert not errors
    assert after == outside


def test_results_do_not_depend_on_the_switches():
    before = torch.get_float32_matmul_precision()
    plain = run_all()
    torch.set_float32_matmul_precision("medium")
    try:
        inside = run_all()
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_a_safe_target_has_no_weight_out_of_range():
    first, second = torch.tensor([0, 5, -1]), torch.tensor([4, 2, 3])
    target = safe_target(first, second, torch.tensor([0.25, 0.5, 0.75]), 5, torch.float32)
    assert target.columns.tolist() == [[0, 4, 0], [4, 2, 3]]
    assert target.weights.tolist() == [[0.25, 0.0, 0.0], [0.75, 0.5, 0.25]]


def test_both_columns_are_taken_also_where_they_are_one():
    matrix = torch.arange(12.0).view(3, 4)
    columns = torch.tensor([[0, 1, 3], [2, 1, 0]])
    amounts = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    expected = matrix.clone()
    for column, amount in zip(columns, amounts, strict=True):
        expected[range(3), column] -= amount
    assert at_columns(matrix, columns).tolist() == [[0.0, 5.0, 11.0], [2.0, 5.0, 8.0]]
    take(matrix, columns, amounts)
    assert torch.equal(matrix, expected)

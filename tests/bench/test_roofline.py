"""What a call asks for, counted by hand beside the count; the time that follows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import report, roofline
from bench.harness import Budget, measure
from bench.roofline import Asked, Machine, asked_by
from bench.step import settings

GPU = Machine(copy_bytes_per_s=1e9, tensor_flops=1e9, launch_s=1e-6, host_s=5e-6)


def test_a_product_and_its_backward_are_three_products() -> None:
    a, b = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    asked = asked_by(lambda: (a @ b).sum().backward(), GPU)
    assert asked.flops == 3 * 2 * 64**3
    # mm; sum; ones_like; two mm; what expands or transposes is a view, and leaves take their gradient as it is.
    assert 5 <= asked.launches <= 8
    once = 3 * 64 * 64 * 4
    assert 3 * once <= asked.nbytes <= 3 * once + 6 * 64 * 64 * 4


def test_views_and_unwritten_memory_are_free() -> None:
    x = torch.randn(8, 8)
    assert asked_by(lambda: (x.T, x[2:], x.view(64), x.detach(), torch.empty(9), x.expand(3, 8, 8)), GPU) == Asked()
    assert asked_by(lambda: x.add_(1), GPU).launches == 1
    assert asked_by(lambda: x + x, GPU).nbytes == 2 * 8 * 8 * 4  # read once, written once


def test_an_operator_takes_the_longest_of_three() -> None:
    x = torch.zeros(1000)
    assert asked_by(lambda: x.add_(1), GPU).device_s == pytest.approx(4000 / 1e9)
    assert asked_by(lambda: x[:4].add_(1), GPU).device_s == pytest.approx(1e-6)
    asked = Asked(launches=10, device_s=20e-6)
    assert asked.seconds(GPU) == pytest.approx(50e-6)  # the host, which asks for ten
    assert asked.seconds(dataclasses.replace(GPU, host_s=1e-6)) == pytest.approx(20e-6)
    assert asked.seconds(dataclasses.replace(GPU, queues=False)) == pytest.approx(70e-6)


def test_this_cpu_is_measured() -> None:
    machine = roofline.this_cpu()
    assert 1e8 < machine.copy_bytes_per_s < 1e13 and 1e8 < machine.tensor_flops < 1e14
    assert 1e-8 < machine.host_s < 1e-2 and not machine.queues
    assert "GB/s" in machine.line() and "TB/s" in Machine().line()


def test_the_step_s_prediction_stands_beside_its_time() -> None:
    setting = next(settings(torch.device("cpu"), "tiny"))
    alone = dataclasses.replace(setting, arms=[arm for arm in setting.arms if arm.kind == "ours"])
    row = measure(alone, torch.device("cpu"), Budget(0.0, 1, 1, 0.0), lambda _: None)
    (arm,) = row["arms"]
    predicted = arm["predicted"]
    assert predicted["launches"] > 200 and predicted["flops"] > 1e6 and predicted["seconds"] > 0
    text = report.row(row)
    assert "predicted" in text.splitlines()[0] and f"{predicted['launches']} operators" in text
    shown = report.ratio(arm["seconds"]["p50"] / predicted["seconds"])
    assert f"({shown}x)" in text

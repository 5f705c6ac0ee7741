"""What a call asks for, counted by hand beside the count; the time that follows.

Predictions: of claims that exist, by arithmetic that can be done again, and marked where a run says otherwise.
"""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from bench_documents import arm, document, row

from bench import goals, predict, report, step
from bench.harness import Budget, measure
from bench.predict import Asked, Machine, asked_by

GPU = Machine(copy_bytes_per_s=1e9, tensor_flops=1e9, launch_s=1e-6, host_s=5e-6)


def test_a_product_and_its_backward_are_three_products() -> None:
    a, b = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    asked = asked_by(lambda: (a @ b).sum().backward())
    assert asked.flops == 3 * 2 * 64**3
    # mm; sum; ones_like; two mm; what expands or transposes is a view, and leaves take their gradient as it is.
    assert 5 <= asked.launches <= 8
    once = 3 * 64 * 64 * 4
    assert 3 * once <= asked.nbytes <= 3 * once + 6 * 64 * 64 * 4


def test_views_and_unwritten_memory_are_free() -> None:
    x = torch.randn(8, 8)
    assert asked_by(lambda: (x.T, x[2:], x.view(64), x.detach(), torch.empty(9), x.expand(3, 8, 8))) == Asked()
    assert asked_by(lambda: x.add_(1)).launches == 1
    assert asked_by(lambda: x + x).nbytes == 2 * 8 * 8 * 4  # read once, written once


def test_an_operator_takes_the_longest_of_three() -> None:
    x = torch.zeros(1000)
    assert asked_by(lambda: x.add_(1)).device_seconds(GPU) == pytest.approx(4000 / 1e9)
    assert asked_by(lambda: x[:4].add_(1)).device_seconds(GPU) == pytest.approx(1e-6)
    assert Asked([(1, 3000)]).device_seconds(GPU) == pytest.approx(3e-6)
    asked = Asked([(2000, 0)] * 10)
    assert asked.seconds(GPU) == pytest.approx(50e-6)  # the host, which asks for ten
    assert asked.seconds(dataclasses.replace(GPU, host_s=1e-6)) == pytest.approx(20e-6)
    assert asked.seconds(dataclasses.replace(GPU, queues=False)) == pytest.approx(70e-6)


def test_this_cpu_is_measured() -> None:
    machine = predict.this_cpu()
    assert 1e8 < machine.copy_bytes_per_s < 1e13 and 1e8 < machine.tensor_flops < 1e14
    assert 1e-8 < machine.host_s < 1e-2 and not machine.queues
    assert "GB/s" in machine.line() and "TB/s" in Machine().line()


def test_the_step_s_prediction_stands_beside_its_time() -> None:
    setting = next(step.settings(torch.device("cpu"), "tiny"))
    alone = dataclasses.replace(setting, arms=[arm for arm in setting.arms if arm.kind == "ours"])
    row = measure(alone, torch.device("cpu"), Budget(0.0, 1, 1, 0.0), lambda _: None)
    (arm,) = row["arms"]
    predicted = arm["predicted"]
    assert predicted["launches"] > 200 and predicted["flops"] > 1e6 and predicted["seconds"] > 0
    text = report.row(row)
    assert "predicted" in text.splitlines()[0] and f"{predicted['launches']} operators" in text
    shown = report.ratio(arm["seconds"]["p50"] / predicted["seconds"])
    assert f"({shown}x)" in text


def test_a_step_on_fake_images_asks_for_what_a_real_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does nothing: the weights stay."""
    tiny = step.config_of("sdmp", torch.device("cpu"), "tiny", 4)
    monkeypatch.setattr(step, "config_of", lambda *_: tiny)
    cpu = torch.device("cpu")
    real = step.make_training(tiny, cpu, precision="bf16")
    before = [p.detach().clone() for p in real.method.state.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(step, "make_training", lambda *_, **__: real)
        guessed = asked_by(step.on_fake_images("sdmp", 4))
    assert all(map(torch.equal, before, real.method.state.parameters()))
    real = step.make_training(tiny, cpu, precision="bf16")
    first, asked = (asked_by(lambda: step.one_step(real, step._noise(cpu, "tiny", 4, 0)["batch"])) for _ in range(2))
    assert first.launches > asked.launches  # it makes the optimiser's moments
    assert guessed.flops == asked.flops > 0
    # torch takes the norms of fake gradients one by one, those of real ones at once; a fake plan is made by a few fills.
    gradients = sum(p.requires_grad for p in real.method.trained.parameters())
    assert guessed.launches == pytest.approx(asked.launches + gradients - 1, abs=4)
    assert guessed.nbytes == pytest.approx(asked.nbytes, rel=0.01)


def test_the_training_step_is_counted_as_it_is_configured() -> None:
    """ViT-S/16: (12 layers x (12 d^2 + 2 n d) + 768 d) n products a forward pass, with MoCo v3's heads."""
    asked = predict.asked_of_a_step()
    assert asked is not None
    n, d, wide, dim = 197, 384, 4096, 256
    dense = 2 * (12 * 12 * d * d * n + 768 * d * 196)
    attention = 12 * 4 * n * n * d
    projector, predictor = 2 * (d * wide + wide * wide + wide * dim), 2 * (dim * wide + wide * dim)
    once = dense + projector
    # Two queries with gradient and three keys; attention's backward makes five products of its forward's two. The
    # patches' weights are frozen.
    frozen = 2 * 2 * 2 * 768 * d * 196
    whole = (2 * 3 + 3) * once + 2 * 3 * predictor + (2 * 3.5 + 3) * attention - frozen
    assert asked.flops / predict.STEP_BATCH == pytest.approx(whole, rel=0.01)
    guess = predict.predictions()["G10", "ViT-S/16 step, batch 512: images per second"]
    assert guess.value == pytest.approx(predict.STEP_BATCH / asked.seconds(Machine()))
    assert f"{asked.launches:,} operators" in guess.formula
    # What docs/decisions/0014 builds on: the device takes far longer than the host, and most of it for bytes.
    assert asked.host_seconds(Machine()) < asked.device_seconds(Machine()) / 5
    assert asked.nbytes / Machine().copy_bytes_per_s > 0.8 * asked.device_seconds(Machine())
    slower = predict.predictions(dataclasses.replace(Machine(), copy_bytes_per_s=1e12))
    assert slower["G10", "ViT-S/16 step, batch 512: images per second"].value < guess.value


def test_where_the_trainer_cannot_run_its_step_has_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert predict.asked_of_a_step.__wrapped__() is None
    monkeypatch.setattr(predict, "asked_of_a_step", lambda: None)
    assert "G10" not in {goal for goal, _ in predict.predictions()}
    (line,) = (line for line in predict.table(None).splitlines() if "step, batch 512: images per second" in line)
    assert line.endswith("|  |  |")


@pytest.mark.parametrize(("device", "compiled"), [("cuda", True), ("cpu", False)])
def test_a_gpu_times_the_step_as_written_and_compiled(device: str, compiled: bool) -> None:
    arms = step.step_setting(torch.device(device), "full", 256).arms
    assert {"MoCo v3 + SDMP", "MoCo v3"} < {arm.name for arm in arms}
    assert [arm.name for arm in arms if arm.kind == "compile"] == ["MoCo v3 + SDMP, compiled"] * compiled


def test_attention_has_its_products_on_a_cpu_too() -> None:
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert asked_by(lambda: attend(q, q, q)).flops == 2 * 2 * 2 * 3 * 16 * 16 * 8
    assert asked_by(lambda: attend(q, q, q).sum().backward()).flops == 7 * 2 * 2 * 3 * 16 * 16 * 8


def test_every_prediction_is_of_a_claim() -> None:
    claims = {(claim.goal, claim.words) for claim in goals.CLAIMS if claim.device == "cuda"}
    assert set(predict.predictions()) <= claims
    assert {"G1", "G2", "G3", "G4", "G5", "G6", "G7", "G10"} == {goal for goal, _ in predict.predictions()}


def test_an_attention_is_its_products_exponentials_and_other_instructions() -> None:
    """32768 x 32768 logits of 256: 1.10e12 operations, 1.07e9 exponentials."""
    known = predict.predictions()["G3", "info_nce bf16, n = m = 32768, d = 256: Triton"].value
    logits = 32768**2
    flops = 4 * logits * 256
    seconds = flops / 660e12 + logits / (132 * 16 * 1.755e9) + 6 * logits / (132 * 128 * 1.755e9)
    assert known == pytest.approx(flops / seconds / 1e12, rel=0.02)
    slower = dataclasses.replace(Machine(), exps_per_s=1e12)
    assert predict.predictions(slower)["G3", "info_nce bf16, n = m = 32768, d = 256: Triton"].value < known


def test_what_is_far_from_its_prediction_is_marked() -> None:
    config = {"rule": "mixup", "source": "bfloat16", "n": 1024, "px": 224, "channels_last": False, "clean": False}
    gpu = {"cpu": "Test CPU", "cores": 2, "gpu": {"name": "Test GPU"}, "packages": {}}
    for share, marked in ((0.9, False), (0.5, True)):
        ours = arm("sdmp triton", "ours", 1.0, share_of_copy={"p20": share, "p50": share, "p80": share})
        entry = row(device="cuda", config=config, ours="sdmp triton", arms=[arm("copy", "ceiling"), ours])
        text = predict.table(document(environment=gpu, rows=[entry]))
        line = next(line for line in text.splitlines() if "mixup bf16, n = 1024: time over" in line)
        assert ("of the prediction" in line) is marked
    assert "measured" in text and "measured" not in predict.table(None), "without a run there is no such column"

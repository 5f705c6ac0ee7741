"""The Triton kernels of `mix`: on a GPU where there is one, else in Triton's interpreter.

The cases that the op matrix leaves out for the interpreter's sake run here once. What only a compiler can tell, such as
the widths of memory accesses, is in tests/test_ahead_of_time.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops import matrix

from sdmp_kernels import MixPlan, Rule, _launch, draw_plan, mix, use_backend
from sdmp_kernels.ops.mix import cases, reference
from sdmp_kernels.ops.mix.arguments import Gradients, PlanRows, Upstream

pytest.importorskip("triton")
from sdmp_kernels.ops.mix import triton as kernels
from sdmp_kernels.ops.mix import triton_kernels

DEVICE = matrix.DEVICES[-1]
HERE = [case for case in cases.CASES if not case.interpreter or DEVICE == "cuda"]
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def trials(dtypes):
    for case in HERE:
        for dtype in case.dtypes:
            if dtype in dtypes and "bfloat16" not in case.name:
                yield matrix.Trial("mix", cases, case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("trial", trials((torch.float32, torch.uint8)), ids=str)
def test_values_and_gradients(trial):
    """The rule of the op matrix: at most twice PyTorch's own error, plus one ulp of the largest term."""
    truth = matrix.flat(cases.truth(**trial.inputs()))
    plain = matrix.flat(cases.eager(**trial.inputs()))
    with trial.forced():
        got = matrix.flat(cases.call(**trial.inputs()))
    term = cases.largest_term(**trial.inputs())
    for result, exact, own in zip(got, truth, plain, strict=True):
        assert matrix.error(result, exact) <= matrix.allowed(matrix.error(own, exact), result.dtype, term)
    if not trial.case.grads:
        return
    _, truth = matrix.gradients(cases.truth, trial, matrix.upcast(trial, trial.inputs()), torch.ones_like)
    _, plain = matrix.gradients(cases.eager, trial, trial.inputs(), torch.ones_like)
    with trial.forced():
        _, got = matrix.gradients(cases.call, trial, trial.inputs(), torch.ones_like)
    for result, exact, own in zip(got, truth, plain, strict=True):
        term = float(exact.abs().max())
        assert matrix.error(result, exact) <= matrix.allowed(matrix.error(own, exact), result.dtype, term)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("partner", [None, (8, 7, 6, 5, 4, 3, 2, 1, 0)], ids=["pair", "gather"])
def test_copied_pixels_keep_their_bits(dtype, partner):
    """Rows that are copied, and pixels that are, though every other source holds nothing but NaN (or 255)."""
    plan = cases.by_hand(9, (6, 8))
    if partner is not None:
        plan = cases.partner_vector(plan, partner, 9)
    poison = 255 if dtype == torch.uint8 else float("nan")
    for row in range(9):
        images = torch.full((9, 3, 6, 8), poison, dtype=dtype, device=DEVICE)
        images[row] = torch.arange(144, device=DEVICE).view(3, 6, 8).to(dtype)
        with use_backend("triton", "mix"):
            mixed = mix(images, plan.to(DEVICE))[row]
        outside = torch.ones(6, 8, dtype=torch.bool)
        top, left, height, width = plan.box[row].tolist()
        outside[top : top + height, left : left + width] = False
        if plan.rule[row] == Rule.MIXUP and plan.lam[row] != 1 and row != 4:
            outside[:] = False
        assert torch.equal(mixed[:, outside], images[row][:, outside])


def ring(shape, value, dtype):
    """(a tensor within a larger buffer, the buffer): 64 elements of `value` on either side."""
    size = torch.Size(shape).numel()
    room = torch.full((size + 128,), value, dtype=dtype, device=DEVICE)
    return room[64 : 64 + size].view(shape), room


@pytest.mark.parametrize("size", [(7, 5), (8, 16)], ids=str)
@pytest.mark.parametrize("partner", [None, (2, 2, 0)], ids=["pair", "gather"])
def test_nothing_beside_the_tensors_is_read_or_written(size, partner):
    """NaN round the inputs, another value round the outputs: neither gets in, neither is overwritten."""
    plan = draw_plan(3, size, rules=("mixup", "cutmix", "resizemix"), per="sample", seed=5, step=0).to(DEVICE)
    if partner is not None:
        plan = cases.partner_vector(plan.to("cpu"), partner, 3).to(DEVICE)
    images, _ = ring((3, 2, *size), float("nan"), torch.float32)
    images.copy_(torch.rand(images.shape, generator=torch.Generator().manual_seed(1)))
    (kept, kept_room), (mixed, mixed_room) = (ring(images.shape, -77.0, torch.float32) for _ in range(2))
    with use_backend("triton", "mix"):
        mix(images, plan, clean=True, out=(kept, mixed))
    assert torch.equal(kept, images)
    assert mixed.isfinite().all()
    assert (mixed >= 0).all()
    for room in (kept_room, mixed_room):
        assert (room[:64] == -77).all()
        assert (room[-64:] == -77).all()


@pytest.mark.parametrize("partner", [None, (2, 2, 0)], ids=["pair", "gather"])
def test_gradients_read_and_write_nothing_beside(partner):
    plan = draw_plan(3, (7, 5), rules=("mixup", "cutmix", "resizemix"), per="sample", seed=5, step=0)
    plan = (plan if partner is None else cases.partner_vector(plan, partner, 3)).to(DEVICE)
    grads, _ = ring((3, 2, 7, 5), float("nan"), torch.float32)
    grads.copy_(torch.rand(grads.shape, generator=torch.Generator().manual_seed(1)))
    result, room = ring(grads.shape, -77.0, torch.float32)
    upstream, rows, expected = Upstream(grads, None), PlanRows.of(plan), torch.empty_like(result)
    kernels.mix_backward(upstream, rows, None, Gradients(result, None))
    reference.mix_backward(upstream, rows, None, Gradients(expected, None))
    torch.testing.assert_close(result, expected)
    assert (room[:64] == -77).all()
    assert (room[-64:] == -77).all()


@pytest.mark.parametrize("rules", [("mixup",), ("cutmix",), ("mixup", "cutmix")], ids=str)
@pytest.mark.parametrize("n", [1, 4, 5])
def test_in_place(rules, n):
    plan = draw_plan(n, (8, 8), rules=rules, per="sample", seed=2, step=0).to(DEVICE)
    images = torch.rand((n, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with use_backend("triton", "mix"):
        expected = mix(images, plan)
        assert mix(images, plan, out=images) is images
    assert torch.equal(images, expected)


def test_every_kernel_runs():
    flip = draw_plan(3, (8, 8), per="sample", seed=1, step=0).to(DEVICE)
    other = cases.partner_vector(draw_plan(3, (8, 8), per="sample", seed=1, step=0), (1, 1, 0), 3).to(DEVICE)
    with use_backend("triton", "mix"), _launch.recording() as names:
        for plan in (flip, other):
            images = torch.rand((3, 2, 8, 8), device=DEVICE).requires_grad_()
            mix(images, plan).sum().backward()
    assert names == set(kernels.KERNELS)


def test_every_kernel_is_listed():
    assert {name for name in vars(triton_kernels) if name.endswith("_kernel")} == set(kernels.KERNELS)


def test_rules_with_a_box_are_the_last_ones():
    """What the kernels ask by `rule >= RULE_CUTMIX`."""
    assert [rule for rule in Rule if rule >= Rule.CUTMIX] == [Rule.CUTMIX, Rule.RESIZEMIX]


def test_the_launch_table_has_every_bucket():
    for arch in ("sm_80", "cpu"):
        for kernel in ("pair", "gather", "backward_pair", "backward_gather"):
            forward = not kernel.startswith("backward")
            buckets = [f"{plane}.{bits}bit" for plane in ("planes", "plane") for bits in (8, 16, 32)]
            if not forward:
                buckets = ["plane.16bit", "plane.32bit"]
            for bucket in [*buckets, "small", "narrow"]:
                found = _launch.table(arch)[f"mix.{kernel}.{bucket}"]
                assert set(found) == {"block", "num_warps"} | ({"lines", "columns"} if forward else set())
                assert all(v & (v - 1) == 0 and v > 0 for v in found.values())


def described(shape, dtype=torch.float32, *, pixels=False, crop=False):
    images = kernels._meta_images(dtype, shape[1], shape[2:], pixels, crop)
    return kernels._layout([images, torch.empty_like(images)], images).constants


def test_layouts_are_recognised():
    dense = described((4, 3, 224, 224))
    assert dense == {"C": 3, "PER": 1, "FLAT": True, "WIDE": False, "UNIT": 16, "GROUP": 16}
    assert described((4, 3, 224, 224), pixels=True) == dense | {"PER": 3}
    assert described((4, 3, 224, 224), crop=True) == dense | {"FLAT": False, "UNIT": 4}
    # Rows of 100: four elements short of a vector of eight, so vectors run on into the next row.
    assert described((4, 3, 100, 100)) == dense | {"GROUP": 1}
    assert described((4, 3, 31, 37)) == dense | {"UNIT": 1, "GROUP": 1}
    assert described((4, 1, 50000, 50000))["WIDE"]
    assert described((4, 3, 30000, 30000), pixels=True)["WIDE"]


CHILD = """
import json, sys
import torch
from sdmp_kernels import draw_plan, mix, use_backend
from sdmp_kernels.ops.mix import reference, triton as kernels
from sdmp_kernels.ops.mix.arguments import Gradients, Outputs, PlanRows, Upstream

far = 2**31 + 8


def view(shape, strides):
    # Two gigabytes of address space of which a few pages are ever touched.
    last = sum((n - 1) * s for n, s in zip(shape, strides))
    return torch.empty(last + 1, dtype=torch.uint8).as_strided(shape, strides)


def run(shape, strides, partner):
    plan = draw_plan(shape[0], shape[2:], per="sample", seed=3, partner=partner, step=0)
    images, out = view(shape, strides), view(shape, strides)
    images.copy_(torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(0)))
    with use_backend("triton", "mix"):
        mix(images, plan, out=out)
    with use_backend("reference", "mix"):
        expected = mix(images.contiguous(), plan)
    return (out.int() - expected.int()).abs().max().item() <= 1


def stray(images, **changes):
    plan = draw_plan(4, (8, 8), per="sample", seed=1, step=0)
    rows = PlanRows.of(plan)._replace(mirrored=False, rules=[0, 1, 2, 3], **changes)
    mixed, grads = torch.empty_like(images), torch.empty_like(images)
    kernels.mix(images, None, rows, None, Outputs(mixed, None))
    kernels.mix_backward(Upstream(images, None), rows, None, Gradients(grads, None))
    return bool(mixed.isfinite().all() and grads.isfinite().all())


images = torch.rand(4, 3, 8, 8)
far_rows = torch.tensor([10**12, -5, 4, -(10**12)])
wild = torch.tensor([[-9, -9, 99, 99], [7, 7, 2**31 - 1, 2**31 - 1], [2**31 - 1, 0, 5, 5], [-(2**31), 3, 2**31 - 1, 2]])
answers = {
    "pair": run((2, 3, 4, 4), (far, 16, 4, 1), None),
    "gather": run((2, 3, 4, 4), (far, 16, 4, 1), torch.tensor([1, 1])),
    "channels far apart": run((2, 2, 4, 4), (64, far, 4, 1), None),
    "rows far apart": run((2, 1, 2, 4), (64, 64, far, 1), torch.tensor([1, 1])),
    "partners that are none": stray(images, partner=far_rows),
    "boxes that are none": stray(
        images, rule=torch.tensor([2, 3, 3, 2], dtype=torch.uint8), box=wild.to(torch.int32)
    ),
    "rules that are none": stray(images, rule=torch.tensor([200, 255, 4, 7], dtype=torch.uint8)),
}
print(json.dumps(answers))
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU has a test with real tensors of that size")
def test_far_offsets_and_strays_in_a_process_of_their_own():
    """Offsets past 2^31, and indices that no check has seen: an error here is a crash, so in a child process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=Path(__file__).parents[2],
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert all(answers.values()), answers


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
class TestOnAGpu:
    def test_images_past_two_gigabytes(self):
        rows = 2**31 // (3 * 224 * 224) + 2
        images = torch.zeros((rows, 3, 224, 224), dtype=torch.uint8, device="cuda")
        images[0], images[-1] = 7, 9
        plan = draw_plan(rows, (224, 224), rules=("cutmix",), seed=1, device="cuda", step=0)
        with use_backend("triton", "mix"):
            mixed = mix(images, plan)
        few = MixPlan(
            plan.rule[:: rows - 1].cpu(), torch.tensor([1, 0]), plan.lam[:: rows - 1].cpu(),
            plan.lam[:: rows - 1].flip(0).cpu(), plan.box[:: rows - 1].cpu(), plan.size, True, plan.rules,
        )  # fmt: skip
        with use_backend("reference", "mix"):
            expected = mix(images[:: rows - 1].cpu(), few)
        assert torch.equal(mixed[:: rows - 1].cpu(), expected)

    def test_captured_in_a_graph_and_replayed_with_another_plan(self):
        images = torch.rand((8, 5, 64, 64), device="cuda", dtype=torch.bfloat16)
        options = {"mean": cases.MEAN, "std": cases.STD, "clean": True}
        plan = draw_plan(8, (64, 64), per="sample", seed=1, device="cuda", step=0)
        with use_backend("triton", "mix"):
            mix(images, plan, **options)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                _, mixed = mix(images, plan, **options)
            plan.copy_(draw_plan(8, (64, 64), per="sample", seed=2, device="cuda", step=0))
            graph.replay()
            assert torch.equal(mixed, mix(images, plan, **options)[1])

    def test_the_same_bits_fifty_times(self):
        images = torch.rand((33, 3, 96, 96), device="cuda").requires_grad_()
        plan = draw_plan(33, (96, 96), per="sample", seed=1, device="cuda", step=0)
        with use_backend("triton", "mix"):
            first = torch.autograd.grad(mix(images, plan).square().sum(), images)[0]
            for _ in range(50):
                assert torch.equal(torch.autograd.grad(mix(images, plan).square().sum(), images)[0], first)

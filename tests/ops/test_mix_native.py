"""The compiled kernels of `mix`, and the composition of PyTorch's operators, against the reference.

The CUDA kernels run here too: compiled as C++, thread by thread, on the CPU.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native_trials
import pytest
import torch
from native_trials import FLOATS, SEEDS, Trial, lay_out, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdmp_kernels import Rule, _backends, draw_plan, mix, use_backend
from sdmp_kernels.ops.mix import cases, composed, native, reference
from sdmp_kernels.ops.mix.arguments import Erasure, Gradients, Norm, Outputs, PlanRows, Upstream

ROOT = Path(__file__).resolve().parents[2]
MISSING = _backends.unavailable("cpp", "cpu")
needs_cpp = pytest.mark.skipif(MISSING is not None, reason=f"cpp: {MISSING}")
BACKENDS = [pytest.param(native, id="cpp", marks=needs_cpp), pytest.param(composed, id="torch")]
# On a CPU the composition reads the plan; what it does on a GPU instead runs on a CPU too.
FORWARD = [
    pytest.param(native.mix, id="cpp", marks=needs_cpp),
    pytest.param(composed.mix, id="torch"),
    pytest.param(composed._mix_masked, id="torch-masked"),
]
# How far a result may be from the exact one, in units of its last place at the magnitude of the largest term, on top
# of twice the reference's own error at that precision.
ULP = {torch.uint8: 1.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether all elements are equal or both NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def truth_of(trial: Trial) -> list[Tensor]:
    """The results computed in float64, not rounded to the result's dtype (but for uint8)."""
    wide = trial.dtype if trial.dtype == torch.uint8 else torch.float64
    partners = None if trial.partners is None else trial.partners.double()
    pixels = reference.mix_pixels(trial.images.double(), partners, trial.plan)
    return [
        reference.store(reference.normalise(values, trial.images.dtype, trial.norm), wide)
        for values in [pixels, trial.images.double()][: 2 if trial.clean else 1]
    ]


def check_close(result: Tensor, expected: Tensor, truth: Tensor, largest: float) -> None:
    """The rule of the op matrix: at most twice the reference's own error, and one unit in the last place."""
    assert torch.equal(result.isnan(), truth.isnan())
    kept = ~truth.isnan()
    error = (result.double() - truth.double()).abs()[kept].max().item() if kept.any() else 0.0
    own = (expected.double() - truth.double()).abs()[kept].max().item() if kept.any() else 0.0
    ulp = ULP[result.dtype] * (1.0 if result.dtype == torch.uint8 else max(largest, 1.0))
    assert error <= 2 * own + ulp, f"error {error:g}, the reference's {own:g}, one unit {ulp:g}"


@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("part", range(8))
def test_forward_agrees_with_the_reference(forward: Callable[..., None], part: int) -> None:
    for seed in SEEDS[part::8]:
        trial = make(seed)
        before = trial.images.clone()
        expected = trial.forward(reference.mix, *trial.outputs())
        results = trial.forward(forward, *trial.outputs())
        assert equal(trial.images, before), seed
        for result, wanted, exact in zip(results, expected, truth_of(trial), strict=True):
            if trial.exact:
                # The composition's sum of two products may be rounded once less.
                same = slice(None) if forward is native.mix else trial.plan.rule != Rule.MIXUP
                assert equal(result[same], wanted[same]), seed
            largest = 255.0 if trial.norm is None else (1 + max(trial.norm.mean)) / min(trial.norm.std)
            check_close(result, wanted, exact, largest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", range(8))
def test_backward_agrees_with_the_reference(backend: Any, part: int) -> None:
    for seed in SEEDS[part::8]:
        trial = make(seed)
        expected = trial.backward(reference.mix_backward, *trial.gradients())
        results = trial.backward(backend.mix_backward, *trial.gradients())
        wide = [t if t is None else t.double() for t in trial.gradients()]
        truth = trial.backward(reference.mix_backward, *wide)
        largest = max(t.abs().max().item() for t in (trial.grad_mixed, trial.grad_clean) if t is not None)
        for result, wanted, exact in zip(results, expected, truth, strict=True):
            check_close(result, wanted, exact, largest / min(trial.norm.std if trial.norm else [1]))


@needs_cpp
def test_in_place_gives_what_out_of_place_gives() -> None:
    ran = 0
    for seed in SEEDS:
        trial = make(seed)
        suits = trial.dtype == trial.images.dtype and trial.partners is None and trial.plan.mirrored
        if not suits or (trial.plan.rule == Rule.RESIZEMIX).any():
            continue
        ran += 1
        expected = trial.forward(native.mix, *trial.outputs())
        trial.images = trial.images.clone() if seed % 3 else lay_out(trial.images, "stepped")
        results = trial.forward(native.mix, trial.images, trial.outputs()[1])
        assert all(map(equal, results, expected)), seed
    assert ran >= 10


@pytest.mark.parametrize("forward", FORWARD[1:])
def test_the_composition_works_in_place(forward: Callable[..., None]) -> None:
    """For every plan, whatever a row still needs of the images that are overwritten."""
    ran = 0
    for seed in SEEDS:
        trial = make(seed)
        if trial.dtype != trial.images.dtype:
            continue
        ran += 1
        expected = trial.forward(forward, *trial.outputs())
        trial.images = trial.images.clone() if seed % 3 else lay_out(trial.images, "stepped")
        results = trial.forward(forward, trial.images, trial.outputs()[1])
        assert all(map(equal, results, expected)), seed
    assert ran >= 40


def masked(*args: Any) -> None:
    """What the composition does on a GPU."""
    composed._mix_masked(*args[:5])
    composed._erase_masked(args[4].mixed, args[5])


@pytest.mark.parametrize("forward", [reference.mix, *FORWARD[:2], pytest.param(masked, id="torch-masked")])
@pytest.mark.parametrize("part", range(4))
def test_erasing_fills_boxes_and_changes_nothing_else(forward: Callable[..., None], part: int) -> None:
    """Bit for bit, in place too: the rest is what comes out without it, and so are the clean images."""
    plainly = composed._mix_masked if forward is masked else forward
    for seed in SEEDS[part::4]:
        trial = make(seed)
        erasure = native_trials.erasure(trial, seed)
        plain = trial.forward(plainly, *trial.outputs())
        wanted = [cases.filled(plain[0], erasure), *plain[1:]]
        assert all(map(equal, trial.forward(forward, *trial.outputs(), erasure), wanted)), seed
        suits = trial.dtype == trial.images.dtype and trial.partners is None and trial.plan.mirrored
        if suits and forward is not reference.mix and not (trial.plan.rule == Rule.RESIZEMIX).any():
            trial.images = trial.images.clone() if seed % 3 else lay_out(trial.images, "stepped")
            assert all(map(equal, trial.forward(forward, trial.images, trial.outputs()[1], erasure), wanted)), seed


class Written(TorchDispatchMode):
    """Counts the elements that operators write, new tensors included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        if isinstance(result, Tensor) and (alias is None or alias.is_write):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize(
    ("rule", "whole", "boxes"), [("keep", 1, 0), ("cutmix", 1, 1), ("resizemix", 1, 2), ("mixup", 4, 0)]
)
def test_the_composition_writes_no_more_than_a_rule_takes(rule: str, whole: int, boxes: int) -> None:
    """What one would write by hand, in images and boxes: of a blend, the partners, two products and their sum."""
    images = torch.rand(8, 3, 64, 64)
    outputs = Outputs(torch.empty_like(images), None)
    plan = draw_plan(8, (64, 64), rules=(rule,), per="sample", step=0)
    boxed = 3 * int((plan.box[:, 2] * plan.box[:, 3]).sum())
    with Written() as written:
        composed.mix(images, None, PlanRows.of(plan), None, outputs)
    assert written.elements <= whole * images.numel() + boxes * boxed + 100


@needs_cpp
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_results_larger_than_the_cache(dtype: torch.dtype, layout: str, offset: int) -> None:
    """These are written past the cache, whole lines at a time; an offset puts their ends within a line."""
    n, c, h, w = 6, 3, 480, 490 if dtype == torch.float32 else 970
    n *= 4 // torch.empty((), dtype=dtype).element_size()
    images = lay_out((torch.rand(n, c, h, w) * 255).to(dtype), layout)
    ring = torch.full((images.numel() + offset + 64,), 3, dtype=dtype)
    mixed = ring.as_strided(images.shape, images.stride(), offset)
    plan = draw_plan(n, (h, w), per="sample", seed=1, step=0)
    args = (plan.rule, plan.partner, plan.lam, plan.box)
    torch.ops.sdmp.mix_cpu(images, None, *args, True, None, None, mixed, None)
    assert bool((ring[:offset] == 3).all())
    assert bool((ring[offset + images.numel() :] == 3).all())
    for row in range(n // 2):  # one pair alone is small enough for the cache
        pair = torch.tensor([row, n - 1 - row])
        some = [tensor[pair] for tensor in args]
        expected = torch.empty_like(images[pair])
        torch.ops.sdmp.mix_cpu(images[pair], None, *some, True, None, None, expected, None)
        assert torch.equal(mixed[pair], expected)


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("source", "result"), [(torch.uint8, torch.float32), (torch.float32, torch.float32)])
def test_erasing_in_results_larger_than_the_cache(source: torch.dtype, result: torch.dtype, layout: str) -> None:
    images = lay_out((torch.rand(6, 3, 480, 490) * 255).to(source), layout)
    plan = draw_plan(6, (480, 490), per="sample", seed=1, step=0)
    boxes = torch.tensor([[[7, 300, 400, 101], [100, 0, 33, 490]], [[0, 0, 480, 490], [1, 1, 1, 1]]]).repeat(3, 1, 1)
    areas = boxes[..., 2] * boxes[..., 3]
    first = (areas.flatten().cumsum(0) - areas.flatten()).view(6, 2, 1)
    fill = torch.randn(int(areas.sum()), 3)
    erasure = Erasure(torch.cat([boxes, first], 2).int(), fill, per_pixel=True)
    norm = {} if source == result else {"mean": [0.5] * 3, "std": [0.25] * 3}
    with use_backend("cpp"):
        plain, erased = mix(images, plan, **norm), mix(images, plan, **norm, erase=erasure)
    assert isinstance(plain, Tensor) and isinstance(erased, Tensor)
    assert torch.equal(erased, cases.filled(plain, erasure))


@needs_cpp
@pytest.mark.parametrize("dtype", FLOATS)
def test_copied_pixels_keep_the_bits_of_a_nan(dtype: torch.dtype) -> None:
    words = torch.int32 if dtype == torch.float32 else torch.int16
    special = {torch.float16: 0x7D01, torch.bfloat16: 0x7F81}.get(dtype, 0x7F800001)  # signalling
    images = torch.rand(2, 1, 4, 16).to(dtype)
    images.view(words)[:, :, 1] = special
    plan = draw_plan(2, (4, 16), rules=["keep"], step=0)
    with use_backend("cpp"):
        assert torch.equal(mix(images, plan).view(words), images.view(words))


@needs_cpp
def test_every_half_and_bfloat16_reads_and_writes_as_in_torch() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, 1, 256, 256)
    plan = draw_plan(1, (256, 256), rules=["keep"], step=0)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        with use_backend("cpp"):
            wide = mix(values, plan, dtype=torch.float32)
            assert equal(wide, values.float())
            assert equal(mix(wide, plan, dtype=dtype), values)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_rounding_is_to_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    """Random bit patterns, the neighbours of every tie, and the ends of the range."""
    bits = torch.randint(-(2**31), 2**31, (64 * 1024,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    ties = torch.arange(0, 2**31 - 2**16, 2**15 - 1, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(-600, 600) / 2
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), -ties.view(torch.float32), halves])
    near = torch.cat([values, values.nextafter(torch.tensor(1e38)), values.nextafter(torch.tensor(-1e38))])
    near = near[: near.numel() // 16 * 16].view(1, 1, 16, -1)
    with use_backend("cpp"):
        result = mix(near, draw_plan(1, tuple(near.shape[2:]), rules=["keep"], step=0), dtype=dtype)
    expected = reference.store(near, dtype)
    assert equal(result, expected)


@needs_cpp
def test_threads_do_not_change_the_result() -> None:
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            trial = make(10)
            found.add(native_trials.digest(trial.forward(native.mix, *trial.outputs())))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@needs_cpp
def test_wrong_rows_are_refused_before_anything_is_written() -> None:
    images, out = torch.rand(2, 1, 4, 4), torch.full((2, 1, 4, 4), 7.0)
    rule, lam, box = torch.ones(2, dtype=torch.uint8), torch.full((2,), 0.5), torch.zeros(2, 4, dtype=torch.int32)

    def call(**changed: Any) -> None:
        given = {"rule": rule, "partner": torch.tensor([1, 0]), "lam": lam, "box": box} | changed
        torch.ops.sdmp.mix_cpu(images, None, *given.values(), False, None, None, out, None)

    for wrong, message in (
        ({"partner": torch.tensor([0, 2])}, "partner of row 1 is 2, but there are 2 rows"),
        ({"partner": torch.tensor([-1, 0])}, "partner of row 0 is -1"),
        ({"rule": torch.tensor([1, 4], dtype=torch.uint8)}, "rule of row 1 is 4"),
        ({"lam": torch.full((3,), 0.5)}, "lam must be contiguous"),
        ({"box": torch.zeros(2, 4)}, "box must be contiguous, of the plan's dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)
    assert bool((out == 7).all())

    def erase(box: list[int], fill: Tensor, per_pixel: bool = True) -> None:
        boxes = torch.tensor([[[0, 0, 0, 0, 0]], [box]], dtype=torch.int32)
        args = (rule, torch.tensor([1, 0]), lam, torch.zeros_like(rule[:, None].int().expand(2, 4)).contiguous())
        torch.ops.sdmp.mix_cpu(images, None, *args, True, None, None, out, None, boxes, fill, per_pixel)

    for wrong_box, rows, message in (
        ([2, 0, 3, 1, 0], 9, "box 0 of row 1 does not lie within the image"),
        ([0, -1, 1, 1, 0], 9, "box 0 of row 1 does not lie within the image"),
        ([0, 0, 3, 3, 1], 9, "box 0 of row 1 needs 10 rows of fill, which has 9"),
        ([0, 0, 3, 3, -1], 9, "box 0 of row 1 needs 8 rows of fill"),
    ):
        with pytest.raises(RuntimeError, match=message):
            erase(wrong_box, torch.zeros(rows, 1))
    with pytest.raises(RuntimeError, match=r"fill must be contiguous float32 of shape \(F, 1\)"):
        erase([0, 0, 1, 1, 0], torch.zeros(9, 2))
    assert bool((out == 7).all())
    with pytest.raises(RuntimeError, match="in place works for"):
        torch.ops.sdmp.mix_cpu(images, None, rule + 2, torch.tensor([1, 0]), lam, box, True, None, None, images, None)


def test_rows_that_took_a_partner_are_listed_in_order() -> None:
    order, starts = native.takers(torch.tensor([2, 0, 2, 1, 2]), 4)
    rows = [order[starts[j] : starts[j + 1]].tolist() for j in range(4)]
    assert rows == [[1], [3], [0, 2, 4], []]


def compiled(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    """The functions of setup.py, where there is a compiler for them."""
    made = runpy.run_path(str(ROOT / "setup.py"))
    try:
        made["cpp_compiler"]()
    except made["Unbuilt"] as reason:
        pytest.skip(str(reason))
    return made


@needs_cpp
@pytest.mark.parametrize(
    "sets", [pytest.param(["portable"], marks=pytest.mark.slow), ["portable", "avx2"]], ids="+".join
)
def test_kernels_for_lesser_processors_compute_the_same(build: dict[str, Any], sets: list[str], tmp_path: Path) -> None:
    """Bit for bit what the library as installed computes here, which takes the best instruction set there is."""
    library = tmp_path / "lesser.so"
    build["build_cpu"](library, tmp_path, sets, "mix_*.cpp")
    done = subprocess.run(
        [sys.executable, native_trials.__file__, str(library)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == native_trials.digests()


@needs_cpp
def test_cuda_kernels_compute_what_the_cpu_kernels_compute(build: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, by the vector kernels and by the scalar ones."""
    library = tmp_path / "emulated.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", *build["WARNINGS"], "-Werror", *build["EXACT"], "-DSDMP_ISA=gpu"]
    libraries = ["-L", str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu"]
    source = ROOT / "tests" / "mix_cuda_on_cpu.cpp"
    include = ["-I", str(ROOT / "csrc"), *build["flags_of"](torch)]
    compiled([build["cpp_compiler"](), *flags, *include, str(source), *libraries, "-o", str(library)])
    torch.ops.load_library(str(library))
    ran: dict[tuple[str, int], int] = {}

    def forward(images: Tensor, partners: Tensor | None, plan: PlanRows, norm: Norm | None, outputs: Outputs) -> None:
        kernel = torch.ops.sdmp.mix_emulated(images, partners, *plan[:5], *(norm or (None, None)), *outputs)
        ran["forward", kernel] = ran.get(("forward", kernel), 0) + 1

    def backward(upstream: Upstream, plan: PlanRows, std: list[float] | None, gradients: Gradients) -> None:
        rows = len(gradients.images if gradients.partners is None else gradients.partners)
        order, starts = (None, None) if plan.mirrored else native.takers(plan.partner, rows)
        kernel = torch.ops.sdmp.mix_backward_emulated(*upstream, *plan[:5], order, starts, std, *gradients)
        ran["backward", kernel] = ran.get(("backward", kernel), 0) + 1

    for seed in SEEDS:
        trial = make(seed)
        results = trial.forward(forward, *trial.outputs())
        assert all(map(equal, results, trial.forward(native.mix, *trial.outputs()))), seed
        results = trial.backward(backward, *trial.gradients())
        assert all(map(equal, results, trial.backward(native.mix_backward, *trial.gradients()))), seed
    assert len(ran) == 4
    assert min(ran.values()) >= 20, ran

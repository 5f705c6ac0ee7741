"""Times several ways ("arms") of doing one thing, side by side in one process, after checking each one's answer.

Arms are interleaved: every round runs each arm once, in shuffled order, so that a noisy or throttled moment hits all
of them, and ratios are medians of the rounds' own ratios. An arm whose answer is wrong gets no time. On a GPU, small
working sets are rotated through copies larger than the L2 cache, and a graph replay shows the time without the host.
"""

from __future__ import annotations

import gc
import importlib
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.clock import Clock, DeviceClock, Timing, clock_of, lead
from bench.memory import extra_peak
from sdmp_kernels import _backends, use_backend

Inputs = dict[str, Any]
OURS = ("bench", "sdmp_kernels", "sdmp_train")
# Exit code of a command of which a part could not run here for want of something: neither passed nor failed.
EXIT_ABSENT = 3


class OutOfTime(Exception):
    """The time that was given for measuring is over."""


class Absent(Exception):
    """What an arm needs is not on this machine; the message says what, and how to get it."""


@dataclass(frozen=True)
class Call:
    """An arm bound to one set of inputs.

    Attributes:
        run: what is timed; returns the results, as tensors.
        reset: runs untimed before each timed run: restores inputs that `run` overwrites.
        count: how many calls of the op one `run` makes (a fraction for a ceiling scaled to equal work).
    """

    run: Callable[[], Sequence[Tensor]]
    reset: Callable[[], object] | None = None
    count: float = 1


@dataclass(frozen=True)
class Arm:
    """One way of doing what a setting asks.

    Attributes:
        name: short, unique within the setting.
        what: whose code it is, its version and compile mode, and where it computes something else.
        kind: "ours", "eager", "compile", "peer", or "ceiling" (a copy or matrix product that bounds the others).
        bind: makes the timed call for given inputs; raises `Absent` where it cannot run here.
        check: (inputs, results) -> largest error against the arm's own law, where it does not compute what the
            setting asks (another pairing, another draw); default: compare with the setting's truth.
        tolerance: absolute error allowed where the arm is known to round more coarsely; default: that of `judge`.
        graph: replay it from a CUDA graph.
    """

    name: str
    what: str
    kind: str
    bind: Callable[[Inputs], Call]
    check: Callable[[Inputs, Sequence[Tensor]], float] | None = None
    tolerance: float | None = None
    graph: bool = False


class Model(NamedTuple):
    """What one call of an op moves and computes, as its `cases.py` counts it: nothing here counts by itself.

    Attributes:
        floor_bytes: every source read once and every result written once. Rates, and shares of a copy's bandwidth,
            refer to these bytes.
        kernel_bytes: what our GPU kernels move today; floor_bytes / kernel_bytes is the largest share they can reach.
        flops: multiplications, additions and the like.
    """

    floor_bytes: int
    kernel_bytes: int
    flops: int


def model_of(op: str, **arguments: Any) -> Model:
    """The model of a call with these arguments of the op's public function; tensors may be on the meta device.

    A gradient counts where a tensor requires it.
    """
    cases = importlib.import_module(f"sdmp_kernels.ops.{op}.cases")
    return Model(cases.floor_bytes(**arguments), cases.kernel_bytes(**arguments), cases.flops(**arguments))


def short(dtype: torch.dtype) -> str:
    """ "float32"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Setting:
    """What is asked: one op at one size, dtype, layout and rule, and the arms that answer.

    Attributes:
        op: name of the op, or "step", "loader".
        name: unique; says op, dtype and size in words.
        config: the same as values.
        inputs: makes the inputs on the device; equal numbers make equal inputs.
        truth: the results in float64.
        plain: the results of plain PyTorch at the setting's dtype: the yardstick of rounding errors.
        outputs: names of the results.
        dtype: of the arithmetic's result, whose rounding is allowed for.
        arms: the first one of kind "ours" that runs is what ratios refer to.
        model: what a call must move and compute, or None where nobody counted.
        paced: whether what the host does belongs to the time, as in a whole training step. Otherwise a GPU is timed
            with the calls waiting in its queue (bench/clock.py), and what the host takes is a number of its own.
        predict: of one call of each arm, what it should take, for the results file (`predict.beside`).
    """

    op: str
    name: str
    config: dict[str, Any]
    inputs: Callable[[int], Inputs]
    truth: Callable[[Inputs], Sequence[Tensor]]
    plain: Callable[[Inputs], Sequence[Tensor]]
    outputs: tuple[str, ...]
    dtype: torch.dtype
    arms: Sequence[Arm]
    model: Model | None = None
    paced: bool = False
    predict: Callable[[Sequence[Callable[[], Any]]], list[dict[str, Any]]] | None = None


@dataclass(frozen=True)
class Budget:
    """How long to measure one setting: rounds until `seconds` have passed, but at least and at most so many.

    No arm is begun after `deadline` (of `time.monotonic`): a setting of which some arm was not yet timed three times is
    given up then.
    """

    seconds: float = 6.0
    min_rounds: int = 5
    max_rounds: int = 200
    warmup_seconds: float = 0.1
    deadline: float = math.inf

    @property
    def over(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline


@dataclass
class Runner:
    """An arm that was bound, checked and warmed up, and its times so far (seconds per call of the op, by round).

    Attributes:
        inner: how many runs one timing spans.
        paced: see `Setting`.
        host_seconds: what the host takes to ask a GPU for one call of the op.
        queued: whether every timing so far held no host time.
        spent: seconds that its timings took on the host's clock.
        failure: what broke while it was timed or weighed; it then has no times.
    """

    arm: Arm
    calls: list[Call]
    errors: list[dict[str, Any]]
    inner: int = 1
    paced: bool = False
    host_seconds: float = 0.0
    queued: bool = True
    spent: float = 0.0
    times: list[float] = field(default_factory=list)
    failure: str | None = None


def silent(_: str) -> None:
    """Tell nobody what is being done."""


def measure(
    setting: Setting,
    device: torch.device,
    budget: Budget,
    say: Callable[[str], object],
    doing: Callable[[str], object] = silent,
) -> dict[str, Any]:
    """One row of the results: every arm of the setting, checked, timed and weighed. See docs/benchmarks.md.

    Args:
        setting, device, budget: what, where and for how long.
        say: told which arms have no time, and why.
        doing: told what is done next, for who waits.

    Raises:
        OutOfTime: the budget's deadline passed before every arm had its times.
    """
    doing("    inputs, and the truth in float64")
    inputs = [setting.inputs(copy) for copy in range(copies_needed(setting, device))]
    truth = [t.detach() for t in setting.truth(inputs[0])]
    plain = _plain(setting, inputs[0])
    runners, told = [], {}
    for number, arm in enumerate(setting.arms, 1):
        if budget.over:
            raise OutOfTime
        doing(f"    {arm.name}: checked and warmed up ({number} of {len(setting.arms)})")
        runner, entry = prepare(arm, setting, inputs, truth, plain, device, budget)
        told[arm.name] = entry
        if runner is not None:
            runners.append(runner)
        else:
            say(f"    {arm.name}: {entry['status']} ({entry['reason']})")
    del truth, plain
    if setting.predict is not None:
        # What a compiler fuses is not seen operator by operator.
        written = [runner for runner in runners if runner.arm.kind != "compile"]
        for runner, predicted in zip(written, setting.predict([r.calls[0].run for r in written]), strict=True):
            told[runner.arm.name]["predicted"] = predicted
    doing(f"    {len(runners)} arms in turn, {budget.seconds:g} s and at least {budget.min_rounds} rounds")
    time_rounds(runners, clock_of(device.type), budget)
    runners = [runner for runner in runners if not _broke(runner, told, say)]
    weighed = {runner.arm.name: weigh(runner, runners, setting, device) for runner in runners}
    for runner in runners:
        if not _broke(runner, told, say):
            told[runner.arm.name].update(weighed[runner.arm.name])
    runners = [runner for runner in runners if runner.failure is None]
    return row_of(setting, device, len(inputs), runners, list(told.values()))


def row_of(
    setting: Setting, device: torch.device, input_copies: int, runners: Sequence[Runner], arms: list[dict[str, Any]]
) -> dict[str, Any]:
    """A row of the results; `runners`: the arms that have a time."""
    return {
        "op": setting.op,
        "setting": setting.name,
        "config": setting.config,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "input_copies": input_copies,
        "floor_bytes": setting.model.floor_bytes if setting.model else None,
        "kernel_bytes": setting.model.kernel_bytes if setting.model else None,
        "flops": setting.model.flops if setting.model else None,
        "ours": next((r.arm.name for r in runners if r.arm.kind == "ours"), None),
        "arms": arms,
    }


def _broke(runner: Runner, told: dict[str, dict[str, Any]], say: Callable[[str], object]) -> bool:
    """Whether the runner broke; if so its entry says how."""
    if runner.failure is None:
        return False
    told[runner.arm.name].update(status="failed", reason=runner.failure)
    say(f"    {runner.arm.name}: failed ({runner.failure})")
    return True


def copies_needed(setting: Setting, device: torch.device) -> int:
    """How many input sets to rotate through, so that none is found in the GPU's L2 cache from the call before."""
    if device.type != "cuda" or setting.model is None:
        return 1
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, math.ceil(3 * l2_bytes / max(1, setting.model.floor_bytes))))


def _plain(setting: Setting, inputs: Inputs) -> list[Tensor] | None:
    try:
        return [t.detach() for t in setting.plain(inputs)]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def prepare(
    arm: Arm,
    setting: Setting,
    inputs: list[Inputs],
    truth: list[Tensor],
    plain: list[Tensor] | None,
    device: torch.device,
    budget: Budget,
) -> tuple[Runner | None, dict[str, Any]]:
    """Bind, check and warm up an arm: (runner, its entry), or (None, entry that says why it has no time)."""
    entry: dict[str, Any] = {"name": arm.name, "kind": arm.kind, "what": arm.what, "graph": arm.graph}
    try:
        calls = [arm.bind(one) for one in inputs]
        if calls[0].reset:
            calls[0].reset()
        results = [t.detach() for t in calls[0].run()]
        errors = judge(arm, setting, inputs[0], results, truth, plain)
        del results
        entry["errors"] = errors
        wrong = [e for e in errors if not e["vs_float64"] <= e["allowed"]]
        if wrong:
            worst = wrong[0]
            reason = f"{worst['output']} is off by {worst['vs_float64']:.3g}, allowed {worst['allowed']:.3g}"
            return None, entry | {"status": "wrong", "reason": reason}
        if arm.graph:
            calls = [capture(calls)]
        runner = Runner(arm, calls, errors, paced=setting.paced)
        warm_up(runner, clock_of(device.type), budget)
    except Exception as error:
        # Peers are other people's code on machines we have not seen: one that breaks is named, and the rest go on.
        why = absence(error)
        if why is not None:
            return None, entry | {"status": "absent", "reason": why}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None, entry | {"status": "failed", "reason": words(error)}
    return runner, entry | {"status": "ok"}


def absence(error: BaseException | None) -> str | None:
    """What is not on this machine, where that is what this error comes from; None where something is broken.

    A module of this project that cannot be found is broken, not absent.
    """
    while error is not None:
        if isinstance(error, Absent):
            return str(error)
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            package = error.name.partition(".")[0]
            if package not in OURS:
                return f"{package} is not installed"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def words(error: Exception) -> str:
    """An exception in one line."""
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line[:200]}"


def judge(
    arm: Arm,
    setting: Setting,
    inputs: Inputs,
    results: Sequence[Tensor],
    truth: Sequence[Tensor],
    plain: Sequence[Tensor] | None,
) -> list[dict[str, Any]]:
    """Per result: its error against float64 and against plain PyTorch at the same dtype, and what is allowed.

    Ours may err by twice plain PyTorch's own error plus one ulp of the largest value; others by ten times as much,
    so that a coarser method is shown with its error and only a wrong one is refused.
    """
    if arm.kind == "ceiling":
        return []
    if arm.check is not None:
        allowed = 16 * torch.finfo(setting.dtype).eps if arm.tolerance is None else arm.tolerance
        law = arm.check(inputs, results)
        return [{"output": "its own law", "vs_float64": law, "vs_plain": None, "allowed": allowed}]
    if len(results) != len(truth):
        raise ValueError(f"{arm.name} returned {len(results)} results where {len(truth)} were expected")
    errors = []
    for number, (result, exact) in enumerate(zip(results, truth, strict=True)):
        own = largest_error(plain[number], exact) if plain is not None else 0.0
        ulp = torch.finfo(setting.dtype).eps * float(exact.abs().max())
        allowed = (2 * own + ulp) * (1 if arm.kind == "ours" else 10)
        errors.append(
            {
                "output": setting.outputs[number],
                "vs_float64": largest_error(result, exact),
                "vs_plain": largest_error(result, plain[number]) if plain is not None else None,
                "allowed": max(allowed, arm.tolerance or 0.0),
                "plain_vs_float64": own if plain is not None else None,
            }
        )
    return errors


def largest_error(result: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, in float64, piece by piece; infinite where `result` is not finite."""
    if result.shape != exact.shape:
        raise ValueError(f"a result has shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
    result, exact = result.detach(), exact.detach()
    if result.ndim == 0:
        result, exact = result[None], exact[None]
    worst = 0.0
    rows = max(1, 2**24 // max(1, result[0].numel())) if len(result) else 1
    for part, wanted in zip(result.split(rows), exact.split(rows), strict=True):
        worst = max(worst, float((part.double() - wanted.double()).abs().nan_to_num(nan=float("inf")).max()))
    return worst


def capture(calls: list[Call]) -> Call:
    """All calls in one CUDA graph, replayed as one: the inputs rotate inside it."""
    if not torch.cuda.is_available():
        raise Absent("CUDA graphs need a CUDA device")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call.run()
    torch.cuda.current_stream().wait_stream(side)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept += [call.run() for call in calls]

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return kept[0]

    return Call(replay, count=len(calls))


def warm_up(runner: Runner, clock: Clock, budget: Budget) -> None:
    """Run until the clock says so; on a GPU, also choose how many calls one timing spans, to hide the timer's own cost.

    One timing takes at least a millisecond there, and visits every copy of the inputs equally often.
    """
    started = time.perf_counter()
    while time.perf_counter() - started < budget.warmup_seconds:
        for call in runner.calls:
            if call.reset:
                call.reset()
            call.run()
        clock.wait()
    if isinstance(clock, DeviceClock):
        runner.inner = len(runner.calls)
        runner.host_seconds = statistics.median(_host_seconds(runner, clock) for _ in range(3))
        seconds = once(runner, clock).seconds * runner.inner * runner.calls[0].count
        runner.inner *= max(1, min(1000, math.ceil(1e-3 / max(seconds, 1e-7))))


def _host_seconds(runner: Runner, clock: DeviceClock) -> float:
    """What the host takes to ask for one call of the op."""
    for call in runner.calls:
        if call.reset:
            call.reset()
    runs = [call.run for call in runner.calls]
    return clock.host_seconds(runs) / (len(runs) * runner.calls[0].count)


def once(runner: Runner, clock: Clock) -> Timing:
    """Seconds per call of the op, over one timing of `inner` runs."""
    for call in runner.calls:
        if call.reset:
            call.reset()
    runs = [runner.calls[i % len(runner.calls)].run for i in range(runner.inner)]
    calls = runner.inner * runner.calls[0].count
    timing = clock.time(runs, 0.0 if runner.paced else lead(runner.host_seconds * calls))
    return Timing(timing.seconds / calls, timing.queued)


def time_rounds(runners: list[Runner], clock: Clock, budget: Budget) -> None:
    """Every round runs each arm once, in shuffled order. Arms that would eat the time stop after three rounds.

    Raises:
        OutOfTime: the deadline passed before three rounds (or all that were wanted, if fewer) were done.
    """
    enough = min(3, budget.min_rounds)
    order, shuffle = list(runners), random.Random(0)
    share = 2 * budget.seconds / max(1, len(runners))
    started = time.perf_counter()
    for round_ in range(budget.max_rounds):
        elapsed = time.perf_counter() - started
        if round_ >= budget.min_rounds and elapsed > budget.seconds:
            return
        if round_ >= enough and budget.over:
            return
        shuffle.shuffle(order)
        for runner in order:
            if round_ < enough and budget.over:
                raise OutOfTime
            if runner.failure is not None or (round_ >= 3 and runner.spent > share):
                continue
            begun = time.perf_counter()
            try:
                timing = once(runner, clock)
                runner.times.append(timing.seconds)
                runner.queued = runner.queued and timing.queued
                runner.spent += time.perf_counter() - begun
            except Exception as error:
                # As in `prepare`: one that breaks is named, and the rest go on.
                runner.failure = words(error)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 20th and 80th percentiles, by linear interpolation."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8)}


def paired(of: Runner, to: Runner) -> dict[str, float]:
    """Percentiles of the rounds' own ratios of two arms' times. Slow arms ran in the first rounds only."""
    rounds = min(len(of.times), len(to.times))
    return percentiles([a / b for a, b in zip(of.times[:rounds], to.times[:rounds], strict=True)])


def rates(runner: Runner, runners: Sequence[Runner], setting: Setting, device: torch.device) -> dict[str, Any]:
    """What a runner's times mean: rates, shares of the ceilings, ratio to ours."""
    seconds = percentiles(runner.times)
    entry: dict[str, Any] = {"seconds": seconds | {"rounds": len(runner.times), "calls_per_round": runner.inner}}
    if device.type == "cuda":
        entry |= {"host_us": 1e6 * runner.host_seconds, "queued": runner.queued}
    if "images" in setting.config:
        entry["images_per_s"] = setting.config["images"] / seconds["p50"]
    if setting.model is not None:
        entry["gb_per_s"] = setting.model.floor_bytes / seconds["p50"] / 1e9
        entry["tflops"] = setting.model.flops / seconds["p50"] / 1e12
    for ceiling, field_name in (("copy", "share_of_copy"), ("matmul", "share_of_matmul")):
        alike = [r for r in runners if r.arm.kind == "ceiling" and r.arm.name.startswith(ceiling)]
        # A replay is held to a replayed ceiling, as both are without the host's time.
        bound = next((r for r in alike if r.arm.graph == runner.arm.graph), None)
        if bound is not None:
            entry[field_name] = paired(bound, runner)
    ours = next((r for r in runners if r.arm.kind == "ours" and r.arm.graph == runner.arm.graph), None)
    if ours is not None and runner.arm.kind != "ceiling":
        entry["times_ours"] = paired(runner, ours)
    return entry


def weigh(runner: Runner, runners: Sequence[Runner], setting: Setting, device: torch.device) -> dict[str, Any]:
    """`rates`, and the memory, launches and host synchronisations of a call."""
    entry = rates(runner, runners, setting, device)
    if runner.arm.kind == "ceiling" or runner.arm.graph:
        return entry
    call = runner.calls[0]
    try:
        if call.reset:
            call.reset()
        entry["extra_peak_bytes"], entry["memory_method"] = extra_peak(call.run, device)
        entry["launches"] = launches(call, device)
        entry["host_syncs"] = host_syncs(call, device)
    except Exception as error:
        runner.failure = words(error)
    return entry


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU; None on the CPU, or where the profiler fails."""
    if device.type != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call.run()
            torch.cuda.synchronize()
        events = profile.events() or []
        return sum(1 for event in events if event.device_type == torch.autograd.DeviceType.CUDA) or None
    except RuntimeError:
        return None


def host_syncs(call: Call, device: torch.device) -> int | None:
    """How often one call makes the host wait for the GPU; None on the CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def backends_of(op: str, device: torch.device) -> list[str]:
    """The op's backends for a device, the one that runs by default first; interpreted Triton last, where it is on."""
    names = list(_backends.OPS[op].order[device.type])
    if device.type == "cpu" and _backends.interpreting() and "triton" not in names:
        names.append("triton")
    if device.type == "cuda" and _backends.OPS[op].serves("cuda") and "cuda" not in names:
        names.append("cuda")
    default = default_backend(op, device)
    return sorted(names, key=lambda name: name != default)


def default_backend(op: str, device: torch.device) -> str:
    """The backend that runs the op on this device when nobody asks for one."""
    return _backends.backends()[op][device.type].split()[0]


def on_backend(op: str, backend: str, device: torch.device, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` on the named backend, proven once to run there; no context manager is timed where it is the default.

    Raises:
        Absent: where the backend cannot run on this machine, or cannot serve this very call.
    """
    why = _backends.unavailable(backend, device.type)
    if why is not None:
        raise Absent(why)

    def forced() -> Any:
        with use_backend(backend, op):
            return run()

    try:
        forced()
    except RuntimeError as error:
        if "cannot run on" in str(error):
            raise Absent(str(error)) from None
        raise
    return run if backend == default_backend(op, device) else forced


def with_graph(arm: Arm, graphs: bool) -> Iterator[Arm]:
    """The arm and, where `graphs`, its replay from a CUDA graph."""
    yield arm
    if graphs:
        yield replace(arm, name=f"{arm.name}, graph", graph=True)


def ceiling_copy(nbytes: int, device: torch.device) -> Arm:
    """`copy_` of as many bytes, half of them read and half written."""

    def bind(_: Inputs) -> Call:
        source = torch.randint(0, 255, (max(1, nbytes // 2),), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return Call(lambda: [target.copy_(source)])

    return Arm("copy", f"torch {torch.__version__} copy_ of the same bytes", "ceiling", bind)


def ceiling_matmul(flops: int, dtype: torch.dtype, device: torch.device) -> Arm:
    """A square matrix product of about as much arithmetic, in the same dtype; its time is scaled to exactly as much."""
    side = min(8192, max(64, round((flops / 2) ** (1 / 3) / 64) * 64))
    scale = flops / (2 * side**3)

    def bind(_: Inputs) -> Call:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return Call(lambda: [torch.mm(a, b, out=out)], count=1 / scale)

    what = f"torch {torch.__version__} mm of {side} x {side} {short(dtype)}, time scaled by {scale:.3g} to equal FLOP"
    return Arm("matmul", what, "ceiling", bind)

"""The whole proof on a GPU in ten minutes, and two trainings in ten more: `python -m bench gpu`, or `make gpu`.

Every stage is a process of its own, bounded in time, that writes what it finds as it finds it: a run cut short, a
kernel that kills its context or a stage that hangs cost only themselves. First what must be right, then what is
fastest to tell, most valuable first. Given again, the command goes on with the stages that are not finished.
`--dry-run` walks the same path at tiny sizes through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import environment, goals, matrix, plots, table
from bench.harness import EXIT_ABSENT
from bench.reproduced import WRITTEN
from bench.results import FOLDER, Results, default_path
from sdmp_train.advice import command
from sdmp_train.stop import Stopped

LARGEST_BYTES = 16 * 2**20
"""Of a file that this writes: what may be carried away from a machine that is lent."""
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")


@dataclass
class Run:
    """One `bench gpu` run.

    Attributes:
        path: the results file.
        device: "cuda", or "cpu" in a dry run.
        dry: tiny sizes through the interpreter.
        ends: time.monotonic() at which it must be over.
        again: also what is finished already.
        folder: of trainings, where not the usual one.
        failed: names of what failed.
        absent: names of what could not run here for want of something, and of what.
        cut: names of what ran out of time.
        children: the processes that run now.
    """

    path: Path
    device: str
    dry: bool
    ends: float
    again: bool = False
    folder: Path | None = None
    failed: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds left."""
        return max(0.0, self.ends - time.monotonic())

    def child(self, *words: str, seconds: float, env: dict[str, str] | None = None, quiet: bool = False) -> int | None:
        """Run a process of this run's own; its exit code, or None where its time ran out and it was ended."""
        settings = {"PYTHONUNBUFFERED": "1", **({"TRITON_INTERPRET": "1"} if self.dry else {}), **(env or {})}
        process = subprocess.Popen(
            words,
            cwd=environment.ROOT,
            env={**os.environ, **settings},
            start_new_session=True,
            stdout=subprocess.DEVNULL if quiet else None,
        )
        self.children.append(process)
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)
            self.children.remove(process)

    def bench(self, *words: str, seconds: float) -> int | None:
        """A subcommand of this package in a process of its own, writing into the same results file."""
        return self.child(sys.executable, "-m", "bench", *words, "--json", str(self.path), seconds=seconds)

    def note(self, name: str, status: str, detail: str, seconds: float, **facts: object) -> None:
        """Record a check, and remember it where it did not pass."""
        self.told(name, status, detail)
        Results(self.path).check(name, status, detail, seconds, **facts)

    def told(self, name: str, status: str, detail: str) -> None:
        """Print the outcome of a check that is recorded, and remember it where it did not pass."""
        if status == "failed":
            self.failed.append(name)
        if status == "out of time":
            self.cut.append(name)
        if status == "absent":
            self.absent.append(f"{name} ({detail})")
        print(f"  {name}: {status} ({detail})")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a child and whatever it started, if it still runs: it began a session, and so a group, of its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class Stage:
    """A part of the run, and its share of the time that is left when its turn comes, against the later ones."""

    name: str
    weight: float
    run: Callable[[Run, float], None]
    always: bool = False
    """Whether it runs again where it is finished: it is made of what the others have found."""


def run(args: argparse.Namespace) -> int:
    """Run all stages, or those named; returns 0 where nothing failed, 1 where something did, 2 without a GPU."""
    if not args.dry_run and not torch.cuda.is_available():
        walked = command("bench", "gpu", "--dry-run")
        print(f"bench gpu: torch sees no CUDA device. `{walked}` walks the same path without one.")
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        path = args.json or (Path(scratch) / "dry-run.json" if args.dry_run else default_path())
        path = path.resolve()
        ends = time.monotonic() + 60 * args.minutes
        state = Run(path, "cpu" if args.dry_run else "cuda", args.dry_run, ends, args.again, args.folder)
        print(environment.line())
        Results(path, dry_run=args.dry_run).begin("gpu", threads=torch.get_num_threads(), allocator="default")
        stages = PARTS[args.part]
        wanted = args.stages.split(",") if args.stages else [stage.name for stage in stages]
        unknown = set(wanted) - {stage.name for stage in stages}
        if unknown:
            print(f"--stages: unknown {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in stages)}")
            return 2
        # Children have sessions of their own, so a signal to this process would leave them running.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            run_stages(state, [stage for stage in stages if stage.name in wanted])
        finally:
            for process in list(state.children):
                end(process)
        Results(path, dry_run=args.dry_run).finish("gpu")
        for place in written(state):
            print(f"wrote {place.relative_to(environment.ROOT) if environment.ROOT in place.parents else place}")
    if state.absent:
        print(f"absent: {'; '.join(state.absent)}")
    print(f"failed: {', '.join(state.failed)}" if state.failed else "nothing failed")
    return 1 if state.failed else 0


def run_stages(state: Run, stages: list[Stage]) -> None:
    """Every stage gets its share of the time left; what it does not use goes to the later ones.

    A dry run, which proves no time, takes a minute where nothing else runs, and may take longer elsewhere.
    """
    # A tree that differs from its commit may be another one the next time. What `tune` wrote came after the timing.
    commit, dirty = environment.commit(*WRITTEN, "sdmp_kernels/tables")
    for number, stage in enumerate(stages):
        known = Results(state.path).document.get("stages", {}).get(stage.name)
        if known and known["commit"] == commit and not (dirty or state.again or stage.always):
            print(f"\n== {stage.name}: finished at {known['finished']}; --again repeats it")
            continue
        share = state.left if state.dry else state.left * stage.weight / sum(later.weight for later in stages[number:])
        print(f"\n== {stage.name} (up to {share:.0f} s)")
        if share < 1:
            print("  no time left")
            Results(state.path).skip("gpu", stage.name)
            continue
        begun, wrong = time.monotonic(), len(state.failed) + len(state.cut)
        stage.run(state, share)
        if len(state.failed) + len(state.cut) == wrong:
            Results(state.path).stage(stage.name, commit, time.monotonic() - begun)


def written(state: Run) -> list[Path]:
    """The files of this run that say what came of it; one that is too large to be carried away is a failure."""
    files = sorted(place for place in state.path.parent.glob(f"{state.path.stem}*") if place.is_file())
    for place in files:
        if place.stat().st_size > LARGEST_BYTES:
            state.failed.append(f"{place.name} has {place.stat().st_size / 2**20:.0f} MiB")
    return files


def build(state: Run, seconds: float) -> None:
    """Compile csrc/ where nvcc is and no library newer than its sources: the `cuda` backend."""
    started = time.monotonic()
    library = _library()
    if library is not None:
        return state.note("build csrc", "passed", f"{library.name} is there", 0)
    if state.dry or environment.nvcc() is None:
        why = "a dry run builds nothing" if state.dry else "nvcc is not installed; triton serves the GPU"
        return state.note("build csrc", "absent", why, 0)
    code = state.child(sys.executable, "setup.py", "build_ext", "--inplace", seconds=seconds)
    taken, library = time.monotonic() - started, _library()
    if library is not None:
        return state.note("build csrc", "passed", f"built {library.name} with nvcc {environment.nvcc()}", taken)
    if code is None:
        return state.note("build csrc", "out of time", "ended before its end", taken)
    report = environment.ROOT / "sdmp_kernels" / "_build.json"
    why = json.loads(report.read_text()).get("_native_cuda", "") if report.exists() else f"exit code {code}"
    return state.note("build csrc", "failed", f"no CUDA library: {why}", taken)


def _library() -> Path | None:
    """The compiled CUDA kernels, if they are newer than every source."""
    found = sorted((environment.ROOT / "sdmp_kernels").glob("_native_cuda*.so"))
    sources = [path.stat().st_mtime for path in (environment.ROOT / "csrc").iterdir()]
    return found[0] if found and found[0].stat().st_mtime >= max(sources, default=0) else None


def check(name: str) -> Callable[[Run, float], None]:
    """A stage that is one of bench/checks.py."""

    def stage(state: Run, seconds: float) -> None:
        started = time.monotonic()
        tiny = ["--tiny"] if state.dry else []
        code = state.bench("check", name, "--device", state.device, *tiny, seconds=seconds)
        parts = {part: found for part, found in _checks(state).items() if part.startswith(f"{name} ")}
        lacking = {part: found["detail"] for part, found in parts.items() if found["status"] == "absent"}
        _judge(state, name, code, time.monotonic() - started, lacking)

    return stage


def _checks(state: Run) -> dict[str, Any]:
    return Results(state.path).document["checks"]


def question(name: str) -> Callable[[Run, float], None]:
    """A stage that is one of the questions: mix, losses, step."""

    def stage(state: Run, seconds: float) -> None:
        started = time.monotonic()
        size = (
            ["--tiny", "--threads", "1"] if state.dry else ["--minutes", f"{0.9 * seconds / 60:.2f}", "--seconds", "2"]
        )
        code = state.bench(name, "--device", state.device, *size, seconds=seconds)
        told = Results(state.path).document["runs"].get(name, {})
        for arm, reason in told.get("lacking", {}).items():
            state.note(f"bench {name}, {arm}", "absent", reason, 0)
        if code == 0 and told["skipped"]:
            left = f"{len(told['skipped'])} settings were not reached: {', '.join(told['skipped'])}"
            return state.note(f"bench {name}", "out of time", left, time.monotonic() - started)
        return _judge(state, f"bench {name}", code, time.monotonic() - started, told.get("absent", {}))

    return stage


def _judge(state: Run, name: str, code: int | None, taken: float, absent: dict[str, str]) -> None:
    """Record how a stage's process ended; `absent`: its parts that could not run here, and why."""
    if code is None:
        state.note(name, "out of time", "ended; what it had finished is kept", taken)
    elif code == EXIT_ABSENT:
        parts = "; ".join(f"{part}: {reason}" for part, reason in absent.items()) or "it had nothing to run here"
        state.note(name, "absent", f"not all of it could run here. {parts}", taken)
    elif code:
        state.note(name, "failed", f"ended with exit code {code}", taken)
    else:
        state.note(name, "passed", "ran to its end", taken)


def op_matrix(state: Run, seconds: float) -> None:
    """The op matrix on this device, compiled backends first, shared out over the cores."""
    if importlib.util.find_spec("pytest") is None:
        return state.note("op matrix", "absent", "pytest is not installed", 0)
    started = time.monotonic()
    journal = state.path.with_suffix(".matrix.jsonl")
    # The interpreter is slow, and CI runs the whole matrix anyway: there the path counts, not the cases.
    shares = 1 if state.dry else min(environment.cores(), matrix.MOST_PROCESSES)
    options = ["--place", state.device, *(["--one-each"] if state.dry else [])]
    commands = [matrix.command(journal, *options, "--shard", f"{n + 1}/{shares}") for n in range(shares)]

    def child(words: list[str]) -> int | None:
        return state.child(*words, seconds=seconds - (time.monotonic() - started), quiet=shares > 1)

    def say(op: str, status: str, detail: str, facts: dict[str, int]) -> None:
        Results(state.path).check(f"op matrix {op}", status, detail, time.monotonic() - started, **facts)

    print(f"  {shares} processes; outcomes in {journal.name} as they come")
    for op, (status, detail) in matrix.run(commands, journal, child, say).items():
        state.told(f"op matrix {op}", status, detail)
    return None


def tune_losses(state: Run, seconds: float) -> None:
    """The launch tables of the contrastive loss, for this card: what `bench tune` finds, written key by key."""
    started = time.monotonic()
    size = ["--dry-run"] if state.dry else ["--minutes", f"{0.8 * seconds / 60:.2f}"]
    words = (sys.executable, "-m", "bench", "tune", "--op", "info_nce", *size)
    _judge(state, "tune info_nce", state.child(*words, seconds=seconds), time.monotonic() - started, {})


def train(state: Run, seconds: float) -> None:
    """CIFAR-10, plain and with SDMP in turns, for as long as there is; the next time it goes on."""
    started = time.monotonic()
    size = ["--tiny"] if state.dry else ["--minutes", f"{0.95 * seconds / 60:.2f}"]
    folder = state.folder or (state.path.parent / "runs" if state.dry else None)
    place = ["--folder", str(folder)] if folder is not None else []
    anew = ["--again"] if state.again else []
    code = state.bench("train", "--device", state.device, *size, *place, *anew, seconds=seconds)
    if code == Stopped.exit_code:
        return state.note("train", "out of time", "the same command goes on", time.monotonic() - started)
    absent = Results(state.path).document["runs"].get("train", {}).get("absent", {})
    return _judge(state, "train", code, time.monotonic() - started, absent)


def sanitizer(state: Run, seconds: float) -> None:
    """compute-sanitizer over every op's smallest calls, on the compiled GPU backends."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return state.note("compute-sanitizer", "absent", "compute-sanitizer is not installed", 0)
    if state.dry:
        return state.note("compute-sanitizer", "absent", "a dry run has no GPU code to check", 0)
    for tool in SANITIZER_TOOLS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            told = Path(folder) / "small.json"
            call = (sys.executable, "-m", "bench", "check", "small", "--device", "cuda", "--json", str(told))
            # Tensors of their own allocations, so that a read past one is seen.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            options = ("--tool", tool, "--target-processes", "all", "--error-exitcode", "99")
            code = state.child(program, *options, *call, seconds=seconds / len(SANITIZER_TOOLS), env=alone)
            passed = sum(check["status"] == "passed" for check in Results(told).document["checks"].values())
        taken = time.monotonic() - started
        if code is None:
            state.note(f"compute-sanitizer {tool}", "out of time", f"{passed} calls had no error, then ended", taken)
        else:
            found = "errors found" if code == 99 else f"{passed} calls, exit code {code}"
            clean = code in (0, EXIT_ABSENT) and passed > 0
            state.note(f"compute-sanitizer {tool}", "passed" if clean else "failed", found, taken)
    return None


def pictures(state: Run, seconds: float) -> None:
    """Goals into the results file; plots; the tables of README and docs/results."""
    results = Results(state.path)
    results.document["goals"] = goals.summary(results.document)
    results.write()
    for outcome in results.document["goals"]:
        value = outcome["why"] if outcome["value"] is None else f"{outcome['value']:.4g}"
        mark = {True: "held", False: "MISSED", None: "not measured"}[outcome["held"]]
        print(f"  {outcome['goal']:<4} {outcome['words']}: {outcome['bound']}, {mark} ({value})")
    for goal, words in goals.NOT_BUILT.items():
        print(f"  {goal:<4} {words}: not built yet")
    if importlib.util.find_spec("matplotlib") is None:
        return state.note("plots", "absent", "matplotlib is not installed", 0)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        for path in plots.draw(results.document, Path(scratch) if state.dry else FOLDER):
            print(f"  drew {path.name}")
    if state.dry:
        print(f"  the table has {len(table.render([results.document]).splitlines())} lines")
    elif state.path.parent == FOLDER:
        for page, written in table.write_pages().items():
            print(f"  {page}: table written" if written else f"  {page} has no markers for the table")
    return None


STAGES = (
    Stage("build", 8, build),
    Stage("ceilings", 3, check("ceilings")),
    Stage("matrix", 22, op_matrix),
    Stage("large", 6, check("large")),
    Stage("nosync", 5, check("nosync")),
    Stage("mix", 18, question("mix")),
    Stage("losses", 20, question("losses")),
    Stage("step", 10, question("step")),
    Stage("sanitizer", 10, sanitizer),
    Stage("pictures", 2, pictures, always=True),
)

# What a lent machine is asked first. The tables are tuned after everything is timed with the present ones.
PROOF = (*STAGES[:-2], Stage("tune", 14, tune_losses), *STAGES[-2:])
PARTS = {None: STAGES, "proof": PROOF, "train": (Stage("train", 1, train),)}

"""Kill a run of two processes on a slow disk, again and again, and see what is left each time.

    python tests/kill_run.py --kills 200 --seed 0

Every time the same command (`pretrain --resume auto`, under torchrun) goes on with what the last kill has left, and is
killed at a random instant, by SIGKILL, SIGTERM or SIGUSR1 to one process, to some or to all. Then it must hold that

- the newest checkpoint verifies and loads, and is not older than the last save that was completed;
- processes that were asked to stop have left with the documented exit codes;
- the next start goes on; and a run that reaches its end has the weights of one that was never killed, bit for bit.

A table of what was hit, and every case that did not hold, is printed; the exit code is 1 where there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIGNALS = ("SIGKILL", "SIGTERM", "SIGUSR1")
TARGETS = ("agent", "rank 0", "rank 1", "both ranks", "all")
PHASES = ("starting", "beginning", "stepping", "saving", "leaving")
"""Until signals are heard; indexing, kNN; between saves; within a save; after the last one."""
SETTINGS = """
    --preset quickstart --image-px 16 --patch-px 8 --width 16 --depth 1 --heads 2 --moco-dim 16 --moco-mlp-dim 32 -b 8
    --epochs 4 --warmup-epochs 1 --device cpu --loader torchvision -j 0 --knn-max-images 20 --save-every-epochs 1
    --save-every-minutes 0.01
"""
STEPS, EVENTS = 12, 40
"""Steps of an unbroken run, and about how many things its processes tell of."""
FAMILY = "KILL_RUN"
"""A variable in the environment of every process of a launch, by which they are found."""
PATIENCE_SECONDS = 90.0
"""How long all processes of a launch may take to end."""


Kill = Callable[["Bench", "subprocess.Popen[bytes]", "Launch"], None]


@dataclass
class Launch:
    """One start of the run: what its processes have told, and what became of them."""

    name: str
    events: list[dict[str, object]] = field(default_factory=list)
    agent_code: int = 0
    target: str = ""
    signal: str = ""
    phase: str = ""
    hung: bool = False
    heard: bool = False
    """Every rank was ready to hear signals when they were sent."""

    @property
    def codes(self) -> dict[int, int]:
        """Exit codes by rank; none for a process that a signal has ended."""
        return {int(str(e["rank"])): int(str(e["code"])) for e in self.events if e["event"] == "exit"}

    @property
    def saved(self) -> list[int]:
        """The steps of the saves that were completed, in order."""
        return [int(str(e["step"])) for e in self.events if e["event"] == "saved"]


def work(folder: Path, slow_seconds: float, words: Sequence[str]) -> int:
    """What torchrun starts: the program itself, on a slow disk, telling what it does in `folder/events`."""
    from sdmp_train import cli as program
    from sdmp_train.stop import ignore_stop_signals

    faulthandler.register(signal.SIGQUIT)
    rank = int(os.environ["RANK"])
    out = os.open(folder / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(event: str, **facts: object) -> None:
        line = json.dumps({"time": time.time(), "rank": rank, "pid": os.getpid(), "event": event, **facts})
        os.write(out, f"{line}\n".encode())

    honest_parse = program.parse_pretrain

    def parse(subcommand: str, argv: Sequence[str]) -> program.PretrainArguments:
        # Called once signals are heard; what is slowed down here imports torch.
        slow_down(slow_seconds, tell)
        tell("hears")
        return honest_parse(subcommand, argv)

    program.parse_pretrain = parse
    tell("started")
    code = 1
    try:
        code = program.main(["pretrain", *words])
    finally:
        ignore_stop_signals()
        tell("exit", code=code)
    return code


def slow_down(seconds: float, tell: Callable[..., None]) -> None:
    """Let every flush to disk take its time, and tell of saves and steps."""
    from sdmp_train import checkpoint, durable
    from sdmp_train.run import Run

    sync, save, after_step = checkpoint.sync, checkpoint.save_checkpoint, Run.after_step

    def slow_sync(path: Path) -> None:
        time.sleep(seconds)
        sync(path)

    def told_save(folder, step, parts, state):
        tell("saves", step=step)
        path = save(folder, step, parts, state)
        tell("saved", step=step)
        return path

    def told_step(run, training) -> None:
        tell("step", step=training.step)
        time.sleep(0.05)
        after_step(run, training)

    checkpoint.sync = durable.sync = slow_sync
    checkpoint.save_checkpoint = told_save
    Run.after_step = told_step


class Bench:
    """A folder with images, a run in it, and the means to start and kill it."""

    def __init__(self, folder: Path, slow_seconds: float = 0.08) -> None:
        self.folder = folder
        self.slow_seconds = slow_seconds
        self.run = folder / "run"
        self.options: list[str] = []
        """More for torchrun."""
        make_images(folder / "images")

    def launch(self, kill: Kill | None = None) -> Launch:
        """Start the run, let `kill` do its work, and wait until every process has ended."""
        (self.folder / "events").unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [str(self.folder / "images"), *SETTINGS.split(), "--output", str(self.run), "--resume", "auto"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port), *self.options]
        command += [__file__, "--work", str(self.folder), str(self.slow_seconds), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.folder / "cache")}
        environment[FAMILY] = name = uuid.uuid4().hex
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with (self.folder / "output").open("wb") as output:
            agent = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=self.folder)
        launch = Launch(name)
        try:
            if kill is not None:
                kill(self, agent, launch)
            if not wait_until(lambda: agent.poll() is not None and not family(name), PATIENCE_SECONDS):
                launch.hung = True
                for pid in ranks(name).values():
                    send(pid, signal.SIGQUIT)  # which writes down where it hangs
                time.sleep(1)
        finally:
            for pid in family(name):
                send(pid, signal.SIGKILL)
            launch.agent_code = agent.wait()
        launch.events = self.told()
        return launch

    def told(self) -> list[dict[str, object]]:
        """What the processes have told so far."""
        path = self.folder / "events"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def happened(self, event: str) -> int:
        """How often an event was told of."""
        return sum(e["event"] == event for e in self.told())


def make_images(folder: Path) -> None:
    """24 pictures in two class folders: three batches of 8."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")


def family(name: str) -> dict[int, int | None]:
    """The living processes of a launch and their ranks; None for the launcher's. Each lives in a session of its own."""
    found: dict[int, int | None] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{FAMILY}={name}".encode() in environment and state != "Z":
            numbers = [int(item.removeprefix(b"RANK=")) for item in environment if item.startswith(b"RANK=")]
            found[int(path.name)] = numbers[0] if numbers else None
    return found


def ranks(name: str) -> dict[int, int]:
    """Process ids by rank."""
    return {rank: pid for pid, rank in sorted(family(name).items(), reverse=True) if rank is not None}


def send(pid: int, number: int) -> None:
    """Send a signal; a process that is gone already does not matter."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is true; False where that takes too long."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def strike(bench: Bench, agent: subprocess.Popen[bytes], launch: Launch, name: str, target: str, times: int) -> None:
    """Send a signal to its targets, and note what the run was doing."""
    by_rank, told = ranks(launch.name), bench.told()
    pids = {
        "agent": [agent.pid],
        "rank 0": [by_rank.get(0)],
        "rank 1": [by_rank.get(1)],
        "both ranks": [by_rank.get(0), by_rank.get(1)],
        "all": [agent.pid, *family(launch.name)],
    }[target]
    first = [e for e in told if e["rank"] == 0]
    last = first[-1]["event"] if first else "started"
    launch.signal, launch.target = name, target
    launch.heard = sum(e["event"] == "hears" for e in told) == 2
    launch.phase = {"started": "starting", "hears": "beginning", "saves": "saving", "exit": "leaving"}.get(
        str(last), "stepping"
    )
    if last == "saved" and first[-1]["step"] == STEPS:
        launch.phase = "leaving"
    for attempt in range(times):
        if attempt:
            time.sleep(0.3)
        for pid in dict.fromkeys(pids):
            if pid is not None:
                send(pid, getattr(signal, name))


def at_random(rng: random.Random) -> Kill:
    """A signal, a target and an instant by chance: so long after so many things have been told."""
    name, target = rng.choice(SIGNALS), rng.choice(TARGETS)
    events, delay = rng.randrange(EVENTS), rng.random()
    times = rng.choice((1, 1, 2))  # a scheduler and a launcher often send one each

    def kill(bench: Bench, agent: subprocess.Popen[bytes], launch: Launch) -> None:
        if events == 0:
            time.sleep(3 * delay)  # before anything is told
        else:
            wait_until(lambda: len(bench.told()) >= events or agent.poll() is not None, PATIENCE_SECONDS)
            time.sleep(delay / 2)
        strike(bench, agent, launch, name, target, times)

    return kill


def at_event(event: str, count: int, name: str, target: str, times: int = 1) -> Kill:
    """A signal as soon as something was told of so often."""

    def kill(bench: Bench, agent: subprocess.Popen[bytes], launch: Launch) -> None:
        wait_until(lambda: bench.happened(event) >= count or agent.poll() is not None, PATIENCE_SECONDS)
        strike(bench, agent, launch, name, target, times)

    return kill


def judge(bench: Bench, launch: Launch, newest_before: int) -> list[str]:
    """What does not hold after a launch, in words."""
    from sdmp_train.checkpoint import load_checkpoint, newest_checkpoint, step_folders
    from sdmp_train.config import ConfigError

    wrong = ["its processes did not end"] if launch.hung else []
    folder, completed = bench.run / "checkpoints", max([newest_before, *launch.saved])
    if step_folders(folder) or completed >= 0:
        try:
            step = int(load_checkpoint(newest_checkpoint(folder))[1]["step"])
        except ConfigError as error:
            wrong.append(f"the newest checkpoint does not load: {error}")
        else:
            if step < completed:
                wrong.append(f"the newest checkpoint is of step {step}, but step {completed} was saved")
    codes = launch.codes
    if set(codes.values()) - {0, 1, 75}:
        wrong.append(f"exit codes {codes}")
    if launch.signal in ("SIGTERM", "SIGUSR1") and launch.heard:
        # Once training is done only the first rank has something left to do, and to be stopped in.
        alike = codes.get(0) == codes.get(1) or (completed == STEPS and codes == {0: 75, 1: 0})
        if launch.phase != "leaving" and not (codes.keys() == {0, 1} and alike and 1 not in codes.values()):
            wrong.append(f"exit codes {codes} of ranks that were asked to stop")
    return wrong


def newest(bench: Bench) -> int:
    """The step of the newest finished checkpoint, or -1."""
    from sdmp_train.checkpoint import finished_checkpoints, step_of

    return max([step_of(path) for path in finished_checkpoints(bench.run / "checkpoints")], default=-1)


def digest(bench: Bench) -> str:
    """SHA-256 of everything that was trained, at the last step."""
    files = sorted((bench.run / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@dataclass
class Tally:
    """What was hit, and what did not hold."""

    launches: list[Launch] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    finished: int = 0

    def table(self) -> str:
        """By signal and target: how often in which phase, with which exit codes of the ranks ("-": by the signal)."""
        lines = [f"| signal | to | kills | {' | '.join(PHASES)} | exit codes of ranks 0, 1 |"]
        lines.append("|---|---|" + "---:|" * (len(PHASES) + 1) + "---|")
        for name in SIGNALS:
            for target in TARGETS:
                mine = [launch for launch in self.launches if (launch.signal, launch.target) == (name, target)]
                phases = Counter(launch.phase for launch in mine)
                codes = Counter(", ".join(str(launch.codes.get(rank, "-")) for rank in (0, 1)) for launch in mine)
                shown = "; ".join(f"{pair} ({count})" for pair, count in codes.most_common())
                counts = " | ".join(str(phases[phase]) for phase in PHASES)
                lines.append(f"| {name} | {target} | {len(mine)} | {counts} | {shown} |")
        return "\n".join(lines)


def kill_many(folder: Path, kills: int, seed: int, say: Callable[[str], None] = print) -> Tally:
    """Kill the run `kills` times; it goes on each time, and begins anew once it has reached its end."""
    bench, rng, tally = Bench(folder), random.Random(seed), Tally()
    expected, former = None, -1
    while len(tally.launches) < kills or expected is None:
        unbroken = expected is None
        launch = bench.launch(None if unbroken else at_random(rng))
        wrong = judge(bench, launch, former)
        former = newest(bench)
        if unbroken and launch.codes != {0: 0, 1: 0}:
            wrong.append(f"the run that was not killed ended with {launch.codes}")
        if launch.codes.get(0) == 0:
            expected = expected or digest(bench)
            if digest(bench) != expected:
                wrong.append("the weights at the end are not those of the unbroken run")
            tally.finished += not unbroken
            shutil.rmtree(bench.run)
            former = -1
        if not unbroken:
            tally.launches.append(launch)
        what = f"{launch.signal} to {launch.target} while {launch.phase}" if launch.signal else "not killed"
        say(f"{len(tally.launches)}: {what}: agent {launch.agent_code}, ranks {launch.codes}, newest step {former}")
        for problem in wrong:
            output = (folder / "output").read_text(errors="replace")[-3000:]
            tally.wrong.append(f"kill {len(tally.launches)}, {what}: {problem}")
            say(f"WRONG: {tally.wrong[-1]}\n{output}\n{launch.events[-12:]}")
        if expected is None:
            break  # nothing to compare with
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_many(Path(folder), arguments.kills, arguments.seed, say=lambda line: print(line, flush=True))
    print(f"\n{tally.table()}\n")
    print(
        f"{len(tally.launches)} kills, {tally.finished} runs reached their end, {len(tally.wrong)} cases did not hold"
    )
    for problem in tally.wrong:
        print(problem)
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        sys.exit(work(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
    sys.exit(main())

"""Is the method any good? `python -m bench reproduce table5` and `map`: whole trainings, cell by cell, within a budget.

A cell is one training (an arm, so many images, so many passes, a seed) and what it is worth. Every cell is a run folder
that can be stopped and goes on later, bit for bit; what is measured stands in one JSON file. Nothing is measured twice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bench import environment, reproduced
from bench.environment import ROOT, shared_data
from sdmp_train.advice import install
from sdmp_train.run_folder import FolderInUse

if TYPE_CHECKING:
    from sdmp_train.config import Config
    from sdmp_train.data import Index
    from sdmp_train.evaluate.knn import Features
    from sdmp_train.log import Log

ARCHIVE = "cifar10-jpeg.tar.xz"
KNN_K = 20
LABELLED, ASKED = 10_000, 10_000
"""Images with labels that the small experiments measure on (training split), and queries (test split)."""
DONE, WRONG, NOT_FINITE, LATER = 0, 2, 3, 75
SAVE_MINUTES = 5.0


class Arm(NamedTuple):
    """One way to train."""

    method: str
    settings: dict[str, Any]
    """What is set of the method."""
    tail: str
    """How the presets of Table 5 end that train so."""
    words: str


ARMS = {
    "MoCo v3": Arm("mocov3", {"mixing": "none"}, "", "two clean queries"),
    "i-mix": Arm("imix", {}, "-imix", "two mixed queries, partners at random"),
    "SDMP": Arm(
        "mocov3", {"mixing": "sdmp", "variant": "replace"}, "-sdmp", "a clean and a mixed query; source and pair loss"
    ),
}
"""Every arm encodes two views of an image with gradient in a step: at equal passes the student's cost is equal."""


class Cell(NamedTuple):
    """One training."""

    arm: str
    images: int
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        """A name for its folder."""
        arm = self.arm.lower().replace(" ", "").replace("-", "")
        return f"{arm}-{self.images}-images-{self.epochs}-epochs-seed-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """Cells in the order in which they are run, and the recipe that all of them share."""

    name: str
    cells: tuple[Cell, ...]
    recipe: Config
    labelled: int
    """Images of the training split that kNN and the linear classifier may use; 0 for all."""
    small: bool


def arms_there_are() -> dict[str, Arm]:
    """The arms whose method exists in this version."""
    from sdmp_train.config import METHODS

    return {name: arm for name, arm in ARMS.items() if arm.method in METHODS}


def narrow(config: Config, width: int, batch_size: int = 100) -> Config:
    """The recipe for two CPU cores: a ResNet-10 of this width, small heads, a smaller batch.

    The batch divides every share of the images, so that cells of equal cost make equally many steps.
    """
    from sdmp_train.config import ModelConfig

    model = ModelConfig(arch="resnet10t", stem="cifar", width=width)
    method = replace(config.method, dim=128, mlp_dim=512)
    return replace(config, model=model, method=method, optim=replace(config.optim, batch_size=batch_size))


def table5(args: argparse.Namespace) -> Experiment:
    """CIFAR-10, ResNet-50 with the CIFAR stem, 200 epochs (Table 5); `--small`: narrow, fewer passes."""
    from sdmp_train.presets import get_preset

    recipe = get_preset("table5/cifar10-r50-sdmp")
    epochs = args.epochs or (20 if args.small else 200)
    if args.small:
        recipe = narrow(recipe, args.width)
    cells = [
        Cell(arm, reproduced.ALL_IMAGES, epochs, seed) for seed in range(args.seeds or 1) for arm in arms_there_are()
    ]
    name, labelled = ("table5-small", LABELLED) if args.small else ("table5", 0)
    return Experiment(name, tuple(cells), recipe, labelled, args.small)


MAP = {
    "100k": ((500, 200), (2_500, 40), (10_000, 10)),
    "400k": ((500, 800), (2_500, 160), (10_000, 40), (50_000, 8)),
    "1600k": ((2_500, 640), (10_000, 160), (50_000, 32)),
}
"""(images, passes) by the images that a training sees in all: equal cost in a line, four times more in the next."""


def gain_map(args: argparse.Namespace) -> Experiment:
    """Where the gain begins: shares of CIFAR-10 by numbers of passes, a narrow ResNet, several seeds."""
    from sdmp_train.presets import get_preset

    if not args.small:
        raise SystemExit("reproduce map: only the experiment for two CPU cores exists; give --small")
    recipe = narrow(get_preset("cifar10-r18-sdmp"), args.width)
    cells = [
        Cell(arm, images, epochs, seed)
        for line in MAP.values()
        for seed in range(args.seeds or 3)
        for images, epochs in line
        for arm in arms_there_are()
    ]
    return Experiment("map-small", tuple(cells), recipe, LABELLED, small=True)


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], Experiment]] = {"table5": table5, "map": gain_map}


def run(args: argparse.Namespace) -> int:
    """Run what is left of an experiment; returns 0 where nothing is, 75 where the time is up."""
    experiment = EXPERIMENTS[args.experiment](args)
    place = args.json or reproduced.FOLDER / f"{experiment.name}.json"
    if args.write:
        return reproduced.write(reproduced.load(place))
    for name in ARMS.keys() - arms_there_are().keys():
        print(f"{name} is left out: this version has no method {ARMS[name].method}")
    cells = [cell for cell in experiment.cells if not args.only or args.only in cell.name]
    cells = part_of(cells, args.part)
    if not cells:
        print("no cell matches --only and --part")
        return WRONG
    if experiment.small and importlib.util.find_spec("sklearn") is None:
        print(f"the linear classifier needs scikit-learn: {install('plots')}")
        return WRONG
    folder = args.folder or ROOT / "runs" / "reproduce" / experiment.name
    data = args.data or unpacked(ROOT / "runs" / "reproduce")
    state = reproduced.State(place, experiment.name, environment.describe())
    configs = {cell: config_of(experiment, cell, data, folder, args.device) for cell in cells}

    elsewhere: set[Cell] = set()
    """Cells that another process is training."""

    def left() -> list[Cell]:
        state.document = state.read()  # another process may have measured some meanwhile
        return [cell for cell in cells if not state.has(cell, digest(configs[cell]))]

    with stopping_at(time.monotonic() + 60 * args.minutes if args.minutes else None) as stop:
        while (todo := [cell for cell in left() if cell not in elsewhere]) and not stop.asked:
            cell = todo[0]
            print(f"[{cells.index(cell) + 1}/{len(cells)}] {cell.name}", flush=True)
            begun = time.monotonic()
            try:
                code = train(configs[cell], folder / cell.name, stop, quiet=experiment.small)
            except FolderInUse as error:
                print(f"    left to another process: {error}", flush=True)
                elsewhere.add(cell)
                continue
            state.spend(cell, digest(configs[cell]), time.monotonic() - begun)
            if code not in (DONE, NOT_FINITE, LATER):
                print(f"    it ended with exit code {code}; see {folder / cell.name / 'train.log'}")
                return code
            worth = worth_of(experiment, folder / cell.name, data, args.device) if code == DONE else None
            if code == LATER or (code == DONE and worth is None):
                break
            worth = worth or dict.fromkeys(reproduced.MEASURES) | {"failed": "not finite"}
            state.add(cell, digest(configs[cell]), worth)
            print(f"    {reproduced.words(worth)}", flush=True)
    todo = left()
    print(reproduced.table(state.document))
    print(f"results in {place}")
    if todo:
        hours = reproduced.hours_for(state.document, todo)
        pace = "" if hours is None else f", about {hours:.1f} hours at the pace so far"
        print(f"{len(todo)} of {len(cells)} cells are left{pace}: the same command goes on with {todo[0].name}")
    return LATER if todo else DONE


def part_of(cells: Sequence[Cell], part: str | None) -> list[Cell]:
    """Every n-th cell from the i-th on, for `--part i/n`: several processes share an experiment, each its own cells."""
    if part is None:
        return list(cells)
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise SystemExit(f"--part is {part}; expected i/n with i from 1 to n, such as 1/2")
    return list(cells)[int(found[1]) - 1 :: int(found[2])]


@contextlib.contextmanager
def stopping_at(deadline: float | None) -> Iterator[Any]:
    """A request to stop, by a signal or by the clock."""
    from sdmp_train.stop import StopRequest

    with StopRequest() as stop:

        def time_is_up() -> None:
            stop.asked = True
            heard = getattr(signal.getsignal(signal.SIGUSR1), "__self__", stop)
            if heard is not stop:  # an evaluation at work, which has a request of its own
                os.kill(os.getpid(), signal.SIGUSR1)

        timer = threading.Timer(max(0.0, (deadline or 0.0) - time.monotonic()), time_is_up)
        timer.daemon = True
        if deadline is not None:
            timer.start()
        try:
            yield stop
        finally:
            timer.cancel()


def unpacked(folder: Path) -> Path:
    """The shared CIFAR-10, unpacked once into `folder`; it appears complete or not at all."""
    place = folder / "cifar10"
    if place.is_dir():
        return place
    archive = shared_data(ARCHIVE)
    if archive is None:
        raise SystemExit(
            f"there is no {ARCHIVE} beside the repository; give --data DIR with train/CLASS and test/CLASS"
        )
    draft = folder / f"cifar10.tmp-{os.getpid()}"
    draft.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        tar.extractall(draft, filter="data")
    return put_in_place(draft, place)


def put_in_place(draft: Path, place: Path) -> Path:
    """Let a folder have its name, unless another process has made the same one meanwhile."""
    try:
        draft.rename(place)
    except OSError:
        shutil.rmtree(draft)
        if not place.is_dir():
            raise
    return place


def share(data: Path, images: int, folder: Path) -> Path:
    """A folder of links to so many of the training images, evenly spread over every class."""
    import numpy as np

    place = folder / "shares" / str(images)
    if place.is_dir():
        return place
    classes = sorted(path for path in (data / "train").iterdir() if path.is_dir())
    draft = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    for source in classes:
        (draft / source.name).mkdir(parents=True)
        files = sorted(source.iterdir())
        count = images // len(classes)
        if not 0 < count <= len(files):
            raise SystemExit(f"{source} has {len(files)} images; {count} are asked of it")
        for row in np.linspace(0, len(files) - 1, count).astype(int):
            (draft / source.name / files[row].name).symlink_to(files[row].resolve())
    return put_in_place(draft, place)


def config_of(experiment: Experiment, cell: Cell, data: Path, folder: Path, device: str) -> Config:
    """The settings of a cell's run."""
    from sdmp_train.config import METHODS
    from sdmp_train.methods.contrast import ContrastConfig

    arm, recipe = ARMS[cell.arm], experiment.recipe
    kind = METHODS[arm.method]
    # Heads, momentum encoder and temperature: what the arms have in common.
    common = {f.name: getattr(recipe.method, f.name) for f in dataclasses.fields(ContrastConfig)}
    method = kind(**common, **arm.settings)
    # A tenth of the steps, so that cells of equal cost warm up equally long.
    warmup = cell.epochs / 10 if experiment.small else min(recipe.optim.warmup_epochs, cell.epochs / 10)
    images = data / "train" if cell.images == reproduced.ALL_IMAGES else share(data, cell.images, folder)
    return replace(
        recipe,
        data=replace(recipe.data, data=str(images), loader=loader()),
        method=method,
        optim=replace(recipe.optim, epochs=cell.epochs, warmup_epochs=warmup),
        run=replace(
            recipe.run,
            preset="custom" if experiment.small else f"table5/cifar10-r50{arm.tail}",
            seed=cell.seed,
            device=device,
            knn_max_images=0,
            knn_every_epochs=0,
            save_every_epochs=10**6,
            save_every_minutes=SAVE_MINUTES,
            keep_checkpoints=1,
        ),
    )


def loader() -> Any:
    """DALI where it is installed: it decodes beside the steps. The views are the same bytes on a CPU either way."""
    from sdmp_train.data import DataError, choose_loader

    try:
        return choose_loader("dali", torch.device("cpu"))[0]
    except DataError:
        return "torchvision"


def digest(config: Config) -> str:
    """Of all settings that move a number: cells of other settings are other cells."""
    from sdmp_train.config import NOT_MATHS, flatten

    kept = {name: value for name, value in flatten(config) if name not in NOT_MATHS | {"data.loader"}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=list).encode()).hexdigest()[:16]


def train(
    config: Config, folder: Path, stop: Any, *, quiet: bool, certified: bool = False, overwrite: bool = False
) -> int:
    """Begin a run or go on with it; the exit code of `pretrain`. `quiet`: its lines go to its log alone."""
    from sdmp_train.commands import pretrain
    from sdmp_train.stop import Stopped

    try:
        log = cell_log() if quiet else None
        mode: dict[str, bool] = {"overwrite": True} if overwrite else {"resume": True, "or_start": True}
        return pretrain(config, folder, **mode, certified=certified, log=log, stop=stop)
    except Stopped as stopped:
        return stopped.exit_code


def cell_log() -> Log:
    """A run's log that is silent but for the live line, which a terminal shows."""
    from sdmp_train.log import Log
    from sdmp_train.text import printable_lines

    class CellLog(Log):
        def say(self, line: str = "") -> None:
            self._write(printable_lines(line))

        def report(self, line: str, live: str | None = None) -> None:
            if self.console.is_terminal:
                super().report(line)
            else:
                self._write(line)

    return CellLog()


def worth_of(experiment: Experiment, run: Path, data: Path, device: str) -> dict[str, Any] | None:
    """What a trained backbone is worth; None where the measurement was stopped, to be gone on with later."""
    from sdmp_train.stop import Stopped

    begun = time.monotonic()
    try:
        worth = measure(run, data, experiment.labelled, device)
        if not experiment.labelled:
            worth |= by_protocol(run, data, device)
    except Stopped:
        return None
    return worth | {"seconds_to_measure": time.monotonic() - begun}


def by_protocol(run: Path, data: Path, device: str) -> dict[str, Any]:
    """Top-1 of `eval linear`, the evaluation of the paper's kind, at its best learning rate; or why there is none."""
    from sdmp_train.evaluate.command import PROTOCOLS

    if "linear" not in PROTOCOLS:
        return {"linear": None, "no_linear": "this version has no eval linear"}
    where: dict[str, Any] = {"run": str(run), "data": str(data), "device": device}
    asked = PROTOCOLS["linear"](**where)
    found = asked.function()(asked)
    return {"linear": float(found["top1"]), "linear_protocol": "eval linear"}


def measure(run: Path, data: Path, labelled: int, device: str) -> dict[str, Any]:
    """kNN on the frozen features of a trained backbone: train/ has the labels, test/ the queries.

    labelled: so many images of train/, evenly spread over the classes, and `ASKED` of test/, which a linear classifier
        is measured on too; 0 for all images, and kNN alone.
    """
    from sdmp_train.evaluate.knn import spread, weighted_knn
    from sdmp_train.export import load_exported
    from sdmp_train.run_folder import EXPORTED, stored_config
    from sdmp_train.splits import measured_images

    config = stored_config(run)
    backbone, _ = load_exported(run / EXPORTED)
    train_images, test_images = measured_images(replace(config.data, data=str(data), test_data=None))
    if test_images is None:
        raise SystemExit(f"{data} has no test split; expected train/CLASS and test/CLASS in it")
    if labelled:
        train_images, test_images = spread(train_images, labelled), spread(test_images, ASKED)
    bank, queries = (features_of(backbone, index, config, device) for index in (train_images, test_images))
    worth: dict[str, Any] = {
        "knn": weighted_knn(bank, queries, (KNN_K,))[KNN_K],
        "bank": len(bank.rows),
        "queries": len(queries.rows),
    }
    if labelled:
        accuracy, why = linear(bank, queries)
        worth |= {"linear": accuracy, "linear_protocol": "logistic regression"} | ({"no_linear": why} if why else {})
    return worth


def features_of(backbone: torch.nn.Module, index: Index, config: Config, device: str) -> Features:
    """Unit-length features of an index."""
    from sdmp_train.distributed import join_world
    from sdmp_train.evaluate.knn import image_features

    with join_world(device) as world:
        return image_features(backbone.to(world.device), index, config.data, device=world.device)


STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""scikit-learn's C; the best on every fifth labelled image, held out, is taken."""


def linear(bank: Features, queries: Features, strengths: Sequence[float] = STRENGTHS) -> tuple[float | None, str]:
    """Top-1 accuracy of a logistic regression on the features, each scaled to unit variance; or why there is none."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None, "scikit-learn is not installed"
    rows, asked = bank.rows.float().cpu(), queries.rows.float().cpu()
    centre, scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
    x, y = ((rows - centre) / scale).numpy(), bank.labels.cpu().numpy()
    held = torch.arange(len(x)).numpy() % 5 == 4

    def fit(c: float, chosen: Any) -> Any:
        return LogisticRegression(C=c, max_iter=500).fit(x[chosen], y[chosen])

    best = max(strengths, key=lambda c: fit(c, ~held).score(x[held], y[held]))
    right = fit(best, slice(None)).score(((asked - centre) / scale).numpy(), queries.labels.cpu().numpy())
    return float(right), ""

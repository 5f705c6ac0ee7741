"""Two processes on CPUs are one run: synchronised statistics, averaged gradients, gathered keys, agreed flags."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tiny_runs import Spy, as_batch, build_training, random_views, with_mixing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdmp_kernels import MixPlan, make_plan
from sdmp_train.commands import open_loader
from sdmp_train.config import Config, ConfigError, ModelConfig, OptimConfig
from sdmp_train.data import BadFile, Batch, Loader, open_folder
from sdmp_train.distributed import (
    SyncBatchNorm,
    World,
    gather_rows,
    join_world,
    mirror_images,
    reduce_max,
    reduce_mean,
    said_by_first,
    same_on_all,
    together,
)
from sdmp_train.guard import FAILED, StopRequest
from sdmp_train.loop import Outcome, step, train
from sdmp_train.lost import LostImages
from sdmp_train.methods import dino
from sdmp_train.methods.contrast import Features, Plan
from sdmp_train.methods.dacl import DACLConfig
from sdmp_train.methods.dino import DINO, DINOConfig
from sdmp_train.methods.imix import IMixConfig
from sdmp_train.methods.method import At, Loss
from sdmp_train.methods.mochi import Draws, MoCHiConfig
from sdmp_train.methods.mocov3 import MoCoV3Config
from sdmp_train.stop import Stopped
from sdmp_train.training import build


class InFloat64:
    """The gradients of biases before a batch norm are differences of large numbers. In front of a method's class."""

    poisoned = False

    def mix(self, batch: Batch, plan: Plan) -> dict[str, torch.Tensor]:
        return {name: image.double() for name, image in super().mix(batch, plan).items()}

    def loss(self, features: Features, plan: Plan, batch: Batch, at: At) -> Loss:
        loss = super().loss(features, plan, batch, at)
        return loss._replace(total=loss.total * float("nan")) if self.poisoned else loss


def exact(method_class: type) -> type:
    """The method, in float64."""
    return type(f"{method_class.__name__}InFloat64", (InFloat64, method_class), {})


def join(one: MixPlan, other: MixPlan) -> MixPlan:
    """The plans of two ranks as one of all their rows."""
    rule, lam, box = (torch.cat([getattr(p, name) for p in (one, other)]) for name in ("rule", "lam", "box"))
    return make_plan(rule, lam, one.size, box=box, partner=torch.cat([one.partner, other.partner + len(one)]))


def as_two_ranks(method: Any) -> None:
    """Let a method alone plan what two ranks with half its rows each would plan, side by side."""
    whole, rows = method.setup, method.setup.rows // 2
    plan, draws = method.plan, getattr(method, "draws", None)

    def in_turn(made: Callable[[], Any]) -> list[Any]:
        found = []
        for rank in (0, 1):
            method.setup = whole._replace(rows=rows, world=replace(whole.world, rank=rank, size=2))
            found.append(made())
        method.setup = whole
        return found

    def joined_plan(at: At) -> Plan:
        one, other = in_turn(lambda: plan(at))
        return Plan(one.swap, {view: join(one.mixes[view], other.mixes[view]) for view in one.mixes})

    method.plan = joined_plan
    if draws is not None:
        method.draws = lambda at, count: Draws(*map(torch.cat, zip(*in_turn(lambda: draws(at, count)), strict=True)))


def told(views: tuple[torch.Tensor, ...], world: World, lost: Sequence[int]) -> Batch:
    """This rank's batch, of which some rows of the global batch are no images, and every rank knows."""
    batch, first = as_batch(views), world.rank * len(views[0])
    here = [row - first for row in lost if 0 <= row - first < len(views[0])]
    valid = batch.valid.index_fill(0, torch.tensor(here, dtype=torch.int64), False)
    files = tuple(BadFile(f"{row + first}.jpg", "is cut") for row in here)
    log = Spy()
    told = LostImages(world, 4, limit=1.0).agree(replace(batch, valid=valid, bad=files), 2, log)
    named = [line.rpartition(": ")[2] for line in log.lines]
    assert named == [f"'{row}.jpg' is cut" for row in lost], named
    return told


def one_step(
    config: Config,
    world: World,
    poisoned: bool = False,
    failing: bool = False,
    like_two: bool = False,
    lost: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """A step on this rank's rows of the same noise; weights, statistics and the loss averaged over ranks."""
    torch.set_default_dtype(torch.float64)
    training = build_training(config, world=world, method_class=exact(config.method_class))
    torch.set_default_dtype(torch.float32)
    training.step, method = 2, training.method
    method.poisoned = poisoned and world.rank == 1
    if like_two:
        as_two_ranks(method)
    rows = len(method.keep)
    count = len(method.view_names)
    views = tuple(v[world.rank * rows : (world.rank + 1) * rows] for v in random_views(config, count))
    before = {k: v.clone() for k, v in method.state.state_dict().items()}
    stop = StopRequest()
    if failing and world.rank == 1:
        stop.failure = OSError("no batch")
    made = step(training, [told(views, world, lost)], stop)
    state = {k: v.clone() for k, v in method.state.state_dict().items()}
    state["unchanged"] = torch.tensor(all(torch.equal(v, state[k]) for k, v in before.items()))
    return {**state, "flags": made.flags, "loss": reduce_mean(made.loss.total.clone(), world)}


class DINOInFloat64(DINO):
    """The same for DINO, whose images are not a dictionary."""

    poisoned = False

    def mix(self, batch: Batch, plan: dino.Plan) -> dino.Images:
        student, teacher = super().mix(batch, plan)
        return dino.Images(tuple(x.double() for x in student), tuple(x.double() for x in teacher))

    def loss(self, features: dino.Features, plan: dino.Plan, batch: Batch, at: At) -> Loss:
        loss = super().loss(features, plan, batch, at)
        return loss._replace(total=loss.total * float("nan")) if self.poisoned else loss


def dino_config(config: Config, flip: str) -> Config:
    """DINO + SDMP, half of four local crops mixed, on a ResNet with batch norms in the head too."""
    method = DINOConfig(
        out_dim=32, head_dim=32, bottleneck_dim=16, local_px=8, local_crops_number=4, use_bn_in_head=True, flip=flip
    )
    return replace(config, method=method)


def dino_step(
    config: Config, flip: str, world: World, poisoned: bool = False, like_two: bool = False, lost: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """A step of DINO on this rank's rows of the same noise, as `one_step`."""
    config = dino_config(config, flip)
    torch.set_default_dtype(torch.float64)
    training = build_training(config, world=world, method_class=DINOInFloat64)
    torch.set_default_dtype(torch.float32)
    training.step, method = 2, training.method
    method.poisoned = poisoned and world.rank == 1
    if like_two:
        plan, whole, half = method.plan, method.setup, method.setup.rows // 2

        def joined(at: At) -> dino.Plan:
            method.setup = whole._replace(rows=half, world=replace(whole.world, size=2))
            one = plan(at)
            method.setup = whole._replace(rows=half, world=replace(whole.world, rank=1, size=2))
            other = plan(at)
            method.setup = whole
            student = {crop: join(one.student[crop], other.student[crop]) for crop in one.student}
            return dino.Plan(student, tuple(map(join, one.teacher, other.teacher)))

        method.plan = joined
    rows = method.setup.rows
    views = tuple(v[world.rank * rows : (world.rank + 1) * rows] for v in random_views(config))
    before = {k: v.clone() for k, v in method.state.state_dict().items()}
    made = step(training, [told(views, world, lost)], StopRequest())
    state = {k: v.clone() for k, v in method.state.state_dict().items()}
    state["unchanged"] = torch.tensor(all(torch.equal(v, state[k]) for k, v in before.items()))
    return {**state, "flags": made.flags, "loss": reduce_mean(made.loss.total.clone(), world)}


VARIANTS = ("replace", "algorithm1", "extra")


HEADS = {"dim": 32, "mlp_dim": 64}
LOCAL: dict[str, Any] = {
    **{variant: {"variant": variant} for variant in VARIANTS},
    "imix mixup": IMixConfig(**HEADS),
    "imix cutmix": IMixConfig(**HEADS, rule="cutmix"),
    "dacl": DACLConfig(**HEADS, alpha=0.5),
    "mochi": MoCHiConfig(**HEADS, hard=4, mixed=6, query_mixed=3, warmup=0),
}
"""Methods whose partners are those of a rank: variants of MoCo v3 + SDMP, and other settings."""


LOST = (6,)
"""The row of the global batch that is no image, on rank 1."""


def of_kind(config: Config, kind: str) -> Config:
    """The configuration with one of `LOCAL`."""
    settings = LOCAL[kind]
    return with_mixing(config, **settings) if isinstance(settings, dict) else replace(config, method=settings)


def flipped(config: Config, variant: str) -> Config:
    """The configuration with SDMP, whose partners are those of the whole batch."""
    return with_mixing(config, flip="global", variant=variant)


def work(rank: int, port_file: str, config: Config, images: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port_file
    )
    with join_world("cpu") as world:
        results = {
            "honest": one_step(config, world),
            "poisoned": {
                "plain": one_step(config, world, poisoned=True),
                "mirrored": one_step(flipped(config, "replace"), world, poisoned=True),
                **{kind: one_step(of_kind(config, kind), world, poisoned=True) for kind in LOCAL},
                "dino": dino_step(config, "local", world, poisoned=True),
            },
            "failing": one_step(config, world, failing=True),
            "left": torch.tensor([leave(world, code) for code in (None, 2, 75, 1)]),
            "mirrored": {variant: one_step(flipped(config, variant), world) for variant in VARIANTS},
            "local": {kind: one_step(of_kind(config, kind), world) for kind in LOCAL},
            "dino": {flip: dino_step(config, flip, world) for flip in ("local", "global")},
            "lost": {
                "plain": one_step(config, world, lost=LOST),
                "mirrored": one_step(flipped(config, "replace"), world, lost=LOST),
                **{kind: one_step(of_kind(config, kind), world, lost=LOST) for kind in LOCAL},
                **{f"dino {flip}": dino_step(config, flip, world, lost=LOST) for flip in ("local", "global")},
            },
            "exchanged": mirror_images(torch.full((2, 3, 4, 4), rank, dtype=torch.uint8), world),
            "gathered": gather_rows(torch.full((2, 3), float(rank)), world),
            "largest": reduce_max(torch.tensor([float(rank), -float(rank)]), world),
            "norm": batch_norm(world),
            "same": torch.tensor([same_on_all("ab" * 32, world), same_on_all(f"{world.rank}f" * 32, world)]),
            "trained": {start: whole_training(config, images, world, start) for start in (0, 4)},
            "said": ("x", "a", "b").index(said_by_first("ba"[world.rank], ("x", "a", "b"), world)),
        }
    torch.save(results, Path(folder) / f"{rank}.pt")


class Recorded:
    """A loader that keeps the rows it gave."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.rows = loader, []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            self.rows.append(batch.ids)
            yield batch


def whole_training(config: Config, images: str, world: World, start: int = 0) -> dict[str, torch.Tensor]:
    """Two epochs of a folder of 36 images in batches of 10, from a step on: the rows of each step here, and the end."""
    data = replace(config.data, data=images, loader="torchvision", workers=0)
    config = replace(config, data=data, optim=replace(config.optim, batch_size=10))
    index = open_folder(images, cache_dir=f"{images}-cache")
    training = build(config, world, index)
    training.step = start
    with open_loader(training, index, "torchvision") as loader:
        recorded = Recorded(loader)
        outcome = train(training, recorded, Spy(), StopRequest(), lambda training: None)
    assert outcome is Outcome.DONE
    weights = torch.cat([parameter.detach().flatten() for parameter in training.method.trained.parameters()])
    return {"rows": torch.stack(recorded.rows), "weights": weights, "steps": torch.tensor(training.step)}


def leave(world: World, code: int | None) -> float:
    """How this rank leaves a block that rank 1 leaves by an error; rank 0 comes first and has to wait."""
    errors = {None: None, 2: ConfigError("x"), 75: Stopped("x"), 1: KeyError("x")}
    began = time.monotonic()
    try:
        with together(world):
            if world.rank == 1:
                time.sleep(0.3)
                if (error := errors[code]) is not None:
                    raise error
    except Exception as error:
        kind = type(error).__name__
        expected = {0: "Stopped" if code == 75 else "EndedElsewhere", 1: type(errors[code]).__name__}[world.rank]
        assert kind == expected, (kind, expected)
        return float(getattr(error, "exit_code", 1))
    finally:
        assert time.monotonic() - began > 0.2
    return 0.0


def batch_norm(world: World) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics of a synchronised batch norm on this rank's half of a batch."""
    x = norm_input().chunk(2)[world.rank].clone().requires_grad_()
    layer = SyncBatchNorm.take_over(filled_norm())
    with Seen() as seen:
        y = layer(x)
        (y * weights(world.rank, y)).sum().backward()
    plain = SyncBatchNorm.take_over(nn.BatchNorm1d(5, affine=False, momentum=None))
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(3 + world.rank))
    half = filled_norm()
    return {
        "y": y.detach(),
        "dx": x.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
        "dw": layer.weight.grad,
        "db": layer.bias.grad,
        "waits": torch.tensor(len(seen.waits)),
        "plain": plain(plain(rows)),
        "plain_mean": plain.running_mean,
        "half": SyncBatchNorm.take_over(half)(x.detach().bfloat16()),
        "evaluated": layer.eval()(x.detach()),
    }


class Seen(TorchDispatchMode):
    """Operators that would make the host wait for a GPU: values that are read, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(
            word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")
        ):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


def norm_input() -> torch.Tensor:
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1


def weights(rank: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(10 + rank))


def filled_norm() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 5.0))
        layer.bias.copy_(torch.arange(4.0))
    return layer


def free_port() -> str:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, image_folder: Path):
    """Results of both ranks, and the configuration they ran with (no mixing: partners depend on the rank's rows)."""
    base = Config(
        model=ModelConfig(arch="test_resnet", stem="cifar"),
        method=MoCoV3Config(dim=32, mlp_dim=64),
        optim=OptimConfig(batch_size=8, epochs=2, warmup_epochs=0, opt="lars", base_lr=1.0, lars_trust=0.02),
    )
    config = with_mixing(replace(base, data=replace(base.data, image_px=16)), mixing="none")
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (free_port(), config, str(image_folder), str(folder)), nprocs=2)
    return config, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_ranks_make_the_step_of_one(two_ranks):
    config, ranks = two_ranks
    alone = one_step(config, World(torch.device("cpu")))
    for rank in ranks:
        assert not rank["honest"]["unchanged"]
        for name, expected in alone.items():
            torch.testing.assert_close(rank["honest"][name], expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["plain", "mirrored", "dino local", "dino global", *LOCAL])
def test_a_row_lost_on_one_rank_is_lost_on_all(two_ranks, kind: str):
    """The step of two ranks, of which one has lost a row, is that of one process that has lost it."""
    config, ranks = two_ranks
    alone, name = World(torch.device("cpu")), kind.split()[-1]
    if kind.startswith("dino"):
        expected = dino_step(config, name, alone, like_two=name == "local", lost=LOST)
    elif kind in LOCAL:
        expected = one_step(of_kind(config, kind), alone, like_two=True, lost=LOST)
    else:
        expected = one_step(config if kind == "plain" else flipped(config, "replace"), alone, lost=LOST)
    for rank in ranks:
        assert not rank["lost"][kind]["unchanged"]
        for part, value in expected.items():
            torch.testing.assert_close(rank["lost"][kind][part], value, rtol=1e-4, atol=1e-7, msg=part)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_the_global_flip_two_ranks_make_the_step_of_one_also_when_images_are_mixed(two_ranks, variant: str):
    config, ranks = two_ranks
    alone = one_step(flipped(config, variant), World(torch.device("cpu")))
    for rank in ranks:
        assert not rank["mirrored"][variant]["unchanged"]
        for name, expected in alone.items():
            torch.testing.assert_close(rank["mirrored"][variant][name], expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", LOCAL)
def test_two_ranks_make_the_step_of_one_with_their_partners(two_ranks, kind: str):
    """Every method whose partners are those of a rank: loss, gradients, statistics of the same global batch."""
    config, ranks = two_ranks
    alone = one_step(of_kind(config, kind), World(torch.device("cpu")), like_two=True)
    for rank in ranks:
        found = rank["local"][kind]
        assert not found["unchanged"]
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("flip", ["local", "global"])
def test_two_ranks_make_dinos_step_of_one_whatever_the_flip(two_ranks, flip: str):
    """Loss, weights after the step, batch statistics, teacher and centre, with two of four local crops mixed."""
    config, ranks = two_ranks
    alone = dino_step(config, flip, World(torch.device("cpu")), like_two=flip == "local")
    assert not bool(alone["unchanged"])
    for rank in ranks:
        found = rank["dino"][flip]
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7, msg=name)
    assert not torch.equal(ranks[0]["dino"]["local"]["loss"], ranks[0]["dino"]["global"]["loss"])


def test_the_flips_differ_over_two_ranks_and_images_go_to_the_other_end(two_ranks):
    config, ranks = two_ranks
    for rank in ranks:
        assert float(rank["local"]["replace"]["loss"]) != pytest.approx(
            float(rank["mirrored"]["replace"]["loss"]), rel=1e-4
        )
    assert [int(rank["exchanged"].unique()) for rank in ranks] == [1, 0]
    alone = World(torch.device("cpu"))
    one, other = (one_step(with_mixing(config, flip=flip), alone)["loss"] for flip in ("local", "global"))
    assert torch.equal(one, other)


def test_ranks_stay_bitwise_equal(two_ranks):
    _, (first, second) = two_ranks
    assert all(torch.equal(first["honest"][name], second["honest"][name]) for name in first["honest"])


@pytest.mark.parametrize("kind", ["plain", "mirrored", *LOCAL, "dino"])
def test_a_bad_loss_on_one_rank_changes_nothing_on_any(two_ranks, kind: str):
    """No bit of the state: weights, running statistics, the momentum encoder, queues and DINO's centre."""
    for rank in two_ranks[1]:
        assert bool(rank["poisoned"][kind]["unchanged"])
        assert rank["poisoned"][kind]["flags"].tolist() == [1, 0]


def test_a_rank_without_a_batch_changes_nothing_on_any_and_all_learn_of_it(two_ranks):
    for rank in two_ranks[1]:
        assert rank["failing"]["unchanged"]
        assert rank["failing"]["flags"].tolist() == [1.0, FAILED]


def test_all_ranks_leave_together_and_in_the_same_way(two_ranks):
    for rank in two_ranks[1]:
        assert rank["left"].tolist() == [0, 2, 75, 1]


def test_a_set_that_is_no_multiple_of_the_batch(two_ranks):
    """36 images in batches of 10 over two ranks: as many steps on both, each image at most once an epoch."""
    trained = [rank["trained"] for rank in two_ranks[1]]
    assert [int(found[0]["steps"]) for found in trained] == [6, 6]
    rows = torch.cat([found[0]["rows"] for found in trained], dim=1)  # (steps, rows of both ranks)
    assert rows.shape == (6, 10)
    epochs = [rows[:3].flatten().tolist(), rows[3:].flatten().tolist()]
    assert [len(set(epoch)) for epoch in epochs] == [30, 30] and set(epochs[0]) != set(epochs[1])
    assert torch.equal(trained[0][0]["weights"], trained[1][0]["weights"])
    for found in trained:  # from the second step of the second epoch on: the same rows
        assert torch.equal(found[4]["rows"], found[0]["rows"][4:])


def test_rows_are_gathered_in_rank_order_and_flags_agree(two_ranks):
    for rank in two_ranks[1]:
        assert rank["gathered"][:, 0].tolist() == [0, 0, 1, 1]
        assert rank["largest"].tolist() == [1.0, 0.0]


def test_ranks_with_other_images_notice(two_ranks):
    for rank in two_ranks[1]:
        assert rank["same"].tolist() == [True, False]


def test_the_first_rank_decides(two_ranks):
    assert [rank["said"] for rank in two_ranks[1]] == [2, 2]


def test_batch_norm_over_two_ranks_is_batch_norm_over_the_whole_batch(two_ranks):
    layer, x = filled_norm(), norm_input().requires_grad_()
    y = layer(x)
    both = torch.cat([weights(rank, half) for rank, half in enumerate(y.chunk(2))])
    (y * both).sum().backward()
    found = [rank["norm"] for rank in two_ranks[1]]
    torch.testing.assert_close(torch.cat([f["y"] for f in found]), y.detach())
    torch.testing.assert_close(torch.cat([f["dx"] for f in found]), x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0]["dw"] + found[1]["dw"], layer.weight.grad, rtol=1e-4, atol=1e-4)
    for f in found:
        torch.testing.assert_close(f["mean"], layer.running_mean)
        torch.testing.assert_close(f["var"], layer.running_var)
        assert f["waits"] == 0
        assert f["half"].dtype == torch.bfloat16
    torch.testing.assert_close(found[0]["db"] + found[1]["db"], layer.bias.grad, rtol=1e-4, atol=1e-4)
    fresh = filled_norm()(norm_input().bfloat16().float())
    torch.testing.assert_close(torch.cat([f["half"] for f in found]).float(), fresh, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(torch.cat([f["evaluated"] for f in found]), layer.eval()(norm_input()))


def test_batch_norm_without_weights_and_with_averaged_statistics(two_ranks):
    layer = nn.BatchNorm1d(5, affine=False, momentum=None)
    rows = torch.cat([torch.randn(4, 5, generator=torch.Generator().manual_seed(3 + rank)) for rank in (0, 1)])
    expected = layer(layer(rows))
    found = [rank["norm"] for rank in two_ranks[1]]
    torch.testing.assert_close(torch.cat([f["plain"] for f in found]), expected)
    assert all(torch.allclose(f["plain_mean"], layer.running_mean, atol=1e-6) for f in found)


def test_a_wait_for_a_gpu_is_seen():
    with Seen() as seen:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert len(seen.waits) == 2

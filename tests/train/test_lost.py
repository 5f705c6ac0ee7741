"""Files damaged in mid-run: masked in every loader and method, named, counted, and an end where they are too many."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    CPU,
    TINY,
    Spy,
    all_tensors,
    as_batch,
    at_step,
    build_method,
    build_training,
    noise_batches,
    random_features,
    with_mixing,
)
from torch import Tensor
from torch.nn.functional import log_softmax

from sdmp_kernels import MixPlan, Rule
from sdmp_train.commands import colour_of, pretrain
from sdmp_train.config import Config
from sdmp_train.data import BadFile, Batch, Index, make_loader, open_folder
from sdmp_train.loop import step
from sdmp_train.lost import NAMED, LostImages
from sdmp_train.methods.contrast import Features, Plan
from sdmp_train.methods.dino import Features as Logits
from sdmp_train.methods.dino import Plan as DinoPlan
from sdmp_train.run import Run
from sdmp_train.stop import StopRequest
from sdmp_train.training import Training

HAVE_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
LOADERS = [
    pytest.param("dali", marks=pytest.mark.skipif(not HAVE_DALI, reason="DALI is not installed")),
    "torchvision",
    "resident",
]
GREY = (124, 116, 104)


def tell(batch: Batch, lost: Sequence[int]) -> Batch:
    """The batch of a single process with some rows lost."""
    valid = torch.ones(len(batch.ids), dtype=torch.bool)
    valid[list(lost)] = False
    return replace(batch, valid=valid, all_valid=None if valid.all() else valid)


def painted(batch: Batch, lost: Sequence[int]) -> Batch:
    """By hand: the mean colour in every view of the lost rows."""
    views = tuple(view.clone() for view in batch.views)
    for view in views:
        view[list(lost)] = torch.tensor(GREY, dtype=torch.uint8)[:, None, None]
    return tell(replace(batch, views=views), lost)


def loaded(index: Index, config: Config, loader: str, fill: tuple[int, ...] | None) -> list[Batch]:
    recipes = build_method(config).views(at_step(0))
    options = {"batch_size": 8, "steps": 8, "seed": 0, "device": "cpu", "workers": 0, "fill": fill}
    with make_loader(index, recipes, loader=loader, **options) as made:
        return list(made)


@pytest.fixture
def damaged(image_folder: Path, tmp_path: Path) -> tuple[Index, Index, list[int]]:
    """The index of whole images; that of a copy in which three were cut, replaced and removed after it was indexed."""
    shutil.copytree(image_folder, tmp_path / "images")
    whole, index = (open_folder(folder, cache_dir=tmp_path) for folder in (image_folder, tmp_path / "images"))
    rows = [5, 17, 30]
    cut, replaced, removed = (Path(index.path(row)) for row in rows)
    cut.write_bytes(cut.read_bytes()[:-300])
    replaced.write_text("no image any more")
    removed.unlink()
    return whole, index, rows


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_masks_them_and_nothing_else(
    damaged: tuple[Index, Index, list[int]], tiny_dino: Config, loader: str
) -> None:
    """Two epochs: the second time the file is known to be damaged. Bytes of all other rows are as they were."""
    whole, index, rows = damaged
    expected, found = loaded(whole, tiny_dino, "torchvision", None), loaded(index, tiny_dino, loader, GREY)
    met = 0
    for a, b in zip(expected, found, strict=True):
        lost = [place for place, row in enumerate(a.ids.tolist()) if row in rows]
        met += len(lost)
        by_hand = painted(a, lost)
        assert torch.equal(b.ids, a.ids) and torch.equal(b.valid, by_hand.valid)
        assert all(torch.equal(x, y) for x, y in zip(b.views, by_hand.views, strict=True))
        assert [file.path for file in b.bad] == [index.path(int(b.ids[place])) for place in lost]
    assert met >= 4


@pytest.mark.parametrize("kind", TINY.values())
def test_a_file_cut_after_indexing_gives_the_weights_of_a_run_in_which_its_row_weighs_nothing(
    damaged: tuple[Index, Index, list[int]], request: pytest.FixtureRequest, kind: str
) -> None:
    """Four steps of every method, bit for bit; and another run than with the file."""
    config: Config = request.getfixturevalue(kind)
    whole, index, rows = damaged
    ends = []
    for images, fill in ((index, GREY), (whole, None)):
        training, log = build_training(config), Spy()
        counter = LostImages(CPU, 4, limit=99.0)
        for batch in loaded(images, config, "torchvision", fill)[:4]:
            if fill is None:
                batch = painted(batch, [place for place, row in enumerate(batch.ids.tolist()) if row in rows])
            step(training, [counter.agree(batch, training.step, log)], StopRequest())
        ends.append(all_tensors(training))
        assert counter.count == sum(row in rows for batch in loaded(whole, config, "torchvision", None)[:4]
                                    for row in batch.ids.tolist())  # fmt: skip
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert all(value.isfinite().all() for value in ends[0].values() if value.is_floating_point())


def chosen(plan: MixPlan, rows: Tensor) -> MixPlan:
    """Some rows of a plan, whose partners are the flip among them."""
    parts = {name: getattr(plan, name)[rows] for name in ("rule", "lam", "partner_lam", "box")}
    return replace(plan, partner=torch.arange(len(rows)).flip(0), **parts)


ROWS = torch.tensor([0, 1, 3, 4, 6, 7])
"""Without a pair of partners, 2 and 5."""


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("tiny", {"variant": v}) for v in ("replace", "algorithm1", "extra")]
    + [("tiny", {"mixing": "none"}), ("tiny", {"source_weight": "static", "pair_weight": "static"})]
    + [("tiny_mochi", {}), ("tiny_dacl", {})],
)
def test_the_loss_is_that_of_the_rows_that_are_left(request: pytest.FixtureRequest, kind: str, changes: dict) -> None:
    """Where both partners of a pair are lost: loss and gradients of a smaller batch, without the two."""
    config: Config = request.getfixturevalue(kind)
    config = with_mixing(config, **changes) if changes else config
    # Only one query is compared, whose synthetic negatives are drawn row by row.
    method, at = build_method(config), at_step(2)
    few = build_method(replace(config, optim=replace(config.optim, batch_size=6)))
    features = random_features(method, gradient=True)
    batch = tell(next(noise_batches(config, 1)), [2, 5])
    plan = method.without_lost(method.plan(at), batch)
    smaller = Plan(plan.swap, {view: chosen(mixed, ROWS) for view, mixed in plan.mixes.items()})
    if hasattr(method, "draws"):
        whole = method.draws
        few.draws = lambda at, count: type(drawn := whole(at, count))(*(numbers[ROWS] for numbers in drawn))
    queries = {name: query.detach()[ROWS].clone().requires_grad_() for name, query in features.queries.items()}
    keys = {name: key[ROWS] for name, key in features.keys.items()}
    ours = method.loss(features, plan, batch, at)
    theirs = few.loss(Features(queries, keys), smaller, as_batch(tuple(v[ROWS] for v in batch.views)), at)
    torch.testing.assert_close(ours.total, theirs.total)
    for name, value in theirs.terms.items():
        torch.testing.assert_close(ours.terms[name], value)
    ours.total.backward()
    theirs.total.backward()
    for name, query in features.queries.items():
        torch.testing.assert_close(query.grad[ROWS], queries[name].grad, rtol=1e-4, atol=1e-7)
        assert query.grad[[2, 5]].abs().max() == 0


def test_dinos_loss_and_centre_are_those_of_the_rows_that_are_left(tiny_dino: Config) -> None:
    method, at = build_method(tiny_dino), at_step(2)
    few = build_method(replace(tiny_dino, optim=replace(tiny_dino.optim, batch_size=6)))
    numbers = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(v, 8, 64, generator=numbers) for v in (6, 4))
    student.requires_grad_()
    batch = tell(next(noise_batches(tiny_dino, 1)), [2, 5])
    plan = method.without_lost(method.plan(at), batch)
    smaller = DinoPlan(
        {crop: chosen(p, ROWS) for crop, p in plan.student.items()}, tuple(chosen(p, ROWS) for p in plan.teacher)
    )
    ours = method.loss(Logits(student, teacher), plan, batch, at).total
    theirs = few.loss(Logits(student[:, ROWS], teacher[:, ROWS]), smaller, as_batch((batch.views[0][ROWS],)), at).total
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(method.means[0], few.means[0])
    ours.backward()
    assert student.grad[:, [2, 5]].abs().max() == 0 < student.grad[:, ROWS].abs().max()


@pytest.mark.parametrize("mixing", ["sdmp", "none"])
def test_one_lost_row_by_hand(tiny: Config, mixing: str) -> None:
    """Its partner's query looks for its own key alone, and nobody's keys hold the lost row's; in float64."""
    config = with_mixing(tiny, mixing=mixing)
    method, at = build_method(config), at_step(2)
    features, batch = random_features(method), tell(next(noise_batches(config, 1)), [1])
    plan = method.without_lost(method.plan(at), batch)
    left = [row for row in range(8) if row != 1]
    total = 0.0
    for term in method.terms:
        logits = features.queries[term.query].double() @ features.keys[term.key].double()[left].T / method.temperature
        dense = method.target(term, plan).dense(8).double()
        assert dense[6, 6] == 1
        dense = dense[:, left]
        assert torch.allclose(dense[left].sum(1), torch.ones(7, dtype=torch.float64))
        losses = -(dense * log_softmax(logits, dim=1)).sum(1)[left]
        total += 2 * method.temperature * term.weight * float(losses.mean())
    assert float(method.loss(features, plan, batch, at).total) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["tiny", "tiny_imix", "tiny_dacl", "tiny_dino", "tiny_supervised"])
def test_nothing_of_a_lost_row_comes_into_another(request: pytest.FixtureRequest, kind: str) -> None:
    method = build_method(request.getfixturevalue(kind))
    plan = method.without_lost(method.plan(at_step(1)), tell(next(noise_batches(method_config(request, kind), 1)), [3]))
    mixes = [plan] if isinstance(plan, MixPlan) else [*getattr(plan, "mixes", getattr(plan, "student", {})).values()]
    mixes += getattr(plan, "teacher", ())
    assert mixes
    for mixed in mixes:
        touched = (mixed.partner == 3) | (torch.arange(8) == 3)
        assert (mixed.rule[touched] == int(Rule.KEEP)).all() and (mixed.lam[touched] == 1).all()
        assert torch.equal(mixed.partner_lam, mixed.lam[mixed.partner])


def method_config(request: pytest.FixtureRequest, kind: str) -> Config:
    return request.getfixturevalue(kind)


def test_a_batch_without_any_image_changes_nothing(tiny_dino: Config) -> None:
    training = build_training(tiny_dino)
    before = all_tensors(training)
    step(training, [tell(next(noise_batches(tiny_dino, 1)), range(8))], StopRequest())
    after = all_tensors(training)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_epochs_count_and_the_names() -> None:
    log, lost = Spy(), LostImages(CPU, 2, limit=2.0)
    batch = as_batch((torch.zeros(8, 3, 4, 4, dtype=torch.uint8),))
    files = tuple(BadFile(f"{name}\n.jpg", "is cut") for name in "ab")
    damaged = replace(tell(batch, [0, 3]), bad=files, all_valid=None)
    assert lost.agree(batch, 0, log) is batch and lost.count == 0
    assert lost.agree(damaged, 1, log).all_valid.tolist() == damaged.valid.tolist()
    assert (lost.count, lost.too_many) == (2, False)
    lost.agree(damaged, 2, log)
    assert (lost.count, lost.too_many) == (2, False), "another epoch"
    lost.agree(damaged, 3, log)
    assert (lost.count, lost.too_many) == (4, True)
    assert log.lines == [f"left out of the loss, since it could not be decoded: '{n}\\n.jpg' is cut" for n in "ab"]
    many = replace(damaged, bad=tuple(BadFile(str(number), "is cut") for number in range(30)))
    lost.agree(many, 4, log)
    assert len(log.lines) == NAMED


def test_a_step_that_is_made_again_counts_once_and_a_resume_counts_on() -> None:
    log, lost = Spy(), LostImages(CPU, 4, limit=3.0)
    batch = as_batch((torch.zeros(8, 3, 4, 4, dtype=torch.uint8),))
    damaged = replace(tell(batch, [0, 3]), bad=(BadFile("a", "is cut"),), all_valid=None)
    for at in (5, 6, 5, 6):
        lost.agree(damaged, at, log)
    assert (lost.count, lost.too_many) == (4, True)
    assert [lost.before(at) for at in (4, 5, 6, 7, 8)] == [0, 0, 2, 4, 0]
    resumed = LostImages(CPU, 4, limit=3.0, start=7, earlier=lost.before(7))
    assert (resumed.count, resumed.too_many) == (4, False), "they may have been repaired"
    resumed.agree(damaged, 7, log)
    assert (resumed.count, resumed.too_many, resumed.before(7), resumed.before(8)) == (6, True, 4, 0)
    resumed.agree(batch, 8, log)
    assert (resumed.count, resumed.too_many) == (0, False), "another epoch"


def cut_after(monkeypatch: pytest.MonkeyPatch, images: Path, names: Sequence[str]) -> None:
    """Damage files once a run has begun: it has read its first batches by then."""
    honest = Run.before_training

    def before_training(run: Run) -> None:
        honest(run)
        for name in names:
            (images / name).write_bytes((images / name).read_bytes()[:-300])

    monkeypatch.setattr(Run, "before_training", before_training)


@pytest.fixture
def skipping(tiny: Config, image_folder: Path, tmp_path: Path) -> Config:
    shutil.copytree(image_folder, tmp_path / "images")
    data = replace(tiny.data, data=str(tmp_path / "images"), bad_images="skip", max_bad_frac=0.06)
    return replace(tiny, data=data)


def test_a_run_goes_on_without_it(
    skipping: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_after(monkeypatch, tmp_path / "images", ["bars/3.jpg", "dots/8.jpg"])
    config = replace(skipping, run=replace(skipping.run, knn_max_images=30))
    assert pretrain(config, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert said.count("left out of the loss, since it could not be decoded") == 2
    assert "bars/3.jpg' image file is truncated" in said and "done" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1].get("lost_images", 0) + sum(line.get("lost_images", 0) for line in lines[:-1]) > 0


def test_a_resume_in_mid_epoch_goes_on_counting(
    skipping: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the metrics of a run in two parts say is what those of the unbroken run say.

    Eight files rot once the run has begun, without a trace that a resume would find at its start.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [tmp_path / "images" / name / f"{i}.jpg" for name in ("bars", "dots") for i in range(4)]
    whole = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    honest = Run.before_training

    def put(file: Path, data: bytes) -> None:
        file.write_bytes(data)
        os.utime(file, ns=(whole[file][1],) * 2)

    def before_training(run: Run) -> None:
        honest(run)
        for file in files:
            put(file, bytes(len(whole[file][0])))

    monkeypatch.setattr(Run, "before_training", before_training)
    config = replace(skipping, data=replace(skipping.data, max_bad_frac=0.5))
    assert pretrain(config, tmp_path / "whole") == 0
    for file in files:
        put(file, whole[file][0])
    assert pretrain(replace(config, run=replace(config.run, max_steps=6)), tmp_path / "parts") == 0
    assert pretrain(config, tmp_path / "parts", resume=True) == 0
    counts = [
        [json.loads(line).get("lost_images") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert counts[0] == counts[1] and counts[0][-1] > counts[0][-3] > 0


def test_too_many_end_the_run_with_four_once_it_is_saved(
    skipping: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdmp_train.checkpoint import newest_checkpoint
    from sdmp_train.cli import main
    from sdmp_train.config import save_config

    cut_after(monkeypatch, tmp_path / "images", [f"dots/{i}.jpg" for i in range(12)])
    save_config(skipping, tmp_path / "config.yaml")
    assert main(["pretrain", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]) == 4
    printed = capsys.readouterr()
    assert "more of the 36 images could not be decoded than --max-bad-frac allows" in printed.err
    assert "go on with" in printed.out
    assert int(newest_checkpoint(tmp_path / "run" / "checkpoints").name[-6:]) >= 1


def test_the_colour_is_the_mean(tiny: Config) -> None:
    assert colour_of(tiny.data.mean) == GREY
    assert isinstance(build_training(tiny), Training)

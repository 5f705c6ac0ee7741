"""kNN against a slow and obvious one, and on answers that are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from subjects import export, results
from torch.nn.functional import normalize

from sdmp_train.commands import pretrain
from sdmp_train.config import Config, ConfigError
from sdmp_train.data import open_folder
from sdmp_train.evaluate.knn import (
    Features,
    KnnConfig,
    collapse,
    evaluate_knn,
    image_features,
    knn_images,
    pixels,
    spread,
    standardise,
    weighted_knn,
)
from sdmp_train.evaluate.subject import Steps
from sdmp_train.export import export_backbone
from sdmp_train.models import build_backbone
from sdmp_train.run_folder import strangers
from sdmp_train.stop import Stopped

CPU = torch.device("cpu")


def features(count: int, classes: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(count, 6, generator=generator), dim=1)
    return Features(rows, torch.randint(0, classes, (count,), generator=generator))


def slow_knn(bank: Features, queries: Features, k: int, temperature: float) -> float:
    right = 0
    for row, label in zip(queries.rows, queries.labels, strict=True):
        similarities = [float(row @ other) for other in bank.rows]
        nearest = sorted(range(len(similarities)), key=lambda i: -similarities[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            name = int(bank.labels[i])
            votes[name] = votes.get(name, 0) + math.exp(similarities[i] / temperature)
        right += max(votes, key=lambda name: votes[name]) == int(label)
    return right / len(queries.rows)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_against_a_slow_one(chunk: int):
    bank, queries = features(60, 4, seed=0), features(25, 4, seed=1)
    fast = weighted_knn(bank, queries, (1, 5, 20), temperature=0.07, chunk=chunk)
    assert fast == pytest.approx({k: slow_knn(bank, queries, k, 0.07) for k in (1, 5, 20)})
    assert len(set(fast.values())) > 1


@pytest.mark.parametrize("k", [1, 20, 60])
def test_against_scikit_learn(k: int):
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    bank, queries = features(300, 5, seed=2), features(200, 5, seed=3)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.rows.double().numpy(), bank.labels.numpy())
    expected = theirs.score(queries.rows.double().numpy(), queries.labels.numpy())
    assert weighted_knn(bank, queries, (k,))[k] == pytest.approx(expected, abs=1e-12)


def test_known_answers():
    rows = torch.eye(3).repeat(4, 1)
    bank = Features(rows, torch.arange(3).repeat(4))
    assert weighted_knn(bank, bank, (1, 4)) == {1: 1.0, 4: 1.0}
    wrong = Features(rows, (bank.labels + 1) % 3)
    assert weighted_knn(bank, wrong, (4,)) == {4: 0.0}
    assert weighted_knn(bank, bank, (200,)) == {200: 1.0}  # more neighbours than rows: all of them


def test_the_weight_of_a_vote_is_its_similarity():
    """One very near neighbour outvotes two far ones at temperature 0.07, and not at temperature 100."""
    rows = normalize(torch.tensor([[1.0, 0.0], [0.3, 1.0], [0.3, 1.0]]), dim=1)
    bank = Features(rows, torch.tensor([0, 1, 1]))
    query = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert weighted_knn(bank, query, (3,))[3] == 1.0
    assert weighted_knn(bank, query, (3,), temperature=100.0)[3] == 0.0


@pytest.mark.parametrize("temperature", [0.07, 0.02, 0.01, 1e-3, 1e-6, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_nearest_row_wins_at_any_low_temperature(temperature: float, dtype: torch.dtype):
    """Votes of exp(1 / temperature) overflow from 0.0112 down; votes of similarities below 0 underflow."""
    bank = Features(normalize(torch.tensor([[1.0, 0.35], [1.0, 0.05]]), dim=1).to(dtype), torch.tensor([0, 1]))
    query = Features(torch.tensor([[1.0, 0.0]]).to(dtype), torch.tensor([1]))
    assert weighted_knn(bank, query, (2,), temperature=temperature) == {2: 1.0}
    opposite = Features(-query.rows, torch.tensor([0]))  # both similarities are below 0; the less near row is class 0
    assert weighted_knn(bank, opposite, (2,), temperature=temperature) == {2: 1.0}


def test_votes_are_counted_in_float32_whatever_the_rows_are():
    """1 + 2047 votes of one class: float16 cannot count beyond 2048, bfloat16 not beyond 256."""
    rows = torch.ones(5000, 1)
    bank = Features(rows.bfloat16(), torch.cat([torch.zeros(2000), torch.ones(3000)]).long())
    assert weighted_knn(bank, Features(rows[:1].bfloat16(), torch.tensor([1])), (5000,)) == {5000: 1.0}


def test_rows_of_zeros_are_counted_and_broken_ones_refused():
    bank = Features(torch.zeros(3, 2), torch.tensor([1, 1, 0]))
    assert weighted_knn(bank, Features(torch.zeros(1, 2), torch.tensor([1])), (3,)) == {3: 1.0}
    honest = features(6, 2, seed=0)
    for value in (float("nan"), float("inf")):
        broken = honest.rows.clone()
        broken[2, 1] = value
        for pair in ((Features(broken, honest.labels), honest), (honest, Features(broken, honest.labels))):
            with pytest.raises(ConfigError, match=r"1 of the 6 features of the .* are not finite"):
                weighted_knn(*pair, (1,))


def test_a_collapsed_backbone_is_said():
    same = normalize(torch.ones(5, 4), dim=1) + torch.linspace(0, 1e-7, 5)[:, None]
    assert "all 5 images are the same" in (collapse(Features(same, torch.zeros(5))) or "")
    assert collapse(features(6, 2, seed=0)) is None
    assert collapse(Features(same[:1], torch.zeros(1))) is None


def test_eval_gives_the_accuracies_that_it_prints(tiny: Config, tmp_path: Path, capsys):
    exported = tmp_path / "net"
    export_backbone(build_backbone(tiny.model, 32, seed=0), tiny, exported, 1)
    config = KnnConfig(weights=str(exported), data=tiny.data.data, k=(1, 5), device="cpu", workers=0, batch_size=16)
    found = evaluate_knn(config)
    assert {what: list(by_k) for what, by_k in found.items()} == {"backbone": [1, 5], "raw pixels": [1, 5]}
    said = capsys.readouterr().out
    assert "kept     nowhere: an export alone has no run folder; --output DIR keeps results" in said
    assert "0 of 29 images of the bank, backbone\n29 of 29 images of the bank, backbone\n" in said
    printed = [line for line in said.splitlines() if line.startswith("kNN")]
    assert printed == [
        f"kNN {accuracy:6.2%}  {what}, k = {k}" for what, by_k in found.items() for k, accuracy in by_k.items()
    ]
    assert evaluate_knn(replace(config, raw_pixels=False)) == {"backbone": found["backbone"]}
    with pytest.raises(ConfigError, match="k is 30; expected at most 29, the images of the bank"):
        evaluate_knn(replace(config, k=(5, 30)))
    capsys.readouterr()
    by_default = evaluate_knn(replace(config, k=None, output=str(tmp_path / "out")))
    assert list(by_default["backbone"]) == [10, 20]  # 100 and 200 are more than the bank has
    assert results(tmp_path / "out")[0]["settings"]["k"] == [10, 20] and "nowhere" not in capsys.readouterr().out


def test_a_run_and_eval_give_the_same_number_for_the_same_weights(tiny: Config, tmp_path: Path, capsys):
    """By default of the same images, at the same precision; another share of the images gives another number."""
    run = tmp_path / "run"
    config = replace(tiny, run=replace(tiny.run, knn_max_images=25, max_steps=1))
    assert pretrain(config, run) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row["knn"] for row in rows if "knn" in row][-1]
    settings = KnnConfig(what=str(run), k=(20,), device="cpu")
    capsys.readouterr()
    assert evaluate_knn(settings)["backbone"] == {20: measured}
    printed = capsys.readouterr().out
    assert "of 36 images, evenly spread, every fifth a query: 20 bank, 5 queries, 3 classes" in printed
    whole = evaluate_knn(replace(settings, knn_max_images=10**6))
    kept = results(run)
    assert [row["protocol"] for row in kept] == ["knn", "knn"]
    assert [row["backbone"] for row in kept] == [{"20": measured}, {"20": whole["backbone"][20]}]
    assert [(row["bank_images"], row["test_images"]) for row in kept] == [(20, 5), (29, 7)]
    assert list(strangers(run)) == []


def test_a_stop_ends_a_measurement(tiny: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Steps, "__call__", lambda self: (_ for _ in ()).throw(Stopped("asked")))
    config = KnnConfig(weights=export(tiny, tmp_path / "net"), data=tiny.data.data, device="cpu", workers=0)
    with pytest.raises(Stopped):
        evaluate_knn(config)


def test_eval_refuses_a_folder_too_small_for_queries(tiny: Config, tmp_path: Path):
    """Every fifth image would be one, and there are four."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / "data" / name / f"{number}.png")
    export_backbone(build_backbone(tiny.model, 32, seed=0), tiny, tmp_path / "net", 1)
    config = KnnConfig(weights=str(tmp_path / "net"), data=str(tmp_path / "data"), device="cpu", workers=0)
    with pytest.raises(ConfigError, match="the number of query images of kNN is 0"):
        evaluate_knn(config)


@pytest.mark.parametrize("given", [{}, {"run": "a", "weights": "b"}])
def test_eval_needs_one_backbone(given: dict):
    with pytest.raises(ConfigError, match="give --run RUN"):
        evaluate_knn(KnnConfig(**given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"k": ()}, "k is "),
        ({"k": (5, 0)}, "k is "),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"knn_max_images": 4}, "knn_max_images is 4"),
    ],
)
def test_settings_are_checked_before_anything_is_read(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        KnnConfig(weights="missing", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -0.07}, "temperature is -0.07"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"neighbours": (0,)}, "k is "),
        ({"neighbours": ()}, "k is "),
        ({"bank": Features(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))}, "number of bank rows"),
        ({"queries": Features(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))}, "number of queries rows"),
        ({"bank": Features(torch.zeros(2, 6), torch.tensor([0, -1]))}, "class number of a row of the bank"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(changes: dict, message: str):
    given = {"bank": features(6, 2, seed=0), "queries": features(6, 2, seed=1), "neighbours": (1,), **changes}
    with pytest.raises(ConfigError, match=message):
        weighted_knn(**given)


def test_a_backbone_is_measured_in_eval_mode_and_given_back_as_it_was(tiny_resnet: Config, image_folder: Path):
    backbone = build_backbone(tiny_resnet.model, 32, seed=0).train()
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    index = open_folder(image_folder)
    found = image_features(backbone, index, tiny_resnet.data, device=CPU, batch_size=10)
    assert found.rows.shape == (36, 96)
    torch.testing.assert_close(found.rows.norm(dim=1), torch.ones(36))
    assert torch.equal(found.labels, torch.from_numpy(index.labels))
    assert backbone.training
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    alone = image_features(backbone, index, tiny_resnet.data, device=CPU, batch_size=36)
    torch.testing.assert_close(found.rows, alone.rows)


def test_raw_pixels(tiny: Config, image_folder: Path):
    config = replace(tiny, data=replace(tiny.data, image_px=40))
    found = image_features(None, open_folder(image_folder), config.data, device=CPU)
    assert found.rows.shape == (36, 3 * 32 * 32)
    image = torch.arange(3 * 4 * 4, dtype=torch.float32).view(1, 3, 4, 4)
    assert torch.equal(pixels(image), image.flatten(1))


def test_standardise_is_the_usual_normalisation():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([(0 - 0.5) / 0.2, (0.2 - 0.4) / 0.3, (1 - 0.1) / 0.5]).view(1, 3, 1, 1)
    torch.testing.assert_close(standardise(images, (0.5, 0.4, 0.1), (0.2, 0.3, 0.5)), expected)


def test_bank_and_queries_do_not_overlap_and_hold_every_class(image_folder: Path):
    index = open_folder(image_folder)
    bank, queries = knn_images(index, None, max_images=30)
    names = [{images.path(i) for i in range(len(images))} for images in (bank, queries)]
    assert (len(bank), len(queries)) == (24, 6)
    assert not names[0] & names[1]
    assert set(bank.labels) == set(queries.labels) == {0, 1, 2}
    bank, queries = knn_images(index, index, max_images=10)
    assert (len(bank), len(queries)) == (8, 2)
    assert np.array_equal(spread(index, 100).labels, index.labels)

"""Features in files: their values, order and names; what a stop leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from subjects import DEEP_VIT, RESNET, export
from torch.nn.functional import normalize

from sdmp_train.config import Config, ConfigError
from sdmp_train.data import eval_loader, open_folder
from sdmp_train.evaluate.embed import EmbedConfig, write_embeddings
from sdmp_train.evaluate.features import feature_maker, standardise
from sdmp_train.evaluate.knn import Features, KnnConfig, evaluate_knn, weighted_knn
from sdmp_train.evaluate.subject import Steps
from sdmp_train.export import load_exported
from sdmp_train.stop import Stopped


def settings(tiny: Config, tmp_path: Path, **changes) -> EmbedConfig:
    if not (tmp_path / "net").exists():
        export(tiny, tmp_path / "net", DEEP_VIT)
    given = {"weights": str(tmp_path / "net"), "data": tiny.data.data, "output": str(tmp_path / "out")}
    return EmbedConfig(**{**given, "device": "cpu", "workers": 0, "batch_size": 10, **changes})


def test_features_are_the_backbones_in_the_order_of_the_list(tiny: Config, tmp_path: Path):
    names = ("output", "mean", "patches", "last4")
    shapes = write_embeddings(settings(tiny, tmp_path, features=names))
    assert shapes == {"output": (36, 32), "mean": (36, 32), "patches": (36, 16, 32), "last4": (36, 128)}
    arrays = {name: np.load(tmp_path / "out" / f"{name}.npy") for name in names}
    assert {name: array.shape for name, array in arrays.items()} == shapes
    backbone, _ = load_exported(tmp_path / "net")
    index = open_folder(tiny.data.data or "")
    with eval_loader(index, 32, batch_size=36, device="cpu", workers=0) as batches, torch.inference_mode():
        (batch,) = batches
        images = standardise(batch.views[0], tiny.data.mean, tiny.data.std)
        for name in ("output", "mean", "last4"):
            expected = feature_maker(backbone, name)[0](images).numpy()
            np.testing.assert_allclose(arrays[name], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["patches"].mean(1), arrays["mean"], rtol=1e-4, atol=1e-5)
    listed = [json.loads(line) for line in (tmp_path / "out" / "files.jsonl").read_text().splitlines()]
    assert [row["file"] for row in listed] == list(index.paths)
    assert all(row["file"].startswith(row["class"] + "/") for row in listed)
    about = json.loads((tmp_path / "out" / "embeddings.json").read_text())
    assert about["features"]["patches"] == {"file": "patches.npy", "shape": [36, 16, 32]}


def test_safetensors_of_half_precision_and_a_resnet(tiny: Config, tmp_path: Path):
    net = export(tiny, tmp_path / "resnet", RESNET)
    write_embeddings(settings(tiny, tmp_path, weights=net, format="safetensors", dtype="float16"))
    halves = load_file(tmp_path / "out" / "output.safetensors")["output"]
    with pytest.raises(ConfigError, match=r"holds files\.jsonl embeddings\.json already; --overwrite"):
        write_embeddings(settings(tiny, tmp_path, weights=net))
    write_embeddings(settings(tiny, tmp_path, weights=net, overwrite=True))
    assert halves.dtype == np.float16 and np.array_equal(
        halves, np.load(tmp_path / "out" / "output.npy").astype(np.float16)
    )
    with pytest.raises(ConfigError, match="features is 'patches', which takes a ViT's tokens"):
        write_embeddings(settings(tiny, tmp_path, weights=net, features=("patches",), overwrite=True))


def test_knn_of_what_is_written_is_what_eval_knn_measures(tiny: Config, tmp_path: Path):
    """Both splits, embedded, give the accuracy of `eval knn`."""
    parts = {}
    for split in ("train", "test"):
        write_embeddings(settings(tiny, tmp_path, split=split, output=str(tmp_path / split)))
        listed = [json.loads(line) for line in (tmp_path / split / "files.jsonl").read_text().splitlines()]
        names = sorted({row["class"] for row in listed})
        rows = normalize(torch.from_numpy(np.load(tmp_path / split / "output.npy")), dim=1)
        parts[split] = Features(rows, torch.tensor([names.index(row["class"]) for row in listed]))
    measured = evaluate_knn(KnnConfig(weights=str(tmp_path / "net"), data=tiny.data.data, k=(1, 5), device="cpu"))
    assert measured["backbone"] == weighted_knn(parts["train"], parts["test"], (1, 5))
    assert (len(parts["train"].rows), len(parts["test"].rows)) == (29, 7)


def test_a_stop_leaves_no_file(tiny: Config, tmp_path: Path, monkeypatch):
    calls = []

    def third(self: Steps) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stopped("asked")

    monkeypatch.setattr(Steps, "__call__", third)
    with pytest.raises(Stopped):
        write_embeddings(settings(tiny, tmp_path))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ()}, "features is "),
        ({"features": ("mean", "mean")}, "features is "),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"output": None}, "output is missing"),
    ],
)
def test_what_cannot_be_done_is_refused(tiny: Config, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        write_embeddings(settings(tiny, tmp_path, **changes))

"""A checkpoint is complete or invisible; damage is found and named; nothing fits by luck."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from sdmp_train import checkpoint
from sdmp_train.checkpoint import (
    CheckpointError,
    delete_old_checkpoints,
    finished_checkpoints,
    load_checkpoint,
    load_module,
    load_optimizer,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    set_later_aside,
)
from sdmp_train.optim import AdamW

PARTS = {"model": {"w": torch.arange(6.0).view(2, 3)}, "optim": {}}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path):
    parts = {"model": {"half": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}, "ema": PARTS["model"]}
    path = save_checkpoint(tmp_path / "c", 12, parts, {"note": "x"})
    assert path.name == "step-000012"
    assert (tmp_path / "c" / "latest").read_text() == "step-000012"
    loaded, state = load_checkpoint(path)
    assert state == {"step": 12, "note": "x"}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded[part][name], tensor)
            assert loaded[part][name].dtype == tensor.dtype


def test_views_of_one_storage_are_saved_apart(tmp_path: Path):
    storage = torch.arange(4.0)
    path = save_checkpoint(tmp_path, 1, {"model": {"a": storage[:2], "b": storage[2:]}}, {})
    assert torch.equal(load_checkpoint(path)[0]["model"]["b"], storage[2:])


def test_unfinished_folders_are_ignored_and_old_ones_deleted(tmp_path: Path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, PARTS, {})
    (tmp_path / "step-000011").mkdir()  # no manifest
    (tmp_path / "step-000012.tmp-77").mkdir()
    assert [p.name for p in finished_checkpoints(tmp_path)] == ["step-000001", "step-000002", "step-000010"]
    assert newest_checkpoint(tmp_path).name == "step-000010"
    assert newest_checkpoint(tmp_path, previous=True).name == "step-000002"
    delete_old_checkpoints(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000010", "step-000011"]
    with pytest.raises(CheckpointError, match="holds 0 finished checkpoints"):
        newest_checkpoint(tmp_path / "nothing")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda p: flip(p / "model.safetensors"),
        lambda p: flip(p / "state.json"),
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-3]),
        lambda p: (p / "optim.safetensors").unlink(),
        lambda p: (p / "extra.safetensors").write_bytes(b"x"),
        lambda p: (p / "manifest.json").write_text("{"),
        lambda p: (p / "model.safetensors").write_bytes((p / "optim.safetensors").read_bytes()),
    ],
    ids=["flipped bit", "changed state", "cut", "deleted", "added", "manifest", "swapped"],
)
def test_damage_is_found(harm, tmp_path: Path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    load_checkpoint(path)
    harm(path)
    with pytest.raises(CheckpointError, match="step-000001"):
        load_checkpoint(path)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-*"))


def test_a_step_of_the_same_run_is_kept_and_one_of_another_run_set_aside(tmp_path: Path):
    other = {"model": {"w": torch.zeros(2, 3)}, "optim": {}}
    path = save_checkpoint(tmp_path, 5, PARTS, {"run": "a", "note": 1})
    written = (path / "model.safetensors").stat().st_mtime_ns
    save_checkpoint(tmp_path, 5, PARTS, {"run": "a", "note": 2})  # settings that move no number may differ
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    assert names(tmp_path) == ["step-000005"]
    save_checkpoint(tmp_path, 5, PARTS, {"run": "b"})  # another run, however equal
    save_checkpoint(tmp_path, 5, other, {"run": "b"})  # the same run, other numbers
    assert names(tmp_path) == ["step-000005", "step-000005.abandoned-1", "step-000005.abandoned-2"]
    parts, state = load_checkpoint(path)
    assert state["run"] == "b" and not parts["model"]["w"].any()
    assert load_checkpoint(tmp_path / "step-000005.abandoned-1")[1] == {"step": 5, "run": "a", "note": 1}
    flip(path / "model.safetensors")
    save_checkpoint(tmp_path, 5, other, {"run": "b"})
    assert "step-000005.damaged" in names(tmp_path)
    load_checkpoint(path)


def test_only_whole_checkpoints_count_when_old_ones_are_deleted(tmp_path: Path):
    for step in (1, 2, 3, 9):
        save_checkpoint(tmp_path, step, PARTS, {})
    flip(tmp_path / "step-000009" / "model.safetensors")
    flip(tmp_path / "step-000002" / "optim.safetensors")
    assert delete_old_checkpoints(tmp_path, keep=2) == [
        "the checkpoint step-000009 is damaged; it is now called step-000009.damaged",
        "the checkpoint step-000002 is damaged; it is now called step-000002.damaged",
    ]
    assert names(tmp_path) == ["step-000001", "step-000002.damaged", "step-000003", "step-000009.damaged"]
    assert delete_old_checkpoints(tmp_path, keep=1) == []
    assert names(tmp_path) == ["step-000002.damaged", "step-000003", "step-000009.damaged"]


def test_later_steps_are_set_aside_where_a_run_goes_on_from_an_earlier_one(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, PARTS, {})
    flip(tmp_path / "step-000004" / "state.json")
    (tmp_path / "step-000005").mkdir()  # no manifest
    assert len(set_later_aside(tmp_path, 2)) == 3
    assert names(tmp_path) == [
        "step-000001",
        "step-000002",
        "step-000003.abandoned-1",
        "step-000004.damaged",
        "step-000005.damaged",
    ]
    assert set_later_aside(tmp_path, 2) == []


def test_an_error_of_safetensors_own_is_an_error_of_the_disk(tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 1, PARTS, {})
    assert names(tmp_path) == []


def test_what_the_disk_gives_back_otherwise_is_not_taken_for_saved(tmp_path: Path, monkeypatch):
    save_checkpoint(tmp_path, 1, PARTS, {})
    honest = Path.rename

    def rename(path: Path, target: Path) -> Path:
        moved = honest(path, target)
        if moved.name == "step-000002":
            flip(moved / "model.safetensors")
        return moved

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="not what is read back"):
        save_checkpoint(tmp_path, 2, PARTS, {})
    assert names(tmp_path) == ["step-000001"]


def count_writes(monkeypatch, fail_at: int | None) -> list[int]:
    """Count the calls that reach the disk; the one numbered `fail_at` raises as a full disk does."""
    calls = [0]

    def wrap(function):
        def wrapped(*args, **kwargs):
            calls[0] += 1
            if calls[0] == fail_at:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(checkpoint, "save_file", wrap(checkpoint.save_file))
    for name in ("write_text", "mkdir", "rename", "replace"):
        monkeypatch.setattr(Path, name, wrap(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", wrap(os.fsync))
    return calls


def test_a_failure_at_any_write_leaves_the_former_checkpoint_whole_and_the_new_one_whole_or_absent(
    tmp_path: Path, monkeypatch
):
    with monkeypatch.context() as patch:
        calls = count_writes(patch, None)
        save_checkpoint(tmp_path / "count", 5, PARTS, {})
    assert calls[0] > 8
    for fail_at in range(1, calls[0] + 1):
        folder = tmp_path / str(fail_at)
        save_checkpoint(folder, 1, PARTS, {})
        with monkeypatch.context() as patch:
            count_writes(patch, fail_at)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(folder, 2, PARTS, {})
        found = finished_checkpoints(folder)
        assert found[0].name == "step-000001"
        for path in found:
            load_checkpoint(path)
        assert not list(folder.glob("*.tmp-*/manifest.json"))
        save_checkpoint(folder, 2, PARTS, {})
        assert newest_checkpoint(folder).name == "step-000002"


def test_missing_unknown_and_misshapen_tensors_are_listed():
    module = nn.Linear(2, 3)
    with pytest.raises(CheckpointError) as error:
        load_module(module, {"weight": torch.zeros(3, 3), "other": torch.zeros(1)}, "model")
    for part in ("missing bias", "unknown other", "weight has shape (3, 3), expected (3, 2)"):
        assert part in str(error.value)


def test_the_optimiser_goes_on_where_it_was():
    def make():
        module = nn.Linear(2, 2)
        with torch.no_grad():
            module.weight.fill_(1)
            module.bias.fill_(0)
        optimizer = AdamW(module.parameters(), weight_decay=0.1, betas=(0.9, 0.999))
        optimizer.param_groups[0]["lr"] = 0.1
        return module, optimizer, {p: n for n, p in module.named_parameters()}

    def step(module, optimizer, number):
        for p in module.parameters():
            p.grad = torch.full_like(p, float(number))
        optimizer.step()

    one, first, names = make()
    step(one, first, 1)
    saved = {k: v.clone() for k, v in optimizer_tensors(first, names).items()}
    weights = {k: v.clone() for k, v in one.state_dict().items()}
    step(one, first, 2)
    two, second, other_names = make()
    load_module(two, weights, "model")
    load_optimizer(second, saved, other_names)
    step(two, second, 2)
    assert torch.equal(one.weight, two.weight)
    with pytest.raises(CheckpointError, match="trains 'nobody'"):
        load_optimizer(second, {"exp_avg/nobody": torch.zeros(1)}, other_names)
    with pytest.raises(CheckpointError, match="has shape"):
        load_optimizer(second, {"exp_avg/weight": torch.zeros(1, 1)}, other_names)


def test_there_is_no_pickle(tmp_path: Path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    for source in Path(checkpoint.__file__).parent.rglob("*.py"):
        assert not re.search(r"import pickle|torch\.(load|save)\(", source.read_text()), source

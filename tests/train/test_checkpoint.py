"""A checkpoint is complete or invisible; damage is found and named; nothing fits by luck."""

from __future__ import annotations

import json
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
from sdmp_train.config import OptimConfig
from sdmp_train.methods.method import Group
from sdmp_train.optim import AdamW, make_optimizer

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


def test_whoever_may_read_a_new_file_may_read_a_checkpoint(tmp_path: Path):
    before = os.umask(0o027)
    try:
        saved = checkpoint.save_checkpoint(tmp_path, 1, {"student": {"w": torch.ones(1)}}, {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o640}


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
    load_optimizer(second, saved, other_names, last_epoch=0)
    step(two, second, 2)
    assert torch.equal(one.weight, two.weight)
    with pytest.raises(CheckpointError, match="trains 'nobody'"):
        load_optimizer(second, {"exp_avg/nobody": torch.zeros(1)}, other_names, last_epoch=0)
    with pytest.raises(CheckpointError, match="has shape"):
        load_optimizer(second, {"exp_avg/weight": torch.zeros(1, 1)}, other_names, last_epoch=0)


def sealed(path: Path) -> Path:
    """The folder with a manifest that is true of what it holds now."""
    (path / "manifest.json").unlink()
    files = {file.name: checkpoint.fingerprint(file) for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return path


def write_manifest(path: Path, content: object) -> None:
    (path / "manifest.json").write_text(json.dumps(content))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


HEADER = json.dumps({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()


@pytest.mark.parametrize(
    "harm",
    [
        lambda p: write_manifest(p, []),
        lambda p: write_manifest(p, {"files": ["state.json", "model.safetensors", "optim.safetensors"]}),
        lambda p: write_manifest(p, {"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}),
        lambda p: write_manifest(p, {"files": {f"{i}.safetensors": None for i in range(100_000)}}),
        lambda p: write_manifest(p, {"files": {f.name: None for f in p.iterdir() if f.name != "manifest.json"}}),
        lambda p: (p / "manifest.json").write_text("[" * 200_000),
        lambda p: (p / "manifest.json").write_text('{"files": NaN}'),
        lambda p: (p / "manifest.json").write_text(" " * (2**24 + 1)),
        lambda p: replace_by_pipe(p / "manifest.json"),
        lambda p: replace_by_link(p / "manifest.json", "/dev/zero"),
        lambda p: replace_by_pipe(p / "state.json"),
        lambda p: replace_by_link(p / "state.json", "/dev/zero"),
        lambda p: replace_by_pipe(p / "model.safetensors"),
        lambda p: os.mkfifo(p / "pipe.safetensors"),
    ],
)
def test_a_manifest_or_files_made_by_others_are_refused_in_one_short_line(harm, tmp_path: Path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    harm(path)
    with pytest.raises(CheckpointError, match="step-000001") as error:
        load_checkpoint(path)
    assert len(str(error.value)) < 1500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b'{"step": "1"}'),
        ("state.json", b'{"step": true}'),
        ("state.json", b'{"step": -1}'),
        ("state.json", b'{"step": 1.0}'),
        ("state.json", b'{"step": 2}'),
        ("state.json", b'{"step": 1e999}'),
        ("state.json", b'{"step": NaN}'),
        ("state.json", b'{"step": ' + b"9" * 5000 + b"}"),
        ("state.json", b'{"step": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("state.json", b"\xff"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 8),
        ("model.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 16),
        ("model.safetensors", (7).to_bytes(8, "little") + b'{"w":1}'),
        ("model.safetensors", (20_000).to_bytes(8, "little") + b"[" * 10_000 + b"]" * 10_000),
        ("model.safetensors", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    ],
)
def test_files_with_a_true_manifest_and_false_content_are_refused(name: str, content: bytes, tmp_path: Path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="step-000001") as error:
        load_checkpoint(sealed(path))
    assert len(str(error.value)) < 1500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.float64), r"weight has dtype torch.float64, expected torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int32), "weight has dtype torch.int32"),
        (torch.zeros(3, 2, dtype=torch.bfloat16), "weight has dtype torch.bfloat16"),
        (torch.full((3, 2), float("nan")), "weight holds numbers that are not finite"),
        (torch.full((3, 2), float("inf")), "weight holds numbers that are not finite"),
    ],
)
def test_no_dtype_is_changed_and_nothing_that_is_not_finite_is_loaded(weight: torch.Tensor, message: str):
    module = nn.Linear(2, 3)
    before = module.weight.detach().clone()
    with pytest.raises(CheckpointError, match=message):
        load_module(module, {"weight": weight, "bias": torch.zeros(3)}, "model")
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("kind", ["adamw", "lars"])
def test_every_moment_must_be_there_once_a_step_was_made(kind: str):
    def make() -> tuple[torch.optim.Optimizer, dict]:
        module = nn.Linear(2, 2)
        optimizer = make_optimizer(OptimConfig(opt=kind), [Group(list(module.parameters()))])
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        return optimizer, {p: n for n, p in module.named_parameters()}

    optimizer, names = make()
    optimizer.step()
    saved = optimizer_tensors(optimizer, names)
    assert {name.partition("/")[0] for name in saved} == set(optimizer.moments)

    def load(tensors: dict, last_epoch: float = 0.25) -> torch.optim.Optimizer:
        fresh, its_names = make()
        load_optimizer(fresh, tensors, its_names, last_epoch=last_epoch)
        assert optimizer_tensors(fresh, its_names).keys() == tensors.keys()
        return fresh

    load(saved)
    load({}, last_epoch=-0.25)  # no step was made
    with pytest.raises(CheckpointError, match="missing"):
        load({})
    for name in saved:
        with pytest.raises(CheckpointError, match=f"missing {name}"):
            load({other: tensor for other, tensor in saved.items() if other != name})
        with pytest.raises(CheckpointError, match=f"{name} has dtype"):
            load({**saved, name: saved[name].double()})
        with pytest.raises(CheckpointError, match=f"{name} has shape"):
            load({**saved, name: torch.zeros(3)})
        with pytest.raises(CheckpointError, match=f"{name} holds numbers"):
            load({**saved, name: torch.full_like(saved[name], float("nan"))})
    with pytest.raises(CheckpointError, match="unknown momentum/weight"):
        load({**saved, "momentum/weight": torch.zeros(2, 2)})
    weight_only = {name: tensor for name, tensor in saved.items() if name.endswith("weight")}
    with pytest.raises(CheckpointError, match=r"missing .*/bias"):
        load(weight_only)


def test_a_group_that_is_still_frozen_may_have_no_moments_yet():
    module = nn.Linear(2, 2)
    names = {p: n for n, p in module.named_parameters()}
    groups = [{"params": [module.weight]}, {"params": [module.bias], "from_epoch": 1}]
    optimizer = AdamW(groups, weight_decay=0.1, betas=(0.9, 0.999))
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    saved = optimizer_tensors(optimizer, names)
    for last_epoch in (0.0, 0.75):
        load_optimizer(AdamW(groups, weight_decay=0.1, betas=(0.9, 0.999)), saved, names, last_epoch=last_epoch)
    with pytest.raises(CheckpointError, match=r"missing .*/bias"):
        load_optimizer(AdamW(groups, weight_decay=0.1, betas=(0.9, 0.999)), saved, names, last_epoch=1.0)
    half = {**saved, "exp_avg/bias": torch.zeros(2), "step/bias": torch.tensor(0.0)}
    with pytest.raises(CheckpointError, match="missing exp_avg_sq/bias"):
        load_optimizer(AdamW(groups, weight_decay=0.1, betas=(0.9, 0.999)), half, names, last_epoch=0.0)


def test_there_is_no_pickle(tmp_path: Path):
    path = save_checkpoint(tmp_path, 1, PARTS, {})
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    for source in Path(checkpoint.__file__).parent.rglob("*.py"):
        assert not re.search(r"import pickle|torch\.(load|save)\(", source.read_text()), source

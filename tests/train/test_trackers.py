"""Numbers handed on to other people's dashboards: the same ones, and never at the cost of the run."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sdmp_train import trackers
from sdmp_train.advice import install
from sdmp_train.commands import pretrain
from sdmp_train.config import Config, ConfigError

CALLS: list[tuple[Any, ...]] = []


class FakeRun:
    """What wandb.init gives."""

    def log(self, values: dict[str, float], step: int) -> None:
        CALLS.append(("log", step, values))

    def finish(self) -> None:
        CALLS.append(("finish",))


def fake_wandb() -> ModuleType:
    def init(**options: Any) -> FakeRun:
        CALLS.append(("init", options))
        return FakeRun()

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    return module


def fake_mlflow(known: list[Any]) -> ModuleType:
    module: Any = ModuleType("mlflow")
    module.search_runs = lambda **options: known
    module.start_run = lambda **options: CALLS.append(("start", options))
    module.log_params = lambda values: CALLS.append(("params", values))
    module.log_metrics = lambda values, step: CALLS.append(("log", step, values))
    module.end_run = lambda: CALLS.append(("finish",))
    return module


@pytest.fixture(autouse=True)
def no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(trackers, "installed", lambda name: name in sys.modules)


def asked(tiny: Config, flag: str) -> Config:
    return replace(tiny, run=replace(tiny.run, max_steps=2, **{flag: True}))


def logged(run: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says, as a tracker is told it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [("log", row["step"], {k: v for k, v in row.items() if k not in ("step", "time")}) for row in rows]


def test_a_package_that_is_missing_is_named_before_anything_is_written(tiny: Config, tmp_path: Path):
    for flag in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(ConfigError, match=re.escape(install(flag))):
            pretrain(asked(tiny, flag), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_wandb_gets_what_metrics_jsonl_has(tiny: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb())
    assert pretrain(asked(tiny, "wandb"), tmp_path / "run") == 0
    (_, options), *rest, last = CALLS
    assert options["name"] == "run"
    assert options["config"]["optim.batch_size"] == tiny.optim.batch_size
    assert rest == logged(tmp_path / "run")
    assert last == ("finish",)


@pytest.mark.parametrize(
    "known", [[], [SimpleNamespace(info=SimpleNamespace(run_id="former"))]], ids=["new", "resumed"]
)
def test_mlflow_gets_it_too_and_goes_on_with_its_run(known: list[Any], tiny: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(known))
    assert pretrain(asked(tiny, "mlflow"), tmp_path / "run") == 0
    assert CALLS[0][1]["run_id"] == ("former" if known else None)
    assert (CALLS[1][0] == "params") is not bool(known)
    assert [call for call in CALLS if call[0] == "log"] == logged(tmp_path / "run")
    assert CALLS[-1] == ("finish",)


def test_tensorboard_writes_events_into_the_run_folder(tiny: Config, tmp_path: Path, monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert pretrain(asked(tiny, "tensorboard"), tmp_path / "run") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {(event.step, round(event.value, 4)) for event in events.Scalars("loss")}
    assert found == {(step, round(v["loss"], 4)) for _, step, v in logged(tmp_path / "run") if "loss" in v}
    assert pretrain(asked(tiny, "tensorboard"), tmp_path / "run", overwrite=True) == 0


def test_one_that_fails_costs_a_notice(tiny: Config, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb())
    monkeypatch.setattr(FakeRun, "log", lambda *_, **__: 1 / 0)
    assert pretrain(asked(tiny, "wandb"), tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert printed.count("WandB gets no more numbers: ZeroDivisionError") == 1


def test_a_server_that_refuses_stops_the_run_before_it_begins(tiny: Config, tmp_path: Path, monkeypatch):
    module = fake_wandb()
    monkeypatch.setattr(module, "init", lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match="cannot log to wandb: division by zero"):
        pretrain(asked(tiny, "wandb"), tmp_path / "run")

"""The certificate: what is measured, that it is what it says, and that the run does not notice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import CPU, same_ends

from bench.__main__ import main as bench
from sdmp_train.certify import CERTIFICATE, Arm, certificate, decoder_facts, line_of, phrase_of
from sdmp_train.commands import pretrain
from sdmp_train.config import Config
from sdmp_train.data import Loader, open_folder
from sdmp_train.jpeg_engines import NO_GPU, JpegEngines
from sdmp_train.training import build


@pytest.mark.parametrize("kind", ["tiny", "tiny_resnet"])
def test_a_certified_run_has_the_bits_of_one_that_is_not(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: Config = request.getfixturevalue(kind)
    config = replace(config, optim=replace(config.optim, epochs=4))
    assert pretrain(config, tmp_path / "a", certified=True) == 0
    assert capsys.readouterr().out.count("certify  stall") == 1
    assert pretrain(config, tmp_path / "b") == 0
    found = json.loads((tmp_path / "a" / CERTIFICATE).read_text())
    assert (found["steps"], found["blocks"], found["device"], found["device_idle_fraction"]) == (10, 1, "cpu", None)
    assert found["cores_used"]["fed"] > 0 and found["unknown"]
    assert found["decoder"]["hardware_jpeg"]["why"].startswith("no GPU here")
    assert same_ends(tmp_path / "a", tmp_path / "b")


def test_a_run_too_short_says_so_and_goes_on(tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tiny, tmp_path / "run", certified=True) == 0
    assert "certify  not measured: 8 steps are too few" in capsys.readouterr().out
    assert not (tmp_path / "run" / CERTIFICATE).exists()


class Silent(Loader):
    """One of which nothing but the name matters."""

    name, why = "resident", "for a test"

    def __iter__(self):
        return iter(())

    def __len__(self) -> int:
        return 0

    def close(self) -> None: ...


def test_the_numbers_by_hand(tiny: Config, tmp_path: Path) -> None:
    training = build(tiny, CPU, open_folder(str(tiny.data.data), cache_dir=tmp_path))
    fed = Arm(iter(()), Silent(), [1.0, 2.0, 3.0, 2.0], [0.5] * 4, [], [1, 2], wall=10.0, cpu=5.0)
    resident = Arm(iter(()), Silent(), [1.0, 1.0, 2.0, 1.0], [0.0] * 4, [], [], wall=5.0, cpu=5.0)
    index = open_folder(str(tiny.data.data), cache_dir=tmp_path)
    facts = decoder_facts(JpegEngines(7, 1, "nvJPEG says so", [3, 12]), "torchvision", index, CPU.device)
    found = certificate(training, fed, resident, 2, facts)
    assert found["stall"] == pytest.approx(1 - 5 / 8) and found["stall_p50"] == pytest.approx(0.5)
    assert found["stall_blocks"] == pytest.approx([1 - 2 / 3, 1 - 3 / 5])
    assert found["accelerator_utilization"] == pytest.approx(4 * 1.0 / 10)
    assert found["step_seconds"]["fed"]["p95"] == pytest.approx(float(np.percentile([1, 2, 3, 2], 95)))
    assert found["data_wait_fraction"] == {"fed": pytest.approx(0.25), "resident": 0}
    assert found["queue_depth"] == {"least": 1, "mean": 1.5} and found["cores_used"]["fed"] == 0.5
    line = line_of(found)
    assert "stall 50.0%" in line and "device idle unknown on a CPU" in line and "AU 40%" in line
    assert line.endswith("JPEG engines 7, not used") and "Pillow decodes" in found["decoder"]["hardware_jpeg"]["why"]


@pytest.mark.parametrize(
    ("engines", "used", "phrase"),
    [
        (NO_GPU, False, "none (no GPU here)"),
        (JpegEngines(0, 0, "this GPU has none; CUDA decodes"), False, "none (this GPU has none)"),
        (JpegEngines(7, 1, "nvJPEG says so", [0, 12]), True, "7, used (to 12%)"),
        (JpegEngines(7, 1, "nvJPEG says so", [0, 0]), False, "7, not used"),
        (JpegEngines(7, 1, "nvJPEG says so"), None, "7, use unknown"),
        (JpegEngines(None, None, "nvJPEG does not say"), None, "unknown"),
    ],
)
def test_what_is_said_of_the_engines(
    image_folder: Path, tmp_path: Path, engines: JpegEngines, used: bool | None, phrase: str
) -> None:
    pytest.importorskip("nvidia.dali")
    facts = decoder_facts(engines, "dali", open_folder(image_folder, cache_dir=tmp_path), CPU.device)
    assert (facts["used"], phrase_of(facts)) == (used, phrase)
    # On a CPU there is nothing to give a share to: DALI decodes the same images twice.
    assert facts["pixels"] == (None if engines.count == 0 else {"images": 32, "largest_difference": 0})


def test_the_benchmark(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stall", "--data", str(image_folder), "--loader", "torchvision", "--workers", "0", "--batch-size", "8"]
    assert bench([*words, "--blocks", "2", "--steps", "2", "--json", str(tmp_path / "s.json")]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["steps"], found["batch_size"], found["queue_depth"]) == (4, 8, None)
    assert "certify  stall" in capsys.readouterr().out

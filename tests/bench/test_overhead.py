"""`bench overhead`: what it times is what it says, on this machine, however long that takes."""

import json
import subprocess
import sys

import pytest
import torch

from bench import overhead


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", overhead.subjects())
def test_every_subject_can_be_called_again_and_again(name):
    call = overhead.subject(name)
    for _ in range(2):
        call()


def test_a_subject_in_a_process_of_its_own():
    command = [sys.executable, "-m", "bench.overhead", "soft_cross_entropy", "0.01"]
    done = subprocess.run(command, cwd=overhead.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["name"] == "soft_cross_entropy"
    assert row["seconds"] > 0
    # As many modules as a backend of ours needs, not a compiler's nine hundred.
    assert 0 < row["modules"] < 100
    assert "soft_cross_entropy" in overhead.line(row)


def test_ten_times_the_work_is_ten_times_the_ratio(monkeypatch):
    plain = overhead.cross_entropy()
    monkeypatch.setattr(overhead, "subject", lambda name, how="": lambda: [plain() for _ in range(1 if how else 10)])
    row = overhead.measure("ten", 0.2)
    assert 7 < row["ratio"] < 14
    assert 7 < row["eager_ratio"] < 14

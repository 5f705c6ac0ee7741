"""A small slice for pytest-benchmark: `python -m pytest bench/test_slice.py`. Compare arms within one run only."""

import pytest
import torch

from bench import info_nce, mix, soft_cross_entropy
from bench.harness import Absent

SLICE = (
    mix.setting(mix.Ask("mixup", torch.float32, torch.float32, n=16, px=96), torch.device("cpu"), "tiny"),
    mix.setting(mix.Ask("resizemix", torch.float32, torch.float32, n=16, px=96), torch.device("cpu"), "tiny"),
    info_nce.setting(n=256, width=64, dtype=torch.float32, device=torch.device("cpu"), size="tiny"),
    soft_cross_entropy.setting(n=256, columns=1000, dtype=torch.float32, device=torch.device("cpu"), size="tiny"),
)
WANTED = ("copy", "sdmp", "eager")


def pairs():
    for setting in SLICE:
        for arm in setting.arms:
            if arm.name.startswith(WANTED) and "triton" not in arm.name:
                yield pytest.param(setting, arm, id=f"{setting.op}-{setting.config.get('rule', '')}-{arm.name}")


@pytest.mark.parametrize(("setting", "arm"), pairs())
def test_time(benchmark, setting, arm):
    try:
        call = arm.bind(setting.inputs(0))
    except Absent as absent:
        pytest.skip(str(absent))
    benchmark.group = setting.name
    results = benchmark(call.run)
    assert all(result.isfinite().all() for result in results)

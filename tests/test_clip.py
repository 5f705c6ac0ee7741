"""`clip_loss`: both directions, both towers, a learnt temperature, mixed pairs, and several ranks."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ops.losses import each_backend
from torch import Tensor

from sdmp_kernels import TwoHot, clip_loss, draw_plan, use_backend

ROOT = Path(__file__).resolve().parents[1]


def towers(n: int = 7, d: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return image.to(dtype), text.to(dtype)


def plain(image: Tensor, text: Tensor, temperature: Tensor, targets: tuple[TwoHot, TwoHot]) -> Tensor:
    """As CLIP's own pseudocode has it (Figure 3), with dense targets."""
    logits = image @ text.T / temperature
    dense = [target.dense(len(image)).to(logits) for target in targets]
    return 0.5 * (F.cross_entropy(logits, dense[0]) + F.cross_entropy(logits.T, dense[1]))


def mixed(n: int) -> tuple[TwoHot, TwoHot]:
    plans = [draw_plan(n, (32, 32), per="sample", seed=seed, step=1) for seed in (0, 1)]
    return plans[0].source_target(), plans[1].source_target()


def results(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_towers_and_the_temperature_get_the_gradient_of_the_plain_form(backend, dtype):
    given = towers(dtype=dtype)
    targets = mixed(7)
    temperature = torch.tensor(0.07, dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (*given, temperature)]
    exact = [t.double().requires_grad_() for t in (*given, temperature)]
    truth = results(plain(*exact, targets), exact)
    with use_backend(backend):
        got = results(clip_loss(leaves[0], leaves[1], temperature=leaves[2], target=targets), leaves)
        number = clip_loss(*given, temperature=0.07, target=targets)
    eps = torch.finfo(dtype).eps
    for name, result, right in zip(("loss", "image", "text", "temperature"), got, truth, strict=True):
        assert torch.allclose(result.double(), right, rtol=8 * eps, atol=2 * eps), name
    assert torch.allclose(number, got[0], rtol=1e-6)


def test_without_a_target_each_pair_is_its_own_and_one_target_holds_both_ways():
    image, text = towers()
    own = F.cross_entropy(image @ text.T / 0.1, torch.arange(7)), F.cross_entropy(text @ image.T / 0.1, torch.arange(7))
    assert torch.allclose(clip_loss(image, text, temperature=0.1), sum(own) / 2)
    target, _ = mixed(7)
    assert torch.equal(
        clip_loss(image, text, temperature=0.1, target=target),
        clip_loss(image, text, temperature=0.1, target=(target, target)),
    )
    rows = clip_loss(image, text, temperature=0.1, target=target, reduction="none")
    assert rows.shape == (7,)
    assert torch.allclose(rows.mean(), clip_loss(image, text, temperature=0.1, target=target))


def test_gradcheck():
    image, text = (t.requires_grad_() for t in towers(4, 3, torch.float64))
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, t, s: clip_loss(i, t, temperature=s), (image, text, temperature))


def test_it_compiles_to_one_graph():
    torch._dynamo.reset()
    image, text = (t.requires_grad_() for t in towers())
    temperature = torch.tensor(0.1, requires_grad=True)

    def loss(i: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return clip_loss(i, t, temperature=s)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [image, text, temperature]
    expected, got = (results(run(*leaves), leaves) for run in (loss, compiled))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


RANK = """
import sys, torch, torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from sdmp_kernels import clip_loss
sys.path.insert(0, "tests")
from test_clip import mixed, results, towers
dist.init_process_group("gloo")
rank = dist.get_rank()
mine = [t[3 * rank : 3 * rank + 3].clone().requires_grad_() for t in towers(6)]
temperature = torch.tensor(0.2, requires_grad=True)
image, text = (torch.cat(all_gather(t)) for t in mine)
loss, *grads = results(clip_loss(image, text, temperature=temperature, target=mixed(6)), [*mine, temperature])
leaves = [t.clone().requires_grad_() for t in (*towers(6), torch.tensor(0.2))]
alone, *whole = results(clip_loss(leaves[0], leaves[1], temperature=leaves[2], target=mixed(6)), leaves)
assert torch.allclose(loss, alone)
for grad, full in zip(grads[:2], whole[:2]):
    # Every rank's loss reaches every rank's rows: what averaging over ranks divides by.
    assert torch.allclose(grad / 2, full[3 * rank : 3 * rank + 3], atol=1e-6)
assert torch.allclose(grads[2], whole[2], atol=1e-6)
dist.destroy_process_group()
print("equal")
"""


def test_two_ranks_equal_one_process():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK],
            env={**common, "RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in ranks:
        said, errors = process.communicate(timeout=120)
        assert said.strip() == "equal", errors[-2000:]


GOOD = {"image": torch.zeros(3, 4), "text": torch.zeros(3, 4), "temperature": 0.1}
WRONG = [
    ({"text": torch.zeros(4, 4)}, ValueError, "image and text must have one row per pair and the same D, got (3, 4)"),
    ({"text": torch.zeros(3, 4).half()}, TypeError, "text must be float32, got float16"),
    ({"temperature": torch.zeros(2)}, ValueError, "temperature must be a number above 0 or a float tensor of one"),
    ({"temperature": torch.tensor(0.0)}, ValueError, "temperature must be above 0, got 0"),
    ({"temperature": torch.tensor(1)}, ValueError, "temperature must be a number above 0 or a float tensor of one"),
    ({"temperature": 0.0}, ValueError, "temperature must be a number above 0, got 0.0"),
    ({"reduction": "average"}, ValueError, "reduction='average' is unknown"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        clip_loss(**{**GOOD, **changes})

"""What must be true of another library's mixing, and that this notices when it is not."""

import pytest
import torch

from bench import info_nce, peers
from bench.harness import Absent
from sdmp_kernels import Rule, draw_plan, mix


@pytest.fixture
def images():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rule", "name"), [(Rule.MIXUP, "mixup"), (Rule.CUTMIX, "cutmix")])
def test_a_mixed_batch_obeys_the_law_of_its_rule_and_no_other(images, rule, name):
    mixed = mix(images, draw_plan(6, (16, 16), rules=[name], seed=3, step=0))
    partner = images.flip(0)
    assert peers.mixing_error(mixed, images, partner, [rule]) < 1e-6
    assert peers.mixing_error(mixed, images, partner, [Rule.MIXUP, Rule.CUTMIX]) < 1e-6
    other = Rule.CUTMIX if rule == Rule.MIXUP else Rule.MIXUP
    assert peers.mixing_error(mixed, images, partner, [other]) > 0.1
    assert peers.mixing_error(mixed, images, images.roll(1, 0), [rule]) > 0.1


def test_one_wrong_pixel_is_seen(images):
    mixed = mix(images, draw_plan(6, (16, 16), rules=["mixup"], seed=3, step=0))
    mixed[4, 2, 15, 15] += 0.5
    assert peers.mixing_error(mixed, images, images.flip(0), [Rule.MIXUP]) > 0.4


def test_what_is_not_installed_says_how_to_get_it():
    with pytest.raises(Absent, match=r"no-such-thing is not installed \(pip install no-such-thing\)"):
        peers.require("no_such_thing", "no-such-thing")


def test_the_official_style_loop_mixes_as_the_plan_says(images):
    plan = draw_plan(6, (16, 16), per="sample", seed=1, step=0)
    call = peers.official_loop(lambda inputs: inputs["images"]).bind({"images": images, "plan": plan})
    torch.testing.assert_close(call.run()[0], mix(images, plan))


def test_hard_label_peers_are_held_to_loss_and_gradient():
    """By an arm that is right, and by one whose gradient alone is wrong."""
    asked = info_nce.setting(n=16, width=8, dtype=torch.float32, device=torch.device("cpu"), size="tiny")
    inputs = asked.inputs(0)
    logits = inputs["q"] @ inputs["k"][0].T / inputs["temperature"]
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(16))
    (grad,) = torch.autograd.grad(loss, [inputs["q"]])
    assert peers.hard_error(inputs, [loss.detach(), grad]) < 1e-6
    assert peers.hard_error(inputs, [loss.detach(), 1.2 * grad]) > 0.1
    assert peers.hard_error(inputs, [1.5 * loss.detach(), grad]) > 0.1

"""The settings of `mix` and `losses`: their truths, their arms, and the numbers of bytes and operations they claim."""

from dataclasses import replace

import pytest
import torch

from bench import distillation, info_nce, losses, mix, question, soft_cross_entropy
from bench.__main__ import main
from bench.harness import Budget, largest_error, measure, short
from sdmp_kernels import Rule, draw_plan, use_backend
from sdmp_kernels import mix as mix_op

CPU = torch.device("cpu")
SIZES = ("tiny", "quick", "default", "full")


@pytest.mark.parametrize("question", [mix, losses], ids=["mix", "losses"])
@pytest.mark.parametrize("size", SIZES)
def test_names_of_settings_and_arms_are_unique(question, size):
    made = list(question.settings(CPU, size))
    names = [setting.name for setting in made]
    assert len(set(names)) == len(names)
    for setting in made:
        arms = [arm.name for arm in setting.arms]
        assert len(set(arms)) == len(arms), setting.name
        assert all(arm.what for arm in setting.arms)


@pytest.mark.parametrize(
    ("words", "short"),
    [("", False), ("--minutes 3", False), ("--minutes 1", True), ("--quick", True), ("--only mixup", True)],
)
def test_a_short_run_leaves_no_file_that_would_be_taken_for_the_newest(words, short, monkeypatch):
    asked = []
    monkeypatch.setattr("bench.__main__.run", lambda args: asked.append(args) or 0)
    main(["mix", *words.split()])
    assert question.is_short(asked[0]) is short


@pytest.mark.parametrize("rule", list(mix.RULES))
def test_the_expression_that_is_compiled_mixes_as_the_reference_does(rule):
    """The baseline must do the same work: it is run here as it is, before Inductor sees it."""
    ask = mix.Ask(rule, torch.float32, torch.float32, n=6, px=16)
    inputs = mix.make_inputs(ask, CPU, 0)
    plan, images = inputs["plan"], inputs["images"]
    resized = mix.bilinear(images.flip(0), plan.box)
    with use_backend("reference", "mix"):
        expected = mix_op(images, plan)
    inside = mix.box_mask(plan.box, 16) & (plan.rule == Rule.RESIZEMIX).view(-1, 1, 1, 1)
    torch.testing.assert_close(torch.where(inside, resized, 0.0), torch.where(inside, expected, 0.0), atol=1e-4, rtol=0)
    grid = mix.resized_by_grid(images, plan)
    torch.testing.assert_close(torch.where(inside, grid, 0.0), torch.where(inside, expected, 0.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["cutmix", "resizemix"])
def test_every_arm_of_the_single_rules_is_right(rule):
    """The two rules that the dry run of `bench gpu` leaves out, but for interpreted Triton."""
    asked = mix.setting(mix.Ask(rule, torch.float32, torch.float32, n=4, px=16), CPU, "tiny")
    arms = [arm for arm in asked.arms if "triton" not in arm.name]
    budget = Budget(seconds=0.0, min_rounds=1, max_rounds=1, warmup_seconds=0.0)
    row = measure(replace(asked, arms=arms), CPU, budget, lambda _: None)
    assert {arm["name"]: arm.get("reason") for arm in row["arms"] if arm["status"] not in ("ok", "absent")} == {}
    assert any(arm["kind"] == "eager" and arm["status"] == "ok" for arm in row["arms"])


def test_the_literal_loop_is_the_plan():
    plan = draw_plan(7, (16, 16), per="sample", seed=5, step=0)
    images = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mix.literal_loop(images, plan), mix_op(images, plan))


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("key_grad", [False, True])
def test_the_truth_of_the_contrastive_settings_is_algorithm_1(terms, key_grad):
    """Against autograd in float64 on the paper's own lines."""
    asked = info_nce.setting(n=9, width=8, dtype=torch.float64, device=CPU, size="tiny", terms=terms, key_grad=key_grad)
    inputs = asked.inputs(0)
    loss = info_nce.algorithm1(inputs["q"], inputs["k"], inputs["plan"].lam)
    expected = [loss.detach(), *torch.autograd.grad(loss, inputs["leaves"])]
    for exact, wanted in zip(asked.truth(inputs), expected, strict=True):
        assert largest_error(exact, wanted) < 1e-7
    assert len(expected) == len(asked.outputs)


def test_the_truths_of_given_logits_and_distillation_are_autograds():
    given = soft_cross_entropy.setting(n=5, columns=11, dtype=torch.float64, device=CPU, size="tiny")
    inputs = given.inputs(0)
    for exact, wanted in zip(given.truth(inputs), given.plain(inputs), strict=True):
        assert largest_error(exact, wanted) < 1e-7
    distilled = distillation.setting(n=4, columns=13, dtype=torch.float64, device=CPU, size="tiny")
    inputs = distilled.inputs(0)
    loss = distillation.collapsed(*distillation._given(inputs))
    wanted = [loss.detach(), *torch.autograd.grad(loss, inputs["leaves"])]
    for exact, expected in zip(distilled.truth(inputs), wanted, strict=True):
        assert largest_error(exact, expected) < 1e-5  # the plain form works in float32


def test_every_claim_of_the_goals_finds_its_row_among_the_settings():
    """A goal whose row no default run makes would read "not measured" for ever."""
    from bench import goals, step

    for device in ("cpu", "cuda"):
        made = [*_configs(mix, device), *_configs(losses, device)]
        for claim in goals.CLAIMS:
            if claim.device != device or claim.op in ("step", "loader"):
                continue
            found = [c for op, c in made if op == claim.op and all(c.get(k) == v for k, v in claim.config.items())]
            assert found, claim
    assert step.Feed(CPU, "tiny", 4).px == 16


def _configs(question, device):
    """What a default run asks on a device, without making anything on it."""
    if question is mix:
        return [("mix", ask.config) for ask in mix.asks(device, "default")]
    made = []

    def note(op, *names):
        def take(**asked):
            asked.pop("device"), asked.pop("size")
            made.append((op, {**asked, "dtype": short(asked["dtype"])}))

        return take

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        for module in (info_nce, soft_cross_entropy, distillation):
            patched.setattr(module, "setting", note(module.__name__.rpartition(".")[2]))
        list(losses.settings(torch.device(device), "default"))
    defaults = {
        "info_nce": {"terms": 1, "key_grad": False},
        "soft_cross_entropy": {"forward": False},
        "distillation": {"v": 10, "t": 2},
    }
    named = []
    for op, asked in made:
        config = {**defaults[op], **asked}
        config |= {"d": config["width"]} if op == "info_nce" else {"k": config["columns"]}
        named.append((op, config))
    return named


@pytest.mark.parametrize("question", [mix, losses], ids=["mix", "losses"])
def test_small_sizes_on_a_gpu_are_replayed_too(question, monkeypatch):
    """Built, not run: the names of what a GPU would be asked, with a replayed ceiling beside every replayed arm."""
    monkeypatch.setattr("bench.harness.default_backend", lambda op, device: "triton")
    monkeypatch.setattr("bench.mix.default_backend", lambda op, device: "triton")
    replayed = 0
    for setting in question.settings(torch.device("cuda"), "default"):
        names = [arm.name for arm in setting.arms]
        assert len(set(names)) == len(names)
        graphs = [arm for arm in setting.arms if arm.graph]
        if graphs:
            replayed += 1
            assert all(arm.name.endswith(", graph") for arm in graphs)
            assert any(arm.kind == "ceiling" for arm in graphs)
            assert any(arm.name == "sdmp triton, graph" for arm in graphs)
    assert replayed >= 2

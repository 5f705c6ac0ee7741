"""DINO and DINO + SDMP: the loss is that of the papers, the pixels are as planned, and what follows a step follows it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import all_tensors, as_batch, at_step, build_method, build_training, loss_of, random_views

from sdmp_kernels import make_plan
from sdmp_train.config import Config, ConfigError, ModelConfig
from sdmp_train.guard import StopRequest
from sdmp_train.loop import step
from sdmp_train.methods.dino import DINO, DINOConfig, Features, Plan, teacher_temperature

ROWS, K = 8, 64


def of(config: Config, **changes: object) -> Config:
    return replace(config, method=replace(config.method, **changes))


def random_features(method: DINO, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    teachers = 4 if method.crops.mixed else 2
    student = torch.randn(method.crops.total, ROWS, K, generator=generator, dtype=torch.float64)
    return Features(student.requires_grad_(), torch.randn(teachers, ROWS, K, generator=generator, dtype=torch.float64))


def cross_entropy(probability: torch.Tensor, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return -(probability * (logits / temperature).log_softmax(-1)).sum()


def by_the_papers(method: DINO, features: Features, plan: Plan, temperature: float) -> torch.Tensor:
    """DINO's loss on the clean crops, plus Eq. 7 and Eq. 8 of the paper on the mixed ones, term after term."""
    config, center = method.config, method.center.value.double()
    teacher = ((features.teacher - center) / temperature).softmax(-1)
    student, total = features.student, torch.zeros((), dtype=torch.float64)
    mixed = sorted(plan.student)
    clean = [crop for crop in range(len(student)) if crop not in mixed]

    terms = [
        cross_entropy(teacher[view, i], student[crop, i], config.student_temp)
        for i in range(ROWS)
        for view in (0, 1)
        for crop in clean
        if crop != view
    ]
    total = total + sum(terms) / len(terms)

    for loss in ("source", "mixed"):
        terms = []
        for i in range(ROWS):
            for view in (0, 1):
                for crop in mixed:
                    if crop == view:
                        continue
                    flipped = ROWS - 1 - i
                    lam = float(plan.student[crop].lam[i])
                    logits = student[crop, i]
                    if loss == "source":
                        share = 0.5 if config.source_weight == "static" else lam
                        own, other = teacher[view, i], teacher[view, flipped]
                    else:
                        keys = plan.teacher[view].lam
                        overlap = 1 - abs(lam - float(keys[i]))
                        cross = 1 - abs(lam + float(keys[flipped]) - 1)
                        share = 0.5 if config.pair_weight == "static" else overlap / (overlap + cross)
                        own, other = teacher[2 + view, i], teacher[2 + view, flipped]
                    terms.append(
                        share * cross_entropy(own, logits, config.student_temp)
                        + (1 - share) * cross_entropy(other, logits, config.student_temp)
                    )
        if terms:
            total = total + config.mix_weight * sum(terms) / len(terms)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixing": "none"},
        {"local_crops_number": 0},
        {"local_crops_number": 0, "mixing": "none"},
        {"local_crops_number": 2, "mix_weight": 0.5, "per": "sample"},
        {"source_weight": "static", "pair_weight": "static"},
        {"rules": ("resizemix",), "shared_lam": True},
        {"warmup_teacher_temp": 0.02, "teacher_temp": 0.08, "warmup_teacher_temp_epochs": 3, "student_temp": 0.2},
    ],
    ids=str,
)
def test_the_loss_and_its_gradient_are_those_of_the_papers(changes: dict, tiny_dino: Config) -> None:
    method = build_method(of(tiny_dino, **changes))
    method.center.value.copy_(torch.linspace(-1, 1, K))
    at = at_step(5)  # in the second epoch
    plan, features = method.plan(at), random_features(method)
    loss = method.loss(features, plan, as_batch(random_views(tiny_dino)), at).total
    (found,) = torch.autograd.grad(loss, features.student)
    expected = by_the_papers(method, features, plan, teacher_temperature(at, method.config))
    (gradient,) = torch.autograd.grad(expected, features.student)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-8)


def test_with_lam_1_the_mixed_crops_are_clean_ones_counted_anew(tiny_dino: Config) -> None:
    """lam = 1: own overlap 1 and cross overlap 1 - |1 + 1 - 1| = 0, so both mixing losses are H of the row's own views."""
    method = build_method(tiny_dino)
    at, features = at_step(0), random_features(method)
    drawn = method.plan(at)

    def unmixed(size: tuple[int, int]):
        return make_plan("mixup", torch.ones(ROWS), size)

    plan = Plan({crop: unmixed((16, 16)) for crop in drawn.student}, tuple(unmixed((32, 32)) for _ in range(2)))
    loss = method.loss(features, plan, as_batch(random_views(tiny_dino)), at).total
    teacher = (features.teacher / method.config.teacher_temp).softmax(-1)
    student = (features.student / method.config.student_temp).log_softmax(-1)
    entropy = -torch.einsum("tnk,vnk->vt", teacher, student) / ROWS
    pairs = [(v, t) for v in range(4) for t in range(2) if v != t]
    expected = torch.stack([entropy[pair] for pair in pairs]).mean() + entropy[4:, :2].mean() + entropy[4:, 2:].mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def test_half_of_the_local_crops_are_mixed_and_without_any_one_global_view_is(tiny_dino: Config) -> None:
    table = {8: (6, 7, 8, 9), 6: (5, 6, 7), 2: (3,), 3: (4,), 0: (1,)}
    for count, mixed in table.items():
        crops = build_method(of(tiny_dino, local_crops_number=count)).crops
        assert (crops.total, crops.mixed) == (2 + count, mixed)
    crops = build_method(of(tiny_dino, local_crops_number=8, mixing="none")).crops
    assert len(crops.clean_pairs) == 18, "DINO's own number of terms"
    with pytest.raises(ConfigError, match="local_crops_number is 1; expected 0, or 2 and more"):
        DINOConfig(local_crops_number=1)


@pytest.mark.parametrize("local", [4, 0])
def test_the_pixels_that_reach_the_encoders_are_as_planned(local: int, tiny_dino: Config) -> None:
    config = of(tiny_dino, local_crops_number=local, rules=("cutmix",))
    method, views = build_method(config), random_views(of(tiny_dino, local_crops_number=local))
    plan = method.plan(at_step(3))
    images = method.mix(as_batch(views), plan)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.data.mean, config.data.std))

    def expected(view: torch.Tensor, mixed, row: int) -> torch.Tensor:
        pixels = view[row].clone()
        if mixed is not None:
            top, left, height, width = mixed.box[row].tolist()
            box = (slice(None), slice(top, top + height), slice(left, left + width))
            pixels[box] = view[ROWS - 1 - row][box]
        return (pixels / 255 - mean) / std

    def check(found: torch.Tensor, crops: list[tuple[int, object]]) -> None:
        assert len(found) == len(crops) * ROWS
        for place, (crop, mixed) in enumerate(crops):
            for row in range(ROWS):
                torch.testing.assert_close(found[place * ROWS + row], expected(views[crop], mixed, row))

    check(images.teacher[0], [(0, None), (1, None)])
    check(images.teacher[1], [(0, plan.teacher[0]), (1, plan.teacher[1])])
    check(images.student[0], [(0, None), (1, None if local else plan.teacher[1])])
    if local:
        check(images.student[1], [(crop, plan.student.get(crop)) for crop in range(2, 6)])
        assert set(plan.student) == {4, 5}


def test_one_lam_serves_all_crops_of_a_size_and_boxes_are_drawn_for_each(tiny_dino: Config) -> None:
    method = build_method(of(tiny_dino, rules=("cutmix", "resizemix"), per="sample"))
    boxes_differ = False
    for number in range(5):
        plan = method.plan(at_step(number))
        for plans in ([plan.student[4], plan.student[5]], plan.teacher):
            assert torch.equal(plans[0].lam, plans[1].lam)
            assert torch.equal(plans[0].rule, plans[1].rule)
            boxes_differ |= not torch.equal(plans[0].box, plans[1].box)
        assert (plan.student[4].lam - plan.teacher[0].lam).abs().max() < 2 / 16
    assert boxes_differ


def test_every_loss_is_one_call_of_the_op(tiny_dino: Config, monkeypatch) -> None:
    from sdmp_train.methods import dino

    calls = []
    honest = dino.distillation
    monkeypatch.setattr(dino, "distillation", lambda *a, **k: calls.append(1) or honest(*a, **k))
    training = build_training(replace(tiny_dino, run=replace(tiny_dino.run, log_every_steps=2)))
    step(training, [as_batch(random_views(tiny_dino))], StopRequest())
    assert calls == [1]


def test_a_line_takes_the_loss_apart_and_says_the_teachers_entropy(tiny_dino: Config) -> None:
    training = build_training(tiny_dino)
    made = step(training, [as_batch(random_views(tiny_dino))], StopRequest())
    facts = made.loss.facts
    parts = [facts[f"loss_{name}"] for name in ("clean", "source", "mixed")]
    torch.testing.assert_close(sum(parts), made.loss.total)
    assert len({round(float(part), 6) for part in parts}) == 3
    method = build_method(tiny_dino)
    features = random_features(method)
    method.loss(features, method.plan(at_step(0)), as_batch(random_views(tiny_dino)), at_step(0))
    method.teacher.seen = torch.randn(ROWS, 32)
    probability = (features.teacher[:2] / method.config.teacher_temp).softmax(-1)
    entropy = -(probability * probability.clamp_min(1e-300).log()).sum(-1).mean()
    assert float(method.health(features)["teacher_entropy"]) == pytest.approx(float(entropy), rel=1e-4)


def test_a_teacher_that_finds_all_prototypes_alike_has_collapsed(tiny_dino: Config) -> None:
    method = build_method(tiny_dino)
    well = {"teacher_entropy": 2.0, "feature_std": 0.5, "effective_rank": 9.0}
    assert method.collapse(well) is None
    assert "all prototypes alike (entropy 4.158" in method.collapse({**well, "teacher_entropy": 4.158})
    assert "nearly the same" in method.collapse({**well, "feature_std": 0.01})


def test_the_teacher_follows_and_its_center_is_the_mean_of_clean_views(tiny_dino: Config) -> None:
    training = build_training(tiny_dino)
    method, views = training.method, random_views(tiny_dino)
    training.step = 2
    method.teacher.load_state_dict({k: v + 0.01 for k, v in method.teacher.state_dict().items()})
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    method.center.value.fill_(0.5)
    with torch.no_grad():
        clean = method.teacher(method.mix(as_batch(views), method.plan(training.at)).teacher[0])
    step(training, [as_batch(views)], StopRequest())
    torch.testing.assert_close(method.center.value, 0.9 * torch.full((K,), 0.5) + 0.1 * clean.mean(dim=0))
    momentum = 1 - (1 - 0.996) * (math.cos(math.pi * 2 / 8) + 1) / 2
    student = method.student.state_dict()
    for name, tensor in method.teacher.state_dict().items():
        torch.testing.assert_close(tensor, momentum * before[name] + (1 - momentum) * student[name])


def test_center_and_teacher_move_once_where_gradients_accumulate(tiny_dino: Config) -> None:
    training = build_training(tiny_dino)
    first, second = random_views(tiny_dino), random_views(tiny_dino, seed=1)
    with torch.no_grad():
        clean = [
            training.method.teacher(training.method.mix(as_batch(v), Plan({}, ())).teacher[0]) for v in (first, second)
        ]
    step(training, [as_batch(first), as_batch(second)], StopRequest())
    torch.testing.assert_close(training.method.center.value, 0.1 * torch.cat(clean).mean(dim=0))


def test_a_bad_step_moves_nothing_the_center_included(tiny_dino: Config) -> None:
    training = build_training(tiny_dino)
    step(training, [as_batch(random_views(tiny_dino))], StopRequest())
    before = all_tensors(training)
    with torch.no_grad():
        training.method.teacher.head.mlp[0].bias[0] = float("nan")
    poisoned = training.method.teacher.head.mlp[0].bias.clone()
    made = step(training, [as_batch(random_views(tiny_dino, seed=1))], StopRequest())
    assert bool(made.flags[0])
    after = all_tensors(training)
    assert torch.equal(after.pop("teacher.head.mlp.0.bias").isnan(), poisoned.isnan())
    before.pop("teacher.head.mlp.0.bias")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert float(after["center.value"].abs().sum()) > 0


def test_prototypes_are_frozen_in_the_first_epoch_and_keep_their_length(tiny_dino: Config) -> None:
    training = build_training(of(tiny_dino, freeze_last_layer=1))
    last = training.method.student.head.last_layer
    start, bias = last.direction.clone(), training.method.student.head.mlp[0].bias.clone()
    for number in range(6):
        step(training, [as_batch(random_views(tiny_dino, seed=number))], StopRequest())
        assert torch.equal(last.direction, start) is (number < 4), "four steps an epoch"
    assert not torch.equal(training.method.student.head.mlp[0].bias, bias)
    assert torch.equal(last.gain, torch.ones(K, 1))
    assert build_method(of(tiny_dino, norm_last_layer=False)).student.head.last_layer.gain.requires_grad


def test_only_matrices_decay(tiny_dino: Config) -> None:
    method = build_method(of(tiny_dino, norm_last_layer=False))
    matrices, vectors, last = method.groups()
    assert matrices.decays and not vectors.decays and last.from_epoch == 0
    assert all(p.ndim > 1 for p in matrices.parameters) and all(p.ndim <= 1 for p in vectors.parameters)
    grouped = [id(p) for group in method.groups() for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in method.student.parameters())


def test_the_teachers_temperature_rises_from_epoch_to_epoch() -> None:
    config = DINOConfig(warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=4)
    found = [teacher_temperature(at_step(number), config) for number in range(0, 24)]
    expected = [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]  # numpy.linspace(0.04, 0.07, 4), then 0.07
    assert found == pytest.approx([value for value in expected for _ in range(4)])
    assert teacher_temperature(at_step(0), DINOConfig()) == 0.04


def test_the_teacher_starts_as_the_student_and_has_no_drop_path(tiny_dino: Config) -> None:
    method = build_method(tiny_dino)
    assert method.student.state_dict().keys() == method.teacher.state_dict().keys()
    for name, tensor in method.student.state_dict().items():
        assert torch.equal(tensor, method.teacher.state_dict()[name]), name
    drops = [m for m in method.student.modules() if type(m).__name__ == "DropPath"]
    assert drops and drops[-1].drop_prob == 0.5
    assert not [m for m in method.teacher.modules() if type(m).__name__ == "DropPath"]
    assert method.backbone is method.teacher.backbone
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_local_crops_take_interpolated_positions(tiny_dino: Config) -> None:
    method = build_method(tiny_dino)
    with torch.no_grad():
        method.teacher.backbone.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
        images = torch.zeros(1, 3, 16, 16)
        before = method.teacher.backbone(images)
        method.teacher.backbone.pos_embed[:, 1:] += torch.linspace(0, 4, 16).view(1, 16, 1)
        assert not torch.equal(method.teacher.backbone(images), before), "2 x 2 patches see the 4 x 4 positions"


def test_vit_small_has_dinos_six_heads(tiny_dino: Config) -> None:
    config = replace(tiny_dino, model=ModelConfig(arch="vit_small", depth=1))
    assert build_method(config).backbone.blocks[0].attn.num_heads == 6


def test_local_crops_larger_than_the_views_are_refused(tiny_dino: Config) -> None:
    with pytest.raises(ConfigError, match="local_px is 96; expected at most image_px, which is 32"):
        build_method(of(tiny_dino, local_px=96))


def test_a_resnet_learns_too_and_batch_norms_follow_their_own_images(tiny_dino: Config, tiny_resnet: Config) -> None:
    config = replace(tiny_dino, model=tiny_resnet.model)
    training = build_training(config)
    for number in range(2):
        made = step(training, [as_batch(random_views(config, seed=number))], StopRequest())
        assert bool(made.loss.total.isfinite())
    statistics = training.method.teacher.backbone.state_dict()
    moved = [k for k, v in statistics.items() if k.endswith("running_mean") and float(v.abs().sum())]
    assert moved


def test_the_loss_starts_near_chance(tiny_dino: Config) -> None:
    """With 256 dimensions, as DINO has, the prototypes of the start are nearly orthogonal to any feature."""
    config = of(tiny_dino, bottleneck_dim=256, head_dim=64, drop_path_rate=0.0)
    method = build_method(config)
    loss = loss_of(method, random_views(config), method.plan(at_step(0)))
    assert float(loss.total.detach()) == pytest.approx(3 * math.log(K), rel=0.15)


def test_what_it_says_of_itself(tiny_dino: Config) -> None:
    said = build_method(tiny_dino).describe()
    assert said == (
        "distillation of 6 crops from 2 views + 1 source + 1 mixed (2 of 4 local crops mixed), 64 prototypes; "
        f"chance level {3 * math.log(64):.3f}"
    )
    assert "source" not in build_method(of(tiny_dino, mixing="none")).describe()

"""Training on labels: the targets are the shares of the pixels, the classes are learned, and the run is a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import CPU, as_batch, at_step, build_method, random_views
from torch.nn.functional import avg_pool2d, cross_entropy, one_hot

from sdmp_kernels import draw_plan, mix
from sdmp_train.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig
from sdmp_train.data import Batch
from sdmp_train.data.shapes import draw
from sdmp_train.guard import StopRequest
from sdmp_train.loop import step
from sdmp_train.methods.supervised import SupervisedConfig
from sdmp_train.training import assemble

SHAPES = ("bricks", "checks", "crosses", "discs")
PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def pictures(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` of the embedded pictures of each of `SHAPES`, at 32 px, and their labels."""
    drawn = torch.cat([torch.from_numpy(draw(name, count, split)) for name in SHAPES]).permute(0, 3, 1, 2)
    images = avg_pool2d(drawn.float(), 2).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(len(SHAPES)).repeat_interleave(count)


def test_it_learns_the_embedded_classes_from_mixed_images():
    """Four in five held-out pictures of four classes after 150 steps (chance: one in four; 92 to 95 % were measured)."""
    steps, rows = 150, 64
    config = Config(
        data=DataConfig(image_px=32, **PIXELS),
        model=ModelConfig(arch="test_resnet"),
        method=SupervisedConfig(prob=0.5),
        optim=OptimConfig(batch_size=rows, epochs=1, warmup_epochs=0.1, base_lr=0.03, weight_decay=0.05),
    )
    training = assemble(config, CPU, steps_per_epoch=steps, classes=len(SHAPES))
    images, labels = pictures("train", 128)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(len(labels), (rows,), generator=generator)
        flipped = torch.rand(rows, 1, 1, 1, generator=generator) < 0.5
        view = torch.where(flipped, images[ids].flip(3), images[ids])
        step(training, [Batch((view,), ids, labels[ids], torch.ones(rows, dtype=torch.bool))], StopRequest())
    unseen, expected = pictures("val", 50)
    clean = mix(unseen, draw_plan(len(unseen), (32, 32), prob=0.0, step=0), dtype=torch.float32, **PIXELS)
    with torch.inference_mode():
        guess = training.method.classifier.eval()(clean).argmax(dim=1)
    assert (guess == expected).float().mean() > 0.8


def test_the_loss_is_cross_entropy_with_labels_mixed_as_the_pixels(tiny_supervised: Config):
    config = replace(tiny_supervised, method=SupervisedConfig(rules=("cutmix",), label_smoothing=0.1))
    method = build_method(config)
    plan, batch = method.plan(at_step(0)), as_batch(random_views(config, 1))
    images = method.mix(batch, plan)
    logits = method.encode(images)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (config.data.mean, config.data.std))
    own = (((images * std + mean) * 255 - batch.views[0].float()).abs() < 1e-2).all(dim=1).float().mean(dim=(1, 2))
    labels = one_hot(batch.labels, 3)
    target = own[:, None] * labels + (1 - own[:, None]) * labels.flip(0)
    loss = method.loss(logits, plan, batch, at_step(0))
    torch.testing.assert_close(loss.total, cross_entropy(logits, target, label_smoothing=0.1), rtol=1e-4, atol=1e-5)
    right = target.gather(1, logits.argmax(dim=1, keepdim=True)).mean()
    torch.testing.assert_close(loss.facts["top1"], right, rtol=1e-4, atol=1e-5)
    assert float(loss.total.detach()) == pytest.approx(math.log(3), rel=0.1)
    assert f"chance level {math.log(3):.3f}" in method.describe()


def test_norms_and_biases_do_not_decay_and_nothing_is_left_out(tiny_supervised: Config):
    method = build_method(tiny_supervised)
    decaying, others = method.groups()
    assert (decaying.decays, others.decays) == (True, False)
    assert all(p.ndim > 1 for p in decaying.parameters) and all(p.ndim <= 1 for p in others.parameters)
    assert len(decaying.parameters) + len(others.parameters) == len(list(method.trained.parameters()))


def test_without_classes_it_is_refused(tiny_supervised: Config):
    with pytest.raises(ConfigError, match="at least two class folders, and there are 1"):
        assemble(tiny_supervised, CPU, steps_per_epoch=4, classes=1)


def test_clean_training_is_said_and_drawn_as_such(tiny_supervised: Config):
    method = build_method(replace(tiny_supervised, method=SupervisedConfig(prob=0.0)))
    batch = as_batch(random_views(tiny_supervised, 1))
    assert method.example(batch) == []
    assert ", clean;" in method.describe()
    assert torch.equal(method.plan(at_step(3)).lam, torch.ones(8))


@pytest.mark.parametrize(("changes", "name"), [({"prob": 1.5}, "mix_prob"), ({"label_smoothing": 1.0}, "smoothing")])
def test_a_wrong_value_is_refused_by_name(changes: dict, name: str):
    with pytest.raises(ConfigError, match=name):
        SupervisedConfig(**changes)

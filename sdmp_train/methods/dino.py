"""DINO with SDMP: multi-crop self-distillation, of which half of the local crops may be mixed.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers (2021), for DINO; Ren et al., A Simple Data
Mixing Prior for Improving Self-Supervised Learning (2022), section 3.3 and Eq. 7 to 9, for SDMP. No code of the paper
for DINO was ever released: what Eq. 7 to 9 leave open is our reading, and docs/methods.md says which.

Letters: N rows per rank, V student crops, T teacher views, D features, K prototypes (`out_dim`), H W pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdmp_kernels import MixPlan, distillation, draw_plan, mix
from sdmp_kernels.views import Size, view_size

from ..data import Batch, ViewRecipe, dino_views
from ..distributed import World, distribute, mirror_images, mirror_rows, reduce_mean
from ..models import feature_width
from ..optim import key_momentum
from ..settings import require
from .health import collapse_of, spread_of
from .method import At, Group, Loss, Setup
from .mixing import (
    Valid,
    draw_batch_plan,
    examples_of_rules,
    half_unless_kept,
    keep_lost,
    valid_of,
    with_colours,
)
from .momentum import Lowered, follow
from .settings.dino import Crops, DINOConfig, crops_of
from .start import start_vit

HEAD_STD = 0.02
MOST_ENTROPY = 0.999
"""Share of the uniform distribution's entropy above which the teacher is taken to have collapsed."""


class Plan(NamedTuple):
    """What one step mixes: crops and teacher views share rule and drawn lam; a box is drawn for each."""

    student: dict[int, MixPlan]
    """By the number of the crop."""
    teacher: tuple[MixPlan, ...]
    """Of the two global views as the mix teacher sees them; none where nothing is mixed."""


class Images(NamedTuple):
    """Normalised images; crops of one size are one batch, crop after crop."""

    student: tuple[Tensor, ...]
    """The global crops (2N, 3, H, W), and where there are any the local ones (L N, 3, h, w)."""
    teacher: tuple[Tensor, ...]
    """(2N, 3, H, W): the clean global views, and where something is mixed the mixed ones."""


class Features(NamedTuple):
    """Raw logits."""

    student: Tensor
    """(V, N, K), with gradient."""
    teacher: Tensor
    """(T, N, K), without: the clean views, then the mixed ones."""


class Prototypes(nn.Module):
    """(N, D) unit vectors -> (N, K): a linear layer of rows of length 1, each times a gain, without bias."""

    def __init__(self, width: int, count: int, *, trained_gain: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(width, count, bias=False).weight.detach())
        self.gain = nn.Parameter(torch.ones(count, 1), requires_grad=trained_gain)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gain * F.normalize(self.direction, dim=1))


class Head(nn.Module):
    """(N, D) -> (N, K): three layers with GELU between them, a unit vector, and the prototypes."""

    def __init__(self, width: int, config: DINOConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((width, config.head_dim), (config.head_dim, config.head_dim)):
            norm = [nn.BatchNorm1d(after)] if config.use_bn_in_head else []
            layers += [nn.Linear(before, after), *norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(config.head_dim, config.bottleneck_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=HEAD_STD)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(config.bottleneck_dim, config.out_dim, trained_gain=not config.norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        return self.last_layer(F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1))


class MultiCrop(nn.Module):
    """Backbone and head: the backbone once per size of image, the head once for all."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.seen: Tensor | None = None
        """(N, D) without gradient: what the backbone made of the images that came last."""

    def forward(self, *sizes: Tensor) -> Tensor:
        """Batches of images, each of one size -> (all rows, K)."""
        features = [self.backbone(images) for images in sizes]
        self.seen = features[-1].detach()
        return self.head(torch.cat(features))


class Center(nn.Module):
    """(K,) the running mean of the teacher's logits of clean views: what keeps one prototype from winning."""

    value: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(count))


class DINO:
    """DINO, plain or with SDMP, and the stages of its step."""

    Config: ClassVar[type] = DINOConfig

    def __init__(self, config: DINOConfig, build_backbone: Callable[..., nn.Module], setup: Setup) -> None:
        px = setup.data.image_px
        require(
            not config.local_crops_number or config.local_px <= min(setup.data.size_px),
            "local_px",
            config.local_px,
            f"at most image_px, which is {px}",
        )
        self.config, self.setup = config, setup
        self.world: World = setup.world
        self.crops = crops_of(config)
        options = {**self.backbone_options(config), "more_px": (config.local_px,) if config.local_crops_number else ()}
        if config.vit_start == "mocov3":
            options["start"] = lambda vit: start_vit(vit, freeze_patches=True)
        backbone = build_backbone(**options)
        is_vit = hasattr(backbone, "patch_embed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setup.seed + 1)
            head = Head(feature_width(backbone), config)
        trained = build_backbone(**options, drop_path=config.drop_path_rate) if is_vit else copy.deepcopy(backbone)
        self.student = MultiCrop(trained, head).to(self.world.device)
        self.teacher = MultiCrop(backbone, copy.deepcopy(head)).requires_grad_(False).to(self.world.device)
        self.center = Center(config.out_dim).to(self.world.device)
        self.seen = distribute(self.student, self.world)
        distribute(self.teacher, self.world, trained=False)
        self.lowered = Lowered(self.teacher, setup.dtype)
        self.state = nn.ModuleDict({"student": self.student, "teacher": self.teacher, "center": self.center})
        self.keep = {
            size: draw_plan(setup.rows, view_size(size), prob=0.0, step=0, device=self.world.device)
            for size in {px, config.local_px}
        }
        self.clean, self.source, self.pair = (
            weights.to(self.world.device) for weights in pair_weights(self.crops, config.mix_weight)
        )
        self.means: list[Tensor] = []
        self.last: tuple[Plan, At, Valid | None] | None = None

    @staticmethod
    def backbone_options(config: DINOConfig) -> dict[str, Any]:
        """DINO's ViT-S has timm's six heads."""
        return {"heads": None}

    @property
    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    @property
    def backbone(self) -> nn.Module:
        """The teacher's, which is the better one and has no drop path."""
        return self.teacher.backbone

    @property
    def backbones(self) -> list[nn.Module]:
        """The student's and the teacher's."""
        return [self.student.backbone, cast(MultiCrop, self.lowered.twin).backbone]

    @property
    def partners_follow_ranks(self) -> bool:
        """Not where nothing is mixed, nor where partners are over all ranks."""
        return bool(self.crops.mixed) and self.config.flip == "local"

    def views(self, at: At) -> Sequence[ViewRecipe]:
        """DINO's multi-crop: two global views, then the local ones."""
        config, data = self.config, self.setup.data
        recipes = dino_views(
            data.image_px,
            config.local_px,
            config.local_crops_number,
            config.global_crops_scale,
            config.local_crops_scale,
            data.blur,
        )
        return [with_colours(recipe, data) for recipe in recipes]

    def plan(self, at: At) -> Plan:
        """Decide, from (seed, step) alone, what is mixed with what."""
        if not self.crops.mixed:
            return Plan({}, ())
        return Plan(
            {crop: self._draw(at, crop) for crop in self.crops.mixed}, tuple(self._draw(at, view) for view in range(2))
        )

    def _draw(self, at: At, crop: int) -> MixPlan:
        config = self.config
        return draw_batch_plan(
            self.setup,
            at,
            crop,
            rules=config.rules,
            alpha=config.alpha,
            per=config.per,
            shared_lam=config.shared_lam,
            flip=config.flip,
            px=self._px(crop),
        )

    def _px(self, crop: int) -> Size:
        return self.setup.data.image_px if crop < 2 else self.config.local_px

    def without_lost(self, plan: Plan, batch: Batch) -> Plan:
        """Every mix without them."""
        flip = self.config.flip == "global"
        student = {crop: keep_lost(p, batch, self.world, global_flip=flip) for crop, p in plan.student.items()}
        return Plan(student, tuple(keep_lost(p, batch, self.world, global_flip=flip) for p in plan.teacher))

    def mix(self, batch: Batch, plan: Plan) -> Images:
        """(N, 3, H, W) uint8 views -> what student and teacher see; a global view and its mixed twin from one read."""
        clean = self._images(batch.views[:2], range(2), {})
        teacher = [clean]
        if plan.teacher:
            teacher.append(self._images(batch.views[:2], range(2), dict(enumerate(plan.teacher))))
        student = [clean]
        if not self.config.local_crops_number and plan.student:
            rows = self.setup.rows
            student = [torch.cat([clean[:rows], teacher[1][rows:]])]
        if self.config.local_crops_number:
            student.append(self._images(batch.views[2:], range(2, self.crops.total), plan.student))
        return Images(tuple(student), tuple(teacher))

    def _images(self, views: Sequence[Tensor], crops: Sequence[int], plans: dict[int, MixPlan]) -> Tensor:
        """The views of one size as one batch, normalised, those with a plan mixed."""
        data, rows = self.setup.data, self.setup.rows
        px = self._px(crops[0])
        images = torch.empty(
            (len(views) * rows, views[0].shape[1], *view_size(px)),
            dtype=self.setup.dtype,
            device=views[0].device,
            memory_format=torch.channels_last,
        )
        for place, (crop, view) in enumerate(zip(crops, views, strict=True)):
            plan = plans.get(crop, self.keep[px])
            exchanged = crop in plans and self.config.flip == "global"
            mix(
                view,
                plan,
                partners=mirror_images(view, self.world) if exchanged else None,
                mean=data.mean,
                std=data.std,
                dtype=self.setup.dtype,
                out=images[place * rows : (place + 1) * rows],
            )
        return images

    def encode(self, images: Images) -> Features:
        """Logits of the student for all crops, with gradient, and of the teacher for the global views, without."""
        rows, bf16 = self.setup.rows, self.setup.dtype == torch.bfloat16
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            # The teacher first: what it needed is free again when the student keeps its activations for the gradient.
            with torch.no_grad():  # each set by itself: clean and mixed views have their own batch statistics
                module = self.lowered.refresh()
                teacher = torch.cat([module(views) for views in images.teacher])
            student = self.seen(*images.student)
        return Features(student.unflatten(0, (-1, rows)), teacher.unflatten(0, (-1, rows)))

    def loss(self, features: Features, plan: Plan, batch: Batch, at: At) -> Loss:
        """DINO's loss on the clean crops, and Eq. 7 and 8 on the mixed ones, as one pass over the logits."""
        valid = valid_of(batch, self.world)
        total, mean = self.compare(features, plan, at, *self.weights(plan), valid)
        self.means = [*(self.means if at.part else []), mean]
        self.last = plan, at, valid
        return Loss(total, {})

    def compare(
        self,
        features: Features,
        plan: Plan,
        at: At,
        own: Tensor,
        other: Tensor | None,
        valid: Valid | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The cross-entropies with these weights, summed; and the (K,) mean of the teacher's logits of clean views.

        With `valid`, both are this rank's share of means over the valid rows of all ranks.
        """
        teacher = features.teacher
        if valid is not None:
            counts = valid.rows * (valid.share * len(valid.rows))
            own, other = own * counts, None if other is None else other * counts
        mixed = next(iter(plan.student.values()), None) if other is not None else None
        if other is not None and self.config.flip == "global":
            # What the partner's teacher says is on the rank at the other end, in reversed order.
            teacher = torch.cat([teacher, mirror_rows(teacher.transpose(0, 1), self.world).transpose(0, 1)])
            nothing = torch.zeros_like(own)
            own, other = torch.cat([own, nothing], dim=1), torch.cat([nothing, other], dim=1)
        total, mean = distillation(
            features.student,
            teacher,
            own=own,
            other=other,
            partner=None if mixed is None or mixed.mirrored else mixed.partner,
            center=self.center.value,
            student_temperature=self.config.student_temp,
            teacher_temperature=teacher_temperature(at, self.config),
            teacher_mean=[0, 1],
        )
        if valid is not None:
            mean = valid.mean(features.teacher[:2].to(mean.dtype).mean(dim=0).T)
        return total, mean

    def weights(self, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """(V, T, N) what each crop's cross-entropy with each teacher view counts: of its own row, of its partner's."""
        clean = self.clean[..., None].expand(-1, -1, self.setup.rows)
        if not plan.student:
            return clean, None
        sources, pairs = self.mixed_weights(plan)
        return clean + sources[0] + pairs[0], sources[1] + pairs[1]

    def mixed_weights(self, plan: Plan) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The parts of these weights that Eq. 7 asks for, and those of Eq. 8."""
        first = plan.student[self.crops.mixed[0]]  # all crops of a size have the same lam, their boxes are as large
        source, pair = first.source_target().weight, first.pair_target(other=plan.teacher[0]).weight
        if self.config.source_weight == "static":
            source = half_unless_kept(source, first)
        if self.config.pair_weight == "static":
            pair = half_unless_kept(pair, first)
        from_source, from_pair = self.source[..., None], self.pair[..., None]
        return (from_source * source, from_source * (1 - source)), (from_pair * pair, from_pair * (1 - pair))

    def groups(self) -> list[Group]:
        """Norms and biases do not decay; the prototypes begin later."""
        last = list(self.student.head.last_layer.parameters())
        known = {id(p) for p in last}
        rest = [p for p in self.student.parameters() if id(p) not in known]
        return [
            Group([p for p in rest if p.ndim > 1]),
            Group([p for p in rest if p.ndim <= 1], decays=False),
            Group(last, from_epoch=self.config.freeze_last_layer),
        ]

    def after_update(self, at: At, good: Tensor) -> None:
        """Teacher and centre follow."""
        momentum = key_momentum(at.step, start=self.config.momentum_teacher, steps=at.steps, cosine=True)
        follow(self.student.parameters(), self.teacher.parameters(), (1 - momentum) * good)
        mean = reduce_mean(torch.stack(self.means).mean(dim=0), self.world)
        self.means = []
        # A bad step's mean may be NaN, and NaN times 0 would be one too.
        moved = torch.lerp(self.center.value, mean, 1 - self.config.center_momentum)
        self.center.value.copy_(torch.where(good > 0, moved, self.center.value))

    def facts(self, plan: Plan) -> dict[str, Tensor]:
        """The mean of lam."""
        return {"lam_mean": plan.student[self.crops.mixed[0]].lam.mean()} if plan.student else {}

    @torch.no_grad()
    def health(self, features: Features) -> dict[str, Tensor]:
        """The loss taken apart, the teacher's entropy over its clean views, and the spread of its features.

        Of the last batch whose loss was asked for. The step itself sees the sum alone, in one pass over the logits.
        """
        seen = cast(MultiCrop, self.lowered.twin).seen
        if self.last is None or seen is None:
            return {}
        plan, at, valid = self.last
        terms = {}
        if plan.student:
            sources, pairs = self.mixed_weights(plan)
            clean = self.clean[..., None].expand(-1, -1, self.setup.rows)
            parts = {"loss_clean": (clean, None), "loss_source": sources, "loss_mixed": pairs}
            terms = {name: self.compare(features, plan, at, *weights, valid)[0] for name, weights in parts.items()}
        logits = (features.teacher[:2].float() - self.center.value) / teacher_temperature(at, self.config)
        entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean()
        return {**terms, "teacher_entropy": entropy, **spread_of(seen)}

    def collapse(self, numbers: Mapping[str, float]) -> str | None:
        """Where features are nearly one vector, or the teacher says of no image what it is."""
        uniform = math.log(self.config.out_dim)
        entropy = numbers.get("teacher_entropy", 0.0)
        if entropy > MOST_ENTROPY * uniform:
            return f"the teacher finds all prototypes alike (entropy {entropy:.3f} of at most {uniform:.3f})"
        return collapse_of(numbers)

    def describe(self) -> str:
        """The crops, the terms and the chance level."""
        config, crops = self.config, self.crops
        total = float(self.clean.sum() + self.source.sum() + self.pair.sum())
        mixed = ""
        if crops.mixed:
            what = (
                f"{len(crops.mixed)} of {config.local_crops_number} local" if config.local_crops_number else "1 global"
            )
            mixed = f" + {config.mix_weight:g} source + {config.mix_weight:g} mixed ({what} crops mixed)"
        return (
            f"distillation of {crops.total} crops from 2 views{mixed}, {config.out_dim} prototypes; "
            f"chance level {total * math.log(config.out_dim):.3f}"
        )

    def example(self, batch: Batch) -> list[tuple[str, Tensor, MixPlan]]:
        """The first view, mixed by each rule in turn."""
        if not self.crops.mixed:
            return []
        config = self.config
        return examples_of_rules(batch.views[0], rules=config.rules, alpha=config.alpha, seed=self.setup.seed)


def pair_weights(crops: Crops, mix_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """(V, T) weights of DINO's own, of the source and of the mixed loss, each a mean over its pairs."""
    teachers = 4 if crops.mixed else 2
    clean, source, pair = (torch.zeros(crops.total, teachers) for _ in range(3))
    for crop, view in crops.clean_pairs:
        clean[crop, view] = 1 / len(crops.clean_pairs)
    for crop, view in crops.mixed_pairs:
        source[crop, view] = pair[crop, 2 + view] = mix_weight / len(crops.mixed_pairs)
    return clean, source, pair


def teacher_temperature(at: At, config: DINOConfig) -> float:
    """Linear over the warm-up's epochs from first to last, then constant; the same within an epoch."""
    last, epoch = config.warmup_teacher_temp_epochs - 1, int(at.epoch)
    if epoch > last:
        return config.teacher_temp
    share = epoch / last if last else 0.0
    return config.warmup_teacher_temp + share * (config.teacher_temp - config.warmup_teacher_temp)

"""What is mixed with what: the plan that pixels and labels both read, and how it is drawn.

A plan is decided once, on the host: drawn from `(seed, step)` alone (`draw_plan`), or made by hand (`make_plan`).
`mix` reads it for the pixels; `source_target`, `pair_target` and `label_target` read it for the labels. Nothing is
drawn twice, so the two cannot disagree.

Letters: N rows of this rank, H W pixels, W ranks where `world_size` is meant.
"""

from __future__ import annotations

import bisect
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, ParamSpec

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from sdmp_kernels._backends import native_library
from sdmp_kernels._checks import check_choice, check_integer, check_number, check_tensor, near, readable
from sdmp_kernels._memory import is_on, moved, pinned
from sdmp_kernels._operators import unwatched


class Rule(IntEnum):
    """How a row is mixed with its partner."""

    KEEP = 0
    MIXUP = 1
    CUTMIX = 2
    RESIZEMIX = 3


class TwoHot(NamedTuple):
    """A row's target: `weight` at column `first` and `1 - weight` at column `second`.

    Attributes:
        first: (N,) int64.
        second: (N,) int64; may equal `first`, then the weights add up.
        weight: (N,) float32 in [0, 1].
    """

    first: Tensor
    second: Tensor
    weight: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor) -> TwoHot:
        """The target of unmixed rows: all weight at `labels[i]`.

        Args:
            labels: (N,) int64 class numbers, 0 or more.

        Returns:
            A `TwoHot` whose `first` and `second` are `labels`, with weight 1.

        Raises:
            TypeError: if `labels` is no int64 tensor.
            ValueError: if its shape is not (N,), or, on the CPU, if a class number is below 0.
        """
        check_tensor("labels", labels, dtypes=(torch.int64,), ndim=1, shape="(N,)")
        if len(labels) and readable(labels) and int(labels.min()) < 0:
            raise ValueError(
                f"labels must hold class numbers of 0 or more, got {int(labels.min())}; leave rows without a label out"
            )
        return cls(labels, labels, torch.ones(len(labels), dtype=torch.float32, device=labels.device))

    def dense(self, columns: int) -> Tensor:
        """The target as rows of shares, for looking at and for other people's losses; no loss of ours needs it.

        Row i is `weight[i]` at column `first[i]` plus `1 - weight[i]` at column `second[i]`, zero elsewhere.

        Args:
            columns: K, the number of columns, 1 or more.

        Returns:
            (N, K) of the dtype of `weight`, on its device. A column out of range, which on a GPU is not looked for,
            leaves its weight out.

        Raises:
            TypeError: if `columns` is no integer.
            ValueError: if it is below 1, or, on the CPU, if `first` or `second` hold a column outside [0, K).
        """
        columns = check_integer("columns", columns, low=1, what="a number of columns, 1 or more")
        dense = self.weight.new_zeros((len(self.weight), columns))
        for name, column, weight in (("first", self.first, self.weight), ("second", self.second, 1 - self.weight)):
            if len(column) and readable(column) and (int(column.min()) < 0 or int(column.max()) >= columns):
                raise ValueError(
                    f"columns={columns} is too few: {name} holds columns {int(column.min())} to {int(column.max())}"
                )
            known = (column >= 0) & (column < columns)
            dense.scatter_add_(1, column.clamp(0, columns - 1)[:, None], torch.where(known, weight, 0)[:, None])
        return dense


_TENSORS = ("partner", "box", "lam", "partner_lam", "rule")
_DTYPES = {
    "rule": torch.uint8,
    "partner": torch.int64,
    "lam": torch.float32,
    "partner_lam": torch.float32,
    "box": torch.int32,
}
# Plain numbers, since numpy is slow to compare with members of an enumeration.
_KEEP, _MIXUP, _RESIZEMIX = int(Rule.KEEP), int(Rule.MIXUP), int(Rule.RESIZEMIX)


def boxed(rule: np.ndarray) -> np.ndarray:
    """(N,) bool: which rows have a box."""
    return rule > _MIXUP


def which_boxed(rule: np.ndarray, only: int | None) -> np.ndarray | bool:
    """Which rows have a box: True for all and False for none of them, else (N,) bool; `only`: the rule of all rows."""
    return _folded(boxed(rule)) if only is None else only > _MIXUP


def _folded(rows: np.ndarray) -> np.ndarray | bool:
    """(N,) bool as it is, or as one bool where all rows agree."""
    return False if not rows.any() else True if rows.all() else rows


@dataclass(frozen=True, eq=False, repr=False)
class MixPlan:
    """An immutable record of what is mixed with what. Built by `draw_plan` or `make_plan`; a pytree of its tensors.

    Attributes:
        rule: (N,) uint8, values of `Rule`.
        partner: (N,) int64, the row whose pixels come in.
        lam: (N,) float32 in [0, 1], the row's own share. CutMix, ResizeMix: 1 - h*w/(H*W) counted from the box;
            KEEP: 1.
        partner_lam: (N,) float32 in [0, 1], the partner's own share (`lam[partner]`, also when that row lives on
            another rank).
        box: (N, 4) int32 pixels: top, left, height, width; zeros for KEEP and MIXUP.
        size: (H, W) the boxes refer to.
        mirrored: True where the partner is the flip, row N-1-i. Known on the host, never read back from a device.
        rules: the rules that may occur, in ascending order. Known on the host likewise.

    Raises:
        TypeError, ValueError: on construction, for a wrong dtype, shape or device; and, for tensors on the CPU, for
            any value that breaks the promises above.
    """

    rule: Tensor
    partner: Tensor
    lam: Tensor
    partner_lam: Tensor
    box: Tensor
    size: tuple[int, int]
    mirrored: bool
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_size(self.size))
        if not isinstance(self.mirrored, bool):
            raise TypeError(f"mirrored must be True or False, got {type(self.mirrored).__name__}")
        object.__setattr__(self, "rules", _check_rules_tuple(self.rules))
        for name, dtype in _DTYPES.items():
            shape = "(N, 4)" if name == "box" else "(N,)"
            check_tensor(name, getattr(self, name), dtypes=(dtype,), ndim=2 if name == "box" else 1, shape=shape)
        n = len(self)
        for name in _DTYPES:
            tensor = getattr(self, name)
            if tensor.shape[0] != n:
                raise ValueError(f"{name} has {tensor.shape[0]} rows but rule has {n}; give every tensor N rows")
            if tensor.device != self.rule.device:
                raise ValueError(
                    f"{name} is on {tensor.device} but rule is on {self.rule.device}; use MixPlan.to(device)"
                )
        if self.box.shape[1] != 4:
            raise ValueError(f"box must have shape (N, 4), got {tuple(self.box.shape)}")
        if all(readable(getattr(self, name)) for name in _DTYPES):
            _check_values(self)

    def __len__(self) -> int:
        return self.rule.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the plan's tensors."""
        return self.rule.device

    def __repr__(self) -> str:
        rules = "|".join(rule.name.lower() for rule in self.rules) or "no rule"
        partners = "the flip" if self.mirrored else "given partners"
        return f"MixPlan({len(self)} rows of {self.size[0]} x {self.size[1]} px, {rules}, {partners}, {self.device})"

    def to(self, device: torch.device | str | int, *, non_blocking: bool = True) -> MixPlan:
        """The same plan on `device`, by one copy of all its tensors (from pinned memory where the target is a GPU).

        Args:
            device: a device, its name, or the number of a GPU.
            non_blocking: whether a copy to an accelerator returns before it is done; the stream keeps the order. A
                copy to the CPU always waits, since the host may read it at once.

        Returns:
            A plan on `device`: this one where it is there already.

        Raises:
            RuntimeError: torch's, for a device that is unknown or absent.
        """
        target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if is_on(self.device, target):
            return self
        return self._with(moved(self._tensors(), target, non_blocking=non_blocking))

    def pin_memory(self) -> MixPlan:
        """The same plan in one block of page-locked memory: what `DataLoader(pin_memory=True)` asks for.

        Returns:
            A plan on the CPU with pinned tensors.

        Raises:
            ValueError: for a plan that is not on the CPU.
            RuntimeError: torch's, where there is no accelerator to pin for.
        """
        if self.device.type != "cpu":
            raise ValueError(f"only a plan on the CPU can be pinned, but this one is on {self.device}")
        return self._with(pinned(self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in _TENSORS]

    def _with(self, tensors: Sequence[Tensor]) -> MixPlan:
        """The same plan, held by these tensors."""
        parts = dict(zip(_TENSORS, tensors, strict=True))
        return MixPlan(size=self.size, mirrored=self.mirrored, rules=self.rules, **parts)

    def copy_(self, other: MixPlan) -> MixPlan:
        """Overwrite this plan's tensors in place with those of `other`: the static plan of a captured CUDA graph.

        Args:
            other: a plan of as many rows, the same size, `mirrored` and rules, on any device.

        Returns:
            This plan.

        Raises:
            TypeError: if `other` is no MixPlan.
            ValueError: where a host field (number of rows, size, mirrored, rules) differs, since what was captured
                may depend on it. Nothing is written then.
        """
        if not isinstance(other, MixPlan):
            raise TypeError(f"other must be a MixPlan, got {type(other).__name__}")
        for field in ("size", "mirrored", "rules"):
            if getattr(self, field) != getattr(other, field):
                raise ValueError(
                    f"copy_ needs plans whose host fields agree, but {field} is {getattr(self, field)!r} here and "
                    f"{getattr(other, field)!r} in other; draw both with the same arguments"
                )
        if len(self) != len(other):
            raise ValueError(
                f"copy_ needs plans of one length, but this one has {len(self)} rows and other {len(other)}"
            )
        for name in _TENSORS:
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)
        return self

    def keeping(self, rows: Tensor, partner_rows: Tensor | None = None) -> MixPlan:
        """The same plan, but that some rows, and those that have one of them as partner, are kept as they are (KEEP).

        For rows that hold no image: nothing of them comes into another row.

        Args:
            rows: (N,) bool on the device of the plan, True for the rows to keep.
            partner_rows: the same for the rows that `partner` indexes, where these live on another rank, whose partners
                are this plan's rows in turn; default `rows`.

        Returns:
            A plan of the same rows and partners.

        Raises:
            TypeError, ValueError: if an argument is no (N,) bool; or `partner_rows` is given and the partners are not
                the flip.
        """
        for name, given in (("rows", rows), ("partner_rows", partner_rows)):
            if given is not None:
                check_tensor(name, given, dtypes=(torch.bool,), ndim=1, shape="(N,)")
                if len(given) != len(self):
                    raise ValueError(f"{name} has {len(given)} rows but the plan has {len(self)}")
        if partner_rows is None:
            self._check_partner_below(len(self), "this plan")
        elif not self.mirrored:
            raise ValueError("partner_rows are for partners by the flip, of which it is known whose partners they are")
        kept = rows | (rows if partner_rows is None else partner_rows)[self.partner]
        lam = torch.where(kept, 1.0, self.lam)
        return MixPlan(
            rule=torch.where(kept, _KEEP, self.rule).to(torch.uint8),
            partner=self.partner,
            lam=lam,
            partner_lam=torch.where(kept, 1.0, self.partner_lam) if self.mirrored else lam[self.partner],
            box=torch.where(kept[:, None], 0, self.box).to(torch.int32),
            size=self.size,
            mirrored=self.mirrored,
            rules=tuple(sorted({Rule.KEEP, *self.rules})),
        )

    def overlap(self, other: MixPlan | None = None) -> Tensor:
        """c: how much query row i, mixed by this plan, shares with key row partner[i], mixed by `other`.

        With l_i = `lam[i]`, f = `partner[i]` and m the keys' lam:

            c_i = min(1 - l_i, m_f) + [partner[f] = i] * min(l_i, 1 - m_f)

        For the flip and the same plan this is the paper's lambda^c (section 3.2), c_i = 1 - |l_i + l_f - 1|.

        Args:
            other: the plan that mixed the keys, of the same rows and partners; default this one.

        Returns:
            (N,) float32 in [0, 1].

        Raises:
            TypeError: if `other` is no MixPlan.
            ValueError: if `other` has another number of rows or another `mirrored`; on the CPU also if its partners
                differ, or if a partner is no row of this plan (partners of another set of images).
        """
        other = self._keys(other)
        cross = torch.minimum(1 - self.lam, other.partner_lam)
        back = torch.minimum(self.lam, 1 - other.partner_lam)
        if not self.mirrored:
            self._check_partner_below(len(self), "this plan")
            rows = torch.arange(len(self), device=self.device)
            within = self.partner.clamp(max=len(self) - 1)
            back = torch.where(self.partner[within] == rows, back, 0.0)
        return cross + back

    def source_target(self, offset: int = 0, partner_offset: int | None = None) -> TwoHot:
        """The paper's Eq. 3: every mixed query is to find its two sources among the clean keys.

            target_i = lam_i at column offset + i, 1 - lam_i at column partner_offset + partner_i

        Args:
            offset: column of this rank's row 0 among the keys (rank * N after an all-gather).
            partner_offset: the same for the rank that holds the partners; default `offset`.

        Returns:
            A `TwoHot` of N rows.

        Raises:
            TypeError: if an offset is no integer.
            ValueError: if an offset is below 0.
        """
        first, second = self._columns(offset, partner_offset)
        return TwoHot(first, second, self.lam)

    def pair_target(self, offset: int = 0, partner_offset: int | None = None, other: MixPlan | None = None) -> TwoHot:
        """The paper's Eq. 4: every mixed query is to find its own and its partner's mixed key, as far as they overlap.

            s_i = 1 - |lam_i - m_i|, the overlap with the row's own key (1 for the same plan), m the keys' lam
            c_i = overlap(other)_i
            target_i = s_i / (s_i + c_i) at column offset + i, c_i / (s_i + c_i) at column partner_offset + partner_i

        Where s_i and c_i are both zero each column gets one half.

        Args:
            offset: as in `source_target`.
            partner_offset: as in `source_target`.
            other: the plan that mixed the keys; default this one.

        Returns:
            A `TwoHot` of N rows.

        Raises:
            TypeError: if an offset is no integer, or `other` no MixPlan.
            ValueError: if an offset is below 0, or `other` does not fit, as in `overlap`.
        """
        first, second = self._columns(offset, partner_offset)
        cross = self.overlap(other)
        own = 1 - (self.lam - self._keys(other).lam).abs()
        total = own + cross
        weight = torch.where(total > 0, own / torch.where(total > 0, total, 1.0), 0.5)
        return TwoHot(first, second, weight)

    def label_target(self, labels: Tensor, partner_labels: Tensor | None = None) -> TwoHot:
        """The supervised target: a mixed image shows the classes of both its sources.

            target_i = lam_i at column labels[i], 1 - lam_i at column partner_labels[partner_i]

        Args:
            labels: (N,) int64 class numbers of this plan's rows.
            partner_labels: (M,) int64 class numbers of the rows that `partner` indexes, where these are not the
                plan's own: the labels of `mix(partners=...)`, or those of the other rank with flip="global".
                Default `labels`.

        Returns:
            A `TwoHot` of N rows, on the device of `labels`.

        Raises:
            TypeError: if labels are no int64 tensors.
            ValueError: if `labels` is not of shape (N,) or `partner_labels` not of shape (M,); on the CPU also if a
                partner is no row of `partner_labels`.
        """
        others = labels if partner_labels is None else partner_labels
        for name, given in (("labels", labels), ("partner_labels", others)):
            check_tensor(name, given, dtypes=(torch.int64,), ndim=1, shape="(N,)" if name == "labels" else "(M,)")
        if len(labels) != len(self):
            raise ValueError(f"labels has {len(labels)} rows but the plan has {len(self)}; give one label per row")
        self._check_partner_below(len(others), "labels" if partner_labels is None else "partner_labels")
        same = self.mirrored and len(others) == len(self)
        second = others.flip(0) if same else others[self.partner.to(others.device)]
        return TwoHot(labels, second, self.lam.to(labels.device))

    def _check_partner_below(self, rows: int, what: str) -> None:
        if self.mirrored and len(self) <= rows:
            return
        if len(self) and readable(self.partner) and int(self.partner.max()) >= rows:
            raise ValueError(f"partner holds row {int(self.partner.max())}, but {what} has only {rows} rows")

    def _columns(self, offset: int, partner_offset: int | None) -> tuple[Tensor, Tensor]:
        offset = check_integer("offset", offset, low=0, what="a column number, 0 or more")
        other = offset if partner_offset is None else partner_offset
        other = check_integer("partner_offset", other, low=0, what="a column number, 0 or more")
        rows = torch.arange(offset, offset + len(self), device=self.device)
        return rows, self.partner + other

    def _keys(self, other: MixPlan | None) -> MixPlan:
        if other is None:
            return self
        if not isinstance(other, MixPlan):
            raise TypeError(f"other must be the MixPlan that mixed the keys, got {type(other).__name__}")
        if len(other) != len(self) or other.mirrored != self.mirrored:
            raise ValueError(
                f"other must mix the same rows with the same partners, but it has {len(other)} rows, "
                f"mirrored={other.mirrored}, and this plan {len(self)} rows, mirrored={self.mirrored}"
            )
        if readable(self.partner) and readable(other.partner) and not torch.equal(self.partner, other.partner):
            raise ValueError("other must have the same partner vector as this plan; draw both views with one `partner`")
        return other


P = ParamSpec("P")


def _on_the_host(function: Callable[P, MixPlan]) -> Callable[P, MixPlan]:
    """`function`, kept out of graphs: a compiler must neither record a draw as a constant nor round it otherwise."""
    untraced: list[Callable[P, MixPlan]] = []

    def apart(*args: P.args, **kwargs: P.kwargs) -> MixPlan:
        if not untraced:  # asking for `disable` loads the compiler
            untraced.append(torch.compiler.disable(function))
        return untraced[0](*args, **kwargs)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> MixPlan:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg="draw_plan and make_plan decide on the host: call them outside the compiled function and hand the "
                "plan in as an argument"
            )
            return apart(*args, **kwargs)
        # What a graph break returns to runs by the frame evaluation of torch.compile, too.
        if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
            return apart(*args, **kwargs)
        return function(*args, **kwargs)

    return called


class Stream(threading.local):
    """Numbers of Philox(key=(seed, step), counter=(0, 0, third, last)), by one generator of every thread.

    A new one asks the system for entropy that the key then replaces: longer than the draws of a small batch take.
    """

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.numbers = np.random.Generator(self.bits)

    def at(self, seed: int, step: int, last: int = 0, third: int = 0) -> np.random.Generator:
        """The generator at the beginning of a stream: one object, which the next call moves."""
        self.bits.state = {
            "bit_generator": "Philox",
            "state": {
                "counter": np.array([0, 0, third, last], dtype=np.uint64),
                "key": np.array([seed, step], dtype=np.uint64),
            },
            "buffer": _NOTHING_DRAWN,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self.numbers


_NOTHING_DRAWN = np.zeros(4, dtype=np.uint64)
_STREAM = Stream()


@_on_the_host
def draw_plan(
    n: int,
    size: tuple[int, int],
    *,
    rules: Sequence[str] | Mapping[str, float] = ("mixup", "cutmix", "resizemix"),
    alpha: float | Mapping[str, float] = 1.0,
    per: str = "batch",
    prob: float = 1.0,
    lam_range: tuple[float, float] = (0.1, 0.9),
    box: str = "inside",
    shared_lam: bool = False,
    partner: Tensor | None = None,
    flip: str = "local",
    step: int,
    seed: int = 0,
    view: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str | int = "cpu",
) -> MixPlan:
    """Draw the plan of one step: a pure function of its arguments that touches no global random state.

    Rules, lam and boxes are those of the one plan drawn for all n * world_size rows, of which this rank gets rows
    rank*n to (rank+1)*n: they do not depend on the backend, the device or how the rows are split over ranks. Draw
    outside `torch.compile` and hand the plan in: inside it breaks the graph.

    Args:
        n: rows of this rank, 0 or more; odd too (the middle row is its own partner).
        size: (H, W) of the images in pixels.
        rules: names of the rules ("mixup", "cutmix", "resizemix", "keep"), chosen uniformly, or a mapping
            name -> probability that adds up to 1 (paper section 4.3.2: uniform over the three).
        alpha: lam ~ Beta(alpha, alpha), > 0; or a mapping name -> alpha. One independent draw per sample.
        per: "batch" draws one rule for the batch (the paper), "sample" one for every row.
        prob: chance in [0, 1], per sample, that a row is mixed at all; KEEP otherwise.
        lam_range: ResizeMix maps its drawn lam linearly onto this range within [0, 1].
        box: "inside" puts the top-left corner uniformly over all positions where the whole box is inside, ends
            included; h = floor(H * sqrt(1 - lam)), likewise w. "clip" is timm's law: centre anywhere, clipped
            (views then share the drawn lam, not the recounted one).
        shared_lam: one lam for the whole batch (the ablation of Table 7) instead of one per sample.
        partner: (n,) int64, any row numbers in [0, n), instead of the flip N-1-i.
        flip: "local" pairs within this rank; "global" pairs row i of rank r with row n-1-i of rank W-1-r.
        step: number of the training step, 0 or more. It has no default: a loop that forgot it would train on one
            frozen plan. The draws are those of Philox(key=(seed, step)).
        seed: of the run, an integer in [0, 2**64).
        view: moves only the boxes: the views of one step share rules and drawn lam.
        rank, world_size: which rows of the global plan to return.
        device: where the plan's tensors go, by one asynchronous copy.

    Returns:
        A `MixPlan` of n rows. lam is always recounted from the integer box.

    Raises:
        TypeError: for an argument of a wrong type, naming it, or without `step`.
        ValueError: for a value outside what is said above, naming the argument.
    """
    n = check_integer("n", n, low=0, what="a number of rows, 0 or more")
    seed = check_integer("seed", seed, low=0, high=2**64 - 1, what="an integer in [0, 2**64)")
    step = check_integer("step", step, low=0, high=2**64 - 1, what="an integer in [0, 2**64)")
    view = check_integer("view", view, low=0, high=2**32 - 1, what="a view number, 0 or more")
    world_size = check_integer("world_size", world_size, low=1, what="a number of ranks, 1 or more")
    rank = check_integer("rank", rank, low=0, high=world_size - 1, what=f"a rank in [0, world_size={world_size})")
    law = _law(size, rules, alpha, per, prob, lam_range, box, shared_lam, flip)
    if partner is None and (native := law.native()) is not None:
        columns = native.draw_plan_cpu.default(law.numbers, n, signed(seed), signed(step), view, rank, world_size)
        plan = trusted(*columns, law.size, True, law.occurring)
    else:
        plan = _draw_rows(law, n, partner, step, seed, view, rank, world_size)
    return plan if device == "cpu" else plan.to(device)


def _draw_rows(
    law: _Law, n: int, partner: Tensor | None, step: int, seed: int, view: int, rank: int, world_size: int
) -> MixPlan:
    """What `draw_plan` draws, on the CPU: the definition of its numbers."""
    partners, mirrored = _check_partner(partner, n, "global" if law.globally else "local")

    # Drawn for all ranks, then sliced. The order of these draws is pinned by tests/golden; do not reorder.
    total = n * world_size
    rng = _STREAM.at(seed, step)
    picks = rng.random(1 if law.one_rule else total)
    rule = picked(law.rules, law.edges, picks)
    one = int(rule[0]) if law.one_rule else None
    if one is not None:
        rule = np.full(total, one, dtype=np.uint8)
    mixed = rng.random(total)
    drawn = _draw_lam(rng, law, rule)
    if law.prob < 1:
        rule[mixed >= law.prob] = _KEEP

    only = one if law.prob == 1 else None
    pasted = which_boxed(rule, only)
    if pasted is not False:
        # The last counter word gives every view its own stream, far from the one above, which starts at counter 0.
        rng = _STREAM.at(seed, step, view + 1)
        boxes = draw_boxes(rng, rule, drawn, law.lam_range, law.size, clip=law.clip, only=only)
    else:
        boxes = np.zeros((total, 4), dtype=np.int32)
    lam = count_lam(rule, drawn, boxes, law.size[0] * law.size[1], only=only)
    here = slice(rank * n, (rank + 1) * n)
    if not mirrored:
        partner_lam = lam[here][partners]
    elif law.globally:
        partner_lam = lam[::-1][here].copy()
    else:
        partner_lam = lam[here][::-1].copy()
    if world_size > 1:  # copies, so that the rows of the other ranks are let go
        rule, lam, boxes = rule[here].copy(), lam[here].copy(), boxes[here].copy()
    columns = (torch.from_numpy(column) for column in (rule, partners, lam, partner_lam, boxes))
    return trusted(*columns, law.size, mirrored, law.occurring)


@_on_the_host
def flipped_plan(
    rule: np.ndarray, drawn: np.ndarray, boxes: np.ndarray, size: tuple[int, int], rules: tuple[Rule, ...]
) -> MixPlan:
    """A plan on the CPU of rows that this package has drawn, which are not looked at again; partners by the flip.

    rule: (N,) uint8. drawn: (N,) lam. boxes: (N, 4) int32, inside images of `size`. rules: those that may occur.
    """
    lam = count_lam(rule, drawn, boxes, size[0] * size[1])
    columns = (rule, np.arange(len(rule) - 1, -1, -1), lam, lam[::-1].copy(), boxes)
    return trusted(*map(torch.from_numpy, columns), size, True, rules)


@_on_the_host
def make_plan(
    rule: str | Tensor,
    lam: Tensor,
    size: tuple[int, int],
    *,
    box: Tensor | None = None,
    partner: Tensor | None = None,
    partner_lam: Tensor | None = None,
    device: torch.device | str | int = "cpu",
) -> MixPlan:
    """Make a plan by hand, from what was drawn elsewhere; what follows from it is worked out here.

    The lam of the plan is each row's own share:

        MIXUP: lam as given. CUTMIX, RESIZEMIX: 1 - h*w / (H*W), counted from the box. KEEP: 1.

    Without `box`, a CUTMIX or RESIZEMIX row gets a box in the middle of the image, of the size that draw_plan gives it:

        h = floor(H * sqrt(1 - lam)), w = floor(W * sqrt(1 - lam)), top = (H - h) // 2, left = (W - w) // 2

    Args:
        rule: the name of one rule for all rows ("mixup", "cutmix", "resizemix", "keep"), or (N,) uint8 `Rule`s.
        lam: (N,) float32 in [0, 1], as drawn; its length is the number of rows.
        size: (H, W) of the images in pixels.
        box: (N, 4) int32 pixels: top, left, height, width, inside the image; zeros for KEEP and MIXUP rows.
        partner: (N,) int64, 0 or more: the row whose pixels come in. Default the flip N-1-i. Rows from N up belong to
            another set of images (`mix(partners=...)`) and need `partner_lam`.
        partner_lam: (N,) float32 in [0, 1], the partner's own share; default `lam[partner]` of the plan.
        device: where the plan's tensors go, by one asynchronous copy. Everything given is on the CPU.

    Returns:
        A `MixPlan` of N rows, whose `rules` are those that occur and that is `mirrored` without `partner`.

    Raises:
        TypeError: for an argument of a wrong type or dtype, naming it.
        ValueError: for a value or shape outside what is said above, naming the argument.
    """
    height, width = check_size(size)
    drawn = _host_array("lam", lam, torch.float32, "(N,)").astype(np.float64)
    n = len(drawn)
    _check_shares("lam", drawn)
    chosen, rules = _rule_rows(rule, n)
    if box is None:
        boxes = _centred_boxes(chosen, drawn, (height, width))
    else:
        boxes = _host_array("box", box, torch.int32, "(N, 4)", rows=n).copy()
        _check_boxes(chosen, boxes, (height, width))
    counted = count_lam(chosen, drawn, boxes, height * width)
    if partner is None:
        partners = np.arange(n - 1, -1, -1, dtype=np.int64)
    else:
        partners = _host_array("partner", partner, torch.int64, "(N,)", rows=n).copy()
        if n and partners.min() < 0:
            raise ValueError(f"partner must hold row numbers of 0 or more, got {partners.min()}")
    if partner_lam is not None:
        partner_shares = _host_array("partner_lam", partner_lam, torch.float32, "(N,)", rows=n).copy()
        _check_shares("partner_lam", partner_shares)
    elif n and partners.max() >= n:
        raise ValueError(
            f"partner holds row {partners.max()}, but lam has only {n}; give partner_lam for partners from elsewhere"
        )
    else:
        partner_shares = counted[partners]
    columns = map(torch.from_numpy, (chosen, partners, counted, partner_shares, boxes))
    return trusted(*columns, (height, width), partner is None, rules).to(device)


_FIELDS = ("rule", "partner", "lam", "partner_lam", "box", "size", "mirrored", "rules")


def trusted(*fields: Any) -> MixPlan:
    """A plan of fields that need no check, since they were made here of what was checked already."""
    plan = object.__new__(MixPlan)
    vars(plan).update(zip(_FIELDS, fields, strict=True))
    return plan


@functools.cache
def compiled_draws() -> Any:
    """The operators that draw by compiled code, the very same numbers; None where it is not there."""
    return None if native_library("cpu") else torch.ops.sdmp


# Of this much numpy's Beta is Johnk's algorithm as csrc/plan.h has it; above, it draws by other distributions.
_COMPILED_ALPHA = (0.05, 1.0)


def compiled_law(
    rules: Sequence[int], edges: Sequence[float], alphas: Sequence[float], size: tuple[int, int], *others: float
) -> Tensor | None:
    """A law of drawing as compiled code reads it, `Law` in csrc/plan.h; None where it cannot draw by that.

    rules, edges: as `picked` takes them. alphas: (4,) of every `Rule`. others: prob, the range of ResizeMix's lam, and
    one of a `_Law`'s one_rule, one_lam, clip and globally each.
    """
    low, high = _COMPILED_ALPHA
    if not all(low <= alphas[rule] <= high for rule in rules):
        return None
    padded = [values + [0.0] * (4 - len(rules)) for values in (list(map(float, rules)), list(edges))]
    return torch.tensor([len(rules), *padded[0], *padded[1], *alphas, *size, *map(float, others)], dtype=torch.float64)


def signed(word: int) -> int:
    """64 bits as the operators take them."""
    return word - 2**64 if word >= 2**63 else word


@dataclass(frozen=True, eq=False)
class _Law:
    """What is drawn alike in every step, checked.

    Attributes:
        rules: R rules that are drawn from, as plain numbers, in ascending order, so that the order of names never moves
            a draw.
        edges: R numbers, their cumulated probabilities, the last 1.
        alphas: (4,) float64, alpha of every `Rule`.
        alpha: the one alpha of all of `rules`, or None.
        occurring: the rules that may occur.
        size: (H, W) of the images.
        prob: chance of a row to be mixed.
        lam_range: what ResizeMix maps its lam onto.
        one_rule, one_lam: whether all rows have one.
        clip: whether boxes are clipped.
        globally: whether partners are the flip over all ranks.
        numbers: all that for compiled code, or None where it cannot draw by it.
    """

    rules: list[int]
    edges: list[float]
    alphas: np.ndarray
    alpha: float | None
    occurring: tuple[Rule, ...]
    size: tuple[int, int]
    prob: float
    lam_range: tuple[float, float]
    one_rule: bool
    one_lam: bool
    clip: bool
    globally: bool
    numbers: Tensor | None

    def native(self) -> Any:
        """The compiled operators, where they draw by this law and now."""
        return compiled_draws() if self.numbers is not None and unwatched() else None


def picked(rules: Sequence[int], edges: Sequence[float], numbers: np.ndarray) -> np.ndarray:
    """(N,) uint8: the rules that numbers in [0, 1) stand for; `edges`: cumulated probabilities, the last 1."""
    last = len(rules) - 1
    if len(numbers) == 1:  # of a whole batch, in every step
        return np.array([rules[min(bisect.bisect_right(edges, numbers[0]), last)]], dtype=np.uint8)
    return np.array(rules, dtype=np.uint8)[np.minimum(np.searchsorted(edges, numbers, side="right"), last)]


def _law(*given: Any) -> _Law:
    """The law of arguments of `draw_plan`, checked; what was checked once is not checked for every step."""
    key = _plain(given)
    if key is None:
        return _make_law(*given)
    found = _LAWS.get(key)
    if found is None:
        found = _make_law(*given)
        if len(_LAWS) < 256:
            _LAWS[key] = found
    return found


_LAWS: dict[object, _Law] = {}


def _plain(value: object) -> object:
    """A key for a number, a name, or a sequence or mapping of such, that tells 1 from True; None for anything else."""
    kind = type(value)
    if kind in _ATOMS:
        return kind, value
    if kind in _SEQUENCES:
        parts = tuple(map(_plain, value))  # type: ignore[call-overload]
    elif kind is dict:
        parts = tuple(_plain(part) for item in value.items() for part in item)  # type: ignore[attr-defined]
    else:
        return None
    return None if None in parts else (kind, parts)


_ATOMS = frozenset((float, int, str, bool, Rule))
_SEQUENCES = frozenset((tuple, list, torch.Size))


def _make_law(
    size: object,
    rules: object,
    alpha: object,
    per: str,
    prob: object,
    lam_range: object,
    box: str,
    shared_lam: object,
    flip: str,
) -> _Law:
    size = check_size(size)
    prob = check_number("prob", prob, low=0.0, high=1.0, what="a probability in [0, 1]")
    check_choice("per", per, ("batch", "sample"))
    check_choice("box", box, ("inside", "clip"))
    check_choice("flip", flip, ("local", "global"))
    chances = _check_rules(rules)
    alphas = _check_alpha(alpha, tuple(chances))
    low, high = _check_lam_range(lam_range)
    cumulated = np.cumsum(np.array(list(chances.values()), dtype=np.float64))
    used = {alphas[rule] for rule in chances}
    numbers, edges = [int(rule) for rule in chances], (cumulated / cumulated[-1]).tolist()
    each = [alphas[rule] for rule in Rule]
    likely = tuple(rule for rule, chance in chances.items() if chance > 0)
    one_rule, one_lam, clip, globally = per == "batch", bool(shared_lam), box == "clip", flip == "global"
    others = (prob, low, high, one_rule, one_lam, clip, globally)
    return _Law(
        rules=numbers,
        edges=edges,
        alphas=np.array(each, dtype=np.float64),
        alpha=used.pop() if len(used) == 1 else None,
        occurring=tuple(sorted({Rule.KEEP, *likely})) if 0 < prob < 1 else likely if prob else (Rule.KEEP,),
        size=size,
        prob=prob,
        lam_range=(low, high),
        one_rule=one_rule,
        one_lam=one_lam,
        clip=clip,
        globally=globally,
        # One lam for the rows of each alpha is drawn in another order.
        numbers=None if one_lam and len(set(each)) > 1 else compiled_law(numbers, edges, each, size, *others),
    )


def _draw_lam(rng: np.random.Generator, law: _Law, rule: np.ndarray) -> np.ndarray:
    """lam ~ Beta(alpha, alpha) for every row, or, of a law with one lam, one draw for all rows of one alpha."""
    if law.alpha is not None:  # draws the very numbers of the general case, faster
        rows = min(len(rule), 1) if law.one_lam else len(rule)
        numbers = rng.beta(law.alpha, law.alpha, size=rows)
        return np.full(len(rule), numbers) if law.one_lam else numbers
    alpha = law.alphas[rule]
    if not law.one_lam:
        return rng.beta(alpha, alpha)
    kinds, inverse = np.unique(alpha, return_inverse=True)
    return rng.beta(kinds, kinds)[inverse]


def draw_boxes(
    rng: np.random.Generator,
    rule: np.ndarray,
    drawn: np.ndarray,
    lam_range: tuple[float, float],
    size: tuple[int, int],
    *,
    clip: bool,
    only: int | None = None,
) -> np.ndarray:
    """(N, 4) int32 boxes of the CutMix and ResizeMix rows, zeros elsewhere (method: paper Eq. 2, timm for `clip`).

    only: the rule of all rows, where it is known that they have one.
    """
    uniform = rng.random((2, len(rule)))
    pasted = which_boxed(rule, only)
    if pasted is False:
        return np.zeros((len(rule), 4), dtype=np.int32)
    resized = _folded(rule == _RESIZEMIX) if only is None else only == _RESIZEMIX
    if resized is not False:
        low, high = lam_range
        squeezed = low + (high - low) * drawn
        drawn = squeezed if resized is True else np.where(resized, squeezed, drawn)
    ratio = np.sqrt(np.maximum(1 - drawn, 0))
    extent = np.array(size, dtype=np.float64)[:, None]  # pixels stay float64, which holds them exactly
    cut = np.floor(extent * ratio)
    if clip:
        centre = np.minimum(np.floor(uniform * extent), extent - 1)
        start = np.clip(centre - cut // 2, 0, extent)
        cut = np.clip(centre + (cut + 1) // 2, 0, extent) - start
    else:
        room = extent - cut
        start = np.minimum(np.floor(uniform * (room + 1)), room)
    return _boxes(pasted, start, cut)


def _centred_boxes(rule: np.ndarray, lam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N, 4) int32 boxes in the middle, sized from lam, of the CutMix and ResizeMix rows; zeros elsewhere."""
    extent = np.array(size, dtype=np.int64)[:, None]
    cut = np.floor(extent * np.sqrt(1 - lam)).astype(np.int64)
    return _boxes(_folded(boxed(rule)), (extent - cut) // 2, cut)


def _boxes(pasted: np.ndarray | bool, start: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """(N, 4) int32: (2, N) starts and sides of both axes, where a box is `pasted`; zeros elsewhere."""
    boxes = np.empty((start.shape[1], 4), dtype=np.int32)
    boxes[:, :2], boxes[:, 2:] = start.T, cut.T
    if pasted is not True:
        boxes[np.logical_not(pasted)] = 0
    return boxes


def count_lam(
    rule: np.ndarray, drawn: np.ndarray, boxes: np.ndarray, area: int, *, only: int | None = None
) -> np.ndarray:
    """(N,) float32: the share of a row's own pixels, counted from its integer box; `only`: the rule of all rows."""
    pasted = which_boxed(rule, only)
    if pasted is not False:
        sides = boxes[:, 2:].astype(np.float64)  # whose products are exact
        counted = 1 - sides[:, 0] * sides[:, 1] / area
        drawn = counted if pasted is True else np.where(pasted, counted, drawn)
    lam = drawn.astype(np.float32)
    if only is None or only == _KEEP:
        lam[rule == _KEEP] = 1
    return lam


def check_size(size: object) -> tuple[int, int]:
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
        raise TypeError(f"size must be (H, W) in pixels, got {size!r}")
    height = check_integer("size[0]", size[0], low=1, high=2**31 - 1, what="a height in pixels, 1 or more")
    width = check_integer("size[1]", size[1], low=1, high=2**31 - 1, what="a width in pixels, 1 or more")
    return height, width


def _check_rules_tuple(rules: object) -> tuple[Rule, ...]:
    if isinstance(rules, (str, bytes)) or not isinstance(rules, Sequence):
        raise TypeError(f"rules must be a tuple of Rule values, got {rules!r}")
    try:
        return tuple(sorted({Rule(r) for r in rules}))
    except ValueError:
        raise ValueError(f"rules must hold Rule values (0 to 3), got {tuple(rules)!r}") from None


def _rule(argument: str, name: object) -> Rule:
    if isinstance(name, Rule):
        return name
    if not isinstance(name, str):
        raise TypeError(f"{argument} must hold rule names such as 'mixup', got {name!r}")
    try:
        return Rule[name.upper()]
    except KeyError:
        known = near(name.lower(), [r.name.lower() for r in Rule])
        raise ValueError(f"{argument} names an unknown rule {name!r}: {known}") from None


def _check_rules(rules: object) -> dict[Rule, float]:
    """Rules and their probabilities, in ascending order of rule so that the spelling order never moves a draw."""
    if isinstance(rules, Mapping):
        chances = {
            _rule("rules", name): check_number(f"rules[{name!r}]", p, low=0.0, high=1.0, what="a probability in [0, 1]")
            for name, p in rules.items()
        }
        if chances and abs(sum(chances.values()) - 1) > 1e-6:
            raise ValueError(f"rules must have probabilities that add up to 1, got a sum of {sum(chances.values()):g}")
    elif isinstance(rules, Sequence) and not isinstance(rules, str):
        names = [_rule("rules", name) for name in rules]
        if len(set(names)) != len(names):
            raise ValueError(
                f"rules names a rule twice: {tuple(rules)!r}; use a mapping name -> probability for weights"
            )
        chances = {name: 1 / len(names) for name in names}
    else:
        raise TypeError(f"rules must be a sequence of names or a mapping name -> probability, got {rules!r}")
    if not chances:
        raise ValueError("rules is empty: name at least one of mixup, cutmix, resizemix, keep")
    return dict(sorted(chances.items()))


def _check_alpha(alpha: object, rules: tuple[Rule, ...]) -> dict[Rule, float]:
    what = "a number above 0"
    if isinstance(alpha, Mapping):
        given = {_rule("alpha", name): value for name, value in alpha.items()}
        missing = [r.name.lower() for r in rules if r not in given and r != Rule.KEEP]
        if missing:
            raise ValueError(f"alpha has no entry for {', '.join(missing)}; give one per rule, or a single number")
        alphas = {r: given.get(r, 1.0) for r in Rule}
    else:
        alphas = dict.fromkeys(Rule, alpha)
    numbers = {r: check_number("alpha", a, low=0.0, what=what) for r, a in alphas.items()}
    if any(a <= 0 or a == float("inf") for a in numbers.values()):
        raise ValueError(f"alpha must be {what}, got {alpha!r}; leave a rule out of `rules` to switch it off")
    return numbers


def _check_lam_range(lam_range: object) -> tuple[float, float]:
    if not isinstance(lam_range, Sequence) or isinstance(lam_range, str) or len(lam_range) != 2:
        raise TypeError(f"lam_range must be (low, high) within [0, 1], got {lam_range!r}")
    low = check_number("lam_range[0]", lam_range[0], low=0.0, high=1.0, what="a share in [0, 1]")
    high = check_number("lam_range[1]", lam_range[1], low=0.0, high=1.0, what="a share in [0, 1]")
    if low > high:
        raise ValueError(f"lam_range must be (low, high) with low <= high, got {lam_range!r}")
    return low, high


def _check_partner(partner: Tensor | None, n: int, flip: str) -> tuple[np.ndarray, bool]:
    if partner is None:
        return np.arange(n - 1, -1, -1, dtype=np.int64), True
    if flip == "global":
        raise ValueError(
            "partner and flip='global' exclude each other: a given partner vector indexes this rank's rows"
        )
    check_tensor("partner", partner, dtypes=(torch.int64,), ndim=1, shape="(n,)")
    if len(partner) != n:
        raise ValueError(f"partner must have n={n} rows, got {len(partner)}")
    rows = partner.cpu().numpy().copy()
    if n and (rows.min() < 0 or rows.max() >= n):
        raise ValueError(f"partner must hold row numbers in [0, {n}), got {rows.min()} to {rows.max()}")
    return rows, False


def _check_values(plan: MixPlan) -> None:
    """The promises of MixPlan that need the values: only for tensors on the CPU."""
    rule, box, lam = plan.rule.numpy(), plan.box.numpy().astype(np.int64), plan.lam.numpy()
    partner, height, width = plan.partner.numpy(), *plan.size
    if len(rule) == 0:
        return
    unknown = sorted(set(rule.tolist()) - {int(r) for r in plan.rules})
    if unknown:
        raise ValueError(f"rule holds {unknown}, but rules says only {tuple(int(r) for r in plan.rules)} may occur")
    if partner.min() < 0:
        raise ValueError(f"partner must hold row numbers of 0 or more, got {partner.min()}")
    if plan.mirrored and not np.array_equal(partner, np.arange(len(rule) - 1, -1, -1)):
        raise ValueError("mirrored is True but partner is not the flip N-1-i; give mirrored=False")
    for name, share in (("lam", lam), ("partner_lam", plan.partner_lam.numpy())):
        _check_shares(name, share)
    pasted = boxed(rule)
    _check_boxes(rule, box, plan.size)
    if (lam[rule == Rule.KEEP] != 1).any():
        raise ValueError("lam must be 1 for rows with KEEP")
    counted = 1 - box[:, 2] * box[:, 3] / (height * width)
    wrong = pasted & (np.abs(lam - counted) > 1e-6)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"lam of row {row} is {lam[row]:g}, but its box leaves a share of {counted[row]:g}: for CUTMIX and "
            f"RESIZEMIX lam must be 1 - h*w/(H*W)"
        )


def _check_shares(name: str, share: np.ndarray) -> None:
    within = (share >= 0) & (share <= 1)
    if not within.all():
        raise ValueError(f"{name} must hold shares in [0, 1], got {share[~within][0]}")


def _check_boxes(rule: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> None:
    height, width = size
    pasted = boxed(rule)
    if not pasted.all() and box[~pasted].any():
        raise ValueError("box must be zeros for rows with KEEP or MIXUP")
    wide = box.astype(np.int64)
    inside = (wide >= 0).all(1) & (wide[:, 0] + wide[:, 2] <= height) & (wide[:, 1] + wide[:, 3] <= width)
    if not inside.all():
        row = int(np.flatnonzero(~inside)[0])
        raise ValueError(f"box must lie inside the {height} x {width} image, but row {row} has {box[row].tolist()}")


def _host_array(name: str, value: object, dtype: torch.dtype, shape: str, rows: int | None = None) -> np.ndarray:
    """The values of a constant tensor on the CPU, of shape (N,) or (N, 4)."""
    tensor = check_tensor(name, value, dtypes=(dtype,), ndim=1 + ("4" in shape), shape=shape)
    if tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is on {tensor.device}, but plans are made on the host; give it on the CPU, and `device`"
        )
    if tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, but a plan holds constants; use .detach()")
    if rows is not None and len(tensor) != rows:
        raise ValueError(f"{name} has {len(tensor)} rows but lam has {rows}; give one per row")
    if tensor.ndim == 2 and tensor.shape[1] != 4:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    return tensor.numpy()


def _rule_rows(rule: object, n: int) -> tuple[np.ndarray, tuple[Rule, ...]]:
    """(n,) uint8 rules, and those that occur."""
    if not isinstance(rule, Tensor):
        one = _rule("rule", rule)
        return np.full(n, int(one), dtype=np.uint8), (one,)
    rows = _host_array("rule", rule, torch.uint8, "(N,)", rows=n).copy()
    occurring = sorted(set(rows.tolist()))
    if occurring and occurring[-1] > _RESIZEMIX:
        raise ValueError(f"rule must hold Rule values (0 to {_RESIZEMIX}), got {occurring[-1]}")
    return rows, tuple(Rule(value) for value in occurring)


def _flatten(plan: MixPlan) -> tuple[list[Tensor], tuple[tuple[int, int], bool, tuple[Rule, ...]]]:
    return plan._tensors(), (plan.size, plan.mirrored, plan.rules)


def _unflatten(tensors: Iterable[Any], host: tuple[tuple[int, int], bool, tuple[Rule, ...]]) -> MixPlan:
    size, mirrored, rules = host
    parts = dict(zip(_TENSORS, tensors, strict=True))
    return trusted(*(parts[name] for name in _DTYPES), size, mirrored, rules)


register_pytree_node(MixPlan, _flatten, _unflatten, serialized_type_name="sdmp_kernels.plan.MixPlan")

"""Files that turn out damaged in mid-run: every rank hears of them, they are named once, and counted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch

from .data import Batch
from .distributed import World, gather_on_hosts, gather_text
from .log import Log
from .text import printable

NAMED = 10
"""Files that are named on the terminal; train.log has all of them."""


class Lost(Protocol):
    """What the loop asks."""

    @property
    def too_many(self) -> bool:
        """Whether the run is to end, the same on all ranks."""

    @property
    def facts(self) -> dict[str, float]:
        """For metrics.jsonl."""

    def before(self, step: int) -> int:
        """Images lost in the steps of this epoch before that one: what a checkpoint keeps."""

    def agree(self, batch: Batch, step: int, log: Log) -> Batch:
        """The batch of a step with what all ranks have lost of it."""


class NoneLost:
    """Where a damaged file is an error, so that no batch has lost any."""

    too_many = False
    facts: ClassVar[dict[str, float]] = {}

    def before(self, step: int) -> int:
        """0."""
        return 0

    def agree(self, batch: Batch, step: int, log: Log) -> Batch:
        """As it is."""
        return batch


NONE_LOST = NoneLost()


@dataclass
class LostImages:
    """What of an epoch's images could not be decoded, over all ranks. Every rank calls it at every step."""

    world: World
    steps_per_epoch: int
    limit: float
    """How many of an epoch's images may be lost."""
    start: int = 0
    """The step that a resumed run goes on from."""
    earlier: int = 0
    """Images that were lost before it in the epoch of that step."""
    lost: dict[int, int] = field(default_factory=dict)
    """Step -> images lost in it, of the present epoch."""
    known: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """Of this epoch so far."""
        return sum(self.lost.values())

    @property
    def too_many(self) -> bool:
        """The same on all ranks. What was lost before a resume counts, but ends no run by itself: it may be mended."""
        return self.count > self.limit and max(self.lost, default=-1) >= self.start

    @property
    def facts(self) -> dict[str, float]:
        """Images of this epoch that were lost."""
        return {"lost_images": self.count}

    def before(self, step: int) -> int:
        """As in `Lost`; a step that is made again counts once."""
        first = step - step % self.steps_per_epoch
        return sum(count for at, count in self.lost.items() if first <= at < step)

    def __post_init__(self) -> None:
        if self.earlier:
            self.lost[self.start - 1] = self.earlier

    def agree(self, batch: Batch, step: int, log: Log) -> Batch:
        """The batch with `all_valid`, where some rank has lost a row; the files are named."""
        valid = gather_on_hosts(batch.valid.to(torch.uint8), self.world).bool()
        first = step - step % self.steps_per_epoch
        self.lost = {at: count for at, count in self.lost.items() if at >= first}
        if bool(valid.all()):
            return batch
        self.lost[step] = int((~valid).sum())
        lines = "\0".join(f"{file.path!r} {printable(file.reason)}" for file in batch.bad)
        for line in "\0".join(text for text in gather_text(lines, self.world) if text).split("\0"):
            self._name(line, log)
        return replace(batch, all_valid=valid)

    def _name(self, line: str, log: Log) -> None:
        if line in self.known:
            return
        self.known.add(line)
        said = f"left out of the loss, since it could not be decoded: {line}"
        if len(self.known) <= NAMED:
            log.say(said)
        else:
            log.report(said, live=f"{len(self.known)} files could not be decoded")


def too_many_lost(images: int) -> str:
    """Why a run ends."""
    return (
        f"more of the {images} images could not be decoded than --max-bad-frac allows; train.log names them. Repair or "
        "remove them, or allow more"
    )

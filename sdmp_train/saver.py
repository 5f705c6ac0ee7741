"""When a training's checkpoints are written, and what happens where they cannot be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checkpoint
from .log import Log
from .training import Training, state_parts

SAVE_ATTEMPTS = 3
RETRY_SECONDS = 2.0
"""Between attempts at the last checkpoint: a quota or a full disk may give way."""


@dataclass
class Saver:
    """Writes the checkpoints of one training. Only the first rank has use for one."""

    training: Training
    folder: Path
    """Of checkpoints."""
    log: Log
    describe: Callable[[], dict[str, Any]]
    """What is stored beside the tensors, besides the step."""
    failed: int = 0
    """Attempts in a row that have failed."""
    saved_at: float = field(default_factory=time.monotonic)

    def is_due(self) -> bool:
        """Whether as much time has passed since the last attempt as the settings allow."""
        return 0 < self.training.config.run.save_every_minutes <= (time.monotonic() - self.saved_at) / 60

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint, the last one in up to three attempts.

        Raises:
            Unwritable: three attempts in a row have failed. A failure before that is reported and survived.
        """
        while (error := self.try_to_save()) is not None:
            if self.failed >= SAVE_ATTEMPTS:
                raise checkpoint.Unwritable(
                    f"checkpoints cannot be written to {self.folder}, {SAVE_ATTEMPTS} attempts in a row have failed: "
                    f"{error}"
                ) from error
            if not last:
                return
            time.sleep(RETRY_SECONDS)

    def try_to_save(self) -> OSError | None:
        """Write a checkpoint and delete old ones; a failure is said, counted and returned."""
        try:
            checkpoint.save_checkpoint(self.folder, self.training.step, state_parts(self.training), self.describe())
            for line in checkpoint.set_later_aside(self.folder, self.training.step):
                self.log.say(line)
            for line in checkpoint.delete_old_checkpoints(self.folder, self.training.config.run.keep_checkpoints):
                self.log.say(line)
        except OSError as error:
            self.failed += 1
            self.log.say(f"the checkpoint of step {self.training.step} could not be written: {error}")
            return error
        finally:
            self.saved_at = time.monotonic()
        self.failed = 0
        return None

"""curves.png in the run folder: what was logged so far, drawn again as the run goes, by a thread of its own."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path

from .durable import replacing
from .evaluate.figures import curves, words
from .evaluate.record import read_record
from .log import Log

FEWEST_LINES = 12
"""Of metrics.jsonl: before that there is no curve to see."""
EVERY_SECONDS = 60.0
SHARE = 50
"""Of the time between two drawings, drawing takes at most one part in so many."""
SHOWN = {
    "knn": "kNN accuracy, %",
    "lr": "learning rate",
    "data_wait_fraction": "share of the time spent waiting for data",
}


class Curves:
    """Draws the picture of a run now and then, and a last time at its end."""

    def __init__(self, folder: Path, log: Log) -> None:
        self.folder, self.log = folder, log
        self._drawing: threading.Thread | None = None
        self._due_at = time.monotonic() + EVERY_SECONDS
        self._failed = importlib.util.find_spec("matplotlib") is None

    def after_step(self) -> None:
        """Begin to draw where it is time."""
        if time.monotonic() < self._due_at or self._failed or (self._drawing and self._drawing.is_alive()):
            return
        self._due_at = time.monotonic() + EVERY_SECONDS
        self._drawing = threading.Thread(target=self._draw, name="curves", daemon=True)
        self._drawing.start()

    def last(self) -> None:
        """Draw all of it, and wait for that."""
        if self._drawing is not None:
            self._drawing.join()
        if not self._failed:
            self._draw()

    def _draw(self) -> None:
        began = time.monotonic()
        try:
            draw_curves(self.folder)
        except Exception as error:  # a picture: whatever is wrong with it, the run goes on
            self._failed = True
            self.log.say(f"curves.png cannot be drawn: {type(error).__name__}: {error}")
        taken = time.monotonic() - began
        self._due_at = max(self._due_at, time.monotonic() + SHARE * taken)


def draw_curves(folder: Path) -> bool:
    """Write curves.png from what a run folder holds; False where that is too little.

    Raises:
        ConfigError, OSError: the folder cannot be read, the picture not be written.
    """
    record = read_record(folder)
    if sum("loss" in row for row in record.rows) < FEWEST_LINES:
        return False
    losses = {key: words(key) for key in record.keys if key == "loss" or key.startswith("loss_")}
    figure = curves([record], losses | {key: title for key, title in SHOWN.items() if key in record.keys})
    figure.suptitle(f"{record.name}: {record.config.run.preset}", fontsize=10)
    with replacing(folder / "curves.png") as draft:
        figure.savefig(draft, format="png", dpi=110)
    return True

"""What the settings of a method say before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from ...settings import DataConfig

if TYPE_CHECKING:
    from sdmp_kernels.views import Size

    from ..method import Method


class Pass(NamedTuple):
    """An image that goes through the backbone, for every image of a batch."""

    px: Size
    trained: bool
    """Whether gradients go back through it."""


class Settings(Protocol):
    """A method's own frozen dataclass of settings, mixing included."""

    @staticmethod
    def method_class() -> type[Method]:
        """The method itself; imported here, since it needs torch."""

    def passes(self, data: DataConfig) -> list[Pass]:
        """What goes through the backbone in a step, for every image of the batch."""

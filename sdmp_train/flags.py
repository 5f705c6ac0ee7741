"""How a setting is spelled on the command line: tyro's own words where tyro is installed.

They stand in annotations alone, so that settings can be built, read from files and checked without it; only the
command line itself needs it.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

try:
    from tyro.conf import AvoidSubcommands, OmitArgPrefixes, Positional, arg
except ModuleNotFoundError:
    _Setting = TypeVar("_Setting")
    AvoidSubcommands = OmitArgPrefixes = Positional = Annotated[_Setting, None]  # type: ignore[misc]

    def arg(**_: Any) -> None:  # type: ignore[misc]
        """Nothing: without tyro nobody reads how a field is spelled."""
        return None


__all__ = ["AvoidSubcommands", "OmitArgPrefixes", "Positional", "arg"]

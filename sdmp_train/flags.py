"""How a setting is spelled on the command line: tyro's own words where tyro is installed.

They stand in annotations alone, so that settings can be built, read from files and checked without it; only the
command line itself needs it.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_type_hints

try:
    from tyro.conf import AvoidSubcommands, OmitArgPrefixes, Positional, Suppress, arg
except ModuleNotFoundError:
    _Setting = TypeVar("_Setting")
    AvoidSubcommands = OmitArgPrefixes = Positional = Suppress = Annotated[_Setting, None]  # type: ignore[misc]

    def arg(**_: Any) -> None:  # type: ignore[misc]
        """Nothing: without tyro nobody reads how a field is spelled."""
        return None


__all__ = ["AvoidSubcommands", "OmitArgPrefixes", "Positional", "Suppress", "arg", "flag_of", "words_of"]


def flag_of(settings: object, name: str) -> str:
    """The flag of a field of a settings dataclass: its own spelling where `arg` gives one."""
    hint = get_type_hints(type(settings), include_extras=True)[name]
    given = next((mark.name for mark in getattr(hint, "__metadata__", ()) if getattr(mark, "name", None)), name)
    return f"--{given.replace('_', '-')}"


def words_of(settings: object, name: str) -> tuple[str, str]:
    """A field's flag and its value, as both are typed: a switch is one word, --blur or --no-blur."""
    flag, value = flag_of(settings, name), getattr(settings, name)
    if isinstance(value, bool):
        return (flag if value else flag.replace("--", "--no-", 1)), ""
    return flag, " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

"""Commands that are printed for people to paste, which Python they mean, and this source tree.

And how a program leaves without a traceback. This is imported before anything that has to be installed, so that it can
say what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1]
"""Where the packages lie: a clone has its pyproject.toml there."""
NEEDED = {
    "": ("torch", "numpy"),
    "train": ("timm", "torchvision", "PIL", "safetensors", "tyro", "yaml", "rich", "matplotlib"),
}
"""What the package itself and its extra `train` install, as it is imported."""


def python() -> str:
    """`python` where a shell takes that for the interpreter that runs now, else its path, quoted for a shell.

    In a virtual environment it is a link to a Python that has other packages: the folder has to be the same too.
    """
    found, own = shutil.which("python"), sys.executable
    if not own:
        return "python"
    same_folder = found and os.path.realpath(os.path.dirname(found)) == os.path.realpath(os.path.dirname(own))
    return "python" if found and same_folder and os.path.samefile(found, own) else shlex.quote(own)


COMMAND = "python -m"
"""How every command begins that is printed for people to paste."""


def command(module: str, *words: str) -> str:
    """A command that runs a module of ours, such as "sdmp_train", with these words, which are quoted for a shell.

    It says `python`, as all pages do; `elsewhere` goes with it.
    """
    return " ".join([COMMAND, module, *map(shlex.quote, words)])


def elsewhere() -> list[str]:
    """A line beside commands that say `python`, where a shell takes that for another one: which it is, and what makes
    it so for the shell.
    """
    if python() == "python":
        return []
    activate = Path(sys.executable).parent / "activate"
    hint = f": source {shlex.quote(str(activate))}" if activate.is_file() else ""
    return [f"`python` is here {python()}{hint}"]


def install(extra: str = "") -> str:
    """The command that installs the package, with an extra: from an index, or from the clone that this is."""
    brackets = f"[{extra}]" if extra else ""
    if not (SOURCES / "pyproject.toml").is_file():
        return f"pip install {shlex.quote(f'sdmp-kernels{brackets}') if extra else 'sdmp-kernels'}"
    folder = "." if Path.cwd() == SOURCES else str(SOURCES)
    return f"{python()} -m pip install -e {shlex.quote(folder + brackets)}"


def own_environment(program: str) -> str:
    """Where the clone has an environment that does not run now: how the program is called with it."""
    there = SOURCES / ".venv" / "bin" / "python"
    if not there.is_file() or os.path.realpath(sys.prefix) == os.path.realpath(SOURCES / ".venv"):
        return ""
    return f" (or, with what is installed in this clone: {shlex.quote(str(there))} -m {program})"


def drop_output() -> None:
    """What follows on standard output goes nowhere: its reader, such as `head`, has read enough and is gone.

    What Python still holds is dropped too; its flush at exit would fail.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def no_traceback(program: str) -> Iterator[None]:
    """Around a program: a reader of its output that is gone is no error, and a package that is missing one line."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    except ModuleNotFoundError as error:
        leave_without(error, program)


def leave_without(error: ModuleNotFoundError, program: str, extra: str = "train") -> None:
    """Exit with code 2 where `program` misses a package that it needs; raises any other error again."""
    package = (error.name or "").partition(".")[0]
    if not any(package in names for names in NEEDED.values()):
        raise error
    print(
        f"error: {package} is not installed, which {program} needs: {install(extra)}{own_environment(program)}",
        file=sys.stderr,
    )
    sys.exit(2)

"""The oldest Triton that is supported, in a folder of its own beside the installed one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OLDEST = "3.6.0"


class Unavailable(Exception):
    """It is not here and cannot be fetched; the text says why."""


def unpacked() -> Path:
    """A folder to put before all others on the module path; fetched once, and kept inside the environment."""
    folder = Path(sys.prefix) / "oldest-triton" / OLDEST
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", scratch, f"triton=={OLDEST}"], capture_output=True, text=True, check=False
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise Unavailable(f"Triton {OLDEST} cannot be fetched: {(done.stderr or done.stdout).strip()[-300:]}")
        target = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(target)
        for tool in (target / "triton" / "backends" / "nvidia" / "bin").glob("*"):
            tool.chmod(0o755)  # zipfile forgets what may be executed
        target.rename(folder)
    return folder

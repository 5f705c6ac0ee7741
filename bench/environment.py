"""What was measured on: processor, GPU, versions, commit. Nothing that names a person, a host or a folder."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES: tuple[str, ...] = (
    "torch",
    "triton",
    "numpy",
    "torchvision",
    "timm",
    "kornia",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "inf-cl",
    "nvidia-dali-cuda130",
    "tyro",
    "sdmp-kernels",
)


def shared_data(name: str, root: Path = ROOT) -> Path | None:
    """A file or folder of the shared data, in `shared/data` of the repository or beside it; None where it is absent."""
    for folder in (root, root.parent):
        path = folder / "shared" / "data" / name
        if path.exists():
            return path
    return None


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str | None:
    """The first words a program says, or None where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """The CPU's model name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu() -> dict[str, Any] | None:
    """The CUDA device in use: name, capability, memory, L2, driver; None without one."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "nvcc": nvcc(),
    }


def nvcc() -> str | None:
    """The version of the CUDA compiler, or None."""
    found = re.search(r"release ([\d.]+)", output("nvcc", "--version") or "")
    return found[1] if found else None


def commit(*but: str) -> tuple[str | None, bool | None]:
    """(commit, whether the tree differs from it, `but` for these paths); (None, None) outside a git checkout."""
    head = output("git", "rev-parse", "--verify", "--quiet", "HEAD")
    if not head:
        return None, None
    paths = ["--", ".", *(f":!{path}" for path in but)]
    return head, bool(output("git", "status", "--porcelain", "--untracked-files=no", *paths))


def describe() -> dict[str, Any]:
    """The machine and its software, as the results file stores them."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": gpu(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def command() -> str:
    """The command that runs now, with no folder of this machine in it."""
    words = [str(Path(word).name) if word.startswith("/") else word for word in sys.argv[1:]]
    return f"python -m bench {shlex.join(words)}".rstrip()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def machine_slug() -> str:
    """A short name for result files: the GPU's, or the processor's with its cores."""
    card = gpu()
    name = card["name"] if card else f"cpu-{processor()}-{cores()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def line() -> str:
    """The environment in one line for people."""
    card, (head, dirty) = gpu(), commit()
    parts = [
        f"{processor()}, {cores()} cores, {torch.get_num_threads()} threads",
        f"{card['name']} (driver {card['driver']})" if card else "no GPU",
        f"torch {torch.__version__}, triton {version('triton') or 'absent'}, Python {platform.python_version()}",
        f"commit {head[:10]}{' + changes' if dirty else ''}" if head else "no commit",
        now(),
    ]
    return "; ".join(parts)

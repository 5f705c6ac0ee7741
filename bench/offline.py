"""Carries wheels to a GPU host that reaches no package registry: `python -m bench offline pack|unpack FOLDER`.

`pack`, on a connected machine, downloads the wheels for the host's Python; copy the folder; `unpack`, there, checks
them against their digests and installs them without asking any registry. What the host has already (torch, triton,
numpy, timm and their like) is not carried; docs/benchmarks.md says how to carry DALI.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from sdmp_train.advice import command as printed

# tyro and what it imports: the trainer's command line. The others: peers that the benchmarks compare with.
WANTED = ("tyro", "docstring-parser", "typeguard", "kornia", "kornia-rs", "liger-kernel", "cut-cross-entropy", "inf-cl")
MANIFEST = "sha256.json"
# Wheels name the oldest C library they run on; a GPU host of today has at least the newest of these.
GLIBC = (17, 24, 27, 28, 31, 34, 35)


def run(args: argparse.Namespace) -> int:
    """Pack or unpack; returns the exit code."""
    if args.action == "pack":
        return pack(args.folder, args.python)
    return unpack(args.folder, args.into)


def pack(folder: Path, python: str) -> int:
    """Download the wheels into `folder` and write their digests."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in GLIBC] + ["--platform=manylinux2014_x86_64"]
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
    missing = []
    for package in WANTED:
        command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), package]
        if subprocess.run(command).returncode:
            missing.append(package)
    digests = {wheel.name: digest(wheel) for wheel in sorted(folder.glob("*.whl"))}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n")
    for name in digests:
        print(f"{(folder / name).stat().st_size:>12,}  {name}")
    if missing:
        print(f"not packed: {', '.join(missing)}; the benchmarks will name them absent")
    print(f"copy {folder.name}/ to the host, then there: python -m bench offline unpack {folder.name}")
    return 0 if digests else 2


def unpack(folder: Path, into: Path | None) -> int:
    """Check the wheels in `folder` and install them, into this environment or into a folder of its own."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        print(f"{folder.name} has no {MANIFEST}; make it with: {printed('bench', 'offline', 'pack', folder.name)}")
        return 2
    wheels = []
    for name, expected in json.loads(manifest.read_text()).items():
        wheel = folder / name
        if not wheel.exists() or digest(wheel) != expected:
            print(f"{name} is missing or damaged; copy it again")
            return 2
        wheels.append(str(wheel))
    target = ["--target", str(into)] if into else []
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", *target, *wheels]
    code = subprocess.run(command).returncode
    if code:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(f"not installed; wheels for this Python are packed with: offline pack {folder.name} --python {version}")
    if code == 0 and into:
        print(f"export PYTHONPATH={into}")
    return code


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

"""What the compiled kernels are made of, as a digest: `setup.py` records it, and `_backends.py` compares.

It imports nothing of the package: an installer has no torch where it runs this file.
"""

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".cu", ".h")


def digest(folder: Path) -> str:
    """SHA-256 of the names and bytes of the sources in `folder`."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and not path.name.startswith("."):  # editors write files of their own there
            data = path.read_bytes()
            found.update(f"{path.name} {len(data)}\n".encode() + data)
    return found.hexdigest()

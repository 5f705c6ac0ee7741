"""Twenty steps of small trainings, and the SHA-256 digests of every tensor their last checkpoint holds.

    python tests/golden_training.py                   print the digests of this checkout
    python tests/golden_training.py --checkout DIR    of another one, such as the commit before
    python tests/golden_training.py --record          write them to tests/golden/training.json
    python tests/golden_training.py --runs NAME ...   these trainings alone

A change that is meant to move no number is proved by equal digests; one that moves numbers records them anew and says
why. Only the command line is used, so that checkouts of any layout can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from sdmp_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "tests" / "golden" / "training.json"
COMMON = (
    "--max-steps 20 --device cpu --loader torchvision --workers 0 --knn-max-images 0 --log-every-steps 10 "
    "--data embedded"
)
HEADS = "--moco-dim 32 --moco-mlp-dim 64"
VIT = (
    "--arch vit_tiny_patch16_224 --stem imagenet --patch-px 4 --width 64 --depth 2 --heads 2 --batch-size 32 --lr 3e-3 "
    "--momentum-teacher 0.99"
)
RUNS = {
    "quickstart": (1, "--preset quickstart --batch-size 64"),
    "cifar-stem-lars": (1, f"--preset cifar10-r18-sdmp --image-px 16 --batch-size 8 {HEADS}"),
    **{
        method: (1, f"--preset quickstart --method {method} --batch-size 32 --depth 2 {HEADS} {flags}")
        for method, flags in {
            "imix": "--imix-rule cutmix",
            "dacl": "--dacl-alpha 0.5",
            "mochi": "--mochi-warmup-epochs 0.05 --mochi-hard 16 --mochi-mixed 16 --mochi-query-mixed 4",
        }.items()
    },
    "dino": (1, f"--preset quickstart-dino {VIT} --drop-path-rate 0.1"),
    "dino-plain": (1, f"--preset quickstart-dino {VIT} --mixing none --no-norm-last-layer"),
    "two-processes": (2, f"--preset quickstart -b 16 --depth 2 --variant extra --rules mixup cutmix {HEADS}"),
}


def environment() -> str:
    """What the bits depend on besides the code: digests of another environment say nothing about this one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    facts = dict(reversed([[side.strip() for side in line.split(":", 1)] for line in lines if ":" in line]))
    # The name alone does not settle it: virtual machines call several generations alike, and oneDNN's convolutions differ.
    processor = facts.get("model name", "unknown CPU") + "".join(
        f" {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts
    )
    serving = ", ".join(f"{op}: {backends()[op]['cpu']}" for op in ("mix", "info_nce"))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {processor}, 1 thread, {serving}"


def digests(name: str, checkout: Path = ROOT) -> dict[str, str]:
    """Train in processes of their own, on one thread each; a digest for each part of the last checkpoint."""
    processes, flags = RUNS[name]
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        done = subprocess.run(
            [*launch, "sdmp_train", "pretrain", *f"{flags} {COMMON} --output run".split()],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            raise RuntimeError(f"{name} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        checkpoint = Path(folder) / "run" / "checkpoints" / "step-000020"
        return {path.stem: digest(path) for path in sorted(checkpoint.glob("*.safetensors"))}


def digest(path: Path) -> str:
    """Of the names, types and bytes of all tensors in a file."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    asked = parser.parse_args()
    found = {name: digests(name, asked.checkout.resolve()) for name in asked.runs}
    print(json.dumps({environment(): found}, indent=2))
    if asked.record:
        known = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
        here = {**known.get(environment(), {}), **found}
        RECORDED.write_text(json.dumps({**known, environment(): here}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

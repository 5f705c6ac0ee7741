"""Builds csrc/ when a compiler is there; a missing one is a notice, never a failed install.

Two libraries on the LibTorch stable ABI, so that one binary serves every torch from 2.11 on and any Python:
`_native_cpu.so` by the C++ compiler, `_native_cuda.so` by nvcc and the C++ compiler. Whether a GPU is visible does not
matter for the second; whether torch is a CUDA build does. What was built, or why not, goes to `_build.json` in the
package, where `sdmp_kernels.backends()` reads it.

In csrc/, `<op>_cpu.cpp` holds kernels that are compiled once per instruction set, `<op>_cuda*.cpp` and `<op>_cuda*.cu`
belong to the CUDA library, and any other `*.cpp` to the CPU library; `<op>_*_op.cpp` is the torch side of either.
"""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).resolve().parent / "csrc"
PACKAGE = Path(__file__).resolve().parent / "sdmp_kernels"
OLDEST_TORCH = (2, 11)
# Contraction off: a product and a sum round one by one, as in the reference. Without trapping arithmetic a choice
# between two values can be computed by computing both, which is what vectorising takes; no result changes.
EXACT = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
# A compiler that is newer than ours may warn of more: that must cost nobody the library.
STRICT = ["-Werror=all-warnings"] if os.environ.get("SDMP_STRICT") else []
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# The loops vectorise as at -O3; the rest of -O3 doubles the compile time and gains nothing here.
COMMON = [
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-fPIC",
    "-fvisibility=hidden",
    *WARNINGS,
]
# The instruction sets that the CPU kernels are compiled for, of which the best one is chosen at run time.
SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c", "-mprefer-vector-width=512"],
}
ARCHITECTURES = (80, 90, 100)


class Unbuilt(Exception):
    """Why a library cannot be built here, in words for the user."""


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of the first version number in `text`."""
    found = re.search(r"(\d+)\.(\d+)", text)
    if found is None:
        raise Unbuilt(f"no version number in {text!r}")
    return int(found[1]), int(found[2])


def run(command: list[str]) -> str:
    """Standard output of a command; raises Unbuilt with the first error it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unbuilt(f"{command[0]} does not run ({error.strerror})") from None
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit status {done.returncode}"]
        raise Unbuilt(f"{Path(command[0]).name} failed: {errors[0].strip()[:300]}")
    return done.stdout


def load_torch():
    """The torch module that the libraries are compiled against."""
    try:
        import torch
    except ImportError as error:
        raise Unbuilt(f"torch cannot be imported while building ({error})") from None
    if version_of(torch.__version__) < OLDEST_TORCH:
        raise Unbuilt(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    return torch


def cpp_compiler() -> str:
    """The C++ compiler: $CXX, c++, g++ or clang++."""
    if sys.platform == "win32":
        raise Unbuilt("building on Windows is not supported")
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(name):
            return name
    raise Unbuilt(f"no C++ compiler found ({wanted or 'c++, g++, clang++'})")


def cuda_compiler() -> str:
    """nvcc of the toolkit in $CUDA_HOME, on the path, in its usual place or in the nvidia-cuda-nvcc wheel."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    wheels = [str(path.parent.parent) for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/nvcc")]
    for found in (
        *(shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes[:2] if home),
        shutil.which("nvcc"),
        *(shutil.which("nvcc", path=str(Path(home) / "bin")) for home in [homes[2], *wheels] if home),
    ):
        if found:
            return found
    raise Unbuilt("nvcc was not found")


def flags_of(torch) -> list[str]:
    """What the sources that see torch's headers are compiled with: the stable ABI of the oldest supported release."""
    target = OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48
    include = Path(torch.__file__).parent / "include"
    return [f"-DTORCH_TARGET_VERSION={target:#018x}", "-isystem", str(include)]


def compile_all(commands: list[list[str]]) -> None:
    """Run the compilations side by side; the first failure is raised."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(run, commands))


def first_line(compiler: str) -> str:
    """What the compiler calls itself, such as "g++ (Debian 12.2.0-14) 12.2.0"."""
    return (run([compiler, "--version"]).splitlines() or [compiler])[0]


def build_cpu(library: Path, folder: Path, sets: Sequence[str] | None = None, sources: str = "*.cpp") -> str:
    """Compile the CPU library, its objects into `folder`; returns what it was built with.

    Args:
        sets: the names in `SETS` to compile kernels for; default all where the machine is an x86-64, else the first.
        sources: which of the files, for a library of some ops.
    """
    torch, compiler = load_torch(), cpp_compiler()
    if sets is None:
        sets = list(SETS) if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]
    commands, objects = [], []
    for source in sorted(SOURCES.glob(sources)):
        if "_cuda" in source.stem:
            continue
        if source.stem.endswith("_cpu"):
            variants = {name: [f"-DSDMP_ISA={name}", *SETS[name]] for name in sets}
        else:
            variants = {"": [*flags_of(torch), *(f"-DSDMP_WITH_{name.upper()}" for name in sets)]}
        for name, flags in variants.items():
            objects.append(str(folder / f"{source.stem}{name}.o"))
            commands.append([compiler, *COMMON, *EXACT, *flags, "-c", str(source), "-o", objects[-1]])
    compile_all(commands)
    libraries = Path(torch.__file__).parent / "lib"
    run([compiler, "-shared", *objects, "-L", str(libraries), "-ltorch_cpu", "-o", str(library)])
    kinds = {"portable": "plain x86-64", "avx2": "AVX2", "avx512": "AVX-512"}
    built = ", ".join(kinds[name] for name in reversed(sets)) if len(sets) > 1 else ""
    return f"built with {first_line(compiler)}{f' for {built}' if built else ''}"


def cuda_targets(torch, nvcc: str) -> list[str]:
    """The -gencode options: the architectures of the visible GPUs, or a list that serves Ampere to Blackwell.

    The last one also goes in as PTX, for cards that are newer than this.
    """
    known = {int(arch) for arch in re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))}
    visible = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    wanted = {major * 10 + minor for major, minor in map(torch.cuda.get_device_capability, visible)} & known
    chosen = sorted(wanted or known.intersection(ARCHITECTURES))
    if not chosen:
        raise Unbuilt(f"{nvcc} compiles for none of sm_{', sm_'.join(map(str, ARCHITECTURES))}")
    options = [f"arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return [f"-gencode={option}" for option in (*options, f"arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")]


def cuda_flags() -> list[str]:
    """What the kernels are compiled with, but for the architectures."""
    return ["-std=c++17", "-O3", "-fmad=false", "-DSDMP_ISA=gpu", *STRICT, "--threads=0"]


def build_cuda(library: Path, folder: Path) -> str:
    """Compile the CUDA library, its objects into `folder`; returns what it was built with."""
    torch = load_torch()
    if torch.version.cuda is None:
        raise Unbuilt("this torch is not a CUDA build")
    compiler, nvcc = cpp_compiler(), cuda_compiler()
    release = re.search(r"release ([\d.]+)", run([nvcc, "--version"]))
    version = version_of(release[1] if release else "")
    if version[0] != version_of(torch.version.cuda)[0]:
        raise Unbuilt(f"nvcc is of CUDA {'.'.join(map(str, version))}, but torch of CUDA {torch.version.cuda}")
    host = ["-ccbin", compiler, "-Xcompiler=-fPIC,-fvisibility=hidden"]
    targets, commands, objects = cuda_targets(torch, nvcc), [], []
    for source in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*_cuda*.cpp")]):
        objects.append(str(folder / f"{source.stem}.{source.suffix[1:]}.o"))
        tool = (
            [nvcc, *cuda_flags(), *host, *targets]
            if source.suffix == ".cu"
            else [compiler, *COMMON, *flags_of(torch), "-DUSE_CUDA"]
        )
        commands.append([*tool, "-c", str(source), "-o", objects[-1]])
    compile_all(commands)
    libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", "-cudart=shared", "-L", str(libraries), "-ltorch_cpu", "-ltorch_cuda"]
    run([nvcc, *host, *targets, *objects, *link, "-o", str(library)])
    served = ", ".join(re.findall(r",code=(\w+)", " ".join(targets)))
    return f"built with nvcc {'.'.join(map(str, version))} for {served}"


BUILDS = {"_native_cpu": build_cpu, "_native_cuda": build_cuda}


def wanted(name: str) -> None:
    """Raises Unbuilt for a library that $SDMP_NATIVE (such as "cpu", "cpu,cuda" or "none") leaves out."""
    chosen = os.environ.get("SDMP_NATIVE")
    if chosen is not None and name.removeprefix("_native_") not in chosen.replace(" ", "").split(","):
        raise Unbuilt(f"left out by SDMP_NATIVE={chosen}")


def build(package: Path) -> dict[str, str]:
    """Build what can be built into the folder of the package; returns, and writes there, what became of each library.

    Beside that it writes the digest of the sources: where these have changed since, the libraries are not used.
    A library replaces its predecessor by a rename, since running processes may have that one loaded. One that cannot
    be built takes its predecessor away: the sources it was made of are gone.
    """
    package.mkdir(parents=True, exist_ok=True)
    report = {"sources": runpy.run_path(str(PACKAGE / "_sources.py"))["digest"](SOURCES)}
    for name, make in BUILDS.items():
        target = package / f"{name}.so"
        with tempfile.TemporaryDirectory(dir=package, prefix=f".{name}.") as folder:
            try:
                wanted(name)
                report[name] = make(Path(folder) / target.name, Path(folder))
                os.replace(Path(folder) / target.name, target)
            except Unbuilt as reason:
                report[name] = str(reason)
                target.unlink(missing_ok=True)
                print(f"notice: sdmp_kernels/{target.name} was not built: {reason}", file=sys.stderr)
    with tempfile.NamedTemporaryFile("w", dir=package, delete=False, suffix=".json") as file:
        json.dump(report, file, indent=2)
    os.chmod(file.name, 0o644)
    os.replace(file.name, package / "_build.json")
    return report


class BuildNative(build_ext):
    """Builds into the source folder for an editable install, else into the build folder, from where wheels are made."""

    def run(self) -> None:
        root = Path(__file__).resolve().parent if self.inplace or self.editable_mode else Path(self.build_lib)
        build(root / "sdmp_kernels")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(SOURCES.parent)) for path in sorted(SOURCES.iterdir())]


class AnyPythonWheel(bdist_wheel):
    """The libraries see no Python header: a wheel serves every Python 3 of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"sdmp_kernels.{name}", sources=[]) for name in BUILDS],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    )

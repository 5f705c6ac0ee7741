"""Building csrc/: with a compiler, without one, into a wheel, and what the CUDA kernels were compiled to."""

from __future__ import annotations

import heapq
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import sdmp_kernels
from sdmp_kernels import Rule, _backends, _sources

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(sdmp_kernels.__file__).parent
WIDTHS = {16: "LDG.E.128", 8: "LDG.E.64"}


@pytest.fixture
def build() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "setup.py"))


def run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def copied(folder: Path) -> Path:
    """The package and its sources, without anything that was built, in a folder of their own."""
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("sdmp_kernels", "sdmp_train", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_rules_have_the_numbers_of_the_plan() -> None:
    (numbers,) = re.findall(r"enum class Rule : uint8_t \{(.*)\};", (ROOT / "csrc" / "mix.h").read_text())
    in_csrc = {name.upper(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", numbers)}
    assert in_csrc == {rule.name: rule.value for rule in Rule}
    assert list(in_csrc) == [rule.name for rule in sorted(Rule)]  # so the last one named is the largest


def test_versions_are_compared_as_numbers(build: dict[str, Any]) -> None:
    assert build["version_of"]("2.14.1+cu130") == (2, 14)
    assert build["version_of"]("2.9.0") < build["OLDEST_TORCH"] <= build["version_of"]("2.11.0")
    with pytest.raises(build["Unbuilt"], match="no version number in 'nightly'"):
        build["version_of"]("nightly")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"CXX": "false"}, "false failed: exit status 1"),
        ({"CXX": "no-such-compiler"}, r"no C\+\+ compiler found \(no-such-compiler\)"),
        ({"PATH": ""}, r"no C\+\+ compiler found \(c\+\+, g\+\+, clang\+\+\)"),
        ({"SDMP_NATIVE": "none"}, "left out by SDMP_NATIVE=none"),
    ],
)
def test_without_a_compiler_the_reason_is_kept(
    build: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    reason: str,
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "_native_cpu.so").write_bytes(b"of an older build")
    report = build["build"](tmp_path)
    assert re.search(reason, report["_native_cpu"])
    assert json.loads((tmp_path / "_build.json").read_text()) == report
    assert report["sources"] == _sources.digest(ROOT / "csrc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_build.json"]
    notices = capsys.readouterr().err
    assert re.search(rf"notice: sdmp_kernels/_native_cpu.so was not built: {reason}", notices)
    assert "notice: sdmp_kernels/_native_cuda.so was not built: " in notices


def test_a_compiler_of_another_cuda_is_refused(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 9.2, V9.2.148\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(build["Unbuilt"], match=r"nvcc is of CUDA 9\.2, but torch of CUDA 13\.0"):
        build["build_cuda"](tmp_path / "library.so", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build["Unbuilt"], match="this torch is not a CUDA build"):
        build["build_cuda"](tmp_path / "library.so", tmp_path)


USE = """
import torch
import sdmp_kernels
from sdmp_kernels import backends, draw_plan, mix, use_backend

assert {origin!r} in sdmp_kernels.__file__, sdmp_kernels.__file__
print(backends()["mix"]["cpu"])
images = torch.rand(4, 3, 16, 16)
plan = draw_plan(4, (16, 16), per="sample", step=0)
with use_backend("reference"):
    expected = mix(images, plan)
torch.testing.assert_close(mix(images, plan), expected)
try:
    with use_backend("cpp"):
        mix(images, plan)
        print("cpp ran")
except RuntimeError as error:
    print(error)
"""


def installed(wheel: Path, folder: Path) -> str:
    """What the package says and does once the wheel is unpacked in a folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    script = USE.format(origin=str(folder))
    return run([sys.executable, "-c", script], cwd=folder, env={**environment, "PYTHONPATH": str(folder)})


def wheel_of(source: Path, **environment: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*pip, "-w", str(source / "wheels"), str(source)], env={**os.environ, **environment})
    (wheel,) = (source / "wheels").glob("*.whl")
    return wheel


def test_a_wheel_made_without_a_compiler_works(tmp_path: Path) -> None:
    wheel = wheel_of(copied(tmp_path / "source"), CXX="false")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sdmp_kernels/_build.json" in names
    assert not [name for name in names if name.endswith(".so")]
    said = installed(wheel, tmp_path / "site")
    assert said.startswith("torch (cpp: false failed: exit status 1; ")
    assert "use_backend('cpp') cannot run on this machine: false failed: exit status 1" in said


@pytest.mark.slow
def test_a_source_distribution_builds_without_the_repository(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    make = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", make, str(tmp_path)], cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.glob("sdmp_kernels-*") if path.is_dir())
    for folder in ("csrc", "sdmp_kernels", "sdmp_train"):
        files = {path.relative_to(source) for path in (source / folder).rglob("*") if path.is_file()}
        assert {path for path in files if not (unpacked / path).exists()} == set()
    shutil.rmtree(source)
    said = installed(wheel_of(unpacked, CXX="false"), tmp_path / "site")
    assert said.startswith("torch (cpp: false failed: exit status 1; ")


def test_a_wheel_made_with_a_compiler_has_the_kernels(build: dict[str, Any], tmp_path: Path) -> None:
    try:
        build["cpp_compiler"]()
    except build["Unbuilt"] as reason:
        pytest.skip(str(reason))
    # That the kernels are fast is no matter of the wheel's: without optimisation they are compiled in half the time.
    quick = tmp_path / "c++"
    quick.write_text(f'#!/bin/sh\nexec {build["cpp_compiler"]()} "$@" -O0\n')
    quick.chmod(0o755)
    wheel = wheel_of(copied(tmp_path / "source"), SDMP_NATIVE="cpu", CXX=str(quick))
    assert "-py3-none-" in wheel.name
    assert "sdmp_kernels/_native_cpu.so" in zipfile.ZipFile(wheel).namelist()
    assert installed(wheel, tmp_path / "site").splitlines() == ["cpp", "cpp ran"]


@pytest.mark.parametrize("name", ["_native_cpu", "_native_cuda"])
def test_libraries_need_only_the_stable_interface_of_torch(name: str) -> None:
    """No C++ symbol of libtorch and none of Python: what lets one binary serve every torch from 2.11 on."""
    library, nm = PACKAGE / f"{name}.so", shutil.which("nm")
    if not library.exists() or nm is None:
        pytest.skip(f"{name}.so was not built" if nm else "nm is not installed")
    symbols = [line.split()[-1] for line in run([nm, "-D", "--undefined-only", str(library)]).splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    foreign = [s for s in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)|Py|_Py", s)]
    assert not foreign


@pytest.fixture(scope="module")
def cuda_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled CUDA kernels: those of this installation, or compiled now for one architecture."""
    library = PACKAGE / "_native_cuda.so"
    sources = max(path.stat().st_mtime for path in (ROOT / "csrc").iterdir())
    if library.exists() and library.stat().st_mtime > sources:
        return library
    build = runpy.run_path(str(ROOT / "setup.py"))
    try:
        nvcc, compiler = build["cuda_compiler"](), build["cpp_compiler"]()
    except build["Unbuilt"] as reason:
        pytest.skip(str(reason))
    target = tmp_path_factory.mktemp("cuda") / "mix.o"
    options = [*build["cuda_flags"](), "-gencode=arch=compute_90,code=sm_90", "-ccbin", compiler]
    run([nvcc, *options, "-c", str(ROOT / "csrc" / "mix_cuda.cu"), "-o", str(target)])
    return target


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="neither cuobjdump nor triton, which brings one, is installed")
        found = triton.knobs.nvidia.cuobjdump.path
    return str(found)


def test_cuda_kernels_spill_nothing(cuda_binary: Path, cuobjdump: str) -> None:
    usage = run([cuobjdump, "-res-usage", str(cuda_binary)])
    found = re.findall(r"Function (\w*mix\w*kernel\w*):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) >= 20
    for name, registers, stack, local in found:
        assert (stack, local) == ("0", "0"), name
        # Three blocks of 256 threads on a multiprocessor; two where a thread holds twice as many bytes, or 16 elements.
        assert int(registers) <= (128 if re.search(r"17mix_vector_kernelI(hhE|fN)", name) else 85), name


def test_cuda_kernels_move_16_bytes_at_a_time(cuda_binary: Path, cuobjdump: str) -> None:
    """Vector kernels store the results 16 bytes at a time, and load as much of an image as that takes.

    Besides these, some narrow stores and loads belong to what is resized, element by element.
    """
    half = r"N\w*?4(?:Half|Bf16)E"
    pattern = re.compile(rf"Function : \w*?(mix(?:_backward)?_vector_kernel)I(h|f|{half})(h|f|{half}|S\d?_)E")
    kernels: list[tuple[str, str, str, Counter[str]]] = []
    accesses: Counter[str] = Counter()
    for line in run([cuobjdump, "-sass", str(cuda_binary)]).splitlines():
        if "Function : " in line:
            accesses = Counter()
            if found := pattern.search(line):
                kernels.append((found[1], found[2], found[3], accesses))
        elif access := re.search(r"\b((?:LDG|STG|LDL|STL)[.\w]*) ", line):
            accesses[access[1]] += 1
    assert len({kernel[:3] for kernel in kernels}) == 18
    for name, source, result, counts in kernels:
        bytes_in = {"h": 1, "f": 4}.get(source, 2)
        bytes_out = bytes_in if result.startswith("S") else {"h": 1, "f": 4}.get(result, 2)
        results = 2 if name == "mix_vector_kernel" else 1  # clean and mixed
        narrow = {1: "STG.E.U8", 2: "STG.E.U16", 4: "STG.E"}[bytes_out]
        assert {access for access in counts if access.startswith("STG")} == {"STG.E.128", narrow}
        assert counts["STG.E.128"] >= results, (name, source, result)
        # Forward of both images of a pair: at one place of three planes, or of one element.
        assert counts[narrow] == (2 * (3 + 1) if name == "mix_vector_kernel" else 1), (name, source, result)
        width = min(16, 16 * bytes_in // bytes_out)
        if width in WIDTHS:
            assert counts[WIDTHS[width]] >= 2, (name, source, result)
        assert not counts["LDL"] + counts["STL"]


INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def instructions(sass: str, function: str) -> list[tuple[int, bool, str, str]]:
    """(address, whether predicated, name, operands) of the function whose mangled name holds `function`."""
    part = next(part for part in sass.split("Function : ")[1:] if function in part.splitlines()[0])
    found = (INSTRUCTION.match(line) for line in part.splitlines())
    return [(int(m[1], 16), m[2] is not None, m[3], m[4]) for m in found if m]


def fewest_instructions(code: list[tuple[int, bool, str, str]], stores: int, products: int, sums: int) -> int:
    """From a kernel's first to an EXIT, with so many wide stores, so many products at least and so many sums at most.

    A lower bound: jumps are taken as they suit. What is predicated off counts, as it is issued. By Dijkstra, over blocks without a jump."""
    place = {address: i for i, (address, *_) in enumerate(code)}
    jumps = {i: place[int(args.split("0x")[1], 16)] for i, (_, _, op, args) in enumerate(code) if op == "BRA"}
    starts = sorted({0, *jumps.values(), *(i + 1 for i, c in enumerate(code) if c[2] in ("BRA", "EXIT"))} - {len(code)})
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    names = {start: [c[2] for c in code[start:end]] for start, end in ends.items()}
    cost = {
        start: tuple(sum(n.startswith(what) for n in ops) for what in ("STG.E.128", "FMUL", "FADD"))
        for start, ops in names.items()
    }

    def onward(start: int) -> list[int]:
        last = ends[start] - 1
        _, guarded, op, args = code[last]
        falls = op not in ("BRA", "EXIT", "RET.REL.NODEC") or guarded or bool(re.match(r"\s*!?U?P\w+,", args))
        targets = [jumps[last]] if op == "BRA" else [-1] if op == "EXIT" else []
        return targets + ([ends[start]] if falls and ends[start] < len(code) else [])

    first = (0, 0, 0, 0)
    best = {first: 0}
    heap = [(0, first)]
    while heap:
        spent, state = heapq.heappop(heap)
        at, *done = state
        if at == -1:
            if done[:2] == [stores, products]:
                return spent
            continue
        if spent > best[state]:
            continue
        gained = [a + b for a, b in zip(done, cost[at], strict=True)]
        if gained[0] > stores or gained[2] > sums:
            continue
        for to in onward(at):
            after = (to, gained[0], min(gained[1], products), gained[2])
            if spent + len(names[at]) < best.get(after, 10**9):
                best[after] = spent + len(names[at])
                heapq.heappush(heap, (spent + len(names[at]), after))
    raise AssertionError("no such way")


def test_a_mixed_pair_of_three_planes_costs_few_instructions(cuda_binary: Path, cuobjdump: str) -> None:
    """bfloat16, both images of a Mixup pair: 48 results of two products and a sum each, in six stores.

    With one vector a thread it took 503 for 16 results; Triton's kernel has 568 for 48. And whatever the plan says, the
    six loads are asked for before anything of it is.
    """
    code = instructions(
        run([cuobjdump, "-sass", "-arch", "sm_90", str(cuda_binary)]), "17mix_vector_kernelINS0_4Bf16ES2_E"
    )
    assert 300 < fewest_instructions(code, 6, 96, 52) <= 700
    loads = [name for _, _, name, _ in code if name.startswith("LDG")]
    assert loads[:6] == ["LDG.E.128"] * 6 and {"LDG.E.U8", "LDG.E"} <= set(loads[6:])


def test_backends_say_what_runs() -> None:
    missing = _backends.unavailable("cpp", "cpu")
    said = sdmp_kernels.backends()["mix"]["cpu"]
    assert said == ("cpp" if missing is None else f"torch (cpp: {missing})")
    if not torch.cuda.is_available():
        assert sdmp_kernels.backends()["mix"]["cuda"] == "none (torch sees no CUDA device)"
        with (
            pytest.raises(RuntimeError, match=r"use_backend\('cuda'\) cannot run on this machine: torch sees no CUDA"),
            sdmp_kernels.use_backend("cuda"),
        ):
            pass

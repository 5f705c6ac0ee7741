"""Every Triton configuration, compiled for every architecture on a machine that needs no GPU.

What came of sources that are unchanged stands in golden/compiled.json, and one in twenty of these is compiled anew. After
a change of a kernel, `make compiled` adds to it; until then what changed is compiled here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from oldest_triton import OLDEST, Unavailable, unpacked

from sdmp_kernels._launch import Compile
from sdmp_kernels.ahead_of_time import OPS, SHARED_LIMIT, Report, _loads_in_flight, failures

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / "tests/golden/compiled.json"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SERVED = [op for op in OPS if importlib.util.find_spec(f"sdmp_kernels.ops.{op}.triton") is not None]


def run(
    *arguments: str, path: Sequence[Path] = (), known: Path = KNOWN, anew: int = 20
) -> subprocess.CompletedProcess[str]:
    # In interpreter mode, which the tests run in, nothing compiles.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(ROOT)])
    command = [sys.executable, "-m", "sdmp_kernels.ahead_of_time", "--known", str(known), "--anew", str(anew)]
    command += arguments
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# What these launch like sm_80, they need not compile again, see below.
LIKE_SM_80 = ("sm_86", "sm_89")


def covered() -> list[tuple[str, str]]:
    """(architecture, op): every op for the three generations that Triton compiles for differently, and for the others
    what is tuned for them."""
    pairs = [(arch, op) for arch in SHARED_LIMIT if arch not in LIKE_SM_80 for op in SERVED]
    return pairs + [(arch, op) for arch in LIKE_SM_80 for op in SERVED if launches("sm_80", op) != launches(arch, op)]


@dataclass(frozen=True)
class Reports:
    """What came of compiling `pairs`, (architecture, op)."""

    pairs: list[tuple[str, str]]
    found: list[dict[str, Any]]

    def of(self, arch: str) -> list[dict[str, Any]]:
        return [report for report in self.found if report["arch"] == arch]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """One process per set of ops, each of which compiles on all cores."""
    pairs = covered()
    found = []
    together: dict[tuple[str, ...], list[str]] = {}
    for arch in dict.fromkeys(arch for arch, _ in pairs):
        together.setdefault(tuple(op for of, op in pairs if of == arch), []).append(arch)
    for ops, archs in together.items():
        file = tmp_path_factory.mktemp("ahead_of_time") / "reports.json"
        done = run("--json", str(file), "--arch", *archs, "--op", *ops)
        assert file.exists(), done.stdout[-4000:] + done.stderr[-4000:]
        found += json.loads(file.read_text())
    return Reports(pairs, found)


def launches(arch: str, op: str) -> list[tuple[Any, ...]]:
    module = importlib.import_module(f"sdmp_kernels.ops.{op}.triton")
    return [
        (item.name, item.signature, item.constants, item.divisible, item.num_warps, item.num_stages, item.facts)
        for item in module.compiles(arch)
    ]


def test_every_declared_fact_holds(reports: Reports) -> None:
    assert not {(r["arch"], r["name"]): r["failed"] for r in reports.found if r["failed"]}
    assert {r["arch"] for r in reports.found} == {arch for arch, _ in reports.pairs}


def test_every_declared_fact_holds_on_the_oldest_triton_too(tmp_path: Path) -> None:
    """Its compiler needs other registers, and GPU hosts have it."""
    try:
        folder = unpacked()
    except Unavailable as error:
        pytest.skip(str(error))
    file = tmp_path / "reports.json"
    done = run("--arch", "sm_90", "--json", str(file), path=[folder])
    assert file.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(file.read_text())
    assert {r["triton"] for r in found} == {OLDEST}
    assert not {r["name"]: r["failed"] for r in found if r["failed"]}
    assert len(found) == sum(len(launches("sm_90", op)) for op in SERVED)


def test_what_is_known_is_held_to_the_facts_and_found_where_it_is_wrong(tmp_path: Path) -> None:
    import triton

    entries = [
        entry
        for entry in json.loads(KNOWN.read_text())
        if (entry["triton"], entry["arch"], entry["op"]) == (triton.__version__, "sm_90", "mix")
    ]
    wrong, spilling = entries[:2]
    wrong["registers"] += 1
    spilling["spills"] = 3
    (tmp_path / "known.json").write_text(json.dumps(entries))
    # The digest of one alone divides by itself, so that no other is compiled.
    anew = int(wrong["source"], 16)
    done = run("--arch", "sm_90", "--op", "mix", known=tmp_path / "known.json", anew=anew)
    failed = {
        name: line for line in done.stdout.splitlines() for name in (wrong["name"], spilling["name"]) if name in line
    }
    assert done.returncode == 1
    assert "FAILED known otherwise" in failed[wrong["name"]]
    assert "FAILED no_spills: 3" in failed[spilling["name"]]
    assert done.stdout.endswith(f"{len(entries)} configurations, 1 compiled now, 2 with a fact that fails\n"), (
        done.stdout
    )


@pytest.mark.parametrize(("waits", "fails"), [(5, False), (80, True)])
def test_products_that_wait_for_each_other_are_found(waits: int, fails: bool) -> None:
    item = Compile(None, {}, {}, (), 8, 2, ("warpgroup_mma",), "attend")
    report = Report("attend", "sm_90", 8, 2, tensor_cores={"HGMMA": 40}, waits=waits)
    assert bool(failures(item, "sm_90", report)) is fails


def test_what_is_launched_as_on_sm_80_fits_into_less_shared_memory(reports: Reports) -> None:
    """The same kernels of the same constants: of these architectures' limits, only that of shared memory is lower."""
    needs = {r["name"]: r["shared"] for r in reports.of("sm_80")}
    for op in [op for arch, op in reports.pairs if arch == "sm_80"]:
        as_on_sm_80 = launches("sm_80", op)
        for arch in LIKE_SM_80:
            compiled = {r["name"] for r in reports.of(arch)}
            for launch in launches(arch, op):
                assert launch[0] in compiled or (launch in as_on_sm_80 and needs[launch[0]] <= SHARED_LIMIT[arch])


def test_every_kernel_is_compiled(reports: Reports) -> None:
    for arch, op in reports.pairs:
        module = importlib.import_module(f"sdmp_kernels.ops.{op}.triton")
        compiled = {item.kernel.__name__ for item in module.compiles(arch)}
        assert compiled == set(module.KERNELS), arch
        names = [item.name for item in module.compiles(arch)]
        assert len(set(names)) == len(names)
        assert set(names) <= {r["name"] for r in reports.of(arch)}


@pytest.mark.parametrize(("name", "itemsize", "loads", "stores"), [
    ("soft_cross_entropy loss bfloat16 65536", 2, 1, 0),
    ("soft_cross_entropy both bfloat16 65536", 2, 2, 1),
    ("soft_cross_entropy both float32 65536", 4, 2, 1),
    ("soft_cross_entropy gradient bfloat16 65536", 2, 2, 1),
])  # fmt: skip
def test_each_element_is_read_and_written_as_often_as_the_model_says(
    reports: Reports, name: str, itemsize: int, loads: int, stores: int
) -> None:
    """In the machine's loops: one load per sweep, the second out of the L2 cache, and one store."""
    for report in (r for r in reports.found if r["name"] == name):
        block = next(
            item.constants for item in tiles_of("soft_cross_entropy", report["arch"]) if item.name == report["name"]
        )
        elements = block["BLOCK_N"] * block["BLOCK_K"]
        wide = 16 // itemsize * 32 * report["num_warps"]
        assert report["loads"].get("128", 0) * wide == loads * elements, report["arch"]
        assert report["stores"].get("128", 0) * wide == stores * elements, report["arch"]
    assert any(r["name"] == name for r in reports.found)


def tiles_of(op: str, arch: str) -> list[Any]:
    return importlib.import_module(f"sdmp_kernels.ops.{op}.triton").compiles(arch)


def test_loads_in_flight_are_counted_up_to_the_first_use() -> None:
    lines = [
        "LDG.E.U16 R4, desc[UR4][R2.64]",
        "LDG.E.128 R8, desc[UR4][R2.64+0x10]",
        "IMAD R20, R21, R22, RZ",
        "LDG.E.CONSTANT R12, desc[UR4][R2.64]",
        "FADD R30, R11, R31",  # the last register of the wide one
        "LDG.E R5, desc[UR4][R30.64]",
    ]
    assert _loads_in_flight(lines) == 3
    assert _loads_in_flight(lines[3:]) == 2
    # One whose address was loaded uses that.
    assert _loads_in_flight(["LDG.E.64 R2, desc[UR4][R6.64]", "LDG.E R4, desc[UR4][R2.64]"]) == 1


def test_limits_are_held() -> None:
    item = Compile(None, {}, {}, (), 8, 2, ("registers<=64", "barriers<=1", "loop<=9", "in_flight>=12"), "mix")
    assert failures(item, "sm_90", Report("mix", "sm_90", 8, 2, registers=64, barriers=1, loop=9, in_flight=12)) == []
    found = failures(item, "sm_90", Report("mix", "sm_90", 8, 2, registers=65, barriers=2, loop=10, in_flight=11))
    assert [fact.split(":")[0] for fact in found] == ["registers", "barriers", "loop", "in_flight"]


def test_bad_facts_are_found(tmp_path: Path) -> None:
    """The checks can fail: a narrow, spilling kernel without tensor cores is reported as all three."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    # What an earlier run left in the usual cache names source lines of a file that is gone.
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", "import faulty; faulty.main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    failed = json.loads(done.stdout.splitlines()[-1])
    assert {fact.split(":")[0] for fact in failed["faulty"]} == {
        "no_spills",
        "wide_loads",
        "wide_stores",
        "tensor_cores",
        "warpgroup_mma",
        "registers",
        "shared memory",
    }
    assert failed["excused"] == []
    (one, again), others = failed["sources"]
    assert one == again and len({one, *others}) == 1 + len(others)


FAULTY = """
import json
import triton
from triton import language as tl
from sdmp_kernels import ahead_of_time
from sdmp_kernels._launch import Compile


@triton.jit
def copy_kernel(x_ptr, y_ptr, scale_ptr, stride, BLOCK: tl.constexpr, BIG: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    scale = tl.load(scale_ptr + start)
    offsets = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    x = x * scale + tl.load(x_ptr + offsets * stride)  # narrow: a column of a matrix
    if BIG:
        x = x / tl.sum(x)
    tl.store(y_ptr + offsets, x)


@triton.jit
def other_kernel(x_ptr, y_ptr, scale_ptr, stride, BLOCK: tl.constexpr, BIG: tl.constexpr):
    tl.store(y_ptr, 1.0)


def report(name, block, warps, divisible, facts, big):
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "scale_ptr": "*fp32", "stride": "i64", "BLOCK": "constexpr"}
    signature["BIG"] = "constexpr"
    constants = {"BLOCK": block, "BIG": big}
    item = Compile(copy_kernel, signature, constants, divisible, warps, 2, facts, name)
    return ahead_of_time.check(item, "sm_90").failed


def sources():
    # Digests of a configuration, of itself again, and of what differs from it in one thing.
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "scale_ptr": "*fp32", "stride": "i64", "BLOCK": "constexpr"}
    signature["BIG"] = "constexpr"

    def of(arch="sm_90", block=1024, dtype="*fp32", divisible=(), warps=4, facts=(), kernel=copy_kernel):
        constants = {"BLOCK": block, "BIG": False}
        item = Compile(kernel, {**signature, "x_ptr": dtype}, constants, divisible, warps, 2, facts, "any")
        return ahead_of_time.source_of(item, arch)

    same = [of(), of(facts=("no_spills",))]
    other = [of(arch="sm_80"), of(block=2048), of(dtype="*fp16"), of(divisible=("x_ptr",)), of(warps=8), of(kernel=other_kernel)]
    return same, other


def main():
    facts = ("no_spills", "wide_loads", "wide_stores", "tensor_cores", "warpgroup_mma", "registers<=32")
    ahead_of_time.SHARED_LIMIT["sm_90"] = 8
    found = {"faulty": report("faulty", 32768, 4, (), facts, True)}
    excused = ("no_spills", "wide_loads", "wide_stores", "registers<=64")
    found["excused"] = report("excused", 1024, 4, ("x_ptr", "y_ptr"), excused, False)
    found["sources"] = sources()
    print(json.dumps(found))
"""

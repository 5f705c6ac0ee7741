"""Compile every Triton configuration without a GPU and check what came out: `python -m sdmp_kernels.ahead_of_time`.

Registers, spills, shared memory, widths of memory accesses and tensor-core instructions are read from the PTX and
the machine code that Triton and its bundled ptxas make, so a regression shows on a machine that has no GPU at all.

A tensor access that is narrow by nature (a gather, say) is excused by a comment `# narrow: <why>` on its line.
Loads and stores of scalars are not counted.

What a source compiles to is settled by the source, its constants and the compiler, so it need not be compiled twice:
`--known FILE` takes reports from a file where those are the same, `--record` adds to it what had to be compiled.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import linecache
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdmp_kernels._launch import Compile

OPS = tuple(sorted(path.parent.name for path in (Path(__file__).parent / "ops").glob("*/op.py")))
# Shared memory that one program may have, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448}
FACTS = ("no_spills", "wide_loads", "wide_stores", "tensor_cores", "warpgroup_mma")
_TENSOR_CORE = re.compile(r"\b(HMMA|IMMA|QMMA|HGMMA|QGMMA|UTC\w*MMA)\b")
_WARPGROUP: dict[str, str | tuple[str, ...]] = {"sm_90": ("HGMMA", "QGMMA"), "sm_100": "UTC"}
_REGISTERS, _BARRIERS, _LOOP, _IN_FLIGHT = "registers<=", "barriers<=", "loop<=", "in_flight>="
_LOAD = re.compile(r"LDG\.E(?:\.\w+)*?(?:\.(64|128))?(?:\.\w+)*\s+R(\d+),")


@dataclass
class Report:
    """What one compilation came to.

    Attributes:
        name, arch, num_warps, num_stages: as asked for. triton: the version that compiled.
        registers: per thread. spills: instructions that touch local memory. stack: bytes of stack per thread.
        shared: bytes of shared memory per program.
        loads, stores: how many accesses of tensors in global memory there are of each width in bits.
        narrow: source lines ("triton_kernels.py:31") whose tensor accesses are under 128 bits and not excused.
        tensor_cores: tensor-core instructions by name.
        waits: instructions that wait for a warpgroup's products (sm_90).
        barriers: instructions at which the warps of a program wait for each other.
        instructions: of the whole kernel, as they stand in it.
        in_flight: the most loads of global memory that are asked for before the first of them is used.
        loop: likewise, of its hottest loop: of the innermost ones, that with the most tensor-core instructions, or else
            instructions.
        failed: the declared facts that do not hold, in words; empty where all is well.
        seconds: what compiling took; 0 where it was known.
        source: a digest of all that settles the rest.
    """

    name: str
    arch: str
    num_warps: int
    num_stages: int
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    narrow: dict[str, list[str]] = field(default_factory=dict)
    tensor_cores: dict[str, int] = field(default_factory=dict)
    waits: int = 0
    barriers: int = 0
    instructions: int = 0
    loop: int = 0
    in_flight: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    triton: str = ""
    source: str = ""


@dataclass(frozen=True)
class _Access:
    """A load or store of global memory in the PTX: its width in bits and the source line it comes from."""

    store: bool
    bits: int
    file: str
    line: int


def compilations(arch: str, op: str) -> list[Compile]:
    """Everything that `ops/<op>/triton.py` says it launches on `arch`; none where the op has no such file."""
    module = f"sdmp_kernels.ops.{op}.triton"
    if importlib.util.find_spec(module) is None:
        return []
    return importlib.import_module(module).compiles(arch)


def check(item: Compile, arch: str) -> Report:
    """Compile one configuration for `arch` and compare it with its declared facts.

    Raises:
        ValueError: for an unknown fact, or where Triton is in interpreter mode.
    """
    _check_facts(item)
    report = Report(item.name, arch, item.num_warps, item.num_stages, source=source_of(item, arch))
    begin = time.perf_counter()
    _read(_compile(item, arch), report)
    report.failed = failures(item, arch, report)
    report.seconds = round(time.perf_counter() - begin, 2)
    return report


def _check_facts(item: Compile) -> None:
    limits = rf"({_REGISTERS}|{_BARRIERS}|{_LOOP}|{_IN_FLIGHT})\d+"
    unknown = [fact for fact in item.facts if fact not in FACTS and not re.fullmatch(limits, fact)]
    if unknown:
        raise ValueError(
            f"{item.name} declares the unknown facts {unknown}; expected some of {FACTS}, registers<=N, barriers<=N, "
            "loop<=N, in_flight>=N"
        )


def _read(compiled: Any, report: Report) -> None:
    """What came of one compilation, out of its machine code and what it was made of."""
    report.triton = compiled.metadata.triton_version
    _read_machine_code(compiled.asm["cubin"], report)
    report.shared += compiled.metadata.shared
    scalars = _scalar_lines(compiled.asm["ttgir"])
    for access in _accesses(compiled.asm["ptx"]):
        if (access.file, access.line) not in scalars:
            _count(access, report)


def source_of(item: Compile, arch: str) -> str:
    """A digest of all that settles what a configuration compiles to, and of how that is read."""
    import triton
    from triton import knobs

    asked = [arch, triton.__version__, knobs.nvidia.ptxas.version, item.kernel.fn.__name__, _text(item.kernel)]
    asked += [item.num_warps, item.num_stages, list(item.divisible)]
    asked += [sorted(item.signature.items()), sorted(item.constants.items()), _reader()]
    return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:16]


@functools.cache
def _text(kernel: Any) -> list[str]:
    """The modules of a kernel and of those it may call, and their constants, which may come from elsewhere.

    Triton's own key of a kernel is narrower, but in 3.6 it depends on addresses and on what was asked before.
    """
    from triton import language as tl

    module = inspect.getmodule(kernel.fn)
    called = [value for value in vars(module).values() if isinstance(value, type(kernel))]
    places = {place.__name__: place for each in (kernel, *called) if (place := inspect.getmodule(each.fn)) is not None}
    found = []
    for _, place in sorted(places.items()):
        found.append(inspect.getsource(place))
        found += [f"{name} = {value}" for name, value in sorted(vars(place).items()) if isinstance(value, tl.constexpr)]
    return found


@functools.cache
def _reader() -> str:
    parts = (Report, _read, _compile, _read_machine_code, _loads_in_flight, _hottest, _scalar_lines, _innermost)
    return "".join(inspect.getsource(part) for part in (*parts, _accesses, _width, _count))


def _compile(item: Compile, arch: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(item.kernel, triton.JITFunction):
        raise ValueError(f"{item.name} cannot be compiled in Triton's interpreter mode; unset TRITON_INTERPRET")
    names = item.kernel.arg_names
    missing = [n for n in names if n not in item.signature] + [n for n in item.signature if n not in names]
    if missing:
        raise ValueError(f"the signature of {item.name} and its kernel differ in {', '.join(missing)}")
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in item.divisible}
    signature = {name: item.signature[name] for name in names}
    source = ASTSource(fn=item.kernel, signature=signature, constexprs=item.constants, attrs=attrs)
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)


def _read_machine_code(cubin: bytes, report: Report) -> None:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError("cuobjdump printed no resource usage; its format has changed")
    report.registers, report.stack = int(usage[1]), int(usage[2]) + int(usage[4])
    report.shared = int(usage[3])
    report.spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    report.tensor_cores = dict(Counter(_TENSOR_CORE.findall(text)))
    report.barriers = len(re.findall(r"\bBAR\.SYNC\b", text))
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+([^;]*);", text, re.MULTILINE)
    report.instructions, report.in_flight = len(lines), _loads_in_flight(lines)
    report.waits = len(re.findall(r"\bWARPGROUP\.DEPBAR\b", text))
    report.loop = len(_hottest(text))


def _hottest(text: str) -> list[str]:
    """The instructions of the innermost loop with the most tensor-core instructions, or else the longest."""
    code = [(int(at, 16), line) for at, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", text, re.MULTILINE)]
    back = [(re.search(r"\bBRA\S*\b.*?\b0x([0-9a-f]+)", line), at) for at, line in code]
    loops = [(int(found[1], 16), at) for found, at in back if found and int(found[1], 16) < at]
    inner = [o for o in loops if not any(o != i and o[0] <= i[0] and i[1] <= o[1] for i in loops)]
    bodies = [[line for at, line in code if first <= at <= last] for first, last in inner]
    return max(bodies, key=lambda body: (sum(bool(_TENSOR_CORE.search(line)) for line in body), len(body)), default=[])


def _loads_in_flight(lines: Sequence[str]) -> int:
    """The most loads in a row of which none is used by an instruction between them, as the code stands."""
    waiting: set[int] = set()
    loads = most = 0
    for line in lines:
        load = _LOAD.search(line)
        read = line[load.end() :] if load else line
        if waiting & {int(register) for register in re.findall(r"\bR(\d+)\b", read)}:
            waiting, loads = set(), 0
        if load:
            first, words = int(load[2]), int(load[1] or 32) // 32
            waiting |= set(range(first, first + words))
            loads += 1
            most = max(most, loads)
    return most


def _scalar_lines(ttgir: str) -> set[tuple[str, int]]:
    """(file, line) of the loads and stores of single values, which are narrow and few by nature."""
    places = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    found = set()
    for line in ttgir.splitlines():
        if re.search(r"= tt\.load .* : !tt\.ptr<|\btt\.store .* : !tt\.ptr<", line):
            place = re.search(r"loc\((#loc\w*)\)\s*$", line)
            if place is not None:
                found.add(_innermost(place[1], places))
    return found


def _innermost(place: str, places: dict[str, str]) -> tuple[str, int]:
    """Follow names and call sites to the line where the operation is written."""
    while place in places:
        place = places[place]
        direct = re.match(r'"([^"]+)":(\d+):\d+', place)
        if direct is not None:
            return direct[1], int(direct[2])
        inner = re.search(r"#loc\w*", place)
        if inner is None:
            break
        place = inner[0]
    return "", 0


def _accesses(ptx: str) -> list[_Access]:
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.MULTILINE))
    found, place, inside, settled = [], ("", 0), False, False
    for line in ptx.splitlines():
        if "// begin inline asm" in line or "// end inline asm" in line:
            inside, settled = "begin" in line, False
        where = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        if where is not None and not settled:
            place = (files.get(where[1], ""), int(where[2]))
            # LLVM counts the lines of inline assembly on from the first place in it, which alone is meant.
            settled = inside
        bits = _width(line)
        if bits is not None:
            found.append(_Access("st.global" in line, bits, *place))
    return found


def _width(line: str) -> int | None:
    """The bits one thread moves by a PTX line that accesses global memory; None for any other line."""
    plain = re.search(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", line)
    if plain is not None:
        return int(plain[1] or 1) * int(plain[2])
    copied = re.search(r"\bcp\.async\.c[ag]\.shared\.global\b.*?,\s*(0x[0-9a-fA-F]+|\d+)\s*[,;]", line)
    if copied is not None:
        return 8 * int(copied[1], 0)
    return 1024 if "cp.async.bulk" in line and "global" in line else None


def _count(access: _Access, report: Report) -> None:
    kind, widths = ("stores", report.stores) if access.store else ("loads", report.loads)
    widths[str(access.bits)] = widths.get(str(access.bits), 0) + 1
    text = linecache.getline(access.file, access.line)
    place = f"{Path(access.file).name}:{access.line}"
    if access.bits < 128 and "# narrow:" not in text and place not in report.narrow.setdefault(kind, []):
        report.narrow[kind].append(place)


def failures(item: Compile, arch: str, report: Report) -> list[str]:
    """The declared facts that a report contradicts, in words."""
    failed = []
    limit = SHARED_LIMIT[arch]
    if report.shared > limit:
        failed.append(f"shared memory: {report.shared} bytes, {arch} has {limit}")
    # A frame that is never touched costs nothing (Triton 3.8 leaves a byte in some kernels).
    if "no_spills" in item.facts and report.spills:
        failed.append(f"no_spills: {report.spills} local accesses, {report.stack} bytes of stack")
    for fact, kind, widths in (("wide_loads", "loads", report.loads), ("wide_stores", "stores", report.stores)):
        if fact not in item.facts:
            continue
        if report.narrow.get(kind):
            failed.append(f"{fact}: narrower than 128 bits at {', '.join(report.narrow[kind])}")
        if not any(int(bits) >= 128 for bits in widths):
            failed.append(f"{fact}: no access of 128 bits at all")
    if "tensor_cores" in item.facts and not report.tensor_cores:
        failed.append("tensor_cores: none used")
    missing = not any(name.startswith(_WARPGROUP.get(arch, "")) for name in report.tensor_cores)
    if "warpgroup_mma" in item.facts and arch in _WARPGROUP and missing:
        failed.append(f"warpgroup_mma: only {', '.join(report.tensor_cores) or 'no tensor cores'}")
    # A product is several instructions, waited for once. Where the compiler cannot keep them apart from what reads
    # their registers it waits after each, twice.
    products = report.tensor_cores.get("HGMMA", 0)
    if "warpgroup_mma" in item.facts and arch == "sm_90" and report.waits > products / 2:
        failed.append(f"warpgroup_mma: {report.waits} waits for {products} instructions, which run one by one")
    loop = (_LOOP, report.loop, " instructions")
    for fact, found, words in ((_REGISTERS, report.registers, " per thread"), (_BARRIERS, report.barriers, ""), loop):
        bound = min((int(f.removeprefix(fact)) for f in item.facts if f.startswith(fact)), default=found)
        if found > bound:
            failed.append(f"{fact.removesuffix('<=')}: {found}{words}, expected at most {bound}")
    least = max((int(f.removeprefix(_IN_FLIGHT)) for f in item.facts if f.startswith(_IN_FLIGHT)), default=0)
    if report.in_flight < least:
        failed.append(f"in_flight: {report.in_flight} loads before the first is used, expected at least {least}")
    return failed


def _setup_worker(cache: str) -> None:
    from triton import knobs

    knobs.cache.dir = cache


def _work(task: tuple[str, str, int]) -> Report:
    arch, op, index = task
    item = compilations(arch, op)[index]
    try:
        return check(item, arch)
    except Exception as error:
        # Triton raises many kinds, each caused by the next inner one; the last says what is wrong.
        lines = []
        cause: BaseException | None = error
        while cause is not None:
            lines.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__
        return Report(item.name, arch, item.num_warps, item.num_stages, failed=["does not compile: " + lines[-1]])


def run(archs: Sequence[str], ops: Sequence[str], jobs: int, known: Known | None = None, anew: int = 0) -> list[Report]:
    """Compile everything the named ops launch on the named architectures, `jobs` at a time.

    known: reports not to make again, and where to keep those made; anew: one in so many is made again all the same, and
    fails where it comes out otherwise. Which ones follows from their sources.
    """
    known = known or Known()
    tasks = [(arch, op, i) for op in ops for arch in archs for i in range(len(compilations(arch, op)))]
    reports = {task: known.report(*task) for task in tasks}
    wanted = [t for t, report in reports.items() if report is None or (anew and int(report.source, 16) % anew == 0)]
    for task, made in zip(wanted, _compiled(wanted, jobs), strict=True):
        before, reports[task] = reports[task], made
        if before is not None and known.stored(before) != known.stored(made):
            made.failed.append(f"known otherwise: {known.stored(before)}, now {known.stored(made)}")
        known.keep(task[1], made)
    return [report for report in reports.values() if report is not None]


def _compiled(tasks: Sequence[tuple[str, str, int]], jobs: int) -> Iterator[Report]:
    if not tasks:
        return
    with tempfile.TemporaryDirectory(prefix="sdmp-triton-") as cache:
        if jobs <= 1:
            _setup_worker(cache)
            yield from map(_work, tasks)
            return
        context = multiprocessing.get_context("spawn")
        workers = min(jobs, len(tasks))
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_setup_worker, initargs=(cache,)) as pool:
            yield from pool.map(_work, tasks)


class Known:
    """Reports in a file, each with the digest of its source. One that failed to compile is not kept."""

    def __init__(self, path: Path | None = None, record: bool = False) -> None:
        self.path, self.record = path, record
        there = path is not None and path.exists()
        self.entries: list[dict[str, Any]] = json.loads(path.read_text()) if path is not None and there else []
        self.by_source = {entry["source"]: entry for entry in self.entries}

    def report(self, arch: str, op: str, index: int) -> Report | None:
        """That of a configuration, its facts compared anew; None where it is not known."""
        if not self.by_source:
            return None
        item = compilations(arch, op)[index]
        _check_facts(item)
        entry = self.by_source.get(source_of(item, arch))
        if entry is None:
            return None
        found = {name: value for name, value in entry.items() if name not in ("op", "name")}
        report = Report(name=item.name, num_warps=item.num_warps, num_stages=item.num_stages, **found)
        report.failed = failures(item, arch, report)
        return report

    @staticmethod
    def stored(report: Report) -> dict[str, Any]:
        """What is kept of a report: what was read of the compiled code, and of which source."""
        left_out = ("name", "num_warps", "num_stages", "failed", "seconds")
        return {name: value for name, value in asdict(report).items() if value and name not in left_out}

    def keep(self, op: str, report: Report) -> None:
        """Write a report in place of what was known of that configuration, at once: a run that is cut still counts."""
        if not (self.record and self.path and report.triton):
            return
        entry = {"op": op, "name": report.name, **self.stored(report)}
        self.entries = [e for e in self.entries if _place(e) != _place(entry)] + [entry]
        self.write()

    def forget(self, archs: Sequence[str], ops: Sequence[str]) -> None:
        """Drop what is launched no longer, of these architectures and ops and the Triton that runs."""
        import triton

        launched = {
            (triton.__version__, arch, op, c.name) for arch in archs for op in ops for c in compilations(arch, op)
        }
        asked = {(triton.__version__, arch, op) for arch in archs for op in ops}
        self.entries = [e for e in self.entries if _place(e)[:3] not in asked or _place(e) in launched]
        if self.record:
            self.write()

    def write(self) -> None:
        """One line for each, in an order of their own."""
        assert self.path is not None
        lines = [json.dumps(entry) for entry in sorted(self.entries, key=_place)]
        scratch = self.path.with_suffix(".new")
        scratch.write_text("[\n" + ",\n".join(lines) + "\n]\n")
        scratch.replace(self.path)


def _place(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    return entry["triton"], entry["arch"], entry["op"], entry["name"]


def _table(reports: Sequence[Report]) -> str:
    def widths(counts: dict[str, int]) -> str:
        return "+".join(f"{n}x{bits}" for bits, n in sorted(counts.items(), key=lambda i: -int(i[0]))) or "-"

    rows = [
        ("architecture", "configuration", "warps", "regs", "spills", "shared", "loop", "loads", "stores", "tensor", "")
    ]
    rows += [
        (
            r.arch,
            r.name,
            str(r.num_warps),
            str(r.registers),
            str(r.spills),
            str(r.shared),
            str(r.loop),
            widths(r.loads),
            widths(r.stores),
            "+".join(f"{n} {name}" for name, n in r.tensor_cores.items()) or "-",
            "ok" if not r.failed else "FAILED " + "; ".join(r.failed),
        )
        for r in reports
    ]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, wide, strict=False)), row[-1]]) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 where a declared fact does not hold."""
    parser = argparse.ArgumentParser(prog="python -m sdmp_kernels.ahead_of_time", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT), metavar="sm_90")
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=OPS, metavar="mix")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--known", type=Path, metavar="FILE", help="reports of sources that need not be compiled again")
    parser.add_argument("--record", action="store_true", help="add to that file what had to be compiled")
    parser.add_argument("--anew", type=int, default=0, metavar="N", help="compile one in N all the same, and compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    chosen = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed, so there is nothing to compile", file=sys.stderr)
        return 2
    if chosen.record and chosen.known is None:
        parser.error("--record needs --known FILE")
    known = Known(chosen.known, chosen.record)
    known.forget(chosen.arch, chosen.op)
    reports = run(chosen.arch, chosen.op, chosen.jobs, known, chosen.anew)
    print(_table(reports))
    failed, made = sum(bool(r.failed) for r in reports), sum(r.seconds > 0 for r in reports)
    print(f"{len(reports)} configurations, {made} compiled now, {failed} with a fact that fails")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

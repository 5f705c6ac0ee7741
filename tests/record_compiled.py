"""Bring golden/compiled.json up to date: compile what is not in it, for every architecture and both Tritons.

python tests/record_compiled.py [--op info_nce]
"""

from __future__ import annotations

import argparse
import sys

from oldest_triton import unpacked
from test_ahead_of_time import SERVED, covered, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", default=SERVED, choices=SERVED)
    wanted = parser.parse_args().op
    failed = 0
    for arch, path in [*((arch, []) for arch in dict.fromkeys(arch for arch, _ in covered())), ("sm_90", [unpacked()])]:
        ops = [op for of, op in covered() if of == arch and op in wanted]
        done = run("--arch", arch, "--op", *ops, "--record", anew=0, path=path) if ops else None
        if done is not None:
            failed += done.returncode
            print("\n".join(line for line in done.stdout.splitlines() if " FAILED " in line or "compiled now" in line))
            print(done.stderr, end="", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench`: what there is, then a short run of `mix` and `losses` on this machine."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sdmp_train.advice import elsewhere, no_traceback

QUESTIONS = ("views", "mix", "losses", "step")
OVERVIEW = """\
python -m bench views    crop, resize, flip, colours, blur in one op, beside torchvision, kornia, albumentations
python -m bench stall    whether data keeps a step waiting, beside the same step from resident data
python -m bench loader   images/s of the loaders from files, beside torchvision's own and DALI's decoder alone
python -m bench mix      per-sample Mixup, CutMix and ResizeMix, beside a copy, eager PyTorch, torch.compile, timm,
                         torchvision, kornia
python -m bench losses   info_nce, soft_cross_entropy, distillation, beside literal and best eager, torch.compile,
                         SDPA, F.linear_cross_entropy, Liger, cut-cross-entropy, QuACK, Inf-CL
python -m bench step     one training step: plain MoCo v3, with SDMP, with SDMP the way the released code does it
python -m bench labels   what mixing and its labels cost in timm's training loop, by timm and by us, on this CPU
python -m bench small    a hundred images of 32 px on one thread: drawing and mixing beside timm's Mixup and eager forms
python -m bench price    what SDMP adds to a step beyond its extra forward passes, MoCo v3 and DINO, on this CPU
python -m bench overhead what a call costs on the host: the first, and each one on a few rows, for every op
python -m bench gpu      all of it on a GPU in ten minutes: op matrix, 2^31 elements, sanitizer, benchmarks, plots
python -m bench train    CIFAR-10 by `cifar10-r18` and by its SDMP twin, in turns, within --minutes; resumable
python -m bench tune     measure the launch tables of the Triton kernels for this GPU
python -m bench table    the tables of README and docs/results, from the newest results of every machine
python -m bench reproduce table5|map   is the method any good? Table 5, and where the gain begins: whole trainings,
                         resumable, within --minutes
python -m bench env      what this machine is, and which libraries there are to compare with
python -m bench offline  carry wheels to a GPU host without a package registry

Whole runs of views, mix, losses, step, train and gpu write bench/results/MACHINE-DATE.json, which `table` reads; short
ones (--quick, --only, less than 3 --minutes) write what --json names. `reproduce` has bench/results/reproduce, `tune`
sdmp_kernels/tables; all others write what --json names. Only `gpu` writes pages without --write.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = OVERVIEW
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for question in QUESTIONS:
        _measuring(commands.add_parser(question, help=f"measure {question}"))
    overhead = commands.add_parser("overhead", help="what a call costs on the host")
    overhead.add_argument("--seconds", type=float, default=3.0, help="timed seconds per op (default 3)")
    overhead.add_argument("--json", type=Path, help="also write the rows to this file")
    labels = commands.add_parser("labels", help="mixing and its labels in timm's loop")
    labels.add_argument("--arch", default="resnet10t", help="a timm model (default resnet10t)")
    labels.add_argument("--px", type=int, default=64, help="side of the images (default 64)")
    labels.add_argument("--classes", type=int, default=1000, help="classes (default 1000)")
    labels.add_argument("--batch-size", type=int, default=128, help="images of a step (default 128)")
    labels.add_argument("--blocks", type=int, default=20, help="interleaved steps of every way (default 20)")
    labels.add_argument("--json", type=Path, help="also write the rows to this file")
    small = commands.add_parser("small", help="a hundred images of 32 px, where the host's work counts")
    small.add_argument("--seconds", type=float, default=3.0, help="timed seconds of each pair (default 3)")
    small.add_argument("--json", type=Path, help="also write the rows to this file")
    price = commands.add_parser("price", help="what SDMP adds to a step")
    price.add_argument("--blocks", type=int, default=20, help="interleaved blocks (default 20)")
    price.add_argument("--seconds", type=float, default=1.0, help="timed seconds of each arm in a block (default 1)")
    price.add_argument("--batch-size", type=int, default=64, help="images of a step (default 64)")
    price.add_argument("--json", type=Path, help="also write the rows to this file")
    loader = commands.add_parser("loader", help="images/s from files to views")
    loader.add_argument("--data", type=Path, help="folder of photographs (default: the sample in the shared data)")
    loader.add_argument("--seconds", type=float, default=6.0, help="timed seconds per loader and round (default 6)")
    loader.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    loader.add_argument("--workers", type=int, default=2, help="decoding threads or processes (default 2)")
    loader.add_argument("--batch-size", type=int, default=64, help="images per batch (default 64)")
    loader.add_argument("--json", type=Path, help="also write the rows to this file")
    stall = commands.add_parser("stall", help="whether data keeps a step waiting")
    stall.add_argument("--preset", default="quickstart", help="whose step is measured (default quickstart)")
    stall.add_argument("--data", help="images (default: the preset's own)")
    stall.add_argument("--loader", default="auto", help="auto, dali, torchvision or resident (default auto)")
    stall.add_argument("--workers", type=int, help="decoding threads or processes (default: the cores)")
    stall.add_argument("--batch-size", type=int, help="images of a step (default: the preset's)")
    stall.add_argument("--blocks", type=int, default=10, help="interleaved blocks (default 10)")
    stall.add_argument("--steps", type=int, default=50, help="steps of a block (default 50)")
    stall.add_argument("--json", type=Path, help="also write the numbers to this file")
    gpu = commands.add_parser("gpu", help="the whole proof on a GPU")
    gpu.add_argument("--minutes", type=float, default=10.0, help="how long it may take (default 10)")
    gpu.add_argument("--dry-run", action="store_true", help="the same code on tiny sizes, interpreted, without a GPU")
    gpu.add_argument("--json", type=Path, help="where the results go (default bench/results/<gpu>-<date>.json)")
    gpu.add_argument(
        "--part",
        choices=("proof", "train"),
        help="proof: every stage, and `tune` of the contrastive loss; train: CIFAR-10, plain and with SDMP",
    )
    gpu.add_argument("--stages", help="only these stages, separated by commas")
    gpu.add_argument("--again", action="store_true", help="also stages that this commit has finished already")
    gpu.add_argument("--folder", type=Path, help="part train: run folders (default runs/gpu)")
    train = commands.add_parser("train", help="CIFAR-10 on this device, plain and with SDMP")
    train.add_argument("--data", type=Path, help="CIFAR-10 as train/CLASS and test/CLASS (default: the shared archive)")
    train.add_argument("--minutes", type=float, help="stop after so many minutes; the same command goes on later")
    train.add_argument("--epochs", type=int, help="of each run (default: what --minutes allow, at most the preset's)")
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (default: GPU if any)")
    train.add_argument("--folder", type=Path, help="run folders (default runs/gpu)")
    train.add_argument("--again", action="store_true", help="begin anew where there are runs already")
    train.add_argument("--tiny", action="store_true", help="a narrow net on drawn pictures, for a trial")
    train.add_argument("--json", type=Path, help="where the results go (default bench/results/<machine>-<date>.json)")
    tune = commands.add_parser("tune", help="measure launch tables")
    tune.add_argument("--op", action="append", help="only this op (may be given more than once)")
    tune.add_argument("--minutes", type=float, default=10.0, help="how long it may take (default 10)")
    tune.add_argument("--dry-run", action="store_true", help="tiny sizes through the interpreter; writes nothing")
    tune.add_argument("--out", type=Path, help="the table file (default sdmp_kernels/tables/<arch>.json)")
    table = commands.add_parser("table", help="the tables of README and docs/results")
    table.add_argument("--write", action="store_true", help="put them between the pages' markers")
    table.add_argument("--plots", action="store_true", help="draw the plots of the newest results again")
    again = commands.add_parser("reproduce", help="the paper's Table 5, and where the gain begins")
    _reproducing(again)
    check = commands.add_parser("check", help="one of the checks that `gpu` runs")
    check.add_argument("name", choices=("ceilings", "large", "nosync", "small"))
    check.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    check.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    check.add_argument("--json", type=Path, required=True, help="the results file to write into")
    _one_arm(commands.add_parser("arm", help="one arm of one setting, for the processes that `losses` starts"))
    commands.add_parser("env", help="machine and libraries")
    offline = commands.add_parser("offline", help="carry wheels to an offline host")
    offline.add_argument("action", choices=("pack", "unpack"))
    offline.add_argument("folder", type=Path, help="the folder of wheels")
    offline.add_argument("--python", default="3.12", help="Python version of the offline host (default 3.12)")
    offline.add_argument("--into", type=Path, help="unpack: where to install (default: this environment)")
    args = parser.parse_args(argv)
    if args.command is None:
        print("\n".join([OVERVIEW, *elsewhere()]))
        return overview()
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Hand over to the file that answers; imported here so that `--help` needs no torch."""
    if args.command in QUESTIONS:
        from bench import question

        return question.run(args.command, args)
    if args.command == "arm":
        from bench import question

        return question.run_arm(args)
    if args.command == "check":
        from bench import checks, question
        from bench.results import Results

        device = question.choose_device(args.device)
        return checks.run(args.name, device, tiny=args.tiny, results=Results(args.json))
    if args.command == "loader":
        from bench import loader

        return loader.run(args)
    if args.command == "stall":
        from bench import stall

        return stall.run(args)
    if args.command == "labels":
        from bench import labels

        return labels.run(args)
    if args.command == "small":
        from bench import small

        return small.run(args)
    if args.command == "price":
        from bench import price

        return price.run(args)
    if args.command == "overhead":
        from bench import overhead

        return overhead.run(args)
    if args.command == "gpu":
        from bench import gpu

        return gpu.run(args)
    if args.command == "train":
        from bench import train

        return train.run(args)
    if args.command == "tune":
        from bench import tune

        return tune.run(args)
    if args.command == "table":
        from bench import table

        return table.run(args)
    if args.command == "reproduce":
        from bench import reproduce

        return reproduce.run(args)
    if args.command == "offline":
        from bench import offline

        return offline.run(args)
    from bench import environment, peers

    print(environment.line())
    for name, words in peers.present():
        print(f"  {name:<22} {words}")
    return 0


def overview() -> int:
    """A short run of the two questions anyone can ask of any machine; each in a process of its own."""
    from bench.harness import EXIT_ABSENT

    for question in ("mix", "losses"):
        done = subprocess.run([sys.executable, "-m", "bench", question, "--quick"], cwd=Path(__file__).parent.parent)
        if done.returncode not in (0, EXIT_ABSENT):
            return done.returncode
    return 0


def _one_arm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--setting", required=True, help="its name")
    parser.add_argument("--arm", required=True, help="its name")
    parser.add_argument("--part", choices=("check", "time"), required=True, help="check and weigh it, or time it")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--size", choices=("tiny", "quick", "default", "full"), required=True)
    parser.add_argument("--seconds", type=float, required=True, help="how long to time it")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    parser.add_argument("--json", type=Path, required=True, help="where its entry goes")


def _reproducing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", choices=("table5", "map"))
    parser.add_argument("--small", action="store_true", help="the same for two CPU cores, with a narrow ResNet")
    parser.add_argument(
        "--data", type=Path, help="CIFAR-10 as train/CLASS and test/CLASS (default: the shared archive)"
    )
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the same command goes on later")
    parser.add_argument("--seeds", type=int, help="seeds of every cell (default: table5 1, map 3)")
    parser.add_argument("--epochs", type=int, help="table5: passes over the images (default 200, with --small 20)")
    parser.add_argument("--width", type=int, default=8, help="with --small: channels of the first stage (default 8)")
    parser.add_argument("--only", help="only cells whose name contains this")
    parser.add_argument("--part", help="i/n: every n-th cell, so that n processes share an experiment")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (default: GPU if any)")
    parser.add_argument("--folder", type=Path, help="run folders (default runs/reproduce/NAME)")
    parser.add_argument("--json", type=Path, help="results (default bench/results/reproduce/NAME.json)")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/reproduction.md and end")


def _measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (default: GPU if any)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="a minute, small sizes")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="more sizes, dtypes and layouts")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help=argparse.SUPPRESS)
    parser.set_defaults(size="default")
    parser.add_argument("--only", help="only settings whose name contains this")
    parser.add_argument("--seconds", type=float, default=6.0, help="timed seconds per setting (default 6)")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many minutes; what is cut is not kept")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the cores this process may use)")
    parser.add_argument(
        "--json",
        type=Path,
        help="where the results go (default: bench/results/MACHINE-DATE.json, which `bench table` reads; nothing for "
        "--quick, --only and less than 3 --minutes)",
    )


if __name__ == "__main__":
    code = 0
    with no_traceback("bench"):
        code = main()
    sys.exit(code)

"""The command line. `python -m sdmp_train` without an argument is the quickstart.

What runs is imported once its arguments are read: torch takes seconds to import, a wrong argument none to refuse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from . import run_folder
from .advice import COMMAND, command, elsewhere
from .config import DEFAULT_METHOD, Config, ConfigError, MethodName, load_config, near, with_method
from .presets import get_preset, origins_of, table_of_presets
from .settings import named_place, with_channels
from .stop import EndedElsewhere, Stopped, StopRequest
from .text import printable_lines

DONE, BAD_INPUT = 0, 2
PROGRAM = "python -m sdmp_train"
ABOUT = f"""\
{PROGRAM}                              quickstart: MoCo v3 + SDMP on embedded images, a few minutes
{PROGRAM} pretrain --data DIR ...      pretrain a backbone on a folder of images
{PROGRAM} plan --data DIR ...          the same arguments, nothing run: steps, sizes, what would run where
{PROGRAM} eval knn RUN                 nearest-neighbour accuracy of a run or an exported backbone
{PROGRAM} eval linear RUN              accuracy of a linear classifier on its frozen features
{PROGRAM} eval finetune RUN            accuracy once the whole network is trained on all labels, or on few
{PROGRAM} eval robustness RUN ...      that network on ImageNet-A, -R and -C
{PROGRAM} eval embed RUN --output DIR  features of images, as .npy or safetensors
{PROGRAM} eval pictures RUN            attention, patch features, nearest neighbours, a map of the features
{PROGRAM} eval --help                  all of them
{PROGRAM} report RUN [RUN ...]         one HTML page about runs: curves, kNN, pictures, the paper's numbers
{PROGRAM} export --run RUN             write a checkpoint's backbone as timm reads it
{PROGRAM} presets [NAME]               recipes, with the paper's numbers; where one's settings come from
{PROGRAM} verify DIR                   index and check a folder of images
{PROGRAM} SUBCOMMAND --help            the flags of a subcommand
"""

T = TypeVar("T")


@dataclass(frozen=True)
class PretrainArguments:
    """Settings of a run: preset < --config file < flags."""

    config: OmitArgPrefixes[Config] = field(default_factory=Config)
    method: MethodName = DEFAULT_METHOD
    """Pretext task; it decides which flags there are."""
    folder: Annotated[Positional[str | None], arg(metavar="[FOLDER]")] = None
    """The same as --data."""
    config_file: Annotated[str | None, arg(name="config")] = None
    """YAML with some or all settings, such as a run folder's config.yaml."""
    output: str | None = None
    """Run folder; default runs/<date>-<time>-<preset>."""
    resume: str | None = None
    """Go on with a run: its folder, or `auto` with --output: go on with what is there, or start where nothing is."""
    resume_previous: bool = False
    """With --resume: take the checkpoint before the newest."""
    accept_changed_data: bool = False
    """With --resume: go on although image files have come or gone."""
    overwrite: bool = False
    """Delete a former run in the output folder."""
    certify: bool = False
    """Measure first whether data keeps the run waiting: certify.json in the run folder, and one line."""


@dataclass(frozen=True)
class ExportArguments:
    """Write the backbone of a run's checkpoint as safetensors with timm's names."""

    folder: Annotated[Positional[str | None], arg(metavar="[RUN]")] = None
    """The same as --run."""
    run: str | None = None
    """Run folder."""
    step: int | None = None
    """Step of the checkpoint; default the newest."""
    output: str | None = None
    """Folder to write; default <run>/exported."""


@dataclass(frozen=True)
class VerifyArguments:
    """Read and decode every image of a folder, list, archive or set of shards; compare with the last time."""

    folder: Annotated[Positional[str | None], arg(metavar="[FOLDER]")] = None
    """The same as --data."""
    data: str | None = None
    """Folder, list, archive or shards, or the URL of shards."""
    max_pixels: int | None = None
    """Files that claim more pixels are bad (decompression bombs); None is 89,478,485, Pillow's own limit."""
    bad_list: str | None = None
    """A file to write, with the path and the reason of every bad file."""


def one_of(name: str, flag: str | None, positional: str | None) -> str:
    """What is given with `--name` or without it. Raises `ConfigError` where it is neither or two different ones."""
    given = {value for value in (flag, positional) if value is not None}
    if not given:
        raise ConfigError(f"{name} is missing; give --{name} FOLDER")
    if len(given) > 1:
        raise ConfigError(f"--{name} names {flag}, and {positional} is given besides; give one of them")
    return given.pop()


class OptionalAsItself:
    """A rule for tyro: what may be None is shown as what it is otherwise, `STR` and not `{None}|STR`.

    Its default says that it may be None, and `None` is taken as before.
    """

    def __init__(self) -> None:
        self.asking = False
        """Whether this rule asks tyro's own, which then is not to ask this one."""

    def __call__(self, asked: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        kinds = tuple(kind for kind in get_args(asked.type) if kind is not type(None))
        if self.asking or len(kinds) == len(get_args(asked.type)):
            return None
        self.asking = True
        try:
            whole = ConstructorRegistry.get_primitive_spec(asked)
            other = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(Union[kinds], asked.markers))  # noqa: UP007
        finally:
            self.asking = False
        if not isinstance(whole, PrimitiveConstructorSpec) or not isinstance(other, PrimitiveConstructorSpec):
            return None  # a group of settings
        if other.nargs != 1:
            return replace(whole, metavar=other.metavar)

        def read(words: list[str]) -> Any:  # whose error speaks of this kind alone
            return None if words == ["None"] else other.instance_from_str(words)

        return replace(whole, metavar=other.metavar, instance_from_str=read)


def parse(kind: type[T], subcommand: str, argv: Sequence[str], default: T | None = None) -> T:
    """Arguments by tyro: exits with code 2, naming near matches, for a flag that does not exist."""
    given: dict[str, Any] = {} if default is None else {"default": default}
    rules = ConstructorRegistry()
    rules.primitive_rule(OptionalAsItself())
    with rules:
        return tyro.cli(kind, args=list(argv), prog=f"{PROGRAM} {subcommand}", **given)


def parse_pretrain(subcommand: str, argv: Sequence[str]) -> PretrainArguments:
    """Preset, then config file (or the resumed run's), then flags."""
    argv = fill_resume(argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--preset", "--method", "--config", "--resume", "--output", "--channels"):
        early.add_argument(flag, nargs="?")  # without its value it is tyro that complains
    early.add_argument("--init-from", "--init_from", nargs="?")
    first = early.parse_known_args(argv)[0]
    base, stored = get_preset(first.preset or "custom"), None
    if first.resume:
        folder = resumed_folder(first.resume, first.output)
        if (folder / run_folder.SETTINGS).exists():  # not so where a run was killed as it began
            stored = run_folder.stored_config(folder)
    if stored is not None and not first.config and not first.preset:
        base = stored
    else:
        base = as_weights_are(base, first.config, first.init_from, stored)
    if first.preset:
        base = replace(base, run=replace(base.run, preset=first.preset))
    if first.method:
        base = with_method(base, first.method)
    if first.channels and first.channels.isdecimal():
        # A preset's mean of three colours says nothing of other channels.
        base = replace(base, data=with_channels(base.data, int(first.channels)))
    arguments = parse(PretrainArguments, subcommand, argv, PretrainArguments(config=base, method=base.method_name))
    return take_folder(arguments)


def as_weights_are(base: Config, config_file: str | None, init_from: str | None, stored: Config | None) -> Config:
    """`base`, changed by the weights that the run continues from, where it does, and then by the config file.

    `stored`: the settings of the run that is gone on with, which needs those weights no more.
    """

    def read(base: Config) -> Config:
        return load_config(Path(config_file), base) if config_file else base

    what = init_from or read(base).model.init_from
    if what in (None, "None"):  # tyro's spelling
        base = read(base)
        return base if what is None else replace(base, model=replace(base.model, init_from=None, init_sha256=None))
    from .continuing import following, following_run

    kept = stored is not None and stored.model.init_from == what
    base = read(following_run(base, stored) if stored is not None and kept else following(base, what))
    if base.model.init_from != what:  # --init-from, in place of what the file names
        base = replace(base, model=replace(base.model, init_from=what, init_sha256=None))
    return base


def fill_resume(argv: Sequence[str]) -> list[str]:
    """`--resume` without a value becomes `--resume auto`."""
    filled = list(argv)
    for i, word in enumerate(argv):
        if word == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
            filled[i] = "--resume=auto"
    return filled


def resumed_folder(resume: str, output: str | None) -> Path:
    """The run folder that `--resume` means."""
    if resume != "auto":
        folder = Path(resume)
        if output and Path(output) != folder:
            raise ConfigError(f"--resume names {resume} and --output {output}; give one of them")
    elif output:
        folder = Path(output)
    else:
        raise ConfigError("--resume without a folder needs --output, the folder of the run to go on with")
    run_folder.check_folder(folder, "auto" if resume == "auto" else "resume")
    return folder


def take_folder(arguments: PretrainArguments) -> PretrainArguments:
    """Put the positional folder where --data is."""
    if arguments.folder is None:
        return arguments
    data = replace(arguments.config.data, data=arguments.folder)
    return replace(arguments, config=replace(arguments.config, data=data), folder=None)


def run_pretrain(argv: Sequence[str]) -> int:
    with StopRequest() as stop:  # before anything that takes its time or leaves something behind
        arguments = parse_pretrain("pretrain", argv)
        output = Path(arguments.output) if arguments.output else None
        if arguments.resume:
            if arguments.overwrite:
                raise ConfigError("--resume goes on with a run and --overwrite deletes it; give one of them")
            output = resumed_folder(arguments.resume, arguments.output)
        elif arguments.resume_previous:
            raise ConfigError("--resume-previous says which checkpoint --resume takes; give --resume too")
        named_place(arguments.config.data)

        from .commands import pretrain

        return pretrain(
            arguments.config,
            output,
            resume=arguments.resume is not None,
            or_start=arguments.resume == "auto",
            previous=arguments.resume_previous,
            overwrite=arguments.overwrite,
            accept_changed_data=arguments.accept_changed_data,
            certified=arguments.certify,
            stop=stop,
        )


def run_plan(argv: Sequence[str]) -> int:
    arguments = parse_pretrain("plan", argv)
    named_place(arguments.config.data)

    from .commands import dry_run

    return dry_run(arguments.config, Path(arguments.output) if arguments.output else None, arguments.overwrite)


def run_eval(argv: Sequence[str]) -> int:
    from .evaluate.command import PROTOCOLS, describe_protocols

    name, rest = (argv[0], argv[1:]) if argv else ("", argv)
    if name in ("-h", "--help"):
        print(describe_protocols(PROGRAM))
        return DONE
    if name not in PROTOCOLS:
        what = f"unknown protocol {name!r}.{near(name, PROTOCOLS)}" if name else "a protocol is missing."
        told = f"`{command('sdmp_train', 'eval', '--help')}` says what each measures"
        raise ConfigError(f"eval: {what} Known: {', '.join(PROTOCOLS)}; {told}")
    arguments = parse(PROTOCOLS[name], f"eval {name}", rest)
    try:
        arguments.function()(arguments)
    except Stopped:
        if hasattr(arguments, "resume"):
            words = [word for word in rest if word not in ("--resume", "--overwrite")]
            lines = [f"go on with: {command('sdmp_train', 'eval', name, *words, '--resume')}", *elsewhere()]
            print("\n".join(map(printable_lines, lines)), flush=True)
        raise
    return DONE


def run_report(argv: Sequence[str]) -> int:
    from .evaluate.settings.report import ReportConfig

    arguments = parse(ReportConfig, "report", argv)

    from .evaluate.report import write_report

    write_report(arguments)
    return DONE


def run_export(argv: Sequence[str]) -> int:
    arguments = parse(ExportArguments, "export", argv)
    run = Path(one_of("run", arguments.run, arguments.folder))

    from .commands import export_checkpoint

    return export_checkpoint(
        run, arguments.step, Path(arguments.output) if arguments.output else run / run_folder.EXPORTED
    )


def run_presets(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise ConfigError(f"presets takes no arguments or the name of one, got {' '.join(argv)}")
    for line in origins_of(argv[0]) if argv else table_of_presets():
        print(line)
    return DONE


def run_verify(argv: Sequence[str]) -> int:
    arguments = parse(VerifyArguments, "verify", argv)
    bad_list = None if arguments.bad_list is None else Path(arguments.bad_list)
    data = one_of("data", arguments.data, arguments.folder)

    from .verify import verify_data

    return verify_data(data, arguments.max_pixels, bad_list)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "pretrain": run_pretrain,
    "plan": run_plan,
    "eval": run_eval,
    "report": run_report,
    "export": run_export,
    "presets": run_presets,
    "verify": run_verify,
}


def main(argv: Sequence[str]) -> int:
    """Run a subcommand; returns the exit code."""
    if not argv:
        argv = ["pretrain", "--preset", "quickstart"]
    name, *rest = argv
    if name in ("-h", "--help"):
        print("\n".join([ABOUT.rstrip("\n"), *elsewhere()]))
        return DONE
    if name == "--version":
        print(f"sdmp-kernels {version('sdmp-kernels')}")
        return DONE
    try:
        if name not in COMMANDS:
            raise ConfigError(f"unknown subcommand {name!r}.{near(name, COMMANDS)} Known: {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except EndedElsewhere as error:
        return error.exit_code  # the rank that knows why says so
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise  # not foreseen: the traceback is what helps, and Python's exit code is 1
        text = printable_lines(error)
        print("\n".join([f"error: {text}", *(elsewhere() if COMMAND in text else [])]), file=sys.stderr)
        return int(code)

"""The command line: precedence, spellings, near matches, exit codes, and nothing left behind by a refusal."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdmp_train import advice
from sdmp_train.advice import install
from sdmp_train.checkpoint import save_checkpoint
from sdmp_train.cli import main, parse_pretrain
from sdmp_train.config import ConfigError, save_config
from sdmp_train.evaluate.command import PROTOCOLS
from sdmp_train.presets import get_preset
from sdmp_train.run_folder import stored_config
from sdmp_train.stop import Stopped

TINY = [
    "--preset",
    "quickstart",
    "--patch-px",
    "8",
    "--width",
    "32",
    "--depth",
    "2",
    "--heads",
    "2",
    "--moco-dim",
    "32",
    "--moco-mlp-dim",
    "64",
    "-b",
    "8",
    "--epochs",
    "2",
    "--device",
    "cpu",
    "--loader",
    "torchvision",
    "-j",
    "0",
    "--knn-max-images",
    "30",
]


def test_preset_then_file_then_flags(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("optim: {base_lr: 0.5, weight_decay: 0.25}\n")
    preset = get_preset("table5/cifar10-r50-sdmp")
    words = ["--preset", "table5/cifar10-r50-sdmp", "--config", str(tmp_path / "c.yaml"), "--lr", "0.7", "photos"]
    config = parse_pretrain("pretrain", words).config
    assert config.run.preset == "table5/cifar10-r50-sdmp"
    assert (config.optim.base_lr, config.optim.weight_decay) == (0.7, 0.25)
    assert config.optim.lars_trust == preset.optim.lars_trust
    assert config.data.data == "photos"


@pytest.mark.parametrize(
    ("words", "group", "name", "value"),
    [
        (["--data", "d"], "data", "data", "d"),
        (["--data-dir", "d"], "data", "data", "d"),
        (["d"], "data", "data", "d"),
        (["-a", "resnet18"], "model", "arch", "resnet18"),
        (["--arch", "resnet18"], "model", "arch", "resnet18"),
        (["--model", "resnet18"], "model", "arch", "resnet18"),
        (["-b", "64"], "optim", "batch_size", 64),
        (["--batch-size=64"], "optim", "batch_size", 64),
        (["--lr", "1e-3"], "optim", "base_lr", 1e-3),
        (["--wd", "0.2"], "optim", "weight_decay", 0.2),
        (["--weight-decay", "0.2"], "optim", "weight_decay", 0.2),
        (["--warmup-epochs", "5"], "optim", "warmup_epochs", 5),
        (["--opt", "lars"], "optim", "opt", "lars"),
        (["--seed", "3"], "run", "seed", 3),
        (["-j", "4"], "data", "workers", 4),
        (["--workers", "4"], "data", "workers", 4),
        (["--moco-dim", "128"], "method", "dim", 128),
        (["--moco-mlp-dim", "512"], "method", "mlp_dim", 512),
        (["--moco-m", "0.9"], "method", "momentum", 0.9),
        (["--no-moco-m-cos"], "method", "momentum_cosine", False),
        (["--moco-t", "0.1"], "method", "temperature", 0.1),
        (["--no-stop-grad-conv1"], "method", "stop_grad_conv1", False),
        (["--crop-min", "0.2"], "data", "crop_min_frac", 0.2),
        (["--mixing", "none"], "method", "mixing", "none"),
        (["--variant", "extra"], "method", "variant", "extra"),
        (["--rules", "cutmix", "mixup"], "method", "rules", ("cutmix", "mixup")),
        (["--mix-per", "sample"], "method", "per", "sample"),
        (["--flip", "global"], "method", "flip", "global"),
        (["--shared-lam"], "method", "shared_lam", True),
        (["--source-weight", "static"], "method", "source_weight", "static"),
        (["--pair-weight", "static"], "method", "pair_weight", "static"),
        (["--max-steps", "7"], "run", "max_steps", 7),
        (["--min-lr", "1e-6"], "optim", "min_lr", 1e-6),
        (["--weight-decay-end", "0.4"], "optim", "weight_decay_end", 0.4),
        (["--clip-grad", "3"], "optim", "clip_grad", 3.0),
        (["--clip-mode", "parameter"], "optim", "clip_mode", "parameter"),
        (["--method", "mocov3", "--moco-dim", "64"], "method", "dim", 64),
        (["--method", "supervised", "--drop-path", "0.1"], "method", "drop_path", 0.1),
        (["--method=supervised", "--mix-prob", "0.5"], "method", "prob", 0.5),
        (["--preset", "quickstart-supervised", "--mix-alpha", "0.8"], "method", "alpha", 0.8),
    ],
)
def test_flags_are_spelled_as_users_know_them(words: list[str], group: str, name: str, value: object):
    assert getattr(getattr(parse_pretrain("pretrain", words).config, group), name) == value


def test_a_method_has_its_own_flags_and_takes_its_defaults_and_every_other_setting(tmp_path: Path, capsys):
    config = parse_pretrain("pretrain", ["--preset", "quickstart", "--method", "supervised"]).config
    expected = get_preset("quickstart")
    assert config == replace(expected, method=type(config.method)())
    assert config.method_name == "supervised"
    (tmp_path / "c.yaml").write_text("method: {name: supervised, prob: 0.25}\n")
    from_file = parse_pretrain("pretrain", ["--config", str(tmp_path / "c.yaml"), "--label-smoothing", "0.1"]).config
    assert (from_file.method.prob, from_file.method.label_smoothing) == (0.25, 0.1)
    with pytest.raises(ConfigError, match="Did you mean supervised"):
        parse_pretrain("pretrain", ["--method", "supervisd"])
    with pytest.raises(SystemExit) as error:
        parse_pretrain("pretrain", ["--method", "supervised", "--moco-dim", "64"])
    assert error.value.code == 2
    assert "--moco-dim" in capsys.readouterr().err


def test_a_stored_configuration_is_accepted_back(tmp_path: Path):
    config = get_preset("table9/mocov3-vit_s-sdmp-extra")
    save_config(config, tmp_path / "config.yaml")
    assert parse_pretrain("pretrain", ["--config", str(tmp_path / "config.yaml")]).config == config


def test_resume_needs_a_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs --output"):
        parse_pretrain("pretrain", ["--resume"])
    with pytest.raises(ConfigError, match="not a run folder"):
        parse_pretrain("pretrain", ["--resume", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "Did you mean pretrain"),
        (["eval", "linaer"], "unknown protocol 'linaer'"),
        (["eval"], "protocol is missing. Known: knn, linear"),
        (["pretrain", "--preset", "quikstart"], "Did you mean quickstart"),
        (["pretrain", "--config", "missing.yaml"], "cannot read the config file"),
        (["pretrain", "--preset", "quickstart", "--data", "missing"], "there is no folder"),
        (["pretrain", "--preset", "quickstart", "--arch", "vit_smal"], "Did you mean vit_small"),
        (["pretrain", "--preset", "quickstart", "--arch", "hf-hub:timm/resnet18.a1_in1k"], "plain name"),
        (
            ["plan", "--preset", "quickstart", "--arch", "vit_tiny_patch16_224", "--image-px", "42"],
            "leave 2 of 42 rows",
        ),
        (["pretrain", "--config", "/dev/zero"], "is a device, not a regular file"),
        (["export", "/dev"], "cannot read the config file"),
        (["pretrain"], "data is missing"),
        (["presets", "x", "y"], "takes no arguments or the name of one"),
        (["presets", "table1/mocov3-vit_s-sdm"], "Did you mean table1/mocov3-vit_s-sdmp"),
        (["export", "missing"], "cannot read the config file"),
        (["eval", "knn"], "needs a backbone"),
        (["verify", "missing"], "there is no folder"),
    ],
)
def test_refusals_exit_with_two_and_leave_nothing(words: list[str], message: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if "--arch" in words:
        words = [*words, "--data", str(make_folder(tmp_path / "cache" / "i", 130))]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


def make_folder(root: Path, count: int) -> Path:
    from PIL import Image

    root.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(root / f"{i}.jpg")
    return root


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--moco-tt", "0.1"], "--moco-t"),
        (["--batch-sise", "4"], "--batch-size"),
        (["--opt", "adam"], "adamw"),
        (["--epochs", "many"], "epochs"),
        (["--epochs", "3", "--warmup-epochs", "40"], "at most epochs"),
    ],
)
def test_wrong_flags_exit_with_two_and_name_near_ones(words: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as error:
        main(["pretrain", *words])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_subcommand(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in ("pretrain", "plan", "eval", "export", "presets", "verify"))


def test_what_may_be_none_is_shown_as_what_it_is_otherwise(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--method", "dino", "--help"])
    printed = capsys.readouterr().out
    assert "None}" not in printed and "{None" not in printed
    for shown in ("[FOLDER]", "--config STR ", "--clip-grad FLOAT ", "-j INT, --workers INT ", "FLOAT FLOAT "):
        assert shown in printed, shown
    words = ["--clip-grad", "None", "--global-crops-scale", "0.4", "1", "--method", "dino"]
    config = parse_pretrain("pretrain", words).config
    assert (config.optim.clip_grad, config.method.global_crops_scale) == (None, (0.4, 1.0))
    assert parse_pretrain("pretrain", ["--clip-grad", "3"]).config.optim.clip_grad == 3.0
    with pytest.raises(SystemExit):
        main(["pretrain", "--width", "wide"])
    assert "Error parsing --width: invalid literal for int()" in capsys.readouterr().err


def test_presets_print_the_papers_numbers(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("table1/mocov3-vit_s-sdmp "))
    assert "73.8 %" in row
    assert "31.6" in row, "hours of one GPU"
    assert "Table 1" in row


def test_plan_prints_and_writes_nothing(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(image_folder), *TINY]) == 0
    printed = capsys.readouterr().out
    for text in ("4 per epoch x 2 epochs = 8", "global 8 = 1 x 8 x accum 1", "36 images", "mixing: sdmp", "MiB"):
        assert text in printed
    assert list(tmp_path.iterdir()) == []


def test_pretrain_resume_export_and_knn(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(image_folder, tmp_path)
    assert main(["pretrain", relative, *TINY, "--max-steps", "3", "--output", "run"]) == 0
    assert main(["pretrain", relative, *TINY, "--output", "run"]) == 2
    said = "is finished at its --max-steps, 3 of 8; --resume with a larger one goes on, --overwrite deletes it"
    assert said in capsys.readouterr().err
    assert main(["pretrain", "--resume", "run", "--max-steps", "5"]) == 0
    assert "resume   after step 3 of 5\n" in capsys.readouterr().out
    assert main(["pretrain", "--resume", "run", "--max-steps", "5"]) == 0
    printed = capsys.readouterr().out
    assert "this run is finished, all 5 steps are made; a larger --max-steps goes on" in printed
    assert re.search(r"^kNN      .*% raw pixels, .*% untrained backbone, .*% trained backbone$", printed, re.MULTILINE)
    assert re.search(r"^loader   \w+: this run began with ", printed, re.MULTILINE)
    assert main(["pretrain", "--output", "run", "--resume", "--max-steps", "6"]) == 0
    assert main(["pretrain", "--resume", "run", "--lr", "0.5"]) == 2
    assert "optim.base_lr: 0.004 -> 0.5" in capsys.readouterr().err
    assert stored_config(Path("run")).run.max_steps == 6
    # A run knows its images in any working folder.
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert main(["eval", "knn", "--run", str(tmp_path / "run"), "--device", "cpu", "-j", "0", "--k", "1", "5"]) == 0
    monkeypatch.chdir(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("backbone, k = ") == 2
    assert printed.count("raw pixels, k = ") == 2
    assert main(["export", "run", "--output", "again"]) == 0
    assert sorted(p.name for p in Path("again").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert main(["eval", "knn", "--weights", "again", "--data", str(image_folder), "--device", "cpu", "-j", "0"]) == 0
    assert main(["export", "run", "--step", "77"]) == 2
    assert "step-000006" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "kept"), [(["--epochs", "3"],) * 2, (["--epochs", "3", "--overwrite"], ["--epochs", "3"])]
)
def test_an_evaluation_that_is_stopped_says_what_goes_on(words: list[str], kept: list[str], monkeypatch, capsys):
    from sdmp_train.evaluate.settings.linear import LinearConfig

    def stopped(_: LinearConfig) -> None:
        raise Stopped("asked")

    monkeypatch.setattr(LinearConfig, "function", lambda _: stopped)
    assert main(["eval", "linear", "a run", *words]) == 75
    expected = f"go on with: python -m sdmp_train eval linear 'a run' {' '.join(kept)} --resume\n"
    assert expected in capsys.readouterr().out


def test_one_command_starts_a_run_and_goes_on_with_it(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", str(image_folder), *TINY, "--knn-max-images", "0", "--output", "run", "--resume", "auto"]
    for steps in ("2", "3", "3"):
        assert main([*words, "--max-steps", steps]) == 0
    assert sorted(p.name for p in Path("run/checkpoints").glob("step-*")) == ["step-000002", "step-000003"]
    assert main(["pretrain", "--output", "run", "--resume"]) == 0
    capsys.readouterr()
    for wrong, message in (
        (["--output", "run", "--resume-previous"], "give --resume too"),
        (["--output", "run", "--resume", "--overwrite"], "give one of them"),
        (["--resume", "elsewhere"], "not a run folder"),
        (["--resume", "auto"], "needs --output"),
        (["--output", "run", "--resume", "--max-steps", "1"], "--max-steps is 1, and run/checkpoints/step-000003"),
    ):
        assert main(["pretrain", str(image_folder), *TINY, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_too_many_bad_images_exit_with_four(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "images", 20)
    (folder / "bad.jpg").write_text("no image")
    words = ["pretrain", str(folder), *TINY, "--output", str(tmp_path / "run")]
    assert main([*words, "--bad-images", "skip"]) == 4
    advice = capsys.readouterr().err
    assert "more than the 1.0% " in advice
    assert "--max-bad-frac 0.05 " in advice
    assert main(words) == 2
    assert capsys.readouterr().err.rstrip().endswith("leave it out with --bad-images skip --max-bad-frac 0.05")
    assert main(["plan", str(folder), *TINY, "--bad-images", "skip", "--max-bad-frac", "0.05"]) == 0


def test_a_start_that_fails_says_what_it_left_and_how_to_leave_out_the_file(image_folder: Path, tmp_path: Path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    cut = folder / "dots" / "5.jpg"
    cut.write_bytes(cut.read_bytes()[:-40])  # its header is whole
    words = ["pretrain", str(folder), *TINY, "--output", str(tmp_path / "run"), "--max-steps", "1"]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert f"no step was made: {tmp_path / 'run'} holds the start alone" in printed.out
    assert "--bad-images skip --max-bad-frac 0.05, which" in printed.err
    assert main([*words, "--overwrite", "--bad-images", "skip", "--max-bad-frac", "0.05"]) == 0


def test_channels_that_no_image_has_are_the_flags_fault_before_anything_is_written(tmp_path: Path, capsys):
    folder = make_folder(tmp_path / "images", 20)
    words = ["pretrain", str(folder), *TINY, "--output", str(tmp_path / "run"), "--channels", "4"]
    assert main([*words, "--mean", *["0.5"] * 4, "--std", *["0.2"] * 4]) == 2
    printed = capsys.readouterr()
    assert "--channels is 4, and none of 20 images under" in printed.err
    assert "epair" not in printed.err
    assert not (tmp_path / "run").exists()


def test_an_export_made_by_others_exits_with_two_and_one_line(image_folder: Path, tmp_path: Path, capsys):
    (tmp_path / "bomb.pth").write_bytes(b"\x80\x04.")
    description = {"architecture": "test_resnet", "model_args": {"checkpoint_path": str(tmp_path / "bomb.pth")}}
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert main(["eval", "knn", "--weights", str(tmp_path), "--data", str(image_folder), "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert "a name in model_args is 'checkpoint_path'" in printed
    assert printed.count("\n") == 1


NONSENSE = {
    "pretrain --output": "Missing value for argument",
    "pretrain --preset": "Missing value for argument",
    "pretrain --workers 100000": "0 to 1024",
    "pretrain --preset quickstart -b 8 -j 0 --data IMAGES --output /proc/none": "cannot be made",
    "pretrain --lr nan": "lr",
    "pretrain --batch-size 0": "batch_size",
    "pretrain --seed -1": "seed",
    "pretrain --rules foo": "foo",
    "pretrain --preset nosuch": "unknown preset",
    "pretrain --config nosuch.yaml": "cannot read the config file",
    "pretrain --data IMAGES --device tpu": "tpu",
    "pretrain --data IMAGES --init-from nosuch": "there is no folder nosuch; give that of an export, that of a run, or",
    "plan --data IMAGES --init-from timm:vit_tiny_patch16_224.nosuch": "timm has no weights of vit_tiny",
    "pretrain --init-sha256 0": "init_from is None; expected weights that have the init_sha256 given",
    "pretrain --epochs 6 --warmup-epochs 1 --heads-only-epochs 6": "less than epochs, which is 6",
    "pretrain --backbone-lr-scale 0": "backbone_lr_scale is 0.0; expected a number above 0",
    "plan --data nosuch": "there is no folder",
    "export nosuch": "cannot read the config file",
    "export nosuch --step x": "--step",
    "report nosuch": "is no run folder",
    "eval": "a protocol is missing. Known: knn, linear, finetune, robustness, pictures, embed; ",
    "eval nosuch": "unknown protocol",
    "eval linear nosuch --data IMAGES": "there is no folder nosuch; expected that of a run or of an export",
    "eval robustness nosuch --imagenet-a IMAGES": "there is no folder nosuch",
    "eval linear IMAGES --data IMAGES": "holds no exported backbone",
    "eval knn timm:nosuch --data IMAGES": "nosuch",
    "verify nosuch": "there is no folder",
    "presets nosuch": "unknown preset",
    "nosuch": "unknown subcommand",
}
"""Commands that cannot be carried out, and what each says."""


@pytest.mark.parametrize(("command", "message"), NONSENSE.items())
def test_nonsense_exits_with_two_and_says_what_is_wrong(
    command: str, message: str, image_folder: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = command.replace("IMAGES", str(image_folder)).split()
    try:
        code = main(words)
    except SystemExit as left:  # tyro's own way out
        code = left.code
    said = capsys.readouterr()
    assert code == 2
    assert message in " ".join((said.err + said.out).replace("\u2502", " ").split())
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_an_export_that_cannot_be_written_is_no_traceback(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", str(image_folder), *TINY, "--max-steps", "1", "--knn-max-images", "0", "--output", "run"]
    assert main(words) == 0
    assert main(["export", "run", "--output", "/proc/none"]) == 2
    assert "the export cannot be written to /proc/none" in capsys.readouterr().err


def test_verify_counts_and_finds_damage(image_folder: Path, tmp_path: Path, capsys):
    assert main(["verify", str(image_folder)]) == 0
    printed = capsys.readouterr().out
    assert "36 images, 3 classes" in printed
    assert printed.count("      12  ") == 3
    folder = make_folder(tmp_path / "damaged", 3)
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-200])
    assert main(["verify", str(folder)]) == 2
    assert "1.jpg" in capsys.readouterr().err


def program(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m sdmp_train WORDS...`, run in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "sdmp_train", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


WITHOUT_TORCH = """
import shlex, sys
from sdmp_train.cli import main
SLOW = "torch", "torchvision", "timm", "triton", "sdmp_kernels", "numpy", "PIL", "matplotlib"
for line in sys.stdin:
    try:
        code = main(shlex.split(line))
    except SystemExit as left:
        code = left.code
    print("code", code, *sorted(sys.modules.keys() & set(SLOW)))
"""
READ_WITHOUT_TORCH = {
    "--help": 0,
    "--version": 0,
    "presets": 0,
    "presets table1/dino-vit_s-sdmp": 0,
    "eval --help": 0,
    "pretrain --help": 0,
    "pretrain --presett x": 2,
    "pretrain --preset quikstart": 2,
    "pretrain --lr -1": 2,
    "pretrain --method dino --moco-dim 4": 2,
    "plan --config missing.yaml": 2,
    "pretrain --resume missing": 2,
    "pretrain": 2,
    "plan --preset cifar10-r18": 2,
    "export --runn x": 2,
    "verify": 2,
    "report": 2,
    "eval linaer": 2,
    "eval finetune --epochs many": 2,
    "eval robustness": 2,
    **{f"eval {name} --helf": 2 for name in PROTOCOLS},
}


def test_arguments_are_read_and_refused_before_torch_is_imported():
    """Torch alone takes seconds to import."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=advice.SOURCES,
        input="\n".join(READ_WITHOUT_TORCH),
        capture_output=True,
        text=True,
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == [f"code {code}" for code in READ_WITHOUT_TORCH.values()], done.stderr


def test_as_a_program_it_exits_with_the_code_and_a_plain_message(tmp_path: Path):
    done = program(tmp_path, "pretrain", "--data", "missing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no folder")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_is_named_with_its_extra(tmp_path: Path, monkeypatch):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')")
    done = program(tmp_path, "presets")
    assert done.returncode == 2
    monkeypatch.chdir(tmp_path)
    assert (
        done.stderr
        == f"error: tyro is not installed, which sdmp_train needs: {install('train')}{advice.own_environment('sdmp_train')}\n"
    )


def test_an_error_that_names_a_command_says_which_python_it_means(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")  # so that a shell takes `python` for none
    assert main(["pretrain", "--preset", "zz"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == advice.elsewhere() != []
    assert main(["verify"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_reaches_the_terminal_without_control_characters(capsys):
    assert main(["pretrain", "--config", "no\x1b[2J.yaml"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("place", [["student"], "nowhere.backbone", 7])
def test_a_checkpoint_that_misplaces_its_backbone_is_refused(place: object, tmp_path: Path, capsys):
    (tmp_path / "config.yaml").write_text("{}")
    save_checkpoint(tmp_path / "checkpoints", 1, {"student": {"w": torch.zeros(1)}}, {"backbone": place})
    assert main(["export", str(tmp_path)]) == 2
    assert "does not say where its backbone is" in capsys.readouterr().err


def test_every_limit_on_files_has_the_flag_that_the_advice_names(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "images", 8)
    Image.new("RGB", (300, 300)).save(folder / "large.png")
    cut = folder / "cut.jpg"
    Image.effect_noise((64, 64), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:-400])
    words = ["plan", str(folder), *TINY]
    assert main([*words, "--max-pixels", "80000"]) == 2
    advice = capsys.readouterr().err
    assert "on_bad" not in advice
    assert "(--max-pixels)" in advice
    assert "--bad-images skip" in advice
    assert main(words) == 0  # its header is whole
    assert main([*words, "--check", "decode"]) == 2
    capsys.readouterr()
    assert main([*words, "--bad-images", "skip"]) == 4
    assert "--max-bad-frac" in capsys.readouterr().err
    assert main([*words, "--bad-images", "skip", "--max-bad-frac", "0.2"]) == 0
    with pytest.raises(SystemExit) as refused:
        main([*words, "--max-bad-frac", "1.5"])
    assert refused.value.code == 2
    assert main(["verify", "--data", str(folder), "--max-pixels", "80000"]) == 2
    assert "large.png" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["folder", "list"])
def test_pillow_opens_what_max_pixels_allows(source: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "images", 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    Image.new("RGB", (300, 300)).save(folder / "large.png")
    names = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in names))
    given = folder if source == "folder" else tmp_path / "list.txt"
    assert main(["plan", str(given), *TINY, "--max-pixels", "90000"]) == 0


def test_folders_are_given_with_or_without_their_flag(capsys):
    for command, flag in (("export", "--run"), ("verify", "--data")):
        assert main([command]) == 2
        assert f"give {flag}" in capsys.readouterr().err
        assert main([command, "one", flag, "two"]) == 2
        assert "give one of them" in capsys.readouterr().err


def test_version_and_the_help_of_eval(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sdmp-kernels 0.")
    assert main(["eval", "--help"]) == 0
    assert "--help lists" in capsys.readouterr().out
    for name, shown in (("knn", True), ("robustness", False)):  # which refuses --data and --test-data
        with pytest.raises(SystemExit):
            main(["eval", name, "--help"])
        printed = capsys.readouterr().out
        assert ("--data STR" in printed, "--test-data STR" in printed) == (shown, shown), name


def test_the_lines_that_a_run_prints_work_when_pasted(image_folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdmp_train.run.EMBEDDED", str(image_folder))  # after which own images are proposed
    assert main(["pretrain", str(image_folder), *TINY, "--max-steps", "1", "--output", "my run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    done = next(line for line in lines if line.startswith("done"))
    assert "final loss " in done
    assert "1 step; this took " in done
    monkeypatch.chdir("/")
    at = next(i for i, line in enumerate(lines) if line.startswith("load "))
    names: dict = {}
    exec("\n".join(line[9:] for line in lines[at : at + 2]), names)
    assert names["backbone"].num_features == 32
    command = shlex.split(next(line for line in lines if line.startswith("measure"))[9:])
    assert command[:3] == ["python", "-m", "sdmp_train"]
    assert main([*command[3:], "--device", "cpu", "-j", "0", "--k", "1"]) == 0
    own = shlex.split(next(line for line in lines if line.startswith("yours"))[9:])
    assert parse_pretrain("pretrain", own[4:]).config.data.data == "YOUR_IMAGES"
    card = (tmp_path / "my run" / "exported" / "README.md").read_text()
    assert "| kNN (k = 20), trained backbone | " in card

"""The house rules that a machine can hold: what imports and names what, where tests lie, what docstrings say."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import sdmp_kernels
from sdmp_train.config import METHODS
from sdmp_train.evaluate.command import PROTOCOLS

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "sdmp_train"

# Rooms that may know a method: the methods themselves, evaluations, recipes, and the one registry.
MAY_NAME_METHODS = ("methods/", "evaluate/", "presets.py", "config.py")
PROTOCOL = "methods.method"

# Recipes of views are named after the papers that gave them, whatever method uses them.
VIEW_RECIPES = {"byol_views", "dino_views"}

# Files of tests that are about no single module, and what they are about.
SUITES = {
    "test_docs.py": "README.md and docs",
    "test_golden_training.py": "whole trainings, bit for bit",
    "test_layout.py": "this file",
    "test_native_build.py": "setup.py and csrc",
    "bench/test_absent.py": "what a machine lacks, in every benchmark",
    "bench/test_model.py": "the bytes and operations that cases.py and the benchmarks share",
    "bench/test_questions.py": "every benchmark, run once on tiny inputs",
    "ops/test_every_op.py": "every op's cases",
    "ops/test_layout_of_ops.py": "what is in an op's folder",
    "ops/test_loss_native.py": "csrc: the losses",
    "ops/test_mix_native.py": "csrc/mix",
    "ops/test_mix_triton.py": "sdmp_kernels/ops/mix/triton.py",
    "timm/test_train_script.py": "the training script of timm's repository, where it is given",
    "train/test_convergence.py": "curves of whole trainings",
    "train/test_kill_run.py": "whole runs, killed: kill_run.py",
    "train/test_pretrain.py": "whole runs: commands.py, run.py, run_folder.py, training.py",
    "train/test_channels_in_runs.py": "images of 1 and of 12 channels, in whole runs",
    "train/test_rectangles.py": "views that are no squares, in whole runs",
    "train/methods/test_dino_on_photographs.py": "dino.py trained on photographs",
    "train/methods/test_dino_settings.py": "every setting and flag of dino.py",
    "train/data/test_fault_corpus.py": "fault_corpus.py, in every loader",
    "train/data/test_loaders.py": "dali.py and torchvision.py side by side",
}


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def room(path: Path) -> str:
    return path.relative_to(TRAINER).as_posix()


def outside() -> list[Path]:
    """The trainer's files that must not know any method."""
    return [path for path in modules(TRAINER) if not room(path).startswith(MAY_NAME_METHODS)]


def imports(path: Path) -> list[str]:
    """What a file of the trainer imports from it, as dotted names below `sdmp_train`."""
    found = []
    package = path.relative_to(TRAINER).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *((node.module or "").removeprefix("sdmp_train").strip(".").split("."))]).strip(
                "."
            )
            if node.level or (node.module or "").startswith("sdmp_train"):
                found += [module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [a.name.removeprefix("sdmp_train.") for a in node.names if a.name.startswith("sdmp_train.")]
    return found


def method_words() -> set[str]:
    """Words that stand for a method in identifiers: its name and its class, with which its settings' name begins."""
    return {word.lower() for name, settings in METHODS.items() for word in (name, settings.method_class().__name__)}


def texts(tree: ast.AST) -> list[str]:
    """Every text of a file that is no docstring."""
    docs = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in found if node not in docs]


def identifiers(tree: ast.AST) -> set[str]:
    """Every name a file gives or uses; texts are none."""
    names: set[str] = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                names.add(value)
    return names


@pytest.mark.parametrize("path", outside(), ids=room)
def test_nothing_outside_the_methods_imports_or_names_one(path: Path):
    knows = [name for name in imports(path) if name.startswith("methods") and not name.startswith(PROTOCOL)]
    assert [name for name in knows if name != "methods"] == []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {n for n in [*identifiers(tree), *texts(tree)] for w in method_words() if w in n.lower()}
    assert named - VIEW_RECIPES == set()


def test_the_search_for_method_names_finds_them():
    assert {"mocov3", "supervised"} <= method_words()
    tree = ast.parse("from .methods.mocov3 import MoCoV3 as M\ndef supervised_loss(x): return x.mocov3")
    assert {"MoCoV3", "supervised_loss", "mocov3"} <= identifiers(tree)
    assert texts(ast.parse('"""mocov3"""\nchosen = "mocov3"')) == ["mocov3"]
    assert "methods.settings.mocov3" in imports(TRAINER / "config.py")


def test_config_names_a_method_in_its_imports_and_one_line_each():
    source = (TRAINER / "config.py").read_text(encoding="utf-8")
    for name, settings in METHODS.items():
        words = f"{name}|{settings.__name__}|{settings.method_class().__name__}"
        lines = [line for line in source.splitlines() if re.search(rf"\b({words})\b", line)]
        assert lines == [
            f"from .methods.settings.{name} import {settings.__name__}",
            f'    "{name}": {settings.__name__},',
        ]


def test_settings_are_read_without_what_the_command_line_alone_needs():
    """`flags.py` stands in for tyro where it is not installed."""
    for path in modules(TRAINER):
        asks = re.search(r"^\s*(import|from) tyro", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not asks or room(path) in ("flags.py", "cli.py"), path


def test_no_evaluation_imports_the_entry_point_of_pretraining():
    """Those that train run their methods by `loop.train`; the loop knows no evaluation."""
    assert [name for name in imports(TRAINER / "loop.py") if name.startswith("evaluate")] == []
    for path in modules(TRAINER / "evaluate"):
        assert not {"commands", "run", "cli", "__main__"} & {name.split(".")[0] for name in imports(path)}, path


def test_the_command_line_knows_no_protocols_settings():
    """They are in the protocol's own file; `eval` finds it by its name."""
    protocols = set(PROTOCOLS)
    assert protocols <= {path.stem for path in modules(TRAINER / "evaluate")}
    for name in ("cli.py", "commands.py"):
        known = identifiers(ast.parse((TRAINER / name).read_text(encoding="utf-8")))
        assert [n for n in known for protocol in protocols if protocol in n.lower() and n != "knn_max_images"] == []


def test_the_loop_is_the_sentence():
    """`step` calls the stages in the order of design and docs, and no one else calls them."""
    tree = ast.parse((TRAINER / "loop.py").read_text(encoding="utf-8"))
    step = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "step")
    called = [node.func for node in ast.walk(step) if isinstance(node, ast.Call)]
    places = {f.attr: f.lineno for f in called if isinstance(f, ast.Attribute)}
    order = ["plan", "mix", "encode", "loss"]
    assert sorted(order, key=places.__getitem__) == order
    for path in [*outside(), *modules(ROOT / "bench")]:
        stages = re.findall(r"\bmethod\.(encode|loss|mix)\(", path.read_text(encoding="utf-8"))
        assert bool(stages) == (path == TRAINER / "loop.py"), path


def test_no_list_of_ops_outside_the_registry():
    """A tuple, list, set or dict that names two or more ops as texts would have to be edited with every new op."""
    ops = {path.name for path in (ROOT / "sdmp_kernels" / "ops").iterdir() if (path / "op.py").exists()}
    assert {"mix", "info_nce"} <= ops
    for path in modules(ROOT / "sdmp_kernels"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            named = {item.value for item in items if isinstance(item, ast.Constant)} & ops
            is_public_names = path.name == "__init__.py" and path.parent == ROOT / "sdmp_kernels"
            assert len(named) < 2 or is_public_names, (path, named)


def mirrored() -> dict[str, Path]:
    """Where the tests of each module belong, by their path below `tests`.

    sdmp_kernels/plan.py -> test_plan.py; sdmp_kernels/ops/mix/ -> ops/test_mix.py; sdmp_train/data/index.py ->
    train/data/test_index.py; bench/table.py -> bench/test_table.py. `__main__` is `main`; a leading underscore goes.
    """
    places = {}
    for package, below in (("sdmp_kernels", ""), ("sdmp_train", "train/"), ("bench", "bench/")):
        for path in modules(ROOT / package):
            parts = path.relative_to(ROOT / package).parts
            if parts[0] == "ops" and len(parts) > 2:
                places[f"ops/test_{parts[1]}.py"] = path.parent
            elif path.name != "__init__.py":
                folder = "".join(f"{part}/" for part in parts[:-1])
                places[f"{below}{folder}test_{path.stem.strip('_')}.py"] = path
    return places


def test_a_file_of_tests_is_named_after_what_it_tests():
    """Name for name, or a suite that says what it is about."""
    found = {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert found - set(mirrored()) - set(SUITES) == set()
    assert set(SUITES) - found == set(), "suites that are gone"
    assert set(SUITES) & set(mirrored()) == set(), "suites that are named after a module anyway"


@pytest.mark.parametrize("name", sdmp_kernels.__all__)
def test_public_functions_say_what_they_take_give_and_raise(name: str):
    """Args, Returns and Raises, each where there is something to say."""
    function = getattr(sdmp_kernels, name)
    if not inspect.isfunction(function):
        assert inspect.getdoc(function), name
        return
    doc = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    sections = ["Args"] if signature.parameters else []
    if signature.return_annotation not in (None, "None"):
        sections.append("Returns")
    assert [section for section in sections if f"{section}:" not in doc] == []


def test_contributing_claims():
    """What CONTRIBUTING says of folders and files is so."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for op in (ROOT / "sdmp_kernels" / "ops").iterdir():
        if (op / "op.py").exists():
            rows = re.findall(r"^\| `(\w+\.py)` \| (.+) \|$", text, re.MULTILINE)
            assert len(rows) >= 6
            missing = [name for name, holds in rows if not (op / name).exists() and "where " not in holds]
            assert missing == [], op
    for folder in ("sdmp_kernels", "sdmp_train", "bench"):
        assert not list((ROOT / folder).rglob("utils.py"))
        for path in modules(ROOT / folder):
            source = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(import|from) pickle|@triton\.autotune|tl\.atomic_", source, re.MULTILINE), path
    for decision in (ROOT / "docs" / "decisions").glob("*.md"):
        assert re.match(r"# \d{4}: ", decision.read_text(encoding="utf-8")), decision
    for mentioned in re.findall(r"`((?:sdmp_kernels|sdmp_train|tests|docs|bench)/[\w/.]+)`", text):
        assert (ROOT / mentioned).exists(), mentioned

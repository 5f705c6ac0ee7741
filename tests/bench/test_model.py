"""One model of bytes and operations per op, in its `cases.py`: counted from real calls, and read by everything here."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
from ops import matrix

import bench
from bench import augment, distillation, goals, info_nce, mix, soft_cross_entropy
from sdmp_kernels import ViewRecipe, _backends, use_backend

CPU = torch.device("cpu")
BENCH = sorted(Path(bench.__file__).parent.glob("*.py"))
REFERENCES = [t for t in matrix.trials() if t.backend == "reference" and t.device == "cpu"]


def counted(trial, gradients):
    """The bytes of every large tensor that a real call has to read or write, each once."""
    inputs = trial.inputs()
    leaves = trial.leaves(inputs) if gradients else []
    for leaf in leaves:
        leaf.requires_grad_()
    with use_backend("reference", trial.op):
        results = matrix.flat(trial.cases.call(**inputs))
    # One number per row, or per column, is not counted.
    large = [t for t in results if t.ndim >= 2]
    sources = getattr(trial.cases, "source_bytes", None)  # where an op reads parts of its tensors
    moved = [] if sources else [t for name in trial.case.cast for t in matrix.flat(inputs[name]) if t.ndim]
    moved += large
    if leaves:
        given = [t for t in results if t.requires_grad]
        found = torch.autograd.grad(given, leaves, [torch.ones_like(t) for t in given])
        moved += [*(t for t in found if t.ndim), *large]
    read = sources(**inputs) if sources else 0
    return read + sum(t.numel() * t.element_size() for t in moved), inputs


@pytest.mark.parametrize("trial", REFERENCES, ids=str)
def test_the_floor_is_every_source_and_result_of_a_real_call_once(trial):
    moved, inputs = counted(trial, gradients=False)
    assert trial.cases.floor_bytes(**inputs) == moved
    assert trial.cases.kernel_bytes(**inputs) >= moved
    if trial.case.grads:
        moved, inputs = counted(trial, gradients=True)
        assert trial.cases.floor_bytes(**inputs) == moved
        assert trial.cases.kernel_bytes(**inputs) >= moved


def test_operations_of_the_products_follow_what_is_wanted():
    n, d = 8, 16
    product = 2 * n * n * d
    plain = info_nce.model(n=n, width=d, dtype=torch.float32)
    assert plain.flops == 2 * product
    assert info_nce.model(n=n, width=d, dtype=torch.float32, terms=2).flops == 4 * product
    assert info_nce.model(n=n, width=d, dtype=torch.float32, key_grad=True).flops == 4 * product


@pytest.mark.parametrize("path", [path for path in BENCH if path.stem != "predict"], ids=lambda path: path.stem)
def test_no_benchmark_counts_bytes_by_itself(path):
    """Sizes of elements are read nowhere: what must move is asked of the op. predict.py counts whole steps."""
    names = [node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert {"itemsize", "element_size", "nbytes"} & set(names) == set()


@pytest.mark.parametrize("path", BENCH, ids=lambda path: path.stem)
def test_the_ops_are_listed_in_the_registry_alone(path):
    """A new op must not be forgotten by a list somewhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
            parts = node.keys if isinstance(node, ast.Dict) else node.elts
            found = {inner.value for part in parts for inner in _strings(part)} & set(_backends.OPS)
            assert len(found) < 2, f"{path.name}, line {node.lineno}: {sorted(found)}"


def _strings(part):
    """The string that an entry is, or begins with."""
    first = part.elts[0] if isinstance(part, ast.Tuple | ast.List) and part.elts else part
    return [first] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []


@pytest.mark.parametrize("op", _backends.OPS)
def test_every_op_has_a_benchmark_file_with_a_trial_of_large_tensors(op):
    module = importlib.import_module(f"bench.{op}")
    assert callable(module.setting)
    assert callable(module.large)


SETTINGS = {
    "augment": lambda: augment.setting("tiny", ViewRecipe(16), n=4, shape=(24, 30), device=CPU, size="tiny"),
    "mix": lambda: mix.setting(mix.Ask("mixup", torch.float32, torch.float32, n=4, px=8), CPU, "tiny"),
    "soft_cross_entropy": lambda: soft_cross_entropy.setting(
        n=4, columns=64, dtype=torch.float32, device=CPU, size="tiny"
    ),
    "info_nce": lambda: info_nce.setting(n=8, width=16, dtype=torch.float32, device=CPU, size="tiny"),
    "distillation": lambda: distillation.setting(n=4, columns=64, dtype=torch.float32, device=CPU, size="tiny"),
}


@pytest.mark.parametrize("op", SETTINGS)
def test_settings_and_their_ceilings_read_the_ops_own_model(op, monkeypatch):
    cases = importlib.import_module(f"sdmp_kernels.ops.{op}.cases")
    monkeypatch.setattr(cases, "floor_bytes", lambda *args, **options: 4096)
    monkeypatch.setattr(cases, "kernel_bytes", lambda *args, **options: 5000)
    monkeypatch.setattr(cases, "flops", lambda *args, **options: 2 * 64**3)
    setting = SETTINGS[op]()
    assert setting.model == (4096, 5000, 2 * 64**3)
    ceiling = next(arm for arm in setting.arms if arm.kind == "ceiling")
    call = ceiling.bind({})
    if ceiling.name == "copy":
        assert [result.numel() for result in call.run()] == [2048], "half is read and half is written"
    else:
        assert call.count == 1, "a product of 64 x 64 is exactly as much"


def test_the_settings_ask_about_the_call_they_time():
    """The model's arguments and the timed inputs are made apart: their large tensors must agree."""
    for op, make in SETTINGS.items():
        if op == "augment":
            continue  # its model counts crops, not tensors: test_the_floor_is_every_source_and_result_of_a_real_call_once
        setting = make()
        inputs = setting.inputs(0)
        named = {"mix": ["images"], "soft_cross_entropy": ["logits"], "info_nce": ["q", "k"]}
        sources = [t for name in named.get(op, ["student", "teacher"]) for t in matrix.flat(inputs[name])]
        results = inputs["out"] if op == "mix" else inputs["leaves"]
        assert setting.model.floor_bytes == sum(t.nbytes for t in (*sources, *results)), op


@pytest.mark.parametrize(
    ("goal", "op", "floor"), [("G6", "soft_cross_entropy", 2.147e9), ("G7", "distillation", 184.5e6)]
)
def test_goals_about_bandwidth_say_what_todays_kernels_can_reach(goal, op, floor):
    """Bytes counted once; where the kernels of today move more, the goal says how near they can come at best."""
    claim = next(c for c in goals.CLAIMS if c.goal == goal and c.reach is not None)
    if goal == "G6":
        model = soft_cross_entropy.model(n=claim.config["n"], columns=claim.config["k"], dtype=torch.bfloat16)
        expected = model.floor_bytes / model.kernel_bytes
    else:
        crops = distillation.Crops(**{name: claim.config[name] for name in "vtnk"})
        model = distillation.model(crops, torch.bfloat16)
        expected = model.kernel_bytes / model.floor_bytes
    assert model.floor_bytes == pytest.approx(floor, rel=1e-3)
    assert f"{model.floor_bytes / 1e9:.3g} GB once" in claim.words
    assert claim.reach == expected
    short = expected > claim.bound if claim.at_most else expected < claim.bound
    assert bool(claim.limit) == short

"""The tables of README and docs/results, and the plots: what exists is shown, what does not is said plainly."""

import pytest
from bench_documents import arm, document, row

from bench import goals, plots, table

GPU = {"cpu": "Test CPU", "cores": 2, "gpu": {"name": "Test GPU"}, "packages": {"torch": "2.11.0"}}


def test_without_any_results_it_says_so():
    text = table.render([])
    assert "**No GPU figure exists yet**" in text
    assert "**No CPU figure exists yet**" in text
    assert "not measured" not in text and "| goal | | asked |\n|---|---|---|\n" in text, "said once, not in every row"
    assert "| G11 | " in text


def test_a_row_shows_ours_the_ceiling_and_every_ratio_with_losing_ones_in_bold():
    text = table.render([document()])
    assert "No GPU figure exists yet" in text
    assert "No CPU figure" not in text
    line = next(line for line in text.splitlines() if line.startswith("| mixup float32, 128"))
    assert "1 ms (sdmp cpp)" in line
    assert "95 % of a copy" in line
    assert "**torch.compile 0.80**, eager lerp 3.50, timm elem 12.0" in line
    assert "Absent from this run: kornia." in text


def test_goals_stand_beside_what_was_measured():
    text = table.render([document()])
    assert "| G12 | mixup float32: share of a copy's bandwidth | >= 0.9x | 0.95x |" in text
    assert "| G12 | mixup float32: torch.compile | >= 1.5x | 0.80x (**missed**) |" in text
    assert "| G12 | mixup float32: timm elem | >= 4x | 12.0x |" in text
    assert "| G12 | cutmix float32: timm elem | >= 4x | not measured: this run has no such row |" in text


def test_an_arm_that_overwrites_its_input_is_compared_with_ours_in_place_too():
    arms = [arm("sdmp cpp", "ours", 1.0), arm("sdmp cpp, in place", "ours", 0.8), arm("timm elem", "peer", 3.6)]
    found = {o.claim.words: o.value for o in goals.outcomes(document(rows=[row(arms=arms)]), "cpu")}
    assert found["mixup float32: timm elem"] == 3.6
    assert found["mixup float32: timm elem, both in place"] == pytest.approx(4.5)


def test_a_goal_whose_peer_is_absent_says_why():
    entry = row(arms=[arm("sdmp cpp", "ours", 1.0), arm("timm elem", "peer", status="absent")])
    found = [o for o in goals.outcomes(document(rows=[entry]), "cpu") if o.claim.words == "mixup float32: timm elem"]
    assert found[0].value is None
    assert found[0].held is None
    assert "timm elem: libthing is not installed" in found[0].why


def test_a_gpu_document_is_read_against_the_gpu_goals():
    config = {"rule": "mixup", "source": "bfloat16", "n": 1024, "px": 224, "channels_last": False, "clean": False}
    ours = arm("sdmp triton", "ours", 1.0, share_of_copy={"p20": 0.9, "p50": 0.5, "p80": 1.0})
    ours |= {"launches": 1, "host_syncs": 0}
    entry = row(device="cuda", config=config, ours="sdmp triton", arms=[arm("copy", "ceiling"), ours])
    made = document(
        environment=GPU, rows=[entry], checks={"large mix": {"status": "failed", "detail": "x", "seconds": 1}}
    )
    told = {o["words"]: o for o in goals.summary(made)}
    assert told["mixup bf16, n = 1024: time over a copy's"]["value"] == 2
    assert told["mixup bf16, n = 1024: time over a copy's"]["held"] is False
    assert told["mixup: launches"]["held"] is True
    text = table.render([made])
    assert "Measured on Test GPU" in text
    assert "0 of 1 passed" in text
    assert "- large mix: failed (x)" in text


def test_settings_that_were_not_reached_are_named():
    made = document()
    made["runs"]["mix"]["skipped"] = ["mixture float32"]
    assert "Not reached in the time given, or broken off: mixture float32." in table.render([made])


def test_only_what_lies_between_the_markers_changes():
    readme = f"# Title\n\nabove\n{table.BEGIN}\nold\n{table.END}\nbelow\n"
    assert table.between_markers(readme, "new\n") == f"# Title\n\nabove\n{table.BEGIN}\nnew\n{table.END}\nbelow\n"


def test_the_small_table_has_the_best_of_each_kind():
    assert "Nothing has been measured yet" in table.small([])
    text = table.small([document()])
    line = next(line for line in text.splitlines() if line.startswith("| mixup float32, 128"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["1 ms", "95 % of a copy", "3.50 (lerp)", "**0.80**", "12.0 (timm elem)"]
    assert "**No GPU figure exists yet**" in text
    assert "Bold: faster than ours." in text
    ahead = row(arms=[arm("sdmp cpp", "ours", 1.0), arm("eager lerp", "eager", 3.5)])
    assert "Bold" not in table.small([document(rows=[ahead])])
    assert "Test GPU" in table.small([document(), document(environment=GPU)])


def test_pages_are_written_between_their_markers_and_left_alone_without(tmp_path, monkeypatch):
    readme, full = tmp_path / "README.md", tmp_path / "full.md"
    monkeypatch.setattr(table, "README", readme)
    monkeypatch.setattr(table, "FULL", full)
    monkeypatch.setattr(table, "GPU_RUN", tmp_path / "none.md")
    readme.write_text("# Title\n")
    full.write_text(f"above\n{table.BEGIN}\nFORMER\n{table.END}\nbelow\n")
    assert table.write_pages([document()]) == {"README.md": False, "full.md": True, "none.md": False}
    assert readme.read_text() == "# Title\n"
    text = full.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "FORMER" not in text
    assert "| G12 | " in text


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    written = plots.draw(document(), tmp_path)
    assert [path.name for path in written] == [
        "cpu-test-2-cores-2026-01-02-ceiling.png",
        "cpu-test-2-cores-2026-01-02-peers.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_nothing_to_show_draws_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.draw(document(rows=[]), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()

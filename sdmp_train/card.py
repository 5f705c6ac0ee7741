"""The card of an export: README.md as Hugging Face reads it, and the lines that load the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .config import Config
from .durable import write_durably
from .text import printable, shown_size

CARD = "README.md"
CARD_MARK = "<!-- Written with the export; an edited card without this line is kept. -->"


def how_to_load(config: Config, place: str) -> list[str]:
    """The lines of Python that load the export in the folder `place`."""
    if config.model.stem == "cifar":  # timm has no such stem
        return ["from sdmp_train.export import load_exported", f"backbone, _ = load_exported({place!r})"]
    return ["import timm", f"backbone = timm.create_model({'local-dir:' + place!r}, pretrained=True)"]


def model_card(config: Config, step: int, numbers: Mapping[str, str]) -> str:
    """README.md as Hugging Face reads it: what it is, of which data, by which settings, and how it is loaded.

    numbers: what was measured, by name.
    """
    data, optim = config.data, config.optim
    timm_loads = config.model.stem == "imagenet"
    classifier = (
        "`num_classes=10` beside `pretrained=True` gives a new classifier, `in_chans=1` other input channels."
        if timm_loads
        else "`backbone.reset_classifier(10)` gives a new classifier. timm alone has no such stem."
    )
    rows = {
        "data": printable(data.data or "not stated"),
        "preset": config.run.preset,
        "steps": str(step),
        "batch": str(optim.batch_size),
        "epochs": str(optim.epochs),
        "learning rate": f"{optim.lr:.3g}, {optim.opt}",
        "image side": f"{shown_size(data.image_px)} px",
        "mean, std": f"{list(data.mean)}, {list(data.std)}",
        **numbers,
    }
    lines = [
        "---",
        *(["library_name: timm"] if timm_loads else ["library_name: pytorch"]),
        "license: other",
        "license_name: not-stated",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        f"- {config.method_name}",
        "- sdmp",
        "---",
        CARD_MARK,
        "",
        f"# {config.model.arch}, {config.method_name}",
        "",
        f"A backbone without classifier, trained with `{config.method_name}` by `sdmp_train`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()),
        "",
        "## How to load",
        "",
        "From within this folder (from elsewhere, put its path in place of the dot):",
        "",
        "```python",
        *how_to_load(config, "."),
        "```",
        "",
        classifier,
        "",
        "## Licence",
        "",
        "Not stated: the maker of these weights has to name one that the terms of the training images allow.",
        "",
    ]
    return "\n".join(lines)


def write_card(config: Config, folder: Path, step: int, numbers: Mapping[str, str]) -> None:
    """The card of an export anew, with more numbers; one that somebody has edited stays."""
    if not is_edited(folder / CARD):
        write_durably(folder / CARD, model_card(config, step, numbers))


def is_edited(card: Path) -> bool:
    """Whether something other than a card that an export wrote lies there."""
    if not card.is_file():
        return card.exists() or card.is_symlink()
    with card.open(encoding="utf-8", errors="replace") as file:
        return CARD_MARK not in file.read(2**12)

"""The card of an export: README.md as Hugging Face reads it, and the lines that load the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def how_to_classify(description: Mapping[str, Any], place: str, image: str) -> tuple[list[str], list[str]]:
    """The lines of Python that load the classifier in the folder `place`, and those that name an image's class.

    description: its config.json. None of the second where Pillow opens no image of so many channels.
    """
    inside = description["num_classes"] > 0
    if inside and description["stem"] == "imagenet":
        load = ["import timm", f"model = timm.create_model({'local-dir:' + place!r}, pretrained=True).eval()"]
        settings, names = "timm.data.resolve_model_data_config(model)", "model.pretrained_cfg['label_names']"
    else:
        load = ["import timm", "from sdmp_train.evaluate.classifier import load_classifier"]
        load += [f"model, pixels, names = load_classifier({place!r})"]
        settings, names = "timm.data.resolve_data_config(pretrained_cfg=pixels)", "names"
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(description["pretrained_cfg"]["input_size"][0])
    if mode is None:
        return load, []
    return load, [
        "from PIL import Image",
        f"view = timm.data.create_transform(**{settings})",
        f"logits = model(view(Image.open({image!r}).convert({mode!r}))[None])",
        f"print({names}[int(logits.argmax())])",
    ]


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
        **({"began from": began_from(config)} if config.model.init_from else {}),
        "steps": str(step),
        "batch": str(optim.batch_size),
        "epochs": str(optim.epochs),
        "learning rate": f"{optim.lr:.3g}, {optim.opt}",
        "image side": f"{shown_size(data.image_px)} px",
        "mean, std": f"{list(data.mean)}, {list(data.std)}",
        **numbers,
    }
    return card_text(
        f"{config.model.arch}, {config.method_name}",
        f"A backbone without classifier, trained with `{config.method_name}` by `sdmp_train`.",
        rows,
        how_to_load(config, "."),
        classifier,
        library="timm" if timm_loads else "pytorch",
        task="image-feature-extraction",
        tag=config.method_name,
    )


def began_from(config: Config) -> str:
    """The trained weights that a run continued from."""
    return f"{printable(config.model.init_from)}, SHA-256 {config.model.init_sha256}"


def classifier_card(description: Mapping[str, Any], made: Mapping[str, Any], numbers: Mapping[str, str]) -> str:
    """The card of an exported classifier: its backbone, how it was trained and measured, and how it is used.

    description: its config.json. made: what that says of its making.
    """
    pixels, before = description["pretrained_cfg"], description.get("pretraining", {})
    name = description.get("timm_architecture", description["architecture"])
    load, predict = how_to_classify(description, ".", "IMAGE.jpg")
    timm_loads = load[-1].startswith("model = timm")
    rows = {
        "weights before": printable(made["from"]),
        **({"pretrained by": f"{before['preset']}, {before['steps']} steps"} if before else {}),
        "image side": f"{shown_size(tuple(pixels['input_size'][1:]))} px",
        "mean, std": f"{list(pixels['mean'])}, {list(pixels['std'])}",
        **numbers,
    }
    remark = "The classes stand in `classes.json`, in the order of the logits" + (
        "; `num_classes=10` beside `pretrained=True` gives a new classifier." if timm_loads else "."
    )
    return card_text(
        f"{name}, {made['evaluation']}",
        f"A classifier, trained with `eval {made['evaluation']}` by `sdmp_train` on a pretrained backbone.",
        rows,
        [*load, *predict],
        remark,
        library="timm" if timm_loads else "pytorch",
        task="image-classification",
        tag=made["evaluation"],
    )


def card_text(
    title: str,
    sentence: str,
    rows: Mapping[str, str],
    code: Sequence[str],
    remark: str,
    *,
    library: str,
    task: str,
    tag: str,
) -> str:
    """A card in Hugging Face's layout."""
    lines = [
        "---",
        f"library_name: {library}",
        "license: other",
        "license_name: not-stated",
        f"pipeline_tag: {task}",
        "tags:",
        f"- {tag}",
        "- sdmp",
        "---",
        CARD_MARK,
        "",
        f"# {title}",
        "",
        sentence,
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
        *code,
        "```",
        "",
        remark,
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

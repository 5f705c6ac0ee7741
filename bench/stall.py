"""Whether data keeps a step waiting: the step of a preset, fed by its loader, beside the same step from resident data.

What `pretrain --certify` measures, without a run: see `sdmp_train/certify.py` for what each number is.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from bench import environment


def run(args: argparse.Namespace) -> int:
    """Measure, print the line and what cannot be known here, and write the numbers where `--json` says."""
    from sdmp_train.certify import certify, line_of
    from sdmp_train.commands import open_loader, resolve
    from sdmp_train.data import choose_loader
    from sdmp_train.distributed import join_world
    from sdmp_train.presets import get_preset
    from sdmp_train.splits import open_images
    from sdmp_train.training import build

    config = get_preset(args.preset)
    changes = {"data": str(args.data)} if args.data is not None else {}
    data = replace(config.data, **changes, loader=args.loader, workers=args.workers)
    optim = replace(config.optim, batch_size=args.batch_size or config.optim.batch_size, epochs=10**5)
    print(f"stall of {args.preset}: {environment.line()}")
    with join_world("auto") as world:
        config = resolve(replace(config, data=data, optim=optim), world)
        index, _ = open_images(config)
        training = build(config, world, index)
        found = certify(
            training,
            index,
            lambda images, loader: open_loader(training, images, loader),
            choose_loader(config.data.loader, world.device, index.channels),
            between=lambda: None,
            blocks=args.blocks,
            steps=args.steps,
        )
    print(f"{len(index):,} images by {found['decoder']['loader']}")
    print(line_of(found))
    for what in found["unknown"]:
        print(f"unknown  {what}")
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": environment.describe(), **found}, indent=1) + "\n")
    return 0

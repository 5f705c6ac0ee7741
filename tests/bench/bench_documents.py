"""A small results document for the tests of what reads them."""

from bench.results import SCHEMA


def arm(name, kind, times_ours=None, status="ok", **more):
    entry = {"name": name, "kind": kind, "what": name, "graph": False, "status": status, **more}
    if status == "ok":
        entry["seconds"] = {"p20": 0.9e-3, "p50": 1e-3, "p80": 1.1e-3, "rounds": 5, "calls_per_round": 1}
        entry |= {"extra_peak_bytes": 1000, "memory_method": "counted", "launches": None, "host_syncs": None}
        entry["errors"] = [{"output": "mixed", "vs_float64": 1e-7, "vs_plain": 0.0, "allowed": 1e-6}]
    else:
        entry["reason"] = "libthing is not installed"
    if times_ours is not None:
        entry["times_ours"] = {"p20": times_ours * 0.9, "p50": times_ours, "p80": times_ours * 1.1}
    return entry


def row(**changes):
    config = {"rule": "mixup", "source": "float32", "result": "float32", "n": 128, "px": 224}
    entry = {
        "question": "mix",
        "op": "mix",
        "setting": "mixup float32, 128 x 3 x 224 x 224",
        "config": {**config, "channels_last": False, "clean": False},
        "device": "cpu",
        "threads": 2,
        "input_copies": 1,
        "floor_bytes": 1000,
        "kernel_bytes": 1000,
        "flops": None,
        "ours": "sdmp cpp",
        "seconds_spent": 1.0,
        "arms": [
            arm("copy", "ceiling"),
            arm("sdmp cpp", "ours", 1.0, share_of_copy={"p20": 0.9, "p50": 0.95, "p80": 1.0}),
            arm("eager lerp", "eager", 3.5),
            arm("torch.compile", "compile", 0.8),
            arm("timm elem", "peer", 12.0),
            arm("kornia", "peer", status="absent"),
        ],
    }
    return entry | changes


def document(**changes):
    run = {"command": "python -m bench mix", "started": "2026-01-02T03:04:05Z", "finished": None, "commit": None}
    packages = {"torch": "2.14.1"}
    return {
        "schema": SCHEMA,
        "machine": "cpu-test-2-cores",
        "date": "2026-01-02",
        "dry_run": False,
        "environment": {"cpu": "Test CPU", "cores": 2, "gpu": None, "packages": packages},
        "runs": {"mix": {**run, "dirty": None, "threads": 2, "allocator": "fixed", "skipped": []}},
        "rows": [row()],
        "checks": {},
        "ceilings": {},
    } | changes

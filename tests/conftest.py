"""Shared set-up: Triton's interpreter where there is no GPU, and the count of cases per backend."""

import os

import pytest
import torch
from ops import counts

if not torch.cuda.is_available():
    # Before anything imports Triton: its decorators decide at import whether kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores.
    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = (dict(counts.RAN), counts.NOT_RUN)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take in the counts of a worker that has ended."""
    ran, not_run = getattr(node, "workeroutput", {}).get("counts", ({}, {}))
    counts.RAN.update(ran)
    counts.NOT_RUN.update(not_run)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many op cases ran on which backend, and why the others did not."""
    if counts.RAN:
        ran = ", ".join(f"{backend} {count}" for backend, count in sorted(counts.RAN.items()))
        terminalreporter.write_line(f"op cases per backend: {ran}")
    for backend, reason in sorted(counts.NOT_RUN.items()):
        terminalreporter.write_line(f"not run: {backend}: {reason}")

"""Shared set-up: Triton's interpreter where there is no GPU, and the count of cases per backend."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: its decorators decide at import whether kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many op cases ran on which backend, and why the others did not."""
    from ops import counts

    if counts.RAN:
        ran = ", ".join(f"{backend} {count}" for backend, count in sorted(counts.RAN.items()))
        terminalreporter.write_line(f"op cases per backend: {ran}")
    for backend, reason in sorted(counts.NOT_RUN.items()):
        terminalreporter.write_line(f"not run: {backend}: {reason}")

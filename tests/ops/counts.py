"""How many op cases ran on which backend, and why the others did not: for the closing lines of a run."""

from collections import Counter

RAN: Counter[str] = Counter()
NOT_RUN: dict[str, str] = {}

"""The settings of the mixing rules."""

from __future__ import annotations

from typing import Literal

from ...settings import between, near, require

Flip = Literal["local", "global"]
RULES = ("mixup", "cutmix", "resizemix")


def check_rules(rules: tuple[str, ...], alpha: float) -> None:
    """Raise `ConfigError` unless `rules` are some of `RULES`, each once, and `alpha` is one of a Beta law."""
    for rule in rules:
        require(rule in RULES, "rules", rule, f"some of {', '.join(RULES)}.{near(rule, RULES)}")
    require(len(rules) > 0, "rules", rules, "at least one rule")
    require(len(set(rules)) == len(rules), "rules", rules, "each rule once")
    between("mix_alpha", alpha, 0, 1e6, above=True)

"""Which values a setting may have: a table of rules, and what is said where one is broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# whether a value will do, what it must be in words, and what it is or what else happens
Rule = tuple[Callable[[Any], bool], str, str]
Rules = Mapping[str, Rule]


def at_least(least: int, why: str, null: str = "") -> Rule:
    """A number that is not too small; or null, where it says what that stands for."""
    return (
        lambda value: (null != "" and value is None) or value >= least,
        f"at least {least}" + (f", or null for {null}" if null else ""),
        why,
    )


def follow(rules: Rules, settings: object) -> None:
    """A ValueError for the first setting that breaks its rule."""
    for name, (good, must, otherwise) in rules.items():
        if not good(value := getattr(settings, name)):
            raise ValueError(f"{name}={value!r} must be {must}: {otherwise}")

"""Ranges of settings: what will do, what it must be, and what else would happen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# By the name of a setting: whether its value will do, what it must be, what else happens.
Rules = Mapping[str, tuple[Callable[[Any], bool], str, str]]


def follow(rules: Rules, settings: object) -> None:
    """A ValueError for the first setting that breaks its rule."""
    for name, (good, must, otherwise) in rules.items():
        if not good(value := getattr(settings, name)):
            raise ValueError(f"{name}={value!r} must be {must}: {otherwise}")


def optional(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The same rule for a setting that may be null."""
    return lambda value: value is None or good(value)


def at_least(least: float) -> Callable[[Any], bool]:
    """Whether a number is so large, or larger."""
    return lambda value: value >= least


def positive(value: float) -> bool:
    return value > 0

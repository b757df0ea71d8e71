"""Ranges of settings: what will do, what it must be, and what else would happen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from opdkit.base.errors import UserError, shown


class OutOfRange(UserError, ValueError):
    """A setting that breaks its rule, whoever made the settings."""


# By the name of a setting: whether its value will do, what it must be, what else happens.
Rules = Mapping[str, tuple[Callable[[Any], bool], str, str]]


def follow(rules: Rules, settings: object) -> None:
    """An error for the first setting that breaks its rule."""
    for name, (good, must, otherwise) in rules.items():
        if not good(value := getattr(settings, name)):
            raise OutOfRange(f"{name}={shown(value)} must be {must}: {otherwise}")


def optional(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The same rule for a setting that may be null."""
    return lambda value: value is None or good(value)


def at_least(least: float) -> Callable[[Any], bool]:
    """Whether a number is so large, or larger."""
    return lambda value: value >= least


def positive(value: float) -> bool:
    """Whether a number is positive and finite."""
    return 0 < value < math.inf


# of clients of servers
CLIENT: Rules = {
    "urls": (len, "at least one url, such as http://127.0.0.1:8000", "there is nobody to ask"),
    "concurrency": (at_least(1), "at least 1", "it is the number of requests under way at once"),
    "timeout": (positive, "positive and finite, in seconds", "no request could be answered"),
    "retries": (at_least(0), "at least 0", "it is how often a request is sent again"),
}

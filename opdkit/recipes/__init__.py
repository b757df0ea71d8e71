"""Recipes: functions that return the settings of a run, to be completed and changed on the command line."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from opdkit.address import is_address, load_address
from opdkit.config import plain
from opdkit.errors import UserError, nearest

RECIPES = {"gsm8k": "opdkit.recipes.gsm8k:gsm8k"}


def recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe by name, or of `file.py:function`, which returns a `Run` or a mapping."""
    if is_address(name):
        made = load_address(name)()
    elif name in RECIPES:
        module, _, function = RECIPES[name].partition(":")
        made = getattr(import_module(module), function)()
    else:
        raise UserError(f"unknown recipe {name!r}{nearest(name, list(RECIPES))} (one's own: file.py:function)")
    return dict(made) if isinstance(made, dict) else plain(made)

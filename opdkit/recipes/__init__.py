"""Recipes: functions that return the settings of a run, to be completed and changed on the command
line.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from opdkit.base.address import is_address, load_address, path_of
from opdkit.base.config import plain
from opdkit.base.errors import UserError, nearest, shown
from opdkit.base.own_code import CALL_SECONDS, own_code

RECIPES = {
    "gsm8k": "opdkit.recipes.gsm8k:gsm8k",
    "quickstart": "opdkit.recipes.quickstart:recipe",
    "qwen3_code": "opdkit.recipes.qwen3_code:qwen3_code",
    "qwen3_math": "opdkit.recipes.qwen3_math:qwen3_math",
}
MAKERS = {"quickstart": "opdkit.recipes.quickstart:make"}  # of models and data that are on no hub


def recipe(name: str, folder: Path | None = None) -> dict[str, Any]:
    """The settings of a recipe by name, or of `file.py:function`, which returns a `Run` or a
    mapping.

    A recipe whose models and data are made for it (see `make`) has an argument `folder`: where they
    are.
    """
    if is_address(name):
        function = load_address(name)
        if not callable(function):
            raise UserError(
                f"recipe {name!r} is {shown(function)}, not a function: a recipe is a function "
                "that returns the settings of a run"
            )
    elif name in RECIPES:
        function = _function(RECIPES[name])
    else:
        raise UserError(
            f"unknown recipe {name!r}{nearest(name, list(RECIPES))} (one's own: file.py:function)"
        )
    takes_folder = folder is not None and "folder" in inspect.signature(function).parameters
    with own_code(f"recipe {name!r} cannot be used", path_of(name), CALL_SECONDS):
        found = plain(function(folder=folder) if takes_folder else function())
    if not isinstance(found, dict):
        raise UserError(
            f"recipe {name!r} returned {shown(found)}, which describes no run: a recipe returns a "
            "Run, or a mapping of its settings such as {'student': ..., 'steps': 100}"
        )
    return found


def make(name: str, *folder: Path) -> None:
    """The models and data of a built-in recipe that are on no hub, unless they are there
    already.
    """
    if name in MAKERS:
        _function(MAKERS[name])(*folder)


def _function(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)

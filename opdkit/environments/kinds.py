"""The kinds of environments, and which one a run has: a kind with its settings, from text or
YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.base.address import is_address
from opdkit.base.config import build
from opdkit.base.errors import UserError, shown
from opdkit.base.kinds import known_kind, of_text
from opdkit.environments.calculator import CalculatorSettings
from opdkit.environments.control import ControlSettings
from opdkit.environments.own import OwnEnvironment
from opdkit.environments.python import PythonSettings
from opdkit.environments.scienceworld import ScienceWorldSettings
from opdkit.environments.settings import EnvironmentSettings
from opdkit.environments.textworld import TextWorldSettings
from opdkit.environments.verifiers import VerifiersSettings

KINDS: dict[str, type[EnvironmentSettings]] = {
    kind.kind: kind
    for kind in (
        OwnEnvironment,
        CalculatorSettings,
        PythonSettings,
        TextWorldSettings,
        ScienceWorldSettings,
        ControlSettings,
        VerifiersSettings,
    )
}


def environment_of(value: Any, where: str = "environment") -> EnvironmentSettings:
    """An environment from what a run says: a kind's name, kind:text, file.py:Class, or a group with
    `kind`.
    """
    if isinstance(value, EnvironmentSettings):
        return value
    what, own = "environment", ", or a class of your own by file.py:Class"
    if isinstance(value, Mapping):
        settings = {k: v for k, v in value.items() if k != "kind"}
        kind = value.get("kind", OwnEnvironment.kind)
        if is_address(str(kind)):
            settings, kind = {"name": kind, **settings}, OwnEnvironment.kind
        return build(KINDS[known_kind(kind, KINDS, where, what, own)], settings, where + ".")
    if not isinstance(value, str):
        raise UserError(
            f"{where} must be the name of a kind, file.py:Class or a group with `kind`, not "
            f"{shown(value)}"
        )
    kind, _, rest = value.partition(":")
    if kind not in KINDS and is_address(value):
        kind, rest = OwnEnvironment.kind, value
    return of_text(KINDS, known_kind(kind, KINDS, where, what, own), rest, where, value)

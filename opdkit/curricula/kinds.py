"""The kinds of curricula that a run may choose by name, and which one it has: a kind with its
settings, from text or YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.base.config import build
from opdkit.base.errors import UserError, shown
from opdkit.base.kinds import known_kind
from opdkit.curricula.base import Plain
from opdkit.curricula.depth import Depth
from opdkit.curricula.entropy_length import EntropyLength
from opdkit.curricula.every_turn import EveryTurn
from opdkit.curricula.frontier import Frontier
from opdkit.curricula.mix_policy import MixPolicy
from opdkit.curricula.mixed import Mixed
from opdkit.curricula.opponent import Opposed
from opdkit.curricula.pass_rate import PassRates
from opdkit.curricula.preference import Preference
from opdkit.curricula.prefix import TeacherPrefix
from opdkit.curricula.rehearsal import Rehearsal
from opdkit.curricula.replay import Replay

KINDS: dict[str, type[Plain]] = {
    kind.kind: kind
    for kind in (
        Plain,
        EntropyLength,
        Frontier,
        Depth,
        TeacherPrefix,
        Replay,
        Mixed,
        PassRates,
        EveryTurn,
        Rehearsal,
        MixPolicy,
        Preference,
        Opposed,
    )
}


def curriculum_of(value: Any, where: str = "curriculum") -> Plain:
    """A curriculum from what a run says: its name, or a group with `kind`."""
    if isinstance(value, Mapping):
        kind, settings = value.get("kind"), {k: v for k, v in value.items() if k != "kind"}
        if kind is None:
            raise UserError(
                f"{where} has settings and no kind: add {where}.kind, one of {', '.join(KINDS)}"
            )
    elif isinstance(value, str):
        kind, settings = value, {}
    else:
        raise UserError(
            f"{where} must be the name of a curriculum or a group with `kind`, not {shown(value)}: "
            f"{', '.join(KINDS)}"
        )
    return build(KINDS[known_kind(kind, KINDS, where, "curriculum")], settings, where + ".")

"""What a checkpoint holds beside weights, looked at before it is used: torch takes an optimiser's
state whatever its shapes, and ends in a crash of the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdkit.base import exact
from opdkit.base.config import build
from opdkit.base.errors import UserError, shown
from opdkit.objective.parts import like

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each weight that has moved


def unusable(path: Path, why: str) -> UserError:
    """The error for a file of a checkpoint that cannot be continued from."""
    return UserError(
        f"{path} cannot be continued from: {why}. It was changed, or is of another run or another "
        "version of opdkit: continue with the version that wrote it, delete that checkpoint's "
        "folder to go on from the one before, or start again with --overwrite"
    )


def read_state(path: Path, kind: type) -> Any:
    """The counters of a checkpoint as a `kind`, a dataclass."""
    try:
        made: Any = build(kind, exact.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise unusable(path, shown(str(error))) from error
    if made.step < 0 or made.updates < 0 or made.tokens < 0:
        raise unusable(path, f"it counts {made.step} steps, {made.updates} updates")
    return made


def read_queue(path: Path) -> list[dict[str, Any]]:
    """Rollouts that were asked for ahead; none where there is no such file."""
    if not path.exists():
        return []
    try:
        rows: list[dict[str, Any]] = exact.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(path, shown(str(error))) from error
    return rows


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, tensors and plain values alone."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip's, pickle's and torch's own
        raise unusable(path, f"{type(error).__name__}: {shown(str(error))}") from error


def load_optimiser(path: Path, optimiser: torch.optim.Optimizer) -> None:
    """AdamW as it was saved; its moments must have the shapes of the weights."""
    saved = read_tensors(path)
    try:
        _check_weights(saved, optimiser)
        moments = saved["state"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unusable(path, shown(str(error))) from error
    load_moments(path, optimiser, moments)


def load_moments(
    path: Path, optimiser: torch.optim.Optimizer, state: dict[int, dict[str, Any]]
) -> None:
    """AdamW's moments, of each weight by its number, from a checkpoint's file or folder. Its
    settings stay what they are.
    """
    weights = [w for group in optimiser.param_groups for w in group["params"]]
    try:
        _check_moments(state, weights)
        spread = {
            number: {name: like(weights[number], moments[name]) for name in MOMENTS}
            for number, moments in state.items()
        }
        optimiser.load_state_dict({**optimiser.state_dict(), "state": spread})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise unusable(path, shown(str(error))) from error


def _check_weights(saved: Any, optimiser: torch.optim.Optimizer) -> None:
    """A ValueError or the like where a saved optimiser is of other weights than this one."""
    count = sum(len(group["params"]) for group in optimiser.param_groups)
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    if numbers != list(range(count)):
        raise ValueError(f"it is of {len(numbers)} weights, and {count} are trained")


def _check_moments(state: Mapping[int, Mapping[str, Any]], weights: Sequence[Tensor]) -> None:
    """A ValueError or the like where moments are not those of weights [...]."""
    for number, held in state.items():
        for name in MOMENTS:
            if not isinstance(held[name], Tensor):
                raise TypeError(f"its {name} of weight {number} is no tensor")
            if name != "step" and held[name].shape != weights[number].shape:
                raise ValueError(
                    f"its {name} of weight {number} has the shape {tuple(held[name].shape)}, and "
                    f"the weight {tuple(weights[number].shape)}"
                )

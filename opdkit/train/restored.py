"""What a checkpoint holds beside weights, looked at before it is used: torch takes an optimiser's
state whatever its shapes, and ends in a crash of the process.
"""

from __future__ import annotations

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
        _check(saved, optimiser)
        weights = [w for group in optimiser.param_groups for w in group["params"]]
        for number, moments in saved["state"].items():
            for name in MOMENTS:
                moments[name] = like(weights[number], moments[name])
        optimiser.load_state_dict(saved)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unusable(path, shown(str(error))) from error


def _check(saved: Any, optimiser: torch.optim.Optimizer) -> None:
    """A ValueError or the like where the saved state is not that of these weights."""
    weights = [w for group in optimiser.param_groups for w in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    if numbers != list(range(len(weights))):
        raise ValueError(f"it is of {len(numbers)} weights, and {len(weights)} are trained")
    for number, held in saved["state"].items():
        for name in MOMENTS:
            if not isinstance(held[name], Tensor):
                raise TypeError(f"its {name} of weight {number} is no tensor")
            if name != "step" and held[name].shape != weights[number].shape:
                raise ValueError(
                    f"its {name} of weight {number} has the shape {tuple(held[name].shape)}, and "
                    f"the weight {tuple(weights[number].shape)}"
                )

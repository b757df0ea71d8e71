"""Whether a checkpoint's weights are those of the model that its configuration describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from opdkit.base.errors import UserError

# buffers of older checkpoints, which a model computes itself
COMPUTED = (".inv_freq", ".masked_bias", ".attn.bias")


def check_complete(name: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Refuses what transformers would go on without: tensors that are missing, of another shape, or
    dropped although the model has a place for them. `report`: its loading info.
    """
    kind = type(model).__name__
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the checkpoint {name!r} has no weights for {len(missing)} tensors of {kind}, for "
            f"example {missing[0]}: they would stay random and the model would write noise. Use a "
            "complete checkpoint of a causal language model"
        )
    if other := sorted(report.get("mismatched_keys") or ()):
        key, *shapes = other[0] if isinstance(other[0], tuple) else (other[0],)
        told = " against ".join(str(tuple(shape)) for shape in shapes)
        raise UserError(
            f"the checkpoint {name!r} has {len(other)} tensors of other shapes than its "
            f"config.json describes, for example {key} ({told}): one of the two files belongs to "
            "another model. Download or save both again"
        )
    if dropped := sorted(key for key in report["unexpected_keys"] if _has_place(model, key)):
        raise UserError(
            f"the checkpoint {name!r} holds {len(dropped)} tensors that {kind} would drop, for "
            f"example {dropped[0]}: without them it computes something else than the model that "
            "was trained. Its config.json is that of another model (see model_type and "
            "num_hidden_layers): restore the right one"
        )


def _has_place(model: nn.Module, key: str) -> bool:
    """Whether a tensor belongs into a part that the model has: a module of a layer, or one more of
    its layers. Towers for pictures and heads for other tasks are parts that it does not have.
    """
    if key.endswith(COMPUTED):
        return False
    names = key.split(".")
    known = dict(model.named_modules())
    depth = next(n for n in range(len(names), -1, -1) if ".".join(names[:n]) in known)
    inside = known[".".join(names[:depth])]
    if isinstance(inside, nn.ModuleList):
        # layers that predict further tokens stand behind the others
        further = getattr(getattr(model, "config", None), "num_nextn_predict_layers", None)
        return names[depth].isdigit() and not further
    return any(name.isdigit() for name in names[:depth])

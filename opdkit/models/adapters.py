"""Folders that hold adapters instead of a model (peft's, as TRL writes them): which model they
belong to, and both as one.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from opdkit.base.errors import UserError
from opdkit.models.quantize import merged

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*")


def has_adapters(model: Any) -> bool:
    """Whether a model is wrapped by peft."""
    return hasattr(model, "get_base_model")


def base_of(name: str) -> str | None:
    """The model that the adapters in a folder, or of a hub name, change; None where it is a model
    itself.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None if folder.exists() else _hub_base(name)
    if any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        return None
    config = folder / "adapter_config.json"
    return _base_in(config, name) if config.is_file() else None


@cache
def _hub_base(name: str) -> str | None:
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name)
    except (OSError, ValueError):  # no such repository: said where the model is loaded
        return None
    return None if found is None else _base_in(Path(found), name)


def _base_in(config: Path, name: str) -> str:
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{name!r} holds adapters whose adapter_config.json cannot be read ({error}): download "
            "or save them again"
        ) from error
    if not isinstance(base, str) or not base or base == name:
        raise UserError(
            f"{name!r} holds adapters, and their adapter_config.json does not say of which model "
            f"(base_model_name_or_path is {base!r}): write the model's name or folder there"
        )
    return base


def own_adapters(model: Any, checkpoint: str | None) -> Any:
    """A student that a caller hands over with adapters on it: these are what learns, from a
    checkpoint where there is one, which leaves the caller's object as it is.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "the student comes with adapters none of which is trainable: load them with "
            "PeftModel.from_pretrained(..., is_trainable=True), or hand over merge_and_unload() to "
            "train all weights"
        )
    if checkpoint is None:
        return model
    from peft import load_peft_weights, set_peft_model_state_dict

    model = copy.deepcopy(model)
    weights = load_peft_weights(checkpoint, device="cpu")
    set_peft_model_state_dict(model, weights, model.active_adapter)
    return model


def with_adapters_of(model: Any, name: str, merge: bool) -> Any:
    """A model with the adapters of a folder or hub name; with `merge` as a plain one, to which they
    have been added.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError(
            f"{name!r} holds adapters, which the package peft reads, and it is not installed: pip "
            "install 'opdkit[lora]'"
        ) from None
    wrapped = PeftModel.from_pretrained(model, name)
    if wrapped.active_peft_config.is_prompt_learning:
        raise UserError(
            f"the adapters in {name!r} are {wrapped.active_peft_config.peft_type.value}: tokens "
            "before the prompt, which cannot be added to weights. Use LoRA, or a whole checkpoint"
        )
    if not merge:
        return wrapped
    plain = merged(wrapped).requires_grad_(True)
    # what is trained further on top of it, as adapters again, belongs to this and not to its base
    plain.config._name_or_path = plain.name_or_path = name
    return plain

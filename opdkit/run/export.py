"""Plain Hugging Face weights: of a run at its end, and of any checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from opdkit.base.errors import UserError
from opdkit.models.adapters import base_of, has_adapters
from opdkit.models.load import load_advised, load_config, load_tokenizer
from opdkit.models.offload import STUDENT_ADVICE
from opdkit.models.quantize import merged
from opdkit.models.sharding import is_spread
from opdkit.run.folder import refuse_several
from opdkit.train import checkpoint as checkpoints
from opdkit.train.job import Job
from opdkit.train.shards import gathered, is_sharded, weights_in, whole_weights

ADAPTERS = "adapter_config.json"


def write_final(final: Path, job: Job) -> None:
    """The model that a run leaves, adapters merged in. Where it is spread over processes all ask at
    once; the first alone has it whole, on the CPU, and writes.
    """
    model, first = job.student.model, job.mesh.rank == 0
    weights = None
    if is_spread(model) and has_adapters(model):
        model = put_together(model, first)
    elif is_spread(model):
        weights = whole_weights(model, first)
    if first:
        plain = merged(model) if has_adapters(model) else model
        checkpoints.put(
            final, lambda part: checkpoints.write_model(part, plain, job.tokenizer, weights)
        )
    job.mesh.every(None)


def put_together(model: Any, keep: bool) -> Any:
    """A model with adapters that is spread over processes, whole on the CPU, where to `keep` it:
    one tensor after the other, on all processes at once.
    """
    tensors = gathered(dict(model.named_parameters()), keep)
    if not keep:
        return None
    base = model.get_base_model()
    (first, config), *others = model.peft_config.items()
    with torch.device("meta"):
        made = type(model)(type(base)(deepcopy(base.config)), config, adapter_name=first)
        for name, other in others:
            made.add_adapter(name, other)
    made.load_state_dict(tensors, strict=False, assign=True)
    made.get_base_model().tie_weights()
    made.base_model.set_adapter(model.active_adapters)
    return made.eval()


# ---------------------------------------------------------------------------------- of a checkpoint


def export(
    checkpoint: Path, out: Path, merge: bool = False, trust_remote_code: bool = False
) -> None:
    """What a checkpoint holds of the model, as a folder that plain from_pretrained loads: weights,
    or adapters, which `merge` adds to the model that they belong to.
    """
    refuse_several()
    _refuse(checkpoint, out)
    checkpoints.verify(checkpoint)
    if merge and not (checkpoint / ADAPTERS).is_file():
        raise UserError(
            f"{checkpoint} holds no adapters to merge, but whole weights: leave out --merge"
        )

    def write(part: Path) -> None:
        if not merge:
            _write_model(checkpoint, part, trust_remote_code)
            return
        with tempfile.TemporaryDirectory(prefix="opdkit-") as folder:
            _write_model(checkpoint, Path(folder), trust_remote_code)
            model = _merged(checkpoint, folder, trust_remote_code)
            tokenizer = load_tokenizer(str(checkpoint), trust_remote_code)
            checkpoints.write_model(part, model, tokenizer)

    try:
        checkpoints.write_folder(out, write)
    except OSError as error:
        raise UserError(f"{out} could not be written ({error}): choose another folder") from error


def _refuse(checkpoint: Path, out: Path) -> None:
    if not checkpoint.is_dir():
        there = checkpoints.checkpoints(checkpoint.parent) if checkpoint.parent.is_dir() else []
        more = f". There are {', '.join(map(str, there))}" if there else ""
        raise UserError(
            f"there is no folder {checkpoint}: name a folder checkpoint-N of a run{more}"
        )
    if not (checkpoint / checkpoints.MANIFEST).is_file():
        there = checkpoints.checkpoints(checkpoint)
        more = f". There are {', '.join(map(str, there))}" if there else ""
        raise UserError(
            f"{checkpoint} is no checkpoint of a run (it has no {checkpoints.MANIFEST}): name a "
            f"folder checkpoint-N of one{more}"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already, and would be written over: choose another folder")


def _write_model(checkpoint: Path, folder: Path, trust_remote_code: bool) -> None:
    """The model of a checkpoint, with its configuration and its tokenizer."""
    plain = [p for p in checkpoint.iterdir() if p.name not in checkpoints.TRAINERS]
    if is_sharded(checkpoint) and not any(p.suffix == ".safetensors" for p in plain):
        weights = weights_in(checkpoint)
        shell = _shell(checkpoint, next(iter(weights.values())).dtype, trust_remote_code)
        shell.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    for path in plain:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)


def _shell(checkpoint: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model of a checkpoint without numbers: what knows the names under which they are
    saved.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(str(checkpoint), trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if not (checkpoint / ADAPTERS).is_file():
            return model
        from peft import PeftConfig, get_peft_model

        return get_peft_model(model, PeftConfig.from_pretrained(str(checkpoint)))


def _merged(checkpoint: Path, adapters: str, trust_remote_code: bool) -> Any:
    """The model below the adapters in a folder, with them, as the run of the checkpoint computed
    with it.
    """
    from peft import PeftModel

    base = base_of(adapters)
    assert base is not None
    said = checkpoints.recorded(checkpoint).get("settings", {})
    below = load_advised(
        base,
        said.get("dtype", "float32"),
        "cpu",
        STUDENT_ADVICE,
        trust_remote_code=trust_remote_code,
        quantize=(said.get("lora") or {}).get("quantize"),
        head=said.get("head_dtype") is not None,
    )
    return merged(PeftModel.from_pretrained(below, adapters))

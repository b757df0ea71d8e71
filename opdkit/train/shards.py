"""What several processes save: each its own parts of the weights, of the optimiser and of copies of
the student, in files that any other number of processes reads (torch.distributed.checkpoint).
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import shown
from opdkit.models.adapters import has_adapters
from opdkit.objective.parts import is_part, whole
from opdkit.train.restored import MOMENTS, load_moments, unusable
from opdkit.train.student import Student

SHARDS = "shards"  # the folder of a checkpoint that holds them
SUFFIX = ".distcp"  # of a file of one process
DESCRIBED = ".metadata"  # beside them: the name, the shape and the places of every tensor
# what names of tensors begin with
MODEL, OPTIMISER, BESIDE = "model.", "optimiser.", "beside."
PART = "opdkit_part"  # stands, in what is saved of companions, for a tensor that is in the shards

# said of every reading without exchange, which is what is asked for
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)


def is_sharded(checkpoint: Path) -> bool:
    """Whether several processes wrote a checkpoint, each its parts."""
    return (checkpoint / SHARDS).is_dir()


def written_by(checkpoint: Path, rank: int) -> list[Path]:
    """The files of a checkpoint that a process has written: its shards; the first also all else."""
    mine = list((checkpoint / SHARDS).glob(f"__{rank}_*{SUFFIX}"))
    if rank == 0:
        mine += [p for p in checkpoint.rglob("*") if p.is_file() and p.suffix != SUFFIX]
    return mine


# ------------------------------------------------------------------------------------ what is saved


def saved_of(model: Any) -> dict[str, Tensor]:
    """The tensors [...] of a model that are saved, by name: weights, tied ones once, and buffers;
    of one with adapters what learns alone.
    """
    # not `state_dict`, for which a model takes its parts up again where it is whole meanwhile
    named: dict[str, Any] = dict(model.named_parameters())
    for path, module in model.named_modules():
        kept = set(module._buffers) - module._non_persistent_buffers_set
        named |= {f"{path}.{name}".lstrip("."): module._buffers[name] for name in sorted(kept)}
    if has_adapters(model):
        named = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}


def whole_weights(model: Any, keep: bool = True) -> dict[str, Tensor]:
    """What is saved of a model that is spread over processes, tensors [...] on the CPU, put
    together one after the other: on all processes at once, and left to those that `keep` them.
    """
    return gathered(saved_of(model), keep)


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors [...] on the CPU, put together one after the other; nothing where not to `keep`."""
    kept = {}
    for name, tensor in tensors.items():
        made = whole(tensor)
        if keep:
            kept[name] = made.cpu()
        del made
    return kept


def moments_of(student: Student) -> dict[str, Tensor]:
    """The optimiser's state, tensors [...] by what they are and the weight they belong to; nothing
    of weights that it has not moved yet.
    """
    names = {id(weight): name for name, weight in student.model.named_parameters()}
    return {
        f"{moment}.{names[id(weight)]}": values
        for weight, held in student.optimiser.state.items()
        for moment, values in held.items()
    }


def apart(value: Any, at: str, parts: dict[str, Tensor]) -> Any:
    """A nested state without the tensors of which each process holds a part: these are put into
    `parts`, and their names stand in their places.
    """
    if is_part(value):
        parts[at] = value
        return {PART: at}
    if isinstance(value, Mapping):
        return {k: apart(v, f"{at}.{number}", parts) for number, (k, v) in enumerate(value.items())}
    if isinstance(value, (list, tuple)):
        return type(value)(apart(v, f"{at}.{number}", parts) for number, v in enumerate(value))
    return value


def staged(student: Student, beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU of what this process holds of all that is saved, tensors [...] by name:
    training may go on while they are written. `beside`: parts of what stands beside the student.
    """
    held = {MODEL + name: tensor for name, tensor in saved_of(student.model).items()}
    held |= {OPTIMISER + name: tensor for name, tensor in moments_of(student).items()}
    return {n: t.detach().to("cpu", copy=True) for n, t in (held | dict(beside)).items()}


def write(checkpoint: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Writes the parts that this process holds of tensors [...]; it is called on all processes of a
    group at once. What fails on one fails on all.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        writer = dcp.FileSystemWriter(checkpoint / SHARDS)
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise OSError(f"process {rank}: {type(cause).__name__}: {cause}") from error


# ------------------------------------------------------------------------------------- what is read


def described(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors [...] of a checkpoint by name, without their numbers (on the device meta)."""
    return {
        name: torch.empty(told.size, dtype=told.properties.dtype, device="meta")
        for name, told in _description(checkpoint).state_dict_metadata.items()
    }


def fill(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads a checkpoint's numbers into tensors [...] of its names: of those that are spread, the
    parts that this process holds.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    told = _description(checkpoint)

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return told

    wanted = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        dcp.load(wanted, storage_reader=Reader(checkpoint / SHARDS), no_dist=True)
    except CheckpointException as error:
        _, (cause, _) = min(error.failures.items())
        raise unusable(checkpoint / SHARDS, shown(f"{type(cause).__name__}: {cause}")) from error


def weights_in(checkpoint: Path) -> dict[str, Tensor]:
    """The model's tensors [...] in a checkpoint, whole, on the CPU."""
    found = {n: t for n, t in described(checkpoint).items() if n.startswith(MODEL)}
    made = {name: torch.empty_like(tensor, device="cpu") for name, tensor in found.items()}
    fill(checkpoint, made)
    return {name.removeprefix(MODEL): tensor for name, tensor in made.items()}


def load_student(checkpoint: Path, student: Student) -> None:
    """The student's weights and its optimiser as they were saved, by however many processes."""
    there, where = described(checkpoint), checkpoint / SHARDS
    wanted = {MODEL + name: tensor for name, tensor in saved_of(student.model).items()}
    for name in sorted(wanted.keys() ^ {n for n in there if n.startswith(MODEL)}):
        lacks = "holds no" if name in wanted else "also holds a"
        raise unusable(where, f"it {lacks} {name.removeprefix(MODEL)}, unlike this student")
    for name, tensor in wanted.items():
        if tensor.shape != there[name].shape:
            raise unusable(
                where,
                f"{name.removeprefix(MODEL)} has the shape {tuple(there[name].shape)} there, and "
                f"{tuple(tensor.shape)} in this student",
            )
    fill(checkpoint, wanted)
    load_moments(where, student.optimiser, _moments(checkpoint, there, student))


def _moments(
    checkpoint: Path, there: Mapping[str, Tensor], student: Student
) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state in a checkpoint, of each weight by its number: spread as the weight
    is.
    """
    names = {id(weight): name for name, weight in student.model.named_parameters()}
    weights = [weight for group in student.optimiser.param_groups for weight in group["params"]]
    made: dict[int, dict[str, Tensor]] = {}
    wanted = {}
    for number, weight in enumerate(weights):
        for moment in MOMENTS:
            name = f"{OPTIMISER}{moment}.{names[id(weight)]}"
            if name in there:
                same = there[name].shape == weight.shape
                empty = torch.empty_like(weight if same else there[name], device=weight.device)
                made.setdefault(number, {})[moment] = wanted[name] = empty.detach()
    fill(checkpoint, wanted)
    return made


def together(checkpoint: Path, saved: Any, now: Any) -> Any:
    """A nested state as it was saved: in the place of each name the tensor, spread as the one that
    is there `now`.
    """
    there, wanted = described(checkpoint), dict[str, Tensor]()

    def put(value: Any, present: Any) -> Any:
        if isinstance(value, Mapping) and PART in value:
            told = there[value[PART]]
            same = isinstance(present, Tensor) and present.shape == told.shape
            wanted[value[PART]] = torch.empty_like(present if same else told, device=_home(present))
            return wanted[value[PART]]
        if isinstance(value, Mapping):
            return {k: put(v, _inner(present, k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(put(v, _inner(present, number)) for number, v in enumerate(value))
        return value

    try:
        made = put(saved, now)
    except KeyError as error:
        raise unusable(checkpoint / SHARDS, f"it holds no {error}") from error
    fill(checkpoint, wanted)
    return made


def _inner(value: Any, key: Any) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return None


def _home(value: Any) -> torch.device:
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


# ------------------------------------------------------------------------------ how it is described

DCP = "torch.distributed.checkpoint."
DESCRIPTIONS = (
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
    *("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
KNOWN = {  # what they are made of, besides number types
    **dict.fromkeys(DESCRIPTIONS, DCP + "metadata"),
    "_StorageInfo": DCP + "filesystem",
    "Size": "torch",
    "_get_layout": "torch.serialization",
    "PosixPath": "pathlib",
    "WindowsPath": "pathlib",
}


class _Descriptions(pickle.Unpickler):
    """Reads what describes shards, and nothing else: a checkpoint runs no code of its own."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if KNOWN.get(name) != module:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no description does")
        return super().find_class(module, name)


def _description(checkpoint: Path) -> Any:
    path = checkpoint / SHARDS / DESCRIBED
    try:
        with path.open("rb") as file:
            return _Descriptions(file).load()
    except Exception as error:  # pickle's own are of many kinds
        raise unusable(path, f"{type(error).__name__}: {shown(str(error))}") from error

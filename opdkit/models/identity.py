"""Which checkpoint and which tokenizer something was made with: digests that tell two of them apart
without loading a weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.base.files import exists

# bytes read of each tensor: training moves every entry of the tensors it moves, so the first ones
# tell
SAMPLED = 4096
# of a tokenizer: its tokens, and how it writes chats
TOKENIZER_FILES = ("tokenizer*", "chat_template*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
# of config.json: they change when the same weights are saved again
VOLATILE = ("_name_or_path", "transformers_version")
SHORT = 16  # digits of a tokenizer's digest that tell it from others


@dataclass(frozen=True)
class Identity:
    """A model by the name it was given and, where its files are here, a digest of what it is."""

    name: str
    digest: str | None = None

    def same(self, other: Identity) -> bool:
        """Whether both are the same model: by digest where both have one, else by name."""
        if self.digest is not None and other.digest is not None:
            return self.digest == other.digest
        return self.name == other.name

    def __str__(self) -> str:
        return self.name if self.digest is None else f"{self.name} ({self.digest[:12]})"


def identify(model: str) -> Identity:
    """The identity of a checkpoint: a folder, or a hub name whose files have been downloaded.

    Files that cannot be read give none: loading them says what is wrong with them.
    """
    folder = folder_of(model)
    try:
        return Identity(model, None if folder is None else checkpoint_digest(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Identity(model)


def identify_together(members: Mapping[str, Identity], weights: Any = None) -> Identity:
    """The identity of several models that are read as one, by name, with the weights they have in
    it.
    """
    name = ", ".join(f"{key}: {member.name}" for key, member in members.items())
    name += f", weights {weights}" if weights else ""
    digests = [member.digest for member in members.values()]
    whole = hashlib.sha256(json.dumps([sorted(members), digests, weights]).encode()).hexdigest()
    return Identity(name, None if None in digests else whole)


def checkpoint_digest(folder: Path) -> str | None:
    """sha256 over the configuration and, of each tensor, its name, dtype, shape and first 4 KiB;
    None where there are no safetensors.

    How the tensors are spread over files does not matter. Reading takes milliseconds whatever the
    size of the model.
    """
    tensors = dict(
        entry for path in sorted(folder.glob("*.safetensors")) for entry in _tensors(path)
    )
    if not tensors:
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*config.json")):
        if path.name in ("config.json", "adapter_config.json"):
            settings = json.loads(path.read_text(encoding="utf-8"))
            known = {key: value for key, value in settings.items() if key not in VOLATILE}
            digest.update(json.dumps([path.name, known], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name])
    return digest.hexdigest()


def tokenizer_files_digest(model: str) -> str | None:
    """sha256 over the files of a checkpoint's tokenizer, its chat template among them; None where
    its files are not here.
    """
    folder = folder_of(model)
    if folder is None:
        return None
    files = sorted({p for pattern in TOKENIZER_FILES for p in folder.glob(pattern) if p.is_file()})
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def object_digest(model: Any) -> str:
    """sha256 over a loaded model: of each parameter its name, shape and first numbers.

    It tells two loaded models apart, and says nothing of a checkpoint's digest.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.named_parameters():
        # on a disk; an adapter, of which a checkpoint has its own
        if tensor.is_meta or ".lora_" in name:
            continue
        first = tensor.detach().flatten()[: SAMPLED // 8].cpu().double()
        digest.update(f"{name} {tuple(tensor.shape)} {first.tolist()}".encode())
    return f"object {digest.hexdigest()}"


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over every token with its id, 64 digits: the same for tokenizers that give every token
    the same id. See `has_digest` for what is stored of it.
    """
    ids = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def has_digest(tokenizer: Any, recorded: str) -> bool:
    """Whether a digest that was recorded somewhere is this tokenizer's.

    A cache's manifest holds all 64 digits, `opdkit serve-teacher` says the first `SHORT` of them:
    a digest is compared by as many digits as it has, `SHORT` at least.
    """
    return len(recorded) >= SHORT and tokenizer_digest(tokenizer).startswith(recorded)


def _tensors(path: Path) -> list[tuple[str, bytes]]:
    """Each tensor of a safetensors file with what identifies it."""
    out = []
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path} is no whole safetensors file")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            file.seek(8 + size + start)
            told = json.dumps([name, entry["dtype"], entry["shape"]]).encode()
            out.append((name, told + file.read(min(end - start, SAMPLED))))
    return out


def folder_of(model: str) -> Path | None:
    """Where the files of a model are on this machine."""
    path = Path(model).expanduser()
    if exists(path) and path.is_dir():
        return path
    from transformers.utils import cached_file

    try:
        found = cached_file(model, "config.json", local_files_only=True)
    # not downloaded, or no hub name: then its name is all that is known
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent

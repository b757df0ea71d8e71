"""Which sampler a run has: a kind with its settings, from text or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opdkit.base.config import build
from opdkit.base.errors import UserError, nearest
from opdkit.sampling.server import ServerSettings
from opdkit.sampling.vllm import VllmSettings


@dataclass(frozen=True)
class HfSettings:
    """The sampler in this process, on the student itself: nothing has to be sent anywhere."""

    # rows x longest possible row; null: half of a GPU's free memory, 2 GiB of a CPU's
    max_batch_tokens: int | None = None


Spec = HfSettings | VllmSettings | ServerSettings
KINDS: dict[str, type[Any]] = {"hf": HfSettings, "vllm": VllmSettings, "server": ServerSettings}


def sampler_of(value: Any, where: str = "sampler") -> Spec:
    """A sampler from what a run says: hf, vllm, server:URL[,URL], a URL, or {kind: ...,
    settings}.
    """
    if isinstance(value, Mapping):
        kind, settings = value.get("kind"), {k: v for k, v in value.items() if k != "kind"}
    elif isinstance(value, str):
        text = "server:" + value if value.startswith(("http://", "https://")) else value
        kind, _, rest = text.partition(":")
        settings = {"urls": rest.split(",")} if rest else {}
    else:
        raise UserError(
            f"{where} must be hf, vllm, server:URL or a group with `kind`, not {value!r}"
        )
    if kind not in KINDS:
        raise UserError(
            f"{where}: {kind!r} is no kind of sampler{nearest(str(kind), list(KINDS))}: "
            f"{', '.join(KINDS)}"
        )
    return build(KINDS[kind], settings, where + ".")

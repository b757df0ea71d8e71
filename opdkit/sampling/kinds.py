"""The kinds of samplers, and which one a run has: a kind with its settings, from text or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.base.config import build
from opdkit.base.errors import UserError
from opdkit.base.kinds import known_kind, of_text
from opdkit.sampling.hf_settings import HfSettings
from opdkit.sampling.server import ServerSettings
from opdkit.sampling.settings import SamplerSettings
from opdkit.sampling.vllm import VllmSettings

KINDS: dict[str, type[SamplerSettings]] = {
    kind.kind: kind
    for kind in (
        HfSettings,
        VllmSettings,
        ServerSettings,
    )
}


def sampler_of(value: Any, where: str = "sampler") -> SamplerSettings:
    """A sampler from what a run says: hf, vllm, server:URL[,URL], a URL, or a group with `kind`."""
    if isinstance(value, Mapping):
        kind = known_kind(value.get("kind"), KINDS, where, "sampler")
        settings = {k: v for k, v in value.items() if k != "kind"}
        return build(KINDS[kind], settings, where + ".")
    if not isinstance(value, str):
        raise UserError(
            f"{where} must be hf, vllm, server:URL or a group with `kind`, not {value!r}"
        )
    text = "server:" + value if value.startswith(("http://", "https://")) else value
    kind, _, rest = text.partition(":")
    return of_text(KINDS, known_kind(kind, KINDS, where, "sampler"), rest, where, value)

"""The kinds of samplers, and which one a run has: a kind with its settings, from text or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.base.config import build
from opdkit.base.errors import UserError, nearest
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
    rest = ""
    if isinstance(value, Mapping):
        kind, settings = value.get("kind"), {k: v for k, v in value.items() if k != "kind"}
    elif isinstance(value, str):
        text = "server:" + value if value.startswith(("http://", "https://")) else value
        kind, _, rest = text.partition(":")
        settings = {}
    else:
        raise UserError(
            f"{where} must be hf, vllm, server:URL or a group with `kind`, not {value!r}"
        )
    if kind not in KINDS:
        raise UserError(
            f"{where}: {kind!r} is no kind of sampler{nearest(str(kind), list(KINDS))}: "
            f"{', '.join(KINDS)}"
        )
    if rest:
        settings = KINDS[kind].from_text(rest)
        if not settings:
            raise UserError(
                f"{where}={value}: nothing may follow the name of this kind, as its settings have "
                f"names of their own: {{kind: {kind}, NAME: VALUE}}"
            )
    return build(KINDS[kind], settings, where + ".")

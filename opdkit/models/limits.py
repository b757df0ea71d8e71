"""How many tokens a model can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# ways of stretching positions whose factor is not in max_position_embeddings yet; of others (Llama
# 3.1's, longrope) that number is the stretched one already
STRETCHING = ("yarn", "dynamic", "linear")


def context_limit(config: Any) -> int | None:
    """Tokens that a model with this configuration reads at most; None where it says no limit.

    Where positions are stretched from fewer (YaRN in Qwen's cards), it is the stretched number.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    # Gemma 3 stretches in some layers, to a number that it states
    if str(getattr(text, "model_type", "")).startswith("gemma3"):
        return limit
    return max([limit, *_stretched(text, limit)])


def _stretched(text: Any, limit: int) -> Iterator[int]:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return
    for kind in (rope, *(inner for inner in rope.values() if isinstance(inner, Mapping))):
        factor = kind.get("factor")
        if kind.get("rope_type", kind.get("type")) in STRETCHING and isinstance(
            factor, int | float
        ):
            yield int((kind.get("original_max_position_embeddings") or limit) * factor)

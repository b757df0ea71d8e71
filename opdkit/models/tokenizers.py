"""Tokenizers: which rows of a head stand for a token, whether two agree, and which tokens end a
response.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdkit.base.errors import UserError
from opdkit.models.load import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def real_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the head that stand for a token: one more than the largest id.

    The rows behind them only pad the matrix.
    """
    return max(tokenizer.get_vocab().values()) + 1


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """None where every token has the same id in both, else what differs.

    Sizes are not compared: they also count padding.
    """
    ids_a, ids_b = a.get_vocab(), b.get_vocab()
    if ids_a == ids_b:
        return None
    differing = sorted(
        (t for t in ids_a.keys() | ids_b.keys() if ids_a.get(t) != ids_b.get(t)),
        key=lambda t: (t not in ids_a or t not in ids_b, ids_a.get(t, ids_b.get(t)), t),
    )

    token = differing[0]

    def says(ids: dict[str, int]) -> str:
        return f"has id {ids[token]}" if token in ids else "is unknown"

    return (
        f"the tokenizers {a.name_or_path!r} and {b.name_or_path!r} differ in {len(differing)} of "
        f"{len(ids_a.keys() | ids_b.keys())} tokens: {token!r} {says(ids_a)} in the first and "
        f"{says(ids_b)} in the second"
    )


def refuse_other_tokenizer(
    name: str, student: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase
) -> None:
    """The error for a model called `name` that is read over the student's token ids and has other
    ones.
    """
    if difference := same_tokenizer(student, theirs):
        raise UserError(
            f"the tokenizer of {name} is not the student's: {difference}. Token-level distillation "
            "compares distributions over the same ids: use a teacher of the student's family, or "
            "method gold or uld, which take one teacher with any tokenizer"
        )


def stop_ids(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a response: the end-of-sequence ids of the generation settings (an id, a list
    or none) and of the tokenizer.
    """
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = declared if isinstance(declared, (list, tuple, set)) else [declared]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}

"""Tokenizers: which rows of a head stand for a token, whether two agree, and which tokens end a
response.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from opdkit.base.errors import UserError
from opdkit.models.chat import turn_end
from opdkit.models.load import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def real_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the head that stand for a token: one more than the largest id.

    The rows behind them only pad the matrix.
    """
    return max(tokenizer.get_vocab().values()) + 1


def usable(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """Ids that a head of so many rows can write: all of the tokenizer's, or as many as it has rows
    where those behind it were only added (Gemma 3 1B's mark of a picture, a token for padding).
    """
    ids = tokenizer.get_vocab()
    beyond = [i for i in ids.values() if i >= rows]
    if not beyond:
        return real_vocabulary(tokenizer)
    if set(beyond) <= set(getattr(tokenizer, "added_tokens_decoder", {})):
        return rows
    raise UserError(
        f"a model's head has {rows} rows, fewer than the tokenizer's {real_vocabulary(tokenizer)} "
        "tokens: it cannot score every token the student may write. Use models of one family"
    )


def shared_ids(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> int | None:
    """How many ids, from 0 on, mean the same token in both; None where the tokenizers differ in
    more than tokens behind these, all of them added ones.
    """
    mine, theirs = a.get_vocab(), b.get_vocab()
    if mine == theirs:
        return real_vocabulary(a)
    unlike = [
        i
        for ids, other in ((mine, theirs), (theirs, mine))
        for t, i in ids.items()
        if other.get(t) != i
    ]
    shared = min(unlike)
    for tokenizer, ids in ((a, mine), (b, theirs)):
        added = getattr(tokenizer, "added_tokens_decoder", {})
        if any(i not in added for i in ids.values() if i >= shared):
            return None
    return shared


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
    ones. Added tokens that one of them lacks are said: nobody writes them in the run.
    """
    difference = same_tokenizer(student, theirs)
    if difference is None:
        return
    if (shared := shared_ids(student, theirs)) is None:
        raise UserError(
            f"the tokenizer of {name} is not the student's: {difference}. Token-level distillation "
            "compares distributions over the same ids: use a teacher of the student's family, or "
            "method gold or uld, which take one teacher with any tokenizer"
        )
    print(
        f"opdkit: {difference}. These are added tokens: the run uses the {shared} ids that both "
        "have, and what a model gives to others is left out of its distribution",
        file=sys.stderr,
    )


def answer_end(tokenizer: PreTrainedTokenizerBase, chat: bool) -> int | None:
    """The token that ends an answer: in a chat the one that the template writes after an
    assistant's turn, else the end of sequence.
    """
    end = turn_end(tokenizer) if chat else None
    return tokenizer.eos_token_id if end is None else end


def end_ids(tokenizer: PreTrainedTokenizerBase, settings: Any = None) -> frozenset[int]:
    """Every token that ends an answer: the end of sequence, what the chat template writes after an
    assistant's turn, and the end-of-sequence ids of generation settings (an id, a list or none).
    """
    declared = getattr(settings, "eos_token_id", None)
    ids = declared if isinstance(declared, (list, tuple, set)) else [declared]
    found = (*ids, tokenizer.eos_token_id, turn_end(tokenizer))
    return frozenset(int(i) for i in found if i is not None and i >= 0)


def stop_ids(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a model's answers."""
    return end_ids(tokenizer, getattr(model, "generation_config", None))


def end_with(model: CausalLM, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> list[int]:
    """Makes a model's answers end with further tokens too; returns those that are new.

    They stand in its generation settings, which are saved with it: whoever samples from the model
    later stops there as well.
    """
    known = stop_ids(model, tokenizer)
    new = sorted(set(ends) - known)
    ids = [*sorted(known), *new]
    if len(ids) > 1:
        model.generation_config.eos_token_id = ids
    return new


def same_ends(
    ends: Iterable[int], theirs: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Ends of another tokenizer as ids of this one, by their names, where it has such tokens and
    never makes them of ordinary text.
    """
    mine = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    names = theirs.convert_ids_to_tokens(sorted(ends))
    return frozenset(mine[name] for name in names if name in mine)


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokens that are left out where a text is decoded without special tokens, longest
    first.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return sorted(texts, key=len, reverse=True)

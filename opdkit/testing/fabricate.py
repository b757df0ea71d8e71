"""Rollouts made up for tests: every model, column and mark that an objective reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opdkit.objective.actions import Actions
from opdkit.objective.alignment import EOS, OUT, Alignment
from opdkit.objective.grammar import Objective
from opdkit.objective.needs import Needs, needs
from opdkit.testing.case import Case
from opdkit.types import row_keys

KEYS = row_keys(f"0/{i // 3}/{i % 3}" for i in range(6))


def fabricate(
    objective: Objective, seed: int = 0, agree: bool = False, actions: Actions | None = None
) -> Case:
    """Six rollouts of two prompts with ragged lengths, a hole in the mask, and every model and
    column the objective reads.

    With `agree` all models are the student itself; with `actions` all tokens are bins.
    """
    text = 131  # more entries than the largest k among the defaults
    rows, length, vocabulary = 6, 7, text + (0 if actions is None else actions.bins)
    g = torch.Generator().manual_seed(seed)

    def logits(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(rows, length, vocabulary, generator=g, dtype=torch.float64)

    wanted = needs(objective)
    before = logits()
    drift = 0.0 if agree else 0.2
    student, sampler = before + drift * logits(), before + drift * logits()
    models = {
        m: before if agree else logits()
        for m in sorted(wanted.models - {"student", "sampler", "live"})
    }
    columns = _columns(wanted, rows, g)
    lengths = torch.tensor([7, 4, 1, 6, 7, 3])
    mask = torch.arange(length) < lengths[:, None]
    mask[0, 2] = False  # a tool's token
    marks = {
        n.partition(":")[2]: (torch.arange(length) < 2) & (torch.arange(rows) % 3 == 0)[:, None]
        for n in wanted.columns
        if "mark:" in n
    }
    first = 0 if actions is None else actions.first(vocabulary)
    tokens = torch.randint(first, vocabulary, (rows, length), generator=g)
    alignments = {
        m: _other_tokenizer(lengths, length, vocabulary, g)
        for m in models
        if wanted.spans(m) and not agree
    }
    for m, a in alignments.items():
        assert a.same is not None
        models[m] = torch.randn(*a.tokens.shape, len(a.same), generator=g, dtype=torch.float64)
    settings = {"step": 3, "total_steps": 10, "seed": seed, "keys": KEYS}
    return Case(
        tokens,
        student,
        mask,
        models,
        before,
        sampler,
        columns,
        marks,
        settings,
        alignments,
        actions,
    )


def _columns(wanted: Needs, rows: int, g: torch.Generator) -> dict[str, Any]:
    """What is known of so many rollouts [rows] of two prompts: rewards, and numbers of the data."""
    named = sorted(name for name in wanted.columns if name.startswith(("row:", "reward:")))
    return {
        "group": [0, 0, 0, 1, 1, 1],
        "reward": [1.0, 0.0, 1.0, 0.0, 0.0, 1.0],
        **{name: torch.rand(rows, generator=g).double() for name in named},
    }


def _other_tokenizer(
    lengths: Tensor, length: int, vocabulary: int, g: torch.Generator
) -> Alignment:
    """Another tokenizer on rollouts of `lengths`, every other one with an end of sequence: longer
    and shorter tokens, other ids.
    """
    rows, others, known = len(lengths), length + 2, vocabulary - 30
    closed, column = torch.arange(rows)[:, None] % 2 == 1, torch.arange(others)
    written = column < (lengths[:, None] - closed.long())
    mine = (
        torch.randint(1, 4, (rows, others), generator=g).cumsum(1).where(written, torch.tensor(OUT))
    )
    theirs = (
        torch.randint(1, 4, (rows, others), generator=g)
        .cumsum(1)
        .minimum(total := mine.amax(1, keepdim=True))
    )
    theirs[:, 1:] = theirs[:, 1:].where(theirs[:, :-1] < total, torch.tensor(OUT))
    for ends in (mine, theirs):
        ends[closed & (column == (ends >= 0).sum(1, keepdim=True))] = EOS
    same = torch.randperm(vocabulary, generator=g)[:known].masked_fill(
        torch.arange(known) % 3 == 0, -1
    )
    return Alignment(
        torch.randint(known, (rows, others), generator=g), mine[:, :length], theirs, same
    )

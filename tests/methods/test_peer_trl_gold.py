"""ULD and GOLD against TRL's own loss on the same tensors: losses and gradients, and the one
departure by its exact amount.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from opdkit.methods.method import load
from opdkit.objective.alignment import EOS, OUT, Alignment
from opdkit.testing import evaluate

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", minversion="1.16", reason="compares with TRL 1.16")
pytestmark = pytest.mark.peer

B, V, W = 4, 23, 31
PROMPT = (3, 5)  # tokens of the prompt on both sides
G = torch.Generator().manual_seed(0)
# of the student's answers; an end of sequence follows
ENDS = [[1, 3, 4, 8, 9, 12], [2, 5], [4], [1, 2, 3]]
OTHERS = [[3, 4, 6, 12], [1, 2, 5], [2, 4], [1, 2, 3]]
T, U = (1 + max(map(len, rows)) for rows in (ENDS, OTHERS))
STUDENT = 2 * torch.randn(B, T, V, generator=G, dtype=torch.float64)
TEACHER = 2 * torch.randn(B, U, W, generator=G, dtype=torch.float64)
IDS, OTHER_IDS = torch.randint(V, (B, T), generator=G), torch.randint(W, (B, U), generator=G)
SAME = torch.randperm(V, generator=G)[:W].repeat(2)[:W].masked_fill(torch.arange(W) >= 15, -1)
ARGUMENTS = ({}, {"student_temperature": 1.5, "teacher_temperature": 0.7})


def table(rows, width):
    return torch.tensor([[*row, EOS] + [OUT] * (width - len(row) - 1) for row in rows])


ALIGNMENT = Alignment(OTHER_IDS, table(ENDS, T), table(OTHERS, U), SAME)
MASK = ALIGNMENT.student_ends != OUT


def whole(logits, ids, ends, prompt, shift):
    """TRL's input of one side: logits and ids of prompt and answer, labels, byte offsets [B, L, 2].

    Its row l predicts token l + 1. `shift` moves the rows on by one, so that what it reads at a
    token's own place is what predicts it.
    """
    before = prompt - 1 + shift
    padded = torch.cat(
        [
            torch.zeros(B, before, logits.shape[-1], dtype=logits.dtype),
            logits,
            torch.zeros(B, 1, logits.shape[-1]),
        ],
        1,
    )
    first = torch.zeros(B, prompt, dtype=torch.int64)
    labels = torch.cat([first - 100, torch.where(ends != OUT, ids, -100)], 1)
    offsets = torch.stack(
        [torch.zeros_like(ends), torch.where(ends == EOS, ends.amax(1, keepdim=True), ends)], -1
    )
    return (
        padded[:, : prompt + ids.shape[1]],
        torch.cat([first, ids], 1),
        labels,
        torch.cat([torch.zeros(B, prompt, 2).long(), offsets], 1),
    )


def theirs(
    extended=True,
    merge="bayesian",
    shift=0,
    hybrid=False,
    beta=0.5,
    weights=(None, None),
    **temperatures,
):
    """Loss and gradient of TRL with respect to the student's logits [B, T, V]."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=temperatures.get("student_temperature", 1.0),
        uld_teacher_temperature=temperatures.get("teacher_temperature", 1.0),
        uld_skip_student_eos=True,
        uld_skip_teacher_eos=True,
        use_extended_uld=extended,
        uld_token_merge_strategy=merge,
        uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=weights[0],
        uld_hybrid_unmatched_weight=weights[1],
        beta=beta,
    )
    words = [f"s{i}" for i in range(V)]
    named = {words[s] if s >= 0 else f"t{t}": t for t, s in enumerate(SAME.tolist())}
    vocabularies = [
        SimpleNamespace(get_vocab=lambda: dict(zip(words, range(V)))),
        SimpleNamespace(get_vocab=lambda: named),
    ]
    loss = ULDLoss(config, *vocabularies)
    leaf = STUDENT.clone().requires_grad_()
    a = whole(leaf, IDS, ALIGNMENT.student_ends, PROMPT[0], shift)
    b = whole(TEACHER, OTHER_IDS, ALIGNMENT.ends, PROMPT[1], shift)
    value = loss(a[0], b[0], a[2], b[2], a[1], b[1], a[3], b[3])
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def ours(name, **arguments):
    out = evaluate(
        load(name, **arguments),
        STUDENT,
        IDS,
        MASK,
        {"teacher": TEACHER},
        alignments={"teacher": ALIGNMENT},
    )
    return out.loss, out.grad


def equal(a, b):
    return abs(a[0] - b[0]) < 1e-9 and (a[1] - b[1]).norm() < 1e-7 * b[1].norm()


@pytest.mark.parametrize("temperatures", ARGUMENTS, ids=str)
def test_uld(temperatures):
    """TRL's tokens pair by position; the rows that predict them are those of its "bayesian"
    setting.
    """
    assert equal(ours("uld", **temperatures), theirs(extended=False, **temperatures))


@pytest.mark.parametrize("temperatures", ARGUMENTS, ids=str)
@pytest.mark.parametrize(
    "settings", [{}, *({"hybrid": True, "beta": b} for b in (0.0, 0.3, 1.0))], ids=str
)
def test_gold_bayesian(settings, temperatures):
    assert equal(
        ours("gold", merge="bayesian", **settings, **temperatures),
        theirs(**settings, **temperatures),
    )


@pytest.mark.parametrize("settings", [{}, {"hybrid": True, "beta": 0.5}], ids=str)
def test_gold_observed_on_rows_that_predict(settings):
    """Given rows moved on by one, TRL's "observed" reads what predicts each token, as ours does; on
    its own rows it differs.
    """
    mine = ours("gold", merge="observed", **settings)
    assert equal(mine, theirs(merge="observed", shift=1, **settings))
    assert not equal(mine, theirs(merge="observed", **settings))


def test_fixed_weights():
    mine = ours("gold", merge="bayesian", hybrid=True, matched_weight=0.4, unmatched_weight=1.3)
    assert equal(mine, theirs(hybrid=True, weights=(0.4, 1.3)))

"""SFT: the likelihood of what the data says, over all of its tokens."""

from __future__ import annotations

import pytest
import torch

from opdkit.curricula import writer_of
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
from tests.methods.dense import Dense, assert_dense
from tests.methods.ragged import on
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens


def test_over_all_tokens():
    """-log 0.5, -log 0.3, -log 0.2 of one response, -log 0.5 of another: a quarter of the sum."""
    student = torch.cat([logits(P_S, P_S, P_S)] * 2)
    ids, mask = torch.tensor([[0, 1, 2], [0, 0, 0]]), torch.arange(3) < torch.tensor([[3], [1]])
    out = evaluate(load("sft"), student, ids, mask, marks={"given": mask})
    assert close(out.loss, -numbers(0.5, 0.3, 0.2, 0.5).log().mean().item(), 12)
    push = torch.eye(3).double()[ids] - numbers(*P_S)
    assert close(out.grad, torch.where(mask[..., None], -push / 4, 0.0), 12)


def test_of_teacher_written_text_it_is_the_forward_kl_in_expectation():
    """The teacher's tokens by their probability: p_s - p_t, and the value less its entropy."""
    outs = [evaluate(load("sft"), logits(P_S), tokens(y)) for y in range(3)]
    assert close(sum(q * o.grad[0, 0] for q, o in zip(P_T, outs)), (0.3, -0.2, -0.1), 12)
    entropy = -(numbers(*P_T) * numbers(*P_T).log()).sum()
    assert close(sum(q * o.loss for q, o in zip(P_T, outs)) - entropy, 0.193794)


def test_the_data_writes_every_response_and_nobody_scores_it():
    writer = writer_of(load("sft").curriculum)
    assert writer.reads_data and not writer.draws
    assert load("sft").opened == frozenset() and load("sft").needs.facts == frozenset()


def test_there_is_no_ratio():
    """Nobody's log-probs of the data are known, and none is asked for."""
    out = on(load("sft"), [[-0.5]], before=[[-1.0]], sampler=[[-2.0]], models={"teacher": [[-3.0]]})
    assert close(out.loss, 0.5, 12)


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_naive_form(off_policy):
    def formula(d: Dense):  # []
        return -d.at(d.student)[d.mask].sum() / d.mask.sum()

    assert_dense(load("sft"), formula, off_policy)


def test_what_a_teacher_wrote_is_learnt_like_what_the_data_says():
    """-log 0.5 and -log 0.3, whoever wrote the second."""
    for mark in ("guided", "given"):
        marks = {mark: torch.tensor([[False, True]])}
        out = evaluate(load("sft"), logits(P_S, P_S), tokens(0, 1), marks=marks)
        assert close(out.loss, -numbers(0.5, 0.3).log().mean().item(), 12), mark
        assert (out.grad[0, 1] != 0).all()


def test_a_tools_tokens_are_passed_over():
    mask = torch.tensor([[False, True]])
    out = evaluate(load("sft"), logits(P_S, P_S), tokens(0, 1), marks={"tool": mask})
    assert close(out.loss, -numbers(0.5).log().item(), 12) and (out.grad[0, 1] == 0).all()


def test_check():
    check(load("sft"))

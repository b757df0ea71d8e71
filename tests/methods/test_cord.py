"""CORD: which tokens weigh how much, and the sequence part beside them."""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.cord import Falling
from opdkit.methods.method import load
from opdkit.objective import Batch, Divergence, Gap
from opdkit.testing import check, evaluate
from tests.methods.made_up import advantages, assert_dense
from tests.methods.toy import at_distance, close, with_entropy

D = (0.1, 0.9, 0.05, 0.6, 0.2)
SEQUENCE = {"reward": [1.0], "group": [0]}  # one rollout: nothing to compare


def at(distances, rewards=SEQUENCE, mask=None, **arguments):
    """One rollout whose tokens have these KL(student || teacher)."""
    student = with_entropy(1.5)
    teacher = torch.stack([at_distance(student, d) if d else student for d in distances])
    return evaluate(
        load("cord", **arguments),
        student.log().expand(1, len(distances), -1),
        torch.zeros(1, len(distances), dtype=torch.int64),
        mask,
        models={"teacher": teacher.log()[None]},
        **rewards,
    )


def test_the_weights_and_the_sum_of_the_card():
    out = at(D, k=2)
    assert close(out.terms[0].weight[0], [2, 3.5, 1.5, 2.5, 1])
    assert close(out.terms[0].value, 5.125) and close(out.loss, 5.125)
    assert close(at(D, alpha=1, beta=1).loss, 1.85)
    assert close(at(D, alpha=1).terms[0].weight[0], [2, 1.75, 1.5, 1.25, 1])
    assert close(at(D, k=2, beta=1).terms[0].weight[0], [1, 2, 1, 2, 1])


def test_without_weights_it_is_the_reverse_kl():
    out = at(D, alpha=1, beta=1)
    plain = Divergence("reverse_kl").per("row_sums")
    assert load("cord", alpha=1, beta=1).objective.terms[0] == plain
    assert Gap("reverse_kl") not in {t.weight for t in load("cord", alpha=1).objective.terms}
    one = at(D, k=0, beta=1)
    assert close(out.grad, one.grad, 12)


@pytest.mark.parametrize("length", [2, 5, 9])
def test_the_falling_weight_has_the_mean_of_its_ends(length):
    """(1 + beta) / 2, whatever the length; of one token it is beta."""
    mask = torch.arange(9)[None] < length
    batch = Batch(torch.zeros(1, 9, dtype=torch.int64), mask, dtype=torch.float64)
    weight = Falling(2.0)(batch)
    assert close(weight.sum() / length, 1.5, 12) and (weight[~mask] == 0).all()
    single = Batch(torch.zeros(1, 1, dtype=torch.int64), mask[:, :1], dtype=torch.float64)
    assert Falling(2.0)(single).tolist() == [[2.0]]


def test_positions_and_the_largest_are_among_trained_tokens():
    """A hole with the largest divergence is neither counted nor chosen; where no more tokens are
    there than k, all are.
    """
    mask = torch.tensor([[True, False, True, True, True]])
    out = at(D, k=2, mask=mask)
    assert close(out.terms[0].weight[0], [2, 0, 5 / 3, 8 / 3, 2])
    assert close(at(D, k=5).terms[0].weight[0], [4, 3.5, 3, 2.5, 2])
    assert close(at(D, k=20).terms[0].weight, at(D, k=5).terms[0].weight)


def test_of_equal_divergences_the_earlier_is_larger():
    out = at((0.3, 0.5, 0.5, 0.5, 0.3), k=2, beta=1)
    assert close(out.terms[0].weight[0], [1, 2, 2, 1, 1])


def test_in_one_context_there_is_nothing_to_learn():
    """No divergence anywhere: ties, and numbers all the same."""
    out = at((0, 0, 0, 0, 0), k=2)
    assert out.loss == 0 and (out.grad == 0).all()
    assert close(out.terms[0].weight[0], [4, 3.5, 1.5, 1.25, 1])


def sequence(rewards):
    z = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    facts = {"reward": rewards, "group": [0] * 4, "models": {"teacher": z}}
    return evaluate("cord", z, torch.zeros(4, 3, dtype=torch.int64), **facts)


def test_the_sequence_part_has_a_mean_and_no_deviation():
    out = sequence([1.0, 1.0, 0.0, 1.0])
    assert close(out.terms[1].credit[:, 0], [0.25, 0.25, -0.75, 0.25])
    equal = sequence([1.0] * 4)
    assert (equal.terms[1].credit == 0).all() and (equal.grad == 0).all()


@pytest.mark.parametrize("arguments", [{"k": 2}, {"k": 1, "alpha": 3.0, "beta": 0.5}])
def test_equal_to_a_dense_reference(arguments):
    alpha, beta, k = (arguments.get(x, 2.0) for x in ("alpha", "beta", "k"))

    def formula(of):
        def kl(model):
            return (of[model].exp() * (of[model] - of["teacher"])).sum(-1)

        weight = torch.zeros_like(of.at("before"))
        for b, row in enumerate(of.mask):
            ids = row.nonzero()[:, 0].tolist()
            known = kl("before")[b].tolist()
            largest = sorted(ids, key=lambda t: -known[t])[: int(k)]
            for n, t in enumerate(ids):
                fall = beta - (beta - 1) * n / max(len(ids) - 1, 1)
                weight[b, t] = fall * (alpha if t in largest else 1)
        ratio = (of.at("student") - of.at("sampler")).exp()
        return of.sums(weight * kl("student")) - of.sums(ratio * advantages(std=False))

    assert_dense(load("cord", **arguments), formula, reward=True)


def test_the_teacher_is_the_student_in_a_stronger_context():
    told = {"kind": "self", "weights": "live", "view": "solution"}
    assert load("cord").models == {"teacher": told}
    with pytest.raises(UserError, match="alpha=-1"):
        load("cord", alpha=-1.0)


@pytest.mark.parametrize("arguments", [{}, {"alpha": 1}, {"beta": 1, "k": 2}, {"rollout_cap": 2.0}])
def test_check(arguments):
    check(load("cord", **arguments))

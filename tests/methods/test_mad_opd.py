"""MAD-OPD and OPAD: weights of teachers by their confidence, the divergence of each, and the turns
of a trajectory.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.curricula import EveryTurn
from opdkit.methods.mad_opd import Confidence
from opdkit.methods.method import load
from opdkit.objective import Batch
from opdkit.objective.facts import ColumnFact
from opdkit.testing import Case, check, evaluate
from tests.methods.made_up import assert_dense
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens

P_2 = (0.6, 0.3, 0.1)
TWO = {"teacher_1": logits(P_T), "teacher_2": logits(P_2)}
SAID = {"confidence[0]": [90.0], "confidence[1]": [60.0]}
NAN, SILENT = math.nan, -math.inf


def weights(*said, tau=1.0):
    """[K]: of teachers that say this of themselves, in per cent."""
    facts = {
        ColumnFact(f"row:confidence[{i}]"): torch.tensor([c], dtype=torch.float64)
        for i, c in enumerate(said)
    }
    one = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch(one, one == 0, facts, dtype=torch.float64)
    return torch.cat([Confidence(i, len(said), tau)(batch)[0] for i in range(len(said))])


def one(models=TWO, said=SAID, marks=None, **arguments):
    return evaluate(
        load("mad_opd", **arguments), logits(P_S), tokens(0), models=models, rows=said, marks=marks
    )


def test_weights():
    assert close(weights(90, 60), [0.574443, 0.425557])
    assert close(weights(90, 60, tau=0.1), [0.952574, 0.047426])
    assert close(weights(90, 60, tau=1e9), [0.5, 0.5])
    for said in ((70, 70), (90, NAN), (NAN, NAN)):
        assert close(weights(*said), [0.5, 0.5], 12)


def test_a_teacher_that_failed_gives_its_weight_to_the_others():
    assert weights(SILENT, 60).tolist() == [0.0, 1.0]
    assert weights(SILENT, NAN).tolist() == [0.0, 1.0]
    assert close(weights(SILENT, 90, 60), [0.0, 0.574443, 0.425557])
    assert weights(SILENT, SILENT).tolist() == [0.5, 0.5]  # and the mark says that nobody spoke
    alone = one(said={"confidence[0]": [SILENT], "confidence[1]": [60.0]})
    second = evaluate(
        load("mad_opd", teachers=1), logits(P_S), tokens(0), models={"teacher_1": TWO["teacher_2"]}
    )
    assert close(alone.grad, second.grad, 12)


def test_where_nobody_spoke_there_is_no_loss():
    out = one(marks={"uninformed": torch.ones(1, 1, dtype=torch.bool)})
    assert out.loss == 0 and (out.grad == 0).all()


@pytest.mark.parametrize(
    ("beta", "parts", "loss", "gradient"),
    [
        (0.5, (0.050875, 0.010771), 0.033808, (0.033223, -0.029504, -0.003719)),
        (1.0, (0.223805, 0.047469), 0.148764, (0.150002, -0.132661, -0.017341)),
    ],
)
def test_the_card(beta, parts, loss, gradient):
    out = one(beta=beta)
    assert close(out.loss, loss) and close(out.grad[0, 0], gradient)
    each = [term.value / term.weight[0, 0] for term in out.terms]
    assert close(torch.stack(each), parts)


@pytest.mark.parametrize(("beta", "value"), [(0.5, 0.009626), (1.0, 0.038623)])
def test_it_is_not_the_divergence_to_the_mean_of_the_teachers(beta, value):
    w = weights(90, 60)
    mean = w[0] * numbers(*P_T) + w[1] * numbers(*P_2)
    gkd = load("gkd", beta=beta)
    out = evaluate(gkd, logits(P_S), tokens(0), models={"teacher": mean.log()[None, None]})
    assert close(out.loss, value) and not close(out.loss, one(beta=beta).loss, 3)


def test_at_beta_one_it_is_the_product_of_the_teachers():
    """sum w KL(s || t) = KL(s || g) - log Z, g the product of t^w over its sum Z."""
    w = weights(90, 60)
    log = w[0] * numbers(*P_T).log() + w[1] * numbers(*P_2).log()
    z = log.logsumexp(-1)
    g = {"teacher": (log - z)[None, None]}
    out = evaluate(load("gkd", beta=1.0), logits(P_S), tokens(0), models=g)
    assert close(out.loss, 0.053884) and close(-z, 0.094879)
    mad = one(beta=1.0)
    assert close(mad.loss, out.loss - z, 12) and close(mad.grad, out.grad, 12)


def test_equal_teachers_are_one_whatever_they_say():
    single = evaluate(load("gkd"), logits(P_S), tokens(0), models={"teacher": logits(P_T)})
    same = {"teacher_1": logits(P_T), "teacher_2": logits(P_T)}
    out = one(same)
    assert close(out.loss, single.loss, 12) and close(out.grad, single.grad, 12)
    alone = one({"teacher_1": logits(P_T)}, said=None, teachers=1, rounds=0)
    assert close(alone.grad, single.grad, 12)
    assert not load("mad_opd", teachers=1, rounds=0).annotate


def test_bounds_and_the_forward_end():
    """At beta 0.5 a token has at most log 2; at 0 the gradient is that of the mean teacher."""
    far = [logits((1 - 2e-12, 1e-12, 1e-12)), logits((1e-12, 1 - 2e-12, 1e-12))]
    out = evaluate(
        load("mad_opd"),
        logits((1e-12, 1e-12, 1 - 2e-12)),
        tokens(0),
        models={"teacher_1": far[0], "teacher_2": far[1]},
    )
    assert math.log(2) - 1e-9 < out.loss <= math.log(2) + 1e-12
    w = weights(90, 60)
    mean = w[0] * numbers(*P_T) + w[1] * numbers(*P_2)
    assert close(one(beta=0.0).grad[0, 0], numbers(*P_S) - mean, 12)


def test_missing_and_equal_confidences_have_the_same_loss():
    equal = one(said={"confidence[0]": [70.0], "confidence[1]": [70.0]})
    for said in (None, {"confidence[0]": [NAN], "confidence[1]": [60.0]}):
        assert close(one(said=said).loss, equal.loss, 12)


@pytest.mark.parametrize("made", [list, torch.tensor, np.array])
def test_the_column_is_a_list_of_each_row(made):
    """As data have it, 90 and 60 per cent; a row without it has equal weights."""
    assert close(one(said={"confidence": made([[90, 60]])}).loss, 0.033808)
    assert close(one(said={"confidence": [None]}).loss, one(said=None).loss, 12)
    said = {"confidence": [[90, 60], [], [None, 60]]}
    student, ids = torch.cat([logits(P_S)] * 3), torch.zeros(3, 1, dtype=torch.int64)
    models = {name: torch.cat([z] * 3) for name, z in TWO.items()}
    out = evaluate(load("mad_opd"), student, ids, models=models, rows=said)
    shares = out.terms[0].weight[:, 0]
    assert close(shares, [0.574443, 0.5, 0.5])


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_to_a_dense_reference(beta, k):
    said = [[90.0, 60, 10, 50, NAN, 0], [20.0, 60, 80, 50, 30, 100]]
    rows = {f"confidence[{i}]": s for i, s in enumerate(said)}

    def formula(of):
        c = torch.tensor(said).double().T / 100
        w = (c / 0.5).softmax(1)
        w[4] = 0.5
        total = 0.0
        for i, name in enumerate(("teacher_1", "teacher_2")):
            s, t = of["student"], of[name]
            if k:
                ids = t.topk(k, -1).indices
                s, t = (x.gather(-1, ids).log_softmax(-1) for x in (s, t))
            m = (beta * t.exp() + (1 - beta) * s.exp()).log()
            d = beta * (t.exp() * (t - m)) + (1 - beta) * (s.exp() * (s - m))
            d = t.exp() * (t - s) if beta == 0 else s.exp() * (s - t) if beta == 1 else d
            total = total + of.per_row(w[:, i : i + 1] * d.sum(-1))
        return total

    method = load("mad_opd", beta=beta, tau=0.5, k=k)
    assert_dense(method, formula, ("teacher_1", "teacher_2"), rows=rows)


def test_who_debates_is_for_the_run_to_say():
    made = load("mad_opd", teachers=3, rounds=1)
    names = ["teacher_1", "teacher_2", "teacher_3"]
    assert made.models == {name: {"view": "debate"} for name in names}
    assert made.annotate == {"debate": {"kind": "debate", "rounds": 1, "of": names}}
    for arguments, message in (({"tau": 0.0}, "tau=0"), ({"teachers": 0}, "teachers=0")):
        with pytest.raises(UserError, match=message):
            load("mad_opd", **arguments)


def test_turns_count_alike_or_trajectories_do():
    """One trajectory of one turn, one of three: 1/4 each, or 1/2 and 1/6."""
    z = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = torch.zeros_like(z)
    ids = torch.zeros(4, 2, dtype=torch.int64)
    question = {"question": torch.tensor([0, 1, 1, 1])}
    case = Case(ids, z, models={"teacher_1": teacher, "teacher_2": teacher}, columns=question)
    turns, whole = load("opad"), load("opad", per="trajectory")
    assert turns.objective == load("mad_opd").objective
    a, b = case.run(turns.objective), case.run(whole.objective)
    assert close(a.terms[0].weight[:, 0] / a.terms[0].denominator[:, 0] * 2, [0.25 * 0.5] * 4)
    share = [0.5, 1 / 6, 1 / 6, 1 / 6]
    assert close(b.grad, a.grad * numbers(*share)[:, None, None] * 4, 12)
    assert load("opad").curriculum == EveryTurn()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"beta": 1.0, "k": 4, "teachers": 3, "tau": 0.1}, {"beta": 0.0, "teachers": 1}],
)
@pytest.mark.parametrize("name", ["mad_opd", "opad"])
def test_check(name, arguments):
    check(load(name, **arguments))


def test_check_of_equal_trajectories():
    check(load("opad", per="trajectory"))

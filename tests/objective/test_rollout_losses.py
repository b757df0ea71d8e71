"""Losses over pairs and groups: the slope is that of the whole step, whatever its parts are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from opdkit.curricula import Plain
from opdkit.methods.method import Method, load
from opdkit.objective import (
    Batch,
    Likelihood,
    Live,
    LogpFact,
    Objective,
    RolloutLoss,
    Signal,
    TokenLoss,
)
from opdkit.objective.head import Head, flat_positions, learn
from opdkit.objective.needs import needs
from opdkit.testing import CheckFailed, check, evaluate, fabricate
from opdkit.testing.check import RULES
from tests.common.toy import naive
from tests.methods.toy import close

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = [f"{EXAMPLES}/own_pair_loss.py:pairs", f"{EXAMPLES}/own_group_loss.py:listwise"]


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_ones_own_keeps_every_rule_in_a_few_lines(name: str) -> None:
    assert check(load(name)).passed == tuple(RULES)
    assert len(Path(name.rpartition(":")[0]).read_text().splitlines()) < 40


@pytest.mark.parametrize("name", [*OWN, "grpo(loss=gspo)"])
@pytest.mark.parametrize("rows", [None, [0, 1, 2], [5, 3, 4]])
def test_any_cut_of_a_step_is_the_dense_gradient(name: str, rows: list[int] | None) -> None:
    objective = load(name).objective
    case = fabricate(objective)
    out = case.run(objective, rows=rows)
    if rows is None:
        loss, grad = naive(objective, case)
        assert abs(out.loss - loss) < 1e-12 and (out.grad - grad).norm() < 1e-9 * grad.norm()
    for parts in ([[0, 3], [1, 4], [2, 5]], [[i] for i in range(6)]):
        cut = case.run(objective, parts=parts, chunk=2, rows=rows)
        assert (cut.grad - out.grad).norm() < 1e-9 * out.grad.norm()
        assert abs(cut.loss - out.loss) < 1e-12
    assert out.grad.norm() > 0


def test_a_pair_by_hand() -> None:
    """Two one-token answers, log 0.5 and log 0.25, the first better: -log sigmoid(beta log 2), and
    d loss / d log pi = -+beta sigmoid(-beta log 2), over two rollouts.
    """
    logits = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]], dtype=torch.float64).log()
    out = evaluate(
        load(OWN[0], beta=1.0), logits, torch.zeros(2, 1).long(), reward=[1.0, 0.0], group=[0, 0]
    )
    sigmoid = 2 / 3  # 1 / (1 + 0.25 / 0.5)
    assert close(out.loss, 0.405465 / 2) and out.terms[0].denominator == 2
    slope = (1 - sigmoid) / 2
    assert close(out.grad[0, 0], (-slope * 0.5, slope * 0.5), 12)
    assert close(out.grad[1, 0], (slope * 0.75, -slope * 0.75), 12)
    apart = evaluate(
        load(OWN[0]), logits, torch.zeros(2, 1).long(), reward=[1.0, 0.0], group=[0, 1]
    )
    assert apart.loss == 0 and (apart.grad == 0).all()


@dataclass(frozen=True)
class _Nearest(RolloutLoss):
    """[R]: squared distance of a rollout's score to the mean of the step's."""

    def value(self, logp, mask, rows, batch):  # type: ignore[no-untyped-def]
        score = torch.where(mask, logp, 0.0).sum(1)
        return (score - score.mean()).square()


def test_it_sees_the_rollouts_of_its_own_optimiser_step_only() -> None:
    objective = Objective(_Nearest())
    case = fabricate(objective)
    score = torch.where(
        case.batch(objective).mask, case.batch(objective).read(LogpFact("live")), 0.0
    ).sum(1)
    for rows in ([0, 1, 2], [3, 5]):
        out = case.run(objective, rows=rows)
        part = score[rows]
        assert abs(out.loss - (part - part.mean()).square().mean()) < 1e-12


def test_a_rollout_without_weight_is_seen_and_not_taught() -> None:
    """Of two the worse has weight 0 and adds nothing, but the better is still compared with it."""

    @dataclass(frozen=True)
    class Only(Signal):
        def value(self, batch: Batch) -> torch.Tensor:
            return batch.correct[:, None]

    objective = Objective(_Nearest() * Only())
    case = fabricate(objective)
    batch = case.batch(objective)
    score = torch.where(batch.mask, batch.read(LogpFact("live")), 0.0).sum(1)
    each = (score - score.mean()).square()
    assert abs(case.run(objective).loss - each[batch.correct].sum() / 6) < 1e-12


def test_a_loss_that_is_cut_wrongly_fails_check() -> None:
    """Its slope taken of a micro-batch alone, as a loss of tokens that reads its neighbours."""

    @dataclass(frozen=True)
    class Neighbours(TokenLoss):
        def value(self, live: Live) -> torch.Tensor:
            return (live.logp - live.logp.mean()).square()

    with pytest.raises(CheckFailed, match="FAIL  micro-batches do not change it"):
        check(Objective(Neighbours()))


@dataclass(frozen=True)
class _Sum(RolloutLoss):
    """[R]: minus the log-prob of a rollout, whatever `mask` says."""

    def value(self, logp, mask, rows, batch):  # type: ignore[no-untyped-def]
        return -logp.sum(1)


def test_the_log_probs_of_what_it_is_not_about_are_zero() -> None:
    """Here those of data text, which another term asks for."""
    objective = Objective(_Sum(), Likelihood().of("data"))
    case = fabricate(objective)
    given = torch.zeros_like(case.tokens, dtype=torch.bool)
    given[:, 1::2] = True
    out = replace(case, marks={"given": given}).run(objective)
    assert case.mask is not None
    own = case.student.log_softmax(-1).gather(-1, case.tokens[..., None])[..., 0]
    expected = -torch.where(case.mask & ~given, own, 0.0).sum() / 6
    assert abs(out.terms[0].value - expected) < 1e-12


def test_a_policy_gradient_of_whole_rollouts_begins_where_the_student_does() -> None:
    """In a curriculum that brings text, as in one that brings none: a guided rollout is credited
    from its own first token on, a given one has nothing to credit.
    """

    @dataclass(frozen=True)
    class Guiding(Plain):
        authors = ("student", "guide", "data")

    gspo = load("grpo(loss=gspo)").objective
    case = fabricate(gspo)
    guided, given = (torch.zeros_like(case.tokens, dtype=torch.bool) for _ in range(2))
    guided[0, :2] = guided[3, :1] = given[4] = True
    case = replace(case, marks={"guided": guided, "given": given})
    alone = case.run(gspo)
    assert alone.terms[0].denominator == 5  # rollouts that have a token of the student's
    for objective in (
        Method(gspo, curriculum=Guiding()).objective,
        Objective(gspo.terms[0].of("student", "guide")),
    ):
        out = case.run(objective, parts=[[0, 3], [1, 4], [2, 5]])
        share = out.terms[0].denominator / 5
        assert (share * out.grad - alone.grad).norm() < 1e-12 * alone.grad.norm()
        assert (out.grad[guided | given] == 0).all() and out.grad[0].norm() > 0


def test_it_reads_the_live_student_which_costs_nothing_before_the_first_update() -> None:
    """The live log-probs are a fact like others: before the first update the sampler's are it."""
    read = needs(Objective(_Nearest()))
    assert read.facts == {LogpFact("live")} and read.authors == ("student",)


def test_the_loss_is_a_sum_over_any_parts_of_its_rollouts() -> None:
    """Also where a micro-batch ends inside a rollout: its value stands at its first token."""
    objective = load(OWN[1]).objective
    case = fabricate(objective)
    batch, whole = case.batch(objective), case.run(objective)
    plan, leaf = objective.plan(batch), case.student.flatten(0, 1).clone().requires_grad_()
    at = flat_positions(plan.selected)
    learned = [learn(plan, part, leaf[part], Head()) for part in at.split(4)]
    assert abs(sum(x.loss for x in learned) - whole.loss) < 1e-12
    (grad,) = torch.autograd.grad(sum(x.loss for x in learned), leaf)
    assert (grad - whole.grad.flatten(0, 1)).norm() < 1e-9 * whole.grad.norm()


def test_a_mean_over_rollouts_is_what_it_divides_by_where_nothing_is_said() -> None:
    assert Objective(_Nearest()).terms[0].denominator == "row_sums"
    assert str(Objective(_Nearest())) == str(Objective(_Nearest().per("row_sums"))) == "_Nearest()"
    assert str(Objective(_Nearest().per("rows"))) == "_Nearest() per rows"

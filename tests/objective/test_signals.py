"""The vocabulary of signals: each on numbers small enough to work by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from opdkit.methods.method import load
from opdkit.objective.batch import Batch
from opdkit.objective.facts import ColumnFact, LogpFact, MissingFact
from opdkit.objective.formula import Const, Signal
from opdkit.objective.losses import Likelihood
from opdkit.objective.signals import (
    Advantage,
    Ceiling,
    Correct,
    Draw,
    Early,
    Entropy,
    Exp,
    Floor,
    Gap,
    GroupMean,
    GroupShare,
    Logp,
    LogRatio,
    Mark,
    MeanOne,
    PassRate,
    Progress,
    Quantile,
    Reward,
    Row,
    RowMean,
    ToGo,
    depends_on_sample,
)
from opdkit.testing import Case, fabricate
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens

X = torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.5, -1.0]], dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [True, True, False]])
SIGNAL = Logp("x")


def batch(mask=MASK, x=X, **more) -> Batch:
    columns = {
        ColumnFact(k.replace("_of_", ":")): torch.as_tensor(v)
        for k, v in more.pop("columns", {}).items()
    }
    return Batch(
        torch.zeros(x.shape, dtype=torch.int64),
        mask,
        {LogpFact("x"): x, **columns},
        dtype=torch.float64,
        **more,
    )


def models(signal: Signal) -> torch.Tensor:
    """A signal of the card's two models at one position."""
    objective = Likelihood() * signal + Likelihood()
    return signal(Case(tokens(0), logits(P_S), None, {"teacher": logits(P_T)}).batch(objective))


# ---------------------------------------------------------------------------------- what models say


def test_log_ratio_entropy_and_gaps():
    p, q = numbers(*P_S), numbers(*P_T)
    assert close(models(LogRatio("teacher", "student")), [[math.log(0.4)]], 12) and close(
        models(Logp("teacher")), [[math.log(0.2)]]
    )
    assert close(models(Entropy("teacher")), [[-(q * q.log()).sum().item()]], 12)
    assert close(models(Gap()), [[0.223805]]) and close(models(Gap("forward_kl")), [[0.193794]])
    assert close(models(Gap("reverse_kl", "student", 2, "renormalise")), [[0.247591]])
    assert close(models(Gap("forward_kl", "teacher", 2)), [[0.377052]])
    assert close(
        models(Gap("reverse_kl", student="teacher", teacher="student")),
        [[(q * (q / p).log()).sum().item()]],
    )


def test_an_absent_model_or_column_says_how_to_supply_it():
    with pytest.raises(MissingFact, match=r"no scores of judge were.*models\.judge: MODEL"):
        LogRatio("judge", "x")(batch())
    for signal, words in (
        (Reward(), "give the run a reward"),
        (Row("level"), r"no such column; pass rows=\{column"),
        (GroupMean(RowMean(SIGNAL)), "group"),
    ):
        with pytest.raises(MissingFact, match=words):
            signal(batch())


# ------------------------------------------------------------------------ what is known of rollouts


def test_columns():
    here = batch(
        columns={
            "reward": [2.0, -1.0],
            "correct": [True, False],
            "row_of_level": [3, 5],
            "mark_of_guided": MASK,
        }
    )
    assert Reward()(here).tolist() == [[2], [-1]] and Correct()(here).tolist() == [[True], [False]]
    assert Row("level")(here).tolist() == [[3], [5]] and torch.equal(Mark("guided")(here), MASK)
    assert not Mark("other")(here).any()  # no rollout of the step has it


REWARDS, GROUPS = [1.0, 0.0, 0.5, 2.0, 2.0, 7.0], [4, 4, 4, 8, 8, 9]


def advantages(kind):
    six = torch.ones(6, 1, dtype=torch.float64)
    return Advantage(kind)(
        batch(six > 0, six, columns={"reward": numbers(*REWARDS), "group": GROUPS})
    )[:, 0]


def test_advantages():
    assert close(advantages("mean"), (0.5, -0.5, 0, 0, 0, 0), 12)
    assert close(advantages("rloo"), (1 - 0.25, 0 - 0.75, 0.5 - 0.5, 0, 0, 0), 12)
    # sample std 0.5; alone: the reward
    assert close(advantages("std"), (0.5 / 0.500001, -0.5 / 0.500001, 0, 0, 0, 7), 12)
    with pytest.raises(ValueError, match="rloo"):
        Advantage("zscore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["std", "mean", "rloo"])
def test_equal_rewards_have_no_advantage(kind, dtype):
    """Groups of 16, 32, 2 and 1 in turns. The last keeps its reward under std."""
    reward = [0.7] * 16 + [0.96] * 32 + [0.1] * 2 + [0.3]
    group, order = (
        [3] * 16 + [1] * 32 + [8] * 2 + [2],
        torch.randperm(51, generator=torch.Generator().manual_seed(4)),
    )
    columns = {
        "reward": torch.tensor(reward, dtype=dtype)[order],
        "group": torch.tensor(group)[order],
    }
    here = batch(torch.ones(51, 1, dtype=torch.bool), torch.zeros(51, 1), columns=columns)
    here.dtype = dtype
    out = Advantage(kind)(here)[:, 0]
    alone = order == 50
    assert (
        out.dtype == dtype
        and (out[~alone] == 0).all()
        and out[alone].item() == (columns["reward"][alone] if kind == "std" else 0)
    )
    # a baseline of one's own is as exact
    assert torch.equal(GroupMean(Reward())(here)[:, 0], columns["reward"])


@pytest.mark.parametrize("kind", ["std", "mean", "rloo"])
def test_an_advantage_of_another_number_than_the_reward(kind):
    six = torch.arange(6, dtype=torch.float64)[:, None]
    columns = {"reward": numbers(3, 1, 4, 1, 5, 9), "group": GROUPS}
    here = batch(six >= 0, six, columns=columns)
    there = batch(six >= 0, six, columns=columns | {"reward": columns["reward"] - 2 * six[:, 0]})
    assert torch.equal(
        Advantage(kind, Reward() - RowMean(SIGNAL) * 2)(here), Advantage(kind)(there)
    )


def test_pass_rates():
    six = torch.ones(6, 1, dtype=torch.float64)
    columns = {"correct": [True, False, False, True, True, False], "group": GROUPS}
    assert close(
        PassRate()(batch(six > 0, six, columns=columns))[:, 0], (1 / 3,) * 3 + (1, 1, 0), 12
    )
    # unknown where the prompt is new
    columns["memory_of_pass_rate"] = numbers(0.9, 0.9, 0.9, math.nan, math.nan, 0.2)
    assert close(
        PassRate()(batch(six > 0, six, columns=columns))[:, 0], (0.9,) * 3 + (1, 1, 0.2), 12
    )


# ---------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize(
    ("signal", "value"),
    [
        (Exp(SIGNAL), X.exp()),
        (Floor(SIGNAL, 0.0), [[1, 0, 4], [3, 0.5, 0]]),
        (Ceiling(SIGNAL, 1.0), [[1, -2, 1], [1, 0.5, -1]]),
        (ToGo(SIGNAL), [[5, 0, 4], [3.5, 0.5, 0]]),
        (ToGo(SIGNAL, 0.5), [[3, 0, 4], [3.25, 0.5, 0]]),  # 1 + 0.5 * 4: the hole takes no time
        (RowMean(SIGNAL), [[2.5], [1.75]]),
        (RowMean(SIGNAL, among=SIGNAL > 2), [[4], [3]]),
        (RowMean(SIGNAL, among=SIGNAL > 3), [[4], [0]]),  # of none: 0
        (MeanOne(SIGNAL), X / 2.125),
        (MeanOne(SIGNAL * 0), torch.zeros(2, 3)),
        (MeanOne(Const(7)), torch.ones(2, 3)),
        (Quantile(SIGNAL, 0.0), [[0.5]]),
        (Quantile(SIGNAL, 0.5), [[2.0]]),
        (Quantile(SIGNAL, 1.0), [[4.0]]),
    ],
    ids=str,
)
def test_functions(signal, value):
    assert close(signal(batch()), value, 12)


def test_means_and_shares_inside_a_group():
    six = torch.arange(6, dtype=torch.float64)[:, None]
    here = batch(
        six >= 0, six, columns={"correct": [True, True, False, True, False, False], "group": GROUPS}
    )
    assert GroupMean(RowMean(SIGNAL))(here)[:, 0].tolist() == [1, 1, 1, 3.5, 3.5, 5]
    assert close(GroupMean(Correct())(here)[:, 0], (2 / 3,) * 3 + (0.5, 0.5, 0), 12)
    share = GroupShare(RowMean(SIGNAL), Correct())(here)[:, 0]
    assert close(share, [*(2 * numbers(0, 1).softmax(0)).tolist(), 0, 1, 0, 0], 12)


def test_schedules():
    def at(signal, step, total=5):
        return signal(batch(step=step, total_steps=total)).item()

    assert (
        [at(Progress(), s) for s in range(5)] == [0, 0.25, 0.5, 0.75, 1]
        and at(Progress(), 9) == 1
        and at(Progress(), 0, 1) == 0
    )
    assert [at(Early(0.5), s, 4) for s in range(4)] == [True, True, False, False]
    assert (
        sum(at(Early(0.1), s, 30) for s in range(30)) == 3
        and at(Early(1.0), 29, 30)
        and not at(Early(0.0), 0, 30)
    )


# -------------------------------------------------------------------------------------------- draws


def drawn(p=0.3, rows=64, length=256, **more) -> torch.Tensor:
    x = torch.full((rows, length), p, dtype=torch.float64)
    return Draw(SIGNAL)(batch(x > -1, x, **more))


def test_a_draw_is_true_with_its_probability():
    n = 64 * 256
    assert abs(drawn(0.3).sum() - 0.3 * n) < 3 * math.sqrt(0.21 * n)
    assert drawn(1.0).all() and drawn(2.5).all() and not drawn(0.0).any() and not drawn(-1.0).any()


def test_the_same_expression_is_the_same_draw_and_another_is_another():
    assert torch.equal(drawn(), drawn()) and torch.equal(drawn()[:, :9], drawn(length=9))
    for other in (drawn(seed=1), drawn(step=1)):
        assert 0.3 < (other != drawn()).double().mean() < 0.54  # 0.42 of independent draws differ
    x = torch.full((64, 256), 0.3, dtype=torch.float64)
    assert not torch.equal(Draw(SIGNAL * 1)(batch(x > 0, x)), drawn())


def test_rows_are_drawn_by_their_key():
    keys = torch.arange(64)
    assert torch.equal(drawn(keys=keys.flip(0)), drawn(keys=keys).flip(0))
    one = torch.full((1, 256), 0.3, dtype=torch.float64)
    assert torch.equal(Draw(SIGNAL)(batch(one > 0, one, keys=keys[[17]])), drawn(keys=keys)[[17]])


def test_given_uniforms_replace_the_keyed_ones():
    u = torch.tensor([[0.0, 0.29, 0.3], [0.31, 0.5, 0.999]], dtype=torch.float64)
    x = torch.full((2, 3), 0.3, dtype=torch.float64)
    assert Draw(SIGNAL)(batch(x > 0, x, uniform=u)).tolist() == [[True, True, False], [False] * 3]
    objective = load("tropd").objective
    case = fabricate(objective)
    out = replace(
        case, settings=case.settings | {"uniform": torch.zeros(6, 7, dtype=torch.float64)}
    ).run(objective)
    assert torch.equal(out.terms[0].weight != 0, case.mask & ~case.marks["guided"])


# ------------------------------------------------------------------------- what a credit depends on


@dataclass(frozen=True)
class Own(Signal):
    """A user's signal that reads the batch itself."""

    def value(self, batch):
        return batch.tokens.to(batch.dtype)


@dataclass(frozen=True)
class Wrapped(Signal):
    """A user's signal of another one."""

    of: Signal

    def value(self, batch):
        return self.of(batch)


@pytest.mark.parametrize(
    "signal",
    [
        Logp("a"),
        LogRatio("a", "b") + Gap(),
        Reward() * 2,
        Own(),
        Wrapped(Logp("a")),
        -Advantage(),
        # what comes later is another divergence after another token
        ToGo(Gap()) - Gap(),
    ],
)
def test_credits_that_depend_on_the_sample(signal):
    assert depends_on_sample(signal)


@pytest.mark.parametrize(
    "signal",
    [
        Gap(),
        Entropy("teacher"),
        Const(1),
        Progress(),
        Wrapped(Gap()),
        Exp(Gap()) * 3 + Progress(),
        ToGo(Gap(), 0),
    ],
)
def test_credits_that_do_not(signal):
    assert not depends_on_sample(signal)

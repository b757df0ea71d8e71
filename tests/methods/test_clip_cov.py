"""Clip-Cov and KL-Cov: whose covariance is large, which of these are chosen, and what becomes of
them.
"""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.clip_cov import Covariance, CovarianceClipped, Largest, Moved, largest
from opdkit.methods.method import load
from opdkit.objective import (
    Advantage,
    Batch,
    ColumnFact,
    LogpFact,
    Objective,
    PolicyGradient,
    Row,
)
from opdkit.testing import check
from tests.methods.ragged import on, slopes
from tests.methods.steps import GROUPS, advantages, agrees, at, ppo, step
from tests.methods.toy import close, numbers

A = (1.0, 1.0, 1.0, -1.0, -1.0, -1.0)
LOGP = (-0.1, -3.0, -0.5, -0.2, -4.0, -1.2)
COVARIANCES = (1.4, -1.5, 1.0, -1.3, 2.5, -0.3)


def batch(logp=LOGP, credit=A, mask=None, **facts):
    """One rollout per token, at rest: the student is where it was."""
    rows = numbers(*logp)[:, None]
    known = {LogpFact(m): rows for m in ("live", "student", "sampler")}
    known[ColumnFact("row:a")] = numbers(*credit)
    trained = torch.ones(len(logp), 1, dtype=torch.bool) if mask is None else mask[:, None]
    return Batch(
        torch.zeros(len(logp), 1, dtype=torch.int64),
        trained,
        known,
        dtype=torch.float64,
        **facts,
    )


def kept(made, **settings):
    """The weights of Clip-Cov's tokens, 0 where one is dropped."""
    loss = CovarianceClipped(Row("a"), base="student", **settings)
    return Objective(loss).plan(made).parts[0].weight[:, 0].tolist()


def test_covariances_and_their_mean():
    found = Covariance(Row("a"))(batch())[:, 0]
    assert close(found, COVARIANCES, 12) and close(found.mean(), 0.3, 12)
    pair = torch.stack([numbers(*A), numbers(*LOGP)])
    assert close(found.mean(), torch.cov(pair, correction=0)[0, 1], 12)


@pytest.mark.parametrize(("draws", "dropped"), [((0.2, 0.9), 0), ((0.9, 0.2), 4)])
def test_clip_cov_drops_one_of_its_two_candidates(draws, dropped):
    """Index 2 lies on the bound, 1.0, whatever its draw; a 6e-4th of six tokens is one."""
    uniform = torch.zeros(6, 1).double()
    uniform[0], uniform[4] = draws
    assert kept(batch(uniform=uniform)) == [float(i != dropped) for i in range(6)]
    both = batch(uniform=uniform)
    assert kept(both, ratio=0.5) == [0, 1, 1, 1, 0, 1]  # three are asked for, there are two
    assert kept(batch(uniform=uniform), lb=0.9, ratio=0.5) == [0, 1, 0, 1, 0, 1]
    assert kept(batch(uniform=uniform), lb=1.5, ub=2.5) == [1] * 6  # 2.5 is a bound too


def test_kl_cov_holds_the_largest_and_of_equal_ones_the_earlier():
    """An improbable token with a negative advantage is one of high covariance."""
    assert Largest(Row("a"), 2e-4)(batch())[:, 0].tolist() == [i == 4 for i in range(6)]
    assert Largest(Row("a"), 0.5)(batch())[:, 0].nonzero()[:, 0].tolist() == [0, 2, 4]
    equal = batch(credit=(1.0,) * 6)
    assert (Covariance(Row("a"))(equal) == 0).all()
    assert Largest(Row("a"), 0.5)(equal)[:, 0].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert kept(batch(credit=(1.0,) * 6), ratio=1.0) == [1] * 6


def test_tokens_that_ppo_clips_are_no_candidates():
    """Index 0 has moved beyond 1.2 on the side that its credit pushes to, index 4 back."""
    made = batch()
    for token, ratio in ((0, 1.3), (4, 1.3)):
        before = made.facts[LogpFact("student")].clone()
        before[token] = LOGP[token] - torch.tensor(ratio).log()
        made.facts[LogpFact("student")] = before
    assert kept(made, ratio=1.0)[0] == 1.0 and kept(made, ratio=1.0)[4] == 0.0
    made.signals.clear()
    assert kept(made, ratio=1.0, low=0.5, high=0.5)[0] == 0.0


def test_how_many():
    g = torch.Generator().manual_seed(0)
    logp = torch.randn(1000, 1000, generator=g) * 3
    facts = {LogpFact(m): logp for m in ("live", "student", "sampler")}
    facts[ColumnFact("row:a")] = torch.randn(1000, generator=g)
    made = Batch(torch.zeros(1000, 1000).long(), torch.ones(1000, 1000).bool(), facts)
    dropped = (Objective(CovarianceClipped(Row("a"))).plan(made).parts[0].weight == 0).sum()
    assert dropped == 200  # of a million, and there are as many candidates
    assert Largest(Row("a"), 2e-3)(made).sum() == 2000


def test_masked_tokens_count_nowhere():
    mask = torch.tensor([True, True, False, True, True, True])
    wild = list(LOGP)
    wild[2] = -1000.0
    for logp in (LOGP, wild):
        made = batch(logp, mask=mask)
        found = Covariance(Row("a"))(made)[mask, 0]
        alone = Covariance(Row("a"))(
            batch([x for i, x in enumerate(LOGP) if i != 2], [a for i, a in enumerate(A) if i != 2])
        )
        assert close(found, alone[:, 0], 12)
        assert not Largest(Row("a"), 1.0)(made)[2]
    assert largest(numbers(1, 5, 3), torch.tensor([True, False, True]), 3).tolist() == [1, 0, 1]


def test_the_first_update_of_kl_cov_is_the_plain_policy_gradient():
    case = step(0, True)
    plain = case.run(Objective(PolicyGradient(Advantage())))
    for objective in (load("kl_cov", ratio=1.0).objective, load("kl_cov", beta=0.0).objective):
        out = case.run(objective)
        assert torch.equal(out.loss, plain.loss) and torch.equal(out.grad, plain.grad)
    assert load("kl_cov", beta=0.0).objective == Objective(PolicyGradient(Advantage()))


def test_what_is_held_is_pulled_back_with_a_constant_force():
    """beta sign(log r), whatever the size: -1, 1 and none of four tokens."""
    before, now = [[-1.0], [-1.0], [-1.0], [-1.0]], [[-1.5], [-0.2], [-1.0], [-1.1]]
    out = on(Moved() * 3.0, now, before=before)
    assert close(slopes(out, now), numbers(-3, 3, 0, -3) / 4, 12)
    assert close(out.loss, 3 * (0.5 + 0.8 + 0.1) / 4, 12)


def test_the_mean_of_covariances_is_how_fast_entropy_falls():
    """A step of natural policy gradient adds eta A to a softmax's logits; ten rollouts of one token
    in the proportions of the policy.
    """
    p, a = numbers(0.5, 0.3, 0.2), numbers(1.0, -0.5, 0.3)
    which = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    mean = Covariance(Row("a"))(batch(p.log()[which].tolist(), a[which].tolist())).mean()

    def entropy(eta):
        logp = (p.log() + eta * a).log_softmax(-1)
        return -(logp.exp() * logp).sum()

    assert close((entropy(1e-4) - entropy(-1e-4)) / 2e-4, -mean, 6)


def covariance(case, ls):
    """[B, T], 0 outside, and the credits [B, T]."""
    mask = case.mask
    a = advantages(case.columns["reward"], GROUPS, std=True)[:, None].expand(mask.shape)
    now = at(ls.detach(), case.tokens)
    return torch.where(mask, (a - a[mask].mean()) * (now - now[mask].mean()), 0.0), a


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("ratio", [0.05, 0.12, 1.0])
def test_clip_cov_is_the_naive_formula(ratio, fresh):
    draws = torch.rand(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case = step(8, fresh, uniform=draws)

    def reference(ls, said):
        y, mask = case.tokens, case.mask
        c, a = covariance(case, ls)
        r, was = (at(ls, y) - at(said["before"], y)).exp(), at(said["before"], y)
        each = ppo(r, a, 0.1, 0.15) * (was - at(said["sampler"], y)).exp()
        clipped = ((a > 0) & (r > 1.15)) | ((a < 0) & (r < 0.9))
        among = (mask & ~clipped & (c > 0.05) & (c < 1.2)).flatten().nonzero()[:, 0].tolist()
        number = max(int(ratio * mask.sum().item()), 1)
        out = sorted(among, key=lambda i: draws.flatten()[i].item())[:number]
        assert len(among) > 1 and (ratio == 1.0 or len(out) < len(among))
        left = mask.flatten().clone()
        left[out] = False
        return each.flatten()[left].sum() / mask.sum()

    assert agrees(load("clip_cov", ratio=ratio, lb=0.05, ub=1.2, clip=(0.1, 0.15)), case, reference)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(("ratio", "beta"), [(1e-4, 1.0), (0.3, 0.5)])
def test_kl_cov_is_the_naive_formula(ratio, beta, fresh):
    case = step(9, fresh)

    def reference(ls, said):
        y, mask = case.tokens, case.mask
        c, a = covariance(case, ls)
        each = -a * (at(ls, y) - at(said["sampler"], y)).exp()
        number = max(int(ratio * mask.sum().item()), 1)
        for i in sorted(mask.flatten().nonzero()[:, 0].tolist(), key=lambda i: -c.flatten()[i])[
            :number
        ]:
            b, t = divmod(i, mask.shape[1])
            moved = at(ls, y)[b, t] - at(said["before"], y)[b, t]
            held = torch.zeros_like(each)
            held[b, t] = beta
            each = each + held * moved.abs()
        return torch.where(mask, each, 0.0).sum() / mask.sum()

    assert agrees(load("kl_cov", ratio=ratio, beta=beta), case, reference)


def test_a_minibatch_takes_its_part_of_the_steps_selection():
    case = step(8, False, uniform=torch.rand(6, 5, dtype=torch.float64))
    for method in (load("clip_cov", ratio=0.3, lb=0.0, ub=9.0), load("kl_cov", ratio=0.3)):
        made = case.batch(method.objective)
        whole = method.objective.plan(made)
        part = method.objective.plan(made, torch.tensor([3, 4, 5]))
        for mine, all_ in zip(part.parts, whole.parts):
            assert torch.equal(mine.weight[3:], all_.weight[3:]) and (mine.weight[:3] == 0).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("clip_cov", {"lb": 0.01, "ub": 9.0, "ratio": 0.3}),
        ("clip_cov", {"lb": 0.01, "ub": 9.0, "ratio": 0.3, "divergence_mask": 0.02}),
        ("clip_cov", {"clip": None}),
        ("clip_cov", {"dual_clip": 3.0, "rollout_cap": 2.0}),
        ("kl_cov", {"ratio": 0.5, "beta": 2.0}),
        ("kl_cov", {"clip": 0.2, "rollout_cap": 2.0}),
    ],
)
def test_check(name, arguments):
    check(load(name, **arguments))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("clip_cov", {"ratio": 0.0}, "ratio=0 chooses no tokens"),
        ("kl_cov", {"ratio": 1.5}, r"must lie in \[0, 1\]"),
        ("clip_cov", {"lb": 5.0}, "must be below ub"),
        ("kl_cov", {"beta": -1.0}, "at least 0"),
    ],
)
def test_bad_arguments_are_explained(name, arguments, words):
    with pytest.raises(UserError, match=words):
        load(name, **arguments)

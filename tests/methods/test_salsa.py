"""SALSA: PPO with GAE and a value head, held near an average of checkpoints."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.methods.salsa import AtEnd
from opdkit.objective import LogRatio, Objective, PolicyGradient, Reward
from opdkit.testing import check, fabricate
from tests.methods.ragged import mask_of, on, shifted
from tests.methods.steps import at, ppo, step
from tests.methods.toy import close, numbers

SFT, OTHER, A = numbers(0.6, 0.3, 0.1), numbers(0.2, 0.5, 0.3), 0.5


def kl(p, q):
    return (p * (p / q).log()).sum()


def test_the_soup_of_two_log_linear_models():
    """Their logits are the weights: the average is the geometric mean, not (.4, .4, .2)."""
    soup = ((1 - A) * SFT.log() + A * OTHER.log()).softmax(-1)
    assert close(soup, [0.381966, 0.427051, 0.190983])
    # the penalty is above zero at the start, where that of the first model itself is zero
    assert close(kl(SFT, soup), 0.100321) and kl(SFT, SFT) == 0
    both = (1 - A) * kl(SFT, SFT) + A * kl(SFT, OTHER)
    z = (SFT.sqrt() * OTHER.sqrt()).sum()
    assert close(both, 0.198029) and close(-z.log(), 0.097708)
    assert close(both, kl(SFT, soup) - z.log(), 12)


def test_the_reward_is_paid_at_the_last_token_and_the_penalty_at_each():
    gaps = [[0.3, -0.2, 0.5], [0.4]]
    earned = AtEnd(Reward()) - LogRatio("student", "reference") * 0.1
    out = on(
        Objective(PolicyGradient(earned)),
        shifted(gaps),
        models={"reference": shifted([[0.0] * 3, [0.0]])},
        reward=[2.0, -1.0],
        group=[0, 1],
    )
    credit = out.terms[0].credit[mask_of(gaps)]
    assert close(credit, [-0.03, 0.02, 2 - 0.05, -1 - 0.04], 12)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("clip", [(0.2, 0.2), None])
def test_it_is_the_naive_formula(clip, fresh):
    """PPO and GAE written out token by token; the value head learns from its own loss alone."""
    case = step(11, fresh, ("reference",))
    method = load("salsa", beta=0.3, discount=0.9, lam=0.8, clip=clip)
    y, mask, reward = case.tokens, case.mask, torch.as_tensor(case.columns["reward"])
    leaf = case.student.clone().requires_grad_()
    ls, before, sampler, soup = (
        x.log_softmax(-1) for x in (leaf, case.before, case.sampler, case.models["reference"])
    )
    out = case.run(method.objective)
    [linear] = [state.module for state in out.companions.values()]
    # hidden states are the logits here; facts are those before the step
    value = (case.before @ linear.weight[0] + linear.bias).detach()
    live = leaf.detach() @ linear.weight[0] + linear.bias
    policy, critic = 0.0, 0.0
    for b in range(6):
        where = mask[b].nonzero()[:, 0].tolist()
        r = [-0.3 * (at(before, y) - at(soup, y))[b, t].item() for t in where]
        r[-1] += reward[b].item()
        v = [value[b, t].item() for t in where] + [0.0]
        delta = [r[i] + 0.9 * v[i + 1] - v[i] for i in range(len(where))]
        for i, t in enumerate(where):
            a = sum((0.9 * 0.8) ** (j - i) * delta[j] for j in range(i, len(where)))
            if clip:
                w = (at(ls, y) - at(before, y))[b, t].exp()
                outer = (at(before, y) - at(sampler, y))[b, t].exp().detach()
                policy = policy + outer * ppo(w, numbers(a)[0], *clip)
            else:
                policy = policy - (at(ls, y) - at(sampler, y))[b, t].exp() * a
            critic = critic + (live[b, t] - (a + v[i])).square() / 2
    n = mask.sum()
    (grad,) = torch.autograd.grad(policy / n, leaf)
    slopes = torch.autograd.grad(critic / n, [linear.weight, linear.bias])
    assert close(out.loss, (policy + critic).detach() / n, 8)
    assert (out.grad - grad).abs().max() < 1e-8 and grad.norm() > 1e-3
    for mine, theirs in zip(linear.parameters(), slopes):
        assert (mine.grad - theirs).abs().max() < 1e-8


def test_with_discount_and_lam_1_and_no_value_the_credit_is_what_is_still_to_come():
    """A + V = the sum of r from each token on, whatever V is."""
    case = fabricate(load("salsa", lam=1.0).objective)
    objective = load("salsa", beta=0.0, lam=1.0).objective
    batch = case.batch(objective)
    target = objective.terms[1].loss.target(batch)
    assert close(target[batch.mask], batch.reward[:, None].expand(batch.shape)[batch.mask], 12)


@pytest.mark.parametrize(
    "arguments", [{}, {"beta": 0.0}, {"discount": 0.9, "lam": 0.0}, {"clip": None}, {"clip": 0.1}]
)
def test_check(arguments):
    check(load("salsa", **arguments))


def test_the_reference_is_a_soup_that_the_run_names():
    assert load("salsa", alpha=0.3).models == {"reference": {"kind": "soup", "others": 0.3}}
    for arguments, said in (
        ({"alpha": 1.5}, "alpha=1.5 must lie in"),
        ({"beta": -0.1}, "beta=-0.1 must be at least 0"),
        ({"lam": 2.0}, "lam=2.0 must lie in"),
    ):
        with pytest.raises(UserError, match=said):
            load("salsa", **arguments)


def test_a_hole_in_a_response_does_not_move_its_end():
    """The reward is paid at the last token that is trained."""
    case = fabricate(Objective(PolicyGradient(AtEnd(Reward()))))
    batch = case.batch(Objective(PolicyGradient(AtEnd(Reward()))))
    paid = AtEnd(Reward())(batch)
    for b in range(6):
        last = batch.mask[b].nonzero()[-1].item()
        assert paid[b, last] == batch.reward[b] and paid[b].abs().sum() == batch.reward[b]
    assert math.isclose(paid.sum().item(), batch.reward.sum().item())

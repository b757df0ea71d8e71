"""pi-Distill and OPSD-RL: the gradients of their objectives by enumeration, which row learns what,
and what is left without privileged information.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.curricula import TwoContexts
from opdkit.methods.method import load
from opdkit.methods.pi_distill import Apart, FromAnother, Pull
from opdkit.objective import Advantage, Mark, Objective, Reward
from opdkit.testing import Case, check, evaluate
from tests.methods.ragged import on, slopes
from tests.methods.steps import GROUPS, advantages, agrees, at, ppo, step
from tests.methods.toy import close, logits, numbers, reverse_kl_gradient, tokens

# logits = W c: the first column is the question's, the second that of the privileged information
W = torch.tensor([(0.2, 0.9), (0.0, 0.6), (-0.1, -0.5)], dtype=torch.float64)
PLAIN, SHOWN = numbers(1, 0), numbers(1, 1)
Z_S, Z_T = W @ PLAIN, W @ SHOWN
S, T, R = Z_S.softmax(0), Z_T.softmax(0), numbers(0, 1, 0.5)
BETA = 0.25
ALPHA_0 = (-0.13946, 0, 0.176043, 0, -0.036584, 0)
ALPHA_1 = (-0.25218, -0.25218, 0.211462, 0.211462, 0.040718, 0.040718)


def both(*responses, reward=R, method=None, shown=Z_T, plain=Z_S, sampler=Z_T, **arguments):
    """Responses of one token to one prompt, each in two rows: privileged, then plain."""
    rows = 2 * len(responses)
    privileged = torch.arange(rows)[:, None] % 2 == 0
    ids = torch.tensor([[y] for y in responses]).repeat_interleave(2, 0)
    return evaluate(
        method or load("pi_distill", **{"clip": None, **arguments}),
        torch.where(privileged, shown, plain)[:, None],
        ids,
        sampler_logits=sampler.expand(rows, 1, 3),
        group=[0] * rows,
        reward=reward[ids[:, 0]],
        marks={"privileged": privileged},
    )


def pairs(of):
    """A quantity of two responses, averaged over what the privileged student writes."""
    every = itertools.product(range(3), repeat=2)
    return sum(T[a] * T[b] * of(a, b) for a, b in every)


def mean(**arguments):
    """[3, 2]: the gradient of the loss with respect to W, on average."""

    def of(a, b):
        grad = both(a, b, **arguments).grad[:, 0]  # [4, 3]
        return sum(row.outer(c) for row, c in zip(grad, (SHOWN, PLAIN) * 2))

    return pairs(of)


def test_numbers_of_the_toy():
    assert close(S, (0.390694, 0.319873, 0.289433))
    assert close(T, (0.558905, 0.338993, 0.102103))
    k = (T / S).log()
    assert close(T @ k, 0.113413) and close(T @ (R - BETA * k), 0.361691)
    assert close(S @ R - BETA * (T @ k), 0.436236)
    assert close(T @ (S / T * R), 0.464590) and close(S @ R, 0.464590)


def shaped(y, **arguments):
    """[]: R - beta k of a response, and nothing else: alone, its mean is itself."""
    case = Case(
        tokens(y).repeat(2, 1),
        torch.stack([Z_T, Z_S])[:, None],
        sampler=Z_T.expand(2, 1, 3),
        columns={"group": [0, 0], "reward": R[[y, y]]},
        marks={"privileged": torch.tensor([[True], [False]])},
    )
    signal = Reward() - Apart() * BETA
    batch = case.batch(load("pi_distill").objective)
    assert signal(batch)[0] == signal(batch)[1]  # both rows of the response
    return signal(batch)[0, 0]


def test_values_of_both_objectives():
    assert close(sum(T[y] * shaped(y) for y in range(3)), 0.361691)
    # E_T[r R] - beta E_T[r - 1 - log r]: the mean of what the student's part makes of each response
    pulls = pairs(lambda a, b: both(a, b, alpha=0.0).terms[1].value)
    assert close(pulls, BETA * 0.113413)
    assert close(S @ R - pulls, 0.436236)


def test_mean_gradients_are_those_of_the_objectives():
    """A group of two leaves (1 - 1/2) of what is credited, as each response is in its own
    baseline; the student's KL is no credit and stays whole.
    """
    teacher = -2 * mean(alpha=1.0)
    assert close(teacher, numbers(*ALPHA_1).view(3, 2))
    rewarded = mean(alpha=0.0, beta=0.0)
    student = -(2 * rewarded + (mean(alpha=0.0) - rewarded))
    assert close(student, numbers(*ALPHA_0).view(3, 2))
    assert (student[:, 1] == 0).all()
    assert close(mean(alpha=0.5), (mean(alpha=0.0) + mean(alpha=1.0)) / 2, 12)


def test_the_importance_identity_carries_the_students_reward():
    """E_T[r (R - b) grad log pi_S] is the gradient of E_S[R], half of it in a group of two."""
    exact = S * (R - S @ R)
    assert close(-2 * mean(alpha=0.0, beta=0.0)[:, 0], exact, 12)


def test_the_pull_is_the_forward_kl_on_average():
    rewarded = mean(alpha=0.0, beta=0.0)
    assert close((mean(alpha=0.0, beta=1.0) - rewarded)[:, 0], S - T, 12)


def test_a_shaped_reward_in_the_students_part_would_drive_it_away():
    """What a re-implementation has in the place of the pull: with no reward at all its gradient is
    minus that of KL(pi_S || pi_T), of which half is left in a group of two.
    """
    theirs = Objective(
        (FromAnother(Advantage("mean", Reward() - Apart()), 9e9, 9e9) * ~Mark("privileged")).per(
            "row_sums"
        )
    )
    gradient = mean(method=theirs, reward=torch.zeros(3, dtype=torch.float64))[:, 0]
    away = -reverse_kl_gradient(S.tolist(), T.tolist())
    assert close(gradient, away / 2 / 2, 12)  # and the mean is over twice as many rows


def test_shaped_rewards_of_a_group():
    """R = (1, 0, 1, 0), k = (.4, .2, .1, .3) and beta = 0.25, as the card has it; every response
    twice.
    """
    rows = [[-1.0 - k * plain] for k in (0.4, 0.2, 0.1, 0.3) for plain in (0, 1)]
    facts = {
        "reward": [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0],
        "group": [0] * 8,
        "marks": {"privileged": torch.arange(8)[:, None] % 2 == 0},
        "sampler": [[-1.0]] * 8,
    }
    out = on_group(rows, **facts)
    assert close(out.terms[0].credit[::2, 0], (0.4625, -0.4875, 0.5375, -0.5125))
    assert torch.equal(out.terms[0].credit[::2], out.terms[0].credit[1::2])
    centred = numbers(0.4625, -0.4875, 0.5375, -0.5125)
    assert close(centred / centred.std(), (0.799825, -0.843059, 0.929526, -0.886292))
    assert close(out.terms[1].credit[::2, 0], (0.5, -0.5, 0.5, -0.5))  # the student's: R alone


def on_group(rows, sampler, marks, **facts):
    """Token i of ten for response i, in rows 2 i and 2 i + 1, with these log-probs."""
    ids = torch.arange(len(rows))[:, None] // 2

    def spread(values):  # [B, 1, 10]: the token has its log-prob, the rest share what is left
        p = torch.tensor(values, dtype=torch.float64).exp()
        rest = ((1 - p) / 9).expand(-1, 10).clone()
        return rest.scatter(1, ids, p).log()[:, None]

    return evaluate(
        load("pi_distill"), spread(rows), ids, sampler_logits=spread(sampler), marks=marks, **facts
    )


@pytest.mark.parametrize("offpolicy", ["clip", "topr"])
def test_without_privileged_information_it_is_a_policy_gradient_for_every_alpha(offpolicy):
    """pi_T = pi_S: no KL, and both parts add up to the gradient of one row per response."""
    plain = evaluate(
        Objective(load("grpo", advantage="mean").objective.terms[0].per("row_sums")),
        Z_S.expand(2, 1, 3),
        torch.tensor([[0], [1]]),
        group=[0, 0],
        reward=R[[0, 1]],
    ).grad.sum(0)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        out = both(0, 1, alpha=alpha, offpolicy=offpolicy, clip=0.2, shown=Z_S, sampler=Z_S)
        assert close(out.grad.sum(0), plain, 12) and plain.norm() > 0.1
        if alpha < 1:
            assert out.terms[-1].value == 0  # the pull
        # the same response in each of its rows: alpha of it behind the one, the rest behind the
        # other
        assert close(out.grad[::2].sum(0), alpha * plain, 12)


def test_what_a_row_learns():
    """Teacher's rows have none of the student's part and the other way round."""
    out = both(0, 1, alpha=0.5)
    shown = torch.tensor([1.0, 0.0, 1.0, 0.0]).double()[:, None]
    assert torch.equal(out.terms[0].weight, shown)
    assert torch.equal(out.terms[1].weight, 1 - shown)
    assert torch.equal(out.terms[2].weight, (1 - shown) * BETA)


STUDENT = [[-1.0], [-1.0], [-1.0], [-1.0]]  # plain rows of two responses, no privileged one


def tapered(offpolicy, moved, reward):
    """[2]: the slopes of two plain rows whose tokens were drawn with log-prob -1 - moved."""
    student = STUDENT[:2]
    facts = {"sampler": [[-1.0 - moved]] * 2, "reward": list(reward), "group": [0, 0]}
    out = on(load("pi_distill", alpha=0.0, beta=0.0, offpolicy=offpolicy), student, **facts)
    return slopes(out, student)


def test_off_policy_forms():
    """A = 1/2 and -1/2, r = e^0.5 = 1.649 or e^-0.5 = 0.607; 2 (1 - alpha) over 2 rows is 1."""
    up, down = 1.648721, 0.606531
    for moved, clip_slopes in ((0.5, (0.0, up / 2)), (-0.5, (-down / 2, 0.0))):
        assert close(tapered("clip", moved, (1.0, 0.0)), clip_slopes)
    # no ratio where A > 0; else a weight of 0.8 .. 1.2 that has no gradient itself
    for moved, weight in ((0.5, 1.2), (-0.5, 0.8), (0.1, 1.105171)):
        assert close(tapered("topr", moved, (1.0, 0.0)), (-0.5, weight / 2))


def test_the_pull_estimates():
    """E_T[r - 1 - log r] = KL(T || S)."""
    each = numbers(
        *(
            evaluate(
                Pull(), logits(S.tolist()), tokens(y), sampler_logits=logits(T.tolist())
            ).loss.item()
            for y in range(3)
        )
    )
    assert close(T @ each, 0.113413)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("shaped", ["teacher", "both"])
@pytest.mark.parametrize("offpolicy", ["clip", "topr"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.25), (0.0, 0.7), (1.0, 0.7), (0.3, 0.0)])
def test_it_is_the_naive_formula(alpha, beta, offpolicy, shaped, fresh):
    """Six responses in twelve rows, in any order."""
    case = step(11, fresh, ())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    place = order.argsort()  # of row i: privileged 0 .. 5, plain 6 .. 11
    other = step(12, fresh, ())

    def rows(shown, plain):
        return torch.cat([shown, plain])[order]

    twice = replace(
        case,
        tokens=rows(case.tokens, case.tokens),
        student=rows(case.student, other.student),
        mask=rows(case.mask, case.mask),
        before=rows(case.before, other.before),
        sampler=rows(case.sampler, case.sampler),
        columns={
            "group": rows(torch.tensor(GROUPS), torch.tensor(GROUPS)),
            "reward": rows(case.columns["reward"], case.columns["reward"]),
        },
        marks={"privileged": rows(torch.ones_like(case.mask), torch.zeros_like(case.mask))},
    )

    def reference(ls, said):
        live, old, drawn = (
            at(x, twice.tokens)[place] for x in (ls, said["before"], said["sampler"])
        )
        k = torch.where(case.mask, drawn[:6] - old[6:], 0.0).sum(1)
        reward = case.columns["reward"]
        a_t = advantages(reward - beta * k, GROUPS)[:, None]
        both = shaped == "both"
        a_s = a_t if both else advantages(reward, GROUPS)[:, None]
        teacher = ppo((live[:6] - old[:6]).exp(), a_t) * (old[:6] - drawn[:6]).exp()
        r = (live[6:] - drawn[6:]).exp()
        if offpolicy == "topr":
            w = torch.where(a_s > 0, 1.0, r.detach().clamp(0.8, 1.2))
            student = -w * a_s * live[6:]
        else:
            student = ppo(r, a_s)
        student = student + (0 if both else beta) * (r - 1 - r.log())
        each = alpha * teacher + (1 - alpha) * student
        return torch.where(case.mask, each, 0.0).sum() / 6

    given = {"alpha": alpha, "beta": beta, "offpolicy": offpolicy, "shaped": shaped}
    assert agrees(load("pi_distill", **given), twice, reference)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"offpolicy": "topr"},
        {"shaped": "both"},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"beta": 0.0},
        {"clip": (0.1, 0.3), "dual_clip": 3.0, "rollout_cap": 1.5},
        {"offpolicy": "topr", "rollout_cap": 1.1},
    ],
)
def test_check(arguments):
    check(load("pi_distill", **arguments))


def test_a_cap_bounds_the_ratio_of_the_students_part():
    """r = e^0.5 and A < 0: no clip from above; a cap of 1.5 takes its gradient."""
    facts = {"sampler": [[-1.5]] * 2, "reward": [1.0, 0.0], "group": [0, 0]}
    method = {"alpha": 0.0, "beta": 0.0}
    free, capped = (
        on(load("pi_distill", **method, **more), STUDENT[:2], **facts)
        for more in ({}, {"rollout_cap": 1.5})
    )
    assert close(slopes(free, STUDENT[:2])[1], 1.648721 / 2)
    assert slopes(capped, STUDENT[:2])[1] == 0


def test_what_it_brings():
    made = load("pi_distill")
    assert made.curriculum == TwoContexts("hint") and not made.models
    assert load("pi_distill", view="solution").curriculum == TwoContexts("solution")
    assert made.needs.models == {"student", "sampler"}


def test_bad_arguments_are_explained():
    for name, arguments, message in (
        ("pi_distill", {"alpha": 1.5}, "lie in"),
        ("pi_distill", {"beta": -1}, "at least 0"),
        ("pi_distill", {"offpolicy": "vtrace"}, "one of clip, topr"),
        ("pi_distill", {"offpolicy": "topr", "dual_clip": 3.0}, "use clip"),
        ("opsd_rl", {"beta": -1}, "at least 0"),
        ("opsd_rl", {"entropy": -1}, "at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            load(name, **arguments)


# ------------------------------------------------------------------------------------------ opsd_rl


def of_rl(y, reward=R, peer=None, **arguments):
    """One response of the plain student, and a peer that its reward is compared with."""
    ids = torch.tensor([[y], [y if peer is None else peer]])
    s, t = (z.expand(2, 1, 3) for z in (Z_S, Z_T))
    method = load("opsd_rl", **arguments)
    models = {"teacher": t} if "teacher" in method.needs.models else {}
    return evaluate(method, s, ids, models=models, group=[0, 0], reward=reward[ids[:, 0]])


def rl_mean(**arguments):
    """[3]: the mean gradient of both rows with respect to the logits."""
    return sum(
        S[a] * S[b] * of_rl(a, peer=b, **arguments).grad.sum((0, 1))
        for a, b in itertools.product(range(3), repeat=2)
    )


def test_its_objective_is_a_kl_to_the_tilted_teacher():
    q = T * (R / BETA).exp()
    z = q.sum()
    q = q / z
    assert close(BETA * z.log(), 0.746695) and close(q, (0.028197, 0.933742, 0.038061))
    apart = BETA * (S * (S / q).log()).sum()
    assert close(apart, 0.317883) and close(BETA * z.log() - apart, 0.428811)
    kl = of_rl(0).terms[1].value  # both rows have it, a mean over two tokens
    assert close(S @ R - kl, 0.428811)
    # and the gradient, of which the group of two leaves half of the reward's
    rewarded = rl_mean(beta=0.0)
    assert close(
        2 * rewarded + (rl_mean() - rewarded),
        BETA * reverse_kl_gradient(S.tolist(), q.tolist()),
        12,
    )


def test_without_the_students_entropy_it_is_a_cross_entropy():
    ce, entropy = -(S @ T.log()), -(S @ S.log())
    for e in (0.0, 0.4, 1.0):
        assert close(of_rl(0, entropy=e).terms[1].value, BETA * (ce - e * entropy), 12)


def test_without_privileged_information_it_is_the_reward_alone():
    case = step(1, True)
    same = replace(case, models={"teacher": case.student})
    ours, alone = (same.run(load("opsd_rl", beta=b).objective).grad for b in (0.25, 0.0))
    assert torch.equal(ours, alone)
    expected = load("grpo", advantage="mean", loss="dapo").objective
    assert load("opsd_rl", beta=0.0).objective == expected


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("entropy", [1.0, 0.3])
def test_opsd_rl_is_the_naive_formula(entropy, fresh):
    case = step(13, fresh)

    def reference(ls, said):
        live, old, drawn = (at(x, case.tokens) for x in (ls, said["before"], said["sampler"]))
        a = advantages(case.columns["reward"], GROUPS)[:, None]
        each = ppo((live - old).exp(), a) * (old - drawn).exp()
        each = each + 0.25 * (ls.exp() * (entropy * ls - said["teacher"])).sum(-1)
        return each[case.mask].mean()

    assert agrees(load("opsd_rl", entropy=entropy), case, reference)


@pytest.mark.parametrize("arguments", [{}, {"entropy": 0.3}, {"beta": 0.0}, {"clip": None}])
def test_check_of_opsd_rl(arguments):
    check(load("opsd_rl", **arguments))


def test_what_opsd_rl_brings():
    teacher = {"kind": "self", "weights": "live", "view": "hint"}
    assert load("opsd_rl").models == {"teacher": teacher} and not load("opsd_rl", beta=0.0).models

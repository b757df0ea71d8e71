"""GTPO: tokens that right and wrong answers share are spared, entropy costs, and what has come
apart is left out.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.gtpo import Alike, Spared
from opdkit.methods.method import load
from opdkit.objective import Advantage, Likelihood, Objective, Stepped
from opdkit.testing import check, evaluate
from tests.methods.steps import GROUPS, advantages, agrees, at, step
from tests.methods.toy import close, numbers, with_entropy

PAIR = ([5, 7, 9, 2], [5, 8, 2])
VOCABULARY = 16


def padded(rows):
    """Tokens [B, T] and where there are some [B, T], of rows of ids."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    return ids, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]


def spared(rows, reward, group=None, mask=None, weight=2.0, marks=None):
    """[B][...]: the weight of each trained token of rows of ids."""
    ids, written = padded(rows)
    written = written if mask is None else written & mask
    a = Advantage("mean")
    out = evaluate(
        Objective(Likelihood() * Spared(Alike(a), a, weight)),
        torch.zeros(*ids.shape, VOCABULARY).double(),
        ids,
        written,
        reward=reward,
        group=[0] * len(rows) if group is None else group,
        marks=marks,
    )
    return [w[m].tolist() for w, m in zip(out.terms[0].weight, written)]


def at_entropies(rows, nats):
    """[B, T, 16]: logits of rows of ids, of which each has this entropy at all its tokens."""
    ids, _ = padded(rows)
    z = torch.stack([with_entropy(h, VOCABULARY).log().expand(ids.shape[1], -1) for h in nats])
    # the favourite, first of all, is the token that stands there
    return torch.stack([torch.stack([x.roll(int(y)) for x, y in zip(*r)]) for r in zip(z, ids)])


def sequence_losses(nats, **arguments):
    """[2]: what each rollout of the pair adds to the loss, times what the sum is divided by."""
    ids, mask = padded(PAIR)
    method = load("gtpo", **arguments)
    out = evaluate(method, at_entropies(PAIR, nats), ids, mask, reward=[1.0, 0.0], group=[0, 0])
    each = -out.terms[0].weight * out.terms[0].credit * mask / mask.sum(1, keepdim=True)
    return each.sum(1), out


def test_values():
    assert spared(PAIR, [1.0, 0.0]) == [[2, 1, 1, 2], [0, 1, 0]]
    each, out = sequence_losses((0.3, 0.4))
    assert close(out.terms[0].credit[:, 0], [0.47, -0.54]) and close(each, [-0.705, 0.18])
    assert close(out.loss, (-0.705 + 0.18) / 2)
    coded, out = sequence_losses((0.3, 0.4), official_code=True)
    assert close(coded, [-0.3525, 0.09]) and close(out.loss, -0.2625)


def test_identical_answers_with_opposite_rewards():
    assert spared([[5, 6]] * 2, [1.0, 0.0]) == [[4, 4], [0, 0]]
    assert spared([[5, 6]] * 2, [1.0, 0.0], weight=3.0) == [[9, 9], [0, 0]]


@pytest.mark.parametrize("third", [[5, 7, 2], [5, 8, 9, 2], [1]])
def test_a_rollout_without_advantage_changes_no_others(third):
    assert spared([*PAIR, third], [1.0, 0.0, 0.5]) == [[2, 1, 1, 2], [0, 1, 0], [1] * len(third)]


@pytest.mark.parametrize("reward", [[1.0, 1.0, 1.0], [0.7] * 3])
def test_without_two_sides_all_count_alike(reward):
    assert spared([*PAIR, [5, 8]], reward) == [[1] * 4, [1] * 3, [1] * 2]


def test_runs_end_at_the_first_token_that_only_one_side_has():
    """1 2 | 3 . 5: the third is only the right one's, so the 4 behind it is in no run from the
    front; from the back 5 and 4 are.
    """
    assert spared([[1, 2, 3, 4, 5], [1, 2, 7, 4, 5]], [1.0, 0.0]) == [
        [2, 2, 1, 2, 2],
        [0, 0, 1, 0, 0],
    ]
    # one of two right answers has it: for both others the token is on both sides
    rows = [[1, 2], [1, 3], [1, 3]]
    assert spared(rows, [1.0, 1.0, 0.0]) == [[2, 1], [4, 4], [0, 0]]


def test_other_prompts_are_not_looked_at():
    rows = [[5, 6], [7, 8], [7, 8], [5, 6]]
    assert spared(rows, [1.0, 0.0] * 2, [0, 0, 1, 1]) == [[1, 1]] * 4
    assert spared(rows, [1.0, 0.0] * 2, [0, 1, 1, 0]) == [[4, 4], [0, 0], [4, 4], [0, 0]]


def test_what_a_tool_wrote_takes_no_place():
    """Two tokens of a tool in one of the answers, in the front and in the middle, and behind the
    other's end.
    """
    rows = [[9, 5, 7, 8, 2], [5, 7, 2, 9, 9]]
    tool = torch.tensor([[True, False, False, True, False], [False, False, False, True, True]])
    expected = [[4, 4, 4], [0, 0, 0]]
    assert spared(rows, [1.0, 0.0], mask=~tool) == expected
    found = spared(rows, [1.0, 0.0], marks={"tool": tool})
    assert [[w for w, t in zip(r, m) if not t] for r, m in zip(found, tool)] == expected
    assert spared(rows, [1.0, 0.0]) == [[1] * 5, [1] * 5]


def test_a_shared_token_is_never_pushed_down():
    """Nor one in a rollout that the filter leaves out; but a right one whose advantage is less than
    its entropy's price is pushed down with the weight of a right one.
    """
    ids, mask = padded(PAIR)
    z, how = at_entropies(PAIR, (0.3, 0.4)), {"reward": [1.0, 0.0], "group": [0, 0]}
    out = evaluate(load("gtpo"), z, ids, mask, **how)
    assert (out.grad[1, [0, 2]] == 0).all() and (out.grad[1, 1] != 0).any()
    dear = evaluate(load("gtpo", gamma=2.0), z, ids, mask, **how)
    assert close(dear.terms[0].credit[:, 0], [0.5 - 0.6, -0.5 - 0.8])
    assert dear.terms[0].weight.tolist() == out.terms[0].weight.tolist()
    assert dear.grad[0, 0, 5] > 0 > out.grad[0, 0, 5]


@pytest.mark.parametrize(("nats", "learnt"), [(0.71, False), (0.69, True)])
@pytest.mark.parametrize("threshold", [0.7, math.log(2)])
def test_a_rollout_that_has_come_apart_is_left_out(nats, learnt, threshold):
    """It still says which tokens the two sides share, and is counted."""
    ids, mask = padded(PAIR)
    how = {"reward": [1.0, 0.0], "group": [0, 0]}
    out = evaluate(
        load("gtpo", threshold=threshold), at_entropies(PAIR, (nats, 0.4)), ids, mask, **how
    )
    assert bool((out.grad[0] != 0).any()) == learnt
    assert (out.terms[0].weight[1, :3] == torch.tensor([0, 1, 0])).all()
    assert close(out.grad[1], sequence_losses((0.3, 0.4))[1].grad[1], 12)


def test_a_student_that_starts_above_the_threshold_is_not_filtered():
    """Known by the mean over the first step's tokens, and for the whole run: what comes apart later
    is left out in a run that began below.
    """
    ids, mask = padded(PAIR)
    method, how = load("gtpo"), {"reward": [1.0, 0.0], "group": [0, 0]}
    for first, filtered in (((0.9, 0.8), False), ((0.3, 0.4), True)):
        out = evaluate(method, at_entropies(PAIR, first), ids, mask, **how)
        assert (out.grad.abs().sum((1, 2)) > 0).all()
        case = step(0, fresh=True, models=())
        case = replace(
            case, tokens=ids, student=at_entropies(PAIR, first), before=None, sampler=None,
            mask=mask, columns=how, models={},
        )  # fmt: skip
        later = replace(case, student=at_entropies(PAIR, (0.9, 0.8)))
        companions = case.run(method.objective).companions
        for _ in range(2):  # the second step does not move what the first was
            companions.after_step(
                Stepped(case.batch(method.objective, companions=companions), mask)
            )
            saved = companions.state_dict()
            out = later.run(method.objective, companions=companions)
            assert bool((out.grad == 0).all()) == filtered
            case = later
        fresh = later.run(method.objective).companions
        fresh.load_state_dict(saved)
        again = later.run(method.objective, companions=fresh)
        assert torch.equal(again.grad, out.grad)


def test_where_nothing_is_shared_it_is_grpo_with_the_mean():
    """weight=2 and all: with no token in common no weight is other than 1."""
    case = step(3, fresh=True, models=())
    apart = case.tokens % 3 + 3 * (torch.as_tensor(GROUPS)[:, None] * 0)
    high = case.columns["reward"] > 0.5
    apart = torch.where(high[:, None], apart, apart + 3)
    case = replace(case, tokens=apart, columns={"group": GROUPS, "reward": high.double()})
    ours = case.run(load("gtpo", gamma=0.0, threshold=math.inf).objective)
    plain = case.run(load("grpo", advantage="mean", clip=None).objective)
    assert close(ours.grad, plain.grad, 12) and close(ours.loss, plain.loss, 12)
    assert ours.grad.norm() > 0.01


def test_how_probable_they_were_to_the_sampler_says_nothing():
    case = step(0, fresh=False, models=())
    moved = replace(case, sampler=case.before)
    a, b = (c.run(load("gtpo").objective) for c in (case, moved))
    assert torch.equal(a.grad, b.grad) and "sampler" not in load("gtpo").needs.models


def naive(case, weight, gamma, threshold, coded):
    """The card's formula, token by token."""
    ids = [y[m].tolist() for y, m in zip(case.tokens, case.mask)]
    a = advantages(case.columns["reward"], GROUPS).tolist()

    def run(i, turn):
        """How many of rollout i's tokens are in the run from the front, or from the back."""
        mine = ids[i][::turn]
        for k, token in enumerate(mine):
            sides = {
                a[j] > 0
                for j, other in enumerate(ids)
                if GROUPS[j] == GROUPS[i] and a[j] != 0 and other[::turn][k : k + 1] == [token]
            }
            if a[i] == 0 or len(sides) < 2:
                return k
        return len(mine)

    def formula(now, models):
        total = torch.zeros((), dtype=now.dtype)
        entropy = -(models["before"].exp() * models["before"]).sum(-1)
        most = threshold if entropy[case.mask].mean() <= threshold else math.inf
        for i, own in enumerate(ids):
            n, front, back = len(own), run(i, 1), run(i, -1)
            runs = [(k < front) + (k >= n - back) for k in range(n)]
            lam = [weight**r if a[i] > 0 else float(r == 0) for r in runs]
            h = entropy[i, case.mask[i]].mean()
            shaped = (a[i] - gamma * h) * (h <= most)
            logp = at(now[i : i + 1], case.tokens[i : i + 1])[0, case.mask[i]]
            rho = (logp - logp.detach()).exp()
            loss = -(shaped * numbers(*lam) * rho).mean()
            total = total + (loss / max(1, sum(r > 0 for r in runs)) if coded else loss / len(ids))
        return total

    return formula


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"weight": 3.0, "gamma": 0.5, "threshold": 1.1}])
def test_equal_to_a_naive_reference(seed, fresh, coded, arguments):
    """Of two kinds of tokens, so that there are runs. The mean entropy is about 1.5: the higher
    threshold leaves some rollouts out, the lower is not in force.
    """
    case = step(seed, fresh, models=())
    case = replace(case, tokens=case.tokens % 2)
    arguments = {"threshold": 1.6, **arguments}
    values = {"weight": 2.0, "gamma": 0.1, **arguments}
    method = load("gtpo", official_code=coded, **arguments)
    assert agrees(method, case, naive(case, coded=coded, **values))
    assert case.run(method.objective).terms[0].weight.unique().numel() > 2


def test_an_optimiser_step_sums_what_is_its_own():
    """The code's sum over rollouts: two steps of one prompt each, one after the other, are the step
    of both.
    """
    case = step(1, fresh=True, models=())
    objective = load("gtpo", official_code=True, threshold=math.inf).objective
    whole = case.run(objective)
    parts = [case.run(objective, rows=rows) for rows in ([0, 1, 2], [3, 4, 5])]
    assert close(parts[0].grad + parts[1].grad, whole.grad, 12)


def test_with_a_clip_it_is_ppos_from_the_student_before_the_step():
    """Two prompts' rollouts of the student before the step; nothing is said of the sampler."""
    case = step(2, fresh=False, models=())
    clipped = load("gtpo", clip=(0.1, 0.1), gamma=0.0, threshold=math.inf)
    out = case.run(clipped.objective)
    now, before = (at(x.log_softmax(-1), case.tokens) for x in (case.student, case.before))
    r, a = (now - before).exp(), out.terms[0].credit * out.terms[0].weight
    loss = -torch.minimum(r * a, r.clamp(0.9, 1.1) * a)
    expected = (torch.where(case.mask, loss, 0.0).sum(1) / case.mask.sum(1)).mean()
    assert close(out.loss, expected, 10)
    # a cap is on what the sampler says, which is then read
    assert "sampler" in load("gtpo", rollout_cap=2.0).needs.models


def test_bad_arguments_are_explained():
    for name in ("weight", "gamma", "threshold"):
        with pytest.raises(UserError, match=f"{name}=-1.0 must be at least 0: it is"):
            load("gtpo", **{name: -1.0})
        with pytest.raises(UserError, match=f"{name}=nan is no number"):
            load("gtpo", **{name: math.nan})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"official_code": True},
        {"threshold": math.inf},
        {"threshold": 4.4, "gamma": 0.0},
        {"threshold": 4.4, "weight": 0.5, "gamma": 2.0, "clip": 0.2},
        {"threshold": 4.4, "official_code": True, "rollout_cap": 1.1},
    ],
)
def test_check(arguments):
    """Of nearly flat distributions over 131 tokens, whose entropies lie around 4.4: that threshold
    leaves some rollouts out, the usual one is not in force.
    """
    check(load("gtpo", **arguments))

"""TCOD: the credit and its denominators, what of an episode is learnt, and when it is OPD."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.curricula import Depth, PassRates
from opdkit.methods.method import load
from opdkit.objective import Objective, Signal
from opdkit.objective.batch import Batch
from opdkit.testing import check, evaluate
from tests.methods.ragged import LEVEL, on, shifted, slopes
from tests.methods.toy import close

TURNS = [[0.2, -0.1], [0.4]]  # credit of two turns' tokens


def per(method, denominator: str) -> Objective:
    return Objective(*(term.per(denominator) for term in method.objective.terms))


def fresh(method, credits=TURNS, **facts):
    student = [[LEVEL] * len(row) for row in credits]
    return on(method, student, models={"teacher": shifted(credits)}, **facts)


def test_token_mean_and_row_mean():
    """Card, identity 7: -(0.2 - 0.1 + 0.4) / 3, and -(0.05 + 0.4) / 2 with a turn as a row."""
    assert close(fresh(load("tcod")).loss, -0.166667)
    assert close(fresh(per(load("tcod"), "rows")).loss, -0.225)


@dataclass(frozen=True)
class EachTurnAlike(Signal):
    """[B, T]: trained tokens per turn, over the tokens of the token's own turn."""

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        rows = torch.arange(len(batch.turn))[:, None].expand_as(batch.turn)
        turn = rows * (batch.turn.max() + 1) + batch.turn
        counts = torch.bincount(turn[batch.mask], minlength=int(turn.max()) + 1)
        return batch.mask.sum() / (counts > 0).sum() / counts[turn].clamp_min(1)


def test_row_mean_of_turns_that_are_one_rollout():
    """The same two turns in one episode, what the environment says between them."""
    episode, turn = [[0.2, -0.1, 9.0, 0.4]], torch.tensor([[0, 0, 0, 1]])
    tool = torch.tensor([[False, False, True, False]])
    facts = {"turn": turn, "marks": {"tool": tool}}
    assert close(fresh(load("tcod"), episode, **facts).loss, -0.166667)
    alike = load("tcod") * EachTurnAlike()
    assert close(fresh(alike, episode, **facts).loss, -0.225)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_scale(scale):
    """Card, identity 6: it scales the credit, and with it loss and gradient."""
    plain, scaled = fresh(load("tcod")), fresh(load("tcod", scale=scale))
    assert close(scaled.terms[0].credit, scale * plain.terms[0].credit, 12)
    assert close(scaled.loss, (scale * plain.loss).item(), 12)
    assert close(scaled.grad, scale * plain.grad, 12)


def test_agreement_is_zero():
    """Card, identity 6."""
    out = fresh(load("tcod", scale=7.0), [[0.0, 0.0], [0.0]])
    assert out.loss == 0 and (out.terms[0].credit == 0).all() and (out.grad == 0).all()


def random_case(seed: int, given: bool = True):
    """Logits [4, 9, 6] of a student that has moved since it wrote, and of a teacher; who wrote what
    of episodes whose rows are padded.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (4, 9)
    live, before, sampler, teacher = (
        torch.randn(*shape, 6, generator=g, dtype=torch.float64) for _ in range(4)
    )
    mask = torch.arange(9) < torch.tensor([[9], [7], [5], [1]])
    who = torch.randint(3, shape, generator=g)
    who[0, 0] = 0
    marks = {"given": (who == 1) & given, "tool": who == 2}
    ids = torch.randint(6, shape, generator=g)
    return (live, before, sampler, teacher), ids, mask, marks


def naive(cube, ids, drawn, scale):
    """Loss and gradient, written out: -scale/n sum pi_s/pi_sampler (log pi_t - log pi_s before)."""
    live, before, sampler, teacher = cube
    x = live.clone().requires_grad_()

    def logp(logits):
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    ratio, credit = (logp(x) - logp(sampler)).exp(), logp(teacher) - logp(before)
    total = sum(
        ratio[b, t] * scale * credit[b, t]
        for b, t in drawn.nonzero().tolist()  # the student's tokens, one by one
    )
    loss = -total / int(drawn.sum())
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("policy", ["on", "off"])
@pytest.mark.parametrize("direction", ["f2b", "b2f"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_against_autograd(direction, scale, policy):
    for seed in range(3):
        cube, ids, mask, marks = random_case(seed)
        if policy == "on":
            cube = (cube[0], cube[0], cube[0], cube[3])
        loss, grad = naive(cube, ids, mask & ~marks["given"] & ~marks["tool"], scale)
        out = evaluate(
            load("tcod", direction=direction, scale=scale),
            cube[0],
            ids,
            mask,
            models={"teacher": cube[3]},
            before_logits=cube[1],
            sampler_logits=cube[2],
            marks=marks,
        )
        assert abs(out.loss - loss) < 1e-8 and (out.grad - grad).abs().max() < 1e-8


def test_what_others_wrote_has_no_gradient():
    """Card, identity 5: replayed turns, observations, padding; whatever the teacher says there."""
    cube, ids, mask, marks = random_case(5)
    others = ~mask | marks["given"] | marks["tool"]
    out = evaluate(load("tcod"), cube[0], ids, mask, models={"teacher": cube[3]}, marks=marks)
    assert (out.grad[others] == 0).all() and (out.grad[~others].abs().sum(-1) > 0).all()
    wild = torch.where(others[..., None], 50 * cube[3], cube[3])
    again = evaluate(load("tcod"), cube[0], ids, mask, models={"teacher": wild}, marks=marks)
    assert torch.equal(again.grad, out.grad) and torch.equal(again.loss, out.loss)


@pytest.mark.parametrize("arguments", [{}, {"clip": (0.2, 0.2)}, {"rollout_cap": 2.0}])
def test_on_whole_episodes_it_is_opd(arguments):
    """Card, identity 3: only the depth differs."""
    assert load("tcod", **arguments).objective == load("opd", **arguments).objective
    assert load("tcod").curriculum == Depth("f2b", 2, 1)


def test_clipped_as_in_the_papers_code():
    """max(-A rho, -A clip(rho)) at rho = 1.5 and A = 0.4, -0.4: -0.48 and 0.6."""
    student, half = [[LEVEL], [LEVEL]], 0.4054651081081644  # log 1.5
    out = on(
        load("tcod", clip=(0.2, 0.2)),
        [[LEVEL + half], [LEVEL + half]],
        models={"teacher": shifted([[0.4], [-0.4]])},
        before=student,
        sampler=student,
    )
    assert close(out.loss, (-0.48 + 0.6) / 2)
    assert close(slopes(out, [[LEVEL + half], [LEVEL + half]]), [0.0, 0.3])


def test_its_curriculum_stands_beside_no_pass_rates():
    """Stopped episodes do not say how often a game is won."""
    with pytest.raises(UserError, match="cannot be combined"):
        load("tcod") * load("paced")
    assert (load("tcod") * load("iw_opd")).curriculum == Depth()
    assert load("paced").curriculum == PassRates()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"direction": "b2f", "eta": 5}, {"scale": 0.5, "start": 3}, {"clip": (0.2, 0.2)}],
)
def test_check(arguments):
    check(load("tcod", **arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"direction": "up"}, "one of f2b, b2f"), ({"eta": 0}, "at least 1"), ({"start": 0}, "turns")],
)
def test_bad_arguments_are_explained(arguments, words):
    with pytest.raises(UserError, match=words):
        load("tcod", **arguments)

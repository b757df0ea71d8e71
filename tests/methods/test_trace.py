"""TRACE: the hand-over from divergence to GRPO, what a span's tokens learn from, and the limits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.methods.trace import Fading
from opdkit.testing import Case, check, evaluate, fabricate
from tests.methods.ragged import on, slopes
from tests.methods.steps import GROUPS, advantages, agrees, at, ppo, step
from tests.methods.toy import P_S, P_T, at_distance, close, logits, numbers, reverse_kl_gradient

ALONE = {"reward": [1.0], "group": [0]}  # A = 1


def fading(k, **arguments):
    case = fabricate(load("trace", **arguments).objective)
    batch = replace(case, settings={**case.settings, "step": k}).batch(load("trace").objective)
    return Fading(arguments.get("start", 10), arguments.get("length", 30))(batch).item()


def test_schedule():
    for k, weight in ((0, 0.5), (9, 0.5), (10, 0.5), (11, 0.483333), (25, 0.25), (39, 0.016667)):
        assert 0.5 * fading(k) == pytest.approx(weight, abs=5e-7)
    assert fading(40) == fading(1000) == 0
    weights = [0.5 * fading(k) for k in range(60)]
    assert sum(weights) == pytest.approx(12.75)
    assert sum(w * w for w in weights) == pytest.approx(5.126389, abs=5e-7)


def test_a_hand_over_at_once():
    assert [fading(k, start=2, length=0) for k in range(4)] == [1, 1, 0, 0]


DISTANCES = (0.9, 0.04, 0.08, 0.7)
SPAN = torch.tensor([[False, True, True, False]])


def on_four(k, distances=DISTANCES, span=SPAN, **arguments):
    """T = 4, r = 1, A = 1, and these divergences of student and teacher."""
    student = numbers(*P_S)
    teacher = torch.stack([at_distance(student, nats) for nats in distances])
    method = load("trace", action="reverse", cap=None, **arguments)
    return evaluate(
        method,
        logits(*[P_S] * 4),
        torch.zeros(1, 4, dtype=torch.int64),
        models={"teacher": teacher.log()[None]} if "teacher" in method.needs.models else {},
        marks={"error": span},
        step=k,
        total_steps=100,
        **ALONE,
    )


@pytest.mark.parametrize(("k", "loss"), [(0, -0.485), (25, -0.7425), (40, -1.0), (99, -1.0)])
def test_losses_of_four_tokens(k, loss):
    out = on_four(k)
    assert close(out.loss, loss)
    if k == 0:
        assert close(torch.stack([t.value for t in out.terms]), (-0.5, 0.015))


@pytest.mark.parametrize("k", [0, 25, 40])
def test_what_the_teacher_says_outside_the_span_does_not_matter(k):
    ours, other = on_four(k), on_four(k, (0.1, 0.04, 0.08, 0.2))
    assert torch.equal(ours.loss, other.loss) and torch.equal(ours.grad, other.grad)


@pytest.mark.parametrize("k", [0, 25])
def test_without_a_span_it_is_grpo(k):
    out = on_four(k, span=torch.zeros(1, 4, dtype=torch.bool))
    assert close(out.loss, -1.0, 12) and out.terms[1].value == 0
    grpo = on_four(k, w0=0.0)
    assert torch.equal(out.grad, grpo.grad) and grpo.grad.norm() > 0


def test_after_the_hand_over_it_is_grpo_to_the_bit():
    case = fabricate(load("trace").objective)
    late = replace(case, settings={**case.settings, "step": 40, "total_steps": 100})
    ours, grpo = (
        late.run(load(name, **arguments).objective)
        for name, arguments in (("trace", {}), ("grpo", {"clip": (0.2, 0.28)}))
    )
    assert torch.equal(ours.loss, grpo.loss) and torch.equal(ours.grad, grpo.grad)


def test_no_weight_is_grpo_at_every_step_without_a_teacher():
    made = load("trace", w0=0.0)
    assert made.objective == load("grpo", clip=(0.2, 0.28)).objective
    assert not made.models and not made.annotate and "teacher" not in made.needs.models


@pytest.mark.parametrize("k", [0, 9, 25])
def test_who_teaches_a_token(k):
    """Before step 10 span tokens have no gradient of the reward; tokens outside have none of the
    teacher at any step.
    """
    out, blind = on_four(k), on_four(k, (0.0,) * 4)  # a teacher that agrees teaches nothing
    of_teacher = (out.grad - blind.grad)[0].norm(dim=-1)
    assert (of_teacher[[0, 3]] == 0).all() and (of_teacher[[1, 2]] > 0).all()
    of_reward = blind.grad[0].norm(dim=-1)
    assert (of_reward[[0, 3]] > 0.1).all() and ((of_reward[[1, 2]] < 1e-8) == (k < 10)).all()


def span_gradient(action, mark, student=P_S, teacher=P_T, **arguments):
    """[V]: at a span token of one, at the first step, over its weight."""
    out = evaluate(
        load("trace", action=action, **arguments),
        logits(student),
        torch.zeros(1, 1, dtype=torch.int64),
        models={"teacher": logits(teacher)},
        marks={mark: torch.tensor([[True]])},
        total_steps=100,
        **ALONE,
    )
    return out.grad[0, 0] / 0.5


def test_forward_kl_lifts_what_the_teacher_wants_and_reverse_kl_only_what_is_there():
    lift = span_gradient("forward", "key", cap=None)
    assert close(lift, numbers(*P_S) - numbers(*P_T), 12)
    weighed = span_gradient("reverse", "error", cap=None)
    assert close(weighed, reverse_kl_gradient(P_S, P_T), 12)
    # the teacher wants a token that the student hardly has
    rare, wanted = (1e-9, 0.5, 0.5 - 1e-9), (0.6, 0.2, 0.2)
    assert close(span_gradient("forward", "key", rare, wanted, cap=None)[0], -0.6)
    assert span_gradient("reverse", "error", rare, wanted, cap=None)[0].abs() < 1e-7


def test_the_cap_bounds_each_entry_from_above():
    """KL(pi_t || pi_s) has the entries -0.183258, 0.255413, 0.121640: capped at 0.05 only the first
    has a gradient, p_t (p_s - 1 at it).
    """
    out = evaluate(
        load("trace"),
        logits(P_S),
        torch.zeros(1, 1, dtype=torch.int64),
        models={"teacher": logits(P_T)},
        marks={"key": torch.tensor([[True]])},
        total_steps=100,
        **ALONE,
    )
    assert close(out.terms[1].value, 0.5 * (-0.183258 + 0.05 + 0.05))
    assert close(out.grad[0, 0] / 0.5, 0.2 * (numbers(*P_S) - numbers(1, 0, 0)), 12)


def test_a_span_of_the_other_kind_is_learnt_from_as_any_token():
    """d of the inactive mark is not in the loss, and its tokens keep the reward."""
    for action, idle in (("forward", "error"), ("reverse", "key")):
        out = span_gradient(action, idle)
        assert close(out * 0.5, numbers(*P_S) - numbers(1, 0, 0), 12)  # -A grad log pi_s(0)
    for mark, action in (("key", "forward"), ("error", "reverse")):
        assert torch.equal(span_gradient("both", mark), span_gradient(action, mark))


def test_the_ratio_is_clipped_higher_above():
    student, before = [[-1.0, -1.0, -1.0]], [[-1.25, -1.2, -0.75]]  # r = 1.284, 1.221, 0.779
    up = on(load("trace", w0=0.0), student, before=before, **ALONE)
    assert close(slopes(up, student), [0.0, -1.221403 / 3, -0.778801 / 3])
    down = on(load("trace", w0=0.0), student, before=before, reward=[-1.0], group=[0])
    assert close(slopes(down, student), [1.284025 / 3, 1.221403 / 3, 0.0])


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    ("action", "k"), list(itertools.product(("forward", "reverse", "both"), (0, 25, 50)))
)
def test_it_is_the_naive_formula(action, k, fresh):
    case = step(5, fresh, step=k, total_steps=100)
    g = torch.Generator().manual_seed(2)
    right = torch.rand(6, generator=g) > 0.5
    spans = torch.rand(6, 5, generator=g) > 0.5
    marks = {"key": spans & right[:, None], "error": spans & ~right[:, None]}
    case = replace(case, marks=marks)
    f = {0: 1.0, 25: 0.5, 50: 0.0}[k]

    def reference(ls, said):
        y, lt = case.tokens, said["teacher"]
        a = advantages(case.columns["reward"], GROUPS, std=True)[:, None]
        r = (at(ls, y) - at(said["before"], y)).exp()
        outer = (at(said["before"], y) - at(said["sampler"], y)).exp()
        grpo = ppo(r, a, 0.2, 0.28) * outer
        total = 0.0
        for b in range(6):
            where = case.mask[b].nonzero()[:, 0].tolist()
            part = 0.0
            for t in where:
                key = action != "reverse" and marks["key"][b, t].item()
                error = action != "forward" and marks["error"][b, t].item()
                part = part + (1 - f if key or error else 1) * grpo[b, t]
                p, q = ls[b, t], lt[b, t]
                if key:
                    part = part + 0.5 * f * (q.exp() * (q - p)).clamp(max=0.05).sum()
                if error:
                    part = part + 0.5 * f * (p.exp() * (p - q)).clamp(max=0.05).sum()
            total = total + part / len(where)
        return total / 6

    assert agrees(load("trace", action=action), case, reference)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"action": "reverse"},
        {"action": "both", "start": 0},
        {"cap": None, "clip": None},
        {"w0": 0.0},
        {"length": 0},
    ],
)
def test_check(arguments):
    check(load("trace", **arguments))


def test_what_it_brings():
    made = load("trace", sync=7)
    assert made.models == {
        "teacher": {"kind": "self", "weights": "sync", "every": 7, "view": "span_types"}
    }
    assert made.annotate == {"spans": {"kind": "spans", "by": "rules"}}
    assert {c for c in made.needs.columns if c.startswith("mark:")} == {"mark:key"}
    assert isinstance(fabricate(made.objective), Case)


def test_bad_arguments_are_explained():
    for arguments, message in (
        ({"action": "all"}, "must be one of forward, reverse, both"),
        ({"w0": -1}, "at least 0"),
        ({"start": -1}, "at least 0"),
        ({"length": -1}, "at least 0"),
        ({"sync": 0}, "at least 1"),
        ({"cap": 0.0}, "above 0"),
    ):
        with pytest.raises(UserError, match=message):
            load("trace", **arguments)

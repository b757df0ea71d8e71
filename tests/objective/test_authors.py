"""Who wrote a token: what the student did not draw is in no credit, baseline, sum, quantile or
selection, and is learnt from only where a term asks for it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.curricula import Mixed
from opdkit.methods.method import Method, load, methods
from opdkit.objective import (
    Batch,
    ColumnFact,
    Divergence,
    Entropy,
    EntropyFact,
    Likelihood,
    LogRatio,
    Mark,
    Objective,
    PolicyGradient,
    Quantile,
    credit_of,
)
from opdkit.testing import Case, evaluate, fabricate
from opdkit.types import AUTHORS, MARK_OF
from tests.common.toy import naive
from tests.methods.toy import binary, close, tokens

MARKS = tuple(MARK_OF.values())
MULTIPLIERS = (
    "iw_opd",
    "iw_opd(mean_one=True)",
    "tip",
    "tip(selection=sample)",
    "paced",
    "drift_gating",
    "position_opd",
    "position_opd(part=last)",
    "scope",
    "reopold",
    "gtpo",
)


def with_others(objective: Objective) -> Case:
    """Made-up rollouts of which a teacher began some, the data gave one, and tools wrote into two;
    all marked as trained.
    """
    case = fabricate(objective)
    others = {mark: torch.zeros_like(case.tokens, dtype=torch.bool) for mark in MARKS}
    others["guided"][0, :2] = others["guided"][3, :1] = True
    others["given"][4] = True
    others["tool"][0, 3:5] = others["tool"][5, 1] = True
    return replace(case, mask=torch.ones_like(case.mask), marks={**case.marks, **others})


def drawn(case: Case) -> Tensor:
    """[B, T] bool: the student's own tokens."""
    return ~torch.stack([torch.as_tensor(case.marks[m]) for m in MARKS]).any(0)


# ------------------------------------------------------------------------------------ of one method


@pytest.mark.parametrize("name", methods())
def test_marked_tokens_count_as_those_outside_the_mask(name: str) -> None:
    """For every method that does not ask for them: the same loss and gradient, to the bit."""
    objective = load(name).objective
    asked = {MARK_OF[a] for term in objective.terms for a in term.whose if a != "student"}
    case = with_others(objective)
    marks = {k: v for k, v in case.marks.items() if k not in asked}
    others = torch.stack([marks[m] for m in MARKS if m in marks]).any(0)
    kept = {k: v for k, v in case.marks.items() if k in asked or k not in MARKS}
    out = case.run(objective)
    without = replace(case, mask=case.mask & ~others, marks=kept).run(objective)
    assert torch.equal(out.loss, without.loss) and torch.equal(out.grad, without.grad)
    assert (out.grad[others] == 0).all() and out.grad.norm() > 0


def test_who_asks_for_what_others_wrote() -> None:
    asking = {
        name: sorted({a for t in load(name).objective.terms for a in t.whose} - {"student"})
        for name in methods()
    }
    assert {k: v for k, v in asking.items() if v} == {
        "tropd": ["guide"],
        "distillm": ["data"],
        "gold": ["data"],
        "sft": ["data", "guide"],
        "eksft": ["data", "guide"],
        "f_dpo": ["data"],
        "hypo": ["data"],
    }
    assert load("gkd(lmbda=0.5)").objective.terms[0].whose == ("student", "data")


# -------------------------------------------------------------------------------------- of several


def refused(expression: str) -> Method | None:
    try:
        return load(expression)
    except UserError:
        return None


def composed(base: str) -> list[Method]:
    """Every accepted product and sum of a method with the others."""
    products = [refused(f"{base} * {weight}") for weight in MULTIPLIERS]
    sums = [refused(f"{base} + 0.5 * {other}") for other in methods() if other > base]
    accepted = [made for made in (*products, *sums) if made is not None]
    # a teacher with a tokenizer of its own has nothing to say of the student's ids: refused as well
    return [m for m in accepted if not (m.needs.spans("teacher") and m.needs.ids("teacher"))]


@pytest.mark.parametrize("base", [*methods(), "gkd(lmbda=0.5)", "kl_mixing(prefix=teacher)"])
def test_no_policy_gradient_where_the_student_did_not_draw(base: str) -> None:
    """And elsewhere the gradient of the naive dense graph."""
    for made in composed(base):
        objective = made.objective
        case = with_others(objective)
        own, out = drawn(case), case.run(objective)
        apart = made.needs.spans("teacher")  # a tokenizer of its own: see test_gold
        loss, grad = (out.loss, out.grad) if apart else naive(objective, case)
        assert (out.grad - grad).norm() <= 1e-9 * grad.norm(), made.name
        assert abs(out.loss - loss) <= 1e-9 * max(1, abs(loss)), made.name
        for term, planned in zip(objective.terms, out.terms):
            allowed = case.batch(objective).by(
                ("student",) if credit_of(term.loss) is not None else term.whose
            )
            assert (planned.weight[~allowed] == 0).all(), made.name
        asked = {a for term in objective.terms for a in term.whose}
        if asked == {"student"}:
            assert (out.grad[~own] == 0).all(), made.name


# Four tokens of which the teacher wrote the first two, then three further of the student's; every
# log-ratio is 0.3 nats but where said.
LOGP = (-1.0, -1.0, -1.0, -1.0, -1.0, -1.0)
GUIDED = torch.tensor([[True, True, False, False, False, False]])


def on(expression: str, gaps: tuple[float, ...], marks: dict[str, Tensor], **more):  # type: ignore[no-untyped-def]
    student = binary(LOGP[: len(gaps)])
    teacher = binary([x + gap for x, gap in zip(LOGP, gaps)])
    return evaluate(
        load(expression), student, tokens(*[0] * len(gaps)), models={"teacher": teacher},
        marks=marks, **more,
    )  # fmt: skip


def test_a_teachers_tokens_spend_no_budget() -> None:
    """|r| = 9, 9 of the teacher's, then 0.4, 0.1, 0.3, 0.2: the weight is 2 less the share of the
    student's own 1.0 that lies before, whatever the teacher's tokens are.
    """
    gaps = (-9.0, -9.0, 0.4, 0.1, 0.3, 0.2)
    uniform = torch.zeros(1, 6, dtype=torch.float64)  # every token is trusted
    out = on("tropd * iw_opd(gamma=1)", gaps, {"guided": GUIDED}, uniform=uniform)
    assert close(out.terms[0].weight, [[0, 0, 2.0, 1.6, 1.5, 1.2]])
    # the likelihood of the teacher's tokens is none of iw_opd's
    assert close(out.terms[2].weight, [[0.001, 0.001, 0, 0, 0, 0]])


def test_a_teachers_tokens_are_paid_no_reward() -> None:
    out = on(
        "tropd + 0.1 * grpo", (0.3,) * 6, {"guided": GUIDED}, reward=[1.0], group=[0],
        uniform=torch.zeros(1, 6, dtype=torch.float64),
    )  # fmt: skip
    [grpo] = [term for term in out.terms if term.credit is not None and term.name.endswith("_2")]
    assert grpo.weight[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5]
    assert grpo.denominator.item() == 4  # rows: the mean over its own four tokens


@pytest.mark.parametrize(("share", "trained"), [(0.3, 2), (0.5, 2), (1.0, 4)])
def test_positions_are_among_the_students(share: float, trained: int) -> None:
    """ceil(share * 4) of the student's own four tokens."""
    out = on(
        f"tropd * position_opd(share={share})", (0.3,) * 6, {"guided": GUIDED},
        uniform=torch.zeros(1, 6, dtype=torch.float64),
    )  # fmt: skip
    assert out.terms[0].weight[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5][:trained]


def test_a_selection_is_among_the_students() -> None:
    """tip keeps floor(0.5 * 4) of the student's four tokens, though the teacher's own two have the
    largest divergence.
    """
    gaps = (0.9, 0.9, 0.1, 0.5, 0.2, 0.4)
    out = on("tropd * tip", gaps, {"guided": GUIDED}, uniform=torch.zeros(1, 6).double())
    assert out.terms[0].weight[0].nonzero()[:, 0].tolist() == [3, 5]


def test_a_discount_counts_what_the_student_drew() -> None:
    """r = 0.2, 50 tokens of a tool, -0.5: the first is credited with 0.2 - 0.9 * 0.5."""
    student = binary([-1.0] * 52)
    teacher = binary([-0.8, *[-0.1] * 50, -1.5])
    tool = torch.tensor([[False, *[True] * 50, False]])
    how = {"models": {"teacher": teacher}, "marks": {"tool": tool}}
    out = evaluate(load("opd", discount=0.9), student, tokens(*[0] * 52), **how)
    assert close(out.terms[0].credit[0, :1], [0.2 - 0.9 * 0.5], 12)
    assert close(out.terms[0].credit[0, -1:], [-0.5], 12)
    gae = evaluate(
        load("gae_opd", discount=0.9, lam=1.0, value="zero"), student, tokens(*[0] * 52), **how
    )
    assert torch.equal(gae.terms[0].credit, out.terms[0].credit)


def test_no_policy_gradient_runs_on_data_text() -> None:
    given = torch.ones(1, 3, dtype=torch.bool)
    out = on("gkd(lmbda=0.5) + opd", (0.3, -0.2, 0.5), {"given": given})
    assert (out.terms[1].weight == 0).all() and out.terms[1].value == 0
    alone = on("gkd", (0.3, -0.2, 0.5), {})
    assert torch.equal(out.grad, alone.grad) and out.terms[0].denominator == 3


def test_a_weight_of_tokens_leaves_data_text_to_its_own_method() -> None:
    given = torch.ones(1, 3, dtype=torch.bool)
    for weight in ("iw_opd(mean_one=True)", "tip", "position_opd", "drift_gating"):
        out = on(f"gkd(lmbda=0.5) * {weight}", (0.3, -0.2, 0.5), {"given": given})
        assert torch.equal(out.grad, on("gkd", (0.3, -0.2, 0.5), {}).grad), weight


def test_a_guided_rollout_has_the_pass_rate_of_its_question() -> None:
    """Two of three answers to it are right: p (1 - p) of all three, over their mean, is 1."""
    student = binary([-1.0] * 3).expand(3, 3, 2)
    out = evaluate(
        load("tropd * paced"), student, torch.zeros(3, 3).long(), models={"teacher": student},
        marks={"guided": torch.tensor([[False] * 3, [False] * 3, [True, False, False]])},
        reward=[1.0, 0.0, 1.0], group=[0, 0, 0], uniform=torch.zeros(3, 3).double(),
    )  # fmt: skip
    assert close(out.terms[0].weight, [[1, 1, 1], [1, 1, 1], [0, 1, 1]], 12)


# ------------------------------------------------------------------------------------------ a term


def test_a_term_says_whose_tokens_it_is_about() -> None:
    r = LogRatio("teacher", "student")
    assert Objective(Likelihood()).terms[0].whose == ("student",)
    assert Objective(Likelihood().of("data")).terms[0].whose == ("data",)
    assert (Likelihood() * Mark("guided") * 0.5).whose == ("student", "guide")
    assert (Likelihood() * (Mark("tool") & ~Mark("newline"))).whose == ("student", "environment")
    mixed = Method(
        Likelihood().of("data") + Divergence("jsd") + PolicyGradient(r), curriculum=Mixed(0.5)
    )
    assert [t.whose for t in mixed.objective.terms] == [
        ("data",),
        ("student", "data"),
        ("student", "data"),
    ]
    # another method's terms that are added are not its own
    assert (mixed + load("opd(support=full)")).objective.terms[-1].whose == ("student",)
    assert "of student and data" in str(mixed) and "of data" in str(mixed)
    with pytest.raises(ValueError, match="written by student, guide, data, environment"):
        Likelihood().of("nobody")


def test_what_a_loss_of_data_text_is_weighed_by_is_known_of_the_students_tokens() -> None:
    """No term is about these, but the median that the weight compares with is theirs."""
    h = Entropy("student")
    objective = Objective(Likelihood().of("data") * (h >= Quantile(h, 0.5)))
    case = fabricate(objective)
    given = (torch.arange(6) > 3)[:, None].expand(6, 7)
    case = replace(case, mask=torch.ones_like(case.mask), marks={"given": given})
    assert case.before is not None
    entropy = torch.distributions.Categorical(logits=case.before).entropy()
    median = entropy[:4].quantile(0.5)
    read = case.batch(objective).read(EntropyFact("student"))
    assert torch.allclose(read, entropy, rtol=1e-12)
    expected = torch.where(given, entropy >= median, False)
    assert torch.equal(case.run(objective).terms[0].weight != 0, expected)
    assert 0 < expected.sum() < given.sum()


def test_of_a_batch() -> None:
    trained = torch.tensor([[True, True, True, False]])
    marks = {
        ColumnFact("mark:guided"): torch.tensor([[True, False, False, False]]),
        ColumnFact("mark:tool"): torch.tensor([[False, False, True, True]]),
    }
    batch = Batch(torch.zeros(1, 4).long(), trained, marks)
    assert batch.mask.tolist() == [[False, True, False, False]]
    assert batch.by(("guide",)).tolist() == [[True, False, False, False]]
    assert batch.by(("student", "environment")).tolist() == [[False, True, True, False]]
    assert torch.equal(batch.by(AUTHORS), trained) and not batch.by(("data",)).any()


def test_own_counts_what_a_method_selects_not_what_it_is_multiplied_by() -> None:
    """tip on half the tokens; rollouts without weight do not make the others' tokens fewer."""
    objective = load("tip * paced").objective
    case = replace(fabricate(objective), columns={"group": [0, 0, 0, 1, 1, 1]})
    rewards = ([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    counts = []
    for reward in rewards:
        out = replace(case, columns={**case.columns, "reward": reward}).run(objective)
        counts.append(out.terms[0].denominator.item())
        none = out.terms[0].weight[3:].abs().sum() == 0
        assert bool(none) == (reward == rewards[0])
    alone = replace(case, columns={}).run(load("tip").objective)
    assert counts == [alone.terms[0].denominator.item()] * 2


def test_log_ratios_stop_at_twenty_nats() -> None:
    far = binary([-30.0, -1.0])
    out = evaluate(
        PolicyGradient(LogRatio("teacher", "sampler")), binary([-1.0, -1.0]), tokens(0, 0),
        models={"teacher": binary([-29.0, -0.5])}, before_logits=far,
    )  # fmt: skip
    assert close(out.loss, -(math.exp(20) * 1.0 + 0.5) / 2, -3) and (out.grad[0, 0] == 0).all()

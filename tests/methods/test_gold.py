"""GOLD: spans, merged distributions and the hybrid loss in value and gradient; with one tokenizer
it is GKD.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective.alignment import EOS, OUT, Alignment
from opdkit.testing import Case, check, evaluate
from opdkit.testing.check import RULES
from tests.methods.toy import P_S, P_T, close, logits, tokens

ROWS = [(0.6, 0.3, 0.1), (0.2, 0.5, 0.3), (0.1, 0.1, 0.8)]
TEACHER = [(0.1, 0.7, 0.2), (0.2, 0.2, 0.6)]


def alignment(student, teacher, ids=None, same=None):
    """Of one rollout, from the ends of its tokens."""
    tokens = torch.tensor([ids or [0] * len(teacher)])
    return {
        "teacher": Alignment(
            tokens,
            torch.tensor([student]),
            torch.tensor([teacher]),
            None if same is None else torch.tensor(same),
        )
    }


SPANS = alignment([3, 5, 9], [5, 9])  # two tokens and one against one each


def gold(student, teacher, spans, ids=(0, 1, 2), **arguments):
    method = load("gold", **arguments)
    return evaluate(
        method,
        logits(*student),
        tokens(*ids),
        models={"teacher": logits(*teacher)},
        alignments=spans,
    )


# -------------------------------------------------------------------------------------------- spans


def test_extended_uld():
    """Identity 3: (.12, .3, .18) against (.1, .7, .2) is .4 + .02 + .02 = .44 sorted; the second
    span .4; mean .42.
    """
    out = gold(ROWS, TEACHER, SPANS, merge="bayesian")
    assert close(out.loss, 0.42) and out.terms[0].weight.tolist() == [[0, 1, 1]]
    observed = gold(ROWS, TEACHER, SPANS)  # (.3, .15, .05) against (.7, .2, .1): .5; again .4
    assert close(observed.loss, 0.45)


@pytest.mark.parametrize("merge", ["bayesian", "observed"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_the_gradient_goes_through_all_factors(merge, hybrid):
    """Against the formula written out, with spans of several tokens on both sides; and each of the
    rows has some.

    But a base whose ranks all lie on one side of the teacher's: its probabilities sum to 1 however
    they move.
    """
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 6, 5, generator=g).double(),
        torch.randn(1, 5, 7, generator=g).double(),
    )
    ids, others = [4, 0, 3, 3, 1, 2], [6, 2, 0, 5, 1]
    same = [2, -1, 0, 4, -1, -1, 3]
    spans = alignment([1, 3, 4, 8, 9, 12], [2, 4, 6, 9, 12], others, same)
    groups = [([0, 1, 2], [0, 1]), ([3, 4], [2, 3]), ([5], [4])]
    method = load(
        "gold",
        merge=merge,
        hybrid=hybrid,
        beta=0.3,
        student_temperature=1.5,
        teacher_temperature=0.8,
    )
    out = evaluate(method, student, tokens(*ids), models={"teacher": teacher}, alignments=spans)

    def merged(p, y, group):
        base, rest = (group[-1], group[:-1]) if merge == "bayesian" else (group[0], group[1:])
        return p[base] * torch.stack([p[k, y[k]] for k in rest] + [torch.ones(())]).prod()

    leaf = student.clone().requires_grad_()
    p, q = (leaf[0] / 1.5).softmax(-1), (teacher[0] / 0.8).softmax(-1)
    total = torch.zeros(())
    for mine, theirs in groups:
        a, b = merged(p, ids, mine), merged(q, others, theirs)
        if hybrid:
            t = torch.tensor([i for i, s in enumerate(same) if s >= 0])
            s = torch.tensor(same)[t]
            mix = 0.3 * b[t] + 0.7 * a[s]
            total = (
                total
                + 4 / 7 * (0.3 * b[t] * (b[t] / mix).log() + 0.7 * a[s] * (a[s] / mix).log()).sum()
            )
            a, b = a[[1]], b[[1, 4, 5]]
        rank = [
            torch.nn.functional.pad(x.sort(descending=True).values, (0, 7 - len(x))) for x in (a, b)
        ]
        total = total + (3 / 7 if hybrid else 1) * (rank[0] - rank[1]).abs().sum()
    (grad,) = torch.autograd.grad(total / 3, leaf)
    assert close(out.loss, (total / 3).item(), 9) and close(out.grad, grad, 9)
    factors = [0, 1, 3, 5] if merge == "bayesian" else [1, 2, 4, 5]
    assert (out.grad[0, range(6) if hybrid else factors].abs().sum(-1) > 1e-4).all()


def test_the_end_of_sequence_and_what_is_left_over():
    """V3.

    The student's last token is an end of sequence; the teacher's text stops at byte 6, one student
    token goes on.
    """
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 4, 5, generator=g).double(),
        torch.randn(1, 3, 7, generator=g).double(),
    )
    spans = alignment([3, 6, 7, -1], [3, 6, -1])
    out = evaluate(
        "gold", student, tokens(0, 0, 0, 0), models={"teacher": teacher}, alignments=spans
    )
    assert out.terms[0].weight.tolist() == [[1, 1, 0, 0]] and (out.grad[:, 2:] == 0).all()
    same = evaluate(
        "gold",
        student[:, :2],
        tokens(0, 0),
        models={"teacher": teacher[:, :2]},
        alignments=alignment([3, 6], [3, 6]),
    )
    assert close(out.loss, same.loss.item(), 12)
    one = evaluate(
        "gold",
        student[:, :2],
        tokens(0, 0),
        models={"teacher": teacher},
        alignments=alignment([3, -1], [3, -1, -1]),
    )
    assert one.loss > 0 and one.grad[:, 0].abs().sum() > 0  # an answer of one token teaches
    none = evaluate(
        "gold",
        student[:, :1],
        tokens(0),
        models={"teacher": teacher},
        alignments=alignment([-1], [-1, -1, -1]),
    )
    assert none.loss == 0 and (none.grad == 0).all()


def test_ends_of_sequence_are_a_span_where_they_are_asked_for():
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, 4, 5, generator=g).double(),
        torch.randn(2, 3, 7, generator=g).double(),
    )
    zeros = torch.zeros(2, 4, dtype=torch.int64)
    ends, others = (
        torch.tensor([[1, 3, 6, EOS], [2, 4, OUT, OUT]]),
        torch.tensor([[3, 6, EOS], [2, 4, OUT]]),
    )
    spans = {"teacher": Alignment(zeros[:, :3], ends, others, torch.arange(7) - 2)}
    mask = ends != OUT
    text = Alignment(
        zeros[:, :3],
        torch.tensor([[1, 3, 6, 7], [2, 4, -1, -1]]),
        torch.tensor([[3, 6, 7], [2, 4, -1]]),
        torch.arange(7) - 2,
    )
    for name in ("uld", "gold", "gold(hybrid=true)"):
        skipped = evaluate(
            name, student, zeros, mask, models={"teacher": teacher}, alignments=spans
        )
        assert skipped.terms[0].weight[0, 3] == 0 and (skipped.grad[0, 3] == 0).all()
        method = load(
            "uld" if name == "uld" else "gold",
            **{"hybrid": True} if "hybrid" in name else {},
            skip_eos=False,
        )
        kept = evaluate(method, student, zeros, mask, models={"teacher": teacher}, alignments=spans)
        same = evaluate(
            name, student, zeros, mask, models={"teacher": teacher}, alignments={"teacher": text}
        )
        assert (
            close(kept.loss, same.loss.item(), 12)
            and close(kept.grad, same.grad, 12)
            and kept.terms[0].weight[0, 3] == (name != "uld")
        )


def test_spans_with_tokens_the_student_did_not_choose_are_left_out():
    """A tool's token inside a span: the span is not trained, its text is still aligned."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 5, 5, generator=g).double(),
        torch.randn(1, 3, 7, generator=g).double(),
    )
    spans = alignment([1, 3, 5, 7, 9], [3, 7, 9])
    mask = torch.tensor([[True, True, False, True, True]])
    out = evaluate(
        load("gold", merge="bayesian"),
        student,
        tokens(*[0] * 5),
        mask,
        models={"teacher": teacher},
        alignments=spans,
    )
    assert out.terms[0].weight.tolist() == [[0, 1, 0, 0, 1]] and (out.grad[0, [2, 3]] == 0).all()
    # the first token of the first span is read, though its own weight is zero
    assert out.grad[0, 0].abs().sum() > 0.01


def test_mean_over_spans_then_over_rollouts():
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(3, 4, 5, generator=g).double(),
        torch.randn(3, 4, 7, generator=g).double(),
    )
    ends = torch.tensor([[1, 2, 3, 4], [2, 4, -1, -1], [-1, -1, -1, -1]])
    others = torch.tensor([[2, 4, -1, -1], [1, 2, 3, 4], [-1, -1, -1, -1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    zeros = torch.zeros(3, 4, dtype=torch.int64)
    case = Case(
        zeros,
        student,
        mask,
        {"teacher": teacher},
        alignments={"teacher": Alignment(zeros, ends, others)},
    )
    objective = load("gold", merge="bayesian").objective
    whole, parts = case.run(objective), case.run(objective, [[0], [1, 2]], chunk=1)
    alone = []
    for b, (n, u) in enumerate(((4, 2), (2, 4))):
        spans = alignment(ends[b, :n].tolist(), others[b, :u].tolist())
        out = evaluate(
            objective,
            student[[b], :n],
            zeros[:1, :n],
            models={"teacher": teacher[[b], :u]},
            alignments=spans,
        )
        alone.append(out.loss.item())
    assert close(whole.loss, sum(alone) / 3, 12)  # the third rollout has no text and counts
    assert close(parts.loss, whole.loss.item(), 12) and close(parts.grad, whole.grad, 12)


# ------------------------------------------------------------------------------------------- hybrid

STUDENT_VOCABULARY, TEACHER_VOCABULARY = "abc", "baXY"
SAME = [STUDENT_VOCABULARY.find(t) for t in TEACHER_VOCABULARY]
HYBRID = ((0.5, 0.058109, 0.016217), (0, 0.030913, -0.038175), (1, 0.134554, 0.169108))


@pytest.mark.parametrize(("beta", "value", "matched"), HYBRID)
def test_hybrid(beta, value, matched):
    """Identity 5, with the parts by fixed weights; the matched part may be negative, as it compares
    what is no distribution.
    """
    spans = alignment([1], [1], same=SAME)
    teacher = [(0.4, 0.3, 0.2, 0.1)]

    def loss(**weights):
        return gold([P_S], teacher, spans, (0,), hybrid=True, beta=beta, **weights).loss

    assert close(loss(), value)
    assert close(loss(matched_weight=1.0, unmatched_weight=0.0), matched)
    assert close(loss(matched_weight=0.0, unmatched_weight=1.0), 0.1)
    assert close(loss(matched_weight=2.0, unmatched_weight=3.0), 2 * matched + 0.3, 5)
    half = gold([P_S], teacher, spans, (0,), hybrid=True, beta=beta, distillation_weight=0.5)
    assert close(2 * half.loss, value)


def test_permuting_the_teachers_vocabulary_with_its_tokens_changes_nothing():
    """Identity 7."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 3, 5, generator=g).double(),
        torch.randn(1, 2, 7, generator=g).double(),
    )
    same = torch.tensor([2, -1, 0, 4, -1, -1, 3])
    for merge, order in itertools.product(
        ("bayesian", "observed"), ([6, 0, 3, 1, 5, 4, 2], [3, 2, 1, 0, 6, 5, 4])
    ):
        back = [order.index(i) for i in range(7)]
        method = load("gold", hybrid=True, merge=merge)
        base = evaluate(
            method,
            student,
            tokens(0, 1, 2),
            models={"teacher": teacher},
            alignments=alignment([2, 4, 9], [3, 9], [5, 1], same.tolist()),
        )
        moved = evaluate(
            method,
            student,
            tokens(0, 1, 2),
            models={"teacher": teacher[..., order]},
            alignments=alignment([2, 4, 9], [3, 9], [back[5], back[1]], same[order].tolist()),
        )
        assert close(base.loss, moved.loss.item(), 12) and close(base.grad, moved.grad, 12)


def test_longer_spans_by_rank():
    """The second span is one token on both sides and compared token by token; of the first, entries
    stand for different texts.
    """
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 3, 5, generator=g).double(),
        torch.randn(1, 2, 7, generator=g).double(),
    )
    same, ids = [2, -1, 0, 4, -1, -1, 3], tokens(4, 0, 1)
    both, models = alignment([1, 3, 4], [3, 4], [5, 1], same), {"teacher": teacher}
    ours = evaluate(
        load("gold", hybrid=True, longer="rank"), student, ids, models=models, alignments=both
    )
    last = alignment([4], [4], [1], same)
    single = evaluate(
        load("gold", hybrid=True),
        student[:, 2:],
        ids[:, 2:],
        models={"teacher": teacher[:, 1:]},
        alignments=last,
    )
    first = alignment([1, 3], [3], [5])
    rank = evaluate(
        "gold", student[:, :2], ids[:, :2], models={"teacher": teacher[:, :1]}, alignments=first
    )
    assert close(
        ours.loss, ((single.loss + 3 / 7 * rank.loss) / 2).item(), 12
    )  # 4 of the teacher's 7 tokens are the student's too
    assert close(ours.grad, torch.cat([3 / 7 * rank.grad, single.grad], 1) / 2, 12)
    fixed = load("gold", hybrid=True, longer="rank", matched_weight=1.0, unmatched_weight=2.0)
    alone = evaluate(
        fixed,
        student[:, :2],
        ids[:, :2],
        models={"teacher": teacher[:, :1]},
        alignments=alignment([1, 3], [3], [5], same),
    )
    assert close(alone.loss, 2 * rank.loss.item(), 12)


@pytest.mark.parametrize(
    "same", [[-1, -1, -1, -1], [1, 0, 2, -1]], ids=["nothing in common", "all of the student's"]
)
def test_a_side_without_tokens_of_its_own(same):
    """Nothing matched: the loss by rank alone. Nothing left on one side: no loss by rank."""
    out = gold([P_S], [(0.4, 0.3, 0.2, 0.1)], alignment([1], [1], same=same), (0,), hybrid=True)
    if max(same) < 0:
        assert close(
            out.loss, gold([P_S], [(0.4, 0.3, 0.2, 0.1)], alignment([1], [1]), (0,)).loss.item(), 12
        )
    else:
        weights = {"matched_weight": 0.75, "unmatched_weight": 9.0}
        fixed = gold(
            [P_S],
            [(0.4, 0.3, 0.2, 0.1)],
            alignment([1], [1], same=same),
            (0,),
            hybrid=True,
            **weights,
        )
        assert close(out.loss, fixed.loss.item(), 12)


# ------------------------------------------------------------------------------------ one tokenizer


def ragged():
    g = torch.Generator().manual_seed(1)
    student, teacher = (
        2 * torch.randn(3, 6, 11, generator=g, dtype=torch.float64) for _ in range(2)
    )
    return (
        student,
        teacher,
        torch.randint(11, (3, 6), generator=g),
        torch.arange(6) < torch.tensor([6, 3, 1])[:, None],
    )


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("hybrid", [False, True])
def test_with_the_students_tokenizer_it_is_gkd(beta, hybrid):
    """Identity 6: without an alignment the tokens are the same; denominator and end of sequence are
    gkd's as well.
    """
    student, teacher, ids, mask = ragged()
    ours = evaluate(
        load("gold", beta=beta, hybrid=hybrid), student, ids, mask, {"teacher": teacher}
    )
    gkd = evaluate(load("gkd", beta=beta), student, ids, mask, {"teacher": teacher})
    assert (
        close(ours.loss, gkd.loss.item(), 12)
        and close(ours.grad, gkd.grad, 12)
        and gkd.grad.norm() > 1e-3
    )
    warm = evaluate(
        load("gold", beta=beta, student_temperature=2.0, teacher_temperature=2.0),
        student,
        ids,
        mask,
        {"teacher": teacher},
    )
    assert close(
        warm.grad,
        evaluate(
            load("gkd", beta=beta, temperature=2.0), student, ids, mask, {"teacher": teacher}
        ).grad,
        9,
    )


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("merge", ["bayesian", "observed"])
def test_hybrid_over_spans_of_one_token_is_gkd(beta, merge):
    """Identity 6 through the spans: w_m is 1, and with denominators per rollout value and gradient
    are gkd's to 1e-9.
    """
    student, teacher, ids, mask = ragged()
    ends = torch.arange(1, 7).expand(3, -1).where(mask, torch.tensor(-1))
    spans = {"teacher": Alignment(ids, ends, ends, torch.arange(11))}
    ours = evaluate(
        load("gold", beta=beta, hybrid=True, merge=merge),
        student,
        ids,
        mask,
        {"teacher": teacher},
        alignments=spans,
    )
    objective = load("gkd", beta=beta).objective.terms[0].per("rows")
    gkd = evaluate(objective, student, ids, mask, {"teacher": teacher})
    assert close(ours.loss, gkd.loss.item(), 9) and close(ours.grad, gkd.grad, 9)


@pytest.mark.parametrize("pads", [(0, 5), (5, 0), (3, 5)], ids=str)
def test_padded_matrices_of_one_family_are_cut(pads):
    """V1, V2: heads of 151936 and 152064 rows over one tokenizer, in small; whatever the pad rows
    hold.
    """
    student, teacher, ids, mask = ragged()
    base = evaluate("gold", student, ids, mask, {"teacher": teacher})
    wide = [torch.nn.functional.pad(x, (0, n), value=3.0) for x, n in zip((student, teacher), pads)]
    if min(pads):
        wide[0] = student  # the run cuts its own head to the tokenizer's tokens
    out = evaluate("gold", wide[0], ids, mask, {"teacher": wide[1]})
    assert close(out.loss, base.loss.item(), 12) and close(out.grad[..., :11], base.grad, 12)


def test_padding_of_another_vocabulary_is_cut():
    """V2 between two families: rows of the teacher's matrix behind its tokenizer's last token."""
    spans = alignment([1], [1], same=SAME)
    base = gold([P_S], [(0.4, 0.3, 0.2, 0.1)], spans, (0,), hybrid=True)
    padded = torch.nn.functional.pad(logits((0.4, 0.3, 0.2, 0.1)), (0, 3), value=5.0)
    out = evaluate(
        load("gold", hybrid=True),
        logits(P_S),
        tokens(0),
        models={"teacher": padded},
        alignments=spans,
    )
    assert close(out.loss, base.loss.item(), 12) and close(out.grad, base.grad, 12)


# -------------------------------------------------------------------------------------- as a method


CHECKED = (
    {},
    {"hybrid": True},
    {"merge": "bayesian", "skip_eos": False},
    {"hybrid": True, "merge": "bayesian", "beta": 0},
    {"hybrid": True, "longer": "rank", "skip_eos": False, "student_temperature": 1.5},
)


@pytest.mark.parametrize("arguments", CHECKED, ids=str)
def test_check_passes(arguments):
    assert len(check(load("gold", **arguments)).passed) == len(RULES)


@pytest.mark.parametrize(
    "expression",
    [
        "0.5 * gold + uld",
        "gold * position_opd(share=0.5)",
        "gold(hybrid=true) + gold(merge=bayesian)",
    ],
)
def test_it_composes(expression):
    assert len(check(load(expression)).passed) == len(RULES)


def test_it_gives_no_weight():
    for name in ("uld", "gold"):
        with pytest.raises(UserError, match="has no weight"):
            load(f"opd * {name}")


def test_who_writes():
    assert (
        load("gold").curriculum.student_share == 0.5
        and load("gold", lmbda=1.0).curriculum.student_share == 1.0
    )


def test_what_needs_ids_is_refused_with_a_teacher_of_another_tokenizer():
    with pytest.raises(UserError, match="use gold or uld"):
        evaluate(
            "gkd",
            logits(P_S),
            tokens(0),
            models={"teacher": logits(P_T)},
            alignments=alignment([1], [1]),
        )
    with pytest.raises(UserError, match="say which cover the same text"):
        evaluate("gold", logits(P_S), tokens(0), models={"teacher": logits(P_T, P_T)})


def test_bad_arguments_are_explained():
    for arguments, why in (
        ({"merge": "index"}, "must be 'bayesian' or 'observed'"),
        ({"lmbda": 2.0}, "share of batches"),
        ({"beta": 1.5, "hybrid": True}, "must lie in"),
        ({"matched_weight": 1.0, "unmatched_weight": 1.0}, "set hybrid=True"),
        ({"matched_weight": 1.0, "hybrid": True}, "or neither"),
        ({"longer": "rank"}, "set hybrid=True"),
        ({"longer": "both", "hybrid": True}, "must be 'token' or 'rank'"),
        ({"teacher_temperature": -1.0}, "must be positive"),
    ):
        with pytest.raises(UserError, match=why):
            load("gold", **arguments)

"""Spans of two tokenisations against the walk written out, and the merged distributions that losses
see.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkit.objective.alignment import Alignment, align
from opdkit.objective.formula import Signal
from opdkit.objective.grammar import Objective
from opdkit.objective.head import cuts, flat_positions
from opdkit.objective.kernels.paired import Match, by_rank, descending, descending_values
from opdkit.objective.spans import SpanLoss
from opdkit.testing import Case
from tests.methods.toy import close, logits, tokens


def walk(s_ends: list[int], t_ends: list[int]) -> list[tuple[list[int], list[int]]]:
    """The card's words as a loop: advance the side that ends earlier, close where both end;
    left-overs are a last pair.
    """
    groups, s0, t0, s, t = [], 0, 0, 0, 0
    while s < len(s_ends) and t < len(t_ends):
        if s_ends[s] < t_ends[t]:
            s += 1
        elif s_ends[s] > t_ends[t]:
            t += 1
        else:
            s, t = s + 1, t + 1
            groups.append((list(range(s0, s)), list(range(t0, t))))
            s0, t0 = s, t
    groups.append((list(range(s0, len(s_ends))), list(range(t0, len(t_ends)))))
    return [(a, b) for a, b in groups if a and b]


def groups(
    s_rows: list[list[int]], t_rows: list[list[int]]
) -> list[list[tuple[list[int], list[int]]]]:
    """What `align` finds, row by row."""
    sides = [torch.full((len(rows), 2 + max(map(len, rows))), -1) for rows in (s_rows, t_rows)]
    for side, rows in zip(sides, (s_rows, t_rows)):
        for b, row in enumerate(rows):
            side[b, : len(row)] = torch.tensor(row)
    out: list[list[tuple[list[int], list[int]]]] = [[] for _ in s_rows]
    for last, count, end, others in zip(*(x.tolist() for x in align(*sides))):
        (b, j), (c, u) = divmod(last, sides[0].shape[1]), divmod(end, sides[1].shape[1])
        assert b == c
        out[b].append((list(range(j - count + 1, j + 1)), list(range(u - others + 1, u + 1))))
    return out


CARD = [
    ([3, 5, 9], [5, 9], [([0, 1], [0]), ([2], [1])]),
    ([2, 4, 6], [3, 6], [([0, 1, 2], [0, 1])]),
    # a third group of the student's has no other side
    ([3, 6, 7], [3, 6], [([0], [0]), ([1], [1])]),
    ([2, 5], [2, 3, 4, 5], [([0], [0]), ([1], [1, 2, 3])]),
    ([3, 5], [3, 6], [([0], [0]), ([1], [1])]),  # left over on both sides
    ([2, 2, 5], [2, 5], [([0], [0]), ([1, 2], [1])]),  # a token without bytes
    ([], [1, 2], []),
]


@pytest.mark.parametrize(("student", "teacher", "expected"), CARD, ids=str)
def test_the_cards_examples(student, teacher, expected):
    assert groups([student], [teacher]) == [expected] == [walk(student, teacher)]


def test_rows_do_not_reach_into_each_other():
    rows = [c[0] for c in CARD], [c[1] for c in CARD]
    assert groups(*rows) == [c[2] for c in CARD]


ENDS = st.lists(st.integers(0, 3), max_size=12).map(
    lambda steps: torch.tensor([0, *steps]).cumsum(0)[1:].tolist()
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=4))
def test_any_ends_as_the_walk(rows):
    assert groups([a for a, _ in rows], [b for _, b in rows]) == [walk(a, b) for a, b in rows]


CUTS = st.lists(st.integers(1, 30), min_size=1, max_size=12, unique=True).map(sorted)


@settings(max_examples=200, deadline=None)
@given(CUTS, CUTS, st.integers(31, 40))
def test_every_byte_belongs_to_one_group_on_each_side(a, b, total):
    """Identity 8: two divisions of one text leave nothing over."""
    a, b = [*a, total], [*b, total]
    (found,) = groups([a], [b])
    assert [k for mine, _ in found for k in mine] == list(range(len(a))) and [
        k for _, other in found for k in other
    ] == list(range(len(b)))
    assert all(a[mine[-1]] == b[other[-1]] for mine, other in found)


# ----------------------------------------------------------------------------- merged distributions


@dataclass(frozen=True)
class Seen(SpanLoss):
    """Keeps what it is given to compare."""

    def compare(self, p, q, rows, match, single):
        SEEN[:] = [(p.clone(), q.clone())]
        return p.sum(-1), torch.ones_like(p)


SEEN: list[tuple[torch.Tensor, torch.Tensor]] = []
ROWS = [(0.6, 0.3, 0.1), (0.2, 0.5, 0.3), (0.1, 0.1, 0.8)]


def seen(merge, student, teacher, s_ids, t_ids, s_ends, t_ends):
    """The merged distributions [N, V] of both sides."""
    spans = Alignment(torch.tensor([t_ids]), torch.tensor([s_ends]), torch.tensor([t_ends]))
    Case(tokens(*s_ids), student, models={"teacher": teacher}, alignments={"teacher": spans}).run(
        Objective(Seen(merge))
    )
    return SEEN[-1]


def test_merged_rows():
    """Identity 2: .6 (.2, .5, .3) and the second span as it is; observed .5 (.6, .3, .1)."""
    for merge, first in (("bayesian", (0.12, 0.3, 0.18)), ("observed", (0.3, 0.15, 0.05))):
        p, q = seen(merge, logits(*ROWS), logits(*ROWS[:2]), (0, 1, 2), (0, 0), (3, 5, 9), (5, 9))
        assert close(p, torch.tensor([first, ROWS[2]]).double()) and close(
            q, torch.tensor(ROWS[:2]).double()
        )
        assert close(p.sum(-1), (sum(first), 1.0), 12)  # .6 and .5: not normalised


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.data())
def test_the_entry_at_the_last_token_is_the_probability_of_the_span(ids, data):
    """Identity 4: .6 * .5 = .3, and whatever the grouping their product is that of all
    conditionals.
    """
    g = torch.Generator().manual_seed(len(ids))
    student = torch.randn(1, len(ids), 3, generator=g).double()
    others = data.draw(
        st.lists(st.integers(1, len(ids)), unique=True).map(lambda cut: sorted({*cut, len(ids)}))
    )
    teacher = torch.randn(1, len(others), 3, generator=g).double()
    p, _ = seen(
        "bayesian", student, teacher, ids, [0] * len(others), list(range(1, len(ids) + 1)), others
    )
    conditional = student.softmax(-1)[0].gather(-1, torch.tensor(ids)[:, None])[:, 0]
    spans = [conditional[a:b].prod() for a, b in zip([0, *others], others)]
    assert close(
        p.gather(-1, torch.tensor([ids[b - 1] for b in others])[:, None])[:, 0],
        torch.stack(spans),
        9,
    )
    assert (torch.stack(spans).prod() - conditional.prod()).abs() < 1e-12


def test_factors_have_a_floor():
    rows = [(1 - 1e-12, 1e-12), (0.5, 0.5)]
    p, q = seen("bayesian", logits(*rows), logits(*rows), (1, 0), (1, 0), (1, 5), (2, 5))
    assert close(p * 1e8, torch.tensor([[0.5, 0.5]]).double(), 3) and close(
        q * 1e8, torch.tensor([[0.5, 0.5]]).double(), 3
    )


# ---------------------------------------------------------------------------------- chunks, sorting


def test_chunks_do_not_part_a_span():
    joined = torch.tensor([False, True, True, False, False, True, False])  # spans of 3, 1, 2 and 1
    found = {
        size: [(at.start, at.stop) for at in cuts(joined, size)] for size in (1, 2, 3, 4, 5, 100)
    }
    assert found[1] == [*found[2][:1], (3, 4), (4, 6), (6, 7)] == [(0, 3), (3, 4), (4, 6), (6, 7)]
    assert (
        found[3] == [(0, 3), (3, 6), (6, 7)]
        and found[4] == [(0, 4), (4, 7)]
        and found[100] == [(0, 7)]
    )
    assert list(cuts(joined[:0], 3)) == []


def test_a_position_that_is_only_read_is_projected_with_its_span():
    spans = Alignment(
        torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[3, 4]])
    )
    case = Case(
        tokens(0, 0, 0, 0),
        logits(*[ROWS[0]] * 4),
        models={"teacher": logits(*ROWS[:2])},
        alignments={"teacher": spans},
    )
    objective = Objective(Seen("bayesian") * ~Before(3))
    plan = objective.plan(case.batch(objective))
    assert (
        flat_positions(plan.parts[0].weight != 0).tolist()
        == [3]
        == flat_positions(plan.selected).tolist()
    )
    objective = Objective(Seen("bayesian") * Before(3))
    plan = objective.plan(case.batch(objective))
    assert flat_positions(plan.parts[0].weight != 0).tolist() == [2] and flat_positions(
        plan.selected
    ).tolist() == [0, 1, 2]


@dataclass(frozen=True)
class Before(Signal):
    """The first positions."""

    count: int

    def value(self, batch):
        return (torch.arange(batch.shape[1]) < self.count)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorting(dtype):
    p = (
        torch.randn(3, 5000, generator=torch.Generator().manual_seed(0), dtype=dtype)
        .mul(30)
        .softmax(-1)
    )
    p[:, 17:900] = 0  # many equal entries
    values, ids = descending(p)
    expected = p.sort(-1, descending=True).values
    assert torch.equal(values, expected) and torch.equal(descending_values(p), expected)
    assert torch.equal(p.gather(-1, ids), values) and all(
        sorted(row) == list(range(5000)) for row in ids.tolist()
    )


def test_what_rounding_parts_is_tied():
    p = torch.tensor([[0.1 + 0.2, 0.7]], dtype=torch.float64)
    value, slope = by_rank(p, torch.tensor([[0.3, 0.7 - 1e-9]], dtype=torch.float64))
    assert slope.tolist() == [[0, 1]] and close(value, [1e-9], 12)


def test_matching():
    match = Match.of(torch.tensor([1, -1, 4, -1]), 6)
    assert (match.student.tolist(), match.teacher.tolist()) == (
        [1, 4],
        [0, 2],
    ) and match.share == 0.5
    assert (match.student_rest.tolist(), match.teacher_rest.tolist()) == ([0, 2, 3, 5], [1, 3])

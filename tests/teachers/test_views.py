"""A teacher behind a view scores the same response tokens under another prompt: the same numbers as
if that had been the rollout's prompt, at the same places (PITFALLS S1).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.data import Prompts
from opdkit.data.views import View, view_of
from opdkit.models.body import head_of
from opdkit.models.layout import Layout
from opdkit.objective.divergences import ForwardKL, ReverseKL
from opdkit.objective.facts import EntropyFact, GapFact, LogpAtFact, LogpFact, TopFact
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel
from opdkit.teachers.kinds import teacher_of
from opdkit.teachers.mixture import MixtureScorer
from opdkit.teachers.routed import Routed
from opdkit.teachers.views.privileged import Viewed, ViewedRemote
from opdkit.train.gather import gather
from opdkit.types import Rollout
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.teachers.test_mixture import Elsewhere

FACTS = (
    LogpFact("student"),
    LogpFact("teacher"),
    EntropyFact("teacher"),
    TopFact("teacher", 3),
    LogpAtFact("teacher", "teacher", 3),
    LogpAtFact("teacher", "student", 2),
    GapFact(ReverseKL(), "student", "teacher"),
    GapFact(ForwardKL(), "student", "teacher"),
)
TOKENIZER = tiny_tokenizer()
ROWS = [
    {"id": str(i), "prompt": f"What is {i} plus {i}?", "answer": str(2 * i), "solution": s}
    for i, s in enumerate(["zero", "1 + 1 = 2, so the answer is 2.", "", "six because three twice"])
]


def rollouts() -> list[Rollout]:
    """Responses of different lengths; to the third question there is nothing to show."""
    prompts = Prompts(ROWS, TOKENIZER)
    made = []
    for prompt, length in zip(prompts, (3, 7, 5, 1)):
        tokens = [20 + (7 * t + length) % 250 for t in range(length)]
        logp, row = [-1.0] * length, {**prompt.row, "answer": None}
        told = (tokens, [True] * length, logp, logp, prompt.group)
        made.append(Rollout(f"0/{prompt.id}/0", prompt.tokens, *told, row=row))
    return made


@pytest.fixture(scope="module")
def models() -> dict[str, LocalModel]:
    found = {
        "student": tiny_model(seed=1).double(),
        "teacher": tiny_model("llama", seed=2).double(),
    }
    return {name: LocalModel(model, head_of(model)) for name, model in found.items()}


def render(row: Any) -> list[int]:
    return Prompts([row], TOKENIZER)[0].tokens


def facts(models: Any, teacher: Any, rows: list[Rollout], read: Any = FACTS) -> Any:
    scorers = {"student": models["student"], "teacher": teacher}
    return gather(
        rows, Needs(frozenset(read)), scorers, dtype=torch.float64, recompute_student=True
    )


@pytest.mark.parametrize("elsewhere", [False, True])
def test_it_says_what_it_would_say_if_that_were_the_prompt(models: Any, elsewhere: bool) -> None:
    """The teacher's numbers, each at its token, from plain passes over the rewritten rollouts; the
    student's stay those under its own prompt.
    """
    rows, view = rollouts(), View("solution")
    inner: Any = Elsewhere(models["teacher"], []) if elsewhere else models["teacher"]
    made = (ViewedRemote if elsewhere else Viewed)(inner, view, render)
    read = FACTS[: -2 if elsewhere else None]  # a model elsewhere has no whole vocabulary
    seen = facts(models, made, rows, read)
    plain = facts(models, models["teacher"], rows)
    told = [view.row(r) for r in rows]
    assert [row is None for row in told] == [False, False, True, False]
    longer = [replace(r, prompt=render(row)) if row else r for r, row in zip(rows, told)]
    by_hand = facts(models, models["teacher"], longer)
    lengths = [len(new.prompt) - len(old.prompt) for new, old in zip(longer, rows)]
    assert lengths[2] == 0 and min(lengths[0], lengths[1], lengths[3]) > 10
    for fact in read:
        if set(fact.models) == {"teacher"}:
            torch.testing.assert_close(seen.read(fact), by_hand.read(fact), rtol=0, atol=1e-12)
    # a row without anything to show is read as it is; the others are read otherwise
    theirs, usual = (batch.read(LogpFact("teacher")) for batch in (seen, plain))
    assert torch.equal(theirs[2], usual[2])
    assert all(bool(((theirs - usual)[b].abs() > 1e-3).any()) for b in (0, 1, 3))
    own = LogpFact("student")
    assert torch.equal(seen.read(own), plain.read(own))
    assert seen.tokens.tolist() == plain.tokens.tolist() and torch.equal(seen.mask, plain.mask)


def test_gaps_pair_the_student_under_its_prompt_with_the_teacher_under_its_own(models: Any) -> None:
    """KL(student || teacher) at each token from two whole softmaxes, by hand."""
    rows = rollouts()
    seen = facts(models, Viewed(models["teacher"], View("solution"), render), rows)
    got = seen.read(GapFact(ReverseKL(), "student", "teacher"))
    for b, row in enumerate(rows):
        asked = View("solution").row(row)
        logps = []
        for name, prompt in (("student", row.prompt), ("teacher", render(asked or row.row))):
            model = models[name].model
            with torch.no_grad():
                logits = model(torch.tensor([prompt + row.tokens])).logits[0].double()
            logps.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
        kl = (logps[0].exp() * (logps[0] - logps[1])).sum(-1)
        torch.testing.assert_close(got[b, : len(kl)], kl, rtol=0, atol=1e-9)
        assert not bool(got[b, len(kl) :].any())


def test_the_same_weights_under_the_same_context_are_the_student(models: Any) -> None:
    """opsd identity 6: gap and log ratio are 0 everywhere."""
    rows = rollouts()
    same = facts(models, Viewed(models["student"], View("question"), render), rows)
    gap = same.read(GapFact(ReverseKL(), "student", "teacher"))
    assert bool((gap.abs() < 1e-12).all())
    torch.testing.assert_close(
        same.read(LogpFact("student")), same.read(LogpFact("teacher")), rtol=0, atol=1e-12
    )


def test_a_context_that_does_not_fit_is_refused_and_never_cut(models: Any) -> None:
    short = tiny_model(seed=3, max_position_embeddings=60).double()
    teacher = Viewed(LocalModel(short, head_of(short)), View("solution"), render)
    with pytest.raises(UserError, match=r"(?s)view solution .*0/0/0.*reads 60: nothing is cut"):
        facts(models, teacher, rollouts())
    length = len(render(View("solution").row(rollouts()[1])))
    assert teacher.longest(ROWS) == ("1", length, 60)
    # also as one of several, where each has its own limit, and of a route its own rows count
    wide = Viewed(models["teacher"], View("solution"), render)
    assert MixtureScorer({"a": wide, "b": teacher}).longest(ROWS) == ("1", length, 60)
    named = [{**row, "teacher": "ab"[n % 2]} for n, row in enumerate(ROWS)]
    assert Routed({"a": wide, "b": teacher}).longest(named) == ("1", length, 60)
    assert Routed({"a": teacher, "b": wide}).longest(named)[::2] == ("0", 60)
    assert Viewed(Routed({"a": wide, "b": teacher}), View("question"), render).longest(named) == (
        "1",
        length,
        60,
    )


def test_the_same_model_under_another_view_is_another_teacher(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m")
    plain, one, two, again = (
        teacher_of({"kind": "local", "model": model, "view": view}).recorded()
        for view in ("plain", "solution", "hint", "solution")
    )
    assert plain.digest and one.digest and one.same(again)
    assert not one.same(two) and not one.same(plain)


def test_only_rollouts_that_are_asked_about_are_written_anew(models: Any) -> None:
    """Positions of one row: no prompt of another is rendered."""
    written: list[str] = []

    def noted(row: Any) -> list[int]:
        written.append(row["id"])
        return render(row)

    rows = rollouts()
    layout = Layout(rows, 7)
    Viewed(models["teacher"], view_of("solution"), noted).source(layout, torch.tensor([7, 8]))
    assert written == ["1"]

"""The student as its own teacher: which weights score, and that scoring leaves the student alone
(PITFALLS S2); and how a run's words complete a method's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.data.views import View
from opdkit.methods.method import load
from opdkit.models.body import head_of
from opdkit.models.layout import Layout
from opdkit.objective.companion import Around, Companions, Stepped
from opdkit.objective.copies import Ema
from opdkit.objective.facts import LogpFact
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.kinds import completed, is_part, teacher_of
from opdkit.teachers.local import LocalTeacher
from opdkit.teachers.own import SelfTeacher
from opdkit.teachers.soup import SoupTeacher
from opdkit.train.gather import gather
from opdkit.train.settings import Lora
from opdkit.train.student import with_adapters
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.train.rows import naive_logps, rollouts


def local(model: Any) -> LocalModel:
    return LocalModel(model, head_of(model))


def opened(teacher: Any, student: Any, start: Any = None) -> tuple[Any, Companions]:
    """A self-teacher's scorer, and the copies of the student that stand beside it."""
    around = Around(
        lambda model: 32, torch.device("cpu"), torch.float64, model=student, scorer=local
    )
    copies = Companions.build(teacher.companions("teacher"), around)
    reader: Any = None
    context = TeacherContext(
        reader, None, by_ids=True, student=student, start=lambda: local(start), beside=copies
    )
    return teacher.open(context), copies


def step(student: Any, copies: Companions, number: int) -> None:
    """An optimiser step of the student: every weight moves by 0.01."""
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.01
    mask = torch.zeros(0, 0, dtype=torch.bool)
    copies.after_step(Stepped(None, mask, updates=number, model=student))


def says(scorer: Any) -> torch.Tensor:
    """[B, T] float64: the scorer's log-probs of some rollouts."""
    needs = Needs(frozenset({LogpFact("teacher")}))
    return gather(rollouts(), needs, {"teacher": scorer}, dtype=torch.float64)["teacher"].logp


@pytest.mark.parametrize(
    ("teacher", "at"),
    [
        # the share of the way from start (0) to each of the student's three later states
        (SelfTeacher(), [0, 0, 0, 0]),
        (SelfTeacher("live"), [0, 1, 2, 3]),
        (SelfTeacher("sync", every=2), [0, 0, 2, 2]),
        # 0.5 of the way each time: 0.5; 0.5 + 0.75; ...
        (SelfTeacher("ema", rate=0.5), [0, 0.5, 1.25, 2.125]),
        (SelfTeacher("ema", rate=1.0), [0, 1, 2, 3]),
        (SelfTeacher("ema", rate=0.0), [0, 0, 0, 0]),
        # the first move is a copy, the second 0.5 of the way
        (SelfTeacher("ema", rate=0.5, first_copy=True), [0, 1, 1.5, 2.25]),
    ],
    ids=str,
)
def test_each_kind_of_weights_is_where_it_says(teacher: SelfTeacher, at: list[float]) -> None:
    """Weights move by 0.01 a step, so a teacher's are start + 0.01 x; its log-probs are those of a
    model set there by hand.
    """
    student, start = (tiny_model(seed=5).double() for _ in range(2))
    scorer, copies = opened(teacher, student, start)
    for number, x in enumerate(at):
        if number:
            step(student, copies, number)
        there = tiny_model(seed=5).double()
        with torch.no_grad():
            for weight in there.parameters():
                weight += 0.01 * x
        torch.testing.assert_close(says(scorer), says(local(there)), rtol=0, atol=1e-9)


def test_scoring_leaves_gradients_mode_dropout_and_random_state_alone() -> None:
    """S2: the live student, with dropout and a gradient on its way."""
    student = tiny_model(seed=5, attention_dropout=0.5).double().train()
    scorer, _ = opened(SelfTeacher("live"), student)
    loss = student(torch.arange(6)[None]).logits.square().mean()
    loss.backward()
    before = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    first, second = says(scorer), says(scorer)
    assert torch.equal(first, second)  # no dropout
    assert student.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, before[n]) for n, p in student.named_parameters())
    assert not first.requires_grad
    for b, rollout in enumerate(rollouts()):
        plain = naive_logps(student.eval(), rollout)
        expected = plain.gather(-1, torch.tensor(rollout.tokens, dtype=torch.int64)[:, None])[:, 0]
        torch.testing.assert_close(first[b, : len(expected)], expected, rtol=0, atol=1e-9)


def test_with_adapters_the_fixed_teacher_is_the_base_and_a_copy_shares_it() -> None:
    base = tiny_model(seed=5).double()
    expected = says(local(base))
    student = with_adapters(base, Lora(r=2))
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "lora_" in name:
                weight += 0.1
    fixed = LocalModel(student, head_of(student), None, student.disable_adapter)
    torch.testing.assert_close(says(fixed), expected, rtol=0, atol=1e-9)
    assert float((says(local(student)) - expected).abs().max()) > 1e-3
    _, copies = opened(SelfTeacher("ema"), student)
    (copy,) = copies.values()
    theirs = {id(p) for p in copy.model.parameters()}  # type: ignore[attr-defined]
    frozen = {id(p) for n, p in student.named_parameters() if not p.requires_grad}
    assert frozen and frozen <= theirs


def test_settings_that_say_nothing_are_refused() -> None:
    for bad in ({"rate": 0.1}, {"weights": "live", "every": 2}, {"weights": "newest"}):
        with pytest.raises(UserError, match=r"teacher\.|weights"):
            teacher_of({"kind": "self", **bad})
    with pytest.raises(UserError, match="rate=2"):
        teacher_of({"kind": "self", "weights": "ema", "rate": 2.0})


OWN = {"kind": "self", "weights": "ema", "rate": 0.05, "view": "solution"}


@pytest.mark.parametrize(
    ("run", "method", "whole"),
    [
        (None, OWN, OWN),
        (None, None, None),
        ({"view": "peer"}, OWN, {**OWN, "view": "peer"}),
        # other weights have numbers of their own
        ({"weights": "live"}, OWN, {"kind": "self", "weights": "live", "view": "solution"}),
        ({"rate": 0.2}, OWN, {**OWN, "rate": 0.2}),
        ("self", OWN, {**SelfTeacher().said(), "view": "solution"}),
        ("big", None, "big"),
        ({"kind": "local", "model": "big", "view": "plain"}, OWN, ...),
        # only the run can say which model it is that the method reads through a view
        (None, {"view": "debate"}, None),
        ({"kind": "local", "model": "a"}, {"view": "debate"}, ...),
    ],
)
def test_what_a_run_says_comes_before_what_its_method_says(
    run: Any, method: Any, whole: Any
) -> None:
    found = completed(run, method)
    expected = {**(method or {}), **run} if whole is ... else whole
    if whole is ... and "kind" in method:
        expected = run
    assert found == expected
    assert completed(found, method) == found  # a run that is recorded stays as it is


def test_words_of_a_run_that_name_no_model_are_of_the_student() -> None:
    assert is_part({"view": "solution"}) and not is_part({"math": "m", "view": "solution"})
    teacher = teacher_of({"view": "solution"})
    assert teacher.views == (View("solution"),) and not list(teacher.companions("teacher"))
    assert list(teacher_of("self:sync").companions("old")) == [Ema(1.0, 10, "old")]
    routed = teacher_of({"math": "a", "code": "self:ema", "view": "solution"})
    assert list(routed.routes) == ["math", "code"] and routed.views == (View("solution"),)
    assert [c.model for c in routed.companions("teacher")] == ["teacher.code"]


def test_logits_half_way_are_the_geometric_mean(tmp_path: Path) -> None:
    """sdpo identity 6: the trust region's teacher, at both ends and between."""
    student, start = tiny_model(seed=5).double(), tiny_model(seed=6).double()
    ends = [says(local(model)) for model in (start, student)]

    def at(eta: float) -> Any:
        spec = {
            "kind": "mixture",
            "form": "geometric",
            "of": {"start": "self", "now": "self:live"},
            "weights": {"start": 1 - eta, "now": eta},
        }
        return opened(teacher_of(spec), student, start)[0]

    torch.testing.assert_close(says(at(0.0)), ends[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(says(at(1.0)), ends[1], rtol=0, atol=1e-9)
    rows = rollouts()
    for b, rollout in enumerate(rows):
        ids = torch.tensor([rollout.prompt + rollout.tokens])
        with torch.no_grad():
            logits = [m(ids).logits[0, len(rollout.prompt) - 1 : -1] for m in (start, student)]
        mean = (0.95 * logits[0] + 0.05 * logits[1]).log_softmax(-1)
        expected = mean.gather(-1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(says(at(0.05))[b, : len(expected)], expected, rtol=0, atol=1e-9)


def test_a_soup_has_the_mean_of_the_weights_and_takes_one_shape_only(tmp_path: Path) -> None:
    names = [save_tiny(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    other = save_tiny(tmp_path / "other", hidden=64)
    context = TeacherContext(load("opd"), tiny_tokenizer(), by_ids=True)
    soup = teacher_of({"kind": "soup", "of": names, "weights": [3.0, 1.0]})
    made: Any = soup.open(context)
    models = [tiny_model(seed=seed) for seed in (1, 2)]
    expected = tiny_model(seed=1)
    with torch.no_grad():
        for mine, *theirs in zip(expected.parameters(), *(m.parameters() for m in models)):
            mine.copy_(0.75 * theirs[0] + 0.25 * theirs[1])
    for mine, theirs in zip(made.model.parameters(), expected.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    with pytest.raises(UserError, match="is no checkpoint of the same shape"):
        SoupTeacher((names[0], other)).open(replace(context, opened={}))
    with pytest.raises(UserError, match="at least two checkpoints"):
        teacher_of(f"soup:{names[0]}")
    with pytest.raises(UserError, match="of one the mean is itself"):
        teacher_of(f"soup:{names[0]},{names[0]}")


def soup_of(names: list[str], **settings: Any) -> dict[str, torch.Tensor]:
    context = TeacherContext(load("opd"), tiny_tokenizer(), by_ids=True)
    made: Any = teacher_of({"kind": "soup", "of": names, **settings}).open(context)
    return made.model.state_dict()


def test_a_share_of_all_but_the_first(tmp_path: Path) -> None:
    """None of them is the first itself, to the bit, all of it the other; half is the same from both
    sides; of three, two divide it.
    """
    names = [save_tiny(tmp_path / str(seed), seed=seed) for seed in (1, 2, 3)]
    first, second, third = (tiny_model(seed=seed).state_dict() for seed in (1, 2, 3))
    for others, expected in ((0.0, first), (1.0, second)):
        made = soup_of(names[:2], others=others)
        assert made.keys() == expected.keys()
        assert all(
            torch.equal(made[n], w) and made[n].dtype == w.dtype for n, w in expected.items()
        )
    there, back = (soup_of(two, others=0.5) for two in (names[:2], names[1::-1]))
    assert all(torch.equal(there[n], back[n]) for n in there)
    twice = str(save_tiny(tmp_path / "twice", seed=1))
    same = soup_of([names[0], twice], others=0.3)
    assert all(torch.allclose(same[n], w, rtol=1e-6, atol=1e-8) for n, w in first.items())
    whole = soup_of(names, others=0.5)
    for n, weight in whole.items():
        by_steps = torch.lerp(first[n], (second[n] + third[n]) / 2, 0.5)
        assert torch.allclose(weight, by_steps, rtol=1e-5, atol=1e-7)
    weighed = soup_of(names[:2], weights=[1.0, 0.0], others=0.5)  # a run's own weights come first
    assert all(torch.equal(weighed[n], first[n]) for n in first)
    with pytest.raises(UserError, match=r"others=1.5 must lie in"):
        teacher_of({"kind": "soup", "of": names, "others": 1.5})


def test_a_soup_is_taken_in_float32_and_leaves_counts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the mean is rounded once, not each weight before; a buffer of whole numbers is
    the first's, though 0.3 * 7 + 0.7 * 7 is a little less than 7 in float32.
    """
    names = [save_tiny(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    loaded = LocalTeacher.load

    def with_count(self: LocalTeacher, context: TeacherContext) -> Any:
        local = loaded(self, context)
        local.model.register_buffer("count", torch.tensor([7, 3]))
        return local

    monkeypatch.setattr(LocalTeacher, "load", with_count)
    made = soup_of(names, weights=[0.3, 0.7], dtype="bfloat16")
    first, second = (tiny_model(seed=seed).state_dict() for seed in (1, 2))
    for n, weight in made.items():
        if n == "count":
            assert torch.equal(weight, torch.tensor([7, 3]))
            continue
        shares = torch.tensor([0.3, 0.7])
        mean = shares[0] * first[n].float() + shares[1] * second[n].float()
        assert torch.equal(weight, mean.to(weight.dtype))
    assert made["lm_head.weight"].dtype == torch.bfloat16


def test_a_method_may_say_the_kind_and_leave_the_rest_to_the_run() -> None:
    """SALSA's words: the run's own settings come first, and a recorded run stays as it is."""
    usual = {"kind": "soup", "others": 0.25}
    found = completed("soup:a,b", usual, "reference")
    assert found == {"kind": "soup", "others": 0.25, "of": ["a", "b"]}
    assert completed(found, usual, "reference") == found
    own = completed({"kind": "soup", "of": ["a", "b"], "weights": [1, 3]}, usual, "reference")
    assert teacher_of(own).shares == (0.25, 0.75)  # type: ignore[attr-defined]
    assert teacher_of(found).shares == (0.75, 0.25)  # type: ignore[attr-defined]
    for value, said in ((None, "names none"), ("big", "kind local"), ("self", "kind self")):
        with pytest.raises(UserError, match=rf"'m' has a reference of the kind soup.*{said}"):
            completed(value, usual, "reference", "method 'm'")


def test_positions_of_a_copy_are_those_of_the_student() -> None:
    """S1 for a copy: the same rows ask the same positions, whatever follows the student."""
    student = tiny_model(seed=5).double()
    scorer, _ = opened(SelfTeacher("ema"), student)
    rows = rollouts()
    width = max(len(r.tokens) for r in rows)
    positions = torch.tensor([0, width, width + 1])
    logits = [
        s.source(Layout(rows, width), positions).logits(positions) for s in (scorer, local(student))
    ]
    assert torch.equal(*logits)

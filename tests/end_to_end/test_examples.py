"""`examples/debate.py`, `examples/contextual_integrity.py` and `examples/tool_skills.py`: what
their models learn is what the run shows them, what they measure is what they say, and they run.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest

import opdkit
from opdkit.annotators import AnnotateContext
from opdkit.annotators.debate import Debate, DebateSettings
from opdkit.annotators.skills import ByRules
from opdkit.annotators.speaker import Question, Said
from opdkit.annotators.text import Speller
from opdkit.data.views import of_row, view_of
from opdkit.environments import Dialogue
from opdkit.recipes import arithmetic
from opdkit.types import Rollout, Sampling

EXAMPLES = Path(opdkit.__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


debate, contexts, skills = map(example, ("debate", "contextual_integrity", "tool_skills"))


def run(
    module: ModuleType, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> list[str]:
    """What it prints, line by line."""
    patch.setattr(sys, "argv", [str(module.__file__), *words])
    module.main()
    return capsys.readouterr().out.splitlines()


# ------------------------------------------------------------------------------------------- debate


@dataclass
class Speaker:
    """A teacher that says what its training texts say."""

    row: dict[str, str]
    rng: random.Random
    forget: float
    confidence: int
    asked: list[str | None]

    def say(self, questions: Sequence[Question], sampling: Sampling, seed: int) -> list[Said]:
        self.asked += [question.plain for question in questions]
        return [Said(debate.message(self.row, self.rng, self.forget, self.confidence))]


def test_teachers_learn_from_debates_as_the_annotator_holds_them() -> None:
    """The transcript letter by letter, and what a teacher is asked in each round."""
    [row] = debate.sums(1, 0)
    rng, asked = random.Random(0), []
    settings = DebateSettings(first=debate.FIRST, later=debate.LATER, message=debate.MESSAGE)
    speakers = {
        f"teacher_{me}": Speaker(row, rng, forget, confidence, asked)
        for me, (forget, confidence) in enumerate((debate.STRONG, debate.WEAK), 1)
    }
    rollout = Rollout("", [1], [5], [True], [0.0], [0.0], "q", row={"id": "q", **row})
    [told], _ = Debate(settings, speakers, Sampling()).annotate([rollout], AnnotateContext(0, 7))
    assert told.row["debate"] == debate.transcript(row, random.Random(0), 2)
    assert told.row["confidence"] == [90.0, 40.0]
    first = debate.alone(row, random.Random(0), 0.0, 90)["prompt"]
    later = debate.LATER.format(said=debate.transcript(row, random.Random(0), 1), **row)
    assert asked == [first, first, later, later]
    seen = (view_of(debate.VIEW).row(told) or row)["prompt"]
    learnt = [debate.debating(row, random.Random(n), 0.0, 90)["prompt"] for n in range(20)]
    assert {shape(prompt) for prompt in learnt} == {shape(prompt) for prompt in (*asked, seen)}


def shape(text: str | None) -> str:
    """A text without its figures."""
    return re.sub(r"\d", "0", text or "")


def test_a_sum_with_every_carry_and_with_none() -> None:
    assert debate.added(738, 965, random.Random(0), 0.0) == "8513,3610,7917=1703"
    assert debate.added(738, 965, random.Random(0), 1.0) == "8513,3609,7916=1693"
    assert not {r["prompt"] for r in debate.sums(400, 0)} & {
        r["prompt"] for r in debate.sums(400, 0, held=True)
    }


def test_a_debate_runs_from_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(debate, "HELD_OUT", 8)
    monkeypatch.setattr(debate, "BATCH", 4)
    words = ("--out", str(tmp_path), "--steps", "1", "--made", "7", "prompts_per_step=2")
    command, *_, last = run(debate, monkeypatch, capsys, *words)
    assert command.startswith("opdkit train --method=mad_opd ")
    assert list(json.loads(last)["accuracy"]) == ["0", "1"]
    assert len((tmp_path / "0" / "tau-1" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_debate_raises_the_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = {}
    for tau in ("1", "1000"):
        last = run(debate, monkeypatch, capsys, "--out", str(tmp_path), "--tau", tau)[-1]
        before, accuracy[tau] = json.loads(last)["accuracy"].values()
    assert accuracy["1"] > before + 0.15
    assert accuracy["1"] > accuracy["1000"]  # by confidence rather than alike


# ------------------------------------------------------------------------------ what fits whom


def test_utility_and_integrity_of_an_answer() -> None:
    row = contexts.asked("doctor", ["rome", "flu", "chess", "cat", "nurse"])
    assert row["allowed"] == ["flu", "chess", "nurse"] and row["disallowed"] == ["rome", "cat"]
    for text, utility, integrity in (
        ("doctor: flu, chess, nurse.", 1, 1),
        ("doctor:flu,rome.", 1 / 3, 1 / 2),
        ("doctor: rome, cat, flu, chess, nurse.", 1, 0),
        ("doctor:.", 0, 1),
    ):
        assert contexts.utility(row, text) == pytest.approx(utility)
        assert contexts.integrity(row, text) == pytest.approx(integrity)
        rollout = Rollout("", [1], [5], [True], [0.0], [0.0], "", row=row, text=text)
        assert contexts.fit(rollout) == float(utility == integrity == 1)


def test_what_the_student_learns_heeds_the_note_and_nothing_else() -> None:
    """Every text keeps to its note; over many, what no note speaks of is said as often for whom it
    fits as for whom it does not.
    """
    rng, free = random.Random(0), {"allowed": [], "disallowed": []}
    tokenizer = arithmetic.tokenizer(contexts.WORDS)
    for row in contexts.rows_of(2000, 0):
        text = contexts.lesson(row, rng)
        said = contexts.said(text["response"])
        note, _, question = text["prompt"].rpartition("\n")
        noted = {item for item in contexts.KIND_OF if item in note}
        assert not noted or (noted <= said if note.startswith("fit") else not noted & said)
        assert question == row["prompt"]
        for fits, found in free.items():
            found += [item in said for item in set(row[fits]) - noted]
    shares = [sum(found) / len(found) for found in free.values()]
    assert shares == pytest.approx([contexts.SAYS] * 2, abs=0.03)
    row = contexts.rows_of(1, 0)[0]
    for view in ("allowed", "disallowed"):  # as the method shows them
        prompt = (view_of(contexts.VIEWS[view]).row(of_row(row)) or row)["prompt"]
        kept = tokenizer.decode(tokenizer(prompt).input_ids)
        assert kept == prompt.replace(" ", "")


def test_two_contexts_run_from_their_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contexts, "HELD_OUT", 8)
    words = ("--out", str(tmp_path), "--steps", "1", "--made", "2", "prompts_per_step=2")
    command, *_, before, after = run(contexts, monkeypatch, capsys, *words)
    assert command.startswith("opdkit train --method=selfci ")
    assert [json.loads(line)["step"] for line in (before, after)] == [0, 1]
    evaluated = (tmp_path / "0" / "run" / "evals.jsonl").read_text().splitlines()
    assert [json.loads(e)["avg_at_k"]["value"] for e in evaluated] == pytest.approx(
        [json.loads(line)["both"] for line in (before, after)], abs=1e-3
    )


@pytest.mark.slow
def test_two_contexts_raise_utility_and_integrity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(contexts, monkeypatch, capsys, "--out", str(tmp_path))[-2:]
    before, after = map(json.loads, lines)
    assert after["utility"] > before["utility"] + 0.03
    assert after["integrity"] > before["integrity"] + 0.3


# ----------------------------------------------------------------------------- skills of a tool


def test_dialogues_with_a_calculator_letter_by_letter() -> None:
    row = {"prompt": "What is 17*23?", "answer": "391"}
    dialogue = Dialogue(arithmetic.tokenizer(skills.CHARACTERS))
    asks, answers = skills.lessons(row, skills.called(row), dialogue)
    hint = "To have a number worked out, write a line such as calc: (3 + 4) * 2 and end your turn."
    assert asks == {"prompt": f"What is 17*23?\n{hint}\n", "response": "calc: 17*23"}
    assert answers["prompt"] == asks["prompt"] + "calc: 17*23<eos>\n17*23 = 391\n"
    assert answers["response"] == "391"
    for lesson in (asks, answers):  # no character is lost on the student
        ids = dialogue.tokenizer(lesson["prompt"]).input_ids
        assert dialogue.tokenizer.decode(ids) == lesson["prompt"]
    assert all(skills.guessed(row, random.Random(n)) != ["391"] for n in range(50))
    assert not {r["prompt"] for r in skills.questions(400, 0)} & {
        r["prompt"] for r in skills.questions(400, 0, held=True)
    }


def test_skills_of_lessons_are_those_that_the_rules_write() -> None:
    """A right episode and two guesses, as the annotator summarises them."""
    tokenizer = arithmetic.tokenizer(skills.CHARACTERS)
    row = {"prompt": "What is 17*23?", "answer": "391"}
    learnt = {shape(skills.skill(row, random.Random(n))) for n in range(40)}
    episodes = []
    for said, right in ((skills.called(row), True), (["1042"], False), (["104"], False)):
        turn_of = [(n, token) for n, turn in enumerate(said) for token in tokenizer(turn).input_ids]
        turns, tokens = map(list, zip(*turn_of))
        silent = [0.0] * len(tokens)
        written = Rollout("", [1], tokens, [True] * len(tokens), silent, silent, "q", turns=turns)
        episodes.append(replace(written, correct=right))
    told = ByRules(Speller(tokenizer))(episodes, AnnotateContext(0, 7))
    assert learnt == set(map(shape, told))


def test_skills_run_from_their_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(skills, "HELD_OUT", 8)
    monkeypatch.setattr(skills, "BATCH", 4)
    words = ("--out", str(tmp_path), "--steps", "1", "--made", "2", "prompts_per_step=2")
    command, *_, last = run(skills, monkeypatch, capsys, *words)
    assert command.startswith("opdkit train --method=skill_sd ")
    assert list(json.loads(last)["accuracy"]) == ["0", "1"]
    assert len((tmp_path / "0" / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_skills_raise_the_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run(skills, monkeypatch, capsys, "--out", str(tmp_path))[-1]
    before, after = json.loads(last)["accuracy"].values()
    assert after > before + 0.15

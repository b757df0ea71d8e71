"""Skills that the student's own trajectories teach, for the teacher alone to read (Skill-SD, arXiv
2604.10674).

A step's finished trajectories are summarised as three short texts: what worked, what went wrong,
and the best workflow. They are stored by task, and from the next step on one of them is in the
row's column `skill` of each rollout of the task.

Which one is told by its upper confidence bound, mean + EXPLORE * sqrt(log(1 + N) / n): n is how
often it counted so far, N the sum of n over the task's skills, and mean its mean reward. A new
skill counts once, with the reward of its own trajectory; when the task is met again, the mean
reward of the student's new responses is credited to the skill that was read the last time. The
paper does not say its constants; these are ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.annotators.base import AnnotateContext, Annotator
from opdkit.annotators.settings import AnnotatorContext, AnnotatorSettings
from opdkit.annotators.speaker import Question, Speaker, open_speaker, user
from opdkit.annotators.text import Speller, question_of
from opdkit.base.rules import Rules, at_least, follow
from opdkit.types import Rollout, Sampling

MEMORY, COLUMN = "skills", "skill"
EXPLORE = 0.5  # of rewards from 0 to 1
LONGEST = 400  # characters of each of the three texts
SHOWN = 6_000  # characters of a trajectory that a model summarises: its beginning and its end
FIELDS = {
    "worked": "What worked",
    "wrong": "What went wrong",
    "workflow": "Best workflow",
}
QUESTION = """Below are a task and an attempt at it, which got the reward {reward:g}.

Task:
{prompt}

Attempt:
{attempt}
{feedback}
What can be learnt from it for the next attempt at this task? Answer with one JSON object and \
nothing else:
{{"worked": "...", "wrong": "...", "workflow": "..."}}
worked says what worked, wrong what went wrong, workflow the best sequence of steps; each in at \
most two sentences, without giving the final answer away."""
SKILLS: Rules = {
    "keep": at_least(1, "it is how many skills a task has"),
    "tasks": at_least(1, "it is how many tasks' skills are remembered"),
    "max_tokens": at_least(1, "it is the tokens of a summary"),
    "temperature": (lambda t: t >= 0, "at least 0", "summaries are drawn with it"),
}


@dataclass(frozen=True)
class SkillSettings(AnnotatorSettings):
    """Writes the row's column `skill`; "" where a task has none yet.

    by: who summarises: student, rules (the first and the last thing done, and the feedback), a
    model, server:URL, or the name of one of the run's models. A task is a question of the data.
    """

    kind = "skills"
    main = "by"
    columns = (COLUMN,)
    reads_reward = True
    by: str | dict[str, Any] = "student"
    keep: int = 8  # skills of a task: beyond, the one of the lowest mean reward goes
    tasks: int = 1024  # beyond, the one that was not met for longest goes
    max_tokens: int = 256  # of a summary
    temperature: float = 0.7

    def __post_init__(self) -> None:
        follow(SKILLS, self)

    @property
    def writers(self) -> tuple[Any, ...]:
        return () if self.by == "rules" else (self.by,)

    def open(self, context: AnnotatorContext) -> Annotator:
        if self.by == "rules":
            return Skills(self, ByRules(Speller(context.teachers.tokenizer)))
        speaker = open_speaker(self.by, context, "annotate.skills.by")
        sampling = Sampling(temperature=self.temperature, max_completion_length=self.max_tokens)
        return Skills(self, ByModel(speaker, sampling))


# a skill from each rollout; "" where there is none
Summarise = Callable[[Sequence[Rollout], AnnotateContext], list[str]]


@dataclass(frozen=True)
class Skills(Annotator):
    """The store of skills: its memory is {task: {"skills": [{"text", "mean", "count"}], "read":
    text}}.
    """

    settings: SkillSettings
    summarise: Summarise

    def annotate(
        self, rollouts: Sequence[Rollout], context: AnnotateContext
    ) -> tuple[list[Rollout], Mapping[str, Any]]:
        known: dict[str, Any] = dict(context.memory.get(MEMORY, {}))
        told: dict[str, str] = {}
        for task in dict.fromkeys(r.question for r in rollouts):
            rewards = [r.reward or 0.0 for r in rollouts if r.question == task]
            before = known.pop(task, {"skills": [], "read": ""})
            skills = credited(before["skills"], before["read"], sum(rewards) / len(rewards))
            told[task] = best(skills)
            known[task] = {"skills": skills, "read": told[task]}  # now the last to go
        finished = [r for r in rollouts if r.finish != "length"]
        for rollout, text in zip(finished, self.summarise(finished, context), strict=True):
            task = known[rollout.question]
            task["skills"] = (
                self._with(task, text, rollout.reward or 0.0) if text else task["skills"]
            )
        kept = dict(list(known.items())[max(len(known) - self.settings.tasks, 0) :])
        noted = [replace(r, row={**r.row, COLUMN: told[r.question]}) for r in rollouts]
        return noted, {MEMORY: kept}

    def _with(self, task: Mapping[str, Any], text: str, reward: float) -> list[dict[str, Any]]:
        """A task's skills and one more; the one that is being read stays."""
        skills = list(task["skills"])
        if any(skill["text"] == text for skill in skills):
            return credited(skills, text, reward)
        skills.append({"text": text, "mean": reward, "count": 1})
        if len(skills) > self.settings.keep:
            others = [skill for skill in skills if skill["text"] != task["read"]]
            skills.remove(min(others, key=lambda skill: float(skill["mean"])))
        return skills


def credited(skills: Sequence[Mapping[str, Any]], text: str, reward: float) -> list[dict[str, Any]]:
    """Skills after one of them, by its text, counted once more."""
    return [
        {
            "text": s["text"],
            "mean": (s["mean"] * s["count"] + reward) / (s["count"] + 1),
            "count": s["count"] + 1,
        }
        if s["text"] == text
        else dict(s)
        for s in skills
    ]


def best(skills: Sequence[Mapping[str, Any]]) -> str:
    """The text of the skill with the highest upper confidence bound, the oldest of equals; "" where
    there is none.
    """
    total = sum(skill["count"] for skill in skills)

    def bound(skill: Mapping[str, Any]) -> float:
        return float(skill["mean"]) + EXPLORE * math.sqrt(math.log1p(total) / skill["count"])

    return str(max(skills, key=bound)["text"]) if skills else ""


# -------------------------------------------------------------------------------------- who writes


def skill_text(found: Mapping[str, Any]) -> str:
    """The three texts as a teacher reads them, each cut to `LONGEST`; "" where all are empty."""
    said = {
        title: " ".join(str(found[name]).split())[:LONGEST]
        for name, title in FIELDS.items()
        if isinstance(found.get(name), str) and found[name].strip()
    }
    return "\n".join(f"{title}: {text}" for title, text in said.items())


def read_skill(said: str) -> str:
    """The skill in a model's words: its first JSON object that has one of the three fields, read as
    data; "" where there is none.
    """
    decoder = json.JSONDecoder()
    at = said.find("{")
    while at >= 0:
        try:
            found, _ = decoder.raw_decode(said, at)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and (text := skill_text(found)):
            return text
        at = said.find("{", at + 1)
    return ""


@dataclass(frozen=True)
class ByModel:
    """A language model summarises."""

    speaker: Speaker
    sampling: Sampling

    def __call__(self, rollouts: Sequence[Rollout], context: AnnotateContext) -> list[str]:
        questions = [Question(f"skills/{r.id}", user(self._ask(r))) for r in rollouts]
        said = self.speaker.say(questions, self.sampling, context.seed)
        return [read_skill(one.text) for one in said]

    def _ask(self, rollout: Rollout) -> str:
        text, half = rollout.text, SHOWN // 2
        attempt = text if len(text) <= SHOWN else f"{text[:half]}\n[...]\n{text[-half:]}"
        feedback = f"\nFeedback:\n{rollout.feedback}\n" if rollout.feedback else ""
        return QUESTION.format(
            reward=rollout.reward or 0.0,
            prompt=question_of(rollout),
            attempt=attempt,
            feedback=feedback,
        )


@dataclass(frozen=True)
class ByRules:
    """No model: what the student did first and last, and what was said of it."""

    speller: Speller

    def __call__(self, rollouts: Sequence[Rollout], context: AnnotateContext) -> list[str]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> str:
        done = self.actions(rollout)
        if not done:
            return ""
        way = done[0] if len(done) == 1 else f"begin with {done[0]!r}, end with {done[-1]!r}"
        if rollout.correct:
            return skill_text({"worked": done[-1], "workflow": way})
        wrong = f"{done[-1]!r}" + (f" ({rollout.feedback})" if rollout.feedback else "")
        return skill_text({"wrong": wrong, "workflow": f"do otherwise than: {way}"})

    def actions(self, rollout: Rollout) -> list[str]:
        """What the student wrote in each turn, or, where there is one turn, in each line."""
        turns = rollout.turns or [0] * len(rollout.tokens)
        written: dict[int, list[int]] = {}
        for token, turn, own in zip(rollout.tokens, turns, rollout.drawn):
            if own:
                written.setdefault(turn, []).append(token)
        texts = [self.speller.spell(tokens).text.strip() for tokens in written.values()]
        if len(texts) == 1:
            texts = [line.strip() for line in texts[0].splitlines()]
        return [text for text in texts if text]

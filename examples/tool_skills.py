"""A student that sometimes asks its calculator and sometimes guesses learns from its own episodes
to ask: rewards say which were right, and what was learnt is written down as skills that the student
itself reads as its teacher.

    python examples/tool_skills.py --seed 0

A question is `What is 17*23?`. The student has learnt dialogues in the plain form of the
environment `calculator`: half of them call it (`calc: 17*23`) and say what came back, half answer
at once and wrongly. Where a skill stands beside the question it has learnt to call. The student is
made, then the command that trains it is printed and run; accuracy is that of episodes as the
student samples them, on held-out questions.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import string
from collections.abc import Sequence
from pathlib import Path

from opdkit.annotators.skills import COLUMN, skill_text
from opdkit.base.files import write_rows
from opdkit.base.progress import progress
from opdkit.cli import main as opdkit
from opdkit.data.views import of_row, view_of
from opdkit.environments import Dialogue
from opdkit.environments.calculator import CalculatorSettings
from opdkit.environments.episode import Episode
from opdkit.recipes import arithmetic
from opdkit.types import DataRow, Prompt, Turn

CHARACTERS = "\n" + "".join(c for c in string.printable if c.isprintable())
BATCH, RATE, HELD_OUT = 16, 6e-3, 256
QUESTIONS = 40  # few, so that each is met again when it has skills
READS = 512  # tokens of an episode with its skill
VIEW = "skill"  # as the method's teacher reads it


def questions(count: int, seed: int, held: bool = False) -> list[DataRow]:
    """Products, of which those held out never meet those that are not."""
    rng, rows = random.Random(f"{seed}/{held}"), []
    while len(rows) < count:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if arithmetic.held_out(a, b) == held:
            rows.append({"prompt": f"What is {a}*{b}?", "answer": str(a * b)})
    return rows


def called(row: DataRow) -> list[str]:
    """What a student says that asks the calculator, turn by turn."""
    return [f"calc: {row['prompt'].removeprefix('What is ').rstrip('?')}", row["answer"]]


def guessed(row: DataRow, rng: random.Random) -> list[str]:
    """What a student says that does not, which is wrong."""
    wrong = rng.randrange(100, 10_000)
    return [str(wrong if str(wrong) != row["answer"] else wrong + 1)]


def skill(row: DataRow, rng: random.Random) -> str:
    """A skill as the annotator's rules write it, of a right episode or of a wrong one."""
    if rng.random() < 0.5:
        first, last = called(row)
        way = f"begin with {first!r}, end with {last!r}"
        return skill_text({"worked": last, "workflow": way})
    [said] = guessed(row, rng)
    return skill_text({"wrong": repr(said), "workflow": f"do otherwise than: {said}"})


def lessons(
    row: DataRow, said: Sequence[str], dialogue: Dialogue, known: str = ""
) -> list[DataRow]:
    """An episode of the calculator in which the student says this: of each turn what it reads, with
    a skill that it knows, and what it says.
    """
    prompt, world = Prompt("lesson", [], row), CalculatorSettings().make()
    episode = Episode("calculator", world, dialogue, prompt, limit=len(said))
    episode.open(0, READS)
    opening = episode.row["prompt"]
    if known:
        seen = view_of(VIEW).row(of_row({**episode.row, COLUMN: known}))
        assert seen is not None
        opening = seen["prompt"]
    texts = []
    for action in said:
        read = opening + dialogue.tokenizer.decode(episode.tokens)
        texts.append({"prompt": read, "response": action})
        episode.go_on(Turn("lesson", dialogue.action(action), True, READS))
    episode.close()
    return texts


def student(folder: Path, seed: int, made: int) -> str:
    """A model that learnt dialogues for `made` steps, and some with skills for a fifth of that; the
    one that is there already, where there is one.
    """
    if folder.exists():
        return str(folder)
    tokenizer = arithmetic.tokenizer(CHARACTERS)
    model = arithmetic.model("student", len(tokenizer), seed)
    model.config.max_position_embeddings = READS
    rng, dialogue = random.Random(seed), Dialogue(tokenizer)
    plain: list[DataRow] = []
    for n, row in enumerate(questions(made * BATCH, seed + 1)):
        plain += lessons(row, called(row) if n % 2 else guessed(row, rng), dialogue)
    steps = max(made // 5, 1)
    mixed = plain[: steps * BATCH // 2]
    for row in questions(steps * BATCH // 4, seed + 2):
        mixed += lessons(row, called(row), dialogue, skill(row, rng))
    for texts, count, rate in ((plain, made, RATE), (mixed, steps, RATE / 3)):
        with progress("Training the student", total=count, unit="steps") as tick:
            arithmetic.pretrain(
                model, tokenizer, texts, count, BATCH, rate, seed, lambda step, loss: tick(step)
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def command(folder: Path, seed: int, steps: int, made: int) -> list[str]:
    """What a person would type behind `opdkit`."""
    return [
        "train",
        "--method=skill_sd",
        f"--student={student(folder / 'student', seed, made)}",
        f"--data={write_rows(folder / 'train.jsonl', questions(QUESTIONS, seed + 3))}",
        f"--output={folder / 'run'}",
        "--overwrite",
        "environment=calculator",
        "environment.max_turns=2",
        "annotate.skills=rules",
        f"steps={steps}",
        "prompts_per_step=8",
        "num_generations=8",
        "max_completion_length=48",
        "optim.learning_rate=5e-4",
        "optim.schedule=cosine",
        "optim.betas=[0.9, 0.95]",
        f"evaluate.data={write_rows(folder / 'test.jsonl', questions(HELD_OUT, seed, held=True))}",
        "evaluate.sampling.max_completion_length=48",
        "checkpoint.every=0",
        f"seed={seed}",
    ]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--steps", type=int, default=20)
    asked.add_argument("--made", type=int, default=300, help="steps that make the student")
    asked.add_argument("--out", type=Path, default=Path("runs/tool_skills"))
    asked.add_argument("settings", nargs="*", help="further settings of the run, key=value")
    given = asked.parse_args()
    folder = given.out / str(given.seed)
    line = command(folder, given.seed, given.steps, given.made) + given.settings
    print(shlex.join(["opdkit", *line]), flush=True)
    if opdkit(line):
        raise SystemExit("the run failed")
    evaluations = map(json.loads, (folder / "run" / "evals.jsonl").open())
    accuracy = {e["step"]: e["avg_at_k"]["value"] for e in evaluations if e["name"] == "student"}
    print(json.dumps({"seed": given.seed, "accuracy": accuracy}))


if __name__ == "__main__":
    main()

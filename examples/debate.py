"""Two teachers of different strength debate each sum before they score the student's answer: the
strong one is mostly right and says that it is sure, the weak one forgets carries and says that it
is not.

    python examples/debate.py --seed 0
    python examples/debate.py --seed 0 --tau 1000        # confidences ignored: both count alike

An answer has each column's digits and their sum with the carry, units first, then the whole:
738+965= is answered by 8513,3610,7917=1703. Three small models are made, then the command that
distils them is printed and run; accuracy is that of answers as the student samples them, on
held-out sums.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
from pathlib import Path

from opdkit.base.files import write_rows
from opdkit.base.progress import progress
from opdkit.cli import main as opdkit
from opdkit.recipes import arithmetic
from opdkit.types import DataRow

TAG = "<<CONFIDENCE="  # one token, as is its end
WORDS = [*arithmetic.CHARACTERS, ",", "?", ":", TAG, ">>"]
DIGITS, BATCH, RATE, HELD_OUT = 3, 32, 6e-3, 512
# what teachers are asked in the first round and in a later one, how a message stands in the
# transcript, and what a teacher reads when it scores
FIRST, LATER, MESSAGE, VIEW = "?{prompt}", "{said}\n?{prompt}", "{me}:{text}", "{debate}\n{prompt}"
# carries that a teacher's texts forget, confidence that it states
STRONG, WEAK = (0.0, 90), (0.9, 40)
CARELESS = 0.7  # carries that the student's texts forget


def added(a: int, b: int, rng: random.Random, forget: float) -> str:
    """The answer; each carry is dropped with probability `forget`."""
    columns, total, carry = [], "", 0
    for place in range(DIGITS):
        x, y = a // 10**place % 10, b // 10**place % 10
        column = x + y + carry
        columns.append(f"{x}{y}{column:02}")
        total = (f"{column:02}" if place == DIGITS - 1 else str(column % 10)) + total
        carry = 0 if rng.random() < forget else column // 10
    return f"{','.join(columns)}={total}"


def sums(count: int, seed: int, held: bool = False) -> list[DataRow]:
    """Problems, of which those held out never meet those that are not."""
    rng, rows = random.Random(f"{seed}/{held}"), []
    while len(rows) < count:
        a, b = (rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
        if arithmetic.held_out(a, b) == held:
            rows.append({"prompt": f"{a}+{b}=", "answer": f"{a + b:04}"})
    return rows


def answered(row: DataRow, rng: random.Random, forget: float) -> str:
    a, b = map(int, row["prompt"].rstrip("=").split("+"))
    return added(a, b, rng, forget)


def message(row: DataRow, rng: random.Random, forget: float, confidence: int) -> str:
    """What a teacher says in a debate."""
    return f"{answered(row, rng, forget)}{TAG}{confidence}>>"


def transcript(row: DataRow, rng: random.Random, rounds: int) -> str:
    """A debate as the annotator writes it."""
    said = [
        MESSAGE.format(me=me, text=message(row, rng, forget, confidence))
        for _ in range(rounds)
        for me, (forget, confidence) in enumerate((STRONG, WEAK), 1)
    ]
    return "\n\n".join(said)


def alone(row: DataRow, rng: random.Random, forget: float, confidence: int) -> DataRow:
    """A text of the first round."""
    prompt = FIRST.format(prompt=row["prompt"])
    return {"prompt": prompt, "response": message(row, rng, forget, confidence)}


def debating(row: DataRow, rng: random.Random, forget: float, confidence: int) -> DataRow:
    """A text of the first round, of the second, or an answer in sight of the whole debate."""
    kind = rng.choice(("first", "later", "view"))
    if kind == "first":
        return alone(row, rng, forget, confidence)
    if kind == "later":
        prompt = LATER.format(said=transcript(row, rng, 1), prompt=row["prompt"])
        return {"prompt": prompt, "response": message(row, rng, forget, confidence)}
    prompt = VIEW.format(debate=transcript(row, rng, 2), prompt=row["prompt"])
    return {"prompt": prompt, "response": answered(row, rng, forget)}


def trained(folder: Path, lessons: list[tuple[list[DataRow], float]], seed: int) -> str:
    """A model that learnt from one list of texts after the other, each at its learning rate; the
    one that is there already, where there is one.
    """
    if folder.exists():
        return str(folder)
    tokenizer = arithmetic.tokenizer(WORDS)
    model = arithmetic.model("student", len(tokenizer), seed)
    for texts, rate in lessons:
        steps = len(texts) // BATCH
        with progress(f"Training {folder.name}", total=steps, unit="steps") as tick:
            arithmetic.pretrain(
                model, tokenizer, texts, steps, BATCH, rate, seed, lambda step, loss: tick(step)
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def models(folder: Path, seed: int, made: int) -> dict[str, str]:
    """Student and teachers, of `made` steps of supervised training each, and a seventh of that for
    teachers in debates.
    """
    rng, rows = random.Random(seed), sums(made * BATCH, seed + 1)
    careless = [{**row, "response": answered(row, rng, CARELESS)} for row in rows]
    found = {"student": trained(folder / "student", [(careless, RATE)], seed)}
    for name, said in {"teacher_1": STRONG, "teacher_2": WEAK}.items():
        first = [alone(row, rng, *said) for row in rows]
        then = [debating(row, rng, *said) for row in rows[: len(rows) // 7]]
        found[name] = trained(folder / name, [(first, RATE), (then, RATE / 3)], seed)
    return found


def command(folder: Path, seed: int, steps: int, made: int, tau: float) -> list[str]:
    """What a person would type behind `opdkit`."""
    who = models(folder, seed, made)
    view = json.dumps(VIEW)
    return [
        "train",
        "--method=mad_opd",
        f"--student={who['student']}",
        f"--data={write_rows(folder / 'train.jsonl', sums(4096, seed + 2))}",
        r"--reward=regex:=(\d+)$",
        f"--output={folder / f'tau-{tau:g}'}",
        "--overwrite",
        *[
            f"models.{name}={{model: {json.dumps(who[name])}, view: {view}}}"
            for name in ("teacher_1", "teacher_2")
        ],
        f"annotate.debate.first={json.dumps(FIRST)}",
        f"annotate.debate.later={json.dumps(LATER)}",
        f"annotate.debate.message={json.dumps(MESSAGE)}",
        "annotate.debate.max_tokens=24",
        f"method.tau={tau:g}",
        f"steps={steps}",
        "prompts_per_step=32",
        "num_generations=2",
        "max_completion_length=20",
        "optim.learning_rate=1e-3",
        "optim.schedule=cosine",
        "optim.warmup_steps=5",
        "optim.betas=[0.9, 0.95]",
        f"evaluate.data={write_rows(folder / 'test.jsonl', sums(HELD_OUT, seed, held=True))}",
        "evaluate.sampling.max_completion_length=20",
        "checkpoint.every=0",
        f"seed={seed}",
    ]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--tau", type=float, default=1.0, help="temperature of the weights")
    asked.add_argument("--steps", type=int, default=60)
    asked.add_argument("--made", type=int, default=400, help="steps that make each model")
    asked.add_argument("--out", type=Path, default=Path("runs/debate"))
    asked.add_argument("settings", nargs="*", help="further settings of the run, key=value")
    given = asked.parse_args()
    folder = given.out / str(given.seed)
    line = command(folder, given.seed, given.steps, given.made, given.tau)
    line += given.settings
    print(shlex.join(["opdkit", *line]), flush=True)
    if opdkit(line):
        raise SystemExit("the run failed")
    evaluations = map(json.loads, (folder / f"tau-{given.tau:g}" / "evals.jsonl").open())
    accuracy = {e["step"]: e["avg_at_k"]["value"] for e in evaluations if e["name"] == "student"}
    print(json.dumps({"tau": given.tau, "seed": given.seed, "accuracy": accuracy}))


if __name__ == "__main__":
    main()

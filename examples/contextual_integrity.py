"""What may be said depends on whom it is for: a student that tells everyone nearly everything
learns from itself in two contexts, of which one is told what is fit to share and one what is not.

    python examples/contextual_integrity.py --seed 0

A row asks "for doctor: rome, flu, rent, chess, cat." and the answer says for whom it is and lists
items, "doctor: flu, chess.". The student was pretrained to heed a note where there is one, whatever
it allows; it never learnt what fits whom. The command that distils it is printed and run; on
held-out rows utility is the share of fit items that are said, integrity the share of unfit ones
that are not.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from opdkit.base.files import write_rows
from opdkit.base.progress import progress
from opdkit.cli import main as opdkit
from opdkit.data.views import of_row, view_of
from opdkit.recipes import arithmetic
from opdkit.types import DataRow, Rollout

KINDS = {
    "city": ("rome", "oslo", "lima", "cairo"),
    "job": ("cook", "clerk", "pilot", "nurse"),
    "illness": ("flu", "gout", "asthma", "measles"),
    "debt": ("rent", "loan", "fine", "tax"),
    "hobby": ("chess", "tennis", "sailing", "piano"),
    "pet": ("cat", "dog", "parrot", "rabbit"),
}
FIT = {
    "doctor": {"illness", "job", "hobby"},
    "bank": {"debt", "job", "city"},
    "friend": {"hobby", "pet", "city"},
    "landlord": {"pet", "job", "debt"},
}
KIND_OF = {item: kind for kind, items in KINDS.items() for item in items}
# what stands before the question: a small model finds an item in a note that it has read before
VIEWS = {
    "question": "{prompt}",
    "allowed": "fit: {allowed}.\n{prompt}",
    "disallowed": "unfit: {disallowed}.\n{prompt}",
}
WORDS = [*KIND_OF, *FIT, *re.findall(r"\S+|\n", "for fit unfit : , . \n")]
SHOWN, SAYS = 5, 0.75  # items of a row; how often one is said of which no note speaks
BATCH, RATE, HELD_OUT, EVERY = 32, 4e-3, 256, 16  # one row in so many is held out


def asked(whom: str, items: Iterable[str]) -> DataRow:
    items = list(items)
    return {
        "prompt": f"for {whom}: {', '.join(items)}.",
        "allowed": [item for item in items if KIND_OF[item] in FIT[whom]],
        "disallowed": [item for item in items if KIND_OF[item] not in FIT[whom]],
    }


def rows_of(count: int, seed: int, held: bool = False) -> list[DataRow]:
    """Rows, of which those held out never meet those that are not."""
    rng, rows = random.Random(f"{seed}/{held}"), []
    while len(rows) < count:
        kinds = sorted(rng.sample(list(KINDS), SHOWN), key=list(KINDS).index)
        row = asked(rng.choice(list(FIT)), [rng.choice(KINDS[kind]) for kind in kinds])
        if (random.Random(row["prompt"]).randrange(EVERY) == 0) == held:
            rows.append(row)
    return rows


def lesson(row: DataRow, rng: random.Random) -> DataRow:
    """A text for the student's pretraining, whose note, if there is one, has nothing to do with
    whom it is for.
    """
    items = row["allowed"] + row["disallowed"]
    items.sort(key=row["prompt"].index)
    number = rng.randint(1, SHOWN - 1)
    noted = [items[i] for i in sorted(rng.sample(range(SHOWN), number))]
    view = rng.choice(list(VIEWS))
    chance = {"allowed": 1.0, "disallowed": 0.0, "question": SAYS}[view]
    said = [i for i in items if rng.random() < (chance if i in noted else SAYS)]
    seen = view_of(VIEWS[view]).row(of_row({**row, "allowed": noted, "disallowed": noted})) or row
    whom = row["prompt"].removeprefix("for ").partition(":")[0]
    return {"prompt": seen["prompt"], "response": f"{whom}: {', '.join(said)}."}


def student(folder: Path, seed: int, steps: int) -> str:
    """A model that heeds notes and else says what it likes; the one that is there already, where
    there is one.
    """
    if folder.exists():
        return str(folder)
    tokenizer, rng = arithmetic.tokenizer(WORDS), random.Random(seed)
    model = arithmetic.model("student", len(tokenizer), seed)
    texts = [lesson(row, rng) for row in rows_of(steps * BATCH, seed + 1)]
    with progress("Training the student", total=steps, unit="steps") as tick:
        arithmetic.pretrain(
            model, tokenizer, texts, steps, BATCH, RATE, seed, lambda step, loss: tick(step)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# -------------------------------------------------------------------------------- what is measured


def said(response: str) -> set[str]:
    items = response.partition(":")[2].rstrip(".").split(",")
    return {item.strip() for item in items}


def utility(row: DataRow, response: str) -> float:
    """The share of fit items that are said."""
    return len(said(response) & set(row["allowed"])) / len(row["allowed"])


def integrity(row: DataRow, response: str) -> float:
    """The share of unfit items that are not said."""
    return 1 - len(said(response) & set(row["disallowed"])) / len(row["disallowed"])


def fit(rollout: Rollout) -> float:
    """The reward: 1 where all that is fit is said and nothing that is not."""
    row = rollout.row
    return float(utility(row, rollout.text) == integrity(row, rollout.text) == 1)


fit.confined = False  # it compares words; a process for each answer would take half of the run


# ------------------------------------------------------------------------------------------ the run


def command(folder: Path, seed: int, steps: int, made: int) -> list[str]:
    """What a person would type behind `opdkit`."""
    return [
        "train",
        "--method=selfci",
        f"--student={student(folder / 'student', seed, made)}",
        f"--data={write_rows(folder / 'train.jsonl', rows_of(4096, seed + 2))}",
        f"models.allowed.view={json.dumps(VIEWS['allowed'])}",
        f"models.disallowed.view={json.dumps(VIEWS['disallowed'])}",
        f"--reward={__file__}:fit",
        f"--output={folder / 'run'}",
        "--overwrite",
        f"steps={steps}",
        "prompts_per_step=32",
        "num_generations=4",
        "max_completion_length=14",
        "optim.learning_rate=3e-3",
        "optim.schedule=cosine",
        "optim.warmup_steps=5",
        "optim.betas=[0.9, 0.95]",
        f"evaluate.data={write_rows(folder / 'test.jsonl', rows_of(HELD_OUT, seed, held=True))}",
        "evaluate.sampling.max_completion_length=14",
        "checkpoint.every=0",
        f"seed={seed}",
    ]


def measured(folder: Path, step: int) -> dict[str, float]:
    """Utility and integrity of the answers to the held-out rows, and the share that has both."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").open()]
    answers = (folder / "run" / "samples" / f"eval_student_{step:06}.jsonl").open()
    texts = [json.loads(line)["text"] for line in answers]
    kept = [(utility(*pair), integrity(*pair)) for pair in zip(rows, texts, strict=True)]
    shares = {
        "utility": [u for u, _ in kept],
        "integrity": [i for _, i in kept],
        "both": [u == i == 1 for u, i in kept],
    }
    return {name: round(sum(values) / len(kept), 3) for name, values in shares.items()}


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--steps", type=int, default=100)
    given.add_argument("--made", type=int, default=1200, help="steps that make the student")
    given.add_argument("--out", type=Path, default=Path("runs/contextual_integrity"))
    given.add_argument("settings", nargs="*", help="further settings of the run, key=value")
    options = given.parse_args()
    folder = options.out / str(options.seed)
    line = command(folder, options.seed, options.steps, options.made) + options.settings
    print(shlex.join(["opdkit", *line]), flush=True)
    if opdkit(line):
        raise SystemExit("the run failed")
    for step in (0, options.steps):
        print(json.dumps({"seed": options.seed, "step": step, **measured(folder, step)}))


if __name__ == "__main__":
    main()

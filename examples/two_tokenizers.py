"""Distil between two tokenizers: a student that reads characters, from a teacher that reads numbers
in pairs of digits.

python examples/two_tokenizers.py FOLDER [METHOD ...]     (one core, 3 minutes; the models are made
once per folder)

Both learn the written sums of `opdkit quickstart`; the student's training texts forget two carries
in five, so it knows what is right but is unsure of it, and is evaluated as it samples. It also has
a token for "\\n=", which the teacher writes as two.
"""

import json
import sys
from pathlib import Path

import opdkit
from opdkit.base.progress import progress
from opdkit.recipes import arithmetic

HYBRID = "gold(lmbda=1.0, hybrid=true, longer=rank, matched_weight=1.0, unmatched_weight=1.0)"
METHODS = ("uld", "gold", HYBRID)
# carries that the student's training texts lack; at 0.7 it prefers the wrong ones, which only
# HYBRID corrects
FORGET = 0.4
CHARACTERS = list(arithmetic.CHARACTERS)
# vocabulary, how text is divided, and the supervised training before: steps and carries forgotten
SIDES = {
    "teacher": (
        [f"{i:02}" for i in range(100)] + CHARACTERS,
        r"\d{2}(?=(\d{2})?[+=])|[\s\S]",
        400,
        0.0,
    ),
    "student": (["\n=", *CHARACTERS], r"\n=|[\s\S]", 200, FORGET),
}


def make(side: str, folder: Path) -> str:
    """A model trained from scratch, unless it is there."""
    if not folder.exists():
        words, pattern, steps, forget = SIDES[side]
        start, own = arithmetic.SIZES[side], arithmetic.tokenizer(words, pattern)
        model = arithmetic.model(side, len(own), seed=0)
        rows = arithmetic.problems(steps * start.batch_size, 0, forget=forget)
        with progress(f"Training the {side}", total=steps, unit="steps") as tick:
            arithmetic.pretrain(
                model,
                own,
                rows,
                steps,
                start.batch_size,
                start.learning_rate,
                progress=lambda step, loss: tick(step),
            )
        model.save_pretrained(folder)
        own.save_pretrained(folder)
    return str(folder)


def main(folder: Path, methods: tuple[str, ...]) -> None:
    teacher, student = (make(side, folder / side) for side in SIDES)
    found = {}
    for number, method in enumerate(methods):
        result = opdkit.distill(
            student,
            teacher,
            arithmetic.problems(2048, 1),
            method,
            eval_prompts=arithmetic.problems(256, 0, held=True),
            reward=r"regex:=(\d+)$",
            evaluate__teacher=True,
            steps=60,
            num_generations=4,
            max_completion_length=64,
            learning_rate=3e-4,
            schedule="cosine",
            warmup_steps=5,
            output=str(folder / f"run-{number}"),
            overwrite=True,
        )
        accuracy = {(e.name, e.step): round(e.avg_at_k.value, 3) for e in result.evaluations}
        found[method] = [accuracy["student", 0], accuracy["student", 60]]
        print(
            f"{method}: teacher {accuracy['teacher', 0]:.3f}  student {found[method][0]:.3f} -> "
            f"{found[method][1]:.3f}"
        )
    print(json.dumps({"teacher": accuracy["teacher", 0], "methods": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]) or METHODS)

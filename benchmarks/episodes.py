"""Episodes of several turns against answers of one turn with as many tokens of the student, side by
side: what the turns of others cost.

Turns end by themselves (their lengths are geometric) or at a limit, and an environment answers each
with some words. The other side samples responses of one turn to the same questions, each with
exactly as many tokens as the student has in that episode. Before anything is timed, the log-probs
of the student's tokens must be those of a pass over the whole episodes to 1e-5.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from common import (
    alternate,
    begin,
    parser,
    questions,
    qwen3,
    ratios,
    save,
    spread,
    stopping,
    synchronize,
    table,
    text,
    tokenizer,
)

from opdkit.environments import Dialogue, Environment, EpisodeSampler
from opdkit.sampling import HFSampler, hf
from opdkit.sampling.decode import Decoding
from opdkit.sampling.rows import Record, Rows
from opdkit.types import DataRow, Prompt, Rollout, Sampling

LOGP_TOLERANCE = 1e-5
TEMPLATE = (
    "{% for m in messages %}{{ 'w2 ' + m.content + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}w3{% endif %}"
)


class Talk(Environment):
    """Answers each turn with some of its words, until there were enough turns."""

    def __init__(self, turns: int, words: list[str]):
        self.left, self.words = turns, words

    def reset(self, row: DataRow, seed: int) -> str:
        self.rng = random.Random(seed)
        return str(row["prompt"])

    def step(self, action: str) -> str:
        self.left -= 1
        return self.rng.choice(self.words)

    @property
    def done(self) -> bool:
        return self.left == 0

    def score(self) -> float:
        return 1.0


class Cut(Decoding):
    """Decodes responses that are cut at lengths of their own."""

    lengths: ClassVar[list[int]] = []

    def _release(self, batch: Rows, drawn: Record) -> Rows | None:
        limits = torch.tensor(self.lengths, device=self.device)[batch.row]
        done = batch.count >= limits
        if bool(done.all()):
            return None
        if bool(done.any()):
            batch.keep(~done)
        return batch


@torch.no_grad()
def scoring_error(model: Any, rollouts: list[Rollout]) -> float:
    """Largest difference between recorded log-probs and those of a pass over the whole text."""
    worst = 0.0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt + rollout.tokens], device=model.device)
        logits = model(ids).logits[0, len(rollout.prompt) - 1 : -1].float()
        logps = logits.log_softmax(-1).gather(-1, ids[0, len(rollout.prompt) :, None])[:, 0]
        own = torch.tensor(rollout.trained, device=model.device)
        error = (logps - torch.tensor(rollout.logp, device=model.device))[own].abs().max()
        worst = max(worst, float(error))
    return worst


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--episodes", type=int, default=64)
    options.add_argument("--turns", type=int, default=4)
    options.add_argument("--turn-length", type=int, default=32, help="mean tokens of a turn")
    options.add_argument("--answer-length", type=int, default=8, help="mean words of an answer")
    options.add_argument("--pairs", type=int, default=7)
    args = options.parse_args(argv)
    begin(args)
    with torch.device(args.device):
        model = qwen3(args.hidden, args.layers, args.vocab, initial=0.05)
    endless = stopping(copy.deepcopy(model), 0.0)
    model = stopping(model, 1 / args.turn_length)
    words = tokenizer(args.vocab)
    words.chat_template = TEMPLATE
    short = max(args.answer_length // 2, 1)
    answers = questions(64, args.vocab, args.seed + 1, short, 2 * args.answer_length - short)
    rows = [
        {"id": f"q{i}", "prompt": question}
        for i, question in enumerate(questions(args.episodes, args.vocab, args.seed))
    ]
    prompts = [
        Prompt(row["id"], words(row["prompt"])["input_ids"], {"prompt": row["prompt"]})
        for row in rows
    ]
    episodes = EpisodeSampler(
        HFSampler(model, words),
        Dialogue(words),
        lambda: Talk(args.turns, answers),
        turn_tokens=2 * args.turn_length,
    )
    room = args.turns * (2 * args.turn_length + 2 * args.answer_length + 8)
    lived = episodes.sample(prompts, Sampling(max_completion_length=room), seed=0)
    error = scoring_error(model, lived)
    if model.dtype == torch.float32 and error > LOGP_TOLERANCE:
        raise AssertionError(f"recorded log-probs are off by {error:.2e}")

    def timed(run: Callable[[int], list[Rollout]]) -> Callable[[], dict[str, float]]:
        count = iter(range(1, 1_000_000))

        def call() -> dict[str, float]:
            number = next(count)
            synchronize(args.device)
            start = time.perf_counter()
            rollouts = run(number)
            synchronize(args.device)
            seconds = time.perf_counter() - start
            own = sum(sum(r.trained) for r in rollouts)
            return {
                "seconds": seconds,
                "own": own,
                "per_token": seconds / own,
                "others": sum(len(r.tokens) for r in rollouts) - own,
                "turns": sum(r.turns[-1] + 1 if r.turns else 1 for r in rollouts),
            }

        return call

    single, drawn = HFSampler(endless, words), Sampling(max_completion_length=room)

    def several(number: int) -> list[Rollout]:
        rollouts = episodes.sample(prompts, drawn, seed=number)
        Cut.lengths = [sum(r.trained) for r in rollouts]  # of the pair's other side
        return rollouts

    def one(number: int) -> list[Rollout]:
        with patch.object(hf, "Decoding", Cut):
            most = Sampling(max_completion_length=max(Cut.lengths))
            return single.sample(prompts, most, seed=number)

    sides = {"episodes": timed(several), "single": timed(one)}
    results = alternate(sides, args.pairs)
    mean = sum(r["own"] for r in results["episodes"]) / args.pairs / args.episodes
    if any(a["own"] != b["own"] for a, b in zip(*results.values(), strict=True)):
        raise AssertionError("the sides wrote different numbers of tokens")
    per_token = {name: [1e6 * r["per_token"] for r in of] for name, of in results.items()}
    ratio = ratios(per_token["episodes"], per_token["single"])
    turns = sum(r["turns"] for r in results["episodes"]) / args.pairs / args.episodes
    others = sum(r["others"] for r in results["episodes"]) / args.pairs / args.episodes
    table(
        ["side", "responses", "turns", "student's tokens", "others'", "us per token", "ratio"],
        [
            ["episodes", args.episodes, turns, mean, others, text(spread(per_token["episodes"]), 1),
             text(ratio)],
            ["one turn", args.episodes, 1, mean, 0, text(spread(per_token["single"]), 1), ""],
        ],
    )  # fmt: skip
    print(f"largest logp difference: {error:.2g}")
    points = {
        "ratio": ratio,
        "turns": turns,
        "others_tokens": others,
        "student_tokens": mean,
        "microseconds_per_token": {name: spread(of) for name, of in per_token.items()},
    }
    return save("episodes", args, {"largest_logp_difference": error, **points})


if __name__ == "__main__":
    main()

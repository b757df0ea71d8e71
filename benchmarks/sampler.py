"""The sampler in this process against transformers' `generate` (and vLLM, where it is installed):
response tokens per second.

Three cases: responses of equal length, all at once; of geometric length (mean a quarter of the
limit) with `--rows` of them at a time, which is what the memory for keys and values allows in
practice; and geometric, all at once. Before anything is timed, greedy responses must be
`generate`'s to the token, and recorded log-probs those of a scoring pass to 1e-5 (in float32).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import (
    EOS,
    PAD,
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

from opdkit.models.body import head_of
from opdkit.objective.facts import LogpFact
from opdkit.objective.needs import Needs
from opdkit.sampling import HFSampler
from opdkit.teachers import LocalModel
from opdkit.train.gather import gather
from opdkit.types import Prompt, Rollout, Sampling

LOGP_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Timed:
    """One call that samples everything."""

    seconds: float
    tokens: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Case:
    """What both sides are asked for."""

    name: str
    model: Any
    prompts: list[Prompt]
    sampling: Sampling
    rows: int  # responses in progress at once


def generate(case: Case, tokenizer: Any, greedy: bool = False) -> list[list[int]]:
    """Responses by `generate`, batch after batch, each cut after its stop token."""
    n, device = case.sampling.num_generations, case.model.device
    out: list[list[int]] = []
    size = max(1, case.rows // n)
    for start in range(0, len(case.prompts), size):
        batch = {"input_ids": [p.tokens for p in case.prompts[start : start + size]]}
        inputs = tokenizer.pad(batch, return_tensors="pt").to(device)
        draw: dict[str, Any] = (
            {"do_sample": False}
            if greedy
            else {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        )
        ids = case.model.generate(
            **inputs,
            **draw,
            max_new_tokens=case.sampling.max_completion_length,
            num_return_sequences=n,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            out.append(row[: row.index(EOS) + 1] if EOS in row else row)
    return out


def sampler(case: Case, tokenizer: Any) -> HFSampler:
    longest = max(len(p.tokens) for p in case.prompts) + case.sampling.max_completion_length
    return HFSampler(case.model, tokenizer, max_batch_tokens=case.rows * longest)


# --------------------------------------------------------------------------------------- assertions


def same_greedily(case: Case, tokenizer: Any) -> int:
    """Compares greedy responses to `generate`'s; returns the number of tokens compared."""
    greedy = replace(
        case,
        sampling=Sampling(
            temperature=0.0, max_completion_length=case.sampling.max_completion_length
        ),
    )
    mine = [r.tokens for r in sampler(greedy, tokenizer).sample(greedy.prompts, greedy.sampling)]
    theirs = generate(greedy, tokenizer, greedy=True)
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a != b:
            raise AssertionError(
                f"greedy responses to prompt {number} differ: {a} here, {b} by generate"
            )
    return sum(map(len, mine))


def scoring_error(case: Case, rollouts: list[Rollout]) -> float:
    """Largest difference between recorded log-probs and those of a forward pass over the whole
    text.
    """
    scorer = LocalModel(case.model, head_of(case.model))
    needs = Needs(frozenset({LogpFact("student"), LogpFact("sampler")}))
    batch = gather(
        rollouts, needs, {"student": scorer}, recompute_student=True, device=case.model.device
    )
    return float((batch["student"].logp - batch["sampler"].logp)[batch.mask].abs().max())


# --------------------------------------------------------------------------------------------- vLLM


class VLLM:
    """The same weights in vLLM; it has no bias on the head, so it takes the case of equal lengths
    only.
    """

    def __init__(self, model: Any, tokenizer: Any, case: Case):
        from vllm import LLM

        plain = copy.deepcopy(model)
        plain.lm_head.bias = None
        self.folder = tempfile.TemporaryDirectory()
        plain.save_pretrained(self.folder.name)
        tokenizer.save_pretrained(self.folder.name)
        limit = max(len(p.tokens) for p in case.prompts) + case.sampling.max_completion_length
        self.engine = LLM(
            self.folder.name,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=limit,
            gpu_memory_utilization=0.4,
            seed=0,
        )

    def sample(self, case: Case, seed: int) -> int:
        from vllm import SamplingParams, TokensPrompt

        wish = SamplingParams(
            n=case.sampling.num_generations,
            max_tokens=case.sampling.max_completion_length,
            ignore_eos=True,
            detokenize=False,
            seed=seed,
        )
        texts = [TokensPrompt(prompt_token_ids=p.tokens) for p in case.prompts]
        answers = self.engine.generate(texts, wish, use_tqdm=False)
        return sum(len(o.token_ids) for answer in answers for o in answer.outputs)


# ---------------------------------------------------------------------------------------- measuring


def cases(args: argparse.Namespace) -> tuple[list[Case], Any]:
    gpu = args.device.startswith("cuda")
    with torch.device(args.device):
        if gpu:
            args.vocab = 151936
            model = qwen3(1024, 28, args.vocab, inner=3072, heads=16, kv_heads=8, head_dim=128).to(
                torch.bfloat16
            )
        else:
            model = qwen3(args.hidden, args.layers, args.vocab, initial=0.05)
    n, group = args.rollouts, args.num_generations
    prompts = [
        Prompt(f"q{i}", [int(word[1:]) for word in question.split()])
        for i, question in enumerate(questions(n // group, args.vocab, args.seed))
    ]
    sampling = Sampling(max_completion_length=args.length, num_generations=group)
    endless, natural = stopping(copy.deepcopy(model), 0.0), stopping(model, 4 / args.length)
    made = [
        Case("equal", endless, prompts[: max(args.rows // group, 1)], sampling, args.rows),
        Case(f"geometric, {args.rows} at once", natural, prompts, sampling, args.rows),
        Case("geometric, all at once", natural, prompts, sampling, n),
    ]
    return made, tokenizer(args.vocab)


def measure(case: Case, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn."""
    mine = sampler(case, tokenizer)
    calls = {"opdkit": 0, "generate": 0, "vllm": 0}

    def timed(name: str, run: Callable[[int], int]) -> Callable[[], Timed]:
        def call() -> Timed:
            calls[name] += 1
            torch.manual_seed(calls[name])
            synchronize(args.device)
            start = time.perf_counter()
            tokens = run(calls[name])
            synchronize(args.device)
            return Timed(time.perf_counter() - start, tokens)

        return call

    sides = {
        "opdkit": timed(
            "opdkit",
            lambda i: sum(len(r.tokens) for r in mine.sample(case.prompts, case.sampling, seed=i)),
        ),
        "generate": timed("generate", lambda i: sum(map(len, generate(case, tokenizer)))),
    }
    if case.name == "equal" and importlib.util.find_spec("vllm") is not None:
        engine = VLLM(case.model, tokenizer, case)
        sides["vllm"] = timed("vllm", lambda i: engine.sample(case, i))
    results = alternate(sides, args.pairs)
    rates = {name: [t.rate for t in of] for name, of in results.items()}
    tokens = {name: sum(t.tokens for t in of) for name, of in results.items()}
    count = len(case.prompts) * case.sampling.num_generations
    # equal lengths exactly; drawn ones within four standard errors
    for name, total in tokens.items():
        if abs(total / tokens["opdkit"] - 1) > (
            0.0 if case.name == "equal" else 4 * (2 / (count * args.pairs)) ** 0.5
        ):
            raise AssertionError(
                f"{name} wrote {total} tokens, opdkit {tokens['opdkit']}: not the same work"
            )
    return {
        "case": case.name,
        "rollouts": count,
        "rows": case.rows,
        "mean_length": tokens["opdkit"] / count / args.pairs,
        **{
            name: {"tokens": tokens[name], "tokens_per_second": spread(of)}
            for name, of in rates.items()
        },
        "ratio": {
            name: ratios(rates["opdkit"], of) for name, of in rates.items() if name != "opdkit"
        },
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument(
        "--hidden",
        type=int,
        default=256,
        help="of the CPU's model; a GPU gets the shape of Qwen3-0.6B",
    )
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--vocab", type=int, default=4096)
    options.add_argument("--rollouts", type=int, default=256)
    options.add_argument("--rows", type=int, default=64, help="responses in progress at once")
    options.add_argument("--num-generations", type=int, default=4, help="responses to one prompt")
    options.add_argument("--length", type=int, default=128, help="most tokens of a response")
    options.add_argument("--pairs", type=int, default=5)
    args = options.parse_args(argv)
    begin(args)
    made, words = cases(args)
    first = made[1]
    exact = first.model.dtype == torch.float32
    checks: dict[str, float] = {}
    if exact:
        checks["greedy_tokens_identical"] = same_greedily(
            replace(made[0], prompts=first.prompts), words
        )
        rollouts = sampler(first, words).sample(first.prompts, first.sampling, seed=1)
        checks["largest_logp_difference"] = scoring_error(first, rollouts)
        if checks["largest_logp_difference"] > LOGP_TOLERANCE:
            raise AssertionError(
                f"recorded log-probs are off by {checks['largest_logp_difference']:.2e}"
            )
    points = [measure(case, words, args) for case in made]
    rows = [
        [
            p["case"],
            p["rollouts"],
            f"{p['mean_length']:.1f}",
            *(
                text(p[side]["tokens_per_second"], 0) if side in p else ""
                for side in ("opdkit", "generate", "vllm")
            ),
            *(
                text(p["ratio"][side]) if side in p["ratio"] else ""
                for side in ("generate", "vllm")
            ),
        ]
        for p in points
    ]
    table(
        [
            "case",
            "rollouts",
            "mean length",
            "opdkit tokens/s",
            "generate",
            "vLLM",
            "opdkit / generate",
            "opdkit / vLLM",
        ],
        rows,
    )
    for name, value in checks.items():
        print(f"{name.replace('_', ' ')}: {value:g}")
    return save("sampler", args, {"checks": checks, "cases": points})


if __name__ == "__main__":
    main()

"""A made-up run folder with every part that a report can show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

RUN = """\
method: {name: iw_opd, arguments: {gamma: 0.5}}
student: Qwen/Qwen3-0.6B
teacher: Qwen/Qwen3-8B
data: {source: gsm8k, split: train}
steps: STEPS
learning_rate: 1.0e-06
sampling: {temperature: 1.0, max_completion_length: 512, num_generations: 4}
seed: 0
"""
TEXT = (
    "Let |x| be the number of apples.\n\nFirst, Natalia sold 48 clips in April.\nThen she sold "
    "half as many in May, that is 48 / 2 = 24.\nAltogether she sold 48 + 24 = 72 clips.\n\nThe "
    "answer is \\boxed{72}.<|im_end|>"
)


def fake_run(folder: Path, steps: int = 60, seed: int = 0) -> Path:
    """Fill `folder` with a plausible run of `steps` steps."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(RUN.replace("STEPS", str(steps)))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(_metrics(rng, step, steps)) + "\n")
    evals = [_eval("student_before", 0.46, 0), _eval("teacher", 0.78, 0)]
    evals += [
        _eval("student", 0.46 + 0.25 * (1 - math.exp(-3 * i / 5)), steps * i // 5)
        for i in range(1, 6)
    ]
    (folder / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evals))
    (folder / "samples").mkdir(exist_ok=True)
    for step in sorted({1, steps // 4, steps // 2, steps}):
        lines = [_sample(rng, step, steps, i) for i in range(4)]
        (folder / "samples" / f"step_{step:06}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    (folder / "summary.json").write_text(
        json.dumps({"steps": steps, "seconds": 5321.2, "device": "1 GPU"})
    )
    return folder


def _metrics(rng: np.random.Generator, step: int, steps: int) -> dict[str, float]:
    t = step / steps
    gap = 0.08 + 0.4 * math.exp(-5 * t)

    def near(value: float, spread: float = 0.08) -> float:
        return float(value * (1 + spread * rng.standard_normal()))

    seconds = {"sample": near(3.1), "score": near(0.6), "learn": near(1.4), "reward": near(0.05)}
    tokens = near(15000, 0.1)
    total = sum(seconds.values()) + 0.1
    row: dict[str, float] = {
        "step": step,
        "loss": near(gap, 0.2),
        "loss/PolicyGradient": near(gap * 0.8, 0.2),
        "loss/Divergence": near(gap * 0.2, 0.2),
        "weight/PolicyGradient": near(1.24, 0.02),
        "weight/Divergence": near(0.1, 0.02),
        "share/PolicyGradient": near(0.82, 0.02),
        "share/Divergence": near(0.18, 0.02),
        "teacher_kl/sampled": near(gap, 0.15),
        "entropy/student": near(0.35 - 0.1 * t),
        "completions/mean_length": near(210 + 40 * t),
        "completions/min_length": near(62, 0.2),
        "completions/max_length": min(512, near(440)),
        "completions/truncated_fraction": max(0, near(0.06 - 0.04 * t, 0.5)),
        "reward/mean": near(0.46 + 0.25 * (1 - math.exp(-3 * t))),
        "reward/std": near(0.45, 0.05),
        "correct/mean": min(1, near(0.46 + 0.25 * (1 - math.exp(-3 * t)))),
        "grad_norm": near(0.8 * gap + 0.1, 0.3) * (9 if step == steps // 3 else 1),
        "learning_rate": 1e-6 * min(1, step / (0.05 * steps + 1)),
        "tokens/trained": tokens,
        "tokens_per_second/sample": tokens / seconds["sample"],
        "tokens_per_second/score": tokens / seconds["score"],
        "tokens_per_second/learn": tokens / seconds["learn"],
        "tokens_per_second/step": tokens / total,
        "seconds/step": total,
        "memory/peak_gib": 38.2 + 0.01 * (step > 3),
        "iw_opd/mean_weight": near(1.24, 0.02),
        "trust/mean": min(1, near(0.95 - gap / 3, 0.01)),
        "effective_tokens/PolicyGradient": near(12000, 0.05),
        "term_gradient/PolicyGradient": near(0.02),
        "mass/teacher_on_teacher_top_64": 0.99,
    }
    row |= {
        f"log_ratio/{q}": near(v * gap * 5)
        for q, v in zip(("p01", "p05", "p50", "p95", "p99"), (-3, -1, 0, 0.4, 0.8))
    }
    row |= {
        f"weights/PolicyGradient/{q}": v
        for q, v in zip(("p01", "p05", "p50", "p95", "p99"), (1, 1.1, 1.25, 1.4, near(1.5)))
    }
    row |= {f"weights/Divergence/{q}": 1.0 for q in ("p01", "p05", "p50", "p95", "p99")}
    row |= {f"drift/tenth_{i:02}": near(gap * (0.5 + i / 10)) for i in range(1, 11)}
    row |= {
        f"quadrants/{kind}": share
        for kind, share in zip(
            ("unsure_apart", "unsure_agreed", "sure_apart", "sure_agreed"), (0.1, 0.1, 0.1, 0.7)
        )
    }
    return row | {f"seconds/{name}": value for name, value in seconds.items()}


def _eval(name: str, level: float, step: int) -> dict[str, object]:
    half = 1.96 * math.sqrt(level * (1 - level) / 1319)
    estimate = {"value": level, "low": level - half, "high": level + half}
    best = min(1.0, level + 0.12)
    return {
        "name": name,
        "n_problems": 1319,
        "samples_per_problem": 4,
        "avg_at_k": estimate,
        "pass_at_k": {
            "1": estimate,
            "4": {"value": best, "low": best - half, "high": min(1.0, best + half)},
        },
        "mean_length": 212.4,
        "truncated_share": 0.031,
        "reward_mean": level,
        "seconds": 184.0,
        "step": step,
        "tokens": 1120000,
        "per_problem": {
            f"gsm8k-{i}": min(1.0, max(0.0, level + 0.5 * math.cos(i))) for i in range(100)
        },
    }


def _sample(rng: np.random.Generator, step: int, steps: int, index: int) -> dict[str, object]:
    pieces = [piece for word in TEXT.split(" ") for piece in (" " + word,)]
    pieces = [
        part for piece in pieces for part in ([piece[:4], piece[4:]] if len(piece) > 6 else [piece])
    ]
    n = len(pieces)
    credit = rng.normal(-0.2, 1, n) * (rng.random(n) < 0.4) * (1.3 - step / steps)
    logp = -rng.exponential(0.4, n)
    return {
        "id": f"{step}/gsm8k-{17 + index}/0",
        "step": step,
        "prompt": "Natalia sold clips to 48 of her friends in April, and then she sold half as "
        "many clips in May. How many clips did Natalia sell altogether in April and May?",
        "pieces": pieces,
        "credit": [None if i == 3 else float(c) for i, c in enumerate(credit)],
        "weight": [0.0 if 20 < i < 30 else float(1.5 - i / n) for i in range(n)],
        "logp": logp.tolist(),
        "teacher_logp": (logp + credit).tolist(),
        "reward": float(index != 1),
        "finish": "length" if index == 1 else "stop",
        "text": TEXT,
    }

"""The line per step that a person sees."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from opdkit.base.progress import duration


@dataclass
class Screen:
    """A line per step, at most one every two seconds, with rate and time left."""

    steps: int
    first: int
    max_tokens: int | None = None
    first_tokens: int = 0
    every: float = 2.0

    def __post_init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self.last < self.every and step not in (self.first + 1, self.steps):
            return
        self.last = now
        done = (step - self.first) / (self.steps - self.first)
        words = [f"step {step}/{self.steps}"]
        if self.max_tokens is not None:  # whichever ends first
            tokens = metrics["tokens/sampled_so_far"]
            done = max(done, (tokens - self.first_tokens) / (self.max_tokens - self.first_tokens))
            words = [
                f"step {step}",
                f"{min(tokens / self.max_tokens, 1):.0%} of {self.max_tokens:,} tokens",
            ]
        left = (now - self.start) * max(1 / done - 1, 0)
        for label, key in (
            ("loss", "loss"),
            ("KL", "teacher_kl/sampled"),
            ("reward", "reward/mean"),
            ("length", "completions/mean_length"),
        ):
            if key in metrics and math.isfinite(metrics[key]):
                words.append(f"{label} {metrics[key]:.3g}")
        words += [f"{metrics['tokens_per_second/step']:,.0f} tokens/s", f"{duration(left)} left"]
        print("  ".join(words), file=sys.stderr)

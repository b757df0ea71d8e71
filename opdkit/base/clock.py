"""Seconds of each phase of a step, and when each was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Span = tuple[str, float, float]  # a phase, when it began and ended, seconds since 1970


class Clock:
    """Seconds of each phase of a step, and when each was."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []
        self.waits: list[Span] = []  # parts of them in which others did the work
        self.device = torch.device(device)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, at = time.perf_counter(), time.time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        took = time.perf_counter() - start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + took
        self.spans.append((phase, at, at + took))

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """A part of a phase in which another process does the work."""
        at = time.time()
        yield
        self.waits.append((phase, at, time.time()))

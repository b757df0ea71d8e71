"""What a step leaves behind: one line of metrics, now and then a few rollouts with their credits,
and a line on the screen.
"""

from __future__ import annotations

import json
import math
import operator
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from opdkit.base.clock import Clock, Span
from opdkit.base.files import write_whole
from opdkit.objective.batch import Batch
from opdkit.objective.facts import ColumnFact, LogpFact
from opdkit.objective.grammar import credit_of
from opdkit.objective.head import Learned
from opdkit.objective.plan import StepPlan
from opdkit.train import diagnostics
from opdkit.train.collect.ahead import Written
from opdkit.train.gather import mean_gap
from opdkit.train.mesh import Mesh
from opdkit.train.student import Student
from opdkit.train.track import Trackers
from opdkit.types import MARK_OF, Rollout, reward_means

TIMELINE = "timeline.jsonl"


class Other(Protocol):
    """A part of a run that is elsewhere, and tells what it did."""

    def counts(self) -> Mapping[str, float]:
        """Of the whole time, by the names of metrics."""

    def spans(self) -> Sequence[Any]:
        """[part, doing, from, to], in unix seconds, since it was asked last."""


@dataclass
class StepRecord:
    """What the micro-batches and optimiser steps of one step leave; read once at its end."""

    names: tuple[str, ...]
    term_gradients: bool = False  # whether they are measured in this step
    parts: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)
    gap: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)
    slope_norms: list[Tensor] = field(default_factory=list)
    positions: int = 0
    norms: list[Tensor] = field(default_factory=list)
    rate: float = 0.0
    plans: list[StepPlan] = field(default_factory=list)
    curriculum: Mapping[str, float] = field(default_factory=dict)  # where it stood, by name
    earlier: frozenset[str] = frozenset()  # ids of rollouts that were written at earlier steps
    beside: Mapping[str, float] = field(default_factory=dict)  # so what stands beside the student
    collected: Mapping[str, float] = field(default_factory=dict)  # so the step's rollouts
    # when other parts of the run than trainer and sampler did what for the step
    spans: Mapping[str, Sequence[Span]] = field(default_factory=dict)
    # steps and optimiser steps that the student has taken since the rollouts were asked for
    lag: tuple[int, int] = (0, 0)

    def add(self, learned: Learned, positions: Tensor) -> None:
        """A micro-batch at flat positions [N]."""
        self.seen.append(positions)
        self.slopes.append(learned.slopes)
        self.parts.append(learned.parts)
        self.entropy.append(learned.entropy)
        self.logp.append(learned.logp)
        self.gap.append(learned.gap)
        self.positions += learned.positions

    def join(self, mesh: Mesh) -> None:
        """What the other processes have learnt of their tokens, beside what this one has."""
        if mesh.size == 1:
            return
        held = [self.seen, self.parts, self.entropy, self.logp, self.gap]
        for mine, all_ in zip(held, zip(*mesh.every(held))):
            mine[:] = [tensor for part in all_ for tensor in part]
        self.positions = sum(len(positions) for positions in self.seen)
        self.slope_norms = [mesh.total(norm.square()).sqrt() for norm in self.slope_norms]

    def close(self, plan: StepPlan, norm: Tensor, rate: float) -> None:
        """An optimiser step, with the norm [] of its gradient."""
        if self.slopes:
            self.slope_norms.append(torch.stack(self.slopes).sum(0).sqrt())
            self.slopes.clear()
        self.plans.append(plan)
        self.norms.append(norm.detach())
        self.rate = rate

    def metrics(self, batch: Batch) -> dict[str, float]:
        """Losses per optimiser step, weights, entropy and the distance to the teacher, in nats."""
        steps = max(len(self.plans), 1)
        out: dict[str, float] = {"loss": 0.0}  # where no term has a token to look at
        if self.parts:
            parts = torch.stack(self.parts).sum(0) / steps
            out["loss"] = parts.sum().item()
            out |= {f"loss/{name}": value for name, value in zip(self.names, parts.tolist())}
            out["entropy/student"] = (torch.cat(self.entropy).sum() / max(self.positions, 1)).item()
        plan = self.plans[0]
        trained = max(int(plan.mask.sum()), 1)
        for part in plan.parts:
            on = part.weight[part.weight != 0]
            out[f"share/{part.name}"] = len(on) / trained
            out[f"weight/{part.name}"] = on.mean().item() if len(on) else 0.0
        gap = mean_gap(batch, "student", "teacher")
        if math.isnan(gap) and self.gap:
            gap = self.spread(batch, self.gap)[batch.mask].nanmean().item()
        if not math.isnan(gap):
            # one-sample estimate of KL(student || teacher), mean over tokens
            out["teacher_kl/sampled"] = gap
        out |= self.by_turn(batch)
        out |= self.mismatch(batch)
        out |= self.distributions(batch)
        out["grad_norm"] = torch.stack(self.norms).mean().item()
        out["learning_rate"] = self.rate
        out |= {f"beside/{name}": value for name, value in self.beside.items()}
        out |= self.collected
        return out | {f"curriculum/{name}": value for name, value in self.curriculum.items()}

    def by_turn(self, batch: Batch) -> dict[str, float]:
        """Of episodes: the student's tokens in each turn, counted from 1, and the mean of their
        distance to the teacher, nats.
        """
        if ColumnFact("turn") not in batch.facts:
            return {}
        known = {LogpFact(name) for name in ("student", "teacher")} <= set(batch.facts)
        gaps = (
            batch.facts[LogpFact("student")] - batch.facts[LogpFact("teacher")]
            if known
            else self.spread(batch, self.gap)
            if self.gap
            else torch.full(batch.shape, torch.nan)
        )  # [B, T]
        out: dict[str, float] = {}
        for turn in batch.turn[batch.mask].unique().tolist():
            mine = batch.mask & (batch.turn == turn)
            gap = gaps.to(batch.device)[mine].nanmean().item()
            out[f"tokens_by_turn/{turn + 1:02}"] = int(mine.sum())
            if not math.isnan(gap):
                out[f"kl_by_turn/{turn + 1:02}"] = gap
        return out

    def mismatch(self, batch: Batch) -> dict[str, float]:
        """How far what the sampler said of its tokens is from what the trainer says, nats; another
        engine rounds differently.
        """
        if LogpFact("sampler") not in batch.facts or not self.logp:
            return {}
        apart = (self.spread(batch, self.logp) - batch["sampler"].logp)[batch.mask].abs()
        apart = apart[apart.isfinite()]
        return (
            {"sampling/mismatch": apart.mean().item(), "sampling/mismatch_max": apart.max().item()}
            if len(apart)
            else {}
        )

    def distributions(self, batch: Batch) -> dict[str, float]:
        """How tokens, weights and, where measured, the gradients of terms are distributed: see
        `opdkit.train.diagnostics`.
        """
        found = diagnostics.of_weights(self.plans[0])
        for parts in zip(*(plan.parts for plan in self.plans)):  # of a term, by optimiser step
            mask = reduce(operator.or_, (part.mask for part in parts))
            found |= parts[0].term.loss.metrics(batch, mask)
        found |= diagnostics.of_tokens(
            batch, self.spread(batch, self.entropy), self.spread(batch, self.gap)
        )
        if self.term_gradients and self.slope_norms:
            norms = torch.stack(self.slope_norms).mean(0)
            found |= {f"term_gradient/{name}": norm for name, norm in zip(self.names, norms)}
        return (
            dict(zip(found, torch.stack([value.double() for value in found.values()]).tolist()))
            if found
            else {}
        )

    def spread(self, batch: Batch, values: Sequence[Tensor]) -> Tensor:
        """[B, T]: numbers of micro-batches at their positions, as they were when first seen; NaN
        elsewhere.
        """
        table = torch.full(
            (batch.tokens.numel(),), torch.nan, dtype=batch.dtype, device=batch.device
        )
        for positions, numbers in list(zip(self.seen, values))[::-1]:
            table[positions] = numbers
        return table.view(batch.shape)


@dataclass
class Recorder:
    """Writes what steps leave behind into a run folder."""

    folder: Path
    trackers: Trackers
    token_text: Callable[[int], str]
    keep_samples: int = 8
    sample_every: int = 10
    # steps between measurements of each term's gradient in the logits; 0: never
    term_gradients_every: int = 0
    show: Callable[[int, Mapping[str, float]], None] | None = None
    # where there are several teachers: the one that scores a rollout
    route: Callable[[Rollout], str] | None = None
    # says so where nothing is learnt
    idle: Callable[[Mapping[str, float]], object] | None = None
    # of the device's arithmetic, by phase
    use: Callable[[Sequence[Rollout], int, Mapping[str, float]], dict[str, float]] | None = None
    others: Sequence[Other] = ()  # parts of the run elsewhere

    def start(
        self, step: int, names: tuple[str, ...], earlier: frozenset[str] = frozenset()
    ) -> StepRecord:
        """An empty record of step number `step` (from 0) of an objective with terms `names`;
        `earlier`: the ids of rollouts that were not written in it.
        """
        every = self.term_gradients_every
        return StepRecord(names, bool(every) and step % every == 0, earlier=earlier)

    def step(
        self,
        step: int,
        tokens: int,
        rollouts: Sequence[Rollout],
        batch: Batch,
        record: StepRecord,
        clock: Clock,
        student: Student,
        written: Written,
    ) -> None:
        """Record step number `step` (from 1), the phases of which `clock` has measured."""
        seconds = clock.seconds
        now = [r for r in rollouts if r.id not in record.earlier]
        metrics = (
            record.metrics(batch)
            | rollout_metrics(now)
            | speed(rollouts, record.positions, seconds, now, written.seconds)
        )
        if any(record.lag):
            metrics |= {"lag/steps": float(record.lag[0]), "lag/updates": float(record.lag[1])}
        if record.earlier:
            metrics["tokens/trained"] = float(sum(sum(r.trained) for r in rollouts))
            metrics["tokens/of_earlier_steps"] = metrics["tokens/trained"] - float(
                sum(sum(r.trained) for r in now)
            )
        if self.route is not None:
            metrics |= teacher_metrics(batch, [self.route(r) for r in rollouts])
        if self.use is not None:
            metrics |= self.use(rollouts, sum(any(r.drawn) for r in now), seconds)
        for other in self.others:
            metrics |= other.counts()
        metrics["tokens/sampled_so_far"] = tokens
        metrics["memory/peak_gib"] = peak_memory(student.device)
        self.trackers.log(step, metrics)
        waits = [("wait", begun, ended) for _, begun, ended in clock.waits]
        teacher = [*record.spans.get("teacher", ()), *clock.waits]
        parts = {"trainer": [*clock.spans, *waits], "sampler": written.spans, "teacher": teacher}
        self.timeline(step, {**record.spans, **parts})
        if self.idle is not None:
            self.idle(metrics)
        if self.keep_samples and self.sample_every and (step == 1 or step % self.sample_every == 0):
            self.samples(step, rollouts[: self.keep_samples], batch, record.plans[0])
        if self.show is not None:
            self.show(step, metrics)

    def timeline(self, step: int, parts: Mapping[str, Sequence[Span]]) -> None:
        """When each part of the run did what for a step, for the report."""
        spans = [[part, *span] for part, found in parts.items() for span in found]
        spans += [span for other in self.others for span in other.spans()]
        with (self.folder / TIMELINE).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "spans": spans}) + "\n")

    def samples(self, step: int, rollouts: Sequence[Rollout], batch: Batch, plan: StepPlan) -> None:
        """A few rollouts with what each token was credited with, for the report."""
        part = next((p for p in plan.parts if credit_of(p.term.loss) is not None), plan.parts[0])
        credit = credit_of(part.term.loss)
        credits = None if credit is None else credit(batch).expand(batch.shape)
        teacher = batch.facts.get(LogpFact("teacher"))
        weight = torch.stack([p.weight.expand(batch.shape) for p in plan.parts]).sum(0)
        lines = []
        for b, r in enumerate(rollouts):
            n = len(r.tokens)
            lines.append(
                {
                    "id": r.id,
                    "step": step,
                    "prompt": "".join(map(self.token_text, r.prompt))
                    if r.turns
                    else r.row.get("prompt"),
                    "pieces": [self.token_text(t) for t in r.tokens],
                    "parts": parts_of(r),
                    "credit": [  # of tokens that are not trained there is none
                        value if own else None
                        for value, own in zip(_numbers(credits, b, n), r.trained)
                    ],
                    "weight": _numbers(weight, b, n),
                    "logp": r.logp if r.logp else _numbers(None, b, n),
                    "teacher_logp": _numbers(teacher, b, n),
                    "reward": r.reward,
                    **({"rewards": r.rewards} if r.rewards else {}),
                    "correct": r.correct,
                    "feedback": r.feedback,
                    "finish": r.finish,
                    "text": r.text,
                }
            )
        path = self.folder / "samples" / f"step_{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, "".join(json.dumps(line, default=str) + "\n" for line in lines))


def parts_of(rollout: Rollout) -> list[tuple[int, str, int]]:
    """Who wrote a rollout in their order: (turn, one of `types.AUTHORS`, tokens) wherever turn or
    author changes.
    """
    by_mark = [(author, rollout.marks[m]) for author, m in MARK_OF.items() if m in rollout.marks]
    turns = rollout.turns or [0] * len(rollout.tokens)
    each = [
        (turn, next((author for author, at in by_mark if at[i]), "student"))
        for i, turn in enumerate(turns)
    ]
    return [(*key, len(list(group))) for key, group in groupby(each)]


def _numbers(values: Tensor | None, row: int, n: int) -> list[float | None]:
    if values is None:
        return [None] * n
    return [round(v, 5) if math.isfinite(v) else None for v in values[row, :n].float().tolist()]


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths, truncation, rewards, and how far the sampling distribution is from the plain
    softmax.
    """
    lengths = [r.length for r in rollouts]
    out = {
        "completions/mean_length": sum(lengths) / max(len(lengths), 1),
        "completions/min_length": float(min(lengths, default=0)),
        "completions/max_length": float(max(lengths, default=0)),
        "completions/truncated_fraction": sum(r.finish == "length" for r in rollouts)
        / max(len(rollouts), 1),
        "completions/student_written": sum(r.finish != "given" for r in rollouts)
        / max(len(rollouts), 1),
        "tokens/trained": float(sum(sum(r.trained) for r in rollouts)),
    }
    rewards = [r.reward for r in rollouts if r.reward is not None]
    if rewards:
        mean = sum(rewards) / len(rewards)
        out["reward/mean"] = mean
        out["reward/std"] = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
        out["correct/mean"] = sum(bool(r.correct) for r in rollouts) / len(rollouts)
    out |= {f"rewards/{name}": mean for name, mean in reward_means(rollouts).items()}
    moved = [
        d - p
        for r in rollouts
        for d, p, own in zip(r.drawn_logp, r.logp, r.drawn)
        if own  # the prefix that it goes on from was not drawn
    ]
    turns = [float(max(r.turns) + 1) for r in rollouts if r.turns]
    if turns:
        out |= {
            "turns/mean": sum(turns) / len(turns),
            "turns/min": min(turns),
            "turns/max": max(turns),
        }
    if any(moved):
        out["sampling/log_ratio"] = sum(moved) / len(
            moved
        )  # mean log(drawn/plain): the bias of sampled-token estimators (0: none)
    return out


def teacher_metrics(batch: Batch, names: Sequence[str]) -> dict[str, float]:
    """Of each of several teachers: its share of the trained tokens, and the mean of log pi_s - log
    pi_t on them, nats.
    """
    out: dict[str, float] = {}
    for name in sorted(set(names)):
        mine = batch.mask & torch.tensor([n == name for n in names], device=batch.device)[:, None]
        out[f"teacher_token_frac/{name}"] = int(mine.sum()) / max(int(batch.mask.sum()), 1)
        gap = mean_gap(batch, "student", "teacher", mine)
        if not math.isnan(gap):
            out[f"teacher_kl/{name}"] = gap
    return out


def speed(
    rollouts: Sequence[Rollout],
    positions: int,
    seconds: Mapping[str, float],
    written: Sequence[Rollout],
    aside: Mapping[str, float] = {},
) -> dict[str, float]:
    """Seconds and tokens per second of each phase; response tokens only, in "sample" those that the
    student drew of rollouts that are of now. What was done `aside`, while the trainer did something
    else, is no part of the step's seconds.
    """
    tokens = sum(len(r.tokens) for r in rollouts)
    sampled = sum(sum(r.drawn) for r in written)
    total = sum(seconds.values())
    seconds = {**seconds, **aside}
    out = {f"seconds/{phase}": value for phase, value in seconds.items()} | {"seconds/step": total}
    for phase, amount in (("sample", sampled), ("score", tokens), ("learn", positions)):
        if amount and seconds.get(phase, 0.0) > 0:
            out[f"tokens_per_second/{phase}"] = amount / seconds[phase]
    out["tokens_per_second/step"] = tokens / max(total, 1e-9)
    return out


# metrics that differ between equal runs
TIMINGS = ("seconds/", "tokens_per_second/", "mfu/", "memory/", "early/")


def peak_memory(device: torch.device) -> float:
    """GiB at the peak so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

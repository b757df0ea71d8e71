"""The one pass over the vocabulary: `[chunk, V]` logits live here and nowhere else.

A head turns hidden states into logits. A chunk of positions is projected, every loss of the
objective and its gradient with respect to the chunk's logits are taken there and then, and the
logits are dropped: nothing is projected twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.objective.batch import Live
from opdkit.objective.grammar import PlannedTerm, RolloutLoss, StepPlan, TokenLoss
from opdkit.objective.products import Head as Head

CHUNK_ENTRIES = 1 << 24  # logits in one chunk, at least: 64 MiB in float32
CHUNK_MOST = 1 << 28  # on a GPU
CHUNK_BYTES = 24  # per entry: six float32 tensors of a chunk are alive at once
CHUNK_PART = 8  # of a GPU's free memory that a chunk may take


@dataclass(frozen=True)
class Source:
    """The whole vocabulary of one model at the step's positions: hidden states and head, logits
    only chunk by chunk.
    """

    hidden: Tensor  # [M, H]
    index: Tensor  # [B * T] row of `hidden` for each position, -1 where there is none
    head: Head

    @property
    def vocabulary(self) -> int:
        """Number of vocabulary entries."""
        return self.head.size(self.hidden)

    def logits(self, positions: Tensor) -> Tensor:
        """[n, V] at flat positions [n]; no gradient."""
        with torch.no_grad():
            return self.head.logits(self.hidden[self.index[positions]])


def chunk_rows(vocabulary: int, device: torch.device | None = None) -> int:
    """Positions in one chunk: a GPU takes as many as a part of its free memory holds, since small
    products leave it idle.
    """
    entries = CHUNK_ENTRIES
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        entries = min(max(free // CHUNK_BYTES // CHUNK_PART, CHUNK_ENTRIES), CHUNK_MOST)
    return max(1, entries // vocabulary)


def slices(n: int, size: int) -> Iterator[slice]:
    """0 .. n in slices of `size`, the last one shorter."""
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def cuts(joined: Tensor, size: int) -> Iterator[slice]:
    """Slices of at most `size` that part no position from the one it is joined to ([n] bool: to the
    one before): longer where they must be.
    """
    starts = [*(~joined).nonzero()[:, 0].tolist(), len(joined)]
    at = 0
    while starts[at] < len(joined):
        end = max(bisect_right(starts, starts[at] + size) - 1, at + 1)
        yield slice(starts[at], starts[end])
        at = end


# ------------------------------------------------------------------------------------ learning pass


@dataclass(frozen=True)
class Learned:
    """One micro-batch of one optimiser step."""

    loss: Tensor  # [] with gradient: its share of the step's loss
    parts: Tensor  # [number of terms]: each term's share of the loss
    entropy: Tensor  # [N]: the student's entropies, nats
    logp: Tensor  # [N]: log pi_s of the sampled tokens
    # [N]: log pi_s - log pi_t at the sampled tokens, where a term read the teacher's whole
    # vocabulary; else NaN
    gap: Tensor
    # [number of terms]: squared norm of each term's gradient in the logits, where asked for; else 0
    slopes: Tensor
    positions: int


def learn(
    plan: StepPlan,
    positions: Tensor,
    hidden: Tensor,
    head: Head,
    chunk: int | None = None,
    term_gradients: bool = False,
) -> Learned:
    """All terms of an objective at flat positions [N], from the student's hidden states [N, H], in
    one chunked pass.

    The gradients with respect to the hidden states and the head are taken on the way: the pass
    projects each position once, and its memory is that of one chunk. The head's gradient is summed
    in float32. `term_gradients` measures each term's gradient with respect to the logits, which
    takes a further backward pass per term down to these, and no further.
    """
    ready = head.ready()
    running = LearningPass.begin(plan, positions, hidden, term_gradients)
    if running.rollout_terms:
        running.slope = _rollout_slope(running, hidden, ready, chunk)
    size = chunk or chunk_rows(head.size(hidden), hidden.device)
    chunks = (
        slices(len(hidden), size)
        if plan.joined is None
        else cuts(plan.joined.flatten()[positions], size)
    )
    loss = _ChunkedSum.apply(hidden, head.weight, head.bias, ready, chunks, running.loss)
    sums = running.sums
    if running.rollout_terms:  # the pass carried their slope; the value is what they said
        loss = loss + (sums.sum() - loss.detach())
    return Learned(
        loss, sums, running.entropy, running.logp, running.gap, running.slopes, len(positions)
    )


@dataclass
class LearningPass:
    """The numbers of a learning pass at flat positions [N], filled in chunk by chunk.

    P is the number of the objective's terms, Q of those over tokens, W of those over whole
    rollouts; each of the latter two has its place among the P beside it.
    """

    plan: StepPlan
    positions: Tensor  # [N]
    token_terms: list[tuple[int, PlannedTerm]]  # Q
    rollout_terms: list[tuple[int, PlannedTerm]]  # W
    scales: Tensor | None  # [Q, N]: what a position's loss is multiplied by; None where Q = 0
    measured: bool  # whether each term's gradient in the logits is
    sums: Tensor  # [P]: each term's share of the loss
    slopes: Tensor  # [P]: squared norm of each term's gradient in the logits
    entropy: Tensor  # [N]
    logp: Tensor  # [N]
    gap: Tensor  # [N]
    slope: Tensor | None = None  # [W, N]: d term / d logp; None where W = 0

    @staticmethod
    def begin(
        plan: StepPlan, positions: Tensor, hidden: Tensor, term_gradients: bool
    ) -> LearningPass:
        """Of positions [N] with hidden states [N, H], before the first chunk."""
        terms = list(enumerate(plan.parts))
        over_tokens = [(i, x) for i, x in terms if isinstance(x.term.loss, TokenLoss)]
        over_rollouts = [(i, x) for i, x in terms if isinstance(x.term.loss, RolloutLoss)]
        scales = [x.scale.flatten()[positions] for _, x in over_tokens]
        sums = torch.zeros(len(terms), dtype=plan.batch.dtype, device=hidden.device)
        entropy = torch.zeros(len(positions), dtype=plan.batch.dtype, device=hidden.device)
        return LearningPass(
            plan,
            positions,
            over_tokens,
            over_rollouts,
            torch.stack(scales) if scales else None,
            term_gradients,
            sums,
            torch.zeros_like(sums),
            entropy,
            torch.zeros_like(entropy),
            torch.full_like(entropy, torch.nan),
        )

    def loss(self, at: slice, logits: Tensor) -> Tensor:
        """[] with gradient: the loss of a chunk of the positions, from their logits [n, V]."""
        live = Live(self.plan.batch, self.positions[at], logits)
        total = logits.new_zeros(())
        for row, (i, planned) in enumerate(self.token_terms):
            assert isinstance(planned.term.loss, TokenLoss) and self.scales is not None
            value = _weighted(planned.term.loss, live, self.scales[row, at])
            self.sums[i] += value.detach()
            self.slopes[i] += self._steepness(value, logits)
            total = total + value
        if self.slope is not None:
            for (i, _), of_logp in zip(self.rollout_terms, self.slope):
                value = (of_logp[at] * live.logp).sum()
                self.slopes[i] += self._steepness(value, logits)
                total = total + value
        self._note(at, live)
        return total

    def _steepness(self, value: Tensor, logits: Tensor) -> Tensor | float:
        """[]: sum of squares of the gradient of a value [] in the logits [n, V]; 0 where it is not
        asked for.
        """
        if not self.measured or not value.requires_grad:
            return 0.0
        return torch.autograd.grad(value, logits, retain_graph=True)[0].square().sum()

    def _note(self, at: slice, live: Live) -> None:
        """What the student says of a chunk's tokens, and the teacher if a term has read it."""
        with torch.no_grad():
            self.entropy[at] = live.own.statistics()[1]
            self.logp[at] = live.logp
            if "teacher" in live.others:
                other = live.others["teacher"].at(live.tokens[:, None])[:, 0]
                self.gap[at] = self.logp[at] - other


def _weighted(loss: TokenLoss, live: Live, scale: Tensor) -> Tensor:
    """[]: sum of scale [n] * loss over the positions where it is not 0: select, then compute."""
    index = scale.nonzero()[:, 0]
    if len(index) == 0:
        return live.logits.new_zeros(())
    if len(index) < len(scale):
        live, scale = live.select(index), scale[index]
    return (scale * loss.value(live)).sum()


def _rollout_slope(running: LearningPass, hidden: Tensor, head: Head, chunk: int | None) -> Tensor:
    """[W, N]: d term / d logp of each term over whole rollouts; their values are added to the
    pass's sums.

    They need all log-probs of a rollout first: one more projection of the hidden states [N, H].
    """
    plan, batch, positions = running.plan, running.plan.batch, running.positions
    with torch.no_grad():
        numbers = torch.zeros(batch.tokens.numel(), dtype=batch.dtype, device=hidden.device)
        numbers[positions] = scan(
            hidden, head, lambda at, logits: Live(batch, positions[at], logits).logp, chunk
        ).to(batch.dtype)
    rows = torch.unique(positions // batch.shape[1])
    logp = numbers.view(batch.shape)[rows].requires_grad_()
    slope = numbers.new_zeros(len(running.rollout_terms), *batch.shape)
    with torch.enable_grad():
        for number, (i, planned) in enumerate(running.rollout_terms):
            mask = plan.mask[rows]
            scale = _one_scale(planned, mask, planned.scale[rows])
            keep = scale != 0
            if not bool(keep.any()):
                continue
            loss = planned.term.loss
            assert isinstance(loss, RolloutLoss)
            value = (scale[keep] * loss.value(logp[keep], mask[keep], rows[keep], batch)).sum()
            running.sums[i] += value.detach()
            if value.requires_grad:
                slope[number, rows] = torch.autograd.grad(value, logp)[0]
    return slope.flatten(1)[:, positions]


def _one_scale(planned: PlannedTerm, mask: Tensor, scale: Tensor) -> Tensor:
    """[R]: what each rollout's loss is multiplied by, from the scales [R, T] of its trained tokens
    (mask [R, T]), which must be equal.
    """
    first = scale.gather(1, mask.long().argmax(1, keepdim=True))
    if bool((mask & ((scale - first).abs() > 0)).any()):
        raise ValueError(
            f"{planned.term} weighs the tokens of a rollout differently, but its loss is one "
            "number per rollout: use a signal per rollout, such as RowMean(...)"
        )
    return first[:, 0]


class _ChunkedSum(torch.autograd.Function):
    """[]: sum over chunks of run(chunk, logits [n, V]), with the gradients in the hidden states
    [N, H], the weight [V', H] and the bias [V'] taken chunk by chunk in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head,
        chunks: Iterator[slice],
        run: Callable[[slice, Tensor], Tensor],
    ) -> Tensor:
        wide = torch.promote_types(torch.float32, hidden.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if to_hidden else None
        d_weight = (
            torch.zeros(weight.shape, dtype=wide, device=hidden.device)
            if to_weight and weight is not None
            else None
        )
        d_bias = (
            torch.zeros(bias.shape, dtype=wide, device=hidden.device)
            if to_bias and bias is not None
            else None
        )
        for at in chunks:
            states = hidden[at].detach()
            product = head.product(states).detach().requires_grad_()
            with torch.enable_grad():
                value = run(at, head.finish(product))
            total += value.detach()
            if not value.requires_grad:
                continue
            (slope,) = torch.autograd.grad(value, product)
            if d_hidden is not None:
                d_hidden[at] = head.slope_to_hidden(slope, hidden.shape[-1])
            if d_weight is not None:
                head.add_slope_to_weight(d_weight, slope, states)
            if d_bias is not None:
                d_bias[: slope.shape[1]] += slope.sum(0, dtype=wide)
        ctx.gradients = (
            d_hidden,
            d_weight if d_weight is None else d_weight.to(weight.dtype),  # type: ignore[union-attr]
            d_bias if d_bias is None else d_bias.to(bias.dtype),  # type: ignore[union-attr]
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return (
            *(None if g is None else g.mul_(grad.to(g.dtype)) for g in gradients),
            None,
            None,
            None,
        )


# --------------------------------------------------------------------------------- no-gradient pass


def scan(
    hidden: Tensor, head: Head, read: Callable[[slice, Tensor], Tensor], chunk: int | None = None
) -> Tensor:
    """[N, ...]: what `read` makes of each chunk's logits, no gradient."""
    size = chunk or chunk_rows(head.size(hidden), hidden.device)
    with torch.no_grad():
        parts = [read(at, head.logits(hidden[at])) for at in slices(len(hidden), size)]
        return torch.cat(parts) if parts else read(slice(0, 0), head.logits(hidden[:0]))


def flat_positions(mask: Tensor) -> Tensor:
    """[N]: indices of a mask [B, T] into the flattened positions, row by row."""
    return mask.flatten().nonzero()[:, 0]

"""The one pass over the vocabulary: `[chunk, V]` logits live here and nowhere else.

A head turns hidden states into logits. A chunk of positions is projected, every loss of the
objective and its gradient with respect to the chunk's logits are taken there and then, and the
logits are dropped: nothing is projected twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.objective.batch import Live
from opdkit.objective.grammar import TokenLoss
from opdkit.objective.plan import PlannedRollouts, PlannedTerm, StepPlan, planned_rollouts
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

    def hidden_at(self, positions: Tensor) -> Tensor:
        """[n, H] at flat positions [n]; no gradient."""
        return self.head.states(self.hidden[self.index[positions]].detach())

    def still(self, moving: Collection[int]) -> Source:
        """As it is now, also when the tensors at the addresses `moving` have moved: with a copy of
        the head, where that is one of them.
        """
        head = self.head
        parts = {name: getattr(head, name) for name in ("weight", "bias")}
        copies = {
            name: x.detach().clone()
            for name, x in parts.items()
            if x is not None and x.data_ptr() in moving
        }
        return replace(self, head=replace(head, **copies)) if copies else self

    def everywhere(self, whole: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Source:
        """The same at the positions of all processes, of whose tensors [...] `whole` makes the sum;
        sent as numbers of `dtype`.
        """
        own = self.index >= 0
        known = whole(own.to(dtype)) > 0
        index = torch.where(known, known.cumsum(0) - 1, -1)
        hidden = self.hidden.new_zeros(int(known.sum()), self.hidden.shape[1], dtype=dtype)
        hidden[index[own]] = self.hidden[self.index[own]].detach().to(dtype)
        return replace(self, hidden=whole(hidden), index=index)


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
    # [N]: log pi_s - log pi_t at the sampled tokens at which a term read the teacher's whole
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
    size = chunk or chunk_rows(head.size(hidden), hidden.device)
    chunks = (
        slices(len(hidden), size)
        if plan.joined is None
        else cuts(plan.joined.flatten()[positions], size)
    )
    owned = plan.batch.companions.parameters
    loss = _ChunkedSum.apply(hidden, head.weight, head.bias, ready, chunks, running.loss, *owned)
    sums = running.sums
    if running.rollout_terms:  # what is learnt is their slope; the value is what they said
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
    rollout_terms: list[tuple[int, PlannedRollouts]]  # W
    scales: Tensor | None  # [Q, N]: what a position's loss is multiplied by; None where Q = 0
    measured: bool  # whether each term's gradient in the logits is
    sums: Tensor  # [P]: each term's share of the loss
    slopes: Tensor  # [P]: squared norm of each term's gradient in the logits
    entropy: Tensor  # [N]
    logp: Tensor  # [N]
    gap: Tensor  # [N]

    @staticmethod
    def begin(
        plan: StepPlan, positions: Tensor, hidden: Tensor, term_gradients: bool
    ) -> LearningPass:
        """Of positions [N] with hidden states [N, H], before the first chunk."""
        terms = list(enumerate(plan.parts))
        over_tokens = [(i, x) for i, x in terms if isinstance(x.term.loss, TokenLoss)]
        over_rollouts = planned_rollouts(plan.parts)
        scales = [x.scale.flatten()[positions] for _, x in over_tokens]
        sums = torch.zeros(len(terms), dtype=plan.batch.dtype, device=hidden.device)
        for i, x in over_rollouts:
            sums[i] = x.values.flatten()[positions].sum()
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

    def loss(self, at: slice, logits: Tensor, states: Tensor) -> Tensor:
        """[] with gradient: the loss of a chunk of the positions, from their logits [n, V] and
        hidden states [n, H].
        """
        batch = self.plan.batch
        live = Live(batch, self.positions[at], logits, hidden=lambda: states.to(batch.dtype))
        total = logits.new_zeros(())
        for row, (i, planned) in enumerate(self.token_terms):
            assert isinstance(planned.term.loss, TokenLoss) and self.scales is not None
            value = _weighted(planned.term.loss, live, self.scales[row, at])
            self.sums[i] += value.detach()
            self.slopes[i] += self._steepness(value, logits)
            total = total + value
        for i, planned in self.rollout_terms:
            value = (planned.slope.flatten()[live.positions] * live.logp).sum()
            self.slopes[i] += self._steepness(value, logits)
            total = total + value + planned.owned_at(live.positions)
        self._note(at, live)
        return total

    def _steepness(self, value: Tensor, logits: Tensor) -> Tensor | float:
        """[]: sum of squares of the gradient of a value [] in the logits [n, V]; 0 where it is not
        asked for.
        """
        if not self.measured or not value.requires_grad:
            return 0.0
        (slope,) = torch.autograd.grad(value, logits, retain_graph=True, allow_unused=True)
        return 0.0 if slope is None else slope.square().sum()

    def _note(self, at: slice, live: Live) -> None:
        """What the student says of a chunk's tokens, and the teacher of those at which a term has
        read it: not of others, which a larger chunk would have had beside them.
        """
        with torch.no_grad():
            self.entropy[at] = live.own.statistics()[1]
            self.logp[at] = live.logp
            if "teacher" in live.others:
                other = live.others["teacher"].at(live.tokens[:, None])[:, 0]
                gap = self.logp[at] - other
                self.gap[at] = torch.where(live.looked["teacher"], gap, torch.nan)


def _weighted(loss: TokenLoss, live: Live, scale: Tensor) -> Tensor:
    """[]: sum of scale [n] * loss over the positions where it is not 0: select, then compute."""
    index = scale.nonzero()[:, 0]
    if len(index) == 0:
        return live.logits.new_zeros(())
    if len(index) < len(scale):
        live, scale = live.select(index), scale[index]
    return (scale * loss.value(live)).sum()


class _ChunkedSum(torch.autograd.Function):
    """[]: sum over chunks of run(chunk, logits [n, V], states [n, H]), with the gradients in the
    hidden states [N, H], the weight [V', H], the bias [V'] and what else is `owned` [...] taken
    chunk by chunk in the forward pass. The hidden states are reached through the logits, and beside
    them where `run` reads `states`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head,
        chunks: Iterator[slice],
        run: Callable[[slice, Tensor, Tensor], Tensor],
        *owned: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(torch.float32, hidden.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if to_hidden else None
        d_weight = _sum_for(weight, wide) if to_weight else None
        d_bias = _sum_for(bias, wide) if to_bias else None
        d_owned = [torch.zeros_like(p, dtype=wide) for p in owned]
        for at in chunks:
            states = hidden[at].detach()
            product = head.product(states).detach().requires_grad_()
            beside = states.detach().requires_grad_()
            with torch.enable_grad():
                value = run(at, head.finish(product), head.states(beside))
            total += value.detach()
            if not value.requires_grad:
                continue
            slope, direct, *slopes = torch.autograd.grad(
                value, (product, beside, *owned), allow_unused=True
            )
            for d, more in zip(d_owned, slopes):
                if more is not None:
                    d += more
            if d_hidden is not None and direct is not None:
                d_hidden[at] = direct
            if slope is None:  # nothing was read off the logits
                continue
            if d_hidden is not None:
                reached = head.slope_to_hidden(slope, hidden.shape[-1])
                d_hidden[at] = reached if direct is None else direct + reached
            if d_weight is not None:
                head.add_slope_to_weight(d_weight, slope, states)
            if d_bias is not None:
                d_bias[head.rows(slope)] += slope.sum(0, dtype=wide)
        ctx.gradients = (
            d_hidden,
            d_weight if d_weight is None else d_weight.to(weight.dtype),  # type: ignore[union-attr]
            d_bias if d_bias is None else d_bias.to(bias.dtype),  # type: ignore[union-attr]
            *(d.to(p.dtype) for d, p in zip(d_owned, owned)),
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in gradients]
        return (*scaled[:3], None, None, None, *scaled[3:])


def _sum_for(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[...]: zeros to add up the gradient of a parameter [...] in, where there is one."""
    return None if parameter is None else torch.zeros_like(parameter, dtype=dtype)


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

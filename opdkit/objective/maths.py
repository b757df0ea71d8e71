"""The mathematics: divergences, estimators, sums over masks and groups, keyed draws.

Plain tensors in, plain tensors out; where no shape is said, of any one shape.

`ls` and `lt` are log-probabilities of student and teacher in nats; only `ls` may carry a gradient.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from opdkit.base import splitmix

# stands for log 0: the smallest probability that float32 can hold is exp(-103.28)
LOGP_FLOOR = -103.0
# least mass of the student's tail bucket, as d log(tail) = d tail / tail must stay finite; the
# teacher's has
TAIL_FLOOR = 1e-8
# none, as a floor there is mass it never gave

# ------------------------------------------------------------------------- log-probs and supports


def mixture(la: Tensor, lb: Tensor, share: float) -> Tensor:
    """[..., K]: log(share a + (1 - share) b) from log a, log b [..., K]."""
    if share == 0:
        return lb
    if share == 1:
        return la
    return torch.logaddexp(la + math.log(share), lb + math.log1p(-share))


def finite(logp: Tensor) -> Tensor:
    """[..., K]: log-probs with -inf replaced by `LOGP_FLOOR`; NaN stays NaN, so that it is found
    and reported.
    """
    return torch.nan_to_num(logp, nan=math.nan, posinf=math.inf, neginf=LOGP_FLOOR)


def restrict(ls: Tensor, lt: Tensor, rest: str) -> tuple[Tensor, Tensor]:
    """Treat the mass outside a support of K ids: log-probs [..., K] (-inf: entry absent) to
    log-probs that `divergence` takes.

    raw: as they are. renormalise: both sum to one on the support. target: the teacher's do, the
    student's stay of the whole vocabulary. tail: one more entry with all that is left on each side.
    """
    if rest == "raw":
        return ls, lt
    if rest == "renormalise":
        return normalise(ls), normalise(lt)
    if rest == "target":
        return ls, normalise(lt)
    if rest == "tail":
        left_s, left_t = left_over(ls), left_over(lt)
        # the support holds everything: what is left is rounding
        none = (left_s < TAIL_FLOOR) & (left_t < TAIL_FLOOR)
        tail_s = left_s.clamp_min(TAIL_FLOOR).log().masked_fill(none, -math.inf)
        return torch.cat([ls, tail_s], -1), torch.cat(
            [lt, left_t.log().masked_fill(none, -math.inf)], -1
        )
    raise ValueError(f"rest={rest!r} must be one of raw, renormalise, target, tail")


def normalise(logp: Tensor) -> Tensor:
    """[..., K]: log-probs that sum to one over the last dimension; an empty support stays -inf."""
    total = torch.logsumexp(logp, -1, keepdim=True)
    return torch.where(total == -math.inf, logp, logp - total)


def left_over(logp: Tensor) -> Tensor:
    """[..., 1]: the mass that the entries [..., K] leave."""
    return (-torch.expm1(torch.logsumexp(logp, -1, keepdim=True))).clamp_min(0.0)


# --------------------------------------------------------------------------------------- estimators


def k1(d: Tensor) -> Tensor:
    """d = log p_s - log p_t at sampled tokens, [...]: unbiased for KL(student || teacher); its own
    gradient is zero on average.
    """
    return d


def k2(d: Tensor) -> Tensor:
    """d^2 / 2, [...] as d: biased value, and on average exactly the gradient of KL(student ||
    teacher).
    """
    return 0.5 * d.square()


def k3(d: Tensor) -> Tensor:
    """exp(-d) + d - 1 >= 0, [...] as d: unbiased for KL(student || teacher), and on average the
    gradient of KL(teacher || student).
    """
    return torch.expm1(-d) + d


def straight(value: Tensor, gradient: Tensor) -> Tensor:
    """The value of one expression with the gradient of another, both [...] of one shape."""
    return gradient + (value - gradient).detach()


# ------------------------------------------------------------------------ sums over rows and groups


def to_go(values: Tensor, discount: float) -> Tensor:
    """[B, T]: sum_{k >= 0} discount^k values[t + k], in log2(T) steps."""
    total, width, weight = values, 1, discount
    while width < values.shape[1] and weight != 0:
        total = total + weight * torch.nn.functional.pad(total[:, width:], (0, width))
        width, weight = 2 * width, weight * weight
    return total


def side_by_side(mask: Tensor, of: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """[B, T]: a function of values [B, T] that runs along rows, of the selected positions only:
    what lies between two of them takes no time. 0 elsewhere.
    """
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    packed = [torch.where(mask, v, 0.0).gather(1, order) for v in values]
    made = of(*packed)
    return torch.where(mask, torch.zeros_like(made).scatter(1, order, made), 0.0)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]: mean over each row's selected positions; 0 for a row without any."""
    return torch.where(mask, values, 0.0).sum(1, keepdim=True) / mask.sum(
        1, keepdim=True
    ).clamp_min(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[]: mean over all selected positions; 0 where there is none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def masked_quantile(values: Tensor, mask: Tensor, at: float) -> Tensor:
    """[]: the quantile of the selected values, 0 the least and 1 the greatest, linear in between; 0
    where there is none.
    """
    ranked = values[mask].sort().values
    if len(ranked) == 0:
        return torch.zeros((), dtype=values.dtype, device=values.device)
    # 0.3 * 10 is a little more than 3, and >= must still find the value there
    place = round(at * (len(ranked) - 1), 9)
    low = ranked[math.floor(place)]
    return low + (ranked[math.ceil(place)] - low) * (place - math.floor(place))


def group_index(*keys: Tensor) -> tuple[Tensor, int]:
    """[B] index of each row's group (rows are of one group where all `keys` [B] agree) and the
    number of groups.
    """
    table = torch.stack([k.to(torch.int64) for k in keys], 1)
    unique, index = torch.unique(table, dim=0, return_inverse=True)
    return index, len(unique)


def group_means(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row's group [B]: the least of its `values` [B, ...], their mean above it, and their
    number, each [B, ...]; the mean itself is least + mean.

    Equal values lie exactly 0 above their least, so nothing is left of values - least - mean. Their
    plain mean rounds (sixteen times 0.7 in float32 is not 0.7), and a standard deviation that is
    nothing but that rounding would make a whole advantage of it.
    """
    index, n = group_index(group)
    zeros = values.new_zeros(n, *values.shape[1:])
    wide = index.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    least = torch.full_like(zeros, math.inf).scatter_reduce(0, wide, values, "amin")
    least = torch.where(least.isfinite(), least, 0.0)[index]  # from -inf nothing can be measured
    count = zeros.index_add(0, index, torch.ones_like(values))[index]
    return least, zeros.index_add(0, index, values - least)[index] / count, count


def deviations(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: values less the mean of the selected ones, exactly 0 where all of these are equal,
    for the reason in `group_means`.

    Measured from their median, so that one far away costs the others no digits.
    """
    apart = values - masked_quantile(values, mask, 0.5)
    return apart - masked_mean(apart, mask)


def group_softmax(logits: Tensor, among: Tensor, group: Tensor) -> Tensor:
    """[B]: softmax of `logits` [B] over the rows of `among` [B] inside each group, times their
    number: mean 1. 0 outside `among`.
    """
    index, n = group_index(group)
    open_ = torch.where(among, logits, -math.inf)
    highest = torch.full((n,), -math.inf, dtype=logits.dtype, device=logits.device).scatter_reduce(
        0, index, open_.detach(), "amax"
    )
    size = torch.where(among, (open_ - highest[index]).exp(), 0.0)
    total = torch.zeros(n, dtype=logits.dtype, device=logits.device).index_add(0, index, size)
    count = torch.zeros_like(total).index_add(0, index, among.to(total.dtype))
    return torch.where(
        among, size / total[index].clamp_min(torch.finfo(total.dtype).tiny) * count[index], 0.0
    )


# -------------------------------------------------------------------------------------- keyed draws


def keyed_uniform(
    seed: int, step: int, salt: str, keys: Tensor, length: int, dtype: torch.dtype
) -> Tensor:
    """[B, length] uniform draws in [0, 1), a pure function of (seed, step, salt, rollout key,
    position).

    Padding, row order, micro-batches, ranks and resumed runs therefore see the same draw.
    """
    cells = _keyed(seed, step, salt, keys, length)
    return (
        (splitmix.shifted(cells, 11).to(torch.float64) * 2.0**-53)
        .to(dtype)
        .clamp_max(1 - torch.finfo(dtype).eps)
    )


def keyed_normal(seed: int, step: int, salt: str, keys: Tensor, length: int, units: int) -> Tensor:
    """[B, length, units] float32 draws from the standard normal distribution, a pure function of
    (seed, step, salt, rollout key, position, unit): Box-Muller, two units from one hash.
    """
    pairs = torch.arange(1, (units + 1) // 2 + 1, device=keys.device)
    cells = splitmix.mix(_keyed(seed, step, salt, keys, length)[..., None] + pairs * splitmix.STEP)
    # in (0, 1] and [0, 1), 32 bits each; the function's own rounding is below that of float32
    first = (splitmix.shifted(cells, 32) + 1).to(torch.float64) * 2.0**-32
    angle = (cells & 0xFFFFFFFF).to(torch.float64) * (2 * math.pi * 2.0**-32)
    radius = (-2 * first.log()).sqrt()
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return both.flatten(-2)[..., :units].float()


def _keyed(seed: int, step: int, salt: str, keys: Tensor, length: int) -> Tensor:
    """[B, length] int64: a hash of (seed, step, salt, rollout key [B], position)."""
    start = torch.tensor(
        [seed, step, zlib.crc32(salt.encode())], dtype=torch.int64, device=keys.device
    )
    state = torch.zeros((), dtype=torch.int64, device=keys.device)
    for part in start:
        state = splitmix.mix(state * splitmix.STEP + part + splitmix.STEP)
    rows = splitmix.mix(state ^ splitmix.mix(keys + splitmix.STEP))[:, None]
    places = torch.arange(1, length + 1, device=keys.device)
    return splitmix.mix(rows + places * splitmix.STEP)

"""The one pass over the vocabulary: equal to a dense graph in value and gradient, whatever the
chunk, head, dtype or selection.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opdkit.objective import products
from opdkit.objective.batch import Batch, Live
from opdkit.objective.facts import ColumnFact, LogpFact
from opdkit.objective.grammar import Objective, RolloutLoss
from opdkit.objective.head import (
    CHUNK_ENTRIES,
    Head,
    Source,
    chunk_rows,
    flat_positions,
    learn,
    scan,
)
from opdkit.objective.losses import Divergence, Likelihood, PolicyGradient
from opdkit.objective.signals import Advantage, Entropy, LogRatio, Mark
from opdkit.testing import evaluate, fabricate
from tests.common.rounding import rounding
from tests.common.toy import naive
from tests.methods.toy import close, logits, tokens

B, T, H, V, ROWS = 3, 5, 8, 11, 13  # 13 rows in the matrix, 11 tokens: two pad it

OBJECTIVE = (
    Divergence("reverse_kl").of("student", "guide")
    + (Divergence("jsd") * Entropy("teacher")).of("student", "guide")
    + (Likelihood() * Mark("guided")).per("own") * 0.3
)

HEADS = [{}, {"bias": True}, {"scale": 0.3}, {"softcap": 2.0}, {"vocab": V}]
HEADS.append({"bias": True, "scale": 1.7, "softcap": 3.0, "vocab": V})


def setting(dtype=torch.float64, bias=False, vocab=None, **more):
    """Hidden states, head and batch of a step: the student and a teacher of another width."""
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = random(B * T, H), random(ROWS, H)
    head = Head(weight.to(dtype), random(ROWS).to(dtype) if bias else None, vocab=vocab, **more)
    cells = torch.arange(B * T)
    other = Source(
        random(B * T, 2 * H).to(dtype),
        cells,
        Head(0.3 * random(ROWS, 2 * H).to(dtype), vocab=vocab, softcap=4.0),
    )
    mask = torch.arange(T) < torch.tensor([5, 2, 4])[:, None]
    ids = torch.randint(V, (B, T), generator=g)
    batch = Batch(
        ids, mask, {ColumnFact("mark:guided"): ids % 2 == 0}, {"teacher": other}, dtype=dtype
    )
    entropy = torch.distributions.Categorical(logits=other.logits(cells)).entropy().view(B, T)
    batch.signals[Entropy("teacher")] = entropy
    return hidden.to(dtype), head, batch


def chunked(hidden, head, batch, chunk, objective=OBJECTIVE, positions=None):
    """Loss and its gradients with respect to hidden states, weight and bias."""
    plan = objective.plan(batch)
    leaves = [x.clone().requires_grad_() for x in (hidden, head.weight, head.bias) if x is not None]
    live = replace(head, weight=leaves[1], bias=leaves[2] if head.bias is not None else None)
    positions = flat_positions(plan.selected) if positions is None else positions
    out = learn(plan, positions, leaves[0][positions], live, chunk)
    return out, torch.autograd.grad(out.loss, leaves)


def dense(hidden, head, batch, objective=OBJECTIVE):
    """The same by autograd through whole logits, the head's arithmetic written out."""
    plan = objective.plan(batch)
    leaves = [x.clone().requires_grad_() for x in (hidden, head.weight, head.bias) if x is not None]
    z = leaves[0] @ leaves[1].T + (leaves[2] if head.bias is not None else 0)
    z = z[:, : head.vocab] * head.scale
    z = head.softcap * torch.tanh(z / head.softcap) if head.softcap else z
    loss = torch.zeros((), dtype=hidden.dtype)
    for part in plan.parts:
        at = flat_positions(part.weight != 0)
        loss = (
            loss + (part.scale.flatten()[at] * part.term.loss.value(Live(batch, at, z[at]))).sum()
        )  # type: ignore[attr-defined]
    return loss, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_to_a_dense_graph(head, dtype):
    """Up to the roundings of logits, sums of H products, which move probabilities by as
    much in proportion, and of sums over the rows.
    """
    hidden, head, batch = setting(dtype, **head)
    largest = (hidden @ head.weight.T).abs().max().item()
    tolerance = rounding(dtype, largest, H + ROWS)
    loss, gradients = dense(hidden, head, batch)
    for chunk in (1, 3, 4, 11, 10_000, None):
        out, ours = chunked(hidden, head, batch, chunk)
        assert abs(out.loss - loss) <= tolerance * abs(loss) and out.positions == 11
        for a, b in zip(ours, gradients, strict=True):
            assert (a - b).norm() <= tolerance * b.norm() and b.norm() > 0
        assert (ours[0][~batch.trained.flatten()] == 0).all() and (
            ours[1][head.vocab or ROWS :] == 0
        ).all()


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_no_positions(chunk):
    hidden, head, batch = setting(bias=True)
    out, gradients = chunked(
        hidden, head, batch, chunk, positions=torch.zeros(0, dtype=torch.int64)
    )
    assert out.loss == 0 and out.positions == 0 and all((g == 0).all() for g in gradients)


def test_only_what_wants_a_gradient_gets_one():
    hidden, head, batch = setting(bias=True)
    plan = OBJECTIVE.plan(batch)
    at = flat_positions(plan.selected)
    _, (to_hidden, to_weight, _) = chunked(hidden, head, batch, 4)
    frozen = hidden[at].requires_grad_()  # the head is a constant
    assert close(
        torch.autograd.grad(learn(plan, at, frozen, head, 4).loss, frozen)[0], to_hidden[at], 12
    )
    alone = replace(head, weight=head.weight.clone().requires_grad_())
    assert close(
        torch.autograd.grad(learn(plan, at, hidden[at], alone).loss, alone.weight)[0], to_weight, 12
    )


def test_the_incoming_gradient_scales():
    hidden, head, batch = setting()
    plan = OBJECTIVE.plan(batch)
    at = flat_positions(plan.selected)
    once, thrice = hidden[at].requires_grad_(), hidden[at].requires_grad_()
    learn(plan, at, once, head).loss.backward()
    (3 * learn(plan, at, thrice, head).loss).backward()
    assert close(thrice.grad, 3 * once.grad, 12)


def test_a_tied_matrix_gets_both_of_its_gradients():
    hidden, head, batch = setting()
    table = head.weight.clone().requires_grad_()
    embedded = table[torch.arange(B * T) % ROWS] + hidden
    plan = OBJECTIVE.plan(batch)
    at = flat_positions(plan.selected)
    (tied,) = torch.autograd.grad(
        learn(plan, at, embedded[at], replace(head, weight=table)).loss, table
    )
    _, (to_hidden, to_weight) = chunked(embedded.detach(), head, batch, None)
    assert close(tied, to_weight.index_add(0, torch.arange(B * T) % ROWS, to_hidden), 12)


# -------------------------------------------------------------------------------- memory, precision

MEMORY = """
import resource, sys, torch
from opdkit.objective import Batch, Divergence, Objective
from opdkit.objective.head import CHUNK_ENTRIES, Head, Source, learn
n, v, h, t = 4096, 151936, 256, 512
g = torch.Generator().manual_seed(0)
shapes = ((n, h), (v, h), (n, t), (v, t))
hidden, weight, teacher, other = (
    torch.randn(a, b, generator=g).mul_(b**-0.25) for a, b in shapes
)
hidden.requires_grad_(), weight.requires_grad_()
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "dense":
    ls = (hidden @ weight.T).log_softmax(-1)
    with torch.no_grad():
        lt = (teacher @ other.T).log_softmax(-1)
    loss = (ls.exp() * (ls - lt)).sum() / n
    del ls, lt
else:
    batch = Batch(torch.zeros(1, n, dtype=torch.int64), torch.ones(1, n, dtype=torch.bool))
    batch.sources["teacher"] = Source(teacher, torch.arange(n), Head(other))
    plan, chunk = Objective(Divergence("reverse_kl")).plan(batch), int(sys.argv[1]) or None
    loss = learn(plan, torch.arange(n), hidden, Head(weight), chunk).loss
gradients = torch.autograd.grad(loss, (hidden, weight))
extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
torch.save((loss.detach(), *gradients, extra / 2**20), sys.argv[2])
"""


@pytest.mark.slow
def test_memory_is_that_of_a_chunk(tmp_path):
    """Full-vocabulary reverse KL at 4096 positions of 151936 tokens.

    The dense graph keeps no logits, only what autograd must.
    """
    out = {}
    for way in ("dense", "0"):  # 0: the default chunk
        subprocess.run(
            [sys.executable, "-c", MEMORY, way, str(tmp_path / way)],
            check=True,
            cwd=Path(__file__).parents[2],
        )
        out[way] = torch.load(tmp_path / way)
        print(f"{way}: loss {out[way][0]:.6f}, {out[way][3]:.2f} GiB")
    loss, *gradients, large = out["dense"]
    ours, *others, small = out["0"]
    assert small < large / 10 and abs(ours - loss) <= 1e-5 * loss
    for a, b in zip(others, gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_the_heads_gradient_is_summed_in_float32():
    """512 chunks of one position: a sum kept in bfloat16 drops what is small beside it."""
    g = torch.Generator().manual_seed(0)
    n, h, v = 512, 16, 32
    hidden, weight = (torch.randn(*s, generator=g).bfloat16() for s in ((n, h), (v, h)))
    batch = Batch(torch.randint(v, (1, n), generator=g), torch.ones(1, n, dtype=torch.bool))
    plan, at = Objective(Likelihood()).plan(batch), torch.arange(n)

    wide = weight.double().requires_grad_()
    exact = Objective(Likelihood()).plan(batch)
    (truth,) = torch.autograd.grad(learn(exact, at, hidden.double(), Head(wide)).loss, wide)
    leaf = weight.clone().requires_grad_()
    (ours,) = torch.autograd.grad(learn(plan, at, hidden, Head(leaf), chunk=1).loss, leaf)
    narrow = torch.zeros_like(weight)
    for i in range(n):  # what a sum in the weight's own type would be
        leaf = weight.clone().requires_grad_()
        narrow += torch.autograd.grad(
            learn(plan, at[i : i + 1], hidden[i : i + 1], Head(leaf)).loss, leaf
        )[0]
    errors = [((x.double() - truth).norm() / truth.norm()).item() for x in (ours, narrow)]
    assert ours.dtype == torch.bfloat16 and errors[0] < 0.004 < 3 * errors[0] < errors[1]


def test_narrow_hidden_states_are_scored_in_float32():
    hidden, head, _ = setting(torch.float32)
    narrow = Head(head.weight.bfloat16())
    assert (
        narrow.logits(hidden.bfloat16()).dtype == torch.float32
        and head.logits(hidden.double()).dtype == torch.float32
    )
    assert Head(head.weight.double()).logits(hidden.double()).dtype == torch.float64


# ------------------------------------------------------------------------- operands of 16 bits


def peaked(n=32, h=576, v=2000, peak=12.0):
    """Hidden states [n, H] and weight [V, H] whose logits have one large value per row, beside
    others of size 1.
    """
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g) / h**0.5
    at = torch.arange(n) * (v // n)
    weight[at] += peak * hidden / hidden.square().sum(-1, keepdim=True)
    return hidden, weight, at


def test_logits_of_16_bit_operands_are_not_rounded():
    """Only the operands are: log-probs are off by 3e-3 nats in the mean, and no two of the largest
    logits tie; PyTorch's own bfloat16 product, whose results are rounded too, ties many.
    """
    hidden, weight, _ = peaked()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    ours = Head(weight, operands=torch.bfloat16).logits(hidden)
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).float()
    same = hidden.bfloat16().double() @ weight.bfloat16().double().T
    assert ours.dtype == torch.float32 and torch.allclose(ours.double(), same, atol=1e-4)
    assert torch.equal(ours, Head(weight.bfloat16()).logits(hidden.bfloat16()))
    off, plain = ((x.double().log_softmax(-1) - exact).abs().mean() for x in (ours, rounded))
    assert off < 4e-3 < 2 * off < plain
    ties = [64 - len(x[0].topk(64).values.unique()) for x in (ours, rounded)]
    assert ties[0] == 0 < ties[1]


@pytest.mark.parametrize("chip", [False, True], ids=["widened blocks", "as on a GPU"])
def test_gradients_of_a_16_bit_head_near_convergence(chip, monkeypatch):
    """Student and teacher differ by a little: the gradient is a difference of nearly equal
    probabilities, of which rounded logits left noise. Against float64 with the same operands.
    """
    monkeypatch.setattr(products, "BLOCK", 300 * 576)  # the last block is not full
    if chip:
        mm = torch.mm

        def into_float32(a, b, *, out_dtype):
            assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
            return mm(a.float(), b.float())

        monkeypatch.setattr(products, "_on_chip", lambda x, operands: True)
        monkeypatch.setattr(torch, "mm", into_float32)
        monkeypatch.setattr(products, "GPU_BLOCK", 300 * 576)
    hidden, weight, at = peaked()
    near = hidden + 2e-2 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))

    def gradients(head, hidden, near):
        batch = Batch(at[None], torch.ones(1, len(at), dtype=torch.bool), dtype=hidden.dtype)
        batch.sources["teacher"] = Source(near, torch.arange(len(at)), head)
        plan = Objective(Divergence("reverse_kl")).plan(batch)
        leaf = hidden.clone().requires_grad_()
        live = replace(head, weight=head.weight.clone().requires_grad_())
        loss = learn(plan, torch.arange(len(at)), leaf, live, 24).loss
        return torch.autograd.grad(loss, [leaf, live.weight])

    wide = [x.bfloat16().double() for x in (hidden, near)]
    truth = gradients(Head(weight.bfloat16().double()), *wide)
    ours = gradients(Head(weight, operands=torch.bfloat16), hidden, near)
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 1e-3 * b.norm()


def test_a_slope_in_two_parts_keeps_16_bits():
    slope = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    slope = slope * torch.logspace(-20, 0, 70)
    first, rest = products.in_two(slope, torch.bfloat16).float().chunk(2)
    assert ((first + rest - slope).abs() <= 2**-16 * slope.abs()).all()
    assert ((first - slope).abs() > 2**-10 * slope.abs()).any()


def test_a_head_is_differentiable_and_alone_in_its_numbers():
    """Under an autocast of somebody else too, for float32 and for 16-bit operands."""
    hidden, weight, _ = peaked(8, 16, 40)
    for operands in (None, torch.bfloat16):
        head = Head(weight.requires_grad_(), operands=operands)
        plain = head.logits(hidden)
        with torch.autocast("cpu", torch.bfloat16):
            inside = head.logits(hidden)
        assert torch.equal(plain, inside)
        states = hidden if operands is None else hidden.to(operands).float()
        (slope,) = torch.autograd.grad(plain.square().sum(), weight)
        assert torch.allclose(slope, 2 * plain.detach().T @ states, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------------- losses over a rollout


@dataclass(frozen=True)
class Best(RolloutLoss):
    """The squared log-prob of a rollout, relative to the sampler's: not a sum over tokens."""

    def value(self, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        return torch.where(mask, logp - batch.read(LogpFact("sampler"))[rows], 0.0).sum(1).square()


WHOLE = [
    Objective(Best().per("row_sums")),
    Objective((Best() * Advantage("mean")).per("row_sums")),  # negative for some
    Objective((Best() * -1).per("row_sums")),
    Objective((Best() * (Advantage("mean") > 0)).per(4)),  # some rollouts left out
    Best().per("row_sums") * 0.5
    + Divergence("jsd")
    + Likelihood() * (LogRatio("teacher", "student") > 0),
]


@pytest.mark.parametrize("objective", WHOLE, ids=str)
def test_rollout_losses_equal_a_dense_graph(objective):
    case = fabricate(objective, 2)
    loss, grad = naive(objective, case)
    for chunk in (None, 1, 3):
        for parts in (None, [[3, 0], [1, 2, 4], [5]]):
            out = case.run(objective, parts, chunk)
            assert (
                close(out.loss, loss.item(), 10) and (out.grad - grad).norm() <= 1e-10 * grad.norm()
            )
            assert close(sum(t.value for t in out.terms), loss.item(), 10)


def test_a_rollout_loss_has_one_weight_per_rollout():
    objective = Objective(Best() * Entropy("student"))
    with pytest.raises(ValueError, match="one number per rollout"):
        fabricate(objective).run(objective)


# ---------------------------------------------------------------------------------------- selection


class Spy(Head):
    """A head that counts the rows it projects."""

    def product(self, hidden):
        seen.append(len(hidden))
        return super().product(hidden)


seen: list[int] = []


def test_positions_without_weight_are_never_projected():
    hidden, head, batch = setting()
    plan = Objective(Likelihood() * Mark("guided")).plan(batch)
    seen.clear()
    at = flat_positions(plan.selected)
    learn(plan, at, hidden[at].requires_grad_(), Spy(head.weight), chunk=2)
    # and each of them once
    assert sum(seen) == int((batch.trained & batch.mark("guided")).sum()) < int(batch.trained.sum())


def test_another_models_vocabulary_is_made_only_where_a_term_reads_it():
    hidden, head, batch = setting()
    source = batch.sources["teacher"]
    batch.sources["teacher"] = Source(source.hidden, source.index, Spy(source.head.weight))
    plan = (Divergence("reverse_kl") * Mark("guided") + Divergence("jsd") * Mark("guided")).plan(
        batch
    )
    seen.clear()
    at = flat_positions(plan.selected)
    learn(plan, at, hidden[at], head)
    assert seen == [int((batch.trained & batch.mark("guided")).sum())]  # both terms share it


def test_an_infinite_score_at_a_token_left_out_never_reaches_a_gradient():
    student, teacher = (
        logits((0.5, 0.3, 0.2), (0.5, 0.3, 0.2)),
        logits((0.0, 0.6, 0.4), (0.2, 0.5, 0.3)),
    )
    trusted = LogRatio("teacher", "student") > -5
    for loss in (Likelihood(), Divergence("chi2"), Divergence("reverse_kl")):
        out, alone = (
            evaluate(
                loss * trusted,
                student[:, n:],
                tokens(0, 0)[:, n:],
                models={"teacher": teacher[:, n:]},
            )
            for n in (0, 1)
        )
        assert (
            out.grad.isfinite().all()
            and (out.grad[0, 0] == 0).all()
            and close(2 * out.grad[0, 1], alone.grad[0, 0], 12)
        )
    # -inf at the first token, which the other term does look at
    credit = LogRatio("teacher", "student")
    both = evaluate(
        PolicyGradient(credit) * trusted + Likelihood(),
        student,
        tokens(0, 0),
        models={"teacher": teacher},
    )
    assert both.loss.isfinite() and close(
        both.grad[0, 0], evaluate(Likelihood(), student, tokens(0, 0)).grad[0, 0], 12
    )


def test_what_the_log_shows():
    hidden, head, batch = setting()
    out, _ = chunked(hidden, head, batch, 3)
    at = flat_positions(batch.trained)
    s, t = (
        head.logits(hidden[at]).log_softmax(-1),
        batch.sources["teacher"].logits(at).log_softmax(-1),
    )
    ids = batch.tokens.flatten()[at][:, None]
    assert close(out.entropy, -(s.exp() * s).sum(-1), 10) and close(
        out.gap, (s - t).gather(-1, ids)[:, 0], 10
    )
    assert close(out.parts.sum(), out.loss.item(), 12) and len(out.parts) == 3


def test_scan_and_chunk_sizes():
    hidden, head, _ = setting(vocab=V)
    for chunk in (1, 4, 100):
        assert close(
            scan(hidden, head, lambda at, z: z.logsumexp(-1), chunk),
            head.logits(hidden).logsumexp(-1),
            12,
        )
    assert scan(hidden[:0], head, lambda at, z: z.logsumexp(-1)).shape == (0,)
    assert (
        chunk_rows(CHUNK_ENTRIES // 5) == 5
        and chunk_rows(10**9) == 1
        and head.size(hidden) == V
        and Head().size(hidden) == H
    )

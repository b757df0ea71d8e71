"""Several processes, here as threads: each scores and learns its own tokens, and together they find
the gradient and the numbers of one.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.base.launched import CLAIM
from opdkit.methods.method import load, methods
from opdkit.objective import (
    Around,
    Batch,
    Companions,
    GroupMean,
    LogpAtFact,
    MeanOne,
    Objective,
    PolicyGradient,
    Quantile,
    RolloutLoss,
    RowMean,
    Signal,
    TopFact,
)
from opdkit.objective.alignment import AlignedSource, Alignment
from opdkit.objective.head import Head, Source, flat_positions, learn
from opdkit.objective.needs import needs
from opdkit.testing import fabricate
from opdkit.train.gather import gather
from opdkit.train.mesh import ALONE, Alone, Mesh, by_length
from opdkit.types import Rollout

B, T, V = 6, 7, 131
LENGTHS = (7, 4, 1, 6, 7, 3)
SEEDED = threading.Lock()


class Together:
    """The threads' common ground: what each has put there, once all have."""

    def __init__(self, size: int):
        self.size, self.barrier, self.held = size, threading.Barrier(size), [None] * size

    def every(self, rank: int, thing: Any) -> list[Any]:
        self.barrier.wait(20)
        self.held[rank] = thing
        self.barrier.wait(20)
        return list(self.held)


class Thread(Mesh):
    """A mesh whose processes are threads."""

    def __init__(self, rank: int, common: Together):
        self.rank, self.size, self.common = rank, common.size, common

    def total(self, values: Tensor) -> Tensor:
        return sum(self.common.every(self.rank, values))  # type: ignore[return-value]

    def every(self, thing: Any) -> list[Any]:
        return self.common.every(self.rank, thing)

    def handed(self, parts: Any) -> list[Any]:
        """As between processes, where things are sent in bytes."""
        return [pickle.loads(of[self.rank]) for of in self.every([*map(pickle.dumps, parts)])]


def on_each(size: int, work: Callable[[Any], Any]) -> list[Any]:
    common = Together(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Thread(rank, common) for rank in range(size)]))


class Known:
    """A model by its logits [B, T, V]; `asked` are the positions it was run at."""

    def __init__(self, logits: Tensor, shared: bool):
        self.logits, self.shared, self.asked = logits.flatten(0, 1), shared, []

    def source(self, layout: Any, positions: Tensor) -> Any:
        self.asked += positions.tolist()
        index = torch.full((B * T,), -1)
        index[positions] = torch.arange(len(positions))
        own = Source(self.logits[positions], index, Head())
        ends = torch.arange(T).expand(B, -1)
        tokens = torch.zeros(B, T, dtype=torch.int64)
        return (
            AlignedSource(own, Alignment(tokens, ends, ends, shared=True)) if self.shared else own
        )


def step(objective: Objective, fresh: bool = True) -> tuple[list[Rollout], dict[str, Tensor]]:
    """Rollouts and the logits of every model that the objective reads."""
    case = fabricate(objective)
    others = {k: v if v.shape[-1] == V else case.student.flip(0) for k, v in case.models.items()}
    logits = {"student": case.student, "live": case.student, **others}
    logps = case.student.log_softmax(-1).gather(-1, case.tokens[..., None])[..., 0]
    rollouts = []
    for b, n in enumerate(LENGTHS):
        logp = logps[b, :n].tolist()
        marks = {k: torch.as_tensor(v)[b, :n].tolist() for k, v in case.marks.items()}
        rollouts.append(
            Rollout(
                id=f"0/{b // 3}/{b % 3}", prompt=[1] * (b + 1), tokens=case.tokens[b, :n].tolist(),
                trained=[True] * n, logp=logp, drawn_logp=logp, group=str(b // 3),
                reward=float(b in (0, 2, 5)), correct=b in (0, 2, 5), marks=marks,
                policy_version=0 if fresh else -1,
            )
        )  # fmt: skip
    return rollouts, logits


def learned(objective: Objective, mesh: Any, rollouts: list[Rollout], logits: Any) -> Any:
    """What one process finds: the gradient [B * T, V] of its tokens, the facts, whom it asked."""
    wanted = needs(objective)
    scorers = {m: Known(x, m == "teacher" and wanted.spans(m)) for m, x in logits.items()}
    with SEEDED:  # the random state is of all threads
        around = Around(lambda model: logits[model].shape[-1], torch.device("cpu"), torch.float64)
        beside = Companions.build(wanted.companions, around)
    batch = gather(
        rollouts, wanted, scorers, step=3, total_steps=10, dtype=torch.float64, mesh=mesh,
        companions=beside,
    )  # fmt: skip
    plan = objective.plan(batch)
    leaf = logits["student"].flatten(0, 1).clone().requires_grad_()
    at = flat_positions(plan.selected if batch.mine is None else plan.selected & batch.mine)
    out = learn(plan, at, leaf[at], Head())
    (grad,) = torch.autograd.grad(out.loss, leaf) if len(at) else (torch.zeros_like(leaf),)
    return grad, out.loss.detach(), batch, scorers


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", [*methods(), "grpo(loss=gspo)", "tip(selection=sample)"])
def test_the_gradient_of_several_is_that_of_one(name: str, fresh: bool) -> None:
    objective = load(name).objective
    rollouts, logits = step(objective, fresh)
    whole, loss, batch, alone = learned(objective, ALONE, rollouts, logits)
    for size in (2, 3):
        parts = on_each(size, lambda mesh: learned(objective, mesh, rollouts, logits))
        grad = sum(part[0] for part in parts)
        assert (grad - whole).norm() <= 1e-12 * whole.norm() and whole.norm() > 0
        assert abs(sum(part[1] for part in parts) - loss) <= 1e-12 * max(1, abs(loss))
        for _, _, theirs, _ in parts:  # what is one number per token is known to all
            for fact, values in batch.facts.items():
                if not fact.shape:
                    assert torch.allclose(theirs.facts[fact], values, 0, 1e-12, True), fact
        for model, scorer in alone.items():  # each token is scored by one of them
            asked = sorted(at for part in parts for at in part[3][model].asked)
            assert asked == sorted(scorer.asked), model


@dataclass(frozen=True)
class Mass(Signal):
    """[B, T]: the teacher's mass on its top 2, or, wrongly, what it is beside that of all tokens:
    their mean [1, 1], its part of that, whether it is above, whether most ids are.
    """

    beside: str = ""

    def value(self, batch: Batch) -> Tensor:
        ids = batch.read(TopFact("teacher", 2)).double()
        mass = batch.read(LogpAtFact("teacher", "teacher", 2)).exp().sum(-1)
        mean = mass[batch.mask].mean()
        return {
            "": mass,
            "mean": mean.view(1, 1),
            "part": mass / mean,
            "above": (mass > mean).to(mass.dtype),
            "ids": (ids > ids.mean()).any(-1).to(mass.dtype),
        }[self.beside]


def gradient(signal: Signal, size: int) -> tuple[Tensor, Tensor]:
    """The gradient [B * T, V] of OPD times a signal, of one process and of several."""
    objective = Objective(PolicyGradient(load("opd").objective.terms[0].loss.credit) * signal)
    rollouts, logits = step(objective)
    one = learned(objective, ALONE, rollouts, logits)[0]
    parts = on_each(size, lambda mesh: learned(objective, mesh, rollouts, logits)[0])
    return one, sum(parts)  # type: ignore[return-value]


@pytest.mark.parametrize("beside", ["mean", "part", "above", "ids"])
def test_a_number_of_several_tokens_is_not_made_from_facts_that_are_not_shared(beside: str) -> None:
    with pytest.raises(UserError, match="Make it in two signals"):
        gradient(Mass(beside), 2)


def test_that_nothing_was_refused_where_nobody_else_had_tokens_says_nothing() -> None:
    """A process that had all of a step, or none, finds out in the next what it makes of others'."""

    def batch(own: list[bool]) -> Batch:
        ids = torch.arange(6).view(3, 1, 2)
        facts = {TopFact("teacher", 2): ids, LogpAtFact("teacher", "teacher", 2): -ids.double()}
        mine = torch.tensor(own)[:, None]
        here = torch.zeros(3, 1, dtype=torch.int64)
        return Batch(here, here == 0, facts, mine=mine, whole=lambda x: x, dtype=torch.float64)

    apart = Mass("part")
    for own in ([True] * 3, [False] * 3):
        apart(batch(own))
    with pytest.raises(UserError, match="Make it in two signals"):
        apart(batch([True, False, True]))


@dataclass(frozen=True)
class Grouped(RolloutLoss):
    """[R]: rollouts weighed by the teacher's mass on its top 2, each alone or all beside each
    other; read off the fact, or, as it should be, off a signal.
    """

    beside: bool
    shared: bool

    def value(self, logp: Tensor, mask: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        fact = LogpAtFact("teacher", "teacher", 2)
        mass = Mass()(batch) if self.shared else batch.read(fact).exp().sum(-1)
        weight = torch.where(mask, mass[rows], 0.0).sum(1)
        score = torch.where(mask, logp, 0.0).sum(1)
        return -weight * (torch.logsumexp(score, 0) if self.beside else score)


@pytest.mark.parametrize(("joined", "signal"), [(False, False), (False, True), (True, True)])
def test_a_loss_over_rollouts_reads_what_is_shared(joined: bool, signal: bool) -> None:
    objective = Objective(Grouped(joined, signal))
    rollouts, logits = step(objective)
    one = learned(objective, ALONE, rollouts, logits)[0]
    parts = on_each(2, lambda mesh: learned(objective, mesh, rollouts, logits)[0])
    assert (sum(parts) - one).norm() <= 1e-12 * one.norm() and one.norm() > 0


def test_a_loss_over_several_rollouts_does_not_read_what_is_not() -> None:
    """Its value in a process is right for the rollouts of that, and its slope is not."""
    objective = Objective(Grouped(True, False))
    rollouts, logits = step(objective)
    with pytest.raises(UserError, match="Make it in two signals"):
        on_each(2, lambda mesh: learned(objective, mesh, rollouts, logits))


@pytest.mark.parametrize("size", [2, 3])
def test_it_is_made_from_a_signal(size: int) -> None:
    """A mean, a quantile and groups, of what each process has of its own tokens."""
    mass = Mass()
    for signal in (mass, MeanOne(mass), mass >= Quantile(mass, 0.5), GroupMean(RowMean(mass))):
        one, several = gradient(signal, size)
        assert (several - one).norm() <= 1e-12 * one.norm() and one.norm() > 0


def test_the_longest_are_shared_out_first() -> None:
    rollouts, _ = step(load("opd").objective)
    owner = by_length(rollouts, 2)
    loads = [
        sum(len(r.prompt) + len(r.tokens) for r, o in zip(rollouts, owner) if o == rank)
        for rank in (0, 1)
    ]
    assert sum(loads) == sum(LENGTHS) + 21 and abs(loads[0] - loads[1]) <= 3
    assert by_length(rollouts, 1) == [0] * B == by_length(rollouts[::-1], 1)
    assert ALONE.every(3) == [3] and bool(ALONE.mine(rollouts, T).all())


def test_what_one_that_is_not_the_first_writes_goes_with_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed clears nothing away; who started it does, with the claim's
    folder.
    """
    monkeypatch.setenv(CLAIM, str(tmp_path / "failed"))
    second = Alone()
    assert second.folder(tmp_path / "run") == tmp_path / "run"
    second.rank = 1
    assert second.folder(tmp_path / "run").parent == tmp_path

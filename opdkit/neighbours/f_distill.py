"""f-distill: a one-step generator from a flow teacher, by any f-divergence.

Distribution matching follows teacher's score less own score at the generator's noised samples,
which is reverse KL and drops modes. Any f-divergence D_f = E_own[f(r)], r = p_teacher(x_s) /
p_own(x_s), has the same gradient with one weight for each sample:

    - E[ w(s) h(r) (score_teacher(x_s) - score_own(x_s)) dx_s/dtheta ],   h(r) = r^2 f''(r)

r is a discriminator's odds, kept in [0.1, 20] and (optionally) divided by its running mean at
that level of noise; h is divided by its mean over the batch. Scores, h and r carry no gradient;
the score of what the generator makes now ("own") and the discriminator learn beside it.

Source: arXiv 2502.15681. Decided: Neyman's weight is 2 / r and that of Jensen-Shannon belongs to
2 JS, as h = r^2 f'' says; factors go with the normalisation. w(s) is DMD2's, the scores' difference
told in data and over the teacher's error, here the batch's mean of it.

Here: points around eight centres far apart, for a generator too small to reach them all at once,
and 8 x 8 digits. Modes are counted that get a fifth of their share of samples within four
deviations of a centre; digits' by a classifier.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from opdkit.neighbours.experiment import Experiment, Progress
from opdkit.neighbours.flows import (
    Net,
    around,
    digits,
    fitted,
    flow_loss,
    noised,
    read,
    ring,
)
from opdkit.neighbours.outcome import Curves, Outcome, differences, last, mean_of

CLAIM = "f-distill with JS covers more modes than with reverse KL."
SOURCE = "arXiv:2502.15681"
NEEDS = ("sklearn",)
LEAST, MOST = 0.1, 20.0  # of the density ratio
LOGIT = 10.0
BINS = 10  # of noise levels
LOOKS = 10  # at the generator in a run


@dataclass(frozen=True)
class Settings(Experiment):
    """What can be chosen.

    Arguments:
        data: which tasks: "ring", "digits"; the claim is judged on the first.
        kinds: divergences, the first two the claim's.
        width: of the generator on the ring.
        top: the highest level of noise at which densities are compared, up to 0.98.
        gan: weight of the generator's loss against the discriminator.
        ema: share kept of a level's mean ratio, by which ratios are divided; 0: they are not.
        rounds: steps of the generator.
        inner: steps of own score and discriminator for each.
        batch: samples of a step.
    """

    data: tuple[str, ...] = ("ring", "digits")
    kinds: tuple[str, ...] = ("js", "reverse_kl", "forward_kl")
    width: int = 8
    top: float = 0.5
    gan: float = 1e-3
    ema: float = 0.0
    rounds: int = 600
    inner: int = 2
    batch: int = 256


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "hellinger2": lambda r: r.sqrt() / 4,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 2 / r,
}


def density_ratio(logit: Tensor) -> Tensor:
    """[n] p_teacher / p_own from a discriminator's logits [n]."""
    return logit.clamp(-LOGIT, LOGIT).exp().clamp(LEAST, MOST)


def levelled(r: Tensor, s: Tensor, usual: Tensor, ema: float) -> tuple[Tensor, Tensor]:
    """[n] ratios r [n] over the running mean of their level of noise s [n] in [0, 1), and the
    running means [bins] from `usual` [bins] on, where a level without samples keeps its own.
    """
    bins = (s * len(usual)).long()
    count = torch.zeros_like(usual).index_add(0, bins, torch.ones_like(r))
    mean = torch.zeros_like(usual).index_add(0, bins, r) / count.clamp(min=1)
    usual = torch.where(count > 0, ema * usual + (1 - ema) * mean, usual)
    return r / usual[bins], usual


def weights(kind: str, r: Tensor) -> Tensor:
    """[n] h(r) over its mean; r [n]."""
    h = WEIGHTS[kind](r)
    return h / h.mean()


def matching_loss(x: Tensor, toward: Tensor, weight: Tensor) -> Tensor:
    """[] whose gradient with respect to points x [n, D] is -weight * toward / (n D); weight [n],
    toward [n, D] without gradient.
    """
    return -(weight[..., None] * toward * x).mean()


# -------------------------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Task:
    """Data `some(n, draw)` [n, D], a flow of it, and how many modes points [n, D] cover."""

    teacher: Net
    dims: int
    modes: int
    some: Callable[[int, torch.Generator], Tensor]
    covered: Callable[[Tensor], int]
    width: int  # of the generator


def enough(which: Tensor, modes: int, drawn: int) -> int:
    """How many modes have at least a fifth of their share of `drawn`; `which` [n] mode each."""
    return int((which.bincount(minlength=modes) >= 0.2 * drawn / modes).sum())


def teacher(dims: int, hidden: int, some: Callable[[int, torch.Generator], Tensor]) -> Net:
    """A flow of the data."""
    torch.manual_seed(0)
    draw, kind = torch.Generator().manual_seed(0), torch.zeros(256, dtype=torch.long)
    return fitted(Net(dims, dims, 1, hidden), lambda n: (some(n, draw), kind), 3000, draw)


def points(settings: Settings) -> Task:
    """Eight centres, four from the middle, with deviation 0.24."""
    centres = 4 * ring(8)

    def some(n: int, draw: torch.Generator) -> Tensor:  # [n, 2]
        return 4 * around(ring(8), torch.randint(8, (n,), generator=draw), draw)

    def covered(x: Tensor) -> int:  # [n, 2]
        away, nearest = torch.cdist(x, centres).min(1)
        return enough(nearest[away < 0.96], 8, len(x))

    return Task(teacher(2, 32, some), 2, 8, some, covered, settings.width)


def handwriting(settings: Settings) -> Task:
    """Digits, not told which; a mode is what a classifier takes them for, with 0.9 or more."""
    images, names = digits()
    reader = read(images, names)

    def some(n: int, draw: torch.Generator) -> Tensor:  # [n, 64]
        return images[torch.randint(len(images), (n,), generator=draw)]

    @torch.no_grad()
    def covered(x: Tensor) -> int:  # [n, 64]
        sure, name = reader(x).softmax(-1).max(-1)
        return enough(name[sure > 0.9], 10, len(x))

    return Task(teacher(64, 128, some), 64, 10, some, covered, 128)


TASKS = {"ring": points, "digits": handwriting}


class Learner:
    """A generator, the flow of what it makes, and a discriminator."""

    def __init__(self, task: Task, kind: str, s: Settings, seed: int) -> None:
        torch.manual_seed(seed)
        self.task, self.kind, self.s = task, kind, s
        self.draw = torch.Generator().manual_seed(seed)
        hidden = task.teacher.points.out_features
        self.generator = Net(task.dims, task.dims, 1, task.width)
        self.own = copy.deepcopy(task.teacher)
        self.disc = Net(task.dims, 1, 1, hidden)
        rates = ((self.generator, 2e-3), (self.own, 1e-3), (self.disc, 1e-3))
        self.adams = [torch.optim.Adam(net.parameters(), r, betas=(0.0, 0.99)) for net, r in rates]
        self.usual = torch.ones(BINS)

    def make(self, n: int) -> Tensor:
        """[n, D] samples."""
        noise = torch.randn(n, self.task.dims, generator=self.draw)
        return noise - self.generator(noise, torch.ones(n), torch.zeros(n, dtype=torch.long))

    def stir(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Points noised to levels drawn evenly, [n, D] and [n]."""
        s = 0.02 + (self.s.top - 0.02) * torch.rand(len(x), generator=self.draw)
        return noised(x, s, torch.randn(x.shape, generator=self.draw)), s

    def step(self, adam: int, loss: Tensor) -> None:
        """Of one optimiser; loss []."""
        self.adams[adam].zero_grad()
        loss.backward()
        self.adams[adam].step()

    def odds(self, x: Tensor, s: Tensor) -> Tensor:
        """[n] the discriminator's logits."""
        return self.disc(x, s, torch.zeros(len(x), dtype=torch.long))[:, 0]

    def follow(self) -> None:
        """Own score and discriminator, one step each on what the generator makes now."""
        with torch.no_grad():
            x = self.make(self.s.batch)
        kind = torch.zeros(len(x), dtype=torch.long)
        self.step(1, flow_loss(self.own, x, kind, self.draw))
        real = self.odds(*self.stir(self.task.some(len(x), self.draw)))
        made = self.odds(*self.stir(x))
        self.step(2, (softplus(-real) + softplus(made)).mean())

    def lead(self) -> None:
        """One step of the generator."""
        x = self.make(self.s.batch)
        xs, s = self.stir(x)
        kind = torch.zeros(len(x), dtype=torch.long)
        with torch.no_grad():  # what each takes the noised point for
            theirs = xs - s[:, None] * self.task.teacher(xs, s, kind)
            ours = xs - s[:, None] * self.own(xs, s, kind)
        toward = (theirs - ours) / (x.detach() - theirs).abs().mean()
        logit = self.odds(xs, s)
        r = density_ratio(logit.detach())
        if self.s.ema:
            r, self.usual = levelled(r, s, self.usual, self.s.ema)
        loss = matching_loss(x, toward, weights(self.kind, r))
        self.step(0, loss + self.s.gan * softplus(-logit).mean())


def learnt(task: Task, kind: str, s: Settings, seed: int) -> list[float]:
    """Modes covered at each look."""
    learner, covered = Learner(task, kind, s, seed), []
    for at in range(s.rounds):
        for _ in range(s.inner):
            learner.follow()
        learner.lead()
        if (at + 1) % max(1, s.rounds // LOOKS) == 0:
            with torch.no_grad():
                covered.append(float(task.covered(learner.make(4000))))
    return covered


def run(settings: Settings, progress: Progress) -> Outcome:
    """Every divergence on every task with the same seeds."""
    s = settings
    panels, found, holds = [], [], True
    table: list[dict[str, str | float]] = []
    done = itertools.count(1)
    with progress("Distilling", total=len(s.data) * len(s.kinds) * s.seeds, unit="runs") as tick:
        for name in s.data:
            task, lines = TASKS[name](s), dict[str, list[list[float]]]()
            for kind in s.kinds:
                lines[kind] = []
                for seed in range(s.seeds):
                    lines[kind].append(learnt(task, kind, s, seed))
                    tick(next(done))
            every = max(1, s.rounds // LOOKS)
            looks = [every * (i + 1) for i in range(len(lines[s.kinds[0]][0]))]
            y_label = f"modes covered, of {task.modes}"
            panels.append(Curves(name, "steps of the generator", y_label, looks, lines))
            more = differences(*(last(lines[kind]) for kind in s.kinds[:2]))
            if name == s.data[0]:
                holds = more.low > 0
            found.append(f"{name}: {more} modes more with {s.kinds[0]} than with {s.kinds[1]}")
            table += [
                {
                    "task": name,
                    "divergence": kind,
                    "modes at the end": str(mean_of(last(seeds))),
                    "half-way": str(mean_of([seed[len(seed) // 2 - 1] for seed in seeds])),
                }
                for kind, seeds in lines.items()
            ]
    return Outcome(CLAIM, "; ".join(found) + ".", panels, table, holds)

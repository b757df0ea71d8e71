"""Flow-DPPO: reinforcement learning of a flow model with a divergence mask in place of PPO's clip.

Sampling from a flow as a stochastic equation makes each of its steps a Gaussian around a mean that
the model moves, so the KL of a step is known exactly; PPO's ratio is a noisy stand-in for it.

    mu    = x - h (v + sigma^2 (x + (1 - s) v) / (2 s)),   h = s - s'
    x'    ~ N(mu, sigma^2 h),   sigma = eta sqrt(s / (1 - s))
    D     = mean over dimensions of (mu_old - mu)^2 / (2 sigma^2 h)
    l     = -A r, 0 where D >= delta and A (r - 1) > 0 (the step would lead further away)
    A     = reward less the mean of its prompt, over one deviation of the whole batch

Source: arXiv 2606.11025; r is of log-probs that are means over dimensions, as in the released
code. Decided: s in 1 - s is at most the second level; which steps are trained is drawn anew for
each batch. Language models have this mask as the
setting `divergence_mask` of every clipped method.

Here: points around eight centres, of which a prompt wants two, and 8 x 8 digits with as much ink
as can be while a classifier still reads the prompted one. Compared with PPO's clip at several
widths, by the KL to the model before all training, summed over steps and dimensions, where both
have the same reward.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.neighbours.experiment import Experiment, Progress
from opdkit.neighbours.flows import Net, around, digits, fitted, read, ring
from opdkit.neighbours.outcome import Curves, Outcome, area, differences, last, mean_of

CLAIM = "A divergence mask keeps the KL to the model before lower than PPO's clip at equal reward."
SOURCE = "arXiv:2606.11025"
NEEDS = ("sklearn",)
SMOOTH = 10  # batches whose mean reward counts as reached


@dataclass(frozen=True)
class Settings(Experiment):
    """What can be chosen.

    Arguments:
        data: which tasks: "ring", "digits".
        delta: nats per dimension from which on a step may not lead further away.
        clips: PPO's, compared with one after another.
        eta: of sigma: how noisy sampling is.
        steps: of sampling.
        trained: steps of each batch that are learnt from.
        prompts: of a batch.
        group: samples of a prompt.
        updates: of Adam on one batch.
        batches: of samples.
    """

    data: tuple[str, ...] = ("ring", "digits")
    delta: float = 1e-5
    clips: tuple[float, ...] = (0.2, 0.01, 0.001)
    eta: float = 0.7
    steps: int = 10
    trained: int = 3
    prompts: int = 4
    group: int = 16
    updates: int = 2
    batches: int = 100


def levels(steps: int) -> Tensor:
    """[steps + 1] from noise, 1, to data, 0."""
    return torch.linspace(1, 0, steps + 1)


def spread(s: Tensor, below: Tensor, eta: float, most: float) -> Tensor:
    """[...] standard deviation of the step from level s to level `below` [...]; s counts as at most
    `most` in 1 - s.
    """
    return eta * (s / (1 - s.clamp(max=most))).sqrt() * (s - below).sqrt()


def mean_after(x: Tensor, velocity: Tensor, s: Tensor, below: Tensor, std: Tensor) -> Tensor:
    """[..., D] mean of the next point after x [..., D], from level s to `below` [...], each [...]
    with deviation `std`.
    """
    h, s = (s - below)[..., None], s[..., None]
    noise = x + (1 - s) * velocity  # E[noise | x]
    return x - h * velocity - std[..., None].square() * noise / (2 * s)


def logp(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[...] log-density of x [..., D] up to what the policy cannot move, mean over dimensions."""
    return -((x - mean) / std[..., None]).square().mean(-1) / 2


def gaussian_kl(old: Tensor, new: Tensor, std: Tensor) -> Tensor:
    """[..., D] nats per dimension, between Gaussians of means [..., D] and one deviation [...]."""
    return ((old - new) / std[..., None]).square() / 2


def advantages(reward: Tensor) -> Tensor:
    """[prompts, G]: less each prompt's mean, over one deviation of all."""
    centred = reward - reward.mean(1, keepdim=True)
    return centred / (centred.std() + 1e-6)


def masked(r: Tensor, advantage: Tensor, apart: Tensor, delta: float) -> Tensor:
    """[...] -A r, 0 where the divergence `apart` is at least delta and the step increases it; r,
    advantage and apart [...].
    """
    dropped = (apart >= delta) & (advantage * (r - 1) > 0)
    return torch.where(dropped, torch.zeros_like(r), -advantage * r)


def ppo(r: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """[...] max(-A r, -A clip(r, 1 - clip, 1 + clip)); r, advantage [...]."""
    return torch.maximum(-advantage * r, -advantage * r.clamp(1 - clip, 1 + clip))


# -------------------------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Task:
    """A flow to start from and what its samples [n, D] are worth for their prompts [n], [n]."""

    base: Net
    prompts: int
    dims: int
    reward: Callable[[Tensor, Tensor], Tensor]
    rate: float  # of Adam


def points() -> Task:
    """Eight centres for each of four prompts, which want two of them that lie opposite."""
    centres, draw = ring(8), torch.Generator().manual_seed(0)

    def some(n: int) -> tuple[Tensor, Tensor]:
        which = torch.randint(8, (n,), generator=draw)
        return around(centres, which, draw), torch.randint(4, (n,), generator=draw)

    def reward(x: Tensor, prompt: Tensor) -> Tensor:  # [n]
        away = torch.cdist(x, centres)
        nearest = away[:, :4].minimum(away[:, 4:]).gather(1, prompt[:, None])[:, 0]
        return (-2 * nearest.square()).exp()

    torch.manual_seed(0)
    return Task(fitted(Net(2, 2, 4), some, 2500, draw), 4, 2, reward, 1e-3)


def handwriting() -> Task:
    """Digits by name; the reward is ink times the classifier's chance of that name."""
    (images, names), draw = digits(), torch.Generator().manual_seed(0)

    def some(n: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(images), (n,), generator=draw)
        return images[at], names[at]

    reader = read(images, names)

    def reward(x: Tensor, prompt: Tensor) -> Tensor:  # [n]
        ink = (x.clamp(-1, 1) + 1).mean(-1) / 2
        return reader(x).softmax(-1).gather(1, prompt[:, None])[:, 0] * ink

    torch.manual_seed(0)
    return Task(fitted(Net(64, 64, 10), some, 3000, draw), 10, 64, reward, 1e-4)


TASKS = {"ring": points, "digits": handwriting}


@dataclass(frozen=True)
class Sampler:
    """The stochastic equation at these steps."""

    at: Tensor  # [steps + 1]
    eta: float

    def means(self, net: Net, x: Tensor, prompt: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[n, K, D] where the steps `k` [K] lead from x [n, K, D], and their deviations [n, K]."""
        s, below = (self.at[i].expand(x.shape[:2]) for i in (k, k + 1))
        std = spread(s, below, self.eta, self.at[1].item())
        velocity = net(x, s, prompt[:, None].expand(s.shape))
        return mean_after(x, velocity, s, below, std), std

    @torch.no_grad()
    def sample(
        self, net: Net, prompt: Tensor, dims: int, draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Points [n, steps + 1, D] on the way from noise to data, and the means [n, steps, D]."""
        xs, means = [torch.randn(len(prompt), 1, dims, generator=draw)], []
        for k in torch.arange(len(self.at) - 1)[:, None]:
            mean, std = self.means(net, xs[-1], prompt, k)
            means.append(mean)
            xs.append(mean + std[..., None] * torch.randn(mean.shape, generator=draw))
        return torch.cat(xs, 1), torch.cat(means, 1)


@dataclass(frozen=True)
class Record:
    """Of each batch: mean reward, KL to the model before all training, KL of the batch's updates
    (mean over dimensions, as in the released code).
    """

    reward: list[float]
    away: list[float]
    moved: list[float]


# (ratio, advantage, divergence) [n, K] each -> loss [n, K]
Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor]


def train(task: Task, surrogate: Surrogate, s: Settings, seed: int) -> Record:
    """From the task's flow on."""
    draw, sampler = torch.Generator().manual_seed(seed), Sampler(levels(s.steps), s.eta)
    net, kept = copy.deepcopy(task.base), Record([], [], [])
    adam = torch.optim.Adam(net.parameters(), task.rate)
    for _ in range(s.batches):
        prompt = torch.randperm(task.prompts, generator=draw)[: s.prompts]
        prompt = prompt.repeat_interleave(s.group)
        xs, means = sampler.sample(net, prompt, task.dims, draw)
        reward = task.reward(xs[:, -1], prompt)
        k = torch.randperm(s.steps, generator=draw)[: s.trained]
        credit = advantages(reward.view(-1, s.group)).view(-1, 1).expand(-1, s.trained)
        with torch.no_grad():
            base, std = sampler.means(task.base, xs[:, :-1], prompt, torch.arange(s.steps))
        kept.reward.append(reward.mean().item())
        kept.away.append(gaussian_kl(base, means, std).sum((1, 2)).mean().item())
        start, old, after = xs[:, k], means[:, k], xs[:, k + 1]
        for _ in range(s.updates):
            new, std = sampler.means(net, start, prompt, k)
            r = (logp(after, new, std) - logp(after, old, std)).exp()
            apart = gaussian_kl(old, new, std).mean(-1).detach()
            adam.zero_grad()
            surrogate(r, credit, apart).mean().backward()
            adam.step()
        with torch.no_grad():
            new, std = sampler.means(net, start, prompt, k)
        kept.moved.append(gaussian_kl(old, new, std).mean().item())
    return kept


def smooth(values: Sequence[float]) -> list[float]:
    """Means of `SMOOTH` neighbours."""
    n = min(SMOOTH, len(values))
    return torch.tensor(values).unfold(0, n, 1).mean(-1).tolist()


def when(level: float, reward: Sequence[float], away: Sequence[float]) -> float:
    """What `away` was when `reward` first was at `level`, on straight lines between batches."""
    at = next(i for i, r in enumerate(reward) if r >= level)
    if at == 0:
        return away[0]
    share = (level - reward[at - 1]) / (reward[at] - reward[at - 1])
    return away[at - 1] + share * (away[at] - away[at - 1])


def compared(
    name: str, records: Mapping[str, Sequence[Record]]
) -> tuple[list[Curves], dict[str, list[float]]]:
    """Panels of one task, and each line's KL, by seed, at the highest reward that all reach."""
    reward = {line: [smooth(r.reward) for r in seeds] for line, seeds in records.items()}
    away = {line: [smooth(r.away) for r in seeds] for line, seeds in records.items()}
    every = [seed for seeds in reward.values() for seed in seeds]
    low, high = max(seed[0] for seed in every), min(max(seed) for seed in every)
    grid = torch.linspace(low, max(low, high), 9).tolist()
    grid[-1] = max(low, high)
    at = {
        line: [
            [when(min(level, max(r)), r, a) for level in grid]
            for r, a in zip(reward[line], away[line], strict=True)
        ]
        for line in records
    }
    batches = range(len(every[0]))
    panels = [
        Curves(f"{name}: reward", "batches", "mean reward", batches, reward),
        Curves(f"{name}: KL at equal reward", "mean reward", "KL to the base, nats", grid, at),
    ]
    return panels, {line: last(seeds) for line, seeds in at.items()}


def run(settings: Settings, progress: Progress) -> Outcome:
    """Every surrogate on every task with the same seeds."""
    s, mask = settings, f"mask {settings.delta:g}"
    ways: dict[str, Surrogate] = {mask: lambda r, a, apart: masked(r, a, apart, s.delta)}
    for clip in s.clips:
        ways[f"clip {clip:g}"] = lambda r, a, apart, clip=clip: ppo(r, a, clip)  # type: ignore[misc]
    clips = list(ways)[1:]
    panels: list[Curves] = []
    table: list[dict[str, str | float]] = []
    found, holds, done = [], True, itertools.count(1)
    total = len(s.data) * len(ways) * s.seeds
    with progress("Training", total=total, unit="runs") as tick:
        for name in s.data:
            task, records = TASKS[name](), dict[str, list[Record]]()
            for way, surrogate in ways.items():
                records[way] = []
                for seed in range(s.seeds):
                    records[way].append(train(task, surrogate, s, seed))
                    tick(next(done))
            more, at_level = compared(name, records)
            panels += more
            pace = {way: area([r.reward for r in seeds]) for way, seeds in records.items()}
            rival = min(clips, key=lambda way: abs(differences(pace[way], pace[mask]).mean))
            less = differences(at_level[mask], at_level[rival])
            holds = holds and less.high < 0
            against = [f"{differences(at_level[mask], at_level[way])} with {way}" for way in clips]
            found.append(f"{name}: " + ", ".join(against) + f"; the pace of {rival} is nearest")
            table += [
                {
                    "task": name,
                    "update": way,
                    "last reward": str(mean_of([r[-1] for r in more[0].lines[way]])),
                    "KL at equal reward": str(mean_of(at_level[way])),
                    "mask's less this": str(differences(at_level[mask], at_level[way])),
                    "KL of a batch": str(mean_of([area([r.moved])[0] for r in seeds])),
                }
                for way, seeds in records.items()
            ]
    text = "KL at equal reward, the mask's less the clip's, nats: " + ". ".join(found) + "."
    return Outcome(CLAIM, text, panels, table, holds)

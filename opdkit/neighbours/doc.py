"""Dichotomy of Control: imitate what the future says about actions, not what it says about luck.

Return-conditioned imitation credits luck: of all that was followed by a high return it imitates
the actions too that had no part in it. Here a latent z of the future stands in the return's
place, and z may say nothing of the next reward and state that the action does not:

    min  E_{z ~ q(z | s, future)} sum_t [-log pi(a_t | s_t, z)],   I(r_t, s_{t+1}; z | s_t, a_t) = 0

The constraint is the contrastive bound of an energy w, which w raises and q lowers:

    L_E = mean[-w(own next) + log sum over rows exp w(row's next)],   its own row among them
    policy, value   CE of the actions + (V(s, z) - return)^2
    encoder q       the same + prior_weight KL(q || p) - energy_weight L_E
    prior p         CE to q;   no gradient from that KL where the energy is on
    energy w        L_E

To act: K draws of z from p(z | s), the one of the highest V(s, z), then pi(. | s, z).

Source: arXiv 2210.13435. Departures: the released code lowers L_E over all parameters, the
encoder's too, which is not what the constraint says; z is one of a few codes, over which
expectations are summed and not drawn, the K draws' too; past windows are the state alone, as
these tasks are Markov.

Here: a bandit of two arms of which the worse is pulled more often, and gymnasium's slippery
FrozenLake (4 x 4, 100 steps) with data of mediocre policies. Compared with imitation conditioned
on the return, and with the same model without the energy ("VAE").
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from opdkit.neighbours.experiment import Experiment, Progress
from opdkit.neighbours.outcome import Curves, Outcome, differences, mean_of

CLAIM = "DoC earns more than return-conditioned imitation where luck decides."
SOURCE = "arXiv:2210.13435"
NEEDS = ("gymnasium",)


@dataclass(frozen=True)
class Settings(Experiment):
    """What can be chosen.

    Arguments:
        luck: chances, one panel's points, that the bandit's worse arm pays; the better one pays
            with the rest, and is pulled with this chance.
        skill: shares, the other panel's points, of optimal actions in FrozenLake's data; the
            others are drawn evenly.
        pulls: of the bandit's arms.
        episodes: of FrozenLake.
        window: steps of a future on the lake.
        codes: values of z.
        prior_weight: of KL(q || p); the released code has 1, where a code costs as much as it
            tells of one action, so that none is learnt.
        energy_weight: of the constraint; the released code has 1.
        draws: K.
        updates: of Adam, its rate from 1e-2 down to 0.
        batch: futures of an update.
    """

    luck: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    skill: tuple[float, ...] = (0.5, 0.7)
    pulls: int = 1000
    episodes: int = 3000
    window: int = 2
    codes: int = 8
    prior_weight: float = 0.3
    energy_weight: float = 3.0
    draws: int = 100
    updates: int = 1500
    batch: int = 256


def contrast(own: Tensor, others: Tensor, log_weight: Tensor) -> Tensor:
    """[...] L_E of the energy of what came next, `own` [...], among the candidates' `others`
    [..., n] of log-weights [n] or [..., n].

    Weights 1 with the own one among the candidates: InfoNCE, log n where w is constant. Counts:
    candidates that are the same. Weights 1 / n: draws of a fixed marginal, 0 where w is constant.
    """
    return (others + log_weight).logsumexp(-1) - own


def prior_kl(q: Tensor, p: Tensor, energy: bool) -> Tensor:
    """[...] KL(q || p) of log-probs [..., Z]; none of its gradient is the prior's where the energy
    is on.
    """
    return (q.exp() * (q - (p.detach() if energy else p))).sum(-1)


def chosen(prior: Tensor, value: Tensor, draws: int) -> Tensor:
    """[..., Z] the chance that each code has the highest value among `draws` of the prior
    [..., Z]; value [..., Z], of equal ones the later.
    """
    order = value.argsort(dim=-1, stable=True)
    upto = prior.gather(-1, order).cumsum(-1).clamp(max=1)
    most = upto**draws  # no draw is better
    return torch.zeros_like(prior).scatter(-1, order, most.diff(dim=-1, prepend=0 * most[..., :1]))


# -------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Futures:
    """Windows of M runs, padded to T steps: states, actions and what came next (reward and state
    as one number below `nexts`), [M, N, T] each; `real` [M, N, T] says which steps are no padding;
    what was earned from the first on, `earned` [M, N].
    """

    sizes: tuple[int, int, int]  # how many states, actions, nexts
    states: Tensor
    actions: Tensor
    after: Tensor
    real: Tensor
    earned: Tensor

    def some(self, n: int, generator: torch.Generator) -> Futures:
        """`n` of each run's, drawn evenly."""
        at = torch.randint(self.earned.shape[1], (len(self.earned), n), generator=generator)
        run = torch.arange(len(at))[:, None]
        return Futures(self.sizes, *(column[run, at] for column in self.columns))

    @staticmethod
    def beside(runs: Sequence[Futures]) -> Futures:
        """Runs side by side, each as long as the shortest."""
        least = min(run.earned.shape[1] for run in runs)
        columns = [[column[:, :least] for column in run.columns] for run in runs]
        return Futures(runs[0].sizes, *map(torch.cat, zip(*columns)))

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All five, [M, N, ...] each."""
        return self.states, self.actions, self.after, self.real, self.earned

    def seen(self) -> Tensor:
        """[M, N, F]: all of a future side by side, zeros where there is none."""
        steps = torch.cat([one_hot(c, k) for c, k in zip(self.columns, self.sizes)], -1)
        return (steps * self.real[..., None]).flatten(2).float()


class Doc(nn.Module):
    """Tables for M runs side by side, and an encoder of one hidden layer for each."""

    def __init__(self, runs: int, window: int, sizes: tuple[int, int, int], codes: int) -> None:
        super().__init__()
        states, actions, nexts = sizes

        def table(*shape: int, scale: float = 0.0) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(runs, *shape))

        self.policy = table(states, codes, actions)
        self.value = table(states, codes)
        self.prior = table(states, codes)
        self.energy = table(states, actions, codes, nexts)
        width = window * sum(sizes)
        self.inner = table(width, 32, scale=1 / math.sqrt(3 * window))
        self.outer = table(32, codes, scale=1 / math.sqrt(32))

    def encode(self, futures: Futures) -> Tensor:
        """[M, N, Z] log q."""
        return ((futures.seen() @ self.inner).tanh() @ self.outer).log_softmax(-1)

    def loss(self, futures: Futures, prior_weight: float, energy_weight: float) -> Tensor:
        """[]: everything's loss, each part's gradient its own."""
        f, run = futures, torch.arange(len(futures.earned))[:, None]
        log_q, first = self.encode(f), f.states[..., 0]
        q, prior = log_q.exp(), self.prior.log_softmax(-1)[run, first]
        run = run[..., None]
        told = self.policy.log_softmax(-1)[run, f.states, :, f.actions]  # [M, N, T, Z]
        told = (told * f.real[..., None]).sum(2)
        off = (self.value[run[..., 0], first] - f.earned[..., None]).square()
        fits = (q * (off - told)).sum(-1) + prior_weight * prior_kl(log_q, prior, energy_weight > 0)
        if energy_weight > 0:
            # counts of what came next, at each step of the window: rows that agree count together
            counts = (one_hot(f.after, f.sizes[2]) * f.real[..., None]).sum(1)  # [M, T, X]
            w = self.energy[run, f.states, f.actions]  # [M, N, T, Z, X]
            own = w.gather(-1, f.after[..., None, None].expand(*w.shape[:-1], 1))[..., 0]
            l = contrast(own, w, counts.float().log()[:, None, :, None]) * f.real[..., None]
            l = l.sum(2)
            fits = fits + energy_weight * (q.detach() * l - q * l.detach()).sum(-1)
            fits = fits - (q.detach() * prior).sum(-1)
        return fits.mean(1).sum()

    @torch.no_grad()
    def acts(self, draws: int) -> Tensor:
        """[M, S, A] chances of the actions."""
        code = chosen(self.prior.softmax(-1), self.value, draws)
        return (code[..., None] * self.policy.softmax(-1)).sum(-2)


def imitated(futures: Futures) -> Tensor:
    """[M, S, A] chances of the actions given the state and the highest return, by counting first
    steps; where that return never came, evenly.
    """
    states, actions, _ = futures.sizes
    counts = torch.zeros(len(futures.earned), states * actions)
    at = futures.states[..., 0] * actions + futures.actions[..., 0]
    counts.scatter_add_(1, at, (futures.earned == futures.earned.max()).float())
    counts = counts.view(-1, states, actions)
    total = counts.sum(-1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp(min=1), 1 / actions)


def learnt(futures: Futures, s: Settings, energy: float, tick: Callable[[], None]) -> Tensor:
    """[M, S, A] chances of the actions after training; returns are standardised."""
    torch.manual_seed(0)
    model = Doc(len(futures.earned), futures.states.shape[-1], futures.sizes, s.codes)
    draw = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    slower = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, s.updates)
    deviation, mean = torch.std_mean(futures.earned, -1, keepdim=True)
    futures = replace(futures, earned=(futures.earned - mean) / deviation.clamp(min=1e-6))
    for _ in range(s.updates):
        adam.zero_grad()
        model.loss(futures.some(s.batch, draw), s.prior_weight, energy).backward()
        adam.step()
        slower.step()
        tick()
    return model.acts(s.draws)


# -------------------------------------------------------------------------------------- the tasks


@dataclass(frozen=True)
class Task:
    """A run for each of `points` and seed, points outermost.

    worth: of policies [M, S, A], [M]. data, best: what the policy of the data and the best one
    earn at each point.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[float]
    futures: Futures
    worth: Callable[[Tensor], Tensor]
    data: Sequence[float]
    best: Sequence[float]


def bandit(s: Settings) -> Task:
    """Two arms: one pays with chance `luck` and is pulled with the rest, the other pays with the
    rest and is pulled with that chance.
    """
    arms, paid = [], []
    for luck, seed in itertools.product(s.luck, range(s.seeds)):
        draw = torch.Generator().manual_seed(seed)
        arms.append((torch.rand(s.pulls, 1, generator=draw) < luck).long())
        chance = torch.tensor([luck, 1 - luck])[arms[-1]]
        paid.append((torch.rand(s.pulls, 1, generator=draw) < chance).long())
    arm, pay = torch.stack(arms), torch.stack(paid)
    seen = torch.zeros_like(arm), arm, pay, torch.ones_like(arm), pay[..., 0].float()
    pays = torch.tensor([[luck, 1 - luck] for luck in s.luck]).repeat_interleave(s.seeds, 0)
    return Task(
        "bandit",
        "chance that the worse arm pays",
        "mean reward",
        s.luck,
        Futures((1, 2, 2), *seen),
        lambda policy: (policy[:, 0] * pays).sum(-1),
        [2 * luck * (1 - luck) for luck in s.luck],
        [max(luck, 1 - luck) for luck in s.luck],
    )


STEPS = 100  # of an episode of FrozenLake


class Lake:
    """Slippery FrozenLake: its moves [S, A, S], what they pay in the mean [S, A], where it ends."""

    def __init__(self) -> None:
        import gymnasium

        self.env = gymnasium.make("FrozenLake-v1", is_slippery=True)
        table = self.env.unwrapped.P
        self.moves = torch.zeros(len(table), len(table[0]), len(table))
        self.pays = torch.zeros(len(table), len(table[0]))
        self.over = torch.zeros(len(table))
        for state, action in itertools.product(table, table[0]):
            for chance, after, reward, ends in table[state][action]:
                self.moves[state, action, after] += chance
                self.pays[state, action] += chance * reward
                self.over[after] = ends

    def success(self, policy: Tensor) -> Tensor:
        """[M] chance of reaching the goal in time under `policy` [M, S, A]."""
        at = torch.zeros(len(policy), len(self.over))
        at[:, 0], got = 1, torch.zeros(len(policy))
        for _ in range(STEPS):
            acts = (at * (1 - self.over))[..., None] * policy
            got = got + (acts * self.pays).sum((-1, -2))
            at = torch.einsum("msa,sat->mt", acts, self.moves)
        return got

    def optimal(self) -> Tensor:
        """[S] the action that reaches the goal most surely."""
        value = torch.zeros(len(self.over))
        for _ in range(2000):
            q = self.pays + self.moves @ ((1 - self.over) * value)
            value = q.max(-1).values
        return q.argmax(-1)

    def episodes(self, skill: float, seed: int, n: int) -> list[list[tuple[int, int, int, int]]]:
        """Played in gymnasium: (state, action, next state, reward) of each step."""
        draw = random.Random(seed)
        best, actions = self.optimal().tolist(), self.pays.shape[1]
        played = []
        for at in range(n):
            state, _ = self.env.reset(seed=seed if at == 0 else None)
            steps, over = [], False
            while not over:
                skilled = draw.random() < skill
                action = best[state] if skilled else draw.randrange(actions)
                after, reward, ended, late, _ = self.env.step(action)
                steps.append((int(state), action, int(after), int(reward)))
                state, over = after, ended or late
            played.append(steps)
        return played

    def futures(self, played: Sequence[list[tuple[int, int, int, int]]], window: int) -> Futures:
        """Of every step of one run's episodes, [1, N, T]."""
        rows, earned = [], []
        for steps in played:
            padded = [(s, a, 2 * t + r, 1) for s, a, t, r in steps] + [(0, 0, 0, 0)] * window
            rows += [padded[at : at + window] for at in range(len(steps))]
            earned += [float(steps[-1][3])] * len(steps)
        states, actions, after, real = torch.tensor(rows).permute(2, 0, 1)[:, None]
        sizes = (*self.pays.shape, 2 * len(self.over))
        return Futures(sizes, states, actions, after, real, torch.tensor(earned)[None])


def lake(s: Settings) -> Task:
    """FrozenLake, played by a policy that takes the optimal action with chance `skill`, or any."""
    world = Lake()
    best = one_hot(world.optimal(), world.pays.shape[1]).float()
    runs = [
        world.futures(world.episodes(skill, seed, s.episodes), s.window)
        for skill, seed in itertools.product(s.skill, range(s.seeds))
    ]
    mixed = torch.stack([skill * best + (1 - skill) / best.shape[1] for skill in s.skill])
    return Task(
        "FrozenLake",
        "share of optimal actions in the data",
        "chance of reaching the goal",
        s.skill,
        Futures.beside(runs),
        world.success,
        world.success(mixed).tolist(),
        world.success(best[None]).tolist() * len(s.skill),
    )


def run(settings: Settings, progress: Progress) -> Outcome:
    """Both tasks, one panel each."""
    panels, found, holds = [], [], True
    table: list[dict[str, str | float]] = []
    tasks = [bandit(settings), lake(settings)]
    with progress("Learning", total=4 * settings.updates, unit="updates") as tick:
        done = itertools.count(1)
        for task in tasks:
            policies = {
                "DoC": learnt(
                    task.futures, settings, settings.energy_weight, lambda: tick(next(done))
                ),
                "VAE": learnt(task.futures, settings, 0.0, lambda: tick(next(done))),
                "imitation": imitated(task.futures),
            }
            earned = {  # [points, seeds]
                name: task.worth(policy).view(len(task.points), -1)
                for name, policy in policies.items()
            }
            lines = {name: worth.T.tolist() for name, worth in earned.items()}
            lines["data"], lines["optimal"] = [list(task.data)], [list(task.best)]
            panels.append(Curves(task.title, task.x_label, task.y_label, task.points, lines))
            means = {name: worth.mean(0).tolist() for name, worth in earned.items()}
            ahead = differences(means["DoC"], means["imitation"])
            holds = holds and ahead.low > 0
            found.append(f"{task.title}: {ahead} more than return-conditioned imitation")
            for at, point in enumerate(task.points):
                row: dict[str, str | float] = {"task": task.title, "at": point}
                row |= {name: str(mean_of(worth[at].tolist())) for name, worth in earned.items()}
                table.append(row | {"data": task.data[at], "optimal": task.best[at]})
    return Outcome(CLAIM, "; ".join(found) + ".", panels, table, holds)

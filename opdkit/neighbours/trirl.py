"""Trust Region Inverse RL: what does an expert want, told from where it goes?

Exact max-entropy inverse RL solves a whole control problem for each change of the reward;
adversarial imitation solves none and has no reward in the end. TRIRL lets the policy take one
step of limited KL for a large change of the reward, then keeps only that part of the change for
which the new policy is exactly optimal:

    rtilde = beta (log rho_E - log rho_pi)                       where the expert is more often
    r'     = (1 - eps) r + eps rtilde
    pi     <- argmax E[r'] + H(pi) - eta KL(pi || pi_k)
              = soft optimum of (r' + eta log pi_k) / (1 + eta)
    r      <- (1 - eps / (1 + eta)) r + eps / (1 + eta) rtilde

Source: arXiv 2605.11020 (tables only: the discriminator's logit is exact, the step is solved).
Departures: beta is 5 where the released function has 0.5, which pulls the reward towards 0 and
the policy towards chance; `betas` shows both.

Here: grids of random rewards, a soft-optimal expert. Compared with dual ascent proper (r <- r +
rate (rho_E - rho_pi), every step solved whole) and adversarial imitation (the policy's steps on
rtilde alone without entropy, the last rtilde its reward), by rank correlation with the true
reward and by what the optimal policy for the recovered reward earns under other dynamics. Every
tensor may have further dimensions before those said: several worlds at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from opdkit.neighbours.experiment import Experiment, Progress
from opdkit.neighbours.outcome import Curves, Outcome, differences, last, mean_of

CLAIM = "TRIRL recovers the order of a grid world's rewards."
SOURCE = "arXiv:2605.11020"
NEEDS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings(Experiment):
    """What can be chosen.

    Arguments:
        size: cells of a side of the grid.
        slip: chance of a move in a random direction.
        wind: chance, in the changed dynamics, of being blown one cell to the right.
        gamma: discount.
        beta: scale of the log ratio of occupancies; how far the reward may grow.
        betas: further scales whose end is shown in the table.
        eps: share of the log ratio in the trial reward.
        eta: weight of the KL to the policy before the step.
        rate: step of dual ascent, in reward per unit of discounted time.
        rounds: changes of the reward.
    """

    size: int = 5
    slip: float = 0.2
    wind: float = 0.3
    gamma: float = 0.9
    beta: float = 5.0
    betas: tuple[float, ...] = (0.5, 20.0)
    eps: float = 0.1
    eta: float = 3.0
    rate: float = 5.0
    rounds: int = 150


def soft_optimal(reward: Tensor, moves: Tensor, gamma: float, close: float = 1e-9) -> Tensor:
    """[S, A] log pi of the policy that maximises E[sum_t gamma^t (reward + H(pi))], by soft value
    iteration to within `close`; reward [S, A], moves [S, A, S] chances of each next state.
    """
    value = torch.zeros_like(reward[..., 0])
    while True:
        q = reward + gamma * (moves @ value[..., None, :, None])[..., 0]
        new = q.logsumexp(-1)
        if (new - value).abs().max() < close:
            return q.log_softmax(-1)
        value = new


def carried(policy: Tensor, moves: Tensor) -> Tensor:
    """[S, S] chances from state to state under `policy` [S, A]; moves [S, A, S]."""
    return (policy[..., None] * moves).sum(-2)


def occupancy(policy: Tensor, moves: Tensor, start: Tensor, gamma: float) -> Tensor:
    """[S] share of the discounted time in each state; policy [S, A], moves [S, A, S], start [S]."""
    eye = torch.eye(start.shape[-1], dtype=start.dtype)
    return torch.linalg.solve((eye - gamma * carried(policy, moves)).mT, (1 - gamma) * start)


def log_ratio(expert: Tensor, visited: Tensor, beta: float) -> Tensor:
    """[...] beta (log rho_E - log rho_pi): an exact discriminator's logit, rtilde."""
    return beta * (expert.log() - visited.log())


def mixed(reward: Tensor, toward: Tensor, eps: float) -> Tensor:
    """[...] the trial reward r', a step of `eps` from the reward to rtilde."""
    return (1 - eps) * reward + eps * toward


def held(reward: Tensor, logp: Tensor, eta: float) -> Tensor:
    """[S, A] the reward whose soft optimum is argmax E[reward] + H(pi) - eta KL(pi || pi_k); log
    pi_k `logp` and `reward` [S, A].
    """
    return (reward + eta * logp) / (1 + eta)


def corrected(reward: Tensor, toward: Tensor, eps: float, eta: float) -> Tensor:
    """[...] the reward for which the policy after its step is optimal."""
    return mixed(reward, toward, eps / (1 + eta))


def ranks(x: Tensor) -> Tensor:
    """[..., n] standardised ranks of `x` [..., n]: their products' mean is Spearman's."""
    rank = x.argsort(-1).argsort(-1).to(x.dtype)
    return (rank - rank.mean(-1, keepdim=True)) / rank.std(-1, correction=0, keepdim=True)


# -------------------------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Grid:
    """Worlds that differ in what their cells are worth: true [seeds, S], moves [S, A, S]."""

    true: Tensor
    moves: Tensor
    elsewhere: Tensor  # moves under changed dynamics
    gamma: float

    @property
    def start(self) -> Tensor:
        """[seeds, S], anywhere."""
        return torch.full_like(self.true, 1 / self.true.shape[-1])

    def per_action(self, reward: Tensor) -> Tensor:
        """[..., S, A] of a reward [..., S] of the cell that one stands on."""
        return reward[..., None].expand(*reward.shape, self.moves.shape[1])

    def solved(self, reward: Tensor) -> Tensor:
        """[seeds, S, A] log pi, soft-optimal for `reward` [seeds, S]."""
        return soft_optimal(self.per_action(reward), self.moves, self.gamma)

    def visits(self, logp: Tensor) -> Tensor:
        """[seeds, S] of log pi [seeds, S, A]."""
        return occupancy(logp.exp(), self.moves, self.start, self.gamma)

    def earned(self, policy: Tensor) -> Tensor:
        """[seeds] mean true reward of `policy` [seeds, S, A] under the changed dynamics, 0 for
        chance and 1 for the best there is.
        """

        def mean(policy: Tensor) -> Tensor:  # [seeds]
            return (occupancy(policy, self.elsewhere, self.start, self.gamma) * self.true).sum(-1)

        chance = mean(torch.full_like(policy, 1 / policy.shape[-1]))
        return (mean(policy) - chance) / (mean(self.greedy(self.true)) - chance)

    def greedy(self, reward: Tensor) -> Tensor:
        """[seeds, S, A] the optimal policy for `reward` [seeds, S] under the changed dynamics."""
        sharp = 1e4 / reward.std(-1, keepdim=True).clamp(min=1e-12)
        return soft_optimal(self.per_action(reward * sharp), self.elsewhere, self.gamma, 1e-3).exp()


def grid(settings: Settings) -> Grid:
    """One grid of random rewards for each seed; four moves, each of which may slip."""
    size, cells = settings.size, settings.size**2
    still = torch.zeros(cells, 4, cells, dtype=torch.float64)
    for cell in range(cells):
        for move, (down, right) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
            y, x = cell // size + down, cell % size + right
            inside = 0 <= y < size and 0 <= x < size
            still[cell, move, y * size + x if inside else cell] = 1
    moves = (1 - settings.slip) * still + settings.slip * still.mean(1, keepdim=True)
    blown = (1 - settings.wind) * moves + settings.wind * (moves @ still[:, 1])
    worth = [
        torch.randn(cells, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in range(settings.seeds)
    ]
    return Grid(torch.stack(worth), moves, blown, settings.gamma)


# (reward, log pi, expert's and own visits) -> the next reward and log pi
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def steps(world: Grid, s: Settings, beta: float) -> dict[str, Step]:
    """What happens in one round: reward and visits [seeds, S], log pi [seeds, S, A]."""

    def trirl(r: Tensor, logp: Tensor, expert: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        toward = log_ratio(expert, own, beta)
        wanted = held(world.per_action(mixed(r, toward, s.eps)), logp, s.eta)
        logp = soft_optimal(wanted, world.moves, world.gamma)
        return corrected(r, toward, s.eps, s.eta), logp

    def dual(r: Tensor, logp: Tensor, expert: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        r = r + s.rate * (expert - own)
        return r, world.solved(r)

    def adversarial(r: Tensor, logp: Tensor, expert: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        toward = log_ratio(expert, own, beta)
        # as far from the policy before as TRIRL's step: argmax E[toward] - (1 + eta) / eps KL
        wanted = world.per_action(toward * s.eps / (1 + s.eta)) + logp
        return toward, soft_optimal(wanted, world.moves, world.gamma)

    return {"TRIRL": trirl, "dual ascent": dual, "adversarial": adversarial}


class Learnt(NamedTuple):
    """The last reward [seeds, S] and log pi [seeds, S, A]; before each round and after the last,
    KL(rho_E || rho_pi) and the rank correlation with the true reward, [seeds, rounds + 1] each.
    """

    reward: Tensor
    logp: Tensor
    apart: Tensor
    order: Tensor


def learnt(world: Grid, step: Step, rounds: int, tick: Callable[[], None]) -> Learnt:
    """From a reward of 0 and its policy."""
    expert = world.visits(world.solved(world.true))
    reward = torch.zeros_like(world.true)
    logp = world.solved(reward)
    apart, order = [], []
    for at in range(rounds + 1):
        own = world.visits(logp)
        apart.append((expert * (expert / own).log()).sum(-1))
        # a reward that is the same everywhere orders nothing
        order.append((ranks(reward) * ranks(world.true)).mean(-1) * (reward.std(-1) > 0))
        if at < rounds:
            reward, logp = step(reward, logp, expert, own)
            tick()
    return Learnt(reward, logp, torch.stack(apart, 1), torch.stack(order, 1))


def run(settings: Settings, progress: Progress) -> Outcome:
    """One line for each way of learning the reward, over worlds."""
    world = grid(settings)
    jobs = {
        (name, beta): step
        for beta in (settings.beta, *settings.betas)
        for name, step in steps(world, settings, beta).items()
        if beta == settings.beta or name == "TRIRL"
    }
    favourite = world.solved(world.true).argmax(-1)
    expert = world.earned(one_hot(favourite, 4).to(world.true.dtype)).tolist()
    table: list[dict[str, str | float]] = [
        {
            "reward from": "none: the expert's favourite actions",
            "beta": "",
            "KL": "0",
            "rank": "",
            "earned elsewhere": str(mean_of(expert)),
        }
    ]
    apart, order, earned = {}, {}, {}
    with progress("Learning rewards", total=len(jobs) * settings.rounds, unit="rounds") as tick:
        done = itertools.count(1)
        for (name, beta), step in jobs.items():
            got = learnt(world, step, settings.rounds, lambda: tick(next(done)))
            worth = world.earned(world.greedy(got.reward)).tolist()
            if beta == settings.beta:
                apart[name], order[name] = got.apart.tolist(), got.order.tolist()
                earned[name] = worth
            table.append(
                {
                    "reward from": name,
                    "beta": "" if name == "dual ascent" else beta,
                    "KL": str(mean_of(got.apart[:, -1].tolist())),
                    "rank": str(mean_of(got.order[:, -1].tolist())),
                    "earned elsewhere": str(mean_of(worth)),
                }
            )
    rank = mean_of(last(order["TRIRL"]))
    ahead = differences(last(order["TRIRL"]), last(order["adversarial"]))
    abroad = differences(earned["TRIRL"], expert)
    rounds = range(settings.rounds + 1)
    return Outcome(
        claim=CLAIM,
        found=f"rank correlation with the true reward {rank}, {ahead} above adversarial "
        f"imitation's; under other dynamics its optimal policy earns {mean_of(earned['TRIRL'])} of "
        f"what can be earned, {abroad} more than the expert's favourite actions do there.",
        panels=[
            Curves("how far from the expert", "rounds", "KL(rho_E || rho_pi), nats", rounds, apart),
            Curves("order of rewards", "rounds", "rank correlation with the truth", rounds, order),
        ],
        table=table,
        holds=rank.low > 0.8 and ahead.low > 0,
    )

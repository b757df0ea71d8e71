"""HNPG: a natural policy gradient whose critic and whose states come from fresh and from stored
episodes alike.

    critic    Q_h, h = H-1 .. 0:  mean_on (Q_h(s, a) - G)^2
                                + lam mean_off (Q_h(s, a) - [r + Q_{h+1}(s', a')])^2,  a' ~ pi(.|s')
    actor     theta <- theta + eta w,  w = argmin mean (w . grad log pi(a|s) - A(s, a))^2  over the
              fresh and the stored states s, a ~ pi(.|s)
    A         fresh: GAE with V = E_pi Q; stored: Q(s, a) - V(s) of an action drawn from pi now

G is the return of a fresh episode; at the last step the target is r. Stored actions teach the
critic alone, they are never imitated. eta is TRPO's: a step of KL `max_kl`, then a line search.
lam = 0 without stored states is a natural policy gradient as usual.

Source: arXiv:2311.08384, on its combination lock with rich observations.

Departures: policy and critic of a step are linear in its observation, which tells the lock's states
apart, and the critic's least squares are solved at once (with a ridge), not by 30 steps of Adam.
Actions are discrete. A wrong action pays its lure at every step; the released lock computes it and
hands it out at the last step only. The lock steps all episodes at once in torch, so that no library
of environments is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from opdkit.neighbours.experiment import Experiment, Progress, counted
from opdkit.neighbours.outcome import Curves, Outcome, differences, mean_of

CLAIM = (
    "With stored episodes in critic and actor a natural policy gradient solves combination locks "
    "at which the on-policy one fails."
)
SOURCE = "arXiv:2311.08384"
NEEDS = ()

RIDGE = 1e-2  # of the critic; what a state tells it by is of size 1
SOLVER = 10  # steps of conjugate gradients, and halvings of the line search
ACCEPTED = 0.1  # of the expected improvement
END = 10  # iterations that count as the end of a run


@dataclass(frozen=True)
class Settings(Experiment):
    """Defaults are the paper's, but for the size of the stored set (its code: 50,000 episodes).

    Arguments:
        horizon: steps of an episode, one or a list, each a lock of its own.
        actions: of which one is right.
        iterations: of the algorithm.
        batch: fresh steps in an iteration; as many stored ones are drawn.
        stored: episodes of an expert that errs with probability 1 / horizon.
        lam: weight of the stored episodes in the critic.
        max_kl: of a step.
        damping: added to the Fisher matrix.
        tau: of generalised advantage estimates.
        noise: of observations.
    """

    horizon: tuple[int, ...] | int = (3, 10, 20)
    actions: int = 10
    iterations: int = 200
    batch: int = 1000
    stored: int = 5000
    lam: float = 1.0
    max_kl: float = 1e-2
    damping: float = 0.1
    tau: float = 0.97
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(*self.horizons, self.iterations, self.batch, self.stored) < 1 or self.actions < 2:
            raise ValueError(
                "horizon, iterations, batch and stored must be at least 1, actions at least 2"
            )
        if min(self.lam, self.damping, self.noise) < 0 or self.max_kl <= 0:
            raise ValueError("lam, damping and noise must not be negative, max_kl be above 0")

    @property
    def horizons(self) -> tuple[int, ...]:
        """All of them."""
        return (self.horizon,) if isinstance(self.horizon, int) else self.horizon


# --------------------------------------------------------------------------------- the mathematics


def critic_loss(
    q_on: Tensor, returns: Tensor, q_off: Tensor, targets: Tensor, lam: float
) -> Tensor:
    """[]: of fresh pairs [N] against returns, and of stored ones [M] against Bellman targets."""
    return (q_on - returns).square().mean() + lam * (q_off - targets).square().mean()


def least_squares(
    states: Tensor, actions: Tensor, targets: Tensor, weights: Tensor, count: int
) -> Tensor:
    """[D, A] of Q(s, a) = s . W[:, a], A = `count`: the least of sum_i weights_i (Q(s_i, a_i) -
    targets_i)^2 + RIDGE |W|^2, from states [N, D] and the rest [N].
    """
    columns = []
    for weight in (F.one_hot(actions, count) * weights[:, None]).T:  # of each action its own pairs
        moments = states.T @ (states * weight[:, None])
        moments.diagonal().add_(RIDGE)
        columns.append(torch.linalg.solve(moments, states.T @ (weight * targets)))
    return torch.stack(columns, 1)


def advantages(q: Tensor, probs: Tensor) -> Tensor:
    """[..., A]: Q less its mean under the policy, both [..., A]."""
    return q - (probs * q).sum(-1, keepdim=True)


def gae(rewards: Tensor, values: Tensor, tau: float) -> Tensor:
    """[H, N]: sum_k tau^k delta_{h + k}, delta_h = r_h + V_{h + 1} - V_h, from rewards and values
    [H, N] of whole episodes.
    """
    after = torch.cat([values[1:], torch.zeros_like(values[:1])])
    out, total = [], torch.zeros_like(values[0])
    for delta in (rewards + after - values).flip(0):
        total = delta + tau * total
        out.append(total)
    return torch.stack(out[::-1])


def gradient(states: Tensor, actions: Tensor, gain: Tensor, probs: Tensor) -> Tensor:
    """[H, D, A]: mean over N of gain grad log pi, of linear policies for states [H, N, D], actions
    and gain [H, N], probs [H, N, A].
    """
    score = (F.one_hot(actions, probs.shape[-1]) - probs) * gain[..., None]
    return states.mT @ score / states.shape[1]


def fisher_product(states: Tensor, probs: Tensor, v: Tensor, damping: float) -> Tensor:
    """[H, D, A]: (F + damping) v, F the mean over states of E_pi[score score'], without F."""
    return states.mT @ (probs * advantages(states @ v, probs)) / states.shape[1] + damping * v


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """[H, D, A]: x with product(x) = b [H, D, A], for each of the H apart."""
    x, residual, direction = torch.zeros_like(b), b, b
    size = _dot(b, b)
    for _ in range(steps):
        along = product(direction)
        curvature = _dot(direction, along)
        # where it is solved already there is no direction left: 0 / 0
        step = torch.where(size > 1e-20, size / curvature, 0.0)
        x, residual = x + step * direction, residual - step * along
        before, size = size, _dot(residual, residual)
        direction = residual + torch.where(before > 1e-20, size / before, 0.0) * direction
    return x


def natural_step(
    theta: Tensor, states: Tensor, actions: Tensor, gain: Tensor, settings: Settings
) -> Tensor:
    """[H, D, A]: parameters after TRPO's step, for each h apart, from states [H, N, D], actions and
    their advantages [H, N].
    """
    probs = (states @ theta).softmax(-1)
    slope = gradient(states, actions, gain, probs)

    def product(v: Tensor) -> Tensor:
        return fisher_product(states, probs, v, settings.damping)

    w = conjugate_gradient(product, slope, SOLVER)
    curvature = _dot(w, product(w)).clamp_min(1e-30)  # 0 where there is nothing to gain
    full = w * (2 * settings.max_kl / curvature).sqrt()
    expected = _dot(slope, full)

    def surrogate(at: Tensor) -> Tensor:
        ratio = (_log_prob(at, states, actions) - _log_prob(theta, states, actions)).exp()
        return ((ratio - 1) * gain).mean(1)[:, None, None]

    new, open_ = theta, torch.ones_like(expected, dtype=torch.bool)
    for halved in range(SOLVER):
        share = 0.5**halved
        better = surrogate(theta + share * full)
        good = open_ & (better > 0) & (better > ACCEPTED * share * expected)
        new = torch.where(good, theta + share * full, new)
        open_ = open_ & ~good
    return new


def _log_prob(theta: Tensor, states: Tensor, actions: Tensor) -> Tensor:
    return (states @ theta).log_softmax(-1).gather(-1, actions[..., None])[..., 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


# ----------------------------------------------------------------------------------------- the lock


@dataclass(frozen=True)
class Episodes:
    """Observations [H, N, D], actions [H, N], rewards [H, N] of N episodes."""

    states: Tensor
    actions: Tensor
    rewards: Tensor

    @property
    def returns(self) -> Tensor:
        """[H, N]: the rewards from each step on."""
        return self.rewards.flip(0).cumsum(0).flip(0)

    def drawn(self, count: int) -> Episodes:
        """So many of them, [H, count]."""
        rows = torch.randint(self.actions.shape[1], (count,))
        return Episodes(self.states[:, rows], self.actions[:, rows], self.rewards[:, rows])


class Lock:
    """A chain of steps with two good states and a bad one, which is never left.

    In a good state one action is right: it leads to either good state, by a coin; at the last step
    it pays 1. Any other leads to the bad state and pays 0.1, by a coin. Observations are state and
    step, each as a unit vector, with noise, turned by a Hadamard matrix.
    """

    LURE = 0.1

    def __init__(self, horizon: int, actions: int, noise: float):
        self.horizon, self.actions, self.noise = horizon, actions, noise
        self.right = torch.randint(actions, (horizon, 2))
        self.size = 2 ** math.ceil(math.log2(horizon + 3))
        turn = torch.ones(1, 1)
        while len(turn) < self.size:
            turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
        self.turn = turn

    def observe(self, state: Tensor, h: int) -> Tensor:
        """[N, D] of states [N]."""
        seen = torch.randn(len(state), self.size) * self.noise
        seen[torch.arange(len(state)), state] += 1
        seen[:, 3 + h] += 1
        return seen @ self.turn

    def step(self, state: Tensor, h: int, action: Tensor) -> tuple[Tensor, Tensor]:
        """States [N] and rewards [N] that follow."""
        good = state < 2
        right = good & (action == self.right[h, state.clamp_max(1)])
        coin = torch.randint(2, state.shape)
        last_one = 1.0 if h == self.horizon - 1 else 0.0
        reward = torch.where(right, last_one, torch.where(good, self.LURE * coin, 0.0))
        return torch.where(right, torch.randint(2, state.shape), 2), reward

    def play(self, count: int, act: Callable[[Tensor, Tensor, int], Tensor]) -> Episodes:
        """Whole episodes by actions [N] = act(observations [N, D], states [N], h)."""
        state = torch.randint(2, (count,))
        states, actions, rewards = [], [], []
        for h in range(self.horizon):
            states.append(self.observe(state, h))
            actions.append(act(states[-1], state, h))
            state, reward = self.step(state, h, actions[-1])
            rewards.append(reward)
        return Episodes(torch.stack(states), torch.stack(actions), torch.stack(rewards))

    def expert(self, count: int) -> Episodes:
        """Of the right actions, in one of `horizon` steps a random one."""

        def act(seen: Tensor, state: Tensor, h: int) -> Tensor:
            errs = torch.rand(count) < 1 / self.horizon
            right = self.right[h, state.clamp_max(1)]
            return torch.where(errs, torch.randint(self.actions, (count,)), right)

        return self.play(count, act)


# ------------------------------------------------------------------------------------ the algorithm


def drawn(theta: Tensor, states: Tensor) -> Tensor:
    """Actions [..., N] of linear policies [..., D, A] at states [..., N, D]."""
    return torch.distributions.Categorical(logits=states @ theta).sample()


def _act(theta: Tensor, seen: Tensor, state: Tensor, h: int) -> Tensor:
    return drawn(theta[h], seen)


def fit_critic(fresh: Episodes, stored: Episodes | None, theta: Tensor, lam: float) -> Tensor:
    """[H, D, A]: Q of each step, from the last to the first."""
    horizon, count = fresh.actions.shape
    weights: list[Tensor] = []
    for h in reversed(range(horizon)):
        states, actions, targets = fresh.states[h], fresh.actions[h], fresh.returns[h]
        weight = torch.full((count,), 1 / count)
        if stored is not None:
            bellman = stored.rewards[h]
            if weights:
                after = stored.states[h + 1]
                chosen = drawn(theta[h + 1], after)[:, None]
                bellman = bellman + (after @ weights[-1]).gather(1, chosen)[:, 0]
            states = torch.cat([states, stored.states[h]])
            actions = torch.cat([actions, stored.actions[h]])
            targets = torch.cat([targets, bellman])
            weight = torch.cat([weight, torch.full((len(bellman),), lam / len(bellman))])
        weights.append(least_squares(states, actions, targets, weight, theta.shape[-1]))
    return torch.stack(weights[::-1])


def iterate(theta: Tensor, fresh: Episodes, stored: Episodes | None, settings: Settings) -> Tensor:
    """[H, D, A]: policies after one iteration; without stored episodes the on-policy one."""
    critic = fit_critic(fresh, stored, theta, settings.lam)
    values = ((fresh.states @ theta).softmax(-1) * (fresh.states @ critic)).sum(-1)
    states, actions = fresh.states, fresh.actions
    gain = gae(fresh.rewards, values, settings.tau)
    if stored is not None:
        chosen = drawn(theta, stored.states)
        more = advantages(stored.states @ critic, (stored.states @ theta).softmax(-1))
        states = torch.cat([states, stored.states], 1)
        actions = torch.cat([actions, chosen], 1)
        gain = torch.cat([gain, more.gather(-1, chosen[..., None])[..., 0]], 1)
    return natural_step(theta, states, actions, gain, settings)


def learning_run(
    horizon: int, hybrid: bool, seed: int, settings: Settings, tick: Callable[[], None]
) -> list[float]:
    """The mean return of the policy before each iteration, on its fresh episodes."""
    torch.manual_seed(seed)
    lock = Lock(horizon, settings.actions, settings.noise)
    expert = lock.expert(settings.stored) if hybrid else None
    theta = torch.zeros(horizon, lock.size, settings.actions)
    episodes = max(1, settings.batch // horizon)
    returns = []
    for _ in range(settings.iterations):
        fresh = lock.play(episodes, partial(_act, theta))
        returns.append(float(fresh.returns[0].mean()))
        theta = iterate(theta, fresh, expert and expert.drawn(episodes), settings)
        tick()
    return returns


KINDS = {"HNPG": True, "on-policy": False}


def run(settings: Settings, progress: Progress) -> Outcome:
    """Both algorithms on locks of each horizon."""
    total = len(settings.horizons) * len(KINDS) * settings.seeds * settings.iterations
    panels, table, found, more = [], [], [], {}
    with counted(progress, "Learning", total, "iterations") as tick:
        for horizon in settings.horizons:
            lines = {
                kind: [
                    learning_run(horizon, hybrid, seed, settings, tick)
                    for seed in range(settings.seeds)
                ]
                for kind, hybrid in KINDS.items()
            }
            steps = horizon * max(1, settings.batch // horizon)
            x = [steps * i for i in range(settings.iterations)]
            panels.append(Curves(f"lock of {horizon} steps", "fresh steps", "return", x, lines))
            ends = {kind: [_end(line) for line in lines[kind]] for kind in KINDS}
            for kind in KINDS:
                told = {"horizon": str(horizon), "algorithm": kind}
                table.append(told | {"return at the end": str(mean_of(ends[kind]))})
            more[horizon] = differences(ends["HNPG"], ends["on-policy"])
            found.append(f"{horizon} steps: {more[horizon]}")
    text = f"HNPG's return less the on-policy one's at the end, by horizon: {'; '.join(found)}."
    # short locks open by chance to both: the claim is about those that do not
    return Outcome(CLAIM, text, panels, table, more[max(more)].low > 0)


def _end(returns: list[float]) -> float:
    """The mean over a run's last iterations."""
    tail = returns[-END:]
    return sum(tail) / len(tail)

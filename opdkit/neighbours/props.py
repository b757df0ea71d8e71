"""PROPS: collect with a policy that avoids what was collected already, so that a small sample shows
the policy it is for as it is.

    D             (state, action) pairs: the last batches, and what was collected since
    rho           = pi_b(a|s) / pi_s(a|s), at the pairs of D
    behaviour     pi_b <- pi_s, then descend  mean_D max(rho, clip(rho, 1 - eps, 1 + eps))
                                            + lam KL(pi_s || pi_b)
    policy        pi_s <- PPO on all of D as if pi_s had written it, no weight for pi_b
    sampling error = mean_D [log pi_MLE(a|s) - log pi_s(a|s)], pi_MLE fitted on D

Before every slice of a few steps pi_b starts anew from pi_s: PPO with the advantage -1 at every
action of D makes those rarer that D has too often.

Source: arXiv:2311.08290; policy, rollout buffer and PPO are those of stable-baselines3.

Departures: observations are not normalised, as statistics that move would change what is kept. The
divergence mean_D[(rho - 1) - log rho] is looked at before a step, not after an epoch, so that with
target_kl = 0 there is no step at all. Where observations are discrete pi_MLE is the table of
frequencies; elsewhere it is a copy of pi_s after `FIT` steps of Adam on the likelihood.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError, nearest
from opdkit.neighbours.experiment import Experiment, Progress, counted
from opdkit.neighbours.outcome import Curves, Mean, Outcome, area, differences, last, mean_of

CLAIM = (
    "A behaviour policy that avoids what was already sampled leaves less sampling error than "
    "on-policy sampling, and than keeping old data, at equal budget."
)
SOURCE = "arXiv:2311.08290"
NEEDS = ("gymnasium", "stable_baselines3")

FIT = 300  # steps of Adam, learning rate 1e-3, that fit pi_MLE: as the paper's code
POINTS = 12  # at which a learning run is looked at


@dataclass(frozen=True)
class Settings(Experiment):
    """Where not said otherwise defaults are the paper's.

    Arguments:
        env: tasks of gymnasium, one or a list.
        steps: of the task, in each learning run.
        frozen: samples of a policy that does not learn, in the first half of the experiment.
        batch: steps between two updates of the policy. Default: that of the paper's code for
            CartPole; for MuJoCo the paper takes 2048.
        batches: kept in the buffer.
        every: steps between two updates of the behaviour policy; null: 16, with continuous actions
            8.
        rate: Adam's learning rate, of both policies.
        epochs: of PPO over the buffer, four minibatches each.
        pushes: epochs of the behaviour policy.
        minibatches: of such an epoch; null: 4, with continuous actions 16.
        clip: eps of the behaviour policy.
        target_kl: its divergence from pi_s at which it stops; null: 0.01, with continuous actions
            0.1.
        lam: price of that divergence.
    """

    env: tuple[str, ...] | str = ("FrozenLake-v1", "FrozenLake8x8-v1", "CartPole-v1")
    steps: int = 3072
    frozen: int = 1024
    batch: int = 256
    batches: int = 2
    every: int | None = None
    rate: float = 1e-3
    epochs: int = 16
    pushes: int = 16
    minibatches: int | None = None
    clip: float = 0.3
    target_kl: float | None = None
    lam: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "frozen"):
            if getattr(self, name) < self.batch:
                raise ValueError(f"{name} must be at least batch={self.batch}: nothing is updated")
        for name in ("batch", "batches", "every", "epochs", "pushes", "minibatches"):
            if (getattr(self, name) or 1) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not 0 < self.clip < 1 or min(self.lam, self.target_kl or 0) < 0:
            raise ValueError("clip must be between 0 and 1, lam and target_kl not negative")


# --------------------------------------------------------------------------------- the mathematics


def behaviour_loss(log_b: Tensor, log_s: Tensor, clip: float, lam: float = 0.0) -> Tensor:
    """[]: mean max(rho, clip(rho)) + lam KL, from log-probs [N] of the pairs in D."""
    rho = (log_b - log_s).exp()
    loss = torch.maximum(rho, rho.clamp(1 - clip, 1 + clip)).mean()
    return loss + lam * divergence(log_b, log_s) if lam else loss


def divergence(log_b: Tensor, log_s: Tensor) -> Tensor:
    """[]: KL(pi_s || pi_b) estimated from log-probs [N] of what pi_s wrote: never negative."""
    return ((log_b - log_s).exp() - 1 - (log_b - log_s)).mean()


def sampling_error(log_mle: Tensor, log_s: Tensor) -> Tensor:
    """[] nats: how much better than pi_s the best policy explains D, from log-probs [N]."""
    return (log_mle - log_s).mean()


def log_frequencies(states: Tensor, actions: Tensor) -> Tensor:
    """[N]: log of the share that action [N] has among the actions in its state [N]."""
    counts = torch.zeros(int(states.max()) + 1, int(actions.max()) + 1, dtype=torch.float64)
    counts.index_put_((states, actions), torch.ones(1, dtype=torch.float64), accumulate=True)
    return (counts[states, actions] / counts.sum(1)[states]).log()


def avoid(
    optimizer: torch.optim.Optimizer,
    log_prob: Callable[[Tensor], Tensor],
    log_s: Tensor,
    settings: Settings,
) -> int:
    """Updates the behaviour policy; the steps that it took.

    Arguments:
        optimizer: of its parameters, which are those of pi_s.
        log_prob: its log-probs [n] at rows [n] of D, with gradient.
        log_s: log-probs [N] under pi_s.
    """
    assert settings.minibatches is not None and settings.target_kl is not None
    taken = 0
    for _ in range(settings.pushes):
        for rows in torch.randperm(len(log_s)).chunk(settings.minibatches):
            log_b = log_prob(rows)
            if divergence(log_b.detach(), log_s[rows]) >= settings.target_kl:
                return taken
            optimizer.zero_grad()
            behaviour_loss(log_b, log_s[rows], settings.clip, settings.lam).backward()
            optimizer.step()
            taken += 1
    return taken


# ------------------------------------------------------------------------------------- the sampling


@dataclass(frozen=True)
class Step:
    """One step of a task, its arrays [1, ...] as stable-baselines3 gives them."""

    state: Any
    action: Any
    reward: Any
    start: Any  # whether an episode begins here
    cut: Any = None  # the state in which the episode was cut short by its time limit


class Sampler:
    """A task, the policy for it, and the steps that are kept: D.

    Arguments:
        batches: kept.
        pushed: whether PROPS collects, or the policy itself.
    """

    def __init__(self, env: str, seed: int, settings: Settings, batches: int, pushed: bool):
        self.model, self.settings = _model(env, seed, settings)
        self.policy, self.world = self.model.policy, self.model.get_env()
        self.kept: deque[Step] = deque(maxlen=batches * settings.batch)
        self.behaviour = deepcopy(self.policy)
        # as the paper's code it keeps its moments when the policy starts anew
        self.optimizer = torch.optim.Adam(
            actor(self.behaviour), lr=settings.rate, eps=1e-5, fused=True
        )
        self.pushed = pushed
        self.state, self.start = self.world.reset(), [True]
        self.returns: list[float] = []  # of the episodes that have ended

    def collect(self) -> None:
        """One batch of steps."""
        every = self.settings.every if self.pushed else self.settings.batch
        assert every is not None
        for at in range(self.settings.batch):
            if at % every == 0:
                self.behaviour.load_state_dict(self.policy.state_dict())
                if self.pushed and self.kept:
                    self._push()
            self._step()

    def _push(self) -> None:
        states, actions = self.tensors()
        with torch.no_grad():
            log_s = log_prob(self.policy, states, actions)
        avoid(
            self.optimizer,
            lambda rows: log_prob(self.behaviour, states[rows], actions[rows]),
            log_s,
            self.settings,
        )

    def _step(self) -> None:
        with torch.no_grad():
            state, _ = self.policy.obs_to_tensor(self.state)
            action = self.behaviour.get_distribution(state).sample().numpy()
        space = self.model.action_space
        taken = action.clip(space.low, space.high) if hasattr(space, "low") else action
        after, reward, done, [info] = self.world.step(taken)
        cut = info["terminal_observation"] if info.get("TimeLimit.truncated") else None
        self.kept.append(Step(self.state, action, reward, self.start, cut))
        self.state, self.start = after, done
        if "episode" in info:
            self.returns.append(float(info["episode"]["r"]))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """States [N, ...] and actions [N, ...] of D."""
        states = torch.cat([self.policy.obs_to_tensor(step.state)[0] for step in self.kept])
        return states, torch.cat([torch.as_tensor(step.action) for step in self.kept])

    def error(self) -> float:
        """The sampling error of D."""
        states, actions = self.tensors()
        with torch.no_grad():
            log_s = log_prob(self.policy, states, actions)
        if hasattr(self.model.observation_space, "n"):
            log_mle = log_frequencies(states.long(), actions)
        else:
            log_mle = _fitted(self.policy, states, actions)
        return float(sampling_error(log_mle, log_s))

    def learn(self) -> None:
        """PPO's update on all of D."""
        from stable_baselines3.common.buffers import RolloutBuffer

        model, policy = self.model, self.policy
        buffer = RolloutBuffer(
            len(self.kept),
            model.observation_space,
            model.action_space,
            model.device,
            model.gae_lambda,
            model.gamma,
        )
        with torch.no_grad():
            values, log_probs, _ = policy.evaluate_actions(*self.tensors())
            for row, step in enumerate(self.kept):
                reward = step.reward
                if step.cut is not None:  # what it would have got beyond the time limit
                    beyond = policy.predict_values(policy.obs_to_tensor(step.cut)[0])
                    reward = reward + model.gamma * beyond.numpy()[0]
                buffer.add(
                    step.state,
                    step.action,
                    reward,
                    step.start,
                    values[row],
                    log_probs[row : row + 1],
                )
            last_values = policy.predict_values(policy.obs_to_tensor(self.state)[0])
        buffer.compute_returns_and_advantage(last_values, self.start)
        model.rollout_buffer, model.batch_size = buffer, max(2, len(self.kept) // 4)
        model.train()


def log_prob(policy: Any, states: Tensor, actions: Tensor) -> Tensor:
    """[N] of states [N, ...] and actions [N, ...] under a policy of stable-baselines3."""
    return policy.get_distribution(states).log_prob(actions)


def actor(policy: Any) -> list[torch.nn.Parameter]:
    """The parameters of which actions depend, not those of values alone."""
    return [p for name, p in policy.named_parameters() if "value" not in name]


def _fitted(policy: Any, states: Tensor, actions: Tensor) -> Tensor:
    """[N] log-probs under the policy of greatest likelihood."""
    best = deepcopy(policy)
    optimizer = torch.optim.Adam(actor(best), lr=1e-3, fused=True)
    for _ in range(FIT):
        optimizer.zero_grad()
        (-log_prob(best, states, actions).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        return log_prob(best, states, actions)


def _model(env: str, seed: int, settings: Settings) -> tuple[Any, Settings]:
    """A new PPO for a task, and settings with what depends on its actions filled in."""
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import configure

    try:
        world = gymnasium.make(env)
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(
            f"env={env!r} cannot be made ({error}){nearest(env, list(gymnasium.registry))}: give "
            "the name of a task that gymnasium has"
        ) from None
    model = PPO(
        "MlpPolicy",
        world,
        learning_rate=settings.rate,
        n_steps=settings.batch,
        n_epochs=settings.epochs,
        batch_size=settings.batch,
        target_kl=0.03,
        seed=seed,
        device="cpu",
    )
    model.set_logger(configure(None, []))
    every, minibatches, target = (16, 4, 0.01) if hasattr(world.action_space, "n") else (8, 16, 0.1)
    return model, replace(
        settings,
        every=settings.every or every,
        minibatches=settings.minibatches or minibatches,
        target_kl=target if settings.target_kl is None else settings.target_kl,
    )


# ----------------------------------------------------------------------------------- the experiment

KINDS = {  # name: whether old batches are kept, whether PROPS collects
    "on-policy": (False, False),
    "on-policy, old batches kept": (True, False),
    "PROPS, old batches kept": (True, True),
}


def frozen_run(
    env: str, pushed: bool, seed: int, settings: Settings, tick: Callable[[], None]
) -> list[float]:
    """The sampling error of all that was collected, after each batch, with the first policy."""
    batches = settings.frozen // settings.batch
    sampler = Sampler(env, seed, settings, batches, pushed)
    errors = []
    for _ in range(batches):
        sampler.collect()
        errors.append(sampler.error())
        tick()
    return errors


def learning_run(
    env: str, kind: str, seed: int, settings: Settings, tick: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Sampling errors of D before the update, and returns of the episodes that ended since the
    last look, at `POINTS` points.
    """
    kept, pushed = KINDS[kind]
    sampler = Sampler(env, seed, settings, settings.batches if kept else 1, pushed)
    errors: list[float] = []
    returns: list[float] = []
    looks = set(looked_at(settings))
    for update in range(1, settings.steps // settings.batch + 1):
        sampler.collect()
        if update in looks:
            errors.append(sampler.error())
            ended = sampler.returns or [returns[-1] if returns else 0.0]
            returns.append(sum(ended) / len(ended))
            sampler.returns = []
        sampler.learn()
        tick()
    return errors, returns


def looked_at(settings: Settings) -> list[int]:
    """Updates before which a learning run is looked at: evenly spaced, the last among them."""
    updates = settings.steps // settings.batch
    points = min(POINTS, updates)
    return [round((i + 1) * updates / points) for i in range(points)]


def run(settings: Settings, progress: Progress) -> Outcome:
    """Both halves of the experiment, for each task."""
    envs = (settings.env,) if isinstance(settings.env, str) else settings.env
    batches = len(envs) * settings.seeds
    batches *= 2 * (settings.frozen // settings.batch) + 3 * (settings.steps // settings.batch)
    with counted(progress, "Sampling", batches, "batches") as tick:
        seen = {env: list(_panels(env, settings, tick)) for env in envs}
    found = [_found(env, panels) for env, panels in seen.items()]
    return Outcome(
        CLAIM,
        " ".join(text for text, _ in found),
        [panel for panels in seen.values() for panel in panels],
        [row for env, panels in seen.items() for row in _rows(env, panels)],
        all(holds for _, holds in found),
    )


def _panels(env: str, settings: Settings, tick: Callable[[], None]) -> Iterator[Curves]:
    seeds = range(settings.seeds)
    frozen = {
        kind: [frozen_run(env, pushed, seed, settings, tick) for seed in seeds]
        for kind, (kept, pushed) in KINDS.items()
        if kept
    }
    x = [settings.batch * (i + 1) for i in range(settings.frozen // settings.batch)]
    yield Curves(f"{env}: policy frozen", "samples", "sampling error (nats)", x, frozen, log=True)
    learnt = {
        kind: [learning_run(env, kind, seed, settings, tick) for seed in seeds] for kind in KINDS
    }
    x = [settings.batch * update for update in looked_at(settings)]
    for at, (title, y) in enumerate(
        (("sampling error", "sampling error (nats)"), ("return", "return of episodes"))
    ):
        lines = {kind: [run[at] for run in runs] for kind, runs in learnt.items()}
        yield Curves(f"{env}: {title} while learning", "steps", y, x, lines)


def _rows(env: str, panels: list[Curves]) -> Iterator[dict[str, str]]:
    """The table's rows of one task, from its three panels."""
    frozen, errors, returns = panels
    for kind in KINDS:
        alone = frozen.lines.get(kind)
        yield {
            "task": env,
            "sampling": kind,
            "error, frozen": str(mean_of(last(alone))) if alone else "",
            "error, learning": str(mean_of(area(errors.lines[kind]))),
            "return at the end": str(mean_of(last(returns.lines[kind]))),
        }


def _found(env: str, panels: list[Curves]) -> tuple[str, bool]:
    """What was seen in one task, and whether it is the claim."""
    frozen, errors = panels[0].lines, panels[1].lines
    kept, pushed = "on-policy, old batches kept", "PROPS, old batches kept"
    ours = area(errors[pushed])
    less: dict[str, Mean] = {
        f"of a frozen policy after {panels[0].x[-1]} samples": differences(
            last(frozen[pushed]), last(frozen[kept])
        ),
        "while learning, to on-policy": differences(ours, area(errors["on-policy"])),
        "to the same buffer": differences(ours, area(errors[kept])),
    }
    parts = ", ".join(f"{where} {mean}" for where, mean in less.items())
    return f"{env}: PROPS' sampling error less the other's: {parts}.", all(
        mean.high < 0 for mean in less.values()
    )

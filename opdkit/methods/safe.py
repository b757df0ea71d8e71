"""SAFE: PPO with a pessimistic critic, and a KL penalty that a controller opens above a moving
threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from opdkit.methods.arguments import positive
from opdkit.objective import (
    Around,
    Batch,
    Clipped,
    Companion,
    CompanionState,
    Entropy,
    EntropyBonus,
    Estimator,
    LastToken,
    Live,
    LogRatio,
    Objective,
    Reward,
    RowMean,
    Signal,
    Stepped,
    TokenLoss,
    Trained,
    Value,
)
from opdkit.objective.maths import deviations, masked_mean

# --------------------------------------------------------------------------------------- the critic


def soft_min(values: Tensor, a: float) -> Tensor:
    """[n, 1] between the least and the mean of values [n, K]: -a (logsumexp(-v / a) - log K)."""
    total = torch.logsumexp(-values / a, 1, keepdim=True)
    return -a * (total - math.log(values.shape[1]))


class Twins(nn.Module):
    """[n, 1]: the soft minimum of two heads of two layers on normed hidden states [n, H]."""

    def __init__(self, width: int, a: float):
        super().__init__()
        self.norm, self.a = nn.LayerNorm(width), a
        pair = [
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)) for _ in range(2)
        ]
        self.heads = nn.ModuleList(pair)

    def forward(self, hidden: Tensor) -> Tensor:  # [n, 1] from [n, H]
        normed = self.norm(hidden)
        return soft_min(torch.cat([head(normed) for head in self.heads], 1), self.a)


@dataclass(frozen=True)
class TwinHead(Companion):
    """A pessimistic critic, with an AdamW of its own."""

    a: float = 0.3
    learning_rate: float = 1e-5
    max_norm: float = 0.5

    def build(self, around: Around) -> Trained:
        module = Twins(around.width("student"), self.a).to(around.device, around.dtype)
        return Trained(module, self.learning_rate, self.max_norm)


@dataclass(frozen=True)
class TwinLoss(TokenLoss):
    """(Huber(V, target) + Huber(V_old + clip(V - V_old, +-most), target)) / 2, [n], V_old the
    value before the step; learnt by the critic alone.
    """

    target: Signal
    head: Companion
    delta: float = 0.5
    most: float = 0.2
    name: ClassVar[str] = "value"

    def value(self, live: Live) -> Tensor:  # [n]
        v, old = live.companion(self.head)(live.hidden.detach())[:, 0], live.pick(Value(self.head))
        near, target = old + (v - old).clamp(-self.most, self.most), live.pick(self.target)
        both = (huber_loss(x, target, reduction="none", delta=self.delta) for x in (v, near))
        return sum(both, torch.zeros_like(v)) / 2


@dataclass(frozen=True)
class Standard(Signal):
    """[B, 1]: (of - mean) / (population std + 1e-6) over the rollouts of the step that train."""

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        rows = batch.mask.any(1, keepdim=True)
        centred = deviations(self.of(batch).to(batch.dtype), rows)
        return centred / (masked_mean(centred.square(), rows).sqrt() + 1e-6)


# ----------------------------------------------------------------------------------- the controller

WARMUP, CLIMBING, PLATEAU, CONVERGED = 1.5, 1.2, 0.8, 1.0  # factors of the threshold
SHARE = 0.1  # of an optimiser step's KL in its fast average
STRENGTH = 0.1  # of the penalty


@dataclass(frozen=True)
class Standing:
    """The numbers of the controller between two optimiser steps."""

    kl: float = 0.0  # fast average
    kl_long: float = 0.0  # slow one, which is only recorded
    level: float | None = None  # average of the reward; None before the first
    integral: float = 0.0
    error: float = 0.0
    steer: float = 0.0  # what the PID adds to tau0
    rewards: tuple[float, ...] = ()  # of the last 100 optimiser steps

    def after(self, kl: float, reward: float, gains: tuple[float, float, float]) -> Standing:
        """After an optimiser step with this mean KL and reward."""
        kl, kl_long = (1 - SHARE) * self.kl + SHARE * kl, 0.99 * self.kl_long + 0.01 * kl
        now = replace(self, kl=kl, kl_long=kl_long, rewards=(*self.rewards, reward)[-100:])
        if self.level is None:
            return replace(now, level=reward)
        level = 0.95 * self.level + 0.05 * reward
        error = level - self.level - 0.001
        integral = min(max(self.integral + error, -1.0), 1.0)
        kp, ki, kd = gains
        steer = kp * error + ki * integral + kd * (error - self.error)
        return replace(now, level=level, error=error, integral=integral, steer=steer)

    @property
    def phase(self) -> float:
        """The threshold's factor, from the rewards: the last 50 against the 50 before them, where
        there are so many.
        """
        if len(self.rewards) < 50:
            return WARMUP
        last = torch.tensor(self.rewards[-50:], dtype=torch.float64)
        before = torch.tensor(self.rewards, dtype=torch.float64)[:50]
        if len(self.rewards) == 100 and last.mean() > before.mean() + 0.01:
            return CLIMBING
        settled = last.std(correction=0) < 0.02 and last.mean() > 0.7
        return CONVERGED if settled else PLATEAU

    def threshold(self, tau0: float) -> float:
        """tau: the KL above which the penalty opens, nats per token."""
        return min(max((tau0 + self.steer) * self.phase, 0.1), 0.6)


@dataclass(frozen=True)
class Controller(Companion):
    """Sets the threshold of the KL penalty from how the reward goes, and its strength from the
    entropy.
    """

    tau0: float = 0.3
    floor: float = 2.0
    gains: tuple[float, float, float] = (0.3, 0.01, 0.05)

    def build(self, around: Around) -> Control:
        return Control(self)

    def gate(self, entropy: float) -> float:
        """The factor of the penalty at a mean entropy, nats per token."""
        return max(0.5, self.floor / (entropy + 0.1))

    def penalty(self, standing: Standing, entropy: float) -> tuple[float, float]:
        """P, and its slope in the fast average of the KL."""
        over = max(standing.kl - standing.threshold(self.tau0), 0.0)
        strength = STRENGTH * self.gate(entropy)
        return strength * over**2, 2 * strength * over

    def reads(self, batch: Batch, standing: Standing) -> tuple[Standing, float]:
        """Where it stands once it has seen the step's rollouts, and their mean entropy; where it
        stood if none of them trains.
        """
        rows = batch.mask.any(1, keepdim=True)
        if not bool(rows.any()):
            return standing, 0.0
        kl = masked_mean(LogRatio("live", "reference")(batch), batch.mask).item()
        entropy = masked_mean(Entropy("live")(batch), batch.mask).item()
        reward = masked_mean(Reward()(batch), rows).item()
        return standing.after(kl, reward, self.gains), entropy


class Control(CompanionState):
    """Where the controller stands."""

    def __init__(self, controller: Controller):
        self.controller, self.standing, self.paid = controller, Standing(), 0.0

    def after_step(self, stepped: Stepped) -> None:
        self.standing, entropy = self.controller.reads(stepped.batch, self.standing)
        self.paid, _ = self.controller.penalty(self.standing, entropy)

    def metrics(self) -> dict[str, float]:
        """The averages of the KL, the threshold and its phase, the penalty."""
        now = self.standing
        return {
            "kl": now.kl,
            "kl_long": now.kl_long,
            "threshold": now.threshold(self.controller.tau0),
            "phase": now.phase,
            "penalty": self.paid,
        }

    def state_dict(self) -> Mapping[str, Any]:
        return asdict(self.standing) | {"rewards": list(self.standing.rewards), "paid": self.paid}

    def load_state_dict(self, state: Any) -> None:
        numbers = {name: value for name, value in state.items() if name != "paid"}
        self.standing = Standing(**{**numbers, "rewards": tuple(numbers["rewards"])})
        self.paid = state["paid"]


@dataclass(frozen=True)
class Pull(Signal):
    """[1, 1]: dP / d k_short, the controller having seen the student as it is now, times the share
    of k that is in k_short.
    """

    controller: Controller
    share: float

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        before = batch.companion(self.controller).standing
        _, slope = self.controller.penalty(*self.controller.reads(batch, before))
        return torch.full((1, 1), self.share * slope, dtype=batch.dtype, device=batch.device)


def safe(
    tau0: float = 0.3,
    floor: float = 2.0,
    kp: float = 0.3,
    ki: float = 0.01,
    kd: float = 0.05,
    share: float = SHARE,
    critic_learning_rate: float = 1e-5,
) -> Objective:
    """SAFE: PPO with a pessimistic critic and a KL penalty that opens only above a threshold, which
    a controller moves by how the reward goes, and which weighs more where entropy is low.

        V   = -a (logsumexp(-V_1/a, -V_2/a) - log 2), a = 0.3, two heads on LayerNorm(hidden state)
        A   = standard(standard(R) - V before the step): one number per rollout; clip 0.2
        L_V = (Huber(V, standard(R)) + Huber(V_old + clip(V - V_old, 0.2), standard(R))) / 2
        k_short <- 0.9 k_short + 0.1 k,   k = mean over tokens of log pi_s - log pi_ref
        tau = clip((tau0 + PID of the velocity of the reward) * phase, 0.1, 0.6)
        P   = max(0.5, floor / (H + 0.1)) * 0.1 (k_short - tau)^2 where k_short > tau
        L   = PPO + L_V / 2 + dP/dk_short * share * k - 0.01 H;   per tokens, L_V over rollouts

    standard(x) = (x - mean) / (std + 1e-6) over the rollouts of the step. Phases of the threshold,
    from the mean rewards of optimiser steps: 1.5 for the first 50, 1.2 while the last 50 are above
    the 50 before, 1.0 once they are steady above 0.7, else 0.8. The controller sees the student as
    it is at each optimiser step, and moves once for each.

    Source: arXiv 2602.04651 and its code. Departures: in the released trainers the KL enters P as a
    plain number, so that P has no gradient and does nothing; here its derivative is the coefficient
    of k, whose value is a mean log-ratio and whose gradient is that of KL(student || reference).
    There the value loss also reaches the student; here it moves the heads alone. V is read at the
    state that predicts the last token, not behind it. The paper trains both at 1e-5, in two passes
    (`optim.passes`). Not offered: the preview of a step's KL and the averaged critic, unused there.

    Arguments:
        tau0: KL at which the penalty opens before the controller moves it, nats per token; above 0.
            Default: the paper's.
        floor: entropy below which the penalty is stronger than its plain form, nats per token,
            above 0. Default: the paper's.
        kp: gain on the velocity of the reward's average, less 0.001. Default: the paper's.
        ki: gain on its sum, which is kept in [-1, 1]. Default: the paper's.
        kd: gain on its change. Default: the paper's.
        share: what a step's KL moves k_short by, in the coefficient; above 0: 0.1 is P's own
            derivative, 1 as if k_short were k. Default: P's own.
        critic_learning_rate: of the two heads, above 0. Default: the paper's.
    """
    positive(
        tau0=(tau0, "it is the KL at which the penalty opens"),
        floor=(floor, "it is the entropy below which the penalty grows"),
        share=(share, "at 0 the penalty would have no gradient"),
        critic_learning_rate=(critic_learning_rate, "at 0 the critic learns nothing"),
    )
    head = TwinHead(learning_rate=critic_learning_rate)
    controller = Controller(tau0, floor, (kp, ki, kd))
    worth = Standard(Reward())
    critic = TwinLoss(worth, head).per("own") * LastToken()
    return Objective(
        Clipped(Standard(worth - RowMean(Value(head), among=LastToken())), 0.2, 0.2),
        critic * 0.5,
        Estimator("k1+", "reference") * Pull(controller, share),
        EntropyBonus() * 0.01,
    )

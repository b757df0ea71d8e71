"""RECAP: several rewards, weighed anew at every step by how they have lately gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.curricula import Memory, RewardMeans
from opdkit.methods.arguments import one_of, positive
from opdkit.methods.method import Method
from opdkit.objective import Advantage, Batch, Clipped, Objective, Signal

LEAST = 1e-15  # is added to what is divided by, as in the released code
ANNEALED = -1.0  # as `mix`


@dataclass(frozen=True)
class Balance(RewardMeans):
    """Every prompt as it is; the weights of rewards come from their means over the last steps."""

    temperature: float = 5.0
    mix: float = 0.5
    form: str = "code"

    def metrics(
        self, rollouts: Any, step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        weights = self.weights(sorted(memory.get("reward_means", {})), step, total_steps, memory)
        return {f"weight_{name}": w for name, w in weights.items()}

    def weights(
        self, names: Sequence[str], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        """The weight of each of these rewards; their mean is 1."""
        known = memory.get("reward_means", {})
        every = [_doubles(known.get(name, [])) for name in names]
        if self.form == "paper":
            said = _doubles([sum(paper_score(1 - h)) for h in every])
            shares = (said / self.temperature).softmax(0)
        else:
            mix = 1 - step / total_steps if self.mix == ANNEALED else self.mix
            progress, volatility = _doubles([code_score(h) for h in every]).view(-1, 2).T
            shares = mix * (progress / self.temperature).softmax(0)
            shares = shares + (1 - mix) * (volatility / self.temperature).softmax(0)
        return dict(zip(names, (len(names) * shares).tolist()))


def _doubles(values: Any) -> Tensor:
    """[...] float64."""
    return torch.tensor(values, dtype=torch.float64)


def code_score(history: Tensor) -> tuple[float, float]:
    """How little the rewards [n] of n steps have grown, sum of the old half / sum of the new one,
    and how they vary, population std / mean; 1 and 0 of fewer than two.
    """
    half = len(history) // 2
    if not half:
        return 1.0, 0.0
    grown = history[:half].sum() / (history[-half:].sum() + LEAST)
    return grown.item(), (history.std(correction=0) / (history.mean() + LEAST)).item()


def paper_score(losses: Tensor) -> tuple[float, float]:
    """How little the losses [n] of n steps have fallen, mean of the new half / mean of the old one,
    and how the new ones vary, population std / both means; 1 and 0 of fewer than two.
    """
    half = len(losses) // 2
    if not half:
        return 1.0, 0.0
    old, new = losses[:half].mean(), losses[-half:]
    fallen = new.mean() / (old + LEAST)
    return fallen.item(), (new.std(correction=0) / (new.mean() + old + LEAST)).item()


@dataclass(frozen=True)
class Reweighed(Signal):
    """[B, 1]: the sum of those rewards with names that apply to a rollout, each times its weight;
    where there are none with names, the reward.
    """

    balance: Balance

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        reward, named = batch.reward.to(batch.dtype), batch.rewards
        if not named:
            return reward[:, None]
        names = sorted({*named, *batch.memory.get("reward_means", {})})
        weights = self.balance.weights(names, batch.step, batch.total_steps, batch.memory)
        return torch.stack([weights[name] * x for name, x in named.items()]).nansum(0)[:, None]


def recap(
    window: int = 10, temperature: float = 5.0, mix: float = 0.5, form: str = "code"
) -> Method:
    """RECAP: of several rewards, those that have stopped growing or that swing count more, so that
    easy ones (format) do not drown the others, nor the domain that is trained those replayed beside
    it.

        h_k = means of reward k over the last 2W steps, O its older half, N its newer one
        form "code"   c_k = sum O / sum N,     i_k = std(h_k) / mean(h_k)
                      w_k = K (mix softmax_k(c / T) + (1 - mix) softmax_k(i / T))
        form "paper"  of 1 - h_k: c_k = mean N / mean O,  i_k = std(N) / (mean N + mean O)
                      w_k = K softmax_k((c + i) / T)
        r = sum of w_k R_k over the rewards that apply to a rollout; then GRPO:
        A = (r - mean) / (std + 1e-6), clip 0.2, mean over each rollout's tokens, then over rollouts

    It weighs the rewards that a run gives names, `reward: {accuracy: math, format: ...}`; the run's
    `reward_weights` are passed over. Where a run has one reward without a name its weight is 1, and
    this is `grpo`. The weights of a step come from the steps before it; a reward seen in fewer than
    two of them has c = 1 and i = 0. General data is replayed as rows of the data, each scored by
    the rewards that apply to it.

    Source: arXiv 2510.21978 and its code. Departures: the standard deviation is the sample one plus
    1e-6, as everywhere (the code adds 1e-4). Where sources disagree: the code mixes two softmaxes,
    the paper has one of a sum. Not offered: the likelihood of reference responses as one more
    objective with a weight of its own, and the reference penalty of the paper's baseline.

    Arguments:
        window: W, half the number of steps that are remembered, at least 1. Default: the paper's.
        temperature: T of the softmaxes, above 0: the lower, the further the weights part. Default:
            the paper's, at which they stay within a few percent of 1.
        mix: share of c_k against i_k with form="code", in [0, 1], or -1: falls from 1 to 0 over the
            run. Default: the code's.
        form: "code" or "paper"; the latter takes 1 - reward as a loss, so that rewards should be at
            most 1. Default: what was run.
    """
    one_of(form=(form, ("code", "paper")))
    positive(
        window=(window, "it is half the number of steps that are remembered"),
        temperature=(temperature, "it divides what the softmax is taken of"),
    )
    if not (0 <= mix <= 1 or mix == ANNEALED):
        raise ValueError(f"mix={mix} must lie in [0, 1], or be -1: it then falls over the run")
    balance = Balance(window, temperature, mix, form)
    policy = Clipped(Advantage(of=Reweighed(balance)), 0.2, 0.2)
    return Method(Objective(policy.per("rows")), curriculum=balance)

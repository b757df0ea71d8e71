"""A loss over pairs of rollouts of one's own: of two answers to a question, the better one is to be
the more probable.

opdkit check examples/own_pair_loss.py:pairs
opdkit train --recipe gsm8k --method examples/own_pair_loss.py:pairs sampling.num_generations=4
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from opdkit.objective import Objective, RolloutLoss


@dataclass(frozen=True)
class Pairs(RolloutLoss):
    """[R]: -log sigmoid(beta (s_better - s_worse)), summed over those that a rollout is better
    than, s the mean log-prob of its tokens, nats.
    """

    beta: float = 2.0

    def value(self, logp, mask, rows, batch):
        score = self.beta * torch.where(mask, logp, 0.0).sum(1) / mask.sum(1)
        reward, group = batch.reward[rows], batch.group[rows]
        better = (group[:, None] == group) & (reward[:, None] > reward)
        return torch.where(better, -logsigmoid(score[:, None] - score), 0.0).sum(1)


def pairs(beta: float = 2.0) -> Objective:
    """Pairs: rewards decide within a question which answers are to gain on which."""
    return Objective(Pairs(beta))

"""A loss over groups of rollouts of one's own: how the student ranks its answers to a question is
to be how the reward ranks them.

opdkit check examples/own_group_loss.py:listwise
opdkit train --recipe gsm8k --method examples/own_group_loss.py:listwise sampling.num_generations=4
"""

from dataclasses import dataclass

import torch

from opdkit.objective import Objective, RolloutLoss


@dataclass(frozen=True)
class Listwise(RolloutLoss):
    """[R]: what a rollout adds to the cross-entropy between softmax(reward / tau) and
    softmax(log-prob) over the rollouts of its question, nats.
    """

    tau: float = 0.5

    def value(self, logp, mask, rows, batch):
        score = torch.where(mask, logp, 0.0).sum(1)
        group = batch.group[rows]
        apart = torch.where(group[:, None] == group, 0.0, -torch.inf)  # [R, R]
        ranked = score - torch.logsumexp(score + apart, 1)
        wanted = torch.softmax(batch.reward[rows] / self.tau + apart, 1).diagonal()
        return -wanted * ranked


def listwise(tau: float = 0.5) -> Objective:
    """Listwise: the whole ranking of a question's answers at once."""
    return Objective(Listwise(tau))

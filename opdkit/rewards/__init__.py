"""Rewards: what a rollout is worth, 1 for right and 0 for wrong by convention."""

from opdkit.rewards.named import Named
from opdkit.rewards.score import Reward, load_reward, score

__all__ = ["Named", "Reward", "load_reward", "score"]

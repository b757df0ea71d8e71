"""Rewards: what a rollout is worth, 1 for right and 0 for wrong by convention."""

from opdkit.rewards.score import Reward, load_reward, score

__all__ = ["Reward", "load_reward", "score"]

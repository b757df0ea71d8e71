"""Who writes the responses: samplers turn prompts into rollouts."""

from opdkit.sampling.hf import Guide, HFSampler

__all__ = ["Guide", "HFSampler"]

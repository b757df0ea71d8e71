"""Who writes the responses: samplers turn prompts into rollouts."""

from opdkit.sampling.hf import HFSampler

__all__ = ["HFSampler"]

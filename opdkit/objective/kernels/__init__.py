"""The arithmetic over whole vocabularies: softmax statistics, log-probs and divergences of [n, V]
logits, with their gradients.
"""

from opdkit.objective.kernels.formula import divergence_on_support
from opdkit.objective.kernels.vocabulary import Vocabulary, divergence

__all__ = ["Vocabulary", "divergence", "divergence_on_support"]

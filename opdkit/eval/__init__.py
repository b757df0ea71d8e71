"""Evaluation: a model's answers scored, with confidence intervals over problems."""

from opdkit.eval.evaluate import EvalResult, evaluate_model
from opdkit.eval.stats import Estimate, Interval, avg_at_k, bootstrap, paired_difference, pass_at_k

__all__ = [
    "Estimate",
    "EvalResult",
    "Interval",
    "avg_at_k",
    "bootstrap",
    "evaluate_model",
    "paired_difference",
    "pass_at_k",
]

"""What is noted on rollouts before teachers score them: spans, debates, skills."""

from opdkit.annotators.base import AnnotateContext, Annotator

__all__ = ["AnnotateContext", "Annotator"]

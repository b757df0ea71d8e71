"""What is noted on rollouts before teachers score them: spans, debates, skills."""

from opdkit.annotators.base import AnnotateContext, Annotator
from opdkit.annotators.kinds import KINDS, annotator_of, annotators_of
from opdkit.annotators.settings import AnnotatorContext, AnnotatorSettings

__all__ = [
    "KINDS",
    "AnnotateContext",
    "Annotator",
    "AnnotatorContext",
    "AnnotatorSettings",
    "annotator_of",
    "annotators_of",
]

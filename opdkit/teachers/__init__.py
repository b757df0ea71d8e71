"""Who scores the student's tokens."""

from opdkit.teachers.base import Remote, Scorer
from opdkit.teachers.local import LocalModel
from opdkit.teachers.mixture import MixtureScorer
from opdkit.teachers.routed import Routed, RoutedRemote, route

__all__ = ["LocalModel", "MixtureScorer", "Remote", "Routed", "RoutedRemote", "Scorer", "route"]

"""Who scores the student's tokens."""

from opdkit.teachers.base import Remote, Scorer
from opdkit.teachers.local import LocalModel
from opdkit.teachers.mixture import Mixed
from opdkit.teachers.routed import Routed, RoutedRemote, route

__all__ = ["LocalModel", "Mixed", "Remote", "Routed", "RoutedRemote", "Scorer", "route"]

"""Who scores the student's tokens."""

from opdkit.teachers.local import LocalModel, Routed, Scorer, route

__all__ = ["LocalModel", "Routed", "Scorer", "route"]

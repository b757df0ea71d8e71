"""In which world the student acts: environments, and the episodes that are lived in them."""

from opdkit.environments.base import Environment, Scored

__all__ = ["Environment", "Scored"]

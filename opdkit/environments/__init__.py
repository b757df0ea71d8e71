"""In which world the student acts: environments, and the episodes that are lived in them."""

from opdkit.environments.base import Environment, Scored
from opdkit.environments.dialogue import Dialogue
from opdkit.environments.episodes import EpisodeSampler
from opdkit.environments.settings import EnvironmentSettings

__all__ = ["Dialogue", "Environment", "EnvironmentSettings", "EpisodeSampler", "Scored"]

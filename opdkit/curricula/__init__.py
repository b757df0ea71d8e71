"""What the student is asked next: a curriculum turns the prompts of a step into what is sampled."""

from opdkit.curricula.base import Ask, Curriculum, Plain
from opdkit.curricula.pass_rate import PassRates
from opdkit.curricula.prefix import TeacherPrefix

__all__ = ["Ask", "Curriculum", "PassRates", "Plain", "TeacherPrefix"]

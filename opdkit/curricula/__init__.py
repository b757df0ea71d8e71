"""What the student is asked next: a curriculum turns the prompts of a step into what is sampled."""

from opdkit.curricula.base import Ask, Curriculum, Mixed, Plain
from opdkit.curricula.cached import Cached, reads_cache
from opdkit.curricula.pass_rate import PassRates
from opdkit.curricula.prefix import TeacherPrefix
from opdkit.curricula.replay import Replay

__all__ = [
    "Ask",
    "Cached",
    "Curriculum",
    "Mixed",
    "PassRates",
    "Plain",
    "Replay",
    "TeacherPrefix",
    "reads_cache",
]

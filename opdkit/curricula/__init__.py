"""What the student is asked next and who writes the answer: a curriculum hands over a writer, and
remembers what its rollouts showed.
"""

from opdkit.curricula.base import Curriculum, Plain, writer_of
from opdkit.curricula.cached import Cached, reads_cache
from opdkit.curricula.entropy_length import EntropyLength
from opdkit.curricula.frontier import Frontier
from opdkit.curricula.kinds import curriculum_of
from opdkit.curricula.mixed import Mixed
from opdkit.curricula.pass_rate import PassRates
from opdkit.curricula.prefix import TeacherPrefix
from opdkit.curricula.replay import Replay
from opdkit.curricula.writer import Memory, StepContext, Writer

__all__ = [
    "Cached",
    "Curriculum",
    "EntropyLength",
    "Frontier",
    "Memory",
    "Mixed",
    "PassRates",
    "Plain",
    "Replay",
    "StepContext",
    "TeacherPrefix",
    "Writer",
    "curriculum_of",
    "reads_cache",
    "writer_of",
]

"""What the student is asked next and who writes the answer: a curriculum hands over a writer, and
remembers what its rollouts showed.
"""

from opdkit.curricula.base import Curriculum, Plain, writer_of
from opdkit.curricula.cached import Cached, reads_cache
from opdkit.curricula.depth import Depth
from opdkit.curricula.entropy_length import EntropyLength
from opdkit.curricula.every_turn import EveryTurn
from opdkit.curricula.frontier import Frontier
from opdkit.curricula.kinds import curriculum_of
from opdkit.curricula.mix_policy import MixPolicy
from opdkit.curricula.mixed import Mixed
from opdkit.curricula.opponent import Opposed
from opdkit.curricula.pass_rate import PassRates
from opdkit.curricula.preference import Preference
from opdkit.curricula.prefix import TeacherPrefix
from opdkit.curricula.recall import Ask, Recalled
from opdkit.curricula.rehearsal import Rehearsal
from opdkit.curricula.replay import Replay
from opdkit.curricula.reward_means import RewardMeans
from opdkit.curricula.several import Several
from opdkit.curricula.two_contexts import TwoContexts
from opdkit.curricula.writer import Memory, StepContext, Writer

__all__ = [
    "Ask",
    "Cached",
    "Curriculum",
    "Depth",
    "EntropyLength",
    "EveryTurn",
    "Frontier",
    "Memory",
    "MixPolicy",
    "Mixed",
    "Opposed",
    "PassRates",
    "Plain",
    "Preference",
    "Recalled",
    "Rehearsal",
    "Replay",
    "RewardMeans",
    "Several",
    "StepContext",
    "TeacherPrefix",
    "TwoContexts",
    "Writer",
    "curriculum_of",
    "reads_cache",
    "writer_of",
]

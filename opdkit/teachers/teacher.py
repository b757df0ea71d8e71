"""What every kind of teacher says of itself: its settings, as a run names them, and all that
depends on the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

from opdkit.base.config import plain
from opdkit.base.errors import UserError
from opdkit.data.views import View
from opdkit.models.held import Held
from opdkit.models.identity import Identity
from opdkit.models.shapes import Shape
from opdkit.objective.companion import Companion
from opdkit.objective.facts import Fact
from opdkit.objective.needs import Needs
from opdkit.teachers.base import Remote, Scorer
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.refuse import refuse_facts
from opdkit.teachers.speech import VoiceElsewhere, VoiceHere


class Teacher(ABC):
    """The settings of one kind of teacher.

    A new kind is one file with a frozen dataclass, and its line in `teachers.kinds.KINDS`. Here one
    that finds every token equally probable, `teacher=uniform:1000`:

        @dataclass(frozen=True)
        class UniformTeacher(Teacher):
            kind = "uniform"
            main = "tokens"  # what follows the colon
            tokens: str  # how many there are

            def says(self, fact: Fact, model: str) -> bool:
                return fact == LogpFact(model)  # log-probs of the sampled tokens alone

            def open(self, context: TeacherContext) -> Remote:
                return UniformScorer(int(self.tokens))

            def held(self, role, dtype, shape_of) -> list[Held]:
                return [Held(role, f"uniform over {self.tokens}", ELSEWHERE)]

            def identity(self) -> Identity:
                return Identity(f"uniform over {self.tokens} tokens")

        @dataclass(frozen=True)
        class UniformScorer:  # a `Remote`: it answers with numbers
            tokens: int

            def facts(self, wanted, layout, positions, ids) -> Tensors:
                logp = torch.full(positions.shape, -math.log(self.tokens), device=positions.device)
                return {fact: logp for fact in wanted}

    A method that reads more of it is refused before anything is loaded.
    """

    kind: ClassVar[str]  # as a run names it: kind:..., or {kind: ..., settings}
    main: ClassVar[str | None] = None  # the setting that follows the colon of kind:...
    # whether spans of text can be read of it, in tokens of its own
    reads_spans: ClassVar[bool] = False
    alone: ClassVar[bool] = False  # whether its name alone, without a colon, says all of it

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """The settings that `kind:text` stands for; none where nothing may follow the colon."""
        return {} if cls.main is None else {cls.main: text}

    @property
    def opens_local_model(self) -> bool:
        """Whether opening gives one `LocalModel`, or one by route: then text can be sampled from it
        too, and it can take part in the student's decoding.
        """
        return False

    @property
    def adds_up(self) -> bool:
        """Whether whole distributions of it are at hand in this process, so that it can be one of a
        mixture.
        """
        return self.opens_local_model

    @property
    def starts_student(self) -> bool:
        """Whether it reads the weights that the student began with."""
        return False

    @property
    def views(self) -> tuple[View, ...]:
        """Under which views it, or a member of it, reads questions."""
        return ()

    def companions(self, model: str) -> Iterable[Companion]:
        """What has to stand beside the student for it, where the objective calls it `model`."""
        return ()

    @property
    def own_data(self) -> str | None:
        """The data whose prompts alone it can score; None: any."""
        return None

    @property
    def routes(self) -> Mapping[str, Teacher]:
        """Teachers by what rows call them in their `teacher` column; empty: one for all rows."""
        return {}

    def parsed(self, parse: Callable[[Any, str], Teacher], where: str) -> Self:
        """The same with members parsed that stand in its settings as text or groups.

        Arguments:
            parse: a member and the name of its setting to a teacher.
            where: the name of this teacher's setting, for errors.
        """
        return self

    def said(self) -> dict[str, Any]:
        """How a run says it: `kind` and settings."""
        return {"kind": self.kind, **plain(self)}

    # ------------------------------------------------------------------------- before it is opened

    def says(self, fact: Fact, model: str) -> bool:
        """Whether it can say a fact that involves the model of this name in the objective."""
        return fact.in_scores(model)

    def refuse(self, method: str, needs: Needs, model: str = "teacher") -> None:
        """The error where a method reads what this kind cannot supply, before anything is loaded.

        Arguments:
            method: its name, for the error.
            needs: what it reads.
            model: what the objective calls this teacher.
        """
        if needs.spans(model) and not self.reads_spans:
            raise UserError(
                f"method {method!r} lays the student's text beside the teacher's own tokens and "
                f"compares whole distributions there, which a {self.kind} teacher cannot say. "
                "Use a teacher in this process (teacher=MODEL)"
            )
        unsaid = [fact for fact in needs.of(model) if not self.says(fact, model)]
        refuse_facts(method, f"a {self.kind} teacher", unsaid)

    def check(self, context: TeacherContext) -> None:
        """What cannot work is refused here, before any weights are loaded: tokenizers are compared,
        servers asked, files opened.
        """
        return

    def ends(self, context: TeacherContext) -> frozenset[int]:
        """The student's ids with which it ends an answer, as far as it can say before it is opened:
        the student is to stop there too, as what follows is not what the teacher can judge.
        """
        return frozenset()

    # ----------------------------------------------------------------------------------- as a model

    @abstractmethod
    def open(self, context: TeacherContext) -> Scorer | Remote:
        """What scores rollouts; weights are loaded now."""

    @property
    def writes(self) -> bool:
        """Whether it can be asked to write text (`voice`)."""
        return False

    def voice(self, context: TeacherContext) -> VoiceHere | VoiceElsewhere:
        """Where it writes text, for those that do (`writes`); a model in this process is the one
        that scores.
        """
        raise UserError(f"a {self.kind} teacher cannot write text: name a model or a server")

    @abstractmethod
    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        """The models that it will be, for a plan; nothing is loaded.

        Arguments:
            role: what the objective calls it, and its route.
            dtype: of weights whose settings do not say it.
            shape_of: a model's shape by its folder or hub name.
        """

    @abstractmethod
    def identity(self) -> Identity:
        """Which model it is: what a cache records of who scored its rollouts."""

    def recorded(self) -> Identity:
        """What a checkpoint records of it, so that a resumed run has the same teacher: not where it
        is reached, which may be elsewhere by then.
        """
        return self.identity()

    def precision(self, usual: str) -> str:
        """In which dtype it computes, where `usual` is the run's for teachers."""
        return usual

    def lighter(self, dtype: str, decodes: bool) -> Iterable[tuple[str, Teacher]]:
        """Settings, each alone, with which it would take less of the device, and what they are
        called.

        Arguments:
            dtype: of weights whose settings do not say it.
            decodes: whether it takes part in decoding, and so is needed all the while.
        """
        return ()


def precisions(members: Iterable[Teacher], usual: str) -> str:
    """In which dtypes several teachers compute, each once."""
    return ", ".join(sorted({member.precision(usual) for member in members}))

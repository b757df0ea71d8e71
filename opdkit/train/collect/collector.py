"""What collecting rollouts asks of a run: which questions, who writes, what was written earlier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from opdkit.annotators import Annotator
from opdkit.base.clock import Span
from opdkit.base.errors import UserError
from opdkit.curricula import Curriculum, Memory
from opdkit.curricula.writer import Answer, nothing_viewed
from opdkit.rewards import Reward
from opdkit.train.collect.early import Early
from opdkit.train.collect.filters import Filter
from opdkit.train.mesh import ALONE, Mesh
from opdkit.types import Prompt, Rollout, Sampler, Sampling


class Questions(Protocol):
    """The prompts of a data set (see `data.Prompts`)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Prompt: ...
    def response_tokens(self, index: int) -> list[int] | None: ...
    def turns(self, index: int) -> list[Prompt]: ...
    def pair(self, index: int) -> tuple[Answer, Answer]: ...


class Stored(Protocol):
    """Rollouts written earlier (see `data.cache.Cache`)."""

    def rollouts(self, prompt: Prompt) -> list[Rollout]: ...


@dataclass
class Collector:
    """What is asked at each step, who answers, what an answer is worth, and what becomes of it."""

    curriculum: Curriculum  # which prompts, who writes, how long, and what is remembered
    sampler: Sampler
    prompts: Questions
    stream: Any  # data.PromptStream: which of the prompts come next, where nothing chooses them
    sampling: Sampling
    prompts_per_step: int
    seed: int = 0
    reward: Reward | None = None
    filters: tuple[Filter, ...] = ()  # one after the other, once rollouts have their rewards
    annotators: tuple[Annotator, ...] = ()  # one after the other, on what the filters left
    stored: Stored | None = None  # where the writer reads its rollouts from a cache
    mesh: Mesh = ALONE  # the processes that share the run
    early: Early | None = None  # has servers score each rollout as it ends
    # the copies of the student that write as well, by name
    players: Mapping[str, Sampler] = field(default_factory=dict)
    # a prompt as a view of its row writes it
    viewed: Callable[[Prompt, str], Prompt] = nothing_viewed

    def told(self, step: int, total_steps: int) -> dict[str, Any]:
        """What the sampler is told besides, for a step."""
        if self.early is None:
            return {}
        return {"each": self.early.hearing(step, total_steps)}

    def metrics(self) -> dict[str, float]:
        """Of a step's rollouts, once they are learnt from; and of who wrote them."""
        found = {} if self.early is None else self.early.metrics()
        of_sampler = getattr(self.sampler, "metrics", None)
        return found if of_sampler is None else {**found, **of_sampler()}

    def counts(self) -> dict[str, float]:
        """What filters tell of the rollouts that they had last."""
        told = (getattr(keeps, "counts", {}) for keeps in self.filters)
        return {name: count for counts in told for name, count in counts.items()}

    def spans(self, step: int) -> dict[str, list[Span]]:
        """When teachers were asked while the step's rollouts were written."""
        return {} if self.early is None else {"teacher": self.early.spans(step)}

    @cached_property
    def questions(self) -> list[str]:
        """Those of all prompts."""
        return [self.prompts[i].question for i in range(len(self.prompts))]

    def cut(self, memory: Memory) -> Sampling:
        """The run's settings, with responses as long as the curriculum has them now."""
        longest = self.curriculum.longest(memory)
        if longest is None:
            return self.sampling
        longest = min(longest, self.sampling.max_completion_length)
        return replace(self.sampling, max_completion_length=longest)

    def batches(self, step: int, memory: Memory, count: int) -> Iterator[list[int]]:
        """The prompts of a step, by index: `count` of them, and as many again each time that
        filters ask for more. What is chosen is chosen among those that the step has not asked yet,
        and among all once none is left; in a run of equal steps the same.
        """
        asked = self.curriculum.asked(self.questions, memory)
        every = list(range(len(self.questions))) if asked is None else list(asked)
        open_, left = set(every), list[int]()
        while True:
            batch: list[int] = []
            while (missing := count - len(batch)) > 0:
                left = left or every
                mine = [self.questions[i] for i in left]
                chosen = self.curriculum.choose(mine, missing, step, self.seed, memory)
                if chosen is None:
                    batch += [i for i in self.stream.take(missing) if i in open_]
                    continue
                gone = set(chosen)
                if not gone or len(gone) < len(chosen) or not gone <= set(range(len(left))):
                    raise UserError(
                        f"curriculum {self.curriculum} chose the questions {chosen} of "
                        f"{len(left)}: `choose` must return different indices of what it is given, "
                        "one at least, or None"
                    )
                batch += [left[i] for i in chosen]
                left = [index for at, index in enumerate(left) if at not in gone]
            yield batch

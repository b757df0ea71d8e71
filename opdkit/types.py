"""What flows through a run: prompts, sampling settings, rollouts.

Log-probabilities and entropies are in nats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

DataRow = dict[str, Any]  # one row of a data set by column name, such as prompt, answer, teacher


# The marks that say who wrote a token that the student did not draw, by who it was.
MARK_OF = {"guide": "guided", "data": "given", "environment": "tool"}
AUTHORS = ("student", *MARK_OF)  # whoever may have written a token of a response

# policy version of a rollout whose recorded log-probs are not those of the student under its
# prompt, whatever steps that has taken: the student's are computed anew
NEVER_FRESH = -1


@dataclass(frozen=True)
class Prompt:
    """One question as token ids.

    Arguments:
        id: keys the draws of the responses, with their numbers.
        tokens: what the student reads, the chat template applied.
        row: the data row that it came from.
        prefix: response tokens written for the student, which its response begins with (a teacher
            prefix).
        question: the question's own id, of which there may be several prompts (with a prefix,
            in a later turn). Default: `id`.
        group: the responses that a baseline or a pair is taken over. Default: `question`.
        number: of its first response; a prompt that is asked again in a step goes on counting, so
            that its responses have ids, and thus draws, of their own.
        most_turns: turns after which an episode is stopped; 0: as many as its environment has.
        replay: actions of another that open the episode, before the student acts; it does not
            learn them.
    """

    id: str
    tokens: list[int]
    row: DataRow = field(default_factory=dict)
    prefix: list[int] = field(default_factory=list)
    question: str = ""
    group: str = ""
    number: int = 0
    most_turns: int = 0
    replay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # as they are now: `replace(prompt, id=...)` is another prompt of the same question
        object.__setattr__(self, "question", self.question or self.id)
        object.__setattr__(self, "group", self.group or self.question)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Names as in transformers and TRL.

    Arguments:
        temperature: logits are divided by it; 1 is the model itself, 0 takes the most probable.
        top_p: the least probable tokens beyond this mass are never drawn; in (0, 1], 1 is off.
        top_k: only this many of the most probable are drawn; 0 is off.
        min_p: tokens less probable than this share of the most probable are never drawn; 0 is off.
        max_completion_length: tokens after which a response is cut.
        num_generations: responses to each prompt.
        stop: texts that end a response, besides the end-of-sequence tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_completion_length: int = 512
    num_generations: int = 1
    stop: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's own softmax, nothing scaled or cut."""
        return (
            self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0
        )


@dataclass(frozen=True)
class Rollout:
    """One response and its provenance, before tensors: crosses process borders, caches and logs.

    All lists have one entry for each of its T tokens.

    Arguments:
        id: unique in the run, the same after a resume and in any order: random signals hash it.
        prompt: token ids of the question.
        tokens: token ids of the response, with its end-of-sequence token if it wrote one.
        trained: whether the student learns from a token; not of tool output, user turns, all that
            the student did not choose.
        logp: log-prob of each token under the sampler's plain softmax (temperature 1, nothing cut),
            in nats.
        drawn_logp: the same under the distribution that it was drawn from (temperature, top_p,
            top_k, min_p).
        group: rollouts that are compared with each other (baselines, pairs) and learnt from in one
            optimiser step; in general those of one question.
        policy_version: optimiser steps that the sampling policy had taken; `NEVER_FRESH`: it is
            another than the student under this prompt.
        finish: "stop": it ended itself; "length": cut at max_completion_length; "turns": an episode
            that had all the turns that it may have; "given": read from data.
        text: the response, decoded.
        reward: what it is worth; None until it is scored.
        correct: whether it is right; None where no reward says so.
        marks: named sets of tokens. Three of them say who wrote a token that the student did not
            draw: "guided" (a teacher, such as its prefix), "given" (the data), "tool" (the
            environment).
        row: the data row of its prompt.
        notes: what else the sampler saw at each token.
        question: what it answers: of one question is remembered how often it is solved. Default:
            `group`.
        turns: the turn of each token, from 0; empty: all are of one.
        feedback: what was said of the response besides its reward, such as the message of a test
            that it fails.
        rewards: where a run has several rewards by name, each that applies to it; `reward` is their
            weighted sum.

    >>> r = Rollout(
    ...     id="0/row7/0", prompt=[5, 6], tokens=[8, 9, 2], trained=[True] * 3,
    ...     logp=[-0.1, -1.2, -0.3], drawn_logp=[-0.1, -1.2, -0.3], group="row7", text="42",
    ...     row={"id": "row7", "answer": "42"},
    ... )
    >>> from opdkit.rewards import score
    >>> [scored] = score([r], lambda rollout: float(rollout.text == rollout.row["answer"]))
    >>> scored.reward, scored.correct
    (1.0, True)
    """

    id: str
    prompt: list[int]
    tokens: list[int]
    trained: list[bool]
    logp: list[float]
    drawn_logp: list[float]
    group: str
    policy_version: int = 0
    finish: str = "stop"
    text: str = ""
    reward: float | None = None
    correct: bool | None = None
    marks: dict[str, list[bool]] = field(default_factory=dict)
    row: DataRow = field(default_factory=dict)
    notes: Notes | None = field(default=None, compare=False, repr=False)
    question: str = ""
    turns: list[int] = field(default_factory=list)
    feedback: str = ""
    rewards: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", self.question or self.group)

    @property
    def drawn(self) -> list[bool]:
        """[T]: the tokens that the student drew."""
        others = [self.marks[mark] for mark in MARK_OF.values() if mark in self.marks]
        return [not any(at) for at in zip(*others)] if others else [True] * len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of the response; of an episode those that the student drew."""
        return sum(self.drawn) if "tool" in self.marks else len(self.tokens)

    @property
    def unaided(self) -> bool:
        """Whether what it is worth is the student's own doing: no part of the answer was written
        for it.
        """
        return not any(any(self.marks.get(mark, ())) for mark in ("guided", "given"))


@dataclass(frozen=True)
class Notes:
    """What a sampler saw of its own distribution at each token of a rollout, if `Watch` asked."""

    entropy: Tensor | None  # [T] nats
    top: Tensor | None  # [T, k] int64: ids of the most probable tokens, most probable first
    top_logp: Tensor | None  # [T, k]: their log-probs


@dataclass(frozen=True)
class Watch:
    """What a sampler is to note at each token, so that no pass of the student finds it out again.

    Arguments:
        entropy: the entropy of its plain softmax.
        top: how many of the most probable tokens, with their log-probs.
    """

    entropy: bool = False
    top: int = 0


@dataclass(frozen=True)
class Turn:
    """A turn that the student has ended, in a response that may go on.

    Arguments:
        rollout: the response's id.
        tokens: of the turn, with what ends it if the student wrote that.
        stopped: whether the student ended it, not a limit.
        room: tokens that the response may have after it.
    """

    rollout: str
    tokens: list[int]
    stopped: bool
    room: int


class Replies(Protocol):
    """What answers the student's turns, so that its responses go on."""

    turn_tokens: int | None  # after which a turn is cut; None: what the response has room for

    def answer(self, turns: Sequence[Turn]) -> list[list[int] | None]:
        """What is written after each of these turns, of responses that are going on side by side:
        fewer tokens than there is room for; None: the response has ended.
        """
        ...


class Sampler(Protocol):
    """What lets the student write its responses."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int | None,
        policy_version: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> list[Rollout]:
        """`sampling.num_generations` responses to each prompt, those to one prompt side by side.

        One that `gives_each` takes a keyword `each` too: a function that is called with each
        rollout as it ends, in any order and from any thread; with its tokens and row, but perhaps
        without log-probs that are still to be found.

        Arguments:
            seed: draws are keyed by it and by each rollout's id.
            step: part of the rollouts' ids, step/prompt/number, numbers from the prompt's own on;
                None: they have none.
            policy_version: optimiser steps that the student has taken.
            progress: is called with the number of rollouts finished so far.
        """
        ...

    def sync(self, model: Any, version: int) -> None:
        """Take over the student's weights after an optimiser step, the `version`-th."""
        ...


class Elsewhere(Sampler, Protocol):
    """A sampler that can write while the student learns; `sync` is `staged(model, version)()`."""

    def staged(self, model: Any, version: int) -> Callable[[], None]:
        """The first half of `sync`: all that needs the model. Of a model that is spread over
        processes all of them take part, in one order.

        What it returns sends the weights as they were: in any thread, once, before the next
        `sample`, and also while the model moves on. Of several processes the first one's is called.
        """
        ...


def row_keys(ids: Iterable[str], device: torch.device | str = "cpu") -> Tensor:
    """[B] int64: a hash of each rollout's id, the same on every machine."""
    digests = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids]
    return torch.tensor(
        [int.from_bytes(d, "little", signed=True) for d in digests],
        dtype=torch.int64,
        device=device,
    )


def reward_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The mean of each reward that has a name, over the rollouts that it applies to."""
    given = {
        name: [r.rewards[name] for r in rollouts if name in r.rewards]
        for name in sorted({name for r in rollouts for name in r.rewards})
    }
    return {name: sum(values) / len(values) for name, values in given.items()}

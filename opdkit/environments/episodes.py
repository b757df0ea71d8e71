"""The sampler of episodes: the student writes a turn, its environment answers, and so on, for many
episodes side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from opdkit.base.errors import UserError
from opdkit.environments.base import Environment
from opdkit.environments.dialogue import Dialogue
from opdkit.environments.episode import Episode
from opdkit.sampling.finish import rollout_ids
from opdkit.types import Prompt, Rollout, Sampler, Sampling, Turn


@dataclass
class EpisodeSampler:
    """A sampler whose rollouts are episodes, scored by their environments.

    Where `inner` can, a response goes on in its own place of the running batch as soon as it is
    answered; else all episodes write their next turns together, round by round.

    Arguments:
        inner: lets the student write.
        dialogue: writes for the student what others say.
        make: a new environment.
        name: of the environment, in errors.
        max_turns: after which an episode is stopped; None: as many as there is room for.
        turn_tokens: after which a turn is cut; None: what the episode has left.
    """

    inner: Any  # a `types.Sampler`, which may take `replies`
    dialogue: Dialogue
    make: Callable[[], Environment]
    name: str = "own"
    max_turns: int | None = None
    turn_tokens: int | None = None
    gives_each: ClassVar[bool] = True  # it takes `each`

    def sync(self, model: Any, version: int) -> None:
        """After an optimiser step: the student's weights go to whoever writes."""
        self.inner.sync(model, version)

    @property
    def staged(self) -> Any:
        """The first half of `sync`, of those who have one: see `types.Elsewhere`."""
        return self.inner.staged

    @property
    def metrics(self) -> Any:
        """What is known of who writes, of those who have something to say."""
        return self.inner.metrics

    @property
    def behind(self) -> Any:
        """Whether it has to be sent the student's weights before it writes, of those who have a
        copy of them.
        """
        return self.inner.behind

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int = 0,
        step: int | None = 0,
        policy_version: int = 0,
        progress: Callable[[int], object] | None = None,
        each: Callable[[Rollout], object] | None = None,
    ) -> list[Rollout]:
        """`sampling.num_generations` episodes of each prompt, those of one prompt side by side.

        Of a prompt its row is read, not its tokens: the environment opens the episode.
        `max_completion_length` bounds all that is written after the opening. `each` is told of each
        episode as it ends, without log-probs and what it is worth.
        """
        for prompt in prompts:
            if prompt.prefix:
                raise UserError(
                    f"prompt {prompt.id!r} has a prefix, written for a single answer, and the run "
                    "has an environment: open its episodes with `replay` (actions), or leave "
                    "environment out"
                )
        ids = rollout_ids(prompts, sampling, step)
        lived = Live(
            {id: self._episode(prompts[i // sampling.num_generations], sampling)
             for i, id in enumerate(ids)},
            self.turn_tokens,
            each,
        )  # fmt: skip
        try:
            for episode in lived.episodes.values():
                episode.open(seed_of(seed, episode.prompt.question), sampling.max_completion_length)
            asked, single = _asked(prompts, list(lived.episodes.values()), sampling)
            settings = {"seed": seed, "step": step, "policy_version": policy_version}
            if getattr(self.inner, "continues", False):
                written = self.inner.sample(
                    asked, single, replies=lived, progress=progress, **settings
                )
            else:
                written = rounds(self.inner, asked, single, lived, progress, settings)
            return [
                finished(rollout, lived.episodes[rollout.id], self.dialogue) for rollout in written
            ]
        finally:
            lived.close()

    def openings(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        """The prompts with what the student reads first in their episodes, each opened once."""
        made = []
        for prompt in prompts:
            lived = Live({prompt.id: self._episode(prompt, Sampling())})
            try:
                [episode] = lived.episodes.values()
                episode.open(seed_of(seed, prompt.question), 1)
                made.append(replace(prompt, tokens=episode.opening))
            finally:
                lived.close()
        return made

    def _episode(self, prompt: Prompt, sampling: Sampling) -> Episode:
        limits = [n for n in (self.max_turns, prompt.most_turns) if n]
        return Episode(
            self.name,
            self.make(),
            self.dialogue,
            prompt,
            min(limits, default=None),
            sampling.stop,
        )


@dataclass
class Live:
    """The episodes of a call, by the ids of their rollouts: what answers the student's turns."""

    episodes: dict[str, Episode]
    turn_tokens: int | None = None
    each: Callable[[Rollout], object] | None = None  # is told of each that has ended

    def answer(self, turns: Sequence[Turn]) -> list[list[int] | None]:
        replies = [self.episodes[turn.rollout].go_on(turn) for turn in turns]
        for turn, reply in zip(turns, replies):
            if reply is None and self.each is not None:
                self.each(_ended(turn.rollout, self.episodes[turn.rollout]))
        return replies

    def close(self) -> None:
        """Closes all environments, whatever one of them does."""
        failed: UserError | None = None
        for episode in self.episodes.values():
            try:
                episode.close()
            except UserError as error:
                failed = failed or error
        if failed is not None:
            raise failed


def seed_of(seed: int, question: str) -> int:
    """The seed of a question's episodes, the same whenever it is asked in a run, of 31 bits."""
    digest = hashlib.blake2b(f"{seed}/{question}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 33


def _asked(
    prompts: Sequence[Prompt], episodes: Sequence[Episode], sampling: Sampling
) -> tuple[list[Prompt], Sampling]:
    """The openings as prompts, with what was replayed as a prefix: one for all episodes of a prompt
    where they begin alike, so that it is read once; else one for each.
    """
    n = sampling.num_generations
    starts = [(tuple(e.opening), tuple(e.tokens)) for e in episodes]
    groups = [range(i * n, (i + 1) * n) for i in range(len(prompts))]
    alike = all(len({starts[i] for i in group}) == 1 for group in groups)
    made = [
        replace(
            prompts[i // n],
            tokens=episodes[i].opening,
            prefix=episodes[i].tokens,
            number=prompts[i // n].number + i % n,
        )
        for i in (range(0, len(episodes), n) if alike else range(len(episodes)))
    ]
    return made, sampling if alike else replace(sampling, num_generations=1)


def _ended(id: str, episode: Episode) -> Rollout:
    """An episode as a rollout, but for what its sampler and its world say of it."""
    parts = episode.parts
    marks = [part.mark for part in parts for _ in part.tokens]
    return Rollout(
        id,
        prompt=episode.opening,
        row=episode.row,
        tokens=episode.tokens,
        trained=[not mark for mark in marks],
        logp=[],
        drawn_logp=[],
        group=episode.prompt.group,
        finish=episode.finish,
        marks={mark: [m == mark for m in marks] for mark in ("given", "tool") if mark in marks},
        turns=[part.turn for part in parts for _ in part.tokens],
        question=episode.prompt.question,
    )


def finished(rollout: Rollout, episode: Episode, dialogue: Dialogue) -> Rollout:
    """A rollout as the record of its episode, with what that was worth."""
    ended, score = _ended(rollout.id, episode), episode.scored()
    if ended.tokens != rollout.tokens:
        raise RuntimeError(f"rollout {rollout.id}: the sampler and its episode differ")
    return replace(
        ended,
        logp=[p if mine else 0.0 for p, mine in zip(rollout.logp, ended.trained)],
        drawn_logp=[p if mine else 0.0 for p, mine in zip(rollout.drawn_logp, ended.trained)],
        policy_version=rollout.policy_version,
        notes=rollout.notes,
        text=dialogue.tokenizer.decode(ended.tokens, skip_special_tokens=True),
        reward=score.reward,
        correct=score.correct,
        feedback=score.feedback,
    )


# ------------------------------------------------------------------------------------------- rounds


@dataclass
class Writing:
    """A response that is written turn by turn, with calls of a sampler of single answers."""

    prompt: Prompt
    room: int  # tokens that it may still have
    turn: int = 0
    tokens: list[int] = field(default_factory=list)  # after the prompt
    logp: list[float] = field(default_factory=list)
    drawn_logp: list[float] = field(default_factory=list)
    last: Rollout | None = None

    def add(self, tokens: list[int], logp: list[float], drawn_logp: list[float]) -> None:
        self.tokens += tokens
        self.logp += logp
        self.drawn_logp += drawn_logp
        self.room -= len(tokens)

    def next(self, most: int, turn: int) -> Prompt:
        """All so far, to be continued by at most `turn` tokens of the `most` that the longest turn
        of the round may have: the others' tokens count as its prefix.
        """
        text = self.prompt.tokens + self.tokens
        cut = len(text) - (most - turn)
        return replace(
            self.prompt,
            id=f"{self.prompt.id}/{self.turn}",
            tokens=text[:cut],
            prefix=text[cut:],
        )


def rounds(
    inner: Sampler,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    lived: Live,
    progress: Callable[[int], object] | None,
    settings: dict[str, Any],
) -> list[Rollout]:
    """Responses by a sampler that ends them after one turn: in each round it writes the next turn
    of all that are going on.
    """
    n, step = sampling.num_generations, settings["step"]
    single = [replace(p, number=p.number + c, prefix=[]) for p in prompts for c in range(n)]
    ids = rollout_ids(single, replace(sampling, num_generations=1), step)
    all_of = {}
    for i, (id, prompt) in enumerate(zip(ids, single)):
        given = prompts[i // n].prefix
        all_of[id] = Writing(prompt, sampling.max_completion_length)
        all_of[id].add(list(given), [0.0] * len(given), [0.0] * len(given))
    going = dict(all_of)
    while going:
        turns = {id: _most(w, lived.turn_tokens) for id, w in going.items()}
        most = max(turns.values())
        written = inner.sample(
            [w.next(most, turns[id]) for id, w in going.items()],
            replace(sampling, num_generations=1, max_completion_length=most),
            **settings,
        )
        ended = []
        for (id, writing), rollout in zip(list(going.items()), written, strict=True):
            before = most - turns[id]
            new = rollout.tokens[before:]
            writing.add(new, rollout.logp[before:], rollout.drawn_logp[before:])
            writing.last, writing.turn = rollout, writing.turn + 1
            ended.append(Turn(id, new, rollout.finish == "stop", writing.room))
        for turn, reply in zip(ended, lived.answer(ended), strict=True):
            if reply is None:
                del going[turn.rollout]
            else:
                silent = [0.0] * len(reply)
                going[turn.rollout].add(reply, silent, silent)
        if progress is not None:
            progress(len(all_of) - len(going))
    return [_whole(id, writing) for id, writing in all_of.items()]


def _most(writing: Writing, turn_tokens: int | None) -> int:
    """Tokens that a next turn may have."""
    return writing.room if turn_tokens is None else min(turn_tokens, writing.room)


def _whole(id: str, writing: Writing) -> Rollout:
    assert writing.last is not None
    return replace(
        writing.last,
        id=id,
        tokens=writing.tokens,
        logp=writing.logp,
        drawn_logp=writing.drawn_logp,
        notes=None,
        question=writing.prompt.question,
        group=writing.prompt.group,
    )

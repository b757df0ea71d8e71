"""Responses from a vLLM engine, here or behind HTTP: what each rollout asks for, and how both of
its log-probs are found.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from opdkit.base.errors import UserError
from opdkit.models.body import head_of
from opdkit.models.load import CausalLM
from opdkit.models.sharding import whole_head
from opdkit.models.tokenizers import real_vocabulary, stop_ids
from opdkit.objective.head import Head
from opdkit.sampling.check import check_prompts
from opdkit.sampling.draws import check_sampling
from opdkit.sampling.finish import Response, Tick, finish, names_special, rollout_ids
from opdkit.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLDEST, HOTTEST = 0.01, 2.0  # temperatures between which vLLM samples


@dataclass(frozen=True)
class Request:
    """Tokens to be continued, and how: settings named as vLLM and its server name them."""

    tokens: list[int]
    settings: dict[str, Any]
    who: str  # in errors
    told: Callable[[Drawn], object] | None = None  # is called with its continuation, at once


@dataclass(frozen=True)
class Drawn:
    """A continuation."""

    tokens: list[int]
    # under the distribution the tokens were drawn from; where greedy, under the plain softmax
    logp: list[float]
    stopped: bool  # by a stop token or a stop string, not by its length


class Engine(Protocol):
    """An engine that takes token ids and gives token ids."""

    @abstractmethod
    def draw(self, requests: Sequence[Request], tick: Callable[[int], None] | None) -> list[Drawn]:
        """A continuation of each; `tick` hears how many are finished."""
        ...

    @abstractmethod
    def score(
        self, sequences: Sequence[list[int]], starts: Sequence[int], who: Sequence[str]
    ) -> list[list[float]]:
        """Log-probs of sequence[start:] under the plain softmax; `who` names each in errors."""
        ...


class EngineSampler(Engine):
    """A sampler whose responses an engine writes: what one call does, in order."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    head: Head
    limit: int  # tokens that the engine reads

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int = 0,
        step: int | None = 0,
        policy_version: int = 0,
        progress: Tick | None = None,
        each: Callable[[Rollout], object] | None = None,
    ) -> list[Rollout]:
        """All responses to the first prompt, then to the second, ...: see `HFSampler.sample`."""
        check_sampling(sampling)
        if not prompts:
            return []
        check_engine(sampling, check_prompts(prompts, sampling, self.model, self.head), self.limit)
        if self.behind:
            self.sync(self.model, policy_version)
        self.ready(sampling, policy_version)
        ids = rollout_ids(prompts, sampling, step)
        stops, special = (
            stop_ids(self.model, self.tokenizer),
            names_special(sampling.stop, self.tokenizer),
        )
        hear = None
        if each is not None:
            hear = partial(self._hear, prompts, sampling, ids, policy_version, each)
        responses = respond(self, prompts, sampling, ids, stops, seed, progress, special, hear)
        self.rest()
        return finish(prompts, sampling, ids, responses, self.tokenizer, policy_version)

    def _hear(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        ids: Sequence[str],
        policy_version: int,
        each: Callable[[Rollout], object],
        number: int,
        drawn: Drawn,
    ) -> None:
        """Tells of a rollout that has ended, by its number."""
        prompt = prompts[number // sampling.num_generations]
        # the log-probs of a prefix have to be found yet, and those under the plain softmax may have
        logp = drawn.logp if sampling.plain and not prompt.prefix else []
        made = [Response(prompt.prefix + drawn.tokens, logp, logp, drawn.stopped)]
        one = replace(sampling, num_generations=1)
        for rollout in finish([prompt], one, [ids[number]], made, self.tokenizer, policy_version):
            each(rollout)

    @property
    @abstractmethod
    def behind(self) -> bool:
        """Whether the engine has to be sent the student's weights before anything is drawn."""

    @abstractmethod
    def sync(self, model: CausalLM, version: int) -> None:
        """After an optimiser step: the engine follows the student, and that is proved."""

    @abstractmethod
    def ready(self, sampling: Sampling, policy_version: int) -> None:
        """Before anything is drawn: whether the engine can sample so."""

    def rest(self) -> None:
        """Nothing more is asked until the next call."""


def respond(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    ids: Sequence[str],
    stops: Collection[int],
    seed: int,
    progress: Tick | None = None,
    special: bool = False,
    told: Callable[[int, Drawn], object] | None = None,
) -> list[Response]:
    """The responses of rollouts `ids`, `num_generations` per prompt, prefixes included.

    `stops` are the tokens that end one; `special`: stop strings hold names of special tokens;
    `told` is called with the number of a rollout and what was drawn for it, as that is there.
    """
    n = sampling.num_generations
    unfinished = [i for i in range(len(ids)) if not _complete(prompts[i // n], sampling, stops)]
    given = len(ids) - len(unfinished)  # prefixes that are whole responses

    def tick(drawn: int) -> None:
        if progress is not None:
            progress(given + drawn)

    if given:
        tick(0)
    requests = [
        _request(prompts[i // n], sampling, stops, seed, ids[i], special) for i in unfinished
    ]
    if told is not None:
        requests = [replace(r, told=partial(told, i)) for i, r in zip(unfinished, requests)]
    drawn = dict(zip(unfinished, engine.draw(requests, tick) if requests else []))
    parts = [
        drawn.get(i, Drawn([], [], bool(p.prefix) and p.prefix[-1] in stops))
        for i in range(len(ids))
        for p in [prompts[i // n]]
    ]
    plain = _plain(engine, prompts, sampling, ids, parts)
    responses = []
    for i, (part, (guided, logp)) in enumerate(zip(parts, plain)):
        drawn_logp = [0.0] * len(part.logp) if sampling.temperature == 0 else part.logp
        responses.append(
            Response(
                prompts[i // n].prefix + part.tokens,
                guided + logp,
                guided + drawn_logp,
                part.stopped,
            )
        )
    return responses


def _plain(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    ids: Sequence[str],
    parts: Sequence[Drawn],
) -> list[tuple[list[float], list[float]]]:
    """Of each rollout, the log-probs of its prefix and of what was drawn under the plain softmax:
    as they were drawn where that is what they were drawn from, else by scoring them.
    """
    of = [prompts[i // sampling.num_generations] for i in range(len(ids))]
    if sampling.plain or sampling.temperature == 0:
        prefixes = _prefixes(engine, prompts)
        return [(prefixes.get(p.id, []), part.logp) for p, part in zip(of, parts)]
    scored = engine.score(
        [p.tokens + p.prefix + part.tokens for p, part in zip(of, parts)],
        [len(p.tokens) for p in of],
        [f"rollout {id}" for id in ids],
    )
    return [(s[: len(p.prefix)], s[len(p.prefix) :]) for p, s in zip(of, scored)]


def _complete(prompt: Prompt, sampling: Sampling, stops: Collection[int]) -> bool:
    """Whether the prefix is the whole response."""
    return (bool(prompt.prefix) and prompt.prefix[-1] in stops) or len(
        prompt.prefix
    ) >= sampling.max_completion_length


def _prefixes(engine: Engine, prompts: Sequence[Prompt]) -> dict[str, list[float]]:
    """By the prompt's id: log-probs of its prefix."""
    guided = [prompt for prompt in prompts if prompt.prefix]
    if not guided:
        return {}
    scored = engine.score(
        [p.tokens + p.prefix for p in guided],
        [len(p.tokens) for p in guided],
        [f"the prefix of prompt {p.id}" for p in guided],
    )
    return dict(zip([p.id for p in guided], scored))


def _request(
    prompt: Prompt, sampling: Sampling, stops: Collection[int], seed: int, id: str, special: bool
) -> Request:
    settings = {
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": sampling.top_k,
        "min_p": float(sampling.min_p),
        "seed": seed_of(seed, id),
        "max_tokens": sampling.max_completion_length - len(prompt.prefix),
        "stop": list(sampling.stop),
        "skip_special_tokens": not special,  # of the text that is looked for stop strings
        "stop_token_ids": sorted(stops),
        "ignore_eos": True,  # the end-of-sequence tokens are among the stop tokens
        "logprobs": 0,  # of the drawn token alone
    }
    return Request(prompt.tokens + prompt.prefix, settings, f"rollout {id}")


def seed_of(seed: int, id: str) -> int:
    """A rollout's own seed, of 62 bits."""
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}/{id}".encode(), digest_size=8).digest(), "little")
        >> 2
    )


def check_engine(sampling: Sampling, longest: int, limit: int) -> None:
    """Refuses what vLLM would change on its own, and rollouts longer than the engine reads."""
    if 0 < sampling.temperature < COLDEST or sampling.temperature > HOTTEST:
        raise UserError(
            f"sampling.temperature={sampling.temperature} is outside what vLLM samples with "
            f"({COLDEST} to {HOTTEST}, or 0 for greedy): choose one inside, or sample with the "
            "model in this process (sampler=hf)"
        )
    if longest + 1 > limit:
        raise UserError(
            f"a rollout may have {longest} tokens (the longest prompt and max_completion_length), "
            f"and one more is needed to score it, but the engine reads {limit}: start it with "
            f"max_model_len={longest + 1}, or lower max_completion_length or data.max_prompt_length"
        )


def ended(reason: str | None) -> bool:
    """Whether a response stopped by itself; a reason that is none of a finished response is an
    error.
    """
    if reason not in ("stop", "length"):
        raise UserError(
            f"vLLM gave a response up ({reason}): look at its log. Nothing was learnt from this "
            "step"
        )
    return reason == "stop"


def head_now(model: CausalLM, tokenizer: Any) -> Callable[[], Head]:
    """The head as it is when it is asked for, cut to the tokenizer's real tokens."""
    return lambda: whole_head(head_of(model, real_vocabulary(tokenizer)))


def shape_of(head: Head) -> Head:
    """A head whose rows can be counted, without its numbers: these move on."""
    assert head.weight is not None
    return replace(head, weight=head.weight.detach().to("meta"))


def real_rows(head: Head) -> int:
    """Rows of a head that stand for tokens."""
    assert head.weight is not None
    return len(head.weight) if head.vocab is None else min(head.vocab, len(head.weight))


def padded(head: Head) -> bool:
    """Whether a head has rows behind those."""
    return head.weight is not None and real_rows(head) < len(head.weight)

"""What `vllm serve` is asked for with token ids, and how its answers are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import Endpoint
from opdkit.models.engines.exchange import MOST, Broken, Reply, object_of, shown
from opdkit.models.engines.prompt_logprobs import number_of, parse_prompt_logprobs
from opdkit.sampling.respond import Drawn, Request, ended

T = TypeVar("T")

ENTRY = 1024  # bytes of JSON, at most, about one token: its id, text and log-prob
ROUNDING = 1e-3  # nats: by so much a log-prob may be above 0


def drawn(endpoint: Endpoint, name: str, request: Request, rows: int) -> Drawn:
    """A continuation, of ids below `rows`, by what is served under a name."""
    # whatever the checkpoint's own generation settings say
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    settings = request.settings | neutral | {"return_token_ids": True}
    longest = request.settings["max_tokens"]

    def read(choice: dict[str, Any], who: str) -> Drawn:
        tokens, logps = (
            choice.get("token_ids"),
            (choice.get("logprobs") or {}).get("token_logprobs"),
        )
        if not isinstance(tokens, list) or not isinstance(logps, list):
            raise UserError(
                f"{who}: the sampling server does not return token ids with their log-probs: "
                "opdkit never encodes a text again, as that changes tokens. Use vLLM 0.32 or newer"
            )
        if choice.get("prompt_token_ids") not in (None, request.tokens):
            raise Broken("it is an answer to another prompt")
        if not len(tokens) == len(logps) <= longest:
            raise Broken(f"{len(tokens)} tokens and {len(logps)} log-probs, of at most {longest}")
        if wrong := [t for t in tokens if type(t) is not int or not 0 <= t < rows]:
            raise Broken(f"token {shown(repr(wrong[0]))} is none of the student's {rows}")
        numbers = [number_of(x) for x in logps]
        if above := [x for x in numbers if x > ROUNDING]:
            raise Broken(f"a log-prob of {above[0]:g}")
        return Drawn(tokens, numbers, ended(choice.get("finish_reason")))

    made = _complete(endpoint, name, request.who, request.tokens, settings, read, longest)
    if request.told is not None:
        request.told(made)
    return made


def scores(endpoint: Endpoint, name: str, tokens: list[int], start: int, who: str) -> list[float]:
    """Log-probs of tokens[start:] under the plain softmax, by what is served under a name."""

    def read(choice: dict[str, Any], who: str) -> list[float]:
        entries = choice.get("prompt_logprobs")
        return parse_prompt_logprobs(entries, tokens, start, 0, who).logp.tolist()

    settings = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    return _complete(endpoint, name, who, tokens, settings, read, 1)


def _complete(
    endpoint: Endpoint,
    name: str,
    who: str,
    tokens: list[int],
    settings: dict[str, Any],
    read: Callable[[dict[str, Any], str], T],
    longest: int,
) -> T:
    """What `read` makes of the single completion that comes back."""

    def single(reply: Reply, who: str) -> T:
        choices = object_of(reply).get("choices")
        if not isinstance(choices, list) or len(choices) != 1:
            raise Broken(f"no single completion is in it, but {shown(repr(choices))}")
        return read(choices[0], who)

    body = {"model": name, "prompt": tokens, **settings}
    most = MOST + ENTRY * (len(tokens) + longest)
    return endpoint.about(f"{who} at {name}", "/v1/completions", body, single, most)

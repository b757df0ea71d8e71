"""What a vLLM engine is asked for, and how responses with both log-probs are put together from what
it says; the engine is played here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.objective.head import Head
from opdkit.sampling import HFSampler
from opdkit.sampling.finish import Response, finish, rollout_ids
from opdkit.sampling.respond import (
    Drawn,
    Request,
    check_engine,
    ended,
    padded,
    real_rows,
    respond,
    seed_of,
)
from opdkit.types import Prompt, Sampling
from tests.common.tiny import tiny_model, tiny_tokenizer

STOP = 9
PLAIN = Sampling(max_completion_length=4, num_generations=2)
PROMPTS = [
    Prompt("a", [1, 2]),
    Prompt("b", [3], prefix=[5, 6]),
    Prompt("c", [4], prefix=[7, STOP]),
    Prompt("d", [4], prefix=[1, 2, 3, 4]),
]


@dataclass
class Played:
    """Draws token 8, then a stop token; the plain log-prob of token x at place i of a sequence is
    -x - i / 10.
    """

    drawn_logp: float = -0.25
    asked: list[Request] = field(default_factory=list)
    scored: list[list[int]] = field(default_factory=list)
    named: list[str] = field(default_factory=list)

    def draw(self, requests: Sequence[Request], tick: Callable[[int], None] | None) -> list[Drawn]:
        self.asked += requests
        if tick is not None:
            tick(len(requests))
        return [Drawn([8, STOP], [self.drawn_logp] * 2, True) for _ in requests]

    def score(
        self, sequences: Sequence[list[int]], starts: Sequence[int], who: Sequence[str]
    ) -> list[list[float]]:
        self.named += who
        self.scored += sequences
        return [[-x - i / 10 for i, x in enumerate(s)][a:] for s, a in zip(sequences, starts)]


def ask(
    sampling: Sampling, prompts: Sequence[Prompt] = PROMPTS, seed: int = 0
) -> tuple[Played, list[Response], list[int]]:
    played, seen = Played(), []  # type: ignore[var-annotated]
    ids = rollout_ids(prompts, sampling, 3)
    return played, respond(played, prompts, sampling, ids, {STOP}, seed, seen.append), seen


def test_requests_name_what_is_to_be_drawn() -> None:
    played, _, seen = ask(
        replace(PLAIN, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, stop=("x",))
    )
    # whole responses are not asked for
    assert [r.tokens for r in played.asked] == [[1, 2], [1, 2], [3, 5, 6], [3, 5, 6]]
    assert [r.settings["max_tokens"] for r in played.asked] == [4, 4, 2, 2]
    expected = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "stop": ["x"],
        "stop_token_ids": [STOP],
    }
    assert (
        expected.items() <= played.asked[0].settings.items()
        and played.asked[0].settings["ignore_eos"] is True
    )
    assert [r.settings["seed"] for r in played.asked] == [
        seed_of(0, f"3/{p}/{c}") for p in "ab" for c in (0, 1)
    ]
    assert seen == [4, 8]


def test_seeds_are_a_function_of_run_and_rollout() -> None:
    seeds = [seed_of(s, id) for s in (0, 1) for id in ("0/a/0", "0/a/1", "1/a/0")]
    assert len(set(seeds)) == 6 and all(0 <= s < 2**62 for s in seeds)
    assert seed_of(0, "0/a/0") == 265298745354971938


def test_plain_draws_have_one_log_prob_and_prefixes_are_scored_once_per_prompt() -> None:
    played, responses, _ = ask(PLAIN)
    assert [r.tokens for r in responses[::2]] == [
        [8, STOP],
        [5, 6, 8, STOP],
        [7, STOP],
        [1, 2, 3, 4],
    ]
    assert [r.stopped for r in responses[::2]] == [True, True, True, False]
    assert played.scored == [[3, 5, 6], [4, 7, STOP], [4, 1, 2, 3, 4]]
    assert played.named == [f"the prefix of prompt {p}" for p in "bcd"]
    assert responses[2].logp == responses[2].drawn_logp == [-5.1, -6.2, -0.25, -0.25]
    assert responses[4].logp == [-7.1, -9.2]


def test_greedy_tokens_are_certain_where_they_are_drawn() -> None:
    _, responses, _ = ask(replace(PLAIN, temperature=0, num_generations=1))
    assert responses[0].logp == [-0.25, -0.25] and responses[0].drawn_logp == [0.0, 0.0]
    assert responses[1].drawn_logp == [-5.1, -6.2, 0.0, 0.0]


def test_where_the_draw_is_cut_the_plain_log_probs_come_from_a_second_pass() -> None:
    played, responses, _ = ask(replace(PLAIN, temperature=0.7, num_generations=1))
    assert played.scored == [[1, 2, 8, STOP], [3, 5, 6, 8, STOP], [4, 7, STOP], [4, 1, 2, 3, 4]]
    assert played.named == [f"rollout 3/{p}/0" for p in "abcd"]
    assert responses[0].logp == [-8.2, -9.3] and responses[0].drawn_logp == [-0.25, -0.25]
    assert responses[1].logp == [-5.1, -6.2, -8.3, -9.4] and responses[1].drawn_logp == [
        -5.1,
        -6.2,
        -0.25,
        -0.25,
    ]
    assert responses[2].drawn_logp == responses[2].logp == [-7.1, -9.2]


def test_finished_rollouts_are_those_of_the_sampler_in_this_process() -> None:
    """With prefixes, stop strings and rows that end by length."""
    model, tokenizer = tiny_model(seed=2), tiny_tokenizer()
    prompts = [
        Prompt(f"p{i}", tokenizer(text)["input_ids"], {"n": i}, [70] * i)
        for i, text in enumerate(["So", "First, 3 + 4 = ", "user"])
    ]
    sampling = Sampling(max_completion_length=24, num_generations=2, stop=("e", "th"))
    rollouts = HFSampler(model, tokenizer).sample(
        prompts, sampling, seed=1, step=None, policy_version=6
    )
    assert {r.finish for r in rollouts} == {"stop", "length"}
    responses = [Response(r.tokens, r.logp, r.drawn_logp, r.finish == "stop") for r in rollouts]
    assert (
        finish(prompts, sampling, rollout_ids(prompts, sampling, None), responses, tokenizer, 6)
        == rollouts
    )


def test_a_log_prob_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="not finite for rollout '0/a/0'"):
        finish(
            [Prompt("a", [1])],
            replace(PLAIN, num_generations=1),
            ["0/a/0"],
            [Response([8], [float("nan")], [0.0], True)],
            tiny_tokenizer(),
            0,
        )


@pytest.mark.parametrize(
    ("sampling", "longest", "says"),
    [
        (Sampling(temperature=0.001), 10, "outside what vLLM samples with"),
        (Sampling(temperature=2.1), 10, "outside what vLLM samples with"),
        (Sampling(), 100, "max_model_len=101"),
    ],
)
def test_what_the_engine_would_change_is_refused(
    sampling: Sampling, longest: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        check_engine(sampling, longest, 100)


def test_what_the_engine_takes() -> None:
    for temperature in (0.0, 0.01, 2.0):
        check_engine(Sampling(temperature=temperature), 99, 100)
    assert (ended("stop"), ended("length")) == (True, False)
    with pytest.raises(UserError, match="abort"):
        ended("abort")


@pytest.mark.parametrize(("vocab", "rows", "pads"), [(None, 6, False), (6, 6, False), (5, 5, True)])
def test_rows_that_pad_a_head(vocab: int | None, rows: int, pads: bool) -> None:
    head = Head(torch.zeros(6, 2), vocab=vocab)
    assert (real_rows(head), padded(head)) == (rows, pads)

"""The sampler in this process, against transformers' generate and against plain forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.body import head_of
from opdkit.objective.head import Head
from opdkit.sampling import HFSampler
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.rounding import FORWARD, forward_rounding
from tests.common.tiny import START, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [
    "What is 12 plus 30?",
    "So",
    "Question: Tom has 3 apples and buys 4 more. How many?",
    "First, 3 + 4 = ",
    "user",
]
PROMPTS = [
    Prompt(f"p{i}", TOKENIZER(text)["input_ids"], {"answer": i}) for i, text in enumerate(TEXTS)
]
DRAWN = Sampling(max_completion_length=24, num_generations=3)
STOPS = range(2, 30)
GREEDY = Sampling(temperature=0, max_completion_length=30)


def written(rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
    return {r.id: r.tokens for r in rollouts}


@torch.no_grad()
def forward_logp(model: Any, rollout: Rollout) -> Tensor:
    """[T, V]: log-probs of a plain forward pass over prompt and response, at the response."""
    logits = model(torch.tensor([rollout.prompt + rollout.tokens])).logits[
        0, len(rollout.prompt) - 1 : -1
    ]
    return logits.float().log_softmax(-1)


def of_tokens(logps: Tensor, tokens: list[int]) -> Tensor:
    return logps.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def stopping_model(kind: str = "qwen3", **config: Any) -> Any:
    """A model with so many end-of-sequence tokens that its rows end at all lengths."""
    model = tiny_model(kind, **config)
    model.generation_config.eos_token_id = list(STOPS)
    return model


def endless_tokenizer() -> Any:
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    return tokenizer


@dataclass
class Pass:
    rows: int
    tokens: int  # per row
    cached: int  # columns


@contextmanager
def passes(model: Any) -> Iterator[list[Pass]]:
    """What the body of the model is asked to do."""
    seen: list[Pass] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        rows, tokens = kwargs["input_ids"].shape
        seen.append(Pass(rows, tokens, kwargs["past_key_values"].get_seq_length()))

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


# ---------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_greedy_is_generate_token_for_token(kind: str) -> None:
    model = tiny_model(kind, seed=1)
    model.generation_config.eos_token_id = None
    free = [r.tokens for r in HFSampler(model, TOKENIZER).sample(PROMPTS, GREEDY)]
    stops = [free[0][4], free[2][11]]  # list-valued: some rows end early, at different places
    model.generation_config.eos_token_id = stops
    ours = HFSampler(model, TOKENIZER).sample(PROMPTS, GREEDY)

    width = max(len(p.tokens) for p in PROMPTS)
    ids = torch.tensor([[0] * (width - len(p.tokens)) + p.tokens for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p.tokens)) + [1] * len(p.tokens) for p in PROMPTS])
    theirs = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=30, pad_token_id=0
    )[:, width:].tolist()
    for rollout, tokens in zip(ours, theirs, strict=True):
        end = next((i + 1 for i, t in enumerate(tokens) if t in stops), len(tokens))
        assert rollout.tokens == tokens[:end]
        assert rollout.finish == ("stop" if tokens[end - 1] in stops else "length")
        assert rollout.drawn_logp == [0.0] * end
    lengths = [len(r.tokens) for r in ours]
    assert min(lengths) < max(lengths) == 30


def test_a_rollout_carries_its_provenance() -> None:
    rollouts = HFSampler(stopping_model(), TOKENIZER).sample(
        PROMPTS, DRAWN, step=4, policy_version=9
    )
    assert [r.id for r in rollouts] == [f"4/p{i}/{c}" for i in range(5) for c in range(3)]
    for i, rollout in enumerate(rollouts):
        prompt = PROMPTS[i // 3]
        assert (rollout.prompt, rollout.group, rollout.row) == (
            prompt.tokens,
            prompt.id,
            prompt.row,
        )
        assert rollout.policy_version == 9 and rollout.marks == {}
        assert rollout.trained == [True] * len(rollout.tokens)
        assert rollout.text == TOKENIZER.decode(rollout.tokens, skip_special_tokens=True)
        assert rollout.finish == ("stop" if rollout.tokens[-1] in STOPS else "length")
        assert not set(STOPS) & set(rollout.tokens[:-1]) and (
            rollout.finish == "stop" or len(rollout.tokens) == 24
        )
    assert {r.finish for r in rollouts} == {"stop", "length"}
    assert [
        r.id for r in HFSampler(tiny_model(), TOKENIZER).sample(PROMPTS[:1], DRAWN, step=None)
    ] == ["p0/0", "p0/1", "p0/2"]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2", "granite", "cohere"])
def test_recorded_log_probs_are_those_of_a_plain_forward_pass(kind: str) -> None:
    model = stopping_model(kind, **({"sliding_window": 8} if kind == "gemma2" else {}))
    for rollout in HFSampler(model, TOKENIZER).sample(PROMPTS, DRAWN):
        assert torch.allclose(
            torch.tensor(rollout.logp),
            of_tokens(forward_logp(model, rollout), rollout.tokens),
            atol=FORWARD,
        )
        assert rollout.drawn_logp == rollout.logp


def test_log_probs_of_the_drawing_distribution() -> None:
    """PITFALLS M9: what was cut is known afterwards."""
    model = tiny_model()
    sampling = replace(DRAWN, temperature=0.7, top_k=30, top_p=0.8, min_p=0.05)
    for rollout in HFSampler(model, TOKENIZER).sample(PROMPTS, sampling):
        logps = forward_logp(model, rollout)
        assert torch.allclose(
            torch.tensor(rollout.logp), of_tokens(logps, rollout.tokens), atol=FORWARD
        )
        top = (logps / 0.7).topk(30).values.softmax(-1)
        top = top * (top.cumsum(-1) - top < 0.8) * (top >= 0.05 * top[:, :1])
        expected = (
            of_tokens((logps / 0.7).softmax(-1), rollout.tokens).log()
            - ((logps / 0.7).softmax(-1).topk(30).values * (top > 0)).sum(-1).log()
        )
        assert torch.allclose(torch.tensor(rollout.drawn_logp), expected, atol=FORWARD)


def test_first_tokens_follow_the_models_probabilities() -> None:
    model, prompt, n = tiny_model(), PROMPTS[0], 4000
    rollouts = HFSampler(model, TOKENIZER).sample(
        [prompt], Sampling(max_completion_length=1, num_generations=n)
    )
    expected = forward_logp(model, rollouts[0])[0].exp() * n
    counts = torch.bincount(torch.tensor([r.tokens[0] for r in rollouts]), minlength=len(expected))
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    chi2, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert freedom > 100 and abs(chi2 - freedom) < 3 * math.sqrt(2 * freedom)


# ---------------------------------------------------------- the same, whatever the batch looks like


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_a_rollout_depends_on_no_other(kind: str) -> None:
    model = stopping_model(kind, **({"sliding_window": 8} if kind == "gemma2" else {}))
    sampling = replace(DRAWN, max_completion_length=40)
    together = written(HFSampler(model, TOKENIZER).sample(PROMPTS, sampling, seed=5))
    longest = max(len(p.tokens) for p in PROMPTS) + 40
    for rows in (1, 2, 4, 7):  # fewer rows than a group, a group and some, and refills
        assert (
            written(
                HFSampler(model, TOKENIZER, max_batch_tokens=rows * longest).sample(
                    PROMPTS, sampling, seed=5
                )
            )
            == together
        )
    assert written(HFSampler(model, TOKENIZER).sample(PROMPTS[::-1], sampling, seed=5)) == together
    alone = [written(HFSampler(model, TOKENIZER).sample([p], sampling, seed=5)) for p in PROMPTS]
    assert {k: v for part in alone for k, v in part.items()} == together
    fewer = written(
        HFSampler(model, TOKENIZER).sample(PROMPTS, replace(sampling, num_generations=1), seed=5)
    )
    assert fewer == {k: v for k, v in together.items() if k.endswith("/0")}


def test_seed_and_step_give_other_rollouts() -> None:
    sampler = HFSampler(tiny_model(), TOKENIZER)
    first = [r.tokens for r in sampler.sample(PROMPTS, DRAWN)]
    assert [r.tokens for r in sampler.sample(PROMPTS, DRAWN)] == first
    for other in (sampler.sample(PROMPTS, DRAWN, seed=1), sampler.sample(PROMPTS, DRAWN, step=1)):
        assert all(a != b.tokens for a, b in zip(first, other))
    assert len({tuple(tokens) for tokens in first}) == len(first)


def test_each_prompt_is_prefilled_once_and_finished_rows_leave() -> None:
    model = stopping_model()
    with passes(model) as seen:
        rollouts = HFSampler(model, TOKENIZER).sample(PROMPTS, DRAWN)
    longest_prompt = max(len(p.tokens) for p in PROMPTS)
    assert seen[0] == Pass(rows=len(PROMPTS), tokens=longest_prompt, cached=0)
    sizes = [(len(r.prompt), len(r.tokens)) for r in rollouts]
    running = [
        [prompt + t for prompt, length in sizes if length > t]
        for t in range(1, DRAWN.max_completion_length)
    ]
    # the step after t tokens: one row for each rollout longer than t, and no column that is padding
    # for all of them
    assert seen[1:] == [Pass(len(lengths), 1, max(lengths) - 1) for lengths in running if lengths]
    assert len({p.rows for p in seen[1:]}) > 3
    # columns left with the longest prompt's rows
    assert seen[-1].cached < longest_prompt + DRAWN.max_completion_length - 2


def test_waiting_prompts_join_the_running_batch() -> None:
    model, rows = stopping_model(), 4
    prompts = [Prompt(f"{p.id}{i}", p.tokens) for i in range(4) for p in PROMPTS]
    longest = max(len(p.tokens) for p in PROMPTS) + 24
    with passes(model) as seen:
        rollouts = HFSampler(model, TOKENIZER, max_batch_tokens=rows * longest).sample(
            prompts, replace(DRAWN, num_generations=1)
        )
    steps = [p for p in seen if p.cached]
    lengths = [len(r.tokens) for r in rollouts]
    assert max(p.rows for p in steps) == rows
    # every row of every step writes a token that is kept
    assert sum(p.rows for p in steps) == sum(lengths) - len(lengths)
    waves = [max(lengths[i : i + rows]) - 1 for i in range(0, len(lengths), rows)]
    assert len(steps) < sum(waves)


# ------------------------------------------------------------------------------------ where it ends


def test_the_token_that_pads_may_be_the_one_that_ends() -> None:
    """PITFALLS M1: the first end-of-sequence token is kept, and the one inside a prompt is attended
    to.
    """
    tokenizer, model = tiny_tokenizer(), tiny_model(pad_token_id=2)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [Prompt("a", [2, 50, 2, 60]), Prompt("b", [70])]
    rollouts = HFSampler(model, tokenizer).sample(prompts, replace(DRAWN, num_generations=20))
    assert any(r.finish == "stop" for r in rollouts)
    for rollout in rollouts:
        assert (rollout.finish == "stop") == (rollout.tokens[-1] == 2) and 2 not in rollout.tokens[
            :-1
        ]
        assert torch.allclose(
            torch.tensor(rollout.logp),
            of_tokens(forward_logp(model, rollout), rollout.tokens),
            atol=FORWARD,
        )


def test_without_an_end_of_sequence_token_every_row_runs_to_the_limit() -> None:
    rollouts = HFSampler(tiny_model(eos_token_id=None), endless_tokenizer()).sample(
        PROMPTS, replace(DRAWN, num_generations=20)
    )
    assert {(len(r.tokens), r.finish) for r in rollouts} == {(24, "length")}
    assert any(2 in r.tokens for r in rollouts)


def test_an_end_at_the_last_possible_token_is_a_stop() -> None:
    model = stopping_model()
    stopped = next(
        r
        for r in HFSampler(model, TOKENIZER).sample(PROMPTS, DRAWN)
        if len(r.tokens) > 4 and r.finish == "stop"
    )
    exact = replace(DRAWN, max_completion_length=len(stopped.tokens))
    again = {r.id: r for r in HFSampler(model, TOKENIZER).sample(PROMPTS, exact)}[stopped.id]
    assert (again.tokens, again.finish) == (stopped.tokens, "stop")
    shorter = replace(DRAWN, max_completion_length=len(stopped.tokens) - 1)
    cut = {r.id: r for r in HFSampler(model, TOKENIZER).sample(PROMPTS, shorter)}[stopped.id]
    assert (cut.tokens, cut.finish) == (stopped.tokens[:-1], "length")


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it() -> None:
    model = tiny_model()
    free = HFSampler(model, TOKENIZER).sample(PROMPTS, DRAWN)
    ascii_only = [r for r in free if sum(c < "\x7f" for c in r.text) > 6]
    text = ascii_only[0].text
    at = next(
        i
        for i in range(3, len(text) - 1)
        if text[i : i + 2].isascii() and text[i : i + 2].isprintable()
    )
    stop = (text[at : at + 2], "never written at all")
    rollouts = HFSampler(model, TOKENIZER).sample(PROMPTS, replace(DRAWN, stop=stop))
    assert any(r.id == ascii_only[0].id and r.tokens != ascii_only[0].tokens for r in rollouts)
    for rollout, whole in zip(rollouts, free, strict=True):
        texts = [
            TOKENIZER.decode(whole.tokens[: n + 1], skip_special_tokens=True)
            for n in range(len(whole.tokens))
        ]
        end = next((n + 1 for n, t in enumerate(texts) if stop[0] in t), len(texts))
        # the ids as they were written, never decoded and encoded again
        assert rollout.tokens == whole.tokens[:end]
        assert rollout.text == texts[end - 1].split(stop[0])[0]
        if stop[0] in texts[-1]:
            assert rollout.finish == "stop"


def test_a_stop_string_over_several_tokens_and_of_several_bytes() -> None:
    bytes_of = TOKENIZER("é☃")["input_ids"]
    assert len(bytes_of) == 5
    model = tiny_model()
    model.generation_config.eos_token_id = None
    sampler = HFSampler(Scripted(model, [7, 8, *bytes_of, 9, 9, 9]), endless_tokenizer())
    rollout = sampler.sample([Prompt("a", [5])], replace(GREEDY, stop=("é☃",)))[0]
    assert rollout.tokens == [7, 8, *bytes_of]
    assert (rollout.finish, rollout.text) == ("stop", TOKENIZER.decode([7, 8]))


def test_a_stop_string_that_begins_with_a_space_which_the_decoder_drops_at_the_start() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"▁w{i}": i for i in range(320)}, unk_token="▁w0"))
    core.decoder = decoders.Metaspace()
    tokenizer, model = PreTrainedTokenizerFast(tokenizer_object=core), tiny_model()
    model.generation_config.eos_token_id = None
    assert tokenizer.decode([7, 8]) == "w7 w8"
    for stop, length, text in ((" ", 2, "w7"), (" w9", 3, "w7 w8")):
        rollout = HFSampler(Scripted(model, [7, 8, 9, 9]), tokenizer).sample(
            [Prompt("a", [5])], replace(GREEDY, stop=(stop,))
        )[0]
        assert (rollout.tokens, rollout.text) == ([7, 8, 9][:length], text)


class Scripted:
    """A model that writes a script: its logits at response position t are a spike at the t-th token
    (one-token prompts).
    """

    def __init__(self, model: Any, script: list[int]):
        self.model, self.script = model, script

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_decoder(self) -> Any:
        def decoder(**kwargs: Any) -> Any:
            output = self.model.get_decoder()(**kwargs)
            position = kwargs["past_key_values"].get_seq_length() - 1
            output.last_hidden_state = (
                torch.nn.functional.one_hot(torch.tensor([[self.script[position]]]), 320) * 50.0
            )
            return output

        return decoder

    def get_output_embeddings(self) -> Any:
        linear = torch.nn.Linear(320, 320, bias=False)
        torch.nn.init.eye_(linear.weight)
        return linear


# ----------------------------------------------------------------------------------------- prefixes


def test_a_prefix_opens_the_response() -> None:
    model = tiny_model()
    free = HFSampler(model, TOKENIZER).sample(PROMPTS, DRAWN)
    prompts = [replace(p, prefix=[40 + i] * (2 * i)) for i, p in enumerate(PROMPTS)]
    rollouts = HFSampler(model, TOKENIZER, max_batch_tokens=400).sample(prompts, DRAWN)
    for i, rollout in enumerate(rollouts):
        prefix = prompts[i // 3].prefix
        assert rollout.prompt == PROMPTS[i // 3].tokens and rollout.tokens[: len(prefix)] == prefix
        assert len(prefix) < len(rollout.tokens) <= DRAWN.max_completion_length
        assert rollout.trained == [True] * len(rollout.tokens)
        assert rollout.marks.get("guided", []) == (
            [t < len(prefix) for t in range(len(rollout.tokens))] if prefix else []
        )
        assert torch.allclose(
            torch.tensor(rollout.logp),
            of_tokens(forward_logp(model, rollout), rollout.tokens),
            atol=FORWARD,
        )
        assert rollout.drawn_logp == rollout.logp
        assert rollout.text == TOKENIZER.decode(rollout.tokens, skip_special_tokens=True)
    assert written(rollouts[:3]) == written(free[:3])


def test_log_probs_of_a_prefix_are_plain_whatever_was_cut() -> None:
    prompt, sampling = (
        replace(PROMPTS[0], prefix=[50, 60, 70]),
        replace(DRAWN, temperature=0.5, top_k=2),
    )
    for rollout in HFSampler(tiny_model(), TOKENIZER).sample([prompt], sampling):
        assert rollout.drawn_logp[:3] == rollout.logp[:3]
        assert all(a != b for a, b in zip(rollout.drawn_logp[3:], rollout.logp[3:]))


@pytest.mark.parametrize(("prefix", "finish"), [([50, 60, 2], "stop"), ([50] * 24, "length")])
def test_a_prefix_may_be_the_whole_response(prefix: list[int], finish: str) -> None:
    model = tiny_model()
    prompts = [PROMPTS[0], replace(PROMPTS[1], prefix=prefix)]
    rollouts = HFSampler(model, TOKENIZER).sample(prompts, DRAWN)
    for rollout in rollouts[3:]:
        assert (rollout.tokens, rollout.finish, rollout.marks) == (
            prefix,
            finish,
            {"guided": [True] * len(prefix)},
        )
        assert torch.allclose(
            torch.tensor(rollout.logp),
            of_tokens(forward_logp(model, rollout), prefix),
            atol=FORWARD,
        )
    assert written(rollouts[:3]) == written(HFSampler(model, TOKENIZER).sample(PROMPTS[:1], DRAWN))
    for alone, beside in zip(
        HFSampler(model, TOKENIZER).sample(prompts[1:], DRAWN), rollouts[3:], strict=True
    ):
        # products of other shapes
        assert torch.allclose(torch.tensor(alone.logp), torch.tensor(beside.logp), atol=FORWARD)
        assert replace(alone, logp=beside.logp, drawn_logp=beside.drawn_logp) == beside


def test_a_stop_string_in_the_prefix_does_not_end_the_response() -> None:
    prefix = TOKENIZER("step by step")["input_ids"]
    prompt = replace(PROMPTS[0], prefix=prefix)
    free = HFSampler(tiny_model(), TOKENIZER).sample([prompt], DRAWN)
    assert (
        HFSampler(tiny_model(), TOKENIZER).sample([prompt], replace(DRAWN, stop=("step",))) == free
    )


# ---------------------------------------------------------------------- the model is left as it was


def test_dropout_gradient_checkpointing_gradients_and_random_state() -> None:
    expected = HFSampler(tiny_model(), TOKENIZER).sample(PROMPTS, DRAWN)
    model = tiny_model(attention_dropout=0.5).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.layers[1].mlp.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with passes(model) as seen:
        assert HFSampler(model, TOKENIZER).sample(PROMPTS, DRAWN) == expected
    assert {p.tokens for p in seen[1:]} == {1}  # the cache is used
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    # nothing of inference mode is left in the model
    model(torch.tensor([PROMPTS[0].tokens])).logits.sum().backward()


def test_adapters_are_sampled_with() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny_model(), config)
    rollouts = HFSampler(model, TOKENIZER).sample(PROMPTS, DRAWN)
    assert written(rollouts) != written(HFSampler(tiny_model(), TOKENIZER).sample(PROMPTS, DRAWN))
    model.eval()
    for rollout in rollouts:
        assert torch.allclose(
            torch.tensor(rollout.logp),
            of_tokens(forward_logp(model, rollout), rollout.tokens),
            atol=FORWARD,
        )


def test_the_cut_of_the_head_is_a_cut_of_the_distribution() -> None:
    """PITFALLS V2: rows that only pad the matrix do not exist."""
    model = tiny_model()
    head = head_of(model, vocab=100)
    for rollout in HFSampler(model, TOKENIZER, head=head).sample(PROMPTS, DRAWN):
        assert max(rollout.tokens) < 100
        logps = forward_logp(model, rollout)[:, :100].log_softmax(-1)
        assert torch.allclose(
            torch.tensor(rollout.logp), of_tokens(logps, rollout.tokens), atol=FORWARD
        )
    # 80 rows of padding: by default no id is drawn that the tokenizer does not have
    wide = tiny_model(vocab_size=400)
    assert max(max(r.tokens) for r in HFSampler(wide, TOKENIZER).sample(PROMPTS, DRAWN)) < 320


# --------------------------------------------------------------------------------- input and errors


def test_no_prompts_give_no_rollouts() -> None:
    assert HFSampler(tiny_model(), TOKENIZER).sample([], DRAWN) == []


def test_progress_counts_finished_rollouts() -> None:
    seen: list[int] = []
    HFSampler(stopping_model(), TOKENIZER).sample(PROMPTS, DRAWN, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 15 and len(seen) > 3


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        (
            [PROMPTS[1], Prompt("long", [5] * 4080)],
            DRAWN,
            r"prompt 'long' has 4080 tokens.*4104, but the model has 4096 positions",
        ),
        ([Prompt("none", [])], DRAWN, r"prompt 'none' has no tokens"),
        ([PROMPTS[0], PROMPTS[0]], DRAWN, r"two prompts have the id 'p0'.*num_generations"),
        (
            [replace(PROMPTS[0], prefix=[5] * 25)],
            DRAWN,
            r"prefix of prompt 'p0' has 25 tokens, more than max_completion_length=24",
        ),
        (
            [Prompt("far", [5, 320])],
            DRAWN,
            r"prompt 'far' holds token id 320.*another model's tokenizer",
        ),
        (PROMPTS, replace(DRAWN, top_p=0.0), r"sampling: top_p=0.0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    prompts: list[Prompt], sampling: Sampling, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        HFSampler(tiny_model(), TOKENIZER).sample(prompts, sampling)


def test_a_budget_too_small_for_one_row_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"max_batch_tokens=20 is less than one rollout may need \(\d+ tokens"
    ):
        HFSampler(tiny_model(), TOKENIZER, max_batch_tokens=20).sample(PROMPTS, DRAWN)


def test_broken_logits_name_the_rollout() -> None:
    model = tiny_model()
    marked = TOKENIZER.convert_tokens_to_ids(START)
    model.get_input_embeddings().weight.data[marked] = math.nan
    prompts = [PROMPTS[0], Prompt("bad", [marked, 50])]
    with pytest.raises(UserError, match=r"not finite for rollout '0/bad/0'"):
        HFSampler(model, TOKENIZER).sample(prompts, DRAWN)
    with pytest.raises(UserError, match=r"not finite for rollout '0/p0/0'"):
        HFSampler(model, TOKENIZER).sample([replace(PROMPTS[0], prefix=[marked, 50])], DRAWN)


def test_a_model_that_reads_padding_into_its_state_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    with pytest.raises(UserError, match="MambaForCausalLM reads a row otherwise when it is padded"):
        HFSampler(model, TOKENIZER, max_batch_tokens=1000).sample(PROMPTS[:1], DRAWN)


def test_sixteen_bit_weights_and_a_float64_model() -> None:
    prompt = torch.tensor([PROMPTS[2].tokens])
    for dtype, tolerance in (
        (torch.bfloat16, forward_rounding(tiny_model(), prompt, torch.bfloat16)),
        (torch.float64, 1e-6),
    ):
        model = tiny_model().to(dtype)
        head: Head = head_of(model)
        for rollout in HFSampler(model, TOKENIZER, head=head).sample(PROMPTS, DRAWN):
            expected = of_tokens(forward_logp(model, rollout), rollout.tokens)
            assert torch.allclose(torch.tensor(rollout.logp), expected, atol=tolerance)

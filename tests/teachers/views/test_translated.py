"""A teacher with another tokenizer: bytes of tokens, spans of equal text whatever is written, and
distributions at the right places.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.models.body import head_of
from opdkit.models.layout import Layout
from opdkit.models.token_bytes import same_tokens, token_bytes
from opdkit.models.tokenizers import real_vocabulary, same_tokenizer
from opdkit.objective.alignment import EOS, OUT, SpanFact, align
from opdkit.objective.head import flat_positions, learn
from opdkit.objective.needs import Needs
from opdkit.recipes import arithmetic
from opdkit.teachers import LocalModel, Routed
from opdkit.teachers.views.translated import (
    SameTokenizer,
    Translated,
    common_ends,
    refuse_chat,
    translated,
    whole_characters,
)
from opdkit.train.gather import gather
from opdkit.types import Rollout
from tests.common.other_tokenizers import normalising, sentencepiece, teacher_of
from tests.common.rounding import rounding
from tests.common.tiny import tiny_model, tiny_tokenizer

END = 2  # id of the end of sequence in all of them
PLAIN: dict[str, Any] = {"template": None, "system": None, "chat": False, "enable_thinking": None}
KINDS = {
    "bytes": lambda: tiny_tokenizer(chat_template=False),
    "sentencepiece": sentencepiece,
    "with a space in front": lambda: sentencepiece(space=True, bos=True),
    "NFC": normalising,
}


@cache
def tokenizer(kind: str) -> Any:
    return KINDS[kind]()


@cache
def known(kind: str) -> Any:
    return token_bytes(tokenizer(kind))


@cache
def teacher(kind: str, student: str = "bytes") -> Translated:
    """A tiny teacher that hears a student with another tokenizer."""
    model = teacher_of(tokenizer(kind))
    return translated(
        LocalModel(model, head_of(model)), tokenizer(student), tokenizer(kind), {END}, PLAIN
    )


def rollout(
    ids: list[int], prompt: str = "Tom has", name: str = "0/0", student: str = "bytes", **more: Any
) -> Rollout:
    row = {"id": name, "prompt": prompt}
    logp = [-1.0] * len(ids)
    return Rollout(
        name,
        tokenizer(student)(prompt)["input_ids"],
        ids,
        [True] * len(ids),
        logp,
        logp,
        name,
        row=row,
        **more,
    )


def source(scorer: Any, rollouts: list[Rollout]) -> Any:
    width = max(len(r.tokens) for r in rollouts)
    mask = torch.arange(width) < torch.tensor([len(r.tokens) for r in rollouts])[:, None]
    return scorer.source(Layout(rollouts, width), flat_positions(mask))


# -------------------------------------------------------------------------------------------- bytes

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=24)
ODD = "naïve 日本語 🎉 é\n\t x  y"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@settings(max_examples=60, deadline=None)
@example(text=ODD)
@given(text=TEXT)
def test_the_bytes_of_tokens_are_those_of_the_text(kind, text):
    ids = tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    assert known(kind).join(ids) == text.encode()
    assert known(kind).ends(ids).tolist() == [
        len(known(kind).join(ids[: i + 1])) for i in range(len(ids))
    ]


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 319), max_size=12))
def test_the_bytes_of_any_ids_are_what_the_tokenizer_decodes(ids):
    data = known("bytes").join(ids)
    said = tokenizer("bytes").decode(ids, skip_special_tokens=False)
    assert said.startswith(whole_characters(data))
    if "\ufffd" not in said:
        assert data.decode() == said


def test_tokens_that_are_part_of_a_character():
    for kind, pieces in (("bytes", 4), ("sentencepiece", 4)):
        ids = tokenizer(kind)("🎉", add_special_tokens=False)["input_ids"]
        assert len(ids) == pieces and known(kind).ends(ids).tolist() == [1, 2, 3, 4]


def test_tokens_of_other_kinds():
    assert token_bytes(arithmetic.tokenizer()).pieces[3:6] == [b"0", b"1", b"2"]
    own = tiny_tokenizer()
    own.add_tokens(["<think>"])
    assert token_bytes(own).pieces[-1] == b"<think>"


# -------------------------------------------------------------------------------------------- spans


def check_spans(student: str, kind: str, ids: list[int]) -> int:
    """Every span is the same text on both sides; returns the number of bytes in spans."""
    text = whole_characters(known(student).join(ids))
    theirs = tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    mine, other = common_ends(
        known(student).ends(ids),
        known(kind).ends(theirs),
        text.encode(),
        known(kind).join(theirs),
        True,
    )
    spans = align(*(torch.tensor(x).view(1, -1) for x in (mine, other)))
    covered = 0
    for last, n, end, m in zip(*(x.tolist() for x in spans)):
        a, b = (
            known(student).join(ids[last - n + 1 : last + 1]),
            known(kind).join(theirs[end - m + 1 : end + 1]),
        )
        assert a == b or (covered == 0 and b" " + a == b)  # the space that stands before every text
        covered += len(a)
    assert known(student).join(ids)[:covered] == text.encode()[:covered]
    # nothing rewritten or cut: no byte is left
    if known(kind).join(theirs) == text.encode() == known(student).join(ids):
        assert covered == len(text.encode())
    return covered


@pytest.mark.parametrize("kind", ["sentencepiece", "with a space in front", "NFC"])
@settings(max_examples=60, deadline=None)
@example(text=ODD)
@given(text=TEXT)
def test_spans_of_any_text(kind, text):
    """Identity 8 with trained tokenizers: each span is the same text on both sides, and together
    they are the whole.
    """
    covered = check_spans(
        "bytes", kind, tokenizer("bytes")(text, add_special_tokens=False)["input_ids"]
    )
    if kind == "sentencepiece" and "<" not in text:
        assert covered == len(text.encode())


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(3, 319), max_size=16))
def test_spans_of_any_ids(ids):
    """What a student draws need not be text: behind the first byte that is none nothing is
    compared.
    """
    covered = check_spans("bytes", "sentencepiece", ids)
    assert covered <= len(whole_characters(known("bytes").join(ids)).encode())
    assert check_spans("sentencepiece", "bytes", [i % 256 + 4 for i in ids]) >= 0


def test_a_response_cut_inside_a_character():
    """V3: the left-over bytes of a character are no text, their tokens are out on both sides."""
    ids = tokenizer("bytes")("ab 🎉", add_special_tokens=False)["input_ids"][:-2]
    found = source(teacher("sentencepiece"), [rollout(ids, finish="length")]).alignment
    assert found.student_ends.tolist() == [[1, 2, 3, OUT, OUT]] and found.ends.tolist() == [
        [1, 2, 3]
    ]


def test_what_the_teachers_tokenizer_rewrites_ends_what_is_compared():
    ids = tokenizer("bytes")("Tom e\u0301 Tom", add_special_tokens=False)["input_ids"]
    ends = source(teacher("NFC"), [rollout(ids)]).alignment
    # "Tom ", and not the letter with its accent apart
    assert ends.student_ends.max() == 4 == ends.ends.max()
    loud = normalising("Lowercase")
    model = teacher_of(loud)
    deaf = translated(LocalModel(model, head_of(model)), tokenizer("bytes"), loud, {END}, PLAIN)
    with pytest.raises(
        UserError, match="not one response of this step comes out of the teacher's tokenizer"
    ):
        source(deaf, [rollout(tokenizer("bytes")("TOM")["input_ids"])])


def test_a_space_before_every_text_is_part_of_no_span():
    ids = tokenizer("bytes")("Tom buys", add_special_tokens=False)["input_ids"]
    found = source(teacher("with a space in front"), [rollout(ids)]).alignment
    assert found.ends[0].tolist() == [OUT, 1, 2, 3, 4, 5, 6, 7, 8]  # the space alone, T, o, m ...
    spaced = tokenizer("bytes")(" Tom", add_special_tokens=False)["input_ids"]
    found = source(teacher("with a space in front"), [rollout(spaced)]).alignment
    assert found.ends[0].tolist() == [OUT, 1, 2, 3, 4]


def test_special_tokens_in_the_middle_are_their_text_and_the_end_of_sequence_is_none():
    ids = [1, *tokenizer("bytes")("ab", add_special_tokens=False)["input_ids"], END]
    found = source(teacher("sentencepiece"), [rollout(ids)]).alignment
    assert found.student_ends.tolist() == [[12, 13, 14, EOS]] and found.ends[0, -3:].tolist() == [
        13,
        14,
        EOS,
    ]
    assert found.tokens[0, -1] == END
    middle = source(teacher("sentencepiece"), [rollout([ids[1], END, ids[2]])]).alignment
    assert middle.student_ends.tolist() == [[1, 11, 12]]  # not where it ends nothing


def test_only_an_end_of_sequence():
    scorer = teacher("sentencepiece")
    found = source(scorer, [rollout([END]), rollout([], name="0/1"), rollout([5, 6], name="0/2")])
    assert found.alignment.student_ends.tolist() == [[EOS, OUT], [OUT, OUT], [1, 2]]
    for skip, ends in ((True, [[0, 0], [0, 0], [1, 1]]), (False, [[1, 0], [0, 0], [1, 1]])):
        fact = SpanFact("teacher", "tokens", "bayesian", not skip)
        assert found.read(fact, torch.tensor([[1, 0], [0, 0], [1, 1]]).bool()).tolist() == ends


# ------------------------------------------------------------------------------------ distributions


def naive(scorer: Translated, r: Rollout, ids: list[int]) -> torch.Tensor:
    """[U, V]: log-probs of the teacher's tokens of a response, alone."""
    prompt = scorer.prompt(r)
    with torch.no_grad():
        logits = scorer.scorer.model(input_ids=torch.tensor([prompt + ids])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("merge", ["bayesian", "observed", "index"])
@pytest.mark.parametrize("kind", ["sentencepiece", "with a space in front", "NFC"])
def test_distributions_and_factors_are_those_of_each_row_alone(kind, merge):
    scorer, encode = teacher(kind), tokenizer("bytes")
    texts = ["3 + 4 = 7. So the answer", "Let us think step", "日本 café", "x"]
    ends = [[END], [], [END], []]
    ids = [
        [*encode(text, add_special_tokens=False)["input_ids"], *end]
        for text, end in zip(texts, ends)
    ]
    rows = [rollout(x, f"Tom has {i}", f"0/{i}") for i, x in enumerate(ids)]
    found = source(scorer, rows)
    width = max(len(r.tokens) for r in rows)
    mask = torch.arange(width) < torch.tensor([len(r.tokens) for r in rows])[:, None]
    facts = {
        what: found.read(SpanFact("teacher", what, merge, temperature=2.0), mask)
        for what in ("tokens", "logp", "single")
    }
    at = (facts["tokens"] > 0).flatten().nonzero()[:, 0]
    (pair,) = found.pairs(at, SpanFact("teacher", "vocabulary", merge), 320)
    assert pair.at is None and len(at) == len(pair.vocabulary.logits) >= len(texts)
    spans = {
        int(a): x for a, *x in zip(*found.spans["index" if merge == "index" else "bytes", False])
    }
    for i, position in enumerate(at.tolist()):
        b = position // width
        ids = found.alignment.tokens[b].tolist()
        n, end, m = (int(x) for x in spans[position])
        last = end % found.alignment.ends.shape[1]
        alone = naive(scorer, rows[b], ids)
        row = last - m + 1 if merge == "observed" else last
        torch.testing.assert_close(
            pair.vocabulary.logits[i].log_softmax(-1), alone[row], rtol=0, atol=1e-9
        )
        hot = (alone / 2).log_softmax(-1)
        others = [k for k in range(last - m + 1, last + 1) if k != row]
        factor = sum(max(float(hot[k, ids[k]]), np.log(1e-8)) for k in others)
        assert facts["logp"].flatten()[position].item() == pytest.approx(factor, abs=1e-9)
        assert facts["single"].flatten()[position].item() == (n == m == 1)
    assert (facts["logp"] != 0).any() or merge == "index"


def test_the_start_of_sequence_is_on_one_side_only():
    """V3."""
    scorer = teacher("with a space in front")
    row = rollout([5, 6])
    assert scorer.prompt(row)[0] == 1 and row.prompt == tokenizer("bytes")("Tom has")["input_ids"]


def test_the_teacher_is_asked_in_its_own_chat_template():
    student, other = tiny_tokenizer(), sentencepiece(chat=True)
    model = teacher_of(other)
    asked = {"template": None, "system": "Be brief.", "chat": True, "enable_thinking": None}
    scorer = translated(LocalModel(model, head_of(model)), student, other, {END}, asked)
    assert (
        other.decode(scorer.prompt(rollout([5])))
        == "<turn>system\nBe brief.</s>\n<turn>user\nTom has</s>\n<turn>assistant\n"
    )
    with pytest.raises(
        UserError, match=r"has none: use an instruction-tuned teacher, or data.chat=false"
    ):
        refuse_chat(True, tokenizer("sentencepiece"))


def test_without_a_prompt_the_first_span_is_left_out():
    scorer, ids = (
        teacher("sentencepiece"),
        tokenizer("bytes")("Tom buys", add_special_tokens=False)["input_ids"],
    )
    found = source(replace(scorer, prompt=lambda r: []), [rollout([*ids, END])])
    first = source(scorer, [rollout([*ids, END])])
    whole = torch.ones(1, len(ids) + 1, dtype=torch.bool)
    fact = SpanFact("teacher", "tokens", "bayesian", True)
    a, b = found.read(fact, whole)[0].tolist(), first.read(fact, whole)[0].tolist()
    assert a[0] == 0 and a[1:-1] == b[1:-1] and b[0] > 0 and (a[-1], b[-1]) == (0, 1)


def test_a_response_longer_than_the_teacher_reads_is_refused():
    short = teacher_of(tokenizer("sentencepiece"), max_position_embeddings=12)
    scorer = translated(
        LocalModel(short, head_of(short)),
        tokenizer("bytes"),
        tokenizer("sentencepiece"),
        {END},
        PLAIN,
    )
    with pytest.raises(UserError, match="the teacher reads 12: lower max_completion_length"):
        source(scorer, [rollout(tokenizer("bytes")("Tom buys apples")["input_ids"])])


# ----------------------------------------------------------------------------------------- the same


def test_tokens_correspond_by_what_they_stand_for():
    """A leading space is a space however it is spelt; a byte token gives way to the token of that
    character; ends of sequence are ends.
    """
    a, b = tokenizer("bytes"), tokenizer("sentencepiece")
    same = same_tokens(known("bytes"), known("sentencepiece"), (END, END))
    pairs = {
        b.convert_ids_to_tokens(t): a.convert_ids_to_tokens(s)
        for t, s in enumerate(same.tolist())
        if s >= 0
    }
    assert (
        pairs["T"] == "T"
        and pairs["▁"] == "Ġ"
        and pairs["</s>"] == "<|im_end|>"
        and pairs["<0x78>"] == "x"
    )
    assert "<0x54>" not in pairs and pairs["<0xF0>"] == a.convert_ids_to_tokens(
        known("bytes").pieces.index(b"\xf0")
    )
    kept = [s for s in same.tolist() if s >= 0]
    assert len(set(kept)) == len(kept)
    for t, s in enumerate(same.tolist()):
        assert s < 0 or t == END or known("bytes").pieces[s] == known("sentencepiece").pieces[t]


def test_one_tokenizer_is_known_whatever_the_matrices():
    """V1, V2: tokens are compared, not sizes; the very tokens are scored, never text; the end of
    sequence is marked.
    """
    assert same_tokenizer(tokenizer("bytes"), tiny_tokenizer(chat_template=False)) is None
    model = tiny_model("llama", 334, seed=3).double()  # 14 rows that pad
    scorer = SameTokenizer(LocalModel(model, head_of(model)), frozenset({END})).cut(320)
    odd = [200, END, 201, END]  # no text at all
    found = source(scorer, [rollout(odd), rollout([5], name="0/1")])
    assert (
        found.alignment.student_ends.tolist() == [[1, 2, 3, EOS], [1, OUT, OUT, OUT]]
        and found.vocabulary == 320
    )
    (pair,) = found.pairs(torch.tensor([0, 1, 2, 3, 4]), SpanFact("teacher", "vocabulary"), 320)
    row = rollout(odd)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([row.prompt + odd])).logits[
            0, len(row.prompt) - 1 : -1, :320
        ]
    torch.testing.assert_close(pair.vocabulary.logits[:4], alone, rtol=0, atol=1e-9)
    assert real_vocabulary(tokenizer("bytes")) == 320


# ---------------------------------------------------------------------------------------- in a step


def gradient(
    method: Any,
    student: Any,
    scorers: dict[str, Any],
    rows: list[Rollout],
    chunk: int | None = None,
) -> torch.Tensor:
    batch = gather(rows, method.needs, scorers, dtype=torch.float64)
    plan = method.objective.plan(batch)
    layout = Layout(rows, batch.shape[1])
    student.zero_grad()
    for positions in layout.micro_batches(flat_positions(plan.selected), 64):
        learn(
            plan, positions, layout.states(student, positions), head_of(student), chunk
        ).loss.backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "name",
    [
        "uld",
        "gold",
        "gold(hybrid=true, merge=bayesian)",
        "gold(hybrid=true, longer=rank, skip_eos=false)",
    ],
)
def test_a_step_with_teachers_of_several_tokenizers_is_the_mean_of_its_rows(name):
    """Rows routed to a teacher with the student's tokenizer, and to two with others; each row's
    loss is what it is alone.
    """
    student = tiny_model("qwen3", seed=1).double()
    own = tiny_model("llama", seed=2).double()
    scorer = {
        "near": SameTokenizer(LocalModel(own, head_of(own)), frozenset({END})),
        "far": teacher("sentencepiece"),
        "farther": teacher("with a space in front"),
    }
    method, encode = load(name), tokenizer("bytes")
    rows = []
    for i, (text, route) in enumerate(
        (
            ("3 + 4 = 7.", "far"),
            ("Tom café", "near"),
            ("step by step", "farther"),
            ("日本 Tom", "far"),
        )
    ):
        made = rollout(
            [*encode(text, add_special_tokens=False)["input_ids"], END], f"Tom has {i}", f"0/{i}"
        )
        made.row["teacher"] = route
        rows.append(made)
    scorers = {"student": LocalModel(student, head_of(student)), "teacher": Routed(scorer)}
    whole = gradient(method, student, scorers, rows)
    torch.testing.assert_close(
        gradient(method, student, scorers, rows, chunk=1), whole, rtol=1e-9, atol=1e-12
    )
    count = sum(len(r.tokens) for r in rows)
    total = torch.zeros_like(whole)
    for r in rows:
        alone = gradient(
            method,
            student,
            {"student": scorers["student"], "teacher": scorer[r.row["teacher"]]},
            [r],
        )
        near = r.row["teacher"] == "near" and name != "uld"
        total += alone * (len(r.tokens) / count if near else 1 / len(rows))
    norms = rounding(
        torch.float32, 1.0, 5 * 32
    )  # 5 of these models' 32 numbers, in float32 whatever the model is in
    assert (whole - total).norm() < norms * whole.norm() and whole.norm() > 1e-4


def test_a_learnt_step_is_nearer():
    """Gradient descent on the hybrid loss brings the student's distributions to the teacher's,
    token by token.
    """
    student = tiny_model("qwen3", seed=1).double()
    method, encode = load("gold", hybrid=True, lmbda=1.0, beta=0.0), tokenizer("bytes")
    rows = [
        rollout(encode(t, add_special_tokens=False)["input_ids"], name=f"0/{i}")
        for i, t in enumerate(("3 + 4 = 7.", "Tom buys"))
    ]
    scorers = {
        "student": LocalModel(student, head_of(student)),
        "teacher": teacher("sentencepiece"),
    }
    optimiser, losses = torch.optim.Adam(student.parameters(), 3e-3), []
    for _ in range(15):
        batch = gather(rows, method.needs, scorers, dtype=torch.float64)
        plan, layout = method.objective.plan(batch), Layout(rows, batch.shape[1])
        at = flat_positions(plan.selected)
        loss = learn(plan, at, layout.states(student, at), head_of(student)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_it_reads_is_gathered_and_nothing_else():
    batch = gather(
        [rollout([5, 6])],
        load("gold").needs,
        {"teacher": teacher("sentencepiece")},
        dtype=torch.float64,
    )
    assert set(batch.sources) == {"teacher"} and {
        f.what for f in batch.facts if isinstance(f, SpanFact)
    } == {
        "tokens",
        "logp",
        "shared",
    }
    assert Needs(frozenset({SpanFact("teacher", "vocabulary", "index")})).whole("teacher")

"""A cache gives back what was put in, to float16; it notices a changed byte, and says what it does
not hold.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdkit.base.errors import UserError
from opdkit.data import shards
from opdkit.data.cache import (
    CachedPrompts,
    Entry,
    Manifest,
    Origin,
    is_cache,
    open_cache,
    read_manifest,
    shard_name,
    student_notes,
    verified,
)
from opdkit.data.shards import Scored, write_shard
from opdkit.models.identity import Identity, tokenizer_digest
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.tiny import tiny_tokenizer

STUDENT, TEACHER = Identity("student", "a" * 64), Identity("teacher", "b" * 64)
ORIGIN = Origin(
    STUDENT,
    TEACHER,
    "c" * 64,
    "d" * 64,
    5,
    Sampling(num_generations=2),
    0,
    3,
    "float32",
    "float32",
    2,
)


def stored(
    seed: int, prompts: int = 5, generations: int = 2, k: int = 3, length: int = 40
) -> list[tuple[Rollout, Scored]]:
    """Made-up rollouts of every length from 1, with log-probs of every size."""
    rng = np.random.default_rng(seed)

    def logps(*shape: int) -> np.ndarray:
        return -np.exp(rng.uniform(-20, 5, shape)).astype(np.float32)

    out = []
    for p in range(prompts):
        prompt = rng.integers(300, size=1 + p).tolist()
        for g in range(generations):
            n = 1 + int(rng.integers(length))
            row = {
                "id": f"q{p}",
                "prompt": f"Question {p}? é",
                "answer": str(p),
                "more": [1, {"a": None}],
            }
            tokens, logp = rng.integers(300, size=n).tolist(), logps(n).tolist()
            made = Rollout(
                f"q{p}/{g}",
                prompt,
                tokens,
                [True] * n,
                logp,
                logp,
                f"q{p}",
                0,
                ["stop", "length"][g],
                f"text {g}\n",
                row=row,
            )
            out.append((made, Scored(logps(n), rng.integers(300, size=(n, k)), logps(n, k))))
    return out


def write(
    folder: Path, pairs: list[tuple[Rollout, Scored]], origin: Origin = ORIGIN, drawn: bool = False
) -> Path:
    """A cache of these rollouts, two prompts to a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    size, entries = origin.prompts_per_shard * origin.sampling.num_generations, {}
    for number in range(origin.shards):
        part = pairs[number * size : (number + 1) * size]
        name = shard_name(number)
        digest = write_shard(folder / name, [r for r, _ in part], [s for _, s in part], drawn)
        entries[name] = Entry(name, digest, len(part), sum(len(r.tokens) for r, _ in part))
    Manifest(origin, entries).write(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "cache", stored(0))


def prompt(rollout: Rollout) -> Prompt:
    return Prompt(rollout.group, rollout.prompt, rollout.row)


def half(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).astype(np.float16).astype(np.float32)


def test_what_was_put_in_comes_back_rounded_to_float16(folder: Path) -> None:
    cache, pairs = open_cache(folder), stored(0)
    assert [row["id"] for row in cache.rows] == ["q0", "q1", "q2", "q3", "q4"] and cache.rows[
        2
    ] == pairs[4][0].row
    for number, (rollout, scores) in reversed(list(enumerate(pairs))):  # in any order
        again = cache.rollouts(prompt(rollout))[number % 2]
        rounded = half(rollout.logp).tolist()
        assert again == replace(rollout, logp=rounded, drawn_logp=rounded, policy_version=-1)
        found = cache.scores(again)
        assert (found.logp == half(scores.logp)).all() and (
            found.top_logp == half(scores.top_logp)
        ).all()
        assert (found.top_ids == scores.top_ids).all()


def test_the_rounding_is_relative_to_the_eleventh_bit(tmp_path: Path) -> None:
    pairs = stored(1, prompts=40, length=200)
    cache = open_cache(write(tmp_path / "c", pairs, replace(ORIGIN, prompts=40)))
    exact = np.concatenate([s.logp for _, s in pairs])
    found = np.concatenate([cache.scores(r).logp.astype(np.float32) for r, _ in pairs])
    assert (
        len(exact) > 5000
        and (np.abs(found - exact) <= np.maximum(np.abs(exact) * 2**-11, 2**-25)).all()
    )
    relative = np.abs(found - exact) / np.abs(exact)
    assert relative[np.abs(exact) > 1e-4].max() > 2**-12  # the bound is no wider than need be


def test_a_log_prob_takes_about_two_bytes_whatever_its_value(tmp_path: Path) -> None:
    """Random ones, which no compression makes smaller than they must be."""
    pairs = stored(2, prompts=64, k=20, length=300)
    path = write(
        tmp_path / "c", pairs, replace(ORIGIN, prompts=64, prompts_per_shard=64, top_k=20)
    ) / shard_name(0)
    file = shards.Shard.open(path).file
    tokens = sum(len(r.tokens) for r, _ in pairs)
    sizes = dict.fromkeys(file.schema_arrow.names, 0)
    for group in range(file.metadata.num_row_groups):
        for column in range(file.metadata.num_columns):
            part = file.metadata.row_group(group).column(column)
            sizes[part.path_in_schema.split(".")[0]] += part.total_compressed_size
    assert (
        1.5 < sizes["teacher_logp"] / tokens < 2.2 and 1.5 < sizes["top_logp"] / tokens / 20 < 2.2
    )


def test_minus_infinity_and_a_distribution_of_ones_own_are_kept(tmp_path: Path) -> None:
    (rollout, scores), *rest = stored(3)
    scores.top_logp[0, 2] = -np.inf
    rollout = replace(rollout, drawn_logp=[x / 2 for x in rollout.logp])
    cache = open_cache(write(tmp_path / "c", [(rollout, scores), *rest], drawn=True))
    assert cache.scores(cache.rollouts(prompt(rollout))[0]).top_logp[0, 2] == -np.inf
    again = cache.rollouts(prompt(rollout))[0]
    assert (
        again.drawn_logp == half(rollout.drawn_logp).tolist()
        and again.logp == half(rollout.logp).tolist()
    )


def test_only_the_columns_and_row_groups_that_are_asked_for_are_read(tmp_path: Path) -> None:
    pairs = stored(4, prompts=40)
    cache = open_cache(
        write(tmp_path / "c", pairs, replace(ORIGIN, prompts=40, prompts_per_shard=40))
    )
    rollout = pairs[50][0]
    seen = []
    real = shards.Shard.read
    try:
        shards.Shard.read = lambda self, columns, group=None: (
            seen.append((group, columns)) or real(self, columns, group)
        )  # type: ignore[method-assign, func-returns-value]
        cache.rollouts(prompt(rollout))
        cache.rollouts(prompt(rollout))
    finally:
        shards.Shard.read = real  # type: ignore[method-assign]
    # the fourth sixteen; the second time nothing
    assert seen == [(3, ("tokens", "finish", "text", "logp", "drawn_logp"))]


def test_a_cache_is_opened_once_until_a_file_changes(folder: Path) -> None:
    first = open_cache(folder)
    assert open_cache(str(folder) + "/") is first
    os.utime(folder / shard_name(1), ns=(1, 1))
    assert open_cache(folder) is not first


def test_any_changed_byte_is_found_and_its_shard_named(folder: Path) -> None:
    rng = random.Random(0)
    for number in range(12):
        path = folder / shard_name(number % 3)
        good = path.read_bytes()
        at, bit = rng.randrange(len(good)), 1 << rng.randrange(8)
        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        with pytest.raises(
            UserError,
            match=f"{path.name} is damaged: .*digest differs.*rewrites that shard and no other",
        ):
            open_cache(folder)
        path.write_bytes(good)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is damaged: the file is missing"):
        open_cache(folder)


def manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_reads_as_it_was_written(folder: Path) -> None:
    assert (
        read_manifest(folder).origin == ORIGIN
        and is_cache(folder)
        and not is_cache(folder.parent)
        and not is_cache(None)
    )
    before = (folder / "manifest.json").read_bytes()
    read_manifest(folder).write(folder)
    assert (folder / "manifest.json").read_bytes() == before
    told = json.loads(before)
    assert (
        told["complete"]
        and told["rollouts"] == 10
        and told["tokens"] == sum(len(r.tokens) for r, _ in stored(0))
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shards": []}, "is not complete: it has 0 of 3 shards"),
        ({"format": 2}, "no cache of format 1"),
        ({"kind": "weights"}, "no cache of format 1"),
        ({"sampling": None}, "is damaged"),
        ({"shards": [{"name": "x"}]}, "is damaged"),
    ],
)
def test_a_manifest_of_something_else_is_refused(
    folder: Path, change: dict[str, Any], words: str
) -> None:
    manifest(folder, **change)
    with pytest.raises(UserError, match=words):
        verified(folder)


def test_no_manifest_or_half_of_one(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"kind": "opd')
    with pytest.raises(UserError, match="cannot be read"):
        verified(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds no cache.*cache-teacher"):
        verified(folder)


def test_other_tokens_than_those_that_were_scored_are_refused(folder: Path) -> None:
    cache, (rollout, _) = open_cache(folder), stored(0)[3]
    for other in (
        replace(rollout, tokens=[*rollout.tokens[:-1], rollout.tokens[-1] + 1]),
        replace(rollout, tokens=rollout.tokens[:-1]),
        replace(rollout, prompt=[1, *rollout.prompt]),
    ):
        with pytest.raises(
            UserError, match="q1/1 has other tokens than the one that the teacher scored"
        ):
            cache.scores(other)
    with pytest.raises(UserError, match=r"0/q1/1 is not in .*its teacher never scored it"):
        cache.scores(replace(rollout, id="0/q1/1"))
    with pytest.raises(UserError, match="prompt q1 has other tokens"):
        cache.rollouts(Prompt("q1", [7]))
    with pytest.raises(UserError, match=r"1 prompts of the data are not in .* for example q9"):
        cache.refuse_unknown(["q1", "q9"])


def test_its_prompts_are_the_stored_ids_and_its_tokenizer_must_be_the_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    cache = open_cache(
        write(tmp_path / "c", stored(0), replace(ORIGIN, tokenizer=tokenizer_digest(tokenizer)))
    )
    prompts = CachedPrompts(cache, cache.rows, tokenizer)
    assert [p.tokens for p in prompts] == [r.prompt for r, _ in stored(0)[::2]] and prompts[3].row[
        "answer"
    ] == "3"
    assert len(CachedPrompts(cache, cache.rows, tokenizer, 3)) == 3  # the longer ones are dropped
    with pytest.raises(UserError, match=r"data\.template writes prompts as text"):
        CachedPrompts(cache, cache.rows, tokenizer, template="{prompt}", chat=None)
    with pytest.raises(UserError, match="tokenizer is not that of"):
        CachedPrompts(cache, cache.rows, tiny_tokenizer(["abcabc dada"]))


def test_what_differs_is_named_setting_by_setting() -> None:
    assert (
        ORIGIN.differences(replace(ORIGIN, student=replace(STUDENT, name="/elsewhere/student")))
        == []
    )
    other = replace(
        ORIGIN,
        top_k=8,
        sampling=replace(ORIGIN.sampling, temperature=0.7),
        teacher=Identity("teacher", "e" * 64),
        data="x",
    )
    said = ORIGIN.differences(other)
    assert said == [
        "teacher teacher (bbbbbbbbbbbb) there, teacher (eeeeeeeeeeee) now",
        "other prompts (their order, tokens or rows)",
        "temperature 1.0 there, 0.7 now",
        "top_k 3 there, 8 now",
    ]


def test_notes_on_the_pair_of_models(tmp_path: Path) -> None:
    cache = open_cache(write(tmp_path / "a", stored(0)))
    assert student_notes(cache, replace(STUDENT, name="copy of it")) == []
    (note,) = student_notes(cache, Identity("trained", "f" * 64))
    assert "written by student (aaaaaaaaaaaa), not by the student trained (ffffffffffff)" in note
    assert replace(ORIGIN, sft_teacher=Identity("my/teacher", "b" * 64)).notes() == []
    (note,) = replace(ORIGIN, sft_teacher=Identity("other")).notes()
    assert (
        "fine-tuned on responses of other, and teacher (bbbbbbbbbbbb) scored" in note
        and "biased" in note
    )


def test_rows_keep_what_json_has_no_form_for(tmp_path: Path) -> None:
    """Tuples, numbers as keys, sets: what a reward reads is what it would have read without the
    cache.
    """
    pairs = stored(0)
    odd = {"config": {"shape": (2, 3), "names": {1: {"a"}}}, "options": [("a", 1)]}
    odd_pairs = [(replace(r, row={**r.row, **odd}), s) for r, s in pairs]
    cache = open_cache(write(tmp_path / "cache", odd_pairs))
    assert cache.rows[0] == odd_pairs[0][0].row
    assert type(cache.rows[0]["config"]["shape"]) is tuple
    assert type(cache.rows[0]["options"][0]) is tuple


def test_reasoning_gyms_scorer_pays_a_cached_row_as_the_row(tmp_path: Path) -> None:
    """rearc compares tuples of tuples; as lists its own answer would be worth 0.05."""
    pytest.importorskip("reasoning_gym")
    from opdkit.data import load_rows
    from opdkit.rewards.gym import ReasoningGym

    [row] = load_rows("reasoning_gym:rearc?size=1&seed=1")
    pairs = [(replace(r, row={**row, "id": r.row["id"]}), s) for r, s in stored(0)]
    [cached, *_] = open_cache(write(tmp_path / "cache", pairs)).rows
    answer = f"<answer>{row['answer']}</answer>"
    rollout = Rollout("r", [1], [2], [True], [0.0], [0.0], "p", text=answer, row=cached)
    assert ReasoningGym()(rollout) == 1.0

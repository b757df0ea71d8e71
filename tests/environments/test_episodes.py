"""Episodes: who wrote what, where they end, what is learnt of them, and what a faulty environment
comes to.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.environments import Dialogue, Environment, EpisodeSampler, Scored
from opdkit.environments.episodes import seed_of
from opdkit.environments.own import OwnEnvironment
from opdkit.methods.method import load
from opdkit.sampling import HFSampler
from opdkit.testing import evaluate
from opdkit.train.gather import collate
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = 2
DRAWN = Sampling(max_completion_length=150, num_generations=2)


class Counts(Environment):
    """Tells how long each turn was; over after so many."""

    left = 3
    closed = 0

    def reset(self, row, seed):
        self.turns, self.seed, self.row = [], seed, row
        return f"Row {row['n']}?"

    def step(self, action):
        self.turns.append(action)
        return f"{len(action)} signs"

    @property
    def done(self):
        return len(self.turns) >= self.left

    def score(self):
        return Scored(len(self.turns) / 10, len(self.turns) > 1, f"{self.turns}")

    def close(self):
        type(self).closed += 1


class Rounds(HFSampler):
    """A sampler that answers once, as other engines do."""

    continues = False


def model(seed: int = 0) -> Any:
    made = tiny_model(seed=seed)
    made.generation_config.eos_token_id = [END, 3, 4, 5, 6, 7]
    return made


def lived(
    make: Any = Counts,
    prompts: int = 3,
    sampling: Sampling = DRAWN,
    inner: Any = None,
    each: Any = None,
    **more: Any,
) -> list[Rollout]:
    asked = more.pop("asked", None) or [
        Prompt(f"p{n}", [1], {"id": f"p{n}", "n": n}) for n in range(prompts)
    ]
    sampler = (inner or HFSampler)(model(), TOKENIZER)
    acting = EpisodeSampler(sampler, Dialogue(TOKENIZER), make, **{"turn_tokens": 9, **more})
    return acting.sample(asked, sampling, seed=5, step=2, each=each)


def text(rollout: Rollout) -> str:
    return str(TOKENIZER.decode(rollout.prompt + rollout.tokens, skip_special_tokens=False))


@pytest.mark.parametrize("inner", [HFSampler, Rounds])
def test_the_record_of_an_episode(inner: Any) -> None:
    rollouts = lived(inner=inner)
    assert [r.id for r in rollouts] == [f"2/p{n}/{c}" for n in range(3) for c in range(2)]
    for rollout in rollouts:
        tool, said = rollout.marks["tool"], ast.literal_eval(rollout.feedback)
        assert rollout.trained == rollout.drawn == [not t for t in tool]
        assert (rollout.reward, rollout.correct) == (0.3, True)
        assert set(rollout.turns) == {0, 1, 2} and rollout.turns == sorted(rollout.turns)
        # a turn is the student's tokens and then what answers them; the last has no answer
        for turn in range(3):
            mine = [t for t, n in zip(tool, rollout.turns) if n == turn]
            assert mine == sorted(mine) and not mine[0] and mine[-1] == (turn < 2)
        for turn in range(3):
            own = [t for t, n, x in zip(rollout.tokens, rollout.turns, tool) if n == turn and not x]
            assert len(own) <= 9
            assert TOKENIZER.decode(own, skip_special_tokens=True).strip() == said[turn]
        assert not any(p for p, other in zip(rollout.logp, tool) if other)
        assert f"{len(said[0])} signs<|im_end|>\n<|im_start|>assistant\n" in text(rollout)


@pytest.mark.parametrize("inner", [HFSampler, Rounds])
def test_an_episode_is_told_of_as_it_ends(inner: Any) -> None:
    """With all that is read of it while others go on."""
    told: list[Rollout] = []
    rollouts = lived(inner=inner, each=told.append)
    assert sorted(r.id for r in told) == sorted(r.id for r in rollouts)
    of = {r.id: r for r in told}
    for r in rollouts:
        silent = {"logp": [], "drawn_logp": [], "text": "", "feedback": ""}
        assert of[r.id] == replace(r, reward=None, correct=None, policy_version=0, **silent)


def test_both_ways_of_writing_agree() -> None:
    greedy = replace(DRAWN, temperature=0.0, num_generations=1)
    ours, theirs = lived(sampling=greedy), lived(sampling=greedy, inner=Rounds)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.tokens, a.turns, a.marks, a.reward) == (b.tokens, b.turns, b.marks, b.reward)
        assert a.logp == pytest.approx(b.logp, abs=1e-5)


def test_an_episode_is_the_same_alone_and_among_others() -> None:
    every = {r.id: r.tokens for r in lived(prompts=8)}
    asked = [Prompt("p4", [1], {"id": "p4", "n": 4})]
    alone = lived(asked=asked)
    assert [r.tokens for r in alone] == [every["2/p4/0"], every["2/p4/1"]]


def test_where_episodes_end() -> None:
    class Endless(Counts):
        left = 100

    limits = {r.turns[-1] + 1: r.finish for r in lived(Endless, max_turns=2)}
    assert limits == {2: "turns"}
    asked = [Prompt("p0", [1], {"id": "p0", "n": 0}, most_turns=1)]
    [one, _] = lived(Endless, asked=asked, max_turns=4)
    assert set(one.turns) == {0} and "tool" not in one.marks and one.finish == "turns"
    for inner in (HFSampler, Rounds):
        long = lived(Endless, sampling=replace(DRAWN, max_completion_length=60), inner=inner)
        assert all(len(r.tokens) <= 60 and r.finish == "length" for r in long)
        # what did not fit is not there: the student's turn is the last
        assert all(r.trained[-1] for r in long)


@pytest.mark.parametrize("inner", [HFSampler, Rounds])
def test_actions_of_another_open_an_episode(inner: Any) -> None:
    asked = [Prompt("p0", [1], {"id": "p0", "n": 0}, replay=("go", "take it"))]
    for rollout in lived(asked=asked, inner=inner):
        given = [t for t, m in zip(rollout.tokens, rollout.marks["given"]) if m]
        assert TOKENIZER.decode(given) == "go<|im_end|>take it<|im_end|>"
        assert not any(t for t, m in zip(rollout.trained, rollout.marks["given"]) if m)
        own = [n for n, t in zip(rollout.turns, rollout.trained) if t]
        assert set(own) == {2} and ast.literal_eval(rollout.feedback)[:2] == ["go", "take it"]
        assert not rollout.unaided
        start = rollout.logp[: rollout.trained.index(True)]
        assert start == [0.0] * len(start)
    # one that leaves nothing to do is not replayed
    whole = [replace(asked[0], replay=("a", "b", "c"))]
    for rollout in lived(asked=whole, inner=inner):
        assert "given" not in rollout.marks and rollout.turns[0] == 0 and rollout.reward == 0.3


def test_episodes_of_a_question_have_one_seed_and_their_own_draws() -> None:
    seeds: list[int] = []

    class Seeded(Counts):
        def reset(self, row, seed):
            seeds.append(seed)
            return super().reset(row, seed)

    first, second = lived(Seeded, prompts=1)
    assert seeds == [seed_of(5, "p0")] * 2 and first.tokens != second.tokens
    assert lived(Seeded, prompts=1)[0].tokens == first.tokens and len(set(seeds)) == 1


# ------------------------------------------------------------------------------- what is learnt


@pytest.mark.parametrize("method", ["opd", "gkd", "tropd", "iw_opd", "eopd", "grpo", "vopd"])
def test_nothing_is_learnt_at_tokens_of_others(method: str) -> None:
    student, teacher = model(), model(1)
    asked = [Prompt("p0", [1], {"n": 0}, replay=("go",)), Prompt("p1", [1], {"n": 1})]
    rollouts = lived(asked=asked)
    batch = collate(rollouts, "cpu", torch.float64)

    def logits(of: Any) -> torch.Tensor:
        """[B, T, V]"""
        out = torch.zeros(*batch.tokens.shape, 320, dtype=torch.float64)
        with torch.no_grad():
            for b, r in enumerate(rollouts):
                whole = of(torch.tensor([r.prompt + r.tokens])).logits[0, len(r.prompt) - 1 : -1]
                out[b, : len(r.tokens)] = whole.double()
        return out

    more: dict[str, Any] = {
        "group": torch.tensor([0, 0, 1, 1]),
        "reward": torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64),
        "correct": torch.tensor([True, False, True, False]),
        "turn": batch.turn,
    }
    theirs, own = logits(teacher), batch.trained
    assert own.sum() > 20 and (~own).sum() > 20

    def gradient(models: torch.Tensor) -> torch.Tensor:
        """[B, T, V]"""
        out = evaluate(
            load(method), logits(student), batch.tokens, own, {"teacher": models}, **more
        )
        return out.grad

    found = gradient(theirs)
    assert not found[~own].any() and found[own].abs().sum() > 0
    # what a teacher would say at these tokens changes nothing either
    moved = torch.where(own[..., None], theirs, theirs + torch.randn_like(theirs))
    assert torch.equal(gradient(moved), found)


# ------------------------------------------------------------------------- environments with faults


def fault(part: str, result: Any) -> type[Counts]:
    def answer(self, *given: Any) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    member = property(answer) if part == "done" else answer
    return type("Faulty", (Counts,), {part: member})


@pytest.mark.parametrize(
    ("part", "result", "said"),
    [
        ("reset", RuntimeError("no game"), "in turn 0 .*row 'p0'.*its reset fails.*no game"),
        ("reset", 7, r"its reset returned 7 \(int\)"),
        ("step", ZeroDivisionError("x"), "in turn 0 .*its step fails.*ZeroDivisionError"),
        ("step", None, r"its step returned None \(NoneType\)"),
        ("step", {"role": "assistant", "content": "I"}, "role assistant"),
        ("step", SystemExit(3), "sys.exit"),
        ("done", "yes", "its done is 'yes'"),
        ("done", True, "done before the student has written anything"),
        ("score", "good", "its score returned 'good'"),
        ("score", float("nan"), "its score returned nan"),
        ("score", Scored(1.0, "no"), "correct='no'"),  # type: ignore[arg-type]
        ("score", Scored(1.0, True, ["a"]), "feedback="),  # type: ignore[arg-type]
        ("step", "\ud800", "cannot read"),
        ("close", OSError("gone"), "its close fails.*gone"),
    ],
)
def test_faults_of_an_environment_are_told_with_their_place(part, result, said) -> None:
    with pytest.raises(UserError, match=f"(?s)environment own, {said}|{said}"):
        lived(fault(part, result), prompts=1)


def test_numbers_of_numpy_and_torch_are_numbers_and_no_feedback_is_none() -> None:
    class Foreign(Counts):
        @property
        def done(self):
            return numpy.bool_(len(self.turns) >= self.left)

        def score(self):
            reward = torch.tensor(0.5, dtype=torch.float64)
            return Scored(reward, numpy.bool_(False), None)  # type: ignore[arg-type]

    for rollout in lived(Foreign, prompts=1):
        assert (rollout.reward, rollout.correct, rollout.feedback) == (0.5, False, "")


def test_what_an_environment_does_with_its_row_is_its_own() -> None:
    class Takes(Counts):
        def reset(self, row, seed):
            row["inner"].append(row.pop("n"))
            return super().reset({"n": row["inner"]}, seed)

    row = {"id": "p0", "n": 7, "inner": []}
    first, second = lived(Takes, asked=[Prompt("p0", [1], row)])
    assert row == {"id": "p0", "n": 7, "inner": []} and first.prompt == second.prompt


def test_a_class_of_ones_own_needs_four_parts_alone(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "class Plain:\n    done = False\n    def reset(self, row, seed): return 'hi'\n"
        "    def step(self, action): return 'more'\n    def score(self): return 1\n"
    )
    make = OwnEnvironment(f"{tmp_path / 'plain.py'}:Plain", max_turns=2).make
    assert [r.reward for r in lived(make, prompts=1, max_turns=2)] == [1.0, 1.0]


def test_environments_are_closed_whatever_happens() -> None:
    Counts.closed = 0
    lived()
    assert Counts.closed == 6
    for part in ("reset", "step", "score"):
        faulty = fault(part, ValueError("x"))
        faulty.closed = 0
        with pytest.raises(UserError):
            lived(faulty)
        assert faulty.closed == 6


def test_an_endless_answer_ends_its_episode() -> None:
    class Floods(Counts):
        def step(self, action):
            self.turns.append(action)
            return "x" * 100_000

    for rollout in lived(Floods, prompts=1):
        assert rollout.finish == "length" and set(rollout.turns) == {0} and rollout.reward == 0.1


def test_a_prefix_is_no_way_into_an_episode() -> None:
    with pytest.raises(UserError, match="has a prefix"):
        lived(asked=[Prompt("p0", [1], {"n": 0}, prefix=[9])])

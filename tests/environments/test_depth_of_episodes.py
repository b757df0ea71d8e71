"""TCOD's depth in real episodes: what is stopped, replayed and learnt, with a small model and a
world that counts turns.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opdkit.curricula import Depth
from opdkit.environments import Dialogue, Environment, EpisodeSampler
from opdkit.methods.method import load
from opdkit.sampling import HFSampler
from opdkit.testing import evaluate
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.tiny import tiny_model, tiny_tokenizer
from tests.curricula.context import context

TOKENIZER = tiny_tokenizer()
EXPERT = tuple(f"go {way}" for way in ("north", "south", "east", "west") * 2)  # 8 actions
ROOM = Sampling(max_completion_length=600, num_generations=2)


class Counting(Environment):
    """Ends after so many turns, whatever is done."""

    def __init__(self, turns: int):
        self.turns, self.done_so_far = turns, 0

    def reset(self, row, seed):
        self.done_so_far = 0
        return "Go on."

    def step(self, action):
        self.done_so_far += 1
        return f"Gone {self.done_so_far}."

    @property
    def done(self):
        return self.done_so_far >= self.turns

    def score(self):
        return float(self.done)


def written(curriculum: Depth | None, step: int = 0, turns: int = 9, most: int = 30, **more):
    """The episodes of one prompt under a curriculum; None: plain ones."""
    sampler = EpisodeSampler(
        HFSampler(tiny_model("qwen3"), TOKENIZER),
        Dialogue(TOKENIZER),
        lambda: Counting(turns),
        max_turns=most,
        turn_tokens=4,
    )

    def sample(prompts, sampling):
        return sampler.sample(prompts, sampling, seed=3, step=step)

    prompt = Prompt("game", [1], row={"actions": list(more.pop("actions", EXPERT))})
    writer = (curriculum or load("opd").curriculum).writer
    if writer is None:
        return sample([prompt], ROOM)
    return writer.write(context([prompt], sampling=ROOM, step=step, sample=sample))


def own_turns(rollout: Rollout) -> int:
    """Turns in which the student wrote something that it learns: training rows of the paper."""
    return len({turn for turn, mine in zip(rollout.turns, rollout.trained) if mine})


def test_rows_of_an_episode():
    """Card, identity 4."""
    at_three = {"step": 4}  # eta 2: k = 3
    assert [own_turns(r) for r in written(Depth("f2b"), **at_three)] == [3, 3]
    assert [own_turns(r) for r in written(Depth("f2b"), turns=2, **at_three)] == [2, 2]
    for rollout in written(Depth("b2f", eta=1), step=1):  # c = 8 - 2 = 6, and the world ends at 9
        assert own_turns(rollout) == 3 and max(rollout.turns) == 8


def test_its_curves_say_whose_turns_there_were():
    curriculum = Depth("b2f", eta=1)
    rollouts = written(curriculum, step=1)
    found = curriculum.metrics(rollouts, 1, 10, {})
    assert found == {"depth": 2.0, "student_turns": 3.0, "expert_turns": 6.0}
    assert curriculum.metrics([], 3, 10, {}) == {"depth": 4.0}


def test_an_episode_is_never_deeper_than_its_environment():
    """Card, identity 1: k = 11 and more, of a world that is stopped after 5 turns."""
    for step in (20, 500):
        assert [own_turns(r) for r in written(Depth("f2b"), step, most=5)] == [5, 5]


@pytest.mark.parametrize(
    ("curriculum", "step", "actions"),
    [
        (Depth("b2f"), 0, EXPERT[:1]),  # L = 1
        (Depth("b2f", eta=1), 7, EXPERT),  # n = L - 1
        (Depth("f2b", eta=3), 24, EXPERT),  # n = eta (9 - 1)
        (Depth("b2f"), 0, ()),  # no expert
    ],
)
def test_where_nothing_is_left_out_it_is_opd(curriculum, step, actions):
    """Card, identity 3: the very episodes of plain OPD, token by token."""
    ours = written(curriculum, step, most=9, actions=actions)
    assert ours == written(None, step, most=9, actions=actions)


def test_what_is_replayed_is_read_and_not_learnt():
    """Card, identity 5: each expert turn and each answer stands before the student's turns, and has
    no gradient.
    """
    [rollout, _] = written(Depth("b2f"))  # 7 of 8 actions replayed
    text = TOKENIZER.decode(rollout.tokens)
    at = [text.index(said) for said in (*EXPERT[:4], "Gone 7.")]
    assert at == sorted(at)
    first = rollout.trained.index(True)
    given, tool = (torch.tensor([rollout.marks[m]]) for m in ("given", "tool"))
    assert given[0, :first].any() and (given | tool)[0, :first].all()
    assert not given[0, first:].any() and tool[0, first:].any()
    shape = (1, len(rollout.tokens), len(TOKENIZER))
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    out = evaluate(
        load("tcod", direction="b2f"),
        student,
        torch.tensor([rollout.tokens]),
        torch.tensor([rollout.trained]),
        models={"teacher": teacher},
        marks={"given": given, "tool": tool},
    )
    moved = out.grad[0].abs().sum(-1) > 0
    assert moved.tolist() == rollout.trained and rollout.unaided is False


def test_an_episode_that_the_replay_would_end_is_dropped():
    """Card, definition: of a world that ends at the third turn, before the student may act."""
    [short, long] = (Prompt(name, [1], row={"actions": list(EXPERT)}) for name in ("short", "long"))
    sampler = EpisodeSampler(
        HFSampler(tiny_model("qwen3"), TOKENIZER),
        Dialogue(TOKENIZER),
        lambda: Short(),
        turn_tokens=4,
    )

    def sample(prompts, sampling):
        named = [replace(p, row={**p.row, "turns": 3 if p.id == "short" else 9}) for p in prompts]
        return sampler.sample(named, sampling, seed=3, step=0)

    asked = context([short, long], sampling=ROOM, sample=sample)
    assert {r.question for r in Depth("b2f").writer.write(asked)} == {"long"}


class Short(Counting):
    """Ends after as many turns as its row says."""

    def __init__(self):
        super().__init__(0)

    def reset(self, row, seed):
        self.turns = row["turns"]
        return super().reset(row, seed)

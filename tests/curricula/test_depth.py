"""Depth of turns: the schedules of TCOD's card, and what a writer asks of the sampler."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opdkit.base.errors import UserError
from opdkit.curricula import Depth
from opdkit.types import Prompt
from tests.curricula.context import by_student, context

EIGHT = tuple(f"action {i}" for i in range(8))


def asked(curriculum: Depth, step: int, actions: object = EIGHT, sample=by_student) -> Prompt:
    """The one prompt that the sampler is given at a step."""
    seen = []

    def watched(prompts, sampling):
        seen.extend(prompts)
        return sample(prompts, sampling)

    row = {} if actions is None else {"actions": actions}
    prompt = Prompt("game", [1, 2], row=row)
    curriculum.writer.write(context([prompt], step=step, sample=watched))
    [made] = seen
    assert replace(made, most_turns=0, replay=()) == prompt  # nothing else of it changes
    return made


@pytest.mark.parametrize(
    ("step", "turns"), [(0, 1), (5, 1), (6, 2), (11, 2), (12, 3), (60, 11), (200, 30)]
)
def test_front_to_back(step, turns):
    """Card, identity 1: eta 6, of an environment with 30 turns."""
    made = asked(Depth("f2b", eta=6), step)
    assert min(made.most_turns, 30) == turns and made.replay == ()


@pytest.mark.parametrize(
    ("step", "replay", "turns"),
    [(0, 7, 1), (4, 7, 1), (5, 6, 2), (34, 1, 7), (35, 0, 8), (100, 0, 8)],
)
def test_back_to_front(step, replay, turns):
    """Card, identity 2: eta 5, an expert of 8 actions; after the replay nothing is limited."""
    made = asked(Depth("b2f", eta=5), step)
    assert made.replay == EIGHT[:replay] and len(EIGHT) - len(made.replay) == turns
    assert made.most_turns == 0


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("eta", [1, 2, 5])
def test_replay_is_the_papers_formula(start, eta):
    """c = max(0, (L - 1) - floor(n / eta)), and with a later start as many turns fewer."""
    for n in range(60):
        paper = max(0, (len(EIGHT) - start) - n // eta)
        assert asked(Depth("b2f", eta, start), n).replay == EIGHT[:paper]


def test_where_nothing_is_left_out_it_asks_the_plain_prompt():
    """Card, identity 3."""
    plain = Prompt("game", [1, 2], row={"actions": EIGHT})
    assert all(asked(Depth("b2f"), n, EIGHT[:1]).replay == () for n in range(20))  # L = 1
    assert asked(Depth("b2f", eta=1), 7) == plain and asked(Depth("b2f", eta=1), 6) != plain
    most = 30  # turns of an environment: a limit that is no smaller is none
    for eta in (1, 4):
        limits = [asked(Depth("f2b", eta), n).most_turns for n in (29 * eta - 1, 29 * eta, 500)]
        assert [limit >= most for limit in limits] == [False, True, True]


def test_a_row_without_an_expert_has_a_whole_episode():
    for actions in (None, [], ()):
        made = asked(Depth("b2f"), 0, actions)
        assert made.replay == () and made.most_turns == 0


@pytest.mark.parametrize("actions", ["go south", ["go", 7], {"a": 1}, 3])
def test_a_list_that_cannot_be_replayed_is_explained(actions):
    with pytest.raises(UserError, match=r"prompt game: its column 'actions'.*list of texts"):
        asked(Depth("b2f"), 0, actions)
    asked(Depth("f2b"), 0, actions)  # which does not read it


def test_an_episode_that_the_replay_would_end_is_dropped():
    """Card, definition: such an episode is lived without the replay, so not at the step's depth."""

    def sample(prompts, sampling):
        return [
            replace(r, marks={"given": [True]}) if p.replay and p.id != "won" else r
            for p, r in zip(prompts, by_student(prompts, sampling), strict=True)
        ]

    def written(*names):
        asked = [Prompt(n, [1], row={"actions": () if n == "free" else EIGHT}) for n in names]
        return [r.group for r in Depth("b2f").writer.write(context(asked, sample=sample))]

    assert written("won", "free", "other") == ["free", "other"]
    assert written("won") == ["won"]  # rather than a step of nothing


def test_the_step_alone_says_how_deep():
    """Card, identity 8: nothing is remembered, so that a resumed run goes on as it was."""
    for direction in ("f2b", "b2f"):
        curriculum = Depth(direction, eta=3)
        first = [asked(curriculum, n) for n in range(12)]
        assert [asked(Depth(direction, eta=3), n) for n in range(12)] == first
        assert curriculum.observe(by_student([first[0]], context().sampling), {}) == {}
    assert asked(Depth("f2b"), 7) == asked(Depth("f2b"), 7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"direction": "back"}, "direction='back' must be one of f2b, b2f"),
        ({"eta": 0}, "eta=0 must be at least 1"),
        ({"start": 0}, "start=0 must be at least 1"),
    ],
)
def test_bad_settings_are_explained(settings, words):
    with pytest.raises(ValueError, match=words):
        Depth(**settings)


def test_curves_say_how_deep_it_is() -> None:
    told = [Depth(eta=2, start=3).metrics([], step, 9, {}) for step in range(5)]
    assert told == [{"depth": depth} for depth in (3.0, 3.0, 4.0, 4.0, 5.0)]

"""The real simulator of ScienceWorld: gold paths reach 100 points, and worlds that are lived side
by side read as they do alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from opdkit.base.errors import UserError
from opdkit.environments import Scored
from opdkit.environments.scienceworld import ScienceWorldSettings

pytestmark = pytest.mark.agents


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> ScienceWorldSettings:
    folder = str(tmp_path_factory.mktemp("sw"))
    return ScienceWorldSettings("find-plant", (0, 1), folder=folder)


@pytest.fixture(scope="module")
def rows(settings):
    return settings.rows()


def play(settings, row, actions):
    """What was read, from the opening on, with the points so far."""
    world = settings.make()
    read = [(world.reset(row, 0), 0.0)]
    for action in actions:
        assert not world.done
        read.append((world.step(action), world.score().reward))
    return read, world.done, world.score()


def test_the_gold_path_reaches_all_points(settings, rows):
    assert [row["variation"] for row in rows] == [0, 1]
    for row in rows:
        read, done, score = play(settings, row, row["actions"])
        assert done and score == Scored(1.0, True, "The task is done.")
        assert read[0][0].startswith(row["prompt"]) and "focus on OBJ" in read[0][0]
        points = [share for _, share in read]
        assert points == sorted(points) and 0 < points[2] < 1  # by and by


def test_part_of_the_points(settings, rows):
    _, done, score = play(settings, rows[0], rows[0]["actions"][:4])
    assert not done and 0 < score.reward < 1 and not score.correct
    assert score.feedback == f"The task is not done: {round(100 * score.reward)} of 100 points."


def test_a_wrong_focus_ends_it_without_points(settings, rows):
    _, done, score = play(settings, rows[0], ["open door to greenhouse", "focus on agent"])
    assert done and score.reward == 0 and not score.correct
    assert score.feedback.endswith("and can no longer be done.")


def test_worlds_side_by_side_read_as_alone(settings, rows):
    """One after the other, interleaved, and from several threads."""
    alone = [play(settings, row, row["actions"]) for row in rows]
    assert [play(settings, row, row["actions"]) for row in rows] == alone
    worlds = [settings.make() for _ in rows]
    read = [[(w.reset(row, 5), 0.0)] for w, row in zip(worlds, rows)]
    for n in range(max(len(row["actions"]) for row in rows)):
        for world, row, so_far in zip(worlds, rows, read):
            if n < len(row["actions"]):
                so_far.append((world.step(row["actions"][n]), world.score().reward))
    assert read == [texts for texts, _, _ in alone]
    with ThreadPoolExecutor(4) as pool:
        many = pool.map(lambda row: play(settings, row, row["actions"]), rows * 4)
        assert list(many) == alone * 4


def test_rows_are_found_once_and_parts_have_their_numbers(settings, rows, tmp_path):
    assert settings.rows() == rows
    assert ScienceWorldSettings("find-plant", (1,), folder=str(tmp_path)).rows() == rows[1:]
    numbers = {part: ScienceWorldSettings(variations=part)._numbers() for part in ("train", "test")}
    assert len(numbers["train"]) == 150 and not set(numbers["train"]) & set(numbers["test"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "find-plnt", "variations": (0,)}, "no task 'find-plnt'; did you mean"),
        ({"variations": (999,)}, "numbered from 0 to 299"),
        ({"variations": (0,), "simplifications": "easier"}, "no simplification 'easier'"),
    ],
)
def test_what_it_does_not_have_is_explained(given, words, tmp_path):
    with pytest.raises(UserError, match=words):
        ScienceWorldSettings(**given, folder=str(tmp_path)).rows()


def test_rows_of_other_data_are_explained(settings):
    with pytest.raises(UserError, match="row 3: ScienceWorld reads the columns 'task'"):
        settings.make().reset({"id": "3", "prompt": "boil water"}, 0)

"""Real TextWorld games: made, won by their walkthroughs, the same again, and safe from commands
that are meant for the interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.environments import Scored
from opdkit.environments.textworld import TASK, TextWorldSettings

pytestmark = pytest.mark.agents


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> TextWorldSettings:
    return TextWorldSettings(2, quest_length=3, seed=5, folder=str(tmp_path_factory.mktemp("tw")))


@pytest.fixture(scope="module")
def rows(settings):
    return settings.rows()


def play(settings, row, actions: Sequence[str], seed: int = 0):
    """What was read, from the opening on, and what it was worth."""
    world = settings.make()
    try:
        read = [world.reset(row, seed)]
        for action in actions:
            assert not world.done
            read.append(world.step(action))
        return read, world.done, world.score()
    finally:
        world.close()


def test_a_walkthrough_wins(settings, rows):
    assert len(rows) == 2 and rows[0]["prompt"] != rows[1]["prompt"]
    for row in rows:
        read, done, score = play(settings, row, row["actions"])
        assert done and score == Scored(1.0, True, "The game is won.")
        assert read[0].startswith(f"{TASK}\n{row['prompt']}\n-= ")
        assert all("***" not in text and "=-0/" not in text and text for text in read)
        read, done, score = play(settings, row, row["actions"][:-1])
        assert not done and (score.reward, score.correct) == (0.0, False)
        assert score.feedback.endswith(f"From here it is won by: {row['actions'][-1]}.")


def test_two_games_of_the_same_actions_read_the_same(settings, rows):
    """Also side by side, one of them wandering about between the other's turns."""
    wandering = ["look", "inventory", "go north", "go south", "go east", "go west", "take all"]
    for row in rows:
        actions = [*wandering, *row["actions"]]
        assert play(settings, row, wandering) == play(settings, row, wandering, seed=9)
        alone = play(settings, row, row["actions"])[0]
        one, two = settings.make(), settings.make()
        both = [one.reset(row, 0)]
        two.reset(row, 0)
        for action, other in zip(row["actions"], actions):
            two.step(other)
            both.append(one.step(action))
        assert both == alone


def test_the_same_seed_makes_the_same_games_and_another_others(settings, rows, tmp_path):
    again = TextWorldSettings(1, quest_length=3, seed=5, folder=str(tmp_path))
    assert again.rows() == rows[:1]
    assert play(again, rows[0], rows[0]["actions"]) == play(settings, rows[0], rows[0]["actions"])
    [other] = TextWorldSettings(1, quest_length=3, seed=6, folder=str(tmp_path)).rows()
    assert other["prompt"] not in [row["prompt"] for row in rows]


def test_games_are_made_once(settings, rows):
    def made():
        return {path: path.stat().st_mtime_ns for path in Path(settings.folder).rglob("game.z8")}

    before = made()
    assert settings.rows() == rows and made() == before and len(before) == 2


def test_commands_of_the_interpreter_are_refused(settings, rows, tmp_path, monkeypatch):
    """Those that write files, ask back or end the game; also behind a command that is allowed."""
    monkeypatch.chdir(tmp_path)
    world = settings.make()
    world.reset(rows[0], 0)
    for action in ("save", "SAVE", "script", "quit", "restart", "restore", "undo", "verbose"):
        assert "nothing that can be done here" in world.step(action)
    for action in ("look. save", "look, save", "look then save", "look; save", "löok", "look\\s"):
        assert world.step(action) == "One command at a time, of letters and spaces."
    assert world.step(" \n") == "Say what to do."
    assert os.listdir(tmp_path) == [] and not world.done
    for action in rows[0]["actions"]:  # none of it has touched the game
        world.step(action)
    assert world.score().correct


def test_a_turn_may_think_aloud_before_its_command(settings, rows):
    said = [f"I see. The next is clear:\n> {action}\n" for action in rows[0]["actions"]]
    assert play(settings, rows[0], said) == play(settings, rows[0], rows[0]["actions"])


def test_commands_are_listed_where_they_are_asked_for(settings, rows):
    told = TextWorldSettings(folder=settings.folder, commands=True)
    read, _, score = play(told, rows[0], rows[0]["actions"])
    for text, action in zip(read, rows[0]["actions"]):
        assert action in text.rpartition("\nCommands: ")[2].split(", ")
    assert score.correct and "Commands" not in read[-1]


def test_a_game_that_is_not_there_is_explained(settings):
    with pytest.raises(UserError, match=r"row 7: there is no game .*'game'"):
        settings.make().reset({"id": "7", "game": "none.z8"}, 0)
    with pytest.raises(UserError, match="there is no game"):
        settings.make().reset({"id": "7"}, 0)

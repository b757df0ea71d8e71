"""TextWorld and ScienceWorld as settings: what is refused before anything is played, and what of a
turn is the command.
"""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from opdkit.base.errors import UserError
from opdkit.environments import scienceworld
from opdkit.environments.commands import LONGEST, command_of
from opdkit.environments.kinds import environment_of
from opdkit.environments.scienceworld import ScienceWorldSettings
from opdkit.environments.textworld import TextWorldSettings


@pytest.mark.parametrize(
    ("said", "command"),
    [
        ("go north", "go north"),
        ("The chest is shut.\n\n> open  chest \n", "open chest"),
        (">look", "look"),
        ("", ""),
        (" \n\t\n", ""),
        ("take " * 999, ("take " * 999)[:LONGEST]),
    ],
)
def test_the_command_is_the_last_line_that_is_not_blank(said, command):
    assert command_of(said) == command


def test_kinds_are_named_in_a_run():
    assert environment_of("textworld") == TextWorldSettings()
    given = {"kind": "textworld", "games": 4, "seed": 7, "max_turns": 9, "folder": "games"}
    assert environment_of(given) == TextWorldSettings(4, seed=7, max_turns=9, folder="games")
    assert environment_of("scienceworld:boil") == ScienceWorldSettings("boil")
    some = environment_of({"kind": "scienceworld", "task": "melt", "variations": [0, 3]})
    assert some == ScienceWorldSettings("melt", (0, 3))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "textworld", "games": 0}, "games=0 must be at least 1"),
        ({"kind": "textworld", "quest_length": 0}, "quest_length=0 must be at least 1"),
        ({"kind": "textworld", "max_turns": 0}, "max_turns=0 must be at least 1"),
        ({"kind": "textworld", "game": 1}, "game"),
        ({"kind": "scienceworld", "variations": "all"}, "one of train, dev, test"),
        ({"kind": "scienceworld", "variations": []}, "a list of numbers"),
    ],
)
def test_bad_settings_are_explained(given, words):
    with pytest.raises(UserError, match=words):
        environment_of(given)


@pytest.mark.parametrize("kind", ["textworld", "scienceworld"])
def test_a_package_that_is_missing_is_named(kind, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{kind}.*not installed: pip install 'opdkit.agents.'"):
        environment_of(kind).check()


def test_a_java_runtime_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(scienceworld, "needs_package", lambda *names: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no `java` on this machine: install a Java runtime"):
        environment_of("scienceworld").check()

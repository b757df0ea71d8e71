"""TextWorld (arXiv 1806.11532): text games, made here without a network, that are won by commands
such as "open chest" and "take key from chest".
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from opdkit.base.errors import UserError, nearest
from opdkit.base.progress import progress
from opdkit.base.rules import Rules, at_least, follow
from opdkit.environments.base import Environment, Scored
from opdkit.environments.commands import command_of, needs_package
from opdkit.environments.settings import EnvironmentSettings
from opdkit.types import DataRow

GAME = "game.z8"  # beside game.json, which knows how it is won
GAMES: Rules = {
    "games": at_least(1, "it is how many games are made"),
    "rooms": at_least(1, "it is how many rooms a game has"),
    "objects": at_least(1, "it is how many things lie about in a game"),
    "quest_length": at_least(1, "it is about how many commands win a game"),
    "seed": at_least(0, "it says which games are made"),
}
TOLD = dict.fromkeys(
    ("feedback", "objective", "score", "max_score", "won", "verbs", "policy_commands"), True
)
TASK = "You play a text game. Answer with one command."
SHORT = ("n", "s", "e", "w", "i", "l", "x", "get", "north", "south", "east", "west")
# one command, so that the verb is its first word: "save" and "script", which a game knows too,
# would write files, "restart" and "quit" ask back
WORDS = re.compile(r"(?!.*\bthen\b)[a-z0-9'\- ]+", re.IGNORECASE)
# *** The End ***, and what may be typed then; a line with the room's name, the score and the turns
APART = re.compile(r"\n\s*\*\*\* .*|\n>\s+-= [^\n]* =-\s*-?\d+/\d+", re.DOTALL)


class TextWorld(Environment):
    """One game, from its beginning. A turn is one command, its last line (see `command_of`)."""

    def __init__(self, folder: str | Path, commands: bool = False):
        """folder: where games lie; commands: whether each answer lists the commands that the game
        knows there.
        """
        self.folder, self.commands = Path(folder), commands
        self.game: Any = None
        self.state: Any = None
        self.over = False

    def reset(self, row: DataRow, seed: int) -> str:
        """What is to be done, and what is seen first. A game has no chance in it: `seed` changes
        nothing.
        """
        import textworld

        path = self.folder / str(row.get("game", ""))
        if not path.is_file() or not path.with_suffix(".json").is_file():
            raise UserError(
                f"row {row.get('id')}: there is no game {path} with its .json beside it. Rows of "
                "TextWorld name a game that `tw-make` or opdkit made, in the column 'game'; leave "
                "`data` out, and the environment makes games itself"
            )
        told = textworld.EnvInfos(**TOLD, admissible_commands=self.commands)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the interpreter does not know the game by its name
            self.game = textworld.start(str(path), told)
            self.state, self.over = self.game.reset(), False
        # after a banner and the objective comes the first room: -= Lounge =-
        room = "-= " + self.state.feedback.partition("-= ")[2]
        return f"{TASK}\n{_tidy(self.state.objective)}\n{self._seen(room)}"

    def step(self, action: str) -> str:
        command = command_of(action)
        if refusal := self._refusal(command):
            return self._seen(refusal)
        self.state, _, self.over = self.game.step(command)
        return self._seen(self.state.feedback)

    @property
    def done(self) -> bool:
        return self.over

    def score(self) -> Scored:
        """The share of the game's points, in [0, 1]; correct where it is won."""
        state = self.state
        share = max(state.score, 0) / max(state.max_score, 1)
        if state.won:
            return Scored(share, True, "The game is won.")
        left = [] if self.over else list(state.policy_commands or ())
        ahead = f" From here it is won by: {'; '.join(left)}." if left else " It is lost."
        return Scored(share, False, f"The game is not won.{ahead}")

    def close(self) -> None:
        if self.game is not None:
            self.game.close()

    def _refusal(self, command: str) -> str:
        """Why a command is not handed to the game; "" where it is."""
        if not command:
            return "Say what to do."
        if not WORDS.fullmatch(command):
            return "One command at a time, of letters and spaces."
        verb, known = command.lower().split()[0], sorted({*self.state.verbs, *SHORT})
        if verb not in known:
            return f"{verb!r} is nothing that can be done here{nearest(verb, known)}."
        return ""

    def _seen(self, text: str) -> str:
        """A text of the game as the student reads it."""
        seen = _tidy(APART.sub("", text))
        if not self.commands or self.over:
            return seen
        return f"{seen}\nCommands: {', '.join(self.state.admissible_commands)}"


def _tidy(text: str) -> str:
    """A text without its blank lines."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


@dataclass(frozen=True)
class TextWorldSettings(EnvironmentSettings):
    """Games that are made once, kept in `folder`, and are the same for the same settings; each is a
    row with its own walkthrough in the column `actions`.

    Arguments:
        games: how many.
        rooms, objects: how many of them a game has.
        quest_length: about how many commands win a game.
        seed: says which games; others have nothing in common with these.
        folder: where they are kept.
        commands: whether the student is told at each turn which commands the game knows there.
    """

    kind: ClassVar[str] = "textworld"
    games: int = 10
    rooms: int = 2
    objects: int = 4
    quest_length: int = 3
    seed: int = 0
    folder: str = "runs/textworld"
    commands: bool = False
    max_turns: int | None = field(default=30, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        follow(GAMES, self)

    def check(self) -> None:
        needs_package(self.kind, "textworld")

    def make(self) -> Environment:
        return TextWorld(self.folder, self.commands)

    def rows(self) -> list[DataRow]:
        self.check()
        from textworld.generator import Game

        rows = []
        with progress("Making games", total=self.games, unit="games") as tick:
            for number in range(self.games):
                name = f"{self.rooms}-{self.objects}-{self.quest_length}-{self.seed}-{number}"
                if not (Path(self.folder) / name / GAME).exists():
                    self._make(name)
                game = Game.load(str(Path(self.folder) / name / "game.json"))
                rows.append(
                    {
                        "id": f"textworld-{name}",
                        "prompt": _tidy(game.objective),
                        "game": f"{name}/{GAME}",
                        "actions": list(game.metadata["walkthrough"]),
                    }
                )
                tick(number + 1)
        return rows

    def _make(self, name: str) -> None:
        """Makes a game under its name: whole, or not at all."""
        from textworld import GameOptions
        from textworld.generator import compile_game, make_game

        options = GameOptions()
        options.nb_rooms, options.nb_objects = self.rooms, self.objects
        options.quest_length = self.quest_length
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=4).digest()
        options.seeds = int.from_bytes(digest, "big") >> 1  # numpy takes 31 bits
        options.file_ext = ".z8"
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".making-") as scratch:
            options.path = str(Path(scratch) / "made" / GAME)
            compile_game(make_game(options), options)
            with suppress(OSError):  # another process has just made it
                os.replace(Path(scratch) / "made", Path(self.folder) / name)

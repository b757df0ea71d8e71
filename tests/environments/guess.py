"""A small world of one's own, for tests: a letter is to be written."""

from __future__ import annotations

from opdkit.environments import Environment, Scored


class Guess(Environment):
    """Right once a turn holds the row's letter; it tells after each what was wrong."""

    def __init__(self, tries: int = 3):
        self.tries = tries

    def reset(self, row, seed):
        self.letter, self.said, self.seed = row["letter"], [], seed
        return f"Which letter? ({row['id']})"

    def step(self, action):
        self.said.append(action)
        return f"not {action[:3]!r}, try again"

    @property
    def done(self):
        found = bool(self.said) and self.letter in self.said[-1]
        return found or len(self.said) >= self.tries

    def score(self):
        right = bool(self.said) and self.letter in self.said[-1]
        return Scored(float(right), right, "" if right else f"it was {self.letter}")

    @classmethod
    def rows(cls):
        return [{"id": f"r{i}", "letter": letter} for i, letter in enumerate("aeiount ")]

"""Tasks of control: what bins mean, worked by hand; an episode of a made-up task; and, in the group
`agents`, a real one of gymnasium.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opdkit.base.errors import UserError
from opdkit.environments.control import (
    Control,
    ControlSettings,
    action_bins,
    action_of,
    observed_bins,
    tokenizer,
)
from opdkit.environments.dialogue import Dialogue
from opdkit.environments.kinds import environment_of

ROOT = Path(__file__).parents[2]


def box(*bounds: tuple[float, float]) -> Any:
    low, high = np.array(bounds, np.float32).T
    return SimpleNamespace(low=low, high=high, shape=low.shape, dtype=np.dtype(np.float32))


@dataclass
class Line:
    """A point on a line is pushed in two ways at once; five steps, and 1 for each at which it is
    right of 0.
    """

    observation_space: Any = field(default_factory=lambda: box((-4, 4)))
    action_space: Any = field(default_factory=lambda: box((-1, 1), (0, 2)))
    spec: Any = None
    at: float = 0.0
    steps: int = 0
    pushed: list[list[float]] = field(default_factory=list)
    closed: bool = False

    def reset(self, seed: int) -> tuple[Any, dict[str, Any]]:
        self.at, self.steps = float(seed), 0
        return np.array([self.at]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.pushed.append(action.tolist())
        self.at, self.steps = self.at + float(action.sum()), self.steps + 1
        return np.array([self.at]), float(self.at > 0), False, self.steps == 5, {}

    def close(self) -> None:
        self.closed = True


def test_numbers_are_seen_as_bins_of_equal_width() -> None:
    """[-1, 1] in four bins: -1 .. -0.5 .. 0 .. 0.5 .. 1; without bounds atan(-inf .. -1 .. 0 .. 1
    .. inf) / pi is -1/2 .. -1/4 .. 0 .. 1/4 .. 1/2.
    """
    bounded, open_ = box((-1, 1)), box((-np.inf, np.inf))
    seen = [observed_bins([x], bounded, 4)[0] for x in (-7, -1, -0.51, -0.49, 0.49, 0.51, 1, 7)]
    assert seen == [0, 0, 0, 1, 2, 3, 3, 3]
    values = (-1e9, -1.1, -0.9, 0.9, 1.1, 1e9)
    assert [observed_bins([x], open_, 4)[0] for x in values] == [0, 0, 1, 2, 3, 3]
    # the largest float is no bound, one bound is none, and each number has its own
    largest = float(np.finfo(np.float32).max)
    mixed = box((-largest, largest), (0, np.inf), (0, 100))
    assert observed_bins([0.9, 1.1, 99], mixed, 4) == [2, 3, 3]


def test_actions_are_evenly_spaced_between_their_bounds() -> None:
    """Five bins of [-1, 1] and [0, 2]: -1, -0.5, 0, 0.5, 1 and 0, 0.5, 1, 1.5, 2."""
    space = box((-1, 1), (0, 2))
    assert action_of([0, 4], space, 5).tolist() == [-1.0, 2.0]
    assert action_of([3, 1], space, 5).tolist() == [0.5, 0.5]
    assert action_bins([0.3, 0.2], space, 5) == [3, 0]  # nearest are 0.5 and 0
    assert action_bins([-9, 9], space, 5) == [0, 4]
    for chosen in ([0, 0], [2, 3], [4, 1]):
        assert action_bins(action_of(chosen, space, 5), space, 5) == chosen
    few = SimpleNamespace(n=3)
    assert action_of([2], few, 3) == 2 and action_bins(2, few, 3) == [2]


def test_an_episode_of_a_task() -> None:
    """Two actions of two numbers in a turn; what is missing or no bin is the middle one; nothing is
    done after the end.
    """
    line = Line()
    settings = ControlSettings(bins=5, observed=8, turn_tokens=4, returns=(0, 4))
    world = Control(line, settings, solved=5)
    assert world.reset({"start": -2}, seed=3) == "<o2>"  # -2 of -4 .. 4 in eight bins
    assert world.step("<a4><a2><a0><a1>") == "<o3>"  # +1 +1, -1 +0.5: at -0.5
    assert line.pushed == [[1.0, 1.0], [-1.0, 0.5]] and line.at == -0.5
    assert world.step("<a4>, then <a99> <o1>") == "<o6>"  # +1 +1, 0 +1: at 2.5
    assert line.pushed[2:] == [[1.0, 1.0], [0.0, 1.0]] and not world.done
    world.step("<a4><a4><a4><a4>")
    assert line.steps == 5 and world.done  # the fifth step ended it: the sixth was not taken
    score = world.score()  # right of 0 after the third, fourth, fifth
    assert score.reward == 3 / 4 and score.correct is False
    assert score.feedback == "return 3 in 5 steps"
    world.close()
    assert line.closed


def test_an_action_is_held() -> None:
    line = Line()
    world = Control(line, ControlSettings(bins=5, turn_tokens=2, hold=3))
    world.reset({}, seed=1)  # a row without a start: the episode's seed
    world.step("<a0><a1>")
    assert line.pushed == [[-1.0, 0.5]] * 3 and line.at == -0.5
    assert world.score().reward == 1.0 and world.score().correct is None


def test_text_and_ids_are_the_same() -> None:
    """The last ids are the actions, each token is one id, and a dialogue adds nothing to them."""
    words = tokenizer(bins=5, observed=8)
    ids = words("<o7><a4>\n<a0>").input_ids
    assert ids == [len(words) - 6, len(words) - 1, len(words) - 5]
    assert words.decode(ids) == "<o7><a4><a0>"
    dialogue = Dialogue(words)
    said = [{"role": "user", "content": "<o0><o7>"}]
    assert dialogue.opening(dialogue.asked(said, ()), "here") == words("<o0><o7>").input_ids
    assert dialogue.reply(said, (), ids[-2:], "here") == words("<o0><o7>").input_ids
    assert dialogue.said(ids[-2:], ids, ()) == "<a4><a0>"


@pytest.mark.parametrize(
    ("observation", "action", "turn", "said"),
    [
        (SimpleNamespace(), box((-1, 1)), 1, "up to 256 numbers"),
        (box(*[(0, 1)] * 257), box((-1, 1)), 1, "up to 256 numbers"),
        (box((0, 1)), box((-1, np.inf)), 1, "bounded"),
        (box((0, 1)), SimpleNamespace(n=4), 1, "set bins=4"),
        (box((0, 1)), box((-1, 1), (-1, 1)), 3, "set turn_tokens to 2"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(observation, action, turn, said) -> None:
    settings = ControlSettings(bins=5, turn_tokens=turn)
    with pytest.raises(UserError, match=said):
        settings.refuse_spaces(observation, action)


def test_settings_by_name() -> None:
    made = environment_of({"kind": "control", "task": "CartPole-v1", "bins": 2, "starts": 3})
    assert [row["start"] for row in made.rows()] == [0, 1, 2]
    assert len({row["id"] for row in made.rows()}) == 3
    assert environment_of("control:Acrobot-v1").task == "Acrobot-v1"
    with pytest.raises((UserError, ValueError), match="lower one first"):
        environment_of({"kind": "control", "returns": [1, 0]})


@pytest.mark.agents
@pytest.mark.parametrize(("task", "bins"), [("Pendulum-v1", 15), ("CartPole-v1", 2)])
def test_real_tasks_are_lived_again_alike(task: str, bins: int) -> None:
    """The same start and actions, the same text and return; another start, another text."""
    settings = ControlSettings(task, bins=bins, observed=64)
    settings.check()

    def lived(start: int) -> tuple[list[str], float]:
        world = settings.make()
        read = [world.reset({"start": start}, 0)]
        while not world.done:
            read.append(world.step(f"<a{len(read) % bins}>"))
        world.close()
        return read, world.score().reward

    assert lived(1) == lived(1) and lived(1) != lived(2)


@pytest.mark.agents
def test_tasks_that_gymnasium_does_not_have() -> None:
    with pytest.raises(UserError, match="Pendulum-v1"):
        ControlSettings("Pendulun-v1").check()
    with pytest.raises(UserError, match="set bins=2"):
        ControlSettings("CartPole-v1").check()


@pytest.mark.agents
def test_the_example_improves_on_its_start(tmp_path: Path) -> None:
    """Teacher and student from the example, the run from the command line: on starts that neither
    has seen, the student's mean reward goes at least half way to the teacher's.
    """
    env = {**os.environ, "TQDM_DISABLE": "1"}
    for command in (
        [str(ROOT / "examples" / "control.py"), str(tmp_path)],
        ["-m", "opdkit", "train", str(tmp_path / "run.yaml")],
    ):
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "evals.jsonl").read_text().splitlines()
    found = {(e["name"], e["step"]): e["reward_mean"] for e in map(json.loads, lines)}
    start, end, teacher = found["student", 0], found["student", 100], found["teacher", 0]
    assert end - start > 0.5 * (teacher - start) > 0.05

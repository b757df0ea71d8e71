"""Environments of the real library `verifiers`, lived in by a tiny student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opdkit.environments import Dialogue, EpisodeSampler
from opdkit.environments.kinds import environment_of
from opdkit.sampling import HFSampler
from opdkit.types import Prompt, Sampling
from tests.common.tiny import tiny_model
from tests.environments.templates import QWEN3, chatting

pytestmark = pytest.mark.verifiers
pytest.importorskip("verifiers")

WORLDS = '''
import verifiers as vf
from datasets import Dataset

ROWS = Dataset.from_list([{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(3)])


def right(completion, answer, **kwargs) -> float:
    return float(answer in str(completion[-1]["content"]))


def single():
    return vf.SingleTurnEnv(dataset=ROWS, rubric=vf.Rubric(funcs=[right]), system_prompt="Add.")


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def tools():
    return vf.ToolEnv(dataset=ROWS, tools=[add], rubric=vf.Rubric(funcs=[right]), max_turns=5)


class Hotter(vf.MultiTurnEnv):
    async def setup_state(self, state):
        state["tries"] = 0

    async def env_response(self, messages, state, **kwargs):
        state["tries"] += 1
        text = f"No, try again ({state['tries']})"
        if state["answer"] in str(messages[-1].content):
            state["final_env_response"] = [vf.UserMessage(content="Yes")]
        return [vf.UserMessage(content=text)]


def several():
    return Hotter(dataset=ROWS, rubric=vf.Rubric(funcs=[right]), max_turns=3)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worlds") / "worlds.py"
    path.write_text(WORLDS)
    return path


def world(file: Path, name: str) -> Any:
    made = environment_of(f"verifiers:{file}:{name}")
    made.check()
    return made


def test_one_turn_and_a_rubric(file: Path) -> None:
    settings = world(file, "single")
    rows = settings.rows()
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    for said, reward in (("It is 2.", 1.0), ("no", 0.0)):
        one = settings.make()
        opening = one.reset(rows[1], 0)
        assert [m["role"] for m in opening] == ["system", "user"] and not one.done
        one.step(said)
        assert one.done and one.score().reward == reward
        one.close()


def test_functions_are_called_in_the_students_own_form(file: Path) -> None:
    settings = world(file, "tools")
    one = settings.make()
    one.calls = Dialogue(chatting(QWEN3)).calls
    one.reset(settings.rows()[1], 0)
    assert one.tools[0]["function"]["name"] == "add"
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call>'
    [answer] = one.step(call)
    assert (answer["role"], answer["content"]) == ("tool", "2") and not one.done
    [answer] = one.step('<tool_call>\n{"name": "add", "arguments": {"a"')
    assert answer["role"] == "tool" and not one.done  # told what was wrong
    one.step("It is 2.")
    assert one.done and one.score().reward == 1.0
    one.close()


def test_several_turns_end_where_the_world_says_so(file: Path) -> None:
    settings = world(file, "several")
    one = settings.make()
    one.reset(settings.rows()[1], 0)
    assert one.step("5")[0]["content"] == "No, try again (1)" and not one.done
    one.step("2")
    assert one.done
    other = settings.make()
    other.reset(settings.rows()[1], 0)
    for turn in range(3):
        assert not other.done, turn
        other.step("5")
    assert other.done  # max_turns
    one.close(), other.close()


@pytest.mark.parametrize("name", ["single", "tools", "several"])
def test_a_student_lives_in_them(file: Path, name: str) -> None:
    settings, tokenizer, model = world(file, name), chatting(QWEN3), tiny_model()
    acting = EpisodeSampler(
        HFSampler(model, tokenizer), Dialogue(tokenizer), settings.make, turn_tokens=8
    )
    prompts = [Prompt(row["id"], [1], row) for row in settings.rows()]
    rollouts = acting.sample(prompts, Sampling(max_completion_length=300, num_generations=2))
    assert len(rollouts) == 6 and all(r.reward is not None for r in rollouts)
    turns = {r.turns[-1] + 1 for r in rollouts}
    assert turns == ({3} if name == "several" else {1})

"""Calls of functions in the form of the student's own template, read as data."""

from __future__ import annotations

import json

import pytest

from opdkit.environments import Dialogue
from opdkit.environments.calls import CallFormat
from opdkit.environments.tools import ToolEnvironment, tool
from tests.environments.templates import ALL, chatting

WRITTEN = {
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>',
    "llama3": '{"name": "add", "parameters": {"a": 1, "b": [2]}}',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": [2]}}]',
    "coder": "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2]\n"
    "</parameter>\n</function>\n</tool_call>",
    "gemma": "Let me see.\n```tool_code\nadd(a=1, b=[2])\n```",
}


def form(name: str) -> CallFormat:
    return Dialogue(chatting(ALL[name])).calls


@pytest.mark.parametrize("name", WRITTEN)
def test_a_template_s_own_calls_are_read(name: str) -> None:
    read = form(name)
    [call] = read.read(WRITTEN[name])
    assert (call.name, call.arguments, call.error) == ("add", {"a": 1, "b": [2]}, "")
    assert read.read("The answer is 3.") == [] and read.read("") == []
    if read.start and name != "mistral":
        two = read.read(f"First.\n{WRITTEN[name]}\n{WRITTEN[name]}")
        assert [c.name for c in two] == ["add", "add"]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_cut_of_a_call_is_a_call_with_an_error_or_none(name: str) -> None:
    read, text = form(name), WRITTEN[name]
    for end in range(len(text)):
        for call in read.read(text[:end]):
            assert isinstance(call.name, str) and isinstance(call.arguments, dict)
    broken = {"qwen3", "mistral"}
    if name in broken:
        assert read.read(text[:-20])[0].error


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n" + "[" * 100_000,
        "<tool_call>\nnull",
        '<tool_call>\n{"name": 3, "arguments": {}}',
        '<tool_call>\n{"name": "f", "arguments": "no"}',
        '<tool_call>\n{"name": "f", "arguments": [1]}',
    ],
)
def test_what_is_no_call_says_so(text: str) -> None:
    [call] = form("qwen3").read(text)
    assert call.error


@pytest.mark.parametrize(
    "code",
    [
        "f(1)",
        "f(x=open('a'))",
        "f(**a)",
        "import os",
        "f(" * 500,
        "a.b",
        "f(x=1" + "+1" * 5000 + ")",
    ],
)
def test_code_is_read_and_not_run(code: str) -> None:
    calls = form("gemma").read(f"```tool_code\n{code}\n```")
    assert calls and all(call.error for call in calls)


def test_forms_that_hold_names_apart_or_write_python() -> None:
    """Ministral's [TOOL_CALLS]f[ARGS]{...}, and f(x=1) between marks."""
    call = "m.tool_calls[0].function"
    head = "{% for m in messages %}{% if m.tool_calls %}"
    tail = "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    named = head + "{{ '[CALL]' + X.name + '[ARGS]' + (X.arguments|tojson) }}".replace("X", call)
    [found] = Dialogue(chatting(named + tail)).calls.read('[CALL]f[ARGS]{"x": 1}')
    assert (found.name, found.arguments) == ("f", {"x": 1})
    python = head + (
        "{{ '<|call|>[' + X.name + '(' }}{% for k, v in X.arguments|items %}"
        "{{ k + '=' + (v|tojson) }}{% endfor %}{{ ')]' }}".replace("X", call)
    )
    [found] = Dialogue(chatting(python + tail)).calls.read('<|call|>[f(x="a)b")]')
    assert (found.name, found.arguments) == ("f", {"x": "a)b"})
    as_text = head + "{{ '<c>{\"name\": \"' + X.name + '\", \"args\": ' + X.arguments + '}' }}"
    form = Dialogue(chatting(as_text.replace("X", call) + tail)).calls
    assert form.as_text and form.arguments == "args"


class Adds(ToolEnvironment):
    tools = (tool("add", "Adds.", a="number: one", b="number: the other"),)

    def reset(self, row, seed):
        return "?"

    def add(self, a, b):
        if a == 13:
            raise ValueError("not 13")
        return a + b

    def score(self):
        return float(self.answer == "5")


def called(arguments: str, name: str = "add") -> str:
    world = Adds()
    world.calls = form("qwen3")
    [message] = world.step(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}')
    assert message["role"] == "tool" and not world.done
    return str(message["content"])


def test_what_is_wrong_with_a_call_is_told_and_ends_nothing() -> None:
    assert called(json.dumps({"a": 2, "b": 3})) == "5"
    assert "'b' is missing" in called('{"a": 2}')
    assert "no argument 'c'" in called('{"a": 2, "b": 1, "c": 3}')
    assert "must be of type number" in called('{"a": "2", "b": 1}')
    assert "must be of type number" in called('{"a": true, "b": 1}')
    assert "ValueError: not 13" in called('{"a": 13, "b": 1}')
    assert "no function 'sub', but add" in called("{}", "sub")
    assert "cannot be read" in called('{"a": ')
    world = Adds()
    world.step("5")
    assert world.done and world.score() == 1.0

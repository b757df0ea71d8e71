"""Environments whose student calls functions, in its own template's form, and is told what they
return.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from opdkit.base.errors import UserError
from opdkit.environments.base import Environment, Message
from opdkit.environments.calls import Call

LONGEST = 4_000  # characters of what a function returns
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def tool(name: str, description: str, **arguments: str) -> dict[str, Any]:
    """A function's schema; each argument as "type: what it is".

    >>> tool("add", "Adds.", a="number: the first")["function"]["parameters"]["required"]
    ['a']
    """
    properties = {
        key: dict(zip(("type", "description"), text.split(": ", 1)))
        for key, text in arguments.items()
    }
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


class ToolEnvironment(Environment):
    """Runs the calls of each turn; a turn without one is the student's answer, which ends the
    episode.

    A subclass lists `tools`, has a method for each, named as the function, and says in `score` what
    the answer (`self.answer`, None before there is one) is worth:

        class Adds(ToolEnvironment):
            tools = (tool("add", "Adds two numbers.", a="number: one", b="number: the other"),)

            def reset(self, row, seed):
                self.sum = row["sum"]
                return row["prompt"]

            def add(self, a, b):
                return str(a + b)

            def score(self):
                return float(self.answer is not None and str(self.sum) in self.answer)

    What is wrong with a call is told to the student: it has to learn from that, and its text must
    end no run.
    """

    answer: str | None = None

    @property
    def done(self) -> bool:
        return self.answer is not None

    def step(self, action: str) -> str | Message | list[Message]:
        calls = self.calls.read(action)
        if not calls:
            self.answer = action
            return ""
        return [{"role": "tool", "name": c.name, "content": self._result(c)} for c in calls]

    @abstractmethod
    def score(self) -> Any:
        """What the answer was worth."""

    def _result(self, call: Call) -> str:
        """What a call returns, or what is wrong with it."""
        schemas = {_function(t).get("name"): _function(t) for t in self.tools}
        if call.error:
            return f"error: the call cannot be read: {call.error}"
        if call.name not in schemas:
            return f"error: there is no function {call.name!r}, but {', '.join(map(str, schemas))}"
        if wrong := _mismatch(schemas[call.name].get("parameters", {}), call.arguments):
            return f"error: {call.name}: {wrong}"
        function = getattr(self, call.name, None)
        if function is None:
            raise UserError(
                f"{type(self).__name__} offers the function {call.name!r} and has no method of "
                "that name: define it"
            )
        try:
            result = function(**call.arguments)
        except UserError:
            raise
        except Exception as error:  # of what the student asked for
            return f"error: {call.name}: {type(error).__name__}: {error}"[:LONGEST]
        text = result if isinstance(result, str) else json.dumps(result, default=str)
        return text if len(text) <= LONGEST else text[:LONGEST] + " ... (cut)"


def _function(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = schema.get("function", schema)
    return inner if isinstance(inner, Mapping) else {}


def _mismatch(parameters: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What is wrong with a call's arguments; "" where nothing is."""
    known = parameters.get("properties", {})
    if missing := [name for name in parameters.get("required", []) if name not in given]:
        return f"the argument {missing[0]!r} is missing"
    for name, value in given.items():
        if name not in known:
            return f"there is no argument {name!r}, but {', '.join(known) or 'none'}"
        kind = known[name].get("type") if isinstance(known[name], Mapping) else None
        types = TYPES.get(kind, ()) if isinstance(kind, str) else ()
        if types and (not isinstance(value, types) or (bool not in types and value in (True, False)
                      and isinstance(value, bool))):  # fmt: skip
            return f"the argument {name!r} must be of type {kind}, not {value!r}"
    return ""

"""How a model writes a call of a function: found by rendering a marked call with its chat template,
and read back as data, never run.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opdkit.models.chat import MARK, rendered
from opdkit.models.tokenizers import end_ids

NAME, KEY = "opdkitfunction", "opdkitkey"  # of a marked call, whose value is MARK
ASKED = {"role": "user", "content": "opdkitquestion"}
# what is read where a template knows no calls, and what the student is told then
LONGEST = 4_000  # characters of a call in Python: deeper ones could exhaust the parser
FENCE = re.compile(r"```(?:tool_code|tool_call|json)\s*\n(.*?)(?:```|\Z)", re.DOTALL)
EXAMPLE = '```tool_code\n{"name": "FUNCTION", "arguments": {"NAME": "VALUE"}}\n```'


@dataclass(frozen=True)
class Call:
    """A call that a student wrote. error: what is wrong with it, if it cannot be read."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class CallFormat:
    """The way in which one template writes calls.

    Arguments:
        start: the text before a call's first brace, name or tag, without white space around it.
        shape: "json": one JSON object (or a list of them) holds name and arguments; "named": the
            name, `middle`, then the arguments as a JSON object; "tags": each argument stands
            between tags; "python": NAME(KEY=VALUE); "fence": a block of code, of a template that
            knows no calls.
        name: key of the name ("json").
        arguments: key of the arguments ("json").
        middle: text between the name and what follows.
        key_start, key_end, value_end: texts around an argument's name and value ("tags").
        written: a whole call as the template writes it.
        as_text: whether a message hands the arguments to the template as text.
    """

    start: str = ""
    shape: str = "fence"
    name: str = "name"
    arguments: str = "arguments"
    middle: str = ""
    key_start: str = ""
    key_end: str = ""
    value_end: str = ""
    written: str = ""
    as_text: bool = False

    @property
    def known(self) -> bool:
        """Whether the template writes calls."""
        return self.shape != "fence"

    def read(self, said: str) -> list[Call]:
        """The calls in a turn, in their order; none where it makes none."""
        if self.shape == "fence":
            return [call for block in FENCE.findall(said) for call in _block(block)]
        calls = [call for text in self._texts(said) for call in self._calls(text)]
        # without a mark before it, an object that names no function is an answer
        return [call for call in calls if self.start or call.name]

    def _texts(self, said: str) -> list[str]:
        """What stands after each start of a call."""
        if self.start:
            return [text.strip() for text in said.split(self.start)[1:]]
        text = said.strip()
        return [text] if text.startswith(("{", "[")) or self.shape != "json" else []

    def _calls(self, text: str) -> list[Call]:
        if self.shape == "json":
            return _objects(text, self.name, self.arguments)
        if self.shape == "named":
            return _named(text, self.middle)
        return _python(text) if self.shape == "python" else self._tagged(text)

    def _tagged(self, text: str) -> list[Call]:
        name, found, rest = text.partition(self.middle.strip() or ">")
        if not found:
            return [Call(name.strip()[:60], error="it does not end its name")]
        shape = re.compile(
            re.escape(self.key_start)
            + r"\s*([\w.-]+)\s*"
            + re.escape(self.key_end)
            + r"\s?(.*?)\s?"
            + re.escape(self.value_end),
            re.DOTALL,
        )
        return [Call(name.strip(), {key: _value(value) for key, value in shape.findall(rest)})]


# ------------------------------------------------------------------------------------------ reading


def _objects(text: str, name: str, arguments: str) -> list[Call]:
    """The calls of a JSON object or list of them with which a text begins."""
    try:
        found, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        return [Call("", error=f"it is no JSON ({error})")]
    return [
        _object(call, name, arguments) for call in (found if isinstance(found, list) else [found])
    ]


def _object(found: Any, name: str, arguments: str) -> Call:
    if not isinstance(found, Mapping) or not isinstance(found.get(name), str):
        return Call("", error=f'it is no object with "{name}" and "{arguments}"')
    given = found.get(arguments, {})
    if isinstance(given, str):  # some templates write the arguments as text
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = None
    if not isinstance(given, Mapping):
        return Call(found[name], error=f'its "{arguments}" are no object')
    return Call(found[name], {str(k): v for k, v in given.items()})


def _named(text: str, middle: str) -> list[Call]:
    """NAME, a text between, then the arguments as a JSON object."""
    brace = text.find("{")
    name = text[: brace if brace >= 0 else len(text)]
    name = (name.split(middle.strip())[0] if middle.strip() else name).strip()
    if brace < 0:
        return [Call(name[:60], error="it has no arguments as a JSON object")]
    try:
        given, _ = json.JSONDecoder().raw_decode(text[brace:])
    except (ValueError, RecursionError) as error:
        return [Call(name[:60], error=f"its arguments are no JSON ({error})")]
    return [Call(name, given)] if isinstance(given, dict) else [Call(name, error="no object")]


def _python(text: str) -> list[Call]:
    """Calls as Python writes them, of plain values: read, not run."""
    source = _balanced(text[:LONGEST])
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [Call("", error=f"it is no call such as f(x=1) ({error})")]
    calls = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    return [_python_call(call) for call in calls]


def _balanced(text: str) -> str:
    """A text up to the bracket that closes its first one, outside quotes."""
    depth, quote, skip = 0, "", False
    for at, sign in enumerate(text):
        if skip or sign == "\\":
            skip = not skip
        elif quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
            if depth == 0:
                return text[: at + 1]
    return text


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
        return Call("", error="it is no call such as f(x=1)")
    name = ast.unparse(node.func)
    try:
        given = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg is not None}
    except (ValueError, RecursionError):
        return Call(name, error="its arguments are no plain values")
    if node.args or any(k.arg is None for k in node.keywords):
        return Call(name, error="give its arguments by name, as in f(x=1)")
    return Call(name, given)


def _block(text: str) -> list[Call]:
    """The calls of a block of code: JSON, or as Python writes them."""
    text = text.strip()
    return (
        _objects(text, "name", "arguments") if text[:1] in "{[" and _json(text) else _python(text)
    )


def _json(text: str) -> bool:
    return text.startswith("{") or text.lstrip("[ \n").startswith("{")


def _value(text: str) -> Any:
    """What stands between tags: JSON where it is, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# ------------------------------------------------------------------------------------------ finding


def marked_call(number: int = 1, written: bool = False) -> dict[str, Any]:
    """A turn that calls marked functions. written: with arguments as text, as some templates ask
    for.
    """
    given: Any = {KEY: MARK}
    function = {"name": NAME, "arguments": json.dumps(given) if written else given}
    calls = [
        {"type": "function", "id": call_id(n), "function": dict(function)} for n in range(number)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def call_id(number: int) -> str:
    """Nine letters and digits, as Mistral's templates ask for."""
    return f"opdkit{number:03d}"


def call_format(tokenizer: Any, options: Mapping[str, Any]) -> CallFormat:
    """How a tokenizer's chat template writes calls."""
    plain = rendered(tokenizer, [ASKED, {"role": "assistant", "content": MARK}], **options) or ""
    for as_text in (False, True):
        text = rendered(tokenizer, [ASKED, marked_call(1, as_text)], **options) or ""
        if NAME in text and MARK in text:
            start = len(_shared(text, plain[: plain.find(MARK)]))
            ends = tokenizer.convert_ids_to_tokens(sorted(end_ids(tokenizer)))
            after = text.rpartition(MARK)[2]
            cuts = [at for end in ends if (at := after.find(end)) >= 0]
            stop = len(text) - len(after) + min(cuts) if cuts else len(text)
            return replace(_format(text[start:stop]), as_text=as_text)
    return CallFormat()


def _shared(a: str, b: str) -> str:
    """The beginning that two texts share."""
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return a[:same]


def _format(text: str) -> CallFormat:
    """The format of which this is the marked call."""
    at = text.index(NAME)
    for begin in (i for i, sign in enumerate(text[:at]) if sign in "[{"):
        try:
            found, _ = json.JSONDecoder().raw_decode(text[begin:])
        except ValueError:
            continue
        first = found[0] if isinstance(found, list) and found else found
        if isinstance(first, dict) and NAME in first.values():
            name = next(key for key, value in first.items() if value == NAME)
            arguments = next((k for k, v in first.items() if KEY in str(v)), "arguments")
            return CallFormat(text[:begin].strip(), "json", name, arguments, written=text)
    start, rest = text[:at].strip(), text[at + len(NAME) :]
    key, mark = rest.index(KEY), rest.rindex(MARK)
    if rest.startswith("("):
        start = start.removesuffix("[").strip() if start.endswith("[") else start
        return CallFormat(start, "python", written=text)
    brace = rest.rfind("{", 0, key)
    if brace >= 0 and rest[brace + 1 : key].strip() == '"':
        return CallFormat(start, "named", middle=rest[:brace], written=text)
    return _tags(text, start, rest, key, mark)


def _tags(text: str, start: str, rest: str, key: int, mark: int) -> CallFormat:
    """A format that puts the name at the beginning of `rest`, an argument at `key`, its value at
    `mark`, between tags.
    """
    middle, _, key_start = (
        rest[:key].rpartition("\n") if "\n" in rest[:key] else ("", "", rest[:key])
    )
    if not middle:  # on one line: the tag of the name ends with its first bracket
        cut = rest.find(">") + 1
        middle, key_start = rest[:cut], rest[cut:key]
    after = rest[mark + len(MARK) :].lstrip("\n")
    closing = re.match(r"\s*[^\s>]*>?", after)
    return CallFormat(
        start,
        "tags",
        middle=middle,
        key_start=key_start.strip(),
        key_end=rest[key + len(KEY) : mark].strip(),
        value_end=closing[0].strip() if closing else "",
        written=text,
    )


def described(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a student is told of functions that its template does not write."""
    listed = "\n".join(json.dumps(dict(tool.get("function", tool))) for tool in tools)
    return (
        f"You can call these functions:\n{listed}\nTo call one, write a block of this form and end "
        f"your turn:\n{EXAMPLE}"
    )

"""Tests in one process call a program in another: what crosses between them is plain data, never
the program's own objects.

A value that crosses is rebuilt from its exact built-in type, so a program cannot hand back
something that equals everything. What is no plain data (an instance of the program's class, a
function, a generator) stays where it is, and the other side holds a `RemoteValue` of it. Operations
on a RemoteValue are carried out at home, except those that would tell the program what a test
expects and let it answer: comparing or calculating with a value of the tests'.
"""

from __future__ import annotations

import builtins
import collections
import json
import operator
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from plain import BASES, MUTABLE, builtin_class, pack, plain, unpack

MESSAGE = 64 << 20  # bytes of one from a program
ORDER = 512 << 20  # bytes of one of ours


class NotData(BaseException):
    """A program's value that tests could not judge for themselves.

    Not an Exception: a test that expects one must not take it for that.
    """


class Gone(BaseException):
    """The other process ended.

    Not an Exception: a test that expects one must not take it for that.
    """


class Channel:
    """JSON messages over a connected socket, of so many bytes at most each way."""

    def __init__(self, fd: int, sends: int = ORDER, receives: int = MESSAGE) -> None:
        self.fd, self.sends, self.receives = fd, sends, receives

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        if len(data) > self.sends:
            raise ValueError(f"a value of {len(data)} bytes is too large to be handed over")
        data = len(data).to_bytes(4, "little") + data
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except OSError:
            raise Gone from None

    def receive(self) -> Any:
        size = int.from_bytes(self._read(4), "little")
        if size > self.receives:
            raise Gone
        return json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = os.read(self.fd, min(size, 1 << 20))
            except OSError:
                raise Gone from None
            if not part:
                raise Gone
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


# ------------------------------------------------------------------------------------------- remote


def _enter(value: Any) -> Any:
    return value.__enter__()


def _exit(value: Any) -> Any:
    return value.__exit__(None, None, None)


# Carried out at home: they tell the program an index or a key at most.
UNARY: dict[str, Callable[..., Any]] = {
    **{
        f"__{f.__name__}__": f
        for f in (len, iter, next, bool, str, repr, hash, float, int, complex, round, abs, bytes)
    },
    **{
        f"__{name}__": getattr(operator, name)
        for name in ["index", "neg", "pos", "invert", "getitem", "setitem", "delitem"]
    },
    "__reversed__": reversed,
    "__enter__": _enter,
    "__exit__": _exit,
}
# Only among values that are both the program's.
ALIKE = "eq ne lt le gt ge add sub mul matmul truediv floordiv mod pow and or xor"
BINARY: dict[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, f"__{name}__") for name in ALIKE.split()
}
OPERATIONS: dict[str, Callable[..., Any]] = {
    **UNARY,
    **BINARY,
    "__getattr__": getattr,
    "__setattr__": setattr,
    "__plain__": plain,
    "__instancecheck__": lambda kind, value: isinstance(value, kind),
}


# Methods of data that change it; all its others tell something of it, and are asked of data made
# here.
CHANGED_BY = """
append extend insert remove pop clear sort reverse add discard update setdefault popitem
difference_update intersection_update symmetric_difference_update
"""
TELLS = {name for kind, _ in BASES for name in dir(kind) if name[0] != "_"} - {*CHANGED_BY.split()}


class RemoteValue:
    """Something that lives in the other process.

    kind: what the test knows it to be: a class of the program that the test names, made so by the
    test, or else a result, which the test is to judge.
    """

    __slots__ = ("_remote_id", "_remote_kind", "_remote_method", "_remote_peer")

    def __init__(self, peer: Peer, id: int) -> None:
        object.__setattr__(self, "_remote_peer", peer)
        object.__setattr__(self, "_remote_id", id)
        object.__setattr__(self, "_remote_kind", "result")
        object.__setattr__(self, "_remote_method", None)  # of what, and its name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._remote_method is not None:
            owner, name = self._remote_method
            if name in TELLS:
                return getattr(_data(owner, name), name)(*arguments, **named)
        result = self._remote_peer.ask("call", self, arguments, named)
        if self._remote_kind == "class" and isinstance(result, RemoteValue):
            object.__setattr__(result, "_remote_kind", "made")
        if self._remote_method is not None and type(result) is bool and arguments:
            raise NotData(f"an object of the program's own judges by {name!r} what a test gives it")
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)  # copy, numpy and others probe for these
        value = _ask(self, "__getattr__", name)
        if self._remote_kind == "result" and isinstance(value, RemoteValue):
            object.__setattr__(value, "_remote_method", (self, name))
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "__setattr__", name, value)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, RemoteValue) and _ask(self, "__instancecheck__", value) is True


def _ask(remote: RemoteValue, operation: str, *arguments: Any) -> Any:
    return remote._remote_peer.ask("do", remote, [operation, *arguments], {})


def name_class(remote: RemoteValue) -> None:
    """A test names it as a class: to ask what it makes of it is what the test is there for."""
    object.__setattr__(remote, "_remote_kind", "class")


def _data(remote: RemoteValue, asked: str) -> Any:
    """The data that an instance of a class derived from list and the like holds, made here."""
    held = _ask(remote, "__plain__")
    if isinstance(held, RemoteValue):
        raise NotData(f"an object of the program's own is asked for {asked!r}, as if it were data")
    return held


def _operation(name: str) -> Any:
    if name in BINARY:

        def binary(self: RemoteValue, other: Any) -> Any:
            if self is other and name == "__eq__":
                return True
            if isinstance(other, RemoteValue):
                return _ask(self, name, other)
            # an instance of a class derived from list equals the list that it holds
            held = _ask(self, "__plain__")
            return NotImplemented if isinstance(held, RemoteValue) else BINARY[name](held, other)

        return binary
    if name in (
        "__bool__",
        "__len__",
        "__str__",
        "__repr__",
        "__hash__",
        "__float__",
        "__int__",
        "__index__",
        "__complex__",
    ):
        return lambda self: _ask(self, name)
    if name == "__exit__":
        return lambda self, *error: _ask(self, name)
    return lambda self, *arguments: _ask(self, name, *arguments)


for _name in (*UNARY, *BINARY):
    setattr(RemoteValue, _name, _operation(_name))


class Peer:
    """One end of the channel.

    Each end holds what its side keeps, and asks the other to use what that side keeps.

    classes: the module whose classes the other side may look into; None: it may look into
    everything, as tests may into a program. A program that could look into what a test hands it,
    such as a generator's frame, would find what the test expects. nan: whether the other side may
    hand it over: `not abs(f(3) - 2.5) > 0.1` holds of it.
    """

    def __init__(self, channel: Channel, classes: str | None = None, *, nan: bool = True) -> None:
        self.channel, self.classes, self.nan = channel, classes, nan
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}  # id() of what is kept: its place
        self.remotes: dict[int, RemoteValue] = {}

    def pack(self, value: Any) -> Any:
        return pack(value, self._keep)

    def unpack(self, packed: Any) -> Any:
        return unpack(packed, self._find)

    def ask(self, what: str, target: RemoteValue, arguments: Any, named: dict[str, Any]) -> Any:
        """Have the other side do something; meanwhile do what it asks."""
        self.channel.send(
            [
                what,
                target._remote_id,
                [self.pack(a) for a in arguments],
                {k: self.pack(v) for k, v in named.items()},
            ]
        )
        while True:
            kind, *rest = self.channel.receive()
            if kind == "value":
                value, changed = rest
                given = _by_place(arguments, named)
                for key, packed in changed:
                    _refill(given[key], self.unpack(packed))
                return self.unpack(value)
            if kind == "error":
                raise _error(*rest)
            self.answer(kind, *rest)

    def answer(self, what: str, target: int, arguments: list[Any], named: dict[str, Any]) -> None:
        """Do what the other side asks for, and tell it what came of it."""
        told = self._done(what, target, arguments, named)
        try:
            self.channel.send(told)
        except (ValueError, RecursionError, MemoryError) as error:  # too large, or too deep
            self.channel.send(["error", "ValueError", [str(error)]])

    def _done(self, what: str, target: int, arguments: list[Any], named: dict[str, Any]) -> Any:
        try:
            values = [self.unpack(a) for a in arguments]
            more = {k: self.unpack(v) for k, v in named.items()}
            does = self.kept[target] if what == "call" else partial(self._do, self.kept[target])
            result = self.pack(does(*values, **more))
            before, after = _by_place(arguments, named), _by_place(values, more)
            changed = [
                (k, self.pack(v))
                for k, v in after.items()
                if isinstance(v, MUTABLE) and self.pack(v) != before[k]
            ]
            return ["value", result, changed]
        except Exception as error:
            kind = next(
                k.__name__ for k in type(error).__mro__ if vars(builtins).get(k.__name__) is k
            )
            told = [a for a in error.args if a is None or type(a) in (bool, int, float, str)]
            return ["error", kind, told if len(told) == len(error.args) else [str(error)]]

    def _do(self, target: Any, operation: str, *arguments: Any) -> Any:
        if operation.endswith("attr__") and self.classes is not None:
            name = arguments[0]
            if (
                type(target).__module__ != self.classes
                or not isinstance(name, str)
                or name.startswith("_")
            ):
                raise AttributeError(f"the program may not use {name!r} of what a test gives it")
        return OPERATIONS[operation](target, *arguments)

    def _keep(self, value: Any) -> Any:
        if isinstance(value, RemoteValue):
            return ["yours", value._remote_id]
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return ["mine", self.numbers[id(value)]]

    def _find(self, owner: str, number: int) -> Any:
        if owner == "nan":
            if not self.nan:
                raise NotData("the program gives nan, which no test here speaks of")
            return float("nan")
        if owner == "yours":
            return self.kept[number]
        if owner != "mine":
            raise ValueError(f"no value is called {owner!r}")
        return self.remotes.setdefault(number, RemoteValue(self, number))


def _by_place(arguments: Sequence[Any], named: dict[str, Any]) -> dict[int | str, Any]:
    return dict([*enumerate(arguments), *named.items()])


def _refill(value: Any, new: Any) -> None:
    """What a call did to an argument is done to the caller's."""
    if type(value) is not type(new):
        return
    if isinstance(value, list | bytearray):
        value[:] = new
    else:
        value.clear()
        (value.extend if isinstance(value, collections.deque) else value.update)(new)


def _error(kind: str, arguments: list[Any]) -> Exception:
    """The program's exception: of the nearest built-in class."""
    try:
        error = builtin_class(kind)(*arguments)
    # such as UnicodeDecodeError, whose arguments must be of certain types
    except (TypeError, ValueError):
        error = None
    return error if isinstance(error, Exception) else Exception(*arguments)


def why(error: BaseException) -> str:
    """An error in a line."""
    return (
        f"{type(error).__name__}: {error}"[:300]
        .replace("\n", " ")
        .encode("ascii", "backslashreplace")
        .decode()
        or "?"
    )


sys.set_int_max_str_digits(0)  # a program may compute large numbers, and its time is limited

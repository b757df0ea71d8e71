"""A person's own code ends in one message, whatever it does."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress

import pytest

from opdkit.base.errors import UserError, shown
from opdkit.base.own_code import own_code


class Unprintable(BaseException):
    def __str__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), r"^it fails: line \d+: KeyError: 'x'\. Correct it"),
        (SystemExit(0), r"calls sys\.exit\(0\) \(line \d+\), which would end the whole program"),
        (Unprintable(), r"line \d+: Unprintable"),
        (GeneratorExit(), r"GeneratorExit"),
        (UserError("as it is"), r"^as it is$"),
    ],
)
def test_whatever_it_raises(error: BaseException, said: str) -> None:
    with pytest.raises(UserError, match=said), own_code("it fails", __file__):
        raise error


def test_ctrl_c_ends_the_program() -> None:
    with pytest.raises(KeyboardInterrupt), own_code("it fails"):
        raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_what_does_not_return_is_stopped() -> None:
    """Also where it catches every `Exception`; the former handler is back afterwards."""
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(UserError, match=r"did not return within 0 s"), own_code("x", "", 0.05):
        while True:
            with suppress(Exception):
                sum(range(100))
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_value_is_shown_whatever_it_is() -> None:
    class Bad:
        def __repr__(self) -> str:
            raise ValueError

    assert shown(10**5000) == "an integer of 16610 bits"
    assert len(shown("x" * 10**6)) < 300 and "Bad" in shown(Bad())
    assert sys.get_int_max_str_digits() == 4300

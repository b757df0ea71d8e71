"""What the processes of a run on a cluster tell whoever started it, and what they are told."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable


class Board:
    """Lines from the trainers, read by the driver; a signal from the driver, read by them."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.number = 0

    def say(self, stream: str, text: str) -> None:
        self.lines.append((stream, text))

    def read(self) -> list[tuple[str, str]]:
        """(stream, text), what was said since it was read last."""
        taken, self.lines = self.lines, []
        return taken

    def stop(self, number: int) -> None:
        """All trainers are to end as by this signal."""
        self.number = number

    def stopping(self) -> int:
        """The number of that signal; 0: they may go on."""
        return self.number


class Teller(io.TextIOBase):
    """A stream whose text goes to the board, line by line."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.text, self.lock = say, "", threading.Lock()

    def write(self, text: str) -> int:
        with self.lock:
            *lines, self.text = (self.text + text).split("\n")
            for line in lines:
                self.say(line + "\n")
        return len(text)

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return False

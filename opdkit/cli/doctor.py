"""`opdkit doctor`."""

from __future__ import annotations

from typing import Any

from opdkit.cli.command import Command


def show_machine(options: Any) -> None:
    from opdkit.run.doctor import doctor

    print(doctor())


DOCTOR = Command(
    "doctor", "show what this machine offers and which path each phase will take", show_machine
)

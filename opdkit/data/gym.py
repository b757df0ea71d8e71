"""Rows that reasoning-gym generates: `reasoning_gym:task?size=500&seed=1&key=value`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any
from urllib.parse import parse_qsl

from opdkit.base.errors import UserError, nearest
from opdkit.types import DataRow

PREFIX = "reasoning_gym:"


def gym_rows(address: str, *, limit: int | None = None, seed: int = 0) -> list[DataRow]:
    """The task's rows.

    Each keeps under `reasoning_gym` what the task's own scorer needs: task, config and entry.
    """
    task, settings = parse(address)
    settings.setdefault("seed", seed)
    entries = _generate(task, settings, limit)
    return [
        {
            **entry,
            "prompt": entry["question"],
            "response": None,
            "teacher": None,
            "id": f"{task}-{settings['seed']}-{index}",
            "reasoning_gym": {"task": task, "config": settings, "entry": entry},
        }
        for index, entry in enumerate(entries)
    ]


def parse(address: str) -> tuple[str, dict[str, Any]]:
    """The task and its settings; values are read as JSON, and as text where they are none."""
    task, _, query = address.removeprefix(PREFIX).partition("?")
    settings = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return task, settings


def _generate(task: str, settings: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(
            "reasoning-gym's tasks need the package reasoning-gym, which is not installed: pip "
            "install 'opdkit[rewards]'"
        ) from None
    if task not in DATASETS:
        raise UserError(f"reasoning-gym has no task {task!r}{nearest(task, list(DATASETS))}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    for key in settings:
        if key not in known:
            raise UserError(
                f"reasoning-gym's task {task!r} has no setting {key!r}{nearest(key, known)}"
            )
    try:
        data = reasoning_gym.create_dataset(task, **settings)
        return [data[i] for i in range(len(data) if limit is None else min(limit, len(data)))]
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"reasoning-gym refuses these settings of {task!r}: {settings}: {error}. Correct them, "
            "as in reasoning_gym:chain_sum?size=500"
        ) from error

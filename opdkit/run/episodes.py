"""A run whose student acts in an environment: its tasks, and the sampler of its episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkit.base.errors import UserError
from opdkit.data import Prompts
from opdkit.environments import Dialogue, EnvironmentSettings, EpisodeSampler
from opdkit.models.tokenizers import stop_ids
from opdkit.run.setting_rules import OWN_TASKS
from opdkit.types import DataRow, Prompt

FIRST = 4  # episodes that are opened before a run, to see how long openings are


def tasks(environment: EnvironmentSettings | None) -> list[DataRow]:
    """The tasks that an environment makes, as rows of data."""
    made = None if environment is None else environment.rows()
    if not made:
        raise UserError(
            f"data={OWN_TASKS} stands for tasks that an environment makes of its own, and "
            + ("the run has no environment" if environment is None else f"{environment} makes none")
            + ": name a file or a data set"
        )
    return [{"id": str(i), **row} for i, row in enumerate(made)]


def asked(rows: Sequence[DataRow]) -> list[DataRow]:
    """Rows of an environment, which need no prompt of their own: it writes what is read first."""
    return [{"prompt": str(row.get("id", i)), **row} for i, row in enumerate(rows)]


def episodic(
    environment: EnvironmentSettings | None,
    sampler: Any,
    prompts: Prompts,
    model: Any,
) -> Any:
    """The sampler, or where there is an environment the sampler of its episodes.

    prompts: how questions are written (chat, system, thinking), as openings are too. model: the
    one that is sampled from.
    """
    if environment is None:
        return sampler
    dialogue = Dialogue(
        prompts.tokenizer,
        chat=prompts.chat,
        system=prompts.system,
        ends=stop_ids(model, prompts.tokenizer),
        **prompts.options,
    )
    return EpisodeSampler(
        sampler,
        dialogue,
        environment.make,
        getattr(environment, "name", environment.kind),
        environment.max_turns,
        environment.turn_tokens,
    )


def openings(sampler: Any, prompts: Prompts, seed: int) -> Sequence[Prompt]:
    """What is read first: the prompts themselves, or of episodes the first few openings."""
    if isinstance(sampler, EpisodeSampler):
        return sampler.openings(prompts[:FIRST], seed)
    return prompts

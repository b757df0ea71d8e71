"""What a run asks for, read and checked before any model is loaded: method, reward, rows, cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opdkit.curricula import writer_of
from opdkit.curricula.data import no_response
from opdkit.data.cache import Cache
from opdkit.data.prompts import check_template
from opdkit.methods.method import Method
from opdkit.rewards import Reward, load_reward
from opdkit.rewards.rows import check_rows
from opdkit.run.open import Given
from opdkit.run.prompts import from_cache, read_rows, stored_rollouts, within
from opdkit.run.refuse import refuse, refuse_no_response
from opdkit.run.settings import Data, Run
from opdkit.teachers import route
from opdkit.teachers.teacher import Teacher
from opdkit.types import DataRow


@dataclass(frozen=True)
class Asked:
    """What is known of a run without a model."""

    method: Method
    reward: Reward | None
    rows: list[DataRow]
    eval_rows: list[DataRow] | None  # None: nothing is evaluated
    stored: Cache | None  # where rollouts are read from a cache
    routes: Mapping[str, Teacher]  # several teachers by what rows call them; empty: there is one


def ask(run: Run, given: Given) -> Asked:
    """Reads what the run names; refuses what can be refused without a model."""
    method = within(run, from_cache(given.method or run.method_spec.load(), run))
    reward = given.reward or load_reward(run.reward)
    refuse(run, method, reward)
    # a judge that is not there, a machine that cannot confine programs
    if reward is not None and hasattr(reward, "check"):
        reward.check()
    stored = stored_rollouts(run, method)
    for world in (run.world, run.held_out_world):
        if world is not None:
            world.check()
    rows = read_rows(run.prompts, given.rows, run.seed, run.world)
    eval_rows = (
        None
        if run.evaluate is None
        else read_rows(run.evaluate.prompts, given.eval_rows, run.seed, run.held_out_world)
    )
    check_data(run.prompts, rows, reward, method)
    if run.evaluate is not None and eval_rows is not None:
        check_data(run.evaluate.prompts, eval_rows, reward)
    if method.curriculum.validates:
        refuse_no_response([row.get("response") for row in eval_rows or ()])
    routes = run.teachers.routes if "teacher" in method.opened else {}
    for row in rows if routes else ():
        route(row["teacher"], routes, f"row {row['id']}")
    if stored is not None:
        stored.refuse_unknown([row["id"] for row in rows])
    return Asked(method, reward, rows, eval_rows, stored, routes)


def check_data(
    data: Data, rows: Sequence[DataRow], reward: Reward | None, method: Method | None = None
) -> None:
    """Refuses rows that the template, the reward or the method's curriculum could not use, before
    they are met in the middle of a run.
    """
    if data.template is not None:
        check_template(data.template, rows)
    check_rows(reward, rows)
    if method is not None and writer_of(method.curriculum).reads_data:
        for row in rows:
            if not row.get("response"):
                raise no_response(row["id"])

"""What a run asks for, read and checked before any model is loaded: method, reward, rows, cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opdkit.annotators import AnnotatorSettings
from opdkit.base.address import load_address
from opdkit.base.errors import UserError
from opdkit.curricula import writer_of
from opdkit.curricula.data import no_response
from opdkit.data.cache import Cache, is_cache
from opdkit.data.pairs import pair_of
from opdkit.data.prompts import check_template
from opdkit.data.views import nothing_to_show, of_row, view_of
from opdkit.methods.method import Method
from opdkit.rewards import Reward, load_reward
from opdkit.rewards.named import refuse_idle
from opdkit.rewards.rows import check_rows
from opdkit.run.annotate import annotations_of, refuse_annotations, refuse_rows
from opdkit.run.open import Given
from opdkit.run.prompts import as_run, read_rows, stored_rollouts, within
from opdkit.run.refuse import refuse, refuse_no_response
from opdkit.run.settings import Data, Run
from opdkit.teachers import route
from opdkit.teachers.teacher import Teacher
from opdkit.train.collect.filters import refuse_domains
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
    # what is noted on rollouts, by name
    annotated: Mapping[str, AnnotatorSettings] = field(default_factory=dict)


def ask(run: Run, given: Given) -> Asked:
    """Reads what the run names; refuses what can be refused without a model."""
    method = within(run, as_run(given.method or run.method_spec.load(), run))
    reward = load_reward(run.reward if given.reward is None else given.reward, run.reward_weights)
    refuse(run, method, reward)
    annotated = annotations_of(run, method)
    scored = reward is not None or run.environment is not None
    refuse_annotations(run, method, annotated, scored)
    for address in (address for one in annotated.values() for address in one.code):
        load_address(address)
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
    refuse_rows(annotated, rows)
    if run.evaluate is not None and eval_rows is not None:
        check_data(run.evaluate.prompts, eval_rows, reward)
    if "loss" in method.curriculum.measures:
        refuse_no_response([row.get("response") for row in eval_rows or ()])
    routes = run.teachers.routes if "teacher" in method.opened else {}
    check_views(run, method, rows)
    for row in rows if routes else ():
        route(row["teacher"], routes, f"row {row['id']}")
    if run.token_budget:
        domain = domains(run.domain, routes)
        refuse_domains(run.token_budget, {domain(row) for row in rows}, run.domain)
    if stored is not None:
        stored.refuse_unknown([row["id"] for row in rows])
    return Asked(method, reward, rows, eval_rows, stored, routes, annotated)


def domains(column: str, routes: Mapping[str, Teacher]) -> Callable[[DataRow], str]:
    """What says of which domain a row is: its route, where teachers are told apart by it; else what
    stands in its column, "default" where nothing does.
    """

    def domain(row: DataRow) -> str:
        if column == "teacher" and routes:
            return route(row.get("teacher"), routes, f"row {row.get('id')}")
        return str(row.get(column) or "default")

    return domain


def check_views(run: Run, method: Method, rows: Sequence[DataRow]) -> None:
    """Refuses views for which no row has anything to show, and tells of rows that have nothing;
    where responses are written under a view, every row must have something.
    """
    views = {view for name in method.opened for view in run.model_named(name).views}
    written = writer_of(method.curriculum).views
    if (views or written) and is_cache(run.prompts.source):
        raise UserError(
            f"method {method.name or 'own'!r} reads questions under a view, and the prompts in "
            f"{run.prompts.source} are token ids, of which it is not known how they were written, "
            "so that a view could not be written like them: name the data set itself, or give the "
            "view to `opdkit cache-teacher`"
        )
    for view in sorted(views, key=str):
        if note := view.check(rows):
            print(f"opdkit: {note}", file=sys.stderr)
    for name in written:
        for row in rows:
            if view_of(name).row(of_row(row)) is None:
                raise nothing_to_show(row, name)


def check_data(
    data: Data, rows: Sequence[DataRow], reward: Reward | None, method: Method | None = None
) -> None:
    """Refuses rows that the template, the reward or the method's curriculum could not use, before
    they are met in the middle of a run.
    """
    if data.template is not None:
        check_template(data.template, rows)
    check_rows(reward, rows)
    if method is not None:
        refuse_idle(reward, rows)
    writer = None if method is None else writer_of(method.curriculum)
    for row in rows if writer is not None and writer.reads_data else ():
        if not row.get("response"):
            raise no_response(row["id"])
    for row in rows if writer is not None and writer.reads_pairs else ():
        pair_of(row)

"""Methods side by side: the same prompts, seeds and budget in student tokens, in a folder that an
interrupted comparison continues.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opdkit import recipes
from opdkit.base.address import is_address
from opdkit.base.config import plain, read_yaml, to_yaml
from opdkit.base.errors import UserError
from opdkit.base.files import read_lines, remove_folder, tidy, write_whole
from opdkit.base.lock import locked
from opdkit.methods import expression
from opdkit.methods.method import Method, as_method, spelled
from opdkit.report import write_report
from opdkit.rewards import load_reward
from opdkit.run.folder import refuse_several
from opdkit.run.launch import execute
from opdkit.run.open import Given
from opdkit.run.refuse import refuse
from opdkit.run.settings import MethodSpec, Run, make_run, set_value
from opdkit.study.page import write_page
from opdkit.study.screen import ComparisonScreen, text_table
from opdkit.study.standings import (
    PLAN,
    TOKENS,
    Standing,
    finished,
    read_comparison,
    standings,
    write_parquet,
)
from opdkit.train.checkpoint import checkpoints

# times the first method's steps: the most that a method whose student writes less per step may take
CAP = 2
COLON = re.compile(r"(?P<name>.+?\.py:\w+|[^:()]+):(?P<arguments>\w+=.*)")


@dataclass(frozen=True)
class Contender:
    """A method of the comparison, under the name it is compared by."""

    label: str  # as `method.load` reads it
    method: Method
    folder: str


def contender(method: str | MethodSpec | Method) -> Contender:
    """A method by name, `name:key=value,key=value`, `file.py:function` or an expression such as
    "tropd(k=32) * iw_opd".
    """
    if isinstance(method, str):
        short = COLON.fullmatch(method)
        text = f"{short['name']}({short['arguments']})" if short else method
        made = as_method(text)
    else:
        made = method if isinstance(method, Method) else method.load()
        text = ""
    label = spelled(made)
    if label == "own" and not text:
        raise UserError(
            "a method made of objects cannot be compared, because its runs could not be continued "
            "from their folders: write a function that returns it and name that, file.py:function"
        )
    known = text if label == "own" else label
    return Contender(known, made, _folder(known))


def _folder(label: str) -> str:
    """A folder's name that stands for a method, its arguments and, of one's own, the code as it is
    now.
    """
    addresses = [label] if is_address(label) else expression.ADDRESS.findall(label)
    short = label
    for address in addresses:
        short = short.replace(address, Path(address).name)
    slug = re.sub(r"[^\w.=-]+", "-", short).strip("-")[:60]
    if slug == label:
        return slug
    code = [Path(address.rpartition(":")[0]).expanduser().read_bytes() for address in addresses]
    return f"{slug}-{hashlib.sha256(b''.join([label.encode(), *code])).hexdigest()[:8]}"


@dataclass(frozen=True)
class ComparisonPlan:
    """What is run: a base whose method, seed and budget vary."""

    folder: Path
    recipe: str
    base: Run
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    # whose runs have the recipe's steps; the others stop at the tokens it sampled
    leader: Contender

    def place(self, who: Contender, seed: int) -> Path:
        return self.folder / "runs" / who.folder / f"seed-{seed}"

    def order(self) -> list[tuple[Contender, int]]:
        """Seed by seed, the leader first: an interrupted comparison has whole seeds to show."""
        others = [c for c in self.contenders if c is not self.leader]
        return [(c, seed) for seed in self.seeds for c in (self.leader, *others)]

    def run(self, who: Contender, seed: int) -> Run:
        """One run, as it would be with `opdkit train`."""
        base, settings = self.base, self.base.evaluate
        if settings is not None and not (who is self.leader and seed == self.seeds[0]):
            settings = replace(settings, teacher=False)  # it is the same teacher
        run = replace(
            base,
            method=MethodSpec(who.label),
            seed=seed,
            output=str(self.place(who, seed)),
            evaluate=settings,
        )
        if base.max_tokens is None and who is not self.leader:
            budget = self.budget(seed)
            return replace(run, steps=CAP * base.steps, max_tokens=budget)
        return run

    def budget(self, seed: int) -> int:
        """Tokens that the leader's student wrote with a seed."""
        found = read_lines(self.place(self.leader, seed) / "metrics.jsonl")[-1][TOKENS]
        if not found:
            raise UserError(
                f"the student wrote nothing with {self.leader.label}, so that it sets no budget "
                "for the others: in a new folder, name a method first whose student writes, or set "
                "max_tokens=N for all"
            )
        return found

    def write(self, failed: Mapping[tuple[str, int], str]) -> None:
        """comparison.yaml: what the page shows of it, and what a later call must agree with."""
        if self.base.max_tokens is None:
            budget = (
                f"per seed, the tokens that {self.leader.label} samples in {self.base.steps} steps"
            )
        else:
            budget = (
                f"{self.base.max_tokens:,} student tokens per run, at most {self.base.steps} steps"
            )
        values = {
            "recipe": self.recipe,
            "budget": budget,
            "leader": self.leader.label,
            "seeds": list(self.seeds),
            "methods": [
                {
                    "label": c.label,
                    "folder": c.folder,
                    "summary": c.method.summary,
                    "formula": str(c.method),
                    "failed": {
                        seed: failed[c.label, seed]
                        for seed in self.seeds
                        if (c.label, seed) in failed
                    },
                }
                for c in self.contenders
            ],
            "run": shared(self.base),
        }
        write_whole(self.folder / PLAN, to_yaml(values))


def shared(base: Run) -> dict[str, Any]:
    """The settings that all runs have in common."""
    return {
        name: value
        for name, value in plain(base).items()
        if name not in ("method", "output", "seed")
    }


@dataclass(frozen=True)
class Comparison:
    """What a comparison leaves."""

    folder: Path
    page: Path
    parquet: Path
    standings: list[Standing]
    failed: dict[tuple[str, int], str]  # (method, seed): what went wrong

    def __str__(self) -> str:
        return text_table(self.standings)


def compare(
    methods: Sequence[str | MethodSpec | Method],
    recipe: str | Run | Mapping[str, Any],
    seeds: int | Sequence[int] = 3,
    out: str | Path = "runs/comparison",
    **settings: Any,
) -> Comparison:
    """Run methods under the same prompts, seeds and budget, and write comparison.html and
    comparison.parquet into `out`.

    recipe: a recipe's name, file.py:function, a run's YAML file, a `Run` or its nested values; its
    own method is not used. seeds: how many, counted from the recipe's seed, or which. settings: as
    of `distill`, for all runs. A comparison in `out` is continued: runs that have ended are kept,
    the others resume from their checkpoints.
    """
    refuse_several()
    with locked(Path(out)):
        plan = _plan(methods, recipe, seeds, Path(out), settings)
        if isinstance(recipe, str):
            recipes.make(recipe, plan.folder / "recipe")
        try:
            return _compared(plan)
        finally:
            if not _begun(plan.folder):  # nothing is there that settings could disagree with
                (plan.folder / PLAN).unlink(missing_ok=True)


def _compared(plan: ComparisonPlan) -> Comparison:
    """Every run that is not there yet, and what they all say."""
    failed: dict[tuple[str, int], str] = {}
    plan.write(failed)
    for done in filter(finished, [plan.place(c, seed) for c, seed in plan.order()]):
        _settled(done)
    todo = [(c, seed) for c, seed in plan.order() if not finished(plan.place(c, seed))]
    screen = ComparisonScreen(len(plan.order()), len(plan.order()) - len(todo))
    for who, seed in todo:
        run = plan.run(who, seed)
        screen.begin(who.label, run)
        try:
            execute(run, Given(show=screen.step), resume=True)
        except UserError as error:
            if who is plan.leader and plan.base.max_tokens is None:
                raise UserError(
                    f"{who.label} with seed {seed}, from which the others take their budget, "
                    f"failed: {error}"
                ) from error
            failed[who.label, seed] = str(error)
            print(
                f"opdkit: {who.label} with seed {seed} failed, the others go on: {error}",
                file=sys.stderr,
            )
        if finished(run.folder):
            _settled(run.folder)
        screen.end()
        plan.write(failed)
        write_page(read_comparison(plan.folder))
    entries = read_comparison(plan.folder)
    return Comparison(
        plan.folder,
        write_page(entries),
        write_parquet(entries),
        standings(entries.entrants),
        failed,
    )


def _settled(run: Path) -> None:
    """A finished run with its report, and without what a kill left of its end. Its model stays;
    optimisers of many runs would fill a disk.
    """
    with locked(run):
        tidy(run)
        for path in checkpoints(run):
            remove_folder(path)
        if not (run / "report.html").exists():
            write_report(run)


def _begun(folder: Path) -> bool:
    """Whether a run of the comparison has taken a step."""
    return any(path.stat().st_size for path in folder.glob("runs/*/*/metrics.jsonl"))


# --------------------------------------------------------------------------------------------- plan


def _plan(
    methods: Sequence[str | MethodSpec | Method],
    recipe: str | Run | Mapping[str, Any],
    seeds: int | Sequence[int],
    folder: Path,
    settings: Mapping[str, Any],
) -> ComparisonPlan:
    """Everything that can be refused is refused here, before anything is made or run."""
    contenders = tuple(map(contender, methods))
    labels = [c.label for c in contenders]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise UserError(f"{twice} is named twice with the same arguments: name each method once")
    if len(contenders) < 2:
        raise UserError(
            "a comparison needs two methods or more; a single one is run with `opdkit train`"
        )
    base = _base(recipe, folder, settings)
    chosen = tuple(range(base.seed, base.seed + seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"seeds={seeds!r} must be one or more, and each once")
    if base.evaluate is None:
        raise UserError(
            "a comparison is decided on held-out problems, and this run evaluates on none: set "
            "evaluate.data=FILE (and reward=...)"
        )
    reward = load_reward(base.reward, base.reward_weights)
    for c in contenders:
        refuse(base, c.method, reward)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            "a comparison is kept as Parquet, which needs pyarrow: pip install 'opdkit[data]'"
        ) from None
    leader = _continued(folder, base, contenders)
    named = recipe if isinstance(recipe, str) else "given in Python"
    return ComparisonPlan(folder, named, base, contenders, chosen, leader)


def _base(recipe: str | Run | Mapping[str, Any], folder: Path, settings: Mapping[str, Any]) -> Run:
    if isinstance(recipe, Run):
        values = plain(recipe)
    elif isinstance(recipe, str):
        values = (
            read_yaml(recipe)
            if recipe.endswith((".yaml", ".yml"))
            else recipes.recipe(recipe, folder / "recipe")
        )
    else:
        values = dict(recipe)
    values = {**values, "method": "opd", "output": str(folder)}
    for name, value in settings.items():
        key = name.replace("__", ".")
        if key.partition(".")[0] == "method":
            raise UserError(
                f"{key} would change every method alike: write a method's arguments behind its "
                "name, as in tropd:k=32"
            )
        if key == "output":
            raise UserError(
                "the runs of a comparison are put into its own folder: choose that with --out"
            )
        set_value(values, key, value)
    return make_run(values)


def _continued(folder: Path, base: Run, contenders: Sequence[Contender]) -> Contender:
    """The method that sets the budget.

    A comparison that is there already must be of the same settings.
    """
    if not (folder / PLAN).exists() or not _begun(folder):
        if (folder / "run.yaml").exists():
            raise UserError(
                f"{folder} holds a run, not a comparison: choose another folder with --out"
            )
        return contenders[0]
    former = read_yaml(folder / PLAN)
    before, now = _flat(former["run"]), _flat(shared(base))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        told = ", ".join(
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:3]
        )
        raise UserError(
            f"{folder} holds a comparison with other settings ({told}), and runs with different "
            "ones cannot be compared: choose another folder with --out, or give the same settings "
            "to continue it"
        )
    leader = next((c for c in contenders if c.label == former["leader"]), None)
    if leader is None:
        raise UserError(
            f"the budget of the comparison in {folder} is what {former['leader']} samples: name it "
            "among the methods (its finished runs are kept), or choose another folder with --out"
        )
    return leader


def _flat(values: Any, at: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings."""
    if not isinstance(values, dict):
        return {at: values}
    return {
        k: v
        for key, value in values.items()
        for k, v in _flat(value, f"{at}.{key}" if at else str(key)).items()
    }

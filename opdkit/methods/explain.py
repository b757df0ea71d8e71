"""What a method will do, before anything is loaded: formula, needs, forward passes, memory of its
loss.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from opdkit.curricula import Plain, reads_cache, writer_of
from opdkit.methods import expression
from opdkit.methods.arguments import Argument, described
from opdkit.methods.method import Method, as_method, function_of, load, methods
from opdkit.objective.grammar import RolloutLoss
from opdkit.objective.head import CHUNK_BYTES, CHUNK_ENTRIES
from opdkit.objective.needs import Needs, reads_student
from opdkit.objective.ratio_layer import apply_layer

GIB = 2**30
WIDTH = 96  # of what is said of an argument, in columns
SHARED = "arguments of every policy gradient"

Shown = tuple[str, Any, Argument]  # an argument's name, its value, what is said of it


def source_of(method: Method) -> str:
    """The paper a method is from."""
    found = re.search(r"arXiv[: ]?(\d{4}\.\d{5})", method.doc)
    return f"arXiv:{found[1]}" if found else ""


def idea(method: Method) -> str:
    """A method's summary without the name it begins with."""
    name, _, rest = method.summary.partition(": ")
    return rest if rest and len(name.split()) <= 3 else method.summary


def scored_before(method: Method) -> str:
    """Why a step makes a pass of the student before it moves, over some rollouts at least; "" where
    what the sampler noted of them is enough.
    """
    needs = method.needs
    # the live student is, at first, the one before the step
    of_student = needs.of("student") | needs.of("live")
    if reads_student(needs):
        return "(it reads more than the sampler notes)"
    if not of_student:
        return ""
    if not writer_of(method.curriculum).own:
        return "(it did not write all of these rollouts as it is now and behind these prompts)"
    return "(some of these rollouts were written earlier)" if method.curriculum.recalls else ""


def passes(method: Method) -> list[str]:
    """The forward passes of one step, besides sampling."""
    needs, stored = method.needs, reads_cache(method.curriculum)
    recorded = {m for m, spec in method.models.items() if spec.get("kind") == "recorded"}
    first = scored_before(method)
    lines = [f"student, without gradient, before the step {first}"] if first else []
    # their numbers are stored with the rollouts
    elsewhere = {"student", "sampler", "live"} | ({"teacher"} if stored else set()) | recorded
    for name in sorted(needs.models - elsewhere):
        whole = " (its whole vocabulary: in this process)" if needs.whole(name) else ""
        whole = (
            " (its whole vocabulary, over the same text in its own tokens: in this process)"
            if needs.spans(name)
            else whole
        )
        lines.append(f"{name}, without gradient{whole}")
    if needs.of("live") and any(companion.disturbs for companion in method.companions):
        lines.append(
            "student, without gradient, at every optimiser step (it learns in other passes than "
            "those in which it is scored, and the whole of a rollout is read in these)"
        )
    lines.append("student, with gradient, at the positions that a term selects")
    return lines


def brought(method: Method) -> list[str]:
    """Who a method's models are unless a run says otherwise, as a run's file would say it."""
    return [f"{name}: {_written(spec)}" for name, spec in method.models.items()]


def _written(spec: Any) -> str:
    """Nested values in one line of YAML."""
    if isinstance(spec, Mapping):
        return f"{{{', '.join(f'{k}: {_written(v)}' for k, v in spec.items())}}}"
    if isinstance(spec, (list, tuple)):
        return f"[{', '.join(map(_written, spec))}]"
    return str(spec).lower() if isinstance(spec, bool) else str(spec)


def arguments_of(method: Method) -> tuple[list[Shown], list[Shown]]:
    """The arguments of a method's function, and those of the ratio layer."""
    if not method.arguments:
        return [], []
    function = function_of(method.name)
    said, layer = _said(function), _said(apply_layer)
    known = inspect.signature(function).parameters
    own = [(k, v, said.get(k, Argument(""))) for k, v in method.arguments if k in known]
    return own, [(k, v, layer[k]) for k, v in method.arguments if k not in known]


def _said(function: Any) -> dict[str, Argument]:
    return described(inspect.getdoc(function) or "")[1]


def _lines(title: str, arguments: list[Shown]) -> list[str]:
    """Arguments with their values, each followed by what is said of it."""
    lines = [title] if arguments else []
    for name, value, said in arguments:
        source = f" Default: {said.source}" if said.source else ""
        lines += [f"  {name} = {value!r}"]
        lines += textwrap.wrap(
            said.meaning + source, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return [*lines, ""] if lines else []


def explain(method: str | Method | Any, **arguments: Any) -> str:
    """A method's formula, needs and cost, in words."""
    made = as_method(method, **arguments)
    lines = [made.name or "objective", "=" * len(made.name or "objective"), ""]
    if made.doc:
        lines += [described(made.doc)[0], ""]
    lines += ["prints as", f"  {made}", ""]
    own, layer = arguments_of(made)
    lines += _lines("arguments", own) + _lines(SHARED, layer)
    needs = made.needs
    lines += ["reads", *(f"  {x}" for x in str(needs).split(", ")), ""]
    lines += [
        "forward passes of a step, besides sampling",
        *(f"  {i}. {x}" for i, x in enumerate(passes(made), 1)),
    ]
    lines += [f"unless the run says otherwise, {model}" for model in brought(made)]
    base = expression.base_of(made.name)
    if base is not None:
        added = [x for x in passes(made) if x not in passes(load(base))]
        lines.append(f"  new beside those of {base} alone: {'; '.join(added) or 'none'}")
    together = any(isinstance(t.loss, RolloutLoss) for t in made.objective.terms)
    if together or needs.kept("live"):
        over = "whole rollouts needs all their log-probs" if together else "a step needs all of it"
        lines.append(
            "  from the second optimiser step on its rollouts, the student once more without "
            f"gradient: a loss over {over} first"
        )
    lines.append(
        "memory of the loss: one chunk of the vocabulary, about "
        f"{CHUNK_ENTRIES * CHUNK_BYTES / GIB:.1f} GiB at most; no [N, V] tensor"
    )
    beside = sorted({*needs.companions, *made.companions}, key=repr)
    lines += [f"state beside the student, saved with it: {c}" for c in beside]
    lines += [f"noted on its rollouts, {name}: {_written(x)}" for name, x in made.annotate.items()]
    if made.actions is not None:
        lines.append(f"models write bins of an action, not text: {made.actions}")
    if made.curriculum != Plain():
        lines.append(f"curriculum: {made.curriculum}")
    if made.curriculum.before:
        lines.append(f"before the first step the student writes {made.curriculum.before}")
    return "\n".join(lines)


def of_teacher(needs: Needs) -> list[str]:
    """What of the teacher is read, in a few words; what that includes is left out."""
    facts = needs.of("teacher")
    if needs.whole("teacher"):
        return ["whole teacher" if needs.ids("teacher") else "whole teacher of any tokenizer"]
    words = set()
    for fact in facts:
        noted = fact.watch("teacher")
        if noted is not None and noted.entropy:
            words.add("teacher entropy")
        if noted is not None and noted.top:
            words.add(f"teacher top {noted.top}")
        if fact.models[0] == "teacher":
            words |= {f"teacher at the {ids.model}'s top {ids.k}" for ids in fact.others_first}
    return sorted(words) or ["teacher log-probs"] * bool(facts)


def table() -> list[dict[str, str]]:
    """Every built-in method with its source, what it needs and its cost."""
    rows = []
    for name in methods():
        method = load(name)
        needs = method.needs
        extra = sorted(needs.models - {"student", "sampler", "live", "teacher"})
        columns = sorted(c for c in needs.columns if c in ("reward", "correct"))
        rows.append(
            {
                "method": name,
                "idea": idea(method),
                "source": source_of(method),
                "needs": ", ".join([*of_teacher(needs), *extra, *columns]),
                "passes": str(len(passes(method))),
            }
        )
    return rows

"""What a run refuses: before any model is loaded what cannot work, and then prompts that its
context does not hold.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from opdkit.base.errors import UserError, nearest
from opdkit.curricula import reads_cache, writer_of
from opdkit.methods.method import Method
from opdkit.models.limits import context_limit
from opdkit.objective.facts import LogpFact
from opdkit.objective.grammar import credit_of
from opdkit.rewards import Named, Reward
from opdkit.rewards.against import compares
from opdkit.run.prompts import evaluated_as, sampled_as
from opdkit.run.settings import Run
from opdkit.teachers.base import longest_of, reads_of
from opdkit.train.track import BACKENDS
from opdkit.types import Prompt, Sampling


def refuse(run: Run, method: Method, reward: Reward | None) -> None:
    """What cannot work, before any model is loaded."""
    needs = method.needs
    for tracker in run.trackers:
        if tracker not in BACKENDS:
            raise UserError(f"there is no tracker {tracker!r}{nearest(tracker, list(BACKENDS))}")
    if run.lora is not None and importlib.util.find_spec("peft") is None:
        raise UserError(
            "lora trains adapters with the package peft, which is not installed: pip install "
            "'opdkit[lora]', or leave lora out to train all weights"
        )
    if run.environment is not None:
        _refuse_with_environment(run, method, reward)
    elif reward is None:
        _refuse_without_reward(run, method)
    _refuse_unnamed(method, reward)
    _note_one_turn(run, method)
    _note_long_warm_up(run, method)
    _refuse_lag(run, method)
    refuse_models(run, method)
    unknown = needs.of("sampler") - {LogpFact("sampler")}
    if unknown:
        words = ", ".join(sorted(fact.words() for fact in unknown))
        raise UserError(
            f"method {method.name or 'own'!r} reads {words}: of the sampler only the log-probs of "
            "its own tokens are recorded. Read the student instead"
        )
    for name in sorted(method.opened):
        run.model_named(name).refuse(method.name or "own", needs, name)
    _refuse_unsampled(run, method)
    _refuse_all_ids(run, method)
    _refuse_undrawn(method)
    _refuse_comparison(run, method, reward)
    _refuse_never_measured(run, method)
    sampling = sampled_as(run, method)
    _refuse_alone(run, method, sampling)
    _refuse_idle_filters(run, sampling)
    if not sampling.plain and not run.correct_sampling and "sampler" in needs.models:
        print(
            "opdkit: tokens are not drawn from the plain softmax (temperature, top_p, top_k or "
            "min_p), so sampled-token estimators are biased by log(drawn/plain), logged as "
            "sampling/log_ratio. correct_sampling=true takes ratios to what was drawn from.",
            file=sys.stderr,
        )


def _refuse_unsampled(run: Run, method: Method) -> None:
    """A teacher that is to write here, and cannot."""
    local = run.teachers.opens_local_model
    if run.evaluate is not None and run.evaluate.teacher and not local:
        raise UserError(
            "evaluate.teacher=true samples answers to the plain questions from one model in this "
            f"process, and the teacher is {_what_it_is(run)}: set it to false, and evaluate that "
            "by itself (opdkit eval MODEL)"
        )
    if method.teacher_mix and not local:
        raise UserError(
            f"method {method.name or 'own'!r} draws tokens from a mixture of teacher and student: "
            f"it must be one model in this process (teacher=MODEL), and is {_what_it_is(run)}"
        )
    if method.teacher_mix and (run.cluster is not None or not run.sampler_settings.on_student):
        raise UserError(
            f"method {method.name or 'own'!r} draws tokens from a mixture of teacher and student, "
            "token by token, in one process: set sampler=hf, and leave cluster out"
        )


def _what_it_is(run: Run) -> str:
    """A teacher from which nothing can be sampled here, in words."""
    teacher = run.teachers
    if teacher.views:
        return f"one that reads the view {teacher.views[0]}"
    own = teacher.starts_student or any(teacher.companions("teacher"))
    return "the student itself" if own else f"of the kind {teacher.kind}"


def _refuse_without_reward(run: Run, method: Method) -> None:
    """What a run that scores nothing cannot do."""
    read = method.needs.columns & {"reward", "correct"} - writer_of(method.curriculum).judged
    if read:
        what = "whether a response is right" if "correct" in read else "what a response is worth"
        raise UserError(
            f"method {method.name or 'own'!r} reads {what}, and the run has no reward: set reward "
            "to math, code, exact, reasoning_gym, regex:PATTERN, judge:URL "
            "or file.py:function, or an environment, which scores its episodes"
        )
    if method.curriculum.needs_own:
        raise UserError(
            f"{method.curriculum} goes by how often the student solves each prompt, and the run "
            "has no reward: set reward, or choose a curriculum that does not ask for it"
        )
    # a curriculum may measure something else on them
    if run.evaluate is not None and (run.evaluate.teacher or not method.curriculum.measures):
        raise UserError(
            "the run evaluates on held-out problems and has no reward to score them with: set "
            "reward"
        )
    for name, on in (
        ("dynamic_sampling", run.dynamic_sampling),
        ("overlong_margin", run.overlong_margin is not None),
    ):
        if on:
            raise UserError(
                f"{name} goes by the rewards of rollouts, and the run has none: set reward, or "
                f"leave {name} out"
            )


def _refuse_unnamed(method: Method, reward: Reward | None) -> None:
    """A reward that a method reads by a name which the run does not give."""
    known: list[str] = list(reward.rewards) if isinstance(reward, Named) else []
    for name in sorted(method.needs.columns):
        if name.startswith("reward:") and name.partition(":")[2] not in known:
            raise UserError(
                f"method {method.name or 'own'!r} reads the {name}, and the run has "
                f"{', '.join(known) or 'no rewards by name'}: set reward.{name.partition(':')[2]}"
            )


def _refuse_all_ids(run: Run, method: Method) -> None:
    """Samplers and models that speak all ids, where a method acts in some."""
    if method.actions is None:
        return
    what = f"method {method.name or 'own'!r} acts in the last {method.actions.bins} ids alone"
    if not run.sampler_settings.on_student:
        raise UserError(
            f"{what}, and another engine draws from the whole vocabulary: set sampler=hf"
        )
    for name in sorted(method.opened):
        model = run.model_named(name)
        if not model.adds_up:
            raise UserError(
                f"{what}, and a {model.kind} teacher answers over its whole vocabulary: use a "
                f"model in this process ({name}=MODEL)"
            )


def _note_one_turn(run: Run, method: Method) -> None:
    """Says so where a curriculum of turns has none to count."""
    if run.environment is None and writer_of(method.curriculum).acts:
        print(
            f"opdkit: method {method.name or 'own'!r} lets the student act in ever more turns, and "
            "without an environment every answer is one turn: nothing is stopped or replayed. Set "
            "environment (textworld, scienceworld, calculator, file.py:Class ...).",
            file=sys.stderr,
        )


def _refuse_with_environment(run: Run, method: Method, reward: Reward | None) -> None:
    """What an episode of several turns is not."""
    if reward is not None:
        raise UserError(
            "the run has an environment, which scores its episodes, and a reward, which scores "
            "single answers: leave reward out, or let the environment's score call it"
        )
    if run.prompts.template is not None:
        raise UserError(
            "data.template writes a question, and in a run with an environment the environment "
            "does (its `reset`): leave data.template out"
        )
    if run.rollouts == "cache" or reads_cache(method.curriculum):
        raise UserError(
            "rollouts are read from a cache, in which nobody acts, and the run has an "
            "environment: leave environment out, or let the student write (rollouts=student)"
        )
    if method.teacher_mix:
        raise UserError(
            f"method {method.name or 'own'!r} draws tokens from a mixture of teacher and student, "
            "which is made for single answers: leave environment out"
        )


def _refuse_undrawn(method: Method) -> None:
    """Policy gradients where the student never writes."""
    credited = [term for term in method.objective.terms if credit_of(term.loss) is not None]
    writer = writer_of(method.curriculum)
    if credited and not writer.draws:
        way = (
            "write beside the pairs (hypo in the place of f_dpo, curriculum.online above 0) or "
            "pairs be of what it writes (f_dpo(pairs=rollouts))"
            if writer.reads_pairs
            else "write some of the batches (lmbda above 0)"
        )
        raise UserError(
            f"method {method.name or 'own'!r} reads every response from the data, and its term "
            f"{credited[0]} is a policy gradient: of tokens that the student did not draw there is "
            "none, so that the term would teach nothing. Let the student "
            f"{way}, or leave the term out"
        )


def _refuse_comparison(run: Run, method: Method, reward: Reward | None) -> None:
    """Opponents that nobody brings or that cannot act, and judges of two answers where there is
    one.
    """
    who, players = f"method {method.name or 'own'!r}", writer_of(method.curriculum).players
    if players and run.environment is not None:
        raise UserError(
            f"{who} compares answers with those of an opponent, which gives single ones, and the "
            "run has an environment: leave environment out"
        )
    here = method.brought | {copy.model for copy in run.copies_for(method)}
    if absent := [name for name in players if name not in here]:
        raise UserError(
            f"{who} has its answers compared with those of {absent[0]!r}, and brings no copy of "
            "the student by that name: use nash_mp, or a method of your own with "
            f"companions=(Ema(model={absent[0]!r}),)"
        )
    several = isinstance(reward, Named) and any(map(compares, reward.rewards.values()))
    if reward is None or not (several or compares(reward)):
        return
    if several:
        raise UserError(
            "one of the rewards by name is a function of (row, a, b), which says which of two "
            "answers is better and cannot be added to others: give it alone (reward=file.py:name)"
        )
    what = "the reward is a function of (row, a, b), which says which of two answers is better"
    if not players:
        raise UserError(
            f"{what}, and {who} has no opponent to compare with: give a function of one rollout, "
            "or use nash_mp"
        )
    if run.evaluate is not None:
        raise UserError(
            f"{what}, and held-out problems are answered once: leave evaluate out, or give a "
            "reward of one rollout, of which the higher wins"
        )


def _refuse_alone(run: Run, method: Method, sampling: Sampling) -> None:
    """Rollouts that have none beside them, where the objective compares those of a prompt."""
    writer = writer_of(method.curriculum)
    beside, drawn = writer.per_prompt(sampling), writer.draws
    differ = beside > 1 and (sampling.temperature > 0 or not drawn)
    if "group" not in method.needs.columns or differ:
        return
    cached = reads_cache(method.curriculum)
    raise UserError(
        f"method {method.name or 'own'!r} compares the responses to a prompt with each other, and "
        + (
            f"with num_generations={sampling.num_generations} each is alone: there is no baseline, "
            "share or pass rate but its own"
            if beside <= 1
            else "with temperature=0 all of them are the same, so that nothing tells them apart"
        )
        + ". Set "
        + ("num_generations to 2 or more (4 to 16 are usual)" if beside <= 1 else "temperature=1")
        + (" and write the cache again with `opdkit cache-teacher`" if cached else "")
    )


def _refuse_idle_filters(run: Run, sampling: Sampling) -> None:
    """Rules about rewards and lengths that could not do what they are there for."""
    if run.dynamic_sampling and (sampling.num_generations == 1 or sampling.temperature == 0):
        raise UserError(
            "dynamic_sampling keeps prompts that some responses solve and others do not, which one "
            "response, or several of temperature=0, never are: set num_generations to 2 or more "
            "and temperature above 0, or leave dynamic_sampling out"
        )
    margin, limit = run.overlong_margin, sampling.max_completion_length
    if margin is not None and margin > limit:
        raise UserError(
            f"overlong_margin={margin} is more than max_completion_length={limit}: every response "
            f"would be charged, the empty one too. Set overlong_margin to {limit} or less (DAPO: a "
            "fifth of the limit)"
        )


# what a curriculum may adapt to, by name: in words, what the evaluation set needs for it, and what
# does without it
ADAPTS = {
    "loss": (
        "the loss on held-out reference responses",
        " (with a column `response`)",
        "use a schedule that does not adapt (distillm: schedule=null, where the student writes "
        "every batch, or threshold=1)",
    ),
    "entropy": (
        "the entropy of the student's own samples to held-out prompts",
        "",
        "leave the length as it is (max_completion_length), without curriculum=entropy_length",
    ),
}


def _refuse_never_measured(run: Run, method: Method) -> None:
    """A curriculum that adapts to what the run never measures in between, or not so."""
    measures, evaluate = method.curriculum.measures, run.evaluate
    every = 0 if evaluate is None else evaluate.every
    if unknown := set(measures) - set(ADAPTS):
        raise UserError(
            f"{method.curriculum} asks to measure {', '.join(sorted(unknown))}, and what can be "
            f"measured on held-out prompts is: {', '.join(ADAPTS)}"
        )
    for name in measures if not 0 < every < run.steps else ():
        what, needs, otherwise = ADAPTS[name]
        raise UserError(
            f"method {method.name or 'own'!r} with {method.curriculum} adapts to {what}, and the "
            "run evaluates "
            + ("nothing" if evaluate is None else "only before its first step and at its end")
            + f": it would never adapt. Set evaluate.data=FILE{needs} and evaluate.every=N, below "
            f"steps={run.steps}; or {otherwise}"
        )
    if "entropy" in measures and evaluate is not None and not evaluated_as(run, evaluate).plain:
        raise UserError(
            f"{method.curriculum} goes by the entropy of what the student writes of itself, and "
            "held-out prompts are answered with another temperature, top_p, top_k or min_p, which "
            "leads where it would not go: set evaluate.sampling.temperature=1 and leave the others "
            "out"
        )


def refuse_no_response(rows: Sequence[Any]) -> None:
    """Held-out rows or responses among which there is none to validate on."""
    if not any(rows):
        raise UserError(
            "this method adapts to the loss on held-out reference responses, and the evaluation "
            "set has none: add a column `response` to it"
        )


def _note_long_warm_up(run: Run, method: Method) -> None:
    """Says so where the run ends before its learning rate is what was asked for."""
    warm, most = run.optim.warmup_steps, run.updates(method)
    if warm > most:
        print(
            f"opdkit: warmup_steps={warm} is more than the {most} optimiser steps that the run "
            f"takes at most: the learning rate ends at {most}/{warm} of what was asked for.",
            file=sys.stderr,
        )


def _refuse_lag(run: Run, method: Method) -> None:
    """A lag of text that nobody writes."""
    if run.ahead and not writer_of(method.curriculum).draws:
        raise UserError(
            f"ahead={run.ahead} lets the student write before its text is learnt from, and with "
            f"method {method.name or 'own'!r} it writes nothing: leave ahead out"
        )


def refuse_models(run: Run, method: Method) -> None:
    """Models that a method reads and nobody names, or that it brings and the run names too."""
    named = {
        **{name: f"models.{name}" for name in run.models},
        **({"reference": "reference"} if run.reference else {}),
        **({"teacher": "evaluate.teacher"} if run.evaluate and run.evaluate.teacher else {}),
    }
    for name in sorted(method.brought & set(named)):
        raise UserError(
            f"method {method.name or 'own'!r} brings its own model {name!r}, and the run names "
            f"another: leave {named[name]} out"
        )
    missing = method.opened - {"teacher", "reference"} - set(run.models)
    if missing:
        name = sorted(missing)[0]
        raise UserError(
            f"method {method.name or 'own'!r} reads a model called {name!r}: say which with "
            f"models.{name}=MODEL"
        )


def refuse_long(
    prompts: Sequence[Prompt],
    model: Any,
    sampling: Sampling,
    others: Mapping[str, Any] | None = None,
) -> int:
    """Tokens of the longest rollout there can be.

    It must fit the context of the model, and of every other that is to read it (`others`, scorers
    by name): a longer prompt would be cut or answered blindly.
    """
    longest = max(prompts, key=lambda p: len(p.tokens))
    limits = {"model": context_limit(model.config)}
    limits |= {name: reads_of(scorer) for name, scorer in (others or {}).items()}
    for name, limit in limits.items():
        if limit is None or len(longest.tokens) <= (room := limit - sampling.max_completion_length):
            continue
        raise UserError(
            f"prompt {longest.id} has {len(longest.tokens)} tokens; with "
            f"max_completion_length={sampling.max_completion_length} only {room} fit the {name}'s "
            f"context of {limit}. Set data.max_prompt_length={max(room, 0)} to drop longer "
            "prompts, or lower max_completion_length"
        )
    _refuse_long_views(prompts, sampling, others or {})
    return len(longest.tokens) + sampling.max_completion_length


def _refuse_long_views(
    prompts: Sequence[Prompt], sampling: Sampling, others: Mapping[str, Any]
) -> None:
    """Questions that a teacher reads with something beside them, and that are too long with it."""
    for name, scorer in others.items():
        row, length, limit = longest_of(scorer, [prompt.row for prompt in prompts])
        if limit is not None and length + sampling.max_completion_length > limit:
            raise UserError(
                f"with what its view shows, the prompt of row {row!r} has {length} tokens for the "
                f"{name}; with max_completion_length={sampling.max_completion_length} only "
                f"{limit - sampling.max_completion_length} fit its context of {limit}, and nothing "
                "is cut. Take long rows out, show less (view.template=...), or lower "
                "max_completion_length"
            )

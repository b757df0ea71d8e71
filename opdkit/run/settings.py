"""What a person chooses: method, models, data, engines and optimiser, as one frozen value that YAML
can hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from opdkit.annotators import annotators_of
from opdkit.base.config import build, override, parse_overrides, plain, read_yaml, to_yaml
from opdkit.base.errors import UserError, shown
from opdkit.base.rules import follow
from opdkit.curricula import curriculum_of
from opdkit.environments.kinds import environment_of
from opdkit.environments.settings import EnvironmentSettings
from opdkit.eval.evaluate import check_ks, drawn
from opdkit.methods.method import Method, load
from opdkit.objective.companion import Companion
from opdkit.run.cluster.settings import ClusterSettings, cluster_of
from opdkit.run.setting_rules import AUTO, DATA, EVALUATE, OWN_TASKS, RUN
from opdkit.sampling.draws import check_sampling
from opdkit.sampling.kinds import sampler_of
from opdkit.sampling.settings import SamplerSettings
from opdkit.teachers.kinds import is_part, one_teacher_of, takes_model, teacher_of
from opdkit.teachers.own import SelfTeacher
from opdkit.teachers.teacher import Teacher
from opdkit.train.settings import Checkpoint, Lora, Optim
from opdkit.types import Sampling


@dataclass(frozen=True)
class Data:
    """Prompts: a JSONL, JSON or Parquet file, a saved data set, a hub name, or
    reasoning_gym:TASK.
    """

    source: str
    split: str | None = None
    limit: int | None = None
    # canonical name -> the data's own, such as {prompt: problem}
    columns: dict[str, str] = field(default_factory=dict)
    # "{prompt}" and any column, for example "{prompt}\nAnswer in \\boxed{{}}."
    template: str | None = None
    system: str | None = None
    chat: bool | None = None  # null: use the tokenizer's chat template where it has one
    enable_thinking: bool | None = None
    max_prompt_length: int | None = None  # longer prompts are reported and dropped, never cut

    def __post_init__(self) -> None:
        follow(DATA, self)


@dataclass(frozen=True)
class Evaluate:
    """Held-out problems, sampled during training and at its ends."""

    data: str | Data
    every: int = 0  # steps; 0: only before and after
    sampling: Sampling | None = None  # null: the run's, with num_generations
    num_generations: int = 1
    ks: tuple[int, ...] = (1,)  # Pass@k
    teacher: bool = False  # evaluate the teacher too, once
    environment: str | dict[str, Any] | None = None  # null: the run's

    def __post_init__(self) -> None:
        follow(EVALUATE, self)
        if self.environment is not None:
            environment_of(self.environment, "evaluate.environment")
        check_ks(self.num_generations, self.ks)
        if self.sampling is not None:
            check_sampling(self.sampling, "evaluate.sampling")
            drawn(self.sampling, self.num_generations)

    @property
    def prompts(self) -> Data:
        return Data(self.data) if isinstance(self.data, str) else self.data


@dataclass(frozen=True)
class MethodSpec:
    """A method with arguments, times the weights of others: name: tropd, arguments: {k: 32}, times:
    [iw_opd, {name: paced, a: 2}].
    """

    name: str  # a name, file.py:function, or an expression such as "tropd(k=32) * iw_opd"
    arguments: dict[str, Any] = field(default_factory=dict)
    times: tuple[str | MethodSpec, ...] = ()

    def load(self) -> Method:
        """The method itself."""
        made = load(self.name, **self.arguments)
        for other in self.times:
            made = made * (load(other) if isinstance(other, str) else other.load())
        return made

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
        return " * ".join([f"{self.name}({given})" if given else self.name, *map(str, self.times)])


@dataclass(frozen=True)
class Run:
    """One training run.

    `teacher` is a model, a server (`server:URL`), a vLLM engine (`vllm:MODEL`), a cache
    (`cached:FOLDER`), or a group with `kind` and that kind's settings (see `teachers.kinds`); or
    several of these by route: each row is scored by the one its data column names.
    """

    # its settings repeat others' names, so they are given in full
    full_names: ClassVar[tuple[str, ...]] = ("evaluate",)
    student: str
    # null: the one that the method brings (such as the student itself), or none
    teacher: str | dict[str, Any] | None
    data: str | Data
    method: str | MethodSpec = "opd"
    output: str = AUTO  # auto: runs/METHOD-NNN, the first number that is free
    # one, or several by name, {accuracy: math, format: regex:...}, whose sum is the reward and of
    # which the first says what is correct
    reward: str | dict[str, str] | None = None
    # what each of several counts in their sum; 1 where nothing is said
    reward_weights: dict[str, float] = field(default_factory=dict)
    # a model, as `teacher`; null: the student's initial weights
    reference: str | dict[str, Any] | None = None
    # further models that the method names, each as `teacher`
    models: dict[str, Any] = field(default_factory=dict)
    # what is noted on rollouts before they are scored, by name, besides what the method brings:
    # {spans: {kind: spans, by: model}}; null switches one of the method's off (see `annotators`)
    annotate: dict[str, Any] = field(default_factory=dict)
    # which prompts a step asks, how long responses may be, who writes: a name, or a group with
    # `kind` and settings, beside what the method brings (null: that alone)
    curriculum: str | dict[str, Any] | None = None
    # in which the student acts, turn by turn, and which scores it: a kind, file.py:Class, or a
    # group with `kind` and settings (see `environments.kinds`); null: it answers once
    environment: str | dict[str, Any] | None = None
    steps: int = 100
    # end at the first step by which the student has written so many, if `steps` do not end it first
    max_tokens: int | None = None
    prompts_per_step: int = 32
    # steps by which rollouts are asked for before they are learnt from: with 1 or more a sampler
    # elsewhere writes while the trainer learns, by weights that are so many steps old
    ahead: int = 0
    # null: this machine's processes; ray, ray:ADDRESS or a group with `kind`: placed on a cluster,
    # which starts again what dies (see `cluster.settings`)
    cluster: str | dict[str, Any] | None = None
    # who writes them: student, anew at each step; or cache, all read from a folder of `opdkit
    # cache-teacher`
    rollouts: str = "student"
    # DAPO: replace prompts whose responses are all right or all wrong
    dynamic_sampling: bool = False
    # DAPO: tokens before max_completion_length over which the reward falls by 1
    overlong_margin: int | None = None
    # tokens of responses that a step scores and learns from, at most, by domain, {math: 20000}; of
    # domains that are not named all
    token_budget: dict[str, int] = field(default_factory=dict)
    domain: str = "teacher"  # the column of the data that names a row's
    # who writes: hf (in this process), vllm, server:URL, or a group with `kind` and settings
    sampler: str | dict[str, Any] = "hf"
    sampling: Sampling = field(default_factory=Sampling)
    optim: Optim = field(default_factory=Optim)
    lora: Lora | None = None
    evaluate: Evaluate | None = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    # of the student's matrix products: float32, or bfloat16 with float32 weights; auto: bfloat16 on
    # a GPU
    dtype: str = AUTO
    teacher_dtype: str | None = None  # null: as the student
    # of several processes each holds a part of every plain teacher and reference; false: the whole
    # of each, which scores faster and wants the memory
    shard_teachers: bool = True
    # float32: hidden states and head are multiplied as they are, whatever the other products are
    # in (null: as these)
    head_dtype: str | None = None
    device: str = "auto"
    # of models in this process: eager, sdpa, flash_attention_2, flash_attention_3 or flex_attention
    # (null: transformers' choice, and eager where a model caps its attention scores)
    attn_implementation: str | None = None
    gradient_checkpointing: bool | None = None  # null: on a GPU
    # the dropout of the student's configuration (LoRA's is lora.dropout); false: it learns with it,
    # other than it samples and is scored
    disable_dropout: bool = True
    # padded tokens of one forward pass; changes memory and speed, never the gradient (null: by
    # device)
    micro_batch_tokens: int | None = None
    # score rollouts with the trainer, whatever the sampler said (null: where another engine
    # sampled, and in bfloat16)
    recompute_student: bool | None = None
    # take ratios to the distribution tokens were drawn from (temperature, top_p ...)
    correct_sampling: bool = False
    trackers: tuple[str, ...] = ()
    keep_samples: int = 8  # rollouts written per recorded step
    sample_every: int = 10  # steps between recorded rollouts
    # steps between measurements of each term's gradient in the logits; 0: never
    term_gradients_every: int = 0
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        follow(RUN, self)
        if self.head_dtype is not None and self.dtype == "float64":
            raise ValueError(
                f"head_dtype={self.head_dtype} goes with dtype float32 or bfloat16: it is for a "
                "head that is more exact than the other products"
            )
        check_sampling(self.sampling)
        # a wrong setting is an error here, before anything else is done
        teacher_of(self.teacher)
        for name, model in self.models.items():
            one_teacher_of(model, f"models.{name}")
        if self.reference is not None:
            one_teacher_of(self.reference, "reference")
        sampler_of(self.sampler)
        annotators_of({name: v for name, v in self.annotate.items() if not _partial(v)})
        if self.curriculum is not None:
            curriculum_of(self.curriculum)
        if self.environment is not None:
            environment_of(self.environment)
        if self.cluster is not None:
            cluster_of(self.cluster)

    @property
    def prompts(self) -> Data:
        return Data(self.data) if isinstance(self.data, str) else self.data

    @property
    def placement(self) -> ClusterSettings | None:
        """The cluster that it is placed on."""
        return None if self.cluster is None else cluster_of(self.cluster)

    @property
    def writes_elsewhere(self) -> bool:
        """Whether rollouts are written by other processes than those that learn."""
        return self.cluster is not None or self.sampler_settings.elsewhere

    @property
    def teachers(self) -> Teacher:
        return teacher_of(self.teacher)

    def model_named(self, name: str) -> Teacher:
        """Who the model is that the objective calls `name`; the reference, where nothing is said of
        it, is the student as it began.
        """
        if name == "teacher":
            return self.teachers
        if name == "reference":
            return SelfTeacher() if self.reference is None else one_teacher_of(self.reference, name)
        return one_teacher_of(self.models[name], f"models.{name}")

    def opened_by(self, method: Method) -> list[str]:
        """The models that are opened besides the student, by name."""
        evaluated = self.evaluate is not None and self.evaluate.teacher
        return sorted(method.opened | ({"teacher"} if evaluated else set()))

    def copies_for(self, method: Method) -> set[Companion]:
        """The copies of the student that follow it as one of these."""
        opened = self.opened_by(method)
        return {copy for name in opened for copy in self.model_named(name).companions(name)}

    def updates(self, method: Method) -> int:
        """Optimiser steps that it takes at most."""
        said = (method.curriculum.passes(step, self.steps) for step in range(self.steps))
        return self.optim.minibatches * sum(number or self.optim.passes for number in said)

    @property
    def sampler_settings(self) -> SamplerSettings:
        return sampler_of(self.sampler)

    @property
    def world(self) -> EnvironmentSettings | None:
        """The environment that it trains in."""
        return None if self.environment is None else environment_of(self.environment)

    @property
    def held_out_world(self) -> EnvironmentSettings | None:
        """The environment that it is evaluated in."""
        given = None if self.evaluate is None else self.evaluate.environment
        return self.world if given is None else environment_of(given, "evaluate.environment")

    @property
    def recomputes_student(self) -> bool:
        """Whether the trainer scores the rollouts: another engine's log-probs are those of other
        arithmetic, and in bfloat16 so are those of a token at a time.
        """
        if self.recompute_student is not None:
            return self.recompute_student
        return self.dtype == "bfloat16" or not self.sampler_settings.on_student

    @property
    def method_spec(self) -> MethodSpec:
        return MethodSpec(self.method) if isinstance(self.method, str) else self.method

    @property
    def learning_rate(self) -> float:
        given = self.optim.learning_rate
        return given if given is not None else (1e-4 if self.lora else 1e-6)

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def yaml(self) -> str:
        return to_yaml(self)


def _partial(annotation: Any) -> bool:
    """Whether it may be some settings of an annotator that the method brings."""
    return isinstance(annotation, Mapping) and "kind" not in annotation


# settings that are text or a group with `kind`; *: by names of one's own
ENGINES: dict[str, Callable[[Any], Any]] = {
    "teacher": one_teacher_of,
    "reference": one_teacher_of,
    "models.*": one_teacher_of,
    "sampler": sampler_of,
    "cluster": cluster_of,
    "curriculum": curriculum_of,
    "environment": environment_of,
    "evaluate.environment": environment_of,
}


def make_run(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Run:
    """A run from nested values and `key=value` texts (dotted, or a last name that is unique)."""
    nested = copy.deepcopy(dict(values))
    for key, value in parse_overrides(overrides):
        set_value(nested, key, value)
    if isinstance(nested.get("method"), dict):
        nested["method"] = _method(nested["method"])
    nested.setdefault("teacher", None)
    # the prompts that a teacher has scored already
    own = teacher_of(nested["teacher"]).own_data
    if own is not None:
        data = nested.setdefault("data", own)
        if isinstance(data, dict):
            data.setdefault("source", own)
    world = nested.get("environment")
    if world is not None and environment_of(world).makes_rows:  # its own tasks
        data = nested.setdefault("data", OWN_TASKS)
        if isinstance(data, dict):
            data.setdefault("source", OWN_TASKS)
    return build(Run, nested)


def _method(given: Mapping[str, Any]) -> dict[str, Any]:
    """{name: tropd, k: 64} as {name: tropd, arguments: {k: 64}}: what is not a field is an argument
    of the method.
    """
    known = [f.name for f in fields(MethodSpec)]
    listed = given.get("arguments") or {}
    if not isinstance(listed, Mapping):
        raise UserError(
            f"method.arguments must be a mapping such as {{k: 32}}, not {shown(listed)}: arguments "
            "are given by name"
        )
    arguments = {**listed, **{k: v for k, v in given.items() if k not in known}}
    times = given.get("times") or []
    times = [
        _method(t) if isinstance(t, Mapping) else t
        for t in (times if isinstance(times, (list, tuple)) else [times])
    ]
    return {"name": given.get("name", "opd"), "arguments": arguments, "times": times}


def set_value(nested: dict[str, Any], key: str, value: Any) -> None:
    """One override, in place; `method.k=64` sets the method's argument k."""
    group, _, name = key.partition(".")
    if group == "view":  # of the teacher
        set_value(nested, f"teacher.{key}", value)
    elif group == "method" and name and name != "name":
        method = nested.get("method", "opd")
        nested["method"] = method if isinstance(method, dict) else {"name": method}
        nested["method"][name.removeprefix("arguments.")] = value
    elif key == "data" and isinstance(nested.get("data"), dict):
        nested["data"]["source"] = value  # another set, read the same way
    elif engine := _engine_of(key):
        *groups, last = key.split(".")[: engine.count(".") + 1]
        words, inside = key.split(".")[engine.count(".") + 1 :], nested
        for outer in groups:
            if not isinstance(inside.get(outer), dict):
                inside[outer] = {}
            inside = inside[outer]
        before = inside.get(last, "hf" if engine == "sampler" else None)
        inside[last] = _with(before, words, value, ENGINES[engine], engine == "teacher")
    else:
        override(nested, Run, key, value)


def _engine_of(key: str) -> str | None:
    """The entry of `ENGINES` of which a key names one setting."""
    for engine in ENGINES:
        pattern, words = engine.split("."), key.split(".")
        same = all(p in (word, "*") for p, word in zip(pattern, words))
        if same and len(words) > len(pattern):
            return engine
    return None


def _with(
    engine: Any, words: Sequence[str], value: Any, parse: Callable[[Any], Any], routed: bool = False
) -> dict[str, Any]:
    """A text or a group with one setting changed, whose name has these words.

    teacher.quantize=4bit after teacher=MODEL is a setting of its kind, teacher.math=MODEL a route
    (of those that are `routed`); teacher.math.view=hint is one of the route's own teacher,
    teacher.of.a.view=hint of a mixture's member.
    """
    name, *inside = words
    teaches = parse is one_teacher_of
    if engine is None or isinstance(engine, Mapping):
        group = dict(engine or {})
        routed = routed and "kind" not in group and not is_part({name: value})
    else:
        before = parse(engine)
        settings = [*(f.name for f in fields(before)), "view"]
        if name == "kind":  # of another kind, settings do not carry over, but a model's name
            keeps = teaches and "model" in settings and takes_model(value)
            return {"kind": value} | ({"model": before.model} if keeps else {})
        routed = routed and name not in settings
        group = {"default": engine} if routed else {"kind": before.kind, **plain(before)}
    old = group.get(name)
    if not inside:
        new = value
    elif teaches and name == "view":
        known = old if isinstance(old, dict) else {}
        # a template of one's own takes the place of a name
        new = {k: v for k, v in known.items() if inside != ["template"] or k != "name"}
        new[".".join(inside)] = value
    elif routed:
        new = _with(old, inside, value, parse)
    else:
        new = dict(old) if isinstance(old, Mapping) else {}
        member, *deeper = inside
        new[member] = _with(new.get(member), deeper, value, parse) if deeper else value
    return {**group, name: new}


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A run from its YAML file."""
    return make_run(read_yaml(path), overrides)

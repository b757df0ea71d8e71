"""Runs from YAML and overrides: strict, with errors that name the key; defaults in one place; what
is written can be run again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdkit import UserError, cli
from opdkit.base.config import build, leaves, override, parse_overrides, plain, read_yaml, to_yaml
from opdkit.cli.command import sampling
from opdkit.run.settings import Data, Evaluate, MethodSpec, Run, load_run, make_run
from opdkit.train.settings import Lora, Optim
from opdkit.types import Sampling

LEAST = {"student": "s", "teacher": "t", "data": "d.jsonl"}


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True)
class Outer:
    size: int
    on: bool = False
    label: str | None = None
    either: str | Inner = "plain"
    inner: Inner = field(default_factory=Inner)
    table: dict[str, float] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------- build


def test_a_nested_mapping_becomes_what_it_describes() -> None:
    made = build(
        Outer,
        {
            "size": 3,
            "inner": {"rate": 2, "names": ["a", "b"], "pair": [4, 5]},
            "either": {"rate": 1.0},
            "table": {"x": 1},
        },
    )
    assert made == Outer(
        3, either=Inner(1.0), inner=Inner(2.0, ("a", "b"), (4, 5.0)), table={"x": 1.0}
    )
    assert isinstance(made.inner.rate, float)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "0.00001", 1e-5])
def test_a_number_may_be_written_as_yaml_does_not_read_it(text: Any) -> None:
    """YAML 1.1 takes 1e-5 for text."""
    assert build(Inner, {"rate": text}).rate == 1e-5
    assert make_run({**LEAST, "optim": {"learning_rate": text}}).optim.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "size is missing: Outer cannot run without it"),
        ({"size": 1, "sise": 2}, "unknown key 'sise'; did you mean 'size'?"),
        ({"size": 1, "inner": {"rat": 2}}, "unknown key 'inner.rat'; did you mean 'rate'?"),
        ({"size": 1, "either": {"rat": 2}}, "unknown key 'either.rat'; did you mean 'rate'?"),
        ({"size": "1"}, "size must be int, not '1'"),
        ({"size": True}, "size must be int, not True"),
        ({"size": 1.5}, "size must be int, not 1.5"),
        ({"size": None}, "size must be int, not None"),
        ({"size": 1, "on": 1}, "on must be bool, not 1"),
        ({"size": 1, "label": 7}, "label must be str or null, not 7"),
        ({"size": 1, "either": 7}, "either must be str or Inner, not 7"),
        ({"size": 1, "inner": 7}, "inner must be a group of settings (rate, names, pair), not 7"),
        ({"size": 1, "inner": {"rate": "fast"}}, "inner.rate must be a number, not 'fast'"),
        ({"size": 1, "inner": {"rate": True}}, "inner.rate must be float, not True"),
        ({"size": 1, "inner": {"names": "ab"}}, "inner.names must be a list, not 'ab'"),
        ({"size": 1, "inner": {"names": ["a", 2]}}, "inner.names[1] must be str, not 2"),
        ({"size": 1, "inner": {"pair": [1]}}, "inner.pair must have 2 entries, not 1: [1]"),
        ({"size": 1, "table": {"x": "much"}}, "table.x must be a number, not 'much'"),
        ({"size": 1, "table": [1]}, "table must be a mapping, not [1]"),
    ],
)
def test_what_does_not_fit_is_named_with_its_path(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        build(Outer, values)
    assert str(error.value) == said


def test_a_groups_own_rules_are_told_with_its_name() -> None:
    with pytest.raises(
        UserError, match=r"^optim: schedule='step' must be one of constant, linear, cosine: "
    ):
        make_run({**LEAST, "optim": {"schedule": "step"}})
    with pytest.raises(
        UserError, match=r"^Run: steps=0 must be at least 1: without a step nothing is learnt$"
    ):
        make_run({**LEAST, "steps": 0})


INF, NAN = float("inf"), float("nan")
NOT_TO_BE = {  # values with which a run would go on and learn nothing, or the reverse
    "optim": {
        "learning_rate": (-1e-5, 0, INF, NAN),
        "warmup_steps": (-1,),
        "passes": (0, -1),
        "minibatches": (0, -2),
        "weight_decay": (-0.1, INF, NAN),
        "betas": ([-0.1, 0.9], [0.9, 1.0], [1.5, 0.9], [NAN, 0.9]),
        "eps": (0, -1e-8, INF, NAN),
        "max_grad_norm": (-1, -INF, INF, NAN),
    },
    "lora": {"r": (0, -4), "alpha": (0, -8), "dropout": (1, -0.1, NAN)},
    "checkpoint": {"every": (-1,), "keep": (0, -1)},
    "sampling": {
        "temperature": (-0.5, INF, NAN),
        "top_p": (0, -0.1, 1.1, NAN),
        "top_k": (-1,),
        "min_p": (-0.1, 1.5, NAN),
        "max_completion_length": (0, -8),
        "num_generations": (0, -2),
        "stop": ([""],),
    },
    "data": {"limit": (0, -3), "max_prompt_length": (0, -1)},
    "evaluate": {"every": (-1,), "num_generations": (0, -1)},
    "sampler": {"max_batch_tokens": (0, -1)},
    "": {  # of the run itself
        "steps": (0, -1),
        "max_tokens": (0, -1),
        "prompts_per_step": (0, -4),
        "micro_batch_tokens": (0, -1),
        "overlong_margin": (0, -1),
        "keep_samples": (-1,),
        "sample_every": (-1,),
        "term_gradients_every": (-1,),
    },
}

# what a group cannot do without
BESIDE = {"data": {"source": "x"}, "evaluate": {"data": "x"}, "sampler": {"kind": "hf"}}


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [(g, n, v) for g, names in NOT_TO_BE.items() for n, values in names.items() for v in values],
)
def test_numbers_that_learn_nothing_or_the_reverse_are_refused(
    group: str, name: str, value: Any
) -> None:
    given = {group: {**BESIDE.get(group, {}), name: value}} if group else {name: value}
    with pytest.raises(UserError, match=rf"^{group or 'Run'}: {name}=.* must be .*: .{{20}}"):
        make_run({**LEAST, **given})


def test_an_evaluation_whose_numbers_contradict_each_other_is_refused() -> None:
    """Pass@4 of two samples, samples that greedy decoding makes equal, and two numbers of them."""
    for evaluate, said in (
        ({"ks": [4], "num_generations": 2}, "Pass@4 cannot be estimated from 2"),
        ({"ks": [0]}, "Pass@0 cannot be estimated from 1"),
        ({"num_generations": 2, "sampling": {"temperature": 0}}, "the same answer 2 times"),
        ({"num_generations": 2, "sampling": {"num_generations": 8}}, "num_generations=8, and"),
        ({"sampling": {"top_p": 0}}, "evaluate.sampling: top_p=0.0 must be above 0"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            make_run({**LEAST, "evaluate": {"data": "x.jsonl", **evaluate}})
    make_run({**LEAST, "evaluate": {"data": "x.jsonl", "sampling": {"num_generations": 1}}})


def test_bounds_that_are_values() -> None:
    """0 / 1 as far as they mean something: no decay, no momentum, no warm-up, no dropout, no
    clipping.
    """
    optim = {"weight_decay": 0, "betas": [0, 0], "warmup_steps": 0, "max_grad_norm": 0}
    run = make_run({**LEAST, "optim": optim, "lora": {"r": 1, "alpha": 1, "dropout": 0}})
    assert run.optim == Optim(weight_decay=0.0, betas=(0.0, 0.0), warmup_steps=0, max_grad_norm=0.0)


@pytest.mark.parametrize("key", ["max_grad_norm", "optim.max_grad_norm"])
@pytest.mark.parametrize(("text", "value"), [("null", None), ("0", 0.0), ("1e-1", 0.1)])
def test_clipping_from_the_command_line_and_from_the_resolved_run(
    tmp_path: Path, key: str, text: str, value: Any
) -> None:
    run = make_run(LEAST, [f"{key}={text}"])
    assert run.optim.max_grad_norm == value
    (tmp_path / "run.yaml").write_text(run.yaml(), encoding="utf-8")
    assert load_run(tmp_path / "run.yaml") == run


# ---------------------------------------------------------------------------------------- overrides


def test_values_of_overrides_mean_what_they_look_like() -> None:
    texts = [
        "a=3",
        "b=true",
        "c=null",
        "d=[1, 2]",
        "e=1e-5",
        "f=",
        "g=x=y",
        "h={k: 1}",
        "i=text",
        'j="3"',
    ]
    expected = [
        ("a", 3),
        ("b", True),
        ("c", None),
        ("d", [1, 2]),
        ("e", "1e-5"),
        ("f", ""),
        ("g", "x=y"),
        ("h", {"k": 1}),
        ("i", "text"),
    ]
    assert parse_overrides(texts) == [*expected, ("j", "3")]
    with pytest.raises(UserError, match="'steps' is not an override: write key=value"):
        parse_overrides(["steps"])
    with pytest.raises(UserError, match="not valid YAML"):
        parse_overrides(["template={prompt}: think"])


def test_a_setting_goes_by_its_path_or_by_its_last_name_where_that_is_unique() -> None:
    known = leaves(Run)
    assert known["learning_rate"] == known["optim.learning_rate"] == "optim.learning_rate"
    # evaluate has one too, which is given in full
    assert known["num_generations"] == "sampling.num_generations"
    assert known["evaluate.num_generations"] == "evaluate.num_generations"
    assert known["evaluate.sampling.temperature"] == "evaluate.sampling.temperature"
    assert known["seed"] == "seed" and known["source"] == "data.source"
    assert "every" in known and known["every"] == "checkpoint.every"


def test_an_unknown_override_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"unknown key 'lerning_rate'; did you mean 'learning_rate'\?"
    ):
        override({}, Run, "lerning_rate", 1)
    with pytest.raises(UserError, match=r"unknown key 'steps\.more'"):
        override({}, Run, "steps.more", 1)


@pytest.mark.parametrize(
    ("values", "text", "read", "expected"),
    [
        ({}, "learning_rate=1e-4", lambda run: run.optim.learning_rate, 1e-4),
        ({}, "sampling.temperature=0.7", lambda run: run.sampling, Sampling(temperature=0.7)),
        (
            {"optim": {"eps": 1e-6}},
            "schedule=linear",
            lambda run: run.optim,
            Optim(eps=1e-6, schedule="linear"),
        ),
        ({}, "betas=[0.8, 0.9]", lambda run: run.optim.betas, (0.8, 0.9)),
        ({}, "lora.r=8", lambda run: run.lora, Lora(r=8)),
        ({"lora": {"r": 8}}, "lora=null", lambda run: run.lora, None),
        ({}, "trackers=[tensorboard]", lambda run: run.trackers, ("tensorboard",)),
        ({}, "data.limit=5", lambda run: run.prompts, Data("d.jsonl", limit=5)),
        ({}, "limit=5", lambda run: run.prompts, Data("d.jsonl", limit=5)),
        (
            {"data": {"source": "a", "limit": 5}},
            "data=b",
            lambda run: run.prompts,
            Data("b", limit=5),
        ),
        ({}, "data.columns.prompt=problem", lambda run: run.prompts.columns, {"prompt": "problem"}),
        ({}, "method=gkd", lambda run: run.method_spec, MethodSpec("gkd")),
        ({}, "method.k=64", lambda run: run.method_spec, MethodSpec("opd", {"k": 64})),
        (
            {"method": "gkd"},
            "method.beta=0.5",
            lambda run: run.method_spec,
            MethodSpec("gkd", {"beta": 0.5}),
        ),
        (
            {"method": {"name": "gkd", "beta": 1}},
            "method.arguments.beta=0.5",
            lambda run: run.method_spec,
            MethodSpec("gkd", {"beta": 0.5}),
        ),
        (
            {"method": {"name": "gkd", "beta": 1}},
            "method.name=opd",
            lambda run: run.method_spec,
            MethodSpec("opd", {"beta": 1}),
        ),
        (
            {"evaluate": {"data": "e", "num_generations": 4}},
            "evaluate.ks=[1, 4]",
            lambda run: run.evaluate,
            Evaluate("e", num_generations=4, ks=(1, 4)),
        ),
        (
            {"evaluate": {"data": "e"}},
            "evaluate.data.limit=9",
            lambda run: run.evaluate,
            Evaluate(Data("e", limit=9)),
        ),
        ({}, "models.critic=c", lambda run: run.models, {"critic": "c"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_override_changes_its_setting_and_leaves_the_others(
    values: dict[str, Any], text: str, read: Any, expected: Any
) -> None:
    given = {**LEAST, **values}
    before = yaml.safe_dump(given)
    assert read(make_run(given, [text])) == expected
    assert yaml.safe_dump(given) == before  # what was passed in is not written to


@pytest.mark.parametrize(
    ("teacher", "text", "expected"),
    [
        ("t", "teacher=u", "u"),
        ({"math": "t"}, "teacher=u", "u"),
        ({"math": "t"}, "teacher.code=u", {"math": "t", "code": "u"}),
        ({"math": "t"}, "teacher.math=u", {"math": "u"}),
        # the only teacher so far serves what the new one does not
        ("t", "teacher.math=u", {"default": "t", "math": "u"}),
    ],
)
def test_r4_overrides_reach_the_teacher(teacher: Any, text: str, expected: Any) -> None:
    assert make_run({**LEAST, "teacher": teacher}, [text]).teacher == expected
    assert (
        make_run({**LEAST, "teacher": teacher}, ["teacher_dtype=bfloat16"]).teacher_dtype
        == "bfloat16"
    )


# ----------------------------------------------------------------------------------------- defaults


def test_r4_defaults_are_those_of_the_dataclasses_wherever_a_run_comes_from(tmp_path: Path) -> None:
    run = Run("s", "t", "d.jsonl")
    assert make_run(LEAST) == run
    assert make_run({}, ["student=s", "teacher=t", "data=d.jsonl"]) == run
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(LEAST))
    assert load_run(tmp_path / "run.yaml") == run
    groups: dict[str, Any] = {"optim": {}, "sampling": {}, "checkpoint": {}}
    assert make_run({**LEAST, **groups}) == run  # a group that says nothing is the group's defaults


def test_r4_the_command_line_has_no_defaults_of_its_own() -> None:
    options = cli.parser().parse_args(["train"])
    assert {name for name, value in vars(options).items() if value and name != "run"} == set()
    for command in ("eval", "sample"):
        options = cli.parser().parse_args(
            [command, "model", *(["--data=d"] if command == "eval" else [])]
        )
        assert sampling(options) == Sampling()


# --------------------------------------------------------------------------------------------- YAML

RUNS = [
    Run("s", "t", "d.jsonl"),
    Run(
        "s",
        {"math": "t", "default": "u"},
        Data(
            "openai/gsm8k:main",
            columns={"prompt": "question"},
            template="{prompt}\nPut it in \\boxed{{}} – “so”: #1",
            system="yes",
        ),
        MethodSpec("tropd", {"k": 64, "clip": [0.2, 0.2], "outliers": "mask"}),
        reward=r"regex:=(\d+)$",
        models={"critic": "c"},
        sampling=Sampling(temperature=0.7, stop=("\n\n", "null", "3")),
        optim=Optim(learning_rate=1e-5, betas=(0.8, 0.999), eps=1e-12),
        lora=Lora(targets=("q_proj", "v_proj")),
        evaluate=Evaluate(
            Data("e.jsonl", limit=4),
            every=5,
            sampling=Sampling(temperature=0.5),
            ks=(1, 8),
            num_generations=8,
        ),
        trackers=("tensorboard",),
        seed=-1,
    ),
]


@pytest.mark.parametrize("run", RUNS, ids=["least", "all"])
def test_a_run_written_as_yaml_is_the_same_run(tmp_path: Path, run: Run) -> None:
    (tmp_path / "run.yaml").write_text(run.yaml(), encoding="utf-8")
    assert load_run(tmp_path / "run.yaml") == run


def test_yaml_holds_every_setting_by_its_name() -> None:
    def names(value: Any) -> set[str]:
        out = {f.name for f in fields(value)}
        return out | {
            f"{f.name}.{n}"
            for f in fields(value)
            if is_dataclass(getattr(value, f.name))
            for n in names(getattr(value, f.name))
        }

    written = yaml.safe_load(to_yaml(RUNS[1]))
    flat = set(written) | {f"{k}.{n}" for k, v in written.items() if isinstance(v, dict) for n in v}
    assert {n for n in names(RUNS[1]) if n.count(".") < 2} <= flat
    assert plain(RUNS[1])["optim"]["betas"] == [0.8, 0.999]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a\n- b\n", "must hold keys and values, not list"),
        ("", "not NoneType"),
        ("a: [1\n", "is not valid YAML"),
        (None, "there is no file"),
    ],
)
def test_a_file_that_is_no_run(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_yaml(path)

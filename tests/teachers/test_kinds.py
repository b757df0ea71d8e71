"""What a run may say of its teacher, and which facts each kind of teacher is refused for before
anything is loaded.
"""

from __future__ import annotations

from typing import Any

import pytest

from opdkit import UserError, load
from opdkit.base.config import parse_overrides
from opdkit.run.settings import make_run, set_value
from opdkit.sampling.hf_settings import HfSettings
from opdkit.sampling.vllm import VllmSettings
from opdkit.teachers.cached import CachedTeacher
from opdkit.teachers.kinds import one_teacher_of, teacher_of
from opdkit.teachers.local import LocalTeacher
from opdkit.teachers.mixture import MixtureTeacher
from opdkit.teachers.routed import RoutedTeacher
from opdkit.teachers.server import ServerTeacher
from opdkit.teachers.vllm import VllmTeacher


def test_text_names_a_kind() -> None:
    assert one_teacher_of("Qwen/Qwen3-8B") == LocalTeacher("Qwen/Qwen3-8B")
    assert one_teacher_of("/data/models/vllm") == LocalTeacher("/data/models/vllm")
    assert one_teacher_of("vllm:Qwen/Qwen3-8B") == VllmTeacher(model="Qwen/Qwen3-8B")
    assert one_teacher_of("cached:runs/cache") == CachedTeacher("runs/cache")
    assert one_teacher_of("server:http://a:1,http://b:2") == ServerTeacher(
        ("http://a:1", "http://b:2")
    )
    assert one_teacher_of("http://127.0.0.1:8000/v1") == ServerTeacher(
        ("http://127.0.0.1:8000/v1",)
    )


def test_a_group_names_a_kind_and_its_settings() -> None:
    assert one_teacher_of(
        {"kind": "server", "urls": ["http://a:1"], "retries": 2}
    ) == ServerTeacher(("http://a:1",), retries=2)
    assert one_teacher_of({"kind": "mixture", "of": {"a": "x", "b": "y"}}) == MixtureTeacher(
        {"a": LocalTeacher("x"), "b": LocalTeacher("y")}
    )
    routes = teacher_of({"math": "x", "code": {"kind": "vllm", "model": "y"}})
    assert routes == RoutedTeacher({"math": LocalTeacher("x"), "code": VllmTeacher(model="y")})


def test_a_setting_of_a_teacher_given_as_text() -> None:
    base = {"student": "s", "teacher": "m", "data": "d"}
    assert make_run(base, ["teacher.quantize=4bit"]).teachers == LocalTeacher("m", quantize="4bit")
    assert make_run(
        base, ["teacher=server:http://a:1", "teacher.retries=2"]
    ).teachers == ServerTeacher(("http://a:1",), retries=2)
    assert make_run(base, ["teacher.math=x"]).teachers == RoutedTeacher(
        {"default": LocalTeacher("m"), "math": LocalTeacher("x")}
    )
    assert make_run(
        base, ["sampler=vllm", "sampler.enforce_eager=true"]
    ).sampler_settings == VllmSettings(enforce_eager=True)
    assert make_run(base, ["sampler.max_batch_tokens=99"]).sampler_settings == HfSettings(99)
    assert make_run(
        base, ["sampler.kind=vllm", "sampler.max_num_seqs=9"]
    ).sampler_settings == VllmSettings(max_num_seqs=9)
    assert make_run(base, ["teacher.kind=vllm"]).teachers == VllmTeacher(model="m")
    with pytest.raises(UserError, match="sampler"):
        make_run(base, ["sampler.max_batch_token=99"])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"kind": "serve", "urls": ["http://a:1"]}, "did you mean 'server'"),
        (
            {"kind": "server", "urls": ["http://a:1"], "retry": 2},
            "did you mean 'teacher.retries'|unknown key 'teacher.retry'",
        ),
        ({"kind": "server", "urls": []}, "at least one url"),
        ({"kind": "server"}, "urls is missing"),
        ({"kind": "mixture", "of": {"a": "x"}}, "at least two"),
        (
            {"kind": "mixture", "of": {"a": "x", "b": "y"}, "weights": {"a": 1.0}},
            "weights name a, the teachers are a, b",
        ),
        (
            {"kind": "mixture", "of": {"a": "x", "b": "y"}, "weights": {"a": -1.0, "b": 1.0}},
            "must not be negative",
        ),
        ({}, "names no teacher"),
    ],
)
def test_a_wrong_teacher_is_an_error_of_the_run(value: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_run({"student": "s", "teacher": value, "data": "d"})


def test_a_mixture_of_servers_is_refused() -> None:
    with pytest.raises(UserError, match="adds up whole distributions"):
        one_teacher_of({"kind": "mixture", "of": {"a": "x", "b": "server:http://a:1"}})


@pytest.mark.parametrize("kind", ["vllm:m", "cached:f"])
def test_kinds_that_return_numbers_are_refused_for_whole_vocabularies(kind: str) -> None:
    teacher = one_teacher_of(kind)
    for name, arguments in (("opd", {}), ("tropd", {}), ("opd", {"support": "teacher", "k": 8})):
        teacher.refuse(name, load(name, **arguments).needs)
    for name, arguments, said in (
        ("gkd", {}, "teacher over the whole vocabulary"),
        ("vopd", {}, "over the whole vocabulary"),
        ("opd", {"support": "student", "k": 8}, "teacher log-probs at the student's top 8"),
    ):
        with pytest.raises(UserError, match=said):
            teacher.refuse(name, load(name, **arguments).needs)


def test_one_teacher_of_several_that_cannot_is_enough_to_refuse() -> None:
    needs = load("gkd").needs
    teacher_of({"a": "x", "b": "y"}).refuse("gkd", needs)
    with pytest.raises(UserError, match="a vllm teacher cannot say"):
        teacher_of({"a": "x", "b": "vllm:y"}).refuse("gkd", needs)


OVERRIDDEN = [  # what is said, and what it comes to
    ("reference=m reference.view=hint", {"reference": {"kind": "local", "view": "hint"}}),
    ("models.x=m models.x.view=hint", {"models": {"x": {"kind": "local", "view": "hint"}}}),
    ("models.x=self:ema models.x.rate=0.5", {"models": {"x": {"weights": "ema", "rate": 0.5}}}),
    ("teacher.a=m teacher.a.view=hint", {"teacher": {"a": {"kind": "local", "view": "hint"}}}),
    ("teacher.a.weights=ema teacher.b=m", {"teacher": {"a": {"weights": "ema"}, "b": "m"}}),
    (
        "teacher.kind=mixture teacher.of.a=self teacher.of.a.weights=ema teacher.weights.a=0.3",
        {"teacher": {"of": {"a": {"weights": "ema"}}, "weights": {"a": 0.3}}},
    ),
    (
        "evaluate.environment=calculator evaluate.environment.max_turns=3",
        {"evaluate": {"environment": {"kind": "calculator", "max_turns": 3}}},
    ),
    ("teacher=m teacher.kind=self", {"teacher": {"kind": "self"}}),
]


@pytest.mark.parametrize(("said", "meant"), OVERRIDDEN)
def test_a_setting_of_any_teacher_or_engine_given_as_text(said: str, meant: Any) -> None:
    nested: dict[str, Any] = {"evaluate": {"data": "d"}}
    for key, value in parse_overrides(said.split()):
        set_value(nested, key, value)

    def holds(found: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict):
            return all(holds(found[key], inner) for key, inner in wanted.items())
        return bool(found == wanted)

    assert holds(nested, meant), nested


@pytest.mark.parametrize("where", ["teacher", "reference", "models.x", "teacher.a", "teacher.of.a"])
def test_a_views_template_after_any_model_takes_the_place_of_its_name(where: str) -> None:
    nested: dict[str, Any] = {"teacher": {"kind": "mixture"} if ".of." in where else {}}
    template = "{prompt} K: {hint}"
    words = {where: "m", f"{where}.view": "hint", f"{where}.view.name": "hint"}
    for key, value in (words | {f"{where}.view.template": template}).items():
        set_value(nested, key, value)
    for word in where.split("."):
        nested = nested[word]
    assert nested["model"] == "m" and nested["view"] == {"template": template}

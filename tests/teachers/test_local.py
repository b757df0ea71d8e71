"""Teachers in this process: routed ones score as each would alone, and no pass disturbs the
student.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.models.body import head_of
from opdkit.models.layout import Layout
from opdkit.objective.divergences import ReverseKL
from opdkit.objective.facts import EntropyFact, Fact, GapFact, LogpFact, TopFact
from opdkit.objective.head import flat_positions
from opdkit.objective.needs import Needs
from opdkit.teachers import LocalModel, Routed, route
from opdkit.train.gather import collate, gather
from opdkit.train.settings import Lora
from opdkit.train.student import with_adapters
from tests.common.tiny import tiny_model
from tests.train.rows import naive_logps, rollouts

NEEDS: tuple[Fact, ...] = (
    LogpFact("teacher"),
    EntropyFact("teacher"),
    TopFact("teacher", 3),
    GapFact(ReverseKL(), "student", "teacher"),
)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        name: tiny_model(kind, seed=seed).double()
        for name, kind, seed in (("student", "qwen3", 1), ("a", "llama", 2), ("b", "qwen3", 3))
    }


def local(model: Any) -> LocalModel:
    return LocalModel(model, head_of(model))


def test_routed_teachers_score_their_rows_as_each_alone(models: dict[str, Any]) -> None:
    names = ["a", "b", "b", "a", "poetry"]
    rows = [replace(r, row={"teacher": name}) for r, name in zip(rollouts(), names)]
    student = local(models["student"])

    def facts(teacher: Any) -> Any:
        return gather(
            rows,
            Needs(frozenset(NEEDS)),
            {"student": student, "teacher": teacher},
            dtype=torch.float64,
        )

    routed = facts(Routed({"a": local(models["a"]), "default": local(models["b"])}))
    alone = {name: facts(local(models[name])) for name in ("a", "b")}
    for fact in NEEDS:
        for b, name in enumerate(names):
            expected = alone["a" if name == "a" else "b"].read(fact)[b]
            torch.testing.assert_close(routed.read(fact)[b], expected, rtol=0, atol=1e-12)
    assert not torch.equal(alone["a"]["teacher"].logp, alone["b"]["teacher"].logp)


def test_a_routed_source_gives_whole_vocabularies_in_the_order_asked(
    models: dict[str, Any],
) -> None:
    """As training on full divergences reads it: any positions, in float64 where the
    teachers are.
    """
    rows = [
        replace(r, row={"teacher": name})
        for r, name in zip(rollouts(lengths=[(3, 4), (2, 4), (4, 4)]), "aba")
    ]
    layout, positions = Layout(rows, 4), flat_positions(collate(rows, "cpu", torch.float64).mask)
    source = Routed({"a": local(models["a"]), "b": local(models["b"])}).source(layout, positions)
    asked = torch.tensor([9, 0, 5, 4, 11, 2])
    logps = source.logits(asked).log_softmax(-1)
    assert logps.dtype == torch.float64
    for n, position in enumerate(asked.tolist()):
        b, t = divmod(position, 4)
        torch.testing.assert_close(
            logps[n], naive_logps(models["aba"[b]], rows[b])[t], rtol=0, atol=1e-12
        )
    assert source.logits(asked[:0]).shape == (0, 320)


def test_a_teacher_without_rows_in_the_step_is_not_run(models: dict[str, Any]) -> None:
    rows = [replace(r, row={"teacher": "a"}) for r in rollouts()]
    layout, positions = Layout(rows, 8), flat_positions(collate(rows, "cpu", torch.float64).mask)
    idle = local(models["b"])
    hook = (
        models["b"]
        .get_decoder()
        .register_forward_pre_hook(lambda module, args: pytest.fail("it was run"))
    )
    Routed({"a": local(models["a"]), "idle": idle}).source(layout, positions)
    hook.remove()


@pytest.mark.parametrize(
    ("name", "known", "served"),
    [
        ("a", ("a", "b"), "a"),
        ("c", ("a", "default"), "default"),
        (None, ("a", "default"), "default"),
        ("default", ("default",), "default"),
    ],
)
def test_r10_routes(name: str | None, known: tuple[str, ...], served: str) -> None:
    assert route(name, known, "row 1") == served


@pytest.mark.parametrize("name", ["maths", None])
def test_r10_a_key_that_no_teacher_has_is_an_error(name: str | None) -> None:
    with pytest.raises(UserError, match=r"row 1 names .*teacher.* called 'default'"):
        route(name, ("math", "code"), "row 1")


def test_s2_a_pass_leaves_gradients_mode_and_random_state_alone() -> None:
    """Of the student as it is now, in the middle of training with dropout."""
    model = with_adapters(tiny_model(), Lora(r=4, dropout=0.5)).train()
    rows = rollouts()
    layout, positions = Layout(rows, 8), flat_positions(collate(rows, "cpu", torch.float32).mask)
    model(torch.arange(6)[None]).logits.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    first = LocalModel(model, head_of(model)).source(layout, positions).hidden
    again = LocalModel(model, head_of(model)).source(layout, positions).hidden
    assert torch.equal(first, again) and not first.requires_grad  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(
        torch.equal(p.grad, gradients[name])
        for name, p in model.named_parameters()
        if p.grad is not None
    )


def test_s2_the_base_under_adapters_is_the_model_before_them() -> None:
    base = tiny_model()
    rows = rollouts()
    layout, positions = Layout(rows, 8), flat_positions(collate(rows, "cpu", torch.float32).mask)
    before = local(base).source(layout, positions).hidden
    model = with_adapters(base, Lora(r=4))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(p)
    head = head_of(model)
    reference = (
        LocalModel(model, head, around=model.disable_adapter).source(layout, positions).hidden
    )
    moved = LocalModel(model, head).source(layout, positions).hidden
    assert torch.equal(reference, before) and not torch.allclose(moved, before)

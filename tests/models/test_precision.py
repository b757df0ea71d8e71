"""A model computes in its own numbers, whatever surrounds it, and models of equal weights compute
equal ones.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opdkit.models.body import check_head, head_of, hidden_states
from opdkit.models.layout import Layout
from opdkit.models.load import load_advised, load_model
from opdkit.models.precision import compute_in, head_products_of, products_of
from opdkit.objective.facts import LogpFact
from opdkit.objective.needs import Needs
from opdkit.sampling import Guide, HFSampler
from opdkit.teachers import LocalModel
from opdkit.train.gather import gather
from opdkit.types import Prompt, Sampling
from tests.common.tiny import tiny_model, tiny_tokenizer
from tests.train.rows import naive_logps, rollouts

BF16 = torch.bfloat16
IDS = torch.randint(3, 320, (4, 20), generator=torch.Generator().manual_seed(0))


def uneven(kind: str = "qwen3", **config: Any) -> Any:
    """A tiny model whose norms are no numbers of 16 bits."""
    model = tiny_model(kind, **config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """[B, T, V]."""
    return head_of(model).logits(hidden_states(model, IDS, None))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2", "granite", "cohere", "qwen3_moe"])
def test_a_student_in_bfloat16_and_a_teacher_stored_in_it_are_equal_to_the_bit(
    kind: str, tmp_path: Path
) -> None:
    """From one checkpoint in float32: the student's weights stay so and are rounded for products,
    the teacher's matrices are loaded rounded.
    """
    uneven(kind).save_pretrained(tmp_path)
    student, teacher = load_model(str(tmp_path)), load_advised(str(tmp_path), "bfloat16", "cpu", "")
    exact = logits(student)
    compute_in(student, BF16)
    ours = logits(student)
    assert torch.equal(ours, logits(teacher)) and ours.dtype == torch.float32
    assert 1e-3 < (ours - exact).abs().mean() / exact.abs().mean() < 0.1
    check_head(student)
    check_head(teacher)


def test_the_states_between_layers_are_nearer_to_float32_than_those_of_pure_bfloat16(
    tmp_path: Path,
) -> None:
    tiny_model(layers=4).save_pretrained(tmp_path)
    exact, ours, pure = (
        load_model(str(tmp_path)),
        *(
            load(str(tmp_path), "bfloat16", "cpu")
            for load in (lambda *a: load_advised(*a, ""), load_model)
        ),
    )
    with torch.no_grad():
        truth = hidden_states(exact, IDS, None)
        plain = pure.get_decoder()(input_ids=IDS).last_hidden_state.float()
        assert (hidden_states(ours, IDS, None) - truth).norm() < 0.95 * (plain - truth).norm()


@pytest.mark.parametrize("around", [BF16, torch.float16])
def test_what_surrounds_a_model_changes_nothing(around: torch.dtype) -> None:
    whole, half = tiny_model(), tiny_model()
    compute_in(half, BF16)
    alone = [logits(model) for model in (whole, half)]
    with torch.autocast("cpu", around):
        inside = [logits(model) for model in (whole, half)]
        copied = logits(copy.deepcopy(half))  # such as a moving average of the student
    assert all(torch.equal(a, b) for a, b in zip(alone, [*inside]))
    assert torch.equal(copied, alone[1]) and not torch.equal(*alone)
    assert not any(m._forward_hooks for m in half.modules())


def test_a_teacher_in_float32_beside_a_student_in_bfloat16_is_scored_in_float32() -> None:
    student, teacher = tiny_model(seed=1), tiny_model("llama", seed=2)
    compute_in(student, BF16)
    scorers = {
        name: LocalModel(m, head_of(m)) for name, m in (("student", student), ("t", teacher))
    }
    rows, wanted = rollouts(), Needs(frozenset({LogpFact("student"), LogpFact("t")}))
    batch = gather(rows, wanted, scorers, recompute_student=True)
    plain = tiny_model(seed=1)
    for b, row in enumerate(rows):
        at = torch.tensor(row.tokens, dtype=torch.int64)[:, None]
        n = len(row.tokens)
        naive = [naive_logps(m, row).gather(1, at)[:, 0] for m in (teacher, plain)] if n else []
        for name, expected in zip(("t", "student"), naive):
            off = (batch[name].logp[b, :n] - expected).abs()
            assert off.max() < 1e-5 if name == "t" else off.mean() > 1e-4


def test_sampler_and_guide_each_compute_in_their_own() -> None:
    student, teacher = tiny_model(seed=1), tiny_model("llama", seed=2)
    compute_in(student, BF16)
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}
    for name, model in (("student", student), ("teacher", teacher)):

        def note(module: nn.Module, inputs: Any, out: Tensor, name: str = name) -> None:
            seen[name].add(out.dtype)

        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(note)
    sampler = HFSampler(student, tiny_tokenizer(), guide=Guide(teacher, head_of(teacher), 0.5))
    prompts = [Prompt("a", [5, 6, 7]), Prompt("b", [9, 10, 11, 12, 13], prefix=[4, 5])]
    (first, *_) = sampler.sample(prompts, Sampling(max_completion_length=5))
    assert seen == {"student": {BF16}, "teacher": {torch.float32}}
    rows, wanted = [first], Needs(frozenset({LogpFact("student")}))
    again = gather(
        rows, wanted, {"student": LocalModel(student, head_of(student))}, recompute_student=True
    )
    # a token at a time or all at once: roundings to bfloat16 fall differently
    assert (again["student"].logp[0] - torch.tensor(first.logp)).abs().max() < 0.2


def test_a_head_in_float32_is_exact_where_the_body_is_not() -> None:
    model = tiny_model()
    compute_in(model, BF16, torch.float32)
    assert products_of(model) == BF16 and head_products_of(model) == torch.float32
    states = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    exact = states.double() @ model.lm_head.weight.double().T
    assert (head_of(model).logits(states) - exact).abs().max() < 1e-5
    compute_in(model, BF16)
    assert (head_of(model).logits(states) - exact).abs().max() > 1e-3
    model.double()
    compute_in(model, None, torch.float32)  # never narrower than the other products
    assert head_products_of(model) == torch.float64


def test_rows_and_widths_of_a_pass_follow_from_what_they_are_among() -> None:
    """Rollouts dropped and responses cut short afterwards: what is left is padded as before, and
    its states are the same to the bit.
    """
    model, rows = tiny_model(), rollouts(lengths=((9, 30), (4, 8), (5, 33), (7, 12), (3, 31)))
    layout, width = Layout(rows, 33), 33
    whole = torch.tensor([b * width + t for b, r in enumerate(rows) for t in range(len(r.tokens))])
    some = whole[(whole // width != 2) & (whole % width < 7)]
    before = {
        int(at): states
        for part in layout.micro_batches(whole, 90)
        for at, states in zip(part, layout.states(model, part).detach())
    }
    passes = layout.passes(some, 90, whole)
    assert torch.equal(torch.cat([part for part, _ in passes]).sort().values, some)
    for part, padded in passes:
        for at, states in zip(part, layout.states(model, part, padded).detach()):
            assert torch.equal(states, before[int(at)])

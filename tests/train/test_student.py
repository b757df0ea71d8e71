"""The student's schedule, its optimiser groups and its keyed dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opdkit import UserError
from opdkit.train.settings import Lora, Optim
from opdkit.train.student import Student, with_adapters
from tests.common.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def rates(model: Any, total: int, **optim: Any) -> list[float]:
    student = Student(model, Optim(**optim), learning_rate=1.0, total_updates=total)
    return [student.rate(update) for update in range(total + 1)]


def test_warm_up_is_linear_and_reaches_the_rate_at_its_last_step(model: Any) -> None:
    assert rates(model, 6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_the_linear_schedule_ends_at_zero_after_the_last_step(model: Any) -> None:
    """Two of warm-up, then 1 - n/4 for n = 0 ... 4."""
    assert rates(model, 6, schedule="linear", warmup_steps=2) == [
        0.5,
        1.0,
        1.0,
        0.75,
        0.5,
        0.25,
        0.0,
    ]


def test_the_cosine_schedule_is_half_way_at_half_of_the_time(model: Any) -> None:
    """(1 + cos(pi n / 4)) / 2 = 1, (2 + sqrt 2) / 4, 1/2, (2 - sqrt 2) / 4, 0."""
    half = 2**0.5 / 4
    assert rates(model, 4, schedule="cosine") == pytest.approx(
        [1.0, 0.5 + half, 0.5, 0.5 - half, 0.0]
    )


def test_a_schedule_stays_at_its_end(model: Any) -> None:
    student = Student(model, Optim(schedule="linear"), 1.0, total_updates=3)
    assert student.rate(7) == 0.0
    assert Student(model, Optim(warmup_steps=9), 1.0, total_updates=3).rate(2) == pytest.approx(
        1 / 3
    )


def test_the_length_of_the_schedule_is_what_steps_have_taken_so_far(model: Any) -> None:
    """Ten steps; two updates in the first: 20 in all. After 3, 3, 3 more and now 1: 12 in 5 steps,
    24 in all. The last step knows.
    """
    student = Student(model, Optim(schedule="linear"), 1.0, total_updates=99)
    student.expect(2, 0, 10)
    assert student.total_updates == 20
    student.updates = 11
    student.expect(1, 4, 10)
    assert student.total_updates == 24
    student.updates = 23
    student.expect(2, 9, 10)
    assert student.total_updates == 25 and student.rate(24) == pytest.approx(1 / 25)


def test_steps_that_go_through_their_rollouts_more_often_count_as_often(model: Any) -> None:
    """Two passes in each of the first three of ten steps, then one: 13 passes of one update."""
    student = Student(model, Optim(schedule="linear"), 1.0, total_updates=99)

    def passes(step: int) -> int:
        return 2 if step < 3 else 1

    for step in range(10):
        student.expect(passes(step), step, 10, passes)
        assert student.total_updates == 13
        student.updates += passes(step)
    assert student.rate(12) == pytest.approx(1 / 13)
    student.updates = 0
    student.expect(6, 0, 10, passes)  # three minibatches
    assert student.total_updates == 39


def test_only_matrices_are_decayed() -> None:
    """With zero gradients the decayed weights shrink by rate * decay, and norms stay."""
    student = Student(tiny_model(), Optim(weight_decay=0.1), learning_rate=0.5, total_updates=1)
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    for p in student.parameters:
        p.grad = torch.zeros_like(p)
    student.step()
    for name, p in student.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() >= 2 else 1.0))
    assert student.updates == 1 and all(p.grad is None for p in student.parameters)


@pytest.mark.parametrize(
    ("limit", "left"),
    [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (None, [3.0, 4.0]), (0.0, [3.0, 4.0])],
)
def test_gradients_are_clipped_and_their_norm_is_that_before(
    limit: float | None, left: list[float]
) -> None:
    """(3, 4) has the norm 5; without a limit it stays as it is, to the bit, and the norm is still
    known.
    """
    student = Student(tiny_model(), Optim(max_grad_norm=limit), 1.0, 1)
    for p in student.parameters:
        p.grad = torch.zeros_like(p)
    student.parameters[0].grad.view(-1)[:2] = torch.tensor([3.0, 4.0])
    assert student.gradient_norm().item() == pytest.approx(5.0)
    now = student.parameters[0].grad.view(-1)[:2].tolist()
    assert now == (pytest.approx(left, rel=1e-5) if limit == 1.0 else left)


def test_dropout_is_keyed_by_seed_and_step_and_leaves_the_random_state_alone() -> None:
    student = Student(with_adapters(tiny_model(), Lora(r=4, dropout=0.5)), Optim(), 1.0, 4)
    for name, p in student.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(p)
    ids = torch.arange(10)[None]

    def forward(seed: int, update: int) -> torch.Tensor:
        student.updates = update
        torch.rand(3)  # whatever else was drawn before
        before = torch.get_rng_state()
        with student.learning(seed):
            logits = student.model(ids).logits.detach()
        assert torch.equal(torch.get_rng_state(), before)
        return logits

    first = forward(0, 1)
    assert torch.equal(first, forward(0, 1))
    assert not torch.equal(first, forward(0, 2))
    assert not torch.equal(first, forward(1, 1))


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
NOISY: dict[str, dict[str, Any]] = {  # each with dropout in another place, by its configuration
    "GPT2Config": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32},
    "OPTConfig": {
        **SMALL,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
        "layerdrop": 0.5,
        "attention_dropout": 0.3,
    },
    "GPTNeoConfig": {
        **SMALL,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global"], 2]],
        "attention_dropout": 0.3,
        "resid_dropout": 0.3,
    },
    "SeedOssConfig": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8},
    "MixtralConfig": {
        **SMALL,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "router_jitter_noise": 0.3,
    },
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", NOISY)
def test_learning_draws_no_noise_unless_it_is_asked_for(name: str, checkpointed: bool) -> None:
    """The logits are those of evaluation, to the bit; afterwards the configuration is as it was.

    Asked for, the noise is there.
    """
    import transformers

    config = getattr(transformers, name)(**NOISY[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = config.to_dict()
    ids = torch.arange(12)[None]
    model.eval()
    with torch.no_grad():
        still = model(ids, use_cache=False).logits
    for disable, same in ((True, True), (False, False)):
        student = Student(model, Optim(), 1.0, 4, disable_dropout=disable)
        with student.learning(0):
            assert torch.equal(model(ids, use_cache=False).logits, still) == same
    assert config.to_dict() == before


def test_dropout_of_adapters_is_their_own_setting() -> None:
    """It stays where the configuration's is off."""
    student = Student(with_adapters(tiny_model(), Lora(r=4, dropout=0.5)), Optim(), 1.0, 4)
    modules = [m for m in student.model.modules() if isinstance(m, torch.nn.Dropout)]
    with student.learning(0):
        assert modules and {m.p for m in modules} == {0.5}


def test_adapters_start_equal_whatever_was_drawn_before() -> None:
    def adapters() -> dict[str, torch.Tensor]:
        torch.rand(7)
        return {
            n: p.detach()
            for n, p in with_adapters(tiny_model(), Lora(r=4)).named_parameters()
            if p.requires_grad
        }

    a, b = adapters(), adapters()
    assert all("lora_" in name for name in a) and all(torch.equal(a[name], b[name]) for name in a)


def test_adapters_for_layers_that_are_not_there() -> None:
    with pytest.raises(UserError, match=r"lora: .*no_such_layer"):
        with_adapters(tiny_model(), Lora(targets=("no_such_layer",)))

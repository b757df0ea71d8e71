"""The probe: an engine with the student's weights passes, one that stayed behind does not, however
small the step was.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.models.body import head_of
from opdkit.models.engines.probe import TOLERANCE, Probe
from tests.common.rounding import FORWARD
from tests.common.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def probe(model: Any, **settings: Any) -> Probe:
    return Probe(model, TOKENIZER, lambda: head_of(model, 320), torch.float32, **settings)


def says(model: Any, made: Probe) -> list[torch.Tensor]:
    """The log-probs of another copy of the model, sequence by sequence."""
    out = []
    for ids in made.sequences:
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0, :-1, :320].log_softmax(-1)
        out.append(logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return out


def moved(model: Any, size: float) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.sign(p), alpha=size)
    return model


def test_expected_log_probs_are_those_of_the_whole_model_cut_to_the_real_tokens() -> None:
    model = tiny_model(vocab_size=352)
    made = probe(model)
    torch.testing.assert_close(made.expected(), torch.cat(says(model, made)), atol=FORWARD, rtol=0)


def test_what_the_trainer_found_elsewhere_is_not_found_again() -> None:
    """Unless it is of other sequences, as an engine that reads less has."""
    model, told = tiny_model(), probe(tiny_model()).expected() + 1.0
    assert torch.equal(probe(model, known=lambda: told).expected(), told)
    short = probe(model, known=lambda: told, limit=9)
    assert torch.equal(short.expected(), probe(model, limit=9).expected())


def test_an_engine_with_the_same_weights_passes() -> None:
    model = tiny_model()
    made = probe(model)
    for version in range(3):
        assert (
            made.check(says(moved(model, 1e-3), made), made.expected(), version, "sending weights")
            < FORWARD
        )
    assert made.gap is not None and made.gap < FORWARD


def test_other_weights_do_not() -> None:
    made = probe(tiny_model())
    with pytest.raises(UserError, match=r"after sending weights \(optimiser step 4\).*differ by"):
        made.check(says(tiny_model(seed=1), made), made.expected(), 4, "sending weights")


def test_numbers_that_are_none_do_not() -> None:
    model = tiny_model()
    made = probe(model, tolerance=100.0)
    with pytest.raises(UserError, match="differ by nan"):
        made.check(
            [logp * float("nan") for logp in says(model, made)],
            made.expected(),
            0,
            "sending weights",
        )


def test_an_engine_that_did_not_move_is_caught_below_the_tolerance() -> None:
    """Steps so small that the numbers alone pass: the engine's are those of before to a bit, the
    student's are not.
    """
    model = tiny_model()
    made, former = probe(model, tolerance=0.1), copy.deepcopy(model)
    made.check(says(former, made), made.expected(), 0, "sending weights")
    moved(model, 1e-3)
    assert 0.001 < float((made.expected() - torch.cat(says(former, made))).abs().mean()) < 0.1
    with pytest.raises(UserError, match="to a bit what they were before"):
        made.check(says(former, made), made.expected(), 1, "sending weights")


def test_a_student_that_did_not_move_is_no_reason_to_stop() -> None:
    """Such as one whose learning rate still warms up from 0, or whose steps are lost in 16 bits."""
    model = tiny_model()
    made = probe(model)
    for version in range(2):
        made.check(says(model, made), made.expected(), version, "sending weights")


def test_sequences_fit_the_engine_and_tolerances_its_dtype() -> None:
    assert max(map(len, probe(tiny_model(), limit=9).sequences)) == 8
    half = Probe(tiny_model(), TOKENIZER, lambda: head_of(tiny_model()), torch.bfloat16)
    assert half.tolerance == TOLERANCE[torch.bfloat16] > TOLERANCE[torch.float32]
    # the trainer's own numbers, whatever the engine's are
    assert torch.equal(half.expected(), probe(tiny_model()).expected())

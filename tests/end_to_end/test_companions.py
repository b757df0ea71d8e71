"""State beside the student in whole runs: in a file of one's own and from the library, however the
step is cut; killed and resumed runs are in `test_resume`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import opdkit
from opdkit import Method, UserError, distill
from opdkit.cli import main
from opdkit.objective import (
    Divergence,
    Ema,
    LogRatio,
    Objective,
    PolicyGradient,
    TokenLoss,
    ValueHead,
)
from opdkit.train import checkpoint as checkpoints
from opdkit.train.student import Student
from tests.end_to_end.conftest import Shop
from tests.end_to_end.test_errors import refused

EXAMPLES = Path(opdkit.__file__).parent.parent / "examples"
OWN = {"own_value_head.py:valued": "Regress(rate=0.01)", "own_ema.py:steady": "Average(rate=0.01)"}
CREDIT = LogRatio("teacher", "student")


def left(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The student's weights and what stands beside it, in the newest checkpoint."""
    newest = checkpoints.newest(folder)
    assert newest is not None
    beside = torch.load(newest / "companions.pt", weights_only=True)
    return load_file(newest / "model.safetensors"), beside


def tensors(value: Any) -> list[torch.Tensor]:
    """Those of a nested state, in order."""
    if isinstance(value, torch.Tensor):
        return [value.double()]
    parts = value.values() if isinstance(value, dict) else value
    return [t for part in parts for t in tensors(part)] if isinstance(value, (dict, list)) else []


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_ones_own_trains_and_passes_check_whatever_the_micro_batches(
    shop: Shop, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every weight of student, head and average after three float64 steps of two minibatches."""
    file = name.partition(":")[0]
    assert len((EXAMPLES / file).read_text().splitlines()) < 40
    method = f"{EXAMPLES / file}:{name.partition(':')[2]}"
    assert main(["check", method]) == 0 and "FAIL" not in capsys.readouterr().out
    for budget in (16, 100_000):
        assert (
            shop.train(
                tmp_path / str(budget),
                f"--method={method}",
                f"--reward={shop.reward}",
                "method.rate=0.01",
                "steps=3",
                "optim.minibatches=2",
                "dtype=float64",
                f"micro_batch_tokens={budget}",
            )
            == 0
        )
    (one, one_beside), (other, other_beside) = left(tmp_path / "16"), left(tmp_path / "100000")
    assert list(one_beside) == [OWN[name]]
    pairs = [*zip(one.values(), other.values()), *zip(tensors(one_beside), tensors(other_beside))]
    for a, b in pairs:
        assert (a - b).norm() <= 1e-9 * max(1.0, a.norm().item())
    start = load_file(Path(shop.student) / "model.safetensors")
    assert any(not torch.equal(one[k].float(), start[k]) for k in start)


@dataclass(frozen=True)
class Steep(TokenLoss):
    """|v - v|^(1/2): zero, and its slope in the head is not finite; the student has none of it."""

    def value(self, live: Any) -> torch.Tensor:  # [n]
        v = live.companion(ValueHead())(live.hidden.detach())[:, 0]
        return (v - v.detach()).abs().sqrt()


def test_a_gradient_beside_the_student_that_is_not_finite_moves_nothing(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Any] = []
    monkeypatch.setattr(Student, "step", lambda self: moved.append(self))
    with pytest.raises(UserError, match=r"gradient of ValueHead\(.* is not finite though the loss"):
        train(shop, tmp_path / "run", PolicyGradient(CREDIT) + Steep())
    assert moved == []


def followed(rate: float, name: str = "ema") -> Method:
    """opd, and a KL to a copy of the student."""
    pull = Divergence("reverse_kl", teacher=name) * 0.1
    return Method(PolicyGradient(CREDIT) + pull, companions=(Ema(rate, model=name),))


def train(shop: Shop, output: Path, method: Any, **settings: Any) -> None:
    given = shop.values(output, steps=3, **settings)
    distill(given.pop("student"), given.pop("teacher"), given.pop("data"), method, **given)


@pytest.mark.parametrize(("rate", "is_that_of"), [(1.0, "the end"), (0.0, "the start")])
def test_a_copy_of_rate_one_ends_as_the_student_and_one_of_rate_zero_as_it_began(
    shop: Shop, tmp_path: Path, rate: float, is_that_of: str
) -> None:
    train(shop, tmp_path / "run", followed(rate))
    student, beside = left(tmp_path / "run")
    if is_that_of == "the start":
        student = load_file(Path(shop.student) / "model.safetensors")
    (copy,) = beside.values()
    assert set(student) <= set(copy)  # a tied head has one name in the student's file
    assert all(torch.equal(copy[name], student[name]) for name in student)


def test_the_student_can_be_its_own_teacher(shop: Shop, tmp_path: Path) -> None:
    """Under the name of the teacher nothing else is loaded: the run's own need not be there."""
    given = Method(Objective(PolicyGradient(CREDIT)), companions=(Ema(0.0, model="teacher"),))
    train(shop, tmp_path / "run", given, teacher=str(tmp_path / "nowhere"))
    saved = "Ema(rate=0.0, every=1, model='teacher', first_copy=False)"
    assert next(iter(left(tmp_path / "run")[1])) == saved


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (followed(0.5, "other"), {"models": {"other": "x"}}, "leave models.other out"),
        (followed(0.5, "reference"), {"reference": "x"}, "leave reference out"),
    ],
)
def test_a_model_that_the_run_names_too_is_refused(
    shop: Shop, tmp_path: Path, method: Method, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=f"brings its own model .*{said}"):
        train(shop, tmp_path / "run", method, **settings)


def test_resumed_with_another_method_is_one_clear_error(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, method = tmp_path / "run", f"--method={EXAMPLES / 'own_ema.py'}:steady"
    assert shop.train(output, method) == 0
    refused(
        capsys,
        shop.train(output, method, "method.rate=0.5", "steps=3", "--resume", "--allow-changes"),
        "holds the state of Average(rate=0.01), and this run has Average(rate=0.5)",
    )

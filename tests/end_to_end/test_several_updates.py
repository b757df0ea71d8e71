"""Several optimiser steps on the same rollouts: who is read as it was before the first of them
stays so, though the weights have moved.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Shop, train

# what a model said of the tokens before the step, and what its vocabulary, which a loss reads chunk
# by chunk at every optimiser step, says of them now
PROBE = """
from dataclasses import dataclass
import torch
from opdkit.objective import LogpFact, Objective, TokenLoss


@dataclass(frozen=True)
class Same(TokenLoss):
    model: str

    def value(self, live):
        said = live.vocabulary(self.model).at(live.tokens[:, None])[:, 0]
        before = live.read(LogpFact(self.model))
        moved = live.logp - live.read(LogpFact("student"))
        if live.logits.shape[-1] > 8:  # no made-up facts
            print("apart", *((x.abs().max().item()) for x in (said - before, moved)))
        return -live.logp


def same(model="student"):
    return Objective(Same(model))
"""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("student", ()),
        ("student", ("lora.r=2",)),
        ("teacher", ("teacher.kind=self", "teacher.weights=live")),
        ("teacher", ("teacher.kind=self", "teacher.weights=ema", "teacher.rate=0.9")),
    ],
)
def test_a_models_vocabulary_stays_as_it_was_found(
    shop: Shop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    words: tuple[str, ...],
) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    asked = [f"--method={tmp_path / 'probe.py'}:same", f"method.model={model}", *words]
    paths = (f"--student={shop.student}", f"--data={shop.data}", f"--output={tmp_path / 'out'}")
    steps = ("optim.passes=3", "learning_rate=1e-2", "dtype=float64")
    assert train(*paths, *asked, *steps) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    apart, moved = zip(*((float(w[1]), float(w[2])) for w in shown if w[:1] == ["apart"]))
    assert len(apart) >= 2 * 3 and max(apart) < 1e-5 and max(moved) > 1e-2

"""Two processes over which the student is spread: the weights that engines get are those of one
process to the bit, and so are the rollouts, by servers and by an engine in each process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.sampling import HFSampler
from opdkit.types import Rollout
from tests.common.fake_sampler import Vllm
from tests.common.rounding import FORWARD
from tests.common.tiny import tiny_model
from tests.sampling import ranks

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (
        Vllm(tiny_model(seed=9), ranks.TOKENIZER) as one,
        Vllm(tiny_model(seed=9), ranks.TOKENIZER) as two,
    ):
        done = subprocess.run(
            [*launch, "-m", "tests.sampling.ranks", str(out), one.url, two.url],
            timeout=300,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=False)


def alone(name: str) -> list[Rollout]:
    """What one process writes, most probable tokens alone."""
    model = ranks.MODELS[name]()
    return ranks.written(Greedy(HFSampler(model, ranks.TOKENIZER)), model)


class Greedy:
    """A sampler that draws the most probable token, and says what the plain softmax says of it."""

    def __init__(self, inner: HFSampler):
        self.inner, self.sync = inner, inner.sync

    def sample(self, prompts: Any, sampling: Any, **settings: Any) -> list[Rollout]:
        from dataclasses import replace

        made = self.inner.sample(prompts, replace(sampling, temperature=0), **settings)
        return [replace(r, drawn_logp=r.logp) for r in made]


def same(theirs: list[Rollout], ours: list[Rollout]) -> None:
    assert [(r.id, r.tokens, r.finish, r.policy_version) for r in theirs] == [
        (r.id, r.tokens, r.finish, r.policy_version) for r in ours
    ]
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=FORWARD, rtol=0)


@pytest.mark.parametrize("name", list(ranks.MODELS))
def test_weights_put_together_are_those_of_one_process(found: Any, name: str) -> None:
    weights = found["weights"][name]
    assert weights["differ"] == [] and len(weights["names"]) == weights["count"] and found["agreed"]
    assert ("lm_head.weight" in weights["names"]) is (name != "tied")
    many = [n for n in weights["names"] if ".experts.3.gate_proj" in n]
    assert len(many) == (2 if name == "experts" else 0)


@pytest.mark.parametrize("name", list(ranks.MODELS))
def test_a_process_that_keeps_none_holds_a_layer_at_once(found: Any, name: str) -> None:
    """Of two layers, an embedding and perhaps a head."""
    weights = found["weights"][name]
    assert weights["most"] < 0.6 * weights["all"]


def test_adapters_alone_too(found: Any) -> None:
    assert found["adapters"] == []


@pytest.mark.parametrize("name", ["untied", "adapters"])
def test_rollouts_of_servers(found: Any, name: str) -> None:
    same(found["servers"][name], alone(name))


@pytest.mark.parametrize("name", list(ranks.MODELS))
def test_rollouts_of_an_engine_in_each_process(found: Any, name: str) -> None:
    same(found["engines"][name], alone(name))


def test_engines_that_sleep_without_their_weights(found: Any) -> None:
    same(found["asleep"], alone("tied"))

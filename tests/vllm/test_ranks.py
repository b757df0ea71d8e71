"""Two processes over which the student is spread, with an engine in each, write what one process
writes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.sampling import HFSampler
from tests.vllm.test_sampler import CLOSE, without_numbers

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("vllm")
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "tests.vllm.ranks", str(out)],
        timeout=500,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("name", ["tied", "untied", "adapters"])
def test_an_engine_in_each_process(found: Any, name: str) -> None:
    from tests.vllm import ranks

    rollouts, gaps = found[name]
    model = ranks.MODELS[name]()
    own = ranks.written(HFSampler(model, ranks.TOKENIZER), model)
    assert without_numbers(rollouts) == without_numbers(own)
    assert len(gaps) == 2 and all(0 < gap < CLOSE for gap in gaps)
    for a, b in zip(rollouts, own):
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=CLOSE, rtol=0)

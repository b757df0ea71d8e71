"""Where teacher and student are one checkpoint there is nothing to learn: whole steps whose loss
and gradient are 0 to the bit, in float32 and in bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.objective.facts import LogpFact
from opdkit.run.build import prepare
from opdkit.run.settings import make_run
from opdkit.train.loop import train_step
from tests.common.tiny import save_tiny, tiny_tokenizer
from tests.end_to_end.conftest import Shop
from tests.models.test_precision import uneven
from tests.train.rows import naive_logps

DIVERGENCES = (  # each built-in kind; one micro-batch and several
    *(f"opd(kind={kind!r})" for kind in ("forward_kl", "jsd", "skew_forward", "skew_reverse")),
    *(f"opd(kind={kind!r})" for kind in ("alpha", "hellinger2", "tv", "chi2")),
    "opd(kind='forward_kl', support='teacher', k=8, rest='renormalise')",
    "opd(kind='reverse_kl', support='student', k=8, rest='tail')",
    "opd(kind='jsd', support='union', k=8)",
    *("gkd(lmbda=1, beta=0.1)", "gkd(lmbda=1, beta=1)", "gkd(lmbda=1, beta=0)"),
    "distillm(threshold=1)",
    "kl_mixing",
    "topk_opd",
    "uld",
    "gold",
    "bd_kd",
)
WEIGHTS = ("tip", "iw_opd", "position_opd", "paced", "scope", "drift_gating")
CREDITS = ("opd", "vopd", "exopd", "iw_opd", "reopold", "gae_opd", "position_opd")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("equal")
    uneven(layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def stepped(shop: Shop, model: str, output: Path, method: str, **settings: Any) -> dict[str, float]:
    """The metrics of one step."""
    values = shop.values(output, student=model, teacher=model, method=method, reward=shop.reward)
    run = make_run(values | {"steps": 1, "prompts_per_step": 4} | settings)
    run.folder.mkdir(parents=True)
    job, state = prepare(run)
    train_step(job, state)
    return json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method", [*DIVERGENCES, *(f"gkd(lmbda=1) * {weight}" for weight in WEIGHTS)]
)
def test_a_divergence_and_its_gradient_are_zero(
    method: str, dtype: str, shop: Shop, model: str, tmp_path: Path
) -> None:
    found = stepped(shop, model, tmp_path / "run", method, dtype=dtype)
    assert found["loss"] == found["grad_norm"] == 0


@pytest.mark.parametrize("method", CREDITS)
def test_a_credit_is_zero_in_bfloat16_and_rounding_in_float32(
    method: str, shop: Shop, model: str, tmp_path: Path
) -> None:
    """In bfloat16 the trainer scores what it is compared with; in float32 the sampler's log-probs
    are taken, which are those of a token at a time.
    """
    half = stepped(shop, model, tmp_path / "half", method, dtype="bfloat16")
    assert half["loss"] == half["grad_norm"] == 0
    assert stepped(shop, model, tmp_path / "whole", method)["grad_norm"] < 1e-4
    again = stepped(shop, model, tmp_path / "again", method, recompute_student=True)
    assert again["loss"] == again["grad_norm"] == 0


@pytest.mark.parametrize(
    "settings", [{"micro_batch_tokens": 40}, {"head_dtype": "float32"}], ids=str
)
def test_small_passes_and_another_head(
    settings: dict[str, Any], shop: Shop, model: str, tmp_path: Path
) -> None:
    found = stepped(shop, model, tmp_path / "run", "gkd(lmbda=1)", dtype="bfloat16", **settings)
    assert found["loss"] == found["grad_norm"] == 0


def test_a_tied_head_in_float32_under_adapters(shop: Shop, tmp_path: Path) -> None:
    """The embedding is stored in float32 for the head, and all else multiplies bfloat16."""
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    more = {"dtype": "bfloat16", "head_dtype": "float32", "lora": {"r": 4}}
    found = stepped(shop, tied, tmp_path / "run", "gkd(lmbda=1)", **more)
    assert found["loss"] == found["grad_norm"] == 0


def test_a_teacher_in_float32_is_read_in_float32(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's teacher log-probs, beside a student in bfloat16, are the float32 model's."""
    from opdkit.train import loop

    seen: list[Any] = []

    def gather(rollouts: Any, *arguments: Any, **settings: Any) -> Any:
        seen.append((rollouts, batch := gathered(rollouts, *arguments, **settings)))
        return batch

    gathered = loop.gather
    monkeypatch.setattr(loop, "gather", gather)
    teacher = save_tiny(tmp_path / "teacher", "llama", seed=5)
    run = make_run(
        shop.values(
            tmp_path / "run", teacher=teacher, dtype="bfloat16", teacher_dtype="float32", steps=1
        )
    )
    run.folder.mkdir()
    train_step(*prepare(run))
    ((rollouts, batch),) = seen
    from opdkit.models.load import load_model

    for b, rollout in enumerate(rollouts):
        expected = naive_logps(load_model(teacher), rollout)
        at = torch.tensor(rollout.tokens)[:, None]
        ours = batch.facts[LogpFact("teacher")][b, : len(rollout.tokens)]
        assert torch.allclose(ours, expected.gather(1, at)[:, 0], atol=1e-5)

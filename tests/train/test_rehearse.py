"""What is written last is tried first: before the first step a student is known to be saved as what
it is.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from opdkit import UserError
from opdkit.models.load import load_model
from opdkit.train.rehearse import rehearse
from opdkit.train.settings import Lora
from opdkit.train.student import with_adapters
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_a_generation_config_that_cannot_be_saved_is_mended(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Llama 2's: numbers for sampling beside do_sample=false."""
    folder = Path(save_tiny(tmp_path / "model", "qwen3"))
    said = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(said))
    model = load_model(str(folder))
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "out")
    rehearse(model, tokenizer)
    assert "sets temperature, top_p" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (kept["do_sample"], kept["eos_token_id"]) == (False, 2) and "top_p" not in kept
    rehearse(model, tokenizer)
    assert "opdkit" not in capsys.readouterr().err


def test_what_cannot_be_saved_is_told_before_the_first_step(tokenizer: Any) -> None:
    model = tiny_model()
    model.generation_config.num_return_sequences = 3  # greedy decoding has one
    with pytest.raises(UserError, match=r"could not be saved at the end \(ValueError: "):
        rehearse(model, tokenizer)
    model = tiny_model()
    model.config.made_of = object()
    with pytest.raises(UserError, match=r"could not be saved at the end .* before the first step"):
        rehearse(model, tokenizer)


def adapted(model: Any, *targets: str) -> Any:
    return with_adapters(model, Lora(r=4, targets=targets or "all-linear"))


@pytest.mark.parametrize("tied", [False, True])
def test_plain_adapters_pass_and_every_bit_is_as_before(tokenizer: Any, tied: bool) -> None:
    model = adapted(tiny_model(tie_word_embeddings=tied))
    before = copy.deepcopy(model.state_dict())
    drawn = torch.get_rng_state()
    rehearse(model, tokenizer)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(drawn, torch.get_rng_state())
    assert not any(getattr(m, "merged", False) for m in model.modules())


def test_adapters_in_bfloat16_pass(tokenizer: Any) -> None:
    """Rounding of merged weights is not another model."""
    rehearse(adapted(tiny_model().to(torch.bfloat16)), tokenizer)


@pytest.mark.parametrize("targets", [("embed_tokens",), ("embed_tokens", "q_proj", "v_proj")])
def test_adapters_on_a_tied_embedding_are_refused(tokenizer: Any, targets: tuple[str, ...]) -> None:
    model = adapted(tiny_model(tie_word_embeddings=True), *targets)
    with pytest.raises(UserError, match=r"adapts model.embed_tokens, whose weight is that of"):
        rehearse(model, tokenizer)
    rehearse(adapted(tiny_model(tie_word_embeddings=False), *targets), tokenizer)


def test_a_merge_that_computes_something_else_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one that adds the adapter twice; a structure that no name tells is found by its
    log-probs.
    """
    from peft.tuners.lora.layer import Linear

    real = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 2 * real(self, name))
    with pytest.raises(UserError, match=r"once merged, adapters on .*q_proj.* another model"):
        rehearse(adapted(tiny_model()), tokenizer)


def test_adapters_that_have_been_trained_are_probed_too(tokenizer: Any) -> None:
    """As after a resume: their weights return."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(p)
    rehearse(model, tokenizer)
    assert all(bool((p == 1).all()) for n, p in model.named_parameters() if "lora_B" in n)

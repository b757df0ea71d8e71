"""Loading, the split into body and head against each model's own logits, and tokenizers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.body import check_head, head_of, hidden_states
from opdkit.models.load import evaluating, load_model, load_tokenizer, parameter_count
from opdkit.models.tokenizers import real_vocabulary, same_tokenizer, stop_ids
from tests.common.rounding import FORWARD
from tests.common.tiny import END, VOCAB, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 100, 7, 300, 12, 9], [42, 3, 3, 250, 1, 2]])
ONES = torch.ones_like(IDS)


def split_logits(model: Any, ids: Tensor = IDS, mask: Tensor | None = ONES) -> Tensor:
    return head_of(model).logits(hidden_states(model, ids, mask))


def lora(model: Any, **settings: Any) -> Any:
    """The model with adapters that change it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {
        "r": 4,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
    } | settings
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()


# ------------------------------------------------------------------------------------ body and head


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 1.5}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
@torch.no_grad()
def test_hidden_states_and_head_give_the_models_own_logits(
    kind: str, config: dict[str, Any]
) -> None:
    model = tiny_model(kind, **config)
    assert torch.allclose(split_logits(model), model(IDS).logits, atol=FORWARD)
    check_head(model)


@torch.no_grad()
def test_a_head_with_a_bias() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = PhiForCausalLM(config).eval()
    model.lm_head.bias.uniform_(-1, 1)
    assert torch.allclose(split_logits(model), model(IDS).logits, atol=FORWARD)
    check_head(model)


@torch.no_grad()
def test_vocab_keeps_the_first_rows() -> None:
    model = tiny_model()
    hidden = hidden_states(model, IDS, ONES)
    assert torch.allclose(
        head_of(model, 40).logits(hidden), model(IDS).logits[..., :40], atol=FORWARD
    )


def test_a_model_that_does_something_else_with_its_logits_is_refused() -> None:
    class Odd(type(tiny_model())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits - 0.01 * output.logits.square()
            return output

    model = Odd(tiny_model().config).train()
    with pytest.raises(UserError, match=r"Odd turns its last hidden states into logits in a way"):
        check_head(model)
    assert model.training


@torch.no_grad()
def test_adapters_in_the_body_are_part_of_the_hidden_states() -> None:
    plain = tiny_model()(IDS).logits
    model = lora(tiny_model())
    assert not torch.allclose(model(IDS).logits, plain, atol=1e-2)
    assert torch.allclose(split_logits(model), model(IDS).logits, atol=FORWARD)
    check_head(model)
    with model.disable_adapter():
        assert torch.allclose(split_logits(model), plain, atol=FORWARD)


@torch.no_grad()
def test_a_head_trained_whole_beside_adapters() -> None:
    model = lora(tiny_model(), modules_to_save=["lm_head"])
    trained = model.get_output_embeddings().modules_to_save["default"].weight
    trained += torch.randn_like(trained)
    assert head_of(model).weight is trained
    assert torch.allclose(split_logits(model), model(IDS).logits, atol=FORWARD)
    with model.disable_adapter():
        assert torch.allclose(split_logits(model), tiny_model()(IDS).logits, atol=FORWARD)


def test_adapters_on_the_head_are_refused() -> None:
    """Fresh ones change no logit, so a probe of values alone would let them pass, and they would
    never be trained.
    """
    model = lora(tiny_model(), target_modules=["lm_head"], init_lora_weights=True)
    with pytest.raises(UserError, match=r"not a plain linear layer[\s\S]*modules_to_save"):
        check_head(model)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    model = tiny_model()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ONES], 1)
    assert torch.allclose(
        hidden_states(model, padded, mask)[:, 3:], hidden_states(model, IDS, None), atol=FORWARD
    )


@torch.no_grad()
def test_a_cache_continues_where_it_ended() -> None:
    from transformers import DynamicCache

    model, cache = tiny_model(), DynamicCache()
    padded, mask = (
        torch.cat([torch.zeros_like(IDS[:, :1]), IDS], 1),
        torch.cat([torch.zeros_like(ONES[:, :1]), ONES], 1),
    )
    hidden_states(model, padded[:, :4], mask[:, :4], past_key_values=cache)
    rest = hidden_states(model, padded[:, 4:], mask, past_key_values=cache)
    assert cache.get_seq_length() == 7
    assert torch.allclose(rest, hidden_states(model, IDS, None)[:, 3:], atol=FORWARD)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    def gradient(model: Any) -> Tensor:
        split_logits(model).square().sum().backward()
        return model.get_input_embeddings().weight.grad

    model = tiny_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.allclose(
        gradient(model.train()), gradient(tiny_model().train()), rtol=1e-4, atol=1e-4
    )


def test_evaluating_gives_every_module_its_own_mode_back() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert True in modes and False in modes


# ------------------------------------------------------------------------------------------ loading


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "llama")


@torch.no_grad()
def test_a_checkpoint_loads_with_the_asked_dtype(checkpoint: str) -> None:
    expected = tiny_model("llama")(IDS).logits
    model = load_model(checkpoint)
    assert torch.allclose(model(IDS).logits, expected, rtol=0, atol=FORWARD) and not model.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), tiny_model("llama").parameters(), strict=True)
    )
    assert load_model(checkpoint, dtype="bfloat16").lm_head.weight.dtype == torch.bfloat16
    assert torch.allclose(
        load_model(checkpoint, dtype="float64")(IDS).logits, expected.double(), atol=FORWARD
    )
    assert (
        load_model(checkpoint, attn_implementation="eager").config._attn_implementation == "eager"
    )
    assert load_model(model) is model


def test_a_tokenizer_loads_and_passes_through(checkpoint: str) -> None:
    tokenizer = load_tokenizer(checkpoint)
    assert same_tokenizer(tokenizer, tiny_tokenizer()) is None
    assert load_tokenizer(tokenizer) is tokenizer


def test_parameters_are_counted_without_loading_weights(checkpoint: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert (
        parameter_count(checkpoint)
        == parameter_count(model)
        == sum(p.numel() for p in model.parameters())
    )
    tied = tiny_model("gemma2")
    tied.config.save_pretrained(tmp_path)  # a configuration alone: there are no weights to load
    assert parameter_count(str(tmp_path)) == sum(p.numel() for p in tied.parameters())


def test_a_missing_folder_is_named() -> None:
    for load in (load_model, load_tokenizer, parameter_count):
        with pytest.raises(UserError, match=r"there is no folder './nowhere'"):
            load("./nowhere")  # type: ignore[operator]


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer, parameter_count):
        with pytest.raises(
            UserError,
            match=r"'no-such/name'[\s\S]*no local folder, so it was looked for on the hub",
        ):
            load("no-such/name")  # type: ignore[operator]


def test_a_folder_without_a_checkpoint_is_explained(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"must be a Hugging Face checkpoint: config.json and \*.safetensors"
    ):
        load_model(str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"Pickled weights \(\*\.bin\) are not read"):
        load_model(str(tmp_path))


def test_a_checkpoint_with_missing_weights_is_refused(checkpoint: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"no weights for 1 tensors of LlamaForCausalLM, for example model\.norm\.weight",
    ):
        load_model(str(tmp_path))


def test_an_unknown_dtype_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown dtype 'bfloat61'; did you mean 'bfloat16'"):
        load_model("anything", dtype="bfloat61")


# --------------------------------------------------------------------------------------- tokenizers


def test_tokenizers_agree_by_their_ids_and_not_by_their_size() -> None:
    """PITFALLS V1: padding rows of the model belong to no tokenizer, and equal sizes prove
    nothing.
    """
    first, second = tiny_tokenizer(), tiny_tokenizer()
    assert same_tokenizer(first, second) is None
    other = tiny_tokenizer(["completely different words were read here, zebra zebra zebra"])
    assert len(other.get_vocab()) <= len(first.get_vocab())
    assert "differ in" in str(same_tokenizer(first, other))


def test_a_token_with_another_id_is_named() -> None:
    def with_vocab(**ids: int) -> Any:
        return SimpleNamespace(get_vocab=lambda: ids, name_or_path="+".join(ids))

    message = same_tokenizer(with_vocab(a=0, b=1, c=2), with_vocab(a=0, c=1, b=2))
    assert (
        message
        == "the tokenizers 'a+b+c' and 'a+c+b' differ in 2 of 3 tokens: 'b' has id 1 in the first "
        "and has id 2 in the second"
    )


def test_an_added_token_makes_a_difference() -> None:
    first, second = tiny_tokenizer(), tiny_tokenizer()
    second.add_tokens(["<think>"])
    assert f"'<think>' is unknown in the first and has id {VOCAB} in the second" in str(
        same_tokenizer(first, second)
    )
    assert (real_vocabulary(first), real_vocabulary(second)) == (VOCAB, VOCAB + 1)


@pytest.mark.parametrize(
    ("declared", "eos", "expected"),
    [
        (7, END, {2, 7}),
        ([7, 8], END, {2, 7, 8}),
        (None, END, {2}),
        ([7], None, {7}),
        (None, None, set()),
    ],
)
def test_stop_ids_are_one_several_or_none(
    declared: Any, eos: str | None, expected: set[int]
) -> None:
    model, tokenizer = tiny_model(layers=1), tiny_tokenizer(chat_template=False)
    model.generation_config.eos_token_id = declared
    tokenizer.eos_token = eos
    assert stop_ids(model, tokenizer) == expected

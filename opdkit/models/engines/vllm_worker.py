"""What vLLM's workers learn from opdkit: to take the student's weights over, whole, and to keep to
the tokenizer's real tokens.

vLLM mixes the class into its own: `worker_extension_cls`, or `vllm serve --worker-extension-cls
opdkit.models.engines.vllm_worker.Weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor


class Weights:
    """Methods for `collective_rpc`. `self` is a vLLM worker."""

    def opdkit_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """New weights by their names in the checkpoint, [...] of any shape."""
        worker: Any = self
        worker.reload_weights(weights_iterator=weights)
        _pack_again(worker.get_model())

    def opdkit_load_folder(self, folder: str) -> None:
        """The same from safetensors files."""
        self.opdkit_load(_read(Path(folder)))

    def opdkit_head(self, rows: int) -> int:
        """Logits of the first `rows` ids only, whose rows of the head stand for tokens, and without
        adapters of the head: opdkit has none, and vLLM's wrapper for them cannot score prompts side
        by side. The number of heads.
        """
        from vllm.lora.layers import LogitsProcessorWithLoRA
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        worker: Any = self
        heads = 0
        for module in list(worker.get_model().modules()):
            for name, child in list(module.named_children()):
                plain = child.base_layer if isinstance(child, LogitsProcessorWithLoRA) else child
                if isinstance(plain, LogitsProcessor) and not isinstance(
                    module, LogitsProcessorWithLoRA
                ):
                    setattr(module, name, plain)
                    plain.org_vocab_size = rows
                    heads += 1
        return heads


def _pack_again(model: Any) -> None:
    """On a CPU vLLM multiplies with packed copies of the weights. Its reload packs the layers anew
    that got weights of their own; a head that shares the embedding's weight got none, and keeps the
    old copy.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from torch.nn.functional import linear
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        if getattr(module, "cpu_linear", linear) is not linear and module.weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no weights: is it on a file system that this worker shares with the "
            "trainer?"
        )
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                yield name, handle.get_tensor(name)

"""A stand-in for the vLLM engine in this process: a model of the configuration that it is started
on, which takes weights as vLLM's worker does and writes its most probable tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM


class FakeEngine:
    """`opdkit.models.engines.vllm_engine.Engine`, of what a sampler asks of it."""

    def __init__(self, model: str, settings: Any, **how: Any):
        config = AutoConfig.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.dtype, self.limit, self.rows = torch.float32, 4096, config.vocab_size
        self.asleep = False
        self.drops = settings.sleep_level == 2

    @property
    def dropped(self) -> bool:
        return self.asleep and self.drops

    def head(self, rows: int) -> None:
        self.rows = rows

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        # as of a checkpoint, whose names may be others than the model's own
        given = {name: weight.float().clone() for name, weight in weights}
        kind, config = type(self.model), self.model.config
        self.model = kind.from_pretrained(None, config=config, state_dict=given).eval()

    def wake(self, weights: Callable[[], object] | None = None) -> None:
        if weights is not None:
            weights()
        self.asleep = False

    def sleep(self) -> None:
        self.asleep = self.drops

    @torch.no_grad()
    def _logps(self, tokens: Sequence[int]) -> Tensor:
        """[L, V]: of what follows each token."""
        logits = self.model(input_ids=torch.tensor([list(tokens)])).logits[0, :, : self.rows]
        return logits.log_softmax(-1)

    def score(
        self, sequences: Sequence[list[int]], starts: Sequence[int], who: Sequence[str]
    ) -> list[Any]:
        found = []
        for tokens, start in zip(sequences, starts):
            rows, own = self._logps(tokens)[start - 1 : -1], torch.tensor(tokens[start:])
            found.append(SimpleNamespace(logp=rows.gather(1, own[:, None])[:, 0]))
        return found

    def run(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[dict[str, Any]],
        tick: Callable[[int], None] | None = None,
    ) -> list[Any]:
        assert not self.asleep
        return [self._written(prompt, given) for prompt, given in zip(prompts, params)]

    def _written(self, prompt: list[int], given: dict[str, Any]) -> Any:
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < given["max_tokens"] and not (
            tokens and tokens[-1] in given["stop_token_ids"]
        ):
            row = self._logps([*prompt, *tokens])[-1]
            tokens.append(int(row.argmax()))
            logps.append(float(row.max()))
        ended = "stop" if tokens[-1] in given["stop_token_ids"] else "length"
        said = SimpleNamespace(logprobs=logps)
        one = SimpleNamespace(token_ids=tokens, logprobs=said, finish_reason=ended)
        return SimpleNamespace(outputs=[one])

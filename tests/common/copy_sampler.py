"""A sampler that is elsewhere, as a server is, in this process: it writes with a copy of the
student, which takes weights over as they were when they were staged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

from opdkit.objective.parts import whole
from opdkit.sampling import HFSampler
from opdkit.sampling.hf_settings import HfSettings
from opdkit.sampling.settings import SamplerContext
from opdkit.types import Prompt, Rollout, Sampler, Sampling


class CopySampler:
    """Calls are noted: (what, version or step)."""

    gives_each = True  # it takes `each`

    def __init__(self, context: SamplerContext, before: Callable[[int], object]):
        config = copy.deepcopy(context.model.config)
        dtype = next(context.model.parameters()).dtype
        self.model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        self.student = context.model
        self.inner = HFSampler(self.model, context.tokenizer)
        self.version: int | None = None  # optimiser steps of its weights; None: it has none yet
        self.before = before  # is told of the step whose rollouts are asked for
        self.calls: list[tuple[str, int]] = []

    def staged(self, model: Any, version: int) -> Callable[[], None]:
        weights = {n: whole(p.detach()).clone() for n, p in model.named_parameters()}
        self.calls.append(("staged", version))

        def send() -> None:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(weights[name])
            self.version = version
            self.calls.append(("sent", version))

        return send

    def sync(self, model: Any, version: int) -> None:
        self.staged(model, version)()

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int | None, **settings: Any
    ) -> list[Rollout]:
        if self.version is None:
            self.sync(self.student, settings["policy_version"])
        assert settings["policy_version"] == self.version
        self.before(-1 if step is None else step)
        self.calls.append(("sample", -1 if step is None else step))
        return self.inner.sample(prompts, sampling, step=step, **settings)


@dataclass(frozen=True)
class CopySettings(HfSettings):
    """Used as `sampler: {kind: copy}`, once it is in `KINDS`."""

    kind = "copy"
    on_student = False
    elsewhere = True
    before: ClassVar[Callable[[int], object]] = staticmethod(lambda step: None)
    opened: ClassVar[list[CopySampler]] = []

    def open(self, context: SamplerContext) -> Sampler:
        made = CopySampler(context, type(self).before)
        type(self).opened.append(made)
        return made

"""Samplers in processes of their own: each has a copy of the student, and writes as the run's own
sampler does; the trainer's side sends them weights and hands them prompts.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.base.launched import rank
from opdkit.models.device import device_of
from opdkit.models.engines.probe import TOLERANCE, Probe
from opdkit.models.load import dtype_of, load_tokenizer
from opdkit.objective.head import Head
from opdkit.objective.parts import whole
from opdkit.run.cluster.actors import stored
from opdkit.run.cluster.crew import Crew, Sent
from opdkit.run.open import Given, Models
from opdkit.run.resolve import on_device, with_models
from opdkit.run.settings import Run
from opdkit.sampling.check import check_model
from opdkit.sampling.settings import SamplerContext
from opdkit.train.student import Student
from opdkit.types import Prompt, Rollout, Sampler, Sampling, Watch

Array = tuple[torch.dtype, tuple[int, ...], Any]  # a tensor as bytes that processes share


@dataclass(frozen=True)
class Opening:
    """How the trainer's student writes: what a copy of it has to be told."""

    vocab: int | None  # rows of the head that are kept
    longest: int
    watch: Watch


# how the student writes, its optimiser steps, its log-probs [N] of the probe, and what learns
Weights = tuple[Opening, int, Tensor, dict[str, Array]]


class SamplerActor:
    """One sampler, in its process."""

    def __init__(self, run: Run):
        gpu = device_of(run.device).startswith("cuda")
        run = on_device(run, gpu)
        self.method = run.method_spec.load()
        self.run = with_models(run, self.method)
        self.student: Student | None = None
        self.opening: Opening | None = None
        self.sampler: Any = None
        self.own = torch.zeros(0)  # [N]: the trainer's log-probs of the probe
        self.weights: str | None = None  # the name of those that it has; None: its own first ones

    def alive(self) -> None:
        """That it can be asked; the student is loaded now, not with the first weights."""
        self._student()

    def load(self, weights: str, what: Weights) -> Tensor:
        """[N]: log-probs of the probe, once the copy has the trainer's weights; where another
        engine writes, which probes itself, the trainer's own.
        """
        opening, version, self.own, parameters = what
        student, self.weights = self._student(), None
        named = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
        if set(named) != set(parameters):
            raise RuntimeError(f"weights of {sorted(set(named) ^ set(parameters))[:3]} do not fit")
        with torch.no_grad():
            for name, array in parameters.items():
                named[name].copy_(as_tensor(array))
        student.updates = version
        if opening != self.opening:
            student.vocab, self.sampler = opening.vocab, self._opened(opening)
            self.opening = opening
        self.sampler.sync(student.model, version)
        self.weights = weights
        if not self.run.sampler_settings.on_student:
            return self.own
        return log_probs(student.model, self.tokenizer, student.head)

    def sample(
        self, weights: str, prompts: Sequence[Prompt], asked: tuple[Sampling, dict[str, Any]]
    ) -> list[Rollout] | None:
        """The responses to prompts; None where it has other weights than the trainer means."""
        if self.weights != weights:
            return None
        sampling, settings = asked
        rollouts: list[Rollout] = self.sampler.sample(prompts, sampling, **settings)
        return rollouts

    def _student(self) -> Student:
        """The student as it is loaded, to be overwritten."""
        if self.student is None:
            run = self.run
            # an engine has the copy that writes, and takes it from this one
            device = device_of(run.device) if run.sampler_settings.on_student else "cpu"
            self.tokenizer = load_tokenizer(run.student, run.trust_remote_code)
            models = Models(run, self.method, device, Given(), self.tokenizer)
            self.student = Student(
                models.student(run.student, False),
                run.optim,
                run.learning_rate,
                1,
                run.dtype == "bfloat16",
                head_dtype=dtype_of(run.head_dtype),
                disable_dropout=run.disable_dropout,
            )
        return self.student

    def _opened(self, opening: Opening) -> Sampler:
        student = self._student()
        if hasattr(self.sampler, "close"):
            self.sampler.close()
        context = SamplerContext(
            student.model,
            self.tokenizer,
            lambda: student.head,
            self.run.dtype,
            opening.longest,
            None,
            opening.watch,
            self.run.trust_remote_code,
            known=lambda: self.own,
        )
        return self.run.sampler_settings.open(context)


class CrewSampler:
    """The trainer's side: a `types.Sampler` that writes elsewhere.

    `crew`: makes what hands out parts, in the process that asks. `parts`: into which the prompts of
    a request are cut.
    """

    gives_each = True  # it takes `each`

    def __init__(self, context: SamplerContext, crew: Callable[[], Crew], parts: int):
        self.context, self.make, self.parts = context, crew, parts
        self.run = uuid.uuid4().hex[:8]  # an earlier trainer may have sent weights of this version
        self.behind = True  # it has to be sent weights before it writes

    @cached_property
    def crew(self) -> Crew:
        return self.make()

    def staged(self, model: Any, version: int) -> Callable[[], None]:
        """The weights that learn, put together on all processes; what it returns sends them."""
        context = self.context
        check_model(context.model, model)
        parameters: dict[str, Array] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                values = whole(parameter.detach())
                if rank() == 0:
                    parameters[name] = as_array(values)
        head = context.head
        own = log_probs(model, context.tokenizer, head)
        opening = Opening(head.vocab, context.longest, context.watch)
        self.behind = False
        most = TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE[torch.float32])

        def check(name: str, theirs: Tensor) -> None:  # [N]
            if not (gap := float((theirs - own).abs().mean())) <= most:
                raise UserError(
                    f"sampler {name} gives other log-probs of the probe than the trainer, by "
                    f"{gap:.3g} nats in the mean (allowed: {most:g}), though it has been sent the "
                    f"weights of optimiser step {version}: it would write by other weights than "
                    "are trained. Are the same opdkit, torch and transformers on all machines, "
                    "and the same student?"
                )

        def send() -> None:
            what: Weights = (opening, version, own, parameters)
            self.crew.send(Sent(f"{self.run} {version}", stored(what), check))

        return send

    def sync(self, model: Any, version: int) -> None:
        self.staged(model, version)()

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        progress: Callable[[int], object] | None = None,
        each: Callable[[Rollout], object] | None = None,
        **settings: Any,
    ) -> list[Rollout]:
        """The responses to all prompts, in their order, whoever wrote them; `each` is told of those
        of a part once it is there.
        """
        if not prompts:
            return []
        if self.behind:
            self.sync(self.context.model, settings.get("policy_version", 0))
        done = 0

        def hear(made: list[Rollout]) -> None:
            nonlocal done
            done += len(made)
            if progress is not None:
                progress(done)
            if each is not None:
                for rollout in made:
                    each(rollout)

        written = self.crew.write(cut(prompts, self.parts), (sampling, settings), hear)
        return [rollout for rollouts in written for rollout in rollouts]


def cut(prompts: Sequence[Prompt], parts: int) -> list[Sequence[Prompt]]:
    """Prompts side by side in so many parts, or as many as there are prompts: the same each time,
    as numbers are rounded by what is computed together.
    """
    count = min(parts, len(prompts))
    ends = [len(prompts) * i // count for i in range(count + 1)]
    return [prompts[a:b] for a, b in pairwise(ends)]


def log_probs(model: Any, tokenizer: Any, head: Head) -> Tensor:
    """[N]: of the tokens of a few fixed texts, by the model as it is."""
    return Probe(model, tokenizer, lambda: head, torch.float32).expected()


def as_array(values: Tensor) -> Array:
    """A tensor [...] as it is now, as bytes."""
    flat = values.to("cpu", copy=True).contiguous().flatten().view(torch.uint8)
    return values.dtype, tuple(values.shape), flat.numpy()


def as_tensor(array: Array) -> Tensor:
    """[...]: the tensor, to be read only."""
    dtype, shape, values = array
    with warnings.catch_warnings():  # that it is to be read only
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(values).view(dtype).view(shape)

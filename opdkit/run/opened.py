"""The models of a run, each opened once, with the vocabulary that they share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import Method
from opdkit.models.body import head_of, kept_rows, layers_of, shared_vocabulary
from opdkit.models.device import device_of
from opdkit.models.load import dtype_of, load_tokenizer
from opdkit.models.quantize import quantized
from opdkit.models.sharding import shard
from opdkit.objective.companion import Around, Companion, Companions
from opdkit.run.open import Given, Models
from opdkit.run.settings import Run
from opdkit.sampling import HFSampler
from opdkit.teachers import LocalModel, Remote, Scorer
from opdkit.teachers.base import cut, heads_of
from opdkit.train.divided import divided
from opdkit.train.mesh import ALONE, Mesh
from opdkit.train.rehearse import rehearse
from opdkit.train.shards import is_sharded
from opdkit.train.student import Student
from opdkit.types import Sampler, Watch


@dataclass(frozen=True)
class Opened:
    """A run's models and the student's tokenizer."""

    models: Models
    tokenizer: Any
    student: Student
    # "student" and "live" (the student as it is now), and every model the objective reads
    scorers: dict[str, Scorer | Remote]
    vocabulary: int  # ids of the tokenizer that all of them have
    companions: Companions  # what stands beside the student

    def sampler(self, watch: Watch = Watch()) -> HFSampler:
        """The student's sampler in this process, for evaluations."""
        student = self.student
        return HFSampler(student.model, self.tokenizer, head=lambda: student.head, watch=watch)

    def player(self, name: str, mesh: Mesh = ALONE) -> Sampler:
        """What lets a copy of the student write, in this process."""
        [copy] = [state for spec, state in self.companions.items() if spec.model == name]
        model = getattr(copy, "model", None)
        if model is None:
            raise UserError(
                f"{name!r} is to write responses, and it is no copy of the student but a "
                f"{type(copy).__name__}: bring an Ema with that name"
            )
        vocab = self.student.vocab
        alone = HFSampler(model, self.tokenizer, head=lambda: head_of(model, vocab))
        return divided(alone, mesh, model)


def open_models(
    run: Run, given: Given, method: Method, checkpoint: Path | None, devices: Any = None
) -> Opened:
    """Opens every model that a method reads; the student as it is in the checkpoint, if that holds
    a model, and spread over a mesh of `devices`, if there are several processes; of one in few bits
    each has the whole.
    """
    tokenizer = (
        given.tokenizer
        if given.tokenizer is not None
        else load_tokenizer(run.student, trust_remote_code=run.trust_remote_code)
    )
    models = Models(run, method, device_of(run.device), given, tokenizer, devices)
    models.check_models()
    # what several processes have saved is read once the student is there
    start = None if checkpoint is None or is_sharded(checkpoint) else str(checkpoint)
    base = models.student(start or run.student, start is not None)
    student = Student(
        base,
        run.optim,
        run.learning_rate,
        run.updates(method),
        run.dtype == "bfloat16",
        head_dtype=dtype_of(run.head_dtype),
        disable_dropout=run.disable_dropout,
    )
    over = None if quantized(base) else devices  # numbers in few bits mean nothing apart
    copies = beside(run.copies_for(method), student, {}, run, over)
    others = models.others(base, copies)
    heads = [student.head, *(head for scorer in others.values() for head in heads_of(scorer))]
    vocabulary = shared_vocabulary(heads, tokenizer)
    student.vocab = vocab = kept_rows(heads, vocabulary)
    scorers: dict[str, Scorer | Remote] = {
        name: LocalModel(base, head_of(base, vocab), run.micro_batch_tokens)
        for name in ("student", "live")
    }
    scorers |= {name: cut(scorer, vocab) for name, scorer in others.items()}
    wanted = {*method.needs.companions, *method.companions}
    others_beside = beside(wanted, student, scorers, run, over)
    companions = Companions(copies.built | others_beside.built)
    rehearse(base, tokenizer)
    student.spread(over)  # last: copies are made of the whole
    for name, scorer in scorers.items():
        if isinstance(scorer, LocalModel) and scorer.model is base:  # with the head it has now
            scorers[name] = replace(scorer, head=head_of(base, vocab))
    # a copy that a teacher reads through a view is behind it
    everyone = companions.scorers | scorers
    return Opened(models, tokenizer, student, everyone, vocabulary, companions)


def beside(
    wanted: Collection[Companion],
    student: Student,
    scorers: Mapping[str, Scorer | Remote],
    run: Run,
    devices: Any = None,
) -> Companions:
    """What stands beside the student at the start of a run."""

    def width(model: str) -> int:
        found = {h.weight.shape[1] for h in heads_of(scorers.get(model)) if h.weight is not None}
        if len(found) != 1:
            raise UserError(
                f"a companion asks how wide the hidden states of {model!r} are, and that is no "
                f"one model in this process. There are {', '.join(sorted(scorers))}"
            )
        return found.pop()

    around = Around(
        width,
        torch.device(device_of(run.device)),
        torch.promote_types(torch.float32, student.parameters[0].dtype),
        run.seed,
        student.model,
        lambda model: LocalModel(model, head_of(model, student.vocab), run.micro_batch_tokens),
        layers_of(student.model),
        lambda model: shard(model, devices),
    )
    return Companions.build(wanted, around)

"""A model in this process. It hands over hidden states, never logits."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.body import act_in, check_head, head_of
from opdkit.models.held import HERE, Held
from opdkit.models.identity import Identity, identify
from opdkit.models.layout import Layout, batch_tokens
from opdkit.models.limits import context_limit
from opdkit.models.load import (
    dtype_of,
    evaluating,
    load_advised,
    load_config,
    load_tokenizer,
    take_loaded,
)
from opdkit.models.offload import STUDENT_ADVICE, TEACHER_ADVICE, Offloaded, enough_memory
from opdkit.models.precision import compute_in
from opdkit.models.quantize import check_quantize, require
from opdkit.models.shapes import Shape
from opdkit.models.sharding import is_spread, level, shard_frozen, unsharded, whole_head
from opdkit.models.tokenizers import refuse_other_tokenizer, same_tokenizer, shared_ids
from opdkit.objective.facts import Fact
from opdkit.objective.head import Head, Source
from opdkit.teachers.base import Scorer, source_of
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.speech import VoiceHere, ends_of, note_questions
from opdkit.teachers.teacher import Teacher
from opdkit.teachers.views.translated import as_span_teacher, refuse_chat


@dataclass(frozen=True)
class LocalModel:
    """A frozen Hugging Face model: a teacher, a reference, or the student as it is now.

    `around` is a context for its passes, such as one that switches the student's adapters off, or
    `offload.Offloaded`.
    """

    model: Any
    head: Head
    # padded tokens of one pass; None: `models.layout.batch_tokens`
    micro_batch_tokens: int | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def heads(self) -> list[Head]:
        return [self.head]

    @property
    def reads(self) -> int | None:
        return context_limit(self.model.config)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What it samples text in: of several processes each has it whole meanwhile."""
        with self.around(), unsharded(self.model):
            yield

    def cut(self, vocab: int | None) -> LocalModel:
        """The same model, its head kept to the first rows."""
        return replace(self, head=replace(self.head, vocab=vocab))

    def source(self, layout: Layout, positions: Tensor) -> Source:
        """Hidden states at flat positions [N]; the model's mode, gradients and random state are
        left as they were.
        """
        budget = self.micro_batch_tokens or batch_tokens(positions.device)
        parts = level(self.model, layout.micro_batches(positions, budget), positions[:0])
        advice = (
            STUDENT_ADVICE
            if any(p.requires_grad for p in self.model.parameters())
            else TEACHER_ADVICE
        )
        memory = enough_memory(
            f"{self.model.config._name_or_path or type(self.model).__name__} scored rollouts",
            advice,
        )
        with memory, evaluating(self.model), torch.no_grad(), self.around():
            hidden = [self.head.kept(layout.states(self.model, part)) for part in parts]
        for part, states in zip(parts, hidden):
            self._refuse_broken(layout, part, states)
        head = self.head
        if is_spread(self.model):  # it may have learnt, and be in parts
            head = whole_head(head_of(self.model, head.vocab))
        return source_of(head.ready(), layout, parts, hidden, positions.device)

    def _refuse_broken(self, layout: Layout, positions: Tensor, states: Tensor) -> None:
        """Hidden states that are not numbers would spread into every weight of the student."""
        bad = ~states.isfinite().all(-1)
        if bool(bad.any()):
            # attention spreads it over the whole row
            row = int(positions[bad.to(positions.device)].min()) // layout.width
            raise UserError(
                f"{self.model.config._name_or_path or type(self.model).__name__} gives hidden "
                f"states that are not finite for rollout {layout.rollouts[row].id}: its files are "
                "damaged, or its dtype is too narrow. Nothing was learnt from this step; check the "
                "model, or load it in float32"
            )


@dataclass(frozen=True)
class LocalTeacher(Teacher):
    """A checkpoint loaded into this process: its whole vocabulary can be read."""

    kind = "local"
    main = "model"
    reads_spans = True
    model: str  # a folder or a hub name
    dtype: str | None = None  # null: the run's teacher_dtype
    quantize: str | None = None  # 8bit or 4bit: how the weights of its linear layers are stored
    offload: bool = False  # it waits on the CPU and is on the GPU only while it scores

    def __post_init__(self) -> None:
        check_quantize(self.quantize)

    @property
    def opens_local_model(self) -> bool:
        return True

    def says(self, fact: Fact, model: str) -> bool:
        return True

    def check(self, context: TeacherContext) -> None:
        """What its `quantize` and `offload` cannot be used with, and a tokenizer that the method
        cannot do with.
        """
        if self.quantize is not None:
            require(self.quantize)
        if self.offload and context.method.teacher_mix:
            raise UserError(
                f"method {context.method.name or 'own'!r} draws tokens from a mixture with the "
                "teacher, which is therefore needed on the GPU all the while: set offload: false, "
                "and quantize: 4bit if it does not fit"
            )
        self._other_tokenizer(context)

    def open(self, context: TeacherContext) -> Scorer:
        theirs = self._other_tokenizer(context)
        if (there := self._there(context)) is not None:
            return self.cut_to_student(there, context)
        local = self.load(context)
        if theirs is None:
            local = self.cut_to_student(local, context)
        if context.by_ids or not context.method.needs.spans("teacher"):
            return local
        return as_span_teacher(local, theirs, context.tokenizer, context.stops, context.questions)

    def _there(self, context: TeacherContext) -> Any:
        """The model as another process holds it, asked for once; None: it is loaded here."""
        hosts = context.hosts
        if hosts is None or context.given is not None:
            return None
        return context.once(f"there {self!r} {context.role}", lambda: hosts(self, context))

    def cut_to_student(self, local: Any, context: TeacherContext) -> Any:
        """The model, its head kept to the ids that the student's tokenizer has too."""
        own = self._tokenizer(context)
        return local if own is None else local.cut(shared_ids(context.tokenizer, own))

    def load(self, context: TeacherContext) -> LocalModel:
        """The frozen model, loaded once however many names it has."""
        given = context.given
        key = repr(self) if given is None else f"given {id(given)}"
        return context.once(key, lambda: self._load(context))

    def _load(self, context: TeacherContext) -> LocalModel:
        given, dtype = context.given, self.dtype or context.dtype
        devices = self._spread_over(context)
        if given is not None:
            own = copy.deepcopy(given) if given is context.given_student else given
            model = take_loaded(own, context.device, self.quantize)
        else:
            model = load_advised(
                self.model,
                dtype,
                # what is spread over devices is whole on none of them
                context.device if devices is None else "cpu",
                TEACHER_ADVICE,
                trust_remote_code=context.trust_remote_code,
                attn_implementation=context.attn_implementation,
                quantize=self.quantize,
                head=context.head_dtype is not None,
            )
        model = model.eval().requires_grad_(False)
        products = dtype_of(dtype if given is None else None)
        compute_in(model, products, dtype_of(context.head_dtype))
        shard_frozen(model, devices)
        check_head(model)
        act_in(model, context.method.actions)
        local = LocalModel(model, head_of(model), context.micro_batch_tokens)
        if not self.offload:
            return local
        if context.device == "cpu":
            print(
                f"opdkit: offload of {self.model} changes nothing here: the run's device "
                "is the CPU",
                file=sys.stderr,
            )
        return replace(local, around=Offloaded(model, local.head, context.device))

    def _spread_over(self, context: TeacherContext) -> Any:
        """The devices over which it is spread: none, where it is an object that somebody holds, or
        its weights are no plain ones, or wait on the CPU.
        """
        if context.devices is None or context.given is not None or self.quantize or self.offload:
            return None
        config = load_config(self.model, context.trust_remote_code)
        stored = getattr(config, "quantization_config", None) is not None
        return None if stored else context.devices

    @property
    def writes(self) -> bool:
        return True

    def voice(self, context: TeacherContext) -> VoiceHere:
        return VoiceHere(self.load(context), self._tokenizer(context) or context.tokenizer)

    def ends(self, context: TeacherContext) -> frozenset[int]:
        model = self.model if context.given is None else context.given
        return ends_of(model, self._tokenizer(context), context)

    def _tokenizer(self, context: TeacherContext) -> Any:
        """Its own tokenizer; None: the student's."""
        if context.given is not None:
            return context.given_tokenizer
        return context.once(
            f"tokenizer of {self.model}",
            lambda: load_tokenizer(self.model, context.trust_remote_code),
        )

    def _other_tokenizer(self, context: TeacherContext) -> Any:
        """Its tokenizer where that is not the student's, else None; refused where token ids are
        compared.
        """
        theirs = self._tokenizer(context)
        if theirs is None:
            return None
        needs = context.method.needs
        by_ids = context.by_ids or needs.ids("teacher") or not needs.spans("teacher")
        if by_ids:
            context.once(f"notes on {self.model}", lambda: self._compare(theirs, context))
            return None
        if same_tokenizer(context.tokenizer, theirs) is None:
            return None
        refuse_chat(context.questions["chat"], theirs)
        return theirs

    def _compare(self, theirs: Any, context: TeacherContext) -> None:
        """Refuses a tokenizer with other ids, and says where questions are written otherwise."""
        refuse_other_tokenizer(self.model, context.tokenizer, theirs)
        note_questions(self.model, theirs, context)

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        return [
            Held(
                role,
                self.model,
                HERE,
                shape_of(self.model),
                self.dtype or dtype,
                quantize=self.quantize,
                offload=self.offload,
            )
        ]

    def identity(self) -> Identity:
        return identify(self.model)

    def precision(self, usual: str) -> str:
        return " ".join(filter(None, [self.dtype or usual, self.quantize]))

    def lighter(self, dtype: str, decodes: bool) -> Iterator[tuple[str, Teacher]]:
        if (self.dtype or dtype) == "float32":
            yield "teacher_dtype=bfloat16", replace(self, dtype="bfloat16")
        if self.quantize is None:
            yield "teacher.quantize=4bit", replace(self, quantize="4bit")
        if not self.offload and not decodes:
            yield "teacher.offload=true", replace(self, offload=True)

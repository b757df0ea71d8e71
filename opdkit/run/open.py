"""Opens the models and engines of a run, each checkpoint once: the student, its teachers of
whatever kind, and who samples.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from opdkit.base.errors import UserError
from opdkit.methods.method import Method
from opdkit.models.adapters import has_adapters, own_adapters
from opdkit.models.body import act_in, check_head, head_of
from opdkit.models.load import (
    DTYPES,
    dtype_of,
    load_advised,
    load_config,
    take_loaded,
)
from opdkit.models.offload import STUDENT_ADVICE, TEACHER_ADVICE
from opdkit.models.precision import compute_in
from opdkit.models.quantize import quantized
from opdkit.models.sharding import shard_frozen
from opdkit.models.tokenizers import end_with, stop_ids, usable
from opdkit.objective.companion import Companions
from opdkit.rewards import Reward
from opdkit.run.settings import Run
from opdkit.sampling import Guide
from opdkit.sampling.settings import SamplerContext
from opdkit.teachers import LocalModel, Remote, Scorer
from opdkit.teachers.context import TeacherContext
from opdkit.train.record import Other
from opdkit.train.student import Student, with_adapters
from opdkit.types import DataRow, Sampler, Watch


@dataclass(frozen=True)
class Given:
    """What a caller hands over as objects instead of names: loaded models, a tokenizer, rows, a
    method, a reward.
    """

    student: Any = None
    teacher: Any = None
    tokenizer: Any = None
    rows: Sequence[DataRow] | None = None
    eval_rows: Sequence[DataRow] | None = None
    method: Method | None = None
    reward: Reward | None = None
    # is told of each step, instead of a line on the screen
    show: Callable[[int, Mapping[str, float]], None] | None = None
    teacher_tokenizer: Any = None  # of a loaded teacher; None: the student's
    # what writes, instead of the sampler that the run names
    sampler: Callable[[SamplerContext], Sampler] | None = None
    # models that others hold: see `TeacherContext.hosts`
    hosts: Callable[[Any, TeacherContext], Scorer | Remote | None] | None = None
    others: Sequence[Other] = ()  # parts of the run elsewhere, for its metrics


class Models:
    """Loads each checkpoint once. `devices`: those of several processes, over which teachers are
    spread.
    """

    def __init__(
        self,
        run: Run,
        method: Method,
        device: str,
        given: Given,
        tokenizer: Any,
        devices: Any = None,
    ):
        self.run, self.method, self.device = run, method, device
        self.given, self.tokenizer = given, tokenizer
        # where the student is until it is spread; one in few bits is not
        self.at_first = "cpu" if devices and not self._in_few_bits() else device
        self.context = TeacherContext(
            method,
            tokenizer,
            device,
            run.teacher_dtype or run.dtype,
            run.head_dtype,
            run.trust_remote_code,
            run.micro_batch_tokens,
            self.questions,
            attn_implementation=run.attn_implementation,
            vocabulary=self._written(),
            given=given.teacher,
            given_tokenizer=given.teacher_tokenizer,
            given_student=given.student,
            # one that takes part in decoding is asked for each token, by one process alone
            devices=devices if run.shard_teachers and not method.teacher_mix else None,
            hosts=given.hosts,
        )

    def _in_few_bits(self) -> bool:
        """Whether the student's weights are quantised, or will be."""
        if self.run.lora is not None and self.run.lora.quantize:
            return True
        return getattr(self._config, "quantization_config", None) is not None

    @cached_property
    def _config(self) -> Any:
        """The student's."""
        given = self.given.student
        if given is not None:
            return given.config
        return load_config(self.run.student, self.run.trust_remote_code)

    def _written(self) -> int | None:
        """Ids that the student can write, by its configuration alone."""
        rows = getattr(self._config.get_text_config(), "vocab_size", None)
        return usable(self.tokenizer, rows) if isinstance(rows, int) else None

    @property
    def questions(self) -> dict[str, Any]:
        """How the run writes its questions: in a chat, where the student is asked in one."""
        data = self.run.prompts
        chat = (
            bool(getattr(self.tokenizer, "chat_template", None)) if data.chat is None else data.chat
        )
        return {
            "template": data.template,
            "system": data.system,
            "chat": chat,
            "enable_thinking": data.enable_thinking,
        }

    def load(
        self,
        name: str,
        dtype: str,
        device: str,
        quantize: str | None = None,
        advice: str = STUDENT_ADVICE,
    ) -> Any:
        """A model by name; on the CPU one that is going to be spread."""
        return load_advised(
            name,
            dtype,
            device,
            advice,
            trust_remote_code=self.run.trust_remote_code,
            attn_implementation=self.run.attn_implementation,
            quantize=quantize,
            head=self.run.head_dtype is not None,
        )

    def student(self, start: str, resumed: bool) -> Any:
        """The model that learns, with adapters where the run has them."""
        run = self.run
        model = self._adapted(start, resumed) if run.lora else self._whole(start, resumed)
        if run.lora is None and quantized(model):
            raise UserError(
                f"the student is stored as {quantized(model)}: such weights cannot move by a "
                "learning rate's worth. Train adapters on them (lora.r=32), or name the "
                "unquantised checkpoint"
            )
        if quantized(model) and not run.sampler_settings.on_student:
            raise UserError(
                f"the student is stored as {quantized(model)}, which another engine cannot take "
                "over: it would sample from other weights than those that train. Use sampler: hf, "
                "or leave out quantize"
            )
        if run.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            if has_adapters(model):
                model.enable_input_require_grads()
        if run.lora and run.dtype == "bfloat16":  # a tied embedding may be stored in more
            compute_in(model, DTYPES[run.dtype], dtype_of(run.head_dtype))
        check_head(model)
        act_in(model, self.method.actions)
        self.end_as_teacher(model)
        return model

    def end_as_teacher(self, student: Any) -> None:
        """The student's answers end with whatever the teacher ends its own with, too."""
        if "teacher" not in self.method.opened:
            return
        ends = self.run.teachers.ends(self._named("teacher", self.context))
        if new := end_with(student, self.tokenizer, ends):
            names = ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(new)))
            print(
                f"opdkit: an answer of the student also ends with {names}, with which the teacher "
                "ends its own",
                file=sys.stderr,
            )

    def _whole(self, start: str, resumed: bool) -> Any:
        """A student all of whose weights learn: float32 ones, whatever its products are in; or one
        that is handed over with adapters, which learn.
        """
        given, dtype = self.given.student, self.run.dtype
        dtype = "float32" if dtype == "bfloat16" else dtype
        if given is not None and has_adapters(given):
            mine = own_adapters(given, start if resumed else None)
            return take_loaded(mine, self.at_first, dtype=dtype)
        if given is not None and not resumed:
            return take_loaded(given, self.at_first, dtype=dtype)
        return self.load(start, dtype, self.at_first)

    def _adapted(self, start: str, resumed: bool) -> Any:
        """A student with adapters: new ones, or those of a checkpoint."""
        run, lora = self.run, self.run.lora
        assert lora is not None
        if self.given.student is not None:
            model = take_loaded(self.given.student, self.at_first, lora.quantize, run.dtype)
        else:
            model = self.load(run.student, run.dtype, self.at_first, lora.quantize)
        if has_adapters(model):
            raise UserError(
                f"the student {run.student} has adapters already, and `lora` would put others on "
                "top: leave lora out to train those it has (a loaded model), name the adapters "
                "without quantize (they are added to the weights below first), or merge them"
            )
        if not resumed:
            return with_adapters(model, lora)
        from peft import PeftModel

        return PeftModel.from_pretrained(model, start, is_trainable=True)

    def sampler(self, student: Student, watch: Watch, guide: Guide | None, longest: int) -> Sampler:
        """What lets the student write its responses; a rollout has at most `longest` tokens."""
        open_ = self.given.sampler or self.run.sampler_settings.open
        return open_(
            SamplerContext(
                student.model,
                self.tokenizer,
                lambda: student.head,
                self.run.dtype,
                longest,
                guide,
                watch,
                self.run.trust_remote_code,
            )
        )

    def check_models(self) -> None:
        """Asks servers, opens caches and compares tokenizers, before any weights are loaded: what
        cannot work is refused here.
        """
        for name in sorted(self.method.opened):
            self.run.model_named(name).check(self._named(name, self.context))

    def _named(self, name: str, context: TeacherContext) -> TeacherContext:
        """How the model that the objective calls `name` is opened."""
        if name != "teacher":
            return context.named(name)
        return context if self.run.teachers.routes else context.on_route("default")

    def others(self, student: Any, copies: Companions) -> dict[str, Scorer | Remote]:
        """Every other model the objective reads; `copies` of the student stand beside it."""
        context = replace(
            self.context,
            stops=frozenset(stop_ids(student, self.tokenizer)),
            student=student,
            start=lambda: self.start_of(student),
            beside=copies,
        )
        return {
            name: self.run.model_named(name).open(self._named(name, context))
            for name in self.run.opened_by(self.method)
        }

    def start_of(self, student: Any) -> LocalModel:
        """The student's initial weights: adapters switched off, or a frozen copy."""
        run, devices = self.run, self.context.devices
        if run.lora is not None:
            return LocalModel(
                student, head_of(student), run.micro_batch_tokens, student.disable_adapter
            )
        if self.given.student is not None:
            model, products = copy.deepcopy(self.given.student), None
        else:
            dtype = run.teacher_dtype or run.dtype
            device = self.device if devices is None else "cpu"
            model = self.load(run.student, dtype, device, advice=TEACHER_ADVICE)
            products = DTYPES[dtype]
        compute_in(model, products, dtype_of(run.head_dtype))
        model = model.eval().requires_grad_(False)
        act_in(model, self.method.actions)
        shard_frozen(model, devices)
        return LocalModel(model, head_of(model), run.micro_batch_tokens)

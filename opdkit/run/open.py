"""Opens the models and engines of a run, each checkpoint once: the student, its teachers of
whatever kind, and who samples.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.base.errors import UserError
from opdkit.methods.method import Method
from opdkit.models.body import check_head, head_of
from opdkit.models.load import load_model, load_tokenizer
from opdkit.models.offload import STUDENT_ADVICE, TEACHER_ADVICE, Offloaded, enough_memory
from opdkit.models.quantize import quantized, require, settle
from opdkit.models.tokenizers import real_vocabulary, same_tokenizer, stop_ids
from opdkit.objective.head import Head
from opdkit.objective.needs import Needs
from opdkit.rewards import Reward
from opdkit.run.settings import Run
from opdkit.sampling import Guide, HFSampler
from opdkit.sampling.server import ServerSampler, ServerSettings
from opdkit.sampling.spec import HfSettings
from opdkit.sampling.vllm import VllmSampler, VllmSettings
from opdkit.teachers import LocalModel, Mixed, Remote, Routed, RoutedRemote, Scorer
from opdkit.teachers.base import cut
from opdkit.teachers.kinds import Cached, Local, Mixture, Routes, Server, Spec, Vllm, specs
from opdkit.teachers.views.translated import Familiar, refuse_chat, translated
from opdkit.train.collect.collector import Sampler
from opdkit.train.student import Student, with_adapters
from opdkit.types import DataRow, Watch

INTERNAL = frozenset({"student", "sampler", "live"})  # models that are the run itself


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


class Models:
    """Loads each checkpoint once."""

    def __init__(self, run: Run, device: str, given: Given, tokenizer: Any):
        self.run, self.device, self.given, self.tokenizer = run, device, given, tokenizer
        self.loaded: dict[str, LocalModel] = {}
        self.reached: dict[str, Scorer | Remote] = {}  # by the specification as text
        # likewise: a teacher's tokenizer, None where it is the student's
        self.tongues: dict[str, Any] = {}

    def load(
        self, name: str, dtype: str, quantize: str | None = None, advice: str = TEACHER_ADVICE
    ) -> Any:
        with enough_memory(f"{name} was loaded", advice):
            return load_model(
                name,
                dtype=dtype,
                device=self.device,
                trust_remote_code=self.run.trust_remote_code,
                quantize=quantize,
            )

    def taken(self, given: Any, quantize: str | None) -> Any:
        """A loaded model that a caller hands over."""
        if quantize not in (None, quantized(given)):
            raise UserError(
                f"quantize={quantize} is done while a model is read, and this one is loaded "
                "already: give its name instead of the object, or load it quantised"
            )
        settle(given)
        return given.to(self.device)

    def student(self, start: str, resumed: bool) -> Any:
        """The model that learns, with adapters where the run has them."""
        run = self.run
        weights = "float32" if run.dtype == "bfloat16" and run.lora is None else run.dtype
        if run.lora is not None:
            if self.given.student is not None:
                model = self.taken(self.given.student, run.lora.quantize)
            else:
                model = self.load(run.student, weights, run.lora.quantize, STUDENT_ADVICE)
            if resumed:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, start, is_trainable=True)
            else:
                model = with_adapters(model, run.lora)
        elif self.given.student is not None and not resumed:
            model = self.taken(self.given.student, None)
        else:
            model = self.load(start, weights, None, STUDENT_ADVICE)
        if run.lora is None and quantized(model):
            raise UserError(
                f"the student is stored as {quantized(model)}: such weights cannot move by a "
                "learning rate's worth. Train adapters on them (lora.r=32), or name the "
                "unquantised checkpoint"
            )
        if quantized(model) and not isinstance(run.sampler_spec, HfSettings):
            raise UserError(
                f"the student is stored as {quantized(model)}, which another engine cannot take "
                "over: it would sample from other weights than those that train. Use sampler: hf, "
                "or leave out quantize"
            )
        if run.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            if run.lora is not None:
                model.enable_input_require_grads()
        check_head(model)
        return model

    def sampler(self, student: Student, watch: Watch, guide: Guide | None, longest: int) -> Sampler:
        """Who writes the student's responses; a rollout has at most `longest` tokens."""
        spec, trust = self.run.sampler_spec, self.run.trust_remote_code
        if not isinstance(spec, HfSettings) and self.run.dtype == "bfloat16":
            # of the products, whatever the weights that learn are kept in
            spec = replace(spec, dtype=spec.dtype or "bfloat16")
        if isinstance(spec, VllmSettings):
            spec = replace(
                spec, max_model_len=spec.max_model_len or longest + 1
            )  # vLLM reserves for all the model's positions otherwise
            return VllmSampler(
                student.model, self.tokenizer, spec, head=student.head, trust_remote_code=trust
            )
        if isinstance(spec, ServerSettings):
            return ServerSampler(student.model, self.tokenizer, spec, head=student.head)
        most = spec.max_batch_tokens
        return HFSampler(
            student.model,
            self.tokenizer,
            head=student.head,
            max_batch_tokens=most,
            guide=guide,
            watch=watch,
        )

    def reach(self, method: Method) -> None:
        """Asks servers and opens caches, before any weights are loaded: what they cannot say is
        refused here.
        """
        for name, spec in (
            specs(self.run.teachers).items() if "teacher" in method.needs.models else ()
        ):
            for member in spec.teachers.values() if isinstance(spec, Mixture) else [spec]:
                if isinstance(member, Local):
                    _refuse_storage(member, method)
                    self.tongue(member, method.needs, self.handed(name), isinstance(spec, Mixture))
            if isinstance(spec, Server):
                from opdkit.teachers import server

                self.reached[repr(spec)] = server.open_teacher(spec, method, self.tokenizer)
            if isinstance(spec, Cached):
                from opdkit.teachers import cached

                self.reached[repr(spec)] = cached.open_teacher(spec, method, self.tokenizer)

    def others(self, method: Method, student: Any) -> dict[str, Scorer | Remote]:
        """Every other model the objective reads."""
        run, out = self.run, {}
        wanted = method.needs.models - INTERNAL
        if run.evaluate is not None and run.evaluate.teacher:
            wanted |= {"teacher"}
        for name in sorted(wanted):
            if name == "teacher":
                out[name] = self.teacher(method, stop_ids(student, self.tokenizer))
            elif name == "reference" and run.reference is None:
                out[name] = self.start_of(student)
            else:
                spec = Local(str(run.reference if name == "reference" else run.models[name]))
                _same_tokenizer(
                    spec.model,
                    self.tokenizer,
                    load_tokenizer(spec.model, self.run.trust_remote_code),
                )
                out[name] = self.frozen(spec)
        return out

    def teacher(self, method: Method, stops: Collection[int]) -> Scorer | Remote:
        """The run's teacher, or all of them by route."""
        members = {
            name: self.heard(
                self.opened(spec, method, self.handed(name)), spec, method.needs, stops
            )
            for name, spec in specs(self.run.teachers).items()
        }
        if not isinstance(self.run.teachers, Routes):
            return members["default"]
        return (
            RoutedRemote(members)
            if any(isinstance(m, Remote) for m in members.values())
            else Routed(members)
        )

    def handed(self, route: str) -> Any:
        """The loaded teacher of a route, if a caller gave one."""
        given = self.given.teacher
        return given.get(route) if isinstance(given, Mapping) else given

    def opened(self, spec: Spec, method: Method, given: Any = None) -> Any:
        """A teacher of any kind."""
        if isinstance(spec, Vllm) and repr(spec) not in self.reached:
            from opdkit.teachers import vllm

            self.reached[repr(spec)] = vllm.open_teacher(spec, method, self.tokenizer)
        if repr(spec) in self.reached:
            return self.reached[repr(spec)]
        if isinstance(spec, Mixture):
            for member in spec.teachers.values():
                self.tongue(member, method.needs, None, True)
            members = {name: self.frozen(member) for name, member in spec.teachers.items()}
            return Mixed(members, spec.weights)
        assert isinstance(spec, Local)
        self.tongue(spec, method.needs, given)
        return self.frozen(spec, given)

    def tongue(self, spec: Local, needs: Needs, given: Any = None, mixed: bool = False) -> None:
        """Notes a teacher's tokenizer where it is not the student's; refused where token ids are
        compared.
        """
        if repr(spec) in self.tongues:
            return
        loaded = given is not None and not isinstance(given, str)
        theirs = (
            self.given.teacher_tokenizer
            if loaded
            else load_tokenizer(spec.model, self.run.trust_remote_code)
        )
        differs = theirs is not None and same_tokenizer(self.tokenizer, theirs) is not None
        if differs and (mixed or needs.ids("teacher") or not needs.spans("teacher")):
            _same_tokenizer(spec.model, self.tokenizer, theirs)
        if differs:
            refuse_chat(self.asked["chat"], theirs)
        self.tongues[repr(spec)] = theirs if differs else None

    @property
    def asked(self) -> dict[str, Any]:
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

    def heard(self, scorer: Any, spec: Spec, needs: Needs, stops: Collection[int]) -> Any:
        """A teacher as methods take it that compare spans of text, whatever its tokenizer."""
        if not needs.spans("teacher"):
            return scorer
        theirs = self.tongues.get(repr(spec))
        if theirs is None:
            return Familiar(scorer, frozenset(stops))
        own = cut(scorer, shared_vocabulary([scorer.head], real_vocabulary(theirs)))
        return translated(own, self.tokenizer, theirs, stops, self.asked)

    def frozen(self, spec: Local, given: Any = None) -> LocalModel:
        """A frozen model, loaded once however many names it has."""
        # of several teachers some may be given, others named
        loaded = given is not None and not isinstance(given, str)
        key = f"given {id(given)}" if loaded else repr(spec)
        if key not in self.loaded:
            if loaded:
                model = self.taken(
                    copy.deepcopy(given) if given is self.given.student else given, spec.quantize
                )
            else:
                model = self.load(
                    spec.model,
                    spec.dtype or self.run.teacher_dtype or self.run.dtype,
                    spec.quantize,
                )
            model = model.eval().requires_grad_(False)
            check_head(model)
            local = LocalModel(model, head_of(model))
            if spec.offload:
                if self.device == "cpu":
                    print(
                        f"opdkit: offload of {spec.model} changes nothing here: the run's device "
                        "is the CPU",
                        file=sys.stderr,
                    )
                local = replace(local, around=Offloaded(model, local.head, self.device))
            self.loaded[key] = local
        return self.loaded[key]

    def start_of(self, student: Any) -> LocalModel:
        """The student's initial weights: adapters switched off, or a frozen copy."""
        if self.run.lora is not None:
            return LocalModel(student, head_of(student), around=student.disable_adapter)
        if self.given.student is not None:
            model = copy.deepcopy(self.given.student)
        else:
            model = self.load(self.run.student, self.run.teacher_dtype or self.run.dtype)
        return LocalModel(model.eval().requires_grad_(False), head_of(model))


def _refuse_storage(spec: Local, method: Method) -> None:
    """What a teacher's `quantize` and `offload` cannot be used with, before anything is loaded."""
    if spec.quantize is not None:
        require(spec.quantize)
    if spec.offload and method.teacher_mix:
        raise UserError(
            f"method {method.name or 'own'!r} draws tokens from a mixture with the teacher, which "
            "is therefore needed on the GPU all the while: set offload: false, and quantize: 4bit "
            "if it does not fit"
        )


def _same_tokenizer(name: str, tokenizer: Any, theirs: Any) -> None:
    if difference := same_tokenizer(tokenizer, theirs):
        raise UserError(
            f"the tokenizer of {name} is not the student's: {difference}. Token-level distillation "
            "compares distributions over the same ids: use a teacher of the student's family, or "
            "method gold or uld, which take one teacher with any tokenizer"
        )


def shared_vocabulary(heads: Sequence[Head], tokens: int) -> int | None:
    """Rows that every head keeps: those of the tokenizer's `tokens`; None where no head has more.

    The rest only pad the matrix.
    """
    sizes = [len(h.weight) for h in heads if h.weight is not None]
    if min(sizes) < tokens:
        raise UserError(
            f"a model's head has {min(sizes)} rows, fewer than the tokenizer's {tokens} tokens: it "
            "cannot score every token the student may write. Use models of one family"
        )
    return tokens if max(sizes) > tokens else None

"""Which teacher a run has: a kind with its settings, from text or YAML, and what each kind cannot
say of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opdkit.base.config import build
from opdkit.base.errors import UserError, nearest
from opdkit.models.engines.vllm_engine import EngineSettings
from opdkit.models.quantize import check_quantize
from opdkit.objective.facts import Fact
from opdkit.objective.needs import Needs


@dataclass(frozen=True)
class Local:
    """A checkpoint loaded into this process: its whole vocabulary can be read."""

    model: str  # a folder or a hub name
    dtype: str | None = None  # null: the run's teacher_dtype
    quantize: str | None = None  # 8bit or 4bit: how the weights of its linear layers are stored
    offload: bool = False  # it waits on the CPU and is on the GPU only while it scores

    def __post_init__(self) -> None:
        check_quantize(self.quantize)


@dataclass(frozen=True, kw_only=True)
class Vllm(EngineSettings):
    """A checkpoint in a vLLM engine in this process: log-probs of the tokens and of its own most
    probable ones.
    """

    model: str


@dataclass(frozen=True)
class Server:
    """OpenAI-compatible endpoints of one model (vLLM, SGLang, `opdkit serve-teacher`): asked at the
    start what they can say.
    """

    urls: tuple[str, ...]
    model: str | None = None  # the name it is served under; null: the only one there
    concurrency: int = 16  # requests under way at once, over all urls
    timeout: float = 120.0  # seconds for one request
    retries: int = 5  # of what can succeed: refused connections, time-outs, 429, 5xx
    # environment variable that holds the key; keys are never written to a run
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError(
                "a server teacher needs at least one url, such as http://127.0.0.1:8000"
            )
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise ValueError("concurrency must be at least 1, timeout positive, retries at least 0")


@dataclass(frozen=True)
class Cached:
    """A folder that `opdkit cache-teacher` wrote: log-probs of its own rollouts, scored once."""

    folder: str


@dataclass(frozen=True)
class Mixture:
    """The weighted mean of several teachers' distributions, sum_i w_i pi_i(v): all of them in this
    process.
    """

    of: dict[str, Any]  # name -> teacher
    # by name; or the data column that holds such a mapping per prompt; null: equal
    weights: dict[str, float] | str | None = None

    def __post_init__(self) -> None:
        if len(self.of) < 2:
            raise ValueError("a mixture needs at least two teachers: of={a: MODEL, b: MODEL}")
        if isinstance(self.weights, dict):
            if set(self.weights) != set(self.of):
                raise ValueError(
                    f"weights name {', '.join(self.weights)}, the teachers are {', '.join(self.of)}"
                )
            if any(w < 0 for w in self.weights.values()) or not sum(self.weights.values()) > 0:
                raise ValueError("weights must not be negative, and at least one must be positive")

    @property
    def teachers(self) -> dict[str, Local]:
        """The members."""
        out = {}
        for name, value in self.of.items():
            spec = spec_of(value, f"teacher.of.{name}")
            if not isinstance(spec, Local):
                raise UserError(
                    f"teacher.of.{name} is a {kind_of(spec)} teacher: a mixture adds up whole "
                    "distributions, so its teachers run in this process"
                )
            out[name] = spec
        return out


Spec = Local | Vllm | Server | Cached | Mixture
KINDS: dict[str, type[Any]] = {
    "local": Local,
    "vllm": Vllm,
    "server": Server,
    "cached": Cached,
    "mixture": Mixture,
}
# what follows the colon of "kind:..."
MAIN = {Local: "model", Vllm: "model", Server: "urls", Cached: "folder"}
REMEDY = "use a teacher in this process (teacher=MODEL), or one behind `opdkit serve-teacher`"


@dataclass(frozen=True)
class Routes:
    """Several teachers; a row is scored by the one that its `teacher` column names."""

    teachers: dict[str, Spec] = field(default_factory=dict)


def teacher_of(value: Any, where: str = "teacher") -> Spec | Routes:
    """A teacher from what a run says: text, a group with `kind`, or several of these by route."""
    if isinstance(value, Mapping) and "kind" not in value:
        if not value:
            raise UserError(f"{where} names no teacher: give a model, or {{route: model}}")
        return Routes(
            {str(name): spec_of(inner, f"{where}.{name}") for name, inner in value.items()}
        )
    return spec_of(value, where)


def spec_of(value: Any, where: str = "teacher") -> Spec:
    """One teacher: a model's folder or name; kind:...; a URL; or {kind: ..., settings}."""
    if isinstance(value, (Local, Vllm, Server, Cached, Mixture)):
        return value
    if isinstance(value, Mapping):
        kind = value.get("kind", "local")
        if kind not in KINDS:
            raise UserError(
                f"{where}.kind={kind!r} is no kind of teacher{nearest(str(kind), list(KINDS))}: "
                f"{', '.join(KINDS)}"
            )
        return build(KINDS[kind], {k: v for k, v in value.items() if k != "kind"}, where + ".")
    if not isinstance(value, str):
        raise UserError(
            f"{where} must be a model, kind:..., a URL or a group with `kind`, not {value!r}"
        )
    if value.startswith(("http://", "https://")):
        value = "server:" + value
    kind, _, rest = value.partition(":")
    if rest and kind in KINDS and KINDS[kind] in MAIN:
        cls = KINDS[kind]
        return build(cls, {MAIN[cls]: rest.split(",") if cls is Server else rest}, where + ".")
    return Local(value)


def specs(teacher: Spec | Routes) -> dict[str, Spec]:
    """Every teacher by route; one alone under "default"."""
    return teacher.teachers if isinstance(teacher, Routes) else {"default": teacher}


def kind_of(spec: Spec) -> str:
    return next(kind for kind, cls in KINDS.items() if isinstance(spec, cls))


def says(spec: Spec, fact: Fact, model: str) -> bool:
    """Whether a kind of teacher can say a fact of itself.

    A server is asked at the start (`Server` says yes here to all).
    """
    return isinstance(spec, (Local, Mixture, Server)) or fact.in_scores(model)


def refuse_facts(name: str, who: str, cannot: Iterable[Fact], remedy: str = REMEDY) -> None:
    """The error for facts that a teacher cannot supply."""
    if unsaid := sorted(fact.words() for fact in cannot):
        raise UserError(
            f"method {name!r} reads {', '.join(unsaid)}, which {who} cannot say: it returns "
            "log-probs of the sampled tokens and of the teacher's own most probable ones. "
            f"{remedy[0].upper() + remedy[1:]}, or a form of the method that reads less, such as a "
            "support on the teacher's top k"
        )


def refuse(name: str, teacher: Spec | Routes, needs: Needs, model: str = "teacher") -> None:
    """What a kind of teacher cannot supply is refused before anything is loaded."""
    for spec in specs(teacher).values():
        if needs.spans(model) and not isinstance(spec, (Local, Mixture)):
            raise UserError(
                f"method {name!r} lays the student's text beside the teacher's own tokens and "
                f"compares whole distributions there, which a {kind_of(spec)} teacher cannot say. "
                "Use a teacher in this process (teacher=MODEL)"
            )
        refuse_facts(
            name,
            f"a {kind_of(spec)} teacher",
            [f for f in needs.of(model) if not says(spec, f, model)],
        )

"""What a method or a run will do, before anything is loaded: formula, needs, forward passes, memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit import compose
from opdkit.curricula import Plain
from opdkit.errors import UserError
from opdkit.facts import Needs
from opdkit.head import CHUNK_BYTES, CHUNK_ENTRIES
from opdkit.method import Method, as_method, load, methods
from opdkit.models import parameter_count
from opdkit.objective import RolloutLoss
from opdkit.run import Run
from opdkit.types import EntropyFact, LogpAtFact, LogpFact, TopFact

GIB = 2**30


def source_of(method: Method) -> str:
    """The paper a method is from."""
    found = re.search(r"arXiv[: ]?(\d{4}\.\d{5})", method.doc)
    return f"arXiv:{found[1]}" if found else ""


def idea(method: Method) -> str:
    """A method's summary without the name it begins with."""
    name, _, rest = method.summary.partition(": ")
    return rest if rest and len(name.split()) <= 3 else method.summary


def passes(needs: Needs) -> list[str]:
    """The forward passes of one step, besides sampling."""
    lines = []
    student = {f for f in needs.of("student") if f != LogpFact("student")}
    if student:
        lines.append("student, without gradient, before the step (it reads more than the sampled tokens' log-probs)")
    for name in sorted(needs.models - {"student", "sampler", "live"}):
        whole = " (its whole vocabulary: in this process)" if needs.whole(name) else ""
        lines.append(f"{name}, without gradient{whole}")
    lines.append("student, with gradient, at the positions that a term selects")
    return lines


def explain(method: str | Method | Any, **arguments: Any) -> str:
    """A method's formula, needs and cost, in words."""
    made = as_method(method, **arguments)
    lines = [made.name or "objective", "=" * len(made.name or "objective"), ""]
    if made.doc:
        lines += [made.doc, ""]
    lines += ["prints as", f"  {made}", ""]
    if made.arguments:
        lines += ["arguments", *(f"  {k} = {v!r}" for k, v in made.arguments), ""]
    needs = made.needs
    lines += ["reads", *(f"  {x}" for x in str(needs).split(", ")), ""]
    lines += ["forward passes of a step, besides sampling", *(f"  {i}. {x}" for i, x in enumerate(passes(needs), 1))]
    base = compose.base_of(made.name)
    if base is not None:
        added = [x for x in passes(needs) if x not in passes(load(base).needs)]
        lines.append(f"  new beside those of {base} alone: {'; '.join(added) or 'none'}")
    if any(isinstance(t.loss, RolloutLoss) for t in made.objective.terms):
        lines.append("  the head is projected twice: a loss over whole rollouts needs all their log-probs first")
    lines.append(
        f"memory of the loss: one chunk of the vocabulary, about {CHUNK_ENTRIES * CHUNK_BYTES / GIB:.1f} GiB at most; no [N, V] tensor"
    )
    if made.curriculum != Plain():
        lines.append(f"curriculum: {made.curriculum}")
    return "\n".join(lines)


def of_teacher(needs: Needs) -> list[str]:
    """What of the teacher is read, in a few words; what that includes is left out."""
    facts = needs.of("teacher")
    if needs.whole("teacher"):
        return ["whole teacher"]
    words = ["teacher entropy"] if EntropyFact("teacher") in facts else []
    words += [f"teacher top {f.k}" for f in facts if isinstance(f, TopFact)]
    words += [
        f"teacher at the student's top {f.k}" for f in facts if isinstance(f, LogpAtFact) and f.owner != f.model == "teacher"
    ]
    return sorted(words) or ["teacher log-probs"] * bool(facts)


def table() -> list[dict[str, str]]:
    """Every built-in method with its source, what it needs and its cost."""
    rows = []
    for name in methods():
        method = load(name)
        needs = method.needs
        extra = sorted(needs.models - {"student", "sampler", "live", "teacher"})
        columns = sorted(c for c in needs.columns if c in ("reward", "correct"))
        before = bool({f for f in needs.of("student") if f != LogpFact("student")})
        rows.append(
            {
                "method": name,
                "idea": idea(method),
                "source": source_of(method),
                "needs": ", ".join([*of_teacher(needs), *extra, *columns]),
                "passes": str(1 + len(needs.models - {"student", "sampler", "live"}) + before),
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------------------------ dry run


@dataclass(frozen=True)
class Load:
    """A model that a run will hold, and the memory it takes."""

    role: str
    name: str
    parameters: int
    gib: float
    of: str


def loads(run: Run) -> list[Load]:
    """Every model a run will load, each checkpoint once."""
    method = run.method_spec.load()
    wide = {"float32": 4, "bfloat16": 2, "float64": 8}
    own = wide[run.dtype] if run.dtype != "bfloat16" or run.lora else 4
    student = parameter_count(run.student, run.trust_remote_code)
    if run.lora is None:
        out = [Load("student", run.student, student, student * own * 4 / GIB, "weights, gradients and two AdamW moments")]
    else:
        out = [
            Load(
                "student",
                run.student,
                student,
                student * own / GIB,
                f"frozen weights; adapters of rank {run.lora.r} are small beside them",
            )
        ]
    small = wide[run.teacher_dtype or run.dtype]
    teachers = {"teacher": run.teacher} if isinstance(run.teacher, str) else {f"teacher {k}": v for k, v in run.teacher.items()}
    others: dict[str, str] = {**teachers, **run.models}
    if "reference" in method.needs.models and not (run.reference is None and run.lora is not None):
        others["reference"] = run.reference or run.student
    held: set[str] = set()
    for role, name in others.items():
        shared = name in held and role != "reference"
        held.add(name)
        count = parameter_count(name, run.trust_remote_code)
        out.append(
            Load(role, name, count, 0.0 if shared else count * small / GIB, "loaded once, see above" if shared else "weights")
        )
    return out


def dry_run(run: Run) -> str:
    """The resolved run, what will be loaded, and the memory it should take."""
    method = run.method_spec.load()
    models = loads(run)
    chunk = CHUNK_ENTRIES * CHUNK_BYTES / GIB
    total = sum(m.gib for m in models) + chunk
    lines = [run.yaml().rstrip(), "", f"objective: {method}", "", "models"]
    lines += [f"  {m.role:<12} {m.name}  {m.parameters / 1e6:,.1f}M parameters  {m.gib:.2f} GiB  ({m.of})" for m in models]
    lines += ["forward passes of a step, besides sampling", *(f"  {i}. {x}" for i, x in enumerate(passes(method.needs), 1))]
    rollouts = run.prompts_per_step * run.sampling.num_generations
    lines.append(f"rollouts per step: {rollouts}, at most {rollouts * run.sampling.max_completion_length:,} tokens")
    lines.append(
        f"memory: about {total:.2f} GiB for weights, optimiser and one vocabulary chunk ({chunk:.2f} GiB), plus activations of"
    )
    lines.append(
        f"        {run.micro_batch_tokens or '1024 (CPU) or 16384 (GPU)'} tokens per micro-batch and the sampler's key-value cache"
    )
    return "\n".join(lines)


def need_folder(path: str | Path) -> Path:
    """A run folder that is there."""
    folder = Path(path)
    if not (folder / "metrics.jsonl").exists() and not (folder / "run.yaml").exists():
        raise UserError(f"{folder} is not a run folder: it has neither run.yaml nor metrics.jsonl")
    return folder

"""A kind of fact of one's own is one file and nothing else: it is found, gathered, trained on and
checked like those of the package, which never asks of which class a fact is.
"""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import opdkit
from opdkit import UserError, distill, load
from opdkit.base.address import load_address
from opdkit.models.body import head_of
from opdkit.objective.alignment import SpanFact
from opdkit.objective.facts import Fact, LogpFact
from opdkit.objective.needs import Needs, watched
from opdkit.sampling.hf import HFSampler
from opdkit.teachers import LocalModel
from opdkit.teachers.kinds import teacher_of
from opdkit.testing import check, fabricate
from opdkit.train.gather import gather
from opdkit.types import Prompt, Sampling, Watch
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(opdkit.__file__).parent

OWN = '''
from dataclasses import dataclass

from opdkit.objective import Fact, Likelihood, Signal
from opdkit.types import Watch

{example}

@dataclass(frozen=True)
class MassFact(Fact):
    """[B, T]: the mass of a model's k most probable tokens; notes of these suffice."""

    model: str
    k: int
    whole_vocabulary = False

    def words(self):
        return f"{{self.model}} mass of its top {{self.k}}"

    def read(self, here, first):
        vocabulary = here.vocabulary(self.model)
        return vocabulary.at(vocabulary.logits.topk(self.k).indices).exp().sum(-1)

    def watch(self, model):
        return Watch(top=self.k)

    def of_notes(self, noted):
        return noted.top_logp[..., : self.k].exp().sum(-1)


@dataclass(frozen=True)
class Runner(Signal):
    """[B, T]: probability of a model's second most probable token."""

    model: str

    def value(self, batch):
        return batch.read(SecondFact(self.model)).exp()


@dataclass(frozen=True)
class Mass(Signal):
    model: str

    def value(self, batch):
        return batch.read(MassFact(self.model, 3))


def second():
    """Second: likelihood where the teacher has a second choice and the student is sure."""
    return Likelihood() * Runner("teacher") * Mass("student")
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> str:
    """The file of a user, with the example of `Fact`'s docstring as it stands there."""
    doc = inspect.getdoc(Fact) or ""
    lines = doc.partition("For\nexample")[2].splitlines()
    example = dedent("\n".join(x for x in lines if x.startswith("    ") or not x))
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(OWN.replace("{example}", example).replace("{{", "{").replace("}}", "}"))
    return str(path)


def naive(fact: Fact, logps: torch.Tensor) -> torch.Tensor:
    """[B, T] from whole log-probs [B, T, V]."""
    ranked = logps.sort(-1, descending=True).values
    if type(fact).__name__ == "SecondFact":
        return ranked[..., 1]
    return ranked[..., :3].exp().sum(-1)


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_it_is_found_and_read_like_the_others(own: str, chunk: int | None) -> None:
    method = load(f"{own}:second")
    assert {f.words() for f in method.needs.facts} == {
        "teacher log-prob of its second most probable token",
        "student mass of its top 3",
    }
    assert method.needs.models == {"student", "teacher"} and method.needs.whole("teacher")
    case = fabricate(method.objective)
    batch = case.batch(method.objective, chunk)
    said = {"teacher": case.models["teacher"], "student": case.before}
    for fact in method.needs.facts:
        logps = said[fact.models[0]].log_softmax(-1)
        torch.testing.assert_close(batch.read(fact)[batch.mask], naive(fact, logps)[batch.mask])


def test_it_passes_the_checks(own: str) -> None:
    assert not check(f"{own}:second").failed


def test_two_steps_of_training(own: str, tmp_path: Path) -> None:
    out = distill(
        save_tiny(tmp_path / "student", seed=1),
        save_tiny(tmp_path / "teacher", seed=2),
        ["What is 1 plus 2?", "What is 3 plus 4?"],
        method=f"{own}:second",
        output=str(tmp_path / "run"),
        steps=2,
        prompts_per_step=2,
        num_generations=2,
        max_completion_length=8,
        device="cpu",
    )
    losses = [line["loss"] for line in out.metrics]
    assert len(losses) == 2 and all(math.isfinite(x) and x > 0 for x in losses)


def test_a_sampler_notes_it(own: str) -> None:
    """No pass of the student is made for a fact that says what it takes from notes."""
    needs = load(f"{own}:second").needs
    assert watched(needs) == Watch(top=3)
    student, teacher = tiny_model("qwen3"), tiny_model("llama", seed=3)
    prompts = [Prompt("a", [5, 6, 7]), Prompt("b", [9, 8])]
    rollouts = HFSampler(student, tiny_tokenizer(), watch=watched(needs)).sample(
        prompts, Sampling(max_completion_length=6), policy_version=0
    )
    scorers = {"teacher": LocalModel(teacher, head_of(teacher))}
    noted = gather(rollouts, needs, scorers)  # there is no student to ask
    scorers["student"] = LocalModel(student, head_of(student))
    asked = gather(rollouts, needs, scorers, recompute_student=True)
    (mass,) = needs.of("student")
    torch.testing.assert_close(
        noted.read(mass)[noted.mask], asked.read(mass)[asked.mask], rtol=0, atol=1e-5
    )


def test_a_teacher_that_cannot_say_it_is_refused_by_its_words(own: str) -> None:
    second, mass = load_address(f"{own}:SecondFact"), load_address(f"{own}:MassFact")
    served = teacher_of("vllm:model")
    with pytest.raises(UserError, match="teacher log-prob of its second most probable token"):
        served.refuse("second", Needs(frozenset({second("teacher")})))
    served.refuse("second", Needs(frozenset({mass("teacher", 3)})))


# ------------------------------------------------------------------------------ nobody asks a class


def kinds(cls: type = Fact) -> set[str]:
    """Names of the package's kinds of fact."""
    found = [k for c in cls.__subclasses__() for k in (c, *c.__subclasses__())]
    return {k.__name__ for k in found if k.__module__.startswith("opdkit.")}


def asked(tree: ast.AST, names: set[str]) -> list[str]:
    """Where a program asks whether something is of one of these classes: isinstance, issubclass,
    match, or a comparison with its type.
    """

    def mentions(node: ast.AST) -> bool:
        inside = list(ast.walk(node))
        named = {n.id for n in inside if isinstance(n, ast.Name)}
        return bool(names & (named | {n.attr for n in inside if isinstance(n, ast.Attribute)}))

    def of_type(node: ast.AST) -> bool:
        return any(
            (isinstance(n, ast.Name) and n.id == "type")
            or (isinstance(n, ast.Attribute) and n.attr == "__class__")
            for n in ast.walk(node)
        )

    def asks(node: ast.AST) -> bool:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            return any(map(mentions, node.args[1:]))
        if isinstance(node, ast.MatchClass):
            return mentions(node.cls)
        return isinstance(node, ast.Compare) and of_type(node) and mentions(node)

    return [ast.unparse(node) for node in ast.walk(tree) if asks(node)]


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(f, LogpFact)",
        "[f for f in fs if isinstance(f, (int, facts.LogpFact))]",
        "issubclass(c, LogpFact)",
        "type(f) is LogpFact",
        "type(f) in (LogpFact,)",
        "f.__class__ == LogpFact",
        "match f:\n    case LogpFact(model): pass",
    ],
)
def test_a_ladder_is_seen(line: str) -> None:
    assert asked(ast.parse(line), {"LogpFact"})


def test_no_file_but_that_of_the_facts_asks_which_kind_one_is() -> None:
    names = kinds()
    assert {LogpFact.__name__, SpanFact.__name__} <= names and len(names) == 11
    ladders = {
        f"{path.relative_to(ROOT)}: {line}"
        for path in sorted(ROOT.rglob("*.py"))
        if path != ROOT / "objective" / "facts.py"
        for line in asked(ast.parse(path.read_text(encoding="utf-8")), names)
    }
    assert ladders == set()

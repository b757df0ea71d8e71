"""Who wrote a rollout, and when, is decided rollout by rollout: what is known of one is not thrown
away because of another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from opdkit import UserError, load
from opdkit.curricula import PassRates
from opdkit.curricula.data import given
from opdkit.curricula.prefix import GuidedWriter
from opdkit.curricula.writer import StepContext
from opdkit.methods.minillm import LogMixture
from opdkit.models.body import head_of
from opdkit.objective.batch import Batch
from opdkit.objective.facts import ColumnFact, EntropyFact, Fact, LogpFact
from opdkit.objective.needs import Needs
from opdkit.objective.signals import PassRate
from opdkit.run.refuse import refuse
from opdkit.run.settings import make_run
from opdkit.sampling.finish import Response, finish, rollout_ids
from opdkit.teachers import LocalModel
from opdkit.train.collect.filters import DynamicSampling, informative
from opdkit.train.gather import collate, gather
from opdkit.types import Notes, Prompt, Rollout, Sampling
from tests.common.tiny import tiny_model, tiny_tokenizer
from tests.train.rows import naive_logps, rollouts

NOW = 4
READ: list[Fact] = [LogpFact("student"), LogpFact("sampler"), EntropyFact("student")]


class Counting(LocalModel):
    """A model that says at which positions it was run."""

    asked: ClassVar[list[int]] = []

    def source(self, layout: Any, positions: torch.Tensor) -> Any:
        self.asked.extend(positions.tolist())
        return super().source(layout, positions)


@pytest.fixture
def student() -> Counting:
    model = tiny_model("qwen3", seed=1).double()
    Counting.asked.clear()
    return Counting(model, head_of(model))


def mixed() -> list[Rollout]:
    """Fresh, stale, of the data, empty, and fresh again; what fresh ones noted is made up."""
    rows = rollouts(policy_version=NOW)
    rows[1] = replace(rows[1], policy_version=1)
    rows[2] = replace(rows[2], logp=[], drawn_logp=[], finish="given", marks={"given": [True] * 8})
    return [replace(r, notes=Notes(torch.full((len(r.tokens),), 0.5), None, None)) for r in rows]


def facts(rows: list[Rollout], student: Any, read: Any = READ, **how: Any) -> Batch:
    needs = Needs(frozenset(read), how.pop("authors", ("student",)))
    scorers = {"student": student, "teacher": student}
    return gather(rows, needs, scorers, policy_version=NOW, dtype=torch.float64, **how)


def test_a_stale_rollout_costs_a_pass_of_itself_alone(student: Counting) -> None:
    rows = mixed()
    batch = facts(rows, student)
    assert sorted(student.asked) == [8, 9]  # both tokens of the second rollout, [1, 0] and [1, 1]
    logp, entropy = batch["student"].logp, batch["student"].entropy
    assert logp[0, :5].tolist() == rows[0].logp and entropy[0, :5].tolist() == [0.5] * 5
    expected = naive_logps(student.model, rows[1])
    own = expected.gather(-1, torch.tensor(rows[1].tokens)[:, None])[:, 0]
    assert torch.allclose(logp[1, :2], own, atol=1e-9)
    assert torch.allclose(entropy[1, :2], -(expected.exp() * expected).sum(-1), atol=1e-9)
    assert batch["sampler"].logp[1, :2].tolist() == rows[1].logp
    # of the data's response nothing is read, as no term asks for it
    assert not batch.mask[2].any() and (logp[2] == 0).all()


def test_a_fact_of_what_others_wrote_is_zero_whoever_says_it() -> None:
    """The sampler's numbers as those of a model that is asked: a sum that forgets its mask counts
    nothing of a tool's tokens.
    """
    rows = []
    for r in rollouts(policy_version=NOW):
        tool = [t % 2 == 1 for t in range(len(r.tokens))]
        noted = Notes(torch.full((len(tool),), 0.5), None, None)
        rows.append(replace(r, marks={"tool": tool}, notes=noted))
    batch = gather(rows, Needs(frozenset(READ)), {}, policy_version=NOW, dtype=torch.float64)
    for fact in READ:
        values = batch.read(fact)
        assert (values[~batch.mask] == 0).all() and (values[batch.mask] != 0).all()


def test_data_text_that_is_asked_for_is_as_if_drawn_and_leaves_others_as_they_are(
    student: Counting,
) -> None:
    rows = mixed()
    batch = facts(rows, student, authors=("student", "data"))
    assert sorted(student.asked) == [8, 9, *range(16, 24)]
    assert batch["sampler"].logp[0, :5].tolist() == rows[0].logp
    assert torch.equal(batch["sampler"].logp[2], batch["student"].logp[2])  # ratio 1
    expected = naive_logps(student.model, rows[2])
    own = expected.gather(-1, torch.tensor(rows[2].tokens)[:, None])[:, 0]
    assert torch.allclose(batch["student"].logp[2], own, atol=1e-9)


def test_where_the_student_runs_anyway_it_says_all_of_it(student: Counting) -> None:
    """Numbers of one pass, not of two engines."""
    from opdkit.objective.divergences import ReverseKL
    from opdkit.objective.facts import GapFact

    rows = mixed()
    batch = facts(rows, student, [*READ, GapFact(ReverseKL(), "student", "teacher")])
    own = naive_logps(student.model, rows[0]).gather(-1, torch.tensor(rows[0].tokens)[:, None])
    assert torch.allclose(batch["student"].logp[0, :5], own[:, 0], atol=1e-9)


def test_tempered_draws_are_one_ratio_whoever_took_part_in_them() -> None:
    """With correct_sampling the sampler's log-probs are of the mixture that it drew from already:
    minillm's teacher_mix mixes once.
    """
    rows = [replace(r, drawn_logp=[x - 0.3 for x in r.logp]) for r in rollouts()]
    for correct in (False, True):
        batch = collate(rows, "cpu", torch.float64, correct)
        batch.facts[LogpFact("teacher")] = torch.full(batch.shape, -0.5, dtype=torch.float64)
        base = LogMixture("teacher", "sampler", 0.2)(batch)[0, 0].exp().item()
        plain, drawn = torch.tensor([-1.0, -1.3], dtype=torch.float64).exp().tolist()
        mixture = 0.2 * torch.tensor(-0.5).exp().item() + 0.8 * plain
        assert base == pytest.approx(drawn if correct else mixture, rel=1e-7)


# ------------------------------------------------------------------------------ prompts and groups


def guided_step() -> list[Rollout]:
    """Two plain answers and a guided one to each of two questions, as the sampler makes them."""
    tokenizer = tiny_tokenizer()

    def sample(prompts: Any, sampling: Sampling) -> list[Rollout]:
        asked = [p for p in prompts for _ in range(sampling.num_generations)]
        made = [Response([*p.prefix, 5, 6], [-1.0] * n, [-1.0] * n, True)
                for p in asked for n in [len(p.prefix) + 2]]  # fmt: skip
        return finish(prompts, sampling, rollout_ids(prompts, sampling, 0), made, tokenizer, 0)

    prompts = tuple(Prompt(f"q{i}", [1, 2]) for i in range(2))
    context = StepContext(
        prompts, Sampling(num_generations=2), 0, 10, 0, sample, lambda prompt: [7, 8, 9]
    )
    return GuidedWriter(1).write(context)


def test_a_guided_rollout_is_compared_with_the_others_to_its_question() -> None:
    made = guided_step()
    assert len({r.id for r in made}) == 6 and [r.id for r in made[4:]] == [
        "0/q0:guided/0",
        "0/q1:guided/0",
    ]
    assert [(r.group, r.question) for r in made[4:]] == [("q0", "q0"), ("q1", "q1")]
    assert made[4].drawn == [False] * 3 + [True] * 2 and not made[4].unaided and made[0].unaided


def test_dynamic_sampling_keeps_guided_rollouts_with_their_question() -> None:
    right = {"0/q0/0", "0/q0:guided/0", "0/q1/0", "0/q1/1", "0/q1:guided/0"}
    scored = [replace(r, reward=float(r.id in right), correct=r.id in right) for r in guided_step()]
    kept = informative(scored)
    assert [r.id for r in kept] == ["0/q0/0", "0/q0/1", "0/q0:guided/0"]
    assert DynamicSampling(1)(scored, list) == kept


def test_what_is_remembered_of_a_question_is_the_students_own_doing() -> None:
    scored = [replace(r, correct="guided" in r.id, reward=0.0) for r in guided_step()]
    memory = PassRates().observe(scored, {})
    assert memory["pass_rate"] == {"q0": 0.0, "q1": 0.0}
    needs = Needs(frozenset({ColumnFact("memory:pass_rate")}))
    batch = gather(scored, needs, {}, memory={"pass_rate": {"q0": 0.25}})
    rates = batch.read(ColumnFact("memory:pass_rate"))
    assert rates[[0, 1, 4]].tolist() == [0.25] * 3 and rates[[2, 3, 5]].isnan().all()


def test_a_pass_rate_is_of_a_question_whatever_its_answers_are_compared_with() -> None:
    """Four answers to each of two questions; right are one of four and three of four."""
    right = [True, False, False, False, True, True, True, False]
    for groups in (("a", "b") * 4, ("a",) * 8, ("a",) * 4 + ("b",) * 4):
        made = [
            replace(r, group=group, question=f"q{i // 4}", reward=float(correct), correct=correct)
            for i, (r, group, correct) in enumerate(
                zip(rollouts(lengths=((2, 3),) * 8), groups, right)
            )
        ]
        batch = gather(made, Needs(frozenset({ColumnFact("memory:pass_rate")})), {})
        assert PassRate()(batch)[:, 0].tolist() == [0.25] * 4 + [0.75] * 4


def test_another_prompt_of_a_question_keeps_it() -> None:
    prompt = Prompt("q", [1])
    other = replace(prompt, id="q:again", prefix=[3])
    assert (other.question, other.group) == ("q", "q")
    assert given(other, [3, 4], 9, "x").group == "q"
    assert given(other, [3, 4], 9, "x").drawn == [False, False]


def test_turns_are_facts_beside_the_tokens() -> None:
    rows = rollouts()
    rows[0] = replace(rows[0], turns=[0, 0, 1, 1, 2])
    batch = collate(rows, "cpu", torch.float32)
    assert batch.turn[0].tolist() == [0, 0, 1, 1, 2, 0, 0, 0] and not batch.turn[1:].any()
    assert not collate(rows[1:], "cpu", torch.float32).turn.any()


def test_a_policy_gradient_where_the_student_never_writes_is_refused(tmp_path: Any) -> None:
    run = make_run({"student": "s", "teacher": "t", "data": "d", "output": str(tmp_path / "r")})
    with pytest.raises(UserError, match="did not draw there is none"):
        refuse(run, load("gkd(lmbda=0.0) + opd"), None)
    refuse(run, load("gkd(lmbda=0.0)"), None)
    refuse(run, load("gkd(lmbda=0.5) + opd"), None)

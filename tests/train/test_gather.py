"""Facts from padded, batched, chunked passes are those of each row alone; what is masked, cut or of
another tokenizer never leaks in.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from opdkit import UserError, load
from opdkit.methods.method import Method
from opdkit.models.body import head_of
from opdkit.models.layout import Layout, grouped, pass_tokens
from opdkit.objective.divergences import ReverseKL
from opdkit.objective.facts import (
    ColumnFact,
    EntropyFact,
    Fact,
    GapFact,
    LogpAtFact,
    LogpFact,
    VocabularyFact,
)
from opdkit.objective.grammar import Objective
from opdkit.objective.head import flat_positions, learn
from opdkit.objective.needs import Needs
from opdkit.objective.signals import Entropy, Row
from opdkit.teachers import LocalModel
from opdkit.train.gather import collate, gather, refresh
from opdkit.train.record import rollout_metrics
from opdkit.types import Rollout
from tests.common.rounding import rounding
from tests.common.tiny import tiny_model
from tests.train.rows import naive_logps, rollouts

FACTS: list[Fact] = [
    LogpFact("student"),
    LogpFact("teacher"),
    EntropyFact("student"),
    EntropyFact("teacher"),
    LogpAtFact("teacher", "teacher", 3),
    LogpAtFact("student", "teacher", 3),
    GapFact(ReverseKL(), "student", "teacher"),
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A student and a teacher in float64: what differs is wrong, not rounded."""
    return {
        name: tiny_model(kind, seed=seed).double()
        for name, kind, seed in (("student", "qwen3", 1), ("teacher", "llama", 2))
    }


def scorers(models: dict[str, Any], budget: int = 65536) -> dict[str, Any]:
    return {name: LocalModel(model, head_of(model), budget) for name, model in models.items()}


def facts(
    models: dict[str, Any], rows: list[Rollout], needs: list[Fact], budget: int = 65536
) -> Any:
    return gather(
        rows,
        Needs(frozenset(needs)),
        scorers(models, budget),
        recompute_student=True,
        dtype=torch.float64,
    )


@pytest.mark.parametrize("budget", [1, 20, 65536], ids=lambda n: f"{n} tokens a pass")
def test_facts_of_a_padded_batch_are_those_of_each_row_alone(
    models: dict[str, Any], budget: int
) -> None:
    rows = rollouts()
    batch = facts(models, rows, FACTS, budget)
    for b, row in enumerate(rows):
        n = len(row.tokens)
        if not n:
            continue
        said = {name: naive_logps(model, row) for name, model in models.items()}
        chosen = torch.tensor(row.tokens)[:, None]
        top = said["teacher"].topk(3, -1).indices
        for name, logps in said.items():
            torch.testing.assert_close(
                batch[name].logp[b, :n], logps.gather(-1, chosen)[:, 0], rtol=0, atol=1e-12
            )
            torch.testing.assert_close(
                batch[name].entropy[b, :n], -(logps.exp() * logps).sum(-1), rtol=0, atol=1e-12
            )
            torch.testing.assert_close(
                batch[name].at_top("teacher", 3)[b, :n], logps.gather(-1, top), rtol=0, atol=1e-12
            )
        gap = (said["student"].exp() * (said["student"] - said["teacher"])).sum(-1)
        torch.testing.assert_close(batch.read(FACTS[-1])[b, :n], gap, rtol=0, atol=1e-12)


def test_the_samplers_log_probs_are_the_students_where_they_are_exact(
    models: dict[str, Any],
) -> None:
    rows = rollouts(policy_version=4)
    needs = Needs(frozenset({LogpFact("student"), LogpFact("sampler")}))
    assert gather(rows, needs, {}, policy_version=4)["student"].logp[0].tolist() == pytest.approx(
        [-1, -1.1, -1.2, -1.3, -1.4, 0, 0, 0]
    )
    for settings in (
        {"policy_version": 5},
        {"policy_version": 4, "recompute_student": True},
        {"policy_version": 4, "correct_sampling": True},
    ):
        # there it has to be asked, and no model is here
        with pytest.raises(KeyError, match="student"):
            gather(rows, needs, {}, **settings)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- layout


def test_micro_batches_hold_every_position_once_and_keep_to_the_budget() -> None:
    rows = rollouts(lengths=[(p, r) for p in (2, 9, 30) for r in (0, 1, 7, 20)])
    layout = Layout(rows, 20)
    mask = torch.arange(20)[None] < torch.tensor([len(r.tokens) for r in rows])[:, None]
    mask[7, 3:] = False  # a row of which only the beginning is asked
    positions = flat_positions(mask)
    for budget in (1, 40, 100, 10_000):
        parts = layout.micro_batches(positions, budget)
        assert sorted(torch.cat(parts).tolist()) == positions.tolist()
        for part in parts:
            lengths = layout.lengths(part)
            filled = int((lengths > 0).sum()) * int(lengths.max())
            assert filled <= budget or int((lengths > 0).sum()) == 1


def test_what_follows_the_last_selected_position_is_not_computed(models: dict[str, Any]) -> None:
    """Three prompt tokens and five of response: the second response token is predicted from 3 + 1
    tokens.
    """
    rows = rollouts(lengths=[(3, 5), (2, 6)])
    seen: list[tuple[int, ...]] = []
    hook = (
        models["student"]
        .get_decoder()
        .register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
    )
    states = Layout(rows, 6).states(models["student"], torch.tensor([0, 1]))
    hook.remove()
    assert seen == [(1, 4)]  # and the other row not at all
    logits = head_of(models["student"]).logits(states)
    torch.testing.assert_close(
        logits.log_softmax(-1), naive_logps(models["student"], rows[0])[:2], rtol=0, atol=1e-12
    )


# ----------------------------------------------------------------------------------------- pitfalls


def gradient(models: dict[str, Any], method: Method, rows: list[Rollout]) -> torch.Tensor:
    """[weights]: the student's gradient of a method on these rollouts, through gather and learn."""
    student = models["student"]
    batch = gather(rows, method.needs, scorers(models), dtype=torch.float64)
    plan = method.objective.plan(batch)
    layout = Layout(rows, batch.shape[1])
    student.zero_grad()
    for positions in layout.micro_batches(flat_positions(plan.selected), 65536):
        learn(plan, positions, layout.states(student, positions), head_of(student)).loss.backward()
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in student.parameters()
        ]
    )


METHODS = ("opd", "iw_opd", "gkd", "vopd", "position_opd")


@pytest.mark.parametrize("name", METHODS)
def test_m6_tokens_that_the_student_did_not_write_teach_nothing(
    models: dict[str, Any], name: str
) -> None:
    method = load(name)
    tool = [replace(r, trained=[False] * len(r.tokens)) for r in rollouts()]
    assert not gradient(models, method, tool).any()


@pytest.mark.parametrize("name", METHODS)
def test_m6_a_tools_tokens_are_context_and_count_nowhere(models: dict[str, Any], name: str) -> None:
    """Turn, tool output, turn: whatever was recorded of the tool's tokens, sums, shares and
    denominators see the student's alone.

    The same trained tokens split in two rollouts, the second of which has the first and the tool's
    tokens as its prompt, have the same credits at the same positions. For losses without sums along
    the row the gradient is the same.
    """
    (row,) = rollouts(lengths=[(3, 8)])
    trained = [True] * 3 + [False] * 2 + [True] * 3
    whole = replace(row, trained=trained)
    garbage = replace(whole, logp=[lp if t else -50.0 for lp, t in zip(row.logp, trained)])
    found = gradient(models, load(name), [whole])
    assert found.any()
    assert torch.equal(found, gradient(models, load(name), [garbage]))
    if name in ("opd", "gkd", "vopd"):
        first = replace(row, id="a", tokens=row.tokens[:3], trained=[True] * 3, logp=row.logp[:3])
        second = replace(
            row,
            id="b",
            prompt=row.prompt + row.tokens[:5],
            tokens=row.tokens[5:],
            trained=[True] * 3,
            logp=row.logp[5:],
        )
        apart = gradient(models, load(name), [first, second])
        norms = rounding(
            torch.float32, 1.0, 5 * 32
        )  # 5 of these models' 32 numbers, in float32 whatever the model is in
        assert float((found - apart).abs().max() / found.abs().max()) < norms


def test_m1_no_token_is_known_by_its_id(models: dict[str, Any]) -> None:
    """Id 2 ends a response and stands inside prompts, id 0 pads the table and is drawn: what was
    written is trained, the rest is not.
    """
    rows = [
        Rollout("a", [2, 5, 2], [7, 2], [True, True], [-1.0, -2.0], [-1.0, -2.0], "a"),
        Rollout(
            "b",
            [2, 2, 0, 9],
            [8, 0, 0, 4],
            [True] * 4,
            [-1.0] * 4,
            [-1.0] * 4,
            "b",
            finish="length",
        ),
    ]
    batch = facts(models, rows, [LogpFact("teacher")])
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]
    for b, row in enumerate(rows):
        expected = naive_logps(models["teacher"], row).gather(
            -1, torch.tensor(row.tokens)[:, None]
        )[:, 0]
        torch.testing.assert_close(
            batch["teacher"].logp[b, : len(row.tokens)], expected, rtol=0, atol=1e-12
        )


def test_m8_the_last_token_of_a_cut_rollout_is_trained_and_the_share_of_such_is_reported() -> None:
    rows = [
        replace(r, finish=f)
        for r, f in zip(
            rollouts(lengths=[(2, 4), (2, 3), (2, 4), (2, 4)]), ("length", "stop", "length", "stop")
        )
    ]
    assert collate(rows, "cpu", torch.float32).mask[0].tolist() == [True] * 4
    assert rollout_metrics(rows)["completions/truncated_fraction"] == 0.5


def test_m10_token_ids_reach_the_models_as_they_were_drawn(models: dict[str, Any]) -> None:
    """Ids that no text would give back: a special token in the middle, bytes of a split character,
    a pair that merges when encoded.
    """
    from tests.common.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    split = [tokenizer.convert_tokens_to_ids(c) for c in ("a", "n", "s")]
    odd = [2, 1, 0, *split, 255, 130]
    assert tokenizer(tokenizer.decode(odd))["input_ids"] != odd
    row = Rollout("a", [1, 0, 2], odd, [True] * len(odd), [-1.0] * len(odd), [-1.0] * len(odd), "a")
    seen: list[list[int]] = []
    hooks = [
        m.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()),
            with_kwargs=True,
        )
        for m in models.values()
    ]
    gradient(models, load("gkd"), [row])
    for hook in hooks:
        hook.remove()
    # teacher and student; the last token is predicted, never read
    assert seen == [[1, 0, 2, *odd[:-1]]] * 2


def test_r6_a_model_that_is_nan_is_named_with_the_rollout(models: dict[str, Any]) -> None:
    rows = rollouts()
    broken = tiny_model("llama", seed=2).double()
    with torch.no_grad():
        broken.model.embed_tokens.weight[rows[2].tokens[4]] = math.nan
    with pytest.raises(UserError, match=r"not finite for rollout 0/2/0.*Nothing was learnt"):
        facts(models | {"teacher": broken}, rows, [LogpFact("teacher")])
    with torch.no_grad():
        broken = tiny_model("llama", seed=2).double()
        broken.lm_head.weight[17] = math.nan
    with pytest.raises(
        UserError, match=r"teacher log-prob of the sampled token is NaN at token 0 of rollout 0/0/0"
    ):
        facts(models | {"teacher": broken}, rows, [LogpFact("teacher")])


def test_a_live_fact_begins_as_the_student_before_the_step(models: dict[str, Any]) -> None:
    rows = rollouts()
    method = Method(Objective(load("opd").objective.terms[0] * Entropy("live")))
    batch = gather(rows, method.needs, scorers(models), dtype=torch.float64)
    entropy = facts(models, rows, [EntropyFact("student")])["student"].entropy
    assert torch.equal(batch["live"].entropy, entropy)


def test_a_live_vocabulary_is_that_of_the_student_as_it_is(models: dict[str, Any]) -> None:
    """At each optimiser step, for a loss that reads it before any backward."""
    rows = rollouts()
    needs = Needs(frozenset({VocabularyFact("live"), VocabularyFact("teacher")}))
    at = torch.tensor([0, 4, 9])  # of the first two rollouts, of 5 and 2 tokens
    batch = gather(rows, needs, scorers(models), dtype=torch.float64)
    for seed in (1, 7):  # before the first update; after it, another model
        student = tiny_model("qwen3", seed=seed).double()
        if seed != 1:
            refresh(batch, needs, scorers({"live": student}), rows)
        said = torch.cat([naive_logps(student, row)[:n] for row, n in zip(rows, (5, 2))])
        logits = batch.source("live").logits(at)
        torch.testing.assert_close(logits.log_softmax(-1), said[[0, 4, 6]], rtol=0, atol=1e-12)
    assert set(batch.sources) == {"live", "teacher"}


def test_a_column_that_is_no_number_is_named(models: dict[str, Any]) -> None:
    from opdkit.objective.facts import ColumnFact

    rows = rollouts(row={"difficulty": "hard"})
    with pytest.raises(
        UserError,
        match=r"the column 'difficulty' as a number; in the row of rollout 0/0/0 it is 'hard'",
    ):
        gather(rows, Needs(frozenset({ColumnFact("row:difficulty")})), scorers(models))


def test_an_entry_of_a_list_column(models: dict[str, Any]) -> None:
    """A number in a list of the data; NaN where the row, the list or the entry has none."""
    given = [[90, 60.5], [70], [None, 20], None]
    rows = [replace(r, row={"confidence": c}) for r, c in zip(rollouts(), given)]
    wanted = [ColumnFact(f"row:confidence[{i}]") for i in range(2)]
    batch = gather(rows, Needs(frozenset(wanted)), scorers(models))
    first, second = (Row(f"confidence[{i}]")(batch)[:, 0] for i in range(2))
    absent = math.nan
    torch.testing.assert_close(first, torch.tensor([90, 70, absent, absent]), equal_nan=True)
    torch.testing.assert_close(second, torch.tensor([60.5, absent, 20, absent]), equal_nan=True)
    for value, message in ((90, "list of numbers"), (["x"], "as a number")):
        wrong = [replace(r, row={"confidence": value}) for r in rows]
        with pytest.raises(UserError, match=message):
            gather(wrong, Needs(frozenset(wanted[:1])), scorers(models))


def test_facts_are_the_same_in_portions(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only numbers are read, few hidden states are held at once."""
    rows = rollouts()
    whole = facts(models, rows, FACTS)
    held: list[int] = []
    source = LocalModel.source

    def note(self: LocalModel, layout: Layout, positions: torch.Tensor) -> Any:
        made = source(self, layout, positions)
        held.append(len(made.hidden))
        return made

    monkeypatch.setattr(LocalModel, "source", note)
    monkeypatch.setattr("opdkit.train.gather.HELD", 9)
    parts = facts(models, rows, FACTS)
    total = int(whole.mask.sum())
    assert len(held) >= 4 and max(held) < total and sum(held) == 2 * total
    for fact in FACTS:
        torch.testing.assert_close(parts.read(fact), whole.read(fact), rtol=0, atol=1e-12)


def test_groups_of_rows_are_the_cheapest_there_are() -> None:
    """Against every way to cut a short list, padding and passes counted."""
    from itertools import combinations, pairwise

    def cost(cuts: tuple[int, ...], lengths: list[int], budget: int, each: int) -> float:
        sizes = [(lengths[a], b - a) for a, b in pairwise(cuts)]
        if any(width * rows > budget and rows > 1 for width, rows in sizes):
            return math.inf
        return sum(width * rows + each for width, rows in sizes)

    for lengths, budget, each in (
        ([9, 9, 8, 3, 3, 2, 1, 1], 32, 2),
        ([50, 7, 7, 6, 6, 6, 1], 40, 5),
        ([5], 3, 1),
        ([4] * 8, 99, 0),
    ):
        n = len(lengths)
        ways = [(0, *cuts, n) for k in range(n) for cuts in combinations(range(1, n), k)]
        groups = grouped(lengths, budget, each)
        assert (
            [g.start for g in groups][1:] == [g.stop for g in groups][:-1]
            and groups[0].start == 0
            and groups[-1].stop == n
        )
        found = cost((0, *(g.stop for g in groups)), lengths, budget, each)
        assert found == min(cost(way, lengths, budget, each) for way in ways)
    assert grouped([], 10, 1) == []


def test_less_than_a_twentieth_of_what_is_processed_is_padding() -> None:
    """256 responses of geometric length, mean 256, to prompts of 60 to 220 tokens."""
    generator = torch.Generator().manual_seed(0)
    responses = (torch.rand(256, generator=generator).log() * -256).long().clamp(1, 1024)
    lengths = sorted(
        (responses + torch.randint(60, 220, (256,), generator=generator)).tolist(), reverse=True
    )
    padded = sum(
        lengths[g.start] * (g.stop - g.start)
        for g in grouped(lengths, 16384, pass_tokens(torch.device("cuda")))
    )
    assert sum(lengths) / padded > 0.95

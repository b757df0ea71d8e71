"""The ladder of lengths: which length each stage has, when it stays, and what its gate goes by."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.curricula import Cached, EntropyLength, Mixed, Plain, Replay, TeacherPrefix, together
from opdkit.curricula.entropy_length import token_mean
from opdkit.curricula.writer import Memory
from opdkit.run.evaluation import Heard
from opdkit.sampling import HFSampler
from opdkit.types import Prompt, Sampling, Watch
from tests.common.tiny import VOCAB, tiny_model, tiny_tokenizer

LADDER = (128, 256, 512, 1024)
FIVE = (9.0, 9.0, 9.0, 9.0, 9.0)


def stages(
    curriculum: EntropyLength, entropies: Sequence[float], memory: Memory | None = None
) -> tuple[list[int], Memory]:
    """Lengths of the stages up to and after each gate, and what is remembered then."""
    memory = {} if memory is None else memory
    lengths = [curriculum.longest(memory)]
    for entropy in entropies:
        for _ in range(curriculum.every or 1):
            memory = curriculum.observe([], memory)
        memory = curriculum.validated({"entropy": entropy, "loss": 3.0}, memory)
        lengths.append(curriculum.longest(memory))
    return lengths, memory


@pytest.mark.parametrize(
    ("on_fail", "entropies", "lengths"),
    [
        ("rollback", (0.52, 0.41, 0.33, 0.24), [128, 256, 512, 1024, 512]),
        ("hold", (0.52, 0.41, 0.33, 0.24), [128, 256, 512, 1024, 1024]),
        ("rollback", (0.52, 0.28), [128, 256, 128]),
        ("hold", (0.52, 0.28), [128, 256, 256]),
        ("rollback", (0.20,), [128, 128]),
        ("hold", (0.20,), [128, 128]),
        ("rollback", (0.3,), [128, 256]),  # at least the threshold
    ],
)
def test_the_lengths_of_the_card_and_no_recovery_unfreezes_them(
    on_fail: str, entropies: tuple[float, ...], lengths: list[int]
) -> None:
    curriculum = EntropyLength(LADDER, on_fail=on_fail)
    seen, memory = stages(curriculum, entropies)
    assert seen == lengths
    if memory["length"]["frozen"]:
        after, _ = stages(curriculum, FIVE, memory)
        assert set(after) == {lengths[-1]}


def test_without_a_threshold_it_is_a_schedule_and_with_one_beyond_reach_a_constant() -> None:
    every = (2.0, 0.0, 1.0, 0.0, 0.0)
    assert stages(EntropyLength(LADDER, min_entropy=0.0), every)[0] == [*LADDER, 1024, 1024]
    never = EntropyLength(LADDER, min_entropy=math.log(VOCAB) + 1)
    assert set(stages(never, [math.log(VOCAB)] * 3)[0]) == {128}


def test_at_the_top_a_gate_that_passes_makes_it_stable_and_one_that_fails_keeps_it() -> None:
    top = EntropyLength((4, 8))
    assert stages(top, (0.5, 0.5, 0.1, 0.5))[0] == [4, 8, 8, 8, 8]
    assert stages(top, (0.5, 0.1, 0.5))[0] == [4, 8, 4, 4]


def test_a_saved_state_has_the_same_future() -> None:
    curriculum = EntropyLength(LADDER, every=2)
    entropies = (0.5, 0.4, 0.2, 0.9)
    whole, end = stages(curriculum, entropies)
    for cut in range(5):
        before, memory = stages(curriculum, entropies[:cut])
        saved = json.loads(json.dumps({**memory, "other": 1}))
        after, last = stages(curriculum, entropies[cut:], saved)
        assert before + after[1:] == whole and last == {**end, "other": 1}


def test_a_gate_comes_after_the_steps_of_a_stage_and_not_before_training() -> None:
    """Evaluations at steps 0, 2, 4, 5 and 6, and stages of three steps: gates at 4 and no other."""
    curriculum, memory = EntropyLength((1, 2, 3), every=3), {}
    lengths = []
    for step in range(7):
        if step in (0, 2, 4, 5, 6):
            memory = curriculum.validated({"entropy": 1.0}, memory)
        lengths.append(curriculum.longest(memory))
        memory = curriculum.observe([], memory)
    assert lengths == [1, 1, 1, 1, 2, 2, 2]
    # one that says nothing of steps has a gate at every evaluation but the first
    assert EntropyLength((1, 2)).validated({"entropy": 9.0}, {}) == {}


def test_tokens_count_alike_whoever_measured_them() -> None:
    """Two processes: sums and counts are added before they are divided."""
    assert token_mean([(3.0, 10), (1.0, 10)]) == 0.2
    assert token_mean([(3.0, 10), (1.0, 2)]) == pytest.approx(1 / 3, abs=1e-15)  # 4 / 12, not 0.4
    assert token_mean(iter([(0.0, 0), (1.0, 2)])) == 0.5
    assert math.isnan(token_mean([]))


def test_the_entropy_of_a_uniform_student_is_log_v_and_of_a_sure_one_nothing() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [Prompt("a", [5, 6]), Prompt("b", [7])]
    sampling = Sampling(max_completion_length=5, num_generations=2)

    def measured(watch: Watch) -> float:
        heard = Heard(HFSampler(model, tokenizer, watch=watch))
        heard.sample(prompts, sampling, seed=0, step=0)
        return heard.entropy

    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert measured(Watch(entropy=True)) == pytest.approx(math.log(VOCAB), abs=1e-6)
    with torch.no_grad():  # the largest of many large logits
        model.lm_head.weight.normal_(0, 1e6, generator=torch.Generator().manual_seed(0))
    assert measured(Watch(entropy=True)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="which their sampler does not note"):
        measured(Watch())


def test_the_entropy_is_the_mean_over_tokens_of_the_whole_softmax() -> None:
    """Against the model asked anew at every token."""
    model = tiny_model(seed=3)
    heard = Heard(HFSampler(model, tiny_tokenizer(), watch=Watch(entropy=True)))
    rollouts = heard.sample(
        [Prompt("a", [5, 6]), Prompt("b", [7])],
        Sampling(max_completion_length=6, num_generations=2),
        seed=1,
        step=0,
    )
    found = []
    for r in rollouts:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([r.prompt + r.tokens])).logits[0].double()
        logps = logits[len(r.prompt) - 1 : -1].log_softmax(-1)  # [T, V]
        found += (-(logps.exp() * logps).sum(-1)).tolist()
    assert heard.entropy == pytest.approx(sum(found) / len(found), abs=1e-5)


@pytest.mark.parametrize(
    ("limit", "ladder"),
    [(4096, (128, 256, 512, 1024, 2048, 4096)), (600, (128, 256, 512, 600)), (129, (128, 129))],
)
def test_by_default_the_ladder_doubles_up_to_the_runs_limit(
    limit: int, ladder: tuple[int, ...]
) -> None:
    assert EntropyLength().within(limit).ladder == ladder
    assert EntropyLength(ladder).within(limit) == EntropyLength(ladder)


def test_ladders_that_could_not_be_climbed_are_refused() -> None:
    with pytest.raises(UserError, match="leaves no longer one: it would never grow"):
        EntropyLength().within(128)
    with pytest.raises(UserError, match=r"to 1024, or the ladder to \[128, 256, 300\]"):
        EntropyLength(LADDER).within(300)
    for wrong in ((8,), (8, 8), (8, 4), (0, 4)):
        with pytest.raises(ValueError, match="two lengths or more"):
            EntropyLength(wrong)


def test_with_whom_it_goes_together() -> None:
    """With whoever writes a response now, and cuts it; not with what is stored whole."""
    ladder, names = EntropyLength(LADDER), ("a", "b")
    both = together.join(TeacherPrefix(), ladder, names)
    assert both.measures == ("entropy",) and both.longest({}) == 128
    assert both.within(1024) == both
    assert together.join(Mixed(0.5), ladder, names).longest({"length": {"rung": 2}}) == 512
    assert together.join(ladder, Plain(), names) == ladder
    for stored in (Cached(), Replay()):
        with pytest.raises(UserError, match="were written earlier and are read whole"):
            together.join(stored, ladder, names)


def test_curves_say_where_it_stands() -> None:
    curriculum = EntropyLength(LADDER)
    _, memory = stages(curriculum, (0.5, 0.2))
    assert curriculum.metrics([], 7, 10, memory) == {
        "rung": 0.0,
        "stable_rung": 0.0,
        "frozen": 1.0,
        "length": 128.0,
        "min_entropy": 0.3,
        "entropy": 0.2,
    }
    assert "entropy" not in curriculum.metrics([], 0, 10, {})

"""VLA-OPD: its reward and reduction, the distribution over bins, and a run that acts in bins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opdkit import UserError, distill
from opdkit.methods.method import load
from opdkit.objective import Actions
from opdkit.testing import check, evaluate
from opdkit.types import Sampling
from tests.common.tiny import VOCAB, save_tiny, tiny_tokenizer
from tests.end_to_end.conftest import QUICK
from tests.methods.ragged import mask_of, on, shifted
from tests.methods.toy import P_S, P_T, close, numbers, reverse_kl_gradient

R = [[0.3, -0.1, 0.2], [-0.4, 0.5]]
MINE = [[-1.0, -0.5, -2.0], [-0.7, -1.1]]
TEACHER = shifted(R, MINE)
ACTS = 16  # bins of the run
BINS = {"bins": 2}  # of the two entries that `ragged` has: all are bins


def slopes(student, out) -> Tensor:
    """[number of trained tokens]: d loss / d log-prob of each drawn token."""
    p = torch.tensor([x for row in student for x in row]).double().exp()
    return out.grad[..., 0][mask_of(student)] / (1 - p)


def test_the_reward_of_each_token_and_the_mean_over_all_of_them():
    """-r / 5; -(0.3 * -1 - 0.1 * -0.5 + 0.2 * -2 - 0.4 * -0.7 + 0.5 * -1.1) / 5 = 0.184."""
    out = on(load("vla_opd", **BINS), MINE, models={"teacher": TEACHER})
    assert close(slopes(MINE, out), [-0.06, 0.02, -0.04, 0.08, -0.1])
    assert close(out.loss, 0.184)
    assert close(out.terms[0].credit[mask_of(MINE)], [0.3, -0.1, 0.2, -0.4, 0.5])


def test_the_mean_over_trajectories_is_another_number():
    rows = (load("vla_opd", **BINS).objective.terms[0]).per("rows")
    out = on(rows, MINE, models={"teacher": TEACHER})
    assert close(slopes(MINE, out), [-0.05, 1 / 60, -1 / 30, 0.1, -0.125])
    assert close(out.loss, 0.175833)


def test_more_rollouts_of_a_start_only_average():
    once = on(load("vla_opd", **BINS), MINE, models={"teacher": TEACHER})
    twice = on(load("vla_opd", **BINS), MINE * 2, models={"teacher": TEACHER * 2})
    assert close(once.loss, twice.loss, 12) and close(once.grad, 2 * twice.grad[:2], 12)
    writer = load("vla_opd").curriculum.writer
    assert writer.per_prompt(Sampling()) == 8  # unless the run says how many
    assert writer.per_prompt(Sampling(num_generations=3)) == 3


def setting(vocabulary: int, bins: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    student, before, teacher = torch.randn(3, 4, 6, vocabulary, generator=g, dtype=torch.float64)
    tokens = torch.randint(vocabulary - bins, vocabulary, (4, 6), generator=g)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    return student, before, teacher, tokens, mask


@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("off_policy", [False, True])
def test_equal_to_a_dense_reference(temperature, off_policy):
    for seed in range(3):
        student, before, teacher, tokens, mask = setting(12, 5, seed)
        before = before if off_policy else student
        method = load("vla_opd", bins=5, temperature=temperature)
        out = evaluate(
            method, student, tokens, mask, models={"teacher": teacher}, before_logits=before
        )
        leaf = student.clone().requires_grad_()

        def logp(z, tokens=tokens):
            bins = (z[..., -5:] / temperature).log_softmax(-1)
            return bins.gather(-1, tokens[..., None] - 7)[..., 0]

        r = logp(teacher) - logp(before)
        loss = -(r * logp(leaf))[mask].sum() / mask.sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        assert close(out.loss, loss, 8) and close(out.grad, grad, 8)


def test_teacher_that_is_the_student_and_what_does_not_matter():
    """Where they agree nothing moves; a constant on all bins, and any text logit, changes
    nothing.
    """
    student, _, teacher, tokens, mask = setting(12, 5)
    method = load("vla_opd", bins=5, temperature=1.6)
    same = evaluate(method, student, tokens, mask, models={"teacher": student})
    assert same.loss == 0 and (same.grad == 0).all()
    out = evaluate(method, student, tokens, mask, models={"teacher": teacher})
    moved = [x.clone() for x in (student, teacher)]
    for x, by in zip(moved, (3.0, -2.0)):
        x[..., 7:] += by
        x[..., :7] = torch.randn(7, generator=torch.Generator().manual_seed(9)).double()
    again = evaluate(method, moved[0], tokens, mask, models={"teacher": moved[1]})
    assert close(out.loss, again.loss, 12) and close(out.grad, again.grad, 12)
    assert (out.grad[..., :7] == 0).all() and out.grad.abs().sum() > 0


def test_tokens_after_the_end_have_no_gradient_and_are_not_counted():
    student, _, teacher, tokens, mask = setting(12, 5)
    method = load("vla_opd", bins=5)
    out = evaluate(method, student, tokens, mask, models={"teacher": teacher})
    assert (out.grad[~mask] == 0).all() and out.terms[0].denominator == mask.sum()


def test_the_expected_gradient_is_that_of_the_reverse_kl():
    """Over bins that are three of five ids, text probable or not."""
    text = torch.tensor([4.0, -1.0]).double()
    z = [torch.cat([text, numbers(*p).log()])[None, None] for p in (P_S, P_T)]
    method = load("vla_opd", bins=3)
    grads = [
        p * evaluate(method, z[0], torch.tensor([[2 + y]]), models={"teacher": z[1]}).grad[0, 0]
        for y, p in enumerate(P_S)
    ]
    assert close(sum(grads)[2:], reverse_kl_gradient(P_S, P_T), 12)


def test_one_temperature_holds_for_all_models():
    """There is no second one to set: 0 and less are refused, and two methods of two temperatures
    do not go together.
    """
    with pytest.raises(UserError, match="temperature=0"):
        load("vla_opd", temperature=0.0)
    with pytest.raises(UserError, match="group=0 must be at least 1"):
        load("vla_opd", group=0)
    with pytest.raises(UserError, match="cannot be combined"):
        load("vla_opd + vla_opd(temperature=1.6)")
    assert load("vla_opd + grpo").actions == load("grpo + vla_opd").actions == Actions(256)


@pytest.mark.parametrize("arguments", [{}, {"bins": 5, "temperature": 1.6, "group": 2}])
def test_check(arguments):
    check(load("vla_opd", **arguments))


def test_a_run_acts_in_bins_and_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    """From a method's name to what was drawn: bins only, no end of sequence, the method's own
    number of rollouts, a teacher that is restricted as well; log pi_s - log pi_t falls.
    """
    result = distill(
        save_tiny(tmp_path / "student", seed=0, spread=0.05),
        save_tiny(tmp_path / "teacher", seed=1),
        [{"prompt": f"{i} plus {i}"} for i in range(4)],
        method=f"vla_opd(bins={ACTS})",
        output=str(tmp_path / "run"),
        **{**QUICK, "steps": 40, "prompts_per_step": 4, "num_generations": 1},
        learning_rate=1e-2,
        max_completion_length=3,
    )
    path = tmp_path / "run" / "samples" / "step_000001.jsonl"
    pieces = [json.loads(line)["pieces"] for line in path.read_text().splitlines()]
    tokenizer = tiny_tokenizer()
    bins = {tokenizer.decode([i]) for i in range(VOCAB - ACTS, VOCAB)}
    drawn = {piece for response in pieces for piece in response}
    assert len(drawn) > 4 and drawn <= bins
    assert result.metrics[0]["tokens/trained"] == 4 * 8 * 3
    kl = [line["teacher_kl/sampled"] for line in result.metrics]
    assert sum(kl[-10:]) < 0.6 * sum(kl[:10])


def test_models_that_speak_all_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another engine draws from the whole"):
        distill("x", "y", ["a"], method="vla_opd", sampler="vllm", output=str(tmp_path / "r"))
    with pytest.raises(UserError, match="a server teacher answers over its whole vocabulary"):
        distill("x", "http://127.0.0.1:9", ["a"], method="vla_opd", output=str(tmp_path / "r"))

"""The same tensors into TRL's GRPO loss variants and MiniLLM and into ours: losses and gradients,
every departure by name.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from opdkit.methods.method import load
from opdkit.testing import evaluate
from tests.methods.ragged import on
from tests.methods.toy import close, numbers

pytestmark = pytest.mark.peer

B, T, V = 4, 6, 11
GROUP, REWARD = [0, 0, 1, 1], [1.0, 0.0, 0.25, 1.0]
LIMIT = 8  # max_completion_length
EVERY = torch.ones(B, T, dtype=torch.bool)
RAGGED = torch.arange(T) < torch.tensor([6, 3, 1, 4])[:, None]


@pytest.fixture
def grpo_trainer():
    return pytest.importorskip("trl").GRPOTrainer


@pytest.fixture
def minillm_trainer():
    pytest.importorskip("trl")
    return pytest.importorskip(
        "trl.experimental.minillm", reason="this TRL has no MiniLLM (1.12 has, 1.15 has not)"
    ).MiniLLMTrainer


def random(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(
        B, T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


OLD, TOKENS = random(0), torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
STUDENT, OTHER = OLD + random(2, 0.4), random(3)


def logp(logits):
    return logits.log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0]


def trainer(kind, student, **settings):
    """A trainer of TRL without its engine: what its loss reads, and the student's log-probs where
    it would run a model.
    """
    made = object.__new__(kind)
    defaults = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LIMIT,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        "args": SimpleNamespace(
            use_bias_correction_kl=False, delta=settings.pop("delta", None), steps_per_generation=1
        ),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            logp(student),
            torch.zeros(B, T),
            None,
        ),
    }
    for name, value in (defaults | settings).items():
        setattr(made, name, value)
    return made


def inputs(mask, advantages):
    return {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1, dtype=torch.int64),
        "completion_ids": TOKENS,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": logp(OLD),
        "ref_per_token_logps": logp(OTHER),
        "num_items_in_batch": mask.sum(),
    }


def ours(mask, **arguments):
    facts = {"models": {"reference": OTHER}, "before_logits": OLD, "group": GROUP, "reward": REWARD}
    return evaluate(load("grpo", **arguments), STUDENT, TOKENS, mask, **facts)


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        ({"loss_type": "grpo"}, {"loss": "grpo"}),
        ({"loss_type": "dapo", "epsilon_high": 0.28}, {"loss": "dapo", "clip": (0.2, 0.28)}),
        ({"loss_type": "dr_grpo"}, {"loss": "dr_grpo", "advantage": "mean"}),
        ({"loss_type": "dapo", "delta": 1.5}, {"loss": "dapo", "dual_clip": 1.5}),
        ({"loss_type": "grpo", "beta": 0.3}, {"loss": "grpo", "reference_kl": 0.3}),
        ({"loss_type": "dapo", "beta": 0.3}, {"loss": "dapo", "reference_kl": 0.3}),
        ({"loss_type": "dr_grpo", "beta": 0.3}, {"loss": "dr_grpo", "reference_kl": 0.3}),
        # GSPO is TRL's "grpo" at the level of sequences
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"loss": "gspo"}),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.3},
            {"loss": "gspo", "reference_kl": 0.3},
        ),
        # TRL's epsilon_high of CISPO is the cap itself and it has no lower one: ours is 1 + high,
        # and 1 - low = 0
        ({"loss_type": "cispo", "epsilon_high": 1.2}, {"loss": "cispo", "clip": (1.0, 0.2)}),
    ],
)
@pytest.mark.parametrize("mask", [EVERY, RAGGED], ids=["whole", "ragged"])
def test_loss_variants(grpo_trainer, theirs, mine, mask):
    """The advantages are ours: TRL's, made elsewhere, adds 1e-4 to the deviation where we, as verl,
    add 1e-6.
    """
    out = ours(mask, max_completion_length=LIMIT, **mine)
    student = STUDENT.clone().requires_grad_()
    loss = trainer(grpo_trainer, student, **theirs)._compute_loss(
        None, inputs(mask, out.terms[0].credit[:, 0])
    )
    loss.backward()
    assert close(out.loss, loss.item(), 10) and close(out.grad, student.grad, 10)


def test_dr_grpo_counts_empty_rollouts_in_trl(grpo_trainer):
    """TRL divides by all rollouts, we by those with a trained token: 4 and 3."""
    mask = RAGGED & (torch.arange(B) != 2)[:, None]
    out = ours(mask, loss="dr_grpo", max_completion_length=LIMIT)
    loss = trainer(grpo_trainer, STUDENT, loss_type="dr_grpo")._compute_loss(
        None, inputs(mask, out.terms[0].credit[:, 0])
    )
    assert close(out.loss * 3 / 4, loss.item(), 10)


MINILLM = {"scale": 1.0, "discount": 0.0, "length_norm": False, "whiten": False}


@pytest.mark.parametrize("single_step", [True, False])
def test_minillm(minillm_trainer, single_step):
    """Fresh rollouts, all of one length, as TRL takes the padding for text.

    TRL leaves log pi_s attached inside its advantage, which adds the gradient of mean log pi_s,
    zero on average.
    """
    end = torch.zeros(B, 1, V, dtype=torch.float64)
    student = OLD.clone().requires_grad_()
    settings = {
        "kd_temperature": 1.0,
        "rkl_advantage": True,
        "gamma": 0.0,
        "length_normalization": False,
    }

    class Teacher:
        def eval(self): ...

        def __call__(self, **_):
            return SimpleNamespace(logits=torch.cat([OTHER, end], 1))

    made = trainer(
        minillm_trainer,
        student,
        teacher_model=Teacher(),
        single_step_decomposition=single_step,
        **settings,
    )
    reward = {"group": GROUP, "reward": REWARD}
    method = load("minillm", advantage="std", single_step=float(single_step), **MINILLM)
    out = evaluate(method, OLD, TOKENS, models={"teacher": OTHER}, **reward)
    advantage = evaluate("grpo", OLD, TOKENS, **reward).terms[0].credit[:, 0]
    loss = made.compute_loss(
        lambda **_: SimpleNamespace(logits=torch.cat([student, end], 1)), inputs(EVERY, advantage)
    )
    attached = torch.autograd.grad(logp(student).mean(), student)[0]
    loss.backward()
    assert close(out.loss, loss.item(), 10) and close(out.grad + attached, student.grad, 10)


def test_minillm_returns_of_trl(minillm_trainer):
    """TRL's discounted return carries a factor gamma^t, and its length is discounted too; ours are
    the paper's.
    """
    gaps = numbers(0.2, -0.4, 0.6)[None]
    for length_norm, theirs, mine in (
        (False, (0.3615, 0.1615, 0.5415), (0.3615, 0.17, 0.6)),
        (True, (0.126731, 0.087179, 0.6), (0.1205, 0.085, 0.6)),
    ):
        made = object.__new__(minillm_trainer)
        made.gamma, made.length_normalization = 0.95, length_norm
        assert close(made._compute_advantage(torch.zeros(1, 3).double(), gaps)[0], theirs)
        method = load("minillm", scale=1.0, whiten=False, single_step=0.0, length_norm=length_norm)
        out = on(method, [[-1.5] * 3], models={"teacher": [(gaps[0] - 1.5).tolist()]})
        assert close(out.terms[0].credit[0], mine)

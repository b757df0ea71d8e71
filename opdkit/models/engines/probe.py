"""Whether an engine holds the student's weights: log-probs of a few fixed texts, the engine's
against the trainer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opdkit.base.errors import UserError
from opdkit.models.body import hidden_states
from opdkit.models.load import CausalLM, evaluating
from opdkit.objective.head import Head

TEXTS = (
    "The sum of 12 and 30 is 42, because 10 + 30 = 40 and 40 + 2 = 42.",
    "Question: a train leaves at 9:15 and arrives at 11:40. How long does the journey take?",
    "def area(r):\n    return 3.14159 * r ** 2\n",
    "Let x = f(y) / 2; naïve café, 你好, привет!",
)
LENGTH = 48  # tokens of each text that are read

# Mean absolute difference of log-probs, nats, that two correct implementations may show. In float32
# it is 1e-6 to 1e-5, and up to 1e-3 on a GPU whose matrix products are TF32; in 16 bits logits
# carry 8 to 11 significant bits: in bfloat16 it is 0.01 to 0.04.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
MOVED = (
    # of the tolerance: where the trainer's log-probs have moved by more, an engine whose own are
    # the same to a bit is stale
    0.01
)


class Differs(UserError):
    """An engine does not say what the student does."""

    def __init__(self, text: str, said: str):
        super().__init__(text)
        self.said = said  # the finding alone


class Probe:
    """Fixed sequences, the trainer's log-probs of them, and what the engine says."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        head: Callable[[], Head],
        dtype: torch.dtype,
        limit: int | None = None,
        tolerance: float | None = None,
        known: Callable[[], Tensor | None] = lambda: None,
    ):
        self.model, self.head, self.dtype = model, head, dtype  # the head as it is now
        # log-probs [N] of the trainer's, where `model` is a copy that would take long to find them
        self.known = known
        self.tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
        longest = min(LENGTH, LENGTH if limit is None else limit - 1)
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        self.sequences = [ids[:longest] for ids in texts if len(ids) > 1]
        self.names = [f"probe {i} of the engine's weights" for i in range(len(self.sequences))]
        self.gap: float | None = None  # of the last check
        self._engine: Tensor | None = None  # log-probs at the last check
        self._trainer: Tensor | None = None

    @torch.no_grad()
    def expected(self) -> Tensor:
        """[N]: the trainer's log-probs of all tokens but the first of each sequence.

        One forward pass: all processes over which the model is spread take part.
        """
        known = self.known()
        if known is not None and len(known) == sum(len(s) - 1 for s in self.sequences):
            return known
        device = next(self.model.parameters()).device
        ids = pad_sequence([torch.tensor(s) for s in self.sequences], batch_first=True).to(device)
        head = self.head()
        with evaluating(self.model):
            hidden = hidden_states(self.model, ids, None)
            logps = [
                head.logits(hidden[i, : len(s) - 1])
                .float()
                .log_softmax(-1)
                .gather(1, ids[i, 1 : len(s), None])[:, 0]
                for i, s in enumerate(self.sequences)
            ]
        return torch.cat(logps).cpu()

    def repeat(self, engine: Sequence[Tensor], who: str) -> None:
        """An error where an engine's log-probs, [T - 1] of each sequence of T tokens, are not those
        of the last check: it holds other weights than it was sent.
        """
        assert self._engine is not None
        gap = float((torch.cat(list(engine)).float().cpu() - self._engine).abs().mean())
        if not gap <= self.tolerance:
            said = (
                "other log-probs of the probe than after the last step's weights were sent, by "
                f"{gap:.3g} nats in the mean: it was started again, and lost them"
            )
            raise Differs(
                f"{who} gives {said}. Nothing was learnt from this step; see to it that it stays "
                "up, and continue with --resume",
                f"it gives {said}",
            )

    def check(self, engine: Sequence[Tensor], own: Tensor, version: int, how: str) -> float:
        """Mean absolute difference of log-probs; an error where the engine does not follow the
        trainer.

        `engine` holds the engine's of each probe sequence, [T - 1] of its T tokens; `own` what was
        `expected` [N] when the weights were as they were sent; `how` names the way they are sent.
        """
        theirs = torch.cat(list(engine)).float().cpu()
        gap = float((theirs - own).abs().mean())
        same = self._engine is not None and torch.equal(theirs, self._engine)
        moved = 0.0 if self._trainer is None else float((own - self._trainer).abs().mean())
        self.gap, self._engine, self._trainer = gap, theirs, own
        if not gap <= self.tolerance:
            raise Differs(
                f"after {how} (optimiser step {version}) the engine's log-probs are not the "
                f"student's: they differ by {gap:.3g} nats in the mean over {len(own)} tokens, and "
                f"by at most {float((theirs - own).abs().max()):.3g}; allowed in {self.dtype} is a "
                f"mean of {self.tolerance:g}. It would sample from other weights than are trained, "
                "so the run stops. If it happens at the first step, this engine computes the model "
                "otherwise than transformers does, or takes weights over in part only: sample in "
                "this process instead (sampler=hf), or in float32 to see whether rounding is the "
                "cause. Where the difference is known and harmless, raise sync_tolerance and set "
                "recompute_student=true",
                f"its log-probs are not the student's: they differ by {gap:.3g} nats in the mean",
            )
        if same and moved > MOVED * self.tolerance:
            raise Differs(
                f"after {how} (optimiser step {version}) the engine's log-probs are to a bit what "
                f"they were before, while the student's have moved by {moved:.3g} nats in the "
                "mean: the new weights did not arrive, so the run stops. Look at the engine's log",
                "its log-probs are to a bit what they were before: the weights did not arrive",
            )
        return gap

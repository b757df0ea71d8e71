"""Responses written under a privileged prompt, which are learnt from under the plain one as well
(pi-Distill).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opdkit.curricula.base import Plain
from opdkit.curricula.writer import StepContext, Writer
from opdkit.types import NEVER_FRESH, Rollout, Sampling

PRIVILEGED = "privileged"  # the mark of what stands behind the privileged prompt


@dataclass(frozen=True)
class BothContexts(Writer):
    """The student under the prompts that `view` writes, and each of these responses again behind
    its plain prompt.

    The copy has the log-probs under which its tokens were drawn, which are no longer those of the
    student under its prompt: it is never fresh, and what it is to the student before the step is
    computed. Both are of one group: every response is in it twice, which leaves its mean as it is,
    and both are learnt from in the same optimiser step.
    """

    view: str

    @property
    def views(self) -> tuple[str, ...]:
        return (self.view,)

    @property
    def marks(self) -> frozenset[str]:
        return frozenset({PRIVILEGED})

    def rollouts(self, sampling: Sampling) -> int:
        return 2 * sampling.num_generations

    def write(self, context: StepContext) -> list[Rollout]:
        shown = [context.viewed(prompt, self.view) for prompt in context.prompts]
        plain = [p for p in context.prompts for _ in range(context.sampling.num_generations)]
        written = context.sample(shown, context.sampling)
        return [
            made
            for rollout, prompt in zip(written, plain, strict=True)
            for made in (
                replace(rollout, marks={**rollout.marks, PRIVILEGED: [True] * len(rollout.tokens)}),
                replace(
                    rollout,
                    id=f"{rollout.id}/plain",
                    prompt=prompt.tokens,
                    policy_version=NEVER_FRESH,
                    notes=None,
                ),
            )
        ]


@dataclass(frozen=True)
class TwoContexts(Plain):
    """Every response is drawn under the prompt as `view` writes it, and is there twice: behind that
    prompt, all of its tokens marked "privileged", and behind the plain one. arXiv 2602.04942.
    """

    view: str = "hint"

    @property
    def writer(self) -> Writer:
        return BothContexts(self.view)

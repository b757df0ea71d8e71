"""The sampler inside this process: a Hugging Face model, its key-value cache, and a batch that rows
leave as they finish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from opdkit.base.errors import UserError
from opdkit.models.body import head_of
from opdkit.models.load import CausalLM, evaluating
from opdkit.models.precision import computing, products_of
from opdkit.models.tokenizers import real_vocabulary
from opdkit.objective.head import Head
from opdkit.objective.products import narrow
from opdkit.sampling.attention import decoding
from opdkit.sampling.check import check_model, check_prompts
from opdkit.sampling.decode import Decoding, Guide
from opdkit.sampling.draws import check_sampling
from opdkit.sampling.finish import Tick, finish, rollout_ids
from opdkit.sampling.kv_cache import check_states, tokens_that_fit
from opdkit.types import Prompt, Replies, Rollout, Sampling, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_TOKENS = 1 << 14  # prompt tokens, with padding, in one forward pass


class HFSampler:
    """Samples from a causal LM in this process.

    `head` defaults to the model's own, cut to the tokenizer's real tokens, and no id beyond the cut
    is ever drawn; a function is asked for it anew each time. `max_batch_tokens` bounds the cache
    (rows x longest possible row); by default it fills half of the accelerator's free memory, or 2
    GiB of a CPU's. With a `guide`, tokens are drawn from its mixture with the model; `logp` stays
    the model's own, as does what is noted by `watch`. Draws are keyed by seed, rollout id and
    position: a rollout depends neither on the other prompts nor on the batch it was sampled in.
    """

    continues = True  # it takes `replies`
    gives_each = True  # it takes `each`

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        head: Head | Callable[[], Head] | None = None,
        max_batch_tokens: int | None = None,
        guide: Guide | None = None,
        watch: Watch = Watch(),
    ):
        self.model, self.tokenizer, self.head, self.max_batch_tokens = (
            model,
            tokenizer,
            head,
            max_batch_tokens,
        )
        self.guide, self.watch = guide, watch
        self._checked = False

    def sync(self, model: CausalLM, version: int) -> None:
        """After an optimiser step: the model in this process is the student itself, so there is
        nothing to copy.
        """
        check_model(self.model, model)

    def _budget(self, longest: int, sampling: Sampling) -> int:
        """Tokens of the cache; refused where one rollout, or this model, does not fit it."""
        if not self._checked:
            check_states(self.model)
            self._checked = True
        budget = (
            tokens_that_fit(self.model) if self.max_batch_tokens is None else self.max_batch_tokens
        )
        if budget < longest:
            raise UserError(
                f"max_batch_tokens={budget} is less than one rollout may need ({longest} tokens: "
                f"the longest prompt and max_completion_length={sampling.max_completion_length}); "
                "raise it or shorten the rollouts"
            )
        return budget

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int = 0,
        step: int | None = 0,
        policy_version: int = 0,
        progress: Tick | None = None,
        replies: Replies | None = None,
        each: Callable[[Rollout], object] | None = None,
    ) -> list[Rollout]:
        """All responses to the first prompt, then to the second, ...; rollout ids are
        step/prompt/number, without the step where it is None.

        A response ends with a stop token (kept, trained), with the token that completes a stop
        string (tokens kept, text cut), or at `max_completion_length`. A prompt's prefix opens its
        responses: marked "guided", with log-probs under the model's plain softmax. With `replies` a
        response goes on where its turn has ended, until nothing answers it; what others write in it
        has log-prob 0. `each` is told of rollouts a few tokens after they have ended.
        """
        check_sampling(sampling)
        if not prompts:
            return []
        head = self.head() if callable(self.head) else self.head
        head = head or head_of(self.model, real_vocabulary(self.tokenizer))
        longest = check_prompts(prompts, sampling, self.model, head)
        budget = self._budget(longest, sampling)
        ids = rollout_ids(prompts, sampling, step)
        models = [self.model] if self.guide is None else [self.model, self.guide.model]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(evaluating(model))
                stack.enter_context(computing(model))
                stack.enter_context(decoding(model))
            # inference_mode is a little faster, but under it a weight that learns is rounded anew
            # for each token
            stack.enter_context(
                torch.no_grad()
                if any(narrow(products_of(model)) for model in models)
                else torch.inference_mode()
            )
            task = Decoding(
                self.model,
                self.tokenizer,
                head.ready(),
                prompts,
                sampling,
                ids,
                seed,
                progress,
                self.guide,
                self.watch,
                replies,
            )

            if each is not None:
                task.hear = partial(self._hear, task, policy_version, each)
            task.run(budget // longest, max(1, PREFILL_TOKENS // longest))
        return finish(prompts, sampling, ids, task.responses(), self.tokenizer, policy_version)

    def _hear(
        self,
        task: Decoding,
        policy_version: int,
        each: Callable[[Rollout], object],
        rows: list[int],
    ) -> None:
        """Tells of rollouts that have ended, by their numbers."""
        n, one = task.sampling.num_generations, replace(task.sampling, num_generations=1)
        prompts, ids = [task.prompts[row // n] for row in rows], [task.ids[row] for row in rows]
        made = task.responses(rows)
        for rollout in finish(prompts, one, ids, made, self.tokenizer, policy_version):
            each(rollout)

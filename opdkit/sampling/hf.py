"""The sampler inside this process: a Hugging Face model, its key-value cache, and a batch that rows
leave as they finish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.body import head_of, hidden_states
from opdkit.models.load import CausalLM, evaluating
from opdkit.models.tokenizers import real_vocabulary, stop_ids
from opdkit.objective.head import Head, chunk_rows, slices
from opdkit.objective.kernels import Vocabulary
from opdkit.objective.maths import mixture
from opdkit.sampling.attention import decoding, spread
from opdkit.sampling.draws import check_sampling, choose, row_uniform
from opdkit.sampling.finish import DECODE, Response, finish, refuse_broken, rollout_ids
from opdkit.sampling.kv_cache import join, new_cache, pad_left, select, shrink, tokens_that_fit
from opdkit.types import Notes, Prompt, Rollout, Sampling, Watch, row_keys

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedTokenizerBase

PREFILL_TOKENS = 1 << 14  # prompt tokens, with padding, in one forward pass
REFILL_SHARE = 0.25  # of the row budget has to be free before waiting prompts join a running batch
# of the columns have to be padding for all rows before they are cut off, which copies the cache
TRIM_SHARE = 0.125
# tokens decoded before those of a stop string: some decoders drop the space before the first token
STOP_MARGIN = 4

Progress = Callable[[int], object]  # called with the number of rollouts finished so far


@dataclass(frozen=True)
class Guide:
    """A second model that takes part in decoding: tokens are drawn from share * guide + (1 - share)
    * student (MiniLLM).
    """

    model: CausalLM
    head: Head
    share: float


class HFSampler:
    """Samples from a causal LM in this process.

    `head` defaults to the model's own, cut to the tokenizer's real tokens, and no id beyond the cut
    is ever drawn. `max_batch_tokens` bounds the cache (rows x longest possible row); by default it
    fills half of the accelerator's free memory, or 2 GiB of a CPU's. With a `guide`, tokens are
    drawn from its mixture with the model; `logp` stays the model's own, as does what is noted by
    `watch`. Draws are keyed by seed, rollout id and position: a rollout depends neither on the
    other prompts nor on the batch it was sampled in.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        head: Head | None = None,
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

    def sync(self, model: CausalLM, version: int) -> None:
        """After an optimiser step: the model in this process is the student itself, so there is
        nothing to copy.
        """
        if model is not self.model:
            raise ValueError(
                "this sampler samples from another model than the one that was trained"
            )

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int = 0,
        step: int | None = 0,
        policy_version: int = 0,
        progress: Progress | None = None,
    ) -> list[Rollout]:
        """All responses to the first prompt, then to the second, ...; rollout ids are
        step/prompt/number, without the step where it is None.

        A response ends with a stop token (kept, trained), with the token that completes a stop
        string (tokens kept, text cut), or at `max_completion_length`. A prompt's prefix opens its
        responses: marked "guided", with log-probs under the model's plain softmax.
        """
        check_sampling(sampling)
        if not prompts:
            return []
        head = self.head or head_of(self.model, real_vocabulary(self.tokenizer))
        longest = check_prompts(prompts, sampling, self.model, head)
        budget = (
            tokens_that_fit(self.model) if self.max_batch_tokens is None else self.max_batch_tokens
        )
        if budget < longest:
            raise UserError(
                f"max_batch_tokens={budget} is less than one rollout may need ({longest} tokens: "
                f"the longest prompt and max_completion_length={sampling.max_completion_length}); "
                "raise it or shorten the rollouts"
            )
        ids = rollout_ids(prompts, sampling, step)
        models = [self.model] if self.guide is None else [self.model, self.guide.model]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(evaluating(model))
                stack.enter_context(decoding(model))
            # inference_mode is a little faster, but under it autocast casts every weight anew for
            # each token
            stack.enter_context(
                torch.no_grad()
                if torch.is_autocast_enabled(self.model.device.type)
                else torch.inference_mode()
            )
            run = _Run(
                self.model,
                self.tokenizer,
                head,
                prompts,
                sampling,
                ids,
                seed,
                progress,
                self.guide,
                self.watch,
            )
            run.sample(budget // longest, max(1, PREFILL_TOKENS // longest))
        return finish(prompts, sampling, ids, run.responses(), self.tokenizer, policy_version)


def check_prompts(
    prompts: Sequence[Prompt], sampling: Sampling, model: CausalLM, head: Head
) -> int:
    """Refuses prompts that cannot be sampled from; returns the tokens that the longest rollout may
    have.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    embedding: Any = model.get_input_embeddings()
    known, rows = len(embedding.weight), head.size(embedding.weight)
    seen: set[str] = set()
    for prompt in prompts:
        length = len(prompt.tokens) + sampling.max_completion_length
        if prompt.id in seen:
            raise UserError(
                f"two prompts have the id {prompt.id!r}, which keys the random draws: for more "
                "responses raise num_generations"
            )
        seen.add(prompt.id)
        if not prompt.tokens:
            raise UserError(
                f"prompt {prompt.id!r} has no tokens: the model needs at least one to continue"
            )
        if limit is not None and length > limit:
            raise UserError(
                f"prompt {prompt.id!r} has {len(prompt.tokens)} tokens, with "
                f"max_completion_length={sampling.max_completion_length} that is {length}, but the "
                f"model has {limit} positions: shorten the prompt or lower max_completion_length"
            )
        if len(prompt.prefix) > sampling.max_completion_length:
            raise UserError(
                f"the prefix of prompt {prompt.id!r} has {len(prompt.prefix)} tokens, more than "
                f"max_completion_length={sampling.max_completion_length}: shorten the prefix or "
                "raise the limit"
            )
        if max(prompt.tokens) >= known or max(prompt.prefix, default=0) >= rows:
            raise UserError(
                f"prompt {prompt.id!r} holds token id {max(prompt.tokens + prompt.prefix)}, but "
                f"the model embeds {known} ids and its head has {rows}: it was tokenised with "
                "another model's tokenizer"
            )
    return max(len(p.tokens) for p in prompts) + sampling.max_completion_length


@dataclass(frozen=True)
class _Unit:
    """Completions of one prompt that are prefilled once."""

    prompt: Prompt
    rows: range  # rollouts


@dataclass
class _Rows:
    """The running batch: row b is rollout `row[b]`; its columns end with the last token fed."""

    caches: list[DynamicCache]  # the student's, and the guide's where there is one
    mask: Tensor  # [B, C] bool: the columns that hold a token, aligned on the right
    padded: bool  # whether any does not
    row: Tensor  # [B]
    length: Tensor  # [B] tokens in the cache
    count: Tensor  # [B] response tokens drawn or given
    token: Tensor  # [B] the last one, not yet in the cache
    tail: Tensor  # [B, K] the last tokens drawn, -1 before the first; K = 0 without stop strings

    def keep(self, kept: Tensor) -> None:
        """Lets the rows [B] that are not kept leave: rows from behind move into their places.

        Columns that are padding for all rows by then go with them, once they are worth the copy.
        """
        rows = int(kept.sum())
        index = torch.arange(rows, device=kept.device)
        holes, moved = (~kept[:rows]).nonzero()[:, 0], rows + kept[rows:].nonzero()[:, 0]
        index[holes] = moved
        self.length = self.length[index]
        columns = self.mask.shape[1]
        trim = columns - int(self.length.max())
        trim = trim if trim > TRIM_SHARE * columns else 0
        for cache in self.caches:
            if trim:
                select(cache, index, trim)
            else:
                shrink(cache, holes, moved, rows)
        self.mask = self.mask[index, trim:]
        self.padded = not bool(self.mask.all())
        self.row, self.count, self.token, self.tail = (
            self.row[index],
            self.count[index],
            self.token[index],
            self.tail[index],
        )

    def join(self, other: _Rows) -> None:
        columns = max(self.mask.shape[1], other.mask.shape[1])
        self.padded = self.padded or other.padded or self.mask.shape != other.mask.shape
        for cache, more in zip(self.caches, other.caches):
            join(cache, more)
        self.mask = torch.cat([pad_left(self.mask, columns, 1), pad_left(other.mask, columns, 1)])
        for name in ("row", "length", "count", "token", "tail"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


class _Run:
    """One call of `sample`: what waits, what runs, what has been drawn."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        head: Head,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        ids: list[str],
        seed: int,
        progress: Progress | None,
        guide: Guide | None = None,
        watch: Watch = Watch(),
    ):
        self.model, self.tokenizer, self.head, self.prompts = model, tokenizer, head, prompts
        self.guide, self.watch = guide, watch
        self.models = [model] if guide is None else [model, guide.model]
        self.sampling, self.ids, self.seed, self.progress = sampling, ids, seed, progress
        self.device = model.device
        self.keys = row_keys(ids, self.device)
        self.stop_ids = stop_ids(model, tokenizer)
        self.stops = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=self.device)
        self.tail = (
            max(len(s.encode()) for s in sampling.stop) + STOP_MARGIN if sampling.stop else 0
        )
        self.stopped = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        self.finished = 0
        # row, token, logp, drawn_logp, what is watched: of each step [B] or [B, k]
        self.record: list[tuple[Tensor, ...]] = []

    def sample(self, rows: int, prefill: int) -> None:
        """Runs to the end with at most `rows` rows at once and `prefill` prompts in one forward
        pass.
        """
        size = min(self.sampling.num_generations, rows)
        waiting = self._units(size)
        running: _Rows | None = None
        while waiting or running:
            free = rows - (len(running.row) if running else 0)
            if waiting and (not running or free >= max(size, REFILL_SHARE * rows)):
                number = min(prefill, max(1, free // size))
                joining = self._admit(waiting[:number])
                del waiting[:number]
                if running and joining:
                    running.join(joining)
                running = running or joining
            elif running:
                running = self._advance(running)

    def _units(self, size: int) -> list[_Unit]:
        """Long prompts first: prompts of like length are prefilled together."""
        n = self.sampling.num_generations
        order = sorted(
            range(len(self.prompts)),
            key=lambda p: -len(self.prompts[p].tokens + self.prompts[p].prefix),
        )
        return [
            _Unit(self.prompts[p], range(p * n + c, p * n + min(n, c + size)))
            for p in order
            for c in range(0, n, size)
        ]

    # ------------------------------------------------------------------------------- forward passes

    def _admit(self, units: list[_Unit]) -> _Rows | None:
        """Prefills each prompt once, then one row for each completion with its first token drawn;
        None where all have finished.
        """
        texts = [unit.prompt.tokens + unit.prompt.prefix for unit in units]
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        width = max(len(text) for text in texts)
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts], device=self.device)
        mask = torch.arange(width, device=self.device) >= width - lengths[:, None]
        padded = min(len(text) for text in texts) < width
        caches = [new_cache(model) for model in self.models]
        states = [
            hidden_states(m, ids, mask if padded else None, past_key_values=c)
            for m, c in zip(self.models, caches)
        ]
        self._record_prefixes(units, states[0])
        open_units = [i for i, unit in enumerate(units) if not self._complete(unit)]
        rows = torch.tensor(
            [r for i in open_units for r in units[i].rows], dtype=torch.int64, device=self.device
        )
        if not len(rows):
            return None
        index = torch.tensor([i for i in open_units for _ in units[i].rows], device=self.device)
        given = torch.tensor(
            [len(units[i].prompt.prefix) for i in open_units for _ in units[i].rows],
            device=self.device,
        )
        tail = torch.full((len(rows), self.tail), -1, device=self.device)
        for cache in caches:
            select(cache, index)
        batch = _Rows(
            caches, mask[index], padded, rows, lengths[index], given, torch.empty_like(rows), tail
        )
        return self._draw(batch, [hidden[index, -1] for hidden in states])

    def _advance(self, batch: _Rows) -> _Rows | None:
        """Feeds the last tokens and draws the next ones."""
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.row), 1)], 1)
        mask = batch.mask if batch.padded else None
        states = [
            hidden_states(
                model,
                batch.token[:, None],
                spread(model, mask, cache),
                batch.length[:, None],
                cache,
            )[:, -1]
            for model, cache in zip(self.models, batch.caches)
        ]
        batch.length = batch.length + 1
        return self._draw(batch, states)

    def _draw(self, batch: _Rows, states: list[Tensor]) -> _Rows | None:
        """Draws a token for each row from hidden states [B, H] of each model, notes it, and lets
        the rows that it finishes leave.
        """
        uniform = row_uniform(self.keys[batch.row], self.seed, batch.count)
        size = chunk_rows(self.head.size(states[0]), self.device)
        parts = [
            self._choose([h[at] for h in states], uniform[at]) for at in slices(len(uniform), size)
        ]
        drawn = parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts))
        self.record.append((batch.row, *drawn))
        token, logp = drawn[:2]
        batch.token, batch.count = token, batch.count + 1
        stopped = (token[:, None] == self.stops).any(1)
        if self.tail:
            batch.tail = torch.cat([batch.tail[:, 1:], token[:, None]], 1)
            stopped |= self._wrote_stop(batch.tail)
        bad = ~logp.isfinite()
        done = stopped | (batch.count >= self.sampling.max_completion_length)
        # the one moment in a step when the host waits for the device
        if not bool((done | bad).any()):
            return batch
        if bool(bad.any()):
            refuse_broken(self.ids[int(batch.row[bad][0])])
        self.stopped[batch.row[done]] = stopped[done]
        left = int((~done).sum())
        self._tick(len(done) - left)
        if not left:
            return None
        batch.keep(~done)
        return batch

    def _choose(self, states: list[Tensor], uniform: Tensor) -> tuple[Tensor, ...]:
        """Tokens, their log-probs under the student's plain softmax, and under what they are drawn
        from; what is watched.
        """
        logits = self.head.logits(states[0])
        if self.guide is None:
            return *choose(logits, self.sampling, uniform), *self._watched(logits)
        own = logits.log_softmax(-1)
        token, _, drawn = choose(
            mixture(self.guide.head.logits(states[1]).log_softmax(-1), own, self.guide.share),
            self.sampling,
            uniform,
        )
        return token, own.gather(-1, token[:, None])[:, 0], drawn, *self._watched(logits)

    def _watched(self, logits: Tensor) -> list[Tensor]:
        """Entropy [n], top ids and their log-probs [n, k], those of them that are asked for."""
        seen, own = [], Vocabulary(logits)
        if self.watch.entropy:
            seen.append(own.statistics()[1])
        if self.watch.top:
            ids = logits.topk(min(self.watch.top, logits.shape[-1]), -1).indices
            seen += [ids, own.at(ids)]
        return seen

    def _wrote_stop(self, tail: Tensor) -> Tensor:
        """[B] bool: whether the last tokens drawn hold a stop string."""
        texts = self.tokenizer.batch_decode(
            [[t for t in tokens if t >= 0] for tokens in tail.tolist()], **DECODE
        )
        return torch.tensor(
            [any(s in text for s in self.sampling.stop) for text in texts], device=self.device
        )

    # ------------------------------------------------------------------------------------- prefixes

    def _complete(self, unit: _Unit) -> bool:
        """Whether the prefix is the whole response; if so its rollouts are finished here."""
        prefix = unit.prompt.prefix
        ended = bool(prefix) and prefix[-1] in self.stop_ids
        if not ended and len(prefix) < self.sampling.max_completion_length:
            return False
        self.stopped[unit.rows.start : unit.rows.stop] = ended
        self._tick(len(unit.rows))
        return True

    def _record_prefixes(self, units: list[_Unit], hidden: Tensor) -> None:
        """Notes the prefix tokens of every row with their log-probs, from the prefill's hidden
        states [U, T, H].
        """
        guided = [(i, unit) for i, unit in enumerate(units) if unit.prompt.prefix]
        if not guided:
            return
        states = torch.cat([hidden[i, -len(unit.prompt.prefix) - 1 : -1] for i, unit in guided])
        tokens = torch.tensor(
            [t for _, unit in guided for t in unit.prompt.prefix], device=self.device
        )

        size = chunk_rows(self.head.size(states), self.device)
        parts = []
        for at in slices(len(states), size):
            logits = self.head.logits(states[at])
            logp = logits.gather(-1, tokens[at, None])[:, 0] - logits.logsumexp(-1)
            parts.append((logp, logp, *self._watched(logits)))
        columns = [torch.cat(part) for part in zip(*parts)]
        start, logp = 0, columns[0]
        for _, unit in guided:
            at = slice(start, start + len(unit.prompt.prefix))
            start = at.stop
            if not bool(logp[at].isfinite().all()):
                refuse_broken(self.ids[unit.rows.start])
            seen = [tokens[at], *(column[at] for column in columns)]
            self.record += [(torch.full_like(tokens[at], row), *seen) for row in unit.rows]

    # -------------------------------------------------------------------------------------- results

    def responses(self) -> list[Response]:
        """What was written after each prompt, and what was watched meanwhile."""
        row, *columns = (torch.cat(column) for column in zip(*self.record))
        # stable: the tokens of a row stay in the order of their drawing
        order = row.argsort(stable=True)
        token, logp, drawn_logp = (column[order].tolist() for column in columns[:3])
        seen = [column[order] for column in columns[3:]]
        ends = row.bincount(minlength=len(self.ids)).cumsum(0).tolist()
        spans = zip([0, *ends], ends, self.stopped.tolist())
        return [
            Response(
                token[a:b], logp[a:b], drawn_logp[a:b], stopped, self._notes([s[a:b] for s in seen])
            )
            for a, b, stopped in spans
        ]

    def _notes(self, seen: list[Tensor]) -> Notes | None:
        """What was watched of one rollout."""
        if not seen:
            return None
        entropy = seen.pop(0) if self.watch.entropy else None
        return Notes(entropy, *(seen if seen else (None, None)))

    def _tick(self, finished: int) -> None:
        self.finished += finished
        if self.progress is not None:
            self.progress(self.finished)

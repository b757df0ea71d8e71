"""How the sampler in this process decodes: waiting rollouts are admitted to the batch, and each
step draws a token for every row, records it and releases the rows that it finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opdkit.models.body import hidden_states
from opdkit.models.load import CausalLM
from opdkit.models.tokenizers import stop_ids
from opdkit.objective.head import Head, chunk_rows, slices
from opdkit.objective.kernels import Vocabulary
from opdkit.objective.maths import mixture
from opdkit.sampling.attention import spread
from opdkit.sampling.draws import choose, row_uniform
from opdkit.sampling.finish import Response, Tick, refuse_broken, with_stops
from opdkit.sampling.going_on import fed
from opdkit.sampling.kv_cache import new_cache, select
from opdkit.sampling.rows import Record, Rows, Unit
from opdkit.types import Prompt, Replies, Sampling, Turn, Watch, row_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFILL_SHARE = 0.25  # of the row budget has to be free before waiting prompts join a running batch
# tokens decoded before those of a stop string: some decoders drop the space before the first token
STOP_MARGIN = 4
# steps, at least, between two tellings of rows that have ended: each lays together all that is
# drawn
HEAR_EVERY = 16
ANSWER_SHARE = 0.25  # of the rows have to have ended their turns before these are answered together


@dataclass(frozen=True)
class Guide:
    """A second model that takes part in decoding: tokens are drawn from share * guide + (1 - share)
    * student (MiniLLM).
    """

    model: CausalLM
    head: Head
    share: float


@dataclass
class Decoding:
    """One call of `HFSampler.sample`: what is asked for, and what has been drawn so far."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    head: Head
    prompts: Sequence[Prompt]
    sampling: Sampling
    ids: list[str]  # of the rollouts: `num_generations` of the first prompt, then of the second
    seed: int
    tick: Tick | None = None
    guide: Guide | None = None
    watch: Watch = Watch()
    replies: Replies | None = None  # what answers a turn; None: a response is one turn
    records: list[Record] = field(default_factory=list)
    finished: int = 0  # rollouts
    parked: list[Rows] = field(default_factory=list)  # whose turn has ended, unanswered
    # is told which rollouts have ended, and may ask for their `responses`
    hear: Callable[[list[int]], object] | None = None
    ended: list[int] = field(default_factory=list)  # of which it has not been told yet

    def __post_init__(self) -> None:
        if self.guide is not None:
            self.guide = replace(self.guide, head=self.guide.head.ready())
        self.models = [self.model] if self.guide is None else [self.model, self.guide.model]
        self.device = self.model.device
        self.keys = row_keys(self.ids, self.device)
        self.stop_ids = stop_ids(self.model, self.tokenizer)
        self.stops = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=self.device)
        stop = self.sampling.stop  # the strings
        self.tail = max(len(s.encode()) for s in stop) + STOP_MARGIN if stop else 0  # tokens
        self.decode = with_stops(stop, self.tokenizer)
        # [rollouts] whether it ended itself
        self.stopped = torch.zeros(len(self.ids), dtype=torch.bool, device=self.device)

    def run(self, rows: int, prefill: int) -> None:
        """To the end, with at most `rows` rows at once and `prefill` prompts in one forward
        pass.
        """
        size = min(self.sampling.num_generations, rows)
        waiting = self._units(size)
        running: Rows | None = None
        tokens = 0  # drawn since `hear` was told
        while waiting or running or self.parked:
            tokens += 1
            if self.ended and self.hear is not None and tokens >= HEAR_EVERY:
                self.hear(self.ended)
                self.ended, tokens = [], 0
            live = len(running.row) if running else 0
            unanswered = sum(len(part.row) for part in self.parked)
            free = rows - live - unanswered
            if unanswered and unanswered >= ANSWER_SHARE * (live + unanswered):
                joining = self._go_on()
                if running and joining:
                    running.join(joining)
                running = running or joining
            elif waiting and (not running or free >= max(size, REFILL_SHARE * rows)):
                number = min(prefill, max(1, free // size))
                admitted = self._admit(waiting[:number])
                del waiting[:number]
                joining = self._next(*admitted) if admitted else None
                if running and joining:
                    running.join(joining)
                running = running or joining
            elif running:
                running = self._next(running, self._feed(running))
        if self.ended and self.hear is not None:
            self.hear(self.ended)

    def _next(self, batch: Rows, states: list[Tensor]) -> Rows | None:
        """One more token for each row, from hidden states [B, H] of each model; None where all rows
        are finished by it.
        """
        drawn = self._draw(batch, states)
        self._record(batch, drawn)
        return self._release(batch, drawn)

    def _units(self, size: int) -> list[Unit]:
        """Long prompts first: prompts of like length are prefilled together."""
        n = self.sampling.num_generations
        order = sorted(
            range(len(self.prompts)),
            key=lambda p: -len(self.prompts[p].tokens + self.prompts[p].prefix),
        )
        return [
            Unit(self.prompts[p], range(p * n + c, p * n + min(n, c + size)))
            for p in order
            for c in range(0, n, size)
        ]

    # ---------------------------------------------------------------------------- admit: new rows

    def _admit(self, units: list[Unit]) -> tuple[Rows, list[Tensor]] | None:
        """Prefills each prompt once, then a row for each completion, with the hidden states [B, H]
        of each model that its first token is drawn from; None where no completion is left to write.
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
        batch = Rows(
            caches=caches,
            mask=mask[index],
            padded=padded,
            row=rows,
            length=lengths[index],
            count=given,
            begun=given,
            token=torch.empty_like(rows),
            tail=tail,
        )
        return batch, [hidden[index, -1] for hidden in states]

    def _complete(self, unit: Unit) -> bool:
        """Whether the prefix is the whole response; if so its rollouts are finished here."""
        prefix = unit.prompt.prefix
        ended = bool(prefix) and prefix[-1] in self.stop_ids and self.replies is None
        if not ended and len(prefix) < self.sampling.max_completion_length:
            return False
        self.stopped[unit.rows.start : unit.rows.stop] = ended
        self._tell(len(unit.rows))
        return True

    # ------------------------------------------------------------------- draw: a token for each row

    def _feed(self, batch: Rows) -> list[Tensor]:
        """Puts the last tokens into the caches; hidden states [B, H] of each model after them."""
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
        return states

    def _draw(self, batch: Rows, states: list[Tensor]) -> Record:
        """A token for each row, from hidden states [B, H] of each model."""
        uniform = row_uniform(self.keys[batch.row], self.seed, batch.count)
        size = chunk_rows(self.head.size(states[0]), self.device)
        return Record.joined(
            [
                self._choose(batch.row[at], [h[at] for h in states], uniform[at])
                for at in slices(len(uniform), size)
            ]
        )

    def _choose(self, row: Tensor, states: list[Tensor], uniform: Tensor) -> Record:
        """Tokens for rows [n], from hidden states [n, H] of each model and uniforms [n]."""
        logits = self.head.logits(states[0])
        if self.guide is None:
            token, logp, drawn = choose(logits, self.sampling, uniform)
        else:
            own = logits.log_softmax(-1)
            guided = self.guide.head.logits(states[1]).log_softmax(-1)
            token, _, drawn = choose(mixture(guided, own, self.guide.share), self.sampling, uniform)
            logp = own.gather(-1, token[:, None])[:, 0]
        return Record(row, token, logp, drawn, *self._watched(logits))

    def _watched(self, logits: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of logits [n, V]: entropy [n], top ids [n, k] and their log-probs [n, k]; None for what
        is not asked for.
        """
        own = Vocabulary(logits)
        entropy = own.statistics()[1] if self.watch.entropy else None
        if not self.watch.top:
            return entropy, None, None
        ids = logits.topk(min(self.watch.top, logits.shape[-1]), -1).indices
        return entropy, ids, own.at(ids)

    # ------------------------------------------------------------------- record: what is kept of it

    def _record(self, batch: Rows, drawn: Record) -> None:
        """Notes the drawn tokens and makes them the last ones of their rows."""
        self.records.append(drawn)
        batch.token, batch.count = drawn.token, batch.count + 1
        if self.tail:
            batch.tail = torch.cat([batch.tail[:, 1:], drawn.token[:, None]], 1)

    def _record_prefixes(self, units: list[Unit], hidden: Tensor) -> None:
        """Notes the prefix tokens of every row with their log-probs, from the prefill's hidden
        states [U, T, H]: of a unit's first row, then the same of its others.
        """
        guided = [(i, unit) for i, unit in enumerate(units) if unit.prompt.prefix]
        if not guided:
            return
        states = torch.cat([hidden[i, -len(unit.prompt.prefix) - 1 : -1] for i, unit in guided])
        tokens = torch.tensor(
            [t for _, unit in guided for t in unit.prompt.prefix], device=self.device
        )
        first = torch.tensor(
            [unit.rows.start for _, unit in guided for _ in unit.prompt.prefix], device=self.device
        )
        size = chunk_rows(self.head.size(states), self.device)
        parts = []
        for at in slices(len(states), size):
            logits = self.head.logits(states[at])
            logp = logits.gather(-1, tokens[at, None])[:, 0] - logits.logsumexp(-1)
            parts.append(Record(first[at], tokens[at], logp, logp, *self._watched(logits)))
        given, start = Record.joined(parts), 0
        for _, unit in guided:
            prefix = given.at(slice(start, start + len(unit.prompt.prefix)))
            start += len(unit.prompt.prefix)
            if not bool(prefix.logp.isfinite().all()):
                refuse_broken(self.ids[unit.rows.start])
            self.records += [
                prefix._replace(row=torch.full_like(prefix.row, row)) for row in unit.rows
            ]

    # ------------------------------------------------------------- release: rows that are finished

    def _release(self, batch: Rows, drawn: Record) -> Rows | None:
        """Lets the rows leave that their last tokens finish, or whose turn they end; None where no
        row is left.
        """
        stopped = (drawn.token[:, None] == self.stops).any(1)
        if self.tail:
            stopped |= self._wrote_stop(batch.tail)
        bad = ~drawn.logp.isfinite()
        done = stopped | (batch.count >= self.sampling.max_completion_length)
        if self.replies is not None and self.replies.turn_tokens is not None:
            done |= batch.count - batch.begun >= self.replies.turn_tokens
        # the one moment in a step when the host waits for the device
        if not bool((done | bad).any()):
            return batch
        if bool(bad.any()):
            refuse_broken(self.ids[int(batch.row[bad][0])])
        self.stopped[batch.row[done]] = stopped[done]
        left = int((~done).sum())
        if self.replies is None:
            self._tell(len(done) - left)
            if self.hear is not None:
                self.ended += batch.row[done].tolist()
        else:
            self.parked.append(batch.copied(done.nonzero()[:, 0]))
        if not left:
            return None
        batch.keep(~done)
        return batch

    # ------------------------------------------------------------------- go on: turns are answered

    def _go_on(self) -> Rows | None:
        """Has the parked rows answered, and draws the next token of those that go on."""
        assert self.replies is not None
        batch, *others = self.parked
        if others:
            batch.join(*others)
        self.parked = []
        answers = self.replies.answer(self._turns(batch))
        kept = torch.tensor([answer is not None for answer in answers], device=self.device)
        self._tell(len(kept) - int(kept.sum()))
        if not bool(kept.any()):
            return None
        by_row = dict(zip(batch.row.tolist(), answers))
        batch.keep(kept)
        texts = [by_row[row] or [] for row in batch.row.tolist()]
        self._record_answers(batch, texts)
        going: Rows | None = None
        for part, states in fed(self.models, batch, texts):
            joining = self._next(part, states)
            if going and joining:
                going.join(joining)
            going = going or joining
        return going

    def _turns(self, batch: Rows) -> list[Turn]:
        """The turns that the rows have ended."""
        self.records = [Record.joined(self.records)]
        [drawn] = self.records
        mine = torch.isin(drawn.row, batch.row)
        written: dict[int, list[int]] = {row: [] for row in batch.row.tolist()}
        for row, token in zip(drawn.row[mine].tolist(), drawn.token[mine].tolist()):
            written[row].append(token)
        most, counts = self.sampling.max_completion_length, batch.count.tolist()
        stopped, lengths = self.stopped[batch.row].tolist(), (batch.count - batch.begun).tolist()
        return [
            Turn(self.ids[row], tokens[-length:], ended, most - count)
            for (row, tokens), length, ended, count in zip(
                written.items(), lengths, stopped, counts, strict=True
            )
        ]

    def _record_answers(self, batch: Rows, texts: Sequence[list[int]]) -> None:
        """Notes what others wrote after the turns of the rows: nobody drew it."""
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        token = torch.tensor([t for text in texts for t in text], device=self.device)
        silent = self.records[-1].logp.new_zeros(len(token))
        [known] = self.records
        entropy = None if known.entropy is None else silent
        top = None if known.top is None else known.top.new_zeros(len(token), known.top.shape[1])
        top_logp = None if top is None else silent[:, None].expand(top.shape)
        row = batch.row.repeat_interleave(lengths)
        self.records.append(Record(row, token, silent, silent, entropy, top, top_logp))
        batch.count = batch.begun = batch.count + lengths
        batch.tail = torch.full_like(batch.tail, -1)

    def _wrote_stop(self, tail: Tensor) -> Tensor:
        """[B] bool: whether the last tokens drawn [B, K] hold a stop string."""
        texts = self.tokenizer.batch_decode(
            [[t for t in tokens if t >= 0] for tokens in tail.tolist()], **self.decode
        )
        return torch.tensor(
            [any(s in text for s in self.sampling.stop) for text in texts], device=self.device
        )

    def _tell(self, finished: int) -> None:
        self.finished += finished
        if self.tick is not None:
            self.tick(self.finished)

    # -------------------------------------------------------------------------------------- results

    def responses(self, rows: Sequence[int] | None = None) -> list[Response]:
        """What was written after each prompt, or in these rollouts, and what was watched
        meanwhile.
        """
        self.records = [Record.joined(self.records)]
        [joined] = self.records
        if rows is not None:
            mine = torch.tensor(rows, device=self.device)
            joined = joined.at(torch.isin(joined.row, mine).nonzero()[:, 0])
        # stable: the tokens of a row stay in the order of their drawing
        written = joined.at(joined.row.argsort(stable=True))
        ends = written.row.bincount(minlength=len(self.ids)).cumsum(0).tolist()
        starts, stopped = [0, *ends], self.stopped.tolist()
        token, logp, drawn_logp = (
            column.tolist() for column in (written.token, written.logp, written.drawn_logp)
        )
        return [
            Response(
                token[a:b], logp[a:b], drawn_logp[a:b], stopped[i], written.at(slice(a, b)).notes()
            )
            for i in (range(len(ends)) if rows is None else rows)
            for a, b in [(starts[i], ends[i])]
        ]

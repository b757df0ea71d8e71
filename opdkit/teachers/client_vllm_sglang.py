"""A teacher behind vLLM or SGLang: log-probs over HTTP, and the first request, which shows whether
the server says what the method reads.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import REST, Endpoint
from opdkit.models.layout import Layout
from opdkit.objective.facts import Fact, TopFact
from opdkit.objective.supply import Tensors
from opdkit.teachers import protocol
from opdkit.teachers.base import in_order
from opdkit.teachers.refuse import REMEDY, refuse_facts
from opdkit.teachers.scored_facts import PromptScores, without_positions
from opdkit.teachers.vllm_sglang import Ask, Wire

# what every server reads at the start
PROBE = "The sum of 12 and 30 is 42. Let x = f(y) / 2; naïve café, 你好, привет!"
PROBE_TOKENS = 48
# nats, mean difference of two servers' log-probs of the probe: number formats differ by a tenth of
# that
SAME_MODEL = 0.2
FAMILY = (
    "Token-level distillation compares distributions over the same ids; use a teacher of the "
    "student's family"
)
SAME_NUMBER = 0.05  # nats, between two ways of asking one server for the same log-prob
REPEATED = 0.05  # nats, mean difference of one server's log-probs of the probe, asked twice


@dataclass(frozen=True)
class Probed:
    """What one server said of the first request's text."""

    server: Endpoint
    ask: Ask
    logp: Tensor  # [n] of its tokens

    def again(self, wire: Wire, model: str, *, alone: bool) -> None:
        """An error where it says something else now. alone: and where it says nothing."""
        url = self.server.urls[0]
        try:
            logp = wire.scores(self.server, model, self.ask, 0).logp
        except UserError as error:
            if not alone:  # it is down; what it gave before came from what it was before
                return
            raise UserError(f"the first request to {url}, repeated: {error}") from error
        if (gap := float((logp - self.logp).abs().mean())) > REPEATED:
            raise UserError(
                f"{url} gives other log-probs of the first request's text than at the start, by "
                f"{gap:.2g} nats on average: it was started again with other weights under the "
                "same name. Nothing was learnt from this step; start the right ones and continue "
                "with --resume"
            )


@dataclass(frozen=True)
class Served:
    """Log-probs from vLLM or SGLang servers, a request per rollout."""

    elsewhere: ClassVar[bool] = True
    endpoint: Endpoint
    wire: Wire
    model: str  # the name it is served under
    tokens: int  # ids that the student's tokenizer has
    limit: int | None = None  # tokens that the server can read at once
    probed: tuple[Probed, ...] = ()  # asked again after every step's answers

    def facts(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The wanted facts [N] or [N, k] at flat positions [N]."""
        made = self.said(wanted, layout, positions, ids)
        if len(positions):
            self.same_weights()
        return made

    def said(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        positions: Tensor,
        ids: Mapping[TopFact, Tensor],
    ) -> Tensors:
        """The same, which holds once `same_weights` has been asked after it."""
        rows = positions.cpu() // layout.width
        used = rows.unique().tolist()
        index = [(rows == b).nonzero()[:, 0] for b in used]
        at = {f: ids[top].cpu() for f in wanted for top in f.others_first}
        calls = [
            partial(
                self._rollout,
                wanted,
                layout,
                b,
                positions.cpu()[i] % layout.width,
                {f: v[i] for f, v in at.items()},
            )
            for b, i in zip(used, index)
        ]
        answers = self.endpoint.map(calls)
        made: Tensors = {}
        for fact in wanted if answers else ():
            values = [answer[fact] for answer in answers]
            made[fact] = in_order(values, index, positions.device)
        return made or {f: without_positions(f, positions.device) for f in wanted}

    def _rollout(
        self,
        wanted: Collection[Fact],
        layout: Layout,
        b: int,
        t: Tensor,
        at: Mapping[Fact, Tensor],
    ) -> Tensors:
        """The facts of one rollout at its response positions t [n]."""
        rollout = layout.rollouts[b]
        first, last = int(t.min()), int(t.max())
        start = len(rollout.prompt) + first
        tokens = (rollout.prompt + rollout.tokens)[: len(rollout.prompt) + last + 1]
        ask = Ask(f"rollout {rollout.id} at {self.model}", tokens, start)
        if self.limit is not None and len(tokens) + 1 > self.limit:
            raise UserError(
                f"{ask.who}: {len(tokens)} tokens and one more do not fit the server's context of "
                f"{self.limit}. Nothing is cut, as a cut context changes every score: start the "
                f"server with a context of at least {len(tokens) + 1} (--max-model-len, "
                "--context-length), or lower max_completion_length or data.max_prompt_length"
            )
        made: Tensors = {}
        if set(wanted) - set(at):
            deepest = max(f.depth(f.models[0]) for f in wanted if f not in at)
            scored = self.wire.scores(self.endpoint, self.model, ask, deepest)
            self._known(scored, ask)
            for fact in set(wanted) - set(at):
                made[fact] = fact.of_notes(scored)[t - first]
        for fact, ids in at.items():
            full = torch.tensor(tokens[start:])[:, None].expand(-1, ids.shape[1]).clone()
            full[t - first] = ids
            made[fact] = self.wire.at(self.endpoint, self.model, ask, full)[t - first]
        return made

    def same_weights(self) -> None:
        """Asked after the answers, so that none of them came from other weights unseen."""
        for probed in self.probed:
            probed.again(self.wire, self.model, alone=len(self.probed) == 1)

    def _known(self, scored: PromptScores, ask: Ask) -> None:
        """A row of the head that only pads it has no token."""
        if scored.top_ids.numel() and (largest := int(scored.top_ids.max())) >= self.tokens:
            raise UserError(
                f"{ask.who}: among its most probable tokens is id {largest}, and the tokenizer has "
                f"{self.tokens}: it is a padded row of the teacher's head. Lower the method's k, "
                "or use `opdkit serve-teacher`, which cuts such rows"
            )


def probe(
    served: Served, ones: Sequence[Endpoint], name: str, needs: Any, tokenizer: Any, model: str
) -> Served:
    """One short text is scored by every server: the answers must be whole, aligned, of the
    student's tokens, and alike. It is asked about again later.
    """
    who = f"a {served.wire.kind} server"
    read = [f for f in needs.of(model) if f.models[0] == model]
    refuse_facts(
        name or "own",
        who,
        [
            f
            for f in needs.of(model)
            if not (f.in_scores(model) or (f.others_first and protocol.known(f)))
        ],
    )
    k = max((f.depth(model) for f in needs.of(model)), default=0)
    tokens = probe_ids(tokenizer)
    # the largest id: a smaller vocabulary refuses it
    tokens += [tokenizer.eos_token_id or 0, served.tokens - 1]
    said: list[Probed] = []
    for one in ones:
        ask = Ask(f"the first request to {one.urls[0]}", tokens, 1)
        scored = served.wire.scores(one, served.model, ask, k)
        _same_texts(served.wire.texts(one, served.model, ask), tokenizer, one.urls[0])
        for fact in read:
            if fact.others_first:
                _at_works(served, one, ask, scored, fact, name)
        # one of several is not waited for long
        later = one if len(ones) == 1 else replace(one, retries=0, timeout=min(one.timeout, REST))
        said.append(Probed(later, ask, scored.logp))
    first, *others = said
    for other in others:
        gap = float((other.logp - first.logp).abs().mean())
        if gap > SAME_MODEL:
            raise UserError(
                f"{first.server.urls[0]} and {other.server.urls[0]} both serve {served.model!r} "
                f"and do not agree: their log-probs of one text differ by {gap:.2f} nats on "
                "average, so their weights are different. Start them from the same checkpoint"
            )
    return replace(served, probed=tuple(said))


def _at_works(
    served: Served, one: Endpoint, ask: Ask, scored: PromptScores, fact: Fact, name: str
) -> None:
    """Whether log-probs at given ids come back, and are those of the tokens themselves when these
    are asked about.
    """
    own = torch.tensor(ask.tokens[ask.start :])[:, None]
    try:
        gap = float((served.wire.at(one, served.model, ask, own)[:, 0] - scored.logp).abs().max())
    except UserError as error:
        why = f"asked for log-probs at given ids, it says: {str(error).partition(': ')[2]}. "
        refuse_facts(
            name or "own",
            f"the {served.wire.kind} server",
            [fact],
            why + REMEDY[0].upper() + REMEDY[1:],
        )
    else:
        if gap > SAME_NUMBER:
            raise UserError(
                f"{one.urls[0]} gives log-probs at given ids that differ by {gap:.2f} nats from "
                "those of the same tokens: no number of it can be trusted. Use another version of "
                "the server"
            )


def _same_texts(texts: Mapping[int, str], tokenizer: Any, url: str) -> None:
    """The server's text of a token must be the student's.

    Only plain ones are compared: pieces of characters are shown in many ways.
    """
    compared = 0
    for id, text in texts.items():
        own = tokenizer.decode([id]).strip()
        if own and own.isascii() and text.strip():
            compared += 1
            if text.strip() != own:
                raise UserError(
                    f"the tokenizer of {url} is not the student's: token {id} is {text!r} there "
                    f"and {own!r} here. {FAMILY}"
                )
    if not compared:
        print(
            f"opdkit: {url} does not say its tokens' texts, so its tokenizer cannot be compared "
            "with the student's",
            file=sys.stderr,
        )


def probe_ids(tokenizer: Any) -> list[int]:
    """The ids of a text that servers are asked about first; of a tokenizer that cannot write it,
    its first ordinary tokens.
    """
    try:
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
    except Exception:  # such as a token that a vocabulary without an unknown one does not have
        ids = []
    if len(ids) < 2:
        special = set(tokenizer.all_special_ids)
        ids = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
    return list(ids[:PROBE_TOKENS])

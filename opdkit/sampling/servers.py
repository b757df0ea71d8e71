"""The servers that write for a run: which of them are used, how the student's weights reach each,
and what becomes of one that is gone or back.

One that is gone (refused connections, time-outs, 5xx) is left out and the others go on, with the
same ids and seeds, as long as there is one. When weights are sent it is tried again, and used once
the probe has found the student's weights in it: one that was started again has others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.engines.endpoint import Endpoint, Gone, Refused
from opdkit.models.engines.names import card_of, cards_of
from opdkit.models.engines.probe import Probe
from opdkit.sampling.completions import scores

T = TypeVar("T")

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls "
    "opdkit.models.engines.vllm_worker.Weights --logprobs-mode processed_logprobs --host 127.0.0.1"
)
ADAPTERS = f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 {COMMAND} --enable-lora --max-lora-rank RANK"
KNOCK = 10.0  # seconds for one that may be gone to say who it is
QUIET = 5.0  # seconds without an answer, in which a server may have been started again


@dataclass(frozen=True)
class Push:
    """The student's weights as they were at a time, ready to be sent."""

    version: int  # optimiser steps
    folder: Path  # of files that trainer and servers see
    expected: Tensor  # [N]: the trainer's log-probs of the probe
    adapters: str | None  # the name of the adapters that the folder holds; None: whole weights
    rows: int | None  # of the head, that stand for tokens; None: all of them

    @property
    def what(self) -> str:
        return "adapters" if self.adapters else "weights"


@dataclass
class Server:
    """One of them."""

    one: Endpoint  # asks it alone
    door: Endpoint  # asks it who it is, and does not wait long
    name: str = ""  # what is served: the model, or the adapters on it
    probe: Probe | None = None
    out: str = ""  # why it is not used; "": it is
    adapters: str | None = None  # that it was given last
    # whether its log-probs are of the drawing distribution; None: not asked yet
    processed: bool | None = None
    new: bool = True  # it was never away
    heard: float = 0.0  # when it last was what it should be

    @property
    def url(self) -> str:
        return self.one.urls[0]

    def connect(self) -> None:
        """By connections of its own: those from before may have lost their other end."""
        self.one, self.door = replace(self.one), replace(self.door)

    def card(self, wanted: str | None) -> tuple[str, int]:
        """The name of the model and the tokens it reads."""
        cards = [
            card
            for card in self.door.request("GET", "/v1/models", None, cards_of)
            if card.get("parent") is None
        ]
        known, card = ", ".join(sorted(card["id"] for card in cards)), card_of(cards, wanted)
        if wanted is None and card is None:
            raise UserError(
                f"{self.url} serves {known or 'no model'}: say which samples with "
                "sampler.model=NAME"
            )
        if card is None:
            raise UserError(
                f"{self.url} does not serve {wanted!r} but {known or 'nothing'}: start it with the "
                "student, or set sampler.model"
            )
        return card["id"], card.get("max_model_len") or 0

    def take(self, push: Push) -> None:
        """Takes the weights over, forgets what older ones computed, and proves it."""
        assert self.probe is not None
        self._tell(push, "/pause?mode=abort", {})  # what nobody waits for any more
        if push.rows is not None:
            self._call(push, "opdkit_head", push.rows)
        if push.adapters is None:
            self._call(push, "opdkit_load_folder", str(push.folder))
        else:
            self._load_adapters(push, push.adapters)
        if self.one.post("/reset_prefix_cache", {}).get("success") is not True:
            raise UserError(
                f"{self.url} kept what older weights computed (its prefix cache): others are "
                "asking it for samples too. Give the run a server of its own"
            )
        self._tell(push, "/resume", {})
        self.name = push.adapters or self.name
        said = self.said()
        self.probe.check(said, push.expected, push.version, f"sending {push.what} to {self.url}")
        self.heard = self.one.clock()

    def said(self) -> list[Tensor]:
        """Log-probs [T - 1] of each of the probe's sequences of T tokens."""
        assert self.probe is not None
        return [
            torch.tensor(scores(self.one, self.name, s, 1, who))
            for s, who in zip(self.probe.sequences, self.probe.names)
        ]

    def repeat(self) -> None:
        """An error where it is not what it was when it took the weights over."""
        assert self.probe is not None
        self.probe.repeat(self.said(), self.url)
        self.heard = self.one.clock()

    def _load_adapters(self, push: Push, name: str) -> None:
        def unload(former: str) -> None:
            with suppress(Refused):  # it was started again, and knows none
                self._once("/v1/unload_lora_adapter", {"lora_name": former})

        if self.adapters == name:
            unload(name)
        path = str(push.folder)
        self._tell(push, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if self.adapters not in (None, name):
            unload(self.adapters)
        self.adapters = name

    def _call(self, push: Push, method: str, argument: Any) -> None:
        """A method of `vllm_worker.Weights`."""
        self._tell(push, "/collective_rpc", {"method": method, "args": [argument]})

    def _tell(self, push: Push, path: str, body: dict[str, Any]) -> None:
        """What changes the server, explained where it is not understood."""
        try:
            self._once(path, body)
        except Refused as error:
            raise UserError(
                f"{self.url} did not take the student's weights over ({error}). {started(push)}"
            ) from error

    def _once(self, path: str, body: dict[str, Any]) -> None:
        """The same with no second try: it may have been heard."""
        self.one.once().request("POST", path, body, lambda reply: reply.content)


class Servers:
    """All of them.

    Arguments:
        endpoint: asks any of them, and leaves one that failed alone until it has been probed.
        model: the name it is served under; None: the only one there.
    """

    def __init__(self, endpoint: Endpoint, model: str | None):
        # one that failed is left alone until it has been probed
        self.endpoint = endpoint
        self.all = [Server(one, one) for one in endpoint.each()]
        if len(self.all) > 1:
            short = replace(endpoint, timeout=min(endpoint.timeout, KNOCK), retries=0)
            ones = zip(endpoint.each(), short.each())
            self.all = [Server(one.once(), door) for one, door in ones]
        self.served, self.limit = self._meet(model)
        self.name = self.served  # asked for in requests: the model, or the adapters on it
        self._asked: Endpoint | None = None  # those in use

    def _meet(self, model: str | None) -> tuple[str, int]:
        """The name of the model and the tokens it reads, of every server the same."""
        names, limits, gone = set(), [], None
        for server in self.all:
            try:
                server.name, limit = server.card(model)
            except Gone as error:
                gone = error
                self.leave_out(server, said(error))
                continue
            names.add(server.name)
            limits.append(limit)
        if gone is not None and not names:
            raise gone
        if len(names) > 1:
            raise UserError(
                f"the sampling servers serve different models ({', '.join(sorted(names))}): say "
                "which with sampler.model=NAME"
            )
        if not all(limits):
            raise UserError(
                "the sampling server does not say how many tokens it reads (max_model_len in "
                "/v1/models): is it vLLM?"
            )
        return names.pop(), min(limits)

    @property
    def in_use(self) -> list[Server]:
        return [server for server in self.all if not server.out]

    @property
    def _reasons(self) -> str:
        return "; ".join(f"{server.url}: {server.out}" for server in self.all)

    def leave_out(self, server: Server, why: str) -> None:
        """It is asked for nothing until it has been sent weights and probed."""
        why = why.removeprefix(f"{server.url}: ")
        server.out, server.new, self._asked = why, False, None
        print(
            f"opdkit: the sampling server {server.url} is left out ({why}); {len(self.in_use)} of "
            f"{len(self.all)} go on, and it is tried again whenever weights are sent",
            file=sys.stderr,
        )

    # ----------------------------------------------------------------------------------------- push

    def push(self, push: Push) -> None:
        """The weights to all of them at once, also to those that are left out; `Gone` where not one
        takes them over.
        """
        for attempt in range(self.endpoint.retries + 1):
            if attempt:
                self.endpoint.back_off(attempt - 1)
            self._once(push)
            if self.in_use:
                self.name = push.adapters or self.served
                return
        raise Gone(
            f"no sampling server took the student's weights over (optimiser step {push.version}): "
            f"{self._reasons}. {started(push)}. Start them again, and continue with --resume",
            self._reasons,
        )

    def _once(self, push: Push) -> None:
        pool = ThreadPoolExecutor(len(self.all), thread_name_prefix="push")
        try:
            failed = list(pool.map(partial(self._taken, push), self.all))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._asked = None
        for server, error in zip(self.all, failed):
            away = bool(server.out)
            if error is None:
                server.out = ""
                if away:
                    print(
                        f"opdkit: the sampling server {server.url} is back, with the student's "
                        f"weights: {len(self.in_use)} of {len(self.all)} go on",
                        file=sys.stderr,
                    )
            elif not away and not isinstance(error, Gone):
                raise error
            elif not away or not (isinstance(error, Gone) or server.out == said(error)):
                self.leave_out(server, said(error))

    def _taken(self, push: Push, server: Server) -> UserError | None:
        """Why a server did not take the weights over."""
        try:
            if server.out:
                server.connect()
                name, limit = server.card(self.served)
                if limit < self.limit:
                    raise UserError(f"it reads {limit} tokens, and the others {self.limit}")
                server.name, server.processed = name, None
            server.take(push)
        except UserError as error:
            return error
        return None

    # ------------------------------------------------------------------------------------------ ask

    def ask(
        self,
        calls: Sequence[Callable[[Endpoint], T]],
        tick: Callable[[int], None] | None = None,
    ) -> list[T]:
        """What the servers in use answer, of the weights that they were sent last."""
        while True:
            endpoint = self._awake()
            made = endpoint.map([partial(call, endpoint) for call in calls], tick)
            if self._sound(endpoint):
                return made

    def _awake(self) -> Endpoint:
        """Asks those in use; one that was not heard of for a while is probed first."""
        why: UserError = Gone(
            f"no sampling server is left: {self._reasons}. Nothing was learnt from this step; "
            "start them again, and continue with --resume",
            self._reasons,
        )
        for server in self.in_use:
            if server.one.clock() - server.heard > QUIET:
                why = self.tried(server, server.repeat) or why
        if not self.in_use:
            raise why
        if self._asked is None:
            self._asked = self.endpoint.among([s.one.servers[0] for s in self.in_use])
        return self._asked

    def _sound(self, endpoint: Endpoint) -> bool:
        """Whether all answers are of the weights that were sent: a server that failed meanwhile may
        have been started again, and have answered since.
        """
        sound, lost = True, None
        for server, seen in zip(self.in_use, endpoint.servers):
            server.heard = max(server.heard, seen.heard)
            if seen.failed:
                self._asked = None
                error = self.tried(server, server.repeat)
                if error is not None and not seen.said:
                    sound, lost = False, error
        if lost is not None and not self.in_use:
            raise lost
        return sound

    def tried(self, server: Server, do: Callable[[], object]) -> UserError | None:
        """Why a server does not do something, if so: then it is left out."""
        try:
            do()
        except UserError as error:
            self.leave_out(server, said(error))
            return error
        return None


def started(push: Push) -> str:
    """How a server must be started."""
    return (
        f"It must be started as\n  {ADAPTERS if push.adapters else COMMAND}\nwith opdkit installed "
        "beside vLLM, and see the folder that the weights are written to (sampler.shared_folder)"
    )


def said(error: UserError) -> str:
    """What happened, without advice to a run that ends."""
    return str(getattr(error, "said", error))

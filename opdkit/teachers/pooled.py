"""`opdkit serve-teacher` with several models: few processes, one to a device, each of which holds
one of the models at a time.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdkit.base.errors import UserError
from opdkit.models.body import check_head, head_of
from opdkit.models.load import load_model, load_tokenizer
from opdkit.models.offload import Offloaded
from opdkit.models.precision import widen
from opdkit.models.tokenizers import usable
from opdkit.objective.head import Head
from opdkit.teachers import front
from opdkit.teachers.front import About, Asked, Front
from opdkit.teachers.gate import BadRequest, Room
from opdkit.teachers.local import LocalModel
from opdkit.teachers.pool import Gone, Pool, Worker
from opdkit.teachers.service import Service

HANGS = 3600.0  # seconds without an answer, after which a process is ended: loading included
ENDING = 10.0  # seconds that a process has to end by itself


@dataclass(frozen=True)
class Serving:
    """The models that a pool serves, and how each of its processes holds them."""

    models: Mapping[str, str]  # folders or hub names by the names they are asked for
    dtype: str = "float32"
    max_batch_tokens: int | None = None
    trust_remote_code: bool = False
    keep: int = 0  # bytes of weights that a process keeps on the CPU, for swaps without a disk
    workers: int = 1  # processes: on a CPU they share its threads


# -------------------------------------------------------------------------------- in each process


@dataclass
class Kept:
    """A model that one process has loaded."""

    service: Service
    size: int  # bytes of its weights
    away: Offloaded | None = None  # how it waits on the CPU; None: it does not


class Shelf:
    """The models of one process: one is held, on its device; others wait on the CPU, those that
    were used last, as far as `Serving.keep` goes.
    """

    def __init__(self, serving: Serving, device: str):
        self.serving, self.device = serving, device
        self.kept: OrderedDict[str, Kept] = OrderedDict()  # the held one too, if it may wait
        self.service: Service | None = None  # of the held one
        self.held = ExitStack()  # takes it off the device

    def load(self, name: str) -> About:
        self._put_down()
        if name in self.kept:
            self.kept.move_to_end(name)
            made = self.kept[name]
        else:
            made = self._loaded(name)
        if made.away is not None:
            self.held.enter_context(made.away())
        service, head = made.service, head_of(made.service.local.model)  # where it is now
        service.local, service.kept = (_with_head(m, head) for m in (service.local, service.kept))
        self.service = made.service
        return made.service.about

    def _put_down(self) -> None:
        """Takes the held model off the device, all of it."""
        service, self.service = self.service, None
        if service is not None:
            service.local, service.kept = (
                _with_head(local, Head(None)) for local in (service.local, service.kept)
            )
        self.held.close()

    def _loaded(self, name: str) -> Kept:
        """From the disk."""
        serving, cpu = self.serving, self.device == "cpu"
        at_first = self.device if cpu or not serving.keep else "cpu"
        path = serving.models[name]
        model: Any = load_model(path, serving.dtype, at_first, serving.trust_remote_code)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        stays = size <= serving.keep
        while stays and size + sum(k.size for k in self.kept.values()) > serving.keep:
            self.kept.popitem(last=False)
        if not stays and at_first != self.device:
            model = model.to(self.device)
        widen(model, path)
        model = model.eval().requires_grad_(False)
        check_head(model)
        tokenizer = load_tokenizer(path, serving.trust_remote_code)
        usable(tokenizer, len(model.get_output_embeddings().weight))
        nothing = Head(None)  # the head goes away too: of twenty teachers it would fill the device
        away = None if cpu or not stays else Offloaded(model, nothing, self.device)
        with away() if away is not None else ExitStack():
            local = LocalModel(model, head_of(model), serving.max_batch_tokens)
            made = Kept(Service(local, tokenizer, name), size, away)
        if stays:
            self.kept[name] = made
        return made

    def answer(self, doing: str, *given: Any) -> Any:
        service = self.service
        assert service is not None
        try:
            if doing == "score":
                return service.score(*given)
            if doing == "entries":
                return service.entries(*given)
            return service.packed_head() if doing == "head" else service.about
        finally:
            service.room.release()


def _with_head(local: LocalModel, head: Head) -> LocalModel:
    """A model whose weights have moved, with as many rows of its head as before."""
    return replace(local, head=replace(head, vocab=local.head.vocab))


def work(connection: Any, serving: Serving, device: str) -> None:
    """What a process of the pool does until nobody asks any more."""
    from transformers.utils.logging import disable_progress_bar

    for number in (signal.SIGINT, signal.SIGHUP):  # whoever started it ends it
        signal.signal(number, signal.SIG_IGN)
    disable_progress_bar()  # of every swap
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // serving.workers))
    shelf = Shelf(serving, device)
    while True:
        try:
            doing, *given = connection.recv()
        except (EOFError, OSError):
            return
        said: tuple[bool, Any]
        try:
            said = True, shelf.load(*given) if doing == "load" else shelf.answer(doing, *given)
        except (UserError, BadRequest) as error:
            said = False, error
        except Exception as error:
            if "CUDA error" in str(error):  # nothing works in this process from now on
                raise
            said = False, RuntimeError(f"{type(error).__name__}: {error}")
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(said)


# ------------------------------------------------------------------------------------ in the server


class ProcessWorker(Worker):
    """A process on one device.

    known: what each model was when it was loaded first, for all workers of a pool.
    """

    def __init__(self, serving: Serving, device: str, known: dict[str, About]):
        self.device, self.known = device, known
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, serving, device), daemon=True)
        self.process.start()
        theirs.close()

    def load(self, name: str) -> None:
        about = self._ask("load", name)
        if about != self.known.setdefault(name, about):
            raise UserError(
                f"the files of {name} hold other weights than when this server started: "
                "start it again"
            )

    def call(self, name: str, request: Any) -> Any:
        return self._ask(*request)

    def close(self) -> None:
        self.connection.close()
        self.process.join(ENDING)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _ask(self, *what: Any) -> Any:
        try:
            self.connection.send(what)
            if not self.connection.poll(HANGS):
                self.process.kill()
            good, said = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(ENDING)
            raise Gone(
                f"the process on {self.device} ended with exit code {self.process.exitcode}"
            ) from error
        if not good:
            raise said
        return said


class Pooled(Front):
    """A model of which some worker says what there is to say.

    A request that is under way already, as one is that a client sends again after a time-out, is
    not asked twice.
    """

    def __init__(self, pool: Pool, about: About, tokenizer: Any, room: Room):
        self.pool, self.about, self.tokenizer, self.room = pool, about, tokenizer, room
        self.lock = threading.Lock()
        self.under_way: dict[bytes, tuple[Future[Any], int]] = {}  # with how many wait for each

    def packed_head(self) -> bytes:
        answer: bytes = self._ask(b"head", ("head",), 0)
        return answer

    def scored(self, body: bytes, asked: Asked) -> bytes:
        tokens = sum(len(r.prompt) + len(r.tokens) for r in asked.layout.rollouts)
        answer: bytes = self._ask(hashlib.sha256(body).digest(), ("score", body), tokens)
        return answer

    def entries(self, prompts: Sequence[list[int]], k: int) -> list[Any]:
        key = hashlib.sha256(repr((prompts, k)).encode()).digest()
        answer: list[Any] = self._ask(key, ("entries", prompts, k), sum(map(len, prompts)))
        return answer

    def _ask(self, key: bytes, request: Any, tokens: int) -> Any:
        with self.lock:
            if key not in self.under_way:
                self.under_way[key] = self.pool.submit(self.about.name, request, tokens), 0
            future, waiting = self.under_way[key]
            self.under_way[key] = future, waiting + 1
        try:
            return future.result(front.LONGEST)
        except TimeoutError:
            raise BadRequest(
                f"{self.about.name} had no turn within {front.LONGEST:g} s: more is asked of "
                "the pool than its workers do. Start it with more of them (--workers)",
                503,
            ) from None
        finally:
            with self.lock:
                future, waiting = self.under_way.pop(key)
                if waiting > 1:
                    self.under_way[key] = future, waiting - 1
                else:
                    future.cancel()  # what nobody waits for is not begun


def open_pool(
    serving: Serving, devices: Sequence[str], patience: float
) -> tuple[Pool, list[Front]]:
    """A process for each of the devices, and every model, loaded once to see that it can be."""
    known: dict[str, About] = {}

    def worker(number: int) -> Worker:
        return ProcessWorker(serving, devices[number], known)

    workers = [worker(i) for i in range(len(devices))]
    pool, room = Pool(workers, replacement=worker, patience=patience), Room(front.ANSWERS)
    try:
        first = [pool.submit(name, ("about",), 0) for name in serving.models]
        abouts = [replace(answer.result(), shared=True) for answer in first]
        tokenizers = [
            load_tokenizer(path, serving.trust_remote_code) for path in serving.models.values()
        ]
    except BaseException:
        pool.close()
        raise
    return pool, [Pooled(pool, a, t, room) for a, t in zip(abouts, tokenizers)]

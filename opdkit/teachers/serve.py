"""The command `opdkit serve-teacher`: a server of one model in this process, or of several in a
pool of processes, from its start to its end.
"""

from __future__ import annotations

import ipaddress
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from opdkit.base.errors import UserError
from opdkit.base.interrupt import SIGNALS
from opdkit.models.body import check_head, head_of
from opdkit.models.device import device_of
from opdkit.models.load import load_model, load_tokenizer
from opdkit.models.precision import widen
from opdkit.models.tokenizers import usable
from opdkit.teachers.front import Front
from opdkit.teachers.http import TeacherServer
from opdkit.teachers.local import LocalModel
from opdkit.teachers.pool import PATIENCE, Pool
from opdkit.teachers.pooled import Serving, open_pool
from opdkit.teachers.service import Service


def make_server(
    model: Any,
    tokenizer: Any,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch_tokens: int | None = None,
    host_names: Iterable[str] = (),
) -> TeacherServer:
    """A server for a loaded model; port 0 takes a free one. `serve_forever()` runs it.

    host_names: by which clients ask for it, beside its address and localhost.
    """
    model = model.eval().requires_grad_(False)
    check_head(model)
    local = LocalModel(model, head_of(model), max_batch_tokens)
    usable(tokenizer, len(model.get_output_embeddings().weight))
    return _listening(host, port, [Service(local, tokenizer, name)], host_names)


def _listening(
    host: str,
    port: int,
    services: Sequence[Front],
    host_names: Iterable[str],
    pool: Pool | None = None,
) -> TeacherServer:
    try:
        return TeacherServer((host, port), services, host_names, pool)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another with "
            "--port, or --port 0"
        ) from error


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "float32",
    device: str = "auto",
    name: str | None = None,
    max_batch_tokens: int | None = None,
    allow_remote: bool = False,
    host_names: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> None:
    """Serves a model until it is interrupted (Ctrl-C, SIGTERM or SIGHUP); what is under way then is
    finished.
    """
    _refuse(host, allow_remote, max_batch_tokens)
    device = device_of(device)
    loaded = load_model(model, dtype, device, trust_remote_code)
    widen(loaded, model)
    tokenizer = load_tokenizer(model, trust_remote_code)
    server = make_server(loaded, tokenizer, name or model, host, port, max_batch_tokens, host_names)
    print(
        f"serving {name or model} ({dtype}, {device}) at {_where(server, host)}\n"
        f"opdkit train ... teacher={_where(server, host)}",
        flush=True,
    )
    run_until_stopped(server)


def serve_several(
    serving: Serving,
    devices: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    patience: float = PATIENCE,
    allow_remote: bool = False,
    host_names: Iterable[str] = (),
) -> None:
    """Serves several models by name until it is interrupted, from a process on each of the devices,
    which hold one model at a time.
    """
    _refuse(host, allow_remote, serving.max_batch_tokens)
    pool, services = open_pool(serving, devices, patience)
    try:
        server = _listening(host, port, services, host_names, pool)
        where = _where(server, host)
        print(
            f"serving {', '.join(serving.models)} ({serving.dtype}) from {len(devices)} "
            f"worker(s) on {', '.join(devices)} at {where}\nopdkit train ... "
            + " ".join(f"teacher.{name}={where}#{name}" for name in serving.models),
            flush=True,
        )
        run_until_stopped(server)
    finally:
        pool.close()


def worker_devices(device: str, devices: Sequence[str], workers: int | None) -> list[str]:
    """The device of each worker: those that are named, one after the other and again from the
    first; else every GPU once, or the CPU.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    if devices and device != "auto":
        raise UserError("--device and --devices both say where models are: give --devices alone")
    named = [device_of(one) for one in devices or [device]]
    if named == ["cuda"]:
        named = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    count = len(named) if workers is None else workers
    return [named[i % len(named)] for i in range(count)]


def _where(server: TeacherServer, host: str) -> str:
    return f"http://{host if ':' not in host else f'[{host}]'}:{server.server_address[1]}"


def _refuse(host: str, allow_remote: bool, max_batch_tokens: int | None) -> None:
    """Settings that will not do."""
    if max_batch_tokens is not None and max_batch_tokens < 1:
        raise UserError(f"max_batch_tokens={max_batch_tokens} must be at least 1")
    if not _loopback(host):
        if not allow_remote:
            raise UserError(
                f"--host {host} can be reached from other machines, and the server asks for no "
                "password: whoever reaches it can read the model's head and use the machine. Keep "
                "it on 127.0.0.1 behind an SSH tunnel, or say --allow-remote on a network you trust"
            )
        print(
            f"opdkit: warning: {host} can be reached from other machines, and there is no "
            "authentication",
            file=sys.stderr,
        )


def run_until_stopped(server: TeacherServer) -> None:
    def stop(*_: object) -> None:
        # shutdown waits for the loop that this signal interrupted
        threading.Thread(target=server.shutdown, daemon=True).start()

    # under nohup SIGHUP is ignored
    numbers = {signal.SIGINT, *(s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN)}
    before = {s: signal.signal(s, stop) for s in numbers}
    try:
        server.serve_forever(poll_interval=0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.drain()
        server.server_close()
        print("stopped", flush=True)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Every method against every kind of teacher: it trains, or is refused with the reason and the
remedy before any model is loaded.

The outcomes are the table in docs/teachers.md: `OPDKIT_WRITE_TABLE=1 pytest
tests/end_to_end/test_kinds.py` writes it anew.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit import UserError, methods
from opdkit.methods.method import load
from opdkit.models import load as loading
from opdkit.models.load import load_model, load_tokenizer
from opdkit.run.build import prepare
from opdkit.run.cache_teacher import cache_teacher
from opdkit.run.settings import make_run
from opdkit.teachers.serve import make_server
from opdkit.train.loop import train_step
from tests.common.fake_server import FakeServer
from tests.common.tiny import save_tiny
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows

PAGE = Path(__file__).parents[2] / "docs/teachers.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
KINDS = {  # as the table heads them
    "local": "in process",
    "routes": "several by route",
    "mixture": "mixture",
    "serve-teacher": "`serve-teacher`",
    "server": "vLLM server",
    "sglang": "SGLang server",
    "vllm": "vLLM in process",
    "cached": "cache",
}
SMALL = {
    "steps": 1,
    "prompts_per_step": 2,
    "sampling": {"num_generations": 2, "max_completion_length": 6},
    "optim": {"learning_rate": 1e-3},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data(shop: Shop) -> str:
    """Rows with everything a method may read: a route, a reference response, a pair, what views
    show.
    """
    shown = {"hint": "add them", "allowed": ["numbers"], "disallowed": ["names"]}
    shown |= {"chosen": " They are added.", "rejected": " Perhaps."}
    rows = [
        {**row, **shown, "teacher": "ab"[i % 2], "response": f" {i + 1}"}
        for i, row in enumerate(gsm8k_rows(2))
    ]
    return write_rows(shop.folder / "kinds.jsonl", rows)


@pytest.fixture(scope="module")
def teachers(
    shop: Shop, data: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What a run says of its teacher, by kind: real servers on this machine, a real cache."""
    folder = tmp_path_factory.mktemp("kinds")
    other = save_tiny(folder / "other", "llama", seed=7)
    # heads of 32, the least that vLLM has kernels for
    wide = save_tiny(folder / "wide", "qwen3", seed=3, hidden=128, spread=0.1)
    run = {
        "student": shop.student,
        "teacher": shop.teacher,
        "data": data,
        "output": str(folder / "cache"),
        **SMALL,
    }
    cache_teacher(make_run(run), folder / "cache", top_k=64)
    model, tokenizer = load_model(shop.teacher), load_tokenizer(shop.teacher)
    with (
        FakeServer(model, tokenizer, max_logprobs=100) as vllm,
        FakeServer(model, tokenizer, "sglang", max_logprobs=100) as sglang,
        _own(load_model(shop.teacher), tokenizer) as url,
    ):
        yield {
            "local": shop.teacher,
            "routes": {"a": shop.teacher, "b": other},
            "mixture": {"kind": "mixture", "of": {"a": shop.teacher, "b": other}},
            "serve-teacher": f"server:{url}",
            "server": f"server:{vllm.url}",
            "sglang": f"server:{sglang.url}",
            "vllm": {
                "kind": "vllm",
                "model": wide,
                "max_model_len": 128,
                "kv_cache_memory_bytes": 1 << 26,
                "enforce_eager": True,
            },
            "cached": f"cached:{folder / 'cache'}",
        }


@contextmanager
def _own(model: Any, tokenizer: Any) -> Iterator[str]:
    server = make_server(model, tokenizer, "teacher", port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checkpoints whose weights have been read."""
    names: list[str] = []

    def load(name: str, **settings: Any) -> Any:
        names.append(name)
        return load_model(name, **settings)

    monkeypatch.setattr(loading, "load_model", load)
    return names


def unnamed(method: str) -> list[str]:
    """Models of a method of which only a run can say which they are."""
    return [name for name, said in load(method).models.items() if set(said) <= {"view"}]


def outcome(
    shop: Shop, data: str, teacher: Any, kind: str, method: str, folder: Path, loaded: list[str]
) -> str:
    """trains, or why it is refused."""
    run = make_run(
        {
            "student": shop.student,
            "teacher": teacher,
            "data": data,
            "method": method,
            "reward": shop.reward,
            # there are no routes to a model that is not the teacher
            "models": dict.fromkeys(unnamed(method), shop.teacher if kind == "routes" else teacher),
            # who scores is asked here, not who debates
            "annotate": {"debate": {"of": [shop.teacher, shop.llama], "max_tokens": 4}}
            if "debate" in load(method).annotate
            else {},
            # a reference whose kind the method says, and the run of what
            **(
                {"reference": f"soup:{shop.student},{shop.teacher}"}
                if "kind" in load(method).models.get("reference", {})
                else {}
            ),
            "output": str(folder),
            **SMALL,
            # a schedule that adapts to it needs an evaluation between the ends
            **(
                {"steps": 2, "evaluate": {"data": data, "every": 1}}
                if load(method).curriculum.measures
                else {}
            ),
            **(
                {"rollouts": "cache", "data": teacher.removeprefix("cached:")}
                if kind == "cached"
                else {}
            ),
        }
    )
    try:
        job, state = prepare(run)
    except UserError as error:
        assert loaded == [], f"{method} was refused after {loaded[0]} had been loaded"
        return str(error)
    before = [p.detach().clone() for p in job.student.parameters]
    train_step(job, state)
    assert all(bool(p.isfinite().all()) for p in job.student.parameters)
    assert state.step == 1 and any(
        not torch.equal(a, b) for a, b in zip(before, job.student.parameters)
    )
    return "trains"


FOUND: dict[tuple[str, str], str] = {}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.vllm) if k == "vllm" else k for k in KINDS]
)
@pytest.mark.parametrize("method", methods())
def test_a_method_trains_or_is_refused_before_anything_is_loaded(
    method: str,
    kind: str,
    shop: Shop,
    data: str,
    teachers: dict[str, Any],
    tmp_path: Path,
    loaded: list[str],
) -> None:
    found = outcome(shop, data, teachers[kind], kind, method, tmp_path / "run", loaded)
    FOUND[method, kind] = found
    if found != "trains":
        assert method in found, "a refusal names the method"
        assert re.search(
            r"\b(use|set|give|train|take|start|raise|rerun|choose|let)\b", found, re.I
        ), f"a refusal says what to do: {found}"
    if not os.environ.get("OPDKIT_WRITE_TABLE"):
        assert cell(found) == documented()[method, kind], f"{method} with {kind}: {found}"


@pytest.fixture(scope="module", autouse=True)
def written() -> Iterator[None]:
    yield
    if os.environ.get("OPDKIT_WRITE_TABLE"):
        write(documented() | {key: cell(found) for key, found in FOUND.items()})


def test_the_table_of_the_docs_is_whole() -> None:
    assert set(documented()) == {(method, kind) for method in methods() for kind in KINDS}


def cell(found: str) -> str:
    return "yes" if found == "trains" else "-"


def documented() -> dict[tuple[str, str], str]:
    """The cells of the table in the docs, by method and kind."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ")
        for line in text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    ]
    return {
        (row[0].strip("`"), kind): said.strip()
        for row in rows
        for kind, said in zip(KINDS, row[1:])
    }


def write(cells: dict[tuple[str, str], str]) -> None:
    """The table anew; the vLLM columns of methods that were not run with a real engine keep what
    they say.
    """
    text = PAGE.read_text(encoding="utf-8")
    lines = ["| method | " + " | ".join(KINDS.values()) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for method in methods():
        lines.append(
            f"| `{method}` | " + " | ".join(cells.get((method, kind), "?") for kind in KINDS) + " |"
        )
    table = "\n".join([BEGIN, *lines, END])
    PAGE.write_text(
        text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :], encoding="utf-8"
    )

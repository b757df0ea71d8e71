"""What can be said of the vLLM engine without vLLM: its settings, when it sleeps, and what is said
where it is not installed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.models.engines.vllm_engine import (
    Engine,
    EngineSettings,
    _extra,
    _refuse,
    _starting,
)
from opdkit.sampling.vllm import VllmSampler, VllmSettings
from tests.common.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"dtype": "float64"}, "float32, bfloat16, float16"),
        ({"gpu_memory_utilization": 0.0}, "above 0"),
        ({"gpu_memory_utilization": 1.2}, "at most 1"),
        ({"sleep_level": 0}, "must be 1"),
        ({"max_model_len": 0}, "max_model_len=0 must be at least 1"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EngineSettings(**wrong)


class Played:
    """vLLM's LLM, as far as sleep goes."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake", *tags))


def engine(**settings: Any) -> Engine:
    made = object.__new__(Engine)
    made.settings, made.llm, made.asleep = EngineSettings(**settings), Played(), False
    return made


@pytest.mark.parametrize("level", [1, 2])
def test_weights_are_sent_between_the_two_halves_of_waking(level: int) -> None:
    """They need their own memory first; the cache takes what the trainer has left after that."""
    made = engine(enable_sleep_mode=True, sleep_level=level)
    calls = made.llm.calls
    made.sleep()
    made.sleep()
    assert calls == [("sleep", level)] and made.dropped is (level == 2)
    made.wake(lambda: calls.append("send"))
    made.wake()
    assert calls[1:] == [("wake", "weights"), "send", ("wake", "kv_cache")] and not made.asleep


def test_an_engine_that_never_sleeps_is_only_sent_weights() -> None:
    made = engine()
    made.sleep()
    made.wake(lambda: made.llm.calls.append("send"))
    assert made.llm.calls == ["send"]


def test_starting_leaves_generators_threads_and_environment_alone() -> None:
    import random

    import numpy as np

    name, threads = "VLLM_ENABLE_V1_MULTIPROCESSING", torch.set_num_threads
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = (torch.rand(2).tolist(), random.random(), np.random.rand())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    with pytest.raises(RuntimeError), _starting():
        assert os.environ[name] == "0"
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        torch.set_num_threads = None  # type: ignore[assignment]
        raise RuntimeError
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected
    assert torch.set_num_threads is threads and name not in os.environ


def test_an_engine_in_each_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes part in the run's process group, on the device of its process, whose number it is
    told whoever started the process; afterwards the environment is as it was.
    """
    alone = _extra(EngineSettings(), True, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _extra(EngineSettings(), True, 0) == alone | {
        "distributed_executor_backend": "external_launcher"
    }
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    _refuse(EngineSettings(), True)
    with _starting():
        assert (os.environ["LOCAL_RANK"], os.environ["RANK"]) == ("1", "1")
    assert "LOCAL_RANK" not in os.environ
    with pytest.raises(UserError, match="tensor_parallel_size=2 spreads one engine"):
        _refuse(EngineSettings(tensor_parallel_size=2), True)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="that opdkit did not start"):
        _refuse(EngineSettings(), True)


def test_where_vllm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        VllmSampler(tiny_model(), tiny_tokenizer(), VllmSettings())


def test_a_student_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not compute in float64"):
        VllmSampler(
            tiny_model().double(), tiny_tokenizer(), replace(VllmSettings(), max_num_seqs=4)
        )

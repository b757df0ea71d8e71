"""What a run may say of its sampler."""

from __future__ import annotations

import pytest

from opdkit import UserError
from opdkit.run.settings import make_run
from opdkit.sampling.hf_settings import HfSettings
from opdkit.sampling.kinds import sampler_of
from opdkit.sampling.server import ServerSettings
from opdkit.sampling.vllm import VllmSettings

RUN = {"student": "s", "teacher": "t", "data": "d"}


def test_text_or_a_group_names_a_sampler() -> None:
    assert sampler_of("hf") == HfSettings() and sampler_of("vllm") == VllmSettings()
    assert sampler_of("server:http://a:1,http://b:2") == ServerSettings(
        ("http://a:1", "http://b:2")
    )
    assert sampler_of("http://a:1") == ServerSettings(("http://a:1",))
    assert sampler_of({"kind": "vllm", "gpu_memory_utilization": 0.5}) == VllmSettings(
        gpu_memory_utilization=0.5
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("vlm", "did you mean 'vllm'"),
        ("server", "urls is missing"),
        ({"kind": "vllm", "gpu_memory": 0.5}, "gpu_memory_utilization"),
        ({"kind": "vllm", "gpu_memory_utilization": 1.5}, "at most 1"),
        ({"urls": ["http://a:1"]}, "no kind of sampler"),
    ],
)
def test_a_wrong_sampler_is_an_error_of_the_run(value: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_run({**RUN, "sampler": value})


def test_another_engines_log_probs_are_recomputed_unless_said_otherwise() -> None:
    assert not make_run(RUN).recomputes_student
    assert make_run({**RUN, "sampler": "vllm"}).recomputes_student
    assert not make_run({**RUN, "sampler": "vllm", "recompute_student": False}).recomputes_student
    assert make_run({**RUN, "recompute_student": True}).recomputes_student

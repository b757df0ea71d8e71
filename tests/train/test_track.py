"""metrics.jsonl is strict and resumable; other trackers get the same numbers."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.base.files import read_lines, truncate_metrics
from opdkit.train.track import open_trackers


def write(folder, steps):
    with open_trackers(folder) as trackers:
        for step in steps:
            trackers.log(step, {"loss": 1 / step, "tokens": step})
    return (folder / "metrics.jsonl").read_bytes()


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_each_step_is_one_strict_line_that_is_there_at_once(tmp_path):
    trackers = open_trackers(tmp_path)
    trackers.log(
        1, {"loss": torch.tensor(0.5), "reward/mean": np.float32(0.25), "tokens/trained": 7}
    )
    trackers.log(2, {"loss": math.nan, "grad_norm": math.inf, "tokens/trained": 8})
    # before close: a run may be killed
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict(first) == {"step": 1, "loss": 0.5, "reward/mean": 0.25, "tokens/trained": 7}
    assert strict(second) == {
        "step": 2,
        "loss": None,
        "grad_norm": None,
        "tokens/trained": 8,
        "nonfinite": ["grad_norm", "loss"],
    }
    trackers.close()


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    whole = write(tmp_path / "whole", range(1, 7))
    part = tmp_path / "part"
    write(part, range(1, 6))
    with open(part / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "lo')  # killed while writing step 6; the checkpoint is of step 3
    truncate_metrics(part / "metrics.jsonl", 3)
    assert [line["step"] for line in read_lines(part / "metrics.jsonl")] == [1, 2, 3]
    assert write(part, range(4, 7)) == whole


def test_opening_never_glues_a_line_to_a_broken_one(tmp_path):
    write(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "loss": \xe2\x80')
    write(tmp_path, [2])
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    truncate_metrics(path)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_damage_in_the_middle_is_told_not_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl is not JSON"):
        truncate_metrics(path, 1)
    assert path.read_text() == '{"step": 1}\nnot json\n{"step": 3}\n'


def test_line_separators_inside_strings_do_not_split_lines(tmp_path):
    path = tmp_path / "evals.jsonl"
    path.write_text('{"step": 1, "name": "a\u2028b"}\n{"step": 2}\n', encoding="utf-8")
    truncate_metrics(path, 1)
    assert read_lines(path) == [{"step": 1, "name": "a\u2028b"}]


def test_absent_file_is_empty(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 3)
    assert read_lines(tmp_path / "metrics.jsonl") == []
    assert list(tmp_path.iterdir()) == []


def test_unknown_tracker_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="'tensorbord'; did you mean 'tensorboard'"):
        open_trackers(tmp_path, ["tensorbord"])


@pytest.mark.parametrize(
    ("name", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("trackio",) * 2, ("wandb",) * 2],
)
def test_missing_package_says_what_to_install(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    with pytest.raises(UserError, match=f"pip install {name}"):
        open_trackers(tmp_path, [name])


def test_tensorboard_gets_every_number_and_resumes(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ([1, 2, 3], [3, 4]):
        with open_trackers(tmp_path, ["tensorboard"], {"method": "opd"}) as trackers:
            for step in steps:
                trackers.log(step, {"reward/mean": step + len(steps) / 10})
        truncate_metrics(tmp_path / "metrics.jsonl", 2)  # as a resume from step 2 does
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    assert [(e.step, round(e.value, 4)) for e in events] == [(1, 1.3), (2, 2.3), (3, 3.2), (4, 4.2)]


def test_wandb_continues_the_run_of_its_folder(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
    )

    def init(**settings):
        calls.append(settings)
        return fake

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    folder = tmp_path / "my run: 1"
    for step in (1, 2):
        with open_trackers(folder, ["wandb"], {"seed": 0}) as trackers:
            trackers.log(step, {"loss": 0.5})
    first, *_, second = (call for call in calls if isinstance(call, dict))
    assert first["id"] == second["id"]
    assert not set(first["id"]) & set('/\\#?%: "')
    assert (first["resume"], first["config"], first["name"]) == ("allow", {"seed": 0}, "my run: 1")
    assert [call for call in calls if not isinstance(call, dict)] == [
        (1, {"loss": 0.5}),
        "finish",
        (2, {"loss": 0.5}),
        "finish",
    ]

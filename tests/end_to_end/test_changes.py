"""A resumed run is the run that was begun: what differs is named and refused, or meant and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit import UserError, distill
from opdkit.base.files import read_lines
from opdkit.models.load import load_model, load_tokenizer
from opdkit.run.launch import execute
from opdkit.run.resume import differences
from opdkit.run.settings import load_run
from opdkit.train import checkpoint as checkpoints
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows


@pytest.fixture(scope="module")
def begun(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; not to be changed."""
    out = tmp_path_factory.mktemp("begun") / "run"
    execute(shop.run(out))
    return out


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "run")


def resumed(shop: Shop, run: Path, *, allow: bool = False, steps: int = 3, **settings: Any) -> Any:
    return execute(shop.run(run, steps=steps, **settings), resume=True, allow_changes=allow)


def test_a_change_is_named_and_leaves_the_folder_as_it_was(shop: Shop, run: Path) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as caught:
        resumed(shop, run, optim={"learning_rate": 1e-2}, seed=4)
    said = str(caught.value)
    assert "optim.learning_rate: 0.001 in the checkpoint, 0.01 now" in said
    assert "seed: 0 in the checkpoint, 4 now" in said and "--allow-changes" in said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_change_that_is_meant_holds_from_its_step_and_run_yaml_tells(
    shop: Shop, run: Path
) -> None:
    optim = {"learning_rate": 1e-2, "betas": [0.5, 0.6], "weight_decay": 0.3}
    out = resumed(shop, run, allow=True, optim=optim)
    assert [line["learning_rate"] for line in out.metrics] == [1e-3, 1e-3, 1e-2]
    head = [line for line in (run / "run.yaml").read_text().splitlines() if line.startswith("#")]
    assert head[1:] == [
        "# optim.learning_rate: 0.001 up to step 2",
        "# optim.weight_decay: 0.0 up to step 2",
        "# optim.betas: [0.9, 0.95] up to step 2",
    ]
    assert load_run(run / "run.yaml").optim.betas == (0.5, 0.6)
    groups = torch.load(run / "checkpoint-3" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [(g["betas"], g["weight_decay"]) for g in groups] == [((0.5, 0.6), 0.3), ((0.5, 0.6), 0)]
    # from here on the changed settings are the run's, and what was before stays told
    execute(load_run(run / "run.yaml", ["steps=4"]), resume=True)
    assert (run / "run.yaml").read_text().count("up to step 2") == 3
    with pytest.raises(UserError, match=r"learning_rate: 0.01 in the checkpoint, 0.001 now"):
        resumed(shop, run, steps=5)


def test_a_change_of_which_nothing_came_is_not_the_runs(shop: Shop, run: Path) -> None:
    """The first step with it fails: the stored settings still go on."""

    def fails(rollout: Any) -> float:
        raise UserError("the judge is away")

    given = shop.values(run, steps=3)
    student, teacher, data = (given.pop(k) for k in ("student", "teacher", "data"))
    with pytest.raises(UserError, match="the judge is away"):
        distill(student, teacher, data, reward=fails, resume=True, allow_changes=True, **given)
    assert len(resumed(shop, run).metrics) == 3


def test_other_questions_are_asked_from_the_first_on(shop: Shop, run: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", gsm8k_rows(3))
    resumed(shop, run, allow=True, data=data, steps=4, sample_every=1)
    stream = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["stream"]
    assert (stream["epoch"] * 3 + stream["position"], stream["size"]) == (4, 3)


@pytest.mark.parametrize("settings", [{"student": "{llama}"}, {"lora": {"r": 2}}])
def test_what_the_weights_are_made_of_no_flag_changes(
    shop: Shop, run: Path, settings: dict[str, Any]
) -> None:
    if "student" in settings:
        settings = {"student": shop.llama}
    with pytest.raises(UserError, match=r"made so, and cannot be made otherwise on the way"):
        resumed(shop, run, allow=True, **settings)


def test_what_may_change_without_a_word(shop: Shop, run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(shop.student, tmp_path / "student")
    copy = shutil.copy(shop.data, tmp_path / "copy.jsonl")
    out = resumed(
        shop,
        run,
        student=str(moved),  # the same model and rows, at another place
        data={"source": str(copy), "limit": 6},
        checkpoint={"every": 1, "keep": 2},
        micro_batch_tokens=100,
        sample_every=1,
    )
    assert len(out.metrics) == 3 and "#" not in (run / "run.yaml").read_text()


def test_rows_in_another_order_are_told_from_other_rows(
    shop: Shop, run: Path, tmp_path: Path
) -> None:
    rows = gsm8k_rows(6)
    for row, name in zip(rows, "abcdef"):
        row["id"] = name
    first = write_rows(tmp_path / "first.jsonl", rows)
    other = write_rows(tmp_path / "other.jsonl", rows[::-1])
    execute(shop.run(tmp_path / "run2", data=first))
    with pytest.raises(UserError, match=r"6 rows of .* the checkpoint, the same in another order"):
        resumed(shop, tmp_path / "run2", data=other)


def test_an_edited_file_of_ones_own_is_another_method(shop: Shop, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    source = "from opdkit import load\n\ndef twice():\n    return load('opd') * {}\n"
    own.write_text(source.format(2))
    execute(shop.run(tmp_path / "run", method=f"{own}:twice"))
    own.write_text(source.format(3))
    with pytest.raises(UserError, match=r"method: .*own.py:twice in the checkpoint, another "):
        resumed(shop, tmp_path / "run", method=f"{own}:twice")


def test_another_teacher_object_is_another_teacher(shop: Shop, tmp_path: Path) -> None:
    def train(steps: int, teacher: str, **more: Any) -> None:
        given = shop.values(tmp_path / "run", steps=steps)
        given |= {"teacher": load_model(teacher), "prompts": given.pop("data")}
        distill(**given, tokenizer=load_tokenizer(shop.student), **more)

    train(1, shop.teacher)
    with pytest.raises(UserError, match=r"teacher: .* in the checkpoint, .* now"):
        train(2, shop.student, resume=True)
    train(2, shop.teacher, resume=True)


def test_a_folder_of_an_earlier_version_still_resumes(shop: Shop, run: Path) -> None:
    """Its checkpoints say nothing of their run, so nothing can be compared."""
    checkpoint = run / "checkpoint-2"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["run.json"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "run.json").unlink()
    assert len(resumed(shop, run, optim={"learning_rate": 1e-2}).metrics) == 3
    with pytest.raises(UserError, match=r"learning_rate: 0.01 in the checkpoint"):
        resumed(shop, run, steps=4)


def test_a_run_does_not_go_back_nor_change_after_its_end(shop: Shop, run: Path) -> None:
    with pytest.raises(UserError, match=r"has done 2 steps, and steps=1 asks for fewer"):
        resumed(shop, run, steps=1)
    with pytest.raises(UserError, match=r"is the end of its run.*set steps to more than 2"):
        resumed(shop, run, steps=2, allow=True, seed=3)
    with pytest.raises(UserError, match=r"allow_changes is about .* a resumed run"):
        execute(shop.run(run), allow_changes=True)
    assert len(read_lines(run / "metrics.jsonl")) == 2


def test_a_half_removed_checkpoint_goes_at_the_next_start(shop: Shop, run: Path) -> None:
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    resumed(shop, run)
    assert [p.name for p in checkpoints.checkpoints(run)] == ["checkpoint-3"]


def test_settings_that_a_newer_version_adds_are_what_they_are_by_default() -> None:
    assert differences({"a": 1}, {"a": 1, "b": 2}, {"b": 2}) == []
    assert differences({"a": 1}, {"a": 1, "b": 3}, {"b": 2}) == [("b", "2", "3")]
    assert differences({"g": {"a": 1}}, {"g": {"a": 1, "b": [1]}}, {"g": {"b": [1]}}) == []
    assert differences({"g": None}, {"g": {"a": 1}}) == [("g", "null", '{"a": 1}')]

"""Every way in which a run can be wrong ends with one message (what, why, what to do), exit code 2,
and no half-written file.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.files import read_lines
from opdkit.cli import main
from opdkit.models import load as loading
from opdkit.train import checkpoint as checkpoints
from tests.common.tiny import TEXTS, save_tiny, tiny_model, tiny_tokenizer
from tests.end_to_end.conftest import Shop, gsm8k_rows, train, write_rows
from tests.end_to_end.crash import assert_same


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    """One error message with these words, and nothing else that looks like a failure."""
    said = capsys.readouterr().err
    assert code == 2
    assert said.count("opdkit: error: ") == 1 and "Traceback" not in said
    message = said.partition("opdkit: error: ")[2]
    assert [word for word in words if word not in message] == [], message


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------- what was asked for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stepz=3"], ["unknown key 'stepz'", "did you mean 'steps'"]),
        (
            ["optim.lerning_rate=1e-5"],
            ["unknown key 'optim.lerning_rate'", "did you mean 'optim.learning_rate'"],
        ),
        (["steps=many"], ["steps must be int, not 'many'"]),
        (["steps=0"], ["steps", "at least 1"]),
        (
            ["optim.schedule=step"],
            ["optim: schedule='step' must be one of constant, linear, cosine"],
        ),
        (["temperature=-1"], ["temperature=-1.0 must be 0 (greedy) or more"]),
        (["data.template={prompt}: think"], ["not valid YAML", "double quotes"]),
        (["--method=tropdd"], ["unknown method 'tropdd'", "did you mean 'tropd'"]),
        (
            ["--method=tropd", "method.kk=3"],
            ["method 'tropd' has no argument 'kk'", "did you mean 'k'"],
        ),
        (
            ["--method=gkd", "method.lmbda=2"],
            ["method 'gkd'", "must lie in [0, 1]: the share of batches that the student writes"],
        ),
        (["--method=none.py:mine"], ["names the file none.py, which is not there"]),
        (["--recipe=gsm9k"], ["unknown recipe 'gsm9k'", "did you mean 'gsm8k'"]),
        (
            ["--method=scope"],
            [
                "method 'scope' reads whether a response is right, and the run has no reward",
                "set reward to math",
            ],
        ),
        (
            ["--method=grpo", "num_generations=2"],
            ["method 'grpo' reads what a response is worth, and the run has no reward"],
        ),
        (["--reward=maths"], ["there is no reward 'maths'"]),
        (["reward={a: exact, b: 3}"], ["reward.b must be str, not 3"]),
        (
            ["--method=f_dpo + opd"],
            ["reads every response from the data", "hypo in the place of f_dpo"],
        ),
        (["evaluate.data=x.jsonl"], ["evaluates on held-out problems and has no reward"]),
        (["trackers=[tensorbored]"], ["tensorbored", "did you mean 'tensorboard'"]),
        (["device=abacus"], ["device='abacus' cannot be used here"]),
        (["lora.r=0"], ["lora: ", "0"]),
        (["--resume", "--overwrite"], ["choose one of them"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_be(
    shop: Shop,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    refused(capsys, shop.train(output, *arguments), *words)
    assert files(output) == []


def test_a_missing_setting(shop: Shop, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        capsys,
        train(f"--student={shop.student}", f"--teacher={shop.teacher}", f"--output={output}"),
        "data is missing",
    )
    refused(
        capsys,
        train(f"--student={shop.student}", f"--data={shop.data}", f"--output={output}"),
        "names none: say which with teacher=MODEL",
    )


def test_a_recipe_beside_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        capsys,
        main(["train", "run.yaml", "--recipe=gsm8k"]),
        "both the recipe gsm8k and the file run.yaml",
    )


def test_settings_may_follow_a_flag(
    shop: Shop, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            "train",
            f"--student={shop.student}",
            "steps=3",
            "--dry-run",
            f"--teacher={shop.teacher}",
            "data=d.jsonl",
            "method.k=3",
        ]
    )
    refused(capsys, code, "method 'opd': k chooses a top-k support")


# --------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"text": "What is 2 + 2?"}],
            [
                "row 0 has no prompt",
                "none of its columns (text) is a prompt",
                "columns={'prompt': 'my_column'}",
            ],
        ),
        ([], ["holds no rows", "check the path"]),
    ],
    ids=["missing column", "empty"],
)
def test_data_without_prompts(
    shop: Shop,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[Any],
    words: list[str],
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows)
    refused(capsys, shop.train(output, f"data={data}"), *words)
    assert files(output) == []


def test_data_that_are_not_there(
    shop: Shop, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(
        capsys,
        shop.train(output, "data=rows.jsonl"),
        "no file or folder 'rows.jsonl'",
        "correct the path",
    )
    assert files(output) == []


def test_a_prompt_longer_than_the_model(
    shop: Shop, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = save_tiny(tmp_path / "short", "qwen3", max_position_embeddings=24)
    refused(
        capsys,
        shop.train(output, student=short),
        "tokens; with max_completion_length=8 only 16 fit",
        "data.max_prompt_length=16",
    )
    assert files(output) == []


# ------------------------------------------------------------------------------------------- models


def test_v1_a_teacher_with_another_tokenizer_of_the_same_size(
    shop: Shop, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backwards = [text[::-1] for text in TEXTS]
    assert len(tiny_tokenizer(backwards)) == len(tiny_tokenizer())
    other = save_tiny(tmp_path / "other", texts=backwards)
    refused(
        capsys,
        shop.train(output, teacher=other),
        "the tokenizer of",
        "is not the student's",
        "use a teacher of the student's family",
    )
    assert files(output) == []


def test_r6_a_teacher_whose_weights_are_nan(
    shop: Shop, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = broken(
        tmp_path, lambda model: model.model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan)
    )
    refused(
        capsys,
        shop.train(output, teacher=teacher),
        str(tmp_path / "teacher"),
        "logits that are not finite",
        "files are damaged",
    )
    assert files(output) == []


@pytest.mark.parametrize("method", ["opd", "gkd"])
def test_r6_a_teacher_that_is_nan_at_one_token_names_the_rollout(
    shop: Shop, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """Only the prompt of row 4 holds a Z."""
    rows = gsm8k_rows(6)
    rows[4]["question"] += " ZZ"
    z = tiny_tokenizer().convert_tokens_to_ids("Z")
    teacher = broken(
        tmp_path, lambda model: model.model.embed_tokens.weight.data[z].fill_(torch.nan)
    )
    data = write_rows(tmp_path / "rows.jsonl", rows)
    code = shop.train(
        output, f"--method={method}", f"data={data}", "prompts_per_step=6", teacher=teacher
    )
    refused(capsys, code, "not finite for rollout 0/4/0", "Nothing was learnt from this step")
    assert not output.exists()


def broken(folder: Path, damage: Any) -> str:
    """A teacher with damaged weights."""
    model = tiny_model("qwen3", seed=3)
    damage(model)
    tiny_tokenizer().save_pretrained(folder / "teacher")
    model.save_pretrained(folder / "teacher")
    return str(folder / "teacher")


def test_a_loss_that_is_not_finite_names_term_and_rollout(
    shop: Shop, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from opdkit.objective import LogRatio, Objective, PolicyGradient\ndef infinite():\n    "
        "credit = LogRatio('teacher', 'student')\n    return Objective(PolicyGradient(credit / "
        "(credit - credit)))\n"
    )
    code = shop.train(output, f"--method={tmp_path / 'mine.py'}:infinite")
    refused(
        capsys,
        code,
        "loss of term policy_gradient is not finite at rollout 0/",
        "The optimiser was not moved",
    )


# --------------------------------------------------------------------------------- several teachers


def routed(tmp_path: Path, names: list[str | None]) -> str:
    rows = [{**row, "teacher": name} for row, name in zip(gsm8k_rows(len(names)), names)]
    return write_rows(tmp_path / "routed.jsonl", rows)


def test_r10_an_unknown_routing_key(
    shop: Shop, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = routed(tmp_path, ["math", "code", "maths"])
    code = shop.train(
        output, f"data={data}", f"teacher={{math: {shop.teacher}, code: {shop.teacher}}}"
    )
    refused(
        capsys,
        code,
        "row 2 names the teacher 'maths'",
        "did you mean 'math'",
        "teachers for math, code",
        "'default'",
    )
    assert files(output) == []


def test_r10_a_row_without_a_routing_key(
    shop: Shop, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = shop.train(
        output, f"data={routed(tmp_path, ['math', None])}", f"teacher={{math: {shop.teacher}}}"
    )
    refused(capsys, code, "row 1 names no teacher", "'default'")


def test_r10_default_serves_the_others_and_a_checkpoint_under_two_names_is_loaded_once(
    shop: Shop, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    real = loading.load_model

    def load_model(name: str, **settings: Any) -> Any:
        loaded.append(name)
        return real(name, **settings)

    monkeypatch.setattr(loading, "load_model", load_model)
    data = routed(tmp_path, ["math", None, "poetry", "code"])
    teachers = f"{{math: {shop.teacher}, code: {shop.llama}, default: {shop.teacher}}}"
    assert (
        shop.train(
            output,
            f"data={data}",
            f"teacher={teachers}",
            f"models.other={shop.teacher}",
            "prompts_per_step=4",
        )
        == 0
    )
    assert sorted(loaded) == sorted([shop.student, shop.teacher, shop.llama])


# --------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("where", ["a_file/run", "/proc/run"])
def test_an_output_folder_that_cannot_be_written(
    shop: Shop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """Refused before any model is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("precious")
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    refused(
        capsys,
        shop.train(where),
        f"{where} cannot be written",
        "choose another with output=DIR",
    )
    assert (tmp_path / "a_file").read_text() == "precious"


def test_an_output_folder_that_holds_a_run(
    shop: Shop, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.train(output, "steps=1") == 0
    before = {name: (output / name).read_bytes() for name in files(output)}
    capsys.readouterr()
    refused(
        capsys, shop.train(output), "already holds a run", "--resume", "--overwrite", "output=DIR"
    )
    refused(
        capsys,
        shop.train(output, "--overwrite", "data=rows.jsonl"),
        "no file or folder 'rows.jsonl'",
    )
    assert {name: (output / name).read_bytes() for name in files(output)} == before
    assert shop.train(output, "--overwrite", "steps=2") == 0
    assert [line["step"] for line in read_lines(output / "metrics.jsonl")] == [1, 2]


def test_a_checkpoint_cut_short(
    shop: Shop, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.train(output, "steps=2", "checkpoint.every=1", "checkpoint.keep=2") == 0
    weights = output / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    code = shop.train(output, "--resume", "steps=3")
    refused(
        capsys,
        code,
        "checkpoint-2 is damaged",
        "model.safetensors has",
        "Delete that folder to continue from the checkpoint before it",
    )
    for path in sorted((output / "checkpoint-2").iterdir()):
        path.unlink()
    (output / "checkpoint-2").rmdir()
    assert shop.train(output, "--resume", "steps=3") == 0


@pytest.mark.parametrize("limit", [100_000, 250_000], ids=["weights", "optimiser"])
def test_a_disk_that_is_full_keeps_the_checkpoint_before_and_resumes(
    shop: Shop,
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: int,
) -> None:
    """No file may grow beyond a limit that the weights (then the optimiser's moments) of the second
    checkpoint break.
    """
    real, soft, hard = checkpoints.write_model, *resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(folder: Path, *more: Any) -> None:
        if folder.name.endswith("-2"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        real(folder, *more)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_model", write)
        try:
            code = shop.train(output, "steps=3", "checkpoint.every=1")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(
        capsys,
        code,
        "checkpoint-2 could not be written",
        "Earlier checkpoints are untouched",
        "--resume",
    )
    assert [p.name for p in output.iterdir() if p.is_dir() and "checkpoint" in p.name] == [
        "checkpoint-1"
    ]
    assert checkpoints.newest(output) == output / "checkpoint-1"
    assert shop.train(output, "--resume", "steps=3", "checkpoint.every=1") == 0
    assert shop.train(tmp_path / "whole", "steps=3", "checkpoint.every=1") == 0
    assert_same(output, tmp_path / "whole")

"""Whole runs between two tokenizers: they learn, are refused where token ids are compared, and the
example does what it says.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import opdkit
from opdkit.base.files import read_lines
from opdkit.models import load as loading
from opdkit.models.load import load_model, load_tokenizer
from tests.common.other_tokenizers import OTHER, sentencepiece
from tests.common.tiny import tiny_model
from tests.end_to_end.conftest import Shop, write_rows

ROOT = Path(__file__).parents[2]
METHODS = (
    "uld",
    "gold",
    "gold(hybrid=true, lmbda=1.0, merge=bayesian)",
    "gold(hybrid=true, lmbda=1.0, longer=rank, skip_eos=false)",
)


@pytest.fixture(scope="module")
def far(shop: Shop) -> str:
    """A teacher of another family, its matrix padded by 12 rows."""
    folder = str(shop.folder / "far")
    tokenizer = sentencepiece(chat=True, bos=True)
    tokenizer.save_pretrained(folder)
    tiny_model("llama", max(tokenizer.get_vocab().values()) + 13, seed=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(shop: Shop) -> str:
    return write_rows(
        shop.folder / "answers.jsonl",
        [{"prompt": f"Tom buys {i} apples", "response": OTHER[i % 3]} for i in range(6)],
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_student_learns_from_a_teacher_with_another_tokenizer(
    shop: Shop, far: str, data: str, tmp_path: Path, method: str
) -> None:
    evaluate = (f"evaluate.data={data}", "evaluate.teacher=true", f"reward={shop.reward}")
    assert (
        shop.train(
            tmp_path, f"data={data}", f"--method={method}", "steps=3", *evaluate, teacher=far
        )
        == 0
    )
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert len(lines) == 3 and all(math.isfinite(x["loss"]) and x["loss"] > 0 for x in lines)
    assert max(x["grad_norm"] for x in lines) > 0 and lines[0]["tokens/trained"] > 0
    assert {e["name"] for e in read_lines(tmp_path / "evals.jsonl")} == {"student", "teacher"}
    assert (
        load_tokenizer(str(tmp_path / "model")).get_vocab()
        == load_tokenizer(shop.student).get_vocab()
    )


def test_with_the_students_tokenizer_gold_trains_as_gkd(
    shop: Shop, data: str, tmp_path: Path
) -> None:
    for name in ("gold", "gkd"):
        assert (
            shop.train(tmp_path / name, f"data={data}", f"--method={name}(lmbda=0.5)", "steps=3")
            == 0
        )
    ours, gkd = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("gold", "gkd"))
    for a, b in zip(ours, gkd, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-5
        )
        # only where the student wrote
        kl = "teacher_kl/sampled"
        assert a.get(kl) == (b.get(kl) and pytest.approx(b[kl], rel=1e-5))


def test_loaded_models_with_their_tokenizers(shop: Shop, far: str, tmp_path: Path) -> None:
    student, teacher = load_model(shop.student), load_model(far)
    settings = {
        "steps": 1,
        "num_generations": 2,
        "max_completion_length": 8,
        "output": str(tmp_path),
        "device": "cpu",
    }
    tokenizers = {
        "tokenizer": load_tokenizer(shop.student),
        "teacher_tokenizer": load_tokenizer(far),
    }
    result = opdkit.distill(
        student, teacher, ["Tom has", "12 plus"], "uld", **tokenizers, **settings
    )
    assert result.metrics[0]["loss"] > 0


# ------------------------------------------------------------------------------------------ refused


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error: what is refused is refused before."""

    def load(*args: object, **settings: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", load)


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize("method", ["opd", "gkd", "gold + opd"])
def test_a_method_that_compares_ids_is_refused(
    shop: Shop, far: str, tmp_path: Path, method: str, capsys
) -> None:
    assert shop.train(tmp_path, f"--method={method}", teacher=far) == 2
    said = capsys.readouterr().err
    assert (
        "is not the student's" in said
        and "use a teacher of the student's family, or method gold or uld" in said
    )


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize("teacher", ["server:http://127.0.0.1:9", "vllm:MODEL", "cached:FOLDER"])
@pytest.mark.parametrize("method", ["uld", "gold"])
def test_a_teacher_elsewhere_is_refused(
    shop: Shop, tmp_path: Path, method: str, teacher: str, capsys
) -> None:
    assert shop.train(tmp_path, f"--method={method}", teacher=teacher) == 2
    assert (
        f"a {teacher.partition(':')[0]} teacher cannot say. Use a teacher in this process"
        in capsys.readouterr().err
    )


@pytest.mark.usefixtures("weightless")
def test_a_chat_without_a_template_is_refused(shop: Shop, tmp_path: Path, capsys) -> None:
    plain = str(tmp_path / "plain")
    sentencepiece().save_pretrained(plain)
    assert shop.train(tmp_path / "run", "--method=gold", teacher=plain) == 2
    assert (
        "the teacher's tokenizer" in (said := capsys.readouterr().err) and "data.chat=false" in said
    )


# -------------------------------------------------------------------------------------- the example


@pytest.mark.slow
def test_the_example_raises_the_accuracy(tmp_path: Path) -> None:
    """Measured: from .45 to .87 (uld), .84 (gold), .90 (hybrid, longer spans by rank), of 256
    problems.
    """
    run = [sys.executable, "examples/two_tokenizers.py", str(tmp_path)]
    said = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    summary = json.loads(said.splitlines()[-1])
    assert summary["teacher"] > 0.85
    for method, (before, after) in summary["methods"].items():
        assert after > before + 0.2, method

"""The command line: each command says what it is asked, errors are one message and exit code 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import opdkit
from opdkit import cli
from opdkit.base.interrupt import Stopped
from opdkit.cli import main
from opdkit.cli.doctor import DOCTOR
from opdkit.methods import FAMILIES
from opdkit.run.settings import Data
from tests.common.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": f"What is {i} + 123456?", "answer": str(i + 123456)}) + "\n"
            for i in range(3)
        )
    )
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys)
    for command in (
        "quickstart",
        "train",
        "eval",
        "sample",
        "report",
        "methods",
        "explain",
        "check",
        "doctor",
    ):
        assert re.search(rf"^ +{command}\b", out, re.M), command


def test_an_unknown_command_or_flag_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trian"], ["train", "--studnt=x"], ["doctor", "now"], ["report"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "unrecognized arguments: --studnt=x" in capsys.readouterr().err


def test_methods_lists_each_with_its_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = said(capsys, "methods")
    for name in opdkit.methods():
        assert re.search(rf"^ *{name} ", out, re.M), name
    assert re.search(r"^ *iw_opd .*2606\.22600", out, re.M)


def test_methods_of_one_family(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = said(capsys, "methods", "--family", "rewards")
    shown = {name for name in opdkit.methods() if re.search(rf"^ *{name} ", out, re.M)}
    assert shown == set(FAMILIES["rewards"].methods) and "scope" in shown
    assert "did you mean 'agents'" in said(capsys, "methods", "--family", "agent", code=2)


def test_explain_prints_the_formula_and_what_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "explain", "gkd", "beta=0.25")
    assert (
        "beta = 0.25" in out and "teacher over the whole vocabulary" in out and "2306.13649" in out
    )
    assert "did you mean 'beta'" in said(capsys, "explain", "gkd", "bta=1", code=2)


def test_check_passes_and_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", "opd"]) == 0
    capsys.readouterr()
    (tmp_path / "wrong.py").write_text(
        "from dataclasses import dataclass\nfrom opdkit.objective import Objective, "
        "PolicyGradient, Signal\nimport torch\n@dataclass(frozen=True)\nclass Noise(Signal):\n    "
        "def value(self, batch):\n        return torch.rand(batch.shape)\ndef noisy():\n    return "
        "Objective(PolicyGradient(Noise()))\n"
    )
    assert main(["check", f"{tmp_path / 'wrong.py'}:noisy"]) == 1


def test_sample_prints_a_response_to_each_prompt(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    out = said(
        capsys,
        "sample",
        model,
        "Two plus two?",
        "Three?",
        "--samples=2",
        "--max-completion-length=4",
    )
    assert [line.split()[1] for line in out.splitlines() if line.startswith("--- ")] == [
        "0/0/0",
        "0/0/1",
        "0/1/0",
        "0/1/1",
    ]
    assert "there is nothing to answer" in said(capsys, "sample", model, code=2)


def test_eval_prints_estimates_with_intervals_and_keeps_the_answers(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path
) -> None:
    arguments = [
        "eval",
        model,
        f"--data={data}",
        "--samples=2",
        "--k=1,2",
        "--max-completion-length=4",
        f"--out={tmp_path / 'answers.jsonl'}",
    ]
    out = said(capsys, *arguments)
    assert re.search(r"^problems +3, 2 samples each$", out, re.M)
    assert re.search(r"^Avg@2 +0\.0000  95% \[0\.0000, 0\.\d{4}\]$", out, re.M)
    assert [line.split()[0] for line in out.splitlines() if "@" in line] == [
        "Avg@2",
        "Pass@1",
        "Pass@2",
    ]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
    assert "--k 1,b must be numbers" in said(
        capsys, "eval", model, f"--data={data}", "--k=1,b", code=2
    )
    assert "Pass@4 cannot be estimated from 1 samples" in said(
        capsys, "eval", model, f"--data={data}", "--k=4", code=2
    )


def test_a_dry_run_prints_the_run_and_its_memory_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    out = said(
        capsys,
        "train",
        f"--student={model}",
        f"--teacher={model}",
        f"--data={data}",
        f"--output={output}",
        "--dry-run",
        "steps=7",
    )
    assert "steps: 7" in out and "objective: PolicyGradient" in out
    assert re.search(r"^ +student +\S+ +0\.0M parameters", out, re.M) and re.search(
        r"^memory: about \d", out, re.M
    )
    assert not output.exists()


def test_the_run_in_a_file_may_be_changed_by_flags_and_settings(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path
) -> None:
    """Settings win over the file wherever they stand, before or after a flag."""
    file = tmp_path / "run.yaml"
    file.write_text(f"student: {model}\nteacher: {model}\ndata: {data}\nsteps: 3\nseed: 1\n")
    out = said(capsys, "train", str(file), "seed=5", "--dry-run", "steps=9", "--method=gkd")
    assert "steps: 9" in out and "seed: 5" in out and "method: gkd" in out


def test_eval_asks_as_training_did(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    asked: list[Data] = []

    def note(model: str, data: Data, *_: object, **__: object) -> None:
        asked.append(data)
        raise opdkit.UserError("enough")

    monkeypatch.setattr("opdkit.run.commands.eval_model", note)
    assert main(["eval", "model", f"--data={data}", "--system=Be brief.", "--thinking=off"]) == 2
    assert main(["eval", "model", f"--data={data}", "--thinking=on"]) == 2
    assert [(d.system, d.enable_thinking) for d in asked] == [("Be brief.", False), (None, True)]


def test_report_needs_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is not a run folder" in said(capsys, "report", str(tmp_path), code=2)


def test_doctor_names_the_paths_taken(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "doctor")
    assert {"python", "torch", "gpu", "sample", "score", "learn"} <= {
        line.split()[0] for line in out.splitlines()
    }


ENDS = [
    (KeyboardInterrupt(), 130),
    (Stopped(signal.SIGTERM), 143),
    (Stopped(signal.SIGHUP), 129),
    (BrokenPipeError(), 1),  # of a worker or a socket; see below for a reader of stdout who left
    (SystemExit(0), 1),
    (RecursionError(), 1),
    (GeneratorExit(), 1),
    (opdkit.UserError("no"), 2),
]


@pytest.mark.parametrize(("error", "code"), ENDS)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    def fails(options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "COMMANDS", (replace(DOCTOR, run=fails),))
    assert main(["doctor"]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("opdkit:") == 1
    if code > 128:
        assert "continue with --resume" in said
    if code == 1:  # the trace is in a file
        kept = Path(said.split()[-1])
        assert type(error).__name__ in kept.read_text()
        kept.unlink()


def test_a_reader_that_left_is_no_error():
    code = "import sys; from opdkit.cli import main; sys.exit(main(['methods']))"
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    assert ended.returncode == 0 and ended.stderr == b""


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_says_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command.name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert said.startswith(f"usage: opdkit {command.name} ") and command.help in said

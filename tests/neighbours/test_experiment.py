"""The room of neighbours: settings are strict, seeds are the unit of chance, a folder holds what
was found.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path

import pytest

from opdkit.cli import main
from opdkit.neighbours import NEIGHBOURS
from opdkit.neighbours.experiment import neighbour
from opdkit.neighbours.outcome import Mean, area, differences, last, mean_of
from tests.neighbours import made_up


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEIGHBOURS, "made_up", "tests.neighbours.made_up")


def test_a_mean_and_its_interval() -> None:
    """1, 2, 3, 6: mean 3, deviation sqrt(14 / 3), three degrees of freedom: 3.182 sqrt(14 / 12)."""
    half = 3.182 * math.sqrt(14 / 12)
    got = mean_of([1, 2, 3, 6])
    assert (got.mean, got.low, got.high) == pytest.approx((3, 3 - half, 3 + half))
    assert str(Mean(0.5, 0.25, 0.75)) == "0.5 [0.25, 0.75]"
    assert mean_of([2.0]) == Mean(2.0, -math.inf, math.inf) and str(mean_of([2.0])) == "2"


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of 4,000 samples of five normal numbers 95 % +- 1.4 % (four deviations) hold 0."""
    draw = random.Random(0)
    means = [mean_of([draw.gauss(0, 1) for _ in range(5)]) for _ in range(4000)]
    assert abs(sum(m.low < 0 < m.high for m in means) / 4000 - 0.95) < 0.014


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds that differ by 100 hide no gap of 1; unequal numbers of seeds are an error."""
    got = differences([1.0, 101.0, 201.0], [0.0, 100.0, 200.0])
    assert (got.mean, got.low, got.high) == (1, 1, 1)
    with pytest.raises(ValueError):
        differences([1.0], [1.0, 2.0])
    assert last([[1, 2], [3, 5]]) == [2, 5] and area([[1, 2], [3, 5]]) == [1.5, 4]


@pytest.mark.usefixtures("known")
def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder holds a figure and every number; the table and what was found are printed."""
    folder = tmp_path / "out" / "put"
    assert main(["neighbours", "made_up", "seeds=4", "gap=0.25", f"output={folder}"]) == 0
    out = capsys.readouterr().out
    assert (
        "b [made up]" in out and "b is 0.25 [0.25, 0.25] higher." in out and "seen     yes" in out
    )
    kept = json.loads((folder / "outcome.json").read_text())
    assert kept["settings"] == {"seeds": 4, "output": str(folder), "gap": 0.25, "points": 3}
    assert kept["panels"][0]["lines"]["b"][3] == [3.25, 4.25, 5.25] and kept["holds"] is True
    assert kept["source"] == made_up.SOURCE and kept["claim"] == made_up.CLAIM
    figure = (folder / "figure.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 5000


@pytest.mark.usefixtures("known")
def test_a_folder_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["neighbours", "made_up", "seeds=1"]) == 0
    assert (tmp_path / "runs" / "neighbours" / "made_up" / "figure.png").exists()


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mode_up"], "no neighbour 'mode_up'; did you mean 'made_up'?"),
        (["made_up", "seed=3"], "unknown key 'seed'; did you mean 'seeds'?"),
        (["made_up", "seeds=0"], "seeds=0 must be at least 1"),
        (["made_up", "gap=wide"], "gap must be a number, not 'wide'"),
        (["made_up", "seeds=2.5"], "seeds must be int, not 2.5"),
        (["made_up", "output=/dev/null/x"], "choose another"),
    ],
)
def test_errors_say_what_to_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["neighbours", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("known")
def test_a_missing_package_is_named_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(made_up, "NEEDS", ("no_such_package",))
    assert importlib.util.find_spec("no_such_package") is None
    assert main(["neighbours", "made_up", f"output={tmp_path / 'new'}"]) == 2
    assert "no_such_package, which is not installed: pip install" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("known")
def test_the_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["neighbours"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in NEIGHBOURS)
    assert "b is higher than a [by a gap]." in out and "arXiv:0000.00000" in out


@pytest.mark.parametrize("name", list(NEIGHBOURS))
def test_each_says_what_it_is_about(name: str) -> None:
    """A claim, a paper, settings that all have defaults, and a section of the page."""
    module = neighbour(name)
    assert module.CLAIM.endswith(".") and module.SOURCE.startswith("arXiv:")
    module.Settings()
    page = (Path(__file__).parents[2] / "docs" / "neighbours.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert module.SOURCE.replace("arXiv:", "arXiv ") in section
    assert f"opdkit neighbours {name}" in section
    assert f"(neighbours/{name}.png)" in section

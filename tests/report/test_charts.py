"""Charts put values where they belong and never lose a spike."""

from pathlib import Path

import pytest

from opdkit.report import charts
from opdkit.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    Scale,
    line_chart,
    smoothed,
    thinned,
)
from opdkit.report.numbers import duration, log_ticks, number, tick_labels, ticks


def test_numbers_as_people_read_them():
    values = [
        0.0,
        0.04123,
        0.69,
        12.34,
        123.4,
        999.6,
        1236.4,
        12345,
        15_100_000,
        2.5e9,
        1e-6,
        2.5e-7,
        -0.5,
        None,
        float("nan"),
    ]
    expected = [
        "0",
        "0.0412",
        "0.69",
        "12.3",
        "123",
        "1000",
        "1236",
        "12.3k",
        "15.1M",
        "2.5B",
        "1e-6",
        "2.5e-7",
        "-0.5",
        "–",
        "–",
    ]
    assert [number(v) for v in values] == expected
    assert number(0.6975, "%") == "69.8%"
    assert [duration(s) for s in (48, 720, 12000)] == ["48 s", "12 min", "3 h 20 min"]


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ticks(-3, 7) == pytest.approx([-2.5, 0, 2.5, 5])
    assert log_ticks(0.04, 7) == pytest.approx([0.05, 0.2, 1, 5])
    assert log_ticks(1e-6, 1) == pytest.approx([1e-6, 1e-4, 1e-2, 1])


def test_near_ticks_have_different_labels():
    assert tick_labels([38.2, 38.205, 38.21]) == ["38.2", "38.205", "38.21"]


def test_scale_maps_ends_to_ends():
    assert [Scale(0, 10, 100, 0)(v) for v in (0, 5, 10)] == [100, 50, 0]
    assert [Scale(1, 100, 0, 10, log=True)(v) for v in (1, 10, 100)] == [0, 5, 10]


def test_smoothing_keeps_levels_and_lags_nowhere():
    assert smoothed([2.0] * 40) == pytest.approx([2.0] * 40)
    assert smoothed([1.0, 9.0] * 5) == [1.0, 9.0] * 5  # too short to smooth
    line = [float(i) for i in range(301)]
    # a trailing average alone would be behind by several steps
    assert smoothed(line)[150] == pytest.approx(150)
    noisy = [(-1.0) ** i for i in range(200)]
    assert max(map(abs, smoothed(noisy)[20:-20])) < 0.2


def test_thinning_keeps_spikes_and_ends():
    values = [0.0] * 10_000
    values[7_777], values[1_234] = 9.0, -9.0
    kept = thinned(values)
    assert len(kept) <= 400
    assert {0, 1_234, 7_777, 9_999} <= set(kept)
    assert kept == sorted(kept)


def test_a_chart_draws_between_its_margins_and_reads_exact_values():
    steps = list(range(0, 11, 5))
    chart = line_chart("Loss", steps, [Line("loss", [4.0, None, 2.0])], unit="nats")
    (curve,) = chart["curves"]
    (x0, y0), (x1, y1) = curve["dots"]
    assert (x0, x1) == (LEFT, WIDTH - RIGHT)
    assert TOP < y0 < y1 < HEIGHT - BOTTOM  # 4 above 2
    assert curve["value"] == "2"
    assert chart["data"]["steps"] == [0, 10]
    assert chart["data"]["lines"] == [{"y": [4.0, 2.0]}]


def test_all_lines_are_read_at_the_same_step():
    steps = list(range(5000))
    rising, falling = [float(s) for s in steps], [-float(s) for s in steps]
    data = line_chart("x", steps, [Line("a", rising), Line("b", falling)])["data"]
    assert len(data["steps"]) == 1500
    assert data["lines"][0]["y"] == [float(f"{s:.4g}") for s in data["steps"]]
    assert data["lines"][1]["y"] == [-v for v in data["lines"][0]["y"]]


def test_a_band_is_read_as_its_two_ends():
    chart = line_chart(
        "Length", [1, 2], [Line("mean", [5.0, 6.0]), Line("range", [1.0, 2.0], [9.0, 8.0])]
    )
    mean, band = chart["curves"]
    assert band["value"] == "2 – 8"
    assert band["band"].endswith("Z")
    assert (band["smooth"], band["color"]) == ("", mean["color"])
    assert chart["data"]["lines"][1] == {"y": [1.0, 2.0], "z": [9.0, 8.0]}


def test_log_scale_where_sizes_differ_much_but_not_for_a_warm_up_or_a_spike():
    steps = list(range(100))
    flat = Line("a", [1.0] * 100)
    assert line_chart("x", steps, [flat, Line("b", [100.0] * 100)])["unit"] == "log scale"
    assert line_chart("x", steps, [Line("a", [0.001, *[1.0] * 98, 900.0])])["unit"] == ""
    assert line_chart("x", steps, [Line("a", [0.0] * 50 + [100.0] * 50)])["unit"] == ""


def test_one_step_and_no_value_at_all_can_be_drawn():
    assert line_chart("x", [3], [Line("a", [0.0])])["curves"][0]["dots"] == [(LEFT, 97.0)]
    empty = line_chart("x", [3, 4], [Line("a", [None, None])])
    assert (empty["curves"][0]["value"], empty["data"]["steps"]) == ("–", [])


def test_twelve_curves_are_told_apart() -> None:
    """Each of twelve has a colour of its own that the page defines, and half of them a dash."""
    lines = [Line(f"m{i}", [float(i), i + 1.0]) for i in range(12)]
    drawn = line_chart("many", [1, 2], lines)["curves"]
    assert len({curve["color"] for curve in drawn}) == 12
    assert [curve["dash"] for curve in drawn] == [False] * 6 + [True] * 6
    style = (Path(charts.__file__).parent / "style.css.j2").read_text()
    light, dark = style.split("color-scheme: light")
    for theme in (light, dark):
        assert all(f"--c{curve['color']}: #" in theme for curve in drawn)

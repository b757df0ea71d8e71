"""Who waited for whom: shares of time worked by hand, and what the page says and draws."""

import json

import pytest

from opdkit.base.errors import UserError
from opdkit.report.curves import time_shares
from opdkit.report.html import render
from opdkit.report.intervals import both, measure, union, without
from opdkit.report.read import read_run
from opdkit.report.timeline import timeline


def run_of(folder, *steps, config="steps: 9\n"):
    """A run whose step n, from 1 on, left the nth list of spans."""
    (folder / "run.yaml").write_text(config)
    lines = [{"step": n, "spans": spans} for n, spans in enumerate(steps, 1)]
    (folder / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder)


def in_turn(start, write=3, learn=1):
    """A step that begins at `start`: the sampler writes, then the trainer learns."""
    there = start + write
    return [
        ["sampler", "sample", start, there],
        ["trainer", "wait", start, there],
        ["trainer", "learn", there, there + learn],
    ]


def beside(start, writes=1, learn=3):
    """A step with rollouts that were written while the trainer learnt the step before."""
    return [
        ["sampler", "sample", start - 3, start - 3 + writes],
        ["trainer", "learn", start, start + learn],
    ]


def table(run):
    return {row["part"]: row for row in timeline(run)["table"]}


def test_intervals():
    a = union([(4, 5), (0, 1), (1, 2), (0, 1.5), (3, 3)])
    assert a == [(0, 2), (4, 5)] and measure(a) == 3
    assert both(a, [(1, 4.5)]) == [(1, 2), (4, 4.5)]
    assert without(a, [(1, 4.5)]) == [(0, 1), (4.5, 5)]
    assert without(a, []) == a and both(a, []) == []


def test_what_a_phase_waits_for_is_no_work_of_its_own(tmp_path):
    """Scoring of 4 s, half of it a teacher elsewhere that is asked, in 5 s of a step."""
    steps = [
        [
            ["trainer", "score", at, at + 4],
            ["trainer", "wait", at + 1, at + 3],
            ["trainer", "learn", at + 4, at + 5],
            ["teacher", "score", at + 1, at + 3],
        ]
        for at in (0, 5, 10)
    ]
    run = run_of(tmp_path, *steps)
    rows = table(run)
    assert (rows["trainer"]["busy"], rows["teacher"]["busy"]) == ("60.0%", "40.0%")
    assert [(what, share) for what, share, _ in rows["trainer"]["phases"]] == [
        ("score", "40.0%"), ("learn", "20.0%"),
    ]  # fmt: skip
    assert rows["trainer"]["still"] == "teacher 40.0%"
    assert "40" in timeline(run)["says"] and "teachers" in timeline(run)["says"]


def test_two_that_take_turns(tmp_path):
    run = run_of(tmp_path, *(in_turn(4 * n) for n in range(4)))
    rows = table(run)
    assert (rows["trainer"]["busy"], rows["trainer"]["idle"]) == ("25.0%", "75.0%")
    assert rows["sampler"]["busy"] == "75.0%"
    assert rows["trainer"]["still"] == "sampler 75.0%"
    assert rows["sampler"]["still"] == "trainer 25.0%"
    says = timeline(run)["says"]
    assert says.startswith("The trainer waited 75 % of the time for rollouts: with ahead=1 ")


def test_a_trainer_that_writes_itself(tmp_path):
    steps = [
        [["trainer", "sample", 4 * n, 4 * n + 2], ["trainer", "learn", 4 * n + 2, 4 * n + 4]]
        for n in range(3)
    ]
    run = run_of(tmp_path, *steps)
    says = timeline(run)["says"]
    assert says.startswith("Rollouts and their rewards took 50 % of the trainer")
    assert "with ahead=1 writes while" in says
    other = run_of(tmp_path, *steps, config="ahead: 1\n")
    assert "with ahead=1 it writes and learns in turn. A sampler" in timeline(other)["says"]
    assert [(name, share) for name, share, _ in table(run)["trainer"]["phases"]] == [
        ("sample", "50.0%"),
        ("learn", "50.0%"),
    ]


@pytest.mark.parametrize("sampler", ["server:http://a", "{kind: server, urls: [http://a]}"])
def test_a_trainer_whose_samplers_are_servers_waits_for_them(tmp_path, sampler):
    """2 of 4 s: its processes only ask, and who writes tells nothing of itself."""
    steps = [
        [["trainer", "sample", 4 * n, 4 * n + 2], ["trainer", "learn", 4 * n + 2, 4 * n + 4]]
        for n in range(3)
    ]
    run = run_of(tmp_path, *steps, config=f"sampler: {sampler}\n")
    rows = table(run)
    assert rows["trainer"]["busy"] == rows["sampler"]["busy"] == "50.0%"
    assert "waited 50 % of the time for rollouts: with ahead=1" in timeline(run)["says"]


def test_samplers_of_a_cluster_have_rows_of_their_own(tmp_path):
    """The trainer asks two, which write for 3 and 1 of 4 s; what all together take is no row."""
    steps = [
        [
            ["trainer", "sample", 4 * n, 4 * n + 3],
            ["sampler", "sample", 4 * n, 4 * n + 3],
            ["sampler:sampler-0", "sample", 4 * n, 4 * n + 3],
            ["sampler:sampler-1", "load", 4 * n, 4 * n + 0.5],
            ["sampler:sampler-1", "sample", 4 * n + 0.5, 4 * n + 1],
            ["trainer", "learn", 4 * n + 3, 4 * n + 4],
        ]
        for n in range(3)
    ]
    rows = table(run_of(tmp_path, *steps))
    assert [(name, row["busy"]) for name, row in rows.items()] == [
        ("trainer", "25.0%"),
        ("sampler:sampler-0", "75.0%"),
        ("sampler:sampler-1", "25.0%"),
    ]


def test_a_lag_on_one_device_is_told_to_overlap_nothing(tmp_path):
    run = run_of(tmp_path, *(in_turn(4 * n) for n in range(4)), config="ahead: 1\n")
    assert "with ahead=1 the two still take turns" in timeline(run)["says"]


def test_samplers_too_slow_for_a_trainer_that_does_not_wait_for_turns(tmp_path):
    """A sampler that always writes, 3 s a step, and a trainer that learns for 1 s of these: the
    third of the time that it works, the sampler does too.
    """
    steps = [
        [
            ["sampler", "sample", 3 * n, 3 * n + 3],
            ["trainer", "wait", 3 * n + 1, 3 * n + 3],
            ["trainer", "learn", 3 * n + 3, 3 * n + 4],
        ]
        for n in range(5)
    ]
    run = run_of(tmp_path, *steps, config="ahead: 1\n")
    rows = table(run)
    assert (rows["trainer"]["busy"], rows["sampler"]["busy"]) == ("33.3%", "91.7%")
    assert "for rollouts: more samplers" in timeline(run)["says"]


def test_a_trainer_that_never_waits_limits_the_run(tmp_path):
    run = run_of(tmp_path, *(beside(3 * n) for n in range(1, 6)))
    rows = table(run)
    assert (rows["trainer"]["busy"], rows["trainer"]["still"]) == ("100.0%", "")
    says = timeline(run)["says"]
    # 1 s of 3 in each step; of the last step, the rollouts of the next are not there
    assert "The trainer worked for 100 % of the time" in says and "sampler stood still" in says


def test_teachers_that_are_waited_for(tmp_path):
    steps = [
        [
            ["teacher maths", "score", 4 * n, 4 * n + 2],
            ["teacher code", "score", 4 * n, 4 * n + 1],
            ["trainer", "wait", 4 * n, 4 * n + 2],
            ["trainer", "learn", 4 * n + 2, 4 * n + 4],
        ]
        for n in range(4)
    ]
    run = run_of(tmp_path, *steps)
    assert timeline(run)["says"].startswith("The trainer waited 50 % of the time for teachers")
    assert table(run)["trainer"]["still"] == "teacher code 25.0%, teacher maths 50.0%"


def test_what_lies_between_steps_does_not_count(tmp_path):
    """An evaluation of an hour after the second step changes no share, and is not drawn."""
    starts = (0, 4, 4000, 4004)
    run = run_of(tmp_path, *(in_turn(start) for start in starts))
    assert table(run)["trainer"]["busy"] == "25.0%"
    # the next rollouts were written meanwhile: none of the trainer's time
    early = [["sampler", "sample", 3000, 3003], *in_turn(4000, write=0, learn=4)]
    run = run_of(tmp_path, in_turn(0), in_turn(4), early)
    assert table(run)["trainer"]["busy"] == "62.5%"  # (1 + 4) s of 8
    run = run_of(tmp_path, *(in_turn(start) for start in starts))
    drawn = timeline(run)["gantt"]
    assert [label for _, label in drawn["steps"]] == ["step 3", "step 4"]
    thin = run_of(tmp_path, *(in_turn(4 * n) for n in range(3)), in_turn(12, write=99))
    assert [label for _, label in timeline(thin)["gantt"]["steps"]] == ["step 2", "", "step 4"]


def test_the_first_step_does_not_count_where_there_are_more(tmp_path):
    slow = in_turn(0, write=90, learn=10)
    assert table(run_of(tmp_path, slow))["trainer"]["busy"] == "10.0%"
    run = run_of(tmp_path, slow, in_turn(100), in_turn(104))
    assert table(run)["trainer"]["busy"] == "25.0%"
    assert timeline(run)["of"] == "steps 2 to 3, without the first"


def test_bars_lie_where_the_seconds_are(tmp_path):
    run = run_of(tmp_path, in_turn(-4), in_turn(0), in_turn(4))
    drawn = timeline(run)["gantt"]
    trainer, sampler = drawn["rows"]
    assert (trainer["name"], sampler["name"]) == ("trainer", "sampler")
    second = (drawn["right"] - drawn["left"]) / 8
    waits = [bar for bar in trainer["bars"] if bar["color"] is None]
    work = [bar for bar in trainer["bars"] if bar not in waits]
    for bars, starts, long in ((sampler["bars"], (0, 4), 3), (waits, (0, 4), 3), (work, (3, 7), 1)):
        at = [bar["x"] for bar in bars]
        assert at == pytest.approx([drawn["left"] + second * s for s in starts], abs=1)
        assert [bar["width"] for bar in bars] == pytest.approx([long * second] * 2, abs=1)


def test_parts_stand_in_their_order(tmp_path):
    names = ["teacher", "sampler 10", "trainer 1", "sampler 2", "watch", "trainer 0"]
    run = run_of(tmp_path, [[name, "sample", 0, 1] for name in names])
    assert [row["part"] for row in timeline(run)["table"]] == [
        "trainer 0",
        "trainer 1",
        "sampler 2",
        "sampler 10",
        "teacher",
        "watch",
    ]


def test_nothing_is_shown_where_nothing_was_kept(tmp_path):
    assert timeline(run_of(tmp_path)) is None
    assert "Who waited" not in render(read_run(tmp_path))
    assert timeline(run_of(tmp_path, [])) is None


def test_the_page_shows_it_with_the_lag(tmp_path):
    run = run_of(tmp_path, in_turn(0), in_turn(4))
    metrics = [{"step": n, "lag/steps": 1, "lag/updates": 4} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    hostile = '"><script>alert(1)</script>'
    assert render(run).count("<h2") == render(read_run(tmp_path)).count("<h2")
    page = render(run_of(tmp_path, in_turn(0), [*in_turn(4), [hostile, hostile, 4, 5]]))
    assert page.count("Who waited for whom</h2>") == 1
    assert page.count("<figcaption>Lag") == 1  # there, and not among the curves as well
    assert "share of the time at work: trainer" in page and hostile not in page


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 1\n")
    (tmp_path / "timeline.jsonl").write_text('{"step": 1, "spans": [["trainer", 1]]}\n')
    with pytest.raises(UserError, match=r"timeline\.jsonl is not what was written"):
        read_run(tmp_path)


def test_what_is_done_beside_a_step_is_no_share_of_it(tmp_path):
    """3 s of sampling beside steps of 2 s: the bar of a step's time is of the trainer's own."""
    seconds = {"sample": 3.0, "reward": 0.5, "wait": 0.5, "learn": 1.0, "step": 2.0}
    line = {"step": 1} | {f"seconds/{name}": value for name, value in seconds.items()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    shares = dict(time_shares(read_run(tmp_path)))
    assert shares == {"learn": 0.5, "wait": 0.25, "other": 0.25}

"""Progress is silent when quick, plain without a terminal, a bar within one."""

from opdkit.base.progress import duration, progress, rate


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines_tell_rate_and_time_left(capsys):
    clock = Clock()
    with progress("Evaluating", total=200, unit="problems", every=10, clock=clock) as tick:
        for clock.now, done in [(4, 20), (10, 50), (12, 60), (20, 100), (40, 200)]:
            tick(done)
    assert capsys.readouterr().err.splitlines() == [
        "Evaluating: 50/200 problems, 5.0 problems/s, 30 s left",
        "Evaluating: 100/200 problems, 5.0 problems/s, 20 s left",
        "Evaluating: 200/200 problems, 5.0 problems/s, 0 s left",
        "Evaluating: 200/200 problems in 40 s",
    ]


def test_quick_work_is_silent(capsys):
    with progress("Scoring", total=3) as tick:
        tick(3)
    assert capsys.readouterr() == ("", "")


def test_unknown_total_counts(capsys):
    clock = Clock()
    with progress("Reading", unit="rows", every=1, clock=clock) as tick:
        clock.now = 2.0
        tick(500)
    assert capsys.readouterr().err.splitlines() == [
        "Reading: 500 rows, 250 rows/s",
        "Reading: 500 rows in 2 s",
    ]


def test_nested_bars_in_a_terminal(monkeypatch):
    import io

    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr(
        "opdkit.base.progress._CONSOLES", [Console(file=screen, force_terminal=True, width=100)]
    )
    with (
        progress("Training", total=2, unit="steps") as outer,
        progress("Sampling [x]", total=8, unit="rollouts") as inner,
    ):
        inner(8)
        outer(1)
    assert "Training" in screen.getvalue()
    assert "Sampling [x]" in screen.getvalue()  # text, not markup
    assert "1/2" in screen.getvalue()


def test_durations_and_rates():
    assert [duration(s) for s in (8.4, 59.6, 185, 7385)] == ["8 s", "1:00", "3:05", "2:03:05"]
    assert [rate(r, "steps") for r in (0, 0.25, 12.34, 15000)] == [
        "",
        "4.0 s each",
        "12.3 steps/s",
        "15,000 steps/s",
    ]

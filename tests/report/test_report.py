"""The report shows everything a run folder holds, as text, from one file."""

import json
import re
from html.parser import HTMLParser

import pytest

from opdkit.base.errors import UserError
from opdkit.eval.evaluate import EvalResult
from opdkit.report import write_report
from opdkit.report.curves import chart_sections, time_shares
from opdkit.report.dialogue import TOKENS_SHOWN
from opdkit.report.html import key_figures
from opdkit.report.read import evenly, read_run
from opdkit.report.results import change, eval_curve, gap_closed, interval_plots, standings
from opdkit.report.rollouts import sample_steps

from .fake_run import fake_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'>{{ 7 * 7 }}&amp;"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.inside = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def add_line(path, **row):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def tokens_of(rollout):
    """The tokens of a single answer."""
    (part,) = rollout["parts"]
    (chunk,) = part["chunks"]
    assert not part["author"] and not chunk["call"]
    return chunk["tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "my-run")


def test_one_file_that_asks_no_server_for_anything(folder):
    path = write_report(folder)
    html = path.read_text(encoding="utf-8")
    for _, attributes in Page(html).tags:
        assert "src" not in attributes
        assert re.match(r"#|data:,$", attributes.get("href", "#"))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert "default-src 'none'" in html
    assert path == folder / "report.html"
    assert not list(folder.glob(".partial-*"))


def test_what_is_at_the_top(folder):
    text = "".join(page_of(folder).text)
    for shown in (
        "my-run",
        "Finished, step 60 of 60",
        "iw_opd(gamma=0.5)",
        "Qwen/Qwen3-8B",
        "gsm8k",
        "69.8%",
        "Peak memory",
    ):
        assert shown in text


def test_key_figures_are_the_runs_numbers(folder):
    run = read_run(folder)
    figures = {f["label"]: f for f in key_figures(run, standings(run.evals))}
    assert figures["Student, Avg@4"]["value"] == "69.8%"
    assert figures["Student, Avg@4"]["tone"] == "good"
    assert figures["Teacher gap closed"]["value"] == "74%"  # (69.755 - 46) / (78 - 46)
    assert figures["Steps"]["value"] == "60"
    kl = run.metrics["teacher_kl/sampled"]
    # the last twentieth of 60 steps
    assert figures["KL to the teacher"]["value"] == f"{sum(kl[-3:]) / 3:.3g}"
    assert figures["KL to the teacher"]["note"] == f"nats per token, was {sum(kl[:3]) / 3:.3g}"


def test_every_metric_is_drawn_exactly_once_also_unknown_ones(folder):
    run = read_run(folder)
    sections = dict(chart_sections(run))
    assert [c["title"] for c in sections["More metrics"]] == ["iw_opd/mean_weight"]
    # The standard deviation, and the least and greatest length, are ends of bands. Five quantiles
    # are a line and two bands, twice; ten tenths a profile at three times; weights that never
    # differ are not drawn.
    drawn = sum(len(c["curves"]) for charts in sections.values() for c in charts)
    assert drawn == len(run.metrics) - 1 - 2 * 2 - 7 - 5
    terms = {c["title"]: [k["name"] for k in c["curves"]] for c in sections["Terms"]}
    assert terms["Mean weight per term"] == ["Divergence", "PolicyGradient"]
    reward = next(c for c in sections["Learning"] if c["title"] == "Reward")
    mean, std = run.metrics["reward/mean"][0], run.metrics["reward/std"][0]
    band = reward["data"]["lines"][1]
    assert (band["y"][0], band["z"][0]) == pytest.approx((mean - std, mean + std), rel=1e-3)


def test_what_tokens_do_is_drawn(folder):
    run = read_run(folder)
    tokens = {c["title"]: c for c in dict(chart_sections(run))["Tokens"]}
    ratio = tokens["log(teacher / student)"]
    assert [(k["name"], bool(k["band"])) for k in ratio["curves"]] == [
        ("median", False),
        ("5 to 95%", True),
        ("1 to 99%", True),
    ]
    outer = ratio["data"]["lines"][2]
    low, high = (run.metrics[f"log_ratio/{q}"][0] for q in ("p01", "p99"))
    assert (outer["y"][0], outer["z"][0]) == pytest.approx((low, high), rel=1e-3)
    profile = tokens["Distance by position"]
    assert (profile["along"], profile["data"]["steps"]) == ("tenth", list(range(1, 11)))
    early, _, late = (line["y"] for line in profile["data"]["lines"])
    first = run.metrics["drift/tenth_01"]
    # fifths of 60 steps
    assert (early[0], late[0]) == pytest.approx(
        (sum(first[:12]) / 12, sum(first[-12:]) / 12), rel=1e-3
    )
    assert {k["name"] for k in tokens["Sure or not, agreed or not"]["curves"]} >= {
        "sure agreed",
        "unsure apart",
    }
    titles = [c["title"] for c in dict(chart_sections(run))["Terms"]]
    assert "Weights of PolicyGradient" in titles and "Weights of Divergence" not in titles


def test_phases_account_for_the_step(folder):
    shares = time_shares(read_run(folder))
    assert [name for name, _ in shares] == ["sample", "score", "learn", "reward", "other"]
    assert sum(share for _, share in shares) == pytest.approx(1)


def test_hostile_text_stays_text(folder, tmp_path):
    clean = page_of(folder)
    hostile = fake_run(tmp_path / "<b>run")
    (hostile / "run.yaml").write_text(f"method: {json.dumps(HOSTILE)}\n")
    (hostile / "summary.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    add_line(hostile / "metrics.jsonl", step=61, **{HOSTILE: 1.0})
    result = read_run(hostile).evals[0].to_dict()
    add_line(hostile / "evals.jsonl", **(result | {"name": HOSTILE}))
    add_line(
        hostile / "samples" / "step_000061.jsonl",
        id=HOSTILE,
        prompt=HOSTILE,
        pieces=[HOSTILE, "ok"],
        credit=[1.0, None],
    )
    page = page_of(hostile)
    assert page.count("script") == clean.count("script") + 1  # the data of one more chart
    assert page.count("img") == 0
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    text = "".join(page.text)
    assert "<b>run" in text
    # Method, summary (twice), chart, table, two interval plots, and id, prompt and token of a
    # rollout.
    assert text.count(HOSTILE) == 10


def test_invisible_and_broken_characters_are_shown(tmp_path):
    pieces = ["\x00", "\u202e", "\ud83d", "", "\n", "a\tb"]
    add_line(tmp_path / "samples" / "step_000001.jsonl", id="x", pieces=pieces, text="")
    _, (rollout,) = sample_steps(read_run(tmp_path))["steps"][0]
    assert [t["text"] for t in tokens_of(rollout)] == ["␀", "�", "�", "∅", "↵\n", "a⇥\tb"]
    assert "␀" in "".join(page_of(tmp_path).text)


def test_credit_colours_tokens(tmp_path):
    credit = [2.0, 1.0, 0.1, 0.0, -0.5, -2.0, None]
    row = {
        "pieces": list("abcdefg"),
        "credit": credit,
        "weight": [1, 1, 1, 0, 1, 1, None],
        "logp": [-0.5] * 7,
    }
    add_line(
        tmp_path / "samples" / "step_000004.jsonl",
        id="x",
        teacher_logp=[1.5],
        finish="length",
        reward=0.25,
        **row,
    )
    samples = sample_steps(read_run(tmp_path))
    step, (rollout,) = samples["steps"][0]
    assert (step, samples["full"]) == (4, "2")
    assert [t["class"] for t in tokens_of(rollout)] == ["p5", "p2", "", "out", "n1", "n5", ""]
    assert tokens_of(rollout)[0]["facts"] == "2|1|-0.5|1.5"
    assert tokens_of(rollout)[6]["facts"] == "||-0.5|"
    assert (rollout["reward"], rollout["credit"], rollout["truncated"]) == ("0.25", "0.1", True)
    assert "cut at the length limit" in "".join(page_of(tmp_path).text)


def test_a_rollout_without_token_facts_shows_its_text(tmp_path):
    add_line(tmp_path / "samples" / "step_000001.jsonl", id="x", text="plain words")
    assert "plain words" in "".join(page_of(tmp_path).text)


def test_a_run_that_has_just_begun(tmp_path):
    for part, content, shown in [
        ("run.yaml", "method: opd\n", "In progress"),
        ("metrics.jsonl", "", "In progress"),
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "lo', "In progress, step 1"),
        ("evals.jsonl", json.dumps(fake_eval("student", 0.5, 0)) + "\n", "50.0%"),
    ]:
        (tmp_path / part).write_text(content)
        assert shown in "".join(page_of(tmp_path).text)
    assert "Student after" not in "".join(page_of(tmp_path).text)


def test_steps_without_a_finite_number_are_told(tmp_path):
    add_line(
        tmp_path / "metrics.jsonl",
        step=1,
        grad_norm=None,
        **{"reward/mean": None},
        nonfinite=["grad_norm", "reward/mean"],
    )
    assert "Not a finite number: grad_norm at 1 of 1 steps" in "".join(page_of(tmp_path).text)


def test_the_last_line_of_a_step_counts(tmp_path):
    for loss in (1.0, 2.0):
        add_line(tmp_path / "metrics.jsonl", step=1, loss=loss)
    assert read_run(tmp_path).metrics == {"loss": [2.0]}


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_a_long_run_stays_small(tmp_path):
    fake_run(tmp_path, steps=1000)
    pieces = [f" token{i}" for i in range(3000)]
    facts = {name: [-1.2345] * 3000 for name in ("credit", "weight", "logp", "teacher_logp")}
    for step in range(0, 1000, 10):
        add_line(tmp_path / "samples" / f"step_{step:06}.jsonl", id="x", pieces=pieces, **facts)
    path = write_report(tmp_path)
    assert path.stat().st_size < 3_000_000
    assert f"{3000 - TOKENS_SHOWN} more tokens" in path.read_text(encoding="utf-8")


def test_samples_shown_span_the_run():
    assert evenly(101, 6) == [0, 20, 40, 60, 80, 100]
    assert evenly(3, 6) == [0, 1, 2]


def fake_eval(name, value, step, problems=None):
    estimate = {"value": value, "low": value - 0.02, "high": value + 0.02}
    counts = {"n_problems": 4, "samples_per_problem": 2, "tokens": 80, "step": step}
    means = {"mean_length": 10.0, "truncated_share": 0.0, "reward_mean": value, "seconds": 1.0}
    passes = {"1": estimate, "2": estimate}
    return {
        "name": name,
        "avg_at_k": estimate,
        "pass_at_k": passes,
        "per_problem": problems or {},
        **counts,
        **means,
    }


def results(*rows):
    return [EvalResult.from_dict(fake_eval(*row)) for row in rows]


def test_standings_take_the_first_and_last_student_where_nothing_is_named_before():
    evals = results(
        ("student", 0.4, 0), ("teacher", 0.8, 0), ("student", 0.5, 10), ("student", 0.7, 20)
    )
    found = standings(evals)
    assert [(name, r.step) for name, r in found.items()] == [
        ("student_before", 0),
        ("student", 20),
        ("teacher", 0),
    ]
    assert gap_closed(found) == pytest.approx(0.75)
    curve = eval_curve(evals, found)
    assert curve["data"]["steps"] == [0, 10, 20]
    assert curve["levels"][0]["name"] == "teacher"
    assert (
        gap_closed(
            standings(
                results(("student", 0.9, 5), ("student_before", 0.85, 0), ("teacher", 0.8, 0))
            )
        )
        is None
    )


def test_change_is_paired_by_problem_and_only_over_the_same_problems():
    before, after, other = results(
        ("a", 0.5, 0, {"p": 0.0, "q": 0.5}),
        ("b", 0.75, 1, {"q": 0.75, "p": 0.25}),
        ("c", 0.75, 1, {"p": 1.0}),
    )
    gain = change(before, after)
    assert gain.value == 0.25 and -1 < gain.interval.low < 0.25 < gain.interval.high < 1
    assert change(before, other) is None


def test_interval_plots_share_an_axis_and_leave_out_pass_at_1():
    plots = interval_plots(standings(results(("student_before", 0.4, 0), ("student", 0.6, 9))))
    assert [p["measure"] for p in plots] == ["Avg@2", "Pass@2"]
    before, after = plots[0]["rows"]
    assert before["low"] < before["at"] < before["high"] < after["low"] < after["at"]
    assert (after["text"], after["range"]) == ("60.0%", "58.0% – 62.0%")

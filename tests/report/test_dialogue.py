"""An episode is shown as a dialogue: who wrote what, in which turn, and nothing that a model wrote
becomes part of the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opdkit.report.curves import chart_sections
from opdkit.report.dialogue import CALL, EPISODE_SHOWN, OBSERVATION_SHOWN, dialogue
from opdkit.report.read import read_run
from opdkit.report.rollouts import sample_steps
from tests.report.test_report import HOSTILE, Page, add_line, page_of, tokens_of

CALLED = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
ANSWER = "<|im_end|>\n<|im_start|>user\nA door & a key.<|im_end|>\n<|im_start|>assistant\n"


def episode(**changes: Any) -> dict[str, Any]:
    """One replayed turn of an expert, then two of the student: it looks, and is told; it acts."""
    pieces = ["go ", "north", "A wall.", "I ", "look. ", *CALLED, ANSWER, "open", " door", "<end>"]
    n = len(CALLED)
    told = [(0, "data", 2), (0, "environment", 1), (1, "student", 2 + n), (1, "environment", 1)]
    credit = [0.0] * 3 + [1.0, -2.0] + [0.5] * n + [0.0] + [2.0, 0.1, 0.0]
    return {
        "id": "4/game/0",
        "prompt": "<|im_start|>system\nYou are in a house.<|im_end|>",
        "pieces": pieces,
        "parts": [*told, (2, "student", 3)],
        "credit": credit,
        "weight": [0.0] * 3 + [1.0] * (2 + n) + [0.0] + [1.0] * 3,
        "logp": [-0.5] * len(pieces),
        "teacher_logp": [-0.5 - (0.25 if i < 3 + 2 + n else 1.0) for i in range(len(pieces))],
        "reward": 1.0,
        "correct": True,
        "feedback": "You used 2 of 30 moves.",
        "finish": "stop",
        **changes,
    }


def shown(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The episode as the template gets it."""
    add_line(tmp_path / "samples" / "step_000004.jsonl", **episode(**changes))
    _, (rollout,) = sample_steps(read_run(tmp_path))["steps"][0]
    return rollout


def said(part: dict[str, Any]) -> str:
    written = (t["text"] for chunk in part["chunks"] for t in chunk["tokens"])
    return "".join(written) or "".join(text for text, _ in part["text"])


def test_each_turn_says_who_wrote_what(tmp_path: Path) -> None:
    rollout = shown(tmp_path)
    assert [(part["turn"], part["who"]) for part in rollout["parts"]] == [
        ("turn 1", "data"),
        ("", "environment"),
        ("turn 2", "student"),
        ("", "environment"),
        ("turn 3", "student"),
    ]
    assert rollout["turns"] == 3 and rollout["verdict"] == "right" and rollout["finish"] == ""
    assert [said(part) for part in rollout["parts"][:2]] == ["go north", "A wall."]
    assert said(rollout["parts"][4]) == "open door<end>"
    # the distance to the teacher in each of the student's turns: log-probs -0.5 and -0.75, -1.5
    assert [part["kl"] for part in rollout["parts"]] == ["", "", "0.25", "", "1"]
    assert rollout["parts"][4]["tokens"] == "3 tokens"


def test_calls_of_tools_stand_apart_and_keep_their_credit(tmp_path: Path) -> None:
    words, call = shown(tmp_path)["parts"][2]["chunks"]
    assert (words["call"], call["call"]) == (False, True)
    assert "".join(t["text"] for t in call["tokens"]) == CALLED.replace("\n", "↵\n")
    assert [t["class"] for t in words["tokens"]] == ["p5", "n5"]
    assert words["tokens"][1]["facts"] == "-2|1|-0.5|-0.75"
    # the 95th percentile has the full colour: 0.5
    assert {t["class"] for t in call["tokens"]} == {"p5"}


def test_what_the_environment_wrote_is_text_without_numbers(tmp_path: Path) -> None:
    observed = shown(tmp_path)["parts"][3]
    assert observed["chunks"] == []
    assert [text for text, frame in observed["text"] if not frame] == [
        "\n",
        "\nA door & a key.",
        "\n",
        "\n",
    ]
    html = page_of(tmp_path)
    spans = [dict(attributes) for tag, attributes in html.tags if tag == "span"]
    # numbers are of the tokens of expert and student alone
    assert sum("data-f" in span for span in spans) == len(episode()["pieces"]) - 2
    text = "".join(html.text)
    assert "A door & a key." in text and "You used 2 of 30 moves." in text and "right" in text
    assert "You are in a house." in text and "3 turns" in text


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ('a <tool_call>{"name": "f"}</tool_call> b', '<tool_call>{"name": "f"}</tool_call>'),
        ("a <tool_call>{never ended", "<tool_call>{never ended"),
        ("<function=f><parameter=x>1</parameter></function> b", None),
        ('[TOOL_CALLS] [{"name": "f"}]</s>', '[TOOL_CALLS] [{"name": "f"}]</s>'),
        ("<|python_tag|>f(x=1)<|eom_id|>", "<|python_tag|>f(x=1)<|eom_id|>"),
        ('{"name": "f", "parameters": {}}<|eot_id|>', '{"name": "f", "parameters": {}}'),
        ('```tool_code\n{"name": "f"}\n``` b', '```tool_code\n{"name": "f"}\n```'),
        ("```json\n{\"name\": 'f'}\n```", "```json\n{\"name\": 'f'}\n```"),
        ("```python\nprint(1)\n```", ""),
        ('The answer is {"name": 1}.', ""),
        ("plain words", ""),
    ],
)
def test_what_is_a_call(said: str, call: str | None) -> None:
    call = said.removesuffix(" b") if call is None else call
    assert "".join(CALL.findall(said)) == call


@pytest.mark.parametrize(
    ("piece", "calls"),
    [
        (" ", 0),
        ("<tool_call>", 1),
        ("<function=", 1),
        ("</function", 0),
        ('{"name":}', 1),
        ("<|", 0),
    ],
)
def test_long_texts_that_a_model_may_write(piece: str, calls: int) -> None:
    """400,000 signs of one piece: a search that took quadratic time would not end."""
    assert len(CALL.findall(piece * (400_000 // len(piece)))) == calls
    assert CALL.findall('{"name":}' + " " * 200_000 + "x") == []


def test_an_answer_of_one_turn_has_no_headings(tmp_path: Path) -> None:
    one = {"parts": [(0, "student", 2)], "pieces": ["<tool_call>", "x"], "credit": [1.0, None]}
    rollout = shown(tmp_path, **one)
    assert [t["text"] for t in tokens_of(rollout)] == ["<tool_call>", "x"]
    assert rollout["turns"] == 0
    # a sample file without parts is the student's whole
    older = {k: v for k, v in episode(**one).items() if k not in ("parts", "feedback", "correct")}
    add_line(tmp_path / "old" / "samples" / "step_000001.jsonl", **older)
    _, (old,) = sample_steps(read_run(tmp_path / "old"))["steps"][0]
    assert tokens_of(old) == tokens_of(rollout) and old["verdict"] == ""


def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    clean, hostile = tmp_path / "clean", tmp_path / "hostile"
    add_line(clean / "samples" / "step_000004.jsonl", **episode())
    texts = dict.fromkeys(("id", "prompt", "feedback", "finish", "correct"), HOSTILE)
    pieces = [HOSTILE, f"<tool_call>{HOSTILE}", f"</tool_call>{ANSWER}{HOSTILE}", HOSTILE]
    parts = [(0, "data", 1), (1, "student", 1), (1, "environment", 1), (2, HOSTILE, 1)]
    row = episode(**texts, pieces=pieces, parts=parts)
    add_line(hostile / "samples" / "step_000004.jsonl", **row)
    page = page_of(hostile)
    assert page.count("script") == page_of(clean).count("script")
    assert page.count("img") == 0
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert {a["class"] for t, a in page.tags if t == "section"} == {
        "part data",
        "part student",
        "part environment",
        "part feedback",
    }
    # id, prompt, feedback, finish, four pieces, and the author whom nobody knows
    assert "".join(page.text).count(HOSTILE) == 9


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ([], [("student", "abc")]),
        ([(0, "data", 1)], [("data", "a"), ("student", "bc")]),
        ([(0, "data", 1), (1, "environment", 99)], [("data", "a"), ("environment", "bc")]),
        ([(0, "data", -4), (0, "data", 0), (0, "student", 3)], [("student", "abc")]),
    ],
)
def test_parts_that_do_not_fit_the_tokens(
    told: list[tuple[int, str, int]], found: list[tuple[str, str]]
) -> None:
    made = dialogue({"pieces": list("abc"), "parts": told}, 0.0)
    assert [(part["who"], said(part)) for part in made["parts"]] == found


def test_a_long_episode_is_cut_where_the_student_has_said_much(tmp_path: Path) -> None:
    """Turns of 100 tokens of the student, and long observations: these are cut each for itself."""
    turns = EPISODE_SHOWN // 100 + 3
    pieces, parts = [], []
    for turn in range(turns):
        pieces += ["t"] * 100 + ["o" * (OBSERVATION_SHOWN + 5)]
        parts += [(turn, "student", 100), (turn, "environment", 1)]
    made = dialogue({"pieces": pieces, "parts": parts}, 0.0)
    assert made["hidden"] == 300 and made["turns"] == turns
    assert sum(len(said(p)) for p in made["parts"] if p["who"] == "student") == EPISODE_SHOWN
    assert {p["more"] for p in made["parts"] if p["who"] == "environment"} == {5}


def test_messages_are_read_as_a_dialogue_too(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "<b>?"}]
    rollout = shown(tmp_path, prompt=messages)
    assert rollout["prompt"] == [("system: Be kind.\n\nuser: <b>?", False)]


def test_kl_by_turn_is_drawn_along_the_turns(tmp_path: Path) -> None:
    for step in range(1, 11):
        kl = {f"kl_by_turn/{turn:02}": turn * 0.1 + step for turn in (*range(1, 31), 120)}
        tokens = {f"tokens_by_turn/{turn:02}": 40 - turn for turn in range(1, 31)}
        turns = {"turns/mean": 9.0, "turns/min": 2.0, "turns/max": 30.0}
        add_line(tmp_path / "metrics.jsonl", step=step, **kl, **tokens, **turns)
    sections = dict(chart_sections(read_run(tmp_path)))
    assert list(sections) == ["Episodes"]
    charts = {chart["title"]: chart for chart in sections["Episodes"]}
    by_turn = charts["KL by turn"]
    assert by_turn["along"] == "turn" and by_turn["data"]["steps"] == [*range(1, 31), 120]
    early, _, late = (line["y"] for line in by_turn["data"]["lines"])
    # fifths of ten steps: steps 1 and 2, 9 and 10
    assert (early[0], late[2]) == (pytest.approx(1.6), pytest.approx(9.8))
    assert charts["Tokens by turn"]["data"]["lines"][0]["y"][:2] == [39, 38]
    assert [k["name"] for k in charts["Turns"]["curves"]] == ["mean", "range"]


def test_what_a_curriculum_says_has_a_chart_and_what_nobody_foresaw_its_own(tmp_path: Path) -> None:
    names = ("length", "entropy", "min_entropy", "rung", "prefix_share", "phi", "depth", "own")
    for step in (1, 2):
        add_line(
            tmp_path / "metrics.jsonl", step=step, **{f"curriculum/{name}": step for name in names}
        )
    sections = dict(chart_sections(read_run(tmp_path)))
    drawn = {c["title"]: [k["name"] for k in c["curves"]] for c in sections["Curriculum"]}
    assert drawn["Entropy at the last gate"] == ["entropy", "min entropy"]
    assert {"Cut at", "Rung", "Written for the student", "Replay", "Depth"} <= set(drawn)
    assert [c["title"] for c in sections["More metrics"]] == ["curriculum/own"]


def test_pairs_rewards_that_are_weighed_and_what_is_had_again_have_charts(tmp_path: Path) -> None:
    names = [f"pairs/{name}" for name in ("chosen", "rejected", "margin", "accuracy")]
    rest = ("weight_format", "weight_accuracy", "rehearsal_pool", "groups_to_replay")
    names += [f"curriculum/{name}" for name in rest]
    for step in (1, 2):
        add_line(tmp_path / "metrics.jsonl", step=step, **dict.fromkeys(names, step))
    sections = dict(chart_sections(read_run(tmp_path)))
    assert set(sections) == {"Learning", "Curriculum"}
    drawn = {c["title"]: [k["name"] for k in c["curves"]] for c in sections["Curriculum"]}
    assert drawn["Weights of rewards"] == ["weight accuracy", "weight format"]
    assert {"Learnt and rehearsed", "Groups to replay"} <= set(drawn)
    assert {c["title"] for c in sections["Learning"]} == {"Worth of pairs", "Pairs in order"}


def test_pages_are_whole(tmp_path: Path) -> None:
    """Every element that is opened is closed in its place."""
    shown(tmp_path)

    class Nested(Page):
        void = ("meta", "link", "br", "img", "input")

        def __init__(self, html: str) -> None:
            self.open: list[str] = []
            super().__init__(html)

        def handle_starttag(self, tag: str, attributes: Any) -> None:
            super().handle_starttag(tag, attributes)
            if tag not in self.void:
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            super().handle_endtag(tag)
            assert self.open.pop() == tag

    page_of(tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Nested(html).open == []

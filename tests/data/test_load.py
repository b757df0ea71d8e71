"""Data sets of every layout, read without conversion."""

import gzip
import json
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.data import load_rows
from opdkit.data.columns import CANONICAL, normalise

SHARED = Path(__file__).parents[2] / "../shared/data"
CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
GSM8K = {"question": "How many?", "answer": "48+24 = <<48+24=72>>72 clips.\n#### 1,072"}


def canonical(row: dict, **options) -> dict:
    [out] = normalise([row], **options)
    return {key: out[key] for key in CANONICAL}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "response"),
    [
        ({"prompt": "1+1?"}, "1+1?", None, None),
        ({"prompt": CHAT[:1], "answer": 2}, CHAT[:1], "2", None),
        ({"messages": CHAT}, CHAT[:1], None, "2"),
        ({"messages": CHAT + CHAT[:1]}, CHAT + CHAT[:1], None, None),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT[:1], None, "2"),
        ({"prompt": None, "messages": CHAT[:1]}, CHAT[:1], None, None),
        (GSM8K, "How many?", "1072", GSM8K["answer"]),
        ({"problem": "P", "question": "P", "answer": 27.0}, "P", "27", None),
        (
            {"problem": "P", "solution": "x = 3,\nso \\boxed{\\frac{1}{3}}."},
            "P",
            "\\frac{1}{3}",
            "x = 3,\nso \\boxed{\\frac{1}{3}}.",
        ),
        (
            {"problem": "P", "solution": "x = 3,\nwhich we guess"},
            "P",
            None,
            "x = 3,\nwhich we guess",
        ),
        ({"problem": "P", "solution": "$\\boxed{5}$"}, "P", "5", None),
        ({"problem": "P", "solution": "5"}, "P", "5", None),
        ({"problem": "P", "solution": "Thus\n5", "answer": "025"}, "P", "025", "Thus\n5"),
        ({"query": "Q", "ground_truth": [1, 2]}, "Q", "[1, 2]", None),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, "Add.\n\n1 1", None, "2"),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "Sing.", None, "La"),
        (
            {"prompt": CHAT[:1], "reward_model": {"ground_truth": "2", "style": "rule"}},
            CHAT[:1],
            "2",
            None,
        ),
        ({"prompt": CHAT[:1], "reward_model": '{"ground_truth": 2}'}, CHAT[:1], "2", None),
        ({"prompt": "p", "final_answer": "9", "response": "it is 9"}, "p", "9", "it is 9"),
    ],
)
def test_layouts(row, prompt, answer, response):
    out = canonical(row)
    assert (out["prompt"], out["answer"], out["response"]) == (prompt, answer, response)


@pytest.mark.parametrize(
    "column",
    [
        "teacher_id",
        "opd_teacher",
        "teacher",
        "teacher_tag",
        "tag",
        "domain",
        "data_source",
        "dataset",
    ],
)
def test_routing_columns(column):
    assert canonical({"prompt": "p", column: "math"})["teacher"] == "math"
    assert canonical({"prompt": "p", column: ""})["teacher"] is None


def test_the_most_explicit_route_wins():
    assert (
        canonical({"prompt": "p", "data_source": "gsm8k", "opd_teacher": "math"})["teacher"]
        == "math"
    )
    assert canonical({"prompt": "p", "metadata": {"opd_teacher": "code"}})["teacher"] == "code"
    assert canonical({"prompt": "p", "extra_info": '{"teacher_id": "code"}'})["teacher"] == "code"


def test_a_rows_own_columns_stay():
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def f():",
        "test": "assert f()",
        "entry_point": "f",
        "canonical_solution": "  pass",
    }
    [out] = normalise([row])
    assert out == {
        **row,
        "answer": None,
        "response": "  pass",
        "teacher": None,
        "id": "HumanEval/0",
    }
    assert "id" not in row


def test_ids_are_unique_and_stable():
    rows = [
        {"prompt": "p", "id": 7},
        {"prompt": "p", "id": "7"},
        {"prompt": "p", "id": "7#2"},
        {"prompt": "p"},
    ]
    assert [row["id"] for row in normalise(rows)] == ["7", "7#2", "7#2#2", "3"]


def test_normalised_rows_pass_through():
    rows = normalise([GSM8K, {"messages": CHAT, "domain": "a"}, {"problem": "P", "answer": 27.0}])
    assert normalise(rows) == rows


def test_named_columns():
    row = {"q": "Q", "meta": {"gold": 5}, "prompt": "not this", "solver": "big", "key": "k"}
    named = {"prompt": "q", "answer": "meta.gold", "teacher": "solver", "id": "key"}
    assert canonical(row, columns=named) == {
        "prompt": "Q",
        "answer": "5",
        "response": None,
        "teacher": "big",
        "id": "k",
    }


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"text": "x", "label": 1},
            None,
            r"row 0 has no prompt: none of its columns \(text, label\) is a prompt.*question, "
            r"problem",
        ),
        ({"prompt": ""}, None, "row 0 has no prompt: its column 'prompt' is empty"),
        ({"prompt": 5}, None, "neither text nor messages, but int: 5"),
        ({"prompt": [{"text": "x"}]}, None, "neither text nor messages, but list"),
        ({"messages": CHAT[1:]}, None, "only an assistant's message"),
        (
            {"question": "x"},
            {"prompt": "quest"},
            r"does not have; did you mean 'question'\?. Its columns: question",
        ),
        ({"question": "x"}, {"promt": "question"}, r"did you mean 'prompt'\?"),
    ],
)
def test_rows_that_cannot_be_read(row, columns, message):
    with pytest.raises(UserError, match=message):
        normalise([row], columns)


# ------------------------------------------------------------------------------------------ sources


def test_files_of_all_kinds_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"äöü {i}", "answer": str(i), "messages": CHAT} for i in range(3)]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + text.replace("\n", "\n\n"), encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": rows}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = load_rows(rows)
    assert [(r["prompt"], r["answer"], r["id"]) for r in expected] == [
        (f"äöü {i}", str(i), str(i)) for i in range(3)
    ]
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "b.json", "a.parquet"):
        assert load_rows(tmp_path / name) == expected
        assert load_rows(str(tmp_path / name), limit=2) == expected[:2]


def test_a_limit_reads_no_further(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"}\nnot json\n')
    assert len(load_rows(tmp_path / "a.jsonl", limit=1)) == 1


def test_folders_and_their_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    train, test = [{"prompt": "a"}, {"prompt": "b"}], [{"prompt": "c"}]
    plain, hub, shards, saved, saved_dict = (
        tmp_path / name for name in ("plain", "hub", "shards", "saved", "saved_dict")
    )
    plain.mkdir(), (hub / "data").mkdir(parents=True), shards.mkdir()
    write(plain / "train.jsonl", train), write(plain / "test.jsonl", test)
    Dataset.from_list(train[:1]).to_parquet(hub / "data" / "train-00000-of-00002.parquet")
    Dataset.from_list(train[1:]).to_parquet(hub / "data" / "train-00001-of-00002.parquet")
    Dataset.from_list(test).to_parquet(hub / "data" / "test-00000-of-00001.parquet")
    write(shards / "x.jsonl", train), write(shards / "y.jsonl", test)
    Dataset.from_list(train).save_to_disk(saved)
    DatasetDict({"train": Dataset.from_list(train), "test": Dataset.from_list(test)}).save_to_disk(
        saved_dict
    )

    def prompts(path, split=None):
        return "".join(row["prompt"] for row in load_rows(path, split=split))

    for folder in (plain, hub, saved_dict):
        assert (prompts(folder), prompts(folder, "test")) == ("ab", "c")
        with pytest.raises(UserError, match=r"no split 'tset'; did you mean 'test'\?"):
            load_rows(folder, split="tset")
    assert (prompts(shards), prompts(shards, "y"), prompts(saved)) == ("abc", "c", "ab")
    assert load_rows(Dataset.from_list(train), limit=1)[0]["prompt"] == "a"

    (plain / "train.jsonl").rename(plain / "validation.jsonl")
    with pytest.raises(UserError, match="has the splits test, validation: say which"):
        load_rows(plain)
    with pytest.raises(UserError, match="holds splits"):
        load_rows(DatasetDict({"train": Dataset.from_list(train)}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a"}\n{"prompt": \n',
            r"a.jsonl, line 2: not valid JSON \(.*this one begins '\{\"prompt\": ",
        ),
        ('\n["a"]\n', "a.jsonl, line 2: a row must be an object with columns, not list"),
        ("", "holds no rows"),
    ],
)
def test_broken_lines_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load_rows(tmp_path / "a.jsonl")


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\na\n")
    (tmp_path / "a.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "b.json").write_text('{"prompt": "a"}')
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "bad.parquet").write_text("prompt")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}')[:-9])
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe4"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "dataset_infos.json").write_text("{}")
    for source, options, message in [
        ("absent.jsonl", {}, "no file or folder 'absent.jsonl'"),
        ("data/absent.jsonl", {}, "no file or folder"),
        (tmp_path / "a.csv", {}, "convert it to one of .jsonl"),
        (tmp_path / "a.json", {}, "line 2: not valid JSON .*name the file .jsonl"),
        (tmp_path / "b.json", {}, "must hold a list of objects"),
        (tmp_path / "a.jsonl", {"split": "train"}, "which has no splits"),
        (
            tmp_path / "bad.parquet",
            {},
            "bad.parquet cannot be read .*: it is damaged, or not of the kind",
        ),
        (tmp_path / "bad.jsonl.gz", {}, "cannot be read .EOFError"),
        (tmp_path / "latin.jsonl", {}, "cannot be read .UnicodeDecodeError"),
        (tmp_path / "empty", {}, "holds no data"),
        ([], {}, "the data in memory holds no rows"),
        ([7], {}, "row 0 must be a text or a dictionary of columns, not of type int"),
        ([{"prompt": "a"}], {"limit": 0}, "limit=0 leaves no row"),
    ]:
        with pytest.raises(UserError, match=message):
            load_rows(source, **options)


def test_hub_names(monkeypatch):
    """What is asked of the datasets library; it answers from memory here."""
    import datasets

    asked = []

    def load_dataset(repo, config, split):
        asked.append((repo, config, split))
        if repo == "a/absent":
            raise FileNotFoundError("Couldn't find any data file")
        return datasets.Dataset.from_list([{"question": "q", "answer": "#### 5"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repo, config: ["train", "test"])
    assert load_rows("openai/gsm8k:main")[0]["answer"] == "5"
    load_rows("openai/gsm8k", split="test[:10]")
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", None, "test[:10]")]
    with pytest.raises(
        UserError, match=r"'a/absent' could not be read from the hub .*a/absent:CONFIG"
    ):
        load_rows("a/absent", split="train")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repo, config: ["dev", "test"])
    with pytest.raises(UserError, match="has the splits dev, test: say which"):
        load_rows("a/b")


# ------------------------------------------------------------------------------------ reasoning-gym


def test_reasoning_gym_rows():
    pytest.importorskip("reasoning_gym")
    rows = load_rows("reasoning_gym:chain_sum?size=20&seed=3&min_terms=2&max_terms=2", limit=5)
    assert len(rows) == 5 and rows[2]["id"] == "chain_sum-3-2"
    assert all(
        row["prompt"] == row["question"] and len(row["metadata"]["expression"].split()) == 3
        for row in rows
    )
    again = load_rows("reasoning_gym:chain_sum?min_terms=2&max_terms=2", seed=3, limit=5)
    assert [row["answer"] for row in again] == [row["answer"] for row in rows]
    assert [row["answer"] for row in load_rows("reasoning_gym:chain_sum?size=5", seed=4)] != [
        row["answer"] for row in rows
    ]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("reasoning_gym:chain_sums", r"no task 'chain_sums'; did you mean 'chain_sum'\?"),
        (
            "reasoning_gym:chain_sum?max_term=3",
            r"has no setting 'max_term'; did you mean 'max_terms'\?",
        ),
        (
            "reasoning_gym:chain_sum?min_terms=9&max_terms=2",
            "refuses these settings of 'chain_sum'",
        ),
    ],
)
def test_reasoning_gym_mistakes(address, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=message):
        load_rows(address)


# ----------------------------------------------------------------------------------- real data sets


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("name", "size"), [("gsm8k_train.jsonl", 7473), ("aime24.jsonl", 30), ("amc23.jsonl", 40)]
)
def test_real_mathematics(name, size):
    rows = load_rows(SHARED / name)
    assert len(rows) == size == len({row["id"] for row in rows})
    assert all(float(row["answer"]) == int(float(row["answer"])) for row in rows)
    assert all(isinstance(row["prompt"], str) and row["teacher"] is None for row in rows)
    assert all(bool(row["response"]) == (name != "amc23.jsonl") for row in rows)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_real_code():
    rows = load_rows(SHARED / "HumanEval.jsonl.gz")
    assert len(rows) == 164 and rows[0]["id"] == "HumanEval/0"
    assert all(
        row["entry_point"] in row["prompt"] and "def check" in row["test"] and row["answer"] is None
        for row in rows
    )

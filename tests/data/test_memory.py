"""What a notebook hands over is read as its rows, or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from opdkit import UserError
from opdkit.data import load_rows
from opdkit.data.memory import as_rows

ROWS = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 2?", "answer": "4"}]
COLUMNS = {"prompt": ["1 + 1?", "2 + 2?"], "answer": ["2", "4"]}


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        pd.DataFrame(ROWS),
        pd.DataFrame(ROWS, index=[7, 7]),
        pa.Table.from_pylist(ROWS),
        SimpleNamespace(to_dicts=lambda: ROWS),  # as polars
        COLUMNS,
        {name: np.array(column) for name, column in COLUMNS.items()},
        datasets.Dataset.from_list(ROWS),
    ],
    ids=lambda data: type(data).__name__,
)
def test_rows_in_every_form(data: Any) -> None:
    assert as_rows(data) == ROWS


def test_texts() -> None:
    assert (
        as_rows(["a", np.str_("b")])
        == as_rows(pd.Series(["a", "b"]))
        == [
            {"prompt": "a"},
            {"prompt": "b"},
        ]
    )


def test_a_frames_missing_cells_are_none_and_its_arrays_lists() -> None:
    messages = np.array([{"role": "user", "content": "2?"}])
    frame = pd.DataFrame(
        {
            "prompt": [messages, messages],
            "answer": [4, None],
            "when": pd.to_datetime(["2020-01-01", None]),
            "count": pd.array([1, None], dtype="Int64"),
        }
    )
    first, second = as_rows(frame)
    assert first["prompt"] == [{"role": "user", "content": "2?"}] and first["count"] == 1
    assert (second["answer"], second["when"], second["count"]) == (None, None, None)
    assert [row["answer"] for row in load_rows(frame)] == ["4", None]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
            r"holds splits \(train\), not rows: pass one, for example data\['train'\]",
        ),
        ({"train": ROWS, "test": ROWS}, r"holds splits \(train, test\)"),
        ({"prompt": "one"}, "a single row belongs into a list"),
        ({"prompt": ["a", "b"], "answer": ["1"]}, r"prompt has 2, answer has 1"),
        ([["a"]], "row 0 must be a text or a dictionary of columns, not of type list"),
        (["a", None], "row 1 must be a text or a dictionary of columns, not nothing"),
        (None, "the data is nothing, which holds no rows"),
        (b"data.jsonl", "of type bytes, which holds no rows"),
        (3, "of type int, which holds no rows"),
    ],
)
def test_what_is_no_rows_is_refused(data: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        as_rows(data)

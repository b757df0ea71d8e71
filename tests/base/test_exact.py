"""JSON that gives back what was put in, and plain JSON where that suffices."""

from __future__ import annotations

import json
import math
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdkit.base.exact import dumps, loads

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.dates()
    | st.datetimes()
    | st.decimals(allow_nan=False)
)
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text()) | st.just("@tuple")
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.frozensets(st.integers() | st.text())
        | st.sets(st.tuples(st.integers()))
    ),
    max_leaves=8,
)


def typed(value: Any) -> Any:
    """A value with the types of its parts, in which True and 1, 1 and 1.0 differ."""
    if isinstance(value, dict):
        return dict, [(typed(k), typed(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [typed(v) for v in value]
    return type(value), value


@given(VALUES)
def test_what_goes_in_comes_out(value: Any) -> None:
    assert typed(loads(dumps(value))) == typed(value)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x), max_leaves=5))
def test_plain_json_stays_plain_json(value: Any) -> None:
    assert dumps(value) == json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1, (2,)), '{"@tuple": [1, {"@tuple": [2]}]}'),
        ({1: "a"}, '{"@dict": [[1, "a"]]}'),
        ({"@tuple": 1}, '{"@dict": [["@tuple", 1]]}'),
        (np.array([[1, 2]]), "[[1, 2]]"),
        (np.float32(0.5), "0.5"),
        ({date(2020, 1, 2)}, '{"@set": [{"@date": "2020-01-02"}]}'),
        (datetime(2020, 1, 2), '{"@datetime": "2020-01-02T00:00:00"}'),
        (Decimal("0.10"), '{"@decimal": "0.10"}'),
    ],
)
def test_forms(value: Any, text: str) -> None:
    assert dumps(value) == text


def test_half_a_surrogate_pair_can_be_written() -> None:
    text = dumps({"a": "ä \ud83d"})
    assert text.encode() == b'{"a": "\\u00e4 \\ud83d"}' and loads(text) == {"a": "ä \ud83d"}


def test_what_has_no_form_is_text_and_nan_stays() -> None:
    assert loads(dumps(1j)) == "1j"
    assert math.isnan(loads(dumps(math.nan)))

"""One Parquet file of scored rollouts: how they become columns, and how a few of them are read
without the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from opdkit.base import exact
from opdkit.base.errors import UserError
from opdkit.base.files import whole
from opdkit.types import Rollout

GROUP = 16  # rollouts in a row group: what is decoded to read one of them


@dataclass(frozen=True)
class Scored:
    """What a teacher says of a rollout of T tokens, in float16 once stored: relative error 2^-11,
    absolute 2^-25 near zero.
    """

    logp: np.ndarray  # [T]
    top_ids: np.ndarray  # [T, k] most probable first; k = 0: none
    top_logp: np.ndarray  # [T, k]


def write_shard(
    path: Path, rollouts: Sequence[Rollout], scores: Sequence[Scored], drawn: bool
) -> str:
    """Writes a file, whole or not at all; returns its sha256.

    `drawn`: tokens came from another softmax.
    """
    try:
        with whole(path) as file:
            _write(file, _table(rollouts, scores, drawn))
        return file_digest(path)
    except OSError as error:  # a full disk, a quota, a folder that is gone
        raise UserError(
            f"{path} could not be written ({error.strerror or error}). The shards before it are "
            "complete and stay; free some space, then run the same command again: it continues "
            "with this shard"
        ) from error


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def arrow() -> Any:
    """pyarrow with its Parquet reader."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "caches are Parquet files, for which pyarrow is not installed: pip install "
            "'opdkit[data]'"
        ) from None
    return pyarrow


def _table(rollouts: Sequence[Rollout], scores: Sequence[Scored], drawn: bool) -> Any:
    pa = arrow()

    def lists(rows: Sequence[Any], kind: Any, dtype: Any) -> Any:
        flat = [np.asarray(row, dtype=dtype).ravel() for row in rows]
        ends = np.cumsum([0, *map(len, flat)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(flat), kind))

    ids, halves = (pa.int32(), np.int32), (pa.float16(), np.float16)
    columns = {
        "id": pa.array([r.id for r in rollouts]),
        "prompt_id": pa.array([r.question for r in rollouts]),
        "row": pa.array([exact.dumps(r.row) for r in rollouts]),
        "prompt": lists([r.prompt for r in rollouts], *ids),
        "tokens": lists([r.tokens for r in rollouts], *ids),
        "finish": pa.array([r.finish for r in rollouts]),
        "text": pa.array([r.text for r in rollouts]),
        "logp": lists([r.logp for r in rollouts], *halves),
        "teacher_logp": lists([s.logp for s in scores], *halves),
    }
    if drawn:
        columns["drawn_logp"] = lists([r.drawn_logp for r in rollouts], *halves)
    if scores[0].top_ids.shape[1]:
        # [T * k], position by position
        columns["top_ids"] = lists([s.top_ids for s in scores], *ids)
        columns["top_logp"] = lists([s.top_logp for s in scores], *halves)
    return pa.table(columns)


def _write(file: Any, table: Any) -> None:
    numbers = [name for name in table.column_names if arrow().types.is_list(table[name].type)]
    arrow().parquet.write_table(
        table,
        file,
        row_group_size=GROUP,
        compression="zstd",
        use_dictionary=["prompt_id", "row", "finish"],  # equal for all rollouts of a prompt
        column_encoding={
            f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in numbers
        },  # high and low bytes apart: these compress
        write_statistics=False,
    )


@dataclass
class Shard:
    """A finished file, open for reading."""

    file: Any  # pyarrow.parquet.ParquetFile

    @classmethod
    def open(cls, path: Path) -> Shard:
        return cls(arrow().parquet.ParquetFile(path, memory_map=True))

    @property
    def rollouts(self) -> int:
        return self.file.metadata.num_rows

    def read(self, columns: Sequence[str], group: int | None = None) -> list[dict[str, Any]]:
        """Rows of one row group, or of all: the columns that the file has, lists of numbers as
        arrays.
        """
        known = [name for name in columns if name in self.file.schema_arrow.names]
        table = self.file.read(known) if group is None else self.file.read_row_group(group, known)
        made = [_unpacked(table[name].combine_chunks()) for name in known]
        return [dict(zip(known, values)) for values in zip(*made)]


def _unpacked(column: Any) -> list[Any]:
    """Texts, or arrays of numbers."""
    if not arrow().types.is_list(column.type):
        return column.to_pylist()
    numbers, ends = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    return [numbers[a:b].copy() for a, b in pairwise(ends)]

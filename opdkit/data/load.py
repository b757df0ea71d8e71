"""Where rows come from: JSONL, JSON, Parquet, folders, the hub, reasoning-gym, or a list
in memory.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from opdkit.base.errors import UserError, nearest, shown
from opdkit.data.columns import normalise
from opdkit.data.gym import PREFIX, gym_rows
from opdkit.data.memory import as_rows
from opdkit.types import DataRow

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
# file names that are splits; others are shards of one set
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
NO_DATA = ("dataset_info.json", "dataset_infos.json")  # descriptions that lie beside the data
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name or owner/name:config


def load_rows(
    source: str | os.PathLike[str] | Sequence[DataRow] | Dataset,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> list[DataRow]:
    """The rows of a data set, with `prompt`, `answer`, `response`, `teacher` and `id` as
    `columns.normalise` says.

    source: a file (.jsonl, .json, .parquet; .gz), a folder of such files or of `save_to_disk`,
    `owner/name` or `owner/name:config` on the hub, `reasoning_gym:task?size=500&seed=1`, or rows in
    memory. limit: only the first so many. seed: of reasoning-gym tasks whose name gives none.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves no row: use 1 or more, or None for all")
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if name.startswith(PREFIX):
            if split is not None or columns:
                raise UserError(
                    f"{name!r} generates its rows, which have no split and fixed columns: leave "
                    "split and columns out"
                )
            return gym_rows(name, limit=limit, seed=seed)
        raw = _named(name, split)
    else:
        if split is not None:
            raise UserError(
                f"split={split!r} was asked of rows in memory, which have no splits: leave it out"
            )
        name, raw = "the data in memory", as_rows(source)
    rows = normalise(islice(raw, limit), columns)
    if not rows:
        raise UserError(
            f"{name} holds no rows, so there is nothing to train or evaluate on: check the path "
            "and the split"
        )
    return rows


def _named(name: str, split: str | None) -> Iterable[DataRow]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, split)
    if path.is_file():
        if split is not None:
            raise UserError(
                f"split={split!r} was asked of the file {name}, which has no splits: leave it out, "
                "or name the folder"
            )
        return _file(path)
    if HUB.fullmatch(name) and not name.endswith(SUFFIXES) and not name.startswith("."):
        return _hub(name, split)
    raise UserError(
        f"there is no file or folder {name!r} (looked in {Path.cwd()}), and it is no name on the "
        "hub (owner/name): correct the path, or give it in full"
    )


# -------------------------------------------------------------------------------------------- files


def _file(path: Path) -> Iterator[DataRow]:
    if not path.name.endswith(SUFFIXES):
        raise UserError(
            f"{path} is of a kind that is not read here: convert it to one of {', '.join(SUFFIXES)}"
        )
    read = (
        _parquet
        if path.suffix == ".parquet"
        else _jsonl
        if ".jsonl" in path.suffixes[-2:]
        else _json
    )
    try:
        yield from read(path)
    # also pyarrow's and UTF-8's errors, which are ValueErrors
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise _damaged(path, error) from error


def _open(path: Path) -> Any:
    return (
        gzip.open(path, "rt", encoding="utf-8-sig")
        if path.suffix == ".gz"
        else open(path, encoding="utf-8-sig")
    )


def _jsonl(path: Path) -> Iterator[DataRow]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno}). "
                    "Each line must be one object, "
                    f'such as {{"prompt": "...", "answer": "..."}}; this one begins {line[:60]!r}'
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}, line {number}: a row must be an object with columns, not "
                    f"{type(row).__name__}"
                )
            yield row


def _json(path: Path) -> Iterator[DataRow]:
    with _open(path) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            hint = (
                "; if each line is an object of its own, name the file .jsonl"
                if error.msg == "Extra data"
                else ""
            )
            raise UserError(
                f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column "
                f"{error.colno}){hint}. It is damaged or was cut: write it again"
            ) from None
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{path} must hold a list of objects, or {{"data": [...]}} with one')
    yield from rows


def _parquet(path: Path) -> Iterator[DataRow]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise _extra("Parquet files", "pyarrow") from None
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _folder(path: Path, split: str | None) -> Iterable[DataRow]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    inner = path / "data"  # as in a snapshot of a hub repository
    found = [file for folder in (path, inner) if folder.is_dir() for file in folder.iterdir()]
    files = sorted(
        file for file in found if file.name.endswith(SUFFIXES) and file.name not in NO_DATA
    )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(re.sub(r"-\d+-of-\d+.*|\..*", "", file.name), []).append(file)
    if not files:
        raise UserError(
            f"the folder {path} holds no data: none of its files ends in {', '.join(SUFFIXES)}. "
            "Give the folder that such files are in"
        )
    if split is None and not any(name in SPLITS for name in by_split):
        chosen = files
    else:
        chosen = by_split[_choose(list(by_split), split, str(path))]
    return (row for file in chosen for row in _file(file))


def _saved(path: Path, split: str | None) -> Iterator[DataRow]:
    """What `save_to_disk` wrote."""
    datasets = _datasets("folders written by save_to_disk")
    try:
        yield from _dataset(datasets.load_from_disk(str(path)), str(path), split)
    except UserError:
        raise
    # the package reads what its files say without a look at their form
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path} cannot be read ({type(error).__name__}: {shown(str(error))}): it is damaged, or "
        "not of the kind that its name says. Write it again, or give another path"
    )


def _choose(splits: list[str], split: str | None, name: str) -> str:
    """The split that was asked for; without one, the only one or "train"."""
    if split is None and len(splits) > 1 and "train" not in splits:
        raise UserError(
            f"{name} has the splits {', '.join(splits)}: say which, for example split={splits[0]}"
        )
    split = split or (splits[0] if len(splits) == 1 else "train")
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}{nearest(split, splits)}")
    return split


# ----------------------------------------------------------------------------------------- datasets


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise _extra(what, "datasets") from None
    return datasets


def _extra(what: str, package: str) -> UserError:
    return UserError(
        f"{what} are read by the package {package}, which is not installed: pip install "
        "'opdkit[data]'"
    )


def _hub(name: str, split: str | None) -> Iterable[DataRow]:
    """Splits may be sliced, as in `train[:100]`."""
    datasets = _datasets("data sets on the hub")
    repo, _, config = name.partition(":")
    try:
        if split is None:
            split = _choose(datasets.get_dataset_split_names(repo, config or None), None, name)
        return _dataset(datasets.load_dataset(repo, config or None, split=split), name, None)
    except (ValueError, OSError) as error:  # unknown repository, config or split; no network
        raise UserError(
            f"the data set {name!r} could not be read from the hub (nor is it a path here): "
            f"{error}. Where it has several configurations, name one: {repo}:CONFIG. Without a "
            "network, download it first and give the folder's path"
        ) from error


def _dataset(data: Dataset | DatasetDict, name: str, split: str | None) -> Iterable[DataRow]:
    if isinstance(data, dict):
        data = data[_choose(list(data), split, name)]
    elif split is not None:
        raise UserError(
            f"split={split!r} was asked of {name}, which was saved without splits: leave it out"
        )
    return cast("Iterable[DataRow]", data)

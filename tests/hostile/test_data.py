"""The door of data: files, folders, columns, templates."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.conftest import ROWS, Ground
from tests.hostile.judge import EITHER, REFUSED, WORKS, Attack

pytestmark = pytest.mark.hostile

ROW = '{"prompt": "2 plus 2?", "answer": "4"}\n'
HTML = b"<!DOCTYPE html><html><body>404: not found</body></html>"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
)
DEEP = "[" * 3000 + "]" * 3000

# by the name of the file: what is wrong with it, its content, how it must end
FILES: list[tuple[str, str, str | bytes, str]] = [
    ("nothing", "a.jsonl", "", REFUSED),
    ("only white space", "b.jsonl", "\n \n", REFUSED),
    ("a line that is cut", "c.jsonl", ROW + ROW[:20], REFUSED),
    ("null as a row", "d.jsonl", ROW + "null\n", REFUSED),
    ("a number as a row", "e.jsonl", "3\n", REFUSED),
    ("a list as a row", "f.jsonl", "[1, 2]\n", REFUSED),
    ("a text as a row", "g.jsonl", '"hello"\n', REFUSED),
    ("an object over several lines", "h.jsonl", '{\n"prompt": "x"\n}\n', REFUSED),
    ("a list of rows", "i.jsonl", '[{"prompt": "x"}]', REFUSED),
    ("UTF-16", "j.jsonl", ROW.encode("utf-16"), REFUSED),
    ("Latin-1", "k.jsonl", '{"prompt": "caf\u00e9"}\n'.encode("latin-1"), REFUSED),
    ("zeros", "l.jsonl", bytes(300), REFUSED),
    ("HTML", "m.jsonl", HTML, REFUSED),
    ("an LFS pointer", "n.jsonl", POINTER, REFUSED),
    ("deep JSON", "o.jsonl", f'{{"prompt": "x", "extra": {DEEP}}}\n', EITHER),
    ("5,000 digits", "p.jsonl", '{"prompt": "x", "answer": ' + "9" * 5000 + "}\n", EITHER),
    ("half a smile", "q.jsonl", '{"prompt": "half \\ud83d a smile"}\n' * 2, EITHER),
    ("half a smile alone", "r.jsonl", '{"prompt": "\\udc00"}\n' * 2, EITHER),
    ("a byte order mark", "s.jsonl", b"\xef\xbb\xbf" + ROW.encode(), WORKS),
    ("CRLF", "t.jsonl", ROW.replace("\n", "\r\n"), WORKS),
    ("NUL in a prompt", "u.jsonl", '{"prompt": "a\\u0000b"}\n', EITHER),
    ("other line ends in a text", "v.jsonl", '{"prompt": "a\u2028b\u0085c"}\n', WORKS),
    ("an empty prompt in row 2", "w.jsonl", ROW * 2 + '{"prompt": ""}\n', REFUSED),
    ("a prompt of blanks", "x.jsonl", '{"prompt": "  "}\n', EITHER),
    ("null as a prompt", "y.jsonl", '{"prompt": null}\n', REFUSED),
    ("a number as a prompt", "z.jsonl", '{"prompt": 5}\n', REFUSED),
    ("an object as a prompt", "aa.jsonl", '{"prompt": {"text": "x"}}\n', REFUSED),
    ("no column that asks", "ab.jsonl", '{"text": "x"}\n', REFUSED),
    ("a table of numbers", "ac.json", "[1, 2, 3]", REFUSED),
    ("an object", "ad.json", '{"a": 1}', REFUSED),
    ("JSON that is cut", "ae.json", '[{"prompt": "x"', REFUSED),
    ("deep JSON in one piece", "af.json", DEEP, REFUSED),
    ("CSV", "ag.csv", "prompt,answer\n2+2?,4\n", REFUSED),
    ("a Python file", "ah.py", "print('x')", REFUSED),
    ("no Parquet", "ai.parquet", "PAR1 or not", REFUSED),
    ("Parquet of zeros", "aj.parquet", bytes(100), REFUSED),
    ("gzip that is none", "ak.jsonl.gz", ROW, REFUSED),
    ("gzip that is cut", "al.jsonl.gz", gzip.compress(ROW.encode() * 99)[:-9], REFUSED),
    ("NaN as an answer", "am.jsonl", '{"prompt": "x", "answer": NaN}\n', EITHER),
    ("an id that is a path", "an.jsonl", '{"id": "../../x", "prompt": "x"}\n' * 2, WORKS),
    (
        "ids of other types",
        "ao.jsonl",
        '{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "y"}\n',
        WORKS,
    ),
    ("a long prompt", "ap.jsonl", '{"prompt": "' + "long " * 9000 + '"}\n', REFUSED),
    ("a column twice", "aq.jsonl", '{"prompt": "x", "prompt": "y"}\n', EITHER),
]
# messages of a row
MESSAGES: list[tuple[str, Any, str]] = [
    ("none", [], REFUSED),
    ("a text", "hello", WORKS),
    ("without roles", [{"content": "hi"}], REFUSED),
    ("without content", [{"role": "user"}], REFUSED),
    ("null as content", [{"role": "user", "content": None}], EITHER),
    ("a number as content", [{"role": "user", "content": 5}], EITHER),
    ("a list of numbers as content", [{"role": "user", "content": [1]}], EITHER),
    ("parts", [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], EITHER),
    ("a part without text", [{"role": "user", "content": [{"type": "image"}]}], EITHER),
    ("a role of others", [{"role": "wizard", "content": "hi"}], EITHER),
    ("null as a role", [{"role": None, "content": "hi"}], REFUSED),
    ("a list as a role", [{"role": ["user"], "content": "hi"}], REFUSED),
    ("null among them", [{"role": "user", "content": "hi"}, None], REFUSED),
    ("only a system's", [{"role": "system", "content": "be kind"}], EITHER),
    ("only an assistant's", [{"role": "assistant", "content": "hi"}], REFUSED),
    ("an object", {"role": "user", "content": "hi"}, REFUSED),
    ("half a smile", [{"role": "user", "content": "\ud83d"}], EITHER),
]
TEMPLATES: list[tuple[str, str, str]] = [
    ("an attribute", '"{prompt.x}"', REFUSED),
    ("an attribute that is there", '"{prompt.__class__}"', REFUSED),
    ("an index", '"{prompt[0]}"', REFUSED),
    ("a conversion of none", '"{prompt!z}"', REFUSED),
    ("a conversion", '"{prompt!r}"', EITHER),
    ("a format", '"{prompt:>3000000000}"', REFUSED),
    ("a format of numbers", '"{prompt:d}"', REFUSED),
    ("a field in a format", '"{prompt:{answer}}"', REFUSED),
    ("no name", '"{}"', REFUSED),
    ("a number for a name", '"{0}"', REFUSED),
    ("an open brace", '"{prompt"', REFUSED),
    ("a closing brace", '"prompt}"', REFUSED),
    ("no column", '"hello"', REFUSED),
    ("nothing", '""', REFUSED),
    ("a column that is not there", '"{question}"', REFUSED),
    ("half a smile", '"{prompt} \\ud83d"', EITHER),
    ("escaped braces", '"{prompt} \\\\boxed{{}}"', WORKS),
    ("a number", "5", REFUSED),
]


def test_files(ground: Ground, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for what, name, content, end in FILES:
            path = ground.file(f"data/{name}", content)
            yield ground.train(what, end=end, data=path)
        for what, messages, end in MESSAGES:
            path = ground.file(
                f"data/messages_{len(what)}.jsonl", json.dumps({"messages": messages}) + "\n"
            )
            yield ground.train(f"messages: {what}", end=end, data=path)

    judged("data: files", attacks())


def test_answers_of_data(ground: Ground, judged) -> None:
    """What a reward or a curriculum reads is missing in a late row."""
    good = "".join(f'{{"prompt": "{i}?", "answer": "{i}", "response": "{i}"}}\n' for i in range(9))

    def attacks() -> Iterator[Attack]:
        for what, row in {
            "is missing": '{"prompt": "9?"}',
            "is empty": '{"prompt": "9?", "answer": ""}',
            "is null": '{"prompt": "9?", "answer": null}',
            "is blank": '{"prompt": "9?", "answer": "  "}',
        }.items():
            path = ground.file(f"answers/{len(what)}.jsonl", good + row + "\n")
            for reward in ("math", "exact", "reasoning_gym", "code"):
                yield ground.train(
                    f"the answer of row 9 {what}: {reward}",
                    f"reward={reward}",
                    data=path,
                    said="row '?9|row '?0",
                )
        path = ground.file("answers/responses.jsonl", good + '{"prompt": "9?", "answer": "9"}\n')
        yield ground.train("no response in row 9", "method.name=gkd", "method.lmbda=0", data=path)

    judged("data: what a reward reads", attacks())


def test_templates(ground: Ground, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for what, template, end in TEMPLATES:
            yield ground.train(f"template: {what}", f"data.template={template}", end=end)
        for what, template in {
            "a filter of none": "{{ messages | nothing }}",
            "an end of none": "{% for m in messages %}",
            "an exception": "{{ raise_exception('no') }}",
            "a division by 0": "{{ 1 / 0 }}",
            "an attribute of none": "{{ messages[9].content }}",
            "a loop of 10^9": "{% for i in range(1000000000) %}x{% endfor %}",
            "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "nothing": "",
            "a constant": "hello",
        }.items():
            student = _with_template(ground, template)
            end = EITHER if what in ("nothing", "a constant") else REFUSED
            yield ground.train(f"chat template: {what}", end=end, student=student)

    judged("data: templates", attacks())


def _with_template(ground: Ground, template: str) -> str:
    """The student with another chat template."""
    import shutil

    folder = ground.folder / "templates" / str(abs(hash(template)))
    shutil.copytree(ground.student, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_folders(ground: Ground, judged) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in ROWS.splitlines()]

    def saved(name: str) -> Path:
        folder = ground.folder / "folders" / name
        datasets.Dataset.from_list(rows).save_to_disk(folder)
        return folder

    def attacks() -> Iterator[Attack]:
        yield ground.train("a saved data set", end=WORKS, data=saved("right"))
        for number, (file, content) in enumerate(
            (name, content)
            for name in ("state.json", "dataset_info.json")
            for content in ("", "{", "[]", "null", "{}", "<html>")
        ):
            folder = saved(f"broken{number}")
            (folder / file).write_text(content)
            yield ground.train(f"{file} is {content!r}", data=folder, end=EITHER)
        for number, content in enumerate((b"", b"ARROW1", HTML, POINTER)):
            folder = saved(f"arrow{number}")
            next(folder.glob("*.arrow")).write_bytes(content)
            yield ground.train(f"a table of {len(content)} bytes", data=folder)
        folder = saved("gone")
        next(folder.glob("*.arrow")).unlink()
        yield ground.train("a table that is gone", data=folder)
        (folder := ground.folder / "folders" / "dict").mkdir()
        for content in ("", "[]", "{}", '{"splits": 3}', '{"splits": ["train"]}'):
            (folder / "dataset_dict.json").write_text(content)
            yield ground.train(f"dataset_dict.json is {content!r}", data=folder)
        (empty := ground.folder / "folders" / "empty").mkdir()
        yield ground.train("an empty folder", data=empty)
        yield ground.train("a model's folder", data=ground.student)
        yield ground.train("nothing there", data=ground.folder / "no.jsonl")
        yield ground.train("a device", data="/dev/zero")
        yield ground.train("a task of nobody", data="reasoning_gym:nobody")
        yield ground.train("a task without a name", data="reasoning_gym:")
        yield ground.train("a task of -1 rows", data="reasoning_gym:chain_sum?size=-1")
        yield ground.train("a task with a wrong setting", data="reasoning_gym:chain_sum?sise=3")
        yield ground.train("a task with a text for a number", data="reasoning_gym:chain_sum?size=x")

    judged("data: folders", attacks())

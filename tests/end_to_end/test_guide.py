"""docs/which_teacher.md: every command runs as it stands, two steps each, on models of its kind
that are not trained.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import opdkit
from opdkit.cli import main
from opdkit.recipes import arithmetic
from tests.common.tiny import save_tiny
from tests.teachers.test_serve import serving

GUIDE = Path(opdkit.__file__).parent.parent / "docs" / "which_teacher.md"
TEXT = GUIDE.read_text()
HUB = re.compile(r"HuggingFaceTB/SmolLM2-\d+M-Instruct")
URL = "http://127.0.0.1:8765"
PARTS = dict(re.findall(r"^## (\d+\. .*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as `opdkit quickstart` and the guide's own lines leave it, with a chat model."""
    folder = tmp_path_factory.mktemp("guide")
    data = folder / "runs" / "quickstart" / "data"
    data.mkdir(parents=True)
    for name in ("train", "test"):
        rows = arithmetic.problems(64, 1, held=name == "test")
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = arithmetic.tokenizer()
    for size in ("student", "teacher"):
        place = folder / "runs" / "quickstart" / "models" / size
        arithmetic.model(size, len(tokenizer), 0).save_pretrained(place)
        tokenizer.save_pretrained(place)
    save_tiny(folder / "chat")
    (made,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(made, {})
        yield folder


def commands(part: str) -> list[list[str]]:
    """The command lines of a part of the guide, without the name of the program."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", part, re.S)).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in lines.strip().splitlines()]


def test_every_way_through_the_guide_ends_at_one_of_its_parts() -> None:
    drawn = re.findall(r"\.\. (\d+)", TEXT)
    assert sorted(drawn, key=int) == [name.partition(".")[0] for name in PARTS]
    assert all(commands(part) for part in PARTS.values())


@pytest.mark.parametrize("name", PARTS)
def test_a_command_of_the_guide_trains(world: Path, name: str) -> None:
    for words in commands(PARTS[name]):
        if words[0] == "serve-teacher":
            continue
        words = [HUB.sub("chat", word) for word in words]
        if any(URL in word for word in words):
            teacher = arithmetic.model("teacher", len(arithmetic.tokenizer()), 0)
            with serving(teacher, tokenizer=arithmetic.tokenizer()) as [server]:
                assert (
                    main(
                        [
                            word.replace(URL, f"http://127.0.0.1:{server.server_address[1]}")
                            for word in words
                        ]
                    )
                    == 0
                )
        else:
            assert main(words) == 0
    if (output := re.search(r"--output (\S+)", PARTS[name])) is not None:
        lines = (world / output[1] / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2

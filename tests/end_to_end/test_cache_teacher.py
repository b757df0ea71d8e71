"""`opdkit cache-teacher`: what it stores; killed, cut off, damaged and continued it leaves the same
bytes; what it refuses.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.cli import main
from opdkit.data import Prompts, load_rows
from opdkit.data.cache import open_cache, read_manifest
from opdkit.models.load import load_model, load_tokenizer
from opdkit.types import Prompt, Rollout
from tests.common.rounding import FORWARD
from tests.end_to_end.conftest import Shop
from tests.end_to_end.test_errors import refused
from tests.train.rows import naive_logps

KILLED = -9
ROUNDING = 2**-11  # of float16, relative


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ----------------------------------------------------------------------------------- what is stored


def rollouts(folder: Path) -> list[Rollout]:
    found = open_cache(folder)
    return [
        r
        for row in found.rows
        for r in found.rollouts(Prompt(row["id"], found.prompts[row["id"]].tolist(), row))
    ]


def test_what_is_stored_is_what_the_models_say(shop: Shop, cache: Path) -> None:
    """Prompts as training makes them; log-probs of a fresh forward pass of each whole row,
    rounded.
    """
    student, teacher = load_model(shop.student), load_model(shop.teacher)
    prompts = list(Prompts(load_rows(shop.data), load_tokenizer(shop.student)))
    found, made = open_cache(cache), rollouts(cache)
    assert [r.id for r in made] == [f"{p.id}/{c}" for p in prompts for c in (0, 1)]
    assert [r.prompt for r in made[::2]] == [p.tokens for p in prompts] and made[0].row == prompts[
        0
    ].row
    for rollout in made:
        for model, logp in ((student, rollout.logp), (teacher, found.scores(rollout).logp)):
            exact = naive_logps(model, rollout)[
                torch.arange(len(rollout.tokens)), torch.tensor(rollout.tokens)
            ]
            assert (
                (torch.as_tensor(logp).float() - exact)
                .abs()
                .le(exact.abs() * ROUNDING + FORWARD)
                .all()
            )
        scores, exact = found.scores(rollout), naive_logps(teacher, rollout).topk(4)
        assert torch.equal(torch.as_tensor(scores.top_ids).long(), exact.indices)
        at = torch.as_tensor(scores.top_logp).float()
        assert (at - exact.values).abs().le(exact.values.abs() * ROUNDING + FORWARD).all()


def test_a_response_that_was_cut_stays_cut(shop: Shop, cache: Path) -> None:
    end = load_tokenizer(shop.student).eos_token_id
    made = rollouts(cache)
    cut = [r for r in made if r.finish == "length"]
    assert cut and all(len(r.tokens) == 8 and r.tokens[-1] != end for r in cut)
    assert all(r.tokens[-1] == end for r in made if r.finish == "stop")


def test_it_says_what_it_left_and_how_to_train_on_it(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.cache(tmp_path / "c") == 0
    out = capsys.readouterr().out
    assert (
        "12 of 6 prompts" in out
        and f"--teacher cached:{tmp_path / 'c'}" in out
        and "bytes per token" in out
    )
    assert shop.cache(tmp_path / "c") == 0  # again: nothing to do
    assert "3 of 3 shards are there already" in capsys.readouterr().err


def test_a_file_of_a_run_will_do(shop: Shop, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"student: {shop.student}\nteacher: {shop.teacher}\ndata: {{source: {shop.data}}}\nmethod: "
        "gkd\ndevice: cpu\nsampling: {num_generations: 2, max_completion_length: 8}\n"
    )
    arguments = [
        "cache-teacher",
        str(file),
        f"--out={tmp_path / 'c'}",
        "--top-k=4",
        "--prompts-per-shard=2",
    ]
    assert main(arguments) == 0
    assert contents(tmp_path / "c") == contents(cache)


# ------------------------------------------------------------------------ interrupted and continued


def in_child(shop: Shop, out: Path, moment: str = "") -> int:
    """The command in a forked process; its exit code, -9 where it killed itself at the moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            __name__,
            "opdkit.run.cache_teacher",
            "transformers.models.qwen3.modeling_qwen3",
            "pyarrow.parquet",
        ]
    )
    child = context.Process(target=_cache, args=(shop, out, moment))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _cache(shop: Shop, out: Path, moment: str) -> None:
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if moment:
        _arm(moment)
    sys.exit(shop.cache(out))


def _arm(moment: str) -> None:
    from opdkit.data import shards
    from opdkit.data.cache import Manifest
    from opdkit.sampling import decode

    owner, name, calls, after = {
        "before the first shard": (decode, "choose", 3, False),
        "in the middle of a shard": (decode, "choose", 12, False),
        "while a shard is written": (shards, "_write", 2, True),
        "before the manifest knows of it": (Manifest, "write", 3, False),
    }[moment]
    real: Callable[..., Any] = getattr(owner, name)
    seen = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == calls and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if seen == calls:
            if name == "_write":
                args[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


@pytest.mark.parametrize(
    ("moment", "finished"),
    [
        ("before the first shard", 0),
        ("in the middle of a shard", 1),
        ("while a shard is written", 1),
        ("before the manifest knows of it", 1),
    ],
)
def test_killed_and_run_again_it_is_the_cache_that_was_never_killed(
    shop: Shop,
    cache: Path,
    tmp_path: Path,
    moment: str,
    finished: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "c"
    assert in_child(shop, folder, moment) == KILLED
    assert len(read_manifest(folder).entries) == finished
    kept = {n: (folder / n).stat().st_mtime_ns for n in read_manifest(folder).entries}
    assert shop.offline(tmp_path / "run", folder) == 2
    assert f"is not complete: it has {finished} of 3 shards" in capsys.readouterr().err
    assert shop.cache(folder) == 0
    assert contents(folder) == contents(cache)
    # finished shards were not touched
    assert {n: (folder / n).stat().st_mtime_ns for n in kept} == kept


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_byte_is_found_by_training_and_mended_by_writing_that_shard_again(
    shop: Shop, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    flip(copy / "shard-00001.parquet")
    kept = {p.name: p.stat().st_mtime_ns for p in copy.glob("shard-0000[02]*")}
    refused(
        capsys,
        shop.offline(tmp_path / "run", copy),
        "shard-00001.parquet is damaged",
        "rewrites that shard and no other",
    )
    assert not (tmp_path / "run" / "run.yaml").exists()
    assert shop.cache(copy) == 0
    assert (
        "shard-00001.parquet is written again: it is not what was written"
        in capsys.readouterr().err
    )
    assert contents(copy) == contents(cache)
    assert {p.name: p.stat().st_mtime_ns for p in copy.glob("shard-0000[02]*")} == kept
    assert shop.offline(tmp_path / "run", copy) == 0


def test_a_full_disk_loses_nothing(
    shop: Shop, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may grow beyond the smallest shard: the third, which is longer, cannot be written."""
    folder, sizes = (
        tmp_path / "c",
        [(cache / f"shard-0000{n}.parquet").stat().st_size for n in range(3)],
    )
    limit = sorted(sizes)[-1] - 1
    first = sizes.index(max(sizes))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = shop.cache(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(
        capsys,
        code,
        f"shard-0000{first}.parquet could not be written",
        "free some space",
        "continues with this shard",
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        *(f"shard-0000{n}.parquet" for n in range(first)),
    ]
    assert shop.cache(folder) == 0
    assert contents(folder) == contents(cache)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top-k=8"], ["top_k 4 there, 8 now"]),
        (["seed=1", "temperature=0.5"], ["seed 0 there, 1 now", "temperature 1.0 there, 0.5 now"]),
        (["--num-generations=1"], ["num_generations 2 there, 1 now"]),
        (["teacher_dtype=bfloat16"], ["teacher_dtype float32 there, bfloat16 now"]),
        (["data.limit=5"], ["other prompts", "prompts 6 there, 5 now"]),
        (["data.system=Think."], ["other prompts"]),
        (["--sft-teacher=other"], ["sft_teacher None there, other now"]),
    ],
    ids=lambda value: value[0],
)
def test_other_settings_than_those_of_the_folder_are_refused_and_named(
    shop: Shop,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    before = contents(cache)
    refused(capsys, shop.cache(cache, *arguments), "made with other settings", *words, "--out")
    assert contents(cache) == before


def test_other_models_than_those_of_the_folder_are_refused(
    shop: Shop, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = replace(shop, student=shop.teacher, teacher=shop.student)
    refused(
        capsys, swapped.cache(cache), f"student {shop.student} (", f"now; teacher {shop.teacher} ("
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top-k=-1"], ["top_k=-1 must not be negative"]),
        (["temperature=-1"], ["temperature=-1.0 must be 0 (greedy) or more"]),
        (["--teacher=cached:{cache}"], ["is a cache itself", "--teacher MODEL"]),
        (["--data={cache}"], ["is a cache: name the data set"]),
        (["max_completion_length=5000"], ["fit the model's context"]),
        (["--prompts-per-shard=500", "--top-k=1000000"], ["fit: lower --prompts-per-shard to 134"]),
    ],
    ids=lambda value: value[0],
)
def test_what_cannot_be_cached(
    shop: Shop,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    given = [a.format(cache=cache) for a in arguments]
    refused(capsys, shop.cache(tmp_path / "c", *given), *words)
    assert not list((tmp_path / "c").glob("*"))


def test_a_folder_with_other_files_is_left_alone(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(capsys, shop.cache(tmp_path), "holds other files (notes.txt ...)")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------- the document


def test_every_command_of_the_document_does_what_it_says(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, on tiny models of the names they use."""
    for name, target in (
        ("student", shop.student),
        ("teacher", shop.teacher),
        ("questions.jsonl", shop.data),
    ):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "offline.md").read_text(encoding="utf-8")
    commands = [
        line.split()[1:]
        for block in re.findall(r"```sh\n(.*?)```", text, re.S)
        for line in block.splitlines()
    ]
    assert [c[0] for c in commands] == [
        "cache-teacher",
        "train",
        "cache-teacher",
        "cache-teacher",
        "train",
        "train",
    ]
    for command in commands:
        small = [
            "max_completion_length=8",
            "device=cpu",
            *(["steps=1", "prompts_per_step=2"] if command[0] == "train" else []),
        ]
        assert main([*command, *small]) == 0, (command, capsys.readouterr().err)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(program.replace("=256", "=8").replace("=150", "=1"), {})
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"offline", "wide", "live", "python"}
    assert read_manifest(tmp_path / "wide").rollouts == 12

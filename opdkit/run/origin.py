"""Where a run was made: versions, device, state of the code, and the command line."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ORIGIN = "origin.jsonl"  # one line per start of the run
PACKAGES = (
    "opdkit",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "peft",
    "datasets",
    "bitsandbytes",
    "math-verify",
    "reasoning-gym",
    "vllm",
)
SECRET = re.compile(r"(://[^/@\s:]*:)[^/@\s]+@")  # a password in a URL


def write_origin(folder: Path, step: int, device: str, processes: int) -> None:
    """One more line of `ORIGIN`: a run that begins at `step`, or goes on from there."""
    line = {"step": step} | origin(device) | {"processes": processes}
    with (folder / ORIGIN).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def origin(device: str) -> dict[str, Any]:
    """What the results of a run may depend on besides its settings."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [SECRET.sub(r"\1***@", text) for text in sys.argv],
        "folder": str(Path.cwd()),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "device": _device(device),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "git": _git(Path.cwd()),
        "opdkit_git": _git(Path(__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(name: str) -> str:
    import torch

    return torch.cuda.get_device_name(name) if name.startswith("cuda") else name


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit of the checkout around a folder, and whether files differ from it; None where
    there is none.
    """

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no")
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None

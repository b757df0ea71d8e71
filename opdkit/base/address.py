"""The one form in which a person's own code is named: `file.py:function`, for methods, recipes,
rewards and curricula.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from opdkit.base.errors import UserError, nearest
from opdkit.base.own_code import FILE_SECONDS, own_code


def is_address(text: str) -> bool:
    """Whether a name means something in a file rather than something built in."""
    path, colon, _ = text.rpartition(":")
    return bool(colon) and path.endswith(".py")


def load_address(address: str) -> Any:
    """The object that `file.py:name` names; the path is relative to the working directory."""
    path_text, _, name = address.rpartition(":")
    if not is_address(address) or not name.isidentifier():
        raise UserError(
            f"{address!r} is not an address: write file.py:name, for example "
            "my_rewards.py:short_and_right"
        )
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise UserError(
            f"{address!r} names the file {path_text}, which is not there (looked in {Path.cwd()}): "
            "correct the path, or give it in full"
        )
    module = _module(path.resolve(), address)
    if not hasattr(module, name):
        known = [
            n
            for n, value in vars(module).items()
            if not n.startswith("_") and not isinstance(value, ModuleType)
        ]
        raise UserError(
            f"{path_text} defines no "
            f"{name!r}{nearest(name, known) if known else ': it defines nothing'}"
        )
    return getattr(module, name)


def path_of(address: str) -> str:
    """The file of an address, as errors in its code name it; "" for a name that is none."""
    return (
        str(Path(address.rpartition(":")[0]).expanduser().resolve()) if is_address(address) else ""
    )


def _module(path: Path, address: str) -> ModuleType:
    """The file as a module: run once per content, so that two addresses in one file share its
    classes, and an edit is seen.
    """
    content = path.read_bytes()
    digest = hashlib.sha1(str(path).encode() + b"\0" + content, usedforsecurity=False).hexdigest()[
        :12
    ]
    name = f"opdkit_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it is a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up there
    try:
        # Compiled from what was hashed: the loader's cache goes by whole seconds and would miss a
        # quick edit.
        with own_code(
            f"{address!r} cannot be used, because its file fails when it runs",
            str(path),
            FILE_SECONDS,
        ):
            exec(compile(content, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module

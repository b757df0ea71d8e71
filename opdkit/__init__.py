"""On-policy distillation of language models.

    import opdkit
    result = opdkit.distill("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", prompts="openai/gsm8k:main", method="iw_opd", reward="math")

Names are imported when first used, so that `import opdkit` stays light.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdkit.commands import eval_model, sample_model
    from opdkit.compare import compare
    from opdkit.doctor import doctor
    from opdkit.errors import UserError
    from opdkit.explain import explain
    from opdkit.launch import distill, execute
    from opdkit.method import Method, load, methods, weight_of
    from opdkit.objective import Objective
    from opdkit.offline import cache_teacher
    from opdkit.report import write_report
    from opdkit.run import Run, load_run, make_run

__version__ = "0.1.0"

_HOMES = {
    "load": "method",
    "methods": "method",
    "Method": "method",
    "weight_of": "method",
    "Objective": "objective",
    "Run": "run",
    "load_run": "run",
    "make_run": "run",
    "distill": "launch",
    "execute": "launch",
    "eval_model": "commands",
    "sample_model": "commands",
    "doctor": "doctor",
    "compare": "compare",
    "cache_teacher": "offline",
    "explain": "explain",
    "write_report": "report",
    "UserError": "errors",
}

__all__ = [
    "Method",
    "Objective",
    "Run",
    "UserError",
    "cache_teacher",
    "compare",
    "distill",
    "doctor",
    "eval_model",
    "execute",
    "explain",
    "load",
    "load_run",
    "make_run",
    "methods",
    "sample_model",
    "weight_of",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"opdkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'opdkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """`opdkit.compare`, `opdkit.explain` and `opdkit.methods` are the functions, also once the modules of those names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

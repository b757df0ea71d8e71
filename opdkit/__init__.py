"""On-policy distillation of language models.

    import opdkit
    result = opdkit.distill("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", prompts="openai/gsm8k:main",
    method="iw_opd", reward="math")

Names are imported when first used, so that `import opdkit` stays light.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdkit.base.errors import UserError
    from opdkit.methods.explain import explain
    from opdkit.methods.method import Method, load, methods, weight_of
    from opdkit.objective.grammar import Objective
    from opdkit.report import write_report
    from opdkit.run.cache_teacher import cache_teacher
    from opdkit.run.commands import eval_model, sample_model
    from opdkit.run.doctor import doctor
    from opdkit.run.launch import distill, execute
    from opdkit.run.settings import Run, load_run, make_run
    from opdkit.study.compare import compare

__version__ = "0.1.0"

_HOMES = {
    "load": "methods.method",
    "methods": "methods.method",
    "Method": "methods.method",
    "weight_of": "methods.method",
    "Objective": "objective.grammar",
    "Run": "run.settings",
    "load_run": "run.settings",
    "make_run": "run.settings",
    "distill": "run.launch",
    "execute": "run.launch",
    "eval_model": "run.commands",
    "sample_model": "run.commands",
    "doctor": "run.doctor",
    "compare": "study.compare",
    "cache_teacher": "run.cache_teacher",
    "explain": "methods.explain",
    "write_report": "report",
    "UserError": "base.errors",
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
    """`opdkit.methods` is the function, also once the folder of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

"""The process behind `guard.py`: reads calls on stdin, writes results on stdout. Imports nothing of opdkit."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import sys
from functools import lru_cache
from typing import Any

MEMORY = 8 << 30  # bytes of address space: 9^9^9^9 must fail, not fill the machine


def ready(function: str) -> bool:
    """Import what a function needs."""
    __import__({"equal": "math_verify", "gym": "reasoning_gym"}[function])
    return True


def equal(answer: str, said: str) -> bool:
    """Whether two LaTeX expressions are the same, by math-verify."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Only LaTeX, whole: the plain-number extraction would find the 5 in "5 or 6". Limits are the guard's business.
    how = [LatexExtractionConfig()]
    golds, tries = (parse(rf"\boxed{{{text}}}", how, parsing_timeout=None) for text in (answer, said))
    return verify(golds, tries, timeout_seconds=None)


def gym(task: str, config: dict[str, Any], said: str, entry: dict[str, Any]) -> float:
    """The value that a reasoning-gym task's scorer gives."""
    return float(_dataset(task, json.dumps(config)).score_answer(said, entry))


@lru_cache(maxsize=64)
def _dataset(task: str, config: str) -> Any:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, **json.loads(config))
    # Some scorers call eval on the answer: there, a model's text must not be run as a program.
    vars(sys.modules[type(dataset).__module__])["eval"] = literal
    return dataset


def literal(text: str) -> Any:
    """`eval` for literals and arithmetic only."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if re.fullmatch(r"[0-9a-fA-FxX+\-*/%()<>&|^~. ]*", text):
            return eval(text, {"__builtins__": {}})
        raise


def main() -> None:
    calls, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print must not write among the results
    if sys.platform == "linux":
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if allowed == resource.RLIM_INFINITY else min(MEMORY, allowed), allowed))
    functions = {f.__name__: f for f in (ready, equal, gym)}
    while True:
        try:
            name, arguments = pickle.load(calls)
        except EOFError:  # the parent ended
            return
        result: tuple[bool, Any]  # whether it returned, and what; or why not
        try:
            result = True, functions[name](*arguments)
        except Exception as error:
            result = False, f"{type(error).__name__}: {error}"
        pickle.dump(result, results)
        results.flush()


if __name__ == "__main__":
    main()

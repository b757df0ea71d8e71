"""Examples in the docstrings of core types print what they say."""

import doctest
from types import ModuleType

import pytest

import opdkit.types
from opdkit.objective import batch


@pytest.mark.parametrize("module", [opdkit.types, batch], ids=lambda m: m.__name__)
def test_examples_print_what_they_say(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0

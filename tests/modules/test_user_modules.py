"""Packages that are kept out of a process."""

import importlib.util
import sys

import pytest

from modules.installation import hide_packages


def test_a_hidden_package_is_missing_inside_the_block_only() -> None:
    sys.modules.pop("this", None)
    with hide_packages("this"):
        assert importlib.util.find_spec("this") is None
        with pytest.raises(ModuleNotFoundError):
            import this  # noqa: F401
    assert importlib.util.find_spec("this") is not None


def test_a_package_that_is_loaded_stays() -> None:
    with hide_packages("pytest"):
        assert sys.modules["pytest"] is pytest
    assert sys.modules["pytest"] is pytest

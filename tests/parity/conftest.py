"""Speed of the tests in this folder."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection(quick_garbage_collection: None) -> None:
    """All of them run scripts, beside diffusers."""

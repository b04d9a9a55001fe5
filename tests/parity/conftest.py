"""Speed of the tests in this folder."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection() -> Iterator[None]:
    """The scripts collect garbage between their phases, which takes half a second once all of diffusers is loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

"""What tests of generation scripts share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """Scripts collect garbage between their phases, which takes half a second once the tokenizers' library is loaded."""
    import transformers.models.auto  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

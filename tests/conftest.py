"""What tests of several folders share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """Scripts collect garbage between their phases, which takes half a second once large libraries are loaded."""
    import transformers.models.auto  # noqa: F401 (the tokenizers' library, before what there is stays out of collections)

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

"""How many bytes of tensors and arrays are held at once, for tests of what must not grow."""

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def held_memory() -> Iterator[Callable[[], int]]:
    """A function that says how many bytes are held of what was made inside the block; memory that several
    share counts once.

    Tensors are found among the objects that Python can walk through, arrays by the memory that numpy says it
    takes.
    """

    def held() -> int:
        tensors = [each for each in gc.get_objects() if type(each) is Tensor]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        return sum(storages.values()) + tracemalloc.get_traced_memory()[0]

    gc.collect()
    gc.freeze()  # what is there now is neither walked through nor counted
    tracemalloc.start()
    try:
        yield held
    finally:
        tracemalloc.stop()
        gc.unfreeze()

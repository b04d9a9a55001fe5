"""Keep optional packages that another package would load out of a process that has no use for them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def hide_packages(*names: str) -> Iterator[None]:
    """Let packages look as if they were not installed inside the block; those loaded before stay loaded.

    A package that asks once, when it is imported, does without them from then on. Afterwards they can be
    imported as before. None in place of a module is Python's own way to refuse an import.
    """
    hidden: dict[str, ModuleType | None] = {name: None for name in names if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]  # it takes None
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]

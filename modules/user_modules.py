"""Import modules that a user names in an option, and keep packages out of a process without use for them."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from modules.errors import OptionError
from modules.installation import own_name


def import_user_module(option: str, name: str, example: str, remedy: str) -> ModuleType:
    """Import a module by the name that a user gave to an option. The working folder is searched too.

    example: a valid name. remedy: words for the error if it is not found. Raises OptionError if it cannot be
    imported.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise OptionError(f"{option} {name} is not an import path. Write package.module, as {example}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(own_name(name))
    except ImportError as error:
        raise OptionError(f"{option} {name} cannot be imported: {error}.{remedy}") from error
    except Exception as error:  # the module may run any code of its own
        raise OptionError(f"{option} {name} cannot be imported: {type(error).__name__}: {error}") from error


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

"""Load extensions from installed packages, but only those that the user has named.

A package announces its extensions by entry points of the groups below. The user names them in the environment
variable `REELSMITH_EXTENSIONS`, or before a command: `reelsmith --extensions NAME`. No file can name
one. Standard library only; nothing here is called unless something is named.
"""

import importlib
import os
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from modules.errors import InstallationError, OptionError
from modules.installation import EXTENSIONS, EXTENSIONS_FLAG

FEATURES, NETWORKS, OPTIMIZERS, FAMILIES, PAGES = GROUPS = (
    "reelsmith.features",  # a `Feature` of training/features/contract.py
    "reelsmith.networks",  # a `NetworkKind` of networks/kinds/contract.py
    "reelsmith.optimizers",  # a subclass of torch.optim.Optimizer; its name is that of --optimizer_type
    "reelsmith.families",  # a package with names.py, options.py, files.py and family.py, like wan/
    "reelsmith.pages",  # a function that returns the routes of pages in the browser for its `Site`
)


def list_named() -> list[str]:
    """Return the names of the extensions that the user has named."""
    return split_names(os.environ.get(EXTENSIONS, ""))


def split_names(text: str) -> list[str]:
    """Return the names in a list with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_named() -> None:
    """Raise OptionError if an extension that the user named is in no installed package, or in two of them."""
    for name in list_named():
        entries = [entry for group in GROUPS for entry in entry_points(group=group, name=name)]
        if not entries:
            known = {entry.name for group in GROUPS for entry in entry_points(group=group)}
            there = f"Installed are {', '.join(sorted(known))}" if known else "None is installed"
            raise OptionError(f"extension {name}: no installed package provides it. {there}")
        owners = {entry.dist.name for entry in entries if entry.dist is not None}
        if len(owners) > 1:
            raise OptionError(
                f"extension {name}: {' and '.join(sorted(owners))} both provide one of this name. Uninstall "
                "one"
            )


def find_values(group: str) -> dict[str, str]:
    """Return the extensions of a group that the user named, name -> `module:attribute`; imports nothing."""
    return {entry.name: entry.value for entry in _find_entries(group)}


def load_extensions(group: str) -> dict[str, Any]:
    """Import the extensions of a group that the user named, and return them by name.

    Raises:
        InstallationError: If one of them cannot be imported.
    """
    return {entry.name: _load(entry) for entry in _find_entries(group)}


def _find_entries(group: str) -> Iterator[EntryPoint]:
    """Yield a group's entry points that the user named, in the order of `list_named`."""
    for name in list_named():
        yield from entry_points(group=group, name=name)


def _load(entry: EntryPoint) -> Any:
    """Import the object of an entry point; any error in its code becomes an InstallationError."""
    try:
        found = importlib.import_module(entry.module)
        return getattr(found, entry.attr) if entry.attr else found
    except Exception as error:  # third-party code may raise anything
        raise InstallationError(
            f"extension {entry.name} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}. "
            f"Leave it out of {EXTENSIONS_FLAG} or {EXTENSIONS}, or install a version for this Reelsmith"
        ) from error

"""Import modules of a checkout by their names in the installed package: reelsmith.modules.errors.

So an extension is written once, for both. Each module is loaded once, under either name.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from modules.installation import ROOT

PREFIX = "reelsmith."


class PackageNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `reelsmith.NAME` as the module NAME of the checkout."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}  # of modules as they were loaded, by name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a name such as `reelsmith.modules.paths`; None for others and for scripts."""
        name = fullname.removeprefix(PREFIX)
        is_own_package = (ROOT / name.partition(".")[0] / "__init__.py").is_file()
        if name == fullname or not is_own_package:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the checkout."""
        module = importlib.import_module(spec.name.removeprefix(PREFIX))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import system has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = self._specs[module.__spec__.name]


def join_names() -> None:
    """Make the checkout's modules importable as `reelsmith.NAME` in this process."""
    if not any(isinstance(finder, PackageNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, PackageNames())

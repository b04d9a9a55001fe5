"""Import modules of the installed package by their names in a checkout: `browser.runs.runs` for
`reelsmith.browser.runs.runs`.

A plugin of pytest, with which tests of the checkout test the package. Processes that tests start do without.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

FRONT = "package.reelsmith"


class InstalledNames(MetaPathFinder, Loader):
    """Find the modules of a checkout in the package."""

    def __init__(self, folder: Path) -> None:
        """folder: of the installed package."""
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = name.partition(".")[0]
        is_ours = (self.folder / top).is_dir() or (self.folder / f"{top}.py").is_file()
        return spec_from_loader(name, self) if is_ours or top == "package" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name == "package" or spec.name.startswith(FRONT):
            return importlib.import_module(
                "reelsmith" + spec.name.removeprefix("package").removeprefix(".reelsmith")
            )
        return importlib.import_module(f"reelsmith.{spec.name}")

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module was executed under its own name."""


spec = find_spec("reelsmith")
if spec is not None and spec.submodule_search_locations:
    sys.meta_path.insert(0, InstalledNames(Path(spec.submodule_search_locations[0])))

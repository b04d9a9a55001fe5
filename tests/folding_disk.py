"""A disk that takes names that differ in case for one."""

import builtins
import contextlib
import functools
import io
import os
from pathlib import Path
from typing import Any

import pytest


class FoldingDisk:
    """Patches by which a folder on Linux takes names that differ in case for one, as Windows and macOS do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def patch(module: Any, name: str) -> None:
            full = getattr(module, name)

            def act(*words: Any, **named: Any) -> Any:
                return full(*map(self.find_named, words), **named)

            monkeypatch.setattr(module, name, act)

        names = ("stat", "unlink", "mkdir", "replace", "chmod", "utime", "listxattr", "scandir")
        for name in filter(functools.partial(hasattr, os), names):
            patch(os, name)
        for module in (io, builtins):
            patch(module, "open")

    def find_named(self, word: Any) -> Any:
        is_path = isinstance(word, (Path, str)) and Path(word).is_absolute()
        return self.find(word) if is_path else word

    def find(self, path: str | Path) -> str:
        """Return the path in the spelling of what is there."""
        found = Path(Path(path).anchor)
        for part in Path(path).parts[1:]:
            names = []
            # Path.is_dir would ask os.stat, which asks here again: twice the work with each folder on the way
            with contextlib.suppress(OSError):
                names = os.listdir(found)
            same = [name for name in names if name.casefold() == part.casefold()]
            found = found / (part if part in names else same[0] if same else part)
        return str(found)

"""Replace the paths of this machine in a described folder's text files, or list the irreplaceable ones."""

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tomlkit
from tomlkit.exceptions import TOMLKitError

from modules.installation import ROOT
from modules.paths import expand_path
from modules.text_files import real_path

_ABSOLUTE_PATH = re.compile(r"~?[\\/]+[^\\/\s]|~\w*$|~\w+[\\/]|[A-Za-z]:[\\/]")
_PARENT_FOLDER = re.compile(r"\.\.([\\/]|$)")
# a word of a prompt line, with or without quotes
_WORD = re.compile(r"""(?<!\S)(["'])(?P<quoted>.+?)\1(?!\S)|(?<!\S)(?P<plain>\S+)""")


@dataclass(frozen=True)
class MachinePaths:
    """Finds and replaces paths of this machine in a folder's text files."""

    folder: Path  # path as typed
    # path in the text files -> path in the packed folder
    models: Mapping[str, str] = field(default_factory=dict)

    def relocate(self, text: str) -> str | None:
        """Make a path relative to the packed folder.

        Returns None for a path of this machine to something that is not packed. Other strings, and relative
        paths inside the folder, are returned unchanged.
        """
        if text in self.models:
            return self.models[text]
        is_absolute = _ABSOLUTE_PATH.match(text) is not None
        if not is_absolute and ".." not in text:
            return text  # a relative path that cannot leave the folder, or no path at all
        if is_absolute and (not text.startswith("~") and not Path(text).is_absolute()):
            return None
        try:
            inner_path = self._find_inside(Path(os.path.normpath(expand_path(text, self.folder))))
        except ValueError:
            return None if is_absolute else text
        if inner_path is not None:
            return inner_path
        leads_outside = is_absolute or _PARENT_FOLDER.match(text) is not None
        return None if leads_outside else text  # a string with two dots may be no path

    def _find_inside(self, path: Path) -> str | None:
        """Return an absolute path as one relative to the folder; None if it is outside of it."""
        # the folder may be named by a link or by its real path
        for folder in (Path(os.path.abspath(self.folder)), real_path(self.folder)):  # noqa: PTH100
            if path.is_relative_to(folder):
                return path.relative_to(folder).as_posix()
        return None

    @functools.cached_property
    def folder_pattern(self) -> re.Pattern[str]:
        """Regular expression that matches paths of this machine's folders anywhere in a text."""
        folders = [Path(os.path.abspath(self.folder)), real_path(self.folder), Path.home()]  # noqa: PTH100
        names = {name for folder in folders for name in (str(folder), folder.as_posix()) if len(name) > 1}
        return re.compile(rf"(?:{'|'.join(re.escape(name) for name in sorted(names))})(?![\w-])")

    def erase(self, text: str) -> str:
        """Replace this machine's paths in a text, such as a command."""
        short = {f"{ROOT}{os.sep}": "", f"{ROOT.as_posix()}/": "", **self.models}
        for path in sorted(short, key=len, reverse=True):
            if text == path or "/" in path or "\\" in path:
                text = text.replace(path, short[path])
            else:  # a name such as `data` is also a word of prompts: replaced only where it begins a path
                begins_path = rf"(?<![\w./\\-]){re.escape(path)}(?=[\\/])"
                text = re.sub(begins_path, short[path].replace("\\", r"\\"), text)
        return self.folder_pattern.sub(".", text)


class RelocatedText(NamedTuple):
    """A text whose paths were made relative, and the paths for which this was impossible."""

    text: str
    outside_paths: list[str]  # paths that are not in the packed folder
    removed_keys: list[str]


def relocate_toml(
    text: str, machine_paths: MachinePaths, removed_keys: Collection[str] = ()
) -> RelocatedText:
    """Make the paths in a TOML text relative; comments are preserved.

    `machine_paths` replaces the paths; those that it cannot replace stay, and are returned as outside of the
    packed folder. `removed_keys` are keys to remove from all tables.

    Raises:
        ValueError: If the text is not TOML.
    """
    try:
        document = tomlkit.parse(text)
    except TOMLKitError as error:
        raise ValueError(f"it is not TOML: {error}") from None
    paths_outside: list[str] = []  # as `key = value`; filled by `relocate`

    def relocate(key: str, value: str) -> str:
        relocated = machine_paths.relocate(value)
        if relocated is None:
            paths_outside.append(f"{key} = {value}")
            return value
        return relocated

    removed = _remove_keys(document, removed_keys)
    change_texts(document, relocate)
    return RelocatedText(tomlkit.dumps(document), paths_outside, removed)


def change_texts(values: Any, change: Callable[[str, str], str], key: str = "") -> None:
    """Replace each string in nested tables and lists by `change(key, text)`; list items have its key."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for place, value in list(pairs):
        name = str(place) if isinstance(values, dict) else key
        if isinstance(value, str):
            changed = change(name, str(value))
            if changed != value:
                values[place] = changed
        elif isinstance(value, (dict, list)):
            change_texts(value, change, name)


def _remove_keys(values: Any, names: Collection[str]) -> list[str]:
    """Remove keys from a table and its nested tables; return the names of the removed keys."""
    removed = []
    if isinstance(values, dict):
        removed = [name for name in names if name in values]
        for name in removed:
            del values[name]
        values = list(values.values())
    for value in values:
        if isinstance(value, (dict, list)):
            removed += _remove_keys(value, names)
    return removed


def relocate_history(text: str, machine_paths: MachinePaths) -> str:
    """Return a run's history with this machine's paths replaced.

    Lines that cannot be parsed are dropped, such as the last line of a killed run; a resumed run drops them,
    too.
    """
    lines = []
    for line in text.split("\n"):  # prompts may contain other line breaks, such as U+2028
        try:
            record = json.loads(line)
        except ValueError:
            continue
        change_texts(record, lambda _, value: machine_paths.erase(value))
        lines.append(f"{json.dumps(record)}\n")
    return "".join(lines)


def find_own_names(path: Path, machine_paths: MachinePaths) -> list[str]:
    """Return a message for each line of a text file that contains a path of this machine."""
    names = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            match = machine_paths.folder_pattern.search(line.decode("utf-8", "replace"))
            if match is not None:
                names.append(f"line {number} has {match[0]}")
    return names


def relocate_prompts(text: str, machine_paths: MachinePaths) -> RelocatedText:
    """Make the paths in the lines of a prompt file relative."""
    outside: list[str] = []

    def relocate(match: re.Match[str]) -> str:
        word = match["quoted"] or match["plain"]
        moved = machine_paths.relocate(word)
        if moved is None and len(Path(word).parts) > 2:
            outside.append(word)
        return match[0] if moved is None else match[0].replace(word, moved)

    return RelocatedText(_WORD.sub(relocate, text), outside, [])

"""Remember the options of the caching commands in each cache folder, for the commands that follow.

Options that are no longer valid, such as the path of a deleted file, are not used again.
"""

import contextlib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.config import DatasetConfig
from modules.atomic_write import write_text
from modules.control_codes import escape_control_codes
from modules.errors import OutputError
from modules.option_values import value_argv
from modules.options import Options
from modules.paths import path_exists
from modules.repeated_options import (
    AcceptedOption,
    RepeatedOption,
    accepted_options,
    repeat_given,
)
from modules.text_files import parse_json, read_text, real_path
from protocols.families import FamilyEntry

NAME = ".reelsmith_commands.json"  # hidden: cache folders may be folders of images
VERSION = 1
MAX_BYTES = 1 << 20  # ample for a few families with a few dozen options each
MAX_CHARACTERS = 10_000  # of one value
KINDS = ("LatentCaching", "TextCaching")


def remember_options(
    config: DatasetConfig,
    family: str,
    kind: str,
    family_options: Options,
    typed: Mapping[str, str],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Store the options of a caching command in the cache folders of all tables.

    A training run from these caches repeats them. A folder that cannot be written to is skipped, because its
    caches are usable without the file.

    Args:
        config: The dataset file.
        family: Name of the family.
        kind: Which command, one of KINDS.
        family_options: The family's options of the command.
        typed: Spelling of each option on the command line, by public name.
        training: Options that a training run from these caches needs in addition, by flag.
    """
    accepted = accepted_options(type(family_options))
    options = {}
    for option in repeat_given(family_options, typed):
        is_path = Path in accepted[option.name].types
        options[option.name] = {"flag": option.flag, "value": option.value, "is_path": is_path}
    # "folder": relative paths among the values are relative to it
    command: dict[str, Any] = {"folder": str(real_path(Path.cwd())), "options": options}
    if training:
        command["training"] = {flag.lstrip("-"): {"value": value} for flag, value in training.items()}
    cache_folders = dict.fromkeys(table.cache_directory for table in config.datasets)  # each folder once
    for folder in cache_folders:
        if not folder.is_dir():
            continue
        families = _read_families(folder)
        families.setdefault(family, {})[kind] = command
        content = {"version": VERSION, "families": families}
        text = json.dumps(content, indent=1, sort_keys=True, default=str)  # `str` converts paths
        with contextlib.suppress(OutputError, OSError):
            write_text(folder / NAME, f"{text}\n")


def recall_options(
    folders: Iterable[Path],
    family: str,
    entry: FamilyEntry,
    kinds: Sequence[str] = KINDS,
    for_training: bool = False,
) -> list[RepeatedOption]:
    """Return the options that were used to make the caches in these folders, in the order of the folders.

    With `for_training`, options that training from the caches needs are included. A path is returned as typed
    if the command was run in the current folder, otherwise as an absolute path. Unknown options, and paths of
    files that no longer exist, are omitted.
    """
    recalled: list[RepeatedOption] = []
    for folder in dict.fromkeys(folders):
        commands = _read_families(folder).get(family, {})  # remembered commands by kind
        for kind in kinds:
            command = commands.get(kind)
            if isinstance(command, dict):
                recalled += _recall(command, "options", entry.options_record(kind))
                if for_training:
                    recalled += _recall(command, "training", entry.options_record("Training"))
    return recalled


def _recall(command: Mapping[str, Any], key: str, record: type[Options]) -> Iterable[RepeatedOption]:
    """Yield the options of a stored caching command that are known and still valid."""
    # `key` is "options" for the command's own options, or "training" for those that a training run needs.
    accepted = accepted_options(record)
    folder = command.get("folder")
    options = command.get(key)
    if not isinstance(folder, str) or not isinstance(options, dict):
        return
    for name, remembered in options.items():
        if name not in accepted or not isinstance(remembered, dict):
            continue
        option = accepted[name]
        value = remembered.get("value")
        if not _is_allowed(value, option):
            continue
        if Path in option.types:
            value = _find_path(str(value), folder)
            if value is None:
                continue
        flag = remembered.get("flag")
        public_flag = option.flags[-1]
        yield RepeatedOption(name, option.flags, flag if flag in option.flags else public_flag, value)


def _is_allowed(value: Any, option: AcceptedOption) -> bool:
    """Return whether an option accepts a stored value, and a command in a message can show the value."""
    # A message shows short values on one line, without control codes.
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float)) for item in values):
        return False
    for argument in value_argv(value):
        has_control_codes = escape_control_codes(argument) != argument or "\n" in argument
        if len(argument) > MAX_CHARACTERS or has_control_codes:
            return False
    if option.choices and isinstance(value, str) and value not in option.choices:
        return False
    return any(_has_type(value, kind) for kind in option.types)


def _find_path(text: str, folder: str) -> Path | None:
    """Return a stored path if it still exists; `folder` is the one in which the stored command ran."""
    path = Path(text)
    if not path.is_absolute() and Path(folder) != real_path(Path.cwd()):
        path = folder / path
    return path if path_exists(path) else None


def _has_type(value: Any, kind: Any) -> bool:
    """Return whether a stored value has the type that the option accepts."""
    if typing.get_origin(kind) is tuple:
        item_type = typing.get_args(kind)[0]
        # an item that looks like a command-line option is not repeated
        return isinstance(value, list) and all(
            _has_type(item, item_type) and not (isinstance(item, str) and item.startswith("-"))
            for item in value
        )
    if kind is Path:
        return isinstance(value, str) and bool(value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind  # not isinstance: a boolean is not a number


def _read_families(folder: Path) -> dict[str, Any]:
    """Return a cache folder's stored caching commands by model family; {} if the file is unreadable."""
    try:
        content = parse_json(read_text(folder / NAME, MAX_BYTES))
    except (OSError, ValueError):
        return {}
    families = content.get("families") if isinstance(content, dict) else None
    if not isinstance(families, dict) or content.get("version") != VERSION:
        return {}
    return {name: commands for name, commands in families.items() if isinstance(commands, dict)}

"""List what a run.toml allows its run to do, for review before the start: somebody else may have written it.

`run` itself rejects what is marked as rejected here (see `modules/run_limits.py`); the list only says so
earlier.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser.folders.described_folder import DATASET_FILE, TRAINING_TABLE, reject_share
from modules.command import quote_command
from modules.options import CONFIGURES, SENDS
from modules.pages.language import say
from modules.paths import expand_path
from modules.run_limits import ALLOWED_BY, OTHER_FOLDERS_OPTION
from modules.text_files import parse_toml, read_content, real_path
from project.options import RUN_FILE
from project.run_options import STARTING, TRAINING_ROWS
from training.config_options import OUR_NETWORKS, PROJECT_TABLE

CODE_OPTIONS = ("network_module",)  # options that load code
NOT_STARTED = "`run` refuses it: --%(option)s is only taken if it is typed"
CACHES = "cache_directory"  # suffix of dataset keys for cache folders
MAX_PERMISSIONS = 100
MAX_SHOWN = 64 << 10  # bytes of a file


@dataclass(frozen=True)
class Permission:
    """An action that a run.toml allows its run, such as sending data, with a note for the user."""

    text: str
    note: str = ""  # why it is rejected or unusual
    is_unusual: bool = False  # `new` never writes this


def read_permissions(folder: Path) -> list[Permission]:
    """List the actions that a folder's run.toml permits; actions that `new` never writes come first.

    At most MAX_PERMISSIONS actions are listed; a last entry counts the remaining ones.

    Raises:
        OSError: If run.toml cannot be read.
        ValueError: If run.toml is not TOML.
    """
    tables = parse_toml(read_content(folder / RUN_FILE).decode())
    permissions = [
        *_list_writing(folder, tables),
        *_list_caches(folder),
        *_list_sending(tables),
        *_list_code(tables),
        *_list_starting(tables),
        *_list_commands(tables),
    ]
    permissions.sort(key=lambda permission: not permission.is_unusual)
    unlisted = permissions[MAX_PERMISSIONS:]
    if not unlisted:
        return permissions
    num_unusual = sum(permission.is_unusual for permission in unlisted)
    text = say(
        "and %(n)s more that are not listed, %(num_unusual)s of them unusual: read the files",
        n=f"{len(unlisted):,}",
        num_unusual=f"{num_unusual:,}",
    )
    return [*permissions[:MAX_PERMISSIONS], Permission(text, is_unusual=num_unusual > 0)]


def read_shown_text(path: Path) -> str:
    """Return the text of a file for reading; only its first part if it is long.

    Raises OSError if it cannot be read.
    """
    content = read_content(path)
    text = content[:MAX_SHOWN].decode("utf-8", "replace")
    return text if len(content) <= MAX_SHOWN else f"{text}\n… and {len(content) - MAX_SHOWN:,} bytes"


def _get_table(tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = tables.get(name)
    return table if isinstance(table, dict) else {}


def _describe_target(folder: Path, option: str, text: str) -> Permission:
    """Return a line that says where an option writes, marked as unusual if that is outside `folder`."""
    try:
        reject_share(text, folder)
        target = real_path(expand_path(text, folder))
    except ValueError as error:
        return Permission(f"--{option} {text}: {error}", is_unusual=True)
    text = say("writes into %(place)s", place=target)
    if target.is_relative_to(folder):
        return Permission(text)
    note = say(
        "outside of %(folder)s: `run` refuses it unless --%(allowing)s is typed",
        folder=folder,
        allowing=ALLOWED_BY.get(option, OTHER_FOLDERS_OPTION),  # option that allows this target
    )
    return Permission(text, note=note, is_unusual=True)


def _list_writing(folder: Path, tables: Mapping[str, Any]) -> Iterator[Permission]:
    values = _get_table(tables, TRAINING_TABLE)
    for option, row in TRAINING_ROWS.items():
        if option in values and row.get("facts", {}).get("place") == "new folder":
            yield _describe_target(folder, option, str(values[option]))


def _list_caches(folder: Path) -> Iterator[Permission]:
    """Yield the folders into which a dataset's caches are written."""
    try:
        dataset = parse_toml(read_content(folder / DATASET_FILE).decode())
    except (OSError, ValueError) as error:
        yield Permission(f"{folder / DATASET_FILE} cannot be read: {error}", is_unusual=True)
        return
    tables = [dataset.get("general"), *_as_list(dataset.get("datasets"))]
    for table in tables:
        if isinstance(table, dict):
            for name, value in table.items():
                if name.endswith(CACHES):
                    yield _describe_target(folder, name, str(value))


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _list_sending(tables: Mapping[str, Any]) -> Iterator[Permission]:
    values = _get_table(tables, TRAINING_TABLE)
    for option, row in TRAINING_ROWS.items():
        value = values.get(option)
        if value and row.get("reach") in (SENDS["reach"], CONFIGURES["reach"]):
            is_local = value in row.get("stays", ())  # nothing leaves this machine
            note = "" if is_local else say("`run` refuses it unless --%(option)s is typed", option=option)
            text = row["noted"]["permission"].format(value)
            yield Permission(text, note=note, is_unusual=not is_local)


def _list_code(tables: Mapping[str, Any]) -> Iterator[Permission]:
    values = _get_table(tables, TRAINING_TABLE)
    for option in CODE_OPTIONS:
        name = str(values.get(option, ""))
        if name and not name.startswith(OUR_NETWORKS):
            note = say("no code of this program: `run` refuses it")
            yield Permission(say("loads the code %(name)s", name=name), note=note, is_unusual=True)


def _list_starting(tables: Mapping[str, Any]) -> Iterator[Permission]:
    values = _get_table(tables, TRAINING_TABLE)
    for option in STARTING:
        if values.get(option) is not None:
            yield Permission(
                say("starts %(values)s", values=values[option]),
                note=say(NOT_STARTED, option=option),
                is_unusual=True,
            )


def _list_commands(tables: Mapping[str, Any]) -> Iterator[Permission]:
    commands = _as_list(_get_table(tables, PROJECT_TABLE).get("commands"))
    for number, words in enumerate(commands):
        texts = [str(word) for word in _as_list(words)]
        text = f"{'downloads with' if number == 0 else 'runs'} {quote_command(texts)}"
        flags = [word.partition("=")[0] for word in texts]
        typed = [flag for flag in flags if len(flag) > len("--x")]  # ignore one-letter names
        starting = [option for option in STARTING if any(f"--{option}".startswith(flag) for flag in typed)]
        note = say(NOT_STARTED, option=starting[0]) if starting else ""
        yield Permission(text, note=note, is_unusual=bool(starting))

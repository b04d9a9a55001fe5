"""Read a dataset configuration's file and the keys of its tables, and explain wrong ones.

Standard library only.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dataset.config_keys import MODES, NO_KEYS, SubsetKey, TableKey, Unfit
from modules.command import as_typed, did_you_mean
from modules.errors import DatasetError
from modules.installation import import_own
from modules.paths import NOTHING, explain_missing, hide_secrets
from modules.text_encodings import guess_encoding
from modules.text_files import parse_json, parse_toml, read_text

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a table",
}


BAD = object()  # marks a value that has been reported


def parse_config(path: Path) -> dict[str, Any]:
    """Return the content of a .toml or .json file. Raises DatasetError if it cannot be read or parsed."""
    if path.is_dir():
        there, makes = path / "dataset.toml", as_typed(["python", "new_project.py", str(path)])
        give = f"Give {there}" if there.is_file() else f"Give a .toml or .json file: {makes} makes one"
        raise DatasetError(f"{path} is a folder. {give}")
    if path.suffix.lower() not in {".toml", ".json"}:
        hint = other_trainers().of_suffix(path.suffix)
        raise DatasetError(
            f"{path}: a dataset configuration ends in .toml or .json, this ends in "
            f"{path.suffix or 'nothing'}{hint}"
        )
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        guess = guess_encoding(error.object)
        seems = "" if guess is None else f"; it looks like {guess.name}"
        raise DatasetError(
            f"{path} is not UTF-8 text (byte {error.start}{seems}). Save it as UTF-8 in your editor."
        ) from None
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read: {error.strerror}.{explain_missing(path)} Give --dataset_config the "
            "file's path."
        ) from error
    try:
        content = parse_toml(text) if path.suffix.lower() == ".toml" else parse_json(text, no_repeats=True)
    except ValueError as error:  # both parsers' errors are ValueErrors with line and column
        raise DatasetError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(content, dict):
        other_trainers().refuse(path, content)
        raise DatasetError(f'{path}: the top level must be an object with "datasets"')
    return content


def other_trainers() -> Any:
    """Return the module that knows files of other trainers, which only mistakes need."""
    return import_own("dataset.other_trainers")


def without_nulls(table: Any, name: str, problems: list[str]) -> dict[str, Any]:
    """Return a table without the keys whose value is null, which JSON has; {} if it is no table."""
    if isinstance(table, dict):
        return {key: value for key, value in table.items() if value is not None}
    if table is not None:
        is_doubled = name == "[general]" and isinstance(table, list)
        problems.append(
            "[[general]] needs one pair of brackets: write [general]"
            if is_doubled
            else f"{name} = {show(table)} is not a table of keys"
        )
    return {}


def read_keys(
    keys: Mapping[str, TableKey] | Mapping[str, SubsetKey],
    table: Mapping[str, Any],
    where: str,
    problems: list[str],
    misplaced: Mapping[str, str],
    names: Mapping[str, str] | None = None,
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the values of the keys in a table, by the keys' own names; BAD for one that is not allowed.

    Each mistake adds a line to `problems`.

    misplaced: keys that cannot stand in this table, and why, which is said behind the value. names: other
    names of keys. more: keys that are read elsewhere.
    """
    values: dict[str, Any] = {}
    spelt: dict[str, str] = {}  # the name that each key has in the table
    for name, value in table.items():
        real = (names or {}).get(name, name)
        if name in more:
            continue
        if real not in keys:
            allowed = [one for one in keys if one not in misplaced]
            problems.append(f"{where}: {unknown(name, value, [*more, *allowed])}")
        elif real in misplaced:
            problems.append(f"{where}: {name} = {show(value)} {misplaced[real]}")
        elif spelt.setdefault(real, name) != name:
            both = " and ".join(sorted((spelt[real], name), key=real.__eq__))  # its own name last
            problems.append(f"{where}: {both} are the same key; leave out one")
        else:
            try:
                values[real] = keys[real].form.read(value)
            except Unfit as unfit:
                values[real] = BAD
                problems.append(f"{where}: {_explain(real, value, keys[real].form.allowed, str(unfit))}")
    return values


def _explain(name: str, value: Any, allowed: str, why: str) -> str:
    hint = f"; but {why}" if why else ""
    if not why and name == "frame_extraction" and isinstance(value, str):
        near = difflib.get_close_matches(value, MODES, 1)
        hint = f'. Did you mean "{near[0]}"?' if near else ""
    if not hint and str(value).strip().lower() in NOTHING:
        hint = ". For nothing, leave the key out"
    kind = KINDS.get(type(value), type(value).__name__)
    return f"{name} = {show(value)} ({kind}); allowed: {allowed}{hint}"


def unknown(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return the line that reports an unknown key, with the nearest known one, or why it is not supported."""
    if name in NO_KEYS:
        return f"{name} = {show(value)} is not supported: {NO_KEYS[name]}. Leave it out"
    allowed = list(allowed)
    return f"unknown key {name} = {show(value)}.{did_you_mean(name, allowed)} Allowed: {', '.join(allowed)}"


def show(value: Any) -> str:
    """Return a value as a line reports it: short, without passwords."""
    text = hide_secrets(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else text[:77] + "..."

"""Read the keys of a dataset configuration, and explain wrong ones. Standard library only."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dataset.config_keys import MODES, Unfit
from modules.errors import DatasetError
from modules.paths import NOTHING, explain_missing, hide_secrets
from modules.text_encodings import guess_encoding
from modules.text_files import parse_json, parse_toml, read_text


class Key(Protocol):
    """Facts about a key for reading its value."""

    @property
    def read(self) -> Callable[[Any], Any]: ...
    @property
    def allowed(self) -> str: ...


def parse_config(path: Path) -> dict[str, Any]:
    """Return the content of a .toml or .json file. Raises DatasetError if it cannot be read or parsed."""
    if path.is_dir():
        raise DatasetError(f"{path} is a folder. Give the .toml or .json file that describes the data sets.")
    if path.suffix.lower() not in {".toml", ".json"}:
        raise DatasetError(
            f"{path}: a dataset configuration ends in .toml or .json, this ends in {path.suffix or 'nothing'}"
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
        content = parse_toml(text) if path.suffix.lower() == ".toml" else parse_json(text, no_repeats)
    except ValueError as error:  # both parsers' errors are ValueErrors with line and column
        raise DatasetError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(content, dict):
        raise DatasetError(f'{path}: the top level must be an object with "datasets"')
    return content


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"key {next(name for name in names if names.count(name) > 1)!r} occurs twice in one object"
        )
    return content


def without_nulls(table: Any, name: str, problems: list[str]) -> dict[str, Any]:
    """Return a table without the keys whose value is null, which JSON has; {} if it is no table."""
    if table is None:
        return {}
    if not isinstance(table, dict):
        is_doubled = name == "[general]" and isinstance(table, list)
        problems.append(
            "[[general]] needs one pair of brackets: write [general]"
            if is_doubled
            else f"{name} = {show(table)} is not a table of keys"
        )
        return {}
    return {key: value for key, value in table.items() if value is not None}


BAD = object()  # marks a value that has been reported


def read_value(keys: Mapping[str, Key], name: str, value: Any, where: str, problems: list[str]) -> Any:
    """Return the value of a key as its field has it; BAD, with a line in `problems`, if it is not allowed."""
    key = keys[name]
    try:
        return key.read(value)
    except Unfit as unfit:
        near = (
            difflib.get_close_matches(value, MODES, 1)
            if name == "frame_extraction" and isinstance(value, str)
            else []
        )
        hint = f'. Did you mean "{near[0]}"?' if near else ""
        hint = f"; but {unfit}" if str(unfit) else hint
        if not hint and str(value).strip().lower() in NOTHING:
            hint = ". For nothing, leave the key out"
        problems.append(f"{where}: {name} = {show(value)} ({kind_of(value)}); allowed: {key.allowed}{hint}")
        return BAD


def unknown(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return the line that reports an unknown key, with the nearest known one."""
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown key {name} = {show(value)}.{hint} Allowed: {', '.join(allowed)}"


def show(value: Any) -> str:
    """Return a value as a line reports it: short, without passwords."""
    text = hide_secrets(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else text[:77] + "..."


def kind_of(value: Any) -> str:
    """Return the type of a value in words."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a table",
    }
    return names.get(type(value), type(value).__name__)

"""Read the options of every script from one file, which `make tables` compiles from the records of options.

A table contains a script's complete parser (modules/table_parser.py). Standard library only.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

TABLES = Path(__file__).with_name("option_tables.txt")  # one entry per line: kind, name, tab, JSON


@cache
def _read_lines() -> Mapping[str, str]:
    """Return the JSON text of each table entry by kind and name; only entries in use are parsed."""
    lines = TABLES.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return dict(line.split("\t", 1) for line in lines)


def read_entry(kind: str, name: str) -> Any:
    """Return an entry of the compiled option tables; `kind` is "option", "section", "keys" or "script"."""
    return json.loads(_read_lines()[f"{kind} {name}"])


@cache
def list_option_names() -> tuple[str, ...]:
    """Return the option names of all scripts, sorted, with _ instead of -."""
    rows = [json.loads(text) for key, text in _read_lines().items() if key.startswith("option ")]
    flags = (flag for row in rows for flag in row["flags"])
    return tuple(sorted({flag[2:].replace("-", "_") for flag in flags if flag[:2] == "--"}))


def find_table(script: Path | None) -> Mapping[str, Any] | None:
    """Return the compiled option table of a script; None if there is none.

    Args:
        script: Its path in the checkout or the package.
    """
    if script is None:
        return None
    name = script.with_suffix("").as_posix()
    return read_entry("script", name) if f"script {name}" in _read_lines() else None

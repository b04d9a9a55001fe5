"""Read the options of a script from its table, which `make tables` compiles from the records of options.

A table contains a script's complete parser (modules/table_parser.py). Standard library only.
"""

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

TABLES = Path(__file__).with_suffix("")  # folder with a JSON file per script, at the script's place
NAMES = "names.txt"  # names of the options of all scripts, one per line, with _ instead of -


@cache
def list_option_names() -> tuple[str, ...]:
    """Return the option names of all scripts, sorted, with _ instead of -."""
    return tuple((TABLES / NAMES).read_text(encoding="utf-8").split())


def find_table(script: Path | None) -> Mapping[str, Any] | None:
    """Return the compiled option table of a script; None if there is none.

    Args:
        script: Its path in the checkout or the package.
    """
    if script is None:
        return None
    try:
        text = (TABLES / script.with_suffix(".json")).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def list_rows(script: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the rows of a script's table by the name of their option's argument, in the order of --help.

    Args:
        script: Its path in the checkout or the package, such as tools/mask.py.
    """
    table = find_table(Path(script))
    if table is None:
        return {}
    return {find_argument_name(row): row for section in table["sections"] for row in section["options"]}


def find_argument_name(row: Mapping[str, Any]) -> str:
    """Return the argument name of a row's option: its own, or that of its last flag; "" without either."""
    flags = row["flags"]
    last = flags[-1].removeprefix("--").replace("-", "_") if flags else ""
    return row.get("dest") or last


def find_compile_time() -> float:
    """Return when a table was last written, in seconds since 1970; an update writes those that differ."""
    with os.scandir(TABLES) as entries:
        return max(entry.stat().st_mtime for entry in entries)

"""Compile the tables of options from the records of all scripts: make tables"""

import argparse
import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import modules.interpreter  # noqa: F401  # here, as it would answer for the scripts that are compiled
from modules import option_tables
from modules.parser import Parser
from modules.table_parser import describe_parser
from tests.test_imports import SCRIPTS, TOOLS

ROOT = Path(__file__).resolve().parent.parent


class _ParserFound(BaseException):
    def __init__(self, parser: Parser, words: Any) -> None:
        self.parser = parser
        self.words = words  # that it was to parse; None: those of the command line


def _catch(parser: Parser, words: Any = None, namespace: Any = None) -> None:
    raise _ParserFound(parser, words)


@contextmanager
def _catching(script: str) -> Iterator[None]:
    with (
        patch.object(argparse.ArgumentParser, "parse_args", _catch),
        patch.object(argparse.ArgumentParser, "parse_known_args", _catch),
        patch.object(Parser, "parse_args", _catch),
        patch.object(sys, "argv", [script]),
    ):
        yield


def _find_parser(script: str) -> _ParserFound:
    with _catching(script):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except _ParserFound as found:
            return found
    raise AssertionError(f"{script} has no parser")


def catch_parser(script: str) -> Parser:
    """Return the parser that a script builds of its records. script: its path, such as tools/mask.py."""
    return _find_parser(script).parser


def compile_script(script: str) -> dict[str, Any]:
    """Return the table of a script, made of its records."""
    found = _find_parser(script)
    table = describe_parser(found.parser)
    if found.words is not None:
        table["cuts_words"] = True  # it parses only some of the words of its command line
    return table


class _Names:
    """Give equal values one name, and others of the same name a number behind it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._names: dict[str, str] = {}  # text of a value -> its name

    def name(self, wanted: str, value: Any) -> str:
        text = f"{wanted} {json.dumps(value, sort_keys=True)}"
        if text not in self._names:
            count = 1
            while (name := wanted if count == 1 else f"{wanted} {count}") in self.values:
                count += 1
            self._names[text] = name
            self.values[name] = value
        return self._names[text]


def _name_option(row: dict[str, Any]) -> str:
    return str(row.get("dest") or row["flags"][-1].lstrip("-"))


def compile_tables() -> str:
    """Return the file of all tables: a line for each option, each section and each script."""
    options, sections = _Names(), _Names()
    scripts: dict[str, Any] = {}
    key_files: dict[str, Any] = {}
    for script in sorted([*SCRIPTS, *TOOLS]):
        table = compile_script(script)
        names = []
        for section in table.get("sections", ()):
            rows = [options.name(_name_option(row), row) for row in section["options"]]
            names.append(sections.name(section["title"], {"title": section["title"], "options": rows}))
        key_files |= table.get("key_files", {})
        scripts[script.removesuffix(".py")] = {**table, "sections": names}
        if "key_files" in table:
            scripts[script.removesuffix(".py")]["key_files"] = list(table["key_files"])
    kinds = {"option": options.values, "section": sections.values, "keys": key_files, "script": scripts}
    return "".join(
        f"{kind} {name}\t{json.dumps(values[name], ensure_ascii=False)}\n"
        for kind, values in kinds.items()
        for name in sorted(values)
    )


def _list_translations() -> Iterator[str]:
    """Yield what the translations of helps lack and have too many, after the tables are written."""
    from tests.browser.page_texts import list_helps  # it reads the tables

    helps = set(list_helps())
    for path in sorted((ROOT / "browser" / "languages").glob("helps_*.json")):
        translated = set(json.loads(path.read_text(encoding="utf-8")))
        yield from (f"{path.name} lacks: {json.dumps(text)}" for text in sorted(helps - translated))
        yield from (f"{path.name} has, unused: {json.dumps(text)}" for text in sorted(translated - helps))


if __name__ == "__main__":
    option_tables.TABLES.write_text(compile_tables(), encoding="utf-8", newline="\n")
    sys.stdout.writelines(f"{line}\n" for line in _list_translations())

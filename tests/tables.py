"""Compile the tables of options from the records of all scripts: make tables"""

import argparse
import json
import runpy
import sys
from collections.abc import Callable, Iterator
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


def list_table_files(written: Callable[[str, str], None] | None = None) -> dict[str, str]:
    """Return the text of each file of the tables by its place: one file per script, and the names of all.

    Args:
        written: Is called with the place and text of each file as soon as it is known.
    """
    texts: dict[str, str] = {}
    tables = {}
    # `run` is last, because its options follow from the table of a training
    for script in sorted([*SCRIPTS, *TOOLS], key=lambda script: (script == "run_project.py", script)):
        tables[script] = compile_script(script)
        place = f"{script.removesuffix('.py')}.json"
        texts[place] = _write_table(tables[script])
        if written:
            written(place, texts[place])
    sections = [section for table in tables.values() for section in table.get("sections", ())]
    flags = {flag for section in sections for option in section["options"] for flag in option["flags"]}
    names = sorted({flag[2:].replace("-", "_") for flag in flags if flag[:2] == "--"})
    return texts | {option_tables.NAMES: "".join(f"{name}\n" for name in names)}


def _write_table(table: dict[str, Any]) -> str:
    """Return the JSON text of a table with one line per option, by which versions are merged."""
    sections = []
    for section in table.get("sections", ()):
        rows = ",\n".join(_to_json(row) for row in section["options"])
        sections.append(f'{{"title": {_to_json(section["title"])}, "options": [\n{rows}\n]}}')
    lines = [f"{_to_json(name)}: {_to_json(value)}" for name, value in table.items() if name != "sections"]
    section_lines = ",\n".join(sections)
    text = ",\n".join((*lines, f'"sections": [\n{section_lines}\n]'))
    return f"{{\n{text}\n}}\n"


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def write_tables() -> None:
    """Write all files of the tables, and delete those of scripts that are gone."""
    texts = list_table_files(_write_file)
    option_tables.TABLES.with_suffix(".txt").unlink(missing_ok=True)  # a merge may restore the former file
    for path in [*option_tables.TABLES.rglob("*.*")]:
        if path.relative_to(option_tables.TABLES).as_posix() not in texts:
            path.unlink()
    _write_file(option_tables.NAMES, texts[option_tables.NAMES])


def _write_file(place: str, text: str) -> None:
    path = option_tables.TABLES / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _list_translations() -> Iterator[str]:
    """Yield what the translations of helps lack and have too many, after the tables are written."""
    from tests.browser.page_texts import list_helps  # it reads the tables

    helps = set(list_helps())
    for path in sorted((ROOT / "browser").rglob("helps_*.json")):
        translated = set(json.loads(path.read_text(encoding="utf-8")))
        yield from (f"{path.name} lacks: {json.dumps(text)}" for text in sorted(helps - translated))
        yield from (f"{path.name} has, unused: {json.dumps(text)}" for text in sorted(translated - helps))


if __name__ == "__main__":
    write_tables()
    sys.stdout.writelines(f"{line}\n" for line in _list_translations())

"""The tables of options: equal to the records, and what scripts answer from them before they are imported."""

import argparse
import json
import multiprocessing.process
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from modules import option_tables, table_answers
from modules.errors import OptionError, UserError
from modules.installation import find_script
from modules.option_tables import TABLES, find_table
from modules.options import TYPED, Options, option, read_options
from modules.parser import Parser, add_options
from modules.run_limits import limit_run
from modules.table_answers import CommandLine
from modules.table_parser import build_parser, check_arguments, describe_parser
from tests.commands import ROOT, assert_user_error, run_python
from tests.tables import catch_parser, list_table_files
from tests.test_command_line import parser_of
from tests.test_imports import SCRIPTS, TOOLS

# of each kind of script one
SAMPLES = (
    "wan_train_network.py",
    "flux_train_network.py",
    "wan_generate_video.py",
    "tools/mask.py",
    "gen_img.py",
)
EVERY = [
    pytest.param(script, marks=[] if script in SAMPLES else [pytest.mark.slow])
    for script in (*SCRIPTS, *TOOLS)
]
# runs a script with words and prints what it has imported by the end
IMPORTED = """
import runpy, sys
from modules import table_answers
table_answers._reject_outdated_tables = lambda: None  # whatever the times of the files here
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("IMPORTED", *(name for name in sys.modules if name.split(".")[0] in {"training", "wan", "torch"}))
"""


def test_the_tables_are_those_of_the_records() -> None:
    files = (path for path in TABLES.rglob("*") if path.is_file())
    there = {path.relative_to(TABLES).as_posix(): path.read_text(encoding="utf-8") for path in files}
    assert there == list_table_files(), "make tables compiles them again"


@pytest.mark.parametrize("script", EVERY)
def test_the_parser_of_a_table_has_the_help_of_the_records(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_records = parser_of(script, monkeypatch)
    table = find_table(find_script(script))
    assert table is not None
    of_table = build_parser(table, of_records.prog)
    assert of_table.format_help() == of_records.format_help()
    assert of_table.format_short_help() == of_records.format_short_help()  # type: ignore[attr-defined]
    assert [action.dest for action in of_table._actions] == [action.dest for action in of_records._actions]


def _select_word(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return a word that an option takes."""
    words = ["1", "0.5", "50%", "text", "12GB", "on", "auto"]
    if action.choices is not None:
        words = [str(choice) for choice in action.choices if choice not in getattr(action, "refused", {})]
    for word in words:
        try:
            parser._get_value(action, word)
        except (argparse.ArgumentError, UserError):
            continue
        return word
    raise AssertionError(f"no word for {action.option_strings or action.dest}")


def _type_every_option(parser: argparse.ArgumentParser, only_required: bool = False) -> list[str]:
    """Return words that give a value to every option, which are parsed and not checked."""
    words, placed = [], []
    for action in parser._actions:
        is_needed = action.required or not action.option_strings
        if action.dest == "help" or (only_required and not is_needed):
            continue
        count = action.nargs if isinstance(action.nargs, int) else 1
        values = [_select_word(parser, action)] * count if count else []
        if action.option_strings:
            words += [action.option_strings[-1], *values]
        else:
            placed += values
    return [*words, "--", *placed] if placed else words


def _list_values(parser: argparse.ArgumentParser, words: list[str], shared: frozenset[str]) -> dict[str, str]:
    values = vars(parser.parse_args(words))
    return {name: repr(value) for name, value in values.items() if name in shared}


@pytest.mark.parametrize("script", EVERY)
def test_a_table_has_the_arguments_and_facts_of_the_records(script: str) -> None:
    of_records = catch_parser(script)
    table = find_table(find_script(script))
    assert table is not None
    of_table = build_parser(table, of_records.prog)
    own = {action.dest for action in of_records._actions} | {*of_records.left_out}
    names = frozenset(own - {"help"} | {"typed_names", TYPED})
    for words in (_type_every_option(of_records, True), _type_every_option(of_records)):
        assert _list_values(of_table, words, names) == _list_values(of_records, words, names)
    assert describe_parser(of_table) == json.loads(json.dumps(describe_parser(of_records)))
    assert of_table.changes_values == of_records.changes_values


class PawOptions(Options):
    """Facts of every sort."""

    paws: int = option("how many", default=4, minimum=1, maximum=8, hint="a cat has 4")
    share: float | None = option("of them", above=0, below=1)
    fur: str | None = option("its kind", one_of=("long", "short"))
    claws: bool = option("with claws", needs="paws")
    gloves: bool = option("no claws", excludes=("claws", "boots"))
    boots: str = option("on them", default="none", off=("no",))
    basket: Path | None = option("where it sleeps", place="folder")
    portrait: Path | None = option("to write", place="new file", must_not_replace="toys")
    bed: Path | None = option("or this", place="folder", flags=("--bed", "--sofa"))
    toys: tuple[Path, ...] | None = option("that are there", place="there")
    whiskers: int | None = option("long ones", minimum=1, excludes="fur", hint="12 are usual", why="bald")


@pytest.mark.parametrize(
    "words",
    [
        "--paws 0",
        "--paws 9",
        "--paws 8",
        "--share 0",
        "--share nan",
        "--share 0.5",
        "--fur curly",
        "--fur long",
        "--claws",
        "--claws --paws 4",
        "--claws --paws 3",
        "--gloves --claws --paws 2",
        "--gloves --boots red",
        "--gloves --boots no",
        "--gloves --boots none",
        "--basket nowhere",
        "--basket toy.txt",
        "--basket .",
        "--portrait toy.txt --toys toy.txt",
        "--portrait new.txt --toys toy.txt",
        "--toys toy.txt nothing.txt",
        "--basket=",
        "--sofa nowhere",
        "--whiskers 0",
        "--whiskers 12 --fur long",
        "--bed none",
    ],
)
def test_a_table_refuses_the_values_that_a_record_refuses_with_the_same_words(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.txt").touch()
    of_records = Parser(description="Cats.")
    add_options(of_records, PawOptions)
    of_table = build_parser(json.loads(json.dumps(describe_parser(of_records))))

    def read_record() -> None:
        read_options(PawOptions, of_records.parse_args(words.split()))

    def read_table() -> None:
        check_arguments(of_table, of_table.parse_args(words.split()))

    assert _find_error(read_table) == _find_error(read_record)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"whiskers": 0}, "--whiskers 0: use a number of at least 1 (12 are usual)"),
        (
            {"whiskers": 12, "fur": "long"},
            "--whiskers and --fur exclude each other: pass one of them (bald)",
        ),
    ],
)
def test_the_reason_of_a_relation_is_no_advice_on_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        PawOptions(**values)


def _find_error(read: Callable[[], None]) -> str:
    try:
        read()
    except OptionError as error:
        return str(error)
    return ""


def test_what_a_file_or_another_option_may_give_is_not_missed_in_the_words() -> None:
    """--config_file may have the option that another one needs, and the record sees it."""
    done = run_python("-c", IMPORTED, ROOT / "wan_train_network.py", "--save_last_n_steps", "2", check=False)
    assert "--save_last_n_steps needs" not in done.stderr
    both = ["--save_every_n_epochs", "2", "--save_n_epoch_ratio", "2"]
    done = run_python("-c", IMPORTED, ROOT / "wan_train_network.py", *both, check=False)
    assert_user_error(done, "exclude each other")
    assert done.stdout.splitlines()[-1] == "IMPORTED"


def test_a_limit_is_an_error_of_the_table() -> None:
    done = run_python("-c", IMPORTED, ROOT / "wan_train_network.py", "--network_dim", "0", check=False)
    assert_user_error(done, "--network_dim 0: use a number of at least 1")
    assert done.stdout.splitlines()[-1] == "IMPORTED"


def test_a_folder_of_somebody_else_is_not_told_which_files_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limited run is refused a place outside before its table looks whether something is there."""
    parser = Parser(description="Cats.")
    add_options(parser, PawOptions)
    arguments = parser.parse_args(["--basket", str(tmp_path / "nowhere")])
    for action in parser._actions:
        action.facts = {**getattr(action, "facts", {})}  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="no such folder"):
        check_arguments(parser, arguments)
    with limit_run([tmp_path]):
        check_arguments(parser, arguments)


def test_a_command_line_is_parsed_once() -> None:
    """The script takes the arguments that its table has read: no record is put into a parser."""
    code = """
import runpy, sys
from modules import parser, table_answers
table_answers._reject_outdated_tables = lambda: None
table_answers._are_records_newer = lambda: False
parse = parser.Parser.parse_args
parser.Parser.parse_args = lambda self, *args: print("PARSED") or parse(self, *args)
parser.add_options = lambda *args, **settings: print("BUILT")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    words = ["--dataset_config", "none.toml", "--output_dir", "made", "--dit", "none"]
    done = run_python("-c", code, ROOT / "wan_train_network.py", *words, check=False)
    assert "--output_name is missing" in done.stderr
    assert done.stdout.split() == ["PARSED"]


def test_a_worker_of_a_script_does_not_check_its_words_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is spawned imports the script, when a file that was named may be gone."""
    monkeypatch.setattr("sys.argv", [str(ROOT / "tools/mask.py"), "no such folder"])
    monkeypatch.setattr(table_answers, "_reject_outdated_tables", lambda: None)
    with pytest.raises(SystemExit):
        table_answers.answer_running_script()
    monkeypatch.setattr(multiprocessing.process, "parent_process", lambda: "the script")
    table_answers.answer_running_script()


def test_an_argument_waits_for_its_script_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["tools/mask.py", "clips"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(table_answers, "_are_records_newer", lambda: False)
    command = CommandLine(Parser(), argparse.Namespace())
    monkeypatch.setattr(table_answers, "_parsed_lines", {tuple(words): command})
    assert table_answers.take_parsed_line() is command
    assert table_answers.take_parsed_line() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--help"], "usage: wan_train_network.py [options]"),
        (["--network_dmi", "8"], "Unknown option --network_dmi. Did you mean --network_dim?"),
        (
            ["--network_dim", "many"],
            "argument --network_dim: many is not a whole number.",
        ),
        (["--rank", "8"], "Unknown option --rank. Did you mean --network_dim?"),
        (["--batch_size", "2"], "Unknown option --batch_size. It is a key of the dataset file"),
    ],
)
def test_a_script_answers_from_its_table_before_its_modules_are_imported(
    words: list[str], message: str
) -> None:
    done = run_python("-c", IMPORTED, ROOT / "wan_train_network.py", *words, check=False)
    assert message in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "IMPORTED"
    assert done.returncode == (0 if words == ["--help"] else 2)


def test_an_option_that_is_refused_is_an_error_of_the_table_too() -> None:
    done = run_python("-c", IMPORTED, ROOT / "flux_train_network.py", "--min_snr_gamma", "5", check=False)
    assert_user_error(done, "--min_snr_gamma is refused: ")
    assert done.stdout.splitlines()[-1] == "IMPORTED"


def test_words_that_the_table_takes_are_left_to_the_script(tmp_path: Path) -> None:
    done = run_python(ROOT / "wan_train_network.py", "--dataset_config", tmp_path / "none.toml", check=False)
    assert_user_error(done, "--output_dir is missing")


def test_a_file_newer_than_the_tables_has_the_script_itself_answer(tmp_path: Path) -> None:
    """While an option is added, its script knows it before the tables do."""
    copy = tmp_path / "checkout"
    room = copy / "training"
    room.mkdir(parents=True)
    for name in ("__init__.py", "options.py"):
        shutil.copy(ROOT / "training" / name, room / name)
    tables = copy / "tables"
    tables.mkdir()
    for name in ("wan_train_network.json", option_tables.NAMES):
        os.utime(shutil.copy(TABLES / name, tables), (10, 10))
    os.utime(room / "__init__.py", (1, 1))
    with patch.object(table_answers, "ROOT", copy), patch.object(option_tables, "TABLES", tables):
        os.utime(room / "options.py", (1, 1))
        with pytest.raises(SystemExit):
            table_answers.answer_script(Path("wan_train_network.py"), ["--new_option"])
        os.utime(room / "options.py", (2**32, 2**32))
        table_answers.answer_script(Path("wan_train_network.py"), ["--new_option"])


def test_a_program_that_only_has_the_name_of_a_script_is_none_of_ours(tmp_path: Path) -> None:
    assert table_answers._find_running_script(str(tmp_path / "wan_train_network.py")) is None
    assert table_answers._find_running_script(str(ROOT / "tools/mask.py")) == Path("tools/mask.py")
    assert table_answers._find_running_script("-c") is None

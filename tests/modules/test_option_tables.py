"""The tables of options: equal to the records, and what scripts answer from them before they are imported."""

import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from modules import table_answers
from modules.installation import find_script
from modules.option_tables import TABLES, find_table
from modules.table_parser import build_parser
from tests.commands import ROOT, assert_user_error, run_python
from tests.tables import compile_tables
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
table_answers._are_outdated = lambda: False  # whatever the times of the files here
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("IMPORTED", *(name for name in sys.modules if name.split(".")[0] in {"training", "wan", "torch"}))
"""


@pytest.mark.long
def test_the_tables_are_those_of_the_records() -> None:
    assert TABLES.read_text(encoding="utf-8") == compile_tables(), "make tables compiles them again"


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
    tables = copy / TABLES.name
    tables.touch()
    os.utime(room / "__init__.py", (1, 1))
    with patch.multiple(table_answers, ROOT=copy, TABLES=tables):
        os.utime(room / "options.py", (1, 1))
        with pytest.raises(SystemExit):
            table_answers.answer_script(Path("wan_train_network.py"), ["--new_option"])
        os.utime(room / "options.py", (2**32, 2**32))
        table_answers.answer_script(Path("wan_train_network.py"), ["--new_option"])


def test_a_program_that_only_has_the_name_of_a_script_is_none_of_ours(tmp_path: Path) -> None:
    assert table_answers._find_running_script(str(tmp_path / "wan_train_network.py")) is None
    assert table_answers._find_running_script(str(ROOT / "tools/mask.py")) == Path("tools/mask.py")
    assert table_answers._find_running_script("-c") is None

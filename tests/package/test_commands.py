"""The words of the command `reelsmith`."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from package.reelsmith import commands
from package.reelsmith.commands import OF_A_CHECKOUT, ScriptCommand, find_commands, name_words
from package.staging import add_entry_point, find_rooms, rename_scripts, rewrite_imports
from tests.commands import ROOT, assert_user_error, run_script
from tests.test_imports import SCRIPTS, TOOLS

FOUND = [
    ScriptCommand(tuple(name_words(name).split()), ROOT / f"{name}.py")
    for name in ("wan_cache_latents", "merge_lora", "hv_train_network", "wan_train_network")
]
MEANT = "Did you mean python reelsmith.py train wan?"


def test_every_script_of_the_checkout_is_a_command() -> None:
    found = sorted(command.path.relative_to(ROOT).as_posix() for command in find_commands(ROOT))
    in_rooms = {Path(tool).name for tool in TOOLS}
    assert found == sorted([*(script for script in SCRIPTS if script not in in_rooms), *TOOLS])
    assert all((ROOT / f"{name}.py").is_file() for name in OF_A_CHECKOUT)


def test_each_command_has_its_own_words_and_none_hides_another() -> None:
    words = [command.words for command in find_commands(ROOT)]
    for one in words:
        assert [other for other in words if other[: len(one)] == one] == [one]


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("train", "train: which one? train hv, train wan"),
        ("train wn --task x", f"'train wn' is no command. {MEANT}"),
        ("wan train", f"'wan train' is no command. {MEANT}"),
        ("mrege", "'mrege' is no command. Did you mean python reelsmith.py merge?"),
        ("./wan_train_network.py --task x", f"'./wan_train_network.py x' is no command. {MEANT}"),
        ("--task", "'--task' is no command."),
        ("teapot --help", "'teapot' is no command."),
    ],
)
def test_other_words_are_answered_with_what_was_meant(
    typed: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        commands._explain(FOUND, typed.split())
    assert end.value.code == 2
    program = "python reelsmith.py"
    told = f"{program}: error: {answer}\n{program} --help lists all commands\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(("typed", "count"), [("", 4), ("--help", 4), ("train --help", 2), ("cache -h", 1)])
def test_help_lists_the_commands_that_begin_so(
    typed: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    commands._explain(FOUND, typed.split())
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("  ")]) == count


def test_the_door_of_a_checkout_runs_a_script_as_it_is(tmp_path: Path) -> None:
    """The installed command is tested with the wheel."""
    listing = run_script("reelsmith.py", folder=tmp_path).stdout
    for command in find_commands(ROOT):
        assert f"  {' '.join(command.words)}  " in listing
    through = run_script("reelsmith.py", "metaview", "--help", folder=tmp_path)
    assert through.stdout == run_script("blissful_tuner/metaview.py", "--help", folder=tmp_path).stdout
    done = run_script("reelsmith.py", "merge", "--dit", "nothing.safetensors", folder=tmp_path, check=False)
    assert_user_error(done, "merge_lora.py: error: ")


def test_the_pages_name_commands_that_exist() -> None:
    known = {command.words: command.module for command in find_commands(ROOT)}
    named = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in page.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if line.startswith("reelsmith "):
                named.append(words)
                has_command = any(tuple(words[1 : 1 + len(one)]) == one for one in known)
                assert has_command or words[1:] == ["--help"], line
            for module in (word for word in words if re.match(r"reelsmith\.(?!py\b)", word)):
                assert module.removeprefix("reelsmith.") in known.values(), line
    assert len(named) >= 5


OURS = {"modules", "wan", "families", "package"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from modules.errors import UserError", "from reelsmith.modules.errors import UserError"),
        ("from modules import errors", "from reelsmith.modules import errors"),
        ("from package.reelsmith.commands import main", "from reelsmith.commands import main"),
        ("import os, wan.vae as vae", "import os, reelsmith.wan.vae as vae"),
        ("def f():\n    from  wan.vae import Vae", "def f():\n    from  reelsmith.wan.vae import Vae"),
        ("x = 'ä'; from wan import vae", "x = 'ä'; from reelsmith.wan import vae"),
        ("from wan.vae import (\n    A,\n)", "from reelsmith.wan.vae import (\n    A,\n)"),
        ("from wanted import x", "from wanted import x"),
        ("from . import wan", "from . import wan"),
        ("modules = wan = 1  # from wan import vae", "modules = wan = 1  # from wan import vae"),
        ("'from wan import vae'", "'from wan import vae'"),
    ],
)
def test_absolute_imports_of_ours_get_the_prefix_and_nothing_else_changes(before: str, after: str) -> None:
    assert rewrite_imports(before, OURS) == after


def test_an_import_whose_name_would_change_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1: `import wan.vae` binds wan"):
        rewrite_imports("import wan.vae\nwan.vae.load()", OURS)


def test_texts_name_console_commands() -> None:
    scripts = {"cache_latents", "wan_cache_latents"}
    text = 'f("wan_cache_latents.py", x)  # python cache_latents.py, my_cache_latents.py, or wan.py'
    renamed = 'f("wan_cache_latents", x)  # cache_latents, my_cache_latents.py, or wan.py'
    assert rename_scripts(text, scripts) == renamed
    assert rename_scripts("python blissful_tuner/metaview.py --help", {"metaview"}) == "metaview --help"
    launch = "accelerate launch --cpu {}cache_latents --x"
    assert rename_scripts(launch.format("").replace("s --x", "s.py --x"), scripts) == launch.format(
        "-m reelsmith."
    )


def test_a_script_gets_an_entry_point_that_does_what_it_does_as_a_program() -> None:
    script = 'def main(): ...\n\n\nif __name__ == "__main__":\n    command_line(main, explain=identify)\n'
    done = add_entry_point(script, "merge_lora")
    assert "def run() -> None:" in done
    assert done.count("    command_line(main, explain=identify)\n") == 1
    assert done.endswith('    sys.argv[0] = "merge_lora"\n    run()\n')
    with pytest.raises(ValueError, match=r"merge_lora\.py does not end with"):
        add_entry_point("def main(): ...\n", "merge_lora")


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
MODULES = {"scenedetect-headless": "scenedetect"}  # packages whose modules have another name
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"test"}))
def test_an_extra_holds_packages_that_are_imported_and_is_documented(extra: str) -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8") for room in find_rooms(ROOT) for path in (ROOT / room).rglob("*.py")
    )
    for line in EXTRAS[extra]:
        name = Requirement(line).name
        module = MODULES.get(name, name).replace("-", "_")
        assert f'"{module}' in sources or f"import {module}" in sources, name
        assert name in PAGE, name
    assert f"| `{extra}` |" in PAGE

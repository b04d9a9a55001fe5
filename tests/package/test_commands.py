"""The words of the command `reelsmith`."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from modules.command import quote_for_shell
from modules.installation import CHECKOUT_SCRIPTS, find_script
from modules.script_words import console_words, has_own_command, name_words
from package.reelsmith import __all__ as FUNCTIONS
from package.reelsmith import commands
from package.reelsmith.commands import EXCLUDED_SCRIPTS, ScriptCommand, find_commands
from package.staging import add_entry_point, entry_points, find_rooms, rename_scripts, rewrite_imports
from tests.commands import ROOT, assert_user_error, run_script
from tests.test_imports import SCRIPTS, TOOLS

FOUND = [
    ScriptCommand(tuple(name_words(name).split()), ROOT / f"{name}.py")
    for name in ("wan_cache_latents", "merge_lora", "hv_train_network", "wan_train_network")
]
MEANT = "Did you mean python reelsmith.py train wan?"


def test_every_script_of_the_checkout_is_a_command() -> None:
    found = sorted(command.path.relative_to(ROOT).as_posix() for command in find_commands(ROOT))
    tools = [tool for tool in TOOLS if Path(tool) not in EXCLUDED_SCRIPTS]
    in_rooms = {Path(tool).name for tool in tools}
    assert found == sorted([*(script for script in SCRIPTS if script not in in_rooms), *tools])
    merge = next(command for command in find_commands(ROOT) if command.name == "merge")
    assert merge.path == ROOT / "merge_lora.py"  # `networks/merge_lora.py` is another program
    assert all((ROOT / f"{name}.py").is_file() for name in CHECKOUT_SCRIPTS)


def test_the_old_names_of_scripts_in_a_room_do_what_these_do() -> None:
    tools = [tool for tool in TOOLS if Path(tool) not in EXCLUDED_SCRIPTS]
    pairs = [(old, tool) for tool in tools for old in SCRIPTS if Path(tool).name == old]
    assert len(pairs) >= 4
    for old, tool in pairs:
        names = (old, tool.replace("/", "."))
        first, second = (importlib.import_module(name.removesuffix(".py")) for name in names)
        assert first.main is second.main


def test_each_command_has_its_own_words_and_none_hides_another() -> None:
    words = [command.words for command in find_commands(ROOT)]
    for one in words:
        assert [other for other in words if other[: len(one)] == one] == [one]


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("train", "train: which one? train hv, train wan"),
        ("train wn --task x", f"'train wn' is not a command. {MEANT}"),
        ("wan train", f"'wan train' is not a command. {MEANT}"),
        ("mrege", "'mrege' is not a command. Did you mean python reelsmith.py merge?"),
        ("./wan_train_network.py --task x", f"'./wan_train_network.py x' is not a command. {MEANT}"),
        ("--task", "'--task' is not a command."),
        (
            "train pony",
            "'train pony' is not a command. Did you mean python reelsmith.py run FOLDER? "
            "There are train hv, train wan.",
        ),
        ("cache pony", "'cache pony' is not a command. There are cache latents wan."),
        ("cache wan", "'cache wan' is not a command. Did you mean python reelsmith.py cache latents wan?"),
        ("trian photos", "'trian photos' is not a command. Did you mean python reelsmith.py train?"),
        ("version", "'version' is not a command. Did you mean python reelsmith.py --version?"),
        ("resume photos", "'resume photos' is not a command. Did you mean python reelsmith.py run FOLDER?"),
        ("teapot --help", "'teapot' is not a command."),
    ],
)
def test_other_words_are_answered_with_what_was_meant(
    typed: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        commands._list_or_reject(FOUND, typed.split())
    assert end.value.code == 2
    program = "python reelsmith.py"
    told = f"{program}: error: {answer}\n{program} --all lists all commands\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("typed", "count"), [("", 4), ("--help", 4), ("--all", 4), ("train --help", 2), ("cache -h", 1)]
)
def test_help_lists_the_commands_that_begin_so(
    typed: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    commands._list_or_reject(FOUND, typed.split())
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("  ")]) == count


def test_the_door_of_a_checkout_runs_a_script_as_it_is(tmp_path: Path) -> None:
    """The installed command is tested with the wheel."""
    listing = run_script("reelsmith.py", "--all", folder=tmp_path).stdout
    for command in find_commands(ROOT):
        assert f"  {' '.join(command.words)}  " in listing
    first = run_script("reelsmith.py", folder=tmp_path).stdout.splitlines()
    begin = first.index("from a folder to a LoRA:") + 1
    shown = [line.split()[0] for line in first[begin : begin + 6]]
    assert shown == ["doctor", "new", "caption-dataset", "run", "browser", "compare"]
    assert max(map(len, first)) <= 110
    assert len(first) < 20
    through = run_script("reelsmith.py", "metaview", "--help", folder=tmp_path)
    assert through.stdout == run_script("blissful_tuner/metaview.py", "--help", folder=tmp_path).stdout
    done = run_script("reelsmith.py", "merge", "--dit", "nothing.safetensors", folder=tmp_path, check=False)
    assert_user_error(done, "merge_lora.py: error: ")


def test_on_a_screen_the_list_says_how_to_open_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("modules.screen.sys.platform", "linux")
    monkeypatch.setenv("DISPLAY", ":0")
    line = f"To do this by clicks, type {commands.PROGRAM} browser: it opens a page in your web browser."
    assert commands._format_first_steps(find_commands(ROOT)).splitlines().count(line) == 1

    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.1 1 192.0.2.2 22")
    assert line not in commands._format_first_steps(find_commands(ROOT))
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.delenv("DISPLAY")
    assert line not in commands._format_first_steps(find_commands(ROOT))


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
            functions = "|".join(["py", *FUNCTIONS])
            for module in (word for word in words if re.match(rf"reelsmith\.(?!({functions})\b)", word)):
                name = module.removeprefix("reelsmith.")
                is_import = (
                    line.startswith(("from ", "import "))
                    and (ROOT / f"{name.replace('.', '/')}.py").is_file()
                )
                assert is_import or name in known.values(), line
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
    text = 'f("wan_cache_latents.py x")  # python cache_latents.py, my_cache_latents.py, or wan.py'
    renamed = 'f("wan_cache_latents x")  # cache_latents, my_cache_latents.py, or wan.py'
    assert rename_scripts(text, scripts) == renamed
    shown = rename_scripts("python blissful_tuner/metaview.py --help, or metaview.py", {"metaview"})
    assert shown == "reelsmith metaview --help, or reelsmith metaview"
    assert rename_scripts("python reelsmith.py new FOLDER", scripts) == "reelsmith new FOLDER"
    launch = "accelerate launch --cpu {}cache_latents --x"
    assert rename_scripts(launch.format("").replace("s --x", "s.py --x"), scripts) == launch.format(
        "-m reelsmith."
    )


def test_a_literal_that_names_a_script_still_names_it_in_the_package() -> None:
    """Code finds scripts by such literals: what the package has in their place is found there too."""
    commands = find_commands(ROOT)
    scripts = {command.script for command in commands}
    paths = [path for room in find_rooms(ROOT) for path in (ROOT / room).rglob("*.py")]
    words, joined = [], []
    for path in [*paths, *ROOT.glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        before, after = (
            [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
            for text in (source, rename_scripts(source, scripts))
        )
        assert len(before) == len(after)
        for literal, renamed in zip(before, after, strict=True):
            if isinstance(literal, str) and find_script(literal.strip()) and literal.endswith(".py"):
                words.append(literal)
                assert find_script(renamed) == find_script(literal), (path, literal)
                assert renamed == literal or has_own_command(Path(literal).stem), (path, literal)
        # a command that is broken between two literals of a text would keep its `python`
        joined += re.findall(r"\bpython *\"\n *f?\"", source)
    assert "tools/dataset_report.py" in words
    assert joined == []


@pytest.mark.parametrize("script", ["compare", "download", "doctor", "quantise", "merge_lora", "new_project"])
def test_scripts_with_plain_names_hide_no_other_program(script: str) -> None:
    assert not has_own_command(script)
    assert script not in entry_points(ROOT)
    assert console_words(script)[0] == "reelsmith"


def test_scripts_of_models_are_console_commands() -> None:
    names = entry_points(ROOT)
    for command in find_commands(ROOT):
        if command.words[0] in ("train", "finetune", "cache", "generate"):
            assert names[command.script] == f"reelsmith.{command.module}:run"
    assert {"reelsmith", "wan_train_network", "cache_latents", "lumina_minimal_inference"} <= set(names)


def test_a_script_gets_an_entry_point_that_does_what_it_does_as_a_program() -> None:
    script = 'def main(): ...\n\n\nif __name__ == "__main__":\n    command_line(main, explain=identify)\n'
    done = add_entry_point(script, "merge_lora")
    assert "def run() -> None:" in done
    assert done.count("    command_line(main, explain=identify)\n") == 1
    assert done.endswith('    sys.argv[0] = "reelsmith merge"\n    run()\n')
    with pytest.raises(ValueError, match=r"merge_lora\.py does not end with"):
        add_entry_point("def main(): ...\n", "merge_lora")


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"test"}))
def test_an_extra_holds_packages_that_are_imported_and_is_documented(extra: str) -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8") for room in find_rooms(ROOT) for path in (ROOT / room).rglob("*.py")
    )
    for line in EXTRAS[extra]:
        name = Requirement(line).name
        module = name.replace("-", "_")
        assert f'"{module}' in sources or f"import {module}" in sources, name
        assert name in PAGE, name
    assert f"| `{extra}` |" in PAGE


@pytest.mark.parametrize(("words", "script"), [(["new"], "new_project.py"), (["pack"], "tools/pack.py")])
def test_messages_name_the_command_that_was_typed(words: list[str], script: str, tmp_path: Path) -> None:
    def ask(*line: str) -> str:
        done = subprocess.run([sys.executable, *line], cwd=tmp_path, capture_output=True, encoding="utf-8")
        return done.stdout + done.stderr

    front = str(ROOT / "reelsmith.py")
    said = ask(front, *words, "--nope")
    assert f"reelsmith.py {words[0]}: error: Unknown option --nope" in said
    assert f"{quote_for_shell(['python', front, *words])} --help lists all options" in said
    assert f"usage: reelsmith.py {words[0]} " in ask(front, *words, "--help")
    assert f"usage: reelsmith.py {words[0]} " in ask(front, "help", *words)
    assert f"python {script} --help" not in ask(front, *words, "--help")
    assert f"{Path(script).name}: error: Unknown option --nope" in ask(str(ROOT / script), "--nope")

"""The words of the command `reelsmith`."""

import re
from pathlib import Path

import pytest

from package.reelsmith import commands
from package.reelsmith.commands import OF_A_CHECKOUT, ScriptCommand, find_commands, name_words
from tests.commands import ROOT, assert_user_error, run_script
from tests.test_imports import SCRIPTS, TOOLS

FOUND = [
    ScriptCommand(tuple(name_words(name).split()), ROOT / f"{name}.py")
    for name in ("wan_cache_latents", "merge_lora", "hv_train_network", "wan_train_network")
]


def test_every_script_of_the_checkout_is_a_command() -> None:
    found = sorted(command.path.relative_to(ROOT).as_posix() for command in find_commands(ROOT))
    assert found == sorted([*SCRIPTS, *TOOLS])
    assert all((ROOT / f"{name}.py").is_file() for name in OF_A_CHECKOUT)


def test_each_command_has_its_own_words_and_none_hides_another() -> None:
    words = [command.words for command in find_commands(ROOT)]
    for one in words:
        assert [other for other in words if other[: len(one)] == one] == [one]


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("train", "train: which one? train hv, train wan"),
        ("train wn --task x", "'train wn' is no command. Did you mean python reelsmith.py train wan?"),
        ("wan train", "'wan train' is no command. Did you mean python reelsmith.py train wan?"),
        ("mrege", "'mrege' is no command. Did you mean python reelsmith.py merge?"),
        (
            "./wan_train_network.py --task x",
            "'./wan_train_network.py x' is no command. Did you mean python reelsmith.py train wan?",
        ),
        ("--task", "'--task' is no command."),
        ("teapot", "'teapot' is no command."),
        ("teapot --help", "'teapot' is no command."),
    ],
)
def test_other_words_are_answered_with_what_was_meant(
    typed: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        commands._explain(FOUND, typed.split())
    assert end.value.code == 2
    said = capsys.readouterr().err
    program = "python reelsmith.py"
    assert said == f"{program}: error: {answer}\n{program} --help lists all commands\n"


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
    for words, script in (("train wan", "wan_train_network.py"), ("metaview", "blissful_tuner/metaview.py")):
        through, plain = (
            run_script(*call, "--help", folder=tmp_path).stdout
            for call in (["reelsmith.py", *words.split()], [script])
        )
        assert through == plain
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

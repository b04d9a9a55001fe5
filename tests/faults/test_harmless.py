"""Hostile texts in messages, mistakes in prompt files and at the prompt, and files that must not be lost."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.faults.messages import assert_one_message, run_here
from tests.faults.mistakes import (
    COMMANDS,
    GENERATIONS,
    LOADED,
    TRAININGS,
    drop,
    no_model_is_loaded,
    try_mistake,
)

WAN, WAN_TRAIN = GENERATIONS[0], TRAININGS[0]
HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "a bell and a return": "a\x07b\rc",
    "markup": "[bold red]x[/bold red] <script>alert(1)</script>",
    "lines": "one\nOptionError: two\nthree",
    "right to left": "\u202egnp.exe",
    "separators": "a\u2028b\u2029c",
    "ten megabytes": "x" * 10_000_000,
    "ten megabytes of lines": "x\n" * 5_000_000,
    "ten megabytes of numbers": "1" * 10_000_000,
}
PLACES = {
    "a path": (WAN, ("--dit",)),
    "a choice": (WAN, ("--task",)),
    "a number": (WAN, ("--video_length",)),
    "a LoRA": (WAN, ("--lora_weight",)),
    "a file of options": (WAN_TRAIN, ("--config_file",)),
    "a network": (WAN_TRAIN, ("--network_module",)),
    "settings": (WAN_TRAIN, ("--network_args",)),
    "its arguments": (WAN_TRAIN, ("--optimizer_args",)),
}


def assert_harmless(said: str) -> None:
    """Nothing of it moves, colors or floods a terminal."""
    codes = [code for code in said if ord(code) < 32 and code != "\n" or code in "\u2028\u2029\u202e\x7f"]
    assert not codes, codes[:5]
    assert len(said) < 9000, f"{len(said)} characters"


# all texts at one place, and two kinds at each of the others: one function writes what is shown
@pytest.mark.parametrize(
    ("place", "text"),
    [("a path", text) for text in HOSTILE]
    + [(place, text) for place in PLACES for text in ("colours", "ten megabytes") if place != "a path"],
)
def test_hostile_text_in_an_option_is_shown_harmlessly_and_shortly(
    place: str, text: str, made_projects: dict[str, Path]
) -> None:
    script, words = PLACES[place]

    code, said = try_mistake(script, *words, HOSTILE[text], folder=made_projects["wan"])

    assert code in {1, 2}, code
    assert "Traceback" not in said
    message = said[said.index("rror: ") :]
    assert len(message.splitlines()) <= 3, message[:500]
    assert_harmless(message)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_as_an_option_is_shown_harmlessly(text: str, made_projects: dict[str, Path]) -> None:
    code, said = try_mistake(WAN, f"--{HOSTILE[text]}", folder=made_projects["wan"])

    assert code == 2
    assert len(said.splitlines()) == 2, said[:500]
    assert_harmless(said)


# --- prompts


def test_mistakes_at_the_prompt_do_not_end_the_session(made_projects: dict[str, Path]) -> None:
    lines = ["a cat --w many", "a cat --s 0", " --w 32", "", "# a", "a cat --w 33", f"a cat --i {'x' * 5000}"]
    typed: Iterator[str] = iter(lines)

    def answer(sign: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    words = drop(COMMANDS[WAN].words, ["--prompt"])
    with patch("builtins.input", answer), no_model_is_loaded():
        code, said = run_here(*words, "--interactive", folder=made_projects["wan"])

    assert code == 0, said
    assert said.count("ERROR: the prompt is skipped. OptionError: ") == 5, said
    assert "Traceback" not in said
    assert_harmless(said)


# --- nothing is lost


def test_a_disk_without_room_for_one_file_is_told_before_a_model_is_loaded(
    made_projects: dict[str, Path],
) -> None:
    usage = shutil.disk_usage(".")
    with patch.object(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20)):
        code, said = try_mistake(WAN_TRAIN, folder=made_projects["wan"])

    assert code != LOADED
    assert isinstance(code, int)
    assert_one_message(code, said, "x.safetensors", "MB free", "Free some space")

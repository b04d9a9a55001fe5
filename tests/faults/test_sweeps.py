"""Every option of every script with values that no run can use: refused before any model is loaded."""

import argparse
import contextlib
import io
import itertools
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from modules.parser import Parser
from tests.commands import ROOT
from tests.faults.messages import assert_one_message
from tests.faults.mistakes import COMMANDS, LOADED, try_mistake

# what no number can be; the last is for options of whole numbers, too
ABSURD = ("nan", "inf", "-inf", "1e30", "text", "", "1" + "0" * 30)
# files that no option takes
BAD_FILES = (
    "none.safetensors",
    "folder",
    "empty.safetensors",
    "lfs.safetensors",
    "page.safetensors",
    "text.txt",
)
# how paths go wrong on their way from a page or a shell -> what the message says
MISTYPED = {
    "https://example.org/wan.safetensors": "this is an address",
    "hf:owner/name": "this is an address",
    "\u201cmodels/wan.safetensors\u201d": 'straight ones around: "models/wan.safetensors"',
    "'models/wan.safetensors'": 'straight ones around: "models/wan.safetensors"',
    "$MODELS/wan.safetensors": "$MODELS is no folder, and no variable was put in its place",
    "%MODELS%/wan.safetensors": "%MODELS% is no folder",
    f"{Path('/').absolute()}wan.safetensors": "is a variable that stood before it not set?",
    "models/*.safetensors": "A pattern that fits no file stays as it is",
    "None": "Leave it out",
    "wan.safetensors ": "begins or ends with a blank",
    "~nosuchuser/wan.safetensors": "there is no such user",
    "w" * 300: "no file has so long a name",
}
MODELS = {
    *("dit", "vae", "t5", "clip", "image_encoder", "text_encoder1", "text_encoder2"),
    *("t5_tokenizer", "text_encoder1_tokenizer", "text_encoder2_tokenizer"),
    *("network_weights", "base_weights", "lora_weight", "input"),
}
# to be seen beside an option that has no effect alone
BESIDE = {
    "lora_multiplier": ("--lora_weight", "lora.safetensors"),
    "base_weights_multiplier": ("--base_weights", "lora.safetensors"),
}


class _ParserFound(Exception):
    """The parser of a script, at the moment when it would parse."""


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    found: list[argparse.ArgumentParser] = []

    def caught(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        found.append(self)
        raise _ParserFound

    with (
        patch.object(Parser, "parse_args", caught),
        patch.object(sys, "argv", [script]),
        pytest.raises(_ParserFound),
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return found[0]


def options_where(is_one: Callable[[argparse.Action], bool], once: bool) -> Iterator[tuple[str, str]]:
    """Pairs of script and option, those that are supported. once: each option in one script only."""
    seen: set[str] = set()
    for script in COMMANDS:
        for action in parser_of(script)._actions:
            if (script, action.dest) == (
                "convert_lora.py",
                "dit",
            ):  # only for --bake, of other LoRAs than these
                continue
            if action.dest in seen or hasattr(action, "refusal") or not is_one(action):
                continue
            if once:
                seen.add(action.dest)
            yield script, action.option_strings[0]


def is_number(action: argparse.Action) -> bool:
    # any text is a seed
    return action.type is not None and action.type not in (str, Path) and action.dest != "seed"


def action_of(script: str, option: str) -> argparse.Action:
    return parser_of(script)._option_string_actions[option]


@pytest.mark.parametrize(("script", "option"), options_where(is_number, once=True))
def test_no_option_takes_an_absurd_number(
    script: str,
    option: str,
    made_projects: dict[str, Path],
) -> None:
    action = action_of(script, option)
    count = action.nargs if isinstance(action.nargs, int) else 1
    for value in ABSURD:
        words = [f"{option}={value}"] if count == 1 else [option, *[value] * count]

        code, said = try_mistake(
            script, *words, *BESIDE.get(action.dest, ()), folder=made_projects[COMMANDS[script].family]
        )

        assert code != LOADED, f"{option} {value!r} is accepted"
        assert isinstance(code, int)
        message = assert_one_message(code, said, option, remedy=False)
        assert len(message.splitlines()) <= 3, message


@pytest.mark.parametrize(
    ("script", "option"), options_where(lambda action: action.dest in MODELS, once=False)
)
def test_no_option_takes_a_file_that_is_no_model(
    script: str,
    option: str,
    made_projects: dict[str, Path],
    bad: Path,
) -> None:
    for name in BAD_FILES:
        code, said = try_mistake(
            script,
            option,
            bad / name,
            folder=made_projects[COMMANDS[script].family],
        )

        assert code != LOADED, f"{option} {name} is found out after a model was loaded"
        assert isinstance(code, int)
        message = assert_one_message(code, said, name, remedy=False)
        assert len(message.splitlines()) <= 3, message


@pytest.mark.parametrize(("script", "option"), options_where(lambda action: action.dest in MODELS, once=True))
def test_a_mistyped_path_is_recognised(script: str, option: str, made_projects: dict[str, Path]) -> None:
    folder = made_projects[COMMANDS[script].family]
    for path, words in MISTYPED.items():
        code, said = try_mistake(script, f"{option}={path}", folder=folder)

        assert code != LOADED, f"{option} {path} is found out after a model was loaded"
        assert isinstance(code, int)
        message = assert_one_message(code, said, option if len(path) < 300 else "--", words, remedy=False)
        assert len(message.splitlines()) <= 3, message


@pytest.mark.parametrize("script", list(COMMANDS)[:1])  # all have the same parser
def test_a_typographic_dash_is_named_with_every_option(script: str) -> None:
    flags = [
        flag for action in parser_of(script)._actions for flag in action.option_strings[-1:] if flag != "-h"
    ]
    for flag, dash in zip(flags, itertools.cycle(("\u2013-", "\u2014", "-\u2011", "\u2212\u2212"))):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), pytest.raises(SystemExit):
            parser_of(script).parse_args([dash + flag.removeprefix("--"), "x"])
        assert f"begins with a typographic dash, not with --. Write {flag}" in said.getvalue()

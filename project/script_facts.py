"""Read the options of a training script from its table, and let the script check given options."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from modules import installation
from modules.error_output import extract_error_message
from modules.errors import OptionError
from modules.help_text import DescribedOption, describe_options
from modules.option_tables import find_table
from modules.table_parser import build_parser
from project.foreign.contract import integer, number, read_switch

SECONDS = 60  # time limit for a script to read its options
NUMBERS = {"whole": integer(-(2**40), 2**40), "number": number(-1e12, 1e12)}


@dataclass(frozen=True)
class AdoptableOption:
    """Type, choices and default of a training option."""

    kind: str  # kind of value: switch, whole, number, text or other
    choices: tuple[str, ...]
    default: Any  # None without a default
    reaches_out: bool  # it may name code, or files and URLs elsewhere

    def read(self, value: Any) -> Any:
        """Convert a value from another trainer's file to the type of this option.

        Raises:
            ValueError: If the option does not accept the value.
        """
        if self.kind == "switch":
            return read_switch(value)
        if self.kind in NUMBERS:
            return NUMBERS[self.kind](value)
        text = str(value)
        matching = [choice for choice in self.choices if choice.lower() == text.lower()]
        if matching:
            return matching[0]
        if self.choices:
            raise ValueError(f"choose from {', '.join(self.choices)}")
        raise ValueError("write it below [training]: values of this option are not read from other programs")


@dataclass(frozen=True)
class ScriptOptions:
    """A training script's options: the accepted ones, and those that it rejects with a reason."""

    name: str
    accepted: Mapping[str, AdoptableOption]
    rejected: Mapping[str, str]  # options of other programs -> why they are rejected


@cache
def read_script_options(name: str) -> ScriptOptions:
    """Return the options that a training script accepts, and those that it rejects.

    Raises:
        OptionError: If the script does not exist.
    """
    table = find_table(installation.find_script(name))
    if table is None:
        raise OptionError(f"{name}: there is no such script")
    accepted_options: dict[str, AdoptableOption] = {}
    rejection_by_option: dict[str, str] = {}
    for option in describe_options(build_parser(table, name)):
        if option.rejection is not None:
            rejection_by_option[option.name] = option.rejection
            continue
        accepted_options[option.name] = AdoptableOption(
            kind=option.kind,
            choices=tuple(option.choices),
            default=_read_default(option),
            reaches_out=bool(option.reach),
        )
    return ScriptOptions(name, accepted_options, rejection_by_option)


def _read_default(option: DescribedOption) -> Any:
    """Return the default of an option, parsed from its help text."""
    if option.kind == "switch":
        return option.default == "true"
    if option.kind in NUMBERS and option.default:
        try:
            return NUMBERS[option.kind](option.default)
        except ValueError:
            return None
    return option.default or None


def check_options(name: str, argv: Sequence[str], folder: Path) -> str | None:
    """Return the error with which a script rejects its arguments; None if it accepts them.

    The script runs in `folder`, and ends after parsing its options, before torch is imported.
    """
    process = _run_script(name, argv, folder, {installation.ONLY_OPTIONS: "1", installation.RUN_GOES_ON: "1"})
    return extract_error_message(process.stderr) if process.returncode else None


def _run_script(
    name: str, argv: Sequence[str], folder: Path, variables: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run one of our scripts without input, and return its captured output."""
    script = installation.find_script(name)
    if script is None:
        raise OptionError(f"{name}: there is no such script")
    try:
        return subprocess.run(
            [sys.executable, *installation.program_words(script), *argv],
            cwd=folder,
            env=installation.program_environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OptionError(f"{name} cannot be asked for its options: {error}") from None

"""What the image guides' minimal inference scripts share, in the words of our generation scripts.

Standard library only.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import read_options
from modules.parser import Parser, add_unneeded, list_unneeded

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_SIDE = 16384  # pixels


def add_offload_argument(group: argparse._ArgumentGroup) -> None:
    """Declare --offload, which asks for nothing here."""
    add_unneeded(
        group,
        "--offload",
        instead="networks take turns on the device anyway.",
        action="store_true",
        help="keep networks in host memory while they are not used",
    )


def add_lora_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare --lora_weights, which `read_strengths` reads, and --merge_lora_weights."""
    group.add_argument(
        "--lora_weights", type=str, nargs="*", default=[], metavar="PATH;STRENGTH", help="LoRAs to add"
    )
    add_unneeded(
        group,
        "--merge_lora_weights",
        instead="LoRAs are added to the weights while these are loaded.",
        action="store_true",
        help="merge LoRAs into the model",
    )


def read_minimal_options(parser: Parser, record: type[T], argv: Sequence[str] | None) -> T:
    """Read the command line into the record; log a line for each option that is not needed."""
    args = parser.parse_args(argv)
    for line in list_unneeded(parser, args):
        logger.info(line)
    return read_options(record, args)


def check_side(option: str, side: int, least: int) -> None:
    """Raise OptionError if a side is below `least` pixels or too large."""
    check_at_least(option, side, least, "a side in pixels")
    check_at_most(option, side, MOST_SIDE, "a side in pixels")


def option_words(values: Mapping[str, Any], switches: Mapping[str, bool]) -> list[str]:
    """Return the words of a command. values: by option, left out if None. switches: whether each is on."""
    # joined: a prompt may begin with a dash
    words = [f"{option}={value}" for option, value in values.items() if value is not None]
    return words + [switch for switch, is_on in switches.items() if is_on]


def read_strengths(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Return path and strength of each text of --lora_weights, `path` or `path;strength`.

    Raises OptionError if a strength is no number.
    """
    return [_read_lora_word(text) for text in texts]


def lora_words(loras: Sequence[tuple[str, float]]) -> list[str]:
    """Return the options of a generation script that add these LoRAs."""
    if not loras:
        return []
    files = ["--lora_weight", *(path for path, _ in loras)]
    return [*files, "--lora_multiplier", *(f"{strength:g}" for _, strength in loras)]


def _read_lora_word(text: str) -> tuple[str, float]:
    path, separator, strength = text.rpartition(";")
    if not separator:
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        raise OptionError(
            f"--lora_weights {text!r}: write PATH, or PATH;STRENGTH such as lora.safetensors;0.8"
        ) from None

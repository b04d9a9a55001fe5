"""Convert typed words to values of options, and check them. Standard library only."""

import argparse
import ast
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from modules.control_codes import shorten
from modules.errors import OptionError
from modules.output_files import check_output_file, check_place
from modules.paths import (
    expand_path,
    explain_missing,
    explain_path,
    hide_secrets,
    path_exists,
    strip_quotes,
)
from modules.text_files import bad_character

T = TypeVar("T")

MAX_NUMBER = 10**9  # limit of all numbers except seeds; no sensible count, size or factor is larger
UNBOUNDED = {"seed"}
JOINED = re.compile(r"([0-9]+)( *[x*×] *|[,: ]+)([0-9]+)", re.IGNORECASE)  # 832x480: two numbers in one word
UNIT = r"(?:GB|GiB|G)"
MEMORY = rf"([0-9]{{1,6}}(?:\.[0-9]+)?) *{UNIT}?"  # GiB of a graphics card, in common spellings
HEIGHT_WIDTH = ("HEIGHT", "WIDTH")  # metavar of options for a size
SEED_BITS = 32
MAX_DIGITS = 100  # maximum digits of an integer
MAX_ARGUMENT_LENGTH = 10_000  # maximum characters of one KEY=VALUE


class Placeholder(str):
    """A word in a printed command that the user has to replace, such as a path."""


class Repeated(tuple[str, ...]):
    """Texts of an option that is typed once for each, such as --ref a.png --ref b.png."""

    __slots__ = ()


def check_characters(option: str, value: Any) -> None:
    """Check that an option's value has no characters that are invalid in text or file names.

    Raises:
        OptionError: If it has one.
    """
    texts = value if isinstance(value, (list, tuple)) else [value]
    for text in texts:
        if isinstance(text, Path) and "\0" in str(text):  # other bytes are allowed, even invalid UTF-8
            raise OptionError(
                f"--{option} contains the character NUL (\\u0000), which no file's name can have"
            )
        character = bad_character(text) if isinstance(text, str) else None
        if character is not None:
            raise OptionError(
                f"--{option} contains {character}: set the terminal, or the file that it comes from, to UTF-8"
            )


def to_path(option: str, text: str) -> Path:
    """Return the path with `~` expanded.

    Raises:
        OptionError: If no file can have the name, or if a missing path shows a common mistake.
    """
    try:
        path = expand_path(text)
    except ValueError as error:
        raise OptionError(f"{option} {shorten(text, 80)!r}: {error}") from None
    why = None if path_exists(path) else explain_path(strip_quotes(text))
    if why is not None:
        raise OptionError(f"{option} {hide_secrets(shorten(text, 200))}: {why}")
    return path


def height_width(two_pairs: re.Match[str]) -> tuple[str, str]:
    """Return (height, width) from a match of `JOINED`; "832x480" has the width first."""
    is_width_first = two_pairs[2].strip(", :") != ""
    return (two_pairs[3], two_pairs[1]) if is_width_first else (two_pairs[1], two_pairs[3])


def check_path(option: str, path: Path, required: str, hint: str) -> None:
    """Raise OptionError if an option cannot take a path.

    `required` is what has to exist ("file", "folder", or "there" for either), or what will be written ("new
    folder", "new file", or "safetensors" for a new file of that kind). `hint` is advice for a path that has
    to exist.
    """
    if required == "safetensors":
        check_output_file(option, path)
    elif required == "new file":
        check_place(option, path)
    elif required == "new folder":
        if path_exists(path) and not path.is_dir():
            raise OptionError(f"{option} {path}: it is a file; pass a folder, it will be created")
    elif not path_exists(path) or (required != "there" and path.is_dir() != (required == "folder")):
        raise OptionError(f"{option} {path}: {_explain_unfit_path(path, required, hint)}")


def _explain_unfit_path(path: Path, required: str, hint: str) -> str:
    """Return why a path is not that of an existing file or folder, as `check_path` requires it."""
    if not path_exists(path):
        kind = "folder" if required == "folder" else "file"
        remedy = hint or "the path of an existing one"
        return f"no such {kind}.{explain_missing(path)} Pass {remedy}"
    if required == "folder":
        return f"it is a file. Pass the folder that it is in: {path.parent}"
    return f"is a folder. Pass {hint or f'a {required}'}"


def check_numbers(option: str, value: Any) -> None:
    """Check that the numbers in an option's value are finite and not absurdly large.

    Raises:
        OptionError: If one is not.
    """
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(number, (int, float)) or option in UNBOUNDED:
            continue
        if isinstance(number, float) and not math.isfinite(number):
            raise OptionError(f"--{option} {number}: pass a finite number")
        if abs(number) > MAX_NUMBER:
            raise OptionError(f"--{option} {format_number(number)}: use a number of at most {MAX_NUMBER:,}")


def format_number(number: float) -> str:
    """Format a number for messages; a very long number is described by how many digits it has."""
    if isinstance(number, int) and abs(number) >= 10**40:
        return f"of {len(str(abs(number)))} digits"
    return str(number) if isinstance(number, int) else f"{number:.12g}"


def format_shape(sizes: Iterable[int]) -> str:
    """Return sizes in the usual notation: `1024x768`."""
    return "x".join(map(str, sizes))


def convert_value(value: Any, hint: Any, option: str) -> Any:
    """Convert an option's value to the type of its field.

    Raises:
        OptionError: If the value cannot be converted.
    """
    if value is None:
        return None
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) in kinds:
        return value
    for kind in kinds:
        if kind is Path:
            if not str(value):
                raise OptionError(
                    f"{option} is empty: pass a path, or omit the option if the run does not need it"
                )
            return to_path(option, str(value))
        if typing.get_origin(kind) is tuple:
            items = value if isinstance(value, (list, tuple)) else [value]
            return tuple(convert_value(item, typing.get_args(kind)[0], option) for item in items)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    return value


def require(value: T | None, option: str, why: str) -> T:
    """Return `value`; if it is None, raise OptionError with the option's name and the reason `why`."""
    if value is None:
        raise OptionError(f"{option} is missing: {why}")
    return value


def check_seed(option: str, seed: int | None) -> None:
    """Raise OptionError if a seed does not fit into 64 bits, as torch's generators require."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise OptionError(f"{option} {format_number(seed)} does not fit in 64 bits: use a number below 2^64")


def gibibytes(text: str) -> float:
    """Parse an amount of memory in GiB: 12, 12GB, 12 gib.

    Raises:
        ArgumentTypeError: For any other text.
    """
    match = re.fullmatch(MEMORY, text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an amount of memory. Pass GiB, such as 12; 0 for a CPU"
        )
    return float(match[1])


def int_or_float(text: str) -> int | float:
    """Parse a number of steps or a fraction: "100" -> 100, "0.05" and "5%" -> 0.05.

    Raises:
        ArgumentTypeError: If the text is neither, such as "1.5".
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a percentage") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps and not a fraction from 0 to 1")
    if text.endswith("%") or value < 1:
        if value > 1:
            raise argparse.ArgumentTypeError(f"{text!r} is more than the whole run: use at most 100%")
        return value if value else 0  # an integer: no steps
    if value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of steps; fractions of the run lie between 0 and 1"
        )
    return int(value)


def split_pairs(option: str, items: Sequence[str]) -> dict[str, str]:
    """Parse `key=value` texts to a dictionary; a value may contain further `=`.

    Raises:
        OptionError: If an item has no `=` or no key, or is implausibly long.
    """
    pairs: dict[str, str] = {}
    for item in items:
        if len(item) > MAX_ARGUMENT_LENGTH:
            raise OptionError(
                f"{option} {' '.join(item[:40].split())}...: {MAX_ARGUMENT_LENGTH:,} characters are allowed "
                "at most. Write less, or omit it"
            )
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise OptionError(
                f"{option} {item!r}: write key=value, without spaces around the =, or put all of it in quotes"
            )
        _check_single_pair(option, item, value)
        pairs[key.strip()] = value
    return pairs


# what separates two settings in one word: a space, or a comma or semicolon after a value without "="
_GAP_BETWEEN_PAIRS = (
    re.compile(r"[^\s,;](?P<gap>\s+)(?=[A-Za-z_]\w*=[^=])"),
    re.compile(r"^[^=\[({]*(?P<gap>[,;]\s*)(?=[A-Za-z_]\w*\s*=[^=])"),
)


def _check_single_pair(option: str, item: str, value: str) -> None:
    """Raise OptionError for two settings in one word, and for a separator after the value."""
    # `item` is the full word. `value` is the part after its first `=`.
    if '"' in value or "'" in value:  # quoted values may contain separators
        return
    for pattern in _GAP_BETWEEN_PAIRS:
        second_pair = pattern.search(value)
        if second_pair is not None:
            first_pair = item[: len(item) - len(value) + second_pair.start("gap")]
            raise OptionError(
                f"{option} {item!r}: write each KEY=VALUE as a word of its own, without a separator: "
                f"{first_pair.strip()} {value[second_pair.end('gap') :]}"
            )
    if value.rstrip().endswith((",", ";")):
        mark = value.rstrip()[-1]
        raise OptionError(
            f"{option} {item!r}: a {'comma' if mark == ',' else 'semicolon'} follows the value. Settings "
            f"are separated by spaces only: {item.rstrip().rstrip(',; ')}"
        )


def read_literals(option: str, items: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` texts; values are Python literals (0.9,0.95 is a tuple), bare words stay text."""
    return {key: _parse_literal(value) for key, value in split_pairs(option, items).items()}


def _parse_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # an unquoted word, or nested too deeply
        return text


def text_to_seed(text: str, bits: int = SEED_BITS) -> int:
    """Return the seed for a text: an integer as it is, any other text hashed to `bits` bits.

    The hash is the one that other tools use; tests/golden/string_seeds.json contains values from them.

    Raises:
        ValueError: For a number with more digits than any seed.
    """
    if re.fullmatch(r"[+-]?[0-9]+", text.strip()):
        return parse_bounded_int(text.strip())
    import hashlib  # imported here, because it loads OpenSSL, which --help does not need

    digest = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")
    return abs(digest - _mix_characters(text)) % 2**bits


def _mix_characters(text: str) -> int:
    """Return the integer seed that other programs derive from a text seed, with their constants."""
    # By its position, a character adds, subtracts or divides by its code, or multiplies by the code's digits.
    total: float = 0
    try:
        for position, code in enumerate(map(ord, text)):
            if position % 2 == 0:
                total += code
            elif position % 3 == 0:
                total -= code
            elif position % 5 == 0:
                total /= code
            else:  # positions 1, 7, 11, ...; a digit 0 counts as 0.31415
                for digit in map(int, str(code)):
                    total *= digit or 0.31415
        if math.isfinite(total):
            return int(total)
    except (OverflowError, ZeroDivisionError):
        pass
    # the total is infinite or not a number
    return len(text) + 314159 * ord(text[len(text) // 2]) - ord(text[len(text) // 4])


def parse_int(text: str) -> int:
    """Parse an integer; raise ValueError for any other text."""
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"{text!r} is not a whole number")
    return parse_bounded_int(text)


def parse_bounded_int(text: str) -> int:
    """Parse an integer with a limited number of digits.

    Raises:
        ValueError: If the text is not an integer, or has more digits than any option needs, which Python
            would parse slowly.
    """
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:10]}... has {len(text)} digits, more than any number here")
    return int(text)


def option_argv(values: Mapping[str, Any]) -> list[str]:
    """Return options as command-line arguments.

    True stands for a switch; None, False and an empty sequence leave an option out. A single text that begins
    with - is joined to its flag by an equals sign.
    """
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, Repeated):
            words += [word for text in value for word in option_argv({name: text})]
            continue
        texts = [] if isinstance(value, bool) else value_argv(value)
        if len(texts) == 1 and texts[0].startswith("-"):
            words.append(f"{name}={texts[0]}")
        elif texts or value is True:
            words += [name, *texts]
    return words


def value_argv(value: Any) -> list[str]:
    """Return an option's value as command-line arguments: none for None, several for a sequence."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in value_argv(item)]
    if isinstance(value, Placeholder):
        return [value]
    return [repr(value) if isinstance(value, float) else str(value)]


def missing_words(words: Sequence[str]) -> list[str]:
    """Return the distinct words of a command that the user has to replace."""
    return list(dict.fromkeys(word for word in words if isinstance(word, Placeholder)))

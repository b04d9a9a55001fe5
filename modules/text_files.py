"""Read text files named by users: only regular files of limited size, parsed without recursion errors.

Standard library only. Errors are raised as OSError or ValueError; callers make a UserError of them that names
the option or table.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from modules.limits import MAX_DEPTH, MAX_HEADER_BYTES, MAX_LINE_CHARACTERS, MAX_TEXT_BYTES

_PIECE_BYTES = 1 << 20  # bytes read at once of a file that is larger than its stated size

# a dotted key of far more parts than that: the standard library's parser takes quadratic time for it
MAX_BITS = 1000  # of an integer; floats go up to 2 ** 1024
_LONG_NUMBER = re.compile(r"[0-9A-Fa-f_]{240}")  # in any notation
_LONG_KEY = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{4 * MAX_DEPTH}}}"""
)
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def real_path(path: Path) -> Path:
    """Return the path with symbolic links resolved.

    Circular links, and paths that no file can have, stay unresolved; `Path.resolve` would raise.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # NUL, or half of a surrogate pair
        return Path(os.path.abspath(path))  # noqa: PTH100


def require_regular_file(path: Path, limit_bytes: int | None = None) -> int:
    """Check that `path` is a regular file, or a link to one, and return its size in bytes.

    Reading anything else could wait or continue forever.

    Raises:
        OSError: If it is of another kind, missing, or larger than `limit_bytes`. `strerror` says which, as
            `open` does for a folder or a missing file.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  # takes half the time of `path.stat`
    except ValueError:  # a NUL character, which ends a name
        raise OSError(errno.EINVAL, "its name contains a character that no file name can have") from None
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    if limit_bytes is not None and status.st_size > limit_bytes:
        raise _too_large(path, limit_bytes)
    return status.st_size


def _too_large(path: Path, limit_bytes: int) -> OSError:
    maximum = f"{limit_bytes >> 20} MiB" if limit_bytes >> 20 else f"{limit_bytes:,} bytes"
    text = f"it is larger than {maximum}, the maximum"
    return OSError(errno.EFBIG, text, str(path))


def read_safetensors_texts(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, {} if it has none. Reads only its header.

    Raises OSError if the file cannot be read, ValueError if its header is invalid.
    """
    size = require_regular_file(path)
    with path.open("rb") as file:
        return read_tensor_header(file.read, size).metadata


def iterate_lora_metadata(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield path and metadata of LoRA files; skip faulty files, which raise when their tensors are read."""
    for path in paths:
        try:
            texts = read_safetensors_texts(path)
        except (OSError, ValueError):
            continue
        yield path, texts


class TensorHeader(NamedTuple):
    """The parsed header of a safetensors file."""

    metadata: dict[str, str]
    entries: dict[str, Any]  # entries of the tensors, by name
    start: int  # offset of the data in bytes


def read_tensor_header(
    read: Callable[[int], bytes], size: int, first: int = 8, no_repeats: bool = False
) -> TensorHeader:
    """Read the header of a safetensors file.

    Args:
        read: Returns the next bytes of the file.
        size: Size of the file in bytes.
        first: Number of bytes of the first read; a larger number saves a second read of a short header.
        no_repeats: Whether a repeated key in a JSON object is an error.

    Raises:
        ValueError: If the header is invalid. Its tensor entries are not checked.
    """
    # the file: 8 bytes with the length of the header, the header as JSON, then the tensors' bytes
    start = read(min(size, first))
    length = int.from_bytes(start[:8], "little")
    end = 8 + length
    shortest_end = 8 + len("{}")
    if not shortest_end <= end <= min(MAX_HEADER_BYTES + 8, size):
        raise ValueError(f"it claims {length} bytes, the file has {size}" if size else "it is empty")
    if len(start) < 9:
        start += read(1)
    if start[8:9] != b"{":  # checked before up to a hundred megabytes are read
        raise ValueError("it is not a table of tensors")
    if end > len(start):
        start += read(end - len(start))
    entries = parse_json(str(start[8:end], "utf-8"), no_repeats)
    if not isinstance(entries, dict):
        raise ValueError("it is not a table of tensors")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("it is not a table of tensors")
    texts = {str(key): str(text) for key, text in metadata.items()}
    return TensorHeader(texts, entries, end)


def read_text(path: Path, limit_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the UTF-8 text of a regular file, without byte order mark and with newlines as only line ends.

    Raises OSError if it cannot be read or is too large, UnicodeDecodeError if it is not UTF-8.
    """
    content = read_content(path, limit_bytes)
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def read_content(path: Path, limit_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: If the file cannot be read, is not regular or is larger than `limit_bytes`.
    """
    maximum = limit_bytes + 1  # one more than allowed, whatever the size: a file may grow
    size = require_regular_file(path, limit_bytes) + 1
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        content = piece = os.read(handle, size)
        while piece and len(content) < maximum:
            piece = os.read(handle, min(maximum - len(content), _PIECE_BYTES))
            content += piece
    finally:
        os.close(handle)
    if len(content) > limit_bytes:
        raise _too_large(path, limit_bytes)
    return content


def read_lines(path: Path, limit: int = MAX_LINE_CHARACTERS) -> Iterator[str]:
    """Yield the lines of a regular UTF-8 file without line ends; only one is in memory at a time.

    Raises:
        OSError: If the file cannot be read, is not regular or has a line of more than `limit` characters.
        UnicodeDecodeError: If it is not UTF-8.
    """
    require_regular_file(path)
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(limit + 2):
            number += 1
            line = line.removesuffix("\n")
            if len(line) > limit:
                raise OSError(errno.EFBIG, f"line {number} has more than {limit:,} characters", str(path))
            yield line


def parse_json(text: str, no_repeats: bool = False) -> Any:
    """Parse a JSON text.

    Raises ValueError if the text is not JSON (common mistakes are explained), is nested too deeply, has a
    number too large for a float or, with `no_repeats`, an object with a repeated key.
    """
    import json  # imported here: all options import this file, but few commands read JSON

    try:
        content = json.loads(text, object_pairs_hook=_unique if no_repeats else None)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        position = error.pos  # explain only the part at the error, because the text may be huge
        # A hint about a common mistake in JSON, beginning with a full stop; "" if none is recognized
        following = text[position : position + 200]
        before = text[max(0, position - 200) : position]
        hints = (
            (r"None", "For nothing write null, or omit the key"),
            (r"True|False", "Write true or false, in lower case"),
            (r"['\u2018\u2019\u201c\u201d\u00ab\u00bb]", 'Use straight double quotes: "..."'),
            (r"\w+\s*:", "A key needs double quotes"),
            (r"\\", 'A Windows path needs forward or doubled slashes: "C:/data"'),
        )
        hint = next((hint for pattern, hint in hints if re.match(pattern, following)), "")
        if following[:1] in {"]", "}"} and before.rstrip().endswith(","):
            hint = "Remove the comma after the last entry"
        hint = f". {hint}" if hint else ""
        raise ValueError(f"{error}{hint}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:  # fewer brackets cannot be nested too deeply
        check_depth(content)
    if _LONG_NUMBER.search(text):
        check_numbers(content)
    return content


def looks_like_object(text: str) -> bool:
    """Return whether a text begins like a JSON object."""
    return text.lstrip().startswith("{")


def read_object(text: str) -> dict[str, Any]:
    """Parse a text (such as a caption) as a JSON object. Raises ValueError if it is not JSON."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def read_if_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text contains; None for any other text, such as {a|b}."""
    try:
        return read_object(text) if looks_like_object(text) else None
    except ValueError:
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return content


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML text.

    Raises ValueError if the text is not TOML (with a second line about common mistakes), is nested too
    deeply, or has a number too large for a float.
    """
    # each part of a dotted key (a.b.c) is a level of nesting; checked before parsing, because the parser
    # takes quadratic time for a key of very many parts
    if _LONG_KEY.search(text):
        raise _too_deep()
    import tomllib

    try:
        content = tomllib.loads(text)
    except RecursionError:
        raise _too_deep() from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{error}{_explain_toml(text, str(error))}") from None
    check_depth(content)
    if _LONG_NUMBER.search(text):  # only a number of very many digits is too large for a float
        check_numbers(content)
    return content


def _explain_toml(text: str, error: str) -> str:
    """Return a hint for common mistakes in TOML, beginning with a newline, or ""."""
    # `error` is the parser's message, which names a line.
    table = re.fullmatch(r"Cannot declare \('([^']*)',\) twice.*", error)
    if table:
        name = table[1]
        return f"\n  [{name}] may occur once: join the tables, or write [[{name}]] if it is a list of tables."
    if error.startswith("Cannot overwrite a value"):
        return "\n  A key may occur once in a table: remove one of the two."
    number = re.search(r"at line (\d+)", error)
    lines = text.splitlines()
    line = lines[int(number[1]) - 1].strip() if number and int(number[1]) <= len(lines) else ""
    value = line.partition("=")[2].strip()
    hints = (
        (r"(?i)none|null|nil|nan_?", "TOML has no null: omit the key."),
        (r"(?i)true|false|yes|no|on|off", "Write true or false, in lower case."),
        (r"[\u2018\u2019\u201c\u201d\u00ab\u00bb].*", 'Use straight quotes: "...".'),
        (r"[^\W\d][\w./~ -]*|[./~].*", f'A text needs quotes: "{value}".'),
    )
    hint = next((hint for pattern, hint in hints if re.fullmatch(pattern, value)), "")
    if not hint and "\\" in text:
        hint = "A Windows path needs forward slashes or single quotes: 'C:\\data'."
    if not hint and "=" not in line and re.match(r"[\w-]+\s*:", line):
        hint = "A key and its value are joined with =."
    return f"\n  {hint}" if hint else ""


def bad_character(text: str) -> str | None:
    r"""Describe the first invalid character of a text: NUL or a lone surrogate. None if there is none.

    Surrogates come from a JSON escape such as \ud800, or from a file name that is not UTF-8.
    """
    if "\0" in text:
        return "the character NUL (\\u0000)"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"half a character (\\u{ord(text[error.start]):04x}), which is not text"
    return None


def check_depth(content: Any) -> None:
    """Raise ValueError if lists and dictionaries are nested more than MAX_DEPTH deep."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        inner = [
            value.values() if isinstance(value, dict) else value
            for value in level
            if isinstance(value, (dict, list))
        ]
        if not inner:
            return
        level = [value for values in inner for value in values]
    raise _too_deep()


def check_numbers(content: Any) -> None:
    """Raise ValueError if an integer is too large for a float, because readers convert numbers to floats."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ValueError(f"it has a whole number of {value.bit_length():,} bits, and no setting has one")


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MAX_DEPTH} levels deep")

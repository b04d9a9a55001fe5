"""Make text safe for a console; extract the text of a chat model's answer. Standard library only."""

import os
import re
from textwrap import wrap
from typing import Any

from modules.limits import MAX_ANSWER_CHARACTERS

# C0 except newline and tab, DEL, C1; line and paragraph separators; what turns the direction of writing;
# halves of characters
_CODES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# terminal sequences: colors and cursor positions; titles and links, with their text
_SEQUENCES = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x80-\x9f]*(?:\x07|\x9c|\x1b\\\\)"
)


def drop_control_codes(text: str) -> str:
    """Remove control codes and escape sequences, so that a text can be stored in a file.

    Unicode's line separators become spaces; newlines and tabs are kept.
    """
    return _CODES.sub(lambda match: " " if match[0].isspace() else "", _SEQUENCES.sub("", text))


def escape_control_codes(text: str) -> str:
    r"""Return the text with control codes escaped (`\x1b`, `\u202e`), so that they do not reach a terminal.

    Names, captions and metadata come from other people's files, and their codes could color, move, hide or
    reorder what is shown. Newlines, tabs and letters of all languages are kept.
    """
    return _CODES.sub(_compute_plainly, text)


def replace_control_codes(name: str) -> str:
    """Replace control codes, line breaks and tabs by _, so that the result can be a file name."""
    return re.sub(r"[\n\t]", "_", _CODES.sub("_", name))


def shorten(text: str, maximum: int) -> str:
    """Return the text, or only its beginning and end if it is longer than `maximum` characters."""
    if len(text) <= maximum:
        return text
    left_out = len(text) - maximum
    return (
        f"{text[: maximum // 2]}... ({left_out:,} characters left out) ...{text[len(text) - maximum // 2 :]}"
    )


def shorten_lines(text: str, maximum: int) -> str:
    """Return a text with each line shortened to at most `maximum` characters."""
    return "\n".join(shorten(line, maximum) for line in text.split("\n"))


# commands are copied as one line
_COMMAND = re.compile(r"(^|[\s:$])(python3?|reelsmith|accelerate|torchrun|pip|bash|cd|export) ")


def wrap_text(text: str, columns: int | None) -> str:
    """Wrap a text at spaces to the width of a terminal; commands and long words are not broken.

    If `columns` is None, because there is no terminal, the text is returned unchanged.
    """
    lines = []
    for line in text.split("\n") if columns else [text]:
        if columns is None or len(line) <= columns or _COMMAND.search(line):
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        lines += wrap(
            line.strip(),
            columns,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def terminal_width(stream: Any) -> int | None:
    """Return the width of a stream's terminal in columns; None if it is not a terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream.isatty() else None
    except (AttributeError, OSError, ValueError):  # the stream is closed or replaced
        return None


def _compute_plainly(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# reasoning that some models write before the answer; it may not be closed
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_QUOTES = {('"', '"'), ("'", "'"), ("“", "”")}


def extract_caption(text: str, max_characters: int = MAX_ANSWER_CHARACTERS) -> str:
    """Return a language model's answer as a one-line caption, cut off after `max_characters`.

    Thoughts before the answer, control codes, line breaks and enclosing quotation marks are removed.
    """
    text = _THOUGHTS.sub("", text).rpartition("</think>")[2]
    text = " ".join(drop_control_codes(text).split())[:max_characters]
    if len(text) > 1 and (text[0], text[-1]) in _QUOTES:
        text = text[1:-1].strip()
    return text

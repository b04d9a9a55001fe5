"""Read what `new` and `run --check` have printed: lines, the files named in them, and remedies."""

import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from browser.jobs import Job
from browser.printed_lines import translate_line
from modules.line_kinds import FAULT, read_kind
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from modules.pages.language import show
from modules.text_encodings import NAMES

MAX_LINES = 400
MAX_LINKS = 3  # maximum number of linked files in a line
MAX_SEARCHED = 3000  # folders up to this size are searched for names with spaces
DIFF = re.compile(r"--- \S+")  # first line of a diff printed by `new --dry_run`
NAMED_ENCODING = re.compile(r"name it: --repair_captions (\S+)$")
OUT = "out"  # remedies: leave the files of a line out; convert captions; run the command of the line
REPAIR = "repair"
RUN = "run"
UNREADABLE = ("left out: ", "cannot be read", "no image that can be read", "is damaged")
_SUFFIXES = "|".join(sorted(suffix.lstrip(".") for suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)))
FILE_NAME = re.compile(rf"[^\s/\\]+\.(?:{_SUFFIXES})\b", re.IGNORECASE)
# a line that equals the name of a file in the folder
LISTED_FILE = re.compile(rf"  (?!python |reelsmith )[^/\\\\:]+\.(?:{_SUFFIXES})", re.IGNORECASE)
COPIES = ": equal copies"
CONVERTED = ("to UTF-8", "now UTF-8", ": left as it is")  # parts of the lines of --repair_captions


class LinePiece(NamedTuple):
    """Part of a printed line: plain text, or the name of a file to link."""

    text: str
    is_file: bool


@dataclass(frozen=True)
class OutputLine:
    """A line that a command has printed, with the action of its button."""

    text: str
    names: tuple[str, ...] = ()  # names of the folder's files in the line
    remedy: str = ""  # OUT, REPAIR, RUN or none
    needs_word: bool = False  # the command has a placeholder for a trigger word
    is_fault: bool = False
    encoding: str = ""  # guessed encoding of captions, if a check names one
    depth: int = 0  # indentation in spaces
    kind: str = ""  # kind of line (modules/line_kinds.py)

    @property
    def is_command(self) -> bool:
        """Whether the line is a command that the page can run, or that needs a word from the user first."""
        return self.remedy == RUN or self.needs_word

    @property
    def shown(self) -> str:
        """The text in the language of the page."""
        return self.text if self.is_command else translate_line(self.text)

    @property
    def pieces(self) -> list[LinePiece]:
        """The shown text in pieces: each file is linked where it is first named."""
        rest: str = show(self.shown)
        pieces = []
        for name in self.names:
            position = max(_find_full(name, rest), rest.find(name))  # Chinese text may touch a name
            if position >= 0:
                pieces += [LinePiece(rest[:position], is_file=False), LinePiece(name, is_file=True)]
                rest = rest[position + len(name) :]
        return [*pieces, LinePiece(rest, is_file=False)]

    @property
    def is_about_repair(self) -> bool:
        """Whether the line lists captions that were, or could not be, converted."""
        return bool(self.encoding) or any(words in self.text for words in CONVERTED)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Files that the remedy OUT removes from the training: all but the first of several equal files."""
        return self.names[1:] if COPIES in self.text else self.names


def read_output_lines(job: Job | None, names: Collection[str] = ()) -> list[OutputLine]:
    """Return the lines that a command has printed, with their remedies, up to the diff of a --dry_run.

    `names` are the names of the files of the command's folder.
    """
    if job is None:
        return []
    lines: list[OutputLine] = []
    offered: set[tuple[str, ...]] = set()  # files for which an earlier line shows the button
    for printed in job.last_lines(MAX_LINES).splitlines():
        if DIFF.match(printed):  # the rest is a diff, which `read_changes` returns
            break
        kind, text = read_kind(printed)
        if not text.strip():
            continue
        if names and _is_mended(text, names):  # none of the files that it reports exists any more
            continue
        line = _read_line(text, names)
        depth = len(text) - len(text.lstrip())
        line = replace(line, depth=depth, kind=kind, is_fault=line.is_fault or kind == FAULT)
        if line.remedy == OUT and line.left_out in offered:  # OUT: the button that leaves the files out
            line = replace(line, remedy="")
        elif line.remedy == OUT:
            offered.add(line.left_out)
        lines.append(line)
    return lines


def _is_mended(text: str, names: Collection[str]) -> bool:
    """Return whether a line reports or lists files of which none exists any more."""
    named = [match[0] for match in FILE_NAME.finditer(text)]
    is_about_files = any(words in text for words in UNREADABLE) or LISTED_FILE.fullmatch(text) is not None
    return is_about_files and bool(named) and not _find_names(text, names)


def _read_line(line: str, names: Collection[str]) -> OutputLine:
    """Return a printed line with its remedy: a command to run, files to repair, or files to leave out."""
    text = line.strip()
    if line.startswith("  ") and text.startswith(("python ", "reelsmith ")):  # commands are printed indented
        needs_word = "--trigger_word WORD" in text  # WORD is a placeholder: the user has to replace it
        return OutputLine(text, remedy="" if needs_word else RUN, needs_word=needs_word)
    found_names = _find_names(text, names)
    is_error = text.startswith("left out: ") or "Something is wrong" in text
    named = NAMED_ENCODING.search(text)
    if named is not None and named[1] in NAMES:
        return OutputLine(text, found_names, remedy=REPAIR, encoding=named[1])
    if "not UTF-8" in text:
        return OutputLine(text, found_names, remedy=REPAIR)
    # a line that is only a name is an item of a list of unreadable files
    is_unreadable = any(phrase in text for phrase in UNREADABLE) or text in names
    lists_copies = COPIES in text and len(found_names) > 1
    if (is_unreadable and len(found_names) == 1) or lists_copies:
        return OutputLine(text, found_names, remedy=OUT, is_fault=is_error)
    return OutputLine(text, found_names, is_fault=is_error)


def _find_names(text: str, names: Collection[str]) -> tuple[str, ...]:
    """Return those of `names` (files of a folder) that a printed line has, in its order, up to MAX_LINKS."""
    if len(names) <= MAX_SEARCHED:
        contained = [name for name in names if name in text]
        found_names = [name for name in contained if _find_full(name, text) >= 0]
    else:
        words = {Path(word.strip(",:;'()")).name for word in text.split()}
        found_names = [name for name in names if name in words]
    return tuple(sorted(found_names, key=lambda name: _find_full(name, text))[:MAX_LINKS])


def _find_full(name: str, text: str) -> int:
    """Return the index of a name that is not part of a longer name; -1 if there is none."""
    match = re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text)
    return -1 if match is None else match.start()


def read_changes(job: Job | None) -> list[str]:
    """Return the lines that list changes to files, as `new --dry_run` prints them."""
    lines = [] if job is None else job.last_lines(MAX_LINES).splitlines()
    for index, line in enumerate(lines):
        if DIFF.match(line):
            return lines[index:]
    return []


def find_command(lines: Sequence[OutputLine], text: str) -> list[str] | None:
    """Return the arguments of a command if it was printed in one of the lines; None for any other text."""
    if not any(line.remedy == RUN and line.text == text for line in lines):
        return None
    return shlex.split(text)

"""Parse the output of `new` and `run --check`: lines, the files that they name, and ways to fix problems."""

import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from browser.jobs.jobs import Job
from browser.jobs.printed_lines import translate_line
from modules.line_kinds import FAULT, read_kind
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from modules.pages.language import show
from modules.text_encodings import NAMES as ENCODING_NAMES

MAX_LINES = 400
MAX_LINKS = 3  # maximum number of linked files in a line
MAX_SEARCHED = 3000  # folders up to this size are searched for names with spaces
DIFF_START = re.compile(r"--- \S+")  # first line of a diff printed by `new --dry_run`
NAMED_ENCODING = re.compile(r"name it: --repair_captions (\S+)$")
OTHER_KIND = re.compile(r"\. --train (\w+) trains an? .*")  # last sentence of a line, which a button replaces
SMALLER_MODELS = " Smaller: "
OTHER_TASK = re.compile(
    r"(?:does not edit, |, or take |\. (?=--task \S+ downloads an adapter))--task ([^\s,]+)"
)
# remedies of a line
LEAVE_OUT_FILES = "out"
REPAIR_CAPTIONS = "repair"  # convert them to UTF-8
RUN_COMMAND = "run"
TRAIN_KIND = "train"  # train something else
TAKE_TASK = "task"  # train another version of the model
UNREADABLE_PHRASES = ("left out: ", "cannot be read", "not an image that can be read", "is damaged")
_SUFFIXES = "|".join(sorted(suffix.lstrip(".") for suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)))
FILE_NAME = re.compile(rf"[^\s/\\]+\.(?:{_SUFFIXES})\b", re.IGNORECASE)
# a line that equals the name of a file in the folder
LISTED_FILE = re.compile(rf"  (?!python |reelsmith )[^/\\\\:]+\.(?:{_SUFFIXES})", re.IGNORECASE)
EQUAL_COPIES = ": equal copies"
CONVERTED_PHRASES = ("to UTF-8", "now UTF-8", ": unchanged: ")  # parts of the lines of --repair_captions


class LinePiece(NamedTuple):
    """Part of a printed line: plain text, or the name of a file to link."""

    text: str
    is_file: bool


@dataclass(frozen=True)
class OutputLine:
    """A line that a command has printed, and the action of the button next to it."""

    text: str
    names: tuple[str, ...] = ()  # names of the folder's files in the line
    remedy: str = ""  # LEAVE_OUT_FILES, REPAIR_CAPTIONS, RUN_COMMAND or none
    needs_trigger_word: bool = False  # the command has a placeholder for a trigger word
    is_error: bool = False
    encoding: str = ""  # guessed encoding of captions, if a check names one
    depth: int = 0  # indentation in spaces
    kind: str = ""  # kind of line (modules/line_kinds.py)
    other_kind: str = ""  # kind of run that TRAIN_KIND selects, as `new --train` names it
    other_tasks: tuple[str, ...] = ()  # versions that TAKE_TASK offers

    @property
    def is_command(self) -> bool:
        """Whether the page can run the line as a command, perhaps after the user types a trigger word."""
        return self.remedy == RUN_COMMAND or self.needs_trigger_word

    @property
    def pieces(self) -> list[LinePiece]:
        """The shown text in pieces: each file is linked where it is first named."""
        rest: str = show(self.text if self.is_command else translate_line(self.text))
        pieces = []
        for name in self.names:
            position = max(_find_whole_name(name, rest), rest.find(name))  # Chinese text may touch a name
            if position >= 0:
                pieces += [LinePiece(rest[:position], is_file=False), LinePiece(name, is_file=True)]
                rest = rest[position + len(name) :]
        return [*pieces, LinePiece(rest, is_file=False)]

    @property
    def is_about_repair(self) -> bool:
        """Whether the line lists captions that were converted, or that could not be converted."""
        return bool(self.encoding) or any(words in self.text for words in CONVERTED_PHRASES)

    @property
    def files_to_leave_out(self) -> tuple[str, ...]:
        """Files that LEAVE_OUT_FILES excludes from training: all but the first of several equal files."""
        return self.names[1:] if EQUAL_COPIES in self.text else self.names


def read_output_lines(job: Job | None, names: Collection[str] = ()) -> list[OutputLine]:
    """Return a command's printed lines, with the actions of their buttons, up to the diff of a --dry_run.

    `names` are the names of the files in the command's folder.
    """
    if job is None:
        return []
    lines: list[OutputLine] = []
    for printed in job.last_lines(MAX_LINES).splitlines():
        if DIFF_START.match(printed):  # the rest is a diff, which `read_changes` returns
            break
        kind, text = read_kind(printed)
        if not text.strip() or (names and _reports_missing_files(text, names)):
            continue
        line = _parse_line(text, names)
        depth = len(text) - len(text.lstrip())
        lines.append(replace(line, depth=depth, kind=kind, is_error=line.is_error or kind == FAULT))
    return _offer_each_file_once(lines)


def _offer_each_file_once(lines: Sequence[OutputLine]) -> list[OutputLine]:
    """Return the lines, without a "leave out" button if an earlier line offers the same files."""
    result = []
    offered: set[tuple[str, ...]] = set()
    for line in lines:
        is_repeated = line.files_to_leave_out in offered
        if line.remedy == LEAVE_OUT_FILES:
            offered.add(line.files_to_leave_out)
            result.append(replace(line, remedy="") if is_repeated else line)
        else:
            result.append(line)
    return result


def _reports_missing_files(text: str, names: Collection[str]) -> bool:
    """Return whether a line is about unreadable files and names only files that no longer exist."""
    named = [match[0] for match in FILE_NAME.finditer(text)]
    is_about_files = (
        any(words in text for words in UNREADABLE_PHRASES) or LISTED_FILE.fullmatch(text) is not None
    )
    return is_about_files and bool(named) and not _find_names(text, names)


def _parse_line(line: str, names: Collection[str]) -> OutputLine:
    """Return a printed line with its button's action: run a command, repair captions or exclude files."""
    text = line.strip()
    if line.startswith("  ") and text.startswith(("python ", "reelsmith ")):  # commands are printed indented
        if "--trigger_word WORD" in text:  # WORD is a placeholder: the user has to replace it
            return OutputLine(text, needs_trigger_word=True)
        return OutputLine(text, remedy=RUN_COMMAND)
    found_names = _find_names(text, names)
    encoding = NAMED_ENCODING.search(text)
    if encoding is not None and encoding[1] in ENCODING_NAMES:
        return OutputLine(text, found_names, remedy=REPAIR_CAPTIONS, encoding=encoding[1])
    if "not UTF-8" in text:
        return OutputLine(text, found_names, remedy=REPAIR_CAPTIONS)
    other_kind = OTHER_KIND.search(text)
    if other_kind is not None:
        text = text[: other_kind.start()]
        return OutputLine(text, found_names, remedy=TRAIN_KIND, other_kind=other_kind[1])
    _, _, smaller_models = text.partition(SMALLER_MODELS)
    other_tasks = re.findall(r"--task (\S+)", smaller_models) or OTHER_TASK.findall(text)
    if other_tasks:
        return OutputLine(text, found_names, remedy=TAKE_TASK, other_tasks=tuple(other_tasks))
    is_error = text.startswith("left out: ") or "Something is wrong" in text
    remedy = LEAVE_OUT_FILES if _may_leave_out(text, found_names, names) else ""
    return OutputLine(text, found_names, remedy=remedy, is_error=is_error)


def _may_leave_out(text: str, found_names: Sequence[str], names: Collection[str]) -> bool:
    """Return whether a line names one unreadable file, or several equal files, which can be excluded."""
    # a line that is only a name is an item of a list of unreadable files
    is_unreadable = any(phrase in text for phrase in UNREADABLE_PHRASES) or text in names
    lists_copies = EQUAL_COPIES in text and len(found_names) > 1
    return (is_unreadable and len(found_names) == 1) or lists_copies


def _find_names(text: str, names: Collection[str]) -> tuple[str, ...]:
    """Return the file names in `names` that a printed line contains, in its order, at most MAX_LINKS."""
    if len(names) <= MAX_SEARCHED:
        contained = [name for name in names if name in text]
        found_names = [name for name in contained if _find_whole_name(name, text) >= 0]
    else:
        words = {Path(word.strip(",:;'()")).name for word in text.split()}
        found_names = [name for name in names if name in words]
    return tuple(sorted(found_names, key=lambda name: _find_whole_name(name, text))[:MAX_LINKS])


def _find_whole_name(name: str, text: str) -> int:
    """Return the index of a name that is not part of a longer name; -1 if there is none."""
    match = re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text)
    return -1 if match is None else match.start()


def read_changes(job: Job | None) -> list[str]:
    """Return the lines that list changes to files, as `new --dry_run` prints them."""
    lines = [] if job is None else job.last_lines(MAX_LINES).splitlines()
    for index, line in enumerate(lines):
        if DIFF_START.match(line):
            return lines[index:]
    return []


def find_command(lines: Sequence[OutputLine], text: str) -> list[str] | None:
    """Return the arguments of a command if it was printed in one of the lines; None for any other text."""
    if not any(line.remedy == RUN_COMMAND and line.text == text for line in lines):
        return None
    return shlex.split(text)

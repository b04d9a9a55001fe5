"""The checklist of a folder: what is ready, needs attention or would end a run, each with a way to fix it.

The folder itself is read each time, so that the row of a fixed problem disappears. Problems that only `new`
finds are read from its output; lines without a row are shown below the list.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from browser.folders.folders import MediaFolder
from browser.pages.new.command_output import (
    LEAVE_OUT_FILES,
    REPAIR_CAPTIONS,
    TAKE_TASK,
    TRAIN_KIND,
    OutputLine,
)
from modules.line_kinds import CAPTIONS, MEND, NEXT, WARNING
from modules.pages.language import join, say, say_count

GOOD, WARN, BAD = "good", "warn", "bad"  # grades of a row
MAX_NAMED_FILES = 3  # maximum number of files named in a row
# kinds of lines of `new` without a row: the page counts missing captions itself, and the
# button at the bottom shows the next step
KINDS_SHOWN_ELSEWHERE = (CAPTIONS, NEXT, MEND)


@dataclass(frozen=True)
class CheckRow:
    """A finding about a folder's files, as a row of the checklist."""

    grade: str
    text: str = ""
    line: OutputLine | None = None  # line printed by `new`, instead of the text
    details: Sequence[OutputLine] = ()  # lines printed below that line: commands or files
    files_to_leave_out: Sequence[str] = ()  # files that its button excludes
    asks_for_captions: bool = False


@dataclass(frozen=True)
class Checklist:
    """The checklist of a folder, and the printed lines of `new` that are not rows of it."""

    rows: Sequence[CheckRow]
    details: Sequence[OutputLine] = ()  # lines without a row, shown below the list


@dataclass
class _PrintedGroup:
    """A printed line, with the commands or files that are printed indented below it."""

    head: OutputLine
    details: list[OutputLine] = field(default_factory=list)

    @property
    def lines(self) -> list[OutputLine]:
        return [self.head, *self.details]


def make_checklist(
    content: MediaFolder | None,
    lines: Sequence[OutputLine],
    *,
    unreadable: Sequence[str] = (),
    trigger_word: str = "",
    applied_remedies: Collection[str] = (),
) -> Checklist:
    """Return the checklist of a training folder: findings about its files as graded rows, the worst first.

    Args:
        content: Counts of the folder's media files; None if there are none.
        lines: Lines that `new` has printed about the folder.
        unreadable: Names of files that currently cannot be read.
        trigger_word: Word that replaces missing captions; "" if there is none.
        applied_remedies: Command lines that have been run, and REPAIR_CAPTIONS if captions were repaired.
    """
    rows = [] if content is None else _list_content_rows(content, unreadable, trigger_word)
    lines_without_row: list[OutputLine] = []
    # an indented line or a command is a detail of the line above it
    groups: list[_PrintedGroup] = []
    for line in lines:
        if groups and (line.depth or line.is_command):
            groups[-1].details.append(line)
        else:
            groups.append(_PrintedGroup(line))
    for group in groups:
        row = _make_row(_without_repeated_names(group, lines), unreadable, applied_remedies)
        if row is None:
            lines_without_row += map(_without_leave_out_button, group.lines)
        else:
            rows.append(row)
    rows.sort(key=lambda row: (BAD, WARN, GOOD).index(row.grade))
    return Checklist(rows, details=lines_without_row)


def _without_repeated_names(group: _PrintedGroup, lines: Sequence[OutputLine]) -> _PrintedGroup:
    """Drop detail lines that are only a file name if another line has a button that excludes this file."""
    names_with_button: set[str] = set()
    for line in lines:
        if line.remedy == LEAVE_OUT_FILES:
            names_with_button.update(line.files_to_leave_out)
    details = [detail for detail in group.details if detail.remedy or detail.text not in names_with_button]
    return _PrintedGroup(group.head, details)


def _without_leave_out_button(line: OutputLine) -> OutputLine:
    """Return a line without its button that excludes files, because a row of the list has that button."""
    return replace(line, remedy="") if line.remedy == LEAVE_OUT_FILES else line


def _list_content_rows(content: MediaFolder, unreadable: Sequence[str], trigger_word: str) -> list[CheckRow]:
    """Return the rows about a folder's files: how many there are, unreadable files, missing captions."""
    # files without caption and unreadable files get rows of their own below
    rows = [CheckRow(GOOD, replace(content, num_uncaptioned=0, num_unreadable=0).summary)]
    if unreadable:
        names = join(", ", unreadable[:MAX_NAMED_FILES])
        if len(unreadable) > MAX_NAMED_FILES:
            names = say("%(names)s and others", names=names)
        text = say_count(
            len(unreadable),
            "%(n)s file cannot be read: %(names)s",
            "%(n)s files cannot be read: %(names)s",
            names=names,
        )
        rows.append(CheckRow(BAD, text, files_to_leave_out=unreadable))
    rows.append(_make_caption_row(content.num_uncaptioned, trigger_word))
    return rows


def _make_caption_row(num_uncaptioned: int, trigger_word: str) -> CheckRow:
    """Return the row about files without a caption, which is good if a trigger word replaces captions."""
    if not num_uncaptioned:
        return CheckRow(GOOD, say("each has a caption"))
    if not trigger_word:
        text = say_count(num_uncaptioned, "%(n)s file has no caption", "%(n)s files have no caption")
        return CheckRow(WARN, text, asks_for_captions=True)
    text = say_count(
        num_uncaptioned,
        "%(n)s file has no caption: %(word)s stands for it",
        "%(n)s files have no caption: %(word)s stands for it",
        word=trigger_word,
    )
    return CheckRow(GOOD, text)


def _make_row(
    group: _PrintedGroup, unreadable: Sequence[str], applied_remedies: Collection[str]
) -> CheckRow | None:
    """Return the row of a printed line and its details; None if it needs no attention any more."""
    # `unreadable` are names of files that another row lists.
    head = group.head
    is_repaired = head.remedy == REPAIR_CAPTIONS and REPAIR_CAPTIONS in applied_remedies
    is_in_other_row = head.remedy == LEAVE_OUT_FILES and set(head.files_to_leave_out) <= set(unreadable)
    if head.kind in KINDS_SHOWN_ELSEWHERE or is_repaired or is_in_other_row:
        return None
    # details are commands to run or names of files
    settled_texts = {*applied_remedies, *unreadable}
    open_details = [detail for detail in group.details if detail.text not in settled_texts]
    if head.text.endswith(":") and not open_details:  # the line announces details, and none is left
        return None
    grade = _find_grade(head, open_details)
    return CheckRow(grade, line=head, details=open_details) if grade else None


def _find_grade(head: OutputLine, details: Sequence[OutputLine]) -> str:
    """Return BAD for an error or an offer to exclude files, WARN for a warning or another remedy, or ""."""
    if head.is_error or any(detail.remedy == LEAVE_OUT_FILES for detail in details):
        return BAD
    has_remedy = head.remedy not in ("", TAKE_TASK, TRAIN_KIND) or any(
        detail.is_command for detail in details
    )
    return WARN if has_remedy or head.kind == WARNING else ""

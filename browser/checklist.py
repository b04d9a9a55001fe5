"""The checklist of a folder: what is ready, needs attention or would end a run, each with its remedy.

What the folder says by itself is asked of it each time, so that a mended row is gone. What only `new` finds
out is read of its lines; those that need nobody stand behind the list.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from browser.command_output import OUT, REPAIR, OutputLine
from browser.folders import MediaFolder
from modules.line_kinds import CAPTIONS, MEND, NEXT, WARNING
from modules.pages.language import join, say, say_count

GOOD, WARN, BAD = "good", "warn", "bad"  # grades of a row
LISTED = 3  # maximum number of files named in a row
# kinds of lines of `new` without a row: the page counts missing captions itself, and the
# button at the bottom shows the next step
NO_ROWS = (CAPTIONS, NEXT, MEND)


@dataclass(frozen=True)
class CheckRow:
    """A finding about a folder's files, as a row of the checklist."""

    grade: str
    text: str = ""
    line: OutputLine | None = None  # line printed by `new`, instead of the text
    items: Sequence[OutputLine] = ()  # lines printed below that line: commands or files
    left_out: Sequence[str] = ()  # files that its button leaves out
    asks_for_captions: bool = False


@dataclass(frozen=True)
class Checklist:
    """The checklist of a folder, and the lines printed by `new` that did not become rows."""

    rows: Sequence[CheckRow]
    details: Sequence[OutputLine] = ()


@dataclass
class _PrintedGroup:
    """A printed line, with the commands or files that are indented below it."""

    head: OutputLine
    items: list[OutputLine] = field(default_factory=list)

    @property
    def lines(self) -> list[OutputLine]:
        return [self.head, *self.items]


def make_checklist(
    content: MediaFolder | None,
    lines: Sequence[OutputLine],
    *,
    unreadable: Sequence[str] = (),
    word: str = "",
    mended: Collection[str] = (),
) -> Checklist:
    """Return the checklist of a folder, the worst rows first.

    Args:
        content: Counts of the folder's files; None if it has none.
        lines: Lines that `new` has printed.
        unreadable: Names of files that cannot be read at present.
        word: Trigger word that stands for missing captions; "" if there is none.
        mended: Remedies that have been applied: command lines, or REPAIR.
    """
    rows = [] if content is None else _list_counted(content, unreadable, word)
    details: list[OutputLine] = []
    # names of files for which a line offers a button that leaves them out
    with_button = {name for line in lines if line.remedy == OUT for name in line.left_out}
    for group in _group(lines):
        items = [item for item in group.items if item.remedy or item.text not in with_button]
        row = _grade(_PrintedGroup(group.head, items), unreadable, mended)
        if row is not None:
            rows.append(row)
            continue
        # lines without a row go below the list
        for line in group.lines:  # shown without a button, because the file already has one
            details.append(replace(line, remedy="") if line.remedy == OUT else line)
    return Checklist(sorted(rows, key=lambda row: (BAD, WARN, GOOD).index(row.grade)), details)


def _list_counted(content: MediaFolder, unreadable: Sequence[str], trigger_word: str) -> list[CheckRow]:
    """Return the checklist rows about a folder's files: their numbers, unreadable ones, missing captions."""
    # files without caption and unreadable files get rows of their own below
    rows = [CheckRow(GOOD, replace(content, uncaptioned=0, unreadable=0).words)]
    if unreadable:
        names = join(", ", unreadable[:LISTED])
        text = say_count(
            len(unreadable),
            "%(n)s file cannot be read: %(names)s",
            "%(n)s files cannot be read: %(names)s",
            names=names if len(unreadable) <= LISTED else say("%(names)s and others", names=names),
        )
        rows.append(CheckRow(BAD, text, left_out=unreadable))
    if content.uncaptioned and trigger_word:
        text = say_count(
            content.uncaptioned,
            "%(n)s file has no caption: %(word)s stands for it",
            "%(n)s files have no caption: %(word)s stands for it",
            word=trigger_word,
        )
        rows.append(CheckRow(GOOD, text))
    elif content.uncaptioned:
        text = say_count(content.uncaptioned, "%(n)s file has no caption", "%(n)s files have no caption")
        rows.append(CheckRow(WARN, text, asks_for_captions=True))
    else:
        rows.append(CheckRow(GOOD, say("each has a caption")))
    return rows


def _group(lines: Iterable[OutputLine]) -> list[_PrintedGroup]:
    groups: list[_PrintedGroup] = []
    for line in lines:
        if groups and (line.depth or line.is_command):
            groups[-1].items.append(line)
        else:
            groups.append(_PrintedGroup(line))
    return groups


def _grade(group: _PrintedGroup, unreadable: Sequence[str], mended: Collection[str]) -> CheckRow | None:
    """Return the checklist row of a printed line and its details; None if it needs no row of its own.

    `unreadable` are names of files that another row lists; `mended` are remedies that were applied.
    """
    head = group.head
    if head.kind in NO_ROWS:  # missing captions and next steps, which the page shows elsewhere
        return None
    if head.remedy == OUT and {*head.left_out} <= {*unreadable}:
        return None  # another row shows it
    if head.remedy == REPAIR and REPAIR in mended:
        return None
    items = [item for item in group.items if item.text not in mended and item.text not in unreadable]
    if head.text.endswith(":") and not items:  # all items announced by this line are fixed
        return None
    if head.is_fault or any(item.remedy == OUT for item in items):
        return CheckRow(BAD, line=head, items=items)
    if head.remedy or any(item.is_command for item in items) or head.kind == WARNING:
        return CheckRow(WARN, line=head, items=items)
    return None

"""Show a summary as a box: the plan of a run, and its result.

On a terminal the box is drawn with borders; anywhere else it is aligned lines. It is a log record of level
INFO, so other processes than the main one stay silent, and a progress bar moves out of its way.
"""

import contextlib
import io
import logging
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from modules.control_codes import escape_control_codes

logger = logging.getLogger(__name__)

MIN_COLUMNS, MAX_COLUMNS = 40, 110  # minimum and maximum width of a box in columns
Row = tuple[str, str | None]
MAX_LISTED = 6  # maximum number of names listed in a message
MAX_SECONDS = 1e10  # maximum duration shown, 300 years, because a file may contain any number


def show_box(title: str, rows: Iterable[Row], commands: Sequence[Row] = ()) -> None:
    """Log a box with one line per row: (label, text). Rows whose text is None or empty are left out.

    `commands` (what it does, command) are shown below the box and never wrapped, so that they can be copied.
    All texts are shown verbatim: markup is not interpreted and control codes are escaped. A terminal
    draws the box; a log file gets aligned lines.
    """
    title = escape_control_codes(title)
    shown = [(escape_control_codes(label), escape_control_codes(text)) for label, text in rows if text]
    lines_below = []
    for heading, command in commands:
        if command:
            lines_below += [f"{escape_control_codes(heading)}:", f"  {escape_control_codes(command)}"]
    label_columns = max((count_columns(label) for label, _ in shown), default=0)
    indent = " " * (len("  ") + label_columns + len(": "))
    plain_lines = [title]
    for label, text in shown:
        padding = " " * (label_columns - count_columns(label))
        first, *following = text.split("\n")
        plain_lines += [f"  {label}: {padding}{first}", *(indent + line for line in following)]
    draw = partial(draw_box, title, shown, lines_below)
    logger.info("%s", "\n".join([*plain_lines, *lines_below]), extra={"draw": draw})


def count_columns(text: str) -> int:
    """Return the width of a text in terminal columns: East Asian characters take two, accents none."""
    return sum(
        2 if unicodedata.east_asian_width(char) in "FW" else int(not unicodedata.combining(char))
        for char in text
    )


def draw_box(
    title: str,
    rows: Sequence[tuple[str, str]],
    below: Sequence[str],
    colour: bool,
    unicode: bool,
    columns: int | None = None,
) -> str:
    """Draw a box for a terminal, with lines below it.

    `rows` are pairs of label and text. With `colour`, use ANSI colors. With `unicode`, draw with line
    characters instead of ASCII. `columns` is the width of the terminal; None asks the system.
    """
    from rich import box  # slow, and only needed for a terminal
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    columns = shutil.get_terminal_size().columns if columns is None else columns
    console = Console(
        file=io.StringIO(),
        width=max(MIN_COLUMNS, min(columns, MAX_COLUMNS)),
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
        _environ={},
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(label), Text(text))
    panel = Panel(
        table,
        title=Text(title, style="bold"),
        title_align="left",
        box=box.ROUNDED if unicode else box.ASCII,
        border_style="dim",
    )
    console.print(panel)
    drawn: str = console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]
    return "\n".join([drawn, *below])


def show_traceback() -> None:
    """Print the current exception with its traceback, because it is an error of this program."""
    from rich.console import Console  # slow, and only needed for errors on a terminal

    Console(stderr=True).print_exception()


def format_duration(seconds: float) -> str:
    """Format a duration for people: `45 s`, `12 min`, `2 h 10 min`, `3 d 4 h`."""
    total = round(min(max(0.0, seconds), MAX_SECONDS))
    if total < 100:
        return f"{total} s"
    minutes = round(total / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(total / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def format_size(size_bytes: float) -> str:
    """Format a number of bytes for people: `312 MB`, `1.4 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= size:
            value = size_bytes / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{round(size_bytes)} bytes"


def format_count(number: int, noun: str) -> str:
    """Format a count with its noun: `1 clip`, `2 clips`, `2 batches`."""
    if number == 1:
        return f"1 {noun}"
    plural_ending = "es" if noun.endswith(("tch", "sh", "x")) else "s"
    return f"{number} {noun}{plural_ending}"


def list_some(names: Sequence[str], maximum: int = MAX_LISTED) -> str:
    """List up to `maximum` names, and how many more there are."""
    tail = f" and {len(names) - maximum} more" if len(names) > maximum else ""
    return ", ".join(names[:maximum]) + tail


_VERBS = {"are": "is", "were": "was", "have": "has", "give": "gives", "need": "needs"}


def pluralize(number: int, words: str) -> str:
    """Format a count with words in singular or plural: `1 table has no item`, `2 tables have ...`."""
    if number != 1:
        return f"{number} {words}"
    nouns, colon, tail = words.partition(": ")
    verb = re.search(rf"\b({'|'.join(_VERBS)})\b", nouns)
    predicate = ""
    if verb is not None:
        predicate = _VERBS[verb[0]] + nouns[verb.end() :]
        nouns = nouns[: verb.start()]
    nouns = re.sub(r"^(\w+?)(ie)?s\b", lambda match: match[1] + ("y" if match[2] else ""), nouns)
    nouns = re.sub(r"^(\w+ or \w+?)s\b", r"\1", nouns)
    nouns = re.sub(r"^(text \w+?)s\b", r"\1", nouns)
    return f"1 {nouns}{predicate}{colon}{tail}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Disable logging in the block, because the real run logs the same lines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

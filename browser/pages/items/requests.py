"""Write requests about items into the file that a run with --watch_items obeys and removes."""

import contextlib
from pathlib import Path

from browser.pages.items.run_items import RunItem
from modules.atomic_write import explain_errors, write_text
from modules.file_locks import only_one
from modules.open_files import replace_file
from modules.pages.language import refusal
from modules.text_files import bad_character, read_content
from training.reports.item_turns import CAPTION, MAX_REQUEST_BYTES


def make_line(word: str, item: RunItem, caption: str = "") -> str:
    """Return the line of a request about an item.

    Raises:
        OptionError: If a line cannot name the item or contain the caption.
    """
    if bad_character(item.key) is not None or "\n" in item.key or (word == CAPTION and ": " in item.key):
        raise refusal("%(name)s: a request cannot name this item. Rename its media file.", name=item.key)
    if word != CAPTION:
        return f"{word} {item.key}"
    text = caption.strip()
    if not text:
        raise refusal("Type the new caption.")
    if len(text.splitlines()) > 1:
        raise refusal("A requested caption is a single line: remove the line break.")
    reason = bad_character(text)
    if reason is not None:
        raise refusal("a caption cannot contain %(reason)s", reason=reason)
    return f"{word} {item.key}: {text}"


def add_request(path: Path, line: str) -> None:
    """Add a line to the file of requests, without losing lines that the run has not obeyed yet.

    Both this function and the run rename the file before they read it, so a line is read by one of them.

    Raises:
        OptionError: If too many requests wait.
        OutputError: If the file cannot be written.
    """
    taken = path.with_name(f"{path.name}.asking")
    with explain_errors(path), only_one(path.with_name(f".{path.name}.lock")):
        with contextlib.suppress(FileNotFoundError):
            replace_file(path, taken)
        earlier = ""
        with contextlib.suppress(FileNotFoundError):
            earlier = read_content(taken, MAX_REQUEST_BYTES).decode("utf-8", "replace")
        lines = [*filter(None, earlier.splitlines()), line]
        text = "\n".join(lines) + "\n"
        is_too_long = len(text.encode()) > MAX_REQUEST_BYTES
        write_text(path, earlier if is_too_long else text)
        taken.unlink(missing_ok=True)
    if is_too_long:
        raise refusal("Too many requests wait for the run: try again after its next step.")

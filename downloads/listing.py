"""The list of released files as text for a terminal.

Standard library only, so that --list answers at once.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from downloads.catalogue import Component, ModelSet
from modules.command import quote_command
from modules.control_codes import escape_control_codes, terminal_width, wrap_text
from modules.pages.language import say

UNVERIFIED = "as far as known: read the model's page"


def gigabytes(size_bytes: int) -> str:
    """Format a size: "11.4 GB", "17 MB"; "nothing" for 0."""
    if not size_bytes:
        return say("nothing")
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 5e7 else f"{max(1, round(size_bytes / 1e6))} MB"


def describe_size(component: Component) -> str:
    """Return the size of a component in gigabytes, as text.

    Sizes are recorded only for large files. Without one, a LoRA is "not known", and other files are small.
    """
    if component.size_bytes is not None:
        return gigabytes(component.size_bytes)
    return "not known" if "LoRA" in component.role else "a few MB"


def total_bytes(components: Iterable[Component]) -> int:
    """Sum the recorded sizes of components; those without a recorded size count as 0."""
    return sum(component.size_bytes or 0 for component in components)


def describe_total(components: Sequence[Component]) -> str:
    """Return the total download size of a task's files as text; for a single file, see `describe_size`."""
    if len(components) == 1:
        return describe_size(components[0])
    return gigabytes(total_bytes(components))


def print_list(sets: Sequence[ModelSet], folder: Path) -> None:
    """Print the files of a single task, or one line for each of several tasks."""
    print_lines(describe_set(sets[0], folder) if len(sets) == 1 else describe_sets(sets))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines with control codes escaped, wrapped to the width of the terminal."""
    text = "\n".join(escape_control_codes(line) for line in lines)
    sys.stdout.write(wrap_text(text, terminal_width(sys.stdout)) + "\n")


def describe_set(model_set: ModelSet, folder: Path) -> list[str]:
    """Return lines about the files of a task: option, path, size, repository, license."""
    rows = [
        (
            component.option or "",
            str(folder / component.path),
            describe_size(component),
            component.files[0].repository,
            component.licence.name,
        )
        for component in model_set.components
    ]
    title = f"{model_set.family} {model_set.task}: {model_set.about}, released by {model_set.released_by}"
    total = f"  together {describe_total(model_set.components)}"
    licenses = describe_licenses(model_set)
    if excludes_many(model_set):  # such licenses come first
        return [*licenses, "", title, *in_columns(rows), total]
    return [title, *in_columns(rows), total, "", *licenses]


def excludes_many(model_set: ModelSet) -> bool:
    """Return whether a model's license excludes many users, so that it must be shown first."""
    return any(component.licence.comes_first for component in model_set.components)


def describe_sets(sets: Iterable[ModelSet]) -> list[str]:
    """Return the lines of a table of tasks and download sizes, and a command that lists a task's files."""
    rows = []
    for model in sets:
        size = describe_total(model.components)
        rows.append((model.family, model.task, size, model.about))
    command = quote_command(["python", "tools/download.py", "--family", "FAMILY", "--task", "TASK", "--list"])
    example = f"{command} shows the files of one"
    return [*in_columns([("family", "task", "size", ""), *rows]), "", example]


def describe_licenses(model_set: ModelSet) -> list[str]:
    """Return a line for each license of a task's files: its name, terms and address."""
    licenses = dict.fromkeys(component.licence for component in model_set.components)
    lines = []
    for licence in licenses:
        note = "" if licence.verified else f" ({UNVERIFIED})"
        lines.append(f"{licence.name}: {licence.terms}{note}. {licence.url}")
    return lines


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines

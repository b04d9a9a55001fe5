"""The list of released files as text for a terminal, and as the tables of the pages in docs/.

Standard library only, so that --list answers at once.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from downloads.catalogue import (
    Component,
    ModelSet,
    describe_family,
    families,
    known_licences,
    model_sets,
)
from modules.command import as_typed
from modules.control_codes import escape_control_codes

UNVERIFIED = "as far as known: read the model's page"


def gigabytes(size_bytes: int) -> str:
    """Return a size for people: "11.4 GB", "17 MB"."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 5e7 else f"{max(1, round(size_bytes / 1e6))} MB"


def describe_size(component: Component) -> str:
    """Return the size of a component, as far as it is known."""
    return "a few MB" if component.size_bytes is None else gigabytes(component.size_bytes)


def total_bytes(components: Iterable[Component]) -> int:
    """Return the size of components together; unknown sizes, of a few MB, are left out."""
    return sum(component.size_bytes or 0 for component in components)


def print_list(sets: Sequence[ModelSet], folder: Path) -> None:
    """Print the files of one set, or one line for each of several."""
    print_lines(describe_set(sets[0], folder) if len(sets) == 1 else describe_sets(sets))


def print_lines(lines: Iterable[str]) -> None:
    """Write lines to standard output, with control codes escaped."""
    sys.stdout.write("\n".join(escape_control_codes(line) for line in lines) + "\n")


def describe_set(model_set: ModelSet, folder: Path) -> list[str]:
    """Return lines about the files of a task: option, path, size, repository, licence."""
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
    total = f"  together {gigabytes(total_bytes(model_set.components))}"
    return [title, *_columns(rows), total, "", *describe_licences(model_set)]


def describe_sets(sets: Iterable[ModelSet]) -> list[str]:
    """Return one line for each task, with the size of all its files."""
    rows = [(one.family, one.task, gigabytes(total_bytes(one.components)), one.about) for one in sets]
    command = as_typed(["python", "tools/download.py", "--family", "FAMILY", "--task", "TASK", "--list"])
    example = f"{command} shows the files of one"
    return [*_columns([("family", "task", "size", ""), *rows]), "", example]


def describe_licences(model_set: ModelSet) -> list[str]:
    """Return one line for each licence of a task's files."""
    licences = dict.fromkeys(component.licence for component in model_set.components)
    return [
        f"{one.name}: {one.terms}{'' if one.verified else f' ({UNVERIFIED})'}. {one.url}" for one in licences
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def family_table(family: str) -> list[str]:
    """Return the table of a family's page: the files of its tasks."""
    columns = ("what", "option", "repository", "file", "size", "licence")
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    tasks = {one.task for one in model_sets() if one.family == family}
    for component, needed_by in sorted(_components_of(family).items(), key=lambda item: _order(item[0])):
        which = "" if tasks == set(needed_by) else f" ({', '.join(needed_by)})"
        rows.append(_row(f"{component.role}{which}", component))
    return rows


def _components_of(family: str) -> dict[Component, list[str]]:
    """Return the components of a family's tasks, each with the tasks that need it."""
    found: dict[Component, list[str]] = {}
    for one in [*model_sets(), *model_sets(fp8_encoders=True)]:
        for component in one.components if one.family == family else ():
            names = found.setdefault(component, [])
            names += [] if one.task in names else [one.task]
    return found


def _order(component: Component) -> tuple[int, str]:
    """Return the place of a row: by the option's place in a command; tokenizers and 8 bits behind theirs."""
    places = (
        *("--ckpt", "--dit", "--dit_high_noise", "--lora_weight", "--lora_weight_high_noise"),
        *("--vae", "--ae", "--t5", "--t5xxl", "--text_encoder", "--byt5", "--gemma2"),
        *("--text_encoder1", "--clip_l", "--text_encoder2", "--clip"),
        *("--image_encoder", "--model"),
    )
    if component.option is not None:
        return places.index(component.option), ""
    beside = {
        "clip_l": "--text_encoder2",
        "facefix": "--model",
        "qwen_2.5_vl": "--text_encoder",
        "t5xxl": "--t5xxl",
        "tokenizer": "--gemma2",
    }
    return places.index(beside.get(component.path.parent.name, "--text_encoder1")), "beside it"


def _row(what: str, component: Component) -> str:
    files = component.files
    start = os.path.commonprefix([file.file for file in files])
    names = [f"{start}*"] if len(files) > 1 and start else [file.file for file in files]
    cells = (
        what,
        f"`{component.option}`" if component.option else "found by itself",
        f"`{files[0].repository}`",
        ", ".join(f"`{name}`" for name in names),
        describe_size(component),
        component.licence.name,
    )
    return f"| {' | '.join(cells)} |"


def models_tables() -> str:
    """Return the part of docs/models.md from the first family on: all files, and the licences."""
    lines: list[str] = []
    for family in families():
        title, page = describe_family(family)
        lines += [f"## {title}", "", f"`--family {family}`; how to use them: [{page}]({page})", ""]
        lines += ["| `--task` | what it does | released by | all files |", "|---|---|---|---|"]
        lines += [
            f"| `{one.task}` | {one.about} | `{one.released_by}` | {gigabytes(total_bytes(one.components))} |"
            for one in model_sets()
            if one.family == family
        ]
        lines += ["", *family_table(family), ""]
    lines += ["## Licences", "", "| licence | terms to know |", "|---|---|"]
    for licence in known_licences():
        mark = "" if licence.verified else f" ({UNVERIFIED})"
        lines.append(f"| [{licence.name}]({licence.url}){mark} | {licence.terms} |")
    return "\n".join(lines) + "\n"

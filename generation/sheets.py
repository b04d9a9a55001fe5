"""Comparison sheets: one prompt with all values of one or two options, as one labelled picture or video.

Each cell equals the result of a single run with its values, to the bit, and is saved like it; the sheet is
drawn from the saved files. All cells of all sheets are one batch: texts and models are loaded once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from blissful_tuner.metadata import as_png_texts, as_tags
from generation.grids import LINE, TALLEST, ClipGrid, Row, compose, is_picture, middle_of, play
from generation.jobs import GenerationJob, GenerationRun, tell_unused_sources
from generation.making import make_job, make_outputs
from generation.outputs import own_stem, words_of
from generation.progress import in_short
from generation.request import draw_seed
from generation.sheet_options import Axis, cells_of
from modules.command import as_typed, each_warning_once
from modules.devices import Failures
from modules.errors import CheckpointError
from modules.media.writing import write_png, write_video

logger = logging.getLogger(__name__)

CELL = 512  # pixels: the longer side of a clip in a sheet, if there is room
MOST_OF_TITLE = 300  # characters

Place = tuple[int, int]  # column, row


@dataclass(frozen=True)
class Sheet:
    """The cells of one prompt line by their places; those that cannot be made are missing."""

    label: str
    axes: Sequence[Axis]
    cells: Mapping[Place, GenerationJob]


def make_sheets(run: GenerationRun, lines: Mapping[str, str | None], where: str = "") -> tuple[Failures, int]:
    """Make a sheet of each prompt line.

    lines: label -> text; None: the command line alone. where: goes before labels in warnings. Returns the
    failures, and the number of cells. Raises CheckpointError if a model file is wrong.
    """
    failures, sheets = Failures(), []
    with each_warning_once():
        for label, line in lines.items():
            with failures.note_errors(label, fatal=CheckpointError):
                values = {} if line is None else run.read_line(line, f"{where}{label}")
                sheets.append(lay_out(run, label, values, failures))
    jobs = [job for sheet in sheets for job in sheet.cells.values()]
    if jobs:
        tell_unused_sources(run.options.request.source, jobs)
    made = make_outputs(run, jobs, failures) if jobs else {}
    for sheet in sheets:
        if any(job.label in made for job in sheet.cells.values()):
            logger.info("Sheet of %s: %s", sheet.label, write_sheet(run, sheet, made))
    cells = sum(1 for _ in cells_of(run.options.axes, {}))
    return failures, cells * len(lines)


def lay_out(run: GenerationRun, label: str, line: Mapping[str, object], failures: Failures) -> Sheet:
    """Make the jobs of a prompt line's cells. Without any seed all cells have one drawn for the line.

    Loads no network. Cells that cannot be made are noted as failures.
    """
    axes, jobs = run.options.axes, {}
    if run.options.request.seed is None:
        line = {"seed": draw_seed(), **line}
    for place, values in cells_of(axes, line):
        name = ", ".join([label, *(_say(axis, index) for axis, index in zip(axes, place, strict=True))])
        with failures.note_errors(name, fatal=CheckpointError):
            column, row = (*place, 0)[:2]
            jobs[column, row] = make_job(run, name, values)
    return Sheet(label, axes, jobs)


def write_sheet(run: GenerationRun, sheet: Sheet, made: Mapping[str, Path]) -> Path:
    """Draw the sheet of finished cells: a PNG if all are pictures, else a video. Returns its path.

    made: files by the labels of their jobs.
    """
    output = run.options.output
    paths = {place: made[job.label] for place, job in sheet.cells.items() if job.label in made}
    grid = draw_grid(sheet, paths)
    metadata = {} if output.no_metadata else sheet_metadata(run, sheet, paths)
    prompt = sheet.cells[next(iter(paths))].prepared.asked.prompt if output.prompt_in_name else ""
    name = "_".join(part for part in (f"{datetime.now():%Y%m%d-%H%M%S}", "sheet", words_of(prompt)) if part)
    with own_stem(output.save_path, name) as stem:
        if all(map(is_picture, grid.made)):
            path = output.save_path / f"{stem}.png"
            pictures = [[middle_of(cell) for cell in row.paths] for row in grid.rows]
            write_png(path, compose(grid, pictures), as_png_texts(metadata))
        else:
            path = output.save_path / f"{stem}{output.format.suffix}"
            write_video(path, play(grid), grid.rows[0].fps, codec=output.format.codec, tags=as_tags(metadata))
    return path


def draw_grid(sheet: Sheet, paths: Mapping[Place, Path]) -> ClipGrid:
    """Label rows and columns with the values of the axes; the prompt is the title, unless it is an axis."""
    across, down = sheet.axes[0], sheet.axes[1:]
    rows = len(down[0].texts) if down else 1
    first = sheet.cells[next(iter(paths))].prepared
    columns = tuple(_say(across, index) for index in range(len(across.texts)))
    has_prompts = any(axis.name == "prompt" for axis in sheet.axes)
    return ClipGrid(
        columns,
        tuple(
            Row(
                _say(down[0], row) if down else "",
                first.fps,
                tuple(paths.get((column, row)) for column in range(len(columns))),
            )
            for row in range(rows)
        ),
        title="" if has_prompts else in_short(first.asked.prompt, MOST_OF_TITLE),
        cell=min(CELL, TALLEST // rows - LINE),
    )


def sheet_metadata(run: GenerationRun, sheet: Sheet, paths: Mapping[Place, Path]) -> dict[str, str]:
    """Return the metadata that all cells share, the axes as --sheet takes them, and the file of each cell."""
    of_cells = [run.metadata(sheet.cells[place].prepared) or {} for place in paths]
    common = {
        key: text for key, text in of_cells[0].items() if all(other.get(key) == text for other in of_cells)
    }
    common["bt_sheet"] = as_typed(run.options.sheet.sheet or ())
    for (column, row), path in sorted(paths.items(), key=lambda item: item[0][::-1]):
        places = zip(sheet.axes, (column, row), strict=False)
        said = ", ".join(_say(axis, index) for axis, index in places)
        common[f"bt_sheet_cell_{row + 1}_{column + 1}"] = f"{path.name}: {said}"
    return common


def _say(axis: Axis, index: int) -> str:
    return f"{axis.name} = {axis.texts[index]}"

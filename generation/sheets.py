"""Arrange clips in grids of rows and columns, and generate comparison sheets of one prompt.

A sheet shows all values of one or two options as one labeled image or video. Each cell is equal to the bit to
the result of a single run with its values, and is saved like it; the sheet is drawn from the saved files.
All cells of all sheets are one batch: each model is loaded once.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blissful_tuner.metadata import as_png_texts, as_tags
from generation.grid_options import Axis, list_cells
from generation.making import make_outputs
from generation.outputs import make_prompt_slug, reserve_stem
from generation.progress import shorten_prompt
from generation.request import GenerationJob, GenerationRun, draw_seed, make_job, map_lines
from modules.command import quote_command
from modules.control_codes import escape_control_codes
from modules.devices import Failures
from modules.errors import CheckpointError
from modules.media.reading import Frame, image_suffixes, read_image, split_alpha, video_frames
from modules.media.writing import write_png, write_video
from modules.pages.page import embed_clip, write_page

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).resolve().parent / "compare.html"
# pixels: longer side of a cell, its minimum; width of a grid
MAX_CELL_SIDE, NARROWEST_CELL, WIDEST = (
    256,
    64,
    3840,
)
BACKGROUND, EMPTY = "white", (225, 225, 225)
# pixels: height of column labels and of row labels, size of letters
HEADING_HEIGHT, TEXT_HEIGHT, FONT_SIZE = (
    20,
    24,
    13,
)
SQUARE, SQUARE_SHADES = 10, (187, 238)  # size in pixels and grays of the checkerboard behind transparency
NARROWEST_COLUMN = 128  # pixels, so that the label is readable
MAX_FRAMES = 2000  # maximum number of frames shown of a clip
MAX_OPEN_VIDEOS, MAX_VIDEO_HEIGHT = 100, 4096  # limits of a video: files open at once, height in pixels


@dataclass(frozen=True)
class Row:
    """A prompt and its clips, one for each column of the sheet; None where a clip failed."""

    prompt: str
    fps: float
    paths: tuple[Path | None, ...]
    details: str = ""
    strength: str = ""
    commands: tuple[str, ...] = ()  # for each column, the options of the generation script for its clip


@dataclass(frozen=True)
class ClipGrid:
    """All clips of a comparison as a grid."""

    columns: tuple[str, ...]  # their headings
    rows: tuple[Row, ...]
    title: str = ""  # a line above the columns
    max_cell_side: int = (
        MAX_CELL_SIDE  # maximum length of a cell's longer side in pixels; smaller clips are not enlarged
    )

    @property
    def clips(self) -> list[Path]:
        """Paths of the clips that exist, row by row."""
        return [path for row in self.rows for path in row.paths if path is not None]


def write_grids(folder: Path, stem: str, grid: ClipGrid, title: str) -> list[Path]:
    """Write `stem`.html with a title, .png and, unless all cells are images, .mp4; return the paths."""
    page, sheet, video = (folder / f"{stem}{suffix}" for suffix in (".html", ".png", ".mp4"))
    _write_page(page, grid, title)
    write_png(sheet, compose(grid, _read_middle_frames(grid)))
    if all(map(is_image, grid.clips)):
        return [page, sheet]
    # limited by the number of videos that can be open at the same time, and by the height of the frame
    rows_to_open = MAX_OPEN_VIDEOS // len(grid.columns)
    rows_in_height = MAX_VIDEO_HEIGHT // (MAX_CELL_SIDE + TEXT_HEIGHT)
    max_rows = max(1, min(rows_to_open, rows_in_height))
    if max_rows < len(grid.rows):
        logger.warning("%s shows the first %d of %d prompts", video.name, max_rows, len(grid.rows))
    shorter_grid = replace(grid, rows=grid.rows[:max_rows])
    write_video(video, play_side_by_side(shorter_grid), grid.rows[0].fps, crf=18, preset="medium")
    return [page, sheet, video]


def _write_page(path: Path, grid: ClipGrid, title: str) -> None:
    """Write an HTML page with a grid's clips; rows with the same prompt are adjacent."""
    prompts = []
    for _, rows in groupby(grid.rows, key=lambda row: (row.prompt, row.details)):
        prompt_rows = []
        for index, row in enumerate(rows):
            cells = [*_embed_cells(grid.columns, row, is_lower=index > 0)]
            prompt_rows.append((row, cells))
        prompts.append({"rows": prompt_rows})
    write_page(path, TEMPLATE, title, {"columns": grid.columns, "prompts": prompts})


def _embed_cells(columns: Sequence[str], row: Row, is_lower: bool) -> Iterator[Mapping[str, str]]:
    """Yield the template values of a row's cells: clip, file name and command."""
    # With `is_lower`, the first cell is omitted, because the cell of the row above spans both rows.
    cells = list(zip(columns, row.paths, row.commands, strict=True))
    for column, path, command in cells[1:] if is_lower else cells:
        assert path is not None  # a page shows finished comparisons only
        clip = embed_clip(list(read_display_frames(path)), row.fps, f"{column} {row.strength}: {row.prompt}")
        yield {"clip": clip, "file": path.name, "command": command}


def is_image(path: Path) -> bool:
    """Return whether a path has an image suffix."""
    return path.suffix.lower() in image_suffixes()


def read_display_frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of a clip or image, H W 3, with transparent parts over a checkerboard."""
    if is_image(path):
        return iter([_put_on_squares(read_image(path, alpha=True))])
    return islice(video_frames(path), MAX_FRAMES)


def _put_on_squares(frame: Frame) -> Frame:
    """Composite a frame with an alpha channel, H W 4, onto a checkerboard; return H W 3."""
    colors, alpha = split_alpha(frame)
    if alpha is None:
        return colors
    rows, columns = np.indices(alpha.shape) // SQUARE
    squares = np.where((rows + columns) % 2, *SQUARE_SHADES)[..., None]
    share = alpha[..., None] / 255
    blended: Frame = (colors * share + squares * (1 - share)).round().astype(np.uint8)
    return blended


def read_middle_frame(path: Path | None) -> Frame | None:
    """Return the middle frame of a clip; None if `path` is None."""
    if path is None:
        return None
    count = sum(1 for _ in read_display_frames(path))
    return next(islice(read_display_frames(path), count // 2, None))


def _read_middle_frames(grid: ClipGrid) -> list[list[Frame | None]]:
    return [[read_middle_frame(path) for path in row.paths] for row in grid.rows]


def play_side_by_side(grid: ClipGrid) -> Iterator[Frame]:
    """Yield frames that show all clips side by side; a clip that has ended keeps showing its last frame."""
    readers = [
        [iter(()) if path is None else read_display_frames(path) for path in row.paths] for row in grid.rows
    ]
    current_frames = [[next(reader, None) for reader in row] for row in readers]
    has_more = True
    while has_more:
        yield compose(grid, current_frames)
        has_more = False
        for row, readers_of_row in enumerate(readers):
            for column, reader in enumerate(readers_of_row):
                next_frame = next(reader, None)
                if next_frame is not None:
                    current_frames[row][column] = next_frame
                    has_more = True


def compose(grid: ClipGrid, frames: Sequence[Sequence[Frame | None]]) -> Frame:
    """Compose an image from frames (rows of columns), with labels above them.

    Frames may differ in size. A missing frame is an empty cell of the size of the first existing frame.
    """
    sizes = _measure_cells(grid, frames)
    widths = [width for row in sizes for width, _ in row]
    column_width = max(NARROWEST_COLUMN, *widths)
    row_heights = [TEXT_HEIGHT + max(height for _, height in row) for row in sizes]
    top = HEADING_HEIGHT + TEXT_HEIGHT if grid.title else HEADING_HEIGHT
    # even sides, as videos require
    sheet_width = column_width * len(grid.columns)
    sheet_height = top + sum(row_heights)
    sheet = Image.new("RGB", (sheet_width + sheet_width % 2, sheet_height + sheet_height % 2), BACKGROUND)
    pen = _Pen(ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT_SIZE))
    pen.write((0, 0), grid.title, sheet.width)
    for column, heading in enumerate(grid.columns):
        pen.write((column * column_width, top - HEADING_HEIGHT), heading, column_width)
    for row, row_frames, row_sizes, height in zip(grid.rows, frames, sizes, row_heights, strict=True):
        label = f"{row.strength} {row.prompt}".strip()
        pen.write((0, top), label, sheet.width)
        for column, (frame, size) in enumerate(zip(row_frames, row_sizes, strict=True)):
            _draw_cell(sheet, pen, corner=(column * column_width, top + TEXT_HEIGHT), frame=frame, size=size)
        top += height
    return np.asarray(sheet)


def _measure_cells(grid: ClipGrid, frames: Sequence[Sequence[Frame | None]]) -> list[list[tuple[int, int]]]:
    """Return (width, height) of each frame as drawn on the sheet; a missing frame gets an empty cell."""
    side = max(NARROWEST_CELL, min(grid.max_cell_side, WIDEST // len(grid.columns)))
    first_frame = next((frame for row in frames for frame in row if frame is not None), None)
    empty_size = (side, side) if first_frame is None else _fit_side(first_frame, side)
    return [[empty_size if frame is None else _fit_side(frame, side) for frame in row] for row in frames]


def _draw_cell(
    sheet: Image.Image,
    pen: "_Pen",
    corner: tuple[int, int],
    frame: Frame | None,
    size: tuple[int, int],
) -> None:
    if frame is not None:
        sheet.paste(Image.fromarray(frame).resize(size, Image.Resampling.BOX), corner)
        return
    left, top = corner
    width, height = size
    sheet.paste(EMPTY, (left, top, left + width, top + height))
    pen.write(corner, "not made", width)


def _fit_side(frame: Frame, side: int) -> tuple[int, int]:
    height, width = frame.shape[:2]
    scale = min(1.0, side / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True)
class _Pen:
    """Draws labels on a comparison sheet, each on a single line."""

    draw: ImageDraw.ImageDraw
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont

    def write(self, corner: tuple[int, int], text: str, width: int) -> None:
        """Draw a label, truncated to `width` pixels."""
        line = " ".join(escape_control_codes(text[:1000]).split())
        while line and self.draw.textlength(line, self.font) > width - 4:
            fitting = round(len(line) * width / self.draw.textlength(line, self.font))
            line = line[: min(len(line) - 1, max(1, fitting))]
        left, top = corner
        self.draw.text((left + 2, top + 2), line, "black", self.font)


MAX_SHEET_CELL_SIDE = 512  # pixels: the longer side of a clip in a sheet, if there is room
MAX_TITLE_LENGTH = 300  # characters

CellIndex = tuple[int, int]  # column, row


JobByCell = Mapping[CellIndex, GenerationJob]  # of one sheet, without cells that cannot be made


def make_sheets(run: GenerationRun, lines: Mapping[str, str | None], failures: Failures) -> int:
    """Generate and write a sheet for each prompt line; return the number of cells, including failed ones.

    Args:
        run: The run.
        lines: Prompt lines by label; None for the prompt of the command line.
        failures: Collects the errors of single lines.
    """
    sheets = map_lines(run, lines, failures, partial(make_cell_jobs, failures=failures))
    jobs = [job for cells in sheets.values() for job in cells.values()]
    outputs = make_outputs(run, jobs, failures) if jobs else {}
    for label, cells in sheets.items():
        paths = {indices: outputs[job.label] for indices, job in cells.items() if job.label in outputs}
        if paths:
            logger.info("Sheet of %s: %s", label, write_sheet(run, cells, paths))
    cells_per_sheet = sum(1 for _ in list_cells(run.options.axes, {}))
    return cells_per_sheet * len(lines)


def make_cell_jobs(
    run: GenerationRun, label: str, line: Mapping[str, object], failures: Failures
) -> JobByCell:
    """Make the jobs for the cells of a prompt line's sheet, by column and row.

    No network is loaded. Without a seed, all cells share a random one. Impossible cells are recorded as
    failures.
    """
    axes = run.options.axes
    jobs: dict[CellIndex, GenerationJob] = {}
    if run.options.request.seed is None:
        line = {"seed": draw_seed(), **line}
    for indices, values in list_cells(axes, line):
        axis_values = [axis.describe(index) for axis, index in zip(axes, indices, strict=True)]
        name = ", ".join([label, *axis_values])
        with failures.collect_errors(name, fatal=CheckpointError):
            column, row = (*indices, 0)[:2]  # with a single axis all cells are in the first row
            jobs[column, row] = make_job(run, name, values)
    return jobs


def write_sheet(run: GenerationRun, cells: JobByCell, paths: Mapping[CellIndex, Path]) -> Path:
    """Draw the sheet of finished cells: a PNG if all are images, else a video. Returns its path.

    Rows and columns are labeled with the values of the axes; the prompt is the title, unless it is an axis.
    """
    output = run.options.output
    first_index = next(iter(paths))
    prepared = cells[first_index].prepared
    prompt = prepared.request.prompt
    grid = _make_grid(run.options.axes, paths, prompt, prepared.fps)
    metadata = {} if output.no_metadata else _make_metadata(run, cells, paths)
    name = f"{datetime.now():%Y%m%d-%H%M%S}_sheet"
    prompt_name = make_prompt_slug(prompt) if output.prompt_in_name else ""  # first words of the prompt
    if prompt_name:
        name = f"{name}_{prompt_name}"
    with reserve_stem(output.save_path, name) as stem:
        if all(map(is_image, grid.clips)):
            path = output.save_path / f"{stem}.png"
            write_png(path, compose(grid, _read_middle_frames(grid)), as_png_texts(metadata))
        else:
            path = output.save_path / f"{stem}{output.format.suffix}"
            write_video(
                path, play_side_by_side(grid), prepared.fps, codec=output.format.codec, tags=as_tags(metadata)
            )
    return path


def _make_grid(axes: Sequence[Axis], paths: Mapping[CellIndex, Path], prompt: str, fps: float) -> ClipGrid:
    """Arrange clips in a grid: the first axis varies across columns, the second one across rows."""
    horizontal = axes[0]
    vertical = axes[1] if len(axes) > 1 else None
    num_rows = 1 if vertical is None else len(vertical.texts)
    num_columns = len(horizontal.texts)
    rows: list[Row] = []
    for row in range(num_rows):
        label = "" if vertical is None else vertical.describe(row)
        clips = tuple(paths.get((column, row)) for column in range(num_columns))
        rows.append(Row(label, fps, clips))
    has_prompts = any(axis.name == "prompt" for axis in axes)
    return ClipGrid(
        columns=tuple(horizontal.describe(column) for column in range(num_columns)),
        rows=tuple(rows),
        title="" if has_prompts else shorten_prompt(prompt, MAX_TITLE_LENGTH),
        # small enough that all rows and their labels fit
        max_cell_side=min(MAX_SHEET_CELL_SIDE, MAX_VIDEO_HEIGHT // num_rows - TEXT_HEIGHT),
    )


def _make_metadata(run: GenerationRun, cells: JobByCell, paths: Mapping[CellIndex, Path]) -> dict[str, str]:
    """Return a sheet's metadata: entries that all cells share, the --sheet axes, and each cell's file."""
    cell_metadata = [run.metadata(cells[cell_index].prepared) or {} for cell_index in paths]
    # entries that are equal in all cells
    metadata = {
        key: text
        for key, text in cell_metadata[0].items()
        if all(of_cell.get(key) == text for of_cell in cell_metadata)
    }
    metadata["bt_sheet"] = quote_command(run.options.sheet.sheet or ())
    row_by_row = sorted(paths, key=lambda cell_index: cell_index[::-1])  # cell indices are (column, row)
    for column, row in row_by_row:
        indices = zip(run.options.axes, (column, row), strict=False)  # with one axis, the row is always 0
        axis_values = ", ".join(axis.describe(index) for axis, index in indices)
        name = paths[column, row].name
        metadata[f"bt_sheet_cell_{row + 1}_{column + 1}"] = f"{name}: {axis_values}"
    return metadata

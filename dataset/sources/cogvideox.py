"""List the clips of a data set in CogVideoX form: two lists, or a table; and tensors computed before."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.config import DatasetTable
from dataset.sources.captions import complete_captions, not_utf8
from dataset.sources.columns import JSONL, column_names, read_columns, table_format
from dataset.sources.faults import Fault
from dataset.sources.media_source import EMBEDS, MOMENTS, GivenTensors, MediaSource
from modules.control_codes import shorten
from modules.errors import DatasetError
from modules.paths import expand_path
from modules.text_files import MAX_CAPTION_BYTES, bad_character, read_lines

# lists of the folder form; the second name of prompts is what the tools of CogVideoX write
PROMPTS, VIDEOS = ("prompt.txt", "prompts.txt"), "videos.txt"
# usual columns, by the format of the table: those of captions and those of videos, the first that is there
COLUMNS = {JSONL: (("prompt", "caption"), ("video", "video_path"))}
OTHER_COLUMNS = (("caption", "prompt"), ("video", "video_path"))


@dataclass(frozen=True)
class CogData:
    """Where a data set is. The names are those of keys and of options."""

    name: str  # for messages: "data.toml, [[datasets]] 1 (data)"
    root: Path
    dataset_file: Path | None  # relative to the working folder, else to the root; None: lists in the root
    caption_column: str | None  # of the table, or the file of captions; None: the usual name
    video_column: str | None
    id_token: str  # "" for none


@dataclass(frozen=True)
class CogRow:
    """One clip with its caption."""

    where: str  # "videos.txt, line 3": for messages
    caption: str  # with the id token
    video: Path


def list_cogvideox(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return the sources of the table, in the order of its lists; add errors to `faults`.

    With load_tensors a source's latents are given, and its clip need not be there.
    Raises DatasetError if there is nothing to list.
    """
    assert table.cogvideox_root is not None
    data = CogData(
        table.name,
        table.cogvideox_root,
        table.dataset_file,
        table.caption_column,
        table.video_column,
        table.id_token,
    )
    sources: list[MediaSource] = []
    folders: dict[str, _Listed] = {}
    for row in read_rows(data, faults):
        (caption,) = complete_captions([row.caption], table)
        tensors = _find_tensors(row, folders, faults) if table.load_tensors else None
        if tensors is None and (table.load_tensors or not row.video.exists()):
            faults += [] if table.load_tensors else missing_clips(data, [row])
            continue
        sources.append(MediaSource(row.video, row.video.stem, caption, None, (), table, tensors=tensors))
    return sources


def read_rows(data: CogData, faults: list[Fault]) -> Iterator[CogRow]:
    """Yield clips and captions in the order of the lists; add lines that cannot be used to `faults`.

    It is not checked whether the clips exist. Raises DatasetError if a list is missing, the two lists differ
    in length, or a column is missing.
    """
    if not data.root.is_dir():
        raise DatasetError(f"{data.name}: {data.root}: no such folder. Correct the path.")
    pairs = _from_lists(data) if data.dataset_file is None else _from_table(data, faults)
    for where, caption, video in pairs:
        fault = _fault_of(caption, video)
        if fault is None:
            caption = f"{data.id_token} {caption.strip()}" if data.id_token else caption.strip()
            video = video.strip()
            try:
                yield CogRow(where, caption, expand_path(video, data.root))
                continue
            except ValueError as error:
                fault = f"{shorten(video, 80)!r}: {error}"
        faults.append(Fault(f"lines of {data.name} cannot be used", f"{where}: {fault}"))


def missing_clips(data: CogData, rows: list[CogRow]) -> list[Fault]:
    """Return a fault for each clip that does not exist."""
    kind = f"clips of {data.name} do not exist"
    return [
        Fault(kind, f"{row.video} ({row.where})", row.video.stem) for row in rows if not row.video.exists()
    ]


def _fault_of(caption: str, video: str) -> str | None:
    if not video.strip():
        return "it names no video"
    if not caption.strip():
        return "it has no caption"
    found = bad_character(caption) or bad_character(video)
    if found is not None:
        return f"it holds {found}"
    if len(caption) > MAX_CAPTION_BYTES:
        return f"its caption has {len(caption):,} characters, at most {MAX_CAPTION_BYTES:,} are read"
    return None


# --- lists
# ------------------------------------------------------------------------------------------------------------


def _from_lists(data: CogData) -> Iterator[tuple[str, str, str]]:
    usual = [name for name in PROMPTS if (data.root / name).exists()] or PROMPTS[:1]
    if data.caption_column is None and len(usual) > 1:
        raise DatasetError(
            f"{data.name}: {data.root} has {' and '.join(usual)}; say with caption_column which one it is"
        )
    prompts = data.root / (data.caption_column or usual[0])
    videos = data.root / (data.video_column or VIDEOS)
    captions, paths = _lines(data, prompts, "caption_column"), _lines(data, videos, "video_column")
    if len(captions) != len(paths):
        raise DatasetError(
            f"{data.name}: {prompts} has {len(captions)} lines, {videos} has {len(paths)}; each video has "
            "one prompt, in the same order. Blank lines are not counted."
        )
    for (_, caption), (number, video) in zip(captions, paths, strict=True):
        yield f"{videos}, line {number}", caption, video


def _lines(data: CogData, path: Path, key: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers."""
    number = 0
    found = []
    try:
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                found.append((number, line))
    except UnicodeDecodeError:
        raise not_utf8(path, number) from None
    except OSError as error:
        raise DatasetError(
            f"{data.name}: {path}: {error.strerror}. Without dataset_file, a CogVideoX folder has "
            f"{PROMPTS[0]} and {VIDEOS}; name another list with {key}."
        ) from error
    return found


# --- tables
# ------------------------------------------------------------------------------------------------------------


def _from_table(data: CogData, faults: list[Fault]) -> Iterator[tuple[str, str, str]]:
    assert data.dataset_file is not None
    places = (data.dataset_file, data.root / data.dataset_file)
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise DatasetError(
            f"{data.name}: dataset_file {data.dataset_file} is neither there nor in {data.root}"
        )
    names = column_names(path)
    usual = (
        next((name for name in columns if name in names), columns[0])
        for columns in COLUMNS.get(table_format(path), OTHER_COLUMNS)
    )
    given = data.caption_column, data.video_column
    caption, video = (own or column for own, column in zip(given, usual, strict=True))
    for key, column in (("caption_column", caption), ("video_column", video)):
        if column not in names:
            raise DatasetError(
                f"{data.name}: {path} has no column {column!r}; it has {', '.join(names)}. Name one of them "
                f"with {key}."
            )
    for row in read_columns(path, (caption, video)):
        values = row.values.get(caption, ""), row.values.get(video, "")
        if row.fault is None and all(isinstance(value, str) for value in values):
            yield row.where, *values
        else:
            why = row.fault or "its caption and its video must be texts"
            faults.append(Fault(f"lines of {data.name} cannot be used", f"{row.where}: {why}"))


# --- tensors
# ------------------------------------------------------------------------------------------------------------


# a folder X, then the names in X/video_latents and X/prompt_embeds; None for a missing folder
_Listed = tuple[Path, frozenset[str] | None, frozenset[str] | None]


def _list_tensors(folder: str) -> _Listed:
    """List the names once: a million files are not asked for one by one."""
    path = Path(folder)
    moments, embeds = (
        frozenset(os.listdir(place)) if place.is_dir() else None for place in (path / MOMENTS, path / EMBEDS)
    )
    return path, moments, embeds


def _find_tensors(row: CogRow, folders: dict[str, _Listed], faults: list[Fault]) -> GivenTensors | None:
    """Return the computed tensors' files for X/videos/NAME.mp4: X/video_latents/NAME.pt and others.

    Without a folder of embeddings, captions are encoded as always. folders: by X, those that are known. Adds
    to `faults` and returns None if a file is missing.
    """
    x = os.path.dirname(os.path.dirname(row.video))  # noqa: PTH120  # a Path for each takes three times as long
    if x not in folders:
        folders[x] = _list_tensors(x)
        if folders[x][1] is None:
            kind = "folders are missing, which load_tensors needs"
            faults.append(Fault(kind, str(folders[x][0] / MOMENTS)))
    folder, moments, embeds = folders[x]
    if moments is None:
        return None
    for inner, names in ((MOMENTS, moments), (EMBEDS, embeds)):
        if names is not None and f"{row.video.stem}.pt" not in names:
            kind = "files are missing, which load_tensors needs"
            faults.append(Fault(kind, f"{folder / inner / row.video.stem}.pt ({row.where})", row.video.stem))
            return None
    return GivenTensors(folder, row.video.stem, embeds is not None)

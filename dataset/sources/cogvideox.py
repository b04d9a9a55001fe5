"""List the clips of a data set in CogVideoX form, two lists or a table, and read tensors computed before.

A file of moments, as CogVideoX's tools write them, is one tensor 2C F H/8 W/8: C means, then C logarithms of
variances, before any normalisation.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset.config import DatasetTable
from dataset.sources.captions import complete_captions, not_utf8
from dataset.sources.columns import JSONL, column_names, read_columns, table_format
from dataset.sources.frames import Span
from dataset.sources.media_source import EMBEDS, MOMENTS, Fault, GivenTensors, MediaSource
from modules.atomic_write import write_text
from modules.checkpoints.containers import load_pickled
from modules.contract.data import LatentSpec
from modules.control_codes import shorten
from modules.errors import CheckpointError, DatasetError, MediaError
from modules.limits import MAX_CAPTION_BYTES
from modules.media.buckets import Size
from modules.paths import expand_path
from modules.text_files import bad_character, parse_json, read_lines, read_text

PREPARED = "reelsmith_prepared.json"
VERSION = 1


@dataclass(frozen=True)
class GivenClip:
    """The clip that moments stand for."""

    size: Size  # width, height in pixels
    frames: int

    def span(self, frame_step: int) -> Span:
        """Return the span of its one item, all of it: the model takes frame_step * n + 1 frames."""
        return (0, (self.frames - 1) // frame_step * frame_step + 1)


def read_tensor(path: Path) -> Tensor:
    """Read the tensor of a .pt file, mapped. Code in it is refused, not run.

    Raises MediaError if the file is missing, damaged, or holds anything else.
    """
    if not path.exists():
        raise MediaError(f"{path} does not exist")
    try:
        content = load_pickled(path)
    except CheckpointError as error:
        raise MediaError(str(error)) from error
    if not isinstance(content, Tensor):
        raise MediaError(f"{path} holds {type(content).__name__}, not a tensor")
    return content


def read_moments(path: Path, latent: LatentSpec) -> Tensor:
    """Read moments 2C F h w, mapped. latent: of the model that they are for.

    A first axis of 1 is a batch, as some tools leave it. Raises MediaError as `read_tensor`, and if they are
    not of that shape.
    """
    moments = read_tensor(path)
    if moments.ndim == 5 and len(moments) == 1:
        moments = moments[0]
    found = "x".join(map(str, moments.shape))
    if moments.ndim != 4 or not moments.numel() or not moments.is_floating_point():
        raise MediaError(
            f"{path} holds {found or 'a number'} of {moments.dtype}, not moments of a VAE (channels x frames "
            "x height x width)"
        )
    if moments.shape[0] != 2 * latent.channels:
        raise MediaError(
            f"{path} has {moments.shape[0]} channels: {explain_channels(moments.shape[0], latent)}"
        )
    return moments


def explain_channels(found: int, latent: LatentSpec) -> str:
    """Say which channels are wanted instead of `found`."""
    plain = " These look like latents, not like moments." if found == latent.channels else ""
    return (
        f"this model's VAE has {2 * latent.channels}, a mean and a variance for each of {latent.channels}."
        f"{plain} Compute them with this model's VAE (prepare_dataset.py), or leave out load_tensors"
    )


def measure(moments: Tensor, latent: LatentSpec, path: Path) -> GivenClip:
    """Return the clip of moments 2C F h w.

    Its frames are those that the form states: four for each latent frame if there is an even number of
    these; else the first stands for one. Raises MediaError if the model does not take the size.
    """
    step, rows, columns = latent.stride
    count, height, width = moments.shape[1], moments.shape[2] * rows, moments.shape[3] * columns
    if height % latent.pixel_step or width % latent.pixel_step:
        raise MediaError(
            f"{path} is of a clip of {width}x{height}; the model takes sides that are multiples of "
            f"{latent.pixel_step}"
        )
    return GivenClip((width, height), count * step if count % 2 == 0 else (count - 1) * step + 1)


def measure_source(source: MediaSource, latent: LatentSpec) -> GivenClip:
    """Return the clip of a source with tensors, from the header of its file. Raises as `read_moments`."""
    assert source.tensors is not None
    path = source.tensors.moments
    return measure(read_moments(path, latent), latent, path)


@dataclass(frozen=True)
class PreparedFolder:
    """Facts that all items of a prepared folder share. Values are those of JSON."""

    architecture: str | None  # `Family.name` of the model whose VAE made the moments; None: there are none
    vae: Mapping[str, str]  # identity of that VAE
    settings: Mapping[str, Any]  # what items depend on besides their sources


def write_prepared(folder: Path, prepared: PreparedFolder) -> None:
    """Write the file of a folder. Raises OutputError if that fails."""
    content = {"version": VERSION, **asdict(prepared)}
    write_text(folder / PREPARED, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def read_prepared(folder: Path) -> PreparedFolder | None:
    """Read the file of a folder; None if there is none: another program made it.

    Raises DatasetError if it cannot be read.
    """
    path = folder / PREPARED
    if not path.exists():
        return None
    try:
        content = parse_json(read_text(path))
        return PreparedFolder(content["architecture"], dict(content["vae"]), dict(content["settings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} cannot be read ({type(error).__name__}: {error}). prepare_dataset.py writes it; prepare "
            "the data into another folder, or remove this file if the data are of another program."
        ) from error


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

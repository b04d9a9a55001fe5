"""List the clips of a data set in CogVideoX form, two lists or a table, and read tensors computed before.

A file of moments, as CogVideoX's tools write them, is one tensor 2C F H/8 W/8: C means, then C logarithms of
variances, before any normalisation.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from checkpoints.containers import load_pickled
from contract.data import LatentSpec
from dataset.config import DatasetTable
from dataset.sources.captions import complete_captions
from dataset.sources.columns import JSONL, TableRow, column_names, read_columns, table_format, table_lines
from dataset.sources.frames import Span
from dataset.sources.media_source import (
    EMBEDS,
    MOMENTS,
    ClipFacts,
    Fault,
    GivenTensors,
    MediaSource,
    number_repeats,
)
from dataset.sources.rows import check_text, locate
from modules.atomic_write import write_text
from modules.errors import CheckpointError, DatasetError, MediaError
from modules.media.lengths import ClipLengths
from modules.option_values import as_shape
from modules.paths import explain_missing
from modules.text_files import parse_json, read_text

PREPARED = "reelsmith_prepared.json"
VERSION = 1


def whole_span(clip: ClipFacts, lengths: ClipLengths) -> Span:
    """Return the span of the only item in moments: all frames that fit a length of the family."""
    return (0, lengths.fit(clip.kept_frames))


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

    A leading axis of size 1, which some tools leave, is removed. Raises MediaError as `read_tensor`, and if
    the shape is another.
    """
    moments = read_tensor(path)
    if moments.ndim == 5 and len(moments) == 1:
        moments = moments[0]
    shape = as_shape(moments.shape)
    if moments.ndim != 4 or not moments.numel() or not moments.is_floating_point():
        raise MediaError(
            f"{path} holds {shape or 'a number'} of {moments.dtype}, not moments of a VAE (channels x frames "
            "x height x width)"
        )
    if moments.shape[0] != 2 * latent.channels:
        raise MediaError(
            f"{path} has {moments.shape[0]} channels: {explain_channels(moments.shape[0], latent)}"
        )
    return moments


def explain_channels(channels: int, latent: LatentSpec) -> str:
    """Describe the channels that the model needs. channels: those of the file."""
    plain = " These look like latents, not like moments." if channels == latent.channels else ""
    return (
        f"this model's VAE has {2 * latent.channels}, a mean and a variance for each of {latent.channels}."
        f"{plain} Compute them with this model's VAE (prepare_dataset.py), or leave out load_tensors"
    )


def measure(moments: Tensor, latent: LatentSpec, path: Path) -> ClipFacts:
    """Return the facts of the clip that moments 2C F h w were made from.

    If the number of latent frames is even, each stands for four frames; if it is odd, the first stands for
    one. Raises MediaError if the model does not take the size.
    """
    step, rows, columns = latent.stride
    count = moments.shape[1]
    height = moments.shape[2] * rows
    width = moments.shape[3] * columns
    if height % latent.pixel_step or width % latent.pixel_step:
        raise MediaError(
            f"{path} is of a clip of {width}x{height}; the model takes sides that are multiples of "
            f"{latent.pixel_step}"
        )
    num_frames = count * step if count % 2 == 0 else (count - 1) * step + 1
    return ClipFacts((width, height), num_frames)


def measure_source(source: MediaSource, latent: LatentSpec) -> ClipFacts:
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
# usual columns, the first that is there; in JSONL prompts come first
CAPTION_COLUMNS, VIDEO_COLUMNS = ("caption", "prompt"), ("video", "video_path")


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
    sources: list[MediaSource] = []
    folders: dict[str, _TensorFolder] = {}
    for row in read_rows(table, table.name, faults):
        (caption,) = complete_captions([row.caption], table)
        tensors = _find_tensors(row, folders, faults) if table.load_tensors else None
        if table.load_tensors and tensors is None:
            continue
        if not table.load_tensors and not row.video.exists():
            faults += missing_clips(table.name, [row])
            continue
        source = MediaSource(
            path=row.video,
            stem=row.video.stem,
            caption=caption,
            caption_path=None,
            control=(),
            table=table,
            tensors=tensors,
        )
        sources.append(source)
    return sources if table.load_tensors else number_repeats(sources)


def read_rows(table: DatasetTable, name: str, faults: list[Fault]) -> Iterator[CogRow]:
    """Yield clips and captions in the order of the lists; add lines that cannot be used to `faults`.

    name: of the data set, for messages. It is not checked whether the clips exist. Raises DatasetError if a
    list is missing, the two lists differ in length, or a column is missing.
    """
    root = table.cogvideox_root
    assert root is not None
    if not root.is_dir():
        raise DatasetError(f"{name}: {root}: no such folder.{explain_missing(root)} Correct the path.")
    open_rows = _open_lists if table.dataset_file is None else _open_table
    clips = open_rows(table, root, name)
    for row in clips.rows:
        try:
            caption = _text_in(row, clips.caption_column)
            path = locate(_text_in(row, clips.video_column), root, row.where)
        except DatasetError as error:
            faults.append(Fault(f"lines of {name} cannot be used", str(error)))
        else:
            yield CogRow(row.where, f"{table.id_token} {caption}".lstrip(), path)


def _text_in(row: TableRow, column: str) -> str:
    """Return the text in a column, stripped of white space. Raises DatasetError if there is none."""
    text = row.values.get(column, "")
    if row.fault is not None or not isinstance(text, str) or not text.strip():
        raise DatasetError(f"{row.where}: {row.fault or f'{column} is missing, or not a text'}")
    check_text(text, f"{row.where}: {column}")
    return text.strip()


def missing_clips(name: str, rows: list[CogRow]) -> list[Fault]:
    """Return a fault for each clip that does not exist. name: of the data set."""
    kind = f"clips of {name} do not exist"
    return [
        Fault(kind, f"{row.video} ({row.where})", row.video.stem) for row in rows if not row.video.exists()
    ]


class _Clips(NamedTuple):
    """The clips of a data set, one a row."""

    rows: Iterable[TableRow]
    caption_column: str
    video_column: str


def _open_lists(table: DatasetTable, root: Path, name: str) -> _Clips:
    prompts = root / (table.caption_column or _find_prompts(root, name))
    videos = root / (table.video_column or VIDEOS)
    _require_list(prompts, "caption_column", name)
    _require_list(videos, "video_column", name)
    captions = [line for line in table_lines(prompts) if line.strip()]
    numbered = enumerate(table_lines(videos), 1)
    paths = [(number, line) for number, line in numbered if line.strip()]
    if len(captions) != len(paths):
        raise DatasetError(
            f"{name}: {prompts} has {len(captions)} lines, {videos} has {len(paths)}; each video has one "
            "prompt, in the same order. Blank lines are not counted."
        )
    rows = (
        TableRow(videos, "line", number, {"caption": caption, "video": video})
        for caption, (number, video) in zip(captions, paths, strict=True)
    )
    return _Clips(rows, "caption", "video")


def _require_list(path: Path, key: str, name: str) -> None:
    """Raise DatasetError if a list is missing. key: of the data set, which names another one."""
    if not path.exists():
        raise DatasetError(
            f"{name}: {path}: no such file. Without dataset_file, a CogVideoX folder has {PROMPTS[0]} "
            f"and {VIDEOS}; name another list with {key}."
        )


def _find_prompts(root: Path, name: str) -> str:
    """Return the usual name of the list of captions in a folder. Raises DatasetError if it has two."""
    present = [file for file in PROMPTS if (root / file).exists()]
    if len(present) > 1:
        raise DatasetError(
            f"{name}: {root} has {' and '.join(present)}; say with caption_column which one it is"
        )
    return present[0] if present else PROMPTS[0]


def _open_table(table: DatasetTable, root: Path, name: str) -> _Clips:
    assert table.dataset_file is not None
    places = (table.dataset_file, root / table.dataset_file)
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise DatasetError(f"{name}: dataset_file {table.dataset_file} is neither there nor in {root}")
    names = column_names(path)
    caption_columns = CAPTION_COLUMNS[::-1] if table_format(path) == JSONL else CAPTION_COLUMNS
    caption = table.caption_column or _first_of(caption_columns, names)
    video = table.video_column or _first_of(VIDEO_COLUMNS, names)
    for key, column in (("caption_column", caption), ("video_column", video)):
        if column not in names:
            raise DatasetError(
                f"{name}: {path} has no column {column!r}; it has {', '.join(names)}. Name one of them "
                f"with {key}."
            )
    return _Clips(read_columns(path, (caption, video)), caption, video)


def _first_of(usual: Sequence[str], names: Sequence[str]) -> str:
    """Return the first usual name that is among `names`; the first one if none is."""
    return next((name for name in usual if name in names), usual[0])


# --- tensors
# ------------------------------------------------------------------------------------------------------------


class _TensorFolder(NamedTuple):
    """A folder X, and the names in X/video_latents and X/prompt_embeds; None for a missing folder."""

    path: Path
    moments: frozenset[str] | None
    embeds: frozenset[str] | None


def _find_tensors(row: CogRow, folders: dict[str, _TensorFolder], faults: list[Fault]) -> GivenTensors | None:
    """Return the computed tensors' files for X/videos/NAME.mp4: X/video_latents/NAME.pt and so on.

    Without a folder of embeddings, captions are encoded as always. folders: by X, those that are known. Adds
    to `faults` and returns None if a file is missing.
    """
    place = os.path.dirname(os.path.dirname(row.video))  # noqa: PTH120  # a Path takes three times as long
    folder = folders.get(place)
    if folder is None:  # listed once: a million files are not asked for one by one
        path = Path(place)
        folder = folders[place] = _TensorFolder(path, _names_in(path / MOMENTS), _names_in(path / EMBEDS))
        if folder.moments is None:
            faults.append(Fault("folders are missing, which load_tensors needs", str(path / MOMENTS)))
    if folder.moments is None:
        return None
    stem = row.video.stem
    for inner, names in ((MOMENTS, folder.moments), (EMBEDS, folder.embeds)):
        if names is not None and f"{stem}.pt" not in names:
            kind = "files are missing, which load_tensors needs"
            file = f"{folder.path / inner / stem}.pt"
            faults.append(Fault(kind, f"{file} ({row.where})", stem))
            return None
    return GivenTensors(folder.path, stem, has_embeds=folder.embeds is not None)


def _names_in(folder: Path) -> frozenset[str] | None:
    return frozenset(os.listdir(folder)) if folder.is_dir() else None

"""Read the lists of a dataset in CogVideoX form, and find precomputed tensors of its clips."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dataset.forms.cogvideox_keys import CogVideoXKeys
from dataset.forms.columns import table_lines
from dataset.forms.contract import TableRow
from dataset.forms.jsonl import JSON_LINES
from dataset.forms.row_formats import column_names, read_columns, row_format
from dataset.forms.rows import check_text, locate
from dataset.sources.captions import complete_captions
from dataset.sources.media_source import Fault, MediaSource, number_repeats
from dataset.sources.missing import explain_lookup
from dataset.table import DatasetTable
from modules.errors import DatasetError

# folders next to the folder of the clips
MOMENTS, IMAGE_MOMENTS, EMBEDS = "video_latents", "image_latents", "prompt_embeds"
# default names of the two lists; the tools of CogVideoX write prompts.txt
PROMPTS, VIDEOS = ("prompt.txt", "prompts.txt"), "videos.txt"
# default names of columns, in order of preference; in JSON Lines, the order of caption columns is reversed
CAPTION_COLUMNS, VIDEO_COLUMNS = ("caption", "prompt"), ("video", "video_path")


@dataclass(frozen=True)
class CogRow:
    """A clip and its caption, from one line of the CogVideoX lists."""

    position: str  # position for messages: "videos.txt, line 3"
    caption: str  # with the id_token
    video: Path


def list_cogvideox(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return the clips of the table, in the order of its lists; add errors to `faults`.

    With load_tensors, a clip's latents are precomputed, and the clip itself need not exist.

    Raises:
        DatasetError: If a list, a folder or a column is missing.
    """
    sources: list[MediaSource] = []
    folders: dict[str, _TensorFolder] = {}  # filled by `_find_tensors`, which lists each folder once
    load_tensors = table.source.require_format_keys(CogVideoXKeys).load_tensors
    for row in read_rows(table, table.name, faults):
        (caption,) = complete_captions([row.caption], table)
        tensors = _find_tensors(row, folders, faults) if load_tensors else None
        if load_tensors and tensors is None:
            continue
        if not load_tensors and not row.video.exists():
            faults += missing_clips(table.name, [row])
            continue
        source = MediaSource(
            path=row.video,
            stem=row.video.stem,
            caption=caption,
            caption_path=None,
            control=(),
            table=table,
            precomputed=tensors,
        )
        sources.append(source)
    # A clip may be listed with several captions, and becomes several sources with numbered stems. Precomputed
    # tensors exist only once for each clip, so numbered stems would have none
    return sources if load_tensors else number_repeats(sources)


def read_rows(table: DatasetTable, name: str, faults: list[Fault]) -> Iterator[CogRow]:
    """Yield clips and captions in the order of the lists; add unusable lines to `faults`.

    A CogVideoX dataset is a text file with one path per line and one with captions, or a single table with
    a column of each. Whether the clips exist is not checked. `name` is the dataset's name, for messages.

    Raises:
        DatasetError: If a list is missing, the two lists differ in length, or a column is missing.
    """
    keys = table.source.require_format_keys(CogVideoXKeys)
    root = keys.cogvideox_root
    if not root.is_dir():
        raise DatasetError(f"{name}: {root}: no such folder{explain_lookup(root, table.config_path)}")
    open_rows = _open_lists if keys.dataset_file is None else _open_table
    clips = open_rows(table, root, name)
    for row in clips.rows:
        try:
            caption = _text_in(row, clips.caption_column)
            path = locate(_text_in(row, clips.video_column), root, row.position)
        except DatasetError as error:
            faults.append(Fault(f"lines of {name} cannot be used", str(error)))
        else:
            yield CogRow(row.position, f"{keys.id_token} {caption}".lstrip(), path)


def _text_in(row: TableRow, column: str) -> str:
    """Return the text in a row's column, stripped of white space."""
    if row.fault is not None:
        raise DatasetError(f"{row.position}: {row.fault}")
    text = row.values.get(column, "")
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(f"{row.position}: {column} is missing, or is not text")
    check_text(text, f"{row.position}: {column}")
    return text.strip()


def missing_clips(name: str, rows: list[CogRow]) -> list[Fault]:
    """Return an error for each row whose clip does not exist; `name` is the dataset's name."""
    kind = f"clips of {name} do not exist"
    return [
        Fault(kind, f"{row.video} ({row.position})", row.video.stem) for row in rows if not row.video.exists()
    ]


class _Clips(NamedTuple):
    """The clips of a CogVideoX dataset, one in each row."""

    rows: Iterable[TableRow]
    caption_column: str
    video_column: str


def _open_lists(table: DatasetTable, root: Path, name: str) -> _Clips:
    """Return the rows of two text files: each line of the prompts with the same line of the videos."""
    prompt_list = root / (table.captions.caption_column or _find_prompts(root, name))
    video_list = root / (table.source.require_format_keys(CogVideoXKeys).video_column or VIDEOS)
    _require_list(prompt_list, "caption_column", name)
    _require_list(video_list, "video_column", name)
    captions = [line for line in table_lines(prompt_list) if line.strip()]
    paths = [(number, line) for number, line in enumerate(table_lines(video_list), 1) if line.strip()]
    if len(captions) != len(paths):
        raise DatasetError(
            f"{name}: {prompt_list} has {len(captions)} lines, {video_list} has {len(paths)}; each video has "
            "one prompt, in the same order. Blank lines are not counted."
        )
    rows = (
        TableRow(video_list, "line", number, {"caption": caption, "video": video})
        for caption, (number, video) in zip(captions, paths, strict=True)
    )
    return _Clips(rows, "caption", "video")


def _require_list(path: Path, key: str, name: str) -> None:
    """Raise DatasetError if a list file is missing; `key` is the table key that names another file."""
    if not path.exists():
        raise DatasetError(
            f"{name}: {path}: no such file. Without dataset_file, a CogVideoX folder has {PROMPTS[0]} "
            f"and {VIDEOS}; name another list with {key}."
        )


def _find_prompts(root: Path, name: str) -> str:
    """Return the name of the caption list in a folder; if there is none, the first default name."""
    present = [file for file in PROMPTS if (root / file).exists()]
    if len(present) > 1:
        raise DatasetError(
            f"{name}: {root} has {' and '.join(present)}; say with caption_column which one it is"
        )
    return present[0] if present else PROMPTS[0]


def _open_table(table: DatasetTable, root: Path, name: str) -> _Clips:
    """Return the rows of dataset_file, a CSV or JSON Lines file with caption and video columns."""
    keys = table.source.require_format_keys(CogVideoXKeys)
    assert keys.dataset_file is not None
    # relative to the working folder, otherwise to the folder of the dataset
    candidates = (keys.dataset_file, root / keys.dataset_file)
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise DatasetError(
            f"{name}: dataset_file {keys.dataset_file} exists neither in the working folder nor in {root}"
        )
    names = column_names(path)
    caption_columns = CAPTION_COLUMNS
    if row_format(path) is JSON_LINES:  # if it has both columns, captions are in "prompt"
        caption_columns = caption_columns[::-1]
    caption_column = table.captions.caption_column or _find_default(caption_columns, names)
    video_column = keys.video_column or _find_default(VIDEO_COLUMNS, names)
    for key, column in (("caption_column", caption_column), ("video_column", video_column)):
        if column not in names:
            raise DatasetError(
                f"{name}: {path} has no column {column!r}; it has {', '.join(names)}. Name one of them "
                f"with {key}."
            )
    return _Clips(read_columns(path, (caption_column, video_column)), caption_column, video_column)


def _find_default(defaults: Sequence[str], names: Sequence[str]) -> str:
    """Return the first default column that the file has; if it has none of them, the first default."""
    return next((name for name in defaults if name in names), defaults[0])


# --- tensors
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CogVideoXTensors:
    """Precomputed tensor files of a clip, in folders next to the clips' folder."""

    folder: Path  # folder that contains these folders; clips share the object
    name: str  # name of the files, without suffix
    has_embeds: bool
    uses_image: bool = True

    @property
    def moments(self) -> Path:
        """File with the VAE moments of the clip."""
        return self.folder / MOMENTS / f"{self.name}.pt"

    @property
    def image(self) -> Path | None:
        """File with the VAE's mean and log variance for the first frame; None if the family uses none."""
        return self.folder / IMAGE_MOMENTS / f"{self.name}.pt" if self.uses_image else None

    @property
    def embeds(self) -> Path | None:
        """File with the precomputed prompt embedding; None if the prompt still has to be encoded."""
        return self.folder / EMBEDS / f"{self.name}.pt" if self.has_embeds else None

    def without_image(self) -> "CogVideoXTensors":
        """Return a copy without the first frame's moments."""
        return replace(self, uses_image=False)


class _TensorFolder(NamedTuple):
    """A folder with a subfolder for each kind of precomputed tensors."""

    path: Path
    moment_files: frozenset[str] | None  # names in `video_latents`; None if that folder is missing
    embed_files: frozenset[str] | None  # names in `prompt_embeds`; None if that folder is missing


def _find_tensors(
    row: CogRow, folders: dict[str, _TensorFolder], faults: list[Fault]
) -> CogVideoXTensors | None:
    """Return a clip's precomputed tensors: X/video_latents/NAME.pt etc. for X/videos/NAME.mp4."""
    # Without a folder of embeddings, captions are encoded as usual. If a file is missing, a fault is added to
    # `faults` and None is returned.
    root = os.path.dirname(os.path.dirname(row.video))  # noqa: PTH120  # a Path takes three times as long
    folder = folders.get(root)
    if folder is None:  # listed once, because a million calls of exists() are slow
        path = Path(root)
        folder = _TensorFolder(path, _names_in(path / MOMENTS), _names_in(path / EMBEDS))
        folders[root] = folder
        if folder.moment_files is None:
            faults.append(Fault("folders are missing, which load_tensors needs", str(path / MOMENTS)))
    if folder.moment_files is None:  # its fault was added with the first row
        return None
    stem = row.video.stem
    for subfolder, names in ((MOMENTS, folder.moment_files), (EMBEDS, folder.embed_files)):
        if names is not None and f"{stem}.pt" not in names:
            kind = "files are missing, which load_tensors needs"
            file = f"{folder.path / subfolder / stem}.pt"
            faults.append(Fault(kind, f"{file} ({row.position})", stem))
            return None
    return CogVideoXTensors(folder.path, stem, has_embeds=folder.embed_files is not None)


def _names_in(folder: Path) -> frozenset[str] | None:
    """Return the names of the files in a folder; None if it is not a folder."""
    return frozenset(os.listdir(folder)) if folder.is_dir() else None

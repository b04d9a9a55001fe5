"""Records of each cut source, so that a rerun goes on where the last one ended.

A record is a JSON file in a hidden folder beside the clips. It is written before the first clip, with the
names of all that follow: named files are ours, and any other file belongs to the user.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.cutting.inputs import MARK, FootageSource, clip_name
from data_tools.cutting.looking import VideoLook
from data_tools.cutting.options import CuttingOptions
from data_tools.cutting.planning import PlannedClip
from dataset.cache.tar_records import is_safe_name
from modules.atomic_write import make_storable, write_text
from modules.errors import DatasetError
from modules.options import option_values
from modules.text_files import parse_json, read_text

VERSION = 1


@dataclass(frozen=True)
class WrittenClip:
    """A clip of a record."""

    name: str
    clip: PlannedClip
    size_bytes: int = 0  # of the file, once all are written


@dataclass(frozen=True)
class CutRecord:
    """How a source was cut, or is being cut."""

    stem: str  # of its clips' names
    source: str
    size_bytes: int
    modified: int  # nanoseconds
    width: int  # these two: of the clips
    height: int
    options: dict[str, Any]
    clips: tuple[WrittenClip, ...]
    is_done: bool = False
    lists: tuple[str, ...] = ()  # that have had its lines

    def is_of(self, source: Path) -> bool:
        """Return whether the source is the file that was cut."""
        found = source.stat()
        return (self.size_bytes, self.modified) == (found.st_size, found.st_mtime_ns)


def start_record(
    source: FootageSource, stem: str, options: CuttingOptions, look: VideoLook, clips: Sequence[PlannedClip]
) -> CutRecord:
    """Return the record of a source that is about to be cut."""
    found = source.path.stat()
    kept = [clip for clip in clips if not clip.dropped]
    names = [clip_name(stem, number, options.form.suffix) for number in range(1, len(kept) + 1)]
    written = tuple(WrittenClip(name, clip) for name, clip in zip(names, kept, strict=True))
    return CutRecord(
        stem,
        str(source.path),
        found.st_size,
        found.st_mtime_ns,
        look.width // 2 * 2,  # an odd row or column cannot be encoded
        look.height // 2 * 2,
        deciding(options),
        written,
    )


def deciding(options: CuttingOptions) -> dict[str, Any]:
    """Return the options that decide number and content of the clips."""
    values: dict[str, Any] = {}
    for group in (options.scenes, options.lengths, options.choice, options.form):
        values |= option_values(group)
    values["scene_threshold"] = options.scenes.threshold
    return values


def changed_options(record: CutRecord, options: CuttingOptions) -> list[str]:
    """Return the changed options in words: `--min_seconds 2 (was 1)`."""
    now = deciding(options)
    return [
        f"--{name} {value} (was {record.options.get(name)})"
        for name, value in now.items()
        if record.options.get(name) != value
    ]


def read_records(output: Path) -> dict[str, CutRecord]:
    """Return the records of an output folder by the path of their source.

    Raises DatasetError if one is damaged.
    """
    folder = output / MARK
    if not folder.is_dir():
        return {}
    records = (
        _read_cut_record(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")
    )
    return {record.source: record for record in records}


def write_record(output: Path, record: CutRecord) -> None:
    """Write a record, completely or not at all. Raises OutputError."""
    content = {"version": VERSION, **asdict(record)}
    # in ASCII: a path may hold bytes that are no text
    write_text(output / MARK / f"{record.stem}.json", json.dumps(content) + "\n")


def finish_record(output: Path, record: CutRecord) -> CutRecord:
    """Return the record of a source whose clips are all written, with their sizes."""
    clips = tuple(replace(one, size_bytes=(output / one.name).stat().st_size) for one in record.clips)
    return replace(record, clips=clips, is_done=True)


def list_line(output: Path, record: CutRecord, written: WrittenClip) -> dict[str, Any]:
    """Return the line of a clip: its path, from anywhere, and facts. Captions are for others to add."""
    clip = written.clip
    return {
        "video_path": str(output / written.name),
        "source": make_storable(record.source),
        "scene": clip.scene,
        "first_frame": clip.first,
        "start_seconds": round(clip.start, 6),
        "end_seconds": round(clip.start + clip.seconds, 6),
        "frames": clip.frames,
        "fps": round(clip.frames / clip.seconds, 6) if clip.seconds else 0.0,
        "width": record.width,
        "height": record.height,
        "brightness": round(clip.brightness, 4),
        "motion": round(clip.motion, 4),
        "sharpness": round(clip.sharpness, 6),
    }


def _read_cut_record(path: Path) -> CutRecord:
    try:
        content = parse_json(read_text(path, 1 << 28))
        if content.pop("version") != VERSION:
            raise ValueError("it is of another version")
        clips = tuple(
            WrittenClip(one["name"], PlannedClip(**one["clip"]), one["size_bytes"])
            for one in content.pop("clips")
        )
        record = CutRecord(**{**content, "lists": tuple(content["lists"])}, clips=clips)
        # names are joined to the output folder: no other one may be meant
        if not all(map(is_safe_name, [record.stem, *(one.name for one in clips)])):
            raise ValueError("it names files in other folders")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            f"{path}, which says what was cut before, cannot be read: {error}. Choose another --output, or "
            "remove this file and the clips whose names begin with its name."
        ) from error
    return record

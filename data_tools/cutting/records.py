"""Record how each source was cut, and list its clips, so that a rerun continues where the last one ended.

A record is a JSON file in a hidden folder next to the clips. It is written before the first clip, with the
names of all clips: files with these names belong to this program, all others to the user.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from data_tools.cutting.clips import ChoiceOptions, LengthOptions, PlannedClip, VideoAnalysis
from data_tools.cutting.scenes import SceneOptions
from modules.atomic_write import replace_surrogates, write_bytes, write_text
from modules.errors import DatasetError, OptionError, OutputError
from modules.limits import MAX_METADATA_BYTES
from modules.media.options import CodecOptions
from modules.options import Options, option, option_values
from modules.text_files import parse_json, read_lines, read_text, real_path

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
LIST_NAME = "clips.jsonl"

RECORD_FOLDER = ".split_video"  # folder of the records, next to the clips
VERSION = 1


class ClipFormat(CodecOptions, title="video format"):
    """File format and codec of the clips."""

    crf: int = option(
        "quality of h264 and h265, 0 to 51: a lower one is better and larger",
        default=12,
        minimum=0,
        maximum=51,
        hint="0 is lossless except for the conversion of colors",
    )
    preset: str = option("speed of h264 and h265; slower is smaller", default="medium", choices=PRESETS)
    no_audio: bool = option("write no audio; without this option the main audio of a source is cut with it")


class CuttingOptions(Options, title="input and output"):
    """Options for cutting: the videos, the output folder and the list of clips."""

    input: Path = option(
        "a video, or a folder: then all videos in it, and in the folders inside it",
        place="there",
        hint="a video, or a folder of videos",
        required=True,
        by_place=True,
    )
    output: Path = option(
        "folder for the clips; all go into it, without subfolders",
        place="new folder",
        required=True,
        by_place=True,
    )
    jsonl: Path | None = option(f"list of the clips (default: {LIST_NAME} in --output)")
    dry_run: bool = option("print the scenes and what becomes of them, and write nothing")
    num_workers: int = option("number of files processed in parallel", default=1, minimum=1, maximum=64)
    scenes: SceneOptions
    lengths: LengthOptions
    choice: ChoiceOptions
    clip_format: ClipFormat

    def __post_init__(self) -> None:
        if self.input.is_dir() and real_path(self.input) == real_path(self.output):
            raise OptionError(
                f"--output {self.output} is --input too. Pass another folder, such as one in it"
            )
        if self.list_path.is_dir():
            raise OptionError(f"--jsonl {self.list_path} is a folder. Pass the name of a file")
        if self.list_path.suffix.lower() not in {".jsonl", ".json"}:
            raise OptionError(f"--jsonl {self.list_path}: name a file that ends in .jsonl")

    @property
    def list_path(self) -> Path:
        """Path of the list of clips: given by an option, or in the output folder."""
        return self.output / LIST_NAME if self.jsonl is None else self.jsonl


@dataclass(frozen=True)
class WrittenClip:
    """A clip to write, with its file name and, once written, its size."""

    name: str
    clip: PlannedClip
    size_bytes: int = 0  # of the file, once all are written


@dataclass(frozen=True)
class CutRecord:
    """How a video was cut into clips, recorded before and after cutting."""

    stem: str  # beginning of its clips' names
    source: str
    size_bytes: int
    modified: int  # nanoseconds
    width: int  # of the clips, as height
    height: int
    options: dict[str, Any]
    clips: tuple[WrittenClip, ...]
    is_done: bool = False
    lists: tuple[str, ...] = ()  # lists that its lines were written to

    def is_unchanged(self, source: Path) -> bool:
        """Return whether the source still has the size and modification time from when it was cut."""
        status = source.stat()
        return (self.size_bytes, self.modified) == (status.st_size, status.st_mtime_ns)

    def find_reason_to_recut(self, source: Path, options: CuttingOptions) -> str:
        """Return why a video must be cut again, such as `--min_seconds 2 (was 1)`; "" if it need not be."""
        changed = [
            f"--{name} {value} (was {self.options.get(name)})"
            for name, value in _list_content_options(options).items()
            if self.options.get(name) != value
        ]
        if changed:
            return ", ".join(changed)
        return "" if self.is_unchanged(source) else "the file has changed"


def start_record(
    source: Path, stem: str, options: CuttingOptions, analysis: VideoAnalysis, clips: Sequence[PlannedClip]
) -> CutRecord:
    """Return the record of a source video that is about to be cut, with names for the clips to write."""
    status = source.stat()
    clips_to_write: list[WrittenClip] = []
    for clip in clips:
        if not clip.dropped:
            name = f"{stem}_{len(clips_to_write) + 1:05d}{options.clip_format.suffix}"
            clips_to_write.append(WrittenClip(name, clip))
    return CutRecord(
        stem,
        source=str(source),
        size_bytes=status.st_size,
        modified=status.st_mtime_ns,
        width=analysis.width // 2 * 2,  # even: encoders cannot take an odd row or column
        height=analysis.height // 2 * 2,
        options=_list_content_options(options),
        clips=tuple(clips_to_write),
    )


def _list_content_options(options: CuttingOptions) -> dict[str, Any]:
    """Return the options that decide which clips a video yields and what they contain."""
    values: dict[str, Any] = {}
    for group in (options.scenes, options.lengths, options.choice, options.clip_format):
        values |= option_values(group)
    return values


def read_records(output: Path) -> dict[str, CutRecord]:
    """Read the cutting records of an output folder, keyed by the path of the source.

    Raises:
        DatasetError: If a record is damaged.
    """
    records = {}
    paths = [path for path in (output / RECORD_FOLDER).glob("*.json") if not path.name.startswith(".")]
    for path in sorted(paths):
        try:
            record = _parse_record(read_text(path, MAX_METADATA_BYTES))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DatasetError(
                f"{path}, which says what was cut before, cannot be read: {error}. Choose another --output, "
                "or remove this file and the clips whose names begin with its name."
            ) from error
        records[record.source] = record
    return records


def _parse_record(text: str) -> CutRecord:
    """Parse a cutting record. A damaged record raises ValueError, KeyError or TypeError."""
    content = parse_json(text)
    if content.pop("version") != VERSION:
        raise ValueError("it is of another version")
    clips = tuple(
        WrittenClip(clip["name"], PlannedClip(**clip["clip"]), clip["size_bytes"])
        for clip in content.pop("clips")
    )
    lists = tuple(content.pop("lists"))
    record = CutRecord(**content, clips=clips, lists=lists)
    file_names = [record.stem, *(clip.name for clip in clips)]
    # a changed record could name files elsewhere, which cutting again would remove
    if any(Path(name).name != name or name == ".." for name in file_names):
        raise ValueError("it names files in other folders")
    return record


def write_record(output: Path, record: CutRecord) -> None:
    """Write a cutting record atomically. Raises OutputError if it cannot be written."""
    content = {"version": VERSION, **asdict(record)}
    # in ASCII: a path may contain bytes that are not text
    write_text(output / RECORD_FOLDER / f"{record.stem}.json", json.dumps(content) + "\n")


class ClipList:
    """The list of clips: JSONL with one line per clip, for `video_jsonl_file` tables.

    Existing lines are kept, with everything that users have added. Cutting takes hours, in which captions may
    be written into the list, so it is read again before each write. Each record notes the lists that already
    have its lines, so that a line that a user removes is not added again.
    """

    def __init__(self, path: Path, output: Path) -> None:
        """Read the list of clips, if it exists.

        Raises:
            OutputError: If the list cannot be read.
        """
        self._path, self._output = path, output
        self._existed_before = path.exists()
        for _ in self._read():  # a list that cannot be read is reported now, not after hours of cutting
            pass
        self._unlisted: list[tuple[CutRecord, bool]] = []  # (record, is new) whose lines are not written yet
        self._lock = Lock()

    @property
    def captioned_paths(self) -> set[str]:
        """Return the paths of the clips whose line in the list contains a caption.

        Raises:
            OutputError: If the list cannot be read.
        """
        with self._lock:
            return {path for path, line in self._read() if path and "caption" in parse_json(line)}

    def add(self, record: CutRecord, is_new: bool) -> None:
        """Add a source's lines to the list; existing lines of its clips stay.

        With `is_new` the source was cut in this run, and the list is written at once. Otherwise lines are
        added only for clips that still exist, because a user may have removed some.
        """
        lacks_lines = str(self._path) not in record.lists or not self._existed_before
        if is_new or lacks_lines:
            with self._lock:
                self._unlisted.append((record, is_new))
        if is_new:
            self.write()

    def write(self, removed: Collection[Path] = ()) -> None:
        """Write the list with the added lines and without the lines of `removed` clips, atomically.

        Raises:
            OutputError: If the list cannot be read again or written.
        """
        with self._lock:
            if not (self._unlisted or removed):
                return
            removed_paths = set(map(str, removed))
            kept_entries = [(path, line) for path, line in self._read() if path not in removed_paths]
            listed_paths = {path for path, _ in kept_entries}
            lines = [line for _, line in kept_entries]
            for record, is_new in self._unlisted:
                lines += self._make_missing_lines(record, listed_paths, is_new)
            content = "".join(f"{line}\n" for line in lines)
            write_bytes(self._path, content.encode("utf-8"))
            for record, _ in self._unlisted:
                # the record notes this list, so that lines that a user removes stay removed
                lists = tuple(dict.fromkeys([*record.lists, str(self._path)]))
                write_record(self._output, replace(record, lists=lists))
            self._unlisted = []

    def _make_missing_lines(
        self, record: CutRecord, listed_paths: Collection[str], is_new: bool
    ) -> list[str]:
        """Return lines for the clips of a video that are not in `listed_paths`."""
        # If the video was cut in an earlier run (`is_new` is False), only clips that still exist get a line.
        lines = []
        for clip in record.clips:
            entry = _make_entry(self._output, record, clip)
            exists = is_new or (self._output / clip.name).exists()
            if entry["video_path"] not in listed_paths and exists:
                lines.append(json.dumps(entry, ensure_ascii=False))
        return lines

    def _read(self) -> Iterator[tuple[str, str]]:
        """Yield (clip path, line) for each line of the list; the path is empty if the line names no clip."""
        try:
            for line in read_lines(self._path):
                try:
                    path = parse_json(line)["video_path"]
                except (ValueError, LookupError, TypeError):
                    path = None
                yield path if isinstance(path, str) else "", line
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise OutputError(
                f"--jsonl {self._path} exists and cannot be read: {reason}. Pass another name."
            ) from error


def _make_entry(output: Path, record: CutRecord, written: WrittenClip) -> dict[str, Any]:
    """Return a clip's entry in the list: path and properties. Captions are added later."""
    clip = written.clip
    return {
        "video_path": str(output / written.name),
        "source": replace_surrogates(record.source),
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

"""Find the captions of a dataset, record which of them this program wrote, and choose which to write.

A caption is a text file next to its image or clip, or the "caption" in a line of a JSONL list. A hidden file
next to the captions, `.captions_made.jsonl`, contains the hash of each text that this program wrote: a
caption without a matching line was written or edited by a person. The line is written before the caption, so
that a run killed between the two leaves only a line without effect.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dataset.config import DatasetConfig, DatasetTable
from dataset.forms.rows import RowReader
from dataset.listing import find_all_sources
from dataset.sources.captions import read_caption
from dataset.sources.media_source import MediaSource
from modules.atomic_write import append_text, atomic_path, write_text
from modules.backups import BACKUP, keep_backup
from modules.errors import DatasetError, OutputError
from modules.options import Options, option
from modules.paths import address_identity, expand_path, hide_secrets, is_address, short_hash
from modules.text_files import bad_character, looks_like_object, parse_json, read_lines, real_path

DEFAULT_EXTENSION = ".txt"  # for tables that name no extension
RECORD_NAME = ".captions_made.jsonl"
# number of attempts while another program writes a list, and seconds between them
MAX_WRITE_ATTEMPTS, RETRY_SECONDS = 5, 0.2
# reasons to make a caption; with HAND_WRITTEN, the old caption is backed up
MISSING, EMPTY, GENERATED, HAND_WRITTEN = "missing", "empty", "made by this program", "hand-written"


class WritingOptions(Options, title="what to do"):
    """Which captions are written and how they are reworded; shared by all captioning programs."""

    dry_run: bool = option(
        "name the captions that are missing and where they would be written; load and write nothing"
    )
    try_on: int | None = option(
        "make the captions of the first N files that lack one, print them, and write none; of any files if "
        "none lacks one",
        minimum=1,
        maximum=1000,
        metavar="N",
        excludes="dry_run",
    )
    overwrite: bool = option(
        "also write again the captions that this program wrote and nobody has edited since"
    )
    overwrite_all: bool = option(
        "replace all captions, also hand-written ones; these are kept next to the new ones as .bak"
    )
    fill_empty: bool = option("also write captions where the existing one is empty")


class LineChange(NamedTuple):
    """Values in a line of a JSONL list, by key, before and after a change."""

    old: dict[str, Any]
    new: dict[str, Any]


class CaptionList:
    """JSONL list whose captions are replaced one by one; the file is complete at any moment.

    Only changed lines are rewritten, and their other values are kept. If the file has changed on disk, it is
    read again first, so that edits by other programs are not lost.
    """

    def __init__(self, table: DatasetTable) -> None:
        """Read the JSONL list of a dataset table that has already been checked."""
        assert table.source.jsonl_file is not None
        self.path, self._key = table.source.jsonl_file, table.path_key
        self._lines: list[str] = []
        self._line_indices: dict[str, int] = {}  # by the path in the line
        self._stamp: tuple[int, int] | None = None  # time and size of the file when it was read
        self._has_backup = False  # whether the state before this run is backed up
        # fills _lines and _line_indices
        self._read()
        self.listed_paths: dict[Path, str] = {}  # path of a media file -> the path or address in its line
        rows = RowReader(table, self.path, self._key, is_list=True)
        for listed_path in self._line_indices:
            if is_address(listed_path):  # `rows` could read paths too, but is several times slower
                media_path = rows.read(self.read_line(listed_path), str(self.path)).path
            else:
                media_path = expand_path(listed_path)
            self.listed_paths[media_path] = listed_path

    def recover_pending(self, pending_file: Path) -> None:
        """Move captions that a killed run left in a file next to the list into the list.

        Raises:
            OutputError: If the list cannot be written.
        """
        pending_lines: dict[str, dict[str, Any]] = {}  # the last line for each path
        # the last line may be unfinished, even within a character
        content = pending_file.read_bytes().decode("utf-8", "replace")
        for text in content.split("\n"):
            with contextlib.suppress(ValueError, LookupError, TypeError):
                line = parse_json(text)
                pending_lines[line["path"]] = line
        changes: dict[str, LineChange] = {}
        is_hand_written = False  # whether any replaced caption was written by a person
        for listed_path in self._line_indices:
            pending = pending_lines.get(_hide_address(listed_path), {})
            current = self.read_line(listed_path).get("caption")
            current_hash = None if current is None else _hash_caption(str(current))
            is_unedited = current_hash == pending.get("old")  # since the pending caption was made
            if "caption" in pending and is_unedited:
                changes[listed_path] = LineChange({"caption": current}, {"caption": pending["caption"]})
                is_hand_written = is_hand_written or bool(pending.get("is_foreign"))
        self.write(changes, is_hand_written)
        pending_file.unlink()

    def read_line(self, listed_path: str) -> dict[str, Any]:
        """Return the values in the list's line for a path; {} if there is no such line."""
        index = self._line_indices.get(listed_path)
        return {} if index is None else parse_json(self._lines[index].strip("\ufeff"))

    def write(self, changes: Mapping[str, LineChange], is_hand_written: bool) -> int:
        """Write captions into lines of the list, except lines that have changed on disk since they were read.

        The first write of a run backs up the old list as .bak, unless there is a .bak and this program wrote
        all the replaced values.

        Args:
            changes: Old and new values, by the path in the line.
            is_hand_written: Whether a person wrote the replaced values.

        Returns:
            The number of lines that were written.

        Raises:
            OutputError: If the list cannot be written.
        """
        for _ in range(MAX_WRITE_ATTEMPTS):
            try:
                # another program has written the list: read it again before changing lines
                if _read_stamp(self.path) != self._stamp:
                    self._read()
                lines, count = self._change_lines(changes)
                if not count:
                    return 0
                # Backed up as .bak at the first write of a run. An existing backup is replaced only if a
                # person wrote the captions that are now replaced.
                has_older_backup = self.path.with_name(self.path.name + BACKUP).exists()
                if not self._has_backup and (is_hand_written or not has_older_backup):
                    keep_backup(self.path)
                    self._has_backup = True
                self._replace_file(lines)
            except (_ListChanged, FileNotFoundError):  # an editor may move the old file away first
                time.sleep(RETRY_SECONDS)
            else:
                self._lines = lines
                self._stamp = _read_stamp(self.path)
                return count
        raise OutputError(
            f"{self.path}: the list is gone, or another program keeps writing it. Put it back, or close that "
            "program, then run again."
        )

    def _change_lines(self, changes: Mapping[str, LineChange]) -> tuple[list[str], int]:
        """Return all lines of the list after the changes, and the number of changed lines."""
        # A change applies only if its line still has the old values.
        lines = list(self._lines)
        num_changed = 0
        for listed_path, (old, new) in changes.items():
            values = self.read_line(listed_path)
            if not values or any(values.get(key) != value for key, value in old.items()):
                continue
            text = json.dumps(values | new, ensure_ascii=False)
            if bad_character(text):  # another value contains half a surrogate pair, as an escape
                text = json.dumps(values | new)
            index = self._line_indices[listed_path]
            line = lines[index]
            # the line break and a byte order mark remain
            lines[index] = line.replace(line.strip("\ufeff\r\n"), text)
            num_changed += 1
        return lines, num_changed

    def _replace_file(self, lines: Sequence[str]) -> None:
        """Replace the list file atomically. Raises _ListChanged if it changed after it was read."""
        path = real_path(self.path)  # so that a symbolic link is not replaced by a file
        assert self._stamp is not None
        _, size_bytes = self._stamp
        with atomic_path(path, size_bytes) as temporary:
            temporary.write_bytes("".join(lines).encode("utf-8"))
            shutil.copymode(path, temporary)
            if _read_stamp(self.path) != self._stamp:
                raise _ListChanged

    def _read(self) -> None:
        """Read the lines of the list, and store the line index of each media path."""
        self._stamp = _read_stamp(self.path)
        with self.path.open(encoding="utf-8", newline="") as file:
            self._lines = file.readlines()
        self._line_indices = {}
        for index, line in enumerate(self._lines):
            # another program may have written only a part of a line so far
            with contextlib.suppress(ValueError, LookupError, TypeError):
                self._line_indices[str(parse_json(line.strip("\ufeff"))[self._key])] = index


class _ListChanged(Exception):
    """The list was changed by another program after it was read."""


def _read_stamp(path: Path) -> tuple[int, int]:
    """Return a file's modification time and size in bytes, which differ if another program changed it."""
    state = path.stat()
    return state.st_mtime_ns, state.st_size


def _hide_address(listed_path: str) -> str:
    """Return the path in a line of a list; for a URL, which may contain a secret, its hash."""
    return short_hash(address_identity(listed_path)) if is_address(listed_path) else listed_path


@dataclass(frozen=True, eq=False)
class CaptionLocation:
    """Where the caption of a media file is or will be: a text file, or a line of a list."""

    source: MediaSource
    file: Path  # a text file, or the list
    caption_list: CaptionList | None  # None: a text file that contains nothing but this caption
    listed_path: str  # the path or address in the line of the list; "" without a list
    caption: str | None  # current text; None: missing, or in a file and not read
    has_caption: bool
    prompt: str | None = None  # prompt for the model about this source; None: the common prompt

    @property
    def name(self) -> str:
        """Name of the caption in its folder's record file; URLs, which may contain secrets, are hashed."""
        if self.caption_list is None:
            return self.file.name
        return f"{self.file.name}: {_hide_address(self.listed_path)}"

    @property
    def display_path(self) -> str:
        """Path of the image or clip for messages, without passwords in an address."""
        return str(self.source.path) if self.caption_list is None else hide_secrets(self.listed_path)

    def __str__(self) -> str:
        return str(self.file) if self.caption_list is None else f"a line of {self.file}"

    def write(self, text: str, is_hand_written: bool, record: "GeneratedCaptions") -> bool:
        """Write a caption atomically; return False if the caption has changed since it was read.

        `is_hand_written` says that a person wrote the replaced caption, which is then backed up. `record`
        lists the captions in the folder that this program has written.

        Raises:
            OutputError: If the caption cannot be written.
        """
        if self.caption_list is not None:
            record.add(self.name, text)
            change = LineChange({"caption": self.caption}, {"caption": text})
            return self.caption_list.write({self.listed_path: change}, is_hand_written) > 0
        # another program or a person may have written the file since it was read
        try:
            has_changed = read_caption(self.file) != self.caption
        except DatasetError:  # it has become unreadable
            has_changed = True
        if has_changed:
            return False
        if is_hand_written:
            keep_backup(self.file)
        # record first: a killed run must not leave a caption that counts as hand-written
        record.add(self.name, text)
        write_text(self.file, text)
        return True


def find_caption_locations(config: DatasetConfig, reads_captions: bool) -> list[CaptionLocation]:
    """Return where each caption of a dataset is, or would be written: in a text file or in a line of a list.

    Media are listed as for caching, without control media and masks. A caption that several tables share is
    returned once. With `reads_captions`, existing captions in files are read too.

    Raises:
        DatasetError: If the dataset cannot be used, or has tables whose captions cannot be written.
    """
    unwritable = [
        table.name for table in config.datasets if not (table.source.directory or table.source.jsonl_file)
    ]
    if unwritable:
        raise DatasetError(
            f"{', '.join(unwritable)}: captions are written next to the files of a folder, or into a JSONL "
            "list, and this table is neither. Use a configuration with video_directory, image_directory, "
            "video_jsonl_file or image_jsonl_file over the same media."
        )
    tables = tuple(map(_with_media_only, config.datasets))
    caption_lists = {
        table.source.jsonl_file: CaptionList(table) for table in tables if table.source.jsonl_file is not None
    }
    locations: dict[tuple[Path, str], CaptionLocation] = {}
    for source in find_all_sources(dataclasses.replace(config, datasets=tables)):
        if source.caption_path is not None:
            has_caption = source.caption is not None
            caption = read_caption(source.caption_path) if reads_captions and has_caption else None
            location = CaptionLocation(
                source,
                source.caption_path,
                caption_list=None,
                listed_path="",
                caption=caption,
                has_caption=has_caption,
            )
        else:
            assert source.table.source.jsonl_file is not None  # else the source would have a caption file
            caption_list = caption_lists[source.table.source.jsonl_file]
            listed_path = caption_list.listed_paths.get(source.path)
            if listed_path is None:
                raise DatasetError(
                    f"{caption_list.path}: the line of {source.path} cannot be found again. Run again."
                )
            location = CaptionLocation(
                source,
                caption_list.path,
                caption_list=caption_list,
                listed_path=listed_path,
                caption=caption_list.read_line(listed_path).get("caption"),
                has_caption=source.caption is not None,
            )
        # tables may share files; each caption is located once
        locations.setdefault((location.file, location.listed_path), location)
    return list(locations.values())


def _with_media_only(table: DatasetTable) -> DatasetTable:
    """Return a copy of a table without control media, masks and audio, so that only media are listed."""
    return table.with_values(
        caption_extension=table.captions.caption_extension or DEFAULT_EXTENSION,
        control_directory=None,
        mask_directory=None,
        audio_directory=None,
        class_tokens=None,
        reads_listed_controls=False,
    )


def describe_missing_extensions(config: DatasetConfig) -> list[str]:
    """Return a message for each table that lacks caption_extension, the key for its caption files."""
    messages = []
    for table in config.datasets:
        if table.source.directory and not table.captions.caption_extension:
            messages.append(
                f"{table.name} has no caption_extension, so its captions are {DEFAULT_EXTENSION} files next "
                f"to its {table.kind}s. For caching, add this line to the table (or to [general]): "
                f'caption_extension = "{DEFAULT_EXTENSION}"'
            )
    return messages


class GeneratedCaptions:
    """Record of which captions in a folder this program wrote, in a file of JSON lines.

    A line is appended for each written caption, with its name and hash, and for the start and the end of
    each pass. A pass is a run that replaces captions; the same command can continue an interrupted one.
    """

    def __init__(self, folder: Path) -> None:
        """Read the record of which captions in a folder this program has written.

        Raises:
            DatasetError: If the record cannot be read.
        """
        self.path = folder / RECORD_NAME
        self._written: set[tuple[str, str]] = set()  # pairs of a caption's name and the hash of its text
        self._pass: str | None = None  # hash of the options of the unfinished pass
        self._names_in_pass: set[str] = set()  # names of the captions that this pass has written
        self._line_start = "\n"  # because a killed run may have left an unfinished line
        try:
            for line in read_lines(self.path):
                with contextlib.suppress(ValueError):
                    self._apply(parse_json(line))
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(
                f"{self.path} cannot be read: {error}. It says which captions this program wrote. Move it "
                "away: then all of them count as hand-written and are kept."
            ) from None

    def _apply(self, entry: Any) -> None:
        """Apply a line of the record file: a pass begins or ends, or a caption was written."""
        if "begin" in entry:
            self._pass = entry["begin"]
            self._names_in_pass = set()
        elif "end" in entry:
            self._pass = None
        else:
            self._written.add((entry["name"], entry["sha256"]))
            self._names_in_pass.add(entry["name"])

    def contains(self, name: str, text: str) -> bool:
        """Return whether this program wrote `text` as the caption with this name."""
        return (name, _hash_caption(text)) in self._written

    def add(self, name: str, text: str) -> None:
        """Record a caption that is about to be written.

        Raises:
            OutputError: If the record cannot be written.
        """
        self._append({"name": name, "sha256": _hash_caption(text)})

    def list_replaced_by(self, options_hash: str) -> set[str]:
        """Return the names of captions that an interrupted pass with the same options has replaced."""
        return self._names_in_pass if self._pass == options_hash else set()

    def begin_pass(self, options_hash: str) -> None:
        """Record the start of a pass over the files, unless it continues the last recorded pass."""
        if self._pass != options_hash:
            self._append({"begin": options_hash})

    def end_pass(self) -> None:
        """Record that the current pass is complete; do nothing without one."""
        if self._pass is not None:
            self._append({"end": True})

    def _append(self, entry: dict[str, Any]) -> None:
        """Append an entry to the record file, and apply it."""
        append_text(self.path, f"{self._line_start}{json.dumps(entry)}\n")
        self._line_start = ""
        self._apply(entry)


def _hash_caption(text: str) -> str:
    """Return the SHA-256 of a caption without surrounding white space."""
    return hashlib.sha256(text.strip().encode("utf-8")).hexdigest()


def read_generated_captions(locations: Iterable[CaptionLocation]) -> dict[Path, GeneratedCaptions]:
    """Return the record of generated captions for each folder that has captions."""
    folders = {location.file.parent for location in locations}
    return {folder: GeneratedCaptions(folder) for folder in folders}


class OverwriteRules(NamedTuple):
    """Which existing captions a run replaces, in addition to writing missing ones."""

    generated: bool  # captions that this program wrote and nobody has edited since
    all: bool  # all captions, also hand-written and empty ones
    empty: bool  # empty captions
    plain_text: bool = False  # captions that are not JSON objects


def plan_captions(
    locations: Sequence[CaptionLocation],
    records: Mapping[Path, GeneratedCaptions],
    overwrite_rules: OverwriteRules,
    options_hash: str,
) -> tuple[dict[CaptionLocation, str], int]:
    """Select the captions to make, with the reason for each.

    Args:
        locations: Locations of all captions.
        records: Record of each folder.
        overwrite_rules: Which existing captions to make again.
        options_hash: Hash of the options. A run with the same hash continues an interrupted one.

    Returns:
        The captions to make with the reason (MISSING, EMPTY, GENERATED or HAND_WRITTEN), and the number of
        captions that an interrupted run has already made again.
    """
    reasons = {}
    num_done_before = 0
    for location in locations:
        record = records[location.file.parent]
        reason = _reason_to_make(location, record, overwrite_rules)
        # without the record of the interrupted run, its captions would be replaced once more
        was_replaced = location.name in record.list_replaced_by(options_hash)
        if reason in (GENERATED, HAND_WRITTEN) and was_replaced:
            num_done_before += 1
        elif reason is not None:
            reasons[location] = reason
    return reasons, num_done_before


def _reason_to_make(
    location: CaptionLocation, record: GeneratedCaptions, overwrite_rules: OverwriteRules
) -> str | None:
    """Return why a caption has to be written; None if the existing one stays."""
    if not location.has_caption:
        return MISSING
    if location.caption is None:  # not read, or a line with a list of captions, which a person wrote
        return None
    if not location.caption.strip():
        return EMPTY if overwrite_rules.empty or overwrite_rules.all else None
    is_converted = overwrite_rules.plain_text and not looks_like_object(location.caption)
    if record.contains(location.name, location.caption):
        return GENERATED if overwrite_rules.generated or overwrite_rules.all or is_converted else None
    return HAND_WRITTEN if overwrite_rules.all or is_converted else None

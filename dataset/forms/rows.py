"""Turn the rows of lists and tables into sources: paths or URLs, captions, control media, masks."""

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast
from urllib.request import url2pathname

from dataset.forms.contract import FindCell, TableRow
from dataset.sources import media_source
from dataset.sources.captions import complete_captions, split_first_caption, split_lines
from dataset.sources.downloads import protocol_error
from dataset.sources.missing import explain_lookup
from dataset.sources.numbering import GAPS, find_gap
from dataset.sources.shown import read_row_references
from dataset.table import FURTHER_TEXT, DatasetTable
from modules.control_codes import shorten
from modules.errors import DatasetError
from modules.limits import MAX_CAPTION_BYTES
from modules.paths import (
    address_identity,
    expand_path,
    find_spelling,
    get_scheme,
    hide_secrets,
    is_address,
    split_address,
)
from modules.text_files import bad_character

logger = logging.getLogger(__name__)

MAX_SHOWN = 80  # characters of a path in a message
CAPTION_COLUMNS = ("caption", "text", "prompt")  # the first one that the table has is used
FIRST_ROWS = 100  # rows that are searched for the base folder of relative paths
# The column with paths is the first one that the table has of: image_path or video_path, these names, and
# `image` or `video`, which may also contain the files themselves
PATH_COLUMNS = ("path", "file_name", "url")
MULTI_CAPTION = "multi_caption = true"
AMBIGUOUS_PATH = (
    "%s: %s is both in the working folder and in %s: the first is used. Write absolute paths, or start in "
    "another folder, if that is wrong."
)
DOWNLOADS = "downloads"  # subfolder of the cache directory, if the table has no download_directory

# local path of a file, and where its bytes are; None: at that path
FileLocation = tuple[Path, media_source.Origin | None]


class _Media(NamedTuple):
    """The image or clip that a row names or contains."""

    location: FileLocation
    stem: str
    identity: str  # path, address or name; differs between sources, unlike the stem


class RejectedAddress(DatasetError):
    """Raised for a URL that the table does not allow, or whose protocol is not supported."""

    def __init__(self, reason: str, shown: str) -> None:
        super().__init__(f"{shown}: {reason}")
        self.reason, self.shown = reason, shown


@dataclass
class RowReader:
    """Reads the rows of one list or table as media files with captions and companion files."""

    table: DatasetTable
    file: Path  # the list or table, for messages
    path_column: str
    caption_column: str | None = "caption"
    is_list: bool = False  # a JSONL list: captions are used unchanged, and file names are unique
    base: Path | None = None  # base folder of relative paths; None: the working folder
    _identities: list[str] = field(default_factory=list)  # `_Media.identity` of each source that was read
    _gaps: list[str] = field(default_factory=list)  # messages about numbered columns that skip a number

    def read(
        self, values: Mapping[str, Any], position: str, contained: tuple[str, FileLocation] | None = None
    ) -> media_source.MediaSource:
        """Return the image or clip that a row names, with its caption and companion files.

        Args:
            values: Cells of the row by column, or the JSON object of a line.
            position: Position for messages, such as `list.jsonl, line 3`.
            contained: Stem and location of the image or clip, if the row itself contains it.

        Raises:
            DatasetError: If a value cannot be used.
            RejectedAddress: If a URL is not allowed.
        """
        if contained is None:
            media = self._read_media(values, position)
        else:
            stem, location = contained
            media = _Media(location, stem=stem, identity=stem)
        caption_texts = self._read_captions(values, position)
        captions = complete_captions(caption_texts, self.table) if caption_texts else None
        controls, references = self._read_controls_and_references(values, position)
        mask = self._read_file_cell("mask_path", values.get("mask_path"), position)
        layers = self._read_layers(values, position) if self.table.source.multiple_target else []
        control_mask = self._read_file_cell("control_mask_path", values.get("control_mask_path"), position)
        rejected = self._read_file_cell("worse_path", values.get("worse_path"), position)
        source = make_source(
            self.table,
            position=position,
            stem=media.stem,
            media=media.location,
            captions=captions,
            controls=controls[: self.table.references.control_count],
            mask=mask,
            references=references,
            control_mask=control_mask,
            rejected=rejected,
            layers=layers,
        )
        source = self._add_audio(source, values, position)
        if self.table.references.reads_row_references:
            source = self._add_row_references(source, values, position)
        self._identities.append(media.identity)  # `assign_unique_stems` uses it
        return source

    def _add_row_references(
        self, source: media_source.MediaSource, values: Mapping[str, Any], position: str
    ) -> media_source.MediaSource:
        """Return a source with the reference media and the further text that its row names."""
        if values.get("references") is not None:
            source = replace(
                source, row_references=read_row_references(values["references"], self.file, position)
            )
        if values.get(FURTHER_TEXT.key) is not None:
            value = values[FURTHER_TEXT.key]
            if not isinstance(value, str) or not value.strip():
                raise DatasetError(
                    f"{position}: {FURTHER_TEXT.key} = {_show(value)} is not text. Write what "
                    f"{FURTHER_TEXT.reader} reads, or omit it"
                )
            check_text(value, f"{position}: {FURTHER_TEXT.key}")
            source = replace(source, further_text=value)
        return source

    def _add_audio(
        self, source: media_source.MediaSource, values: Mapping[str, Any], position: str
    ) -> media_source.MediaSource:
        """Return a source with its audio file: the one that its row names, else one next to the clip."""
        audio_path = values.get("audio_path") if self.table.kind == "video" else None
        audio = self._read_file_cell("audio_path", audio_path, position)
        if audio is None and self.table.source.finds_audio_by_name and not source.remote_or_packed:
            from dataset.sources.folders import find_audio_beside  # few lists have audio

            audio = find_audio_beside(source.path)
        if audio is None:
            return source
        return replace(source, audio=cast(tuple[Path, media_source.Remote | None], audio))

    def _read_media(self, values: Mapping[str, Any], position: str) -> "_Media":
        """Return the image or clip that a row names, with its stem and the text that identifies it."""
        text = values.get(self.path_column)
        if (
            text is None and self.table.source.multiple_target
        ):  # image_path_0 is the image, image_path_1 a layer
            text = values.get(f"{self.path_column}_0")
        if not isinstance(text, str) or not text.strip():
            hint = self._explain_list(values) if self.is_list else ""
            is_missing = self.is_list or text is None or text == ""
            error = "is missing" if is_missing else "is not a path"
            raise DatasetError(f"{position}: {self.path_column} {error}{hint}")
        check_text(text, f"{position}: {self.path_column}")
        path, remote = self._locate(text, position)
        if remote is None:
            return _Media((path, None), stem=path.stem, identity=text)
        stem, _ = media_source.split_name(text)
        return _Media((path, remote), stem=stem, identity=address_identity(text))

    def _explain_list(self, values: Mapping[str, Any]) -> str:
        """Return a hint for a line without a path: an example line, or the table key for such lines."""
        name = self.path_column
        if f"{name}_0" in values:
            layers = f"{name}_0, {name}_1, ... are an image and its layers"
            return f", and {layers}: set multiple_target = true in the table"
        table_columns = (*PATH_COLUMNS, self.table.kind)
        text_columns = [name for name in table_columns if isinstance(values.get(name), str)]
        if text_columns and not self.table.source.is_audio_only:
            kind = self.table.kind
            return (
                f". {text_columns[0]} is read from tables: name the file in {kind}_table_file instead of "
                f"{kind}_jsonl_file"
            )
        example = f'{{"{name}": "...", "caption": "..."}}'
        return f". Each line is one object such as {example}"

    def _read_layers(self, values: Mapping[str, Any], position: str) -> list[FileLocation]:
        """Return a row's layers in the order of their numbers; the full image has the number 0 or none."""
        column = self.path_column
        if column in values and f"{column}_0" in values:
            raise DatasetError(f"{position}: {column} and {column}_0 both name the image; omit one")
        layers: dict[int, FileLocation] = {}
        for name, value in values.items():
            number = control_number(name, column)
            if not number:  # another column, or the full image
                continue
            layer = self._read_file_cell(name, value, position)
            if layer is not None:
                layers[number] = layer
        self._note_gap(layers, column, position)
        return [layers[number] for number in sorted(layers)]

    def _note_gap(self, files: Mapping[int, FileLocation], column: str, position: str) -> None:
        """Store a message about a row whose numbered columns skip a number, for a later warning."""
        gap = find_gap(files)
        if gap is not None:
            self._gaps.append(f"{position}: there is no {column}_{gap}, but {column}_{max(files)}")

    def _read_controls_and_references(
        self, values: Mapping[str, Any], position: str
    ) -> tuple[list[FileLocation], list[FileLocation]]:
        """Return a row's control media and its references, each in the order of their numbers."""
        controls: dict[int, FileLocation] = {}
        references: dict[int, FileLocation] = {}
        for name, value in values.items():
            control_index = control_number(name)
            if (
                name == self.table.references.control_column
            ):  # a column without a number has the first control image
                control_index = 0
            if control_index is not None:
                self._add_numbered_files(
                    controls, "control_path", name, value, first=control_index, position=position
                )
            reference_index = control_number(name, "reference_path")
            if reference_index is not None:
                self._add_numbered_files(
                    references, "reference_path", name, value, first=reference_index, position=position
                )
        self._note_gap(controls, "control_path", position)
        self._note_gap(references, "reference_path", position)
        ordered_controls = [controls[number] for number in sorted(controls)]
        ordered_references = [references[number] for number in sorted(references)]
        return ordered_controls, ordered_references

    def _add_numbered_files(
        self, files: dict[int, FileLocation], column: str, name: str, value: Any, first: int, position: str
    ) -> None:
        """Add the files in one cell of a row to `files`, by number."""
        # `control_path_2` with one path is file 2; with a list of three paths, it has the files 2, 3 and 4.
        paths = value if isinstance(value, list) else [value]
        for number, path in enumerate(paths, first):
            file = self._read_file_cell(name, path, position)
            if file is None:
                continue
            if number in files:
                unnumbered = (
                    "control_path and control_column are" if column == "control_path" else f"{column} is"
                )
                raise DatasetError(
                    f"{position}: {name} repeats the number of another {column}; {unnumbered} {column}_0"
                )
            files[number] = file

    def assign_unique_stems(
        self, sources: Sequence[media_source.MediaSource], faults: list[media_source.Fault]
    ) -> list[media_source.MediaSource]:
        """Return the media files of all rows with unique stems; add errors about several rows to `faults`.

        Equal stems get a hash. In a JSONL list, however, local files with equal names are an error, which is
        reported later.

        Args:
            sources: All media files that `read` returned, in order.
            faults: Errors are added to this list.
        """
        stems = media_source.unique_stems([source.stem for source in sources], self._identities)
        with_unique_stems = []
        for source, stem in zip(sources, stems, strict=True):
            is_local_in_list = self.is_list and not source.remote_or_packed
            keeps_stem = is_local_in_list or stem == source.stem
            with_unique_stems.append(source if keeps_stem else replace(source, stem=stem))
        numbered = media_source.number_repeats(with_unique_stems)
        if self._gaps:
            logger.warning("%s %s, such as %s", len(self._gaps), f"{self.unit}s {GAPS}", self._gaps[0])
        faults += find_missing_companions(self.table, numbered, f"{self.unit}s of {self.file}")
        return numbered

    @property
    def unit(self) -> str:
        """Word for a row in messages ("line" or "row")."""
        return "line" if self.is_list else "row"

    def _locate(self, text: str, position: str) -> tuple[Path, media_source.Remote | None]:
        """Return the local path of a file named in a row, and its URL (None for local files)."""
        if not is_address(text):
            return locate(text, self.base, position), None
        protocol = get_scheme(text)
        error = self._find_address_error(text, protocol)
        if error is not None:
            raise RejectedAddress(error, f"{position}: {hide_secrets(text)}")
        if protocol == "file":
            # equivalent to a path; like a path, it is only opened as an image or clip
            return Path(url2pathname(split_address(text).path)), None
        download = download_folder(self.table) / media_source.local_name(text)
        return download, media_source.Remote(text)

    def _find_address_error(self, address: str, protocol: str) -> str | None:
        """Return why a URL is rejected; None if it is allowed."""
        if not self.table.source.allow_urls:
            return "addresses are read only with allow_urls = true in the table"
        if "::" in address.split("/", 1)[0]:
            return "chains of addresses (::) are not followed"
        if protocol == "file":
            return None

        return protocol_error(protocol)

    def _read_captions(self, values: Mapping[str, Any], position: str) -> list[str]:
        """Return the caption of a row; with multi_caption, followed by its list `captions`."""
        name = self.caption_column
        caption = None if name is None else values.get(name)
        if caption is not None and not isinstance(caption, str):
            raise DatasetError(
                f"{position}: {name} = {_show(caption)} is not text{_make_caption_list_hint(caption)}"
            )
        captions = [] if caption is None else [caption]
        captions += self._further_captions(values, position)
        for text in captions:
            check_text(text, f"{position}: {name or 'captions'}")
        if self.is_list:  # captions of a JSONL list are used unchanged
            return captions
        captions = [text.strip() for text in captions]
        if caption is not None and self.table.captions.multi_caption:  # each line is a caption
            captions[:1] = split_lines(captions[0]) or [""]
        return captions

    def _further_captions(self, values: Mapping[str, Any], position: str) -> list[str]:
        """Return the further captions of a row, its list `captions`; only used with multi_caption."""
        texts = values.get("captions") if self.table.captions.multi_caption else None
        if texts is None:
            return []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DatasetError(f"{position}: captions = {_show(texts)} is not a list of strings")
        return texts

    def _read_file_cell(self, name: str, value: Any, position: str) -> FileLocation | None:
        """Return the file in a cell of control media, masks or audio; None if there is none."""
        # `value` is a path, or the `FileLocation` of a file that the row contains.
        is_blank = isinstance(value, str) and not value.strip()
        if value is None or (is_blank and not self.is_list):  # an empty cell of a CSV table means no file
            return None
        if is_blank:
            raise DatasetError(f"{position}: {name} is empty. Write a path, or omit it")
        if isinstance(value, tuple):  # a FileLocation already
            return value
        if not isinstance(value, str):
            raise DatasetError(f"{position}: {name} = {_show(value)} is not a path in quotes")
        check_text(value, f"{position}: {name}")
        return self._locate(value, position)


def list_rows(
    reader: RowReader,
    rows: Iterable[TableRow],
    faults: list[media_source.Fault],
    cell_finders: Mapping[str, FindCell] = MappingProxyType({}),
) -> list[media_source.MediaSource]:
    """Return the media files that rows name, in order; errors, with row numbers, are added to `faults`.

    `cell_finders` has, for each column that contains files, a function that finds the file of a row.
    """
    sources = []
    kind = f"{reader.unit}s of {reader.file} cannot be used"
    for row in rows:
        try:
            sources.append(_read_row(reader, row, cell_finders))
        except RejectedAddress as refused:
            faults.append(media_source.Fault(f"{kind}: {refused.reason}", refused.shown))
        except DatasetError as error:
            faults.append(media_source.Fault(kind, f"{str(error).rstrip('.')}."))
    return reader.assign_unique_stems(sources, faults)


def _read_row(
    reader: RowReader, row: TableRow, cell_finders: Mapping[str, FindCell]
) -> media_source.MediaSource:
    """Return the image or clip of a row; `cell_finders` find files that its cells contain."""
    if row.fault is not None:
        raise DatasetError(f"{row.position}: {row.fault}")
    if not cell_finders:
        return reader.read(row.values, row.position)
    media: tuple[str, FileLocation] | None = None
    values = {**row.values}
    for column, find_cell in cell_finders.items():
        origin = find_cell(row)
        if origin is None:  # null: the row has no file in this column
            continue
        number = f"{row.number:08d}"
        if column == reader.path_column:
            file_stem = media_source.readable_stem(row.file.stem).replace(".", "_")
            stem = f"{file_stem}_{number}"  # such as `train-00000-of-00002_00000012`
            media = stem, (row.file / number, origin)
        else:
            values[column] = row.file / f"{number} {media_source.readable_stem(column)}", origin
    return reader.read(values, row.position, media)


def make_source(
    table: DatasetTable,
    position: Path | str,
    stem: str,
    media: FileLocation,
    captions: tuple[str, ...] | None,
    controls: Sequence[FileLocation] = (),
    mask: FileLocation | None = None,
    references: Sequence[FileLocation] = (),
    control_mask: FileLocation | None = None,
    rejected: FileLocation | None = None,
    layers: Sequence[FileLocation] = (),
) -> media_source.MediaSource:
    """Return the media file of a row or a tar sample; `position` is for messages."""
    if mask is not None and table.source.alpha_mask:
        raise DatasetError(f"{position}: its mask and alpha_mask = true exclude each other; omit one.")
    caption, more_captions = split_first_caption(captions, position)
    optional = (mask, control_mask, rejected)
    mask_path, control_mask_path, rejected_path = (None if file is None else file[0] for file in optional)
    masks = [file for file in (mask, control_mask) if file is not None]
    all_rejected = [] if rejected is None else [rejected]
    # in the order of `MediaSource.latent_inputs`
    files = (media, *controls, *masks, *references, *all_rejected, *layers)
    remote_or_packed = tuple(origin for _, origin in files)
    media_path, _ = media
    return media_source.MediaSource(
        path=media_path,
        stem=stem,
        caption=caption,
        caption_path=None,
        control=_paths(controls),
        table=table,
        more_captions=more_captions,
        mask=mask_path,
        remote_or_packed=remote_or_packed if any(remote_or_packed) else (),
        references=_paths(references),
        control_mask=control_mask_path,
        rejected=rejected_path,
        layers=_paths(layers),
    )


def _paths(files: Sequence[FileLocation]) -> tuple[Path, ...]:
    """Return the local paths of files, without the places where their bytes are."""
    return tuple(path for path, _ in files)


def control_number(name: str, start: str = "control_path") -> int | None:
    """Return 0 for `control_path`, 2 for `control_path_2`, None for other columns."""
    if not name.startswith(start):
        return None
    match = re.fullmatch(r"(?:_(\d{1,9}))?", name[len(start) :])
    return None if match is None else int(match[1] or 0)


def download_folder(table: DatasetTable) -> Path:
    """Return the folder for downloads: download_directory, or a subfolder of the cache directory."""
    return table.source.download_directory or table.cache_directory / DOWNLOADS


def locate(text: str, base: Path | None, position: str) -> Path:
    """Return the path in a field of a row.

    `base` is the folder that relative paths refer to; None means the working folder.

    Raises:
        DatasetError: If the text cannot be a path.
    """
    try:
        return find_spelling(expand_path(text, base))
    except ValueError as error:
        raise DatasetError(f"{position}: {shorten(text, MAX_SHOWN)!r}: {error}.") from None


def check_text(text: str, position: str) -> None:
    """Raise DatasetError if a path or caption has invalid characters or is too long."""
    bad = bad_character(text)
    if bad is not None:
        raise DatasetError(f"{position} holds {bad}. Correct the line.")
    if len(text) > MAX_CAPTION_BYTES:
        raise DatasetError(
            f"{position} has {len(text):,} characters; at most {MAX_CAPTION_BYTES:,} are read. Shorten it."
        )


def find_missing_companions(
    table: DatasetTable, sources: Sequence[media_source.MediaSource], plural: str
) -> list[media_source.Fault]:
    """Return a fault for each item without control media or a rejected file if other items have them.

    `plural` names the rows or samples in messages: `lines of data.jsonl`.
    """
    faults: list[media_source.Fault] = []
    count = table.references.control_count  # None: any number
    if count is not None and any(source.control for source in sources):
        needed = "control_path" if count == 1 else f"control_path_0 to control_path_{count - 1}"
        without_controls = [source for source in sources if len(source.control) < count]
        faults += _make_faults(f"{plural} have no {needed}, while others have", without_controls)
    without_rejected = [source for source in sources if source.rejected is None]
    if len(without_rejected) < len(sources):
        faults += _make_faults(f"{plural} have no worse_path, while others have", without_rejected)
    return faults


def _make_faults(kind: str, sources: Iterable[media_source.MediaSource]) -> list[media_source.Fault]:
    """Return a fault of the same kind for each of these items."""
    return [media_source.Fault(kind, str(source.path), source.stem) for source in sources]


def _make_caption_list_hint(caption: Any) -> str:
    """Return how to write several captions of an item, if `caption` is a list of them; otherwise ""."""
    if not isinstance(caption, list):
        return ""
    return f". Write one text, or all in a list named captions, with {MULTI_CAPTION} in the table"


def _show(value: Any) -> str:
    """Return the beginning of a value for a message, without passwords in URLs."""
    return hide_secrets(json.dumps(value, default=repr)[:80])


def require_file(table: DatasetTable) -> Path:
    """Return the path of a list or table file.

    Raises:
        DatasetError: If the file does not exist.
    """
    path = table.source.path
    if not path.exists():
        end = explain_lookup(path, table.config_path)
        raise DatasetError(f"{table.name}: {table.source_key} = {path}: no such file{end}")
    return path


def names_read(table: DatasetTable, path_column: str, caption_column: str) -> set[str]:
    """Return the names of the columns that are read, except numbered ones (see `is_companion`)."""
    names = {path_column, caption_column, table.references.control_column or ""}
    names |= {"mask_path", "control_mask_path", "worse_path"}
    if table.captions.multi_caption:
        names.add("captions")
    if table.kind == "video":
        names.add("audio_path")
    return names - {""}


def is_companion(name: str) -> bool:
    """Return whether a column has numbered control media or references, such as `control_path_1`."""
    return control_number(name) is not None or control_number(name, "reference_path") is not None


def is_layer(table: DatasetTable, name: str) -> bool:
    """Return whether a numbered column contains an image or one of its layers."""
    return table.source.multiple_target and control_number(name, table.path_key) is not None


def is_control(table: DatasetTable, name: str) -> bool:
    """Return whether a column contains control images or clips."""
    return name == table.references.control_column or control_number(name) is not None


def find_base(path: Path, column: str, rows: Iterable[TableRow]) -> Path | None:
    """Return the folder that relative paths in a list or table refer to; None for the working folder.

    The first relative path that exists decides; None is also returned if none exists.

    Args:
        path: Path of the list or table.
        column: Column with the paths.
        rows: Rows of the list or table.
    """
    folder = path if path.is_dir() else path.parent
    for row in itertools.islice(rows, FIRST_ROWS):
        text = row.values.get(column)
        if not isinstance(text, str) or "\0" in text or not text.strip() or is_address(text):
            continue
        with contextlib.suppress(ValueError):  # a text that cannot be a path is reported with its row
            in_working_folder = expand_path(text)
            if in_working_folder.is_absolute():
                continue
            next_to_list = expand_path(text, folder)
            if in_working_folder.exists():
                is_ambiguous = next_to_list.exists() and not in_working_folder.samefile(next_to_list)
                if is_ambiguous:
                    logger.warning(AMBIGUOUS_PATH, path, text, folder)
                return None
            if next_to_list.exists():
                return folder
    return None

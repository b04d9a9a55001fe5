"""Turn the rows of lists and tables into sources: paths or addresses, captions, control media, masks."""

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
from dataset.sources.captions import complete_captions, first_and_more, lines_of
from dataset.sources.missing import explain_lookup
from dataset.sources.numbering import GAPS, find_gap
from dataset.table import FURTHER_TEXT, DatasetTable
from modules.control_codes import shorten
from modules.errors import DatasetError
from modules.limits import MAX_CAPTION_BYTES
from modules.paths import address_identity, expand_path, hide_secrets, is_address, protocol_of, split_address
from modules.text_files import bad_character

logger = logging.getLogger(__name__)

MAX_SHOWN = 80  # characters of a path in a message
CAPTION_COLUMNS = ("caption", "text", "prompt")  # the first one that the table has is used
FIRST_ROWS = 100  # rows that are searched for the base folder of relative paths
# The column with paths is the first one that the table has of: image_path or video_path, these names, and
# `image` or `video`, which may also contain the files themselves
PATH_COLUMNS = ("path", "file_name", "url")
MULTI_CAPTION = "multi_caption = true"
DOWNLOADS = "downloads"  # subfolder of the cache directory, if the table has no download_directory

Part = tuple[Path, media_source.Origin | None]  # local path, and where its bytes are; None: in that file


class _Media(NamedTuple):
    """The image or clip of a row."""

    part: Part
    stem: str
    identity: str  # path, address or name; differs between sources, unlike the stem


class RejectedAddress(DatasetError):
    """Raised for an address that the table does not allow or whose protocol is not supported."""

    def __init__(self, reason: str, shown: str) -> None:
        super().__init__(f"{shown}: {reason}")
        self.reason, self.shown = reason, shown


@dataclass
class RowReader:
    """Reader that turns the rows of one list or table into sources."""

    table: DatasetTable
    file: Path  # the list or table, for messages
    path_column: str
    caption_column: str | None = "caption"
    is_list: bool = False  # a JSONL list: captions are used unchanged, and file names are unique
    base: Path | None = None  # base folder of relative paths; None: the working folder
    _identities: list[str] = field(default_factory=list)  # `_Media.identity` of each source that was read
    _gaps: list[str] = field(default_factory=list)  # messages about numbered columns that skip a number

    def read(
        self, values: Mapping[str, Any], where: str, contained: tuple[str, Part] | None = None
    ) -> media_source.MediaSource:
        """Return the source that a row describes: an image or clip with its caption and companion files.

        Args:
            values: Cells of the row by column, or the object of a line.
            where: Position for messages, such as `list.jsonl, line 3`.
            contained: Stem and location of the image or clip, if the row itself contains it.

        Raises:
            DatasetError: If a value cannot be used.
            RejectedAddress: If an address is not allowed.
        """
        if contained is None:
            media = self._read_media(values, where)
        else:
            name, part = contained
            media = _Media(part, stem=name, identity=name)
        # all parts of the row
        texts = self._read_captions(values, where)
        captions = complete_captions(texts, self.table) if texts else None
        controls, references = self._read_parts(values, where)
        mask = self._read_part("mask_path", values.get("mask_path"), where)
        layers = self._read_layers(values, where) if self.table.multiple_target else []
        control_mask = self._read_part("control_mask_path", values.get("control_mask_path"), where)
        rejected = self._read_part("worse_path", values.get("worse_path"), where)
        source = make_source(
            self.table,
            where=where,
            stem=media.stem,
            media=media.part,
            captions=captions,
            controls=controls[: self.table.control_count],
            mask=mask,
            references=references,
            control_mask=control_mask,
            rejected=rejected,
            layers=layers,
        )
        source = self._add_audio(source, values, where)
        if self.table.shows_media and values.get("references") is not None:
            from dataset.sources.shown import read_shown  # few lists have references

            source = replace(source, shown=read_shown(values["references"], self.file, where))
        if self.table.shows_media and values.get(FURTHER_TEXT.key) is not None:
            source = replace(source, further_text=self._read_further_text(values[FURTHER_TEXT.key], where))
        self._identities.append(media.identity)  # `finish` makes the stems unique by it
        return source

    def _add_audio(
        self, source: media_source.MediaSource, values: Mapping[str, Any], where: str
    ) -> media_source.MediaSource:
        """Return a source with its audio file: the one named in its row, else one next to the clip."""
        audio_path = values.get("audio_path") if self.table.kind == "video" else None
        audio = self._read_part("audio_path", audio_path, where)
        if audio is None and self.table.finds_audio and not source.remote_or_packed:
            from dataset.sources.folders import find_audio_beside  # few lists have audio

            audio = find_audio_beside(source.path)
        if audio is None:
            return source
        return replace(source, audio=cast(tuple[Path, media_source.Remote | None], audio))

    def _read_media(self, values: Mapping[str, Any], where: str) -> "_Media":
        """Return the image or clip that a row names, with its stem and the text that identifies it."""
        text = values.get(self.path_column)
        if text is None and self.table.multiple_target:  # image_path_0 is the image, image_path_1 a layer
            text = values.get(f"{self.path_column}_0")
        if not isinstance(text, str) or not text.strip():
            hint = self._explain_list(values) if self.is_list else ""
            is_missing = self.is_list or text is None or text == ""
            error = "is missing" if is_missing else "is not a path"
            raise DatasetError(f"{where}: {self.path_column} {error}{hint}")
        check_text(text, f"{where}: {self.path_column}")
        path, remote = self._locate(text, where)
        if remote is None:
            return _Media((path, None), stem=path.stem, identity=text)
        stem, _ = media_source.split_name(text)
        return _Media((path, remote), stem=stem, identity=address_identity(text))

    def _explain_list(self, values: Mapping[str, Any]) -> str:
        """Return a hint for a line without a path: an example line, or the table key for such lines."""
        name = self.path_column
        if f"{name}_0" in values:
            layers = f"{name}_0, {name}_1, ... are a picture and its layers"
            return f", and {layers}: give the table multiple_target = true"
        others = [name for name in (*PATH_COLUMNS, self.table.kind) if isinstance(values.get(name), str)]
        if others and not self.table.is_of_audio:
            kind = self.table.kind
            return (
                f". {others[0]} is read from tables: give the file to {kind}_table_file in place of "
                f"{kind}_jsonl_file"
            )
        example = f'{{"{name}": "...", "caption": "..."}}'
        return f". Each line is one object such as {example}"

    def _read_layers(self, values: Mapping[str, Any], where: str) -> list[Part]:
        """Return the layers of a row, ordered by number. The full image has the number 0 or no number."""
        column = self.path_column
        if column in values and f"{column}_0" in values:
            raise DatasetError(f"{where}: {column} and {column}_0 both name the image; leave out one")
        layers: dict[int, Part] = {}
        for name, value in values.items():
            number = control_number(name, column)
            if not number:  # another column, or the full image
                continue
            part = self._read_part(name, value, where)
            if part is not None:
                layers[number] = part
        self._note_gap(layers, column, where)
        return [layers[number] for number in sorted(layers)]

    def _note_gap(self, parts: Mapping[int, Part], column: str, where: str) -> None:
        """Remember, for a later warning, a row whose numbered columns skip a number."""
        gap = find_gap(parts)
        if gap is not None:
            self._gaps.append(f"{where}: there is no {column}_{gap}, but {column}_{max(parts)}")

    def _read_parts(self, values: Mapping[str, Any], where: str) -> tuple[list[Part], list[Part]]:
        """Return the control media and the references of a row, each ordered by number."""
        controls: dict[int, Part] = {}
        references: dict[int, Part] = {}
        for name, value in values.items():
            control_index = control_number(name)
            if name == self.table.control_column:
                control_index = 0
            if control_index is not None:
                self._add_parts(controls, "control_path", name, value, first=control_index, where=where)
            reference_index = control_number(name, "reference_path")
            if reference_index is not None:
                self._add_parts(references, "reference_path", name, value, first=reference_index, where=where)
        self._note_gap(controls, "control_path", where)
        self._note_gap(references, "reference_path", where)
        ordered_controls = [controls[number] for number in sorted(controls)]
        ordered_references = [references[number] for number in sorted(references)]
        return ordered_controls, ordered_references

    def _add_parts(
        self, parts: dict[int, Part], column: str, name: str, value: Any, first: int, where: str
    ) -> None:
        """Add the files in a column to `parts`, by their numbers.

        Args:
            parts: Control media, or references, of the row so far.
            column: Default name of such columns, for messages.
            name: Name of the column.
            value: A path, or a list of paths.
            first: Number of the first path.
            where: Position of the row, for messages.
        """
        paths = value if isinstance(value, list) else [value]
        for number, path in enumerate(paths, first):
            part = self._read_part(name, path, where)
            if part is None:
                continue
            if number in parts:
                names = f"{column} and control_column are" if column == "control_path" else f"{column} is"
                raise DatasetError(
                    f"{where}: {name} repeats the number of another {column}; {names} {column}_0"
                )
            parts[number] = part

    def finish(
        self, sources: Sequence[media_source.MediaSource], faults: list[media_source.Fault]
    ) -> list[media_source.MediaSource]:
        """Return all sources of the rows with unique stems; add errors about several rows to `faults`.

        `sources` are all sources that `read` returned, in order.
        """
        stems = media_source.unique_stems([source.stem for source in sources], self._identities)
        named = []
        for source, stem in zip(sources, stems, strict=True):
            # equal file names in a list are an error, which is reported later; tables get a hash in the stem
            keeps_stem = stem == source.stem or (self.is_list and not source.remote_or_packed)
            named.append(source if keeps_stem else replace(source, stem=stem))
        numbered = media_source.number_repeats(named)
        if self._gaps:
            logger.warning("%s %s, such as %s", len(self._gaps), f"{self.unit}s {GAPS}", self._gaps[0])
        return check_controls(self.table, numbered, faults, where=f"{self.unit}s of {self.file}")

    @property
    def unit(self) -> str:
        """Word for a row in messages."""
        return "line" if self.is_list else "row"

    def _locate(self, text: str, where: str) -> tuple[Path, media_source.Remote | None]:
        """Return the local path of a file, and its address; None for a local file."""
        if not is_address(text):
            return locate(text, self.base, where), None
        protocol = protocol_of(text)
        error = self._find_address_error(text, protocol)
        if error is not None:
            raise RejectedAddress(error, f"{where}: {hide_secrets(text)}")
        if protocol == "file":
            # equivalent to a path; like a path, it is only opened as an image or clip
            return Path(url2pathname(split_address(text).path)), None
        download = download_folder(self.table) / media_source.local_name(text)
        return download, media_source.Remote(text)

    def _find_address_error(self, address: str, protocol: str) -> str | None:
        """Return the reason why an address is rejected; None if it is allowed."""
        if not self.table.allow_urls:
            return "addresses are read only with allow_urls = true in the table"
        if "::" in address.split("/", 1)[0]:
            return "chains of addresses (::) are not followed"
        if protocol == "file":
            return None
        from dataset.sources.downloads import protocol_error  # few tables have URLs

        return protocol_error(protocol)

    def _read_captions(self, values: Mapping[str, Any], where: str) -> list[str]:
        """Return the caption of a row; with multi_caption, the texts of its list `captions` follow."""
        name = self.caption_column
        caption = None
        if name is not None:
            caption = values.get(name)
        if caption is not None and not isinstance(caption, str):
            hint = ""
            if isinstance(caption, list):
                hint = f". Write one text, or all in a list captions, with {MULTI_CAPTION} in the table"
            raise DatasetError(f"{where}: {name} = {_show(caption)} is not a text{hint}")
        captions = []
        if caption is not None:
            captions.append(caption)
        captions += self._further_captions(values, where)
        for text in captions:
            check_text(text, f"{where}: {name or 'captions'}")
        if self.is_list:  # captions of a JSONL list are used unchanged
            return captions
        stripped = [text.strip() for text in captions]
        if caption is None or not self.table.multi_caption:
            return stripped
        first_lines = lines_of(stripped[0]) or [""]  # with multi_caption, each line is a caption
        return [*first_lines, *stripped[1:]]

    def _read_further_text(self, value: Any, where: str) -> str:
        """Return the `FURTHER_TEXT` of a row. Raises DatasetError if it is not a text."""
        if not isinstance(value, str) or not value.strip():
            raise DatasetError(
                f"{where}: {FURTHER_TEXT.key} = {_show(value)} is not a text. Write what "
                f"{FURTHER_TEXT.reader} reads, or leave it out"
            )
        check_text(value, f"{where}: {FURTHER_TEXT.key}")
        return value

    def _further_captions(self, values: Mapping[str, Any], where: str) -> list[str]:
        """Return the list `captions` of a row, which only tables with multi_caption have."""
        texts = values.get("captions") if self.table.multi_caption else None
        if texts is None:
            return []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DatasetError(f"{where}: captions = {_show(texts)} is not a list of texts")
        return texts

    def _read_part(self, name: str, value: Any, where: str) -> Part | None:
        """Return the file in a column of control media, masks or audio; None if there is none.

        `value` is a path, or the `Part` of a file that the row contains.
        """
        is_blank = isinstance(value, str) and not value.strip()
        if value is None or (is_blank and not self.is_list):  # an empty cell of a CSV table means no file
            return None
        if is_blank:
            raise DatasetError(f"{where}: {name} is empty. Write a path, or leave it out")
        if isinstance(value, tuple):
            return value
        if not isinstance(value, str):
            raise DatasetError(f"{where}: {name} = {_show(value)} is not a path in quotes")
        check_text(value, f"{where}: {name}")
        return self._locate(value, where)


def list_rows(
    reader: RowReader,
    rows: Iterable[TableRow],
    faults: list[media_source.Fault],
    cells: Mapping[str, FindCell] = MappingProxyType({}),
) -> list[media_source.MediaSource]:
    """Return the sources of rows, in order; errors, with row numbers, are added to `faults`.

    `cells` has a function for each column with files, which locates the file in the cell of a row.
    """
    sources = []
    kind = f"{reader.unit}s of {reader.file} cannot be used"
    for row in rows:
        try:
            sources.append(_read_row(reader, row, cells))
        except RejectedAddress as refused:
            faults.append(media_source.Fault(f"{kind}: {refused.reason}", refused.shown))
        except DatasetError as error:
            faults.append(media_source.Fault(kind, f"{str(error).rstrip('.')}."))
    return reader.finish(sources, faults)


def _read_row(reader: RowReader, row: TableRow, cells: Mapping[str, FindCell]) -> media_source.MediaSource:
    """Return the source of a row; `cells` has a function for each column of files, which finds a row's file.

    Raises:
        DatasetError: If the row has a fault, or a cell is invalid.
    """
    if row.fault is not None:
        raise DatasetError(f"{row.where}: {row.fault}")
    if not cells:
        return reader.read(row.values, row.where)
    media: tuple[str, Part] | None = None
    values = {**row.values}
    for column, find_cell in cells.items():
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
    return reader.read(values, row.where, media)


def make_source(
    table: DatasetTable,
    where: Path | str,
    stem: str,
    media: Part,
    captions: tuple[str, ...] | None,
    controls: Sequence[Part] = (),
    mask: Part | None = None,
    references: Sequence[Part] = (),
    control_mask: Part | None = None,
    rejected: Part | None = None,
    layers: Sequence[Part] = (),
) -> media_source.MediaSource:
    """Make a source from a row, or from a sample of a tar; `where` is its position, for messages."""
    if mask is not None and table.alpha_mask:
        raise DatasetError(f"{where}: its mask and alpha_mask = true exclude each other; leave out one.")
    caption, more_captions = first_and_more(captions, where)
    masks = [part for part in (mask, control_mask) if part is not None]
    all_rejected = [] if rejected is None else [rejected]
    # in the order of `MediaSource.parts`
    parts = (media, *controls, *masks, *references, *all_rejected, *layers)
    remote_or_packed = tuple(origin for _, origin in parts)
    media_path, _ = media
    return media_source.MediaSource(
        path=media_path,
        stem=stem,
        caption=caption,
        caption_path=None,
        control=tuple(path for path, _ in controls),
        table=table,
        more_captions=more_captions,
        mask=None if mask is None else mask[0],
        remote_or_packed=remote_or_packed if any(remote_or_packed) else (),
        references=tuple(path for path, _ in references),
        control_mask=None if control_mask is None else control_mask[0],
        rejected=None if rejected is None else rejected[0],
        layers=tuple(path for path, _ in layers),
    )


def control_number(name: str, start: str = "control_path") -> int | None:
    """Return 0 for `control_path`, 2 for `control_path_2`, None for other columns."""
    if not name.startswith(start):
        return None
    match = re.fullmatch(r"(?:_(\d{1,9}))?", name[len(start) :])
    return None if match is None else int(match[1] or 0)


def download_folder(table: DatasetTable) -> Path:
    """Return the folder for downloads: download_directory, or a subfolder of the cache directory."""
    return table.download_directory or table.cache_directory / DOWNLOADS


def locate(text: str, base: Path | None, where: str) -> Path:
    """Return the path written in a field of a row.

    `base` is the base folder of relative paths; None means the working folder.

    Raises:
        DatasetError: If the text cannot be a path.
    """
    try:
        return expand_path(text, base)
    except ValueError as error:
        raise DatasetError(f"{where}: {shorten(text, MAX_SHOWN)!r}: {error}.") from None


def check_text(text: str, where: str) -> None:
    """Raise DatasetError if a text has invalid characters or is too long for a path or caption."""
    bad = bad_character(text)
    if bad is not None:
        raise DatasetError(f"{where} holds {bad}. Correct the line.")
    if len(text) > MAX_CAPTION_BYTES:
        raise DatasetError(
            f"{where} has {len(text):,} characters, at most {MAX_CAPTION_BYTES:,} are read. Shorten it."
        )


def check_controls(
    table: DatasetTable, sources: list[media_source.MediaSource], faults: list[media_source.Fault], where: str
) -> list[media_source.MediaSource]:
    """Add a fault for each source without control media or a rejected item if other sources have some.

    Returns `sources` unchanged. `where` names the rows or samples in messages.
    """
    count = table.control_count  # None: any number
    if count is not None and any(source.control for source in sources):
        lacking = [source for source in sources if len(source.control) < count]
        needed = "control_path" if count == 1 else f"control_path_0 to control_path_{count - 1}"
        kind = f"{where} have no {needed}, while others have"
        faults += [media_source.Fault(kind, str(source.path), source.stem) for source in lacking]
    if any(source.rejected for source in sources):
        kind = f"{where} have no worse_path, while others have"
        lacking = [source for source in sources if source.rejected is None]
        faults += [media_source.Fault(kind, str(source.path), source.stem) for source in lacking]
    return sources


def _show(value: Any) -> str:
    """Return the beginning of a value for a message, without passwords in addresses."""
    return hide_secrets(json.dumps(value, default=repr)[:80])


def require_file(table: DatasetTable) -> Path:
    """Return the file of a list or table.

    Raises:
        DatasetError: If the file does not exist.
    """
    path = table.source
    if not path.exists():
        end = explain_lookup(path, table.config_path)
        raise DatasetError(f"{table.name}: {table.source_key} = {path}: no such file{end}")
    return path


def names_read(table: DatasetTable, path_column: str, caption_column: str) -> set[str]:
    """Return the names of the columns that are read, without numbered ones (see `is_companion`)."""
    names = {path_column, caption_column, table.control_column or ""}
    names |= {"mask_path", "control_mask_path", "worse_path"}
    if table.multi_caption:
        names.add("captions")
    if table.kind == "video":
        names.add("audio_path")
    return names - {""}


def is_companion(name: str) -> bool:
    """Return whether a column has numbered control media or references, such as `control_path_1`."""
    return control_number(name) is not None or control_number(name, "reference_path") is not None


def is_layer(table: DatasetTable, name: str) -> bool:
    """Return whether a numbered column has an image or one of its layers."""
    return table.multiple_target and control_number(name, table.path_key) is not None


def is_control(table: DatasetTable, name: str) -> bool:
    """Return whether a column has control media."""
    return name == table.control_column or control_number(name) is not None


def find_base(path: Path, column: str, rows: Iterable[TableRow]) -> Path | None:
    """Return the base folder of relative paths; None for the working folder, or if no file is found.

    The first relative path of an existing file decides.

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
                if next_to_list.exists() and not in_working_folder.samefile(next_to_list):
                    logger.warning(
                        "%s: %s is both in the working folder and in %s: the first is used. Write absolute "
                        "paths, or start in another folder, if that is wrong.",
                        path,
                        text,
                        folder,
                    )
                return None
            if next_to_list.exists():
                return folder
    return None

"""Turn the rows of lists and tables into sources: paths or addresses, captions, control media, masks."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from urllib.request import url2pathname

from dataset.config import DatasetTable
from dataset.sources import media_source
from dataset.sources.captions import complete_captions, first_and_more, lines_of
from modules.control_codes import shorten
from modules.errors import DatasetError
from modules.limits import MAX_CAPTION_BYTES
from modules.paths import address_identity, expand_path, hide_secrets, is_address, protocol_of, split_address
from modules.text_files import bad_character

MOST_SHOWN = 80  # characters of a path in a message
DOWNLOADS = "downloads"  # the folder in the cache directory, if the table names no other

Part = tuple[Path, media_source.Origin | None]  # a file, and where its bytes are if they are not there


class RefusedAddress(DatasetError):
    """Raised for an address that the table does not allow, or that cannot be read here."""

    def __init__(self, reason: str, shown: str) -> None:
        super().__init__(f"{shown}: {reason}")
        self.reason, self.shown = reason, shown


@dataclass
class RowReader:
    """Make the sources of one list or table."""

    table: DatasetTable
    file: Path  # for messages
    path_column: str
    caption_column: str | None = "caption"
    is_list: bool = False  # a JSONL list, whose texts are captions as they stand and whose names are unique
    base: Path | None = None  # where relative paths start; None: in the working folder
    _identities: list[str] = field(default_factory=list)  # of each source, differs if sources do

    def read(
        self, values: Mapping[str, Any], where: str, held: tuple[str, Part] | None = None
    ) -> media_source.MediaSource:
        """Return the source of a row. where: `list.jsonl, line 3`. held: name and place of a file in the row.

        Raises DatasetError if a value cannot be used, RefusedAddress for an address that is not followed.
        """
        if held is None:
            text = values.get(self.path_column)
            if not isinstance(text, str) or not text.strip():
                example = f'{{"{self.path_column}": "...", "caption": "..."}}'
                hint = f". Each line is one object such as {example}" if self.is_list else ""
                problem = "is missing" if self.is_list or text is None or text == "" else "is not a path"
                raise DatasetError(f"{where}: {self.path_column} {problem}{hint}")
            check_text(text, f"{where}: {self.path_column}")
            media: Part = self._locate(text, where)
            stem, identity = media[0].stem, text
            if isinstance(media[1], media_source.Remote):
                stem, identity = media_source.split_name(text)[0], address_identity(text)
        else:
            (stem, media), identity = held, held[0]
        found = self._captions(values, where)
        captions = complete_captions(found, self.table) if found else None
        found_beside: dict[str, dict[int, Part]] = {"control_path": {}, "reference_path": {}}
        for name in values:
            for start, numbered in found_beside.items():
                is_named = start == "control_path" and name == self.table.control_column
                first = 0 if is_named else control_number(name, start)
                several = values[name] if isinstance(values[name], list) else [values[name]]
                for number, value in enumerate(several if first is not None else (), first or 0):
                    if (part := self._part(name, value, where)) is None:
                        continue
                    if number in numbered:
                        more = " and control_column are" if start == "control_path" else " is"
                        raise DatasetError(
                            f"{where}: {name} repeats the number of another {start}; {start}{more} {start}_0"
                        )
                    numbered[number] = part
        controls, references = ([part for _, part in sorted(one.items())] for one in found_beside.values())
        controls = controls[: self.table.control_count]
        mask = self._part("mask_path", values.get("mask_path"), where)
        white = self._part("control_mask_path", values.get("control_mask_path"), where)
        beside = controls, mask, references, white
        source = make_source(self.table, where, stem, media, captions, *beside)
        sound = values.get("audio_path") if self.table.kind == "video" else None
        if (sound := self._part("audio_path", sound, where)) is not None:
            source = replace(source, sound=cast(tuple[Path, media_source.Remote | None], sound))
        self._identities.append(identity)
        return source

    def finish(
        self, sources: Sequence[media_source.MediaSource], faults: list[media_source.Fault]
    ) -> list[media_source.MediaSource]:
        """Return the sources with stems of their own where theirs clash; add faults of all rows to `faults`.

        sources: all that `read` made, in order.
        """
        stems = media_source.unique_stems([source.stem for source in sources], self._identities)
        named = [
            source
            if stem == source.stem or (self.is_list and not source.origins)
            else replace(source, stem=stem)
            for source, stem in zip(sources, stems, strict=True)
        ]
        return check_controls(
            self.table, media_source.number_repeats(named), faults, f"{self.unit}s of {self.file}"
        )

    @property
    def unit(self) -> str:
        return "line" if self.is_list else "row"

    def _locate(self, text: str, where: str) -> tuple[Path, media_source.Remote | None]:
        """Return the local path of a file, and its address if it has one."""
        if not is_address(text):
            return locate(text, self.base, where), None
        table, protocol = self.table, protocol_of(text)
        refused = None if table.allow_urls else "addresses are read only with allow_urls = true in the table"
        if refused is None and "::" in text.split("/", 1)[0]:
            refused = "chains of addresses (::) are not followed"
        if refused is None and protocol == "file":
            # a path in other words, and as one only opened as an image or a clip
            return Path(url2pathname(split_address(text).path)), None
        if refused is None:
            from dataset.sources.downloads import protocol_problem

            refused = protocol_problem(protocol)
        if refused is not None:
            raise RefusedAddress(refused, f"{where}: {hide_secrets(text)}")
        return download_folder(table) / media_source.local_name(text), media_source.Remote(text)

    def _captions(self, values: Mapping[str, Any], where: str) -> list[str]:
        """Return the caption, followed with multi_caption by the texts of the list `captions`."""
        name = self.caption_column
        caption = None if name is None else values.get(name)
        if caption is not None and not isinstance(caption, str):
            raise DatasetError(f"{where}: {name} = {_show(caption)} is not a text")
        more = values.get("captions") if self.table.multi_caption else None
        if more is not None and not (isinstance(more, list) and all(isinstance(one, str) for one in more)):
            raise DatasetError(f"{where}: captions = {_show(more)} is not a list of texts")
        captions = [*([] if caption is None else [caption]), *(more or ())]
        for one in captions:
            check_text(one, f"{where}: {name or 'captions'}")
        if self.is_list:
            return captions
        stripped = [one.strip() for one in captions]
        if caption is None or not self.table.multi_caption:
            return stripped
        return [*(lines_of(stripped[0]) or [""]), *stripped[1:]]

    def _part(self, name: str, value: Any, where: str) -> Part | None:
        """Return the file in a column of control media, masks or sound; None if there is none.

        value: a path, or the place of a file that is in the row.
        """
        is_blank = isinstance(value, str) and not value.strip()
        if value is None or (is_blank and not self.is_list):
            return None
        if is_blank:
            raise DatasetError(f"{where}: {name} is empty. Write a path, or leave it out")
        if isinstance(value, tuple):
            return value
        if not isinstance(value, str):
            raise DatasetError(f"{where}: {name} = {_show(value)} is not a path in quotes")
        check_text(value, f"{where}: {name}")
        return self._locate(value, where)


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
) -> media_source.MediaSource:
    """Return the source made from one row, or from one sample of a tar. where: for messages."""
    if mask is not None and table.alpha_mask:
        raise DatasetError(f"{where}: its mask and alpha_mask = true exclude each other; leave out one.")
    first, more = first_and_more(captions, where)
    parts = (media, *controls, *filter(None, (mask, control_mask)), *references)
    origins = tuple(origin for _, origin in parts)
    return media_source.MediaSource(
        media[0],
        stem,
        first,
        None,
        tuple(path for path, _ in controls),
        table,
        more,
        None if mask is None else mask[0],
        origins=origins if any(origins) else (),
        references=tuple(path for path, _ in references),
        control_mask=None if control_mask is None else control_mask[0],
    )


def control_number(name: str, start: str = "control_path") -> int | None:
    """Return 0 for `control_path`, 2 for `control_path_2`, None for other columns."""
    if not name.startswith(start):
        return None
    match = re.fullmatch(r"(?:_(\d{1,9}))?", name[len(start) :])
    return None if match is None else int(match[1] or 0)


def download_folder(table: DatasetTable) -> Path:
    return table.download_directory or table.cache_directory / DOWNLOADS


def locate(text: str, base: Path | None, where: str) -> Path:
    """Return the path that a row names. base: where a relative one starts; None: in the working folder."""
    try:
        return expand_path(text, base)
    except ValueError as error:
        raise DatasetError(f"{where}: {shorten(text, MOST_SHOWN)!r}: {error}.") from None


def check_text(text: str, where: str) -> None:
    """Raise DatasetError for a text that can be neither a file's name nor a caption."""
    found = bad_character(text)
    if found is not None:
        raise DatasetError(f"{where} holds {found}. Correct the line.")
    if len(text) > MAX_CAPTION_BYTES:
        raise DatasetError(
            f"{where} has {len(text):,} characters, at most {MAX_CAPTION_BYTES:,} are read. Shorten it."
        )


def check_controls(
    table: DatasetTable, sources: list[media_source.MediaSource], faults: list[media_source.Fault], where: str
) -> list[media_source.MediaSource]:
    """Add a fault for each source with too few control media, if any source has one. Returns `sources`."""
    count = table.control_count
    if count is not None and any(source.control for source in sources):
        lacking = [source for source in sources if len(source.control) < count]
        needed = "control_path" if count == 1 else f"control_path_0 to control_path_{count - 1}"
        kind = f"{where} have no {needed}, while others have"
        faults += [media_source.Fault(kind, str(source.path), source.stem) for source in lacking]
    return sources


def _show(value: Any) -> str:
    return hide_secrets(json.dumps(value, default=repr)[:80])

"""The samples of one tar: read from its headers once, then kept beside the caches for the next run.

A sample is the files of a tar whose names are equal up to the first dot (the WebDataset form). Texts are read
at the same time, because they lie beside the headers. Reading the headers of a million samples takes some
seconds from memory, and far longer from a disk, which has to go to each of them.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dataset.sources.columns import open_parquet, read_columns
from dataset.sources.tar_reading import Member, TarDamage, compression_of, read_members
from modules.atomic_write import atomic_path
from modules.errors import DatasetError, OutputError
from modules.paths import short_hash
from modules.text_files import MAX_CAPTION_BYTES, bad_character, parse_json, require_regular_file

logger = logging.getLogger(__name__)

VERSION = 1
FOLDER = "tar_index"  # in the cache directory
INDEX_KEY = b"reelsmith_tar_index"
LEAST_SAMPLES = 1000  # fewer are read from their tar each time
MASK, CONTROL = "mask", "control"
_ROLE = re.compile(r"(mask|control)(?:_(\d{1,9}))?(\.\w+)", re.ASCII)


@dataclass(frozen=True)
class TarRules:
    """Roles of a sample's files."""

    media: tuple[str, ...]  # suffixes
    spare: tuple[str, ...]  # suffixes that count if there is no other
    beside: tuple[str, ...]  # suffixes of masks and control media
    caption_suffix: str  # ".txt"
    caption_names: tuple[str, ...]  # in a .json, in order
    json_first: bool
    multi_caption: bool


@dataclass(frozen=True, slots=True)
class TarSample:
    """An image or clip in a tar, and its companions."""

    key: str  # name up to the first dot, with its folder
    media: Member
    caption: str | None
    extras: tuple[tuple[str, int, Member], ...] = ()  # MASK or CONTROL, number, member


@dataclass
class TarIndex:
    """Content of a tar."""

    samples: list[TarSample] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)  # key and what is wrong
    others: list[str] = field(default_factory=list)  # the first of the keys without media
    num_others: int = 0
    damage: str | None = None  # why the tar cannot be read to its end


def read_index(tar: Path, rules: TarRules, cache_directory: Path) -> TarIndex:
    """Return the samples of a tar, from the kept index if the tar has not changed since.

    Raises DatasetError if it is compressed or not a tar, OSError if it cannot be read.
    """
    require_regular_file(tar)
    stat = tar.stat()
    made_for = json.dumps(
        [VERSION, stat.st_size, stat.st_mtime_ns, dataclasses.asdict(rules)], ensure_ascii=False
    )
    path = cache_directory / FOLDER / f"{tar.stem[:80]}-{short_hash(str(tar.resolve()))}.parquet"
    if path.is_file():
        kept = _read_kept(path, made_for)
        if kept is not None:
            return kept
    with tar.open("rb", buffering=0) as file:
        found = _scan(file, stat.st_size, rules, tar)
    # a tar that just grows may have the same time twice; damage is looked at again
    if len(found.samples) >= LEAST_SAMPLES and found.damage is None and not found.faults:
        _keep(path, made_for, found)
    return found


def _scan(file: BinaryIO, size_bytes: int, rules: TarRules, tar: Path) -> TarIndex:
    compressed = compression_of(file.read(8))
    if compressed is not None:
        how, command = compressed
        raise DatasetError(
            f"{tar} is compressed with {how}, so that single files of it cannot be read. Unpack it once: "
            f"{command} {tar.name}"
        )
    index = TarIndex()
    groups: dict[str, dict[str, Member | str]] = {}  # key -> what is behind the first dot -> where, or text
    last = ""
    try:
        for member in read_members(file, size_bytes):
            key, end = _split(member.name)
            if not end or not key.rpartition("/")[2]:  # also what begins with a dot
                continue
            group, last = groups.setdefault(key, {}), key
            if end in group:
                index.faults.append((key, f"{member.name} is there twice"))
            elif f".{end}" in (rules.caption_suffix, ".json"):
                group[end] = _read_text(file, member)
            else:
                group[end] = member
    except TarDamage as damage:
        if damage.is_no_tar:
            raise DatasetError(
                f"{tar} is no tar, or it is damaged at its beginning. Make it again."
            ) from None
        final = groups.pop(last, {})
        # complete if it has the same kinds of files as another
        if any(group.keys() == final.keys() for group in groups.values()):
            groups[last] = final
            lost = "what follows"
        else:
            lost = f"{last} and what follows"
        index.damage = f"{damage}. {len(groups)} samples before that are used, {lost} cannot be read"
    for key, group in groups.items():
        _add(index, key, group, rules)
    return index


def _split(name: str) -> tuple[str, str]:
    """Return a member's key and the part behind its first dot, in lower case."""
    folder, mark, base = name.removeprefix("./").rpartition("/")
    key, _, end = base.partition(".")
    return f"{folder}{mark}{key}", end.lower()


def _read_text(file: BinaryIO, member: Member) -> str:
    """Return the text of a member; one that is no text begins with NUL, which no text holds."""
    if member.size_bytes > MAX_CAPTION_BYTES:
        return f"\0has {member.size_bytes:,} bytes, at most {MAX_CAPTION_BYTES:,} are read"
    file.seek(member.offset)
    try:
        text = file.read(member.size_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        return "\0is not UTF-8 text"
    found = bad_character(text)
    return f"\0holds {found}" if found else text.replace("\r\n", "\n").replace("\r", "\n")


def _add(index: TarIndex, key: str, group: dict[str, Member | str], rules: TarRules) -> None:
    """Add the sample of a group of files to the index, or its fault."""
    files = {end: one for end, one in group.items() if isinstance(one, Member)}
    roles = {end: role for end in files if (role := _role(end, rules)) is not None}
    found = _media(files.keys() - roles.keys(), rules)
    if not found:
        index.num_others += 1
        if not index.others:
            index.others.append(key)
        return
    if len(found) > 1:
        index.faults.append((key, f"it has several files to learn: {', '.join(found)}; keep one"))
        return
    texts = {end: one for end, one in group.items() if isinstance(one, str)}
    try:
        caption = _caption(texts, rules)
    except ValueError as error:
        index.faults.append((key, str(error)))
        return
    extras = sorted((*roles[end], end) for end in roles)
    if len({extra[:2] for extra in extras}) < len(extras):
        index.faults.append((key, f"it has two files of one kind among {', '.join(roles)}; keep one"))
        return
    beside = tuple((role, number, files[end]) for role, number, end in extras)
    index.samples.append(TarSample(key, files[found[0]], caption, beside))


def _role(end: str, rules: TarRules) -> tuple[str, int] | None:
    """Return the role of `mask.png` or `control_1.png`, and its number; None for other files."""
    match = _ROLE.fullmatch(end)
    if match is None or match[3] not in rules.beside or (match[1] == MASK and match[2] is not None):
        return None
    return match[1], int(match[2] or 0)


def _media(ends: Collection[str], rules: TarRules) -> list[str]:
    """Return the files to learn: named exactly like a suffix, else those that end in one."""
    for suffixes in (rules.media, rules.spare):
        exact = [end for end in ends if f".{end}" in suffixes]
        found = exact or [end for end in ends if f".{end.rpartition('.')[2]}" in suffixes]
        if found:
            return sorted(found)
    return []


def _caption(texts: dict[str, str], rules: TarRules) -> str | None:
    """Return the caption in the texts of a sample. Raises ValueError if it cannot be used."""
    text, told = texts.get(rules.caption_suffix[1:]), texts.get("json")
    for end, one in texts.items():
        if one.startswith("\0"):
            raise ValueError(f"its .{end} {one[1:]}")
    if text is not None and not (rules.json_first and told is not None):
        return text.strip()
    if told is None:
        return None
    try:
        record = parse_json(told)
    except ValueError as error:
        raise ValueError(f"its .json is not valid: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("its .json is not an object")
    name = next((one for one in rules.caption_names if record.get(one) is not None), None)
    caption = None if name is None else record[name]
    more = record.get("captions") if rules.multi_caption else None
    captions = [*([] if caption is None else [caption]), *(more if isinstance(more, list) else [])]
    if not all(isinstance(one, str) and not bad_character(one) for one in captions):
        raise ValueError(f"{name or 'captions'} in its .json is not a text")
    if rules.multi_caption:
        captions = [captions[0], *(" ".join(one.split()) for one in captions[1:])] if captions else []
        return "\n".join(captions).strip() if captions else None
    return captions[0].strip() if captions else None


# --- the index that is kept
# ------------------------------------------------------------------------------------------------------------


def _keep(path: Path, made_for: str, index: TarIndex) -> None:
    """Write an index. A folder that cannot be written is no fault: the tar is read again next time."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return
    samples = index.samples
    table = pa.table(
        {
            "key": [one.key for one in samples],
            "name": [one.media.name for one in samples],
            "offset": [one.media.offset for one in samples],
            "size": [one.media.size_bytes for one in samples],
            "caption": pa.array([one.caption for one in samples], pa.string()),
            "extras": pa.array([_pack_extras(one) for one in samples], pa.string()),
        }
    )
    told = json.dumps({"made_for": made_for, "others": index.others, "num_others": index.num_others})
    table = table.replace_schema_metadata({INDEX_KEY: told.encode()})
    try:
        with atomic_path(path) as temporary:
            parquet.write_table(table, temporary, compression="zstd")
    except OutputError as error:
        logger.info("the index of a tar is not kept: %s", error)


def _pack_extras(sample: TarSample) -> str | None:
    if not sample.extras:
        return None
    return json.dumps(
        [[role, number, one.name, one.offset, one.size_bytes] for role, number, one in sample.extras]
    )


def _unpack_extras(text: str | None) -> tuple[tuple[str, int, Member], ...]:
    return tuple((role, number, Member(*rest)) for role, number, *rest in json.loads(text or "[]"))


def _read_kept(path: Path, made_for: str) -> TarIndex | None:
    """Return a kept index; None if it is of another state of the tar, or damaged."""
    try:
        with open_parquet(path) as file:
            told: dict[str, Any] = json.loads((file.schema_arrow.metadata or {})[INDEX_KEY])
        if told["made_for"] != made_for:
            return None
        samples = list(map(_kept_sample, _rows(path)))
        return TarIndex(samples, [], list(told["others"]), int(told["num_others"]))
    except (DatasetError, KeyError, TypeError, ValueError):
        return None


def _rows(path: Path) -> Iterator[Any]:
    return (row.values for row in read_columns(path))


def _kept_sample(row: dict[str, Any]) -> TarSample:
    return TarSample(
        row["key"],
        Member(row["name"], row["offset"], row["size"]),
        row.get("caption"),
        _unpack_extras(row["extras"]) if "extras" in row else (),
    )

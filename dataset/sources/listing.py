"""Find the sources of a dataset table, whatever its source is, and check what holds for all of them.

Below: those of image_tars and video_tars, WebDataset tars, which are not unpacked.
"""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.captions import captions_in, explain_captions, read_caption
from dataset.sources.cogvideox import list_cogvideox
from dataset.sources.fetching import HTTP, download, find_remote
from dataset.sources.folders import (
    describe_entries,
    list_table_folder,
    media_suffixes,
    unsearched_folders,
)
from dataset.sources.frames import mask_suffixes
from dataset.sources.media_source import (
    LISTED,
    NO_REFERENCE,
    Fault,
    MediaSource,
    TarMember,
    is_of_shards,
    list_faults,
    local_name,
    pause_collection,
    raise_faults,
    readable_stem,
    unique_stems,
)
from dataset.sources.references import lack_references, limit_references
from dataset.sources.rows import Part, check_controls, download_folder, make_source
from dataset.sources.tables import CAPTION_COLUMNS, list_metadata, list_rows
from dataset.sources.tar_index import CONTROL, MASK, Member, TarRules, TarSample, read_index
from dataset.sources.unread import find_unread
from modules.control_codes import escape_control_codes, shorten
from modules.errors import DatasetError, MediaError
from modules.limits import MAX_PATTERN_NAMES
from modules.paths import expand_path, hide_secrets, is_address, protocol_of, split_address

logger = logging.getLogger(__name__)

MOST_READ = 20_000  # captions, only to warn
MOST_OF_STEM = 190  # bytes; a cache adds span, size and family, and while it is written a temporary ending


def _hint_of_start(table: DatasetTable) -> str:
    """Return what to do if a relative path of a table seems to be meant from the folder of its file."""
    folder, path = table.config_path.absolute().parent, table.directory
    if path is None or path.is_absolute() or folder == Path.cwd() or not (folder / path).is_dir():
        return ""
    return f" Relative paths start in the current folder: to start beside the file, first `cd {folder}`."


def find_sources(
    table: DatasetTable, captions: bool = True, faults: list[Fault] | None = None
) -> list[MediaSource]:
    """Return all sources of a table, sorted by path.

    captions=False reads no caption files: latents do not need them. A missing caption is None. It is not
    checked whether files named by a JSONL list exist. Raises DatasetError if a folder or list is missing or
    empty, and with all faults if captions cannot be read, lines are malformed, control media are missing or
    misnamed, or two sources have the same stem and would share a cache file. faults: a list that takes the
    faults instead; then all usable sources are returned.
    """
    found: list[Fault] = []
    with pause_collection():
        if table.directory is not None:
            if not table.directory.is_dir() and (hint := _hint_of_start(table)):
                raise DatasetError(f"{table.name}: there is no such folder from here.{hint}")
            sources = list_table_folder(table, captions, found)
        elif table.tars is not None:
            sources = list_tars(table, found)
        elif table.metadata_file is not None:
            sources = list_metadata(table, found)
        elif table.cogvideox_root is not None:
            sources = list_cogvideox(table, found)
        else:
            sources = list_rows(table, found)
    if not sources and not found:
        holds = describe_entries(table) if table.directory is not None else "has no lines"
        holds = f"holds no {table.kind}s" if table.tars is not None else holds
        hint = _hint_of_start(table)
        raise DatasetError(f"{table.name}: {table.source} {holds}. Add some, or correct the path.{hint}")
    if table.directory is None:  # those of a folder are sorted
        sources.sort(key=lambda source: str(source.path))
    sources = limit_references(table, sources)
    first: dict[str, MediaSource] = {}  # by stem: the beginning of the names of caches
    same = f"pairs of {table.name} would share a cache file; rename one of each, or use two tables"
    twice = f"rows of {table.name} repeat another one and would share a cache file; take them out"
    long = f"names of {table.name} are too long for the names of their caches; rename the files"
    for source in sources:
        other = first.setdefault(os.path.normcase(source.stem), source)
        if other is not source and other.path == source.path:
            found.append(Fault(twice, str(source.path), source.stem))
        elif other is not source:
            found.append(Fault(same, f"{other.path} and {source.path}", source.stem))
        # no character takes more than four bytes
        if len(source.stem) * 4 > MOST_OF_STEM and (size := len(os.fsencode(source.stem))) > MOST_OF_STEM:
            text = f"{source.path}: {size} bytes, at most {MOST_OF_STEM} leave room"
            found.append(Fault(long, text, source.stem))
    if faults is None:
        raise_faults(found)
        warn_skipped(found)
    else:
        faults += found
    return sources


def warn_skipped(faults: Sequence[Fault]) -> None:
    """Warn about unreadable parts that are left out, such as the end of a tar that is cut short."""
    lines = list_faults([fault for fault in faults if not fault.ends_run], LISTED)
    if lines:
        logger.warning("%s", "\n".join(lines))


def find_all_sources(
    config: DatasetConfig, captions: bool = True, skipped: list[tuple[DatasetTable, Fault]] | None = None
) -> list[MediaSource]:
    """Return the sources of all tables, in order. Raises DatasetError with the faults of all tables.

    skipped: takes unreadable parts that are left out, with their table; without it there is a warning.
    """
    sources: list[MediaSource] = []
    problems = []
    for table in config.datasets:
        faults: list[Fault] = []
        try:
            sources += find_sources(table, captions, faults)
            raise_faults(faults)
        except DatasetError as error:
            problems.append(str(error))
        if skipped is None:
            warn_skipped(faults)
        else:
            skipped += [(table, fault) for fault in faults if not fault.ends_run]
    if problems:
        raise DatasetError("\n".join(problems))
    for line in unsearched_folders(config):
        logger.warning("%s", line)
    return sources


def warn_unused(config: DatasetConfig, sources: Sequence[MediaSource]) -> None:
    """Warn about columns that nothing reads, and if a model that edits gets no reference picture at all."""
    unread = [fault for table in config.datasets for fault in find_unread(table)]
    if unread:
        logger.warning("%s", escape_control_codes("\n".join(list_faults(unread, LISTED))))
    if lack_references(config.datasets, sources):
        logger.warning("%s", NO_REFERENCE)


def missing_captions(sources: Iterable[MediaSource]) -> list[str]:
    """Return one line per source without a caption: the file, and where its caption was searched."""
    lines = []
    for source in sources:
        table, where = source.table, "no caption_extension in its table, such as .txt"
        if source.caption is not None:
            continue
        if source.caption_path is not None:
            hint = ", and no class_tokens in its table" if table.group is not None else ""
            where = f"no {source.caption_path.name} beside it{hint}"
        elif table.metadata_file:
            where = 'neither "caption" nor "tags" in its entry'
        elif table.jsonl_file:
            where = 'no "caption" in its line'
        elif table.table_file:
            where = f'no "{table.caption_column or "caption"}" in its row'
        elif table.tars:
            where = "no text file and no caption in a .json of the same name in the tar"
        lines.append(f"{source.path}: {where}")
    return lines


def require_captions(sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError listing the sources without a caption."""
    kind = f"of {len(sources)} captions are missing; write them, then run again"
    raise_faults([Fault(kind, line) for line in missing_captions(sources)])


def warn_captions(sources: Sequence[MediaSource]) -> None:
    """Warn about captions that are missing or cannot be used, which text caching will refuse, before hours of
    encoding clips. Of files at most MOST_READ are looked at.
    """
    missing: list[MediaSource] = []
    bad: dict[Path, str] = {}
    for source in [one for one in sources if one.caption is None][:MOST_READ]:
        path = source.caption_path
        try:
            if (path is None or read_caption(path) is None) and source.table.class_tokens is None:
                missing.append(source)
        except DatasetError as error:
            bad |= {} if path is None else {path: str(error)}
    if missing:
        logger.warning(
            "%s%d of %d have no caption, and text caching needs one for each. The first: %s",
            "at least " if len(sources) > MOST_READ else "",
            len(missing),
            len(sources),
            missing_captions(missing[:1])[0],
        )
    if bad:
        lines = "\n  ".join(explain_captions(list(bad), list(bad.values()))[:LISTED])
        logger.warning("%d captions cannot be used, which text caching refuses:\n  %s", len(bad), lines)


# --- tars
# ------------------------------------------------------------------------------------------------------------

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})", re.ASCII)


def list_tars(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    """Return the sources of the table, in any order; add errors to `faults`.

    Tars at addresses are downloaded first. A tar that is cut or cannot be downloaded is a fault that ends no
    run. Raises DatasetError if no tar is named.
    """
    samples: list[tuple[Path, TarSample]] = []
    rules = TarRules(
        media=tuple(sorted(media_suffixes(table.kind))),
        spare=tuple(sorted(media_suffixes(table.kind, animated=True))),
        beside=tuple(sorted(mask_suffixes(table.kind))),
        caption_suffix=(table.caption_extension or ".txt").lower(),
        caption_names=CAPTION_COLUMNS if table.caption_column is None else (table.caption_column,),
        json_first=table.caption_column is not None,
        multi_caption=table.multi_caption,
    )
    num_others, example = 0, ""
    for tar in _find_tars(table, faults):
        kind = f"tars of {table.name} cannot be read to their end"
        try:
            index = read_index(tar, rules, table.cache_directory)
        except DatasetError as error:
            faults.append(Fault(f"tars of {table.name} cannot be used", str(error)))
            continue
        except OSError as error:
            faults.append(Fault(kind, f"{tar}: {error.strerror}", ends_run=False))
            continue
        samples += [(tar, sample) for sample in index.samples]
        kind_of_sample = f"samples of {table.name} cannot be used"
        faults += [Fault(kind_of_sample, f"{name_parts(tar, key)}: {text}.") for key, text in index.faults]
        if index.damage is not None:
            faults.append(Fault(kind, f"{tar}: {index.damage}", ends_run=False))
        num_others += index.num_others
        example = example or next((str(name_parts(tar, key)) for key in index.others), "")
    if num_others:
        logger.warning(
            "%s: %d samples, such as %s, hold no %s and are not used.",
            table.name,
            num_others,
            example,
            table.kind,
        )
    return check_controls(table, _sources(table, samples, faults), faults, f"samples of {table.name}")


def _sources(
    table: DatasetTable, samples: Sequence[tuple[Path, TarSample]], faults: list[Fault]
) -> list[MediaSource]:
    """Return the sources of samples; the stem of one is its key, with a hash where two tars have it."""
    names = Counter(tar.name for tar in {tar for tar, _ in samples})
    labels = {tar: tar.name if names[tar.name] == 1 else str(tar) for tar, _ in samples}
    stems = unique_stems(
        [readable_stem(sample.key) for _, sample in samples],
        [f"{labels[tar]}/{sample.key}" for tar, sample in samples],
    )

    def part(tar: Path, member: Member) -> Part:
        origin = TarMember(tar, member.offset, member.size_bytes)
        return name_parts(tar, readable_path(member.name)), origin

    sources = []
    for (tar, sample), stem in zip(samples, stems, strict=True):
        media, controls, masks = part(tar, sample.media), list[Part](), list[Part]()
        for role, _, member in sample.extras:
            if role in (CONTROL, MASK):
                (controls if role == CONTROL else masks).append(part(tar, member))
        try:
            captions = None if sample.caption is None else captions_in(sample.caption, table)
            controls, mask = controls[: table.control_count], next(iter(masks), None)
            sources.append(make_source(table, media[0], stem, media, captions, controls, mask))
        except DatasetError as error:
            faults.append(Fault(f"samples of {table.name} cannot be used", str(error), stem))
    return sources


def name_parts(path: Path, name: str) -> Path:
    """Return the name of a member in messages: the tar's path, then the parts of its name."""
    return path.joinpath(*(part for part in name.split("/") if part not in ("", ".", "..")))


def readable_path(name: str) -> str:
    """Return a member's name with each part as `readable_stem` writes it; the suffix stays."""
    folder, mark, base = name.rpartition("/")
    if mark:
        folder = "/".join(map(readable_stem, folder.split("/")))
    stem, dot, suffix = base.rpartition(".")
    return f"{folder}{mark}{readable_stem(stem)}{dot}{suffix}"


# --- which tars
# ------------------------------------------------------------------------------------------------------------


def _find_tars(table: DatasetTable, faults: list[Fault]) -> list[Path]:
    """Return the tars that a table names, each once, in order; those at addresses are downloaded."""
    assert table.tars is not None
    found: dict[Path, None] = {}
    for pattern in table.tars:
        for name in expand_braces(pattern, table.name):
            if is_address(name) and not table.allow_urls:
                kind = f"tars of {table.name} are at addresses, read only with allow_urls = true"
                faults.append(Fault(kind, hide_secrets(name)))
                continue
            try:
                found |= dict.fromkeys(_tars_of(table, name))
            except MediaError as error:
                faults.append(Fault(f"tars of {table.name} cannot be had", str(error), ends_run=False))
            except DatasetError as error:
                faults.append(Fault(f"names in {table.name} are of no tar", str(error)))
    return list(found)


def _tars_of(table: DatasetTable, name: str) -> Iterator[Path]:
    """Yield the tars of a name without braces. Raises DatasetError if there is none, MediaError if one
    cannot be downloaded.
    """
    if is_address(name) and protocol_of(name) == "file":
        name = url2pathname(split_address(name).path)
    if is_address(name):
        has_pattern = protocol_of(name) not in HTTP and any(mark in name for mark in "*?[")
        addresses = find_remote(name) if has_pattern else [name]
        if not addresses:
            raise DatasetError(f"{hide_secrets(name)}: no file there fits.")
        for address in addresses:
            target = download_folder(table) / local_name(address)
            if not target.is_file():
                logger.info("downloading %s", hide_secrets(address))
            download(address, target)
            yield target
        return
    try:
        path = expand_path(name)
    except ValueError as error:
        raise DatasetError(f"{shorten(name, 80)!r}: {error}.") from None
    if path.exists():
        if path.is_dir():
            raise DatasetError(f"{path} is a folder. Name its tars: {path / '*.tar'}")
        yield path
        return
    has_pattern = any(mark in name for mark in "*?[")
    matches = sorted(glob.glob(str(path))) if has_pattern else []  # noqa: PTH207  # of any depth and root
    # the caches may lie beside the sources
    matches = [name for name in matches if not is_of_shards(Path(name).name)]
    if not matches:
        looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        raise DatasetError(f"{path}: no such file{looked}. Correct the path.")
    yield from map(Path, matches)


def expand_braces(pattern: str, where: str) -> list[str]:
    """Return the names that `{000..012}` and `{a,b}` stand for, in order; numbers keep their zeros.

    Raises DatasetError if they are too many.
    """
    names = [pattern]
    while _BRACES.search(names[0]):
        longer: list[str] = []
        for name in names:
            found = _BRACES.search(name)
            assert found is not None  # equal but for what others stood for
            options: Sequence[Any] = found[1].split(",")
            width, limits = 0, _RANGE.fullmatch(found[1])
            if limits is not None:
                first, last = int(limits[1]), int(limits[2])
                width = len(limits[1]) if limits[1].startswith("0") else 0
                options = range(first, last + 1) if first <= last else range(first, last - 1, -1)
            if len(longer) + len(options) > MAX_PATTERN_NAMES:
                raise DatasetError(
                    f"{where}: {hide_secrets(pattern)} stands for more than {MAX_PATTERN_NAMES:,} names"
                )
            longer += [f"{name[: found.start()]}{one:0>{width}}{name[found.end() :]}" for one in options]
        names = longer
    return names

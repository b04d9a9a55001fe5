"""Find the sources of image_tars and video_tars: WebDataset tars, which are not unpacked."""

import glob
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from dataset.config import DatasetTable
from dataset.sources import media_source
from dataset.sources.captions import captions_in
from dataset.sources.downloads import HTTP, check_tar, download, find_remote
from dataset.sources.folders import media_suffixes
from dataset.sources.frames import mask_suffixes
from dataset.sources.rows import Part, check_controls, download_folder, make_source
from dataset.sources.tables import CAPTION_COLUMNS
from dataset.sources.tar_index import CONTROL, MASK, Member, TarRules, TarSample, read_index
from modules.control_codes import shorten
from modules.errors import DatasetError, MediaError
from modules.limits import MAX_PATTERN_NAMES
from modules.paths import expand_path, hide_secrets, is_address, protocol_of, split_address

logger = logging.getLogger(__name__)

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})", re.ASCII)


def list_tars(table: DatasetTable, faults: list[media_source.Fault]) -> list[media_source.MediaSource]:
    """Return the sources of the table, in any order; add errors to `faults`.

    Tars at addresses are downloaded first. A tar that is cut or cannot be downloaded is a fault that ends no
    run. Raises DatasetError if no tar is named.
    """
    samples: list[tuple[Path, TarSample]] = []
    rules = TarRules(
        media=tuple(sorted(media_suffixes(table.kind)[0])),
        spare=tuple(sorted(media_suffixes(table.kind)[1])),
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
            faults.append(media_source.Fault(f"tars of {table.name} cannot be used", str(error)))
            continue
        except OSError as error:
            faults.append(media_source.Fault(kind, f"{tar}: {error.strerror}", ends_run=False))
            continue
        samples += [(tar, sample) for sample in index.samples]
        kind_of_sample = f"samples of {table.name} cannot be used"
        faults += [
            media_source.Fault(kind_of_sample, f"{name_parts(tar, key)}: {text}.")
            for key, text in index.faults
        ]
        if index.damage is not None:
            faults.append(media_source.Fault(kind, f"{tar}: {index.damage}", ends_run=False))
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
    table: DatasetTable, samples: Sequence[tuple[Path, TarSample]], faults: list[media_source.Fault]
) -> list[media_source.MediaSource]:
    """Return the sources of samples. A sample's stem is its key, with a hash if two tars have that key."""
    names = Counter(tar.name for tar in {tar for tar, _ in samples})
    labels = {tar: tar.name if names[tar.name] == 1 else str(tar) for tar, _ in samples}
    stems = media_source.unique_stems(
        [media_source.readable_stem(sample.key) for _, sample in samples],
        [f"{labels[tar]}/{sample.key}" for tar, sample in samples],
    )

    def part(tar: Path, member: Member) -> Part:
        origin = media_source.TarMember(tar, member.offset, member.size_bytes)
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
            faults.append(media_source.Fault(f"samples of {table.name} cannot be used", str(error), stem))
    return sources


def name_parts(path: Path, name: str) -> Path:
    return path.joinpath(*(part for part in name.split("/") if part not in ("", ".", "..")))


def readable_path(name: str) -> str:
    """Return a member's name with each part as `readable_stem` writes it; the suffix stays."""
    folder, mark, base = name.rpartition("/")
    if mark:
        folder = "/".join(map(media_source.readable_stem, folder.split("/")))
    stem, dot, suffix = base.rpartition(".")
    return f"{folder}{mark}{media_source.readable_stem(stem)}{dot}{suffix}"


# --- which tars
# ------------------------------------------------------------------------------------------------------------


def _find_tars(table: DatasetTable, faults: list[media_source.Fault]) -> list[Path]:
    """Return the tars that a table names, each once, in order; those at addresses are downloaded."""
    assert table.tars is not None
    found: dict[Path, None] = {}
    for pattern in table.tars:
        for name in expand_braces(pattern, table.name):
            if is_address(name) and not table.allow_urls:
                kind = f"tars of {table.name} are at addresses, read only with allow_urls = true"
                faults.append(media_source.Fault(kind, hide_secrets(name)))
                continue
            try:
                found |= dict.fromkeys(_tars_of(table, name))
            except MediaError as error:
                faults.append(
                    media_source.Fault(f"tars of {table.name} cannot be had", str(error), ends_run=False)
                )
            except DatasetError as error:
                faults.append(media_source.Fault(f"names in {table.name} are of no tar", str(error)))
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
            target = download_folder(table) / media_source.local_name(address)
            if not target.is_file():
                logger.info("downloading %s", hide_secrets(address))
            download(address, target, check=check_tar)
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
    matches = [name for name in matches if not media_source.OF_SHARDS.fullmatch(Path(name).name)]
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

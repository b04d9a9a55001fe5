"""Find the sources of image_tars and video_tars: WebDataset tars, which are not unpacked."""

import errno
import glob
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import url2pathname

from dataset.forms.rows import (
    CAPTION_COLUMNS,
    FileLocation,
    download_folder,
    find_missing_companions,
    make_source,
)
from dataset.forms.tars_index import CONTROL, MASK, Member, TarIndex, TarRules, TarSample, read_index
from dataset.sources import media_source
from dataset.sources.captions import captions_in
from dataset.sources.downloads import HTTP, download, protocol_error
from dataset.sources.folders import media_suffixes
from dataset.sources.mask_files import mask_suffixes
from dataset.sources.missing import explain_lookup
from dataset.table import DatasetTable
from modules.control_codes import shorten
from modules.errors import DatasetError, MediaError
from modules.limits import MAX_PATTERN_NAMES
from modules.paths import expand_path, get_scheme, hide_secrets, is_address, split_address

logger = logging.getLogger(__name__)

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})", re.ASCII)
PIECE = 1 << 20  # bytes that are read at once


def check_tar(path: Path) -> None:
    """Raise MediaError if a downloaded file does not begin with a tar header."""
    if not tarfile.is_tarfile(path):
        raise MediaError(f"{path} is not a tar.")


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an uncompressed tar."""

    container: Path  # the tar
    offset: int  # of its first byte in the tar
    size_bytes: int
    has_suffix = True

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the file in chunks.

        Raises:
            OSError: If the tar was removed, or is shorter than before.
        """
        remaining = self.size_bytes
        with self.container.open("rb") as file:
            file.seek(self.offset)
            while remaining:
                piece = file.read(min(PIECE, remaining))
                if not piece:
                    raise OSError(errno.EIO, "the tar is shorter than before", str(self.container))
                remaining -= len(piece)
                yield piece

    def describe(self) -> dict[str, Any]:
        """Return the tar and the member's position in it, as cache records store them."""
        return {"in": str(self.container), "offset": self.offset, "bytes": self.size_bytes}


def list_tars(
    table: DatasetTable, patterns: Sequence[str], faults: list[media_source.Fault]
) -> list[media_source.MediaSource]:
    """Return the samples in a table's tars (WebDataset), in any order, and add errors to `faults`.

    Remote tars are downloaded first. A truncated tar, or a failed download, is a fault that does not stop the
    run.

    Args:
        table: Table of the dataset file.
        patterns: Paths, glob patterns or URLs of its tars, with braces.
        faults: List to which a fault is added for each tar or sample that cannot be used.

    Raises:
        DatasetError: If no tar is named.
    """
    tars = _find_tars(table, patterns, faults)
    samples = _read_samples(table, tars, faults)
    sources = _make_sources(table, samples, faults)
    faults += find_missing_companions(table, sources, f"samples of {table.name}")
    return sources


def _make_rules(table: DatasetTable) -> TarRules:
    """Return the rules that tell a tar sample's media, caption and companions, from the table's keys."""
    suffixes, spare_suffixes = media_suffixes(table.kind)
    return TarRules(
        media=tuple(sorted(suffixes)),
        spare=tuple(sorted(spare_suffixes)),
        companions=tuple(sorted(mask_suffixes(table.kind))),
        caption_suffix=(table.captions.caption_extension or ".txt").lower(),
        caption_names=CAPTION_COLUMNS
        if table.captions.caption_column is None
        else (table.captions.caption_column,),
        json_first=table.captions.caption_column is not None,  # a key of the .json that the table names
        multi_caption=table.captions.multi_caption,
    )


def _read_samples(
    table: DatasetTable, tars: Sequence[Path], faults: list[media_source.Fault]
) -> list[tuple[Path, TarSample]]:
    """Return the samples in these tars, each with its tar; add errors to `faults`."""
    # Samples without media are logged.
    rules = _make_rules(table)
    samples: list[tuple[Path, TarSample]] = []
    num_without_media = 0
    example_without_media = ""
    for tar in tars:
        index = _read_tar(table, tar, rules, faults)
        if index is None:
            continue
        samples += [(tar, sample) for sample in index.samples]
        num_without_media += index.num_without_media
        if index.keys_without_media and not example_without_media:
            example_without_media = str(name_parts(tar, index.keys_without_media[0]))
    if num_without_media:
        logger.warning(
            "%s: %d samples, such as %s, contain no %s and are not used.",
            table.name,
            num_without_media,
            example_without_media,
            table.kind,
        )
    return samples


def _read_tar(
    table: DatasetTable, tar: Path, rules: TarRules, faults: list[media_source.Fault]
) -> TarIndex | None:
    """Return the samples of a tar, and add its errors to `faults`; None if the tar cannot be used."""
    incomplete = f"tars of {table.name} cannot be read to the end"
    unusable_sample = f"samples of {table.name} cannot be used"
    try:
        index = read_index(tar, rules, table.cache_directory)
    except DatasetError as error:
        faults.append(media_source.Fault(f"tars of {table.name} cannot be used", str(error)))
        return None
    except OSError as error:
        faults.append(media_source.Fault(incomplete, f"{tar}: {error.strerror}", is_fatal=False))
        return None
    for key, error_text in index.faults:
        faults.append(media_source.Fault(unusable_sample, f"{name_parts(tar, key)}: {error_text}."))
    if index.damage is not None:
        faults.append(media_source.Fault(incomplete, f"{tar}: {index.damage}", is_fatal=False))
    return index


def _make_sources(
    table: DatasetTable, samples: Sequence[tuple[Path, TarSample]], faults: list[media_source.Fault]
) -> list[media_source.MediaSource]:
    """Return the image or clip of each tar sample. Its stem is the sample's key, with a hash if ambiguous."""
    tars = {tar for tar, _ in samples}
    name_counts = Counter(tar.name for tar in tars)
    # the name of a tar if it is unique, so that moving the tars does not change the stems
    labels = {tar: tar.name if name_counts[tar.name] == 1 else str(tar) for tar in tars}
    stems = media_source.unique_stems(
        [media_source.readable_stem(sample.key) for _, sample in samples],
        [f"{labels[tar]}/{sample.key}" for tar, sample in samples],
    )

    sources = []
    for (tar, sample), stem in zip(samples, stems, strict=True):
        try:
            sources.append(_make_source(table, tar, sample, stem))
        except DatasetError as error:
            faults.append(media_source.Fault(f"samples of {table.name} cannot be used", str(error), stem))
    return sources


def _make_source(table: DatasetTable, tar: Path, sample: TarSample, stem: str) -> media_source.MediaSource:
    """Return the image or clip of a tar sample with its caption, control media and mask."""
    media = _locate_member(tar, sample.media)
    controls = [_locate_member(tar, member) for role, _, member in sample.extras if role == CONTROL]
    masks = [_locate_member(tar, member) for role, _, member in sample.extras if role == MASK]
    path, _ = media
    return make_source(
        table,
        position=path,
        stem=stem,
        media=media,
        captions=None if sample.caption is None else captions_in(sample.caption, table),
        controls=controls[: table.references.control_count],
        mask=masks[0] if masks else None,
    )


def _locate_member(tar: Path, member: Member) -> FileLocation:
    """Return a tar member's location: a path for messages, and where its bytes are in the tar."""
    origin = TarMember(tar, member.offset, member.size_bytes)
    return name_parts(tar, readable_path(member.name)), origin


def name_parts(path: Path, name: str) -> Path:
    """Join a member's name to `path` without its "..", so that the result is inside `path`."""
    return path.joinpath(*(part for part in name.split("/") if part not in ("", ".", "..")))


def readable_path(name: str) -> str:
    """Make each part of a tar member's path a valid file name (`readable_stem`); its suffix stays."""
    folder, slash, base = name.rpartition("/")
    if slash:
        folder = "/".join(map(media_source.readable_stem, folder.split("/")))
    stem, dot, suffix = base.rpartition(".")
    return f"{folder}{slash}{media_source.readable_stem(stem)}{dot}{suffix}"


# --- finding tars
# ------------------------------------------------------------------------------------------------------------


def _find_tars(table: DatasetTable, patterns: Sequence[str], faults: list[media_source.Fault]) -> list[Path]:
    """Return the tars that a table names, each once, in order; remote ones are downloaded."""
    tars: dict[Path, None] = {}
    for pattern in patterns:
        for name in expand_braces(pattern, table.name):
            if is_address(name) and not table.source.allow_urls:
                kind = f"tars of {table.name} are at addresses, which need allow_urls = true"
                faults.append(media_source.Fault(kind, hide_secrets(name)))
                continue
            try:
                tars |= dict.fromkeys(_list_tars(table, name))
            except MediaError as error:  # a failed download
                faults.append(
                    media_source.Fault(f"tars of {table.name} cannot be loaded", str(error), is_fatal=False)
                )
            except DatasetError as error:
                faults.append(media_source.Fault(f"names in {table.name} match no tar", str(error)))
    return list(tars)


def _list_tars(table: DatasetTable, name: str) -> Iterator[Path]:
    """Yield the tars of a path, glob pattern or URL whose braces have been expanded."""
    if is_address(name) and get_scheme(name) == "file":
        name = url2pathname(split_address(name).path)
    yield from _list_remote_tars(table, name) if is_address(name) else _list_local_tars(table, name)


def _list_remote_tars(table: DatasetTable, name: str) -> Iterator[Path]:
    """Yield the tars of a URL pattern, each as soon as it is downloaded."""
    # servers of http and https cannot list files, so "?" begins a query
    has_pattern = get_scheme(name) not in HTTP and has_wildcard(name)
    addresses = _find_remote(name) if has_pattern else [name]
    if not addresses:
        raise DatasetError(f"{hide_secrets(name)}: no file matches.")
    for address in addresses:
        target = download_folder(table) / media_source.local_name(address)
        if not target.is_file():
            logger.info("downloading %s", hide_secrets(address))
        download(address, target, check=check_tar)
        yield target


def _find_remote(pattern: str) -> list[str]:
    """Return the URLs that match a pattern with `*`, `?` or `[`, sorted."""
    safe_pattern = hide_secrets(pattern)
    problem = protocol_error(get_scheme(pattern))
    if problem is not None:
        raise MediaError(f"{safe_pattern}: {problem}")
    import fsspec

    try:
        file_system, path = fsspec.core.url_to_fs(pattern)
        return sorted(file_system.unstrip_protocol(match) for match in file_system.glob(path))
    except Exception as error:  # each storage has its own errors, whose messages may contain secrets
        raise MediaError(f"{safe_pattern} cannot be listed ({type(error).__name__})") from None


def _list_local_tars(table: DatasetTable, name: str) -> list[Path]:
    """Return the tars that a path or glob pattern names, without shards of caches."""
    try:
        path = expand_path(name)
    except ValueError as error:
        raise DatasetError(f"{shorten(name, 80)!r}: {error}.") from None
    if path.exists():
        if path.is_dir():
            raise DatasetError(f"{path} is a folder. Name its tars: {path / '*.tar'}")
        return [path]
    matches: list[Path] = []
    if has_wildcard(name):
        # Path.glob takes no absolute patterns
        matches = [Path(match) for match in sorted(glob.glob(str(path)))]  # noqa: PTH207
    # caches may be next to the sources, and shards of earlier versions are tars, too
    tars = [match for match in matches if not media_source.SHARD_FILE_NAME.fullmatch(match.name)]
    if not tars:
        raise DatasetError(f"{path}: no such file{explain_lookup(path, table.config_path)}")
    return tars


def has_wildcard(name: str) -> bool:
    """Return whether a path contains glob wildcards."""
    return any(wildcard in name for wildcard in "*?[")


def expand_braces(pattern: str, table_name: str) -> list[str]:
    """Expand `{000..012}` and `{a,b}` in a name, in order; numbers keep their leading zeros.

    Raises:
        DatasetError: If there are more than MAX_PATTERN_NAMES names.
    """
    names = [pattern]
    while _BRACES.search(names[0]):  # the first braces of each name are expanded in each round
        expanded: list[str] = []
        for name in names:
            braces = _BRACES.search(name)
            assert braces is not None  # all names have the same remaining braces
            options = _BraceOptions.parse(braces[1])
            if len(expanded) + len(options.values) > MAX_PATTERN_NAMES:
                raise DatasetError(
                    f"{table_name}: {hide_secrets(pattern)} expands to more than {MAX_PATTERN_NAMES:,} names"
                )
            before = name[: braces.start()]
            after = name[braces.end() :]
            expanded += [f"{before}{value:0>{options.num_digits}}{after}" for value in options.values]
        names = expanded
    return names


class _BraceOptions(NamedTuple):
    """The alternatives of a brace expression in tar names: a number range or a list."""

    values: Sequence[Any]  # texts, or numbers
    num_digits: int  # digits of numbers that are padded with zeros; 0: no padding

    @staticmethod
    def parse(content: str) -> "_BraceOptions":
        """Parse the text between braces: an ascending or descending range (`000..012`) or a list (`a,b`)."""
        limits = _RANGE.fullmatch(content)
        if limits is None:
            return _BraceOptions(content.split(","), 0)
        first = int(limits[1])
        last = int(limits[2])
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return _BraceOptions(numbers, len(limits[1]) if limits[1].startswith("0") else 0)

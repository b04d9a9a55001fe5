"""Plan the cache files of a source, and which existing ones are still valid.

This is decided from records, if possible without decoding.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dataset.cache.files import Entry, LatentName, parse_latent_name
from dataset.cache.records import (
    ClipFacts,
    LatentRecord,
    difference,
    is_unchanged,
    latent_record,
    options_difference,
    section_frames,
    verify_tensors,
)
from dataset.cache.store import CacheStore, Stores
from dataset.caching.reports import Failure
from dataset.caching.source_jobs import read_ahead
from dataset.config import DatasetTable
from dataset.sources.decoding import DecodedSource, bucket_of, plan_source
from dataset.sources.frames import Span, describe_short, frames_wanted, spans
from dataset.sources.media_source import MediaSource
from dataset.sources.moments import GivenClip, measure_source
from modules.bars import Bar
from modules.contract.data import MediaTable
from modules.contract.family import Described, Encodes, LatentSpec
from modules.errors import CacheError, MediaError
from modules.media.buckets import Size
from modules.media.reading import image_size

Names = Mapping[str, LatentName]  # the latent cache files of one source, with their parsed names

ExistingNames = Mapping[int, Mapping[str, Names]]  # by table index and stem


class Caches(Described, Encodes, Protocol):
    """What caching asks of a family."""


@dataclass(frozen=True)
class Recipe:
    """How this run makes latents: everything that caches depend on besides the sources and their tables."""

    tag: str  # in file names
    encoder: Mapping[str, str]
    latent: LatentSpec
    fps: float
    skip_existing: bool  # files without a record count as valid if their sizes are right
    sections: Callable[[MediaTable, int], int | None]  # Family.sections_of
    stores: Stores = field(default_factory=Stores)

    def options(self, source: MediaSource, size: Size, bucket: Size, span: Span) -> dict[str, Any]:
        """Return what the record of an item contains besides the encoders."""
        table = source.table
        options: dict[str, Any] = {"size": list(size), "bucket": list(bucket), "span": list(span)}
        if table.kind == "video":
            options |= {"source_fps": table.source_fps, "fps": None if table.source_fps is None else self.fps}
        if source.mask_from is not None:
            options["mask"] = source.mask_from
        if source.tensors is not None:
            options["moments"] = True
        return options | table.section_keys


@dataclass(frozen=True)
class SourcePlan:
    """What to do for one source."""

    source: MediaSource
    kept: frozenset[str]  # names of valid files
    foreign: int  # how many of them have no record
    missing: tuple[Span, ...] | None  # what to encode; None: unknown before decoding
    # width, height and, for videos, frames of what training sees; only if `missing` is known
    items: tuple[tuple[int, ...], ...] = ()
    reason: str | None = None  # why there is no item at all
    short: str | None = None  # for which target_frames the clip is too short, if it gives other items
    outdated: str | None = None  # why an existing file is made again


def list_names(store: CacheStore, tag: str, kind: str) -> dict[str, dict[str, LatentName]]:
    """List the latent caches of a table by the stem of their source, without opening one.

    kind: of the table, "image" or "video".
    """
    found: dict[str, dict[str, LatentName]] = {}
    for file in store.names():
        name = parse_latent_name(file, tag, kind)
        if name is not None:
            found.setdefault(name.stem, {})[file] = name
    return found


def names_of(existing: ExistingNames, source: MediaSource) -> Names:
    """Return the existing cache files of one source."""
    return existing[source.table.index].get(source.stem, {})


def plan_all(
    sources: Sequence[MediaSource],
    existing: ExistingNames,
    recipe: Recipe,
    workers: int,
    show_progress: bool = True,
) -> tuple[list[SourcePlan], list[Failure]]:
    """Compare all sources with their cache files. Sources whose header cannot be read become failures."""
    plans: list[SourcePlan] = []
    failures: list[Failure] = []

    def work(source: MediaSource) -> SourcePlan:
        return plan_latents(source, names_of(existing, source), recipe)

    bar = Bar(len(sources), "Comparing", "source", show_progress)
    for _, result in read_ahead(sources, lambda source: source, work, workers, bar):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            plans.append(result)
    return plans, failures


def plan_latents(source: MediaSource, existing: Names, recipe: Recipe) -> SourcePlan:
    """Compare the cache files of a source with what this run would make.

    Raises MediaError if its header cannot be read.
    """
    if source.table.kind == "image":
        size = _image_size(source, existing, recipe)
        if size is None:
            return SourcePlan(source, frozenset(), 0, None)
        return compare(source, size, [(0, 1)], existing, recipe)
    if source.tensors is not None:
        clip = _find_known_clip(source, existing, recipe)
        given = (
            measure_source(source, recipe.latent) if clip is None else GivenClip(clip.size, clip.kept_frames)
        )
        return compare(source, given.size, [given.span(recipe.latent.frame_step)], existing, recipe)
    if not existing:
        return SourcePlan(source, frozenset(), 0, None)
    table, step = source.table, recipe.latent.frame_step
    clip = _find_known_clip(source, existing, recipe)
    if clip is not None:
        wanted = frames_wanted(table)
        if clip.complete or (wanted is not None and clip.kept_frames >= wanted):
            found = spans(table, clip.kept_frames, step)
            reason = (
                None
                if found
                else f"{clip.kept_frames} frames, "
                f"target_frames are {', '.join(map(str, table.target_frames))}"
            )
            short = describe_short(table, found, clip.kept_frames)
            plan = compare(source, clip.size, found, existing, recipe)
            return dataclasses.replace(plan, reason=reason, short=short)
    if recipe.skip_existing:
        # the header may be wrong about the number of frames, so it counts only if it agrees with the existing
        # files
        headers = plan_source(source, recipe.fps, recipe.latent.pixel_step, step)
        with contextlib.suppress(MediaError):  # too short for a section, according to the header
            plan = compare(source, headers.size, headers.spans, existing, recipe)
            if plan.kept == existing.keys() and not plan.missing:
                return plan
    return SourcePlan(source, frozenset(), 0, None)


def compare(
    source: MediaSource, size: Size, wanted: Iterable[Span], existing: Names, recipe: Recipe
) -> SourcePlan:
    """Return the plan for a source whose size and spans are known."""
    bucket = bucket_of(source.table, size, recipe.latent.pixel_step, source.path)
    kept: set[str] = set()
    foreign = 0
    missing: list[Span] = []
    outdated: str | None = None
    is_image = source.table.kind == "image"
    there = _by_item(existing)
    items: list[tuple[int, ...]] = []
    for span in wanted:
        sections = recipe.sections(media_table(source.table), span[1])
        items += [bucket if is_image else (*bucket, _frames_of(source.table, span, sections, recipe))] * (
            sections or 1
        )
        files = there.get((size, None) if is_image else (bucket, span), {})
        if not files:
            missing.append(span)
            continue
        try:
            _check_sections(source, files, sections)
            foreign += _check_item(source, size, bucket, span, files, recipe)
            kept |= set(files)
        except CacheError as error:
            missing.append(span)
            outdated = outdated or str(error)
    return SourcePlan(source, frozenset(kept), foreign, tuple(missing), tuple(items), outdated=outdated)


def _frames_of(table: DatasetTable, span: Span, sections: int | None, recipe: Recipe) -> int:
    """Return the frames that training sees: those of the whole item, or of one of its sections."""
    return span[1] if sections is None else section_frames(table.fp_latent_window_size, recipe.latent)


def complete(plan: SourcePlan, media: DecodedSource, existing: Names, recipe: Recipe) -> SourcePlan:
    """Return the plan of a source that has been decoded."""
    if plan.missing is not None:
        return plan
    short = describe_short(plan.source.table, media.spans, len(media.frames))
    plan = compare(plan.source, media.size, media.spans, existing, recipe)
    return dataclasses.replace(plan, reason=media.reason, short=short)


def _by_item(existing: Names) -> Mapping[tuple[Size, Span | None], Names]:
    """Group files by item (from their names), in the order of their sections."""
    found: dict[tuple[Size, Span | None], dict[str, LatentName]] = {}
    for file, name in sorted(existing.items(), key=lambda pair: pair[1].section or 0):
        found.setdefault((name.size, name.span), {})[file] = name
    return found


def _check_sections(source: MediaSource, files: Names, sections: int | None) -> None:
    """Raise CacheError if the files of an item are not those of all its sections."""
    expected = [None] if sections is None else list(range(sections))
    found = [name.section for name in files.values()]
    if found != expected:
        path = source.table.cache_directory / next(iter(files))
        theirs = ", ".join("the whole" if section is None else str(section) for section in found)
        raise CacheError(f"{path}: sections {theirs} were found, {len(expected)} files belong together")


def _check_item(
    source: MediaSource, size: Size, bucket: Size, span: Span, files: Names, recipe: Recipe
) -> int:
    """Check that the files of an item are what this run would write; return how many have no record.

    Raises CacheError if they are not.
    """
    foreign = 0
    for file in files:
        path = source.table.cache_directory / file
        entry = recipe.stores.of(source.table).read(file)
        record = latent_record(entry.header)
        if record is None:
            if source.mask_from is not None:
                raise CacheError(f"{path}: it has no mask of the loss")
            _check_foreign(entry, bucket, span, files[file].section, source.table, recipe)
            foreign += 1
            continue
        if record.parts != len(files):
            raise CacheError(f"{path}: {record.parts} files belong together, {len(files)} were found")
        expected = recipe.options(source, size, bucket, span)
        changed = (
            difference(record.encoder, recipe.encoder)
            or options_difference(record.options, expected, recipe.latent)
            or _find_change(source, record)
        )
        if changed is not None:
            raise CacheError(f"{path}: {changed}")
        verify_tensors(entry, record.crc32)
    return foreign


def _check_foreign(
    entry: Entry, bucket: Size, span: Span, section: int | None, table: DatasetTable, recipe: Recipe
) -> None:
    """Raise CacheError if a file made by another program should not be kept."""
    path = entry.header.path
    if not recipe.skip_existing:
        raise CacheError(f"{path}: it has no record of what it was made from")
    length = span[1] if section is None else section_frames(table.fp_latent_window_size, recipe.latent)
    frames, height, width = recipe.latent.shape(length, bucket[1], bucket[0])[2:]
    if (frames, height, width) not in entry.header.grids:
        found = ", ".join("x".join(map(str, grid)) for grid in sorted(entry.header.grids)) or "no latents"
        raise CacheError(f"{path}: it holds {found}, this configuration writes {frames}x{height}x{width}")


def _find_change(source: MediaSource, record: LatentRecord) -> str | None:
    parts = source.parts
    if len(parts) != len(record.files):
        return f"it was made from {len(record.files)} source files, now there are {len(parts)}"
    changed = [
        str(path)
        for (path, origin), then in zip(parts, record.files, strict=True)
        if not is_unchanged(then, path, origin)
    ]
    return f"{', '.join(changed)} changed since" if changed else None


def _find_known_clip(source: MediaSource, existing: Names, recipe: Recipe) -> ClipFacts | None:
    """Return what an earlier run learned by decoding the source; None if unknown or if the source changed."""
    rate = recipe.options(source, (0, 0), (0, 0), (0, 0))
    known = []
    for file in existing:
        try:
            record = latent_record(recipe.stores.of(source.table).read_header(file))
        except CacheError:
            continue
        if record is None or record.clip is None or not record.files:
            continue
        same_rate = all(record.options.get(key) == rate[key] for key in ("source_fps", "fps"))
        same_kind = record.options.get("moments") == rate.get("moments")
        if same_rate and same_kind and is_unchanged(record.files[0], *source.parts[0]):
            known.append(record.clip)
    return max(known, key=lambda clip: (clip.complete, clip.kept_frames), default=None)


def _image_size(source: MediaSource, existing: Names, recipe: Recipe) -> Size | None:
    """Return the size of an image; None if it has to be fetched first, and it has no cache that knows it.

    Raises MediaError if its header cannot be read.
    """
    if not source.origins:
        return image_size(source.path)
    path, origin = source.parts[0]
    for file, name in existing.items():
        with contextlib.suppress(CacheError):
            record = latent_record(recipe.stores.of(source.table).read_header(file))
            if record is not None and record.files and is_unchanged(record.files[0], path, origin):
                return name.size
    return None


def media_table(table: DatasetTable, has_control: bool = False) -> MediaTable:
    """Return a table's facts for families. has_control: whether its items have control media."""
    return MediaTable(
        name=table.name,
        kind=table.kind,
        has_control=has_control,
        target_frames=()
        if table.kind == "image" or table.frame_extraction == "full"
        else table.target_frames,
        max_frames=table.max_frames if table.kind == "video" and table.frame_extraction == "full" else None,
        window=table.fp_latent_window_size,
        clean_indices=table.fp_1f_clean_indices or (),
        target_index=table.fp_1f_target_index,
        has_post=not table.fp_1f_no_post,
    )

"""Plan the cache files of a source, and which existing ones are still valid.

This is decided from records, if possible without decoding.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dataset.cache.files import Entry, LatentName
from dataset.cache.index import Indexes, fingerprint
from dataset.cache.records import (
    ClipFacts,
    LatentRecord,
    difference,
    is_unchanged,
    latent_facts,
    latent_record,
    latent_record_of,
    options_difference,
    section_frames,
    stamp_of,
    verify_tensors,
)
from dataset.cache.store import Stores
from dataset.caching.existing import ExistingNames, Names, names_of
from dataset.caching.prefetch import run_ahead
from dataset.caching.reports import Failure
from dataset.config import DatasetTable
from dataset.sources.decoding import DecodedSource, bucket_of, plan_source
from dataset.sources.frames import Span, describe_short, frames_wanted, spans
from dataset.sources.media_source import MediaSource, pause_collection
from dataset.sources.moments import GivenClip, measure_source
from modules.bars import Bar
from modules.contract.data import LOSS_MASK, LatentSpec, MediaTable
from modules.contract.family import Described, Encodes
from modules.errors import CacheError, MediaError
from modules.media.buckets import Size
from modules.media.reading import image_size

FLIP = "flip"  # in the options of a record: mirrored latents are there too
AT_ONCE = 64  # sources that a thread compares one after the other: handing each over takes as long


class Caches(Described, Encodes, Protocol):
    """Functions that caching needs of a family."""


def latent_index(verify: bool = False) -> Indexes[LatentRecord]:
    """Return the facts about latent caches that earlier runs verified. verify: read all again."""
    return Indexes("latents", latent_record_of, not verify)


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
    index: Indexes[LatentRecord] = field(default_factory=lambda: latent_index())
    trusts: bool = False  # shared files that are there are taken to be right, unread
    _compared: dict[tuple[object, ...], str | None] = field(default_factory=dict)
    _of_tables: dict[tuple[object, ...], dict[str, Any]] = field(default_factory=dict)
    _sections: dict[tuple[int, int], int | None] = field(default_factory=dict)

    def options(self, source: MediaSource, size: Size, bucket: Size, span: Span) -> dict[str, Any]:
        """Return the record of an item without the encoders."""
        options: dict[str, Any] = {"size": list(size), "bucket": list(bucket), "span": list(span)}
        return options | self.table_options(source)

    def table_options(self, source: MediaSource) -> dict[str, Any]:
        """Return those of a source's options that are the same for most sources of its table."""
        table, mask_from, has_tensors = source.table, source.mask_from, source.tensors is not None
        key = (table.index, mask_from, has_tensors)
        if key not in self._of_tables:
            options: dict[str, Any] = {}
            if table.kind == "video":
                fps = None if table.source_fps is None else self.fps
                options |= {"source_fps": table.source_fps, "fps": fps}
            if mask_from is not None:
                options["mask"] = mask_from
            if has_tensors:
                options["moments"] = True
            if table.augmentation.flip:
                options[FLIP] = True
            self._of_tables[key] = options | table.section_keys
        return self._of_tables[key]

    def sections_in(self, table: DatasetTable, frames: int) -> int | None:
        """Return the number of sections of an item of so many frames. Raises MediaError if too short."""
        key = (table.index, frames)
        if key not in self._sections:
            self._sections[key] = self.sections(media_table(table), frames)
        return self._sections[key]

    def difference(
        self, record: LatentRecord, source: MediaSource, size: Size, bucket: Size, span: Span
    ) -> str | None:
        """Describe how a record of other encoders or options than this run's differs."""
        options, then = self.options(source, size, bucket, span), dict(record.options)
        if FLIP not in options:
            then.pop(FLIP, None)  # mirrored latents that nobody asks for do no harm
        return difference(record.encoder, self.encoder) or options_difference(then, options, self.latent)

    def known_difference(
        self, record: LatentRecord, source: MediaSource, size: Size, bucket: Size, span: Span
    ) -> str | None:
        """Do as `difference` for a record of the index; a million entries share few records."""
        key = (id(record), source.table.index, source.mask_from, size, bucket, span)
        if key not in self._compared:
            self._compared[key] = self.difference(record, source, size, bucket, span)
        return self._compared[key]


@dataclass(frozen=True)
class SourceLook:
    """Facts about a source and its cache files, without reading them."""

    known: Mapping[str, LatentRecord]  # of files that are as they were when they were verified
    sources: int  # fingerprint of the source files
    newest_ns: int | None  # when one of them was last written; None: they cannot be looked at


def look_at(source: MediaSource, existing: Names, recipe: Recipe) -> SourceLook:
    """Look which of the source's cache files are known, by one look at each file."""
    if not existing:
        return SourceLook({}, 0, None)
    try:
        stamps = [stamp_of(path, origin) for path, origin in source.parts]
    except (OSError, MediaError):  # what reads it says why
        return SourceLook({}, 0, None)
    sources = fingerprint(stamps)
    index = recipe.index.of(recipe.stores.of(source.table))
    found = ((file, index.get(file, sources)) for file in existing)
    known = {file: record for file, record in found if record is not None}
    return SourceLook(known, sources, max(time_ns for _, time_ns in stamps))


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """Plan for one source."""

    source: MediaSource
    kept: frozenset[str]  # names of valid files
    foreign: int  # how many of them have no record
    missing: tuple[Span, ...] | None  # what to encode; None: unknown before decoding
    # width, height and, for videos, frames of what training sees; only if `missing` is known
    items: tuple[tuple[int, ...], ...] = ()
    reason: str | None = None  # why there is no item at all
    short: str | None = None  # for which target_frames the clip is too short, if it gives other items
    outdated: str | None = None  # why an existing file is made again


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

    def work(some: Sequence[MediaSource]) -> list[SourcePlan | Failure]:
        return [plan_or_failure(source) for source in some]

    def plan_or_failure(source: MediaSource) -> SourcePlan | Failure:
        try:
            return plan_latents(source, names_of(existing, source), recipe)
        except (MediaError, OSError) as error:
            return Failure.of(source, error)

    at_once = min(AT_ONCE, max(1, len(sources) // (4 * workers)))
    jobs = [sources[start : start + at_once] for start in range(0, len(sources), at_once)]
    ahead = contextlib.closing(run_ahead(jobs, work, workers, lambda _: 0, limit_bytes=1))
    bar = Bar(len(sources), "Comparing", "source", show_progress)
    with pause_collection(), bar, ahead as results:
        for job, result in results:
            if isinstance(result, Exception):
                raise result
            for one in result:
                if isinstance(one, Failure):
                    failures.append(one)
                else:
                    plans.append(one)
            bar.update(len(job))
    return plans, failures


def plan_latents(source: MediaSource, existing: Names, recipe: Recipe) -> SourcePlan:
    """Compare the cache files of a source with the ones that this run would make.

    Raises MediaError if its header cannot be read.
    """
    look = look_at(source, existing, recipe)
    if source.table.kind == "image":
        size = _known_size(look) or _image_size(source, existing, recipe)
        if size is None:
            return SourcePlan(source, frozenset(), 0, None)
        return compare(source, size, [(0, 1)], existing, recipe, look)
    if source.tensors is not None:
        clip = _find_known_clip(source, existing, recipe, look)
        given = (
            measure_source(source, recipe.latent) if clip is None else GivenClip(clip.size, clip.kept_frames)
        )
        return compare(source, given.size, [given.span(recipe.latent.frame_step)], existing, recipe, look)
    if not existing:
        return SourcePlan(source, frozenset(), 0, None)
    table, step = source.table, recipe.latent.frame_step
    clip = _find_known_clip(source, existing, recipe, look)
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
            plan = compare(source, clip.size, found, existing, recipe, look)
            return plan if reason is short is None else dataclasses.replace(plan, reason=reason, short=short)
    if recipe.skip_existing:
        # the header may be wrong about the number of frames, so it counts only if it agrees with the existing
        # files
        headers = plan_source(source, recipe.fps, recipe.latent.pixel_step, step)
        with contextlib.suppress(MediaError):  # too short for a section, according to the header
            plan = compare(source, headers.size, headers.spans, existing, recipe, look)
            if plan.kept == existing.keys() and not plan.missing:
                return plan
    return SourcePlan(source, frozenset(), 0, None)


def compare(
    source: MediaSource,
    size: Size,
    wanted: Iterable[Span],
    existing: Names,
    recipe: Recipe,
    look: SourceLook | None = None,
) -> SourcePlan:
    """Return the plan for a source whose size and spans are known. look: at it, if there was one."""
    look = look or look_at(source, existing, recipe)
    bucket = bucket_of(source.table, size, recipe.latent.pixel_step, source.path)
    kept: set[str] = set()
    foreign = 0
    missing: list[Span] = []
    outdated: str | None = None
    is_image = source.table.kind == "image"
    there = _by_item(existing)
    items: list[tuple[int, ...]] = []
    for span in wanted:
        sections = recipe.sections_in(source.table, span[1])
        items += [bucket if is_image else (*bucket, _frames_of(source.table, span, sections, recipe))] * (
            sections or 1
        )
        files = there.get((size, None) if is_image else (bucket, span), {})
        if not files:
            missing.append(span)
            continue
        if recipe.trusts and all(map(recipe.stores.of(source.table).is_shared, files)):
            kept |= set(files)
            foreign += len(files)
            continue
        try:
            _check_sections(source, files, sections)
            foreign += _check_item(source, size, bucket, span, files, recipe, look)
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
    source: MediaSource, size: Size, bucket: Size, span: Span, files: Names, recipe: Recipe, look: SourceLook
) -> int:
    """Check that the files of an item equal those that this run would write; return how many have no record.

    Files unchanged since they were verified are not read. Raises CacheError if they are wrong.
    """
    foreign = 0
    store = recipe.stores.of(source.table)
    for file in files:
        known = look.known.get(file)
        if known is not None:
            changed = _wrong_parts(known, files) or recipe.known_difference(known, source, size, bucket, span)
            if changed is not None:
                raise CacheError(f"{source.table.cache_directory / file}: {changed}")
            continue
        path, stamp = source.table.cache_directory / file, store.stamp(file)
        # values of shared files are compared with their checksums when they are read; --verify does it now
        is_shared = store.is_shared(file)
        is_read = not (is_shared and recipe.index.is_trusted)
        entry = store.read(file) if is_read else Entry(store.read_header(file), {})
        record = latent_record(entry.header)
        if record is None:
            if source.mask_from is not None and not (is_shared and LOSS_MASK in entry.header.keys):
                raise CacheError(f"{path}: it has no mask of the loss")
            accepts = recipe.skip_existing or is_shared
            _check_foreign(entry, bucket, span, files[file].section, source.table, recipe, accepts)
            foreign += 1
            continue
        changed = (
            _wrong_parts(record, files)
            or recipe.difference(record, source, size, bucket, span)
            or _find_change(source, record)
        )
        if changed is not None:
            raise CacheError(f"{path}: {changed}")
        if is_read:
            verify_tensors(entry, record.crc32)
        if look.newest_ns is not None:
            index = recipe.index.of(store)
            index.note(file, stamp, look.sources, latent_facts(record), look.newest_ns)
    return foreign


def _wrong_parts(record: LatentRecord, files: Names) -> str | None:
    if record.parts == len(files):
        return None
    return f"{record.parts} files belong together, {len(files)} were found"


def _check_foreign(
    entry: Entry,
    bucket: Size,
    span: Span,
    section: int | None,
    table: DatasetTable,
    recipe: Recipe,
    accepts: bool,
) -> None:
    """Raise CacheError if a file made by another program should not be kept.

    accepts: whether any are.
    """
    path = entry.header.path
    if not accepts:
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


def _known_size(look: SourceLook) -> Size | None:
    """Return the size of an image that is unchanged since one of its caches was verified."""
    for record in look.known.values():
        size = record.options.get("size")
        if isinstance(size, list) and len(size) == 2:
            return size[0], size[1]
    return None


def _find_known_clip(
    source: MediaSource, existing: Names, recipe: Recipe, look: SourceLook
) -> ClipFacts | None:
    """Return an earlier run's facts from decoding the source; None if unknown or if the source changed."""
    rate = recipe.table_options(source)
    known = []
    for file in existing:
        record = look.known.get(file)
        try:
            if record is None:
                record = latent_record(recipe.stores.of(source.table).read_header(file))
        except CacheError:
            continue
        if record is None or record.clip is None or not (record.files or file in look.known):
            continue
        same_rate = all(record.options.get(key) == rate.get(key) for key in ("source_fps", "fps"))
        same_kind = record.options.get("moments") == rate.get("moments")
        if not (same_rate and same_kind):
            continue
        if file in look.known or is_unchanged(record.files[0], *source.parts[0]):
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

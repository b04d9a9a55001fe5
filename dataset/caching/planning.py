"""Plan the cache files of a source, and which existing ones are still valid.

This is decided from records, if possible without decoding.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dataset.cache import records
from dataset.cache.files import Entry, LatentName
from dataset.cache.store import ExistingNames, Names, Stores
from dataset.caching.prefetch import MANY, Failure, map_ahead
from dataset.config_keys import REFERENCES, SECTIONS
from dataset.sources.clock import has_beside, kept_one_clock
from dataset.sources.colours import has_codes, shown_otherwise
from dataset.sources.decoding import plan_source
from dataset.sources.frames import Span, bucket_of, describe_short, frames_wanted, media_table, spans
from dataset.sources.media_source import (
    CLIP_REFERENCES,
    CONTROL_MASK,
    ClipFacts,
    FileIdentity,
    MediaSource,
    pause_collection,
)
from modules.bars import Bar
from modules.console import count_of
from modules.contract.data import CONTROL, FPS, LOSS_MASK, LatentSpec, MediaTable, SoundSpec
from modules.errors import CacheError, MediaError
from modules.media.buckets import Size
from modules.media.colours import AS_SHOWN
from modules.media.reading import image_size

_AS_SHOWN = re.compile(r'"as_shown": (\d{1,9}|true)')  # in the text of a record
# in the options of a record:
FLIP = "flip"  # mirrored latents are there too


class OtherKind(CacheError):
    """Raised for a cache that another encoder, other options or another program made."""


@dataclass(frozen=True)
class Recipe:
    """How this run makes latents: everything that caches depend on besides the sources and their tables."""

    tag: str  # in file names
    encoder: Mapping[str, str]
    latent: LatentSpec
    fps: float
    sections: Callable[[MediaTable, int], int | None]  # Family.sections_of
    stores: Stores
    # the items of sources whose caches were found valid, by all that this depends on but the source files
    valid: dict[tuple[object, ...], tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    has_rates: bool = False  # each file says how many frames make a second (`Abilities.rate`)
    sound: SoundSpec | None = None  # of a family that hears

    def options(self, source: MediaSource, **own: Sequence[int]) -> dict[str, Any]:
        """Return the options in the record of an item of a source. own: its size, bucket and span."""
        table, mask_from = source.table, source.mask_from
        options: dict[str, Any] = {name: [*numbers] for name, numbers in own.items()}
        if table.kind == "video":
            options["source_fps"] = table.source_fps
            options["fps"] = table.target_fps or (None if table.source_fps is None else self.fps)
        if mask_from is not None:
            options["mask"] = mask_from
        if source.tensors is not None:
            options["moments"] = True
        if table.augmentation.flip:
            options[FLIP] = True
        if self.has_rates:
            options["frame_rate"] = True
        if has_beside(source):
            options[records.CLOCK] = True
        if source.control:
            options |= table.changed(REFERENCES)
        if source.references and (rules := table.clip_references) is not None:
            options[CLIP_REFERENCES] = [len(source.references), *rules.factors]
        if source.control_mask is not None:
            options[CONTROL_MASK] = True
        return options | table.changed(SECTIONS)

    def difference(
        self, record: records.LatentRecord, source: MediaSource, size: Size, bucket: Size, span: Span
    ) -> str | None:
        """Describe how a record of other encoders or options than this run's differs."""
        options = self.options(source, size=size, bucket=bucket, span=span)
        then = dict(record.options)
        if FLIP not in options:
            then.pop(FLIP, None)  # mirrored latents that nobody asks for do no harm
        if records.CLOCK in options and records.CLOCK not in then and kept_one_clock(source, self.fps):
            then[records.CLOCK] = True
        other = records.difference(record.encoder, self.encoder)
        if self.sound is not None and self.sound.is_alone:
            other = None  # latents of pictures only hold a place, whatever made them
        return other or records.options_difference(then, options, self.latent)


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
    is_other: bool = False  # one was made by another encoder, with other options, or by another program
    size_changes: tuple[str, ...] = ()  # of `ClipFacts`


def plan_all(
    sources: Sequence[MediaSource],
    existing: ExistingNames,
    recipe: Recipe,
    workers: int,
    show_progress: bool = True,
) -> tuple[list[SourcePlan], list[Failure]]:
    """Compare all sources with their cache files. Sources whose header cannot be read become failures."""
    reads_values = recipe.stores.verify or len(sources) < MANY

    def plan(source: MediaSource) -> SourcePlan | Failure:
        try:
            planning = Planning(source, existing[source.table.index].of(source.stem), recipe, reads_values)
            few_are_read = reads_values or recipe.stores.trusts
            return planning.plan() if few_are_read else planning.plan_by_shape()
        except (MediaError, OSError) as error:
            return Failure.of(source, error)

    bar = Bar(len(sources), "Comparing", "source", show_progress)
    with pause_collection():
        results = list(map_ahead(sources, plan, workers, bar))
    plans = [one for one in results if isinstance(one, SourcePlan)]
    return plans, [one for one in results if isinstance(one, Failure)]


class Planning:
    """Compare one source with its existing cache files."""

    def __init__(
        self, source: MediaSource, existing: Names, recipe: Recipe, reads_values: bool = True
    ) -> None:
        self.source, self.table, self.existing, self.recipe = source, source.table, existing, recipe
        self.store, self.reads_values = recipe.stores.of(source.table), reads_values
        self._headers: dict[str, Entry] = {}  # that were read
        self._records: dict[str, records.LatentRecord | None] = {}
        self._same: dict[int, FileIdentity] = {}  # parts of the source that were found unchanged, by number
        self._otherwise: dict[int, str | None] = {}  # by `as_shown`, how the source was read otherwise
        self._by_header = False  # the wanted items are known from the source's header, not from its caches

    def plan_by_shape(self) -> SourcePlan:
        """Return the same as `plan`, faster: of many sources whose caches differ only in files and values,
        one is compared fully, and for the others only the source files are checked.
        """
        shape, valid = self._shape(), self.recipe.valid
        if shape in valid:
            return SourcePlan(self.source, frozenset(self.existing), 0, (), valid[shape])
        plan = self.plan()
        is_valid = SourcePlan(self.source, frozenset(self.existing), 0, (), plan.items) == plan
        if shape is not None and is_valid and not self._by_header and len(valid) < MANY:
            valid[shape] = plan.items
        return plan

    def _shape(self) -> tuple[object, ...] | None:
        """Return all that `plan` depends on besides unchanged source files; None if they changed."""
        source = self.source
        # on the number of references it depends whether keys of the table count
        shape: list[object] = [
            self.table.index,
            source.mask_from,
            len(source.control),
            source.tensors is None,
        ]
        for file in self.existing:
            try:
                found = records.shared_part(self._header(file))
            except CacheError:
                return None
            if found is None or self._find_change(found[1]) is not None:
                return None
            if has_beside(source) and not any(records.CLOCK in text for text in found[0] if text):
                return None  # headers have to be compared
            if not self._is_as_shown(found[0]):
                return None  # from an earlier version: the result depends on the pictures
            shape += (file[len(source.stem) :], *found[0])
        return tuple(shape)

    def _is_as_shown(self, texts: Sequence[str]) -> bool:
        whole = "".join(text or "" for text in texts)
        marks = {1 if mark == "true" else int(mark) for mark in _AS_SHOWN.findall(whole)}
        if marks == {AS_SHOWN}:
            return True
        return min(marks, default=0) > 0 and not any(has_codes(path) for path, _ in self.source.parts)

    def plan(self) -> SourcePlan:
        """Compare the cache files with the ones that this run would make.

        Raises MediaError if the header of the source cannot be read.
        """
        table, latent, recipe = self.table, self.recipe.latent, self.recipe
        unknown = SourcePlan(self.source, frozenset(), 0, None)
        if table.kind == "image":
            size = self._image_size()
            return unknown if size is None else self.compare(size, [(0, 1)])
        # what earlier runs found by decoding the source, if it has not changed since
        rate, known = recipe.options(self.source), list[ClipFacts]()
        for file in self.existing:
            record = self._record_of(file)
            if record is None or record.clip is None:
                continue
            if any(record.options.get(key) != rate.get(key) for key in ("source_fps", "fps", "moments")):
                continue
            if self._read_otherwise(record) is not None:
                continue  # its size may be another one
            if record.files and self._is_unchanged(0, record.files[0]):
                known.append(record.clip)
        clip = max(known, key=lambda one: (one.complete, one.kept_frames), default=None)
        if self.source.tensors is not None:
            from dataset.sources.cogvideox import measure_source, whole_span

            given = clip or measure_source(self.source, latent)
            return self.compare(given.size, [whole_span(given, latent.frame_step)])
        if clip is not None:
            wanted = frames_wanted(table)
            if clip.complete or (wanted is not None and clip.kept_frames >= wanted):
                found = spans(table, clip.kept_frames, latent.frame_step)
                targets = ", ".join(map(str, table.target_frames))
                reason = (
                    None if found else f"{count_of(clip.kept_frames, 'frame')}, target_frames are {targets}"
                )
                plan = self.compare(clip.size, found, clip.kept_frames, reason)
                return replace(plan, size_changes=clip.size_changes)
        if self.existing and recipe.stores.skip_existing:
            # the header may be wrong about the number of frames, so it counts only if it agrees with the
            # existing files
            self._by_header = True
            headers = plan_source(self.source, recipe.fps, latent.pixel_step, latent.frame_step)
            with contextlib.suppress(MediaError):  # too short for a section, according to the header
                plan = self.compare(headers.size, headers.spans)
                if plan.kept == self.existing.keys() and not plan.missing:
                    return plan
        return unknown

    def compare(
        self, size: Size, wanted: Sequence[Span], kept_frames: int | None = None, reason: str | None = None
    ) -> SourcePlan:
        """Return the plan of a source whose size and spans are known.

        kept_frames: of a clip, if that was decoded. reason: why there is no span.
        """
        table, recipe = self.table, self.recipe
        bucket = bucket_of(table, size, recipe.latent.pixel_step, self.source.path)
        kept: set[str] = set()
        foreign = 0
        missing: list[Span] = []
        outdated: str | None = None
        is_other = False
        is_image = table.kind == "image"
        # files by item (from their names), in the order of their sections
        there: dict[tuple[Size, Span | None], dict[str, LatentName]] = {}
        for file, name in sorted(self.existing.items(), key=lambda pair: pair[1].section or 0):
            there.setdefault((name.size, name.span), {})[file] = name
        items: list[tuple[int, ...]] = []
        for span in wanted:
            sections = recipe.sections(media_table(table), span[1])
            # what training sees: the whole item, or each of its sections
            whole = (
                records.section_frames(table.fp_latent_window_size, recipe.latent)
                if sections is not None
                else span[1]
            )
            items += [bucket if is_image else (*bucket, whole)] * (sections or 1)
            files = there.get((size, None) if is_image else (bucket, span), {})
            if not files:
                missing.append(span)
                continue
            if recipe.stores.trusts and self.store.is_shared:
                kept |= set(files)
                foreign += len(files)
                continue
            try:
                expected = [None] if sections is None else list(range(sections))
                found = [name.section for name in files.values()]
                if found != expected:
                    theirs = ", ".join("the whole" if one is None else str(one) for one in found)
                    raise CacheError(
                        f"{table.cache_directory / next(iter(files))}: sections {theirs} were found, "
                        f"{len(expected)} files belong together"
                    )
                foreign += sum(self._check_file(file, files, size, bucket, span) for file in files)
                kept |= set(files)
            except CacheError as error:
                missing.append(span)
                outdated = str(error) if outdated is None or isinstance(error, OtherKind) else outdated
                is_other = is_other or isinstance(error, OtherKind)
        counts = self.source, frozenset(kept), foreign, tuple(missing), tuple(items)
        short = None
        if kept_frames is not None and len(table.target_frames) > 1:
            short = describe_short(table, wanted, kept_frames)
        return SourcePlan(*counts, reason, short, outdated, is_other)

    def _check_file(self, file: str, files: Names, size: Size, bucket: Size, span: Span) -> bool:
        """Check that a file of an item equals the one that this run would write; return whether it lacks a
        record.

        Raises CacheError if it does not fit.
        """
        recipe, path = self.recipe, self.table.cache_directory / file
        is_shared, entry = self.store.is_shared, self.store.read(file) if self.reads_values else None
        header = self._header(file) if entry is None else entry
        record = self._record(file) if entry is None else records.latent_record(header)
        if record is None:
            if self.source.mask_from is not None and not (is_shared and LOSS_MASK in header.keys):
                raise OtherKind(f"{path}: it has no mask of the loss")
            if recipe.has_rates and recipe.latent.unsaid_fps is None and FPS not in header.keys:
                raise OtherKind(f"{path}: it does not say how many frames make a second")
            references = self.source.control if self.table.references is not None else ()
            if sum(key.startswith(CONTROL) for key in header.keys) < len(references):
                raise OtherKind(f"{path}: it has no latents of its {len(references)} reference pictures")
            if not (recipe.stores.skip_existing or is_shared):
                raise OtherKind(f"{path}: it has no record of what it was made from")
            window = self.table.fp_latent_window_size
            length = span[1] if files[file].section is None else records.section_frames(window, recipe.latent)
            shape = recipe.latent.shape(length, bucket[1], bucket[0])[2:]
            if shape not in header.grids:
                grids = ", ".join("x".join(map(str, grid)) for grid in sorted(header.grids))
                ours = "x".join(map(str, shape))
                raise OtherKind(f"{path}: it holds {grids or 'no latents'}, this configuration writes {ours}")
            return True
        if record.parts != len(files):
            raise CacheError(f"{path}: {record.parts} files belong together, {len(files)} were found")
        changed = recipe.difference(record, self.source, size, bucket, span)
        if changed is not None:
            raise OtherKind(f"{path}: {changed}")
        changed = self._read_otherwise(record) or self._find_change(record.files)
        if changed is not None:
            raise CacheError(f"{path}: {changed}")
        if entry is not None:
            records.verify_tensors(entry, record.crc32)
        return False

    def _header(self, file: str) -> Entry:
        if file not in self._headers:
            self._headers[file] = self.store.read(file, is_whole=False)
        return self._headers[file]

    def _record(self, file: str) -> records.LatentRecord | None:
        if file not in self._records:
            self._records[file] = records.latent_record(self._header(file))
        return self._records[file]

    def _read_otherwise(self, record: records.LatentRecord) -> str | None:
        mark = record.as_shown
        if mark not in self._otherwise:
            self._otherwise[mark] = shown_otherwise(self.source, self.recipe.latent.masks_latents, mark)
        return self._otherwise[mark]

    def _find_change(self, files: Sequence[FileIdentity]) -> str | None:
        parts = self.source.parts
        if len(parts) != len(files):
            return f"it was made from {len(files)} source files, now there are {len(parts)}"
        changed = [
            str(path)
            for number, ((path, _), then) in enumerate(zip(parts, files, strict=True))
            if not self._is_unchanged(number, then)
        ]
        return f"{', '.join(changed)} changed since" if changed else None

    def _is_unchanged(self, number: int, then: FileIdentity) -> bool:
        """Return whether a part of the source is unchanged; each part is checked once."""
        if self._same.get(number) != then:
            if not records.is_unchanged(then, *self.source.parts[number]):
                return False
            self._same[number] = then
        return True

    def _record_of(self, file: str) -> records.LatentRecord | None:
        with contextlib.suppress(CacheError):
            return self._record(file)
        return None

    def _image_size(self) -> Size | None:
        """Return the size of an image, from its caches if possible, as opening images takes longer. None if
        the image has to be fetched first and no cache has its size.

        Raises MediaError if its header cannot be read.
        """
        if (self.reads_values or self.recipe.stores.trusts) and not self.source.origins:
            return image_size(self.source.path)
        for file, name in self.existing.items():
            read = self._record_of(file)
            if read is None or not read.files or read.options.get("size") != [*name.size]:
                continue
            if self._is_unchanged(0, read.files[0]):
                return name.size
        return None if self.source.origins else image_size(self.source.path)

"""Plan which cache files a source needs, and which existing files are still valid.

Records in the cache files decide this, if possible without decoding the source.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataset.cache import records
from dataset.cache.store import ExistingNames, Names, Stores
from dataset.cache_files import CacheStore, Entry, LatentName
from dataset.caching.prefetch import MANY, Failure, map_ahead
from dataset.config_keys import IGNORE, REFERENCES, SECTIONS
from dataset.sources.clock import has_companions, selects_frames_as_before
from dataset.sources.colors import has_codes, reading_difference
from dataset.sources.decoding import plan_source
from dataset.sources.frames import Span, describe_short, find_bucket, max_decoded_frames, media_table, spans
from dataset.sources.media_source import (
    AUDIO_FILE,
    CLIP_REFERENCES,
    CONTROL_MASK,
    LAYERS,
    NUM_GUIDES,
    REJECTED,
    SHOWN,
    ClipInfo,
    FileIdentity,
    MediaSource,
    Origin,
    pause_garbage_collection,
)
from dataset.sources.moments import full_span, measure_source
from modules.bars import Bar
from modules.console import format_count
from modules.errors import CacheError, MediaError
from modules.media.buckets import Size
from modules.media.colors import AS_SHOWN
from modules.media.reading import image_size
from modules.option_values import format_shape
from protocols.data import (
    AUDIO_PRESENT,
    CONTROL,
    CONTROL_PIXELS,
    FPS,
    INNER_AUDIO,
    LOSS_MASK,
    REJECTED_LATENTS,
    AudioSpec,
    LatentSpec,
    MediaTable,
)
from protocols.rules import ReferenceMedium

_DECODING_VERSION = re.compile(r'"as_shown": (\d{1,9}|true)')  # in the text of a record
# key in the options of a record: the cache file also has the latents of the mirrored image
FLIP = "flip"


class IncompatibleCache(CacheError):
    """Raised if another encoder, other options or another program made a cache file."""


@dataclass(frozen=True)
class LatentCacheSettings:
    """Settings of a caching run that cached latents depend on, except the media files and table keys."""

    tag: str  # the family's cache_tag
    encoder_identity: Mapping[str, str]  # Family.media_identity
    latent: LatentSpec
    fps: float  # the family's frame rate
    count_sections: Callable[[MediaTable, int], int | None]  # Family.sections_of
    stores: Stores
    # items of sources whose caches were found valid, by `SourcePlanner._make_shape_key`
    valid_sizes_by_shape: dict[tuple[object, ...], tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    stores_frame_rate: bool = False  # each cache file records its frame rate (`Abilities.takes_fps`)
    audio: AudioSpec | None = None  # None: the family has no audio

    def record_options(self, source: MediaSource, **sizes: Sequence[int]) -> dict[str, Any]:
        """Return the settings that an item's latents depend on, by their names in its record.

        Most settings that do not apply are omitted. `sizes` are the size, bucket and span of the item.
        """
        table = source.table
        options: dict[str, Any] = {name: [*numbers] for name, numbers in sizes.items()}
        if table.kind == "video":
            # if source_fps is not set, no frames are dropped to reach the family's rate
            family_fps = None if table.buckets.source_fps is None else self.fps
            options["source_fps"] = table.buckets.source_fps
            options["fps"] = table.buckets.target_fps or family_fps
        if source.mask_from is not None:
            options["mask"] = source.mask_from
        switches = {
            "moments": source.precomputed is not None,
            FLIP: table.buckets.augmentation.flip,
            "frame_rate": self.stores_frame_rate,
            records.CLOCK: has_companions(source),  # early versions did not time companions by their clip
            CONTROL_MASK: source.control_mask is not None,
            REJECTED: source.rejected is not None,
        }
        options |= {name: True for name, is_on in switches.items() if is_on}
        counts = {NUM_GUIDES: len(source.guides), LAYERS: len(source.layers)}
        options |= {name: count for name, count in counts.items() if count}
        if source.control:
            options |= table.non_default_values(REFERENCES)
        if source.references and table.references.clip_rules is not None:
            # the number comes first: `source_folders` reads it
            options[CLIP_REFERENCES] = [len(source.references), *table.references.clip_rules.factors]
        if self.stores_audio and table.kind == "video":
            options[AUDIO_FILE] = source.audio is not None  # whether the audio is in a separate file
            if table.source.audio == IGNORE:
                options["audio"] = IGNORE
        if source.row_references:
            options[SHOWN] = [_describe_shown(medium) for medium in source.row_references]
        return options | table.non_default_values(SECTIONS)

    @property
    def stores_audio(self) -> bool:
        """Whether the latent caches of this model include the audio of the clips."""
        return self.audio is not None and self.audio.is_in_latent_cache

    def source_files(self, source: MediaSource) -> tuple[tuple[Path, Origin | None], ...]:
        """Return the files that a source's latent caches depend on, with the `Origin` of packed ones."""
        parts = list(source.latent_inputs)
        if source.audio is not None and self.stores_audio and source.table.source.audio != IGNORE:
            parts.append(source.audio)
        for medium in source.row_references:
            parts += [(path, None) for path in (medium.path, medium.audio_path) if path is not None]
        return tuple(parts)

    def describe_difference(
        self, record: records.LatentRecord, source: MediaSource, size: Size, bucket: Size, span: Span
    ) -> str | None:
        """Return how a record's encoder or options differ from this run's, as text; None if they agree."""
        # if a model learns audio alone, image latents are only placeholders, from any encoder
        learns_audio_only = self.audio is not None and self.audio.audio_only
        if not learns_audio_only:
            encoder_change = records.difference(record.encoder, self.encoder_identity)
            if encoder_change is not None:
                return encoder_change
        options = self.record_options(source, size=size, bucket=bucket, span=span)
        recorded_options = dict(record.options)
        if FLIP not in options:
            recorded_options.pop(FLIP, None)  # unused mirrored latents do no harm
        # records of early versions lack CLOCK (companions are timed by their clip). If the frame rates are
        # equal, these versions selected the same frames
        is_early_record = records.CLOCK in options and records.CLOCK not in recorded_options
        if is_early_record and selects_frames_as_before(source, self.fps):
            recorded_options[records.CLOCK] = True
        return records.options_difference(recorded_options, options, self.latent)


def _describe_shown(medium: ReferenceMedium) -> str:
    """Return a reference medium as text for a record; records compare it, so it must never change."""
    if medium.kind != "video" or medium.audio_path is None:
        return f"{medium.kind}, silent" if medium.is_silent else medium.kind
    return f"{medium.kind}, sound of a file"


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """What remains to be encoded for one media file, its valid cache files, and messages about it."""

    source: MediaSource
    valid_files: frozenset[str]  # names of valid files
    num_without_record: int  # number of valid files without a record
    missing_spans: tuple[Span, ...] | None  # what to encode; None: unknown before decoding
    # width, height and, for videos, frames of each training item; empty if `missing_spans` is None
    item_sizes: tuple[tuple[int, ...], ...] = ()
    why_no_items: str | None = None  # why the source gives no items
    too_short_for: str | None = None  # target_frames for which the clip is too short, if it gives other items
    outdated_reason: str | None = None  # why an existing file is replaced
    is_incompatible: bool = False  # whether an existing file raised IncompatibleCache
    size_changes: tuple[str, ...] = ()  # `ClipInfo.size_changes`
    silence_reason: str | None = None  # why the clip is cached with silent audio


def plan_all(
    sources: Sequence[MediaSource],
    existing: ExistingNames,
    cache_settings: LatentCacheSettings,
    workers: int,
    show_progress: bool = True,
) -> tuple[list[SourcePlan], list[Failure]]:
    """Compare all media files with their cache files; a file whose header is unreadable becomes a failure.

    Tensor values are read only with --verify or for fewer than MANY files. Otherwise caches with the same
    settings and shapes count as equal.
    """
    verifies_tensors = cache_settings.stores.verify or len(sources) < MANY  # reading many would take long

    def plan(source: MediaSource) -> SourcePlan | Failure:
        """Return the plan for a media file: what to encode; or why the file cannot be read."""
        try:
            planner = SourcePlanner(
                source, existing[source.table.index].of(source.stem), cache_settings, verifies_tensors
            )
            # if all files are read, or none, nothing is saved by comparing shapes
            if verifies_tensors or cache_settings.stores.trusts_shared_caches:
                return planner.plan()
            return planner.plan_by_shape()
        except (MediaError, OSError) as error:
            return Failure.of(source, error)

    bar = Bar(len(sources), "Comparing", "source", show_progress)
    with pause_garbage_collection():
        results = list(map_ahead(sources, plan, workers, bar))
    plans = [result for result in results if isinstance(result, SourcePlan)]
    failures = [result for result in results if isinstance(result, Failure)]
    return plans, failures


@dataclass
class _Comparison:
    """Intermediate results of comparing a media file with its cache files."""

    valid_files: set[str] = field(default_factory=set)  # names of files
    num_without_record: int = 0  # number of valid files without a record
    missing_spans: list[Span] = field(default_factory=list)
    outdated_reason: str | None = None
    is_incompatible: bool = False  # an existing file raised IncompatibleCache

    def add_outdated(self, error: CacheError) -> None:
        """Store the reason for replacing a cache file: an IncompatibleCache if any, else the first one."""
        is_incompatible = isinstance(error, IncompatibleCache)
        if self.outdated_reason is None or is_incompatible:
            self.outdated_reason = str(error)
        self.is_incompatible = self.is_incompatible or is_incompatible


@dataclass
class SourcePlanner:
    """Compares one media file with its existing cache files, to plan what to encode.

    Nothing is read before `plan` or `compare` is called.
    """

    source: MediaSource
    existing_files: Names
    cache_settings: LatentCacheSettings
    verifies_tensors: bool = True  # whether tensors are compared with their checksums, too
    # headers and records read so far, by file name
    _headers: dict[str, Entry] = field(default_factory=dict, init=False)
    _records: dict[str, records.LatentRecord | None] = field(default_factory=dict, init=False)
    # identities of parts of the source that were found unchanged, by index in `source_files`
    _unchanged: dict[int, FileIdentity] = field(default_factory=dict, init=False)
    # how a version decoded the source differently (None: it did not), by `LatentRecord.decoding_version`
    _decoding_changes: dict[int, str | None] = field(default_factory=dict, init=False)
    # whether the number of frames is from the source's header, which may be wrong
    _trusted_header: bool = field(default=False, init=False)

    @property
    def store(self) -> CacheStore:
        """Store of the table's latents."""
        return self.cache_settings.stores.latent_store(self.source.table)

    def plan_by_shape(self) -> SourcePlan:
        """Return the same as `plan`, but reuse the result of an earlier item with equal caches.

        Of items whose caches have the same settings and shapes, only one is compared fully; for the others
        only the media files are checked.
        """
        shape_key = self._make_shape_key()
        known_sizes = self.cache_settings.valid_sizes_by_shape  # shared by all sources of the run
        if shape_key in known_sizes:
            return self._make_valid_plan(known_sizes[shape_key])
        plan = self.plan()
        # equal only if all caches are valid and have records, and no message is due
        nothing_to_encode = plan == self._make_valid_plan(plan.item_sizes)
        is_reliable = nothing_to_encode and not self._trusted_header
        if shape_key is not None and is_reliable and len(known_sizes) < MANY:
            known_sizes[shape_key] = plan.item_sizes
        return plan

    def _make_valid_plan(self, item_sizes: tuple[tuple[int, ...], ...]) -> SourcePlan:
        """Return the plan for a media file whose caches are all valid and have records."""
        return SourcePlan(
            source=self.source,
            valid_files=frozenset(self.existing_files),
            num_without_record=0,
            missing_spans=(),
            item_sizes=item_sizes,
        )

    def _make_shape_key(self) -> tuple[object, ...] | None:
        """Return a key that is equal for media files with equal plans."""
        # None if the plan must be made in full.
        # The key has all that `plan` depends on except the media files: the table, which kinds of files an
        # item has, and the settings in the records of its caches. It is None if a file has changed, a cache
        # has no valid record, or a record is from a version that decoded media differently.
        source = self.source
        # numbers of files and their presence decide which keys of the table a record has
        key: list[object] = [
            source.table.index,
            source.mask_from,
            len(source.control),
            source.audio is None,
            source.row_references,
            len(source.layers),
            source.precomputed is None,
        ]
        for file in self.existing_files:
            try:
                record = records.split_record(self._read_header(file))
            except CacheError:
                return None
            if record is None:
                return None
            settings_texts, source_files = record  # pieces of the record's JSON, and the files it names
            if self._find_change(source_files) is not None:
                return None
            if has_companions(source) and not any(records.CLOCK in text for text in settings_texts if text):
                return None  # an early record: `plan` compares the frame rates of clip and companions
            if not self._would_decode_alike(settings_texts):
                return None  # from an earlier version: whether its result differs depends on the file
            name_after_stem = file[len(source.stem) :]
            key += (name_after_stem, *settings_texts)
        return tuple(key)

    def _would_decode_alike(self, record_texts: Sequence[str]) -> bool:
        """Return whether decoding the files now gives the same pixels as when they were cached."""
        # `record_texts` are pieces of the cache record's JSON.
        joined = "".join(text or "" for text in record_texts)
        # early records have `true` for version 1, or no version at all
        versions = {1 if version == "true" else int(version) for version in _DECODING_VERSION.findall(joined)}
        if versions == {AS_SHOWN}:
            return True
        # since version 1, only files with codes for color, order or orientation are decoded differently
        return min(versions, default=0) > 0 and not any(
            has_codes(path) for path, _ in self.source.latent_inputs
        )

    def plan(self) -> SourcePlan:
        """Compare existing cache files with those that this run would write, if possible without decoding.

        The size and number of frames that `compare` needs come from the first of these that is available: the
        header of an image, the shape of precomputed moments, the record of an existing cache, or, with
        --skip_existing, the header of a video. If none is, `missing_spans` (the spans to encode) is None, and
        the clip has to be decoded first.

        Raises:
            MediaError: If the header of the file cannot be read.
        """
        unknown = SourcePlan(self.source, valid_files=frozenset(), num_without_record=0, missing_spans=None)
        if self.source.table.kind == "image":
            size = self._read_image_size()
            if size is None:
                return unknown
            return self.compare(size, [(0, self.source.num_images)])  # one span of all images (layers)
        clip = self._read_recorded_clip() if self.existing_files else None
        if self.source.precomputed is not None:
            # precomputed moments are one item; their size may be recorded

            latent = self.cache_settings.latent
            clip = clip or measure_source(self.source, latent)
            return self.compare(clip.size, [full_span(clip, latent.lengths)])
        if clip is not None:
            # if decoding stopped early, the recorded frames must be enough for this run's spans
            needed_frames = max_decoded_frames(self.source.table)
            if clip.complete or (needed_frames is not None and clip.kept_frames >= needed_frames):
                # its recorded size and frame count give the spans, whose cache files are compared
                table = self.source.table
                clip_spans = spans(table, clip.kept_frames, self.cache_settings.latent.lengths)
                why_no_items = None
                if not clip_spans:
                    targets = ", ".join(map(str, table.buckets.target_frames))
                    why_no_items = f"{format_count(clip.kept_frames, 'frame')}, target_frames are {targets}"
                plan = self.compare(clip.size, clip_spans, clip.kept_frames, why_no_items)
                return replace(plan, size_changes=clip.size_changes)
        if self.existing_files and self.cache_settings.stores.skip_existing:
            return self._plan_by_header() or unknown
        return unknown

    def _plan_by_header(self) -> SourcePlan | None:
        """Return the plan for a video that is completely cached according to its header."""
        # None if it is not.
        # This accepts files without a record (--skip_existing). The number of frames in the video's header
        # may be wrong, so the plan is valid only if it agrees with the existing files.
        self._trusted_header = True
        latent = self.cache_settings.latent
        header = plan_source(self.source, self.cache_settings.fps, latent.pixel_step, latent.lengths)
        with contextlib.suppress(MediaError):  # too short for a section, according to the header
            plan = self.compare(header.size, header.spans)
            if plan.valid_files == self.existing_files.keys() and not plan.missing_spans:
                return plan
        return None

    def _read_recorded_clip(self) -> ClipInfo | None:
        """Return the recorded size and frame count of the decoded file; None if it has changed since."""
        options = self.cache_settings.record_options(self.source)
        recorded: list[ClipInfo] = []
        for file in self.existing_files:
            record = self._read_record_if_valid(file)
            if record is None or record.clip is None:
                continue
            # another frame rate keeps another number of frames
            if any(record.options.get(key) != options.get(key) for key in ("source_fps", "fps", "moments")):
                continue
            if self._find_reading_change(record) is not None:
                continue  # an earlier version decoded the source differently, perhaps to another size
            # the first file of a record is the source itself
            if record.files and self._is_unchanged(0, record.files[0]):
                recorded.append(record.clip)
        # decoding for an earlier cache may have stopped before the end: prefer a complete count of frames
        return max(recorded, key=lambda clip: (clip.complete, clip.kept_frames), default=None)

    def compare(
        self,
        size: Size,
        source_spans: Sequence[Span],
        kept_frames: int | None = None,
        why_no_items: str | None = None,
    ) -> SourcePlan:
        """Compare existing cache files with those that a media file's spans need; return what is missing.

        The files of an item (one for each section) are valid together, or encoded again together.

        Args:
            size: Width and height of the image or clip.
            source_spans: First frame and number of frames of each training item.
            kept_frames: Number of frames of the clip at the family's rate; None if the clip was not decoded.
            why_no_items: Reason for an empty `source_spans`, for the plan.
        """
        table, cache_settings = self.source.table, self.cache_settings
        bucket = find_bucket(table, size, cache_settings.latent.pixel_step, self.source.path)
        files_by_item = self._group_files_by_item() if self.existing_files else {}
        comparison = _Comparison()
        item_sizes: list[tuple[int, ...]] = []
        for span in source_spans:
            _, num_frames = span
            num_sections = cache_settings.count_sections(media_table(table), num_frames)
            item_sizes += self._trained_sizes(bucket, span, num_sections)
            item = (size, None) if table.kind == "image" else (bucket, span)
            if item not in files_by_item:
                comparison.missing_spans.append(span)
                continue
            files = files_by_item[item]
            try:
                comparison.num_without_record += self._check_item(files, num_sections, size, bucket, span)
                comparison.valid_files |= set(files)
            except CacheError as error:
                comparison.missing_spans.append(span)
                comparison.add_outdated(error)
        too_short_warning = None  # if the clip is too short for some of the lengths in target_frames
        if kept_frames is not None and len(table.buckets.target_frames) > 1:
            too_short_warning = describe_short(table, source_spans, kept_frames)
        return SourcePlan(
            source=self.source,
            valid_files=frozenset(comparison.valid_files),
            num_without_record=comparison.num_without_record,
            missing_spans=tuple(comparison.missing_spans),
            item_sizes=tuple(item_sizes),
            why_no_items=why_no_items,
            too_short_for=too_short_warning,
            outdated_reason=comparison.outdated_reason,
            is_incompatible=comparison.is_incompatible,
        )

    def _group_files_by_item(self) -> dict[tuple[Size, Span | None], dict[str, LatentName]]:
        """Return the existing cache files of each item, sorted by section."""
        # The names of the files identify the item: by the original size of an image, or by the bucket size
        # and the span of a clip.
        files_by_item: dict[tuple[Size, Span | None], dict[str, LatentName]] = {}
        for file, name in sorted(self.existing_files.items(), key=lambda pair: pair[1].section or 0):
            files_by_item.setdefault((name.size, name.span), {})[file] = name
        return files_by_item

    def _trained_sizes(self, bucket: Size, span: Span, num_sections: int | None) -> list[tuple[int, ...]]:
        """Return the width, height and frame count of the full item, or one for each of its sections."""
        _, num_frames = span
        if self.source.table.kind == "image":
            # with multiple_target, the image's layers count as frames
            size = (*bucket, num_frames) if self.source.table.source.multiple_target else bucket
            return [size] * (num_sections or 1)
        if num_sections is not None:
            num_frames = self._count_section_frames()
        return [(*bucket, num_frames)] * (num_sections or 1)

    def _check_item(
        self, files: Names, num_sections: int | None, size: Size, bucket: Size, span: Span
    ) -> int:
        """Check all cache files of an item; return how many have no record."""
        # caches of other programs may lack control images, so that files of items with control are read
        is_trusted = self.cache_settings.stores.trusts_shared_caches and self.store.is_shared
        if is_trusted and not self.source.control:
            return len(files)
        self._check_sections(files, num_sections)
        have_records = [self._check_file(file, files, size, bucket=bucket, span=span) for file in files]
        return have_records.count(False)

    def _check_sections(self, files: Names, num_sections: int | None) -> None:
        """Raise CacheError unless the latent files of an item are exactly its sections 0, 1, ... in order."""
        expected = [None] if num_sections is None else list(range(num_sections))
        sections = [name.section for name in files.values()]
        if sections == expected:
            return
        shown = ", ".join("the whole" if section is None else str(section) for section in sections)
        raise CacheError(
            f"{self.source.table.cache_directory / next(iter(files))}: sections {shown} were found, "
            f"{len(expected)} files belong together"
        )

    def _check_file(self, file: str, files: Names, size: Size, bucket: Size, span: Span) -> bool:
        """Check that an item's cache file is equal to the one that this run would write."""
        # `files` are all files of the item, one for each section.
        path = self.source.table.cache_directory / file
        entry: Entry | None = None  # with tensors, if these are checked; else only the header is read
        if self.verifies_tensors:
            header = entry = self.store.read(file)
            record = records.latent_record(header)
        else:
            header = self._read_header(file)
            record = self._record(file)
        if record is None:  # another program wrote the file
            # its header has to match this run
            name = files[file]
            missing = next(self._find_missing_tensors(header.keys), None)
            if missing is not None:
                raise IncompatibleCache(f"{path}: {missing}")
            # a key that the file lacks is no reason to reject it
            for key, value in self.cache_settings.latent.required_metadata:
                if header.metadata.get(key, value) != value:
                    made_for = f"it was made for {key} {header.metadata[key]}"
                    raise IncompatibleCache(f"{path}: {made_for}, but this run has {value}")
            if not (self.cache_settings.stores.skip_existing or self.store.is_shared):
                raise IncompatibleCache(f"{path}: it has no record of what it was made from")
            grid = self._grid(name, bucket, span)
            if grid not in header.grids:
                stored = ", ".join(format_shape(stored) for stored in sorted(header.grids)) or "no latents"
                raise IncompatibleCache(
                    f"{path}: it contains {stored}, but this configuration writes {format_shape(grid)}"
                )
            return False
        if record.parts != len(files):
            raise CacheError(f"{path}: {record.parts} files belong together, {len(files)} were found")
        difference = self.cache_settings.describe_difference(
            record, self.source, size=size, bucket=bucket, span=span
        )
        if difference is not None:
            raise IncompatibleCache(f"{path}: {difference}")
        source_change = self._find_reading_change(record) or self._find_change(record.files)
        if source_change is not None:
            raise CacheError(f"{path}: {source_change}")
        if entry is not None:
            records.verify_tensors(entry, record.crc32)
        return True

    def _find_missing_tensors(self, keys: Collection[str]) -> Iterator[str]:
        """Yield what a cache file without a record lacks that this run needs, given the keys of its tensors.

        Such a file was written by another program or an older version.
        """
        is_shared = self.store.is_shared  # other programs write caches of this format, too
        latent = self.cache_settings.latent
        if self.source.mask_from is not None and not (is_shared and LOSS_MASK in keys):
            yield "it has no loss mask"
        if self.source.rejected is not None and REJECTED_LATENTS not in keys:
            yield "it has no latents of its worse one"
        needs_frame_rate = self.cache_settings.stores_frame_rate and latent.default_fps is None
        if needs_frame_rate and FPS not in keys:
            yield "it does not contain its frame rate"
        # control images are the reference images of an editing model
        if self.source.table.references.rules is not None:
            num_references = len(self.source.control)
            if sum(key.startswith(CONTROL) for key in keys) < num_references:
                yield f"it has no latents of its {num_references} reference images"
        elif self.store.is_shared and self.source.control:
            has_control = any(key.startswith((CONTROL, CONTROL_PIXELS)) for key in keys)
            if not has_control:
                yield "it has no control image"
        needed_keys = (INNER_AUDIO, AUDIO_PRESENT) if latent.caches_audio else ()
        for key in needed_keys:
            if key not in keys:
                yield f"it has no {key}, which this model needs with every clip"

    def _grid(self, name: LatentName, bucket: Size, span: Span) -> tuple[int, ...]:
        """Return F, H, W of an item's latents, or of one section of them."""
        _, num_frames = span
        width, height = bucket
        if self.source.table.source.multiple_target:
            num_frames = 1  # musubi-tuner writes 1 into tensor names, although the tensors have all layers
        if name.section is not None:
            num_frames = self._count_section_frames()
        return self.cache_settings.latent.shape(num_frames, height, width)[2:]

    def _count_section_frames(self) -> int:
        """Return how many pixel frames a section of the clip has, for a model that generates in sections."""
        return self.cache_settings.latent.count_frames(self.source.table.buckets.fp_latent_window_size)

    def _read_header(self, file: str) -> Entry:
        """Return the header of a cache file, which is read only once."""
        if file not in self._headers:
            self._headers[file] = self.store.read(file, is_full=False)
        return self._headers[file]

    def _record(self, file: str) -> records.LatentRecord | None:
        """Return the record in a cache file; each file is read only once."""
        if file not in self._records:
            self._records[file] = records.latent_record(self._read_header(file))
        return self._records[file]

    def _find_reading_change(self, record: records.LatentRecord) -> str | None:
        """Return what the version that wrote a record decoded differently; None if there is no difference."""
        version = record.decoding_version
        if version not in self._decoding_changes:
            self._decoding_changes[version] = reading_difference(
                self.source, self.cache_settings.latent.keeps_alpha, version
            )
        return self._decoding_changes[version]

    def _find_change(self, files: Sequence[FileIdentity]) -> str | None:
        """Return which source files have changed since a cache was made, as text; None if none has."""
        parts = self.cache_settings.source_files(self.source)
        if len(parts) != len(files):
            return f"it was made from {len(files)} source files, but there are now {len(parts)}"
        changed = []
        for index, ((path, _), identity) in enumerate(zip(parts, files, strict=True)):
            if not self._is_unchanged(index, identity):
                changed.append(str(path))
        return f"{', '.join(changed)} changed since" if changed else None

    def _is_unchanged(self, index: int, identity: FileIdentity) -> bool:
        """Return whether a source file still matches its recorded size, time and hash."""
        # `index` is its index in `source_files`. A file that was found unchanged is not checked again.
        if self._unchanged.get(index) != identity:
            path, origin = self.cache_settings.source_files(self.source)[index]
            if not records.is_unchanged(identity, path, origin):
                return False
            self._unchanged[index] = identity
        return True

    def _read_record_if_valid(self, file: str) -> records.LatentRecord | None:
        """Return the record stored in a cache file; None if it has none or is damaged."""
        with contextlib.suppress(CacheError):
            return self._record(file)
        return None

    def _read_image_size(self) -> Size | None:
        """Return the size of an image, from its caches if possible, because opening images takes longer."""
        must_be_fetched = bool(self.source.remote_or_packed)
        # records of caches save time only if caches are read, but not completely
        reads_no_records = self.cache_settings.stores.trusts_shared_caches
        if (self.verifies_tensors or reads_no_records) and not must_be_fetched:
            return image_size(self.source.path)
        for file, name in self.existing_files.items():
            record = self._read_record_if_valid(file)
            if record is None or not record.files or record.options.get("size") != [*name.size]:
                continue
            if self._is_unchanged(0, record.files[0]):  # the first file of a record is the image itself
                return name.size
        return None if must_be_fetched else image_size(self.source.path)

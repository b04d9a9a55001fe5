"""Encode the audio of clips whose latents are cached, into separate files next to the latents.

If audio is turned on later, only audio is encoded; and a changed audio file makes only its own cache stale.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dataset import cache_files
from dataset.cache import records
from dataset.cache.records import FROM_OPTION, HAS_REFERENCE
from dataset.cache.store import ExistingNames, LatentNames, Stores, remove_caches
from dataset.caching.latents import write_entry
from dataset.caching.prefetch import MANY, CacheReport, Failure, Write, read_ahead, write_behind
from dataset.config import DatasetTable
from dataset.config_keys import IGNORE, REQUIRED
from dataset.sources.audio import NoAudio, find_audio, read_audios
from dataset.sources.fetching import fetch
from dataset.sources.frames import kept_rate
from dataset.sources.media_source import FileIdentity, MediaSource, Origin
from modules.bars import Bar
from modules.devices import free_memory
from modules.errors import CacheError, MediaError
from modules.media.samples import read_reference
from protocols.data import AUDIO_LATENTS, REFERENCE_AUDIO
from protocols.family import Caches, HearsAudio

Entries = frozenset[tuple[int, str]]  # pairs of a table index and the name of an entry


class AudioCachingFamily(Caches, HearsAudio, Protocol):
    """Protocol of model families that cache the audio of clips in separate files."""


@dataclass(frozen=True)
class AudioPlan:
    """Valid and missing audio cache files of one clip, with the decoded audio of the missing ones."""

    source: MediaSource
    valid_files: tuple[str, ...]  # names of valid files
    num_without_record: int  # number of valid files without a record
    missing_items: tuple[cache_files.LatentName, ...]  # items without a valid file
    # the following are set when the audio has been read
    files: tuple[FileIdentity, ...] = ()  # files that the audio was read from
    rate: float = 0.0  # frames of the clip per second
    samples: tuple[Tensor, ...] = ()  # audio of each missing item, channels S
    references: tuple[Tensor, ...] = ()  # reference audio of each missing item, channels S; () without one
    silence_reason: str | None = None  # why the clip has no audio


class _AudioJob(NamedTuple):
    """A clip and its cached training items, for which audio is to be encoded."""

    source: MediaSource
    items: Sequence[cache_files.LatentName]


class AudioWork:
    """Encodes and caches the audio of a dataset.

    The networks are loaded when they are first needed. They stay loaded until `free` is called or the video
    encoders replace them.
    """

    def __init__(
        self,
        family: AudioCachingFamily,
        tables: Iterable[DatasetTable],
        stores: Stores,
        device: torch.device,
        before_loading: Callable[[], None] = lambda: None,
    ) -> None:
        """List the existing audio cache files of all clip tables.

        `before_loading` is called to free the device before the networks are loaded.
        """
        assert family.audio is not None
        self._family, self.spec = family, family.audio
        self._stores, self._device = stores, device
        self._before_loading = before_loading
        self._tag = cache_files.audio_tag(family.cache_tag)
        self._networks = None
        self._existing: ExistingNames = {
            table.index: LatentNames(stores.latent_store(table), self._tag, table.kind)
            for table in tables
            if table.kind == "video"
        }

    def encode(
        self, sources: Sequence[MediaSource], latents: Entries, workers: int, shows: bool
    ) -> CacheReport:
        """Encode the audio of all items that have cached latents but no valid audio cache.

        Threads decode the audio of the next clips (`read_ahead`) while one clip is encoded. A clip whose
        audio cannot be read, or is missing but required, becomes a failure in the report.

        Args:
            sources: The clips.
            latents: Valid latent caches of these clips.
            workers: Number of threads that decode audio.
            shows: Whether a progress bar is shown.

        Raises:
            CheckpointError: If a network cannot be loaded.
            OutputError: If a cache file cannot be written.
        """
        jobs = self._list_jobs(sources, latents)
        verifies = self._stores.verify or len(jobs) < MANY  # checksums of many files would take long
        ahead = read_ahead(
            jobs,
            get_source=lambda job: job.source,
            work=lambda job: self._read(self.plan(job.source, job.items, verifies)),
            workers=workers,
            bar=Bar(len(jobs), "Audio", "clip", shows),
            decodes=True,
        )
        report = CacheReport()
        valid: set[tuple[int, str]] = set()
        with write_behind() as write, contextlib.closing(ahead), torch.no_grad():
            for job, plan in ahead:
                if isinstance(plan, Failure):
                    report = replace(report, failures=(*report.failures, plan))
                    continue
                files = [*plan.valid_files, *self._encode_missing(plan, write)]
                valid |= {(job.source.table.index, file) for file in files}
                silent = (
                    () if plan.silence_reason is None else (Failure.of(plan.source, plan.silence_reason),)
                )
                report = replace(
                    report,
                    written=report.written + len(plan.samples),
                    reused=report.reused + len(plan.valid_files),
                    num_without_record=report.num_without_record + plan.num_without_record,
                    silent=report.silent + silent,
                )
                del plan  # frees its samples before waiting for the next source
        return replace(report, valid=frozenset(valid))

    def _list_jobs(self, sources: Sequence[MediaSource], latents: Entries) -> list[_AudioJob]:
        """Return the clips that have items with cached latents, each with these items."""
        items_by_clip = self._group_by_clip(latents)
        jobs = []
        for source in sources:
            items = items_by_clip.get((source.table.index, source.stem))
            if items is not None:
                jobs.append(_AudioJob(source, items))
        return jobs

    def _encode_missing(self, plan: AudioPlan, write: Write) -> list[str]:
        """Encode the audio of a clip's missing items; return the names of the files that will be written."""
        if plan.samples and self._networks is None:
            self._before_loading()
            self._networks = self._family.audio_networks(self._device, decodes=False)
        files = []
        items_with_audio = plan.missing_items[: len(plan.samples)]  # a silent clip has no samples
        for index, name in enumerate(items_with_audio):
            file = name.file_name(self._tag)
            tensors = self._encode(name, index, plan)
            record = records.LatentRecord(
                encoder=self._family.audio_identity,
                options=self._options(plan.source, name),
                files=plan.files,
                clip=None,
                parts=1,
                crc32={},  # filled in by `write_entry`
            )
            assert name.span is not None
            _, frames = name.span
            write(
                partial(
                    write_entry,
                    self._stores.latent_store(plan.source.table),
                    self._family,
                    file=file,
                    named={cache_files.tensor_name(key, tensor): tensor for key, tensor in tensors.items()},
                    record=record,
                    additional_metadata={"frame_count": str(frames)},
                )
            )
            files.append(file)
        return files

    def remove_stale(self, table: DatasetTable, valid: Collection[str], failed: Collection[str]) -> int:
        """Remove a table's audio cache files that are not in `valid`; return their number.

        `failed` contains the stems of clips that could not be read; their files are kept.
        """
        if table.index not in self._existing:
            return 0
        stale = self._existing[table.index].list_stale(valid, failed)
        is_family_cache = partial(cache_files.is_latent_cache, architecture=self._family.name, audio=True)
        return remove_caches(self._stores.latent_store(table), stale, is_family_cache)

    def free(self) -> None:
        """Free the audio encoder's memory if it is loaded."""
        if self._networks is not None:
            self._networks = None
            free_memory(self._device)

    def plan(self, source: MediaSource, names: Sequence[cache_files.LatentName], verifies: bool) -> AudioPlan:
        """Compare a clip's audio cache files with those that this run would write.

        With `audio = "ignore"`, existing files are kept, and none counts as missing.
        """
        files_by_item = {name: name.file_name(self._tag) for name in names}
        if source.table.source.audio == IGNORE:
            existing = self._existing[source.table.index].of(source.stem)
            kept_files = tuple(file for file in files_by_item.values() if file in existing)
            return AudioPlan(source, kept_files, num_without_record=0, missing_items=())
        valid_files: list[str] = []
        num_without_record = 0
        missing_items: list[cache_files.LatentName] = []
        for name, file in files_by_item.items():
            try:
                has_record = self._check(file, source, name, verifies)
            except CacheError:
                missing_items.append(name)
                continue
            valid_files.append(file)
            if not has_record:
                num_without_record += 1
        return AudioPlan(source, tuple(valid_files), num_without_record, tuple(missing_items))

    def count_valid(self, source: MediaSource, files: Collection[str]) -> int:
        """Return how many of a clip's latent caches have a valid audio cache.

        `files` are the names of the latent caches.
        """
        items_by_clip = self._group_by_clip(frozenset((source.table.index, file) for file in files))
        items = items_by_clip.get((source.table.index, source.stem), ())
        return len(self.plan(source, items, self._stores.verify).valid_files)

    def _group_by_clip(self, latents: Entries) -> dict[tuple[int, str], list[cache_files.LatentName]]:
        """Return the cached latents of each clip, by table index and stem of the clip."""
        by_table: dict[int, list[str]] = {}
        for index, name in sorted(latents):
            if index in self._existing:
                by_table.setdefault(index, []).append(name)
        items: dict[tuple[int, str], list[cache_files.LatentName]] = {}
        for index, names in by_table.items():
            for _, stem, ending in cache_files.latent_names(names, self._family.cache_tag, "video"):
                items.setdefault((index, stem), []).append(replace(ending, stem=stem))
        return items

    def _check(self, file: str, source: MediaSource, name: cache_files.LatentName, verifies: bool) -> bool:
        """Check that a cached audio file is what this run would write; return whether it has a record."""
        entry = self._stores.latent_store(source.table).read(file, is_full=verifies)
        record = records.latent_record(entry)
        if record is None:
            if not self._stores.skip_existing or AUDIO_LATENTS not in entry.keys:
                raise CacheError(f"{file}: it has no record of what it was made from")
            return False
        difference = records.difference(record.encoder, self._family.audio_identity)
        if difference is None:
            difference = records.difference(record.options, self._options(source, name))
        if difference is not None:
            raise CacheError(f"{file}: {difference}")
        source_files = _source_files(source)
        if len(source_files) != len(record.files):
            raise CacheError(
                f"{file}: it was made from {len(record.files)} files, but there are now {len(source_files)}"
            )
        for identity, (path, origin) in zip(record.files, source_files, strict=True):
            if not records.is_unchanged(identity, path, origin):
                raise CacheError(f"{file}: its clip or its audio changed since")
        if verifies:
            records.verify_tensors(entry, record.crc32)
        return True

    def _options(self, source: MediaSource, name: cache_files.LatentName) -> dict[str, Any]:
        """Return the settings that an item's cached audio depends on; its record stores them."""
        table = source.table
        # if source_fps is not set, no frames are dropped to reach the family's rate
        family_fps = None if table.buckets.source_fps is None else self._family.defaults.fps
        fps = table.buckets.target_fps or family_fps
        options = {"span": [*(name.span or ())], "source_fps": table.buckets.source_fps, "fps": fps}
        if source.reference_audio is not None:  # a key of its own, so that other caches stay valid
            options[HAS_REFERENCE] = True
        if table.source.audio_from_option:
            options[FROM_OPTION] = True
        return options

    def _read(self, plan: AudioPlan) -> AudioPlan:
        """Return the plan with the decoded audio of its missing items."""
        if not plan.missing_items:
            return plan
        spans = [name.span for name in plan.missing_items if name.span is not None]
        try:
            with fetch(plan.source) as local_source:
                path = find_audio(local_source)
                fps = kept_rate(local_source, self._family.defaults.fps)
                samples = read_audios(path, spans, fps, self.spec)
            seconds = [num_frames / fps for _, num_frames in spans]
            references = self._read_references(plan.source, seconds)
        except NoAudio as reason:
            if plan.source.table.source.audio == REQUIRED or self.spec.audio_only:
                why_required = 'audio = "required" needs it'
                if self.spec.audio_only:
                    why_required = "only audio is learned"
                raise MediaError(f"{reason}; {why_required}") from None
            return replace(plan, silence_reason=str(reason))
        files = tuple(itertools.starmap(records.identify, _source_files(plan.source)))
        return replace(plan, files=files, rate=fps, samples=tuple(samples), references=tuple(references))

    def _read_references(self, source: MediaSource, seconds: Sequence[float]) -> list[Tensor]:
        """Return each item's reference audio, cut to the item's length; [] if the clip has no reference."""
        # `seconds` are the lengths of the items.
        if source.reference_audio is None:
            return []
        references = []
        for length in seconds:
            samples = read_reference(source.reference_audio, length, self.spec.rate, self.spec.channels)
            references.append(torch.from_numpy(samples))
        return references

    def _encode(self, name: cache_files.LatentName, index: int, plan: AudioPlan) -> dict[str, Tensor]:
        """Encode the audio of an item, and its reference audio; `index` is the item's index in the plan."""
        assert name.span is not None
        _, frames = name.span
        samples = plan.samples[index][None]  # 1 C S
        (latents,) = self._family.encode_audio(self._networks, samples, frames, plan.rate)
        expected = self.spec.shape(frames, plan.rate)
        if tuple(latents.shape) != expected:  # batches are formed from the expected shape
            raise ValueError(f"audio latents are {tuple(latents.shape)}, but AudioSpec.shape says {expected}")
        length = torch.tensor(expected[1], dtype=torch.int32)
        tensors = {AUDIO_LATENTS: latents.detach().cpu().contiguous(), cache_files.AUDIO_LENGTH: length}
        if plan.references:
            samples = plan.references[index][None]
            # with its own length: at a "frame rate" of `spec.rate`, each sample of the audio is a frame
            (encoded,) = self._family.encode_audio(self._networks, samples, samples.shape[-1], self.spec.rate)
            tensors[REFERENCE_AUDIO] = encoded.detach().cpu().contiguous()
        return tensors


def _source_files(source: MediaSource) -> list[tuple[Path, Origin | None]]:
    """Return the files that cached audio depends on, each with its `Origin` if it is packed or downloaded."""
    # These are the clip (for its frame rate), its separate audio file, and the reference audio, if any.
    parts: list[tuple[Path, Origin | None]] = [source.latent_inputs[0]]
    if source.audio is not None:
        parts.append(source.audio)
    if source.reference_audio is not None:
        parts.append((source.reference_audio, None))
    return parts

"""Encode the sound of clips whose latents are cached, each into a file of its own next to the latents.

Turning sound on therefore encodes sound alone, and a changed sound file makes only its own cache stale.
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
from dataset.cache.records import HAS_REFERENCE
from dataset.cache.store import ExistingNames, LatentNames, Stores, remove_caches
from dataset.caching.latents import write_entry
from dataset.caching.prefetch import MANY, CacheReport, Failure, read_ahead, write_behind
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
from protocols.data import REFERENCE_AUDIO, SOUND
from protocols.family import Caches, HearsAudio

Entries = frozenset[tuple[int, str]]  # table index and name of each


class HearingFamily(Caches, HearsAudio, Protocol):
    """Functions that caching of sound needs of a family."""


@dataclass(frozen=True)
class AudioPlan:
    """Plan the sound of one clip's cached items; the fields after `missing` are read from its sound file."""

    source: MediaSource
    kept: tuple[str, ...]  # names of valid files
    foreign: int  # how many of them have no record
    missing: tuple[cache_files.LatentName, ...]  # items without a valid file
    files: tuple[FileIdentity, ...] = ()  # that the sound is from
    rate: float = 0.0  # frames in a second
    samples: tuple[Tensor, ...] = ()  # of each missing item, channels S
    references: tuple[Tensor, ...] = ()  # of each missing item, channels S; () without references
    silent: str | None = None  # why there is none


class _AudioJob(NamedTuple):
    """A clip with its cached items."""

    source: MediaSource
    names: Sequence[cache_files.LatentName]


class AudioWork:
    """Encode the audio of a dataset.

    Networks are loaded when they are first needed and stay loaded until `free` is called, or until the video
    encoders replace them.
    """

    def __init__(
        self,
        family: HearingFamily,
        tables: Iterable[DatasetTable],
        stores: Stores,
        device: torch.device,
        before_loading: Callable[[], None] = lambda: None,
    ) -> None:
        """List entries.

        `before_loading` is called to free the device before the networks are loaded.
        """
        assert family.audio is not None
        self._family, self.spec = family, family.audio
        self._stores, self._device = stores, device
        self._before_loading = before_loading
        self._tag = cache_files.audio_tag(family.cache_tag)
        self._networks = None
        self._existing: ExistingNames = {
            table.index: LatentNames(stores.of(table), self._tag, table.kind)
            for table in tables
            if table.kind == "video"
        }

    def encode(
        self, sources: Sequence[MediaSource], latents: Entries, workers: int, shows: bool
    ) -> CacheReport:
        """Encode the sound of all items of some sources that have latents and no valid entry of sound.

        `latents` is the valid entries of latents. A clip whose sound cannot be read, or is missing but
        needed, becomes a failure of the report.

        Raises:
            CheckpointError: If a network cannot be loaded.
            OutputError: If an entry cannot be written.
        """
        items = self._items_of(latents)
        jobs: list[_AudioJob] = []
        for source in sources:
            names = items.get((source.table.index, source.stem))
            if names is not None:
                jobs.append(_AudioJob(source, names))
        verifies = self._stores.verify or len(jobs) < MANY
        ahead = read_ahead(
            jobs,
            source_of=lambda job: job.source,
            work=lambda job: self._read(self.plan(job.source, job.names, verifies)),
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
                files = list(plan.kept)
                for index, name in enumerate(plan.missing[: len(plan.samples)]):
                    file = name.file_name(self._tag)
                    write(self._encode(file, name, index, plan))
                    files.append(file)
                valid |= {(job.source.table.index, file) for file in files}
                silent = () if plan.silent is None else (Failure.of(job.source, plan.silent),)
                report = replace(
                    report,
                    written=report.written + len(plan.samples),
                    kept=report.kept + len(plan.kept),
                    foreign=report.foreign + plan.foreign,
                    silent=report.silent + silent,
                )
                del plan  # frees its samples before waiting for the next source
        return replace(report, right=frozenset(valid))

    def remove_stale(self, table: DatasetTable, valid: Collection[str], failed: Collection[str]) -> int:
        """Remove a table's audio entries that are not in `valid`; return their number.

        `failed` are the stems of sources that failed, whose entries are kept.
        """
        if table.index not in self._existing:
            return 0
        stale = self._existing[table.index].not_in(valid, except_of=failed)
        is_ours = partial(cache_files.is_latent_cache, architecture=self._family.name, audio=True)
        return remove_caches(self._stores.of(table), stale, is_ours)

    def free(self) -> None:
        """Release the networks, if they are loaded."""
        if self._networks is not None:
            self._networks = None
            free_memory(self._device)

    def plan(self, source: MediaSource, names: Sequence[cache_files.LatentName], verifies: bool) -> AudioPlan:
        """Compare a clip's audio entries with those that this run would write.

        With `audio = "ignore"`, existing entries are kept, and none counts as missing.
        """
        existing = self._existing[source.table.index].of(source.stem)
        valid: list[str] = []
        foreign = 0
        missing: list[cache_files.LatentName] = []
        for name in names:
            file = name.file_name(self._tag)
            try:
                if source.table.audio != IGNORE:
                    foreign += self._check(file, source, name, verifies)
                elif file not in existing:
                    continue
                valid.append(file)
            except CacheError:
                missing.append(name)
        return AudioPlan(source, tuple(valid), foreign, tuple(missing))

    def count_valid(self, source: MediaSource, files: Collection[str]) -> int:
        """Return how many of a clip's latent caches have a valid audio entry.

        `files` are the names of the latent caches.
        """
        items = self._items_of(frozenset((source.table.index, file) for file in files))
        names = items.get((source.table.index, source.stem), ())
        return len(self.plan(source, names, self._stores.verify).kept)

    def _items_of(self, latents: Entries) -> dict[tuple[int, str], list[cache_files.LatentName]]:
        """Return the items that have latents, by index of the table and stem of the clip.

        `latents` are pairs of a table's index and the name of an entry of latents.
        """
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
        """Check an entry; return whether it lacks a record.

        Raises:
            CacheError: If the entry has to be made again.
        """
        entry = self._stores.of(source.table).read(file, is_full=verifies)
        record = records.latent_record(entry)
        if record is None:
            if not self._stores.skip_existing or SOUND not in entry.keys:
                raise CacheError(f"{file}: it has no record of what it was made from")
            return True
        difference = records.difference(record.encoder, self._family.audio_identity)
        difference = difference or records.difference(record.options, self._options(source, name))
        parts = _parts(source)
        if difference is not None or len(parts) != len(record.files):
            raise CacheError(f"{file}: {difference}")
        for identity, (path, origin) in zip(record.files, parts, strict=True):
            if not records.is_unchanged(identity, path, origin):
                raise CacheError(f"{file}: its clip or its audio changed since")
        if verifies:
            records.verify_tensors(entry, record.crc32)
        return False

    def _options(self, source: MediaSource, name: cache_files.LatentName) -> dict[str, Any]:
        declared = source.table.source_fps
        rates = {"source_fps": declared, "fps": None if declared is None else self._family.defaults.fps}
        options = {"span": [*(name.span or ())], **rates}
        if source.reference_audio is not None:  # a key of its own, so that other caches stay valid
            options[HAS_REFERENCE] = True
        return options

    def _read(self, plan: AudioPlan) -> AudioPlan:
        """Decode the sound that a plan lacks. Raises MediaError or OSError."""
        if not plan.missing:
            return plan
        spans = [name.span for name in plan.missing if name.span is not None]
        try:
            with fetch(plan.source) as here:
                path = find_audio(here)
                rate = kept_rate(here, self._family.defaults.fps)
                samples = read_audios(path, spans, rate, self.spec)
            references = self._read_references(plan.source, [frames / rate for _, frames in spans])
        except NoAudio as reason:
            if plan.source.table.audio == REQUIRED or self.spec.is_alone:
                asks = "sound alone is learned" if self.spec.is_alone else 'audio = "required" asks for it'
                raise MediaError(f"{reason}; {asks}") from None
            return replace(plan, silent=str(reason))
        files = tuple(itertools.starmap(records.identify, _parts(plan.source)))
        return replace(plan, files=files, rate=rate, samples=tuple(samples), references=tuple(references))

    def _read_references(self, source: MediaSource, seconds: Sequence[float]) -> list[Tensor]:
        """Return the audio that the audio of each item is made after; [] without it.

        `seconds` are the lengths of the items. Raises MediaError if it cannot be read.
        """
        if source.reference_audio is None:
            return []
        references = []
        for length in seconds:
            samples = read_reference(source.reference_audio, length, self.spec.rate, self.spec.channels)
            references.append(torch.from_numpy(samples))
        return references

    def _encode(
        self, file: str, name: cache_files.LatentName, index: int, plan: AudioPlan
    ) -> Callable[[], None]:
        """Encode the sound of an item, at `index` of the plan; return the function that writes it."""
        if self._networks is None:
            self._before_loading()
            self._networks = self._family.audio_networks(self._device, decodes=False)
        assert name.span is not None
        _, frames = name.span
        samples = plan.samples[index][None]
        (latents,) = self._family.encode_audio(self._networks, samples, frames, plan.rate)
        expected = self.spec.shape(frames, plan.rate)
        if tuple(latents.shape) != expected:  # batches are made by it
            raise ValueError(f"latents of sound are {tuple(latents.shape)}, SoundSpec.shape says {expected}")
        length = torch.tensor(expected[1], dtype=torch.int32)
        tensors = {SOUND: latents.detach().cpu().contiguous(), cache_files.AUDIO_LENGTH: length}
        if plan.references:
            samples = plan.references[index][None]
            # its own length, in samples
            (encoded,) = self._family.encode_audio(self._networks, samples, samples.shape[-1], self.spec.rate)
            tensors[REFERENCE_AUDIO] = encoded.detach().cpu().contiguous()
        record = records.LatentRecord(
            encoder=self._family.audio_identity,
            options=self._options(plan.source, name),
            files=plan.files,
            clip=None,
            parts=1,
            crc32={},
        )
        return partial(
            write_entry,
            self._stores.of(plan.source.table),
            self._family,
            file=file,
            named={cache_files.tensor_name(key, tensor): tensor for key, tensor in tensors.items()},
            record=record,
            facts={"frame_count": str(frames)},
        )


def _parts(source: MediaSource) -> list[tuple[Path, Origin | None]]:
    """Return the files that cached audio depends on.

    These are the clip (for its rate), and separate files of its audio and of the reference for its audio.
    """
    parts: list[tuple[Path, Origin | None]] = [source.parts[0]]
    if source.audio is not None:
        parts.append(source.audio)
    if source.reference_audio is not None:
        parts.append((source.reference_audio, None))
    return parts

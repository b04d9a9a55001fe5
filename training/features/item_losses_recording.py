"""Record the loss of each image and clip without waiting for the device, with thumbnails of the hardest.

A loss is copied to the host as soon as it is computed, and read a step later, when the run has read the
values of that step anyway. No pass is added, and the training itself does not change.
"""

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset.cache_files import SUFFIX, parse_latent_name
from dataset.listing import find_sources
from dataset.sources.fetching import fetch
from dataset.sources.media_source import Fault, MediaSource, Remote
from dataset.table import DatasetTable
from modules.atomic_write import append_text, atomic_path, replace_surrogates, write_text
from modules.devices import empty_pinned
from modules.errors import MediaError, OptionError, UserError
from modules.media.reading import Frame, read_image, video_frames
from training.features.hooks import PlannedRun
from training.loss import NoisyBatch
from training.reports.item_losses import (
    VERSION,
    ItemDraw,
    ItemImage,
    compare_items,
    read_draws,
    read_file_draws,
    select_shown,
)
from training.reports.sections import images_path, items_path
from training.steps import Progress
from training.targets.passes import (
    ListComparisons,
    StreamErrors,
    TargetComparison,
    TrainingPasses,
    list_noise_fractions,
)

logger = logging.getLogger(__name__)

WRITE_SECONDS = 3.0  # minimum seconds between two writes


def _not_begun() -> Progress:
    """Return a placeholder for the run's progress, used while memory is predicted."""
    return Progress(0, 0, 0.0)


def start_losses_file(folder: Path, name: str, process: int, session: int, step: int) -> None:
    """Create the loss file of a process, or truncate this run's file to the lines up to `step`.

    Raises OutputError if the file cannot be written.
    """
    path = items_path(folder, name, process)
    continues_file = step > 0 and path.is_file()
    with atomic_path(path) as new, new.open("w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"session": session, "version": VERSION}) + "\n")
        for draw in read_file_draws(path, session) if continues_file else ():
            if draw.step <= step:
                file.write(_as_line(draw))


def append_losses(folder: Path, name: str, process: int, draws: Iterable[ItemDraw]) -> None:
    """Append item losses to the loss file of a process. Raises OutputError if they cannot be written."""
    append_text(items_path(folder, name, process), "".join(map(_as_line, draws)))


def _as_line(draw: ItemDraw) -> str:
    values = draw._asdict() | {"level": float(f"{draw.level:.6g}"), "loss": float(f"{draw.loss:.7g}")}
    return replace_surrogates(json.dumps(values, ensure_ascii=False)) + "\n"


def write_images(folder: Path, name: str, pictures: Mapping[str, ItemImage]) -> None:
    """Write thumbnails of items, by their keys. Raises OutputError if one cannot be written."""
    values = {key: {"name": image.name, "data": image.jpeg_base64} for key, image in pictures.items()}
    write_text(images_path(folder, name), replace_surrogates(json.dumps(values, ensure_ascii=False)) + "\n")


@dataclass(frozen=True)
class UnreadLosses:
    """Losses of a micro-batch that are being copied to the host."""

    step: int
    number: int  # index of the micro-batch in the run
    keys: tuple[str, ...]
    levels: Sequence[float]
    losses: Tensor  # B


@dataclass
class ItemLossRecorder:
    """Record item losses of a run: a context manager that all processes enter; each writes its own file."""

    folder: Path
    name: str
    progress: Progress = field(default_factory=_not_begun)
    now: Callable[[], float] = time.monotonic
    _process_index: int | None = None  # None: nothing is recorded, as when memory is predicted
    _tables: Sequence[DatasetTable] = ()
    _cache_tag: str = ""
    _total_steps: int = 0
    _unread_losses: list[UnreadLosses] = field(default_factory=list)
    _unwritten_losses: list[ItemDraw] = field(default_factory=list)  # read, but not written yet
    _last_write_time: float = 0.0
    _has_images: bool = False
    _num_recorded_batches: int = 0  # number of recorded micro-batches
    _has_failed: bool = False  # whether recording has stopped after an error

    def join_run(self, plan: PlannedRun, records: Sequence[Any]) -> "ItemLossRecorder":
        """Return this recorder with the data of a planned run; a hook for `on.recorders`.

        Raises:
            OptionError: If processes share the transformer or the tokens of a clip.
        """
        if plan.steps.in_lockstep or plan.steps.processes_per_batch > 1:
            raise OptionError(
                "--item_losses: processes that share the transformer or the tokens of a clip run each "
                "other's passes, so losses would be counted several times. Omit it"
            )
        self.progress = plan.progress
        self._tables = plan.config.datasets
        self._cache_tag = plan.family.cache_tag
        self._total_steps = plan.steps.total_steps
        self._process_index = plan.accelerator.process_index
        return self

    def __enter__(self) -> "ItemLossRecorder":
        self._run_or_stop_recording(self._begin)
        self._last_write_time = self.now()
        return self

    def __exit__(self, *_: object) -> None:
        read = functools.partial(self._read_losses_until, self.progress.step)
        self._run_or_stop_recording(read, self._write, self._write_images)
        self._process_index = None
        if not self._num_recorded_batches and self.progress.step > 0 and not self._has_failed:
            logger.warning("--item_losses recorded nothing: this run does not learn one image at a time.")

    def observe(
        self,
        list_comparisons: ListComparisons,
        passes: TrainingPasses,
        noisy_batch: NoisyBatch,
    ) -> list[TargetComparison]:
        """Wrap the error function of the first comparison, with the clip's target, to record item losses."""
        comparisons = list_comparisons(passes, noisy_batch)
        if self._process_index is None:
            return comparisons
        clip, *others = comparisons
        return [replace(clip, measure=functools.partial(self._measure_and_record, clip.measure)), *others]

    def _measure_and_record(
        self,
        measure: Callable[[Tensor, Tensor, NoisyBatch], StreamErrors],
        output: Tensor,
        target: Tensor,
        noisy_batch: NoisyBatch,
    ) -> StreamErrors:
        """Measure the errors of a batch, and record the loss of each item without waiting for the device."""
        errors = measure(output, target, noisy_batch)
        if self._process_index is None or self._has_failed:
            return errors
        image_losses = errors[0].detach()
        if image_losses.is_cuda:
            pinned = empty_pinned(image_losses.shape, image_losses.dtype)
            image_losses = pinned.copy_(image_losses, non_blocking=True)
        step = self.progress.step + 1
        self._num_recorded_batches += 1
        unread_losses = UnreadLosses(
            step=step,
            number=noisy_batch.number,
            keys=noisy_batch.batch.keys,
            levels=list_noise_fractions(noisy_batch),
            losses=image_losses,
        )
        self._unread_losses.append(unread_losses)
        # copies to the host are asynchronous: copies from two steps ago are complete, because the run reads
        # the loss of each step one step later
        self._run_or_stop_recording(functools.partial(self._read_losses_until, step - 2))
        return errors

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Write the item losses up to `step`, whose copies from the device are complete by then."""
        self._run_or_stop_recording(functools.partial(self._read_losses_until, step))
        if step >= self._total_steps:  # before the last page of the run is drawn
            self._run_or_stop_recording(self._write, self._write_images)

    def log_samples(
        self, step: int, files: Mapping[int, Path], strips: Mapping[int, Frame], prompts: Mapping[int, str]
    ) -> None:
        """Do nothing: generated samples have no training loss."""

    def _begin(self) -> None:
        """Start the loss file, keeping lines of earlier steps; raise OutputError if it cannot be written."""
        assert self._process_index is not None
        start_losses_file(
            self.folder,
            self.name,
            process=self._process_index,
            session=self.progress.session_id,
            step=self.progress.step,
        )

    def rewind(self, step: int) -> None:
        """Drop the losses of later steps, to which the run comes again; a hook for `on.rewind`."""
        self._unread_losses.clear()
        self._run_or_stop_recording(self._write, self._begin)

    def _read_losses_until(self, step: int) -> None:
        """Collect the losses up to `step`, now copied to the host; write them to disk from time to time."""
        while self._unread_losses and self._unread_losses[0].step <= step:
            arrived = self._unread_losses.pop(0)
            losses = arrived.losses.tolist()
            for key, level, loss in zip(arrived.keys, arrived.levels, losses, strict=True):
                if math.isfinite(loss):
                    self._unwritten_losses.append(ItemDraw(arrived.step, arrived.number, key, level, loss))
        if self.now() - self._last_write_time >= WRITE_SECONDS:
            self._write()

    def _write(self) -> None:
        """Write the pending lines. Raises OutputError if they cannot be written."""
        draws, self._unwritten_losses = self._unwritten_losses, []
        self._last_write_time = self.now()
        if draws and self._process_index is not None:
            append_losses(self.folder, self.name, self._process_index, draws)

    def _write_images(self) -> None:
        """Write thumbnails of the items shown on the page, once per run and in the first process only."""
        if self._process_index != 0 or self._has_images:
            return
        self._has_images = True
        keys = [item.key for item in select_shown(compare_items(read_draws(self.folder, self.name)))]
        images: dict[str, ItemImage] = {}
        for table in self._tables:
            images |= make_thumbnails(table, self._cache_tag, keys)
        write_images(self.folder, self.name, images)

    def _run_or_stop_recording(self, *works: Callable[[], None]) -> None:
        """Run these functions; if one fails, log a warning and stop recording."""
        if self._has_failed:
            return
        try:
            for work in works:
                work()
        except Exception as error:  # an error of a disk or device must not end the training
            self._has_failed = True
            self._unread_losses.clear()
            logger.warning("--item_losses stops recording, but the training continues: %s", error)


def make_thumbnails(table: DatasetTable, cache_tag: str, keys: Sequence[str]) -> dict[str, ItemImage]:
    """Return thumbnails of items of a dataset table by key, without those whose image cannot be read.

    Args:
        table: The dataset table.
        cache_tag: The family's tag in names of cache files.
        keys: Keys of the items, which are the names of their cache files; items of other tables are ignored.
    """
    # Group item keys by the stem of their source file: the clips of one video have several keys
    keys_by_stem: dict[str, list[str]] = {}
    for key in keys:
        name = parse_latent_name(f"{key}{SUFFIX}", cache_tag, table.kind)
        if name is not None:
            keys_by_stem.setdefault(name.stem, []).append(key)
    if not keys_by_stem or table.source.is_audio_only:
        return {}
    ignored_faults: list[Fault] = []
    sources: list[MediaSource] = []
    with contextlib.suppress(UserError):  # a training run from caches may have no images
        sources = find_sources(table, captions=False, faults=ignored_faults)
    thumbnails: dict[str, ItemImage] = {}
    for source in sources:
        if source.stem in keys_by_stem:
            with contextlib.suppress(UserError, OSError, StopIteration):
                thumbnail = ItemImage.of(source.path.name, _read_first_frame(source))
                thumbnails |= dict.fromkeys(keys_by_stem[source.stem], thumbnail)
    return thumbnails


def _read_first_frame(source: MediaSource) -> Frame:
    """Return an image, or the first frame of a clip, H W 3. Nothing is downloaded."""
    if any(isinstance(origin, Remote) for origin in source.remote_or_packed[:1]) and not source.path.exists():
        raise MediaError(f"{source.path} is not downloaded")
    media_only = replace(source, control=(), mask=None, remote_or_packed=source.remote_or_packed[:1])
    with fetch(media_only) as fetched:
        if source.table.kind == "image":
            return read_image(fetched.path)
        return next(video_frames(fetched.path))

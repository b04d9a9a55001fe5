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
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dataset.cache_files import SUFFIX, parse_latent_name
from dataset.listing import find_sources
from dataset.sources.fetching import fetch
from dataset.sources.media_source import Fault, MediaSource, Remote
from dataset.table import DatasetTable
from modules.atomic_write import append_text, atomic_path, make_storable, write_text
from modules.devices import empty_pinned
from modules.errors import MediaError, OptionError, UserError
from modules.media.reading import Frame, read_image, video_frames
from training.reports.item_losses import (
    VERSION,
    ItemDraw,
    ItemImage,
    compare_items,
    read_draws,
    read_draws_of_file,
    select_shown,
)
from training.reports.sections import images_path, items_path
from training.steps import Progress
from training.targets.passes import Streams, TargetComparison, TrainingPasses, levels_of

if TYPE_CHECKING:
    from training.features.hooks import PlannedRun
    from training.loss import NoisyBatch

logger = logging.getLogger(__name__)

WRITE_SECONDS = 3.0  # minimum seconds between two writes


def _not_begun() -> Progress:
    """Return a placeholder progress, for predictions of memory."""
    return Progress(0, 0, 0.0)


def keep_draws(folder: Path, name: str, process: int, session: int, step: int) -> None:
    """Create the loss file of a process, or truncate this run's file to the lines up to `step`.

    Raises OutputError if the file cannot be written.
    """
    own = items_path(folder, name, process)
    with atomic_path(own) as new, new.open("w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"session": session, "version": VERSION}) + "\n")
        for draw in read_draws_of_file(own, session) if step and own.is_file() else ():
            if draw.step <= step:
                file.write(_as_line(draw))


def append_draws(folder: Path, name: str, process: int, draws: Iterable[ItemDraw]) -> None:
    """Add lines to the file of a process. Raises OutputError if they cannot be written."""
    append_text(items_path(folder, name, process), "".join(map(_as_line, draws)))


def _as_line(draw: ItemDraw) -> str:
    values = draw._asdict() | {"level": float(f"{draw.level:.6g}"), "loss": float(f"{draw.loss:.7g}")}
    return make_storable(json.dumps(values, ensure_ascii=False)) + "\n"


def write_images(folder: Path, name: str, pictures: Mapping[str, ItemImage]) -> None:
    """Write thumbnails of items, by their keys. Raises OutputError if one cannot be written."""
    values = {key: {"name": image.name, "data": image.data} for key, image in pictures.items()}
    write_text(images_path(folder, name), make_storable(json.dumps(values, ensure_ascii=False)) + "\n")


@dataclass(frozen=True)
class ArrivingLosses:
    """Losses of a micro-batch that are being copied to the host."""

    step: int
    number: int  # index of the micro-batch in the run
    keys: tuple[str, ...]
    levels: Sequence[float]
    losses: Tensor  # B


@dataclass
class ItemLossRecorder:
    """Record item losses of a run; a context manager in every process, which writes its own file."""

    folder: Path
    name: str
    progress: Progress = field(default_factory=_not_begun)
    now: Callable[[], float] = time.monotonic
    _process: int | None = None  # None: not in a run, such as when memory is predicted
    _tables: Sequence[DatasetTable] = ()
    _tag: str = ""
    _total_steps: int = 0
    _waiting: list[ArrivingLosses] = field(default_factory=list)
    _draws: list[ItemDraw] = field(default_factory=list)  # read, but not written yet
    _written: float = 0.0
    _has_images: bool = False
    _count: int = 0  # number of recorded micro-batches
    _is_lost: bool = False  # whether recording has stopped after an error

    def join_run(self, plan: "PlannedRun", records: Sequence[Any]) -> "ItemLossRecorder":
        """Take the data that recording needs from the plan of a run, and return this recorder for its logs.

        Raises:
            OptionError: If processes share the transformer or the tokens of a clip.
        """
        if plan.steps.in_lockstep or plan.steps.peers > 1:
            raise OptionError(
                "--item_losses: processes that share the transformer or the tokens of a clip run passes for "
                "each other, so that losses would count several times. Leave it out"
            )
        self.progress = plan.progress
        self._tables = plan.config.datasets
        self._tag = plan.family.cache_tag
        self._total_steps = plan.steps.total_steps
        self._process = plan.accelerator.process_index
        return self

    def __enter__(self) -> "ItemLossRecorder":
        self._attempt(self._begin)
        self._written = self.now()
        return self

    def __exit__(self, *_: object) -> None:
        read = functools.partial(self._advance, self.progress.step)
        self._attempt(read, self._write, self._write_images)
        self._process = None
        if not self._count and self.progress.step > 0 and not self._is_lost:
            logger.warning(
                "--item_losses recorded nothing: what this run learns is not one picture at a time."
            )

    def observe(
        self, passes: TrainingPasses, noisy_batch: "NoisyBatch", comparisons: list[TargetComparison]
    ) -> list[TargetComparison]:
        """Make the first comparison, which compares with the clip, record its errors."""
        if self._process is None:
            return comparisons
        clip, *others = comparisons
        return [replace(clip, measure=functools.partial(self._measure, clip.measure)), *others]

    def _measure(
        self,
        measure: Callable[[Tensor, Tensor, "NoisyBatch"], Streams],
        output: Tensor,
        target: Tensor,
        noisy_batch: "NoisyBatch",
    ) -> Streams:
        """Measure the errors of a batch, and record the loss of each item without waiting for the device."""
        errors = measure(output, target, noisy_batch)
        if self._process is None or self._is_lost:
            return errors
        losses = errors[0].detach()  # of images; the loss of sound, if any, is not recorded
        if losses.is_cuda:
            losses = empty_pinned(losses.shape, losses.dtype).copy_(losses, non_blocking=True)
        keys, levels = noisy_batch.batch.keys, levels_of(noisy_batch)
        step = self.progress.step + 1
        self._count += 1
        self._waiting.append(ArrivingLosses(step, noisy_batch.number, keys, levels=levels, losses=losses))
        # the run reads the values of each step one step later, so those of two steps ago are on the host
        self._attempt(functools.partial(self._advance, step - 2))
        return errors

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Write the item losses up to `step`, whose copies from the device are complete by then."""
        self._attempt(functools.partial(self._advance, step))
        if step >= self._total_steps:  # before the last page of the run is drawn
            self._attempt(self._write, self._write_images)

    def log_samples(
        self, step: int, files: Mapping[int, Path], strips: Mapping[int, Frame], prompts: Mapping[int, str]
    ) -> None:
        """Do nothing: samples have no loss."""

    def _begin(self) -> None:
        """Start the file, with the lines of earlier steps; raise OutputError if it cannot be written."""
        assert self._process is not None
        keep_draws(
            self.folder,
            self.name,
            process=self._process,
            session=self.progress.session_id,
            step=self.progress.step,
        )

    def _advance(self, step: int) -> None:
        """Take the losses up to `step`, which have reached the host; write the lines from time to time."""
        while self._waiting and self._waiting[0].step <= step:
            waiting = self._waiting.pop(0)
            losses = waiting.losses.tolist()
            for key, level, loss in zip(waiting.keys, waiting.levels, losses, strict=True):
                if math.isfinite(loss):
                    self._draws.append(ItemDraw(waiting.step, waiting.number, key, level, loss))
        if self.now() - self._written >= WRITE_SECONDS:
            self._write()

    def _write(self) -> None:
        """Write the waiting lines. Raises OutputError if they cannot be written."""
        draws, self._draws = self._draws, []
        self._written = self.now()
        if draws and self._process is not None:
            append_draws(self.folder, self.name, self._process, draws)

    def _write_images(self) -> None:
        """Write thumbnails of the items shown on the page, once per run and in the first process only."""
        if self._process != 0 or self._has_images:
            return
        self._has_images = True
        keys = [item.key for item in select_shown(compare_items(read_draws(self.folder, self.name)))]
        images: dict[str, ItemImage] = {}
        for table in self._tables:
            images |= _draw_items(table, self._tag, keys)
        write_images(self.folder, self.name, images)

    def _attempt(self, *works: Callable[[], None]) -> None:
        """Run these functions; if one fails, log a warning and stop recording."""
        if self._is_lost:
            return
        try:
            for work in works:
                work()
        except Exception as error:  # an error of a disk or device must not end the training
            self._is_lost = True
            self._waiting.clear()
            logger.warning("--item_losses records no more, the training continues: %s", error)


def _draw_items(table: DatasetTable, tag: str, keys: Sequence[str]) -> dict[str, ItemImage]:
    """Return thumbnails of the items of a table, by their keys, for those that can be read."""
    # an item's key is the name of its cache; items of one source, such as clips of a video, share its stem
    by_stem: dict[str, list[str]] = {}
    for key in keys:
        name = parse_latent_name(f"{key}{SUFFIX}", tag, table.kind)
        if name is not None:
            by_stem.setdefault(name.stem, []).append(key)
    if not by_stem or table.is_of_audio:
        return {}
    errors: list[Fault] = []
    sources: list[MediaSource] = []
    with contextlib.suppress(UserError):  # a training run from caches may have no images
        sources = find_sources(table, captions=False, faults=errors)
    images: dict[str, ItemImage] = {}
    for source in sources:
        if source.stem in by_stem:
            with contextlib.suppress(UserError, OSError, StopIteration):
                image = ItemImage.of(source.path.name, _read_first_frame(source))
                images |= dict.fromkeys(by_stem[source.stem], image)
    return images


def _read_first_frame(source: MediaSource) -> Frame:
    """Return an image, or the first frame of a clip, H W 3. Nothing is downloaded.

    Raises MediaError or OSError if it cannot be read.
    """
    if any(isinstance(origin, Remote) for origin in source.remote_or_packed[:1]) and not source.path.exists():
        raise MediaError(f"{source.path} is not downloaded")
    alone = replace(source, control=(), mask=None, remote_or_packed=source.remote_or_packed[:1])
    with fetch(alone) as fetched:
        if source.table.kind == "image":
            return read_image(fetched.path)
        return next(video_frames(fetched.path))

"""Make what saves a run: files with their metadata, averages, states, and the model card."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset.batches.items import Items, TrainingItem
from modules.devices import DTYPES
from modules.offload.block_swap import settle_all
from training.averages import metadata_of
from training.dressing import dtype_of
from training.experts import expert_metadata
from training.job import Data, TrainingJob
from training.metadata import PictureCount, RunFacts, file_metadata, model_card, run_metadata
from training.optimizers.finished_weights import finished_weights
from training.optimizers.lr_schedule import warmup_steps
from training.options import TrainingOptions
from training.resuming import Learning, own_values
from training.saving.files import Publish, Saver
from training.saving.states import SavedState, write_state


def make_saver(
    job: TrainingJob,
    dits: Sequence[nn.Module],
    learning: Learning,
    facts: RunFacts,
    publish: Callable[[Path, str | None], None],
    publish_state: Publish,
    take_state: Callable[[], SavedState],
    prompts: Sequence[str],
) -> Saver | None:
    """Make the saver in the main process; the others save nothing.

    publish: is given the file and the model card. prompts: of the samples, for the card.
    """
    if not job.accelerator.is_main_process:
        return None
    options, progress, trainable = job.options, job.progress, learning.trainable
    run_values = run_metadata(
        options,
        job.family.name,
        job.family.metadata,
        facts,
        own_values(job.family.options, "identity", "habit"),
    )
    dtype = file_dtype(options, dits[0])
    parts = list(trainable.writes)

    def metadata_now(part: str) -> dict[str, str]:
        epoch = progress.epoch + (progress.position > 0 or progress.step == 0)
        licence = job.family.release.licence
        own = run_values | expert_metadata(job.family, options, part)
        return file_metadata(own, options, job.family.metadata, progress.step, epoch, datetime.now(), licence)

    def write_file(part: str, path: Path) -> None:
        settle_all(dits)
        with finished_weights(learning.optimizer, trainable.parameters):
            trainable.writes[part](path, dtype, metadata_now(part))

    def write_average(part: str, path: Path) -> None:
        assert learning.average is not None
        with learning.average.in_place():
            own = {} if options.metadata.no_metadata else metadata_of(learning.average)
            trainable.writes[part](path, dtype, {**metadata_now(part), **own})

    card = model_card(options, job.family.release, metadata_now(parts[0]), prompts)
    saver = Saver(
        options.saving,
        job.names,
        {part: partial(write_file, part) for part in parts},
        lambda folder: write_state(folder, take_state()),
        lambda path: publish(path, card),
        publish_state,
        {} if learning.average is None else {part: partial(write_average, part) for part in parts},
    )
    saver.remove_leftovers()
    saver.tidy_steps(progress.step)  # what a run that was killed had no time for
    saver.tidy_epochs(progress.epoch)
    return saver


def facts_of_run(job: TrainingJob, data: Data, optimizer: str, schedule: str) -> RunFacts:
    progress, plan = job.progress, data.plan
    return RunFacts(
        session_id=progress.session_id,
        started_at=progress.started_at,
        seed=progress.seed,
        num_items=data.order.num_items,
        batches_per_epoch=plan.num_batches,
        num_epochs=plan.num_epochs,
        total_steps=plan.total_steps,
        warmup_steps=warmup_steps(job.options.lr_schedule, plan.total_steps),
        optimizer=optimizer,
        lr_scheduler=schedule,
        network_module=job.network_module,
        num_validation=len(data.validation),
        pictures=count_pictures(data.training) if job.options.is_for_images else (),
        datasets=[table.describe() for table in data.config.datasets],
        changes=tuple(progress.changes),
    )


def count_pictures(items: Iterable[TrainingItem]) -> list[PictureCount]:
    """Return how many pictures there are by folder and size. None is read."""
    columns = Items.of(items)
    counts = np.bincount(columns.numbers, minlength=len(columns.facts)).tolist()
    return [
        PictureCount(
            facts.table.source.name,
            (facts.bucket[0], facts.bucket[1]),
            count,
            facts.table.num_repeats,
            facts.table.is_reg,
        )
        for facts, count in zip(columns.facts, counts, strict=True)
        if count
    ]


def file_dtype(options: TrainingOptions, dit: nn.Module) -> torch.dtype | None:
    """Return the dtype of saved models; None: every tensor as it is."""
    precision = options.saving.save_precision
    if precision is not None:
        return DTYPES[precision]
    return None if options.network is None else dtype_of(dit)

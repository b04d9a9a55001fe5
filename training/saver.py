"""Make the saver of a run: files with their metadata, averages, states, and the model card."""

from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset.batches.items import Items, TrainingItem
from modules.devices import DTYPES
from modules.offload.block_swap import settle_all
from training.dressing import dtype_of
from training.experts import expert_metadata
from training.metadata import PictureCount, RunFacts, file_metadata, model_card, run_metadata
from training.optimizers.finished_weights import finished_weights
from training.optimizers.lr_schedule import warmup_steps
from training.options import TrainingOptions
from training.restoring import take_state
from training.resuming import own_values
from training.saving.files import NoSaver, Publish, Saver
from training.saving.states import write_state
from training.training_run import TrainingRun


def make_saver(
    run: TrainingRun, publish: Callable[[Path, str | None], None], publish_state: Publish
) -> Saver | NoSaver:
    """Make the saver in the main process; the others save nothing.

    publish: is given the file and the model card.
    """
    plan, options, progress, trainable = run.plan, run.options, run.progress, run.trainable
    if not plan.accelerator.is_main_process:
        return NoSaver()
    family = plan.family
    own_options = own_values(family.options, "identity", "habit")
    run_values = run_metadata(options, family.name, family.metadata, facts_of_run(run), own_options)
    dtype = file_dtype(options, run.dits.networks[0])
    parts = list(trainable.writes)

    def metadata_now(part: str) -> dict[str, str]:
        epoch = progress.epoch + (progress.position > 0 or progress.step == 0)
        own = run_values | expert_metadata(family, options, part)
        licence = family.release.licence
        return file_metadata(own, options, family.metadata, progress.step, epoch, datetime.now(), licence)

    def write_file(part: str, path: Path) -> None:
        settle_all(run.dits.networks)
        with finished_weights(run.optimizer, trainable.parameters):
            trainable.writes[part](path, dtype, metadata_now(part))

    def write_average(part: str, path: Path) -> None:
        with run.average.in_place():
            own = {} if options.metadata.no_metadata else run.average.metadata
            trainable.writes[part](path, dtype, {**metadata_now(part), **own})

    card = model_card(options, family.release, metadata_now(parts[0]), run.sampler.prompts)
    saver = Saver(
        options.saving,
        plan.names,
        {part: partial(write_file, part) for part in parts},
        lambda folder: write_state(folder, take_state(run)),
        lambda path: publish(path, card),
        publish_state,
        {part: partial(write_average, part) for part in parts} if run.average.tensors() else {},
    )
    saver.remove_leftovers()
    saver.tidy_steps(progress.step)  # what a run that was killed had no time for
    saver.tidy_epochs(progress.epoch)
    return saver


def facts_of_run(run: TrainingRun) -> RunFacts:
    plan, progress, steps = run.plan, run.progress, run.steps
    return RunFacts(
        session_id=progress.session_id,
        started_at=progress.started_at,
        seed=progress.seed,
        num_items=plan.order.num_items,
        batches_per_epoch=steps.num_batches,
        num_epochs=steps.num_epochs,
        total_steps=steps.total_steps,
        warmup_steps=warmup_steps(plan.options.lr_schedule, steps.total_steps),
        optimizer=run.optimizer_name,
        lr_scheduler=run.schedule.name,
        network_module=plan.network_module,
        num_validation=len(plan.validation),
        pictures=count_pictures(plan.training) if plan.options.is_for_images else (),
        datasets=[table.describe() for table in plan.config.datasets],
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

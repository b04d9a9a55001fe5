"""Make what saves a run: files with their metadata, averages, states, and the model card."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from modules.devices import DTYPES
from modules.offload.block_swap import settle
from training.averages import metadata_of
from training.dressing import dtype_of
from training.job import Data, TrainingJob
from training.metadata import RunFacts, file_metadata, model_card, run_metadata
from training.optimizers.finished_weights import finished_weights
from training.optimizers.lr_schedule import warmup_steps
from training.options import TrainingOptions
from training.resuming import Learning, own_values
from training.saving.files import Names, Publish, Saver
from training.saving.states import SavedState, write_state


def make_saver(
    job: TrainingJob,
    dit: nn.Module,
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
    dtype = file_dtype(options, dit)

    def metadata_now() -> dict[str, str]:
        epoch = progress.epoch + (progress.position > 0 or progress.step == 0)
        licence = job.family.release.licence
        return file_metadata(
            run_values, options, job.family.metadata, progress.step, epoch, datetime.now(), licence
        )

    def write_file(path: Path) -> None:
        settle(dit)
        with finished_weights(learning.optimizer, trainable.parameters):
            trainable.write(path, dtype, metadata_now())

    def write_average(path: Path) -> None:
        assert learning.average is not None
        with learning.average.in_place():
            own = {} if options.metadata.no_metadata else metadata_of(learning.average)
            trainable.write(path, dtype, {**metadata_now(), **own})

    card = model_card(options, job.family.release, metadata_now(), prompts)
    saver = Saver(
        options.saving,
        Names(job.output_dir, job.output_name),
        write_file,
        lambda folder: write_state(folder, take_state()),
        lambda path: publish(path, card),
        publish_state,
        None if learning.average is None else write_average,
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
        datasets=[table.describe() for table in data.config.datasets],
        changes=tuple(progress.changes),
    )


def file_dtype(options: TrainingOptions, dit: nn.Module) -> torch.dtype | None:
    """Return the dtype of saved models; None: every tensor as it is."""
    precision = options.saving.save_precision
    if precision is not None:
        return DTYPES[precision]
    return None if options.network is None else dtype_of(dit)

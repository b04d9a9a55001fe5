"""Options of the training run: data, length, beginning, seed, accumulation, checkpointing, validation."""

import argparse
import functools
import logging
from pathlib import Path

from dataset.options import CheckPageOptions
from generation.prompt_lines import text_to_seed
from modules.options import HABIT, Options, not_needed, option

logger = logging.getLogger(__name__)

LEAST_STEPS = 50  # between validations, if no option says how often
MOST_STEPS = 100_000_000  # a year at three steps a second
TOO_LARGE_A_SEED = 2**64


@functools.cache  # options are parsed more than once, and the seed of a text is logged once
def read_seed(text: str) -> int:
    """Return the number of --seed: itself, or that of a text, as generation scripts have it.

    Raises ArgumentTypeError for a number that is longer than any seed.
    """
    try:
        seed = text_to_seed(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if str(seed) != text.strip():
        logger.info("Seed of the text %r: --seed %d", text, seed)
    return seed


class LoopOptions(Options, title="training run"):
    """Length and data of a training. `dataset_config` is None only with --show_timesteps."""

    dataset_config: Path | None = option("TOML file that describes the data sets", type=Path, often=True)
    max_train_steps: int = option(
        "optimizer steps in total; a resumed run continues the count",
        default=1600,
        least=1,
        most=MOST_STEPS,
        often=True,
    )
    max_train_epochs: int | None = option(
        "passes over the data; replaces --max_train_steps", least=1, most=MOST_STEPS, often=True
    )
    max_data_loader_n_workers: int = option(
        "readers of cache files, at most the number of CPUs; 0: none",
        default=8,
        least=0,
        most=1024,
        hint="0 reads in the training process itself, 8 is usual",
    )
    persistent_data_loader_workers: bool = option("keep the readers from one epoch to the next")
    seed: int | None = option(
        "seed of data order, noise, timesteps, dropout and LoRA weights, a number or any text; random "
        "when not given",
        type=read_seed,
        least=0,
        below=TOO_LARGE_A_SEED,
        hint="leave it out for a random seed",
        often=True,
    )
    gradient_checkpointing: bool = option(
        "recompute activations block by block: less memory, slower", often=True
    )
    gradient_checkpointing_cpu_offload: bool = option(
        "least memory: keep the inputs of the blocks in host memory until the backward pass, and "
        "compute feed-forwards for a few thousand tokens at a time (not with --network_dropout); needs "
        "--gradient_checkpointing and host memory for one copy of the video tokens per block",
        needs="gradient_checkpointing",
    )
    gradient_checkpointing_keep: str | None = option(
        "attention: keep the result of self-attention instead of computing it again: faster; needs "
        "--gradient_checkpointing and memory for one more copy of the video tokens per block, in the compute "
        "dtype",
        choices=("attention",),
        needs="gradient_checkpointing",
    )
    gradient_accumulation_steps: int = option(
        "micro-batches per optimizer step and process",
        default=1,
        least=1,
        most=1_000_000,
        hint="1 means no accumulation, 1 to 16 are usual",
    )
    embedded_guidance: float = option(
        "embedded guidance fed to guidance-distilled models; other models have no such input",
        default=1.0,
        name="guidance_scale",
        least=0,
        most=1000,
        hint="1 is usual for training",
        facts=HABIT,
    )
    check: bool = option("print items, buckets, batches and what is missing, then exit")
    page: CheckPageOptions

    def __post_init__(self) -> None:
        self.page.require_check(self.check)


class StartOptions(Options, title="beginning later"):
    """Where the run begins without a saved state. The data and noise of the steps before are left out."""

    initial_epoch: int | None = option(
        "begin at this epoch, from 1, as with --network_weights from a run that ended before it; "
        "without the optimizer's state, which --resume has",
        least=1,
        excludes="initial_step",
    )
    initial_step: int | None = option("begin after so many steps, likewise", least=0)
    skip_until_initial_step = not_needed("the data before the initial step are always left out.")

    @property
    def is_given(self) -> bool:
        """Return whether the run does not begin at its first step."""
        return self.initial_epoch is not None or self.initial_step is not None


class ValidationOptions(Options, title="validation"):
    """Options of the loss on held-out items, at fixed noise and timesteps."""

    validation_split: float = option(
        "share of the source files kept out of training for a validation loss",
        default=0.0,
        least=0,
        below=1,
        hint="some must be left for training",
    )
    validate_every_n_steps: int | None = option(
        "how often to compute the validation loss; after each epoch when not given, or about every 50 "
        "steps if epochs are shorter",
        least=1,
    )
    validate_every_n_epochs: int | None = option("compute it after every so many epochs, too", least=1)
    max_validation_steps: int | None = option(
        "most batches of each validation; all when not given", least=1, hint="leave it out for all batches"
    )
    validation_seed: int | None = option(
        "another choice of source files and another noise; the same for all runs when not given",
        least=0,
        below=TOO_LARGE_A_SEED,
        hint="leave it out for the usual choice",
    )

    def is_due_after_epoch(self, epoch: int, step: int, steps: int, is_saved: bool) -> bool:
        """Return whether to validate at the end of an epoch of so many steps, at `step`.

        Without options: after each epoch that leaves a file; of the others after those that pass a multiple
        of 50 steps, as a few batches do not repay a validation.
        """
        if self.validate_every_n_epochs is not None:
            return epoch % self.validate_every_n_epochs == 0
        has_passed = step // LEAST_STEPS > (step - steps) // LEAST_STEPS
        return self.validate_every_n_steps is None and (is_saved or has_passed)

"""Options of the training run: data, length, seed, gradient accumulation and checkpointing, validation."""

import argparse
import functools
import logging
from dataclasses import dataclass, field
from pathlib import Path

from dataset.options import CheckPageOptions, add_page_arguments
from generation.prompt_lines import text_to_seed
from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most, check_below, check_seed
from modules.options import HABIT

logger = logging.getLogger(__name__)

LEAST_STEPS = 50  # between validations, if no option says how often
MOST_STEPS = 100_000_000  # a year at three steps a second
MOST_READERS = 1024
MOST_ACCUMULATED = 1_000_000
MOST_GUIDANCE = 1000  # beyond it the model has seen nothing


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


@dataclass(frozen=True)
class LoopOptions:
    """How long and on what to train. `dataset_config` is None only with --show_timesteps."""

    dataset_config: Path | None
    max_train_steps: int  # optimizer steps in total, also after a resume
    max_train_epochs: int | None  # replaces max_train_steps
    max_data_loader_n_workers: int
    persistent_data_loader_workers: bool
    seed: int | None  # None: random below 2^32
    gradient_checkpointing: bool
    gradient_checkpointing_cpu_offload: bool  # what blocks keep is moved to host memory
    # "attention": kept beside the blocks' inputs rather than computed again
    gradient_checkpointing_keep: str | None
    gradient_accumulation_steps: int  # micro-batches per optimizer step and process
    embedded_guidance: float = field(metadata={"option": "guidance_scale", **HABIT})
    check: bool  # print what would be trained on, then exit
    page: CheckPageOptions

    def __post_init__(self) -> None:
        self.page.require_check(self.check)
        check_at_least("--max_train_steps", self.max_train_steps, 1, "how many optimizer steps to train")
        check_at_least(
            "--max_train_epochs", self.max_train_epochs, 1, "how many times to go through the data"
        )
        check_at_most("--max_train_steps", self.max_train_steps, MOST_STEPS, "how many steps to train")
        check_at_most("--max_train_epochs", self.max_train_epochs, MOST_STEPS, "use fewer passes")
        check_at_least(
            "--max_data_loader_n_workers",
            self.max_data_loader_n_workers,
            0,
            "0 reads in the training process itself",
        )
        workers, accumulation = self.max_data_loader_n_workers, self.gradient_accumulation_steps
        check_at_most("--max_data_loader_n_workers", workers, MOST_READERS, "8 is usual")
        check_at_most("--gradient_accumulation_steps", accumulation, MOST_ACCUMULATED, "1 to 16 are usual")
        check_at_least("--guidance_scale", self.embedded_guidance, 0, "1 is usual for training")
        check_at_most("--guidance_scale", self.embedded_guidance, MOST_GUIDANCE, "1 is usual for training")
        self._check_checkpointing()
        check_at_least(
            "--gradient_accumulation_steps", self.gradient_accumulation_steps, 1, "1 means no accumulation"
        )
        check_at_least("--seed", self.seed, 0, "leave it out for a random seed")
        check_seed("--seed", self.seed)

    def _check_checkpointing(self) -> None:
        given = {
            "cpu_offload": self.gradient_checkpointing_cpu_offload,
            "keep": self.gradient_checkpointing_keep is not None,
        }
        for name, is_given in given.items():
            if is_given and not self.gradient_checkpointing:
                raise OptionError(
                    f"--gradient_checkpointing_{name} says how to checkpoint: add --gradient_checkpointing"
                )


@dataclass(frozen=True)
class ValidationOptions:
    """Options of the loss on held-out items, at fixed noise and timesteps."""

    validation_split: float  # share of the source files, 0 up to but not including 1
    validate_every_n_steps: int | None
    validate_every_n_epochs: int | None  # both None: see `is_due_after_epoch`
    max_validation_steps: int | None  # batches of each validation; None: all
    validation_seed: int | None  # of the choice of the source files and of noise; None: that of the program

    def __post_init__(self) -> None:
        check_at_least(
            "--validation_split", self.validation_split, 0, "the share of source files kept for validation"
        )
        check_below(
            "--validation_split", self.validation_split, 1, "some source files must be left for training"
        )
        check_at_least(
            "--validate_every_n_steps",
            self.validate_every_n_steps,
            1,
            "leave it out to validate after each epoch of at least 50 steps",
        )
        for name in ("validate_every_n_epochs", "max_validation_steps"):
            check_at_least(f"--{name}", getattr(self, name), 1, "leave it out for each epoch and all batches")
        check_at_least("--validation_seed", self.validation_seed, 0, "leave it out for the usual choice")
        check_seed("--validation_seed", self.validation_seed)

    def is_due_after_epoch(self, epoch: int, step: int, steps: int, is_saved: bool) -> bool:
        """Return whether to validate at the end of an epoch of so many steps, at `step`.

        Without options: after each epoch that leaves a file; of the others after those that pass a multiple
        of 50 steps, as a few batches do not repay a validation.
        """
        if self.validate_every_n_epochs is not None:
            return epoch % self.validate_every_n_epochs == 0
        has_passed = step // LEAST_STEPS > (step - steps) // LEAST_STEPS
        return self.validate_every_n_steps is None and (is_saved or has_passed)


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `LoopOptions` and `ValidationOptions`."""
    group = parser.add_argument_group("training run")
    group.add_argument("--dataset_config", type=Path, help="TOML file that describes the data sets")
    group.add_argument(
        "--max_train_steps",
        type=int,
        default=1600,
        help="optimizer steps in total; a resumed run continues the count",
    )
    group.add_argument(
        "--max_train_epochs", type=int, help="passes over the data; replaces --max_train_steps"
    )
    group.add_argument(
        "--max_data_loader_n_workers",
        type=int,
        default=8,
        help="readers of cache files, at most the number of CPUs; 0: none",
    )
    group.add_argument(
        "--persistent_data_loader_workers",
        action="store_true",
        help="keep the readers from one epoch to the next",
    )
    group.add_argument(
        "--seed",
        type=read_seed,
        help="seed of data order, noise, timesteps, dropout and LoRA weights, a number or any text; random "
        "when not given",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations block by block: less memory, slower",
    )
    group.add_argument(
        "--gradient_checkpointing_cpu_offload",
        action="store_true",
        help="least memory: keep the inputs of the blocks in host memory until the backward pass, and "
        "compute feed-forwards for a few thousand tokens at a time (not with --network_dropout); needs "
        "--gradient_checkpointing and host memory for one copy of the video tokens per block",
    )
    group.add_argument(
        "--gradient_checkpointing_keep",
        choices=("attention",),
        help="attention: keep the result of self-attention instead of computing it again: faster; needs "
        "--gradient_checkpointing and memory for one more copy of the video tokens per block, in the compute "
        "dtype",
    )
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimizer step"
    )
    group.add_argument(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="embedded guidance fed to guidance-distilled models; other models have no such input",
    )
    group.add_argument(
        "--check", action="store_true", help="print items, buckets, batches and what is missing, then exit"
    )
    add_page_arguments(group)
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_split",
        type=float,
        default=0.0,
        help="share of the source files kept out of training for a validation loss",
    )
    group.add_argument(
        "--validate_every_n_steps",
        type=int,
        help="how often to compute the validation loss; after each epoch when not given, or about every 50 "
        "steps if epochs are shorter",
    )
    group.add_argument(
        "--validate_every_n_epochs", type=int, help="compute it after every so many epochs, too"
    )
    group.add_argument(
        "--max_validation_steps", type=int, help="most batches of each validation; all when not given"
    )
    group.add_argument(
        "--validation_seed",
        type=int,
        help="another choice of source files and another noise; the same for all runs when not given",
    )

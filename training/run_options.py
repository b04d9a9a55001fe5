"""Options of a training run: data, length, beginning, validation, samples, logs, precision and processes."""

import argparse
import functools
import logging
from pathlib import Path

from blissful_tuner.options import PreviewOptions
from dataset.options import DATASET_FILE, CheckPageOptions
from modules.errors import OptionError
from modules.option_values import text_to_seed
from modules.options import FREE, HABIT, SAMPLES_ONLY, Options, not_needed, option
from networks.multipliers import files_with_multipliers

logger = logging.getLogger(__name__)

MIN_STEPS = 50  # steps between validations if no option sets them
MAX_STEPS = 100_000_000  # a year at three steps a second
TOO_LARGE_A_SEED = 2**64


@functools.cache  # options are parsed more than once, and the seed of a text is logged once
def read_seed(text: str) -> int:
    """Parse --seed: a number, or any other text, which is hashed as in the generation scripts.

    Raises:
        ArgumentTypeError: If the number is longer than any seed.
    """
    try:
        seed = text_to_seed(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if str(seed) != text.strip():
        logger.info("Seed of the text %r: --seed %d", text, seed)
    return seed


class LoopOptions(Options, title="training run"):
    """Length and data of a training run. `dataset_config` is None only for commands without data."""

    key_files = (DATASET_FILE,)

    dataset_config: Path | None = option("TOML file that describes the datasets", type=Path, often=True)
    max_train_steps: int = option(
        "optimizer steps in total; a resumed run continues the count",
        default=1600,
        minimum=1,
        maximum=MAX_STEPS,
        often=True,
    )
    max_train_epochs: int | None = option(
        "passes over the data; replaces --max_train_steps", minimum=1, maximum=MAX_STEPS, often=True
    )
    max_data_loader_n_workers: int = option(
        "number of workers that read cache files, at most the number of CPUs; 0: none",
        default=8,
        minimum=0,
        maximum=1024,
        hint="0 reads in the training process itself, 8 is usual",
    )
    persistent_data_loader_workers = not_needed(
        "readers of short epochs are always kept.", "keep the readers from one epoch to the next"
    )
    seed: int | None = option(
        "seed for data order, noise, timesteps, dropout and LoRA weights, a number or any text; "
        "random by default",
        type=read_seed,
        minimum=0,
        below=TOO_LARGE_A_SEED,
        hint="omit it for a random seed",
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
        minimum=1,
        maximum=1_000_000,
        hint="1 means no accumulation, 1 to 16 are usual",
    )
    embedded_guidance: float = option(
        "embedded guidance fed to guidance-distilled models; other models have no such input",
        default=1.0,
        name="guidance_scale",
        minimum=0,
        maximum=1000,
        hint="1 is usual for training",
        facts=HABIT,
    )
    check: bool = option("print items, buckets, batches and what is missing, then exit")
    page: CheckPageOptions

    def __post_init__(self) -> None:
        if self.page.html is not None:
            self.page.require_check(self.check)

    @property
    def known_steps(self) -> int | None:
        """Return the number of optimizer steps; None with --max_train_epochs, as it depends on the data."""
        return self.max_train_steps if self.max_train_epochs is None else None


class StartOptions(Options, title="beginning later"):
    """Step or epoch at which a run without a saved state starts; earlier data and noise are skipped."""

    initial_epoch: int | None = option(
        "begin at this epoch, counted from 1, for example with --network_weights from a run that ended "
        "before it; the optimizer's state is not restored (--resume does)",
        minimum=1,
        excludes="initial_step",
    )
    initial_step: int | None = option("the same, but skip this many steps", minimum=0)
    skip_until_initial_step = not_needed("the data before the initial step are always left out.")

    @property
    def is_given(self) -> bool:
        """Whether options let the run begin at a later step or epoch without a saved state."""
        return self.initial_epoch is not None or self.initial_step is not None


class ValidationOptions(Options, title="validation"):
    """Options of the validation loss: held-out items at fixed noise and timesteps."""

    validation_split: float = option(
        "fraction of the source files reserved for the validation loss",
        default=0.0,
        minimum=0,
        below=1,
        hint="some must be left for training",
        often=True,
    )
    validate_every_n_steps: int | None = option(
        "how often to compute the validation loss; by default after each epoch, or about every 50 "
        "steps if epochs are shorter",
        minimum=1,
    )
    validate_every_n_epochs: int | None = option("also compute it every N epochs", minimum=1)
    max_validation_steps: int | None = option(
        "maximum number of batches per validation; default: all",
        minimum=1,
        hint="omit it for all batches",
    )
    validation_seed: int | None = option(
        "seed for the selection of validation files and for their noise; default: the same for all runs",
        minimum=0,
        below=TOO_LARGE_A_SEED,
        hint="omit it for the usual choice",
    )

    def is_due_after_epoch(self, epoch: int, step: int, steps: int, is_saved: bool) -> bool:
        """Return whether to validate at `step`, the end of an epoch of `steps` steps.

        By default, an epoch is validated if it saves a file or passes a multiple of MIN_STEPS steps, because
        epochs may be very short.
        """
        if self.validate_every_n_epochs is not None:
            return epoch % self.validate_every_n_epochs == 0
        has_passed = step // MIN_STEPS > (step - steps) // MIN_STEPS
        return self.validate_every_n_steps is None and (is_saved or has_passed)


class SampleOptions(Options, title="samples while training"):
    """Schedule, prompts and settings of samples that are generated during training."""

    sample_prompts: Path | None = option(
        "file of prompts for samples (txt, toml, json); a file OUTPUT_NAME.sample asks for them any time",
        place="file",
        hint="a .txt, .toml or .json file of prompts",
        often=True,
    )
    sample_every_n_steps: int | None = option("generate samples every N steps", minimum=1, often=True)
    sample_every_n_epochs: int | None = option("generate samples every N epochs", minimum=1, often=True)
    sample_at_first: bool = option("sample before the first step too", often=True)
    sample_now: bool = option(
        "let files named sample, save and stop in --output_dir act on every run of the folder; files "
        "that begin with OUTPUT_NAME act on one run",
        often=True,
    )
    sample_lora: tuple[Path, ...] | None = option(
        "LoRA files that samples use in addition to the trained network, e.g. distill.safetensors:0.8 for "
        "samples of 4 steps; neither trained nor saved",
        metavar="FILE[:MULTIPLIER]",
        facts=SAMPLES_ONLY,
    )
    preview: PreviewOptions = option(facts=SAMPLES_ONLY)  # previews while samples are generated

    def __post_init__(self) -> None:
        if self.is_timed and self.sample_prompts is None:
            raise OptionError(
                "--sample_every_n_steps, --sample_every_n_epochs and --sample_at_first need a file with "
                "prompts: pass --sample_prompts"
            )
        self.loras()

    def loras(self) -> list[tuple[Path, float]]:
        """Return the files of --sample_lora with their multipliers.

        Raises:
            OptionError: If a file is missing.
        """
        return files_with_multipliers("--sample_lora", self.sample_lora or ())

    @property
    def is_timed(self) -> bool:
        """Whether any option schedules samples: every N steps or epochs, or at the start."""
        return (
            self.sample_every_n_steps is not None
            or self.sample_every_n_epochs is not None
            or self.sample_at_first
        )


class LogOptions(Options, title="logs"):
    """Option to train without writing the run's page."""

    no_page: bool = option(
        "do not write the page OUTPUT_NAME.html, its history OUTPUT_NAME-history.jsonl and a sheet for "
        "each round of samples"
    )


PRECISIONS = ("no", "fp16", "bf16")
NO_WRAPPER = "gradients are averaged without a DDP wrapper."


class AcceleratorOptions(Options, title="precision and processes"):
    """Options of mixed precision and of training with several processes."""

    mixed_precision: str = option(
        "autocast; without this option, the setting of accelerate launch, else no",
        default="no",
        choices=PRECISIONS,
        refused={"fp8": "weights in 8 bits are --fp8_base, and --fp8_scaled where the model's page has it"},
        often=True,
    )
    fp16_accumulation: bool = option("sum fp16 matrix products in fp16: faster on some GPUs, less exact")
    cuda_allow_tf32: bool = option(
        "compute float32 products and convolutions in TF32 on a CUDA device: faster, three digits "
        "instead of seven; bf16 and fp16 stay as they are"
    )
    cuda_cudnn_benchmark: bool = option(
        "let cuDNN try its convolutions at each new size and take the fastest; runs may then differ in "
        "the last digits"
    )
    ddp_timeout: int | None = option(
        "minutes that processes wait for each other; default: a day",
        minimum=1,
        maximum=525_600,
        hint="minutes; the most is a year",
        facts=FREE,
    )
    ddp_gradient_as_bucket_view = not_needed(NO_WRAPPER)
    ddp_static_graph = not_needed(NO_WRAPPER)

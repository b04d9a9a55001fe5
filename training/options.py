"""Compose the options that training has in every family; read them from command line and --config_file."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dataset.subset_options import SubsetOptions
from modules.errors import OptionError
from modules.option_values import require
from modules.options import FREE, HABIT, Options, read_options
from modules.parser import Parser, add_options, refuse_unsupported
from modules.speed_options import TrainingSpeedOptions
from networks.options import NetworkOptions, add_network_arguments
from training.average_options import AverageOptions, add_average_arguments
from training.caching_options import CachingInRunOptions
from training.config_options import add_config_argument, read_config_file
from training.data.options import (
    SAMPLERS,
    NoiseOptions,
    TimestepOptions,
    add_noise_arguments,
    add_timestep_arguments,
)
from training.expert_options import ONE_DIT, ExpertTrainingOptions
from training.loop_options import LoopOptions, ValidationOptions, add_loop_arguments
from training.loss_options import RAW, TIMESTEP, LossOptions, PredictionOptions, add_loss_arguments
from training.optimizers.lr_schedule_options import LrScheduleOptions, add_lr_schedule_arguments
from training.optimizers.options import OptimizerOptions, add_optimizer_arguments
from training.optimizers.parts_options import PartsOptions
from training.processes.options import AcceleratorOptions, add_accelerator_arguments
from training.reports.options import LogOptions, add_log_arguments
from training.sample_options import SampleOptions, add_sample_arguments
from training.saving.options import HubOptions, MetadataOptions, SavingOptions
from training.start_options import StartOptions
from training.whole_dit_options import WholeDitOptions

R = TypeVar("R", bound=Options)

# near the width of the largest models, where a LoRA is larger than the weights that it changes
MOST_RANK = 4096
# names of the networks whose size grows with the rank begin so; LoKr's whole matrix has a huge one
RANKED_NETWORKS = ("networks.lora", "networks.loha")


@dataclass(frozen=True)
class TrainingOptions:
    """All options but the family's own."""

    loop: LoopOptions = field(metadata=FREE)
    validation: ValidationOptions = field(metadata=FREE)
    optimizer: OptimizerOptions
    lr_schedule: LrScheduleOptions = field(metadata=HABIT)
    timesteps: TimestepOptions = field(metadata=HABIT)
    noise: NoiseOptions = field(metadata=HABIT)
    loss: LossOptions = field(metadata=HABIT)
    prediction: PredictionOptions | None = field(metadata=HABIT)  # None: the output is the velocity
    network: NetworkOptions | None  # what learns: a network beside the DiT,
    whole_dit: WholeDitOptions | None  # or the DiT itself; one of the two is there
    saving: SavingOptions = field(metadata=FREE)
    hub: HubOptions = field(metadata=FREE)
    metadata: MetadataOptions = field(metadata=FREE)
    samples: SampleOptions = field(metadata=FREE)
    average: AverageOptions = field(metadata=FREE)
    logs: LogOptions = field(metadata=FREE)
    accelerator: AcceleratorOptions
    speed: TrainingSpeedOptions
    experts: ExpertTrainingOptions | None  # None: the script's models have one transformer
    # of image trainers; None in the others
    parts: PartsOptions | None
    start: StartOptions | None = field(metadata=FREE)
    subset: SubsetOptions | None = field(metadata=FREE)  # what it makes of the data is compared instead
    caching: CachingInRunOptions | None = field(metadata=FREE)

    def __post_init__(self) -> None:
        if self.whole_dit is not None:
            self._check_whole_dit(self.whole_dit)
        if self.network is not None:
            self._check_rank(self.network)
        if self.is_fused:
            self._check_fused()
        if self.timesteps.show_timesteps is not None:
            return
        if self.subset is None or not self.subset.replaces_toml:
            require(self.loop.dataset_config, "--dataset_config", "a TOML file that describes the data sets")
        if self.hub.resume_from_huggingface:
            require(
                self.saving.resume,
                "--resume",
                "--resume_from_huggingface resumes from owner/repo/path[:revision[:type]]",
            )
        shows_pictures = self.subset is not None and self.subset.debug_dataset
        if self.loop.check or self.speed.plan.is_asked or shows_pictures:
            return
        _ = self.saving.place

    @property
    def by_expert(self) -> ExpertTrainingOptions:
        """Return the options for several transformers, also where the script has none."""
        return self.experts or ONE_DIT

    @property
    def is_for_images(self) -> bool:
        """Return whether the script follows the image guides."""
        return self.parts is not None

    @property
    def is_fused(self) -> bool:
        """Return whether weights are stepped inside the backward pass."""
        asked = (self.whole_dit, self.parts)
        return any(options is not None and options.fused_backward_pass for options in asked)

    @property
    def predicted(self) -> str:
        """Return what of a network's output is compared with the velocity."""
        return RAW if self.prediction is None else self.prediction.model_prediction_type

    @property
    def weighted_by(self) -> str:
        """Return by what --weighting_scheme weights the loss."""
        return TIMESTEP if self.prediction is None else self.prediction.weighted_by

    def _check_rank(self, options: NetworkOptions) -> None:
        is_ranked = options.network_module is None or options.network_module.startswith(RANKED_NETWORKS)
        if is_ranked and options.network_dim is not None and options.network_dim > MOST_RANK:
            raise OptionError(
                f"--network_dim {options.network_dim}: {MOST_RANK} is the most. Usual ranks are 4 to 128."
            )

    def _check_whole_dit(self, options: WholeDitOptions) -> None:
        precision = self.accelerator.mixed_precision
        if options.full_bf16 and precision != "bf16":
            raise OptionError(
                f"--full_bf16 with --mixed_precision {precision}: the model then computes in bf16; use bf16 "
                "for both"
            )
        if self.speed.fp8.fp8_base:
            raise OptionError(
                "--fp8_base: trained weights are kept in float32, or in bfloat16 with --full_bf16, because "
                "fp8 would lose the steps; leave it out, or train a LoRA"
            )
        if self.average.sample_ema:
            raise OptionError(
                "--sample_ema: the average of a whole model lies in host memory. Leave it out, and generate "
                "with the ...-ema.safetensors file"
            )
        swap = self.speed.swap
        if swap.blocks_to_swap and not options.fused_backward_pass:
            raise OptionError(
                f"--blocks_to_swap {swap.blocks_to_swap} with trained weights: each must be stepped "
                "while its block is on the device. Add --fused_backward_pass, or leave it out"
            )
        if swap.img_in_txt_in_offloading:
            raise OptionError(
                "--img_in_txt_in_offloading: these layers are trained, so they must be on the device. Leave "
                "it out"
            )

    def _check_fused(self) -> None:
        accumulation = self.loop.gradient_accumulation_steps
        if accumulation != 1:
            raise OptionError(
                f"--fused_backward_pass with --gradient_accumulation_steps {accumulation}: gradients are "
                "freed in each backward pass, so there are none to accumulate. Use 1, or a larger batch_size "
                "in --dataset_config"
            )
        if self.accelerator.mixed_precision == "fp16":
            raise OptionError(
                "--fused_backward_pass with --mixed_precision fp16: whether fp16's scaled gradients "
                "overflowed is known only after the whole backward pass. Use bf16 or no"
            )
        if self.network is not None and "ggpo_sigma" in self.network.arguments():
            raise OptionError(
                "--fused_backward_pass with --network_args ggpo_sigma: LoRA-GGPO needs the gradients that "
                "are freed at once. Leave out one of the two"
            )


def read_training(
    doc: str | None,
    record: type[R],
    argv: Sequence[str] | None,
    add_learner: Callable[[argparse.ArgumentParser], None] = add_network_arguments,
    add_more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[TrainingOptions, R]:
    """Read the options of a script that trains.

    record: the family's own. doc, add_learner: see `training_parser`. add_more: declares the script's own.
    """
    parser = training_parser(doc, add_learner)
    add_options(parser, record)
    add_more(parser)
    args = read_arguments(parser, argv)
    return read_options(TrainingOptions, args), read_options(record, args)


def training_parser(
    doc: str | None,
    add_learner: Callable[[argparse.ArgumentParser], None] = add_network_arguments,
    samplers: Sequence[str] = SAMPLERS,
) -> argparse.ArgumentParser:
    """A parser with all options that every family's training has.

    doc: the script's docstring. add_learner: adds the arguments of what learns, `add_network_arguments` or
    `add_whole_dit_arguments`. samplers: those of --timestep_sampling that the family can use.
    """
    parser = Parser(description=doc)
    add_config_argument(parser)
    add_loop_arguments(parser)
    add_learner(parser)
    add_optimizer_arguments(parser)
    add_lr_schedule_arguments(parser)
    add_timestep_arguments(parser, samplers)
    add_noise_arguments(parser)
    add_loss_arguments(parser)
    add_options(parser, TrainingSpeedOptions)
    add_accelerator_arguments(parser)
    add_options(parser, SavingOptions)
    add_sample_arguments(parser)
    add_average_arguments(parser)
    add_log_arguments(parser)
    add_options(parser, MetadataOptions, HubOptions)
    return parser


def read_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, environment: Mapping[str, str] = os.environ
) -> argparse.Namespace:
    """Parse: command line over --config_file over settings of `accelerate launch` over defaults.

    The launcher's settings are precision and compiling. Raises OptionError for a wrong value in the file and
    for an option that is not supported yet; ends the program for a wrong command line, as argparse does.
    """
    typed = parser.parse_args(argv)
    # the file that --output_config writes is not there yet
    config_file = None if getattr(typed, "output_config", False) else typed.config_file
    prefilled = {
        "mixed_precision": environment.get("ACCELERATE_MIXED_PRECISION", "no"),
        "dynamo_backend": environment.get("ACCELERATE_DYNAMO_BACKEND", "NO"),
    }
    from_file = {} if config_file is None else read_config_file(config_file, parser)
    args = parser.parse_args(argv, argparse.Namespace(**{**prefilled, **from_file}))
    refuse_unsupported(parser, args)
    return args

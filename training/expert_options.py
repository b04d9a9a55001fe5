"""Options to train models whose noise levels are shared by several transformers. Standard library only."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from modules.errors import OptionError
from modules.options import FREE, IDENTITY
from networks.options import multipliers_for, require_files


@dataclass(frozen=True)
class ExpertTrainingOptions:
    """What learns in each transformer, and where one waits while another works."""

    lora_per_expert: bool = field(metadata=IDENTITY)
    offload_inactive_dit: bool = field(metadata=FREE)
    network_weights_high_noise: Path | None = field(metadata=FREE)
    base_weights_high_noise: tuple[Path, ...] | None = field(metadata=FREE)
    base_weights_multiplier_high_noise: tuple[float, ...] | None = field(metadata=FREE)

    def __post_init__(self) -> None:
        start = self.network_weights_high_noise
        require_files("--network_weights_high_noise", [start] if start else [])
        require_files("--base_weights_high_noise", self.base_weights_high_noise or ())
        if self.base_weights_high_noise is not None and not self.base_weights_high_noise:
            raise OptionError("--base_weights_high_noise has no file behind it: give one, or leave it out")
        self.base_multipliers()

    def base_multipliers(self) -> tuple[float, ...]:
        """Return one multiplier for each of `--base_weights_high_noise`; missing ones are 1."""
        option = "--base_weights_multiplier_high_noise"
        files, given = self.base_weights_high_noise or (), self.base_weights_multiplier_high_noise or ()
        return multipliers_for(files, given, option)


# of models with one transformer, whose scripts do not have these options
ONE_DIT = ExpertTrainingOptions(False, False, None, None, None)


def add_expert_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ExpertTrainingOptions`."""
    group = parser.add_argument_group("two transformers")
    group.add_argument(
        "--lora_per_expert",
        action="store_true",
        help="with --dit and --dit_high_noise: train a network for each and save two files, "
        "..._low_noise.safetensors and ..._high_noise.safetensors; default: one network for both",
    )
    group.add_argument(
        "--offload_inactive_dit",
        action="store_true",
        help="keep the transformer that does not work in host memory; each step brings the one that it needs",
    )
    group.add_argument(
        "--network_weights_high_noise",
        help="with --lora_per_expert: LoRA file that the network of --dit_high_noise starts from; "
        "--network_weights is for that of --dit",
    )
    group.add_argument(
        "--base_weights_high_noise",
        nargs="*",
        help="LoRA files added to --dit_high_noise before training; default: those of --base_weights. If "
        "given, --base_weights is for --dit only",
    )
    group.add_argument(
        "--base_weights_multiplier_high_noise",
        type=float,
        nargs="*",
        help="strength of each file of --base_weights_high_noise; missing ones are 1",
    )

"""Options of models with two experts: what that for much noise gets, and where both wait.

Standard library only.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from modules.options import NO_PIXELS, OF_REQUEST
from networks.options import LoraOptions, multipliers_for, require_files


@dataclass(frozen=True)
class ExpertOptions:
    """The LoRAs of the expert for much noise, and how the experts take turns."""

    lora_weight_high_noise: tuple[Path, ...] | None = field(metadata=OF_REQUEST)
    lora_multiplier_high_noise: tuple[float, ...] = field(metadata=OF_REQUEST)
    offload_inactive_dit: bool = field(metadata=NO_PIXELS)
    lazy_loading: bool = field(metadata=NO_PIXELS)

    def __post_init__(self) -> None:
        files = self.lora_weight_high_noise or ()
        multipliers_for(files, self.lora_multiplier_high_noise, "--lora_multiplier_high_noise")
        require_files("--lora_weight_high_noise", files)

    @property
    def loras(self) -> LoraOptions:
        """Return the LoRAs of the expert for much noise."""
        return LoraOptions(self.lora_weight_high_noise, self.lora_multiplier_high_noise)


def add_expert_arguments(parser: argparse.ArgumentParser, has_experts: bool) -> None:
    """Declare the options of `ExpertOptions`, if the script's models may have two experts."""
    if not has_experts:
        parser.set_defaults(
            lora_weight_high_noise=None,
            lora_multiplier_high_noise=(),
            offload_inactive_dit=False,
            lazy_loading=False,
        )
        return
    group = parser.add_argument_group("two experts")
    group.add_argument(
        "--lora_weight_high_noise",
        nargs="*",
        help="LoRA files for --dit_high_noise; those of --lora_weight are for --dit. --include_patterns and "
        "--exclude_patterns count over both: first the files of --lora_weight, then these",
    )
    group.add_argument(
        "--lora_multiplier_high_noise",
        type=float,
        nargs="*",
        default=1.0,
        help="strength of each file of --lora_weight_high_noise; missing ones are 1",
    )
    group.add_argument(
        "--offload_inactive_dit",
        action="store_true",
        help="keep the expert that does not work in host memory, even if the device has room for both",
    )
    group.add_argument(
        "--lazy_loading",
        action="store_true",
        help="load an expert when its steps begin and free it after them: least host memory, more reading",
    )

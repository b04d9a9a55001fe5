"""Options of models with two experts: settings of the one for much noise, and where both wait.

Standard library only.
"""

from pathlib import Path

from modules.options import NO_PIXELS, OF_REQUEST, Options, option
from networks.options import LoraOptions, multipliers_for, require_files


class ExpertOptions(Options, title="two experts"):
    """The LoRAs of the expert for much noise, and how the experts take turns."""

    lora_weight_high_noise: tuple[Path, ...] | None = option(
        "LoRA files for --dit_high_noise; those of --lora_weight are for --dit. --include_patterns and "
        "--exclude_patterns count over both: first the files of --lora_weight, then these",
        facts=OF_REQUEST,
    )
    lora_multiplier_high_noise: tuple[float, ...] = option(
        "strength of each file of --lora_weight_high_noise; missing ones are 1",
        default=(1.0,),
        facts=OF_REQUEST,
    )
    offload_inactive_dit: bool = option(
        "keep the expert that does not work in host memory, even if the device has room for both",
        facts=NO_PIXELS,
    )
    lazy_loading: bool = option(
        "load an expert when its steps begin and free it after them: least host memory, more reading",
        facts=NO_PIXELS,
    )

    def __post_init__(self) -> None:
        files = self.lora_weight_high_noise or ()
        multipliers_for(files, self.lora_multiplier_high_noise, "--lora_multiplier_high_noise")
        require_files("--lora_weight_high_noise", files)

    @property
    def loras(self) -> LoraOptions:
        """Return the LoRAs of the expert for much noise."""
        return LoraOptions(
            lora_weight=self.lora_weight_high_noise, lora_multiplier=self.lora_multiplier_high_noise
        )

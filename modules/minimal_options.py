"""Options of the minimal inference scripts, translated to the options of our generation scripts.

Standard library only.
"""

from typing import Any

from modules.errors import OptionError
from modules.options import Options, not_needed, option

MAX_SIDE = 16384  # pixels


class MinimalLoraOptions(Options):
    """LoRA options of the minimal scripts, and options that have no effect there."""

    lora_weights: tuple[str, ...] = option("LoRAs to add", default=(), metavar="PATH;STRENGTH")
    merge_lora_weights = not_needed(
        "LoRAs are added to the weights while these are loaded.", "merge LoRAs into the model"
    )
    offload = not_needed(
        "networks take turns on the device anyway.", "keep networks in host memory while they are not used"
    )

    def __post_init__(self) -> None:
        _ = self.loras

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Path and strength of each LoRA.

        Raises:
            OptionError: If a strength is not a number.
        """
        return [_read_lora_word(text) for text in self.lora_weights]

    @property
    def lora_options(self) -> dict[str, Any]:
        """The LoRAs as --lora_weight and --lora_multiplier of the generation scripts."""
        return {
            "--lora_weight": [path for path, _ in self.loras],
            "--lora_multiplier": [f"{strength:g}" for _, strength in self.loras],
        }


def _read_lora_word(text: str) -> tuple[str, float]:
    path, separator, strength = text.rpartition(";")
    if not separator:
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        raise OptionError(
            f"--lora_weights {text!r}: write PATH, or PATH;STRENGTH such as lora.safetensors;0.8"
        ) from None

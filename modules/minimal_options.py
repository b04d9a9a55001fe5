"""Options that the image guides' minimal inference scripts share, in the words of our generation scripts.

Standard library only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from modules.errors import OptionError
from modules.options import Options, not_needed, option

MOST_SIDE = 16384  # pixels


class MinimalLoraOptions(Options):
    """LoRAs as the minimal scripts take them, and options without a use there."""

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
        """Return path and strength of each LoRA. Raises OptionError if a strength is no number."""
        return [_read_lora_word(text) for text in self.lora_weights]


def option_words(values: Mapping[str, Any], switches: Mapping[str, bool]) -> list[str]:
    """Return the words of a command. values: by option, left out if None. switches: whether each is on."""
    # joined: a prompt may begin with a dash
    words = [f"{option}={value}" for option, value in values.items() if value is not None]
    return words + [switch for switch, is_on in switches.items() if is_on]


def lora_words(loras: Sequence[tuple[str, float]]) -> list[str]:
    """Return the options of a generation script that add these LoRAs."""
    if not loras:
        return []
    files = ["--lora_weight", *(path for path, _ in loras)]
    return [*files, "--lora_multiplier", *(f"{strength:g}" for _, strength in loras)]


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

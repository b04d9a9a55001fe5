"""LoRAs with strengths as the image guides write them, in our scripts' words. Standard library only."""

from collections.abc import Sequence

from modules.errors import OptionError


def read_strengths(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Return path and strength of each text of --lora_weights, `path` or `path;strength`.

    Raises OptionError if a strength is no number.
    """
    return [_read(text) for text in texts]


def lora_words(loras: Sequence[tuple[str, float]]) -> list[str]:
    """Return the options of a generation script that add these LoRAs."""
    if not loras:
        return []
    files = ["--lora_weight", *(path for path, _ in loras)]
    return [*files, "--lora_multiplier", *(f"{strength:g}" for _, strength in loras)]


def _read(text: str) -> tuple[str, float]:
    path, separator, strength = text.rpartition(";")
    if not separator:
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        raise OptionError(
            f"--lora_weights {text!r}: write PATH, or PATH;STRENGTH such as lora.safetensors;0.8"
        ) from None

"""Options to use LoRAs: files to add to a model, and how to merge them. Standard library only."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.options import Options, option
from modules.paths import explain_missing
from networks.kinds.composing import list_kinds
from networks.typed_strengths import GRAMMAR, read_block_strengths

logger = logging.getLogger(__name__)

MAX_MULTIPLIER = 1000  # of a LoRA; 0 to 2 are usual

# how the sum of a weight and its LoRAs is rounded to 16 bits
AUTO, NEAREST, STOCHASTIC = "auto", "nearest", "stochastic"


def lora_rounding_option(
    needs: str | tuple[str, ...] = (), title: str = "", facts: Mapping[str, Any] | None = None
) -> Any:
    """Return the dataclass field for --lora_rounding.

    `needs` is the option (or one of the options) that must be set too, `title` the heading in the help.
    `facts` are additional facts about the option, such as FREE.
    """
    return option(
        "rounding of 16-bit weights after merging LoRAs; stochastic: at random, which preserves weak "
        "LoRAs; auto: at random if rounding to nearest loses more than 1 %%",
        default=AUTO,
        choices=(AUTO, NEAREST, STOCHASTIC),
        needs=needs,
        title=title,
        facts=facts,
    )


def require_loras(rounding: str, files: Iterable[Sequence[Path] | None], option: str) -> None:
    """Raise OptionError if --lora_rounding is set although no LoRA is merged.

    Args:
        rounding: Value of --lora_rounding.
        files: LoRA files that are merged.
        option: Option that sets LoRA files, for the message.
    """
    if rounding != AUTO and not any(files):
        raise OptionError(
            f"--lora_rounding {rounding} needs {option}: it says how LoRAs are merged. Pass both, or omit it"
        )


class LoraOptions(Options):
    """LoRA files to add to a model."""

    lora_weight: tuple[Path, ...] | None = option(
        f"LoRA files to add to the model ({list_kinds(lambda kind: kind.network_module)}, any dialect)",
        place="there",
        often=True,
    )
    lora_multiplier: tuple[float, ...] = option(
        "strength of each file of --lora_weight; missing ones are 1",
        default=(1.0,),
        ignored_without="lora_weight",
        often=True,
    )

    def __post_init__(self) -> None:
        self.multipliers(warns=True)

    def multipliers(self, warns: bool = False) -> tuple[float, ...]:
        """Return one multiplier per LoRA file; with `warns`, warn of surplus multipliers."""
        return multipliers_for(self.lora_weight or (), self.lora_multiplier, "--lora_multiplier", warns)


PATTERN = (
    "regular expression per --lora_weight, searched in tensor names such as "
    "lora_unet_blocks_9_cross_attn_k.lora_up.weight"
)


# a regular expression's comment; the pattern after it was not typed by the user and may match nothing
ADDED_PATTERN = "(?#of another option)"


class LoraPatternOptions(Options):
    """What is used of each LoRA file: tensors selected by regular expressions, and the strength of blocks."""

    include_patterns: tuple[str, ...] | None = option(f"use only tensors that match: one {PATTERN}")
    exclude_patterns: tuple[str, ...] | None = option(f"omit tensors that match: one {PATTERN}")
    lora_blocks: tuple[str, ...] | None = option(
        f"strength of each block, one text per --lora_weight: {GRAMMAR}"
    )

    def __post_init__(self) -> None:
        for name in ("include_patterns", "exclude_patterns"):
            for pattern in getattr(self, name) or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise OptionError(f"--{name} {pattern!r} is not a regular expression: {error}") from None
        for text in self.lora_blocks or ():
            read_block_strengths(text)

    def also_excluding(self, pattern: str, files: int) -> "LoraPatternOptions":
        """Return these options with `pattern`, which the user did not type, excluded from each file too."""
        typed = self.exclude_patterns or ()
        num_untyped = max(files - len(typed), 0)
        patterns = [f"(?:{typed_pattern})|{ADDED_PATTERN}{pattern}" for typed_pattern in typed]
        patterns += [f"{ADDED_PATTERN}{pattern}"] * num_untyped
        return replace(self, exclude_patterns=tuple(patterns))


def require_files(option: str, paths: Sequence[Path], folder_advice: str | None = None) -> None:
    """Raise OptionError for the first path that does not exist, before anything heavy is loaded.

    Args:
        option: Option that sets the paths, for messages.
        paths: Paths of the files.
        folder_advice: Advice for a path that is a folder; None accepts folders.
    """
    for path in paths:
        if not path.exists():
            raise OptionError(
                f"{option} {path}: no such file.{explain_missing(path)} Pass the path of an existing file"
            )
        if folder_advice is not None and path.is_dir():
            inside = next((file.name for file in sorted(path.glob("*.safetensors"))), None)
            example = f", such as {path / inside}" if inside is not None else f" ({folder_advice})"
            raise OptionError(f"{option} {path}: is a folder. Pass the files in it{example}")


def multipliers_for(
    files: Sequence[Path], multipliers: Sequence[float], option: str, warns: bool = False
) -> tuple[float, ...]:
    """Return one multiplier per file; files for which the user typed no multiplier get 1.0.

    Args:
        files: The files.
        multipliers: Multipliers that the user typed.
        option: Option that sets the multipliers, for messages.
        warns: Whether to warn of surplus multipliers; there is no warning without files, because the
            multipliers may be the default.

    Raises:
        OptionError: If a multiplier is too large, infinite or NaN.
    """
    surplus = multipliers[len(files) :] if files and warns else ()
    if surplus:
        numbers = " ".join(f"{value:g}" for value in surplus)
        file_count_text = "is 1 file" if len(files) == 1 else f"are {len(files)} files"
        logger.warning("%s: %s is ignored because there %s", option, numbers, file_count_text)
    for value in multipliers:
        if not math.isfinite(value):
            raise OptionError(f"{option} {value}: pass a finite number")
        if abs(value) > MAX_MULTIPLIER:
            raise OptionError(f"{option} {value:g}: use at most {MAX_MULTIPLIER}; 0 to 2 are usual")
    # the typed multipliers, then 1 for each file without one
    return (*multipliers[: len(files)], *(1.0 for _ in files[len(multipliers) :]))

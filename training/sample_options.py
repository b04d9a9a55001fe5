"""Options of the samples made while training."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from blissful_tuner.preview_options import PreviewOptions
from modules.errors import OptionError
from modules.option_values import check_at_least
from modules.parser import add_options
from networks.options import require_files


@dataclass(frozen=True)
class SampleOptions:
    """When to make samples, and from which prompts."""

    sample_prompts: Path | None  # txt, toml or json
    sample_every_n_steps: int | None
    sample_every_n_epochs: int | None
    sample_at_first: bool
    sample_now: bool  # look for files that ask for samples or a save
    sample_lora: tuple[Path, ...] | None  # "FILE" or "FILE:multiplier"; see `loras`
    preview: PreviewOptions  # of samples while they are made

    def __post_init__(self) -> None:
        check_at_least(
            "--sample_every_n_steps", self.sample_every_n_steps, 1, "leave it out for no samples by step"
        )
        check_at_least(
            "--sample_every_n_epochs", self.sample_every_n_epochs, 1, "leave it out for no samples by epoch"
        )
        path = self.sample_prompts
        if path is not None and (path.is_dir() or not path.exists()):
            what = "is a folder" if path.is_dir() else "no such file"
            raise OptionError(
                f"--sample_prompts {self.sample_prompts}: {what}; give a .txt, .toml or .json file of prompts"
            )
        if self.is_timed and self.sample_prompts is None:
            raise OptionError(
                "--sample_every_n_steps, --sample_every_n_epochs and --sample_at_first need a file with "
                "prompts: give --sample_prompts"
            )

        self.loras()

    def loras(self) -> list[tuple[Path, float]]:
        """Return the files of --sample_lora with their multipliers. Raises OptionError if one is missing."""
        found = [_split_multiplier(path) for path in self.sample_lora or ()]
        require_files("--sample_lora", [path for path, _ in found])
        return found

    @property
    def is_timed(self) -> bool:
        """Return whether any option says when to make samples."""
        return (
            self.sample_every_n_steps is not None
            or self.sample_every_n_epochs is not None
            or self.sample_at_first
        )


def _split_multiplier(given: Path) -> tuple[Path, float]:
    """Split `FILE:0.8`; without a number the multiplier is 1. A drive's colon (C:\\x) is part of the name."""
    name, colon, number = str(given).rpartition(":")
    if not colon or given.exists():
        return given, 1.0
    try:
        multiplier = float(number)
    except ValueError:
        return given, 1.0
    if not math.isfinite(multiplier):
        raise OptionError(f"--sample_lora {given}: the multiplier is {number}; give a finite number")
    return Path(name), multiplier


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `SampleOptions`."""
    group = parser.add_argument_group("samples while training")
    group.add_argument("--sample_prompts", help="file with prompts (txt, toml, json) to make samples from")
    group.add_argument("--sample_every_n_steps", type=int, help="make samples after every so many steps")
    group.add_argument("--sample_every_n_epochs", type=int, help="make samples after every so many epochs")
    group.add_argument("--sample_at_first", action="store_true", help="sample before the first step too")
    group.add_argument(
        "--sample_lora",
        nargs="*",
        metavar="FILE[:MULTIPLIER]",
        help="LoRA files that samples have besides the learning network, e.g. distill.safetensors:0.8 for "
        "samples of 4 steps; neither trained nor saved",
    )
    add_options(parser, PreviewOptions)
    group.add_argument(
        "--sample_now",
        action="store_true",
        help="look into --output_dir once a second: a file OUTPUT_NAME.sample asks for samples at the end of "
        "the next step, OUTPUT_NAME.save for a save; it is removed when that is done",
    )

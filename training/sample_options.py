"""Options of the samples made while training."""

import math
from pathlib import Path

from blissful_tuner.options import PreviewOptions
from modules.errors import OptionError
from modules.options import Options, option
from networks.options import require_files


class SampleOptions(Options, title="samples while training"):
    """When to make samples, and from which prompts."""

    sample_prompts: Path | None = option(
        "file with prompts (txt, toml, json) to make samples from", often=True
    )
    sample_every_n_steps: int | None = option("make samples after every so many steps", least=1)
    sample_every_n_epochs: int | None = option("make samples after every so many epochs", least=1, often=True)
    sample_at_first: bool = option("sample before the first step too")
    sample_now: bool = option(
        "look into --output_dir once a second: a file OUTPUT_NAME.sample asks for samples at the end of "
        "the next step, OUTPUT_NAME.save for a save; it is removed when that is done"
    )
    sample_lora: tuple[Path, ...] | None = option(
        "LoRA files that samples have besides the learning network, e.g. distill.safetensors:0.8 for "
        "samples of 4 steps; neither trained nor saved",
        metavar="FILE[:MULTIPLIER]",
    )
    preview: PreviewOptions  # of samples while they are made

    def __post_init__(self) -> None:
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

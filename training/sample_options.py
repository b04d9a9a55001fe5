"""Options of the samples made while training."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.options import check_at_least


@dataclass(frozen=True)
class SampleOptions:
    """When to make samples, and from which prompts."""

    sample_prompts: Path | None  # txt, toml or json
    sample_every_n_steps: int | None
    sample_every_n_epochs: int | None
    sample_at_first: bool

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

    @property
    def is_timed(self) -> bool:
        """Return whether any option says when to make samples."""
        return (
            self.sample_every_n_steps is not None
            or self.sample_every_n_epochs is not None
            or self.sample_at_first
        )


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `SampleOptions`."""
    group = parser.add_argument_group("samples while training")
    group.add_argument("--sample_prompts", help="file with prompts (txt, toml, json) to make samples from")
    group.add_argument("--sample_every_n_steps", type=int)
    group.add_argument("--sample_every_n_epochs", type=int)
    group.add_argument("--sample_at_first", action="store_true", help="sample before the first step too")

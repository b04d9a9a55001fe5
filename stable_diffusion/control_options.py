"""Options of ControlNets and ControlNet-LLLite. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError


@dataclass(frozen=True)
class ControlOptions:
    """ControlNets or ControlNet-LLLites, in the order of their guide pictures."""

    control_net_models: tuple[Path, ...] | None
    control_net_lllite_models: tuple[Path, ...] | None
    control_net_preps: tuple[str, ...] | None  # none, or canny_63_191
    control_net_multipliers: tuple[float, ...] | None  # None: 1 each
    control_net_ratios: tuple[float, ...] | None  # share of the steps, from the first; None: 1 each

    def __post_init__(self) -> None:
        if self.control_net_models and self.control_net_lllite_models:
            raise OptionError(
                "--control_net_models and --control_net_lllite_models do not work together: give one of them"
            )
        models = len(self.control_net_models or self.control_net_lllite_models or ())
        for name in ("control_net_preps", "control_net_multipliers", "control_net_ratios"):
            count = len(getattr(self, name) or ())
            if count and not models:
                raise OptionError(f"--{name} needs --control_net_models or --control_net_lllite_models")
            if count > models:
                raise OptionError(f"--{name}: {count} values for {models} models. Give one for each")


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ControlOptions`."""
    group = parser.add_argument_group("ControlNet")
    group.add_argument("--control_net_models", nargs="*", help="ControlNets: files or folders of diffusers")
    group.add_argument("--control_net_lllite_models", nargs="*", help="files of ControlNet-LLLite")
    group.add_argument(
        "--control_net_preps",
        nargs="*",
        help="how each guide picture is prepared: none, or canny_63_191 (edges between these thresholds)",
    )
    group.add_argument(
        *("--control_net_multipliers", "--control_net_weights"),
        dest="control_net_multipliers",
        nargs="*",
        type=float,
        help="strength of each; usually 1",
    )
    group.add_argument(
        "--control_net_ratios",
        nargs="*",
        type=float,
        help="share of the steps, from the first, in which each acts; usually 1",
    )

"""Options of LoRAs and their like. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.options import check_at_least, check_at_most


@dataclass(frozen=True)
class NetworkOptions:
    """LoRAs and their like, in the order of their weights."""

    network_module: tuple[str, ...] | None
    network_weights: tuple[Path, ...] | None
    network_mul: tuple[float, ...] | None  # None: 1 each
    network_args: tuple[str, ...] | None  # of each module: key=value, several joined by ;
    network_show_meta: bool
    network_merge: bool  # all are folded into the model
    network_merge_n_models: int | None  # the first ones are
    network_pre_calc: bool  # they are folded in for each batch, and taken out again
    network_regional_mask_max_color_codes: int | None

    def __post_init__(self) -> None:
        files = len(self.network_weights or ())
        if self.network_weights is None:
            for name in ("network_module", "network_mul", "network_args"):
                if getattr(self, name):
                    raise OptionError(f"--{name} needs --network_weights, the files")
        if self.network_merge and self.network_merge_n_models is not None:
            raise OptionError(
                "--network_merge folds in all networks, --network_merge_n_models some: give one"
            )
        check_at_least("--network_merge_n_models", self.network_merge_n_models, 1, "a number of networks")
        if self.network_merge_n_models is not None and self.network_merge_n_models > files:
            raise OptionError(
                f"--network_merge_n_models {self.network_merge_n_models}: there are {files} --network_weights"
            )
        check_at_least(
            "--network_regional_mask_max_color_codes",
            self.network_regional_mask_max_color_codes,
            1,
            "the number of colours of the mask, 1 to 7",
        )
        check_at_most(
            "--network_regional_mask_max_color_codes",
            self.network_regional_mask_max_color_codes,
            7,
            "the number of colours of the mask, 1 to 7",
        )


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `NetworkOptions`."""
    group = parser.add_argument_group("LoRA and other networks")
    group.add_argument(
        "--network_module",
        nargs="*",
        help="modules that know the files, such as networks.lora; found out from the files if not given",
    )
    group.add_argument("--network_weights", nargs="*", help="LoRA files, any dialect")
    group.add_argument("--network_mul", nargs="*", type=float, help="strength of each file; usually 1")
    group.add_argument(
        "--network_args", nargs="*", help="arguments of each module: key=value, several joined by ;"
    )
    group.add_argument(
        "--network_show_meta", action="store_true", help="show what the files say of themselves"
    )
    group.add_argument(
        "--network_merge", action="store_true", help="fold all networks into the model, which is faster"
    )
    group.add_argument("--network_merge_n_models", type=int, help="fold the first ones into the model")
    group.add_argument(
        "--network_pre_calc",
        action="store_true",
        help="fold the networks in for each batch, which is faster than adding them at each step and still "
        "lets prompts choose strengths (--am)",
    )
    group.add_argument(
        "--network_regional_mask_max_color_codes",
        type=int,
        help="the mask of regions (--mask_path, prompts with AND) has this many regions, each of one colour: "
        "red 1, green 2, yellow 3, blue 4, magenta 5, cyan 6, white 7; usually red, green and blue are a "
        "region each, and their values weights",
    )

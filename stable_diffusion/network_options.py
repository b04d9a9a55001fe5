"""Options of LoRAs and their like. Standard library only."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from networks.options import multipliers_for, require_files

# of known scripts, for files that say themselves what they are; our own modules are read in the same way
KNOWN_MODULES = (
    *("networks.lora", "networks.loha", "networks.lokr", "networks.lora_fa", "networks.dylora"),
    *("lycoris", "lycoris.kohya"),
)
NOT_READ = {"networks.oft": "OFT", "networks.control_net_lllite": "a ControlNet-LLLite"}


@dataclass(frozen=True)
class AddedNetworkOptions:
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
        if self.network_weights is None:
            for name in ("network_module", "network_mul", "network_args", "network_merge_n_models"):
                if getattr(self, name):
                    raise OptionError(f"--{name} needs --network_weights, the files")
            for name in ("network_merge", "network_pre_calc", "network_show_meta"):
                if getattr(self, name):
                    raise OptionError(f"--{name} needs --network_weights, the files")
        require_files("--network_weights", self.files)
        self._check_modules()
        self._check_counts()
        multipliers_for(self.files, self.network_mul or (), "--network_mul")
        self._check_merging()
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

    def _check_modules(self) -> None:
        for name in self.network_module or ():
            what = NOT_READ.get(name)
            if what is not None:
                use = "--control_net_lllite_models takes it" if "LLLite" in what else "it is not supported"
                raise OptionError(f"--network_module {name} is for {what}: {use}. Leave --network_module out")
            if name not in KNOWN_MODULES and not name.startswith("networks.lora"):
                raise OptionError(
                    f"--network_module {name}: modules of others are not supported in gen_img.py. Leave "
                    f"--network_module out, or give one of {', '.join(KNOWN_MODULES)}: the files are "
                    "recognised by their tensors"
                )

    def _check_counts(self) -> None:
        files = len(self.files)
        modules = len(self.network_module or ())
        if modules > 1 and modules != files:
            raise OptionError(
                f"--network_module has {modules} names for {files} files of --network_weights: give one for "
                "each, or leave it out"
            )
        for option, given in (("--network_mul", self.network_mul), ("--network_args", self.network_args)):
            if len(given or ()) > files:
                raise OptionError(
                    f"{option} has {len(given or ())} values for {files} files of --network_weights: give at "
                    "most one for each, in the same order"
                )

    def _check_merging(self) -> None:
        if self.network_merge and self.network_merge_n_models is not None:
            raise OptionError(
                "--network_merge folds in all networks, --network_merge_n_models some: give one"
            )
        if self.network_merge and self.network_pre_calc:
            raise OptionError(
                "--network_merge folds in all networks for good, --network_pre_calc for each batch: give one"
            )
        check_at_least("--network_merge_n_models", self.network_merge_n_models, 1, "a number of networks")
        if (self.network_merge_n_models or 0) > len(self.files):
            raise OptionError(
                f"--network_merge_n_models {self.network_merge_n_models}: there are {len(self.files)} "
                "--network_weights"
            )
        if self.network_regional_mask_max_color_codes is not None and (
            self.network_pre_calc or self.network_merge
        ):
            raise OptionError(
                "--network_regional_mask_max_color_codes: networks in regions are added while pictures are "
                "made, they cannot be folded into the model. Leave out --network_merge and --network_pre_calc"
            )

    @property
    def files(self) -> tuple[Path, ...]:
        return self.network_weights or ()

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Strength of each file."""
        return multipliers_for(self.files, self.network_mul or (), "--network_mul")

    @property
    def num_merged(self) -> int:
        """How many of the files, from the first, are folded into the model for good."""
        return len(self.files) if self.network_merge else self.network_merge_n_models or 0

    @property
    def num_adjustable(self) -> int:
        """How many of the files have strengths that a prompt may choose (--am)."""
        return len(self.files) - self.num_merged

    def check_strengths(self, multipliers: Sequence[float]) -> None:
        """Raise OptionError if a prompt chooses more strengths than there are networks to choose them for."""
        if len(multipliers) > self.num_adjustable > 0:
            merged = (
                f", without the {self.num_merged} that are folded into the model" if self.num_merged else ""
            )
            raise OptionError(
                f"--am has {len(multipliers)} strengths for {self.num_adjustable} networks: give one for "
                f"each of --network_weights, in the same order{merged}"
            )
        multipliers_for(self.files, multipliers, "--am")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `AddedNetworkOptions`."""
    group = parser.add_argument_group("LoRA and other networks")
    group.add_argument(
        "--network_module",
        nargs="*",
        help="kinds of the files, such as networks.lora; needless, as the files say what they are",
    )
    group.add_argument("--network_weights", nargs="*", help="LoRA files, any dialect")
    group.add_argument("--network_mul", nargs="*", type=float, help="strength of each file; default: 1")
    group.add_argument(
        "--network_args",
        nargs="*",
        help="arguments of each module: key=value, several joined by ;. The files say the same",
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

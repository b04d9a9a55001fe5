"""Options to train a LoRA network, add LoRAs to a model, merge and convert files. Standard library only."""

import argparse
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import split_pairs
from modules.options import FREE, HABIT, IDENTITY
from modules.output_files import check_output_file, refuse_replacing
from modules.paths import explain_missing

logger = logging.getLogger(__name__)

MOST_MULTIPLIER = 1000  # of a LoRA; 0 to 2 are usual
MOST_ALPHA = 1_000_000
MERGE_CHANNELS_UNCHECKED = 16  # --dit_in_channels of merge_lora: the default asks for no check


@dataclass(frozen=True)
class NetworkOptions:
    """Options of the network that `--network_module` builds and trains."""

    network_module: str | None = field(metadata=IDENTITY)  # None: the family's own LoRA module
    network_dim: int | None = field(metadata=IDENTITY)  # rank; None: the module's default
    network_alpha: float = field(metadata=IDENTITY)
    network_dropout: float | None = field(metadata=HABIT)
    network_args: tuple[str, ...] | None = field(metadata=IDENTITY)  # "key=value" each
    network_weights: Path | None = field(metadata=FREE)
    dim_from_weights: bool = field(metadata=FREE)
    scale_weight_norms: float | None = field(metadata=HABIT)
    base_weights: tuple[Path, ...] | None = field(metadata=FREE)  # resume compares their names
    base_weights_multiplier: tuple[float, ...] | None = field(metadata=HABIT)

    def __post_init__(self) -> None:
        if self.network_dim is not None and self.network_dim < 1:
            raise OptionError(f"--network_dim {self.network_dim}: the rank must be at least 1")
        if not 0 <= self.network_alpha <= MOST_ALPHA:
            raise OptionError(
                f"--network_alpha {self.network_alpha:g}: give a number up to {MOST_ALPHA:,}, or 0 for alpha "
                "= rank"
            )
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            raise OptionError(f"--network_dropout {self.network_dropout}: give a share from 0 to below 1")
        if self.dim_from_weights and self.network_weights is None:
            raise OptionError(
                "--dim_from_weights needs --network_weights: the file to take ranks and alphas from"
            )
        if self.scale_weight_norms is not None and not self.scale_weight_norms > 0:
            raise OptionError(
                f"--scale_weight_norms {self.scale_weight_norms}: give a positive norm, or leave it out"
            )
        if self.base_weights_multiplier and not self.base_weights:
            raise OptionError(
                "--base_weights_multiplier is given without --base_weights: give both, or leave it out"
            )
        self.arguments()
        _warn_of_surplus(self.base_weights, self.base_weights_multiplier or (), "--base_weights_multiplier")
        require_files("--network_weights", [self.network_weights] if self.network_weights else [])
        require_files("--base_weights", self.base_weights or ())

    def arguments(self) -> dict[str, str]:
        """Return `--network_args` as a dictionary of strings."""
        return {key: value.strip() for key, value in split_pairs("--network_args", self.network_args).items()}

    @property
    def decomposes(self) -> bool:
        """Whether the network is a DoRA."""
        return self.arguments().get("dora_wd", "").lower() == "true"

    def base_multipliers(self) -> tuple[float, ...]:
        """Return one multiplier for each of `--base_weights`; missing ones are 1."""
        return multipliers_for(
            self.base_weights or (), self.base_weights_multiplier or (), "--base_weights_multiplier"
        )


@dataclass(frozen=True)
class LoraOptions:
    """LoRA files to add to a model."""

    lora_weight: tuple[Path, ...] | None
    lora_multiplier: tuple[float, ...]

    def __post_init__(self) -> None:
        self.multipliers()
        _warn_of_surplus(self.lora_weight, self.lora_multiplier, "--lora_multiplier")
        require_files("--lora_weight", self.lora_weight or ())

    def multipliers(self) -> tuple[float, ...]:
        """Return one multiplier for each of `--lora_weight`; missing ones are 1."""
        return multipliers_for(self.lora_weight or (), self.lora_multiplier, "--lora_multiplier")


@dataclass(frozen=True)
class LoraPatternOptions:
    """Which parts of each LoRA file are used: one regular expression per file, searched in tensor names."""

    include_patterns: tuple[str, ...] | None
    exclude_patterns: tuple[str, ...] | None

    def __post_init__(self) -> None:
        for option, patterns in (
            ("--include_patterns", self.include_patterns),
            ("--exclude_patterns", self.exclude_patterns),
        ):
            for pattern in patterns or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise OptionError(f"{option} {pattern!r} is not a regular expression: {error}") from None

    def also_excluding(self, pattern: str, files: int) -> "LoraPatternOptions":
        """Return these options with `pattern` excluded as well, from each of `files` LoRA files."""
        given = [*(self.exclude_patterns or ()), *[None] * files][
            : max(files, len(self.exclude_patterns or ()))
        ]
        return replace(
            self, exclude_patterns=tuple(pattern if one is None else f"(?:{one})|{pattern}" for one in given)
        )


@dataclass(frozen=True)
class MergeOptions:
    """Options of `merge_lora.py`."""

    dit: Path
    dit_in_channels: int
    lora: LoraOptions
    expert: str | None  # that --dit is; None: as its name says, if it does
    save_merged_model: Path
    device: str | None

    def __post_init__(self) -> None:
        require_files("--dit", [self.dit])
        check_output_file("--save_merged_model", self.save_merged_model)


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `convert_lora.py`."""

    input: Path
    input_high_noise: Path | None
    output: Path
    output_high_noise: Path | None
    expert: str | None  # the part of a file with a LoRA for each expert to take alone
    target: str  # default, other or diffusers
    bake: int | None  # the rank of the plain LoRAs to make of other kinds
    dit: tuple[Path, ...] | None  # what a DoRA to bake was trained for
    device: str | None

    def __post_init__(self) -> None:
        self._check_baking()
        inputs = [self.input, *([] if self.input_high_noise is None else [self.input_high_noise])]
        require_files("--input", inputs[:1])
        require_files("--input_high_noise", inputs[1:])
        outputs = {"--output": self.output}
        if self.output_high_noise is not None:
            outputs["--output_high_noise"] = self.output_high_noise
        for option, output in outputs.items():
            check_output_file(option, output)
            refuse_replacing(option, output, [*inputs, *(self.dit or ())])
        if self.output_high_noise is not None and self.output.resolve() == self.output_high_noise.resolve():
            raise OptionError(f"--output and --output_high_noise are both {self.output}: give two names")
        for option, is_given in (
            ("--input_high_noise", self.input_high_noise is not None),
            ("--output_high_noise", self.output_high_noise is not None),
        ):
            if self.expert is not None and is_given:
                raise OptionError(f"--expert takes one LoRA of --input alone: leave {option} or it out")
        is_joined = self.input_high_noise is not None and self.output_high_noise is None
        if is_joined and self.target != "diffusers":
            raise OptionError(
                f"--target {self.target} has no form for two LoRAs in one file: use --target diffusers, or "
                "add --output_high_noise FILE"
            )

    def _check_baking(self) -> None:
        if self.bake is not None and self.bake < 1:
            raise OptionError(f"--bake {self.bake}: give a rank, a whole number from 1")
        for option, is_given in (("--dit", self.dit is not None), ("--device", self.device is not None)):
            if is_given and self.bake is None:
                raise OptionError(f"{option} is for --bake RANK: add that, or leave {option} out")
        if self.dit is not None and (self.input_high_noise or self.output_high_noise):
            raise OptionError(
                "--dit is the model that one DoRA was trained for, and each expert has its own: bake one "
                "LoRA (--expert takes it out of a file for both), then the other"
            )
        require_files("--dit", self.dit or ())


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `NetworkOptions`."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--network_module",
        help="module that builds the network: networks.lora, networks.loha, networks.lokr, or another "
        "package's, such as lycoris.kohya; default: the family's LoRA",
    )
    group.add_argument("--network_dim", type=int, help="rank of the network; default 4")
    group.add_argument(
        "--network_alpha", type=float, default=1, help="strength is alpha / rank; 0 means alpha = rank"
    )
    group.add_argument(
        "--network_dropout",
        type=float,
        help="share of the values between the two factors that is set to zero during training",
    )
    group.add_argument(
        "--network_args",
        nargs="*",
        metavar="KEY=VALUE",
        help="further settings, e.g. rank_dropout=0.1 \"exclude_patterns=[r'.*ffn.*']\"",
    )
    group.add_argument("--network_weights", help="LoRA file to start from; parts that do not fit are logged")
    group.add_argument(
        "--dim_from_weights",
        action="store_true",
        help="take the rank and alpha of each module from --network_weights",
    )
    group.add_argument(
        "--scale_weight_norms",
        type=float,
        help="largest norm of a module: after each step, larger ones are scaled down (1 is a good start)",
    )
    group.add_argument("--base_weights", nargs="*", help="LoRA files added to the model before training")
    group.add_argument(
        "--base_weights_multiplier",
        type=float,
        nargs="*",
        help="strength of each file of --base_weights; missing ones are 1",
    )


def add_lora_arguments(
    group: argparse._ActionsContainer, default_multiplier: float | list[float] = 1.0
) -> None:
    """Declare the options of `LoraOptions`."""
    group.add_argument(
        "--lora_weight", nargs="*", help="LoRA files to add to the model (LoRA, LoHa or LoKr, any dialect)"
    )
    group.add_argument(
        "--lora_multiplier",
        type=float,
        nargs="*",
        default=default_multiplier,
        help="strength of each file of --lora_weight; missing ones are 1",
    )


def add_lora_pattern_arguments(group: argparse._ActionsContainer) -> None:
    """Declare the options of `LoraPatternOptions`."""
    text = (
        "regular expression per --lora_weight, searched in tensor names such as "
        "lora_unet_blocks_9_cross_attn_k.lora_up.weight"
    )
    group.add_argument("--include_patterns", nargs="*", help=f"use only tensors that match: one {text}")
    group.add_argument("--exclude_patterns", nargs="*", help=f"leave out tensors that match: one {text}")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `MergeOptions`."""
    parser.add_argument(
        "--dit",
        required=True,
        help="checkpoint of the model: a file, one of its shards, an index, or a folder",
    )
    parser.add_argument(
        "--dit_in_channels",
        type=int,
        default=MERGE_CHANNELS_UNCHECKED,
        help="refuse a checkpoint whose first layer takes another number of channels; the default, 16, "
        "accepts any",
    )
    add_lora_arguments(parser, [1.0])
    parser.add_argument(
        "--expert",
        choices=["high_noise", "low_noise"],
        help="which expert of Wan2.2 A14B --dit is: chooses the part of a LoRA file for both, and warns of a "
        "LoRA for the other; default: as the name of the file or folder says",
    )
    parser.add_argument("--save_merged_model", required=True, help="safetensors file to write")
    parser.add_argument(
        "--device", help="device that computes the deltas; default: CUDA if available, else the CPU"
    )


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ConvertOptions`."""
    parser.add_argument(
        "--input", required=True, help="LoRA file, any dialect; of two experts that of low noise, or of both"
    )
    parser.add_argument(
        "--input_high_noise",
        help="LoRA file of the high-noise expert of Wan2.2, to be written beside --input",
    )
    parser.add_argument("--output", required=True, help="safetensors file to write")
    parser.add_argument(
        "--output_high_noise",
        help="safetensors file for the LoRA of the high-noise expert; --output then gets that of low noise",
    )
    parser.add_argument(
        "--expert",
        choices=["high_noise", "low_noise"],
        help="of a file with a LoRA for each expert, take this one alone",
    )
    targets = (
        "other: as ComfyUI and most tools read it: diffusion_model. (FramePack, FLUX: transformer.) with "
        "lora_A and lora_B, alpha folded in; HunyuanImage: lora_unet_ with ComfyUI's names; "
        "default: lora_unet_ with lora_down and lora_up; "
        "diffusers: transformer. with diffusers' module names, both experts in one file as transformer. "
        "(high noise) and transformer_2. (low noise)"
    )
    parser.add_argument("--target", required=True, choices=["other", "default", "diffusers"], help=targets)
    parser.add_argument(
        "--bake",
        type=int,
        metavar="RANK",
        help="make a plain LoRA of this rank of each LoHa, LoKr and DoRA, for tools that do not know them; "
        "says how much of the change is lost",
    )
    parser.add_argument(
        "--dit",
        nargs="+",
        metavar="FILE",
        help="with --bake, the model that a DoRA was trained for; after it text encoders that it changes",
    )
    parser.add_argument(
        "--device", help="device that --bake computes on; default: CUDA if available, else MPS, else the CPU"
    )


def require_files(option: str, paths: Sequence[Path], folders: str | None = None) -> None:
    """Raise OptionError for the first path that does not exist, before anything heavy is loaded.

    folders: how to get a file; if it is given, folders are refused too.
    """
    for path in paths:
        if not path.exists():
            raise OptionError(
                f"{option} {path}: no such file.{explain_missing(path)} Give the path of an existing one"
            )
        if folders is not None and path.is_dir():
            inside = next((file.name for file in sorted(path.glob("*.safetensors"))), None)
            example = f", such as {path / inside}" if inside is not None else f" ({folders})"
            raise OptionError(f"{option} {path}: is a folder. Give the files in it{example}")


def _warn_of_surplus(files: Sequence[Path] | None, multipliers: Sequence[float], option: str) -> None:
    """Warn of multipliers without a file, unless there are no files: then they may be the default."""
    surplus = multipliers[len(files) :] if files else ()
    if surplus:
        numbers = " ".join(f"{value:g}" for value in surplus)
        logger.warning("%s: %s is ignored because there are %d files", option, numbers, len(files or ()))


def multipliers_for(files: Sequence[Path], multipliers: Sequence[float], option: str) -> tuple[float, ...]:
    """Return one multiplier per file: the given ones, then 1.0.

    Surplus multipliers are ignored, because the option has a default even without files. Raises OptionError
    if a multiplier is infinite or NaN.
    """
    for value in multipliers:
        if not math.isfinite(value):
            raise OptionError(f"{option} {value}: give a finite number")
        if abs(value) > MOST_MULTIPLIER:
            raise OptionError(f"{option} {value:g}: give at most {MOST_MULTIPLIER}; 0 to 2 are usual")
    return (*multipliers[: len(files)], *(1.0 for _ in files[len(multipliers) :]))

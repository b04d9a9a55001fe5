"""Options to train a LoRA network, and to add LoRAs to a model. Standard library only."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import split_pairs
from modules.options import FREE, HABIT, IDENTITY, IMPORTS_MODULE, Options, option
from modules.paths import explain_missing
from networks.names.layouts import COMFYUI, DIFFUSERS, KNOWN
from networks.teacher_options import TeacherOptions

logger = logging.getLogger(__name__)

MOST_MULTIPLIER = 1000  # of a LoRA; 0 to 2 are usual

# how the sum of a weight and its LoRAs becomes a number of 16 bits
AUTO, NEAREST, STOCHASTIC = "auto", "nearest", "stochastic"


def lora_rounding_option(
    needs: str | tuple[str, ...] = (), title: str = "", facts: Mapping[str, Any] | None = None
) -> Any:
    """Return the field of --lora_rounding. Arguments: as `option` has them."""
    return option(
        "rounding of 16-bit weights after LoRAs are merged: stochastic is at random, which keeps small "
        "LoRAs; auto: so where the nearest loses over 1 %%",
        default=AUTO,
        choices=(AUTO, NEAREST, STOCHASTIC),
        needs=needs,
        title=title,
        facts=facts,
    )


def require_loras(rounding: str, files: Iterable[Sequence[Path] | None], option: str) -> None:
    """Raise OptionError if --lora_rounding is given, and no LoRA is merged. option: that names LoRAs."""
    if rounding != AUTO and not any(files):
        raise OptionError(
            f"--lora_rounding {rounding} needs {option}: it says how LoRAs are merged. Give both, "
            "or leave it out"
        )


OFT_MODULE = "networks.oft"
# keys of --network_args of a T-LoRA: see `networks.rank_masks`
TLORA, TLORA_MIN_RANK, TLORA_ALPHA = "tlora", "tlora_min_rank", "tlora_alpha"
DEFAULT_RANK = 4
DEFAULT_BLOCK = 32  # values that an OFT rotates together, as in PEFT and OneTrainer


class FrozenModelOptions(Options, title="frozen model"):
    """What is added to the frozen model in training steps only."""

    training_adapter: Path | None = option(
        "LoRA file that the model has only in training steps, such as one that undoes a distillation: "
        "samples, the validation loss and what is saved are without it",
        place="there",
        facts=FREE,
    )
    training_adapter_multiplier: float = option(
        "strength of --training_adapter",
        default=1.0,
        least=-MOST_MULTIPLIER,
        most=MOST_MULTIPLIER,
        needs="training_adapter",
        hint="1 is usual",
        facts=FREE,
    )


NOTHING_FROZEN = FrozenModelOptions.usual()


class NetworkOptions(Options, title="network"):
    """Options of the network that `--network_module` builds and trains."""

    network_module: str | None = option(
        "module that builds the network: networks.lora, networks.loha, networks.lokr, networks.oft (its "
        "--network_dim is the number of values in a block, 32 by default), or another package's, such as "
        "lycoris.kohya; default: the family's LoRA",
        often=True,
        facts={**IDENTITY, **IMPORTS_MODULE},
    )
    network_dim: int | None = option(
        "rank of the network; default 4",
        least=1,
        hint="the rank",
        acts_if={"--dim_from_weights takes ranks from the file": lambda typed: not typed.dim_from_weights},
        often=True,
        facts=IDENTITY,
    )
    network_alpha: float = option(
        "strength is alpha / rank; 0 means alpha = rank",
        default=1,
        least=0,
        most=1_000_000,
        hint="0 means alpha = rank",
        acts_if={
            "the alphas in the file of --network_weights count": lambda typed: typed.network_weights is None,
            "an OFT has no alpha": lambda typed: not typed.is_oft,
        },
        often=True,
        facts=IDENTITY,
    )
    network_dropout: float | None = option(
        "share of the values between the two factors that is set to zero during training; of an OFT the "
        "share of blocks that do not rotate",
        least=0,
        below=1,
        facts=HABIT,
    )
    network_args: tuple[str, ...] | None = option(
        "further settings, e.g. rank_dropout=0.1 \"exclude_patterns=[r'.*ffn.*']\"",
        metavar="KEY=VALUE",
        facts=IDENTITY,
    )
    network_weights: Path | None = option(
        "LoRA file to start from; parts that do not fit are logged", place="there", facts=FREE
    )
    dim_from_weights: bool = option(
        "take the rank and alpha of each module from --network_weights", needs="network_weights", facts=FREE
    )
    scale_weight_norms: float | None = option(
        "largest norm of a module: after each step, larger ones are scaled down (1 is a good start)",
        above=0,
        hint="leave it out for no limit",
        facts=HABIT,
    )
    lora_format: str | None = option(
        "names of the layers in saved files. known: those of the known tuners (lora_unet_..., with "
        "alphas); comfyui: those of ComfyUI; diffusers: those of diffusers' pipelines. Default: known, "
        "for LTX-2 comfyui, which are the names of its official code. Every script here reads all of them",
        choices=(KNOWN, COMFYUI, DIFFUSERS),
        facts=FREE,
    )
    # resuming compares their names
    base_weights: tuple[Path, ...] | None = option(
        "LoRA files added to the model before training", place="there", facts=FREE
    )
    base_weights_multiplier: tuple[float, ...] | None = option(
        "strength of each file of --base_weights; missing ones are 1", needs="base_weights", facts=HABIT
    )
    lora_rounding: str = lora_rounding_option(facts=HABIT)
    frozen: FrozenModelOptions
    teacher: TeacherOptions

    def __post_init__(self) -> None:
        self.arguments()
        self.base_multipliers(warns=True)

    def arguments(self) -> dict[str, str]:
        if not self.network_args:
            return {}
        return {key: value.strip() for key, value in split_pairs("--network_args", self.network_args).items()}

    @property
    def is_tlora(self) -> bool:
        return self.arguments().get(TLORA, "").lower() == "true"

    @property
    def is_oft(self) -> bool:
        return self.network_module == OFT_MODULE

    @property
    def rank(self) -> int:
        """Return --network_dim, or what it is by default; of an OFT it is the block size."""
        return self.network_dim or (DEFAULT_BLOCK if self.is_oft else DEFAULT_RANK)

    @property
    def decomposes(self) -> bool:
        return self.arguments().get("dora_wd", "").lower() == "true"

    def base_multipliers(self, warns: bool = False) -> tuple[float, ...]:
        """Return one multiplier for each file of --base_weights, as `multipliers_for`."""
        multipliers = self.base_weights_multiplier or ()
        return multipliers_for(self.base_weights or (), multipliers, "--base_weights_multiplier", warns)


class LoraOptions(Options):
    """LoRA files to add to a model."""

    lora_weight: tuple[Path, ...] | None = option(
        "LoRA files to add to the model (LoRA, LoHa, LoKr or OFT, any dialect)", place="there", often=True
    )
    lora_multiplier: tuple[float, ...] = option(
        "strength of each file of --lora_weight; missing ones are 1",
        default=(1.0,),
        only_with="lora_weight",
        often=True,
    )

    def __post_init__(self) -> None:
        self.multipliers(warns=True)

    def multipliers(self, warns: bool = False) -> tuple[float, ...]:
        return multipliers_for(self.lora_weight or (), self.lora_multiplier, "--lora_multiplier", warns)


PATTERN = (
    "regular expression per --lora_weight, searched in tensor names such as "
    "lora_unet_blocks_9_cross_attn_k.lora_up.weight"
)


UNTYPED = "(?#of another option)"  # before a part of a pattern: it may fit nothing


class LoraPatternOptions(Options):
    """Which parts of each LoRA file are used: one regular expression per file, searched in tensor names."""

    include_patterns: tuple[str, ...] | None = option(f"use only tensors that match: one {PATTERN}")
    exclude_patterns: tuple[str, ...] | None = option(f"leave out tensors that match: one {PATTERN}")

    def __post_init__(self) -> None:
        for name in ("include_patterns", "exclude_patterns"):
            for pattern in getattr(self, name) or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise OptionError(f"--{name} {pattern!r} is not a regular expression: {error}") from None

    def also_excluding(self, pattern: str, files: int) -> "LoraPatternOptions":
        """Return these options with `pattern`, which the user did not type, also excluded from each file."""
        typed = self.exclude_patterns or ()
        num_untyped = max(files - len(typed), 0)
        patterns = [f"(?:{typed_pattern})|{UNTYPED}{pattern}" for typed_pattern in typed]
        patterns += [f"{UNTYPED}{pattern}"] * num_untyped
        return replace(self, exclude_patterns=tuple(patterns))


def require_files(option: str, paths: Sequence[Path], folders: str | None = None) -> None:
    """Raise OptionError for the first path that does not exist, before anything heavy is loaded.

    folders: advice for users who give a folder; if set, folders are refused too.
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


def multipliers_for(
    files: Sequence[Path], multipliers: Sequence[float], option: str, warns: bool = False
) -> tuple[float, ...]:
    """Return one multiplier per file: the given ones, then 1.0.

    warns: log multipliers without a file, unless there are no files, when they may be the default. Raises
    OptionError if a multiplier is infinite or NaN.
    """
    surplus = multipliers[len(files) :] if files and warns else ()
    if surplus:
        numbers = " ".join(f"{value:g}" for value in surplus)
        number_of_files = "is 1 file" if len(files) == 1 else f"are {len(files)} files"
        logger.warning("%s: %s is ignored because there %s", option, numbers, number_of_files)
    for value in multipliers:
        if not math.isfinite(value):
            raise OptionError(f"{option} {value}: give a finite number")
        if abs(value) > MOST_MULTIPLIER:
            raise OptionError(f"{option} {value:g}: give at most {MOST_MULTIPLIER}; 0 to 2 are usual")
    return (*multipliers[: len(files)], *(1.0 for _ in files[len(multipliers) :]))

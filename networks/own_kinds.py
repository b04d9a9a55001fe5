"""Our network modules by name: their kinds and settings."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modules.errors import OptionError
from networks.deltas import LORA, OFT
from networks.factored import MakeShapes, loha_shapes, lokr_shapes
from networks.lora_settings import LoraSettings, read_settings
from networks.module_names import FAMILIES
from networks.names.layouts import LoraRules
from networks.options import DEFAULT_BLOCK, OFT_MODULE

MOST_BLOCK = 1024  # values in a block of an OFT


@dataclass(frozen=True)
class NetworkArguments:
    """What the options say of a network: `--network_dim` and so on; None: the default."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # --network_args


@dataclass(frozen=True)
class OwnModule:
    """One of our network modules: a LoRA, or a network of another kind."""

    rules: LoraRules | None = None  # a family's arguments that choose among the modules of its `DitSpec`
    kind: str = "LoRA"
    first: tuple[str, ...] = LORA[:1]  # each module of a file has one of these factors


OWN_MODULES = {
    "networks.lora": OwnModule(),
    "networks.loha": OwnModule(kind="LoHa", first=("hada_w1_a",)),
    "networks.lokr": OwnModule(kind="LoKr", first=("lokr_w1", "lokr_w1_a")),
    OFT_MODULE: OwnModule(kind="OFT", first=(OFT,)),
    # LoRAs under the names that other LoRA tuners have
    **{family.network_module: OwnModule(family.rules) for family in FAMILIES if family.network_module},
}
_SWITCH = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
# settings that are allowed with --dim_from_weights
WITH_FILE = {
    "rank_dropout",
    "module_dropout",
    "verbose",
    "split_qkv",
    "tlora",
    "tlora_min_rank",
    "tlora_alpha",
    "network_reg_lrs",
    "ggpo_sigma",
    "ggpo_beta",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
}


def read_own(name: str, typed: NetworkArguments) -> tuple[LoraSettings, MakeShapes]:
    """Read the settings of one of our modules, and the function for the shapes of a LoHa's or LoKr's factors.

    Of a LoKr, `factor=8` splits sizes into 8 and the remaining factor (-1, the default: as equal as can be);
    `decompose_both=True` gives the smaller matrix two factors too. A `--network_dim` of half the larger
    matrix's side or more keeps that matrix whole.
    Raises OptionError for a setting that is unknown or out of range, or that only LoRAs have.
    """
    module = OWN_MODULES[name]
    arguments = dict(typed.arguments)
    make_shapes: MakeShapes = loha_shapes
    if module.kind == "LoKr":
        factor = arguments.pop("factor", -1)
        decompose_both = str(arguments.pop("decompose_both", False))
        make_shapes = _read_lokr(factor, decompose_both)
    rank = typed.rank
    if module.kind == "OFT" and rank is None:
        rank = DEFAULT_BLOCK
    settings = read_settings(rank, typed.alpha, typed.dropout, arguments=arguments, rules=module.rules)
    ratios = (settings.loraplus_lr_ratio, settings.loraplus_encoder_ratio)
    has_ratio = any(ratio is not None for ratio in ratios)
    of_loras = any((settings.decomposes, settings.reg_rates, settings.perturbation, settings.rank_rule))
    of_loras = of_loras or has_ratio
    if module.kind == "OFT":
        _check_oft(settings, of_loras)
    elif module.kind != "LoRA" and (of_loras or settings.dropouts is not None):
        raise OptionError(
            "--network_dropout, and rank_dropout, module_dropout, dora_wd, loraplus_..., network_reg_lrs, "
            "ggpo_... and tlora of --network_args, are for LoRAs only: leave them out, or use "
            "--network_module networks.lora"
        )
    return settings, make_shapes


def _check_oft(settings: LoraSettings, has_others: bool) -> None:
    """Raise OptionError for settings that an OFT cannot have. has_others: some that only LoRAs have."""
    if has_others or settings.conv_rank is not None:
        raise OptionError(
            f"--network_module {OFT_MODULE} rotates the inputs of linear layers. dora_wd, loraplus_..., "
            "network_reg_lrs, ggpo_..., tlora and conv_dim of --network_args are for LoRAs only: leave them "
            "out, or use --network_module networks.lora"
        )
    if settings.dropouts is not None and settings.dropouts.rank:
        raise OptionError(
            "--network_args rank_dropout: an OFT has no ranks. Use --network_dropout, the share of blocks "
            "that do not rotate in a step, or module_dropout"
        )
    sizes = [settings.rank, *(int(size) for _, size in settings.reg_ranks)]
    if 1 in sizes:
        raise OptionError(
            "--network_dim 1: a block of a single value cannot be rotated. Give 2 or more; 32 is usual"
        )
    if max(sizes) > MOST_BLOCK:
        raise OptionError(
            f"--network_dim {max(sizes)}: {MOST_BLOCK} is the most values in a block of an OFT. Give less; "
            "32 is usual"
        )


def _read_lokr(factor: Any, decompose_both: str) -> MakeShapes:
    """Return the function for the shapes of a LoKr's factors. Raises OptionError for wrong arguments."""
    try:
        size = int(factor)
    except ValueError:
        size = 0
    if size < 1 and size != -1:
        raise OptionError(
            f"--network_args factor={factor}: give a whole number from 1, or -1 for equal parts"
        )
    if decompose_both not in _SWITCH:
        raise OptionError(f"--network_args decompose_both={decompose_both}: give True or False")
    return functools.partial(lokr_shapes, factor=size, decompose_both=_SWITCH[decompose_both])

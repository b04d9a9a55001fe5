"""OFT: adapters that rotate the inputs of frozen layers, block by block.

`oft_rotation.py` computes the rotations, and `networks/train/oft.py` is the trained layer. A file has one
tensor for each layer, `oft_R.weight`: blocks x b (b - 1) / 2 values, for blocks of b inputs.
Sources: Qiu et al. 2023, arXiv 2306.07280; Qiu et al. 2025, arXiv 2506.19847. Files have the names and values
of PEFT's OFT.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modules.errors import CheckpointError, OptionError
from networks.kinds.contract import (
    LORA_ONLY_ARGUMENTS,
    NetworkKind,
    Settings,
)
from networks.kinds.factors import Factors
from networks.names.layouts import COMFYUI, PEFT_FILE

if TYPE_CHECKING:  # --help must not import torch
    from pathlib import Path

    from networks.kinds.oft_rotation import OftAlgebra
    from networks.names.layouts import FamilyNames

MODULE = "networks.oft"
PART = "oft_R.weight"
DEFAULT_BLOCK = 32  # inputs that are rotated together, as in PEFT and OneTrainer
MAX_BLOCK = 1024  # inputs in a block
TERMS = 5  # terms of the series in `oft_rotation.compute_rotations`
BAKE = "convert_lora.py --target other --bake 64 --dit MODEL"


def _find_unsupported_variant(settings: Mapping[str, Any]) -> str | None:
    """Return how PEFT computes the rotations according to its settings; None if it is the 5-term series."""
    if settings.get("use_cayley_neumann") is False:
        return "use_cayley_neumann = false, whose rotations have the opposite direction"
    num_terms = settings.get("num_cayley_neumann_terms", TERMS)
    if num_terms != TERMS:
        return f"a series of {num_terms} terms (num_cayley_neumann_terms)"
    return None


class OftKind(NetworkKind):
    """OFT: rotates blocks of a layer's input channels instead of adding a change to its weight."""

    name = "OFT"
    article = "an"
    parts = (PART,)
    marks = (PART,)
    needs_weight = True
    starts = {"oft_unet_": "ours"}  # sd-scripts
    word = "oft"
    spellings = {r"\.oft_R(?:\.[^.]+)*$": f".{PART}"}  # PEFT's `.oft_R.default.weight`, with any name
    # sd-scripts' networks.oft and LyCORIS' diag-oft, which rotate outputs; PEFT before 0.16
    unread = {f"OFT in an older form than {PART}": (".oft_blocks", ".oft_diag", ".oft_r")}
    read_form = PART
    network_module = MODULE
    algorithms = ("diag-oft",)
    module_note = f"its --network_dim is the number of values in a block, {DEFAULT_BLOCK} by default"
    dropout_note = "for an OFT, the fraction of blocks that do not rotate"
    size_word = "block size"
    default_size = DEFAULT_BLOCK
    has_alpha = False
    has_norms = False
    is_for_texts = False
    is_for_convolutions = False
    other_modules = {
        "networks.oft_v2": f"this variant of OFT is {MODULE} here. Pass that",
        "networks.boft": f"BOFT is not supported: only sd-scripts reads its files. Use {MODULE}",
    }
    not_in_comfyui = "ComfyUI cannot read an OFT of this form: its own rotates the outputs of a layer"
    rejection_by_comfyui = (
        f"is an OFT, which ComfyUI cannot read in this form.\n  Convert it to a plain LoRA: {BAKE}."
    )
    start_in_peft = "base_model.model."
    no_two_experts = (
        "--target diffusers writes an OFT as PEFT does, for a single network, not for two experts. Select "
        "one with --expert high_noise or low_noise, or write two files with --output_high_noise"
    )
    elsewhere = (
        "PEFT reads an OFT without changes (convert_lora.py --target diffusers). ComfyUI and the known "
        "tuners do not: they need a plain LoRA, which keeps only a part of the change."
    )
    plain_title = "Make a plain LoRA of the OFT"

    def load_algebra(self) -> "OftAlgebra":
        """Return the object that computes block rotations from the factors (OFT)."""
        from networks.kinds.oft_rotation import OftAlgebra  # torch

        return OftAlgebra(PART)

    def check_file(self, path: "Path") -> None:
        """Raise CheckpointError if PEFT's settings say that rotations do not use the 5-term series.

        The tensors do not reveal how rotations were computed in training. PEFT's exact rotations have the
        opposite direction.

        Args:
            path: File of the OFT, or its folder.
        """
        from modules.text_files import parse_json, read_text  # only with an OFT

        folder = path if path.is_dir() else path.parent
        settings_path = folder / PEFT_FILE
        is_peft_adapter = path.is_dir() or path.name.startswith("adapter_model")
        if not is_peft_adapter or not settings_path.is_file():
            return
        try:
            settings = dict(parse_json(read_text(settings_path)))
        except (ValueError, TypeError, OSError, RecursionError) as error:
            raise CheckpointError(
                f"{settings_path}, which describes the rotations of {path}, cannot be read: {error}. Copy it "
                "again.",
                path,
            ) from error
        variant = _find_unsupported_variant(settings)
        if variant is not None:
            raise CheckpointError(
                f"{path} is an OFT with {variant} according to {PEFT_FILE}, which is not supported.\n"
                f"  Only PEFT's default, the series of {TERMS} terms, is supported. Train with that, or "
                "merge with PEFT.",
                path,
            )

    def size_of(self, factors: Factors) -> int | None:
        """Return the block size of a module's OFT rotations; None if it has no rotations."""
        from networks.kinds.oft_rotation import find_block_size  # torch

        if PART not in factors or factors[PART].ndim != 2:
            return None
        return find_block_size(factors[PART].shape[1])

    def check_settings(self, settings: Settings, has_lora_arguments: bool) -> None:
        """Raise OptionError for settings that an OFT does not support.

        Args:
            settings: Settings of the network.
            has_lora_arguments: Whether any argument in `LORA_ONLY_ARGUMENTS` is set.
        """
        if has_lora_arguments or settings.conv_rank is not None:
            raise OptionError(
                f"--network_module {MODULE} rotates the inputs of linear layers. "
                f"{', '.join(LORA_ONLY_ARGUMENTS)} and conv_dim of --network_args are for LoRAs only: "
                "omit them, or use --network_module networks.lora"
            )
        if settings.has_rank_dropout:
            raise OptionError(
                "--network_args rank_dropout: an OFT has no ranks. Use --network_dropout, the share of "
                "blocks that do not rotate in a step, or module_dropout"
            )
        block_sizes = [settings.rank, *settings.ranks_by_pattern]  # --network_dim of an OFT
        if 1 in block_sizes:
            raise OptionError(
                "--network_dim 1: a block of a single value cannot be rotated. Pass 2 or more; 32 is usual"
            )
        if max(block_sizes) > MAX_BLOCK:
            raise OptionError(
                f"--network_dim {max(block_sizes)}: {MAX_BLOCK} is the most values in a block of an OFT. "
                "Use less; 32 is usual"
            )

    def find_format_error(self, name: str, family: "FamilyNames | None", has_texts: bool) -> str:
        """Return why ComfyUI cannot read this kind of OFT; "" for other formats."""
        if name != COMFYUI:
            return ""
        return (
            "ComfyUI cannot read an OFT of this form. Use --lora_format known, and convert it to a plain "
            f"LoRA afterwards ({BAKE})"
        )


OFT = OftKind()

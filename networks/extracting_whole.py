"""Take a LoRA out of a fine-tuned Stable Diffusion checkpoint: the low-rank part of what training changed."""
# Letters: R rank

import json
import re
import time
from collections.abc import Iterator
from logging import getLogger

import torch
from torch import Tensor

from modules.atomic_write import save_tensors
from modules.checkpoints.finite import FiniteCheck
from modules.checkpoints.opening import Checkpoint, open_checkpoint
from modules.console import as_size, in_words, show_box
from modules.devices import choose_device
from modules.errors import CheckpointError
from networks.combining import as_known
from networks.deltas import LORA
from networks.extracting import decompose_change
from networks.hashes import add_hashes
from networks.image_tools_options import ExtractOptions
from networks.key_formats import OURS, module_of_tensor
from networks.merging_flux import DTYPES
from networks.module_names import alias, choose_family, replace_dots
from networks.names.layouts import FamilyNames
from networks.names.stable_diffusion import SD1, SD2, SDXL
from networks.whole_checkpoints import TensorPiece, is_whole, pieces_of

logger = getLogger(__name__)
# of the U-Net: matrices and 1x1 convolutions of its attention blocks, as sd-scripts trains them
_ATTENTION = re.compile(
    r"_attentions_\d+_(proj_in|proj_out|transformer_blocks_.*_(to_[qkv]|to_out_0|proj|2))$"
)
# with a rank for convolutions: those of residual blocks and between levels, and the matrix of the time
_RESIDUAL = re.compile(r"_(resnets_\d+_(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers_0_conv)$")
_WEIGHTS = ("weight", "bias")
_IN_TEXT = re.compile(r"_encoder_layers_\d+_(self_attn_\w+_proj|mlp_fc[12])$")


def extract_whole(options: ExtractOptions) -> None:
    """Write a LoRA whose product is near the difference of two checkpoints, tensor by tensor.

    Of a text encoder there is nothing if no value of it has changed by more than `min_diff`. Factors are
    U * S and V^T, limited to a quantile of their values; alpha is the rank. Memory: one weight of each
    checkpoint, and the LoRA. Raises CheckpointError if the two are not of the same model.
    """
    start, device = time.monotonic(), choose_device(options.device)
    dtype = DTYPES[options.save_precision or "float"]
    factors: dict[str, Tensor] = {}
    with open_checkpoint(options.model_org) as original, open_checkpoint(options.model_tuned) as tuned:
        family = _compare(original, tuned)
        checks = FiniteCheck(original.path), FiniteCheck(tuned.path)
        same = _unchanged_texts(original, tuned, options.min_diff)
        for name in original.tensors:
            pieces = [one for one in pieces_of(name) if one.network not in same]
            wanted = [(one, _module(one, family)) for one in pieces if one.name.endswith(".weight")]
            ranks = [(one, module, _rank(module, options)) for one, module in wanted]
            if not any(rank for _, _, rank in ranks):
                continue
            before, after = original.read(name), tuned.read(name)
            checks[0].note(name, before)
            checks[1].note(name, after)
            change = after.to(device, torch.float32) - before.to(device, torch.float32)
            for piece, module, rank in ranks:
                if rank:
                    factors |= _factors(module, piece.of(change), rank, options.clamp_quantile, dtype)
    metadata = _metadata(options, family)
    tensors = as_known(factors, family)
    save_tensors(options.save_to, tensors, add_hashes(tensors, metadata))
    rows = [
        ("original", str(options.model_org)),
        ("fine-tuned", str(options.model_tuned)),
        ("LoRA", f"{options.save_to} ({as_size(options.save_to.stat().st_size)}), rank {options.dim}"),
        ("modules", f"{len(factors) // 3} of {family.name}"),
        ("time", in_words(time.monotonic() - start)),
    ]
    show_box("The LoRA is extracted", rows)


def _factors(
    module: str, change: Tensor, rank: int, quantile: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    down, up = decompose_change(change.flatten(1), rank, quantile, module)
    ones = [1] * (change.ndim - 2)
    return {
        f"{module}.{LORA[0]}": down.unflatten(1, change.shape[1:]).to("cpu", dtype).contiguous(),
        f"{module}.{LORA[1]}": up.reshape(*up.shape, *ones).to("cpu", dtype).contiguous(),
        f"{module}.alpha": torch.tensor(float(len(down))),
    }


def _module(piece: TensorPiece, family: FamilyNames) -> str:
    """Return the name of a weight's module in LoRA files, ours."""
    if not piece.network:
        return OURS + alias(module_of_tensor(piece.name)[0], family)
    return f"{piece.network}_{replace_dots(piece.name.removesuffix('.weight'))}"


def _rank(module: str, options: ExtractOptions) -> int:
    """Return the rank of a module's LoRA; 0: it gets none."""
    if module.startswith(OURS):
        if _ATTENTION.search(module):
            return options.dim
        return (options.conv_dim or 0) if _RESIDUAL.search(module) else 0
    return options.dim if _IN_TEXT.search(module) else 0


def _compare(original: Checkpoint, tuned: Checkpoint) -> FamilyNames:
    """Return what both are. Raises CheckpointError if they are not the same kind of checkpoint."""
    for checkpoint in (original, tuned):
        if not is_whole(checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.path} is no single-file checkpoint of Stable Diffusion: it has no U-Net "
                "together with text encoders, as model.diffusion_model... and cond_stage_model... or "
                "conditioner...\n"
                "  Give such files to --model_org and --model_tuned.",
                checkpoint.path,
            )
    # weights and biases: numbers of positions, which many files leave out, are no part of a LoRA
    shapes = [
        {name: one.tensors[name].shape for name in one.tensors if name.endswith(_WEIGHTS) and pieces_of(name)}
        for one in (original, tuned)
    ]
    wrong = sorted(
        name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
    )
    if wrong:
        found = " and ".join(str(list(one[wrong[0]])) if wrong[0] in one else "missing" for one in shapes)
        raise CheckpointError(
            f"{original.path} and {tuned.path} are not the same model: {wrong[0]} is {found}. Give a model "
            "and its fine-tuned version.",
            tuned.path,
        )
    names = [
        module_of_tensor(piece.name)[0]
        for name in shapes[0]
        for piece in pieces_of(name)
        if not piece.network
    ]
    if any(name.startswith("cond_stage_model.model.") for name in shapes[0]):
        return SD2
    return SDXL if choose_family(names) is SDXL else SD1


def _unchanged_texts(original: Checkpoint, tuned: Checkpoint, least: float) -> set[str]:
    """Return the text encoders of which no value has changed by more than `least`."""
    changed: dict[str, bool] = {}
    for name, network in _text_tensors(original):
        if not changed.get(network):
            change = (tuned.read(name).float() - original.read(name).float()).abs()
            changed[network] = bool(change.numel() and float(change.max()) > least)
    same = {network for network, has_changed in changed.items() if not has_changed}
    if same:
        logger.info(
            f"{tuned.path}: no value of {', '.join(sorted(same))} has changed by more than {least:g}, so the "
            "LoRA has nothing for it"
        )
    return same


def _text_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    for name in checkpoint.tensors:
        pieces = pieces_of(name)
        if pieces and pieces[0].network and name.endswith("weight"):
            yield name, pieces[0].network


def _metadata(options: ExtractOptions, family: FamilyNames) -> dict[str, str]:
    rank = options.conv_dim
    arguments = {} if rank is None else {"conv_dim": str(rank), "conv_alpha": str(float(rank))}
    metadata = {
        "ss_v2": str(family is SD2),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(options.dim),
        "ss_network_alpha": str(float(options.dim)),
        "ss_network_args": json.dumps(arguments),
        "ss_base_model_version": family.written_version,
    }
    if not options.no_metadata:
        metadata |= {
            "modelspec.architecture": f"{family.architecture}/lora",
            "modelspec.title": f"Extracted LoRA from {options.model_tuned.name}",
        }
    return metadata

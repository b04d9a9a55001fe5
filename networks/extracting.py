"""Extract a LoRA from a fine-tuned model or checkpoint: the low-rank part of its change."""
# Letters: R rank

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from logging import getLogger
from typing import NamedTuple

import torch
from torch import Tensor

from modules.checkpoints.dits import bare_names
from modules.checkpoints.finite import check_finite
from modules.checkpoints.kinds import kind_of
from modules.checkpoints.opening import Checkpoint, open_checkpoint
from modules.checkpoints.quantising import in_values
from modules.checkpoints.writing import save_tensors
from modules.console import as_size, in_words, show_box
from modules.devices import choose_device
from modules.errors import CheckpointError
from modules.seeds import derive_seed
from networks.deltas import LORA
from networks.key_formats import module_of_tensor
from networks.merging import DTYPES, as_known
from networks.metadata import add_hashes
from networks.module_names import alias, choose_family, family_named, has_module
from networks.names.layouts import OURS, FamilyNames
from networks.text_loras import TensorPiece, is_whole, pieces_of
from networks.tool_options import MIN_DIFF, ExtractOptions

logger = getLogger(__name__)
OVERSAMPLING, POWERS = 16, 4  # of the randomised decomposition
EXACT_BELOW = 512  # up to this side, matrices are decomposed in full
# of the U-Net: matrices and 1x1 convolutions of its attention blocks, as sd-scripts trains them
_ATTENTION = re.compile(
    r"_attentions_\d+_(proj_in|proj_out|transformer_blocks_.*_(to_[qkv]|to_out_0|proj|2))$"
)
# with a rank for convolutions: those of residual blocks and between levels, and the matrix of the time
_RESIDUAL = re.compile(r"_(resnets_\d+_(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers_0_conv)$")
_WEIGHTS = ("weight", "bias")
_IN_TEXT = re.compile(r"_encoder_layers_\d+_(self_attn_\w+_proj|mlp_fc[12])$")


# tensor -> the modules that get a LoRA of it or of a part of it: the name in LoRA files, the rank, what the
# random numbers of the decomposition depend on, and the part
Wanted = Mapping[str, Sequence[tuple[str, int, str, TensorPiece]]]
Pair = tuple[Checkpoint, Checkpoint]  # the model before fine-tuning, and after it


class BlockWeights(NamedTuple):
    """The weights of a transformer to extract a LoRA for: the matrices of its blocks."""

    model: str
    lists: tuple[str, ...]  # of its blocks
    example: str  # a tensor that every such model has

    def of(self, checkpoint: Checkpoint) -> list[str]:
        return [
            name
            for name, info in checkpoint.tensors.items()
            if name.startswith(self.lists) and name.endswith(".weight") and len(info.shape) == 2
        ]


FLUX_2, QWEN_IMAGE = family_named("flux_2"), family_named("qwen_image")
SD1, SD2, SDXL = map(family_named, ("sd1", "sd2", "sdxl"))
FLUX = BlockWeights(
    "FLUX.1, FLUX.2 or Chroma", ("double_blocks.", "single_blocks."), "double_blocks.0.img_attn.qkv.weight"
)
FLUX_MODULE = "networks.lora_flux"  # of FLUX.1 and Chroma
QWEN = BlockWeights("Qwen-Image", ("transformer_blocks.",), "transformer_blocks.0.img_mod.1.weight")


def extract_flux(options: ExtractOptions) -> None:
    """Write the LoRA of a FLUX.1, FLUX.2 or Chroma model, as `_extract_blocks`."""

    def names_of(original: Checkpoint) -> tuple[str, str, str]:
        if "double_stream_modulation_img.lin.weight" in original.tensors:
            return (FLUX_2.network_module, FLUX_2.name, FLUX_2.architecture)
        is_chroma = any(name.startswith("distilled_guidance_layer.") for name in original.tensors)
        return (FLUX_MODULE, *(("chroma", "chroma") if is_chroma else ("flux1", "flux-1-dev")))

    _extract_blocks(options, FLUX, names_of)


def extract_qwen(options: ExtractOptions) -> None:
    """Write the LoRA of a Qwen-Image model, as `_extract_blocks`; modulation layers get one too."""
    names = (QWEN_IMAGE.network_module, QWEN_IMAGE.name, QWEN_IMAGE.architecture)
    _extract_blocks(options, QWEN, lambda _: names)


def extract_model(options: ExtractOptions) -> None:
    """Write the LoRA of a transformer of any family, as `_extract_blocks`, or of a whole checkpoint."""
    with open_checkpoint(options.model_org) as original:
        if is_whole(original.tensors):
            return extract_whole(options)
        everything = BlockWeights("", ("",), "").of(bare_names(original))
    modules = {module_of_tensor(name)[0]: name for name in everything}
    family = choose_family(modules)
    known = [name for one, name in modules.items() if family is not None and has_module(one, family)]
    if family is None or not known:
        raise CheckpointError(
            f"{options.model_org} has layers of no model here, by their published names. Give such a "
            "transformer, or a single-file checkpoint of Stable Diffusion, to --model_org.",
            options.model_org,
        )
    if family.network_module == FLUX_MODULE:
        return extract_flux(options)
    if family.written_version:
        raise CheckpointError(
            f"{options.model_org} is the U-Net alone of a Stable Diffusion checkpoint. Give whole "
            "checkpoints, in a single file each, to --model_org and --model_tuned.",
            options.model_org,
        )
    for option, given in (
        ("--conv_dim", options.conv_dim is not None),
        ("--min_diff", options.min_diff != MIN_DIFF),
    ):
        if given:
            logger.warning("%s is ignored because the LoRA is for a transformer", option)
    names = (family.network_module, family.name, family.architecture)
    return _extract_blocks(options, BlockWeights(family.name, tuple(known), known[0]), lambda _: names)


def _extract_blocks(
    options: ExtractOptions, weights: BlockWeights, names_of: Callable[[Checkpoint], tuple[str, str, str]]
) -> None:
    """Write the LoRA of a transformer's blocks, as `_extract`.

    names_of: returns network module, base version and architecture of the original, for the metadata. Raises
    CheckpointError if these tensors are missing or differ in shape.
    """
    with open_checkpoint(options.model_org) as one, open_checkpoint(options.model_tuned) as other:
        pair = _values_of_both(bare_names(one), bare_names(other))
        for checkpoint in pair:
            if weights.example not in checkpoint.tensors:
                kind = kind_of(checkpoint.tensors)
                raise CheckpointError(
                    f"{checkpoint.path} has no blocks of {weights.model}, as {weights.example}."
                    f"{f' It is {kind}.' if kind else ''}\n"
                    "  Give a model with the published names to --model_org and --model_tuned.",
                    checkpoint.path,
                )
        names = [weights.of(checkpoint) for checkpoint in pair]
        _check_same_shapes(pair, names)
        wanted: Wanted = {
            name: [(OURS + module_of_tensor(name)[0], options.dim, name, TensorPiece("", name))]
            for name in names[0]
        }
        _extract(options, pair, wanted, _metadata(options, *names_of(pair[0])), None)


def _values_of_both(original: Checkpoint, tuned: Checkpoint) -> Pair:
    pair = in_values(original), in_values(tuned)
    if rounded := [
        one.path.name for one, values in zip((original, tuned), pair, strict=True) if one is not values
    ]:
        logger.warning(
            "%s: quantised. What rounding has changed is a difference of the models too, and will be in the "
            "LoRA, often larger than what was learned. Give files in 16 bits if there are any",
            " and ".join(rounded),
        )
    return pair


def extract_whole(options: ExtractOptions) -> None:
    """Write the LoRA of a Stable Diffusion checkpoint, as `_extract`.

    A text encoder is left out if none of its values has changed by more than `min_diff`. Raises
    CheckpointError if the two are not of the same model.
    """
    with open_checkpoint(options.model_org) as original, open_checkpoint(options.model_tuned) as tuned:
        pair = _values_of_both(original, tuned)
        family = _family_of_both(pair)
        same = _unchanged_texts(pair, options.min_diff)
        wanted: dict[str, list[tuple[str, int, str, TensorPiece]]] = {}
        for name in pair[0].tensors:
            wanted[name] = []
            for one in pieces_of(name):
                if not one.name.endswith(".weight") or one.network in same:
                    continue
                if one.network:
                    module = f"{one.network}_{one.name.removesuffix('.weight').replace('.', '_')}"
                    own = options.dim if _IN_TEXT.search(module) else 0
                else:
                    module = OURS + alias(module_of_tensor(one.name)[0], family)
                    own = (options.conv_dim or 0) if _RESIDUAL.search(module) else 0
                    own = options.dim if _ATTENTION.search(module) else own
                if own:
                    wanted[name].append((module, own, module, one))
        rank = options.conv_dim
        arguments = {} if rank is None else {"conv_dim": str(rank), "conv_alpha": str(float(rank))}
        version, kind = family.written_version, family.architecture
        metadata = _metadata(options, "networks.lora", version, kind, family is SD2, arguments)
        _extract(options, pair, wanted, metadata, family)


def _extract(
    options: ExtractOptions,
    pair: Pair,
    wanted: Wanted,
    metadata: Mapping[str, str],
    family: FamilyNames | None,
) -> None:
    """Write a LoRA whose product is near the difference of two models, tensor by tensor.

    Factors are U * S and V^T, limited to a quantile of their values; alpha is the rank. Memory: one weight of
    each model, and the LoRA. wanted: by names of tensors. family: its aliases name the modules.
    """
    start, device = time.monotonic(), choose_device(options.device)
    dtype = DTYPES[options.save_precision or "float"]
    factors: dict[str, Tensor] = {}
    is_changed = False
    for name in (name for name, modules in wanted.items() if modules):
        before, after = (checkpoint.read(name) for checkpoint in pair)
        for checkpoint, tensor in zip(pair, (before, after), strict=True):
            check_finite(checkpoint.path, name, tensor)
        whole = after.to(device, torch.float32) - before.to(device, torch.float32)
        is_changed = is_changed or bool(whole.any())
        for module, rank, seed, piece in wanted[name]:
            change = piece.of(whole)
            down, up = decompose_change(change.flatten(1), rank, options.clamp_quantile, seed)
            down, up = down.unflatten(1, change.shape[1:]), up.reshape(*up.shape, *[1] * (change.ndim - 2))
            factors[f"{module}.{LORA[0]}"] = down.to("cpu", dtype).contiguous()
            factors[f"{module}.{LORA[1]}"] = up.to("cpu", dtype).contiguous()
            factors[f"{module}.alpha"] = torch.tensor(float(len(down)))
    if factors and not is_changed:
        raise CheckpointError(
            f"{options.model_tuned} has the weights of {options.model_org}: there is no change to extract. "
            "Give the fine-tuned model to --model_tuned.",
            options.model_tuned,
        )
    tensors = as_known(factors, family)
    save_tensors(options.save_to, tensors, add_hashes(tensors, metadata))
    rows = [
        ("original", str(options.model_org)),
        ("fine-tuned", str(options.model_tuned)),
        ("LoRA", f"{options.save_to} ({as_size(options.save_to.stat().st_size)}), rank {options.dim}"),
        ("modules", f"{len(factors) // 3}{'' if family is None else f' of {family.name}'}"),
        ("time", in_words(time.monotonic() - start)),
    ]
    show_box("The LoRA is extracted", rows)


def decompose_change(change: Tensor, rank: int, quantile: float, name: str) -> tuple[Tensor, Tensor]:
    """Return down R x in and up out x R whose product approximates a change of a weight, out x in.

    The singular vectors come from a randomised decomposition (Halko et al. 2011, arXiv 0909.4061), from
    random numbers that depend on the name alone. Small matrices are decomposed in full.
    """
    rank = min(rank, *change.shape)
    width = min(rank + OVERSAMPLING, *change.shape)
    if min(change.shape) <= EXACT_BELOW:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(derive_seed(0, name))
        basis = change @ torch.randn(change.shape[1], width, generator=generator).to(change.device)
        for _ in range(POWERS):
            basis = change @ (change.T @ torch.linalg.qr(basis)[0])
        basis = torch.linalg.qr(basis)[0]
        small, s, vh = torch.linalg.svd(basis.T @ change, full_matrices=False)
        u = basis @ small
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    if quantile < 1:
        # signs are arbitrary in a decomposition, but the quantile depends on them
        signs = down.gather(1, down.abs().argmax(dim=1, keepdim=True)).sign()
        up, down = up * signs.T, down * signs
        # by sorting, as torch.quantile takes 16 million values at most
        ordered = torch.cat([up.flatten(), down.flatten()]).sort().values
        place = quantile * (len(ordered) - 1)
        low = int(place)
        limit = torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    return down, up


def _check_same_shapes(pair: Pair, names: Sequence[Sequence[str]]) -> None:
    """Raise CheckpointError if one model lacks a tensor or has another shape. names: of each model."""
    shapes = [{name: one.tensors[name].shape for name in own} for one, own in zip(pair, names, strict=True)]
    wrong = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
    if wrong:
        found = " and ".join(str(list(one[wrong[0]])) if wrong[0] in one else "missing" for one in shapes)
        raise CheckpointError(
            f"{pair[0].path} and {pair[1].path} are not the same model: {wrong[0]} is {found}. Give a model "
            "and its fine-tuned version.",
            pair[1].path,
        )


def _family_of_both(pair: Pair) -> FamilyNames:
    """Return the common family. Raises CheckpointError if the two are different kinds of checkpoint."""
    for checkpoint in pair:
        if not is_whole(checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.path} is no single-file checkpoint of Stable Diffusion: it has no U-Net "
                "together with text encoders, as model.diffusion_model... and cond_stage_model... or "
                "conditioner...\n"
                "  Give such files to --model_org and --model_tuned.",
                checkpoint.path,
            )
    # only weights and biases: position ids, which many files lack, are no part of a LoRA
    names = [[name for name in one.tensors if name.endswith(_WEIGHTS) and pieces_of(name)] for one in pair]
    _check_same_shapes(pair, names)
    if any(name.startswith("cond_stage_model.model.") for name in names[0]):
        return SD2
    pieces = (piece for name in names[0] for piece in pieces_of(name))
    modules = [module_of_tensor(piece.name)[0] for piece in pieces if not piece.network]
    return SDXL if choose_family(modules) is SDXL else SD1


def _unchanged_texts(pair: Pair, least: float) -> set[str]:
    """Return the text encoders whose values all changed by at most `least`."""
    original, tuned = pair
    changed: dict[str, bool] = {}
    for name in (name for name in original.tensors if name.endswith("weight")):
        network = next((piece.network for piece in pieces_of(name)), "")
        if network and not changed.get(network):
            change = (tuned.read(name).float() - original.read(name).float()).abs()
            changed[network] = bool(change.numel() and float(change.max()) > least)
    same = {network for network, has_changed in changed.items() if not has_changed}
    if same:
        logger.info(
            f"{tuned.path}: no value of {', '.join(sorted(same))} has changed by more than {least:g}, so the "
            "LoRA has nothing for it"
        )
    return same


def _metadata(
    options: ExtractOptions,
    module: str,
    version: str,
    kind: str,
    is_v2: bool = False,
    arguments: Mapping[str, str] | None = None,
) -> dict[str, str]:
    metadata = {
        "ss_v2": str(is_v2),
        "ss_network_module": module,
        "ss_network_dim": str(options.dim),
        "ss_network_alpha": str(float(options.dim)),
        "ss_network_args": json.dumps(arguments or {}),
        "ss_base_model_version": version,
    }
    if not options.no_metadata:
        metadata["modelspec.architecture"] = f"{kind}/lora"
        metadata["modelspec.title"] = f"Extracted LoRA from {options.model_tuned.name}"
    return metadata

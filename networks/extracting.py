"""Extract a LoRA from a fine-tuned model or checkpoint: the low-rank part of its change."""
# Letters: R rank

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints.dits import bare_names
from checkpoints.finite import check_finite
from checkpoints.kinds import describe_file_kind
from checkpoints.opening import Checkpoint, open_checkpoint
from checkpoints.quantizing import dequantized_on_read
from checkpoints.writing import save_tensors
from modules.console import format_count, format_duration, format_size, show_box
from modules.devices import select_device
from modules.errors import CheckpointError
from modules.options import Options, not_needed, option
from modules.seeds import derive_seed
from networks.key_formats import split_tensor_name
from networks.kinds.factors import DOWN, UP
from networks.merging import BY_TENSOR, DTYPES, ONLY_NEEDED, PRECISIONS, in_known_names
from networks.metadata import add_hashes
from networks.module_names import family_named, from_alias, has_module, select_family
from networks.names.layouts import OURS, FamilyNames
from networks.names.texts import TEXT_PROJECTION
from networks.rows_by_head import with_stacked_rows
from networks.text_loras import TensorPiece, is_full, list_pieces

MIN_DIFF = 0.01
NON_DIT_OPTIONS = ("conv_dim", "min_diff")  # of `ExtractOptions`: options that do not apply to a DiT

logger = getLogger(__name__)
OVERSAMPLING = 16  # extra columns of the randomized SVD
POWER_ITERATIONS = 4
MAX_EXACT = 512  # matrices whose smaller side is at most this get an exact SVD
# U-Net: matrices and 1x1 convolutions of attention blocks, as sd-scripts trains them
_ATTENTION = re.compile(
    r"_attentions_\d+_(proj_in|proj_out|transformer_blocks_.*_(to_[qkv]|to_out_0|proj|2))$"
)
# U-Net with --conv_dim: convolutions of residual blocks and between levels, and the time projection
_RESIDUAL = re.compile(r"_(resnets_\d+_(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers_0_conv)$")
_WEIGHTS = ("weight", "bias")
_IN_TEXT = re.compile(rf"_(encoder_layers_\d+_(self_attn_\w+_proj|mlp_fc[12])|{TEXT_PROJECTION})$")


class ExtractOptions(Options):
    """Options for extracting a LoRA; scripts for one transformer omit those in `NON_DIT_OPTIONS`."""

    model_org: Path = option(
        "the model before fine-tuning: a file, or the folder of a transformer", place="there", required=True
    )
    model_tuned: Path = option("the fine-tuned model", place="there", required=True)
    conv_dim: int | None = option(
        "rank for residual blocks and convolutions; default: they get no LoRA", minimum=1
    )
    min_diff: float = option(
        "a text encoder gets no LoRA unless one of its values has changed by more than this",
        default=MIN_DIFF,
        minimum=0,
    )
    save_precision: str | None = option("dtype of the LoRA; default: float", choices=PRECISIONS)
    save_to: Path = option(
        "LoRA file to write",
        place="safetensors",
        must_not_replace=("model_org", "model_tuned"),
        required=True,
    )
    dim: int = option("rank of the LoRA", default=4, minimum=1)
    device: str | None = option("device that computes; default: CUDA if available, else the CPU")
    clamp_quantile: float = option(
        "limit the factors to this quantile of their values; 1: no limit", default=0.99, above=0.5, maximum=1
    )
    no_metadata: bool = option(ONLY_NEEDED)


class BlockExtractOptions(Options):
    """Options that only `networks/flux_extract_lora.py` and `qwen_extract_lora.py` have."""

    mem_eff_safe_open = not_needed(BY_TENSOR)


class FullExtractOptions(Options):
    """Options that only `networks/extract_lora_from_models.py` has."""

    v2 = not_needed("the files say what they are.")
    v_parameterization = not_needed("the files say what they are.")
    sdxl = not_needed("the files say what they are.")
    load_precision = not_needed("it is computed in float.", choices=PRECISIONS)
    load_original_model_to = not_needed(BY_TENSOR, type=str)
    load_tuned_model_to = not_needed(BY_TENSOR, type=str)


class ExtractedModule(NamedTuple):
    """A module for which a LoRA is extracted, and the tensor (or part of it) that is its weight."""

    name: str  # in LoRA files
    rank: int
    seed_name: str  # seeds the random numbers of the decomposition
    piece: TensorPiece


Plan = Mapping[str, Sequence[ExtractedModule]]  # tensor name -> modules whose weights the tensor contains


class Pair(NamedTuple):
    """A model before and after fine-tuning."""

    original: Checkpoint
    tuned: Checkpoint


class BaseModelEntries(NamedTuple):
    """Metadata of a LoRA file that describes its base model."""

    module: str  # ss_network_module, which trains such LoRAs
    version: str  # ss_base_model_version
    architecture: str


class BlockWeights(NamedTuple):
    """Selects the transformer weights that are extracted: all 2D weights in its blocks."""

    model: str  # name of the model, for messages
    prefixes: tuple[str, ...]  # of the tensor names of its blocks
    example: str  # a tensor that all these models have
    keeps_unchanged: bool = False  # whether weights that are equal in both models get a LoRA of zeros

    def list_in(self, checkpoint: Checkpoint) -> list[str]:
        """Return the names of a checkpoint's 2D weights inside blocks."""
        return [name for name in _list_matrices(checkpoint) if name.startswith(self.prefixes)]


def _list_matrices(checkpoint: Checkpoint) -> list[str]:
    """Return the names of all 2D weights in a checkpoint."""
    return [
        name for name, info in checkpoint.tensors.items() if name.endswith(".weight") and len(info.shape) == 2
    ]


FLUX_2, QWEN_IMAGE = family_named("flux_2"), family_named("qwen_image")
SD1, SD2, SDXL = map(family_named, ("sd1", "sd2", "sdxl"))
FLUX = BlockWeights(
    "FLUX.1, FLUX.2 or Chroma",
    ("double_blocks.", "single_blocks."),
    "double_blocks.0.img_attn.qkv.weight",
    keeps_unchanged=True,  # as in files of sd-scripts
)
FLUX_MODULE = "networks.lora_flux"  # of FLUX.1 and Chroma
QWEN = BlockWeights("Qwen-Image", ("transformer_blocks.",), "transformer_blocks.0.img_mod.1.weight")


def extract_flux(options: ExtractOptions) -> None:
    """Write the difference between two FLUX.1, FLUX.2 or Chroma models as a LoRA."""

    def get_base_model_entries(original: Checkpoint) -> BaseModelEntries:
        if "double_stream_modulation_img.lin.weight" in original.tensors:
            return _make_base_model_entries(FLUX_2)
        if any(name.startswith("distilled_guidance_layer.") for name in original.tensors):
            return BaseModelEntries(FLUX_MODULE, "chroma", "chroma")
        return BaseModelEntries(FLUX_MODULE, "flux1", "flux-1-dev")

    _extract_blocks(options, FLUX, get_base_model_entries)


def _make_base_model_entries(family: FamilyNames) -> BaseModelEntries:
    return BaseModelEntries(family.network_module, family.name, family.architecture)


def extract_qwen(options: ExtractOptions) -> None:
    """Write the difference between two Qwen-Image models as a LoRA, including modulation layers."""
    _extract_blocks(options, QWEN, lambda _: _make_base_model_entries(QWEN_IMAGE))


def extract_model(options: ExtractOptions) -> None:
    """Write the difference between two transformers of any family, or two full checkpoints, as a LoRA."""
    with open_checkpoint(options.model_org) as original:
        if is_full(original.tensors):
            return extract_full(options)
        matrices = _list_matrices(bare_names(original))
    family, weights = _find_published_weights(options.model_org, matrices)
    if family.network_module == FLUX_MODULE:  # its metadata depends on the variant
        return extract_flux(options)
    is_stable_diffusion = bool(family.written_base_model)
    if is_stable_diffusion:
        raise CheckpointError(
            f"{options.model_org} contains only the U-Net of a Stable Diffusion checkpoint. Pass complete "
            "single-file checkpoints to --model_org and --model_tuned.",
            options.model_org,
        )
    if options.conv_dim is not None:
        logger.warning("%s is ignored because the LoRA is for a transformer", "--conv_dim")
    if options.min_diff != MIN_DIFF:
        logger.warning("%s is ignored because the LoRA is for a transformer", "--min_diff")
    weights = _drop_networks_missing_in(options.model_tuned, weights)
    blocks = BlockWeights(family.name, prefixes=tuple(weights), example=weights[0])
    entries = _make_base_model_entries(family)
    return _extract_blocks(options, blocks, lambda _: entries)


def _find_published_weights(path: Path, matrices: Iterable[str]) -> tuple[FamilyNames, list[str]]:
    """Return the family of a model file, and those of its matrices that belong to the family's modules."""
    modules = {split_tensor_name(name)[0]: name for name in matrices}
    family = select_family(modules)
    if family is not None:
        weights = [name for module, name in modules.items() if has_module(module, family)]
        if weights:
            return family, weights
    raise CheckpointError(
        f"{path} has no layers with the published names of a supported model. Pass such a "
        "transformer, or a single-file checkpoint of Stable Diffusion, to --model_org.",
        path,
    )


def _drop_networks_missing_in(model_tuned: Path, weights: Sequence[str]) -> list[str]:
    """Drop weights of networks that the fine-tuned file lacks, such as LTX-2's connectors (never trained)."""
    with open_checkpoint(model_tuned) as tuned:
        networks = {name.partition(".")[0] for name in bare_names(tuned).tensors}
    remaining = [name for name in weights if name.partition(".")[0] in networks]
    if not remaining:  # a different model: `_extract_blocks` raises the error
        return [*weights]
    missing = sorted({name.partition(".")[0] for name in weights} - networks)
    if missing:
        logger.info("%s has no %s: these get no LoRA", model_tuned, ", ".join(missing))
    return remaining


def _extract_blocks(
    options: ExtractOptions,
    weights: BlockWeights,
    get_base_model_entries: Callable[[Checkpoint], BaseModelEntries],
) -> None:
    """Write the difference between the blocks of two transformers as a LoRA."""
    # 1. Check that both files have the same tensors in their blocks.
    # 2. Plan one LoRA module for each of these weights.
    # 3. Decompose the differences, and write the factors.
    with open_checkpoint(options.model_org) as original, open_checkpoint(options.model_tuned) as tuned:
        pair = _dequantize_both(bare_names(original), bare_names(tuned))
        for checkpoint in pair:
            _require_blocks(checkpoint, weights)
        names = weights.list_in(pair.original)
        _check_same_shapes(pair, names, weights.list_in(pair.tuned))
        plan: dict[str, list[ExtractedModule]] = {}
        for name in names:
            module = ExtractedModule(
                name=OURS + split_tensor_name(name)[0],
                rank=options.dim,
                seed_name=name,
                piece=TensorPiece("", name),
            )
            plan[name] = [module]
        metadata = _make_metadata(options, get_base_model_entries(pair.original))
        _write_difference_lora(
            options,
            pair,
            plan=plan,
            metadata=metadata,
            family=None,
            keeps_unchanged=weights.keeps_unchanged,
        )


def _require_blocks(checkpoint: Checkpoint, weights: BlockWeights) -> None:
    """Raise CheckpointError if a model has no blocks with the published names."""
    if weights.example in checkpoint.tensors:
        return
    kind = describe_file_kind(checkpoint.tensors)
    hint = f" It is {kind}." if kind else ""
    raise CheckpointError(
        f"{checkpoint.path} has no blocks of {weights.model}, such as {weights.example}.{hint}\n"
        "  Pass a model with the published names to --model_org and --model_tuned.",
        checkpoint.path,
    )


def _dequantize_both(original: Checkpoint, tuned: Checkpoint) -> Pair:
    """Return two models with dequantized weights; warn if either was quantized."""
    dequantized = Pair(dequantized_on_read(original), dequantized_on_read(tuned))
    quantized: list[str] = []
    # `dequantized_on_read` returns the same object if no weight is quantized
    if dequantized.original is not original:
        quantized.append(original.path.name)
    if dequantized.tuned is not tuned:
        quantized.append(tuned.path.name)
    if quantized:
        logger.warning(
            "%s: quantized. The LoRA will also contain the rounding errors, which are often larger than what "
            "was learned. Pass 16-bit files if they exist",
            " and ".join(quantized),
        )
    # some released shards order the rows of fused weights by head: use one order for both models
    return Pair(with_stacked_rows(dequantized.original), with_stacked_rows(dequantized.tuned))


def extract_full(options: ExtractOptions) -> None:
    """Write the difference between two Stable Diffusion checkpoints as a LoRA.

    A text encoder is left out if none of its values has changed by more than `min_diff`.

    Raises:
        CheckpointError: If the checkpoints belong to different models.
    """
    with open_checkpoint(options.model_org) as original, open_checkpoint(options.model_tuned) as tuned:
        pair = _dequantize_both(original, tuned)
        family = _find_common_family(pair)
        # The modules that get a LoRA, by tensor; encoders without notable changes get none
        unchanged_encoders = _find_unchanged_texts(pair, options.min_diff)
        plan: dict[str, list[ExtractedModule]] = {}
        for name in pair.original.tensors:
            plan[name] = []
            for piece in list_pieces(name):  # a fused tensor has the weights of several modules
                if piece.text_encoder in unchanged_encoders:
                    continue
                module = _select_module(piece, options, family)
                if module is not None:
                    plan[name].append(module)
        arguments: dict[str, str] = {}
        if options.conv_dim is not None:
            arguments = {"conv_dim": str(options.conv_dim), "conv_alpha": str(float(options.conv_dim))}
        names = BaseModelEntries("networks.lora", family.written_base_model, family.architecture)
        metadata = _make_metadata(options, names, is_v2=family is SD2, arguments=arguments)
        _write_difference_lora(
            options,
            pair,
            plan=plan,
            metadata=metadata,
            family=family,
        )


def _select_module(
    piece: TensorPiece, options: ExtractOptions, family: FamilyNames
) -> ExtractedModule | None:
    """Return the module whose weight is this piece of a full checkpoint; None if it gets no LoRA."""
    if not piece.name.endswith(".weight"):
        return None
    is_text_encoder_weight = bool(piece.text_encoder)
    if is_text_encoder_weight:
        path = piece.name.removesuffix(".weight")
        module = f"{piece.text_encoder}_{path.replace('.', '_')}"
        rank = options.dim if _IN_TEXT.search(module) else None
    else:
        module = OURS + from_alias(split_tensor_name(piece.name)[0], family)
        if _ATTENTION.search(module):
            rank = options.dim
        elif _RESIDUAL.search(module):
            rank = options.conv_dim  # None without --conv_dim
        else:
            rank = None
    if not rank:
        return None
    return ExtractedModule(module, rank, seed_name=module, piece=piece)


def _write_difference_lora(
    options: ExtractOptions,
    pair: Pair,
    plan: Plan,
    metadata: Mapping[str, str],
    family: FamilyNames | None,
    keeps_unchanged: bool = True,
) -> None:
    """Write a LoRA that approximates the difference between two models, tensor by tensor."""
    # The factors are U * S and V^T, clamped to a quantile of their values; alpha is the rank. Peak memory:
    # one weight of each model, and the LoRA.
    start_time = time.monotonic()
    output = options.save_to
    accuracy = ExtractionAccuracy()
    factors = _extract_factors(options, pair, plan, accuracy, keeps_unchanged)
    tensors = in_known_names(factors, family)
    save_tensors(output, tensors, add_hashes(tensors, metadata))
    family_note = "" if family is None else f" of {family.name}"
    rows = [
        ("original", str(options.model_org)),
        ("fine-tuned", str(options.model_tuned)),
        ("LoRA", f"{output} ({format_size(output.stat().st_size)}), rank {options.dim}"),
        ("modules", f"{len(factors) // 3}{family_note}"),  # down, up and alpha of each
        ("kept", f"{accuracy.fraction:.1%} of the change of these modules, by its norm"),
        ("time", format_duration(time.monotonic() - start_time)),
    ]
    show_box("The LoRA is extracted", rows)


@dataclass
class ExtractionAccuracy:
    """Accumulates how much of the models' difference the extracted LoRA reproduces."""

    total: float = 0.0  # sum of the squares of the change
    lost: float = 0.0  # sum of the squares of what the LoRA does not reproduce

    @property
    def fraction(self) -> float:
        """Norm of the preserved change divided by the norm of the change; 1 if nothing changed."""
        if self.total == 0:
            return 1.0
        # kept and lost change are orthogonal in a truncated SVD, so their squares sum to the total
        return max(1 - self.lost / self.total, 0.0) ** 0.5

    def add(self, change: Tensor, product: Tensor) -> None:
        """Add a module's change (out x in), and its difference from the LoRA's product, to the totals."""
        self.total += float(torch.linalg.vector_norm(change)) ** 2
        self.lost += float(torch.linalg.vector_norm(change - product)) ** 2


def _extract_factors(
    options: ExtractOptions,
    pair: Pair,
    plan: Plan,
    accuracy: ExtractionAccuracy,
    keeps_unchanged: bool,
) -> dict[str, Tensor]:
    """Return the LoRA tensors that approximate the difference between two models."""
    device = select_device(options.device)
    dtype = DTYPES[options.save_precision or "float"]
    lora: dict[str, Tensor] = {}
    num_modules = num_unchanged = 0
    for name, modules in plan.items():
        if not modules:
            continue
        difference = _compute_difference(pair, name, device)
        for module in modules:
            # The LoRA factors of a module, on the CPU
            # the part of the tensor that is this module's weight
            change = module.piece.take_rows(difference)
            num_modules += 1
            if not change.any():  # such as layers that a merged LoRA did not have
                num_unchanged += 1
                if not keeps_unchanged:
                    continue
            down, up = decompose_change(
                change.flatten(1), module.rank, options.clamp_quantile, module.seed_name
            )
            accuracy.add(change.flatten(1), up @ down)
            factors = reshape_to_lora(down.to(dtype), up.to(dtype), change.shape)
            lora |= {f"{module.name}.{factor_name}": tensor for factor_name, tensor in factors.items()}
    if num_modules and num_modules == num_unchanged:
        raise CheckpointError(
            f"{options.model_tuned} has the weights of {options.model_org}: there is no change to extract. "
            "Pass the fine-tuned model to --model_tuned.",
            options.model_tuned,
        )
    if num_unchanged and not keeps_unchanged:
        count = format_count(num_unchanged, "module")
        logger.info("equal in both models, so without a LoRA: %s", count)
    return lora


def reshape_to_lora(down: Tensor, up: Tensor, shape: torch.Size) -> dict[str, Tensor]:
    """Reshape two matrices to LoRA factors for a weight of this shape, on the CPU, with alpha = rank."""
    kernel_axes = [1] * (len(shape) - 2)
    return {
        DOWN: down.unflatten(1, shape[1:]).cpu().contiguous(),
        UP: up.reshape(*up.shape, *kernel_axes).cpu().contiguous(),
        "alpha": torch.tensor(float(len(down))),
    }


def _compute_difference(pair: Pair, name: str, device: torch.device) -> Tensor:
    """Return tuned - original of a tensor, float32. Raises CheckpointError for NaN or infinite values."""
    before = pair.original.read(name)
    after = pair.tuned.read(name)
    check_finite(pair.original.path, name, before)
    check_finite(pair.tuned.path, name, after)
    return after.to(device, torch.float32) - before.to(device, torch.float32)


def decompose_change(change: Tensor, rank: int, quantile: float, name: str) -> tuple[Tensor, Tensor]:
    """Return down R x in and up out x R whose product approximates a weight change, out x in.

    Large matrices use a randomized SVD (Halko et al. 2011, arXiv 0909.4061). Small matrices use an exact SVD.

    Args:
        change: The change, out x in.
        rank: Rank of the factors, R; at most the smaller side of the change.
        quantile: Quantile of the factors' values at which they are clamped; 1 for no clamping.
        name: Name of the module, which alone seeds the random numbers.
    """
    rank = min(rank, *change.shape)
    if min(change.shape) <= MAX_EXACT:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        # U, S and V^T of a matrix, accurate for the first `rank` singular values
        # a few more columns than the rank make the first singular values accurate
        width = min(rank + OVERSAMPLING, *change.shape)
        generator = torch.Generator().manual_seed(derive_seed(0, name))
        # columns that span the range of the matrix; each power iteration weakens small singular values
        basis = change @ torch.randn(change.shape[1], width, generator=generator).to(change.device)
        for _ in range(POWER_ITERATIONS):
            basis = change @ (change.T @ torch.linalg.qr(basis)[0])
        basis = torch.linalg.qr(basis)[0]
        u_in_basis, s, vh = torch.linalg.svd(basis.T @ change, full_matrices=False)
        u = basis @ u_in_basis
    up = u[:, :rank] * s[:rank]
    down = vh[:rank]
    if quantile < 1:
        return _limit_values(down, up, quantile)
    return down, up


def _limit_values(down: Tensor, up: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Clamp both factors to a quantile of all their values together."""
    # The signs of an SVD are arbitrary, but the quantile depends on them: make the largest value of each row
    # of `down` positive
    signs = down.gather(1, down.abs().argmax(dim=1, keepdim=True)).sign()
    up = up * signs.T
    down = down * signs
    # sort, because torch.quantile accepts at most 16 million values
    ordered = torch.cat([up.flatten(), down.flatten()]).sort().values
    last = len(ordered) - 1
    position = quantile * last
    below = int(position)
    above = min(below + 1, last)
    limit = torch.lerp(ordered[below], ordered[above], position - below)
    return down.clamp(-limit, limit), up.clamp(-limit, limit)


def _check_same_shapes(pair: Pair, original_names: Sequence[str], tuned_names: Sequence[str]) -> None:
    """Raise CheckpointError unless both models have the same tensors with the same shapes."""
    original_shapes = {name: pair.original.tensors[name].shape for name in original_names}
    tuned_shapes = {name: pair.tuned.tensors[name].shape for name in tuned_names}
    names = sorted(original_shapes.keys() | tuned_shapes.keys())
    different = [name for name in names if original_shapes.get(name) != tuned_shapes.get(name)]
    if different:
        first = different[0]
        descriptions: list[str] = []
        for shapes in (original_shapes, tuned_shapes):
            descriptions.append(str(list(shapes[first])) if first in shapes else "missing")
        raise CheckpointError(
            f"{pair.original.path} and {pair.tuned.path} are not the same model: {first} is "
            f"{' and '.join(descriptions)}. Pass a model and its fine-tuned version.",
            pair.tuned.path,
        )


def _find_common_family(pair: Pair) -> FamilyNames:
    """Return the family of both checkpoints. Raises CheckpointError if their models differ."""
    for checkpoint in pair:
        if not is_full(checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.path} is not a single-file checkpoint of Stable Diffusion: it does not contain "
                "both a U-Net (model.diffusion_model...) and text encoders (cond_stage_model... or "
                "conditioner...).\n"
                "  Pass such files to --model_org and --model_tuned.",
                checkpoint.path,
            )
    names = _list_weight_names(pair.original)
    _check_same_shapes(pair, names, _list_weight_names(pair.tuned))
    if any(name.startswith("cond_stage_model.model.") for name in names):  # OpenCLIP
        return SD2
    pieces = [piece for name in names for piece in list_pieces(name)]
    # SD 1 and SDXL differ in the modules of the U-Net
    unet_modules = [split_tensor_name(piece.name)[0] for piece in pieces if not piece.text_encoder]
    return SDXL if select_family(unet_modules) is SDXL else SD1


def _list_weight_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of weights and biases, without position ids, which many files lack."""
    return [name for name in checkpoint.tensors if name.endswith(_WEIGHTS) and list_pieces(name)]


def _find_unchanged_texts(pair: Pair, minimum: float) -> set[str]:
    """Return the prefixes of text encoders whose values all change by at most `minimum`."""
    is_changed: dict[str, bool] = {}  # by the prefix of the text encoder
    for name in pair.original.tensors:
        pieces = list_pieces(name) if name.endswith("weight") else []
        encoder = pieces[0].text_encoder if pieces else ""  # "" for a tensor of the U-Net
        if not encoder or is_changed.get(encoder):  # no need to read more of an encoder that has changed
            continue
        original = pair.original.read(name).float()
        change = (pair.tuned.read(name).float() - original).abs()
        is_changed[encoder] = bool(change.numel() and float(change.max()) > minimum)
    unchanged = {encoder for encoder, has_changed in is_changed.items() if not has_changed}
    if unchanged:
        logger.info(
            f"{pair.tuned.path}: no value of {', '.join(sorted(unchanged))} has changed by more than "
            f"{minimum:g}, so the LoRA does not change it"
        )
    return unchanged


def _make_metadata(
    options: ExtractOptions,
    names: BaseModelEntries,
    is_v2: bool = False,
    arguments: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the metadata of an extracted LoRA; --no_metadata keeps only what is needed for loading."""
    metadata = {
        "ss_v2": str(is_v2),
        "ss_network_module": names.module,
        "ss_network_dim": str(options.dim),
        "ss_network_alpha": str(float(options.dim)),
        "ss_network_args": json.dumps(arguments or {}),
        "ss_base_model_version": names.version,
    }
    if not options.no_metadata:
        metadata["modelspec.architecture"] = f"{names.architecture}/lora"
        metadata["modelspec.title"] = f"Extracted LoRA from {options.model_tuned.name}"
    return metadata

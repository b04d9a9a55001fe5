"""Convert networks of other kinds (LoKr, DoRA, ...) to plain LoRAs, for tools that only support LoRAs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints.dialects import cut_parts, join_parts, translate_name
from checkpoints.dits import bare_names
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from checkpoints.quantizing import dequantized_on_read
from modules.console import format_count
from modules.errors import CheckpointError, OptionError
from networks.apply import Change
from networks.delta import read_delta
from networks.extracting import decompose_change, reshape_to_lora
from networks.formats.comfyui import NORMS_FORM
from networks.key_formats import split_tensor_name
from networks.kinds import LORA
from networks.kinds.composing import (
    FACTORS_NEEDING_WEIGHT,
    KIND_BY_FACTOR,
    MAGNITUDES,
    find_kinds_with_factors,
)
from networks.kinds.contract import named
from networks.kinds.factors import DOWN, MID, Factors
from networks.loading import LoraFile, WeightedLora
from networks.lora_network import get_prefix
from networks.module_factors import CPU, group_by_module, ungroup
from networks.module_names import from_alias
from networks.names.layouts import OURS, SWAPPED, FamilyNames, joined_tensors, tensor_patterns
from networks.rows_by_head import with_stacked_rows
from networks.text_loras import is_full, list_pieces
from networks.writing import convert_to_our_layout
from protocols.loading import TensorSource

logger = getLogger(__name__)
# names of factors that show that a module is not a plain LoRA
NON_LORA_FACTORS = {
    MAGNITUDES,
    MID,
    *(mark for mark, kind in KIND_BY_FACTOR.items() if kind is not LORA),
}
_PLAIN = "networks.lora"  # ss_network_module of plain LoRAs, and the prefix of family-specific modules
HIGH_LOSS = 0.1  # lost fraction of the change above which messages advise a higher rank


@dataclass(frozen=True)
class Baking:
    """How to convert LoRAs of other kinds: the rank of the plain LoRAs, and the model they were trained for.

    Without a rank, modules keep their kind, and only the norms that DoRA magnitudes refer to change.
    """

    rank: int | None
    device: torch.device
    models: Sequence[Path] = ()  # files of the model: the transformer, then text encoders


class Baked(NamedTuple):
    """A LoRA converted to plain low-rank factors, and a note on how much of the change was lost."""

    lora: LoraFile
    loss_note: str  # "" if nothing was approximated


class StoredWeight(NamedTuple):
    """A model weight on disk: its checkpoint, and the tensors that it is read from."""

    checkpoint: Checkpoint
    source: TensorSource


# module name in LoRA files -> weights of modules with this name. It has no prefix if the model file
# does not reveal which network it belongs to
Weights = Mapping[str, Sequence[StoredWeight]]


class Loss(NamedTuple):
    """Frobenius norm of a weight change, and of the difference that a plain LoRA cannot represent."""

    change: float
    lost: float


@torch.no_grad()
def bake(lora: LoraFile, family: FamilyNames | None, baking: Baking) -> Baked:
    """Approximate each module that is not a plain LoRA with the best LoRA of a given rank.

    1. Find the modules that are not plain LoRAs.
    2. Compute the change of each at multiplier 1, with the model's weight if the change depends on it.
    3. Approximate the change with two factors, and update the metadata.

    Memory: the LoRA, and one weight with its change in float32.

    Args:
        lora: The LoRA file.
        family: Family of the LoRA; None if unknown.
        baking: Settings of the conversion, with a rank.

    Raises:
        OptionError: If there is nothing to replace, or if a kind depends on the model and no model is given.
        CheckpointError: If the model does not fit.
    """
    assert baking.rank is not None
    # The factors of each module, with parts of fused weights joined if their change needs the weight
    tensors: Mapping[str, Tensor] = lora.tensors
    if family is not None and any(name.endswith(FACTORS_NEEDING_WEIGHT) for name in tensors):
        tensors = convert_to_our_layout(tensors, family)
    modules = group_by_module({**tensors, **lora.text_tensors})
    to_approximate: dict[str, Factors] = {}
    for name, module_factors in modules.items():
        if module_factors.keys() & NON_LORA_FACTORS:
            to_approximate[name] = module_factors
    losses: dict[str, Loss] = {}
    with open_weights(_require_models(lora.path, to_approximate, baking), family) as weights:
        for name, factors in to_approximate.items():
            change = _compute_change(name, factors, lora, weights, baking.device)
            modules[name], losses[name] = _approximate(name, factors, change, baking.rank)
    metadata = _make_plain_metadata(lora.metadata, modules)
    loss_note = _describe_losses(losses, len(modules), baking.rank)
    return Baked(replace_factors(lora, modules, metadata), loss_note)


def _require_models(path: Path, modules: Mapping[str, Factors], baking: Baking) -> Sequence[Path]:
    """Return the model files that are needed to approximate these modules; () if only their factors are."""
    if not modules:
        raise OptionError(f"--bake: {path} has only plain LoRAs, whose rank is not changed. Omit --bake")
    needs_model = any(factors.keys() & {*FACTORS_NEEDING_WEIGHT} for factors in modules.values())
    if not needs_model:
        return ()
    if not baking.models:
        raise _make_missing_model_error(path, modules)
    return baking.models


def _make_missing_model_error(path: Path, modules: Mapping[str, Factors]) -> OptionError:
    """Return the error for a LoRA whose change depends on the model (DoRA) if no model is given."""
    name = next(name for name, factors in modules.items() if factors.keys() & {*FACTORS_NEEDING_WEIGHT})
    kind = next(kind for kind in find_kinds_with_factors(modules[name]) if kind.needs_weight)
    return OptionError(
        f"--bake: {path} is {named(kind)} ({name}), whose change depends on the weights that it was trained "
        "for. Add --dit with the model's file, followed by the files of the text encoders that it changes"
    )


def _make_plain_metadata(metadata: Mapping[str, str], modules: Mapping[str, Factors]) -> dict[str, str]:
    """Return a LoRA's metadata for the file in which its modules are plain low-rank factors."""
    ranks = {len(factors[DOWN]) for factors in modules.values() if DOWN in factors}
    rank = str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"
    network_module = metadata.get("ss_network_module", _PLAIN)
    plain = {
        **metadata,
        "ss_network_module": network_module if network_module.startswith(_PLAIN) else _PLAIN,
        "ss_network_dim": rank,
        "ss_network_alpha": rank,  # the product of the factors is the change: alpha / rank is 1
        "ss_network_args": "{}",
    }
    plain.pop(NORMS_FORM, None)
    return plain


def replace_factors(lora: LoraFile, modules: Mapping[str, Factors], metadata: Mapping[str, str]) -> LoraFile:
    """Return the LoRA with new factors (for the transformer and text encoders) and new metadata."""
    text_modules = {name: factors for name, factors in modules.items() if not name.startswith(OURS)}
    in_dit = {name: factors for name, factors in modules.items() if name.startswith(OURS)}
    return replace(
        lora,
        tensors=ungroup(in_dit),
        text_tensors=ungroup(text_modules),
        metadata=metadata,
    )


def _approximate(name: str, factors: Factors, change: Tensor, rank: int) -> tuple[dict[str, Tensor], Loss]:
    """Return the best LoRA of a rank for a weight change, and how much of the change it loses."""
    dtype = next(tensor.dtype for factor_name, tensor in factors.items() if factor_name != "alpha")
    matrix = change.flatten(1)
    down, up = decompose_change(matrix, rank, quantile=1.0, name=name)
    # the singular values are in the up factor: divide them between both, so that neither loses precision in
    # 16 bits
    singular_values = up.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    roots = singular_values.sqrt()
    down = (down * roots[:, None]).to(dtype)
    up = (up / roots).to(dtype)
    change_norm = float(matrix.norm())
    remainder = matrix.addmm_(up.float(), down.float(), alpha=-1)
    lora = reshape_to_lora(down, up, change.shape)
    bias = read_delta(factors).compute_bias_change(CPU)
    if bias is not None:
        lora["diff_b"] = bias.to(dtype)
    return lora, Loss(change_norm, lost=float(remainder.norm()))


def _compute_change(
    name: str, factors: Factors, lora: LoraFile, weights: Weights, device: torch.device
) -> Tensor:
    """Return what the factors add to their weight at multiplier 1, float32."""
    delta = read_delta(factors)
    if not delta.depends_on_weight:
        factor_change = delta.compute_change(device)
        assert factor_change is not None
        return factor_change
    num_rows: int | None = None  # unknown for an input rotation
    if delta.rotation is None:
        shape = delta.change_shape()
        assert shape is not None
        num_rows = shape[0]
    weight, path = read_module_weight(name, num_rows, lora, weights)
    change = Change(WeightedLora(lora), delta).fit(related=None, weight=weight, name=name, model=str(path))
    total = torch.zeros(weight.shape, device=device)
    change.add_to(total, block_rows=None, weight=weight.to(device))
    return total


def read_module_weight(
    name: str, num_rows: int | None, lora: LoraFile, weights: Weights
) -> tuple[Tensor, Path]:
    """Return the weight that a module changes, and the path of its file.

    Args:
        name: Name of the module.
        num_rows: Number of rows of the weight; None if unknown.
        lora: The LoRA file.
        weights: Weights of the model.

    Raises:
        CheckpointError: If the weight is missing.
    """
    # names that the module may have in the model's files
    single_encoder_name = name.replace("lora_te1_", "lora_te_", 1)  # in Stable Diffusion 1 and 2
    without_prefix = name.removeprefix(f"{get_prefix(name)}_")  # in a separate file of the network
    for module in dict.fromkeys((name, single_encoder_name, without_prefix)):
        for stored in weights.get(module, ()):
            weight = stored.source.build_tensor(
                [stored.checkpoint.read(tensor) for tensor in stored.source.names]
            )
            # separate text encoder files may have equal module names but different sizes
            if num_rows is None or num_rows == len(weight):
                return weight, stored.checkpoint.path
    raise CheckpointError(
        f"{lora.path}: the weight that {name} was trained for is not in the files of --dit.\n  Pass the "
        "model that it was trained for, and after it the files of text encoders that it changes.",
        lora.path,
    )


@contextmanager
def open_weights(paths: Sequence[Path], family: FamilyNames | None) -> Iterator[Weights]:
    """Open model files of any layout, and yield their weights by module name as in LoRA files.

    Only the headers of the files are read.

    Args:
        paths: Files of the model.
        family: Family whose LoRA names the modules get; None keeps the names in the files.
    """
    weights: dict[str, list[StoredWeight]] = {}
    with ExitStack() as stack:
        for path in paths:
            checkpoint = with_stacked_rows(dequantized_on_read(stack.enter_context(open_checkpoint(path))))
            for name, stored in (
                *_iterate_text_encoder_weights(checkpoint),
                *_iterate_dit_weights(checkpoint, family),
            ):
                module, parameter_name = split_tensor_name(name)
                if parameter_name != "weight":
                    continue
                if family is not None:
                    module = from_alias(module, family)
                # files of different text encoders may have modules with the same name
                weights.setdefault(module, []).append(stored)
        yield weights


def _iterate_text_encoder_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredWeight]]:
    """Yield the text encoder weights inside a full checkpoint, by their module names in LoRA files."""
    if not is_full(checkpoint.tensors):
        return
    for name in checkpoint.tensors:
        for piece in list_pieces(name):
            if piece.text_encoder:
                source = TensorSource((name,), piece.take_rows)
                yield f"{piece.text_encoder}_{piece.name}", StoredWeight(checkpoint, source)


def _iterate_dit_weights(
    checkpoint: Checkpoint, family: FamilyNames | None
) -> Iterator[tuple[str, StoredWeight]]:
    """Yield a transformer's tensors by our names (fused weights are split), each with where it is stored."""
    bare = bare_names(checkpoint)
    sources = list_tensor_sources(bare)
    if family is not None:
        swapped: set[str] = set()  # weights whose halves are swapped in the file's layout
        swapped_parts = tuple(part for part in family.parts if part.index == SWAPPED)
        if swapped_parts:
            patterns = tensor_patterns(replace(family, parts=swapped_parts, parameters=()))
            swapped = {translate_name(name, patterns) for name in sources}.difference(sources)
        sources = join_parts(sources, tensor_patterns(family), swapped)
        sources = cut_parts(sources, joined_tensors(family))
    for name, source in sources.items():
        yield name, StoredWeight(bare, source)


def _describe_losses(losses: Mapping[str, Loss], num_modules: int, rank: int) -> str:
    """Describe the relative error (Frobenius norm) of all modules together, and of the worst module."""
    relative_errors: dict[str, float] = {}
    for name, loss in losses.items():
        relative_errors[name] = loss.lost / loss.change if loss.change else 0.0
    worst = max(relative_errors, key=lambda name: relative_errors[name])
    # the norm of all modules together is the root of the sum of squares
    change = math.hypot(*(loss.change for loss in losses.values()))
    lost = math.hypot(*(loss.lost for loss in losses.values()))
    total_error = lost / change if change else 0.0
    advice = "; a higher rank loses less" if total_error > HIGH_LOSS else ""
    return (
        f"{len(losses)} of {format_count(num_modules, 'module')} at rank {rank}: {100 * total_error:.2g} % "
        f"of the change is lost, at most {100 * relative_errors[worst]:.2g} % ({worst}){advice}"
    )

"""Rearrange LoRA files whose factors match the modules of no model into the usual form.

XLabs      double_blocks.0.processor.qkv_lora1.down.weight (lora1: image, lora2: text; qkv or proj)
           single_blocks.0.processor.qkv_lora.down.weight, .proj_lora. (as their processors compute: the first
           adds to queries, keys and values of linear1, the second to linear2)
numbered   lora_unet_double_blocks_0_img_attn_qkv.lora_down.0.weight, .1., .2. (sd-scripts' split_dims): for
           the parts of a joined layer; also ..._qkv.0.lora_down.weight
fused      transformer_blocks.0.attn.to_qkv.lora_A.weight (diffusers' `fuse_qkv_projections`, as SimpleTuner
           trains): for to_q, to_k and to_v; also to_added_qkv, to_kv; of all kinds
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from networks.delta import read_delta
from networks.deltas import LORA, OF_BIAS, SET, strength
from networks.fused_parts import joined_blocks
from networks.kinds.composing import MAGNITUDES
from networks.kinds.factors import DOWN, UP, Factors
from networks.module_names import count_parts
from networks.tensor_names import FACTORS, split_end

_XLABS = re.compile(
    r"(?P<start>(?:.+\.)?)(?P<list>double|single)_blocks\.(?P<n>\d+)\.processor\."
    r"(?P<what>qkv|proj)_lora(?P<stream>[12]?)\.(?P<factor>down|up)\.weight"
)
_STREAMS = {"1": "img", "2": "txt"}
# the number behind the factor or behind the module
_NUMBERED = (
    re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B|down|up)\.(?P<number>\d+)\.weight"),
    re.compile(r"(?P<module>.+)[._](?P<number>\d+)\.lora_(?P<factor>A|B|down|up)\.weight"),
    re.compile(r"(?P<module>.+)[._](?P<number>\d+)\.(?P<factor>alpha)"),
)
_FUSED = re.compile(r"(?P<start>(?:.+[._])?)to_(?P<layer>qkv|added_qkv|kv)\.(?P<end>.+)")
_FUSED_PARTS = {
    "qkv": ("to_q", "to_k", "to_v"),
    "added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "kv": ("to_k", "to_v"),
}
# a tensor of this name alone counts for all modules without one
FOR_ALL = ("alpha", "lora_alpha", "network_alpha")


class Rewritten(NamedTuple):
    """Tensors in the usual arrangement."""

    tensors: dict[str, Tensor]
    stacked: dict[str, int]  # key of a joined factor -> how many were joined into it
    family_name: str = ""  # of the only family with files of this form


# found in names of files that have something to rewrite; of numbered factors it is the second
MARKS = re.compile(
    r"\.processor\.|to_(?:added_)?q?kv\.|\.lora_(?:A|B|down|up)\.1\.weight|[._]1\.lora_(?:A|B|down|up)\.weight"
)


def rewrite(tensors: Mapping[str, Tensor]) -> Rewritten:
    """Convert XLabs', fused and numbered factors to one LoRA for each module; other tensors are unchanged.

    The change of the weights stays the same: n numbered factors become one LoRA with n times the rank and
    alpha, whose up factor is block-diagonal.
    """
    rewritten: dict[str, Tensor] = {}
    family_name = ""
    for key, tensor in _take_apart(tensors).items():
        match = _XLABS.fullmatch(key)
        names = [] if match is None else _in_flux(match)
        if match is None or not names:  # not of XLabs
            rewritten[key] = tensor
            continue
        family_name = "flux"
        if len(names) == 1:
            rewritten[names[0]] = tensor
            continue
        # q, k and v become three LoRAs: each has its rows of the up factor, and the whole down factor
        parts = tensor.chunk(3) if match["factor"] == "up" else [tensor] * len(names)
        for name, part in zip(names, parts, strict=True):
            rewritten[name] = part.clone()  # copies: files cannot hold tensors that share memory
    return _put_together(rewritten)._replace(family_name=family_name)


def _in_flux(match: re.Match[str]) -> list[str]:
    """Return the usual names of an XLabs tensor: three if q, k and v are only some rows of a weight."""
    start, number, layer = match["start"], match["n"], match["what"]
    end = f"lora_{match['factor']}.weight"
    if match["list"] == "double" and match["stream"]:
        return [f"{start}double_blocks.{number}.{_STREAMS[match['stream']]}_attn.{layer}.{end}"]
    if match["list"] == "double" or match["stream"]:
        return []
    if layer == "proj":
        return [f"{start}single_blocks.{number}.linear2.{end}"]
    return [f"{start}single_transformer_blocks.{number}.attn.to_{x}.{end}" for x in "qkv"]


def _take_apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the tensors for fused queries, keys and values into tensors for each of them.

    A fused LoRA with a block-diagonal up factor was joined from separate LoRAs: it is split into these again,
    with their rank. Layers whose change is not a matrix, or whose factors do not fit it, are not split.
    """
    apart = dict(tensors)
    for layer, keys in _find_fused_layers(tensors).items():
        factors = {part: tensors[key] for part, key in keys.items()}
        if MAGNITUDES in factors and factors[MAGNITUDES].ndim == 1:  # as in PEFT
            factors[MAGNITUDES] = factors[MAGNITUDES].view(-1, 1)
        split_sizes = _rows_of_parts(layer.name, factors)
        if not split_sizes:
            continue
        prefix = f"{layer.start}to_{layer.name}."
        ends = {part: key.removeprefix(prefix) for part, key in keys.items()}
        first = 0
        blocks = joined_blocks(factors, split_sizes)
        for index, (part, height) in enumerate(zip(_FUSED_PARTS[layer.name], split_sizes, strict=True)):
            piece = blocks[index] if blocks else read_delta(factors).part(first, first + height).factors
            for name, tensor in piece.items():
                end = ends.get(name, name)
                apart[f"{layer.start}{part}.{end}"] = tensor
            first += height
        for key in keys.values():
            del apart[key]
    return apart


class _FusedLayer(NamedTuple):
    """A layer that another program fuses."""

    start: str  # of its names
    name: str  # in `_FUSED_PARTS`


def _find_fused_layers(keys: Iterable[str]) -> dict[_FusedLayer, dict[str, str]]:
    """Return the key of each factor, by our name, of the fused layers of a file."""
    layers: dict[_FusedLayer, dict[str, str]] = {}
    for key in keys:
        match = _FUSED.fullmatch(key)
        if match is None:
            continue
        _, part = split_end(f".{match['end']}")
        layers.setdefault(_FusedLayer(match["start"], match["layer"]), {})[part or match["end"]] = key
    return layers


def _rows_of_parts(layer: str, factors: Factors) -> tuple[int, ...]:
    """Return the rows of each part of a fused layer; () if its factors cannot be split.

    Queries have as many rows as the layer has inputs, and keys and values, which may have fewer heads, share
    the remaining rows equally.
    """
    size = read_delta(factors).size()
    if size is None:
        return ()
    full_height, width = size
    if not _fit_rows(factors, full_height):
        return ()
    query_rows = () if layer == "kv" else (width,)
    key_rows, remainder = divmod(full_height - sum(query_rows), 2)
    # the heads of keys and values are queries' heads divided by a whole number
    if remainder or key_rows <= 0 or width % key_rows:
        return ()
    return (*query_rows, key_rows, key_rows)


def _fit_rows(factors: Factors, height: int) -> bool:
    """Return whether all factors that are cut by rows have the rows of the full layer."""
    if any(tensor.ndim == 0 for part, tensor in factors.items() if part != "alpha"):
        return False
    by_rows = (read_delta(factors).row_parts() or set()) | factors.keys() & {"diff", SET, *OF_BIAS}
    return all(len(factors[part]) == height for part in by_rows)


def _put_together(tensors: Mapping[str, Tensor]) -> Rewritten:
    """Join the numbered factors of each module, such as several LoRAs for one weight, to one LoRA.

    The joined up factor is block-diagonal. An alpha for all modules counts for modules without their own.
    """
    joined = dict(tensors)
    stacked: dict[str, int] = {}
    alphas_of_all = [tensors[key] for key in FOR_ALL if key in tensors and tensors[key].numel() == 1]
    alpha_of_all = alphas_of_all[0] if alphas_of_all else None
    for module, keys in _find_numbered_factors(tensors).items():
        alpha = tensors.get(f"{module}.alpha", alpha_of_all)
        pieces = _order_pieces(keys, tensors, alpha)
        if not _can_be_joined(module, list(keys), pieces):
            continue
        for part_keys in keys.values():  # by number, then by part
            for key in part_keys.values():
                del joined[key]
        joined.pop(f"{module}.alpha", None)
        for part, tensor in _build_diagonal(pieces).items():
            joined[f"{module}.{part}"] = tensor
        stacked[f"{module}.{DOWN}"] = len(pieces)
    return Rewritten(joined, stacked)


def _can_be_joined(module: str, numbers: Sequence[int], pieces: Sequence[Factors]) -> bool:
    """Return whether numbered factors are LoRAs for the parts of a layer that some model fuses.

    PEFT's adapters may have numbers as names.
    """
    if len(numbers) < 2 or sorted(numbers) != list(range(len(numbers))):
        return False
    if len(numbers) not in count_parts(module):
        return False
    return all(set(LORA) <= set(piece) and piece[UP].ndim == 2 for piece in pieces)


def _order_pieces(
    keys: Mapping[int, Mapping[str, str]], tensors: Mapping[str, Tensor], alpha: Tensor | None
) -> list[Factors]:
    """Return the factors of a module, sorted by their numbers.

    Args:
        keys: Keys of the factors by number.
        tensors: Tensors by name.
        alpha: Alpha for factors without one.
    """
    shared = {} if alpha is None else {"alpha": alpha}
    pieces: list[Factors] = []
    for number in sorted(keys):
        factors = {part: tensors[key] for part, key in keys[number].items()}
        pieces.append({**shared, **factors})
    return pieces


def _find_numbered_factors(keys: Iterable[str]) -> dict[str, dict[int, dict[str, str]]]:
    """Group the keys of numbered factors: module -> number -> our name of the factor -> key."""
    modules: dict[str, dict[int, dict[str, str]]] = {}
    for key in keys:
        matches = (pattern.fullmatch(key) for pattern in _NUMBERED)
        match = next((match for match in matches if match is not None), None)
        if match is not None:
            part = "alpha" if match["factor"] == "alpha" else f"{FACTORS[match['factor']]}.weight"
            numbers = modules.setdefault(match["module"], {})
            numbers.setdefault(int(match["number"]), {})[part] = key
    return modules


def _build_diagonal(pieces: Sequence[Factors]) -> dict[str, Tensor]:
    """Join LoRAs for stacked rows into one LoRA with a block-diagonal up factor."""
    scales = [strength(piece) for piece in pieces]
    scale = scales[0]
    ups = [piece[UP] for piece in pieces]
    down = torch.cat([piece[DOWN] for piece in pieces])
    if len(set(scales)) > 1:
        ups = [(up.float() * factor).to(up.dtype) for up, factor in zip(ups, scales, strict=True)]
        scale = 1.0
    joined = {DOWN: down, UP: torch.block_diag(*ups)}
    if any("alpha" in piece for piece in pieces):
        joined["alpha"] = torch.tensor(scale * len(down))
    return joined

"""Rearrange LoRA files whose factors do not correspond to the modules of a model into one LoRA per module.

XLabs      double_blocks.0.processor.qkv_lora1.down.weight (lora1: image, lora2: text; qkv or proj)
           single_blocks.0.processor.qkv_lora.down.weight, .proj_lora. (as their processors compute: the first
           adds to queries, keys and values of linear1, the second to linear2)
numbered   lora_unet_double_blocks_0_img_attn_qkv.lora_down.0.weight, .1., .2. (sd-scripts' split_dims): LoRAs
           for the parts of a fused layer; also ..._qkv.0.lora_down.weight
fused      transformer_blocks.0.attn.to_qkv.lora_A.weight (diffusers' `fuse_qkv_projections`, as SimpleTuner
           trains): one LoRA, or network of another kind, for to_q, to_k and to_v; also to_added_qkv, to_kv
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from networks.delta import read_delta
from networks.fused_loras import joined_blocks
from networks.kinds.composing import MAGNITUDES
from networks.kinds.factors import DOWN, UP, Factors
from networks.module_factors import BIAS_FACTORS, LORA_FACTORS, SET_WEIGHT, compute_scaling
from networks.module_names import count_parts
from networks.tensor_names import FACTORS, split_end

_XLABS = re.compile(
    r"(?P<start>(?:.+\.)?)(?P<list>double|single)_blocks\.(?P<n>\d+)\.processor\."
    r"(?P<layer>qkv|proj)_lora(?P<stream>[12]?)\.(?P<factor>down|up)\.weight"
)
_STREAMS = {"1": "img", "2": "txt"}
# names of numbered factors, with the number after the factor or after the module
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
# names of a global alpha, for all modules without their own alpha
GLOBAL_ALPHA_KEYS = ("alpha", "lora_alpha", "network_alpha")


class Rewritten(NamedTuple):
    """Tensors of a LoRA file after its fused and numbered factors were joined to one LoRA per module."""

    tensors: dict[str, Tensor]
    joined_lora_counts: dict[str, int]  # key of a joined factor -> number of factors that were joined into it
    family_name: str = ""  # the only family with files of this form; "" if there are several


# matches a name in files that `rewrite` changes; for numbered factors, the name with number 1
NEEDS_REWRITING = re.compile(
    r"\.processor\.|to_(?:added_)?q?kv\.|\.lora_(?:A|B|down|up)\.1\.weight|[._]1\.lora_(?:A|B|down|up)\.weight"
)


def rewrite(tensors: Mapping[str, Tensor]) -> Rewritten:
    """Convert XLabs', fused and numbered factors to one LoRA per module; other tensors are unchanged.

    The weight changes stay the same: n numbered factors become one LoRA with n times the rank and alpha,
    whose up factor is block-diagonal.
    """
    rewritten: dict[str, Tensor] = {}
    family_name = ""
    for key, tensor in _split_fused_layers(tensors).items():
        translated = _translate_xlabs_tensor(key, tensor)
        if translated:
            family_name = "flux"
            rewritten |= translated
        else:
            rewritten[key] = tensor
    return _join_numbered(rewritten)._replace(family_name=family_name)


def _translate_xlabs_tensor(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Rename XLabs' tensor of a FLUX LoRA to our layout or diffusers'; return {} for other keys."""
    # q, k and v become three LoRAs: each has its rows of the up factor, and the full down factor.
    match = _XLABS.fullmatch(key)
    names = [] if match is None else _translate_xlabs(match)
    if match is None or not names:
        return {}
    if len(names) == 1:
        return {names[0]: tensor}
    parts = tensor.chunk(3) if match["factor"] == "up" else [tensor] * len(names)
    # copies, because safetensors files cannot contain tensors that share memory
    return {name: part.clone() for name, part in zip(names, parts, strict=True)}


def _translate_xlabs(match: re.Match[str]) -> list[str]:
    """Return our LoRA tensor names for an XLabs tensor of FLUX; [] for an impossible name."""
    # In single blocks, XLabs' qkv covers only some rows of our weight linear1, which our names cannot
    # express. So the tensor is named like diffusers' three layers q, k and v, whose rows are known.
    prefix = match["start"]
    number = match["n"]
    layer = match["layer"]
    suffix = f"lora_{match['factor']}.weight"
    if match["list"] == "double" and match["stream"]:
        return [f"{prefix}double_blocks.{number}.{_STREAMS[match['stream']]}_attn.{layer}.{suffix}"]
    # only double blocks have streams (image and text), and each of their layers belongs to one of them
    if match["list"] == "double" or match["stream"]:
        return []
    if layer == "proj":
        return [f"{prefix}single_blocks.{number}.linear2.{suffix}"]
    return [f"{prefix}single_transformer_blocks.{number}.attn.to_{x}.{suffix}" for x in "qkv"]


def _split_fused_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split fused queries, keys and values in a LoRA file into separate LoRAs."""
    # A fused LoRA with a block-diagonal up factor was joined from separate LoRAs: it is split into these
    # again, with their rank. Layers whose change is not a matrix, or whose factors do not fit it, are not
    # split.
    new_tensors = dict(tensors)
    for layer, keys in _find_fused_layers(tensors).items():
        part_tensors = _split_fused_layer(layer, keys, tensors)
        if part_tensors:
            new_tensors |= part_tensors
            for key in keys.values():
                del new_tensors[key]
    return new_tensors


def _split_fused_layer(
    layer: "_FusedLayer", keys: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a fused layer's parts; {} if the layer cannot be split."""
    factors = {factor: tensors[key] for factor, key in keys.items()}
    if MAGNITUDES in factors and factors[MAGNITUDES].ndim == 1:  # as in PEFT
        factors[MAGNITUDES] = factors[MAGNITUDES].view(-1, 1)
    split_sizes = _count_part_rows(layer.name, factors)
    if not split_sizes:
        return {}
    # undo a block-diagonal join if there was one; else each part gets its rows of the up factor
    loras = joined_blocks(factors, split_sizes) or _split_rows(factors, split_sizes)
    fused_prefix = f"{layer.start}to_{layer.name}."
    # name of the factor -> its ending as spelled in the file
    endings = {factor: key.removeprefix(fused_prefix) for factor, key in keys.items()}
    part_tensors: dict[str, Tensor] = {}
    for part_name, lora in zip(_FUSED_PARTS[layer.name], loras, strict=True):
        for factor_name, tensor in lora.items():
            ending = endings.get(factor_name, factor_name)
            part_tensors[f"{layer.start}{part_name}.{ending}"] = tensor
    return part_tensors


def _split_rows(factors: Factors, split_sizes: Sequence[int]) -> list[Factors]:
    """Return the factors for consecutive groups of a layer's rows, with `split_sizes` rows each."""
    delta = read_delta(factors)
    parts: list[Factors] = []
    first_row = 0
    for num_rows in split_sizes:
        parts.append(delta.slice_rows(first_row, first_row + num_rows).factors)
        first_row += num_rows
    return parts


class _FusedLayer(NamedTuple):
    """A fused layer in a LoRA file of another trainer, such as `to_qkv` or `to_kv`."""

    start: str  # prefix of its names
    name: str  # a key of `_FUSED_PARTS`


def _find_fused_layers(keys: Iterable[str]) -> dict[_FusedLayer, dict[str, str]]:
    """Return the fused layers of a file, each with its keys by factor name."""
    layers: dict[_FusedLayer, dict[str, str]] = {}
    for key in keys:
        match = _FUSED.fullmatch(key)
        if match is None:
            continue
        _, part = split_end(f".{match['end']}")
        layers.setdefault(_FusedLayer(match["start"], match["layer"]), {})[part or match["end"]] = key
    return layers


def _count_part_rows(layer: str, factors: Factors) -> tuple[int, ...]:
    """Return the row count of each part of a fused layer; () if its factors cannot be split."""
    # Queries have as many rows as the layer has inputs. Keys and values, which may have fewer heads, share
    # the remaining rows equally.
    size = read_delta(factors).matrix_size()
    if size is None:
        return ()
    full_height, width = size
    if not _fit_rows(factors, full_height):
        return ()
    # a fused layer of keys and values has no queries
    query_rows = () if layer == "kv" else (width,)
    key_rows, remainder = divmod(full_height - sum(query_rows), 2)
    # the number of query heads is a multiple of the number of key and value heads
    if remainder or key_rows <= 0 or width % key_rows:
        return ()
    return (*query_rows, key_rows, key_rows)


def _fit_rows(factors: Factors, height: int) -> bool:
    """Return whether all factors that have the weight's rows have `height` rows."""
    if any(tensor.ndim == 0 for part, tensor in factors.items() if part != "alpha"):
        return False
    by_rows = (read_delta(factors).find_factors_with_rows() or set()) | factors.keys() & {
        "diff",
        SET_WEIGHT,
        *BIAS_FACTORS,
    }
    return all(len(factors[part]) == height for part in by_rows)


def _join_numbered(tensors: Mapping[str, Tensor]) -> Rewritten:
    """Join the numbered LoRAs of each module into one LoRA with a block-diagonal up factor."""
    # Modules without their own alpha get the file's global alpha, if it has one.
    joined = dict(tensors)
    joined_lora_counts: dict[str, int] = {}  # name of a joined down factor -> number of LoRAs in it
    global_alphas = (tensors[key] for key in GLOBAL_ALPHA_KEYS if key in tensors)
    alpha_for_all = next((alpha for alpha in global_alphas if alpha.numel() == 1), None)
    for module, keys_by_number in _find_numbered_factors(tensors).items():
        alpha = tensors.get(f"{module}.alpha", alpha_for_all)
        loras = _order_loras(keys_by_number, tensors, alpha)
        # numbered factors that cannot be joined are unchanged
        if not _can_be_joined(module, list(keys_by_number), loras):
            continue
        # the joined LoRA replaces the numbered factors and the module's alpha
        for keys in keys_by_number.values():
            for key in keys.values():
                del joined[key]
        joined.pop(f"{module}.alpha", None)
        for factor_name, tensor in _build_diagonal(loras).items():
            joined[f"{module}.{factor_name}"] = tensor
        joined_lora_counts[f"{module}.{DOWN}"] = len(loras)
    return Rewritten(joined, joined_lora_counts)


def _can_be_joined(module: str, numbers: Sequence[int], loras: Sequence[Factors]) -> bool:
    """Return whether numbered factors are LoRAs for the parts of a layer that some model fuses."""
    # Otherwise, the numbers are names of PEFT adapters.
    if len(numbers) < 2 or sorted(numbers) != list(range(len(numbers))):
        return False
    if len(numbers) not in count_parts(module):  # no model fuses so many parts into this module
        return False
    return all(set(LORA_FACTORS) <= set(piece) and piece[UP].ndim == 2 for piece in loras)


def _order_loras(
    keys: Mapping[int, Mapping[str, str]], tensors: Mapping[str, Tensor], alpha: Tensor | None
) -> list[Factors]:
    """Return a module's numbered LoRAs, sorted by number."""
    default_factors = {} if alpha is None else {"alpha": alpha}
    loras: list[Factors] = []
    for number in sorted(keys):
        factors = {factor_name: tensors[key] for factor_name, key in keys[number].items()}
        # a piece's own alpha replaces the default
        loras.append({**default_factors, **factors})
    return loras


def _find_numbered_factors(keys: Iterable[str]) -> dict[str, dict[int, dict[str, str]]]:
    """Group keys of numbered factors: {module: {number: {our factor name: key}}}."""
    modules: dict[str, dict[int, dict[str, str]]] = {}
    for key in keys:
        matches = (pattern.fullmatch(key) for pattern in _NUMBERED)
        match = next((match for match in matches if match is not None), None)
        if match is not None:
            part = "alpha" if match["factor"] == "alpha" else f"{FACTORS[match['factor']]}.weight"
            numbers = modules.setdefault(match["module"], {})
            numbers.setdefault(int(match["number"]), {})[part] = key
    return modules


def _build_diagonal(loras: Sequence[Factors]) -> dict[str, Tensor]:
    """Join LoRAs of consecutive row ranges into one LoRA with a block-diagonal up factor."""
    scales = [compute_scaling(piece) for piece in loras]  # alpha / rank
    scale = scales[0]
    ups = [piece[UP] for piece in loras]
    down = torch.cat([piece[DOWN] for piece in loras])
    if len(set(scales)) > 1:  # different scales are multiplied into the up factors
        ups = [(up.float() * factor).to(up.dtype) for up, factor in zip(ups, scales, strict=True)]
        scale = 1.0
    joined = {DOWN: down, UP: torch.block_diag(*ups)}
    if any("alpha" in piece for piece in loras):
        joined["alpha"] = torch.tensor(scale * len(down))
    return joined

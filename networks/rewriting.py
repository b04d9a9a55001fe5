"""Rearrange LoRA files whose factors match the modules of no model into the usual form.

XLabs      double_blocks.0.processor.qkv_lora1.down.weight (lora1: picture, lora2: text; qkv or proj)
           single_blocks.0.processor.qkv_lora.down.weight, .proj_lora. (as their processors compute: the first
           adds to queries, keys and values of linear1, the second to linear2)
numbered   lora_unet_double_blocks_0_img_attn_qkv.lora_down.0.weight, .1., .2. (sd-scripts' split_dims): for
           the parts of a joined layer; also ..._qkv.0.lora_down.weight
fused      transformer_blocks.0.attn.to_qkv.lora_A.weight (diffusers' `fuse_qkv_projections`, as SimpleTuner
           trains): for to_q, to_k and to_v; also to_added_qkv, to_kv; LoRA, LoHa, LoKr and DoRA
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from networks.deltas import DORA, LORA, OF_BIAS, Factors, has_input_magnitudes, part_of, size_of, strength
from networks.module_names import count_parts

_XLABS = re.compile(
    r"(?P<start>(?:.+\.)?)(?P<list>double|single)_blocks\.(?P<n>\d+)\.processor\."
    r"(?P<what>qkv|proj)_lora(?P<stream>[12]?)\.(?P<factor>down|up)\.weight"
)
_STREAMS = {"1": "img", "2": "txt"}
_FACTORS = {"A": LORA[0], "B": LORA[1], "down": LORA[0], "up": LORA[1]}
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
_FACTOR = re.compile(r"lora(?:_linear_layer)?[._](?P<factor>A|B|down|up)(?![a-z])")
# a tensor of this name alone counts for all modules without one
FOR_ALL = ("alpha", "lora_alpha", "network_alpha")


# in names of files that have something to rewrite; of numbered factors it is the second
MARKS = re.compile(
    r"\.processor\.|to_(?:added_)?q?kv\.|\.lora_(?:A|B|down|up)\.1\.weight|[._]1\.lora_(?:A|B|down|up)\.weight"
)


def rewrite(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int], str]:
    """Bring XLabs', fused and numbered factors into the usual arrangement; leave other tensors as they are.

    Returns the tensors; by module, how many factors were joined into each joined one; and the name of the
    only family with files of this form, else "".

    The change of the weights stays the same: numbered factors become one LoRA whose up factor is
    block-diagonal, with as many times the rank and alpha.
    """
    usual: dict[str, Tensor] = {}
    family_name = ""
    for key, tensor in _take_apart(tensors).items():
        found = _XLABS.fullmatch(key)
        names = [] if found is None else _in_flux(found)
        if found is None or not names:
            usual[key] = tensor
            continue
        family_name = "flux"
        cut = len(names) > 1
        # copies: files cannot hold tensors that share memory
        parts = tensor.chunk(3) if cut and found["factor"] == "up" else [tensor] * len(names)
        usual |= {name: part.clone() if cut else part for name, part in zip(names, parts, strict=True)}
    return *_put_together(usual), family_name


def _in_flux(found: re.Match[str]) -> list[str]:
    """Return the usual names of an XLabs tensor: three if q, k and v are only some rows of a weight."""
    start, n, end = found["start"], found["n"], f"lora_{found['factor']}.weight"
    if found["list"] == "double" and found["stream"]:
        return [f"{start}double_blocks.{n}.{_STREAMS[found['stream']]}_attn.{found['what']}.{end}"]
    if found["list"] == "double" or found["stream"]:
        return []
    if found["what"] == "proj":
        return [f"{start}single_blocks.{n}.linear2.{end}"]
    return [f"{start}single_transformer_blocks.{n}.attn.to_{x}.{end}" for x in "qkv"]


def _take_apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the tensors for fused queries, keys and values into tensors for each of them.

    Queries are as wide as their input, so that the change's size shows the rows of keys and values, which may
    have fewer heads. Layers whose change is no matrix, or whose factors do not fit it, stay whole.
    """
    layers: dict[tuple[str, str], dict[str, str]] = {}  # start and layer -> our name of a factor -> key
    for key in tensors:
        if (found := _FUSED.fullmatch(key)) is not None:
            named = _FACTOR.match(found["end"])
            is_factor = named is not None and ".bias" not in found["end"]
            part = _FACTORS[named["factor"]] if named is not None and is_factor else _usual_end(found["end"])
            layers.setdefault((found["start"], found["layer"]), {})[part] = key
    apart = dict(tensors)
    for (start, layer), keys in layers.items():
        factors = {part: _as_column(part, tensors[key]) for part, key in keys.items()}
        size = size_of(factors)
        if size is None:
            continue
        whole, width = size
        if not _fit_rows(factors, whole):
            continue
        leading = () if layer == "kv" else (width,)
        rows, left = divmod(whole - sum(leading), 2)
        if left or rows <= 0 or width % rows:
            continue
        ends = {part: _FUSED.fullmatch(key)["end"] for part, key in keys.items()}  # type: ignore[index]
        first = 0
        for part, height in zip(_FUSED_PARTS[layer], (*leading, rows, rows), strict=True):
            pieces = part_of(factors, first, first + height)
            apart |= {f"{start}{part}.{ends.get(name, name)}": one for name, one in pieces.items()}
            first += height
        for key in keys.values():
            del apart[key]
    return apart


def _fit_rows(factors: Factors, whole: int) -> bool:
    """Return whether the factors that are cut by rows all have the rows of the whole layer."""
    if any(tensor.ndim == 0 for part, tensor in factors.items() if part != "alpha"):
        return False
    by_rows = factors.keys() & {LORA[1], "diff", "hada_w1_a", "hada_w2_a", *OF_BIAS}
    if DORA in factors and not has_input_magnitudes(factors):
        by_rows.add(DORA)
    return all(len(factors[part]) == whole for part in by_rows)


def _usual_end(end: str) -> str:
    """Return our name for what follows a module in a key: DoRA magnitudes and biases have several."""
    if end.startswith("lora_magnitude_vector") or end == "magnitude":
        return DORA
    named = _FACTOR.match(end)
    is_bias = named is not None and end.endswith(".bias") and _FACTORS[named["factor"]] == LORA[1]
    return "lora_up.bias" if is_bias else end


def _as_column(part: str, tensor: Tensor) -> Tensor:
    """Return magnitudes as out x 1, as PEFT has them in one axis."""
    return tensor.view(-1, 1) if part == DORA and tensor.ndim == 1 else tensor


def _put_together(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    groups: dict[str, dict[int, dict[str, str]]] = {}  # module -> number -> part -> key
    for key in tensors:
        found = next((match for one in _NUMBERED if (match := one.fullmatch(key)) is not None), None)
        if found is not None:
            part = _FACTORS.get(found["factor"], found["factor"])
            groups.setdefault(found["module"], {}).setdefault(int(found["number"]), {})[part] = key
    usual, stacked = dict(tensors), dict[str, int]()
    of_all = next((tensors[key] for key in FOR_ALL if key in tensors and tensors[key].numel() == 1), None)
    for module, numbers in groups.items():
        alpha = tensors.get(f"{module}.alpha", of_all)
        shared = {} if alpha is None else {"alpha": alpha}
        pieces = [
            {**shared, **{part: tensors[key] for part, key in numbers[n].items()}} for n in sorted(numbers)
        ]
        # PEFT's adapters may have numbers as names: only layers that some model fuses are joined
        if len(numbers) < 2 or sorted(numbers) != list(range(len(numbers))):
            continue
        if len(numbers) not in count_parts(module):
            continue
        if any(not set(LORA) <= set(piece) or piece[LORA[1]].ndim != 2 for piece in pieces):
            continue
        for keys in numbers.values():
            for key in keys.values():
                del usual[key]
        usual.pop(f"{module}.alpha", None)
        usual |= {f"{module}.{part}": one for part, one in _diagonal(pieces).items()}
        stacked[f"{module}.{LORA[0]}"] = len(pieces)
    return usual, stacked


def _diagonal(pieces: Sequence[Factors]) -> dict[str, Tensor]:
    """Join LoRAs for stacked rows into one LoRA with a block-diagonal up factor."""
    scales, ups = [strength(piece) for piece in pieces], [piece[LORA[1]] for piece in pieces]
    down = torch.cat([piece[LORA[0]] for piece in pieces])
    if len(set(scales)) > 1:
        ups = [(up.float() * scale).to(up.dtype) for up, scale in zip(ups, scales, strict=True)]
        scales = [1.0]
    whole = {LORA[0]: down, LORA[1]: torch.block_diag(*ups)}
    if any("alpha" in piece for piece in pieces):
        whole["alpha"] = torch.tensor(scales[0] * len(down))
    return whole

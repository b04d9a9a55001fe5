"""Recognize packed weights in a file by ComfyUI's marks and bitsandbytes' quantization states.

The `TensorInfo` of a packed weight gets the shape of the unpacked weight, and a `Packing`. Sources:
ComfyUI's `quant_ops.py`, comfy-kitchen's layouts, bitsandbytes' `QuantState`.

For each layout there are two functions: `_describe_...` checks the tensors of a layer and returns how it is
packed, and `_make_...` later builds a `QuantizedWeight` from them. A suffix is what follows the layer's name
in a tensor's name.
"""
# Letters: N rows (output channels) of a weight, K columns (input channels)

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from checkpoints.containers import BNB_STATE_INFIX, COMFY_QUANT_KEY, COMFY_QUANT_SUFFIX
from checkpoints.stored import packed
from checkpoints.stored.forms import QuantizedWeight
from checkpoints.stored.int8 import GROUPS, Int8
from checkpoints.stored.packed import PackedRowFormat, four_bits
from modules.integers import ceil_div, round_up
from modules.text_files import parse_json
from protocols.loading import Packing, TensorInfo

logger = logging.getLogger(__name__)

FP8 = ("float8_e4m3fn", "float8_e5m2")  # loaded like other scaled fp8 weights
_MAX_BYTES = 1 << 16  # largest mark or quantization state
_MAX_GROUP = 1 << 16  # largest group of columns


def find_packed(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> dict[str, TensorInfo]:
    """Return new dtypes and shapes, by name, of packed weights and of their companions, such as scales.

    The info of a packed weight has the shape of the unpacked weight and a `Packing`. The info of a companion
    differs only if it is fp8 but stored as uint8.

    Args:
        tensors: All tensors of the file.
        metadata: Metadata of the file.
        read: Returns a tensor by name.

    Raises:
        ValueError: If a layer's quantization format is unknown, or if its tensors do not match the format.
    """
    new_infos: dict[str, TensorInfo] = {}
    for layer_name, settings in _read_comfy_settings(tensors, metadata, read).items():
        new_infos |= _describe_comfy_layer(_QuantizedLayer(layer_name, settings, tensors))
    for name in tensors:
        weight_name, is_state, _ = name.partition(BNB_STATE_INFIX)
        if is_state:
            layer_name = weight_name.removesuffix(".weight")
            try:
                layer = _QuantizedLayer(layer_name, _parse(read, tensors, name), tensors)
                new_infos |= _describe_bitsandbytes(layer, read)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"the layer {layer_name}: its bitsandbytes state cannot be read ({error})"
                ) from error
    return new_infos


def _describe_comfy_layer(layer: "_QuantizedLayer") -> dict[str, TensorInfo]:
    """Return new dtypes and shapes of a layer with ComfyUI's quantization settings; {} if it is fp8."""
    try:
        layout = layer.settings["format"]
        if layout in FP8:
            layer.find_scale_suffix()  # called only to check that there is a scale
            return {}
        if layout in LAYOUTS:
            return LAYOUTS[layout](layer)
        names = ", ".join([*FP8, *LAYOUTS])
        raise ValueError(f"has the unknown format {str(layout)[:60]!r}; known formats are {names}")
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"the layer {layer.name}: its quantization settings cannot be read ({error!r})"
        ) from error
    except ValueError as error:
        raise ValueError(f"the layer {layer.name} {error}") from error


def _read_comfy_settings(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> dict[str, Mapping[str, Any]]:
    """Return ComfyUI's quantization settings by layer name, from `.comfy_quant` tensors and from metadata."""
    settings_by_layer: dict[str, Mapping[str, Any]] = {}
    for name in tensors:
        if name.endswith(COMFY_QUANT_SUFFIX):
            layer_name = name.removesuffix(COMFY_QUANT_SUFFIX)
            settings_by_layer[layer_name] = _read_settings(_parse(read, tensors, name))
    record = _parse_json(metadata.get(COMFY_QUANT_KEY, "{}"), COMFY_QUANT_KEY)
    layers_in_metadata = _require_table(record.get("layers", {}))
    prefix = _find_prefix(layers_in_metadata, tensors)
    for unprefixed_name, entry in layers_in_metadata.items():
        layer_name = f"{prefix}{unprefixed_name}"
        settings = _read_settings(entry)
        known_settings = settings_by_layer.setdefault(layer_name, settings)
        if known_settings != settings:
            raise ValueError(
                f"the layer {layer_name} has two quantization settings, {known_settings} and {settings}"
            )
    missing = [layer_name for layer_name in settings_by_layer if f"{layer_name}.weight" not in tensors]
    if missing:
        logger.info(
            "quantization settings of %d layers that are not in the file have no effect: %s",
            len(missing),
            missing[0],
        )
    for layer_name in missing:
        del settings_by_layer[layer_name]
    return settings_by_layer


def _find_prefix(layers: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """Return the prefix that tensor names have and layer names in the metadata lack; "" without one."""
    first = next((f"{layer}.weight" for layer in layers if layer not in tensors), None)
    if first is None or first in tensors:
        return ""
    prefixed = [name for name in tensors if name.endswith(f".{first}")]
    return prefixed[0].removesuffix(first) if len(prefixed) == 1 else ""


def _require_table(value: Any) -> dict[str, Any]:
    """Return the value if it is a dictionary; otherwise raise ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"its quantization record has {str(value)[:60]!r} instead of a table")
    return value


def _read_settings(entry: Any) -> dict[str, Any]:
    """Return a layer's quantization settings from ComfyUI's value for it: a format name or a dictionary."""
    # The items of the inner dictionary `params` are moved to the top level.
    settings = {"format": entry} if isinstance(entry, str) else dict(_require_table(entry))
    parameters = _require_table(settings.pop("params", None) or {})
    return settings | parameters


def _parse(read: Callable[[str], Tensor], tensors: Mapping[str, TensorInfo], name: str) -> dict[str, Any]:
    """Parse the JSON object that a tensor stores as text; raise ValueError if there is none."""
    info = tensors[name]
    if info.dtype != torch.uint8 or info.size_bytes > _MAX_BYTES:
        raise ValueError(f"{name} is not text: {info.dtype} of {info.size_bytes:,} bytes")
    return _parse_json(bytes(read(name).flatten().tolist()), name)


def _parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        return _require_table(parse_json(text if isinstance(text, str) else text.decode()))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error})") from error


@dataclass(frozen=True)
class _QuantizedLayer:
    """A quantized layer in a file; its error messages continue the sentence "the layer NAME ..."."""

    name: str  # name of the layer in the file
    settings: Mapping[str, Any]  # ComfyUI's or bitsandbytes' settings of the layer's quantization
    tensors: Mapping[str, TensorInfo]  # all tensors of the file

    @property
    def weight(self) -> TensorInfo:
        return self.tensors[f"{self.name}.weight"]

    def get_number(self, key: str, default: int) -> int:
        """Return an integer setting; raise ValueError if it is not an integer from 1 to `_MAX_GROUP`."""
        value = self.settings.get(key, default)
        if type(value) is not int or not 0 < value <= _MAX_GROUP:
            raise ValueError(f"has the {key} {str(value)[:60]!r}")
        return value

    def get_rotation(self, columns: int) -> int:
        """Return how many columns ConvRot rotates together; raise ValueError if this is not supported."""
        size = self.get_number("convrot_groupsize", default=256)
        if size not in GROUPS or columns % size:
            raise ValueError(
                f"has {columns} columns, rotated in groups of {size}; only groups of {GROUPS} are supported"
            )
        return size

    def check_matrix(self, *dtypes: torch.dtype) -> tuple[int, int]:
        """Return the number of rows and columns of the stored weight.

        Raises:
            ValueError: If the weight is not a matrix, or if its dtype is not one of `dtypes`.
        """
        info = self.weight
        if info.dtype not in dtypes or len(info.shape) != 2 or 0 in info.shape:
            raise ValueError(
                f"has a weight of {info.dtype} {list(info.shape)}, which does not fit its format"
            )
        return info.shape[0], info.shape[1]

    def check_companion(
        self, suffix: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]
    ) -> dict[str, TensorInfo]:
        """Return {suffix: dtype and shape} of an additional tensor of the layer, such as a scale.

        Some programs store fp8 as uint8. If the first of `dtypes` has 8 bits, uint8 is reinterpreted as it.

        Args:
            suffix: Tensor name without the layer's name.
            dtypes: Allowed dtypes.
            *shapes: Allowed shapes; any shape if there are none.

        Raises:
            ValueError: If the tensor is missing or has a different dtype or shape.
        """
        name = f"{self.name}.{suffix}"
        info = self.tensors.get(name)
        if info is None:
            raise ValueError(f"is stored in a format that needs {name}, which is missing")
        if info.dtype == torch.uint8 and dtypes[0].itemsize == 1:
            info = replace(info, dtype=dtypes[0])
        if info.dtype not in dtypes or (shapes and info.shape not in shapes):
            raise ValueError(f"has {name} of {info.dtype} {list(info.shape)}, which does not fit its weight")
        return {suffix: info}

    def check_scale(self, *shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
        """Return the scale's dtype and shape by suffix; raise ValueError if the shape is not in `shapes`."""
        return self.check_companion(self.find_scale_suffix(), _FLOATS, *shapes)

    def find_scale_suffix(self) -> str:
        """Return the name suffix of the layer's scale; raise ValueError if the layer has no scale."""
        for suffix in ("weight_scale", "scale_weight"):
            if f"{self.name}.{suffix}" in self.tensors:
                return suffix
        raise ValueError(f"has the format {self.settings['format']}, but {self.name}.weight_scale is missing")

    def packed_infos(
        self,
        shape: tuple[int, ...],
        companions: Mapping[str, TensorInfo],
        make_quantized: Callable[..., QuantizedWeight],
        pad: int = 1,
    ) -> dict[str, TensorInfo]:
        """Return new dtypes and shapes, by name, of the layer's packed weight and of its companions.

        Args:
            shape: Shape of the unpacked weight.
            companions: The layer's additional tensors, such as scales, by name suffix.
            make_quantized: Builds a `QuantizedWeight` from the weight and the companions, in this order.
            pad: Padded row and column counts are multiples of this number.
        """
        packed_weight = self.weight
        packing = Packing(packed_weight.shape, tuple(companions), make_quantized, pad)
        infos = {f"{self.name}.weight": TensorInfo(packed_weight.dtype, shape, packing)}
        for suffix, info in companions.items():
            infos[f"{self.name}.{suffix}"] = info
        return infos


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_E4M3 = torch.float8_e4m3fn
_E8M0 = torch.float8_e8m0fnu


def _expand_scale(scale: Tensor, rows: int) -> Tensor:
    """Expand a per-layer or per-row scale to float32, N x 1."""
    if scale.device.type != "meta" and not (scale.float().isfinite() & (scale > 0)).all():
        raise ValueError("has scales that are zero, negative, NaN or infinite")
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def _describe_int8(layer: _QuantizedLayer) -> dict[str, TensorInfo]:
    """Return dtypes and shapes of an int8 layer, rotated or not; raise ValueError for misfitting tensors."""
    shape = layer.weight.shape
    if layer.weight.dtype != torch.int8 or len(shape) < 2 or 0 in shape:
        raise ValueError(f"has a weight of {layer.weight.dtype} {list(shape)}, which does not fit its format")
    rows = shape[0]
    columns = math.prod(shape[1:])
    all_axes = (rows, *[1] * (len(shape) - 1))  # one scale per row, with as many axes as the weight
    scale_shapes: list[tuple[int, ...]] = [all_axes, (rows, 1), (rows,)]
    rotation = layer.get_rotation(columns) if layer.settings.get("convrot") else 0
    if not rotation or rows == 1:  # a single scale for all rows is allowed only without rotation
        scale_shapes += [(), (1,)]
    scale = layer.check_scale(*scale_shapes)
    multiplies_in_16_bits = bool(layer.settings.get("full_precision_matrix_mult"))
    return layer.packed_infos(shape, scale, partial(_make_int8, rotation, multiplies_in_16_bits))


def _make_int8(rotation: int, multiplies_in_16_bits: bool, weight: Tensor, scale: Tensor) -> QuantizedWeight:
    flat = weight.flatten(1)
    form: PackedRowFormat | Int8 = Int8(rotation)
    if multiplies_in_16_bits:
        form = PackedRowFormat("int8", ("scale_weight",), packed.int8_rows, rotation)
    return QuantizedWeight(form, (flat.shape[0], flat.shape[1]), (flat, _expand_scale(scale, len(flat))))


def _check_tiled_scale(
    layer: _QuantizedLayer, dtype: torch.dtype, rows: int, columns: int
) -> dict[str, TensorInfo]:
    """Return dtype and shape of block scales that are stored in the 128 x 4 tiles of Blackwell GPUs."""
    padded_shape = (round_up(rows, 128), round_up(columns, 4))
    return layer.check_companion("weight_scale", (dtype,), padded_shape)


def _describe_mxfp8(layer: _QuantizedLayer) -> dict[str, TensorInfo]:
    """Return dtypes and shapes of an MXFP8 layer: e4m3 values with an e8m0 scale for each 32 columns."""
    rows, columns = layer.check_matrix(_E4M3, torch.uint8)
    if rows % 32 or columns % 32:
        raise ValueError(f"has {rows} x {columns} weights, but its format pads both to multiples of 32")
    scale = _check_tiled_scale(layer, _E8M0, rows, columns // 32)
    return layer.packed_infos((rows, columns), scale, _make_mxfp8, pad=32)


def _make_mxfp8(weight: Tensor, scales: Tensor) -> QuantizedWeight:
    rows, columns = weight.shape
    form = PackedRowFormat("mxfp8", ("scale_weight",), packed.mxfp8_rows)
    flat = packed.untile(scales, rows, columns // 32)
    return QuantizedWeight(form, (rows, columns), (weight.view(_E4M3), flat))


def _describe_nvfp4(layer: _QuantizedLayer) -> dict[str, TensorInfo]:
    """Return dtypes and shapes of an NVFP4 layer: 4-bit values, scales per 16 columns, and a layer scale."""
    rows, num_bytes = layer.check_matrix(torch.uint8)
    columns = 2 * num_bytes  # two values per byte
    if rows % 16 or columns % 16:
        raise ValueError(f"has {rows} x {columns} weights, but its format pads both to multiples of 16")
    companions = _check_tiled_scale(layer, _E4M3, rows, columns // 16)
    companions |= layer.check_companion("weight_scale_2", _FLOATS, (), (1,))
    if f"{layer.name}.pre_quant_scale" in layer.tensors:  # factors of the layer's input
        companions |= layer.check_companion("pre_quant_scale", _FLOATS)
        (length,) = companions["pre_quant_scale"].shape
        if not 0 <= columns - length < 16:
            raise ValueError(f"multiplies {length} inputs, but has {columns} columns")
    return layer.packed_infos((rows, columns), companions, _make_nvfp4, pad=16)


def _make_nvfp4(
    weight: Tensor, block_scales: Tensor, scale: Tensor, input_scale: Tensor | None = None
) -> QuantizedWeight:
    rows, num_bytes = weight.shape
    columns = 2 * num_bytes
    form = PackedRowFormat("nvfp4", ("scale_blocks", "scale_weight", "scale_of_input"), packed.nvfp4_rows)
    if input_scale is not None:  # it lacks values for padding columns
        missing = columns - len(input_scale)
        input_scale = functional.pad(input_scale.float(), (0, missing), value=1.0).reshape(1, -1)
    block_scales = packed.untile(block_scales, rows, columns // 16)
    return QuantizedWeight(
        form, (rows, columns), (weight, block_scales, _expand_scale(scale, rows), input_scale)
    )


def _describe_w4a4(layer: _QuantizedLayer) -> dict[str, TensorInfo]:
    """Return dtypes and shapes of a 4-bit layer with rotated columns and one scale per row."""
    rows, num_bytes = layer.check_matrix(torch.int8, torch.uint8)
    columns = 2 * num_bytes
    scale = layer.check_scale((rows,), (rows, 1))
    return layer.packed_infos((rows, columns), scale, partial(_make_w4a4, layer.get_rotation(columns)))


def _make_w4a4(rotation: int, weight: Tensor, scale: Tensor) -> QuantizedWeight:
    form = PackedRowFormat("convrot_w4a4", ("scale_weight",), packed.w4a4_rows, rotation)
    return QuantizedWeight(
        form, (len(weight), 2 * weight.shape[1]), (weight, _expand_scale(scale, len(weight)))
    )


def _describe_w4a8(layer: _QuantizedLayer) -> dict[str, TensorInfo]:
    """Return dtypes and shapes of a 4- or 6-bit layer with row scales and relative scales per group."""
    rows, num_bytes = layer.check_matrix(torch.int8, torch.uint8)
    if f"{layer.name}.weight_correction" in layer.tensors:
        raise ValueError("has a weight_correction, which is not supported")
    # the file has neither the number of columns nor the bits: the relative scales, one per group, give the
    # columns; the bytes per column give the bits
    companions = layer.check_companion("weight_s_rel", (_E4M3, torch.float32))
    group_shape = companions["weight_s_rel"].shape
    columns = math.prod(group_shape[1:]) * layer.get_number("group_size", default=16)
    bits = 8 * num_bytes // max(columns, 1)
    is_one_scale_per_group = len(group_shape) == 2 and group_shape[0] == rows
    if not is_one_scale_per_group or columns * bits != 8 * num_bytes or bits not in (4, 6):
        raise ValueError(f"has {num_bytes} bytes for {columns} columns, instead of 4 or 6 bits for each")
    companions |= layer.check_companion("weight_s_channel", _FLOATS, (rows,), (rows, 1))
    if f"{layer.name}.weight_codebook" in layer.tensors:
        if bits == 6:  # its codes are integers from -32 on
            raise ValueError("has a codebook for 6 bits, which only weights in 4 bits may have")
        companions |= layer.check_companion("weight_codebook", _FLOATS, (16,))
    make_quantized = partial(_make_w4a8, bits, columns, layer.get_rotation(columns))
    return layer.packed_infos((rows, columns), companions, make_quantized)


def _make_w4a8(
    bits: int,
    columns: int,
    rotation: int,
    weight: Tensor,
    group_scales: Tensor,
    row_scales: Tensor,
    codebook: Tensor | None = None,
) -> QuantizedWeight:
    """Return a 4- or 6-bit weight with its tensors in the order that `PackedRowFormat` expects."""
    read_rows = packed.w4a8_rows if bits == 4 else packed.w6a8_rows
    row_format = PackedRowFormat(
        "asym_w4a8_int8", ("scale_blocks", "scale_weight", "codebook"), read_rows, rotation
    )
    if codebook is not None:
        codebook = codebook.float().reshape(1, 16)
    rows = len(weight)
    return QuantizedWeight(
        row_format, (rows, columns), (weight, group_scales, _expand_scale(row_scales, rows), codebook)
    )


def _describe_awq(layer: _QuantizedLayer) -> dict[str, TensorInfo]:
    """Return dtypes and shapes of a 4-bit AWQ layer with a scale and a zero point per group of columns."""
    rows, num_bytes = layer.check_matrix(torch.int8, torch.uint8)
    columns = 2 * num_bytes
    group = layer.get_number("group_size", default=64)
    if columns % group:
        raise ValueError(f"has {columns} columns, which groups of {group} do not divide")
    companions = layer.check_companion("weight_scale", _FLOATS, (columns // group, rows))
    companions |= layer.check_companion("weight_zeros", _FLOATS, (columns // group, rows))
    return layer.packed_infos((rows, columns), companions, _make_awq)


def _make_awq(weight: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedWeight:
    form = PackedRowFormat("awq_w4a16", ("scale_blocks", "zeros"), packed.awq_rows)
    rows, num_bytes = weight.shape
    # the file has one row of scales per group, the format one row per row of the weight
    return QuantizedWeight(
        form, (rows, 2 * num_bytes), (weight, scales.t().contiguous(), zeros.t().contiguous())
    )


LAYOUTS: Mapping[str, Callable[[_QuantizedLayer], dict[str, TensorInfo]]] = {
    "int8_tensorwise": _describe_int8,
    "mxfp8": _describe_mxfp8,
    "nvfp4": _describe_nvfp4,
    "convrot_w4a4": _describe_w4a4,
    "asym_w4a8_int8": _describe_w4a8,
    "awq_w4a16": _describe_awq,
}


def _describe_bitsandbytes(layer: _QuantizedLayer, read: Callable[[str], Tensor]) -> dict[str, TensorInfo]:
    """Return dtypes and shapes of a bitsandbytes 4-bit layer; `layer.settings` is its `QuantState`."""
    # The scale of a block of weights is its largest absolute value (absmax). With double quantization, these
    # scales are quantized to 8 bits, with one scale per group of blocks.
    quant_state = layer.settings
    block_size = layer.get_number("blocksize", default=64)
    rows, columns = quant_state["shape"]
    _check_four_bits(layer, rows, columns, block_size)
    group_size = layer.get_number("nested_blocksize", default=256)  # in blocks; for double quantization
    companions = _check_block_scales(layer, rows * columns // block_size, group_size)
    layer.check_companion("weight.quant_map", _FLOATS, (16,))
    quant_map = read(f"{layer.name}.weight.quant_map")
    levels = tuple(quant_map.float().tolist())  # the values of the 16 codes
    offset = float(quant_state.get("nested_offset", 0))
    if not all(map(math.isfinite, (offset, *levels))):
        raise ValueError("its levels or its nested_offset are NaN or infinite")
    row_format = PackedRowFormat(quant_state["quant_type"], ("largest",), four_bits(levels))
    make_quantized = partial(_make_four_bits, row_format, (rows, columns), offset, group_size)
    return layer.packed_infos((rows, columns), companions, make_quantized)


def _check_block_scales(layer: _QuantizedLayer, num_blocks: int, group_size: int) -> dict[str, TensorInfo]:
    """Check the tensors with the scales of a 4-bit layer's blocks, and return their dtypes and shapes."""
    if "nested_offset" not in layer.settings:
        return layer.check_companion("weight.absmax", _FLOATS, (num_blocks,))
    # double quantization
    num_groups = ceil_div(num_blocks, group_size)
    nested = layer.check_companion("weight.nested_absmax", _FLOATS, (num_groups,))
    nested |= layer.check_companion("weight.nested_quant_map", _FLOATS, (256,))
    return layer.check_companion("weight.absmax", (torch.uint8,), (num_blocks,)) | nested


def _check_four_bits(layer: _QuantizedLayer, rows: Any, columns: Any, block: int) -> None:
    """Raise ValueError if a bitsandbytes 4-bit weight does not match the shape in its `QuantState`."""
    form = layer.settings["quant_type"]
    if form not in ("nf4", "fp4"):
        raise ValueError(f"the format {str(form)[:60]!r}; nf4 and fp4 are read")
    are_integers = type(rows) is int and type(columns) is int
    is_shape = are_integers and rows > 0 and columns > 0
    if not is_shape or columns % block or block % 2:
        raise ValueError(f"rows of {columns} weights are not whole blocks of {block}")
    info = layer.weight
    if info.dtype != torch.uint8 or math.prod(info.shape) != rows * columns // 2:
        raise ValueError(f"{list(info.shape)} bytes for {rows} x {columns} weights")


def _make_four_bits(
    form: PackedRowFormat,
    shape: tuple[int, int],
    offset: float,
    group_size: int,
    weight: Tensor,
    absmax: Tensor,
    *nested_tensors: Tensor,
) -> QuantizedWeight:
    """Return a bitsandbytes 4-bit weight with one float32 scale for each block of a row."""
    if nested_tensors:
        # double quantization: absmax contains 8-bit indices into `levels`, scaled per group of blocks
        group_scales, levels = nested_tensors
        normalized = levels.float()[absmax.int()]
        expanded_scales = group_scales.float().repeat_interleave(group_size)[: len(absmax)]
        absmax = normalized * expanded_scales + offset
    return QuantizedWeight(form, shape, (weight.view(shape[0], -1), absmax.float().view(shape[0], -1)))

"""Recognize packed weights in a file by ComfyUI's marks and bitsandbytes' quantization states.

The `TensorInfo` of a packed weight gets the shape of the unpacked weight, and a `Packing`. Sources:
ComfyUI's `quant_ops.py`, comfy-kitchen's layouts, bitsandbytes' `QuantState`.

For each layout there are two functions: `_set_...` checks the tensors of a layer and records how it is
packed, and `_keep_...` later makes a `Stored` from them. A suffix is what follows the layer in a tensor's
name.
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

from checkpoints.containers import BNB_STATE, HEADER, MARK
from checkpoints.stored import packed
from checkpoints.stored.forms import Stored
from checkpoints.stored.int8 import GROUPS, Int8
from checkpoints.stored.packed import RowForm, four_bits
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
    """Return new infos, by name, of packed weights and of scales that are fp8 but stored as uint8.

    Args:
        tensors: All tensors of the file.
        metadata: Metadata of the file.
        read: Returns a tensor by name.

    Raises:
        ValueError: If a layer's form is unknown, or if its tensors do not have that form.
    """
    new_infos: dict[str, TensorInfo] = {}
    # a mark is a tensor or an entry of the metadata that says in which form a layer is quantized
    for stem, settings in _read_marks(tensors, metadata, read).items():
        layer = _Layer(stem, settings, tensors, new_infos)
        try:
            name = settings["format"]
            if name in FP8:
                layer.find_scale(any_shape=True)  # only checks that there is a scale
            elif name in LAYOUTS:
                LAYOUTS[name](layer)
            else:
                names = ", ".join([*FP8, *LAYOUTS])
                raise ValueError(f"is in the unknown form {str(name)[:60]!r}; those known are {names}")
        except (TypeError, KeyError) as error:
            raise ValueError(f"the layer {stem}: its mark cannot be read ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"the layer {stem} {error}") from error
    # layers of bitsandbytes have no mark: a tensor with their state lies next to the weight
    for name in tensors:
        weight, is_state, _ = name.partition(BNB_STATE)
        if is_state:
            stem = weight.removesuffix(".weight")
            try:
                _set_bitsandbytes(_Layer(stem, _parse(read, tensors, name), tensors, new_infos), read)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"the layer {stem}: its bitsandbytes state cannot be read ({error})"
                ) from error
    return new_infos


def _read_marks(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> dict[str, Mapping[str, Any]]:
    """Return the quantization settings of each marked layer, from mark tensors or metadata, by layer name."""
    marks: dict[str, Mapping[str, Any]] = {}
    for name in tensors:
        if name.endswith(MARK):
            marks[name.removesuffix(MARK)] = _read_settings(_parse(read, tensors, name))
    record = _parse_json(metadata.get(HEADER, "{}"), HEADER)
    layers = _require_table(record.get("layers", {}))
    prefix = _find_prefix(layers, tensors)
    for layer, mark in layers.items():
        stem = f"{prefix}{layer}"
        settings = _read_settings(mark)
        if marks.setdefault(stem, settings) != settings:
            raise ValueError(f"the layer {stem} is marked as {marks[stem]} and as {settings}")
    missing = [stem for stem in marks if f"{stem}.weight" not in tensors]
    if missing:
        logger.info(
            "marks of %d layers that are not in the file have no effect: %s",
            len(missing),
            missing[0],
        )
    for stem in missing:
        del marks[stem]
    return marks


def _find_prefix(layers: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """Return the prefix of tensor names that layer names in the metadata lack; "" if there is none."""
    first = next((f"{layer}.weight" for layer in layers if layer not in tensors), None)
    if first is None or first in tensors:
        return ""
    prefixed = [name for name in tensors if name.endswith(f".{first}")]
    return prefixed[0].removesuffix(first) if len(prefixed) == 1 else ""


def _require_table(value: Any) -> dict[str, Any]:
    """Return the value if it is a dictionary; raise ValueError if it is not."""
    if not isinstance(value, dict):
        raise ValueError(f"its record of quantization has {str(value)[:60]!r} in place of a table")
    return value


def _read_settings(mark: Any) -> dict[str, Any]:
    """Return a layer's quantization settings from its mark, which is a format name or a dictionary.

    The entries of the inner dictionary `params` are moved to the top level.
    """
    settings = {"format": mark} if isinstance(mark, str) else dict(_require_table(mark))
    parameters = _require_table(settings.pop("params", None) or {})
    return settings | parameters


def _parse(read: Callable[[str], Tensor], tensors: Mapping[str, TensorInfo], name: str) -> dict[str, Any]:
    """Parse the JSON object that a tensor contains as text; raise ValueError if there is none."""
    info = tensors[name]
    if info.dtype != torch.uint8 or info.size_bytes > _MAX_BYTES:
        raise ValueError(f"{name} is no text: {info.dtype} of {info.size_bytes:,} bytes")
    return _parse_json(bytes(read(name).flatten().tolist()), name)


def _parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        return _require_table(parse_json(text if isinstance(text, str) else text.decode()))
    except ValueError as error:
        raise ValueError(f"{name} is no JSON text ({error})") from error


@dataclass(frozen=True)
class _Layer:
    """A quantized layer of a file; messages of its errors continue the sentence "the layer NAME ..."."""

    stem: str  # name of the layer in the file
    settings: Mapping[str, Any]  # what the mark of the layer says
    tensors: Mapping[str, TensorInfo]  # all tensors of the file
    new_infos: dict[str, TensorInfo]  # result of `find_packed`, to which methods add

    @property
    def weight(self) -> TensorInfo:
        return self.tensors[f"{self.stem}.weight"]

    def get_number(self, key: str, default: int) -> int:
        """Return an integer setting; raise ValueError if it is not an integer from 1 to `_MAX_GROUP`."""
        value = self.settings.get(key, default)
        if type(value) is not int or not 0 < value <= _MAX_GROUP:
            raise ValueError(f"has the {key} {str(value)[:60]!r}")
        return value

    def get_rotation(self, columns: int) -> int:
        """Return the number of columns that ConvRot rotates together; raise ValueError if it does not fit."""
        size = self.get_number("convrot_groupsize", default=256)
        if size not in GROUPS or columns % size:
            raise ValueError(
                f"has {columns} columns, rotated in groups of {size}; those of {GROUPS} are read"
            )
        return size

    def check_matrix(self, *dtypes: torch.dtype) -> tuple[int, int]:
        """Return the rows and columns of the stored weight.

        Raises:
            ValueError: If the weight is not a matrix, or if its dtype is none of `dtypes`.
        """
        info = self.weight
        if info.dtype not in dtypes or len(info.shape) != 2 or 0 in info.shape:
            raise ValueError(f"has a weight of {info.dtype} {list(info.shape)}, which its form does not have")
        return info.shape[0], info.shape[1]

    def check_companion(
        self, suffix: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return the shape of an additional tensor of the layer, such as a scale.

        Some programs store fp8 as uint8: if the first of `dtypes` has 8 bits, uint8 is reinterpreted as it.

        Args:
            suffix: Name of the tensor after the layer's name.
            dtypes: Possible dtypes.
            *shapes: Possible shapes; any shape if there are none.

        Raises:
            ValueError: If the tensor is missing or has another dtype or shape.
        """
        name = f"{self.stem}.{suffix}"
        info = self.tensors.get(name)
        if info is None:
            raise ValueError(f"is stored in a form whose {name} is not there")
        if info.dtype == torch.uint8 and dtypes[0].itemsize == 1:
            info = replace(info, dtype=dtypes[0])
            self.new_infos[name] = info
        if info.dtype not in dtypes or (shapes and info.shape not in shapes):
            raise ValueError(f"has {name} of {info.dtype} {list(info.shape)}, which does not fit its weight")
        return info.shape

    def find_scale(self, *shapes: tuple[int, ...], any_shape: bool = False) -> str:
        """Return the suffix of the layer's scale, whose shape must be one of `shapes` unless `any_shape`."""
        for suffix in ("weight_scale", "scale_weight"):
            if f"{self.stem}.{suffix}" in self.tensors:
                if not any_shape:
                    self.check_companion(suffix, _FLOATS, *shapes)
                return suffix
        raise ValueError(f"is marked as {self.settings['format']}, but {self.stem}.weight_scale is not there")

    def set_packing(
        self, shape: tuple[int, ...], companions: tuple[str, ...], keep: Callable[..., Stored], pad: int = 1
    ) -> None:
        """Record how a packed weight is unpacked.

        Args:
            shape: Shape of the unpacked weight.
            companions: Name suffixes of the layer's additional tensors, such as scales.
            keep: Builds a `Stored` from the weight and the additional tensors.
            pad: Number that padded rows and columns are a multiple of.
        """
        info = self.weight
        packing = Packing(info.shape, companions, keep, pad)
        self.new_infos[f"{self.stem}.weight"] = TensorInfo(info.dtype, shape, packing)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_E4M3 = torch.float8_e4m3fn
_E8M0 = torch.float8_e8m0fnu


def _expand_scale(scale: Tensor, rows: int) -> Tensor:
    """Expand a scale per layer or per row to float32, N 1.

    Raises:
        ValueError: If a scale is not positive and finite.
    """
    if scale.device.type != "meta" and not (scale.float().isfinite() & (scale > 0)).all():
        raise ValueError("has scales that are zero, negative, NaN or infinite")
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def _set_int8(layer: _Layer) -> None:
    """Record a layer in int8, rotated or not; raise ValueError if its tensors do not have that form."""
    shape = layer.weight.shape
    if layer.weight.dtype != torch.int8 or len(shape) < 2 or 0 in shape:
        raise ValueError(f"has a weight of {layer.weight.dtype} {list(shape)}, which its form does not have")
    rows = shape[0]
    columns = math.prod(shape[1:])
    all_axes = (rows, *[1] * (len(shape) - 1))  # one scale per row, with as many axes as the weight
    scale_shapes: list[tuple[int, ...]] = [all_axes, (rows, 1), (rows,)]
    rotation = layer.get_rotation(columns) if layer.settings.get("convrot") else 0
    if not rotation or rows == 1:  # a single scale for all rows is allowed only without rotation
        scale_shapes += [(), (1,)]
    suffix = layer.find_scale(*scale_shapes)
    multiplies_in_16_bits = bool(layer.settings.get("full_precision_matrix_mult"))
    layer.set_packing(shape, (suffix,), partial(_keep_int8, rotation, multiplies_in_16_bits))


def _keep_int8(rotation: int, multiplies_in_16_bits: bool, weight: Tensor, scale: Tensor) -> Stored:
    flat = weight.flatten(1)
    form: RowForm | Int8 = Int8(rotation)
    if multiplies_in_16_bits:
        form = RowForm("int8", ("scale_weight",), packed.int8_rows, rotation)
    return Stored(form, (flat.shape[0], flat.shape[1]), (flat, _expand_scale(scale, len(flat))))


def _check_tiled_scale(layer: _Layer, dtype: torch.dtype, rows: int, columns: int) -> None:
    """Check block scales that are stored in the tiles of Blackwell GPUs: 128 rows and 4 columns."""
    padded_shape = (round_up(rows, 128), round_up(columns, 4))
    layer.check_companion("weight_scale", (dtype,), padded_shape)


def _set_mxfp8(layer: _Layer) -> None:
    """Record how to unpack MXFP8: e4m3 values with an e8m0 scale for each block of 32 columns."""
    rows, columns = layer.check_matrix(_E4M3, torch.uint8)
    if rows % 32 or columns % 32:
        raise ValueError(f"has {rows} x {columns} weights, which its form pads to multiples of 32")
    _check_tiled_scale(layer, _E8M0, rows, columns // 32)
    layer.set_packing((rows, columns), ("weight_scale",), _keep_mxfp8, pad=32)


def _keep_mxfp8(weight: Tensor, scales: Tensor) -> Stored:
    rows, columns = weight.shape
    form = RowForm("mxfp8", ("scale_weight",), packed.mxfp8_rows)
    flat = packed.untile(scales, rows, columns // 32)
    return Stored(form, (rows, columns), (weight.view(_E4M3), flat))


def _set_nvfp4(layer: _Layer) -> None:
    """Record a layer in NVFP4: 4-bit values, a scale per block of 16 columns, and a scale per layer.

    Raises ValueError if the tensors of the layer do not have that form.
    """
    rows, num_bytes = layer.check_matrix(torch.uint8)
    columns = 2 * num_bytes  # two values per byte
    if rows % 16 or columns % 16:
        raise ValueError(f"has {rows} x {columns} weights, which its form pads to multiples of 16")
    _check_tiled_scale(layer, _E4M3, rows, columns // 16)
    layer.check_companion("weight_scale_2", _FLOATS, (), (1,))
    suffixes = ["weight_scale", "weight_scale_2"]
    if f"{layer.stem}.pre_quant_scale" in layer.tensors:  # factors of the layer's input
        (length,) = layer.check_companion("pre_quant_scale", _FLOATS)
        if not 0 <= columns - length < 16:
            raise ValueError(f"multiplies {length} inputs, but has {columns} columns")
        suffixes.append("pre_quant_scale")
    layer.set_packing((rows, columns), tuple(suffixes), _keep_nvfp4, pad=16)


def _keep_nvfp4(
    weight: Tensor, block_scales: Tensor, scale: Tensor, input_scale: Tensor | None = None
) -> Stored:
    rows, num_bytes = weight.shape
    columns = 2 * num_bytes
    form = RowForm("nvfp4", ("scale_blocks", "scale_weight", "scale_of_input"), packed.nvfp4_rows)
    if input_scale is not None:  # has no values for padding columns
        missing = columns - len(input_scale)
        input_scale = functional.pad(input_scale.float(), (0, missing), value=1.0).reshape(1, -1)
    block_scales = packed.untile(block_scales, rows, columns // 16)
    return Stored(form, (rows, columns), (weight, block_scales, _expand_scale(scale, rows), input_scale))


def _set_w4a4(layer: _Layer) -> None:
    """Record how to unpack a 4-bit weight with rotated columns and one scale per row."""
    rows, num_bytes = layer.check_matrix(torch.int8, torch.uint8)
    columns = 2 * num_bytes
    suffix = layer.find_scale((rows,), (rows, 1))
    layer.set_packing((rows, columns), (suffix,), partial(_keep_w4a4, layer.get_rotation(columns)))


def _keep_w4a4(rotation: int, weight: Tensor, scale: Tensor) -> Stored:
    form = RowForm("convrot_w4a4", ("scale_weight",), packed.w4a4_rows, rotation)
    return Stored(form, (len(weight), 2 * weight.shape[1]), (weight, _expand_scale(scale, len(weight))))


def _set_w4a8(layer: _Layer) -> None:
    """Record a layer in 4 or 6 bits with scales per row and relative scales per group of columns."""
    rows, num_bytes = layer.check_matrix(torch.int8, torch.uint8)
    if f"{layer.stem}.weight_correction" in layer.tensors:
        raise ValueError("has a weight_correction, which is not supported")
    # the file says neither the number of columns nor the bits: the relative scales, one per group, give the
    # columns; the bytes per column give the bits
    shape = layer.check_companion("weight_s_rel", (_E4M3, torch.float32))
    columns = math.prod(shape[1:]) * layer.get_number("group_size", default=16)
    bits = 8 * num_bytes // max(columns, 1)
    is_one_scale_per_group = len(shape) == 2 and shape[0] == rows
    if not is_one_scale_per_group or columns * bits != 8 * num_bytes or bits not in (4, 6):
        raise ValueError(f"has {num_bytes} bytes for {columns} columns, in place of 4 or 6 bits for each")
    layer.check_companion("weight_s_channel", _FLOATS, (rows,), (rows, 1))
    suffixes = ["weight_s_rel", "weight_s_channel"]
    if f"{layer.stem}.weight_codebook" in layer.tensors:
        if bits == 6:  # its codes are whole numbers from -32
            raise ValueError("has a codebook for 6 bits, which only weights in 4 bits may have")
        layer.check_companion("weight_codebook", _FLOATS, (16,))
        suffixes.append("weight_codebook")
    keep = partial(_keep_w4a8, bits, columns, layer.get_rotation(columns))
    layer.set_packing((rows, columns), tuple(suffixes), keep)


def _keep_w4a8(
    bits: int,
    columns: int,
    rotation: int,
    weight: Tensor,
    group_scales: Tensor,
    row_scales: Tensor,
    codebook: Tensor | None = None,
) -> Stored:
    """Return a weight of 4 or 6 bits with its tensors in the order that `RowForm` reads."""
    read_rows = packed.w4a8_rows if bits == 4 else packed.w6a8_rows
    form = RowForm("asym_w4a8_int8", ("scale_blocks", "scale_weight", "codebook"), read_rows, rotation)
    if codebook is not None:
        codebook = codebook.float().reshape(1, 16)
    rows = len(weight)
    return Stored(form, (rows, columns), (weight, group_scales, _expand_scale(row_scales, rows), codebook))


def _set_awq(layer: _Layer) -> None:
    """Record how to unpack a 4-bit AWQ weight with a scale and a zero point per group of columns."""
    rows, num_bytes = layer.check_matrix(torch.int8, torch.uint8)
    columns = 2 * num_bytes
    group = layer.get_number("group_size", default=64)
    if columns % group:
        raise ValueError(f"has {columns} columns, which groups of {group} do not divide")
    for suffix in ("weight_scale", "weight_zeros"):
        layer.check_companion(suffix, _FLOATS, (columns // group, rows))
    layer.set_packing((rows, columns), ("weight_scale", "weight_zeros"), _keep_awq)


def _keep_awq(weight: Tensor, scales: Tensor, zeros: Tensor) -> Stored:
    form = RowForm("awq_w4a16", ("scale_blocks", "zeros"), packed.awq_rows)
    rows, num_bytes = weight.shape
    # the file has a row of scales per group, the form a row per row of the weight
    return Stored(form, (rows, 2 * num_bytes), (weight, scales.t().contiguous(), zeros.t().contiguous()))


LAYOUTS: Mapping[str, Callable[[_Layer], None]] = {
    "int8_tensorwise": _set_int8,
    "mxfp8": _set_mxfp8,
    "nvfp4": _set_nvfp4,
    "convrot_w4a4": _set_w4a4,
    "asym_w4a8_int8": _set_w4a8,
    "awq_w4a16": _set_awq,
}


def _set_bitsandbytes(layer: _Layer, read: Callable[[str], Tensor]) -> None:
    """Record a 4-bit weight of bitsandbytes; `layer.settings` is its `QuantState`.

    A block of weights has a scale, the largest absolute value of the block (absmax). With double
    quantization, these scales are quantized to 8 bits, with scales per group of blocks.
    """
    state = layer.settings
    block = layer.get_number("blocksize", default=64)
    rows, columns = state["shape"]
    _check_four_bits(layer, rows, columns, block)
    num_blocks = rows * columns // block
    suffixes = ["weight.absmax"]
    absmax_dtypes: tuple[torch.dtype, ...] = _FLOATS
    if "nested_offset" in state:  # double quantization
        suffixes += ["weight.nested_absmax", "weight.nested_quant_map"]
        absmax_dtypes = (torch.uint8,)
        num_groups = ceil_div(num_blocks, layer.get_number("nested_blocksize", default=256))
        layer.check_companion("weight.nested_absmax", _FLOATS, (num_groups,))
        layer.check_companion("weight.nested_quant_map", _FLOATS, (256,))
    layer.check_companion("weight.absmax", absmax_dtypes, (num_blocks,))
    layer.check_companion("weight.quant_map", _FLOATS, (16,))
    _set_four_bits(layer, (rows, columns), tuple(suffixes), read(f"{layer.stem}.weight.quant_map"))


def _set_four_bits(
    layer: _Layer, shape: tuple[int, int], suffixes: tuple[str, ...], quant_map: Tensor
) -> None:
    """Record how to unpack a 4-bit weight of bitsandbytes; `quant_map` holds its 16 levels."""
    levels = tuple(quant_map.float().tolist())
    offset = float(layer.settings.get("nested_offset", 0))
    group_size = layer.get_number("nested_blocksize", default=256)
    if not all(map(math.isfinite, (offset, *levels))):
        raise ValueError("its levels or its nested_offset are NaN or infinite")
    form = RowForm(layer.settings["quant_type"], ("largest",), four_bits(levels))
    layer.set_packing(shape, suffixes, partial(_keep_four_bits, form, shape, offset, group_size))


def _check_four_bits(layer: _Layer, rows: Any, columns: Any, block: int) -> None:
    """Raise ValueError if a bitsandbytes 4-bit weight does not match the sizes in its `QuantState`."""
    form = layer.settings["quant_type"]
    if form not in ("nf4", "fp4"):
        raise ValueError(f"the form {str(form)[:60]!r}; nf4 and fp4 are read")
    are_integers = type(rows) is int and type(columns) is int
    is_shape = are_integers and rows > 0 and columns > 0
    if not is_shape or columns % block or block % 2:
        raise ValueError(f"rows of {columns} weights are not whole blocks of {block}")
    info = layer.weight
    if info.dtype != torch.uint8 or math.prod(info.shape) != rows * columns // 2:
        raise ValueError(f"{list(info.shape)} bytes for {rows} x {columns} weights")


def _keep_four_bits(
    form: RowForm,
    shape: tuple[int, int],
    offset: float,
    group_size: int,
    weight: Tensor,
    absmax: Tensor,
    *nested_tensors: Tensor,
) -> Stored:
    """Return a 4-bit weight of bitsandbytes with float32 scales, one for each block of a row."""
    if nested_tensors:
        # double quantization: absmax holds 8-bit indices into `levels`, scaled per group of blocks
        group_scales, levels = nested_tensors
        normalized = levels.float()[absmax.int()]
        scale_of_block = group_scales.float().repeat_interleave(group_size)[: len(absmax)]
        absmax = normalized * scale_of_block + offset
    return Stored(form, shape, (weight.view(shape[0], -1), absmax.float().view(shape[0], -1)))

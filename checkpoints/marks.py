"""Recognize packed weights by the marks of ComfyUI and the states of bitsandbytes in a file.

The `TensorInfo` of such a weight gets the shape of the unpacked weight, and a `Packing`. Sources:
ComfyUI's `quant_ops.py`, comfy-kitchen's layouts, bitsandbytes' `QuantState`.
"""

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
_MAX_BYTES = 1 << 16  # largest mark or state
_MAX_GROUP = 1 << 16  # largest group of columns


def find_packed(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> dict[str, TensorInfo]:
    """Return new tensor infos by name, for packed weights and for companions with fp8 stored as uint8.

    `read` returns a tensor by name. Raises ValueError, naming the layer, if a form is unknown or incomplete.
    """
    new_infos: dict[str, TensorInfo] = {}
    for stem, settings in _read_marks(tensors, metadata, read).items():
        layer = _Layer(stem, settings, tensors, new_infos)
        try:
            name = settings["format"]
            if name in FP8:
                layer.scale(optional=True)
            elif name in LAYOUTS:
                LAYOUTS[name](layer)
            else:
                names = ", ".join([*FP8, *LAYOUTS])
                raise ValueError(f"is in the unknown form {str(name)[:60]!r}; those known are {names}")
        except (TypeError, KeyError) as error:
            raise ValueError(f"the layer {stem}: its mark cannot be read ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"the layer {stem} {error}") from error
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
    """Return the settings of each marked layer, by its name in the file."""
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


def _find_prefix(header: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """Return the prefix that tensor names have but layer names in the header do not; "" if none."""
    first = next((f"{layer}.weight" for layer in header if layer not in tensors), None)
    if first is None or first in tensors:
        return ""
    longer = [name for name in tensors if name.endswith(f".{first}")]
    return longer[0].removesuffix(first) if len(longer) == 1 else ""


def _require_table(value: Any) -> dict[str, Any]:
    """Return a value of a record if it is a dict; raise ValueError if it is not."""
    if not isinstance(value, dict):
        raise ValueError(f"its record of quantization has {str(value)[:60]!r} in place of a table")
    return value


def _read_settings(mark: Any) -> dict[str, Any]:
    """Return a layer's settings, with the entries of `params` moved to the top level."""
    settings = {"format": mark} if isinstance(mark, str) else _require_table(mark)
    parameters = _require_table(settings.get("params") or {})
    return {key: value for key, value in settings.items() if key != "params"} | parameters


def _parse(read: Callable[[str], Tensor], tensors: Mapping[str, TensorInfo], name: str) -> dict[str, Any]:
    """Return the JSON object that a tensor contains as text. Raises ValueError if it has no such text."""
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
    """A marked layer: its settings, the infos of all tensors, and `new_infos`, to which it adds changes."""

    stem: str  # name of the layer in the file
    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    new_infos: dict[str, TensorInfo]

    @property
    def weight(self) -> TensorInfo:
        return self.tensors[f"{self.stem}.weight"]

    def number(self, key: str, usual: int) -> int:
        """Return a setting that is a positive integer, `usual` by default."""
        value = self.settings.get(key, usual)
        if type(value) is not int or not 0 < value <= _MAX_GROUP:
            raise ValueError(f"has the {key} {str(value)[:60]!r}")
        return value

    def rotation(self, columns: int, usual: int = 256) -> int:
        """Return the number of columns that are rotated together (ConvRot)."""
        size = self.number("convrot_groupsize", usual)
        if size not in GROUPS or columns % size:
            raise ValueError(
                f"has {columns} columns, rotated in groups of {size}; those of {GROUPS} are read"
            )
        return size

    def pair(self, *dtypes: torch.dtype) -> tuple[int, int]:
        """Return rows and columns of the weight in the file.

        Raises:
            ValueError: If the weight has another dtype or is not a matrix.
        """
        info = self.weight
        if info.dtype not in dtypes or len(info.shape) != 2 or 0 in info.shape:
            raise ValueError(f"has a weight of {info.dtype} {list(info.shape)}, which its form does not have")
        return info.shape[0], info.shape[1]

    def companion(
        self, end: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return the shape of a companion tensor with the suffix `end`.

        A uint8 tensor is reinterpreted as the first of `dtypes` if that has 8 bits.

        Raises:
            ValueError: If the tensor is missing or does not have one of these dtypes and shapes.
        """
        name = f"{self.stem}.{end}"
        info = self.tensors.get(name)
        if info is None:
            raise ValueError(f"is stored in a form whose {name} is not there")
        if info.dtype == torch.uint8 and dtypes[0].itemsize == 1:
            info = self.new_infos[name] = replace(info, dtype=dtypes[0])
        if info.dtype not in dtypes or (shapes and info.shape not in shapes):
            raise ValueError(f"has {name} of {info.dtype} {list(info.shape)}, which does not fit its weight")
        return info.shape

    def scale(self, *shapes: tuple[int, ...], optional: bool = False) -> str:
        """Return the suffix of the layer's scale, which must have one of `shapes` unless it is `optional`."""
        for end in ("weight_scale", "scale_weight"):
            if f"{self.stem}.{end}" in self.tensors:
                if not optional:
                    self.companion(end, _FLOATS, *shapes)
                return end
        raise ValueError(f"is marked as {self.settings['format']}, but {self.stem}.weight_scale is not there")

    def set(
        self, shape: tuple[int, ...], companions: tuple[str, ...], keep: Callable[..., Stored], pad: int = 1
    ) -> None:
        """Record that the weight is packed; `shape` is its unpacked shape, `keep` builds the `Stored`."""
        info = self.weight
        packing = Packing(info.shape, companions, keep, pad)
        self.new_infos[f"{self.stem}.weight"] = TensorInfo(info.dtype, shape, packing)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_E4M3, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def _expand_scale(scale: Tensor, rows: int) -> Tensor:
    """Return a scale, one per layer or per row, as N 1 float32 for N rows.

    Raises:
        ValueError: If a scale is not positive and finite.
    """
    if scale.device.type != "meta" and not (scale.float().isfinite() & (scale > 0)).all():
        raise ValueError("has scales that are zero, negative, NaN or infinite")
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def _set_int8(layer: _Layer) -> None:
    """Mark a layer as int8, rotated or not. Raises ValueError if its tensors do not have that form."""
    shape = layer.weight.shape
    if layer.weight.dtype != torch.int8 or len(shape) < 2 or 0 in shape:
        raise ValueError(f"has a weight of {layer.weight.dtype} {list(shape)}, which its form does not have")
    rows = shape[0]
    columns = math.prod(shape[1:])
    scale_shapes: list[tuple[int, ...]] = [(rows, *[1] * (len(shape) - 1)), (rows, 1), (rows,)]
    rotation = layer.rotation(columns) if layer.settings.get("convrot") else 0
    if not rotation or rows == 1:  # a single scale for all rows is allowed only without rotation
        scale_shapes += [(), (1,)]
    end = layer.scale(*scale_shapes)
    in_16_bits = bool(layer.settings.get("full_precision_matrix_mult"))
    layer.set(shape, (end,), partial(_keep_int8, rotation, in_16_bits))


def _keep_int8(rotation: int, in_16_bits: bool, weight: Tensor, scale: Tensor) -> Stored:
    flat = weight.flatten(1)
    form = RowForm("int8", ("scale_weight",), packed.int8_rows, rotation) if in_16_bits else Int8(rotation)
    return Stored(form, (flat.shape[0], flat.shape[1]), (flat, _expand_scale(scale, len(flat))))


def _check_tiled_scale(layer: _Layer, dtype: torch.dtype, rows: int, columns: int) -> None:
    shape = (round_up(rows, 128), round_up(columns, 4))  # padded to whole tiles
    layer.companion("weight_scale", (dtype,), shape)


def _set_mxfp8(layer: _Layer) -> None:
    rows, columns = layer.pair(_E4M3, torch.uint8)
    if rows % 32 or columns % 32:
        raise ValueError(f"has {rows} x {columns} weights, which its form pads to multiples of 32")
    _check_tiled_scale(layer, _E8M0, rows, columns // 32)
    layer.set((rows, columns), ("weight_scale",), _keep_mxfp8, 32)


def _keep_mxfp8(weight: Tensor, scales: Tensor) -> Stored:
    rows, columns = weight.shape
    form = RowForm("mxfp8", ("scale_weight",), packed.mxfp8_rows)
    flat = packed.untile(scales, rows, columns // 32)
    return Stored(form, (rows, columns), (weight.view(_E4M3), flat))


def _set_nvfp4(layer: _Layer) -> None:
    """Mark a layer as NVFP4. Raises ValueError if its tensors do not have that form."""
    rows, half = layer.pair(torch.uint8)
    if rows % 16 or half % 8:
        raise ValueError(f"has {rows} x {2 * half} weights, which its form pads to multiples of 16")
    _check_tiled_scale(layer, _E4M3, rows, half // 8)
    layer.companion("weight_scale_2", _FLOATS, (), (1,))
    ends = ["weight_scale", "weight_scale_2"]
    if f"{layer.stem}.pre_quant_scale" in layer.tensors:
        (length,) = layer.companion("pre_quant_scale", _FLOATS)
        if not 0 <= 2 * half - length < 16:
            raise ValueError(f"multiplies {length} inputs, but has {2 * half} columns")
        ends.append("pre_quant_scale")
    layer.set((rows, 2 * half), tuple(ends), _keep_nvfp4, 16)


def _keep_nvfp4(weight: Tensor, scales: Tensor, scale: Tensor, of_input: Tensor | None = None) -> Stored:
    rows, half = weight.shape
    form = RowForm("nvfp4", ("scale_blocks", "scale_weight", "scale_of_input"), packed.nvfp4_rows)
    if of_input is not None:  # it has no values for padding columns
        missing = 2 * half - len(of_input)
        of_input = functional.pad(of_input.float(), (0, missing), value=1.0).reshape(1, -1)
    scale_blocks = packed.untile(scales, rows, half // 8)
    return Stored(form, (rows, 2 * half), (weight, scale_blocks, _expand_scale(scale, rows), of_input))


def _set_w4a4(layer: _Layer) -> None:
    rows, half = layer.pair(torch.int8, torch.uint8)
    end = layer.scale((rows,), (rows, 1))
    layer.set((rows, 2 * half), (end,), partial(_keep_w4a4, layer.rotation(2 * half)))


def _keep_w4a4(rotation: int, weight: Tensor, scale: Tensor) -> Stored:
    form = RowForm("convrot_w4a4", ("scale_weight",), packed.w4a4_rows, rotation)
    return Stored(form, (len(weight), 2 * weight.shape[1]), (weight, _expand_scale(scale, len(weight))))


def _set_w4a8(layer: _Layer) -> None:
    """Mark a layer as 4 or 6 bits with scales per row and relative scales per group of columns."""
    rows, width = layer.pair(torch.int8, torch.uint8)
    if f"{layer.stem}.weight_correction" in layer.tensors:
        raise ValueError("has a weight_correction, which is not supported")
    # the file does not state the bits: relative scales give the number of columns, bytes per column the bits
    shape = layer.companion("weight_s_rel", (_E4M3, torch.float32))
    columns = math.prod(shape[1:]) * layer.number("group_size", 16)
    bits = 8 * width // max(columns, 1)
    is_one_scale_per_group = len(shape) == 2 and shape[0] == rows
    if not is_one_scale_per_group or columns * bits != 8 * width or bits not in (4, 6):
        raise ValueError(f"has {width} bytes for {columns} columns, in place of 4 or 6 bits for each")
    layer.companion("weight_s_channel", _FLOATS, (rows,), (rows, 1))
    ends = ["weight_s_rel", "weight_s_channel"]
    if f"{layer.stem}.weight_codebook" in layer.tensors:
        layer.companion("weight_codebook", _FLOATS, (16,))
        ends.append("weight_codebook")
    layer.set((rows, columns), tuple(ends), partial(_keep_w4a8, bits, columns, layer.rotation(columns)))


def _keep_w4a8(
    bits: int,
    columns: int,
    rotation: int,
    weight: Tensor,
    scales: Tensor,
    scale: Tensor,
    codes: Tensor | None = None,
) -> Stored:
    """Return a weight of 4 or 6 bits with its tensors in the order that `RowForm` reads."""
    rows = packed.w4a8_rows if bits == 4 else packed.w6a8_rows
    form = RowForm("asym_w4a8_int8", ("scale_blocks", "scale_weight", "codebook"), rows, rotation)
    codes = None if codes is None else codes.float().reshape(1, 16)
    return Stored(form, (len(weight), columns), (weight, scales, _expand_scale(scale, len(weight)), codes))


def _set_awq(layer: _Layer) -> None:
    rows, half = layer.pair(torch.int8, torch.uint8)
    group = layer.number("group_size", 64)
    if 2 * half % group:
        raise ValueError(f"has {2 * half} columns, which groups of {group} do not divide")
    for end in ("weight_scale", "weight_zeros"):
        layer.companion(end, _FLOATS, (2 * half // group, rows))
    layer.set((rows, 2 * half), ("weight_scale", "weight_zeros"), _keep_awq)


def _keep_awq(weight: Tensor, scales: Tensor, zeros: Tensor) -> Stored:
    form = RowForm("awq_w4a16", ("scale_blocks", "zeros"), packed.awq_rows)
    companions = scales.t().contiguous(), zeros.t().contiguous()
    return Stored(form, (len(weight), 2 * weight.shape[1]), (weight, *companions))


LAYOUTS: Mapping[str, Callable[[_Layer], None]] = {
    "int8_tensorwise": _set_int8,
    "mxfp8": _set_mxfp8,
    "nvfp4": _set_nvfp4,
    "convrot_w4a4": _set_w4a4,
    "asym_w4a8_int8": _set_w4a8,
    "awq_w4a16": _set_awq,
}


def _set_bitsandbytes(layer: _Layer, read: Callable[[str], Tensor]) -> None:
    """Recognize a 4-bit weight of bitsandbytes; `layer.settings` is its `QuantState`."""
    state = layer.settings
    block = layer.number("blocksize", 64)
    rows, columns = state["shape"]
    _check_four_bits(layer, rows, columns, block)
    blocks = rows * columns // block
    ends = ["weight.absmax"]
    peak_dtypes: tuple[torch.dtype, ...] = _FLOATS
    if "nested_offset" in state:  # double quantization: the maxima of blocks are quantized to 8 bits, too
        ends += ["weight.nested_absmax", "weight.nested_quant_map"]
        peak_dtypes = (torch.uint8,)
        groups = ceil_div(blocks, layer.number("nested_blocksize", 256))
        layer.companion("weight.nested_absmax", _FLOATS, (groups,))
        layer.companion("weight.nested_quant_map", _FLOATS, (256,))
    layer.companion("weight.absmax", peak_dtypes, (blocks,))
    layer.companion("weight.quant_map", _FLOATS, (16,))
    _set_four_bits(layer, (rows, columns), tuple(ends), read(f"{layer.stem}.weight.quant_map"))


def _set_four_bits(layer: _Layer, shape: tuple[int, int], ends: tuple[str, ...], quant_map: Tensor) -> None:
    """Mark a layer as 4 bits of bitsandbytes; `ends` are the suffixes of its companions."""
    levels = tuple(quant_map.float().tolist())
    offset = float(layer.settings.get("nested_offset", 0))
    nested = layer.number("nested_blocksize", 256)
    if not all(map(math.isfinite, (offset, *levels))):
        raise ValueError("its levels or its nested_offset are NaN or infinite")
    form = RowForm(layer.settings["quant_type"], ("largest",), four_bits(levels))
    layer.set(shape, ends, partial(_keep_four_bits, form, shape, offset, nested))


def _check_four_bits(layer: _Layer, rows: Any, columns: Any, block: int) -> None:
    """Raise ValueError if a 4-bit weight of bitsandbytes does not match its state."""
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
    nested: int,
    weight: Tensor,
    largest: Tensor,
    *nested_tensors: Tensor,
) -> Stored:
    """Return a 4-bit weight of bitsandbytes; double-quantized scales are dequantized first."""
    if nested_tensors:  # the maxima of blocks are quantized to 8 bits
        scales, levels = nested_tensors
        coded = levels.float()[largest.int()] * scales.float().repeat_interleave(nested)[: len(largest)]
        largest = coded + offset
    return Stored(form, shape, (weight.view(shape[0], -1), largest.float().view(shape[0], -1)))

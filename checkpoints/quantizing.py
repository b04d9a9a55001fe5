"""Quantize the layers of a model file to 8 bits (ComfyUI's layout or GGUF), or dequantize it to bf16.

Tensors keep their names in the file. In a transformer, the layers that its family keeps in fp8 are quantized;
in a text encoder, the linear layers of its blocks. Sources: as in `marks` and `gguf_files`.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from checkpoints.containers import HEADER, MARK
from checkpoints.dits import DitFormat, bare_names
from checkpoints.filling import linear_weights, on_meta_device
from checkpoints.finite import check_finite
from checkpoints.kinds import is_lora, kind_of
from checkpoints.opening import (
    Checkpoint,
    checkpoint_paths,
    open_checkpoint,
    plain_sources,
    reject_quantized,
)
from checkpoints.stored.forms import Shape
from checkpoints.stored.fp8 import E4M3, is_fp8
from checkpoints.stored.fp8 import quantize as round_to_fp8
from checkpoints.stored.int8 import GROUPS, Int8
from checkpoints.writing import stream_tensors
from modules.atomic_write import atomic_path
from modules.bars import BYTES, track
from modules.console import as_size, show_box
from modules.devices import dtype_name, select_device
from modules.errors import CheckpointError, OptionError
from modules.installation import import_own
from modules.options import Options, option
from modules.output_files import check_output_file, check_place, reject_replacing
from modules.speed_options import SDPA, Quantization
from protocols.families import FAMILIES
from protocols.loading import TensorInfo

logger = logging.getLogger(__name__)

_STALE = ("sshs_", "modelspec.hash_sha256", HEADER)  # prefixes of metadata that describe the old tensors
_OF_GGUF = ("general.", "GGUF.", "comfy.gguf.")  # prefixes of metadata that only GGUF files have
# pattern of a tensor that identifies a text encoder -> pattern of its linear weights, after the same prefix
_TEXT_ENCODERS = {
    r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight": (
        r"encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.w[io](_\d)?)\.weight"
    ),
    r"blocks\.0\.pos_embedding\.embedding\.weight": (
        r"blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate\.0|fc[12]))\.weight"
    ),
    r"layers\.0\.mlp\.gate_proj\.weight": r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight",
}
_GGUF_KINDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
_LONGEST_IN_GGUF = 127  # bytes of a tensor name; readers reject longer names
_SMALL_IN_GGUF = 1024  # values; tensors up to this size are stored in float32
# `general.architecture` as ComfyUI-GGUF expects it, if it differs from the family's name
_ARCHITECTURES = {
    **{"hunyuan_video": "hyvid", "framepack": "hyvid", "flux_2": "flux", "ltx_2": "ltxv"},
    **{"lumina": "lumina2", "z_image": "lumina2"},
}
# kinds of tensors of a quantized layer; the third is MARK
CODES = ""  # the rounded weight, whose name is that of the weight
WEIGHT_SCALE = ".weight_scale"  # suffix of its scale
GGUF = "q8_0"
FORMS = ("int8", "convrot", "fp8", GGUF, "bf16")


class QuantizeOptions(Options):
    """Options of `tools/quantise.py`."""

    model: Path = option(
        "transformer or text encoder in 16 or 32 bits: a file, one of its shards, an index, or a folder; for "
        "--form bf16 a quantized one",
        place="there",
        required=True,
        by_place=True,
        flags=("--model", "--input"),
    )
    form: str = option(
        "int8: a scale for each row; convrot: the same, rotated so that outliers cost nothing; fp8: a scale "
        "for each weight; all three in ComfyUI's layout. q8_0: GGUF, of transformers. bf16: back to 16 bits",
        choices=FORMS,
        refused={
            "nf4": "its scales are stored in a form of ours that no other program reads; --nf4_base "
            "rounds to 4 bits while the model loads",
        },
        required=True,
    )
    output: Path = option("file to write: .safetensors, with --form q8_0 .gguf", required=True, by_place=True)
    device: str | None = option("device that rounds; default: CUDA if available, else the CPU")

    def __post_init__(self) -> None:
        if self.form != GGUF:
            check_output_file("--output", self.output)
        elif self.output.suffix.lower() != ".gguf":
            raise OptionError(
                f"--output {self.output}: a GGUF file is written. Give a name that ends in .gguf"
            )
        else:
            check_place("--output", self.output)


@dataclass(frozen=True)
class Recognized:
    """A recognized network and its layers that can be quantized, by their names in the file."""

    what: str  # description for messages
    family: str | None  # None: a text encoder
    layers: frozenset[str]  # names of weights that can be quantized
    shapes: Mapping[str, tuple[int, ...]]  # shapes of weights in the network, without padding, by name
    # functions that reorder the rows of a tensor as in a single file (`DitFormat.single_rows`), by name
    single_rows: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """Read a tensor with its rows in the order of the published single file.

        Raises:
            CheckpointError: If the tensor has NaN or infinite values.
        """
        tensor = checkpoint.read(name)
        check_finite(checkpoint.path, name, tensor)
        order = self.single_rows.get(name)
        return tensor if order is None else order(tensor).contiguous()


def quantize_file(options: QuantizeOptions) -> None:
    """Write a model's file with quantized layers, or with --form bf16 a quantized one in 16 bits.

    Raises:
        CheckpointError: If the model is unknown or already quantized (for --form bf16: not quantized).
        OptionError: If the output would replace an input file.
        OutputError: If the output cannot be written.
    """
    reject_replacing("--output", options.output, checkpoint_paths(options.model))
    device = select_device(options.device)
    with open_checkpoint(options.model) as checkpoint:
        sources = plain_sources(checkpoint)
        quantized = [name for name in sources if _is_quantized(checkpoint.tensors[name])]
        model = _recognize(checkpoint, options.form)
        metadata = _without_stale(checkpoint.metadata)
        if options.form == "bf16":
            write = _write_bf16
        elif quantized:
            form = dtype_name(checkpoint.tensors[quantized[0]].dtype)
            raise CheckpointError(
                f"{options.model} is quantized already ({quantized[0]}: {form}); rounding it again would "
                "only lose more. Give the file in 16 bits.",
                options.model,
            )
        else:
            write = _write_gguf if options.form == GGUF else _write_comfyui
        count = write(options, checkpoint, model, metadata=metadata, device=device)
        unchanged = len(sources) - count
    size = as_size(options.output.stat().st_size)
    rows = [
        ("model", f"{options.model}: {model.what}"),
        ("form", options.form),
        ("layers", f"{count}; {unchanged} other tensors unchanged"),
        ("file", f"{options.output} ({size})"),
    ]
    show_box("The model is written", rows)


def _without_stale(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without entries about the old tensors or GGUF, and log the removed entries."""
    remaining = {key: text for key, text in metadata.items() if not key.startswith((*_STALE, *_OF_GGUF))}
    stale = sorted(metadata.keys() - remaining.keys())
    if stale:
        logger.info("Metadata of the old tensors are left out: %s", ", ".join(stale))
    return remaining


def _is_quantized(info: TensorInfo) -> bool:
    return info.packing is not None or is_fp8(info.dtype)


def _recognize(checkpoint: Checkpoint, form: str = "") -> Recognized:
    """Recognize the network of a file, and find the layers that --form `form` quantizes.

    Raises:
        CheckpointError: If the file has neither a known transformer nor a known text encoder.
    """
    names = checkpoint.tensors
    for identifying_pattern, layer_pattern in _TEXT_ENCODERS.items():
        matches = (re.fullmatch(rf"(.*\.)?{identifying_pattern}", name) for name in names)
        first = next(filter(None, matches), None)
        if first is not None:
            prefix = first[1] or ""
            with_prefix = re.compile(re.escape(prefix) + layer_pattern)
            layers = frozenset(name for name in names if with_prefix.fullmatch(name))
            return Recognized("a text encoder", family=None, layers=layers, shapes={})
    bare = bare_names(checkpoint)
    # in reverse order, as in `families.identify`, so that Wan is last: it accepts files of unknown models too
    for family, entry in reversed(list(FAMILIES.items())):
        # `room` is the family's folder, whose files.py describes how to recognize its transformer
        files = import_own(f"{entry.room}.files") if entry.own_files else None
        dit_format: DitFormat[Any, Any] | None = getattr(files, "FORMAT", None)
        if dit_format is None:
            continue
        try:
            return _recognize_transformer(checkpoint, bare, family, dit_format, form=form)
        except CheckpointError as error:
            logger.debug("%s is not %s: %s", checkpoint.path, family, error)
    if is_lora(names):
        raise CheckpointError(
            f"{checkpoint.path} is a LoRA, which is small and stays in 16 bits. Give the model that it was "
            "trained for; merge_lora.py adds a LoRA to it before it is quantized.",
            checkpoint.path,
        )
    raise CheckpointError(
        f"{checkpoint.path} is {kind_of(names) or 'no model that is known'}. Give the transformer or the "
        "language model or T5 of a family that is supported.",
        checkpoint.path,
    )


def _recognize_transformer(
    checkpoint: Checkpoint, bare: Checkpoint, family: str, dit_format: DitFormat[Any, Any], form: str
) -> Recognized:
    """Recognize the transformer of a family, and find the layers that `form` quantizes.

    `bare` is the checkpoint with prefixes removed from the tensor names.

    Raises:
        CheckpointError: If the file is not a transformer of this family.
    """
    header = dit_format.read_header(bare)
    with on_meta_device():
        dit: Any = dit_format.network(header.config, SDPA)
    sources = dit_format.sources(bare, header)
    stored_form = "int8" if form == "convrot" else form  # convrot is int8 with a rotation
    exclude = dit.spec.form_exclude.get(stored_form, dit.spec.fp8_exclude)
    linear = linear_weights(dit, dit.spec.block_lists, exclude)
    made_of: dict[str, set[str]] = {}  # tensor of the file -> tensors of the network made from it
    for our_name, source in sources.items():
        made_of.setdefault(source.names[0], set()).add(our_name)
    prefix = _find_prefix(checkpoint, list(made_of))
    weights = dit.state_dict()
    layers: set[str] = set()
    shapes_in_file = {}
    for name, our_names in made_of.items():
        # a fused weight is quantized only if all layers split from it can be
        if our_names <= linear and len(bare.tensors[name].shape) == 2:
            layers.add(prefix + name)
        if len(our_names) == 1:
            (our_name,) = our_names
            if our_name in weights:  # the network computes some tensors of the file instead of loading them
                shapes_in_file[prefix + name] = tuple(weights[our_name].shape)
    return Recognized(
        what=dit_format.describe(header),
        family=family,
        layers=frozenset(layers),
        shapes=shapes_in_file,
        # functions that restore the row order of the published single file
        single_rows={prefix + name: order for name, order in dit_format.single_rows(bare, header).items()},
    )


def _find_prefix(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    """Return the prefix that the tensors named without prefix have in the file."""
    for name in checkpoint.tensors:
        if name.endswith(names[0]):
            prefix = name.removesuffix(names[0])
            if checkpoint.tensors.keys() >= {prefix + bare_name for bare_name in names}:
                return prefix
    raise AssertionError("the bare names are from this file, so they have a prefix in it")


def _write_comfyui(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    model: Recognized,
    metadata: Mapping[str, str],
    device: torch.device,
) -> int:
    """Write the model in ComfyUI's quantized layout; return the number of quantized layers.

    A layer is read and rounded twice, for its codes and for its scale, because these are far apart in the
    file and only one tensor is held in memory.
    """
    parts: dict[str, _OutputTensor] = {}

    def read_part(name: str) -> Tensor:
        """Compute a tensor of the new file from the checkpoint, at the time it is written."""
        part = parts[name]
        if part.rounding is None:
            return model.read(checkpoint, name)
        if part.kind == MARK:
            return part.rounding.mark_bytes()
        codes, scale = part.rounding.round(model.read(checkpoint, part.layer).to(device))
        return scale if part.kind == WEIGHT_SCALE else codes

    for name, info in checkpoint.tensors.items():
        if name in model.layers:
            added = _plan_layer(name, _Rounding(options.form, (info.shape[0], info.shape[1])))
        else:
            added = {name: _OutputTensor(info)}
        for new_name, part in added.items():
            if new_name in parts:
                raise CheckpointError(
                    f"{checkpoint.path} has a tensor {new_name}, which belongs to a quantized layer."
                )
            parts[new_name] = part
    tensors = {name: part.info for name, part in parts.items()}
    stream_tensors(options.output, tensors, read_part, {"format": "pt", **metadata})
    return len(model.layers)


@dataclass(frozen=True)
class _OutputTensor:
    """A tensor to write: rounded with `rounding`, or copied from the checkpoint if that is None."""

    info: TensorInfo
    rounding: "_Rounding | None" = None
    layer: str = ""  # name of the quantized layer's weight
    kind: str = ""  # which tensor of the quantized layer it is: CODES, WEIGHT_SCALE or MARK


def _plan_layer(name: str, rounding: "_Rounding") -> dict[str, _OutputTensor]:
    """Return the three tensors that a quantized layer is stored as, by their names in the new file."""
    stem = name.removesuffix(".weight")
    codes = TensorInfo(rounding.dtype, rounding.shape)
    scale = TensorInfo(torch.float32, rounding.scale_shape)
    mark = TensorInfo(torch.uint8, tuple(rounding.mark_bytes().shape))
    return {
        name: _OutputTensor(codes, rounding, layer=name, kind=CODES),
        stem + WEIGHT_SCALE: _OutputTensor(scale, rounding, layer=name, kind=WEIGHT_SCALE),
        stem + MARK: _OutputTensor(mark, rounding, layer=name, kind=MARK),
    }


class _Rounding:
    """Storage dtype, shape of the scales and metadata (the mark) of a layer that is quantized."""

    def __init__(self, form: str, shape: Shape) -> None:
        """Select dtype, shape of the scale and ComfyUI's mark for a weight of this shape, out x in."""
        self.shape = shape
        self.scale_shape: tuple[int, ...]
        if form == "fp8":
            self.mark: dict[str, Any] = {"format": "float8_e4m3fn"}
            self.dtype = E4M3
            self.scale_shape = ()
        else:
            self.mark = {"format": "int8_tensorwise"}
            self.dtype = torch.int8
            self.scale_shape = (shape[0], 1)
        # rotations act on groups of columns; a width that no group size divides is not rotated
        group = next((group for group in GROUPS if shape[1] % group == 0), 0)
        if form == "convrot" and group:
            self.mark |= {"convrot": True, "convrot_groupsize": group}

    def mark_bytes(self) -> Tensor:
        """Return the metadata of the quantized layer (ComfyUI's mark) as JSON in a uint8 tensor."""
        return torch.tensor(list(json.dumps(self.mark).encode()), dtype=torch.uint8)

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a weight; return its codes and scale."""
        codes: Tensor | None
        if self.dtype == E4M3:
            codes, scale = round_to_fp8(weight, Quantization("tensor", float32_scales=True))
        else:
            codes, scale = Int8(self.mark.get("convrot_groupsize", 0)).quantize(weight).tensors
        assert codes is not None
        assert scale is not None
        return codes, scale.reshape(self.scale_shape)


def _write_gguf(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    model: Recognized,
    metadata: Mapping[str, str],
    device: torch.device,
) -> int:
    """Write layers as Q8_0, small tensors in float32, and all others unchanged; return the number of layers.

    `device` is not used: the package gguf rounds on the CPU.
    """
    if model.family is None:
        raise OptionError(
            "--form q8_0 is for transformers: text encoders in GGUF have llama.cpp's names and a tokenizer, "
            "which its own converter writes. Use int8, convrot or fp8"
        )
    try:
        import gguf
    except ImportError:
        raise OptionError(
            "--form q8_0 needs the package gguf, which is not installed. Run: pip install gguf"
        ) from None
    kinds = gguf.GGMLQuantizationType
    infos = checkpoint.tensors
    block_width, _ = gguf.GGML_QUANT_SIZES[kinds.Q8_0]
    layers = {name for name in model.layers if infos[name].shape[1] % block_width == 0}
    if len(layers) < len(model.layers):
        text = "%d layers are not quantized: their rows are not whole blocks of Q8_0"
        logger.info(text, len(model.layers) - len(layers))
    with atomic_path(options.output) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURES.get(model.family, model.family))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        for key, text in metadata.items():
            writer.add_string(key, text)
        # the list of all tensors comes first in the file, then their data in the same order
        stored: dict[str, Any] = {}  # GGUF type of each tensor, by name
        for name in infos:
            stored[name] = _plan_in_gguf(writer, checkpoint, name, name in layers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        sizes = {name: info.size_bytes for name, info in infos.items()}
        names = track(
            infos,
            f"Writing {options.output.name}",
            total=sum(sizes.values()),
            size=sizes.__getitem__,
            unit=BYTES,
        )
        for name in names:
            tensor = model.read(checkpoint, name)
            kind = stored[name]
            if kind in (kinds.Q8_0, kinds.F32):  # the only types that differ from those of the file
                data = gguf.quants.quantize(tensor.float().numpy(), kind)
            else:
                data = tensor.view(-1).view(torch.uint8).numpy()
            writer.write_tensor_data(data)
        writer.close()
    return len(layers)


def _plan_in_gguf(writer: Any, checkpoint: Checkpoint, name: str, is_layer: bool) -> Any:
    """Declare a tensor to the GGUF writer, which writes its list of tensors first; return its GGUF type."""
    import gguf

    info = checkpoint.tensors[name]
    if len(name.encode()) > _LONGEST_IN_GGUF or info.dtype not in _GGUF_KINDS:
        raise CheckpointError(
            f"{checkpoint.path}: {name[:60]} of {dtype_name(info.dtype)} has no place in a GGUF "
            "file: names have up to 127 bytes, and tensors are floats. Use --form int8, convrot or fp8.",
            checkpoint.path,
        )
    is_small = len(info.shape) < 2 or math.prod(info.shape) <= _SMALL_IN_GGUF
    if is_layer:
        kind = gguf.GGMLQuantizationType["Q8_0"]
    else:
        kind = gguf.GGMLQuantizationType["F32" if is_small else _GGUF_KINDS[info.dtype]]
    *rows, columns = info.shape or (1,)  # the package gguf has no scalars
    # a block is one value if the type is not quantized
    block_width, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    byte_shape = (*rows, columns // block_width * block_bytes)
    writer.add_tensor_info(name, byte_shape, numpy.dtype("uint8"), math.prod(byte_shape), kind)
    return kind


def _write_bf16(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    model: Recognized,
    metadata: Mapping[str, str],
    device: torch.device,
) -> int:
    """Write quantized weights in bfloat16 and others unchanged; return the number of quantized weights."""
    dequantized = in_values(checkpoint, device)
    if dequantized is checkpoint:
        text = f"{options.model} has no quantized weights. Give a file that has, or another --form."
        raise CheckpointError(text, options.model)
    tensors: dict[str, TensorInfo] = {}
    num_quantized = 0
    for name, info in dequantized.tensors.items():
        tensors[name] = info
        if info is not checkpoint.tensors[name]:  # `in_values` replaces only the infos of quantized weights
            tensors[name] = replace(info, dtype=torch.bfloat16)
            num_quantized += 1

    def read(name: str) -> Tensor:
        return model.read(dequantized, name).to(tensors[name].dtype)

    stream_tensors(options.output, tensors, read, {"format": "pt", **metadata})
    return num_quantized


def in_values(checkpoint: Checkpoint, device: torch.device | None = None) -> Checkpoint:
    """Return a checkpoint that dequantizes weights to float32 when they are read, and that has no scales.

    Both checkpoints share the open files: close only one of them.

    Args:
        checkpoint: Open file.
        device: Device that dequantizes; None for the CPU.

    Returns:
        `checkpoint` itself if nothing in it is quantized.

    Raises:
        CheckpointError: If a quantized form is not supported, or the unpadded size of a weight is unknown.
    """
    reject_quantized(checkpoint)
    infos = checkpoint.tensors.values()
    if not any(map(_is_quantized, infos)):
        return checkpoint
    may_be_padded = any(info.packing is not None and info.packing.pad > 1 for info in infos)
    shapes = _recognize(checkpoint).shapes if may_be_padded else {}
    reader: Any = _DequantizedFile(checkpoint, shapes, device or torch.device("cpu"))
    num_quantized = len(reader.tensors.keys() - reader.plain)
    logger.info("%s: %d quantized weights are read by their values", checkpoint.path, num_quantized)
    return Checkpoint(checkpoint.path, {name: (reader, name) for name in reader.tensors}, [reader])


class _DequantizedFile:
    """View of an open checkpoint file that dequantizes tensors to float32 when they are read."""

    def __init__(
        self, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], device: torch.device
    ) -> None:
        """List the tensors that can be read.

        Args:
            checkpoint: The open checkpoint.
            shapes: Unpadded shapes of weights that may be padded, by name.
            device: Device that dequantizes.
        """
        self.path = checkpoint.path
        self.left_out = checkpoint.left_out
        self.metadata = {
            key: text for key, text in checkpoint.metadata.items() if not key.startswith((HEADER, *_OF_GGUF))
        }
        self._checkpoint = checkpoint
        self._device = device
        self._sources = plain_sources(checkpoint)
        self.tensors: dict[str, TensorInfo] = {}
        self.plain: set[str] = set()  # names of tensors that are not quantized
        for name, source in self._sources.items():
            info = checkpoint.tensors[name]
            shape = self._unpad_shape(name, info, shapes)
            if not _is_quantized(info):
                self.plain.add(name)
                self.tensors[name] = info
                continue
            # `build` would multiply fp8 by its scale
            if source.build is None and self.path.suffix == ".pt":
                raise CheckpointError(
                    f"{self.path} stores {name} in 8 bits without its scale. Give the bf16 file.", self.path
                )
            self.tensors[name] = TensorInfo(torch.float32, shape)

    def _unpad_shape(
        self, name: str, info: TensorInfo, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, ...]:
        """Return the shape of a tensor without its padding.

        Raises:
            CheckpointError: If the unpadded shape is unknown.
        """
        packing = info.packing
        if packing is not None and packing.pad > 1:
            shape = shapes.get(name, ())
            padded_shape = packing.padded(shape)
        else:
            shape = info.shape
            padded_shape = shapes.get(name, info.shape)
        # a tensor larger than the network's was padded without a note in the file
        if math.prod(padded_shape) != math.prod(info.shape):
            raise CheckpointError(
                f"{self.path}: {name} may be padded, and the file does not say from which size. Give a "
                "transformer of a family that is supported, in its released layout.",
                self.path,
            )
        return shape

    def borrow(self, name: str, scratch: Tensor) -> Tensor:
        """Return a dequantized tensor; one that is not quantized may be a view of `scratch`."""
        if name in self.plain:
            return self._checkpoint.borrow(name, scratch)
        source = self._sources[name]
        value = source.make([self._checkpoint.read(part).to(self._device) for part in source.names])
        return value[tuple(map(slice, self.tensors[name].shape))].float()

    def close(self) -> None:
        self._checkpoint.close()

"""Quantize the layers of a model file to 8 bits (ComfyUI's layout or GGUF), or dequantize it to bf16.

Tensors keep their names in the file. In a transformer, the layers that its family keeps in fp8 are quantized;
in a text encoder, the linear layers of its blocks. Sources: as in `marks` and `gguf_files`.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from checkpoints.containers import COMFY_QUANT_KEY, COMFY_QUANT_SUFFIX
from checkpoints.dits import DitFormat, bare_names
from checkpoints.filling import linear_weights, on_meta_device
from checkpoints.finite import check_finite
from checkpoints.kinds import describe_file_kind, is_lora
from checkpoints.opening import (
    Checkpoint,
    checkpoint_paths,
    list_tensor_sources,
    open_checkpoint,
    reject_quantized,
)
from checkpoints.stored.forms import Shape
from checkpoints.stored.fp8 import E4M3, is_fp8
from checkpoints.stored.fp8 import quantize as round_to_fp8
from checkpoints.stored.int8 import GROUPS, Int8
from checkpoints.writing import stream_tensors
from modules.atomic_write import atomic_path
from modules.bars import BYTES, track
from modules.console import format_size, show_box
from modules.devices import dtype_name, select_device
from modules.errors import CheckpointError, OptionError
from modules.installation import import_own
from modules.options import Options, option
from modules.output_files import check_output_file, check_place, reject_replacing
from modules.speed_options import SDPA, Quantization
from protocols.families import FAMILIES
from protocols.loading import TensorInfo

logger = logging.getLogger(__name__)

# prefixes of metadata that describe the old tensors
_STALE_METADATA_PREFIXES = ("sshs_", "modelspec.hash_sha256", COMFY_QUANT_KEY)
# prefixes of metadata that only GGUF files have
_GGUF_METADATA_PREFIXES = ("general.", "GGUF.", "comfy.gguf.")
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
_GGUF_TYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
_MAX_GGUF_NAME_BYTES = 127  # bytes of a tensor name; readers reject longer names
_MAX_GGUF_FLOAT32_ELEMENTS = 1024  # values; tensors up to this size are stored in float32
# `general.architecture` as ComfyUI-GGUF expects it, if it differs from the family's name
_ARCHITECTURES = {
    **{"hunyuan_video": "hyvid", "framepack": "hyvid", "flux_2": "flux", "ltx_2": "ltxv"},
    **{"lumina": "lumina2", "z_image": "lumina2"},
}
WEIGHT_SCALE_SUFFIX = ".weight_scale"
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
    output: Path = option(
        "file to write: .safetensors, or .gguf with --form q8_0", required=True, by_place=True
    )
    device: str | None = option("device that rounds; default: CUDA if available, else the CPU")

    def __post_init__(self) -> None:
        if self.form != GGUF:
            check_output_file("--output", self.output)
        elif self.output.suffix.lower() != ".gguf":
            raise OptionError(
                f"--output {self.output}: a GGUF file is written. Pass a name that ends in .gguf"
            )
        else:
            check_place("--output", self.output)


@dataclass(frozen=True)
class RecognizedModel:
    """A recognized model, and the layers that can be quantized, by their tensor names in the file."""

    description: str  # description for messages
    family: str | None  # None: a text encoder
    layers: frozenset[str]  # names of weights that can be quantized
    shapes: Mapping[str, tuple[int, ...]]  # shapes of weights in the network, without padding, by name
    # by tensor name: function that puts the rows into the order of the published single file
    single_file_row_orders: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """Read a tensor with its rows in the order of the published single file.

        Raises:
            CheckpointError: If the tensor has NaN or infinite values.
        """
        tensor = checkpoint.read(name)
        check_finite(checkpoint.path, name, tensor)
        order = self.single_file_row_orders.get(name)
        return tensor if order is None else order(tensor).contiguous()


def quantize_file(options: QuantizeOptions) -> None:
    """Write a model file with quantized layers, or with --form bf16, write a quantized file in 16 bits.

    Raises:
        CheckpointError: If the model is unknown or already quantized (for --form bf16: not quantized).
        OptionError: If the output would replace an input file.
        OutputError: If the output cannot be written.
    """
    reject_replacing("--output", options.output, checkpoint_paths(options.model))
    device = select_device(options.device)
    with open_checkpoint(options.model) as checkpoint:
        sources = list_tensor_sources(checkpoint)
        quantized = [name for name in sources if _is_quantized(checkpoint.tensors[name])]
        model = _recognize(checkpoint, options.form)
        metadata = _drop_stale(checkpoint.metadata)
        if options.form == "bf16":
            write = _write_bf16
        elif quantized:
            dtype = dtype_name(checkpoint.tensors[quantized[0]].dtype)
            raise CheckpointError(
                f"{options.model} is quantized already ({quantized[0]}: {dtype}); rounding it again would "
                "only lose more. Pass the file in 16 bits.",
                options.model,
            )
        else:
            write = _write_gguf if options.form == GGUF else _write_comfyui
        num_layers = write(options, checkpoint, model, metadata=metadata, device=device)
        num_unchanged = len(sources) - num_layers
    size = format_size(options.output.stat().st_size)
    rows = [
        ("model", f"{options.model}: {model.description}"),
        ("form", options.form),
        ("layers", f"{num_layers}; {num_unchanged} other tensors unchanged"),
        ("file", f"{options.output} ({size})"),
    ]
    show_box("The model is written", rows)


def _drop_stale(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata without entries that describe the original tensors or GGUF; log the removed entries."""
    remaining = {
        key: text
        for key, text in metadata.items()
        if not key.startswith((*_STALE_METADATA_PREFIXES, *_GGUF_METADATA_PREFIXES))
    }
    stale = sorted(metadata.keys() - remaining.keys())
    if stale:
        logger.info("Metadata of the old tensors are left out: %s", ", ".join(stale))
    return remaining


def _is_quantized(info: TensorInfo) -> bool:
    return info.packing is not None or is_fp8(info.dtype)


def _recognize(checkpoint: Checkpoint, form: str = "") -> RecognizedModel:
    """Recognize the network in a file, and find the layers that --form `form` quantizes."""
    text_encoder = _recognize_text_encoder(checkpoint)
    if text_encoder is not None:
        return text_encoder
    bare = bare_names(checkpoint)
    # Wan is tried last, because it accepts files of unknown models too
    for family, entry in reversed(list(FAMILIES.items())):
        # describes how to recognize the family's transformer
        files_module = import_own(f"{entry.room}.files") if entry.own_files else None
        dit_format: DitFormat[Any, Any] | None = getattr(files_module, "FORMAT", None)
        if dit_format is None:
            continue
        try:
            return _recognize_transformer(checkpoint, bare, family, dit_format, form=form)
        except CheckpointError as error:
            logger.debug("%s is not %s: %s", checkpoint.path, family, error)
    if is_lora(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.path} is a LoRA, which is small and stays in 16 bits. Pass the model that it was "
            "trained for; merge_lora.py merges a LoRA into it before it is quantized.",
            checkpoint.path,
        )
    raise CheckpointError(
        f"{checkpoint.path} is {describe_file_kind(checkpoint.tensors) or 'not a known model'}. Pass the "
        "transformer, the language model or the T5 of a supported family.",
        checkpoint.path,
    )


def _recognize_text_encoder(checkpoint: Checkpoint) -> RecognizedModel | None:
    """Recognize a text encoder by its tensor names, and list its linear layers; None for other files."""
    names = checkpoint.tensors
    for identifying_pattern, layer_pattern in _TEXT_ENCODERS.items():
        matches = (re.fullmatch(rf"(.*\.)?{identifying_pattern}", name) for name in names)
        match = next(filter(None, matches), None)
        if match is not None:
            prefix = match[1] or ""
            prefixed_pattern = re.compile(re.escape(prefix) + layer_pattern)
            layers = frozenset(name for name in names if prefixed_pattern.fullmatch(name))
            return RecognizedModel("a text encoder", family=None, layers=layers, shapes={})
    return None


def _recognize_transformer(
    checkpoint: Checkpoint, bare: Checkpoint, family: str, dit_format: DitFormat[Any, Any], form: str
) -> RecognizedModel:
    """Recognize the transformer of a family, and find the layers that `form` quantizes."""
    # `bare` is the checkpoint with prefixes removed from the tensor names.
    header = dit_format.read_header(bare)
    with on_meta_device():
        dit: Any = dit_format.network(header.config, SDPA)
    our_names_by_file_name: dict[str, set[str]] = {}  # several names if the file fuses weights
    for our_name, source in dit_format.sources(bare, header).items():
        our_names_by_file_name.setdefault(source.names[0], set()).add(our_name)
    prefix = _find_prefix(checkpoint, list(our_names_by_file_name))
    quantizable = _list_quantizable_weights(dit, form)
    layers: set[str] = set()
    for file_name, our_names in our_names_by_file_name.items():
        # a fused weight is quantized only if all layers split from it can be quantized
        if our_names <= quantizable and len(bare.tensors[file_name].shape) == 2:
            layers.add(prefix + file_name)
    shapes = _find_unpadded_shapes(dit, our_names_by_file_name)
    row_orders = dit_format.single_file_row_orders(bare, header)
    return RecognizedModel(
        description=dit_format.describe(header),
        family=family,
        layers=frozenset(layers),
        shapes={prefix + name: shape for name, shape in shapes.items()},
        single_file_row_orders={prefix + name: order for name, order in row_orders.items()},
    )


def _list_quantizable_weights(dit: Any, form: str) -> frozenset[str]:
    """Return the names of a transformer's weights that --form `form` quantizes."""
    unrotated_form = "int8" if form == "convrot" else form  # convrot is int8 with a rotation
    exclude = dit.spec.form_exclude.get(unrotated_form, dit.spec.fp8_exclude)
    return linear_weights(dit, dit.spec.block_lists, exclude)


def _find_unpadded_shapes(
    dit: nn.Module, our_names_by_file_name: Mapping[str, Collection[str]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the network of the file's unfused weights, by name in the file."""
    weights = dit.state_dict()
    shapes = {}
    for file_name, our_names in our_names_by_file_name.items():
        if len(our_names) == 1:
            (our_name,) = our_names
            if our_name in weights:  # the network computes some of the file's tensors instead of loading them
                shapes[file_name] = tuple(weights[our_name].shape)
    return shapes


def _find_prefix(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    """Return the prefix that must be added to the bare names to find the tensors in the file."""
    for name in checkpoint.tensors:
        if name.endswith(names[0]):
            prefix = name.removesuffix(names[0])
            if checkpoint.tensors.keys() >= {prefix + bare_name for bare_name in names}:
                return prefix
    raise AssertionError("the bare names are from this file, so they have a prefix in it")


def _write_comfyui(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    model: RecognizedModel,
    metadata: Mapping[str, str],
    device: torch.device,
) -> int:
    """Write the model in ComfyUI's quantized layout; return the number of quantized layers."""
    # A layer is read and rounded twice, for its codes and for its scale, because these are far apart in the
    # file and only one tensor is kept in memory.
    planned: dict[str, _PlannedTensor] = {}  # tensors of the new file, by name

    def copy(name: str) -> Tensor:
        return model.read(checkpoint, name)

    def quantize(weight_name: str, quantizer: _LayerQuantizer) -> tuple[Tensor, Tensor]:
        return quantizer.quantize(model.read(checkpoint, weight_name).to(device))

    for name, info in checkpoint.tensors.items():
        if name in model.layers:
            quantizer = _LayerQuantizer(options.form, (info.shape[0], info.shape[1]))
            new_tensors = _plan_layer(name, quantizer, partial(quantize, name, quantizer))
        else:
            new_tensors = {name: _PlannedTensor(info, partial(copy, name))}
        for new_name, tensor in new_tensors.items():
            if new_name in planned:
                raise CheckpointError(
                    f"{checkpoint.path} has a tensor {new_name}, which belongs to a quantized layer."
                )
            planned[new_name] = tensor
    infos = {name: tensor.info for name, tensor in planned.items()}
    stream_tensors(options.output, infos, lambda name: planned[name].compute(), {"format": "pt", **metadata})
    return len(model.layers)


@dataclass(frozen=True)
class _PlannedTensor:
    """A tensor to write, and the function that computes it just before it is written."""

    info: TensorInfo
    compute: Callable[[], Tensor]


def _plan_layer(
    weight_name: str, quantizer: "_LayerQuantizer", quantize: Callable[[], tuple[Tensor, Tensor]]
) -> dict[str, _PlannedTensor]:
    """Return the three tensors that store a quantized layer (codes, scale, settings), by their new names."""
    # `quantize` reads the layer's weight, and returns its codes and scale. It is called once for each of the
    # two, because they are far apart in the file.
    layer_name = weight_name.removesuffix(".weight")
    codes = TensorInfo(quantizer.dtype, quantizer.shape)
    scale = TensorInfo(torch.float32, quantizer.scale_shape)
    settings = TensorInfo(torch.uint8, tuple(quantizer.settings_as_tensor().shape))
    return {
        weight_name: _PlannedTensor(codes, lambda: quantize()[0]),
        layer_name + WEIGHT_SCALE_SUFFIX: _PlannedTensor(scale, lambda: quantize()[1]),
        layer_name + COMFY_QUANT_SUFFIX: _PlannedTensor(settings, quantizer.settings_as_tensor),
    }


class _LayerQuantizer:
    """Quantizes a layer to one of ComfyUI's formats: fp8, int8, or int8 with rotated columns (ConvRot)."""

    def __init__(self, form: str, shape: Shape) -> None:
        """Select the dtype, the scale's shape and ComfyUI's settings for a weight of this shape, out x in."""
        self.shape = shape
        self.scale_shape: tuple[int, ...]
        if form == "fp8":
            self.comfy_settings: dict[str, Any] = {"format": "float8_e4m3fn"}
            self.dtype = E4M3
            self.scale_shape = ()
        else:
            self.comfy_settings = {"format": "int8_tensorwise"}
            self.dtype = torch.int8
            self.scale_shape = (shape[0], 1)
        # rotations act on groups of columns; a weight is not rotated if no group size divides its width
        group_size = next((size for size in GROUPS if shape[1] % size == 0), 0)
        if form == "convrot" and group_size:
            self.comfy_settings |= {"convrot": True, "convrot_groupsize": group_size}

    def settings_as_tensor(self) -> Tensor:
        """Return ComfyUI's settings for the quantized layer as JSON in a uint8 tensor."""
        return torch.tensor(list(json.dumps(self.comfy_settings).encode()), dtype=torch.uint8)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a weight; return its codes (fp8 or int8) and its scale."""
        codes: Tensor | None
        if self.dtype == E4M3:
            codes, scale = round_to_fp8(weight, Quantization("tensor", float32_scales=True))
        else:
            codes, scale = Int8(self.comfy_settings.get("convrot_groupsize", 0)).quantize(weight).tensors
        assert codes is not None
        assert scale is not None
        return codes, scale.reshape(self.scale_shape)


def _write_gguf(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    model: RecognizedModel,
    metadata: Mapping[str, str],
    device: torch.device,
) -> int:
    """Write layers as Q8_0, small tensors in float32, others unchanged; return the number of layers."""
    # `device` is not used: the package gguf rounds on the CPU.
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
    block_width, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    layers = {name for name in model.layers if checkpoint.tensors[name].shape[1] % block_width == 0}
    if len(layers) < len(model.layers):
        num_skipped = len(model.layers) - len(layers)
        logger.info("%d layers are not quantized: their rows are not whole blocks of Q8_0", num_skipped)
    with atomic_path(options.output) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURES.get(model.family, model.family))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        for key, text in metadata.items():
            writer.add_string(key, text)
        # the file starts with the list of all tensors, followed by their data in the same order
        gguf_types = {
            name: _declare_in_gguf(writer, checkpoint, name, name in layers) for name in checkpoint.tensors
        }
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_gguf_data(writer, checkpoint, model, gguf_types, f"Writing {options.output.name}")
        writer.close()
    return len(layers)


def _write_gguf_data(
    writer: Any,
    checkpoint: Checkpoint,
    model: RecognizedModel,
    gguf_types: Mapping[str, Any],
    progress_title: str,
) -> None:
    """Write all tensors in the checkpoint's order, converted to their GGUF types."""
    import gguf

    sizes = {name: info.size_bytes for name, info in checkpoint.tensors.items()}
    names = track(
        checkpoint.tensors,
        progress_title,
        total=sum(sizes.values()),
        size=sizes.__getitem__,
        unit=BYTES,
    )
    converted_types = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32)
    for name in names:
        tensor = model.read(checkpoint, name)
        if gguf_types[name] in converted_types:
            data = gguf.quants.quantize(tensor.float().numpy(), gguf_types[name])
        else:  # keeps the tensor's type
            data = tensor.view(-1).view(torch.uint8).numpy()
        writer.write_tensor_data(data)


def _declare_in_gguf(writer: Any, checkpoint: Checkpoint, name: str, is_layer: bool) -> Any:
    """Declare a tensor to the GGUF writer, which writes the list of tensors first; return its GGUF type."""
    import gguf

    info = checkpoint.tensors[name]
    if len(name.encode()) > _MAX_GGUF_NAME_BYTES or info.dtype not in _GGUF_TYPE_NAMES:
        raise CheckpointError(
            f"{checkpoint.path}: {name[:60]} of {dtype_name(info.dtype)} cannot be stored in a GGUF file: "
            "names may have up to 127 bytes, and tensors must be floats. Use --form int8, convrot or fp8.",
            checkpoint.path,
        )
    is_small = len(info.shape) < 2 or math.prod(info.shape) <= _MAX_GGUF_FLOAT32_ELEMENTS
    if is_layer:
        type_name = "Q8_0"
    elif is_small:
        type_name = "F32"
    else:
        type_name = _GGUF_TYPE_NAMES[info.dtype]
    gguf_type = gguf.GGMLQuantizationType[type_name]
    *rows, columns = info.shape or (1,)  # the package gguf does not support scalars
    # a block is one value if the type is not quantized
    block_width, block_bytes = gguf.GGML_QUANT_SIZES[gguf_type]
    byte_shape = (*rows, columns // block_width * block_bytes)
    writer.add_tensor_info(name, byte_shape, numpy.dtype("uint8"), math.prod(byte_shape), gguf_type)
    return gguf_type


def _write_bf16(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    model: RecognizedModel,
    metadata: Mapping[str, str],
    device: torch.device,
) -> int:
    """Write quantized weights in bfloat16 and all others unchanged; return how many were quantized."""
    dequantized = dequantized_on_read(checkpoint, device)
    if dequantized is checkpoint:
        raise CheckpointError(
            f"{options.model} has no quantized weights. Pass a quantized file, or another --form.",
            options.model,
        )
    tensors: dict[str, TensorInfo] = {}
    num_quantized = 0
    for name, info in dequantized.tensors.items():
        tensors[name] = info
        # `dequantized_on_read` replaces only the infos of quantized weights
        was_quantized = info is not checkpoint.tensors[name]
        if was_quantized:
            tensors[name] = replace(info, dtype=torch.bfloat16)
            num_quantized += 1

    def read(name: str) -> Tensor:
        return model.read(dequantized, name).to(tensors[name].dtype)

    stream_tensors(options.output, tensors, read, {"format": "pt", **metadata})
    return num_quantized


def dequantized_on_read(checkpoint: Checkpoint, device: torch.device | None = None) -> Checkpoint:
    """Return a view of a checkpoint that dequantizes weights to float32 on reading, and that has no scales.

    Both checkpoints share the open files: close only one of them.

    Args:
        checkpoint: Open checkpoint.
        device: Device that dequantizes; None for the CPU.

    Returns:
        The view, or `checkpoint` itself if nothing in it is quantized.

    Raises:
        CheckpointError: If a quantization format is not supported, or a weight's unpadded size is unknown.
    """
    reject_quantized(checkpoint)
    infos = checkpoint.tensors.values()
    if not any(map(_is_quantized, infos)):
        return checkpoint
    may_be_padded = any(info.packing is not None and info.packing.pad > 1 for info in infos)
    unpadded_shapes = _recognize(checkpoint).shapes if may_be_padded else {}
    reader: Any = _DequantizedFile(checkpoint, unpadded_shapes, device or torch.device("cpu"))
    num_quantized = len(reader.tensors.keys() - reader.unquantized)
    logger.info("%s: %d quantized weights are dequantized when they are read", checkpoint.path, num_quantized)
    return Checkpoint(checkpoint.path, {name: (reader, name) for name in reader.tensors}, [reader])


class _DequantizedFile:
    """View of an open checkpoint that dequantizes tensors to float32 when they are read."""

    def __init__(
        self, checkpoint: Checkpoint, unpadded_shapes: Mapping[str, tuple[int, ...]], device: torch.device
    ) -> None:
        """List the tensors that can be read.

        Args:
            checkpoint: The open checkpoint.
            unpadded_shapes: Unpadded shapes of weights that may be padded, by name.
            device: Device to dequantize on.
        """
        self.path = checkpoint.path
        self.left_out = checkpoint.left_out
        self.metadata = {
            key: text
            for key, text in checkpoint.metadata.items()
            if not key.startswith((COMFY_QUANT_KEY, *_GGUF_METADATA_PREFIXES))
        }
        self._checkpoint = checkpoint
        self._device = device
        self._sources = list_tensor_sources(checkpoint)
        self.tensors: dict[str, TensorInfo] = {}
        self.unquantized: set[str] = set()  # names of tensors that are not quantized
        for name, source in self._sources.items():
            info = checkpoint.tensors[name]
            shape = self._unpad_shape(name, info, unpadded_shapes)
            if not _is_quantized(info):
                self.unquantized.add(name)
                self.tensors[name] = info
                continue
            # a source without `build` is fp8 without a scale
            if source.build is None and self.path.suffix == ".pt":
                raise CheckpointError(
                    f"{self.path} stores {name} in 8 bits without its scale. Pass the bf16 file.", self.path
                )
            self.tensors[name] = TensorInfo(torch.float32, shape)

    def _unpad_shape(
        self, name: str, info: TensorInfo, unpadded_shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, ...]:
        """Return the shape of a tensor without its padding."""
        packing = info.packing
        is_marked_as_padded = packing is not None and packing.pad > 1
        if packing is not None and is_marked_as_padded:
            shape = unpadded_shapes.get(name, ())
            expected_shape = packing.padded(shape)
        else:
            shape = info.shape
            expected_shape = unpadded_shapes.get(name, info.shape)
        if math.prod(expected_shape) != math.prod(info.shape):
            raise CheckpointError(
                f"{self.path}: {name} may be padded, and the file does not contain its original size. Pass a "
                "transformer of a supported family, in its released layout.",
                self.path,
            )
        return shape

    def borrow(self, name: str, read_buffer: Tensor) -> Tensor:
        """Return a dequantized tensor; an unquantized tensor may be a view of `read_buffer`."""
        if name in self.unquantized:
            return self._checkpoint.borrow(name, read_buffer)
        source = self._sources[name]
        value = source.build_tensor([self._checkpoint.read(part).to(self._device) for part in source.names])
        return value[tuple(map(slice, self.tensors[name].shape))].float()

    def close(self) -> None:
        self._checkpoint.close()

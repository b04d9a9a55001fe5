"""Read GGUF files: a header of keys and tensors, then aligned data.

The reader of the gguf package is not used, because it memory-maps the file and may loop forever on a damaged
header. Sources: the specification in ggml's docs/gguf.md; for the tensor names of text encoders, llama.cpp's
`tensor_mapping.py`.
"""

import math
import re
import struct
from collections.abc import Mapping
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from checkpoints.containers import HeaderFile, make_count_error
from checkpoints.stored.forms import QuantizedWeight
from checkpoints.stored.ggml import KINDS, Kind, get_gguf_kind
from checkpoints.stored.packed import PackedRowFormat
from modules.control_codes import shorten
from modules.errors import CheckpointError
from modules.integers import round_up
from modules.limits import MAX_ELEMENTS, MAX_HEADER_BYTES, MAX_TENSOR_NAME, MAX_TENSORS
from protocols.loading import Packing, TensorInfo

# types of tensors that are not quantized
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
# types of values in the header: numbers by their code in `struct`, strings, and arrays
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_MAX_AXES = 8
# Prefix of keys with the shape that a tensor has in the model, if it is stored in another one: converters for
# ComfyUI store layers whose width is not a multiple of 256 as rows of 256
_SHAPE_KEY = "comfy.gguf.orig_shape."

# llama.cpp's names of layers -> names in transformers: blocks of T5, blocks of Llama, and outside the blocks

_T5 = {
    **{f"attn_{letter}": f"layer.0.SelfAttention.{letter}" for letter in "qkvo"},
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    **{"ffn_gate": "layer.1.DenseReluDense.wi_0", "ffn_up": "layer.1.DenseReluDense.wi_1"},
    **{"ffn_down": "layer.1.DenseReluDense.wo", "ffn_norm": "layer.1.layer_norm"},
}
_LLAMA = {
    **{f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
    **{"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"},
    **{f"attn_{letter}_norm": f"self_attn.{letter}_norm" for letter in "qk"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {
    "enc.output_norm": "encoder.final_layer_norm",
    **{"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
}
# layer names of models whose weights llama.cpp changes in ways that are not undone here
_UNSUPPORTED = {"post_attention_norm": "Gemma", "ffn_gate_exps": "a mixture of experts"}


class GgufFile(HeaderFile):
    """GGUF file that presents text encoder tensors with the names and row order of transformers."""

    header_name = "GGUF header"
    damage_errors = (ValueError, struct.error)

    def _read_header(self, size: int) -> None:
        """Read version, metadata and counts, then name, shape, type and offset of each tensor."""
        reader = _HeaderReader(self._file, min(size, MAX_HEADER_BYTES))
        reader.read_bytes(4)  # the magic number
        version = reader.read_number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, but only 2 and 3 are supported")
        num_tensors = reader.read_number("Q")
        num_keys = reader.read_number("Q")
        model_shapes = self._read_keys(reader, num_keys)
        relative_offsets: dict[str, int] = {}
        for _ in range(num_tensors):
            name = self._read_tensor(reader, model_shapes)
            relative_offsets[name] = reader.read_number("Q")
        # tensor data begins after the header, at a multiple of the alignment; 32 is the format's default
        align = int(self.metadata.get("general.alignment", 32))
        if align < 1:
            raise ValueError(f"its alignment is {align}")
        self._offsets = self._compute_offsets(relative_offsets, round_up(reader.offset, align), size)
        self._num_permuted_heads: dict[str, int] = {}  # of tensors whose rows are permuted within each head
        self._rename_like_transformers()

    def _read_tensor(self, reader: "_HeaderReader", model_shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Read the name, shape and type of the next tensor from the header; return its name."""
        # The caller reads the offset that follows. `model_shapes` has the original shapes of tensors that
        # were reshaped for quantization, by name.
        if len(self.tensors) > MAX_TENSORS:
            raise make_count_error(self.path, len(self.tensors))
        name = reader.read_string(MAX_TENSOR_NAME)
        axes = reader.read_number("I")
        if axes > _MAX_AXES or name in self.tensors:
            raise ValueError(f"{shorten(name, 60)} has {axes} axes, or occurs twice")
        file_shape = tuple(reader.read_number("Q") for _ in range(axes))[::-1]  # GGUF lists columns first
        # a zero must not hide a huge axis
        if math.prod(max(length, 1) for length in file_shape) > MAX_ELEMENTS:
            raise ValueError(f"{name} has the impossible shape {file_shape}")
        shape = model_shapes.get(name, file_shape)
        if math.prod(shape) != math.prod(file_shape) or not all(length > 0 for length in shape):
            raise ValueError(
                f"{name} is stored as {file_shape}, but {_SHAPE_KEY} says {shorten(str(shape), 60)}"
            )
        self.tensors[name] = self._make_info(name, reader.read_number("I"), file_shape, shape)
        return name

    def _compute_offsets(
        self, relative_offsets: Mapping[str, int], data_start: int, size: int
    ) -> dict[str, int]:
        """Return the offset of each tensor in the file."""
        # Raise ValueError for overlaps or data beyond the end.
        offsets = {name: data_start + relative for name, relative in relative_offsets.items()}
        spans = [(offset, offset + self.tensors[name].size_bytes, name) for name, offset in offsets.items()]
        previous_end = data_start
        for begin, end, name in sorted(spans):
            if begin < previous_end or end > size:
                raise ValueError(
                    f"{name} is at bytes {begin} to {end} of {size}, but other tensors end at {previous_end}"
                )
            previous_end = end
        return offsets

    def _read_keys(self, reader: "_HeaderReader", num_keys: int) -> dict[str, tuple[int, ...]]:
        """Read metadata into `metadata`; return the original shapes of reshaped tensors by name."""
        model_shapes: dict[str, tuple[int, ...]] = {}
        for _ in range(num_keys):
            key = reader.read_string()
            value_type = reader.read_number("I")
            if key.startswith(_SHAPE_KEY) and value_type == _ARRAY:
                model_shapes[key.removeprefix(_SHAPE_KEY)] = reader.read_shape()
                continue
            value = reader.read_value(value_type)
            if value is not None:
                self.metadata[key] = str(value)
        return model_shapes

    def _make_info(
        self, name: str, type_number: int, file_shape: tuple[int, ...], shape: tuple[int, ...]
    ) -> TensorInfo:
        """Return the dtype, shape and packing of a tensor."""
        is_reshaped = shape != file_shape
        value_shape = shape if is_reshaped else _restore_shape(name, file_shape)
        if type_number in _PLAIN:
            return TensorInfo(_PLAIN[type_number], value_shape)
        try:
            kind = KINDS.get(type_number) or get_gguf_kind(type_number)
        except ImportError:
            raise CheckpointError(
                f"{self.path}: {name} is of GGUF type {type_number}, which the package gguf may read, but it "
                "is not installed. Run: pip install gguf",
                self.path,
            ) from None
        if kind is None:
            names = ", ".join(["F32", "F16", "BF16", *(kind.name for kind in KINDS.values())])
            raise CheckpointError(
                f"{self.path}: {name} has the unknown GGUF type {type_number}. Known types are {names}, "
                "and those of the package gguf.",
                self.path,
            )
        if not file_shape or file_shape[-1] % kind.weights:
            raise ValueError(
                f"{name} has the shape {file_shape}, but {kind.name} is stored in rows of {kind.weights}"
            )
        # How a tensor is packed, based on its shapes in the file and in the model
        # if each row of the model has whole quantization blocks, a layer can use them directly
        has_full_rows = shape[-1] % kind.weights == 0
        *leading, columns = shape if has_full_rows else file_shape
        rows = math.prod(leading)
        return TensorInfo(
            torch.uint8,
            value_shape,
            Packing(
                shape=(rows, columns // kind.weights * kind.size),
                companion_suffixes=(),
                make_quantized=partial(_make_quantized, kind, (rows, columns)),
                can_stay_quantized=has_full_rows,
            ),
        )

    def _rename_like_transformers(self) -> None:
        """Rename tensors from llama.cpp's names to transformers'; note which have permuted q and k rows."""
        has_llama_cpp_names = "token_embd.weight" in self.tensors
        if not has_llama_cpp_names:
            return
        self._reject_unsupported_models()
        is_t5 = "enc.blk.0.attn_q.weight" in self.tensors
        # Qwen2 has biases, and Qwen3 has norms of q and k; only Llama's rows are permuted
        is_qwen = "blk.0.attn_q.bias" in self.tensors or "blk.0.attn_q_norm.weight" in self.tensors
        is_llama = not is_t5 and not is_qwen
        if is_t5:
            outside_blocks = {**_OUTSIDE, "token_embd": "shared"}
            inside_blocks = _T5
            blocks = "encoder.block"
        else:
            outside_blocks = _OUTSIDE
            inside_blocks = _LLAMA
            blocks = "model.layers"
        for old in [name for name in self.tensors if "." in name]:
            match = re.fullmatch(r"(?:enc\.)?blk\.(\d+)\.(\w+)\.(weight|bias)", old)
            if match is None:
                layer, _, leaf = old.rpartition(".")
                new = f"{outside_blocks.get(layer, layer)}.{leaf}"
            else:
                number, layer, leaf = match.groups()
                new = f"{blocks}.{number}.{inside_blocks.get(layer, layer)}.{leaf}"
                if is_llama and layer in ("attn_q", "attn_k"):
                    self._num_permuted_heads[new] = self._count_heads(layer, self.tensors[old])
            # Rename a tensor; raise ValueError if the new name is already taken
            if new != old and new in self.tensors:
                raise ValueError(f"{shorten(old, 60)} and {shorten(new, 60)} are the same tensor")
            self.tensors[new] = self.tensors.pop(old)
            self._offsets[new] = self._offsets.pop(old)

    def _reject_unsupported_models(self) -> None:
        """Raise CheckpointError for models whose weights llama.cpp has changed irreversibly."""
        for layer, model_name in _UNSUPPORTED.items():
            if any(f".{layer}." in name for name in self.tensors):
                raise CheckpointError(
                    f"{self.path} is {model_name} with llama.cpp's names, which is not supported. Pass the "
                    "safetensors file of the model.",
                    self.path,
                )

    def _count_heads(self, layer: str, info: TensorInfo) -> int:
        """Return the head count of Llama's attn_q or attn_k, after checking that it divides the rows."""
        key = "llama.attention.head_count" + ("_kv" if layer == "attn_k" else "")
        heads = int(self.metadata.get(key, 0))
        if heads < 1 or len(info.shape) != 2 or info.shape[0] % (2 * heads):
            raise ValueError(f"{key} is {heads}, which does not divide rows of {info.shape} into pairs")
        return heads

    def borrow(self, name: str, read_buffer: Tensor) -> Tensor:
        """Return a tensor with rows in transformers' order; it may be a view of `read_buffer`."""
        tensor = super().borrow(name, read_buffer)
        if name in self._num_permuted_heads:
            # rotary pairs of rows are adjacent in the file; transformers has the first halves of all pairs,
            # then the second halves
            tensor = (
                tensor.unflatten(0, (self._num_permuted_heads[name], -1, 2)).transpose(1, 2).flatten(0, 2)
            )
        return tensor


class _HeaderReader:
    """Read values from a GGUF header; raise ValueError if it is longer than `max_bytes`."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self.offset = 0  # bytes read so far

    def read_bytes(self, size: int) -> bytes:
        self.offset += size
        if self.offset > self._max_bytes:
            raise ValueError(f"it claims more than {self._max_bytes:,} bytes")
        return self._file.read(size)

    def read_number(self, code: str) -> Any:
        """Read a little-endian number of the `struct` type `code`."""
        return struct.unpack(f"<{code}", self.read_bytes(struct.calcsize(f"<{code}")))[0]

    def read_string(self, max_length: int | None = None) -> str:
        length = self.read_number("Q")
        if max_length is not None and length > max_length:
            raise ValueError(f"a tensor has a name of {length} bytes")
        return self.read_bytes(length).decode("utf-8")

    def read_shape(self) -> tuple[int, ...]:
        """Read a tensor shape from a short array of integers.

        Raises:
            ValueError: If the array is too long or its values are not integers.
        """
        value_type = self.read_number("I")
        count = self.read_number("Q")
        if _NUMBERS.get(value_type, "f") in "fd?" or count > _MAX_AXES:
            raise ValueError(f"a shape is a list of {count} values of the kind {value_type}")
        return tuple(self.read_number(_NUMBERS[value_type]) for _ in range(count))

    def read_value(self, value_type: int) -> str | float | None:
        """Read a string or a number; skip an array and return None."""
        if value_type in _NUMBERS:
            number: float = self.read_number(_NUMBERS[value_type])
            return number
        if value_type == _STRING:
            return self.read_string()
        if value_type != _ARRAY:
            raise ValueError(f"a value has the unknown type {value_type}")
        item_type = self.read_number("I")
        count = self.read_number("Q")
        if item_type in _NUMBERS:
            self.read_bytes(count * struct.calcsize(_NUMBERS[item_type]))
        elif item_type == _STRING:
            for _ in range(count):
                self.read_bytes(self.read_number("Q"))
        else:
            raise ValueError(f"a list has values of the kind {item_type}")
        return None


def _make_quantized(kind: Kind, shape: tuple[int, int], packed: Tensor) -> QuantizedWeight:
    """Wrap a packed GGUF weight of `shape`; raise ValueError if its scales are NaN or infinite."""
    if packed.device.type != "meta" and not kind.is_sound(packed):
        raise ValueError("has scales that are NaN or infinite")
    return QuantizedWeight(PackedRowFormat(kind.name, decode_rows=kind.rows), shape, (packed,))


def _restore_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the five axes of a patch embedding, which GGUF flattens because it allows only four axes."""
    # Patches are assumed to be 1 x 2 x 2, as in all released models with such an embedding.
    num_axes = len(shape)
    is_wan_weight = name.endswith("patch_embedding.weight") and num_axes in (2, 4)
    is_hunyuan_weight = name.endswith("img_in.proj.weight") and num_axes == 4 and shape[-2:] == (2, 2)
    if is_wan_weight or is_hunyuan_weight:
        flat_size = math.prod(shape[1:])
        if flat_size % 4 == 0:
            return (shape[0], flat_size // 4, 1, 2, 2)
    return shape

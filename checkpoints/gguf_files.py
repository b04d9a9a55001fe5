"""Read GGUF files: a header of keys and tensors, then aligned data.

The gguf package's reader is not used: it maps the file, and never ends on a false header. Source: the
specification in ggml's docs/gguf.md; names of text encoders: llama.cpp's `tensor_mapping.py`.
"""

import math
import re
import struct
from collections.abc import Mapping
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from checkpoints.containers import HeaderFile, check_count
from checkpoints.stored.forms import Stored
from checkpoints.stored.ggml import KINDS, Kind, kind_of_package
from checkpoints.stored.packed import RowForm
from modules.control_codes import shorten
from modules.errors import CheckpointError
from modules.integers import round_up
from modules.limits import MAX_ELEMENTS, MAX_HEADER_BYTES, MAX_TENSOR_NAME
from protocols.loading import Packing, TensorInfo

_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MAX_AXES = 8
# before a tensor's name: its shape in the model, if it lies in another one. Converters for ComfyUI store
# layers whose rows are not a multiple of 256 as rows of 256
_SHAPE_KEY = "comfy.gguf.orig_shape."

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
# parts of names in files of models whose weights llama.cpp changes in ways that are not undone here
_CHANGED = {"post_attention_norm": "Gemma", "ffn_gate_exps": "a mixture of experts"}


class GgufFile(HeaderFile):
    """A GGUF file. Tensors of text encoders get the names and the row order of the transformers library."""

    header = "GGUF header"
    faults = (ValueError, struct.error)

    def _read_header(self, size: int) -> None:
        """Read magic and version, keys and values, then name, shape, type and offset of each tensor."""
        head = _Header(self._file, min(size, MAX_HEADER_BYTES))
        head.take(4)
        version = head.number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, 2 and 3 are known")
        count, keys = head.number("Q"), head.number("Q")
        own_shapes = self._read_keys(head, keys)
        starts: dict[str, int] = {}
        for _ in range(count):
            name = self._read_tensor(head, own_shapes)
            starts[name] = head.number("Q")
        align = int(self.metadata.get("general.alignment", 32))
        if align < 1:
            raise ValueError(f"its alignment is {align}")
        self._place_tensors(starts, round_up(head.place, align), size)
        self._heads: dict[str, int] = {}  # of tensors whose rows are permuted within each head
        self._name_like_transformers()

    def _read_tensor(self, head: "_Header", own_shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Read the header entry of the next tensor, except for its position; return its name."""
        check_count(self.path, len(self.tensors))
        name = head.text(MAX_TENSOR_NAME)
        axes = head.number("I")
        if axes > _MAX_AXES or name in self.tensors:
            raise ValueError(f"{shorten(name, 60)} has {axes} axes, or is there twice")
        shape = tuple(head.number("Q") for _ in range(axes))[::-1]
        if math.prod(max(length, 1) for length in shape) > MAX_ELEMENTS:
            raise ValueError(f"{name} has the impossible shape {shape}")
        own_shape = own_shapes.get(name, shape)
        if math.prod(own_shape) != math.prod(shape) or not all(length > 0 for length in own_shape):
            raise ValueError(f"{name} lies as {shape}, and {_SHAPE_KEY} says {shorten(str(own_shape), 60)}")
        self.tensors[name] = self._make_info(name, head.number("I"), shape, own_shape)
        return name

    def _place_tensors(self, starts: Mapping[str, int], data: int, size: int) -> None:
        """Compute the position of each tensor in the file, and check that none overlap.

        `starts` are offsets from `data`, the end of the header. `size` is the size of the file.
        """
        spans = []
        for name, start in starts.items():
            self._places[name] = data + start
            spans.append((data + start, data + start + self.tensors[name].size_bytes, name))
        previous_end = data
        for begin, end, name in sorted(spans):
            if begin < previous_end or end > size:
                raise ValueError(
                    f"{name} is at bytes {begin} to {end} of {size}, other tensors end at {previous_end}"
                )
            previous_end = end

    def _read_keys(self, head: "_Header", number: int) -> dict[str, tuple[int, ...]]:
        """Read keys into `metadata`; return the original shapes of reshaped tensors, by name."""
        own_shapes: dict[str, tuple[int, ...]] = {}
        for _ in range(number):
            key = head.text()
            kind = head.number("I")
            if key.startswith(_SHAPE_KEY) and kind == _LIST:
                own_shapes[key.removeprefix(_SHAPE_KEY)] = head.full_numbers()
                continue
            value = head.value(kind)
            if value is not None:
                self.metadata[key] = str(value)
        return own_shapes

    def _make_info(
        self, name: str, number: int, shape: tuple[int, ...], own_shape: tuple[int, ...]
    ) -> TensorInfo:
        """Return the metadata of a tensor.

        `number` is its GGUF type, `shape` the shape in the file, and `own_shape` the shape in the model.
        """
        value_shape = _restore_shape(name, shape) if own_shape == shape else own_shape
        if number in _PLAIN:
            return TensorInfo(_PLAIN[number], value_shape)
        try:
            kind = KINDS.get(number) or kind_of_package(number)
        except ImportError:
            raise CheckpointError(
                f"{self.path}: {name} is of GGUF type {number}, which the package gguf may read; it is not "
                "installed. Run: pip install gguf",
                self.path,
            ) from None
        if kind is None:
            names = ", ".join(["F32", "F16", "BF16", *(kind.name for kind in KINDS.values())])
            raise CheckpointError(
                f"{self.path}: {name} is of the unknown GGUF type {number}. Those known are {names}, and "
                "those of the package gguf.",
                self.path,
            )
        if not shape or shape[-1] % kind.weights:
            raise ValueError(f"{name} has the shape {shape}, {kind.name} is stored in rows of {kind.weights}")
        return TensorInfo(torch.uint8, value_shape, _make_packing(kind, shape, own_shape))

    def _name_like_transformers(self) -> None:
        """Translate llama.cpp's names of tensors to those of transformers; undo the permutation of q and k.

        Raises:
            CheckpointError: If llama.cpp changes the weights of this model in a way that cannot be undone.
        """
        if "token_embd.weight" not in self.tensors:
            return
        for mark, what in _CHANGED.items():
            if any(f".{mark}." in name for name in self.tensors):
                raise CheckpointError(
                    f"{self.path} is {what} with llama.cpp's names, which is not supported. Give the "
                    "safetensors file of the model.",
                    self.path,
                )
        # Qwen2 has biases and Qwen3 norms of q and k; only Llama's rows are permuted
        is_t5 = "enc.blk.0.attn_q.weight" in self.tensors
        is_llama = not is_t5 and "blk.0.attn_q.bias" not in self.tensors
        is_llama = is_llama and "blk.0.attn_q_norm.weight" not in self.tensors
        outside_blocks = _OUTSIDE
        inside_blocks = _LLAMA
        blocks = "model.layers"
        if is_t5:
            outside_blocks = {**_OUTSIDE, "token_embd": "shared"}
            inside_blocks = _T5
            blocks = "encoder.block"
        for old in [name for name in self.tensors if "." in name]:
            match = re.fullmatch(r"(?:enc\.)?blk\.(\d+)\.(\w+)\.(weight|bias)", old)
            if match is None:
                start, _, kind = old.rpartition(".")
                new = f"{outside_blocks.get(start, start)}.{kind}"
            else:
                number, part, kind = match.groups()
                new = f"{blocks}.{number}.{inside_blocks.get(part, part)}.{kind}"
                if is_llama and part in ("attn_q", "attn_k"):
                    self._heads[new] = self._count_heads(part, self.tensors[old])
            if new != old and new in self.tensors:
                raise ValueError(f"{shorten(old, 60)} and {shorten(new, 60)} are the same tensor")
            self.tensors[new] = self.tensors.pop(old)
            self._places[new] = self._places.pop(old)

    def _count_heads(self, part: str, info: TensorInfo) -> int:
        key = "llama.attention.head_count" + ("_kv" if part == "attn_k" else "")
        heads = int(self.metadata.get(key, 0))
        if heads < 1 or len(info.shape) != 2 or info.shape[0] % (2 * heads):
            raise ValueError(f"{key} is {heads}, which does not divide rows of {info.shape} into pairs")
        return heads

    def borrow(self, name: str, scratch: Tensor) -> Tensor:
        """Return a tensor whose rows are in the order of the transformers library."""
        tensor = super().borrow(name, scratch)
        if name in self._heads:  # pairs of rows lie side by side, for transformers in halves
            tensor = tensor.unflatten(0, (self._heads[name], -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor


class _Header:
    """Reader of the numbers and texts in a file's header; raises ValueError beyond `maximum` bytes."""

    def __init__(self, file: BinaryIO, maximum: int) -> None:
        self._file, self._most, self.place = file, maximum, 0

    def take(self, size: int) -> bytes:
        self.place += size
        if self.place > self._most:
            raise ValueError(f"it claims more than {self._most:,} bytes")
        return self._file.read(size)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, maximum: int | None = None) -> str:
        length = self.number("Q")
        if maximum is not None and length > maximum:
            raise ValueError(f"a tensor has a name of {length} bytes")
        return self.take(length).decode("utf-8")

    def full_numbers(self) -> tuple[int, ...]:
        """Read a short list of integers, such as a shape.

        Raises:
            ValueError: If the list is long or holds anything else.
        """
        inner = self.number("I")
        count = self.number("Q")
        if _NUMBERS.get(inner, "f") in "fd?" or count > _MAX_AXES:
            raise ValueError(f"a shape is a list of {count} values of the kind {inner}")
        return tuple(self.number(_NUMBERS[inner]) for _ in range(count))

    def value(self, kind: int) -> str | float | None:
        """Read a text or a number; a list is skipped, and None returned."""
        if kind in _NUMBERS:
            number: float = self.number(_NUMBERS[kind])
            return number
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            raise ValueError(f"a value is of the unknown kind {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            self.take(count * struct.calcsize(_NUMBERS[inner]))
        elif inner == _TEXT:
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            raise ValueError(f"a list has values of the kind {inner}")
        return None


def _make_packing(kind: Kind, shape: tuple[int, ...], own_shape: tuple[int, ...]) -> Packing:
    """Return the packing of a tensor.

    `shape` is the shape in the file. `own_shape` is the shape in the model.
    """
    has_full_rows = own_shape[-1] % kind.weights == 0  # then its own rows are rows of blocks too
    *ahead, columns = own_shape if has_full_rows else shape
    rows = math.prod(ahead)
    return Packing(
        shape=(rows, columns // kind.weights * kind.size),
        companions=(),
        keep=partial(_keep, kind, (rows, columns)),
        can_stay=has_full_rows,
    )


def _keep(kind: Kind, shape: tuple[int, int], packed: Tensor) -> Stored:
    if packed.device.type != "meta" and not kind.is_sound(packed):
        raise ValueError("has scales that are NaN or infinite")
    return Stored(RowForm(kind.name, make=kind.rows), shape, (packed,))


def _restore_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Restore the five axes of a patch embedding that was flattened, as GGUF allows at most four axes.

    All released models that are concerned have patches of 1 x 2 x 2.
    """
    num_axes = len(shape)
    is_of_wan = name.endswith("patch_embedding.weight") and num_axes in (2, 4)
    is_of_hunyuan = name.endswith("img_in.proj.weight") and num_axes == 4 and shape[-2:] == (2, 2)
    if is_of_wan or is_of_hunyuan:
        channels = math.prod(shape[1:]) // 4
        if math.prod(shape[1:]) == channels * 4:
            return (shape[0], channels, 1, 2, 2)
    return shape

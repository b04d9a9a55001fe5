"""Translate tensor names of model files, join and split tensors, and read dimensions from shapes.

Also load a network from a plan, and report files of the wrong kind. "Our" names are our modules' names.
"""

import functools
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from checkpoints.filling import (
    QuantizedLoading,
    add_leading_axes,
    find_quantized_weights,
    linear_weights,
    load_module,
    on_meta_device,
    read_quantized_on_meta,
)
from checkpoints.kinds import describe_file_kind
from checkpoints.opening import Checkpoint, reject_quantized
from checkpoints.stored.forms import QuantizedWeight, make_quantization_format, prepare
from modules.errors import CheckpointError
from modules.limits import MAX_BLOCKS
from modules.speed_options import Quantization
from protocols.loading import BlockSharder, HostWeightMemory, TensorSource

Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)
Names = Sequence[tuple[str, str]]  # (pattern of a full name in the file, our name)
# (pattern, our names of the tensors that are stacked in it, in order and with equal numbers of rows)
Cuts = Sequence[tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class LoadPlan(Generic[Config]):
    """How to load a network from an open file: its configuration, and what each tensor is built from."""

    config: Config  # dimensions of the network
    checkpoint: Checkpoint  # names have no prefix
    sources: Mapping[str, TensorSource]  # by our name
    ignore: tuple[str, ...] = ()  # patterns of names in the file that may be unused


def load_planned(
    plan: LoadPlan[Config],
    build: Callable[[Config], Network],
    device: torch.device,
    dtype: torch.dtype | Callable[[str, torch.dtype], torch.dtype],
    label: str,
    form: str | None = None,
    host: HostWeightMemory | None = None,
    blocks: BlockSharder | None = None,
) -> Network:
    """Load the network of a plan to a device, in eval mode and without gradients.

    Args:
        plan: The plan; its checkpoint must be open.
        build: Builds the network from the plan's configuration; called on the meta device.
        device: Device of the network.
        dtype: Dtype of all tensors, or a function that maps our name and the dtype in the file to it.
        label: Option or name of the network, for messages.
        form: Module of `checkpoints.stored` that quantizes linear layers; None keeps the file's format,
            except that fp8 is dequantized.
        host: Keeps some of the tensors in host memory.
        blocks: Shards blocks across processes; None keeps all blocks in this process.

    Raises:
        CheckpointError: If tensors are missing, unexpected, misshaped, NaN or infinite, or if the file stores
            weights in a quantized format other than `form`.
    """
    with on_meta_device():
        network = build(plan.config)
    load_module(
        network,
        plan.checkpoint,
        plan.sources,
        device=device,
        dtype=(lambda *_: dtype) if isinstance(dtype, torch.dtype) else dtype,
        ignore=plan.ignore,
        label=label,
        quantized=_select_quantized_layers(plan, network, form, device),
        host=host,
        on_tensor_loaded=None if blocks is None else blocks.watch(network),
    )
    if blocks is not None:
        blocks.finish(network)
    return network.eval()


def _select_quantized_layers(
    plan: LoadPlan[Any], network: nn.Module, form: str | None, device: torch.device
) -> QuantizedLoading | None:
    """Select the linear layers that will be quantized in the loaded network; None if there are none."""
    # Layers that are quantized in the file stay quantized. The others are quantized to `form` unless it is
    # None.
    file_is_quantized = any(source.build_quantized is not None for source in plan.sources.values())
    if form is None and not file_is_quantized:
        return None
    linear = linear_weights(network)
    quantized_in_file = find_quantized_weights(
        linear, plan.sources, plan.checkpoint.tensors, format_is_requested=form is not None
    )
    if form is None:  # nothing has to be quantized
        return QuantizedLoading(None, quantized_in_file=quantized_in_file) if quantized_in_file else None
    # Raise CheckpointError if any weight in `names` is stored in a quantized format other than `form`
    tensors = plan.checkpoint.tensors
    for name in sorted(quantized_in_file):
        weight = read_quantized_on_meta(plan.sources[name], tensors)
        if weight is not None and weight.format.name != form:
            path = plan.checkpoint.path
            raise CheckpointError(
                f"{form} is requested for the text encoder, but {path} is already in {weight.format.name}, "
                "and rounding twice only loses quality. Omit --text_encoder_form (or --fp8_...) to "
                "keep the file's format, or pass the 16-bit file.",
                path,
            )
    quantization_format = make_quantization_format(prepare(text_quantization(form), device))
    return QuantizedLoading(
        quantization_format, to_quantize=linear - quantized_in_file, quantized_in_file=quantized_in_file
    )


def text_quantization(form: str) -> Quantization:
    """Return the quantization of text encoder weights to `form`, a module name in `checkpoints.stored`."""
    return Quantization("rows", float32_scales=True, form=form)


def loaded_bytes(plan: LoadPlan[Any], name: str, dtype: torch.dtype, form: str | None) -> int:
    """Return the bytes that a linear weight takes after loading.

    Args:
        plan: The plan to load the network.
        name: Our name of the weight.
        dtype: Dtype if the weight is not quantized.
        form: Module of `checkpoints.stored` that quantizes linear weights, or None.
    """
    source = plan.sources[name]
    tensors = plan.checkpoint.tensors
    shape = tensors[source.names[0]].shape
    weight = read_quantized_on_meta(source, tensors)
    stays_quantized = weight is not None and (form is not None or weight.format.is_kept_by_default)
    if not stays_quantized:
        if form is None:
            return math.prod(shape) * dtype.itemsize
        # quantize on the meta device, only to add up the bytes of codes and scales
        weight = make_quantization_format(text_quantization(form)).empty((shape[0], shape[1]))
    assert weight is not None
    return sum(tensor.nbytes for tensor in weight.tensors if tensor is not None)


def find_dialect(dialects: Mapping[str, tuple[str, Names]], tensor_names: Container[str]) -> str | None:
    """Return the dialect whose identifying tensor a file has; None for other files.

    Args:
        dialects: Dialects by name, each with a tensor that only its files have, and its tensor names.
        tensor_names: Tensor names of the file.
    """
    for dialect, (identifying_tensor, _) in dialects.items():
        if identifying_tensor in tensor_names:
            return dialect
    return None


def translate_name(name: str, table: Names) -> str:
    """Translate a tensor name in a file to ours; an unknown name is kept, and reported later."""
    # one combined pattern first, because most names of an all-in-one file match none
    if not _join_patterns(tuple(pattern for pattern, _ in table)).fullmatch(name):
        return name
    for pattern, ours in table:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours)
    return name


@functools.cache
def _join_patterns(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Combine patterns without backreferences into one pattern that matches if any of them does."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def rename_sources(
    sources: Mapping[str, TensorSource], map_name: Callable[[str], str]
) -> dict[str, TensorSource]:
    """Rename sources; `map_name` maps an old name to the new name."""
    return {map_name(name): source for name, source in sources.items()}


def count(names: Iterable[str], block_pattern: str, path: Path | None = None) -> int:
    """Count the blocks of a network by the distinct block prefixes of its tensor names.

    Args:
        names: Names of the tensors.
        block_pattern: Regular expression for a block prefix with its index, such as blocks.0.
        path: The file, for the message.

    Raises:
        CheckpointError: If there are more blocks than in any model.
    """
    pattern = re.compile(rf"({block_pattern})\.")
    blocks = {match[1] for match in map(pattern.match, names) if match}
    if len(blocks) > MAX_BLOCKS:
        # without the `path` argument, which would extend the message by the family of the file: finding it
        # reads all names of the file a dozen times
        raise CheckpointError(
            f"{path or 'a file'} has {len(blocks):,} layers such as {min(blocks)}, more than any model has. "
            "Pass the released file of the model."
        )
    return len(blocks)


def make_shape_reader(
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    misshapen_error: CheckpointError | None = None,
) -> Callable[..., tuple[int, ...]]:
    """Return a function that maps our name of a tensor to its shape in the file.

    The function raises CheckpointError if the file lacks the tensor. With `misshapen_error`, it also takes a
    number of axes (default 4), and raises that error if the number of axes differs or there are no values.
    """

    def shape(name: str, axes: int = 4) -> tuple[int, ...]:
        if name not in sources:
            raise CheckpointError(
                f"{checkpoint.path} is incomplete: {name} is missing. Download or copy it again.",
                checkpoint.path,
            )
        stored_shape = checkpoint.tensors[sources[name].names[0]].shape
        if misshapen_error is None:
            return stored_shape
        if len(stored_shape) < axes:
            stored_shape = add_leading_axes(stored_shape, axes)
        if len(stored_shape) != axes or 0 in stored_shape:
            raise misshapen_error
        return stored_shape

    return shape


@dataclass(frozen=True)
class DitShapes:
    """Reads a transformer's dimensions from the shapes of its tensors."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]  # published name -> shape
    model: str  # for messages: HunyuanVideo

    def get_shape(self, name: str, axes: int = 2) -> tuple[int, ...]:
        """Return the shape of a tensor with `axes` axes; the file may lack leading axes of length 1.

        Raises:
            CheckpointError: If the tensor is missing or has a different number of axes.
        """
        if name not in self.shapes:
            raise CheckpointError(
                f"{self.path} is an incomplete {self.model} transformer: {name} is missing. Copy it again.",
                self.path,
            )
        shape = add_leading_axes(self.shapes[name], axes)
        if len(shape) != axes or 0 in shape:
            sizes = " x ".join(map(str, self.shapes[name])) or "a single number"
            raise CheckpointError(
                f"{self.path} does not fit {self.model}: {name} is {sizes}, but {axes} axes are needed. Pass "
                "a file of that model with the shapes of its release.",
                self.path,
            )
        return shape

    def patches(self, name: str) -> tuple[int, int, tuple[int, int, int]]:
        """Return the hidden size, latent channels and patch size (F, H, W) of a transformer.

        `name` is the weight of the layer that turns latents into tokens.
        """
        dim, in_dim, frames, rows, columns = self.get_shape(name, axes=5)
        return dim, in_dim, (frames, rows, columns)

    def count_blocks(self, start: str) -> int:
        """Count the blocks whose names consist of `start`, a dot and an index."""
        return count(self.shapes, rf"{re.escape(start)}\.\d+", self.path)


def make_wrong_kind_error(checkpoint: Checkpoint, right_kind: str, option: str, give: str) -> CheckpointError:
    """Return the error for a file with a different kind of model than its option takes.

    Args:
        checkpoint: The open file.
        right_kind: Description of the kind that the option takes.
        option: The option.
        give: Description of files that the option takes.

    Raises:
        CheckpointError: If the file is quantized in an unsupported format; its tensors may then have other
            names although the kind is right.
    """
    reject_quantized(checkpoint)
    kind = describe_file_kind(checkpoint.tensors)
    if kind is None:
        example_names = ", ".join(sorted(checkpoint.tensors)[:3])
        kind = f"an unknown model with tensors such as {example_names}"
        if any("lora_" in name for name in checkpoint.tensors):
            kind = "a LoRA"
    return CheckpointError(
        f"{checkpoint.path} is not {right_kind}; it looks like {kind}.\n  Pass {give} to {option}.",
        checkpoint.path,
    )


def join_parts(
    file_sources: Mapping[str, TensorSource], table: Names, swapped: Iterable[str] = ()
) -> dict[str, TensorSource]:
    """Rename sources to our names, and concatenate tensors that the file stores in parts.

    Args:
        file_sources: Sources by name in the file.
        table: Translates these names. A translated name that ends in #n is the n-th part of a tensor; parts
            are concatenated along rows.
        swapped: Our names of tensors whose two halves are swapped in the file.
    """
    parts_by_index: dict[str, dict[int, TensorSource]] = {}  # our name -> index of a part -> its source
    for name_in_file, source in file_sources.items():
        name, _, index = translate_name(name_in_file, table).partition("#")
        parts_by_index.setdefault(name, {})[int(index or 0)] = source
    sources = {}
    for name, parts in parts_by_index.items():
        sources[name] = _concatenate([parts[index] for index in sorted(parts)])
    for name in swapped:
        if name in sources:
            sources[name] = sources[name].with_step(_swap_halves)
    return sources


def _swap_halves(tensor: Tensor) -> Tensor:
    """Exchange the first and the second half of a tensor's rows."""
    return torch.cat(tensor.chunk(2)[::-1])


def stack_heads(rows: Tensor, head_width: int) -> Tensor:
    """Reorder the rows of each head, [q0; k0; v0; q1; k1; v1; ...], to [all q; all k; all v]."""
    return rows.unflatten(0, (-1, 3, head_width)).transpose(0, 1).flatten(0, 2)


def joined_shapes(shapes: Mapping[str, tuple[int, ...]], table: Names) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `join_parts` returns, given the shapes in the file."""
    joined: dict[str, tuple[int, ...]] = {}
    for stored_name, shape in shapes.items():
        name = translate_name(stored_name, table).partition("#")[0]
        previous_parts = joined.get(name)
        if previous_parts and shape:
            shape = (previous_parts[0] + shape[0], *shape[1:])
        joined[name] = shape
    return joined


def _concatenate(parts: list[TensorSource]) -> TensorSource:
    """Return a source that concatenates the tensors of several sources along their rows."""
    if len(parts) == 1:
        return parts[0]
    names = tuple(name for part in parts for name in part.names)
    build = functools.partial(_concatenate_rows, parts)
    build_quantized = None
    if all(part.build_quantized is not None for part in parts):
        build_quantized = functools.partial(_concatenate_quantized_rows, parts)
    return TensorSource(names, build, build_quantized)


def _concatenate_rows(parts: Sequence[TensorSource], *file_tensors: Tensor) -> Tensor:
    """Concatenate tensors, in float32 if any is fp8, because torch cannot promote fp8 dtypes."""
    tensors = [part.build_tensor(group) for part, group in _group_by_part(parts, file_tensors)]
    dtype = tensors[0].dtype
    if any(tensor.dtype.itemsize == 1 for tensor in tensors):
        dtype = torch.float32
    return torch.cat([tensor.to(dtype) for tensor in tensors])


def _concatenate_quantized_rows(
    parts: Sequence[TensorSource], *file_tensors: Tensor
) -> QuantizedWeight | None:
    """Concatenate quantized weights along their rows; return None if their formats cannot be joined."""
    weights: list[QuantizedWeight] = []
    for part, group in _group_by_part(parts, file_tensors):
        weight = part.make_quantized(group)
        if weight is None or (weights and weight.format != weights[0].format):
            return None
        weights.append(weight)
    return weights[0].format.join(weights)


def _group_by_part(
    parts: Iterable[TensorSource], file_tensors: Sequence[Tensor]
) -> Iterator[tuple[TensorSource, Sequence[Tensor]]]:
    """Yield each part with those of the file tensors that it is built from."""
    first = 0
    for part in parts:
        end = first + len(part.names)
        yield part, file_tensors[first:end]
        first = end


def cut_parts(file_sources: Mapping[str, TensorSource], cuts: Cuts) -> dict[str, TensorSource]:
    """Split fused weights of a file by rows into one source per part; keep all other sources.

    A quantized weight stays quantized; each part gets the scales of its rows.
    """
    sources: dict[str, TensorSource] = {}
    for name, source in file_sources.items():
        parts = _list_parts(name, cuts)
        if not parts:
            sources[name] = source
        for index, part in enumerate(parts):
            sources[part] = _cut(source, index, len(parts))
    return sources


def parted_shapes(shapes: Mapping[str, tuple[int, ...]], cuts: Cuts) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `cut_parts` returns, given the shapes in the file."""
    part_shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        parts = _list_parts(name, cuts) if shape else ()
        if parts:
            part_shapes |= dict.fromkeys(parts, (shape[0] // len(parts), *shape[1:]))
        else:
            part_shapes[name] = shape
    return part_shapes


def _list_parts(name: str, cuts: Cuts) -> tuple[str, ...]:
    """Return our names of the parts into which a fused tensor is split; () if it is not split."""
    for pattern, parts in cuts:
        match = re.fullmatch(pattern, name)
        if match:
            return tuple(map(match.expand, parts))
    return ()


def _cut(source: TensorSource, index: int, count: int) -> TensorSource:
    """Return the source of one of `count` equal row ranges of a tensor."""
    # If the rows cannot be divided, the source reads all of them; the shape check then reports the mismatch.

    def build(*file_tensors: Tensor) -> Tensor:
        fused_weight = source.build_tensor(file_tensors)
        if len(fused_weight) % count == 0:
            return fused_weight.chunk(count)[index].contiguous()
        return fused_weight.contiguous()

    def build_quantized(*file_tensors: Tensor) -> QuantizedWeight | None:
        fused_weight = source.make_quantized(file_tensors)
        if fused_weight is None or fused_weight.shape[0] % count:
            return fused_weight
        num_rows = fused_weight.shape[0] // count
        return fused_weight.format.cut(fused_weight, index * num_rows, num_rows)

    return TensorSource(source.names, build, None if source.build_quantized is None else build_quantized)

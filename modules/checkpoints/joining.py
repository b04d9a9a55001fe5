"""Make our tensors of a file that has them under other names, or cut into parts that are stacked by rows."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from modules.checkpoints.dialects import Names, translate_name
from modules.checkpoints.sources import TensorSource


def join_parts(
    stored: Mapping[str, TensorSource], table: Names, swapped: Iterable[str] = ()
) -> dict[str, TensorSource]:
    """Map each of our names to how its tensor is made from those of a file.

    stored: by the file's names. table: of the file's dialect; a name that ends in #n is the nth of the parts
    that are stacked by rows in our tensor. swapped: our names of tensors whose halves the file has in the
    other order.
    """
    parts: dict[str, dict[int, TensorSource]] = {}
    for theirs, source in stored.items():
        name, _, part = translate_name(theirs, table).partition("#")
        parts.setdefault(name, {})[int(part or 0)] = source
    sources = {name: _join([found[part] for part in sorted(found)]) for name, found in parts.items()}
    return sources | {name: sources[name].then(_swap_halves) for name in swapped if name in sources}


def joined_shapes(shapes: Mapping[str, tuple[int, ...]], table: Names) -> dict[str, tuple[int, ...]]:
    """Return the shapes of our tensors from those of a file's, as `join_parts` makes them."""
    found: dict[str, tuple[int, ...]] = {}
    for theirs, shape in shapes.items():
        name = translate_name(theirs, table).partition("#")[0]
        above = found.get(name)
        found[name] = shape if above is None else (above[0] + shape[0], *shape[1:])
    return found


def _join(parts: list[TensorSource]) -> TensorSource:
    """Stack the rows of the parts to one tensor."""
    if len(parts) == 1:
        return parts[0]

    def build(*tensors: Tensor) -> Tensor:
        rows, rest = [], list(tensors)
        for part in parts:
            rows.append(part.make(rest[: len(part.names)]))
            rest = rest[len(part.names) :]
        dtype = torch.float32 if any(row.dtype.itemsize == 1 for row in rows) else rows[0].dtype
        return torch.cat([row.to(dtype) for row in rows])

    def as_fp8(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stack the rows as fp8, with a scale for each row."""
        weights, scales, rest = [], [], list(tensors)
        for part in parts:
            weight, scale = part.make_fp8(rest[: len(part.names)])
            rest = rest[len(part.names) :]
            weights.append(weight)
            scales.append(torch.ones(1, device=weight.device) if scale is None else scale)
        whole = torch.cat([weight.view(torch.uint8) for weight in weights]).view(weights[0].dtype)
        if any(scale.ndim == 3 for scale in scales):
            return whole, torch.cat(scales)
        return whole, torch.cat(
            [scale.expand(len(weight), 1) for weight, scale in zip(weights, scales, strict=True)]
        )

    names = tuple(name for part in parts for name in part.names)
    kept = all(part.as_fp8 is not None for part in parts)
    return TensorSource(names, build, as_fp8 if kept else None)


def _swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])

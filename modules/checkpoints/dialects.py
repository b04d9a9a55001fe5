"""Translate names of model files to ours, read dimensions off the tensors, and tell what another file is."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from modules.checkpoints.filling import load_module
from modules.checkpoints.fp8_layers import encoder_loading
from modules.checkpoints.kinds import kind_of
from modules.checkpoints.opening import Checkpoint
from modules.checkpoints.sources import TensorSource
from modules.errors import CheckpointError

Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)
Names = Sequence[tuple[str, str]]  # pattern of a whole name in the file -> our name


@dataclass(frozen=True)
class LoadPlan(Generic[Config]):
    """Hold what loading needs: dimensions, the source of each tensor, and what may stay unused."""

    config: Config
    checkpoint: Checkpoint  # without prefixes
    sources: Mapping[str, TensorSource]
    ignore: tuple[str, ...] = ()


def load_planned(
    plan: LoadPlan[Config],
    build: Callable[[Config], Network],
    device: torch.device,
    dtype: torch.dtype | Callable[[str, torch.dtype], torch.dtype],
    what: str,
    in_fp8: bool = False,
) -> Network:
    """Load the network of a plan whose file is open onto the device, in eval mode, without gradients.

    build: makes it from the plan's dimensions; called on the meta device. dtype, what: as for `load_module`;
    a single dtype is used for all tensors. in_fp8: keep its linear layers in 8 bits. Raises CheckpointError
    as `load_module`.
    """
    with torch.device("meta"):
        network = build(plan.config)
    dtype_of = (lambda *_: dtype) if isinstance(dtype, torch.dtype) else dtype
    fp8 = encoder_loading(network, plan.sources, plan.checkpoint.tensors, device) if in_fp8 else None
    load_module(
        network,
        plan.checkpoint,
        plan.sources,
        device=device,
        dtype=dtype_of,
        ignore=plan.ignore,
        what=what,
        fp8=fp8,
    )
    return network.eval()


def translate_name(name: str, table: Names) -> str:
    """Return our name for one in the file; a name not in the table stays, to be reported as unexpected."""
    for pattern, ours in table:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(ours)
    return name


def rename_sources(
    sources: Mapping[str, TensorSource], name_of: Callable[[str], str]
) -> dict[str, TensorSource]:
    """Return the same sources under the names that `name_of` returns."""
    return {name_of(name): source for name, source in sources.items()}


def count(names: Iterable[str], start: str) -> int:
    """Return how many different beginnings of names match the pattern."""
    pattern = re.compile(rf"({start})\.")
    return len({found[1] for found in map(pattern.match, names) if found})


def shapes_of(
    checkpoint: Checkpoint, sources: Mapping[str, TensorSource]
) -> Callable[[str], tuple[int, ...]]:
    """Return a function: our name -> shape of the tensor in the file.

    It raises CheckpointError if the file has no such tensor.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in sources:
            raise CheckpointError(
                f"{checkpoint.path} is incomplete: {name} is missing. Download or copy it again.",
                checkpoint.path,
            )
        return checkpoint.tensors[sources[name].names[0]].shape

    return shape


def checked_shapes_of(
    checkpoint: Checkpoint, sources: Mapping[str, TensorSource], wrong: CheckpointError
) -> Callable[..., tuple[int, ...]]:
    """Return a function: our name, number of axes (default 4) -> shape of the tensor in the file.

    It raises `wrong` if the tensor has another number of axes or no values, and as that of `shapes_of`.
    """
    shape_of = shapes_of(checkpoint, sources)

    def shape(name: str, axes: int = 4) -> tuple[int, ...]:
        found = shape_of(name)
        if len(found) != axes or 0 in found:
            raise wrong
        return found

    return shape


@dataclass(frozen=True)
class DitShapes:
    """Hold the shapes of a transformer's tensors, from which its dimensions are read."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]  # published name -> shape
    model: str  # for messages: HunyuanVideo

    def of(self, name: str, axes: int = 2) -> tuple[int, ...]:
        """Return the shape of a tensor with this many axes.

        Raises CheckpointError if the file has none of that name.
        """
        found = self.shapes.get(name, ())
        if len(found) != axes:
            raise CheckpointError(
                f"{self.path} is an incomplete {self.model} transformer: {name} is missing. Copy it again.",
                self.path,
            )
        return found

    def patches(self, name: str) -> tuple[int, int, tuple[int, int, int]]:
        """Return the width of the model, the channels of latents and the size of a patch.

        name: of the layer that turns latents into tokens.
        """
        dim, in_dim, frames, rows, columns = self.of(name, axes=5)
        return dim, in_dim, (frames, rows, columns)

    def blocks(self, start: str) -> int:
        """Return the number of blocks in the list of that name."""
        return count(self.shapes, rf"{re.escape(start)}\.\d+")


def other_kind(checkpoint: Checkpoint, wanted: str, option: str, give: str) -> CheckpointError:
    """Return the error for a file that is not what an option takes.

    wanted, give: what it should be, and which files are that.
    """
    kind = kind_of(checkpoint.tensors)
    if kind is None:
        some = ", ".join(sorted(checkpoint.tensors)[:3])
        kind = (
            "a LoRA"
            if any("lora_" in name for name in checkpoint.tensors)
            else f"an unknown model with tensors such as {some}"
        )
    return CheckpointError(
        f"{checkpoint.path} is not {wanted}; it looks like {kind}.\n  Give {give} to {option}.",
        checkpoint.path,
    )

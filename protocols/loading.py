"""Records of loading: how a tensor is made from a file's, where and how a network's weights are placed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import torch
from torch import Tensor, nn

from checkpoints.stored.forms import QuantizedWeight
from modules.errors import CheckpointError
from modules.integers import round_up
from modules.speed_options import SDPA, AttentionChoice, Quantization


@dataclass(frozen=True)
class Packing:
    """How a file stores a packed weight: with another shape than its values, or with additional tensors."""

    shape: tuple[int, ...]  # of the tensor in the file
    companion_suffixes: tuple[str, ...]  # suffixes of its companions' names, instead of "weight"
    # takes the weight and the companions; raises ValueError for invalid scales
    make_quantized: Callable[..., QuantizedWeight]
    pad: int = 1  # rows and columns are rounded up to multiples of it
    can_stay_quantized: bool = True  # its rows are the value's rows, so that a layer can keep it packed

    def padded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return a shape with each axis rounded up to a multiple of `pad`."""
        return tuple(round_up(length, self.pad) for length in shape)


@dataclass(frozen=True)
class TensorInfo:
    """What is known about a tensor before it is read: its dtype in the file and the shape of its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    packing: Packing | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the tensor in the file, in bytes; packed if the file packs it."""
        return math.prod((self.packing or self).shape) * self.dtype.itemsize  # of the tensor in the file

    def read(self, file: BinaryIO, offset: int, read_buffer: Tensor, path: Path, name: str) -> Tensor:
        """Read the tensor from a file into `read_buffer` and return it.

        Args:
            file: The open file.
            offset: Offset of the tensor's first byte.
            read_buffer: Memory to read into, uint8.
            path: Path of the file, for messages.
            name: Name of the tensor, for messages.

        Raises:
            CheckpointError: If the file ends too soon.
        """
        target = read_buffer[: self.size_bytes]
        file.seek(offset)
        if file.readinto(memoryview(cast(Any, target.numpy()))) != len(target):  # type: ignore[attr-defined]
            text = f"{path} ends inside {name}: it was cut short while being read. Copy it again."
            raise CheckpointError(text, path)
        return target.view(self.dtype).view((self.packing or self).shape)  # packed weights differ in shape

    def hollow(self) -> Tensor:
        """Return an empty tensor of the same shape and dtype on the meta device."""
        return torch.empty((self.packing or self).shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class TensorSource:
    """How one tensor of a network is built: the tensors' names in the file, and a function of these tensors.

    `build` also runs on meta tensors, to compare shapes before anything is read; None uses the only tensor
    unchanged. `build_quantized` is like `build`, but keeps a weight in the 8-bit or 4-bit form of the file.
    It returns None if the tensors have no common form, and runs on meta tensors too.
    """

    names: tuple[str, ...]
    build: Callable[..., Tensor] | None = None
    build_quantized: Callable[..., QuantizedWeight | None] | None = None

    def with_step(self, change: Callable[[Tensor], Tensor]) -> "TensorSource":
        """Return the same source with another step at its end, such as slicing rows or transposing."""
        build = self.build
        return TensorSource(self.names, change if build is None else lambda *tensors: change(build(*tensors)))

    def build_tensor(self, tensors: Sequence[Tensor]) -> Tensor:
        """Build the network's tensor from the file's tensors, in the order of `names`."""
        return tensors[0] if self.build is None else self.build(*tensors)

    def make_quantized(self, tensors: Sequence[Tensor]) -> QuantizedWeight | None:
        """Build the weight in the quantized form of the file; None if it has to be dequantized."""
        return None if self.build_quantized is None else self.build_quantized(*tensors)


# (parameter name, loaded weight) -> weight with LoRA deltas added, same dtype
# (name, weight, dtype that the result is rounded to) -> changed weight, which may have another dtype still
WeightPatch = Callable[[str, Tensor, torch.dtype], Tensor]


class HostWeightMemory(Protocol):
    """Hold weights of a network in host memory while the network computes on a device."""

    def allocate_on_host(self, network: nn.Module, tensors: Mapping[str, TensorInfo]) -> Mapping[str, Tensor]:
        """Allocate host memory for the weights that stay there, and return it by tensor name.

        Args:
            network: The network, possibly on the meta device.
            tensors: All tensors of the network.
        """
        ...

    @property
    def is_written_by_this_process(self) -> bool:
        """Whether this process writes the weights; otherwise another process does."""

    def finish(self) -> None:
        """Wait until all processes have written their weights.

        Call it after this process has written its own.
        """


class BlockSharder(Protocol):
    """Process each block of a network as soon as it is loaded, for example to keep only a part of it."""

    option_name: str  # the option, for messages

    def watch(self, network: nn.Module) -> Callable[[str], None]:
        """Return a function to call with the name of each parameter of `network` once it is loaded."""

    def split(self, network: nn.Module) -> None:
        """Process the blocks of a complete network that was loaded without `watch`."""

    def finish(self, network: nn.Module) -> None:
        """Finish after all blocks have been taken; from now on the network can run."""


@dataclass(frozen=True)
class Placement:
    """Where a network is loaded and in which form."""

    device: torch.device
    # None: as the file stores it (fp8 files: upcast to the compute dtype)
    storage_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None  # None: the file's block weights' (fp8 files: bfloat16)
    # default compute dtype of fp8 files; None: bfloat16
    fp8_compute_dtype: torch.dtype | None = None
    keep_file_dtypes: bool = False  # every tensor as the file stores it, if it mixes dtypes
    attention: AttentionChoice = SDPA
    patch: WeightPatch | None = None  # LoRA deltas to add while loading, before any rounding
    # (name, shape) of a weight that could stay as the file packs it -> whether the caller adds to the layer's
    # output what `patch` would add to the weight; None: never
    leave_unmerged: Callable[[str, tuple[int, ...]], bool] | None = None
    # how the linear layers of the blocks are kept in 8 or 4 bits; None: as in the file, fp8 in 16 bits
    quantization: Quantization | None = None
    host_weights: HostWeightMemory | None = (
        None  # keeps some weights in host memory; None: all go to the device
    )
    block_sharder: BlockSharder | None = None  # takes each block when it is loaded; None: it stays unchanged
    # called before each tensor, instead of a progress bar; may raise to end the loading
    check: Callable[[], None] | None = None

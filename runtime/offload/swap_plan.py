"""Choose which weights of a transformer stay in host memory: count blocks, and list tensor names.

With `--blocks_to_swap N` the blocks take the device memory of all but N blocks, as in musubi-tuner.
Some blocks stay on the device; the others are streamed through a few slots, which count towards that memory.
Streamed blocks are spread evenly among resident ones, whose computation hides the copies.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.errors import OptionError
from modules.speed_options import SLOTS
from protocols.family import DitSpec
from protocols.loading import TensorInfo
from runtime.offload.host_memory import (
    HostTensors,
    LocalProcesses,
    allocate,
    find_local_processes,
    wait_for_all,
)


@dataclass(frozen=True)
class ListPlan:
    """Which blocks of one list are streamed from host memory, and how many slots on the device they share."""

    name: str  # name of the nn.ModuleList
    num_blocks: int
    streamed: tuple[int, ...]  # indices of the blocks that are copied from host memory each time
    slots: int  # number of device slots that the streamed blocks share


def plan_list(name: str, num_blocks: int, swapped: int, slots: int = SLOTS) -> ListPlan:
    """Plan the streaming of one list of blocks.

    The device has num_blocks - swapped blocks, but at least `slots`, so that one can be copied while
    another computes.

    Args:
        name: Name of the list.
        num_blocks: Number of blocks in the list.
        swapped: Number of blocks to swap, as --blocks_to_swap gives it; at most num_blocks - 1.
        slots: Number of slots for streamed blocks.
    """
    if swapped == 0:
        return ListPlan(name, num_blocks, (), 0)
    # a slot takes as much memory as a block that stays on the device
    resident = max(num_blocks - swapped - slots, 0)
    num_streamed = num_blocks - resident
    # spread the streamed blocks evenly over the list, so that copies overlap with computation
    streamed: list[int] = []
    for index in range(num_blocks):
        num_streamed_so_far = (index + 1) * num_streamed // num_blocks
        if num_streamed_so_far > len(streamed):
            streamed.append(index)
    return ListPlan(name, num_blocks, tuple(streamed), min(slots, num_streamed))


def max_blocks(
    num_blocks: Sequence[int], counts: Callable[[int], Sequence[int]] | None, unswapped: int = 1
) -> int:
    """Return the largest possible value of --blocks_to_swap.

    Args:
        num_blocks: Number of blocks in each list.
        counts: Returns the swapped blocks of each list for a value of the option; None: none can be swapped.
        unswapped: Number of blocks of each list that have to stay on the device.
    """
    if counts is None:
        return 0
    candidates = range(sum(num_blocks), 0, -1)  # largest first
    return next((candidate for candidate in candidates if _fits(num_blocks, counts(candidate), unswapped)), 0)


def _fits(num_blocks: Sequence[int], swapped: Sequence[int], unswapped: int) -> bool:
    """Return whether these numbers of blocks, one for each list, can be swapped."""
    # `unswapped` blocks of each list have to stay, except that a list with several blocks can always swap
    # one.
    maximum = [max(total - unswapped, 1 if total > 1 else 0) for total in num_blocks]
    return all(count <= limit for count, limit in zip(swapped, maximum, strict=True))


@dataclass(frozen=True)
class SwapPlan:
    """Which weights of a family's transformers are swapped, according to the swap options."""

    spec: DitSpec
    blocks: int  # --blocks_to_swap
    input_layers: bool = False  # --img_in_txt_in_offloading
    slots: int = SLOTS  # --block_swap_ring_size

    def __bool__(self) -> bool:
        return self.blocks > 0 or self.input_layers

    def lists(self, dit: nn.Module) -> list[ListPlan]:
        """Return which blocks of each block list are swapped, and with how many slots on the device.

        Raises:
            OptionError: If the network has too few blocks.
        """
        totals = [len(blocks) for blocks in self.spec.blocks(dit).values()]
        swapped = check_swap(self.spec, self.blocks, totals)
        rows = zip(self.spec.block_lists, totals, swapped, strict=True)
        return [plan_list(*row, self.slots) for row in rows]

    def names(self, dit: nn.Module) -> list[str]:
        """Return the names of all weights kept in host memory, in order of use.

        Raises OptionError if the network has too few blocks.
        """
        names = [name for path in self.input_layer_names(dit) for name in big_weights(dit, path)]
        for blocks in self.lists(dit):
            names += [
                name for index in blocks.streamed for name in big_weights(dit, f"{blocks.name}.{index}")
            ]
        return names

    def input_layer_names(self, dit: nn.Module) -> list[str]:
        """Return the names of the network's input layers to swap; empty if they stay on the device."""
        return [name for name in self.spec.input_layers if hasattr(dit, name)] if self.input_layers else []


def check_swap(spec: DitSpec, blocks: int, totals: Sequence[int]) -> Sequence[int]:
    """Distribute --blocks_to_swap over a network's lists of blocks; return the number for each list.

    Args:
        spec: Names of the network's blocks.
        blocks: Value of --blocks_to_swap.
        totals: Number of all blocks in each list.

    Raises:
        OptionError: If the network has too few blocks, or if none of its blocks can be swapped.
    """
    if not blocks:
        return [0] * len(totals)
    if spec.swap_counts is None:
        raise OptionError(
            f"--blocks_to_swap {blocks}: this model runs its blocks in its own way, so none can be swapped. "
            "Omit it"
        )
    swapped = spec.swap_counts(blocks)
    if not _fits(totals, swapped, spec.num_unswapped):
        maximum = max_blocks(totals, spec.swap_counts, spec.num_unswapped)
        block_counts = " + ".join(map(str, totals))
        raise OptionError(
            f"--blocks_to_swap {blocks}: the transformer has {block_counts} blocks, at most {maximum} can be "
            f"swapped. Use {maximum} or less"
        )
    return swapped


def big_weights(network: nn.Module, path: str) -> Iterator[str]:
    """Yield the names of weights below `path` that are worth moving, without biases, norms and scales."""
    for name, _ in big_layers(network, path):
        yield f"{name}.weight"


def big_layers(network: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear and convolutional layers below `path`, by full name; these have nearly all weights."""
    for name, module in network.get_submodule(path).named_modules(prefix=path):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            yield name, module


class HostWeights:
    """The weights of one network that are in host memory while it computes on a device."""

    def __init__(
        self,
        plan: SwapPlan,
        pinned: bool,
        local_processes: LocalProcesses | None = None,
        all_weights: bool = False,
    ) -> None:
        """Prepare host memory for a network; `allocate_on_host` allocates it.

        Args:
            plan: The plan of the swap.
            pinned: Whether the memory is locked, for a CUDA device.
            local_processes: Processes that share the memory; None if there is only one.
            all_weights: Whether to hold all tensors instead of only the swapped ones, as for networks that
                take turns on one device.
        """
        self.plan = plan
        self._pinned, self._local_processes, self._all_weights = pinned, local_processes, all_weights
        self._host_tensors: HostTensors | None = None  # allocated by `allocate_on_host`

    def allocate_on_host(self, network: nn.Module, tensors: Mapping[str, TensorInfo]) -> Mapping[str, Tensor]:
        """Allocate memory for the weights that the plan keeps there, or for all `tensors`; return it by name.

        Raises:
            OptionError: If the network has too few blocks.
        """
        names = tensors if self._all_weights else self.plan.names(network)
        self._host_tensors = allocate(
            {name: tensors[name] for name in names}, self._pinned, self._local_processes
        )
        return self._host_tensors.tensors

    @property
    def is_written_by_this_process(self) -> bool:
        """Whether this process loads the weights; if not, another one loads them into shared memory."""
        return self._host_tensors is None or self._host_tensors.is_written_by_this_process

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Weights in memory that processes share, by name; empty if nothing is shared."""
        return {} if self._host_tensors is None else self._host_tensors.tensors

    def finish(self) -> None:
        """Wait until all processes have loaded their weights."""
        wait_for_all(self._local_processes)

    def adopt(self, network: nn.Module) -> Mapping[str, Tensor]:
        """Return the swapped weights by name; move them to host memory if they were not loaded into it."""
        names = self.plan.names(network)
        if self._host_tensors is None:
            # Allocate host memory for a network's weights and make it their `.data`.
            weights = {name: network.get_parameter(name) for name in names}
            infos = {name: TensorInfo(weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
            tensors = self.allocate_on_host(network, infos)
            for name, weight in weights.items():
                if self.is_written_by_this_process:  # else another process fills the shared memory
                    tensors[name].copy_(weight.data)
                weight.data = tensors[
                    name
                ]  # immediately, so that there is never a second copy of all weights
            self.finish()
        return {name: self.tensors[name] for name in names}


def host_weights(plan: SwapPlan, device: torch.device, all_weights: bool = False) -> HostWeights | None:
    """Return host memory for the weights that the plan keeps off the device; None if there are none.

    Args:
        plan: The plan of the swap.
        device: Device of the run.
        all_weights: Whether to hold all weights of the network.
    """
    if not (plan or all_weights):
        return None
    return HostWeights(plan, device.type == "cuda", find_local_processes(os.environ), all_weights)

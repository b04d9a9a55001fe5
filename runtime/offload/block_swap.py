"""Keep blocks of a transformer in host memory and copy each to the device before it runs.

    host = host_weights(SwapPlan(family.dit, blocks), device)  # None if nothing is swapped
    dit = family.load_dit(Placement(device, host_weights=host))  # loads swapped weights to host memory
    ...  # LoRA, compilation, checkpointing
    swap_blocks(dit, host, device)

The streamed blocks of a list share a few slots of device memory. When a block is entered, the blocks that run
next are copied into the slots that are free by then. The route leads through the forward pass to its last
block, then back through the backward pass or on to the next pass. The content of the slots depends only on
the block that is entered, so a pass may end anywhere, even with an exception. A parameter stays the same
object; only its `.data` switches between the host's copy and a slot. Frozen weights are never copied back.

Without checkpointing, autograd keeps weights for the backward pass. A saved view of a slot is replaced by
the weight's name, and the weight is fetched again. Trained weights are stepped during the backward pass
(`--fused_backward_pass`), while their block is on the device, and copied back before their slot is reused.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

from protocols.steps import Overrides
from runtime.offload.host_memory import (
    Transfer,
    offload_layer,
    transfer_to,
)
from runtime.offload.swap_plan import HostWeights, ListPlan, big_layers
from runtime.run_blocks import Hidden, Runner, get_runner, set_runner

logger = logging.getLogger(__name__)

_NAME = "_block_swap"  # attribute of a network that contains its block swap


@dataclass(frozen=True, eq=False)
class StreamedBlock:
    """A block whose weights are in host memory, and on the device only while it runs."""

    position: int  # among all blocks, list by list
    weights: Sequence[Parameter]
    host: Sequence[Tensor]  # copies of `weights` in host memory

    @property
    def is_trained(self) -> bool:
        """Whether any weight of the block is trained."""
        return any(weight.requires_grad for weight in self.weights)


@dataclass(eq=False)
class Slot:
    """Device memory for the weights of one streamed block."""

    # uint8, one for each weight; empty while the network is parked
    memory: list[Tensor] = field(default_factory=list)
    block: StreamedBlock | None = None  # block whose weights are in the slot or being copied to it
    copy_done: Any = None  # event after which the weights are in the slot
    is_active: bool = False  # whether the parameters point to the slot rather than to host memory
    is_changed: bool = False  # whether the copies in host memory are out of date

    def views(self, block: StreamedBlock) -> list[Tensor]:
        """Return the slot's memory as tensors of the shapes and dtypes of a block's weights."""
        places = zip(self.memory, block.host, strict=False)  # another block may have more
        return [memory[: host.nbytes].view(host.dtype).view(host.shape) for memory, host in places]


@dataclass(frozen=True, eq=False)
class SlotPool:
    """The streamed blocks of one list of blocks, and the device memory (slots) that they share."""

    blocks: Mapping[int, StreamedBlock]  # by position
    slots: Sequence[Slot]

    @property
    def slot_sizes(self) -> list[int]:
        """Return the bytes that a slot reserves for each weight of a block: the largest over all blocks."""
        count = max(len(block.host) for block in self.blocks.values())
        return [
            max(block.host[i].nbytes for block in self.blocks.values() if i < len(block.host))
            for i in range(count)
        ]

    def find_slot(self, block: StreamedBlock) -> Slot | None:
        """Return the slot that contains a block; None if the block is only in host memory."""
        return next((slot for slot in self.slots if slot.block is block), None)

    def first_blocks(self, route: Iterable[int]) -> list[StreamedBlock]:
        """Return this pool's next blocks along a route of block positions, as many as there are slots."""
        blocks: list[StreamedBlock] = []
        for position in route:
            block = self.blocks.get(position)
            if block is not None and block not in blocks:
                blocks.append(block)
                if len(blocks) == len(self.slots):
                    break
        return blocks


@dataclass(frozen=True)
class SavedWeight:
    """Placeholder that autograd stores instead of a streamed weight or a view of one."""

    block: StreamedBlock
    index: int  # index of the weight in its block
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class BlockSwap:
    """Copies a network's weights from host memory to the device before each block's forward and backward."""

    def __init__(
        self,
        pools: Sequence[SlotPool],
        order: Sequence[int],
        in_host_memory: Set[Parameter],
        transfer: Transfer,
    ) -> None:
        """Prepare to stream the blocks of a network.

        Args:
            pools: Each has the streamed blocks of one list, and the device memory (slots) that they share.
            order: Positions of all blocks in the order in which they run.
            in_host_memory: All parameters in host memory, including those outside blocks.
            transfer: Copies between host and device.
        """
        self.pools = pools
        self.in_host_memory = in_host_memory
        self._pool_by_position = {position: pool for pool in pools for position in pool.blocks}
        self._order = order
        self._transfer = transfer
        self._run_index = {position: run_index for run_index, position in enumerate(order)}
        # slot and index of the weight in it, by the address of the weight's device memory
        self._owners: dict[int, tuple[Slot, int]] = {}
        self._expects_backward = False  # whether a backward pass follows, in which the order is reversed
        self._skipped_positions: frozenset[int] = frozenset()  # positions that this pass skips
        # position of the running block, and whether it is in the backward pass
        self._current: tuple[int, bool] | None = None

    def fetch(self, position: int, skipped: Set[int]) -> None:
        """Copy the weights of a block to the device before a pass.

        Nothing is copied if the weights are there already, because the previous pass prefetched them.

        Args:
            position: Position of the block in the order of blocks.
            skipped: Positions of blocks that the pass skips.
        """
        pool = self._pool_by_position.get(position)
        if pool is None:  # the block stays on the device
            return
        block = pool.blocks[position]
        if pool.find_slot(block) is None:
            # this block is copied even if the pass skips it
            self._skipped_positions = frozenset(skipped) - {position}
            self._prefetch_from(position, backward=False)
        self._activate(pool, block, backward=False)

    def run_all(self, inner: Runner, dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
        """Run the blocks with the previous runner; `runtime.run_blocks` calls this."""
        # with gradients a backward pass follows
        self._expects_backward = torch.is_grad_enabled()
        self._skipped_positions = frozenset(overrides.skip_blocks)
        self._current = None
        first = self._order[0]
        self._prefetch_from(next(self._route(first, False), first), False)
        inner(dit, hidden, overrides)

    def enter(self, position: int, backward: bool) -> None:
        """Enter the block at `position`: wait for its weights, and start copying the next blocks' weights."""
        if self._current == (position, backward):
            return
        self._prefetch_from(position, backward)
        pool = self._pool_by_position.get(position)
        if pool is not None:
            self._activate(pool, pool.blocks[position], backward)
        self._current = (position, backward)

    def run(self, position: int, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """Run the forward of the block at `position` with its weights on the device, also in backward."""
        self.enter(position, backward=False)
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        pool = self._pool_by_position.get(position)
        if pool is None:  # the block stays on the device
            output = forward(*inputs, **named)
        else:
            was_caching = torch.is_autocast_cache_enabled()
            # autocast would keep a copy of every trained weight on the device until the end of the pass
            torch.set_autocast_cache_enabled(was_caching and not pool.blocks[position].is_trained)
            try:
                with saved_tensors_hooks(self._pack, self._unpack):
                    output = forward(*inputs, **named)
            finally:
                torch.set_autocast_cache_enabled(was_caching)
        # the gradient of an output arrives right before the block's own backward pass
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.enter(position, backward=True))
        return output

    def write_back(self) -> None:
        """Copy trained weights back to host memory, and make all parameters refer to their host memory."""
        for pool in self.pools:
            for slot in pool.slots:
                self._evict(slot, self._transfer.record_event() if slot.is_changed else None)
        self._transfer.finish()
        self._current = None

    def free_slots(self) -> None:
        """Copy trained weights back to host memory, and free the slots' device memory until the next pass."""
        self.write_back()
        self._owners.clear()
        for pool in self.pools:
            for slot in pool.slots:
                slot.memory = []

    def _route(self, position: int, backward: bool) -> Iterator[int]:
        """Yield the block positions from this one to the end of the pass, then those predicted next."""
        run_index = self._run_index[position]
        entered = [index for index in self._order if index not in self._skipped_positions]
        if backward:
            yield from (index for index in reversed(entered) if self._run_index[index] <= run_index)
            yield from self._order
        else:
            yield from (index for index in entered if self._run_index[index] >= run_index)
            yield from reversed(entered) if self._expects_backward else self._order

    def _prefetch_from(self, position: int, backward: bool) -> None:
        for pool in self.pools:
            needed = pool.first_blocks(self._route(position, backward))
            missing = [block for block in needed if pool.find_slot(block) is None]
            free = [slot for slot in pool.slots if slot.block not in needed]
            for block, slot in zip(missing, free, strict=False):
                # Start copying a block's weights into a slot. After an exception the slot is empty.
                if not slot.memory:
                    with torch.inference_mode(
                        False
                    ):  # a slot made for a sample also serves the next training step
                        slot.memory = [self._transfer.allocate(size) for size in pool.slot_sizes]
                    for index, part in enumerate(slot.memory):
                        self._owners[part.untyped_storage().data_ptr()] = (slot, index)
                after = (
                    self._transfer.record_event()
                )  # deterministic runs fill new memory: the copy comes after that
                self._evict(slot, after)
                with torch.no_grad():
                    slot.copy_done = self._transfer.copy(
                        list(zip(slot.views(block), block.host, strict=True)), after
                    )
                slot.block = block

    def _evict(self, slot: Slot, after: Any) -> None:
        """Copy a slot's changed weights back to host memory, and free the slot for another block."""
        block = slot.block
        if block is None:
            return
        if slot.is_changed:
            trained = [
                (host, view)
                for weight, host, view in zip(block.weights, block.host, slot.views(block), strict=True)
                if weight.requires_grad
            ]
            with torch.no_grad():
                self._transfer.copy(trained, after)
        slot.is_active = slot.is_changed = False
        for weight, host in zip(block.weights, block.host, strict=True):
            weight.data = host
        slot.block = None

    def _activate(self, pool: SlotPool, block: StreamedBlock, backward: bool) -> None:
        """Wait until a block's weights are in its slot, and point its parameters at the slot's memory."""
        slot = pool.find_slot(block)
        assert slot is not None
        if not slot.is_active:
            self._transfer.wait(slot.copy_done)
            for weight, view in zip(block.weights, slot.views(block), strict=True):
                weight.data = view
            slot.is_active = True
        if backward and block.is_trained:
            slot.is_changed = True  # they are stepped as soon as their gradients are complete

    def _pack(self, tensor: Tensor) -> Tensor | SavedWeight:
        """Return what autograd stores: a `SavedWeight` for a weight in a slot, else the tensor itself."""
        slot, index = self._owners.get(tensor.untyped_storage().data_ptr(), (None, 0))
        if slot is None:
            return tensor.detach()
        assert slot.block is not None
        return SavedWeight(
            block=slot.block,
            index=index,
            dtype=tensor.dtype,
            size=tuple(tensor.shape),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()),
        )

    def _unpack(self, packed: Tensor | SavedWeight) -> Tensor:
        """Return a saved tensor; a swapped block is on the device again before its backward pass."""
        if isinstance(packed, Tensor):
            return packed
        self.enter(packed.block.position, backward=True)
        slot = self._pool_by_position[packed.block.position].find_slot(packed.block)
        assert slot is not None
        memory = slot.memory[packed.index]
        itemsize = packed.dtype.itemsize
        weights = memory[: len(memory) // itemsize * itemsize].view(packed.dtype)
        return weights.as_strided(packed.size, packed.stride, packed.offset)


def swap_blocks(
    dit: nn.Module, host: HostWeights | None, device: torch.device, transfer: Transfer | None = None
) -> None:
    """Make a network stream its swapped weights from host memory when it runs.

    Call it last: it wraps the forward of each block and the network's runner.

    Args:
        dit: The transformer.
        host: Host memory that the network was loaded with; None changes nothing.
        device: Device of the run.
        transfer: Copies between host and device; by default the kind that suits the device.

    Raises:
        OptionError: If the network has too few blocks.
    """
    if host is None or not host.plan:
        return
    host_weights = host.adopt(dit)  # swapped weights by name, in host memory
    for path in host.plan.input_layer_names(dit):
        for name, layer in big_layers(dit, path):
            offload_layer(layer, host_weights[f"{name}.weight"], device)
    lists = host.plan.lists(dit)
    pools = _make_slot_pools(dit, lists, host_weights)
    in_host_memory = {dit.get_parameter(name) for name in host_weights}
    # positions of the blocks in the order in which they run, counted over all lists
    order = host.plan.spec.execution_order([plan.num_blocks for plan in lists])
    swap = BlockSwap(pools, order, in_host_memory, transfer or transfer_to(device))
    blocks = chain.from_iterable(dit.get_submodule(plan.name).children() for plan in lists)
    for position, block in enumerate(blocks):
        block.forward = functools.partial(swap.run, position, block.forward)
    set_runner(dit, functools.partial(swap.run_all, get_runner(dit)))
    setattr(dit, _NAME, swap)
    _report(lists, swap, host_weights, device)


def _make_slot_pools(
    dit: nn.Module, lists: Sequence[ListPlan], host_weights: Mapping[str, Tensor]
) -> list[SlotPool]:
    """Return the slots, and the streamed blocks that share them, for each list that has streamed blocks."""
    pools: list[SlotPool] = []
    start = 0  # position of the list's first block among all blocks
    for plan in lists:
        blocks = {}
        for index in plan.streamed:
            # small tensors, such as biases and norms, stay on the device
            weight_names = [f"{name}.weight" for name, _ in big_layers(dit, f"{plan.name}.{index}")]
            host_names = [name for name in weight_names if name in host_weights]
            weights = [dit.get_parameter(name) for name in host_names]
            position = start + index
            blocks[position] = StreamedBlock(position, weights, [host_weights[name] for name in host_names])
        if blocks:
            pools.append(SlotPool(blocks, [Slot() for _ in range(plan.slots)]))
        start += plan.num_blocks
    return pools


def _report(
    lists: Sequence[ListPlan], swap: BlockSwap, host_weights: Mapping[str, Tensor], device: torch.device
) -> None:
    """Log how many blocks are in host memory, and the bytes that swapping takes there and on the device."""
    total = sum(tensor.nbytes for tensor in host_weights.values()) / 1e9
    if swap.pools:  # some blocks are streamed through slots on the device
        streamed = sum(len(blocks.streamed) for blocks in lists)
        count = sum(blocks.num_blocks for blocks in lists)
        slots = sum(sum(pool.slot_sizes) * len(pool.slots) for pool in swap.pools) / 1e9
        logger.info(
            "%d of %d blocks come from host memory each time (%.2f GB there), through %.2f GB on the device",
            streamed,
            count,
            total,
            slots,
        )
    if device.type in {"cpu", "mps"}:
        logger.warning(
            "--blocks_to_swap and --img_in_txt_in_offloading save nothing on %s; they only cost time.",
            device.type,
        )


def get_swap(network: nn.Module) -> BlockSwap | None:
    """Return the block swap of a network; None if its blocks are not swapped."""
    swap = getattr(network, _NAME, None)
    return swap if isinstance(swap, BlockSwap) else None


def write_back_all(networks: Iterable[nn.Module]) -> None:
    """Copy trained weights of swapped blocks back to host memory, so that they can be saved or restored."""
    for network in networks:
        swap = get_swap(network)
        if swap is not None:
            swap.write_back()


def move_network(network: nn.Module, device: torch.device) -> None:
    """Run `network.to(device)`, but leave swapped weights in host memory and free their slots."""
    swap = get_swap(network)
    if swap is None:
        network.to(device)
        return
    swap.free_slots()
    staying = [
        (module, name, parameter)
        for module in network.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in swap.in_host_memory
    ]
    try:
        for module, name, _ in staying:
            module._parameters[name] = None  # so that torch skips it
        network.to(device)
    finally:
        for module, name, parameter in staying:
            module._parameters[name] = parameter

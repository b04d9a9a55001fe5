"""Keep blocks of a transformer in host memory and copy each to the device before it runs.

    host = host_weights(SwapPlan(family.dit, blocks), device)  # None if nothing is swapped
    dit = family.load_dit(Placement(device, host=host))  # loads swapped weights from disk to host memory
    ...  # LoRA, compilation, checkpointing
    swap_blocks(dit, host, device)

The streamed blocks of a list share a few slots of device memory. When a block is entered, the blocks that run
next are copied into the slots that are free by then. The route goes through the forward pass to its last
block, then back through the backward pass or on to the next pass. The content of the slots depends only on
the block that is entered, so a pass may end anywhere, also with an exception. A parameter stays the same
object; only its `.data` switches between the host's copy and a slot. Frozen weights are never copied back.

Without checkpointing, autograd keeps weights for the backward pass. A saved view of a slot is replaced by
the weight's name, and the weight is fetched again. Trained weights are stepped during the backward pass
(`--fused_backward_pass`), while their block is on the device, and copied back before their slot is reused.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
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
from runtime.run_blocks import Hidden, Runner, runner_of, set_runner

logger = logging.getLogger(__name__)

_NAME = "_block_swap"  # attribute of a network that holds its block swap


@dataclass(frozen=True, eq=False)
class Unit:
    """A streamed block: its weights are in host memory, and on the device only when it runs."""

    position: int  # among all blocks, list by list
    weights: Sequence[Parameter]
    host: Sequence[Tensor]  # copies of `weights` in host memory

    @property
    def learns(self) -> bool:
        """Whether any weight of the block is trained."""
        return any(weight.requires_grad for weight in self.weights)


@dataclass(eq=False)
class Slot:
    """Device memory for the weights of one streamed block."""

    # uint8, one for each weight; none while the network is parked
    memory: list[Tensor] = field(default_factory=list)
    unit: Unit | None = None  # block whose weights are in the slot or being copied to it
    arrival: Any = None  # moment at which the weights have arrived
    is_entered: bool = False  # whether the parameters point to the slot rather than to host memory
    is_changed: bool = False  # whether the copies in host memory are out of date

    def views(self, unit: Unit) -> list[Tensor]:
        """Return the slot's memory as tensors of the shapes and dtypes of a block's weights."""
        places = zip(self.memory, unit.host, strict=False)  # another block may have more
        return [memory[: host.nbytes].view(host.dtype).view(host.shape) for memory, host in places]


@dataclass(frozen=True, eq=False)
class Ring:
    """The streamed blocks of one list of blocks, and the device memory (slots) that they share."""

    units: Mapping[int, Unit]  # by position
    slots: Sequence[Slot]

    @property
    def sizes(self) -> list[int]:
        """Return the bytes that a slot reserves for each weight of a block: the largest over all blocks."""
        count = max(len(unit.host) for unit in self.units.values())
        return [
            max(unit.host[i].nbytes for unit in self.units.values() if i < len(unit.host))
            for i in range(count)
        ]

    def slot_of(self, unit: Unit) -> Slot | None:
        """Return the slot that holds a block; None if the block is only in host memory."""
        return next((slot for slot in self.slots if slot.unit is unit), None)

    def next(self, route: Iterable[int]) -> list[Unit]:
        """Return this ring's first blocks along a route of positions, as many as there are slots."""
        units: list[Unit] = []
        for position in route:
            unit = self.units.get(position)
            if unit is not None and unit not in units:
                units.append(unit)
                if len(units) == len(self.slots):
                    break
        return units


@dataclass(frozen=True)
class Kept:
    """Placeholder that autograd stores instead of a streamed weight or a view of one."""

    unit: Unit
    index: int  # index of the weight in its block
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class BlockSwap:
    """Copies a network's weights from host memory to the device before each block runs, forward and back."""

    def __init__(
        self, rings: Sequence[Ring], order: Sequence[int], in_host_memory: Set[Parameter], transfer: Transfer
    ) -> None:
        """Prepare to stream the blocks of a network.

        Args:
            rings: Each has the streamed blocks of one list, and the device memory (slots) that they share.
            order: Positions of all blocks in the order in which they run.
            in_host_memory: All parameters in host memory, also those outside blocks.
            transfer: Copies between host and device.
        """
        self.rings = rings
        self.in_host_memory = in_host_memory
        self._ring_of = {position: ring for ring in rings for position in ring.units}
        self._order = order
        self._transfer = transfer
        self._turn_of = {position: turn for turn, position in enumerate(order)}  # inverse of the order
        # slot and index of the weight in it, by the address of the weight's device memory
        self._owners: dict[int, tuple[Slot, int]] = {}
        self._turns = False  # whether a backward pass follows, in which the order is reversed
        self._skipped: frozenset[int] = frozenset()  # positions that this pass skips
        # position of the block at work, and whether it is in the backward pass
        self._at: tuple[int, bool] | None = None

    def bring(self, position: int, skipped: Set[int]) -> None:
        """Bring the weights of a block to the device before a pass.

        Nothing is copied if the weights are there already, because the previous pass prefetched them.

        Args:
            position: Position of the block in the order of blocks.
            skipped: Positions of blocks that the pass skips.
        """
        # the blocks of a list that are streamed through shared slots; None: this block stays on the device
        ring = self._ring_of.get(position)
        if ring is None:
            return
        unit = ring.units[position]
        if ring.slot_of(unit) is None:
            self._skipped = frozenset(skipped) - {position}
            self._prepare(position, backward=False)
        self._resolve_in(ring, unit, backward=False)

    def run_all(self, inner: Runner, dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
        """Run the blocks with the previous runner; `runtime.run_blocks` calls this."""
        # with gradients a backward pass follows
        self._turns = torch.is_grad_enabled()
        self._skipped = frozenset(overrides.skip_blocks)
        self._at = None
        first = self._order[0]
        self._prepare(next(self._route(first, False), first), False)
        inner(dit, hidden, overrides)

    def enter(self, position: int, backward: bool) -> None:
        """Enter the block at `position`: wait for its weights, and start copying the next blocks' weights."""
        if self._at == (position, backward):
            return
        self._prepare(position, backward)
        ring = self._ring_of.get(position)
        if ring is not None:
            self._resolve_in(ring, ring.units[position], backward)
        self._at = (position, backward)

    def run(self, position: int, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """Run the forward of the block at `position` with its weights on the device, also in backward."""
        self.enter(position, backward=False)
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        # a ring is a list of blocks whose weights are streamed through device memory (slots) that they share;
        # None: this block is not streamed, as its weights stay on the device
        ring = self._ring_of.get(position)
        if ring is None:
            output = forward(*inputs, **named)
        else:
            caches = torch.is_autocast_cache_enabled()
            # autocast would keep a copy of every learning weight on the device until the end of the pass
            torch.set_autocast_cache_enabled(caches and not ring.units[position].learns)
            try:
                with saved_tensors_hooks(self._pack, self._unpack):
                    output = forward(*inputs, **named)
            finally:
                torch.set_autocast_cache_enabled(caches)
        # the gradient of an output arrives right before the block's own backward pass
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.enter(position, backward=True))
        return output

    def settle(self) -> None:
        """Copy trained weights back to host memory, and make all parameters refer to their host memory."""
        for ring in self.rings:
            for slot in ring.slots:
                self._empty(slot, self._transfer.mark() if slot.is_changed else None)
        self._transfer.finish()
        self._at = None

    def park(self) -> None:
        """Copy trained weights back to host memory, and free the slots' device memory until the next pass."""
        self.settle()
        self._owners.clear()
        for ring in self.rings:
            for slot in ring.slots:
                slot.memory = []

    def _route(self, position: int, backward: bool) -> Iterator[int]:
        """Yield the positions to enter next, from this one on; positions of the next pass are predicted."""
        turn = self._turn_of[position]
        entered = [index for index in self._order if index not in self._skipped]
        if backward:
            yield from (index for index in reversed(entered) if self._turn_of[index] <= turn)
            yield from self._order
        else:
            yield from (index for index in entered if self._turn_of[index] >= turn)
            yield from reversed(entered) if self._turns else self._order

    def _prepare(self, position: int, backward: bool) -> None:
        for ring in self.rings:
            needed = ring.next(self._route(position, backward))
            missing = [unit for unit in needed if ring.slot_of(unit) is None]
            free = [slot for slot in ring.slots if slot.unit not in needed]
            for unit, slot in zip(missing, free, strict=False):
                self._send(ring, unit, slot)

    def _send(self, ring: Ring, unit: Unit, slot: Slot) -> None:
        """Start copying a unit's weights into a slot. After an exception the slot is empty."""
        if not slot.memory:
            with torch.inference_mode(False):  # a slot made for a sample also serves the next training step
                slot.memory = [self._transfer.memory(size) for size in ring.sizes]
            for index, part in enumerate(slot.memory):
                self._owners[part.untyped_storage().data_ptr()] = (slot, index)
        after = self._transfer.mark()  # deterministic runs fill new memory: the copy comes after that
        self._empty(slot, after)
        with torch.no_grad():
            slot.arrival = self._transfer.copy(list(zip(slot.views(unit), unit.host, strict=True)), after)
        slot.unit = unit

    def _empty(self, slot: Slot, after: Any) -> None:
        """Copy a slot's changed weights back to host memory, and free the slot for another block.

        Args:
            slot: The slot.
            after: Moment after which changed weights may be copied back.
        """
        unit = slot.unit
        if unit is None:
            return
        if slot.is_changed:
            trained = [
                (host, view)
                for weight, host, view in zip(unit.weights, unit.host, slot.views(unit), strict=True)
                if weight.requires_grad
            ]
            with torch.no_grad():
                self._transfer.copy(trained, after)
        slot.is_entered = slot.is_changed = False
        for weight, host in zip(unit.weights, unit.host, strict=True):
            weight.data = host
        slot.unit = None

    def _resolve_in(self, ring: Ring, unit: Unit, backward: bool) -> None:
        """Wait until a block's weights are in its slot, and point its parameters at the slot's memory."""
        slot = ring.slot_of(unit)
        assert slot is not None
        if not slot.is_entered:
            self._transfer.wait(slot.arrival)
            for weight, view in zip(unit.weights, slot.views(unit), strict=True):
                weight.data = view
            slot.is_entered = True
        if backward and unit.learns:
            slot.is_changed = True  # they are stepped as soon as their gradients are complete

    def _pack(self, tensor: Tensor) -> Tensor | Kept:
        """Return what autograd stores: a `Kept` for a weight in a slot, otherwise the tensor itself."""
        slot, index = self._owners.get(tensor.untyped_storage().data_ptr(), (None, 0))
        if slot is None:
            return tensor.detach()
        assert slot.unit is not None
        return Kept(
            unit=slot.unit,
            index=index,
            dtype=tensor.dtype,
            size=tuple(tensor.shape),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()),
        )

    def _unpack(self, packed: Tensor | Kept) -> Tensor:
        """Return a saved tensor; a swapped block is on the device again before its backward pass."""
        if isinstance(packed, Tensor):
            return packed
        self.enter(packed.unit.position, backward=True)
        slot = self._ring_of[packed.unit.position].slot_of(packed.unit)
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
    # one ring for each list of blocks: its streamed blocks, and the slots that they share on the device
    rings = _make_rings(dit, lists, host_weights)
    in_host_memory = {dit.get_parameter(name) for name in host_weights}
    # positions of the blocks in the order in which they run, counted over all lists
    order = host.plan.spec.order([plan.num_blocks for plan in lists])
    swap = BlockSwap(rings, order, in_host_memory, transfer or transfer_to(device))
    blocks = [block for plan in lists for block in dit.get_submodule(plan.name).children()]
    for position, block in enumerate(blocks):
        block.forward = functools.partial(swap.run, position, block.forward)
    set_runner(dit, functools.partial(swap.run_all, runner_of(dit)))
    setattr(dit, _NAME, swap)
    _report(lists, swap, host_weights, device)


def _make_rings(dit: nn.Module, lists: Sequence[ListPlan], host_weights: Mapping[str, Tensor]) -> list[Ring]:
    """Return a ring (streamed blocks and the slots that they share) for each list that has streamed blocks.

    Args:
        dit: The transformer.
        lists: Plan of each list of blocks.
        host_weights: Weights in host memory, by name.
    """
    rings: list[Ring] = []
    start = 0  # position of the list's first block among all blocks
    for plan in lists:
        units = {}
        for index in plan.streamed:
            weight_names = [f"{name}.weight" for name, _ in big_layers(dit, f"{plan.name}.{index}")]
            names = [name for name in weight_names if name in host_weights]
            weights = [dit.get_parameter(name) for name in names]
            position = start + index
            units[position] = Unit(position, weights, [host_weights[name] for name in names])
        if units:
            rings.append(Ring(units, [Slot() for _ in range(plan.slots)]))
        start += plan.num_blocks
    return rings


def _report(
    lists: Sequence[ListPlan], swap: BlockSwap, host_weights: Mapping[str, Tensor], device: torch.device
) -> None:
    """Log how many blocks are in host memory, and the bytes that swapping takes there and on the device."""
    total = sum(tensor.nbytes for tensor in host_weights.values()) / 1e9
    if swap.rings:  # some blocks are streamed through slots on the device
        streamed = sum(len(blocks.streamed) for blocks in lists)
        count = sum(blocks.num_blocks for blocks in lists)
        slots = sum(sum(ring.sizes) * len(ring.slots) for ring in swap.rings) / 1e9
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


def swap_of(network: nn.Module) -> BlockSwap | None:
    """Return the block swap of a network; None if its blocks are not swapped."""
    swap = getattr(network, _NAME, None)
    return swap if isinstance(swap, BlockSwap) else None


def resolve_all(networks: Iterable[nn.Module]) -> None:
    """Make all parameters hold their newest values, so that they can be saved or restored."""
    for network in networks:
        swap = swap_of(network)
        if swap is not None:
            swap.settle()


def move_network(network: nn.Module, device: torch.device) -> None:
    """Run `network.to(device)`, but leave swapped weights in host memory and free their slots."""
    swap = swap_of(network)
    if swap is None:
        network.to(device)
        return
    swap.park()
    staying = [
        (module, name, parameter)
        for module in network.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in swap.in_host_memory
    ]
    try:
        for module, name, _ in staying:
            module._parameters[name] = None  # so that torch passes over it
        network.to(device)
    finally:
        for module, name, parameter in staying:
            module._parameters[name] = parameter

"""Split the blocks of a transformer over processes: each keeps a part and gathers a block to run it.

    shares = ShardedBlocks(device, option)  # in every process, after they have joined
    dit = family.load_dit(Placement(device, block_sharder=shares))  # keeps only a part of each filled block
    ...  # LoRA, compilation, checkpointing
    shares.finish(dit)

torch's FSDP2 does the work: each process keeps an equal number of rows of each weight. A block is gathered
while the previous one computes, and freed after it has run, so that two whole blocks are in memory at a time
(one on a CPU, which gathers and computes alternately). Layers outside the blocks are not split. Frozen
weights have no gradients to send; the gradients of trained weights are summed in each backward pass, and
each process gets those of its rows.

All processes have to run the same passes in the same order, each with gradients or each without, as a block
is gathered from all of them.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from modules.devices import keep_heap_small
from modules.integers import ceil_div
from protocols.steps import Overrides
from runtime.offload.joining import agree
from runtime.run_blocks import Hidden, Runner, get_runner, get_spec, set_runner

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

_NAME = "_sharding"  # attribute of a network that contains its `ShardedBlocks`
TOKEN_PART = "token_part"  # attribute of a layer: the part of the tokens that it gets, if not all
TOKEN_GROUP = "_token_group"  # attribute of a network: the processes that share its tokens


class ShardedBlocks:
    """The parts of a network's blocks that this process keeps while other processes keep the others."""

    def __init__(self, device: torch.device, option_name: str) -> None:
        """Prepare to split blocks over all processes that have joined.

        Args:
            device: Device of this process.
            option_name: Option that requested the split, for messages.
        """
        self.option_name = option_name
        from torch.distributed.device_mesh import init_device_mesh  # not needed by a single process

        self._mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        if device.type == "cpu":
            keep_heap_small()  # otherwise freed blocks fragment the heap and save no memory

    def watch(self, network: nn.Module) -> Callable[[str], None]:
        """Return a function to call with the name of each loaded tensor, which splits complete blocks."""
        blocks = _get_blocks_by_name(network)
        block_path_by_name = {
            f"{path}.{name}": path for path, block in blocks.items() for name in block.state_dict()
        }
        num_missing = Counter(block_path_by_name.values())

        def count_loaded(name: str) -> None:
            path = block_path_by_name.get(name)
            if path is not None:
                num_missing[path] -= 1
                if not num_missing[path]:
                    self._split(blocks[path])

        return count_loaded

    def split(self, network: nn.Module) -> None:
        """Split the blocks that `watch` has not split while the network was loaded."""
        from torch.distributed.fsdp import FSDPModule

        for block in _get_blocks_by_name(network).values():
            if not isinstance(block, FSDPModule):
                self._split(block)

    def finish(self, network: nn.Module) -> None:
        """Split the blocks over the processes; each block is gathered while it runs. Call it last.

        It takes the place of `swap_blocks`.
        """
        from torch.distributed.fsdp import fully_shard

        self.split(network)
        blocks = list(_get_blocks_by_name(network).values())
        root = _Root(blocks)  # FSDP2 needs one module around all blocks
        fully_shard(root, mesh=self._mesh)
        runner = get_runner(network)
        if any(parameter.requires_grad for parameter in root.parameters()):
            runner = functools.partial(_run_without_autocast_cache, runner)
            # sums of gradients over processes, not averages: the loss is already divided
            for block in blocks:
                block.register_forward_pre_hook(_fill_gradients, with_kwargs=True)
                block.set_gradient_divide_factor(1.0)  # type: ignore[operator]
                block.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        if self._mesh.device_type == "cpu":
            # each block is gathered right before it runs: prefetching would save no time there
            for block in blocks:
                block.register_forward_pre_hook(_gather_alone, prepend=True)
                block.set_modules_to_backward_prefetch([block])  # type: ignore[operator]
        else:
            for block, next_block in pairwise(blocks):
                block.set_modules_to_forward_prefetch([next_block])  # type: ignore[operator]
        network.forward = functools.partial(_run_inside, root, network.forward)
        set_runner(network, functools.partial(_run_with_input_gradient, runner))
        setattr(network, _NAME, self)
        total = sum(parameter.nbytes for parameter in root.parameters())
        logger.info(
            "%d blocks of %.2f GB are split over %d processes",
            len(blocks),
            total / 1e9,
            self._mesh.size(),
        )

    def _split(self, block: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        # vectors are not split: they are small, and tracking each costs more than splitting saves. One is
        # split with the weights, because gloo gathers 8-bit weights only together with another dtype
        vectors = [parameter for parameter in block.parameters() if parameter.ndim < 2]
        fully_shard(block, mesh=self._mesh, reshard_after_forward=True, ignored_params={*vectors[1:]})


class _Root(nn.Module):
    """Module around all blocks, which FSDP2 requires, that runs a function.

    FSDP2 moves the inputs of this module to the device, but some inputs of a network belong on the host.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def _gather_alone(block: nn.Module, _: object) -> None:
    """Gather a sharded block's weights right before it runs, rather than during the previous block."""
    block.unshard(async_op=True)  # type: ignore[operator]


class _FillGradients(torch.autograd.Function):
    """Pass an input of a block through; in the backward pass, give its unused weights gradients of 0.

    A clip without audio does not use the audio weights. FSDP2 exchanges only existing gradients, so processes
    whose clips differ in this would exchange tensors of different sizes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        for parameter in ctx.block.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return gradients[0], None


def _fill_gradients(
    block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pass the first input that requires gradients through `_FillGradients`; a hook after FSDP2's gather."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.requires_grad:
            return (*args[:index], _FillGradients.apply(value, block), *args[index + 1 :]), named
    return None


def _run_inside(root: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return root(functools.partial(forward, *args, **named))


def _get_blocks_by_name(network: nn.Module) -> dict[str, nn.Module]:
    lists = get_spec(network).blocks(network).items()
    return {f"{name}.{index}": block for name, blocks in lists for index, block in enumerate(blocks)}


def _run_with_input_gradient(inner: Runner, dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
    """Run the blocks with the previous runner; route gradients back through every block."""
    # Otherwise, if dropout left a block without gradients in one process only, the other processes would wait
    # for it to gather.
    if torch.is_grad_enabled() and not hidden.x.requires_grad:
        hidden.x = hidden.x.detach().requires_grad_()
    inner(dit, hidden, overrides)


def _run_without_autocast_cache(inner: Runner, dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
    """Run the blocks without autocast's cache, which would collect copies of all trained weights."""
    is_cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        inner(dit, hidden, overrides)
    finally:
        torch.set_autocast_cache_enabled(is_cached)


def is_sharded(network: nn.Module) -> bool:
    """Return whether the blocks of a network are split over processes."""
    return hasattr(network, _NAME)


def agree_among(network: nn.Module, value: T) -> T:
    """Return the value of the first of the processes that run the network together; all must call this."""
    if is_sharded(network):
        return agree(value)
    group = network.__dict__.get(TOKEN_GROUP)
    return value if group is None else agree(value, group)


def gather_block(block: nn.Module) -> None:
    """Gather a whole block in this process until its next pass ends; all processes must call it."""
    block.unshard()  # type: ignore[operator]


def gather_weight(weight: Tensor) -> Tensor:
    """Return a full weight, in any dtype. A split weight is gathered, so all processes must call this."""
    return gather_rows(local_rows(weight), weight) if is_sharded_weight(weight) else weight


def local_rows(weight: Any) -> Tensor:
    """Return the rows of a split weight that this process keeps, without gradient."""
    rows: Tensor = weight.to_local().detach()
    return rows


def gather_parts(gathered: Tensor, part: Tensor, group: "distributed.ProcessGroup | None" = None) -> None:
    """Fill `gathered` with the parts of all processes, or of the processes of a group, in their order."""
    # newer versions of torch deprecate the old name
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(gathered, part, group)


def gather_rows(part: Tensor, weight: Tensor) -> Tensor:
    """Gather a tensor that is divided by rows like a split weight.

    Args:
        part: Rows of this process.
        weight: The split weight.
    """
    num_processes = distributed.get_world_size()
    rows_per_process = ceil_div(weight.shape[0], num_processes)  # the last processes may have fewer
    row_bytes = math.prod(weight.shape[1:]) * part.dtype.itemsize
    # a gather supports only equal parts and few dtypes, so rows are sent as padded bytes
    padded = torch.zeros(rows_per_process * row_bytes, dtype=torch.uint8, device=part.device)
    padded[: part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
    gathered = padded.new_empty(num_processes * padded.numel())
    gather_parts(gathered, padded)
    return gathered[: weight.shape[0] * row_bytes].view(part.dtype).view(weight.shape)


def is_sharded_weight(weight: Tensor) -> bool:
    """Return whether a weight is a DTensor; this process then keeps only some of its rows."""
    return hasattr(weight, "to_local")


def slice_local_rows(weight: Any, full: Tensor) -> Tensor:
    """Return a view of the rows of `full` that this process keeps of a split weight."""
    mesh = weight.device_mesh
    count = local_rows(weight).shape[0]
    first = mesh.get_local_rank() * ceil_div(weight.shape[0], mesh.size())
    return full.narrow(0, min(first, weight.shape[0] - count), count)


def as_sharded(weight: Any, part: Tensor) -> Tensor:
    """Return a tensor that is split like a weight, made from this process's rows of it."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    mesh = weight.device_mesh
    if mesh.device_type != part.device.type:  # the mesh only states which rows are here; nothing is sent
        mesh = DeviceMesh(part.device.type, mesh.mesh)
    shape = {"shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(part, mesh, weight.placements, run_check=False, **shape)


def trained_rows(weight: Any) -> nn.Parameter:
    """Return this process's rows of a split weight as a plain parameter in the same memory.

    The parameter receives the gradients, so that an optimizer can step it like any other.
    """
    part = nn.Parameter(local_rows(weight))

    def take(weight: Any) -> None:
        gradient = weight.grad.to_local()
        weight.grad = None
        part.grad = gradient if part.grad is None else part.grad.add_(gradient)

    weight.register_post_accumulate_grad_hook(take)
    return part


def set_weight(weight: Tensor, full: Tensor) -> None:
    """Set a weight in place; for a split weight, set this process's part."""
    if is_sharded_weight(weight):
        weight, full = local_rows(weight), slice_local_rows(weight, full)
    weight.copy_(full)

"""Split the blocks of a frozen transformer over processes: each keeps a part and gathers a block to run it.

    shares = ShardedBlocks(device)  # in every process, after they have joined
    dit = family.load_dit(Placement(device, blocks=shares))  # of each block its part stays, once it is filled
    ...  # LoRA, compilation, checkpointing
    shares.finish(dit)

torch's FSDP2 does the work: each process keeps an equal number of rows of each weight, a block is gathered
while the one before it computes, and what was gathered is freed after the block, so that two whole blocks
are there at a time; one on a CPU, which gathers and computes by turns. What is outside the blocks stays
whole. Frozen weights have no gradients to send.

All processes have to run the same passes in the same order, each with gradients or each without, as a block
is gathered from all of them.
"""

import functools
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from modules.contract.steps import Tweaks
from modules.devices import choose_device
from modules.errors import OptionError
from modules.run_blocks import Hidden, Runner, runner_of, set_runner, spec_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

_NAME = "_sharding"  # under which a network carries its own
PATIENCE = timedelta(days=1)  # for a process that waits for a prompt, or writes files
SIGNS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|[Bb]roken pipe|[Ss]ocket")
LAUNCH = "accelerate launch --multi_gpu --num_processes N"


class ShardedBlocks:
    """The parts of a network's blocks that this process keeps: a `BlockPlace`."""

    def __init__(self, device: torch.device) -> None:
        """device: of this process. All processes that have joined take part."""
        from torch.distributed.device_mesh import init_device_mesh  # of no use to a single process

        self._mesh = init_device_mesh(device.type, (distributed.get_world_size(),))

    def watch(self, network: nn.Module) -> Callable[[str], None]:
        """Return a function that is told which tensor is filled; a block that is full is split."""
        blocks = _blocks_of(network)
        owners = {f"{path}.{name}": path for path, block in blocks.items() for name in block.state_dict()}
        waiting = Counter(owners.values())

        def note(name: str) -> None:
            path = owners.get(name)
            if path is not None:
                waiting[path] -= 1
                if not waiting[path]:
                    self._split(blocks[path])

        return note

    def finish(self, network: nn.Module) -> None:
        """Make the network gather its blocks. Call it last, in place of `swap_blocks`."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        blocks = list(_blocks_of(network).values())
        for block in blocks:
            if not isinstance(block, FSDPModule):  # one that was not loaded with this place
                self._split(block)
        root = _Root(blocks)
        fully_shard(root, mesh=self._mesh)
        is_host = self._mesh.device_type == "cpu"
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            if is_host:  # it gathers and computes by turns: blocks ahead would only take memory
                block.register_forward_pre_hook(_gather_alone, prepend=True)
                block.set_modules_to_backward_prefetch([block])  # type: ignore[operator]
            elif following is not None:
                block.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
        network.forward = functools.partial(_run_inside, root, network.forward)
        set_runner(network, functools.partial(_run_all, runner_of(network)))
        setattr(network, _NAME, self)
        total = sum(parameter.nbytes for parameter in root.parameters())
        logger.info(
            "%d blocks of %.2f GB are split over %d processes", len(blocks), total / 1e9, self._mesh.size()
        )

    def _split(self, block: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        # vectors stay whole: they are small, and each costs more to keep track of than its half. One goes
        # with the weights, as gloo gathers weights in 8 bits only beside another dtype
        vectors = [parameter for parameter in block.parameters() if parameter.ndim < 2]
        fully_shard(block, mesh=self._mesh, reshard_after_forward=True, ignored_params={*vectors[1:]})


class _Root(nn.Module):
    """Hold all blocks, as FSDP2 wants a module around them, and run a function.

    FSDP2 moves the inputs of this module to the device, but some inputs of a network belong on the host.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def _gather_alone(block: nn.Module, _: object) -> None:
    """Gather a block before it runs; FSDP2 would keep what it received for the block before until then."""
    block.unshard(async_op=True)  # type: ignore[operator]


def _run_inside(root: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return root(functools.partial(forward, *args, **named))


def _blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks by their paths, in the order in which they run."""
    lists = spec_of(network).blocks(network).items()
    return {f"{name}.{index}": block for name, blocks in lists for index, block in enumerate(blocks)}


def _run_all(inner: Runner, dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
    """Run the blocks by the runner that was set before; with gradients, they go back through every block.

    Else a block behind which nothing learns in one process, as dropout may have it, would be gathered by the
    others alone.
    """
    if torch.is_grad_enabled() and not hidden.x.requires_grad:
        hidden.x = hidden.x.detach().requires_grad_()
    inner(dit, hidden, tweaks)


def is_sharded(network: nn.Module) -> bool:
    """Return whether a network's blocks are split over processes."""
    return hasattr(network, _NAME)


def gather_block(block: nn.Module) -> None:
    """Have a block whole in this process until its next pass ends; all processes must call it."""
    block.unshard()  # type: ignore[operator]


def gather_weight(weight: Tensor) -> Tensor:
    """Return a weight whole, in any dtype, if it is split: then all processes must call it."""
    if not hasattr(weight, "to_local"):
        return weight
    part, count = weight.to_local(), distributed.get_world_size()
    rows = -(-weight.shape[0] // count)  # of each process but the last ones
    size = rows * math.prod(weight.shape[1:]) * weight.dtype.itemsize
    mine = torch.zeros(size, dtype=torch.uint8, device=part.device)
    mine[: part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
    whole = mine.new_empty(count * size)
    distributed.all_gather_into_tensor(whole, mine)
    return whole[: weight.nbytes].view(weight.dtype).view(weight.shape)


def set_weight(weight: Tensor, whole: Tensor) -> None:
    """Set a weight in place: of one that is split, this process' part."""
    if hasattr(weight, "to_local"):
        weight, rows = weight.to_local(), -(-len(whole) // distributed.get_world_size())
        whole = whole[distributed.get_rank() * rows :][: len(weight)]
    weight.copy_(whole)


def take_turns(work: Callable[[U], T], own: U) -> T:
    """Return `work(own)`, which all processes do for each of them, one after the other; all must call it."""
    given: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(given, own)
    return [work(one) for one in given][distributed.get_rank()]


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes a launcher started; 1 without one."""
    return int(environment.get("WORLD_SIZE", "1"))


def join_processes(device: str | None, environment: Mapping[str, str] = os.environ) -> torch.device:
    """Join the launcher's processes, and return the device of this one. device: as --device has it.

    Raises OptionError if the machine has fewer GPUs than processes.
    """
    kind, local = choose_device(device).type, int(environment.get("LOCAL_RANK", "0"))
    if device is not None and ":" in device:
        raise OptionError(
            f"--device {device} with --shard_base: each process has a GPU of its own. Give cuda, or leave it "
            "out"
        )
    if kind not in {"cpu", "cuda"}:
        raise OptionError(f"--shard_base: processes do not share a model on {kind}. Use CUDA GPUs")
    chosen = choose_device(f"cuda:{local}" if kind == "cuda" else "cpu")
    # objects go between the hosts: on a GPU waiting for a prompt would keep it busy
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    return chosen


def is_of_processes(error: BaseException) -> bool:
    """Return whether an error is of the connection between processes."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and SIGNS.search(str(error)) is not None


def agree(value: T) -> T:
    """Return the value that the first process gives. All must call it, after `join_processes`."""
    values: list[Any] = [value]
    distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    found: T = values[0]
    return found

"""Host memory for fast copies to a device: page-locked ("pinned"), and shared by a machine's processes.

torch rounds pinned memory up to powers of two, which would waste up to half. Here pages are mapped
in the size needed and registered with the driver, some hundred MB at once: Windows locks about half of a
machine's memory and refuses large pieces, WSL locks much less. Memory that the driver refuses to lock is used
too, but its copies are slower, and the host waits for them. Shared memory has no name in the file system: it
is freed when the last process ends, even if it is killed.

Swapping accesses a device only through this file: the copies here overlap with its computation. Networks that
take turns are loaded when first needed and freed when others need the memory.
"""

import contextlib
import functools
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy
import torch
from torch import Tensor, nn

from modules.devices import free_memory
from modules.integers import round_up
from protocols.loading import TensorInfo

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes; tensors begin at multiples of it
PIN_CHUNK = 256 << 20  # bytes that are pinned in one call, if a tensor is not larger


@dataclass(frozen=True)
class LocalProcesses:
    """Local rank of this process on its machine, and the global rank of the machine's first process."""

    rank: int  # rank of this process among them
    first_global_rank: int  # global rank of this machine's first process


def find_local_processes(environment: Mapping[str, str]) -> LocalProcesses | None:
    """Read the environment of the launcher (accelerate, torchrun) after the processes have joined.

    Returns:
        None if this process is the only one on its machine.
    """
    has_joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not has_joined or int(environment.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return None
    rank = torch.distributed.get_rank()
    local = int(environment.get("LOCAL_RANK", "0"))
    return LocalProcesses(local, rank - local)


@dataclass(frozen=True)
class HostTensors:
    """Tensors in host memory. If several processes share them, one process fills them."""

    tensors: Mapping[str, Tensor]
    is_written_by_this_process: bool = True
    unpinned_bytes: int = 0  # bytes that should be pinned but are not


def allocate(
    infos: Mapping[str, TensorInfo], pinned: bool, local_processes: LocalProcesses | None = None
) -> HostTensors:
    """Allocate uninitialized memory for tensors.

    Args:
        infos: Dtype and shape of each tensor, by name.
        pinned: Whether to lock as much of the memory as the driver allows, for copies to a CUDA device.
        local_processes: Processes that share the memory; all must call this with the same tensors, and call
            `wait_for_all` before reading. None allocates memory for this process alone.
    """
    starts, pin_ranges = _plan_offsets([info.size_bytes for info in infos.values()])
    size = pin_ranges[-1].stop
    # None: nothing is shared, or the system cannot share it; then each process fills its own memory
    shared_map = None if local_processes is None else _map_shared_memory(size, local_processes)
    mapping = _map_private_memory(size) if shared_map is None else shared_map
    memory, num_unpinned = _pin_as_tensor(mapping, pin_ranges if pinned else ())
    tensors = {}
    for start, (name, info) in zip(starts, infos.items(), strict=True):
        tensor_bytes = memory[start : start + info.size_bytes]
        tensors[name] = tensor_bytes.view(info.dtype).view(info.shape)
    if num_unpinned:
        _warn_of_unpinned_memory(num_unpinned, sum(tensor.nbytes for tensor in tensors.values()))
    is_written_by_this_process = local_processes is None or shared_map is None or local_processes.rank == 0
    return HostTensors(tensors, is_written_by_this_process, num_unpinned)


@functools.cache  # called with the same size for the inputs of many blocks
def _warn_of_unpinned_memory(size: int, total: int) -> None:
    logger.warning(
        "The driver refused to lock %.1f of %.1f GB of host memory: copies between these and the device are "
        "slower, and the host waits for them. Windows locks about half of a machine's memory at most, WSL "
        "much less.",
        size / 1e9,
        total / 1e9,
    )


def _plan_offsets(sizes: Sequence[int]) -> tuple[list[int], list[range]]:
    """Return the byte offset of each tensor, and the ranges of bytes to pin one by one."""
    # No tensor and no page is in two ranges, because a copy must not cross the border between ranges.
    offsets: list[int] = []
    pin_ranges: list[range] = []
    range_start = 0
    end = 0
    for size in sizes:
        is_range_full = end + size > range_start + PIN_CHUNK
        # the driver cannot pin an empty range, and an empty tensor fits into any
        if size and range_start < end and is_range_full:
            pin_ranges.append(range(range_start, end))
            end = round_up(end, mmap.ALLOCATIONGRANULARITY)  # the next range starts on a new page
            range_start = end
        offsets.append(end)
        end += round_up(size, ALIGNMENT)
    # at least one byte, because an empty mapping is an error
    return offsets, [*pin_ranges, range(range_start, max(end, 1))]


def wait_for_all(local_processes: LocalProcesses | None) -> None:
    """Wait until all processes of the run have arrived here; None stands for a single process."""
    if local_processes is not None:
        torch.distributed.barrier()


def _map_private_memory(size: int) -> mmap.mmap:
    mapping = (
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform != "win32"
        else mmap.mmap(-1, size)
    )
    _advise(mapping, "MADV_HUGEPAGE")  # allocates the pages in a tenth of the time
    return mapping


def _map_shared_memory(size: int, local_processes: LocalProcesses) -> mmap.mmap | None:
    """Map memory shared by a machine's processes; None if they cannot share, so that each needs its own."""
    # The first process creates an anonymous file; the other processes open it through the first process's
    # list of open files.
    is_first = local_processes.rank == 0
    own_file = _create_anonymous_file(size) if is_first else None
    process_files = _all_gather((os.getpid(), own_file))
    first_pid, first_file = process_files[local_processes.first_global_rank]
    mapping = None
    if first_file is not None:
        try:
            if is_first:
                mapping = mmap.mmap(first_file, size)
            else:
                mapping = _map_process_file(first_pid, first_file, size)
        except OSError as error:
            logger.debug("no shared memory: %s", error)
    is_mapped_everywhere = all(_all_gather(mapping is not None))
    if own_file is not None:
        os.close(own_file)  # the mapping keeps it alive
    if is_mapped_everywhere:
        return mapping
    if is_first:
        logger.warning(
            "Each process keeps its own copy of the swapped weights: this system does not let them share "
            "memory."
        )
    return None


def _create_anonymous_file(size: int) -> int | None:
    """Return the descriptor of an in-memory file; None if the system has none or memory is short."""
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create("swapped weights")
    try:
        # fails here if memory is short, instead of crashing when it is written
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        logger.debug("no shared memory: %s", error)
        return None
    return descriptor


def _map_process_file(pid: int, descriptor: int, size: int) -> mmap.mmap:
    """Map a file that another process has open."""
    opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
    try:
        return mmap.mmap(opened, size)
    finally:
        os.close(opened)


def _all_gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _advise(mapping: mmap.mmap, *advice: str) -> None:
    """Advise the system how memory will be used; advice that it does not know or accept is ignored."""
    for name in advice:
        if hasattr(mmap, name):
            try:
                mapping.madvise(getattr(mmap, name))
            except OSError as error:
                logger.debug("%s: %s", name, error)


def _pin_as_tensor(mapping: mmap.mmap, pin_ranges: Sequence[range]) -> tuple[Tensor, int]:
    """Pin memory for copies to the device; return it as a tensor, and the number of bytes not pinned."""
    array = numpy.frombuffer(mapping, dtype=numpy.uint8)  # keeps the mapping alive, and the tensor the array
    pinned_addresses: list[int] = []
    if pin_ranges:
        # a forked process must not take over the pages that are registered with the device
        _advise(mapping, "MADV_DONTFORK")
        weakref.finalize(array, _unregister, pinned_addresses).atexit = False
    for pin_range in pin_ranges:
        address = array.ctypes.data + pin_range.start
        if not _register(address, len(pin_range)):
            # leave some pinned memory to batches and to small copies of each step
            if len(pinned_addresses) > 1:
                torch.cuda.cudart().cudaHostUnregister(pinned_addresses.pop())
            return torch.from_numpy(array), sum(map(len, pin_ranges[len(pinned_addresses) :]))
        pinned_addresses.append(address)
    return torch.from_numpy(array), 0


def _register(address: int, size: int) -> bool:
    """Lock host memory for asynchronous copies to the device; return whether the driver accepted it."""
    driver, portable = torch.cuda.cudart(), 1  # cudaHostRegisterPortable: for all devices
    if driver.cudaHostRegister(address, size, portable) == driver.cudaError.success:
        return True
    # clear the error that the driver keeps for this thread after a failed call; otherwise torch would report
    # it at the next, unrelated kernel. torch does not offer cudaGetLastError, but calls it when it starts a
    # kernel
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False


def _unregister(addresses: Sequence[int]) -> None:
    torch.cuda.synchronize()  # copies from it may still be running
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)


Pairs = Sequence[tuple[Tensor, Tensor]]  # (target, source), of one size


class Transfer:
    """Copy between host and device in the order of the requests; this class copies immediately.

    It serves devices whose copies need no separate stream, such as the CPU. `record_event` and `copy` return
    events, whose type the subclass chooses.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, size_bytes: int) -> Tensor:
        """Allocate bytes on the device."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def record_event(self) -> Any:
        """Return an event after which all computation queued so far is done."""

    def copy(self, pairs: Pairs, after: Any) -> Any:
        """Copy pairs (target, source) after the event `after`; return the event of their end."""
        for target, source in pairs:
            target.copy_(source)

    def wait(self, event: Any) -> None:
        """Make computation that is queued from now on start after an event."""

    def finish(self) -> None:
        """Wait until all copies are done."""


class CudaTransfer(Transfer):
    """Copy between host and CUDA device in a separate stream, ordered by CUDA events."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def allocate(self, size_bytes: int) -> Tensor:
        """Allocate bytes that are not reused while a copy into them is still running."""
        memory = super().allocate(size_bytes)
        # if it is freed during a copy into it, torch does not reuse it before the copy is done
        memory.record_stream(self._stream)
        return memory

    def record_event(self) -> torch.cuda.Event:
        """Record an event in the compute stream."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, pairs: Pairs, after: torch.cuda.Event) -> torch.cuda.Event:
        """Queue copies in the transfer stream that wait for `after`; return an event for their end."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """Make the compute stream wait for an event; the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self) -> None:
        """Block the host until all copies are done."""
        self._stream.synchronize()


def transfer_to(device: torch.device) -> Transfer:
    """Return an object that copies between the host and this device."""
    return CudaTransfer(device) if device.type == "cuda" else Transfer(device)


def offload_layer(layer: nn.Module, host: Tensor, device: torch.device) -> None:
    """Keep the layer's weight in host memory, except while its forward runs.

    This is for frozen layers at the start of a network: if their backward pass needed the weight, autograd
    would keep it on the device.

    Args:
        layer: The layer.
        host: Host memory that already contains the weight.
        device: Device of the run.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    weight.data = host
    layer.forward = functools.partial(_run_moved, layer.forward, weight, host, device)


def _run_moved(
    forward: Callable[..., Any],
    weight: nn.Parameter,
    host: Tensor,
    device: torch.device,
    *inputs: Any,
    **named: Any,
) -> Any:
    """Run a layer with its weight on the device during the call only."""
    # copied in the compute stream: no waiting is needed
    weight.data = host.to(device, non_blocking=True, copy=True)
    try:
        return forward(*inputs, **named)
    finally:
        weight.data = host


Network = TypeVar("Network", bound=nn.Module)
Companion = TypeVar("Companion")


class LoadedNetwork(Generic[Network, Companion]):
    """A network and its companion, such as a tokenizer; both are in memory only between `load` and `free`."""

    _pair: tuple[Network, Companion] | None = None

    def load(
        self,
        device: torch.device,
        make: Callable[[torch.device], tuple[Network, Companion]],
        move: Callable[[nn.Module, torch.device], object] = nn.Module.to,
    ) -> None:
        """Load network and companion (such as a tokenizer); if already loaded, move the network."""
        if self._pair is None:
            self._pair = make(device)
        else:
            move(self._pair[0], device)

    def get(self) -> tuple[Network, Companion]:
        """Return the network and its companion. Call `load` first."""
        assert self._pair is not None, "call load() first"
        return self._pair

    def free(self) -> None:
        """Release network and companion, and free the device memory that torch caches."""
        if self._pair is not None:
            device = next(self._pair[0].parameters()).device
            self._pair = None
            free_memory(device)

"""Host memory for fast copies to a device: page-locked ("pinned"), and shared by a machine's processes.

torch's own pinned memory is rounded up to powers of two, which would waste up to half. Here pages are mapped
in the size needed and registered with the driver. Shared memory has no name in the file system: it is freed
when the last process ends, even if it is killed.
"""

import contextlib
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from modules.contract.loading import TensorInfo
from modules.errors import MemoryPlanError

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes; tensors begin at multiples of it


@dataclass(frozen=True)
class Machine:
    """The processes of one run on this machine."""

    rank: int = 0  # of this process among them
    first: int = 0  # number of the first of them among all processes
    count: int = 1

    @property
    def is_shared(self) -> bool:
        return self.count > 1


ALONE = Machine()


def machine_of(environment: Mapping[str, str]) -> Machine:
    """Read the launcher's (accelerate, torchrun) environment, once the processes have joined."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ALONE
    rank, local = torch.distributed.get_rank(), int(environment.get("LOCAL_RANK", "0"))
    return Machine(local, rank - local, int(environment.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class HostTensors:
    """Tensors in host memory. If several processes share them, one process fills them."""

    tensors: Mapping[str, Tensor]
    is_filled_here: bool = True


def allocate(infos: Mapping[str, TensorInfo], pinned: bool, machine: Machine = ALONE) -> HostTensors:
    """Allocate uninitialised memory for these tensors.

    pinned: for copies to a CUDA device. machine: if it has several processes, all of them must call this with
    the same tensors, and share the memory; call `wait_for_all` before reading it. Raises MemoryPlanError if
    the memory cannot be pinned.
    """
    starts, size = [], 0
    for info in infos.values():
        starts.append(size)
        size += -(-info.size_bytes // ALIGNMENT) * ALIGNMENT
    size = max(size, 1)
    mapping = _share(size, machine) if machine.is_shared else None
    whole = _as_tensor(_private(size) if mapping is None else mapping, pinned)
    tensors = {
        name: whole[start : start + info.size_bytes].view(info.dtype).view(info.shape)
        for start, (name, info) in zip(starts, infos.items(), strict=True)
    }
    return HostTensors(tensors, is_filled_here=mapping is None or machine.rank == 0)


def wait_for_all(machine: Machine) -> None:
    """Return when every process has called this."""
    if machine.is_shared:
        torch.distributed.barrier()


def _private(size: int) -> mmap.mmap:
    mapping = (
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform != "win32"
        else mmap.mmap(-1, size)
    )
    _advise(mapping, "MADV_HUGEPAGE")  # allocates the pages in a tenth of the time
    return mapping


def _share(size: int, machine: Machine) -> mmap.mmap | None:
    """Map memory shared by a machine's processes; None if they cannot share, so that each needs its own.

    The first process makes a file without a name; the others open it through its list of open files.
    """
    descriptor = _make_file(size) if machine.rank == 0 else None
    offers = _gather((os.getpid(), descriptor))
    pid, theirs = offers[machine.first]
    mapping = None
    if theirs is not None:
        try:
            opened = descriptor if descriptor is not None else os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR)
            try:
                mapping = mmap.mmap(opened, size)
            finally:
                if descriptor is None:
                    os.close(opened)
        except OSError as error:
            logger.debug("no shared memory: %s", error)
    all_have = all(_gather(mapping is not None))
    if descriptor is not None:
        os.close(descriptor)  # the mapping keeps it alive
    if all_have:
        return mapping
    if machine.rank == 0:
        logger.warning(
            "Each process keeps its own copy of the swapped weights: this system does not let them share "
            "memory."
        )
    return None


def _make_file(size: int) -> int | None:
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


def _gather(value: Any) -> list[Any]:
    """Return the value of every process, in order of rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _advise(mapping: mmap.mmap, *advice: str) -> None:
    """Advise the system how memory will be used, if it knows such advice."""
    for name in advice:
        if hasattr(mmap, name):
            try:
                mapping.madvise(getattr(mmap, name))
            except OSError as error:
                logger.debug("%s: %s", name, error)


def _as_tensor(mapping: mmap.mmap, pinned: bool) -> Tensor:
    """Return the bytes of a mapping, which lives as long as a tensor uses it.

    Raises MemoryPlanError if they cannot be pinned.
    """
    array = numpy.frombuffer(mapping, dtype=numpy.uint8)  # holds the mapping, and the tensor holds the array
    if pinned:
        # a forked process must not take over the pages that are registered with the device
        _advise(mapping, "MADV_DONTFORK")
        _register(array.ctypes.data, array.nbytes)
        weakref.finalize(array, _unregister, array.ctypes.data).atexit = False
    return torch.from_numpy(array)


def _register(address: int, size: int) -> None:
    driver, portable = torch.cuda.cudart(), 1  # cudaHostRegisterPortable: for all devices
    if driver.cudaHostRegister(address, size, portable) != driver.cudaError.success:
        _clear_error()
        raise MemoryPlanError(
            f"the driver could not lock {size / 1e9:.1f} GB of host memory for swapped blocks and offloaded "
            "activations.\n"
            "  Free host memory, use a smaller --blocks_to_swap, or leave "
            "--gradient_checkpointing_cpu_offload out."
        )


def _clear_error() -> None:
    """Take back the error that the driver keeps for this thread after a refused call.

    torch would report it at the next kernel, which has nothing to do with it. torch does not offer
    cudaGetLastError, but calls it when it starts a kernel.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _unregister(address: int) -> None:
    torch.cuda.synchronize()  # copies from it may still be running
    torch.cuda.cudart().cudaHostUnregister(address)

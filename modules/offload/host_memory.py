"""Memory of the host from which a device copies fast: locked to its place ("pinned"), and one for all
processes of a machine.

torch's own pinned memory is rounded up to powers of two, which would waste up to half. Here pages are mapped
in the size needed and registered with the driver. Shared memory has no name in the file system: it is gone
when the last process has ended, however.
"""

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

ALIGNMENT = 256  # bytes; where tensors begin


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
    """What a launcher (accelerate, torchrun) says in the environment, once the processes have joined."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ALONE
    rank, local = torch.distributed.get_rank(), int(environment.get("LOCAL_RANK", "0"))
    return Machine(local, rank - local, int(environment.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class HostTensors:
    """Tensors in host memory. Those of a machine with several processes are filled by one of them."""

    tensors: Mapping[str, Tensor]
    is_filled_here: bool = True


def allocate(infos: Mapping[str, TensorInfo], pinned: bool, machine: Machine = ALONE) -> HostTensors:
    """Memory for these tensors, their content undefined.

    pinned: for copies to a CUDA device. machine: where it has several processes all of them have to call this
    with the same tensors, and share the memory; `wait_for_all` says when it is filled.
    """
    starts, size = [], 0
    for info in infos.values():
        starts.append(size)
        size += -(-info.size_bytes // ALIGNMENT) * ALIGNMENT
    size = max(size, 1)
    mapping = _shared(size, machine) if machine.is_shared else None
    whole = _as_tensor(_private(size) if mapping is None else mapping, pinned)
    tensors = {
        name: whole[start : start + info.size_bytes].view(info.dtype).view(info.shape)
        for start, (name, info) in zip(starts, infos.items(), strict=True)
    }
    return HostTensors(tensors, is_filled_here=mapping is None or machine.rank == 0)


def wait_for_all(machine: Machine) -> None:
    """Return when every process has come here."""
    if machine.is_shared:
        torch.distributed.barrier()


def _private(size: int) -> mmap.mmap:
    mapping = (
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform != "win32"
        else mmap.mmap(-1, size)
    )
    _advise(mapping, "MADV_HUGEPAGE")  # a tenth of the time to get them
    return mapping


def _shared(size: int, machine: Machine) -> mmap.mmap | None:
    """One memory for the processes of a machine; None where they cannot have one, so that each needs its own.

    The first makes a file without a name; the others open it through the list of its open files.
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
            "Each process keeps the swapped weights for itself: this system does not let them share memory."
        )
    return None


def _make_file(size: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create("swapped weights")
    try:
        # too little memory shows here, not as a crash when it is written
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        logger.debug("no shared memory: %s", error)
        return None
    return descriptor


def _gather(value: Any) -> list[Any]:
    """The value of every process, in their order."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _advise(mapping: mmap.mmap, *advice: str) -> None:
    """Tell the system how memory will be used, as far as it knows such words."""
    for name in advice:
        if hasattr(mmap, name):
            try:
                mapping.madvise(getattr(mmap, name))
            except OSError as error:
                logger.debug("%s: %s", name, error)


def _as_tensor(mapping: mmap.mmap, pinned: bool) -> Tensor:
    """The bytes of a mapping, which lives as long as a tensor uses it.

    Raises MemoryPlanError where they cannot be pinned.
    """
    array = numpy.frombuffer(mapping, dtype=numpy.uint8)  # holds the mapping, and the tensor holds the array
    if pinned:
        # a process that is forked off must not come to own the pages that the device knows
        _advise(mapping, "MADV_DONTFORK")
        _register(array.ctypes.data, array.nbytes)
        weakref.finalize(array, _unregister, array.ctypes.data).atexit = False
    return torch.from_numpy(array)


def _register(address: int, size: int) -> None:
    driver, portable = torch.cuda.cudart(), 1  # cudaHostRegisterPortable: for all devices
    if driver.cudaHostRegister(address, size, portable) != driver.cudaError.success:
        raise MemoryPlanError(
            f"the driver could not lock {size / 1e9:.1f} GB of host memory, where swapped blocks and "
            "offloaded activations wait.\n"
            "  Free host memory, use a smaller --blocks_to_swap, or leave "
            "--gradient_checkpointing_cpu_offload out."
        )


def _unregister(address: int) -> None:
    torch.cuda.synchronize()  # nothing may still be copied from it
    torch.cuda.cudart().cudaHostUnregister(address)

"""Measure a CUDA device's memory: free bytes, peak of a step, and whether the driver spills to the host."""

import logging
import re
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from modules.devices import GIB, format_gib
from modules.errors import MemoryPlanError
from modules.speed_options import SMALLER_WEIGHTS

logger = logging.getLogger(__name__)

# Device memory outside torch's tensors: the CUDA context with its kernels, a few hundred MB on every driver.
CONTEXT = 600 << 20
# fraction for fragmentation and the display; a plan that leaves less than this does not fit
MARGIN = 0.03
TOLERANCE = 0.07  # a larger relative difference between prediction and measurement is reported
FULL = 0.97  # fraction of the device's memory above which the driver may spill to host memory


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of a device, in bytes: of the GPU in use, or of one to plan for."""

    name: str
    total: int
    free: int
    is_planned: bool = False  # whether it is a hypothetical GPU, from --plan

    @property
    def usable(self) -> int:
        """Return the bytes available to tensors: the free memory minus the CUDA context and a margin."""
        return max(0, round(self.free * (1 - MARGIN)) - CONTEXT)


def device_memory_to_plan(device: torch.device, planned_gib: float | None = None) -> DeviceMemory | None:
    """Return the memory to plan for; None if no GPU size is given and the device is not a CUDA device.

    Args:
        device: Device of the run.
        planned_gib: Size of the planned GPU in GiB; 0 or None for the size of the device.
    """
    if planned_gib:
        size = round(planned_gib * GIB)
        return DeviceMemory(f"A card of {planned_gib:g} GiB", size, size, is_planned=True)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(torch.cuda.get_device_name(device), total, free + torch.cuda.memory_reserved(device))


def spills(total: int, free: int, reserved: int) -> bool:
    """Return whether some of the memory that torch has reserved on a device must actually be host memory.

    Drivers on Windows, and therefore in WSL, fall back to host memory instead of failing when a program asks
    for more than the GPU has; copies over PCIe then make steps many times slower. The sign is that torch has
    reserved more than the GPU has, or nearly all of it while nothing is free.
    """
    return reserved > total or (reserved >= FULL * total and free <= (1 - FULL) * total)


def spare_bytes(device: torch.device) -> int:
    """Return the bytes free for tensors, in the CUDA driver and torch's allocator, less a margin."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused - round(MARGIN * total)


def bytes_on(network: nn.Module, device: torch.device) -> int:
    """Return the bytes of a network's weights and buffers on devices of this type, in this process."""
    tensors = chain(network.parameters(), network.buffers())
    # of a split weight
    here = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in here if tensor.device.type == device.type)


def free_host_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of host memory available without swapping; None if unknown, as outside Linux."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else int(match[1]) * 1024


def too_little(error: torch.OutOfMemoryError, afterwards: str) -> MemoryPlanError:
    """Return the error, with advice, for a device that ran out of memory during a run.

    Args:
        error: The error of torch.
        afterwards: Last sentence of the message, which says what the run has kept.
    """
    return MemoryPlanError(
        f"the device has too little memory for this run: {str(error).partition('. ')[0]}.\n"
        f"  Run the same command with --plan to see what to change: {SMALLER_WEIGHTS}, --blocks_to_swap "
        "auto, smaller clips,\n"
        f"  and in training --gradient_checkpointing. {afterwards}"
    )


def comparison(predicted: int, measured: int) -> str:
    """Return a log line with the predicted and the measured peak, and the difference between them."""
    difference = (predicted - measured) / measured
    line = (
        f"Memory: predicted {format_gib(predicted)} GiB, measured {format_gib(measured)} GiB "
        f"({difference:+.1%})."
    )
    if abs(difference) > TOLERANCE:
        line += f" That is more than {TOLERANCE:.0%} off: please report it with this line and your options."
    return line


EVERY = 50  # steps between two checks of the driver


@dataclass
class MemoryWatch:
    """Compare the predicted and the measured peak of a training run once, and warn once if memory is full.

    Measuring starts with the second step, because the first one creates the optimizer's states.
    """

    device: torch.device  # a CUDA device
    # bytes of tensors at the peak of a step with the largest batch; None: unknown
    predicted: int | None = None
    largest: int = 0  # elements of that batch's latents
    measured: int | None = field(default=None, init=False)  # the peak of such a step
    _highest: int = field(default=0, init=False)  # before the counter was last reset
    _steps: int = field(default=0, init=False)
    _has_seen: bool = field(default=False, init=False)  # whether a measured step had a batch of that size
    _has_warned: bool = field(default=False, init=False)

    @property
    def highest(self) -> int:
        """Return the highest number of bytes of tensors on the device during the run, samples included."""
        return max(self._highest, torch.cuda.max_memory_allocated(self.device))

    def see_batch(self, elements: int) -> None:
        """Record the size of a micro-batch while its step still runs.

        Args:
            elements: Number of elements of the batch's latents.
        """
        self._has_seen = self._has_seen or (self._steps > 0 and elements >= self.largest)

    def after_step(self) -> None:
        """Count a step: compare the predicted and the measured peak once, and warn if memory becomes full."""
        self._steps += 1
        if self._steps == 1:
            self._count_anew()
        elif self._has_seen and self.predicted is not None and self.measured is None:
            self.measured = torch.cuda.max_memory_allocated(self.device)
            logger.info(comparison(self.predicted, self.measured))
        if self._steps % EVERY == 2:
            self.warn_if_full()

    def after_pause(self) -> None:
        """Ignore the memory used by samples, validation and saving; call this after each of them."""
        if self._steps > 0 and self.measured is None:
            self._count_anew()

    def _count_anew(self) -> None:
        self._highest = self.highest
        torch.cuda.reset_peak_memory_stats(self.device)

    def warn_if_full(self) -> None:
        """Log a warning the first time that the device's memory is full."""
        if self._has_warned:
            return
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        if spills(total, free, reserved):
            self._has_warned = True
            logger.warning(
                "The GPU's memory is full: torch has reserved %s of %s GiB. If the driver falls back to host "
                "memory (Windows: CUDA - Sysmem Fallback Policy), steps become many times slower.\n"
                "  Run with --plan to see what to change, such as a larger --blocks_to_swap; or close other "
                "programs that use the GPU.",
                format_gib(reserved),
                format_gib(total),
            )

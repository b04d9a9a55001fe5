"""What a CUDA device really holds: the measured peak, and whether its driver has begun to use the host's
memory instead.
"""

import logging
import re
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from modules.planning.memory_plan import MARGIN, comparison, gib

logger = logging.getLogger(__name__)

FULL = 0.97  # of the device's memory: from here on a driver that spills has begun to


@dataclass(frozen=True)
class Usage:
    """Bytes of a device, as torch and its driver tell them."""

    total: int
    free: int  # as the driver says
    reserved: int  # by torch, in this process

    @property
    def spills(self) -> bool:
        """Whether memory that torch has taken must lie elsewhere.

        The drivers of Windows, and so of WSL, lend host memory to a program that asks for more than the card
        has, instead of refusing; copies over PCIe then make steps many times slower. It shows in torch having
        reserved more than the card can give beside what others use of it, or nearly all of a card of which
        nothing is free.
        """
        return self.reserved > self.total or (
            self.reserved >= FULL * self.total and self.free <= (1 - FULL) * self.total
        )

    @property
    def warning(self) -> str:
        return (
            f"The GPU's memory is full: torch has reserved {gib(self.reserved)} of {gib(self.total)} GiB. "
            "Where the driver lends "
            "host memory (Windows: CUDA - Sysmem Fallback Policy), steps become many times slower.\n"
            "  --plan says what to change, such as a larger --blocks_to_swap; or close other programs that "
            "use the GPU."
        )


def usage_of(device: torch.device) -> Usage:
    """The present usage of a CUDA device."""
    free, total = torch.cuda.mem_get_info(device)
    return Usage(total, free, torch.cuda.memory_reserved(device))


def spare_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device for tensors beside those that lie there, less a margin: what the driver and
    torch's allocator have.
    """
    usage = usage_of(device)
    return usage.free + usage.reserved - torch.cuda.memory_allocated(device) - round(MARGIN * usage.total)


def bytes_on(network: nn.Module, device: torch.device) -> int:
    """Bytes of a network's weights and buffers on a kind of device."""
    return sum(
        each.nbytes
        for each in chain(network.parameters(), network.buffers())
        if each.device.type == device.type
    )


def host_room(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say (only Linux
    does).
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


EVERY = 50  # steps between two looks at the driver


@dataclass
class MemoryWatch:
    """During training: compares the prediction with the measured peak once, and warns once of a device that
    is full.

    A run's first step makes the optimizer's states, so that what is measured begins with the second one.
    """

    device: torch.device  # a CUDA device
    # bytes of tensors at the peak of a step with the largest batch; None: not known
    predicted: int | None = None
    largest: int = 0  # elements of that batch's latents
    _steps: int = field(default=0, init=False)
    _has_seen: bool = field(default=False, init=False)  # a batch of that size, in a step that is measured
    _has_warned: bool = field(default=False, init=False)

    def see_batch(self, elements: int) -> None:
        """Call for each micro-batch before its step ends. elements: of its latents."""
        self._has_seen = self._has_seen or (self._steps > 0 and elements >= self.largest)

    def after_step(self) -> None:
        """Call after each optimizer step."""
        self._steps += 1
        if self._steps == 1:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._has_seen and self.predicted is not None:
            logger.info(comparison(self.predicted, torch.cuda.max_memory_allocated(self.device)))
            self.predicted = None
        if self._steps % EVERY == 2:
            self.warn_if_full()

    def warn_if_full(self) -> None:
        """One line, the first time that the device is full."""
        if self._has_warned:
            return
        usage = usage_of(self.device)
        if usage.spills:
            logger.warning(usage.warning)
            self._has_warned = True

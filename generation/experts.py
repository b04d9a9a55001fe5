"""Load the experts of a model, the networks that denoise, and let them take turns on the device.

An expert is loaded onto the device when its steps begin. If the plan lists it, a thread already reads it into
host memory while the previous expert runs, so that only the copy to the device remains. An expert that leaves
the device waits in host memory if it is needed again and the host has room; otherwise it is freed. Experts
stay on the device together if it has room for all, or if it is the CPU and the host has room.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Protocol

import torch
from torch import nn

from modules.devices import format_gib, free_memory
from modules.errors import MemoryPlanError
from modules.flow.schedule import make_schedule
from protocols.family import Family
from protocols.requests import Prepared
from protocols.rules import Expert, expert_at, noisiest
from runtime.offload.block_swap import move_network
from runtime.planning.device_memory import bytes_on, free_host_memory, spare_bytes

logger = logging.getLogger(__name__)


PAUSE = 0.2  # seconds between checks for Ctrl-C while waiting, which Windows needs

Check = Callable[[], None]  # called now and then while loading; may raise to end the loading


class PrefetchCancelled(Exception):
    """Raised in the thread that reads an expert's weights, to stop it once the expert is no longer needed."""


CPU = torch.device("cpu")

LoadDit = Callable[[int], nn.Module]  # expert -> its network on the device


class WaitingNetwork(Protocol):
    """A network whose weights can be moved to host memory and back, such as `HostCopy`."""

    def to_device(self) -> None:
        """Copy the weights from host memory to the device."""

    def free_device_memory(self) -> None:
        """Free the device memory of the weights, which remain in host memory."""


def _copy_to_host(network: nn.Module, device: torch.device) -> WaitingNetwork:
    from runtime.offload.turns import HostCopy  # only for networks that take turns

    return HostCopy(network, device)


# expert -> its network in host memory, and the object that moves it to the device; `Check` is called for
# each tensor
LoadToHost = Callable[[int, Check], tuple[nn.Module, WaitingNetwork]]


@dataclass(frozen=True)
class ExpertPrefetch:
    """An expert (high-noise or low-noise transformer) whose weights a thread is reading into host memory."""

    expert: int
    future: Future[tuple[nn.Module, WaitingNetwork]]
    stop: threading.Event  # set if the expert is no longer needed

    def join(self) -> None:
        """Wait for the thread to end, in short intervals, so that Ctrl-C can interrupt."""
        while wait([self.future], PAUSE).not_done:
            pass


def experts_by_step(family: Family, prepared: Prepared) -> list[int]:
    """Return, for each step of a request, the index of the expert that denoises it."""
    schedule = make_schedule(prepared.solver, prepared.steps, prepared.flow_shift, family.noise.table)
    timesteps = schedule.timesteps[prepared.first_step :].tolist()
    return [expert_at(timestep, family.experts) for timestep in timesteps]


def list_expert_order(family: Family, requests: Sequence[Prepared]) -> list[int]:
    """Return the indices of the experts in the order of their use when the requests are generated in turn.

    Consecutive steps with the same expert count once: two requests that use expert 0 and then expert 1 make
    [0, 1, 0, 1].
    """
    if len(family.experts) == 1:
        return [0] if requests else []
    steps = chain.from_iterable(experts_by_step(family, request) for request in requests)
    return [expert for expert, _ in groupby(steps)]


@dataclass
class ExpertOffloader:
    """Loads the networks of a model's experts, and moves each to the device when it is needed."""

    experts: Sequence[Expert]
    device: torch.device
    load: LoadDit
    load_to_host: LoadToHost | None = None  # loads an expert into host memory; None: nothing is loaded ahead
    keep: bool = False  # whether experts are needed again after the phase, for the next prompt
    one_at_a_time: bool = False  # whether to keep only one on the device (--offload_inactive_dit)
    lazy: bool = False  # whether to load each when its steps begin, and free it afterwards (--lazy_loading)
    all_stay_on_device: bool = (
        False  # whether all stay on the device, because each process has only a part of them
    )
    spare_bytes: Callable[[torch.device], int] = spare_bytes  # of a CUDA device
    free_host_memory: Callable[[], int | None] = free_host_memory
    make_copy: Callable[[nn.Module, torch.device], WaitingNetwork] = _copy_to_host
    # largest expected device memory, in bytes, of the experts together with other work, such as previews
    max_shared_bytes: int = field(default=0, init=False)
    _dits: dict[int, nn.Module] = field(default_factory=dict)  # the loaded experts
    _host_copies: dict[int, WaitingNetwork] = field(default_factory=dict)  # of experts that have one
    _on_device: set[int] = field(default_factory=set)  # experts on the device
    _prefetch: ExpertPrefetch | None = None
    _expert_order: Sequence[int] = ()  # order of the experts; () if unknown
    _order_index: int = 0  # index in the plan of the current turn
    _logged_without_prefetch: set[int] = field(default_factory=set)  # experts logged as not read ahead

    @contextmanager
    def phase(self, expert_order: Sequence[int] = ()) -> Iterator[Callable[[float], nn.Module]]:
        """Yield a function that returns the network for a timestep, on the device.

        Args:
            expert_order: Indices of experts, from `list_expert_order`; the first one is loaded immediately.
                If it is empty, the order is unknown: a video starts with the expert for high noise, and every
                expert may be needed again.
        """
        self._expert_order = expert_order
        self._order_index = 0
        free_memory(self.device)  # callers of the previous phase may have held networks until they returned
        try:
            self._activate(expert_order[0] if expert_order else noisiest(self.experts))
            yield lambda timestep: self._activate(expert_at(timestep, self.experts))
        finally:  # also if Ctrl-C interrupts a move
            if self._prefetch is not None:
                self._cancel_prefetch(self._prefetch)
            if not self.keep:  # no further prompts need the experts
                self.free()
            # on the CPU nothing has to move, unless --lazy_loading frees experts
            elif self.device.type != "cpu" or self.lazy:
                self._expert_order = ()
                for expert in [*self._on_device]:
                    self._offload(expert)
            free_memory(self.device)

    @contextmanager
    def moved_to_host(self) -> Iterator[None]:
        """Move the networks that are on the device to host memory during the block.

        A network with a copy in host memory is only removed from the device.

        Raises:
            MemoryPlanError: If the host has too little memory for them; the system might kill the process.
        """
        on_device = [(self._dits[expert], self._host_copies.get(expert)) for expert in self._on_device]
        weights = sum(bytes_on(dit, self.device) for dit, host_copy in on_device if host_copy is None)
        free_host_bytes = self.free_host_memory()
        if free_host_bytes is not None and weights > free_host_bytes:
            raise MemoryPlanError(
                "the transformer would have to move to host memory, which has "
                f"{format_gib(free_host_bytes)} GiB free; it needs {format_gib(weights)} GiB"
            )
        try:
            for dit, host_copy in on_device:
                if host_copy is None:
                    move_network(dit, CPU)
                else:
                    host_copy.free_device_memory()
            free_memory(self.device)
            yield
        finally:
            for dit, host_copy in on_device:
                _move_to_device(dit, host_copy, self.device)

    def can_stay(self, needed: int | None) -> bool:
        """Return whether the loaded networks may stay on the device during other work, such as decoding.

        Args:
            needed: Device memory of the other work in bytes; None if unknown, which returns False.
        """
        if self.device.type == "cpu":
            return True
        if self.device.type == "cuda" and needed is not None and needed <= self.spare_bytes(self.device):
            used = torch.cuda.memory_allocated(self.device)
            self.max_shared_bytes = max(self.max_shared_bytes, used + needed)
            return True
        return False

    def free(self) -> None:
        """Free all networks. Call it between phases."""
        self._dits = {}
        self._host_copies = {}
        self._on_device = set()

    def _activate(self, expert: int) -> nn.Module:
        """Return an expert, moved to the device if necessary, and start reading the next one."""
        # Experts on the device are moved away first, unless all of them fit.
        # advance to this expert in the order; skipped entries belong to requests that failed or ended early
        remaining_indices = range(self._order_index, len(self._expert_order))
        self._order_index = next(
            (index for index in remaining_indices if self._expert_order[index] == expert), self._order_index
        )
        if expert in self._on_device:
            return self._dits[expert]
        if self._prefetch is not None:
            self._take_prefetched(expert, self._prefetch)
        for other_expert in [*self._on_device]:
            if not self._may_stay(other_expert, expert):
                self._offload(other_expert)
        if expert in self._dits:
            # Move a loaded expert from host memory to the device; if that fails, offload it again
            self._on_device.add(expert)  # before moving, which may be interrupted half-way
            try:
                _move_to_device(self._dits[expert], self._host_copies.get(expert), self.device)
            except Exception:
                # most likely too little memory: a smaller video can still use the offloaded expert
                self._offload(expert)
                raise
        else:
            self._dits[expert] = self.load(expert).eval().requires_grad_(False)
            self._on_device.add(expert)
        if len(self._on_device) > 1 and not self.keep:
            self._host_copies.pop(expert, None)  # it stays on the device until it is freed
        if len(self.experts) > 1:
            self._start_prefetch(expert)
        return self._dits[expert]

    def _may_stay(self, expert: int, next_expert: int) -> bool:
        """Return whether an expert may stay on the device together with the next one."""
        # The next expert is assumed to have the same size.
        if self.all_stay_on_device:
            return True
        if self.lazy:
            return False
        weights = bytes_on(self._dits[expert], self.device)
        if self.device.type == "cpu":
            free_host_bytes = self.free_host_memory()
            is_loaded = next_expert in self._dits  # needs no more memory
            return is_loaded or free_host_bytes is None or weights <= free_host_bytes
        if self.device.type != "cuda" or self.one_at_a_time:
            return False
        # assume that the next steps need as much memory besides the weights as the past steps
        step_bytes = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        return self.can_stay(weights + step_bytes)

    def _offload(self, expert: int) -> None:
        """Move an expert to host memory, or free it if it is not needed again or does not fit."""
        is_needed_again = (
            self.keep or not self._expert_order or expert in self._expert_order[self._order_index :]
        )
        if self.lazy or not is_needed_again:
            self._free(expert)
            return
        dit = self._dits[expert]
        host_copy = self._host_copies.get(expert)
        weights = bytes_on(dit, self.device)
        free_host_bytes = self.free_host_memory()
        if host_copy is not None:  # the host has the weights already: only the device's memory is freed
            host_copy.free_device_memory()
        elif self.device.type == "cpu" or (free_host_bytes is not None and weights > free_host_bytes):
            logger.info("The host has no room for the idle transformer: it is loaded again when it is needed")
            self._free(expert)
            return
        elif self.device.type == "cuda" and len(self.experts) > 1:
            # it stays in memory, so that the weights are copied only once
            self._host_copies[expert] = self.make_copy(dit, self.device)
        else:
            move_network(dit, CPU)
            free_memory(self.device)
        self._on_device.remove(expert)

    def _free(self, expert: int) -> None:
        self._on_device.remove(expert)
        self._host_copies.pop(expert, None)
        del self._dits[expert]
        free_memory(self.device)

    def _start_prefetch(self, current_expert: int) -> None:
        """Start reading the next expert into host memory in a thread, if it fits."""
        later_experts = self._expert_order[self._order_index :]
        next_expert = next((expert for expert in later_experts if expert != current_expert), None)
        if next_expert is None or next_expert in self._dits:
            return
        if self._prefetch is not None or self.load_to_host is None:
            return
        title = self.experts[next_expert].description
        reason = self._explain_no_prefetch(current_expert)
        if not reason:
            current_title = self.experts[current_expert].description
            logger.info("The %s is read into host memory while the %s works", title, current_title)
            # Start a thread that reads an expert's weights into host memory
            stop = threading.Event()

            def check() -> None:
                if stop.is_set():
                    raise PrefetchCancelled

            load = torch.no_grad()(self.load_to_host)  # each thread has its own gradient mode
            pool = ThreadPoolExecutor(1, "loading ahead")  # `load_to_host` uses a CUDA stream of its own
            future = pool.submit(load, next_expert, check)
            pool.shutdown(wait=False)  # the thread ends after this one job
            self._prefetch = ExpertPrefetch(next_expert, future, stop)
        elif next_expert not in self._logged_without_prefetch:
            logger.info("The %s is loaded when its steps begin%s", title, reason)
            self._logged_without_prefetch.add(next_expert)

    def _explain_no_prefetch(self, current_expert: int) -> str:
        """Return why the next expert cannot be read in the background, as log text; "" if it can."""
        if self.lazy:
            return ", as --lazy_loading asks"
        if self.device.type not in {"cpu", "cuda"}:  # a thread must not compute on others
            return f": {self.device.type} cannot prepare it while it works"
        dit = self._dits[current_expert]  # the next one is as large
        free_host_bytes = self.free_host_memory()
        needed = sum(tensor.nbytes for tensor in chain(dit.parameters(), dit.buffers()))
        if free_host_bytes is not None and needed > free_host_bytes:
            return f": the host has {format_gib(free_host_bytes)} GiB free, it takes {format_gib(needed)} GiB"
        return ""

    def _take_prefetched(self, expert: int, prefetch: ExpertPrefetch) -> None:
        """Take an expert from the thread that read it, or raise the thread's error."""
        # If the thread only ran out of memory, return without the expert, which is then loaded as usual.
        if prefetch.expert != expert:  # its request ended before this expert was needed: drop it
            self._cancel_prefetch(prefetch)
            return
        if not prefetch.future.done():
            logger.info("Waiting for the %s, which is still being read", self.experts[expert].description)
        prefetch.join()  # after Ctrl-C here, `phase` still ends the thread
        self._prefetch = None  # also if reading failed: the next video tries again
        try:
            dit, host_copy = prefetch.future.result()
        except (torch.OutOfMemoryError, MemoryError):
            logger.info(
                "There was not enough memory to read the %s ahead: it is loaded now",
                self.experts[expert].description,
            )
            return
        self._dits[expert] = dit.eval().requires_grad_(False)
        if self.device.type != "cpu":
            self._host_copies[expert] = host_copy

    def _cancel_prefetch(self, prefetch: ExpertPrefetch) -> None:
        prefetch.stop.set()
        prefetch.join()
        self._prefetch = None


def _move_to_device(dit: nn.Module, host_copy: WaitingNetwork | None, device: torch.device) -> None:
    if host_copy is not None:
        host_copy.to_device()
    elif device.type != "cpu":  # where it was loaded
        move_network(dit, device)

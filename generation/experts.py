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

from modules.devices import free_memory, gib
from modules.errors import MemoryPlanError
from modules.flow.schedule import make_schedule
from protocols.family import Family
from protocols.requests import Prepared
from protocols.rules import Expert, expert_at, noisiest
from runtime.offload.block_swap import move_network
from runtime.planning.device_memory import bytes_on, free_host_memory, spare_bytes

logger = logging.getLogger(__name__)


PAUSE = 0.2  # seconds between checks for Ctrl-C while waiting, which Windows needs

Check = Callable[[], None]  # called now and then while loading; may raise `ReadingStopped`


class ReadingStopped(Exception):
    """Raised in a thread to stop reading an expert that is no longer needed."""


CPU = torch.device("cpu")

LoadDit = Callable[[int], nn.Module]  # expert -> its network on the device


class WaitingNetwork(Protocol):
    """Network with weights that can be moved to host memory, such as `runtime.offload.turns.HostCopy`."""

    def to_device(self) -> None:
        """Copy the weights from host memory to the device."""

    def free_device_memory(self) -> None:
        """Free the device memory of the weights, which stay in host memory."""


def _copy_to_host(network: nn.Module, device: torch.device) -> WaitingNetwork:
    from runtime.offload.turns import HostCopy  # only for networks that take turns

    return HostCopy(network, device)


# expert -> its network in host memory, and what brings it to the device; `Check` is called for each tensor
LoadToHost = Callable[[int, Check], tuple[nn.Module, WaitingNetwork]]


@dataclass(frozen=True)
class ReadingAhead:
    """An expert whose weights a thread is reading into host memory."""

    expert: int
    reading: Future[tuple[nn.Module, WaitingNetwork]]
    stop: threading.Event  # set if the expert is not needed any more

    def join(self) -> None:
        """Wait for the thread in short intervals, so that Ctrl-C can interrupt."""
        while wait([self.reading], PAUSE).not_done:
            pass


def experts_by_step(family: Family, prepared: Prepared) -> list[int]:
    """Return the index of the expert that denoises each step of a request."""
    schedule = make_schedule(prepared.solver, prepared.steps, prepared.flow_shift, family.noise.table)
    timesteps = schedule.timesteps[prepared.first_step :].tolist()
    return [expert_at(timestep, family.experts) for timestep in timesteps]


def plan_turns(family: Family, requests: Sequence[Prepared]) -> list[int]:
    """Return which experts are used one after another, as indices, when the requests are generated in turn.

    Consecutive steps with the same expert are one entry: two requests that use expert 0 and then expert 1
    make [0, 1, 0, 1].
    """
    if len(family.experts) == 1:
        return [0] if requests else []
    steps = chain.from_iterable(experts_by_step(family, request) for request in requests)
    return [expert for expert, _ in groupby(steps)]


@dataclass
class DitTurns:
    """Load the networks of a model's experts and move them between device and host as their turns come."""

    experts: Sequence[Expert]
    device: torch.device
    load: LoadDit
    load_to_host: LoadToHost | None = None  # loads an expert into host memory; None: nothing is loaded ahead
    keep: bool = False  # whether experts are needed again after the phase, for the next prompt
    one_at_a_time: bool = False  # whether to keep only one on the device (--offload_inactive_dit)
    lazy: bool = False  # whether to load each when its steps begin, and free it afterwards (--lazy_loading)
    together: bool = False  # whether all stay on the device, because each process holds only a part of them
    spare_bytes: Callable[[torch.device], int] = spare_bytes  # of a CUDA device
    free_host_memory: Callable[[], int | None] = free_host_memory
    make_copy: Callable[[nn.Module, torch.device], WaitingNetwork] = _copy_to_host
    # largest expected device memory, in bytes, of the experts together with other work, such as previews
    max_shared_bytes: int = field(default=0, init=False)
    _dits: dict[int, nn.Module] = field(default_factory=dict)  # the loaded experts
    _copies: dict[int, WaitingNetwork] = field(default_factory=dict)  # of experts that have one
    _working: set[int] = field(default_factory=set)  # experts on the device
    _ahead: ReadingAhead | None = None
    _plan: Sequence[int] = ()  # order of the experts; () if unknown
    _turn: int = 0  # index in the plan of the current turn
    _logged: set[int] = field(default_factory=set)  # experts logged as not read ahead

    @contextmanager
    def phase(self, plan: Sequence[int] = ()) -> Iterator[Callable[[float], nn.Module]]:
        """Yield a function that returns the network for a timestep, on the device.

        Args:
            plan: Order of the experts, from `plan_turns`; the first one is loaded immediately. If it is
                empty, the order is unknown: a video starts with the expert for high noise, and every expert
                may be needed again.
        """
        self._plan = plan
        self._turn = 0
        free_memory(self.device)  # callers of the previous phase may have held networks until they returned
        try:
            self._bring(plan[0] if plan else noisiest(self.experts))
            yield lambda timestep: self._bring(expert_at(timestep, self.experts))
        finally:  # also where Ctrl-C comes in the middle of a move
            if self._ahead is not None:
                self._end_ahead(self._ahead)
            if not self.keep:  # no further prompts need the experts
                self.free()
            # on the CPU nothing has to move, unless --lazy_loading frees experts
            elif self.device.type != "cpu" or self.lazy:
                self._plan = ()
                for expert in [*self._working]:
                    self._offload(expert)
            free_memory(self.device)

    @contextmanager
    def moved_to_host(self) -> Iterator[None]:
        """Move the working networks to host memory during the block.

        A network with a copy in host memory is only dropped from the device.

        Raises:
            MemoryPlanError: If the host has too little memory for them; the system might kill the process.
        """
        working = [(self._dits[expert], self._copies.get(expert)) for expert in self._working]
        weights = sum(bytes_on(dit, self.device) for dit, copy in working if copy is None)
        room = self.free_host_memory()
        if room is not None and weights > room:
            raise MemoryPlanError(
                f"the transformer would have to wait in host memory, which has {gib(room)} GiB free; it "
                f"takes {gib(weights)} GiB"
            )
        try:
            for dit, copy in working:
                if copy is None:
                    move_network(dit, CPU)
                else:
                    copy.free_device_memory()
            free_memory(self.device)
            yield
        finally:
            for dit, copy in working:
                _move_to_device(dit, copy, self.device)

    def can_stay(self, needed: int | None) -> bool:
        """Return whether the loaded networks may stay on the device during other work.

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
        self._copies = {}
        self._working = set()

    def _bring(self, expert: int) -> nn.Module:
        """Move an expert to the device, and start reading the next one.

        Experts on the device are moved away first, unless all of them fit.
        """
        # this expert's next turn in the plan; skipped turns are of requests that failed or ended early
        remaining_turns = range(self._turn, len(self._plan))
        self._turn = next((turn for turn in remaining_turns if self._plan[turn] == expert), self._turn)
        if expert not in self._working:
            if self._ahead is not None:
                self._collect_ahead(expert, self._ahead)
            for working in [*self._working]:
                if not self._may_stay(working, expert):
                    self._offload(working)
            if expert not in self._dits:
                self._dits[expert] = self.load(expert).eval().requires_grad_(False)
                self._working.add(expert)
            else:
                self._working.add(expert)  # before moving, which may be interrupted half-way
                try:
                    _move_to_device(self._dits[expert], self._copies.get(expert), self.device)
                except Exception:
                    # most likely too little memory: move it back, so that a smaller video can still use it
                    self._offload(expert)
                    raise
            if len(self._working) > 1 and not self.keep:
                self._copies.pop(expert, None)  # it stays on the device until it is freed
            if len(self.experts) > 1:
                self._look_ahead(expert)
        return self._dits[expert]

    def _may_stay(self, working: int, coming: int) -> bool:
        """Return whether a working expert may stay on the device together with the next one.

        The next expert is assumed to be of the same size.
        """
        if self.together:
            return True
        if self.lazy:
            return False
        weights = bytes_on(self._dits[working], self.device)
        if self.device.type == "cpu":
            room = self.free_host_memory()
            is_loaded = coming in self._dits  # needs no more memory
            return is_loaded or room is None or weights <= room
        if self.device.type != "cuda" or self.one_at_a_time:
            return False
        # assume that the next steps need as much memory besides the weights as the past steps
        step_bytes = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        return self.can_stay(weights + step_bytes)

    def _offload(self, expert: int) -> None:
        """Move an expert to host memory, or free it if it is not needed again or does not fit."""
        is_needed_again = self.keep or not self._plan or expert in self._plan[self._turn :]
        if self.lazy or not is_needed_again:
            self._free(expert)
            return
        dit = self._dits[expert]
        copy = self._copies.get(expert)
        weights = bytes_on(dit, self.device)
        room = self.free_host_memory()
        if copy is not None:  # the host has the weights already: only the device's memory is freed
            copy.free_device_memory()
        elif self.device.type == "cpu" or (room is not None and weights > room):
            logger.info(
                "The host has no room for a transformer that waits: it is loaded again when it is needed"
            )
            self._free(expert)
            return
        elif self.device.type == "cuda" and len(self.experts) > 1:
            self._copies[expert] = self.make_copy(dit, self.device)  # kept, so that it is copied only once
        else:
            move_network(dit, CPU)
            free_memory(self.device)
        self._working.remove(expert)

    def _free(self, expert: int) -> None:
        self._working.remove(expert)
        self._copies.pop(expert, None)
        del self._dits[expert]
        free_memory(self.device)

    def _look_ahead(self, present: int) -> None:
        """Start reading the next expert into host memory, if the host has enough."""
        # the plan lists the experts in the order in which they denoise
        coming = next((expert for expert in self._plan[self._turn :] if expert != present), None)
        if coming is None or coming in self._dits or self._ahead is not None or self.load_to_host is None:
            return
        words = self.experts[coming].words
        reason = self._explain_not_ahead(present)
        if reason:
            if coming not in self._logged:
                logger.info("The %s is loaded when its steps begin%s", words, reason)
                self._logged.add(coming)
            return
        logger.info("The %s is read into host memory while the %s works", words, self.experts[present].words)
        stop = threading.Event()

        def check() -> None:
            if stop.is_set():
                raise ReadingStopped

        load = torch.no_grad()(self.load_to_host)  # each thread has its own gradient mode
        pool = ThreadPoolExecutor(1, "loading ahead")  # `load_to_host` uses a CUDA stream of its own
        reading = pool.submit(load, coming, check)
        pool.shutdown(wait=False)  # the thread ends after this one job
        self._ahead = ReadingAhead(coming, reading, stop)

    def _explain_not_ahead(self, present: int) -> str:
        """Return why the next expert cannot be read while this one works, as log text; "" if it can."""
        if self.lazy:
            return ", as --lazy_loading asks"
        if self.device.type not in {"cpu", "cuda"}:  # a thread must not compute on others
            return f": {self.device.type} cannot prepare it while it works"
        dit = self._dits[present]  # the next one is as large
        room = self.free_host_memory()
        needed = sum(tensor.nbytes for tensor in chain(dit.parameters(), dit.buffers()))
        if room is not None and needed > room:
            return f": the host has {gib(room)} GiB free, it takes {gib(needed)} GiB"
        return ""

    def _collect_ahead(self, expert: int, ahead: ReadingAhead) -> None:
        """Take over an expert that was read ahead; raise the error of its thread.

        If the thread only ran out of memory, return without the expert: it is loaded once the other one is
        done.
        """
        if ahead.expert != expert:  # its request ended before this expert was needed: drop it
            self._end_ahead(ahead)
            return
        if not ahead.reading.done():
            logger.info("Waiting for the %s, which is still being read", self.experts[expert].words)
        ahead.join()  # after Ctrl-C here, `phase` still ends the thread
        self._ahead = None  # also if reading failed: the next video tries again
        try:
            dit, copy = ahead.reading.result()
        except (torch.OutOfMemoryError, MemoryError):
            logger.info(
                "There was no memory to read the %s ahead: it is loaded now", self.experts[expert].words
            )
            return
        self._dits[expert] = dit.eval().requires_grad_(False)
        if self.device.type != "cpu":
            self._copies[expert] = copy

    def _end_ahead(self, ahead: ReadingAhead) -> None:
        ahead.stop.set()
        ahead.join()
        self._ahead = None


def _move_to_device(dit: nn.Module, copy: WaitingNetwork | None, device: torch.device) -> None:
    if copy is not None:
        copy.to_device()
    elif device.type != "cpu":  # where it was loaded
        move_network(dit, device)

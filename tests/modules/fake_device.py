"""A device boundary on the CPU, as hostile as a real one allows: it shows every mistake of whoever uses
it.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from runtime.offload.host_memory import Pairs, Transfer

NONSENSE = 255  # in every byte: not a number in all floating types


class Interruption(BaseException):
    """Comes from anywhere, as Ctrl-C."""


class CountedMemory:
    """Before a `Transfer` among the bases: it knows how much of its memory is in use, and the most ever."""

    used = maximum = 0

    def allocate(self, size_bytes: int) -> Tensor:
        memory: Tensor = super().allocate(size_bytes)  # type: ignore[misc]  # of the class it stands before
        self.used += size_bytes
        self.maximum = max(self.maximum, self.used)
        weakref.finalize(memory.untyped_storage(), self._free, size_bytes)
        return memory

    def _free(self, size_bytes: int) -> None:
        self.used -= size_bytes


def hide(tensor: Tensor) -> None:
    """Make host memory useless for computing, as it is to a device: all bits are turned round. Again, and it
    is as before.
    """
    tensor.view(-1).view(torch.uint8).bitwise_not_()


class FakeDevice(Transfer):
    """A `Transfer`. Host memory is expected to be hidden.

    A copy arrives when it is waited for, at the very latest moment; from when it is asked for its target is
    nonsense. New memory is filled by the computation, as torch does for deterministic algorithms: a copy into
    it has to come after that. `log` has everything that was asked for.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock = 0  # set from outside
        self.ages: list[int] = []  # at each wait: how long ago, by that clock, the copy was asked for
        self._asked: dict[int, int] = {}
        self.live_bytes = 0
        self._waiting: list[Pairs] = []
        self._done = 0
        self._queued = 0  # of computations
        self._memory: dict[int, int] = {}  # address -> the computation that fills it with nonsense

    def allocate(self, size_bytes: int) -> Tensor:
        memory = torch.full((size_bytes,), NONSENSE, dtype=torch.uint8)
        self.live_bytes += size_bytes
        self.log.append("memory")
        self._queued += 1
        self._memory[memory.untyped_storage().data_ptr()] = self._queued
        return memory

    def record_event(self) -> Any:
        self.log.append("mark")
        return self._queued

    def copy(self, pairs: Pairs, after: Any) -> int:
        assert pairs
        made = [self._memory.get(target.untyped_storage().data_ptr(), 0) for target, _ in pairs]
        assert after >= max(made), "the computation would fill the memory after the copy"
        read = {source.untyped_storage().data_ptr() for waiting in self._waiting for _, source in waiting}
        if any(target.untyped_storage().data_ptr() in read for target, _ in pairs):
            self.finish()  # a real device reads before it writes over it, in the order of the copies
        self.log.append("in" if self._is_here(pairs[0][0]) else "out")
        for target, _ in pairs:
            target.view(-1).view(torch.uint8).fill_(NONSENSE)
        self._waiting.append(list(pairs))
        moment = self._done + len(self._waiting)
        self._asked[moment] = self.clock
        return moment

    def wait(self, moment: int) -> None:
        self.log.append("wait")
        self.ages.append(self.clock - self._asked[moment])
        self._arrive(moment)

    def finish(self) -> None:
        self._arrive(self._done + len(self._waiting))

    def _arrive(self, moment: int) -> None:
        while self._done < moment:
            for target, source in self._waiting.pop(0):
                target.copy_(source)
                assert self._is_here(target) != self._is_here(source)
                hide(target)
            self._done += 1

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._memory

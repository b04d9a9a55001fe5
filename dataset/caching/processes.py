"""The share of one process in work that several processes do together (`accelerate launch`, torchrun)."""

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from modules.errors import OptionError

T = TypeVar("T")

# torchrun and accelerate, then Intel MPI, Open MPI, MVAPICH
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
PATIENCE = datetime.timedelta(days=7)  # timeout: one share may take far longer than another


@dataclass(frozen=True)
class Share:
    """Process `rank` of `count`."""

    rank: int
    count: int
    local_rank: int  # among the processes of this machine
    group: Any = None  # of torch.distributed; None for a single process

    @property
    def is_main(self) -> bool:
        """Return whether this process does the work that only one process may do."""
        return self.rank == 0

    def of(self, work: Sequence[T]) -> Sequence[T]:
        """Return this process's pieces, every `count`-th, of a list that all processes have."""
        return work[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, when all have called this."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def device_name(self, name: str | None) -> str | None:
        """Return the given device; if there is none and several processes run, the GPU of this process."""
        if name is None and self.count > 1 and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name


@contextlib.contextmanager
def join_processes(environment: Mapping[str, str] | None = None) -> Iterator[Share]:
    """Join the processes that a launcher (torchrun, accelerate, mpirun) started; yield this one's share.

    Processes communicate through gloo, on the CPU, whatever device they encode on.
    Raises OptionError if the launcher's variables are incomplete.
    """
    variables = os.environ if environment is None else environment
    rank, count, local_rank = (_first(variables, names) for names in (RANK, COUNT, LOCAL_RANK))
    if count is None or count <= 1:
        yield Share(0, 1, 0)
        return
    if rank is None:
        raise OptionError(
            f"WORLD_SIZE is {count}, but RANK is not set: start the processes with accelerate launch or "
            "torchrun"
        )
    started_here = not dist.is_initialized()
    if started_here:
        address = f"tcp://{variables.get('MASTER_ADDR', '127.0.0.1')}:{variables.get('MASTER_PORT', '29500')}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Share(rank, count, local_rank or 0, group)
    finally:
        if started_here:
            dist.destroy_process_group()


def _first(variables: Mapping[str, str], names: Sequence[str]) -> int | None:
    return next((int(variables[name]) for name in names if name in variables), None)

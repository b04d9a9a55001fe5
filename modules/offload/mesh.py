"""Lay out the processes of a run: micro-batches x passes of a step x tokens of a clip.

Neighbours share the tokens of a clip (--context_parallel), as they exchange most; round them stand those that
share the passes of a step (--cfg_parallel), round these those with micro-batches of their own. A transformer
that is split (--shard_base) has its parts in all of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("data", "passes", "context")  # the last one changes fastest


@dataclass(frozen=True)
class ProcessGrid:
    """How many processes share what, and where this one stands."""

    rank: int  # of this process, from 0
    data: int  # groups of processes with micro-batches of their own (`ShardingOptions.groups_of`)
    passes: int = 1  # parts of a group that share the passes of a step
    context: int = 1  # processes of a part, which share the tokens of a clip

    @property
    def pass_rank(self) -> int:
        """Return which part of the passes of a step this process runs."""
        return self.rank // self.context % self.passes

    @property
    def context_rank(self) -> int:
        """Return which part of a clip's tokens this process has."""
        return self.rank % self.context


def device_mesh(grid: ProcessGrid, device: torch.device) -> "DeviceMesh":
    """Make the groups of processes, with the names in `AXES`. All processes must call it."""
    from torch.distributed.device_mesh import init_device_mesh  # of no use to a single process

    return init_device_mesh(device.type, (grid.data, grid.passes, grid.context), mesh_dim_names=AXES)

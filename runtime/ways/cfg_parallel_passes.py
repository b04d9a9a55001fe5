"""Divide the passes of a step over processes.

The velocity of a pass comes from the process that runs it, so that all processes get bit-identical results.
"""

import torch
from torch import Tensor

from protocols.steps import Calls, Overrides, PassVelocities, Predict, Section
from runtime.offload.context import ProcessGrid, device_mesh
from runtime.offload.sharding import gather_parts


class SharedPasses:
    """Divide the network passes of each step over processes, and return all results in each process.

    Each pass runs separately. If the transformer is split too, all processes run passes that skip the same
    blocks at the same time; if there are fewer such passes than processes, some passes run twice.
    """

    def __init__(self, grid: ProcessGrid, in_lockstep: bool, device: torch.device) -> None:
        """Prepare to share passes; all processes must have joined.

        Args:
            grid: Layout of the processes.
            in_lockstep: Whether the transformer is split too, so that all processes must run equal passes.
            device: Device of this process.
        """
        self.processes = grid.passes
        self._rank = grid.rank // grid.context % grid.passes  # neighbors share the tokens of a clip
        self._group = device_mesh(grid, device)["passes"].get_group()
        self._in_lockstep = in_lockstep

    def __call__(self, calls: Calls, predict: Predict, section: Section) -> PassVelocities:
        """Run this process's share of a step's passes, and return the velocities of all passes, float32.

        `calls` maps overrides (changes to one call) to {id: conditions}; the result maps (overrides, id) to
        velocities.
        """
        velocities: dict[tuple[Overrides, int], Tensor] = {}
        for group in self._group_passes(calls):  # passes that can run at the same time
            for start in range(0, len(group), self.processes):
                concurrent_passes = group[start : start + self.processes]
                velocity = section.noise.new_zeros(section.noise.shape, dtype=torch.float32)
                # in lockstep a process without a pass repeats one, because it has to gather the same blocks
                if self._in_lockstep or self._rank < len(concurrent_passes):
                    overrides, key = concurrent_passes[self._rank % len(concurrent_passes)]
                    (predicted,) = predict(calls[overrides][key], overrides=overrides)
                    velocity.copy_(predicted)
                # B C F H W of each process, one after the other
                gathered = velocity.new_empty(self.processes * len(velocity), *velocity.shape[1:])
                gather_parts(gathered, velocity, self._group)
                velocities.update(zip(concurrent_passes, gathered.chunk(self.processes), strict=False))
        return velocities

    def _group_passes(self, calls: Calls) -> list[list[tuple[Overrides, int]]]:
        """Return groups of passes that can run at the same time: those in a group skip the same blocks."""
        groups: dict[object, list[tuple[Overrides, int]]] = {}
        for overrides, conditions in calls.items():
            passes = [(overrides, key) for key in conditions]
            groups.setdefault(overrides.skip_blocks if self._in_lockstep else None, []).extend(passes)
        return list(groups.values())

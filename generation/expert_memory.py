"""What a model's experts hold in host memory while they take turns on the device, for the memory plan.

The rules are those of `generation.experts.DitTurns`, counted here without loading anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from generation.experts import TurnRules, plan_turns
from generation.options import GenerationOptions
from modules.contract.family import Family
from modules.contract.prepared import Prepared
from modules.planning.dry_run import WEIGHTS
from modules.planning.memory_plan import NAMES, MemoryPart, MemoryPlan, Phase, Room, Swapped, gib


@dataclass(frozen=True)
class ExpertTurns:
    """Who works when in a run. order: indices of experts, as `plan_turns` gives them."""

    order: tuple[int, ...] = ()
    rules: TurnRules = TurnRules()
    in_fp8: bool = False  # so that nothing makes them smaller

    @property
    def count(self) -> int:
        """Return how many experts work in the run."""
        return len(set(self.order))

    def host_peak(self, weights: int, swapped: int) -> int:
        """Return the most host memory that the experts hold, in bytes, if the host has room for all of it.

        weights: all of an expert. swapped: what of it stays in host memory also while it works.
        """
        if self.rules.lazy:
            return swapped
        held: dict[int, int] = {}
        most = 0
        for place, expert in enumerate(self.order):
            later = self.order[place + 1 :]
            held.setdefault(expert, swapped)
            if later:
                held.setdefault(later[0], weights)  # read ahead while this one works
            most = max(most, sum(held.values()))
            if self.rules.keep or expert in later:
                held[expert] = weights  # it waits for its next turn
            else:
                del held[expert]
            most = max(most, sum(held.values()))
        return most

    def parts(self, weights: int, swap: Swapped) -> tuple[MemoryPart, ...]:
        """Return the line of a plan for experts that do not work; none if only one expert works.

        weights: all of an expert. What the one that works has swapped is in the line of its weights.
        """
        if self.count < 2:
            return ()
        note = "each is loaded when its steps begin"
        if not self.rules.lazy:
            note = "in host memory, if it has room; else they are loaded again"
        return (MemoryPart("experts that wait", 0, self.host_peak(weights, swap.host) - swap.host, note),)

    def remarks(self, plan: MemoryPlan, denoising: Phase, room: Room | None, host: int | None) -> list[str]:
        """Return what the free memory means for experts. room: of the device. host: bytes. None: unknown."""
        if self.count < 2:
            return []
        lines = []
        weights = sum(part.device for part in denoising.parts if part.name == NAMES[WEIGHTS])
        together = denoising.device + (self.count - 1) * weights
        stays = not (self.rules.lazy or self.rules.never_beside)
        if stays and room is not None and together <= room.usable:
            lines.append(
                f"The device has room for all experts at once, {gib(together)} GiB: they stay there. "
                "--offload_inactive_dit keeps one at a time."
            )
        if host is not None and plan.host > host:
            smaller = "" if self.in_fp8 else " --fp8_scaled halves what they take."
            lines.append(
                f"The host has {gib(host)} GiB free, and {gib(plan.host)} are asked for: experts will be "
                f"loaded again instead of waiting.{smaller}"
            )
        return lines


ALONE = ExpertTurns()  # of a model with one transformer


def turns_of(family: Family, options: GenerationOptions, requests: Sequence[Prepared]) -> ExpertTurns:
    """Return who works when as these requests are made one after the other, each --num_videos times."""
    given = options.experts
    rules = TurnRules(options.interactive, given.offload_inactive_dit, given.lazy_loading)
    order = plan_turns(family, [*requests] * options.num_videos)
    return ExpertTurns(tuple(order), rules, options.speed.fp8.quantisation is not None)

"""Plan a run: the requests it makes, and the host memory of experts that wait for their turn.

The rules are those of `generation.experts.ExpertOffloader`, counted here without loading anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from checkpoints.stored.forms import get_quantized_weight
from generation.experts import list_expert_order
from generation.grid_options import list_cells
from generation.loaded_networks import needs_media
from generation.network_setup import expert_loras
from generation.options import GenerationOptions
from generation.prompt_lines import parse_generation_line, read_prompt_lines
from generation.request import prepare_line
from modules.console import quiet
from modules.devices import format_gib
from modules.errors import OptionError, UserError
from modules.media.reading import image_size
from networks.apply import Change, LoraPatch
from networks.loading import select_network_part
from networks.rank_masks import has_rule
from networks.unmerged_loras import masked_changes, split_masked
from protocols.family import Family
from protocols.loading import Placement
from protocols.requests import Prepared
from runtime.planning.device_memory import DeviceMemory
from runtime.planning.dry_run import WEIGHTS
from runtime.planning.memory_plan import (
    PART_NAMES,
    MemoryPart,
    MemoryPlan,
    OffloadedWeights,
    Phase,
    sharing_processes,
)


@dataclass(frozen=True)
class ExpertSchedule:
    """Order in which a run uses its experts.

    Attributes:
        order: Indices of experts, from `list_expert_order`.
    """

    order: tuple[int, ...] = ()
    # see `ExpertOffloader`
    keep: bool = False
    one_at_a_time: bool = False
    lazy: bool = False
    all_stay_on_device: bool = False
    in_fp8: bool = False  # so that nothing makes them smaller

    @property
    def count(self) -> int:
        """Number of different experts (high-noise, low-noise) that the run uses."""
        return len(set(self.order))

    def host_peak(self, weights: int, swapped: int) -> int:
        """Return the peak host memory of all experts in bytes, on a host that has room for it.

        Replays `order`. While an expert denoises, the next one is read into host memory. Afterwards the
        expert waits in host memory if it is needed again; otherwise it is freed.

        Args:
            weights: Bytes of a full expert.
            swapped: Bytes of the part that is in host memory even while the expert denoises.
        """
        if self.lazy:  # each expert is freed after its steps, and none is read ahead
            return swapped
        host_bytes_by_expert: dict[int, int] = {}
        peak = 0
        for index, expert in enumerate(self.order):
            later_experts = self.order[index + 1 :]
            host_bytes_by_expert.setdefault(expert, swapped)
            if later_experts:
                host_bytes_by_expert.setdefault(later_experts[0], weights)
            peak = max(peak, sum(host_bytes_by_expert.values()))  # while the expert denoises
            is_needed_again = self.keep or expert in later_experts  # `keep`: for the next prompt
            if is_needed_again:
                host_bytes_by_expert[expert] = weights
            else:
                del host_bytes_by_expert[expert]
            peak = max(peak, sum(host_bytes_by_expert.values()))  # after its steps
        return peak

    def list_idle_parts(self, weights: int, swap: OffloadedWeights) -> tuple[MemoryPart, ...]:
        """Return the memory plan's line for experts that are not denoising; () if there is one expert.

        Swapped weights of the denoising expert are in host memory too, but belong to its own line.

        Args:
            weights: Bytes of a full expert.
            swap: Weights that leave the device because blocks are swapped or split over processes.
        """
        if self.count < 2:
            return ()
        if self.all_stay_on_device:  # without the weights that other processes have
            return (MemoryPart("idle experts", (self.count - 1) * (weights - swap.on_other_processes)),)
        note = "each is loaded when its steps begin"
        if not self.lazy:
            note = "in host memory, if it has room; else they are loaded again"
        return (
            MemoryPart(
                "experts that wait", 0, self.host_peak(weights, swap.host_bytes) - swap.host_bytes, note
            ),
        )

    def describe_fit(
        self,
        plan: MemoryPlan,
        denoising: Phase,
        device_memory: DeviceMemory | None,
        free_host_bytes: int | None,
    ) -> list[str]:
        """Return notes if all experts fit on the device together, or if the host lacks memory for them.

        Args:
            plan: The memory plan.
            denoising: Phase of denoising.
            device_memory: Memory of the device; None if unknown.
            free_host_bytes: Free host memory in bytes; None if unknown.
        """
        if self.count < 2 or self.all_stay_on_device:
            return []
        notes = []
        weight_bytes = sum(part.device for part in denoising.parts if part.name == PART_NAMES[WEIGHTS])
        bytes_with_all_experts = denoising.device + (self.count - 1) * weight_bytes
        may_stay = not (self.lazy or self.one_at_a_time)
        if may_stay and device_memory is not None and bytes_with_all_experts <= device_memory.usable:
            notes.append(
                f"The device has room for all experts at once, {format_gib(bytes_with_all_experts)} GiB: "
                "they stay there. --offload_inactive_dit keeps one at a time."
            )
        if free_host_bytes is not None and plan.host > free_host_bytes:
            smaller = "" if self.in_fp8 else " --fp8_scaled halves their size."
            notes.append(
                f"The host has {format_gib(free_host_bytes)} GiB free, but {format_gib(plan.host)} are "
                f"needed: experts will be loaded again instead of waiting.{smaller}"
            )
        return notes


SINGLE_EXPERT = ExpertSchedule()  # of a model with one transformer


def make_expert_schedule(
    family: Family, options: GenerationOptions, requests: Sequence[Prepared]
) -> ExpertSchedule:
    """Return how the experts alternate over all requests in sequence, each generated --num_videos times."""
    return ExpertSchedule(
        tuple(list_expert_order(family, [*requests] * options.num_videos)),
        keep=options.interactive,
        one_at_a_time=options.experts.offload_inactive_dit,
        lazy=options.experts.lazy_loading,
        all_stay_on_device=sharing_processes(options.speed) > 1,
        in_fp8=options.speed.fp8.quantization is not None,
    )


def all_requests(family: Family, options: GenerationOptions) -> list[Prepared]:
    """Return the requests of the run, in order; there is at least one.

    Invalid lines are skipped if at least one line is valid; their errors are reported when their turn comes.
    """
    requests: list[Prepared] = []
    errors: list[UserError] = []
    for line in read_prompt_lines(options.from_file).values():
        try:
            with quiet():
                line_values = parse_generation_line(line, options.line_options) if line else {}
                for _, values in list_cells(options.axes, line_values):
                    requests.append(prepare_line(family, options, values))
        except UserError as error:
            errors.append(error)
    if not requests:
        raise errors[0] if errors else OptionError(f"--from_file {options.from_file}: the file has no prompt")
    return requests


def find_largest(family: Family, requests: Sequence[Prepared]) -> list[Prepared]:
    """Return the requests that no other exceeds in frame size, number of frames and references.

    Usually there is one. If several remain, only a dry run of each shows which one needs the most memory: a
    longer video made in sections may need no more than a short one.
    """
    # only the last request of each size is used: one that also encodes media, if there is one
    request_by_size: dict[tuple[int, int, int], Prepared] = {}
    for prepared in sorted(requests, key=lambda prepared: needs_media(family, prepared)):
        paths = () if family.references is None else prepared.request.control_images
        reference_pixels = sum(prod(image_size(path)) for path in paths)  # before they are resized
        size = (prepared.width * prepared.height, prepared.frames, reference_pixels)
        request_by_size[size] = prepared

    def is_exceeded(size: tuple[int, int, int]) -> bool:
        """Return whether another request has at least the same area, frames and reference pixels."""
        for other in request_by_size:
            if other != size and all(larger >= value for larger, value in zip(other, size, strict=True)):
                return True
        return False

    return [prepared for size, prepared in request_by_size.items() if not is_exceeded(size)]


def load_dit_with_unmerged_loras(
    family: Family, options: GenerationOptions, placement: Placement
) -> tuple[nn.Module, Mapping[str, Sequence[Change]]]:
    """Load the first expert on the meta device, with the LoRAs that stay separate from its weights.

    LoRA files are read only if they stay separate: in a quantized network, or with a T-LoRA. All other LoRAs
    are merged into the weights and need no memory of their own.

    Returns:
        The network, and the changes by LoRAs that stay separate, by name of the weight.
    """
    dit = family.load_dit(placement)
    lora_files = options.lora.lora_weight
    is_stored = any(map(get_quantized_weight, dit.modules()))
    if lora_files is None or not (is_stored or has_rule(lora_files)):
        return dit, {}
    first_loras = select_network_part(expert_loras(family, options)[0], selects_text_encoders=False)
    # T-LoRAs mask ranks by timestep, so they always stay separate
    plain_loras, t_loras = split_masked(first_loras)
    changes: dict[str, list[Change]] = {}
    if plain_loras and is_stored:  # load again: the patch collects the changes that cannot be merged
        patch = LoraPatch(plain_loras)
        patched_placement = replace(placement, patch=patch, leave_unmerged=patch.leave_unmerged)
        dit = family.load_dit(patched_placement)
        changes = {name: [*weight_changes] for name, weight_changes in patch.unmerged.items()}
    if t_loras:
        for name, weight_changes in masked_changes(dit, t_loras).items():
            changes.setdefault(name, []).extend(weight_changes)
    return dit, changes

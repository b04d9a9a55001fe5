"""Denoise jobs in groups, each with its own LoRAs, on a network that is loaded once if possible."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from generation import network_setup
from generation.experts import list_expert_order
from generation.request import EncodedJob, GenerationRun, JobsWithNetworks
from networks.apply import OriginalWeights
from networks.loading import select_network_part
from networks.unmerged_loras import split_masked
from protocols.steps import DitAt

MAX_TIMESTEP = 1000.0


@dataclass(frozen=True)
class LoraGroup:
    """Jobs that are denoised with the same LoRAs."""

    uses: network_setup.LorasByExpert
    jobs: Sequence[EncodedJob]


def group_by_blocks(run: GenerationRun, encoded_jobs: Sequence[EncodedJob]) -> list[LoraGroup]:
    """Return the jobs in groups of equal strengths by block (--lb in prompt lines), in order of appearance.

    Raises:
        OptionError: If the strengths of a line do not fit the LoRA files.
    """
    jobs_by_blocks: dict[tuple[str, ...] | None, list[EncodedJob]] = {}
    for encoded in encoded_jobs:
        jobs_by_blocks.setdefault(encoded.job.lora_blocks, []).append(encoded)
    groups = []
    for blocks, jobs in jobs_by_blocks.items():
        options = run.options if blocks is None else network_setup.with_blocks(run.options, blocks)
        groups.append(LoraGroup(network_setup.expert_loras(run.family, options, with_texts=True), jobs))
    return groups


def load_for_groups(run: GenerationRun, groups: Sequence[LoraGroup]) -> JobsWithNetworks:
    """Yield the jobs of each group with networks that have the group's LoRAs.

    A plain network is loaded once, and its weights are changed for each group. A quantized, swapped or
    compiled network, or one with T-LoRAs, is loaded again for each group. So are several experts, because
    copies of their original weights would double the host memory.
    """
    dits = run.session.dits
    before = dits.load, dits.load_to_host
    speed = run.options.speed
    is_plain = speed.fp8.quantization is None and not speed.swap.number and speed.compilation.choice is None
    # they wrap layers instead of changing weights
    has_t_loras = any(split_masked(uses)[1] for group in groups for uses in group.uses)
    try:
        if is_plain and not has_t_loras and len(run.family.experts) <= 1:
            yield from _load_switched_networks(run, groups)
            return
        for group in groups:
            with _begin_phase(run, group.jobs, group.uses) as dit_at:
                yield group.jobs, dit_at
    finally:
        dits.free()  # networks that are kept for the next prompt would have the LoRAs of the last group
        dits.load, dits.load_to_host = before


def _load_switched_networks(run: GenerationRun, groups: Sequence[LoraGroup]) -> JobsWithNetworks:
    """Load the network once, and change its LoRAs for each group; yield the group's jobs and network."""
    dit_uses = [select_network_part(group.uses[0], selects_text_encoders=False) for group in groups]
    all_uses = [use for uses in dit_uses for use in uses]
    originals = OriginalWeights(all_uses, rounding=run.options.lora_rounding)
    all_jobs = [encoded for group in groups for encoded in group.jobs]
    with _begin_phase(run, all_jobs, (), [originals]) as dit_at:
        for group, uses in zip(groups, dit_uses, strict=True):
            originals.switch(dit_at(MAX_TIMESTEP), uses)
            yield group.jobs, dit_at


def _begin_phase(
    run: GenerationRun,
    encoded_jobs: Sequence[EncodedJob],
    uses: network_setup.LorasByExpert,
    originals: Sequence[OriginalWeights] | None = None,
) -> AbstractContextManager[DitAt]:
    """Return a context that loads the networks with LoRAs, and yields a function from timestep to network."""
    dits = run.session.dits
    dits.free()  # of the group before
    loader = network_setup.dit_loader(run.family, uses, dits.device, run.options, originals=originals)
    dits.load = loader
    dits.load_to_host = loader.load_to_host
    return dits.phase(list_expert_order(run.family, [encoded.job.prepared for encoded in encoded_jobs]))

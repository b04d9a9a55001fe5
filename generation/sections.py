"""From a checked request to clean latents: denoise the family's sections one after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_options import PLAIN_GUIDANCE, GuidanceOptions
from blissful_tuner.step_cache import StepCaches
from blissful_tuner.video_to_video import noisy_source
from generation.denoise import Start, denoise
from generation.noise import SeededNoise
from modules.contract.data import Conditions
from modules.contract.family import Family
from modules.contract.generation import DitAt, EncodedPrompts, Section
from modules.contract.prepared import Prepared
from modules.contract.steps import Watcher
from modules.devices import send
from modules.flow.solvers import Solver, solver_for

OnSection = Callable[[Section], None]


def make_latents(
    family: Family,
    dit_at: DitAt,
    prepared: Prepared,
    prompts: Mapping[int, EncodedPrompts],
    inputs: Mapping[int, Conditions],
    device: torch.device,
    cpu_noise: bool = False,
    guidance_options: GuidanceOptions = PLAIN_GUIDANCE,
    watchers: Sequence[Watcher] = (),
    split: bool = True,
    on_section: OnSection | None = None,
) -> Tensor:
    """Make the latents of one request. Returns B C F H W in model space, float32, on the device.

    prompts, inputs: by section, from `Session.texts` and `session.encode_inputs` (on the CPU). dit_at:
    timestep -> the network to call, which is left as it is: evaluation mode and its device are the caller's.
    watchers, split: see `denoise`. on_section: told of each section before it is denoised; the network may
    leave its device meanwhile.
    """
    noise = SeededNoise(prepared.seed, device, cpu_noise or family.defaults.noise_on_cpu)
    sections = family.sections(prepared, prompts, inputs, noise)
    caches = StepCaches(prepared, family.dit)
    try:
        section = next(sections)
        while True:
            if on_section is not None:
                on_section(section)
            section = on_device(replace(section, made=None), device)
            solver = solver_for(prepared.solver, prepared.steps, prepared.flow_shift, family.noise.table)
            guidance = make_guidance(prepared, guidance_options, family.experts)
            with caches.section(dit_at) as cached_at:
                latents = denoise(
                    family,
                    cached_at,
                    section,
                    start_of(section, solver, prepared),
                    solver,
                    guidance,
                    watchers,
                    split,
                )
            section = sections.send(latents)
    except StopIteration as end:
        caches.report()
        return end.value


def start_of(section: Section, solver: Solver, prepared: Prepared) -> Start:
    """Begin with noise, or with what a section starts from at a later step."""
    if section.source is None:
        return Start(section.noise)
    step = prepared.first_step
    return Start(noisy_source(section.source, section.noise, solver.schedule, step), step)


def on_device(section: Section, device: torch.device) -> Section:
    """Return the section with all inputs of the network on `device`."""

    def moved(conditions: Conditions | None) -> Conditions | None:
        return None if conditions is None else conditions_to(conditions, device)

    return replace(
        section,
        noise=section.noise.to(device),
        positive=conditions_to(section.positive, device),
        negative=moved(section.negative),
        blank=moved(section.blank),
        source=None if section.source is None else section.source.to(device),
        away=moved(section.away),
    )


def conditions_to(conditions: Conditions, device: torch.device) -> Conditions:
    """Move conditions to `device`, except whole numbers, which stay on the host."""
    return {
        name: [send(item, device) for item in value] if isinstance(value, list) else send(value, device)
        for name, value in conditions.items()
    }

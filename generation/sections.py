"""From a checked request to clean latents: the family says what to denoise, one section after the other, and
gets the results.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.options import PLAIN_GUIDANCE, GuidanceOptions
from blissful_tuner.video_to_video import noisy_source, steps_to_make
from generation.denoise import OnStep, Start, denoise
from generation.noise import SeededNoise
from modules.contract.data import Conditions
from modules.contract.family import Family
from modules.contract.generation import DitAt, EncodedPrompts, Request, Section
from modules.devices import sent
from modules.flow.solvers import Solver, solver_for

OnSection = Callable[[Section], None]


def make_latents(
    family: Family,
    dit_at: DitAt,
    request: Request,
    prompts: Mapping[int, EncodedPrompts],
    inputs: Mapping[int, Conditions],
    device: torch.device,
    cpu_noise: bool = False,
    guidance_options: GuidanceOptions = PLAIN_GUIDANCE,
    on_step: OnStep | None = None,
    split: bool = True,
    on_section: OnSection | None = None,
) -> Tensor:
    """Make the latents of one request that `Family.prepare` has filled. Returns B C F H W in model space,
    float32, on the device.

    prompts, inputs: by section, from `session.encode_texts` and `session.encode_inputs` (on the CPU). dit_at:
    timestep -> the network to call, which is left as it is: evaluation mode and its device are the caller's.
    split: see `denoise`. on_section: told of each section before it is denoised; the network may leave its
    device meanwhile.
    """
    assert request.steps is not None  # `prepare` has set them
    assert request.flow_shift is not None
    assert request.solver is not None
    noise = SeededNoise(request.seed, device, cpu_noise or family.defaults.noise_on_cpu)
    sections = family.sections(request, prompts, inputs, noise)
    try:
        section = next(sections)
        while True:
            if on_section is not None:
                on_section(section)
            section = on_device(replace(section, made=None), device)
            solver = solver_for(request.solver, request.steps, request.flow_shift, family.noise.table)
            guidance = make_guidance(request, guidance_options, steps_to_make(request))
            latents = denoise(
                family, dit_at, section, start_of(section, solver, request), solver, guidance, on_step, split
            )
            section = sections.send(latents)
    except StopIteration as end:
        return end.value


def start_of(section: Section, solver: Solver, request: Request) -> Start:
    """Noise at the first step, or what a section starts from at a later one."""
    if section.source is None:
        return Start(section.noise)
    step = solver.schedule.num_steps - steps_to_make(request)
    return Start(noisy_source(section.source, section.noise, solver.schedule, step), step)


def on_device(section: Section, device: torch.device) -> Section:
    """The section with everything the network is given on `device`."""

    def moved(conditions: Conditions | None) -> Conditions | None:
        return None if conditions is None else conditions_to(conditions, device)

    return replace(
        section,
        noise=section.noise.to(device),
        positive=conditions_to(section.positive, device),
        negative=moved(section.negative),
        blank=moved(section.blank),
        source=None if section.source is None else section.source.to(device),
    )


def conditions_to(conditions: Conditions, device: torch.device) -> Conditions:
    """Conditions whose tensors lie on `device`, but for whole numbers, which are on the host."""
    return {
        name: [sent(item, device) for item in value] if isinstance(value, list) else sent(value, device)
        for name, value in conditions.items()
    }

"""Denoise section by section: run the passes of each step, combine them by guidance, take a solver step."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_formulas import run_passes
from blissful_tuner.options import PLAIN_GUIDANCE, GuidanceOptions
from modules.devices import get_compute_dtype, send, send_ahead
from modules.flow.schedule import TRAIN_TIMESTEPS, Schedule, noisy_source
from modules.flow.solvers import Solver, solver_for
from modules.seeds import derive_seed
from networks.rank_masks import set_level
from protocols import steps
from protocols.data import Conditions
from protocols.family import Family, NoiseSource, Passes
from protocols.requests import Prepared

if TYPE_CHECKING:  # only with a step cache
    from blissful_tuner.step_cache import StepCaches


@torch.no_grad()
def denoise(
    family: Passes,
    dit_at: steps.DitAt,
    section: steps.Section,
    latents: Tensor,
    solver: Solver,
    guidance: steps.Guidance,
    watchers: Sequence[steps.StepCallback] = (),
    split: bool = True,
    first_step: int = 0,
) -> Tensor:
    """Denoise latents by following the predicted velocity.

    Each step predicts a velocity with guidance, passes it to the watchers, moves the latents with the solver,
    and restores what must not change: fixed latents, and the masked regions of an edited image.

    Args:
        family: The model family, whose `predict` is called.
        dit_at: Returns the network to call at a timestep.
        section: Conditions and shape of what is denoised.
        latents: Start of denoising, in the shape of the section's noise.
        solver: The stepping rule with its schedule.
        guidance: Combines the velocities of a step's passes.
        watchers: Called after each step's velocity is known. If one of them returns True, denoising stops,
            and the result is the clean latents predicted at that step.
        split: Run passes one by one instead of batching conditions of equal shape.
        first_step: Index of the first step in the solver's schedule; above 0 for video-to-video.

    Returns:
        The latents in the shape of the section's noise, float32, on its device.
    """
    schedule = solver.schedule
    # latents are video and audio in one tensor, B N
    is_joint = section.overrides.audio_video_shapes is not None
    is_edit = section.edit_reference is not None
    assert not (is_edit and is_joint), "an edit reference has no audio"
    has_fixed = is_joint or section.clean_frames is not None or section.fixed_latents is not None
    # whether all images are fixed, and whether all audio is
    clean_streams = section.clean_streams if is_joint else (False, False)
    latents = latents.float()
    if has_fixed or is_edit:
        latents = restore_fixed_parts(section, latents, schedule, first_step)
    for index in range(first_step, schedule.num_steps):
        step = _make_step(schedule, index, first_step, latents)
        # the predictor is not stored in a variable, because it would keep this step's network alive while
        # the next step's network is loaded
        velocity = guidance(
            step, predictor(family, dit_at, step, split, section.overrides, clean_streams), section
        ).float()
        if section.fixed_latents is not None:  # so that the prediction of fixed latents is their value
            velocity = section.fixed_latents.mix_prediction(step, velocity)
        completed = steps.CompletedStep(step, velocity, section)
        wants_to_stop = [watch(completed) for watch in watchers]  # a list, so that every watcher is called
        if any(wants_to_stop):
            return completed.clean
        if is_edit:  # undo small deviations from the original image, which would add up
            from generation.latent_masks import restore_unchanged_regions  # only for edited images

            latents = restore_unchanged_regions(section, latents, schedule, index)
        if schedule.audio_sigmas is not None:
            velocity = match_audio_schedule(section, schedule, index, velocity)
        latents = solver.step(index, velocity, latents)
        if has_fixed or is_edit:
            latents = restore_fixed_parts(section, latents, schedule, index + 1)
    return latents


def _make_step(schedule: Schedule, index: int, first_step: int, latents: Tensor) -> steps.Step:
    """Return a step with its noise levels."""
    is_last = index + 1 == schedule.num_steps
    audio_sigmas = schedule.audio_sigmas
    return steps.Step(
        index - first_step,
        schedule.num_steps - first_step,
        sigma=float(schedule.sigmas[index]),
        timestep=float(schedule.timesteps[index]),
        noisy=latents,
        audio_sigma=None if audio_sigmas is None else float(audio_sigmas[index]),
        next_timestep=0.0 if is_last else float(schedule.timesteps[index + 1]),
    )


def restore_fixed_parts(section: steps.Section, latents: Tensor, schedule: Schedule, index: int) -> Tensor:
    """Return the latents with fixed values and the masked regions of an edited image restored.

    Args:
        section: The section to denoise.
        latents: Latents before the step.
        schedule: Schedule of noise levels.
        index: Index of the step in the schedule; behind the last step, the latents are clean.
    """
    latents = insert_fixed_latents(section, latents)
    if section.edit_reference is not None:
        from generation.latent_masks import restore_outside_mask  # only for edited images

        latents = restore_outside_mask(section, latents, schedule, index)
    return latents


def match_audio_schedule(section: steps.Section, schedule: Schedule, index: int, velocity: Tensor) -> Tensor:
    """Rescale the audio's velocity so that an Euler step with the image's noise levels fits the audio's.

    Without audio, or without a separate schedule for it, the velocity is returned unchanged.

    Args:
        section: The section to denoise.
        schedule: Schedule of noise levels.
        index: Index of the step.
        velocity: Velocity of video and audio, B N.
    """
    # layout of video and audio latents in one tensor; None without audio
    audio_video = section.overrides.audio_video_shapes
    if audio_video is None or schedule.audio_sigmas is None:
        return velocity
    image, audio = audio_video.split(velocity)
    audio_change = schedule.audio_sigmas[index + 1] - schedule.audio_sigmas[index]
    image_change = schedule.sigmas[index + 1] - schedule.sigmas[index]  # the solver uses it for both streams
    return audio_video.join(image, audio * float(audio_change / image_change))


def insert_fixed_latents(section: steps.Section, latents: Tensor) -> Tensor:
    """Return the latents with the section's fixed values inserted: first frames, audio, other fixed latents.

    Fixed parts have velocity 0. They do not change in predicted clean videos, and do not affect guidance that
    measures the norm of a velocity.

    Args:
        section: The section to denoise.
        latents: Latents, B C F H W, or B N for video with audio.
    """
    if section.fixed_latents is not None:
        latents = section.fixed_latents.insert_clean(latents)
    audio_video = section.overrides.audio_video_shapes
    if audio_video is None:
        return latents if section.clean_frames is None else _put_first_frames(latents, section.clean_frames)
    image, audio = audio_video.split(latents)
    if section.clean_frames is not None:
        image = _put_first_frames(image, section.clean_frames)
    return audio_video.join(image, audio if section.clean_audio is None else section.clean_audio)


def _put_first_frames(latents: Tensor, frames: Tensor) -> Tensor:
    return torch.cat([frames, latents[:, :, frames.shape[2] :]], dim=2)


def _split_timesteps(timesteps: Tensor, step: steps.Step, clean_streams: tuple[bool, bool]) -> Tensor:
    """Return timesteps for (images, audio), B 2, from the step's timesteps, B; 0 for a clean stream."""
    audio_timesteps = timesteps
    if step.audio_sigma is not None:
        audio_timesteps = torch.full_like(timesteps, TRAIN_TIMESTEPS * step.audio_sigma)
    has_clean_images, has_clean_audio = clean_streams
    return torch.stack([timesteps * (not has_clean_images), audio_timesteps * (not has_clean_audio)], dim=1)


def predictor(
    family: Passes,
    dit_at: steps.DitAt,
    step: steps.Step,
    split: bool,
    all_passes: steps.Overrides = steps.NO_OVERRIDES,
    clean_streams: tuple[bool, bool] = (False, False),
) -> steps.Predict:
    """Return the function `predict(*conditions, overrides=...)` of a step, which returns one velocity each.

    Args:
        family: The model family.
        dit_at: Returns the network to call at a timestep.
        step: The step, with its noisy latents.
        split: Run the guidance passes one by one instead of as one batch.
        all_passes: Overrides for every pass; the overrides of each call are added.
        clean_streams: Whether all images, and whether all audio, of the section are fixed; a fixed stream has
            timestep 0.
    """
    dit = dit_at(step.timestep)
    noisy = step.noisy

    def predict(
        *conditions: Conditions, overrides: steps.Overrides = steps.NO_OVERRIDES
    ) -> tuple[Tensor, ...]:
        """Return the predicted velocity at the step's noisy latents for each of the given conditions."""
        can_stack = not split and _are_alike(conditions)  # only conditions of equal shapes form a batch
        # each group of passes forms one batch
        groups = [list(conditions)] if can_stack else [[condition] for condition in conditions]
        velocities: list[Tensor] = []
        for group in groups:
            noisy_batch = noisy.repeat(len(group), *([1] * (noisy.ndim - 1)))
            timesteps = torch.full((len(noisy_batch),), step.timestep, device=noisy.device)
            # video and audio have separate timesteps; a stream without noise has timestep 0
            if step.audio_sigma is not None or any(clean_streams):
                timesteps = _split_timesteps(timesteps, step, clean_streams)
            # for code in the network that keeps state between steps, such as a step cache
            step_position = steps.StepPosition(
                step.index,
                step.num_steps,
                timestep=step.timestep,
                next_timestep=step.next_timestep,
                pass_key=(*map(id, group), id(overrides)),  # all steps of a section use the same objects
            )
            group_overrides = replace(overrides.merge(all_passes), step_position=step_position)
            condition_batch = stack(group) if len(group) > 1 else group[0]
            set_level(dit, step.sigma, noisy.device)  # T-LoRAs mask their ranks by the noise level
            strengths = group_overrides.stage_lora_strengths
            loras = _switch_on_stage_loras(dit, strengths, noisy.device) if strengths else nullcontext()
            with loras:
                velocity = family.predict(dit, noisy_batch, timesteps, condition_batch, group_overrides)
            velocities += velocity.chunk(len(group))
        return tuple(velocities)

    return predict


def _are_alike(conditions: Sequence[Conditions]) -> bool:
    """Return whether conditions can be batched: equal names and shapes; lists may have different lengths."""
    outlines = [
        {name: isinstance(value, list) or tuple(value.shape[1:]) for name, value in condition.items()}
        for condition in conditions
    ]
    return all(outline == outlines[0] for outline in outlines)


def stack(conditions: Sequence[Conditions]) -> Conditions:
    """Concatenate the conditions of several guidance passes along the batch axis."""
    stacked: dict[str, Tensor | list[Tensor]] = {}
    for name in conditions[0]:
        values = [condition[name] for condition in conditions]
        tensors = [value for value in values if isinstance(value, Tensor)]
        stacked[name] = torch.cat(tensors) if tensors else [item for value in values for item in value]
    return stacked


class SeededNoise:
    """Random generator for the noise of one request.

    By default, the generator is on the device, and its values depend on the type of device. With `cpu_noise`,
    it is on the CPU: the values of `torch.manual_seed(seed)`, equal on every machine and in ComfyUI.
    """

    def __init__(self, seed: int, device: torch.device, cpu_noise: bool = False) -> None:
        self._device = device
        self._generator = torch.Generator(device="cpu" if cpu_noise else device).manual_seed(seed)

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw Gaussian noise and return it on the run's device."""
        drawn = torch.randn(*shape, generator=self._generator, device=self._generator.device, dtype=dtype)
        return send_ahead(drawn, self._device)  # asynchronous: solvers must not wait for the device


OnSection = Callable[[steps.Section], None]
SOURCE = "source_latents"  # key in the inputs of section 0: latents of the source for video-to-video


def make_latents(
    family: Family,
    dit_at: steps.DitAt,
    prepared: Prepared,
    prompts: Mapping[int, steps.EncodedPrompts],
    inputs: Mapping[int, Conditions],
    device: torch.device,
    cpu_noise: bool = False,
    guidance_options: GuidanceOptions = PLAIN_GUIDANCE,
    watchers: Sequence[steps.StepCallback] = (),
    split: bool = True,
    on_section: OnSection | None = None,
    run: steps.RunPasses = run_passes,
) -> Tensor:
    """Generate the latents of one request.

    Args:
        family: The model family.
        dit_at: Returns the network to call at a timestep; the caller sets evaluation mode and device.
        prepared: The request with all values resolved.
        prompts: Encoded prompts by section, from `Session.encode_texts`, on the CPU.
        inputs: Conditions from input media by section, from `encode_inputs`, on the CPU.
        device: Device of the run.
        cpu_noise: Draw noise on the CPU.
        guidance_options: Options of guidance other than its scale.
        watchers: Called after each step's velocity is known; they may stop the section.
        split: Run guidance passes one by one; families with `SamplingDefaults.one_batch` never do.
        on_section: Called before each section is denoised; the network may leave its device meanwhile.
        run: Runs the passes of a step.

    Returns:
        Latents in model space, B C F H W, or B N with `prepared.audio_video_shapes`, float32, on the device.
    """
    on_cpu = cpu_noise or family.defaults.noise_on_cpu
    noise = SeededNoise(prepared.seed, device, on_cpu)
    source = prepared.request.source
    extra_noise = None
    if source is not None and source.extra_noise:
        # a separate generator, so that extra noise does not change the other noise of a seed
        extra_noise = SeededNoise(derive_seed("extra noise", prepared.seed), device, on_cpu)
    caches = None
    if prepared.request.step_cache is not None:
        from blissful_tuner.step_cache import StepCaches  # only with a step cache

        caches = StepCaches(prepared, family.dit)
    denoiser = _SectionDenoiser(
        family,
        dit_at,
        prepared,
        noise=noise,
        extra_noise=extra_noise,
        step_caches=caches,
        guidance_options=guidance_options,
        watchers=watchers,
        split=split,
        run=run,
    )
    has_source = SOURCE in inputs.get(0, {})
    if has_source or prepared.slow_frames is not None or prepared.audio_video_shapes is not None:
        sections = iterate_sections(family, prepared, prompts=prompts, inputs=inputs, noise=noise)
    else:
        sections = family.sections(prepared, prompts, inputs, noise)
    latents = denoiser.denoise_sections(sections, device, on_section)
    if caches is not None:
        caches.report()
    return latents


@dataclass(frozen=True)
class _SectionDenoiser:
    """Denoises a clip's sections: selects solver, guidance and start latents of each; see `make_latents`."""

    family: Family
    dit_at: steps.DitAt
    prepared: Prepared
    noise: SeededNoise
    extra_noise: SeededNoise | None  # added to the noisy source latents
    step_caches: "StepCaches | None"
    guidance_options: GuidanceOptions
    watchers: Sequence[steps.StepCallback]
    split: bool
    run: steps.RunPasses

    def denoise_sections(
        self,
        sections: Generator[steps.Section, Tensor, Tensor],
        device: torch.device,
        on_section: OnSection | None,
    ) -> Tensor:
        """Denoise one section after another, and return the latents of the clip.

        Args:
            sections: Yields each section, is sent its latents, and returns the latents of the clip.
            device: Device of the run.
            on_section: Called before each section is denoised.
        """
        try:
            section = next(sections)
            while True:
                if on_section is not None:
                    on_section(section)
                # only `on_section` needs the previous piece
                section = on_device(replace(section, previous_piece=None), device)
                section = sections.send(self.denoise_section(section, device))
        except StopIteration as end:
            return end.value

    def denoise_section(self, section: steps.Section, device: torch.device) -> Tensor:
        """Denoise a section, whose inputs are on the device, and return its latents."""
        prepared, family = self.prepared, self.family
        # stages: requests that run one after another, each from the result of the previous one
        stage_request = prepared.stages[section.stage] if prepared.stages else prepared
        if section.solver is not None:  # a family's own solver may have a different number of steps
            stage_request = replace(stage_request, steps=section.solver.schedule.num_steps)
        # a solver that adds noise continues the generator of the start noise
        solver = section.solver or solver_for(
            stage_request.solver,
            stage_request.steps,
            stage_request.flow_shift,
            self.family.noise.table,
            draw=self.noise.draw,
            levels=stage_request.sigmas,
            audio_shift=stage_request.audio_shift,
        )
        # options of guidance and the step cache are for the first stage only
        guidance_options = PLAIN_GUIDANCE if section.stage else self.guidance_options
        guidance = make_guidance(stage_request, guidance_options, family.experts, self.run)
        start, first_step = section.noise, 0
        if section.source is not None and prepared.request.source is not None:
            start, first_step = _find_start(section, prepared, solver.schedule, self.extra_noise)
        with ExitStack() as stack:
            if stage_request.stage_lora_strengths:
                dit = self.dit_at(float(solver.schedule.timesteps[0]))
                stack.enter_context(_switch_on_stage_loras(dit, stage_request.stage_lora_strengths, device))
            dit_at = self.dit_at
            if self.step_caches is not None and not section.stage:
                dit_at = stack.enter_context(self.step_caches.section(dit_at))
            return denoise(
                family,
                dit_at,
                section,
                latents=start,
                solver=solver,
                guidance=guidance,
                watchers=self.watchers,
                split=self.split and not family.defaults.one_batch,
                first_step=first_step,
            )


def iterate_sections(
    family: Family,
    prepared: Prepared,
    prompts: Mapping[int, steps.EncodedPrompts],
    inputs: Mapping[int, Conditions],
    noise: NoiseSource,
) -> Generator[steps.Section, Tensor, Tensor]:
    """Yield the family's sections, each with the request's overrides and its part of the source latents.

    Send the latents of each section; the generator returns the latents of the whole video.
    """
    conditions = dict(inputs.get(0, {}))
    source = conditions.pop(SOURCE, None)  # it starts the sections, and is not an input of the network
    if source is not None:
        inputs = {**inputs, 0: conditions}
    request_overrides = steps.NO_OVERRIDES
    if prepared.slow_frames is not None or prepared.audio_video_shapes is not None:
        request_overrides = steps.Overrides(
            slow_frames=prepared.slow_frames, audio_video_shapes=prepared.audio_video_shapes
        )
    sections = family.sections(prepared, prompts, inputs, noise)
    try:
        section = next(sections)
        while True:
            section = replace(section, overrides=section.overrides.merge(request_overrides))
            if isinstance(source, Tensor):
                from blissful_tuner.video_to_video import trim_or_pad_frames  # only with a source

                # a section may end after the source, with the frame of an end image: repeat the last frame
                # from the section's first latent frame on
                source_frames = source[:, :, section.first_latent_frame :]
                section_source = trim_or_pad_frames(source_frames, section.noise.shape[2], "end")
                section = replace(section, source=section_source)
            section = sections.send((yield section))
    except StopIteration as end:
        return end.value


def _find_start(
    section: steps.Section, prepared: Prepared, schedule: Schedule, extra_noise: SeededNoise | None
) -> tuple[Tensor, int]:
    """Return the noisy source latents that denoising starts from, and the index of the first step."""
    source = prepared.request.source
    assert section.source is not None
    assert source is not None
    if section.solver is not None:  # a family's own solver adds the noise itself
        start_and_step: tuple[Tensor, int] = section.solver.begin(section.source)
        return start_and_step
    first_step = prepared.first_step
    start = noisy_source(section.source, section.noise, schedule, first_step)
    if extra_noise is not None:
        start = start + source.extra_noise * extra_noise.draw(start.shape)
    return start, first_step


@contextmanager
def _switch_on_stage_loras(
    dit: nn.Module, strengths: Sequence[float], device: torch.device
) -> Iterator[None]:
    """Enable the stage LoRAs of a network inside the `with` block; a strength of 0 leaves a LoRA off."""
    from networks.gated_loras import get_stage_loras  # only with LoRAs of stages

    with ExitStack() as stack:
        for loras, strength in zip(get_stage_loras(dit), strengths, strict=True):
            if strength:
                stack.enter_context(loras.switched_on(device, get_compute_dtype(dit), strength))
        yield


def on_device(section: steps.Section, device: torch.device) -> steps.Section:
    """Return the section with all inputs of the network on `device`.

    Conditions that share one object before the move still share one afterwards.
    """
    conditions_by_id = {id(section.positive): section.positive}
    for text in (section.negative, section.blank, section.nag):
        if text is not None:
            conditions_by_id[id(text)] = text
    moved_by_id = {key: conditions_to(text, device) for key, text in conditions_by_id.items()}
    return replace(
        section,
        noise=section.noise.to(device),
        positive=moved_by_id[id(section.positive)],
        negative=moved_by_id.get(id(section.negative)),
        blank=moved_by_id.get(id(section.blank)),
        source=None if section.source is None else section.source.to(device),
        clean_frames=None if section.clean_frames is None else section.clean_frames.to(device),
        clean_audio=None if section.clean_audio is None else section.clean_audio.to(device),
        fixed_latents=None if section.fixed_latents is None else section.fixed_latents.to(device),
        edit_reference=None if section.edit_reference is None else section.edit_reference.to(device),
        nag=moved_by_id.get(id(section.nag)),
    )


def conditions_to(conditions: Conditions, device: torch.device) -> Conditions:
    """Move the tensors of conditions to `device`, except integer tensors, which stay on the host."""
    return {
        name: [send(item, device) for item in value] if isinstance(value, list) else send(value, device)
        for name, value in conditions.items()
    }

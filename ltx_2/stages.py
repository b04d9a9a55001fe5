"""Two stages of a clip: small, with all steps and guidance; then enlarged, and refined in a few steps.

Source: the released pipelines. The second stage has fixed noise levels, no guidance and a LoRA for few steps;
the result keeps the audio of the first stage.
"""

import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from einops import rearrange
from torch import Tensor

from checkpoints.model_files import read_once, require_file
from ltx_2.audio_references import RequestReferences
from ltx_2.references import read_reference_factors, split_audio
from ltx_2.stage_options import Ltx2OfficialStages, Ltx2StageOptions
from ltx_2.upscaler import SPATIAL, TEMPORAL, ScaleFactors, is_upscaler, load_upscaler, read_scale_factors
from modules.errors import OptionError
from protocols.data import AudioVideoShapes, LatentSpec
from protocols.family import NoiseSource
from protocols.requests import Prepared
from protocols.rules import NO_GUIDANCE_RULES
from protocols.steps import Section

logger = logging.getLogger(__name__)
_LORA_OPTION = "--lora_weight"
SECOND_STAGE_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)  # noise levels of the second stage, as released


@dataclass(frozen=True)
class StageLora:
    """A LoRA with a separate strength for each stage."""

    path: Path
    option: str  # option that names the file
    first_strength: float  # strength in the first stage
    second_strength: float


@dataclass(frozen=True)
class TwoStages:
    """Settings for generating a clip in two stages."""

    upscalers: Mapping[str, Path]  # file by option, in the order in which they are applied
    steps: int  # number of steps of the second stage
    loras: tuple[StageLora, ...]
    skips_second_stage: bool = False  # whether the first stage's clip is the result

    @property
    def metadata(self) -> dict[str, str]:
        """Return the metadata of LoRAs that only one stage uses: names and strengths."""
        first_stage, second_stage = [], []
        for lora in self.loras:
            if lora.option == _LORA_OPTION:
                first_stage.append(f"{lora.path.name} {lora.first_strength:g}")
            elif not self.skips_second_stage:
                second_stage.append(f"{lora.path.name} {lora.second_strength:g}")
        metadata = {}
        if first_stage:
            metadata["first_stage_loras"] = ", ".join(first_stage)
        if second_stage:
            metadata["second_stage_loras"] = ", ".join(second_stage)
        return metadata

    def scale_factors(self, latent: LatentSpec) -> ScaleFactors:
        """Return the total factors by which the upscalers enlarge the number of frames, and the sides.

        Raises OptionError if a LoRA is an upscaler, or an upscaler is given to the other upscaler's option,
        and CheckpointError for other files.
        """
        for lora in self.loras:
            if read_once(require_file(lora.path, lora.option, "it is a LoRA"), is_upscaler):
                raise OptionError(
                    f"{lora.option} {lora.path} is a latent upscaler. Pass it to {SPATIAL}, and a LoRA here"
                )
        frames = 1
        side = Fraction(1)  # an upscaler may multiply height and width by 3/2
        for option, path in self.upscalers.items():
            scale_factors = read_scale_factors(path, option, latent.channels)
            frames *= scale_factors.frames
            side *= scale_factors.spatial
        return ScaleFactors(frames, side)

    def with_coarser_steps(self, latent: LatentSpec) -> LatentSpec:
        """Return the latent space with larger steps of size and length, which both stages can generate."""
        scale_factors = self.scale_factors(latent)
        return replace(
            latent,
            pixel_step=latent.pixel_step * scale_factors.spatial.numerator,
            frame_step=latent.frame_step * scale_factors.frames,
        )

    def split(self, prepared: Prepared, latent: LatentSpec, dtype: torch.dtype) -> Prepared:
        """Split a request into two stages: generate a small clip, then upscale and refine it.

        Without the second stage, only the first one's request is returned. `dtype` is the dtype of the
        upscalers. Raises OptionError for a request with a video to start from.
        """
        request = prepared.request
        if request.source is not None:
            raise OptionError(
                f"--{request.source.option} with --sample_two_stage: the first stage starts from noise. "
                "Omit one of them"
            )
        first = self._make_first_stage(prepared, latent)
        if self.skips_second_stage:
            return first
        # resample the released noise levels to the requested number of steps
        positions = numpy.linspace(0, len(SECOND_STAGE_SIGMAS) - 1, self.steps + 1)
        sigmas = numpy.interp(positions, range(len(SECOND_STAGE_SIGMAS)), SECOND_STAGE_SIGMAS)
        shape = latent.shape(first.frames, first.height, first.width)
        second = replace(
            prepared,
            request=replace(request, cfg_schedule=None, step_cache=None),
            steps=self.steps,
            sigmas=tuple(float(sigma) for sigma in sigmas),
            solver="euler",
            guidance_scale=(1.0,),
            rules=NO_GUIDANCE_RULES,
            family_settings=RequestReferences(),  # references are only for the first stage
            stage_lora_strengths=tuple(lora.second_strength for lora in self.loras),
            stage_start_networks=self._plan_upscaling(shape, dtype),
        )
        return replace(prepared, stages=(first, second))

    def _make_first_stage(self, prepared: Prepared, latent: LatentSpec) -> Prepared:
        """Return the request of the small clip that the first stage generates."""
        scale_factors = self.scale_factors(latent)
        width = int(prepared.width / scale_factors.spatial)
        height = int(prepared.height / scale_factors.spatial)
        # the first frame has a latent frame to itself, so only the others are multiplied later
        frames = (prepared.frames - 1) // scale_factors.frames + 1
        joint = prepared.audio_video_shapes
        if joint is not None:  # later stages do not lengthen the audio
            # the clip's smaller latents, with audio of the full duration
            _, channels, length, rows, columns = latent.shape(frames, height, width)
            joint = AudioVideoShapes((channels, length, rows, columns), joint.audio)
        return replace(
            prepared,
            width=width,
            height=height,
            frames=frames,
            fps=prepared.fps / scale_factors.frames,  # fewer frames in the same duration
            audio_video_shapes=joint,
            stage_lora_strengths=tuple(lora.first_strength for lora in self.loras),
        )

    def _plan_upscaling(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype
    ) -> tuple[tuple[Callable[[Any], Any], tuple[int, ...]], ...]:
        """Return for each upscaler, in order, a function that loads it and the shape of its input latents."""
        # `shape`, B C F H W, is the shape of the first stage's latents.
        loaders = []
        for option, path in self.upscalers.items():
            batch, channels, length, rows, columns = shape
            load = partial(load_upscaler, path, option, dtype)
            loaders.append((load, shape))
            factors = read_scale_factors(path, option, channels)
            # the first latent frame stays single
            length = (length - 1) * factors.frames + 1
            shape = (batch, channels, length, int(rows * factors.spatial), int(columns * factors.spatial))
        return tuple(loaders)


def two_stages(options: Ltx2StageOptions) -> TwoStages | None:
    """Return the settings of two-stage generation; None for a single stage."""
    if not options.sample_two_stage:
        return None
    upscalers = {}
    if options.spatial_upsampler_path is not None:
        upscalers[SPATIAL] = options.spatial_upsampler_path
    if options.temporal_upsampler_path is not None:
        upscalers[TEMPORAL] = options.temporal_upsampler_path
    loras = []
    path, first_strength, second_strength = options.lora
    if path is not None and (first_strength or second_strength):
        loras.append(StageLora(path, "--distilled_lora_path", first_strength, second_strength))
    skips_second_stage = False
    if isinstance(options, Ltx2OfficialStages):
        for path, strength in options.first_loras:
            loras.append(StageLora(path, _LORA_OPTION, strength, 0.0))  # not in the second stage
        skips_second_stage = options.skip_stage_2
    return TwoStages(upscalers, options.sample_stage2_steps, tuple(loras), skips_second_stage)


def move_ic_loras_to_first_stage(shared: Any, own_options: Any) -> tuple[Any, Any]:
    """Move IC-LoRAs (trained with references) from --lora_weight to the options of the first stage.

    Returns the shared options and LTX-2's own options; other LoRAs stay in the shared ones.

    Source: the official pipeline of IC-LoRAs. Raises OptionError if patterns select parts of LoRAs.
    """
    # with their strengths
    loras = list(zip(shared.lora.lora_weight or (), shared.lora.multipliers(), strict=True))
    ic_loras = [(path, strength) for path, strength in loras if bool(read_reference_factors([path]))]
    other_loras = [lora for lora in loras if lora not in ic_loras]
    if not ic_loras:
        return shared, own_options
    # Raise OptionError if an option for LoRAs is given that cannot apply to an IC-LoRA
    ic_lora = ic_loras[0][0]
    patterns = shared.lora_patterns
    if patterns.include_patterns or patterns.exclude_patterns or patterns.lora_blocks:
        raise OptionError(
            f"--include_patterns, --exclude_patterns, --lora_blocks: {ic_lora} is an IC-LoRA, which "
            "--sample_two_stage adds to the first stage as a whole. Omit the patterns"
        )
    if (not other_loras) and shared.lora_rounding != "auto":
        raise OptionError(
            f"--lora_rounding {shared.lora_rounding}: {ic_lora} is an IC-LoRA, which is not "
            "merged into the weights. Omit the option"
        )
    logger.info(
        "%s: an IC-LoRA, which only the first stage uses, as in the official pipeline",
        ", ".join(path.name for path, _ in ic_loras),
    )
    lora = replace(
        shared.lora,
        lora_weight=tuple(path for path, _ in other_loras) or None,
        lora_multiplier=tuple(strength for _, strength in other_loras) or (1.0,),
    )
    stages = replace(own_options.stages, first_loras=tuple(ic_loras))
    return replace(shared, lora=lora), replace(own_options, stages=stages)


def stage_sections(
    prepared: Prepared,
    draw_noise: Callable[[Prepared], Tensor],
    make_section: Callable[[Prepared, int, Tensor], Section],
    enlarge: Callable[[Tensor], Tensor],
    noise: NoiseSource,
) -> Generator[Section, Tensor, Tensor]:
    """Yield a section for each of the two stages to the sampler, and return the final latents.

    Args:
        prepared: Request with its stages.
        draw_noise: Returns the initial noise of a clip.
        make_section: Returns the section of a stage, given its request, its index and its start.
        enlarge: Returns the second stage's latents, given the first stage's, B C F H W.
        noise: Source of the noise.
    """
    first, second = prepared.stages
    section = make_section(first, 0, draw_noise(first))
    # a yield hands the section to the sampler and returns its denoised latents
    latents = yield _label_stage(section, first, 0)
    image, audio = split_audio(latents, first.audio_video_shapes)
    image = enlarge(image)
    start_sigma = second.sigmas[0]
    start = _add_noise(image, _draw_image_tokens(noise, image), start_sigma)
    if second.audio_video_shapes is None or audio is None:
        section = make_section(second, 1, start)
        return (yield _label_stage(section, second, 1))
    audio_start = _add_noise(audio, _draw_audio_tokens(noise, audio), start_sigma)
    start = second.audio_video_shapes.join(start, audio_start)
    section = make_section(second, 1, start)
    latents = yield _label_stage(section, second, 1)
    # the result has the audio of the first stage; the second stage only lets it influence the images
    image, _ = second.audio_video_shapes.split(latents)
    return second.audio_video_shapes.join(image, audio)


def _add_noise(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Mix clean latents with noise at a noise level, on the latents' device."""
    return (1 - sigma) * latents + sigma * noise.to(latents.device)


def _draw_image_tokens(noise: NoiseSource, latents: Tensor) -> Tensor:
    """Draw noise for latents B C F H W in token order, as this model's released pipelines do."""
    _, channels, frames, rows, columns = latents.shape
    drawn = noise.draw((1, frames * rows * columns, channels))
    return rearrange(drawn, "b (f h w) c -> b c f h w", f=frames, h=rows)


def _draw_audio_tokens(noise: NoiseSource, audio: Tensor) -> Tensor:
    """Draw noise for audio latents B C T M in token order, as this model's released pipelines do."""
    _, channels, moments, bins = audio.shape
    drawn = noise.draw((1, moments, channels * bins))
    return rearrange(drawn, "b t (c m) -> b c t m", c=channels)


def _label_stage(section: Section, stage: Prepared, number: int) -> Section:
    overrides = replace(
        section.overrides, audio_video_shapes=section.overrides.audio_video_shapes or stage.audio_video_shapes
    )
    return replace(section, overrides=overrides, stage=number, label=f"stage {number + 1} of 2")

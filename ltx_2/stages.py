"""Two stages of a clip: small, with all steps and guidance; then enlarged, and refined in a few steps.

Source: the released pipelines. The second stage has fixed noise levels, no guidance and a LoRA for few steps;
the sound of the result is that of the first stage.
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

from ltx_2.references import factors_of
from ltx_2.stage_options import Ltx2OfficialStages, Ltx2StageOptions
from ltx_2.upscaler import SPATIAL, TEMPORAL, factors, is_upscaler, load_upscaler
from modules.checkpoints.model_files import read_once, require_file
from modules.contract.data import Joint, LatentSpec
from modules.contract.family import NoiseSource
from modules.contract.requests import Prepared
from modules.contract.rules import AS_PLAIN
from modules.contract.steps import Section
from modules.errors import OptionError

logger = logging.getLogger(__name__)
_LORA = "--lora_weight"
LEVELS = (0.909375, 0.725, 0.421875, 0.0)  # of the second stage, as released


@dataclass(frozen=True)
class TwoStages:
    """How clips of a run are made in two stages."""

    upscalers: Mapping[str, Path]  # by their options, in the order of their work
    steps: int  # of the second stage
    # file, the option that names it, and its strength in each stage
    loras: tuple[tuple[Path, str, float, float], ...]
    ends_early: bool = False  # the first stage's clip is the result

    @property
    def said(self) -> dict[str, str]:
        """Return metadata of the LoRAs that only one stage has: names and strengths."""
        first = [f"{path.name} {one:g}" for path, option, one, _ in self.loras if option == _LORA]
        second = [f"{path.name} {one:g}" for path, option, _, one in self.loras if option != _LORA]
        told = {"first_stage_loras": first, "second_stage_loras": [] if self.ends_early else second}
        return {name: ", ".join(loras) for name, loras in told.items() if loras}

    def growth(self, latent: LatentSpec) -> tuple[int, Fraction]:
        """Return by how much the upscalers multiply frames and sides. Raises as `factors`, and OptionError if
        a LoRA is an upscaler.
        """
        frames, side = 1, Fraction(1)
        for path, option, *_ in self.loras:
            if read_once(require_file(path, option, "it is a LoRA"), is_upscaler):
                raise OptionError(
                    f"{option} {path} is a latent upscaler. Give it to {SPATIAL}, and a LoRA here"
                )
        for option, path in self.upscalers.items():
            more, larger = factors(path, option, latent.channels)
            frames, side = frames * more, side * larger
        return frames, side

    def whole(self, latent: LatentSpec) -> LatentSpec:
        """Return the latent space with the steps of size and length that both stages can make."""
        frames, side = self.growth(latent)
        return replace(
            latent,
            pixel_step=latent.pixel_step * side.numerator,
            frame_step=latent.frame_step * frames,
        )

    def split(self, prepared: Prepared, latent: LatentSpec, dtype: torch.dtype) -> Prepared:
        """Return the request of a clip as one in two stages. dtype: of the upscalers."""
        asked = prepared.asked
        if asked.source is not None:
            raise OptionError(
                f"--{asked.source.option} with --sample_two_stage: the first stage starts from noise. Leave "
                "one of them out"
            )
        frames, side = self.growth(latent)
        width, height = (int(edge / side) for edge in (prepared.width, prepared.height))
        count = (prepared.frames - 1) // frames + 1
        joint = prepared.joint
        if joint is not None:  # the sound is that of the result from the beginning
            _, *picture = latent.shape(count, height, width)
            joint = Joint((picture[0], picture[1], picture[2], picture[3]), joint.sound)
        first = replace(
            prepared,
            width=width,
            height=height,
            frames=count,
            fps=prepared.fps / frames,
            joint=joint,
            added=tuple(first for *_, first, _ in self.loras),
        )
        if self.ends_early:
            return first
        begun, shape = [], latent.shape(count, height, width)
        for option, path in self.upscalers.items():
            begun.append((partial(load_upscaler, path, option, dtype), shape))
            more, larger = factors(path, option, latent.channels)
            batch, channels, length, rows, columns = shape
            shape = batch, channels, (length - 1) * more + 1, int(rows * larger), int(columns * larger)
        places = numpy.linspace(0, len(LEVELS) - 1, self.steps + 1)
        second = replace(
            prepared,
            asked=replace(asked, cfg_schedule=None, step_cache=None),
            steps=self.steps,
            levels=tuple(map(float, numpy.interp(places, range(len(LEVELS)), LEVELS))),
            solver="euler",
            guidance_scale=(1.0,),
            rules=AS_PLAIN,
            own=(),  # references are for the first stage alone
            added=tuple(second for *_, second in self.loras),
            begun_by=tuple(begun),
        )
        return replace(prepared, stages=(first, second))


def two_stages(options: Ltx2StageOptions) -> TwoStages | None:
    if not options.sample_two_stage:
        return None
    given = {SPATIAL: options.spatial_upsampler_path, TEMPORAL: options.temporal_upsampler_path}
    path, first, second = options.lora
    loras = [] if path is None or not (first or second) else [(path, "--distilled_lora_path", first, second)]
    if isinstance(options, Ltx2OfficialStages):
        loras += [(path, _LORA, strength, 0.0) for path, strength in options.first_loras]
    return TwoStages(
        {option: path for option, path in given.items() if path is not None},
        options.sample_stage2_steps,
        tuple(loras),
        isinstance(options, Ltx2OfficialStages) and options.skip_stage_2,
    )


def keep_for_first_stage(shared: Any, own: Any) -> tuple[Any, Any]:
    """Move IC-LoRAs from --lora_weight to the first stage alone; return both records.

    Source: the official pipeline of IC-LoRAs. Raises OptionError if patterns choose parts of LoRAs.
    """
    uses = zip(shared.lora.lora_weight or (), shared.lora.multipliers(), strict=True)
    both: list[tuple[Path, float]] = []
    first: list[tuple[Path, float]] = []
    for path, strength in uses:
        (first if factors_of([path]) else both).append((path, strength))
    if not first:
        return shared, own
    if shared.lora_patterns.include_patterns or shared.lora_patterns.exclude_patterns:
        raise OptionError(
            f"--include_patterns, --exclude_patterns: {first[0][0]} is an IC-LoRA, which --sample_two_stage "
            "puts beside the weights of the first stage, whole. Leave the patterns out"
        )
    names = ", ".join(path.name for path, _ in first)
    logger.info("%s: an IC-LoRA, which the first stage alone has, as in the official pipeline", names)
    kept, strengths = (tuple(one[place] for one in both) for place in (0, 1))
    lora = replace(shared.lora, lora_weight=kept or None, lora_multiplier=strengths or (1.0,))
    stages = replace(own.stages, first_loras=tuple(first))
    return replace(shared, lora=lora), replace(own, stages=stages)


def stage_sections(
    prepared: Prepared,
    draw: Callable[[Prepared], Tensor],
    begin: Callable[[Prepared, int, Tensor], Section],
    enlarge: Callable[[Tensor], Tensor],
    noise: NoiseSource,
) -> Generator[Section, Tensor, Tensor]:
    """Yield the section of each stage. draw: returns the start noise of a clip.

    begin: a stage, its number, its start -> its section. enlarge: the first stage's latents, B C F H W -> the
    second's.
    """
    first, second = prepared.stages
    made = yield _of_stage(begin(first, 0, draw(first)), first, 0)
    picture, sound = (made, None) if first.joint is None else first.joint.split(made)
    picture, level = enlarge(picture), second.levels[0]

    def blend(clean: Tensor, drawn: Tensor) -> Tensor:
        return (1 - level) * clean + level * drawn.to(clean.device)

    # drawn token by token, as the released pipelines do here
    _, channels, frames, rows, columns = picture.shape
    drawn = noise.draw((1, frames * rows * columns, channels))
    start = blend(picture, rearrange(drawn, "b (f h w) c -> b c f h w", f=frames, h=rows))
    if second.joint is None or sound is None:
        return (yield _of_stage(begin(second, 1, start), second, 1))
    _, channels, moments, bins = sound.shape
    drawn = noise.draw((1, moments, channels * bins))
    start = second.joint.join(start, blend(sound, rearrange(drawn, "b t (c m) -> b c t m", c=channels)))
    made = yield _of_stage(begin(second, 1, start), second, 1)
    return second.joint.join(second.joint.split(made)[0], sound)


def _of_stage(section: Section, made: Prepared, number: int) -> Section:
    tweaks = replace(section.tweaks, joint=made.joint)
    return replace(section, tweaks=tweaks, stage=number, label=f"stage {number + 1} of 2")

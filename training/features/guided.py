"""Train towards a target that points away from the prediction for the empty prompt: --guided_target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, option
from training.features.contract import AT_LOSS, EMPTY_PROMPT, Feature, FeatureOptions, given_values
from training.features.hooks import RunFeatures
from training.features.phases import TARGETS
from training.features.step_targets import PassCounts, StepTarget

if TYPE_CHECKING:
    from torch import Tensor

    from protocols.family import Family
    from training.loss import NoisyBatch
    from training.targets.passes import ListComparisons, TargetComparison, TrainingPasses

MAX_GUIDANCE = 20
THOUSAND = 1000


class GuidedTargetOptions(FeatureOptions, title="guided target", at=AT_LOSS, facts=HABIT):
    """Options of --guided_target: how far the target moves away from the prediction without a prompt."""

    guided_target: float | None = option(
        "train toward u + SCALE * (v - u), where v is the default target and u the prediction for the "
        "empty prompt: for models that were distilled with guidance. Adds one pass without gradients "
        "to each step",
        above=1,
        maximum=MAX_GUIDANCE,
        metavar="SCALE",
        hint="3 to 4 are usual",
        known_as=("do_guidance_loss", "guidance_loss", "guidance_loss_target", "h3_guidance_loss_scale"),
    )
    guided_target_min_timestep: int = option(
        "noise level, in thousandths, below which --guided_target is not used",
        default=0,
        minimum=0,
        maximum=THOUSAND,
        needs="guided_target",
        hint="0 uses it everywhere",
        known_as=("h3_guidance_loss_sigma_min",),
    )
    guided_target_sound: float | None = option(
        "SCALE of --guided_target for the audio of clips; default: as for images",
        above=1,
        maximum=MAX_GUIDANCE,
        needs="guided_target",
        hint="3 to 4 are usual",
        known_as=("h3_guidance_loss_scale_audio",),
    )


@dataclass(frozen=True)
class GuidedTarget:
    """The target u + scale * (v - u), where v is the velocity and u the prediction for the empty prompt."""

    scale: float
    audio_scale: float
    lowest_level: float  # lowest noise fraction, 0..1, at which the target is used


def make_guided(options: GuidedTargetOptions) -> GuidedTarget:
    """Return the guided target for the options; the audio guidance scale defaults to the video scale."""
    scale = options.guided_target
    assert scale is not None  # the feature is on
    return GuidedTarget(
        scale=scale,
        audio_scale=options.guided_target_sound or scale,
        lowest_level=options.guided_target_min_timestep / THOUSAND,
    )


def guide(
    guided: GuidedTarget, passes: "TrainingPasses", noisy_batch: "NoisyBatch", velocity: "Tensor"
) -> "Tensor":
    """Return the target u + scale * (velocity - u), where u is the network's prediction for the empty prompt.

    Samples below the lowest noise level keep the velocity, and so do the samples that `_list_unguided`
    selects. Audio has its own scale and its own noise levels.
    """
    from training.targets.passes import (  # torch: only with this target
        list_noise_fractions,
        select_per_sample,
    )

    unguided = _list_unguided(noisy_batch)
    guides_image = _list_guided(list_noise_fractions(noisy_batch), guided.lowest_level, unguided)
    guides_audio: list[bool] = []
    if noisy_batch.audio is not None:
        guides_audio = _list_guided(list_noise_fractions(noisy_batch.audio), guided.lowest_level, unguided)
    # in lockstep all processes have to run the same passes
    if not (any(guides_image) or any(guides_audio) or passes.rule.in_lockstep):
        return velocity
    unprompted_batch = replace(noisy_batch, batch=noisy_batch.batch.with_empty_text())
    unprompted = passes.predict_without_gradients(unprompted_batch)
    passes.reset_network_seed(noisy_batch)  # the additional pass must not change the next one
    if noisy_batch.audio is None:
        guided_velocity = unprompted + guided.scale * (velocity - unprompted)
        return select_per_sample(guides_image, guided_velocity, velocity)
    image, audio = noisy_batch.joint.split(velocity)
    unprompted_image, unprompted_audio = noisy_batch.joint.split(unprompted)
    guided_image = unprompted_image + guided.scale * (image - unprompted_image)
    guided_audio = unprompted_audio + guided.audio_scale * (audio - unprompted_audio)
    image = select_per_sample(guides_image, guided_image, image)
    audio = select_per_sample(guides_audio, guided_audio, audio)
    return noisy_batch.joint.join(image, audio)


def _list_unguided(noisy_batch: "NoisyBatch") -> list[bool]:
    """Return for each sample whether it keeps its ordinary target instead of the guided one."""
    # It does if its caption is empty, since the prediction without a prompt is then its own prediction, or if
    # its dataset table sets the base model's prediction as the target.
    from training.targets.passes import samples_with_base_target  # torch: only with this target

    batch = noisy_batch.batch
    is_empty = batch.has_empty_text or (False,) * len(batch)
    is_preserved = samples_with_base_target(noisy_batch)
    return [empty or preserved for empty, preserved in zip(is_empty, is_preserved, strict=True)]


def _list_guided(levels: Sequence[float], lowest: float, unguided: Sequence[bool]) -> list[bool]:
    return [level >= lowest and not is_unguided for level, is_unguided in zip(levels, unguided, strict=True)]


def _check(options: GuidedTargetOptions, family: "Family", counts: Sequence[int]) -> None:
    from protocols.family import trains_audio  # loads torch, which --help does not need

    if options.guided_target_sound is not None and not trains_audio(family):
        raise OptionError(
            f"--guided_target_sound {options.guided_target_sound:g}: the model {family.name} has no sound. "
            "Omit it"
        )


def _describe(options: GuidedTargetOptions) -> str:
    lowest = options.guided_target_min_timestep
    above = f", from {lowest} thousandths of noise on" if lowest else ""
    return f"away from the prediction for the empty prompt, {options.guided_target:g} times as far{above}"


def with_guided_target(
    guided: GuidedTarget,
    list_comparisons: "ListComparisons",
    passes: "TrainingPasses",
    noisy_batch: "NoisyBatch",
) -> "list[TargetComparison]":
    """Return the comparisons with the target of the first, the velocity, replaced by the guided target."""
    clip, *others = list_comparisons(passes, noisy_batch)
    return [replace(clip, target=guide(guided, passes, noisy_batch, clip.target)), *others]


def _join(run: RunFeatures, options: GuidedTargetOptions) -> None:
    """Register the target, metadata, check and comparison of --guided_target with a run."""
    target = StepTarget(
        option=f"--guided_target {options.guided_target:g}",
        description=_describe(options),
        passes=PassCounts(with_gradients=0, without_gradients=1),
        replaces_velocity=True,
        keeps_guidance=True,
    )
    run.targets.append(target)
    run.keeps_few_step_ability = True  # the target contains the guidance that was distilled into the model
    run.needs.add(EMPTY_PROMPT)
    run.info.in_files |= given_values(options)
    run.on.check.append(partial(_check, options))
    run.around(TARGETS, partial(with_guided_target, make_guided(options)))


GUIDED = Feature(
    name="guided",
    options=GuidedTargetOptions,
    is_on=lambda options: options.guided_target is not None,
    join=_join,
)

"""Passes of the network in a step of guidance, and the formulas that combine their velocities.

A kind of guidance is a `GuidanceStage`: it declares the passes that it needs, and uses their results to
change the velocity. All passes of a step's stages are requested together; each runs once, even if several
stages need it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from blissful_tuner.options import GuidanceOptions
from protocols.rules import Projection
from protocols.steps import NO_OVERRIDES, Calls, Overrides, PassVelocities, Predict, Section, Step


@dataclass(frozen=True)
class Pass:
    """A forward pass of the network: its conditions, and its overrides, such as blocks to skip.

    Overrides are compared by identity, so stages that share a pass must share its overrides object.
    """

    conditions_name: Literal["positive", "negative", "blank"]
    overrides: Overrides = NO_OVERRIDES


POSITIVE, NEGATIVE, BLANK = Pass("positive"), Pass("negative"), Pass("blank")
Velocities = Mapping[Pass, Tensor]  # velocity of each pass of a step, B C F H W float32, or B C T M of audio


@dataclass(frozen=True)
class GuidanceStage:
    """A guidance formula for one step, and the passes whose velocities it combines."""

    passes: tuple[Pass, ...]
    # velocity so far (at first the positive pass'), velocities of the passes -> changed velocity
    change: Callable[[Tensor, Velocities], Tensor]
    takes_clean_latents: bool = False  # whether `change` is for predicted clean latents, not for velocities


@dataclass(frozen=True)
class PassPlan:
    """The network passes of one sampling step, and the guidance stages that combine their outputs."""

    passes: tuple[Pass, ...]  # the positive pass and the stages' passes, each once; () if no pass is run
    # stages of the video, and of its audio
    stages: tuple[tuple[GuidanceStage, ...], tuple[GuidanceStage, ...]] = ((), ())
    velocity_factor: float = 1.0  # factor on the final velocity
    common_overrides: Overrides = NO_OVERRIDES  # overrides of all passes, in addition to each pass's own

    @property
    def max_together(self) -> int:
        """Return the size of the largest batch of passes, which must have equal overrides."""
        return max(Counter(pass_.overrides for pass_ in self.passes).values(), default=0)

    def combine(self, velocities: Velocities, step: Step, section: Section) -> Tensor:
        """Return the guided velocity: the passes' velocities changed by the guidance stages in turn.

        The tokens of images and of audio are guided separately. If one of them is an input that stays clean,
        its velocity is 0.
        """
        audio_video = section.overrides.audio_video_shapes
        if audio_video is None:  # no audio, so a single stream
            velocity = _apply(self.stages[0], velocities, step.noisy, step.sigma)
        else:
            noisy_streams = audio_video.split(step.noisy)
            split_velocities = {pass_: audio_video.split(value) for pass_, value in velocities.items()}
            guided = []
            for index, stages in enumerate(self.stages):
                stream_velocities = {pass_: streams[index] for pass_, streams in split_velocities.items()}
                stream_velocity = _apply(stages, stream_velocities, noisy_streams[index], step.sigma)
                is_clean = section.clean_streams[index]
                guided.append(torch.zeros_like(stream_velocity) if is_clean else stream_velocity)
            velocity = audio_video.join(*guided)
        return velocity if self.velocity_factor == 1 else velocity * self.velocity_factor


def _apply(stages: Iterable[GuidanceStage], velocities: Velocities, noisy: Tensor, sigma: float) -> Tensor:
    """Apply the stages in order, starting from the stream's positive velocity; return the guided velocity."""
    velocity = velocities[POSITIVE]
    for stage in stages:
        if stage.takes_clean_latents:
            clean = {pass_: noisy - sigma * predicted for pass_, predicted in velocities.items()}
            guided_clean = stage.change(noisy - sigma * velocity, clean)
            velocity = (noisy - guided_clean) / sigma
        else:
            velocity = stage.change(velocity, velocities)
    return velocity


def run_passes(calls: Calls, predict: Predict, _: Section) -> PassVelocities:
    """Run all passes in this process; passes with equal overrides share one call of `predict`.

    `predict` may run the conditions of a call as one batch.
    """
    by_call: dict[tuple[Overrides, int], Tensor] = {}
    for overrides, conditions in calls.items():
        velocities = predict(*conditions.values(), overrides=overrides)
        for key, velocity in zip(conditions, velocities, strict=True):
            by_call[overrides, key] = velocity
    return by_call


def _sum_sample(products: Tensor) -> Tensor:
    """Return the sum over each sample, B 1 1 1 1."""
    return products.sum(tuple(range(1, products.ndim)), keepdim=True)


# CFG-Zero*: guidance that is robust in the first steps, while the network's prediction is poor.
#
# Source: Fan et al. 2025, arXiv 2503.18886.
def cfg_zero(scale: float, negative: Pass) -> GuidanceStage:
    """Return the CFG-Zero* guidance stage (`--cfgzerostar_scaling`).

    The negative velocity is first scaled, per sample, to be as close as possible to the positive one.
    """

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        positive = velocities[POSITIVE]
        unscaled = velocities[negative]
        square_norm = _sum_sample(unscaled.square()) + 1e-8  # the released code adds this too
        base = _sum_sample(positive * unscaled) / square_norm * unscaled
        return base + scale * (positive - base)

    return GuidanceStage((POSITIVE, negative), change)


# Perpendicular negative guidance: avoid only what the negative prompt does not share with the prompt.
#
# Source: Armandpour et al. 2023, arXiv 2304.04968.
def perp_neg(scale: float, weight: float, negative: Pass) -> GuidanceStage:
    """Return the stage of Perp-Neg: guidance from the empty prompt, away from the negative prompt.

    Directions are differences from the empty prompt's velocity. It subtracts `weight` times the part of the
    negative direction that is perpendicular to the positive one, per sample. A weight of 0 needs no negative
    pass.
    """

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        blank = velocities[BLANK]
        toward = velocities[POSITIVE] - blank
        if weight == 0:
            return blank + scale * toward
        unwanted = velocities[negative] - blank
        # clamped against 0 / 0: where the prompt changes nothing, the product below is 0 too
        square_norm = _sum_sample(toward.square()).clamp_min(torch.finfo(toward.dtype).tiny)
        parallel = _sum_sample(unwanted * toward) / square_norm * toward
        return blank + scale * (toward - weight * (unwanted - parallel))

    passes = (POSITIVE, BLANK) if weight == 0 else (POSITIVE, negative, BLANK)
    return GuidanceStage(passes, change)


# Skip-layer guidance: steer away from the prediction for the negative text without some blocks.
#
# Source: the released code of Stable Diffusion 3.5, which skips blocks in a pass with the positive text.
# Video tools skip them with the negative text, as here, so that their settings can be reused.
def list_skip_layer_steps(options: GuidanceOptions, num_steps: int) -> range:
    """Return the range of steps with skip-layer guidance, from the fractions --slg_start and --slg_end."""
    return range(int(options.slg_start * num_steps), int(options.slg_end * num_steps))


def add_difference(weakened: Pass, scale: float) -> GuidanceStage:
    """Return the stage that adds `scale` times (positive - weakened) to the guided velocity.

    Used for `--slg_mode original`, and for the identity guidance of ID-LoRA (arXiv 2603.10256).

    Args:
        weakened: The negative pass without some layers, or the positive pass without an audio reference.
        scale: Factor on the difference.
    """

    def change(velocity: Tensor, velocities: Velocities) -> Tensor:
        return velocity + scale * (velocities[POSITIVE] - velocities[weakened])

    return GuidanceStage((POSITIVE, weakened), change)


def rescale(fraction: float) -> GuidanceStage:
    """Return the stage that rescales each sample to the positive velocity's standard deviation.

    This is `--guidance_rescale`. Source: Lin et al. 2023, arXiv 2305.08891, section 3.4.

    Args:
        fraction: Weight of the rescaled velocity in the blend with the original one, 0 to 1.
    """

    def change(velocity: Tensor, velocities: Velocities) -> Tensor:
        axes = tuple(range(1, velocity.ndim))  # all axes except the batch
        factor = velocities[POSITIVE].std(axes, keepdim=True) / velocity.std(axes, keepdim=True)
        return velocity * (fraction * factor + (1 - fraction))

    return GuidanceStage((POSITIVE,), change)


def guide_stream(weights: Mapping[Pass, float], rescale_fraction: float) -> GuidanceStage:
    """Return the stage that guides one stream by its differences from several passes, and rescales it.

    With clean latents c of the positive pass and x of each other pass, the guided latents are
    c + sum of weight * (c - x).

    Args:
        weights: Weight of c - x for each pass.
        rescale_fraction: How far the result is rescaled to the standard deviation of c, 0 to 1.
    """
    rescaling = rescale(rescale_fraction)

    def change(clean: Tensor, predicted: Velocities) -> Tensor:
        guided = clean
        for pass_, weight in weights.items():
            guided = guided + weight * (clean - predicted[pass_])
        return rescaling.change(guided, predicted) if rescale_fraction else guided

    return GuidanceStage((POSITIVE, *weights), change, takes_clean_latents=True)


# Guidance by references: each pass of a chain sees more of them, the last one also the prompt.
#
# Source: the released code of Bernini.
def guide_chain(negatives: Sequence[Pass], weights: Sequence[float]) -> GuidanceStage:
    """Return the stage that adds up the weighted differences of neighboring passes.

    Args:
        negatives: The passes before the positive one, the plainest first.
        weights: Weight of the difference that each pass and the one after it have.
    """
    chain = (*negatives, POSITIVE)

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        guided = velocities[chain[0]]
        for (earlier, later), weight in zip(itertools.pairwise(chain), weights, strict=True):
            guided = guided + weight * (velocities[later] - velocities[earlier])
        return guided

    return GuidanceStage(chain, change)


CHAIN_NORM_LIMIT = 50.0  # of a difference in a latent frame
CHAIN_PARALLEL_SHARE = 0.5  # of the part of a difference that is parallel to the later prediction


def project_chain(negatives: Sequence[Pass], weights: Sequence[float]) -> GuidanceStage:
    """Return the stage of `guide_chain` on clean predictions, with limited and projected differences.

    Norms and projections are those of each latent frame.
    """
    chain = (*negatives, POSITIVE)

    def change(_: Tensor, clean: Velocities) -> Tensor:
        guided = clean[chain[0]]
        dtype = guided.dtype if guided.device.type == "mps" else torch.float64  # MPS has no float64
        guided = guided.to(dtype)
        for (earlier, later), weight in zip(itertools.pairwise(chain), weights, strict=True):
            better = clean[later].to(dtype)
            difference = better - clean[earlier].to(dtype)
            limited = difference * (CHAIN_NORM_LIMIT / _measure_frame_norms(difference)).clamp(max=1)
            unit = better / _measure_frame_norms(better)
            parallel = _sum_frames(limited * unit) * unit
            guided = guided + weight * (limited - (1 - CHAIN_PARALLEL_SHARE) * parallel)
        return guided.to(clean[POSITIVE].dtype)

    return GuidanceStage(chain, change, takes_clean_latents=True)


def _sum_frames(products: Tensor) -> Tensor:
    """Return the sum over each latent frame, B 1 F 1 1."""
    return products.sum((1, 3, 4), keepdim=True)


def _measure_frame_norms(latents: Tensor) -> Tensor:
    """Return the Euclidean norm of each latent frame, B 1 F 1 1; at least a tiny number, to divide by."""
    return _sum_frames(latents.square()).sqrt().clamp(min=1e-12)


def limit_norm(limit: float) -> GuidanceStage:
    """Return the stage of `--renorm_cfg`: limit the guided norm to `limit` times the positive norm.

    Norms are Euclidean, over all axes except the batch. Source: Qin et al. 2025, arXiv 2503.21758, section on
    inference.
    """

    def change(velocity: Tensor, velocities: Velocities) -> Tensor:
        axes = tuple(range(1, velocity.ndim))
        maximum = limit * torch.linalg.vector_norm(velocities[POSITIVE], dim=axes, keepdim=True)
        size = torch.linalg.vector_norm(velocity, dim=axes, keepdim=True)
        return torch.where(size > maximum, velocity * (maximum / size), velocity)

    return GuidanceStage((POSITIVE,), change)


def keep_token_norms(patch_size: int) -> GuidanceStage:
    """Return the stage that rescales each token of the guided velocity to the positive velocity's norm.

    Source: the released code of Qwen-Image.

    Args:
        patch_size: Edge length, in latent pixels, of the square that becomes a token.
    """

    def change(velocity: Tensor, velocities: Velocities) -> Tensor:
        positive_norms = _measure_token_norms(velocities[POSITIVE], patch_size)
        norms = _measure_token_norms(velocity, patch_size)
        # a token with zero velocity has no direction, so it is left unchanged
        ratio = torch.where(norms > 0, positive_norms / norms, 1.0).unsqueeze(1)
        return velocity * ratio.repeat_interleave(patch_size, dim=-1).repeat_interleave(patch_size, dim=-2)

    return GuidanceStage((POSITIVE,), change)


def _measure_token_norms(velocity: Tensor, patch_size: int) -> Tensor:
    """Return each token's Euclidean norm divided by the patch size, B F h w."""
    return functional.avg_pool2d(velocity.square().sum(dim=1), patch_size).sqrt()


# Adaptive projected guidance: drop the part of the passes' difference that is parallel to the positive
# velocity.  Source: Sadat et al. 2024, arXiv 2410.02416; `protocols.rules.Projection` has the first step that
# uses it.
class Momentum:
    """Running sum, over the steps of one denoising run, of the difference between two velocities."""

    def __init__(self, factor: float) -> None:
        """Start the sum at 0; `factor` multiplies it before each new difference is added."""
        self._factor = factor
        self._sum: Tensor | None = None

    def add(self, difference: Tensor) -> Tensor:
        """Add a difference, B C F H W, and return the new sum."""
        self._sum = difference if self._sum is None else difference + self._factor * self._sum
        return self._sum


def feed_momentum(stage: GuidanceStage, momentum: Momentum, negative: Pass) -> GuidanceStage:
    """Wrap a stage so that it also adds (positive - negative) to the momentum; its formula is unchanged."""

    def change(velocity: Tensor, velocities: Velocities) -> Tensor:
        momentum.add(velocities[POSITIVE] - velocities[negative])
        return stage.change(velocity, velocities)

    return GuidanceStage(stage.passes, change)


def project_momentum(rule: Projection, momentum: Momentum, negative: Pass) -> GuidanceStage:
    """Return the stage of adaptive projected guidance.

    For each sample:
    1. add the difference of positive and negative velocity to the momentum,
    2. limit the norm of this sum,
    3. weaken its component parallel to the positive velocity, and add it to the negative velocity.
    """

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        positive = velocities[POSITIVE]
        base = velocities[negative]
        summed = momentum.add(positive - base)
        limited = summed * (rule.norm_limit / _measure_norms(summed)).clamp(max=1.0)
        parallel, orthogonal = _project(limited, positive)
        return base + rule.scale * (orthogonal + rule.eta * parallel)

    return GuidanceStage((POSITIVE, negative), change)


def _project(vector: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Split each sample of a tensor into its components parallel and orthogonal to a direction."""
    # As in the released code, this is computed in float64 (except on MPS, which has none), because the
    # orthogonal component is a small difference of large numbers.
    exact_dtype = vector.dtype if vector.device.type == "mps" else torch.float64
    exact = vector.to(exact_dtype)
    exact_direction = direction.to(exact_dtype)
    unit = exact_direction / _measure_norms(exact_direction).clamp(min=1e-12)
    parallel = _sum_sample(exact * unit) * unit
    orthogonal = exact - parallel
    return parallel.to(vector.dtype), orthogonal.to(vector.dtype)


def _measure_norms(velocity: Tensor) -> Tensor:
    """Return each sample's Euclidean norm, B 1 1 1 1."""
    return _sum_sample(velocity.square()).sqrt()


# Letters: B batch, L tokens, N heads, D head width


@dataclass(frozen=True)
class NormalizedGuidance:
    """Normalized attention guidance (NAG), for `NagText.combine_attention`.

    Instances with equal settings compare equal, so that compiled code is reused.
    """

    scale: float
    tau: float
    alpha: float

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Combine the attention outputs for the prompt and for the NAG prompt, both B L N D.

        guided = scale * positive - (scale - 1) * negative. Its L1 norm per token, over all heads, is limited
        to `tau` times the norm of `positive`. The result is alpha * guided + (1 - alpha) * positive, in the
        dtype of the inputs.
        """
        guided = torch.lerp(negative, positive, self.scale)  # rounded once: large terms almost cancel in it
        allowed = (
            self.tau
            * _measure_size(positive)
            / _measure_size(guided).clamp(min=torch.finfo(torch.float32).tiny)
        )
        return torch.lerp(positive, guided * allowed.clamp(max=1).to(guided.dtype), self.alpha)


def _measure_size(attended: Tensor) -> Tensor:
    """Return each token's L1 norm over heads and channels: B L 1 1 float32."""
    return torch.linalg.vector_norm(attended, 1, dim=(-2, -1), keepdim=True, dtype=torch.float32)

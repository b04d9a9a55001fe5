"""The frozen records of denoising: sections, one call of the network, and one step of the loop."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from modules.devices import send_ahead
from protocols.data import AudioVideoShapes, Conditions, MediaEncoders, add_batch_axis
from protocols.rules import ConsistencyRules

if TYPE_CHECKING:  # caching has no use for attention and positions
    from modules.attention.attend import CombineAttention
    from modules.flow.schedule import Schedule
    from modules.layers.rope import SlowedFrequency


@dataclass(frozen=True)
class EncodedPrompts:
    """Encoded prompts of one section, without batch dimension, on the CPU."""

    positive: Conditions
    negative: Conditions | None = None
    blank: Conditions | None = None
    nag: Conditions | None = None

    def section(self, noise: Tensor, inputs: Conditions | None = None) -> "Section":
        """Combine texts, noise and media conditions into a section.

        Equal text objects become the same conditions, so that a pass with them runs once.

        Args:
            noise: Noise, B C F H W.
            inputs: Media conditions, with batch dimension.
        """
        texts = {id(text): text for text in (self.positive, self.negative, self.blank) if text is not None}
        conditions = {key: {**add_batch_axis(text), **(inputs or {})} for key, text in texts.items()}
        positive = conditions[id(self.positive)]
        negative = conditions.get(id(self.negative))
        blank = conditions.get(id(self.blank))
        nag = None if self.nag is None else add_batch_axis(self.nag)
        return Section(noise, positive, negative, blank, nag=nag)


# as `Family.decode`, but not limited to -1..1
DecodePart = Callable[[MediaEncoders, Tensor], Iterator[Tensor]]


@dataclass(frozen=True)
class PreviewPiece:
    """The part of the video that one section adds, for the preview."""

    latents: Tensor  # B C F H W, which can be decoded on their own
    overlap: int  # frames that are blended with the end of the video so far; 0 for the first piece
    is_prepended: bool  # whether the piece is played before the video so far, not after it
    decode: DecodePart  # decodes the latents to pixels, before blending
    previous_latents: Tensor  # B C F H W, on the CPU: latents of all finished sections, in playing order


@dataclass(frozen=True)
class NagText:
    """The negative text of normalized attention guidance (NAG), to which a forward pass also attends."""

    text: Conditions  # by the family's cache names; inside a network, by names of its arguments
    combine_attention: "CombineAttention"


@dataclass(frozen=True)
class StepPosition:
    """The step and the pass of a network call, for code that keeps state between steps."""

    step: int  # index among the steps that are run, from 0
    num_steps: int
    timestep: float  # timestep that the network gets
    next_timestep: float  # timestep of the next step; 0 in the last step
    pass_key: Hashable  # identifies the pass: the same in all steps of a section, different for other passes


FULLY_CLEAN = 1000  # value in `CleanTokens` for a latent that is entirely clean


@dataclass(frozen=True, eq=False)
class CleanTokens:
    """How clean each latent of a clip is, as an integer n from 0 (noisy) to FULLY_CLEAN.

    At noise level sigma, a latent with the fraction f = n / FULLY_CLEAN has the level (1 - f) sigma. The
    tensors are int16, so that they stay on the host.

    Keyframes are additional images for the network, at the clip's frames `keyframe_indices`. In training
    they are `keyframes`, as clean as `keyframe_strengths` says; in a generation they are the last frames of
    the noisy latents and of `image`.
    """

    image: Tensor | None = None  # B 1 F H W; None: all latents are noisy
    audio: Tensor | None = None  # B 1 T 1; None: all audio latents are noisy
    keyframes: Tensor | None = None  # clean latents, B C K H W, with the values that caches store
    keyframe_indices: tuple[int, ...] = ()  # frame of the clip for each of the K keyframes
    # how clean each of `keyframes` is in each clip, 0 to FULLY_CLEAN, B K int16; 0: pure noise
    keyframe_strengths: Tensor | None = None
    keyframe_noise: Tensor | None = None  # noise for `keyframes`; None: all keyframes are clean
    # number of the last latent frames that are keyframes made from noise; the network marks them
    num_generated: int = 0

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> "CleanTokens":
        """Return a copy with `move` applied to every tensor."""
        moved: dict[str, Any] = {key: move(one) for key, one in vars(self).items() if isinstance(one, Tensor)}
        return replace(self, **moved)


def clean_fraction(given: Tensor, like: Tensor) -> Tensor:
    """Return how clean each latent is, given in thousandths, as 0..1 float32 on the device of `like`."""
    return send_ahead(given, like.device).float() / FULLY_CLEAN


@dataclass(frozen=True, eq=False)
class Overrides:
    """Changes to a single call of the network.

    Compared by identity, so that a record with tensors can be a dictionary key.
    """

    skip_blocks: frozenset[int] = frozenset()  # these blocks pass their input through (skip-layer guidance)
    # in these blocks self-attention is replaced by its values
    skip_self_attention: frozenset[int] = frozenset()
    isolate_modalities: bool = False  # image and audio do not attend to each other
    drop_audio_reference: bool = False  # the reference of the audio is left out
    max_references: int | None = None  # only the first references are used, this many; None: all
    nag: NagText | None = None
    # slows one frequency of the frames' rotary positions (RIFLEx)
    slow_frames: "SlowedFrequency | None" = None
    embedded_guidance: bool = True  # False: the network gets no embedded guidance
    # number of clean latent frames at the start; the network knows them, and their velocity is 0
    num_clean_frames: int = 0
    # which other latents are clean; their velocity is multiplied by 1 - fraction
    clean_tokens: CleanTokens | None = None
    # set if the latents are video and audio, B N; timesteps are then B or B 2
    audio_video_shapes: AudioVideoShapes | None = None
    # results that a network may cache between the passes of a section; None: it must not cache
    section_cache: dict[Any, Any] | None = None
    step_position: StepPosition | None = None  # set by the denoising loop
    # strength of each of the network's stage LoRAs in this call; (): those of the request's stage
    stage_lora_strengths: tuple[float, ...] = ()

    @property
    def is_perturbed(self) -> bool:
        """Return whether a part of the network or of its inputs is skipped, as in skip-layer guidance."""
        skips = self.skip_blocks or self.skip_self_attention or self.isolate_modalities
        return bool(skips or self.drop_audio_reference or self.max_references is not None)

    def rename_nag(self, rename: Callable[[Conditions], Conditions]) -> "Overrides":
        """Return the overrides with the conditions of the negative attention text renamed by `rename`."""
        if self.nag is None:
            return self
        return replace(self, nag=replace(self.nag, text=rename(self.nag.text)))

    @property
    def combine_attention(self) -> "CombineAttention | None":
        """How attention to the negative attention text is combined with the prompt's; None without it."""
        return None if self.nag is None else self.nag.combine_attention

    def text_inputs(self, batch: int, **text: Any) -> list[dict[str, Any]]:
        """Return the network's text arguments for the prompt, then for the negative attention text.

        A negative attention text of one sample is used for all samples of the batch. Without one, only the
        prompt's arguments are returned.
        """
        if self.nag is None:
            return [text]
        second = {
            name: value.expand(batch, *value.shape[1:])
            for name, value in self.nag.text.items()
            if isinstance(value, Tensor)
        }
        return [text, {name: second.get(name) for name in text}]

    def merge(self, all_passes: "Overrides") -> "Overrides":
        """Merge a pass's overrides with those for all passes: skips add up, else `self` takes precedence."""
        if all_passes is NO_OVERRIDES:
            return self
        return replace(
            self,
            skip_blocks=self.skip_blocks | all_passes.skip_blocks,
            skip_self_attention=self.skip_self_attention | all_passes.skip_self_attention,
            isolate_modalities=self.isolate_modalities or all_passes.isolate_modalities,
            drop_audio_reference=self.drop_audio_reference or all_passes.drop_audio_reference,
            max_references=(
                all_passes.max_references if self.max_references is None else self.max_references
            ),
            nag=self.nag or all_passes.nag,
            slow_frames=self.slow_frames or all_passes.slow_frames,
            # False is the override here: the network gets no embedded guidance
            embedded_guidance=self.embedded_guidance and all_passes.embedded_guidance,
            num_clean_frames=self.num_clean_frames or all_passes.num_clean_frames,
            clean_tokens=self.clean_tokens or all_passes.clean_tokens,
            audio_video_shapes=self.audio_video_shapes or all_passes.audio_video_shapes,
            section_cache=all_passes.section_cache if self.section_cache is None else self.section_cache,
            stage_lora_strengths=self.stage_lora_strengths or all_passes.stage_lora_strengths,
        )


NO_OVERRIDES = Overrides()


@dataclass(frozen=True)
class EditReference:
    """A clean image to which the unchanged parts of an edited image are reset at each step."""

    latents: Tensor  # B C F H W
    # B 1 F H W, above 0 where it changes; None: `rules` decide at each step
    changed_mask: Tensor | None = None
    rules: ConsistencyRules | None = None

    def to(self, device: torch.device) -> "EditReference":
        """Return the record with its tensors on `device`."""
        changed = None if self.changed_mask is None else self.changed_mask.to(device)
        return replace(self, latents=self.latents.to(device), changed_mask=changed)


@dataclass(frozen=True, eq=False)
class FixedLatents:
    """Clean latents that denoising keeps, in whole or in part; shaped like the noisy latents."""

    clean: Tensor
    clean_weights: Tensor  # float32, 0..1: fraction of `clean` in the clean prediction of each latent

    def to(self, device: torch.device) -> "FixedLatents":
        """Return the record with its tensors on `device`."""
        return FixedLatents(self.clean.to(device), self.clean_weights.to(device))

    def insert_clean(self, latents: Tensor) -> Tensor:
        """Return the latents with `clean` inserted wherever the weight is 1."""
        return torch.where(self.clean_weights == 1, self.clean, latents)

    def mix_prediction(self, step: "Step", velocity: Tensor) -> Tensor:
        """Return the velocity after mixing the clean prediction with `clean` by `clean_weights`."""
        return (1 - self.clean_weights) * velocity + self.clean_weights * (
            step.noisy - self.clean
        ) / step.sigma


@dataclass(frozen=True)
class Section:
    """One run of the denoising loop. Conditions have a batch dimension."""

    # B C F H W, model space, float32; B N with `overrides.audio_video_shapes`, as all latents of the loop
    noise: Tensor
    positive: Conditions
    negative: Conditions | None = None
    blank: Conditions | None = None
    first_latent_frame: int = 0  # index in the video
    source: Tensor | None = None  # clean latents of a source video, B C F H W; set by the shared loop
    nag: Conditions | None = None  # conditions of the NAG text alone, without media
    overrides: Overrides = NO_OVERRIDES  # for every pass
    # clean latents of its first frames, B C f H W, which the loop keeps fixed; `overrides.num_clean_frames`
    # tells the network how many
    clean_frames: Tensor | None = None
    clean_audio: Tensor | None = None  # clean latents of its entire audio, B C T M, also kept fixed
    # other fixed latents, whose tokens are marked in `overrides.clean_tokens`
    fixed_latents: FixedLatents | None = None
    # original of an edited image; None: the image may change everywhere
    edit_reference: EditReference | None = None
    previous_piece: PreviewPiece | None = None  # what the previous section added to the video
    label: str = ""  # such as "section 2 of 4", for the progress bar
    count: int = 1  # number of sections of the clip
    stage: int = 0  # index into `Prepared.stages`
    # the family's own solver; None: the solver of the request
    solver: "OwnSolver | None" = None
    # number of latent frames in the clip; later ones are not shown. None: all
    num_visible_frames: int | None = None

    @property
    def clean_streams(self) -> tuple[bool, bool]:
        """Return whether all frames are given rather than denoised, and whether all audio is."""
        joint, frames = self.overrides.audio_video_shapes, self.clean_frames
        has_image = joint is not None and frames is not None and frames.shape[2] == joint.image[1]
        return has_image, self.clean_audio is not None


# predict(*conditions, overrides=...) -> one velocity per condition
Predict = Callable[..., tuple[Tensor, ...]]
Calls = Mapping[Overrides, Mapping[int, Conditions]]  # the passes of a step: overrides -> id -> conditions
# (overrides, id of the conditions) -> velocity of the pass
PassVelocities = Mapping[tuple[Overrides, int], Tensor]
RunPasses = Callable[[Calls, Predict, Section], PassVelocities]

DitAt = Callable[[float], nn.Module]  # timestep -> the expert to call


@dataclass(frozen=True)
class Step:
    """A step of the denoising loop, before the network is called."""

    index: int  # index among the steps that are run, from 0
    num_steps: int  # number of steps that are run
    sigma: float  # noise level of `noisy`
    timestep: float  # timestep that the network gets
    noisy: Tensor  # B C F H W, float32; B N for video with audio
    audio_sigma: float | None = None  # noise level of the audio; None: the images'
    next_timestep: float = 0.0  # timestep of the next step; 0 in the last step


class OwnSolver(Protocol):
    """A family's own `modules.flow.solvers.Solver` for sampling; it may define noisy samples differently."""

    @property
    def schedule(self) -> "Schedule":
        """Noise levels of the steps."""

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Take the step `index` with a velocity from a sample, and return the next sample."""

    def begin(self, clean: Tensor) -> tuple[Tensor, int]:
        """Return the noisy sample to start from, and the index of its step in the schedule.

        Args:
            clean: Latents of a source.
        """

    def clean(self, sigma: float, noisy: Tensor, output: Tensor) -> Tensor:
        """Predict the clean latents from a sample and the network's output at a noise level."""


@dataclass(frozen=True)
class CompletedStep:
    """A completed denoising step, with the velocity after guidance."""

    step: Step
    velocity: Tensor  # like `step.noisy`, float32
    section: Section

    @property
    def clean(self) -> Tensor:
        """Predict the clean latents from this step, shaped like `step.noisy`.

        In flow matching, noisy = (1 - sigma) clean + sigma noise, and the velocity is noise - clean. If noise
        is added without scaling the latents, noisy = clean + sigma noise, and `predict` returns the noise. In
        both cases clean = noisy - sigma velocity. A family's own solver has its own formula.
        """
        if self.section.solver is not None:
            clean: Tensor = self.section.solver.clean(self.step.sigma, self.step.noisy, self.velocity)
            return clean
        joint = self.section.overrides.audio_video_shapes
        if self.step.audio_sigma is None or joint is None:
            return self.step.noisy - self.step.sigma * self.velocity
        # latents of images and of audio, which have different noise levels, are joined in one tensor
        image, audio = joint.split(self.step.noisy)
        image_velocity, audio_velocity = joint.split(self.velocity)
        clean_audio = audio - self.step.audio_sigma * audio_velocity
        return joint.join(image - self.step.sigma * image_velocity, clean_audio)

    @property
    def image_latents(self) -> Tensor:
        """Return the clean latents of the video or image without the audio, B C F H W."""
        joint = self.section.overrides.audio_video_shapes
        latents = self.clean if joint is None else joint.split(self.clean)[0]
        return latents[:, :, : self.section.num_visible_frames]


# Runs the network passes of a step and combines them into its velocity, shaped like `Step.noisy`.
Guidance = Callable[[Step, Predict, Section], Tensor]


# Called after each step. Returning True ends the section with `CompletedStep.clean` as its result. An
# exception ends the loop without a result.
StepCallback = Callable[[CompletedStep], bool]

"""The frozen records of generation: requests, sections, and one call of the network."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modules.attention.second_text import Steer
from modules.contract.data import Conditions, MediaEncoders, add_batch_axis
from modules.contract.source import VIDEO, Source
from modules.contract.step_cache import StepCaching
from modules.layers.rope import Slow

Spans = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Prompt:
    """A text to encode, with weights for parts of it as (start, end, weight) in characters.

    Parts stand in the order of the text, do not overlap, and neither begin nor end with white space.
    """

    text: str
    spans: Spans = ()
    second: str | None = None  # for the second text encoder of a family that has two; None: the same text
    is_negative: bool = False  # set by families that read negative prompts in another way


@dataclass(frozen=True)
class Prompts:
    """The texts of one section: what to show, what to avoid, and those that guidance ideas need."""

    positive: Prompt
    negative: Prompt | None = None
    blank: Prompt | None = None  # the empty prompt
    away: Prompt | None = None  # what attention is steered away from


@dataclass(frozen=True)
class Request:
    """The settings of one video or image. None = not said; `Family.prepare` makes a `Prepared` of it."""

    prompt: str
    seed: int
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    embedded_guidance: float | None = None
    flow_shift: float | None = None
    solver: str | None = None  # as `modules.flow.solvers` names it
    fps: float | None = None
    negative_prompt: str | None = None
    second_prompt: str | None = None  # for the second text encoder of a family that has two
    cfg_schedule: str | None = None
    away_prompt: str | None = None  # what attention is steered away from; None: the negative prompt
    image_path: Path | None = None
    end_image_path: Path | None = None
    control_path: Path | None = None
    source: Source | None = None  # what denoising starts from; None: noise
    # options of the family as text, which only `prepare` reads
    extra: Mapping[str, str] = field(default_factory=dict)
    # texts as they were typed, by their options, if something was drawn in them
    typed: Mapping[str, str] = field(default_factory=dict)
    step_cache: StepCaching | None = None  # which passes are skipped; None: none
    # what a prompt line says in place of settings of the command line, by their names
    settings: Mapping[str, Any] = field(default_factory=dict)
    # guidance scales of experts that have one of their own, by name
    expert_guidance: Mapping[str, float] = field(default_factory=dict)

    @property
    def first_image(self) -> Path | None:
        """The image that an image-to-video model starts from, or the video whose first frame it is."""
        if self.image_path is None and self.source is not None and self.source.option == VIDEO:
            return self.source.path
        return self.image_path


@dataclass(frozen=True)
class EncodedPrompts:
    """The conditions of one section's texts, without batch dimension, on the CPU."""

    positive: Conditions
    negative: Conditions | None = None
    blank: Conditions | None = None
    away: Conditions | None = None

    def section(self, noise: Tensor, inputs: Conditions | None = None) -> "Section":
        """Join texts, noise (B C F H W) and media conditions (with batch dimension) into a section.

        Texts that are the same object become the same conditions, so that a pass with them runs once.
        """
        positive = {**add_batch_axis(self.positive), **(inputs or {})}
        made = {id(self.positive): positive}

        def joined(text: Conditions | None) -> Conditions | None:
            if text is not None and id(text) not in made:
                made[id(text)] = {**add_batch_axis(text), **(inputs or {})}
            return None if text is None else made[id(text)]

        away = None if self.away is None else add_batch_axis(self.away)
        return Section(noise, positive, joined(self.negative), joined(self.blank), away=away)


# as `Family.decode`, but not limited to -1..1
DecodePart = Callable[[MediaEncoders, Tensor], Iterator[Tensor]]


@dataclass(frozen=True)
class Piece:
    """Addition of a section to a growing video, for its preview."""

    latents: Tensor  # B C F H W, to decode by themselves
    overlap: int  # how many of its frames show what is there already and fade into it; 0 for the first piece
    in_front: bool  # it is played before the video so far; else after it
    decode: DecodePart  # makes its pixels, before they fade into what is there
    so_far: Tensor  # B C F H W, on the CPU: latents of all sections made until now, in playing order


@dataclass(frozen=True)
class Away:
    """A second text, which the attention of a pass looks at too (normalised attention guidance)."""

    text: Conditions  # under the names that the family's text encoders give; in a network as its arguments
    steer: Steer


@dataclass(frozen=True)
class Turn:
    """Hold step and pass of a call of the network, for code that remembers something between steps."""

    step: int  # from 0, of those that are made
    num_steps: int
    timestep: float  # what the network is fed
    which: Hashable  # equal for the same pass of all steps of a section, and for no other pass of it


@dataclass(frozen=True, eq=False)
class Tweaks:
    """Ideas that change a single call of the network.

    Equal only to itself, so that it may be a key and hold tensors.
    """

    skip_blocks: frozenset[int] = frozenset()  # these blocks pass their input through (skip-layer guidance)
    away: Away | None = None
    slow_frames: Slow | None = None  # one frequency of the frames' rotary positions (RIFLEx)
    embedded_guidance: bool = True  # False: the network's input for it is left out
    # latent frames in front that are clean, not noisy: the network is told so, and their velocity is 0
    given_frames: int = 0
    turn: Turn | None = None  # set by the denoising loop

    def rename_away(self, rename: Callable[[Conditions], Conditions]) -> "Tweaks":
        """Return the tweaks with the second text as `rename` returns it, as a network takes its texts."""
        if self.away is None:
            return self
        return replace(self, away=replace(self.away, text=rename(self.away.text)))

    @property
    def steer(self) -> Steer | None:
        """Return the function that combines the attention to two texts; None: there is one."""
        return None if self.away is None else self.away.steer

    def texts(self, batch: int, **text: Any) -> list[dict[str, Any]]:
        """Return a network's text arguments, and then those of the second text, if there is one.

        A second text of one sample serves all samples of the batch.
        """
        if self.away is None:
            return [text]
        second = {
            name: value.expand(batch, *value.shape[1:])
            for name, value in self.away.text.items()
            if isinstance(value, Tensor)
        }
        return [text, {name: second.get(name) for name in text}]

    def within(self, all_passes: "Tweaks") -> "Tweaks":
        """Return the tweaks of a pass together with those of all passes of its section."""
        if all_passes is NO_TWEAKS:
            return self
        return replace(
            self,
            skip_blocks=self.skip_blocks | all_passes.skip_blocks,
            away=self.away or all_passes.away,
            slow_frames=self.slow_frames or all_passes.slow_frames,
            embedded_guidance=self.embedded_guidance and all_passes.embedded_guidance,
            given_frames=self.given_frames or all_passes.given_frames,
        )


NO_TWEAKS = Tweaks()


@dataclass(frozen=True)
class Section:
    """One run of the denoising loop. Conditions have a batch dimension."""

    noise: Tensor  # B C F H W, model space, float32
    positive: Conditions
    negative: Conditions | None = None
    blank: Conditions | None = None
    place: int = 0  # of its first latent frame in the video
    source: Tensor | None = None  # clean latents to start from, B C F H W; set by the shared loop
    away: Conditions | None = None  # of a text alone, without media
    tweaks: Tweaks = NO_TWEAKS  # of every pass
    # clean latents of its first frames, B C f H W, which the loop keeps in their place; `tweaks.given_frames`
    # tells the network
    given: Tensor | None = None
    made: Piece | None = None  # what the section before this one added to the video
    label: str = ""  # which one it is of several ("section 2 of 4"), for the progress bar
    count: int = 1  # how many sections the clip is made in


Predict = Callable[..., tuple[Tensor, ...]]  # predict(*conditions, tweaks=...) -> one velocity per condition

DitAt = Callable[[float], nn.Module]  # timestep -> the expert to call

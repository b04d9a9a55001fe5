"""The small rules of a model: experts, release, sources, guidance, tokens. Standard library only."""

import bisect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from protocols.families import HIGH_NOISE, LOW_NOISE
from protocols.inputs import IMAGE, LATENTS, VIDEO


@dataclass(frozen=True)
class Expert:
    """One network of a model, used from its lowest timestep up to where the next network begins."""

    name: str  # "high_noise": in options, file names and messages; "" if it is the only one
    min_timestep: float  # lowest timestep, 0..1000, at which it is used
    max_timestep: float = math.inf  # used below this timestep

    @property
    def description(self) -> str:
        """Name of the network in messages, such as "low-noise transformer"."""
        return f"{self.name.replace('_', '-')} transformer".lstrip()


ONE_EXPERT = (Expert("", 0.0),)

_WORDS = {"high": HIGH_NOISE, "low": LOW_NOISE}


# `high_noise`, `HighNoise`
_IN_FULL = re.compile(r"(?:^|_)(high|low)_?noise(?=_|$)")


# `HIGH` without `noise`: at the end of the name, or before a size, a dtype, a version and the like
_IN_SHORT = re.compile(
    r"(?:^|_)(high|low)(?=$|_(?:lora|model|fp\d+|bf16|rank\d*|r\d|v\d|e\d|ep\d|epoch|step\d|\d))"
)


def parse_expert(name: str) -> str | None:
    """Return the expert that the name of a file (without suffix) or folder indicates, or None."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
    experts = set(_IN_FULL.findall(plain))
    # the short form counts only if the name does not contain both words
    if not experts and not _WORDS.keys() <= set(plain.split("_")):
        experts = set(_IN_SHORT.findall(plain))
    return _WORDS[experts.pop()] if len(experts) == 1 else None


def infer_expert_from_path(path: Path, folders: Mapping[str, str]) -> str | None:
    """Return the noise expert that the name of a file or of its folder indicates; None if neither does.

    Args:
        path: File or folder.
        folders: Expert by the name of its folder, for models whose experts are sibling folders. Such a name
            counts only if the sibling folders exist too.
    """
    for part in (path, path.absolute().parent):
        expert = parse_expert(part.name if part.is_dir() else part.stem)
        if expert is not None:
            return expert
        if part.name in folders and all(part.with_name(name).is_dir() for name in folders):
            return folders[part.name]
    return None


def expert_at(timestep: float, experts: Sequence[Expert]) -> int:
    """Return the index of the expert for a timestep: the last that begins at or below it, else the first."""
    start = max(timestep, min(expert.min_timestep for expert in experts))
    begun = [
        (expert.min_timestep, index) for index, expert in enumerate(experts) if expert.min_timestep <= start
    ]
    return max(begun)[1]


def noisiest(experts: Sequence[Expert]) -> int:
    """Return the index of the expert for the highest timesteps, the first in denoising."""
    return max(range(len(experts)), key=lambda index: experts[index].min_timestep)


@dataclass(frozen=True)
class Projection:
    """Settings of adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), and its first step."""

    after_step: int  # last step, from 0, that still uses plain guidance
    scale: float  # replaces the guidance scale
    momentum: float  # of the running average of differences; negative values emphasize changes of direction
    norm_limit: float  # maximum norm of a sample's difference
    eta: float = 0.0  # weight of the component parallel to the positive velocity
    rescale: float = 0.0  # replaces --guidance_rescale


@dataclass(frozen=True)
class StreamGuidance:
    """Guidance of a clip's images or audio, as a weighted sum of differences between clean predictions.

    c + (text_scale - 1)(c - u) + perturbed_scale (c - p) + (modality_scale - 1)(c - i), with the predictions
    c for the prompt, u for the negative prompt, p of the perturbed pass and i of the isolated pass. Source:
    the released code of LTX-2.
    """

    text_scale: float | None = None  # None: the guidance scale of the request; 1: none
    perturbed_scale: float = 0.0  # p: in some blocks self-attention is replaced by its values; 0: none
    modality_scale: float = 1.0  # i: image and audio do not attend to each other; 1: none
    rescale: float = 0.0  # 0..1, how far the result's standard deviation is moved to c's
    # identity_scale (c - r) is added last, with the prediction r without an audio reference; 0: nothing
    identity_scale: float = 0.0


@dataclass(frozen=True)
class NegativeSkips:
    """Blocks that the negative pass skips, from fraction `start` to fraction `end` of the steps."""

    blocks: frozenset[int] = frozenset()
    start: float = 0.0
    end: float = 1.0
    option: str = ""  # option that sets the blocks, for messages; "": the blocks are not from an option

    def is_active(self, index: int, num_steps: int) -> bool:
        """Return whether the blocks are skipped in a step.

        Args:
            index: Index of the step, from 0.
            num_steps: Number of steps.
        """
        return bool(self.blocks) and self.start <= index / num_steps < self.end


@dataclass(frozen=True)
class ReferenceGuidance:
    """Guidance along a chain of passes, from the plainest to the one with all references and the prompt.

    The result is the plainest prediction plus each link, the difference of neighbors, times its weight. The
    passes before the last one have the negative prompt. Source: the released code of Bernini.
    """

    # number of references in each pass with the negative prompt, the first ones; None: all
    counts: tuple[int | None, ...]
    # weights of the links between these passes, for each expert; the guidance scale is the last link's
    weights: tuple[tuple[float, ...], ...]
    # whether links are those of clean predictions, limited in norm for each latent frame, with half of their
    # part that is parallel to the later prediction
    is_projected: bool = False


@dataclass(frozen=True)
class GuidanceRules:
    """How one request combines the predictions of its passes, with and without its prompt."""

    # guidance scale at which guidance has no effect: 1 in the usual formula
    neutral_scale: float = 1.0
    # guidance is used only while 1 - sigma is below this value, later only the positive pass; None: always
    max_signal: float | None = None
    # maximum norm of a guided velocity, as a multiple of the positive velocity's norm; None: no limit
    norm_limit: float | None = None
    # in each square with this side in latent pixels, a guided velocity gets the norm of the positive one;
    # None: norms are not changed
    norm_patch_size: int | None = None
    projection: Projection | None = None  # None: plain guidance
    references: ReferenceGuidance | None = None  # guidance by references; None: by the prompt alone
    # separate guidance of images and audio; (): the usual formula for both
    streams: tuple[StreamGuidance, ...] = ()
    perturbed_blocks: frozenset[int] = frozenset()  # blocks of the pass in `StreamGuidance.perturbed_scale`
    negative_skips: NegativeSkips = NegativeSkips()
    # strength of each of the network's stage LoRAs in the negative pass; (): they are off
    negative_lora_strengths: tuple[float, ...] = ()
    final_steps: int = 0  # number of last steps with `final_scale` instead of the guidance scale
    final_scale: float = 1.0


NO_GUIDANCE_RULES = GuidanceRules()


@dataclass(frozen=True)
class ConsistencyRules:
    """Rules for finding the changed parts of an edited image at each step.

    All other parts are reset to the original.
    """

    threshold: float  # for the mean difference over the channels of latents
    is_relative: bool = False  # whether the threshold is a fraction of the largest difference
    kernel_size: int = 3  # odd size of the blur over differences, in latent pixels
    dilate_size: int = 0  # dilation of changed parts, in latent pixels
    save_masks: bool = False  # whether the changed parts of each step are written to a file


@dataclass(frozen=True)
class NpzFormat:
    """Names of a family's npz caches. Their arrays have the same names as the tensors in our own caches.

    Latents are in `STEM_WWWWxHHHH{latent_suffix}.npz`, where W and H are the size of the image, with an array
    `latents_{h}x{w}` for each resolution. Texts are in `STEM{text_suffix}.npz`.
    """

    latent_suffix: str  # "_flux"
    text_suffix: str  # "_flux_te"
    # arrays of a text file that are not tensors of our caches: name -> the value that a valid file has
    constants: Mapping[str, bool | int | float] = field(default_factory=dict)
    # arrays of a text file that are all zeros: name -> (array with the same number of rows, columns); with ""
    # the array is a single vector of this length
    zeros: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    # arrays of a text file that store a setting of the table for other programs; our trainings ignore them.
    # Name of the array -> name of the setting
    table_settings: Mapping[str, str] = field(default_factory=dict)
    # arrays of a text file whose length differs per caption
    variable_length: frozenset[str] = frozenset()
    # whether names of latent arrays end in the size, so that a file may contain several resolutions
    has_resolutions: bool = True
    # whether older programs name the latents of an image STEM.npz, without size and model
    reads_untagged_files: bool = False


@dataclass(frozen=True)
class ModelRelease:
    """A released model: its repositories on the Hugging Face hub and the license of its weights."""

    repositories: tuple[str, ...]  # "owner/name"; several if their files are indistinguishable
    licence: str
    license_key: str  # the hub's identifier of the license, "other" if it has none
    license_url: str
    # False if users mostly train other checkpoints of this architecture, with their own licenses
    covers_all: bool = True


@dataclass(frozen=True)
class RequestSource:
    """Starting point of a request (such as a video), and how much noise is added to it."""

    option: str  # VIDEO, IMAGE or LATENTS
    path: Path
    denoise: float  # 0..1; 1 keeps nothing of the source if the schedule begins with pure noise
    denoise_option: str = "strength"  # the option that sets `denoise`, for messages and metadata
    # "traditional": `denoise` is a fraction of the steps; "direct": the noise level of the first step
    noise_mode: str = "traditional"
    pad_mode: str | None = None  # where a short video is padded, "front" or "end"; None: it is rejected
    extra_noise: float = 0.0  # factor of additional noise at the start

    @property
    def extra_option(self) -> str:
        """Option that adds noise to this source."""
        return "i2_extra_noise" if self.option == IMAGE else "v2v_extra_noise"

    @property
    def needs_vae(self) -> bool:
        """Return whether the VAE has to encode the source; only saved latents need no encoding."""
        return self.option != LATENTS

    def to_metadata(self) -> Mapping[str, object]:
        """Return the metadata of the source for outputs, by option name."""
        info: dict[str, object] = {self.option: self.path.name, self.denoise_option: self.denoise}
        info["v2v_noise_mode"] = self.noise_mode
        if self.option == VIDEO and self.pad_mode is not None:
            info["v2v_pad_mode"] = self.pad_mode
        if self.extra_noise:
            info[self.extra_option] = self.extra_noise
        return info


@dataclass(frozen=True)
class SourceRules:
    """Rules for how a family uses the starting point of a video."""

    supported_options: tuple[str, ...]  # supported kinds: VIDEO, IMAGE, LATENTS
    model_label: str  # the model in messages, such as "--task t2v-14B"
    stretch_frames: (
        bool  # whether frames are stretched to the size (bicubic), not scaled to cover it and cropped
    )
    compatible_models: frozenset[str]  # names in outputs' metadata of models with the same latent space


@dataclass(frozen=True)
class MagCache:
    """Skip passes while the residual of the blocks (output minus input) is known to change little."""

    # magnitude of the blocks' residual relative to the previous step; resampled to the number of steps
    ratios: tuple[float, ...]
    retention: float  # fraction of the steps, at the start, in which no pass is skipped
    threshold: float  # maximum sum of errors over consecutive skipped passes
    max_skips: int  # maximum number of consecutive skipped passes


@dataclass(frozen=True)
class TeaCache:
    """Skip passes while the first block's input differs little from that in the last computed pass."""

    threshold: float  # a pass is computed once the sum of predicted changes reaches this value
    # polynomial from change of the input to change of the output, highest power first; None: the family's
    coefficients: tuple[float, ...] | None


@dataclass(frozen=True)
class MagCalibration:
    """Measure the ratios for `MagCache` without skipping any passes."""


@dataclass(frozen=True)
class TeaCalibration:
    """Measure passes without skipping any, and fit the coefficients of `TeaCache`."""


StepCaching = MagCache | TeaCache | MagCalibration | TeaCalibration


class TextPiece(NamedTuple):
    """A token of a text, without the tokens that a tokenizer or a template adds."""

    id: int
    text: str  # what it stands for


@dataclass(frozen=True)
class TokenCount:
    """Token counts of one text.

    `tokens` is the number for the whole text, including the special tokens that the encoder adds. `limit` is
    the number of tokens that the encoder reads.
    """

    text: str  # as the encoder reads it, after its own cleaning
    tokens: int
    limit: int
    num_read: int  # characters of `text` that are read
    size_bytes: int = 0  # size of its cache; 0 if unknown
    pieces: tuple[TextPiece, ...] = ()  # the tokens of the whole text; () if they are unknown

    @property
    def is_cut(self) -> bool:
        """Whether the text has more tokens than the encoder reads."""
        return self.num_read < len(self.text)

    @property
    def cut_text(self) -> str:
        """The end of the text, which is beyond the encoder's token limit."""
        return self.text[self.num_read :]


# start and end of a token in a text, in characters; None for special tokens, which are not in the text
CharSpan = tuple[int, int] | None

CountTokens = Callable[[str], TokenCount]


def count_covered_characters(ends: Sequence[int], maximum: int, length: int) -> int:
    """Return the number of characters that the first `maximum` tokens of a text cover.

    Args:
        ends: Position after the last character of each token.
        maximum: Number of tokens that are kept.
        length: Number of characters of the text.
    """
    return length if len(ends) <= maximum else max(ends[:maximum], default=0)


def token_weights(
    text: str, tokens: Sequence[CharSpan], spans: Sequence[tuple[int, int, float]]
) -> list[float]:
    """Return the weight of each token: the weight of the span that contains its first character, else 1.

    Blanks at the start of a token are ignored.

    Args:
        text: Text that was tokenized.
        tokens: Start and end of each token in `text`, in characters; None for special tokens.
        spans: Start and end in characters, and weight; sorted by their starts.
    """
    span_starts = [start for start, _, _ in spans]
    weights = []
    for token in tokens:
        weight = 1.0
        if token is not None:
            start, end = token
            visible = (index for index in range(start, end) if not text[index].isspace())
            first = next(visible, start)
            # the last span that starts at this character or before it
            span_index = bisect.bisect_right(span_starts, first) - 1
            if span_index >= 0:
                _, span_end, span_weight = spans[span_index]
                if first < span_end:
                    weight = span_weight
        weights.append(weight)
    return weights


@dataclass(frozen=True)
class ShiftedLogit:
    """The sampler shifted_logit_normal: sigmoid(n + mu), where n is normally distributed.

    mu grows with the number of tokens of a clip. Source: LTX-2's trainer, timestep_samplers.py.
    """

    mus: tuple[float, float] = (0.95, 2.05)  # mu at 1024 and 4096 tokens; linear between and beyond them
    is_clamped: bool = False  # whether mu is limited to the range of `mus`
    is_stretched: bool = True  # whether the 0.5 % and 99.9 % quantiles of the draws are mapped to 0 and 1
    minimum: float = 1e-3  # stretched draws below this value are reflected at it
    uniform_share: float = 0.1  # fraction of stretched draws that are replaced by uniform ones

    def shift(self, tokens: int) -> float:
        """Return the flow shift e^mu for this number of tokens."""
        few, many = self.mus
        mu = few + (many - few) * (tokens - 1024) / (4096 - 1024)
        return math.exp(min(max(mu, min(self.mus)), max(self.mus)) if self.is_clamped else mu)


@dataclass(frozen=True)
class CutLogit:
    """The sampler cut_logit_normal: sigmoid(n) with normal n, truncated, rescaled and rounded up.

    Values above `cut` are drawn again; the others are divided by `cut` and rounded up to thousandths.
    """

    mean: float  # mean of n; positive values give more noise
    std: float
    cut: float = 1.0
    uniform_share: float = 0.0  # fraction of draws that are uniform


IMAGE_STREAM, AUDIO_STREAM = "video", "audio"  # names in logs for the two parts of a clip with audio


@dataclass(frozen=True)
class AudioLearning:
    """Loss weights of a clip's video and audio in training, and how the audio's noise level is drawn."""

    image_weight: float = 1.0  # loss weight of images, also without audio
    audio_weight: float = 1.0
    has_own_times: bool = False  # whether the noise level of audio is drawn separately from the images'
    clean_stream: str = ""  # stream that is kept clean and not trained, for clips with audio; "": none


@dataclass(frozen=True)
class ReferenceRules:
    """Rules for how a family uses reference images: the control images of an item or a request.

    Each image has its own size: the target's, or one that dataset keys or `keeps_aspect_ratio` set. If the
    family uses clips as references, only `max_references`, `clips` and the fields below `clips` have an
    effect.
    """

    max_references: int  # maximum number of references per item or request
    step: int = 16  # sides are multiples of this, in pixels
    seen_by_text: bool = False  # whether a text encoder sees them: changed images then need new text caches
    # whether text encoders see references exactly as the VAE does, with the same size, crop and colors
    text_sees_vae_input: bool = False
    edits_images: bool = (
        False  # the model was trained for edits: a request without a reference causes a warning
    )
    # whether a single reference keeps its own aspect ratio and is reduced to `area`
    keeps_aspect_ratio: bool = False
    max_area: int | None = None  # maximum number of pixels; None: the target's
    # For models that resize each reference to a square's area, in its own aspect ratio, the less the more
    # references there are: (largest number of references, side of the square in 64ths of the target's longer
    # side), ascending by the number; the last side is for all larger numbers. (): the rules above
    sides_by_count: tuple[tuple[int, int], ...] = ()
    # whether reference_directory and reference_path are supported, in addition to control media: a clip has
    # as many frames as its target, an image is one frame
    clips: bool = False
    size_factor: int = 1  # sides of references are smaller than the target's by this factor
    time_factor: int = 1  # the first frame is kept, then one frame of each group of this many
    max_frames: int = 0  # maximum number of frames; 0: the target's
    dropout_probability: float = 0.0  # fraction of batches that are trained without references of clips
    pad_with_white: bool = False  # whether each is a single image (a clip's first frame), padded with white
    control_masks: bool = False  # whether control_mask_directory and control_mask_path are supported
    # limit of the long side of references with `clips` that keep their own aspect ratio; 0: the target's size
    longest_side: int = 0

    def find_side(self, count: int, target: tuple[int, int]) -> int | None:
        """Return the side of the square whose area each of `count` references gets; None without such a rule.

        `target` is the width and height of the image that they are references of.
        """
        if not self.sides_by_count:
            return None
        shares = [share for most, share in self.sides_by_count if count <= most]
        share = shares[0] if shares else self.sides_by_count[-1][1]
        return max(target) * share // 64

    @property
    def factors(self) -> tuple[int, int, int]:
        """Return size factor, time factor and largest number of frames; caches record them."""
        return self.size_factor, self.time_factor, self.max_frames


@dataclass(frozen=True)
class ReferenceMedium:
    """One reference of a dataset item or a request: an image, a clip or separate audio."""

    kind: str  # "image", "video" or "audio"
    path: Path
    audio_path: Path | None = None  # file with the audio of a clip; None: the clip's own audio, if it has any
    is_silent: bool = False  # whether the audio of a clip is ignored

"""Requests and their prepared form; checks and defaults that all families share."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from modules.errors import MediaError, OptionError
from modules.limits import MAX_MADE_FRAMES, MAX_SCALE, MAX_SIDE, MAX_STEPS
from modules.option_values import check_seed, format_number
from modules.paths import explain_missing
from modules.text_files import bad_character
from protocols.data import AudioVideoShapes, LatentSpec, SamplingDefaults
from protocols.inputs import VIDEO
from protocols.rules import NO_GUIDANCE_RULES, ONE_EXPERT, Expert, GuidanceRules, RequestSource, StepCaching

if TYPE_CHECKING:  # caching has no use for positions
    from torch import Tensor

    from modules.layers.rope import SlowedFrequency

Spans = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Prompt:
    """A text to encode, with weights for parts of it as (start, end, weight) in characters.

    Parts are in the order of the text, do not overlap, and neither begin nor end with white space.
    """

    text: str
    weighted_spans: Spans = ()
    prompt_2: str | None = None  # for the second text encoder of a family that has two; None: the same text
    is_negative: bool = False  # set by families that encode negative prompts differently
    # set by families whose prompts may have syntax that captions lack (brackets for weights): the maximum
    # number of chunks of tokens; None: the text is encoded like a caption
    max_chunks: int | None = None
    # reference images that the encoder sees with the text, in order; it reads and resizes the files itself
    images: tuple[Path, ...] = ()
    # width and height that each of `images` has to cover; None: the encoder's own size
    image_size: tuple[int, int] | None = None
    # pixels of `images`, H W C uint8 each, if they are already resized; (): the encoder reads the files
    image_pixels: "tuple[Tensor, ...]" = field(default=(), compare=False)
    # for a caption that is cached: frames of its clip in training, F H W C uint8, and its references
    clip: "Tensor | None" = field(default=None, compare=False)
    media: tuple[Any, ...] = ()
    # for a caption that is cached: encoded with its references instead of it
    text_with_references: str | None = None
    # images, clips and audio that the family puts in front of the text, in order, as its own records
    media_before_text: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Prompts:
    """The texts of one section: what to show, what to avoid, and additional texts for guidance methods."""

    positive: Prompt
    negative: Prompt | None = None
    blank: Prompt | None = None  # the empty prompt
    nag: Prompt | None = None  # negative text of normalized attention guidance (NAG)


@dataclass(frozen=True)
class Request:
    """One video or image as the user requested it; `Family.prepare` resolves it to a `Prepared`.

    None stands for a value that the user did not set.
    """

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
    nag_prompt: str | None = None  # text of normalized attention guidance; None: the negative prompt
    image_path: Path | None = None
    end_image_path: Path | None = None
    control_path: Path | None = None
    control_images: tuple[Path, ...] = ()  # reference images, in their order (--control_image_path)
    source: RequestSource | None = None  # what denoising starts from; None: noise
    # the family's own options as text, which only `prepare` reads
    extra: Mapping[str, str] = field(default_factory=dict)
    # option -> text as the user typed it, for texts that were changed by wildcards
    typed_texts: Mapping[str, str] = field(default_factory=dict)
    step_cache: StepCaching | None = None  # rule for skipped passes; None: no pass is skipped
    # options of the command line that a prompt line overrides, by name
    settings: Mapping[str, Any] = field(default_factory=dict)
    # name of an expert -> its own guidance scale
    expert_guidance: Mapping[str, float] = field(default_factory=dict)

    @property
    def first_image(self) -> Path | None:
        """Return the start image of an image-to-video model, or the video whose first frame is the start."""
        if self.image_path is None and self.source is not None and self.source.option == VIDEO:
            return self.source.path
        return self.image_path


class Box(NamedTuple):
    """A rectangle in an image, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def of(self, pixels: "Tensor") -> "Tensor":
        """Crop pixels ... H W to this rectangle."""
        return pixels[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Prepared:
    """One video or image with all settings resolved and parsed, as `Family.prepare` returns it."""

    request: Request  # the request without media that the model cannot use
    seed: int
    prompts: Mapping[int, Prompts]  # index of the first section that uses them -> texts; 0 always exists
    negative_prompt: str
    width: int  # pixels
    height: int
    frames: int
    steps: int  # steps of the solver's schedule, of which `num_steps` are run
    fps: float
    solver: str  # as `modules.flow.solvers` names it
    flow_shift: float
    guidance_scale: tuple[float, ...]  # one for each of `Family.experts`, in their order; 1: no guidance
    embedded_guidance: float | None  # None: the model has no input for it
    # slowed frequency of the frames' positions (RIFLEx), for long videos
    slow_frames: "SlowedFrequency | None" = None
    first_step: int = 0  # first step that is run; above 0 for video-to-video; set by the shared loop
    rules: GuidanceRules = NO_GUIDANCE_RULES  # the model's own guidance rules
    # shapes of image and audio latents; None: there is no audio
    audio_video_shapes: AudioVideoShapes | None = None
    audio_shift: float = 1.0  # time shift from the images' noise levels to the audio's
    sigmas: tuple[float, ...] = ()  # noise levels of all steps, then 0; (): the solver's
    # timestep at the beginning of each step, if there is a source and the sections have their own solver;
    # (): computed from the solver's name and the other settings
    timesteps: tuple[float, ...] = ()
    # requests that run one after another, each from the result of the previous one; the guidance and step
    # cache options apply to the first
    stages: tuple["Prepared", ...] = ()
    # strength of each of the network's stage LoRAs (`networks.gated_loras.add_stage_loras`); (): none
    stage_lora_strengths: tuple[float, ...] = ()
    # for the memory plan: loaders of networks that produce the start of a stage, with their input shapes
    stage_start_networks: tuple[tuple[Callable[[Any], Any], tuple[int, ...]], ...] = ()
    family_settings: Any = None  # the family's own settings, which only the family reads
    output_suffix: str = ""  # appended to the names of output files
    visible_region: Box | None = None  # region to which decoded pixels are cropped; None: all pixels
    extra_metadata: Mapping[str, str] = field(default_factory=dict)  # additional metadata of outputs
    edit: "PixelEdit | None" = None  # change of the decoded pixels; None: they are written as they are

    @property
    def is_audio_alone(self) -> bool:
        """Return whether the request generates audio without images."""
        return self.audio_video_shapes is not None and not self.audio_video_shapes.image[1]

    @property
    def is_still(self) -> bool:
        """Return whether the result is a single image, which is written without audio."""
        return self.frames == 1 and not self.is_audio_alone

    @property
    def num_steps(self) -> int:
        """Number of steps to run; fewer than `steps` if denoising starts from a source."""
        return self.steps - self.first_step


@dataclass(frozen=True)
class PixelEdit:
    """An edit of the decoded pixels of a result; its latents stay as generated."""

    apply: "Callable[[Iterator[Tensor]], Iterator[Tensor]]"  # chunks of pixels, 1 3 F H W in -1..1
    metadata: Mapping[str, str]  # added to the metadata of the written file


logger = logging.getLogger(__name__)


# `usable` of `keep_usable_media` for a model that takes only text
NO_MEDIA = dict.fromkeys(("image_path", "end_image_path", "control_path", "control_images"), False)
_OPTIONS = {"control_images": "control_image_path"}  # field of a request -> option, if the names differ

REMEMBERED = 256  # number of files whose decoding check is cached
MAX_PIXELS = 1 << 34  # denoised together: 2000 frames of 4K, whose latents alone take 4 GiB


# field of a request -> its option, its letter in a prompt line, its maximum
COUNTS = {
    "width": ("--video_size, width", "w", MAX_SIDE),
    "height": ("--video_size, height", "h", MAX_SIDE),
    "frames": ("--video_length", "f", MAX_MADE_FRAMES),
    "steps": ("--infer_steps", "s", MAX_STEPS),
}

VALUES = {
    "guidance_scale": ("--guidance_scale", "l", MAX_SCALE),
    "embedded_guidance": ("--embedded_cfg_scale", "g", MAX_SCALE),
    "flow_shift": ("--flow_shift", "fs", 1000),
}


def get_size(request: Request, defaults: SamplingDefaults) -> tuple[int, int, int]:
    """Return width, height and number of frames of a request; unset values are the family's defaults."""
    width = request.width or defaults.width
    return width, request.height or defaults.height, request.frames or defaults.frames


def resolve_request(
    request: Request,
    defaults: SamplingDefaults,
    size: tuple[int, int, int],
    flow_shift: float,
    default_negative: str | None,
    experts: Sequence[Expert] = ONE_EXPERT,
) -> Prepared:
    """Return the request with every unset value replaced by the family's default.

    Only for families that generate a video in one section. The embedded guidance is dropped if the model
    has no input for it.

    Args:
        request: The request.
        defaults: Default settings of the family.
        size: Width, height and number of frames.
        flow_shift: Time shift of the schedule.
        default_negative: Negative prompt for requests without one; None: such a request runs without
            guidance, with a warning.
        experts: Networks of the model. Each uses its own guidance scale from the request or the defaults; if
            there is none, it uses the shared scale.
    """
    width, height, frames = size
    shared_scale = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    scale_by_expert = {**defaults.expert_guidance, **request.expert_guidance}
    guidance_scales = tuple(scale_by_expert.get(expert.name, shared_scale) for expert in experts)
    if request.expert_guidance:
        _warn_of_unknown_experts(request.expert_guidance, experts)
    negative = request.negative_prompt or default_negative  # an empty text asks for the default, too
    if negative is None and any(scale != 1 for scale in guidance_scales):
        logger.warning(
            "the guidance scale of %r is ignored because it has no negative prompt (--n)", request.prompt
        )
        guidance_scales = (1.0,) * len(guidance_scales)
    embedded_guidance = defaults.embedded_guidance  # None: the model has no input for it
    if embedded_guidance is not None and request.embedded_guidance is not None:
        embedded_guidance = request.embedded_guidance
    positive = Prompt(request.prompt, prompt_2=request.second_prompt)
    nag = None if request.nag_prompt is None else Prompt(request.nag_prompt)
    prompts = Prompts(positive, Prompt(negative or ""), nag=nag)
    return Prepared(
        request=request,
        seed=request.seed,
        prompts={0: prompts},  # the only section
        negative_prompt=negative or "",
        width=width,
        height=height,
        frames=frames,
        steps=request.steps or defaults.steps,
        fps=request.fps or defaults.fps,
        solver=request.solver or defaults.solver,
        flow_shift=flow_shift,
        guidance_scale=guidance_scales,
        embedded_guidance=embedded_guidance,
    )


def _warn_of_unknown_experts(expert_guidance: Mapping[str, float], experts: Sequence[Expert]) -> None:
    """Warn about guidance scales of networks that are not loaded."""
    for name in expert_guidance.keys() - {expert.name for expert in experts}:
        logger.warning("--guidance_scale_%s is ignored because --dit_%s is not given", name, name)


def keep_usable_media(request: Request, usable: Mapping[str, bool], why_not: str) -> Request:
    """Return the request without media that the model cannot use, and warn about each of them.

    Args:
        request: The request.
        usable: Field of the request, such as `image_path` -> whether the model can use these media.
        why_not: Reason for the warning, such as "--task t2v-1.3B does not take it".

    Raises:
        OptionError: If a usable file or folder does not exist or cannot be read.
    """
    for field_name, is_usable in usable.items():
        media = getattr(request, field_name)
        if not media:
            continue
        option = _OPTIONS.get(field_name, field_name)
        is_list = isinstance(media, tuple)
        paths = media if is_list else (media,)
        if not is_usable:
            logger.warning("--%s %s is ignored because %s", option, " ".join(map(str, paths)), why_not)
            without_media: dict[str, Any] = {field_name: () if is_list else None}
            request = replace(request, **without_media)
            continue
        for path in paths:
            if not path.exists():
                raise OptionError(
                    f"--{option} {path}: no such file or folder.{explain_missing(path)} Correct the path"
                )
            is_image = field_name != "control_path"  # control media are a clip or a folder of images
            check_opens(option, path, is_image)
    return request


def check_opens(name: str, path: Path, is_image: bool) -> None:
    """Check that an image can be decoded, or that a video or a folder of images can be opened.

    Images are read completely; of a video one frame is read.

    Args:
        name: Option that names the file, without `--`.
        path: File or folder to check.
        is_image: Whether a single image is expected.

    Raises:
        OptionError: If the file cannot be read.
    """
    from modules.media.decoding import is_animation
    from modules.media.reading import video_info

    try:
        if is_image:
            _decode_image(path, *_stat_file(path))
            if is_animation(path):
                logger.warning("--%s %s is animated: only its first image is used", name, path)
        else:
            video_info(path)
    except MediaError as error:
        kind = "an image file" if is_image else "a video, or a folder of images"
        near = "" if path.exists() else explain_missing(path)
        raise OptionError(f"--{name}: {str(error).rstrip('.')}.{near} Pass {kind}.") from None


def check_frames(option: str, path: Path, needed: int) -> None:
    """Raise MediaError if a video or a folder of images has too few frames.

    The needed frames are decoded, so that damaged ones are found.

    Args:
        option: Option as the user typed it, for messages.
        path: Video or folder.
        needed: Number of frames that are needed.
    """
    from modules.media.pixels import too_short

    available = count_frames_up_to(path, needed)
    if available < needed:
        raise too_short(option, path, available, needed)


def count_frames_up_to(path: Path, maximum: int) -> int:
    """Count the frames of a video or a folder of images by decoding them, and stop at `maximum`.

    Raises:
        MediaError: If the file cannot be decoded.
    """
    return _decode_frames(path, maximum, *_stat_file(path))


def _stat_file(path: Path) -> tuple[int, int]:
    """Return modification time and size of a file, the key of cached results; (0, 0) if it is missing."""
    if not path.exists():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=REMEMBERED)
def _decode_image(path: Path, *identity: int) -> None:
    from modules.media.reading import read_image

    read_image(path)


@functools.lru_cache(maxsize=REMEMBERED)
def _decode_frames(path: Path, maximum: int, *identity: int) -> int:
    from modules.media.reading import video_frames

    return sum(1 for _ in itertools.islice(video_frames(path), maximum))


def check_size(size: tuple[int, int, int], latent: LatentSpec) -> None:
    """Raise OptionError if the model cannot generate the size; the message names the nearest possible size.

    Args:
        size: Width, height, and number of frames that are denoised together.
        latent: Latent space of the family.
    """
    width, height, frames = size
    step = latent.pixel_step
    num_pixels = width * height * frames
    is_multiple = width % step == 0 and height % step == 0 and min(width, height) >= step
    if is_multiple and num_pixels <= MAX_PIXELS:
        return
    option = "--image_size" if latent.is_image_only else "--video_size"
    if num_pixels > MAX_PIXELS:
        raise OptionError(
            f"{option} {height} {width}: {frames} frames of this size have {num_pixels / 1e9:.0f} billion "
            f"pixels, but at most {MAX_PIXELS / 1e9:.0f} billion are allowed. Lower the size, or the video's "
            "length."
        )
    nearest_height = max(step, round(height / step) * step)
    nearest_width = max(step, round(width / step) * step)
    raise OptionError(
        f"{option} {height} {width} (height width): both must be multiples of {step}. Nearest: "
        f"{nearest_height} {nearest_width}"
    )


def full_patches(width: int, height: int, latent: LatentSpec) -> tuple[int, int]:
    """Round width and height down to the next size that the model can generate; warn if they change."""
    step = latent.pixel_step
    rounded = max(width // step, 1) * step, max(height // step, 1) * step
    if rounded != (width, height):
        logger.warning(
            "the size %d x %d is changed to %d x %d: width and height are multiples of %d",
            width,
            height,
            *rounded,
            step,
        )
    return rounded


def full_frames(frames: int, latent: LatentSpec) -> int:
    """Round a number of frames down to the next one that the model can generate; warn if it changes."""
    rounded = latent.lengths.fit(frames)
    if rounded != frames:
        logger.warning(
            "--video_length %d is changed to %d: clips of the model have %s frames",
            frames,
            rounded,
            latent.lengths,
        )
    return rounded


def check_values(request: Request) -> None:
    """Raise OptionError for invalid Unicode in texts and for numbers outside of the supported ranges."""
    _check_texts(request)
    if request.expert_guidance:
        _check_expert_guidance(request.expert_guidance)
    for name, (option, prompt_flag, maximum) in COUNTS.items():
        count = getattr(request, name)
        if count is not None and not 1 <= count <= maximum:
            raise OptionError(
                f"{option} {format_number(count)} (--{prompt_flag} in a prompt line): use a number from 1 "
                f"to {maximum}"
            )
    for name, (option, prompt_flag, maximum) in VALUES.items():
        value = getattr(request, name)
        if value is not None and not abs(value) <= maximum:  # nan too
            raise OptionError(
                f"{option} {value:g} (--{prompt_flag} in a prompt line): use a number of at most {maximum}"
            )
    if request.flow_shift is not None and request.flow_shift <= 0:
        raise OptionError(
            f"--flow_shift {request.flow_shift:g} (--fs in a prompt line): use a number above 0; 3 to 7 are "
            "usual"
        )
    if request.embedded_guidance is not None and request.embedded_guidance < 0:
        raise OptionError(
            f"--embedded_cfg_scale {request.embedded_guidance:g} (--g in a prompt line): pass 0 or more"
        )
    check_seed("--seed (--d in a prompt line)", request.seed)


def _check_expert_guidance(expert_guidance: Mapping[str, float]) -> None:
    """Raise OptionError if the guidance scale of a network is too large."""
    _, _, maximum = VALUES["guidance_scale"]
    for expert, scale in expert_guidance.items():
        if not abs(scale) <= maximum:  # nan too
            raise OptionError(f"--guidance_scale_{expert} {scale:g}: use a number of at most {maximum}")


def _check_texts(request: Request) -> None:
    """Raise OptionError for texts that are not valid Unicode."""
    texts = {
        "the prompt": request.prompt,
        "the prompt of --prompt_2 (--p2 in a prompt line)": request.second_prompt,
        "the negative prompt": request.negative_prompt,
        "the prompt of --nag_prompt (--nag in a prompt line)": request.nag_prompt,
    }
    for name, text in texts.items():
        # bytes that are not UTF-8 reach Python as halves of characters, which no file can contain
        character = bad_character(text or "")
        if character is not None:
            raise OptionError(
                f"{name} {text!r} is not UTF-8 text, it contains {character}: set the terminal or the file "
                "to UTF-8"
            )

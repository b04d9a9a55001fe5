"""FramePack's own options for caching, training and generation."""

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_model.options import (
    ALWAYS_TILED,
    REPRODUCE,
    HunyuanTextOptions,
    HunyuanVaeOptions,
    TextReadingOptions,
    model_options,
)
from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
    FREE,
    HABIT,
    REQUEST_SETTING,
    Options,
    make_request_facts,
    option,
)

SEPARATOR = ";;;"
_SECTION_RANGE = re.compile(r"(-?[0-9]+)(?:-([0-9]+))?")
MAX_SECTIONS = 10_000  # hours of video; a larger number is a typing mistake


def parse_section_texts(text: str, option: str) -> dict[int, str]:
    """Parse a prompt with a text for each section; return the texts by section number, always with 0.

    Negative numbers count from the end. If 0 is missing, it gets the text of the lowest number that is not
    negative, or else of the lowest number. If a section has two texts, the later one is used. `option` is
    named in messages. Raises OptionError for a range that runs backwards or is too long.
    """
    if SEPARATOR not in text:
        return {0: text}
    entries: dict[int, str] = {}
    for piece in text.split(SEPARATOR):
        if piece.strip():
            entries.update(_parse_piece(piece, option))
    if not entries:
        return {0: ""}
    substitute = min((index for index in entries if index >= 0), default=min(entries))
    return {0: entries[substitute], **entries}  # an entry 0 in `entries` takes precedence


def _parse_piece(piece: str, option: str) -> Iterator[tuple[int, str]]:
    """Yield (section, text) for each section of a piece such as `1-2: a cat`; an unnumbered one is for 0."""
    head, colon, text = piece.partition(":")
    numbers = _SECTION_RANGE.fullmatch(head.strip())
    if not colon or numbers is None:
        yield 0, piece.strip()
        return
    first = int(numbers[1])
    last = first if numbers[2] is None else int(numbers[2])
    if not first <= last < first + MAX_SECTIONS:
        raise OptionError(
            f"{option}: {head.strip()} is not a range of sections. Write the smaller number first, as 1-2."
        )
    for index in range(first, last + 1):
        yield index, text.strip()


logger = logging.getLogger(__name__)

# keys of caches: clean latents, and those at half the resolution, which single images lack
CLEAN, DOUBLED = "latents_clean", "latents_clean_2x"
FRAMES_PER_SECOND = 30  # as in training; --fps only sets the rate in the file
DEFAULT_SECONDS = 5.0
WINDOW = 9  # latent frames of a section, as the model was trained
LARGEST_WINDOW = 1000  # over two minutes in one section; a larger number is a typing mistake
ROPE_FACTOR = 0.5  # default of --rope_scaling_factor


_IMAGE_ENCODER = "SigLIP image encoder: folder or file"
_WINDOW: Mapping[str, Any] = {
    "default": WINDOW,
    "minimum": 1,
    "maximum": LARGEST_WINDOW,
    "hint": f"latent frames of a section; the model was trained with {WINDOW}",
}
F1 = ("--f1", "--vanilla_sampling")  # the second is an earlier name
_BULK = "decode all sections at once: no seams, more memory"


class FramePackLatentCachingOptions(Options, title="FramePack"):
    """Options of fpack_cache_latents.py in addition to the shared ones."""

    vae: HunyuanVaeOptions
    image_encoder: Path | None = option(_IMAGE_ENCODER)
    f1: bool = option("make caches for FramePack-F1, which generates sections in playing order", flags=F1)
    one_frame: bool = option("make caches for single images generated from control images")
    one_frame_no_2x: bool = option(
        "with --one_frame: omit the black frames at 2x", ignored_without="one_frame"
    )
    one_frame_no_4x: bool = option(
        "with --one_frame: omit the black frames at 4x", ignored_without="one_frame"
    )

    def __post_init__(self) -> None:
        _warn_if_f1_is_ignored(self.f1, self.one_frame)


class FramePackTextCachingOptions(Options, title="FramePack"):
    """Options of fpack_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: HunyuanTextOptions = option(
        settings={"text_encoder1": {"required": True}, "text_encoder2": {"required": True}}
    )


class FramePackTrainingOptions(Options, title="FramePack"):
    """Options of fpack_train_network.py in addition to the shared ones."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    vae: HunyuanVaeOptions = option(facts=FREE, **ALWAYS_TILED)
    text: HunyuanTextOptions = option(facts=FREE)
    image_encoder: Path | None = option(_IMAGE_ENCODER, facts=FREE, often=True)
    # for samples only: training takes these from the caches
    latent_window_size: int = option(f"latent frames of a section; default {WINDOW}", facts=FREE, **_WINDOW)
    bulk_decode: bool = option(_BULK, facts=FREE)
    # f1 and one_frame apply to samples, and are recorded in the metadata of saved files
    f1: bool = option("generate samples as FramePack-F1 does, in playing order", facts=HABIT, flags=F1)
    one_frame: bool = option(
        "generate single images as samples (--of and --ci in a prompt line)", facts=HABIT
    )
    embedded_guidance: float = option(name="guidance_scale", facts=HABIT)

    def __post_init__(self) -> None:
        _warn_if_f1_is_ignored(self.f1, self.one_frame)


class FramePackVideoOptions(Options, title="length and images of a video"):
    """Options of each video, read here only to be checked early: a prompt line may give them too."""

    image_path: str | None = option(
        "start image, or one for each section, as with --prompt: '0:first.png;;;1-2:then.png;;;-1:last.png'",
        often=True,
        facts=make_request_facts("image_path"),
    )
    video_seconds: float = option(
        "length of the video, rounded to whole sections; default 5",
        default=DEFAULT_SECONDS,
        often=True,
        facts=make_request_facts("video_seconds"),
    )
    video_sections: int | None = option(
        "number of sections, in place of --video_seconds", facts=make_request_facts("video_sections")
    )
    one_frame_inference: str | None = option(
        "generate an image, not a video: default, or with commas no_2x, no_4x, no_post, target_index=N, "
        "control_index=N+N",
        flags=("--one_frame_inference", "--one_frame"),
        metavar="default|target_index=N,control_index=N+N",
        facts=make_request_facts("one_frame"),
    )
    control_image_mask_path: tuple[str, ...] | None = option(
        "a mask for each control image: white parts are used; default: its alpha channel",
        facts=make_request_facts("control_image_mask_path"),
    )

    def __post_init__(self) -> None:
        parse_section_texts(self.image_path or "", "--image_path")
        if self.video_sections is not None and self.video_seconds != DEFAULT_SECONDS:
            logger.warning(
                "--video_seconds %g is ignored because --video_sections is given", self.video_seconds
            )
        if self.one_frame_inference is not None and not self.one_frame_inference.strip():
            raise OptionError(
                "--one_frame_inference is empty: pass default for an image, or places such as "
                "target_index=1,control_index=0+10; or omit it for a video"
            )


class FramePackGenerationOptions(Options, title="FramePack"):
    """Options of fpack_generate_video.py, in addition to the shared ones, for all videos of a run."""

    dit: Path | None = option("transformer checkpoint", often=True)
    vae: HunyuanVaeOptions = option(**ALWAYS_TILED)
    text: HunyuanTextOptions
    image_encoder: Path | None = option(_IMAGE_ENCODER, often=True)
    latent_window_size: int = option(
        f"latent frames of a section; default {WINDOW}", facts=REQUEST_SETTING, **_WINDOW
    )
    bulk_decode: bool = option(_BULK, facts=DECODING_SETTING)
    f1: bool = option(
        "generate the video as FramePack-F1 does, in playing order", facts=REQUEST_SETTING, flags=F1
    )
    video: FramePackVideoOptions
    one_frame_auto_resize: bool = option(
        "with --one_frame_inference: the pixel count of --video_size in the aspect ratio of the first "
        "control image, or of the start image if there is none",
        facts=REQUEST_SETTING,
    )
    latent_paddings: str | None = option(
        "distance of each section to the start image, last section first: 3,2,1,0"
    )
    reading: TextReadingOptions
    rope_scaling_factor: float = option(
        "factor for the positions within a frame at the noisy steps; 0.7 for 1.5 times the trained size",
        default=ROPE_FACTOR,
        above=0,
        below=math.inf,
        hint="such as 0.5",
        ignored_without="rope_scaling_timestep_threshold",
    )
    rope_scaling_timestep_threshold: int | None = option(
        "apply --rope_scaling_factor at this timestep and above (0 to 1000)", minimum=0, maximum=1000
    )
    reproduce: bool = option(REPRODUCE)


def caching_options(options: FramePackTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    text = options.text
    latents = options.vae.file.command_options()
    latents["--image_encoder"] = options.image_encoder or Placeholder("IMAGE_ENCODER_FILE")
    encoders = {"--text_encoder1": text.text_encoder1 or Placeholder("TEXT_ENCODER1_FILE")}
    encoders["--text_encoder2"] = text.text_encoder2 or Placeholder("TEXT_ENCODER2_FILE")
    return latents, encoders


def generation_options(options: FramePackTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    `sample` has the settings of a sample by name. An option whose value is None is left out.
    """
    window = options.latent_window_size
    example = sample.get("example")
    if example is None:
        inputs = _SampleInputs(
            image=sample.get("image_path"),
            controls=sample.get("control_images") or (),
            is_one_frame=options.one_frame,
            one_frame_settings=(sample.get("extra") or {}).get("one_frame", "default"),
        )
    else:
        # the sample repeats a dataset item
        # A dataset item's images and cached settings; `cached_with` are the caching script's options
        cached_with = sample.get("cached_with") or {}
        # one-frame items cache clean latents, but not the doubled ones of clips
        is_one_frame = options.one_frame or (CLEAN in example.cached and DOUBLED not in example.cached)
        # --one_frame_inference that fits cached items; `cached_with` are the caching script's options
        without = [word for word in ("no_2x", "no_4x") if cached_with.get(f"one_frame_{word}")]
        inputs = _SampleInputs(
            image=next(iter(example.controls), None) if is_one_frame else example.image,
            controls=example.controls,
            is_one_frame=is_one_frame,
            one_frame_settings=(
                ",".join([*filter(None, [example.one_frame_settings]), *without]) or "default"
            ),
        )
    values = {
        **model_options(options.dit, options.vae, options.text),
        "--image_encoder": options.image_encoder or Placeholder("IMAGE_ENCODER_FILE"),
        "--image_path": inputs.image or Placeholder("IMAGE_FILE"),
        "--embedded_cfg_scale": sample.get("embedded_guidance"),
        "--prompt_2": sample.get("second_prompt"),
        "--latent_window_size": None if window == WINDOW else window,
    }
    if inputs.is_one_frame:
        return values | {
            "--one_frame_inference": inputs.one_frame_settings,
            "--control_image_path": inputs.controls,
        }
    frames = sample.get("frames")
    seconds = f"{frames / FRAMES_PER_SECOND:.4g}" if frames else None
    return values | {"--f1": options.f1, "--video_seconds": seconds}


@dataclass(frozen=True)
class _SampleInputs:
    """Images of a sample, and whether and how it is generated as a single image."""

    image: Any  # the start image's path, None if there is none
    controls: Sequence[Any]  # paths of the control images of a single image
    is_one_frame: bool
    one_frame_settings: str  # --one_frame_inference


def _warn_if_f1_is_ignored(f1: bool, one_frame: bool) -> None:
    if f1 and one_frame:
        logger.warning(
            "--f1 is ignored because --one_frame is given: FramePack generates single images, F1 does not"
        )

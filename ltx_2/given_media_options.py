"""Options of parts of a generation's result that come from other media. Standard library only."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from modules.errors import OptionError
from modules.option_values import to_path
from modules.options import REQUEST_SETTING, Options, make_request_facts, option

MASK = "inpaint_mask"  # option of a generation, and key of a prompt line
FEATHER = 16  # pixels, half of a latent: content generated next to a latent hardly changes more of it


class Rectangle(NamedTuple):
    """Part of an image: top left corner and size, in pixels."""

    left: int
    top: int
    width: int
    height: int


def _file(text: str, **relations: Any) -> Any:
    return option(text, place="there", facts=REQUEST_SETTING, **relations)


@dataclass(frozen=True)
class PlacedImage:
    """A given image, and the frame or latent frame of the result that it replaces."""

    index: int  # index of a frame, or of a latent frame
    path: Path
    strength: float  # above 0, up to 1

    @property
    def clean_weight(self) -> int:
        """Return how clean the image stays (its STRENGTH), in units of `protocols.steps.CleanTokens`."""
        return round(1000 * self.strength)

    @property
    def option_value(self) -> str:
        """Return the image as it is written in its option: INDEX:PATH:STRENGTH."""
        return f"{self.index}:{self.path}:{self.strength:g}"


class Ltx2GivenMedia(Options, title="given parts of the result"):
    """Options for parts of the result that come from other media, for a LoRA trained to generate the rest."""

    extend_prefix: Path | None = _file(
        "continue this clip or image: its last frames are the start of the result"
    )
    extend_prefix_frames: int | None = option(
        "how many frames, made 8n + 1; default: all",
        minimum=1,
        ignored_without="extend_prefix",
        facts=REQUEST_SETTING,
    )
    extend_suffix: Path | None = _file(
        "generate what comes before this clip: its first frames are the end of the result"
    )
    extend_suffix_frames: int | None = option(
        "how many frames, made 8n + 1; the first one is not shown; default: all",
        minimum=9,
        ignored_without="extend_suffix",
        facts=REQUEST_SETTING,
    )
    keyframe: tuple[str, ...] | None = option(
        "an image that the result resembles at a frame, from 0; STRENGTH: 0 to 1, the default. May be given "
        "again",
        action="append",
        nargs=None,
        metavar="FRAME:FILE[:STRENGTH]",
        facts=make_request_facts("keyframe"),
    )
    latent_frame: tuple[str, ...] | None = option(
        "an image that is a latent frame of the result: 0 is the first frame, each other one 8 frames. May "
        "be given again",
        action="append",
        nargs=None,
        metavar="INDEX:FILE[:STRENGTH]",
        facts=make_request_facts("latent_frame"),
    )
    num_generated_keyframes: int = option(
        "LTX-2.5: number of single frames, evenly spaced between the ends, that are denoised next to the "
        "clip in the first stage; they stabilize long clips and are not part of the result",
        flags=("--num-generated-keyframes",),
        default=0,
        minimum=0,
        facts=REQUEST_SETTING,
    )
    outpaint_source: Path | None = _file(
        "clip or folder of images that the result extends on all sides of --outpaint_region",
        needs="outpaint_region",
    )
    outpaint_region: str | None = option(
        "X,Y,WIDTH,HEIGHT: where --outpaint_source is in the result, in pixels; in multiples of 32",
        needs="outpaint_source",
        facts=REQUEST_SETTING,
    )
    inpaint_source: Path | None = _file("clip or folder of images that --inpaint_mask or --retake changes")
    inpaint_mask: Path | None = option(
        "mask, image or clip: where it is white, --inpaint_source is kept, or without it --reference_video",
        place="there",
        facts=make_request_facts("inpaint_mask"),
    )
    inpaint_invert: bool = option(
        "keep what is black",
        default=False,
        action=argparse.BooleanOptionalAction,
        ignored_without="inpaint_mask",
        facts=REQUEST_SETTING,
    )
    inpaint_threshold: float = option(
        "a latent is kept if the mean of the mask over its pixels is above this, in all of its frames",
        default=0.5,
        minimum=0,
        maximum=1,
        ignored_without="inpaint_mask",
        facts=REQUEST_SETTING,
    )
    paste_source: int | None = option(
        "paste the kept pixels of --inpaint_source or --outpaint_source into the decoded result; PIXELS: "
        "width of the blended border inside the kept area; "
        f"without a value {FEATHER}",
        nargs="?",
        const=FEATHER,
        metavar="PIXELS",
        minimum=0,
        maximum=1024,
        excludes=("retake", "extend_prefix", "extend_suffix", "latent_frame"),
        why="only pixels of one clip, kept in all frames, are put back",
        facts=REQUEST_SETTING,
    )
    retake: str | None = option(
        "START,END in seconds: part of --inpaint_source that is regenerated, images and audio",
        needs="inpaint_source",
        facts=REQUEST_SETTING,
    )
    drive_audio: Path | None = _file(
        "generate images for this audio, which does not change; with --ltx2_mode av"
    )
    audio_prefix: Path | None = _file(
        "continue the audio of this file: its last seconds are the start of the result's"
    )
    audio_prefix_seconds: float | None = option(
        "how many seconds; default: all", above=0, ignored_without="audio_prefix", facts=REQUEST_SETTING
    )
    audio_inpaint_audio: Path | None = _file(
        "file whose audio is kept, except in --audio_inpaint_interval", needs="audio_inpaint_interval"
    )
    audio_inpaint_interval: str | None = option(
        "START,END in seconds: part of --audio_inpaint_audio that is regenerated",
        needs="audio_inpaint_audio",
        facts=REQUEST_SETTING,
    )

    @property
    def region(self) -> Rectangle | None:
        """Return the region of the result that outpainting's source fills; None without outpainting."""
        if self.outpaint_region is None:
            return None
        numbers = self.outpaint_region.split(",")
        try:
            region = Rectangle(*map(int, numbers))
            if min(region) < 0 or not region.width or not region.height:
                raise ValueError
        except (ValueError, TypeError):
            raise OptionError(
                f"--outpaint_region {self.outpaint_region}: pass X,Y,WIDTH,HEIGHT in pixels, such as "
                "128,0,512,512"
            ) from None
        return region

    @property
    def keyframes(self) -> tuple[PlacedImage, ...]:
        """Return the images of --keyframe with their frame indices."""
        return tuple(read_placed_image("keyframe", text) for text in self.keyframe or ())

    @property
    def latent_frames(self) -> tuple[PlacedImage, ...]:
        """Return the images of --latent_frame with their latent frame indices."""
        return tuple(read_placed_image("latent_frame", text) for text in self.latent_frame or ())

    @property
    def retake_interval(self) -> tuple[float, float] | None:
        """Return start and end of the interval to regenerate (--retake), in seconds; None without it."""
        return read_interval("retake", self.retake)

    @property
    def generated_audio_interval(self) -> tuple[float, float] | None:
        """Return the start and end of --audio_inpaint_interval in seconds; None without it."""
        return read_interval("audio_inpaint_interval", self.audio_inpaint_interval)

    @property
    def metadata(self) -> dict[str, str]:
        """Return the changed options of given media, as metadata of the result; files without their folders.

        --paste_source is left out, because it changes no latents; only a decoded result records it.
        """
        values = {}
        defaults = Ltx2GivenMedia()
        for field in fields(self):
            value = getattr(self, field.name)
            if value != getattr(defaults, field.name) and field.name != "paste_source":
                values[field.name] = value.name if isinstance(value, Path) else str(value)
        for name, images in (("keyframe", self.keyframes), ("latent_frame", self.latent_frames)):
            if images:
                values[name] = ", ".join(
                    f"{image.index}:{image.path.name}:{image.strength:g}" for image in images
                )
        return values

    @property
    def image_files(self) -> dict[str, Path]:
        """Return the given image files, keyed by the option that names each."""
        names = ("extend_prefix", "extend_suffix", "outpaint_source", "inpaint_source", "inpaint_mask")
        files = {name: path for name in names if (path := getattr(self, name)) is not None}
        for name, images in (("keyframe", self.keyframes), ("latent_frame", self.latent_frames)):
            if images:
                files[name] = images[0].path
        return files

    @property
    def audio_files(self) -> dict[str, Path]:
        """Return the files for audio alone, keyed by the option that names each."""
        names = ("drive_audio", "audio_prefix", "audio_inpaint_audio")
        return {name: path for name in names if (path := getattr(self, name)) is not None}

    def __post_init__(self) -> None:
        # these properties parse option values; reading them raises OptionError for an invalid one
        _ = (
            self.region,
            self.retake_interval,
            self.generated_audio_interval,
            self.keyframes,
            self.latent_frames,
        )
        whole_clips = [
            name for name in ("outpaint_source", "inpaint_source") if getattr(self, name) is not None
        ]
        if len(whole_clips) > 1:
            raise OptionError(
                "--outpaint_source and --inpaint_source: each is the whole clip. Pass one of them"
            )
        if self.inpaint_mask is not None and self.retake is not None:
            raise OptionError("--inpaint_mask and --retake: pass one of them")
        audio = self.audio_files
        if self.drive_audio is not None and len(audio) > 1:
            raise OptionError(f"{' and '.join(f'--{name}' for name in audio)}: the first is the whole audio")


def read_request_values(extra: Mapping[str, str]) -> dict[str, Any]:
    """Return the media options that a prompt line sets, by option name; None for a file that is not set.

    `extra` are the line's values as in `Request.extra`.
    """
    values: dict[str, Any] = dict.fromkeys(("keyframe", "latent_frame", MASK))
    for name in ("keyframe", "latent_frame"):
        if name in extra:
            values[name] = tuple(extra[name].split("\n"))
    if MASK in extra:
        values[MASK] = to_path(f"--{MASK}", extra[MASK])
    if "inpaint_invert" in extra:
        values["inpaint_invert"] = extra["inpaint_invert"] in ("1", "True")
    if "inpaint_threshold" in extra:
        values["inpaint_threshold"] = float(extra["inpaint_threshold"])
    return values


def read_placed_image(name: str, text: str) -> PlacedImage:
    """Parse INDEX:FILE or INDEX:FILE:STRENGTH, the value of an option that puts an image at a frame.

    Raises:
        OptionError: If the text does not have this form.
    """
    number, _, file_and_strength = text.partition(":")
    file, _, strength_text = file_and_strength.rpartition(":")
    try:
        strength = float(strength_text) if file else 1.0
    except ValueError:  # not a strength, but the end of a path that contains a colon
        file, strength = "", 1.0
    file = file or file_and_strength
    try:
        index = int(number)
    except ValueError:
        file = ""  # refused below
    if not file or not 0 < strength <= 1:
        raise OptionError(
            f"--{name} {text}: use a number, a file and optionally its strength up to 1, such as "
            "48:door.png:0.8"
        )
    return PlacedImage(index, Path(file), strength)


def read_interval(name: str, text: str | None) -> tuple[float, float] | None:
    """Parse an option's start and end in seconds; None if the option is not set."""
    if text is None:
        return None
    try:
        start, end = map(float, text.split(","))
        if not 0 <= start < end < float("inf"):
            raise ValueError
    except ValueError:
        raise OptionError(f"--{name} {text}: pass START,END in seconds, such as 1.5,3") from None
    return start, end

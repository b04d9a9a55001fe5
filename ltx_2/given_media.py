"""Parts of a result that a generation takes from other media: their latents, and which of them are kept.

Kept latents are clean in all steps and have time 0, marked as in `given`. Source: the released
pipelines, and the fork of musubi-tuner whose options these are.
"""
# Letters: C channels, F H W latents of a video, T M latents of the audio

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as functional
from torch import Tensor

from ltx_2.given import audio_latent_times, make_region_mask, video_latent_times
from ltx_2.given_media_options import Ltx2GivenMedia, Rectangle
from ltx_2.keyframes import check_keyframes
from ltx_2.references import read_pixels
from modules.errors import MediaError, OptionError
from modules.integers import ceil_div, round_up
from modules.media.pixels import image_pixels, to_pixels, video_pixels
from modules.media.reading import is_still, read_image, resize_cover, video_frames
from modules.media.samples import read_beginning, read_track
from modules.option_values import to_path
from modules.options import override_options
from protocols.data import AudioSpec, AudioVideoShapes, Conditions, LatentSpec
from protocols.requests import Prepared, Request, check_frames, check_opens, count_frames_up_to
from protocols.rules import ReferenceRules
from protocols.steps import FULLY_CLEAN, CleanTokens, FixedLatents, Section, clean_fraction

logger = logging.getLogger(__name__)
# names of conditions: clean latents, and the share of each latent that is kept, as in `CleanTokens`
IMAGE, IMAGE_SHARES = "given_image", "given_image_shares"
AUDIO, AUDIO_SHARES = "given_audio", "given_audio_shares"
MASK = "inpaint_mask"
LONGEST = 3600  # maximum number of seconds that are read from an audio file
Encode = Callable[[Tensor], Tensor]  # pixels 1 3 F H W -> latents 1 C f h w on the CPU


def media_of(media: Ltx2GivenMedia, request: Request) -> Ltx2GivenMedia:
    """Return the options of given clips, keyframes and masks, with a prompt line's values in their place.

    A mask without --inpaint_source applies to the request's only reference.

    Raises:
        OptionError: If a value cannot be parsed, or a mask has no clip, or a clip no mask.
    """
    extra = request.extra
    values: dict[str, Any] = dict.fromkeys(("keyframe", "latent_frame", "inpaint_mask"))
    for name in ("keyframe", "latent_frame"):
        if name in extra:
            values[name] = tuple(extra[name].split("\n"))
    if MASK in extra:
        values[MASK] = to_path(f"--{MASK}", extra[MASK])
    if "inpaint_invert" in extra:
        values["inpaint_invert"] = extra["inpaint_invert"] in ("1", "True")
    if "inpaint_threshold" in extra:
        values["inpaint_threshold"] = float(extra["inpaint_threshold"])
    media = override_options(media, values)
    if media.inpaint_mask is not None and media.inpaint_source is None:
        references = extra.get("reference_video", "")
        if not references or "\n" in references:
            raise OptionError(
                f"--{MASK} {media.inpaint_mask}: give --inpaint_source, the clip that it changes, or one "
                "--reference_video"
            )
        media = override_options(media, {"inpaint_source": to_path("--reference_video", references)})
    if media.inpaint_source is not None and not (media.inpaint_mask or media.retake):
        raise OptionError(
            f"--inpaint_source {media.inpaint_source}: give --{MASK} or --retake, which say what to change"
        )
    if media.paste_source is not None and not (media.inpaint_mask or media.outpaint_source):
        raise OptionError(
            f"--paste_source {media.paste_source}: there is no clip to paste. Give --{MASK} or "
            "--outpaint_source, or leave it out"
        )
    return media


def check_media(media: Ltx2GivenMedia, prepared: Prepared, latent: LatentSpec) -> None:
    """Raise OptionError or MediaError if given media cannot be opened, or do not fit the result's frames."""
    for name, path in media.image_files.items():
        check_opens(name, path, is_image=is_still(path))
    frames = prepared.frames
    check_keyframes(media.keyframes, frames)
    if media.num_generated_keyframes and media.num_generated_keyframes + 2 > frames:
        raise OptionError(
            f"--num_generated_keyframes {media.num_generated_keyframes}: {frames} frames have {frames - 2} "
            "between their ends. Give fewer, or make it longer"
        )
    total = (frames - 1) // latent.frame_step + 1
    for image in media.latent_frames:
        check_opens("latent_frame", image.path, is_image=True)
        if not 0 <= image.index < total:
            raise OptionError(
                f"--latent_frame {image.words}: the result has the latent frames 0 to {total - 1}. "
                "Give one of them"
            )
    for name in ("outpaint_source", "inpaint_source"):
        path = getattr(media, name)
        if path is not None:
            check_frames(f"--{name}", path, frames)
    region = media.region
    if region is not None:
        _check_region(region, prepared, latent)
    ends = [count_end(media, name, latent) for name in ("extend_prefix", "extend_suffix")]
    # latent frames; only the clip's very first latent covers a single frame, so the suffix has none
    shown = ceil_div(ends[0], latent.frame_step) + max(ends[1] - 1, 0) // latent.frame_step
    if max(ends) and shown >= total:
        raise OptionError(
            f"--video_length {frames}: --extend_prefix and --extend_suffix give all of it. Make it longer, "
            "or give --extend_prefix_frames, --extend_suffix_frames"
        )


def count_end(media: Ltx2GivenMedia, name: str, latent: LatentSpec) -> int:
    """Return how many frames of a clip to extend are encoded, a multiple of frame_step plus 1; 0 without it.

    `name` is extend_prefix or extend_suffix.

    Raises:
        OptionError: If the clip has too few frames; a clip at the end needs at least frame_step + 1.
    """
    path: Path | None = getattr(media, name)
    if path is None:
        return 0
    asked: int | None = getattr(media, f"{name}_frames")
    # without a requested number, all frames of the clip
    count = 1 if is_still(path) else count_frames_up_to(path, asked or 10**6)
    if asked is not None and count < asked:
        raise OptionError(
            f"--{name} {path}: it has {count} frames, --{name}_frames asks for {asked}. Give fewer"
        )
    count = (count - 1) // latent.frame_step * latent.frame_step + 1
    if name == "extend_suffix" and count == 1:
        raise OptionError(
            f"--{name} {path}: at least {latent.frame_step + 1} frames are needed. Give a longer clip"
        )
    return count


def _check_region(region: Rectangle, prepared: Prepared, latent: LatentSpec) -> None:
    """Raise OptionError unless the region lies in the frame and contains a full latent."""
    step = latent.pixel_step
    right, bottom = region.left + region.width, region.top + region.height
    region_text = ",".join(map(str, region))
    if right > prepared.width or bottom > prepared.height:
        raise OptionError(
            f"--outpaint_region {region_text}: the result has {prepared.width} x {prepared.height} pixels. "
            "Give a region inside of it"
        )
    if not mark_inside(region, prepared.height // step, prepared.width // step, step).any():
        raise OptionError(
            f"--outpaint_region {region_text}: it has no whole latent of {step} x {step} pixels. "
            f"Give multiples of {step}"
        )
    if any(number % step for number in region):
        logger.warning(
            "--outpaint_region %s: not in multiples of %d: pixels of its edges are made anew",
            region_text,
            step,
        )


def mark_inside(region: Rectangle, rows: int, columns: int, step: int) -> Tensor:
    """Return which latents, H W bool, lie completely inside a region of pixels."""
    top = round_up(region.top, step)
    left = round_up(region.left, step)
    bounds = (top, left, region.top + region.height, region.left + region.width)
    return make_region_mask(bounds, rows, columns, step)


@dataclass
class GivenImages:
    """Clean latents of the parts of the images that are given, and how much of each latent stays."""

    clean: Tensor  # 1 C F H W
    shares: Tensor  # 1 1 F H W int16, from 0 to FULLY_CLEAN, which stays entirely clean

    @property
    def frames(self) -> int:
        """Return the number of latent frames."""
        return self.clean.shape[2]

    def keep(self, clean: Tensor, is_kept: Tensor, first: int = 0, share: int = FULLY_CLEAN) -> None:
        """Mark latents, 1 C f H W, as given with a share, from the latent frame `first` on.

        Only positions where `is_kept`, broadcast to f H W, is true are marked.
        """
        kept_frames = slice(first, first + clean.shape[2])
        is_kept = is_kept.expand(clean.shape[2:])
        self.clean[:, :, kept_frames] = torch.where(is_kept, clean, self.clean[:, :, kept_frames])
        self.shares[:, :, kept_frames].masked_fill_(is_kept, share)


def encode_images(
    media: Ltx2GivenMedia, prepared: Prepared, encode: Encode, latent: LatentSpec, crf: int
) -> dict[str, Tensor]:
    """Encode all media that fix parts of the images; return latents and given shares, {} if none.

    Args:
        media: Options that give images or clips.
        prepared: The request, or the request of a stage.
        encode: Encodes pixels.
        latent: Latent space of the video.
        crf: H.264 quality to which single images are compressed first.
    """
    # keyframes are appended to the video, and encoded elsewhere
    if not media.image_files.keys() - {"keyframe"}:
        return {}
    shape = latent.shape(prepared.frames, prepared.height, prepared.width)
    given = GivenImages(torch.zeros(shape), torch.zeros(1, 1, *shape[2:], dtype=torch.int16))
    size = (prepared.width, prepared.height)
    region = media.region
    if media.outpaint_source is not None and region is not None:
        pixels = _paste(media.outpaint_source, region, prepared)
        given.keep(encode(pixels), mark_inside(region, *shape[3:], latent.pixel_step))
    if media.inpaint_source is not None:
        pixels = video_pixels(
            media.inpaint_source,
            "--inpaint_source",
            width=prepared.width,
            height=prepared.height,
            frames=prepared.frames,
        )
        given.keep(encode(pixels), mark_kept(media, prepared, latent))
    if media.extend_prefix is not None:
        count = count_end(media, "extend_prefix", latent)
        # a prefix gives its last frames
        frames = deque(_frames_of(media.extend_prefix), maxlen=count)
        given.keep(encode(_resize(frames, size)), torch.tensor(True))  # True: every position of these latents
    if media.extend_suffix is not None:
        count = count_end(media, "extend_suffix", latent)
        # drop the first latent, which covers one frame: latents at the end of a clip cover several
        clean = encode(_resize(islice(_frames_of(media.extend_suffix), count), size))[:, :, 1:]
        given.keep(clean, torch.tensor(True), given.frames - clean.shape[2])
    for image in media.latent_frames:
        pixels = image_pixels(image.path, prepared.width, prepared.height, crf=crf)
        given.keep(encode(pixels), torch.tensor(True), image.index, image.share)
    return {IMAGE: given.clean, IMAGE_SHARES: given.shares}


def _frames_of(path: Path) -> Iterable[Any]:
    return [read_image(path)] if is_still(path) else video_frames(path)


def _resize(frames: Iterable[Any], size: tuple[int, int]) -> Tensor:
    """Resize and crop frames to a width and height, 1 3 F H W."""
    resized = [resize_cover(numpy.ascontiguousarray(frame[..., :3]), size) for frame in frames]
    return to_pixels(torch.from_numpy(numpy.stack(resized)[None]))


def _paste(path: Path, region: Rectangle, prepared: Prepared) -> Tensor:
    """Place a clip on a gray canvas of the result's size, 1 3 F H W."""
    clip = video_pixels(
        path,
        "--outpaint_source",
        width=region.width,
        height=region.height,
        frames=prepared.frames,
    )
    canvas = clip.new_zeros(1, 3, prepared.frames, prepared.height, prepared.width)
    bottom, right = region.top + region.height, region.left + region.width
    canvas[..., region.top : bottom, region.left : right] = clip
    return canvas


def mark_kept(media: Ltx2GivenMedia, prepared: Prepared, latent: LatentSpec) -> Tensor:
    """Return which latents of the clip to change stay as they are, F H W bool, or F 1 1 for whole frames.

    Either a time span is generated anew, or a mask says what stays: white, or black if inverted.

    Raises:
        OptionError: If the mask keeps all or nothing, or is a clip with too few frames.
    """
    if media.retaken is not None:
        frames = latent.shape(prepared.frames, prepared.height, prepared.width)[2]
        starts, ends = video_latent_times(frames, latent.frame_step, prepared.fps)
        return ~touch(starts, ends, media.retaken)[:, None, None]
    assert media.inpaint_mask is not None  # checked by the options
    size = (prepared.width, prepared.height, prepared.frames)
    pixels = read_pixels(media.inpaint_mask, size, ReferenceRules(1, clips=True), latent)
    white = (pixels.mean(1) + 1) / 2  # 1 f H W
    if is_still(media.inpaint_mask):
        white = white.expand(-1, prepared.frames, -1, -1)
    if white.shape[1] < prepared.frames:
        raise OptionError(
            f"--inpaint_mask {media.inpaint_mask}: it has {white.shape[1]} frames, {prepared.frames} are "
            "made. Give a picture, or a clip as long as the result"
        )
    means = functional.avg_pool2d(white, latent.pixel_step)[0]  # frames h w
    is_kept = (means > media.inpaint_threshold) != media.inpaint_invert
    if is_kept.all() or not is_kept.any():
        part = "all" if is_kept.all() else "nothing"
        raise OptionError(
            f"--inpaint_mask {media.inpaint_mask}: it keeps {part} of the clip. White is kept: "
            "give another mask, or --inpaint_invert, which keeps black"
        )
    # the first latent frame covers one frame, each other one frame_step frames: kept if all of them are
    groups = is_kept[1:].unflatten(0, (-1, latent.frame_step)).all(1)
    return torch.cat([is_kept[:1], groups])


def touch(starts: Tensor, ends: Tensor, interval: tuple[float, float]) -> Tensor:
    """Return a mask of latents that overlap an interval in seconds.

    `starts` and `ends` are the times of each latent, in seconds.
    """
    start, end = interval
    return (ends > start) & (starts < end)


def encode_given_audio(
    media: Ltx2GivenMedia, prepared: Prepared, encode: Callable[[Tensor, int, float], Tensor], spec: AudioSpec
) -> dict[str, Tensor]:
    """Return the latents of the audio parts that a request gives, and which latents are given.

    The shares are 0 or FULLY_CLEAN (entirely given) in int16. Returns {} if no part is given.

    Args:
        media: Options that give audio.
        prepared: The request.
        encode: Takes samples, a number of frames and a frame rate, and returns latents.
        spec: Format of the audio latents.
    """
    joint = prepared.joint
    if joint is None:
        return {}
    clean = torch.zeros(1, *joint.audio)
    shares = torch.zeros(1, 1, joint.audio[1], 1, dtype=torch.int16)
    for kept in _read_kept_audio(media, joint.audio[1], prepared.frames / prepared.fps, spec):
        latents = encode(kept.samples, prepared.frames, prepared.fps).float().cpu()
        # later parts overwrite earlier ones
        clean = torch.where(kept.is_kept[:, None], latents, clean)
        shares.masked_fill_(kept.is_kept[:, None], FULLY_CLEAN)
    return {AUDIO: clean, AUDIO_SHARES: shares} if shares.any() else {}


class _KeptAudio(NamedTuple):
    """Audio of a file, part of which is given."""

    samples: Tensor  # 1 channels S
    is_kept: Tensor  # by latent step, bool


def _read_kept_audio(
    media: Ltx2GivenMedia, count: int, seconds: float, spec: AudioSpec
) -> Iterator[_KeptAudio]:
    """Yield the audio that options give, with the latents that it covers; later audio takes precedence.

    Args:
        media: Options that give audio.
        count: Number of steps of the audio latents.
        seconds: Length of the clip.
        spec: Format of the audio latents.
    """
    starts, ends = audio_latent_times(count)  # seconds of each latent
    retaken = media.retaken
    if retaken is not None and media.inpaint_source is not None and media.inpaint_source.is_file():
        samples = _read_samples(media.inpaint_source, 0, seconds, spec)
        if samples is not None:
            # everything but the latents that overlap the part to generate again
            yield _KeptAudio(samples, ~touch(starts, ends, retaken))
    if media.audio_inpaint_audio is not None and media.made_audio is not None:
        samples = _require_samples("audio_inpaint_audio", media.audio_inpaint_audio, 0, seconds, spec)
        yield _KeptAudio(samples, ~touch(starts, ends, media.made_audio))
    if media.audio_prefix is not None:
        length = _measure_audio(media.audio_prefix)
        part = min(media.audio_prefix_seconds or length, length)
        if part >= seconds:
            raise OptionError(
                f"--audio_prefix {media.audio_prefix}: {part:g} of the result's {seconds:g} seconds would be "
                "given. Give --audio_prefix_seconds, or make it longer"
            )
        # the end of the prefix file begins the result
        samples = _require_samples("audio_prefix", media.audio_prefix, length - part, part, spec)
        # tolerance for rounding
        yield _KeptAudio(samples, ends <= part + 1e-6)
    if media.drive_audio is not None:
        samples = _require_samples("drive_audio", media.drive_audio, 0, seconds, spec)
        yield _KeptAudio(samples, torch.ones(count, dtype=torch.bool))


def _read_samples(path: Path, start: float, seconds: float, spec: AudioSpec) -> Tensor | None:
    """Read a part of a file's audio, 1 channels S; return None if the file has no audio track."""
    count = round(seconds * spec.rate)
    begin = Fraction(round(start * spec.rate), spec.rate)
    samples = read_track(path, begin, count, rate=spec.rate, channels=spec.channels)
    return None if samples is None else torch.from_numpy(samples.copy())[None]


def _require_samples(name: str, path: Path, start: float, seconds: float, spec: AudioSpec) -> Tensor:
    samples = _read_samples(path, start, seconds, spec)
    if samples is None:
        raise MediaError(f"--{name} {path}: it has no sound. Give a file with sound")
    return samples


def _measure_audio(path: Path) -> float:
    """Return the length of a file's audio in seconds; raise MediaError if it has none."""
    track = read_beginning(path, LONGEST, 1)
    if track is None:
        raise MediaError(f"--audio_prefix {path}: it has no sound. Give a file with sound")
    return track.samples.shape[1] / track.rate


def take_given(conditions: dict[str, Any]) -> Conditions:
    """Remove the given latents and their shares from `conditions`, and return them."""
    names = (IMAGE, IMAGE_SHARES, AUDIO, AUDIO_SHARES)
    return {name: conditions.pop(name) for name in names if name in conditions}


def hold_given_parts(section: Section, given: Conditions, joint: AudioVideoShapes | None) -> Section:
    """Return the section with its given latents fixed, entirely or partly, at their clean values.

    Args:
        section: A section that starts from noise.
        given: Clean latents and given shares of images and audio, by condition name.
        joint: Shapes of its images and audio; None for images alone.
    """
    start = section.noise
    image_shares, audio_shares = given.get(IMAGE_SHARES), given.get(AUDIO_SHARES)
    if joint is None:
        clean, shares = _spread(given.get(IMAGE), image_shares, start)
    else:
        image, audio = joint.split(start)
        image, image_parts = _spread(given.get(IMAGE), image_shares, image)
        audio, audio_parts = _spread(given.get(AUDIO), audio_shares, audio)
        clean, shares = joint.join(image, audio), joint.join(image_parts, audio_parts)
    tokens = CleanTokens(
        image_shares if isinstance(image_shares, Tensor) else None,
        audio_shares if isinstance(audio_shares, Tensor) else None,
    )
    return replace(
        section,
        noise=shares * clean + (1 - shares) * start,
        fixed_latents=FixedLatents(clean, shares),
        overrides=replace(section.overrides, clean_tokens=tokens),
    )


def _spread(clean: Any, shares: Any, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return clean latents and their shares, 0..1, in the shape of `start`; zeros if nothing is given."""
    if not isinstance(clean, Tensor):
        return torch.zeros_like(start), torch.zeros_like(start)
    return clean.to(start.device), clean_fraction(shares, start).expand_as(start)

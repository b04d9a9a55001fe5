"""Parts of a result that are taken from other media: their latents, and which of them are kept.

Kept latents are clean in all steps and have time 0, marked as in `given`. Source: the released
pipelines, and the fork of musubi-tuner whose options these are.
"""
# Letters: C channels, F H W latents of a video, T M latents of the audio

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as functional
from torch import Tensor

from ltx_2.given import audio_latent_times, make_region_mask, video_latent_times
from ltx_2.given_media_options import MASK, Ltx2GivenMedia, PlacedImage, Rectangle, read_request_values
from ltx_2.keyframes import check_keyframes
from ltx_2.references import read_pixels
from modules.errors import MediaError, OptionError
from modules.integers import ceil_div, round_up
from modules.media.pixels import image_pixels, to_pixels, video_pixels
from modules.media.reading import is_single_image, read_image, resize_cover, video_frames
from modules.media.samples import read_beginning, read_track
from modules.option_values import to_path
from modules.options import override_options
from protocols.data import AudioSpec, AudioVideoShapes, Conditions, LatentSpec
from protocols.requests import Prepared, Request, check_frames, check_opens, count_frames_up_to
from protocols.rules import ReferenceRules
from protocols.steps import FULLY_CLEAN, CleanTokens, FixedLatents, Section, clean_fraction

logger = logging.getLogger(__name__)
# names of conditions: clean latents, and how clean each latent is, as in `CleanTokens`
IMAGE, IMAGE_WEIGHTS = "given_image", "given_image_shares"
AUDIO, AUDIO_WEIGHTS = "given_audio", "given_audio_shares"
MAX_SECONDS = 3600  # maximum number of seconds that are read from an audio file
Encode = Callable[[Tensor], Tensor]  # pixels 1 3 F H W -> latents 1 C f h w on the CPU


def with_request_values(media: Ltx2GivenMedia, request: Request) -> Ltx2GivenMedia:
    """Return the options for clips, keyframes and masks, overridden by the values of a prompt line.

    A mask without --inpaint_source applies to the request's only reference video.

    Raises:
        OptionError: If a value cannot be parsed, or there is a mask without a clip, or a clip without a mask.
    """
    media = override_options(media, read_request_values(request.extra))
    if media.inpaint_mask is not None and media.inpaint_source is None:
        # The request's reference video; raise OptionError for a mask unless there is exactly one
        references = request.extra.get("reference_video", "")  # one on each line
        if not references or "\n" in references:
            raise OptionError(
                f"--{MASK} {media.inpaint_mask}: pass --inpaint_source, the clip that it changes, or one "
                "--reference_video"
            )
        source = to_path("--reference_video", references)
        media = override_options(media, {"inpaint_source": source})
    # Raise OptionError if a clip to change or to paste is given without the option that says where
    if media.inpaint_source is not None and not (media.inpaint_mask or media.retake):
        raise OptionError(
            f"--inpaint_source {media.inpaint_source}: pass --{MASK} or --retake, which say what to change"
        )
    if media.paste_source is not None and not (media.inpaint_mask or media.outpaint_source):
        raise OptionError(
            f"--paste_source {media.paste_source}: there is no clip to paste. Pass --{MASK} or "
            "--outpaint_source, or omit it"
        )
    return media


def check_media(media: Ltx2GivenMedia, prepared: Prepared, latent: LatentSpec) -> None:
    """Raise OptionError or MediaError if given media cannot be opened, or do not fit the result's frames."""
    for name, path in media.image_files.items():
        check_opens(name, path, is_image=is_single_image(path))
    frames = prepared.frames
    check_keyframes(media.keyframes, frames)
    if media.num_generated_keyframes and media.num_generated_keyframes + 2 > frames:
        raise OptionError(
            f"--num_generated_keyframes {media.num_generated_keyframes}: {frames} frames have {frames - 2} "
            "between their ends. Use fewer, or make it longer"
        )
    _check_latent_frames(media.latent_frames, (frames - 1) // latent.frame_step + 1)
    for name in ("outpaint_source", "inpaint_source"):
        path = getattr(media, name)
        if path is not None:
            check_frames(f"--{name}", path, frames)
    if media.region is not None:
        _check_region(media.region, prepared, latent)
    # Raise OptionError if the clips to extend would fill the result, which has `frames` frames
    prefix_frames = count_extension_frames(media, "extend_prefix", latent)
    suffix_frames = count_extension_frames(media, "extend_suffix", latent)
    prefix_latents = ceil_div(prefix_frames, latent.frame_step)
    # only a clip's very first latent covers a single frame, so the suffix has none
    suffix_latents = max(suffix_frames - 1, 0) // latent.frame_step
    num_latent_frames = (frames - 1) // latent.frame_step + 1
    has_extension = prefix_frames > 0 or suffix_frames > 0
    if has_extension and prefix_latents + suffix_latents >= num_latent_frames:
        raise OptionError(
            f"--video_length {frames}: --extend_prefix and --extend_suffix cover all of it. Make it longer, "
            "or pass --extend_prefix_frames, --extend_suffix_frames"
        )


def _check_latent_frames(images: Iterable[PlacedImage], num_latent_frames: int) -> None:
    """Raise OptionError or MediaError if an image cannot be opened, or its latent frame does not exist."""
    for image in images:
        check_opens("latent_frame", image.path, is_image=True)
        if not 0 <= image.index < num_latent_frames:
            raise OptionError(
                f"--latent_frame {image.option_value}: the result has the latent frames 0 to "
                f"{num_latent_frames - 1}. Pass one of them"
            )


def count_extension_frames(media: Ltx2GivenMedia, name: str, latent: LatentSpec) -> int:
    """Return how many frames of the clip to extend are encoded: a multiple of frame_step plus 1; 0: no clip.

    `name` is extend_prefix or extend_suffix.

    Raises:
        OptionError: If the clip has too few frames; a clip at the end needs at least frame_step + 1.
    """
    path: Path | None = getattr(media, name)
    if path is None:
        return 0
    requested: int | None = getattr(media, f"{name}_frames")
    # without a requested number, all frames of the clip
    count = 1 if is_single_image(path) else count_frames_up_to(path, requested or 10**6)
    if requested is not None and count < requested:
        raise OptionError(
            f"--{name} {path}: it has {count} frames, but --{name}_frames asks for {requested}. Use fewer"
        )
    count = (count - 1) // latent.frame_step * latent.frame_step + 1
    if name == "extend_suffix" and count == 1:
        raise OptionError(
            f"--{name} {path}: at least {latent.frame_step + 1} frames are needed. Use a longer clip"
        )
    return count


def _check_region(region: Rectangle, prepared: Prepared, latent: LatentSpec) -> None:
    """Raise OptionError unless the region lies inside the frame and contains at least one whole latent."""
    step = latent.pixel_step
    right, bottom = region.left + region.width, region.top + region.height
    region_text = ",".join(map(str, region))
    if right > prepared.width or bottom > prepared.height:
        raise OptionError(
            f"--outpaint_region {region_text}: the result has {prepared.width} x {prepared.height} pixels. "
            "Pass a region inside of it"
        )
    if not make_inner_mask(region, prepared.height // step, prepared.width // step, step).any():
        raise OptionError(
            f"--outpaint_region {region_text}: it has no whole latent of {step} x {step} pixels. "
            f"Use multiples of {step}"
        )
    if any(number % step for number in region):
        logger.warning(
            "--outpaint_region %s is not in multiples of %d: pixels at its edges are generated",
            region_text,
            step,
        )


def make_inner_mask(region: Rectangle, rows: int, columns: int, step: int) -> Tensor:
    """Return which latents, H W bool, lie completely inside a region of pixels."""
    top = round_up(region.top, step)
    left = round_up(region.left, step)
    bounds = (top, left, region.top + region.height, region.left + region.width)
    return make_region_mask(bounds, rows, columns, step)


class CleanPart(NamedTuple):
    """Encoded frames, some of which stay clean (unchanged) in the result."""

    latents: Tensor  # 1 C f H W
    mask: Tensor | None = None  # bool, broadcast to f H W: which latents stay clean; None: all
    first_frame: int = 0  # latent frame of the result at which they begin
    clean_weight: int = FULLY_CLEAN  # how clean they are, up to FULLY_CLEAN


def encode_images(
    media: Ltx2GivenMedia, prepared: Prepared, encode: Encode, latent: LatentSpec, crf: int
) -> dict[str, Tensor]:
    """Encode all media that fix parts of the images; return latents and clean weights, {} if none.

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
    clean = torch.zeros(shape)
    weights = torch.zeros(1, 1, *shape[2:], dtype=torch.int16)
    for part in _encode_parts(media, prepared, encode, latent, crf):  # later parts replace earlier ones
        frames = slice(part.first_frame, part.first_frame + part.latents.shape[2])
        mask = torch.tensor(True) if part.mask is None else part.mask
        mask = mask.expand(part.latents.shape[2:])
        clean[:, :, frames] = torch.where(mask, part.latents, clean[:, :, frames])
        weights[:, :, frames].masked_fill_(mask, part.clean_weight)
    return {IMAGE: clean, IMAGE_WEIGHTS: weights}


def _encode_parts(
    media: Ltx2GivenMedia, prepared: Prepared, encode: Encode, latent: LatentSpec, crf: int
) -> Iterator[CleanPart]:
    """Encode one by one the media that fix parts of the result, and yield them as latents with their place.

    The arguments are those of `encode_images`.
    """
    size = (prepared.width, prepared.height)
    _, _, num_latent_frames, rows, columns = latent.shape(prepared.frames, prepared.height, prepared.width)
    if media.outpaint_source is not None and media.region is not None:
        # Read a clip onto a gray canvas of the result's size, 1 3 F H W
        clip = video_pixels(
            media.outpaint_source,
            "--outpaint_source",
            width=media.region.width,
            height=media.region.height,
            frames=prepared.frames,
        )
        canvas = clip.new_zeros(1, 3, prepared.frames, prepared.height, prepared.width)
        bottom, right = media.region.top + media.region.height, media.region.left + media.region.width
        canvas[..., media.region.top : bottom, media.region.left : right] = clip
        yield CleanPart(encode(canvas), make_inner_mask(media.region, rows, columns, latent.pixel_step))
    if media.inpaint_source is not None:
        pixels = video_pixels(
            media.inpaint_source,
            "--inpaint_source",
            width=prepared.width,
            height=prepared.height,
            frames=prepared.frames,
        )
        yield CleanPart(encode(pixels), make_unchanged_mask(media, prepared, latent))
    if media.extend_prefix is not None:
        num_frames = count_extension_frames(media, "extend_prefix", latent)
        yield CleanPart(encode(_resize(deque(_read_frames(media.extend_prefix), maxlen=num_frames), size)))
    if media.extend_suffix is not None:
        num_frames = count_extension_frames(media, "extend_suffix", latent)
        # drop the first latent, which covers one frame: latents at the end of a clip cover several
        latents = encode(_resize(islice(_read_frames(media.extend_suffix), num_frames), size))[:, :, 1:]
        yield CleanPart(latents, first_frame=num_latent_frames - latents.shape[2])
    # a latent frame may lie inside a clip above, which it replaces there, because it comes later
    for image in media.latent_frames:
        pixels = image_pixels(image.path, prepared.width, prepared.height, crf=crf)
        yield CleanPart(encode(pixels), first_frame=image.index, clean_weight=image.clean_weight)


def _read_frames(path: Path) -> Iterable[Any]:
    return [read_image(path)] if is_single_image(path) else video_frames(path)


def _resize(frames: Iterable[Any], size: tuple[int, int]) -> Tensor:
    """Resize and crop frames to a width and height, 1 3 F H W."""
    resized = [resize_cover(numpy.ascontiguousarray(frame[..., :3]), size) for frame in frames]
    return to_pixels(torch.from_numpy(numpy.stack(resized)[None]))


def make_unchanged_mask(media: Ltx2GivenMedia, prepared: Prepared, latent: LatentSpec) -> Tensor:
    """Return which latents of --inpaint_source stay unchanged, F H W bool, or F 1 1 for whole frames.

    Either a time span is regenerated, or a mask marks the unchanged area: white, or black if inverted.

    Raises:
        OptionError: If the mask keeps all or nothing, or is a clip with too few frames.
    """
    if media.retake_interval is not None:
        num_frames = latent.shape(prepared.frames, prepared.height, prepared.width)[2]
        starts, ends = video_latent_times(num_frames, latent.frame_step, prepared.fps)
        return ~overlaps(starts, ends, media.retake_interval)[:, None, None]
    assert media.inpaint_mask is not None  # checked by the options
    # Read --inpaint_mask as the brightness of each pixel of the result, 1 f H W in 0..1.
    size = (prepared.width, prepared.height, prepared.frames)
    pixels = read_pixels(media.inpaint_mask, size, ReferenceRules(1, clips=True), latent)
    white = (pixels.mean(1) + 1) / 2
    if is_single_image(media.inpaint_mask):
        white = white.expand(-1, prepared.frames, -1, -1)
    if white.shape[1] < prepared.frames:
        raise OptionError(
            f"--inpaint_mask {media.inpaint_mask}: it has {white.shape[1]} frames, but {prepared.frames} "
            "are generated. Pass an image, or a clip as long as the result"
        )
    means = functional.avg_pool2d(white, latent.pixel_step)[0]  # frames h w
    is_unchanged = (means > media.inpaint_threshold) != media.inpaint_invert
    if is_unchanged.all() or not is_unchanged.any():
        amount = "all" if is_unchanged.all() else "nothing"
        raise OptionError(
            f"--inpaint_mask {media.inpaint_mask}: it keeps {amount} of the clip. White is kept: "
            "pass another mask, or --inpaint_invert, which keeps black"
        )
    # a latent frame, except the first, covers several frames, and stays unchanged if all of them do
    later_latent_frames = is_unchanged[1:].unflatten(0, (-1, latent.frame_step)).all(1)
    return torch.cat([is_unchanged[:1], later_latent_frames])


def overlaps(starts: Tensor, ends: Tensor, interval: tuple[float, float]) -> Tensor:
    """Return a mask of latents that overlap an interval in seconds.

    `starts` and `ends` are the times of each latent, in seconds.
    """
    start, end = interval
    return (ends > start) & (starts < end)


def encode_given_audio(
    media: Ltx2GivenMedia, prepared: Prepared, encode: Callable[[Tensor, int, float], Tensor], spec: AudioSpec
) -> dict[str, Tensor]:
    """Encode the audio that a request gives for parts of the result; return latents and clean weights.

    A weight is FULLY_CLEAN where the latent stays as given, else 0, in int16. Returns {} without given audio.

    Args:
        media: Options that give audio.
        prepared: The request.
        encode: Takes samples, a number of frames and a frame rate, and returns latents.
        spec: Format of the audio latents.
    """
    joint = prepared.audio_video_shapes
    if joint is None:
        return {}
    _, num_latents, _ = joint.audio
    clean = torch.zeros(1, *joint.audio)
    weights = torch.zeros(1, 1, num_latents, 1, dtype=torch.int16)
    for part in _read_audio_parts(media, num_latents, prepared.frames / prepared.fps, spec):
        latents = encode(part.samples, prepared.frames, prepared.fps).float().cpu()
        # later parts overwrite earlier ones
        clean = torch.where(part.is_clean[:, None], latents, clean)
        weights.masked_fill_(part.is_clean[:, None], FULLY_CLEAN)
    return {AUDIO: clean, AUDIO_WEIGHTS: weights} if weights.any() else {}


class _GivenAudio(NamedTuple):
    """Audio from a file, and which of its latents the result keeps."""

    samples: Tensor  # 1 channels S
    is_clean: Tensor  # by audio latent, bool


def _read_audio_parts(
    media: Ltx2GivenMedia, num_latents: int, seconds: float, spec: AudioSpec
) -> Iterator[_GivenAudio]:
    """Yield the given audio, each part with the latents it covers."""
    # Where parts overlap, the later one counts.
    # seconds: Length of the result.
    starts, ends = audio_latent_times(num_latents)
    retake = media.retake_interval
    # a folder of frames has no audio
    if retake is not None and media.inpaint_source is not None and media.inpaint_source.is_file():
        samples = _read_samples(media.inpaint_source, 0, seconds, spec)
        if samples is not None:
            # everything but the latents that overlap the part to generate again
            yield _GivenAudio(samples, ~overlaps(starts, ends, retake))
    generated_interval = media.generated_audio_interval
    if media.audio_inpaint_audio is not None and generated_interval is not None:
        samples = _require_samples("audio_inpaint_audio", media.audio_inpaint_audio, 0, seconds, spec)
        yield _GivenAudio(samples, ~overlaps(starts, ends, generated_interval))
    if media.audio_prefix is not None:
        yield _read_audio_prefix(media.audio_prefix, media.audio_prefix_seconds, ends, seconds, spec)
    if media.drive_audio is not None:
        samples = _require_samples("drive_audio", media.drive_audio, 0, seconds, spec)
        yield _GivenAudio(samples, torch.ones(num_latents, dtype=torch.bool))


def _read_audio_prefix(
    path: Path, requested_seconds: float | None, latent_ends: Tensor, seconds: float, spec: AudioSpec
) -> _GivenAudio:
    """Read the end of --audio_prefix, which becomes the start of a result of `seconds` seconds."""
    # `requested_seconds` is --audio_prefix_seconds; `latent_ends` are the end times of the result's latents.
    # The length of a file's audio in seconds; raise MediaError if it has none
    track = read_beginning(path, MAX_SECONDS, 1)
    if track is None:
        raise MediaError(f"--audio_prefix {path}: the file has no audio. Pass one with audio")
    file_seconds = track.samples.shape[1] / track.rate
    prefix_seconds = min(requested_seconds or file_seconds, file_seconds)
    if prefix_seconds >= seconds:
        raise OptionError(
            f"--audio_prefix {path}: {prefix_seconds:g} of the result's {seconds:g} seconds would be "
            "given. Pass --audio_prefix_seconds, or make it longer"
        )
    samples = _require_samples("audio_prefix", path, file_seconds - prefix_seconds, prefix_seconds, spec)
    is_in_prefix = latent_ends <= prefix_seconds + 1e-6  # tolerance for rounding
    return _GivenAudio(samples, is_clean=is_in_prefix)


def _read_samples(path: Path, start: float, seconds: float, spec: AudioSpec) -> Tensor | None:
    """Read a part of a file's audio, 1 channels S; return None if the file has no audio track."""
    count = round(seconds * spec.rate)
    begin = Fraction(round(start * spec.rate), spec.rate)
    samples = read_track(path, begin, count, rate=spec.rate, channels=spec.channels)
    return None if samples is None else torch.from_numpy(samples.copy())[None]


def _require_samples(name: str, path: Path, start: float, seconds: float, spec: AudioSpec) -> Tensor:
    samples = _read_samples(path, start, seconds, spec)
    if samples is None:
        raise MediaError(f"--{name} {path}: the file has no audio. Pass one with audio")
    return samples


def pop_clean_latents(conditions: dict[str, Any]) -> Conditions:
    """Remove the clean latents and their weights from `conditions`, and return them."""
    names = (IMAGE, IMAGE_WEIGHTS, AUDIO, AUDIO_WEIGHTS)
    return {name: conditions.pop(name) for name in names if name in conditions}


def fix_clean_latents(section: Section, clean_latents: Conditions, joint: AudioVideoShapes | None) -> Section:
    """Put given latents into a section: they are mixed into its noise, and kept while denoising.

    Args:
        section: A section that starts from noise.
        clean_latents: From `pop_clean_latents`: clean latents of images and audio, and their weights, which
            are the clean fractions in thousandths.
        joint: Shapes of its images and audio; None for images alone.
    """
    noise = section.noise
    image_weights, audio_weights = clean_latents.get(IMAGE_WEIGHTS), clean_latents.get(AUDIO_WEIGHTS)
    if joint is None:
        clean, fractions = _expand_clean(clean_latents.get(IMAGE), image_weights, noise)
    else:
        image_noise, audio_noise = joint.split(noise)
        image, image_fractions = _expand_clean(clean_latents.get(IMAGE), image_weights, image_noise)
        audio, audio_fractions = _expand_clean(clean_latents.get(AUDIO), audio_weights, audio_noise)
        clean, fractions = joint.join(image, audio), joint.join(image_fractions, audio_fractions)
    clean_tokens = CleanTokens(
        image_weights if isinstance(image_weights, Tensor) else None,
        audio_weights if isinstance(audio_weights, Tensor) else None,
    )
    return replace(
        section,
        noise=fractions * clean + (1 - fractions) * noise,
        fixed_latents=FixedLatents(clean, fractions),
        overrides=replace(section.overrides, clean_tokens=clean_tokens),
    )


def _expand_clean(clean: Any, weights: Any, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return clean latents and how clean they are, 0..1, both shaped like `start`; zeros without any."""
    if not isinstance(clean, Tensor):
        return torch.zeros_like(start), torch.zeros_like(start)
    return clean.to(start.device), clean_fraction(weights, start).expand_as(start)

"""Select the frames of a video and the bucket of an image; read loss masks.

Frames are dropped to reach a frame rate, then spans are cut as frame_extraction says. White areas of a loss
mask are learned, black areas are not; masks come from a file (`mask_directory`, `mask_path`) or from
transparency (`alpha_mask`).
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataset.config_keys import AUTO
from dataset.sources.mask_files import has_same_aspect
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable
from modules.console import format_count
from modules.errors import DatasetError, MediaError
from modules.integers import ceil_div, round_up
from modules.media import buckets
from modules.media.decoding import is_animation
from modules.media.lengths import DEFAULT_LENGTHS, ClipLengths
from modules.media.opening import open_video
from modules.media.reading import Frame, MaskChannelDetector, read_mask
from protocols.data import KEYFRAME_LATENTS, LATENT_GUIDE, MediaTable
from protocols.rules import ReferenceMedium

Span = tuple[int, int]  # index of the first frame, and number of frames, counted in kept frames

TOLERANCE = 0.02  # relative difference of frame rates that count as equal: 29.97 is 30
MAX_CHECKED_FILES = 1000  # maximum number of clips of a dataset whose headers are read for their frame rates


def spans(table: DatasetTable, kept_frames: int, lengths: ClipLengths = DEFAULT_LENGTHS) -> tuple[Span, ...]:
    """Return the spans (first frame, length) that training cuts from a clip with `kept_frames` frames.

    The result is () if the clip is shorter than all target_frames. Spans are sorted by target, then by start,
    without duplicates. `lengths` are the clip lengths of the family, to which frame_extraction = "full"
    rounds down.
    """
    if table.buckets.frame_extraction == "full":
        length = min(kept_frames, table.buckets.max_frames)
        return ((0, lengths.fit(length)),) if length > 0 else ()
    clip_spans: dict[Span, None] = {}
    for target in table.buckets.target_frames:
        if target <= kept_frames:
            starts = _starts(table, target, last=kept_frames - target)
            clip_spans |= dict.fromkeys((start, target) for start in starts)
    return tuple(clip_spans)


def _starts(table: DatasetTable, target: int, last: int) -> Iterable[int]:
    """Return the frames at which the table's frame_extraction starts spans of `target` frames."""
    # `last` is the last possible start.
    match table.buckets.frame_extraction:
        case "head":
            return (0,)
        case "chunk":
            return range(0, last + 1, target)
        case "slide":
            return range(0, last + 1, table.buckets.frame_stride)
        case "uniform":
            # computed in float64 and rounded down, as in musubi-tuner, so that caches agree
            starts: list[int] = np.linspace(0, last, table.buckets.frame_sample).astype(int).tolist()
            return starts
        case mode:
            raise ValueError(f"unknown frame extraction {mode!r}")


def describe_short(table: DatasetTable, clip_spans: Collection[Span], kept_frames: int) -> str | None:
    """Return which target_frames a clip is too short for; None if it is long enough for all, or for none."""
    if not clip_spans or table.kind == "image" or table.buckets.frame_extraction == "full":
        return None
    lengths = {length for _, length in clip_spans}
    missing = [str(target) for target in table.buckets.target_frames if target not in lengths]
    if not missing:
        return None
    return f"{format_count(kept_frames, 'frame')}, too few for {', '.join(missing)} of target_frames"


def max_decoded_frames(table: DatasetTable) -> int | None:
    """Return after how many kept frames decoding can stop; None if all frames are needed."""
    if table.buckets.frame_extraction == "head":
        return max(table.buckets.target_frames)
    if table.buckets.frame_extraction == "full":
        return table.buckets.max_frames
    return None  # spans may begin anywhere


def media_table(
    table: DatasetTable,
    has_control: bool = False,
    has_references: bool = False,
    has_guides: bool = False,
    reference_media: tuple[tuple[ReferenceMedium, ...], ...] = (),
) -> MediaTable:
    """Return the facts about a table that model families check.

    Args:
        table: Table of the dataset file.
        has_control: Whether its items have control media.
        has_references: Whether its items have references or control masks.
        has_guides: Whether its items have guides.
        reference_media: Reference media of each row.
    """
    target_frames: tuple[int, ...] = ()
    max_frames = None
    if table.kind == "video" and table.buckets.frame_extraction == "full":
        max_frames = table.buckets.max_frames  # lengths vary
    elif table.kind == "video":
        target_frames = table.buckets.target_frames
    guides = []  # keys of their latents
    if has_guides:
        for number, guide in enumerate(table.references.guides):
            guides.append(f"{KEYFRAME_LATENTS}_{number}" if guide.is_keyframe else LATENT_GUIDE)
    return MediaTable(
        name=table.name,
        kind=table.kind,
        has_control=has_control,
        has_references=has_references,
        target_frames=target_frames,
        max_frames=max_frames,
        window=table.buckets.fp_latent_window_size,
        clean_indices=table.references.fp_1f_clean_indices or (),
        target_index=table.references.fp_1f_target_index,
        has_post=not table.references.fp_1f_no_post,
        flips=table.buckets.augmentation.flip,
        guides=tuple(guides),
        reference_media=reference_media if any(reference_media) else (),  # empty if no row has any
    )


def one_frame_settings(table: DatasetTable) -> str:
    """Return the --one_frame_inference value that matches a table's fp_1f keys; "" for other tables."""
    settings = []
    if table.references.fp_1f_target_index is not None:
        settings.append(f"target_index={table.references.fp_1f_target_index}")
    if table.references.fp_1f_clean_indices:
        settings.append(f"control_index={'+'.join(map(str, table.references.fp_1f_clean_indices))}")
    if table.references.fp_1f_no_post:
        settings.append("no_post")
    return ",".join(settings)


def keep_pattern(source_fps: float | None, target_fps: float) -> Iterator[bool]:
    """Yield for each frame, without end, whether to keep it when `source_fps` is reduced to `target_fps`.

    Frames are dropped, never repeated: all frames are kept if the source is slower or `source_fps` is None.
    The running sum must be float64, because its rounding determines some frames in existing caches.
    """
    ratio = 1.0 if source_fps is None else target_fps / source_fps
    position = 0.0  # of the frame, in frames at the target rate
    last_slot = -1
    while True:
        slot = int(position)
        position += ratio
        yield slot != last_slot  # the first frame of each slot is kept
        last_slot = slot


def resample_indices(num_frames: int, source_fps: float | None, target_fps: float) -> tuple[int, ...]:
    """Return the indices of the frames to keep when `source_fps` is reduced to `target_fps`."""
    return tuple(itertools.compress(range(num_frames), keep_pattern(source_fps, target_fps)))


# --- frame rates of files
# ------------------------------------------------------------------------------------------------------------


def file_rate(path: Path) -> float | None:
    """Return a video's frame rate from its header.

    Returns:
        Frames per second; None for folders and animations, which are timed differently.

    Raises:
        MediaError: If the video cannot be read.
    """
    if path.is_dir() or is_animation(path):
        return None
    with open_video(path) as (_, stream):
        return float(stream.average_rate) if stream.average_rate else None


def kept_rate(source: MediaSource, fps: float) -> float:
    """Return the frame rate of a clip's kept frames; only the clip's header is read.

    Args:
        source: The clip, with local files.
        fps: Frame rate of the family, which is reached by dropping frames. Images and folders of images have
            this rate, too.

    Raises:
        MediaError: If a clip cannot be read.
    """
    table, declared = source.table, source.table.buckets.declared_fps
    fps = table.buckets.target_fps or fps
    if table.kind == "image" or table.buckets.source_fps == AUTO or source.precomputed is not None:
        return fps
    if declared is not None:
        return min(declared, fps)
    return file_rate(source.path) or fps


def compare_rates(rate: float | None, declared: object, fps: float) -> str | None:
    """Return how a file's frame rate differs from the assumed one, as text; None if it does not differ.

    Args:
        rate: Frame rate of the file; None if unknown.
        declared: source_fps of the table. If it is not set, the model's rate is assumed.
        fps: Frame rate of the model.
    """
    if isinstance(declared, (int, float)):
        expected = float(declared)
        cause = f"source_fps says {declared:g}"
    elif declared is None:
        expected = fps
        cause = "without source_fps all frames are used"
    else:  # "auto": the rate of the file is used
        return None
    if not rate or abs(rate / expected - 1) < TOLERANCE:
        return None
    return f"{cause}: the model sees the clip at {expected / rate:.2g} times its speed"


def find_wrong_rates(sources: Sequence[MediaSource]) -> list[Fault]:
    """Return an error for each clip whose frame rate differs from its table's source_fps.

    Reads the headers of at most MAX_CHECKED_FILES local clips. Unreadable files are reported elsewhere.
    """
    clips = [
        clip
        for clip in sources
        if isinstance(clip.table.buckets.source_fps, float) and not clip.remote_or_packed
    ]
    step = ceil_div(len(clips), MAX_CHECKED_FILES) or 1  # evenly spaced among all clips
    kind = 'clips have a different rate than source_fps says; write source_fps = "auto"'
    errors = []
    for source in clips[::step]:
        try:
            rate = None if source.precomputed is not None else file_rate(source.path)
        except (MediaError, OSError):
            continue
        error = compare_rates(rate, source.table.buckets.source_fps, 1.0)  # 1.0 is unused: source_fps is set
        if error is not None:
            text = f"{source.path}: {rate or 0:.4g} frames per second; {error}"
            errors.append(Fault(kind, text, source.stem))
    return errors


FAR = 2.0  # warn if a frame rate differs from the model's by more than this factor


def find_far_rates(sources: Sequence[MediaSource], fps: float) -> list[Fault]:
    """Return a warning for each clip whose frame rate is far from the model's, if source_fps is not set.

    Reads the headers of at most MAX_CHECKED_FILES local clips. Unreadable files are reported elsewhere.
    """
    clips = []
    for source in sources:
        table = source.table
        has_rate = table.kind == "video" and not table.source.is_audio_only and source.precomputed is None
        if has_rate and table.buckets.source_fps is None and not source.remote_or_packed:
            clips.append(source)
    errors = []
    step = ceil_div(len(clips), MAX_CHECKED_FILES) or 1  # evenly spaced among all clips
    for source in clips[::step]:
        try:
            rate = file_rate(source.path)
        except (MediaError, OSError):
            continue
        if rate and not 1 / FAR <= rate / fps <= FAR:
            text = f"{source.path}: {rate:.4g} frames per second, the model uses {fps:g}; "
            errors.append(Fault(FAR_RATES, f"{text}{compare_rates(rate, None, fps)}", source.stem))
    return errors


FAR_RATES = 'clips have a rate far from that of the model; source_fps = "auto" plays them at their speed'
Mask = NDArray[np.uint8]  # F H W


class ClipCompanions(NamedTuple):
    """A clip's or image's companion files (control, masks, references), decoded and resized."""

    references: tuple[NDArray[np.uint8], ...] = ()  # each f h w 3; guides follow
    control_mask: Mask | None = None
    size_changes: tuple[str, ...] = ()  # a line for each control clip or reference whose frames change size
    # set only for clips
    control: tuple[NDArray[np.uint8], ...] = ()  # each F H W 3
    rejected: NDArray[np.uint8] | None = None  # F H W 3


FitImage = Callable[[Frame], Frame]  # resizes and crops an image


def read_mask_image(path: Path, fit_image: FitImage, size: buckets.Size, num_frames: int) -> Mask:
    """Read an image as the loss mask of `num_frames` frames.

    Args:
        path: The mask image.
        fit_image: Resizes and crops the mask like the image or clip.
        size: Size of the image or clip; the mask must have the same aspect ratio.
        num_frames: Number of frames, which all get this mask.
    """
    mask = _gray(path, read_mask(path), fit_image, size)
    return np.broadcast_to(mask, (num_frames, *mask.shape))


def read_mask_clip(
    path: Path, frames: Iterator[Frame], fit_image: FitImage, size: buckets.Size, num_frames: int
) -> Mask:
    """Convert the frames of a mask clip, H W 3 or 4, to `num_frames` masks, F H W in 0..255.

    A longer clip is truncated; the last frame of a shorter clip is repeated.

    Args:
        path: The mask clip, for error messages.
        frames: Frames of the mask clip.
        fit_image: Resizes and crops the mask like its clip.
        size: Size of the clip; the mask must have the same aspect ratio.
        num_frames: Number of frames of the clip.
    """
    # whether the mask is in the colors or in the alpha channel is known only after the last frame
    channel_detector = MaskChannelDetector()
    color_masks: list[Frame] = []
    alpha_masks: list[Frame] = []
    for frame in itertools.islice(frames, num_frames):
        frame_on_white, alpha = channel_detector.add(frame)
        color_masks.append(_gray(path, frame_on_white, fit_image, size))
        has_alpha = frame.shape[2] == 4
        alpha_masks.append(fit_image(alpha) if has_alpha else np.full_like(color_masks[-1], 255))
    masks = alpha_masks if channel_detector.is_alpha else color_masks
    num_missing = num_frames - len(masks)
    return np.stack([*masks, *[masks[-1]] * num_missing])


def shrink_mask(mask: Tensor, stride: tuple[int, int, int], clip: int = 0) -> Tensor:
    """Average a loss mask (F H W, 0..255) over the pixels of each latent; return float16, F H W in 0..1.

    In time, the first frame of a video, or of each part of `clip` frames, is one latent frame, and so is each
    following group of `stride[0]` frames. `stride` and `clip` are fields of the family's LatentSpec.
    """
    frame_stride, height_stride, width_stride = stride
    weights = mask.float().unsqueeze(1) / 255  # F 1 H W, as avg_pool2d takes it
    weights = torch.nn.functional.avg_pool2d(weights, (height_stride, width_stride)).squeeze(1)
    latent_frames = []
    for frames_of_part in weights.split(clip or len(weights)):
        num_groups = (len(frames_of_part) - 1) // frame_stride
        grouped_frames = frames_of_part[1 : 1 + num_groups * frame_stride]
        # frames after the last whole group have no latent frame
        latent_frames += [frames_of_part[:1], grouped_frames.unflatten(0, (num_groups, frame_stride)).mean(1)]
    return torch.cat(latent_frames).half()


def _gray(path: Path, frame: Frame, fit_image: FitImage, size: buckets.Size) -> NDArray[np.uint8]:
    """Convert a mask frame, H W 3, to gray and resize it; raise MediaError if its aspect ratio differs."""
    height, width = frame.shape[:2]
    if not has_same_aspect((width, height), size):
        raise MediaError(
            f"{path} has {width}x{height} pixels, what it masks has {size[0]}x{size[1]}: they need the same "
            "shape, or the mask would cover other places"
        )
    return fit_image(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.uint8))


def find_bucket(table: DatasetTable, size: buckets.Size, step: int, path: Path | None = None) -> buckets.Size:
    """Return the bucket (size) to which an image of `size` is resized; precomputed latents keep their size.

    `path` is for messages only.

    Raises:
        MediaError: If the image is too small to keep its size.
        DatasetError: If the resolution does not fit `step`.
    """
    if table.source.has_precomputed_latents:
        return size
    if not table.buckets.enable_bucket:
        if any(side % step for side in table.buckets.resolution):
            width, height = table.buckets.resolution
            smaller = width // step * step, height // step * step
            larger = round_up(width, step), round_up(height, step)
            options = " or ".join(
                str(list(option)) for option in dict.fromkeys((smaller, larger)) if min(option)
            )
            raise DatasetError(
                f"{table.name}: resolution = [{width}, {height}] is not a multiple of {step}, and "
                f"enable_bucket is false. Use {options}, or enable_bucket = true."
            )
        return table.buckets.resolution
    sd_scripts_buckets = table.buckets.rule
    if sd_scripts_buckets is not None and sd_scripts_buckets.step % step:
        raise DatasetError(
            f"{table.name}: bucket_reso_steps = {sd_scripts_buckets.step} is not a multiple of {step}, which "
            f"this model needs. Use {round_up(sd_scripts_buckets.step, step)}."
        )
    width, height = table.buckets.resolution
    area = width * height
    sizes = _list_bucket_sizes(table, step)
    try:
        if sd_scripts_buckets is None:
            return buckets.select_bucket(size, sizes, area, step, no_upscale=table.buckets.bucket_no_upscale)
        if table.buckets.bucket_no_upscale:
            return buckets.fit_without_enlarging(size, area, sd_scripts_buckets.step).bucket
        return buckets.select_image_bucket(size, sizes)
    except ValueError as error:
        raise MediaError(f"{path or 'an image'} is too small: {error}") from None


def _list_bucket_sizes(table: DatasetTable, step: int) -> tuple[buckets.Size, ...]:
    """Return the sizes of a table's buckets; () if each image has its own bucket."""
    sd_scripts_buckets = table.buckets.rule  # None: the table is not in the layout of sd-scripts
    width, height = table.buckets.resolution
    try:
        if sd_scripts_buckets is None:
            return _bucket_sizes(width, height, step)
        if table.buckets.bucket_no_upscale:
            return ()
        return _image_sizes(
            table.buckets.resolution,
            sd_scripts_buckets.minimum,
            sd_scripts_buckets.maximum,
            sd_scripts_buckets.step,
        )
    except ValueError as error:
        raise DatasetError(f"{table.name}: resolution = [{width}, {height}]: {error}. Enlarge it.") from None


_bucket_sizes = functools.cache(buckets.bucket_sizes)
_image_sizes = functools.cache(buckets.image_bucket_sizes)

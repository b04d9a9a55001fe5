"""Decode a source once, select and resize its frames, choose its bucket and cut it into spans."""

import contextlib
import dataclasses
import functools
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dataset.config_keys import AUTO
from dataset.sources.clock import companion_frames, kept_frames, read_mask
from dataset.sources.fetching import fetch
from dataset.sources.frames import (
    ClipCompanions,
    Mask,
    Span,
    find_bucket,
    max_decoded_frames,
    read_mask_image,
    resample_indices,
    spans,
)
from dataset.sources.layers import read_layers
from dataset.sources.media_source import ClipInfo, FileIdentity, MediaSource
from dataset.sources.pairs import read_rejected_clip, require_equal_size
from dataset.sources.references import fit_reference, read_reference
from dataset.table import DatasetTable
from modules.console import format_count
from modules.errors import MediaError
from modules.media.augmenting import change_colors, crop_anywhere, face_in_name, fit_face, mirror
from modules.media.buckets import Fit, Size, fit_cover, fit_like, fit_without_enlarging, select_interpolation
from modules.media.decoding import is_animation
from modules.media.lengths import DEFAULT_LENGTHS, ClipLengths
from modules.media.reading import (
    Frame,
    FrameSizes,
    add_alpha,
    fit_frame,
    image_size,
    read_image,
    resize_cover,
    split_alpha,
    video_info,
)

Clip = NDArray[np.uint8]  # F H W C

NO_FRAMES: Clip = np.empty((0, 0, 0, 3), np.uint8)
LARGE = 1 << 14  # side of an image that is large enough for every table
GROWTH = 64  # number of frames for which memory is allocated at once
DECODED_COPIES = 9  # bytes per pixel while an image is decoded: three RGB copies
SMALL_IMAGE = 1 << 26  # bytes; images below this size do not count against the budget


@dataclass(eq=False)
class ByteBudget:
    """Memory budget that all decoding threads share: even a small file may contain an image of a gigabyte.

    A thread that needs more than the entire budget waits until no other thread has reserved memory.
    """

    size_bytes: int
    _used: int = dataclasses.field(default=0, init=False)
    _changed: threading.Condition = dataclasses.field(default_factory=threading.Condition, init=False)

    @contextlib.contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        """Wait until `size_bytes` of the budget are free, and reserve them during the `with` block.

        Blocks cannot be nested.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size_bytes <= self.size_bytes)
            self._used += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= size_bytes
                self._changed.notify_all()


IMAGES = ByteBudget(1 << 30)  # shared by all threads of this process


@dataclass(frozen=True)
class DecodedMedia:
    """The kept frames of one media file or training item, resized to its bucket. Images have one frame."""

    source: MediaSource
    size: Size  # width, height of the original
    bucket: Size
    frames: Clip  # F H W 3, or 4 for a family whose pixels have alpha; empty from `plan_source`
    spans: tuple[Span, ...]  # after `cut`, only the span of the item
    reason: str | None = None  # why there is no span: "12 frames, the shortest of target_frames is 17"
    # one for each control image or clip, with the same number of frames; C = 4 if a control image has alpha
    control: tuple[Clip, ...] = ()
    alpha: NDArray[np.uint8] | None = None  # H W, for an image with transparency
    mask: Mask | None = None  # loss mask of each frame, 255: learned; None: all pixels are learned
    # each f h w 3, where f is the number of frames for a clip, and 1 for an image; then guides, 1 H W 3
    references: tuple[Clip, ...] = ()
    control_mask: Mask | None = None  # of each frame, 255: generated
    rejected: Clip | None = None  # frames of the rejected item of a preference pair
    # precomputed, instead of frames: 2C F h w of the clip, then of its first frame
    moments: tuple[Tensor, ...] = ()
    # written to the records of caches
    clip: ClipInfo | None = None
    files: tuple[FileIdentity, ...] = ()
    rate: float | None = None  # frames per second, for models with the rate as an input
    audio: Tensor | None = None  # C S, for a family that caches audio with latents; zeros if silent
    is_heard: bool = False  # the clip has audio

    @property
    def arrays(self) -> tuple[Any, ...]:
        """All arrays that encoders take: frames, control, masks, references, rejected clip, VAE moments."""
        masks = [mask for mask in (self.alpha, self.control_mask) if mask is not None]
        rejected = [] if self.rejected is None else [self.rejected]
        return (self.frames, *self.control, *masks, *self.references, *rejected, *self.moments)

    @property
    def group(self) -> tuple[object, ...]:
        """Key that is equal for items that can share a batch: the table and the shapes of their arrays."""
        # these counts tell which kind each array is
        counts = len(self.control), len(self.references), self.rejected is not None
        audio_shapes = () if self.audio is None else (self.audio.shape,)
        return (self.source.table.index, counts, *(array.shape for array in self.arrays), *audio_shapes)

    @property
    def size_bytes(self) -> int:
        """Size of the item's arrays in bytes."""
        mask_bytes = 0 if self.mask is None else self.mask.nbytes
        return mask_bytes + sum(array.nbytes for array in self.arrays)

    def cut(self, span: Span) -> "DecodedMedia":
        """Cut out a span's item: frames, control clips, mask, references and rejected clip.

        A short span is copied, so that the rest of the clip can be freed.
        """
        start, length = span
        end = start + length
        num_frames = len(self.frames)
        clips = [clip[start:end] for clip in (self.frames, *self.control)]
        if 2 * length < num_frames:  # a view would keep more than twice the memory alive
            clips = [clip.copy() for clip in clips]
        frames, *control = clips
        references = []
        for reference in self.references:  # a clip is cut; a single frame is used for all spans
            if len(reference) == num_frames:
                reference = reference[start:end]
            references.append(reference.copy())
        optional = {"mask": self.mask, "control_mask": self.control_mask, "rejected": self.rejected}
        copies: dict[str, Any] = {}  # of the masks and clips that the item has
        for name, array in optional.items():
            if array is not None:
                copies[name] = array[start:end].copy()
        return dataclasses.replace(
            self,
            frames=frames,
            spans=(span,),
            control=tuple(control),
            references=tuple(references),
            **copies,
        )

    def key(self, span: Span) -> str:
        """Return a training item's name for messages: `pic`, or `clip_00000-017`."""
        if self.source.table.kind == "image":
            return self.source.stem
        first_frame, num_frames = span
        return f"{self.source.stem}_{first_frame:05d}-{num_frames:03d}"


def decode_source(
    source: MediaSource,
    fps: float,
    step: int = 16,
    lengths: ClipLengths = DEFAULT_LENGTHS,
    rng: random.Random | None = None,
    keeps_alpha: bool = False,
    has_alpha: bool = False,
) -> DecodedMedia:
    """Read an image or clip and its control media.

    Memory holds all frames at bucket size, but only one frame at a time at its original size.

    Args:
        source: The image or clip.
        fps: Frame rate of the family, which is reached by dropping frames if the table has source_fps.
        step: `pixel_step` of the family's LatentSpec.
        lengths: `lengths` of the family's LatentSpec.
        rng: Random generator for the table's `augmentation` of images; None means no augmentation.
        keeps_alpha: `keeps_alpha` of the family's LatentSpec.
        has_alpha: `has_alpha` of the family's LatentSpec.

    Raises:
        MediaError: If a file is unreadable or too small, or if latents are precomputed.
        DatasetError: If the resolution is not a multiple of `step`.
    """
    with fetch(source) as local:
        if source.precomputed is not None:
            raise MediaError(f"{source.path}: its latents are precomputed (load_tensors): no frames are read")
        if source.table.kind == "image":
            with IMAGES.hold(planned_bytes(local)):
                # alpha has to be read to become a channel of the result
                media = _decode_image(
                    local, step, rng, keeps_alpha=keeps_alpha or has_alpha, has_alpha=has_alpha
                )
                return dataclasses.replace(media, source=source)
        return _decode_clip(source, local, fps=fps, step=step, lengths=lengths)


class _KeptFrames(NamedTuple):
    """The frames of a clip that training can use, resized to the clip's bucket."""

    size: Size  # width, height of the original
    bucket: Size
    frames: Clip
    mask: Mask | None  # alpha of the frames, for a table in which alpha is the loss mask
    times: list[tuple[int, float]]  # index and second of each frame
    size_change: str | None  # the frame from which on the original has another size


def _decode_clip(
    source: MediaSource, local: MediaSource, fps: float, step: int, lengths: ClipLengths
) -> DecodedMedia:
    """Read a clip and its control media; `local` is the same clip with local files."""
    # 1. Read the frames that training keeps, up to the number it can use, and note their times.
    # 2. Find the spans that training cuts from them.
    # 3. If there are any, read control media at the same times.
    table = source.table
    clip = _read_kept_frames(local, fps, step)
    count = len(clip.frames)
    mask = clip.mask
    if local.mask is not None:  # one image for all frames, or a clip
        sizes = clip.size, clip.bucket
        mask = read_mask(local.mask, local, sizes, count=count, fps=fps, frame_times=clip.times)
    found_spans = spans(table, count, lengths)
    reason = None if found_spans else explain_no_spans(table, count, count_file_frames(local))
    companions = ClipCompanions()
    has_companions = any((local.control, local.references, local.guides, local.control_mask, local.rejected))
    if found_spans and has_companions:
        companions = _read_clip_companions(
            local, clip.size, clip.bucket, count=count, fps=fps, frame_times=clip.times
        )
    own_changes = () if clip.size_change is None else (f"{source.path.name}: {clip.size_change}",)
    max_frames = max_decoded_frames(table)
    info = ClipInfo(
        clip.size,
        count,
        # decoding stops once there are enough frames, and then the clip may have more
        complete=max_frames is None or count < max_frames,
        size_changes=(*own_changes, *companions.size_changes),
    )
    return DecodedMedia(
        source=source,
        size=clip.size,
        bucket=clip.bucket,
        frames=clip.frames,
        spans=found_spans,
        reason=reason,
        control=companions.control,
        mask=mask,
        references=companions.references,
        control_mask=companions.control_mask,
        rejected=companions.rejected,
        clip=info,
    )


def _read_kept_frames(local: MediaSource, fps: float, step: int) -> _KeptFrames:
    """Read the frames of a clip that training keeps at the frame rate `fps`, and note their times."""
    table = local.table
    times: list[tuple[int, float]] = []

    def read_frames() -> Iterator[Frame]:
        """Yield the kept frames, and append the index and second of each one to `times`."""
        for frame, index, second in kept_frames(local.path, table, fps, table.source.alpha_mask):
            times.append((index, second))
            yield frame

    sizes = FrameSizes()
    original_frames = sizes.watch(read_frames())
    first_frame = next(original_frames)  # its size selects the bucket
    size = (first_frame.shape[1], first_frame.shape[0])
    bucket = find_bucket(table, size, step, local.path)
    original_frames = itertools.chain([first_frame], original_frames)
    mask: Mask | None = None
    if table.source.is_audio_only:  # frames are black; only their number matters
        frames = _broadcast_black_frame(original_frames)
    else:
        frames, mask = _collect_frames(original_frames, bucket, max_decoded_frames(table))
    return _KeptFrames(size, bucket, frames, mask=mask, times=times, size_change=sizes.change)


def _read_clip_companions(
    local: MediaSource,
    size: Size,
    bucket: Size,
    count: int,
    fps: float,
    frame_times: Sequence[tuple[int, float]],
) -> ClipCompanions:
    """Read a clip's control clips, references, guides, control mask and rejected clip."""
    # `count`, `fps` and `frame_times` are the number, frame rate and times of the clip's kept frames.
    control: list[Clip] = []
    control_changes: list[str] = []
    if local.control:
        # only `count` frames of a longer control clip are read; a shorter one repeats its last frame
        for path in local.control:
            sizes = FrameSizes()
            frames = sizes.watch(
                companion_frames(path, local.path, table=local.table, fps=fps, frame_times=frame_times)
            )
            clip, _ = _collect_frames(frames, bucket, count)
            if sizes.change is not None:
                control_changes.append(f"{path.name}: {sizes.change}")
            missing = count - len(clip)
            if missing:
                clip = np.concatenate([clip, *[clip[-1:]] * missing])
            control.append(clip)
    companions = ClipCompanions()
    if local.references or local.guides or local.control_mask is not None:
        from dataset.sources.companions import read_companions  # few clips have any

        companions = read_companions(
            local, size, bucket=bucket, count=count, fps=fps, frame_times=frame_times
        )
    rejected: Clip | None = None
    if local.rejected is not None:
        rejected = read_rejected_clip(local, size, bucket, count=count, fps=fps, frame_times=frame_times)
    return companions._replace(
        control=tuple(control),
        rejected=rejected,
        size_changes=(*control_changes, *companions.size_changes),
    )


def planned_bytes(source: MediaSource) -> int:
    """Estimate the memory needed to decode an image and its control images, using their headers only.

    Returns 0 if it is at most SMALL_IMAGE. Unreadable files count as 0, because decoding reports them.
    """
    total = 0
    for path in (source.path, *source.control, *filter(None, (source.rejected,)), *source.layers):
        with contextlib.suppress(MediaError, OSError):
            width, height = image_size(path)
            total += width * height * DECODED_COPIES
    return total if total > SMALL_IMAGE else 0


def _fit_alpha_and_mask(
    source: MediaSource,
    alpha: NDArray[np.uint8] | None,
    size: tuple[int, int],
    fit_to_bucket: Callable[[Frame], Frame],
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None]:
    """Return the alpha channel for the model (H W) and the loss mask (F H W), both cropped like the image."""
    # Alpha has one of two uses. By default it is part of the image, and the loss mask is a file. With the
    # table's alpha_mask, alpha is the loss mask, and the model does not see it.
    # alpha: Alpha channel of the image, H W; None if it has none.
    cropped_alpha: NDArray[np.uint8] | None = None
    if alpha is not None and alpha.min() < 255:
        cropped_alpha = fit_to_bucket(alpha)
    if source.table.source.alpha_mask:
        if cropped_alpha is None or cropped_alpha.min() == 255:  # the crop may be opaque
            return None, None
        return None, cropped_alpha[None]
    if source.mask is None:
        return cropped_alpha, None
    return cropped_alpha, read_mask_image(source.mask, fit_to_bucket, size, num_frames=1)


def _decode_image(
    source: MediaSource, step: int, generator: random.Random | None, keeps_alpha: bool, has_alpha: bool
) -> DecodedMedia:
    """Read an image with its control images, mask, layers, references and rejected image."""
    # 1. Choose how the image is resized and cropped, at random if it is augmented.
    # 2. Resize, crop and mirror its control images, mask and layers in the same way.
    # 3. Resize references and the control mask to the bucket on their own.
    table = source.table
    image, alpha = split_alpha(read_image(source.path, keeps_alpha or table.source.alpha_mask))
    size = (image.shape[1], image.shape[0])  # width, height
    fit = find_bucket_fit(table, size, step, source.path)
    is_mirrored = False
    if generator is not None:
        fit = _draw_crop(source, size, fit, generator)
        is_mirrored = table.buckets.augmentation.flip and generator.random() < 0.5
        if table.buckets.augmentation.color:
            image = change_colors(image, generator)
    # for the image itself, and for all that is aligned with it: control images, mask, layers
    fit_to_bucket = functools.partial(_fit_like, size=size, fit=fit, table=table, is_mirrored=is_mirrored)
    if table.references.rules is None:  # control images are resized like their image
        control = [_read_control(path, fit_to_bucket, keeps_alpha) for path in source.control]
    else:
        control = _read_references(source, fit.bucket, fit_to_bucket, is_mirrored, has_alpha=has_alpha)
    if has_alpha and not table.source.alpha_mask and alpha is not None:
        # the model takes transparency as a fourth channel
        image, alpha = np.dstack([image, alpha]), None
    fitted_alpha, mask = _fit_alpha_and_mask(source, alpha, size, fit_to_bucket)
    frames = _fit_with_layers(source, image, fit_to_bucket, size=size, has_alpha=has_alpha)
    if mask is not None and source.layers:  # all layers have the mask of their image
        mask = np.repeat(mask, len(frames), axis=0)
    companions = _read_image_companions(source, size, fit.bucket, fit_to_bucket, has_alpha=has_alpha)
    return DecodedMedia(
        source=source,
        size=size,
        bucket=fit.bucket,
        frames=frames,
        spans=((0, source.num_images),),
        control=tuple(control),
        alpha=fitted_alpha,
        mask=mask,
        references=companions.references,
        control_mask=companions.control_mask,
        rejected=companions.rejected,
    )


def _read_image_companions(
    source: MediaSource,
    size: Size,
    bucket: Size,
    fit_image: Callable[[Frame], Frame],
    has_alpha: bool,
) -> ClipCompanions:
    """Read an image's references and control mask, and the rejected image of its preference pair."""
    companions = ClipCompanions()
    if source.references or source.control_mask is not None:
        from dataset.sources.companions import read_companions  # few images have any

        companions = read_companions(source, size, bucket=bucket, count=1)
    if source.rejected is not None:
        # the rejected image of a preference pair, 1 H W C, is resized like the chosen one
        keeps_alpha = (
            has_alpha and not source.table.source.alpha_mask
        )  # with alpha_mask, alpha is the loss mask
        rejected = read_image(source.rejected, keeps_alpha)
        require_equal_size(source, size, (rejected.shape[1], rejected.shape[0]))
        fitted = fit_image(rejected)
        rejected = (add_alpha(fitted) if has_alpha else fitted)[None]
        companions = companions._replace(rejected=rejected)
    return companions


def _fit_with_layers(
    source: MediaSource, image: Frame, fit_to_bucket: Callable[[Frame], Frame], size: Size, has_alpha: bool
) -> Clip:
    """Resize an image and its layers to the bucket: F H W C, the image first."""
    # `size` is the original size of the image. With `has_alpha`, frames have alpha as a fourth channel.
    fitted = fit_to_bucket(image)
    frames = (add_alpha(fitted) if has_alpha else fitted)[None]
    if not source.layers:
        return frames

    return np.stack([frames[0], *read_layers(source, size, fit_to_bucket)])


def _read_references(
    source: MediaSource,
    bucket: Size,
    fit_image: Callable[[Frame], Frame],
    is_mirrored: bool,
    has_alpha: bool,
) -> list[Clip]:
    """Read the reference images of an image, each 1 H W C: its control images, with sizes of their own."""
    references = []
    for path in source.control:
        reference = read_reference(
            path,
            source,
            bucket=bucket,
            fit_image=fit_image,
            is_mirrored=is_mirrored,
            has_alpha=has_alpha,
        )
        references.append(reference)
    return references


def _fit_like(frame: Frame, size: Size, fit: Fit, table: DatasetTable, is_mirrored: bool) -> Frame:
    """Resize, crop and mirror a frame in the same way as its image."""
    # `size` is the image's original size; `fit` says how the image was resized and cropped.
    frame_size = (frame.shape[1], frame.shape[0])
    if table.buckets.rule is None:
        frame_fit = fit_cover(frame_size, fit.bucket)
    else:
        frame_fit = fit_like(fit, frame_size, size)
    fitted = fit_frame(frame, frame_fit)
    return mirror(fitted) if is_mirrored else fitted


def _draw_crop(source: MediaSource, size: Size, fit: Fit, rng: random.Random) -> Fit:
    """Draw a random crop of an image if its table has random_crop or face_crop_aug_range."""
    # Else return `fit`.
    # `fit` is the crop without augmentation.
    augmentation = source.table.buckets.augmentation
    if augmentation.face_crop_range is not None:
        face = face_in_name(source.stem)
        if face is not None:
            return fit_face(
                size,
                fit.bucket,
                face=face,
                side_per_face=augmentation.face_crop_range,
                rng=rng,
                anywhere=augmentation.random_crop,
            )
    return crop_anywhere(fit, rng) if augmentation.random_crop else fit


def _read_control(path: Path, fit_image: Callable[[Frame], Frame], keeps_alpha: bool) -> Clip:
    """Read a control image, 1 H W 3, or 1 H W 4 if it has alpha."""
    # Alpha is resized separately from the colors, as in generation, because Pillow would darken the colors of
    # transparent pixels.
    colors, alpha = split_alpha(read_image(path, keeps_alpha))
    channels = [fit_image(colors)]
    if alpha is not None:
        channels.append(fit_image(alpha)[..., None])
    return np.concatenate(channels, axis=2)[None]


def plan_source(
    source: MediaSource, fps: float, step: int = 16, lengths: ClipLengths = DEFAULT_LENGTHS
) -> DecodedMedia:
    """Return the result of `decode_source` without pixels, to compare it with caches without a record.

    It is computed from headers, whose frame count may be wrong. A clip is decoded if its header has no frame
    count, or if frames are selected by time.

    Raises:
        MediaError: If a file is unreadable or too small, as far as its header shows.
        DatasetError: If the resolution is not a multiple of `step`.
    """
    table = source.table
    with fetch(source) as local:
        if table.kind == "image":
            size = image_size(local.path)
            found_spans: tuple[Span, ...] = ((0, source.num_images),)
            reason: str | None = None
        else:
            size, count = _plan_clip(local, fps)
            found_spans = spans(table, count, lengths)
            reason = None if found_spans else explain_no_spans(table, count, count_file_frames(local))
        bucket = find_bucket(table, size, step, local.path)
    return DecodedMedia(
        source=source, size=size, bucket=bucket, frames=NO_FRAMES, spans=found_spans, reason=reason
    )


def _plan_clip(local: MediaSource, fps: float) -> tuple[Size, int]:
    """Return the original size of a clip, and the number of frames kept at the frame rate `fps`."""
    table = local.table
    if table.source.is_audio_only:
        return table.buckets.resolution, _count_kept_frames(local, fps)
    info = video_info(local.path)
    if info.frames is None or table.buckets.source_fps == AUTO or is_animation(local.path):
        count = _count_kept_frames(local, fps)
    else:
        count = len(
            resample_indices(info.frames, table.buckets.declared_fps, table.buckets.target_fps or fps)
        )
    return (info.width, info.height), count


def _count_kept_frames(source: MediaSource, fps: float) -> int:
    """Decode a downloaded clip and return the number of frames kept at `fps`."""
    return sum(1 for _ in kept_frames(source.path, source.table, fps))


def source_frames(source: MediaSource, fps: float) -> Iterator[Frame]:
    """Yield the frames of a media file that training uses, H W 3, at original size; one for an image.

    Raises:
        MediaError: If the file cannot be read.
    """
    with fetch(source) as local:
        if source.table.kind == "image":
            yield read_image(local.path)
        else:
            yield from (frame for frame, _, _ in kept_frames(local.path, source.table, fps))


def find_bucket_fit(table: DatasetTable, size: Size, step: int, path: Path | None = None) -> Fit:
    """Return how an image of this size (width, height) is resized and cropped to its bucket.

    The layout of sd-scripts may limit the bucket to the image's size (bucket_no_upscale) and set the
    interpolation; all other tables cover the bucket and crop.

    Args:
        table: Table of the image.
        size: Width and height of the image.
        step: Bucket sizes are multiples of this many pixels.
        path: The image, for error messages.

    Raises:
        MediaError: If the image is too small to keep its size.
        DatasetError: If the resolution does not fit `step`.
    """
    bucket = find_bucket(table, size, step, path)
    sd_scripts_buckets = table.buckets.rule  # None: the table is not in the layout of sd-scripts
    if sd_scripts_buckets is None:
        return fit_cover(size, bucket)
    if table.buckets.bucket_no_upscale:
        width, height = table.buckets.resolution
        fit = fit_without_enlarging(size, width * height, sd_scripts_buckets.step)
    else:
        fit = fit_cover(size, bucket)
    interpolation = select_interpolation(size, fit.resized)  # "none" if the size stays
    if interpolation != "none" and sd_scripts_buckets.interpolation:
        interpolation = sd_scripts_buckets.interpolation
    return dataclasses.replace(fit, interpolation=interpolation)


def check_resolution(table: DatasetTable, step: int) -> None:
    """Raise DatasetError if a table's resolutions are not multiples of `step`, as the family requires."""
    find_bucket(table, (LARGE, LARGE), step)
    if table.references.rules is not None:
        fit_reference(table, (LARGE, LARGE), table.source.path)


def _broadcast_black_frame(frames: Iterator[Frame]) -> Clip:
    """Return a clip that repeats one black frame without using memory for each (stride 0)."""
    black = next(frames)
    count = 1 + sum(1 for _ in frames)
    return np.ndarray((count, *black.shape), np.uint8, black, strides=(0, *black.strides))


def _collect_frames(
    frames: Iterator[Frame], bucket: Size, max_frames: int | None
) -> tuple[Clip, Mask | None]:
    """Collect frames at bucket size, and their alpha if any frame is transparent."""
    # The array grows in place, so that a clip is never copied. `max_frames` is the highest number of frames,
    # if known, so that a short clip gets no more memory than it needs.
    width, height = bucket
    capacity = min(max_frames or GROWTH, GROWTH)  # number of frames that `clip` has memory for
    clip = np.empty((capacity, height, width, 3), np.uint8)
    count = 0
    alphas: list[NDArray[np.uint8] | None] = []
    for frame in frames:
        if count == len(clip):
            capacity = count + max(GROWTH, count // 4)
            clip.resize((capacity, height, width, 3), refcheck=False)  # nothing else refers to the array yet
        colors, alpha = (frame, None) if frame.shape[2] == 3 else split_alpha(frame)
        alphas.append(None if alpha is None else resize_cover(alpha, bucket))
        clip[count] = resize_cover(colors, bucket)
        count += 1
    clip.resize((count, height, width, 3), refcheck=False)  # gives back unused memory
    has_transparency = any(alpha is not None and alpha.min() < 255 for alpha in alphas)
    return clip, _stack_alphas(alphas) if has_transparency else None


def _stack_alphas(alphas: Sequence[NDArray[np.uint8] | None]) -> Mask:
    """Return the alpha of all frames, F H W; frames without alpha (None) are opaque."""
    template = next(alpha for alpha in alphas if alpha is not None)
    opaque = np.full_like(template, 255)
    return np.stack([opaque if alpha is None else alpha for alpha in alphas])


def count_file_frames(source: MediaSource) -> int | None:
    """Return the number of frames that a clip's header states; None for other media."""
    return video_info(source.path).frames if source.table.media_kind == "video" else None


def explain_no_spans(table: DatasetTable, num_kept: int, num_in_file: int | None) -> str:
    """Return why there are no spans of a clip with `num_kept` kept frames: it is too short.

    `num_in_file` is the number of frames of its file, if known, of which others may be left out.
    """
    declared = table.buckets.declared_fps
    selection = f" after dropping from source_fps = {declared:g}" if declared else ""
    if table.buckets.source_fps == AUTO:
        selection = ' at the rate of the model (source_fps = "auto")'
    shortest = min(table.buckets.target_frames)
    frames = format_count(num_kept, "frame")
    if selection and num_in_file is not None and num_in_file != num_kept:
        frames = f"{num_kept} of its {format_count(num_in_file, 'frame')}"
    return f"{frames}{selection}, the shortest of target_frames is {shortest}"

"""Choose the frames of a video and the size of a picture.

Frames are dropped to reach a rate, then spans are cut in one of five ways.

A span is (first frame, number of frames), counted in kept frames. Below: masks of the loss, whose white areas
are learned and black ones not; from a file (`mask_directory`, `mask_path`) or transparency (`alpha_mask`).
"""

import functools
import itertools
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataset.config import DatasetTable
from dataset.config_keys import AUTO
from dataset.sources.media_source import Fault, MediaSource
from modules.console import count_of
from modules.contract.data import MediaTable
from modules.errors import DatasetError, MediaError
from modules.media import buckets
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.opening import open_video
from modules.media.reading import VIDEO_SUFFIXES, Frame, MaskLook, image_suffixes, read_mask

Span = tuple[int, int]

TOLERANCE = 0.02  # of a rate: 29.97 is 30
LOOKED_AT = 1000  # clips of a dataset whose headers are read for their rates


def spans(table: DatasetTable, kept_frames: int, frame_step: int = 4) -> tuple[Span, ...]:
    """Return the spans of a clip with `kept_frames` frames; none if it is too short for every target.

    frame_step: "full" rounds its length down to frame_step * n + 1 (4 for most families). Spans are sorted by
    target, then by start, without duplicates.
    """
    if table.frame_extraction == "full":
        length = min(kept_frames, table.max_frames)
        return ((0, (length - 1) // frame_step * frame_step + 1),) if length > 0 else ()
    found: dict[Span, None] = {}
    for target in table.target_frames:
        if target <= kept_frames:
            last = kept_frames - target
            starts: Iterable[int]
            match table.frame_extraction:
                case "head":
                    starts = (0,)
                case "chunk":
                    starts = range(0, last + 1, target)
                case "slide":
                    starts = range(0, last + 1, table.frame_stride)
                case "uniform":
                    # in float64, rounded down: so caches agree with those of other tuners
                    starts = np.linspace(0, last, table.frame_sample).astype(int).tolist()
                case mode:
                    raise ValueError(f"unknown frame extraction {mode!r}")
            found |= dict.fromkeys((start, target) for start in starts)
    return tuple(found)


def describe_short(table: DatasetTable, found: Collection[Span], kept_frames: int) -> str | None:
    """Say for which target_frames a clip with these spans is too short; None if for none, or for all."""
    lengths = {length for _, length in found}
    if not found or table.kind == "image" or table.frame_extraction == "full":
        return None
    missing = [str(target) for target in table.target_frames if target not in lengths]
    return (
        f"{count_of(kept_frames, 'frame')}, too few for {', '.join(missing)} of target_frames"
        if missing
        else None
    )


def frames_wanted(table: DatasetTable) -> int | None:
    """Return how many kept frames are enough, so that decoding can stop; None if all are needed."""
    if table.frame_extraction == "head":
        return max(table.target_frames)
    return table.max_frames if table.frame_extraction == "full" else None


def media_table(table: DatasetTable, has_control: bool = False, has_references: bool = False) -> MediaTable:
    """Return the facts about a table that families check."""
    return MediaTable(
        name=table.name,
        kind=table.kind,
        has_control=has_control,
        has_references=has_references,
        target_frames=()
        if table.kind == "image" or table.frame_extraction == "full"
        else table.target_frames,
        max_frames=table.max_frames if table.kind == "video" and table.frame_extraction == "full" else None,
        window=table.fp_latent_window_size,
        clean_indices=table.fp_1f_clean_indices or (),
        target_index=table.fp_1f_target_index,
        has_post=not table.fp_1f_no_post,
    )


def one_frame_words(table: DatasetTable) -> str:
    """Return the places of a single picture and its controls for --one_frame_inference, "" for none."""
    words = []
    if table.fp_1f_target_index is not None:
        words.append(f"target_index={table.fp_1f_target_index}")
    if table.fp_1f_clean_indices:
        words.append(f"control_index={'+'.join(map(str, table.fp_1f_clean_indices))}")
    if table.fp_1f_no_post:
        words.append("no_post")
    return ",".join(words)


def keep_pattern(source_fps: float | None, target_fps: float) -> Iterator[bool]:
    """Yield for each decoded frame, without end, whether to keep it to get from `source_fps` to `target_fps`.

    Frames are only dropped, never doubled: a source slower than the target keeps all. Without source_fps all
    are kept. The running sum is in float64 on purpose: its rounding decides about some frames, as in users'
    existing caches.
    """
    ratio = 1.0 if source_fps is None else target_fps / source_fps
    position, last = 0.0, -1
    while True:
        slot = int(position)
        position += ratio
        yield slot != last
        last = slot


def resample_indices(num_frames: int, source_fps: float | None, target_fps: float) -> tuple[int, ...]:
    """Return which of `num_frames` decoded frames are kept."""
    return tuple(
        index
        for index, keep in zip(range(num_frames), keep_pattern(source_fps, target_fps), strict=False)
        if keep
    )


# --- rates of clips beside those that their table states
# ------------------------------------------------------------------------------------------------------------


def file_rate(path: Path) -> float | None:
    """Return a video's frames per second, from its header; None for folders and animations, which are timed
    otherwise. Raises MediaError if it cannot be read.
    """
    if path.is_dir() or is_animation(path):
        return None
    with open_video(path) as (_, stream):
        return float(stream.average_rate) if stream.average_rate else None


def kept_rate(source: MediaSource, fps: float) -> float:
    """Return the rate of the kept frames, per second. Only the header of a clip is read.

    source: fetched. fps: the family's rate, to which frames are dropped; pictures and folders of images have
    this rate too. Raises MediaError if a clip cannot be read.
    """
    table, stated = source.table, source.table.stated_fps
    fps = table.target_fps or fps
    if table.kind == "image" or table.source_fps == AUTO or source.tensors is not None:
        return fps
    if stated is not None:
        return min(stated, fps)
    return file_rate(source.path) or fps


def compare_rates(found: float | None, stated: object, fps: float) -> str | None:
    """Return the fault if a file's rate differs from the stated one or, without one, from the model's."""
    if isinstance(stated, (int, float)):
        expected, cause = float(stated), f"source_fps says {stated:g}"
    elif stated is None:
        expected, cause = fps, "without source_fps all frames are used"
    else:  # "auto"
        return None
    if not found or abs(found / expected - 1) < TOLERANCE:
        return None
    return f"{cause}: the model sees it at {expected / found:.2g} times its speed"


def find_wrong_rates(sources: Sequence[MediaSource]) -> list[Fault]:
    """Return a fault for each clip of another rate than the source_fps that its table says.

    Only headers of clips that are here are read, of at most LOOKED_AT clips. Unreadable files are reported
    elsewhere.
    """
    clips = [one for one in sources if isinstance(one.table.source_fps, float) and not one.origins]
    step = -(-len(clips) // LOOKED_AT) or 1
    kind = 'clips have another rate than source_fps says; write source_fps = "auto"'
    faults = []
    for source in clips[::step]:
        try:
            rate = None if source.tensors is not None else file_rate(source.path)
        except (MediaError, OSError):
            continue
        said = compare_rates(rate, source.table.source_fps, 1.0)
        if said is not None:
            text = f"{source.path}: {rate or 0:.4g} frames a second; {said}"
            faults.append(Fault(kind, text, source.stem))
    return faults


FAR = 2.0  # times by which a clip is faster or slower than a model sees others


def find_far_rates(sources: Sequence[MediaSource], fps: float) -> list[Fault]:
    """Return a remark for each clip without source_fps whose rate is far from that of the model.

    fps: of the model. Only headers of clips that are here are read, of at most LOOKED_AT clips. Unreadable
    files are reported elsewhere.
    """
    clips = [one for one in sources if one.table.kind == "video" and not one.table.is_of_sound]
    clips = [one for one in clips if one.table.source_fps is None and one.tensors is None and not one.origins]
    faults = []
    step = -(-len(clips) // LOOKED_AT) or 1
    for source in clips[::step]:
        try:
            rate = file_rate(source.path)
        except (MediaError, OSError):
            continue
        if rate and not 1 / FAR <= rate / fps <= FAR:
            text = f"{source.path}: {rate:.4g} frames a second, the model takes {fps:g}; "
            faults.append(Fault(FAR_RATES, f"{text}{compare_rates(rate, None, fps)}", source.stem))
    return faults


FAR_RATES = 'clips have a rate far from that of the model; source_fps = "auto" plays them at their speed'
Mask = NDArray[np.uint8]  # F H W
Place = Callable[[Frame], Frame]  # resizes and crops a picture

SAME_SHAPE = 0.02  # by how much the sides' ratio of a mask may differ from its clip's


def mask_suffixes(kind: str) -> frozenset[str]:
    """Return the suffixes of masks: the mask of a clip may also be an image, or a folder of images."""
    images = image_suffixes() | {".gif"}
    return images if kind == "image" else images | VIDEO_SUFFIXES | ANIMATION_SUFFIXES


def files_by_stem(
    entries: Iterable[Path], suffixes: Container[str], with_folders: bool
) -> dict[str, list[Path]]:
    """Return the files with these suffixes among the entries of a folder, by their names without suffix.

    with_folders: folders too, by their whole names.
    """
    there: dict[str, list[Path]] = {}
    for path in entries:
        is_folder = with_folders and path.is_dir()
        if is_folder or (path.suffix.lower() in suffixes and path.is_file()):
            there.setdefault(path.name if is_folder else path.stem, []).append(path)
    return there


def is_still(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes() and not path.is_dir() and not is_animation(path)


def read_still(path: Path, place: Place, size: buckets.Size, num_frames: int) -> Mask:
    """Read an image as the mask of `num_frames` frames. size: of the item; its shape has to be the same.

    place: resizes and crops it like its picture.
    """
    mask = _grey(path, read_mask(path), place, size)
    return np.broadcast_to(mask, (num_frames, *mask.shape))


def read_moving(
    path: Path, frames: Iterator[Frame], place: Place, size: buckets.Size, num_frames: int
) -> Mask:
    """Turn the frames of a mask clip, H W 3 or 4, into masks; a longer clip is cut, a shorter one repeats its
    last frame.
    """
    look, masks, opacities = MaskLook(), list[Frame](), list[Frame]()
    for frame in itertools.islice(frames, num_frames):
        on_white, opacity = look.add(frame)
        masks.append(_grey(path, on_white, place, size))
        opacities.append(place(opacity) if frame.shape[2] == 4 else np.full_like(masks[-1], 255))
    masks = opacities if look.is_drawn else masks
    masks += [masks[-1]] * (num_frames - len(masks))
    return np.stack(masks)


def shrink_mask(mask: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Average a mask F H W, 0..255, over the pixels of each latent: float16, 0..1, F H W of the latents.

    stride: of the family's LatentSpec. In time, the first frame is a latent frame of its own, and after it
    each group of `stride[0]` frames is one.
    """
    _, down, across = stride
    weights = mask.float().unsqueeze(1) / 255
    weights = torch.nn.functional.avg_pool2d(weights, (down, across)).squeeze(1)
    groups = (len(weights) - 1) // stride[0]
    rest = weights[1 : 1 + groups * stride[0]]
    return torch.cat([weights[:1], rest.unflatten(0, (groups, stride[0])).mean(1)]).half()


def _grey(path: Path, frame: Frame, place: Place, size: buckets.Size) -> NDArray[np.uint8]:
    height, width = frame.shape[:2]
    if abs(width * size[1] / (height * size[0]) - 1) > SAME_SHAPE:
        raise MediaError(
            f"{path} has {width}x{height} pixels, what it masks has {size[0]}x{size[1]}: they need the same "
            "shape, or the mask would cover other places"
        )
    return place(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.uint8))


def bucket_of(table: DatasetTable, size: buckets.Size, step: int, path: Path | None = None) -> buckets.Size:
    """Return the size that an image of `size` is resized to: with load_tensors its own. path: for messages.

    Raises MediaError if the image is too small to keep its size, DatasetError if the resolution does not fit
    `step`.
    """
    if table.load_tensors:
        return size
    (width, height), rule = table.resolution, table.buckets
    if not table.enable_bucket:
        if width % step or height % step:
            down = width // step * step, height // step * step
            up = -(-width // step) * step, -(-height // step) * step
            options = " or ".join(str(list(option)) for option in dict.fromkeys((down, up)) if min(option))
            raise DatasetError(
                f"{table.name}: resolution = [{width}, {height}] is not a multiple of {step}, and "
                f"enable_bucket is false. Use {options}, or enable_bucket = true."
            )
        return table.resolution
    if rule is not None and rule.step % step:
        raise DatasetError(
            f"{table.name}: bucket_reso_steps = {rule.step} is not a multiple of {step}, which this model "
            f"needs. Use {-(-rule.step // step) * step}."
        )
    no_upscale, area = table.bucket_no_upscale, width * height
    try:
        sizes: tuple[buckets.Size, ...] = ()
        if rule is None:
            sizes = _bucket_sizes(width, height, step)
        elif not no_upscale:
            sizes = _image_sizes(table.resolution, rule.minimum, rule.maximum, rule.step)
    except ValueError as error:
        raise DatasetError(f"{table.name}: resolution = [{width}, {height}]: {error}. Enlarge it.") from None
    try:
        if rule is None:
            return buckets.choose_bucket(size, sizes, area, step, no_upscale)
        return (
            buckets.fit_without_enlarging(size, area, rule.step).bucket
            if no_upscale
            else buckets.choose_image_bucket(size, sizes)
        )
    except ValueError as error:
        raise MediaError(f"{path or 'an image'} is too small: {error}") from None


_bucket_sizes = functools.cache(buckets.bucket_sizes)
_image_sizes = functools.cache(buckets.image_bucket_sizes)

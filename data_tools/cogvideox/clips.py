"""Clips of a prepared folder: their names and files; frames and sizes; clips of one size encoded in batches.

Frames and sizes follow the rules of CogVideoX's datasets: the nearest number of frames, evenly
spaced, and the nearest size. Each file is written completely or not at all; `videos/NAME.txt` and
`prompts/NAME.txt` come last.
"""

import contextlib
import hashlib
import json
import os
import random
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.cogvideox.models import DTYPES, EncodeMoments, EncodingOptions
from dataset.cache.records import require_finite
from dataset.caching.precomputed import describe_embeds, embeds_note
from dataset.caching.prefetch import DECODED_BYTES, Failure, fill_batches, run_ahead, write_behind
from dataset.config import DatasetTable
from dataset.forms.cogvideox_keys import CogVideoXKeys
from dataset.forms.cogvideox_lists import EMBEDS, IMAGE_MOMENTS, MOMENTS, missing_clips, read_rows
from dataset.sources.media_source import Fault, raise_if_fatal
from modules.atomic_write import atomic_path, write_text
from modules.bars import Bar
from modules.errors import DatasetError, MediaError, OptionError
from modules.media.buckets import Size
from modules.media.pixels import to_pixels
from modules.media.reading import Frame, pick_frames, resize_cover, resize_stretched
from modules.media.writing import write_png, write_video
from modules.options import Options, option
from modules.seeds import derive_seed
from modules.text_files import parse_json, read_text, real_path

SIDES = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)  # pixels; defaults
FRAMES = 49  # default number of frames
MAX_THREADS = 1024
LONGEST_SIDE = 16_384  # pixels
MAX_FRAMES = 100_000

T = TypeVar("T")
Clip = NDArray[np.uint8]  # F H W 3

MAX_WAITING_BYTES = 1 << 29  # bytes of frames that may wait for a full batch of their shape
IMAGES, VIDEOS, PROMPTS = "images", "videos", "prompts"
FOLDERS = (IMAGES, IMAGE_MOMENTS, VIDEOS, MOMENTS, PROMPTS, EMBEDS)
SUFFIXES = {IMAGES: ".png", VIDEOS: ".mp4", PROMPTS: ".txt"}  # suffixes; all others are .pt
# keys in data.jsonl -> folders of the files that they name
FOLDERS_BY_KEY = {
    "prompt_embed": EMBEDS,
    "image": IMAGES,
    "image_latent": IMAGE_MOMENTS,
    "video": VIDEOS,
    "video_latent": MOMENTS,
}


class ClipSourceOptions(Options, title="clips and captions"):
    """Which clips and captions are prepared, and the files or columns that contain them."""

    data_root: Path = option("folder that the paths of clips are in", required=True)
    dataset_file: Path | None = option(
        "CSV, data.jsonl or another table with a row for each clip; default: prompt.txt and "
        "videos.txt in --data_root, a line for each clip"
    )
    caption_column: str | None = option(
        "column of captions (caption or prompt), or the list of captions in --data_root (prompt.txt)"
    )
    video_column: str | None = option(
        "column of clips (video), or the list of clips in --data_root (videos.txt)"
    )
    id_token: str | None = option("word to put in front of every caption")

    def __post_init__(self) -> None:
        if self.id_token is not None and len(self.id_token.splitlines()) > 1:
            raise OptionError("--id_token has several lines; a prompt is one line")


class ShapeOptions(Options, title="frames and sizes"):
    """Which frames of a clip are used, and at which size."""

    height_buckets: tuple[int, ...] = option(
        "heights in pixels; a clip gets the nearest size",
        default=SIDES,
        nargs="+",
        minimum=16,
        maximum=LONGEST_SIDE,
    )
    width_buckets: tuple[int, ...] = option(
        "widths in pixels; a clip gets the nearest size",
        default=SIDES,
        nargs="+",
        minimum=16,
        maximum=LONGEST_SIDE,
    )
    frame_buckets: tuple[int, ...] = option(
        "numbers of frames; a clip gets the nearest one that it has",
        default=(FRAMES,),
        nargs="+",
        minimum=1,
        maximum=MAX_FRAMES,
    )
    max_num_frames: int = option("most frames of a clip", default=FRAMES, minimum=1, maximum=MAX_FRAMES)
    target_fps: int = option(
        "frames a second of the clips that are written", default=8, minimum=1, maximum=1000
    )
    random_flip: float | None = option(
        "fraction of clips to mirror, left to right, from 0 to 1; default: none", minimum=0, maximum=1
    )
    video_reshape_mode: str | None = option(
        "resize until a clip covers its size, and cut out the center or a random part (none: as "
        "random); default: resize without cutting, which changes the proportions",
        choices=("center", "random", "none"),
    )
    seed: int = option(
        "seed of names, flips and random parts; a run with the same seed continues the last one",
        default=42,
        minimum=-(2**63),
        below=2**64,
    )

    def __post_init__(self) -> None:
        for name in ("height_buckets", "width_buckets"):
            for side in getattr(self, name):
                if side % 2:
                    raise OptionError(f"--{name} {side}: use even numbers; the videos have colors by twos")


class WorkerOptions(Options):
    """Number of threads for each stage of the preparation."""

    num_decode_threads: int = option(
        "threads that decode one clip; 0: FFmpeg's choice", default=0, minimum=0, maximum=MAX_THREADS
    )
    dataloader_num_workers: int = option(
        "clips to read at a time, ahead of the encoder (0 and 1: one)",
        default=0,
        minimum=0,
        maximum=MAX_THREADS,
    )
    num_artifact_workers: int = option("threads that write files", default=4, minimum=1, maximum=MAX_THREADS)


class PrepareOptions(Options, title="output and threads"):
    """Output folder and number of threads of the preparation."""

    source: ClipSourceOptions
    shape: ShapeOptions
    encoding: EncodingOptions
    output_dir: Path = option("folder for the prepared data", required=True)
    workers: WorkerOptions

    def __post_init__(self) -> None:
        if real_path(self.output_dir) == real_path(self.source.data_root):
            raise OptionError(
                f"--output_dir {self.output_dir} is --data_root: its lists would be written over. Pass "
                "another folder."
            )


@dataclass(frozen=True)
class PreparedItem:
    """A clip with its caption, and the paths of the files made from them."""

    name: str
    caption: str  # one line
    source: Path
    folder: Path

    def get_path(self, kind: str) -> Path:
        """Return the path of a result file by its kind, such as `videos` or `prompts`."""
        return self.folder / kind / f"{self.name}{SUFFIXES.get(kind, '.pt')}"

    @property
    def info_file(self) -> Path:
        """Path of the file with a clip's frame count and size; written last, it marks a finished clip."""
        return self.get_path(VIDEOS).with_suffix(".txt")

    def read_info(self) -> dict[str, Any]:
        """Read num_frames, height and width. Raises OSError, ValueError, KeyError or TypeError."""
        info = parse_json(read_text(self.info_file))
        return {key: int(info[key]) for key in ("num_frames", "height", "width")}

    def has_media_files(self, needs_latents: bool, needs_image_latents: bool) -> bool:
        """Return whether the files that were made from the source clip exist and are newer than it.

        The arguments say whether VAE moments of the clip and of its first frame are needed.
        """
        kinds = [VIDEOS, IMAGES]
        if needs_latents:
            kinds.append(MOMENTS)
        if needs_image_latents:
            kinds.append(IMAGE_MOMENTS)
        try:
            self.read_info()
        except (OSError, ValueError, KeyError, TypeError):
            return False
        # the time of a folder of images does not change when an image is edited, so it is not compared
        is_newer = self.source.is_dir() or self.source.stat().st_mtime_ns <= self.info_file.stat().st_mtime_ns
        return is_newer and all(self.get_path(kind).exists() for kind in kinds)

    def has_caption_files(self, needs_embeds: bool) -> bool:
        """Return whether the caption file exists and contains the current caption.

        With `needs_embeds`, the file of its text embeddings must exist too.
        """
        path = self.get_path(EMBEDS)
        if needs_embeds and not (path.exists() and embeds_note(path).exists()):
            return False
        try:
            return read_text(self.get_path(PROMPTS)) == self.caption
        except (OSError, ValueError):
            return False


def find_items(source: ClipSourceOptions, folder: Path, seed: int) -> list[PreparedItem]:
    """Return an item for each row of the data, in order.

    Names are UUIDs derived from the seed, the path of the clip, and the row's number among the rows of that
    clip, so that reruns find their files again, even after rows have been added. Raises DatasetError, listing
    all errors, if the data are invalid or a clip is missing.
    """
    root = source.data_root
    option_text = f"--data_root {root}"
    table = DatasetTable(root, index=0, kind="video").with_values(
        format_keys=CogVideoXKeys(
            root,
            dataset_file=source.dataset_file,
            video_column=source.video_column,
            id_token=(source.id_token or "").strip(),
        ),
        caption_column=source.caption_column,
    )
    errors: list[Fault] = []
    rows = list(read_rows(table, option_text, errors))
    raise_if_fatal([*errors, *missing_clips(option_text, rows)])
    if not rows:
        raise DatasetError(f"{option_text} has no clips")
    num_rows: Counter[Path] = Counter()  # of each clip, so far
    items = []
    for row in rows:
        num_rows[row.video] += 1
        path = row.video.relative_to(root) if row.video.is_relative_to(root) else row.video
        # a reproducible UUID: a hash of the seed, the path of the clip, and the number of its row
        text = json.dumps([seed, path.as_posix(), num_rows[row.video]])
        # file names may contain bytes that are not UTF-8
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        name = str(uuid.UUID(bytes=digest[:16], version=4))
        # a caption file has one line
        caption = " ".join(row.caption.splitlines())
        items.append(PreparedItem(name, caption, row.video, folder))
    return items


def make_list_contents(items: Sequence[tuple[PreparedItem, Mapping[str, Any]]]) -> dict[str, str]:
    """Return the contents of prompts.txt, videos.txt and data.jsonl, by file name.

    Args:
        items: Finished items with their number of frames, height and width. Missing files are null in
            data.jsonl.
    """
    jsonl_lines = []
    for item, info in items:
        path_by_key = {key: item.get_path(kind) for key, kind in FOLDERS_BY_KEY.items()}
        paths_in_folder = {
            key: path.relative_to(item.folder).as_posix() if path.exists() else None
            for key, path in path_by_key.items()
        }
        record = {"prompt": item.caption, **paths_in_folder, "metadata": dict(info)}
        jsonl_lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return {
        "prompts.txt": "".join(f"{item.caption}\n" for item, _ in items),
        "videos.txt": "".join(f"{VIDEOS}/{item.name}.mp4\n" for item, _ in items),
        "data.jsonl": "".join(jsonl_lines),
    }


def save_pickled(path: Path, content: Tensor | Mapping[str, Tensor]) -> None:
    """Save tensors with `torch.save` in the format that CogVideoX trainers read.

    Raises OutputError, or CacheError if a value is NaN.
    """
    tensors = {path.parent.name: content} if isinstance(content, Tensor) else content
    for key, tensor in tensors.items():
        require_finite(tensor, path.name, key)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    # an open file: the archive in it would have the temporary file's name
    with atomic_path(path, size_bytes) as temporary, temporary.open("wb") as file:
        torch.save(content if isinstance(content, Tensor) else dict(content), file)


def write_media(item: PreparedItem, frames: NDArray[np.uint8], fps: int, moments: "Moments") -> None:
    """Write the video, first frame and VAE moments of a clip, then the file that marks it as finished.

    `frames` is F H W 3.

    Raises:
        OutputError: If a file cannot be written.
        CacheError: If a value of the moments is NaN or infinite.
    """
    # `info_file` marks an item as finished: a kill must not leave it next to new files
    item.info_file.unlink(missing_ok=True)
    write_video(item.get_path(VIDEOS), list(frames), fps)
    write_png(item.get_path(IMAGES), frames[0])
    for kind, tensor in ((MOMENTS, moments.clip_moments), (IMAGE_MOMENTS, moments.first_frame_moments)):
        if tensor is None:
            item.get_path(kind).unlink(missing_ok=True)  # from an earlier state of the clip
        else:
            save_pickled(item.get_path(kind), tensor)
    count, height, width = frames.shape[:3]
    write_text(item.info_file, json.dumps({"num_frames": count, "height": height, "width": width}))
    newest = item.source.stat().st_mtime_ns
    # a source dated in the future would always be newer than its info file, and never count as done
    if newest > item.info_file.stat().st_mtime_ns:
        os.utime(item.info_file, ns=(newest, newest))


def write_caption_files(
    item: PreparedItem,
    architecture: str,
    identities: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the embeddings of a caption and a note on their origin; the caption itself is written last.

    `tensors` are named by the keys of text caches, and `identities` describe each text encoder. A single
    tensor is stored without a dictionary, as other trainers expect. Raises OutputError, or CacheError if a
    value is NaN.
    """
    path = item.get_path(EMBEDS)
    item.get_path(PROMPTS).unlink(missing_ok=True)  # the file of the caption shows that all others are there
    if tensors:
        save_pickled(path, next(iter(tensors.values())) if len(tensors) == 1 else tensors)
        note = describe_embeds(item.caption, architecture, identities, tensors)
        write_text(embeds_note(path), json.dumps(note, ensure_ascii=False, sort_keys=True))
    else:  # existing ones are from an earlier caption
        path.unlink(missing_ok=True)
        embeds_note(path).unlink(missing_ok=True)
    write_text(item.get_path(PROMPTS), item.caption)


# --- reading and encoding
# ------------------------------------------------------------------------------------------------------------


def prepare_clips(
    items: Sequence[PreparedItem],
    encode: EncodeMoments | None,
    device: torch.device,
    options: PrepareOptions,
    show_progress: bool,
) -> list[Failure]:
    """Decode, encode and write all clips of one process; return the failures.

    Without `encode` nothing is encoded.

    Raises:
        OutputError: If a file cannot be written.
    """
    failures: list[Failure] = []
    encoding = options.encoding
    with (
        write_behind(options.workers.num_artifact_workers) as write,
        torch.no_grad(),
        Bar(len(items), "Preparing", "clip", show_progress) as bar,
        contextlib.closing(_read_ahead(items, options)) as read_clips,
    ):
        batches = fill_batches(
            _collect_failures(read_clips, failures, bar),
            get_group=lambda pair: pair[1].shape,
            get_batch_size=lambda _: encoding.batch_size,
            get_num_bytes=lambda pair: pair[1].nbytes,
            max_bytes=MAX_WAITING_BYTES,
        )
        for batch in batches:
            encoded = _encode_batch([clip for _, clip in batch], encode, device, encoding)
            for (item, clip), moments in zip(batch, encoded, strict=True):
                write(partial(write_media, item, clip, options.shape.target_fps, moments))
    return failures


def _read_ahead(
    items: Sequence[PreparedItem], options: PrepareOptions
) -> Generator[tuple[PreparedItem, Clip | Exception], None, None]:
    """Yield (item, decoded clip or error) in order, while threads decode the next clips."""
    threads = options.workers
    shape = options.shape
    # upper limit for the memory of a decoded clip
    size_bytes = 3 * max(shape.frame_buckets) * max(shape.height_buckets) * max(shape.width_buckets)
    return run_ahead(
        items,
        lambda item: read_clip(item.source, shape, item.name, threads.num_decode_threads),
        workers=max(1, threads.dataloader_num_workers),
        size_bytes=lambda _: size_bytes,
        limit_bytes=DECODED_BYTES,
    )


def _collect_failures(
    results: Iterable[tuple[PreparedItem, Clip | Exception]], failures: list[Failure], bar: Bar
) -> Iterator[tuple[PreparedItem, Clip]]:
    """Yield the decoded clips; append unreadable ones to `failures`."""
    for item, result in results:
        if isinstance(result, (MediaError, OSError)):
            failures.append(Failure(item.source, reason=str(result), table=0, stem=item.name))
        elif isinstance(result, Exception):
            raise result
        else:
            yield item, result
        bar.update()


@dataclass(frozen=True)
class Moments:
    """VAE moments of a clip and of its first frame, 2C f h w, on the CPU; None: not encoded."""

    clip_moments: Tensor | None = None
    first_frame_moments: Tensor | None = None


def _encode_batch(
    clips: Sequence[Clip], encode: EncodeMoments | None, device: torch.device, settings: EncodingOptions
) -> list[Moments]:
    """Encode clips of one shape, and their first frames if the options ask for it."""
    if encode is None:
        return [Moments() for _ in clips]
    clip_moments_list = _encode_clips(clips, encode, device, settings)
    if not settings.save_image_latents:
        return [Moments(clip_moments) for clip_moments in clip_moments_list]
    first_frame_moments_list = _encode_clips([clip[:1] for clip in clips], encode, device, settings)
    return [Moments(*pair) for pair in zip(clip_moments_list, first_frame_moments_list, strict=True)]


def _encode_clips(
    clips: Sequence[Clip], encode: EncodeMoments, device: torch.device, settings: EncodingOptions
) -> list[Tensor]:
    """Encode clips of the same shape to VAE moments; return them on the CPU, in the dtype for saving."""
    # On a CPU, clips are encoded one by one, which is equally fast and makes results independent of the
    # batch.
    step = 1 if settings.use_slicing or device.type == "cpu" else len(clips)
    encoded: list[Tensor] = []
    for start in range(0, len(clips), step):
        frames = torch.from_numpy(np.stack(clips[start : start + step]))
        if settings.pin_memory and device.type == "cuda":
            frames = frames.pin_memory()
        moments = encode(to_pixels(frames.to(device, non_blocking=settings.pin_memory)))
        encoded += [moment.to(DTYPES[settings.dtype]).cpu().clone() for moment in moments]
    return encoded


# --- frames and sizes
# ------------------------------------------------------------------------------------------------------------


def read_clip(path: Path, options: ShapeOptions, name: str, threads: int) -> Clip:
    """Decode evenly spaced frames of a clip, and fit them to a size bucket: F H W 3.

    The item's `name` seeds the random choices, so that they are the same in every run. `threads` is the
    number of threads for decoding.

    Raises:
        MediaError: If the clip cannot be read or is too short.
    """
    generator = random.Random(derive_seed(options.seed, "prepare", name))
    crop_position = (generator.random(), generator.random())  # fractions of the margin
    # drawn once, so that all frames are cropped and mirrored equally
    is_flipped = generator.random() < (options.random_flip or 0.0)
    bucket: Size | None = None  # of the first frame, for all frames: images of a folder may differ in size

    def fit_frame(frame: Frame) -> Frame:
        """Resize and crop a frame to the size bucket of the clip's first frame."""
        nonlocal bucket
        if bucket is None:
            frame_size = (frame.shape[1], frame.shape[0])
            bucket = select_size(frame_size, options.height_buckets, options.width_buckets)
        return shape_frame(frame, bucket, options, crop_position=crop_position, is_flipped=is_flipped)

    select_indices = partial(_select_indices, path=path, options=options)
    return np.stack(pick_frames(path, select_indices, fit_frame, threads, exact=False))


def _select_indices(available: int, path: Path, options: ShapeOptions) -> range:
    """Return evenly spaced frame indices, as many as the frame bucket that fits a clip."""
    count = select_frames(available, options.frame_buckets, options.max_num_frames)
    if count is None:
        raise MediaError(
            f"{path} has {available} frames, the smallest of --frame_buckets is {min(options.frame_buckets)}"
        )
    step = available // count
    return range(0, step * count, step)


def select_frames(available: int, buckets: Sequence[int], maximum: int) -> int | None:
    """Return the frame bucket nearest to min(available, maximum); on a tie the first one.

    None if all buckets have more than `available` frames.
    """
    fitting = [bucket for bucket in buckets if bucket <= available]
    return min(fitting, key=lambda bucket: abs(bucket - min(available, maximum)), default=None)


def select_size(size: Size, heights: Sequence[int], widths: Sequence[int]) -> Size:
    """Return the (width, height) nearest to `size`, each side chosen by itself; on a tie, the first."""
    width, height = size
    nearest_width = min(widths, key=lambda bucket: abs(bucket - width))
    nearest_height = min(heights, key=lambda bucket: abs(bucket - height))
    return nearest_width, nearest_height


def shape_frame(
    frame: Frame, size: Size, options: ShapeOptions, *, crop_position: tuple[float, float], is_flipped: bool
) -> Frame:
    """Resize a frame, H W 3, to `size`, then crop and mirror it according to the options."""
    if options.video_reshape_mode is None:
        frame = resize_stretched(frame, size)
    else:
        is_centered = options.video_reshape_mode == "center"
        frame = resize_cover(frame, size, place=None if is_centered else crop_position)
    return np.ascontiguousarray(frame[:, ::-1]) if is_flipped else frame

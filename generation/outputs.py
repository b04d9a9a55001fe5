"""Output files of a generation: latents, videos, images, and their names."""

import logging
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from torch import Tensor

from blissful_tuner.metadata import as_png_texts, as_tags, with_plain_keys
from checkpoints.writing import save_tensors
from generation.script_options import IMAGE_OUTPUTS, OutputOptions
from modules.atomic_write import atomic_folder, claim_name
from modules.errors import OptionError
from modules.media.colors import Frame
from modules.media.encoding import resolve_codec
from modules.media.pixels import iterate_frames
from modules.media.tracks import Track, write_wav
from modules.media.writing import write_png, write_video
from protocols.data import AUDIO_LATENTS, LatentSpec

logger = logging.getLogger(__name__)

LATENT_SUFFIX = "_latent.safetensors"
PREVIEW_SUFFIX = "_progress.mp4"
LAST_FRAME_SUFFIX = "_last.png"
AUDIO_SUFFIX = ".wav"
# suffixes of all kinds of output
SUFFIXES = (
    LATENT_SUFFIX, PREVIEW_SUFFIX, LAST_FRAME_SUFFIX, AUDIO_SUFFIX,
    ".mp4", ".mkv", ".png", "_000.png", "",
)  # fmt: skip


# names of latent files that we wrote: they begin with a time
OWN_LATENTS = re.compile(r"(\D*\d{8}[-_]\d{6}.*)_latent", re.DOTALL)
NAMED_CHARACTERS = 40  # maximum number of a prompt's characters in a file name
NAMED_BYTES = 100  # the same limit in UTF-8 bytes; file names may have 255


class FrameTools(Protocol):
    """Post-processing tools of --post that change decoded frames before they are written."""

    @property
    def hides_content(self) -> bool:
        """Whether a tool hides content such as faces, so that unprocessed frames must not be shown."""

    def check(self) -> None:
        """Check the model files of the post-processing tools by their headers.

        Raises:
            UserError: If a tool cannot use its file.
        """

    def check_length(self, frames: int, label: str) -> None:
        """Raise OptionError if a tool of --post needs several frames and the clip has only one.

        Args:
            frames: Number of frames.
            label: Name of the clip in the message.
        """

    def process(self, frames: Iterator[Frame], fps: float, is_single: bool) -> tuple[Iterator[Frame], float]:
        """Run the tools on the frames; return the processed frames and their frame rate.

        The first call loads the networks.

        Args:
            frames: Frames of the clip.
            fps: Frames per second.
            is_single: Whether the clip is a single image.

        Raises:
            UserError: If a tool fails.
        """


def output_stem(
    when: datetime, seed: int, origin: Path | None = None, prompt: str = "", start: str = ""
) -> str:
    """Return the name of an output without its suffix: time, seed, and latent file if there is one.

    Args:
        when: Time of the generation.
        seed: Seed of the generation.
        origin: Latent file that is decoded. If its name comes from this function, its time and seed are used.
        prompt: Prompt whose first words are appended.
        start: Text before the time.
    """
    if origin is not None:
        own_name = OWN_LATENTS.fullmatch(origin.stem)
        if own_name:
            return own_name[1]
    name_parts = [
        start,
        f"{when:%Y%m%d-%H%M%S}",
        str(seed),
        "" if origin is None else origin.stem,
        make_prompt_slug(prompt) if prompt else "",
    ]
    return "_".join(part for part in name_parts if part)


def name_job(output: OutputOptions, when: datetime, seed: int, prompt: str) -> str:
    """Return a job's file name without suffix, from time, seed and prompt as the options determine."""
    if output.naming == "time":  # as in sd-scripts
        return f"{when:%Y%m%d_%H%M%S}"
    if output.naming == "released":  # as in HunyuanVideo's code, without characters that file systems reject
        allowed = re.sub(r'[\x00-\x1f<>:"/\\|?*]', "", prompt)
        start = allowed[:100].encode("utf-8")[:150].decode("utf-8", errors="ignore").strip(" .")
        return f"{when:%Y-%m-%d-%H-%M-%S}_seed{seed}_{start}"
    words = prompt if output.prompt_in_name else ""
    return output_stem(when, seed, prompt=words, start=output.name_start)


def make_prompt_slug(prompt: str) -> str:
    """Return the first words of a prompt, joined by hyphens, for a file name."""
    words = "-".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt)))
    start = words[:NAMED_CHARACTERS].encode("utf-8")[:NAMED_BYTES].decode("utf-8", errors="ignore")
    if len(start) == len(words):
        return start
    full_words = start.rpartition("-")[0]
    return full_words or start


def free_stem(folder: Path, stem: str, suffixes: Iterable[str]) -> str:
    """Append underscores to a file stem until no file with this stem and one of the suffixes exists."""
    suffixes = list(suffixes)
    while any((folder / f"{stem}{suffix}").exists() for suffix in suffixes):
        stem += "_"
    return stem


@contextmanager
def reserve_stem(folder: Path, stem: str, suffixes: Sequence[str] = SUFFIXES) -> Iterator[str]:
    """Reserve a file stem during the block: append `_` until no output file and no other run uses it.

    Runs that start in the same second with the same seed would get the same stem. The output must exist when
    the block ends.
    """
    with ExitStack() as claims:
        while (
            not claims.enter_context(claim_name(folder / stem)) or free_stem(folder, stem, suffixes) != stem
        ):
            stem += "_"
        yield stem


def save_latents(
    path: Path, latents: Tensor, metadata: Mapping[str, str] | None, audio: Tensor | None = None
) -> None:
    """Write latents to a file, as a float32 tensor `latent` (C F H W) in the sampler's space.

    Args:
        path: Path of the file.
        latents: Latents, 1 C F H W.
        metadata: Metadata of the file.
        audio: Latents of the clip's audio, 1 C T M, written as `AUDIO_LATENTS`; None without audio.
    """
    tensors = {"latent": latents[0].float()}
    if audio is not None:
        tensors[AUDIO_LATENTS] = audio[0].float()
    save_tensors(path, tensors, None if metadata is None else with_plain_keys(metadata))


def save_pixels(
    options: OutputOptions,
    stem: str,
    chunks: Iterable[Tensor],
    fps: float,
    metadata: Mapping[str, str] | None,
    post: FrameTools | None = None,
    track: Track | None = None,
    latent: LatentSpec | None = None,
) -> Path:
    """Write decoded pixels as they arrive; return the path of the result.

    The result is a video, or a PNG if there is a single frame. With `--output_type images` it is a folder of
    PNG files; for a single frame, only if the script neither numbers single images nor generates
    only images. With `--save_last_frame` the last frame of a video is also written as a PNG, unprocessed so
    that another video can continue from it, or processed if one of the tools hides something.

    Args:
        options: Options of the output.
        stem: Name of the output without its suffix.
        chunks: Chunks of pixels, 1 C F H W in -1..1, in playing order.
        fps: Frames per second.
        metadata: Metadata of the file.
        post: Tools that process frames before they are written.
        track: Audio of the clip; with `--save_audio` it is also written next to the result.
        latent: Latent space of the family, whose frames may be layers of an image that are written
            separately.
    """
    frames: Iterator[Frame] = iterate_frames(chunks)
    if latent is not None and latent.has_layers:
        return _save_layers(options, stem, frames, has_full=latent.has_full, metadata=metadata)
    if options.trim_tail_frames:
        frames = drop_tail(frames, options.trim_tail_frames)
    first_frames = list(islice(frames, 2))  # two frames show whether there is only one
    if not first_frames:
        return _save_audio(options, stem, track, metadata)
    is_single = len(first_frames) == 1
    frames = chain(first_frames, frames)
    del first_frames  # a frame takes megabytes
    is_image = options.is_image(is_single)
    last_frame = deque[Frame](maxlen=1)  # filled while the frames of a video are written
    if options.save_last_frame and not is_image:
        # unprocessed, so that another video can continue from it; but if a tool hides content, processed
        if post is not None and post.hides_content:
            frames, fps = post.process(frames, fps, is_single)
            post = None
        frames = remember(frames, last_frame)
    if post is not None:
        frames, fps = post.process(frames, fps, is_single)
    if is_image:
        return _save_image(options, stem, frames, metadata)
    path = _save_clip(options, stem, _Clip(frames, fps, track, metadata))
    if last_frame:
        _save_last_frame(options, path, last_frame[0], metadata)
    return path


def _save_last_frame(
    options: OutputOptions, clip_path: Path, frame: Frame, metadata: Mapping[str, str] | None
) -> None:
    """Write the last frame of a clip as a PNG file next to the clip."""
    # a folder of images has no suffix; its name may contain a dot
    name = clip_path.name if options.output_type in IMAGE_OUTPUTS else clip_path.stem
    path = clip_path.with_name(f"{name}{LAST_FRAME_SUFFIX}")
    write_png(path, frame, as_png_texts(metadata or {}))
    logger.info("Last frame: %s", path)


@dataclass(frozen=True)
class _Clip:
    """A video to write."""

    frames: Iterator[Frame]  # in playing order
    fps: float
    track: Track | None  # its audio
    metadata: Mapping[str, str] | None


def _save_clip(options: OutputOptions, stem: str, clip: _Clip) -> Path:
    """Write a clip as a video or a folder of images, with --save_audio also its audio; return its path."""
    saves_audio = options.save_audio is not None and clip.track is not None
    # suffixes of files next to the clip, which must not exist yet
    side_suffixes = []
    if options.save_last_frame:
        side_suffixes.append(LAST_FRAME_SUFFIX)
    if saves_audio:
        side_suffixes.append(AUDIO_SUFFIX)
    if options.output_type in IMAGE_OUTPUTS:
        path = options.save_path / free_stem(options.save_path, stem, ["", *side_suffixes])
        with atomic_folder(path) as folder:
            frame_name = f"{path.name}_{{:03d}}.png"
            for _ in write_frames(clip.frames, folder, frame_name, as_png_texts(clip.metadata or {})):
                pass  # each iteration writes a frame
        name = path.name
    else:
        path = _save_video(options, stem, clip, side_suffixes)
        name = path.stem
    if clip.track is not None and saves_audio:
        write_wav(path.with_name(f"{name}{AUDIO_SUFFIX}"), clip.track)
    return path


def _save_image(
    options: OutputOptions, stem: str, frames: Iterator[Frame], metadata: Mapping[str, str] | None
) -> Path:
    """Write a single frame as a PNG file; return its path."""
    ending = "_000.png" if options.numbers_single else ".png"
    name = options.file_name or free_stem(options.save_path, stem, [ending]) + ending
    path = options.save_path / name
    (frame,) = frames
    write_png(path, frame, as_png_texts(metadata or {}))
    return path


def _save_layers(
    options: OutputOptions,
    stem: str,
    frames: Iterator[Frame],
    has_full: bool,
    metadata: Mapping[str, str] | None,
) -> Path:
    """Write the layers of a layered image and the composed image as PNG files; return the last path."""
    from modules.media.layers import COMPOSITE, write_layers  # few results have layers

    stem = Path(options.file_name).stem or free_stem(options.save_path, stem, [f"{COMPOSITE}.png"])
    paths = write_layers(options.save_path, stem, frames, has_full, as_png_texts(metadata or {}))
    logger.info("Layers: %s to %s", paths[0], paths[-2].name)
    return paths[-1]


def _save_audio(
    options: OutputOptions, stem: str, track: Track | None, metadata: Mapping[str, str] | None
) -> Path:
    """Write a clip's audio track to a file without a video; return its path."""
    if track is None:
        raise OptionError(
            f"{stem}: the latents contain only sound, which this run does not write. Request sound"
        )
    name = options.file_name or free_stem(options.save_path, stem, [AUDIO_SUFFIX]) + AUDIO_SUFFIX
    path = options.save_path / name
    write_wav(path, track, metadata)
    return path


def _save_video(options: OutputOptions, stem: str, clip: _Clip, side_suffixes: Sequence[str]) -> Path:
    """Write a video, with --keep_pngs also its frames as PNG files; return the video's path."""
    suffix = options.format.suffix
    if suffix != f".{options.format.container}":
        logger.warning(
            "--codec %s is written as %s because mp4 does not support it", options.format.codec, suffix
        )
    name = options.file_name or free_stem(options.save_path, stem, [suffix, *side_suffixes]) + suffix
    path = options.save_path / name
    first_frames = list(islice(clip.frames, 1))  # read ahead for the size
    height, width = first_frames[0].shape[:2]
    codec = resolve_codec(options.format.codec, width, height)  # an encoder may reject small frames
    frames: Iterator[Frame] = chain(first_frames, clip.frames)
    with ExitStack() as stack:
        if options.format.keep_pngs:
            pngs = options.save_path / free_stem(options.save_path, "frames", [""])
            folder = stack.enter_context(atomic_folder(pngs))
            frames = write_frames(frames, folder, "{:06d}.png", as_png_texts(clip.metadata or {}))
        tags = as_tags(clip.metadata or {})
        write_video(path, frames, clip.fps, codec=codec, tags=tags, track=clip.track)
    if options.format.keep_pngs:
        logger.info("Frames: %s", pngs)
    return path


def remember(frames: Iterable[Frame], last: deque[Frame]) -> Iterator[Frame]:
    """Yield the frames, and keep the last ones in `last`, up to its maximum length."""
    for frame in frames:
        last.append(frame)
        yield frame


def write_frames(
    frames: Iterable[Frame], folder: Path, name: str, tags: Mapping[str, str]
) -> Iterator[Frame]:
    """Write each frame as a PNG, then yield it; `name` is a format string for the frame number."""
    for index, frame in enumerate(frames):
        write_png(folder / name.format(index), frame, tags)
        yield frame


def drop_tail(frames: Iterable[Frame], count: int) -> Iterator[Frame]:
    """Yield all but the last `count` frames; a shorter video keeps its first frame."""
    held_back: deque[Frame] = deque()
    has_yielded = False
    for frame in frames:
        held_back.append(frame)
        if len(held_back) > count:
            has_yielded = True
            yield held_back.popleft()
    if not has_yielded and held_back:
        logger.warning(
            "--trim_tail_frames %d would leave nothing of %d frames; the first one is kept",
            count,
            len(held_back),
        )
        yield held_back[0]

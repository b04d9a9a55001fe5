"""Keyframes and references of a request: find and check them, and read their pixels and audio.

Keyframes get the size of the clip: the first one is stretched, a following one covers it and is cropped.
Reference images are resized by their short side, reference videos to the trained area at their own aspect
ratio, at 24 frames per second. Source: the released code of MiniMax-H3, as in diffusers.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimax_h3.options import CLIP, FPS, LAST_FRAMES, canvas, check_ratio
from minimax_h3.presentation import AUDIO, IMAGE, PRESENTED_AUDIO, VIDEO, PresentedMedium
from minimax_h3.reference_options import (
    BY_KIND,
    CONDITION_IMAGES,
    INDEX,
    JSONL,
    KEYFRAMES,
    ONE_FRAME,
    REF,
    split_ref,
)
from modules.errors import MediaError, OptionError
from modules.media.buckets import Size
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.reading import (
    Frame,
    image_size,
    is_single_image,
    read_image,
    resize_frame,
    video_frames,
    video_info,
)
from modules.media.samples import track_info
from modules.option_values import to_path
from modules.paths import expand_path, explain_missing, path_exists
from modules.text_files import parse_json, read_text
from protocols.one_frame import OneFrame, parse_one_frame
from protocols.requests import Request, check_opens

logger = logging.getLogger(__name__)

KINDS = (IMAGE, VIDEO, AUDIO)
MAX_COUNTS = {IMAGE: 9, VIDEO: 3, AUDIO: 3}  # maximum counts; audio of videos is included
MAX_REFERENCES = 12
MIN_SECONDS, MAX_SECONDS = 2.0, 15.0  # limits of the length of reference videos
MIN_FRAMES = CLIP + LAST_FRAMES  # minimum length of a reference video, for the VAE


@dataclass(frozen=True)
class H3Reference:
    """A reference file that conditions a clip."""

    kind: str  # IMAGE, VIDEO or AUDIO
    path: Path
    audio: Path | None = None  # audio of a video: its own file or another one; None without audio


@dataclass(frozen=True)
class H3Media:
    """All media on which a clip or an image is conditioned, in addition to its text."""

    first: Path | None = None
    last: Path | None = None
    controls: tuple[Path, ...] = ()  # control images, for a single image
    one_frame: OneFrame | None = None
    references: tuple[H3Reference, ...] = ()

    @property
    def keyframes(self) -> tuple[Path, ...]:
        """Return the keyframes and control images, in order."""
        frames = tuple(path for path in (self.first, self.last) if path is not None)
        return (*frames, *self.controls)

    @property
    def is_empty(self) -> bool:
        """Return whether there are neither keyframes nor references."""
        return not (self.keyframes or self.references)

    @property
    def task(self) -> str:
        """Return the task that takes these media."""
        if self.references:
            return "ref2va"
        return "fl2va" if self.keyframes else "t2va"


# parsing of requests


def read_media(request: Request) -> H3Media:
    """Read a request's keyframes, control images and references; raise OptionError if they cannot be used."""
    first, last = _select_keyframes(request)
    control_names = _split_lines(request, CONDITION_IMAGES)
    controls = tuple(to_path("--condition_image", text) for text in control_names)
    one_frame: OneFrame | None = None
    if ONE_FRAME in request.extra:
        one_frame = _read_one_frame(request.extra[ONE_FRAME])
        # keyframes of a single image are its first control images
        controls = (*(path for path in (first, last) if path is not None), *controls)
        first = last = None
        # Raise OptionError unless there are as many control images as frame indices for them
        num_controls = len(controls)
        num_indices = len(one_frame.control_indices)
        has_default_index = num_indices == 0 and num_controls == 1
        if num_indices != num_controls and not has_default_index:
            raise OptionError(
                f"--one_frame_inference: control_index has {num_indices} positions for {num_controls} images "
                "(--condition_image). Pass one position for each, such as control_index=0;10"
            )
    elif controls:
        raise OptionError(
            "--condition_image is for a single image (--one_frame_inference). Pass the frames of a clip to "
            "--first_frame and --last_frame"
        )
    media = H3Media(
        first=first,
        last=last,
        controls=controls,
        one_frame=one_frame,
        references=tuple(_read_references(request)),
    )
    for path in media.keyframes:
        _check_opens("--first_frame, --last_frame, --condition_image", path, is_image=True)
    if media.keyframes and media.references:
        raise OptionError("keyframes and references need different transformers. Omit one of them")
    check_references(media.references)
    return media


def _split_lines(request: Request, name: str) -> list[str]:
    return [line for line in request.extra.get(name, "").split("\n") if line]


def _select_keyframes(request: Request) -> tuple[Path | None, Path | None]:
    """Return the first and last keyframe of a request, None where it has none."""
    frames = [to_path("--keyframe", text) for text in _split_lines(request, KEYFRAMES)]
    if not frames:
        return request.image_path, request.end_image_path
    if request.image_path is not None or request.end_image_path is not None:
        raise OptionError("--keyframe and --first_frame or --last_frame mean the same: pass one of them")
    if len(frames) > 2:
        raise OptionError(
            f"--keyframe: {len(frames)} images, the model takes a first and a last frame. Pass two at most"
        )
    return frames[0], frames[1] if len(frames) > 1 else None


def _read_one_frame(text: str) -> OneFrame:
    """Parse --one_frame_inference; raise OptionError for values of FramePack."""
    one_frame = parse_one_frame(text)
    if not (one_frame.has_post and one_frame.has_2x and one_frame.has_4x):
        raise OptionError(
            f"--one_frame_inference {text!r}: no_post, no_2x and no_4x are for FramePack. Omit them"
        )
    return one_frame


def _read_references(request: Request) -> Iterator[H3Reference]:
    """Yield the request's references in order; raise OptionError if two kinds of options name them."""
    # Raise OptionError if options name references whose order among each other is unknown
    # Options for one kind of reference may be combined: they are read in a fixed order.
    by_kind = [name for name in BY_KIND.values() if request.extra.get(name)]
    used = [*(name for name in (REF, JSONL) if request.extra.get(name)), *by_kind[:1]]
    if len(used) > 1:
        listed = " and ".join(f"--{name}" for name in used)
        raise OptionError(
            f"{listed}: their order would be unknown. Name all references in one of these options"
        )
    has_jsonl = bool(request.extra.get(JSONL))
    if int(request.extra.get(INDEX, 0)) and not has_jsonl:
        logger.warning("--%s is ignored because --%s is not given", INDEX, JSONL)
    for text in _split_lines(request, REF):
        path, fields = split_ref(text)
        yield _make_reference(f"--ref {path}", path, fields)
    for kind, name in BY_KIND.items():
        for text in _split_lines(request, name):
            yield _make_reference(f"--{name}", text, {"type": kind})
    if has_jsonl:
        yield from _read_line_references(request)


def _read_line_references(request: Request) -> Iterator[H3Reference]:
    """Yield the references in the JSONL line that a request selects; raise OptionError without any."""
    path = to_path(f"--{JSONL}", request.extra[JSONL])
    index = int(request.extra.get(INDEX, 0))
    try:
        lines = [line for line in read_text(path).split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"--{JSONL} {path}: {reason}.{explain_missing(path)} Pass a JSONL file") from None
    if index >= len(lines):
        raise OptionError(
            f"--{INDEX} {index}: {path} has {len(lines)} lines. Use a number from 0 to {len(lines) - 1}"
        )
    origin = f"--{JSONL} {path}, line {index + 1}"
    for entry in _parse_references(lines[index], origin):
        yield _read_reference(origin, path.parent, entry)


def _parse_references(line: str, origin: str) -> list[Any]:
    """Return the list "references" of a JSON line; raise OptionError if it is missing or empty."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise OptionError(f"{origin} is not JSON ({error})") from None
    entries = row.get("references") if isinstance(row, dict) else None
    if not isinstance(entries, list) or not entries:
        raise OptionError(
            f'{origin} has no "references". Pass a list that has them: [{{"type": "image", "path": ...}}]'
        )
    return entries


def _read_reference(origin: str, folder: Path, entry: Any) -> H3Reference:
    """Return one reference from a JSON line of a dataset; a null audio_path mutes the reference video."""
    # `origin` names the line in messages; `folder` is the folder of the list.
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise OptionError(f'{origin}: each of "references" needs a file. Pass it as "path"')
    audio = entry.get("audio_path", "")
    kind = entry.get("type", "")
    is_audio_path = audio is None or isinstance(audio, str)
    if not isinstance(kind, str) or not is_audio_path:
        raise OptionError(f'{origin}: "type" or "audio_path" is not a string. Pass strings, or omit them')
    fields: dict[str, str] = {}
    if kind:
        fields["type"] = kind
    if audio:
        fields["audio"] = _find_listed(audio, folder)
    reference = _make_reference(origin, _find_listed(entry["path"], folder), fields)
    # null, unlike a missing key: without the video's own audio track
    if audio is None and reference.kind == VIDEO:
        return H3Reference(VIDEO, reference.path)
    return reference


def _find_listed(text: str, folder: Path) -> str:
    """Return a path in a list, which is relative to the working folder or to `folder`, as in datasets."""
    try:
        next_to_list = expand_path(text, folder)
        is_next_to_list = path_exists(next_to_list) and not path_exists(expand_path(text))
    except ValueError:  # `_make_reference` reports it
        return text
    return str(next_to_list) if is_next_to_list else text


def _make_reference(origin: str, text: str, fields: Mapping[str, str]) -> H3Reference:
    """Return a reference from a path and the fields of --ref; raise OptionError for unusable files."""
    # `origin` names the option or line in messages.
    path = to_path(origin, text)
    # fields: the kind, by default from the suffix, and a video's audio file
    kind = fields.get("type") or _find_kind(path)
    if kind not in KINDS:
        raise OptionError(f"{origin}: type {kind!r} is unknown. Pass image, video or audio")
    audio = fields.get("audio")
    if audio is not None and kind != VIDEO:
        raise OptionError(
            f"{origin}: an audio file belongs to a video, but {path} is of type {kind}. Omit it"
        )
    if kind == AUDIO:
        _check_has_audio(origin, path)
        return H3Reference(AUDIO, path)
    _check_opens(origin, path, is_image=kind == IMAGE)
    if kind == IMAGE:
        return H3Reference(IMAGE, path)
    return H3Reference(VIDEO, path, _find_audio(origin, path, audio))


def _find_audio(origin: str, video: Path, typed_audio: str | None) -> Path | None:
    """Return the file with a reference video's audio: by default its own track; None if it has none."""
    if typed_audio is not None:
        audio = to_path(origin, typed_audio)
        _check_has_audio(origin, audio)
        return audio
    # a folder of frames has no audio
    has_track = not video.is_dir() and track_info(video) is not None
    return video if has_track else None


def _find_kind(path: Path) -> str:
    if path.suffix.lower() in AUDIO_SUFFIXES:
        return AUDIO
    return IMAGE if is_single_image(path) else VIDEO


def _check_opens(origin: str, path: Path, is_image: bool) -> None:
    """Raise OptionError if an image or a video cannot be opened."""
    if not path.exists():
        raise OptionError(f"{origin}: {path}: no such file.{explain_missing(path)} Correct the path")
    check_opens(origin.removeprefix("--"), path, is_image=is_image)


def _check_has_audio(origin: str, path: Path) -> None:
    """Raise OptionError if a file does not exist or has no audio."""
    if not path.is_file():
        raise OptionError(f"{origin}: {path}: no such file.{explain_missing(path)} Correct the path")
    try:
        info = track_info(path)
    except MediaError as error:
        raise OptionError(f"{origin}: {str(error).rstrip('.')}. Pass a file with audio") from None
    if info is None:
        raise OptionError(f"{origin}: {path} has no audio. Pass a file with audio")


def check_references(references: Sequence[H3Reference]) -> None:
    """Raise OptionError for more references than the model takes, or for audio alone."""
    if not references:
        return
    kinds = [reference.kind for reference in references]
    num_with_audio = sum(reference.kind == AUDIO or reference.audio is not None for reference in references)
    counts = {IMAGE: kinds.count(IMAGE), VIDEO: kinds.count(VIDEO), AUDIO: num_with_audio}
    names = {IMAGE: "images", VIDEO: "videos", AUDIO: "references with audio"}
    for kind, count in counts.items():
        if count > MAX_COUNTS[kind]:
            raise OptionError(f"{count} {names[kind]}: the model takes at most {MAX_COUNTS[kind]}. Omit some")
    if len(references) > MAX_REFERENCES:
        raise OptionError(
            f"{len(references)} references: the model takes at most {MAX_REFERENCES}. Omit some"
        )
    if not counts[IMAGE] and not counts[VIDEO]:
        raise OptionError("all references are audio: the model also needs an image or a video. Pass one")


def check_video_length(path: Path, any_length: bool) -> None:
    """Raise OptionError if a reference video's length is outside of the model's training lengths."""
    info = video_info(path)
    fps = info.fps or FPS
    seconds = info.frames / fps if info.frames else info.seconds
    if seconds is None or any_length:
        return
    half_frame = 0.5 / fps
    if not MIN_SECONDS - half_frame <= seconds <= MAX_SECONDS + half_frame:
        raise OptionError(
            f"reference video {path} takes {seconds:.1f} s: the model was trained with {MIN_SECONDS:g} to "
            f"{MAX_SECONDS:g}. Cut it, or pass --allow_experimental_duration"
        )


# pixels


@dataclass(frozen=True)
class ImageSource:
    """A keyframe or a reference image, and the size to which it is resized."""

    path: Path
    size: Size  # width and height
    crops: bool = False  # whether it is scaled to cover the size and cropped; otherwise it is stretched

    def read(self) -> Tensor:
        """Read the image's pixels, H W 3 uint8."""
        return torch.from_numpy(np.ascontiguousarray(self._resize(read_image(self.path))))

    def _resize(self, frame: Frame) -> Frame:
        width, height = self.size
        frame_width, frame_height = frame.shape[1], frame.shape[0]
        if (frame_width, frame_height) == self.size:
            return frame
        if not self.crops:
            return resize_frame(frame, self.size, "lanczos")
        scale = max(width / frame_width, height / frame_height)
        covering_width = max(width, round(frame_width * scale))
        covering_height = max(height, round(frame_height * scale))
        left = (covering_width - width) // 2
        top = (covering_height - height) // 2
        covering = resize_frame(frame, (covering_width, covering_height), "lanczos")
        return covering[top : top + height, left : left + width]


@dataclass(frozen=True)
class ClipSource:
    """A reference video: its frame size, and how many frames to take at 24 per second."""

    path: Path
    size: Size
    max_frames: int

    def read(self) -> Tensor:
        """Read the clip's frames, F H W 3 uint8; frames are repeated or dropped to give 24 per second."""
        fps = video_info(self.path).fps or FPS
        frames: list[Frame] = []
        for index, frame in enumerate(video_frames(self.path)):
            if len(frames) >= self.max_frames:
                break
            num_repeats = _find_start_frame(index + 1, fps) - _find_start_frame(index, fps)
            if num_repeats > 0:
                frames += [self._resize(frame)] * num_repeats
        if not frames:
            raise MediaError(f"{self.path} has no frame at {FPS:g} frames a second. Use a longer video")
        return torch.from_numpy(np.stack(frames[: self.max_frames]))

    def _resize(self, frame: Frame) -> Frame:
        colors = frame[..., :3]
        if (frame.shape[1], frame.shape[0]) == self.size:
            return colors
        return resize_frame(np.ascontiguousarray(colors), self.size, "lanczos")


def _find_start_frame(index: int, fps: float) -> int:
    """Return the index of the frame at 24 frames per second that shows frame `index` of a video at `fps`."""
    return math.floor(index * (FPS / fps) + 0.5)


def keyframe_sources(paths: Sequence[Path], size: Size) -> list[ImageSource]:
    """Return keyframes in the clip's size: the first is stretched, later ones are scaled and cropped."""
    return [ImageSource(path, size, crops=index > 0) for index, path in enumerate(paths)]


def reference_image(path: Path, short_edge: int, step: int) -> ImageSource:
    """Return a reference image with a short edge of `short_edge` pixels.

    Both edges become multiples of `step`. Raises OptionError if one edge is more than four times the other.
    """
    width, height = image_size(path)
    check_ratio(f"reference {path}", width, height)
    scale = short_edge / min(width, height)
    sides = [max(step, round(side * scale / step) * step) for side in (width, height)]
    return ImageSource(path, (sides[0], sides[1]))


def reference_clip(path: Path, short_edge: int, step: int, frames: int) -> ClipSource:
    """Return a reference video with its own aspect ratio, cut to `frames` frames.

    Raises OptionError if one side is more than four times as long as the other.
    """
    info = video_info(path)
    check_ratio(f"reference {path}", info.width, info.height)
    height, width = canvas(info.width / info.height, short_edge, step)
    return ClipSource(path, (width, height), frames)


def cut_to_vae_length(frames: Tensor) -> Tensor:
    """Cut a reference video to a length that the VAE takes: F H W 3 with F = 17n + 5, at least 22.

    Raises MediaError if there are fewer.
    """
    count = max(1, (len(frames) - LAST_FRAMES) // CLIP) * CLIP + LAST_FRAMES
    if count > len(frames):
        raise MediaError(
            f"a reference video of {len(frames)} frames at {FPS:g} a second is too short: {MIN_FRAMES} are "
            "needed. Use a longer one"
        )
    return frames[:count]


@dataclass(frozen=True)
class H3Sources:
    """How to read the media of a request, in order."""

    keyframes: tuple[ImageSource, ...] = ()
    references: tuple[ImageSource | ClipSource | None, ...] = ()  # None for audio

    def presented_media(self, references: Sequence[H3Reference]) -> tuple[PresentedMedium, ...]:
        """Return the media that the text encoder sees: keyframes first, then references."""
        presented = [PresentedMedium(IMAGE, source=source, read=source.read) for source in self.keyframes]
        for reference, source in zip(references, self.references, strict=True):
            if source is None:
                presented.append(PRESENTED_AUDIO)
                continue
            has_audio = reference.audio is not None
            presented.append(PresentedMedium(reference.kind, has_audio, source=source, read=source.read))
        return tuple(presented)

"""Preview of a video that is still being generated: `<stem>_progress.mp4`, updated after each section.

The memory this takes does not grow with the video. Each piece is decoded by itself. Frames that show the same
moments as the piece before are cross-faded with it, as in the finished video. Frames that no later piece can
change are encoded once, into a segment in a hidden folder; only the newest piece's other frames wait in
memory. The preview joins these segments and the waiting frames without encoding anything again.
"""

import logging
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from generation.outputs import PREVIEW_SUFFIX
from generation.session import CPU, Session
from modules.atomic_write import give_name
from modules.contract.generation import Piece
from modules.devices import is_out_of_memory
from modules.errors import OutputError
from modules.media.fading import cross_fade
from modules.media.pixels import frames_of
from modules.media.writing import Segment, join_videos, measure_segment, write_video

logger = logging.getLogger(__name__)

PRESET = "veryfast"  # of the encoder: the next section waits for it
FORGOTTEN_SECONDS = 24 * 3600.0  # a folder of segments this old is unused, on whatever machine it was made
_PARTS = re.compile(r"\..+_progress\.(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})\.parts")


def fade_in_clip(
    edge: Tensor | None, clip: Tensor, overlap: int, in_front: bool
) -> tuple[Tensor | None, Tensor]:
    """Join the newest clip to the waiting frames; return the frames now final and those that still wait.

    edge: waiting frames of the clip before, or None for the first clip. clip: the newest clip; `overlap` of
    its frames show the same moments as frames of the edge. in_front: the clip plays before the edge. All
    1 3 F H W. Returns the final frames (None if there are none) and the new edge. Raises ValueError if either
    clip is too short.
    """
    if edge is None:
        if overlap:
            raise ValueError(f"the first clip has no clip before it to overlap by {overlap} frames")
        return None, clip
    if min(edge.shape[2], clip.shape[2]) < overlap:
        raise ValueError(f"clips of {edge.shape[2]} and {clip.shape[2]} frames cannot overlap by {overlap}")
    earlier, later = (clip, edge) if in_front else (edge, clip)
    before, tail = earlier.tensor_split([earlier.shape[2] - overlap], dim=2)
    head, behind = later.tensor_split([overlap], dim=2)
    faded = cross_fade(tail, head) if overlap else head
    if in_front:
        # clone: a view would keep the whole clip in memory
        return torch.cat([faded, behind], dim=2), before.clone()
    return torch.cat([before, faded], dim=2), behind.clone()


@dataclass
class GrowingVideo:
    """Preview of one video. Use it through `grow_preview`, which cleans up."""

    session: Session
    path: Path
    fps: float
    needed: int | None  # bytes that decoding takes on the device, if known
    parts: Path  # hidden folder of segments; created with the first piece
    give_name: Callable[[Path, Path], None] = give_name
    tags: Mapping[str, str] = field(default_factory=dict)  # stored in the preview
    _segments: list[Segment] = field(default_factory=list)  # in playing order
    _edge: Tensor | None = None
    _grows_in_front: bool | None = None
    _count: int = 0
    _has_failed: bool = False
    _is_held: bool = False

    def add(self, piece: Piece) -> None:
        """Add a new piece to the preview.

        An error here ends the preview with a warning; the generation goes on.
        """
        if self._has_failed:
            return
        clip = None
        with self._optional():
            if self.session.dit_can_stay(self.needed):
                clip = self._decode_beside(piece)
        if clip is None and not self._has_failed:
            clip = self._decode_alone(piece)
        with self._optional():
            if clip is not None:
                final = self._take(clip, piece)
                del clip  # frees its memory while files are written
                self._write(final)

    @contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._has_failed, self._edge = True, None
            stays = f" {self.path} is not updated any more." if self.path.exists() else ""
            reason = f"{type(error).__name__}: {error}"
            logger.warning(
                "The preview of the video has failed (%s). The video is still generated.%s", reason, stays
            )

    def _decode_beside(self, piece: Piece) -> Tensor | None:
        """Decode as `_decode` does; return None if the device runs out of memory beside the DiT.

        From then on the DiT leaves the device while pieces are decoded.
        """
        try:
            return self._decode(piece)
        except RuntimeError as error:  # of torch's allocator, or of a convolution without a workspace
            if self.session.device.type == "cpu" or not is_out_of_memory(error):
                raise
            logger.info(
                "Too little memory to decode beside the transformer: it leaves the device during decoding"
            )
            self.needed = None
            return None

    def _decode_alone(self, piece: Piece) -> Tensor | None:
        """Decode as `_decode` does while the DiT is in host memory; return None if moving or decoding fails.

        If the DiT cannot be moved away it stays where it was, and only the preview ends. If it cannot be
        moved back, the error is raised: the generation needs it.
        """
        with ExitStack() as stack:
            with self._optional():
                stack.enter_context(self.session.dit_aside())
            if not self._has_failed:
                with self._optional():
                    return self._decode(piece)
        return None

    def _decode(self, piece: Piece) -> Tensor:
        """Decode a piece to pixels 1 3 F H W in host memory."""
        with self.session.media(images=False, again=True) as encoders:
            return torch.cat([chunk.to(CPU) for chunk in piece.decode(encoders, piece.latents)], dim=2)

    def _take(self, clip: Tensor, piece: Piece) -> Tensor | None:
        """Join the newest clip to the waiting frames; return the frames that are final now."""
        if self._grows_in_front not in (None, piece.in_front):
            raise ValueError("a video can grow at one end only")
        self._grows_in_front = piece.in_front
        final, self._edge = fade_in_clip(self._edge, clip, piece.overlap, piece.in_front)
        return final

    def _write(self, final: Tensor | None) -> None:
        """Encode the final frames, then publish them with the waiting ones."""
        if final is not None and final.shape[2]:
            self._segments = self._with(self._segment(final))
        segments, edge = self._segments, None
        if self._edge is not None and self._edge.shape[2]:
            edge = self._segment(self._edge)
            segments = self._with(edge)
        joined = self.parts / "joined.mp4"
        join_videos(joined, segments, self.fps, self.tags)
        if edge is not None:
            edge.path.unlink()
        self._publish(joined)

    def _publish(self, joined: Path) -> None:
        is_first = not self.path.exists()
        try:
            self.give_name(joined, self.path)
        except OutputError as error:
            if not self.path.is_file():
                raise
            if not self._is_held:  # Windows: a file that a player has open may not be replaceable
                logger.warning("%s Replacing it is tried again after each section.", error)
            self._is_held = True
        if is_first:
            logger.info("Preview: %s, updated after each section", self.path)

    def _with(self, segment: Segment) -> list[Segment]:
        return [segment, *self._segments] if self._grows_in_front else [*self._segments, segment]

    def _segment(self, pixels: Tensor) -> Segment:
        self.parts.mkdir(exist_ok=True)
        path = self.parts / f"{self._count:06d}.mp4"
        self._count += 1
        write_video(path, frames_of(pixels.split(4, dim=2)), self.fps, preset=PRESET)
        return measure_segment(path, self.fps)


def preview_path(folder: Path, stem: str) -> Path:
    """Return the path of an output's preview."""
    return folder / f"{stem}{PREVIEW_SUFFIX}"


@contextmanager
def grow_preview(
    session: Session,
    folder: Path,
    stem: str,
    fps: float,
    needed: int | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[GrowingVideo]:
    """Yield a preview for a block that generates the sections of one video with the session's DiT.

    needed: bytes that decoding takes on the device. If that much is free, the DiT stays on the device, else
    it leaves during decoding. tags: stored in the preview. Temporary files are removed at the end. The
    preview stays; its path is logged if the block fails.
    """
    parts = folder / f".{stem}_progress.{_machine()}-{os.getpid()}.parts"
    video = GrowingVideo(session, preview_path(folder, stem), fps, needed, parts, tags=tags or {})
    try:
        with name_preview_on_failure(video.path):
            yield video
    finally:
        shutil.rmtree(parts, ignore_errors=True)


@contextmanager
def name_preview_on_failure(preview: Path) -> Iterator[None]:
    """Log the preview's path if the block fails or is interrupted (Ctrl-C)."""
    try:
        yield
    except BaseException:
        if preview.exists():
            logger.warning("The part of the video made so far is kept in %s", preview)
        raise


def remove_preview(preview: Path) -> None:
    """Remove the preview of a finished video, if there is one; warn if it cannot be removed."""
    try:
        preview.unlink(missing_ok=True)
    except OSError as error:
        # Windows: a file that a player has open cannot be removed; the video itself is complete
        logger.warning(
            "%s is no longer needed and cannot be removed (%s). Remove it by hand.", preview, error.strerror
        )


def remove_parts(folder: Path) -> None:
    """Remove segments that killed runs left in an output folder; keep those of live runs."""
    with os.scandir(folder) as entries:
        for entry in entries:
            found = _PARTS.fullmatch(entry.name)
            if found is None:
                continue
            with suppress(OSError):  # another process was faster
                is_forgotten = entry.stat(follow_symlinks=False).st_mtime < time.time() - FORGOTTEN_SECONDS
                if is_forgotten or (found["machine"] == _machine() and not _runs(int(found["process"]))):
                    shutil.rmtree(entry.path, ignore_errors=True)


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _runs(process: int) -> bool:
    """Whether a process with this number runs on this machine; True on Windows, where asking would end it."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Preview of a video that is still being generated: `<stem>_progress.mp4`, updated after each section.

Each piece is decoded by itself. Frames that show the same moments as the piece before are cross-faded with
it, as in the finished video. Frames that no later piece can change are encoded once and kept in memory as an
.mp4, a few per cent of their size; only the newest piece's other frames wait as pixels.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from generation.outputs import PREVIEW_SUFFIX
from generation.session import CPU, Session
from modules.contract.steps import Piece
from modules.devices import is_out_of_memory
from modules.errors import OutputError
from modules.media.pixels import cross_fade, frames_of
from modules.media.writing import encode_segment, join_segments

logger = logging.getLogger(__name__)


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
    """Preview of one video."""

    session: Session
    path: Path
    fps: float
    needed: int | None  # bytes that decoding takes on the device, if known
    tags: Mapping[str, str] = field(default_factory=dict)  # stored in the preview
    join: Callable[..., None] = join_segments
    _segments: list[bytes] = field(default_factory=list)  # in playing order
    _edge: Tensor | None = None
    _grows_in_front: bool | None = None
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
                if self._grows_in_front not in (None, piece.in_front):
                    raise ValueError("a video can grow at one end only")
                self._grows_in_front = piece.in_front
                final, self._edge = fade_in_clip(self._edge, clip, piece.overlap, piece.in_front)
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

    def _write(self, final: Tensor | None) -> None:
        """Encode the final frames, then write them with the waiting ones."""
        self._segments = self._with(final)
        is_first = not self.path.exists()
        try:
            self.join(self.path, self._with(self._edge), self.fps, self.tags)
        except OutputError as error:
            if not self.path.is_file():
                raise
            if not self._is_held:  # Windows: a file that a player has open may not be replaceable
                logger.warning("%s Replacing it is tried again after each section.", error)
            self._is_held = True
        if is_first:
            logger.info("Preview: %s, updated after each section", self.path)

    def _with(self, pixels: Tensor | None) -> list[bytes]:
        """Return all segments with these frames at the end that grows."""
        if pixels is None or not pixels.shape[2]:
            return self._segments
        segment = encode_segment(frames_of(pixels.split(4, dim=2)), self.fps)
        return [segment, *self._segments] if self._grows_in_front else [*self._segments, segment]


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
    it leaves during decoding. tags: stored in the preview, which stays; its path is logged if the block
    fails.
    """
    video = GrowingVideo(session, folder / f"{stem}{PREVIEW_SUFFIX}", fps, needed, tags or {})
    with name_preview_on_failure(video.path):
        yield video


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

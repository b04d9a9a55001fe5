"""Show a clip while it is denoised: one file, `latent_preview.mp4` or `.png`, replaced every few steps.

It shows the clean clip predicted from a step, never the noisy one. For a video in several sections it shows
the finished sections. The generation does not depend on previews: an error only logs a warning, and latents
are bit-identical.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from blissful_tuner.options import PreviewOptions
from blissful_tuner.taehv import (
    TinyVae,
    check_taehv,
    decoding_bytes,
    enlarge,
    load_taehv,
    project,
    select_dtype,
)
from modules.errors import OptionError, OutputError
from modules.media.reading import Frame
from modules.media.writing import write_png, write_video
from protocols.data import LatentSpec
from protocols.steps import CompletedStep, Section, StepCallback

logger = logging.getLogger(__name__)


Item = TypeVar("Item")


class LatestWriter(Generic[Item]):
    """Call `write` for each item in a thread; a newer item replaces one that is still waiting.

    The first item starts the thread. `write` must not raise.

    Args:
        write: Called with one item at a time.
        pause: Seconds to pause per second spent on an item, if the thread slows down the generation itself.
    """

    def __init__(self, write: Callable[[Item], None], pause: float = 0.0) -> None:
        self._write = write
        self._pause = pause
        self._waiting: Item | None = None
        self._ending = threading.Event()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, item: Item) -> None:
        """Queue an item for the writer thread, replacing any waiting item, and return immediately."""
        with self._changed:
            self._waiting = item
            self._changed.notify()
        if self._thread is None:
            # a daemon, so that a second Ctrl-C ends the program even if a disk does not answer
            self._thread = threading.Thread(target=self._run, name="latent preview", daemon=True)
            self._thread.start()

    def close(self, drop: bool = False) -> None:
        """Write the queued preview without a pause, or drop it; then stop the thread."""
        with self._changed:
            self._ending.set()
            if drop:
                self._waiting = None
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        """Write the newest queued preview, then pause for a multiple of the time it took."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ending.is_set() or self._waiting is not None)
                item, self._waiting = self._waiting, None
            if item is None:
                return
            start = time.monotonic()
            self._write(item)
            del item  # otherwise its memory is held during the pause
            took = time.monotonic() - start
            self._ending.wait(self._pause * took)


NAME = "latent_preview"
PRESET, CRF = "ultrafast", 20  # encoder settings: speed matters more than size
# If the CPU also generates, a preview is followed by a pause of this many times its duration, so that
# previews take at most 2 % of the time
REST_ON_CPU = 50.0
CPU = torch.device("cpu")


class PendingPreview(NamedTuple):
    """A preview that has not been written yet."""

    frames: Callable[[], Iterator[Frame]]  # H W 3; may wait for the device
    fps: float
    is_image: bool


@dataclass
class LatentPreviews:
    """Latent previews of all clips in a run; each preview overwrites the previous one in the same file."""

    every: int  # number of steps or sections between previews
    folder: Path
    latent: LatentSpec
    device: torch.device
    has_room: Callable[[int | None], bool]  # whether this many bytes are free next to the network
    vae: TinyVae | None = None
    _has_warned: bool = field(default=False, init=False)
    has_ended: bool = field(default=False, init=False)  # whether an error has ended the run's previews

    def take(self, latents: Tensor, fps: float) -> PendingPreview | None:
        """Queue the device work of a preview, and return a `PendingPreview` for the work on the host.

        Args:
            latents: Latents in model space, 1 C F h w.
            fps: Frames per second of the preview.

        Returns:
            The preview to write; None if no preview is possible.
        """
        _, _, num_frames, height, width = latents.shape
        is_image = num_frames == 1
        self._check_room(height, width)
        if self.vae is not None:
            # preview with the small decoder, if there is one
            try:
                chunks = [copy_to_host(chunk) for chunk in self.vae.frames(latents[0], self.device)]
            except torch.OutOfMemoryError:
                self._stop_using_vae("the device ran out of memory")
            else:
                return PendingPreview(lambda: _copied_frames(chunks), fps, is_image)
        if not self.latent.preview_factors:
            return None
        step, rows, columns = self.latent.stride
        # without a decoder: one frame of colors for each latent frame
        colors = copy_to_host(project(latents[0], self.latent))
        return PendingPreview(lambda: enlarge(colors(), rows, columns), fps / step, is_image)

    def _check_room(self, height: int, width: int) -> None:
        """Stop using the decoder if the device may not have enough free memory for it."""
        if self.vae is None or self.device.type == "cpu":
            return
        needed = decoding_bytes(self.vae.config, select_dtype(self.device), height, width)
        if not self.has_room(needed):
            room = f"{needed / 2**20:,.0f} MiB free in addition to the transformer"
            self._stop_using_vae(f"the device may not have {room}")

    @torch.no_grad()
    def write(self, take: Callable[[], PendingPreview | None]) -> None:
        """Call `take` for the next preview, and replace the preview file with it."""
        with self.optional():
            shot = take()
            if shot is None:
                return
            if shot.is_image:
                write_png(self.folder / f"{NAME}.png", next(shot.frames()))
            else:
                path = self.folder / f"{NAME}.mp4"
                write_video(path, shot.frames(), shot.fps, crf=CRF, preset=PRESET)

    @contextmanager
    def optional(self) -> Iterator[None]:
        """Log only one warning for all errors in `with` blocks, so that previews never stop a generation.

        If a file cannot be written, the next preview tries again; any other error ends the previews.
        """
        try:
            yield
        except Exception as error:
            self.has_ended |= not isinstance(error, OutputError)
            if not self._has_warned:
                self._has_warned = True
                consequence = (
                    "There will be no more previews" if self.has_ended else "The next one will be tried"
                )
                reason = f"{type(error).__name__}: {error}"
                logger.warning(
                    "A latent preview has failed: %s\n  %s; the generation continues.", reason, consequence
                )

    def _stop_using_vae(self, why: str) -> None:
        """Make later previews without the decoder, or disable them if that is impossible; log the reason."""
        self.vae = None
        self.has_ended = not self.latent.preview_factors
        consequence = (
            "There are no more previews" if self.has_ended else "Previews are made without --preview_vae"
        )
        logger.warning("%s because %s.", consequence, why)


@contextmanager
def preview_clip(
    previews: LatentPreviews | None, fps: float, first_step: int = 0
) -> Iterator[tuple[list[StepCallback], Callable[[Section], None]]]:
    """Yield functions to call with each step and each section of a clip; end its previews with the clip.

    Args:
        previews: Where to show previews; None shows none.
        fps: Frames per second of the finished clip.
        first_step: First step that predicts a clean clip; in earlier steps guidance scales the velocity.
    """
    if previews is None:
        yield [], lambda _: None
        return
    clip = _ClipPreviews(previews, fps, first_step)
    is_finished = False
    try:
        yield [clip.watch], clip.on_section
        is_finished = True
    finally:
        clip.writer.close(drop=not is_finished)  # after an error nobody waits for a preview


class _ClipPreviews:
    """Make the previews of one clip, after its steps and its sections."""

    def __init__(self, previews: LatentPreviews, fps: float, first_step: int) -> None:
        self.previews = previews
        self.fps = fps
        self.first_step = first_step
        self.made_sections = 0
        self.is_on_cpu = previews.device.type == "cpu"
        self.writer = LatestWriter(previews.write, REST_ON_CPU if self.is_on_cpu else 0.0)

    def watch(self, done: CompletedStep) -> bool:
        """Preview the clean images predicted at a step (not audio). Return False: denoising continues."""
        if done.section.count == 1 and self.first_step <= done.step.index < done.step.num_steps - 1:
            self._show(lambda: done.image_latents, done.step.index + 1)
        return False

    def on_section(self, section: Section) -> None:
        """Show a preview of the video's finished sections before the next one is denoised."""
        if section.previous_piece is not None:
            self.made_sections += 1
            so_far = section.previous_piece.previous_latents
            self._show(lambda: so_far, self.made_sections)

    def _show(self, latents: Callable[[], Tensor], count: int) -> None:
        """Write a preview of the clip if one is due after `count` steps or sections."""
        if count % self.previews.every or self.previews.has_ended:
            return
        with self.previews.optional(), torch.no_grad():
            if self.is_on_cpu:  # the thread does all of the work, only for previews that are written
                self.writer.put(lambda: self.previews.take(latents(), self.fps))
                return
            shot = self.previews.take(latents(), self.fps)
            self.writer.put(lambda: shot)


def _copied_frames(chunks: Sequence[Callable[[], Tensor]]) -> Iterator[Frame]:
    """Yield the frames of chunks that are being copied to the host; calling a chunk waits for its copy."""
    for wait_for_chunk in chunks:
        yield from wait_for_chunk().numpy()


def copy_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the host; return a function that waits for the copy and returns it.

    The function may be called in any thread. From CUDA the copy is asynchronous, into pinned memory; for
    other devices this call waits.
    """
    if tensor.device.type != "cuda":
        copy = tensor.to(CPU)
        return lambda: copy
    copy = tensor.to(CPU, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        """Wait until the copy is complete, and return it."""
        copied.synchronize()
        return copy

    return wait


def make_previews(
    options: PreviewOptions,
    latent: LatentSpec,
    folder: Path,
    device: torch.device,
    has_room: Callable[[int | None], bool],
) -> LatentPreviews | None:
    """Return the object that saves previews during denoising; None without --preview_latent_every.

    Args:
        options: Options of previews.
        latent: Latent space of the family.
        folder: Folder for the previews.
        device: Device of the run.
        has_room: Returns whether this many bytes of the device are free next to the network.

    Raises:
        UserError: If the latents cannot be previewed without a decoder, or the decoder is for other latents.
    """
    if options.preview_latent_every is None:
        return None
    vae = None if options.preview_vae is None else load_taehv(options.preview_vae, latent, device)
    return LatentPreviews(
        options.preview_latent_every, folder, latent, device=device, has_room=has_room, vae=vae
    )


def check_preview(options: PreviewOptions, latent: LatentSpec) -> None:
    """Check that the family's latents can be previewed, without loading weights.

    Raises:
        OptionError: If the family has no latent-to-RGB projection and no decoder is given.
        CheckpointError: If the decoder is for other latents.
    """
    if options.preview_latent_every is None:
        return
    if options.preview_vae is not None:
        check_taehv(options.preview_vae, latent)
    elif not latent.preview_factors:
        raise OptionError(
            f"--preview_latent_every {options.preview_latent_every}: there is no map from this model's "
            f"latents to colors (they have {latent.channels} channels). Omit it, or pass --preview_vae"
        )

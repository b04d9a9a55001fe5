"""Show the progress of a run: boxes at its start and end, log lines, and a growing preview of the video.

The preview of a video in sections is `<stem>_progress.mp4`, updated after each section. Each piece is decoded
on its own and cross-faded with the previous piece where they overlap, as in the finished video. Final frames
are encoded once and kept in memory as an .mp4, a few percent of their size; only frames that the next piece
may change are kept as pixels.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from generation.experts import experts_by_step
from generation.loaded_networks import CPU, Session
from modules.console import Row, format_count, format_duration, format_size, show_box
from modules.devices import format_peak_memory, is_out_of_memory
from modules.errors import OutputError
from modules.media.pixels import cross_fade, iterate_frames
from modules.media.writing import encode_segment, join_segments
from protocols.family import Family
from protocols.requests import Prepared
from protocols.steps import PreviewPiece

logger = logging.getLogger(__name__)

PROMPT_LENGTH = 100  # characters of a prompt in a line
NAMING = ("model_type", "task", "sd_model_name")  # keys of a family's metadata that name the model to users
FLOAT_BYTES = 4  # latent files are float32


def shorten_prompt(prompt: str, length: int = PROMPT_LENGTH) -> str:
    """Return a prompt as a single line, cut to `length` characters."""
    line = " ".join(prompt.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def size_in_words(prepared: Prepared, has_layers: bool = False) -> str:
    """Describe the size of a request's result for people.

    Args:
        prepared: The request with all values resolved.
        has_layers: Whether the frames are an image and its layers instead of a clip.
    """
    unit = "images" if has_layers else "frames"
    frames = f"{prepared.frames} {unit}, " if prepared.frames > 1 else ""
    size = f"{prepared.width} x {prepared.height} (width x height), {frames}"
    if prepared.is_audio_alone:
        size = f"{prepared.frames / prepared.fps:.2f} s of sound, "
    return f"{size}{format_count(prepared.num_steps, 'step')}, seed {prepared.seed}"


def show_start(
    family: Family,
    requests: Sequence[Prepared],
    loras: Mapping[str, Sequence[tuple[str, float]]],
    folder: Path,
    device: torch.device,
) -> None:
    """Log a box that describes the generation: model, LoRAs, prompt, sizes and folder.

    Args:
        family: The model family.
        requests: Requests of the run.
        loras: Names and strengths by expert; "" for LoRAs of all experts.
        folder: Folder of the files.
        device: Device of the run.
    """
    first = requests[0]
    is_single = len(requests) == 1
    has_names = any(expert.name for expert in family.experts)
    latents_size = format_size(sum(_measure_latents(family, request) for request in requests))
    free = format_size(shutil.disk_usage(folder).free)
    lora_lines = []
    for expert, files in loras.items():
        purpose = f", for {expert.replace('_', ' ')}" if expert else ""
        lora_lines += [f"{name}, strength {strength:g}{purpose}" for name, strength in files]
    origin = None
    if is_single and first.request.source is not None:
        steps = format_count(first.steps, "step")
        origin = f"{first.request.source.path}, the last {first.num_steps} of {steps}"
    model_names = filter(None, map(family.metadata.get, NAMING))
    box: list[Row] = [
        ("model", ", ".join(model_names)),
        ("experts", "\n".join(experts_in_words(family)) if has_names else None),
        ("LoRAs", "\n".join(lora_lines)),
        _describe_results(requests, family.latent.has_layers),
        ("turns", turns_in_words(family, first) if has_names else None),
        ("prompt", shorten_prompt(first.request.prompt, 3 * PROMPT_LENGTH) if is_single else None),
        ("from", origin),
        ("device", str(device)),
        ("disk", f"latents {latents_size}; {free} free"),
        ("folder", str(folder)),
    ]
    show_box("Generating", box)


def _measure_latents(family: Family, prepared: Prepared) -> int:
    """Return the size of a request's latent file in bytes, including audio."""
    if prepared.audio_video_shapes is None:
        num_values = prod(family.latent.shape(prepared.frames, prepared.height, prepared.width))
    else:
        num_values = prod(prepared.audio_video_shapes.image) + prod(prepared.audio_video_shapes.audio)
    return FLOAT_BYTES * num_values


def _describe_results(requests: Sequence[Prepared], has_layers: bool) -> Row:
    """Return a log row with the kind of the results, such as `clip`, and their size."""
    first = requests[0]
    size = size_in_words(first, has_layers)
    if len(requests) == 1:
        if first.is_audio_alone:
            return "sound", size
        return "clip" if first.frames > 1 and not has_layers else "image", size
    are_images = all(request.frames == 1 and not request.is_audio_alone for request in requests)
    return "images" if are_images or has_layers else "clips", f"{len(requests)}; the first: {size}"


def experts_in_words(family: Family) -> list[str]:
    """Return a log line for each named expert, with its file and its range of timesteps."""
    experts = family.experts
    lines = []
    for expert, file in zip(experts, family.dit_files, strict=False):
        if not expert.name:
            continue
        higher_timesteps = [
            higher.min_timestep for higher in experts if higher.min_timestep > expert.min_timestep
        ]
        upper = f" below timestep {min(higher_timesteps):g}" if higher_timesteps else ""
        lower = f" from timestep {expert.min_timestep:g} on" if expert.min_timestep else ""
        joiner = " and" if lower and upper else ""
        lines.append(f"{expert.name.replace('_', ' ')}: {file.name}{lower}{joiner}{upper}")
    return lines


def turns_in_words(family: Family, prepared: Prepared) -> str:
    """Describe how a request is denoised: solver, shift, and the steps of each expert in order."""
    runs = [
        (family.experts[expert], len([*run])) for expert, run in groupby(experts_by_step(family, prepared))
    ]
    shares = ", ".join(f"{count} by the {expert.description}" for expert, count in runs)
    start = "" if prepared.num_steps == prepared.steps else f", the last {prepared.num_steps} of them"
    steps = format_count(prepared.steps, "step")
    return f"{prepared.solver} grid, shift {prepared.flow_shift:g}, {steps}{start}: {shares}"


def show_end(paths: Sequence[Path], seconds: float, device: torch.device, failed: int = 0) -> None:
    """Log a run's results, time and peak memory; a single result is logged with its path."""
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path])]
    size = format_size(sum(file.stat().st_size for file in files))
    rows: list[Row] = [
        ("result", f"{paths[0]} ({size})" if len(paths) == 1 else None),
        ("results", f"{len(paths)} in {paths[0].parent} ({size})" if len(paths) > 1 else None),
        ("failed", str(failed) if failed else None),
        ("time", format_duration(seconds)),
        ("peak memory", format_peak_memory(device)),
    ]
    show_box("Generation is finished", rows)


def log_job_progress(label: str, requests: Sequence[Prepared], begun: int, seconds: float) -> None:
    """Log which of several requests is next, such as "3 of 40, about 2 h left".

    Args:
        label: Label of the request.
        requests: Requests of the run.
        begun: Number of requests before this one.
        seconds: Duration of the earlier requests.
    """
    work_done = sum(map(measure_work, requests[:begun]))
    work_left = sum(map(measure_work, requests[begun:]))
    remaining = f", about {format_duration(seconds * work_left / work_done)} left" if work_done else ""
    position = f"{begun + 1} of {len(requests)}{remaining}"
    prompt = shorten_prompt(requests[begun].request.prompt)
    logger.info("%s (%s): %s: %s", position, label, size_in_words(requests[begun]), prompt)


def measure_work(prepared: Prepared) -> float:
    """Return a request's amount of work for time estimates: number of steps times pixels."""
    return prepared.num_steps * prepared.width * prepared.height * prepared.frames


def fade_in_clip(
    edge: Tensor | None, clip: Tensor, overlap: int, is_prepended: bool
) -> tuple[Tensor | None, Tensor]:
    """Blend the newest clip into the waiting frames; all are 1 3 F H W.

    Args:
        edge: Waiting frames of the previous clip; None for the first clip.
        clip: The newest clip, whose first or last `overlap` frames show the same moments as the edge.
        overlap: Number of frames that both show.
        is_prepended: Whether the clip plays before the edge.

    Returns:
        The frames that are final now (None if there are none), and those that still wait.

    Raises:
        ValueError: If either clip is too short.
    """
    if edge is None:
        if overlap:
            raise ValueError(f"the first clip has no clip before it to overlap by {overlap} frames")
        return None, clip
    if min(edge.shape[2], clip.shape[2]) < overlap:
        raise ValueError(f"clips of {edge.shape[2]} and {clip.shape[2]} frames cannot overlap by {overlap}")
    earlier, later = (clip, edge) if is_prepended else (edge, clip)
    before, tail = earlier.tensor_split([earlier.shape[2] - overlap], dim=2)
    head, behind = later.tensor_split([overlap], dim=2)
    faded = cross_fade(tail, head) if overlap else head
    if is_prepended:
        # clone: a view would keep the whole clip in memory
        return torch.cat([faded, behind], dim=2), before.clone()
    return torch.cat([before, faded], dim=2), behind.clone()


@dataclass
class GrowingVideo:
    """Preview of a video that grows with each generated section."""

    session: Session
    path: Path
    fps: float
    # device memory for decoding in bytes: if so much is free, the DiT stays on the device; None: unknown
    needed_bytes: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)  # stored in the preview
    join: Callable[..., None] = join_segments
    _segments: list[bytes] = field(default_factory=list)  # in playing order
    _edge: Tensor | None = None  # frames at the growing end, which the next piece may still change
    _grows_in_front: bool | None = None
    _has_failed: bool = False
    _is_locked: bool = False

    def add(self, piece: PreviewPiece) -> None:
        """Decode a new piece of the video and append it to the preview.

        If device memory is too small, the DiT is moved to host memory while the piece is decoded. An error
        ends the preview with a warning, and the generation continues. If the DiT cannot be moved back, the
        error is raised.
        """
        if self._has_failed:
            return
        clip = None
        with self._end_preview_on_error():
            if self.session.dits.can_stay(self.needed_bytes):
                clip = self._decode_next_to_dit(piece)
        if clip is None and not self._has_failed:
            clip = self._decode_without_dit(piece)
        with self._end_preview_on_error():
            if clip is not None:
                if self._grows_in_front not in (None, piece.is_prepended):
                    raise ValueError("a video can grow at one end only")
                self._grows_in_front = piece.is_prepended
                final, self._edge = fade_in_clip(self._edge, clip, piece.overlap, piece.is_prepended)
                del clip  # frees its memory while files are written
                self._write(final)

    def _decode_next_to_dit(self, piece: PreviewPiece) -> Tensor | None:
        """Decode a preview piece with the DiT still on the device; return None if memory is too small."""
        try:
            return self._decode(piece)
        except RuntimeError as error:  # of torch's allocator, or of a convolution without a workspace
            if self.session.device.type == "cpu" or not is_out_of_memory(error):
                raise
            logger.info(
                "Too little memory to decode next to the transformer: it leaves the device during decoding"
            )
            self.needed_bytes = None  # from now on, the DiT leaves the device before decoding
            return None

    def _decode_without_dit(self, piece: PreviewPiece) -> Tensor | None:
        """Move the DiT to host memory and decode a piece of the preview; return None if that fails."""
        clip = None
        with ExitStack() as stack:
            with self._end_preview_on_error():  # if the DiT cannot be moved away, it stays where it was
                stack.enter_context(self.session.dits.moved_to_host())
            if not self._has_failed:
                with self._end_preview_on_error():
                    clip = self._decode(piece)
        return clip

    @contextmanager
    def _end_preview_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._has_failed = True
            self._edge = None
            stays = f" {self.path} is no longer updated." if self.path.exists() else ""
            reason = f"{type(error).__name__}: {error}"
            logger.warning(
                "The preview of the video has failed (%s). The video is still generated.%s", reason, stays
            )

    def _decode(self, piece: PreviewPiece) -> Tensor:
        """Decode a piece of latents to pixels, 1 3 F H W, in host memory."""
        with self.session.media(with_image_encoder=False, needed_again=True) as encoders:
            return torch.cat([chunk.to(CPU) for chunk in piece.decode(encoders, piece.latents)], dim=2)

    def _write(self, final: Tensor | None) -> None:
        """Encode a section's final frames, and write the preview with them and the frames not yet final."""
        self._segments = self._add_segment(final)
        is_first = not self.path.exists()
        try:
            self.join(self.path, self._add_segment(self._edge), self.fps, self.tags)
        except OutputError as error:
            if not self.path.is_file():
                raise
            if not self._is_locked:  # Windows: a file that a player has open may not be replaceable
                logger.warning("%s It is retried after each section.", error)
            self._is_locked = True
        if is_first:
            logger.info("Preview: %s, updated after each section", self.path)

    def _add_segment(self, pixels: Tensor | None) -> list[bytes]:
        """Encode pixels as a video segment, add it to the growing preview, and return all segments."""
        if pixels is None or not pixels.shape[2]:
            return self._segments
        segment = encode_segment(iterate_frames(pixels.split(4, dim=2)), self.fps)
        return [segment, *self._segments] if self._grows_in_front else [*self._segments, segment]


@contextmanager
def name_preview_on_failure(preview: Path | None) -> Iterator[None]:
    """Log the path of the preview video if the `with` block fails or is interrupted (Ctrl-C)."""
    try:
        yield
    except BaseException:
        if preview is not None and preview.exists():
            logger.warning("The part of the video made so far is kept in %s", preview)
        raise


def remove_preview(preview: Path) -> None:
    """Delete the preview of a finished video, if there is one; warn if it cannot be deleted."""
    try:
        preview.unlink(missing_ok=True)
    except OSError as error:
        # Windows: a file that a player has open cannot be removed; the video itself is complete
        logger.warning(
            "%s is no longer needed and cannot be removed (%s). Remove it by hand.", preview, error.strerror
        )

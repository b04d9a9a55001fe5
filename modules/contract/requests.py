"""Check a request and fill in its defaults, as every family does before anything is loaded."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from modules.contract.family import LatentSpec, SamplingDefaults
from modules.contract.generation import Request
from modules.errors import OptionError

logger = logging.getLogger(__name__)

MOST_PIXELS = 1 << 34  # made at once: 2000 frames of 4K, whose latents alone take 4 GiB


def filled(request: Request, usual: SamplingDefaults) -> Request:
    """Return the request with defaults for all that it leaves out.

    The embedded guidance is dropped if the model has no input for it.
    """
    return replace(
        request,
        width=request.width or usual.width,
        height=request.height or usual.height,
        frames=request.frames or usual.frames,
        steps=request.steps or usual.steps,
        guidance_scale=usual.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        embedded_guidance=usual.embedded_guidance
        if request.embedded_guidance is None or usual.embedded_guidance is None
        else request.embedded_guidance,
        flow_shift=usual.flow_shift if request.flow_shift is None else request.flow_shift,
        solver=request.solver or usual.solver,
        fps=request.fps or usual.fps,
    )


def with_media(request: Request, taken: Mapping[str, bool], why_not: str) -> Request:
    """Return the request without media that cannot be used, and warn about those.

    taken: by name of the field, `image_path`. why_not: "--task t2v-1.3B does not take it".
    Raises OptionError if a file or folder that is taken does not exist.
    """
    for name, is_taken in taken.items():
        path = getattr(request, name)
        if path is None:
            continue
        if not is_taken:
            logger.warning("--%s %s is ignored because %s", name, path, why_not)
            dropped: dict[str, Any] = {name: None}
            request = replace(request, **dropped)
        elif not path.exists():
            raise OptionError(f"--{name} {path}: no such file or folder")
    return request


def check_size(request: Request, latent: LatentSpec, at_once: int | None = None) -> None:
    """Raise OptionError if the model cannot make the size, naming the nearest one that it can.

    at_once: how many frames are denoised together, if not all.
    """
    width, height, frames = request.size
    frames, step = frames if at_once is None else min(frames, at_once), latent.pixel_step
    if width * height * frames > MOST_PIXELS:
        raise OptionError(
            f"--video_size {height} {width}: {frames} such frames at once are "
            f"{width * height * frames / 1e9:.0f} thousand "
            f"million pixels, {MOST_PIXELS / 1e9:.0f} are the most. Lower it, or the length of the video."
        )
    if width % step or height % step or min(width, height) < step:
        nearest = [max(step, round(side / step) * step) for side in (height, width)]
        raise OptionError(
            f"--video_size {height} {width} (height width): both must be multiples of {step}. Nearest: "
            f"{nearest[0]} {nearest[1]}"
        )


def whole_frames(frames: int, latent: LatentSpec) -> int:
    """Return the next lower number of frames that the model can make; warn if that differs."""
    step = latent.frame_step
    whole = (frames - 1) // step * step + 1
    if whole != frames:
        logger.warning(
            "--video_length %d is changed to %d: the model works in steps of %d frames after the first",
            frames,
            whole,
            step,
        )
    return whole


def with_negative(request: Request, is_empty: bool) -> Request:
    """Return the request with a negative prompt, or without guidance.

    is_empty: a missing negative prompt becomes the empty text, as when --negative_prompt is left out;
    otherwise guidance is dropped with a warning, as in training samples.
    """
    if request.negative_prompt is not None:
        return request
    if is_empty:
        return replace(request, negative_prompt="")
    if request.guidance_scale != 1:
        logger.warning(
            "the guidance scale of %r is ignored because it has no negative prompt (--n)", request.prompt
        )
        return replace(request, guidance_scale=1.0)
    return request

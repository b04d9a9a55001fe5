"""Video-to-video: start denoising from noisy latents of a video, at a later step of the schedule.

Image-to-image is the same with one frame; saved latents can be the start too. Families encode, and state in
`SourceRules` which sources they support and how frames are scaled; everything else is here.
Source: Meng et al. 2021, arXiv 2108.01073.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from checkpoints.model_files import SavedLatents, load_latents
from modules.errors import CheckpointError, MediaError, OptionError
from modules.flow.schedule import TRAIN_TIMESTEPS, make_schedule
from modules.paths import explain_missing
from protocols.data import LatentSpec, MediaEncoders
from protocols.family import Family
from protocols.inputs import IMAGE, LATENTS, VIDEO
from protocols.requests import Prepared, Request, check_opens, count_frames_up_to
from protocols.rules import RequestSource, SourceRules

logger = logging.getLogger(__name__)

# a larger change of the aspect ratio, as a factor, is visible: it is logged as a warning
MAX_UNSEEN_STRETCHING = 1.05


# --- before anything is loaded
# ------------------------------------------------------------------------------------------------------------


def check_source(request: Request, source: RequestSource, rules: SourceRules, latent: LatentSpec) -> Request:
    """Check a request's source (video, image or latents to start from), and fill in the number of frames.

    Reads only headers, and one frame of a video.

    Raises:
        OptionError: If the source does not exist or the family does not support it.
        MediaError: If an image or video cannot be read.
        CheckpointError: If saved latents cannot be read.
    """
    option_text = _name_source(source)
    if source.option not in rules.supported_options:
        options = " or ".join(f"--{option}" for option in rules.supported_options)
        raise OptionError(f"{option_text}: {rules.model_label} does not take it. Use {options}")
    if not source.path.exists():
        raise OptionError(f"{option_text}: no such file or folder.{explain_missing(source.path)}")
    if source.option == LATENTS:
        saved = _load_saved_latents(source, rules, latent, only_shape=True)
        if request.frames is not None:
            return request
        return replace(request, frames=latent.count_frames(saved.shape[2]))
    is_image = source.option == IMAGE
    check_opens(source.option, source.path, is_image)
    if not is_image:
        return request
    if request.frames not in (None, 1):
        raise OptionError(
            f"{option_text} and --video_length {request.frames}: the result of an image is a single image. "
            "Pass --video_length 1, or a video to --video_path"
        )
    return replace(request, frames=1)


def start_from_source(prepared: Prepared, source: RequestSource, family: Family) -> Prepared:
    """Check the length of a request's source, and set the step at which its denoising starts.

    Raises:
        MediaError: If a video has too few frames.
        OptionError: If saved latents have a different number of frames, or if the request generates audio,
            which has to start from noise.
    """
    if prepared.audio_video_shapes is not None:
        raise OptionError(
            f"{_name_source(source)}: a video that is generated with its audio starts from noise. Generate "
            f"it without audio, or omit --{source.option}"
        )
    if source.option == LATENTS:
        _check_latent_frames(prepared, source, family)
    elif source.option == VIDEO:
        num_frames = count_frames_up_to(source.path, prepared.frames)
        if num_frames < prepared.frames and source.pad_mode is None:
            raise _make_length_error(source, num_frames, prepared.frames)
    if source.needs_vae and family.source.stretch_frames:
        _warn_of_stretching(prepared, source, family.latent)
    timesteps: Sequence[float] = prepared.timesteps
    if not timesteps:
        # the family's own levels are known only as a schedule
        schedule = make_schedule(
            prepared.solver,
            prepared.steps,
            prepared.flow_shift,
            table=family.noise.table,
            levels=prepared.sigmas,
        )
        timesteps = schedule.timesteps.tolist()
    return replace(prepared, first_step=first_step(source, timesteps, prepared.steps))


def _check_latent_frames(prepared: Prepared, source: RequestSource, family: Family) -> None:
    """Raise OptionError if saved latents have a different number of latent frames than the request."""
    num_frames = _load_saved_latents(source, family.source, family.latent, only_shape=True).shape[2]
    needed = family.latent.shape(prepared.frames, prepared.height, prepared.width)[2]
    if num_frames != needed:
        raise OptionError(
            f"{_name_source(source)}: it has {num_frames} latent frames, the video asked for has {needed} "
            f"({prepared.frames} frames). Ask for the length that the file was made with: "
            f"{family.latent.count_frames(num_frames)} frames"
        )


def _warn_of_stretching(prepared: Prepared, source: RequestSource, latent: LatentSpec) -> None:
    """Warn if the source image or video is stretched visibly; suggest a size with its aspect ratio."""
    from modules.media import reading  # only with a source file

    if source.option == IMAGE:
        width, height = reading.image_size(source.path)
    else:
        info = reading.video_info(source.path)
        width, height = info.width, info.height
    stretching = prepared.width * height / (prepared.height * width)
    if max(stretching, 1 / stretching) <= MAX_UNSEEN_STRETCHING:
        return
    # suggest a size with the source's aspect ratio and about the requested area
    step = latent.pixel_step
    factor = (prepared.width * prepared.height / (width * height)) ** 0.5
    logger.warning(
        "--%s %s of %d x %d is stretched to %d x %d (width x height): --video_size %d %d would keep "
        "its proportions",
        source.option,
        source.path,
        width,
        height,
        prepared.width,
        prepared.height,
        max(step, round(height * factor / step) * step),
        max(step, round(width * factor / step) * step),
    )


def first_step(source: RequestSource, timesteps: Sequence[float], steps: int) -> int:
    """Return the index of the first denoising step for a source that is only partly noised.

    The mode "traditional" runs the last fraction `denoise` of all steps, at least one. The mode "direct"
    starts at the step whose noise level is closest to `denoise`; the first of equally close steps.

    Args:
        source: The source of the request.
        timesteps: Timesteps of the steps.
        steps: Number of steps.
    """
    if source.noise_mode == "direct":
        # rounded, because float32 gaps of equal size differ slightly
        levels = [timestep / TRAIN_TIMESTEPS for timestep in timesteps]
        gaps = [round(abs(level - source.denoise), 6) for level in levels]
        return gaps.index(min(gaps))
    return steps - min(max(int(steps * source.denoise), 1), steps)


def _make_length_error(source: RequestSource, num_frames: int, needed: int) -> MediaError:
    """Return the exception for a source video that is too short."""
    return MediaError(
        f"{_name_source(source)}: it has {num_frames} frames, but {needed} are needed. Lower the length, "
        "use a longer video, or repeat its last frame with --v2v_pad_mode end."
    )


def _name_source(source: RequestSource) -> str:
    """Return a source's option and path, for messages."""
    return f"--{source.option} {source.path}"


# --- clean latents
# ------------------------------------------------------------------------------------------------------------


def encode_source(family: Family, encoders: MediaEncoders, prepared: Prepared) -> Tensor:
    """Return the clean latents of a request's source: 1 C F h w in model space, on the CPU.

    Args:
        family: The model family.
        encoders: Media encoders on their device; unused if the source is latents.
        prepared: The request with all values resolved.

    Raises:
        MediaError: If a video is too short.
    """
    source = prepared.request.source
    assert source is not None
    shape = family.latent.shape(prepared.frames, prepared.height, prepared.width)
    if source.option == LATENTS:
        saved = _load_saved_latents(source, family.source, family.latent)
        return _resize_latents(saved, shape[-2], shape[-1])
    frames = _read_frames(source, prepared, family.source.stretch_frames, alpha=family.latent.has_alpha)
    if source.pad_mode is None and len(frames) < prepared.frames:
        raise _make_length_error(source, len(frames), prepared.frames)
    num_frames = family.latent.lengths.fit(len(frames))  # the longest length that the VAE encodes
    latents = family.encode_source(encoders, frames[None, :num_frames], prepared.seed).float().cpu()
    # a longer clip is trimmed, a shorter one repeats latents
    return trim_or_pad_frames(latents, shape[2], source.pad_mode or "end")


def _resize_latents(latents: Tensor, height: int, width: int) -> Tensor:
    """Resize latents B C F h w to the given size; return them unchanged if they already have it."""
    if latents.shape[-2:] == (height, width):
        return latents
    frames = rearrange(latents.float(), "b c f h w -> (b f) c h w")
    scaled = interpolate(frames, size=(height, width), mode="bicubic", align_corners=False)
    return rearrange(scaled, "(b f) c h w -> b c f h w", b=len(latents))


def _read_frames(source: RequestSource, prepared: Prepared, stretches: bool, alpha: bool) -> Tensor:
    """Read the frames of a source, F H W 3 uint8, at the request's size."""
    # At most as many as the request has.
    # alpha: Whether the alpha channel of an image is read too: 1 H W 4.
    from modules.media import reading  # only with a source file

    size = prepared.width, prepared.height
    resize = reading.resize_stretched if stretches else reading.resize_cover
    if source.option == IMAGE:
        source_frames: Iterable[reading.Frame] = [reading.read_image(source.path, alpha)]
    else:
        source_frames = reading.video_frames(source.path)
    sizes = reading.FrameSizes()  # notes whether the size changes within the video
    measured_frames = sizes.watch(islice(source_frames, prepared.frames))
    frames = torch.from_numpy(numpy.stack([resize(frame, size) for frame in measured_frames]))
    if sizes.change is not None:
        logger.warning(
            "--%s %s changes its size (%s): all frames are resized to %dx%d.",
            source.option,
            source.path,
            sizes.change,
            prepared.width,
            prepared.height,
        )
    return frames


def trim_or_pad_frames(latents: Tensor, frames: int, pad_mode: str) -> Tensor:
    """Trim or pad latents to a number of latent frames.

    Args:
        latents: Latents, B C F h w.
        frames: Number of latent frames.
        pad_mode: "front" repeats the first latent frame at the start, "end" the last one at the end.
    """
    missing = frames - latents.shape[2]
    if missing <= 0:
        return latents[:, :, :frames]
    if pad_mode == "front":
        copies = latents[:, :, :1].repeat_interleave(missing, dim=2)
        return torch.cat([copies, latents], dim=2)
    copies = latents[:, :, -1:].repeat_interleave(missing, dim=2)
    return torch.cat([latents, copies], dim=2)


def check_latent_space(saved: SavedLatents, rules: SourceRules, path: Path, start: str, remedy: str) -> None:
    """Raise CheckpointError if latents come from a model with a different latent space.

    Latents of other programs do not name their model and are accepted.

    Args:
        saved: The latents with their metadata.
        rules: The family's rules for videos and latents to start from.
        path: Path of the file.
        start: Start of the message.
        remedy: End of the message.
    """
    model = saved.metadata.get("bt_model_type")
    if model is not None and model not in rules.compatible_models:  # only our files record it
        error = (
            f"the latents were made by {model}, whose latent space differs from that of {rules.model_label}"
        )
        raise CheckpointError(f"{start}: {error}. {remedy}", path)


def _load_saved_latents(
    source: RequestSource, rules: SourceRules, latent: LatentSpec, only_shape: bool = False
) -> Tensor:
    """Return saved latents, 1 C F h w, after checks that they fit the model."""
    saved = load_latents(source.path, f"--{source.option}", only_shape)
    remedy = "Decode them with that model's script, and pass the video to --video_path"
    check_latent_space(saved, rules, source.path, _name_source(source), remedy)
    if saved.latents.shape[1] != latent.channels:
        raise CheckpointError(
            f"{_name_source(source)}: the latents have {saved.latents.shape[1]} channels, but "
            f"{rules.model_label} has {latent.channels}",
            source.path,
        )
    return saved.latents

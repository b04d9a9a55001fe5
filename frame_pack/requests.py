"""Resolve a request for FramePack before anything is loaded: sections with texts and images, or one image.

`Request.extra` holds as text what only this family knows: `image_path` (as `frame_pack.options` reads it),
`one_frame` (as `parse_one_frame` reads it), `video_sections`, `video_seconds` and `control_image_mask_path`
(a path a line). It is parsed here, once, into a `FramePackRequest`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from frame_pack.options import FRAMES_PER_SECOND, MAX_SECTIONS, parse_section_texts
from frame_pack.sections import (
    LATENT_STRIDE,
    compute_flow_shift,
    count_sections,
    count_tokens,
    count_window_sections,
    select_entry,
    video_frames,
)
from modules.errors import OptionError
from modules.media.buckets import bucket_sizes, select_bucket
from modules.option_values import require, to_path
from modules.paths import explain_missing
from protocols import requests
from protocols.data import LatentSpec, SamplingDefaults
from protocols.one_frame import OneFrame, parse_one_frame

logger = logging.getLogger(__name__)

SOLVER = "unipc-bh1"
_NEEDS_IMAGE = "FramePack starts from an image, also for a single image (--i in a line of prompts)"


@dataclass(frozen=True)
class FramePackRequest:
    """FramePack's own settings of a request, stored in `Prepared.family_settings`."""

    images: tuple[Path, ...]  # the start image of each section, in playing order
    one_frame: OneFrame | None = None  # a single image, which has one section; None: a video
    controls: tuple[Path, ...] = ()  # control images of a single image
    masks: tuple[Path, ...] = ()  # masks of the first control images


def prepare_request(
    request: requests.Request,
    defaults: SamplingDefaults,
    latent: LatentSpec,
    window: int,
    is_f1: bool,
    matches_control_shape: bool = False,
) -> requests.Prepared:
    """Resolve a request for a video of sections, or a single image, and check its images.

    1. Drop media and settings without an effect, with a warning.
    2. Compute the number of sections, the size and the flow shift.
    3. Assign images and prompts to sections, and record the metadata.

    Args:
        request: The request.
        defaults: Defaults of the family.
        latent: Latent space of the model.
        window: Latent frames of a section.
        is_f1: Whether sections are generated in playing order.
        matches_control_shape: Give a single image the aspect ratio of its first control image, else of its
            start image (--one_frame_auto_resize).

    Raises:
        OptionError: For invalid settings.
    """
    one_frame = _read_one_frame(request, is_f1)
    is_one_frame = one_frame is not None
    request = _drop_unusable_media(request, is_f1, is_one_frame)
    sections = _count_sections(request, defaults, window, is_one_frame)
    width, height, _ = requests.get_size(request, defaults)
    frames = 1 if is_one_frame else video_frames(sections, window)
    # one section is denoised at a time, so the length of the whole video is not limited
    requests.check_size((width, height, min(frames, video_frames(1, window))), latent)
    request = _keep_used_controls(request)
    settings = FramePackRequest(
        _list_images(request, sections, is_one_frame),
        one_frame,
        request.control_images,
        _read_paths(request.extra, "control_image_mask_path"),
    )
    if matches_control_shape:
        width, height = _match_control_shape(settings, width, height, latent.pixel_step)
    flow_shift = request.flow_shift
    if flow_shift is None:
        flow_shift = _default_flow_shift(latent, width, height, 1 if is_one_frame else window)
    prepared = requests.resolve_request(
        request, defaults, (width, height, frames), flow_shift, default_negative=""
    )
    prompts = {}
    for index, prompt in enumerate(_read_prompts(request, sections, is_one_frame)):
        prompts[index] = replace(prepared.prompts[0], positive=prompt)
    metadata = _make_metadata(request.extra, sections, None if is_one_frame else frames)
    metadata |= {"latent_window_size": str(window), "f1": str(is_f1)}
    return replace(
        prepared,
        solver=SOLVER if prepared.solver == "unipc" else prepared.solver,  # the released one is its own unipc
        prompts=prompts,
        family_settings=settings,
        extra_metadata=metadata,
    )


def _default_flow_shift(latent: LatentSpec, width: int, height: int, num_latent_frames: int) -> float:
    """Return the released flow shift, which depends on the number of tokens that are denoised together."""
    *_, rows, columns = latent.shape(1, height, width)
    return compute_flow_shift(count_tokens(num_latent_frames, rows, columns))


def _make_metadata(extra: Mapping[str, str], sections: int, frames: int | None) -> dict[str, str]:
    """Return the typed options and the length, as metadata of the result; `frames` are None for an image."""
    metadata = {name: value for name, value in extra.items() if name != "video_seconds"}
    metadata["video_sections"] = str(sections)
    # rounded to whole sections, in seconds at 30 frames per second as in the option, regardless of --fps
    if frames is not None:
        metadata["video_seconds"] = f"{frames / FRAMES_PER_SECOND:g}"
    return metadata


def _read_one_frame(request: requests.Request, is_f1: bool) -> OneFrame | None:
    """Parse --one_frame_inference; return None if it is not given. Raise OptionError if --f1 is given too."""
    typed_settings = request.extra.get("one_frame")
    if typed_settings is None:
        return None
    one_frame = parse_one_frame(typed_settings)
    if is_f1:
        raise OptionError(
            "--one_frame_inference needs the FramePack model: omit --f1 and pass that model to --dit."
        )
    return one_frame


def _match_control_shape(settings: FramePackRequest, width: int, height: int, step: int) -> tuple[int, int]:
    """Return a single image's width and height, as a dataset of this resolution has for its first input."""
    # That input is the first control image, else the start image. A video keeps its size, with a warning.
    if settings.one_frame is None:
        logger.warning("--one_frame_auto_resize is ignored because a video is generated")
        return width, height
    from modules.media.reading import image_size  # only for single images

    first_image, *_ = (*settings.controls, *settings.images)
    buckets = bucket_sizes(width, height, step)
    return select_bucket(image_size(first_image), buckets, width * height, step, no_upscale=False)


def warn_about_unused_paddings(paddings: Sequence[int], settings: FramePackRequest) -> None:
    """Warn if --latent_paddings has values that no section uses."""
    typed = ",".join(map(str, paddings))
    sections = len(settings.images)
    if paddings and settings.one_frame is not None:
        logger.warning("--latent_paddings %s is ignored because a single image is generated", typed)
    elif len(paddings) > sections:
        logger.warning(
            "--latent_paddings %s: only the first %d count, as there are no more sections; that played first "
            "has distance %d",
            typed,
            sections,
            paddings[sections - 1],
        )


def _read_prompts(request: requests.Request, sections: int, is_one_frame: bool) -> list[requests.Prompt]:
    """Return each section's prompt, in playing order; --prompt_2 adds a separate text for CLIP."""
    texts = _split_by_section(request.prompt, "--prompt", sections, is_one_frame)
    if request.second_prompt is None:
        return [requests.Prompt(text) for text in texts]
    second = _split_by_section(request.second_prompt, "--prompt_2", sections, is_one_frame)
    return [requests.Prompt(text, prompt_2=for_clip) for text, for_clip in zip(texts, second, strict=True)]


def _drop_unusable_media(request: requests.Request, is_f1: bool, is_one_frame: bool) -> requests.Request:
    """Return the request without media that FramePack cannot use; warn about each of them."""
    reason = "--f1 generates a video from its start" if is_f1 else "a single image has no end"
    request = requests.keep_usable_media(request, {"end_image_path": not is_f1 and not is_one_frame}, reason)
    if request.end_image_path is not None:
        _check_image("--end_image_path", request.end_image_path)
    if is_one_frame and request.source is not None:
        raise OptionError(
            f"--{request.source.option} {request.source.path} and --one_frame_inference: a single image is "
            "generated from --image_path and --control_image_path. Omit one of them"
        )
    return requests.keep_usable_media(request, {"control_path": False}, "FramePack does not take it")


def _count_sections(
    request: requests.Request, defaults: SamplingDefaults, window: int, is_one_frame: bool
) -> int:
    """Return a request's number of sections, from --video_sections, --video_seconds or its frames."""
    typed_sections = request.extra.get("video_sections")
    seconds = request.extra.get("video_seconds")
    if is_one_frame:
        if typed_sections not in (None, "1"):
            logger.warning(
                "--video_sections %s is ignored because a single image is generated", typed_sections
            )
        return 1
    if typed_sections is not None or seconds is not None:
        number = None if typed_sections is None else int(typed_sections)
        sections = count_sections(float(seconds or 0), window, number)
        if sections > MAX_SECTIONS:
            raise OptionError(
                f"{sections} sections: a video has {MAX_SECTIONS} at most. Lower --video_seconds or "
                "--video_sections."
            )
        return sections
    # The number of whole sections in --video_length; warn if frames are left over
    frames = request.frames or defaults.frames
    sections = count_window_sections((frames - 1) // LATENT_STRIDE + 1, window)
    full_frames = video_frames(max(sections, 1), window)
    if sections == 0:
        raise OptionError(
            f"{frames} frames do not fill a section, which has at least {full_frames} with "
            f"--latent_window_size {window}"
        )
    if frames != full_frames:
        logger.warning(
            "%d frames are rounded to %d: a video has whole sections after its first frame",
            frames,
            full_frames,
        )
    return sections


def _keep_used_controls(request: requests.Request) -> requests.Request:
    """Return the request without control images and masks if it is not for one-frame inference."""
    images = request.control_images
    extra = dict(request.extra)
    masks = _read_paths(extra, "control_image_mask_path")
    paths_by_option = {"control_image_path": images, "control_image_mask_path": masks}
    # only one-frame inference uses control images
    if "one_frame" not in extra:
        for name, paths in paths_by_option.items():
            if paths:
                logger.warning("--%s is ignored because it is for --one_frame_inference", name)
        extra.pop("control_image_mask_path", None)
        return replace(request, control_images=(), extra=extra)
    for name, paths in paths_by_option.items():
        for path in paths:
            _check_image(f"--{name}", path)
    if len(masks) > len(images):
        logger.warning(
            "of %d masks the last %d are ignored because there are %d control images",
            len(masks),
            len(masks) - len(images),
            len(images),
        )
    return request


def _list_images(request: requests.Request, sections: int, is_one_frame: bool) -> tuple[Path, ...]:
    """Return the path of each section's start image; raise OptionError if one is missing or unreadable."""
    typed_paths = request.extra.get("image_path") or None
    if typed_paths is None and request.image_path is not None:
        typed_paths = str(request.image_path)
    # with a source video and no image, its first frame is the start image
    if typed_paths is None and request.first_image is not None:
        return (request.first_image,) * sections
    entries = _split_by_section(
        require(typed_paths, "--image_path", _NEEDS_IMAGE), "--image_path", sections, is_one_frame
    )
    paths = tuple(to_path("--image_path", path) for path in entries)
    for path in dict.fromkeys(paths):  # sections share images: check each once
        _check_image("--image_path", path)
    return paths


def _split_by_section(text: str, option: str, sections: int, is_one_frame: bool) -> tuple[str, ...]:
    """Return the text of each section, in playing order; warn about texts that no section uses."""
    entries = parse_section_texts(text, option)
    section_texts: tuple[str, ...] = (entries[0],)
    if not is_one_frame:
        section_texts = tuple(select_entry(entries, index, sections) for index in range(sections))
    unused: dict[str, int] = {}
    for index, entry in entries.items():
        if entry not in section_texts:
            # only the first section of a range is reported, because a range may have thousands
            unused.setdefault(entry, index)
    for entry, index in unused.items():
        logger.warning(
            "%s: %r for section %d is ignored: none of the %d sections uses it",
            option,
            entry,
            index,
            sections,
        )
    return section_texts


def _check_image(option: str, path: Path) -> None:
    """Raise OptionError if an image cannot be decoded, before any model is loaded."""
    if not path.exists():
        raise OptionError(f"{option} {path}: no such file.{explain_missing(path)}")
    requests.check_opens(option.removeprefix("--"), path, is_image=True)


def _read_paths(extra: Mapping[str, str], name: str) -> tuple[Path, ...]:
    return tuple(to_path(f"--{name}", line) for line in extra.get(name, "").split("\n") if line)

"""What a request for FramePack asks for, settled before anything is loaded: how many sections, their texts
and images, one picture.

`Request.extra` holds what only this family knows, as text: `image_path` (as `frame_pack.section_syntax` reads
it), `one_frame` (as `parse_one_frame` reads it), `video_sections`, `video_seconds`, `control_image_path` and
`control_image_mask_path` (a path a line).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from frame_pack.one_frame import parse_one_frame
from frame_pack.section_syntax import MOST_SECTIONS, parse_entries
from frame_pack.sections import (
    FRAMES_PER_SECOND,
    LATENT_STRIDE,
    count_sections,
    count_tokens,
    entry_for,
    flow_shift_for,
    sections_in,
    video_frames,
)
from modules.contract.family import LatentSpec, SamplingDefaults
from modules.contract.generation import Request
from modules.contract.requests import check_size, filled, with_media
from modules.errors import MediaError, OptionError
from modules.options import require

logger = logging.getLogger(__name__)

SOLVER = "unipc-bh1"
_NEEDS_IMAGE = (
    "FramePack starts from an image, and a single picture is made of one too (--i in a line of prompts)"
)
_TYPED = {"euler": "vanilla"}  # how --sample_solver calls the others


def settled(
    request: Request, usual: SamplingDefaults, latent: LatentSpec, window: int, is_f1: bool
) -> Request:
    """The request with its size, frames and numbers, its images checked; what cannot be used is warned about
    and left out.

    `frames` says how many sections there are (`sections_of`), and that it is one picture where it is 1.
    `extra` then also says the number of sections and the window. Raises OptionError for what cannot be made.
    """
    one_frame = request.extra.get("one_frame")
    if one_frame is not None:
        parse_one_frame(one_frame)
        if is_f1:
            raise OptionError(
                "--one_frame_inference needs the FramePack model: leave --f1 out and give that model to "
                "--dit."
            )
    why_not = "--f1 makes a video from its start on" if is_f1 else "a single picture has no end"
    taken = {"end_image_path": not is_f1 and one_frame is None}
    request = with_media(request, taken, why_not)
    if request.end_image_path is not None:
        _check_image("--end_image_path", request.end_image_path)
    request = with_media(request, {"control_path": False, "video_path": False}, "FramePack does not take it")
    sections = 1 if one_frame is not None else _count(request, usual, window)
    asked = request.extra.get("video_sections")
    if one_frame is not None and asked not in (None, "1"):
        logger.warning("--video_sections %s is ignored because a single picture is made", asked)
    request = replace(request, frames=1 if one_frame is not None else video_frames(sections, window))
    request = filled(replace(request, solver=_solver(request)), usual)
    check_size(request, latent, at_once=video_frames(1, window))
    flow_shift = _shift_of_size(request, latent, window) if request.flow_shift is None else request.flow_shift
    said = {"latent_window_size": str(window), "video_sections": str(sections), "f1": str(is_f1)}
    extra = {name: text for name, text in request.extra.items() if name != "video_seconds"}
    if one_frame is None:  # as the option counts them, whatever the rate it is played at
        said["video_seconds"] = f"{video_frames(sections, window) / FRAMES_PER_SECOND:g}"
    request = replace(request, flow_shift=flow_shift, extra=_with_controls(extra) | said)
    _check_sections(request, sections)
    return request


def tell_unused_paddings(paddings: Sequence[int], request: Request, sections: int) -> None:
    """Warn where not all of --latent_paddings count. request: settled, of so many sections."""
    given = ",".join(map(str, paddings))
    if paddings and "one_frame" in request.extra:
        logger.warning("--latent_paddings %s is ignored because a single picture is made", given)
    elif len(paddings) > sections:
        logger.warning(
            "--latent_paddings %s: only the first %d count, as there are no more sections; that played first "
            "has distance %d",
            given,
            sections,
            paddings[sections - 1],
        )


def sections_of(request: Request, window: int) -> int:
    """How many sections a settled request has."""
    assert request.frames is not None
    return max(1, (request.frames - 1) // (LATENT_STRIDE * window))


def texts_of(request: Request, sections: int) -> tuple[str, ...]:
    """The prompt of each section, in playing order."""
    return _resolved(parse_entries(request.prompt, "--prompt"), request, sections)


def images_of(request: Request, sections: int) -> tuple[Path, ...]:
    """The start image of each section, in playing order. Raises OptionError where there is none."""
    text = require(_image_text(request), "--image_path", _NEEDS_IMAGE)
    return tuple(
        Path(path).expanduser() for path in _resolved(parse_entries(text, "--image_path"), request, sections)
    )


def controls_of(request: Request) -> tuple[Path, ...]:
    """The control images of a single picture."""
    return _paths(request.extra, "control_image_path")


def masks_of(request: Request) -> tuple[Path, ...]:
    """The masks of the first control images."""
    return _paths(request.extra, "control_image_mask_path")


def _count(request: Request, usual: SamplingDefaults, window: int) -> int:
    asked, seconds = request.extra.get("video_sections"), request.extra.get("video_seconds")
    if asked is not None or seconds is not None:
        sections = count_sections(float(seconds or 0), window, None if asked is None else int(asked))
        if sections > MOST_SECTIONS:
            raise OptionError(
                f"{sections} sections: a video has {MOST_SECTIONS} at most. Lower --video_seconds or "
                "--video_sections."
            )
        return sections
    frames = request.frames or usual.frames
    sections = sections_in((frames - 1) // LATENT_STRIDE + 1, window)
    whole = video_frames(max(sections, 1), window)
    if sections == 0:
        raise OptionError(
            f"{frames} frames are less than a section: the least with --latent_window_size {window} are "
            f"{whole}"
        )
    if frames != whole:
        logger.warning(
            "%d frames are made %d: a video has whole sections behind its first frame", frames, whole
        )
    return sections


def _shift_of_size(request: Request, latent: LatentSpec, window: int) -> float:
    width, height, frames = request.size
    _, _, _, rows, columns = latent.shape(1, height, width)
    return flow_shift_for(count_tokens(1 if frames == 1 else window, rows, columns))


def _solver(request: Request) -> str:
    if request.solver not in (None, "unipc", SOLVER):
        name = _TYPED.get(str(request.solver), request.solver)
        raise OptionError(
            f"--sample_solver {name}: FramePack is sampled with unipc only. Leave the option out."
        )
    return SOLVER


def _with_controls(extra: Mapping[str, str]) -> dict[str, str]:
    """`extra` without control images and masks that have no use; raises OptionError where one that has is not
    there.
    """
    kept = dict(extra)
    for name in ("control_image_path", "control_image_mask_path"):
        if name in kept and "one_frame" not in kept:
            logger.warning("--%s is ignored because it is for --one_frame_inference", name)
            del kept[name]
        for path in _paths(kept, name):
            _check_image(f"--{name}", path)
    controls, masks = len(_paths(kept, "control_image_path")), len(_paths(kept, "control_image_mask_path"))
    if masks > controls:
        logger.warning(
            "of %d masks the last %d are ignored because there are %d control images",
            masks,
            masks - controls,
            controls,
        )
    return kept


def _check_sections(request: Request, sections: int) -> None:
    """Warn of texts and images for sections that there are not; raise OptionError where an image is
    missing.
    """
    for path in dict.fromkeys(images_of(request, sections)):
        _check_image("--image_path", path)
    for option, text in {"--prompt": request.prompt, "--image_path": _image_text(request) or ""}.items():
        entries = parse_entries(text, option)
        used = set(_resolved(entries, request, sections))
        unused: dict[str, int] = {}
        for index, entry in entries.items():
            if entry not in used:
                unused.setdefault(entry, index)  # of a range only its first section: it may have thousands
        for entry, index in unused.items():
            logger.warning(
                "%s: %r for section %d is ignored: no section takes it, of the %d",
                option,
                entry,
                index,
                sections,
            )


def _check_image(option: str, path: Path) -> None:
    """Raise OptionError where there is no image file: minutes before it would be read."""
    from modules.media.reading import image_size

    if not path.exists():
        raise OptionError(f"{option} {path}: no such file")
    try:
        image_size(path)
    except MediaError as error:
        raise OptionError(f"{option} {error}. Give an image file.") from None


def _resolved(entries: Mapping[int, str], request: Request, sections: int) -> tuple[str, ...]:
    if "one_frame" in request.extra:
        return (entries[0],)
    return tuple(entry_for(entries, index, sections) for index in range(sections))


def _image_text(request: Request) -> str | None:
    return request.extra.get("image_path") or (
        None if request.image_path is None else str(request.image_path)
    )


def _paths(extra: Mapping[str, str], name: str) -> tuple[Path, ...]:
    return tuple(Path(line).expanduser() for line in extra.get(name, "").split("\n") if line)

"""From options, a prompt line and defaults to a checked `Request`."""

import logging
import math
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blissful_tuner.guidance import guidance_scales, uses_guidance
from blissful_tuner.options import PLAIN_GUIDANCE, GuidanceOptions
from blissful_tuner.video_to_video import steps_to_make
from generation.options import RequestOptions
from generation.prompt_lines import SEED_BITS, text_to_seed
from modules.contract.generation import Request
from modules.errors import OptionError
from modules.options import check_seed
from modules.text_files import bad_character

logger = logging.getLogger(__name__)

# what is larger is a slip of the finger; the models know 1000 timesteps
MOST = {
    "the width": 16384,
    "the height": 16384,
    "the number of frames": 100_000,
    "the number of steps": 10_000,
}
SOLVERS = {"unipc": "unipc", "dpm++": "dpm++", "vanilla": "euler"}  # --sample_solver -> modules.flow.solvers


def draw_seed() -> int:
    """A seed from the system's entropy."""
    return secrets.randbelow(2**SEED_BITS)


def make_request(options: RequestOptions, overrides: Mapping[str, Any] | None = None) -> Request:
    """The request of the command line, or of a prompt line (`parse_generation_line`) on top of it.

    Without a seed each call draws its own. What is not said stays None; `check_request` has the family fill
    it. Raises OptionError for numbers that make no sense.
    """
    line = overrides or {}
    seed = line.get("seed")
    if seed is None:
        seed = draw_seed() if options.seed is None else _seed_of(options.seed)
        if options.seed is not None and str(seed) != options.seed.strip():
            logger.info("Seed of the text %r: %d", options.seed, seed)

    def path(name: str) -> Path | None:
        value = None if name in options.extras else line.get(name, getattr(options, name))
        return None if value is None or str(value) == "" else Path(value).expanduser()

    request = Request(
        prompt=line.get("prompt", options.prompt) or "",
        seed=seed,
        width=line.get("video_size_width", options.video_size[1]),
        height=line.get("video_size_height", options.video_size[0]),
        frames=line.get("video_length", options.video_length),
        steps=line.get("infer_steps", options.infer_steps),
        guidance_scale=line.get("guidance_scale", options.guidance_scale),
        embedded_guidance=line.get("embedded_cfg_scale", options.embedded_guidance),
        flow_shift=line.get("flow_shift", options.flow_shift),
        solver=SOLVERS[options.sample_solver],
        fps=options.fps,
        negative_prompt=line.get("negative_prompt", options.negative_prompt) or None,
        cfg_schedule=line.get("cfg_schedule", options.cfg_schedule) or None,
        image_path=path("image_path"),
        end_image_path=path("end_image_path"),
        control_path=path("control_path"),
        video_path=path("video_path"),
        strength=options.strength,
        extra=_extra(options, line),
    )
    check_values(request)
    if request.negative_prompt is not None and not uses_guidance(request):
        logger.warning(
            "the negative prompt %r is ignored because --guidance_scale 1 turns guidance off",
            request.negative_prompt,
        )
    return request


def _extra(options: RequestOptions, line: Mapping[str, Any]) -> dict[str, str]:
    """What only the family reads, as text; of a list an entry a line."""
    extra = {}
    for name, (key, given) in options.extras.items():
        value = line.get(name, given)
        text = "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        if value is not None and text:
            extra[key] = text
    return extra


def check_guidance(request: Request, options: GuidanceOptions = PLAIN_GUIDANCE) -> Request:
    """The request that `Family.prepare` has filled, if its guidance can be made.

    Raises OptionError otherwise.
    """
    scales = guidance_scales(request, options, steps_to_make(request))
    given = {
        "--slg_mode": options.skipped_layers and options.slg_mode,
        "--guidance_rescale": options.guidance_rescale,
    }
    for option, value in given.items():
        if value and all(scale is None for scale in scales):
            logger.warning("%s %s is ignored because no step uses guidance", option, value)
    return request if request.guidance_scale is not None else replace(request, guidance_scale=1.0)


def check_values(request: Request) -> None:
    """Raise OptionError for texts that are no text, and for numbers that no model or generator can take."""
    _check_texts(request)
    _check_numbers(request)


def _seed_of(text: str) -> int:
    try:
        return text_to_seed(text)
    except ValueError as error:
        raise OptionError(f"--seed {error}") from None


def _check_texts(request: Request) -> None:
    """Bytes that are no UTF-8 reach Python as halves of characters, which could be encoded but not written
    into a file.
    """
    for name, text in {
        "the prompt": request.prompt,
        "the negative prompt": request.negative_prompt or "",
    }.items():
        found = bad_character(text)
        if found is not None:
            raise OptionError(
                f"{name} {text!r} is not UTF-8 text, it holds {found}: set the terminal or the file to UTF-8"
            )


def _check_numbers(request: Request) -> None:
    counts = {
        "the width": request.width,
        "the height": request.height,
        "the number of frames": request.frames,
        "the number of steps": request.steps,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise OptionError(f"{name} is {count}: it has to be at least 1")
        if count is not None and count > MOST.get(name, count):
            raise OptionError(f"{name} is {count}: {MOST[name]} is the most")
    values = {
        "the guidance scale": request.guidance_scale,
        "the embedded guidance scale": request.embedded_guidance,
        "the flow shift": request.flow_shift,
    }
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise OptionError(f"{name} is {value}: give a finite number")
    if request.flow_shift is not None and request.flow_shift <= 0:
        raise OptionError(f"the flow shift is {request.flow_shift:g}: it has to be above 0")
    check_seed("the seed", request.seed)

"""From options, a prompt line and defaults to a `Request`, and to one that can be made."""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blissful_tuner.guidance import needs
from blissful_tuner.guidance_options import PLAIN_GUIDANCE, GuidanceOptions
from blissful_tuner.prompt_options import PLAIN_PROMPTS, PromptOptions
from blissful_tuner.prompt_weights import weigh_all
from blissful_tuner.wildcards import expand_texts
from generation.options import GenerationOptions
from generation.prompt_lines import SEED_BITS, text_to_seed
from generation.request_options import RequestOptions
from modules.contract.family import Family
from modules.contract.generation import Request
from modules.contract.prepared import Prepared
from modules.errors import MediaError, OptionError
from modules.options import check_seed, show_number, to_path
from modules.text_files import bad_character

logger = logging.getLogger(__name__)

# field of a request -> its option, its letter in a prompt line, the most: what is larger is a slip of the
# finger; the models know 1000 timesteps
COUNTS = {
    "width": ("--video_size, width", "w", 16384),
    "height": ("--video_size, height", "h", 16384),
    "frames": ("--video_length", "f", 100_000),
    "steps": ("--infer_steps", "s", 10_000),
}
VALUES = {
    "guidance_scale": ("--guidance_scale", "l", 1000),
    "embedded_guidance": ("--embedded_cfg_scale", "g", 1000),
    "flow_shift": ("--flow_shift", "fs", 1000),
}
SOLVERS = {"unipc": "unipc", "dpm++": "dpm++", "vanilla": "euler"}  # --sample_solver -> modules.flow.solvers


def draw_seed() -> int:
    """A seed from the system's entropy."""
    return secrets.randbelow(2**SEED_BITS)


# options that are texts, in the order in which `prompts` draws in them
TEXTS = ("prompt", "negative_prompt", "prompt_2")


def make_request(
    options: RequestOptions,
    overrides: Mapping[str, Any] | None = None,
    prompts: PromptOptions = PLAIN_PROMPTS,
) -> Request:
    """The request of the command line, or of a prompt line (`parse_generation_line`) on top of it.

    Without a seed each call draws its own. What is not said stays None. prompts: what is drawn in its texts.
    Raises OptionError for numbers that make no sense, and for texts in which nothing can be drawn.
    """
    line = overrides or {}
    if "prompt" in line and not line["prompt"].strip():
        raise OptionError("the line has no prompt: write what the video should show before the options")
    seed = line.get("seed")
    if seed is None:
        seed = draw_seed() if options.seed is None else _seed_of(options.seed)
        if options.seed is not None and str(seed) != options.seed.strip():
            logger.info("Seed of the text %r: %d", options.seed, seed)

    def path(name: str) -> Path | None:
        value = None if name in options.extras else line.get(name, getattr(options, name))
        return None if value is None or str(value) == "" else to_path(f"--{name}", str(value))

    typed: dict[str, str | None] = {name: line.get(name, getattr(options, name)) for name in TEXTS}
    texts = expand_texts(typed, prompts, seed)
    request = Request(
        prompt=texts["prompt"] or "",
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
        negative_prompt=texts["negative_prompt"] or None,
        second_prompt=texts["prompt_2"],
        cfg_schedule=line.get("cfg_schedule", options.cfg_schedule) or None,
        image_path=path("image_path"),
        end_image_path=path("end_image_path"),
        control_path=path("control_path"),
        video_path=path("video_path"),
        strength=1.0 if options.strength is None else options.strength,
        extra=_extra(options, line),
        typed={name: text for name, text in typed.items() if text is not None and text != texts[name]},
    )
    check_values(request)
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


def prepare_line(family: Family, options: GenerationOptions, overrides: Mapping[str, Any]) -> Prepared:
    """Prepare what the command line, or a prompt line on top of it, asks for. Loads no network.

    Raises UserError for what cannot be made.
    """
    prepared = family.prepare(make_request(options.request, overrides, options.prompts))
    if options.prompts.prompt_weighting:
        prepared = replace(prepared, prompts=weigh_all(prepared.prompts))
    check_guidance(prepared, options.guidance)
    check_media(prepared.asked)
    return prepared


def check_media(request: Request) -> None:
    """Raise OptionError if an image or a video cannot be opened. Reads headers, and a frame of a video."""
    from modules.media.reading import image_size, video_info

    for name in ("image_path", "end_image_path", "control_path", "video_path"):
        path = getattr(request, name)
        if path is None or not path.exists():  # which the family has checked
            continue
        is_image = name in {"image_path", "end_image_path"}
        try:
            if is_image:
                image_size(path)
            else:
                video_info(path)
        except MediaError as error:
            kind = "an image file" if is_image else "a video, or a folder of images"
            raise OptionError(f"--{name}: {error}. Give {kind}.") from None


def check_guidance(prepared: Prepared, options: GuidanceOptions = PLAIN_GUIDANCE) -> None:
    """Raise OptionError if the guidance cannot be made; warn of what is said about guidance and not used."""
    if needs(prepared, options).negative:
        return
    if prepared.asked.negative_prompt is not None:
        text = prepared.asked.negative_prompt
        logger.warning(
            "the negative prompt %r is ignored because no step uses guidance (--guidance_scale)", text
        )
    given = {
        "--slg_mode": options.skipped_layers and options.slg_mode,
        "--guidance_rescale": options.guidance_rescale,
    }
    for option, value in given.items():
        if value:
            logger.warning("%s %s is ignored because no step uses guidance", option, value)


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
        "the prompt of --prompt_2 (--p2 in a prompt line)": request.second_prompt or "",
        "the negative prompt": request.negative_prompt or "",
    }.items():
        found = bad_character(text)
        if found is not None:
            raise OptionError(
                f"{name} {text!r} is not UTF-8 text, it holds {found}: set the terminal or the file to UTF-8"
            )


def _check_numbers(request: Request) -> None:
    for name, (option, letter, most) in COUNTS.items():
        count = getattr(request, name)
        if count is not None and not 1 <= count <= most:
            raise OptionError(
                f"{option} {show_number(count)} (--{letter} in a prompt line): give a number from 1 to {most}"
            )
    for name, (option, letter, most) in VALUES.items():
        value = getattr(request, name)
        if value is not None and not abs(value) <= most:  # nan too
            raise OptionError(
                f"{option} {value:g} (--{letter} in a prompt line): give a number of at most {most}"
            )
    if request.flow_shift is not None and request.flow_shift <= 0:
        raise OptionError(
            f"--flow_shift {request.flow_shift:g} (--fs in a prompt line): give a number above 0; 3 to 7 are "
            "usual"
        )
    if request.embedded_guidance is not None and request.embedded_guidance < 0:
        raise OptionError(
            f"--embedded_cfg_scale {request.embedded_guidance:g} (--g in a prompt line): give 0 or more"
        )
    check_seed("--seed (--d in a prompt line)", request.seed)

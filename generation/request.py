"""From options, a prompt line and defaults to a `Request`, and to one that can be made."""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blissful_tuner.guidance_checks import check_guidance
from blissful_tuner.prompt_options import PLAIN_PROMPTS, PromptOptions
from blissful_tuner.prompt_weights import weigh_all
from blissful_tuner.riflex import slow_frames
from blissful_tuner.step_cache import check_step_cache, choose_step_cache, line_settings
from blissful_tuner.video_to_video import begin_late, check_source
from blissful_tuner.video_to_video_options import SourceOptions, check_one_source, check_share
from blissful_tuner.wildcards import expand_texts
from generation.options import GenerationOptions
from generation.prompt_lines import SEED_BITS, text_to_seed
from generation.request_options import SOLVERS, RequestOptions
from modules.contract.experts import HIGH_NOISE
from modules.contract.family import Family
from modules.contract.generation import Request
from modules.contract.prepared import Prepared
from modules.contract.requests import check_opens
from modules.contract.source import SOURCES, Source
from modules.errors import OptionError
from modules.option_values import check_seed, show_number, to_path
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


def draw_seed() -> int:
    """A seed from the system's entropy."""
    return secrets.randbelow(2**SEED_BITS)


def seed_of(text: str) -> int:
    """Return the seed that --seed says, a number or any text; which one a text stands for is logged.

    Raises OptionError for a number of more digits than any seed has.
    """
    try:
        seed = text_to_seed(text)
    except ValueError as error:
        raise OptionError(f"--seed {error}") from None
    if str(seed) != text.strip():
        logger.info("Seed of the text %r: %d", text, seed)
    return seed


# options that are texts, in the order in which `prompts` draws in them
TEXTS = ("prompt", "negative_prompt", "prompt_2", "nag_prompt")


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
        raise OptionError("the line has no prompt: write what to show before the options")
    seed = line.get("seed")
    if seed is None:
        seed = draw_seed() if options.seed is None else seed_of(options.seed)

    def path(name: str) -> Path | None:
        value = None if name in options.extras else line.get(name, getattr(options, name))
        return None if value is None or str(value) == "" else to_path(f"--{name}", str(value))

    typed: dict[str, str | None] = {name: line.get(name, getattr(options, name)) for name in TEXTS}
    texts = expand_texts(typed, prompts, seed)
    high_noise = line.get("guidance_scale_high_noise", options.guidance_scale_high_noise)
    request = Request(
        prompt=texts["prompt"] or "",
        seed=seed,
        width=line.get("video_size_width", options.video_size[1]),
        height=line.get("video_size_height", options.video_size[0]),
        frames=line.get("video_length", options.video_length),
        steps=line.get("infer_steps", options.infer_steps),
        guidance_scale=line.get("guidance_scale", options.guidance_scale),
        expert_guidance={} if high_noise is None else {HIGH_NOISE: high_noise},
        embedded_guidance=line.get("embedded_cfg_scale", options.embedded_guidance),
        flow_shift=line.get("flow_shift", options.flow_shift),
        solver=_solver_of(line.get("sample_solver", options.sample_solver)),
        fps=line.get("fps", options.fps),
        negative_prompt=texts["negative_prompt"] or None,
        away_prompt=texts["nag_prompt"] or None,
        second_prompt=texts["prompt_2"],
        cfg_schedule=line.get("cfg_schedule", options.cfg_schedule) or None,
        image_path=path("image_path"),
        end_image_path=path("end_image_path"),
        control_path=path("control_path"),
        source=_source(options.source, line),
        extra=_extra(options, line),
        settings={"sample_solver": line["sample_solver"]} if "sample_solver" in line else {},
        typed={name: text for name, text in typed.items() if text is not None and text != texts[name]},
    )
    check_values(request)
    return request


def _source(options: SourceOptions, line: Mapping[str, Any]) -> Source | None:
    """What the command line, or a prompt line in its place, starts from. Raises OptionError for several."""
    in_line = {name: line[name] for name in SOURCES if name in line}
    paths = in_line or {name: getattr(options, name) for name in SOURCES}
    given = {name: str(path) for name, path in paths.items() if path is not None and str(path) != ""}
    check_one_source(given)
    if "denoise" in line:
        check_share("--vd in a prompt line", line["denoise"])
    if not given:
        if "denoise" in line:
            logger.warning("--vd %g is ignored because the line starts from no video (--v)", line["denoise"])
        return None
    ((name, path),) = given.items()
    source = Source(
        name,
        to_path(f"--{name}", path),
        line.get("denoise", options.denoise),
        options.share,
        options.v2v_noise_mode,
        options.v2v_pad_mode,
    )
    return replace(source, extra_noise=getattr(options, source.extra_option) or 0.0)


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
    says = line_settings(options.step_cache, overrides)
    request = make_request(options.request, overrides, options.prompts)
    step_cache = choose_step_cache(options.step_cache, says)
    request = replace(request, step_cache=step_cache, settings={**request.settings, **says})
    request = check_source(request, family.source, family.latent)
    prepared = begin_late(family.prepare(request), family)
    if options.prompts.prompt_weighting:
        prepared = replace(prepared, prompts=weigh_all(prepared.prompts))
    check_guidance(prepared, options.guidance)
    check_step_cache(prepared, family.dit)
    check_media(prepared.asked)
    return replace(prepared, slow_frames=slow_frames(options.steadier, prepared.frames))


def check_media(request: Request) -> None:
    """Raise OptionError if an image or a control video cannot be opened. Reads headers and a frame."""
    for name, is_image in {"image_path": True, "end_image_path": True, "control_path": False}.items():
        path = getattr(request, name)
        if path is not None and path.exists():  # which the family has checked
            check_opens(name, path, is_image)


def check_values(request: Request) -> None:
    """Raise OptionError for texts that are no text, and for numbers that no model or generator can take."""
    _check_texts(request)
    _check_numbers(request)


def _solver_of(name: str) -> str:
    if name not in SOLVERS:
        raise OptionError(f"--sample_solver {name} (in a prompt line): use {', '.join(SOLVERS)}")
    return SOLVERS[name]


def _check_texts(request: Request) -> None:
    """Bytes that are no UTF-8 reach Python as halves of characters, which could be encoded but not written
    into a file.
    """
    for name, text in {
        "the prompt": request.prompt,
        "the prompt of --prompt_2 (--p2 in a prompt line)": request.second_prompt or "",
        "the negative prompt": request.negative_prompt or "",
        "the prompt of --nag_prompt (--nag in a prompt line)": request.away_prompt or "",
    }.items():
        found = bad_character(text)
        if found is not None:
            raise OptionError(
                f"{name} {text!r} is not UTF-8 text, it holds {found}: set the terminal or the file to UTF-8"
            )


def _check_numbers(request: Request) -> None:
    *_, most_scale = VALUES["guidance_scale"]
    for name, scale in request.expert_guidance.items():
        if not abs(scale) <= most_scale:
            raise OptionError(f"--guidance_scale_{name} {scale:g}: give a number of at most {most_scale}")
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

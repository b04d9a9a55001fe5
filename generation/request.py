"""From options, a prompt line and defaults to a `Request`, and to one that can be made."""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import distributed

from blissful_tuner.guidance import check_guidance
from blissful_tuner.options import PLAIN_PROMPTS, PromptOptions
from blissful_tuner.step_cache import check_step_cache, choose_step_cache
from blissful_tuner.video_to_video import begin_late, check_source
from blissful_tuner.video_to_video_options import SourceOptions, check_one_source, check_share
from generation.options import GenerationOptions
from generation.prompt_lines import SOLVERS, read_seed
from generation.script_options import RequestOptions
from modules.contract.family import Family
from modules.contract.requests import Prepared, Request, check_opens, check_values
from modules.contract.rules import SOURCES, Source
from modules.errors import OptionError
from modules.families import HIGH_NOISE
from modules.installation import import_own
from modules.layers.rope import Slow
from modules.option_values import SEED_BITS, to_path

logger = logging.getLogger(__name__)

TURN = 0.9  # of a whole one that a slowed frequency makes in the length of the video


def draw_seed() -> int:
    """A seed from the system's entropy; processes that have joined get that of the first one."""
    seed = secrets.randbelow(2**SEED_BITS)
    if not (distributed.is_available() and distributed.is_initialized()):
        return seed
    from modules.offload.sharding import agree  # of no use to a single process

    return agree(seed)


def seed_of(text: str) -> int:
    """Return the seed that --seed says: `read_seed`.

    Raises OptionError for a number of more digits than any seed has.
    """
    try:
        return read_seed(text)
    except ValueError as error:
        raise OptionError(f"--seed {error}") from None


# options that are texts, in the order in which `prompts` draws in them
TEXTS = ("prompt", "negative_prompt", "prompt_2", "nag_prompt")


def make_request(
    options: RequestOptions,
    overrides: Mapping[str, Any] | None = None,
    prompts: PromptOptions = PLAIN_PROMPTS,
) -> Request:
    """Return the request of the command line, or of a prompt line (`parse_generation_line`) on top of it.

    Without a seed each call draws its own. Missing values stay None. prompts: wildcards of its texts. Raises
    OptionError for numbers that make no sense, and for texts in which nothing can be drawn.
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

    controls = line.get("control_image_path", options.control_image_path) or ()
    typed: dict[str, str | None] = {name: line.get(name, getattr(options, name)) for name in TEXTS}
    texts = typed
    if prompts.draws:
        texts = import_own("blissful_tuner.prompt_syntax").expand_texts(typed, prompts, seed)
    solver = line.get("sample_solver", options.sample_solver)
    if solver not in SOLVERS:
        raise OptionError(f"--sample_solver {solver} (in a prompt line): use {', '.join(SOLVERS)}")
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
        solver=SOLVERS[solver],
        fps=line.get("fps", options.fps),
        negative_prompt=texts["negative_prompt"] or None,
        away_prompt=texts["nag_prompt"] or None,
        second_prompt=texts["prompt_2"],
        cfg_schedule=line.get("cfg_schedule", options.cfg_schedule) or None,
        image_path=path("image_path"),
        end_image_path=path("end_image_path"),
        control_path=path("control_path"),
        control_images=tuple(to_path("--control_image_path", str(one)) for one in controls if str(one)),
        source=_source(options.source, line),
        extra=_extra_settings(options, line),
        settings={"sample_solver": line["sample_solver"]} if "sample_solver" in line else {},
        typed={name: text for name, text in typed.items() if text is not None and text != texts[name]},
    )
    check_values(request)
    return request


def _extra_settings(options: RequestOptions, line: Mapping[str, Any]) -> dict[str, str]:
    """Return settings that only the family reads, as text; of a list an entry a line."""
    extra = {}
    for name, (key, given) in options.extras.items():
        value = line.get(name, given)
        text = "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        if value is not None and text:
            extra[key] = text
    return extra


def _source(options: SourceOptions, line: Mapping[str, Any]) -> Source | None:
    """Return the start given by the command line or a prompt line. Raises OptionError for several."""
    in_line = {name: line[name] for name in SOURCES if name in line}
    paths = in_line or {name: getattr(options, name) for name in SOURCES}
    given = {name: str(path) for name, path in paths.items() if path is not None and str(path) != ""}
    if "denoise" in line:
        check_share("--vd in a prompt line", line["denoise"])
    if not given:
        if "denoise" in line:
            logger.warning("--vd %g is ignored because the line starts from no video (--v)", line["denoise"])
        return None
    check_one_source(given)
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


def prepare_line(family: Family, options: GenerationOptions, overrides: Mapping[str, Any]) -> Prepared:
    """Prepare the request of the command line, or of a prompt line on top of it. Loads no network.

    Raises UserError for impossible ones.
    """
    request = make_request(options.request, overrides, options.prompts)
    if options.step_cache.is_on or overrides:
        step_cache, says = choose_step_cache(options.step_cache, overrides)
        request = replace(request, step_cache=step_cache, settings={**request.settings, **says})
    if request.source is not None:
        request = check_source(request, request.source, family.source, family.latent)
    prepared = family.prepare(request)
    if prepared.asked.source is not None:
        prepared = begin_late(prepared, prepared.asked.source, family)
    if options.prompts.prompt_weighting:
        prepared = replace(
            prepared, prompts=import_own("blissful_tuner.prompt_syntax").weigh_all(prepared.prompts)
        )
    check_guidance(prepared, options.guidance)
    if request.step_cache is not None:
        check_step_cache(request.step_cache, prepared, family.dit)
    for name, is_image in {"image_path": True, "end_image_path": True, "control_path": False}.items():
        path = getattr(prepared.asked, name)
        if path is not None and path.exists():  # which the family has checked
            check_opens(name, path, is_image)
    index, beyond = options.steadier.riflex_index, options.steadier.riflex_beyond
    if index and prepared.frames <= beyond:
        logger.warning(
            "--riflex_index %d is ignored because the video has %d frames: it is for more than %d",
            *(index, prepared.frames, beyond),
        )
    elif index:  # a frequency that the video needs slowed down to TURN * 2 pi / frames
        prepared = replace(prepared, slow_frames=Slow(index - 1, prepared.frames / TURN))
    return prepared

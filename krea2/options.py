"""Krea 2's own options for caching, training and generation. Standard library only."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import (
    FREE,
    HABIT,
    REFERENCES_ONLY,
    REQUEST_SETTING,
    Options,
    make_request_facts,
    not_needed,
    option,
)
from modules.speed_options import TextEncoderOptions, dit_dtype_option, fp8_text_option
from modules.text_files import iterate_lora_metadata
from qwen_image.options import QwenImageVaeOptions

logger = logging.getLogger(__name__)

NAME = "Krea 2"
VARIANTS = RAW, TURBO = ("raw", "turbo")
VARIANT_KEY = "ss_krea2_dit_variant"  # in the metadata of a trained transformer
SIDE = 1024  # default width and height of images
MAX_SIDE = 16384
MAX_MU = 20.0  # e^20: all steps at pure noise
# mu of the noise levels at 256 and at 6400 tokens; Turbo's at all sizes. Source: the released code
FEW_TOKENS_MU, MANY_TOKENS_MU, TURBO_MU = 0.5, 1.15, 1.15
_EDIT = "edits: control images of the dataset are references, which the text encoder reads too"
_MATCH = (
    "reduce references to at most the pixel count of the generated image, keeping their aspect ratio; "
    "default: to a megapixel"
)
_ALONE = "references attend to each other alone"
# options of a generation -> their names in Request.extra
EXTRAS = {name: name for name in ("mu", "y1", "y2")}
# options of a prompt line -> what of the command line they replace
REPLACED = {
    "fs": ("mu", "y1", "y2"),
    "mu": ("flow_shift", "y1", "y2"),
    **dict.fromkeys(("y1", "y2"), ("flow_shift", "mu")),
}
TURBO_STEPS, TURBO_GUIDANCE = 8, 1.0
_VAE: Mapping[str, Any] = {"vae": {"help": "Qwen-Image's VAE: file or folder"}}


class Krea2TextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen3-VL (4B) text encoder: file or folder", often=True)
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen3-VL in fp8: half the memory, slightly different states"
    )


class Krea2LatentCachingOptions(Options, title=NAME):
    """Options of krea2_cache_latents.py in addition to the shared ones."""

    vae: QwenImageVaeOptions = option(settings=_VAE)
    edit: bool = option(f"for {_EDIT}")
    match_target_res: bool = option(_MATCH, ignored_without="edit")


class Krea2TextCachingOptions(Options, title=NAME):
    """Options of krea2_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: Krea2TextOptions = option(settings={"text_encoder": {"required": True}})
    edit: bool = option(f"for {_EDIT}")


class Krea2ModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: QwenImageVaeOptions = option(facts=FREE, settings=_VAE)
    text: Krea2TextOptions = option(facts=FREE)


class Krea2TrainingOptions(Krea2ModelOptions, title=NAME):
    """Options of krea2_train_network.py in addition to the shared ones."""

    turbo_dit: Path | None = option(
        "transformer of Turbo, which generates samples instead of --dit, with the trained network: "
        "eight steps without guidance. Each of the two waits in host memory while the other one works",
        facts=FREE,
    )
    edit: bool = option(f"learn {_EDIT}. Caches need the same option", facts=HABIT)
    match_target_res: bool = option(f"of samples: {_MATCH}", ignored_without="edit", facts=FREE)
    kv_cache: bool = option(
        f"{_ALONE}, which a generation with --kv_cache needs the LoRA to have learned",
        ignored_without="edit",
        facts=HABIT,
    )
    turbo_dit_cache = not_needed("the transformer of --turbo_dit is kept in host memory anyway.")

    def __post_init__(self) -> None:
        if self.turbo_dit is not None and self.turbo_dit == self.dit:
            raise OptionError(
                f"--turbo_dit {self.turbo_dit}: this is what --dit trains. Pass the file of Turbo, or omit "
                "the option"
            )


class Krea2FullTrainingOptions(Krea2TrainingOptions, title=NAME):
    """Options of krea2_train.py in addition to the shared ones."""

    dit_variant: str | None = option(
        "release that --dit is: Turbo generates samples in eight steps without guidance; default: what "
        "the names of the file and its folders say",
        choices=VARIANTS,
        facts=FREE,
    )


class Krea2GenerationOptions(Krea2ModelOptions, title=NAME):
    """Options of krea2_generate_image.py in addition to the shared ones."""

    width: int | None = option(
        "width in pixels, another spelling of the second number of --image_size",
        default=SIDE,
        minimum=16,
        maximum=MAX_SIDE,
        facts=REQUEST_SETTING,
    )
    height: int | None = option(
        "height in pixels", default=SIDE, minimum=16, maximum=MAX_SIDE, facts=REQUEST_SETTING
    )
    mu: float | None = option(
        "how far the noise levels are shifted, as the exponent of --flow_shift (--mu in a prompt line); "
        f"default: {TURBO_MU} for Turbo, else by the size",
        facts=make_request_facts("mu"),
    )
    y1: float | None = option(
        "mu of an image of 256 tokens, 256 x 256 pixels (--y1 in a prompt line); it grows evenly to --y2",
        default=FEW_TOKENS_MU,
        facts=make_request_facts("y1"),
    )
    y2: float | None = option(
        "mu of an image of 6400 tokens, 1280 x 1280 pixels (--y2 in a prompt line)",
        default=MANY_TOKENS_MU,
        facts=make_request_facts("y2"),
    )
    kv_cache: bool = option(
        f"{_ALONE}, for LoRAs of edits that were trained with --kv_cache",
        facts={**REQUEST_SETTING, **REFERENCES_ONLY},
    )
    match_target_res: bool = option(_MATCH, facts={**REQUEST_SETTING, **REFERENCES_ONLY})
    edit = not_needed("--control_image_path alone makes it an edit.")

    def __post_init__(self) -> None:
        for name in EXTRAS:
            if getattr(self, name) is not None:
                check_mu(getattr(self, name), f"--{name}")


def check_mu(mu: float, option: str) -> None:
    """Raise OptionError unless mu is a number from -MAX_MU to MAX_MU."""
    if not math.isfinite(mu) or abs(mu) > MAX_MU:
        raise OptionError(f"{option} {mu:g}: use a number from -{MAX_MU:g} to {MAX_MU:g}; 1.15 is usual")


def check_levels(levels: Collection[str], has_shift: bool) -> None:
    """Raise OptionError if two options set the noise levels; `levels` are those of `EXTRAS` that are set."""
    if levels and has_shift:
        typed = " ".join(f"--{name}" for name in levels)
        raise OptionError(f"--flow_shift and {typed}: each sets the noise levels by itself. Omit one of them")


def resolve_generation(
    options: Any, own_options: Krea2GenerationOptions
) -> tuple[Any, Krea2GenerationOptions]:
    """Resolve the image size from its options, and warn about LoRAs trained with a different --kv_cache.

    Raises OptionError if --image_size gives another size, or two options set the noise levels.
    """
    levels = [name for name in EXTRAS if getattr(own_options, name) is not None]
    check_levels(levels, options.request.flow_shift is not None)
    # Warn if edit LoRAs were trained with the other setting of --kv_cache
    loras = options.lora.lora_weight or ()
    how, mend = ("without", "Omit it") if own_options.kv_cache else ("with", "Pass it")
    for path, metadata in iterate_lora_metadata(loras):
        trained_with = metadata.get("ss_kv_cache", str(own_options.kv_cache))
        if metadata.get("ss_edit") == "True" and trained_with != str(own_options.kv_cache):
            logger.warning(
                f"{path} was trained {how} --kv_cache, as its metadata says: its references attend to "
                f"each other differently. {mend} here too"
            )
    if options.request.video_size is None:
        height = own_options.height or SIDE
        width = own_options.width or SIDE
    else:
        height, width = options.request.video_size
        _check_sides(own_options, height, width)
    request = replace(options.request, video_size=(height, width))
    return replace(options, request=request), own_options


def _check_sides(own_options: Krea2GenerationOptions, height: int, width: int) -> None:
    """Raise OptionError if --width or --height differs from --image_size."""
    if own_options.width in (None, width) and own_options.height in (None, height):
        return
    sides = {"width": own_options.width, "height": own_options.height}
    typed = " ".join(f"--{name} {side}" for name, side in sides.items() if side is not None)
    raise OptionError(
        f"{typed} and --image_size {height} {width} differ: pass one of them (--image_size "
        "has the height first)"
    )


def caching_options(options: Krea2TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    latents = {
        "--vae": options.vae.file.vae or Placeholder("VAE_FILE"),
        "--edit": options.edit,
        "--match_target_res": options.match_target_res,
    }
    texts = {**options.text.command_options("QWEN3_VL_FILE"), "--edit": options.edit}
    return latents, texts


def generation_options(options: Krea2TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    Args:
        options: Options of the training run.
        sample: Values of a sample to generate, by the field names of `Request`.
    """
    controls = sample.get("control_images") or ()
    extra = sample.get("extra") or {}
    levels = {f"--{name}": extra[name] for name in EXTRAS if name in extra}
    turbo: dict[str, Any] = {}
    if options.turbo_dit is not None:
        levels = levels or {"--mu": TURBO_MU}
        # stated because the file's name may not say Turbo; a sample's own number of steps takes precedence
        if not sample.get("steps"):
            turbo = {"--steps": TURBO_STEPS, "--guidance_scale": TURBO_GUIDANCE}
    return {
        "--dit": options.turbo_dit or options.dit or Placeholder("DIT_FILE"),
        **levels,
        **turbo,
        "--vae": options.vae.file.vae or Placeholder("VAE_FILE"),
        **options.text.command_options("QWEN3_VL_FILE"),
        "--dit_dtype": options.dit_dtype,
        "--control_image_path": controls,
        "--match_target_res": bool(controls) and options.match_target_res,
        "--kv_cache": options.kv_cache,
    }

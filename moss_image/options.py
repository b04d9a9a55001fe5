"""MOSS-Image's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_2.options import Flux2VaeOptions
from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
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

NAME = "MOSS-Image"
SIDE = 1024  # default width and height of images
STEPS, GUIDANCE = 50, 3.0
SHIFT = 5.0  # shift of the noise levels in generations; training has its own
SCHEDULES = OFFICIAL, SIMPLE = ("official", "simple")
SKIPPED = "22"  # block that the negative pass leaves out, from 0
NO_BLOCKS = "none"
# options of a generation -> their names in Request.extra
EXTRAS = {name: name for name in ("moss_schedule", "negative_skip_blocks")}
_VERSION = "Base and SFT have the same tensors and settings; --dit says which."
_JOINT = (
    "references attend to the image and the text too, for LoRAs that were trained so (ai-toolkit with "
    "kv_cache off); default: to each other alone, and they are computed once for each prompt"
)
_SCHEDULE = (
    "noise levels: official, snapped to whole timesteps, the last at 24 of 1000; simple, evenly spaced "
    "before the shift, as in ComfyUI, which few-step LoRAs trained for it need (--moss_schedule in "
    "a prompt line)"
)
_SKIPS = (
    "numbers of the blocks, from 0, that the negative pass leaves out, such as 22 or 22,24; none: no block "
    "(--negative_skip_blocks in a prompt line)"
)


class MossImageTextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen3.5 (9B) text encoder: file or folder", often=True)
    text_encoder_dtype: str | None = option(
        "dtype that the encoder computes in; default: bfloat16, but float32 with a float32 transformer",
        choices=("bfloat16", "float32"),
    )
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen3.5 in fp8: half the memory, slightly different states"
    )


class MossImageLatentCachingOptions(Options, title=NAME):
    """Options of moss_image_cache_latents.py in addition to the shared ones."""

    vae: Flux2VaeOptions
    model_version = not_needed(_VERSION)


class MossImageTextCachingOptions(Options, title=NAME):
    """Options of moss_image_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: MossImageTextOptions = option(settings={"text_encoder": {"required": True}})
    model_version = not_needed(_VERSION)


class MossImageModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: Flux2VaeOptions = option(facts={**FREE, **DECODING_SETTING})
    text: MossImageTextOptions = option(facts=FREE)
    model_version = not_needed(_VERSION)


class MossImageTrainingOptions(MossImageModelOptions, title=NAME):
    """Options of moss_image_train_network.py in addition to the shared ones."""

    moss_schedule: str = option(f"of samples: {_SCHEDULE}", default=OFFICIAL, choices=SCHEDULES, facts=FREE)
    negative_skip_blocks: str = option(f"of samples: {_SKIPS}", default=SKIPPED, facts=FREE)
    negative_skip_start: float = option(
        "of samples: fraction of the steps at which the skipping begins",
        default=0.0,
        minimum=0,
        maximum=1,
        facts=FREE,
    )
    negative_skip_end: float = option(
        "of samples: fraction of the steps at which it ends", default=1.0, minimum=0, maximum=1, facts=FREE
    )
    joint_references: bool = option(f"of edits: {_JOINT}", facts=HABIT)

    def __post_init__(self) -> None:
        read_blocks(self.negative_skip_blocks)
        check_window(self.negative_skip_start, self.negative_skip_end)


class MossImageGenerationOptions(MossImageModelOptions, title=NAME):
    """Options of moss_image_generate_image.py in addition to the shared ones."""

    moss_schedule: str = option(
        _SCHEDULE, default=OFFICIAL, choices=SCHEDULES, facts=make_request_facts("moss_schedule")
    )
    negative_skip_blocks: str = option(
        _SKIPS, default=SKIPPED, facts=make_request_facts("negative_skip_blocks")
    )
    negative_skip_start: float = option(
        "fraction of the steps at which the skipping begins",
        default=0.0,
        minimum=0,
        maximum=1,
        facts=REQUEST_SETTING,
    )
    negative_skip_end: float = option(
        "fraction of the steps at which it ends", default=1.0, minimum=0, maximum=1, facts=REQUEST_SETTING
    )
    joint_references: bool = option(_JOINT, facts={**REQUEST_SETTING, **REFERENCES_ONLY})

    def __post_init__(self) -> None:
        read_blocks(self.negative_skip_blocks)
        check_window(self.negative_skip_start, self.negative_skip_end)


def read_blocks(text: str) -> frozenset[int]:
    """Parse --negative_skip_blocks; raise OptionError if it is not a list of blocks."""
    if text.strip() in (NO_BLOCKS, ""):
        return frozenset()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() and len(word) < 4 for word in words):
        raise OptionError(
            f"--negative_skip_blocks {text!r}: use numbers of blocks, from 0, with commas between them, "
            f"such as {SKIPPED}, or {NO_BLOCKS}"
        )
    return frozenset(map(int, words))


def check_window(start: float, end: float) -> None:
    """Raise OptionError if --negative_skip_start is not below --negative_skip_end."""
    if start >= end:
        raise OptionError(
            f"--negative_skip_start {start:g}: use less than --negative_skip_end, {end:g}; to skip no "
            f"block, pass --negative_skip_blocks {NO_BLOCKS}"
        )


def check_schedule(name: str) -> str:
    """Return the schedule's name; raise OptionError if --moss_schedule names an unknown one."""
    if name not in SCHEDULES:
        raise OptionError(f"--moss_schedule {name!r}: pass {' or '.join(SCHEDULES)}")
    return name


def caching_options(options: MossImageTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return options.vae.file.command_options(), options.text.command_options("QWEN3_5_FILE")


def generation_options(options: MossImageTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    Args:
        options: Options of the training run.
        sample: Values of a sample to generate, by the field names of `Request`.
    """
    controls = sample.get("control_images") or ()
    extra = sample.get("extra") or {}
    schedule = extra.get("moss_schedule", options.moss_schedule)
    skips = extra.get("negative_skip_blocks", options.negative_skip_blocks)
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        **options.vae.file.command_options(),
        **options.text.command_options("QWEN3_5_FILE"),
        "--dit_dtype": options.dit_dtype,
        # None leaves an option out, which then has its default
        "--moss_schedule": None if schedule == OFFICIAL else schedule,
        "--negative_skip_blocks": None if skips == SKIPPED else skips,
        "--negative_skip_start": options.negative_skip_start or None,
        "--negative_skip_end": None if options.negative_skip_end == 1 else options.negative_skip_end,
        "--control_image_path": controls,
        "--joint_references": bool(controls) and options.joint_references,
    }

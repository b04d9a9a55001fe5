"""Ideogram 4's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_2.options import Flux2VaeOptions
from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
    FREE,
    REQUEST_SETTING,
    Options,
    not_needed,
    option,
)
from modules.speed_options import TextEncoderOptions, dit_dtype_option, fp8_text_option

NAME = "Ideogram 4"
SIDE = 1024  # default width and height of images
QUALITY, DEFAULT, TURBO = "V4_QUALITY_48", "V4_DEFAULT_20", "V4_TURBO_12"
PRESETS = (DEFAULT, QUALITY, TURBO)
STEPS = 20  # of the default preset
GUIDANCE, FINAL_GUIDANCE = 7.0, 3.0  # in all steps but the last ones of a preset, and in these
MAX_SIGMA = 1.1
BFLOAT16, FP8, FLOAT32 = "bf16", "fp8_e4m3fn", "float32"
SECOND_FLAG = "--unconditional_dit"
_SECOND = (
    "second transformer, which predicts without a text, as released: guidance leads away from it. "
    "Without it, guidance leads away from --negative_prompt"
)
LORA_FLAG = "--unconditional_lora"
_LORA = (
    "LoRA with which --dit predicts without a text as the second transformer, such as "
    "ostris/ideogram_4_unconditional_lora: half the memory"
)
_CHECKED = "captions are only warned of: --check lists their errors."


class Ideogram4TextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen3-VL (8B) text encoder: file or folder", often=True)
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen3-VL in fp8: half the memory, slightly different states"
    )


class Ideogram4LatentCachingOptions(Options, title=NAME):
    """Options of ideogram4_cache_latents.py in addition to the shared ones."""

    vae: Flux2VaeOptions


class Ideogram4TextCachingOptions(Options, title=NAME):
    """Options of ideogram4_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: Ideogram4TextOptions = option(settings={"text_encoder": {"required": True}})
    text_cache_dtype: str | None = option(
        "dtype of the states in caches: fp8_e4m3fn halves the 27 MB of a caption of 256 tokens and loses "
        "precision",
        default=BFLOAT16,
        choices=(BFLOAT16, FP8, FLOAT32),
    )
    validate_caption_structure: bool = option(
        "stop at a caption that is not JSON as the model was trained with, instead of encoding it"
    )
    warn_on_caption_issues: bool = option(
        "with --validate_caption_structure: warn of such captions instead of stopping",
        ignored_without="validate_caption_structure",
    )


class Ideogram4ModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: Flux2VaeOptions = option(facts={**FREE, **DECODING_SETTING})
    text: Ideogram4TextOptions = option(facts=FREE)


class Ideogram4TrainingOptions(Ideogram4ModelOptions, title=NAME):
    """Options of ideogram4_train_network.py in addition to the shared ones."""

    unconditional_dit: Path | None = option(
        f"of samples: {_SECOND}. Between samples it waits in host memory", facts=FREE
    )
    unconditional_lora: Path | None = option(
        f"of samples: {_LORA}", place="there", excludes="unconditional_dit", facts=FREE
    )
    sampler_preset: str = option(
        "of samples: number of steps, and how their noise levels are spread",
        default=DEFAULT,
        choices=PRESETS,
        facts=FREE,
    )
    initial_sigma: float | None = option(
        "of samples: noise level of the first step, instead of that of the preset; 1.004 in musubi-tuner",
        above=0.9,
        maximum=MAX_SIGMA,
        facts=FREE,
    )
    use_unconditional_dit_for_lora_sampling = not_needed(f"{SECOND_FLAG} alone does it.")
    validate_caption_structure = not_needed(f"sample prompts that are no {_CHECKED}")
    warn_on_caption_issues = not_needed(f"sample prompts that are no {_CHECKED}")
    log_loss_stats = not_needed("the run's page shows its losses.")
    ideogram4_timestep_mu = not_needed("musubi-tuner ignores it too.", type=float)
    ideogram4_timestep_std = not_needed("musubi-tuner ignores it too.", type=float)

    def __post_init__(self) -> None:
        if self.unconditional_dit is not None and self.unconditional_dit == self.dit:
            raise OptionError(
                f"{SECOND_FLAG} {self.unconditional_dit}: this is what --dit trains. Pass the second "
                "network, whose file says unconditional, or omit the option"
            )


class Ideogram4FullTrainingOptions(Ideogram4TrainingOptions, title=NAME):
    """Options of ideogram4_train.py in addition to the shared ones."""


class Ideogram4GenerationOptions(Ideogram4ModelOptions, title=NAME):
    """Options of ideogram4_generate_image.py in addition to the shared ones."""

    unconditional_dit: Path | None = option(_SECOND)
    unconditional_lora: Path | None = option(_LORA, place="there", excludes="unconditional_dit")
    sampler_preset: str = option(
        "number of steps, and how their noise levels are spread; --infer_steps replaces the number",
        default=DEFAULT,
        choices=PRESETS,
        facts=REQUEST_SETTING,
    )
    initial_sigma: float | None = option(
        "noise level of the first step, instead of that of the preset; 1.004 in musubi-tuner",
        above=0.9,
        maximum=MAX_SIGMA,
        facts=REQUEST_SETTING,
    )
    dtype: str | None = option(
        "another spelling of --dit_dtype",
        choices=("bfloat16", "float16", "float32"),
        excludes="dit_dtype",
    )
    warn_on_caption_issues = not_needed(f"prompts that are no {_CHECKED}")

    def __post_init__(self) -> None:
        if self.unconditional_dit is not None and self.unconditional_dit == self.dit:
            raise OptionError(
                f"{SECOND_FLAG} {self.unconditional_dit}: this is --dit. Pass the second network, whose "
                "file says unconditional, or omit the option"
            )


def caching_options(options: Ideogram4TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return options.vae.file.command_options(), options.text.command_options("QWEN3_VL_FILE")


def generation_options(options: Ideogram4TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    Args:
        options: Options of the training run.
        sample: Values of a sample to generate, by the field names of `Request`. None of them is an option of
            this model alone.
    """
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        SECOND_FLAG: options.unconditional_dit,
        LORA_FLAG: options.unconditional_lora,
        **options.vae.file.command_options(),
        **options.text.command_options("QWEN3_VL_FILE"),
        "--dit_dtype": options.dit_dtype,
        "--sampler_preset": None if options.sampler_preset == DEFAULT else options.sampler_preset,
        "--initial_sigma": options.initial_sigma,
    }

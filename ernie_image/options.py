"""ERNIE-Image's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_2.options import Flux2VaeOptions
from modules.option_values import Placeholder
from modules.options import DECODING_SETTING, FREE, Options, not_needed, option
from modules.speed_options import TextEncoderOptions, dit_dtype_option, fp8_text_option

NAME = "ERNIE-Image"
SIDE = 1024  # default width and height of images
STEPS, GUIDANCE = 50, 4.0
TURBO_STEPS, TURBO_GUIDANCE = 8, 1.0
SHIFT = 4.0  # shift of the noise levels, for all sizes. Source: the release's scheduler_config.json
_VERSION = "base and Turbo have the same tensors; --dit says which."


class ErnieImageTextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Ministral 3 (3B) text encoder: file or folder", often=True)
    in_fp8: bool = fp8_text_option(
        "fp8_llm", "the linear layers of Ministral 3 in fp8: half the memory, slightly different states"
    )


class ErnieImageLatentCachingOptions(Options, title=NAME):
    """Options of ernie_image_cache_latents.py in addition to the shared ones."""

    vae: Flux2VaeOptions
    model_version = not_needed(_VERSION)


class ErnieImageTextCachingOptions(Options, title=NAME):
    """Options of ernie_image_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: ErnieImageTextOptions = option(settings={"text_encoder": {"required": True}})
    model_version = not_needed(_VERSION)


class ErnieImageModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: Flux2VaeOptions = option(facts={**FREE, **DECODING_SETTING})
    text: ErnieImageTextOptions = option(facts=FREE)
    model_version = not_needed(_VERSION)


class ErnieImageTrainingOptions(ErnieImageModelOptions, title=NAME):
    """Options of ernie_image_train_network.py and ernie_image_train.py in addition to the shared ones."""


class ErnieImageGenerationOptions(ErnieImageModelOptions, title=NAME):
    """Options of ernie_image_generate_image.py in addition to the shared ones."""


def caching_options(options: ErnieImageTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return options.vae.file.command_options(), options.text.command_options("MINISTRAL3_FILE")


def generation_options(options: ErnieImageTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    Args:
        options: Options of the training run.
        sample: Values of a sample to generate, by the field names of `Request`. None of them is an option of
            this model alone.
    """
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        **options.vae.file.command_options(),
        **options.text.command_options("MINISTRAL3_FILE"),
        "--dit_dtype": options.dit_dtype,
    }

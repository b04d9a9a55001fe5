"""FLUX.2's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
    FREE,
    HABIT,
    IDENTITY,
    REFERENCES_ONLY,
    REQUEST_SETTING,
    Options,
    option,
)
from modules.speed_options import TextEncoderOptions, VaeOptions, dit_dtype_option

NAME = "FLUX.2"
MODEL_VERSIONS = ("klein-4b", "klein-base-4b", "klein-9b", "klein-base-9b", "dev")
_OWN_SIZE = (
    "keep the size of each reference, cut to multiples of 16; default: larger ones are reduced to 1024 x "
    "1024 pixels in area, one alone to 2024 x 2024"
)


class Flux2VaeOptions(Options):
    """Path of FLUX.2's autoencoder and how it runs."""

    file: VaeOptions = option(settings={"vae": {"help": "FLUX.2's autoencoder"}})


class Flux2TextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option(
        "text encoder, file or folder: Mistral Small 3 (dev), Qwen3 4B or 8B (klein)", often=True
    )


def _version() -> Any:
    about = "release of the model, which says how texts are read and guided"
    return option(about, default="dev", choices=MODEL_VERSIONS, facts=IDENTITY)


class Flux2LatentCachingOptions(Options, title=NAME):
    """Options of flux_2_cache_latents.py in addition to the shared ones."""

    vae: Flux2VaeOptions
    model_version: str = _version()


class Flux2TextCachingOptions(Options, title=NAME):
    """Options of flux_2_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: Flux2TextOptions = option(settings={"text_encoder": {"required": True}})
    model_version: str = _version()


class Flux2TrainingOptions(Options, title=NAME):
    """Options of flux_2_train_network.py in addition to the shared ones."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: Flux2VaeOptions = option(facts=FREE)
    text: Flux2TextOptions = option(facts=FREE)
    model_version: str = _version()
    embedded_guidance: float = option(name="guidance_scale", facts=HABIT)
    no_resize_control: bool = option(f"of samples: {_OWN_SIZE}", facts=FREE)


class Flux2GenerationOptions(Options, title=NAME):
    """Options of flux_2_generate_image.py in addition to the shared ones."""

    dit: Path | None = option("transformer checkpoint", often=True)
    dit_dtype: str | None = dit_dtype_option()
    vae: Flux2VaeOptions = option(facts=DECODING_SETTING)
    text: Flux2TextOptions
    model_version: str = _version()
    no_resize_control: bool = option(_OWN_SIZE, facts={**REQUEST_SETTING, **REFERENCES_ONLY})


def caching_options(options: Flux2TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    version = {"--model_version": options.model_version}
    latents = {**options.vae.file.command_options(), **version}
    return latents, {**options.text.command_options("TEXT_ENCODER_FILE"), **version}


def generation_options(options: Flux2TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    `Placeholder` values represent files that the user has to name.

    Args:
        options: Options of the training run.
        sample: Values of a sample to generate, by the field names of `Request`.
    """
    controls = sample.get("control_images") or ()
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        **options.vae.file.command_options(),
        **options.text.command_options("TEXT_ENCODER_FILE"),
        "--model_version": options.model_version,
        "--dit_dtype": options.dit_dtype,
        "--control_image_path": controls,
        "--no_resize_control": bool(controls) and options.no_resize_control,
        "--embedded_cfg_scale": sample.get("embedded_guidance"),
    }

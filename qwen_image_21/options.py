"""Qwen-Image-2.1's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
    FREE,
    REFERENCES_ONLY,
    REQUEST_SETTING,
    Options,
    make_request_facts,
    not_needed,
    option,
)
from modules.speed_options import TextEncoderOptions, VaeOptions, dit_dtype_option, fp8_text_option
from qwen_image.options import MASK

NAME = "Qwen-Image-2.1"
SIDE = 1024  # default width and height of images
STEPS = 40
BLANK = " "  # what an empty prompt is written as, as released
NO_TEXT = ("", '""', "''")
_CONFIG = (
    "config.json of diffusers for the transformer, if it is a single file whose sizes are not the release's"
)


class QwenImage21VaeOptions(Options):
    """Path of the VAE and how it runs."""

    file: VaeOptions = option(facts=DECODING_SETTING)
    vae_chunk_size = not_needed(
        "an image goes through the VAE at once; --vae_tiling takes less memory.", type=int
    )


class QwenImage21TextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen3-VL (8B) text encoder: file or folder", often=True)
    text_encoder_dtype: str | None = option(
        "dtype that the encoder computes in; default: bfloat16, but float32 with a float32 transformer",
        choices=("bfloat16", "float32"),
    )
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen3-VL in fp8: half the memory, slightly different states"
    )


class QwenImage21LatentCachingOptions(Options, title=NAME):
    """Options of qwen_image_21_cache_latents.py in addition to the shared ones."""

    vae: QwenImage21VaeOptions


class QwenImage21TextCachingOptions(Options, title=NAME):
    """Options of qwen_image_21_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: QwenImage21TextOptions = option(settings={"text_encoder": {"required": True}})


class QwenImage21ModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_config: Path | None = option(_CONFIG, facts=FREE)
    dit_dtype: str | None = dit_dtype_option()
    num_layers = not_needed("the file's tensors say how many layers it has.", type=int)
    vae: QwenImage21VaeOptions = option(facts=FREE)
    text: QwenImage21TextOptions = option(facts=FREE)


class QwenImage21TrainingOptions(QwenImage21ModelOptions, title=NAME):
    """Options of qwen_image_21_train_network.py in addition to the shared ones."""


class QwenImage21ReferenceOptions(Options, title="images to edit"):
    """How images of --control_image_path are resized, and which parts of the first must not change."""

    resize_control_to_image_size: bool = option(
        "resize the images to the size of the result, and crop them; default: to about a megapixel in "
        "their own shape, as the model was trained",
        facts=REFERENCES_ONLY,
    )
    resize_control_to_official_size: bool = option(
        "resize the images to about a megapixel, which is the default",
        excludes="resize_control_to_image_size",
        facts=REFERENCES_ONLY,
    )
    mask_path: Path | None = option(
        "an image that is white where the first one is changed; the rest of it stays as it is. That "
        "image must have the size of the result",
        facts=make_request_facts(MASK),
    )


class QwenImage21GenerationOptions(QwenImage21ModelOptions, title=NAME):
    """Options of qwen_image_21_generate_image.py in addition to the shared ones."""

    dtype: str | None = option(
        "another spelling of --dit_dtype",
        choices=("bfloat16", "float16", "float32"),
        excludes="dit_dtype",
    )
    no_kv_cache: bool = option(
        "compute the prompt and the images to edit again in each step: slower, but their keys and "
        "values, half a megabyte for each of their tokens, are not kept",
        facts=REQUEST_SETTING,
    )
    references: QwenImage21ReferenceOptions


def replace_empty_prompt(text: str) -> str:
    """Return the negative prompt, or a space for an empty text, because guidance needs a prompt."""
    return BLANK if text.strip() in NO_TEXT else text


def resolve_generation(
    options: Any, own_options: QwenImage21GenerationOptions
) -> tuple[Any, QwenImage21GenerationOptions]:
    """Return both records of options, with a space in place of an empty --negative_prompt."""
    negative = options.request.negative_prompt
    if negative is None:
        return options, own_options
    request = replace(options.request, negative_prompt=replace_empty_prompt(negative))
    return replace(options, request=request), own_options


def caching_options(options: QwenImage21TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return dict(options.vae.file.command_options()), dict(options.text.command_options("QWEN3_VL_FILE"))


def generation_options(options: QwenImage21TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options that generate `sample` with a training run's models, by option name."""
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        "--dit_config": options.dit_config,
        **options.vae.file.command_options(),
        **options.text.command_options("QWEN3_VL_FILE"),
        "--dit_dtype": options.dit_dtype,
        "--control_image_path": sample.get("control_images") or (),
        "--mask_path": (sample.get("extra") or {}).get(MASK),
    }

"""FLUX.1 Kontext's own options for caching, training and generation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
    FREE,
    HABIT,
    REFERENCES_ONLY,
    REQUEST_SETTING,
    Options,
    not_needed,
    option,
)
from modules.speed_options import VaeOptions, dit_dtype_option, fp8_text_option, text_form_option

NAME = "FLUX.1 Kontext"
GUIDANCE = 2.5  # default embedded guidance of generations
_TOKENIZER = "tokenizer: folder or file; default: in or next to the encoder's folder, else from the hub"
_OWN_SIZE = (
    "keep the reference's own size, cut to multiples of 16; default: stretch it to that of the trained "
    "sizes, each about a megapixel, whose shape is the nearest"
)
_BOTH: Mapping[str, Any] = {"text_encoder1": {"required": True}, "text_encoder2": {"required": True}}


class KontextVaeOptions(Options):
    """Path of FLUX's autoencoder and how it runs."""

    file: VaeOptions = option(settings={"vae": {"help": "FLUX's autoencoder"}})
    vae_chunk_size = not_needed("the autoencoder computes one image at a time.", type=int)


class KontextTextOptions(Options):
    """Files and settings of the two text encoders and their tokenizers."""

    text_encoder1: Path | None = option("T5-XXL text encoder: file or folder", often=True)
    text_encoder1_tokenizer: Path | None = option(_TOKENIZER)
    text_encoder2: Path | None = option("CLIP-L text encoder: file or folder", often=True)
    text_encoder2_tokenizer: Path | None = option(_TOKENIZER)
    text_encoder_dtype: str | None = option(
        "dtype of both encoders; default: bfloat16, but float32 if the transformer is float32"
    )
    in_fp8: bool = fp8_text_option(
        "fp8_t5", "T5's linear layers in fp8: half the memory of bf16, slightly different states"
    )
    text_encoder_form: str | None = text_form_option()


class KontextLatentCachingOptions(Options, title=NAME):
    """Options of flux_kontext_cache_latents.py in addition to the shared ones."""

    vae: KontextVaeOptions


class KontextTextCachingOptions(Options, title=NAME):
    """Options of flux_kontext_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: KontextTextOptions = option(settings=_BOTH)


class KontextTrainingOptions(Options, title=NAME):
    """Options of flux_kontext_train_network.py in addition to the shared ones."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: KontextVaeOptions = option(facts=FREE)
    text: KontextTextOptions = option(facts=FREE)
    embedded_guidance: float = option(name="guidance_scale", facts=HABIT)
    no_resize_control: bool = option(f"of samples: {_OWN_SIZE}", facts=FREE)


class KontextGenerationOptions(Options, title=NAME):
    """Options of flux_kontext_generate_image.py in addition to the shared ones."""

    dit: Path | None = option("transformer checkpoint", often=True)
    dit_dtype: str | None = dit_dtype_option()
    vae: KontextVaeOptions = option(facts=DECODING_SETTING)
    text: KontextTextOptions
    no_resize_control: bool = option(_OWN_SIZE, facts={**REQUEST_SETTING, **REFERENCES_ONLY})


def caching_options(options: KontextTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return options.vae.file.command_options(), _list_text_options(options.text)


def generation_options(options: KontextTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options that generate `sample` with a training run's models, by option name."""
    controls = sample.get("control_images") or ()
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        **options.vae.file.command_options(),
        **_list_text_options(options.text),
        "--dit_dtype": options.dit_dtype,
        "--control_image_path": controls,
        "--no_resize_control": bool(controls) and options.no_resize_control,
        "--embedded_cfg_scale": sample.get("embedded_guidance"),
        "--prompt_2": sample.get("second_prompt"),
    }


def _list_text_options(text: KontextTextOptions) -> dict[str, Any]:
    return {
        "--text_encoder1": text.text_encoder1 or Placeholder("T5_FILE"),
        "--text_encoder1_tokenizer": text.text_encoder1_tokenizer,
        "--text_encoder2": text.text_encoder2 or Placeholder("CLIP_FILE"),
        "--text_encoder2_tokenizer": text.text_encoder2_tokenizer,
    }

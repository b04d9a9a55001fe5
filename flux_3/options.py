"""FLUX 3's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_2.options import Flux2VaeOptions
from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import DECODING_SETTING, FREE, Options, not_needed, option
from modules.speed_options import TextEncoderOptions, dit_dtype_option, fp8_text_option

NAME = "FLUX 3"
SIDE = 1024  # default width and height of images
SHIFT = 6.93  # shift of the noise levels, for all sizes and both models. Source: the released code
STEPS, GUIDANCE = 50, 3.5
DISTILLED_STEPS, DISTILLED_GUIDANCE = 16, 1.0
_VERSION = "the tensors of the transformer show whether it is base or distilled."


class Flux3TextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen3-VL (4B) text encoder: file or folder", often=True)
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen3-VL in fp8: half the memory, slightly different states"
    )


class Flux3LatentCachingOptions(Options, title=NAME):
    """Options of flux_3_cache_latents.py in addition to the shared ones."""

    vae: Flux2VaeOptions
    model_version = not_needed(_VERSION)


class Flux3TextCachingOptions(Options, title=NAME):
    """Options of flux_3_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: Flux3TextOptions = option(settings={"text_encoder": {"required": True}})
    model_version = not_needed(_VERSION)


class Flux3TrainingOptions(Options, title=NAME):
    """Options of flux_3_train_network.py in addition to the shared ones."""

    dit: Path | None = option("transformer checkpoint of base", facts=FREE, often=True)
    dit_dtype: str | None = dit_dtype_option()
    vae: Flux2VaeOptions = option(facts=FREE)
    text: Flux3TextOptions = option(facts=FREE)
    distilled_dit: Path | None = option(
        "distilled transformer, which generates samples instead of --dit, with the trained network: "
        f"{DISTILLED_STEPS} steps without guidance. Each of the two waits in host memory while the other "
        "one works",
        facts=FREE,
    )
    model_version = not_needed(_VERSION)

    def __post_init__(self) -> None:
        if self.distilled_dit is not None and self.distilled_dit == self.dit:
            raise OptionError(
                f"--distilled_dit {self.distilled_dit}: this is what --dit trains. Pass the distilled file, "
                "or omit the option"
            )


class Flux3GenerationOptions(Options, title=NAME):
    """Options of flux_3_generate_image.py in addition to the shared ones."""

    dit: Path | None = option("transformer checkpoint, of base or distilled", often=True)
    dit_dtype: str | None = dit_dtype_option()
    vae: Flux2VaeOptions = option(facts=DECODING_SETTING)
    text: Flux3TextOptions
    model_version = not_needed(_VERSION)


def caching_options(options: Flux3TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return options.vae.file.command_options(), options.text.command_options("QWEN3_VL_FILE")


def generation_options(options: Flux3TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation script's options for the models of a training run, by option name.

    Args:
        options: Options of the training run.
        sample: Values of a sample to generate, by the field names of `Request`.
    """
    return {
        "--dit": options.distilled_dit or options.dit or Placeholder("DIT_FILE"),
        **options.vae.file.command_options(),
        **options.text.command_options("QWEN3_VL_FILE"),
        "--dit_dtype": options.dit_dtype,
        "--control_image_path": sample.get("control_images") or (),
    }

"""Fibo 2.0's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_2.options import Flux2VaeOptions
from modules.errors import OptionError
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
from modules.speed_options import TextEncoderOptions, dit_dtype_option, fp8_text_option

NAME = "Fibo 2.0"
SIDE = 1024  # default width and height of images
STEPS, GUIDANCE = 30, 5.0
TURBO_STEPS, TURBO_GUIDANCE = 4, 1.0
MASK = "mask_path"  # in `Request.extra`
_OWN_SIZE = (
    "use images to edit in their own size, cropped to multiples of 16 on the right and below; default: one "
    "gets the size of the result, several get about a megapixel each"
)
_VERSION = "dev and edit-turbo have the same tensors; --dit says which."


class Fibo2TextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen3-VL (4B) text encoder: file or folder", often=True)
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen3-VL in fp8: half the memory, slightly different states"
    )
    no_text_images: bool = option(
        "do not draw the texts of text_render for the text encoder, which then reads only their words"
    )
    fonts: tuple[Path, ...] | None = option(
        "fonts for drawn texts with characters that Pillow's own font lacks: files, or the folder fonts of "
        "Bria's release",
        place="there",
        excludes="no_text_images",
    )

    def command_options(self, stand_in: str) -> dict[str, Any]:
        """Return options for a printed command that encodes prompts as this run does."""
        drawing = {"--no_text_images": self.no_text_images, "--fonts": self.fonts or ()}
        return {**super().command_options(stand_in), **drawing}


class Fibo2LatentCachingOptions(Options, title=NAME):
    """Options of fibo_2_cache_latents.py in addition to the shared ones."""

    vae: Flux2VaeOptions
    model_version = not_needed(_VERSION)


class Fibo2TextCachingOptions(Options, title=NAME):
    """Options of fibo_2_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: Fibo2TextOptions = option(settings={"text_encoder": {"required": True}})
    model_version = not_needed(_VERSION)


class Fibo2ModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: Flux2VaeOptions = option(facts={**FREE, **DECODING_SETTING})
    text: Fibo2TextOptions = option(facts=FREE)
    model_version = not_needed(_VERSION)


class Fibo2TrainingOptions(Fibo2ModelOptions, title=NAME):
    """Options of fibo_2_train_network.py in addition to the shared ones."""

    distilled_dit: Path | None = option(
        "transformer of edit-turbo, which generates samples instead of --dit, with the trained network: "
        f"{TURBO_STEPS} steps without guidance. Each of the two waits in host memory while the other one "
        "works",
        facts=FREE,
    )
    no_resize_control: bool = option(f"of samples: {_OWN_SIZE}", facts=FREE)

    def __post_init__(self) -> None:
        if self.distilled_dit is not None and self.distilled_dit == self.dit:
            raise OptionError(
                f"--distilled_dit {self.distilled_dit}: this is what --dit trains. Pass the file of "
                "edit-turbo, or omit the option"
            )


class Fibo2GenerationOptions(Fibo2ModelOptions, title=NAME):
    """Options of fibo_2_generate_image.py in addition to the shared ones."""

    mask_path: Path | None = option(
        "an image that is white where the one of --control_image_path is regenerated, of its size: the "
        "model sees gray there (--m in a prompt line)",
        facts=make_request_facts(MASK),
    )
    no_resize_control: bool = option(_OWN_SIZE, facts={**REQUEST_SETTING, **REFERENCES_ONLY})


def caching_options(options: Fibo2TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return options.vae.file.command_options(), options.text.command_options("QWEN3_VL_FILE")


def generation_options(options: Fibo2TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    `sample` has the settings of a sample by name. An option whose value is None is left out.
    """
    controls = sample.get("control_images") or ()
    turbo: dict[str, Any] = {}
    # the generation script recognizes Turbo only by the file's name, but --distilled_dit accepts any name:
    # so steps and guidance are given here, unless the sample sets its number of steps
    if options.distilled_dit is not None and not sample.get("steps"):
        turbo = {"--infer_steps": TURBO_STEPS, "--guidance_scale": TURBO_GUIDANCE}
    return {
        "--dit": options.distilled_dit or options.dit or Placeholder("DIT_FILE"),
        **turbo,
        **options.vae.file.command_options(),
        **options.text.command_options("QWEN3_VL_FILE"),
        "--dit_dtype": options.dit_dtype,
        "--control_image_path": controls,
        "--no_resize_control": bool(controls) and options.no_resize_control,
        "--mask_path": (sample.get("extra") or {}).get(MASK),
    }

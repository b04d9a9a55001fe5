"""Qwen-Image's own options for caching, training and generation. Standard library only."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
    FREE,
    HABIT,
    NO_PIXELS,
    REFERENCES_ONLY,
    Options,
    make_request_facts,
    not_needed,
    option,
    unsupported,
)
from modules.speed_options import TextEncoderOptions, VaeOptions, dit_dtype_option, fp8_text_option

NAME = "Qwen-Image"
ORIGINAL, EDIT, EDIT_2509, EDIT_2511, LAYERED = VERSIONS = (
    "original", "edit", "edit-2509", "edit-2511", "layered",
)  # fmt: skip
LAYER_COUNT = "output_layers"  # a key of `Request.extra`
MAX_LAYERS = 64
MASK = "mask_path"  # a key of `Request.extra`
MAX_KERNEL = 255  # latent pixels


class QwenImageVersionOptions(Options):
    """Option for the release of Qwen-Image, which the files' tensors do not show."""

    model_version: str | None = option(
        "release of the model: original (Qwen-Image and Qwen-Image-2512), which is the default, one "
        "that edits images: edit (Qwen-Image-Edit), edit-2509 or edit-2511, or one that splits an "
        "image into transparent layers: layered (Qwen-Image-Layered)",
        choices=VERSIONS,
    )
    edit: bool = option("the same as --model_version edit", excludes="model_version", facts=NO_PIXELS)
    edit_plus: bool = option(
        "the same as --model_version edit-2509", excludes=("model_version", "edit"), facts=NO_PIXELS
    )

    @property
    def name(self) -> str:
        """Return the release that the options name; by default the original one."""
        if self.model_version:
            return self.model_version
        if self.edit_plus:
            return EDIT_2509
        return EDIT if self.edit else ORIGINAL


class QwenImageVaeOptions(Options):
    """Path of the VAE and how it runs."""

    file: VaeOptions = option(facts=DECODING_SETTING)
    vae_chunk_size = not_needed(
        "an image goes through the VAE at once; --vae_tiling takes less memory.", type=int
    )


class QwenImageTextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen2.5-VL (7B) text encoder: file or folder", often=True)
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen2.5-VL in fp8: half the memory, slightly different states"
    )


class QwenImageLatentCachingOptions(Options, title=NAME):
    """Options of qwen_image_cache_latents.py in addition to the shared ones."""

    vae: QwenImageVaeOptions
    version: QwenImageVersionOptions


class QwenImageTextCachingOptions(Options, title=NAME):
    """Options of qwen_image_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: QwenImageTextOptions = option(settings={"text_encoder": {"required": True}})
    version: QwenImageVersionOptions


class QwenImageModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    num_layers = not_needed("the file's tensors say how many layers it has.", type=int)
    vae: QwenImageVaeOptions = option(facts=FREE)
    text: QwenImageTextOptions = option(facts=FREE)
    version: QwenImageVersionOptions = option(facts=HABIT)


class QwenImageTrainingOptions(QwenImageModelOptions, title=NAME):
    """Options of qwen_image_train_network.py and qwen_image_train.py in addition to the shared ones."""

    remove_first_image_from_target: bool = option(
        "learn only the layers, without the full image before them, with --model_version layered; it "
        "is faster. Then generate with one --output_layers less",
        facts=HABIT,
    )

    def __post_init__(self) -> None:
        if self.remove_first_image_from_target and self.version.name != LAYERED:
            raise OptionError(f"--remove_first_image_from_target needs --model_version {LAYERED}")


class QwenImageReferenceOptions(Options, title="images to edit"):
    """How images of --control_image_path are resized, and which parts of the first must not change."""

    resize_control_to_official_size: bool = option(
        "resize the images to about a megapixel in their own shape, as the model was trained (for the "
        "text encoder smaller, from edit-2509 on); default: their own size, cut to multiples of 16",
        excludes="resize_control_to_image_size",
        facts=REFERENCES_ONLY,
    )
    resize_control_to_image_size: bool = option(
        "resize the images to the size of the result, and crop them", facts=REFERENCES_ONLY
    )
    append_original_name: bool = option(
        "add the name of the first image to that of the result", facts={**NO_PIXELS, **REFERENCES_ONLY}
    )
    mask_path: str | None = option(
        "an image that is white where the first one is changed; the rest of it stays as it is. That "
        "image must have the size of the result",
        excludes="rcm_threshold",
        facts=make_request_facts(MASK),
    )
    rcm_threshold: float | None = option(
        "keep what an edit does not change in its place: at each step, what differs from the first "
        "image by less than this is set back to it; 0.01 to 0.1 is common. That image must have the "
        "size of the result",
        above=0,
        below=math.inf,
        hint="such as 0.05",
        facts=REFERENCES_ONLY,
    )
    rcm_relative_threshold: bool = option(
        "count --rcm_threshold in shares of the largest difference of the step; 0.1 to 0.5 is then usual",
        ignored_without="rcm_threshold",
    )
    rcm_kernel_size: int = option(
        "blur differences over this many latent pixels, an odd number; 1: not at all",
        default=3,
        minimum=1,
        maximum=MAX_KERNEL,
        ignored_without="rcm_threshold",
    )
    rcm_dilate_size: int = option(
        "enlarge the changed area by this many latent pixels",
        default=0,
        minimum=0,
        maximum=MAX_KERNEL,
        ignored_without="rcm_threshold",
    )
    rcm_debug_save: bool = option(
        "write what is changed at each step as NAME_rcm_STEP.png, white",
        ignored_without="rcm_threshold",
        facts=NO_PIXELS,
    )

    def __post_init__(self) -> None:
        if self.rcm_kernel_size % 2 == 0:
            raise OptionError(f"--rcm_kernel_size {self.rcm_kernel_size}: pass an odd number, such as 3 or 5")
        if self.rcm_relative_threshold and (self.rcm_threshold or 0) > 1:
            raise OptionError(
                f"--rcm_threshold {self.rcm_threshold:g} with --rcm_relative_threshold: pass a share from 0 "
                "to 1, such as 0.2"
            )


class QwenImageLayerOptions(Options, title="layers"):
    """How --model_version layered splits an image into layers."""

    output_layers: int = option(
        "number of layers that --model_version layered takes the image apart into, from back to front",
        default=4,
        minimum=1,
        maximum=MAX_LAYERS,
        facts=make_request_facts(LAYER_COUNT),
    )
    remove_first_image_from_target: bool = option(
        "make the layers alone, for a LoRA that was trained with this option: there is no whole image "
        "in front of them",
        facts=REFERENCES_ONLY,
    )
    cfg_norm: bool = option(
        "keep the size of what the prompt alone predicts when guidance changes it, with --model_version "
        "layered, as other tools do; the release does not",
        facts=REFERENCES_ONLY,
    )
    automatic_prompt_lang_for_layered = unsupported(
        "captions are not written while generating: tools/caption_dataset.py captions images",
        choices=("en", "cn"),
    )


class QwenImageGenerationOptions(QwenImageModelOptions, title=NAME):
    """Options of qwen_image_generate_image.py in addition to the shared ones."""

    vae_enable_tiling: bool = option("another spelling of --vae_tiling", facts=DECODING_SETTING)
    embedded_cfg_scale = not_needed(
        "the model has no such input; --guidance_scale guides it.", type=float, default=2.5
    )
    layers: QwenImageLayerOptions
    references: QwenImageReferenceOptions

    def __post_init__(self) -> None:
        if self.version.name == LAYERED:
            unused = {
                "--resize_control_to_official_size": self.references.resize_control_to_official_size,
                "--mask_path": self.references.mask_path is not None,
                "--rcm_threshold": self.references.rcm_threshold is not None,
            }
            for flag in filter(unused.get, unused):
                raise OptionError(f"{flag} is for releases that edit, such as edit-2511; omit it")
        elif self.layers.cfg_norm:
            raise OptionError(f"--cfg_norm needs --model_version {LAYERED}; others always do it")
        elif self.layers.remove_first_image_from_target:
            raise OptionError(f"--remove_first_image_from_target needs --model_version {LAYERED}")


def caching_options(options: QwenImageTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    version = {"--model_version": _not_original(options.version)}
    latents = {**options.vae.file.command_options(), **version}
    return latents, {**options.text.command_options("QWEN_FILE"), **version}


def generation_options(options: QwenImageTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    `sample` has the settings of a sample by name. An option whose value is None is left out.
    """
    controls = sample.get("control_images") or ()
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        **options.vae.file.command_options(),
        **options.text.command_options("QWEN_FILE"),
        "--dit_dtype": options.dit_dtype,
        "--model_version": _not_original(options.version),
        "--control_image_path": controls,
        "--mask_path": None if options.version.name == LAYERED else (sample.get("extra") or {}).get(MASK),
        "--output_layers": _count_layers(options, sample),
        "--remove_first_image_from_target": options.remove_first_image_from_target,
        # resize references as caching did: Layered to the result's size, edit releases to the official one
        "--resize_control_to_official_size": bool(controls) and options.version.name != LAYERED,
        "--resize_control_to_image_size": bool(controls) and options.version.name == LAYERED,
    }


def _count_layers(options: QwenImageTrainingOptions, sample: Mapping[str, Any]) -> int | None:
    """Return the number of layers in a sample, whose first frame may be the composite image."""
    if options.version.name != LAYERED or "frames" not in sample:
        return None
    return int(sample["frames"]) - (not options.remove_first_image_from_target)


def _not_original(version: QwenImageVersionOptions) -> str | None:
    return None if version.name == ORIGINAL else version.name

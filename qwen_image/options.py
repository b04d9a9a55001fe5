"""Qwen-Image's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.options import FREE, NO_PIXELS, OF_DECODING, Options, not_needed, option, unsupported
from modules.speed_options import VaeOptions, dit_dtype_option

NAME = "Qwen-Image"
EDITS = "editing of pictures is not built yet; --model_version original makes pictures from texts"
LAYERS = "Qwen-Image-Layered, which makes transparent layers, is another network"
NOT_BUILT = {
    **dict.fromkeys(("edit", "edit-2509", "edit-2511"), EDITS),
    "layered": f"{LAYERS} and is not built yet",
}


class QwenImageVersionOptions(Options):
    """Which release of Qwen-Image the files belong to; their tensors do not tell."""

    model_version: str | None = option(
        "release of the model: original (Qwen-Image and Qwen-Image-2512), which is the default",
        choices=("original",),
        refused=NOT_BUILT,
        facts=NO_PIXELS,
    )
    edit = unsupported(EDITS, "the same as --model_version edit")
    edit_plus = unsupported(EDITS, "the same as --model_version edit-2509")


class QwenImageVaeOptions(Options):
    """Path of the VAE and how it runs."""

    file: VaeOptions = option(facts=OF_DECODING)
    vae_chunk_size = not_needed(
        "a picture goes through the VAE at once; --vae_tiling takes less memory.", type=int
    )


class QwenImageTextOptions(Options):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen2.5-VL (7B) text encoder: file or folder", often=True)
    text_encoder_tokenizer: Path | None = option(
        "its tokenizer: folder or file; default: in or beside the encoder's folder, else from the hub"
    )
    text_encoder_dtype: str | None = option(
        "dtype that the encoder computes in; default: bfloat16, but float32 beside a float32 transformer"
    )
    fp8_vl: bool = option(
        "keep the linear layers of Qwen2.5-VL in fp8: half the memory, slightly different states"
    )
    text_encoder_cpu: bool = option("run the text encoder on the CPU")


class QwenImageLatentCachingOptions(Options, title=NAME):
    """Options of qwen_image_cache_latents.py besides the shared ones."""

    vae: QwenImageVaeOptions
    version: QwenImageVersionOptions


class QwenImageTextCachingOptions(Options, title=NAME):
    """Options of qwen_image_cache_text_encoder_outputs.py besides the shared ones."""

    text: QwenImageTextOptions = option(settings={"text_encoder": {"required": True}})
    version: QwenImageVersionOptions


class QwenImageModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    num_layers = not_needed("the file's tensors say how many layers it has.", type=int)
    vae: QwenImageVaeOptions = option(facts=FREE)
    text: QwenImageTextOptions = option(facts=FREE)
    version: QwenImageVersionOptions = option(facts=FREE)


class QwenImageTrainingOptions(QwenImageModelOptions, title=NAME):
    """Options of qwen_image_train_network.py and qwen_image_train.py besides the shared ones."""

    remove_first_image_from_target = unsupported(f"{LAYERS} and is not built yet")


class QwenImageGenerationOptions(QwenImageModelOptions, title=NAME):
    """Options of qwen_image_generate_image.py besides the shared ones."""

    vae_enable_tiling: bool = option("another spelling of --vae_tiling", facts=OF_DECODING)
    embedded_cfg_scale = not_needed(
        "the model has no such input; --guidance_scale guides it.", type=float, default=2.5
    )
    automatic_prompt_lang_for_layered = unsupported(LAYERS, choices=("en", "cn"))
    output_layers = unsupported(LAYERS, type=int, default=4)
    control_image_path = unsupported(EDITS, "pictures to edit", type=str, nargs="*")
    mask_path = unsupported(EDITS, "what of the picture is edited", type=str)
    resize_control_to_image_size = unsupported(EDITS)
    resize_control_to_official_size = unsupported(EDITS)
    append_original_name = unsupported(EDITS, "name results after the picture that is edited")
    rcm_threshold = unsupported(EDITS, "keep what an edit leaves alone", type=float)
    rcm_relative_threshold = unsupported(EDITS)
    rcm_kernel_size = unsupported(EDITS, type=int, default=3)
    rcm_dilate_size = unsupported(EDITS, type=int, default=0)
    rcm_debug_save = unsupported(EDITS)


def caching_options(options: QwenImageTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the commands that make missing caches of latents and of texts."""
    return {"--vae": options.vae.file.vae or "VAE_FILE"}, _text_options(options.text)


def generation_options(options: QwenImageTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that generate with the models of a training; see `FamilyEntry.generation_words`."""
    files = {"--dit": options.dit or "DIT_FILE", "--vae": options.vae.file.vae or "VAE_FILE"}
    return {**files, **_text_options(options.text), "--dit_dtype": options.dit_dtype}


def _text_options(text: QwenImageTextOptions) -> dict[str, Any]:
    return {
        "--text_encoder": text.text_encoder or "QWEN_FILE",
        "--text_encoder_tokenizer": text.text_encoder_tokenizer,
        "--fp8_vl": text.fp8_vl,
    }

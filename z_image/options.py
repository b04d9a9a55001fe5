"""Z-Image's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumina.options import check_renorm, check_trunc_ratio, list_guidance_options
from modules.option_values import Placeholder
from modules.options import DECODING_SETTING, FREE, Options, make_request_facts, not_needed, option
from modules.speed_options import TextEncoderOptions, VaeOptions, dit_dtype_option, fp8_text_option

NAME = "Z-Image"
CFG_TRUNC_RATIO, RENORM_CFG = 1.0, 0.0  # default, as in the official pipeline
_VAE: Mapping[str, Any] = {"vae": {"help": "FLUX.1's autoencoder: file or folder"}}


class ZImageTextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen3 (4B) text encoder: file or folder", often=True)
    in_fp8: bool = fp8_text_option(
        "fp8_llm", "the linear layers of Qwen3 in fp8: half the memory, slightly different states"
    )


class ZImageLatentCachingOptions(Options, title=NAME):
    """Options of zimage_cache_latents.py in addition to the shared ones."""

    vae: VaeOptions = option(settings=_VAE)


class ZImageTextCachingOptions(Options, title=NAME):
    """Options of zimage_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: ZImageTextOptions = option(settings={"text_encoder": {"required": True}})


class ZImageModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option("transformer checkpoint", facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    vae: VaeOptions = option(facts={**FREE, **DECODING_SETTING}, settings=_VAE)
    text: ZImageTextOptions = option(facts=FREE)
    use_32bit_attention: bool = option(
        "compute attention in float32 in a model of 16 bits: slower; float16 overflows without"
    )


class ZImageTrainingOptions(ZImageModelOptions, title=NAME):
    """Options of zimage_train_network.py and zimage_train.py in addition to the shared ones."""


class ZImageGenerationOptions(ZImageModelOptions, title=NAME):
    """Options of zimage_generate_image.py in addition to the shared ones."""

    even_steps: bool = option(
        "noise levels evenly down to 0 before the shift, as diffusers has them; default: down to 1/1000, as "
        "the known tuner",
    )
    cfg_trunc_ratio: float = option(
        "leave guidance out once the noisy image contains this share of data, 0 to 1 (--ctr in a prompt "
        "line); cfg_truncation of the official pipeline",
        default=CFG_TRUNC_RATIO,
        facts=make_request_facts("cfg_trunc_ratio"),
    )
    renorm_cfg: float = option(
        "largest norm of a guided prediction, as a multiple of the norm without guidance; 0: no limit "
        "(--rcfg in a prompt line); cfg_normalization of the official pipeline",
        default=RENORM_CFG,
        facts=make_request_facts("renorm_cfg"),
    )
    embedded_cfg_scale = not_needed(
        "the model has no such input; --guidance_scale guides it.", type=float, default=2.5
    )

    def __post_init__(self) -> None:
        check_trunc_ratio(self.cfg_trunc_ratio, "--cfg_trunc_ratio")
        check_renorm(self.renorm_cfg, "--renorm_cfg")


def caching_options(options: ZImageTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return options.vae.command_options(), options.text.command_options("QWEN3_FILE")


def generation_options(options: ZImageTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options that generate `sample` with a training run's models, by option name."""
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        **options.vae.command_options(),
        **options.text.command_options("QWEN3_FILE"),
        "--dit_dtype": options.dit_dtype,
        "--use_32bit_attention": options.use_32bit_attention,
        **list_guidance_options(sample),
    }

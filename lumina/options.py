"""Lumina-Image-2.0's own options for caching, training and generation. Standard library only."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import DECODING_SETTING, FREE, Options, make_request_facts, not_needed, option
from modules.parser import typed_names
from modules.speed_options import AE, AE_HELP, VaeOptions, dit_dtype_option, take_ae

DEFAULT_TOKENS = 256  # default maximum length of a caption with the system prompt
MAX_TOKENS = 8192  # that Gemma 2 was trained with
CFG_TRUNC_RATIO = 0.25  # default
RENORM_CFG = 1.0  # default
# options of a generation -> their names in Request.extra, which training samples use too
EXTRAS = {"cfg_trunc_ratio": "cfg_trunc_ratio", "renorm_cfg": "renorm_cfg"}


NAME = "Lumina-Image-2.0"


class LuminaTextOptions(Options):
    """Path of the text encoder, and how it reads prompts."""

    gemma2: Path | None = option("Gemma 2 (2B) text encoder: file or folder", often=True)
    gemma2_tokenizer: Path | None = option(
        "tokenizer: folder or file; default: next to or inside the encoder's file, else from the hub"
    )
    gemma2_max_token_length: int | None = option(
        f"tokens of a prompt that are read, with those of the system prompt; default {DEFAULT_TOKENS}",
        minimum=1,
        maximum=MAX_TOKENS,
    )
    text_encoder_dtype: str | None = option(
        "dtype that the text encoder computes in; default: bfloat16, but float32 with a float32 model, or "
        "for a training with --mixed_precision no"
    )
    system_prompt: str = option(
        "instruction that is put before every prompt, as in the model's training, such as 'You are an "
        "assistant designed to generate high-quality images based on user prompts.'; default: none",
        default="",
    )


class LuminaLatentCachingOptions(Options, title=NAME):
    """Options of lumina_cache_latents.py in addition to the shared ones."""

    vae: VaeOptions = option(settings=AE)


class LuminaTextCachingOptions(Options, title=NAME):
    """Options of lumina_cache_text_encoder_outputs.py in addition to the shared ones."""

    text: LuminaTextOptions = option(settings={"gemma2": {"required": True}})


class LuminaTrainingOptions(Options, title=NAME):
    """Options of lumina_train_network.py in addition to those of all image trainers."""

    dit: Path | None = option(name="pretrained_model_name_or_path", facts=FREE)
    dit_dtype: str | None = dit_dtype_option()
    ae: Path | None = option(AE_HELP, facts=FREE, often=True)  # read as --vae
    vae: VaeOptions = option(facts=FREE, without=("vae",))
    text: LuminaTextOptions = option(facts=FREE)
    use_flash_attn: bool = option("--flash_attn", facts=FREE)
    use_sage_attn: bool = option("SageAttention: for generation only, rejected here", facts=FREE)
    sample_batch_size = not_needed(
        "samples are made one after the other, so that none depends on another.",
        "sample prompts at once",
        type=int,
    )


class LuminaGenerationOptions(Options, title=NAME):
    """Options of lumina_generate_image.py in addition to the shared ones."""

    dit: Path | None = option(
        "transformer checkpoint; an all-in-one file too",
        flags=("--dit", "--pretrained_model_name_or_path"),
        often=True,
    )
    dit_dtype: str | None = dit_dtype_option()
    vae: VaeOptions = option(facts=DECODING_SETTING, settings=AE)
    text: LuminaTextOptions
    add_system_prompt_to_negative_prompt: bool = option("put the system prompt before negative prompts too")
    cfg_trunc_ratio: float = option(
        "leave guidance out once the noisy image contains this share of data, 0 to 1; 1 keeps guidance to "
        "the end (--ctr in a prompt line)",
        default=CFG_TRUNC_RATIO,
        facts=make_request_facts("cfg_trunc_ratio"),
    )
    renorm_cfg: float = option(
        "largest norm of a guided prediction, as a multiple of the norm without guidance; 0: no limit "
        "(--rcfg in a prompt line)",
        default=RENORM_CFG,
        facts=make_request_facts("renorm_cfg"),
    )

    def __post_init__(self) -> None:
        check_trunc_ratio(self.cfg_trunc_ratio, "--cfg_trunc_ratio")
        check_renorm(self.renorm_cfg, "--renorm_cfg")


def check_trunc_ratio(ratio: float, option: str) -> None:
    """Raise OptionError unless a ratio is between 0 and 1."""
    if not 0 <= ratio <= 1:
        raise OptionError(
            f"{option} {ratio:g}: pass a share from 0 to 1; guidance ends when the image contains so much. "
            "0.25 is usual, 1 keeps guidance to the end"
        )


def check_renorm(limit: float, option: str) -> None:
    """Raise OptionError unless a norm limit is between 0 and 1000."""
    if not 0 <= limit <= 1000:
        raise OptionError(f"{option} {limit:g}: use a number from 0 (no limit) to 1000; 1 is usual")


def translate_training(args: argparse.Namespace) -> None:
    """Translate Lumina's option names to the shared ones; raise OptionError for SageAttention."""
    if args.use_sage_attn:
        raise OptionError(
            "--use_sage_attn: SageAttention has no backward pass, so nothing would be learned: it is for "
            "generation only. Use --use_flash_attn, or omit it"
        )
    if args.use_flash_attn and not args.flash_attn:
        args.flash_attn = True
        args.typed_names = {**typed_names(args), "--flash_attn": "--use_flash_attn"}
    take_ae(args)


# of `ImageTrainerDefaults`, in the scripts that train
TRAINER: Mapping[str, Any] = {
    "timestep_sampling": "shift",
    "discrete_flow_shift": 6.0,
    "model_prediction_type": "raw",
    "samplers": ("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"),
    "translate": translate_training,
    "tokenizers": {"gemma2_tokenizer": "google_gemma-2-2b"},
}


def caching_options(options: LuminaTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    return {"--ae": options.vae.vae or Placeholder("AE_FILE")}, _list_text_options(options.text)


def generation_options(options: LuminaTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options that generate `sample` with a training run's models, by option name."""
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        "--ae": options.vae.vae or Placeholder("AE_FILE"),
        "--vae_dtype": options.vae.vae_dtype,
        "--text_encoder_dtype": options.text.text_encoder_dtype,
        **_list_text_options(options.text),
        **list_guidance_options(sample),
    }


def list_guidance_options(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the guidance options with which a training sample was generated."""
    extra = sample.get("extra") or {}
    return {f"--{option}": extra.get(name) for option, name in EXTRAS.items()}


def _list_text_options(text: LuminaTextOptions) -> dict[str, Any]:
    return {
        "--gemma2": text.gemma2 or Placeholder("GEMMA2_FILE"),
        "--gemma2_tokenizer": text.gemma2_tokenizer,
        "--gemma2_max_token_length": text.gemma2_max_token_length,
        "--system_prompt": text.system_prompt or None,
    }

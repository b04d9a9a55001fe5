"""FLUX.1's and Chroma's own options for caching, training and generation."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.limits import MAX_BLOCKS
from modules.option_values import Placeholder
from modules.options import (
    DECODING_SETTING,
    FREE,
    HABIT,
    IDENTITY,
    NO_PIXELS,
    Options,
    not_needed,
    option,
    unsupported,
)
from modules.speed_options import (
    AE,
    AE_HELP,
    BASE_FORMS,
    VaeOptions,
    dit_dtype_option,
    fp8_text_option,
    take_ae,
    text_form_option,
)

logger = logging.getLogger(__name__)

FLUX, CHROMA = "flux", "chroma"  # values of --model_type
DEFAULT_GUIDANCE = 3.5  # default of the embedded guidance, in training and in generation
MAX_TOKENS = 512  # that T5 was trained to read


NAME = "FLUX.1 and Chroma"
_TOKENIZER = "tokenizer: folder or file; default: in or next to the encoder's folder, else from the hub"


class FluxTextOptions(Options):
    """Files and settings of the two text encoders and their tokenizers."""

    clip_l: Path | None = option("CLIP-L text encoder: file or folder; Chroma has none", often=True)
    clip_l_tokenizer: Path | None = option(_TOKENIZER)
    t5xxl: Path | None = option("T5-XXL text encoder: file or folder", often=True)
    t5xxl_tokenizer: Path | None = option(_TOKENIZER)
    text_encoder_dtype: str | None = option(
        "dtype of both encoders; default: bfloat16, but float32 if the transformer is float32, or for a "
        "training with --mixed_precision no"
    )
    in_fp8: bool = fp8_text_option(
        "fp8_t5", "T5's linear layers in fp8: half the memory of bf16, slightly different states"
    )
    text_encoder_form: str | None = text_form_option()
    t5xxl_max_token_length: int | None = option(
        "tokens that T5 reads; default: 512, for schnell 256",
        minimum=2,
        maximum=MAX_TOKENS,
        hint="tokens of T5 with the end token; 512 for dev and Chroma, 256 for schnell",
    )
    apply_t5_attn_mask: bool = option(
        "leave the padding behind a text out of T5's and of the transformer's attention; always so for Chroma"
    )


def _model_type() -> Any:
    return option(  # the transformer's file says it too
        "kind of model; not needed if the transformer's file says it",
        default=FLUX,
        choices=(FLUX, CHROMA),
        facts={**FREE, **NO_PIXELS},
    )


# of `ImageTrainerDefaults`, in the scripts that train
TRAINER: Mapping[str, Any] = {
    "timestep_sampling": "sigma",
    "discrete_flow_shift": 3.0,
    "model_prediction_type": "sigma_scaled",
    "guidance_scale": DEFAULT_GUIDANCE,
    "translate": take_ae,
    "tokenizers": {
        "clip_l_tokenizer": "openai_clip-vit-large-patch14",
        "t5xxl_tokenizer": "google_t5-v1_1-xxl",
    },
}
CONTROL_NET = "--controlnet_model_name_or_path"


def _control_net(about: str) -> Any:
    return option(about, name=CONTROL_NET[2:], facts=HABIT)


class FluxLatentCachingOptions(Options, title=NAME):
    """Options of flux_cache_latents.py in addition to the shared ones."""

    vae: VaeOptions = option(settings=AE)
    controlnet: Path | None = _control_net(
        "encode the tables' control images too, for a training with this ControlNet; only its name is used"
    )
    control_pictures: bool = option("encode the tables' control images too, for flux_train_control_net.py")


class FluxTextCachingOptions(Options, title=NAME, must_give=True):
    """Options of flux_cache_text_encoder_outputs.py in addition to the shared ones."""

    model_type: str = _model_type()
    text: FluxTextOptions

    def __post_init__(self) -> None:
        if self.text.t5xxl is None:
            raise OptionError("--t5xxl is needed: T5 encodes the captions")
        if self.model_type == FLUX and self.text.clip_l is None:
            raise OptionError(
                "--clip_l is needed: CLIP-L encodes the captions too. Captions for Chroma, which has none, "
                "are encoded with --model_type chroma"
            )


class FluxLearningOptions(Options, title=NAME):
    """Options of the training scripts in addition to the shared ones."""

    # resume compares its name
    dit: Path | None = option(name="pretrained_model_name_or_path", facts=FREE)
    dit_dtype: str | None = dit_dtype_option()
    model_type: str = _model_type()
    ae: Path | None = option(AE_HELP, facts=FREE, often=True)  # read as --vae
    vae: VaeOptions = option(facts=FREE, without=("vae",))
    text: FluxTextOptions = option(facts=HABIT)
    embedded_guidance: float = option(name="guidance_scale", facts=HABIT)
    controlnet: Path | None = _control_net(
        "ControlNet of FLUX.1 to train with: frozen; its output for the tables' control images is "
        "added after the blocks; a folder in diffusers' layout, its file, or owner/name of the hub"
    )


class FluxTrainingOptions(FluxLearningOptions, title=NAME):
    """Options of flux_train_network.py in addition to the shared ones."""

    split_mode = unsupported(
        "training both at once takes as little memory with --blocks_to_swap. Use that",
        "train double and single blocks apart",
    )


class OlderSwappingOptions(Options):
    """Older options of FLUX's trainers, whose values `translate_older_options` adds to --blocks_to_swap."""

    double_blocks_to_swap: int | None = option(
        "added to --blocks_to_swap, which replaces it", minimum=0, facts=FREE
    )
    single_blocks_to_swap: int | None = option(
        "half of it is added to --blocks_to_swap, as a single block is half as large", minimum=0, facts=FREE
    )


class FluxFullTrainingOptions(OlderSwappingOptions, FluxLearningOptions, title=NAME):
    """Options of flux_train.py in addition to the shared ones."""


DOUBLE_LAYERS, SINGLE_LAYERS = 4, 0  # default sizes of a new ControlNet
_COPIES = "a ControlNet is a copy of the transformer's first blocks, and has no such setting. Omit it"
# settings of `training.image_options.control_net_trainer`
CONTROL_NET_REJECTED: Mapping[str, str] = {
    "network_dim": _COPIES,
    "network_dropout": _COPIES,
    "network_weights": f"Pass the ControlNet to start from to {CONTROL_NET}",
    "shard_base": "a ControlNet begins as a copy of the transformer's weights, of which each process would "
    "have a part. Omit it; --blocks_to_swap saves memory",
    "context_parallel": "each process would compute the whole ControlNet, for all tokens. Omit it; "
    "--blocks_to_swap and --gradient_checkpointing save memory",
    **dict.fromkeys(
        ("full_bf16", "full_fp16"),
        "a ControlNet's weights learn in float32. Omit it; --optimizer_type AdamW8bit, or Adafactor "
        "with --fused_backward_pass, takes less memory",
    ),
    "fp8_base_unet": "it is --fp8_base, which rounds the weights of which a ControlNet begins as a copy. "
    "Omit it; --blocks_to_swap saves memory",
    **{
        switch: f"a ControlNet begins as a copy of the transformer's weights, and {form.name} rounds them. "
        "Omit it; --blocks_to_swap saves memory"
        for form in BASE_FORMS
        for switch in form.switches
    },
}


class FluxControlNetTrainingOptions(OlderSwappingOptions, FluxLearningOptions, title=NAME):
    """Options of flux_train_control_net.py in addition to the shared ones."""

    controlnet: Path | None = option(
        "ControlNet to start from: a folder in diffusers' layout, its file, or owner/name of the hub; "
        "default: a copy of the transformer's first blocks",
        name=CONTROL_NET[2:],
        facts=FREE,
        often=True,
    )
    num_double_layers: int | None = option(
        f"double blocks that a new ControlNet copies; default: {DOUBLE_LAYERS}",
        minimum=1,
        maximum=MAX_BLOCKS,
        facts=IDENTITY,
    )
    num_single_layers: int | None = option(
        f"single blocks that it copies too; default: {SINGLE_LAYERS}",
        minimum=0,
        maximum=MAX_BLOCKS,
        facts=IDENTITY,
    )
    gradient_checkpointing: bool = option(name="gradient_checkpointing", facts=FREE)
    mem_eff_save = not_needed("files are always written tensor by tensor.")

    @property
    def double_blocks(self) -> int:
        """Return the number of double blocks that a new ControlNet copies."""
        return DOUBLE_LAYERS if self.num_double_layers is None else self.num_double_layers

    @property
    def single_blocks(self) -> int:
        """Return the number of single blocks that a new ControlNet copies."""
        return SINGLE_LAYERS if self.num_single_layers is None else self.num_single_layers


class FluxGenerationOptions(Options, title=NAME):
    """Options of flux_generate_image.py in addition to the shared ones."""

    dit: Path | None = option(
        "transformer checkpoint",
        flags=("--dit", "--pretrained_model_name_or_path", "--ckpt_path"),
        often=True,
    )
    dit_dtype: str | None = dit_dtype_option()
    model_type: str = _model_type()
    vae: VaeOptions = option(facts=DECODING_SETTING, settings=AE)
    text: FluxTextOptions
    controlnet: Path | None = option(
        "ControlNet of FLUX.1, which follows --control_image: a folder in diffusers' layout, its file, or "
        "owner/name of the hub",
        name=CONTROL_NET[2:],
        needs="control_image",
    )
    control_image: Path | None = option(
        f"control image for {CONTROL_NET}", needs=CONTROL_NET[2:], place="file"
    )
    control_multiplier: float = option(
        f"strength of {CONTROL_NET}",
        default=1.0,
        minimum=-10,
        maximum=10,
        hint="1 is usual",
        needs=CONTROL_NET[2:],
    )


def translate_older_options(args: argparse.Namespace) -> None:
    """Translate --double_blocks_to_swap, --single_blocks_to_swap and --ae to --blocks_to_swap and --vae.

    Raises OptionError if an option is given under its old and its new name.
    """
    older_values = {name: getattr(args, name) for name in ("double_blocks_to_swap", "single_blocks_to_swap")}
    typed = " ".join(f"--{name} {number}" for name, number in older_values.items() if number is not None)
    if typed and args.blocks_to_swap is not None:
        raise OptionError(
            f"{typed} with --blocks_to_swap {args.blocks_to_swap}: both mean the same. Pass "
            "--blocks_to_swap alone"
        )
    if typed:
        # --blocks_to_swap counts double blocks; a single block is half as large
        blocks = (older_values["double_blocks_to_swap"] or 0) + (
            older_values["single_blocks_to_swap"] or 0
        ) // 2
        logger.info("%s is read as --blocks_to_swap %d.", typed, blocks)
        args.blocks_to_swap = blocks
    take_ae(args)


def caching_options(options: FluxLearningOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    latents = {
        "--ae": options.vae.vae or Placeholder("AE_FILE"),
        CONTROL_NET: options.controlnet,
        "--control_pictures": isinstance(options, FluxControlNetTrainingOptions),
    }
    return latents, _list_text_options(options)


def generation_options(options: FluxLearningOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options that generate `sample` with a training run's models, by option name."""
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        "--ae": options.vae.vae or Placeholder("AE_FILE"),
        **_list_text_options(options),
        "--dit_dtype": options.dit_dtype,
        "--embedded_cfg_scale": sample.get("embedded_guidance"),
        "--prompt_2": sample.get("second_prompt"),
    }


def _list_text_options(options: FluxLearningOptions) -> dict[str, Any]:
    text = options.text
    is_chroma = options.model_type == CHROMA
    return {
        "--t5xxl": text.t5xxl or Placeholder("T5_FILE"),
        "--t5xxl_tokenizer": text.t5xxl_tokenizer,
        "--clip_l": None if is_chroma else text.clip_l or Placeholder("CLIP_FILE"),
        "--clip_l_tokenizer": None if is_chroma else text.clip_l_tokenizer,
        "--model_type": CHROMA if is_chroma else None,
        "--t5xxl_max_token_length": text.t5xxl_max_token_length,
        "--apply_t5_attn_mask": text.apply_t5_attn_mask,
    }

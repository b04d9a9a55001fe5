"""Anima's own options for caching, training and generation. Standard library only."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.command import did_you_mean
from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import DECODING_SETTING, FREE, HABIT, IDENTITY, Options, not_needed, option, unsupported
from modules.parser import typed_names
from modules.speed_options import (
    GENERATION_VALUES,
    TRAINING_FLAGS,
    VaeOptions,
    dit_dtype_option,
    fp8_text_option,
    text_form_option,
)

NAME = "Anima"
MAX_TOKENS = 512  # default maximum number of tokens, for either tokenizer
MAX_QWEN3_TOKENS = 4096
FLOW_SHIFT = 3.0  # default for generations and samples
GUIDANCE_SCALE = 4.0
STEPS = 30
ATTENTION = ("torch", "xformers", "flash", "sageattn", "sdpa")  # values of --attn_mode in training
# learning rates of the parts of a transformer in full training: option -> substring of parameter names; the
# first match counts
PARTS = {
    "llm_adapter_lr": "llm_adapter.",
    "mod_lr": "adaln_modulation",
    "self_attn_lr": ".self_attn.",
    "cross_attn_lr": ".cross_attn.",
    "mlp_lr": ".mlp.",
}
_FULL_TRAINING_ONLY = (
    "it is for anima_train.py, which trains the whole transformer. --network_args network_reg_lrs gives "
    "rates to parts of a LoRA"
)


class AnimaVaeOptions(Options):
    """Options of the VAE: its path, dtype and tiling."""

    file: VaeOptions = option(
        facts=DECODING_SETTING, settings={"vae": {"help": "Qwen-Image's VAE: file or folder"}}
    )
    vae_chunk_size = not_needed(
        "an image goes through the VAE at once; --vae_tiling takes less memory.", type=int
    )
    vae_disable_cache = not_needed("an image has one frame, for which the VAE keeps nothing.")


class AnimaTextOptions(Options):
    """Options of the Qwen3 text encoder and of T5's tokenizer."""

    text_encoder_tokenizer: Path | None = option(
        "Qwen3's tokenizer: folder or file; default: in or next to the encoder's folder, else from the hub",
        name="qwen3_tokenizer",
    )
    t5_tokenizer_path: Path | None = option(
        "T5's tokenizer (the model has no weights of T5): folder or file; default: t5_tokenizer next to the "
        "text encoder, else from the hub"
    )
    qwen3_max_token_length: int = option(
        "tokens of a prompt that Qwen3 reads", default=MAX_TOKENS, minimum=1, maximum=MAX_QWEN3_TOKENS
    )
    t5_max_token_length: int = option(
        "tokens of a prompt that the adapter reads, with T5's end token; the model has rows for 512",
        default=MAX_TOKENS,
        minimum=1,
        maximum=MAX_TOKENS,
    )
    text_encoder_dtype: str | None = option(
        "dtype that the text encoder computes in; default: bfloat16, but float32 with a float32 model, or "
        "for a training with --mixed_precision no"
    )
    in_fp8: bool = fp8_text_option(
        "fp8_text_encoder",
        "the encoder's linear layers in fp8: half the memory, slightly different states",
    )
    text_encoder_form: str | None = text_form_option()
    text_encoder_cpu: bool = option("run the text encoder on the CPU")

    def as_options(self) -> dict[str, Any]:
        """Return the text encoder options, by flag, for a printed command of another script."""
        return {
            "--qwen3_tokenizer": self.text_encoder_tokenizer,
            "--t5_tokenizer_path": self.t5_tokenizer_path,
            "--qwen3_max_token_length": _unless_default(self.qwen3_max_token_length),
            "--t5_max_token_length": _unless_default(self.t5_max_token_length),
            "--fp8_text_encoder": self.in_fp8,
            "--text_encoder_form": self.text_encoder_form,
        }


def _rate_option(part: str) -> Any:
    return option(
        f"learning rate of {part}; 0 does not train it; default: --learning_rate",
        minimum=0,
        below=math.inf,
        facts=HABIT,
    )


_QWEN3 = "Qwen3 (0.6B, base) text encoder: file or folder"
_ADAPTER = (
    "file of the adapter, instead of the one in the transformer's file, such as the folder text_conditioner "
    "of a diffusers release; default: that one"
)


class AnimaLatentCachingOptions(Options, title=NAME):
    """Options that anima_cache_latents.py adds to those shared by all model families."""

    vae: AnimaVaeOptions


class AnimaTextCachingOptions(Options, title=NAME):
    """Options that anima_cache_text_encoder_outputs.py adds to those shared by all model families."""

    qwen3: Path = option(_QWEN3, required=True, often=True)
    text: AnimaTextOptions


class AnimaLearningOptions(Options, title=NAME):
    """Options of all Anima training scripts in addition to those of all image trainers."""

    # resume compares its name
    dit: Path | None = option(name="pretrained_model_name_or_path", facts=FREE)
    dit_dtype: str | None = dit_dtype_option()
    llm_adapter_path: Path | None = option(_ADAPTER, facts=FREE)
    vae: AnimaVaeOptions = option(facts=FREE, without=("vae",))
    qwen3: Path | None = option(_QWEN3, facts=FREE, often=True)
    text: AnimaTextOptions = option(facts=FREE)
    attn_mode: str | None = option(
        "another spelling of the flags for attention: "
        + ", ".join(f"{value} is {TRAINING_FLAGS[GENERATION_VALUES[value]]}" for value in ATTENTION),
        choices=ATTENTION,
        facts=FREE,
    )
    unsloth_offload_checkpointing: bool = option(
        "--gradient_checkpointing_cpu_offload", excludes=(), facts=FREE
    )


class AnimaTrainingOptions(AnimaLearningOptions, title=NAME):
    """Options of anima_train_network.py in addition to those of all image trainers."""

    self_attn_lr = unsupported(_FULL_TRAINING_ONLY, type=float)
    cross_attn_lr = unsupported(_FULL_TRAINING_ONLY, type=float)
    mlp_lr = unsupported(_FULL_TRAINING_ONLY, type=float)
    mod_lr = unsupported(_FULL_TRAINING_ONLY, type=float)
    llm_adapter_lr = unsupported(
        "it is for anima_train.py. In a LoRA the adapter learns with --network_args "
        "train_llm_adapter=True, and network_reg_lrs='llm_adapter=1e-5' gives it a rate",
        type=float,
    )


# presets of --lllite_target_layers, and single targets in their order
PRESETS = {
    "self_attn_q": ("self_attn_q_pre",),
    "self_attn_qkv": ("self_attn_q_pre", "self_attn_kv_pre"),
    "self_attn_qkv_cross_q": ("self_attn_q_pre", "self_attn_kv_pre", "cross_attn_q_pre"),
}
TARGETS: Mapping[str, tuple[str, ...]] = {  # -> layers of a block
    "self_attn_q_pre": ("self_attn.q_proj",),
    "self_attn_kv_pre": ("self_attn.k_proj", "self_attn.v_proj"),
    "cross_attn_q_pre": ("cross_attn.q_proj",),
    "mlp_fc1_pre": ("mlp.layer1",),
}


def read_targets(text: str) -> tuple[str, ...]:
    """Return the layer targets that --lllite_target_layers selects, in the order of `TARGETS`.

    Raises OptionError for an unknown target.
    """
    chosen: set[str] = set()
    for word in text.split(","):
        name = word.strip()
        if name not in PRESETS and name not in TARGETS:
            hint = did_you_mean(name, (*PRESETS, *TARGETS))
            raise OptionError(
                f"--lllite_target_layers {text}: {name!r} is unknown.{hint} "
                f"Pass one of {', '.join(PRESETS)}, or some of {', '.join(TARGETS)} with commas between them"
            )
        chosen |= {*PRESETS.get(name, (name,))}
    return tuple(target for target in TARGETS if target in chosen)


def _size(help: str, default: int, minimum: int = 1, maximum: int = 4096) -> Any:
    return option(
        help, default=default, minimum=minimum, maximum=maximum, hint=f"{default} is usual", facts=IDENTITY
    )


class AnimaLlliteTrainingOptions(AnimaLearningOptions, title=NAME):
    """Options of anima_train_control_net_lllite.py in addition to those of all image trainers."""

    cond_emb_dim: int = _size("number of values for the control image at each token", 32)
    lllite_cond_dim: int = _size(
        "channels of the convolutions that see the control image; even", 64, minimum=2
    )
    lllite_cond_resblocks: int = _size("residual blocks among them", 1, minimum=0, maximum=64)
    lllite_use_aspp: bool = option("let them also see a wide area, by dilated convolutions", facts=IDENTITY)
    lllite_cond_in_channels: int = option(
        "channels of control images: 3, or 4 to train inpainting. Control images are then the images, and "
        "each step draws a mask, which is the fourth channel",
        default=3,
        minimum=3,
        maximum=4,
        facts=IDENTITY,
    )
    lllite_inpaint_masked_input: bool = option(
        "with --lllite_cond_in_channels 4: make control images gray where the mask marks them",
        facts=IDENTITY,
    )
    lllite_mlp_dim: int = _size("width to which the input of a layer is projected", 64)
    lllite_target_layers: str = option(
        f"layers that are changed: {', '.join(PRESETS)}; or some of {', '.join(TARGETS)}, with commas",
        default="self_attn_q",
        often=True,
        facts=IDENTITY,
    )
    lllite_dropout: float | None = option(
        "fraction of the inner values that is set to zero during training", minimum=0, below=1, facts=HABIT
    )
    lllite_multiplier: float = option(
        "strength during training",
        default=1.0,
        minimum=-10,
        maximum=10,
        hint="1 is usual",
        facts=IDENTITY,
    )
    network_weights: Path | None = option(name="network_weights", facts=FREE)

    def __post_init__(self) -> None:
        read_targets(self.lllite_target_layers)  # raises if a target is unknown
        if self.lllite_cond_dim % 2:
            raise OptionError(
                f"--lllite_cond_dim {self.lllite_cond_dim} is odd: its first convolutions have half as many "
                f"channels. Pass {self.lllite_cond_dim + 1}"
            )
        if self.lllite_inpaint_masked_input and self.lllite_cond_in_channels == 3:
            raise OptionError(
                "--lllite_inpaint_masked_input is for masks, which control images of 3 channels lack. Pass "
                "--lllite_cond_in_channels 4, or omit it"
            )
        if self.lllite_multiplier == 0:
            raise OptionError(
                "--lllite_multiplier 0: nothing would be learned. Pass another strength, or omit it"
            )


class AnimaFullTrainingOptions(AnimaLearningOptions, title=NAME):
    """Options of anima_train.py in addition to those of all image trainers."""

    self_attn_lr: float | None = _rate_option("self-attention")
    cross_attn_lr: float | None = _rate_option("attention to the text")
    mlp_lr: float | None = _rate_option("feed-forward")
    mod_lr: float | None = _rate_option("modulation by the time")
    llm_adapter_lr: float | None = _rate_option(
        "the adapter, which the model's authors advise to leave as it is: 0"
    )

    @property
    def part_rates(self) -> dict[str, float]:
        """Return the learning rates that are set, keyed by a substring of parameter names."""
        rates = {part: getattr(self, name) for name, part in PARTS.items()}
        return {part: rate for part, rate in rates.items() if rate is not None}


class AnimaGenerationOptions(Options, title=NAME):
    """Options that anima_generate_image.py adds to those shared by all model families."""

    dit: Path | None = option(
        "transformer checkpoint", flags=("--dit", "--pretrained_model_name_or_path"), often=True
    )
    dit_dtype: str | None = dit_dtype_option()
    llm_adapter_path: Path | None = option(_ADAPTER)
    vae: AnimaVaeOptions
    text_encoder: Path | None = option(_QWEN3, flags=("--text_encoder", "--qwen3"), often=True)
    text: AnimaTextOptions
    lllite_weights: Path | None = option(
        "file of a ControlNet-LLLite, which follows --control_image", place="file", needs="control_image"
    )
    control_image: Path | None = option("control image for --lllite_weights", needs="lllite_weights")
    mask_image: Path | None = option(
        "mask for --lllite_weights of inpainting: white is painted anew, the rest is that of --control_image",
        needs="lllite_weights",
    )
    lllite_multiplier: float = option(
        "strength of --lllite_weights",
        default=1.0,
        minimum=-10,
        maximum=10,
        hint="1 is usual",
        needs="lllite_weights",
    )


def translate_training(args: argparse.Namespace) -> None:
    """Set shared options from Anima's aliases --attn_mode and --unsloth_offload_checkpointing.

    Raises OptionError if two options to keep activations in host memory are given.
    """
    typed_text_by_flag = dict(typed_names(args))
    if args.attn_mode is not None:
        flag = TRAINING_FLAGS[GENERATION_VALUES[args.attn_mode]]
        setattr(args, flag.removeprefix("--"), True)
        # error messages then name the option that the user typed
        typed_text_by_flag[flag] = f"--attn_mode {args.attn_mode}"
    if args.unsloth_offload_checkpointing:
        if args.cpu_offload_checkpointing or args.blocks_to_swap:
            other = "--cpu_offload_checkpointing" if args.cpu_offload_checkpointing else "--blocks_to_swap"
            raise OptionError(f"--unsloth_offload_checkpointing and {other}: omit one of them")
        args.gradient_checkpointing_cpu_offload = True
        typed_text_by_flag["--gradient_checkpointing_cpu_offload"] = "--unsloth_offload_checkpointing"
    args.typed_names = typed_text_by_flag


TRAINER: Mapping[str, Any] = {  # defaults of both training scripts, for `ImageTrainerDefaults`
    "timestep_sampling": "sigmoid",
    "discrete_flow_shift": 1.0,
    "model_prediction_type": "raw",
    "translate": translate_training,
    "tokenizers": {"t5_tokenizer_path": "google_t5-v1_1-xxl", "qwen3_tokenizer": "Qwen_Qwen3-0.6B-Base"},
}


def caching_options(options: AnimaLearningOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options, by flag, of the latent and text caching scripts that match a training run."""
    texts = {"--qwen3": options.qwen3 or Placeholder("QWEN3_FILE"), **options.text.as_options()}
    return options.vae.file.command_options(), texts


def generation_options(options: AnimaLearningOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the command-line options, by flag, that generate `sample` with the models of a training run."""
    strength: dict[str, Any] = {}  # without one in the sample, the training's own is repeated
    multiplier = (sample.get("extra") or {}).get("control_multiplier")
    if multiplier is not None and isinstance(options, AnimaLlliteTrainingOptions):
        strength = {"--lllite_multiplier": f"{options.lllite_multiplier * float(multiplier):g}"}
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        **strength,
        "--llm_adapter_path": options.llm_adapter_path,
        **options.vae.file.command_options(),
        "--text_encoder": options.qwen3 or Placeholder("QWEN3_FILE"),
        **options.text.as_options(),
        "--dit_dtype": options.dit_dtype,
    }


def _unless_default(length: int) -> int | None:
    return None if length == MAX_TOKENS else length

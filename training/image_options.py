"""Compose the options of image trainers: those of every training, and those of the image guides.

A script calls `read_image_training` with its family's differences, then `train_network` as for video.
"""

import argparse
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dataset.options import CachingInRunOptions
from dataset.subset_options import SubsetOptions
from modules.command import name_as_typed
from modules.console_options import ConsoleOptions
from modules.errors import OptionError
from modules.option_values import to_path
from modules.options import HABIT, STARTS, Options, not_needed, option, read_options, unsupported
from modules.output_files import check_output_name
from modules.parser import Parser, add_options, typed_names
from modules.script_options import read_command_line
from protocols.new_tokens import find_error
from runtime.options import SWAPPING
from runtime.ways.composing import list_block_options, list_shared_things
from training.config_options import write_config_file
from training.features.composing import list_block_feature_options
from training.learning_options import FOLDERS, NO_CODE, ONE_FILE, SHARD_SIZE, PartsOptions
from training.noise_options import RAW, WEIGHTINGS, PredictionOptions
from training.options import (
    ScriptOption,
    TrainedNetworkOptions,
    TrainingOptions,
    fill_arguments,
    list_script_options,
    log_options_without_effect,
    training_parser,
)
from training.run_options import StartOptions

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Options)

IMAGE_SAMPLERS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift", "logsnr")
UNIFORM = "uniform"  # a --weighting_scheme that neither shapes the draws nor weights the loss, as none
TENSORRT = "tensort"  # another spelling of tensorrt that image trainers take
OPTIMIZERS = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}  # switch -> --optimizer_type
SWITCHES = {  # another name of a switch -> ours
    "cpu_offload_checkpointing": "gradient_checkpointing_cpu_offload",
    "fp8_base_unet": "fp8_base",
    # in scripts that train all weights
    "blockwise_fused_optimizers": "fused_backward_pass",
    "skip_latents_validity_check": "skip_cache_check",
    "diffusers_xformers": "xformers",
}


@dataclass(frozen=True)
class ImageTrainerDefaults:
    """Defaults and options that differ between the training scripts of image families."""

    timestep_sampling: str
    discrete_flow_shift: float
    model_prediction_type: str
    samplers: tuple[str, ...] = IMAGE_SAMPLERS  # choices of --timestep_sampling
    guidance_scale: float = 1.0  # embedded guidance, for models that have such an input
    # shared options that mean nothing for the family: name without dashes -> reason
    refused: Mapping[str, str] = field(default_factory=dict)
    # option of a text encoder's tokenizer -> its folder in --tokenizer_cache_dir
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    # copies values of the family's own option names to the shared options, before records are read
    translate: Callable[[argparse.Namespace], None] = lambda args: None
    # options that messages name -> how the script spells them
    shown_as: Mapping[str, str] = field(default_factory=dict)
    # options of other trainers that the family does not have; None: `OTHER_TRAINERS_OPTIONS`
    foreign: tuple[type[Options], ...] | None = None
    # further settings of shared options, by name, as `add_options` takes them
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # option groups of a script that trains all weights, instead of LORA_OPTIONS; None: `FULL_MODEL_OPTIONS`
    whole: tuple[type[Options], ...] | None = None


def read_image_training(
    doc: str | None,
    record: type[R],
    defaults: ImageTrainerDefaults,
    argv: Sequence[str] | None,
    trained_options: type[Options] = TrainedNetworkOptions,
) -> tuple[TrainingOptions, R, list[ScriptOption]]:
    """Read the options of a script that trains an image model.

    Returns the options of the run, the options of the family, and a list of all options for the run's page.
    With --output_config, it writes that file and exits.

    Args:
        doc: Docstring of the script.
        record: Class of the family's own options. --pretrained_model_name_or_path and --vae are declared here
            and fill fields of the record with these option names.
        defaults: Differences between image families.
        argv: Command line; None for the command line of the process.
        trained_options: Class of the options for what is trained; by default a network such as a LoRA.
    """
    command = read_command_line(argv, partial(_build_parser, doc, record, defaults, trained_options))
    parser = command.parser
    args = fill_arguments(command)
    read_options(ConsoleOptions, args).apply()
    if args.output_config:
        _write_config_and_exit(parser, args)
    _apply_alternative_names(args)
    defaults.translate(args)
    args.typed_names = {**typed_names(args), **defaults.shown_as}
    _find_tokenizers(args, defaults.tokenizers)
    # printed commands use these names instead of the alternative ones
    for name in _options_set_by_alias(args, defaults.tokenizers):
        parser.typed_flags.setdefault(name, f"--{name}")
    with name_as_typed(typed_names(args)):
        options = read_options(TrainingOptions, args)
        family_options = read_options(record, args)
        if args.options_of_file:
            log_options_without_effect(args, options, family_options)
    if options.predicted != RAW:
        logger.warning(
            "--model_prediction_type %s compares something else than the velocity with the velocity, as "
            "known trainers do. Use raw, unless you continue with what was trained so.",
            options.predicted,
        )
    return options, family_options, list_script_options(parser, family_options, options)


def _build_parser(
    doc: str | None, record: type[Options], defaults: ImageTrainerDefaults, trained_options: type[Options]
) -> Parser:
    """Return a parser with the options of every image trainer and the options of one model family."""
    parser = image_training_parser(doc, defaults, trained_options)
    add_options(parser, record)
    return parser


class ImageModelOptions(Options, title="model"):
    """Model files; each family's options record reads its own."""

    pretrained_model_name_or_path: Path | None = option(
        "checkpoint of the model that is trained, with its transformer or U-Net", often=True
    )
    vae: Path | None = option("checkpoint of the VAE")


class OtherNames(Options, title="other names"):
    """Alternative names of options; `_apply_alternative_names` moves their values to the main names."""

    use_8bit_adam: bool = option("--optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option("--optimizer_type Lion")
    torch_compile: bool = option("compile the blocks with --dynamo_backend (inductor)")
    cpu_offload_checkpointing: bool = option("--gradient_checkpointing_cpu_offload")
    fp8_base_unet: bool = option("--fp8_base: the transformer in fp8, the text encoders in 16 bits")
    caption_extention: str | None = option("another spelling of --caption_extension")
    tokenizer_cache_dir: Path | None = option(
        "folder with a folder for each tokenizer, as other trainers keep them: "
        "openai_clip-vit-large-patch14, google_t5-v1_1-xxl, google_gemma-2-2b, Qwen_Qwen2.5-VL-7B-Instruct"
    )
    output_config: bool = option(
        "write the options that differ from their defaults to --config_file, then exit"
    )


def image_training_parser(
    doc: str | None, defaults: ImageTrainerDefaults, trained_options: type[Options] = TrainedNetworkOptions
) -> Parser:
    """Return a parser with all options that every image trainer has.

    Args:
        doc: The script's docstring.
        defaults: Differences between image families.
        trained_options: Record with the options of what is trained: a network, or a whole model.
    """
    default = {
        "timestep_sampling": defaults.timestep_sampling,
        "model_prediction_type": defaults.model_prediction_type,
        "discrete_flow_shift": defaults.discrete_flow_shift,
        "guidance_scale": defaults.guidance_scale,
        "weighting_scheme": UNIFORM,
    }
    choices = {"timestep_sampling": defaults.samplers, "weighting_scheme": (*WEIGHTINGS, UNIFORM)}
    settings = {name: {"choices": values} for name, values in choices.items()} | dict(defaults.settings)
    script: dict[str, Any] = {"defaults": default, "refused": defaults.refused}
    parser = training_parser(doc, trained_options, settings=settings, **script)
    record_classes: tuple[type[Options], ...] = LORA_OPTIONS
    if trained_options is not TrainedNetworkOptions:
        record_classes = FULL_MODEL_OPTIONS if defaults.whole is None else defaults.whole
    add_options(parser, ImageModelOptions, *record_classes, PredictionOptions, **script)
    add_options(parser, SubsetOptions, CachingInRunOptions, **script)
    foreign = OTHER_TRAINERS_OPTIONS if defaults.foreign is None else defaults.foreign
    add_options(parser, StartOptions, ConsoleOptions, OtherNames, *foreign, **script)
    # Let --dynamo_backend accept TensorRT, and set its default, which only acts with --torch_compile
    (action,) = (action for action in parser._actions if action.dest == "dynamo_backend")
    action.choices = (*(action.choices or ()), TENSORRT)
    action.not_given = "NO"  # type: ignore[attr-defined]  # the launcher's setting
    parser.set_defaults(dynamo_backend="inductor")
    return parser


def _apply_alternative_names(args: argparse.Namespace) -> None:
    """Move the values of alternative option names, in `args`, to the options that the records read."""
    for switch, optimizer in OPTIMIZERS.items():
        if not getattr(args, switch):
            continue
        if args.optimizer_type:
            raise OptionError(
                f"--{switch} is --optimizer_type {optimizer}, but --optimizer_type {args.optimizer_type} "
                "is given too: pass one of them"
            )
        args.optimizer_type = optimizer
    names = dict(typed_names(args))
    for alternative_name, name in SWITCHES.items():
        if getattr(args, alternative_name, False) and not getattr(args, name):
            setattr(args, name, True)
            names[f"--{name}"] = f"--{alternative_name}"
    args.typed_names = names
    # --fp8_scaled alone asks for 8-bit weights too
    args.fp8_base = args.fp8_base or args.fp8_scaled
    if args.caption_extention is not None:
        # Set --caption_extension from its misspelled alias; raise OptionError if both are given and differ
        default = SubsetOptions.from_defaults().caption_extension
        if args.caption_extension not in (default, args.caption_extention):
            raise OptionError(
                f"--caption_extention {args.caption_extention} is --caption_extension, which is "
                f"{args.caption_extension}: pass one of them"
            )
        logger.info("--caption_extention is read as --caption_extension")
        args.caption_extension = args.caption_extention
    # Set options that follow from others: intervals of samples, the compiler, dtype of text encoders
    if args.sample_every_n_epochs is not None and args.sample_every_n_steps is not None:
        logger.info("--sample_every_n_steps is ignored because --sample_every_n_epochs comes first.")
        args.sample_every_n_steps = None
    if args.torch_compile and args.dynamo_backend.lower() == "no":
        args.dynamo_backend = "inductor"
    elif args.dynamo_backend == TENSORRT:
        args.dynamo_backend = "tensorrt"
    # as other trainers do: in bfloat16 the outputs of T5 differ by 3 to 5 %, those of Gemma by 1 %
    if args.mixed_precision == "no" and getattr(args, "text_encoder_dtype", "") is None:
        args.text_encoder_dtype = "float32"


def _options_set_by_alias(args: argparse.Namespace, tokenizers: Collection[str]) -> set[str]:
    """Return the options whose values were set by an alternative name in `OtherNames`."""
    names = {name for other_name, name in SWITCHES.items() if getattr(args, other_name, False)}
    if any(getattr(args, other_name) for other_name in OPTIMIZERS):
        names.add("optimizer_type")
    if args.caption_extention is not None:  # the misspelled alias of sd-scripts
        names.add("caption_extension")
    if args.tokenizer_cache_dir is not None:  # gives the folders of all tokenizers at once
        names |= {*tokenizers}
    return names


def _find_tokenizers(args: argparse.Namespace, folder_by_option: Mapping[str, str]) -> None:
    """Point each tokenizer option without a value to its folder in --tokenizer_cache_dir."""
    if args.tokenizer_cache_dir is None or not folder_by_option:
        return
    cache = to_path("--tokenizer_cache_dir", args.tokenizer_cache_dir)
    if cache.is_file():
        raise OptionError(f"--tokenizer_cache_dir {cache}: it is a file. Pass the folder of the tokenizers")
    for option_name, folder in folder_by_option.items():
        if getattr(args, option_name) is None and (cache / folder).is_dir():
            setattr(args, option_name, str(cache / folder))
    if not any((cache / folder).is_dir() for folder in folder_by_option.values()):
        logger.warning(
            "--tokenizer_cache_dir %s has no folder %s: tokenizers are looked for next to the text encoders, "
            "then on the hub, and nothing is kept in that folder. HF_HOME moves the hub's cache.",
            cache,
            " or ".join(folder_by_option.values()),
        )


def _write_config_and_exit(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Write the options that differ from their defaults to the file of --config_file, and exit."""
    if args.config_file is None:
        raise OptionError("--output_config writes to the file that --config_file names: pass both")
    name = args.config_file if args.config_file.endswith(".toml") else f"{args.config_file}.toml"
    path = Path(to_path("--config_file", name))
    values: dict[str, Any] = {}
    for action in parser._actions:
        if action.dest in {"config_file", "output_config", "help"}:
            continue
        value = getattr(args, action.dest)
        is_typed_only = getattr(action, "reach", "") == STARTS["reach"]  # a file must not start programs
        if is_typed_only and value is not None:
            logger.warning("--%s is not written into the file: it is only taken if it is typed.", action.dest)
        elif value not in (None, False, action.default):
            values[action.dest] = value
    write_config_file(path, values)
    logger.info("Options written to %s.", path)
    raise SystemExit(0)


EPSILON = "it is for models that predict noise, such as Stable Diffusion; a flow model has no such schedule"
OFFSET = "it is for models that predict noise, such as Stable Diffusion; a flow learns brightness without it"
CLIP = "it is for the text encoders of Stable Diffusion"
DEEPSPEED = (
    f"DeepSpeed is not used. Processes of accelerate launch share {list_shared_things()}; --blocks_to_swap, "
    "--gradient_checkpointing and --fp8_base save memory"
)
ROUNDING = "a LoRA's weights are kept in float32, which costs little; use --mixed_precision."
# fmt: off
SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++",
    "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)
# fmt: on


class OtherModels(Options, title="for other models"):
    """Options of Stable Diffusion trainers that have no effect on other models."""

    v2 = unsupported(CLIP)
    v_parameterization = unsupported(EPSILON)
    clip_skip = unsupported(CLIP, type=int)
    max_token_length = unsupported(CLIP, type=int, choices=(150, 225))
    weighted_captions = unsupported(
        "these models are trained with whole sentences; weights of words are for generation only"
    )
    noise_offset = unsupported(OFFSET, type=float)
    noise_offset_random_strength = unsupported(OFFSET)
    multires_noise_iterations = unsupported(OFFSET, type=int)
    multires_noise_discount = unsupported(OFFSET, type=float, default=0.3)
    adaptive_noise_scale = unsupported(OFFSET, type=float)
    zero_terminal_snr = unsupported(EPSILON)
    min_snr_gamma = unsupported(EPSILON, type=float)
    scale_v_pred_loss_like_noise_pred = unsupported(EPSILON)
    v_pred_like_loss = unsupported(EPSILON, type=float)
    debiased_estimation_loss = unsupported(EPSILON)


class DeepspeedOptions(Options, title="DeepSpeed"):
    """Options of trainers that use DeepSpeed."""

    deepspeed = unsupported(DEEPSPEED)
    zero_stage = unsupported(DEEPSPEED, type=int, default=2, choices=(0, 1, 2, 3))
    offload_optimizer_nvme_path = unsupported(DEEPSPEED, type=str)
    offload_param_device = unsupported(DEEPSPEED, choices=("cpu", "nvme"))
    offload_param_nvme_path = unsupported(DEEPSPEED, type=str)
    zero3_init_flag = unsupported(DEEPSPEED)
    zero3_save_16bit_model = unsupported(DEEPSPEED)
    fp16_master_weights_and_gradients = unsupported(DEEPSPEED)


class NotNeeded(Options, title="not needed"):
    """Options of other trainers for behavior that is always enabled here."""

    lowram = not_needed("weights are read in pieces, straight to the device.")
    highvram = not_needed("no cache of the device is emptied between steps.")
    mem_eff_attn = not_needed("torch's own attention (--sdpa) is as lean.", "attention in pieces")
    disable_mmap_load_safetensors = not_needed("safetensors files are read in pieces, never mapped.")


class NotNeededByFlows(Options, title="not needed"):
    """Options of flow model trainers for behavior that is always enabled here."""

    no_half_vae = not_needed("the VAE's precision is chosen so that nothing overflows.", "VAE in float32")
    sample_sampler = not_needed(
        "samples are made with the Euler steps of the model's own flow.",
        "solver of samples",
        values=("euler", "k_euler"),
        default="ddim",
        choices=SAMPLERS,
    )


CODE = "only safetensors files are written: other forms can hold code"


class UnsupportedLoraFileOptions(Options, title="not built"):
    """Unsupported options of other trainers for the format and dtype of LoRA files."""

    save_model_as = unsupported(CODE, default="safetensors", choices=("ckpt", "pt", "safetensors"))
    offload_optimizer_device = unsupported(DEEPSPEED, choices=("cpu", "nvme"))
    full_fp16 = not_needed(ROUNDING, "train in fp16")
    full_bf16 = not_needed(ROUNDING, "train in bf16")


_TEXTS_STAY = "the text encoders are not trained. Omit it, or train a LoRA"


class ManyWeightsOptions(Options, title="many weights"):
    """Options of image trainers for runs that train more weights than a LoRA has."""

    blockwise_fused_optimizers: bool = option(
        "--fused_backward_pass, which steps each weight separately instead of each block"
    )
    skip_latents_validity_check: bool = option("--skip_cache_check")
    fused_optimizer_groups = not_needed(
        "--fused_backward_pass steps each weight by itself, which takes less memory than groups of weights.",
        type=int,
    )
    use_safetensors = not_needed("only safetensors files are written.")


class UnsupportedInFullFineTuning(ManyWeightsOptions, title="full fine-tuning"):
    """Options that full fine-tuning rejects: unsupported ones, and those that apply only to LoRAs."""

    network_train_unet_only = not_needed("the text encoders are not trained.")
    network_train_text_encoder_only = unsupported(_TEXTS_STAY)
    unet_lr = unsupported("the rate of the transformer is that of --learning_rate. Pass it there", type=float)
    text_encoder_lr = unsupported(_TEXTS_STAY, nargs="*", type=float)


# options that image trainers have only for LoRAs, only for whole models, and those of other trainers
LORA_OPTIONS = (PartsOptions, UnsupportedLoraFileOptions)
FULL_MODEL_OPTIONS = (UnsupportedInFullFineTuning,)
OTHER_TRAINERS_OPTIONS = (OtherModels, DeepspeedOptions, NotNeeded, NotNeededByFlows)


class NotForNoise(Options, title="not built"):
    """Unsupported options of other trainers, which are rejected for models that predict noise."""

    weighted_captions = unsupported(
        "captions are read as they are; weights of words are for generation (gen_img.py)"
    )


_FLOW_ONLY = "it is for models that learn a flow, and this one learns 1000 discrete levels of noise"
_TRANSFORMER_ONLY = (
    "it acts between the blocks of a transformer, and the parts of a U-Net hand on features of several "
    "sizes. --gradient_checkpointing and --fp8_base save memory"
)
_rejected_by_noise = {
    **dict.fromkeys(
        (
            *("discrete_flow_shift", "sigmoid_scale", "weighting_scheme", "logit_mean", "logit_std"),
            *("mode_scale", "model_prediction_type", "guidance_scale"),
        ),
        _FLOW_ONLY,
    ),
    **dict.fromkeys(
        (
            *(*SWAPPING, "use_pinned_memory_for_block_swap"),
            *(*list_block_options(), *list_block_feature_options()),
        ),
        _TRANSFORMER_ONLY,
    ),
}


def apply_sd_scripts_defaults(args: argparse.Namespace) -> None:
    """Interpret two options as sd-scripts does.

    Equal minimum and maximum timesteps select this one timestep. The default --output_name is "last".
    """
    if args.output_name is None and args.output_dir is not None:
        args.output_name = UNNAMED
        logger.info("Without --output_name the trained file is called %s, as known trainers do.", UNNAMED)
    lowest, highest = args.min_timestep, args.max_timestep
    if lowest is not None and lowest == highest:
        args.max_timestep = lowest + 1


class FullCheckpointOptions(Options, title="full fine-tuning"):
    """Options for training a full checkpoint with its text encoders, and LoRA options that it rejects."""

    fused_optimizer_groups: int | None = option(
        "--fused_backward_pass, which steps each weight separately instead of groups of weights",
        minimum=0,
        facts=HABIT,
    )
    diffusers_xformers: bool = option("--xformers")
    use_safetensors = not_needed("only safetensors files are written.")
    network_train_unet_only = not_needed("the U-Net learns, and text encoders on request.")
    network_train_text_encoder_only = unsupported(
        "it is of LoRAs. Omit it; --learning_rate 0 freezes the U-Net of a whole checkpoint"
    )
    unet_lr = unsupported("it is of LoRAs. Pass the rate of the U-Net to --learning_rate", type=float)
    text_encoder_lr = unsupported(
        "it is of LoRAs. Pass the rates of text encoders to --learning_rate_te, of Stable Diffusion XL to "
        "--learning_rate_te1 and --learning_rate_te2",
        nargs="*",
        type=float,
    )


def _replace_fused_groups(args: argparse.Namespace) -> None:
    """Set --fused_backward_pass if --fused_optimizer_groups is given, which it replaces."""
    # Messages name the option that was typed.
    groups = args.fused_optimizer_groups
    if not groups:
        return
    if args.fused_backward_pass:
        raise OptionError(
            f"--fused_optimizer_groups {groups} with --fused_backward_pass: both set when weights are "
            "stepped. Pass --fused_backward_pass alone, which takes less memory"
        )
    args.fused_backward_pass = True
    args.typed_names = {
        **typed_names(args),
        "--fused_backward_pass": f"--fused_optimizer_groups {groups}",
    }
    logger.info("--fused_optimizer_groups %d is read as --fused_backward_pass.", groups)


def _read_full_checkpoint(args: argparse.Namespace) -> None:
    """Read the options for saving a full checkpoint; raise OptionError for a single file with shards."""
    if args.max_shard_size is not None and args.save_model_as not in FOLDERS:
        raise OptionError(
            f"{SHARD_SIZE} {args.max_shard_size}: ComfyUI, web UIs and diffusers read a checkpoint with "
            "these names from one file alone. Add --save_model_as diffusers, whose networks are cut, or "
            "omit it"
        )
    _replace_fused_groups(args)
    apply_sd_scripts_defaults(args)


UNNAMED = "last"  # what known trainers call a file without a name

# defaults for models that predict noise
NOISE_TRAINER = ImageTrainerDefaults(
    timestep_sampling=UNIFORM,
    discrete_flow_shift=1.0,
    model_prediction_type=RAW,
    samplers=(UNIFORM, "sigmoid"),
    refused=_rejected_by_noise,
    foreign=(NotForNoise, DeepspeedOptions, NotNeeded),
    translate=apply_sd_scripts_defaults,
)
# defaults for full fine-tuning of these models, which writes the whole checkpoint
CHECKPOINT_TRAINER = replace(
    NOISE_TRAINER,
    whole=(FullCheckpointOptions,),
    translate=_read_full_checkpoint,
    settings={
        "save_model_as": {
            "help": "form of the trained checkpoint: safetensors, one file with the released names, or "
            "diffusers, a folder in its layout, of safetensors files; default: safetensors",
            "choices": (ONE_FILE, *FOLDERS),
            "refused": NO_CODE,
        }
    },
)

_LORA_ONLY = "it is of LoRAs, and this script trains {}. "
_REJECTED_BESIDE = {
    "network_module": "Omit it",
    "network_alpha": "It has no alpha; omit it",
    "network_args": "Omit it",
    "dim_from_weights": "Omit it",
    "scale_weight_norms": "Its norms are not limited; omit it",
    "lora_format": "Its files have the names that other programs read; omit it",
    "network_train_text_encoder_only": "Text encoders have no part in it; omit it",
    "unet_lr": "Pass its rate to --learning_rate",
    "text_encoder_lr": "Text encoders have no part in it; omit it",
}


def control_trainer(network_title: str, **settings: Any) -> ImageTrainerDefaults:
    """Return the defaults of a script that trains a control network for a model with a noise schedule.

    Args:
        network_title: Name of the network, as error messages call it.
        settings: Fields of `ImageTrainerDefaults` to replace; `refused` adds more rejected options.
    """
    refused = {**_rejected_by_noise, **_list_lora_rejections(network_title), **settings.pop("refused", {})}
    return replace(NOISE_TRAINER, refused=refused, translate=_read_control_net, **settings)


def _list_lora_rejections(network_title: str) -> dict[str, str]:
    """Return the reasons why LoRA options are rejected, by option name."""
    reasons = {name: _LORA_ONLY.format(network_title) + remedy for name, remedy in _REJECTED_BESIDE.items()}
    reasons["masked_loss"] = (
        "conditioning_data_dir holds the control images here, not masks. Set mask_directory in a subset "
        "for masks of the loss"
    )
    return reasons


_TOKENS = (
    "its modules see all tokens of an image next to all of its control image, block by block. Omit it"
    "; --gradient_checkpointing and --fp8_base save memory"
)


def block_control_net_trainer(network_title: str, defaults: ImageTrainerDefaults) -> ImageTrainerDefaults:
    """Return the defaults of a script that trains a control network attached to the blocks of a transformer.

    Args:
        network_title: Name of the network, as error messages call it.
        defaults: Defaults of the script that trains LoRAs of the same family.
    """
    # such a network runs with the tokens of the blocks, so options that change how blocks run are rejected
    block_options = (
        *SWAPPING,
        "use_pinned_memory_for_block_swap",
        *list_block_options(),
        *list_block_feature_options(),
    )
    refused = {
        **dict.fromkeys((*block_options, "gradient_checkpointing_cpu_offload"), _TOKENS),
        "network_dim": "Its sizes are those of --cond_emb_dim and --lllite_...; omit it",
        "network_dropout": "Pass it to --lllite_dropout",
    }
    weights = {"network_weights": {"help": "file of a ControlNet-LLLite to start from"}}
    return replace(control_net_trainer(network_title, defaults, refused), settings=weights)


def control_net_trainer(
    network_title: str, defaults: ImageTrainerDefaults, refused: Mapping[str, str]
) -> ImageTrainerDefaults:
    """Return the defaults of a script that trains a control network for a frozen transformer.

    Args:
        network_title: Name of the network, as error messages call it.
        defaults: Defaults of the script that trains LoRAs of the same family.
        refused: Further options that the script rejects, with the reason.
    """
    reasons = {**defaults.refused, **_list_lora_rejections(network_title), **refused}
    translate = partial(_translate_without_text_encoders, defaults.translate)
    return replace(defaults, refused=reasons, translate=translate)


def _translate_without_text_encoders(
    translate: Callable[[argparse.Namespace], None], args: argparse.Namespace
) -> None:
    """Copy a family's option values to the shared options, and turn off LoRAs in text encoders."""
    translate(args)
    args.network_train_unet_only = True


def _read_control_net(args: argparse.Namespace) -> None:
    """Apply sd-scripts defaults for a control network, and turn off training of text encoders."""
    apply_sd_scripts_defaults(args)
    args.network_train_unet_only = True


LECO_RANK = 4


def leco_trainer(**settings: Any) -> ImageTrainerDefaults:
    """Return the defaults of a script that trains a LoRA from prompts, without images (LECO).

    Args:
        settings: Fields of `ImageTrainerDefaults` to replace.
    """
    return replace(NOISE_TRAINER, translate=_read_leco, **settings)


def _read_leco(args: argparse.Namespace) -> None:
    """Require --prompts_file for LECO, set the default rank, and by default train only the U-Net."""
    if args.prompts_file is None:
        raise OptionError(
            "--prompts_file is missing: pass a TOML or YAML file of the prompts that are learned from. "
            "The documentation of Stable Diffusion shows one"
        )
    apply_sd_scripts_defaults(args)
    if not args.network_train_text_encoder_only:
        args.network_train_unet_only = True
    if args.network_dim is None and not args.dim_from_weights and args.network_weights is None:
        args.network_dim = LECO_RANK


_REJECTED_FOR_WORDS = {
    **_REJECTED_BESIDE,
    "network_dim": "Pass the number of vectors to --num_vectors_per_token",
    "network_weights": "Pass the file to --weights",
    "network_dropout": "Omit it",
    "base_weights": "Omit it, or merge the LoRA into the checkpoint with merge_lora.py",
    "network_train_unet_only": "The U-Net has no part in it; omit it",
    "text_encoder_lr": "Pass its rate to --learning_rate",
}


def word_trainer(**settings: Any) -> ImageTrainerDefaults:
    """Return the defaults of a textual inversion script for a model that predicts noise.

    Args:
        settings: Fields of `ImageTrainerDefaults` to replace.
    """
    network_title = "textual inversion; the scripts whose names end in train_network.py train LoRAs"
    reasons = {
        name: _LORA_ONLY.format(network_title) + remedy for name, remedy in _REJECTED_FOR_WORDS.items()
    }
    refused = {**_rejected_by_noise, **reasons}
    return replace(NOISE_TRAINER, refused=refused, translate=_read_word, **settings)


def _read_word(args: argparse.Namespace) -> None:
    """Set options for textual inversion: only text encoders are trained, and the word can name the files."""
    word = args.token_string
    if args.output_name is None and args.output_dir is not None and word is not None:
        error = find_error(word)
        if error:
            raise OptionError(f"--token_string {word!r} {error}")
        # the file gets the name of the word, which is the option that was typed
        check_output_name("--token_string", word, is_new=args.resume is None)
        args.output_name = word
        logger.info("Without --output_name the file is called %s, after the word.", word)
    elif word is not None and args.output_name not in (None, word):
        logger.warning(
            "--output_name %s is not the word %s: gen_img.py and other programs take the name of a file as "
            "its word. Rename the file to %s.safetensors before it is used, or omit --output_name.",
            args.output_name,
            word,
            word,
        )
    apply_sd_scripts_defaults(args)
    args.network_train_text_encoder_only = True

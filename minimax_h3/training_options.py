"""Training options under other trainers' names, and their translation to the shared options.

Standard library only.
"""

import argparse
import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.options import FREE, HABIT, Options, not_needed, option, option_name, unsupported
from protocols.inputs import CLIP, FIRST_LAST, INPUTS, SUBJECT

logger = logging.getLogger(__name__)

THOUSAND = 1000
UNIFORM, NONE = "uniform", "none"  # the only sampler and weighting
RANK = 16  # default rank and alpha of a LoRA
# --h3_teacher_conditions -> --teacher_sees
CONDITION_SETS = {"first,last": FIRST_LAST, "ref": CLIP, "subject_ref": SUBJECT}
# task -> conditions of the model that is trained; a text-to-video model has none
CONDITION_SET_BY_TASK = {"fl2va": FIRST_LAST, "ref2va": SUBJECT}
WHY_UNIFORM = (
    "the noise of images and audio follows one even base time, as in a generation. "
    "--timestep_focus draws more from a range of it. Omit it"
)
OTHER_SHIFTS = "pass the shifts of images and of audio by --h3_shift_video and --h3_shift_audio"
_PARTS = "of a clip that is made, the first and last frame and references are given: --task. Omit it"
_PROBABLY = "the loss has no such term; --teacher, --guided_target and the priors are its further targets"
_VALIDATED = "tables with validation = true are measured. Put them into --dataset_config"
_BANDS = "it is measured in five bands of base time, of all levels"
_CAPTIONS = "captions are dropped by table. Give it caption_dropout_rate"
_KEPT = "the model is kept by --blank_prior_weight, or by --h3_teacher_matching. Pass one of these"
_CHECKPOINTS = "all blocks are computed again, or none. Pass --gradient_checkpointing"
_PRUNED = "a file is read as it is, whole or pruned. Pass minimax_h3_*_pruned_*.safetensors"
_SCALES = "--fp8_base --fp8_scaled keeps a scale for each row of a weight. Omit it"
_COMPILING = "blocks are compiled by --compile and its own options. Pass --compile, or omit it"
_MEANS = (
    "images and audio have a mean each, with weights of their own (--h3_video_loss_weight, "
    "--audio_loss_weight)"
)


def granularity_option(default: str | None) -> Any:
    """Declare --block_swap_granularity, which supports only whole blocks."""
    return option(
        "unit that --blocks_to_swap moves: block, entire blocks",
        default=default,
        choices=("block",),
        refused={"layer": "whole blocks are moved. Omit it"},
    )


class H3LossOptions(Options, title="loss of images and audio"):
    """Whether the loss covers images, audio or both, and how their noise levels are drawn."""

    audio_loss_weight: float = option(
        "weight of the audio loss; clips without audio have none",
        default=1.0,
        flags=("--h3_audio_loss_weight",),
        minimum=0,
        maximum=1000,
        often=True,
        facts=HABIT,
    )
    video_only: bool = option(
        "learn the video only: the same as --audio_loss_weight 0. The network still receives the audio",
        often=True,
        facts=HABIT,
    )
    h3_video_loss_weight: float = option(
        "weight of the video loss", default=1.0, minimum=0, maximum=1000, facts=HABIT
    )
    h3_loss_balance: str = option(
        "modality: images and audio have separate means",
        default="modality",
        choices=("modality",),
        refused={"token": _MEANS},
        facts=HABIT,
    )
    h3_shift_video: float = option(
        "shift of the noise levels of the video after the base time", default=12.0, above=0, maximum=1000,
        facts=HABIT,
    )  # fmt: skip
    h3_shift_audio: float = option(
        "shift of the noise levels of the audio after the base time", default=3.0, above=0, maximum=1000,
        facts=HABIT,
    )  # fmt: skip
    h3_visual_cond_clean: float = option(
        "fraction of the latents in keyframes and in images and clips of references; the rest is "
        "noise, new in each step",
        default=0.999,
        minimum=0,
        maximum=1,
        facts=HABIT,
    )
    h3_audio_cond_clean: float = option(
        "the same in audio of references", default=1.0, minimum=0, maximum=1, facts=HABIT
    )

    def __post_init__(self) -> None:
        if not self.h3_video_loss_weight + self.audio_weight:
            raise OptionError(
                "--h3_video_loss_weight 0 without a loss of audio: nothing would be learned. Give one of "
                "them a weight"
            )

    @property
    def audio_weight(self) -> float:
        """Return the weight of the audio loss; with --video_only it is 0."""
        return 0.0 if self.video_only else self.audio_loss_weight


class H3TargetOptions(Options, title="other names of shared targets"):
    """Names of shared options in another trainer; `translate` copies their values to the shared options."""

    h3_guidance_loss_scale: float = option(
        "--guided_target SCALE; 0: none", default=0.0, minimum=0, facts=HABIT
    )
    h3_guidance_loss_scale_audio: float | None = option("--guided_target_sound SCALE", facts=HABIT)
    h3_guidance_loss_sigma_min: float = option(
        "--guided_target_min_timestep, as a fraction of the base time; 0.15 is common",
        default=0.0,
        minimum=0,
        maximum=1,
        facts=HABIT,
    )
    h3_guidance_loss_uncond_cache: Path | None = option(
        "states of the empty prompt, a file of --uncond_output; default: those in the cache folders",
        place="there",
        facts=FREE,
    )
    h3_teacher_matching: bool = option(
        "learn from the model without the network alone, which sees --h3_teacher_conditions: --teacher base "
        "--teacher_weight 1 --teacher_split",
        often=True,
        facts=HABIT,
    )
    h3_teacher_conditions: str = option(
        "--teacher_sees: first,last, the two frames; ref, the clip itself; subject_ref, other images "
        "of its subject",
        default="first,last",
        one_of=tuple(CONDITION_SETS),
        needs="h3_teacher_matching",
        known_as=("teacher_conditions",),
        facts=HABIT,
    )
    h3_teacher_condition_sigma_max: float = option(
        "--teacher_max_timestep, as a fraction of the base time",
        default=0.75,
        minimum=0,
        maximum=1,
        needs="h3_teacher_matching",
        facts=HABIT,
    )
    h3_teacher_loss_dc_weight: float = option(
        "--teacher_colour_weight; 0 to 0.3 leave the colors of the teacher out",
        default=1.0,
        minimum=0,
        maximum=100,
        needs="h3_teacher_matching",
        facts=HABIT,
    )
    h3_teacher_loss_mag_weight: float = option(
        "--teacher_size_weight",
        default=1.0,
        minimum=0,
        maximum=100,
        needs="h3_teacher_matching",
        facts=HABIT,
    )
    h3_teacher_preservation_weight: float = option(
        "--teacher_anchor_weight",
        default=1.0,
        minimum=0,
        maximum=1000,
        needs="h3_teacher_matching",
        facts=HABIT,
    )
    h3_timestep_focus_prob: float = option(
        "--timestep_focus; 0: none", default=0.0, minimum=0, below=1, facts=HABIT
    )
    h3_timestep_focus_min: float = option(
        "lower end of --timestep_focus_range, as a fraction of the base time",
        default=0.4,
        minimum=0,
        maximum=1,
        needs="h3_timestep_focus_prob",
        facts=HABIT,
    )
    h3_timestep_focus_max: float = option(
        "upper end of --timestep_focus_range, as a fraction of the base time",
        default=0.8,
        minimum=0,
        maximum=1,
        needs="h3_timestep_focus_prob",
        facts=HABIT,
    )
    max_validation_items: int | None = option("--max_validation_steps", minimum=1, facts=FREE)
    h3_convrot_int8: bool = option("--convrot_int8", flags=("--int8_convrot_base",), facts=FREE)
    h3_convrot_int8_bwd: str = option(
        "--convrot_int8_bwd", default="bf16", choices=("bf16", "int8"), facts=FREE
    )


TEACHER_OPTIONS = tuple(
    option_name(field) for field in dataclasses.fields(H3TargetOptions) if field.name.startswith("h3_teacher")
)


class H3RejectedOptions(Options, title="not for this model"):
    """Options of other trainers that do not apply to this model; each is rejected with a reason."""

    h3_convrot_int8_fwd: str = option(
        "inputs of layers in int8 are int8 too",
        default="int8",
        choices=("int8",),
        refused={"bf16": "products of int8 weights are computed in int8, which is faster. Omit it"},
    )
    h3_fp8_quantization_mode: str = option(
        "scales of weights in fp8 are chosen by --fp8_scaled",
        default="block",
        choices=("block",),
        refused=dict.fromkeys(("channel", "tensor"), _SCALES),
    )
    # the fork only uses these with --h3_guidance_distillation_scale, which is rejected; defaults are accepted
    h3_guidance_loss_form = not_needed(
        "the loss is the mean of (f - u - s (v - u))^2, the fork's contrastive, where f is the prediction, u "
        "that for the empty prompt, v the velocity of the clip, and s --h3_guidance_loss_scale. Its "
        "normalized divides that by s^2, which is not done.",
        type=str,
        default="normalized",
    )
    h3_guidance_loss_schedule = not_needed(
        "the scale is the same at all levels from --h3_guidance_loss_sigma_min on.", type=str, default="sigma"
    )
    h3_guidance_distillation_scale = unsupported(
        "the target with guidance in it is --h3_guidance_loss_scale. Pass that", type=float
    )
    h3_image_flow_shift = unsupported(
        "single images have the schedule of clips, in a generation too. --h3_shift_video is for a run",
        type=float,
    )
    h3_observed_modality = unsupported(
        "images and audio of a clip are noised together. --video_only learns images alone", type=str
    )
    h3_extension_video_frames = unsupported(_PARTS, type=int, default=0)
    h3_extension_audio_latents = unsupported(_PARTS, type=int, default=0)
    h3_extension_route = unsupported(_PARTS, type=str, default="condition_rows")
    h3_frame_sigma_jitter = unsupported(
        "all frames of a clip have one noise level, as in a generation. Omit it", type=float, default=0.0
    )
    h3_keyframe_anchors = unsupported(_PARTS, type=str, default="")
    h3_keyframe_random_count = unsupported(_PARTS, type=int, default=0)
    h3_mask_mode = unsupported(_PARTS, type=str, default="off")
    h3_mask_audio = unsupported(_PARTS)
    h3_mask_min_fraction = unsupported(_PARTS, type=float, default=0.25)
    h3_mask_max_fraction = unsupported(_PARTS, type=float, default=0.75)
    h3_caption_dropout_rate = unsupported(_CAPTIONS, type=float, default=0.0)
    h3_base_preservation_loss_weight = unsupported(_KEPT, type=float, default=0.0)
    crepa = unsupported(_PROBABLY, type=str, nargs="*")
    h3_convrot_int8_lora_fused = not_needed("the LoRA is added to the output of a layer in int8.")
    h3_adaln_rank = unsupported(_PRUNED, type=int)
    prune_adaln = unsupported(_PRUNED)
    h3_fused_qk_norm_rope = unsupported("--compile fuses norms and positions. Use it")
    h3_attn_auto_dispatch = not_needed("PyTorch chooses among its own kernels.")
    h3_gradient_checkpointing_blocks = unsupported(_CHECKPOINTS, type=int)
    h3_gradient_checkpointing_cpu_offload_pin_memory = not_needed(
        "memory on the host is pinned where that is faster."
    )
    block_swap_granularity: str = granularity_option("block")
    inductor_config = unsupported(_COMPILING, type=str, nargs="*")
    compile_auto_cache_size_limit = unsupported(_COMPILING)
    compile_fallback_to_eager = unsupported(_COMPILING)
    log_grad_metrics = not_needed("the norm of the gradients is logged always.")
    validation_dataset_config = unsupported(_VALIDATED, type=Path)
    validate_at_start = unsupported("the first one is after --validate_every_n_steps. Omit it")
    validation_timestep_bins = unsupported(_BANDS, type=int, default=4)
    validation_min_timestep = unsupported(_BANDS, type=int, default=0)
    validation_max_timestep = unsupported(_BANDS, type=int, default=1000)


def base_time(text: str) -> float | int:
    """Parse a base time: an integer is in thousandths, a float is a fraction of 1."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def in_thousandths(name: str, fraction: float) -> int:
    """Convert a fraction to integer thousandths; `name` is its option, for messages.

    Raises OptionError outside 0..1, or for more than three decimals.
    """
    thousandths = fraction * THOUSAND
    if not 0 <= fraction <= 1 or abs(thousandths - round(thousandths)) > 1e-6:
        raise OptionError(f"{name} {fraction:g}: pass a base time from 0 to 1, with three decimals at most")
    return round(thousandths)


def translate(args: argparse.Namespace) -> None:
    """Copy the values of options with other trainers' names to the shared options of all families.

    Raises OptionError if both are given with different values, or if options contradict each other.
    """
    _read_bounds(args)
    # shared option -> (the other trainer's option, value)
    shared = {**_translate_guidance(args), **_translate_teacher(args), **_translate_focus(args)}
    if args.max_validation_items is not None:
        shared["max_validation_steps"] = "--max_validation_items", args.max_validation_items
    if args.h3_convrot_int8:
        shared["convrot_int8"] = "--h3_convrot_int8", True
    # the default counts as given only if it was typed
    if args.h3_convrot_int8_bwd != "bf16" or "h3_convrot_int8_bwd" in args.typed_options:
        shared["convrot_int8_bwd"] = "--h3_convrot_int8_bwd", args.h3_convrot_int8_bwd
    typed_names = dict(getattr(args, "typed_names", {}))  # error messages name the option that was typed
    typed_options = {*args.typed_options}
    for name, (other_name, value) in shared.items():
        # Set a shared option to the value of another trainer's option, `other_name`
        given = getattr(args, name)
        given = tuple(given) if isinstance(given, list) else given
        # a default value may be replaced if the user did not type the option
        replaceable = () if name in args.typed_options else (DEFAULT.get(name), None, False)
        if given not in (value, *replaceable):
            raise OptionError(
                f"--{name} {given} and {other_name} mean the same, and differ: pass one of them"
            )
        setattr(args, name, value)
        typed_names[f"--{name}"] = other_name
        if other_name.removeprefix("--") in args.typed_options:
            typed_options.add(name)
    args.typed_names = typed_names
    args.typed_options = frozenset(typed_options)
    _select_rank(args)
    # The other tasks have their own keyframes or references.
    task = args.task or ("ref2va" if args.h3_training_mode == "ref2va" else "t2va")
    if args.teacher is not None and args.teacher_sees != INPUTS and task != "t2va":
        raise OptionError(
            f"--teacher_sees {args.teacher_sees} with --task {task}: the teacher knows more than a "
            "network that learns texts alone. Pass --task t2va"
        )
    warn_about_unused_clean_shares(args)


def name_teacher_conditions(condition_set: str) -> str:
    """Return the value of --h3_teacher_conditions that selects these conditions for the teacher."""
    return next(value for value, known_set in CONDITION_SETS.items() if known_set == condition_set)


def trainer_changes(samplers: Collection[str], weightings: Collection[str]) -> dict[str, Any]:
    """Return MiniMax-H3's changes to the training scripts' shared options, as arguments of `TrainerChanges`.

    `samplers` and `weightings` are all values of the shared options --timestep_sampling and
    --weighting_scheme.
    """
    # the released schedule allows one way to draw noise levels; "refused" maps other values to messages
    other_samplers = {*samplers} - {UNIFORM}
    other_weightings = {*weightings} - {NONE}
    return {
        "defaults": {"timestep_sampling": UNIFORM},
        "settings": {
            **SETTINGS,
            "timestep_sampling": {"refused": dict.fromkeys(other_samplers, WHY_UNIFORM)},
            "weighting_scheme": {"choices": (NONE,), "refused": dict.fromkeys(other_weightings, WHY_UNIFORM)},
        },
        "refused": {"discrete_flow_shift": OTHER_SHIFTS},
        "translate": translate,
    }


DEFAULT: dict[str, Any] = {
    "teacher_weight": 0.5,
    "teacher_max_timestep": THOUSAND,
    "teacher_colour_weight": 1.0,
    "teacher_size_weight": 1.0,
    "teacher_anchor_weight": 1.0,
    "teacher_sees": INPUTS,
    "guided_target_min_timestep": 0,
    "timestep_focus_range": (400, 800),
    "convrot_int8_bwd": "bf16",
}


# name of a shared option -> the other trainer's option that was given, and the value for the shared one
Shared = dict[str, tuple[str, Any]]


def _translate_guidance(args: argparse.Namespace) -> Shared:
    """Translate MiniMax-H3's options for the guidance loss to the shared options of --guided_target."""
    # Returns a dict from each shared option to the user's option and the value.
    shared: Shared = {}
    scale = args.h3_guidance_loss_scale
    if scale:
        shared["guided_target"] = "--h3_guidance_loss_scale", scale
    if args.h3_guidance_loss_scale_audio is not None:
        shared["guided_target_sound"] = "--h3_guidance_loss_scale_audio", args.h3_guidance_loss_scale_audio
    if args.h3_guidance_loss_sigma_min or "h3_guidance_loss_sigma_min" in args.typed_options:
        name = "--h3_guidance_loss_sigma_min"
        lowest = in_thousandths(name, args.h3_guidance_loss_sigma_min)
        shared["guided_target_min_timestep"] = name, lowest
    # shared losses use the same cache of the empty prompt
    uses_cache = scale or getattr(args, "guided_target", None) or getattr(args, "blank_prior_weight", None)
    if args.h3_guidance_loss_uncond_cache is not None and not uses_cache:
        raise OptionError(
            f"--h3_guidance_loss_uncond_cache {args.h3_guidance_loss_uncond_cache}: it has no effect without "
            "--h3_guidance_loss_scale, --guided_target or --blank_prior_weight. Pass one, or omit it"
        )
    return shared


def _translate_teacher(args: argparse.Namespace) -> Shared:
    """Translate MiniMax-H3's options for teacher matching to the shared options of --teacher."""
    # Returns a dict from each shared option to the user's option and the value; {} without teacher matching.
    if not args.h3_teacher_matching:
        return {}
    defaults = H3TargetOptions.from_defaults()
    weight_names = {
        "h3_teacher_loss_dc_weight": "teacher_colour_weight",
        "h3_teacher_loss_mag_weight": "teacher_size_weight",
        "h3_teacher_preservation_weight": "teacher_anchor_weight",
    }
    matching = "--h3_teacher_matching"
    shared: Shared = {
        "teacher": (matching, "base"),
        "teacher_weight": (matching, 1.0),
        "teacher_split": (matching, True),
    }
    if args.h3_teacher_conditions in CONDITION_SETS:  # otherwise the option's own check reports the error
        shared["teacher_sees"] = "--h3_teacher_conditions", CONDITION_SETS[args.h3_teacher_conditions]
    name = "--h3_teacher_condition_sigma_max"
    shared["teacher_max_timestep"] = name, in_thousandths(name, args.h3_teacher_condition_sigma_max)
    # weights that were not changed keep the shared options' defaults
    for own_name, shared_name in weight_names.items():
        if getattr(args, own_name) != getattr(defaults, own_name) or own_name in args.typed_options:
            shared[shared_name] = f"--{own_name}", getattr(args, own_name)
    if "teacher_anchor_weight" in shared and args.h3_teacher_condition_sigma_max == 1:
        raise OptionError(
            "--h3_teacher_preservation_weight with --h3_teacher_condition_sigma_max 1: the teacher has "
            "its conditions at all noise levels, so nothing is preserved. Omit one of the two"
        )
    return shared


def _translate_focus(args: argparse.Namespace) -> Shared:
    """Translate the trainer's own options that draw some noise levels more often to --timestep_focus."""
    if not args.h3_timestep_focus_prob:
        return {}
    focus_range = (
        in_thousandths("--h3_timestep_focus_min", args.h3_timestep_focus_min),
        in_thousandths("--h3_timestep_focus_max", args.h3_timestep_focus_max),
    )
    return {
        "timestep_focus": ("--h3_timestep_focus_prob", args.h3_timestep_focus_prob),
        "timestep_focus_range": ("--h3_timestep_focus_min", focus_range),
    }


def _read_bounds(args: argparse.Namespace) -> None:
    """Convert --min_timestep and --max_timestep to thousandths; values up to 1 are fractions of 1000."""
    names = ("min_timestep", "max_timestep")
    bounds = [getattr(args, name) for name in names]
    given = [bound for bound in bounds if bound is not None]
    are_shares = args.max_timestep == 1 or any(isinstance(bound, float) for bound in given)
    if not are_shares:
        return
    for name, bound in zip(names, bounds, strict=True):
        if bound is not None:
            setattr(args, name, in_thousandths(f"--{name}", bound))


def _select_rank(args: argparse.Namespace) -> None:
    """Set the model's default rank and alpha for a LoRA if neither is given."""
    if not hasattr(args, "network_module") or args.embedding_only:  # there is no LoRA
        return
    is_lora = args.network_module is None or args.network_module.startswith("networks.lora")
    has_alpha = args.network_alpha != 1 or "network_alpha" in args.typed_options
    if args.network_dim is None and is_lora and not args.dim_from_weights and not has_alpha:
        args.network_dim = args.network_alpha = RANK


def warn_about_unused_clean_shares(args: argparse.Namespace) -> None:
    """Warn about options for noise in conditions that clips of this task do not have."""
    has_references = args.task == "ref2va" or args.h3_training_mode == "ref2va"
    has_images = has_references or args.task == "fl2va" or args.one_frame or args.teacher is not None
    has_conditions = {"h3_visual_cond_clean": has_images, "h3_audio_cond_clean": has_references}
    has_conditions["h3_audio_cond_clean"] |= args.teacher is not None
    for name, is_used in has_conditions.items():
        default = getattr(H3LossOptions.from_defaults(), name)
        if not is_used and (getattr(args, name) != default or name in args.typed_options):
            task = args.task or "t2va"
            logger.warning("--%s is ignored because clips of --task %s have no such conditions", name, task)


_BOUND = "bound of the base time, 0 to 1000 or 0 to 1: the {} one"
# settings of shared options, by name
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "min_timestep": {"type": base_time, "help": _BOUND.format("lower")},
    "max_timestep": {"type": base_time, "help": _BOUND.format("upper")},
    "network_dim": {"help": "rank of the network; default 16, with --network_alpha 16"},
}

"""Guess the intention behind unknown words: other programs' options, shell syntax, quotes.

Standard library only.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from modules.command import did_you_mean, quote_command, shorten_word
from modules.extensions import FEATURES, list_named
from modules.installation import EXTENSIONS_FLAG, FRONT_SCRIPT, find_script
from modules.option_tables import list_option_names
from modules.option_values import HEIGHT_WIDTH
from modules.options import KeyFile
from modules.paths import path_exists
from modules.script_words import name_words

SWITCHES = {"true", "false", "yes", "no", "on", "off", "1", "0"}
NUMBER_TYPES = (int, float)
Flags = Mapping[str, argparse.Action]

# our name: other programs' names, including dataset keys and choices. If a name is in several lines, the
# first line that fits the script is used.
_FOREIGN_OPTIONS = """
learning_rate: lr unet_lr transformer_lr dit_lr
network_dim: rank dim lora_rank lora_dim network_rank oft_block_size
network_alpha: alpha lora_alpha
network_weights: lora_weights resume_lora pretrained_lora lora_path
max_train_steps: steps num_steps max_steps train_steps num_train_steps iterations
max_train_epochs: epochs num_epochs max_epochs num_train_epochs
save_every_n_steps: save_every save_steps checkpointing_steps checkpoint_steps
sample_every_n_steps: sample_every validation_steps sample_steps
sample_prompts: validation_prompt validation_prompts prompts
resume: resume_from resume_from_checkpoint
optimizer_type: optimizer
lr_scheduler: scheduler
lr_warmup_steps: warmup_steps warmup
mixed_precision: dtype precision
discrete_flow_shift: shift flow_shift
dataset_config: data dataset data_config dataset_path train_data_dir instance_data_dir
output_name: name
output_dir: output out output_path output_folder save_dir save_path
infer_steps: steps num_steps num_inference_steps sample_steps sampling_steps inference_steps
guidance_scale: cfg scale cfg_scale guide_scale guidance sample_guide_scale cfg_guidance_scale true_cfg_scale
embedded_cfg_scale: embedded_guidance embedded_guidance_scale distilled_guidance_scale distilled_cfg_scale
flow_shift: shift sample_shift discrete_flow_shift
video_length: frame frames length num_frames frame_num video_frames sample_frames sample_num_frames
video_length: frame_count
image_size: size width height resolution W H
video_size: size width height resolution W H
lora_weight: models lora loras lora_path lora_paths lora_file lora_weights network_weights
lora_multiplier: ratios lora_scale lora_strength lora_alpha network_mul
save_path: out output outfile output_path output_file output_dir outdir save_file save_dir out_dir
from_file: prompts prompt_file prompts_file prompt_path
negative_prompt: uncond_prompt neg_prompt negative neg
image_path: image init_image input_image first_frame start_image
end_image_path: last_image end_image last_frame
control_path: control_video control_video_path control src_video vace_video
control_image_path: control_image image image_path input_image reference_image ref_image reference
control_image_path: control_images reference_images src_ref_images
sample_solver: sampler scheduler solver sampling_method sample_sampler
dit: model model_path transformer transformer_path unet ckpt ckpt_path checkpoint
pretrained_model_name_or_path: model model_path transformer unet ckpt checkpoint dit
text_encoder: text_encoder_path llm te
fp8_vl: fp8_llm fp8_text_encoder fp8_t5
fp8_llm: fp8_vl fp8_text_encoder
fp8_text_encoder: fp8_vl fp8_llm
batch_size: train_batch_size per_device_train_batch_size
caption_dropout_rate: caption_dropout
save_merged_model: out output output_path save_to
network_multiplier: slider_strength
W: width
H: height
renorm_cfg: rcfg
cfg_trunc_ratio: ctr
convrot_int8: int8 int8_base fp8_int8 use_int8
bf16: bfloat16
fp16: float16 half
fp32: float32
vanilla: euler
dpmsolver++: dpmpp dpm++ dpmpp_2m dpm++2m dpm++_2m dpmpp2m dpm_pp_2m dpmpp_2m_karras dpm++_2m_karras
euler_a: euler_ancestral euler-a euler_ancestral_discrete
flux_shift: flux
adamw8bit: adamw_8bit
"""

# Options of our scripts with the same meaning: a script without the typed one has another of its line.
# Two options that are needed together are joined by +.
_SYNONYMS = """
lora_weight network_weights lora_weights
lora_multiplier network_mul
image_size video_size H+W height+width image_height+image_width resolution size
infer_steps steps
guidance_scale scale guidance cfg_scale embedded_cfg_scale
save_path outdir output_dir output
ckpt pretrained_model_name_or_path
dit ckpt ckpt_path pretrained_model_name_or_path ltx2_checkpoint dit_weight
control_image_path ref reference_image vace_reference_image src_ref_images
control_path src_video vace_video
image_path first_frame
end_image_path last_frame
num_videos num_images images_per_prompt
sample_solver sampler flow_solver
flow_shift discrete_flow_shift
denoise_strength strength
fp8 fp8_base
lora_rounding
text_encoder text_encoder_path
negative_prompt neg_prompt
save_merged_model output
video_length video_seconds duration
fps output_fps frame_rate
attn_mode sdpa
ae vae video_vae ae_path ltx2_video_vae
text_encoder_tokenizer tokenizer
text_encoder_cpu use_cpu_offload
vae_tiling vae_enable_tiling
output_name name_suffix
num_frames max_num_frames
model detection_model
vae_dtype ae_dtype vae_precision
dit_dtype flux_dtype precision
compile torch_compile
compile_backend dynamo_backend
convrot_int8 h3_convrot_int8 int8_convrot_base
nf4_base
audio_loss_weight h3_audio_loss_weight
video_loss_weight h3_video_loss_weight
max_data_loader_n_workers dataloader_num_workers
caption_dropout_rate h3_caption_dropout_rate
spatial_upsampler_path
distilled_lora distilled_lora_path
"""
_MIN_SIMILARITY = 0.75  # similarity of a mistyped name and the intended one; 1: equal

# options of other trainers without a counterpart here, and the reason
_WITHOUT_COUNTERPART = {
    "cache_latents cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk": (
        "the caching scripts make caches before a training"
    ),
    "min_snr_gamma noise_offset adaptive_noise_scale multires_noise_iterations multires_noise_discount "
    "v_parameterization zero_terminal_snr scale_v_pred_loss_like_noise_pred debiased_estimation_loss": (
        "it belongs to the noise of Stable Diffusion"
    ),
    "rcfg ctr": "it is for lines of prompts, of models that have it",
    "save_precision": (
        "it is for files of trainings; merged models have the dtypes of the model's file: float32 would be "
        "rounded to the nearest when it is loaded in 16 bits"
    ),
    "empty_prompt": "it is for the script that caches texts, which is run before a training",
    "load_tensors": "it is a key of a dataset file, load_tensors = true in a table, which caching reads",
    "do_differential_guidance differential_guidance differential_guidance_scale": (
        "with a squared error it is the same as a higher --learning_rate, and Adam and Lion do not see it"
    ),
    "boft boft_block_size boft_block_num boft_n_butterfly_factor": (
        "BOFT is not built, and --network_module networks.oft is the closest to it"
    ),
    "coft oft_coft coft_eps oft_block_share block_share use_cayley_neumann num_cayley_neumann_terms": (
        "an OFT is trained with the settings that PEFT has by default"
    ),
    "tlora tlora_min_rank tlora_alpha": (
        "it is a setting of the network, --network_args tlora=True tlora_min_rank=1 tlora_alpha=1"
    ),
    "xm_best_of_k h3_video_best_of_k": (
        "training on the best of several noises is not built, and 1 is what a training does without it"
    ),
    "wavelet_loss edm2_loss_weighting self_flow": "this loss is not built",
    "stop_text_encoder_training": (
        "text encoders learn until the end, at the rates of --text_encoder_lr, or not at all with "
        "--network_train_unet_only"
    ),
    "is_layered layer_num": "Qwen-Image-Layered is --model_version layered; a dataset says how many layers",
    "clip_skip max_token_length v2 sdxl": "it is for the text encoders of Stable Diffusion",
}


# options for model files by kind of file, without the model's name and number as prefix: a script has
# only its own model's options
_ROLES = (
    "t5 t5xxl umt5 text_encoder text_encoder1 text_encoder2 gemma gemma2 gemma_root llm qwen qwen3 "
    "qwen2_5_vl mistral clip_l byt5 text_encoder_checkpoint text_encoder_path",
    "vae ae vae_path ae_path autoencoder video_vae",
    "clip image_encoder clip_vision image_encoder_path",
    "dit transformer unet model pretrained_model_name_or_path checkpoint ckpt",
)


def find_our_option(foreign_name: str, options: Container[str]) -> str:
    """Return the first of `options` that corresponds to another program's option; "" if none does."""
    names = [name for name in _list_our_names(foreign_name) if name in options]
    names += [name for line in _list_synonyms(foreign_name) for name in line if name in options]
    return names[0] if names else ""


def _list_our_names(foreign_name: str) -> list[str]:
    """Return our options whose line in `_FOREIGN_OPTIONS` contains the foreign name."""
    rows = [line.partition(":") for line in _FOREIGN_OPTIONS.splitlines()]
    return [own_option for own_option, _, names in rows if foreign_name in names.split()]


def _list_synonyms(name: str) -> list[list[str]]:
    """Return the lines of `_SYNONYMS` that contain `name`, each as a list of option names."""
    lines = [line.split() for line in _SYNONYMS.splitlines()]
    return [names for names in lines if name in "+".join(names).split("+")]


def guess_option(flags: Flags, name: str) -> str:
    """Return advice about an unknown option name: the option that was probably meant, or to omit it.

    A known option of another program is not treated as a typo: a name that only looks similar would mislead.
    """
    if name == EXTENSIONS_FLAG.lstrip("-"):
        front = quote_command(["python", FRONT_SCRIPT, EXTENSIONS_FLAG])
        return f" It stands before the command: {front} NAMES ..."
    advice = explain_switched_off(FEATURES, name.replace("-", "_"))
    if advice:
        return advice
    is_ours = f"--{name}" in flags  # typed with a single dash
    if not is_ours and name.replace("-", "_") in list_option_names():
        return " It belongs to other scripts, and nothing here corresponds to it. Omit it."
    near = did_you_mean(name, [flag[2:] for flag in flags if flag[:2] == "--"], _MIN_SIMILARITY)
    return near.replace("mean ", "mean --") or " Omit it."


def explain_switched_off(group: str, name: str) -> str:
    """Return advice about a name that only an installed extension knows which is not switched on.

    Args:
        group: Kind of the extension, of `modules.extensions.GROUPS`.
        name: An option or a value that nothing here knows. An option may begin with the extension's name.

    Returns:
        A sentence with the command that switches it on; "" if no installed extension has this name.
    """
    installed = {entry.name for entry in entry_points(group=group)} - {*list_named()}
    fitting = [known for known in installed if name == known or name.startswith(f"{known}_")]
    if not fitting:
        return ""
    extension = max(fitting, key=len)
    names = ",".join([*list_named(), extension])
    command = _find_running_words()
    typed = quote_command(["python", FRONT_SCRIPT, EXTENSIONS_FLAG, names, *command])
    return f" The extension {extension} is installed, but not switched on. Switch it on: {typed} ..."


def _find_running_words() -> list[str]:
    """Return the words after `reelsmith` that name the running script."""
    program = sys.argv[0]
    if " " in program and find_script(program) is None and program.startswith("reelsmith "):
        return program.split()[1:]  # of the installed package
    return name_words(Path(program).stem).split()


def explain_foreign_name(flags: Flags, name: str, key_files: Iterable[KeyFile] = ()) -> str:
    """Return advice about an option of another program or a key of a settings file; "" if it is unknown.

    `key_files` are the kinds of files whose keys may have been meant, the likeliest first.
    """
    name = name.replace("-", "_")
    options = {flag[2:].replace("-", "_"): flag[2:] for flag in flags if flag[:2] == "--"}
    our_option = options.get(find_our_option(name, options)) or _find_declared_synonym(flags, name)
    if our_option:
        return _suggest_option(flags, our_option)
    side_names = _find_height_width_options(name, options)
    if side_names is not None:
        height, width = side_names
        return f" Did you mean --{height} HEIGHT --{width} WIDTH?"
    for key_file in key_files:
        keys = key_file.read_keys()
        key = name if name in keys else find_our_option(name, keys)
        if key in options:
            return _suggest_option(flags, key)
        if key:
            return f" {key_file.hint.format(key=key)}"
    for names, reason in _WITHOUT_COUNTERPART.items():
        if name in names.split():
            return f" Omit it: {reason}."
    return explain_role(flags, name)


def _find_height_width_options(name: str, options: Container[str]) -> tuple[str, str] | None:
    """Return our options for height and width that correspond to one option of another program, or None."""
    for synonym in itertools.chain(*_list_synonyms(name)):
        height, plus, width = synonym.partition("+")
        if plus and height in options and width in options:
            return height, width
    return None


def _find_declared_synonym(flags: Flags, foreign_name: str) -> str:
    """Return our option that declares `foreign_name` as its name in another program; "" if there is none."""
    for flag, action in flags.items():
        if flag[:2] == "--" and foreign_name in getattr(action, "known_as", ()):
            return flag[2:]
    return ""


def _suggest_option(flags: Flags, name: str) -> str:
    is_size = flags[f"--{name}"].metavar == HEIGHT_WIDTH
    return f" Did you mean --{name}{' HEIGHT WIDTH' if is_size else ''}?"


def explain_role(flags: Flags, name: str) -> str:
    """Advise to use this model's option for a file if another model's option is given; "" if none fits."""
    role = next((names.split() for names in _ROLES if _has_role(name, names.split())), [])
    takes_values = [flag for flag, action in flags.items() if action.nargs != 0]
    role_flags = [flag for flag in takes_values if _has_role(flag.lstrip("-"), role)]
    actions = {id(flags[flag]): flags[flag] for flag in role_flags}
    texts = []
    for action in actions.values():
        flag = next(flag for flag in action.option_strings if flag in role_flags)
        about = (action.help or "").replace("%%", "%").partition(";")[0]
        texts.append(f"{flag} ({about})" if about else flag)
    return f" Pass {' and '.join(texts)} instead." if texts else ""


def _has_role(name: str, role: Collection[str]) -> bool:
    return name in role or re.sub("^[a-z]+[0-9]_", "", name) in role


def explain_number(action: argparse.Action, word: str, expected: str) -> str:
    """Return the error message for a word that is not a number, for an option that takes numbers.

    `expected` describes the type of number, such as "a whole number".
    """
    if "," in word:
        advice = _explain_comma(action, word)
        if advice:
            return f"{word}: {advice}"
    named = re.fullmatch(r"[a-z_]+=(-?\d+(?:\.\d+)?)", word)
    if named is not None:  # settings of other trainers
        return f"{word}: write the number alone, {named[1]}"
    example = action.default if type(action.default) in NUMBER_TYPES else 1
    return f"{shorten_word(word)} is not {expected}. Pass one, such as {example:g}."


def _explain_comma(action: argparse.Action, word: str) -> str:
    """Advise how to write a decimal number or several numbers with commas; "" if the word is neither."""
    number_texts = [part.strip() for part in word.split(",")]
    has_decimal_comma = re.fullmatch(r"-?\d+,\d+(e[+-]?\d+)?", word, re.IGNORECASE) is not None
    decimal_advice = ""
    if action.type is float and has_decimal_comma:
        decimal_advice = f"write a decimal point: {'.'.join(number_texts)}"
    if action.nargs is None and decimal_advice:
        return decimal_advice
    are_numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", part) for part in number_texts)
    if action.nargs in ("+", "*") and are_numbers:
        or_decimal = f", or {decimal_advice}" if decimal_advice else ""
        return f"write several numbers apart: {' '.join(number_texts)}{or_decimal}"
    return ""


def _explain_expanded_pattern(flags: Flags, argv: Sequence[str], unused: Sequence[str]) -> str:
    """Return an error message if the shell has expanded a pattern such as *.mp4 to several paths, else ""."""
    for flag, path, next_path in zip(argv, argv[1:], argv[2:], strict=False):
        is_first_unused = next_path == unused[0] and _takes_one_value(flags, flag)
        if is_first_unused and path_exists(Path(path)) and path_exists(Path(next_path)):
            return (
                f"{flag} takes one path but got {len(unused) + 1}, {path} {next_path} ...: the shell "
                "replaced a pattern (*) by all matching files. Pass the one to use."
            )
    return ""


def _explain_extra_value(flags: Flags, argv: Sequence[str], unused: Sequence[str]) -> str:
    """Return an error message if a number has several values, or a switch a value such as true; else ""."""
    first = unused[0]
    index = argv.index(first)
    before_first = argv[index - 1] if index >= 1 else ""
    flag = argv[index - 2] if index >= 2 else ""
    if _takes_one_value(flags, flag) and flags[flag].type in NUMBER_TYPES:
        values = quote_command([before_first, *unused])
        return f"{flag} takes one value but got {1 + len(unused)}, {values}. Pass one."
    if before_first in flags and flags[before_first].nargs == 0 and first.lower() in SWITCHES:
        return f"{before_first} is a switch: omit {first}, and to turn it off omit the switch too."
    return ""


def explain_unused_words(
    flags: Flags, argv: Sequence[str], unused: Sequence[str], without_flag: Sequence[argparse.Action] = ()
) -> str:
    """Return the error message for words of the command line that belong to no option.

    `argv` are all command-line arguments, and `unused` the words that belong to no option. `without_flag`
    are the options that are recognized without a flag.
    """
    explanation = _explain_expanded_pattern(flags, argv, unused) or _explain_extra_value(flags, argv, unused)
    if explanation:
        return explanation
    unused_text = quote_command(unused)
    if any(quote in word for word in argv for quote in "“”„«»"):
        return (
            f"{unused_text} belongs to no option: the quotation marks “ ” are typographic, and the shell "
            'recognizes only straight ones. Write "..." around a text with spaces.'
        )
    if len(without_flag) == 1 and without_flag[0].nargs is None:
        name = without_flag[0].dest
        return f"{unused_text} is not used: pass one {name}, and put quotes around a name with spaces."
    return f"{unused_text} belongs to no option. Put a text with spaces in quotes."


def _takes_one_value(flags: Flags, flag: str) -> bool:
    """Return whether a word of the command line is the flag of an option with exactly one value."""
    return flag in flags and flags[flag].nargs is None

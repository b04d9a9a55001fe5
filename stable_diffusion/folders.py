"""Folders in the layout of diffusers: determine the kind of model, and plan how to load its networks.

The U-Net's dimensions come from its config.json; everything else in the folder is checked.
"""

import inspect
import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from checkpoints.dialects import LoadPlan
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from modules.control_codes import shorten
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text
from stable_diffusion.checkpoints import UnetSizes, VaeSizes, read_vae
from stable_diffusion.contract import SD1, SD2, SDXL, ModelKind
from stable_diffusion.diffusers_parts import unet_class, vae_class
from stable_diffusion.files import EXPECTED_FILE, ModelType
from stable_diffusion.text_checkpoints import TextPlan, read_folder_text

logger = logging.getLogger(__name__)

# files of a hub repository that a pipeline may need
PATTERNS = (
    "model_index.json",
    "*/config.json",
    "scheduler/scheduler_config.json",
    *(f"tokenizer{number}/*.{ending}" for number in ("", "_2") for ending in ("json", "txt")),
    *(
        f"{network}.{ending}"
        for network in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder*/model")
        for ending in ("safetensors", "safetensors.index.json")
    ),
    "*/*-of-*.safetensors",
)
# suffixes of weight files in order of preference: full precision first
_SAFETENSORS_ENDINGS = (
    "safetensors",
    "safetensors.index.json",
    "fp16.safetensors",
    "safetensors.index.fp16.json",
)
_OLD_ENDINGS = ("bin", "bin.index.json", "fp16.bin", "ckpt")
_PREDICTIONS = {"epsilon": False, "v_prediction": True}
# settings in which other models' U-Nets differ -> the only supported values
_SUPPORTED_VALUES = {
    "encoder_hid_dim_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text_time"),
    "time_cond_proj_dim": (None,),
}
# types of settings that are read here; diffusers' classes check the others
_SETTING_TYPES: Mapping[str, tuple[type, ...]] = {
    "in_channels": (int,),
    "addition_time_embed_dim": (int, type(None)),
    "block_out_channels": (list,),
}
# noise schedule of all known models, under diffusers' names
_SD_NOISE_SCHEDULE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
SAME_BETA = 1e-7
MAX_QUOTED = 300  # characters of a setting in a message
_LAYER_COUNT_SETTINGS = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
)


def read_folder_model_type(folder: Path) -> ModelType:
    """Return the kind of model in a diffusers folder, judged by its parts and their configs.

    Raises CheckpointError that names the different model or the missing part.
    """
    kind = _read_kind(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    schedule = read_settings(file) if file.is_file() else {}
    prediction = schedule.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in _PREDICTIONS:
        raise CheckpointError(
            f"{file}: the model predicts {prediction!r}; only epsilon and v_prediction can be used.", file
        )
    for name, default in _SD_NOISE_SCHEDULE.items():
        declared = schedule.get(name, default)
        is_number = isinstance(declared, (int, float)) and not isinstance(declared, bool)
        if isinstance(default, float) and is_number:
            is_same = abs(declared - default) < SAME_BETA  # never for NaN
        else:
            is_same = declared == default
        if not is_same:
            raise CheckpointError(
                f"{file}: {name} is {shorten(str(declared), MAX_QUOTED)}; Stable Diffusion was trained with "
                f"{'none' if default is None else default}, and no other noise is supported. Pass another "
                "model, or the settings that it was trained with.",
                file,
            )
    return ModelType(
        kind,
        _PREDICTIONS[prediction],
        schedule.get("rescale_betas_zero_snr") is True,
        recorded_in="scheduler/scheduler_config.json",
    )


def read_folder_unet(folder: Path, exit_stack: ExitStack) -> LoadPlan[UnetSizes]:
    """Plan how to load the U-Net of a diffusers folder.

    Args:
        folder: Folder of the checkpoint.
        exit_stack: Closes opened files.
    """
    checkpoint = exit_stack.enter_context(open_network_weights(folder / "unet", ("diffusion_pytorch_model",)))
    config = _read_config(folder / "unet", unet_class())
    config_file = folder / "unet" / "config.json"
    _check_levels(config, config_file)
    most_layers = max(_find_largest_number(config.get(name)) for name in _LAYER_COUNT_SETTINGS)
    if most_layers > len(checkpoint.tensors):  # otherwise a wrong number could build a huge network
        raise CheckpointError(
            f"{config_file}: it has more layers than its file has tensors. Copy it again.", config_file
        )
    for name, values in _SUPPORTED_VALUES.items():
        if config.get(name) not in values:
            is_lcm = name == "time_cond_proj_dim"
            lcm_hint = " (a latent consistency model; pass its base model with an LCM LoRA)" if is_lcm else ""
            raise CheckpointError(
                f"{config_file}: {name} is {config[name]!r}, which no Stable Diffusion "
                f"1.x, 2.x or XL has{lcm_hint}.\n  Pass {EXPECTED_FILE}.",
                folder,
            )
    return LoadPlan(config, checkpoint, list_tensor_sources(checkpoint))


def read_folder_vae(
    folder: Path, option: str, latent_scale: float, exit_stack: ExitStack
) -> LoadPlan[VaeSizes]:
    """Plan how to load a VAE from a folder with config.json; `exit_stack` closes the weights."""
    checkpoint = exit_stack.enter_context(open_network_weights(folder, ("diffusion_pytorch_model",)))
    config = _read_config(folder, vae_class())
    if config.get("latents_mean") is not None or config.get("shift_factor"):
        raise CheckpointError(
            f"{option} {folder}: this VAE shifts its latents (latents_mean or shift_factor in config.json), "
            "unlike those of Stable Diffusion.",
            folder,
        )
    declared = config.get("scaling_factor", latent_scale)
    if declared != latent_scale:
        logger.warning(
            "%s: its config.json says that latents are scaled by %s; the model was trained with %s, which is "
            "used",
            folder,
            declared,
            latent_scale,
        )
    return read_vae(checkpoint, option, latent_scale)


def plan_folder_text_encoders(folder: Path, kind: ModelKind, exit_stack: ExitStack) -> tuple[TextPlan, ...]:
    """Plan how to load the text encoders of a diffusers folder.

    Args:
        folder: Folder of the checkpoint.
        kind: Kind of the checkpoint.
        exit_stack: Closes the opened files.
    """
    plans = []
    for index, name in enumerate(("text_encoder", "text_encoder_2")[: 2 if kind is SDXL else 1]):
        checkpoint = exit_stack.enter_context(open_network_weights(folder / name, ("model", "pytorch_model")))
        is_open_clip = kind is SD2 or index == 1
        plans.append(read_folder_text(checkpoint, is_open_clip, is_projected=index == 1))
    return tuple(plans)


def open_network_weights(folder: Path, stems: Collection[str]) -> Checkpoint:
    """Open a network's weights in a folder; prefers safetensors to torch files, and float32 to float16.

    Raises:
        CheckpointError: If there are no weights, or if their file is incomplete, damaged or not a model.
    """
    for endings in (_SAFETENSORS_ENDINGS, _OLD_ENDINGS):
        for stem in stems:
            for ending in endings:
                if (folder / f"{stem}.{ending}").is_file():
                    return open_checkpoint(folder / f"{stem}.{ending}")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder.parent} is incomplete: there is no folder {folder.name} in it.", folder
        )
    # other file names: opening the folder raises an error that lists its content
    return open_checkpoint(folder)


def _read_kind(folder: Path) -> ModelKind:
    """Return the kind of Stable Diffusion in a diffusers folder, inferred from its text encoders."""
    if not (folder / "unet").is_dir():
        raise CheckpointError(
            f"--ckpt {folder} has no folder unet{_quote_pipeline_class(folder)}.\n  Pass {EXPECTED_FILE}.",
            folder,
        )
    if (folder / "text_encoder_2").is_dir():
        if (folder / "text_encoder").is_dir():
            return SDXL
        raise CheckpointError(
            f"--ckpt {folder} is the refiner of Stable Diffusion XL, which only finishes images of the "
            "base model, or its folder text_encoder is missing.\n  Pass the folder of the base model.",
            folder,
        )
    config = read_settings(folder / "text_encoder" / "config.json")
    kind = str(config.get("model_type", "clip_text_model"))
    if not kind.startswith("clip"):
        raise CheckpointError(
            f"--ckpt {folder}: its text encoder is a {kind}; those of Stable Diffusion 1.x, 2.x and XL are "
            f"CLIP{_quote_pipeline_class(folder)}.\n  Pass {EXPECTED_FILE}.",
            folder,
        )
    # of the CLIPs in use, only OpenAI's has this activation, which is also config.json's default
    return SD1 if config.get("hidden_act", "quick_gelu") == "quick_gelu" else SD2


def _quote_pipeline_class(folder: Path) -> str:
    file = folder / "model_index.json"
    name = read_settings(file).get("_class_name") if file.is_file() else None
    return f"; its model_index.json names a {name}" if isinstance(name, str) else ""


def _read_config(folder: Path, network: Any) -> dict[str, Any]:
    """Return the arguments of a network's diffusers class, from its config.json and the class defaults."""
    file = folder / "config.json"
    config = read_settings(file)
    _check_settings(config, file, network.__name__)
    parameters = inspect.signature(network.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    declared = {name: value for name, value in config.items() if name in parameters}
    settings = defaults | declared
    ignored = [name for name in sorted(config.keys() - declared.keys()) if not name.startswith("_")]
    if ignored:
        logger.warning("%s: %s is ignored because diffusers does not know it", file, ", ".join(ignored))
    return settings


def _check_settings(config: Mapping[str, Any], file: Path, class_name: str) -> None:
    """Raise CheckpointError if a config.json is of another class, or has a setting of the wrong type."""
    if config.get("_class_name", class_name) != class_name:
        raise CheckpointError(
            f"{file}: it is a {config['_class_name']}, {class_name} is needed.\n  Pass {EXPECTED_FILE}.",
            file,
        )
    for name, kind in _SETTING_TYPES.items():
        if name in config and not isinstance(config[name], kind):
            raise CheckpointError(f"{file}: {name} is {config[name]!r}. Copy the file again.", file)


def _check_levels(config: Mapping[str, Any], file: Path) -> None:
    """Raise CheckpointError if a U-Net config has invalid levels, layers or cross_attention_dim."""
    down = config["down_block_types"]
    up = config["up_block_types"]
    layers = config["layers_per_block"]
    text_width = config["cross_attention_dim"]
    are_lists = all(isinstance(names, list | tuple) and len(names) for names in (down, up))
    if not are_lists or not all(isinstance(name, str) for name in (*down, *up)):
        problem = f"down_block_types or up_block_types is not a list of names ({down!r}, {up!r})"
    elif not len(down) == len(up) == len(config["block_out_channels"]):
        problem = "down_block_types, up_block_types and block_out_channels have different lengths"
    elif type(layers) is not int and not (
        isinstance(layers, list)
        and len(layers) == (len(down))
        and all(type(number) is int for number in layers)
    ):
        problem = f"layers_per_block is {layers!r}, neither a number nor one for each level"
    elif type(text_width) is not int:
        problem = f"cross_attention_dim is {text_width!r}, not a number"
    else:
        return
    raise CheckpointError(f"{file}: {shorten(problem, MAX_QUOTED)}. Copy the file again.", file)


def read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON config from a folder in diffusers' layout.

    Raises:
        CheckpointError: If the file is missing, cannot be read, or is not a JSON object.
    """
    try:
        content = parse_json(read_text(file))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parents[1]} is incomplete: {file} is missing.", file) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}). Copy it again.", file) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a configuration. Copy it again.", file)
    return content


def _find_largest_number(value: Any) -> float:
    if isinstance(value, list):
        return max(map(_find_largest_number, value), default=0)
    return value if isinstance(value, int | float) else 0

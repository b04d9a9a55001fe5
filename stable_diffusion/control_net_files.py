"""Files of ControlNets: recognize them, translate their names, read their dimensions, load them.

Single files have diffusers' names or the released (LDM) ones, with or without `control_model.` in front. A
file of differences holds weights minus those of the U-Net that the network was trained with.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, count, make_shape_reader, make_wrong_kind_error
from checkpoints.filling import load_module
from checkpoints.model_files import require_file
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text
from protocols.loading import TensorSource
from stable_diffusion.checkpoints import build_network, ldm_to_diffusers_translator
from stable_diffusion.contract import SD1, SD2, SDXL, ModelKind
from stable_diffusion.folders import open_network_weights

OPTION = "--control_net_models"
PREFIX = "control_model."
EXPECTED_FILE = "a file such as control_v11p_sd15_canny.safetensors, or a folder in the layout of diffusers,"
DIFFERENCE_MARKER = "difference"  # a tensor of this name marks a file of differences
CONTROL_ONLY_LAYERS = "controlnet_"  # prefix of layers that a U-Net lacks, never stored as differences

# a pattern of a tensor's name -> what the file is
_OTHERS = (
    (r"lllite_.*", "a ControlNet-LLLite: pass it to --control_net_lllite_models"),
    (r"(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\..*", "a T2I adapter, which is not supported"),
    (r"(image_proj|ip_adapter)\..*", "an IP-Adapter, which is not supported"),
    (r"lora_controlnet", "a Control-LoRA, which is not supported"),
    (
        r"task_embedding|control_type_proj\..*|control_add_embedding\..*",
        "a ControlNet for several tasks (Union), which is not supported",
    ),
    (r"(controlnet_x_embedder|controlnet_blocks)\..*", "a ControlNet of another family of models"),
    (
        r"(unet\.)?up_blocks\.0\..*|(model\.diffusion_model\.)?output_blocks\.0\..*",
        "a model without ControlNet",
    ),
)

# defaults that a config.json may omit
_UNET_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
_HINT_EMBEDDING = "controlnet_cond_embedding"  # the convolutions that embed the guide image
_HINT_BLOCKS = rf"{_HINT_EMBEDDING}\.blocks\.\d+"


def load_control_net(
    path: Path,
    unet_config: Mapping[str, Any],
    model_title: str,
    device: torch.device,
    dtype: torch.dtype,
    base: nn.Module | None = None,
) -> ControlNetModel:
    """Load a ControlNet from a file or a diffusers folder; on the meta device only headers are compared.

    Args:
        path: File or folder of the ControlNet.
        unet_config: Configuration of diffusers' UNet2DConditionModel.
        model_title: Name of the U-Net's model.
        device: Device of the run.
        dtype: Dtype of the weights.
        base: The U-Net itself, to which a file of differences is added.

    Raises:
        CheckpointError: If the file is something else or was made for a different U-Net, or if tensors are
            missing, unexpected, damaged or of different shapes.
    """
    file = require_file(path, OPTION, "")
    opened = (
        open_network_weights(file, ("diffusion_pytorch_model",)) if file.is_dir() else open_checkpoint(file)
    )
    with opened as checkpoint:
        plan = _read_control_net(path, checkpoint, {**_UNET_DEFAULTS, **unet_config}, model_title)
        network = build_network(ControlNetModel, plan.config, plan.checkpoint.path)
        is_difference = any(name.removeprefix(PREFIX) == DIFFERENCE_MARKER for name in checkpoint.tensors)
        load_module(
            network,
            plan.checkpoint,
            plan.sources,
            device=device,
            dtype=lambda *_: dtype,
            patch=partial(_add_base, base) if is_difference else None,
            ignore=plan.ignore,
            label=OPTION,
        )
    return network.eval()


def _add_base(base: nn.Module | None, name: str, weight: Tensor, _: torch.dtype) -> Tensor:
    """Add the U-Net's weight of the same name to a weight difference; new layers are unchanged."""
    if name.startswith(CONTROL_ONLY_LAYERS):  # the U-Net has no such part: the weight is not a difference
        return weight
    assert base is not None
    return weight.float() + base.get_parameter(name).to(weight.device, torch.float32)


def _read_control_net(
    path: Path, checkpoint: Checkpoint, unet_config: Mapping[str, Any], model_title: str
) -> LoadPlan[dict[str, Any]]:
    """Infer the config of diffusers' ControlNetModel from a file, and plan how to load its tensors."""
    # the file may contain a whole model too
    control_net = checkpoint.without_prefix(PREFIX, ignored_prefixes=("",))
    for pattern, what in _OTHERS:
        if any(re.fullmatch(pattern, name) for name in control_net.tensors):
            raise CheckpointError(
                f"{control_net.path} is not a ControlNet; it looks like {what}.\n"
                f"  Pass {EXPECTED_FILE} to {OPTION}.",
                control_net.path,
            )
    translate = ldm_to_diffusers_translator(control_net.tensors)
    sources = {}
    for name, source in list_tensor_sources(control_net).items():
        if name != DIFFERENCE_MARKER:
            sources[_name_in_diffusers(name, translate)] = source
    has_middle = "controlnet_mid_block.weight" in sources
    has_hint = f"{_HINT_EMBEDDING}.conv_in.weight" in sources
    if not has_middle or not has_hint:
        raise make_wrong_kind_error(checkpoint, "a ControlNet", OPTION, EXPECTED_FILE)
    # published files number all convolutions of the hint encoder; diffusers calls the last one conv_out
    if f"{_HINT_EMBEDDING}.conv_out.weight" not in sources:
        last_block = f"{_HINT_EMBEDDING}.blocks.{count(sources, _HINT_BLOCKS) - 1}."
        sources = {
            name.replace(last_block, f"{_HINT_EMBEDDING}.conv_out."): source
            for name, source in sources.items()
        }
    config = _read_config(control_net, sources, unet_config)
    _check_fits_unet(checkpoint, config, unet_config, model_title)
    config |= _read_settings_without_tensors(path)
    return LoadPlan(config, control_net, sources, ignore=(DIFFERENCE_MARKER,))  # a marker, not a weight


def _read_settings_without_tensors(path: Path) -> dict[str, Any]:
    """Read settings that tensors do not show: the color order, and whether control residuals are averaged."""
    # A diffusers folder stores both in config.json. For a single file, residuals are averaged if the file
    # name contains "shuffle", like the name of the released model.
    file = path / "config.json"
    if not file.is_file():
        return {"global_pool_conditions": "shuffle" in path.name.lower()}
    try:
        settings = parse_json(read_text(file))
        return {name: settings[name] for name in _SETTINGS_ONLY_IN_FOLDERS if name in settings}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy the folder again.", path) from error


_RELEASED_NAMES = (
    (r"input_hint_block\.0\.(\w+)", rf"{_HINT_EMBEDDING}.conv_in.\1"),
    (r"zero_convs\.(\d+)\.0\.(\w+)", r"controlnet_down_blocks.\1.\2"),
    (r"middle_block_out\.0\.(\w+)", r"controlnet_mid_block.\1"),
)


def _name_in_diffusers(name: str, translate: Callable[[str], str]) -> str:
    """Return a tensor's diffusers name; an unknown name is kept and later reported as unexpected."""
    for pattern, template in _RELEASED_NAMES:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(template)
    match = re.fullmatch(r"input_hint_block\.(\d+)\.(\w+)", name)
    if match is not None:  # activations between the convolutions are numbered too
        return f"{_HINT_EMBEDDING}.blocks.{int(match[1]) // 2 - 1}.{match[2]}"
    return translate(name)


@dataclass(frozen=True)
class _LevelAttentions:
    """Module paths and attentions of a ControlNet's levels; the middle block comes last."""

    blocks: list[str]  # diffusers' module paths
    has_attention: list[bool]
    num_transformer_blocks: list[int]  # transformer layers of each attention

    @property
    def attentions(self) -> list[str]:
        """Module paths of the levels' attentions; levels without attention are omitted."""
        return [
            f"{block}.attentions.0"
            for block, has_attention in zip(self.blocks, self.has_attention, strict=True)
            if has_attention
        ]

    @property
    def transformers(self) -> list[str]:
        """Module paths of the attentions that contain transformer blocks."""
        return [
            f"{block}.attentions.0"
            for block, depth in zip(self.blocks, self.num_transformer_blocks, strict=True)
            if depth
        ]


def _read_config(
    checkpoint: Checkpoint, sources: Mapping[str, TensorSource], unet_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration of diffusers' ControlNetModel."""
    # Sizes are inferred from the file's tensor shapes; what shapes do not show is copied from the U-Net.
    unknown_sizes = CheckpointError(
        f"{checkpoint.path} is not a ControlNet of a supported kind: its tensors have unexpected sizes. "
        f"Pass {EXPECTED_FILE} to {OPTION}.",
        checkpoint.path,
    )
    # returns the shape of a tensor; raises `unknown_sizes` if the tensor is missing
    shape = make_shape_reader(checkpoint, sources, unknown_sizes)
    down = [f"down_blocks.{level}" for level in range(count(sources, r"down_blocks\.\d+"))]
    if not down:
        raise unknown_sizes
    levels = _read_levels(sources, [*down, "mid_block"])  # so index -1 is the middle block
    # diffusers has one number of layers for the last level and the middle block
    if levels.has_attention[-2] and levels.num_transformer_blocks[-2] != levels.num_transformer_blocks[-1]:
        raise unknown_sizes
    # by whether the level has attention
    block_types = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
    # The channels after each convolution that embeds the control image and changes their number
    num_blocks = count(sources, _HINT_BLOCKS)
    # in pairs: the second convolution of each pair changes the number of channels
    layers = ["conv_in", *(f"blocks.{number}" for number in range(1, num_blocks, 2))]
    return {
        "in_channels": shape("conv_in.weight")[1],
        "conditioning_channels": shape(f"{_HINT_EMBEDDING}.conv_in.weight")[1],
        "conditioning_embedding_out_channels": tuple(
            shape(f"{_HINT_EMBEDDING}.{layer}.weight")[0] for layer in layers
        ),
        "block_out_channels": tuple(shape(f"{block}.resnets.0.conv1.weight")[0] for block in down),
        "layers_per_block": count(sources, r"down_blocks\.0\.resnets\.\d+"),
        "down_block_types": tuple(block_types[has_attention] for has_attention in levels.has_attention[:-1]),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if levels.has_attention[-1] else "UNetMidBlock2D",
        "transformer_layers_per_block": (
            *levels.num_transformer_blocks[:-2],
            levels.num_transformer_blocks[-1],
        ),
        **_read_attention_settings(checkpoint, sources, levels, shape, unet_config),
        **_read_pooled_settings(sources, shape, unet_config),
        **{name: unet_config[name] for name in _COPIED_FROM_UNET if name in unet_config},
    }


def _read_attention_settings(
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    levels: _LevelAttentions,
    shape: Callable[..., tuple[int, ...]],
    unet_config: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the attention settings, from the file or, if it has no attention, from the U-Net."""
    text_width = unet_config["cross_attention_dim"]
    if levels.transformers:
        text_width = shape(f"{levels.transformers[0]}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    is_linear = unet_config["use_linear_projection"]
    projection = f"{levels.attentions[0]}.proj_in.weight" if levels.attentions else ""
    if projection in sources:  # a linear layer's weight has two dimensions, a 1x1 convolution's has four
        is_linear = len(checkpoint.tensors[sources[projection].names[0]].shape) == 2
    return {"cross_attention_dim": text_width, "use_linear_projection": is_linear}


def _read_pooled_settings(
    sources: Mapping[str, TensorSource],
    shape: Callable[..., tuple[int, ...]],
    unet_config: Mapping[str, Any],
) -> dict[str, Any]:
    """Return SDXL's settings for size conditioning and pooled text; {} for other models."""
    if "add_embedding.linear_1.weight" not in sources:
        return {}
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": unet_config.get("addition_time_embed_dim"),
        "projection_class_embeddings_input_dim": shape("add_embedding.linear_1.weight", 2)[1],
    }


def _read_levels(sources: Mapping[str, TensorSource], blocks: list[str]) -> _LevelAttentions:
    """Determine from tensor names which levels of a ControlNet have attention, and how deep it is."""
    has_attention = [f"{block}.attentions.0.norm.weight" in sources for block in blocks]
    # reduced SDXL ControlNets have attentions without transformer blocks, or no attention at all
    depths = [
        count(sources, rf"{re.escape(block)}\.attentions\.0\.transformer_blocks\.\d+") for block in blocks
    ]
    return _LevelAttentions(blocks, has_attention, depths)


# settings copied from the U-Net, because tensors do not show them
_COPIED_FROM_UNET = (
    "attention_head_dim", "num_attention_heads", "upcast_attention", "norm_num_groups", "norm_eps",
    "act_fn", "flip_sin_to_cos", "freq_shift",
)  # fmt: skip


_SETTINGS_ONLY_IN_FOLDERS = ("controlnet_conditioning_channel_order", "global_pool_conditions")


def _check_fits_unet(
    checkpoint: Checkpoint, config: Mapping[str, Any], unet_config: Mapping[str, Any], model_title: str
) -> None:
    """Raise CheckpointError if a ControlNet does not fit a U-Net."""
    if config["in_channels"] != 4 or config["conditioning_channels"] != 3:
        raise CheckpointError(
            f"{checkpoint.path} takes latents of {config['in_channels']} and guide images of "
            f"{config['conditioning_channels']} channels; only ControlNets with 4 and 3 are supported, not "
            f"those of inpainting models. Pass {EXPECTED_FILE} to {OPTION}.",
            checkpoint.path,
        )
    descriptions = {
        "cross_attention_dim": "text states",
        "block_out_channels": "channels of its levels",
        "layers_per_block": "layers of a level",
        "projection_class_embeddings_input_dim": "pooled text and sizes",
    }
    differences = ""
    for name, description in descriptions.items():
        in_control_net = _list_values(config, name)
        in_unet = _list_values(unet_config, name)
        if in_control_net != in_unet:
            differences += (
                f"\n  {description}: {_join_words(in_control_net)} in the ControlNet, "
                f"{_join_words(in_unet)} in the model"
            )
    if differences:
        raise CheckpointError(
            f"{checkpoint.path} is a ControlNet for {_guess_kind(config).title}, but --ckpt is "
            f"{model_title}:{differences}\n  Pass a ControlNet for {model_title} to {OPTION}.",
            checkpoint.path,
        )


def _guess_kind(config: Mapping[str, Any]) -> ModelKind:
    """Return the kind of model (1.x, 2.x or XL) that a ControlNet was made for."""
    if config.get("addition_embed_type"):
        return SDXL
    return SD2 if config["use_linear_projection"] else SD1


def _list_values(config: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """Return the distinct values of a U-Net setting, which is one value for all levels or a list."""
    value = config.get(name)
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return tuple(dict.fromkeys(values)) if name == "layers_per_block" else values


def _join_words(values: tuple[Any, ...]) -> str:
    return ", ".join("none" if value is None else str(value) for value in values)

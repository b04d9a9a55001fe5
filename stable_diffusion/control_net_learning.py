"""A ControlNet in training: a copy of the first half of the U-Net that also takes a control image.

Source: Zhang et al. 2023, arXiv 2302.05543. The network is diffusers'.
"""
# Letters: B images, H W pixels

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor, nn

from checkpoints.model_files import require_file
from checkpoints.writing import save_tensors
from protocols.family_networks import CustomNetwork, DefaultRate
from stable_diffusion.beside_unet import UnetControl
from stable_diffusion.contract import SDXL, ModelKind
from stable_diffusion.control_net_files import CONTROL_ONLY_LAYERS, load_control_net
from stable_diffusion.files import UNET
from stable_diffusion.released_names import ldm_unet_names
from stable_diffusion.training_files import TrainingFiles, count_layers
from stable_diffusion.training_options import WEIGHTS, StableDiffusionTrainingOptions, list_generation_command

CALLED = "ControlNet"
MODULE = "diffusers.ControlNetModel"
CPU = torch.device("cpu")
_HINT_BLOCK = re.compile(r"controlnet_cond_embedding\.blocks\.(\d+)\.(\w+)")


class TrainedControlNet(nn.Module):
    """A trainable ControlNet together with its frozen U-Net."""

    def __init__(self, network: ControlNetModel, new_layers_lr: float | None) -> None:
        """Store the network to train.

        Args:
            network: ControlNetModel of diffusers.
            new_layers_lr: Learning rate of layers that a U-Net does not have; None uses the common rate.
        """
        super().__init__()
        self.network = network
        self.new_layers_lr = new_layers_lr
        self.multiplier = 1.0

    def set_multiplier(self, multiplier: float) -> None:
        """Set the factor on the ControlNet's residuals."""
        self.multiplier = multiplier

    def prepare_optimizer_params(self, learning_rate: float) -> tuple[list[dict[str, Any]], list[str]]:
        """Return optimizer parameter groups and their names: layers copied from the U-Net, and new layers."""
        if self.new_layers_lr is None:
            return [{"params": list(self.network.parameters()), "lr": learning_rate}], ["control_net"]
        rates = {"control_net copy": learning_rate, "control_net own": self.new_layers_lr}
        params: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
        for name, weight in self.network.named_parameters():
            group = "control_net own" if name.startswith(CONTROL_ONLY_LAYERS) else "control_net copy"
            params[group].append(weight)
        return [{"params": params[name], "lr": rate} for name, rate in rates.items()], [*rates]

    def compute_residuals(
        self, controls: Tensor | None, strength: float, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the residuals as keyword arguments for a U-Net call; {} without control images.

        Args:
            controls: Control images, B 3 H W in 0..1.
            strength: Factor on the residuals.
            arguments: Arguments of the U-Net's call.
        """
        strength *= self.multiplier
        if controls is None or strength == 0:
            return {}
        dtype = self.network.dtype
        sample = arguments["sample"]
        added = arguments["added_cond_kwargs"]  # SDXL's pooled text and sizes; None for other models
        if added is not None:
            added = {**added, "text_embeds": added["text_embeds"].to(dtype)}
        down, middle = self.network(
            sample.to(dtype),
            arguments["timestep"],
            encoder_hidden_states=arguments["encoder_hidden_states"].to(dtype),
            controlnet_cond=controls.to(dtype),
            conditioning_scale=strength,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return {
            "down_block_additional_residuals": tuple(features.to(sample.dtype) for features in down),
            "mid_block_additional_residual": middle.to(sample.dtype),
        }


def make_control_net(
    path: Path | None,
    new_layers_lr: float | None,
    gradient_checkpointing: bool,
    kind: ModelKind,
    unet: Any,
    reads_weights: bool,
) -> TrainedControlNet:
    """Build a ControlNet for a U-Net: a copy of its first half, or one loaded from a file.

    Args:
        path: File to start from; None copies the U-Net.
        new_layers_lr: Learning rate of layers that the U-Net does not have; None uses the common rate.
        gradient_checkpointing: Whether to use gradient checkpointing, as in the U-Net.
        kind: Kind of the checkpoint.
        unet: The U-Net.
        reads_weights: Whether to read the weights of `path`; otherwise the U-Net is always copied.

    Raises:
        CheckpointError: If the file does not fit the U-Net.
    """
    if path is None or not reads_weights:
        network = copy_unet(unet)
    else:
        network = load_control_net(path, unet.config, kind.title, device=CPU, dtype=torch.float32, base=unet)
    # the U-Net has one processor for all its layers, which computes the chosen kind of attention
    network.set_attn_processor(next(iter(unet.attn_processors.values())))
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    trained = TrainedControlNet(network.train(), new_layers_lr)
    # the family calls this before each U-Net call, to add the ControlNet's residuals to it
    unet.control = UnetControl(trained.compute_residuals)
    return trained


def copy_unet(unet: Any) -> ControlNetModel:
    """Build a ControlNet from the weights of a U-Net's encoder half; its zero convolutions are new.

    Like diffusers' `from_unet`, but it also accepts `layers_per_block` as a list of equal numbers.
    """
    parameters = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in parameters}
    (config["layers_per_block"],) = set(count_layers(unet.config))  # diffusers has one number for all levels
    network = ControlNetModel(**config)
    copied = {name: tensor for name, tensor in unet.state_dict().items() if name in network.state_dict()}
    network.load_state_dict(copied, strict=False)
    return network


def describe_control_net(
    options: StableDiffusionTrainingOptions,
    files: TrainingFiles,
    *,
    path: Path | None,
    new_layers_lr: float | None,
    gradient_checkpointing: bool,
) -> CustomNetwork:
    """Describe how a training run builds, checks and saves a ControlNet.

    Args:
        options: Options of the run.
        files: The checkpoint.
        path: File to start from; None copies the U-Net.
        new_layers_lr: Learning rate of layers that the U-Net does not have; None uses the common rate.
        gradient_checkpointing: Whether to use gradient checkpointing.
    """

    def check() -> None:
        if path is not None:
            file = require_file(path, WEIGHTS, "")
            load_control_net(
                file, files.unet_config, files.kind.title, device=torch.device("meta"), dtype=torch.float32
            )

    origin = "a copy of the U-Net's first half" if path is None else f"from {path.name}"
    return CustomNetwork(
        label=CALLED,
        description=f"{CALLED}, {origin}",
        architecture_suffix="controlnet",
        make=partial(make_control_net, path, new_layers_lr, gradient_checkpointing, files.kind),
        check=check,
        generate=partial(list_generation_command, options, "--control_net_models"),
        # the lowest, a typical and the highest learning rate
        default_rate=DefaultRate(5e-7, "1e-5", 5e-4),
        write=partial(_write, files),
        start_option=WEIGHTS.removeprefix("--"),
    )


def _write(
    files: TrainingFiles,
    module: nn.Module,
    path: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    """Write a ControlNet, with diffusers' tensor names for XL, or the released names for 1.x and 2.x."""
    assert isinstance(module, TrainedControlNet)
    state = module.network.state_dict()
    name_in_file = {name: name for name in state}
    if files.kind is not SDXL:
        name_in_file = ldm_control_net_names(count_layers(module.network.config), [*state])
    tensors = {
        name_in_file[name]: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()
    }
    save_tensors(path, tensors, metadata)


def ldm_control_net_names(layers: list[int], names: Sequence[str]) -> dict[str, str]:
    """Map the diffusers name of each ControlNet weight to its published name.

    Args:
        layers: Number of residual blocks at each level.
        names: Diffusers names of the weights.
    """
    own = [name for name in names if name.startswith(CONTROL_ONLY_LAYERS)]
    unet_names = [name for name in names if not name.startswith(CONTROL_ONLY_LAYERS)]
    released = {ours: theirs.removeprefix(UNET) for theirs, ours in ldm_unet_names(layers, unet_names)}
    return released | {name: _get_ldm_control_name(name, own) for name in own}


def _get_ldm_control_name(name: str, names: Collection[str]) -> str:
    """Return the published name of a ControlNet weight without a counterpart in the U-Net."""
    hint_block = _HINT_BLOCK.fullmatch(name)
    if hint_block is not None:  # even numbers: an activation comes after each convolution
        return f"input_hint_block.{2 * int(hint_block[1]) + 2}.{hint_block[2]}"
    leaf = name.rpartition(".")[2]
    if name.startswith("controlnet_cond_embedding.conv_out."):
        blocks = {match[1] for match in map(_HINT_BLOCK.fullmatch, names) if match is not None}
        return f"input_hint_block.{2 * len(blocks) + 2}.{leaf}"
    numbered = re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(\w+)", name)
    if numbered is not None:
        return f"zero_convs.{numbered[1]}.0.{leaf}"
    published_path = "input_hint_block.0" if "conv_in" in name else "middle_block_out.0"
    return f"{published_path}.{leaf}"

"""A ControlNet of FLUX.1 in training: a copy of the transformer's first blocks.

It sees the control image as latents. The network is diffusers' `FluxControlNetModel`. Source: Zhang et al.
2023, arXiv 2302.05543.
"""
# Letters: B batch, L image tokens, Z latent channels, C width

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from torch import Tensor, nn

from checkpoints.dialects import translate_name
from checkpoints.filling import on_meta_device
from checkpoints.writing import stream_tensors
from flux.configs import CHROMA, FluxConfig
from flux.control_net import (
    build_network,
    compute_block_residuals,
    load_network,
    make_control_net_settings,
    read_settings,
)
from flux.files import DIALECTS, FluxFiles
from flux.model import FluxModel
from flux.options import CONTROL_NET, FluxControlNetTrainingOptions
from modules.errors import OptionError
from modules.option_values import Placeholder, option_argv
from protocols.family_networks import CustomNetwork, DefaultRate
from protocols.loading import TensorInfo

DISPLAY_NAME = "ControlNet"
MODULE = "diffusers.FluxControlNetModel"
ZERO_INITIALIZED = "controlnet_"  # names begin so where a transformer has no such part


class TrainedFluxControl(nn.Module):
    """A ControlNet in training, next to a frozen transformer."""

    def __init__(self, network: FluxControlNetModel, config: FluxConfig) -> None:
        """Wrap a ControlNet for a transformer with this `config`."""
        super().__init__()
        self.network = network
        self.multiplier = 1.0  # 0 shows the base
        self._blocks = config.double_blocks, config.single_blocks

    def set_multiplier(self, multiplier: float) -> None:
        """Set the factor by which the ControlNet's outputs are multiplied."""
        self.multiplier = multiplier

    def prepare_optimizer_params(self, learning_rate: float) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the parameter groups of the optimizer, and their names."""
        return [{"params": list(self.network.parameters()), "lr": learning_rate}], ["control_net"]

    def compute_residuals(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        t5: Tensor,
        pooled: Tensor | None,
        guidance: Tensor | None,
        control: Tensor,
        strength: float,
    ) -> list[Tensor | None]:
        """Return what the ControlNet adds after each block; [] if its factor is 0."""
        strength *= self.multiplier
        if strength == 0:
            return []
        return compute_block_residuals(
            self.network,
            self._blocks,
            noisy=noisy,
            timesteps=timesteps,
            t5=t5,
            pooled=pooled,
            guidance=guidance,
            control=control,
            strength=strength,
        )


def describe_control_net(options: FluxControlNetTrainingOptions, files: FluxFiles) -> CustomNetwork:
    """Describe a ControlNet to the training loop: its names, and functions to build, check and save it."""
    path = options.controlnet
    copied = f"a copy of {options.double_blocks} double and {options.single_blocks} single blocks"
    return CustomNetwork(
        label=DISPLAY_NAME,
        description=f"{DISPLAY_NAME}, {copied if path is None else f'from {path.name}'}",
        architecture_suffix="controlnet",
        make=partial(make_control_net, options),
        check=partial(_check_can_train, options, files),
        generate=_make_generation_command,
        default_rate=DefaultRate(5e-7, "1e-5", 5e-4),  # lowest, typical, highest
        write=_write_control_net,
        start_option=CONTROL_NET.removeprefix("--"),
    )


def make_control_net(
    options: FluxControlNetTrainingOptions, dit: nn.Module, with_values: bool
) -> TrainedFluxControl:
    """Build the ControlNet to train and attach it to the transformer, whose calls then run it.

    It starts from the transformer's first blocks or from a file. Without `with_values`, it stays on the
    meta device. Raises CheckpointError if the file does not fit the transformer.
    """
    assert isinstance(dit, FluxModel)
    path = options.controlnet
    if path is not None:
        device = torch.device("cpu" if with_values else "meta")
        # trained in float32
        network = load_network(path, dit.config, device, torch.float32)
    else:
        settings = make_control_net_settings(dit.config, options.double_blocks, options.single_blocks)
        with on_meta_device():
            network = build_network(settings)
        if with_values:
            network.load_state_dict(_copy_weights(network, dit), assign=True)
    if options.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    trained = TrainedFluxControl(network.train(), dit.config)
    dit.controlnet = trained.compute_residuals
    return trained


def _copy_weights(network: FluxControlNetModel, dit: FluxModel) -> dict[str, Tensor]:
    """Return a new ControlNet's weights: copies of the transformer's, and zeros for layers that only it has.

    `network` is on the meta device; the result is float32 on the CPU.
    """
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    weights = {
        name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith(ZERO_INITIALIZED)
    }
    copied = [name for name in shapes if not name.startswith(ZERO_INITIALIZED)]
    state = dit.state_dict()
    # several layers of the ControlNet (diffusers' names) may be one stacked matrix of the transformer
    for our_name, names in _group_by_our_weight(copied).items():
        stacked = state[our_name].to("cpu", torch.float32)
        rows = stacked.split([shapes[name][0] for name in names])
        weights |= {name: tensor.clone() for name, tensor in zip(names, rows, strict=True)}
    return weights


def _group_by_our_weight(names: Iterable[str]) -> dict[str, list[str]]:
    """Group diffusers' weights by our fused weight; each is a block of its rows, sorted by row."""
    _, table = DIALECTS["diffusers"]
    by_row_block: dict[str, dict[int, str]] = {}
    for name in names:
        # "block.qkv#1" is the second block of rows of our weight block.qkv
        our_name, _, index = translate_name(name, table).partition("#")
        by_row_block.setdefault(our_name, {})[int(index or 0)] = name
    return {
        our_name: [blocks[index] for index in sorted(blocks)] for our_name, blocks in by_row_block.items()
    }


def _check_can_train(options: FluxControlNetTrainingOptions, files: FluxFiles) -> None:
    """Check that a ControlNet can be trained with the transformer; only headers of files are read."""
    config = files.dit_header().config
    if config.kind == CHROMA:
        raise OptionError(
            f"{files.dit_path} is Chroma, which lacks the embeddings of time and pooled text that "
            "ControlNets of FLUX.1 use. Pass FLUX.1 dev or schnell"
        )
    if options.controlnet is None:
        _check_can_copy_blocks(options, files)
    else:
        # Raise OptionError if a typed number of blocks differs from that of the ControlNet to start from
        # `config` has the transformer's dimensions.
        settings = read_settings(options.controlnet, config)
        typed = {
            "num_double_layers": (options.num_double_layers, settings["num_layers"]),
            "num_single_layers": (options.num_single_layers, settings["num_single_layers"]),
        }
        for name, (number, stored) in typed.items():
            if number is not None and number != stored:
                raise OptionError(
                    f"--{name} is {number}, but {options.controlnet} has {stored}, which does not change. "
                    "Omit the option"
                )


def _check_can_copy_blocks(options: FluxControlNetTrainingOptions, files: FluxFiles) -> None:
    """Raise OptionError unless a new ControlNet can copy the transformer's first blocks."""
    header = files.dit_header()
    if header.block_dtype.itemsize == 1:
        raise OptionError(
            f"{files.dit_path} is rounded to 8 bits or fewer, but a ControlNet starts as a copy of its "
            f"weights. Pass the file in 16 bits, or a ControlNet to start from to {CONTROL_NET}"
        )
    sizes = {
        "num_double_layers": (options.double_blocks, header.config.double_blocks),
        "num_single_layers": (options.single_blocks, header.config.single_blocks),
    }
    for name, (requested, maximum) in sizes.items():
        if requested > maximum:
            raise OptionError(
                f"--{name} {requested}: a ControlNet copies the first blocks, but {files.dit_path} has "
                f"{maximum} of them. Use fewer"
            )


def _write_control_net(
    module: nn.Module, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Write a ControlNet's weights under diffusers' names."""
    assert isinstance(module, TrainedFluxControl)
    tensors = {name: tensor.detach() for name, tensor in module.network.state_dict().items()}
    infos = {name: TensorInfo(dtype or tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensors(path, infos, lambda name: tensors[name].to(infos[name].dtype), metadata)


def _make_generation_command(file: Path, sample: Mapping[str, Any], base_command: Sequence[str]) -> list[str]:
    """Return the command that generates with a trained ControlNet, `base_command` with more options."""
    control = sample.get("control_path") or Placeholder("CONTROL_PICTURE")
    strength = (sample.get("extra") or {}).get("control_multiplier")
    further = {CONTROL_NET: file, "--control_image": control, "--control_multiplier": strength}
    return [*base_command, *option_argv(further)]

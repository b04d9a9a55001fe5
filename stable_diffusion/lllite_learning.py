"""ControlNet-LLLite in training: made for a U-Net, attached to it, and started from a file."""

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.dialects import load_planned
from checkpoints.model_files import require_file
from checkpoints.opening import open_checkpoint
from modules.errors import OptionError, UserError
from protocols.family_networks import CustomNetwork, DefaultRate, describe_start
from stable_diffusion.beside_unet import UnetControl
from stable_diffusion.lllite_modules import (
    A_LLLITE,
    Lllite,
    LlliteDimensions,
    LlliteModule,
    find_layer,
    find_layer_path,
    plan_lllite,
    read_lllite,
)
from stable_diffusion.sdxl.options import SdxlLlliteTrainingOptions
from stable_diffusion.training_options import list_generation_command

CALLED = "ControlNet-LLLite"
MODULE = "networks.control_net_lllite"  # module name in other programs
WIDTH, RANK = 32, 64  # sizes of the released files
WEIGHTS = "--network_weights"
CPU = torch.device("cpu")


class TrainedLllite(Lllite):
    """LLLite modules in training, which modify layer inputs in every U-Net call."""

    def __init__(self, parts: Mapping[str, LlliteDimensions], dropout: float = 0.0) -> None:
        super().__init__(parts, dropout)
        self.multiplier = 1.0
        # for the current U-Net call, and for blocks that gradient checkpointing recomputes: control images,
        # B 3 H W in -1..1 (None: the U-Net alone), and the strength for a sample
        self.controls: Tensor | None = None
        self.strength = 1.0

    def set_multiplier(self, multiplier: float) -> None:
        """Set the factor on the corrections of all modules."""
        self.multiplier = multiplier

    def set_control(self, controls: Tensor | None, strength: float) -> None:
        """Set the control images of the next U-Net call, B 3 H W in 0..1; None for no control."""
        self.controls = None if controls is None else controls * 2 - 1
        self.strength = strength

    def attach_to(self, unet: nn.Module, path: Path) -> None:
        """Attach the modules to the inputs of their layers.

        Args:
            unet: The U-Net.
            path: File of the modules, for messages.

        Raises:
            CheckpointError: If they do not fit the U-Net.
        """
        for name, module in self.named_children():
            assert isinstance(module, LlliteModule)
            layer = find_layer(unet, name, dimensions=module.dimensions, path=path, option=WEIGHTS)
            layer.register_forward_pre_hook(partial(self._change_input, module))
        # called before each U-Net call with the control images
        unet.control = UnetControl(self.compute_residuals)  # type: ignore[assignment]

    def compute_residuals(
        self, controls: Tensor | None, strength: float, _: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Store a U-Net call's control images for the forward hooks; return no additional arguments."""
        self.set_control(controls, strength)
        return {}

    def _change_input(
        self, module: LlliteModule, _: nn.Module, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Forward pre-hook of a layer: return its modified inputs, or None without a control image."""
        strength = self.multiplier * self.strength
        if self.controls is None or strength == 0:
            return None
        x, *others = inputs
        dtype = next(module.parameters()).dtype
        change = module(x.to(dtype), module.embed(self.controls.to(dtype)))
        change = change.to(x.dtype)
        return x + (change if strength == 1 else strength * change), *others


def make_lllite(options: SdxlLlliteTrainingOptions, unet: nn.Module, reads_weights: bool) -> TrainedLllite:
    """Build LLLite modules for a U-Net and attach them to its layers.

    New modules have no effect at first: weight and bias of `up` are zero.

    Args:
        options: Options of the run.
        unet: The U-Net.
        reads_weights: Whether to read the weights in --network_weights.

    Raises:
        CheckpointError: If the file does not fit the U-Net.
        OptionError: If the file's dimensions differ from the options.
    """
    path = options.network_weights
    dropout = options.network_dropout or 0.0
    if path is None:
        width, rank = options.cond_emb_dim or WIDTH, options.network_dim or RANK
        network = TrainedLllite(plan_lllite(unet, width, rank), dropout)
        for module in network.children():
            assert isinstance(module, LlliteModule)
            nn.init.zeros_(module.up[0].weight)  # type: ignore[arg-type]
            nn.init.zeros_(module.up[0].bias)  # type: ignore[arg-type]
        network.attach_to(unet, Path())  # the path is only for messages about a file
        return network
    with open_checkpoint(path) as checkpoint:
        plan = read_lllite(checkpoint, WEIGHTS)
        _check_dimensions(options, path, next(iter(plan.config.values())))
        build = partial(TrainedLllite, dropout=dropout)
        if reads_weights:
            network = load_planned(plan, build, device=CPU, dtype=torch.float32, label=A_LLLITE)
        else:
            network = build(plan.config)
    network.attach_to(unet, path)
    return network


def _check_dimensions(options: SdxlLlliteTrainingOptions, path: Path, dimensions: LlliteDimensions) -> None:
    """Raise OptionError if options contradict the dimensions of the LLLite file to continue training from."""
    option_and_stored = {
        "network_dim": (options.network_dim, dimensions.rank),
        "cond_emb_dim": (options.cond_emb_dim, dimensions.convolutions[-1][0]),
    }
    for name, (value, stored) in option_and_stored.items():
        if value is not None and value != stored:
            raise OptionError(
                f"--{name} {value}: {path}, whose training continues, has {stored}. Pass {stored}, or "
                "omit the option"
            )


def describe_lllite(options: SdxlLlliteTrainingOptions) -> CustomNetwork:
    """Describe how a training run builds and checks a ControlNet-LLLite, and how to generate with it."""
    width, rank = _start_sizes(options)
    sizes = f", rank {rank}, control image as {width} numbers"
    return CustomNetwork(
        label=CALLED,
        description=describe_start(CALLED, sizes, options.network_weights),
        architecture_suffix="control-net-lllite",
        make=partial(make_lllite, options),
        check=partial(_check_file, options),
        generate=partial(list_generation_command, options, "--control_net_lllite_models"),
        default_rate=DefaultRate(2e-5, "2e-4", 5e-3),
        values={"ss_network_dim": rank, "ss_cond_emb_dim": width},
    )


def _start_sizes(options: SdxlLlliteTrainingOptions) -> tuple[int, int]:
    """Return the LLLite modules' embedding width and rank, from --network_weights or the options."""
    path = options.network_weights
    if path is not None:
        # an unusable file is reported by the training's own check
        with contextlib.suppress(UserError, OSError), open_checkpoint(path) as checkpoint:
            dimensions = next(iter(read_lllite(checkpoint, WEIGHTS).config.values()))
            return dimensions.convolutions[-1][0], dimensions.rank
    return options.cond_emb_dim or WIDTH, options.network_dim or RANK


def _check_file(options: SdxlLlliteTrainingOptions) -> None:
    """Check by its header that the LLLite --network_weights fits; raise CheckpointError or OptionError."""
    path = options.network_weights
    if path is None:
        return
    with open_checkpoint(require_file(path, WEIGHTS, "")) as checkpoint:
        plan = read_lllite(checkpoint, WEIGHTS)
        load_planned(plan, Lllite, device=torch.device("meta"), dtype=torch.float32, label=A_LLLITE)
        _check_dimensions(options, path, next(iter(plan.config.values())))
        for name in plan.config:
            if find_layer_path(name) is None:
                raise OptionError(
                    f"{WEIGHTS} {path}: Stable Diffusion XL has no layer for {name}. Pass another file."
                )
